// SPDX-License-Identifier: Apache-2.0
// Segments of records that begin and end anywhere in a tile: against attention in double precision, and bit for bit against masks, other
// splits, other instruction sets and other contents of the tokens that are left out.

#include <algorithm>
#include <cstdint>
#include <limits>
#include <utility>
#include <vector>

#include "../catch.hpp"
#include "../support/attention.hpp"

namespace {

using kvarn::basis;
using kvarn::precision;
using support::attention_outcome;
using support::attention_query;
using support::format_of;
using support::kv_history;
using support::record_storage;

constexpr float infinity = std::numeric_limits<float>::infinity();

/// Every width, every group, odd sizes, exact channels, values read from K.
std::vector<kvarn::format> all_formats()
{
    return {format_of(128, 128, 4, 2, 128),
            format_of(64, 64, 2, 4, 64),
            format_of(64, 64, 4, 2, 32),
            format_of(36, 36, 3, 3, 32),
            format_of(100, 44, 5, 6, 32, false, 4),
            format_of(80, 112, 6, 8, 64),
            format_of(72, 256, 8, 2, 256),
            format_of(64, 128, 2, 5, 32, {false, true}),
            format_of(64, 64, 4, 4, 32, {true, false}, 8),
            format_of(512, 512, 4, 0, 32, true, 64),
            format_of(40, 40, 6, 0, 64),
            format_of(36, 36, 5, 0, 32, false, 4),
            format_of(576, 64, 2, 2, 32),
            format_of(48, 56, 4, 4, 64, false, 12)};
}

/// One of [0, n], often an end or its neighbour.
std::size_t any_of(support::random_source& random, std::size_t n)
{
    const std::size_t edge = random.below(3);
    return random.below(2) == 0 ? random.below(n + 1) : random.below(2) == 0 ? std::min(edge, n) : n - std::min(edge, n);
}

/// Exact tokens, whole runs, parts (empty ones and single tokens among them) and runs cut anywhere, in any order. `half`: the bits that
/// fill the tokens left out; the tokens that count are those of the same seed with any other.
kv_history random_history(const kvarn::format& f, std::uint64_t seed, std::size_t segments = 7, const std::uint16_t* half = nullptr)
{
    kv_history h(f, seed);
    support::random_source random(seed + 5000), noise(seed + 6000);
    const auto group = static_cast<std::size_t>(f.group());
    for (std::size_t i = 0; i < segments; ++i) {
        if (random.below(3) == 0) {
            h.add_exact(any_of(random, 40), random.below(2) ? basis::original : basis::rotated, support::all_element_kinds[random.below(3)]);
            continue;
        }
        const std::size_t tiles = 1 + random.below(group >= 128 ? 2 : 3), tokens = tiles * group;
        const std::size_t first = random.below(4) == 0 ? 0 : any_of(random, tokens);
        const std::size_t count = random.below(4) == 0 ? tokens - first : any_of(random, tokens - first);
        auto records = support::random_records(f, tiles, seed * 100 + i);
        if (half != nullptr) support::overwrite_outside(f, records, first, first + count, *half, noise);
        h.add_part(records, first, count, support::all_record_storages[random.below(4)]);
        if (random.below(3) == 0) h.cut(any_of(random, count));
    }
    return h;
}

/// A query whose options the seed decides.
attention_query any_query(const kvarn::format& f, std::uint64_t seed)
{
    support::random_source random(seed);
    attention_query x = support::random_query(f, 1 + random.below(4), 1 + random.below(5), seed);
    x.options.precision = support::all_precisions[random.below(3)];
    if (random.below(3) == 0) x.options.window = static_cast<std::int64_t>(1 + random.below(150));
    if (random.below(4) == 0) x.options.logit_soft_cap = 5.0f;
    if (random.below(4) == 0) x.options.causal = false;
    if (random.below(4) == 0) x.options.query_basis = basis::rotated;
    if (random.below(4) == 0) x.options.output_basis = basis::rotated;
    if (random.below(4) == 0) x.first_position = static_cast<std::int64_t>(random.below(200));
    if (random.below(4) == 0)
        for (std::size_t i = 0; i < x.heads; ++i) x.sink_logits.push_back(i == 1 ? -infinity : 0.5f);
    return x;
}

void check(const kv_history& history, const attention_query& x)
{
    const auto got = support::attend(history.format(), history.segments(), x);
    const auto error = support::error_of(got, support::wanted(history, x));
    INFO(support::describe(history.format()) << "; " << history.tokens() << " tokens; " << support::describe(x));
    CHECK(got.status == kvarn::status::ok);
    CHECK(error.out < 2.0 * support::out_bound(x.options.precision));
    CHECK(error.log_sum_exp < 2.0 * support::log_sum_exp_bound(x.options.precision));
}

}  // namespace

