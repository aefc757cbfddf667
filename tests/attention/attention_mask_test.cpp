// SPDX-License-Identifier: Apache-2.0
// Masks of the newest positions: trees of drafts, prefixes and random bits, across records, exact tokens and gaps, against attention in
// double precision; bit for bit against the rules that they say again, and whatever hidden tokens hold.

#include <algorithm>
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
using support::record_storage;

using mask_bits = std::vector<std::vector<bool>>;

std::vector<kvarn::format> some_formats()
{
    return {format_of(128, 128, 4, 2, 128), format_of(64, 64, 4, 4, 32), format_of(36, 48, 3, 5, 32, false, 4), format_of(64, 64, 2, 0, 64),
            format_of(80, 64, 8, 2, 256), format_of(512, 512, 4, 0, 32, true, 64)};
}

/// The last m positions: a tree in which each draft sees its ancestors and itself.
mask_bits random_tree(support::random_source& random, std::size_t m)
{
    mask_bits mask(m, std::vector<bool>(m, false));
    for (std::size_t i = 0; i < m; ++i) {
        if (i > 0 && random.below(5) != 0) mask[i] = mask[random.below(i)];  // else another root
        mask[i][i] = true;
    }
    return mask;
}

/// Any bits, dense or sparse; rows may see nothing, or all.
mask_bits random_bits(support::random_source& random, std::size_t m, std::size_t tokens)
{
    mask_bits mask(m, std::vector<bool>(tokens));
    for (auto& row : mask) {
        const std::size_t of_eight = random.below(9);
        for (std::size_t t = 0; t < tokens; ++t) row[t] = random.below(8) < of_eight;
    }
    return mask;
}

/// What the causal rule lets the last m tokens see of the last `tokens` positions.
mask_bits causal_bits(std::size_t m, std::size_t tokens)
{
    mask_bits mask(m, std::vector<bool>(tokens));
    for (std::size_t i = 0; i < m; ++i)
        for (std::size_t t = 0; t < tokens; ++t) mask[i][t] = t + m <= tokens + i;
    return mask;
}

/// Exact tokens, tiles, parts and gaps, and an exact tail.
kv_history random_history(const kvarn::format& f, std::uint64_t seed, std::size_t tail)
{
    kv_history h(f, seed);
    support::random_source random(seed + 1000);
    const auto group = static_cast<std::size_t>(f.group());
    h.add_exact(random.below(40));
    h.add_tiles(1 + random.below(2), support::all_record_storages[seed % 4]);
    if (random.below(2)) {
        h.add_part(support::random_records(f, 2, seed), random.below(group), 1 + random.below(group), record_storage::list);
        if (random.below(2)) h.move_last(static_cast<std::int64_t>(h.tokens() + random.below(100)));
    }
    h.add_exact(tail, kvarn::basis::original, kvarn::basis::rotated);
    return h;
}

void check(const kv_history& history, const attention_query& x)
{
    const auto got = support::attend(history.format(), history.segments(), x);
    const auto error = support::error_of(got, support::wanted(history, x));
    INFO(support::describe(history.format()) << "; " << history.tokens() << " tokens; " << support::describe(x));
    CHECK(got.status == status::ok);
    CHECK(error.out < 2.0 * support::out_bound(x.options.precision));
    CHECK(error.log_sum_exp < 2.0 * support::log_sum_exp_bound(x.options.precision));
    support::for_each_arch([&](auto arch) {
        CHECK(support::same_bits(support::attend<decltype(arch)>(history.format(), history.segments(), x), got));
    });
}

}  // namespace

TEST_CASE("attention/mask: trees of drafts against double precision", "[unit]")
{
    std::uint64_t seed = 5000;
    for (const kvarn::format& f : some_formats())
        for (const std::size_t m : {1u, 2u, 5u, 16u, 70u}) {
            if (m > 16 && f.head_dim_k() > 128) continue;
            support::random_source random(++seed);
            // Drafts in the tail, or, with an empty tail, in a record.
            const kv_history history = random_history(f, seed, random.below(3) == 0 ? 0 : m + random.below(40));
            attention_query x = support::random_query(f, m, 1 + random.below(4), seed);
            x.mask = random_tree(random, m);
            x.options.precision = support::all_precisions[seed % 3];
            x.options.causal = random.below(2) == 0;
            if (random.below(3) == 0) x.options.window = static_cast<std::int64_t>(1 + random.below(150));
            if (random.below(3) == 0) x.options.logit_soft_cap = 5.0f;
            if (random.below(3) == 0) x.sink_logits.assign(x.heads, 0.5f);
            check(history, x);
        }
}

