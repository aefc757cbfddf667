// SPDX-License-Identifier: Apache-2.0
#pragma once
// The members of kernels<avx2> and kernels<avx512> that need x86 intrinsics. Included by simd/xsimd.hpp only.

#include <immintrin.h>

#include <kvarn/simd/x86_products.hpp>
#include <kvarn/simd/xsimd.hpp>

namespace kvarn::simd {

/// Bit streams, 32 codes at a time, the same for every width of float registers: four 64-bit lanes of eight codes each are
/// squeezed (or spread) in three steps of doubling field size, then moved together by one byte shuffle.
struct avx2_packing {
    template <int Bits>
    KVARN_INLINE static void pack32(const std::uint8_t* codes, std::uint8_t* packed) noexcept
    {
        __m256i x = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes));
        if constexpr (Bits < 8) {
            x = squeeze<8 - Bits>(x, _mm256_set1_epi16(0x00ff));
            x = squeeze<16 - 2 * Bits>(x, _mm256_set1_epi32(0x0000ffff));
            x = squeeze<32 - 4 * Bits>(x, _mm256_set1_epi64x(0x00000000ffffffff));
            x = _mm256_shuffle_epi8(x, _mm256_broadcastsi128_si256(together<Bits>()));
            _mm_storeu_si128(reinterpret_cast<__m128i*>(packed), _mm256_castsi256_si128(x));
            _mm_storeu_si128(reinterpret_cast<__m128i*>(packed + 2 * Bits), _mm256_extracti128_si256(x, 1));
        } else {
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(packed), x);
        }
    }

    template <int Bits>
    KVARN_INLINE static void unpack32(const std::uint8_t* packed, std::uint8_t* codes) noexcept
    {
        __m256i x;
        if constexpr (Bits < 8) {
            const __m128i low = _mm_loadu_si128(reinterpret_cast<const __m128i*>(packed));
            const __m128i high = _mm_loadu_si128(reinterpret_cast<const __m128i*>(packed + 2 * Bits));
            x = _mm256_inserti128_si256(_mm256_castsi128_si256(low), high, 1);
            x = _mm256_shuffle_epi8(x, _mm256_broadcastsi128_si256(apart<Bits>()));
            x = spread<32 - 4 * Bits>(x, _mm256_set1_epi64x((1ll << (4 * Bits)) - 1));
            x = spread<16 - 2 * Bits>(x, _mm256_set1_epi32((1 << (2 * Bits)) - 1));
            x = spread<8 - Bits>(x, _mm256_set1_epi16((1 << Bits) - 1));
        } else {
            x = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(packed));
        }
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(codes), x);
    }

protected:
    KVARN_INLINE static __m256i load_bytes(const std::uint8_t* p) noexcept
    {
        return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    }
    KVARN_INLINE static void store_halves(__m256i x, std::uint8_t* p, int distance) noexcept
    {
        _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(x));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(p + distance), _mm256_extracti128_si256(x, 1));
    }
    /// One level of a byte transpose: items of Bytes bytes of neighbouring channels side by side, so that the items double.
    /// After it, x[c * tokens_parts + part] holds the channels of group c for the tokens of `part`.
    template <int Rows, int Bytes>
    KVARN_INLINE static void interleave(__m256i (&x)[Rows]) noexcept
    {
        constexpr int parts = Bytes;  // of 16 / parts tokens in each 128-bit lane
        __m256i y[Rows];
        KVARN_UNROLL
        for (int c = 0; c < Rows / parts; c += 2) {
            KVARN_UNROLL
            for (int part = 0; part < parts; ++part) {
                const __m256i a = x[c * parts + part], b = x[(c + 1) * parts + part];
                const int at = c * parts + 2 * part;
                if constexpr (Bytes == 1) y[at] = _mm256_unpacklo_epi8(a, b), y[at + 1] = _mm256_unpackhi_epi8(a, b);
                else if constexpr (Bytes == 2) y[at] = _mm256_unpacklo_epi16(a, b), y[at + 1] = _mm256_unpackhi_epi16(a, b);
                else if constexpr (Bytes == 4) y[at] = _mm256_unpacklo_epi32(a, b), y[at + 1] = _mm256_unpackhi_epi32(a, b);
                else y[at] = _mm256_unpacklo_epi64(a, b), y[at + 1] = _mm256_unpackhi_epi64(a, b);
            }
        }
        KVARN_UNROLL
        for (int i = 0; i < Rows; ++i) x[i] = y[i];
    }

