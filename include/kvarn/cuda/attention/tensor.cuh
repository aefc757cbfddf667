// SPDX-License-Identifier: Apache-2.0
#pragma once
// The product of weights and codes on tensor cores, y[row][column] = sum over i of w[row][i] * code[i][column], straight from the
// packed words: codes are the 16 x 16 operand (columns on its rows, i on its columns), up to eight weight rows the other. Codes
// are exact in half; weights are scaled by a power of two and split into two halves, so that about 22 bits of them count. float
// accumulators. 2, 4 and 8 bits. For one thread block of attention_threads.
//
// A warp takes eight words of sixteen rows i at a time: thread 4 g + j has word g of the rows 4 j .. 4 j + 3. Which columns and
// which i meet in one place of the operand is free, as long as both operands agree.

#include <cstddef>
#include <cstdint>

#include <kvarn/cuda/attention/rows.cuh>

namespace kvarn::cuda::detail {

/// How the warps of a block share a product: column blocks of eight words, and slices of the rows.
struct tensor_share {
    int slices, slice_rows;
    int block, slice;  // of this warp; slice >= slices: it has nothing to do

    template <class Team>
    KVARN_DEVICE KVARN_INLINE tensor_share(Team& team, int bits, int n, int columns) noexcept
    {
        const int blocks = columns * bits / 256, warps = attention_threads / 32, warp = team.rank() / 32;
        slices = warps / blocks < n / 16 ? warps / blocks : n / 16;
        slice_rows = n / slices;
        block = warp % blocks;
        slice = warp / blocks;
    }
};

/// The first words of a warp's share, fetched before they are needed.
inline constexpr int words_ahead = 2;  // steps of sixteen rows
struct tensor_words {
    std::uint32_t w[words_ahead][4];
};

/// Words of rows [first, first + 16) for this thread.
KVARN_DEVICE KVARN_INLINE void load_words(const std::byte* codes, int row_words, int first, int block, int lane,
                                          std::uint32_t (&w)[4]) noexcept
{
    const auto* const from =
        reinterpret_cast<const std::uint32_t*>(codes) + (first + lane % 4 * 4) * row_words + block * 8 + lane / 4;
    KVARN_UNROLL
    for (int k = 0; k < 4; ++k) w[k] = from[k * row_words];
}

template <class Team>
KVARN_DEVICE KVARN_INLINE void fetch_words(Team& team, int bits, const std::byte* codes, int n, int columns,
                                           tensor_words& ahead) noexcept
{
    const tensor_share s(team, bits, n, columns);
    if (s.slice >= s.slices) return;
    KVARN_UNROLL
    for (int step = 0; step < words_ahead; ++step)
        if (step * 16 < s.slice_rows)
            load_words(codes, columns * bits / 32, s.slice * s.slice_rows + step * 16, s.block, team.rank() % 32, ahead.w[step]);
}

/// Two codes, in the low bits of both halves of `x`, as a pair of halves: they become the low mantissa bits of 1024.
template <int Bits>
KVARN_DEVICE KVARN_INLINE std::uint32_t codes_to_halves(std::uint32_t x) noexcept
{
    constexpr std::uint32_t mask = ((1u << Bits) - 1u) * 0x10001u;
    const std::uint32_t biased = (x & mask) | 0x64006400u;
#if defined(__CUDA_ARCH__)
    std::uint32_t r;
    asm("sub.rn.f16x2 %0, %1, %2;" : "=r"(r) : "r"(biased), "r"(0x64006400u));
    return r;
#else
    const auto one = [](std::uint32_t bits) {
        return static_cast<std::uint32_t>(narrow_to_half(widen(half{static_cast<std::uint16_t>(bits)}) - 1024.0f).bits);
    };
    return one(biased & 0xffffu) | one(biased >> 16) << 16;
#endif
}

/// The low (Which 0) or high halves of two words, the first below the second.
template <int Which>
KVARN_DEVICE KVARN_INLINE std::uint32_t pair_halves(std::uint32_t a, std::uint32_t b) noexcept
{
    if constexpr (Which == 0)
        return (a & 0xffffu) | b << 16;
    else
        return a >> 16 | (b & 0xffff0000u);
}

/// The warp's share: partial[slice][8][columns]. `weights` is [8][stride] halves; with Twice, [16][stride], of which the second
/// eight rows are added to the first.
template <int Bits, bool Twice, class Team>
KVARN_DEVICE KVARN_INLINE void multiply_share(Team& team, const std::byte* codes, int n, int columns, const half* weights,
                                              int stride, const tensor_words& ahead, float* partial) noexcept
{
    constexpr int each = 32 / Bits;  // columns of a word
    const tensor_share s(team, Bits, n, columns);
    if (s.slice >= s.slices) return;
    const int lane = team.rank() % 32, g = lane / 4, j = lane % 4, first = s.slice * s.slice_rows;
    float sum[each / 2][4] = {};
    for (int step = 0; step * 16 < s.slice_rows; ++step) {
        std::uint32_t w[4];
        if (step == 0 || step == 1) {
            KVARN_UNROLL
            for (int k = 0; k < 4; ++k) w[k] = step == 0 ? ahead.w[0][k] : ahead.w[1][k];
        } else {
            load_words(codes, columns * Bits / 32, first + step * 16, s.block, lane, w);
        }
        std::uint32_t b[2], second[2] = {};
        const auto* const from = reinterpret_cast<const std::uint32_t*>(weights + g * stride + first + step * 16 + j * 4);
        b[0] = from[0], b[1] = from[1];
        if constexpr (Twice) second[0] = from[4 * stride], second[1] = from[4 * stride + 1];
        const std::uint32_t low[2] = {pair_halves<0>(w[0], w[1]), pair_halves<0>(w[2], w[3])};
        const std::uint32_t high[2] = {pair_halves<1>(w[0], w[1]), pair_halves<1>(w[2], w[3])};
        KVARN_UNROLL
        for (int m = 0; m < each / 2; ++m) {
            std::uint32_t a[4];
            KVARN_UNROLL
            for (int k = 0; k < 4; ++k) {  // columns 2 m and 2 m + 1 of the word, rows 0, 1 and 2, 3
                const int column = 2 * m + k % 2;
                a[k] = codes_to_halves<Bits>((column < each / 2 ? low : high)[k / 2] >> (column % (each / 2) * Bits));
            }
            team.mma(sum[m], a, b);
            if constexpr (Twice) team.mma(sum[m], a, second);
        }
    }
    const int column = (s.block * 8 + g) * each;
    KVARN_UNROLL
    for (int m = 0; m < each / 2; ++m) {
        KVARN_UNROLL
        for (int k = 0; k < 4; ++k) partial[(s.slice * 8 + 2 * j + k % 2) * columns + column + 2 * m + k / 2] = sum[m][k];
    }
}

/// y[row][column] for Rows rows, times unscale[row]. Weights as split_weights leaves them. A barrier before; ends with one.
template <int Rows, class Team>
KVARN_DEVICE KVARN_INLINE void multiply_tensor(Team& team, int bits, const std::byte* codes, int n, int columns,
                                               const half* weights, int stride, const tensor_words& ahead, const float* unscale,
                                               float* partial, float* y) noexcept
{
    constexpr bool twice = Rows > 4;
    if (bits == 2)
        multiply_share<2, twice>(team, codes, n, columns, weights, stride, ahead, partial);
    else if (bits == 4)
        multiply_share<4, twice>(team, codes, n, columns, weights, stride, ahead, partial);
    else
        multiply_share<8, twice>(team, codes, n, columns, weights, stride, ahead, partial);
    team.barrier();
    const int slices = tensor_share(team, bits, n, columns).slices;
    for_each(team, Rows * columns, [&](int item) {
        float all = 0.0f;
        for (int s = 0; s < slices; ++s) {
            all = add(all, partial[s * 8 * columns + item]);
            if constexpr (!twice) all = add(all, partial[(s * 8 + 4) * columns + item]);
        }
        y[item] = mul(all, unscale[item / columns]);
    });
    team.barrier();
}

/// One warp: the weights w(i), i < n, of `row` as two halves each: the nearest to w * 2^k in weight row `row`, what remains in
/// row + 4, or + 8 with more than four rows; 2^-k to unscale. k makes the largest between 1 and 2.
template <int Rows, class Team, class Weight>
KVARN_DEVICE KVARN_INLINE void split_weights(Team& team, int row, int n, half* weights, int stride, float* unscale,
                                             Weight&& w) noexcept
{
    const int lane = team.rank() % 32;
    float most = 0.0f;
    for (int i = lane; i < n; i += 32) most = max(most, bits_as<float>(magnitude_bits(w(i))));
    most = warp_max(team, most);
    // The exponent, kept where 2^k and 2^-k are normal numbers.
    std::uint32_t exponent = magnitude_bits(most) >> 23;
    exponent = exponent < 2 ? 2 : exponent > 252 ? 252 : exponent;
    const float scale = bits_as<float>((254u - exponent) << 23);
    if (lane == 0) unscale[row] = bits_as<float>(exponent << 23);
    half* const first = weights + row * stride;
    half* const rest = first + (Rows > 4 ? 8 : 4) * stride;
    for (int i = lane; i < n; i += 32) {
        const float x = mul(w(i), scale);
        first[i] = narrow_to_half(x);
        rest[i] = narrow_to_half(sub(x, widen(first[i])));
    }
}

}  // namespace kvarn::cuda::detail
