// SPDX-License-Identifier: Apache-2.0
// Sequences of a cache, case by case: statuses, and that errors change nothing; rollback, forks, erasure, drafts, sealing in the queue, tiles that
// cannot be sealed, formats of all kinds, memory. random_test.cpp mixes them.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <numeric>
#include <vector>

#include "../catch.hpp"
#include "../support/attention.hpp"
#include "../support/guarded_cache.hpp"

namespace {

using kvarn::sequence_id;
using kvarn::status;
using support::bits_of;
using support::cache_setup;
using support::guarded_cache;
using support::sequence_view;
using support::small_cache;

constexpr std::size_t all = SIZE_MAX;

/// An operation that fails in a given way and changes nothing that can be seen.
template <class Operation>
void check_refused(guarded_cache& cache, std::initializer_list<sequence_id> ids, status wanted, Operation&& operation)
{
    const auto before = cache.look(ids);
    CHECK(operation() == wanted);
    CHECK(cache.look(ids) == before);
}

template <class T>
status error_of(const kvarn::result<T>& r)
{
    return r.error;
}

/// The queue to its end: all items in this order, then finish in portions.
kvarn::seal_report run_queue(guarded_cache& cache, std::uint64_t seed, std::size_t portion)
{
    kvarn::seal_report sum;
    std::vector<std::size_t> order(kvarn::seal_items(cache.pool()));
    std::iota(order.begin(), order.end(), std::size_t{0});
    support::random_source random(seed);
    for (std::size_t i = order.size(); i > 1; --i) std::swap(order[i - 1], order[random.below(i)]);
    for (const std::size_t i : order) support::expect_ok(kvarn::seal_item(cache.pool(), i, cache.scratch()));
    while (kvarn::seal_items(cache.pool()) != 0) {
        const auto report = kvarn::finish_seal(cache.pool(), portion);
        sum.sealed += report.sealed;
        sum.kept_exact += report.kept_exact;
        sum.dropped += report.dropped;
    }
    return sum;
}

/// Attention in double precision over what read() gives, token by token with its position.
void check_attention(guarded_cache& cache, sequence_id id, std::size_t layer, std::size_t m, kvarn::layer_options options = {})
{
    options.attention.precision = kvarn::precision::exact;
    const auto got = cache.attend(id, layer, m, options);
    const auto& s = cache.pool().state();
    const kvarn::format f = cache.config().policy.base();
    const auto dk = static_cast<std::size_t>(f.key_channels()), dv = support::output_channels(f), heads = cache.pool().heads(), query_heads = 2 * heads;
    std::vector<float> q(m * query_heads * dk);
    support::fill_values(q, 9);
    for (std::size_t head = 0; head < heads; ++head) {
        const auto values = cache.read(id, layer, head);
        const std::size_t n = values.size() / (dk + static_cast<std::size_t>(f.head_dim_v()));
        reference::attention_problem p;
        p.query_heads = 2;
        p.first_position = cache.pool().next_position(id) - static_cast<std::int64_t>(m);
        p.scale = 1.0 / std::sqrt(static_cast<double>(dk));
        p.window = options.attention.window;
        for (std::size_t i = 0; i < s.sequences[id.slot].spans; ++i)
            for (std::int64_t t = 0; t < s.spans_of(id.slot)[i].count; ++t) p.positions.push_back(s.spans_of(id.slot)[i].position + t);
        REQUIRE(p.positions.size() == n);
        std::vector<float> mine;
        for (std::size_t t = 0; t < m; ++t) {
            const auto from = q.begin() + static_cast<std::ptrdiff_t>((t * query_heads + head * 2) * dk);
            mine.insert(mine.end(), from, from + static_cast<std::ptrdiff_t>(2 * dk));
        }
        p.q = support::to_matrix(mine, dk);
        p.k = support::to_matrix({values.begin(), values.begin() + static_cast<std::ptrdiff_t>(n * dk)}, dk);
        if (f.has_values()) p.v = support::to_matrix({values.begin() + static_cast<std::ptrdiff_t>(n * dk), values.end()}, dv);
        else p.v = p.k.leftCols(static_cast<Eigen::Index>(dv));
        const auto wanted = reference::attention(p);
        double error = 0, norm = 0;
        for (std::size_t t = 0; t < m; ++t)
            for (std::size_t r = 0; r < 2; ++r)
                for (std::size_t c = 0; c < dv; ++c) {
                    const double w = wanted.out(static_cast<Eigen::Index>(t * 2 + r), static_cast<Eigen::Index>(c));
                    const double d = static_cast<double>(got[(t * query_heads + head * 2 + r) * dv + c]) - w;
                    error += d * d;
                    norm += w * w;
                }
        CHECK(std::sqrt(error / norm) < 3e-5);
    }
}

/// Tokens [first, first + tokens) of a stream in a cache of the same setup that has nothing else, without sealing.
std::vector<std::uint32_t> exact_values(const cache_setup& setup, std::uint64_t stream, std::size_t tokens, std::size_t layer, std::size_t head)
{
    cache_setup x = setup;
    x.config.record_blocks = x.config.exact_blocks = 32;
    guarded_cache cache(x);
    const auto id = cache.open();
    cache.feed(id, stream, 0, tokens);
    return bits_of(cache.read(id, layer, head));
}

}  // namespace

TEST_CASE("cache/sequence: the life of a token", "[unit]")
{
    guarded_cache cache(small_cache());
    auto& pool = cache.pool();
    const auto id = cache.open();
    CHECK(pool.is_open(id));
    CHECK(pool.next_position(id) == 0);
    REQUIRE(pool.reserve(id, 3) == status::ok);
    CHECK(pool.drafts(id) == 3);
    CHECK(pool.tokens(id) == 0);
    CHECK(pool.next_position(id) == 3);
    REQUIRE(cache.store(id, 1, 0, 3) == status::ok);
    REQUIRE(pool.commit(id, 3) == status::ok);
    CHECK(pool.drafts(id) == 0);
    CHECK(pool.tokens(id) == 3);
    CHECK(bits_of(cache.read(id, 0, 0)) == exact_values(small_cache(), 1, 3, 0, 0));
    cache.feed(id, 1, 3, 125);
    CHECK(kvarn::ready_tiles(pool, id) == 3);  // 128 tokens, 32 of sink
    const auto report = cache.seal(id);
    CHECK(report.sealed == 3);
    CHECK(report.kept_exact == 0);
    const auto n = cache.numbers(id);
    CHECK(n.tokens == 128);
    CHECK(n.sealed_tokens == 96);
    CHECK(n.record_blocks == 3);
    CHECK(n.exact_blocks == 1);
    CHECK(n.spans == 4);
    CHECK(n.dead_tokens == 0);
    CHECK(pool.statistics().bytes_used == 3 * pool.plan().record_block_bytes + pool.plan().exact_block_bytes);
    CHECK(pool.statistics().tiles_sealed == 3);
    for (std::size_t layer = 0; layer < 2; ++layer) check_attention(cache, id, layer, 2);
    // The sink is as it was stored.
    const auto sink = bits_of(cache.read(id, 1, 1, 0, 32));
    CHECK(sink == exact_values(small_cache(), 1, 32, 1, 1));
    REQUIRE(pool.close(id) == status::ok);
    CHECK_FALSE(pool.is_open(id));
    CHECK(pool.statistics().exact.used == 0);
    CHECK(pool.statistics().records.used == 0);
    CHECK(cache.intact());
}

TEST_CASE("cache/sequence: handles go stale and slots come back", "[unit]")
{
    guarded_cache cache(small_cache());
    auto& pool = cache.pool();
    std::vector<sequence_id> stale{{}, {0, 0}, {3, 1}, {4, 1}, {UINT32_MAX, 1}};
    for (int i = 0; i < 3; ++i) {
        const auto id = cache.open();
        cache.feed(id, 1, 0, 40);
        REQUIRE(pool.close(id) == status::ok);
        stale.push_back(id);
    }
    const auto other = cache.open();  // the slot of the last
    cache.feed(other, 2, 0, 70, all, true);
    std::vector<float> x(64, 0.0f);
    const auto view = kvarn::token_major<const float>(x.data(), 1, 2, 32);
    for (const auto id : stale) {
        const auto refused = [&](auto&& operation) { check_refused(cache, {other}, status::stale_handle, operation); };
        CHECK_FALSE(pool.is_open(id));
        CHECK(pool.tokens(id) == 0);
        CHECK(pool.drafts(id) == 0);
        CHECK(pool.next_position(id) == -1);
        CHECK(kvarn::ready_tiles(pool, id) == 0);
        CHECK(kvarn::count_tokens(pool, id, 0, 100) == 0);
        refused([&] { return pool.close(id); });
        refused([&] { return pool.reserve(id, 1); });
        refused([&] { return pool.reserve(id, 0); });
        refused([&] { return pool.commit(id, 0); });
        refused([&] { return pool.truncate(id, 0); });
        refused([&] { return pool.erase(id, 0, 1); });
        refused([&] { return pool.evict_front(id, 1); });
        refused([&] { return error_of(pool.fork(id)); });
        refused([&] { return error_of(pool.statistics(id)); });
        refused([&] { return kvarn::store(pool, id, 0, view, view); });
        refused([&] { return kvarn::read(pool, id, 0, 0, 0, 1, {}, {}, cache.scratch()); });
        refused([&] { return error_of(kvarn::begin_seal(pool, id)); });
        refused([&] { return error_of(kvarn::seal(pool, id, cache.scratch())); });
        refused([&] { return error_of(kvarn::history_of(pool, id, 0, 0, {})); });
        kvarn::sequence_step step;
        step.sequence = id;
        step.q = view;
        std::vector<std::byte> memory(4096);
        refused([&] { return error_of(kvarn::plan_layer(pool, 0, {&step, 1}, {}, memory)); });
    }
    CHECK(pool.is_open(other));
}

