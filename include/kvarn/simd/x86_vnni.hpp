// SPDX-License-Identifier: Apache-2.0
#pragma once
// kernels<avx512vnni> and kernels<avxvnni>: kernels<avx512> and kernels<avx2> with products by vpdpbusd. Included by simd/x86.hpp only.

#include <immintrin.h>

#include <kvarn/simd/dot_products.hpp>
#include <kvarn/simd/x86.hpp>

namespace kvarn::simd {

/// What the vectors of both have in common: lanes of 128 bits, and what becomes of them.
struct vnni_lanes {
    /// Where code K of a byte is multiplied: in place. A signed byte has no room for the last one.
    template <int Bits, int K, bool Signed>
    static constexpr int position = Signed && K == 8 / Bits - 1 ? (K - 1) * Bits : K * Bits;

    /// Bytes of sixteen words.
    KVARN_INLINE static void split(const std::int16_t* w, std::uint8_t* high, std::uint8_t* low) noexcept
    {
        const __m128i a = _mm_loadu_si128(reinterpret_cast<const __m128i*>(w)), b = _mm_loadu_si128(reinterpret_cast<const __m128i*>(w + 8));
        const __m128i low_byte = _mm_set1_epi16(0xff);
        _mm_storeu_si128(reinterpret_cast<__m128i*>(high), _mm_packs_epi16(_mm_srai_epi16(a, 8), _mm_srai_epi16(b, 8)));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(low), _mm_packus_epi16(_mm_and_si128(a, low_byte), _mm_and_si128(b, low_byte)));
    }

    /// Sums of four bytes' codes to the floats of their columns.
    template <int Bits, bool Signed, int... K>
    KVARN_INLINE static void store_lane(const __m128i (&x)[8 / Bits], float* to, std::integer_sequence<int, K...>) noexcept
    {
        const __m128 y[] = {scaled<position<Bits, K, Signed>>(x[K])...};
        if constexpr (Bits == 4) {
            _mm_storeu_ps(to, _mm_unpacklo_ps(y[0], y[1]));
            _mm_storeu_ps(to + 4, _mm_unpackhi_ps(y[0], y[1]));
        } else {
            __m128 a = y[0], b = y[1], c = y[2], d = y[3];
            _MM_TRANSPOSE4_PS(a, b, c, d);
            _mm_storeu_ps(to, a);
            _mm_storeu_ps(to + 4, b);
            _mm_storeu_ps(to + 8, c);
            _mm_storeu_ps(to + 12, d);
        }
    }

private:
    template <int Position>
    KVARN_INLINE static __m128 scaled(__m128i x) noexcept
    {
        const __m128 y = _mm_cvtepi32_ps(x);
        return Position == 0 ? y : _mm_mul_ps(y, _mm_set1_ps(1.0f / static_cast<float>(1 << Position)));
    }
};

/// 256 bits. Dot is the instruction: _mm256_dpbusd_epi32 by one of its two encodings.
template <class Dot>
struct vnni_256 : vnni_lanes {
    using reg = __m256i;
    static constexpr int size = 32, accumulators = Dot::accumulators;

