// SPDX-License-Identifier: Apache-2.0
#pragma once
// The members of kernels<neon64> that need AArch64 intrinsics. Included by simd/xsimd.hpp only.

#include <arm_neon.h>

#include <kvarn/simd/wide_packing.hpp>
#include <kvarn/simd/xsimd.hpp>

namespace kvarn::simd {

template <>
struct kernels<neon64> : xsimd_kernels<xsimd::neon64>, wide_packing {
    using base = xsimd_kernels<xsimd::neon64>;
    using base::load;
    using base::store;

    // xsimd 8.1 estimates roots and quotients here, and negates and adds apart; these round once.
    KVARN_INLINE static reg div(reg a, reg b) noexcept { return pinned(reg(vdivq_f32(a, divisor(b, a)))); }
    KVARN_INLINE static reg sqrt(reg a) noexcept { return pinned(reg(vsqrtq_f32(a))); }
    KVARN_INLINE static reg fma(reg a, reg b, reg c) noexcept { return pinned(reg(vfmaq_f32(c, a, b))); }
    KVARN_INLINE static reg fnma(reg a, reg b, reg c) noexcept { return pinned(reg(vfmsq_f32(c, a, b))); }
    KVARN_INLINE static reg code_value(reg code, reg scale, reg zero) noexcept { return fma(code, scale, zero); }