private:
    template <int Shift>
    KVARN_INLINE static __m256i squeeze(__m256i x, __m256i low_fields) noexcept
    {
        const __m256i high = _mm256_srli_epi64(_mm256_andnot_si256(low_fields, x), Shift);
        return _mm256_or_si256(_mm256_and_si256(x, low_fields), high);
    }
    // The lower `fields` stay, the bits above them move up by Shift: (low | low_fields << Shift + width) of each pair.
    template <int Shift>
    KVARN_INLINE static __m256i spread(__m256i x, __m256i low_fields) noexcept
    {
        const __m256i low = _mm256_and_si256(x, low_fields);
        const __m256i high = _mm256_slli_epi64(_mm256_andnot_si256(low_fields, x), Shift);
        return _mm256_or_si256(low, high);
    }
    struct byte_order {
        alignas(16) char at[16];
    };
    template <int Bits>
    static constexpr byte_order together_order = [] {
        byte_order order{};
        for (int i = 0; i < 16; ++i) order.at[i] = static_cast<char>(i < Bits ? i : i < 2 * Bits ? i - Bits + 8 : -128);
        return order;
    }();
    template <int Bits>
    static constexpr byte_order apart_order = [] {
        byte_order order{};
        for (int i = 0; i < 16; ++i) order.at[i] = static_cast<char>(i % 8 < Bits ? i / 8 * Bits + i % 8 : -128);
        return order;
    }();
    template <int Bits>
    KVARN_INLINE static __m128i together() noexcept
    {
        return _mm_load_si128(reinterpret_cast<const __m128i*>(together_order<Bits>.at));
    }
    template <int Bits>
    KVARN_INLINE static __m128i apart() noexcept
    {
        return _mm_load_si128(reinterpret_cast<const __m128i*>(apart_order<Bits>.at));
    }
};

template <>
struct kernels<avx2> : xsimd_kernels<xsimd::fma3<xsimd::avx2>>, avx2_packing, avx2_products {
    using base = xsimd_kernels<xsimd::fma3<xsimd::avx2>>;
    using base::load;
    using base::store;

