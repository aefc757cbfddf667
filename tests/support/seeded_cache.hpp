// SPDX-License-Identifier: Apache-2.0
#pragma once
// A small cache for tests, with values that are a function of sequence, position, layer, head and channel.

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include <kvarn/cache/seal.hpp>
#include <kvarn/cache/tasks.hpp>

#include "library.hpp"

namespace support {

/// A value of K (part 0) or V (part 1), about normal, the same on every machine.
inline float cache_value(std::uint64_t seed, std::int64_t position, std::size_t layer, std::size_t head, std::size_t part, std::size_t channel)
{
    std::uint64_t x = seed * 0x9e3779b97f4a7c15u ^ static_cast<std::uint64_t>(position) * 0xbf58476d1ce4e5b9u ^
                      (layer * 1031 + head * 67 + part * 7 + 1) * 0x94d049bb133111ebu ^ (channel + 1) * 0xd6e8feb86659fd93u;
    float sum = 0;
    for (int i = 0; i < 4; ++i) {
        x ^= x >> 30;
        x *= 0xbf58476d1ce4e5b9u;
        x ^= x >> 27;
        sum += static_cast<float>(static_cast<std::int64_t>(x >> 40)) / static_cast<float>(1 << 23) - 1.0f;
    }
    return sum;
}

struct test_cache {
    explicit test_cache(const kvarn::cache_config& c) : memory(bytes_of(c)), scratch(kvarn::cache_scratch_bytes(c))
    {
        for (std::byte& b : memory) b = std::byte{0xff};  // NaN in every type
        const auto made = kvarn::make_pool(c, memory);
        expect_ok(made.error);
        pool = *made;
    }
    static std::size_t bytes_of(const kvarn::cache_config& c)
    {
        const auto plan = kvarn::plan_cache(c);
        expect_ok(plan.error);
        return plan->bytes();
    }

    kvarn::sequence_id open(std::int64_t first_position = 0)
    {
        const auto id = pool.open(first_position);
        expect_ok(id.error);
        return *id;
    }
    /// K and V of drafts [first_draft, first_draft + count) of a sequence that goes by the values of `seed`, all layers and heads.
    void store(kvarn::sequence_id id, std::uint64_t seed, std::size_t first_draft, std::size_t count)
    {
        const kvarn::format& f = pool.format_of(0, 0);
        const auto dk = static_cast<std::size_t>(f.key_channels()), dv = static_cast<std::size_t>(f.head_dim_v()), heads = pool.heads();
        const std::int64_t start = pool.next_position(id) - static_cast<std::int64_t>(pool.drafts(id) - first_draft);
        std::vector<float> k(count * heads * dk), v(count * heads * dv);
        for (std::size_t layer = 0; layer < pool.layers(); ++layer) {
            for (std::size_t t = 0; t < count; ++t)
                for (std::size_t h = 0; h < heads; ++h) {
                    const std::int64_t position = start + static_cast<std::int64_t>(t);
                    for (std::size_t c = 0; c < dk; ++c) k[(t * heads + h) * dk + c] = cache_value(seed, position, layer, h, 0, c);
                    for (std::size_t c = 0; c < dv; ++c) v[(t * heads + h) * dv + c] = cache_value(seed, position, layer, h, 1, c);
                }
            const kvarn::input_view values = dv == 0 ? kvarn::input_view{} : kvarn::token_major<const float>(v.data(), count, heads, dv);
            expect_ok(kvarn::store(pool, id, layer, kvarn::token_major<const float>(k.data(), count, heads, dk), values, first_draft));
        }
    }
    /// Drafts that count at once.
    void append(kvarn::sequence_id id, std::uint64_t seed, std::size_t count)
    {
        expect_ok(pool.reserve(id, count));
        store(id, seed, pool.drafts(id) - count, count);
        expect_ok(pool.commit(id, pool.drafts(id)));
    }
    kvarn::seal_report seal(kvarn::sequence_id id)
    {
        const auto report = kvarn::seal(pool, id, scratch);
        expect_ok(report.error);
        return *report;
    }
    /// Outputs of `m` query tokens with `group_heads` query heads a KV head in every layer, one after the other.
    std::vector<float> attend(kvarn::sequence_id id, std::size_t m, std::size_t group_heads, const kvarn::layer_options& options = {},
                              std::uint64_t seed = 99)
    {
        const kvarn::format& f = pool.format_of(0, 0);
        const auto dk = static_cast<std::size_t>(f.key_channels());
        const auto dv = static_cast<std::size_t>(f.has_values() ? f.head_dim_v() : f.head_dim_k());
        const std::size_t heads = pool.heads() * group_heads;
        std::vector<float> q(m * heads * dk), out(pool.layers() * m * heads * dv);
        const std::int64_t start = pool.next_position(id) - static_cast<std::int64_t>(m);
        for (std::size_t layer = 0; layer < pool.layers(); ++layer) {
            for (std::size_t t = 0; t < m; ++t)
                for (std::size_t h = 0; h < heads; ++h)
                    for (std::size_t c = 0; c < dk; ++c)
                        q[(t * heads + h) * dk + c] = cache_value(seed, start + static_cast<std::int64_t>(t), layer, h, 2, c);
            kvarn::sequence_step step;
            step.sequence = id;
            step.q = kvarn::token_major<const float>(q.data(), m, heads, dk);
            step.out = kvarn::token_major(out.data() + layer * m * heads * dv, m, heads, dv);
            std::vector<std::byte> work(kvarn::layer_memory_bytes(pool, {&step, 1}, options));
            const auto items = kvarn::plan_layer(pool, layer, {&step, 1}, options, work);
            expect_ok(items.error);
            expect_ok(items->run(scratch));
        }
        return out;
    }

    std::vector<std::byte> memory, scratch;
    kvarn::cache_pool pool;
};

}  // namespace support
