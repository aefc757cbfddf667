// SPDX-License-Identifier: Apache-2.0
#pragma once
// Arithmetic of the device code: the operations that records are pinned to (docs/numerics.md), each rounded once where it is
// written. On a GPU they are PTX instructions, which no compiler flag fuses, approximates or makes flush subnormals; compiled by
// a C++ compiler they are the same IEEE operations, so that the bodies of the kernels also run, bit by bit, without a GPU
// (tests/cuda). Accumulators are float. No memory; thread safe.

#include <cmath>
#include <cstddef>
#include <cstdint>

#include <kvarn/base/element.hpp>
#include <kvarn/base/status.hpp>

/// Marks device code. A C++ compiler sees plain functions.
#if defined(__CUDACC__)
#define KVARN_DEVICE __device__
#else
#define KVARN_DEVICE
#endif

namespace kvarn::cuda::detail {

using kvarn::detail::bits_as;

#if !defined(__CUDA_ARCH__)
/// Hides a result from the optimizer, so that it is neither fused into a following operation nor reassociated.
KVARN_DEVICE KVARN_INLINE float pinned(float x) noexcept
{
#if defined(__CUDACC__)
#elif defined(__SSE__)
    asm("" : "+x"(x));
#elif defined(__aarch64__)
    asm("" : "+w"(x));
#else
    asm("" : "+m"(x));
#endif
    return x;
}
#endif

KVARN_DEVICE KVARN_INLINE float add(float a, float b) noexcept
{
#if defined(__CUDA_ARCH__)
    float r;
    asm("add.rn.f32 %0, %1, %2;" : "=f"(r) : "f"(a), "f"(b));
    return r;
#else
    return pinned(a + b);
#endif
}
KVARN_DEVICE KVARN_INLINE float sub(float a, float b) noexcept
{
#if defined(__CUDA_ARCH__)
    float r;
    asm("sub.rn.f32 %0, %1, %2;" : "=f"(r) : "f"(a), "f"(b));
    return r;
#else
    return pinned(a - b);
#endif
}
KVARN_DEVICE KVARN_INLINE float mul(float a, float b) noexcept
{
#if defined(__CUDA_ARCH__)
    float r;
    asm("mul.rn.f32 %0, %1, %2;" : "=f"(r) : "f"(a), "f"(b));
    return r;
#else
    return pinned(a * b);
#endif
}
KVARN_DEVICE KVARN_INLINE float div(float a, float b) noexcept
{
#if defined(__CUDA_ARCH__)
    float r;
    asm("div.rn.f32 %0, %1, %2;" : "=f"(r) : "f"(a), "f"(b));
    return r;
#else
    return pinned(a / pinned(b));
#endif
}
KVARN_DEVICE KVARN_INLINE float sqrt(float a) noexcept
{
#if defined(__CUDA_ARCH__)
    float r;
    asm("sqrt.rn.f32 %0, %1;" : "=f"(r) : "f"(a));
    return r;
#else
    return pinned(std::sqrt(a));
#endif
}
/// a * b + c, rounded once.
KVARN_DEVICE KVARN_INLINE float fma(float a, float b, float c) noexcept
{
#if defined(__CUDA_ARCH__)
    float r;
    asm("fma.rn.f32 %0, %1, %2, %3;" : "=f"(r) : "f"(a), "f"(b), "f"(c));
    return r;
#else
    return pinned(std::fma(a, b, c));
#endif
}
/// c - a * b, rounded once.
KVARN_DEVICE KVARN_INLINE float fnma(float a, float b, float c) noexcept
{
    return fma(-a, b, c);
}
/// a > b, subnormals told apart whatever -ftz says.
KVARN_DEVICE KVARN_INLINE bool greater(float a, float b) noexcept
{
#if defined(__CUDA_ARCH__)
    unsigned r;
    asm("{ .reg .pred p; setp.gt.f32 p, %1, %2; selp.u32 %0, 1, 0, p; }" : "=r"(r) : "f"(a), "f"(b));
    return r != 0;
#else
    return a > b;
#endif
}
KVARN_DEVICE KVARN_INLINE float minimum(float a, float b) noexcept
{
    return greater(b, a) ? a : b;
}
KVARN_DEVICE KVARN_INLINE float maximum(float a, float b) noexcept
{
    return greater(a, b) ? a : b;
}

/// min and max in one instruction, for numbers of which nobody asks whether a zero is -0; where one is no number, the other.
KVARN_DEVICE KVARN_INLINE float quick_min(float a, float b) noexcept
{
#if defined(__CUDA_ARCH__)
    float r;
    asm("min.f32 %0, %1, %2;" : "=f"(r) : "f"(a), "f"(b));
    return r;
#else
    return minimum(a, b);
#endif
}
KVARN_DEVICE KVARN_INLINE float quick_max(float a, float b) noexcept
{
#if defined(__CUDA_ARCH__)
    float r;
    asm("max.f32 %0, %1, %2;" : "=f"(r) : "f"(a), "f"(b));
    return r;
#else
    return maximum(a, b);
#endif
}
/// x, of which the compiler knows nothing more: what is computed from it is neither moved out of a loop nor kept, where it would
/// take registers.
template <class Int>
KVARN_DEVICE KVARN_INLINE Int opaque(Int x) noexcept
{
    static_assert(sizeof(Int) == 4);
#if defined(__CUDA_ARCH__)
    asm volatile("" : "+r"(x));
#endif
    return x;
}

/// (x & mask) | bits, in one instruction even if both are constants.
KVARN_DEVICE KVARN_INLINE std::uint32_t and_or(std::uint32_t x, std::uint32_t mask, std::uint32_t bits) noexcept
{
#if defined(__CUDA_ARCH__)
    std::uint32_t r;
    asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(r) : "r"(x), "r"(mask), "r"(bits));
    return r;
#else
    return (x & mask) | bits;
#endif
}