TEST_CASE("attention/mask: any bits over any of the newest positions", "[unit]")
{
    std::uint64_t seed = 5100;
    for (const kvarn::format& f : some_formats())
        for (int i = 0; i < 12; ++i) {
            support::random_source random(++seed);
            const kv_history history = random_history(f, seed, random.below(3) * random.below(50));
            const auto end = static_cast<std::size_t>(history.positions().back()) + 1;
            attention_query x = support::random_query(f, 1 + random.below(6), 1 + random.below(4), seed);
            // Of one position, of all, of more than there are.
            const std::size_t tokens = i == 0 ? 1 : i == 1 ? end : i == 2 ? end + 1 + random.below(200) : 1 + random.below(end);
            x.mask = random_bits(random, x.tokens, tokens);
            x.options.precision = support::all_precisions[i % 3];
            x.options.causal = random.below(3) != 0;
            if (random.below(3) == 0) x.options.window = static_cast<std::int64_t>(1 + random.below(300));
            if (random.below(3) == 0) x.first_position = static_cast<std::int64_t>(random.below(2 * end));
            if (random.below(4) == 0) x.options.output_basis = kvarn::basis::rotated;
            check(history, x);
        }
}

TEST_CASE("attention/mask: a mask that says what the rule says changes no bit", "[unit]")
{
    std::uint64_t seed = 5200;
    for (const kvarn::format& f : some_formats())
        for (int i = 0; i < 8; ++i) {
            support::random_source random(++seed);
            const kv_history history = random_history(f, seed, random.below(2) * random.below(50));
            const auto end = static_cast<std::size_t>(history.positions().back()) + 1;
            attention_query x = support::random_query(f, 1 + random.below(5), 1 + random.below(4), seed);
            x.options.precision = support::all_precisions[i % 3];
            if (i % 3 == 1) x.options.window = static_cast<std::int64_t>(1 + random.below(end));
            const auto wanted = support::attend(f, history.segments(), x);
            REQUIRE(wanted.status == status::ok);
            INFO(support::describe(f) << "; " << support::describe(x));
            for (const std::size_t tokens : {x.tokens, x.tokens + 3, x.tokens + 64, end, end + 100}) {
                attention_query masked = x;
                masked.mask = causal_bits(x.tokens, tokens);
                CHECK(support::same_bits(support::attend(f, history.segments(), masked), wanted));
                masked.options.causal = tokens < end;  // where it reaches the beginning nothing else is asked
                CHECK(support::same_bits(support::attend(f, history.segments(), masked), wanted));
            }
            // And all of it set is no causal mask.
            attention_query open = x, set = x;
            open.options.causal = false;
            set.mask = mask_bits(x.tokens, std::vector<bool>(end, true));
            CHECK(support::same_bits(support::attend(f, history.segments(), set), support::attend(f, history.segments(), open)));
        }
}

TEST_CASE("attention/mask: each row is what it is alone on the tokens that it sees", "[unit]")
{
    // A draft's answer is, up to the order of sums, that of its path alone; here all tokens are exact and in one block: the same bits.
    const kvarn::format f = format_of(64, 80, 4, 2, 32);
    support::random_source random(5300);
    for (int i = 0; i < 20; ++i) {
        kv_history all(f, 5301);
        all.add_exact(24);
        attention_query x = support::random_query(f, 6, 2, 5302);
        x.mask = random_tree(random, 6);
        const auto got = support::attend(f, all.segments(), x);
        for (std::size_t m = 0; m < 6; ++m) {
            attention_query one = x;
            one.tokens = 1;
            one.q.assign(x.q.begin() + static_cast<std::ptrdiff_t>(m * 128), x.q.begin() + static_cast<std::ptrdiff_t>((m + 1) * 128));
            one.first_position = static_cast<std::int64_t>(18 + m);
            one.mask = {x.mask[m]};
            const auto own = support::attend(f, all.segments(), one);
            CHECK(std::equal(own.out.begin(), own.out.end(), got.out.begin() + static_cast<std::ptrdiff_t>(m * 160)));
            CHECK(std::equal(own.log_sum_exp.begin(), own.log_sum_exp.end(), got.log_sum_exp.begin() + static_cast<std::ptrdiff_t>(m * 2)));
        }
    }
}