    KVARN_INLINE static reg zero() noexcept { return _mm256_setzero_si256(); }
    KVARN_INLINE static reg load(const std::uint8_t* p) noexcept { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
    KVARN_INLINE static reg load_parts(const std::uint8_t* const (&p)[2]) noexcept
    {
        return _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p[0]))),
                                       _mm_loadu_si128(reinterpret_cast<const __m128i*>(p[1])), 1);
    }
    KVARN_INLINE static reg zip_bytes_low(reg a, reg b) noexcept { return _mm256_unpacklo_epi8(a, b); }
    KVARN_INLINE static reg zip_bytes_high(reg a, reg b) noexcept { return _mm256_unpackhi_epi8(a, b); }
    KVARN_INLINE static reg zip_words_low(reg a, reg b) noexcept { return _mm256_unpacklo_epi16(a, b); }
    KVARN_INLINE static reg zip_words_high(reg a, reg b) noexcept { return _mm256_unpackhi_epi16(a, b); }

    /// Part p gets the weights of rows p, Parts + p, 2 Parts + p, 3 Parts + p in all of its lanes.
    template <int Parts>
    KVARN_INLINE static reg weights(const std::uint8_t* w) noexcept
    {
        if constexpr (Parts == 1) {
            std::int32_t quad;
            std::memcpy(&quad, w, sizeof quad);
            return _mm256_set1_epi32(quad);
        } else {
            std::int64_t both;
            std::memcpy(&both, w, sizeof both);
            return _mm256_shuffle_epi8(_mm256_set1_epi64x(both), _mm256_setr_epi32(0x06040200, 0x06040200, 0x06040200, 0x06040200, 0x07050301,
                                                                                   0x07050301, 0x07050301, 0x07050301));
        }
    }
    template <int Bits, int K, bool Signed>
    KVARN_INLINE static reg code(reg x) noexcept
    {
        constexpr int at = position<Bits, K, Signed>;
        return _mm256_and_si256(at == K * Bits ? x : _mm256_srli_epi16(x, Bits), _mm256_set1_epi8(static_cast<char>(((1 << Bits) - 1) << at)));
    }
    KVARN_INLINE static reg dot_signed(reg sum, reg codes, reg w) noexcept { return Dot::dot(sum, codes, w); }
    KVARN_INLINE static reg dot_unsigned(reg sum, reg codes, reg w) noexcept { return Dot::dot(sum, w, codes); }
    KVARN_INLINE static reg join_planes(reg high, reg low) noexcept { return _mm256_add_epi32(_mm256_slli_epi32(high, 8), low); }

    template <int Bits, int Parts, bool Signed>
    KVARN_INLINE static void store(const reg (&x)[8 / Bits], float* to) noexcept
    {
        constexpr auto each = std::make_integer_sequence<int, 8 / Bits>{};
        __m128i y[2][8 / Bits];
        KVARN_UNROLL
        for (int k = 0; k < 8 / Bits; ++k) {
            y[0][k] = _mm256_castsi256_si128(x[k]);
            y[1][k] = _mm256_extracti128_si256(x[k], 1);
            if constexpr (Parts == 2) y[0][k] = _mm_add_epi32(y[0][k], y[1][k]);
        }
        store_lane<Bits, Signed>(y[0], to, each);
        if constexpr (Parts == 1) store_lane<Bits, Signed>(y[1], to + 16 * (8 / Bits), each);
    }
};

#if defined(KVARN_HAS_AVX512VNNI)
struct vnni_512 : vnni_lanes {
    using reg = __m512i;
    static constexpr int size = 64, accumulators = 16;

