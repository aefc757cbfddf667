// SPDX-License-Identifier: Apache-2.0
#pragma once
// One warp and its share of a block's exact tokens, 32 at a time, out of pages of half, bfloat16 or float. In: pages. Out: the
// warp's softmax state and outputs, original basis. float accumulators. No allocation, no barrier.

#include <cstddef>
#include <cstdint>

#include <kvarn/cuda/attention/block.cuh>
#include <kvarn/cuda/attention/products.cuh>

namespace kvarn::cuda::detail {

inline constexpr int exact_span = 32;  // tokens that a warp takes at a time

/// The exact tokens of one segment, which starts at `position`.
template <class T, class Team, class Block>
KVARN_DEVICE KVARN_INLINE void attend_exact(Team& team, const Block& b, const exact_pages& x, int tokens, int position,
                                            row_state& state) noexcept
{
    constexpr int P = exact_span / 8;
    const attention_call& c = b.c;
    const int lane = opaque(b.lane), g = lane / 4, own = 2 * P * (lane % 4);
    const visible_tokens live = seen_by_any(b, position, {0, tokens});
    if (live.begin >= live.end) return;
    for (int first = live.begin / exact_span * exact_span + b.warp * exact_span; first < live.end;
         first += attention_warps * exact_span) {
        // Tokens that no row sees are not read: their pages may be gone.
        const auto place = [&](int t, std::ptrdiff_t page_stride, std::ptrdiff_t token_stride, std::ptrdiff_t head_stride) {
            const int token = first + t < live.begin ? live.begin : first + t < live.end ? first + t : live.end - 1;
            const int page = token / x.page_tokens;
            const std::ptrdiff_t at = x.table[static_cast<std::ptrdiff_t>(b.sequence) * x.pages + page];
            return at * page_stride + (token - page * x.page_tokens) * token_stride + b.head * head_stride;
        };
        float s[2 * P] = {};
        std::ptrdiff_t keys[P], values[2 * P];
        KVARN_UNROLL
        for (int m = 0; m < P; ++m) keys[m] = place(P * g + m, x.k_page_stride, x.k_token_stride, x.k_head_stride);
        const auto key = [&](int m) { return static_cast<const T*>(x.k) + keys[m]; };
        multiply_exact_keys<T, quad, P>(team, b.own_query(), c.dk, key, b.lane, s);
        if (c.exact_channels != 0)
            multiply_exact_keys<T, quad, P>(
                team, b.own_exact_query(), c.exact_channels, [&](int m) { return key(m) + c.dk; }, b.lane, s);
        const int rest = tokens - first < exact_span ? tokens - first : exact_span;
        const float factor = absorb_scores(team, b, s, true, {g, own, position + first, {0, rest}}, 0.0f, state);
        float sum = 0.0f;
        KVARN_UNROLL
        for (int i = 0; i < 2 * P; ++i) sum = add(sum, s[i]);
        state.total = fma(state.total, factor, row_sum(team, sum));
        const T* const data = static_cast<const T*>(c.dv != 0 ? x.v : x.k);
        KVARN_UNROLL
        for (int i = 0; i < 2 * P; ++i)
            values[i] = c.dv != 0 ? place(own + i, x.v_page_stride, x.v_token_stride, x.v_head_stride)
                                  : place(own + i, x.k_page_stride, x.k_token_stride, x.k_head_stride);
        const auto value = [&](int i) { return data + values[i]; };
        for (int channel = 0; channel < c.out_dim; channel += 64) {
            float y[16];
            multiply_exact_values<T, P>(team, s, value, channel, b.lane, y);
            add_outputs<4>(b, channel / 16, factor, [&](int i, float before) { return add(y[i], before); });
        }
    }
}

template <class Team, class Block>
KVARN_DEVICE KVARN_INLINE void attend_exact(Team& team, const Block& b, const exact_pages& x, int tokens, int position,
                                            row_state& state) noexcept
{
    if (tokens > 0)
        with_element(x.type, [&](auto element) { attend_exact<decltype(element)>(team, b, x, tokens, position, state); });
}

}  // namespace kvarn::cuda::detail
