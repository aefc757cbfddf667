// SPDX-License-Identifier: Apache-2.0
#pragma once
// Element types of K, V and Q: float, and the 16-bit storage types `half` (IEEE binary16) and `bfloat16`.
// In: bits. Out: float, and back with round-to-nearest-even. Plain integer arithmetic, so every machine agrees; constexpr, host and
// device.

#include <kvarn/base/config.hpp>  // first: it refuses older standards

#include <bit>
#include <concepts>
#include <cstdint>
#include <type_traits>

namespace kvarn {

/// IEEE 754 binary16 as stored in memory. Engines may cast pointers to their own 16-bit float type to this one.
struct half {
    std::uint16_t bits;
    friend constexpr bool operator==(half, half) noexcept = default;
};

/// The upper 16 bits of an IEEE 754 binary32, as stored in memory.
struct bfloat16 {
    std::uint16_t bits;
    friend constexpr bool operator==(bfloat16, bfloat16) noexcept = default;
};

static_assert(sizeof(half) == 2 && sizeof(bfloat16) == 2);

/// A half as records store it: little-endian, whatever the machine is. Loads and stores through kernels<Arch> swap its bytes where needed.
#if defined(KVARN_BIG_ENDIAN)
struct record_half {
    std::uint16_t bits;
};
#else
using record_half = half;
#endif

/// A half that receives only values of magnitude at most 65504, so that a store need not saturate. For kernels.
struct bounded_half {
    std::uint16_t bits;
};

namespace detail {
/// std::bit_cast for device code too, where nvcc knows no constexpr function of the standard library without a flag.
template <class To, class From>
[[nodiscard]] KVARN_HOST_DEVICE KVARN_INLINE constexpr To bits_as(const From& from) noexcept
{
#if defined(__CUDACC__)
    return __builtin_bit_cast(To, from);
#else
    return std::bit_cast<To>(from);
#endif
}
}  // namespace detail

/// Exact for every half, subnormals, infinities and NaN included.
[[nodiscard]] KVARN_HOST_DEVICE KVARN_INLINE constexpr float to_float(half h) noexcept
{
    const std::uint32_t sign = (h.bits & 0x8000u) << 16;
    const std::uint32_t magnitude = h.bits & 0x7fffu;
    if (magnitude >= 0x7c00u) return detail::bits_as<float>(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);
    if (magnitude >= 0x0400u) return detail::bits_as<float>(sign | ((magnitude << 13) + 0x38000000u));
    const float tiny = static_cast<float>(magnitude) * 0x1p-24f;  // subnormal: exact
    return detail::bits_as<float>(sign | detail::bits_as<std::uint32_t>(tiny));
}

/// Exact for every bfloat16.
[[nodiscard]] KVARN_HOST_DEVICE KVARN_INLINE constexpr float to_float(bfloat16 b) noexcept
{
    return detail::bits_as<float>(static_cast<std::uint32_t>(b.bits) << 16);
}

/// Itself, for code on any element type.
[[nodiscard]] KVARN_HOST_DEVICE KVARN_INLINE constexpr float to_float(float f) noexcept { return f; }

#if defined(KVARN_BIG_ENDIAN)
[[nodiscard]] KVARN_INLINE constexpr half swap_bytes(record_half h) noexcept
{
    return {static_cast<std::uint16_t>(h.bits << 8 | h.bits >> 8)};
}
[[nodiscard]] KVARN_INLINE constexpr float to_float(record_half h) noexcept { return to_float(swap_bytes(h)); }
#endif

/// Nearest half, ties to even; too large becomes infinity, NaN stays NaN.
[[nodiscard]] KVARN_HOST_DEVICE KVARN_INLINE constexpr half to_half(float f) noexcept
{
    const std::uint32_t u = detail::bits_as<std::uint32_t>(f);
    const std::uint32_t sign = (u >> 16) & 0x8000u;
    const std::uint32_t magnitude = u & 0x7fffffffu;
    if (magnitude >= 0x7f800000u)
        return {static_cast<std::uint16_t>(sign | 0x7c00u | (magnitude > 0x7f800000u ? 0x0200u : 0u))};
    if (magnitude >= 0x477ff000u) return {static_cast<std::uint16_t>(sign | 0x7c00u)};  // 65520 and above
    if (magnitude >= 0x38800000u) {
        const std::uint32_t rounded = magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u);
        return {static_cast<std::uint16_t>(sign | rounded >> 13)};
    }
    if (magnitude < 0x33000000u) return {static_cast<std::uint16_t>(sign)};  // below half of the least subnormal
    const std::uint32_t exponent = magnitude >> 23;
    const std::uint32_t mantissa = (magnitude & 0x7fffffu) | 0x800000u;
    const std::uint32_t shift = 126u - exponent;  // 14 .. 24
    const std::uint32_t kept = mantissa >> shift;
    const std::uint32_t rest = mantissa & ((1u << shift) - 1u);
    const std::uint32_t middle = 1u << (shift - 1u);
    const std::uint32_t up = (rest > middle || (rest == middle && (kept & 1u))) ? 1u : 0u;
    return {static_cast<std::uint16_t>(sign | (kept + up))};
}