TEST_CASE("attention/parts: layers of two head dimensions in pages of one size", "[unit]")
{
    constexpr std::size_t tiles = 3;
    const kvarn::format layers[] = {format_of(64, 64, 4, 2, 32), format_of(128, 128, 3, 4, 32)};
    const std::size_t page = (kvarn::record_bytes(layers[1]) + 511) / 512 * 512;
    const auto stride = kvarn::record_stride::multiple_of(page);
    std::vector<std::byte> pool(2 * tiles * page, std::byte{0xa5});
    support::random_source random(31);
    for (std::size_t layer = 0; layer < 2; ++layer) {  // layer 0 has the even pages, layer 1 the odd ones
        const kvarn::format& f = layers[layer];
        REQUIRE(kvarn::record_bytes(f, stride) == page);
        const auto x = support::random_tiles(random, f, tiles, 1, support::tile_kind::token_scales);
        auto k = x.k, v = x.v;
        auto grid = kvarn::tile_major_records(f, pool.data() + layer * page, pool.size() - layer * page, tiles, 1, stride);
        grid.tile_stride = 2 * page;
        std::vector<std::byte> scratch(kvarn::call_scratch_bytes(f, 4));
        support::expect_ok(kvarn::quantize_kv(f, support::dense_keys(f, k.data(), tiles, 1), support::dense_values(f, v.data(), tiles, 1),
                                              grid, std::span<std::byte>(scratch)));
        const auto packed = support::encode(f, x);
        for (std::size_t i = 0; i < tiles; ++i) {
            CHECK(std::memcmp(grid.at(i, 0), packed.data() + i * kvarn::record_bytes(f), kvarn::record_bytes(f)) == 0);
            CHECK(std::all_of(grid.at(i, 0) + kvarn::record_bytes(f), grid.at(i, 0) + page, [](std::byte b) { return b == std::byte{0}; }));
        }
        const std::int32_t table[] = {static_cast<std::int32_t>(layer), static_cast<std::int32_t>(2 + layer), static_cast<std::int32_t>(4 + layer)};
        const kvarn::kv_segment paged[] = {kvarn::paged_tiles(f, pool.data(), static_cast<std::ptrdiff_t>(page), table)};
        const kvarn::kv_segment dense[] = {
            kvarn::sealed_tiles(f, kvarn::tile_major_records(f, support::as_bytes(packed.data()), packed.size(), tiles, 1), 0)};
        const auto query = support::random_query(f, 1, 4, 5);
        CHECK(support::same_bits(support::attend(f, paged, query).out, support::attend(f, dense, query).out));
    }
}

