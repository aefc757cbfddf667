// SPDX-License-Identifier: Apache-2.0
#pragma once
// Integer products of 8-bit weights with packed codes on AVX2, for kernels<avx2> and kernels<avx512>. Included by simd/x86_products.hpp
// only, which has those of 16-bit weights.

#include <immintrin.h>

#include <algorithm>
#include <type_traits>
#include <utility>

#include <kvarn/simd/sse2_byte_sums.hpp>

namespace kvarn::simd {

/// Vectors in memory.
struct avx2_vectors {
    KVARN_INLINE static __m256i load32(const std::uint8_t* p) noexcept { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
    KVARN_INLINE static __m128i load16(const std::uint8_t* p) noexcept { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)); }
    template <class T>
    KVARN_INLINE static __m256i load_vector(const T* p) noexcept
    {
        return _mm256_load_si256(reinterpret_cast<const __m256i*>(p));
    }
    template <class T>
    KVARN_INLINE static void store_vector(T* p, __m256i x) noexcept
    {
        _mm256_store_si256(reinterpret_cast<__m256i*>(p), x);
    }
    KVARN_INLINE static __m256i load_two(const std::uint8_t* low, const std::uint8_t* high) noexcept
    {
        return _mm256_inserti128_si256(_mm256_castsi128_si256(load16(low)), load16(high), 1);
    }
};

struct avx2_byte_products : avx2_vectors, sse2_byte_sums {
    static constexpr int most_byte_heads = 8;

    template <int Bits, int Heads, class Byte>
    KVARN_INLINE static void multiply_bytes(const std::uint8_t* codes, int rows, int columns, const Byte* const (&weights)[Heads],
                                            float* const (&sums)[Heads], read_ahead& ahead) noexcept
    {
        byte_block<Bits, Heads, Byte>::multiply(codes, rows, columns, weights, sums, ahead);
    }

private:
    /// acc <- acc + products, in place: of a sum the compiler would make copies.
    KVARN_INLINE static void add_words_to(__m256i& acc, __m256i products) noexcept
    {
        __asm__("vpaddw {%1, %0, %0|%0, %0, %1}" : "+x"(acc) : "x"(products));
    }

    /// 8-bit weights. Four rows are interleaved: each 32-bit lane has a column's codes of four rows, of all columns in a byte, still packed.
    /// They lie in the first-level cache for all heads, and are masked where they are multiplied. Products go into 16-bit sums (signed as
    /// the weights are) of `flush_rows` rows, those into 32-bit ones.
    template <int Bits, int Heads, class Byte>
    struct byte_block {
        static constexpr bool negative = std::is_signed_v<Byte>;
        static constexpr int per_byte = 8 / Bits;
        static constexpr int flush_rows = Bits == 4 ? 32 : 128;  // half of them times 128 (255) times the largest code is below 2^15 (2^16)
        static constexpr int block_rows = 128;                   // interleaved at a time
        static constexpr int vectors = 8 / Heads;                // of eight columns in a pass: eight accumulators
        static constexpr int codes_of_pass = (std::min)(per_byte, vectors), packed_of_pass = vectors / codes_of_pass;

        static constexpr int bytes_of_step = 32 * packed_of_pass * codes_of_pass / per_byte;  // that a step of a pass reads first
        static constexpr bool steps_fetch = bytes_of_step >= 64;                               // or else it is done before them

        // A step is four rows of 32 bytes, or eight of 16: of two quads, one in each half.
        struct memory {
            alignas(32) std::uint8_t quads[4][block_rows / 4][32];
            alignas(32) Byte weights[block_rows / 8][Heads][32];  // of two quads
            alignas(32) std::int32_t sums[per_byte][4][Heads][8];
        };

        /// Up to block_rows rows; returns the steps.
        template <bool Wide>
        KVARN_INLINE static int interleave_rows(const std::uint8_t* p, std::ptrdiff_t row_bytes, int rows, memory& m) noexcept
        {
            int step = 0;
            for (int i = 0; i < rows; i += Wide ? 4 : 8, ++step) {
                __m256i row[4];
                KVARN_UNROLL
                for (int j = 0; j < 4; ++j, p += row_bytes) {
                    if constexpr (Wide) row[j] = load32(p);
                    else if (rows - i > 4) row[j] = load_two(p, p + 4 * row_bytes);
                    else row[j] = _mm256_inserti128_si256(_mm256_setzero_si256(), load16(p), 0);
                }
                if constexpr (!Wide) p += 4 * row_bytes;
                const __m256i a = _mm256_unpacklo_epi8(row[0], row[1]), b = _mm256_unpackhi_epi8(row[0], row[1]);
                const __m256i c = _mm256_unpacklo_epi8(row[2], row[3]), d = _mm256_unpackhi_epi8(row[2], row[3]);
                store_vector(m.quads[0][step], _mm256_unpacklo_epi16(a, c));
                store_vector(m.quads[1][step], _mm256_unpackhi_epi16(a, c));
                store_vector(m.quads[2][step], _mm256_unpacklo_epi16(b, d));
                store_vector(m.quads[3][step], _mm256_unpackhi_epi16(b, d));
            }
            return step;
        }

