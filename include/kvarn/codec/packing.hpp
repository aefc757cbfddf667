// SPDX-License-Identifier: Apache-2.0
#pragma once
// Codes of 2, 3, 4, 5, 6 or 8 bits as a little-endian bit stream: code c sits in bits [c * bits, (c + 1) * bits)
// (docs/record-format.md). In and out: bytes, one code each on the unpacked side. Touches no byte beyond its buffers.

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include <kvarn/base/status.hpp>
#include <kvarn/layout/format.hpp>
#include <kvarn/simd/xsimd.hpp>

namespace kvarn {

/// Packs `count` codes, each below 2^bits, into count * bits / 8 bytes. `count` is a multiple of 8. The buffers must not overlap.
/// Errors: unsupported_bits, bad_argument (count), null_pointer.
template <class Arch = simd::native_arch>
[[nodiscard]] status pack_codes(int bits, const std::uint8_t* codes, std::size_t count, std::uint8_t* packed) noexcept;

/// The inverse of pack_codes.
template <class Arch = simd::native_arch>
[[nodiscard]] status unpack_codes(int bits, const std::uint8_t* packed, std::size_t count, std::uint8_t* codes) noexcept;

namespace detail {

/// Calls f with a supported number of bits as an integral constant.
template <class F>
KVARN_INLINE void with_bits(int bits, F&& f) noexcept
{
    switch (bits) {
    case 2: return f(std::integral_constant<int, 2>{});
    case 3: return f(std::integral_constant<int, 3>{});
    case 4: return f(std::integral_constant<int, 4>{});
    case 5: return f(std::integral_constant<int, 5>{});
    case 6: return f(std::integral_constant<int, 6>{});
    case 8: return f(std::integral_constant<int, 8>{});
    default: return;
    }
}

// The kernels move up to 32 bytes on the packed side for 4 * Bits of content, so the end of a stream goes through a bounce buffer.

template <class Arch, int Bits>
KVARN_INLINE void pack_stream(const std::uint8_t* codes, std::size_t count, std::uint8_t* packed) noexcept
{
    std::size_t bytes = count * Bits / 8;
    for (; bytes >= 32; bytes -= 4 * Bits, codes += 32, packed += 4 * Bits) simd::kernels<Arch>::template pack32<Bits>(codes, packed);
    for (; bytes > 0; codes += 32) {
        const std::size_t now = bytes < 4 * Bits ? bytes : 4 * Bits;
        std::uint8_t in[32] = {}, out[64];
        std::memcpy(in, codes, now * 8 / Bits);
        simd::kernels<Arch>::template pack32<Bits>(in, out);
        std::memcpy(packed, out, now);
        bytes -= now;
        packed += now;
    }
}

template <class Arch, int Bits>
KVARN_INLINE void unpack_stream(const std::uint8_t* packed, std::size_t count, std::uint8_t* codes) noexcept
{
    std::size_t bytes = count * Bits / 8;
    for (; bytes >= 32; bytes -= 4 * Bits, codes += 32, packed += 4 * Bits) simd::kernels<Arch>::template unpack32<Bits>(packed, codes);
    for (; bytes > 0; codes += 32) {
        const std::size_t now = bytes < 4 * Bits ? bytes : 4 * Bits;
        std::uint8_t in[64] = {}, out[32];
        std::memcpy(in, packed, now);
        simd::kernels<Arch>::template unpack32<Bits>(in, out);
        std::memcpy(codes, out, now * 8 / Bits);
        bytes -= now;
        packed += now;
    }
}

/// The same for a number of bits known at run time, compiled once for all callers: for streams of a thousand codes and more.
template <class Arch>
KVARN_NOINLINE void pack_stream(int bits, const std::uint8_t* codes, std::size_t count, std::uint8_t* packed) noexcept
{
    with_bits(bits, [&](auto b) KVARN_LAMBDA { pack_stream<Arch, b()>(codes, count, packed); });
}
template <class Arch>
KVARN_NOINLINE void unpack_stream(int bits, const std::uint8_t* packed, std::size_t count, std::uint8_t* codes) noexcept
{
    with_bits(bits, [&](auto b) KVARN_LAMBDA { unpack_stream<Arch, b()>(packed, count, codes); });
}

}  // namespace detail

template <class Arch>
status pack_codes(int bits, const std::uint8_t* codes, std::size_t count, std::uint8_t* packed) noexcept
{
    if (!detail::is_code_width(bits)) return status::unsupported_bits;
    if (count % 8 != 0) return status::bad_argument;
    if (count == 0) return status::ok;
    if (codes == nullptr || packed == nullptr) return status::null_pointer;
    detail::pack_stream<Arch>(bits, codes, count, packed);
    return status::ok;
}

template <class Arch>
status unpack_codes(int bits, const std::uint8_t* packed, std::size_t count, std::uint8_t* codes) noexcept
{
    if (!detail::is_code_width(bits)) return status::unsupported_bits;
    if (count % 8 != 0) return status::bad_argument;
    if (count == 0) return status::ok;
    if (codes == nullptr || packed == nullptr) return status::null_pointer;
    detail::unpack_stream<Arch>(bits, packed, count, codes);
    return status::ok;
}

}  // namespace kvarn
