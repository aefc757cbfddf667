// SPDX-License-Identifier: Apache-2.0
// A record is a pure function of (format, options, the tile's values): same bytes for every instruction set, thread, batch,
// order, view stride and input type that carries the same values.

#include <algorithm>
#include <cstdint>
#include <thread>
#include <vector>

#include "../catch.hpp"
#include "../support/library.hpp"

namespace {

std::vector<kvarn::format> test_formats()
{
    std::vector<kvarn::format> formats;
    const auto add = [&](int dk, int dv, int kb, int vb, int group, reference::rotations rotate, int exact) {
        formats.push_back(support::make(reference::shape{dk, dv, kb, vb, group, rotate, exact}));
    };
    add(128, 128, 4, 2, 128, true, 0);
    add(64, 64, 2, 4, 64, true, 0);
    add(36, 36, 3, 3, 32, true, 0);
    add(100, 44, 5, 6, 32, false, 4);
    add(80, 112, 6, 8, 64, true, 0);
    add(192, 128, 8, 5, 32, true, 64);
    add(72, 256, 3, 2, 256, true, 0);
    add(512, 512, 4, 0, 64, true, 64);
    add(576, 320, 2, 3, 32, true, 0);
    add(48, 56, 4, 4, 64, false, 12);
    add(100, 64, 2, 4, 32, {false, true}, 0);
    add(64, 52, 4, 2, 64, {true, false}, 4);
    return formats;
}

constexpr std::size_t tiles = 3, heads = 2;

support::kv_tiles batch_for(const kvarn::format& f, std::uint64_t seed)
{
    support::random_source random(seed);
    return support::random_tiles(random, f, tiles, heads, support::all_tile_kinds[seed % 5]);
}

/// Tokens of one tile and head, alone.
support::kv_tiles single(const kvarn::format& f, const support::kv_tiles& x, std::size_t tile, std::size_t head)
{
    support::kv_tiles one;
    const auto group = static_cast<std::size_t>(f.group());
    const auto take = [&](const std::vector<float>& all, std::vector<float>& out, std::size_t channels) {
        for (std::size_t t = 0; t < group; ++t)
            for (std::size_t c = 0; c < channels; ++c) out.push_back(all[((tile * group + t) * x.heads + head) * channels + c]);
    };
    take(x.k, one.k, static_cast<std::size_t>(f.key_channels()));
    take(x.v, one.v, static_cast<std::size_t>(f.head_dim_v()));
    return one;
}

}  // namespace

TEST_CASE("property/determinism: every instruction set writes the same records", "[property]")
{
    std::uint64_t seed = 60;
    for (const kvarn::format& f : test_formats())
        for (int i = 0; i < 5; ++i) {  // every kind of tile
            const auto x = batch_for(f, seed++);
            INFO(support::describe(f) << ", seed " << seed - 1);
            for (const auto& options : {kvarn::encode_options{}, support::paper()}) {
                const auto wanted = support::encode<kvarn::simd::portable>(f, x, options);
                support::for_each_arch([&](auto arch) {
                    INFO(kvarn::simd::arch_traits<decltype(arch)>::name);
                    const bool same = support::encode<decltype(arch)>(f, x, options) == wanted;
                    CHECK(same);
                });
            }
        }
}

TEST_CASE("property/determinism: every instruction set reports the same errors", "[property]")
{
    std::uint64_t seed = 110;
    for (const kvarn::format& f : test_formats())
        for (const auto& options : {kvarn::encode_options{}, support::paper()}) {
            const auto x = batch_for(f, seed++);
            INFO(support::describe(f));
            const auto wanted = support::encode_errors<kvarn::simd::portable>(f, x, options);
            support::for_each_arch([&](auto arch) {
                INFO(kvarn::simd::arch_traits<decltype(arch)>::name);
                const auto got = support::encode_errors<decltype(arch)>(f, x, options);
                CHECK(std::memcmp(got.data(), wanted.data(), got.size() * sizeof(kvarn::record_errors)) == 0);
            });
        }
}

