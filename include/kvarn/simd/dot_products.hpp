// SPDX-License-Identifier: Apache-2.0
#pragma once
// Integer products of weights with packed codes of 2 and 4 bits by dot-product instructions, which add four products of bytes to a 32-bit
// lane: for kernels<avx512vnni>, kernels<avxvnni> and kernels<neon64dot>. Written once over a vector type V.
//
// Four rows are interleaved, so that a 32-bit lane has a column's codes of four rows; all codes of a byte lie in the same lane and are
// masked out of it. Nothing goes through memory: a pass has the accumulators of a part of the columns, and interleaves for itself what
// it needs. Where a row is shorter than a vector, the vector has several rows side by side, whose sums meet at the end. Weights of 16
// bits are 256 * high + low, with a signed and an unsigned byte: each of them is a row of weights of its own.

#include <kvarn/base/config.hpp>  // first: it refuses older standards

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#include <kvarn/simd/portable.hpp>

namespace kvarn::simd {

/// The products of kernels<Arch> by dot-product instructions, which `V` has.
template <class V>
struct dot_products {
    using reg = typename V::reg;

    /// Weights are bytes with or without a sign, or planes: of each row the signed bytes, then the unsigned ones.
    enum class weight_kind { signed_bytes, unsigned_bytes, planes };

    /// Some rows of codes, interleaved, times the weights of `Heads` rows.
    template <int Bits, int Heads, weight_kind Kind>
    struct block {
        static constexpr int planes = Kind == weight_kind::planes ? 2 : 1;
        static constexpr bool signed_codes = Kind != weight_kind::signed_bytes;  // a dot product of x86 has one factor of each kind
        static constexpr int per_byte = 8 / Bits;
        static constexpr int rows_of_pass = (std::min)(Heads * planes, V::accumulators / per_byte);
        static constexpr int heads_of_pass = rows_of_pass / planes;
        static constexpr int quads_of_pass = (std::min)(4, V::accumulators / (per_byte * rows_of_pass));
        static constexpr int passes = Heads / heads_of_pass * 4 / quads_of_pass;

        /// Rows of codes for vectors of `Parts` rows: vector i of a step has the rows Parts * i ... The rows follow each other without
        /// gaps, or lie anywhere; then the ones from `rows` on are the first one.
        struct source {
            const std::uint8_t* codes;
            std::ptrdiff_t row_bytes;
            int rows;
        };

        /// Vector I of step s.
        template <int Parts, bool Gaps>
        KVARN_INLINE static reg load(const source& from, int s, int i) noexcept
        {
            const int row = 4 * Parts * s + Parts * i;
            if constexpr (Parts == 1) return V::load(from.codes + row * from.row_bytes);
            else if constexpr (!Gaps) return V::load(from.codes + static_cast<std::ptrdiff_t>(row) * (V::size / Parts));
            else {
                const std::uint8_t* at[Parts];
                KVARN_UNROLL
                for (int p = 0; p < Parts; ++p) at[p] = from.codes + (row + p < from.rows ? (row + p) * from.row_bytes : 0);
                return V::load_parts(at);
            }
        }

        template <int Quad>
        KVARN_INLINE static void interleave(const reg (&x)[4], reg (&quads)[quads_of_pass]) noexcept
        {
            if constexpr (quads_of_pass == 4) {
                const reg a = V::zip_bytes_low(x[0], x[1]), b = V::zip_bytes_low(x[2], x[3]);
                const reg c = V::zip_bytes_high(x[0], x[1]), d = V::zip_bytes_high(x[2], x[3]);
                quads[0] = V::zip_words_low(a, b);
                quads[1] = V::zip_words_high(a, b);
                quads[2] = V::zip_words_low(c, d);
                quads[3] = V::zip_words_high(c, d);
            } else {
                const reg a = Quad < 2 ? V::zip_bytes_low(x[0], x[1]) : V::zip_bytes_high(x[0], x[1]);
                const reg b = Quad < 2 ? V::zip_bytes_low(x[2], x[3]) : V::zip_bytes_high(x[2], x[3]);
                if constexpr (Quad % 2 == 0) quads[0] = V::zip_words_low(a, b);
                if constexpr (Quad % 2 == 1 || quads_of_pass == 2) quads[quads_of_pass - 1] = V::zip_words_high(a, b);
            }
        }

