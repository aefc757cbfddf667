// SPDX-License-Identifier: Apache-2.0
#pragma once
// The paper's encoder: asymmetric min-max rounding per axis-0 index of a normalised tile (paper section
// 4.3, docs/numerics.md). In: a float tile [axis 0][axis 1] with its factors s0, s1. Out: packed codes, and the record's scalars as floats
// (scale = s0 * scale of the rounding, zero = s0 * zero). float arithmetic, fixed order. No allocation; thread safe.

#include <cstddef>
#include <cstdint>
#include <limits>

#include <kvarn/codec/packing.hpp>
#include <kvarn/layout/encode_options.hpp>
#include <kvarn/simd/lanes.hpp>

namespace kvarn::detail {

/// Values of this magnitude and above round to an infinite half.
inline constexpr float half_overflow = 65520.0f;

/// Packs the codes of rows [i0, i0 + rows) of size1 codes each into their place in the stream.
template <class Arch>
KVARN_INLINE void pack_rows(const std::uint8_t* codes, int i0, int rows, int size1, int bits, std::uint8_t* packed) noexcept
{
    const std::size_t count = static_cast<std::size_t>(rows) * static_cast<std::size_t>(size1);
    std::uint8_t* const to =
        packed + static_cast<std::size_t>(i0) * static_cast<std::size_t>(size1) * static_cast<std::size_t>(bits) / 8;
    pack_stream<Arch>(bits, codes, count, to);
}

/// Minima and maxima of `rows` (even) rows of tile * reciprocal1.
template <class Arch, class Size1>
KVARN_NOINLINE void row_ranges(const float* row, std::ptrdiff_t stride, int rows, Size1 size1, const float* reciprocal1, float* low,
                               float* high) noexcept
{
    using v = simd::lanes<Arch>;
    constexpr int together = 2;
    for (int i = 0; i < rows; i += together, row += together * stride) {
        v least[together], most[together];
        KVARN_UNROLL
        for (int n = 0; n < together; ++n) least[n] = most[n] = mul(v::load(row + n * stride), v::load(reciprocal1));
        for (int j = simd::lane_count; j < size1; j += simd::lane_count) {
            const v r = v::load(reciprocal1 + j);
            KVARN_UNROLL
            for (int n = 0; n < together; ++n) {
                const v x = mul(v::load(row + n * stride + j), r);
                least[n] = minimum(least[n], x);
                most[n] = maximum(most[n], x);
            }
        }
        KVARN_UNROLL
        for (int n = 0; n < together; ++n) {
            low[i + n] = reduce_min(least[n]);
            high[i + n] = reduce_max(most[n]);
        }
    }
}

/// Codes of rows of tile * reciprocal1: round((x - low) * inverse), one a byte. Writes up to fifteen bytes beyond the last row.
template <class Arch, class Size1>
KVARN_NOINLINE void round_rows(const float* row, std::ptrdiff_t stride, int rows, Size1 size1, const float* reciprocal1, const float* low,
                               const float* inverse, std::uint8_t* codes) noexcept
{
    using v = simd::lanes<Arch>;
    using k = simd::kernels<Arch>;
    for (int i = 0; i < rows; ++i, row += stride, codes += size1) {
        const auto by = k::broadcast(inverse[i]);
        const v minus_low = v::broadcast(-low[i]);
        // The same products as in row_ranges: x - low lies between 0 and the range, so no code needs a clamp.
        for (int j = 0; j < size1; j += simd::lane_count)  // may run over into the next row's codes, which come later
            k::store_codes(codes + j, v(add(mul(v::load(row + j), v::load(reciprocal1 + j)), minus_low)).r, by);
    }
}

/// Rounds tile / s0 / s1 to codes of `bits` bits. scale and zero hold size0 floats rounded up to sixteen, reciprocal1 size1
/// likewise (working memory). With `packed` null only scale and zero are computed. Returns whether all scalars fit a half.
/// Columns of the tile from size1 up to whole lanes are overwritten.
template <class Arch>
bool encode_minmax(float* tile, std::ptrdiff_t stride, int size0, int size1, const float* s0, const float* s1,
                   float* reciprocal1, int bits, std::uint8_t* packed, float* scale, float* zero) noexcept
{
    using v = simd::lanes<Arch>;
    constexpr int block = simd::lane_count;
    const int padded1 = simd::whole_lanes(size1);
    const float levels = static_cast<float>((1 << bits) - 1);
    const auto sized = [&](auto&& work) KVARN_LAMBDA {  // 64 columns: the reciprocals stay in registers
        if (size1 == 64) work(std::integral_constant<int, 64>{});
        else work(size1);
    };
    float plus_zero = 0.0f;
    KVARN_PIN(plus_zero);  // in plain sight, -fno-signed-zeros would leave its addition out

    for (int j = 0; j < size1; j += simd::lane_count) div(v::broadcast(1.0f), v::load(s1 + j)).store(reciprocal1 + j);
    for (int j = size1; j < padded1; ++j) {  // padding repeats column 0, so that it changes no minimum and no maximum
        reciprocal1[j] = reciprocal1[0];
        for (int i = 0; i < size0; ++i) tile[i * stride + j] = tile[i * stride];
    }

    v largest = v::broadcast(0.0f);
    alignas(64) std::uint8_t codes[block * max_head_dim + simd::lane_count];
    alignas(64) float low[block] = {}, high[block] = {}, inverse[block];
    for (int i0 = 0; i0 < size0; i0 += block) {
        const int rows = size0 - i0 < block ? size0 - i0 : block;
        const float* const block_rows = tile + i0 * stride;
        sized([&](auto n) KVARN_LAMBDA { row_ranges<Arch>(block_rows, stride, rows, n, reciprocal1, low, high); });
        // s0 divides out of x - min and of the range alike: only the floor of the scale knows it. Adding +0 turns -0 into +0.
        const v least = add(v::load(low), v::broadcast(plus_zero));
        const v floor = mul(v::load(s0 + i0), v::broadcast(1e-10f));
        const v range = add(v::load(high), mul(least, v::broadcast(-1.0f)));
        const v step = maximum(div(range, v::broadcast(levels)), floor);
        least.store(zero + i0);
        step.store(scale + i0);
        div(v::broadcast(1.0f), step).store(inverse);
        largest = maximum(largest, maximum(step, maximum(least, mul(least, v::broadcast(-1.0f)))));
        if (packed == nullptr) continue;

        sized([&](auto n) KVARN_LAMBDA { round_rows<Arch>(block_rows, stride, rows, n, reciprocal1, zero + i0, inverse, codes); });
        pack_rows<Arch>(codes, i0, rows, size1, bits, packed);
    }
    return reduce_max(largest) < half_overflow;
}

}  // namespace kvarn::detail
