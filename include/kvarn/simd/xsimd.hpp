// SPDX-License-Identifier: Apache-2.0
#pragma once
// kernels<sse2>, kernels<avx2>, kernels<avx512>, kernels<neon64> and those derived from them: arithmetic through xsimd, and through the instruction set's own intrinsics
// where xsimd has no word for it (half conversion, transposes, code packing). Same bits as kernels<portable>.

#include <type_traits>

#include <kvarn/simd/portable.hpp>

#if defined(KVARN_HAS_SSE2) || defined(KVARN_HAS_NEON64)
// Names that windows.h makes macros of are plain functions in there.
#pragma push_macro("min")
#pragma push_macro("max")
#undef min
#undef max
#include <xsimd/xsimd.hpp>
#pragma pop_macro("min")
#pragma pop_macro("max")

namespace kvarn::simd {

/// What all instruction sets that xsimd knows share.
template <class XsimdArch>
struct xsimd_kernels {
    using reg = xsimd::batch<float, XsimdArch>;
    static constexpr int width = static_cast<int>(reg::size);

    KVARN_INLINE static reg broadcast(float x) noexcept { return reg(x); }
    KVARN_INLINE static reg load(const float* p) noexcept { return reg::load_unaligned(p); }
    KVARN_INLINE static void store(float* p, reg x) noexcept { x.store_unaligned(p); }

    KVARN_INLINE static reg add(reg a, reg b) noexcept { return pinned(a + b); }
    KVARN_INLINE static reg sub(reg a, reg b) noexcept { return pinned(a - b); }
    KVARN_INLINE static reg mul(reg a, reg b) noexcept { return pinned(a * b); }
    KVARN_INLINE static reg div(reg a, reg b) noexcept { return pinned(a / divisor(b, a)); }
    KVARN_INLINE static reg sqrt(reg a) noexcept { return pinned(xsimd::sqrt(a)); }
    KVARN_INLINE static reg fma(reg a, reg b, reg c) noexcept { return pinned(xsimd::fma(a, b, c)); }
    KVARN_INLINE static reg fnma(reg a, reg b, reg c) noexcept { return pinned(xsimd::fnma(a, b, c)); }
    KVARN_INLINE static reg code_value(reg code, reg scale, reg zero) noexcept { return fma(code, scale, zero); }
    KVARN_INLINE static reg minimum(reg a, reg b) noexcept { return (xsimd::min)(a, b); }
    KVARN_INLINE static reg maximum(reg a, reg b) noexcept { return (xsimd::max)(a, b); }
    KVARN_INLINE static reg rounded(reg a) noexcept { return sub(add(a, broadcast(12582912.0f)), broadcast(12582912.0f)); }
    KVARN_INLINE static reg where_greater(reg a, reg b, reg yes, reg no) noexcept { return xsimd::select(a > b, yes, no); }

    template <class T>
    KVARN_INLINE static std::uint32_t largest_magnitude(const T* p, std::size_t count, int rows = 1, std::ptrdiff_t stride = 0) noexcept
    {
        using bits = std::conditional_t<sizeof(T) == 2, std::uint16_t, std::uint32_t>;
        using many = xsimd::batch<bits, XsimdArch>;
        const many mask(static_cast<bits>(static_cast<bits>(~bits{0}) >> 1));
        many most(bits{0});
        const std::size_t whole = count / many::size * many::size;
        for (int row = 0; row < rows; ++row) {
            KVARN_ROLL
            for (std::size_t i = 0; i < whole; i += many::size)
                most = (xsimd::max)(most, many::load_unaligned(reinterpret_cast<const bits*>(p + row * stride + i)) & mask);
        }
        bits each[many::size];
        most.store_unaligned(each);
        std::uint32_t largest = whole == count ? 0 : kernels<portable>::largest_magnitude(p + whole, count - whole, rows, stride);
        for (const bits b : each) largest = b > largest ? b : largest;
        return largest;
    }

    KVARN_INLINE static void hold(reg& x) noexcept { KVARN_HOLD(x.data); }

protected:
    KVARN_INLINE static reg divisor(reg b, reg a) noexcept
    {
        KVARN_PIN_WITH(b.data, a.data);
        return b;
    }
    KVARN_INLINE static reg pinned(reg x) noexcept
    {
        KVARN_PIN(x.data);
        return x;
    }
};

}  // namespace kvarn::simd

#if defined(KVARN_HAS_SSE2)
#include <kvarn/simd/sse2.hpp>
#endif
#if defined(KVARN_HAS_AVX2)
#include <kvarn/simd/x86.hpp>
#endif
#if defined(KVARN_HAS_NEON64)
#include <kvarn/simd/neon.hpp>
#endif
#endif
