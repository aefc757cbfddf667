// SPDX-License-Identifier: Apache-2.0
#pragma once
// What decode attention is asked: the history of one KV head as segments in the order of their positions, the queries that attend to it,
// and the options. Plain structs over the engine's memory; nothing is copied or owned.

#include <kvarn/base/config.hpp>  // first: it refuses older standards

#include <cstddef>
#include <cstdint>
#include <span>

#include <kvarn/base/status.hpp>
#include <kvarn/base/view.hpp>
#include <kvarn/layout/format.hpp>
#include <kvarn/layout/record.hpp>

namespace kvarn {

/// Arithmetic of the products with codes; everything else is float. Errors of the output relative to exact arithmetic on the same
/// records, as measured in docs/performance.md.
enum class precision : std::uint8_t {
    exact,  ///< float weights: about 1e-5
    fine,   ///< 16-bit weights: below 1e-3
    fast,   ///< 8-bit weights for codes of 2 and 4 bits, K's as far as attention_options::fast_bound lets them: about 1e-2
};

/// How a call attends.
struct attention_options {
    float softmax_scale = 0.0f;   ///< factor on <q, k>; 0: 1 / sqrt(channels of K, exact ones included)
    float logit_soft_cap = 0.0f;  ///< s <- cap * tanh(s / cap) after scaling, at most 1000; 0: none
    std::int64_t window = 0;      ///< a query sees this many newest positions up to its own; 0: all
    bool causal = true;           ///< a query does not see positions after its own
    basis query_basis = basis::original;   ///< of the quantized channels of q; rotated: as K of the records
    basis output_basis = basis::original;  ///< of the output; rotated: as V of the records
    kvarn::precision precision = precision::fine;
    /// With `fast`: where 8-bit weights would change a query row's scores of a tile by more than this standard deviation (natural units;
    /// it grows with the query and the tile's largest token scale), the row takes 16-bit weights there. At least 0; infinity: nowhere.
    float fast_bound = 0.03f;
};

/// Consecutive positions of the history of one KV head: exact tokens, or records. Made by the functions below. Positions decide what the
/// causal mask and the window hide. There may be gaps between segments, but each begins at or behind the end of the one before.
struct kv_segment {
    std::size_t tokens = 0;      ///< that are part of the history
    std::int64_t position = -1;  ///< of the first of them; -1: they follow the segment before, the first segment begins at 0
    // Exact tokens: K [tokens][key_channels], V [tokens][head_dim_v] of one head; V is empty when the format has no V part.
    input_view k{}, v{};
    std::size_t head = 0;
    basis key_basis = basis::original, value_basis = basis::original;
    // Records: number i lies at data + (table ? table[i] : i) * stride, or at list[i].
    const std::byte* data = nullptr;
    std::ptrdiff_t stride = 0;
    const std::int32_t* table = nullptr;
    const std::byte* const* list = nullptr;
    std::size_t records = 0;  ///< ceil((skip + tokens) / group)
    std::size_t skip = 0;     ///< tokens of the first record that come before the segment's; less than group