TEST_CASE("cache/sequence: every refusal leaves everything as it was", "[unit]")
{
    cache_setup x = small_cache();
    x.config.exact_blocks = 6;
    x.config.record_blocks = 2;
    x.config.most_tokens = 200;
    x.config.most_spans = 8;
    x.config.sequences = 2;
    guarded_cache cache(x);
    auto& pool = cache.pool();
    const auto id = cache.open(5);
    cache.feed(id, 1, 0, 100, all, true);  // sink 32, 2 records, 4 tokens
    const auto refused = [&](status wanted, auto&& operation) { check_refused(cache, {id}, wanted, operation); };
    REQUIRE(cache.numbers(id).sealed_tokens == 64);

    SECTION("open and fork")
    {
        refused(status::bad_argument, [&] { return error_of(pool.open(-1)); });
        refused(status::bad_argument, [&] { return error_of(pool.open((std::int64_t{1} << 60) + 1)); });
        const auto other = cache.fork(id);
        check_refused(cache, {id, other}, status::no_room, [&] { return error_of(pool.open()); });
        check_refused(cache, {id, other}, status::no_room, [&] { return error_of(pool.fork(id)); });
        REQUIRE(pool.close(other) == status::ok);
        REQUIRE(pool.reserve(id, 1) == status::ok);
        refused(status::bad_argument, [&] { return error_of(pool.fork(id)); });
    }
    SECTION("reserve")
    {
        refused(status::sequence_full, [&] { return pool.reserve(id, 101); });   // most_tokens
        refused(status::sequence_full, [&] { return pool.reserve(id, SIZE_MAX); });
        const auto other = cache.open();
        cache.feed(other, 2, 0, 96);
        // One exact block is left: 28 places behind the tail, then 32.
        check_refused(cache, {id, other}, status::no_room, [&] { return pool.reserve(id, 61); });
        CHECK(pool.reserve(id, 60) == status::ok);
    }
    SECTION("reserve: a copy needs a block too")
    {
        cache.feed(id, 1, 100, 96);  // sink and 4 more: one is left
        const auto other = cache.fork(id);
        CHECK(pool.statistics().exact.free == 1);
        CHECK(pool.reserve(id, 4) == status::ok);  // copied
        REQUIRE(pool.close(other) == status::ok);
    }
    SECTION("store")
    {
        REQUIRE(pool.reserve(id, 4) == status::ok);
        std::vector<float> values(4 * 2 * 32, 1.0f);
        const auto view = [&](std::size_t tokens, std::size_t heads, std::size_t channels = 32) {
            return kvarn::input_view(kvarn::token_major<const float>(values.data(), tokens, heads, channels));
        };
        const auto store = [&](std::size_t layer, kvarn::input_view k, kvarn::input_view v, std::size_t draft = 0, std::size_t head = 0) {
            return kvarn::store(pool, id, layer, k, v, draft, head);
        };
        refused(status::bad_argument, [&] { return store(2, view(1, 2), view(1, 2)); });
        refused(status::bad_argument, [&] { return store(0, view(1, 2), view(1, 2), 0, 1); });
        refused(status::bad_argument, [&] { return store(0, view(1, 1), view(1, 1), 0, 2); });
        refused(status::bad_argument, [&] { return store(0, view(1, 2), view(1, 2), 4); });
        refused(status::bad_argument, [&] { return store(0, view(2, 2), view(2, 2), 3); });
        refused(status::bad_argument, [&] { return store(0, view(1, 2), view(1, 2), SIZE_MAX); });
        refused(status::bad_argument, [&] { return store(0, view(1, 2), view(1, 2), 1); });  // draft 0 is missing
        refused(status::shape_mismatch, [&] { return store(0, view(1, 2, 31), view(1, 2)); });
        refused(status::shape_mismatch, [&] { return store(0, view(1, 2), view(1, 2, 31)); });
        refused(status::shape_mismatch, [&] { return store(0, view(2, 2), view(1, 2)); });
        refused(status::shape_mismatch, [&] { return store(0, view(1, 2), view(1, 1)); });
        refused(status::shape_mismatch, [&] { return store(0, view(1, 2), {}); });
        kvarn::input_view null = view(1, 2);
        null.data = nullptr;
        refused(status::null_pointer, [&] { return store(0, null, view(1, 2)); });
        refused(status::null_pointer, [&] { return store(0, view(1, 2), null); });
        // None of them counts as stored.
        refused(status::bad_argument, [&] { return pool.commit(id, 1); });
        CHECK(store(0, view(4, 2), view(4, 2)) == status::ok);
    }
    SECTION("commit")
    {
        REQUIRE(pool.reserve(id, 3) == status::ok);
        refused(status::bad_argument, [&] { return pool.commit(id, 4); });
        refused(status::bad_argument, [&] { return pool.commit(id, 1); });
        for (std::size_t layer = 0; layer < 2; ++layer)
            for (std::size_t head = 0; head < 2; ++head) {
                refused(status::bad_argument, [&] { return pool.commit(id, 3); });
                REQUIRE(cache.store(id, 1, 100, layer == 1 && head == 1 ? 2 : 3, 0, layer, head, 1) == status::ok);
            }
        refused(status::bad_argument, [&] { return pool.commit(id, 3); });
        CHECK(pool.commit(id, 2) == status::ok);
        CHECK(pool.tokens(id) == 102);
        CHECK(pool.next_position(id) == 107);
    }
    SECTION("truncate, erase, evict")
    {
        refused(status::bad_argument, [&] { return pool.truncate(id, 4); });
        refused(status::bad_argument, [&] { return pool.erase(id, 10, 9); });
        refused(status::bad_argument, [&] { return pool.evict_front(id, 69); });  // 100 tokens, 32 of sink
        refused(status::bad_argument, [&] { return pool.evict_front(id, SIZE_MAX); });
        refused(status::ok, [&] { return pool.erase(id, 10, 10); });
        refused(status::ok, [&] { return pool.erase(id, 105, 1000); });
        refused(status::ok, [&] { return pool.erase(id, -10, 5); });
        refused(status::ok, [&] { return pool.evict_front(id, 0); });
        refused(status::ok, [&] { return pool.truncate(id, 105); });
        for (std::int64_t at = 10; at < 26; at += 4) REQUIRE(pool.erase(id, at, at + 2) == status::ok);
        REQUIRE(cache.numbers(id).spans == 8);
        refused(status::sequence_full, [&] { return pool.erase(id, 50, 52); });
        CHECK(pool.erase(id, 37, 52) == status::ok);  // the first part of a tile: no more spans
        REQUIRE(pool.reserve(id, 1) == status::ok);
        refused(status::bad_argument, [&] { return pool.erase(id, 10, 11); });
        refused(status::bad_argument, [&] { return pool.erase(id, 10, 10); });
        refused(status::bad_argument, [&] { return pool.evict_front(id, 1); });
        refused(status::bad_argument, [&] { return pool.evict_front(id, 0); });
    }
    SECTION("read")
    {
        std::vector<float> values(200 * 64);
        const auto out = [&](std::size_t tokens, std::size_t heads = 1, std::size_t channels = 32) {
            return kvarn::output_view(kvarn::token_major(values.data(), tokens, heads, channels));
        };
        const auto read = [&](std::size_t layer, std::size_t head, const kvarn::output_view& k, const kvarn::output_view& v, std::size_t less = 0) {
            return kvarn::read(pool, id, layer, head, 10, 50, k, v, cache.scratch().first(kvarn::read_scratch_bytes(pool.format_of(0, 0)) - less));
        };
        CHECK(read(0, 0, out(40), {}) == status::ok);
        CHECK(read(0, 0, {}, out(40)) == status::ok);
        CHECK(read(0, 0, {}, {}) == status::ok);
        CHECK(read(2, 0, out(40), {}) == status::bad_argument);
        CHECK(read(0, 2, out(40), {}) == status::bad_argument);
        CHECK(read(0, 0, out(39), {}) == status::shape_mismatch);
        CHECK(read(0, 0, out(40, 2), {}) == status::shape_mismatch);
        CHECK(read(0, 0, out(40), out(40, 1, 31)) == status::shape_mismatch);
        CHECK(read(0, 0, out(40), {}, 1) == status::buffer_too_small);
        REQUIRE(pool.reserve(id, 2) == status::ok);
        const auto drafts = [&](std::int64_t begin, std::int64_t end) {
            return kvarn::read(pool, id, 1, 1, begin, end, out(kvarn::count_tokens(pool, id, begin, end)), {}, cache.scratch());
        };
        CHECK(drafts(100, 105) == status::ok);
        CHECK(drafts(100, 106) == status::bad_argument);  // what was in that place before is not theirs
        CHECK(drafts(105, 106) == status::bad_argument);
        REQUIRE(cache.store(id, 1, 100, 1, 0, 1, 1, 1) == status::ok);
        CHECK(drafts(105, 106) == status::ok);
        CHECK(drafts(105, 107) == status::bad_argument);
        CHECK(drafts(107, 300) == status::ok);  // nothing
    }
    SECTION("sealing")
    {
        cache.feed(id, 1, 100, 28);
        refused(status::no_room, [&] { return error_of(kvarn::begin_seal(pool, id)); });
        refused(status::no_room, [&] { return error_of(kvarn::seal(pool, id, cache.scratch())); });
        refused(status::ok, [&] { return error_of(kvarn::seal(pool, id, cache.scratch(), 0)); });
        refused(status::buffer_too_small, [&] { return error_of(kvarn::seal(pool, id, cache.scratch().first(10))); });
        refused(status::bad_argument, [&] { return kvarn::seal_item(pool, 0, cache.scratch()); });
        refused(status::ok, [&] { return kvarn::finish_seal(pool, 5), status::ok; });
        REQUIRE(pool.truncate(id, 5 + 64) == status::ok);  // a record block becomes free
        cache.feed(id, 1, 64, 64);
        REQUIRE(*kvarn::begin_seal(pool, id) == 1);
        refused(status::bad_argument, [&] { return kvarn::seal_item(pool, 4, cache.scratch()); });
        refused(status::buffer_too_small, [&] { return kvarn::seal_item(pool, 0, cache.scratch().first(10)); });
        run_queue(cache, 1, 1);
        CHECK(cache.numbers(id).sealed_tokens == 64);
    }
    SECTION("formats")
    {
        kvarn::format_spec spec = pool.format_of(0, 0).spec();
        spec.key_rotation = kvarn::rotation::none;
        refused(status::bad_argument, [&] { return pool.set_format(0, 0, *kvarn::make_format(spec)); });  // there are records
        REQUIRE(pool.close(id) == status::ok);
        CHECK(pool.set_format(2, 0, *kvarn::make_format(spec)) == status::bad_argument);
        CHECK(pool.set_format(0, 2, *kvarn::make_format(spec)) == status::bad_argument);
        CHECK(pool.set_format(1, 0, *kvarn::make_format(spec)) == status::bad_argument);  // of other bits
        CHECK(pool.set_format(0, 0, *kvarn::make_format(spec)) == status::ok);
        CHECK_FALSE(pool.format_of(0, 0).keys_rotated());
    }
    CHECK(cache.intact());
}

