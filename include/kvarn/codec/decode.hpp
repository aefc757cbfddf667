// SPDX-License-Identifier: Apache-2.0
#pragma once
// From codes and scalars back to values in the record's basis (docs/record-format.md):
// K[t][d] = (code * k_channel_scale[d] + k_channel_zero[d]) * k_token_scale[t], V[t][d] = (code * v_token_scale[t] +
// v_token_zero[t]) * v_channel_scale[d]. One fused multiply-add and one product in float each. No allocation; thread safe.

#include <cstddef>
#include <cstdint>

#include <kvarn/codec/packing.hpp>
#include <kvarn/simd/lanes.hpp>

namespace kvarn::detail {

/// Half scalars of a record, at any alignment, to floats; `n` is a multiple of 4.
template <class Arch>
KVARN_INLINE void load_scalars(const std::byte* from, int n, float* to) noexcept
{
    using k = simd::kernels<Arch>;
    const record_half* const p = reinterpret_cast<const record_half*>(from);
    int i = 0;
    for (; i + k::width <= n; i += k::width) k::store(to + i, k::load(p + i));
    for (; i < n; ++i) to[i] = simd::kernels<simd::portable>::load(p + i);
}

/// Floats to half scalars of a record.
template <class Arch>
KVARN_INLINE void store_scalars(const float* from, int n, std::byte* to) noexcept
{
    using k = simd::kernels<Arch>;
    record_half* const p = reinterpret_cast<record_half*>(to);
    int i = 0;
    for (; i + k::width <= n; i += k::width) k::store(p + i, k::load(from + i));
    for (; i < n; ++i) simd::kernels<simd::portable>::store(p + i, from[i]);
}

/// Tokens that transpose_codes turns at a time.
inline constexpr int turned_tokens = 32;

/// One token of K: row(d) gives channels d .. d + width. `codes` is [channel / width][turned_tokens][width], at the token.
template <class Arch>
struct key_row {
    using k = simd::kernels<Arch>;
    const std::uint8_t* codes;
    const float* scale;
    const float* zero;
    typename k::reg token_scale;

    KVARN_INLINE typename k::reg operator()(int d) const noexcept
    {
        return k::mul(k::code_value(k::load_codes(codes + static_cast<std::ptrdiff_t>(d) * turned_tokens), k::load(scale + d), k::load(zero + d)), token_scale);
    }
};

/// One token of V: row(d) gives channels d .. d + width. `codes` is [channel].
template <class Arch>
struct value_row {
    using k = simd::kernels<Arch>;
    const std::uint8_t* codes;
    typename k::reg scale;
    typename k::reg zero;
    const float* channel_scale;

    KVARN_INLINE typename k::reg operator()(int d) const noexcept
    {
        return k::mul(k::code_value(k::load_codes(codes + d), scale, zero), k::load(channel_scale + d));
    }
};

/// Consecutive tokens of K: rows(t) is token t. `codes` is [channel / width][turned_tokens][width].
template <class Arch>
struct key_rows {
    const std::uint8_t* codes;
    const float* scale;        // [channel]
    const float* zero;         // [channel]
    const float* token_scale;  // [token]

    KVARN_INLINE key_row<Arch> operator()(int t) const noexcept
    {
        using k = simd::kernels<Arch>;
        return {codes + t * k::width, scale, zero, k::broadcast(token_scale[t])};
    }
};

/// Consecutive tokens of V. `codes` is [token][channel].
template <class Arch>
struct value_rows {
    const std::uint8_t* codes;
    int dim;
    const float* scale;          // [token]
    const float* zero;           // [token]
    const float* channel_scale;  // [channel]

    KVARN_INLINE value_row<Arch> operator()(int t) const noexcept
    {
        using k = simd::kernels<Arch>;
        return {codes + t * dim, k::broadcast(scale[t]), k::broadcast(zero[t]), channel_scale};
    }
};

}  // namespace kvarn::detail