/// Nearest bfloat16, ties to even; NaN stays NaN.
[[nodiscard]] KVARN_HOST_DEVICE KVARN_INLINE constexpr bfloat16 to_bfloat16(float f) noexcept
{
    const std::uint32_t u = detail::bits_as<std::uint32_t>(f);
    if ((u & 0x7fffffffu) > 0x7f800000u) return {static_cast<std::uint16_t>(u >> 16 | 0x40u)};
    return {static_cast<std::uint16_t>((u + 0x7fffu + ((u >> 16) & 1u)) >> 16)};
}

/// Stores `f` as `T`; half saturates to +-65504 instead of becoming infinite.
template <class T>
[[nodiscard]] KVARN_HOST_DEVICE KVARN_INLINE constexpr T saturate_to(float f) noexcept
{
    if constexpr (std::is_same_v<T, half>)
        return to_half(f > 65504.0f ? 65504.0f : f < -65504.0f ? -65504.0f : f);
    else if constexpr (std::is_same_v<T, bounded_half>)
        return {to_half(f).bits};
    else if constexpr (std::is_same_v<T, bfloat16>)
        return to_bfloat16(f);
#if defined(KVARN_BIG_ENDIAN)
    else if constexpr (std::is_same_v<T, record_half>)
        return {swap_bytes({saturate_to<half>(f).bits}).bits};
#endif
    else
        return f;
}

/// Maps an engine's element type to the library's storage type of the same bits. Specialise it for your own 16-bit type:
/// `template <> struct kvarn::storage_of<my::fp16> { using type = kvarn::half; };` (Eigen's are in interop/eigen.hpp).
template <class T>
struct storage_of {};
template <> struct storage_of<float> { using type = float; };
template <> struct storage_of<half> { using type = half; };
template <> struct storage_of<bfloat16> { using type = bfloat16; };

#if defined(__FLT16_MANT_DIG__) && ((defined(__clang__) && __clang_major__ >= 15) || (!defined(__clang__) && __GNUC__ >= 13))
#define KVARN_HAS_FLOAT16 1
template <> struct storage_of<_Float16> { using type = half; };
#endif
#if defined(__STDCPP_BFLOAT16_T__)
template <> struct storage_of<decltype(0.0bf16)> { using type = bfloat16; };
#endif

/// The storage type of an element type.
template <class T>
using storage_t = typename storage_of<std::remove_cv_t<T>>::type;

/// `T`, without const, is float, half, bfloat16 or a type declared equal to one of them by `storage_of`.
template <class T>
concept element = requires { typename storage_t<T>; } && sizeof(T) == sizeof(storage_t<T>);

}  // namespace kvarn
