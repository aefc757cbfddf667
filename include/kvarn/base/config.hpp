// SPDX-License-Identifier: Apache-2.0
#pragma once
// What the compiler must be, and every construct of the library that is not plain C++20, behind macros: attributes, unrolling, and the
// empty assembler statements that pin floating-point operations where they are written. Flags are refused under which the library
// could not keep its promise that a record is a pure function of its input (docs/numerics.md says which are harmless, which nobody can see).

#if defined(_MSC_VER) && !defined(__clang__)
#error "kvarn: cl.exe cannot keep floating-point operations apart where records need it. On Windows, compile the files that include \
kvarn with clang-cl (same flags, same ABI) or MinGW-w64's g++ or clang++."
#endif
#if (defined(_MSVC_LANG) ? _MSVC_LANG : __cplusplus) < 202002L
#error "kvarn needs C++20: compile the files that include it with -std=c++20 (clang-cl: /std:c++20) or newer."
#endif
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
/// architecture tag or force-inlined, so that the linker never mixes code of two instruction sets. KVARN_LAMBDA is the same for a
/// lambda, after its parameters.
#define KVARN_INLINE [[gnu::always_inline]] inline
#define KVARN_NOINLINE [[gnu::noinline]]
#define KVARN_LAMBDA __attribute__((always_inline))

/// Machines that keep the most significant byte first; records and files keep the least.
#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
#define KVARN_BIG_ENDIAN 1
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
#else
#define KVARN_UNROLL _Pragma("GCC unroll 64")
#endif

/// Keeps the next loop, of a small constant trip count, a loop: two turns at a time.
#if defined(__clang__)
#define KVARN_ROLL _Pragma("clang loop unroll_count(2)")
#else
#define KVARN_ROLL _Pragma("GCC unroll 2")
#endif

/// Fetches the cache line at an address into the second-level cache. (Into the first it would wait for a free fill buffer.)
#define KVARN_PREFETCH(address) __builtin_prefetch(address, 0, 2)

/// Where a float, or a vector register, lies: an assembler constraint.
#if defined(__AVX512F__)
#define KVARN_FLOAT_REGISTER "v"
#elif defined(__SSE2__)
#define KVARN_FLOAT_REGISTER "x"
#elif defined(__aarch64__)
#define KVARN_FLOAT_REGISTER "w"
#elif defined(__riscv_flen) || defined(__s390x__) || defined(__powerpc64__)
#define KVARN_FLOAT_REGISTER "f"
#else
#define KVARN_FLOAT_REGISTER "m"
#endif

/// Makes the value of a register opaque, so that the operation it comes from is neither fused into a following one nor reassociated.
#define KVARN_PIN(x) __asm__("" : "+" KVARN_FLOAT_REGISTER(x))
/// The same, for each `with` anew.
#define KVARN_PIN_WITH(x, with) __asm__("" : "+" KVARN_FLOAT_REGISTER(x) : KVARN_FLOAT_REGISTER(with))

/// What GCC needs in loops that use all registers. KVARN_HOLD keeps an accumulator in one register from turn to turn, where its old and
/// its new value would get one each; KVARN_HOLD_POINTER has a constant loaded where it is used instead of keeping it in a register.
#if defined(__clang__)
#define KVARN_HOLD(x) static_cast<void>(x)
#define KVARN_HOLD_POINTER(p) static_cast<void>(p)
#else
#define KVARN_HOLD(x) __asm__ volatile("" : "+" KVARN_FLOAT_REGISTER(x))
#define KVARN_HOLD_POINTER(p) __asm__("" : "+r"(p))
#endif
