// SPDX-License-Identifier: Apache-2.0
// ALiBi: what it adds to scores, against attention in double precision, exactly where one can tell, and the same bits everywhere.

#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "../catch.hpp"
#include "../support/attention.hpp"

namespace {

using kvarn::precision;
using kvarn::status;
using support::attention_query;
using support::format_of;
using support::kv_history;

/// 2^-1, 2^-2, ... as for eight heads, and one that grows with the distance.
std::vector<float> usual_slopes(std::size_t heads)
{
    std::vector<float> slopes;
    for (std::size_t h = 0; h < heads; ++h) slopes.push_back(h == 3 ? -0.01f : std::exp2(-static_cast<float>(h + 1)));
    return slopes;
}

}  // namespace

TEST_CASE("attention/alibi: every precision against double precision", "[unit]")
{
    std::uint64_t seed = 6000;
    for (const kvarn::format& f : {format_of(128, 128, 4, 2, 128), format_of(64, 64, 4, 4, 32), format_of(36, 48, 3, 5, 32, false, 4),
                                   format_of(64, 64, 2, 0, 64), format_of(80, 64, 8, 2, 256)})
        for (int i = 0; i < 18; ++i) {
            support::random_source random(++seed);
            kv_history history(f, seed);
            const auto group = static_cast<std::size_t>(f.group());
            history.add_exact(random.below(40));
            history.add_tiles(1 + random.below(2), support::all_record_storages[seed % 4]);
            history.add_part(support::random_records(f, 1, seed), random.below(group), 1);
            if (random.below(2)) history.move_last(static_cast<std::int64_t>(history.tokens() + random.below(100)));
            history.add_exact(1 + random.below(40), kvarn::basis::rotated);
            attention_query x = support::random_query(f, 1 + random.below(4), 1 + random.below(5), seed);
            x.alibi_slopes = usual_slopes(x.heads);
            x.options.precision = support::all_precisions[i % 3];
            if (random.below(3) == 0) x.options.logit_soft_cap = 2.0f;
            if (random.below(3) == 0) x.options.window = static_cast<std::int64_t>(1 + random.below(100));
            if (random.below(3) == 0) x.options.causal = false;
            if (random.below(3) == 0) x.first_position = static_cast<std::int64_t>(random.below(300));
            if (random.below(3) == 0) x.sink_logits.assign(x.heads, -1.0f);
            if (random.below(3) == 0) {
                x.mask.assign(x.tokens, std::vector<bool>(30));
                for (auto& row : x.mask)
                    for (std::size_t t = 0; t < row.size(); ++t) row[t] = random.below(2) == 0;
            }
            const auto got = support::attend(f, history.segments(), x);
            const auto error = support::error_of(got, support::wanted(history, x));
            INFO(support::describe(f) << "; " << history.tokens() << " tokens; " << support::describe(x));
            CHECK(got.status == status::ok);
            // Few tokens have most of the weight: less averaging.
            CHECK(error.out < 3.0 * support::out_bound(x.options.precision));
            CHECK(error.log_sum_exp < 3.0 * support::log_sum_exp_bound(x.options.precision));
            support::for_each_arch([&](auto arch) {
                CHECK(support::same_bits(support::attend<decltype(arch)>(f, history.segments(), x), got));
            });
        }
}

TEST_CASE("attention/alibi: queries of zeros weigh by distance alone", "[unit]")
{
    // All of the score is the bias, also behind a soft cap, which does not see it.
    const kvarn::format f = format_of(64, 64, 4, 4, 32);
    kv_history history(f, 6100);
    history.add_tiles(2);
    history.add_exact(40);
    for (const float cap : {0.0f, 0.5f}) {
        attention_query x = support::random_query(f, 2, 4, 6101, 0.0);
        x.options.precision = precision::exact;
        x.options.logit_soft_cap = cap;
        x.alibi_slopes = usual_slopes(4);
        const auto got = support::attend(f, history.segments(), x);
        REQUIRE(got.status == status::ok);
        for (std::size_t m = 0; m < 2; ++m)
            for (std::size_t h = 0; h < 4; ++h) {
                double sum = 0.0;
                for (int t = 0; t <= 102 + static_cast<int>(m); ++t)
                    sum += std::exp(static_cast<double>(x.alibi_slopes[h]) * (t - 102 - static_cast<int>(m)));
                CHECK(std::fabs(static_cast<double>(got.log_sum_exp[m * 4 + h]) - std::log(sum)) < 1e-5);
            }
    }
}