        KVARN_INLINE static __m256i broadcast_quad(const Byte* w) noexcept
        {
            std::int32_t quad;
            std::memcpy(&quad, w, sizeof quad);
            return _mm256_set1_epi32(quad);
        }

        /// `vectors` vectors of columns of all heads: codes First, First + 1, ... of each byte of packed vectors `at` on. `more`: there are
        /// sums already.
        template <bool Wide, int First>
        KVARN_INLINE static void pass(memory& m, int at, int steps, const Byte* const (&weights)[Heads], bool more, read_ahead& ahead) noexcept
        {
            constexpr int flush = flush_rows / (Wide ? 4 : 8);
            const __m256i mask = _mm256_set1_epi8((1 << Bits) - 1), ones = _mm256_set1_epi16(1);
            for (int begin = 0; begin < steps; begin += flush) {
                const int end = steps - begin < flush ? steps : begin + flush;
                __m256i sum[packed_of_pass][codes_of_pass][Heads];
                const auto step = [&](auto fresh, int s) KVARN_LAMBDA {
                    if constexpr (steps_fetch) ahead.touch<read_ahead::beside(bytes_of_step)>();
                    __m256i w[Heads];
                    KVARN_UNROLL
                    for (int h = 0; h < Heads; ++h) w[h] = Wide ? broadcast_quad(weights[h] + 4 * s) : load_vector(m.weights[s][h]);
                    KVARN_UNROLL
                    for (int i = 0; i < packed_of_pass; ++i) {
                        const __m256i x = load_vector(m.quads[at + i][s]);
                        KVARN_UNROLL
                        for (int k = 0; k < codes_of_pass; ++k) {
                            const __m256i codes = _mm256_and_si256(First + k == 0 ? x : _mm256_srli_epi16(x, (First + k) * Bits), mask);
                            KVARN_UNROLL
                            for (int h = 0; h < Heads; ++h) {
                                const __m256i products = negative ? _mm256_maddubs_epi16(codes, w[h]) : _mm256_maddubs_epi16(w[h], codes);
                                if constexpr (fresh()) sum[i][k][h] = products;
                                else add_words_to(sum[i][k][h], products);
                            }
                        }
                    }
                };
                if constexpr (!steps_fetch) ahead.touch<read_ahead::beside(bytes_of_step * flush)>();
                step(std::true_type{}, begin);
                for (int s = begin + 1; s < end; ++s) step(std::false_type{}, s);
                KVARN_UNROLL
                for (int i = 0; i < packed_of_pass; ++i)
                    KVARN_UNROLL
                    for (int k = 0; k < codes_of_pass; ++k)
                        KVARN_UNROLL
                        for (int h = 0; h < Heads; ++h) KVARN_HOLD(sum[i][k][h]);
                KVARN_UNROLL
                for (int i = 0; i < packed_of_pass; ++i)
                    KVARN_UNROLL
                    for (int k = 0; k < codes_of_pass; ++k)
                        KVARN_UNROLL
                        for (int h = 0; h < Heads; ++h) {
                            std::int32_t* const to = m.sums[First + k][at + i][h];
                            const __m256i both = sum[i][k][h];
                            const __m256i x = negative ? _mm256_madd_epi16(both, ones)
                                                       : _mm256_add_epi32(_mm256_blend_epi16(both, _mm256_setzero_si256(), 0xaa), _mm256_srli_epi32(both, 16));
                            store_vector(to, more || begin != 0 ? _mm256_add_epi32(x, load_vector(to)) : x);
                        }
            }
        }