    KVARN_INLINE static reg load(const half* p) noexcept
    {
        return reg(vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(reinterpret_cast<const std::uint16_t*>(p)))));
    }
    KVARN_INLINE static reg load(const bfloat16* p) noexcept
    {
        return reg(vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(reinterpret_cast<const std::uint16_t*>(p)), 16)));
    }
    KVARN_INLINE static void store(half* p, reg x) noexcept
    {
        const float32x4_t bounded = vminq_f32(vmaxq_f32(x, vdupq_n_f32(-65504.0f)), vdupq_n_f32(65504.0f));
        store(reinterpret_cast<bounded_half*>(p), reg(bounded));
    }
    KVARN_INLINE static void store(bounded_half* p, reg x) noexcept
    {
        vst1_u16(reinterpret_cast<std::uint16_t*>(p), vreinterpret_u16_f16(vcvt_f16_f32(x)));
    }
    KVARN_INLINE static void store(bfloat16* p, reg x) noexcept
    {
        const uint32x4_t u = vreinterpretq_u32_f32(x);
        const uint32x4_t odd = vandq_u32(vshrq_n_u32(u, 16), vdupq_n_u32(1));
        const uint32x4_t rounded = vaddq_u32(u, vaddq_u32(odd, vdupq_n_u32(0x7fff)));
        vst1_u16(reinterpret_cast<std::uint16_t*>(p), vshrn_n_u32(rounded, 16));
    }

    KVARN_INLINE static float reduce_min(reg x) noexcept { return vminvq_f32(x); }
    KVARN_INLINE static float reduce_max(reg x) noexcept { return vmaxvq_f32(x); }
    KVARN_INLINE static float reduce_add(reg x) noexcept
    {
        const reg y = add(x, reg(vextq_f32(x, x, 2)));
        return vgetq_lane_f32(add(y, reg(vextq_f32(y, y, 1))), 0);
    }

    KVARN_INLINE static void transpose(reg (&x)[4]) noexcept
    {
        const auto zip = [](float32x4_t a, float32x4_t b, bool high) {
            return vreinterpretq_f64_f32(high ? vtrn2q_f32(a, b) : vtrn1q_f32(a, b));
        };
        const float64x2_t a = zip(x[0], x[1], false), b = zip(x[0], x[1], true);
        const float64x2_t c = zip(x[2], x[3], false), d = zip(x[2], x[3], true);
        x[0] = reg(vreinterpretq_f32_f64(vtrn1q_f64(a, c)));
        x[1] = reg(vreinterpretq_f32_f64(vtrn1q_f64(b, d)));
        x[2] = reg(vreinterpretq_f32_f64(vtrn2q_f64(a, c)));
        x[3] = reg(vreinterpretq_f32_f64(vtrn2q_f64(b, d)));
    }

    KVARN_INLINE static reg sum_rows(const reg (&x)[4]) noexcept
    {
        reg t[4] = {x[0], x[1], x[2], x[3]};
        transpose(t);
        return add(add(t[0], t[2]), add(t[1], t[3]));
    }

    template <int Span>
    KVARN_INLINE static reg butterfly(reg x) noexcept
    {
        if constexpr (Span == 1) {
            const float32x4_t sign = {1, -1, 1, -1};
            return fma(x, reg(sign), reg(vrev64q_f32(x)));
        } else {
            const float32x4_t sign = {1, 1, -1, -1};
            return fma(x, reg(sign), reg(vextq_f32(x, x, 2)));
        }
    }

    KVARN_INLINE static reg magnitude(reg a) noexcept { return reg(vabsq_f32(a)); }
    KVARN_INLINE static reg rounded(reg a) noexcept { return reg(vrndnq_f32(a)); }
    KVARN_INLINE static reg load_codes(const std::uint8_t* p) noexcept
    {
        std::uint32_t four;
        std::memcpy(&four, p, sizeof four);
        const uint8x8_t bytes = vreinterpret_u8_u32(vdup_n_u32(four));
        return reg(vcvtq_f32_u32(vmovl_u16(vget_low_u16(vmovl_u8(bytes)))));
    }
    KVARN_INLINE static void store_codes(std::uint8_t* p, const reg (&x)[4], reg scale) noexcept
    {
        const reg magic = broadcast(12582912.0f);
        uint16x4_t w[4];
        KVARN_UNROLL
        for (int i = 0; i < 4; ++i) w[i] = vmovn_u32(vreinterpretq_u32_f32(fma(x[i], scale, magic)));
        const uint8x8_t low = vmovn_u16(vcombine_u16(w[0], w[1])), high = vmovn_u16(vcombine_u16(w[2], w[3]));
        vst1q_u8(p, vcombine_u8(low, high));
    }

    KVARN_INLINE static reg power_of_two(reg shifted) noexcept
    {
        return reg(vreinterpretq_f32_s32(vshlq_n_s32(vreinterpretq_s32_f32(shifted), 23)));
    }
    KVARN_INLINE static void store_words(std::int16_t* p, const reg (&x)[4], reg scale) noexcept
    {
        const reg magic = broadcast(12582912.0f);
        KVARN_UNROLL
        for (int i = 0; i < 4; ++i) vst1_s16(p + 4 * i, vmovn_s32(vreinterpretq_s32_f32(fma(x[i], scale, magic))));
    }

    KVARN_INLINE static void store_bytes(std::int8_t* p, const reg (&x)[4], reg scale) noexcept
    {
        store_codes(reinterpret_cast<std::uint8_t*>(p), x, scale);  // the low bytes, whatever the sign
    }

    static constexpr int most_byte_heads = 4;

    // Sixteen columns at a time: a table lookup puts the two bytes that hold a code into its word, a shift and a mask free it.
    template <int Bits, int Heads>
    KVARN_INLINE static void multiply_words(const std::uint8_t* codes, int rows, int columns, const std::int16_t* const (&weights)[Heads],
                                            float* const (&sums)[Heads], read_ahead& ahead) noexcept
    {
        for (int c = 0; c < columns; c += 16) {
            int32x4_t sum[Heads][4];
            KVARN_UNROLL
            for (int h = 0; h < Heads; ++h)
                KVARN_UNROLL
                for (int j = 0; j < 4; ++j) sum[h][j] = vdupq_n_s32(0);
            for (int i = 0; i < rows; ++i) {
                const code_words x = gather<Bits>(codes + (static_cast<std::ptrdiff_t>(i) * columns + c) * Bits / 8);
                const int16x8_t low = vreinterpretq_s16_u16(x.low), high = vreinterpretq_s16_u16(x.high);
                KVARN_UNROLL
                for (int h = 0; h < Heads; ++h) {
                    const int16x4_t w = vld1_dup_s16(weights[h] + i);
                    sum[h][0] = vmlal_s16(sum[h][0], vget_low_s16(low), w);
                    sum[h][1] = vmlal_high_s16(sum[h][1], low, vcombine_s16(w, w));
                    sum[h][2] = vmlal_s16(sum[h][2], vget_low_s16(high), w);
                    sum[h][3] = vmlal_high_s16(sum[h][3], high, vcombine_s16(w, w));
                }
                if (i % 2 == 0) ahead.touch();
            }
            KVARN_UNROLL
            for (int h = 0; h < Heads; ++h)
                KVARN_UNROLL
                for (int j = 0; j < 4; ++j) vst1q_f32(sums[h] + c + 4 * j, vcvtq_f32_s32(sum[h][j]));
        }
    }
    KVARN_INLINE static std::int32_t sum_bytes(const std::int8_t* p, int n) noexcept
    {
        int32x4_t sum = vdupq_n_s32(0);
        for (int i = 0; i < n; i += 16) sum = vpadalq_s16(sum, vpaddlq_s8(vld1q_s8(p + i)));
        return vaddvq_s32(sum);
    }
    KVARN_INLINE static std::int32_t sum_bytes(const std::uint8_t* p, int n) noexcept
    {
        uint32x4_t sum = vdupq_n_u32(0);
        for (int i = 0; i < n; i += 16) sum = vpadalq_u16(sum, vpaddlq_u8(vld1q_u8(p + i)));
        return static_cast<std::int32_t>(vaddvq_u32(sum));
    }

    // Products of bytes into 16-bit sums, signed as the weights are, which go into 32-bit ones before they could overflow.
    template <int Bits, int Heads, class Byte>
    KVARN_INLINE static void multiply_bytes(const std::uint8_t* codes, int rows, int columns, const Byte* const (&weights)[Heads],
                                            float* const (&sums)[Heads], read_ahead& ahead) noexcept
    {
        constexpr int some = (std::is_signed_v<Byte> ? 32767 / 128 : 65535 / 255) / ((1 << Bits) - 1) / 4 * 4;  // rows
        for (int c = 0; c < columns; c += 16) {
            int32x4_t sum[Heads][4];
            KVARN_UNROLL
            for (int h = 0; h < Heads; ++h)
                KVARN_UNROLL
                for (int j = 0; j < 4; ++j) sum[h][j] = vdupq_n_s32(0);
            for (int first = 0; first < rows; first += some) {
                const int end = rows - first < some ? rows : first + some;
                byte_sums<Byte> part[Heads][2];
                KVARN_UNROLL
                for (int h = 0; h < Heads; ++h) part[h][0] = part[h][1] = {};
                for (int i = first; i < end; ++i) {
                    const uint8x16_t x = code_bytes<Bits>(codes + (static_cast<std::ptrdiff_t>(i) * columns + c) * Bits / 8);
                    KVARN_UNROLL
                    for (int h = 0; h < Heads; ++h) {
                        part[h][0].add(vget_low_u8(x), weights[h][i]);
                        part[h][1].add(vget_high_u8(x), weights[h][i]);
                    }
                    if (i % 2 == 0) ahead.touch();
                }
                KVARN_UNROLL
                for (int h = 0; h < Heads; ++h)
                    KVARN_UNROLL
                    for (int j = 0; j < 2; ++j) part[h][j].flush(sum[h][2 * j], sum[h][2 * j + 1]);
            }
            KVARN_UNROLL
            for (int h = 0; h < Heads; ++h)
                KVARN_UNROLL
                for (int j = 0; j < 4; ++j) vst1q_f32(sums[h] + c + 4 * j, vcvtq_f32_s32(sum[h][j]));
        }
    }

    KVARN_INLINE static void transpose_codes(const std::uint8_t* codes, std::ptrdiff_t stride, std::uint8_t* out) noexcept
    {
        for (int t = 0; t < 32; t += 16) {
            uint8x16x4_t rows;
            KVARN_UNROLL
            for (int i = 0; i < 4; ++i) rows.val[i] = vld1q_u8(codes + i * stride + t);
            vst4q_u8(out + 4 * t, rows);
        }
    }

