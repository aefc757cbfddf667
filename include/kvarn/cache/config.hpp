// SPDX-License-Identifier: Apache-2.0
#pragma once
// What a cache is to hold, and what that takes. In: formats by layer and head, the type of exact tokens, how many sequences,
// tokens and blocks. Out: the bytes of each kind, before anything exists (plan_cache). constexpr, no memory.
//
// A block is the place of one tile of tokens for all layers and KV heads: a record block holds records, an exact block up to
// `group` exact tokens. A sequence is its sink (exact), sealed tiles (records), and its tail (exact).

#include <kvarn/base/config.hpp>  // first: it refuses older standards

#include <cstddef>
#include <cstdint>

#include <kvarn/base/status.hpp>
#include <kvarn/cache/policy.hpp>
#include <kvarn/layout/encode_options.hpp>
#include <kvarn/layout/format.hpp>
#include <kvarn/layout/record.hpp>

namespace kvarn {

/// How exact tokens are kept.
enum class exact_type : std::uint8_t { f32, f16, bf16 };

/// Bytes of one exact value.
[[nodiscard]] KVARN_INLINE constexpr std::size_t element_bytes(exact_type t) noexcept
{
    return t == exact_type::f32 ? 4 : 2;
}

/// Everything that a cache is told once. Fields of zero below are filled in by completed().
struct cache_config {
    bit_policy policy{};                  ///< layers, KV heads, and the format of each; they share head dimensions and group
    exact_type exact = exact_type::f16;   ///< of sink and tail
    basis key_basis = basis::original;    ///< of K as it is stored; rotated: in the basis of the records
    basis value_basis = basis::original;  ///< the same of V
    /// At the start of each sequence, never sealed; rounded up to whole tiles, whose room they take anyway.
    std::size_t sink_tokens = 128;
    std::size_t recent_tokens = 0;   ///< the newest committed tokens, not sealed yet
    std::size_t sequences = 1;       ///< open at once
    std::size_t most_tokens = 4096;  ///< of one sequence, drafts included
    std::size_t most_step = 1;       ///< tokens of one step at most, for the default of exact_blocks
    std::size_t record_blocks = 0;   ///< of the pool; 0: enough for all sequences at most_tokens
    std::size_t exact_blocks = 0;    ///< of the pool; 0: the same, where sealing follows each step at once
    /// Of one sequence; 0: twice its tiles and 16. Rollbacks into sealed tiles and erasures add spans.
    std::size_t most_spans = 0;
    encode_options encode{};  ///< of the records
};

/// Blocks of each kind.
struct block_counts {
    std::size_t records = 0;
    std::size_t exact = 0;
};

namespace detail {

inline constexpr std::size_t most_blocks = INT32_MAX;  // ids are 32 bits wide

/// Sums and products that stay at the top instead of wrapping around.
[[nodiscard]] KVARN_INLINE constexpr std::size_t add_sizes(std::size_t a, std::size_t b) noexcept
{
    return a > SIZE_MAX - b ? SIZE_MAX : a + b;
}
[[nodiscard]] KVARN_INLINE constexpr std::size_t multiply_sizes(std::size_t a, std::size_t b) noexcept
{
    return b != 0 && a > SIZE_MAX / b ? SIZE_MAX : a * b;
}
[[nodiscard]] KVARN_INLINE constexpr std::size_t divide_up(std::size_t n, std::size_t by) noexcept
{
    return n / by + (n % by != 0);
}

[[nodiscard]] KVARN_INLINE constexpr std::size_t group_of(const cache_config& c) noexcept
{
    return static_cast<std::size_t>(c.policy.base().group());
}

[[nodiscard]] KVARN_INLINE constexpr std::size_t sink_blocks(const cache_config& c) noexcept
{
    return divide_up(c.sink_tokens, group_of(c));
}

/// Elements of K and V of one token in one layer and head.
[[nodiscard]] KVARN_INLINE constexpr std::size_t token_channels(const format& f) noexcept
{
    return static_cast<std::size_t>(f.key_channels() + f.head_dim_v());
}

}  // namespace detail

/// Blocks that one sequence takes at most on its way to `tokens` tokens in steps of up to `step`, where every step is followed
/// by sealing what is ready, and nothing is rolled back or erased.
[[nodiscard]] KVARN_INLINE constexpr block_counts blocks_of(const cache_config& c, std::size_t tokens,
                                                            std::size_t step = 1) noexcept
{
    const std::size_t group = detail::group_of(c), all = detail::divide_up(tokens, group);
    const std::size_t sink = detail::sink_blocks(c),
                      kept = detail::add_sizes(detail::multiply_sizes(sink, group), c.recent_tokens);
    const std::size_t open = detail::divide_up(detail::add_sizes(detail::add_sizes(c.recent_tokens, step), group - 1), group);
    const std::size_t exact = detail::add_sizes(sink, open);
    return {tokens > kept ? (tokens - kept) / group : 0, exact < all ? exact : all};
}

/// The configuration with its zeros filled in and the sink rounded up, as a pool takes it.
[[nodiscard]] KVARN_INLINE constexpr cache_config completed(cache_config c) noexcept
{
    const std::size_t group = detail::group_of(c);
    if (c.sink_tokens > detail::most_blocks) c.sink_tokens = detail::most_blocks;  // all of them
    if (c.recent_tokens > c.most_tokens) c.recent_tokens = c.most_tokens;
    c.sink_tokens = detail::multiply_sizes(detail::sink_blocks(c), group);
    const block_counts each = blocks_of(c, c.most_tokens, c.most_step);
    if (c.record_blocks == 0) c.record_blocks = detail::multiply_sizes(each.records, c.sequences);
    if (c.exact_blocks == 0) c.exact_blocks = detail::multiply_sizes(each.exact, c.sequences);
    if (c.most_spans == 0) c.most_spans = detail::add_sizes(2 * detail::divide_up(c.most_tokens, group), 16);
    return c;
}

/// What a pool takes, to the byte.
struct cache_plan {
    std::size_t record_block_bytes = 0;  ///< of one record block: all layers and heads, scales and padding included
    std::size_t exact_block_bytes = 0;   ///< of one exact block
    std::size_t records = 0;             ///< bytes of all record blocks
    std::size_t exact = 0;               ///< bytes of all exact blocks
    std::size_t state = 0;               ///< bytes of tables, counts, spans of sequences, and alignment

    [[nodiscard]] KVARN_INLINE constexpr std::size_t bytes() const noexcept { return records + exact + state; }
};

/// Elements of K and V of `tokens` tokens, all layers and heads.
[[nodiscard]] KVARN_INLINE constexpr std::size_t cache_elements(const cache_config& c, std::size_t tokens) noexcept
{
    const auto heads = static_cast<std::size_t>(c.policy.layers()) * static_cast<std::size_t>(c.policy.heads());
    return detail::multiply_sizes(tokens, heads * detail::token_channels(c.policy.base()));
}

}  // namespace kvarn
