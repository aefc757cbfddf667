// SPDX-License-Identifier: Apache-2.0
#pragma once
// The library's functions for the targets that compare the kernels of this build with the portable ones: declared here, compiled once
// in kernels.cpp.

#include <kvarn/kvarn.hpp>

#define KVARN_KERNELS_FLOAT
#define KVARN_KERNELS_HALF
#define KVARN_KERNELS_BFLOAT16
#include <kvarn/dispatch/entry_points.hpp>

#include "fuzz.hpp"

// Below the lowest set with kernels, native_arch is portable, and what is left is one function that is called twice.
namespace kvarn {
KVARN_ENTRY_POINTS(extern template, simd::portable)
KVARN_ENTRY_POINTS(extern template, simd::native_arch)
}  // namespace kvarn