TEST_CASE("cache/sequence: plans of layers are checked", "[unit]")
{
    guarded_cache cache(small_cache());
    auto& pool = cache.pool();
    const auto id = cache.open();
    cache.feed(id, 1, 0, 40);
    std::vector<float> q(64 * 4 * 32, 0.5f), out(q.size(), -77.0f);
    const auto step_of = [&](std::size_t m, std::size_t heads) {
        kvarn::sequence_step step;
        step.sequence = id;
        step.q = kvarn::token_major<const float>(q.data(), m, heads, 32);
        step.out = kvarn::token_major(out.data(), m, heads, 32);
        return step;
    };
    const auto plan = [&](const kvarn::sequence_step& step, std::size_t layer = 0, kvarn::layer_options options = {}, std::size_t less = 0) {
        std::vector<std::byte> memory(kvarn::layer_memory_bytes(pool, {&step, 1}, options) - less);
        return kvarn::plan_layer(pool, layer, {&step, 1}, options, memory).error;
    };
    CHECK(plan(step_of(1, 4)) == status::ok);
    CHECK(plan(step_of(40, 4)) == status::ok);
    CHECK(plan(step_of(41, 4)) == status::shape_mismatch);
    CHECK(plan(step_of(1, 3)) == status::shape_mismatch);
    CHECK(plan(step_of(1, 0)) == status::shape_mismatch);
    CHECK(plan(step_of(1, 4), 2) == status::bad_argument);
    CHECK(plan(step_of(1, 4), 0, {}, 1) == status::buffer_too_small);
    kvarn::layer_options none;
    none.chunks_per_item = 0;
    CHECK(plan(step_of(1, 4), 0, none) == status::bad_argument);

    // Drafts that are not stored are not attended to.
    REQUIRE(pool.reserve(id, 2) == status::ok);
    const auto run = [&](const kvarn::sequence_step& step, std::size_t layer) {
        std::fill(out.begin(), out.end(), -77.0f);
        std::vector<std::byte> memory(kvarn::layer_memory_bytes(pool, {&step, 1}, {}));
        const auto items = kvarn::plan_layer(pool, layer, {&step, 1}, {}, memory);
        support::expect_ok(items.error);
        CHECK(items->store_item(items->store_items()) == status::bad_argument);
        CHECK(items->attend_item(items->attend_items(), cache.scratch()) == status::bad_argument);
        CHECK(items->finish_item(items->finish_items(), cache.scratch()) == status::bad_argument);
        return items->run(cache.scratch());
    };
    const auto untouched = [&] { return std::all_of(out.begin(), out.end(), [](float x) { return x == -77.0f; }); };
    CHECK(run(step_of(2, 4), 0) == status::bad_argument);
    CHECK(untouched());
    REQUIRE(cache.store(id, 1, 40, 1, 0, 0, 0, 2) == status::ok);
    CHECK(run(step_of(2, 4), 0) == status::bad_argument);
    CHECK(untouched());
    // A step that brings what is missing.
    auto step = step_of(2, 4);
    const auto k = cache.values(true, 1, 41, 1, 0), v = cache.values(false, 1, 41, 1, 0);
    step.k = kvarn::token_major<const float>(k.data(), 1, 2, 32);
    step.v = kvarn::token_major<const float>(v.data(), 1, 2, 32);
    step.first_draft = 1;
    CHECK(run(step, 0) == status::ok);
    CHECK_FALSE(untouched());
    // What plan_layer sees, and of which step.
    const auto refused_plan = [&](status wanted, auto change) {
        std::vector<kvarn::sequence_step> two{step, step};
        change(two[1]);
        std::vector<std::byte> memory(1 << 20);
        std::size_t failed = 77;
        CHECK(kvarn::plan_layer(pool, 0, two, {}, memory, &failed).error == wanted);
        CHECK(failed == 1);
    };
    refused_plan(status::shape_mismatch, [](kvarn::sequence_step& s) { s.k.heads = 1; });
    refused_plan(status::shape_mismatch, [](kvarn::sequence_step& s) { s.v.channels = 31; });
    refused_plan(status::shape_mismatch, [](kvarn::sequence_step& s) { s.k = {}; });
    refused_plan(status::null_pointer, [](kvarn::sequence_step& s) { s.v.data = nullptr; });
    refused_plan(status::shape_mismatch, [](kvarn::sequence_step& s) { s.out.tokens = 1; });
    refused_plan(status::shape_mismatch, [](kvarn::sequence_step& s) { s.q.channels = 16; });
    refused_plan(status::null_pointer, [](kvarn::sequence_step& s) { s.out.data = nullptr; });
    refused_plan(status::stale_handle, [](kvarn::sequence_step& s) { s.sequence.generation += 1; });
    {
        const std::vector<kvarn::sequence_step> two{step_of(2, 4), step_of(2, 4)};
        std::vector<std::byte> memory(kvarn::layer_memory_bytes(pool, two, {}));
        const auto items = kvarn::plan_layer(pool, 0, two, {}, memory);
        REQUIRE(items.ok());
        CHECK(items->step_of_store(0) == 0);
        CHECK(items->step_of_store(items->store_items() - 1) == 1);
        CHECK(items->step_of_attend(0) != items->step_of_attend(items->attend_items() - 1));
    }
    auto no_queries = step;
    no_queries.q = {};
    no_queries.out = {};
    CHECK(run(no_queries, 0) == status::ok);
    CHECK(run(step_of(2, 4), 1) == status::bad_argument);  // the other layer
    CHECK(kvarn::layer_memory_bound(cache.config(), 1, 2 * 64, 2) >= kvarn::layer_memory_bytes(pool, std::vector{step_of(40, 4)}, {}));
    std::vector<kvarn::kv_segment> segments(2);
    CHECK(error_of(kvarn::history_of(pool, id, 2, 0, segments)) == status::bad_argument);
    CHECK(error_of(kvarn::history_of(pool, id, 0, 2, segments)) == status::bad_argument);
    CHECK(error_of(kvarn::history_of(pool, id, 0, 0, std::span(segments).first(1))) == status::buffer_too_small);
    CHECK(*kvarn::history_of(pool, id, 0, 0, segments) == 2);
}

TEST_CASE("cache/sequence: a rollback into a sealed tile, a fork, and both go on", "[unit]")
{
    guarded_cache cache(small_cache());
    auto& pool = cache.pool();
    const auto a = cache.open();
    cache.feed(a, 1, 0, 160, all, true);
    const auto whole = cache.records(a);
    const auto before = bits_of(cache.read(a, 1, 0, 0, 75));
    REQUIRE(pool.truncate(a, 75) == status::ok);  // 11 tokens of the second record
    CHECK(bits_of(cache.read(a, 1, 0)) == before);
    auto n = cache.numbers(a);
    CHECK(n.tokens == 75);
    CHECK(n.sealed_tokens == 43);
    CHECK(n.dead_tokens == 21);
    CHECK(n.record_blocks == 2);
    CHECK(pool.statistics().records.used == 2);
    cache.feed(a, 3, 75, 7);
    CHECK(cache.numbers(a).spans == 4);
    const auto b = cache.fork(a);
    CHECK(cache.look(b) == cache.look(a));
    CHECK(pool.statistics().records.shared == 2);
    CHECK(pool.statistics().exact.shared == 2);
    cache.feed(a, 4, 0, 40);
    cache.feed(b, 5, 0, 3);
    CHECK(bits_of(cache.read(a, 1, 0, 0, 82)) == bits_of(cache.read(b, 1, 0, 0, 82)));
    CHECK(bits_of(cache.read(a, 1, 0, 0, 75)) == before);
    CHECK(bits_of(cache.read(a, 1, 0, 82, 85)) != bits_of(cache.read(b, 1, 0, 82, 85)));
    CHECK(pool.statistics().exact.shared == 1);  // the sink
    // The tail does not begin at a multiple of the group: a tile is what fills a block.
    CHECK(cache.seal(a).sealed == 1);
    for (std::size_t layer = 0; layer < 2; ++layer) {
        check_attention(cache, a, layer, 3);
        check_attention(cache, b, layer, 3);
    }
    cache.poison();
    for (std::size_t layer = 0; layer < 2; ++layer) check_attention(cache, b, layer, 3);
    // Nothing was decoded and encoded again.
    CHECK(cache.record(b, 1, 1, 0) == std::vector<std::uint8_t>(cache.record(a, 1, 1, 0)));
    REQUIRE(whole.size() == 4 * cache.records(b).size() / 2);
    REQUIRE(pool.close(a) == status::ok);
    for (std::size_t layer = 0; layer < 2; ++layer) check_attention(cache, b, layer, 3);
    REQUIRE(pool.close(b) == status::ok);
    CHECK(pool.statistics().records.used + pool.statistics().exact.used == 0);
}