TEST_CASE("attention/alibi: slopes of zero change nothing, and positions matter only as differences", "[unit]")
{
    const kvarn::format f = format_of(128, 128, 4, 2, 128);
    kv_history history(f, 6200), later(f, 6200);
    for (kv_history* const h : {&history, &later}) {
        h->add_tiles(9);
        if (h == &later) h->move_last(std::int64_t{1} << 60);
        h->add_exact(20);
    }
    for (const precision p : support::all_precisions) {
        attention_query x = support::random_query(f, 2, 3, 6201);
        x.options.precision = p;
        const auto plain = support::attend(f, history.segments(), x);
        x.alibi_slopes.assign(3, 0.0f);
        CHECK(support::same_bits(support::attend(f, history.segments(), x), plain));
        x.alibi_slopes = usual_slopes(3);
        const auto wanted = support::attend(f, history.segments(), x);
        CHECK(!support::same_bits(wanted, plain));
        CHECK(support::same_bits(support::attend(f, later.segments(), x), wanted));
        // A run in two segments, and items.
        const std::vector<kvarn::kv_segment> cut{kvarn::first_tokens(f, history.segments()[0], 1024),
                                                 kvarn::token_range(f, history.segments()[0], 1024, SIZE_MAX), history.segments()[1]};
        CHECK(support::same_bits(support::attend(f, cut, x), wanted));
        const auto items = support::attend_items(f, {&history, 1}, {x}, x.options, 1, 3, 6202);
        CHECK(items[0].intact);
        CHECK(support::same_bits(items[0], wanted));
    }
}

TEST_CASE("attention/alibi: far positions and large slopes stay numbers", "[unit]")
{
    const kvarn::format f = format_of(64, 64, 4, 2, 32);
    kv_history history(f, 6300);
    history.add_tiles(2);
    history.add_exact(10);
    history.move_last(std::int64_t{1} << 60);
    for (const float slope : {1e18f, -1e18f, 1e-30f, 3.0f})
        for (const std::int64_t first : {std::int64_t{-1}, std::int64_t{0}, std::numeric_limits<std::int64_t>::max() - 65536})
            for (const bool causal : {true, false}) {
                attention_query x = support::random_query(f, 2, 1, 6301);
                x.alibi_slopes = {slope};
                x.first_position = first;
                x.options.causal = causal;
                const auto got = support::attend<kvarn::simd::portable>(f, history.segments(), x);
                CHECK(got.status == status::ok);
                CHECK(support::to_matrix(got.out, 1).allFinite());
                support::for_each_arch([&](auto arch) {
                    CHECK(support::same_bits(support::attend<decltype(arch)>(f, history.segments(), x), got));
                });
            }
}

TEST_CASE("attention/alibi: slopes that are not finite or too large are refused", "[unit]")
{
    const kvarn::format f = format_of(64, 64, 4, 2, 32);
    kv_history history(f, 6400);
    history.add_tiles(1);
    attention_query x = support::random_query(f, 1, 2, 6401);
    constexpr float infinity = std::numeric_limits<float>::infinity();
    for (const float bad : {std::numeric_limits<float>::quiet_NaN(), infinity, -infinity, 1.1e18f, -1.1e18f})
        for (const std::size_t h : {0u, 1u}) {
            x.alibi_slopes = {0.5f, 0.25f};
            x.alibi_slopes[h] = bad;
            CHECK(support::attend(f, history.segments(), x).status == status::not_finite);
        }
}
