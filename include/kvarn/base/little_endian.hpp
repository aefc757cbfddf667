// SPDX-License-Identifier: Apache-2.0
#pragma once
// Integers as files hold them, least byte first, whatever the machine is and however the bytes are aligned.
// In and out: an integer, and as many bytes as it has. constexpr; compilers make one load or store of it.

#include <kvarn/base/config.hpp>  // first: it refuses older standards

#include <cstddef>
#include <cstdint>

namespace kvarn {

namespace detail {
template <class Unsigned>
KVARN_INLINE constexpr void put_little_endian(std::byte* at, Unsigned value) noexcept
{
    for (std::size_t i = 0; i < sizeof value; ++i) at[i] = static_cast<std::byte>(static_cast<std::uint64_t>(value) >> (8 * i) & 255u);
}
template <class Unsigned>
[[nodiscard]] KVARN_INLINE constexpr Unsigned get_little_endian(const std::byte* at) noexcept
{
    std::uint64_t value = 0;
    for (std::size_t i = 0; i < sizeof(Unsigned); ++i) value |= static_cast<std::uint64_t>(at[i]) << (8 * i);
    return static_cast<Unsigned>(value);
}
}  // namespace detail

/// An integer as its bytes at `at`, the least significant one first.
/// @{
KVARN_INLINE constexpr void put_u8(std::byte* at, std::uint8_t value) noexcept { *at = static_cast<std::byte>(value); }
KVARN_INLINE constexpr void put_u16(std::byte* at, std::uint16_t value) noexcept { detail::put_little_endian(at, value); }
KVARN_INLINE constexpr void put_u32(std::byte* at, std::uint32_t value) noexcept { detail::put_little_endian(at, value); }
KVARN_INLINE constexpr void put_u64(std::byte* at, std::uint64_t value) noexcept { detail::put_little_endian(at, value); }
/// @}

/// The integer whose bytes lie at `at`, the least significant one first.
/// @{
[[nodiscard]] KVARN_INLINE constexpr std::uint8_t get_u8(const std::byte* at) noexcept { return static_cast<std::uint8_t>(*at); }
[[nodiscard]] KVARN_INLINE constexpr std::uint16_t get_u16(const std::byte* at) noexcept
{
    return detail::get_little_endian<std::uint16_t>(at);
}
[[nodiscard]] KVARN_INLINE constexpr std::uint32_t get_u32(const std::byte* at) noexcept
{
    return detail::get_little_endian<std::uint32_t>(at);
}
[[nodiscard]] KVARN_INLINE constexpr std::uint64_t get_u64(const std::byte* at) noexcept
{
    return detail::get_little_endian<std::uint64_t>(at);
}
/// @}

}  // namespace kvarn
