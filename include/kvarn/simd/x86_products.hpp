// SPDX-License-Identifier: Apache-2.0
#pragma once
// Integer products of 16-bit weights with packed codes on AVX2, for kernels<avx2> and kernels<avx512>. Included by simd/x86.hpp only.
//
// Two rows are interleaved so that one multiply-add serves both. Codes of 2, 4 and 8 bits are masked where they lie (the power of two
// that this leaves is divided out at the end); the others, and what is left of a row, are fetched by a byte shuffle, 16 at a time.

#include <immintrin.h>

#include <algorithm>
#include <type_traits>
#include <utility>

#include <kvarn/simd/x86_byte_products.hpp>

namespace kvarn::simd {

struct avx2_products : avx2_byte_products {
    template <int Bits, int Heads>
    KVARN_INLINE static void multiply_words(const std::uint8_t* codes, int rows, int columns, const std::int16_t* const (&weights)[Heads],
                                            float* const (&sums)[Heads], read_ahead& shared) noexcept
    {
        using block_of = word_block<Bits, Heads>;
        read_ahead ahead = shared;  // in registers
        const std::ptrdiff_t row_bytes = static_cast<std::ptrdiff_t>(columns) * Bits / 8;
        int c = 0;
        const auto run = [&](auto width, auto&& block) KVARN_LAMBDA {
            for (; c + width <= columns; c += width) {
                float* to[Heads];
                KVARN_UNROLL
                for (int h = 0; h < Heads; ++h) to[h] = sums[h] + c;
                block(codes + c * Bits / 8, to);
            }
        };
        if constexpr (16 % Bits == 0) {
            run(std::integral_constant<int, 256 / Bits>{},
                [&](const std::uint8_t* at, float** to) KVARN_LAMBDA { block_of::template run<true>(at, row_bytes, rows, weights, to, ahead); });
            run(std::integral_constant<int, 128 / Bits>{},
                [&](const std::uint8_t* at, float** to) KVARN_LAMBDA { block_of::template run<false>(at, row_bytes, rows, weights, to, ahead); });
        }
        const auto gather = [&](auto groups) KVARN_LAMBDA {
            run(std::integral_constant<int, 16 * groups()>{}, [&](const std::uint8_t* at, float** to) KVARN_LAMBDA {
                block_of::template gathered<groups()>(at, row_bytes, rows, weights, to, ahead);
            });
        };
        constexpr int left = 16 % Bits == 0 ? 128 / Bits - 16 : 1 << 20;  // columns at most that come here
        if constexpr (Heads <= 2 && left >= 64 / Heads) gather(std::integral_constant<int, 4 / Heads>{});
        if constexpr (left > 0) gather(std::integral_constant<int, 1>{});
        shared = ahead;
    }

private:
    /// A pair of weights in every lane of 4 bytes.
    KVARN_INLINE static __m256i broadcast_pair(const std::int16_t* w) noexcept
    {
        std::int32_t pair;
        std::memcpy(&pair, w, sizeof pair);
        return _mm256_set1_epi32(pair);
    }
    /// acc <- acc + product
    KVARN_INLINE static void add_words(__m256i& acc, __m256i codes, __m256i w) noexcept
    {
        const __m256i products = _mm256_madd_epi16(codes, w);
        __asm__("vpaddd {%1, %0, %0|%0, %0, %1}" : "+x"(acc) : "x"(products));  // in place: of a sum the compiler would make copies
    }

    /// Floats of `Per` interleaved sequences: in[k][word] to out[word * Per + k].
    template <int Per>
    KVARN_INLINE static void interleave_out(const float* in, int words, float* out) noexcept
    {
        for (int w = 0; w < words; w += 4) {
            __m128 x[Per];
            KVARN_UNROLL
            for (int k = 0; k < Per; ++k) x[k] = _mm_load_ps(in + k * words + w);
            float* const to = out + w * Per;
            if constexpr (Per == 1) {
                _mm_storeu_ps(to, x[0]);
            } else if constexpr (Per == 2) {
                _mm_storeu_ps(to, _mm_unpacklo_ps(x[0], x[1]));
                _mm_storeu_ps(to + 4, _mm_unpackhi_ps(x[0], x[1]));
            } else {
                KVARN_UNROLL
                for (int k = 0; k < Per; k += 4) {
                    __m128 a = x[k], b = x[k + 1], c = x[k + 2], d = x[k + 3];
                    _MM_TRANSPOSE4_PS(a, b, c, d);
                    _mm_storeu_ps(to + k, a);
                    _mm_storeu_ps(to + Per + k, b);
                    _mm_storeu_ps(to + 2 * Per + k, c);
                    _mm_storeu_ps(to + 3 * Per + k, d);
                }
            }
        }
    }

