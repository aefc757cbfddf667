// SPDX-License-Identifier: Apache-2.0
// Tokens at other positions: keys turned by the engine, values untouched, other sequences too; what is refused changes nothing.

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "../catch.hpp"
#include "../support/seeded_cache.hpp"

#include <kvarn/cache/shift.hpp>

namespace {

using kvarn::sequence_id;
using kvarn::status;
using support::expect_ok;
using support::test_cache;

kvarn::cache_config shift_config()
{
    kvarn::cache_config c;
    c.policy = *kvarn::make_policy(*kvarn::parse_format("k4v4_g32", 32), 2, 2);
    c.exact = kvarn::exact_type::f32;
    c.sink_tokens = 32;
    c.sequences = 3;
    c.most_tokens = 256;
    c.record_blocks = 16;
    c.exact_blocks = 16;
    return c;
}

/// Turns pairs of channels by an angle for each position, as rotary positions do.
void turn(kvarn::kv_view<float> keys, double positions)
{
    for (std::size_t t = 0; t < keys.tokens; ++t)
        for (std::size_t c = 0; c < keys.channels; c += 2) {
            const double angle = positions * std::pow(0.7, static_cast<double>(c)), cosine = std::cos(angle), sine = std::sin(angle);
            float* const x = keys.at(t, 0) + c;
            const double a = x[0], b = x[1];
            x[0] = static_cast<float>(a * cosine - b * sine);
            x[1] = static_cast<float>(b * cosine + a * sine);
        }
}

struct values {
    std::vector<float> k, v;
    friend bool operator==(const values&, const values&) = default;
};
values read(test_cache& cache, sequence_id id, std::size_t layer, std::size_t head, std::int64_t begin, std::int64_t end)
{
    const std::size_t n = kvarn::count_tokens(cache.pool, id, begin, end);
    values x{std::vector<float>(n * 32), std::vector<float>(n * 32)};
    expect_ok(kvarn::read(cache.pool, id, layer, head, begin, end, kvarn::token_major(x.k.data(), n, 1, 32), kvarn::token_major(x.v.data(), n, 1, 32),
                          cache.scratch));
    return x;
}

double relative_error(const std::vector<float>& x, const std::vector<float>& wanted)
{
    double error = 0, square = 0;
    for (std::size_t i = 0; i < x.size(); ++i) {
        error += (double{x[i]} - wanted[i]) * (double{x[i]} - wanted[i]);
        square += double{wanted[i]} * wanted[i];
    }
    return std::sqrt(error / square);
}

kvarn::result<kvarn::shift_report> shift(test_cache& cache, sequence_id id, std::int64_t begin, std::int64_t end, std::int64_t by)
{
    std::vector<std::byte> scratch(kvarn::shift_scratch_bytes(cache.pool.format_of(0, 0)));
    return kvarn::shift_positions(cache.pool, id, begin, end, by,
                                  [&](std::size_t, std::size_t, kvarn::kv_view<float> keys, std::int64_t) { turn(keys, static_cast<double>(by)); },
                                  scratch);
}

}  // namespace

TEST_CASE("cache/shift: a gap is closed; keys turn, values and other sequences stay", "[unit]")
{
    test_cache cache(shift_config());
    const sequence_id id = cache.open();
    cache.append(id, 1, 200);
    CHECK(cache.seal(id).sealed == 5);
    expect_ok(cache.pool.erase(id, 70, 100));
    const auto other = cache.pool.fork(id);
    expect_ok(other.error);
    const values before = read(cache, id, 1, 0, 100, 200), first = read(cache, id, 1, 0, 0, 70);
    const auto report = shift(cache, id, 100, 200, -30);
    expect_ok(report.error);
    CHECK(report->tokens == 100);
    CHECK(report->sealed_tokens == 92);  // 28 of a cut tile, two whole ones
    CHECK(cache.pool.next_position(id) == 170);
    CHECK(cache.pool.tokens(id) == 170);

    const values after = read(cache, id, 1, 0, 70, 170);
    CHECK(after.v == before.v);
    values turned = before;
    turn(kvarn::token_major(turned.k.data(), 100, 1, 32), -30);
    CHECK(relative_error(after.k, turned.k) < 0.12);
    CHECK(relative_error(after.k, turned.k) > 0.01);
    CHECK(report->relative_error > 0.01);
    CHECK(report->relative_error < 0.12);
    // Exact tokens are only turned.
    const std::vector<float> tail(after.k.end() - 8 * 32, after.k.end()), wanted(turned.k.end() - 8 * 32, turned.k.end());
    CHECK(tail == wanted);
    CHECK(read(cache, id, 1, 0, 0, 70) == first);
    CHECK(read(cache, *other, 1, 0, 100, 200) == before);

    expect_ok(cache.pool.close(*other));
    cache.append(id, 1, 40);
    CHECK(cache.seal(id).sealed == 1);
    expect_ok(cache.pool.close(id));
    CHECK(cache.pool.statistics().records.used == 0);
    CHECK(cache.pool.statistics().exact.used == 0);
}

