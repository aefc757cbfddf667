// SPDX-License-Identifier: Apache-2.0
#pragma once
// Where each field of a record lies (docs/record-format.md). In: a format. Out: byte offsets and sizes, constexpr, host and
// device. A record is the packed bytes of one tile: K part, then V part, then the exact channels; little-endian, no padding
// inside. Records need no alignment; the packed stride keeps them 8-aligned when their buffer is.

#include <cstddef>
#include <cstdint>
#include <type_traits>

#include <kvarn/layout/format.hpp>

namespace kvarn {

/// Distance between records: their content rounded up, by a rule. What is added is set to zero.
class record_stride {
public:
    /// `packed`, the default: to a multiple of 8 bytes.
    KVARN_HOST_DEVICE KVARN_INLINE constexpr record_stride() noexcept {}

    static const record_stride packed;
    /// What the authors' vLLM fork allocates: as packed, but for head_dim >= 256 to a power of two of bytes per token.
    static const record_stride reference;
    /// To a multiple of `bytes` (0: as packed): aligned to lines or pages, or of one size for formats of several layers, the largest of
    /// their record_bytes. Multiples of 8 keep records 8-aligned.
    [[nodiscard]] KVARN_HOST_DEVICE KVARN_INLINE static constexpr record_stride multiple_of(std::size_t bytes) noexcept
    {
        record_stride stride;
        if (bytes != 0) stride.multiple_ = bytes;
        return stride;
    }

    [[nodiscard]] KVARN_HOST_DEVICE KVARN_INLINE constexpr std::size_t multiple() const noexcept { return multiple_; }
    /// Whether wide heads take a power of two of bytes per token.
    [[nodiscard]] KVARN_HOST_DEVICE KVARN_INLINE constexpr bool power_of_two_tokens() const noexcept { return power_of_two_tokens_; }

    [[nodiscard]] KVARN_HOST_DEVICE KVARN_INLINE friend constexpr bool operator==(record_stride a, record_stride b) noexcept
    {
        return a.multiple_ == b.multiple_ && a.power_of_two_tokens_ == b.power_of_two_tokens_;
    }

private:
    KVARN_INLINE constexpr record_stride(std::size_t multiple, bool power_of_two_tokens) noexcept
        : multiple_(multiple), power_of_two_tokens_(power_of_two_tokens)
    {
    }

    std::size_t multiple_ = 8;
    bool power_of_two_tokens_ = false;
};
inline constexpr record_stride record_stride::packed{};
inline constexpr record_stride record_stride::reference{8, true};

/// Byte offsets of one record's fields. Scalars are IEEE half; D = head_dim, G = group.
struct record_layout {
    std::size_t k_codes = 0;          ///< [D_k][G] codes, channel-major bit stream
    std::size_t k_channel_scale = 0;  ///< [D_k] half
    std::size_t k_channel_zero = 0;   ///< [D_k] half
    std::size_t k_token_scale = 0;    ///< [G] half
    std::size_t v_codes = 0;          ///< [G][D_v] codes, token-major bit stream
    std::size_t v_channel_scale = 0;  ///< [D_v] half
    std::size_t v_token_scale = 0;    ///< [G] half
    std::size_t v_token_zero = 0;     ///< [G] half
    std::size_t exact = 0;            ///< [G][exact_channels] half, original basis
    std::size_t content_bytes = 0;    ///< the sum of all fields
};

/// The layout of a format's records.
[[nodiscard]] KVARN_HOST_DEVICE KVARN_INLINE constexpr record_layout layout_of(const format& f) noexcept
{
    const auto dk = static_cast<std::size_t>(f.head_dim_k());
    const auto dv = static_cast<std::size_t>(f.head_dim_v());
    const auto g = static_cast<std::size_t>(f.group());
    record_layout at;
    at.k_codes = 0;
    at.k_channel_scale = at.k_codes + dk * g * static_cast<std::size_t>(f.key_bits()) / 8;
    at.k_channel_zero = at.k_channel_scale + 2 * dk;
    at.k_token_scale = at.k_channel_zero + 2 * dk;
    at.v_codes = at.k_token_scale + 2 * g;
    at.v_channel_scale = at.v_codes + g * dv * static_cast<std::size_t>(f.value_bits()) / 8;
    at.v_token_scale = at.v_channel_scale + 2 * dv;
    at.v_token_zero = at.v_token_scale + (f.has_values() ? 2 * g : 0);
    at.exact = at.v_token_zero + (f.has_values() ? 2 * g : 0);
    at.content_bytes = at.exact + 2 * g * static_cast<std::size_t>(f.exact_channels());
    return at;
}

/// Bytes from one record to the next.
[[nodiscard]] KVARN_HOST_DEVICE KVARN_INLINE constexpr std::size_t record_bytes(
    const format& f, record_stride stride = {}) noexcept
{
    const std::size_t content = layout_of(f).content_bytes;
    const int widest = f.head_dim_k() > f.head_dim_v() ? f.head_dim_k() : f.head_dim_v();
    if (stride.power_of_two_tokens() && widest >= 256) {
        const auto g = static_cast<std::size_t>(f.group());
        const std::size_t per_token = (content + g - 1) / g;
        std::size_t power = 1;
        while (power < per_token) power *= 2;
        return power * g;
    }
    const std::size_t multiple = stride.multiple();
    return (content / multiple + (content % multiple != 0)) * multiple;
}

/// Full tiles among `tokens` tokens; the rest stays exact in the engine's tail.
[[nodiscard]] KVARN_HOST_DEVICE KVARN_INLINE constexpr std::size_t full_tiles(const format& f, std::size_t tokens) noexcept
{
    return tokens / static_cast<std::size_t>(f.group());
}

/// Bits per stored element of K and V, scalars and padding included, sinks and tails not.
[[nodiscard]] KVARN_INLINE constexpr double bits_per_element(const format& f, record_stride stride = {}) noexcept
{
    const auto elements = static_cast<double>(f.group()) * static_cast<double>(f.key_channels() + f.head_dim_v());
    return 8.0 * static_cast<double>(record_bytes(f, stride)) / elements;
}

/// A grid of records [tile][head] in the caller's memory: record (tile, head) starts at
/// data + tile * tile_stride + head * head_stride, strides in bytes. `Byte` is std::byte or const std::byte.
template <class Byte>
struct record_grid {
    Byte* data = nullptr;
    std::size_t bytes = 0;  ///< size of the whole buffer, for checking
    std::size_t tiles = 0;
    std::size_t heads = 0;
    std::size_t tile_stride = 0;
    std::size_t head_stride = 0;
    std::size_t record_bytes = 0;  ///< what a record owns: bytes beyond its content, up to here, are set to zero

