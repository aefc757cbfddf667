// SPDX-License-Identifier: Apache-2.0
#pragma once
// Code packing and integer products of weights with packed codes on SSE2, for kernels<sse2>. Included by simd/sse2.hpp only.
//
// Without a byte shuffle, codes of 2, 4 and 8 bits are spread to bytes by masks and interleaving, the others in 64-bit integer registers.
// Bytes of two rows are interleaved so that one multiply-add serves both.

#include <emmintrin.h>

#include <kvarn/simd/sse2_byte_sums.hpp>
#include <kvarn/simd/wide_packing.hpp>

namespace kvarn::simd {

struct sse2_packing : wide_packing {
    template <int Bits>
    KVARN_INLINE static void unpack32(const std::uint8_t* packed, std::uint8_t* codes) noexcept
    {
        if constexpr (Bits == 8) {
            std::memcpy(codes, packed, 32);
        } else if constexpr (Bits == 4) {
            _mm_storeu_si128(at(codes), spread<4>(low8(packed)));
            _mm_storeu_si128(at(codes + 16), spread<4>(low8(packed + 8)));
        } else if constexpr (Bits == 2) {
            const __m128i nibbles = spread<4>(low8(packed));
            _mm_storeu_si128(at(codes), spread<2>(nibbles));
            _mm_storeu_si128(at(codes + 16), spread<2>(_mm_unpackhi_epi64(nibbles, nibbles)));
        } else {
            wide_packing::unpack32<Bits>(packed, codes);
        }
    }

    /// Sixteen codes of Bits bits, a multiple of 16 into their stream, as bytes.
    template <int Bits>
    KVARN_INLINE static __m128i codes16(const std::uint8_t* packed) noexcept
    {
        if constexpr (Bits == 8) {
            return _mm_loadu_si128(reinterpret_cast<const __m128i*>(packed));
        } else if constexpr (Bits == 4) {
            return spread<4>(low8(packed));
        } else if constexpr (Bits == 2) {
            std::int32_t four;
            std::memcpy(&four, packed, sizeof four);
            return spread<2>(spread<4>(_mm_cvtsi32_si128(four)));
        } else {
            return _mm_set_epi64x(static_cast<long long>(eight_codes<Bits>(packed + Bits)), static_cast<long long>(eight_codes<Bits>(packed)));
        }
    }

private:
    KVARN_INLINE static __m128i* at(std::uint8_t* p) noexcept { return reinterpret_cast<__m128i*>(p); }
    KVARN_INLINE static __m128i low8(const std::uint8_t* p) noexcept { return _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)); }
    /// The lower eight bytes, each of two fields of Field bits, to sixteen.
    template <int Field>
    KVARN_INLINE static __m128i spread(__m128i x) noexcept
    {
        const __m128i mask = _mm_set1_epi8((1 << Field) - 1);
        return _mm_unpacklo_epi8(_mm_and_si128(x, mask), _mm_and_si128(_mm_srli_epi16(x, Field), mask));
    }
};

struct sse2_products : sse2_byte_sums {
    static constexpr int most_byte_heads = 4;

    template <int Bits, int Heads>
    KVARN_INLINE static void multiply_words(const std::uint8_t* codes, int rows, int columns, const std::int16_t* const (&weights)[Heads],
                                            float* const (&sums)[Heads], read_ahead& shared) noexcept
    {
        read_ahead ahead = shared;  // in registers
        const std::ptrdiff_t row_bytes = static_cast<std::ptrdiff_t>(columns) * Bits / 8;
        for (int c = 0; c < columns; c += 16) {
            __m128i sum[Heads][4];
            KVARN_UNROLL
            for (int h = 0; h < Heads; ++h) sum[h][0] = sum[h][1] = sum[h][2] = sum[h][3] = _mm_setzero_si128();
            const std::uint8_t* at = codes + c * Bits / 8;
            for (int i = 0; i < rows; i += 2, at += 2 * row_bytes) {
                const __m128i a = sse2_packing::codes16<Bits>(at), b = sse2_packing::codes16<Bits>(at + row_bytes), zero = _mm_setzero_si128();
                const __m128i low = _mm_unpacklo_epi8(a, b), high = _mm_unpackhi_epi8(a, b);
                const __m128i pairs[] = {_mm_unpacklo_epi8(low, zero), _mm_unpackhi_epi8(low, zero), _mm_unpacklo_epi8(high, zero),
                                         _mm_unpackhi_epi8(high, zero)};
                KVARN_UNROLL
                for (int h = 0; h < Heads; ++h) {
                    std::int32_t pair;
                    std::memcpy(&pair, weights[h] + i, sizeof pair);
                    const __m128i w = _mm_set1_epi32(pair);
                    KVARN_UNROLL
                    for (int j = 0; j < 4; ++j) {
                        sum[h][j] = _mm_add_epi32(sum[h][j], _mm_madd_epi16(pairs[j], w));
                        if constexpr (Heads <= 2) KVARN_HOLD(sum[h][j]);
                    }
                }
                if (i % 4 == 0) ahead.touch();
            }
            KVARN_UNROLL
            for (int h = 0; h < Heads; ++h)
                KVARN_UNROLL
                for (int j = 0; j < 4; ++j) _mm_storeu_ps(sums[h] + c + 4 * j, _mm_cvtepi32_ps(sum[h][j]));
        }
        shared = ahead;
    }

    /// With the weights widened: there is no product of bytes.
    template <int Bits, int Heads, class Byte>
    KVARN_INLINE static void multiply_bytes(const std::uint8_t* codes, int rows, int columns, const Byte* const (&weights)[Heads],
                                            float* const (&sums)[Heads], read_ahead& ahead) noexcept
    {
        std::int16_t wide[Heads][max_product_rows];
        const std::int16_t* w[Heads];
        for (int h = 0; h < Heads; ++h) {
            for (int i = 0; i < rows; ++i) wide[h][i] = weights[h][i];
            w[h] = wide[h];
        }
        multiply_words<Bits, Heads>(codes, rows, columns, reinterpret_cast<const std::int16_t* const(&)[Heads]>(w), sums, ahead);
    }
};

}  // namespace kvarn::simd
