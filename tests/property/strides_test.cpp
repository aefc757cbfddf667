// SPDX-License-Identifier: Apache-2.0
// Views of any strides, records at any address and in any order give the same bytes; nothing outside the views is touched.

#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

#include "../catch.hpp"
#include "../support/library.hpp"

namespace {

constexpr std::size_t tiles = 2, heads = 3;

/// Where element (token, head, channel) of a view lies in a buffer of `size` elements.
struct arrangement {
    std::string name;
    std::ptrdiff_t first, token_stride, head_stride, channel_stride;
    std::size_t size;
};

std::vector<arrangement> arrangements(std::size_t tokens_, std::size_t channels_)
{
    const auto t = static_cast<std::ptrdiff_t>(tokens_), h = static_cast<std::ptrdiff_t>(heads),
               c = static_cast<std::ptrdiff_t>(channels_);
    const auto all = static_cast<std::size_t>(t * h * c);
    return {
        {"[token][head][channel]", 0, h * c, c, 1, all},
        {"[head][token][channel]", 0, c, t * c, 1, all},
        {"tokens backwards", (t - 1) * h * c, -h * c, c, 1, all},
        {"heads backwards", (h - 1) * c, h * c, -c, 1, all},
        {"padded tokens, odd offset", 3, h * (c + 5) + 7, c + 5, 1, static_cast<std::size_t>(t * (h * (c + 5) + 7) + 3)},
        {"every other channel", 1, h * c * 2, c * 2, 2, 2 * all + 1},
        {"channels backwards", c - 1, h * c, c, -1, all},
        {"[channel][head][token]", 0, 1, t, t * h, all},
        {"[head][channel][token]", 0, 1, t * c, t, all},
    };
}

template <class T>
struct arranged {
    std::vector<T> memory;
    kvarn::kv_view<T> view;
};

constexpr float filler = -12345.0f;

template <class T>
arranged<T> arrange(const arrangement& a, const std::vector<float>& dense, std::size_t tokens, std::size_t channels)
{
    arranged<T> out;
    if (!channels) return out;
    out.memory.assign(a.size, support::stored<T>(filler));
    out.view = {out.memory.data() + a.first, tokens, heads, channels, a.token_stride, a.head_stride, a.channel_stride};
    for (std::size_t t = 0; t < tokens; ++t)
        for (std::size_t h = 0; h < heads; ++h)
            for (std::size_t c = 0; c < channels; ++c)
                out.view.at(t, h)[static_cast<std::ptrdiff_t>(c) * a.channel_stride] = support::stored<T>(dense[(t * heads + h) * channels + c]);
    return out;
}

std::vector<kvarn::format> test_formats()
{
    return {support::make(reference::shape{64, 64, 4, 2, 64, true, 0}), support::make(reference::shape{36, 40, 3, 5, 32, true, 0}),
            support::make(reference::shape{100, 44, 6, 3, 32, false, 4}), support::make(reference::shape{128, 64, 2, 0, 64, true, 64})};
}

}  // namespace

TEST_CASE("property/strides: records do not depend on the strides of the input", "[property]")
{
    support::random_source random(71);
    for (const kvarn::format& f : test_formats()) {
        const auto x = support::random_tiles(random, f, tiles, heads, support::tile_kind::channel_outliers);
        const auto wanted = support::encode(f, x);
        const std::size_t tokens = support::tokens_of(f, tiles);
        const auto kc = static_cast<std::size_t>(f.key_channels()), vc = static_cast<std::size_t>(f.head_dim_v());
        const auto k_ways = arrangements(tokens, kc), v_ways = arrangements(tokens, vc);
        for (std::size_t i = 0; i < k_ways.size(); ++i) {
            INFO(support::describe(f) << ", K " << k_ways[i].name);
            const auto check = [&](auto element, auto arch) {
                using T = decltype(element);
                auto k = arrange<T>(k_ways[i], x.k, tokens, kc);
                auto v = arrange<T>(v_ways[(i * 5 + 1) % v_ways.size()], x.v, tokens, vc);
                support::bytes records(wanted.size(), 0xa5);
                std::vector<std::byte> scratch(kvarn::scratch_bytes(f));
                REQUIRE(kvarn::quantize_kv<decltype(arch)>(
                            f, k.view, v.view, kvarn::tile_major_records(f, support::as_bytes(records.data()), records.size(), tiles, heads),
                            std::span<std::byte>(scratch)) == kvarn::status::ok);
                const bool same = records == wanted;
                CHECK(same);
            };
            support::for_each_arch([&](auto arch) {
                check(0.0f, arch);
                check(kvarn::half{}, arch);
            });
        }
    }
}

