// SPDX-License-Identifier: Apache-2.0
#pragma once
// What quantize_kv works on: a tile's tokens in the caller's view, and the caller's scratch carved into aligned arrays.
// No allocation. Layer 4; for the rest of quantize/ only.

#include <cstddef>
#include <cstdint>
#include <type_traits>

#include <kvarn/base/view.hpp>
#include <kvarn/layout/format.hpp>
#include <kvarn/normalize/variance.hpp>

namespace kvarn::detail {

inline constexpr int staged_tokens = 32;  // tokens gathered or decoded at a time

/// Channels [first, first + channels) of one tile: token t starts at data + t * token_stride.
template <class T>
struct tile_source {
    T* data;
    std::ptrdiff_t token_stride;
    std::ptrdiff_t channel_stride;
};

/// Scratch, carved into aligned pieces. K tiles are held [channel][token], V tiles [token][channel]: axis 0 first,
/// so that normaliser and encoder know only one orientation.
struct tile_memory {
    float* tile;
    float* factors;
    float* scale;
    float* zero;
    float* stage;  // [staged_tokens][widest]
    std::uint8_t* codes;  // shares the tile's memory; used when decoding
};

[[nodiscard]] KVARN_INLINE constexpr std::size_t tile_floats(const format& f) noexcept
{
    const int k = simd::whole_lanes(f.head_dim_k()) * (f.group() + tile_padding);
    const int v = f.group() * (simd::whole_lanes(f.head_dim_v()) + tile_padding);
    return static_cast<std::size_t>(k > v ? k : v);
}

[[nodiscard]] KVARN_INLINE constexpr int widest_axis(const format& f) noexcept
{
    const int d = f.head_dim_k() > f.head_dim_v() ? f.head_dim_k() : f.head_dim_v();
    return simd::whole_lanes(d > f.group() ? d : f.group());
}

[[nodiscard]] KVARN_INLINE tile_memory carve(const format& f, std::byte* scratch) noexcept
{
    const auto address = reinterpret_cast<std::uintptr_t>(scratch);
    float* at = reinterpret_cast<float*>(scratch + (64 - address % 64) % 64);
    const auto widest = static_cast<std::size_t>(widest_axis(f));
    tile_memory m;
    m.tile = at;
    m.codes = reinterpret_cast<std::uint8_t*>(at);
    m.factors = m.tile + tile_floats(f);
    m.scale = m.factors + variance_floats(static_cast<int>(widest), static_cast<int>(widest));
    m.zero = m.scale + widest;
    m.stage = m.zero + widest;
    return m;
}

template <class T>
KVARN_INLINE tile_source<T> source_of(const kv_view<T>& x, std::size_t tile, std::size_t head, int group) noexcept
{
    return {x.at(tile * static_cast<std::size_t>(group), head), x.token_stride, x.channel_stride};
}

/// The view with the library's storage type as its element.
template <element T>
KVARN_INLINE auto as_storage(const kv_view<T>& x) noexcept
{
    using storage = std::conditional_t<std::is_const_v<T>, const storage_t<T>, storage_t<T>>;
    return kv_view<storage>{reinterpret_cast<storage*>(x.data), x.tokens, x.heads, x.channels,
                            x.token_stride, x.head_stride, x.channel_stride};
}

}  // namespace kvarn::detail

namespace kvarn {

/// Bytes of scratch that one call of quantize_kv or dequantize_kv needs (per thread), at any alignment.
[[nodiscard]] KVARN_INLINE constexpr std::size_t scratch_bytes(const format& f) noexcept
{
    const auto widest = static_cast<std::size_t>(detail::widest_axis(f));
    const std::size_t floats = detail::tile_floats(f) + variance_floats(static_cast<int>(widest), static_cast<int>(widest)) +
                               2 * widest + detail::staged_tokens * widest;
    return floats * sizeof(float) + 63;
}

}  // namespace kvarn
