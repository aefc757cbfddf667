// SPDX-License-Identifier: Apache-2.0
#pragma once
// Packed codes in registers: a piece of one row of codes as one thread takes it, for every width, and code n of it
// (docs/record-format.md). In: words of a record. Out: words whose lowest bits are the piece's first code. No arithmetic on values.

#include <cstddef>
#include <cstdint>
#include <type_traits>

#include <kvarn/cuda/arithmetic.cuh>

namespace kvarn::cuda::detail {

/// `Columns` consecutive codes of `Bits` bits; code 0 in the low bits of w[0]. What lies above the last code is not specified.
template <int Bits, int Columns>
struct code_piece {
    static constexpr int bits = Bits * Columns, words = (bits + 31) / 32;
    std::uint32_t w[words];
};

/// Stored halves as floats, from an 8-byte aligned address; n is a multiple of 4.
template <int N>
KVARN_DEVICE KVARN_INLINE void load_scalars(const std::byte* from, float (&x)[N]) noexcept
{
    KVARN_UNROLL
    for (int i = 0; i < N; i += 4) {
        const word_pair two = reinterpret_cast<const word_pair*>(from)[i / 4];
        x[i] = low_half(two.w[0]);
        x[i + 1] = high_half(two.w[0]);
        x[i + 2] = low_half(two.w[1]);
        x[i + 3] = high_half(two.w[1]);
    }
}

/// The low word of (high:low) >> by, by < 32.
KVARN_DEVICE KVARN_INLINE std::uint32_t shift_right(std::uint32_t low, std::uint32_t high, int by) noexcept
{
#if defined(__CUDA_ARCH__)
    return __funnelshift_r(low, high, static_cast<unsigned>(by));
#else
    return static_cast<std::uint32_t>((static_cast<std::uint64_t>(high) << 32 | low) >> by);
#endif
}

/// Whether every piece starts where a byte, a 16-bit word or a word does, and is made of them.
template <int Bits, int Columns>
inline constexpr bool is_whole_piece = Bits* Columns == 8 || Bits* Columns == 16 || Bits* Columns % 32 == 0;

/// Bytes from the start of a row to what load_piece_at takes for the piece that starts at `column`, a multiple of Columns.
template <int Bits, int Columns>
KVARN_DEVICE KVARN_INLINE std::uint32_t piece_offset(int column) noexcept
{
    const std::uint32_t bit = static_cast<std::uint32_t>(column) * Bits;
    return is_whole_piece<Bits, Columns> ? bit / 8 : bit / 32 * 4;
}

/// load_piece from an address that piece_offset gave.
template <int Bits, int Columns>
KVARN_DEVICE KVARN_INLINE code_piece<Bits, Columns> load_piece_at(const std::byte* at, int column) noexcept
{
    constexpr int n = Bits * Columns;
    code_piece<Bits, Columns> p;
    const auto* const words = reinterpret_cast<const std::uint32_t*>(at);
    if constexpr (n == 8) {
        p.w[0] = *reinterpret_cast<const std::uint8_t*>(at);
    } else if constexpr (n == 16) {
        p.w[0] = *reinterpret_cast<const std::uint16_t*>(at);
    } else if constexpr (n % 64 == 0) {
        KVARN_UNROLL
        for (int i = 0; i < n / 64; ++i) {
            const word_pair two = reinterpret_cast<const word_pair*>(at)[i];
            p.w[2 * i] = two.w[0], p.w[2 * i + 1] = two.w[1];
        }
    } else if constexpr (n % 32 == 0) {
        KVARN_UNROLL
        for (int i = 0; i < n / 32; ++i) p.w[i] = words[i];
    } else {
        // It may start anywhere in a word.
        constexpr int count = (32 - (n & -n) + n + 31) / 32;
        const int by = column * Bits % 32;
        std::uint32_t x[count];
        KVARN_UNROLL
        for (int i = 0; i < count; ++i) x[i] = words[i];
        KVARN_UNROLL
        for (int i = 0; i < p.words; ++i) p.w[i] = i + 1 < count ? shift_right(x[i], x[i + 1], by) : x[i] >> by;
    }
    return p;
}

/// The piece that starts at `column`, a multiple of Columns, of the row of codes at `row`. Rows have 32 codes or a multiple and
/// start at a word; for 2, 4, 6 and 8 bits at a multiple of 8 bytes. May read up to a word behind the row, which a record always
/// has.
template <int Bits, int Columns>
KVARN_DEVICE KVARN_INLINE code_piece<Bits, Columns> load_piece(const std::byte* row, int column) noexcept
{
    return load_piece_at<Bits, Columns>(row + piece_offset<Bits, Columns>(column), column);
}

/// Code n of a piece.
template <int Bits, int Columns>
KVARN_DEVICE KVARN_INLINE std::uint32_t code_of(const code_piece<Bits, Columns>& p, int n) noexcept
{
    const int word = n * Bits / 32, at = n * Bits % 32;
    std::uint32_t code = p.w[word] >> at;
    if (at + Bits > 32 && word + 1 < p.words) code |= p.w[word + 1] << (32 - at);
    return code & ((1u << Bits) - 1u);
}

/// Code n of a piece as a float. It is not shifted to where it counts one: as bits of the mantissa of 2^23 it counts 2^at, which
/// one exact fma takes off with the 2^23.
template <int Bits, int Columns>
KVARN_DEVICE KVARN_INLINE float float_of(const code_piece<Bits, Columns>& p, int n) noexcept
{
    const int word = n * Bits / 32;
    int at = n * Bits % 32;
    std::uint32_t bits = p.w[word];
    if (at + Bits > 32) {
        bits = shift_right(bits, p.w[word + 1 < p.words ? word + 1 : word], at);
        at = 0;
    } else if (at + Bits > 23) {
        bits >>= 16;  // one shift for several codes
        at -= 16;
    }
    const float unit = bits_as<float>(static_cast<std::uint32_t>(127 - at) << 23);  // 2^-at
    return fma(bits_as<float>(and_or(bits, ((1u << Bits) - 1u) << at, 0x4b000000u)), unit, -8388608.0f * unit);
}

/// body(integral constant) for the widths that a record may have. (Device code reads it as decltype(x)::value.)
template <class Body>
KVARN_DEVICE KVARN_INLINE auto with_bits(int bits, Body&& body) noexcept
{
    switch (bits) {
    case 2: return body(std::integral_constant<int, 2>{});
    case 3: return body(std::integral_constant<int, 3>{});
    case 4: return body(std::integral_constant<int, 4>{});
    case 5: return body(std::integral_constant<int, 5>{});
    case 6: return body(std::integral_constant<int, 6>{});
    default: return body(std::integral_constant<int, 8>{});
    }
}

}  // namespace kvarn::cuda::detail
