// SPDX-License-Identifier: Apache-2.0
#pragma once
// The floating-point environment of a call: round to nearest, subnormals kept. Engines often run with flush-to-zero; a
// record must not depend on that. Public entry points hold one guard; it restores the caller's settings on return.

#include <cstdint>

#include <kvarn/base/config.hpp>

#if defined(__SSE__)
#include <xmmintrin.h>
#elif !defined(__aarch64__)
#include <cfenv>
#endif

namespace kvarn::simd {

/// Sets the default environment for its lifetime. A few cycles; per thread.
class float_environment {
public:
#if defined(__SSE__)
    KVARN_INLINE float_environment() noexcept : saved_(_mm_getcsr()) { _mm_setcsr((saved_ & 0x3fu) | 0x1f80u); }
    KVARN_INLINE ~float_environment() { _mm_setcsr(saved_); }
#elif defined(__aarch64__)
    KVARN_INLINE float_environment() noexcept
    {
        __asm__ volatile("mrs %0, fpcr" : "=r"(saved_));
        __asm__ volatile("msr fpcr, %0" : : "r"(std::uint64_t{0}) : "memory");
    }
    KVARN_INLINE ~float_environment() { __asm__ volatile("msr fpcr, %0" : : "r"(saved_) : "memory"); }
#else
    KVARN_INLINE float_environment() noexcept
    {
        std::fegetenv(&saved_);
        std::fesetenv(FE_DFL_ENV);
    }
    KVARN_INLINE ~float_environment() { std::fesetenv(&saved_); }
#endif
    float_environment(const float_environment&) = delete;
    float_environment& operator=(const float_environment&) = delete;

private:
#if defined(__SSE__)
    unsigned saved_;
#elif defined(__aarch64__)
    std::uint64_t saved_;
#else
    std::fenv_t saved_;
#endif
};

}  // namespace kvarn::simd