    /// 16-bit weights, 32-bit sums. A word holds 16 / Bits codes.
    template <int Bits, int Heads>
    struct word_block {
        static constexpr int per_word = Bits == 2 || Bits == 4 || Bits == 8 ? 16 / Bits : 1;
        // Eight accumulators: `halves` halves of the row pair times `together` codes of a word times the heads.
        static constexpr int halves = per_word * Heads <= 4 ? 2 : 1;
        static constexpr int together = (std::min)(per_word, 8 / Heads);

        static constexpr int passes = per_word / together * (2 / halves);

        // Codes from bit 8 on are brought down first, where leaving them in place would cost the weights too many bits.
        static constexpr int in_place = Bits == 2 ? 8 : 16;

        /// Bit position of code K of a word when it is multiplied.
        template <int K>
        static constexpr int position = K * Bits % in_place;

        /// Of a code at each place that it may be multiplied at.
        struct mask_table {
            alignas(32) std::int16_t at[in_place / Bits][16];
        };
        static constexpr mask_table masks = [] {
            mask_table t{};
            for (int k = 0; k < in_place / Bits; ++k)
                for (std::int16_t& lane : t.at[k]) lane = static_cast<std::int16_t>(((1 << Bits) - 1) << (k * Bits));
            return t;
        }();
        /// With one head a pass has all codes of a word, and their masks share the address of the table; with more heads it has a few. The
        /// one mask of 8 bits stays in a register.
        template <int K>
        KVARN_INLINE static __m256i mask(const mask_table* table) noexcept
        {
            if constexpr (Bits == 8 && Heads == 1) return _mm256_set1_epi16((1 << Bits) - 1);
            const std::int16_t* at = Heads == 1 ? table->at[position<K> / Bits] : masks.at[position<K> / Bits];
            if constexpr (Heads > 1) KVARN_HOLD_POINTER(at);
            return _mm256_load_si256(reinterpret_cast<const __m256i*>(at));
        }
        template <int K>
        KVARN_INLINE static __m256i extract(__m256i x, const mask_table* table) noexcept
        {
            if constexpr (K == per_word - 1) return _mm256_srli_epi16(x, 16 - Bits);
            else if constexpr (K * Bits < in_place) return _mm256_and_si256(x, mask<K>(table));
            else return _mm256_and_si256(_mm256_srli_epi16(x, 8), mask<K>(table));
        }

        /// Adds the products of `together` codes of each word of x with the weights of all heads. One weight or a few codes at a
        /// time are alive: eight accumulators leave registers for no more.
        template <int First, int... K, class Broadcast>
        KVARN_INLINE static void accumulate(__m256i x, const mask_table* table, Broadcast&& weight, __m256i (&sum)[together][Heads],
                                            std::integer_sequence<int, K...>) noexcept
        {
            if constexpr (Heads == 1) {
                const __m256i w = weight(0);
                (add_words(sum[K][0], extract<First + K>(x, table), w), ...);
            } else {
                const __m256i codes[] = {extract<First + K>(x, table)...};
                KVARN_UNROLL
                for (int h = 0; h < Heads; ++h) {
                    const __m256i w = weight(h);
                    (add_words(sum[K][h], codes[K], w), ...);
                }
            }
        }

        template <int First, int... K>
        KVARN_INLINE static void store(const __m256i (&sum)[together][Heads], bool wide, int words, int at, float (*stage)[128],
                                       std::integer_sequence<int, K...>) noexcept
        {
            const auto one = [&](auto k, const __m256i(&from)[Heads]) KVARN_LAMBDA {
                constexpr int code = First + k();
                constexpr float scale = code == per_word - 1 ? 1.0f : 1.0f / static_cast<float>(1 << position<code>);
                KVARN_UNROLL
                for (int h = 0; h < Heads; ++h) {
                    float* const to = stage[h] + code * words + at;
                    const __m128i low = _mm256_castsi256_si128(from[h]), high = _mm256_extracti128_si256(from[h], 1);
                    if (wide) {
                        _mm_store_ps(to, _mm_mul_ps(_mm_cvtepi32_ps(low), _mm_set1_ps(scale)));
                        _mm_store_ps(to + 8, _mm_mul_ps(_mm_cvtepi32_ps(high), _mm_set1_ps(scale)));
                    } else {
                        _mm_store_ps(to, _mm_mul_ps(_mm_cvtepi32_ps(_mm_add_epi32(low, high)), _mm_set1_ps(scale)));
                    }
                }
            };
            (one(std::integral_constant<int, K>{}, sum[K]), ...);
        }