TEST_CASE("cache/sequence: a request after a longer one carries nothing over", "[unit]")
{
    const auto request = [](guarded_cache& cache, std::uint64_t stream, std::size_t tokens) {
        const auto id = cache.open();
        cache.feed(id, stream, 0, tokens, 17, true);
        const auto seen = cache.look(id);
        support::expect_ok(cache.pool().close(id));
        return seen;
    };
    guarded_cache fresh(small_cache());
    const auto wanted = request(fresh, 1, 90);
    guarded_cache used(small_cache());
    request(used, 2, 500);
    CHECK(request(used, 1, 90) == wanted);
    used.poison();
    CHECK(request(used, 1, 90) == wanted);
    request(used, 3, 33);
    CHECK(request(used, 1, 90) == wanted);

    // Spoiled at any time, what nobody may read is not read.
    guarded_cache spoiled(small_cache(), 5);
    auto& pool = spoiled.pool();
    const auto id = spoiled.open();
    for (std::size_t done = 0; done < 90;) {
        const std::size_t n = std::min<std::size_t>(17, 90 - done);
        REQUIRE(pool.reserve(id, n) == status::ok);
        REQUIRE(spoiled.store(id, 1, done, n) == status::ok);
        spoiled.poison();
        REQUIRE(pool.commit(id, n) == status::ok);
        spoiled.poison();
        spoiled.seal(id);
        spoiled.poison();
        done += n;
    }
    CHECK(spoiled.look(id) == wanted);
}

TEST_CASE("cache/sequence: sequences of different lengths in one plan", "[unit]")
{
    guarded_cache cache(small_cache());
    auto& pool = cache.pool();
    const std::size_t lengths[] = {150, 3, 64}, rows[] = {1, 3, 40};
    std::vector<sequence_id> ids;
    for (std::size_t i = 0; i < 3; ++i) {
        ids.push_back(cache.open());
        cache.feed(ids[i], i, 0, lengths[i], all, true);
    }
    for (const std::size_t threads : {1u, 8u})
        for (std::size_t layer = 0; layer < 2; ++layer) {
            kvarn::layer_options options;
            options.threads = threads;
            std::vector<kvarn::sequence_step> steps(3);
            std::vector<std::vector<float>> q(3), out(3);
            for (std::size_t i = 0; i < 3; ++i) {
                q[i].resize(rows[i] * 4 * 32);
                support::fill_values(q[i], 9);
                out[i].assign(rows[i] * 4 * 33, -77.0f);
                steps[i].sequence = ids[i];
                steps[i].q = kvarn::token_major<const float>(q[i].data(), rows[i], 4, 32);
                steps[i].out = kvarn::token_major(out[i].data(), rows[i], 4, 32);
                steps[i].log_sum_exp = out[i].data() + rows[i] * 4 * 32;
            }
            support::guarded_bytes memory(kvarn::layer_memory_bytes(pool, steps, options));
            const auto items = kvarn::plan_layer(pool, layer, steps, options, memory.span());
            REQUIRE(items.ok());
            REQUIRE(items->run(cache.scratch()) == status::ok);
            CHECK(memory.intact());
            for (std::size_t i = 0; i < 3; ++i) CHECK(bits_of(out[i]) == bits_of(cache.attend(ids[i], layer, rows[i])));
        }
}

TEST_CASE("cache/sequence: a step cancelled between any two items leaves nothing behind", "[unit]")
{
    guarded_cache cache(small_cache());
    auto& pool = cache.pool();
    const auto id = cache.open();
    cache.feed(id, 1, 0, 140, 50, true);
    const auto before = cache.look(id);
    constexpr std::size_t tokens = 20, query_heads = 4;
    std::vector<float> q(tokens * query_heads * 32), out(q.size());
    support::fill_values(q, 9);
    const auto k = cache.values(true, 1, 140, tokens, 0), v = cache.values(false, 1, 140, tokens, 0);
    kvarn::sequence_step step;
    step.sequence = id;
    step.k = kvarn::token_major<const float>(k.data(), tokens, pool.heads(), 32);
    step.v = kvarn::token_major<const float>(v.data(), tokens, pool.heads(), 32);
    step.q = kvarn::token_major<const float>(q.data(), tokens, query_heads, 32);
    step.out = kvarn::token_major(out.data(), tokens, query_heads, 32);

    // Runs up to `most` items of the first layer, then gives up; true if that was all of them.
    const auto run = [&](std::size_t most) {
        REQUIRE(pool.reserve(id, tokens) == status::ok);
        std::vector<std::byte> memory(kvarn::layer_memory_bytes(pool, {&step, 1}, {}));
        const auto items = kvarn::plan_layer(pool, 0, {&step, 1}, {}, memory);
        REQUIRE(items.ok());
        std::size_t done = 0;
        for (std::size_t i = 0; i < items->store_items() && done < most; ++i, ++done) support::expect_ok(items->store_item(i));
        for (std::size_t i = 0; i < items->attend_items() && done < most; ++i, ++done)
            support::expect_ok(items->attend_item(i, cache.scratch()));
        for (std::size_t i = 0; i < items->finish_items() && done < most; ++i, ++done)
            support::expect_ok(items->finish_item(i, cache.scratch()));
        REQUIRE(pool.commit(id, 0) == status::ok);
        return done < most;
    };
    std::size_t most = 0;
    while (!run(most++)) CHECK(cache.look(id) == before);
    CHECK(most > pool.heads() + 2);
    const auto whole = bits_of(out);
    run(pool.heads() + 1);
    out.assign(out.size(), -1.0f);
    CHECK(run(all));
    CHECK(bits_of(out) == whole);

    // Sealing that is given up half way goes on from there, or not at all.
    const auto undisturbed = cache.fork(id);
    for (const auto each : {id, undisturbed}) cache.feed(each, 1, 140, 60);
    REQUIRE(kvarn::begin_seal(pool, id).ok());
    REQUIRE(kvarn::seal_items(pool) > 1);
    support::expect_ok(kvarn::seal_item(pool, 0, cache.scratch()));
    CHECK(kvarn::cancel_seal(pool, id) != 0);
    cache.seal(id);
    cache.seal(undisturbed);
    CHECK(cache.records(id) == cache.records(undisturbed));
}

TEST_CASE("cache/sequence: a padded batch gives what one that is not padded gives", "[unit]")
{
    guarded_cache cache(small_cache());
    const auto plain = cache.open(), padded = cache.open(1000);
    cache.feed(plain, 1, 0, 110, 50, true);
    cache.feed(padded, 1, 0, 110, 50, true);
    CHECK(cache.records(plain) == cache.records(padded));
    CHECK(cache.pool().next_position(padded) == 1110);
    for (std::size_t layer = 0; layer < 2; ++layer) {
        kvarn::layer_options window;
        window.attention.window = 60;
        CHECK(bits_of(cache.attend(plain, layer, 5)) == bits_of(cache.attend(padded, layer, 5)));
        CHECK(bits_of(cache.attend(plain, layer, 5, window)) == bits_of(cache.attend(padded, layer, 5, window)));
    }
    for (const auto id : {plain, padded}) {
        const std::int64_t first = id == plain ? 0 : 1000;
        REQUIRE(cache.pool().evict_front(id, 20) == status::ok);
        CHECK(kvarn::count_tokens(cache.pool(), id, first, first + 52) == 32);  // the sink is counted from the first position
        REQUIRE(cache.pool().truncate(id, first + 100) == status::ok);
    }
    auto a = cache.look(plain), b = cache.look(padded);
    b.numbers.next_position -= 1000;
    CHECK(a == b);
}

TEST_CASE("cache/sequence: positions keep their meaning where tokens are evicted or erased", "[unit]")
{
    cache_setup x = small_cache();
    x.config.most_spans = 40;
    guarded_cache cache(x);
    auto& pool = cache.pool();
    const auto id = cache.open();
    kvarn::layer_options window;
    window.attention.window = 45;
    support::random_source random(3);
    std::size_t fed = 0;
    for (int round = 0; round < 40; ++round) {
        const std::size_t n = 1 + random.below(40);
        cache.feed(id, 1, fed, n);
        fed += n;
        cache.seal(id);
        const auto kept = cache.read(id, 0, 1);
        if (cache.numbers(id).tokens > 150) {
            REQUIRE(pool.evict_front(id, 1 + random.below(60)) == status::ok);
        } else if (round % 3 == 0 && fed > 60) {
            const auto begin = static_cast<std::int64_t>(random.below(fed - 10));
            REQUIRE(pool.erase(id, begin, begin + 1 + static_cast<std::int64_t>(random.below(30))) == status::ok);
        }
        if (round % 7 == 6) {
            REQUIRE(pool.truncate(id, pool.next_position(id) - static_cast<std::int64_t>(random.below(20))) == status::ok);
            fed = static_cast<std::size_t>(pool.next_position(id));
        }
        CHECK(pool.next_position(id) == static_cast<std::int64_t>(fed));
        if (round % 4 != 0) continue;
        cache.poison();
        for (std::size_t layer = 0; layer < 2; ++layer) {
            check_attention(cache, id, layer, 2);
            check_attention(cache, id, layer, 2, window);
        }
    }
    CHECK(cache.numbers(id).dead_tokens > 0);
    CHECK(cache.numbers(id).spans > 4);
    REQUIRE(pool.close(id) == status::ok);
    CHECK(pool.statistics().records.used + pool.statistics().exact.used == 0);
}