TEST_CASE("cache/shift: a range inside a span, and a move forwards", "[unit]")
{
    test_cache cache(shift_config());
    const sequence_id id = cache.open();
    cache.append(id, 1, 100);
    cache.seal(id);
    expect_ok(cache.pool.erase(id, 60, 70));
    const values before = read(cache, id, 0, 1, 50, 60);
    const auto report = shift(cache, id, 50, 60, 10);
    expect_ok(report.error);
    CHECK(report->tokens == 10);
    const values after = read(cache, id, 0, 1, 60, 70);
    CHECK(kvarn::count_tokens(cache.pool, id, 50, 60) == 0);
    CHECK(after.v == before.v);
    values turned = before;
    turn(kvarn::token_major(turned.k.data(), 10, 1, 32), 10);
    CHECK(after.k == turned.k);  // a part of a tile becomes exact
    CHECK(cache.pool.next_position(id) == 100);
}

TEST_CASE("cache/shift: what is refused changes nothing", "[unit]")
{
    kvarn::cache_config few = shift_config();
    few.record_blocks = 7;  // four are used: no room for four more
    test_cache full(few), cache(shift_config());
    const sequence_id crowded = full.open();
    full.append(crowded, 1, 190);
    full.seal(crowded);
    const std::vector<float> crowded_before = full.attend(crowded, 1, 1);
    CHECK(shift(full, crowded, 0, 200, 5).error == status::no_room);
    CHECK(full.attend(crowded, 1, 1) == crowded_before);
    CHECK(full.pool.statistics().records.used == 4);
    CHECK(full.pool.statistics().sequences == 1);

    const sequence_id id = cache.open(10);
    cache.append(id, 1, 190);
    cache.seal(id);
    const auto unchanged = [&](auto change, status wanted) {
        const std::vector<float> before = cache.attend(id, 1, 1);
        const auto n = cache.pool.statistics();
        CHECK(change() == wanted);
        CHECK(cache.attend(id, 1, 1) == before);
        CHECK(cache.pool.statistics().records.used == n.records.used);
        CHECK(cache.pool.statistics().exact.used == n.exact.used);
        CHECK(cache.pool.statistics().sequences == n.sequences);
    };
    unchanged([&] { return shift(cache, id, 100, 90, 5).error; }, status::bad_argument);
    unchanged([&] { return shift(cache, id, 100, 150, 5).error; }, status::bad_argument);
    unchanged([&] { return shift(cache, id, 100, 150, -1).error; }, status::bad_argument);
    unchanged([&] { return shift(cache, id, 0, 200, -11).error; }, status::bad_argument);
    unchanged([&] { return shift(cache, id, 0, 200, std::int64_t{1} << 60).error; }, status::bad_argument);
    unchanged([&] { return shift(cache, id, 0, 200, 0).error; }, status::ok);
    unchanged([&] { return shift(cache, id, 300, 400, 7).error; }, status::ok);
    unchanged([&] {
        return kvarn::shift_positions(cache.pool, id, 0, 200, 5, [](auto&&...) {}, std::span<std::byte>{}).error;
    }, status::buffer_too_small);
    CHECK(shift(cache, {7, 1}, 0, 200, 5).error == status::stale_handle);

    std::vector<sequence_id> others;
    while (const auto one = cache.pool.fork(id)) others.push_back(*one);
    unchanged([&] { return shift(cache, id, 0, 200, 5).error; }, status::no_room);
    expect_ok(cache.pool.close(others.back()));
    expect_ok(cache.pool.reserve(id, 1));
    CHECK(shift(cache, id, 0, 200, 5).error == status::bad_argument);
}