    [[nodiscard]] KVARN_INLINE constexpr bool sealed() const noexcept { return records != 0; }
    [[nodiscard]] KVARN_INLINE constexpr const std::byte* record(std::size_t i) const noexcept
    {
        if (list != nullptr) return list[i];
        return data + (table != nullptr ? static_cast<std::ptrdiff_t>(table[i]) : static_cast<std::ptrdiff_t>(i)) * stride;
    }
};

/// The segment with its first token at `position`: behind a gap, where tokens before it were erased or evicted.
[[nodiscard]] KVARN_INLINE constexpr kv_segment at_position(kv_segment s, std::int64_t position) noexcept
{
    s.position = position;
    return s;
}

/// All tokens of one head of `k` and `v` (sink or tail). `v` is empty (default) when V is read from K. Their bases: rotated means as in the
/// records. Values of tokens that some query sees must be finite, and far enough from overflow that scores, softmax scale * <q, k>, are
/// finite floats too.
[[nodiscard]] KVARN_INLINE constexpr kv_segment exact_tokens(const input_view& k, const input_view& v, std::size_t head, basis key_basis,
                                                             basis value_basis) noexcept
{
    kv_segment s;
    s.tokens = k.tokens;
    s.k = k;
    s.v = v;
    s.head = head;
    s.key_basis = key_basis;
    s.value_basis = value_basis;
    return s;
}

/// The same with K and V in one basis, the original one unless said otherwise.
[[nodiscard]] KVARN_INLINE constexpr kv_segment exact_tokens(const input_view& k, const input_view& v, std::size_t head,
                                                             basis stored = basis::original) noexcept
{
    return exact_tokens(k, v, head, stored, stored);
}

/// Records [first, first + count) of one head of a grid.
template <class Byte>
[[nodiscard]] KVARN_INLINE constexpr kv_segment sealed_tiles(const format& f, const record_grid<Byte>& grid, std::size_t head,
                                                             std::size_t first = 0, std::size_t count = SIZE_MAX) noexcept
{
    if (first > grid.tiles) first = grid.tiles;
    if (count > grid.tiles - first) count = grid.tiles - first;
    kv_segment s;
    s.records = count;
    s.tokens = count * static_cast<std::size_t>(f.group());
    s.data = count != 0 ? grid.at(first, head) : nullptr;
    s.stride = static_cast<std::ptrdiff_t>(grid.tile_stride);
    return s;
}

/// `table.size()` records at base + table[i] * stride bytes: a block table.
[[nodiscard]] KVARN_INLINE constexpr kv_segment paged_tiles(const format& f, const std::byte* base, std::ptrdiff_t stride,
                                                            std::span<const std::int32_t> table) noexcept
{
    kv_segment s;
    s.records = table.size();
    s.tokens = table.size() * static_cast<std::size_t>(f.group());
    s.data = base;
    s.stride = stride;
    s.table = table.data();
    return s;
}

/// Records at the given addresses.
[[nodiscard]] KVARN_INLINE constexpr kv_segment listed_tiles(const format& f, std::span<const std::byte* const> records) noexcept
{
    kv_segment s;
    s.records = records.size();
    s.tokens = records.size() * static_cast<std::size_t>(f.group());
    s.list = records.data();
    return s;
}

/// Tokens [first, first + count) of a segment, clipped to what it has; of records too, wherever in a tile they begin and end: a last page
/// that is not full, what a rollback into a sealed tile leaves. Records without any of them drop out of the segment; of those that stay,
/// tokens outside are hidden, and cost what visible ones do. A position that is given moves along; without one the range has none either.
[[nodiscard]] KVARN_INLINE constexpr kv_segment token_range(const format& f, kv_segment s, std::size_t first, std::size_t count) noexcept
{
    if (first > s.tokens) first = s.tokens;
    if (count > s.tokens - first) count = s.tokens - first;
    s.tokens = count;
    if (s.position >= 0 && first <= static_cast<std::uint64_t>(INT64_MAX - s.position)) s.position += static_cast<std::int64_t>(first);
    if (s.sealed()) {
        const auto group = static_cast<std::size_t>(f.group());
        const std::size_t begin = s.skip + first, tile = begin / group;
        s.skip = count != 0 ? begin % group : 0;
        s.records = (s.skip + count + group - 1) / group;
        if (s.list != nullptr) s.list += tile;
        else if (s.table != nullptr) s.table += tile;
        else s.data = count != 0 ? s.record(tile) : nullptr;
    } else {
        s.k = token_range(s.k, first, count);
        s.v = token_range(s.v, first, count);
    }
    return s;
}

/// The first `count` tokens of a segment, or all if it has fewer.
[[nodiscard]] KVARN_INLINE constexpr kv_segment first_tokens(const format& f, const kv_segment& s, std::size_t count) noexcept
{
    return token_range(f, s, 0, count);
}

/// One KV head of one sequence for one step: m new tokens times r query heads of the group.
///
/// `mask` says, for the newest positions, what each new token sees: a tree of drafts, each of which sees its ancestors and itself, or a
/// prefix within which all see all. Row i, of `mask_stride` words, is of new token i; bit t % 64 of word t / 64 is of the position
/// `mask_tokens - t` from the end of the history. There it takes the place of the causal mask; the window counts as ever.
struct attention_task {
    std::span<const kv_segment> history;  ///< in the order of positions, the new tokens included (usually at the end of the tail)
    input_view q{};                       ///< [m][r][head_dim_k + exact_channels]
    output_view out{};                    ///< [m][r][head_dim_v, or head_dim_k when V is read from K]; attend_item does not look at it
    float* log_sum_exp = nullptr;         ///< [m][r], natural logarithm of the sum of exp(score), sink logit included; may be null
    const float* sink_logits = nullptr;   ///< [r], logits that take part in the softmax without a value; may be null
    std::int64_t first_position = -1;     ///< of the first query token; -1: the new tokens are the last m positions of the history
    const kvarn::format* format = nullptr;  ///< of the task's records; null: the call's
    const std::uint64_t* mask = nullptr;    ///< [m][mask_stride] words; null: none
    std::size_t mask_stride = 0;            ///< at least mask_tokens / 64, rounded up
    std::size_t mask_tokens = 0;            ///< newest positions that the mask speaks of; may be more than there are
    const float* alibi_slopes = nullptr;    ///< [r], score += slope * (position of the key - of the query), after the soft cap; null: none
};

}  // namespace kvarn
