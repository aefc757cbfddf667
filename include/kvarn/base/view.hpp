// SPDX-License-Identifier: Apache-2.0
#pragma once
// Non-owning strided views of K, V or Q: [token][head][channel], any strides, counted in elements.
// Copy freely; a view never allocates and never outlives the engine's buffer.

#include <kvarn/base/config.hpp>  // first: it refuses older standards

#include <cstddef>
#include <cstdint>
#include <type_traits>

#include <kvarn/base/element.hpp>

namespace kvarn {

/// K or V of `tokens x heads x channels`. Element (t, h, c) lies at data[t * token_stride + h * head_stride + c * channel_stride].
/// Fastest with channel_stride 1. Strides may be negative or zero for inputs; outputs must not overlap themselves.
template <element T>
struct kv_view {
    T* data = nullptr;
    std::size_t tokens = 0;
    std::size_t heads = 0;
    std::size_t channels = 0;
    std::ptrdiff_t token_stride = 0;
    std::ptrdiff_t head_stride = 0;
    std::ptrdiff_t channel_stride = 1;

    [[nodiscard]] KVARN_INLINE constexpr T* at(std::size_t token, std::size_t head) const noexcept
    {
        return data + static_cast<std::ptrdiff_t>(token) * token_stride + static_cast<std::ptrdiff_t>(head) * head_stride;
    }

    /// One head of it.
    [[nodiscard]] KVARN_INLINE constexpr kv_view head(std::size_t h) const noexcept
    {
        return {data == nullptr ? data : at(0, h), tokens, 1, channels, token_stride, head_stride, channel_stride};
    }

    /// The same view with const elements.
    KVARN_INLINE constexpr operator kv_view<const T>() const noexcept
        requires(!std::is_const_v<T>)
    {
        return {data, tokens, heads, channels, token_stride, head_stride, channel_stride};
    }
};

/// A dense array [token][head][channel], as most engines project K and V.
template <element T>
[[nodiscard]] KVARN_INLINE constexpr kv_view<T> token_major(T* data, std::size_t tokens, std::size_t heads, std::size_t channels) noexcept
{
    return {data,  tokens, heads, channels, static_cast<std::ptrdiff_t>(heads * channels), static_cast<std::ptrdiff_t>(channels),
            1};
}

/// A dense array [head][token][channel], as most frameworks keep a cache.
template <element T>
[[nodiscard]] KVARN_INLINE constexpr kv_view<T> head_major(T* data, std::size_t tokens, std::size_t heads, std::size_t channels) noexcept
{
    return {data,  tokens, heads, channels, static_cast<std::ptrdiff_t>(channels), static_cast<std::ptrdiff_t>(tokens * channels),
            1};
}

/// Tokens [first, first + count) of a view, fewer where it ends before that.
template <element T>
[[nodiscard]] KVARN_INLINE constexpr kv_view<T> token_range(kv_view<T> x, std::size_t first, std::size_t count) noexcept
{
    if (first > x.tokens) first = x.tokens;
    if (x.data != nullptr) x.data += static_cast<std::ptrdiff_t>(first) * x.token_stride;
    x.tokens = count < x.tokens - first ? count : x.tokens - first;
    return x;
}

/// The first `count` tokens of a view: what quantize_kv wants of a buffer that holds more, first_tokens(k, tiles * group).
template <element T>
[[nodiscard]] KVARN_INLINE constexpr kv_view<T> first_tokens(kv_view<T> x, std::size_t count) noexcept
{
    return token_range(x, 0, count);
}

/// A view whose element type is a run-time value, float (f32), half (f16) or bfloat16 (bf16): the sinks, tails, queries and outputs of one
/// call may differ. Made from a kv_view.
template <bool Const>
struct any_view {
    enum class element_type : std::uint8_t { f32, f16, bf16 };
    using pointer = std::conditional_t<Const, const void*, void*>;

    pointer data = nullptr;
    element_type type = element_type::f32;
    std::size_t tokens = 0, heads = 0, channels = 0;
    std::ptrdiff_t token_stride = 0, head_stride = 0, channel_stride = 1;

    KVARN_INLINE constexpr any_view() noexcept {}
    template <element T>
        requires(Const || !std::is_const_v<T>)
    KVARN_INLINE constexpr any_view(const kv_view<T>& x) noexcept
        : data(x.data), type(type_of<storage_t<T>>()), tokens(x.tokens), heads(x.heads), channels(x.channels), token_stride(x.token_stride),
          head_stride(x.head_stride), channel_stride(x.channel_stride)
    {
    }

    /// One head of it.
    [[nodiscard]] KVARN_INLINE constexpr any_view head(std::size_t h) const noexcept
    {
        any_view x = part(static_cast<std::ptrdiff_t>(h) * head_stride);
        x.heads = 1;
        return x;
    }
    /// The same view `elements` further on.
    [[nodiscard]] KVARN_INLINE constexpr any_view part(std::ptrdiff_t elements) const noexcept
    {
        using byte = std::conditional_t<Const, const std::byte, std::byte>;
        any_view x = *this;
        if (data != nullptr) x.data = static_cast<byte*>(data) + elements * (type == element_type::f32 ? 4 : 2);
        return x;
    }

    /// What was written may be read.
    KVARN_INLINE constexpr operator any_view<true>() const noexcept
        requires(!Const)
    {
        any_view<true> x;
        x.data = data;
        x.type = static_cast<typename any_view<true>::element_type>(type);
        x.tokens = tokens;
        x.heads = heads;
        x.channels = channels;
        x.token_stride = token_stride;
        x.head_stride = head_stride;
        x.channel_stride = channel_stride;
        return x;
    }

    template <class T>
    [[nodiscard]] KVARN_INLINE static constexpr element_type type_of() noexcept
    {
        return std::is_same_v<T, float> ? element_type::f32 : std::is_same_v<T, half> ? element_type::f16 : element_type::bf16;
    }
};

/// Tokens [first, first + count) of a view, clipped to what it has.
template <bool Const>
[[nodiscard]] KVARN_INLINE constexpr any_view<Const> token_range(const any_view<Const>& x, std::size_t first, std::size_t count) noexcept
{
    if (first > x.tokens) first = x.tokens;
    any_view<Const> range = x.part(static_cast<std::ptrdiff_t>(first) * x.token_stride);
    range.tokens = count < x.tokens - first ? count : x.tokens - first;
    return range;
}

using input_view = any_view<true>;    ///< what is read
using output_view = any_view<false>;  ///< what is written

}  // namespace kvarn