    KVARN_INLINE static reg zero() noexcept { return _mm512_setzero_si512(); }
    KVARN_INLINE static reg load(const std::uint8_t* p) noexcept { return _mm512_loadu_si512(p); }
    KVARN_INLINE static reg load_parts(const std::uint8_t* const (&p)[4]) noexcept
    {
        const auto part = [](const std::uint8_t* at) KVARN_LAMBDA { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(at)); };
        const __m256i low = _mm256_inserti128_si256(_mm256_castsi128_si256(part(p[0])), part(p[1]), 1);
        const __m256i high = _mm256_inserti128_si256(_mm256_castsi128_si256(part(p[2])), part(p[3]), 1);
        return _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
    }
    KVARN_INLINE static reg zip_bytes_low(reg a, reg b) noexcept { return _mm512_unpacklo_epi8(a, b); }
    KVARN_INLINE static reg zip_bytes_high(reg a, reg b) noexcept { return _mm512_unpackhi_epi8(a, b); }
    KVARN_INLINE static reg zip_words_low(reg a, reg b) noexcept { return _mm512_unpacklo_epi16(a, b); }
    KVARN_INLINE static reg zip_words_high(reg a, reg b) noexcept { return _mm512_unpackhi_epi16(a, b); }

    template <int Parts>
    KVARN_INLINE static reg weights(const std::uint8_t* w) noexcept
    {
        if constexpr (Parts == 1) {
            std::int32_t quad;
            std::memcpy(&quad, w, sizeof quad);
            return _mm512_set1_epi32(quad);
        } else if constexpr (Parts == 2) {
            std::int64_t both;
            std::memcpy(&both, w, sizeof both);
            return _mm512_shuffle_epi8(_mm512_set1_epi64(both), of_parts<0x06040200, 0x06040200, 0x07050301, 0x07050301>());
        } else {
            const __m512i all = _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(w)));
            return _mm512_shuffle_epi8(all, of_parts<0x0c080400, 0x0d090501, 0x0e0a0602, 0x0f0b0703>());
        }
    }
    template <int Bits, int K, bool Signed>
    KVARN_INLINE static reg code(reg x) noexcept
    {
        constexpr int at = position<Bits, K, Signed>;
        return _mm512_and_si512(at == K * Bits ? x : _mm512_srli_epi16(x, Bits), _mm512_set1_epi8(static_cast<char>(((1 << Bits) - 1) << at)));
    }
    KVARN_INLINE static reg dot_signed(reg sum, reg codes, reg w) noexcept { return _mm512_dpbusd_epi32(sum, codes, w); }
    KVARN_INLINE static reg dot_unsigned(reg sum, reg codes, reg w) noexcept { return _mm512_dpbusd_epi32(sum, w, codes); }
    KVARN_INLINE static reg join_planes(reg high, reg low) noexcept { return _mm512_add_epi32(_mm512_slli_epi32(high, 8), low); }

    template <int Bits, int Parts, bool Signed>
    KVARN_INLINE static void store(const reg (&x)[8 / Bits], float* to) noexcept
    {
        constexpr int per_byte = 8 / Bits;
        if constexpr (store_plan<Bits, Parts, Signed>::fits) {
            const auto& plan = store_plan<Bits, Parts, Signed>::plan;
            constexpr int registers = per_byte / Parts;
            __m512 y[registers];
            KVARN_UNROLL
            for (int r = 0; r < registers; ++r)
                y[r] = _mm512_mul_ps(_mm512_cvtepi32_ps(sum_parts<Parts>(x + r * Parts)), _mm512_load_ps(plan.scale[r]));
            KVARN_UNROLL
            for (int i = 0; i < registers; ++i) {
                const __m512i order = _mm512_load_si512(plan.order[i]);
                const __m512 z = registers == 1 ? _mm512_permutexvar_ps(order, y[0]) : _mm512_permutex2var_ps(y[0], order, y[registers - 1]);
                if constexpr (per_byte == 4) {
                    _mm512_storeu_ps(to + 64 * i, z);
                } else {
                    _mm256_storeu_ps(to + 64 * i, _mm512_castps512_ps256(z));
                    _mm256_storeu_ps(to + 64 * i + 32, _mm512_extractf32x8_ps(z, 1));
                }
            }
            return;
        }
        constexpr auto each = std::make_integer_sequence<int, per_byte>{};
        __m128i y[4][per_byte];
        KVARN_UNROLL
        for (int k = 0; k < per_byte; ++k) {
            __m256i low = _mm512_castsi512_si256(x[k]), high = _mm512_extracti64x4_epi64(x[k], 1);
            if constexpr (Parts >= 2) low = _mm256_add_epi32(low, high);
            y[0][k] = _mm256_castsi256_si128(low);
            y[1][k] = _mm256_extracti128_si256(low, 1);
            y[2][k] = _mm256_castsi256_si128(high);
            y[3][k] = _mm256_extracti128_si256(high, 1);
            if constexpr (Parts == 4) y[0][k] = _mm_add_epi32(y[0][k], y[1][k]);
        }
        KVARN_UNROLL
        for (int lane = 0; lane < 4 / Parts; ++lane) store_lane<Bits, Signed>(y[lane], to + 16 * lane * per_byte, each);
    }