TEST_CASE("attention/parts: a range of a segment", "[unit]")
{
    const kvarn::format f = format_of(64, 64, 4, 2, 32);
    std::vector<std::byte> pool(8 * kvarn::record_bytes(f));
    const auto grid = kvarn::tile_major_records(f, static_cast<const std::byte*>(pool.data()), pool.size(), 4, 2);
    const std::int32_t table[] = {3, 1, 2, 0};
    const std::byte* const list[] = {grid.at(2, 0), grid.at(0, 1), grid.at(1, 0), grid.at(3, 1)};
    const kvarn::kv_segment wholes[] = {kvarn::sealed_tiles(f, grid, 1), kvarn::paged_tiles(f, pool.data(), 5000, table),
                                        kvarn::listed_tiles(f, list)};
    for (const kvarn::kv_segment& whole : wholes) {
        CHECK(whole.skip == 0);
        for (const std::size_t first : {0u, 1u, 31u, 32u, 33u, 64u, 100u, 127u, 128u, 129u})
            for (const std::size_t count : {std::size_t{0}, std::size_t{1}, std::size_t{31}, std::size_t{32}, std::size_t{33},
                                            std::size_t{90}, std::size_t{128}, SIZE_MAX}) {
                INFO("tokens from " << first << " on, " << count);
                const kvarn::kv_segment part = kvarn::token_range(f, whole, first, count);
                const std::size_t tokens = first >= 128 ? 0 : std::min(count, 128 - first);
                CHECK(part.tokens == tokens);
                CHECK(part.skip == (tokens != 0 ? first % 32 : 0));
                CHECK(part.records == (tokens != 0 ? (first + tokens + 31) / 32 - first / 32 : 0));
                for (std::size_t i = 0; i < part.records; ++i) CHECK(part.record(i) == whole.record(first / 32 + i));
                // Of a part the same as at once.
                const kvarn::kv_segment again = kvarn::token_range(f, part, 5, 40);
                const kvarn::kv_segment direct = kvarn::token_range(f, whole, first + 5, std::min<std::size_t>(tokens < 5 ? 0 : tokens - 5, 40));
                CHECK(again.tokens == direct.tokens);
                CHECK(again.skip == direct.skip);
                CHECK(again.records == direct.records);
                for (std::size_t i = 0; i < again.records; ++i) CHECK(again.record(i) == direct.record(i));
            }
    }
    static_assert(kvarn::first_tokens(kvarn::format{}, kvarn::kv_segment{}, 7).tokens == 0);

    // Exact tokens: the views move.
    for (const support::element_kind kind : support::all_element_kinds)
        for (const support::storage where : support::all_storages) {
            support::random_source random(1500);
            const support::strided_array all(kind, where, 9, 2, 64, support::gaussian_floats(random, 9 * 2 * 64));
            std::vector<float> middle = all.dense();
            middle = std::vector<float>(middle.begin() + 3 * 2 * 64, middle.begin() + 7 * 2 * 64);
            const support::strided_array own(kind, support::storage::dense, 4, 2, 64, middle);
            const kvarn::kv_segment whole = kvarn::exact_tokens(all.view<true>(), all.view<true>(), 1),
                                    part = kvarn::token_range(f, whole, 3, 4),
                                    wanted = kvarn::exact_tokens(own.view<true>(), own.view<true>(), 1);
            const auto x = support::random_query(f, 1, 2, 1501);
            CHECK(part.tokens == 4);
            CHECK(support::same_bits(support::attend(f, {&part, 1}, x), support::attend(f, {&wanted, 1}, x)));
            CHECK(kvarn::token_range(f, whole, 12, 1).tokens == 0);
            CHECK(kvarn::first_tokens(f, whole, 20).tokens == 9);
        }
    CHECK(kvarn::token_range(f, kvarn::exact_tokens({}, {}, 0), 3, 4).k.data == nullptr);
}

TEST_CASE("attention/parts: random segments agree with the definition", "[unit]")
{
    std::uint64_t seed = 1510;
    for (const kvarn::format& f : all_formats())
        for (int i = 0; i < 12; ++i) {
            const kv_history history = random_history(f, ++seed);
            const std::uint64_t shape = seed * 7;
            check(history, any_query(f, shape));
        }
}