TEST_CASE("cache/sequence: drafts are stored in pieces, again, and committed in part", "[unit]")
{
    guarded_cache cache(small_cache());
    auto& pool = cache.pool();
    const auto id = cache.open(), plain = cache.open();
    cache.feed(id, 1, 0, 30);
    cache.feed(plain, 1, 0, 30);
    // Several reserves, then pieces by head and by draft, some of them wrong at first.
    REQUIRE(pool.reserve(id, 5) == status::ok);
    REQUIRE(pool.reserve(id, 0) == status::ok);
    REQUIRE(pool.reserve(id, 40) == status::ok);
    CHECK(pool.drafts(id) == 45);
    for (std::size_t layer = 0; layer < 2; ++layer) {
        REQUIRE(cache.store(id, 99, 7, 45, 0, layer, 1, 1) == status::ok);
        REQUIRE(cache.store(id, 1, 30, 20, 0, layer, 1, 1) == status::ok);
        REQUIRE(cache.store(id, 1, 50, 25, 20, layer, 1, 1) == status::ok);
        REQUIRE(cache.store(id, 1, 30, 2, 0, layer, 0, 1) == status::ok);
        CHECK(cache.store(id, 1, 33, 2, 3, layer, 0, 1) == status::bad_argument);
        REQUIRE(cache.store(id, 1, 31, 44, 1, layer, 0, 1) == status::ok);
        REQUIRE(cache.store(id, 98, 0, 1, 44, layer, 0, 2) == status::ok);
    }
    REQUIRE(pool.commit(id, 44) == status::ok);
    cache.feed(plain, 1, 30, 44);
    CHECK(cache.look(id) == cache.look(plain));
    // None of them counts; what they took is free again.
    const auto before = cache.look({id, plain});
    REQUIRE(pool.reserve(id, 100) == status::ok);
    REQUIRE(cache.store(id, 50, 0, 100) == status::ok);
    REQUIRE(pool.commit(id, 0) == status::ok);
    CHECK(cache.look({id, plain}) == before);
    REQUIRE(pool.reserve(id, 3) == status::ok);
    CHECK(pool.commit(id, 1) == status::bad_argument);  // stored before counts no more
    REQUIRE(cache.store(id, 1, 74, 3) == status::ok);
    REQUIRE(pool.truncate(id, pool.next_position(id)) == status::ok);  // drops drafts alone
    CHECK(cache.look({id, plain}) == before);
    // Drafts of a speculation in a row.
    support::random_source random(8);
    for (std::size_t at = 74, round = 0; round < 30; ++round) {
        const std::size_t n = 1 + random.below(8), good = random.below(n + 1);
        REQUIRE(pool.reserve(id, n) == status::ok);
        REQUIRE(cache.store(id, 1, at, good) == status::ok);
        REQUIRE(cache.store(id, 77, at, n - good, good) == status::ok);
        static_cast<void>(cache.attend(id, 1, n));
        REQUIRE(pool.commit(id, good) == status::ok);
        cache.feed(plain, 1, at, good);
        at += good;
        cache.seal(id);
        cache.seal(plain);
    }
    CHECK(cache.records(id) == cache.records(plain));
    CHECK(cache.look(id) == cache.look(plain));
}

TEST_CASE("cache/sequence: the path of a tree of drafts", "[unit]")
{
    guarded_cache cache(small_cache());
    auto& pool = cache.pool();
    const auto id = cache.open(), plain = cache.open();
    for (const auto each : {id, plain}) cache.feed(each, 1, 0, 60);
    // Drafts over two blocks; those on the path are tokens 60, 61, ... of the stream.
    const std::size_t path[] = {0, 3, 4, 7, 15};
    REQUIRE(pool.reserve(id, 16) == status::ok);
    REQUIRE(cache.store(id, 9, 0, 15) == status::ok);
    const auto refused = [&](std::vector<std::size_t> drafts) {
        const auto before = cache.look({id, plain});
        CHECK(pool.commit(id, std::span<const std::size_t>(drafts)) == status::bad_argument);
        CHECK(cache.look({id, plain}) == before);
    };
    refused({0, 3, 15});  // not stored
    refused({0, 16});
    refused({3, 3});
    refused({3, 2});
    refused({SIZE_MAX});
    REQUIRE(cache.store(id, 9, 15, 1, 15) == status::ok);
    for (std::size_t i = 0; i < 5; ++i) REQUIRE(cache.store(id, 1, 60 + i, 1, path[i]) == status::ok);
    REQUIRE(pool.commit(id, path) == status::ok);
    cache.feed(plain, 1, 60, 5);
    CHECK(cache.look(id) == cache.look(plain));
    REQUIRE(pool.reserve(id, 3) == status::ok);
    REQUIRE(pool.commit(id, std::span<const std::size_t>()) == status::ok);
    CHECK(cache.look(id) == cache.look(plain));
    CHECK(pool.commit({}, path) == status::stale_handle);
}

TEST_CASE("cache/sequence: chunks of a prompt do not matter", "[unit]")
{
    cache_setup x = small_cache();
    x.config.recent_tokens = 20;
    guarded_cache one(x);
    const auto a = one.open();
    one.feed(a, 1, 0, 237, 1, true);
    const auto wanted = one.look(a);
    for (const std::size_t step : {2u, 31u, 32u, 33u, 64u, 100u, 237u}) {
        x.config.most_step = step;
        guarded_cache other(x, step % 64);
        const auto b = other.open();
        other.feed(b, 1, 0, 237, step, true);
        CHECK(other.records(b) == one.records(a));
        CHECK(other.look(b) == wanted);
        CHECK(other.intact());
    }
    // A step that fills the open tile and more attends first and is sealed later: the same records.
    guarded_cache late(x);
    const auto c = late.open();
    late.feed(c, 1, 0, 200, 60);
    static_cast<void>(late.attend(c, 0, 60));
    late.seal(c);
    late.feed(c, 1, 200, 37);
    late.seal(c);
    CHECK(late.look(c) == wanted);
}

TEST_CASE("cache/sequence: what a configuration plans is enough", "[unit]")
{
    for (const std::size_t sink : {0u, 20u, 32u})
        for (const std::size_t recent : {0u, 1u, 31u, 50u})
            for (const std::size_t step : {1u, 2u, 31u, 33u, 70u}) {
                cache_setup x = small_cache();
                x.layers = x.heads = 1;
                x.rules.clear();
                x.config.sink_tokens = sink;
                x.config.recent_tokens = recent;
                x.config.most_step = step;
                x.config.sequences = 1;
                x.config.most_tokens = 300;
                guarded_cache cache(x);
                const auto id = cache.open();
                cache.feed(id, 1, 0, 300, step, true);
                CHECK(cache.pool().tokens(id) == 300);
                CHECK(cache.pool().reserve(id, 1) == status::sequence_full);  // most_tokens
                CHECK(cache.numbers(id).sealed_tokens == (300 - cache.config().sink_tokens - recent) / 32 * 32);
                // And no more than is needed.
                CHECK(cache.pool().statistics().records.free == 0);
            }
}

TEST_CASE("cache/sequence: items of the queue in any order and portions give what seal() gives", "[unit]")
{
    guarded_cache cache(small_cache());
    auto& pool = cache.pool();
    const auto inline_id = cache.open();
    cache.feed(inline_id, 1, 0, 230);
    CHECK(cache.seal(inline_id).sealed == 6);
    const auto wanted = cache.records(inline_id);
    REQUIRE(pool.close(inline_id) == status::ok);
    for (const std::size_t portion : {1u, 3u, 5u, 100u}) {
        const auto id = cache.open();
        cache.feed(id, 1, 0, 230);
        REQUIRE(*kvarn::begin_seal(pool, id, 2) == 2);
        REQUIRE(*kvarn::begin_seal(pool, id) == 4);
        CHECK(kvarn::seal_items(pool) == 24);
        CHECK(*kvarn::begin_seal(pool, id) == 0);
        CHECK(cache.numbers(id).sealed_tokens == 0);
        const auto report = run_queue(cache, portion, portion);
        CHECK(report.sealed == 6);
        CHECK(report.dropped == 0);
        CHECK(cache.records(id) == wanted);
        REQUIRE(pool.close(id) == status::ok);
    }
    // A few items in each step, while the sequence goes on.
    const auto id = cache.open();
    std::size_t done = 0;
    for (std::size_t step = 0; step < 23; ++step) {
        cache.feed(id, 1, 10 * step, 10);
        static_cast<void>(*kvarn::begin_seal(pool, id));
        const std::size_t items = std::min<std::size_t>(kvarn::seal_items(pool), 2);
        for (std::size_t i = 0; i < items; ++i) support::expect_ok(kvarn::seal_item(pool, i, cache.scratch()));
        done += kvarn::finish_seal(pool, items).sealed;
        cache.poison();
    }
    done += run_queue(cache, 1, 1).sealed;
    CHECK(done == 6);
    CHECK(cache.records(id) == wanted);
}