TEST_CASE("property/determinism: every instruction set decodes to the same bits", "[property]")
{
    std::uint64_t seed = 160;
    for (const kvarn::format& f : test_formats()) {
        const auto records = support::encode<kvarn::simd::portable>(f, batch_for(f, seed++));
        INFO(support::describe(f));
        for (const auto basis : {kvarn::basis::original, kvarn::basis::rotated}) {
            const auto check_type = [&](auto element) {
                using T = decltype(element);
                const auto wanted = support::decode_as<kvarn::simd::portable, T>(f, records, tiles, heads, basis);
                support::for_each_arch([&](auto arch) {
                    INFO(kvarn::simd::arch_traits<decltype(arch)>::name << ", " << sizeof(T) << " bytes");
                    const auto got = support::decode_as<decltype(arch), T>(f, records, tiles, heads, basis);
                    CHECK(support::same_bits(got.k, wanted.k));
                    CHECK(support::same_bits(got.v, wanted.v));
                });
            };
            check_type(0.0f);
            check_type(kvarn::half{});
            check_type(kvarn::bfloat16{});
        }
    }
}

TEST_CASE("property/determinism: half and bfloat16 results are the float results, rounded once", "[property]")
{
    std::uint64_t seed = 170;
    for (const kvarn::format& f : test_formats()) {
        const auto records = support::encode(f, batch_for(f, seed++));
        INFO(support::describe(f));
        for (const auto basis : {kvarn::basis::original, kvarn::basis::rotated}) {
            const auto wanted = support::decode_as<kvarn::simd::native_arch, float>(f, records, tiles, heads, basis);
            const auto halves = support::decode_as<kvarn::simd::native_arch, kvarn::half>(f, records, tiles, heads, basis);
            const auto brains = support::decode_as<kvarn::simd::native_arch, kvarn::bfloat16>(f, records, tiles, heads, basis);
            CHECK(support::same_bits(halves.k, support::stored<kvarn::half>(wanted.k)));
            CHECK(support::same_bits(halves.v, support::stored<kvarn::half>(wanted.v)));
            CHECK(support::same_bits(brains.k, support::stored<kvarn::bfloat16>(wanted.k)));
            CHECK(support::same_bits(brains.v, support::stored<kvarn::bfloat16>(wanted.v)));
        }
    }
}

TEST_CASE("property/determinism: the same values as float, half or bfloat16 give the same records", "[property]")
{
    std::uint64_t seed = 200;
    for (const kvarn::format& f : test_formats()) {
        auto x = batch_for(f, seed++);
        INFO(support::describe(f));
        support::for_each_arch([&](auto arch) {
            using arch_type = decltype(arch);
            INFO(kvarn::simd::arch_traits<arch_type>::name);
            const bool same = support::encode<arch_type, float>(f, x) == support::encode<arch_type, kvarn::half>(f, x);
            CHECK(same);
        });
        for (auto* all : {&x.k, &x.v})
            for (float& value : *all) value = static_cast<float>(reference::bfloat16_value(reference::bfloat16_bits(value)));
        support::for_each_arch([&](auto arch) {
            using arch_type = decltype(arch);
            INFO(kvarn::simd::arch_traits<arch_type>::name);
            const bool same = support::encode<arch_type, float>(f, x) == support::encode<arch_type, kvarn::bfloat16>(f, x);
            CHECK(same);
        });
    }
}

TEST_CASE("property/determinism: one tile alone is the same as in a batch", "[property]")
{
    std::uint64_t seed = 220;
    for (const kvarn::format& f : test_formats()) {
        const auto x = batch_for(f, seed++);
        INFO(support::describe(f));
        const auto all = support::encode(f, x);
        const auto decoded = support::decode(f, all, tiles, heads, kvarn::basis::original);
        const std::size_t one = kvarn::record_bytes(f);
        for (std::size_t tile = 0; tile < tiles; ++tile)
            for (std::size_t head = 0; head < heads; ++head) {
                const auto alone = support::encode(f, single(f, x, tile, head));
                REQUIRE(alone.size() == one);
                CHECK(std::equal(alone.begin(), alone.end(), all.begin() + static_cast<std::ptrdiff_t>((tile * heads + head) * one)));
                const auto back = support::decode(f, alone, 1, 1, kvarn::basis::original);
                const auto wanted = single(f, decoded, tile, head);
                CHECK(support::same_bits(back.k, wanted.k));
                CHECK(support::same_bits(back.v, wanted.v));
            }
    }
}

