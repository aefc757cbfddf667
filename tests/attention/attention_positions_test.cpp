// SPDX-License-Identifier: Apache-2.0
// Positions that the segments say: gaps where tokens were erased, against attention in double precision, and bit for bit against histories
// whose positions follow by themselves.

#include <cstdint>
#include <limits>
#include <vector>

#include "../catch.hpp"
#include "../support/attention.hpp"

namespace {

using kvarn::basis;
using support::attention_query;
using support::format_of;
using support::kv_history;
using support::record_storage;

std::vector<kvarn::format> some_formats()
{
    return {format_of(64, 64, 4, 2, 32), format_of(128, 128, 4, 4, 128), format_of(36, 48, 3, 5, 32, false, 4), format_of(64, 64, 2, 0, 64),
            format_of(80, 64, 8, 2, 256)};
}

/// Exact tokens, tiles and parts of them with gaps in between, now and then none.
kv_history history_with_gaps(const kvarn::format& f, std::uint64_t seed)
{
    kv_history h(f, seed);
    support::random_source random(seed + 2000);
    const auto group = static_cast<std::size_t>(f.group());
    std::int64_t end = 0;
    for (int i = 0; i < 6; ++i) {
        if (random.below(3) == 0) {
            h.add_exact(random.below(40), random.below(2) ? basis::original : basis::rotated);
        } else {
            const std::size_t first = random.below(group), count = random.below(2 * group - first + 1);
            h.add_part(support::random_records(f, 2, seed * 100 + static_cast<std::uint64_t>(i)), first, count, support::all_record_storages[random.below(4)]);
        }
        const auto tokens = static_cast<std::int64_t>(h.segments().back().tokens);
        if (random.below(3) != 0) {
            end += static_cast<std::int64_t>(random.below(3) == 0 ? 0 : random.below(100));
            h.move_last(tokens != 0 ? end : static_cast<std::int64_t>(random.below(1000)));  // of no token: nobody looks
        }
        end += tokens;
        if (random.below(3) == 0) h.cut(random.below(static_cast<std::size_t>(tokens) + 1));
    }
    return h;
}

}  // namespace

TEST_CASE("attention/positions: gaps, windows and the causal mask against double precision", "[unit]")
{
    std::uint64_t seed = 3000;
    std::size_t hidden = 0;
    for (const kvarn::format& f : some_formats())
        for (int i = 0; i < 24; ++i) {
            const kv_history history = history_with_gaps(f, ++seed);
            support::random_source random(seed);
            attention_query x = support::random_query(f, 1 + random.below(4), 1 + random.below(4), seed);
            x.options.precision = support::all_precisions[i % 3];
            if (i % 2 == 0) x.options.window = static_cast<std::int64_t>(1 + random.below(200));
            if (i % 5 == 0) x.options.causal = false;
            if (i % 3 == 0) x.first_position = static_cast<std::int64_t>(random.below(400));
            if (i % 7 == 0) x.sink_logits.assign(x.heads, 0.5f);
            const auto got = support::attend(f, history.segments(), x);
            const auto error = support::error_of(got, support::wanted(history, x));
            INFO(support::describe(f) << "; " << history.tokens() << " tokens; " << support::describe(x));
            CHECK(got.status == kvarn::status::ok);
            CHECK(error.out < 2.0 * support::out_bound(x.options.precision));
            CHECK(error.log_sum_exp < 2.0 * support::log_sum_exp_bound(x.options.precision));
            // Where positions matter, they do: without them the answer is another one.
            std::vector<kvarn::kv_segment> without(history.segments().begin(), history.segments().end());
            for (kvarn::kv_segment& s : without) s.position = -1;
            if (!support::same_bits(support::attend(f, without, x), got)) ++hidden;
            support::for_each_arch([&](auto arch) {
                CHECK(support::same_bits(support::attend<decltype(arch)>(f, history.segments(), x), got));
            });
        }
    CHECK(hidden > 30);
}

TEST_CASE("attention/positions: said or counted is the same, bit for bit", "[unit]")
{
    std::uint64_t seed = 3200;
    for (const kvarn::format& f : some_formats()) {
        kv_history history(f, ++seed);
        history.add_exact(5);
        history.add_tiles(3, record_storage::table);
        history.add_exact(40);
        history.add_part(support::random_records(f, 2, seed), 7, static_cast<std::size_t>(f.group()) + 3, record_storage::list);
        history.add_exact(9);
        for (const std::int64_t window : {std::int64_t{0}, std::int64_t{30}, std::int64_t{100}}) {
            attention_query x = support::random_query(f, 3, 2, seed + 1);
            x.options.window = window;
            const auto wanted = support::attend(f, history.segments(), x);
            REQUIRE(wanted.status == kvarn::status::ok);
            for (unsigned said = 1; said < 32; ++said) {
                std::vector<kvarn::kv_segment> segments;
                std::int64_t end = 0;
                for (const kvarn::kv_segment& s : history.segments()) {
                    segments.push_back(said >> segments.size() & 1u ? kvarn::at_position(s, end) : s);
                    end += static_cast<std::int64_t>(s.tokens);
                }
                INFO(support::describe(f) << ", window " << window << ", " << said);
                CHECK(support::same_bits(support::attend(f, segments, x), wanted));
                // All of it further on, queries included.
                if (said % 2 == 0) continue;
                for (kvarn::kv_segment& s : segments)
                    if (s.position >= 0) s.position += 1'000'000'007;
                CHECK(support::same_bits(support::attend(f, segments, x), wanted));
            }
        }
    }
}

