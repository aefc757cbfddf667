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
    const std::byte* codes;  // of the record
    const std::byte* scale;  // [dk] halves
    const std::byte* zero;   // [dk] halves
    int channels, first;     // dk; the span's first token in the record
};

/// s[i] = sum over channels of query * (code * scale + zero). `query`: A of the queries over row_down, for all steps of sixteen
/// channels; rows of codes are RowBytes apart.
template <int Bits, int P, int RowBytes, class Team>
KVARN_DEVICE KVARN_INLINE void multiply_keys(Team& team, const key_span& k, const quad* query, float row_down,
                                             const scalar_scale& scale, int lane, float (&s)[2 * P]) noexcept
{
    constexpr int ahead = steps_ahead<Bits, P>;
    lane = opaque(lane);  // what follows from it is not kept from tile to tile
    const int g = lane / 4, j = lane % 4;
    const std::byte* codes_at = k.codes + 4 * j * RowBytes;
    code_piece<Bits, P> codes[ahead][4];
    float sum[P][4] = {}, zeros[4] = {};
    const auto load = [&](code_piece<Bits, P>(&to)[4]) {
        KVARN_UNROLL
        for (int i = 0; i < 4; ++i) to[i] = load_piece<Bits, P>(codes_at + i * RowBytes, k.first + P * g);
        codes_at += 16 * RowBytes;
    };
    KVARN_UNROLL
    for (int u = 0; u < ahead; ++u) load(codes[u]);
    const auto* by = reinterpret_cast<const word_pair*>(k.scale) + j;
    const auto* zero = reinterpret_cast<const word_pair*>(k.zero) + j;
    for (int channel = 0; channel < k.channels; channel += 16 * ahead) {
        KVARN_UNROLL
        for (int u = 0; u < ahead; ++u) {
            const quad q = query[(channel / 16 + u) * 32 + lane];
            const word_pair b = by[4 * u], z = zero[4 * u];
            team.mma(zeros, q.w, z.w);
            weight_fragments<1> f;
            KVARN_UNROLL
            for (int i = 0; i < 2; ++i) f.set(i, scaled({q.w[2 * i], q.w[2 * i + 1]}, multiply_pair(b.w[i], scale.up)));
            multiply_pieces(team, f.a[0], codes[u], sum);
            if (channel + 16 * (u + ahead) < k.channels) load(codes[u]);
        }
        by += 4 * ahead;
        zero += 4 * ahead;
    }
    const float zero_sum = mul(product_of(zeros, 0), row_down), down = mul(mul(scale.down, code_unit), row_down);
    KVARN_UNROLL
    for (int n = 0; n < P; ++n) {
        const float unit = mul(down, power_of_two(-code_position<Bits>(n)));
        s[n] = fma(product_of(sum[n], 0), unit, zero_sum);
        s[P + n] = fma(product_of(sum[n], 1), unit, zero_sum);
    }
}

/// N / 2 words of stored halves, from an 8-byte aligned address.
template <int N>
KVARN_DEVICE KVARN_INLINE void load_halves(const std::byte* from, std::uint32_t (&x)[N / 2]) noexcept
{
    KVARN_UNROLL
    for (int i = 0; i < N / 4; ++i) {
        const word_pair two = reinterpret_cast<const word_pair*>(from)[i];
        x[2 * i] = two.w[0], x[2 * i + 1] = two.w[1];
    }
}

/// Softmax weights of a span, times 2^weight_shift, as A of the sums over its tokens, and what a sum is multiplied with.
inline constexpr int weight_shift = 10;  // small weights keep their bits as halves
template <class Pairs, int P>
struct span_weights {
    weight_fragments<P / 2> f;
    float total;  // of the row's weights
    float zeros;  // sum of weight * zero
    float down;   // of sums over codes

    /// `p`: the thread's weights; `scale`, `zero`: of its tokens, where they lie in the record.
    template <class Team>
    KVARN_DEVICE KVARN_INLINE span_weights(Team& team, const float (&p)[2 * P], const std::byte* scale, const std::byte* zero,
                                           int lane) noexcept
    {
        constexpr float unshift = power_of_two(-weight_shift);
        std::uint32_t w[P];
        load_halves<2 * P>(zero, w);
        float sums[4] = {};  // even columns: of weight * zero, odd ones: of the weights
        const bool odd = lane / 4 % 2 != 0;
        KVARN_UNROLL
        for (int q = 0; q < P; ++q) f.set(q, split(p[Pairs::first(q)], p[Pairs::second(q)]));
        KVARN_UNROLL
        for (int step = 0; step < P / 2; ++step) {
            const std::uint32_t x = Pairs::halves_of(w, 2 * step), y = Pairs::halves_of(w, 2 * step + 1);
            const std::uint32_t b[2] = {odd ? ones_pair : x, odd ? ones_pair : y};
            team.mma(sums, f.a[step], b);
        }
        zeros = mul(product_of(sums, 0), unshift);
        total = mul(product_of(sums, 1), unshift);
        load_halves<2 * P>(scale, w);
        std::uint32_t most = 0;
        KVARN_UNROLL
        for (int i = 0; i < P; ++i) most = max_pair(most, w[i] & magnitudes_mask);
        most = max_pair(most, team.shuffle_xor(most, 1));
        most = max_pair(most, team.shuffle_xor(most, 2));
        const scalar_scale s(quick_max(low_half(most), high_half(most)), 14 - weight_shift);
        KVARN_UNROLL
        for (int q = 0; q < P; ++q) {
            std::uint32_t by = multiply_pair(Pairs::halves_of(w, q), s.up);
            // Codes that do not lie at position 0 count more than their weights.
            if (Pairs::position(q) != 0)
                by = multiply_pair(by, static_cast<std::uint32_t>(15 - Pairs::position(q)) * 0x04000400u);
            f.set(q, scaled(f.pair(q), by));
        }
        down = mul(s.down, code_unit * unshift);
    }
};

