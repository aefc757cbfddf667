// SPDX-License-Identifier: Apache-2.0
#pragma once
// kernels<portable>: one lane, plain C++. The reference for the bits of every other kernels<Arch>, and the list of what such
// a type must provide. docs/adding-a-kernel.md explains each member; tests/simd compares all of them with this one.

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include <kvarn/base/element.hpp>
#include <kvarn/simd/arch.hpp>
#include <kvarn/simd/fused.hpp>

namespace kvarn::simd {

/// Bound on a code times the power of two that a kernel may leave it multiplied with: see multiply_words.
[[nodiscard]] KVARN_INLINE constexpr int word_limit(int bits) noexcept { return bits == 2 || bits == 8 ? 256 : 4096; }

/// Rows of one product at most.
inline constexpr int max_product_rows = 576;

/// The seam. `kernels<Arch>` has `width` float lanes in a `reg`; all members are static and force-inlined. Results are rounded
/// one by one: no compiler may fuse, split or reorder operations (KVARN_PIN hides each result from the optimizer).
template <class Arch>
struct kernels;

/// What a product fetches into the second-level cache while it computes, from `at` up to `last`. At an even pace: a processor waits for some
/// twenty lines at once, and many together make it wait for them.
struct read_ahead {
    const std::byte* at = nullptr;
    const std::byte* last = nullptr;

    /// Bytes to fetch, whole lines, where so many of codes are read: a record has scalars besides, and should be there in time.
    [[nodiscard]] KVARN_INLINE static constexpr int beside(int read) noexcept { return (read * 5 / 4 + 63) / 64 * 64; }

    template <int Bytes = 128>
    KVARN_INLINE void touch() noexcept
    {
        if (at >= last) return;
        KVARN_UNROLL
        for (int i = 0; i < Bytes; i += 64) KVARN_PREFETCH(at + i);
        at += Bytes;
    }
};

template <>
struct kernels<portable> {
    static constexpr int width = 1;
    using reg = float;

    KVARN_INLINE static reg broadcast(float x) noexcept { return x; }
    KVARN_INLINE static reg load(const float* p) noexcept { return *p; }
    KVARN_INLINE static void store(float* p, reg x) noexcept { *p = x; }

    /// 16-bit elements: exact on load, nearest-even on store; a stored half saturates at +-65504.
    template <class T>
        requires(sizeof(T) == 2)
    KVARN_INLINE static reg load(const T* p) noexcept
    {
        T x;
        std::memcpy(&x, static_cast<const void*>(p), sizeof x);  // p may have any address: records lie at any
        return to_float(x);
    }
    template <class T>
        requires(sizeof(T) == 2)
    KVARN_INLINE static void store(T* p, reg x) noexcept
    {
        const T rounded = saturate_to<T>(x);
        std::memcpy(static_cast<void*>(p), &rounded, sizeof rounded);
    }

    KVARN_INLINE static reg add(reg a, reg b) noexcept { return pinned(a + b); }
    KVARN_INLINE static reg sub(reg a, reg b) noexcept { return pinned(a - b); }
    KVARN_INLINE static reg mul(reg a, reg b) noexcept { return pinned(a * b); }
    KVARN_INLINE static reg div(reg a, reg b) noexcept { return pinned(a / divisor(b, a)); }
    KVARN_INLINE static reg sqrt(reg a) noexcept { return pinned(std::sqrt(a)); }
    KVARN_INLINE static reg fma(reg a, reg b, reg c) noexcept { return pinned(fused(a, b, c)); }   // a * b + c, rounded once
    KVARN_INLINE static reg fnma(reg a, reg b, reg c) noexcept { return pinned(fused(-a, b, c)); }  // c - a * b, rounded once
    KVARN_INLINE static reg code_value(reg code, reg scale, reg zero) noexcept { return fma(code, scale, zero); }
    KVARN_INLINE static reg minimum(reg a, reg b) noexcept { return a < b ? a : b; }
    KVARN_INLINE static reg maximum(reg a, reg b) noexcept { return a > b ? a : b; }
    KVARN_INLINE static reg magnitude(reg a) noexcept { return std::bit_cast<float>(std::bit_cast<std::uint32_t>(a) & 0x7fffffffu); }
    /// The nearest integer, ties to even, of 0 <= a <= 255.
    KVARN_INLINE static reg rounded(reg a) noexcept { return sub(add(a, 12582912.0f), 12582912.0f); }
    /// a > b ? yes : no, lane by lane.
    KVARN_INLINE static reg where_greater(reg a, reg b, reg yes, reg no) noexcept { return a > b ? yes : no; }

