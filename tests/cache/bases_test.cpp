// SPDX-License-Identifier: Apache-2.0
// The bases of a cache's heads by their data: heads with channels of another size leave the rotation, the others stay; what is refused.

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <vector>

#include "../catch.hpp"
#include "../support/seeded_cache.hpp"

#include <kvarn/cache/bases.hpp>

namespace {

using kvarn::sequence_id;
using kvarn::status;
using support::cache_value;
using support::expect_ok;
using support::test_cache;

constexpr std::size_t dim = 64, group_heads = 3;

kvarn::cache_config bases_config()
{
    kvarn::cache_config c;
    c.policy = *kvarn::make_policy(*kvarn::parse_format("k2v2_g64", dim), 2, 2);
    c.exact = kvarn::exact_type::f32;
    c.sink_tokens = 64;
    c.sequences = 2;
    c.most_tokens = 512;
    c.most_step = 200;
    return c;
}

/// 150 tokens; keys of layer 1, head 0 have channels 100 times as large where its queries are small.
sequence_id biased_sequence(test_cache& cache, std::vector<std::uint64_t>& moments, float odd_value = 0)
{
    constexpr std::size_t tokens = 150;
    const sequence_id id = cache.open();
    moments.assign(kvarn::moment_count(cache.pool), 0);
    expect_ok(cache.pool.reserve(id, tokens));
    for (std::size_t layer = 0; layer < 2; ++layer) {
        std::vector<float> k(tokens * 2 * dim), v(k), q(tokens * 2 * group_heads * dim);
        for (std::size_t t = 0; t < tokens; ++t) {
            for (std::size_t h = 0; h < 2; ++h)
                for (std::size_t c = 0; c < dim; ++c) {
                    const auto position = static_cast<std::int64_t>(t);
                    k[(t * 2 + h) * dim + c] = cache_value(1, position, layer, h, 0, c) * (layer == 1 && h == 0 && c < 4 ? 100.0f : 1.0f);
                    v[(t * 2 + h) * dim + c] = cache_value(1, position, layer, h, 1, c);
                }
            for (std::size_t h = 0; h < 2 * group_heads; ++h)
                for (std::size_t c = 0; c < dim; ++c)
                    q[(t * 2 * group_heads + h) * dim + c] = cache_value(2, static_cast<std::int64_t>(t), layer, h, 2, c) * (c < 4 ? 0.01f : 1.0f);
        }
        if (odd_value != 0 && layer == 1) k[(70 * 2 + 0) * dim + 5] = odd_value;
        expect_ok(kvarn::add_query_moments(cache.pool, layer, kvarn::token_major<const float>(q.data(), tokens, 2 * group_heads, dim), moments));
        expect_ok(kvarn::store(cache.pool, id, layer, kvarn::token_major<const float>(k.data(), tokens, 2, dim),
                               kvarn::token_major<const float>(v.data(), tokens, 2, dim)));
    }
    expect_ok(cache.pool.commit(id, tokens));
    return id;
}

}  // namespace

