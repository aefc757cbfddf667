// SPDX-License-Identifier: Apache-2.0
#pragma once
// Which instruction sets the running processor has and its operating system saves, one bit for each architecture tag.
// In: cpuid and xgetbv; on AArch64 what the operating system says. Out: a set of bits. No state, no allocation; thread safe, and safe before main.

#include <kvarn/base/config.hpp>  // first: it refuses older standards

#include <cstddef>
#include <cstdint>

#include <kvarn/simd/arch.hpp>

#if defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#elif defined(__aarch64__) && defined(__APPLE__)
#include <sys/sysctl.h>
#endif

namespace kvarn::detail {

/// The bit of an architecture tag. Of two that run on the same processor, the higher bit is the faster one.
template <class Arch>
inline constexpr unsigned arch_bit = 0;
template <> inline constexpr unsigned arch_bit<simd::portable> = 1;
template <> inline constexpr unsigned arch_bit<simd::neon64> = 2;
template <> inline constexpr unsigned arch_bit<simd::neon64dot> = 4;
template <> inline constexpr unsigned arch_bit<simd::sse2> = 8;
template <> inline constexpr unsigned arch_bit<simd::avx2> = 16;
template <> inline constexpr unsigned arch_bit<simd::avxvnni> = 32;
template <> inline constexpr unsigned arch_bit<simd::avx512> = 64;
template <> inline constexpr unsigned arch_bit<simd::avx512vnni> = 128;

/// What an x86 processor says about itself.
struct x86_report {
    std::uint32_t leaf1_ecx;
    std::uint32_t leaf7_ebx;
    std::uint32_t extended1_ecx;
    std::uint32_t saved_state;  ///< the low half of XCR0: registers that the operating system saves
    std::uint32_t leaf7_ecx = 0;
    std::uint32_t leaf7_1_eax = 0;
};

/// The sets that may run. Their code is compiled for x86-64-v3 and x86-64-v4, so all features of those levels are asked for,
/// whether the kernels name them or not.
[[nodiscard]] KVARN_INLINE constexpr unsigned x86_arch_bits(const x86_report& r) noexcept
{
    constexpr std::uint32_t v3_leaf1 = 1u << 0 | 1u << 9 | 1u << 12 | 1u << 13 | 1u << 19 | 1u << 20 |  // SSE3 SSSE3 FMA CX16 SSE4.1 SSE4.2
                                       1u << 22 | 1u << 23 | 1u << 27 | 1u << 28 | 1u << 29;           // MOVBE POPCNT OSXSAVE AVX F16C
    constexpr std::uint32_t v3_leaf7 = 1u << 3 | 1u << 5 | 1u << 8;                                    // BMI1 AVX2 BMI2
    constexpr std::uint32_t v3_extended1 = 1u << 0 | 1u << 5;                                          // LAHF LZCNT
    constexpr std::uint32_t v4_leaf7 = 1u << 16 | 1u << 17 | 1u << 28 | 1u << 30 | 1u << 31;           // AVX512 F DQ CD BW VL
    constexpr std::uint32_t v3_state = 0x06, v4_state = 0xe6;                                          // xmm ymm; opmask zmm
    const bool v3 = (r.leaf1_ecx & v3_leaf1) == v3_leaf1 && (r.leaf7_ebx & v3_leaf7) == v3_leaf7 &&
                    (r.extended1_ecx & v3_extended1) == v3_extended1 && (r.saved_state & v3_state) == v3_state;
    const bool v4 = v3 && (r.leaf7_ebx & v4_leaf7) == v4_leaf7 && (r.saved_state & v4_state) == v4_state;
    const bool avxvnni = v3 && (r.leaf7_1_eax & 1u << 4) != 0, avx512vnni = v4 && (r.leaf7_ecx & 1u << 11) != 0;
    return (v3 ? arch_bit<simd::avx2> : 0u) | (avxvnni ? arch_bit<simd::avxvnni> : 0u) | (v4 ? arch_bit<simd::avx512> : 0u) |
           (avx512vnni ? arch_bit<simd::avx512vnni> : 0u);
}

#if defined(__x86_64__)
struct cpuid_registers {
    std::uint32_t a, b, c, d;
};

/// Not by <cpuid.h>, whose macros bear the names of functions in <intrin.h>.
KVARN_INLINE cpuid_registers cpuid(std::uint32_t leaf, std::uint32_t part = 0) noexcept
{
    cpuid_registers r{};
    __asm__ volatile("cpuid" : "=a"(r.a), "=b"(r.b), "=c"(r.c), "=d"(r.d) : "a"(leaf), "c"(part));
    return r;
}

KVARN_INLINE x86_report read_x86() noexcept
{
    x86_report r{};
    const std::uint32_t leaves = cpuid(0).a;
    if (leaves >= 1) r.leaf1_ecx = cpuid(1).c;
    if (leaves >= 7) {
        const cpuid_registers x = cpuid(7);
        r.leaf7_ebx = x.b;
        r.leaf7_ecx = x.c;
        if (x.a >= 1) r.leaf7_1_eax = cpuid(7, 1).a;
    }
    if (cpuid(0x80000000u).a >= 0x80000001u) r.extended1_ecx = cpuid(0x80000001u).c;
    if (r.leaf1_ecx & 1u << 27) {  // OSXSAVE: xgetbv exists
        std::uint32_t low = 0, high = 0;
        __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
        r.saved_state = low;
    }
    return r;
}
#endif

#if defined(__aarch64__)
#if defined(_WIN32)
extern "C" __declspec(dllimport) int __stdcall IsProcessorFeaturePresent(unsigned long);  // as windows.h declares it
#endif

/// Whether there are the dot products of Armv8.2. Where nobody can be asked: no.
KVARN_INLINE bool has_arm_dot_products() noexcept
{
#if defined(__ARM_FEATURE_DOTPROD)
    return true;
#elif defined(__linux__)
    return (getauxval(16) & 1ul << 20) != 0;  // AT_HWCAP, HWCAP_ASIMDDP
#elif defined(__APPLE__)
    int has = 0;
    std::size_t size = sizeof has;
    return sysctlbyname("hw.optional.arm.FEAT_DotProd", &has, &size, nullptr, 0) == 0 && has != 0;
#elif defined(_WIN32)
    return IsProcessorFeaturePresent(43) != 0;  // PF_ARM_V82_DP_INSTRUCTIONS_AVAILABLE
#else
    return false;
#endif
}
#endif

/// The sets that run on this machine.
[[nodiscard]] KVARN_INLINE unsigned machine_arch_bits() noexcept
{
#if defined(__x86_64__)
    return arch_bit<simd::portable> | arch_bit<simd::sse2> | x86_arch_bits(read_x86());
#elif defined(__SSE2__)
    return arch_bit<simd::portable> | arch_bit<simd::sse2>;
#elif defined(__aarch64__)
    return arch_bit<simd::portable> | arch_bit<simd::neon64> | (has_arm_dot_products() ? arch_bit<simd::neon64dot> : 0u);
#else
    return arch_bit<simd::portable>;
#endif
}

}  // namespace kvarn::detail