private:
    /// Eight 16-bit sums of products of codes with bytes.
    template <class Byte>
    struct byte_sums {
        int16x8_t sum = vdupq_n_s16(0);

        KVARN_INLINE void add(uint8x8_t codes, Byte w) noexcept
        {
            if constexpr (std::is_signed_v<Byte>) sum = vmlal_s8(sum, vreinterpret_s8_u8(codes), vdup_n_s8(w));
            else sum = vreinterpretq_s16_u16(vmlal_u8(vreinterpretq_u16_s16(sum), codes, vdup_n_u8(w)));
        }
        KVARN_INLINE void flush(int32x4_t& low, int32x4_t& high) const noexcept
        {
            if constexpr (std::is_signed_v<Byte>) {
                low = vaddw_s16(low, vget_low_s16(sum));
                high = vaddw_high_s16(high, sum);
            } else {
                const uint16x8_t x = vreinterpretq_u16_s16(sum);
                low = vreinterpretq_s32_u32(vaddw_u16(vreinterpretq_u32_s32(low), vget_low_u16(x)));
                high = vreinterpretq_s32_u32(vaddw_high_u16(vreinterpretq_u32_s32(high), x));
            }
        }
    };

    /// Sixteen codes of 2 or 4 bits as bytes.
    struct byte_plan {
        alignas(16) std::uint8_t order[16];
        alignas(16) std::int8_t shift[16];
    };
    template <int Bits>
    static constexpr byte_plan bytes_of = [] {
        byte_plan p{};
        for (int c = 0; c < 16; ++c) {
            p.order[c] = static_cast<std::uint8_t>(c * Bits / 8);
            p.shift[c] = static_cast<std::int8_t>(-(c * Bits % 8));
        }
        return p;
    }();
    template <int Bits>
    KVARN_INLINE static uint8x16_t code_bytes(const std::uint8_t* p) noexcept
    {
        const uint8x16_t bytes = vqtbl1q_u8(vld1q_u8(p), vld1q_u8(bytes_of<Bits>.order));
        const uint8x16_t shifted = vshlq_u8(bytes, vld1q_s8(bytes_of<Bits>.shift));
        return vandq_u8(shifted, vdupq_n_u8((1 << Bits) - 1));
    }

    struct code_words {
        uint16x8_t low, high;
    };
    struct gather_plan {
        alignas(16) std::uint8_t order[32];
        alignas(16) std::int16_t shift[16];
    };
    template <int Bits>
    static constexpr gather_plan plan = [] {
        gather_plan p{};
        for (int c = 0; c < 16; ++c) {
            const int byte = c * Bits / 8;
            p.order[2 * c] = static_cast<std::uint8_t>(byte);
            p.order[2 * c + 1] = static_cast<std::uint8_t>(byte + 1 < 2 * Bits ? byte + 1 : byte);
            p.shift[c] = static_cast<std::int16_t>(-(c * Bits % 8));
        }
        return p;
    }();
    template <int Bits>
    KVARN_INLINE static code_words gather(const std::uint8_t* p) noexcept
    {
        const uint8x16_t bytes = vld1q_u8(p);
        const uint16x8_t mask = vdupq_n_u16((1 << Bits) - 1);
        const uint16x8_t low = vreinterpretq_u16_u8(vqtbl1q_u8(bytes, vld1q_u8(plan<Bits>.order)));
        const uint16x8_t high = vreinterpretq_u16_u8(vqtbl1q_u8(bytes, vld1q_u8(plan<Bits>.order + 16)));
        return {vandq_u16(vshlq_u16(low, vld1q_s16(plan<Bits>.shift)), mask),
                vandq_u16(vshlq_u16(high, vld1q_s16(plan<Bits>.shift + 8)), mask)};
    }
};

}  // namespace kvarn::simd

#if defined(KVARN_HAS_NEON64DOT)
#include <kvarn/simd/neon_dot.hpp>
#endif