TEST_CASE("cache/sequence: sequences change while their tiles are in the queue", "[unit]")
{
    guarded_cache cache(small_cache());
    auto& pool = cache.pool();
    const auto id = cache.open();
    cache.feed(id, 1, 0, 130);
    REQUIRE(*kvarn::begin_seal(pool, id) == 3);
    CHECK(pool.statistics().records.used == 3);
    SECTION("truncated, and filled again with other tokens")
    {
        REQUIRE(pool.truncate(id, 70) == status::ok);
        cache.feed(id, 2, 70, 60);
        cache.poison();
        const auto report = run_queue(cache, 1, 2);
        CHECK(report.sealed == 1);
        CHECK(report.dropped == 2);
        cache.seal(id);
        // What it would be without a queue.
        guarded_cache other(small_cache());
        const auto same = other.open();
        other.feed(same, 1, 0, 70);
        other.feed(same, 2, 70, 60);
        other.seal(same);
        CHECK(cache.records(id) == other.records(same));
        CHECK(cache.look(id) == other.look(same));
    }
    SECTION("truncated to where it was: the same tile comes again in another block")
    {
        REQUIRE(pool.truncate(id, 64) == status::ok);
        cache.feed(id, 1, 64, 66);
        const auto report = run_queue(cache, 2, 1);
        CHECK(report.sealed == 1);
        CHECK(report.dropped == 2);
        CHECK(cache.seal(id).sealed == 2);
    }
    SECTION("closed, and its slot used again")
    {
        REQUIRE(pool.close(id) == status::ok);
        const auto other = cache.open();
        REQUIRE(other.slot == id.slot);
        cache.feed(other, 3, 0, 130);
        cache.poison();
        const auto before = cache.look({other});
        const auto report = run_queue(cache, 3, 4);
        CHECK(report.dropped == 3);
        CHECK(cache.look(other) == before.sequences[0]);
        CHECK(pool.statistics().records.used == 0);
    }
    SECTION("forked: both have the records, which are made once")
    {
        const auto other = cache.fork(id);
        CHECK(kvarn::ready_tiles(pool, other) == 0);  // they are on their way
        CHECK(run_queue(cache, 4, 1).sealed == 3);
        CHECK(kvarn::ready_tiles(pool, other) == 3);
        CHECK(cache.seal(other).sealed == 0);
        CHECK(cache.numbers(other).sealed_tokens == 96);
        CHECK(pool.statistics().records.used == 3);
        CHECK(pool.statistics().records.shared == 3);
        CHECK(pool.statistics().tiles_sealed == 3);
        CHECK(cache.look(other) == cache.look(id));
    }
    SECTION("forked, and the first is gone")
    {
        const auto other = cache.fork(id);
        REQUIRE(pool.close(id) == status::ok);
        CHECK(run_queue(cache, 4, 1).dropped == 3);
        CHECK(pool.statistics().records.used == 0);
        CHECK(cache.seal(other).sealed == 3);
    }
    SECTION("erased in the middle")
    {
        REQUIRE(pool.erase(id, 70, 80) == status::ok);
        const auto report = run_queue(cache, 5, 1);
        CHECK(report.sealed == 2);
        CHECK(report.dropped == 1);
        for (std::size_t layer = 0; layer < 2; ++layer) check_attention(cache, id, layer, 2);
    }
    static_cast<void>(pool.close(id));
    CHECK(kvarn::seal_items(pool) == 0);
}

TEST_CASE("cache/sequence: forks share records, whoever makes them", "[unit]")
{
    cache_setup x = small_cache();
    x.config.record_blocks = 4;
    guarded_cache cache(x);
    auto& pool = cache.pool();
    const auto a = cache.open();
    cache.feed(a, 1, 0, 140);
    const auto b = cache.fork(a), c = cache.fork(a);
    CHECK(*kvarn::begin_seal(pool, b, 1) == 1);
    CHECK(run_queue(cache, 1, 100).sealed == 1);
    CHECK(cache.seal(a).sealed == 2);   // and one from b
    CHECK(cache.seal(b).sealed == 0);
    CHECK(cache.seal(c).sealed == 0);
    CHECK(pool.statistics().records.used == 3);
    CHECK(pool.statistics().records.shared == 3);
    CHECK(pool.statistics().tiles_sealed == 3);
    CHECK(cache.look(a) == cache.look(b));
    CHECK(cache.look(a) == cache.look(c));
    // The fourth record block is taken by one; for what others have made, none is needed.
    cache.feed(a, 1, 140, 20);
    const auto d = cache.fork(a);
    CHECK(cache.seal(a).sealed == 1);
    CHECK(pool.statistics().records.free == 0);
    CHECK(cache.seal(d).sealed == 0);
    CHECK(cache.numbers(d).sealed_tokens == 128);
    // A tile whose record is there goes, one that needs a block stays: that is no failure.
    REQUIRE(pool.close(c) == status::ok);
    REQUIRE(pool.close(d) == status::ok);
    cache.feed(b, 2, 0, 52);
    check_refused(cache, {a, b}, status::no_room, [&] { return error_of(kvarn::seal(pool, b, cache.scratch())); });
    for (const auto id : {a, b}) REQUIRE(pool.close(id) == status::ok);
    CHECK(pool.statistics().records.used + pool.statistics().exact.used == 0);
}

TEST_CASE("cache/sequence: sealing that has found a record does not say that there is no room", "[unit]")
{
    cache_setup x = small_cache();
    x.config.record_blocks = 1;
    guarded_cache cache(x);
    auto& pool = cache.pool();
    for (const bool queue : {false, true}) {
        const auto a = cache.open();
        cache.feed(a, 1, 0, 96);
        const auto b = cache.fork(a);
        REQUIRE(cache.seal(a).sealed == 1);
        const status said = queue ? error_of(kvarn::begin_seal(pool, b)) : error_of(kvarn::seal(pool, b, cache.scratch()));
        CHECK(said == status::ok);
        CHECK(cache.numbers(b).sealed_tokens == 32);
        check_refused(cache, {a, b}, status::no_room, [&] { return error_of(kvarn::begin_seal(pool, b)); });
        for (const auto id : {a, b}) REQUIRE(pool.close(id) == status::ok);
    }
}

TEST_CASE("cache/sequence: the queue takes the tiles of all sequences", "[unit]")
{
    cache_setup x = small_cache();
    x.config.record_blocks = 4;
    guarded_cache cache(x);
    auto& pool = cache.pool();
    CHECK(*kvarn::begin_seal_all(pool) == 0);
    const auto a = cache.open(), closed = cache.open(), b = cache.open(), short_one = cache.open();
    cache.feed(a, 1, 0, 140);  // 3 tiles behind the sink
    cache.feed(b, 2, 0, 100);  // 2
    cache.feed(short_one, 3, 0, 40);
    REQUIRE(pool.close(closed) == status::ok);
    CHECK(*kvarn::begin_seal_all(pool, 0) == 0);
    CHECK(*kvarn::begin_seal_all(pool, 3) == 3);  // by turns: a, b, a
    CHECK(kvarn::ready_tiles(pool, a) == 1);
    CHECK(kvarn::ready_tiles(pool, b) == 1);
    CHECK(kvarn::seal_items(pool) == 3 * 4);
    CHECK(*kvarn::begin_seal_all(pool) == 1);  // the last record block
    CHECK(kvarn::ready_tiles(pool, a) == 0);
    check_refused(cache, {a, b, short_one}, status::no_room, [&] { return error_of(kvarn::begin_seal_all(pool)); });
    CHECK(run_queue(cache, 3, 5).sealed == 4);
    CHECK(cache.numbers(a).sealed_tokens == 96);
    CHECK(cache.numbers(b).sealed_tokens == 32);
    for (const auto id : {a, b}) REQUIRE(pool.close(id) == status::ok);

    // Where the first finds no block, another may find a record: that is no failure.
    const auto maker = cache.open(), first = cache.open();
    cache.feed(first, 4, 0, 64);
    cache.feed(maker, 5, 0, 160);
    const auto fork = cache.fork(maker);
    REQUIRE(cache.seal(maker).sealed == 4);
    REQUIRE(first.slot < fork.slot);
    CHECK(*kvarn::begin_seal_all(pool) == 0);
    CHECK(cache.numbers(fork).sealed_tokens == 128);
    CHECK(kvarn::ready_tiles(pool, first) == 1);
    check_refused(cache, {first, fork}, status::no_room, [&] { return error_of(kvarn::begin_seal_all(pool)); });
}

TEST_CASE("cache/sequence: tiles that a record cannot hold stay exact, are counted and named", "[unit]")
{
    cache_setup x = small_cache();
    x.config.exact = kvarn::exact_type::f32;
    guarded_cache cache(x);
    auto& pool = cache.pool();
    const auto id = cache.open();
    const auto spoil = [&](std::size_t draft, std::size_t layer, std::size_t head, bool key, float value) {
        auto k = cache.values(true, 1, draft, 1, layer), v = cache.values(false, 1, draft, 1, layer);
        for (std::size_t c = 0; c < 32; ++c) (key ? k : v)[head * 32 + c] = value;
        REQUIRE(kvarn::store(pool, id, layer, kvarn::token_major<const float>(k.data(), 1, 2, 32), kvarn::token_major<const float>(v.data(), 1, 2, 32), draft) ==
                status::ok);
    };
    REQUIRE(pool.reserve(id, 224) == status::ok);
    REQUIRE(cache.store(id, 1, 0, 224) == status::ok);
    const float nan = std::numeric_limits<float>::quiet_NaN(), infinite = std::numeric_limits<float>::infinity();
    spoil(70, 1, 0, true, nan);        // the second tile behind the sink: positions 64 to 95
    spoil(71, 0, 1, false, 1e30f);     // an item before that overflows: it is named
    spoil(130, 1, 1, false, infinite);  // positions 128 to 159
    spoil(10, 0, 0, true, nan);        // the sink: nobody seals it
    REQUIRE(pool.commit(id, 224) == status::ok);
    const auto exact = bits_of(cache.read(id, 1, 0, 64, 96));
    SECTION("in the queue")
    {
        REQUIRE(*kvarn::begin_seal(pool, id) == 6);
        for (std::size_t i = 24; i-- != 0;) REQUIRE(kvarn::seal_item(pool, i, cache.scratch()) == status::ok);
        const auto first = kvarn::finish_seal(pool, 4);
        CHECK(first.sealed == 1);
        CHECK(first.kept_exact == 0);
        CHECK(first.why == status::ok);
        const auto report = kvarn::finish_seal(pool, all);
        CHECK(report.sealed == 3);
        CHECK(report.kept_exact == 2);
        CHECK(report.dropped == 0);
        CHECK(report.sequence == id);
        CHECK(report.position == 64);
        CHECK(report.layer == 0);
        CHECK(report.head == 1);
        CHECK(report.why == status::scale_overflow);
    }
    SECTION("at once")
    {
        const auto report = cache.seal(id);
        CHECK(report.sealed == 4);
        CHECK(report.kept_exact == 2);
        CHECK(report.position == 64);
        CHECK(report.layer == 0);
        CHECK(report.head == 1);
        CHECK(report.why == status::scale_overflow);
    }
    auto n = pool.statistics();
    CHECK(n.tiles_kept_overflowed == 1);
    CHECK(n.tiles_kept_not_finite == 1);
    CHECK(n.tiles_sealed == 4);
    CHECK(n.records.used == 4);
    CHECK(cache.numbers(id).kept_tiles == 2);
    CHECK(cache.numbers(id).sealed_tokens == 128);
    CHECK(bits_of(cache.read(id, 1, 0, 64, 96)) == exact);
    // They are not tried again, by forks neither.
    CHECK(kvarn::ready_tiles(pool, id) == 0);
    const auto other = cache.fork(id);
    CHECK(cache.seal(other).kept_exact == 0);
    CHECK(pool.statistics().tiles_kept_not_finite == 1);
    REQUIRE(pool.close(other) == status::ok);
    // Everything goes on; the block is used again as any other.
    cache.feed(id, 2, 224, 64);
    CHECK(cache.seal(id).sealed == 2);
    REQUIRE(pool.truncate(id, 65) == status::ok);
    cache.feed(id, 3, 65, 31);
    CHECK(kvarn::ready_tiles(pool, id) == 1);
    CHECK(cache.seal(id).sealed == 1);
    CHECK(cache.numbers(id).kept_tiles == 0);
    REQUIRE(pool.close(id) == status::ok);
    CHECK(pool.statistics().records.used + pool.statistics().exact.used == 0);
}

