// SPDX-License-Identifier: Apache-2.0
#pragma once
// The members of kernels<sse2> that xsimd has no word for: every x86-64, and 32-bit x86 with -msse2 -mfpmath=sse. There is neither a
// fused multiply-add nor a half conversion nor a byte shuffle; same bits all the same. Included by simd/xsimd.hpp only.

#include <emmintrin.h>

#include <kvarn/simd/sse2_products.hpp>
#include <kvarn/simd/xsimd.hpp>

namespace kvarn::simd {

template <>
struct kernels<sse2> : xsimd_kernels<xsimd::sse2>, sse2_packing, sse2_products {
    using base = xsimd_kernels<xsimd::sse2>;
    using base::load;
    using base::store;

    /// Four emulated_fma at once: the sums in double, and a second look where one may lie between two floats.
    KVARN_INLINE static reg fma(reg a, reg b, reg c) noexcept
    {
        const reg(&x)[1] = {a}, (&y)[1] = {b}, (&z)[1] = {c};
        reg r[1];
        fma_all(x, y, z, r);
        return r[0];
    }
    KVARN_INLINE static reg fnma(reg a, reg b, reg c) noexcept { return fma(negated(a), b, c); }
    /// The same for several registers, with one second look for all of them.
    template <int N>
    KVARN_INLINE static void fma_all(const reg (&a)[N], const reg (&b)[N], const reg (&c)[N], reg (&r)[N]) noexcept
    {
        __m128i doubtful = _mm_setzero_si128();
        KVARN_UNROLL
        for (int i = 0; i < N; ++i) {
            const doubles x = widen(a[i]), y = widen(b[i]), z = widen(c[i]);
            __m128d low = _mm_add_pd(_mm_mul_pd(x.low, y.low), z.low), high = _mm_add_pd(_mm_mul_pd(x.high, y.high), z.high);
            KVARN_PIN(low);
            KVARN_PIN(high);
            r[i] = reg(_mm_movelh_ps(_mm_cvtpd_ps(low), _mm_cvtpd_ps(high)));
            const __m128i tails = _mm_castps_si128(_mm_shuffle_ps(_mm_castpd_ps(low), _mm_castpd_ps(high), 0x88));
            doubtful = _mm_or_si128(doubtful, _mm_cmpeq_epi32(_mm_slli_epi32(tails, 4), _mm_setzero_si128()));
        }
        if (_mm_movemask_epi8(doubtful) != 0) [[unlikely]] {
            operands<N> x;
            KVARN_UNROLL
            for (int i = 0; i < N; ++i) x.a[i] = a[i], x.b[i] = b[i], x.c[i] = c[i], x.r[i] = r[i];
            settle(x);
            KVARN_UNROLL
            for (int i = 0; i < N; ++i) r[i] = reg(x.r[i]);
        }
    }
    /// fma where a * b is exact: a code times a half.
    KVARN_INLINE static reg code_value(reg code, reg scale, reg zero) noexcept { return add(mul(code, scale), zero); }

