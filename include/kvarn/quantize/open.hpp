// SPDX-License-Identifier: Apache-2.0
#pragma once
// One record to the tokens of one tile. In: a record, at any alignment. Out: float, half or bfloat16 tokens of any strides, rotated
// or in the original basis. float arithmetic. No allocation; works in the caller's scratch.

#include <cmath>
#include <cstddef>
#include <cstdint>

#include <kvarn/base/extent.hpp>
#include <kvarn/codec/decode.hpp>
#include <kvarn/layout/record.hpp>
#include <kvarn/quantize/tile.hpp>
#include <kvarn/rotate/hadamard.hpp>

namespace kvarn::detail {

template <class Arch, class T>
void decode_exact(const format& f, const std::byte* from, const tile_source<T>& k) noexcept
{
    using one = simd::kernels<simd::portable>;
    const record_half* p = reinterpret_cast<const record_half*>(from);
    for (int t = 0; t < f.group(); ++t)
        for (int c = 0; c < f.exact_channels(); ++c)
            one::store(k.data + t * k.token_stride + (f.head_dim_k() + c) * k.channel_stride, one::load(p++));
}

/// Writes `tokens` <= staged_tokens decoded tokens; row_of(t) gives the t-th as a key_row or value_row. Common sizes with
/// contiguous channels go straight to the output, all others through `stage`.
template <class Arch, class T, class Dim, class RowOf>
KVARN_INLINE void store_tokens(const tile_source<T>& to, int first, int tokens, Dim dim, bool unrotated, float* stage, RowOf&& row_of) noexcept
{
    using kern = simd::kernels<Arch>;
    if constexpr (is_constant_extent<Dim>) {
        if (to.channel_stride == 1) {
            for (int t = 0; t < tokens; ++t) {
                const auto row = row_of(t);
                T* const token = to.data + (first + t) * to.token_stride;
                if (unrotated) {
                    transform_vector<Arch, direction::inverse>(row, stage, token, dim);
                } else {
                    for (int d = 0; d < dim; d += kern::width) kern::store(token + d, row(d));
                }
            }
            return;
        }
    }
    const int stride = simd::whole_lanes(dim);
    for (int t = 0; t < tokens; ++t) {
        const auto row = row_of(t);
        for (int d = 0; d < dim; d += kern::width) kern::store(stage + t * stride + d, row(d));
    }
    if (unrotated) transform_any_rows<Arch, direction::inverse>(stage, stride, tokens, dim);
    for (int t = 0; t < tokens; ++t)
        store_row<Arch>(stage + t * stride, dim, to.data + (first + t) * to.token_stride, to.channel_stride);
}

template <class Arch, class T, class Dim>
KVARN_NOINLINE void decode_keys(const format& f, const std::byte* record, const tile_source<T>& k, bool unrotated, const tile_memory& m,
                                Dim dim) noexcept
{
    using kern = simd::kernels<Arch>;
    const record_layout at = layout_of(f);
    const int group = f.group(), padded = simd::whole_lanes(dim);
    const auto count = static_cast<std::size_t>(dim) * static_cast<std::size_t>(group);
    float* const scale = m.factors;
    float* const zero = scale + padded;
    float* const token_scale = zero + padded;
    load_scalars<Arch>(record + at.k_channel_scale, dim, scale);
    load_scalars<Arch>(record + at.k_channel_zero, dim, zero);
    load_scalars<Arch>(record + at.k_token_scale, group, token_scale);
    with_bits(f.key_bits(), [&](auto b) {
        unpack_stream<Arch, b()>(reinterpret_cast<const std::uint8_t*>(record + at.k_codes), count, m.codes);
    });
    std::uint8_t* const turned = m.codes + padded * group;  // [channel / width][token][width] of staged_tokens tokens
    constexpr int block_bytes = staged_tokens * kern::width;
    for (int t = 0; t < group; t += staged_tokens) {
        for (int d = 0; d < dim; d += kern::width)
            kern::transpose_codes(m.codes + d * group + t, group, turned + d / kern::width * block_bytes);
        store_tokens<Arch>(k, t, staged_tokens, dim, unrotated, m.stage, [&](int i) KVARN_LAMBDA {
            return key_row<Arch>{turned + i * kern::width, block_bytes, scale, zero, kern::broadcast(token_scale[t + i])};
        });
    }
}

template <class Arch, class T, class Dim>
KVARN_NOINLINE void decode_values(const format& f, const std::byte* record, const tile_source<T>& v, bool unrotated,
                                  const tile_memory& m, Dim dim) noexcept
{
    using kern = simd::kernels<Arch>;
    const record_layout at = layout_of(f);
    const int group = f.group();
    float* const channel_scale = m.factors;
    float* const scale = channel_scale + simd::whole_lanes(dim);
    float* const zero = scale + group;
    load_scalars<Arch>(record + at.v_channel_scale, dim, channel_scale);
    load_scalars<Arch>(record + at.v_token_scale, group, scale);
    load_scalars<Arch>(record + at.v_token_zero, group, zero);
    const auto count = static_cast<std::size_t>(staged_tokens) * static_cast<std::size_t>(dim);
    const std::uint8_t* packed = reinterpret_cast<const std::uint8_t*>(record + at.v_codes);
    for (int t = 0; t < group; t += staged_tokens) {
        with_bits(f.value_bits(), [&](auto b) { unpack_stream<Arch, b()>(packed, count, m.codes); });
        packed += count * static_cast<std::size_t>(f.value_bits()) / 8;
        store_tokens<Arch>(v, t, staged_tokens, dim, unrotated, m.stage, [&](int i) KVARN_LAMBDA {
            return value_row<Arch>{m.codes + i * dim, kern::broadcast(scale[t + i]), kern::broadcast(zero[t + i]), channel_scale};
        });
    }
}

/// Whether all half scalars in [from, to) of a record are finite.
template <class Arch>
KVARN_INLINE bool scalars_finite(const std::byte* record, std::size_t from, std::size_t to) noexcept
{
    return simd::kernels<Arch>::largest_magnitude(reinterpret_cast<const record_half*>(record + from), (to - from) / 2) < 0x7c00u;
}

/// The largest of `n` scalars of a record.
template <class Arch>
KVARN_INLINE float largest_scalar(const std::byte* scalars, int n) noexcept
{
    const std::uint32_t bits = simd::kernels<Arch>::largest_magnitude(reinterpret_cast<const record_half*>(scalars), static_cast<std::size_t>(n));
    return to_float(half{static_cast<std::uint16_t>(bits)});
}

/// Calls decode(to), with the cheaper store of bounded_half when no decoded value can exceed a half: their magnitude is at most
/// (scale * levels + zero) * other axis' scale, and that times sqrt(dim) in the original basis.
template <class Arch, class T, class F>
KVARN_INLINE void with_bound(const tile_source<T>& to, const std::byte* scale, const std::byte* zero, int n, const std::byte* other,
                             int others, int bits, int spread, F&& decode) noexcept
{
    if constexpr (std::is_same_v<T, half>) {
        const float bound = (largest_scalar<Arch>(scale, n) * static_cast<float>(1 << bits) + largest_scalar<Arch>(zero, n)) *
                            largest_scalar<Arch>(other, others) * std::sqrt(static_cast<float>(spread));
        if (bound < 65000.0f)
            return decode(tile_source<bounded_half>{reinterpret_cast<bounded_half*>(to.data), to.token_stride, to.channel_stride});
    }
    decode(to);
}

}  // namespace kvarn::detail