TEST_CASE("cache/sequence: formats of all kinds, by layer and head", "[unit]")
{
    const auto with = [](kvarn::format_spec spec, std::vector<kvarn::bit_rule> rules = {}) {
        cache_setup x = small_cache();
        spec.group = 32;
        x.base = *kvarn::make_format(spec);
        x.rules = std::move(rules);
        return x;
    };
    std::vector<cache_setup> setups{
        with({.head_dim_k = 32, .head_dim_v = 32, .key_bits = 2, .value_bits = 2},
             {{.first_head = 1, .key_bits = 8, .value_bits = 6}, {.first_layer = 1, .key_rotation = kvarn::rotation::none}}),
        with({.head_dim_k = 64, .head_dim_v = 64, .key_bits = 4, .value_bits = 4, .key_rotation = kvarn::rotation::none}),  // _ko
        with({.head_dim_k = 64, .head_dim_v = 64, .key_bits = 4, .value_bits = 4, .value_rotation = kvarn::rotation::none}),
        with({.head_dim_k = 64, .head_dim_v = 32, .key_bits = 3, .value_bits = 5}),
        with({.head_dim_k = 64, .head_dim_v = 64, .key_bits = 4, .value_bits = 0}),
        with({.head_dim_k = 64, .head_dim_v = 64, .key_bits = 4, .value_bits = 0, .exact_channels = 8}),
        with({.head_dim_k = 36, .head_dim_v = 44, .key_bits = 6, .value_bits = 2, .key_rotation = kvarn::rotation::none,
              .value_rotation = kvarn::rotation::none, .exact_channels = 4})};
    setups.push_back(setups[0]);
    setups.back().config.encode = {};
    for (const auto& setup : setups)
        for (const auto type : {kvarn::exact_type::f32, kvarn::exact_type::f16, kvarn::exact_type::bf16}) {
            CAPTURE(support::describe(setup.base), static_cast<int>(type));
            cache_setup x = setup;
            x.config.exact = type;
            guarded_cache cache(x, 3);
            auto& pool = cache.pool();
            for (std::size_t layer = 0; layer < 2; ++layer)
                for (std::size_t head = 0; head < 2; ++head)
                    CHECK(pool.format_of(layer, head) == cache.config().policy.format_of(static_cast<int>(layer), static_cast<int>(head)));
            const auto id = cache.open();
            cache.feed(id, 1, 0, 150, 40, true);
            CHECK(cache.numbers(id).sealed_tokens == 96);
            REQUIRE(pool.truncate(id, 120) == status::ok);
            cache.feed(id, 2, 120, 20);
            REQUIRE(pool.erase(id, 50, 90) == status::ok);
            cache.poison();
            for (std::size_t layer = 0; layer < 2; ++layer) check_attention(cache, id, layer, 4);
            CHECK(cache.intact());
            const auto other = cache.fork(id);
            cache.feed(other, 3, 0, 40, 40, true);
            for (std::size_t layer = 0; layer < 2; ++layer) check_attention(cache, other, layer, 4);
            // A record is what quantize_kv makes of the tile as it was stored, which here is exact in float.
            if (type != kvarn::exact_type::f32) continue;
            const kvarn::format f = pool.format_of(1, 1);
            const auto k = cache.values(true, 1, 32, 32, 1), v = cache.values(false, 1, 32, 32, 1);
            const auto dk = static_cast<std::size_t>(f.key_channels()), dv = static_cast<std::size_t>(f.head_dim_v());
            std::vector<std::uint8_t> record(kvarn::record_bytes(f));
            const auto values = dv != 0 ? kvarn::token_major<const float>(v.data(), 32, 2, dv).head(1) : kvarn::kv_view<const float>{};
            REQUIRE(kvarn::quantize_kv(f, kvarn::token_major<const float>(k.data(), 32, 2, dk).head(1), values,
                                       kvarn::tile_major_records(f, support::as_bytes(record.data()), record.size(), 1, 1), cache.scratch(),
                                       x.config.encode) == status::ok);
            CHECK(cache.record(id, 1, 1, 1) == record);
        }
}

TEST_CASE("cache/sequence: what is stored in the basis of the records", "[unit]")
{
    cache_setup x = small_cache();
    x.config.exact = kvarn::exact_type::f32;
    x.config.most_tokens = 200;
    cache_setup rotated = x;
    rotated.config.key_basis = rotated.config.value_basis = kvarn::basis::rotated;
    guarded_cache plain(x), other(rotated);
    const auto a = plain.open(), b = other.open();
    plain.feed(a, 1, 0, 130);
    REQUIRE(other.pool().reserve(b, 130) == status::ok);
    for (std::size_t layer = 0; layer < 2; ++layer) {
        auto k = plain.values(true, 1, 0, 130, layer), v = plain.values(false, 1, 0, 130, layer);
        REQUIRE(kvarn::rotate(kvarn::token_major(k.data(), 130, 2, 32)) == status::ok);
        REQUIRE(kvarn::rotate(kvarn::token_major(v.data(), 130, 2, 32)) == status::ok);
        REQUIRE(kvarn::store(other.pool(), b, layer, kvarn::token_major<const float>(k.data(), 130, 2, 32), kvarn::token_major<const float>(v.data(), 130, 2, 32)) ==
                status::ok);
    }
    REQUIRE(other.pool().commit(b, 130) == status::ok);
    plain.seal(a);
    other.seal(b);
    CHECK(plain.numbers(a).sealed_tokens == 96);
    // Other bases, once there are tokens: only where nothing is in the basis of the records.
    for (guarded_cache* const cache : {&plain, &other}) {
        guarded_cache fresh(cache == &plain ? x : rotated);
        kvarn::format_spec spec = fresh.pool().format_of(0, 0).spec();
        spec.key_rotation = kvarn::rotation::none;
        const kvarn::format unrotated = *kvarn::make_format(spec);
        const auto id = fresh.open();
        CHECK(fresh.pool().set_format(0, 0, unrotated) == status::ok);
        fresh.feed(id, 1, 0, 3);
        CHECK(fresh.pool().set_format(0, 0, unrotated) == status::ok);
        CHECK(fresh.pool().set_format(0, 1, unrotated) == (cache == &plain ? status::ok : status::bad_argument));
        CHECK(fresh.pool().format_of(0, 1).keys_rotated() == (cache != &plain));
    }
    CHECK(other.numbers(b).sealed_tokens == 96);
    for (std::size_t layer = 0; layer < 2; ++layer) {
        const auto one = plain.attend(a, layer, 3), two = other.attend(b, layer, 3);
        double error = 0, norm = 0;
        for (std::size_t i = 0; i < one.size(); ++i) {
            error += std::pow(static_cast<double>(one[i] - two[i]), 2);
            norm += std::pow(static_cast<double>(one[i]), 2);
        }
        CHECK(std::sqrt(error / norm) < 2e-3);
        // Read in the basis that they were stored in.
        auto read = plain.read(a, layer, 1);
        const auto there = other.read(b, layer, 1);
        REQUIRE(kvarn::rotate(kvarn::token_major(read.data(), read.size() / 32, 1, 32)) == status::ok);
        double difference = 0;
        for (std::size_t i = 0; i < read.size(); ++i) difference = std::max(difference, std::fabs(static_cast<double>(read[i] - there[i])));
        CHECK(difference < 2e-3);
    }
}

TEST_CASE("cache/sequence: memory of just the planned size at any address", "[unit]")
{
    cache_setup x = small_cache();
    x.config.most_tokens = 128;
    std::vector<sequence_view> seen;
    for (const std::size_t misalignment : {0u, 1u, 7u, 31u, 63u}) {
        guarded_cache cache(x, misalignment);
        // All blocks of both kinds are used.
        std::vector<sequence_id> ids;
        for (std::size_t i = 0; i < 4; ++i) {
            ids.push_back(cache.open());
            cache.feed(ids[i], i, 0, 128, 32, true);
        }
        CHECK(cache.pool().statistics().records.free == 0);
        std::size_t extra = 0;
        while (cache.pool().reserve(ids[0], 0) == status::ok && cache.pool().statistics().exact.free != 0 && extra++ < 10) {
            REQUIRE(cache.pool().truncate(ids[0], 96) == status::ok);
            if (cache.pool().reserve(ids[0], 32) != status::ok) break;
            REQUIRE(cache.store(ids[0], 9, 0, 32) == status::ok);
        }
        CHECK(cache.intact());
        seen.push_back(cache.look(ids[1]));
        CHECK(seen.back() == seen.front());
    }
    guarded_cache cache(x);
    const auto plan = kvarn::plan_cache(cache.config());
    REQUIRE(plan.ok());
    CHECK(plan->bytes() == cache.memory().size());
    CHECK(error_of(kvarn::make_pool(cache.config(), cache.memory().first(plan->bytes() - 1))) == status::buffer_too_small);
    CHECK(error_of(kvarn::make_pool(cache.config(), {})) == status::null_pointer);
}

