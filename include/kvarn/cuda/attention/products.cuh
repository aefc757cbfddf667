// SPDX-License-Identifier: Apache-2.0
#pragma once
// The products of decode attention, each for one warp and its eight query rows, on tensor cores: queries with K and weights with V,
// over codes or over exact values. Tokens of a span (8 P of them) and channels of a block (8 V) lie with the threads as follows:
// thread 4 g + j of the warp has row g; its scores and weights are of the tokens 2 P j + i, i < 2 P, of the span, and its outputs
// of the channels 2 V j + i of each block (V read from K: 16 n + 2 j + {0, 1, 8, 9}). float accumulators. No memory.

#include <cstddef>
#include <cstdint>

#include <kvarn/cuda/attention/fragments.cuh>

namespace kvarn::cuda::detail {

/// Steps whose codes are under way: two, but for pieces that take many registers.
template <int Bits, int Columns>
inline constexpr int steps_ahead = code_piece<Bits, Columns>::words > 2 ? 1 : 2;

/// A span of K's codes, channel-major.
struct key_span {
    const std::byte* codes;   // of the record
    const std::byte* scale;   // [dk] halves
    const std::byte* zero;    // [dk] halves
    std::uint32_t row_bytes;  // of a channel's codes
    int channels, first;      // dk; the span's first token in the record
};

/// s[i] = sum over channels of query * (code * scale + zero). `query`: the thread's row; `largest`: of its magnitudes times scale.
template <int Bits, int P, class Team>
KVARN_DEVICE KVARN_INLINE void multiply_keys(Team& team, const key_span& k, const float* query, float largest, int lane,
                                             float (&s)[2 * P]) noexcept
{
    constexpr int ahead = steps_ahead<Bits, P>;
    const int g = lane / 4, j = lane % 4;
    const weight_scale scale(largest);
    std::uint32_t next = opaque(4 * static_cast<std::uint32_t>(j) * k.row_bytes);
    code_piece<Bits, P> codes[ahead][4];
    float sum[P][4] = {}, zeros = 0.0f;
    const auto load = [&](code_piece<Bits, P>(&to)[4]) {
        KVARN_UNROLL
        for (int i = 0; i < 4; ++i)
            to[i] = load_piece<Bits, P>(k.codes + (next + static_cast<std::uint32_t>(i) * k.row_bytes), k.first + P * g);
        next = opaque(next + 16 * k.row_bytes);
    };
    KVARN_UNROLL
    for (int u = 0; u < ahead; ++u) load(codes[u]);
    for (int channel = 0; channel < k.channels; channel += 16 * ahead) {
        KVARN_UNROLL
        for (int u = 0; u < ahead; ++u) {
            const int at = channel + 16 * u + 4 * j;
            float by[4], zero[4], w[4];
            load_scalars(k.scale + 2 * at, by);
            load_scalars(k.zero + 2 * at, zero);
            const quad q = *reinterpret_cast<const quad*>(query + at);
            KVARN_UNROLL
            for (int i = 0; i < 4; ++i) {
                const float x = bits_as<float>(q.w[i]);
                zeros = fma(x, zero[i], zeros);
                w[i] = mul(mul(x, scale.up), by[i]);
            }
            std::uint32_t a[4];
            split_weights(w[0], w[1], a[0], a[1]);
            split_weights(w[2], w[3], a[2], a[3]);
            multiply_pieces(team, a, codes[u], sum);
            if (channel + 16 * (u + ahead) < k.channels) load(codes[u]);
        }
    }
    zeros = row_sum(team, zeros);
    KVARN_UNROLL
    for (int n = 0; n < P; ++n) {
        const float down = mul(scale.down, power_of_two(-code_position<Bits>(n)));
        s[n] = fma(product_of(sum[n], 0), down, zeros);
        s[P + n] = fma(product_of(sum[n], 1), down, zeros);
    }
}

/// V's codes of a span, token-major; `codes` at the span's first token.
struct value_span {
    const std::byte* codes;
    std::uint32_t row_bytes;
};

/// y[i] = sum over the span's tokens of weight * code of channel first + 2 V j + i. `f` has the weights times scale.up.
template <int Bits, int V, int P, class Team>
KVARN_DEVICE KVARN_INLINE void multiply_values(Team& team, const value_span& v, const weight_fragments<P / 2>& f, float down,
                                               int first, int lane, float (&y)[2 * V]) noexcept
{
    constexpr int ahead = steps_ahead<Bits, V>;
    const int g = lane / 4, j = lane % 4;
    std::uint32_t next = opaque(2 * P * static_cast<std::uint32_t>(j) * v.row_bytes);
    code_piece<Bits, V> codes[ahead][4];
    float sum[V][4] = {};
    const auto load = [&](code_piece<Bits, V>(&to)[4]) {
        KVARN_UNROLL
        for (int i = 0; i < 4; ++i)
            to[i] = load_piece<Bits, V>(v.codes + (next + static_cast<std::uint32_t>(i) * v.row_bytes), first + V * g);
        next = opaque(next + 4 * v.row_bytes);
    };
    KVARN_UNROLL
    for (int u = 0; u < ahead; ++u) load(codes[u]);
    KVARN_UNROLL
    for (int step = 0; step < P / 2; ++step) {
        multiply_pieces(team, f.a[step], codes[step % ahead], sum);
        if (step + ahead < P / 2) load(codes[step % ahead]);
    }
    KVARN_UNROLL
    for (int n = 0; n < V; ++n) {
        const float by = mul(down, power_of_two(-code_position<Bits>(n)));
        y[n] = mul(product_of(sum[n], 0), by);
        y[V + n] = mul(product_of(sum[n], 1), by);
    }
}

/// K's codes read as V: y = sum over the span's tokens of weight * code of the channels first + 2 j + {0, 1, 8, 9}.
/// `f` is made in the order of code_pairs<Bits, 2 P>.
template <int Bits, int P>
struct key_columns {
    code_piece<Bits, 2 * P> codes[2];