TEST_CASE("attention/mask: hidden tokens may hold anything", "[unit]")
{
    std::uint64_t seed = 5400;
    for (const kvarn::format& f : some_formats())
        for (const std::uint16_t half : std::initializer_list<std::uint16_t>{0x7e00, 0xffff, 0x7c00}) {
            const auto group = static_cast<std::size_t>(f.group());
            // Two tiles; of the second one, tokens [5, 9) are seen by nobody, nor its last three.
            auto records = support::random_records(f, 2, ++seed);
            kv_history plain(f, seed), spoiled(f, seed);
            plain.add_records(records);
            support::random_source noise(seed);
            const auto hidden = [&](std::size_t t) { return (t >= group + 5 && t < group + 9) || t >= 2 * group - 3; };
            support::overwrite_tokens(f, records, hidden, half, noise);
            spoiled.add_records(records);
            for (const std::size_t tokens : {1u, 3u})
                for (const std::size_t heads : {1u, 3u}) {
                    attention_query x = support::random_query(f, tokens, heads, seed + 1);
                    support::random_source random(seed);
                    x.mask = random_bits(random, tokens, group + 7);
                    for (auto& row : x.mask)
                        for (std::size_t t = 0; t < row.size(); ++t) {
                            if (hidden(t + 2 * group - row.size())) row[t] = false;
                        }
                    for (const precision p : support::all_precisions) {
                        x.options.precision = p;
                        const auto got = support::attend(f, spoiled.segments(), x);
                        INFO(support::describe(f) << "; " << int{half} << "; " << support::describe(x));
                        CHECK(support::to_matrix(got.out, 1).allFinite());
                        CHECK(support::same_bits(got, support::attend(f, plain.segments(), x)));
                    }
                }
        }
}

TEST_CASE("attention/mask: exact tokens that nobody sees may hold anything", "[unit]")
{
    for (const kvarn::format& f : {format_of(64, 80, 4, 2, 32), format_of(64, 64, 4, 0, 64)})
        for (const float value : {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity()})
            for (const bool masked : {true, false}) {
                const std::size_t n = 70, dk = 64, dv = f.has_values() ? 80 : 0;
                support::random_source random(5500);
                std::vector<float> k = support::gaussian_floats(random, n * dk), v = support::gaussian_floats(random, n * dv + 1);
                attention_query x = support::random_query(f, 3, 2, 5501);
                x.options.window = 40;  // nobody sees tokens before 28
                if (masked) x.mask = random_bits(random, 3, 20);
                const auto hidden = [&](std::size_t t) {
                    if (t < 28) return true;
                    return masked && t >= 50 && !x.mask[0][t - 50] && !x.mask[1][t - 50] && !x.mask[2][t - 50];
                };
                const auto run = [&] {
                    const auto values = f.has_values() ? kvarn::input_view(kvarn::token_major(static_cast<const float*>(v.data()), n, 1, dv)) : kvarn::input_view{};
                    const kvarn::kv_segment s = kvarn::exact_tokens(kvarn::token_major(static_cast<const float*>(k.data()), n, 1, dk), values, 0);
                    return support::attend(f, {&s, 1}, x);
                };
                const auto wanted = run();
                std::size_t spoiled = 0;
                for (std::size_t t = 0; t < n; ++t)
                    if (hidden(t)) {
                        ++spoiled;
                        std::fill_n(k.begin() + static_cast<std::ptrdiff_t>(t * dk), dk, value);
                        std::fill_n(v.begin() + static_cast<std::ptrdiff_t>(t * dv), dv, value);
                    }
                CHECK(spoiled >= 28);
                const auto got = run();
                CHECK(got.status == status::ok);
                CHECK(support::to_matrix(got.out, 1).allFinite());
                CHECK(support::same_bits(got, wanted));
            }
}