TEST_CASE("cache/sequence: configurations are checked", "[unit]")
{
    const auto said = [](auto&& change) {
        cache_setup x = small_cache();
        change(x.config);
        return kvarn::plan_cache(x.complete()).error;
    };
    CHECK(said([](auto&) {}) == status::ok);
    CHECK(kvarn::plan_cache({}).error == status::bad_argument);
    CHECK(said([](auto& c) { c.sequences = 0; }) == status::bad_argument);
    CHECK(said([](auto& c) { c.most_tokens = 0; }) == status::bad_argument);
    CHECK(said([](auto& c) { c.most_tokens = std::size_t{1} << 31; }) == status::bad_argument);
    CHECK(said([](auto& c) { c.sequences = std::size_t{1} << 31; }) == status::bad_argument);
    CHECK(said([](auto& c) { c.record_blocks = std::size_t{1} << 31; }) == status::bad_argument);
    CHECK(said([](auto& c) { c.exact_blocks = SIZE_MAX; }) == status::bad_argument);
    CHECK(said([](auto& c) { c.most_spans = SIZE_MAX; }) == status::bad_argument);
    CHECK(said([](auto& c) { c.encode.iterations = 65; }) == status::bad_argument);
    CHECK(said([](auto& c) { c.exact = static_cast<kvarn::exact_type>(3); }) == status::bad_argument);
    CHECK(said([](auto& c) { c.key_basis = static_cast<kvarn::basis>(2); }) == status::bad_argument);
    CHECK(said([](auto& c) { c.value_basis = static_cast<kvarn::basis>(2); }) == status::bad_argument);
    // Everything exact: a sink or recent tokens beyond all that there can be.
    for (const bool sink : {false, true})
        for (const std::size_t n : {std::size_t{512}, std::size_t{1} << 40, SIZE_MAX}) {
            cache_setup x = small_cache();
            (sink ? x.config.sink_tokens : x.config.recent_tokens) = n;
            x.config.sequences = 1;
            guarded_cache cache(x);
            const auto id = cache.open();
            cache.feed(id, 1, 0, 512, 512);
            CHECK(kvarn::ready_tiles(cache.pool(), id) == 0);
            CHECK(cache.seal(id).sealed == 0);
        }
}

TEST_CASE("cache/sequence: a batch has room, or nothing has changed", "[unit]")
{
    cache_setup x = small_cache();
    x.config.exact_blocks = 8;
    x.config.most_tokens = 200;
    guarded_cache cache(x);
    auto& pool = cache.pool();
    const auto a = cache.open(), b = cache.open(7);
    cache.feed(a, 1, 0, 40);  // sink and 8 tokens
    cache.feed(b, 2, 0, 32);
    const auto c = cache.fork(a);  // both of its blocks
    CHECK(pool.statistics().exact.free == 5);
    std::size_t failed = 77;
    const auto reserve = [&](std::vector<kvarn::sequence_room> batch) {
        failed = 77;
        return pool.reserve(batch, &failed);
    };
    const auto refused = [&](status wanted, std::size_t which, const std::vector<kvarn::sequence_room>& batch) {
        const auto before = pool.statistics();
        check_refused(cache, {a, b, c}, wanted, [&] { return reserve(batch); });
        CHECK(failed == which);
        const auto after = pool.statistics();
        CHECK(after.exact.used == before.exact.used);
        CHECK(after.exact.shared == before.exact.shared);  // no tail has been copied
    };
    // One of the two has to copy the tail, whose 8 tokens leave 24 places: 1 + 1 + 3 blocks, but not 1 + 1 + 4.
    refused(status::no_room, 2, {{a, 24}, {c, 25}, {b, 97}});
    refused(status::no_room, 1, {{b, 97}, {a, 25 + 32}, {c, 1}});
    refused(status::no_room, 0, {{b, 161}, {a, 1}});
    refused(status::sequence_full, 1, {{b, 1}, {a, 161}, {c, 1}});
    refused(status::stale_handle, 2, {{a, 1}, {b, 1}, {{3, 9}, 1}});
    refused(status::bad_argument, 2, {{a, 1}, {b, 1}, {a, 1}});
    refused(status::bad_argument, 1, {{a, 0}, {a, 0}});
    CHECK(pool.reserve(std::vector<kvarn::sequence_room>{{a, 1}, {a, 1}}) == status::bad_argument);  // nobody asks which
    CHECK(reserve({}) == status::ok);
    CHECK(reserve({{a, 0}, {b, 0}}) == status::ok);
    CHECK(pool.statistics().exact.shared == 2);
    REQUIRE(reserve({{a, 24}, {c, 25}, {b, 96}}) == status::ok);
    CHECK(failed == 77);
    CHECK(pool.statistics().exact.free == 0);
    CHECK(pool.statistics().exact.shared == 1);  // the sink
    CHECK(pool.drafts(a) == 24);
    CHECK(pool.drafts(b) == 96);
    CHECK(pool.drafts(c) == 25);
    // Each goes on for itself.
    REQUIRE(cache.store(a, 1, 40, 24) == status::ok);
    REQUIRE(cache.store(c, 3, 40, 25) == status::ok);
    REQUIRE(cache.store(b, 2, 32, 96) == status::ok);
    for (const auto id : {a, b, c}) REQUIRE(pool.commit(id, pool.drafts(id)) == status::ok);
    for (std::size_t layer = 0; layer < 2; ++layer) {
        CHECK(bits_of(cache.read(a, layer, 1)) == exact_values(small_cache(), 1, 64, layer, 1));
        CHECK(bits_of(cache.read(c, layer, 1, 0, 40)) == exact_values(small_cache(), 1, 40, layer, 1));
        CHECK(bits_of(cache.read(b, layer, 0)) == exact_values(small_cache(), 2, 128, layer, 0));
        check_attention(cache, c, layer, 3);
    }
    for (const auto id : {a, b, c}) REQUIRE(pool.close(id) == status::ok);
    CHECK(pool.statistics().exact.used == 0);
    CHECK(cache.intact());
}

TEST_CASE("cache/sequence: spans and tokens run out", "[unit]")
{
    cache_setup x = small_cache();
    x.config.most_spans = 4;
    x.config.most_tokens = 100;
    guarded_cache cache(x);
    auto& pool = cache.pool();
    const auto id = cache.open();
    cache.feed(id, 1, 0, 60, all, true);
    REQUIRE(pool.erase(id, 5, 6) == status::ok);
    CHECK(cache.numbers(id).spans == 3);
    REQUIRE(pool.reserve(id, 36) == status::ok);  // 4 places in the last block, one more span
    REQUIRE(cache.store(id, 1, 60, 36) == status::ok);
    REQUIRE(pool.commit(id, 36) == status::ok);
    CHECK(cache.numbers(id).spans == 4);
    check_refused(cache, {id}, status::sequence_full, [&] { return pool.reserve(id, 6); });  // most_tokens
    check_refused(cache, {id}, status::sequence_full, [&] { return pool.erase(id, 70, 71); });
    CHECK(pool.erase(id, 70, 96) == status::ok);  // the end of one
    // Behind a hole a span of its own begins.
    check_refused(cache, {id}, status::sequence_full, [&] { return pool.reserve(id, 65); });
    CHECK(pool.next_position(id) == 96);
    REQUIRE(pool.truncate(id, 70) == status::ok);
    CHECK(pool.reserve(id, 20) == status::ok);
    REQUIRE(pool.close(id) == status::ok);
    CHECK(pool.statistics().records.used + pool.statistics().exact.used == 0);
    CHECK(cache.intact());
}

TEST_CASE("cache/sequence: inputs of any element type and strides", "[unit]")
{
    for (const auto type : {kvarn::exact_type::f32, kvarn::exact_type::f16, kvarn::exact_type::bf16})
        for (const auto kind : support::all_element_kinds)
            for (const auto where : support::all_storages) {
                cache_setup x = small_cache();
                x.config.exact = type;
                x.config.most_tokens = 64;
                guarded_cache cache(x);
                auto& pool = cache.pool();
                const auto id = cache.open();
                REQUIRE(pool.reserve(id, 40) == status::ok);
                const auto k = cache.values(true, 1, 0, 40, 1), v = cache.values(false, 1, 0, 40, 1);
                const support::strided_array keys(kind, where, 40, 2, 32, k), vals(kind, where, 40, 2, 32, v);
                REQUIRE(kvarn::store(pool, id, 1, keys.view<true>(), vals.view<true>()) == status::ok);
                CHECK(keys.intact());
                // Rounded to the exact type what was in the array.
                const auto rounded = [&](float f) {
                    return type == kvarn::exact_type::f32   ? f
                           : type == kvarn::exact_type::f16 ? kvarn::to_float(kvarn::to_half(f))
                                                            : kvarn::to_float(kvarn::to_bfloat16(f));
                };
                const auto dense = keys.dense();
                const support::strided_array out(kind, where, 40, 1, 32);
                REQUIRE(kvarn::read(pool, id, 1, 1, 0, 40, out.view<false>(), {}, cache.scratch()) == status::ok);
                CHECK(out.intact());
                std::vector<float> wanted(40 * 32), read(40 * 32);
                for (std::size_t t = 0; t < 40; ++t)
                    for (std::size_t c = 0; c < 32; ++c) wanted[t * 32 + c] = rounded(dense[(t * 2 + 1) * 32 + c]);
                REQUIRE(kvarn::read(pool, id, 1, 1, 0, 40, kvarn::token_major(read.data(), 40, 1, 32), {}, cache.scratch()) == status::ok);
                CHECK(bits_of(read) == bits_of(wanted));
            }
}