TEST_CASE("attention/parts: every first and every last token of a tile", "[unit]")
{
    for (const kvarn::format& f : {format_of(64, 64, 4, 2, 32), format_of(64, 64, 3, 0, 32), format_of(36, 40, 5, 6, 32, true, 4)}) {
        const auto records = support::random_records(f, 3, 1700);
        attention_query x = support::random_query(f, 2, 3, 1701);
        for (std::size_t first = 0; first < 32; ++first)
            for (const std::size_t count : {std::size_t{1}, std::size_t{2}, 32 - first, 33 - first, 64 - first, std::size_t{64}}) {
                kv_history history(f, 1702);
                history.add_part(records, first, count);
                for (const precision p : support::all_precisions) {
                    x.options.precision = p;
                    check(history, x);
                }
            }
    }
}

TEST_CASE("attention/parts: a part of one token is that token", "[unit]")
{
    for (const kvarn::format& f : {format_of(64, 64, 4, 4, 32), format_of(64, 64, 4, 0, 32), format_of(64, 64, 8, 2, 256)}) {
        const std::size_t group = static_cast<std::size_t>(f.group());
        const auto records = support::random_records(f, 2, 1710);
        attention_query x = support::random_query(f, 1, 2, 1711);
        for (std::size_t token = 0; token < 2 * group; token += group / 8 + 1) {
            kv_history history(f, 1712);
            history.add_part(records, token, 1, record_storage::list);
            for (const precision p : support::all_precisions) {
                x.options.precision = p;
                const auto got = support::attend(f, history.segments(), x);
                const reference::matrix out = support::to_matrix(got.out, 64);
                for (Eigen::Index row = 0; row < 2; ++row)
                    CHECK(reference::relative_difference(out.row(row), history.v().row(0)) < (p == precision::exact ? 1e-6 : 1e-4));
            }
        }
    }
}

TEST_CASE("attention/parts: what a part leaves out is what a mask hides, bit for bit", "[unit]")
{
    // One query token on whole tiles, whose window begins and whose position ends the part.
    std::uint64_t seed = 1720;
    for (const kvarn::format& f : all_formats()) {
        const auto group = static_cast<std::size_t>(f.group());
        const std::size_t per_chunk = kvarn::chunk_tokens / group;
        struct shape {
            std::size_t tiles, tile;  // of the first token
        };
        const bool small = f.head_dim_k() <= 128;
        for (const shape s : {shape{3, 0}, shape{3, 1}, shape{small ? 2 * per_chunk + 2 : 2, 0}, shape{small ? 2 * per_chunk + 2 : 2, small ? per_chunk : 1}}) {
            kv_history whole(f, ++seed);
            whole.add_tiles(s.tiles, support::all_record_storages[seed % 4]);
            support::random_source random(seed);
            for (int i = 0; i < 6; ++i) {
                attention_query x = support::random_query(f, 1, 1 + random.below(5), seed + 1);
                x.options.precision = support::all_precisions[i % 3];
                x.options.logit_soft_cap = i == 4 ? 3.0f : 0.0f;
                if (i == 5) x.sink_logits.assign(x.heads, 0.25f);
                const std::size_t first = s.tile * group + any_of(random, group - 1);
                const std::size_t count = 1 + any_of(random, s.tiles * group - first - 1);
                const kvarn::kv_segment part = kvarn::token_range(f, whole.segments()[0], first, count);
                const auto got = support::attend(f, {&part, 1}, x);
                x.first_position = static_cast<std::int64_t>(first + count - 1);
                x.options.window = static_cast<std::int64_t>(count);
                INFO(support::describe(f) << "; tokens from " << first << " on, " << count << "; " << support::describe(x));
                CHECK(got.status == kvarn::status::ok);
                CHECK(got.intact);
                CHECK(support::same_bits(got, support::attend(f, whole.segments(), x)));
            }
        }
    }
}