TEST_CASE("attention/mask: who sees nothing gets zeros", "[unit]")
{
    const kvarn::format f = format_of(64, 64, 4, 2, 32);
    kv_history history(f, 5600);
    history.add_tiles(2);
    history.add_exact(10);
    attention_query x = support::random_query(f, 3, 2, 5601);
    x.mask = mask_bits(3, std::vector<bool>(74, true));
    x.mask[1] = std::vector<bool>(74, false);
    const auto got = support::attend(f, history.segments(), x);
    CHECK(got.status == status::ok);
    CHECK(std::all_of(got.out.begin() + 128, got.out.begin() + 256, [](float v) { return v == 0.0f; }));
    CHECK(got.log_sum_exp[2] == -std::numeric_limits<float>::infinity());
    CHECK(got.log_sum_exp[3] == -std::numeric_limits<float>::infinity());
    CHECK(got.log_sum_exp[0] > -10.0f);
    CHECK(got.log_sum_exp[4] > -10.0f);
}

TEST_CASE("attention/mask: splits, items and threads", "[unit]")
{
    for (const kvarn::format& f : {format_of(64, 64, 4, 2, 128), format_of(36, 48, 3, 5, 32, false, 4)}) {
        const std::size_t per_chunk = kvarn::chunk_tokens / static_cast<std::size_t>(f.group());
        std::vector<kv_history> histories;
        std::vector<attention_query> queries;
        kvarn::attention_options options;
        options.window = 2000;
        std::vector<support::attention_outcome> wanted;
        support::random_source random(5700);
        for (std::uint64_t i = 0; i < 3; ++i) {
            kv_history& h = histories.emplace_back(f, 5701 + i);
            h.add_exact(3);
            h.add_tiles(2 * per_chunk + i);
            if (i != 1) h.add_exact(50);
            attention_query& x = queries.emplace_back(support::random_query(f, 4, 2, 5710 + i));
            x.options = options;
            x.mask = i == 0 ? random_tree(random, 4) : random_bits(random, 4, 1500);
            wanted.push_back(support::attend(f, h.segments(), x));
            REQUIRE(wanted.back().status == status::ok);
            // A run of records in two segments.
            std::vector<kvarn::kv_segment> cut{h.segments()[0], kvarn::first_tokens(f, h.segments()[1], kvarn::chunk_tokens),
                                               kvarn::token_range(f, h.segments()[1], kvarn::chunk_tokens, SIZE_MAX)};
            cut.insert(cut.end(), h.segments().begin() + 2, h.segments().end());
            CHECK(support::same_bits(support::attend(f, cut, x), wanted.back()));
        }
        for (const std::size_t chunks_per_item : {1u, 3u})
            for (const std::size_t threads : {0u, 3u}) {
                const auto got = support::attend_items(f, histories, queries, options, chunks_per_item, threads, threads + 7);
                for (std::size_t i = 0; i < wanted.size(); ++i) CHECK((got[i].intact && support::same_bits(got[i], wanted[i])));
            }
    }
}

TEST_CASE("attention/mask: what is refused", "[unit]")
{
    const kvarn::format f = format_of(64, 64, 4, 2, 32);
    kv_history history(f, 5800);
    history.add_tiles(1);
    const attention_query x = support::random_query(f, 2, 1, 5801);
    const std::vector<std::uint64_t> mask(8, 0x55);
    const auto run = [&](const std::uint64_t* data, std::size_t stride, std::size_t tokens) {
        support::attention_memory memory(f, x);
        kvarn::attention_task task = memory.task(history.segments());
        task.mask = data;
        task.mask_stride = stride;
        task.mask_tokens = tokens;
        support::guarded_bytes scratch(kvarn::attention_scratch_bytes(f, x.rows()));
        const status s = kvarn::attend(f, task, x.options, scratch.span());
        CHECK(memory.untouched() == (s != status::ok));
        return s;
    };
    CHECK(run(mask.data(), 1, 64) == status::ok);
    CHECK(run(mask.data(), 4, 256) == status::ok);
    CHECK(run(mask.data(), 0, 0) == status::ok);
    CHECK(run(nullptr, 0, 0) == status::ok);
    CHECK(run(nullptr, 3, 0) == status::ok);
    CHECK(run(nullptr, 1, 1) == status::null_pointer);
    CHECK(run(mask.data(), 0, 1) == status::shape_mismatch);
    CHECK(run(mask.data(), 1, 65) == status::shape_mismatch);
    CHECK(run(mask.data(), 3, 193) == status::shape_mismatch);
    CHECK(run(mask.data(), SIZE_MAX, SIZE_MAX) == status::bad_argument);
}