TEST_CASE("property/determinism: ranges in any order, on any thread, with dirty scratch", "[property]")
{
    std::uint64_t seed = 240;
    for (const kvarn::format& f : test_formats()) {
        auto x = batch_for(f, seed++);
        INFO(support::describe(f));
        const auto wanted = support::encode(f, x);
        const auto decoded = support::decode(f, wanted, tiles, heads, kvarn::basis::original);

        const auto encode_items = [&](support::bytes& records, std::vector<std::byte>& scratch, std::size_t begin, std::size_t end) {
            return kvarn::quantize_kv(f, support::dense_keys(f, x.k.data(), tiles, heads),
                                      support::dense_values(f, x.v.data(), tiles, heads),
                                      kvarn::tile_major_records(f, support::as_bytes(records.data()), records.size(), tiles, heads),
                                      std::span<std::byte>(scratch), {}, {begin, end});
        };
        {
            support::bytes records(wanted.size(), 0xa5);
            std::vector<std::byte> scratch(kvarn::scratch_bytes(f), std::byte{0xff});  // floats of all ones are NaN
            for (const std::size_t i : {4u, 0u, 5u, 2u, 1u, 3u}) REQUIRE(encode_items(records, scratch, i, i + 1) == kvarn::status::ok);
            const bool same = records == wanted;
            CHECK(same);
        }
        {
            support::bytes records(wanted.size(), 0xa5);
            kvarn::status results[4] = {};
            std::vector<std::thread> threads;
            for (std::size_t t = 0; t < 4; ++t)
                threads.emplace_back([&, t] {
                    std::vector<std::byte> scratch(kvarn::scratch_bytes(f), std::byte{0x7f});
                    results[t] = encode_items(records, scratch, t * 2, t == 3 ? SIZE_MAX : t * 2 + 2);
                });
            for (auto& t : threads) t.join();
            for (const auto s : results) CHECK(s == kvarn::status::ok);
            const bool same = records == wanted;
            CHECK(same);
        }
        {
            support::bytes records = wanted;
            support::kv_tiles back = decoded;
            std::fill(back.k.begin(), back.k.end(), -1.0f);
            std::fill(back.v.begin(), back.v.end(), -1.0f);
            std::vector<std::thread> threads;
            kvarn::status results[3] = {};
            for (std::size_t t = 0; t < 3; ++t)
                threads.emplace_back([&, t] {
                    std::vector<std::byte> scratch(kvarn::scratch_bytes(f), std::byte{0xff});
                    results[t] = kvarn::dequantize_kv(
                        f, kvarn::tile_major_records(f, support::as_bytes(records.data()), records.size(), tiles, heads),
                        support::dense_keys(f, back.k.data(), tiles, heads), support::dense_values(f, back.v.data(), tiles, heads),
                        kvarn::basis::original, std::span<std::byte>(scratch), {t * 2, t * 2 + 2});
                });
            for (auto& t : threads) t.join();
            for (const auto s : results) CHECK(s == kvarn::status::ok);
            CHECK(support::same_bits(back.k, decoded.k));
            CHECK(support::same_bits(back.v, decoded.v));
        }
    }
}

TEST_CASE("property/determinism: options and format alone distinguish records", "[property]")
{
    // Not a pure function of less: other options, bits or values must show.
    const kvarn::format f;
    const auto x = batch_for(f, 261);
    const auto wanted = support::encode(f, x);
    CHECK(support::encode(f, x, support::paper()) != wanted);
    CHECK(support::encode(f, x, support::paper(1)) != support::encode(f, x, support::paper()));
    for (const auto option : {&kvarn::encode_options::refined_iterations, &kvarn::encode_options::refit_rounds, &kvarn::encode_options::clip_steps}) {
        kvarn::encode_options options;
        options.*option = 0;
        if (option == &kvarn::encode_options::refined_iterations) options.iterations = 0;  // which go on where a tile is out of balance
        CHECK(support::encode(f, x, options) != wanted);
    }
    support::random_source random(262);
    const auto balanced = support::random_tiles(random, f, 1, 1, support::tile_kind::gaussian);
    kvarn::encode_options unread;  // the paper's iterations
    unread.iterations = 0;
    CHECK(support::encode(f, balanced, unread) == support::encode(f, balanced));
    auto y = x;
    y.v.back() += 4.0f;
    CHECK(support::encode(f, y) != wanted);
}