TEST_CASE("cache/bases: heads with channels of another size leave the rotation, the others stay", "[unit]")
{
    test_cache cache(bases_config());
    std::vector<std::uint64_t> moments;
    std::vector<std::byte> scratch(kvarn::choose_bases_scratch_bytes(cache.pool.format_of(0, 0)));
    const sequence_id id = biased_sequence(cache, moments);
    const auto changed = kvarn::choose_bases(cache.pool, id, moments, scratch);
    expect_ok(changed.error);
    CHECK(*changed == 1);
    for (std::size_t layer = 0; layer < 2; ++layer)
        for (std::size_t head = 0; head < 2; ++head) {
            CHECK(cache.pool.format_of(layer, head).keys_rotated() == !(layer == 1 && head == 0));
            CHECK(cache.pool.format_of(layer, head).values_rotated());
        }
    CHECK(cache.seal(id).sealed == 1);
    CHECK(kvarn::choose_bases(cache.pool, id, moments, scratch).error == status::bad_argument);  // too late

    // And that is worth something to the scores: errors of the keys, weighted as the queries do.
    test_cache plain(bases_config());
    const sequence_id other = biased_sequence(plain, moments);
    CHECK(plain.seal(other).sealed == 1);
    const auto error_of = [&](test_cache& of, sequence_id sequence) {
        std::vector<float> k(64 * dim);
        std::vector<std::byte> room(kvarn::read_scratch_bytes(of.pool.format_of(1, 0)));
        expect_ok(kvarn::read(of.pool, sequence, 1, 0, 64, 128, kvarn::token_major(k.data(), 64, 1, dim), {}, room));
        double sum = 0;
        for (std::size_t t = 0; t < 64; ++t)
            for (std::size_t c = 0; c < dim; ++c) {
                const double exact = double{cache_value(1, static_cast<std::int64_t>(64 + t), 1, 0, 0, c)} * (c < 4 ? 100.0 : 1.0);
                sum += (k[t * dim + c] - exact) * (k[t * dim + c] - exact) * (c < 4 ? 1e-4 : 1.0);
            }
        return std::sqrt(sum);
    };
    CHECK(error_of(cache, id) < 0.2 * error_of(plain, other));
}

TEST_CASE("cache/bases: a tile that no record can hold keeps its bases", "[unit]")
{
    test_cache cache(bases_config());
    std::vector<std::uint64_t> moments;
    std::vector<std::byte> scratch(kvarn::choose_bases_scratch_bytes(cache.pool.format_of(0, 0)));
    const sequence_id id = biased_sequence(cache, moments, std::numeric_limits<float>::quiet_NaN());
    const auto changed = kvarn::choose_bases(cache.pool, id, moments, scratch);
    expect_ok(changed.error);
    CHECK(*changed == 0);
    CHECK(cache.pool.format_of(1, 0).keys_rotated());
}

TEST_CASE("cache/bases: what is refused", "[unit]")
{
    test_cache cache(bases_config());
    std::vector<std::uint64_t> moments(kvarn::moment_count(cache.pool));
    std::vector<std::byte> scratch(kvarn::choose_bases_scratch_bytes(cache.pool.format_of(0, 0)));
    const sequence_id id = cache.open();
    cache.append(id, 1, 100);
    CHECK(kvarn::choose_bases(cache.pool, id, moments, scratch).error == status::bad_argument);  // no tile is ready
    cache.append(id, 1, 50);
    CHECK(kvarn::choose_bases(cache.pool, {1, 1}, moments, scratch).error == status::stale_handle);
    CHECK(kvarn::choose_bases(cache.pool, id, std::span(moments).first(moments.size() - 1), scratch).error == status::buffer_too_small);
    CHECK(kvarn::choose_bases(cache.pool, id, moments, std::span(scratch).first(scratch.size() - 1)).error == status::buffer_too_small);
    kvarn::choose_options bits;
    bits.most_key_error = 0.1f;
    CHECK(kvarn::choose_bases(cache.pool, id, moments, scratch, bits).error == status::bad_argument);
    const std::vector<float> q(5 * dim);
    CHECK(kvarn::add_query_moments(cache.pool, 2, kvarn::token_major(q.data(), 1, 2, dim), moments) == status::bad_argument);
    CHECK(kvarn::add_query_moments(cache.pool, 0, kvarn::token_major(q.data(), 1, 5, dim), moments) == status::shape_mismatch);
    CHECK(kvarn::add_query_moments(cache.pool, 0, kvarn::token_major(q.data(), 1, 2, dim), std::span(moments).first(3)) == status::buffer_too_small);
    const auto unchanged = kvarn::choose_bases(cache.pool, id, moments, scratch);  // no queries: K stays, and V has no reason
    expect_ok(unchanged.error);
    CHECK(*unchanged == 0);
}
