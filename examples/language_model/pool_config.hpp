// SPDX-License-Identifier: Apache-2.0
#pragma once
// What a kvarn::cache_pool is told about a model and the plan of a cache, and what caches take. In: a plan, the shape of the model. Out: a
// configuration, memory for it, bytes.

#include <algorithm>
#include <cstddef>
#include <vector>

#include <kvarn/cache/pool.hpp>

#include "cache_plan.hpp"

namespace language_model {

struct cache_shape {
    std::size_t layers = 0, kv_heads = 0, head_dim = 0, group_heads = 1;  ///< group_heads: query heads on one KV head
};

/// Elements of K and V of one token.
[[nodiscard]] inline double cache_elements(const cache_shape& shape)
{
    return 2.0 * static_cast<double>(shape.layers) * static_cast<double>(shape.kv_heads) * static_cast<double>(shape.head_dim);
}

/// Bytes of a cache that holds `tokens` tokens: sink, sealed tiles with scales and padding, and the tail as far as it is filled.
[[nodiscard]] inline double cache_bytes(const cache_plan& plan, const cache_shape& shape, std::size_t tokens)
{
    const std::size_t sealed = (tokens - std::min(plan.sink, tokens)) / plan.group * plan.group;
    return static_cast<double>(shape.layers) * static_cast<double>(shape.kv_heads) *
           (plan.exact_token_bytes() * static_cast<double>(tokens - sealed) +
            plan.sealed_token_bytes() * static_cast<double>(sealed));
}

/// What a pool is told to keep a sequence by a plan. Only records are sealed by the pool.
[[nodiscard]] inline kvarn::cache_config pool_config(const cache_plan& plan, const cache_shape& shape, std::size_t most_tokens)
{
    kvarn::cache_config c;
    c.policy = kvarn_cli::value_of(kvarn::make_policy(plan.format, static_cast<int>(shape.layers), static_cast<int>(shape.kv_heads), plan.rules),
                                   plan.name);
    c.exact = plan.storage == storage::round_trip ? kvarn::exact_type::f32 : kvarn::exact_type::f16;
    c.most_tokens = most_tokens;
    c.most_step = plan.group;
    c.sink_tokens = plan.storage == storage::records ? plan.sink : most_tokens;
    c.encode = plan.how;
    return c;
}

/// Memory for a pool of this configuration.
[[nodiscard]] inline std::vector<std::byte> pool_memory(const kvarn::cache_config& config)
{
    return std::vector<std::byte>(kvarn_cli::value_of(kvarn::plan_cache(config), "the plan of a cache").bytes());
}

}  // namespace language_model