        /// One head's sums in the order of columns: of the first `bytes` bytes of a row.
        template <bool Wide>
        KVARN_INLINE static void store(const memory& m, int h, int bytes, float* to) noexcept
        {
            for (int i = 0; i < 4 && (Wide || 4 * i < bytes); ++i) {
                __m256 x[per_byte];
                KVARN_UNROLL
                for (int k = 0; k < per_byte; ++k) {
                    __m256i sum = load_vector(m.sums[k][i][h]);
                    if constexpr (!Wide) sum = _mm256_add_epi32(sum, _mm256_permute2x128_si256(sum, sum, 1));
                    x[k] = _mm256_cvtepi32_ps(sum);
                }
                // Columns of byte 4 i, and of byte 4 i + 16.
                const auto put = [&](int at, __m256 y) KVARN_LAMBDA {
                    float* const here = to + 4 * i * per_byte + at;
                    _mm_storeu_ps(here, _mm256_castps256_ps128(y));
                    if constexpr (Wide) _mm_storeu_ps(here + 16 * per_byte, _mm256_extractf128_ps(y, 1));
                };
                const __m256 a = _mm256_unpacklo_ps(x[0], x[1]), b = _mm256_unpackhi_ps(x[0], x[1]);
                if constexpr (per_byte == 2) {
                    put(0, a);
                    put(4, b);
                } else {
                    const __m256 c = _mm256_unpacklo_ps(x[2], x[3]), d = _mm256_unpackhi_ps(x[2], x[3]);
                    put(0, _mm256_shuffle_ps(a, c, 0x44));
                    put(4, _mm256_shuffle_ps(a, c, 0xee));
                    put(8, _mm256_shuffle_ps(b, d, 0x44));
                    put(12, _mm256_shuffle_ps(b, d, 0xee));
                }
            }
        }

        /// The columns of 32 bytes of each row; or of 16, or the first ones of them.
        template <bool Wide>
        KVARN_INLINE static void run(const std::uint8_t* codes, std::ptrdiff_t row_bytes, int rows, int bytes,
                                     const Byte* const (&weights)[Heads], float* const* to, memory& m, read_ahead& ahead) noexcept
        {
            for (int first = 0; first < rows; first += block_rows) {
                const int some = rows - first < block_rows ? rows - first : block_rows;
                const int steps = interleave_rows<Wide>(codes + first * row_bytes, row_bytes, some, m);
                const Byte* w[Heads];
                KVARN_UNROLL
                for (int h = 0; h < Heads; ++h) {
                    w[h] = weights[h] + first;
                    if constexpr (!Wide)
                        for (int s = 0; s < steps; ++s) {
                            const __m256i low = broadcast_quad(w[h] + 8 * s);
                            const __m256i high = 8 * s + 4 < some ? broadcast_quad(w[h] + 8 * s + 4) : low;
                            store_vector(m.weights[s][h], _mm256_blend_epi32(low, high, 0xf0));
                        }
                }
                const Byte* const(&part)[Heads] = reinterpret_cast<const Byte* const(&)[Heads]>(w);
                for (int at = 0; at < 4 && (Wide || 4 * at < bytes); at += packed_of_pass) {
                    [&]<int... Index>(std::integer_sequence<int, Index...>) KVARN_LAMBDA {
                        (pass<Wide, Index * codes_of_pass>(m, at, steps, part, first != 0, ahead), ...);
                    }(std::make_integer_sequence<int, per_byte / codes_of_pass>{});
                }
            }
            for (int h = 0; h < Heads; ++h) store<Wide>(m, h, bytes, to[h]);
        }

        KVARN_INLINE static void multiply(const std::uint8_t* codes, int rows, int columns, const Byte* const (&weights)[Heads],
                                          float* const (&sums)[Heads], read_ahead& shared) noexcept
        {
            read_ahead ahead = shared;  // in registers
            const std::ptrdiff_t row_bytes = static_cast<std::ptrdiff_t>(columns) * Bits / 8;
            memory m;
            const auto part = [&](auto wide, int at, int bytes) KVARN_LAMBDA {
                float* to[Heads];
                KVARN_UNROLL
                for (int h = 0; h < Heads; ++h) to[h] = sums[h] + at * per_byte;
                run<wide()>(codes + at, row_bytes, rows, bytes, weights, to, m, ahead);
            };
            int first = 0;
            for (; first + 32 <= row_bytes; first += 32) part(std::true_type{}, first, 32);
            for (; first < row_bytes; first += 16)
                part(std::false_type{}, first, row_bytes - first < 16 ? static_cast<int>(row_bytes) - first : 16);
            shared = ahead;
        }
    };
};

}  // namespace kvarn::simd