TEST_CASE("attention/parts: whole tiles among parts count as before", "[unit]")
{
    // Empty parts in between are as if they were not there, and a range that is all of a segment is the segment.
    const kvarn::format f = format_of(64, 80, 4, 2, 64);
    kv_history history(f, 1730);
    history.add_exact(5);
    history.add_tiles(20, record_storage::table);
    history.add_tiles(2, record_storage::list);
    history.add_exact(9);
    const auto x = support::random_query(f, 3, 2, 1731);
    const auto wanted = support::attend(f, history.segments(), x);
    std::vector<kvarn::kv_segment> segments;
    for (const kvarn::kv_segment& s : history.segments()) {
        for (const std::size_t at : {std::size_t{0}, std::size_t{3}, s.tokens}) segments.push_back(kvarn::token_range(f, s, at, 0));
        segments.push_back(kvarn::token_range(f, s, 0, s.tokens));
        segments.push_back(kvarn::first_tokens(f, s, 0));
    }
    CHECK(support::same_bits(support::attend(f, segments, x), wanted));
    const std::vector<kvarn::kv_segment> nothing{segments[0], segments[5], segments[6]};
    const auto empty = support::attend(f, nothing, x);
    CHECK(empty.status == kvarn::status::ok);
    CHECK(empty.out == std::vector<float>(6 * 80, 0.0f));
    CHECK(empty.log_sum_exp == std::vector<float>(6, -infinity));
}

TEST_CASE("attention/parts: tokens left out may hold anything", "[unit]")
{
    // NaN, infinity, the largest, its negative: none of it reaches an output.
    std::uint64_t seed = 1740;
    for (const kvarn::format& f : all_formats())
        for (const std::uint16_t half : std::initializer_list<std::uint16_t>{0x7e00, 0xffff, 0x7c00, 0x7bff, 0xfbff, 0}) {
            ++seed;
            const kv_history plain = random_history(f, seed), spoiled = random_history(f, seed, 7, &half);
            for (const std::size_t rows : {1u, 3u}) {  // scalars as they lie in the record, and as floats
                attention_query x = any_query(f, seed * 3);
                x.tokens = 1;
                x.heads = rows;
                support::random_source random(seed);
                x.q = support::gaussian_floats(random, rows * static_cast<std::size_t>(f.key_channels()));
                if (!x.sink_logits.empty()) x.sink_logits.assign(rows, 0.5f);
                INFO(support::describe(f) << "; " << int{half} << "; " << support::describe(x));
                const auto got = support::attend(f, spoiled.segments(), x);
                CHECK(support::to_matrix(got.out, 1).allFinite());
                CHECK(support::same_bits(got, support::attend(f, plain.segments(), x)));
            }
        }
}

TEST_CASE("attention/parts: tokens that a mask hides may hold anything", "[unit]")
{
    for (const kvarn::format& f : {format_of(64, 64, 4, 2, 32), format_of(64, 64, 3, 0, 64), format_of(36, 40, 5, 6, 32, true, 4)})
        for (const std::uint16_t half : std::initializer_list<std::uint16_t>{0x7e00, 0xffff, 0x7c00}) {
            const auto group = static_cast<std::size_t>(f.group());
            auto records = support::random_records(f, 3, 1750);
            kv_history plain(f, 1751), spoiled(f, 1751);
            plain.add_records(records);
            support::random_source noise(1752);
            support::overwrite_outside(f, records, group - 3, 2 * group + 5, half, noise);
            spoiled.add_records(records);
            for (const std::size_t tokens : {1u, 2u})
                for (const std::size_t heads : {1u, 3u}) {
                    attention_query x = support::random_query(f, tokens, heads, 1753);
                    x.first_position = static_cast<std::int64_t>(2 * group + 5 - tokens);
                    x.options.window = x.first_position + 1 - static_cast<std::int64_t>(group - 3);
                    for (const precision p : support::all_precisions) {
                        x.options.precision = p;
                        const auto got = support::attend(f, spoiled.segments(), x);
                        CHECK(support::to_matrix(got.out, 1).allFinite());
                        CHECK(support::same_bits(got, support::attend(f, plain.segments(), x)));
                    }
                }
        }
}

