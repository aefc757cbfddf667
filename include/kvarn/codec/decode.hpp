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
    const half* const p = reinterpret_cast<const half*>(from);
    int i = 0;
    for (; i + k::width <= n; i += k::width) k::store(to + i, k::load(p + i));
    for (; i < n; ++i) to[i] = simd::kernels<simd::portable>::load(p + i);
}

/// Floats to half scalars of a record.
template <class Arch>
KVARN_INLINE void store_scalars(const float* from, int n, std::byte* to) noexcept
{
    using k = simd::kernels<Arch>;
    half* const p = reinterpret_cast<half*>(to);
    int i = 0;
    for (; i + k::width <= n; i += k::width) k::store(p + i, k::load(from + i));
    for (; i < n; ++i) simd::kernels<simd::portable>::store(p + i, from[i]);
}

/// One V token: out[d] = (codes[d] * scale + zero) * channel_scale[d]. `codes` is readable up to whole registers.
template <class Arch, class T, class Dim>
KVARN_INLINE void decode_token(const std::uint8_t* codes, float scale, float zero, const float* channel_scale, Dim dim, T* out) noexcept
{
    using k = simd::kernels<Arch>;
    const auto s = k::broadcast(scale), z = k::broadcast(zero);
    int d = 0;
    for (; d + k::width <= dim; d += k::width)
        k::store(out + d, k::mul(k::fma(k::load_codes(codes + d), s, z), k::load(channel_scale + d)));
    using one = simd::kernels<simd::portable>;
    for (; d < dim; ++d)
        one::store(out + d, one::mul(one::fma(one::load_codes(codes + d), scale, zero), channel_scale[d]));
}

/// `width` tokens of one K channel: lanes (codes[lane] * scale + zero) * token_scale[lane].
template <class Arch>
KVARN_INLINE typename simd::kernels<Arch>::reg decode_channel(const std::uint8_t* codes, float scale, float zero,
                                                              typename simd::kernels<Arch>::reg token_scale) noexcept
{
    using k = simd::kernels<Arch>;
    return k::mul(k::fma(k::load_codes(codes), k::broadcast(scale), k::broadcast(zero)), token_scale);
}

}  // namespace kvarn::detail