    /// Keeps an accumulator in one register from turn to turn of a loop: see KVARN_HOLD.
    KVARN_INLINE static void hold(reg&) noexcept {}

    KVARN_INLINE static float reduce_min(reg x) noexcept { return x; }
    KVARN_INLINE static float reduce_max(reg x) noexcept { return x; }
    KVARN_INLINE static float reduce_add(reg x) noexcept { return x; }  // halves first, as sum_rows

    /// width registers of width lanes: lane i of x[j] becomes lane j of x[i].
    KVARN_INLINE static void transpose(reg (&)[width]) noexcept {}
    /// Lane i of the result is the sum of the lanes of x[i], halves first: (l, l + width/2), then width/4, ...
    KVARN_INLINE static reg sum_rows(const reg (&x)[width]) noexcept { return x[0]; }
    /// One level of the Walsh-Hadamard transform inside a register: lanes i and i ^ Span, Span < width.
    template <int Span>
    KVARN_INLINE static reg butterfly(reg x) noexcept
    {
        return x;
    }

    /// Bytes to floats and integral floats 0..255 to bytes.
    KVARN_INLINE static reg load_codes(const std::uint8_t* p) noexcept { return static_cast<float>(*p); }
    /// 16 codes from 16 / width registers, each lane round_half_even(x * scale) for 0 <= x * scale <= 255.
    KVARN_INLINE static void store_codes(std::uint8_t* p, const reg (&x)[16 / width], reg scale) noexcept
    {
        for (int i = 0; i < 16; ++i) {
            const float shifted = fma(x[i], scale, 12582912.0f);  // 1.5 * 2^23: the sum's low mantissa bits are the integer
            p[i] = static_cast<std::uint8_t>(std::bit_cast<std::uint32_t>(shifted));
        }
    }

    /// 32 tokens of `width` channels, codes[channel * stride + token], to out[token][channel].
    KVARN_INLINE static void transpose_codes(const std::uint8_t* codes, std::ptrdiff_t, std::uint8_t* out) noexcept
    {
        std::memcpy(out, codes, 32);
    }

    /// The largest of `count` elements' bits without the sign, in each of `rows`: above the bits of the largest finite value if one is not finite.
    KVARN_INLINE static std::uint32_t largest_magnitude(const float* p, std::size_t count, int rows = 1, std::ptrdiff_t stride = 0) noexcept
    {
        std::uint32_t most = 0;
        for (int row = 0; row < rows; ++row, p += stride)
            for (std::size_t i = 0; i < count; ++i) {
                const std::uint32_t bits = std::bit_cast<std::uint32_t>(p[i]) & 0x7fffffffu;
                most = bits > most ? bits : most;
            }
        return most;
    }
    template <class T>
        requires(sizeof(T) == 2)
    KVARN_INLINE static std::uint32_t largest_magnitude(const T* p, std::size_t count, int rows = 1, std::ptrdiff_t stride = 0) noexcept
    {
        std::uint32_t most = 0;
        for (int row = 0; row < rows; ++row, p += stride)
            for (std::size_t i = 0; i < count; ++i) {
                T x;
                std::memcpy(&x, static_cast<const void*>(p + i), sizeof x);
#if defined(KVARN_BIG_ENDIAN)
                if constexpr (std::is_same_v<T, record_half>) x.bits = swap_bytes(x).bits;
#endif
                most = (x.bits & 0x7fffu) > most ? x.bits & 0x7fffu : most;
            }
        return most;
    }

    /// 32 codes of Bits bits, one a byte, to 4 * Bits bytes, and back. `pack32` may write, `unpack32` may read up to 32 bytes.
    template <int Bits>
    KVARN_INLINE static void pack32(const std::uint8_t* codes, std::uint8_t* packed) noexcept
    {
        for (int i = 0; i < 4; ++i) {
            std::uint64_t x = 0;
            for (int j = 0; j < 8; ++j) x |= static_cast<std::uint64_t>(codes[8 * i + j]) << (j * Bits);
            for (int j = 0; j < Bits; ++j) packed[i * Bits + j] = static_cast<std::uint8_t>(x >> (8 * j));
        }
    }
    template <int Bits>
    KVARN_INLINE static void unpack32(const std::uint8_t* packed, std::uint8_t* codes) noexcept
    {
        for (int i = 0; i < 4; ++i) {
            std::uint64_t x = 0;
            for (int j = 0; j < Bits; ++j) x |= static_cast<std::uint64_t>(packed[i * Bits + j]) << (8 * j);
            for (int j = 0; j < 8; ++j) codes[8 * i + j] = static_cast<std::uint8_t>(x >> (j * Bits) & ((1u << Bits) - 1u));
        }
    }

