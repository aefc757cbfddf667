// SPDX-License-Identifier: Apache-2.0
#pragma once
// Bit streams in 64-bit integer registers, eight codes at a time: fields are squeezed (or spread) in three steps of doubling size. For
// little-endian instruction sets without anything better. In and out: bytes, one code each on the unpacked side.

#include <cstdint>
#include <cstring>

#include <kvarn/base/config.hpp>

namespace kvarn::simd {

struct wide_packing {
    template <int Bits>
    KVARN_INLINE static void pack32(const std::uint8_t* codes, std::uint8_t* packed) noexcept
    {
        KVARN_UNROLL
        for (int i = 0; i < 4; ++i) {
            std::uint64_t x;
            std::memcpy(&x, codes + 8 * i, 8);
            if constexpr (Bits < 8) {
                x = (x & 0x00ff00ff00ff00ffu) | (x & 0xff00ff00ff00ff00u) >> (8 - Bits);
                x = (x & 0x0000ffff0000ffffu) | (x & 0xffff0000ffff0000u) >> (16 - 2 * Bits);
                x = (x & 0x00000000ffffffffu) | (x & 0xffffffff00000000u) >> (32 - 4 * Bits);
            }
            std::memcpy(packed + i * Bits, &x, 8);
        }
    }
    template <int Bits>
    KVARN_INLINE static void unpack32(const std::uint8_t* packed, std::uint8_t* codes) noexcept
    {
        KVARN_UNROLL
        for (int i = 0; i < 4; ++i) {
            const std::uint64_t x = eight_codes<Bits>(packed + i * Bits);
            std::memcpy(codes + 8 * i, &x, 8);
        }
    }

    /// Eight codes, one a byte. Reads eight bytes.
    template <int Bits>
    KVARN_INLINE static std::uint64_t eight_codes(const std::uint8_t* packed) noexcept
    {
        constexpr std::uint64_t m4 = (std::uint64_t{1} << (4 * Bits)) - 1, m2 = (std::uint64_t{1} << (2 * Bits)) - 1;
        constexpr std::uint64_t m1 = (std::uint64_t{1} << Bits) - 1;
        std::uint64_t x;
        std::memcpy(&x, packed, 8);
        if constexpr (Bits < 8) {
            x = (x & m4) | (x >> (4 * Bits) & m4) << 32;
            x = (x & m2 * 0x0000000100000001u) | (x & (m2 << (2 * Bits)) * 0x0000000100000001u) << (16 - 2 * Bits);
            x = (x & m1 * 0x0001000100010001u) | (x & (m1 << Bits) * 0x0001000100010001u) << (8 - Bits);
        }
        return x;
    }
};

}  // namespace kvarn::simd