TEST_CASE("property/strides: results do not depend on the strides of the output, and gaps stay untouched", "[property]")
{
    support::random_source random(72);
    for (const kvarn::format& f : test_formats()) {
        auto records = support::encode(f, support::random_tiles(random, f, tiles, heads, support::tile_kind::gaussian));
        const std::size_t tokens = support::tokens_of(f, tiles);
        const auto kc = static_cast<std::size_t>(f.key_channels()), vc = static_cast<std::size_t>(f.head_dim_v());
        const auto k_ways = arrangements(tokens, kc), v_ways = arrangements(tokens, vc);
        for (const auto basis : {kvarn::basis::original, kvarn::basis::rotated}) {
            const auto dense = support::decode(f, records, tiles, heads, basis);
            for (std::size_t i = 0; i < k_ways.size(); ++i) {
                INFO(support::describe(f) << ", K " << k_ways[i].name);
                const auto check = [&](auto element, auto arch) {
                    using T = decltype(element);
                    const std::vector<float> blank_k(tokens * heads * kc, filler), blank_v(tokens * heads * vc, filler);
                    const auto& v_way = v_ways[(i * 7 + 3) % v_ways.size()];
                    auto k = arrange<T>(k_ways[i], blank_k, tokens, kc), v = arrange<T>(v_way, blank_v, tokens, vc);
                    std::vector<std::byte> scratch(kvarn::scratch_bytes(f));
                    REQUIRE(kvarn::dequantize_kv<decltype(arch)>(
                                f, kvarn::tile_major_records(f, support::as_bytes(records.data()), records.size(), tiles, heads), k.view, v.view,
                                basis, std::span<std::byte>(scratch)) == kvarn::status::ok);
                    // The whole memory, gaps included, is what arranging the dense result gives.
                    CHECK(support::same_bits(k.memory, arrange<T>(k_ways[i], dense.k, tokens, kc).memory));
                    CHECK(support::same_bits(v.memory, arrange<T>(v_way, dense.v, tokens, vc).memory));
                };
                support::for_each_arch([&](auto arch) {
                    check(0.0f, arch);
                    check(kvarn::half{}, arch);
                });
            }
        }
    }
}

TEST_CASE("property/strides: a stride of zero repeats tokens, heads or channels", "[property]")
{
    support::random_source random(73);
    const kvarn::format f = support::make(reference::shape{64, 64, 4, 4, 32, false, 0});
    std::vector<float> token = support::random_tile(random, 1, 64, support::tile_kind::gaussian);
    support::kv_tiles dense{tiles, heads, {}, {}};
    for (std::size_t i = 0; i < support::tokens_of(f, tiles) * heads; ++i) dense.k.insert(dense.k.end(), token.begin(), token.end());
    dense.v = dense.k;
    const kvarn::kv_view<float> repeated{token.data(), support::tokens_of(f, tiles), heads, 64, 0, 0, 1};
    support::bytes records(kvarn::grid_bytes(f, tiles, heads), 0xa5);
    std::vector<std::byte> scratch(kvarn::scratch_bytes(f));
    REQUIRE(kvarn::quantize_kv(f, repeated, repeated, kvarn::tile_major_records(f, support::as_bytes(records.data()), records.size(), tiles, heads),
                               std::span<std::byte>(scratch)) == kvarn::status::ok);
    CHECK(records == support::encode(f, dense));
}