    KVARN_INLINE static reg load(const half* p) noexcept
    {
        return reg(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
    }
    KVARN_INLINE static reg load(const bfloat16* p) noexcept
    {
        const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
        return reg(_mm256_castsi256_ps(_mm256_slli_epi32(wide, 16)));
    }
    KVARN_INLINE static void store(half* p, reg x) noexcept
    {
        const __m256 bounded = _mm256_min_ps(_mm256_max_ps(x, _mm256_set1_ps(-65504.0f)), _mm256_set1_ps(65504.0f));
        store(reinterpret_cast<bounded_half*>(p), reg(bounded));
    }
    KVARN_INLINE static void store(bounded_half* p, reg x) noexcept
    {
        _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
    }
    KVARN_INLINE static void store(bfloat16* p, reg x) noexcept
    {
        const __m256i u = _mm256_castps_si256(x);
        const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
        const __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(u, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
        const __m128i narrow = _mm_packus_epi32(_mm256_castsi256_si128(rounded), _mm256_extracti128_si256(rounded, 1));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(p), narrow);
    }

    KVARN_INLINE static float reduce_min(reg x) noexcept
    {
        __m128 y = _mm_min_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
        y = _mm_min_ps(y, _mm_movehl_ps(y, y));
        return _mm_cvtss_f32(_mm_min_ss(y, _mm_movehdup_ps(y)));
    }
    KVARN_INLINE static float reduce_max(reg x) noexcept
    {
        __m128 y = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
        y = _mm_max_ps(y, _mm_movehl_ps(y, y));
        return _mm_cvtss_f32(_mm_max_ss(y, _mm_movehdup_ps(y)));
    }

    KVARN_INLINE static float reduce_add(reg x) noexcept
    {
        __m128 y = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
        y = _mm_add_ps(y, _mm_movehl_ps(y, y));
        return _mm_cvtss_f32(_mm_add_ss(y, _mm_movehdup_ps(y)));
    }

    KVARN_INLINE static void transpose(reg (&x)[8]) noexcept
    {
        __m256 a[8], b[8];
        KVARN_UNROLL
        for (int i = 0; i < 8; i += 2) {
            a[i] = _mm256_unpacklo_ps(x[i], x[i + 1]);
            a[i + 1] = _mm256_unpackhi_ps(x[i], x[i + 1]);
        }
        KVARN_UNROLL
        for (int i = 0; i < 8; i += 4) {
            b[i] = _mm256_shuffle_ps(a[i], a[i + 2], 0x44);
            b[i + 1] = _mm256_shuffle_ps(a[i], a[i + 2], 0xee);
            b[i + 2] = _mm256_shuffle_ps(a[i + 1], a[i + 3], 0x44);
            b[i + 3] = _mm256_shuffle_ps(a[i + 1], a[i + 3], 0xee);
        }
        KVARN_UNROLL
        for (int i = 0; i < 4; ++i) {
            x[i] = reg(_mm256_permute2f128_ps(b[i], b[i + 4], 0x20));
            x[i + 4] = reg(_mm256_permute2f128_ps(b[i], b[i + 4], 0x31));
        }
    }

    KVARN_INLINE static reg sum_rows(const reg (&x)[8]) noexcept
    {
        // Fold 8 -> 4 -> 2 -> 1, two rows in one register each time; rows are paired so that the result comes out in order.
        const auto fold4 = [](reg a, reg b) {
            return add(reg(_mm256_permute2f128_ps(a, b, 0x20)), reg(_mm256_permute2f128_ps(a, b, 0x31)));
        };
        const auto fold2 = [](reg a, reg b) {
            return add(reg(_mm256_shuffle_ps(a, b, 0x44)), reg(_mm256_shuffle_ps(a, b, 0xee)));
        };
        const auto fold1 = [](reg a, reg b) {
            return add(reg(_mm256_shuffle_ps(a, b, 0x88)), reg(_mm256_shuffle_ps(a, b, 0xdd)));
        };
        return fold1(fold2(fold4(x[0], x[4]), fold4(x[1], x[5])), fold2(fold4(x[2], x[6]), fold4(x[3], x[7])));
    }

    template <int Span>
    KVARN_INLINE static reg butterfly(reg x) noexcept
    {
        __m256 partner, sign;
        if constexpr (Span == 1) {
            partner = _mm256_permute_ps(x, 0xb1);
            sign = _mm256_setr_ps(1, -1, 1, -1, 1, -1, 1, -1);
        } else if constexpr (Span == 2) {
            partner = _mm256_permute_ps(x, 0x4e);
            sign = _mm256_setr_ps(1, 1, -1, -1, 1, 1, -1, -1);
        } else {
            partner = _mm256_permute2f128_ps(x, x, 1);
            sign = _mm256_setr_ps(1, 1, 1, 1, -1, -1, -1, -1);
        }
        return fma(x, reg(sign), reg(partner));
    }

    KVARN_INLINE static reg magnitude(reg a) noexcept
    {
        return reg(_mm256_and_ps(a, _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff))));
    }
    KVARN_INLINE static reg rounded(reg a) noexcept { return reg(_mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)); }
    KVARN_INLINE static reg load_codes(const std::uint8_t* p) noexcept
    {
        const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
        return reg(_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(bytes)));
    }
    KVARN_INLINE static void store_codes(std::uint8_t* p, const reg (&x)[2], reg scale) noexcept
    {
        const __m256i a = rounded_products(x[0], scale);
        const __m256i b = rounded_products(x[1], scale);
        const __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(a, b), 0xd8);
        const __m128i bytes = _mm_packus_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(p), bytes);
    }

    KVARN_INLINE static reg power_of_two(reg shifted) noexcept
    {
        return reg(_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(shifted), 23)));
    }
    KVARN_INLINE static void store_words(std::int16_t* p, const reg (&x)[2], reg scale) noexcept
    {
        const __m256i a = rounded_products(x[0], scale);
        const __m256i b = rounded_products(x[1], scale);
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_permute4x64_epi64(_mm256_packs_epi32(a, b), 0xd8));
    }
    KVARN_INLINE static void store_bytes(std::int8_t* p, const reg (&x)[2], reg scale) noexcept
    {
        const __m256i a = rounded_products(x[0], scale);
        const __m256i b = rounded_products(x[1], scale);
        const __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(a, b), 0xd8);
        const __m128i bytes = _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(p), bytes);
    }

    KVARN_INLINE static void transpose_codes(const std::uint8_t* codes, std::ptrdiff_t stride, std::uint8_t* out) noexcept
    {
        __m256i x[8];
        KVARN_UNROLL
        for (int i = 0; i < 8; ++i) x[i] = load_bytes(codes + i * stride);
        interleave<8, 1>(x);
        interleave<8, 2>(x);
        interleave<8, 4>(x);
        KVARN_UNROLL
        for (int i = 0; i < 8; ++i) store_halves(x[i], out + 16 * i, 128);
    }

