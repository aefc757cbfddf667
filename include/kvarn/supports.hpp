// SPDX-License-Identifier: Apache-2.0
#pragma once
// What a call with a format runs on, and about how fast: for an engine's plan and its log. In: a format, an operation, a precision.
// Out: the instruction set, the arithmetic of the products, and the time beside the fastest case. constexpr; no memory.
// Every format runs on every instruction set, with all element types: nothing is refused. (CUDA: cuda/support.cuh.)

#include <kvarn/base/config.hpp>  // first: it refuses older standards

#include <cstdint>

#include <kvarn/attention.hpp>
#include <kvarn/base/extent.hpp>

namespace kvarn {

/// quantize_kv, dequantize_kv, and attention.
enum class operation : std::uint8_t { seal, dequantize, attend };

/// The answer of `supports`.
struct cpu_support {
    const char* arch = "";      ///< instruction set: portable, sse2, avx2, avxvnni, avx512, avx512vnni, neon64, neon64dot
    bool fixed_bounds = false;  ///< head_dim and group are 64, 128 or 256: loops over a tile have compile-time bounds
    /// Of the products with the codes of K and of V, when attending: where the shape does not allow what was asked for, the next more
    /// precise one.
    precision keys = precision::exact, values = precision::exact;
    /// About how many times as long an element takes as on avx2 at head_dim 128 (attention there: `fine`). To within a factor of two:
    /// docs/performance.md has figures. 0: not measured on such a processor.
    float time = 0.0f;
};

namespace detail {

[[nodiscard]] KVARN_INLINE constexpr precision precision_of(product_kind kind) noexcept
{
    return kind == product_kind::exact ? precision::exact : kind == product_kind::words ? precision::fine : precision::fast;
}

/// Times of an operation beside avx2: attention with rounded weights, and in float.
struct arch_times {
    float seal, dequantize, rounded, exact;
};

/// Measured on Zen 4 with GCC 12, half input, head_dim 128, one to four query heads.
template <class Arch>
inline constexpr arch_times times_of{};
template <> inline constexpr arch_times times_of<simd::portable>{30.0f, 12.0f, 8.0f, 120.0f};
template <> inline constexpr arch_times times_of<simd::sse2>{13.0f, 4.0f, 4.5f, 45.0f};
template <> inline constexpr arch_times times_of<simd::avx2>{1.0f, 1.0f, 1.0f, 2.5f};
template <> inline constexpr arch_times times_of<simd::avx512>{0.85f, 0.9f, 1.0f, 2.2f};
template <> inline constexpr arch_times times_of<simd::avx512vnni>{0.85f, 0.9f, 0.8f, 2.2f};

}  // namespace detail

/// What `what` on tiles of this format takes on Arch.
template <class Arch = simd::native_arch>
[[nodiscard]] KVARN_INLINE constexpr cpu_support supports(const format& f, operation what, precision wanted = precision::fine) noexcept
{
    constexpr detail::arch_times times = detail::times_of<Arch>;
    cpu_support s;
    s.arch = simd::arch_traits<Arch>::name;
    s.fixed_bounds = detail::is_common_extent(f.head_dim_k()) && detail::is_common_extent(f.group()) &&
                     (!f.has_values() || detail::is_common_extent(f.head_dim_v()));
    s.time = what == operation::seal ? times.seal : times.dequantize;
    if (what == operation::attend) {
        const detail::tile_products products = detail::products_of(f, wanted);
        s.keys = detail::precision_of(products.keys);
        s.values = detail::precision_of(products.values);
        const auto time = [&](precision p) KVARN_LAMBDA { return p == precision::exact ? times.exact : times.rounded; };
        s.time = (time(s.keys) + time(s.values)) * 0.5f;
    }
    if (!s.fixed_bounds) s.time *= 1.4f;
    return s;
}

}  // namespace kvarn