    [[nodiscard]] KVARN_INLINE constexpr Byte* at(std::size_t tile, std::size_t head) const noexcept
    {
        return data + tile * tile_stride + head * head_stride;
    }

    /// The records of one head, and one record.
    [[nodiscard]] KVARN_INLINE constexpr record_grid head(std::size_t h) const noexcept { return part(0, tiles, h); }
    [[nodiscard]] KVARN_INLINE constexpr record_grid one(std::size_t tile, std::size_t h) const noexcept { return part(tile, 1, h); }

    /// Records [first, first + count) of one head.
    [[nodiscard]] KVARN_INLINE constexpr record_grid part(std::size_t first, std::size_t count, std::size_t h) const noexcept
    {
        const std::size_t offset = first * tile_stride + h * head_stride;
        return {data == nullptr ? data : data + offset, bytes > offset ? bytes - offset : 0, count, 1, tile_stride, head_stride, record_bytes};
    }

    KVARN_INLINE constexpr operator record_grid<const Byte>() const noexcept
        requires(!std::is_const_v<Byte>)
    {
        return {data, bytes, tiles, heads, tile_stride, head_stride, record_bytes};
    }
};

/// The work items of one call, [begin, end), clipped to the grid. The default is all of them.
struct record_range {
    std::size_t begin = 0;
    std::size_t end = SIZE_MAX;
};

/// Bytes of a dense grid.
[[nodiscard]] KVARN_HOST_DEVICE KVARN_INLINE constexpr std::size_t grid_bytes(const format& f, std::size_t tiles, std::size_t heads,
                                                                 record_stride stride = {}) noexcept
{
    return tiles * heads * record_bytes(f, stride);
}

/// A dense grid: all heads of tile 0, then all heads of tile 1, ...
template <class Byte>
[[nodiscard]] KVARN_INLINE constexpr record_grid<Byte> tile_major_records(const format& f, Byte* data, std::size_t bytes,
                                                             std::size_t tiles, std::size_t heads,
                                                             record_stride stride = {}) noexcept
{
    const std::size_t one = record_bytes(f, stride);
    return {data, bytes, tiles, heads, one * heads, one, one};
}

/// A dense grid: all tiles of head 0, then all tiles of head 1, ... (the order that decode attention reads).
template <class Byte>
[[nodiscard]] KVARN_INLINE constexpr record_grid<Byte> head_major_records(const format& f, Byte* data, std::size_t bytes,
                                                             std::size_t tiles, std::size_t heads,
                                                             record_stride stride = {}) noexcept
{
    const std::size_t one = record_bytes(f, stride);
    return {data, bytes, tiles, heads, one, one * tiles, one};
}

}  // namespace kvarn