    KVARN_DEVICE KVARN_INLINE void load(const key_span& k, int first, int lane) noexcept
    {
        const std::uint32_t at = opaque(static_cast<std::uint32_t>(first + lane / 4) * k.row_bytes);
        KVARN_UNROLL
        for (int n = 0; n < 2; ++n)
            codes[n] = load_piece<Bits, 2 * P>(k.codes + (at + (n == 0 ? 0u : 8 * k.row_bytes)), k.first + 2 * P * (lane % 4));
    }
    template <class Team>
    KVARN_DEVICE KVARN_INLINE void multiply(Team& team, const weight_fragments<P / 2>& f, float down,
                                            float (&y)[4]) const noexcept
    {
        float sum[2][4] = {};
        KVARN_UNROLL
        for (int step = 0; step < P / 2; ++step) {
            KVARN_UNROLL
            for (int n = 0; n < 2; ++n) {
                const std::uint32_t b[2] = {code_pairs<Bits, 2 * P>::get(codes[n], 2 * step),
                                            code_pairs<Bits, 2 * P>::get(codes[n], 2 * step + 1)};
                team.mma(sum[n], f.a[step], b);
            }
        }
        KVARN_UNROLL
        for (int i = 0; i < 4; ++i) y[i] = mul(product_of(sum[i / 2], i % 2), down);
    }
};

/// s[i] += sum over n channels, a multiple of 8, of query * exact key of token i; `token(m)` is the vector of token P g + m of the
/// span, aligned to a Piece. Queries behind the n channels are 0 up to a multiple of 32.
template <class T, class Piece, int P, class Token, class Team>
KVARN_DEVICE KVARN_INLINE void multiply_exact_keys(Team& team, const float* query, int n, Token&& token, int lane,
                                                   float (&s)[2 * P]) noexcept
{
    constexpr int together = 4;  // tokens of a thread
    KVARN_UNROLL
    for (int first = 0; first < P; first += together) {
        float sum[together][4] = {};
        const T* at[together];
        KVARN_UNROLL
        for (int m = 0; m < together; ++m) at[m] = token(first + m);
        for (int block = 0; block < n; block += 32) {
            const int own = block + 8 * (lane % 4), from = own < n ? own : block;
            std::uint32_t a[4][4];
            KVARN_UNROLL
            for (int i = 0; i < 2; ++i) {
                const quad q = *reinterpret_cast<const quad*>(query + own + 4 * i);
                KVARN_UNROLL
                for (int k = 0; k < 4; ++k)
                    split_tf32(bits_as<float>(q.w[k]), a[2 * i + k / 2][k % 2 * 2], a[2 * i + k / 2][k % 2 * 2 + 1]);
            }
            KVARN_UNROLL
            for (int m = 0; m < together; ++m) {
                float x[8];
                load<Piece>(at[m] + from, x);
                KVARN_UNROLL
                for (int k = 0; k < 4; ++k) multiply_exact<T>(team, a[k], x[2 * k], x[2 * k + 1], sum[m]);
            }
        }
        KVARN_UNROLL
        for (int m = 0; m < together; ++m) {
            s[first + m] = add(s[first + m], product_of(sum[m], 0));
            s[P + first + m] = add(s[P + first + m], product_of(sum[m], 1));
        }
    }
}

/// y[i] = sum over the span's tokens of weight w * exact value of channel first + 16 j + i; `token(i)` is the vector of the
/// thread's token i.
template <class T, int P, class Token, class Team>
KVARN_DEVICE KVARN_INLINE void multiply_exact_values(Team& team, const float (&w)[2 * P], Token&& token, int first, int lane,
                                                     float (&y)[16]) noexcept
{
    float sum[8][4] = {};
    KVARN_UNROLL
    for (int step = 0; step < P; ++step) {
        std::uint32_t a[4];
        split_tf32(w[2 * step], a[0], a[1]);
        split_tf32(w[2 * step + 1], a[2], a[3]);
        float x[2][8];
        KVARN_UNROLL
        for (int i = 0; i < 2; ++i) load<quad>(token(2 * step + i) + first + 8 * (lane / 4), x[i]);
        KVARN_UNROLL
        for (int n = 0; n < 8; ++n) multiply_exact<T>(team, a, x[0][n], x[1][n], sum[n]);
    }
    KVARN_UNROLL
    for (int n = 0; n < 8; ++n) {
        y[n] = product_of(sum[n], 0);
        y[8 + n] = product_of(sum[n], 1);
    }
}

}  // namespace kvarn::cuda::detail
