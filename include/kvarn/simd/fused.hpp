// SPDX-License-Identifier: Apache-2.0
#pragma once
// a * b + c in float, rounded once. In: three floats. Out: the correctly rounded sum, subnormal results, infinities and NaN included;
// round to nearest, subnormals kept (simd/environment.hpp). By the instruction where the target has one, by construction elsewhere:
// a C library's fmaf is not always right (MinGW-w64's is not). No state; thread safe.

#include <kvarn/base/config.hpp>  // first: it refuses older standards

#include <bit>
#include <cstdint>

#if defined(__FMA__) || defined(__aarch64__) || defined(__FP_FAST_FMAF) || defined(__riscv_flen) || defined(__s390x__) || \
    defined(__powerpc64__)
#define KVARN_HAS_FMA 1
#endif

namespace kvarn::simd {

/// a * b + c without an instruction for it. The product of two floats is exact in double, so only the sum is rounded, and then
/// once more to float. That is wrong only where the double sum is inexact and lies in the middle between two floats: all its bits
/// below the 25th are zero. There the sum is rounded to odd instead, which keeps the side of the middle that the exact sum lies on
/// (Boldo and Melquiond 2008).
KVARN_INLINE float emulated_fma(float a, float b, float c) noexcept
{
    const double product = static_cast<double>(a) * static_cast<double>(b), addend = static_cast<double>(c);
    double sum = product + addend;
    KVARN_PIN(sum);
    std::uint64_t bits = std::bit_cast<std::uint64_t>(sum);
    // Of a subnormal float the middle lies higher: then even more low bits are zero. Infinities pass too, and have no error.
    if ((bits & 0x0fffffffu) == 0) [[unlikely]] {
        double part = sum - product;  // Knuth's two-sum: the exact error of the sum
        KVARN_PIN(part);
        double rest = sum - part;
        KVARN_PIN(rest);
        double product_error = product - rest, addend_error = addend - part;
        KVARN_PIN(product_error);
        KVARN_PIN(addend_error);
        double error = product_error + addend_error;
        KVARN_PIN(error);
        const std::uint64_t error_bits = std::bit_cast<std::uint64_t>(error), magnitude = error_bits & 0x7fffffffffffffffu;
        const bool inexact = magnitude != 0 && magnitude < 0x7ff0000000000000u && (bits & 0x7ff0000000000000u) != 0x7ff0000000000000u;
        // The last bit of the sum is zero here: one step towards the exact sum makes it odd.
        if (inexact) bits = (bits ^ error_bits) >> 63 != 0 ? bits - 1 : bits + 1;
        sum = std::bit_cast<double>(bits);
    }
    return static_cast<float>(sum);
}

KVARN_INLINE float fused(float a, float b, float c) noexcept
{
#if defined(KVARN_HAS_FMA)
    return __builtin_fmaf(a, b, c);
#else
    return emulated_fma(a, b, c);
#endif
}

}  // namespace kvarn::simd
