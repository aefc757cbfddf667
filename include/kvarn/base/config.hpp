// SPDX-License-Identifier: Apache-2.0
#pragma once
// Compiler attributes, and the refusal of flags under which the library could not keep its promise
// that a record is a pure function of its input (docs/numerics.md says which flags are harmless and which nobody can see).

#if defined(__FAST_MATH__) || defined(__ASSOCIATIVE_MATH__) || defined(__RECIPROCAL_MATH__) || \
    (defined(__FINITE_MATH_ONLY__) && __FINITE_MATH_ONLY__)
#error "kvarn: records must be the same bytes on every machine, which -ffast-math (or a part of it) forbids. Compile the \
files that include kvarn without it."
#endif
// 16 concerns _Float16 only.
#if defined(__FLT_EVAL_METHOD__) && __FLT_EVAL_METHOD__ != 0 && __FLT_EVAL_METHOD__ != 16
#error "kvarn: records must be the same bytes on every machine, but this one computes float with excess precision. Compile the \
files that include kvarn with -mfpmath=sse -msse2, and without -mfpmath=387 or -ffp-eval-method."
#endif

/// Every function that a translation unit compiled for one instruction set may reach is either a template on its
/// architecture tag or force-inlined, so that the linker never mixes code of two instruction sets.
#if defined(__GNUC__) || defined(__clang__)
#define KVARN_INLINE [[gnu::always_inline]] inline
#define KVARN_NOINLINE [[gnu::noinline]]
#else
#define KVARN_INLINE inline
#define KVARN_NOINLINE
#endif

/// Marks the constexpr functions of layer 1 that CUDA kernels call as well.
#if defined(__CUDACC__)
#define KVARN_HOST_DEVICE __host__ __device__
#else
#define KVARN_HOST_DEVICE
#endif

/// Unrolls the next loop completely; its trip count is a small constant that registers are indexed by.
#if defined(__clang__) || defined(__CUDACC__)
#define KVARN_UNROLL _Pragma("unroll")
#elif defined(__GNUC__)
#define KVARN_UNROLL _Pragma("GCC unroll 64")
#else
#define KVARN_UNROLL
#endif
