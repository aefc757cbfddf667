// SPDX-License-Identifier: Apache-2.0
#pragma once
// Everything that a call refuses, found before anything is written: shapes, buffers, values that are not
// finite, and scalars that would overflow a half. No allocation; a trial encoding works in the caller's scratch.

#include <kvarn/base/config.hpp>  // first: it refuses older standards

#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <span>

#include <kvarn/base/status.hpp>
#include <kvarn/layout/record.hpp>
#include <kvarn/quantize/seal.hpp>
#include <kvarn/quantize/tile.hpp>

namespace kvarn::detail {

/// The bits of a float that is not finite are these or above; flags like -fno-honor-nans do not touch a comparison of integers.
inline constexpr std::uint32_t infinity_bits = 0x7f800000u;

/// The largest magnitude among `channels` of all tokens of a tile, as the bits of a float.
template <class Arch, class T>
KVARN_NOINLINE std::uint32_t largest_value(const tile_source<const T>& from, int tokens, int channels) noexcept
{
    std::uint32_t most = 0;
    if (from.channel_stride == 1) {
        most = simd::kernels<Arch>::largest_magnitude(from.data, static_cast<std::size_t>(channels), tokens, from.token_stride);
    } else {
        for (int d = 0; d < channels; ++d) {
            const std::uint32_t one = simd::kernels<simd::portable>::largest_magnitude(from.data + d * from.channel_stride, 1, tokens, from.token_stride);
            most = one > most ? one : most;
        }
    }
    if constexpr (sizeof(T) == 2) {
        const T largest{static_cast<std::uint16_t>(most)};
        return std::bit_cast<std::uint32_t>(to_float(largest));
    } else {
        return most;
    }
}

template <class T, class Byte>
KVARN_INLINE status check_view(const format& f, const kv_view<T>& x, int channels, const record_grid<Byte>& records) noexcept
{
    if (x.heads != records.heads || x.channels != static_cast<std::size_t>(channels)) return status::shape_mismatch;
    return x.tokens == records.tiles * static_cast<std::size_t>(f.group()) ? status::ok : status::token_count_mismatch;
}

/// Bytes of one record that a call may write.
template <class Byte>
KVARN_INLINE std::size_t owned_bytes(const format& f, const record_grid<Byte>& records) noexcept
{
    const std::size_t content = layout_of(f).content_bytes;
    return records.record_bytes > content ? records.record_bytes : content;
}

/// Whether the items [begin, end) of the grid lie inside its buffer, and scratch is large enough.
template <class Byte>
KVARN_INLINE status check_memory(const format& f, const record_grid<Byte>& records, std::span<std::byte> scratch, record_range range) noexcept
{
    if (records.data == nullptr || scratch.data() == nullptr) return status::null_pointer;
    if (scratch.size() < scratch_bytes(f)) return status::buffer_too_small;
    const std::size_t content = owned_bytes(f, records);
    if ((records.heads > 1 && records.head_stride < content) || (records.tiles > 1 && records.tile_stride < content))
        return status::shape_mismatch;
    const std::size_t last_tile = (range.end - 1) / records.heads;
    const std::size_t last_head = last_tile > range.begin / records.heads ? records.heads - 1 : (range.end - 1) % records.heads;
    const std::size_t limit = records.bytes;
    if (content > limit) return status::buffer_too_small;
    if (last_tile != 0 && records.tile_stride > (limit - content) / last_tile) return status::buffer_too_small;
    const std::size_t left = limit - content - last_tile * records.tile_stride;
    if (last_head != 0 && records.head_stride > left / last_head) return status::buffer_too_small;
    return status::ok;
}

/// Up to this magnitude of the input no scalar can overflow a half, whatever the tile: |scale * code + zero| <= |value in the tile| / smallest
/// factor, and a rotation can gather all channels in one, which input that is rotated already has behind it.
KVARN_INLINE float safe_magnitude(bool rotates, int dim) noexcept
{
    return rotates ? 48000.0f / std::sqrt(static_cast<float>(dim)) : 48000.0f;
}

inline constexpr float hopeless_magnitude = 1e11f;  // above: the scalars of a tile cannot hold it, and squares may overflow

/// Checks one part of one tile: ok, not_finite, or scale_overflow (found by a trial encoding where it is not plain).
template <class Trial>
KVARN_INLINE status check_part(bool rotates, std::uint32_t largest_bits, int dim, Trial&& trial) noexcept
{
    if (largest_bits >= infinity_bits) return status::not_finite;
    const float largest = std::bit_cast<float>(largest_bits);
    if (largest <= safe_magnitude(rotates, dim)) return status::ok;
    if (largest > hopeless_magnitude || !trial()) return status::scale_overflow;
    return status::ok;
}

template <class Arch, class T>
status check_tile(const format& f, const tile_source<const T>& k, const tile_source<const T>& v, const tile_memory& m,
                  const encode_options& options) noexcept
{
    const status keys = check_part(turns_keys(f, options), largest_value<Arch>(k, f.group(), f.head_dim_k()), f.head_dim_k(),
                                   [&] { return encode_keys<Arch>(f, k, m, options, nullptr, nullptr); });
    if (keys != status::ok) return keys;
    if (f.exact_channels() != 0) {
        const tile_source<const T> exact{k.data + f.head_dim_k() * k.channel_stride, k.token_stride, k.channel_stride};
        const std::uint32_t largest = largest_value<Arch>(exact, f.group(), f.exact_channels());
        if (largest >= infinity_bits) return status::not_finite;
        if (std::bit_cast<float>(largest) >= half_overflow) return status::scale_overflow;
    }
    if (!f.has_values()) return status::ok;
    return check_part(turns_values(f, options), largest_value<Arch>(v, f.group(), f.head_dim_v()), f.head_dim_v(),
                      [&] { return encode_values<Arch>(f, v, m, options, nullptr, nullptr); });
}

}  // namespace kvarn::detail