    KVARN_INLINE static reg load(const half* p) noexcept
    {
        const __m128i bits = _mm_unpacklo_epi16(load8(p), _mm_setzero_si128());
        const __m128i magnitude = _mm_and_si128(bits, _mm_set1_epi32(0x7fff)), sign = _mm_slli_epi32(_mm_xor_si128(bits, magnitude), 16);
        const __m128i normal = _mm_add_epi32(_mm_slli_epi32(magnitude, 13), _mm_set1_epi32(0x38000000));
        const __m128i subnormal = _mm_castps_si128(_mm_mul_ps(_mm_cvtepi32_ps(magnitude), _mm_set1_ps(0x1p-24f)));
        const __m128i not_finite = _mm_and_si128(_mm_cmpgt_epi32(magnitude, _mm_set1_epi32(0x7bff)), _mm_set1_epi32(0x7f800000));
        const __m128i value = select(_mm_cmpgt_epi32(_mm_set1_epi32(0x400), magnitude), subnormal, normal);
        return reg(_mm_castsi128_ps(_mm_or_si128(_mm_or_si128(value, not_finite), sign)));
    }
    KVARN_INLINE static reg load(const bfloat16* p) noexcept
    {
        return reg(_mm_castsi128_ps(_mm_unpacklo_epi16(_mm_setzero_si128(), load8(p))));
    }
    KVARN_INLINE static void store(half* p, reg x) noexcept
    {
        const __m128 bounded = _mm_min_ps(_mm_max_ps(x, _mm_set1_ps(-65504.0f)), _mm_set1_ps(65504.0f));
        store(reinterpret_cast<bounded_half*>(p), reg(bounded));
    }
    KVARN_INLINE static void store(bounded_half* p, reg x) noexcept
    {
        const __m128i bits = _mm_castps_si128(x), magnitude = _mm_and_si128(bits, _mm_set1_epi32(0x7fffffff));
        const __m128i odd = _mm_and_si128(_mm_srli_epi32(magnitude, 13), _mm_set1_epi32(1));
        const __m128i rounded = _mm_add_epi32(magnitude, _mm_add_epi32(odd, _mm_set1_epi32(0xfff - 0x38000000)));
        // Added to 1/2, a number below 2^-14 is rounded to a multiple of 2^-24.
        const __m128 small_sum = _mm_add_ps(_mm_castsi128_ps(magnitude), _mm_set1_ps(0.5f));
        const __m128i subnormal = _mm_sub_epi32(_mm_castps_si128(small_sum), _mm_set1_epi32(0x3f000000));
        const __m128i value = select(_mm_cmpgt_epi32(_mm_set1_epi32(0x38800000), magnitude), subnormal, _mm_srli_epi32(rounded, 13));
        store_low(p, _mm_or_si128(value, _mm_slli_epi32(_mm_srli_epi32(bits, 31), 15)));
    }
    KVARN_INLINE static void store(bfloat16* p, reg x) noexcept
    {
        const __m128i u = _mm_castps_si128(x);
        const __m128i odd = _mm_and_si128(_mm_srli_epi32(u, 16), _mm_set1_epi32(1));
        store_low(p, _mm_srli_epi32(_mm_add_epi32(u, _mm_add_epi32(odd, _mm_set1_epi32(0x7fff))), 16));
    }

    KVARN_INLINE static float reduce_min(reg x) noexcept
    {
        const __m128 y = _mm_min_ps(x, _mm_movehl_ps(x, x));
        return _mm_cvtss_f32(_mm_min_ss(y, _mm_shuffle_ps(y, y, 1)));
    }
    KVARN_INLINE static float reduce_max(reg x) noexcept
    {
        const __m128 y = _mm_max_ps(x, _mm_movehl_ps(x, x));
        return _mm_cvtss_f32(_mm_max_ss(y, _mm_shuffle_ps(y, y, 1)));
    }
    KVARN_INLINE static float reduce_add(reg x) noexcept
    {
        const reg y = add(x, reg(_mm_movehl_ps(x, x)));
        return _mm_cvtss_f32(add(y, reg(_mm_shuffle_ps(y, y, 1))));
    }

    KVARN_INLINE static void transpose(reg (&x)[4]) noexcept
    {
        const __m128 a = _mm_unpacklo_ps(x[0], x[1]), b = _mm_unpackhi_ps(x[0], x[1]);
        const __m128 c = _mm_unpacklo_ps(x[2], x[3]), d = _mm_unpackhi_ps(x[2], x[3]);
        x[0] = reg(_mm_movelh_ps(a, c));
        x[1] = reg(_mm_movehl_ps(c, a));
        x[2] = reg(_mm_movelh_ps(b, d));
        x[3] = reg(_mm_movehl_ps(d, b));
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
        constexpr int partner = Span == 1 ? 0xb1 : 0x4e, minus = static_cast<int>(0x80000000u);
        const __m128i sign = Span == 1 ? _mm_setr_epi32(0, minus, 0, minus) : _mm_setr_epi32(0, 0, minus, minus);
        return add(reg(_mm_shuffle_ps(x, x, partner)), reg(_mm_xor_ps(x, _mm_castsi128_ps(sign))));
    }