TEST_CASE("attention/positions: a history cut into segments with positions", "[unit]")
{
    for (const kvarn::format& f : {format_of(64, 64, 4, 2, 32), format_of(64, 64, 3, 4, 256)}) {
        kv_history history(f, 3300);
        history.add_tiles(3 * kvarn::chunk_tokens / static_cast<std::size_t>(f.group()) + 1, record_storage::table);
        history.move_last(100);
        history.add_exact(20);
        attention_query x = support::random_query(f, 2, 3, 3301);
        x.options.window = 2500;
        const auto wanted = support::attend(f, history.segments(), x);
        REQUIRE(wanted.status == kvarn::status::ok);
        const kvarn::kv_segment run = history.segments()[0];
        for (unsigned cuts = 1; cuts < 8; ++cuts)
            for (const bool said : {false, true}) {
                std::vector<kvarn::kv_segment> segments;
                std::size_t begin = 0;
                const auto add = [&](std::size_t end) {
                    segments.push_back(kvarn::token_range(f, run, begin, end - begin));
                    if (!said && begin != 0) segments.back().position = -1;
                    begin = end;
                };
                for (std::size_t i = 1; i < 4; ++i)
                    if (cuts >> (i - 1) & 1u) add(i * kvarn::chunk_tokens);
                add(run.tokens);
                segments.push_back(history.segments()[1]);
                CHECK(support::same_bits(support::attend(f, segments, x), wanted));
            }
    }
}

TEST_CASE("attention/positions: a range of a segment has its own", "[unit]")
{
    const kvarn::format f = format_of(64, 64, 4, 2, 32);
    kv_history history(f, 3400);
    history.add_tiles(3);
    history.add_exact(50);
    for (const kvarn::kv_segment& s : history.segments())
        for (const std::size_t first : {0u, 1u, 32u, 49u}) {
            CHECK(kvarn::token_range(f, s, first, 1).position == -1);
            CHECK(kvarn::token_range(f, kvarn::at_position(s, 0), first, 1).position == static_cast<std::int64_t>(first));
            const kvarn::kv_segment part = kvarn::token_range(f, kvarn::at_position(s, 70), first, SIZE_MAX);
            CHECK(part.position == 70 + static_cast<std::int64_t>(first));
            CHECK(kvarn::token_range(f, part, 1, 1).position == 71 + static_cast<std::int64_t>(first));
            CHECK(kvarn::first_tokens(f, part, 1).position == part.position);
        }
    static_assert(kvarn::at_position(kvarn::kv_segment{}, 5).position == 5);
    static_assert(kvarn::kv_segment{}.position == -1);
}

TEST_CASE("attention/positions: what is refused", "[unit]")
{
    const kvarn::format f = format_of(64, 64, 4, 2, 32);
    const auto statuses = [&](std::int64_t first, std::int64_t second, std::int64_t third) {
        kv_history history(f, 3500);
        history.add_exact(5);
        history.move_last(first);
        history.add_tiles(2);
        history.move_last(second);
        history.add_exact(0);
        history.move_last(third);
        const auto got = support::attend(f, history.segments(), support::random_query(f, 1, 1, 3501));
        CHECK(got.intact);
        return got.status;
    };
    constexpr std::int64_t highest = std::numeric_limits<std::int64_t>::max(), lowest = std::numeric_limits<std::int64_t>::min();
    using kvarn::status;
    CHECK(statuses(-1, -1, -1) == status::ok);
    CHECK(statuses(0, 5, -1) == status::ok);
    CHECK(statuses(7, 12, -1) == status::ok);
    CHECK(statuses(7, 12, 3) == status::ok);  // a segment without tokens may say anything
    CHECK(statuses(7, 12, lowest) == status::ok);
    CHECK(statuses(highest / 4 - 69, -1, highest) == status::ok);
    CHECK(statuses(-1, highest / 4 - 64, -1) == status::ok);
    CHECK(statuses(0, 4, -1) == status::bad_argument);  // begins before the end of the one before
    CHECK(statuses(7, 11, -1) == status::bad_argument);
    CHECK(statuses(7, 0, -1) == status::bad_argument);
    CHECK(statuses(-2, -1, -1) == status::bad_argument);
    CHECK(statuses(-1, -2, -1) == status::bad_argument);
    CHECK(statuses(lowest, -1, -1) == status::bad_argument);
    CHECK(statuses(highest / 4 - 68, -1, -1) == status::bad_argument);
    CHECK(statuses(-1, highest / 4 - 63, -1) == status::bad_argument);
    CHECK(statuses(-1, highest, -1) == status::bad_argument);
    CHECK(statuses(highest, -1, -1) == status::bad_argument);
}
