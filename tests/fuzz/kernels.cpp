// SPDX-License-Identifier: Apache-2.0
// The library for one instruction set: KVARN_FUZZ_ARCH is portable or native_arch. KVARN_FUZZ_PART: 0 tiles, 1 attention and packing.

#include <kvarn/kvarn.hpp>

#if KVARN_FUZZ_PART == 0
#define KVARN_KERNELS_FLOAT
#define KVARN_KERNELS_HALF
#define KVARN_KERNELS_BFLOAT16
#endif
#include <kvarn/dispatch/entry_points.hpp>

namespace kvarn {
#if KVARN_FUZZ_PART == 0
KVARN_FLOAT_ENTRY_POINTS(template, simd::KVARN_FUZZ_ARCH)
KVARN_HALF_ENTRY_POINTS(template, simd::KVARN_FUZZ_ARCH)
KVARN_BFLOAT16_ENTRY_POINTS(template, simd::KVARN_FUZZ_ARCH)
#else
KVARN_PACKING_ENTRY_POINTS(template, simd::KVARN_FUZZ_ARCH)
KVARN_ATTENTION_ENTRY_POINTS(template, simd::KVARN_FUZZ_ARCH)
#endif
}  // namespace kvarn
