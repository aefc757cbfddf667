// SPDX-License-Identifier: Apache-2.0
#pragma once
// Loop bounds that are compile-time constants for the common sizes and plain integers otherwise, through the same code.

#include <type_traits>
#include <utility>

#include <kvarn/base/config.hpp>

namespace kvarn::detail {

/// Calls f with `n` as an integral constant when it is a common head_dim or group, and with the plain int otherwise.
template <class F>
KVARN_INLINE void with_extent(int n, F&& f) noexcept
{
    switch (n) {
    case 64: return f(std::integral_constant<int, 64>{});
    case 128: return f(std::integral_constant<int, 128>{});
    case 256: return f(std::integral_constant<int, 256>{});
    default: return f(n);
    }
}

/// Whether an extent is an integral constant rather than an int.
template <class Extent>
inline constexpr bool is_constant_extent = !std::is_same_v<Extent, int>;

/// Whether with_extent has a constant for `n`.
[[nodiscard]] KVARN_INLINE constexpr bool is_common_extent(int n) noexcept { return n == 64 || n == 128 || n == 256; }

}  // namespace kvarn::detail
