// SPDX-License-Identifier: Apache-2.0
#pragma once
// From codes and scalars back to values in the record's basis (format.md section 5):
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

/// One token of K: row(d) gives channels d .. d + width. `codes` is [channel / width][tokens][width], at the token.
template <class Arch>
struct key_row {
    using k = simd::kernels<Arch>;
    const std::uint8_t* codes;
    int block_bytes;  // from one block of width channels to the next
    const float* scale;
    const float* zero;
    typename k::reg token_scale;

    KVARN_INLINE typename k::reg operator()(int d) const noexcept
    {
        return k::mul(k::code_value(k::load_codes(codes + d / k::width * block_bytes), k::load(scale + d), k::load(zero + d)), token_scale);
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

}  // namespace kvarn::detail