    KVARN_INLINE static reg magnitude(reg a) noexcept { return reg(_mm_and_ps(a, _mm_castsi128_ps(_mm_set1_epi32(0x7fffffff)))); }
    KVARN_INLINE static reg load_codes(const std::uint8_t* p) noexcept
    {
        std::int32_t four;
        std::memcpy(&four, p, sizeof four);
        const __m128i words = _mm_unpacklo_epi8(_mm_cvtsi32_si128(four), _mm_setzero_si128());
        return reg(_mm_cvtepi32_ps(_mm_unpacklo_epi16(words, _mm_setzero_si128())));
    }
    KVARN_INLINE static void store_codes(std::uint8_t* p, const reg (&x)[4], reg scale) noexcept
    {
        const __m128i low = rounded_words(x[0], x[1], scale), high = rounded_words(x[2], x[3], scale);
        _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm_packus_epi16(low, high));
    }
    KVARN_INLINE static void store_words(std::int16_t* p, const reg (&x)[4], reg scale) noexcept
    {
        _mm_storeu_si128(reinterpret_cast<__m128i*>(p), rounded_words(x[0], x[1], scale));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(p + 8), rounded_words(x[2], x[3], scale));
    }
    KVARN_INLINE static void store_bytes(std::int8_t* p, const reg (&x)[4], reg scale) noexcept
    {
        const __m128i low = rounded_words(x[0], x[1], scale), high = rounded_words(x[2], x[3], scale);
        _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm_packs_epi16(low, high));
    }
    KVARN_INLINE static reg power_of_two(reg shifted) noexcept
    {
        return reg(_mm_castsi128_ps(_mm_slli_epi32(_mm_castps_si128(shifted), 23)));
    }

    KVARN_INLINE static void transpose_codes(const std::uint8_t* codes, std::ptrdiff_t stride, std::uint8_t* out) noexcept
    {
        for (int t = 0; t < 32; t += 16) {
            __m128i x[4];
            KVARN_UNROLL
            for (int i = 0; i < 4; ++i) x[i] = _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes + i * stride + t));
            const __m128i a = _mm_unpacklo_epi8(x[0], x[1]), b = _mm_unpackhi_epi8(x[0], x[1]);
            const __m128i c = _mm_unpacklo_epi8(x[2], x[3]), d = _mm_unpackhi_epi8(x[2], x[3]);
            const __m128i rows[] = {_mm_unpacklo_epi16(a, c), _mm_unpackhi_epi16(a, c), _mm_unpacklo_epi16(b, d), _mm_unpackhi_epi16(b, d)};
            KVARN_UNROLL
            for (int i = 0; i < 4; ++i) _mm_storeu_si128(reinterpret_cast<__m128i*>(out + 4 * t + 16 * i), rows[i]);
        }
    }

