// SPDX-License-Identifier: Apache-2.0
#pragma once
// kernels<neon64dot>: kernels<neon64> with products by sdot and udot. Included by simd/neon.hpp only.

#include <arm_neon.h>

#include <kvarn/simd/dot_products.hpp>
#include <kvarn/simd/neon.hpp>

#if defined(KVARN_HAS_NEON64DOT)
namespace kvarn::simd {

/// Sums are 32-bit lanes of the same register type.
struct neon_dot {
    using reg = uint8x16_t;
    static constexpr int size = 16, accumulators = 16;

    KVARN_INLINE static reg zero() noexcept { return vdupq_n_u8(0); }
    KVARN_INLINE static reg load(const std::uint8_t* p) noexcept { return vld1q_u8(p); }
    KVARN_INLINE static reg zip_bytes_low(reg a, reg b) noexcept { return vzip1q_u8(a, b); }
    KVARN_INLINE static reg zip_bytes_high(reg a, reg b) noexcept { return vzip2q_u8(a, b); }
    KVARN_INLINE static reg zip_words_low(reg a, reg b) noexcept
    {
        return vreinterpretq_u8_u16(vzip1q_u16(vreinterpretq_u16_u8(a), vreinterpretq_u16_u8(b)));
    }
    KVARN_INLINE static reg zip_words_high(reg a, reg b) noexcept
    {
        return vreinterpretq_u8_u16(vzip2q_u16(vreinterpretq_u16_u8(a), vreinterpretq_u16_u8(b)));
    }

    template <int Parts>
    KVARN_INLINE static reg weights(const std::uint8_t* w) noexcept
    {
        static_assert(Parts == 1);
        std::uint32_t quad;
        std::memcpy(&quad, w, sizeof quad);
        return vreinterpretq_u8_u32(vdupq_n_u32(quad));
    }

    /// Where code K of a byte is multiplied: in place, but for the last one, for which a signed byte has no room.
    template <int Bits, int K>
    static constexpr int position = K == 8 / Bits - 1 ? 0 : K * Bits;

    template <int Bits, int K, bool Signed>
    KVARN_INLINE static reg code(reg x) noexcept
    {
        if constexpr (K == 8 / Bits - 1) return vshrq_n_u8(x, 8 - Bits);
        else return vandq_u8(x, vdupq_n_u8(((1 << Bits) - 1) << position<Bits, K>));
    }
    KVARN_INLINE static reg dot_signed(reg sum, reg codes, reg w) noexcept
    {
        return vreinterpretq_u8_s32(vdotq_s32(vreinterpretq_s32_u8(sum), vreinterpretq_s8_u8(codes), vreinterpretq_s8_u8(w)));
    }
    KVARN_INLINE static reg dot_unsigned(reg sum, reg codes, reg w) noexcept
    {
        return vreinterpretq_u8_u32(vdotq_u32(vreinterpretq_u32_u8(sum), codes, w));
    }
    KVARN_INLINE static reg join_planes(reg high, reg low) noexcept
    {
        return vreinterpretq_u8_u32(vaddq_u32(vshlq_n_u32(vreinterpretq_u32_u8(high), 8), vreinterpretq_u32_u8(low)));
    }

    /// Bytes of sixteen words.
    KVARN_INLINE static void split(const std::int16_t* w, std::uint8_t* high, std::uint8_t* low) noexcept
    {
        const int16x8_t a = vld1q_s16(w), b = vld1q_s16(w + 8);
        vst1q_u8(high, vreinterpretq_u8_s8(vcombine_s8(vshrn_n_s16(a, 8), vshrn_n_s16(b, 8))));
        vst1q_u8(low, vreinterpretq_u8_s8(vcombine_s8(vmovn_s16(a), vmovn_s16(b))));
    }

    /// Sums of four bytes' codes to the floats of their columns.
    template <int Bits, int Parts, bool Signed>
    KVARN_INLINE static void store(const reg (&x)[8 / Bits], float* to) noexcept
    {
        if constexpr (Bits == 4) {
            vst2q_f32(to, (float32x4x2_t{{scaled<Bits, 0>(x[0]), scaled<Bits, 1>(x[1])}}));
        } else {
            vst4q_f32(to, (float32x4x4_t{{scaled<Bits, 0>(x[0]), scaled<Bits, 1>(x[1]), scaled<Bits, 2>(x[2]), scaled<Bits, 3>(x[3])}}));
        }
    }

private:
    template <int Bits, int K>
    KVARN_INLINE static float32x4_t scaled(reg x) noexcept
    {
        const float32x4_t y = vcvtq_f32_s32(vreinterpretq_s32_u8(x));
        return position<Bits, K> == 0 ? y : vmulq_n_f32(y, 1.0f / static_cast<float>(1 << position<Bits, K>));
    }
};

template <>
struct kernels<neon64dot> : kernels<neon64> {
    using dot = dot_products<neon_dot>;

    template <int Bits, int Heads>
    KVARN_INLINE static void multiply_words(const std::uint8_t* codes, int rows, int columns, const std::int16_t* const (&weights)[Heads],
                                            float* const (&sums)[Heads], read_ahead& ahead) noexcept
    {
        if constexpr (Bits == 2 || Bits == 4) dot::words<Bits, Heads>(codes, rows, columns, weights, sums, ahead);
        else kernels<neon64>::multiply_words<Bits, Heads>(codes, rows, columns, weights, sums, ahead);
    }
    template <int Bits, int Heads, class Weight>
    KVARN_INLINE static void multiply_bytes(const std::uint8_t* codes, int rows, int columns, const Weight* const (&weights)[Heads],
                                            float* const (&sums)[Heads], read_ahead& ahead) noexcept
    {
        dot::bytes<Bits, Heads, Weight>(codes, rows, columns, weights, sums, ahead);
    }
};

}  // namespace kvarn::simd
#endif
