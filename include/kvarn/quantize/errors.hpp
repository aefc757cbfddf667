// SPDX-License-Identifier: Apache-2.0
#pragma once
// How far the tokens of a record are from the exact ones. In: the rotated float tile that an encoder left in scratch, and the record
// it wrote. Out: the worst token's errors. Works from the packed bytes as a decoder would, so it holds for every encoder.
// float arithmetic in a fixed order. No allocation; works in the caller's scratch.

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>

#include <kvarn/codec/decode.hpp>
#include <kvarn/codec/packing.hpp>
#include <kvarn/quantize/tile.hpp>

namespace kvarn {

/// Errors of the K or the V part of one record; x is an exact token, x' the decoded one (quantized channels only). No unit.
/// A token of norm 0 has errors 0 if it decodes to 0, and infinite ones otherwise; norms below 1e-22, whose squares underflow, count as 0.
struct part_errors {
    float worst_scale_error = 0;     ///< largest | ||x'|| / ||x|| - 1 | over the tokens: the paper's token-scale error
    float worst_relative_error = 0;  ///< largest ||x - x'|| / ||x|| over the tokens
    float relative_error = 0;        ///< ||X - X'|| / ||X|| over the whole part
};

/// What quantize_kv reports of one record, so that an engine can keep a tile exact or give it more bits where a bound fails.
struct record_errors {
    part_errors k;
    part_errors v;  ///< zeros when the format has no V part
};

namespace detail {

/// Sums over one token, or over all.
struct token_sums {
    float exact = 0, decoded = 0, difference = 0;  // of squares
};

KVARN_INLINE float error_ratio(float part, float whole) noexcept
{
    using one = simd::kernels<simd::portable>;
    if (whole > 0.0f) return one::sqrt(one::div(part, whole));
    return part > 0.0f ? std::numeric_limits<float>::infinity() : 0.0f;
}

KVARN_INLINE void add_token(const token_sums& t, part_errors& worst, token_sums& all) noexcept
{
    using one = simd::kernels<simd::portable>;
    const float scale = t.exact > 0.0f ? std::fabs(one::sub(error_ratio(t.decoded, t.exact), 1.0f)) : error_ratio(t.decoded, t.exact);
    worst.worst_scale_error = one::maximum(worst.worst_scale_error, scale);
    worst.worst_relative_error = one::maximum(worst.worst_relative_error, error_ratio(t.difference, t.exact));
    all.exact = one::add(all.exact, t.exact);
    all.decoded = one::add(all.decoded, t.decoded);
    all.difference = one::add(all.difference, t.difference);
}

/// Where one part of a record keeps its fields, whatever K or V calls them.
struct part_fields {
    std::size_t codes, scale0, zero0, scale1;
};

/// One part of a record against m.tile [size0][stride], which is readable up to whole lanes;
/// tokens_first: axis 0 is the token (V), otherwise axis 1 (K).
template <class Arch>
KVARN_NOINLINE part_errors measure_part(const tile_memory& m, std::ptrdiff_t stride, int size0, int size1, bool tokens_first, int bits,
                                        const std::byte* record, const part_fields& at) noexcept
{
    using v = simd::lanes<Arch>;
    using k = simd::kernels<Arch>;
    constexpr int block = simd::lane_count;
    const int padded1 = simd::whole_lanes(size1);
    float* const s1 = m.factors;
    float* const mask = s1 + padded1;  // 0 in the padding
    float* const exact = mask + padded1;
    float* const decoded = exact + padded1;
    float* const difference = decoded + padded1;
    load_scalars<Arch>(record + at.scale0, size0, m.scale);
    load_scalars<Arch>(record + at.zero0, size0, m.zero);
    load_scalars<Arch>(record + at.scale1, size1, s1);
    for (int j = 0; j < padded1; ++j) mask[j] = j < size1 ? 1.0f : 0.0f;
    for (int j = size1; j < padded1; ++j) s1[j] = 0.0f;

    part_errors worst;
    token_sums all;
    const auto row_bytes = static_cast<std::size_t>(block) * static_cast<std::size_t>(size1) * static_cast<std::size_t>(bits) / 8;
    const std::uint8_t* packed = reinterpret_cast<const std::uint8_t*>(record + at.codes);
    std::uint8_t* const bytes = reinterpret_cast<std::uint8_t*>(m.stage);
    for (int i0 = 0; i0 < size0; i0 += block, packed += row_bytes) {
        const int rows = size0 - i0 < block ? size0 - i0 : block;
        const auto count = static_cast<std::size_t>(rows) * static_cast<std::size_t>(size1);
        unpack_stream<Arch>(bits, packed, count, bytes);
        for (int i = 0; i < rows; ++i) {
            const v scale = v::broadcast(m.scale[i0 + i]), zero = v::broadcast(m.zero[i0 + i]);
            v sum_x = v::broadcast(0.0f), sum_y = sum_x, sum_d = sum_x;
            for (int j = 0; j < padded1; j += block) {
                const v x = mul(v::load(m.tile + (i0 + i) * stride + j), v::load(mask + j));
                const std::uint8_t* const code = bytes + i * size1 + j;  // may run over into the next row's, or into what is left of stage
                const v c = v::make([&](int e) KVARN_LAMBDA { return k::load_codes(code + e * k::width); });
                const v y = mul(fma(c, scale, zero), v::load(s1 + j)), d = sub(x, y);
                if (tokens_first) {
                    sum_x = fma(x, x, sum_x);
                    sum_y = fma(y, y, sum_y);
                    sum_d = fma(d, d, sum_d);
                } else {
                    const bool first = i0 + i == 0;
                    fma(x, x, first ? sum_x : v(v::load(exact + j))).store(exact + j);
                    fma(y, y, first ? sum_x : v(v::load(decoded + j))).store(decoded + j);
                    fma(d, d, first ? sum_x : v(v::load(difference + j))).store(difference + j);
                }
            }
            if (tokens_first) add_token({reduce_add(sum_x), reduce_add(sum_y), reduce_add(sum_d)}, worst, all);
        }
    }
    if (!tokens_first)
        for (int j = 0; j < size1; ++j) add_token({exact[j], decoded[j], difference[j]}, worst, all);
    worst.relative_error = error_ratio(all.difference, all.exact);
    return worst;
}

}  // namespace detail
}  // namespace kvarn
