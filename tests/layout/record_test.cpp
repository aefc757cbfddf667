// SPDX-License-Identifier: Apache-2.0

#include <cstdint>
#include <vector>

#include <kvarn/layout/record.hpp>

#include "../catch.hpp"
#include "../reference/reference.hpp"

namespace {

kvarn::format named(const char* name, int head_dim)
{
    const auto parsed = kvarn::parse_format(name, head_dim);
    REQUIRE(parsed.ok());
    return parsed.value;
}

}  // namespace

TEST_CASE("layout/record: the sizes that the specification quotes", "[unit]")
{
    CHECK(kvarn::record_bytes(named("k4v2_g128", 128)) == 13824);
    CHECK(kvarn::record_bytes(named("k4v4_g128", 128)) == 17920);
    CHECK(kvarn::record_bytes(named("k2v2_g128", 128)) == 9728);
    CHECK(kvarn::record_bytes(named("k4v2_g64", 64)) == 3840);
    CHECK(kvarn::bits_per_element(named("k2v2_g128", 128)) == 2.375);
}

TEST_CASE("layout/record: the reference stride is a power of two per token from head_dim 256 on", "[unit]")
{
    using kvarn::record_stride;
    CHECK(kvarn::record_bytes(named("k4v2_g64", 256), record_stride::reference) == 16384);
    CHECK(kvarn::record_bytes(named("k2v2_g128", 256), record_stride::reference) == 32768);
    CHECK(kvarn::record_bytes(named("k4v2_g128", 128), record_stride::reference) == 13824);
    CHECK(kvarn::record_bytes(named("k4v2_g128", 224), record_stride::reference) ==
          kvarn::record_bytes(named("k4v2_g128", 224), record_stride::packed));
    for (const int d : {256, 288, 320, 384, 448, 512, 576})
        for (const int g : {32, 64, 128, 256}) {
            kvarn::format_spec spec;
            spec.head_dim_k = spec.head_dim_v = d;
            spec.group = g;
            const auto made = kvarn::make_format(spec);
            REQUIRE(made.ok());
            const std::size_t bytes = kvarn::record_bytes(made.value, record_stride::reference);
            const std::size_t content = kvarn::layout_of(made.value).content_bytes;
            const std::size_t per_token = bytes / static_cast<std::size_t>(g);
            CHECK(bytes % static_cast<std::size_t>(g) == 0);
            CHECK((per_token & (per_token - 1)) == 0);
            CHECK(bytes >= content);
            CHECK(bytes / 2 < content);
        }
}

TEST_CASE("layout/record: records rounded up to a multiple of bytes", "[unit]")
{
    using kvarn::record_stride;
    const auto narrow = named("k4v2_g64", 64), wide = named("k4v2_g128", 128);
    static_assert(record_stride{} == record_stride::packed && !(record_stride{} == record_stride::reference));
    static_assert(record_stride::multiple_of(8) == record_stride::packed && record_stride::multiple_of(0) == record_stride::packed);
    CHECK(kvarn::record_bytes(narrow, record_stride::multiple_of(4096)) == 4096);
    CHECK(kvarn::record_bytes(wide, record_stride::multiple_of(4096)) == 4 * 4096);
    CHECK(kvarn::record_bytes(wide, record_stride::multiple_of(13824)) == 13824);
    CHECK(kvarn::record_bytes(wide, record_stride::multiple_of(1)) == kvarn::layout_of(wide).content_bytes);
    CHECK(kvarn::record_bytes(wide, record_stride::multiple_of(SIZE_MAX)) == SIZE_MAX);
    CHECK(kvarn::bits_per_element(narrow, record_stride::multiple_of(4096)) == 8.0 * 4096 / (64 * 128));

    // Layers of two head dimensions, one page size.
    const std::size_t page = kvarn::record_bytes(wide);
    CHECK(kvarn::record_bytes(narrow, record_stride::multiple_of(page)) == page);
    CHECK(kvarn::grid_bytes(narrow, 3, 2, record_stride::multiple_of(page)) == 6 * page);
    std::byte memory[1]{};
    const auto grid = kvarn::tile_major_records(narrow, memory, 6 * page, 3, 2, record_stride::multiple_of(page));
    CHECK(grid.head_stride == page);
    CHECK(grid.tile_stride == 2 * page);
    CHECK(grid.record_bytes == page);
}

