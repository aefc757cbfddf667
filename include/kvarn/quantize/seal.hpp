// SPDX-License-Identifier: Apache-2.0
#pragma once
// One tile to one record. In: the tokens of a tile, any element type and strides. Out: codes and scalars (docs/record-format.md).
// K tiles are held [channel][token], V tiles [token][channel]: axis 0 first, so that the normaliser and the encoder know only
// one orientation. float arithmetic. No allocation; works in the caller's scratch.

#include <cstddef>
#include <cstdint>

#include <kvarn/base/extent.hpp>
#include <kvarn/codec/decode.hpp>
#include <kvarn/codec/encode.hpp>
#include <kvarn/codec/refine.hpp>
#include <kvarn/layout/record.hpp>
#include <kvarn/normalize/variance.hpp>
#include <kvarn/quantize/errors.hpp>
#include <kvarn/quantize/tile.hpp>
#include <kvarn/rotate/hadamard.hpp>

namespace kvarn::detail {

template <class Arch>
KVARN_INLINE void zero_fill(float* from, std::ptrdiff_t count) noexcept
{
    for (std::ptrdiff_t i = 0; i < count; i += simd::lane_count) simd::lanes<Arch>::broadcast(0.0f).store(from + i);
}

/// K: tokens to tile[channel * stride + token], rotated on the way where asked.
template <class Arch, class T>
KVARN_NOINLINE void load_key_tile(const tile_source<const T>& from, bool rotated, int dim, int group, const tile_memory& m,
                                  std::ptrdiff_t stride) noexcept
{
    constexpr int width = simd::kernels<Arch>::width;
    constexpr auto forward = direction::forward;
    for (int t = 0; t < group; t += width) {
        const T* const tokens = from.data + t * from.token_stride;
        if (from.channel_stride == 1) {
            transform_transposed<Arch>(tokens, from.token_stride, width, rotated, m.tile + t, stride, dim, forward);
        } else {
            for (int i = 0; i < width; ++i) load_row<Arch>(tokens + i * from.token_stride, from.channel_stride, dim, m.stage + i * dim);
            transform_transposed<Arch>(static_cast<const float*>(m.stage), dim, width, rotated, m.tile + t, stride, dim, forward);
        }
    }
    zero_fill<Arch>(m.tile + dim * stride, (simd::whole_lanes(dim) - dim) * stride);
}

/// V: tokens to tile[token * stride + channel], rotated on the way where asked.
template <class Arch, class T>
KVARN_NOINLINE void load_value_tile(const tile_source<const T>& from, bool rotated, int dim, int group, const tile_memory& m,
                                    std::ptrdiff_t stride) noexcept
{
    using k = simd::kernels<Arch>;
    if (rotated && from.channel_stride == 1 && is_common_extent(dim)) {
        with_extent(dim, [&](auto d) KVARN_LAMBDA {
            if constexpr (is_constant_extent<decltype(d)>) {
                for (int t = 0; t < group; ++t) {
                    const T* const token = from.data + t * from.token_stride;
                    float* const row = m.tile + t * stride;
                    transform_vector<Arch>([&](int c) KVARN_LAMBDA { return k::load(token + c); }, row, row, d);
                }
            }
        });
        return;
    }
    for (int t = 0; t < group; ++t) {
        float* const row = m.tile + t * stride;
        load_row<Arch>(from.data + t * from.token_stride, from.channel_stride, dim, row);
        for (int d = dim; d < simd::whole_lanes(dim); ++d) row[d] = 0.0f;
    }
    if (rotated) transform_any_rows<Arch>(m.tile, stride, group, dim, direction::forward);
}

/// The bits of the largest magnitude of a tile.
template <class Arch>
KVARN_NOINLINE std::uint32_t largest_in_tile(const float* tile, std::ptrdiff_t stride, int size0, int size1) noexcept
{
    return simd::kernels<Arch>::largest_magnitude(tile, static_cast<std::size_t>(size1), size0, stride);
}

/// One part of a record, from the rotated tile in m.tile to codes and scalars. `record` null: only report whether the scalars fit.
/// Where the refined encoder's scalars would not fit, the paper's encoder takes over, with its own rounds of normalisation: what one
/// accepts, the other does too.
template <class Arch>
KVARN_NOINLINE bool encode_part(const tile_memory& m, std::ptrdiff_t stride, int size0, int size1, token_axis token, int bits,
                              const encode_options& options, std::byte* record, const part_fields& at, part_errors* errors) noexcept
{
    const variance_factors f = place_variance_factors(m.factors, size0, size1);
    std::uint8_t* const packed = record ? reinterpret_cast<std::uint8_t*>(record + at.codes) : nullptr;
    const float* s1 = f.s1;
    bool fits = false;
    if (options.encoder == encoder::refined && record != nullptr) {
        static_assert(2 * simd::lane_count <= staged_tokens);
        const tile_unit unit = unit_of(largest_in_tile<Arch>(m.tile, stride, size0, size1));
        normalize_variance<Arch>(m.tile, stride, size0, size1, most_rounds(options), options.refined_iterations, unit.unit, f);
        const refine_memory r{m.scale,      m.zero,       f.current1, f.reciprocal1, f.deviation1, f.pivot1,
                              f.deviation0, f.sum1,       f.square1,  m.stage,       m.stage + simd::lane_count * simd::whole_lanes(size1)};
        for (int j = 0; j < size1; ++j) r.s1[j] = f.s1[j];
        fits = encode_refined<Arch>(m.tile, stride, size0, size1, token, bits, options.refit_rounds, options.clip_steps, f.s0, r, unit, packed);
        if (fits) s1 = r.s1;
    }
    if (!fits) {
        normalize_variance<Arch>(m.tile, stride, size0, size1, options.iterations, options.iterations, 1.0f, f);
        fits = encode_minmax<Arch>(m.tile, stride, size0, size1, f.s0, f.s1, f.reciprocal1, bits, packed, m.scale, m.zero);
    }
    if (record == nullptr) return fits;
    store_scalars<Arch>(m.scale, size0, record + at.scale0);
    store_scalars<Arch>(m.zero, size0, record + at.zero0);
    store_scalars<Arch>(s1, size1, record + at.scale1);
    if (errors != nullptr)
        *errors = measure_part<Arch>(m, stride, size0, size1, token == token_axis::axis0, bits, record, at);
    return fits;
}

/// The K part of a record; `errors` may be null.
template <class Arch, class T>
bool encode_keys(const format& f, const tile_source<const T>& k, const tile_memory& m, const encode_options& options, std::byte* record,
                 part_errors* errors) noexcept
{
    const record_layout at = layout_of(f);
    const std::ptrdiff_t stride = f.group() + tile_padding;
    load_key_tile<Arch>(k, turns_keys(f, options), f.head_dim_k(), f.group(), m, stride);
    return encode_part<Arch>(m, stride, f.head_dim_k(), f.group(), token_axis::axis1, f.key_bits(), options, record,
                             {at.k_codes, at.k_channel_scale, at.k_channel_zero, at.k_token_scale}, errors);
}

/// The V part of a record; `errors` may be null.
template <class Arch, class T>
bool encode_values(const format& f, const tile_source<const T>& v, const tile_memory& m, const encode_options& options, std::byte* record,
                   part_errors* errors) noexcept
{
    const record_layout at = layout_of(f);
    const std::ptrdiff_t stride = simd::whole_lanes(f.head_dim_v()) + tile_padding;
    load_value_tile<Arch>(v, turns_values(f, options), f.head_dim_v(), f.group(), m, stride);
    return encode_part<Arch>(m, stride, f.group(), f.head_dim_v(), token_axis::axis0, f.value_bits(), options, record,
                             {at.v_codes, at.v_token_scale, at.v_token_zero, at.v_channel_scale}, errors);
}

template <class Arch, class T>
void encode_exact(const format& f, const tile_source<const T>& k, std::byte* to) noexcept
{
    using one = simd::kernels<simd::portable>;
    record_half* p = reinterpret_cast<record_half*>(to);
    for (int t = 0; t < f.group(); ++t)
        for (int c = 0; c < f.exact_channels(); ++c)
            one::store(p++, one::load(k.data + t * k.token_stride + (f.head_dim_k() + c) * k.channel_stride));
}

}  // namespace kvarn::detail
