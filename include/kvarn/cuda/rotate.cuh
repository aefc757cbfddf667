// SPDX-License-Identifier: Apache-2.0
#pragma once
// The Hadamard rotation of a tile's tokens in shared memory, the twin of rotate/hadamard.hpp: levels with spans 1, 2, 4, ...,
// each a sum and a difference, then one product with 1 / sqrt(head_dim) (paper section 4.1). head_dim 64,
// 128, 256 or 512: the first four levels in the registers that load sixteen channels, the rest over channels c, c + 16, ...
// The matrix is symmetric, so this is the inverse too. float. No allocation; for one thread block.

#include <cstddef>
#include <cstdint>

#include <kvarn/cuda/team.cuh>

namespace kvarn::cuda::detail {

/// Floats of several tokens: channel d of token t at data[t * token_step + d * channel_step]. One of the steps is 1.
struct token_block {
    float* data;
    int token_step;
    int channel_step;

    KVARN_DEVICE KVARN_INLINE float& at(int t, int d) const noexcept { return data[t * token_step + d * channel_step]; }
};

/// Butterfly levels with spans 1, 2, ..., R / 2.
template <int R>
KVARN_DEVICE KVARN_INLINE void butterflies(float (&x)[R]) noexcept
{
    KVARN_UNROLL
    for (int h = 1; h < R; h *= 2) {
        KVARN_UNROLL
        for (int i = 0; i < R; ++i)
            if (!(i & h)) {
                const float a = x[i], b = x[i + h];
                x[i] = add(a, b);
                x[i + h] = sub(a, b);
            }
    }
}

/// The levels with spans 16 .. 8 R of `tokens` tokens of 16 R channels, and the scale. `tokens` is a power of two where
/// token_step is 1. No barrier at either end.
template <int R, class Team>
KVARN_DEVICE KVARN_INLINE void finish_rotation(Team& team, const token_block& x, int tokens, float scale) noexcept
{
    int shift = 0;  // log2(tokens)
    if (x.token_step == 1)
        while (1 << shift < tokens) ++shift;
    for_each(team, tokens * 16, [&](int item) {
        // Neighbouring threads take neighbouring floats.
        const int t = x.token_step == 1 ? item & (tokens - 1) : item / 16, d = x.token_step == 1 ? item >> shift : item % 16;
        float* const first = &x.at(t, d);
        const int step = opaque(16 * x.channel_step);
        constexpr int held = R < 16 ? R : 16;  // with their addresses, more would take too many registers
        float v[held];
        KVARN_UNROLL
        for (int i = 0; i < held; ++i) v[i] = first[i * step];
        butterflies(v);
        const int again = opaque(step);
        if constexpr (R == held) {
            KVARN_UNROLL
            for (int i = 0; i < R; ++i) first[i * again] = mul(v[i], scale);
        } else {
            static_assert(R == 2 * held);
            KVARN_UNROLL
            for (int i = 0; i < held; ++i) first[i * again] = v[i];
            float* const second = first + held * again;
            KVARN_UNROLL
            for (int i = 0; i < held; ++i) v[i] = second[i * again];
            butterflies(v);
            const int last = opaque(step);
            KVARN_UNROLL
            for (int i = 0; i < held; ++i) {
                const float a = first[i * last];
                first[i * last] = mul(add(a, v[i]), scale);
                second[i * last] = mul(sub(a, v[i]), scale);
            }
        }
    });
}

template <class Team>
KVARN_DEVICE KVARN_INLINE void finish_rotation(Team& team, const token_block& x, int tokens, int dim, float scale) noexcept
{
    if (dim == 64)
        finish_rotation<4>(team, x, tokens, scale);
    else if (dim == 128)
        finish_rotation<8>(team, x, tokens, scale);
    else if (dim == 256)
        finish_rotation<16>(team, x, tokens, scale);
    else
        finish_rotation<32>(team, x, tokens, scale);
}

/// Sixteen channels from `d` on of token `t` to shared memory.
KVARN_DEVICE KVARN_INLINE void put16(const token_block& x, int t, int d, const float (&v)[16]) noexcept
{
    if (x.channel_step == 1) {
        quad* const to = reinterpret_cast<quad*>(&x.at(t, d));
        KVARN_UNROLL
        for (int n = 0; n < 4; ++n) {
            quad q;
            KVARN_UNROLL
            for (int i = 0; i < 4; ++i) q.w[i] = bits_as<std::uint32_t>(v[4 * n + i]);
            to[n] = q;
        }
    } else {
        KVARN_UNROLL
        for (int i = 0; i < 16; ++i) x.at(t, d + i) = v[i];
    }
}

/// 1 / sqrt(n), rounded to float once.
[[nodiscard]] KVARN_INLINE float hadamard_scale(int n) noexcept
{
    return static_cast<float>(1.0 / std::sqrt(static_cast<double>(n)));
}

}  // namespace kvarn::cuda::detail