TEST_CASE("attention/parts: a run cut at multiples of the chunk, counted from its first record", "[unit]")
{
    for (const kvarn::format& f : {format_of(64, 64, 4, 2, 32), format_of(64, 64, 3, 4, 256), format_of(40, 40, 5, 0, 128)}) {
        const std::size_t per_chunk = kvarn::chunk_tokens / static_cast<std::size_t>(f.group()), group = static_cast<std::size_t>(f.group());
        for (const std::size_t skip : {std::size_t{1}, group / 2, group - 1}) {
            const std::size_t tokens = 3 * kvarn::chunk_tokens + group + 3 - skip;
            kv_history history(f, 1760);
            history.add_exact(5);
            history.add_part(support::random_records(f, 3 * per_chunk + 2, 1761), skip, tokens, record_storage::table);
            history.add_exact(20);
            const auto x = support::random_query(f, 2, 3, 1762);
            const auto wanted = support::attend(f, history.segments(), x);
            REQUIRE(wanted.status == kvarn::status::ok);
            const kvarn::kv_segment run = history.segments()[1];
            for (unsigned cuts = 1; cuts < 8; ++cuts) {
                std::vector<kvarn::kv_segment> segments{history.segments()[0]};
                std::size_t begin = 0;
                for (std::size_t i = 0; i < 3; ++i)
                    if (cuts >> i & 1u) {
                        const std::size_t end = (i + 1) * kvarn::chunk_tokens - skip;
                        segments.push_back(kvarn::token_range(f, run, begin, end - begin));
                        begin = end;
                    }
                segments.push_back(kvarn::token_range(f, run, begin, SIZE_MAX));
                segments.push_back(history.segments()[2]);
                INFO(support::describe(f) << ", " << segments.size() << " segments");
                CHECK(segments.size() > 3);
                CHECK(support::same_bits(support::attend(f, segments, x), wanted));
            }
        }
    }
}

TEST_CASE("attention/parts: items of any size in any order, on any number of threads", "[unit]")
{
    for (const kvarn::format& f : {format_of(64, 64, 4, 2, 128), format_of(36, 48, 3, 5, 32, false, 4), format_of(64, 64, 2, 0, 64)}) {
        const std::size_t per_chunk = kvarn::chunk_tokens / static_cast<std::size_t>(f.group());
        std::vector<kv_history> histories;
        std::vector<attention_query> queries;
        kv_history& longer = histories.emplace_back(f, 1770);
        longer.add_exact(4);
        longer.add_part(support::random_records(f, 2 * per_chunk + 1, 1771), 17, 2 * kvarn::chunk_tokens - 3, record_storage::list);
        longer.add_part(support::random_records(f, per_chunk, 1772), 5, 1, record_storage::run);
        longer.add_part(support::random_records(f, per_chunk + 1, 1773), 9, kvarn::chunk_tokens, record_storage::table);
        longer.add_exact(40);
        queries.push_back(support::random_query(f, 2, 3, 1774));
        histories.push_back(random_history(f, 1775));
        queries.push_back(support::random_query(f, 1, 4, 1776));
        histories.emplace_back(f, 1777);
        histories.back().add_part(support::random_records(f, 1, 1778), 3, 0);
        queries.push_back(support::random_query(f, 1, 1, 1779));
        kvarn::attention_options options;
        for (const precision p : {precision::exact, precision::fast}) {
            options.precision = p;
            options.window = p == precision::fast ? 1500 : 0;
            std::vector<attention_outcome> wanted;
            for (std::size_t i = 0; i < queries.size(); ++i) {
                attention_query x = queries[i];
                x.options = options;
                wanted.push_back(support::attend(f, histories[i].segments(), x));
                REQUIRE(wanted.back().status == kvarn::status::ok);
            }
            const auto same = [&](const std::vector<attention_outcome>& got) {
                for (std::size_t i = 0; i < wanted.size(); ++i)
                    if (!got[i].intact || !support::same_bits(got[i], wanted[i])) return false;
                return true;
            };
            for (const std::size_t chunks_per_item : {1u, 2u, 5u, 100u})
                for (const std::size_t threads : {0u, 1u, 3u}) {
                    INFO(support::describe(f) << ", " << chunks_per_item << " chunks an item, " << threads << " threads");
                    CHECK(same(support::attend_items(f, histories, queries, options, chunks_per_item, threads, threads + 1)));
                }
            support::for_each_arch([&](auto arch) {
                CHECK(same(support::attend_items<decltype(arch)>(f, histories, queries, options, 2, 0, 9)));
            });
        }
    }
}