/// y[i] = zeros + sum over the span's tokens of weight * code of channel first + 2 V j + i. `codes` at V's first token of the span;
/// rows of codes are row_bytes apart.
template <int Bits, int V, int P, class Team>
KVARN_DEVICE KVARN_INLINE void multiply_values(Team& team, const std::byte* codes, std::uint32_t row_bytes,
                                               const span_weights<code_pairs<0, 2 * P>, P>& w, int first, int lane,
                                               float (&y)[2 * V]) noexcept
{
    constexpr int ahead = steps_ahead<Bits, V>;
    lane = opaque(lane);
    const int g = lane / 4, j = lane % 4;
    std::uint32_t next = opaque(2 * P * static_cast<std::uint32_t>(j) * row_bytes);
    code_piece<Bits, V> pieces[ahead][4];
    float sum[V][4] = {};
    const auto load = [&](code_piece<Bits, V>(&to)[4]) {
        const std::byte* const row = codes + next;
        KVARN_UNROLL
        for (int i = 0; i < 4; ++i) to[i] = load_piece<Bits, V>(row + static_cast<std::uint32_t>(i) * row_bytes, first + V * g);
        next = opaque(next + 4 * row_bytes);
    };
    KVARN_UNROLL
    for (int u = 0; u < ahead; ++u) load(pieces[u]);
    KVARN_UNROLL
    for (int step = 0; step < P / 2; ++step) {
        multiply_pieces(team, w.f.a[step], pieces[step % ahead], sum);
        if (step + ahead < P / 2) load(pieces[step % ahead]);
    }
    KVARN_UNROLL
    for (int n = 0; n < V; ++n) {
        const float unit = mul(w.down, power_of_two(-code_position<Bits>(n)));
        y[n] = fma(product_of(sum[n], 0), unit, w.zeros);
        y[V + n] = fma(product_of(sum[n], 1), unit, w.zeros);
    }
}

/// K's codes read as V: y = sum over the span's tokens of weight * code of the channels first + 2 j + {0, 1, 8, 9}; rows of codes
/// are RowBytes apart.
template <int Bits, int P, int RowBytes>
struct key_columns {
    code_piece<Bits, 2 * P> codes[2];

    KVARN_DEVICE KVARN_INLINE void load(const key_span& k, int first, int lane) noexcept
    {
        lane = opaque(lane);
        const std::byte* const row = k.codes + (first + lane / 4) * RowBytes;
        KVARN_UNROLL
        for (int n = 0; n < 2; ++n) codes[n] = load_piece<Bits, 2 * P>(row + 8 * n * RowBytes, k.first + 2 * P * (lane % 4));
    }
    template <class Team>
    KVARN_DEVICE KVARN_INLINE void multiply(Team& team, const span_weights<code_pairs<Bits, 2 * P>, P>& w,
                                            float (&y)[4]) const noexcept
    {
        float sum[2][4] = {};
        KVARN_UNROLL
        for (int step = 0; step < P / 2; ++step) {
            KVARN_UNROLL
            for (int n = 0; n < 2; ++n) {
                const std::uint32_t b[2] = {code_pairs<Bits, 2 * P>::get(codes[n], 2 * step),
                                            code_pairs<Bits, 2 * P>::get(codes[n], 2 * step + 1)};
                team.mma(sum[n], w.f.a[step], b);
            }
        }
        KVARN_UNROLL
        for (int i = 0; i < 4; ++i) y[i] = mul(product_of(sum[i / 2], i % 2), w.down);
    }
};

/// s[i] += sum over n channels, a multiple of 8, of query * exact key of token i; `token(m)` is the vector of token P g + m of the
/// span, aligned to a Piece. Queries behind the n channels are 0 up to a multiple of 32.
template <class T, class Piece, int P, class Token, class Team>
KVARN_DEVICE KVARN_INLINE void multiply_exact_keys(Team& team, const float* query, int n, Token&& token, int lane,
                                                   float (&s)[2 * P]) noexcept
{
    constexpr int together = 4;  // tokens of a thread
    lane = opaque(lane);
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
    lane = opaque(lane);
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