TEST_CASE("property/strides: records and scratch at any address and stride, guards untouched", "[property]")
{
    support::random_source random(74);
    for (const kvarn::format& f : test_formats()) {
        auto x = support::random_tiles(random, f, tiles, heads, support::tile_kind::token_outliers);
        const auto wanted = support::encode(f, x);
        const auto decoded = support::decode(f, wanted, tiles, heads, kvarn::basis::original);
        const std::size_t one = kvarn::record_bytes(f), content = kvarn::layout_of(f).content_bytes;
        for (const std::size_t offset : {0u, 1u, 2u, 3u, 7u, 13u})
            for (const bool by_head : {false, true}) {
                INFO(support::describe(f) << ", offset " << offset << (by_head ? ", head-major" : ", tile-major"));
                const std::size_t guard = 128, records_bytes = tiles * heads * one;
                support::bytes memory(guard + offset + records_bytes + guard, 0x5a);
                std::byte* const first = support::as_bytes(memory.data() + guard + offset);
                const auto grid = by_head ? kvarn::head_major_records(f, first, records_bytes, tiles, heads)
                                          : kvarn::tile_major_records(f, first, records_bytes, tiles, heads);
                std::vector<std::byte> scratch(kvarn::scratch_bytes(f) + offset + 64, std::byte{0x3c});
                const std::span<std::byte> shifted(scratch.data() + offset, kvarn::scratch_bytes(f));
                REQUIRE(kvarn::quantize_kv(f, support::dense_keys(f, x.k.data(), tiles, heads),
                                           support::dense_values(f, x.v.data(), tiles, heads), grid, shifted) == kvarn::status::ok);
                for (std::size_t tile = 0; tile < tiles; ++tile)
                    for (std::size_t head = 0; head < heads; ++head)
                        CHECK(std::memcmp(grid.at(tile, head), wanted.data() + (tile * heads + head) * one, content) == 0);
                std::size_t touched = 0;
                for (std::size_t i = 0; i < memory.size(); ++i)
                    touched += (i < guard + offset || i >= guard + offset + records_bytes) && memory[i] != 0x5a;
                CHECK(touched == 0);

                std::vector<float> k(x.k.size() + 64, filler), v(x.v.size() + 64, filler);
                REQUIRE(kvarn::dequantize_kv(f, grid, support::dense_keys(f, k.data() + 32, tiles, heads),
                                             support::dense_values(f, v.data() + 32, tiles, heads), kvarn::basis::original,
                                             shifted) == kvarn::status::ok);
                CHECK(std::memcmp(k.data() + 32, decoded.k.data(), decoded.k.size() * sizeof(float)) == 0);
                if (f.has_values()) CHECK(std::memcmp(v.data() + 32, decoded.v.data(), decoded.v.size() * sizeof(float)) == 0);
                for (std::size_t i = 0; i < 32; ++i)
                    touched += k[i] != filler || v[i] != filler || k[k.size() - 1 - i] != filler || v[v.size() - 1 - i] != filler;
                for (std::size_t i = 0; i < scratch.size(); ++i)
                    touched += (i < offset || i >= offset + shifted.size()) && scratch[i] != std::byte{0x3c};
                CHECK(touched == 0);
            }
    }
}

TEST_CASE("property/strides: records far apart leave the bytes between them, or clear them, never more", "[property]")
{
    // Content is written, padding up to the next record may be cleared; a record never touches its neighbours.
    support::random_source random(75);
    const kvarn::format f = support::make(reference::shape{36, 36, 3, 3, 32, true, 0});
    auto x = support::random_tiles(random, f, tiles, heads, support::tile_kind::gaussian);
    const auto wanted = support::encode(f, x);
    const std::size_t one = kvarn::record_bytes(f), content = kvarn::layout_of(f).content_bytes, apart = one + 40;
    support::bytes memory(tiles * heads * apart, 0x5a);
    const kvarn::record_grid<std::byte> grid{support::as_bytes(memory.data()), memory.size(), tiles, heads, apart * heads, apart};
    std::vector<std::byte> scratch(kvarn::scratch_bytes(f));
    // One item only: all others stay as they are.
    REQUIRE(kvarn::quantize_kv(f, support::dense_keys(f, x.k.data(), tiles, heads), support::dense_values(f, x.v.data(), tiles, heads),
                               grid, std::span<std::byte>(scratch), {}, {2, 3}) == kvarn::status::ok);
    CHECK(std::memcmp(memory.data() + 2 * apart, wanted.data() + 2 * one, content) == 0);
    std::size_t touched = 0;
    for (std::size_t i = 0; i < memory.size(); ++i) touched += (i < 2 * apart || i >= 3 * apart) && memory[i] != 0x5a;
    CHECK(touched == 0);
    for (std::size_t i = 2 * apart + content; i < 3 * apart; ++i) CHECK((memory[i] == 0 || memory[i] == 0x5a));
}