        template <int Parts, bool Gaps, int Quad>
        KVARN_INLINE static void pass(const source& from, int steps, int bytes, const std::uint8_t* const* weights, float* const* to,
                                      read_ahead& ahead) noexcept
        {
            reg sum[quads_of_pass][per_byte][rows_of_pass];
            KVARN_UNROLL
            for (int q = 0; q < quads_of_pass; ++q)
                KVARN_UNROLL
                for (int k = 0; k < per_byte; ++k)
                    KVARN_UNROLL
                    for (int r = 0; r < rows_of_pass; ++r) sum[q][k][r] = V::zero();
            const std::uint8_t* w[rows_of_pass];
            KVARN_UNROLL
            for (int r = 0; r < rows_of_pass; ++r) w[r] = weights[r];
            for (int s = 0; s < steps; ++s) {
                reg x[4], quads[quads_of_pass], weight[rows_of_pass];
                KVARN_UNROLL
                for (int i = 0; i < 4; ++i) x[i] = load<Parts, Gaps>(from, s, i);
                interleave<Quad>(x, quads);
                KVARN_UNROLL
                for (int r = 0; r < rows_of_pass; ++r) weight[r] = V::template weights<Parts>(w[r] + 4 * Parts * s);
                const auto code = [&](auto k, const reg& bytes_of, reg (&sums)[rows_of_pass]) KVARN_LAMBDA {
                    const reg codes = V::template code<Bits, k(), signed_codes>(bytes_of);
                    KVARN_UNROLL
                    for (int r = 0; r < rows_of_pass; ++r)
                        sums[r] = Kind == weight_kind::unsigned_bytes || (planes == 2 && r % 2 == 1) ? V::dot_unsigned(sums[r], codes, weight[r])
                                                                                                      : V::dot_signed(sums[r], codes, weight[r]);
                };
                KVARN_UNROLL
                for (int q = 0; q < quads_of_pass; ++q)
                    [&]<int... K>(std::integer_sequence<int, K...>) KVARN_LAMBDA {
                        (code(std::integral_constant<int, K>{}, quads[q], sum[q][K]), ...);
                    }(std::make_integer_sequence<int, per_byte>{});
                ahead.touch<read_ahead::beside(4 * V::size / passes)>();
            }
            KVARN_UNROLL
            for (int q = 0; q < quads_of_pass; ++q)
                KVARN_UNROLL
                for (int k = 0; k < per_byte; ++k)
                    KVARN_UNROLL
                    for (int r = 0; r < rows_of_pass; ++r) KVARN_HOLD(sum[q][k][r]);
            KVARN_UNROLL
            for (int q = 0; q < quads_of_pass; ++q) {
                if (4 * (Quad + q) < bytes)
                    KVARN_UNROLL
                    for (int h = 0; h < heads_of_pass; ++h) {
                        reg x[per_byte];
                        KVARN_UNROLL
                        for (int k = 0; k < per_byte; ++k) {
                            if constexpr (planes == 2) x[k] = V::join_planes(sum[q][k][2 * h], sum[q][k][2 * h + 1]);
                            else x[k] = sum[q][k][h];
                        }
                        V::template store<Bits, Parts, signed_codes>(x, to[h] + 4 * (Quad + q) * per_byte);
                    }
            }
        }

        /// All passes over `bytes` bytes of each row, the width of a part of a vector or less.
        template <int Parts, bool Gaps>
        KVARN_INLINE static void run(const source& from, int bytes, const std::uint8_t* const (&weights)[Heads * planes],
                                     float* const (&sums)[Heads], int column, read_ahead& ahead) noexcept
        {
            const int steps = (from.rows + 4 * Parts - 1) / (4 * Parts);
            for (int h = 0; h < Heads; h += heads_of_pass) {
                float* to[heads_of_pass];
                KVARN_UNROLL
                for (int i = 0; i < heads_of_pass; ++i) to[i] = sums[h + i] + column;
                [&]<int... Index>(std::integer_sequence<int, Index...>) KVARN_LAMBDA {
                    (pass<Parts, Gaps, Index * quads_of_pass>(from, steps, bytes, weights + h * planes, to, ahead), ...);
                }(std::make_integer_sequence<int, 4 / quads_of_pass>{});
            }
        }

