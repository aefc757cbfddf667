// SPDX-License-Identifier: Apache-2.0
#pragma once
// Architecture tags. A tag names the instruction set that a template is compiled for; it is part of every kernel's mangled
// name, so that one binary can hold several. `native_arch` is the best one that this translation unit's flags allow.

#include <kvarn/base/config.hpp>

namespace kvarn::simd {

struct portable {};    ///< scalar C++; the bit oracle of all others
struct sse2 {};        ///< every x86-64, and 32-bit x86 with SSE2
struct avx2 {};        ///< x86-64 with AVX2, FMA and F16C (x86-64-v3)
struct avxvnni {};     ///< avx2 with AVX-VNNI on top: Alder Lake on
struct avx512 {};      ///< x86-64 with AVX-512 F, BW, DQ, VL on top (x86-64-v4)
struct avx512vnni {};  ///< avx512 with AVX-512 VNNI on top: Ice Lake and Zen 4 on
struct neon64 {};      ///< AArch64
struct neon64dot {};   ///< AArch64 with the dot products of Armv8.2

template <class Arch>
struct arch_traits;
template <> struct arch_traits<portable> { static constexpr const char* name = "portable"; };
template <> struct arch_traits<sse2> { static constexpr const char* name = "sse2"; };
template <> struct arch_traits<avx2> { static constexpr const char* name = "avx2"; };
template <> struct arch_traits<avxvnni> { static constexpr const char* name = "avxvnni"; };
template <> struct arch_traits<avx512> { static constexpr const char* name = "avx512"; };
template <> struct arch_traits<avx512vnni> { static constexpr const char* name = "avx512vnni"; };
template <> struct arch_traits<neon64> { static constexpr const char* name = "neon64"; };
template <> struct arch_traits<neon64dot> { static constexpr const char* name = "neon64dot"; };

#if defined(__SSE2__)
#define KVARN_HAS_SSE2 1
#endif
#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#define KVARN_HAS_AVX2 1
#endif
#if defined(KVARN_HAS_AVX2) && defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && \
    defined(__AVX512VL__)
#define KVARN_HAS_AVX512 1
#endif
#if defined(KVARN_HAS_AVX2) && defined(__AVXVNNI__)
#define KVARN_HAS_AVXVNNI 1
#endif
#if defined(KVARN_HAS_AVX512) && defined(__AVX512VNNI__)
#define KVARN_HAS_AVX512VNNI 1
#endif
#if defined(__aarch64__) && defined(__ARM_FEATURE_FMA) && !defined(__AARCH64EB__)
#define KVARN_HAS_NEON64 1
#endif
#if defined(KVARN_HAS_NEON64) && defined(__ARM_FEATURE_DOTPROD)
#define KVARN_HAS_NEON64DOT 1
#endif

/// The best set that the flags of this translation unit allow.
#if defined(KVARN_HAS_AVX512VNNI)
using native_arch = avx512vnni;
#elif defined(KVARN_HAS_AVX512)
using native_arch = avx512;
#elif defined(KVARN_HAS_AVXVNNI)
using native_arch = avxvnni;
#elif defined(KVARN_HAS_AVX2)
using native_arch = avx2;
#elif defined(KVARN_HAS_SSE2)
using native_arch = sse2;
#elif defined(KVARN_HAS_NEON64DOT)
using native_arch = neon64dot;
#elif defined(KVARN_HAS_NEON64)
using native_arch = neon64;
#else
using native_arch = portable;
#endif

}  // namespace kvarn::simd
