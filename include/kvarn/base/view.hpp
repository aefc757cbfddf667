// SPDX-License-Identifier: Apache-2.0
#pragma once
// Non-owning strided views of K, V or Q: [token][head][channel], any strides, counted in elements.
// Copy freely; a view never allocates and never outlives the engine's buffer.

#include <cstddef>
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

}  // namespace kvarn
