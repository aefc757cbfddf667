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

/// `tokens` <= staged_tokens tokens to stage [token][dim rounded up to 16], in the basis of the result. Rows is key_rows or value_rows.
template <class Arch, class Rows>
KVARN_NOINLINE void stage_tokens(const Rows& rows, int tokens, int dim, bool unrotated, float* stage) noexcept
{
    using kern = simd::kernels<Arch>;
    const int stride = simd::whole_lanes(dim);
    for (int t = 0; t < tokens; ++t) {
        const auto row = rows(t);
        for (int d = 0; d < dim; d += kern::width) kern::store(stage + t * stride + d, row(d));
    }
    if (unrotated) transform_any_rows<Arch>(stage, stride, tokens, dim, direction::inverse);
}

/// Writes staged_tokens decoded tokens from number `first` on. Contiguous channels go straight to the output where no transform is
/// left or the size is a common one, everything else through `stage`.
template <class Arch, class T, class Rows>
KVARN_INLINE void store_tokens(const tile_source<T>& to, int first, int dim, bool unrotated, float* stage, const Rows& rows) noexcept
{
    using kern = simd::kernels<Arch>;
    constexpr int block = kern::width < 8 ? 8 * kern::width : 64;
    // Not a structured binding: Clang before 16 cannot capture it.
    const std::ptrdiff_t token_stride = to.token_stride, channel_stride = to.channel_stride;
    T* token = to.data + first * token_stride;
    if (channel_stride == 1 && !unrotated && dim % block == 0) {
        for (int t = 0; t < staged_tokens; t += 2, token += 2 * token_stride) {  // two tokens share what is loaded of the channels
            const auto row = rows(t), next_row = rows(t + 1);
            T* const next = token + token_stride;
            for (int d = 0; d < dim; d += block)
                KVARN_UNROLL
                for (int i = 0; i < block; i += kern::width) {
                    const auto a = row(d + i), b = next_row(d + i);
                    kern::store(token + d + i, a);
                    kern::store(next + d + i, b);
                }
        }
        return;
    }
    if (channel_stride == 1 && is_common_extent(dim)) {
        with_extent(dim, [&](auto d) KVARN_LAMBDA {
            if constexpr (is_constant_extent<decltype(d)>)
                for (int t = 0; t < staged_tokens; ++t) transform_vector<Arch>(rows(t), stage, token + t * token_stride, d);
        });
        return;
    }
    stage_tokens<Arch>(rows, staged_tokens, dim, unrotated, stage);
    for (int t = 0; t < staged_tokens; ++t)
        store_row<Arch>(stage + t * simd::whole_lanes(dim), dim, token + t * token_stride, channel_stride);
}

/// Codes and scalars of K to scratch: codes [channel][token] to m.codes, scalars to m.factors.
template <class Arch>
KVARN_NOINLINE void unpack_keys(const format& f, const std::byte* record, const tile_memory& m) noexcept
{
    const record_layout at = layout_of(f);
    const int dim = f.head_dim_k(), padded = simd::whole_lanes(dim);
    load_scalars<Arch>(record + at.k_channel_scale, dim, m.factors);
    load_scalars<Arch>(record + at.k_channel_zero, dim, m.factors + padded);
    load_scalars<Arch>(record + at.k_token_scale, f.group(), m.factors + 2 * padded);
    unpack_stream<Arch>(f.key_bits(), reinterpret_cast<const std::uint8_t*>(record + at.k_codes),
                        static_cast<std::size_t>(dim) * static_cast<std::size_t>(f.group()), m.codes);
}

/// staged_tokens tokens of m.codes, from number `first` on, to turned [channel / width][token][width].
template <class Arch>
KVARN_NOINLINE void turn_codes(const std::uint8_t* codes, int first, int dim, int group, std::uint8_t* turned) noexcept
{
    using kern = simd::kernels<Arch>;
    static_assert(staged_tokens == turned_tokens);
    for (int d = 0; d < dim; d += kern::width) kern::transpose_codes(codes + d * group + first, group, turned + d * staged_tokens);
}

template <class Arch, class T>
KVARN_NOINLINE void decode_keys(const format& f, const std::byte* record, const tile_source<T>& k, bool unrotated, const tile_memory& m) noexcept
{
    const int dim = f.head_dim_k(), group = f.group(), padded = simd::whole_lanes(dim);
    unpack_keys<Arch>(f, record, m);
    std::uint8_t* const turned = m.codes + padded * group;
    const float* const scale = m.factors;
    for (int t = 0; t < group; t += staged_tokens) {
        turn_codes<Arch>(m.codes, t, dim, group, turned);
        const key_rows<Arch> rows{turned, scale, scale + padded, scale + 2 * padded + t};
        store_tokens<Arch>(k, t, dim, unrotated, m.stage, rows);
    }
}

/// Scalars of V to m.factors.
template <class Arch>
KVARN_NOINLINE void load_value_scalars(const format& f, const std::byte* record, const tile_memory& m) noexcept
{
    const record_layout at = layout_of(f);
    const int padded = simd::whole_lanes(f.head_dim_v());
    load_scalars<Arch>(record + at.v_channel_scale, f.head_dim_v(), m.factors);
    load_scalars<Arch>(record + at.v_token_scale, f.group(), m.factors + padded);
    load_scalars<Arch>(record + at.v_token_zero, f.group(), m.factors + padded + f.group());
}

template <class Arch, class T>
KVARN_NOINLINE void decode_values(const format& f, const std::byte* record, const tile_source<T>& v, bool unrotated,
                                  const tile_memory& m) noexcept
{
    const int dim = f.head_dim_v(), group = f.group();
    load_value_scalars<Arch>(f, record, m);
    const float* const channel_scale = m.factors;
    const float* const scale = channel_scale + simd::whole_lanes(dim);
    const auto count = static_cast<std::size_t>(staged_tokens) * static_cast<std::size_t>(dim);
    const std::uint8_t* packed = reinterpret_cast<const std::uint8_t*>(record + layout_of(f).v_codes);
    for (int t = 0; t < group; t += staged_tokens) {
        unpack_stream<Arch>(f.value_bits(), packed, count, m.codes);
        packed += count * static_cast<std::size_t>(f.value_bits()) / 8;
        const value_rows<Arch> rows{m.codes, dim, scale + t, scale + group + t, channel_scale};
        store_tokens<Arch>(v, t, dim, unrotated, m.stage, rows);
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