    /// 2^n for `shifted` = 1.5 * 2^23 + 127 + n, -127 <= n <= 127, where 2^-127 is given as 0.
    KVARN_INLINE static reg power_of_two(reg shifted) noexcept
    {
        return std::bit_cast<float>(std::bit_cast<std::uint32_t>(shifted) << 23);
    }
    /// 16 signed 16-bit integers from 16 / width registers, each lane round_half_even(x * scale), |x * scale| <= 32767.
    KVARN_INLINE static void store_words(std::int16_t* p, const reg (&x)[16 / width], reg scale) noexcept
    {
        for (int i = 0; i < 16; ++i) {
            const float shifted = fma(x[i], scale, 12582912.0f);
            p[i] = static_cast<std::int16_t>(std::bit_cast<std::uint32_t>(shifted));
        }
    }

    /// The same to signed bytes, |x * scale| <= 127.
    KVARN_INLINE static void store_bytes(std::int8_t* p, const reg (&x)[16 / width], reg scale) noexcept
    {
        for (int i = 0; i < 16; ++i) {
            const float shifted = fma(x[i], scale, 12582912.0f);
            p[i] = static_cast<std::int8_t>(std::bit_cast<std::uint32_t>(shifted));
        }
    }

    /// The sum of n bytes, signed or not, a multiple of 16.
    template <class Byte>
    KVARN_INLINE static std::int32_t sum_bytes(const Byte* p, int n) noexcept
    {
        std::int32_t sum = 0;
        for (int i = 0; i < n; ++i) sum += p[i];
        return sum;
    }

    /// Rows of weights that multiply_bytes takes at most: 4, or 8 where they gain by sharing a pass.
    static constexpr int most_byte_heads = 4;

    /// Products with packed codes: sums[h][c] = sum over i of weights[h][i] * code[i][c], exact integers, rounded to float once.
    /// Row i is a bit stream of `columns` codes (a multiple of 16); `rows` is a multiple of 4, at most max_product_rows. May read 16 bytes beyond a row.
    /// Words: the sum of |weights[h]| times word_limit(Bits) stays below 2^31. Bytes, for codes of 2 and 4 bits: std::int8_t or std::uint8_t of any value.
    template <int Bits, int Heads>
    KVARN_INLINE static void multiply_words(const std::uint8_t* codes, int rows, int columns, const std::int16_t* const (&weights)[Heads],
                                            float* const (&sums)[Heads], read_ahead& ahead) noexcept
    {
        multiply<Bits, Heads>(codes, rows, columns, weights, sums, ahead);
    }
    template <int Bits, int Heads, class Byte>
    KVARN_INLINE static void multiply_bytes(const std::uint8_t* codes, int rows, int columns, const Byte* const (&weights)[Heads],
                                            float* const (&sums)[Heads], read_ahead& ahead) noexcept
    {
        multiply<Bits, Heads>(codes, rows, columns, weights, sums, ahead);
    }

private:
    template <int Bits, int Heads, class Weight>
    KVARN_INLINE static void multiply(const std::uint8_t* codes, int rows, int columns, const Weight* const (&weights)[Heads],
                                      float* const (&sums)[Heads], read_ahead& ahead) noexcept
    {
        std::uint8_t row[32];
        std::int32_t sum[Heads][32];
        for (int c = 0; c < columns; c += 32) {
            const int block = columns - c < 32 ? 16 : 32;
            std::memset(sum, 0, sizeof sum);
            for (int i = 0; i < rows; ++i) {
                std::uint8_t packed[32] = {};
                std::memcpy(packed, codes + (static_cast<std::ptrdiff_t>(i) * columns + c) * Bits / 8, static_cast<std::size_t>(block * Bits / 8));
                unpack32<Bits>(packed, row);
                for (int h = 0; h < Heads; ++h)
                    for (int j = 0; j < block; ++j)  // as unsigned: scalars that are NaN make weights of any size
                        sum[h][j] = static_cast<std::int32_t>(static_cast<std::uint32_t>(sum[h][j]) +
                                                              static_cast<std::uint32_t>(weights[h][i] * row[j]));
            }
            for (int h = 0; h < Heads; ++h)
                for (int j = 0; j < block; ++j) sums[h][c + j] = static_cast<float>(sum[h][j]);
            ahead.touch();
        }
    }

    /// b, opaque for each a anew: -freciprocal-math multiplies by the reciprocal of a divisor that it sees twice.
    KVARN_INLINE static float divisor(float b, float a) noexcept
    {
        KVARN_PIN_WITH(b, a);
        return b;
    }
    KVARN_INLINE static float pinned(float x) noexcept
    {
        KVARN_PIN(x);
        return x;
    }
};

}  // namespace kvarn::simd