private:
    struct doubles {
        __m128d low, high;
    };
    KVARN_INLINE static doubles widen(__m128 x) noexcept { return {_mm_cvtps_pd(x), _mm_cvtps_pd(_mm_movehl_ps(x, x))}; }
    KVARN_INLINE static reg negated(reg x) noexcept { return reg(_mm_xor_ps(x, _mm_set1_ps(-0.0f))); }
    KVARN_INLINE static __m128i select(__m128i mask, __m128i yes, __m128i no) noexcept
    {
        return _mm_or_si128(_mm_and_si128(mask, yes), _mm_andnot_si128(mask, no));
    }
    template <class T>
    KVARN_INLINE static __m128i load8(const T* p) noexcept
    {
        return _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
    }
    /// The low halves of four 32-bit lanes.
    template <class T>
    KVARN_INLINE static void store_low(T* p, __m128i x) noexcept
    {
        const __m128i wide = _mm_srai_epi32(_mm_slli_epi32(x, 16), 16);  // so that packing does not saturate
        _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packs_epi32(wide, wide));
    }

    /// round_half_even(x * scale), from the exact products, of eight lanes.
    KVARN_INLINE static __m128i rounded_words(__m128 a, __m128 b, __m128 scale) noexcept
    {
        const doubles x = widen(a), y = widen(b), by = widen(scale);
        const auto four = [&](const doubles& z) KVARN_LAMBDA {
            return _mm_unpacklo_epi64(_mm_cvtpd_epi32(_mm_mul_pd(z.low, by.low)), _mm_cvtpd_epi32(_mm_mul_pd(z.high, by.high)));
        };
        return _mm_packs_epi32(four(x), four(y));
    }

    template <int N>
    struct operands {
        __m128 a[N], b[N], c[N], r[N];
    };
    /// The second look at all lanes. Most sums that end in zeros are exact, and then already right.
    template <int N>
    KVARN_NOINLINE static void settle(operands<N>& x) noexcept
    {
        for (int i = 0; i < N; ++i) {
            const doubles a = widen(x.a[i]), b = widen(x.b[i]), c = widen(x.c[i]);
            const __m128d low = _mm_mul_pd(a.low, b.low), high = _mm_mul_pd(a.high, b.high);
            const __m128d exact = _mm_and_pd(is_exact(low, c.low), is_exact(high, c.high));
            if (_mm_movemask_pd(exact) == 3) continue;
            x.r[i] = _mm_movelh_ps(_mm_cvtpd_ps(odd_sum(low, c.low)), _mm_cvtpd_ps(odd_sum(high, c.high)));
        }
    }
    KVARN_INLINE static __m128d pinned_pd(__m128d x) noexcept
    {
        KVARN_PIN(x);
        return x;
    }
    /// All ones where product + addend needs no rounding: then, and only then, subtracting either from the sum gives the other.
    KVARN_INLINE static __m128d is_exact(__m128d product, __m128d addend) noexcept
    {
        const __m128d sum = pinned_pd(_mm_add_pd(product, addend));
        const __m128d a = pinned_pd(_mm_sub_pd(sum, product)), b = pinned_pd(_mm_sub_pd(sum, addend));
        return _mm_and_pd(_mm_cmpeq_pd(a, addend), _mm_cmpeq_pd(b, product));
    }
    /// The sum; where it is inexact and ends in a zero bit, one step towards the exact one.
    KVARN_INLINE static __m128d odd_sum(__m128d product, __m128d addend) noexcept
    {
        const __m128d sum = pinned_pd(_mm_add_pd(product, addend));
        const __m128d part = pinned_pd(_mm_sub_pd(sum, product)), rest = pinned_pd(_mm_sub_pd(sum, part));
        const __m128d error = pinned_pd(_mm_add_pd(pinned_pd(_mm_sub_pd(product, rest)), pinned_pd(_mm_sub_pd(addend, part))));
        const __m128i bits = _mm_castpd_si128(sum), sides = _mm_xor_si128(bits, _mm_castpd_si128(error));
        // -1 where error and sum have different signs, else 1; nothing where the sum is exact, odd, or not finite (error is NaN then).
        const __m128i down = _mm_srai_epi32(_mm_shuffle_epi32(sides, 0xf5), 31);
        const __m128i step = _mm_or_si128(down, _mm_set_epi32(0, 1, 0, 1));
        const __m128d zero = _mm_setzero_pd();
        const __m128i inexact = _mm_castpd_si128(_mm_or_pd(_mm_cmplt_pd(error, zero), _mm_cmpgt_pd(error, zero)));
        const __m128i even = _mm_cmpeq_epi32(_mm_and_si128(_mm_shuffle_epi32(bits, 0xa0), _mm_set1_epi32(1)), _mm_setzero_si128());
        return _mm_castsi128_pd(_mm_add_epi64(bits, _mm_and_si128(_mm_and_si128(step, inexact), even)));
    }
};

}  // namespace kvarn::simd
