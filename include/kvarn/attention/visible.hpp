// SPDX-License-Identifier: Apache-2.0
#pragma once
// What the query rows of a call see of a block of tokens: causal mask, window, parts of tiles as one range a row, and the mask of the
// newest positions (attention_task::mask) as bits on top of it, which only blocks at these positions look at; and what ALiBi adds to
// scores. In: a task, options, positions. No allocation. Layer 4; for the rest of attention/ only.

#include <kvarn/base/config.hpp>  // first: it refuses older standards

#include <cstddef>
#include <cstdint>

#include <kvarn/attention/rows.hpp>
#include <kvarn/attention/task.hpp>

namespace kvarn::detail {

/// Position of the segment's first token if what comes before ends at `end`.
[[nodiscard]] KVARN_INLINE std::int64_t begin_of(const kv_segment& s, std::int64_t end) noexcept
{
    return s.position >= 0 ? s.position : end;
}

/// What the positions of one call are measured from.
struct call_positions {
    std::int64_t first;   // of the first new token
    std::int64_t masked;  // from here on the mask says what is visible; INT64_MAX: there is none
};

[[nodiscard]] KVARN_INLINE call_positions positions_of(const attention_task& task) noexcept
{
    std::int64_t end = 0;
    for (const kv_segment& s : task.history)
        if (s.tokens != 0) end = begin_of(s, end) + static_cast<std::int64_t>(s.tokens);
    return {task.first_position >= 0 ? task.first_position : end - static_cast<std::int64_t>(task.q.tokens),
            task.mask_tokens != 0 ? end - static_cast<std::int64_t>(task.mask_tokens) : INT64_MAX};
}

/// One block, a tile or exact tokens, and the query rows. Each row sees tokens of its range r.seen, and of those only the ones that
/// shows() lets through if the block is masked.
struct visible_block {
    visible_range any{0, 0};             // what some row sees lies in it
    const std::uint64_t* mask = nullptr; // row 0 of the mask; null: the ranges say it all
    std::size_t mask_stride = 0;
    int heads = 1;
    std::int64_t bit = 0;                // of the block's token 0 in a row of the mask; negative before the mask begins
    std::int64_t causal_end = 0;         // behind what new token 0 sees of the tokens before the mask; token m sees m more
    const float* slopes = nullptr;       // of ALiBi, [heads]; null: none
    std::int64_t distance = 0;           // from the first new token to the block's token 0

    [[nodiscard]] KVARN_INLINE bool masked() const noexcept { return mask != nullptr; }
    /// Whether the mask lets new token `m` see token `t` of a masked block.
    [[nodiscard]] KVARN_INLINE bool shows(int m, int t) const noexcept
    {
        if (bit + t < 0) return t < causal_end + m;
        const auto at = static_cast<std::size_t>(bit + t);
        return (mask[static_cast<std::size_t>(m) * mask_stride + at / 64] >> at % 64 & 1u) != 0;
    }
};

/// `range` and `other` as one.
[[nodiscard]] KVARN_INLINE visible_range hull(visible_range range, visible_range other) noexcept
{
    if (other.empty()) return range;
    if (range.empty()) return other;
    return {other.begin < range.begin ? other.begin : range.begin, other.end > range.end ? other.end : range.end};
}

/// Narrows the ranges of a masked block: of each row from the first token that it sees to the last.
template <class Arch>
KVARN_NOINLINE void narrow_to_mask(int new_tokens, visible_block& b, const attention_rows& r) noexcept
{
    b.any = {0, 0};
    for (int m = 0; m < new_tokens; ++m) {
        visible_range seen = r.seen[m * b.heads];
        while (seen.begin < seen.end && !b.shows(m, seen.begin)) ++seen.begin;
        while (seen.begin < seen.end && !b.shows(m, seen.end - 1)) --seen.end;
        for (int h = 0; h < b.heads; ++h) r.seen[m * b.heads + h] = seen;
        b.any = hull(b.any, seen);
    }
}

/// Sets r.seen for the tokens `part` of a block whose token 0 is at `position`.
template <class Arch>
KVARN_INLINE visible_block find_visible(const attention_task& task, const attention_options& o, const call_positions& at,
                                        std::int64_t position, visible_range part, const attention_rows& r) noexcept
{
    const int new_tokens = static_cast<int>(task.q.tokens), heads = static_cast<int>(task.q.heads);
    const bool masked = at.masked < position + part.end, causal = o.causal && !masked;
    visible_block b;
    b.heads = heads;
    b.slopes = task.alibi_slopes;
    b.distance = position - at.first;
    for (int m = 0; m < new_tokens; ++m) {
        const std::int64_t own = at.first + m;
        std::int64_t end = causal ? own + 1 - position : part.end;
        std::int64_t begin = o.window != 0 && own >= o.window ? own + 1 - o.window - position : part.begin;
        end = end < part.begin ? part.begin : end > part.end ? part.end : end;
        begin = begin < part.begin ? part.begin : begin > part.end ? part.end : begin;
        const visible_range seen{static_cast<int>(begin), static_cast<int>(end)};
        for (int h = 0; h < heads; ++h) r.seen[m * heads + h] = seen;
        b.any = hull(b.any, seen);
    }
    if (masked) {
        b.mask = task.mask;
        b.mask_stride = task.mask_stride;
        b.bit = position - at.masked;
        b.causal_end = o.causal ? at.first + 1 - position : INT64_MAX / 2;
        narrow_to_mask<Arch>(new_tokens, b, r);
    }
    return b;
}

/// Whether some row sees token `t` of a masked block.
template <class Arch>
KVARN_NOINLINE bool is_shown(int t, const visible_block& b, const attention_rows& r) noexcept
{
    for (int row = 0; row < r.rows; row += b.heads)
        if (r.seen[row].begin <= t && t < r.seen[row].end && b.shows(row / b.heads, t)) return true;
    return false;
}
/// Of any block.
template <class Arch>
KVARN_INLINE bool is_seen(int t, const visible_block& b, const attention_rows& r) noexcept
{
    return b.masked() ? is_shown<Arch>(t, b, r) : b.any.begin <= t && t < b.any.end;
}

/// x[t] <- hidden for what the mask hides from row `row` in `seen`.
template <class Arch, class T>
KVARN_NOINLINE void hide_masked(const visible_block& b, int row, visible_range seen, T hidden, T* x) noexcept
{
    for (int t = seen.begin; t < seen.end; ++t)
        if (!b.shows(row / b.heads, t)) x[t] = hidden;
}

/// ALiBi (Press, Smith and Lewis 2022): s[t] += slope * distance of token t from row `row`, in base-2 units. `n` is a multiple of 16.
/// One fma a score; distances are exact below 2^24.
template <class Arch>
KVARN_NOINLINE void add_alibi(const visible_block& b, int row, float* s, int n) noexcept
{
    using lane = simd::lanes<Arch>;
    alignas(64) static constexpr float steps[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    const std::int64_t from = b.distance - row / b.heads;
    const lane slope = lane::broadcast(simd::kernels<simd::portable>::mul(b.slopes[row % b.heads], log2_e));
    const lane first = lane::load(steps);
    for (int t = 0; t < n; t += simd::lane_count) {
        const lane distance = add(lane::broadcast(static_cast<float>(from + t)), first);
        fma(distance, slope, lane::load(s + t)).store(s + t);
    }
}

}  // namespace kvarn::detail
