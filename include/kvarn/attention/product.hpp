// SPDX-License-Identifier: Apache-2.0
#pragma once
// Weights times packed codes, the one product behind scores and values: y[h][c] = sum over rows i of w[h][i] * code[i][c].
// K: rows are channels, columns tokens. V: rows are tokens, columns channels. Nothing is decoded to memory beyond a few rows.
//
// exact: float fma, codes unpacked 32 rows at a time. words: weights rounded to 16 bits. bytes: weights rounded to 8 bits, for codes of 2
// and 4 bits. Sums of rounded weights are exact. Rounding and sums are the same on every instruction set.

#include <cstddef>
#include <cstdint>
#include <limits>
#include <type_traits>

#include <kvarn/codec/packing.hpp>
#include <kvarn/simd/lanes.hpp>

namespace kvarn::detail {

enum class product_kind : std::uint8_t {
    exact,
    words,
    bytes,           // with a sign, for K
    positive_bytes,  // without, for V: half the step
};

/// Query rows that share the scalars of a tile, and, where the kernel gains by it, a pass over its codes.
inline constexpr int most_heads = 8;
inline constexpr int unpacked_rows = 32;  // of the exact product

/// Query rows [h] of one product: floats w[h * stride], y[h * stride]; and where the rounded weights go.
struct product_rows {
    float* w;
    float* y;
    std::ptrdiff_t stride;
    std::int16_t* words;           // [heads][stride]
    std::int8_t* bytes;            // the same memory
    std::uint8_t* positive_bytes;  // the same memory
    std::uint8_t* codes;           // [unpacked_rows * columns + 16], exact product only
};

/// Those from row `first` on.
[[nodiscard]] KVARN_INLINE product_rows rows_from(product_rows x, int first) noexcept
{
    const std::ptrdiff_t skip = first * x.stride;
    x.w += skip;
    x.y += skip;
    x.words += skip;
    x.bytes += skip;
    x.positive_bytes += skip;
    return x;
}

/// What a row's sums stand for: the product is step * y + offset.
struct product_scale {
    float step;
    float offset;
};

/// What rounding needs to know of one row's weights: the largest magnitude, and the sum of magnitudes (words) or of the weights (bytes).
struct weight_totals {
    float most;
    float sum;
};

/// Rounds `n` weights (padded with zeros to a multiple of 16) to 16 bits such that no 32-bit sum over `bits`-bit codes overflows, or to
/// 8 bits, with a sign or without. What rounding to 8 bits took away in total meets the middle code: that is the offset.
template <class Arch, class Rounded>
KVARN_INLINE product_scale round_weights(int bits, const float* w, int n, const weight_totals& of, Rounded* rounded) noexcept
{
    using k = simd::kernels<Arch>;
    using one = simd::kernels<simd::portable>;
    using lane = simd::lanes<Arch>;
    constexpr bool words = sizeof(Rounded) == 2;
    // Words: |rounded| <= 32767 and sum |rounded| <= sum / step + n / 2 <= 2^31 / word_limit - n / 2.
    float step = one::mul(of.most, 1.0f / static_cast<float>((std::numeric_limits<Rounded>::max)()));
    if constexpr (words)
        step = one::maximum(step, of.sum / (2147483648.0f / static_cast<float>(simd::word_limit(bits)) - static_cast<float>(n)));
    step = one::maximum(step, 1e-30f);
    const auto inverse = k::broadcast(1.0f / step);
    for (int i = 0; i < n; i += simd::lane_count) {
        const lane x = lane::load(w + i);
        if constexpr (words) k::store_words(rounded + i, x.r, inverse);
        else if constexpr (std::is_signed_v<Rounded>) k::store_bytes(rounded + i, x.r, inverse);
        else k::store_codes(rounded + i, x.r, inverse);
    }
    if constexpr (words) return {step, 0.0f};
    else {
        const float lost = one::fnma(step, static_cast<float>(k::sum_bytes(rounded, simd::whole_lanes(n))), of.sum);
        return {step, one::mul(lost, 0.5f * static_cast<float>((1 << bits) - 1))};
    }
}

/// round_weights of `heads` rows of x.
template <class Arch, class Rounded>
KVARN_NOINLINE void round_all_weights(int heads, int bits, int n, const product_rows& x, const weight_totals* totals, Rounded* rounded,
                                      product_scale* scale) noexcept
{
    for (int h = 0; h < heads; ++h) scale[h] = round_weights<Arch>(bits, x.w + h * x.stride, n, totals[h], rounded + h * x.stride);
}

/// The exact product: rows in order, one fma each.
template <class Arch, int Heads>
KVARN_NOINLINE void multiply_exact(int bits, const std::uint8_t* codes, int rows, int columns, const product_rows& x, simd::read_ahead& ahead) noexcept
{
    using k = simd::kernels<Arch>;
    using lane = simd::part_lanes<Arch>;
    constexpr int n = lane::count;
    constexpr int blocks = 4 / Heads;  // of n columns at a time
    const int padded = simd::whole_lanes(columns);
    for (int first = 0; first < rows; first += unpacked_rows) {
        const int now = rows - first < unpacked_rows ? rows - first : unpacked_rows;
        const auto count = static_cast<std::size_t>(now) * static_cast<std::size_t>(columns);
        unpack_stream<Arch>(bits, codes, count, x.codes);
        codes += count * static_cast<std::size_t>(bits) / 8;
        const auto block = [&](auto width, int c) KVARN_LAMBDA {
            constexpr int wide = decltype(width)::value;
            lane sum[Heads][wide];
            KVARN_UNROLL
            for (int h = 0; h < Heads; ++h)
                KVARN_UNROLL
                for (int j = 0; j < wide; ++j)
                    sum[h][j] = first == 0 ? lane::broadcast(0.0f) : lane::load(x.y + h * x.stride + c + n * j);
            for (int i = 0; i < now; ++i) {
                lane code[wide];
                KVARN_UNROLL
                for (int j = 0; j < wide; ++j) {
                    const std::uint8_t* const at = x.codes + i * columns + c + n * j;
                    code[j] = lane::make([&](int r) KVARN_LAMBDA { return k::load_codes(at + r * k::width); });
                }
                KVARN_UNROLL
                for (int h = 0; h < Heads; ++h) {
                    const lane w = lane::broadcast(x.w[h * x.stride + first + i]);
                    KVARN_UNROLL
                    for (int j = 0; j < wide; ++j) {
                        sum[h][j] = fma(code[j], w, sum[h][j]);
                        sum[h][j].hold();
                    }
                }
                if (c == 0) ahead.touch();
            }
            KVARN_UNROLL
            for (int h = 0; h < Heads; ++h)
                KVARN_UNROLL
                for (int j = 0; j < wide; ++j) sum[h][j].store(x.y + h * x.stride + c + n * j);
        };
        int c = 0;
        for (; c + n * blocks <= padded; c += n * blocks) block(std::integral_constant<int, blocks>{}, c);
        if constexpr (n * blocks > simd::lane_count)
            for (; c < padded; c += n) block(std::integral_constant<int, 1>{}, c);
    }
}

/// The product with rounded weights [h][x.stride].
template <class Arch, int Bits, int Heads, class Weight>
KVARN_NOINLINE void multiply_rounded(const std::uint8_t* codes, int rows, int columns, const product_rows& x, const Weight* rounded,
                                     simd::read_ahead& ahead) noexcept
{
    const Weight* w[Heads];
    float* y[Heads];
    KVARN_UNROLL
    for (int h = 0; h < Heads; ++h) {
        w[h] = rounded + h * x.stride;
        y[h] = x.y + h * x.stride;
    }
    const Weight* const(&weights)[Heads] = reinterpret_cast<const Weight* const(&)[Heads]>(w);
    float* const(&sums)[Heads] = reinterpret_cast<float* const(&)[Heads]>(y);
    if constexpr (sizeof(Weight) == 2) simd::kernels<Arch>::template multiply_words<Bits, Heads>(codes, rows, columns, weights, sums, ahead);
    else simd::kernels<Arch>::template multiply_bytes<Bits, Heads, Weight>(codes, rows, columns, weights, sums, ahead);
}

/// Which product a tile gets: what was asked for, or the next more precise one where the shape does not allow it.
[[nodiscard]] KVARN_INLINE constexpr product_kind kind_for(product_kind wanted, int bits, int columns) noexcept
{
    if (wanted == product_kind::exact || columns % 16 != 0) return product_kind::exact;
    const bool narrow = bits == 2 || bits == 4;
    return wanted != product_kind::words && !narrow ? product_kind::words : wanted;
}

/// Calls f(n, first) with n = 1, 2, 4 or Most query rows as an integral constant, until `heads` of them are done.
template <int Most, class F>
KVARN_INLINE void with_heads(int heads, F&& f) noexcept
{
    int first = 0;
    while (first < heads) {
        const int left = heads - first;
        const auto call = [&](auto n) KVARN_LAMBDA {
            f(n, first);
            return n();
        };
        if (Most > 4 && left >= Most) first += call(std::integral_constant<int, Most>{});
        else if (left >= 4) first += call(std::integral_constant<int, 4>{});
        else if (left >= 2) first += call(std::integral_constant<int, 2>{});
        else first += call(std::integral_constant<int, 1>{});
    }
}

/// The product of `heads` rows of x, most_heads at most, with `rows` rows of codes. All weights outside of rows [begin, end), multiples of 8, are 0:
/// those codes are not looked at, and the result is the same.
template <class Arch>
KVARN_INLINE void multiply(int heads, product_kind kind, int bits, const std::byte* packed, int rows, int columns, const product_rows& x,
                             const weight_totals* totals, product_scale* scale, int begin, int end, simd::read_ahead& ahead) noexcept
{
    const std::uint8_t* const codes = reinterpret_cast<const std::uint8_t*>(packed) + static_cast<std::ptrdiff_t>(begin) * columns * bits / 8;
    const int some = end - begin;
    kind = kind_for(kind, bits, columns);
    if (kind == product_kind::exact) {
        for (int h = 0; h < heads; ++h) scale[h] = {1.0f, 0.0f};
        product_rows from = x;
        from.w += begin;
        with_heads<4>(heads, [&](auto n, int first) KVARN_LAMBDA {
            multiply_exact<Arch, n()>(bits, codes, some, columns, rows_from(from, first), ahead);
        });
        return;
    }
    if (kind == product_kind::words) round_all_weights<Arch>(heads, bits, rows, x, totals, x.words, scale);
    else if (kind == product_kind::bytes) round_all_weights<Arch>(heads, bits, rows, x, totals, x.bytes, scale);
    else round_all_weights<Arch>(heads, bits, rows, x, totals, x.positive_bytes, scale);
    with_bits(bits, [&](auto b) KVARN_LAMBDA {
        if (kind == product_kind::words) {
            with_heads<4>(heads, [&](auto n, int first) KVARN_LAMBDA {
                const product_rows from = rows_from(x, first);
                multiply_rounded<Arch, b(), n()>(codes, some, columns, from, from.words + begin, ahead);
            });
        } else if constexpr (b() == 2 || b() == 4) {
            with_heads<simd::kernels<Arch>::most_byte_heads>(heads, [&](auto n, int first) KVARN_LAMBDA {
                const product_rows from = rows_from(x, first);
                if (kind == product_kind::bytes) multiply_rounded<Arch, b(), n()>(codes, some, columns, from, from.bytes + begin, ahead);
                else multiply_rounded<Arch, b(), n()>(codes, some, columns, from, from.positive_bytes + begin, ahead);
            });
        }
    });
}

/// The transposed product, for values that are read from K: y[h][row] = sum over columns c of w[h][c] * code[row][c]. float.
template <class Arch>
KVARN_NOINLINE void multiply_transposed(int bits, const std::byte* packed, int rows, int columns, int heads, const product_rows& x) noexcept
{
    using k = simd::kernels<Arch>;
    using lane = simd::lanes<Arch>;
    const std::uint8_t* codes = reinterpret_cast<const std::uint8_t*>(packed);
    alignas(64) float folded[16 * k::width];
    for (int first = 0; first < rows; first += 16) {
        const int now = rows - first < 16 ? rows - first : 16;
        const auto count = static_cast<std::size_t>(now) * static_cast<std::size_t>(columns);
        unpack_stream<Arch>(bits, codes, count, x.codes);
        codes += count * static_cast<std::size_t>(bits) / 8;
        for (int h = 0; h < heads; ++h) {
            const float* const w = x.w + h * x.stride;
            for (int i = 0; i < 16; ++i) {
                lane sum = lane::broadcast(0.0f);
                if (i < now)
                    for (int c = 0; c < columns; c += 16) {
                        const std::uint8_t* const at = x.codes + i * columns + c;
                        const lane code = lane::make([&](int r) KVARN_LAMBDA { return k::load_codes(at + r * k::width); });
                        sum = fma(code, lane::load(w + c), sum);
                    }
                k::store(folded + i * k::width, fold(sum));
            }
            simd::sum_folded_rows<Arch>(folded).store(x.y + h * x.stride + first);
        }
    }
}

}  // namespace kvarn::detail
