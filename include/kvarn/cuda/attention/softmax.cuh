// SPDX-License-Identifier: Apache-2.0
#pragma once
// From scores to softmax weights in registers: which tokens a query row sees, soft-cap, and the running state of a row. A warp has
// eight rows; the four threads of row g hold `n` neighbouring tokens each, thread j the j-th n. Base-2 logits; float.

#include <cstddef>
#include <cstdint>

#include <kvarn/cuda/attention/call.cuh>
#include <kvarn/cuda/team.cuh>

namespace kvarn::cuda::detail {

KVARN_DEVICE KVARN_INLINE float exp2(float x) noexcept
{
#if defined(__CUDA_ARCH__)
    float r;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
    return r;
#else
    return std::exp2(x);
#endif
}

/// 1 / x to the last bit or two; x is a normal number.
KVARN_DEVICE KVARN_INLINE float quick_inverse(float x) noexcept
{
#if defined(__CUDA_ARCH__)
    float r;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
    return r;
#else
    return 1.0f / x;
#endif
}
/// The largest over the four threads of a row.
template <class Team>
KVARN_DEVICE KVARN_INLINE float quick_row_max(Team& team, float x) noexcept
{
    x = quick_max(x, team.shuffle_xor(x, 1));
    return quick_max(x, team.shuffle_xor(x, 2));
}

/// cap * tanh(s / cap): 1 - 2 / (1 + e^(2x)); beyond +-12 it is +-1 in float.
KVARN_DEVICE KVARN_INLINE float soft_capped(float s, float cap, float inverse_cap) noexcept
{
    const float x = quick_max(-quick_max(-mul(s, inverse_cap), -12.0f), -12.0f);
    return mul(fma(-2.0f, quick_inverse(add(1.0f, exp2(mul(x, 2.0f * log2_e)))), 1.0f), cap);
}

/// Tokens [begin, end) of a block of tokens, of which some row sees or may see these.
struct visible_tokens {
    int begin, end;
};

/// What the query token at `own` sees of the tokens `part` of a block whose token 0 is at `position`.
KVARN_DEVICE KVARN_INLINE visible_tokens find_visible(const attention_call& c, bool causal, int own, int position,
                                                      visible_tokens part) noexcept
{
    int end = causal ? own + 1 - position : part.end;
    int begin = own >= c.window ? own + 1 - c.window - position : part.begin;
    end = end < part.begin ? part.begin : end > part.end ? part.end : end;
    begin = begin < part.begin ? part.begin : begin > part.end ? part.end : begin;
    return {begin, end};
}

/// The lowest `n` bits, none if negative, at most 32.
KVARN_DEVICE KVARN_INLINE std::uint32_t low_bits(int n) noexcept
{
    return n <= 0 ? 0u : n >= 32 ? ~0u : (1u << n) - 1u;
}

/// Bits [at, at + 32) of a row of a mask; zeros before and behind it.
KVARN_DEVICE KVARN_INLINE std::uint32_t mask_bits(const std::uint64_t* row, int words, int at) noexcept
{
    if (at <= -32 || at / 64 >= words) return 0;
    if (at < 0) return static_cast<std::uint32_t>(row[0]) << -at;
    const int word = at / 64, bit = at % 64;
    const std::uint64_t low = row[word] >> bit;
    return static_cast<std::uint32_t>(bit > 32 && word + 1 < words ? low | row[word + 1] << (64 - bit) : low);
}

/// Neighbouring tokens of one thread and its row: its first one is number `own` of those from `position` on, of which only `part` counts.
struct thread_tokens {
    int row, own, position;
    visible_tokens part;
};

/// A row's largest score so far, and the sum of its weights 2^(s - largest).
struct row_state {
    float largest = lowest_score, total = 0.0f;
};

/// Takes the scores s of `of` into the state's largest and makes them weights times 2^shift, hidden ones 0. Returns by how much what
/// came before shrinks; the total is the caller's. What the row sees is asked for only with `masked`.
template <int N, class Team, class Block>
KVARN_DEVICE KVARN_INLINE float absorb_scores(Team& team, const Block& b, float (&s)[N], bool masked, const thread_tokens& of, float shift,
                                              row_state& state) noexcept
{
    const attention_call& c = b.c;
    if (c.cap != 0.0f) {
        KVARN_UNROLL
        for (int i = 0; i < N; ++i) s[i] = soft_capped(s[i], c.cap, c.inverse_cap);
    }
    if constexpr (Block::general) {
        static_assert(N <= 32);
        const float slope = b.slope(of.row);
        const int distance = of.position + of.own - b.query_position(of.row);
        if (slope != 0.0f) {
            KVARN_UNROLL
            for (int i = 0; i < N; ++i) s[i] = fma(static_cast<float>(distance + i), slope, s[i]);
        }
    }
    if (masked) {
        visible_tokens seen = b.seen(of.row, of.position, of.part);
        seen = {seen.begin - of.own, seen.end - of.own};
        KVARN_UNROLL
        for (int i = 0; i < N; ++i)
            if (i < seen.begin || i >= seen.end) s[i] = hidden_score;
        if constexpr (Block::general) {
            const std::uint32_t shown = b.shown(of);
            KVARN_UNROLL
            for (int i = 0; i < N; ++i)
                if ((shown >> i & 1u) == 0) s[i] = hidden_score;
        }
    }
    float most = s[0];
    KVARN_UNROLL
    for (int i = 1; i < N; ++i) most = quick_max(most, s[i]);
    most = quick_max(quick_row_max(team, most), state.largest);
    const float factor = exp2(sub(state.largest, most)), origin = sub(most, shift);
    KVARN_UNROLL
    for (int i = 0; i < N; ++i) s[i] = exp2(sub(s[i], origin));
    state.largest = most;
    return factor;
}

}  // namespace kvarn::cuda::detail