        /// All columns. Weights: one row of bytes for each head and plane, with zeros up to a multiple of 16 where rows are not such a multiple.
        KVARN_INLINE static void multiply(const std::uint8_t* codes, int rows, int columns, const std::uint8_t* const (&weights)[Heads * planes],
                                          float* const (&sums)[Heads], read_ahead& shared) noexcept
        {
            read_ahead ahead = shared;  // in registers
            const std::ptrdiff_t row_bytes = static_cast<std::ptrdiff_t>(columns) * Bits / 8;
            int first_byte = 0;
            const auto from = [&]() KVARN_LAMBDA { return source{codes + first_byte, row_bytes, rows}; };
            for (; first_byte + V::size <= row_bytes; first_byte += V::size)
                run<1, false>(from(), V::size, weights, sums, first_byte * per_byte, ahead);
            if constexpr (V::size >= 64)
                if (row_bytes == 32 && rows % 8 == 0) {
                    run<V::size / 32, false>(from(), 32, weights, sums, 0, ahead);
                    first_byte = 32;
                }
            if constexpr (V::size >= 32)
                if (row_bytes == 16 && rows % (V::size / 4) == 0) {
                    run<V::size / 16, false>(from(), 16, weights, sums, 0, ahead);
                    first_byte = 16;
                }
            for (; first_byte < row_bytes; first_byte += 16) {
                const int bytes = row_bytes - first_byte < 16 ? static_cast<int>(row_bytes) - first_byte : 16;
                run<V::size / 16, (V::size > 16)>(from(), bytes, weights, sums, first_byte * per_byte, ahead);
            }
            shared = ahead;
        }
    };

    template <int Bits, int Heads, class Weight>
    KVARN_INLINE static void bytes(const std::uint8_t* codes, int rows, int columns, const Weight* const (&weights)[Heads],
                                   float* const (&sums)[Heads], read_ahead& ahead) noexcept
    {
        const std::uint8_t* w[Heads];
        std::uint8_t padded[Heads][(max_product_rows + 15) / 16 * 16];
        KVARN_UNROLL
        for (int h = 0; h < Heads; ++h) w[h] = reinterpret_cast<const std::uint8_t*>(weights[h]);
        if (V::size > 16 && rows % 16 != 0)
            for (int h = 0; h < Heads; ++h) {
                std::memcpy(padded[h], w[h], static_cast<std::size_t>(rows));
                std::memset(padded[h] + rows, 0, static_cast<std::size_t>(-rows & 15));
                w[h] = padded[h];
            }
        constexpr weight_kind kind = std::is_signed_v<Weight> ? weight_kind::signed_bytes : weight_kind::unsigned_bytes;
        block<Bits, Heads, kind>::multiply(codes, rows, columns, reinterpret_cast<const std::uint8_t* const(&)[Heads]>(w), sums, ahead);
    }

    template <int Bits, int Heads>
    KVARN_INLINE static void words(const std::uint8_t* codes, int rows, int columns, const std::int16_t* const (&weights)[Heads],
                                   float* const (&sums)[Heads], read_ahead& ahead) noexcept
    {
        alignas(16) std::uint8_t bytes_of[2 * Heads][(max_product_rows + 15) / 16 * 16];
        const std::uint8_t* w[2 * Heads];
        for (int h = 0; h < Heads; ++h) {
            std::uint8_t *const high = bytes_of[2 * h], *const low = bytes_of[2 * h + 1];
            int i = 0;
            for (; i + 16 <= rows; i += 16) V::split(weights[h] + i, high + i, low + i);
            if (i < rows) {
                std::int16_t last[16] = {};
                std::memcpy(last, weights[h] + i, static_cast<std::size_t>(rows - i) * sizeof(std::int16_t));
                V::split(last, high + i, low + i);
            }
            w[2 * h] = high;
            w[2 * h + 1] = low;
        }
        block<Bits, Heads, weight_kind::planes>::multiply(codes, rows, columns, reinterpret_cast<const std::uint8_t* const(&)[2 * Heads]>(w), sums, ahead);
    }
};

}  // namespace kvarn::simd
