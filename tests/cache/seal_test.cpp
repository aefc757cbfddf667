// SPDX-License-Identifier: Apache-2.0
// The queue of sealing: items that were not done or failed, items done twice and in any order, and tiles that leave it.

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "../catch.hpp"
#include "../support/seeded_cache.hpp"

#include <kvarn/cache/seal.hpp>

namespace {

using kvarn::sequence_id;
using kvarn::status;
using support::expect_ok;
using support::test_cache;

/// 3 x 30 items a tile: more than one word of bits.
kvarn::cache_config queue_config()
{
    kvarn::cache_config c;
    c.policy = *kvarn::make_policy(*kvarn::parse_format("k2v2_g32", 32), 30, 3);
    c.sink_tokens = 0;
    c.sequences = 3;
    c.most_tokens = 256;
    c.most_step = 128;
    c.encode.encoder = kvarn::encoder::paper;
    c.encode.iterations = 1;
    return c;
}
constexpr std::size_t each = 90;

}  // namespace

TEST_CASE("cache/seal: a tile with an item that was not done stays exact and in the queue", "[unit]")
{
    test_cache cache(queue_config());
    const sequence_id id = cache.open();
    cache.append(id, 1, 100);
    const std::vector<float> exact = cache.attend(id, 1, 1);
    CHECK(*kvarn::begin_seal(cache.pool, id) == 3);
    CHECK(kvarn::seal_items(cache.pool) == 3 * each);

    // Scratch that is too small, and an item that nobody does, in the second word.
    for (std::size_t i = 0; i < 2 * each; ++i)
        if (i != 80) CHECK(kvarn::seal_item(cache.pool, i, i == 70 ? std::span(cache.scratch).first(10) : std::span(cache.scratch)) ==
                           (i == 70 ? status::buffer_too_small : status::ok));
    const kvarn::seal_report report = kvarn::finish_seal(cache.pool, 2 * each);
    CHECK(report.sealed == 0);
    CHECK(report.unfinished == 2);
    CHECK(kvarn::seal_items(cache.pool) == 3 * each);
    CHECK(cache.attend(id, 1, 1) == exact);

    // Backwards, some of them twice, in portions that end inside of a tile.
    for (std::size_t i = each + 10; i-- != 0;) expect_ok(kvarn::seal_item(cache.pool, i, cache.scratch));
    for (std::size_t i = 0; i < 20; ++i) expect_ok(kvarn::seal_item(cache.pool, i, cache.scratch));
    CHECK(kvarn::finish_seal(cache.pool, each + 10).sealed == 1);
    CHECK(kvarn::seal_items(cache.pool) == 2 * each - 10);
    for (std::size_t i = 0; i < 2 * each - 10; ++i) expect_ok(kvarn::seal_item(cache.pool, i, cache.scratch));
    CHECK(kvarn::seal_item(cache.pool, 2 * each - 10, cache.scratch) == status::bad_argument);
    const kvarn::seal_report rest = kvarn::finish_seal(cache.pool, SIZE_MAX);
    CHECK(rest.sealed == 2);
    CHECK(rest.unfinished == 0);

    test_cache plain(queue_config());
    const sequence_id other = plain.open();
    plain.append(other, 1, 100);
    CHECK(plain.seal(other).sealed == 3);
    CHECK(cache.attend(id, 1, 1) == plain.attend(other, 1, 1));
}

TEST_CASE("cache/seal: tiles leave the queue, and close gives back everything", "[unit]")
{
    test_cache cache(queue_config());
    const sequence_id first = cache.open(), second = cache.open();
    cache.append(first, 1, 100);
    cache.append(second, 2, 70);
    CHECK(*kvarn::begin_seal(cache.pool, first, 1) == 1);
    CHECK(*kvarn::begin_seal(cache.pool, second) == 2);
    CHECK(*kvarn::begin_seal(cache.pool, first) == 2);
    for (std::size_t i = 0; i < 10; ++i) expect_ok(kvarn::seal_item(cache.pool, i, cache.scratch));
    CHECK(kvarn::finish_seal(cache.pool, 10).sealed == 0);

    expect_ok(cache.pool.close(first));
    CHECK(cache.pool.statistics().records.used == 5);
    CHECK(kvarn::cancel_seal(cache.pool, first) == 3);
    CHECK(cache.pool.statistics().records.used == 2);
    CHECK(cache.pool.statistics().exact.used == 3);
    CHECK(kvarn::seal_items(cache.pool) == 2 * each);
    for (std::size_t i = 0; i < 2 * each; ++i) expect_ok(kvarn::seal_item(cache.pool, i, cache.scratch));
    CHECK(kvarn::finish_seal(cache.pool, 2 * each).sealed == 2);
    CHECK(kvarn::cancel_seal(cache.pool, second) == 0);

    // A sequence whose tiles left the queue can be sealed later.
    const sequence_id third = cache.open();
    cache.append(third, 3, 64);
    CHECK(*kvarn::begin_seal(cache.pool, third) == 2);
    CHECK(kvarn::ready_tiles(cache.pool, third) == 0);
    CHECK(kvarn::cancel_seal(cache.pool, third) == 2);
    CHECK(kvarn::ready_tiles(cache.pool, third) == 2);
    CHECK(cache.seal(third).sealed == 2);
    expect_ok(cache.pool.close(second));
    expect_ok(cache.pool.close(third));
    CHECK(cache.pool.statistics().records.used == 0);
    CHECK(cache.pool.statistics().exact.used == 0);
}

TEST_CASE("cache/seal: what closing a sequence gives back", "[unit]")
{
    test_cache cache(queue_config());
    const sequence_id id = cache.open();
    cache.append(id, 1, 100);
    cache.seal(id);
    const auto own = [&](sequence_id of) {
        const auto n = cache.pool.statistics(of);
        expect_ok(n.error);
        return std::vector<std::size_t>{n->own_records, n->own_exact};
    };
    CHECK(own(id) == std::vector<std::size_t>{3, 1});
    expect_ok(cache.pool.erase(id, 40, 50));  // one block, two parts
    CHECK(own(id) == std::vector<std::size_t>{3, 1});
    const auto fork = cache.pool.fork(id);
    expect_ok(fork.error);
    CHECK(own(id) == std::vector<std::size_t>{0, 0});
    cache.append(*fork, 2, 1);
    CHECK(own(*fork) == std::vector<std::size_t>{0, 1});
    CHECK(own(id) == std::vector<std::size_t>{0, 1});
}
