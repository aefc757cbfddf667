// SPDX-License-Identifier: Apache-2.0
#pragma once
// IEEE binary16 and bfloat16 from their definitions, in double. Shares nothing with the library.

#include <cmath>
#include <cstdint>
#include <limits>

namespace reference {

/// Value of a binary floating-point pattern with one sign bit, `exponent_bits` and `mantissa_bits`.
inline double decode_float_bits(std::uint32_t bits, int exponent_bits, int mantissa_bits)
{
    const std::uint32_t mantissa = bits & ((1u << mantissa_bits) - 1u);
    const int exponent = static_cast<int>((bits >> mantissa_bits) & ((1u << exponent_bits) - 1u));
    const bool negative = (bits >> (mantissa_bits + exponent_bits)) & 1u;
    const int bias = (1 << (exponent_bits - 1)) - 1;
    double magnitude;
    if (exponent == (1 << exponent_bits) - 1)
        magnitude = mantissa ? std::numeric_limits<double>::quiet_NaN() : std::numeric_limits<double>::infinity();
    else if (exponent == 0)
        magnitude = std::ldexp(static_cast<double>(mantissa), 1 - bias - mantissa_bits);
    else
        magnitude = std::ldexp(static_cast<double>(mantissa + (1u << mantissa_bits)), exponent - bias - mantissa_bits);
    return negative ? -magnitude : magnitude;
}

/// Nearest pattern, ties to even; too large becomes infinity. `value` is not NaN.
inline std::uint32_t encode_float_bits(double value, int exponent_bits, int mantissa_bits)
{
    const std::uint32_t sign = std::signbit(value) ? 1u << (mantissa_bits + exponent_bits) : 0u;
    const double magnitude = std::fabs(value);
    const int bias = (1 << (exponent_bits - 1)) - 1;
    const std::uint32_t infinity = ((1u << exponent_bits) - 1u) << mantissa_bits;
    if (std::isinf(magnitude)) return sign | infinity;
    if (magnitude == 0.0) return sign;
    int exponent = std::ilogb(magnitude);
    if (exponent < 1 - bias) exponent = 1 - bias;
    // In units of the last place; nearbyint rounds ties to even in the default mode. A carry moves into the exponent by itself.
    const auto units = static_cast<std::uint64_t>(std::nearbyint(std::ldexp(magnitude, mantissa_bits - exponent)));
    const std::uint64_t pattern = (static_cast<std::uint64_t>(exponent + bias - 1) << mantissa_bits) + units;
    return sign | (pattern >= infinity ? infinity : static_cast<std::uint32_t>(pattern));
}

inline double half_value(std::uint16_t bits) { return decode_float_bits(bits, 5, 10); }
inline std::uint16_t half_bits(double value) { return static_cast<std::uint16_t>(encode_float_bits(value, 5, 10)); }
inline double round_to_half(double value) { return half_value(half_bits(value)); }
inline double bfloat16_value(std::uint16_t bits) { return decode_float_bits(bits, 8, 7); }
inline std::uint16_t bfloat16_bits(double value) { return static_cast<std::uint16_t>(encode_float_bits(value, 8, 7)); }

}  // namespace reference