TEST_CASE("layout/record: fields follow each other as written in the table", "[unit]")
{
    std::size_t formats = 0;
    for (const int dk : {32, 36, 100, 192, 512})
        for (const int dv : {32, 44, 128, 576})
            for (const int k : {2, 3, 5, 8})
                for (const int v : {0, 3, 4, 6})
                    for (const int g : {32, 256})
                        for (const int exact : {0, 4, 64}) {
                            kvarn::format_spec spec;
                            spec.head_dim_k = dk;
                            spec.head_dim_v = dv;
                            spec.key_bits = k;
                            spec.value_bits = v;
                            spec.group = g;
                            spec.exact_channels = exact;
                            spec.key_rotation = spec.value_rotation = kvarn::rotation::none;
                            const auto made = kvarn::make_format(spec);
                            REQUIRE(made.ok());
                            const reference::shape s{dk, dv, k, v, g, false, exact};
                            const reference::field_offsets want = reference::offsets(s);
                            const kvarn::record_layout got = kvarn::layout_of(made.value);
                            const bool same = got.k_codes == want.k_codes && got.k_channel_scale == want.k_channel_scale &&
                                              got.k_channel_zero == want.k_channel_zero && got.k_token_scale == want.k_token_scale &&
                                              got.v_codes == want.v_codes && got.v_channel_scale == want.v_channel_scale &&
                                              got.v_token_scale == want.v_token_scale && got.v_token_zero == want.v_token_zero &&
                                              got.exact == want.exact && got.content_bytes == want.end;
                            CHECK(same);
                            CHECK(kvarn::record_bytes(made.value) == (want.end + 7) / 8 * 8);
                            ++formats;
                        }
    CHECK(formats == 5 * 4 * 4 * 4 * 2 * 3);
}

TEST_CASE("layout/record: dense grids", "[unit]")
{
    const kvarn::format f = named("k4v2_g64", 64);
    std::vector<std::uint8_t> bytes(kvarn::grid_bytes(f, 3, 2));
    CHECK(bytes.size() == 6 * 3840);
    const auto by_tile = kvarn::tile_major_records(f, bytes.data(), bytes.size(), 3, 2);
    const auto by_head = kvarn::head_major_records(f, bytes.data(), bytes.size(), 3, 2);
    for (std::size_t tile = 0; tile < 3; ++tile)
        for (std::size_t head = 0; head < 2; ++head) {
            CHECK(by_tile.at(tile, head) == bytes.data() + 3840 * (tile * 2 + head));
            CHECK(by_head.at(tile, head) == bytes.data() + 3840 * (head * 3 + tile));
        }
    // Parts of a grid own what the grid owns behind their first record, so that checks of sizes hold for them too.
    for (const auto& grid : {by_tile, by_head}) {
        const auto head = grid.head(1), one = grid.one(2, 1), part = grid.part(1, 2, 0);
        CHECK((head.tiles == 3 && head.heads == 1 && head.at(2, 0) == grid.at(2, 1)));
        CHECK((one.tiles == 1 && one.heads == 1 && one.at(0, 0) == grid.at(2, 1)));
        CHECK((part.tiles == 2 && part.heads == 1 && part.at(1, 0) == grid.at(2, 0)));
        for (const auto& x : {head, one, part}) {
            CHECK(x.data + x.bytes == bytes.data() + bytes.size());
            CHECK(x.record_bytes == grid.record_bytes);
        }
    }
    CHECK(decltype(by_tile){}.head(0).data == nullptr);
    CHECK(kvarn::full_tiles(f, 0) == 0);
    CHECK(kvarn::full_tiles(f, 63) == 0);
    CHECK(kvarn::full_tiles(f, 129) == 2);
}