TEST_CASE("attention/parts: the number of items", "[unit]")
{
    const kvarn::format f = format_of(64, 64, 4, 2, 32);
    const auto x = support::random_query(f, 1, 1, 1781);
    const auto items = [&](std::size_t first, std::size_t count) {
        kv_history history(f, 1780);
        history.add_part(support::random_records(f, 66, 1782), first, count);
        support::attention_memory memory(f, x);
        const kvarn::attention_task task = memory.task(history.segments());
        return kvarn::attention_items({&task, 1}, 1);
    };
    CHECK(items(7, 0) == 0);
    CHECK(items(7, 1) == 1);
    CHECK(items(31, 1) == 1);
    CHECK(items(7, 1017) == 1);   // up to the end of the chunk's last record
    CHECK(items(7, 1018) == 2);   // and one token more
    CHECK(items(39, 1018) == 2);  // 32 + 7: counted from the second record
    CHECK(items(0, 1024) == 1);
    CHECK(items(31, 2048) == 3);
}

TEST_CASE("attention/parts: every instruction set gives the same bits", "[unit]")
{
    std::uint64_t seed = 1790;
    for (const kvarn::format& f : all_formats())
        for (int i = 0; i < 4; ++i) {
            const kv_history history = random_history(f, ++seed, 5);
            const attention_query x = any_query(f, seed * 5);
            const auto wanted = support::attend<kvarn::simd::portable>(f, history.segments(), x);
            REQUIRE(wanted.status == kvarn::status::ok);
            support::for_each_arch([&](auto arch) {
                INFO(kvarn::simd::arch_traits<decltype(arch)>::name << ", " << support::describe(f) << ", " << support::describe(x));
                const auto got = support::attend<decltype(arch)>(f, history.segments(), x);
                CHECK(got.intact);
                CHECK(support::same_bits(got, wanted));
            });
        }
}

TEST_CASE("attention/parts: one row alone is the same as among others", "[unit]")
{
    const kvarn::format f = format_of(64, 80, 4, 4, 64);
    kv_history history(f, 1850);
    history.add_part(support::random_records(f, 3, 1851), 13, 100);
    attention_query x = support::random_query(f, 1, 7, 1852);
    for (const precision p : support::all_precisions) {
        x.options.precision = p;
        const auto all = support::attend(f, history.segments(), x);
        for (std::size_t row = 0; row < 7; ++row) {
            attention_query one = x;
            one.heads = 1;
            one.q.assign(x.q.begin() + static_cast<std::ptrdiff_t>(row) * 64, x.q.begin() + static_cast<std::ptrdiff_t>(row + 1) * 64);
            const auto got = support::attend(f, history.segments(), one);
            CHECK(std::equal(got.out.begin(), got.out.end(), all.out.begin() + static_cast<std::ptrdiff_t>(row) * 80));
            CHECK(got.log_sum_exp[0] == all.log_sum_exp[row]);
        }
    }
}