/// Exact.
KVARN_DEVICE KVARN_INLINE float widen(float x) noexcept
{
    return x;
}
KVARN_DEVICE KVARN_INLINE float widen(bfloat16 x) noexcept
{
    return to_float(x);
}
KVARN_DEVICE KVARN_INLINE float widen(half x) noexcept
{
#if defined(__CUDA_ARCH__)
    float r;
    asm("cvt.f32.f16 %0, %1;" : "=f"(r) : "h"(x.bits));
    return r;
#else
    return to_float(x);
#endif
}

/// Nearest even; a half becomes infinite beyond its range.
KVARN_DEVICE KVARN_INLINE half narrow_to_half(float x) noexcept
{
#if defined(__CUDA_ARCH__)
    half r;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(r.bits) : "f"(x));
    return r;
#else
    return to_half(x);
#endif
}

/// Two values as T, rounded to nearest even, the first in the low half; half saturates at +-65504, what is
/// not a number stays that.
template <class T>
KVARN_DEVICE KVARN_INLINE std::uint32_t narrow_pair(float low, float high) noexcept
{
    static_assert(sizeof(T) == 2);
#if defined(__CUDA_ARCH__)
    std::uint32_t r;
    if constexpr (std::is_same_v<T, half>)
        asm("cvt.rn.satfinite.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
    else
        asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
    return r;
#else
    return saturate_to<T>(low).bits | static_cast<std::uint32_t>(saturate_to<T>(high).bits) << 16;
#endif
}

/// The same of one value; a float stays as it is.
template <class T>
KVARN_DEVICE KVARN_INLINE T narrow(float x) noexcept
{
    if constexpr (std::is_same_v<T, float>)
        return x;
    else
        return T{static_cast<std::uint16_t>(narrow_pair<T>(x, 0.0f))};
}

/// The stored value of a scalar: through half and back.
KVARN_DEVICE KVARN_INLINE float as_half(float x) noexcept
{
    return widen(narrow_to_half(x));
}

/// x without its sign, as the bits of a float: not finite from infinity_bits on.
KVARN_DEVICE KVARN_INLINE std::uint32_t magnitude_bits(float x) noexcept
{
    return bits_as<std::uint32_t>(x) & 0x7fffffffu;
}
inline constexpr std::uint32_t infinity_bits = 0x7f800000u;

/// The halves of a word.
KVARN_DEVICE KVARN_INLINE float low_half(std::uint32_t x) noexcept
{
    return widen(half{static_cast<std::uint16_t>(x)});
}
KVARN_DEVICE KVARN_INLINE float high_half(std::uint32_t x) noexcept
{
    return widen(half{static_cast<std::uint16_t>(x >> 16)});
}

/// Sixteen bytes that move as one.
struct alignas(16) quad {
    std::uint32_t w[4];
};

/// Eight bytes that move as one.
struct alignas(8) word_pair {
    std::uint32_t w[2];
};

/// N elements from an address aligned to a Piece, quad or word_pair, in such pieces.
template <class Piece, class T, int N>
KVARN_DEVICE KVARN_INLINE void load(const T* from, float (&x)[N]) noexcept
{
    constexpr int each = static_cast<int>(sizeof(Piece) / sizeof(T));  // elements of a piece
    KVARN_UNROLL
    for (int n = 0; n < N / each; ++n) {
        const Piece p = reinterpret_cast<const Piece*>(from)[n];
        KVARN_UNROLL
        for (int i = 0; i < each; ++i) {
            if constexpr (sizeof(T) == 4)
                x[n * each + i] = bits_as<float>(p.w[i]);
            else
                x[n * each + i] = widen(T{static_cast<std::uint16_t>(p.w[i / 2] >> (i % 2 * 16))});
        }
    }
}

/// Sixteen elements from a 16-byte aligned address.
template <class T>
KVARN_DEVICE KVARN_INLINE void load16(const T* from, float (&x)[16]) noexcept
{
    load<quad>(from, x);
}

/// N elements, of 4, 8, 16, 32 bytes or a multiple, to an address aligned to as many, 16 at most.
template <class T, int N>
KVARN_DEVICE KVARN_INLINE void store(T* to, const float (&x)[N]) noexcept
{
    constexpr int words = N * static_cast<int>(sizeof(T)) / 4, each = words < 4 ? words : 4;  // words of one store
    struct alignas(4 * each) piece {
        std::uint32_t w[each];
    };
    piece* const p = reinterpret_cast<piece*>(to);
    KVARN_UNROLL
    for (int n = 0; n < words / each; ++n) {
        piece q;
        KVARN_UNROLL
        for (int i = 0; i < each; ++i) {
            const int word = n * each + i;
            if constexpr (sizeof(T) == 4)
                q.w[i] = bits_as<std::uint32_t>(x[word]);
            else
                q.w[i] = narrow_pair<T>(x[2 * word], x[2 * word + 1]);
        }
        p[n] = q;
    }
}

/// Eight elements to a 16-byte aligned address.
template <class T>
KVARN_DEVICE KVARN_INLINE void store8(T* to, const float (&x)[8]) noexcept
{
    store(to, x);
}

}  // namespace kvarn::cuda::detail