private:
    // round_half_even(x * scale), from the exact product: one fused addition of 1.5 * 2^23 rounds, and has the integer in its low bits.
    KVARN_INLINE static __m256i rounded_products(reg x, reg scale) noexcept
    {
        const __m256 shifted = fma(x, scale, broadcast(12582912.0f));
        return _mm256_sub_epi32(_mm256_castps_si256(shifted), _mm256_set1_epi32(0x4b400000));
    }
};

#if defined(KVARN_HAS_AVX512)
template <>
struct kernels<avx512> : xsimd_kernels<xsimd::avx512bw>, avx2_packing, avx2_products {
    using base = xsimd_kernels<xsimd::avx512bw>;
    using base::load;
    using base::store;

    // xsimd 8.1 has no fnma here and would round twice.
    KVARN_INLINE static reg fma(reg a, reg b, reg c) noexcept { return pinned(reg(_mm512_fmadd_ps(a, b, c))); }
    KVARN_INLINE static reg fnma(reg a, reg b, reg c) noexcept { return pinned(reg(_mm512_fnmadd_ps(a, b, c))); }
    KVARN_INLINE static reg code_value(reg code, reg scale, reg zero) noexcept { return fma(code, scale, zero); }

    KVARN_INLINE static reg load(const half* p) noexcept
    {
        return reg(_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
    }
    KVARN_INLINE static reg load(const bfloat16* p) noexcept
    {
        const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
        return reg(_mm512_castsi512_ps(_mm512_slli_epi32(wide, 16)));
    }
    KVARN_INLINE static void store(half* p, reg x) noexcept
    {
        const __m512 bounded = _mm512_min_ps(_mm512_max_ps(x, _mm512_set1_ps(-65504.0f)), _mm512_set1_ps(65504.0f));
        store(reinterpret_cast<bounded_half*>(p), reg(bounded));
    }
    KVARN_INLINE static void store(bounded_half* p, reg x) noexcept
    {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
    }
    KVARN_INLINE static void store(bfloat16* p, reg x) noexcept
    {
        const __m512i u = _mm512_castps_si512(x);
        const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
        const __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(u, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(rounded));
    }

    KVARN_INLINE static float reduce_min(reg x) noexcept
    {
        return kernels<avx2>::reduce_min(kernels<avx2>::minimum(lower(x), upper(x)));
    }
    KVARN_INLINE static float reduce_max(reg x) noexcept
    {
        return kernels<avx2>::reduce_max(kernels<avx2>::maximum(lower(x), upper(x)));
    }

    KVARN_INLINE static float reduce_add(reg x) noexcept
    {
        return kernels<avx2>::reduce_add(kernels<avx2>::add(lower(x), upper(x)));
    }

    KVARN_INLINE static void transpose(reg (&x)[16]) noexcept
    {
        __m512 a[16], b[16];
        KVARN_UNROLL
        for (int i = 0; i < 16; i += 2) {
            a[i] = _mm512_unpacklo_ps(x[i], x[i + 1]);
            a[i + 1] = _mm512_unpackhi_ps(x[i], x[i + 1]);
        }
        KVARN_UNROLL
        for (int i = 0; i < 16; i += 4) {
            b[i] = _mm512_shuffle_ps(a[i], a[i + 2], 0x44);
            b[i + 1] = _mm512_shuffle_ps(a[i], a[i + 2], 0xee);
            b[i + 2] = _mm512_shuffle_ps(a[i + 1], a[i + 3], 0x44);
            b[i + 3] = _mm512_shuffle_ps(a[i + 1], a[i + 3], 0xee);
        }
        // b[4 g + c], 128-bit part p: column 4 p + c of rows 4 g .. 4 g + 3.
        KVARN_UNROLL
        for (int c = 0; c < 4; ++c) {
            const __m512 low_even = _mm512_shuffle_f32x4(b[c], b[4 + c], 0x88);        // parts 0, 2 of both
            const __m512 low_odd = _mm512_shuffle_f32x4(b[c], b[4 + c], 0xdd);         // parts 1, 3
            const __m512 high_even = _mm512_shuffle_f32x4(b[8 + c], b[12 + c], 0x88);
            const __m512 high_odd = _mm512_shuffle_f32x4(b[8 + c], b[12 + c], 0xdd);
            x[c] = reg(_mm512_shuffle_f32x4(low_even, high_even, 0x88));
            x[8 + c] = reg(_mm512_shuffle_f32x4(low_even, high_even, 0xdd));
            x[4 + c] = reg(_mm512_shuffle_f32x4(low_odd, high_odd, 0x88));
            x[12 + c] = reg(_mm512_shuffle_f32x4(low_odd, high_odd, 0xdd));
        }
    }

    KVARN_INLINE static reg sum_rows(const reg (&x)[16]) noexcept
    {
        using narrow = kernels<avx2>;
        narrow::reg low[8], high[8];
        KVARN_UNROLL
        for (int i = 0; i < 8; ++i) {
            low[i] = narrow::add(lower(x[i]), upper(x[i]));
            high[i] = narrow::add(lower(x[8 + i]), upper(x[8 + i]));
        }
        const __m256 a = narrow::sum_rows(low), b = narrow::sum_rows(high);
        return reg(_mm512_insertf32x8(_mm512_castps256_ps512(a), b, 1));
    }

    template <int Span>
    KVARN_INLINE static reg butterfly(reg x) noexcept
    {
        __m512 partner;
        if constexpr (Span == 1) partner = _mm512_permute_ps(x, 0xb1);
        else if constexpr (Span == 2) partner = _mm512_permute_ps(x, 0x4e);
        else if constexpr (Span == 4) partner = _mm512_shuffle_f32x4(x, x, 0xb1);
        else partner = _mm512_shuffle_f32x4(x, x, 0x4e);
        constexpr unsigned mask = Span == 1 ? 0xaaaa : Span == 2 ? 0xcccc : Span == 4 ? 0xf0f0 : 0xff00;
        const __m512 sign = _mm512_mask_blend_ps(static_cast<__mmask16>(mask), _mm512_set1_ps(1.0f), _mm512_set1_ps(-1.0f));
        return fma(x, reg(sign), reg(partner));
    }

    KVARN_INLINE static reg magnitude(reg a) noexcept
    {
        return reg(_mm512_castsi512_ps(_mm512_and_epi32(_mm512_castps_si512(a), _mm512_set1_epi32(0x7fffffff))));
    }
    KVARN_INLINE static reg rounded(reg a) noexcept { return reg(_mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)); }
    KVARN_INLINE static reg load_codes(const std::uint8_t* p) noexcept
    {
        return reg(_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))));
    }
    KVARN_INLINE static void store_codes(std::uint8_t* p, const reg (&x)[1], reg scale) noexcept
    {
        const __m512 shifted = fma(x[0], scale, broadcast(12582912.0f));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(_mm512_castps_si512(shifted)));
    }

    KVARN_INLINE static reg power_of_two(reg shifted) noexcept
    {
        return reg(_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_castps_si512(shifted), 23)));
    }
    KVARN_INLINE static void store_words(std::int16_t* p, const reg (&x)[1], reg scale) noexcept
    {
        const __m512 shifted = fma(x[0], scale, broadcast(12582912.0f));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(_mm512_castps_si512(shifted)));
    }
    KVARN_INLINE static void store_bytes(std::int8_t* p, const reg (&x)[1], reg scale) noexcept
    {
        const __m512 shifted = fma(x[0], scale, broadcast(12582912.0f));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(_mm512_castps_si512(shifted)));
    }

    KVARN_INLINE static void transpose_codes(const std::uint8_t* codes, std::ptrdiff_t stride, std::uint8_t* out) noexcept
    {
        __m256i x[16];
        KVARN_UNROLL
        for (int i = 0; i < 16; ++i) x[i] = load_bytes(codes + i * stride);
        interleave<16, 1>(x);
        interleave<16, 2>(x);
        interleave<16, 4>(x);
        interleave<16, 8>(x);
        KVARN_UNROLL
        for (int i = 0; i < 16; ++i) store_halves(x[i], out + 16 * i, 256);
    }

private:
    KVARN_INLINE static kernels<avx2>::reg lower(reg x) noexcept { return kernels<avx2>::reg(_mm512_castps512_ps256(x)); }
    KVARN_INLINE static kernels<avx2>::reg upper(reg x) noexcept { return kernels<avx2>::reg(_mm512_extractf32x8_ps(x, 1)); }
};
#endif

}  // namespace kvarn::simd

#if defined(KVARN_HAS_AVXVNNI) || defined(KVARN_HAS_AVX512VNNI)
#include <kvarn/simd/x86_vnni.hpp>
#endif
