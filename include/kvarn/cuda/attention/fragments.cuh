// SPDX-License-Identifier: Apache-2.0
#pragma once
// Operands of tensor cores for one warp: weights of up to eight query rows as the 16 x k operand A, codes or exact values as the
// k x 8 operand B, products in float. Thread 4 g + j of the warp belongs to row g; A's rows g + 8 hold what rounding to half (tf32)
// took from the weights of row g, so that about 22 bits of them count, and c[0] + c[2], c[1] + c[3] are its products.
//
// Codes need no conversion: bits of a word, masked, are subnormal halves, code * 2^(position - 24) exactly. Which index of a sum
// meets which place of the operands is free, as long as A and B agree; so every thread loads pieces of whole rows.

#include <cstddef>
#include <cstdint>

#include <kvarn/cuda/codes.cuh>
#include <kvarn/cuda/team.cuh>

namespace kvarn::cuda::detail {

/// 2^x, |x| <= 126.
KVARN_DEVICE KVARN_INLINE constexpr float power_of_two(int x) noexcept
{
    return bits_as<float>(static_cast<std::uint32_t>(127 + x) << 23);
}

/// Two halves at once, each rounded once: a * b, and a * b + c.
KVARN_DEVICE KVARN_INLINE std::uint32_t multiply_pair(std::uint32_t a, std::uint32_t b) noexcept
{
#if defined(__CUDA_ARCH__)
    std::uint32_t r;
    asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
    return r;
#else
    return narrow_to_half(low_half(a) * low_half(b)).bits |
           static_cast<std::uint32_t>(narrow_to_half(high_half(a) * high_half(b)).bits) << 16;
#endif
}
KVARN_DEVICE KVARN_INLINE std::uint32_t fma_pair(std::uint32_t a, std::uint32_t b, std::uint32_t c) noexcept
{
#if defined(__CUDA_ARCH__)
    std::uint32_t r;
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(b), "r"(c));
    return r;
#else
    return narrow_to_half(fma(low_half(a), low_half(b), low_half(c))).bits |
           static_cast<std::uint32_t>(narrow_to_half(fma(high_half(a), high_half(b), high_half(c))).bits) << 16;
#endif
}
KVARN_DEVICE KVARN_INLINE std::uint32_t max_pair(std::uint32_t a, std::uint32_t b) noexcept
{
#if defined(__CUDA_ARCH__)
    std::uint32_t r;
    asm("max.f16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
    return r;
#else
    const float low = quick_max(low_half(a), low_half(b)), high = quick_max(high_half(a), high_half(b));
    return narrow_to_half(low).bits | static_cast<std::uint32_t>(narrow_to_half(high).bits) << 16;
#endif
}
inline constexpr std::uint32_t magnitudes_mask = 0x7fff7fffu, signs_mask = 0x80008000u, ones_pair = 0x3c003c00u;

/// Two numbers as halves, and what those leave.
struct split_pair {
    std::uint32_t halves, rest;
};
KVARN_DEVICE KVARN_INLINE split_pair split(float x, float y) noexcept
{
    const std::uint32_t halves = narrow_pair<half>(x, y);
    return {halves, narrow_pair<half>(sub(x, low_half(halves)), sub(y, high_half(halves)))};
}
/// The same times two halves, split again.
KVARN_DEVICE KVARN_INLINE split_pair scaled(split_pair x, std::uint32_t by) noexcept
{
    const std::uint32_t halves = multiply_pair(x.halves, by);
    return {halves, fma_pair(x.rest, by, fma_pair(x.halves, by, halves ^ signs_mask))};
}

/// How a record's scalars enter weights: times 2^up, the largest of them lies below 2^`top`, as far as halves reach.
struct scalar_scale {
    std::uint32_t up;  // 2^up twice
    float down;        // 2^-up

    KVARN_DEVICE KVARN_INLINE scalar_scale(float largest, int top) noexcept
    {
        int x = top - 1 - (static_cast<int>(magnitude_bits(largest) >> 23) - 127);
        x = x < -14 ? -14 : x > 15 ? 15 : x;
        up = static_cast<std::uint32_t>(15 + x) * 0x04000400u;
        down = power_of_two(-x);
    }
};
/// What a product with codes is multiplied with, as position 0 of a code counts 2^-24.
inline constexpr float code_unit = 16777216.0f;

/// Whether code n lies within one half of a word; otherwise it is put together.
template <int Bits>
[[nodiscard]] KVARN_HOST_DEVICE KVARN_INLINE constexpr bool is_in_half(int n) noexcept
{
    return n * Bits % 16 + Bits <= 16;
}
/// By how much a half is shifted so that code n lies in the ten bits that a subnormal half has.
template <int Bits>
[[nodiscard]] KVARN_HOST_DEVICE KVARN_INLINE constexpr int code_shift(int n) noexcept
{
    const int at = n * Bits % 16;
    if (!is_in_half<Bits>(n) || at + Bits <= 10) return 0;
    return Bits == 2 ? 10 : Bits == 4 ? 8 : at;  // one shift for several codes where they are even
}
/// The lowest bit of code n in B: it counts 2^position.
template <int Bits>
[[nodiscard]] KVARN_HOST_DEVICE KVARN_INLINE constexpr int code_position(int n) noexcept
{
    return is_in_half<Bits>(n) ? n * Bits % 16 - code_shift<Bits>(n) : 0;
}

/// The low (High: upper) halves of two words, the first below the second.
template <bool High>
KVARN_DEVICE KVARN_INLINE std::uint32_t pair_halves(std::uint32_t a, std::uint32_t b) noexcept
{
#if defined(__CUDA_ARCH__)
    return __byte_perm(a, b, High ? 0x7632 : 0x5410);
#else
    return High ? a >> 16 | (b & 0xffff0000u) : (a & 0xffffu) | b << 16;
#endif
}

/// Code n of two rows, one in each half.
template <int Bits, int Columns>
KVARN_DEVICE KVARN_INLINE std::uint32_t pair_codes(const code_piece<Bits, Columns>& a, const code_piece<Bits, Columns>& b,
                                                   int n) noexcept
{
    if (!is_in_half<Bits>(n)) return code_of(a, n) | code_of(b, n) << 16;
    const int word = n * Bits / 32;
    const std::uint32_t both =
        n * Bits % 32 >= 16 ? pair_halves<true>(a.w[word], b.w[word]) : pair_halves<false>(a.w[word], b.w[word]);
    return both >> code_shift<Bits>(n) & (((1u << Bits) - 1u) << code_position<Bits>(n)) * 0x10001u;
}

/// Pairs of neighbouring codes of one row: which two codes pair q takes, and where they lie. `Bits` 0: of rows, in order.
template <int Bits, int Columns>
struct code_pairs {
    static constexpr int half_codes =
        Bits != 0 && 16 % (Bits + (Bits == 0)) == 0 && Bits * Columns % 32 == 0 ? 16 / (Bits + (Bits == 0)) : 0;

    [[nodiscard]] KVARN_HOST_DEVICE KVARN_INLINE static constexpr int first(int q) noexcept
    {
        if constexpr (half_codes != 0)
            return q / half_codes * 2 * half_codes + q % half_codes;
        else
            return 2 * q;
    }
    [[nodiscard]] KVARN_HOST_DEVICE KVARN_INLINE static constexpr int second(int q) noexcept
    {
        return first(q) + (half_codes != 0 ? half_codes : 1);
    }
    [[nodiscard]] KVARN_HOST_DEVICE KVARN_INLINE static constexpr int position(int q) noexcept
    {
        if constexpr (half_codes != 0)
            return code_position<Bits>(q % half_codes);
        else
            return 0;
    }
    /// Pair q of halves that lie in order in words.
    KVARN_DEVICE KVARN_INLINE static std::uint32_t halves_of(const std::uint32_t (&w)[Columns / 2], int q) noexcept
    {
        if constexpr (half_codes == 0) {
            return w[q];
        } else {
            const std::uint32_t a = w[first(q) / 2], b = w[second(q) / 2];
            return first(q) % 2 != 0 ? pair_halves<true>(a, b) : pair_halves<false>(a, b);
        }
    }
    /// The pair of codes as a word of B.
    KVARN_DEVICE KVARN_INLINE static std::uint32_t get(const code_piece<Bits, Columns>& p, int q) noexcept
    {
        if constexpr (half_codes != 0) {
            const int n = q % half_codes;
            return p.w[q / half_codes] >> code_shift<Bits>(n) & (((1u << Bits) - 1u) << position(q)) * 0x10001u;
        } else {
            return code_of(p, first(q)) | code_of(p, second(q)) << 16;
        }
    }
};

/// A of a sum over 16 Steps indices, four a thread and step: halves and rest of two, then of the others.
template <int Steps>
struct weight_fragments {
    std::uint32_t a[Steps][4];

    KVARN_DEVICE KVARN_INLINE split_pair pair(int q) const noexcept { return {a[q / 2][q % 2 * 2], a[q / 2][q % 2 * 2 + 1]}; }
    KVARN_DEVICE KVARN_INLINE void set(int q, split_pair x) noexcept
    {
        a[q / 2][q % 2 * 2] = x.halves;
        a[q / 2][q % 2 * 2 + 1] = x.rest;
    }
};

/// sum[n] += A times code n of four rows: B's rows 2 j, 2 j + 1, 2 j + 8, 2 j + 9. Column g of B is the piece of thread 4 g + j.
template <int Bits, int Columns, class Team>
KVARN_DEVICE KVARN_INLINE void multiply_pieces(Team& team, const std::uint32_t (&a)[4],
                                               const code_piece<Bits, Columns> (&rows)[4], float (&sum)[Columns][4]) noexcept
{
    KVARN_UNROLL
    for (int n = 0; n < Columns; ++n) {
        const std::uint32_t b[2] = {pair_codes(rows[0], rows[1], n), pair_codes(rows[2], rows[3], n)};
        team.mma(sum[n], a, b);
    }
}

/// The products of row g with columns 2 j (0) and 2 j + 1 (1) of column block n, where codes lie at position 0.
KVARN_DEVICE KVARN_INLINE float product_of(const float (&sum)[4], int column) noexcept
{
    return add(sum[column], sum[column + 2]);
}

/// A float for tf32, and what tf32 has no bits for.
KVARN_DEVICE KVARN_INLINE void split_tf32(float x, std::uint32_t& high, std::uint32_t& rest) noexcept
{
    high = bits_as<std::uint32_t>(x) & 0xffffe000u;
    rest = bits_as<std::uint32_t>(sub(x, bits_as<float>(high)));
}

/// sum += weights x, y (of B's rows j and j + 4) times values of T, which tf32 holds exactly unless they are float.
template <class T, class Team>
KVARN_DEVICE KVARN_INLINE void multiply_exact(Team& team, const std::uint32_t (&a)[4], float x, float y, float (&sum)[4]) noexcept
{
    if constexpr (sizeof(T) == 4) {
        std::uint32_t b[2], rest[2];
        split_tf32(x, b[0], rest[0]);
        split_tf32(y, b[1], rest[1]);
        team.mma_tf32(sum, a, b);
        team.mma_tf32(sum, a, rest);
    } else {
        const std::uint32_t b[2] = {bits_as<std::uint32_t>(x), bits_as<std::uint32_t>(y)};
        team.mma_tf32(sum, a, b);
    }
}

}  // namespace kvarn::cuda::detail