        /// Weights of four rows for a pass over 16 bytes of each: a pair in the lower, the next in the upper half.
        using two_pairs = std::int16_t[Heads][16];

        /// Four rows of 16 bytes, interleaved, for each pass over half of them.
        using quarters = std::uint8_t[2][max_product_rows / 4][32];
        template <bool Wide>
        static constexpr bool interleaved = !Wide && passes >= 8;

        KVARN_INLINE static void interleave_rows(const std::uint8_t* p, std::ptrdiff_t row_bytes, int rows, quarters& to) noexcept
        {
            for (int i = 0; i < rows; i += 4, p += 4 * row_bytes) {
                const __m256i a = load_two(p, p + 2 * row_bytes), b = load_two(p + row_bytes, p + 3 * row_bytes);
                store_vector(to[0][i / 4], _mm256_unpacklo_epi16(a, b));
                store_vector(to[1][i / 4], _mm256_unpackhi_epi16(a, b));
            }
        }

        template <bool Wide, int Half, int First>
        KVARN_INLINE static void pass(const std::uint8_t* codes, std::ptrdiff_t row_bytes, int rows, const quarters& quads,
                                      const std::int16_t* const (&weights)[Heads], const two_pairs* pairs, float (*stage)[128],
                                      read_ahead& ahead) noexcept
        {
            constexpr auto each = std::make_integer_sequence<int, together>{};
            __m256i sum[halves][together][Heads];
            KVARN_UNROLL
            for (int u = 0; u < halves; ++u)
                KVARN_UNROLL
                for (int k = 0; k < together; ++k)
                    KVARN_UNROLL
                    for (int h = 0; h < Heads; ++h) sum[u][k][h] = _mm256_setzero_si256();
            const mask_table* table = &masks;
            for (int i = 0; i < rows; i += 4) {
                KVARN_HOLD_POINTER(table);
                KVARN_UNROLL
                for (int j = 0; j < (Wide ? 4 : 2); j += 2) {
                    const auto w = [&](int h) KVARN_LAMBDA { return Wide ? broadcast_pair(weights[h] + i + j) : load_vector(pairs[i / 4][h]); };
                    if constexpr (interleaved<Wide>) {
                        accumulate<First>(load_vector(quads[Half][i / 4]), table, w, sum[0], each);
                    } else {
                        const std::uint8_t* const p = codes + (i + j) * row_bytes;
                        const __m256i a = Wide ? load32(p) : load_two(p, p + 2 * row_bytes);
                        const __m256i b = Wide ? load32(p + row_bytes) : load_two(p + row_bytes, p + 3 * row_bytes);
                        if constexpr (halves == 2 || Half == 0) accumulate<First>(_mm256_unpacklo_epi16(a, b), table, w, sum[0], each);
                        if constexpr (halves == 2 || Half == 1) accumulate<First>(_mm256_unpackhi_epi16(a, b), table, w, sum[halves - 1], each);
                    }
                }
                ahead.touch<read_ahead::beside((Wide ? 128 : 64) / passes)>();
            }
            KVARN_UNROLL
            for (int u = 0; u < halves; ++u)
                KVARN_UNROLL
                for (int k = 0; k < together; ++k)
                    KVARN_UNROLL
                    for (int h = 0; h < Heads; ++h) KVARN_HOLD(sum[u][k][h]);
            KVARN_UNROLL
            for (int u = 0; u < halves; ++u) store<First>(sum[u], Wide, Wide ? 16 : 8, 4 * (halves == 2 ? u : Half), stage, each);
        }