private:
    /// How sums come into the order of columns where the codes of a byte are one or two vectors when their parts are added: those have the codes
    /// one after the other, in lanes of four bytes each.
    template <int Bits, int Parts, bool Signed>
    struct store_plan {
        static constexpr int per_byte = 8 / Bits, registers = per_byte / Parts, lanes = 4 / Parts;  // of a code
        static constexpr bool fits = registers == 1 || registers == 2;
        struct vectors {
            alignas(64) float scale[2][16];
            alignas(64) std::int32_t order[2][16];
        };
        static constexpr vectors plan = [] {
            vectors p{};
            [&]<int... K>(std::integer_sequence<int, K...>) {
                const int positions[] = {position<Bits, K, Signed>...};
                for (int i = 0; i < 16 * registers && fits; ++i) {
                    p.scale[i / 16][i % 16] = 1.0f / static_cast<float>(1 << positions[i / 16 * Parts + i % 16 / 4 / lanes]);
                    const int lane = i / (4 * per_byte), column = i / per_byte % 4, code = i % per_byte;
                    p.order[i / 16][i % 16] = code / Parts * 16 + (code % Parts * lanes + lane) * 4 + column;
                }
            }(std::make_integer_sequence<int, per_byte>{});
            return p;
        }();
    };

    /// One vector of the parts' sums of `Parts` codes.
    template <int Parts>
    KVARN_INLINE static reg sum_parts(const reg* x) noexcept
    {
        const auto halves = [](reg a, reg b) KVARN_LAMBDA { return _mm512_add_epi32(_mm512_shuffle_i32x4(a, b, 0x44), _mm512_shuffle_i32x4(a, b, 0xee)); };
        if constexpr (Parts == 1) return x[0];
        else if constexpr (Parts == 2) return halves(x[0], x[1]);
        else {
            const reg a = halves(x[0], x[1]), b = halves(x[2], x[3]);
            return _mm512_add_epi32(_mm512_shuffle_i32x4(a, b, 0x88), _mm512_shuffle_i32x4(a, b, 0xdd));
        }
    }

    template <int A, int B, int C, int D>
    KVARN_INLINE static reg of_parts() noexcept
    {
        return _mm512_setr_epi32(A, A, A, A, B, B, B, B, C, C, C, C, D, D, D, D);
    }
};

template <>
struct kernels<avx512vnni> : kernels<avx512> {
    using dot = dot_products<vnni_512>;
    static constexpr int most_byte_heads = 4;

    template <int Bits, int Heads>
    KVARN_INLINE static void multiply_words(const std::uint8_t* codes, int rows, int columns, const std::int16_t* const (&weights)[Heads],
                                            float* const (&sums)[Heads], read_ahead& ahead) noexcept
    {
        if constexpr (Bits == 2 || Bits == 4) dot::words<Bits, Heads>(codes, rows, columns, weights, sums, ahead);
        else kernels<avx512>::multiply_words<Bits, Heads>(codes, rows, columns, weights, sums, ahead);
    }
    template <int Bits, int Heads, class Weight>
    KVARN_INLINE static void multiply_bytes(const std::uint8_t* codes, int rows, int columns, const Weight* const (&weights)[Heads],
                                            float* const (&sums)[Heads], read_ahead& ahead) noexcept
    {
        dot::bytes<Bits, Heads, Weight>(codes, rows, columns, weights, sums, ahead);
    }
};
#endif

#if defined(KVARN_HAS_AVXVNNI)
struct avx_dot {
    static constexpr int accumulators = 8;
    KVARN_INLINE static __m256i dot(__m256i sum, __m256i a, __m256i b) noexcept { return _mm256_dpbusd_avx_epi32(sum, a, b); }
};

template <>
struct kernels<avxvnni> : kernels<avx2> {
    using dot = dot_products<vnni_256<avx_dot>>;
    static constexpr int most_byte_heads = 4;

    template <int Bits, int Heads>
    KVARN_INLINE static void multiply_words(const std::uint8_t* codes, int rows, int columns, const std::int16_t* const (&weights)[Heads],
                                            float* const (&sums)[Heads], read_ahead& ahead) noexcept
    {
        if constexpr (Bits == 2 || Bits == 4) dot::words<Bits, Heads>(codes, rows, columns, weights, sums, ahead);
        else kernels<avx2>::multiply_words<Bits, Heads>(codes, rows, columns, weights, sums, ahead);
    }
    template <int Bits, int Heads, class Weight>
    KVARN_INLINE static void multiply_bytes(const std::uint8_t* codes, int rows, int columns, const Weight* const (&weights)[Heads],
                                            float* const (&sums)[Heads], read_ahead& ahead) noexcept
    {
        dot::bytes<Bits, Heads, Weight>(codes, rows, columns, weights, sums, ahead);
    }
};
#endif

}  // namespace kvarn::simd