        template <bool Wide>
        KVARN_INLINE static void run(const std::uint8_t* codes, std::ptrdiff_t row_bytes, int rows, const std::int16_t* const (&weights)[Heads],
                                     float* const* to, read_ahead& ahead) noexcept
        {
            alignas(32) float stage[Heads][128];
            alignas(32) two_pairs pairs[Wide ? 1 : max_product_rows / 4];
            if constexpr (!Wide)
                for (int i = 0; i < rows; i += 4)
                    for (int h = 0; h < Heads; ++h)
                        store_vector(pairs[i / 4][h], _mm256_blend_epi32(broadcast_pair(weights[h] + i), broadcast_pair(weights[h] + i + 2), 0xf0));
            alignas(32) quarters quads;
            if constexpr (interleaved<Wide>) interleave_rows(codes, row_bytes, rows, quads);
            const auto group = [&](auto first) KVARN_LAMBDA {
                pass<Wide, 0, first()>(codes, row_bytes, rows, quads, weights, pairs, stage, ahead);
                if constexpr (halves == 1) pass<Wide, 1, first()>(codes, row_bytes, rows, quads, weights, pairs, stage, ahead);
            };
            [&]<int... Index>(std::integer_sequence<int, Index...>) KVARN_LAMBDA {
                (group(std::integral_constant<int, Index * together>{}), ...);
            }(std::make_integer_sequence<int, per_word / together>{});
            KVARN_UNROLL
            for (int h = 0; h < Heads; ++h) interleave_out<per_word>(stage[h], Wide ? 16 : 8, to[h]);
        }

        /// Sixteen columns: a shuffle puts the two bytes that hold a code into its word, a mask leaves the code at its place in them.
        struct gather_plan {
            alignas(32) std::uint8_t order[32];
            alignas(32) std::int16_t mask[16];
            alignas(32) float scale[16];
        };
        static constexpr gather_plan plan = [] {
            gather_plan p{};
            for (int lane = 0; lane < 16; ++lane) {
                // Lower half columns 0..3 and 8..11, upper half the others: interleaving two rows then leaves them in order.
                const int column = lane < 8 ? lane % 4 + (lane < 4 ? 0 : 8) : lane % 4 + (lane < 12 ? 4 : 12);
                const int bit = column * Bits, start = bit / 8;
                p.order[2 * lane] = static_cast<std::uint8_t>(start);
                p.order[2 * lane + 1] = static_cast<std::uint8_t>(start + 1 < 2 * Bits ? start + 1 : start);
                p.mask[lane] = static_cast<std::int16_t>(((1 << Bits) - 1) << (bit % 8));
                p.scale[column] = 1.0f / static_cast<float>(1 << (bit % 8));
            }
            return p;
        }();

        KVARN_INLINE static __m256i gather(const std::uint8_t* p) noexcept
        {
            const __m256i both = _mm256_broadcastsi128_si256(load16(p));
            const __m256i words = _mm256_shuffle_epi8(both, _mm256_load_si256(reinterpret_cast<const __m256i*>(plan.order)));
            return _mm256_and_si256(words, _mm256_load_si256(reinterpret_cast<const __m256i*>(plan.mask)));
        }

        /// `Groups` times sixteen columns.
        template <int Groups>
        KVARN_INLINE static void gathered(const std::uint8_t* codes, std::ptrdiff_t row_bytes, int rows,
                                          const std::int16_t* const (&weights)[Heads], float* const* to, read_ahead& ahead) noexcept
        {
            __m256i sum[Groups][2][Heads];
            KVARN_UNROLL
            for (int g = 0; g < Groups; ++g)
                KVARN_UNROLL
                for (int h = 0; h < Heads; ++h) sum[g][0][h] = sum[g][1][h] = _mm256_setzero_si256();
            for (int i = 0; i < rows; i += 2) {
                KVARN_UNROLL
                for (int g = 0; g < Groups; ++g) {
                    const std::uint8_t* const p = codes + i * row_bytes + g * 2 * Bits;
                    const __m256i a = gather(p), b = gather(p + row_bytes);
                    const __m256i low = _mm256_unpacklo_epi16(a, b), high = _mm256_unpackhi_epi16(a, b);
                    KVARN_UNROLL
                    for (int h = 0; h < Heads; ++h) {
                        const __m256i w = broadcast_pair(weights[h] + i);
                        add_words(sum[g][0][h], low, w);
                        add_words(sum[g][1][h], high, w);
                    }
                }
                ahead.touch<read_ahead::beside(4 * Bits * Groups)>();
            }
            KVARN_UNROLL
            for (int g = 0; g < Groups; ++g)
                KVARN_UNROLL
                for (int h = 0; h < Heads; ++h)
                    KVARN_UNROLL
                    for (int u = 0; u < 2; ++u)
                        _mm256_storeu_ps(to[h] + 16 * g + 8 * u,
                                         _mm256_mul_ps(_mm256_cvtepi32_ps(sum[g][u][h]), _mm256_load_ps(plan.scale + 8 * u)));
        }
    };
};

}  // namespace kvarn::simd
