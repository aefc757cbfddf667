// SPDX-License-Identifier: Apache-2.0
#pragma once
// One binary for many processors. In: a function of an architecture tag. Out: its result for the best instruction set that
// kvarn_add_kernels (docs/building.md) built into this target and that the running processor has:
//
//     kvarn::dispatch([&](auto arch) { return kvarn::quantize_kv<decltype(arch)>(format, keys, values, records, scratch); });
//
// Include it in files compiled for the lowest processor that you support; the functions of dispatch/entry_points.hpp are
// only declared here. In a target without kvarn_add_kernels the one set is simd::native_arch, and nothing changes.
// The set is chosen at the first call and kept in a constant-initialised atomic: no lock, no allocation, thread safe, and
// safe before main. Dispatch costs a load and a few compares: once for a call over many tiles, not once for a tile.

#include <atomic>
#include <cstring>
#include <string_view>

#include <kvarn/base/status.hpp>
#include <kvarn/dispatch/cpu.hpp>
#include <kvarn/dispatch/entry_points.hpp>

#if defined(KVARN_KERNELS_PORTABLE) || defined(KVARN_KERNELS_NEON64) || defined(KVARN_KERNELS_NEON64DOT) || \
    defined(KVARN_KERNELS_SSE2) || defined(KVARN_KERNELS_AVX2) || defined(KVARN_KERNELS_AVXVNNI) || \
    defined(KVARN_KERNELS_AVX512) || defined(KVARN_KERNELS_AVX512VNNI)
#define KVARN_HAS_KERNELS 1
#if !defined(KVARN_KERNELS_PORTABLE) && !(defined(KVARN_KERNELS_NEON64) && defined(KVARN_HAS_NEON64)) && \
    !(defined(KVARN_KERNELS_NEON64DOT) && defined(KVARN_HAS_NEON64DOT)) && !(defined(KVARN_KERNELS_SSE2) && defined(KVARN_HAS_SSE2)) && \
    !(defined(KVARN_KERNELS_AVX2) && defined(KVARN_HAS_AVX2)) && !(defined(KVARN_KERNELS_AVXVNNI) && defined(KVARN_HAS_AVXVNNI)) && \
    !(defined(KVARN_KERNELS_AVX512) && defined(KVARN_HAS_AVX512)) && \
    !(defined(KVARN_KERNELS_AVX512VNNI) && defined(KVARN_HAS_AVX512VNNI))
#error "kvarn: this file may run on a processor that has none of the instruction sets given to kvarn_add_kernels. Add \
`portable` (on x86 `sse2`) to its ARCHS, or compile this file for the lowest of them."
#endif
#endif

namespace kvarn {

#if defined(KVARN_KERNELS_PORTABLE)
KVARN_ENTRY_POINTS(extern template, simd::portable)
#endif
#if defined(KVARN_KERNELS_NEON64)
KVARN_ENTRY_POINTS(extern template, simd::neon64)
#endif
#if defined(KVARN_KERNELS_NEON64DOT)
KVARN_ENTRY_POINTS(extern template, simd::neon64dot)
#endif
#if defined(KVARN_KERNELS_SSE2)
KVARN_ENTRY_POINTS(extern template, simd::sse2)
#endif
#if defined(KVARN_KERNELS_AVX2)
KVARN_ENTRY_POINTS(extern template, simd::avx2)
#endif
#if defined(KVARN_KERNELS_AVXVNNI)
KVARN_ENTRY_POINTS(extern template, simd::avxvnni)
#endif
#if defined(KVARN_KERNELS_AVX512)
KVARN_ENTRY_POINTS(extern template, simd::avx512)
#endif
#if defined(KVARN_KERNELS_AVX512VNNI)
KVARN_ENTRY_POINTS(extern template, simd::avx512vnni)
#endif

namespace detail {

/// The sets of this target. Everything below has them in its name: a program may consist of targets with different ones.
constexpr unsigned built_archs = 0
#if defined(KVARN_KERNELS_PORTABLE)
                                 | arch_bit<simd::portable>
#endif
#if defined(KVARN_KERNELS_NEON64)
                                 | arch_bit<simd::neon64>
#endif
#if defined(KVARN_KERNELS_NEON64DOT)
                                 | arch_bit<simd::neon64dot>
#endif
#if defined(KVARN_KERNELS_SSE2)
                                 | arch_bit<simd::sse2>
#endif
#if defined(KVARN_KERNELS_AVX2)
                                 | arch_bit<simd::avx2>
#endif
#if defined(KVARN_KERNELS_AVXVNNI)
                                 | arch_bit<simd::avxvnni>
#endif
#if defined(KVARN_KERNELS_AVX512)
                                 | arch_bit<simd::avx512>
#endif
#if defined(KVARN_KERNELS_AVX512VNNI)
                                 | arch_bit<simd::avx512vnni>
#endif
#if !defined(KVARN_HAS_KERNELS)
                                 | arch_bit<simd::native_arch>
#endif
    ;

/// The bit of the set that dispatch uses; 0: not chosen yet.
template <unsigned Built>
inline constinit std::atomic<unsigned> active_arch{0};

/// Calls f(Arch{}) if Arch belongs to `set`.
template <unsigned Built, class Arch, class F>
KVARN_INLINE void call_if(unsigned set, F& f)
{
    if constexpr ((Built & arch_bit<Arch>) != 0)
        if ((set & arch_bit<Arch>) != 0) f(Arch{});
}

/// Calls f for each of `set`, lowest first.
template <unsigned Built, class F>
KVARN_INLINE void for_each_of(unsigned set, F&& f)
{
    call_if<Built, simd::portable>(set, f);
    call_if<Built, simd::neon64>(set, f);
    call_if<Built, simd::neon64dot>(set, f);
    call_if<Built, simd::sse2>(set, f);
    call_if<Built, simd::avx2>(set, f);
    call_if<Built, simd::avxvnni>(set, f);
    call_if<Built, simd::avx512>(set, f);
    call_if<Built, simd::avx512vnni>(set, f);
}

/// The sets of this target that run on this machine. Where it denies all of them, the lowest one: this very file needs that.
template <unsigned Built>
KVARN_INLINE unsigned usable_archs() noexcept
{
    const unsigned usable = Built & machine_arch_bits();
    return usable != 0 ? usable : Built & (~Built + 1u);
}

template <unsigned Built>
KVARN_INLINE unsigned active_arch_bit() noexcept
{
    unsigned active = active_arch<Built>.load(std::memory_order_relaxed);
    if (active != 0) [[likely]] return active;
    unsigned best = 0;
    for_each_of<Built>(usable_archs<Built>(), [&](auto arch) KVARN_LAMBDA { best = arch_bit<decltype(arch)>; });
    // Another thread finds the same set; one that was selected meanwhile stays.
    return active_arch<Built>.compare_exchange_strong(active, best, std::memory_order_relaxed) ? best : active;
}

/// Calls f with the tag of `active`, the first or one of the others; the last one that was built needs no question.
template <unsigned Built, class Arch, class... Others, class F>
KVARN_INLINE decltype(auto) call_active([[maybe_unused]] unsigned active, F& f)
{
    if constexpr ((Built & arch_bit<Arch>) == 0) {
        return call_active<Built, Others...>(active, f);
    } else if constexpr ((Built & (0u | ... | arch_bit<Others>)) == 0) {
        return f(Arch{});
    } else {
        if (active == arch_bit<Arch>) return f(Arch{});
        return call_active<Built, Others...>(active, f);
    }
}

/// In C: what the standard library does not inline here would be shared with files compiled for other instruction sets.
KVARN_INLINE bool same_name(std::string_view a, const char* b) noexcept
{
    return a.size() == std::strlen(b) && std::memcmp(a.data(), b, a.size()) == 0;
}

}  // namespace detail

/// Calls f(Arch{}) once, with the tag of the active instruction set, and returns what it returns: for each tag the same type.
/// Inside f, call the functions of dispatch/entry_points.hpp with that tag as their first template argument, on views of the
/// element types that kvarn_add_kernels was given (float, half, bfloat16 themselves: cast pointers to types of your own).
template <unsigned Built = detail::built_archs, class F>
KVARN_INLINE decltype(auto) dispatch(F&& f)
{
    return detail::call_active<Built, simd::avx512vnni, simd::avx512, simd::avxvnni, simd::avx2, simd::sse2, simd::neon64dot, simd::neon64, simd::portable>(
        detail::active_arch_bit<Built>(), f);
}

/// The name of the active instruction set: portable, neon64, neon64dot, sse2, avx2, avxvnni, avx512 or avx512vnni.
template <unsigned Built = detail::built_archs>
[[nodiscard]] KVARN_INLINE const char* active_arch_name() noexcept
{
    return dispatch<Built>([](auto arch) KVARN_LAMBDA { return simd::arch_traits<decltype(arch)>::name; });
}

/// Calls f(Arch{}) for each set that dispatch could use here, the slowest first. For self-checks and tests.
template <unsigned Built = detail::built_archs, class F>
KVARN_INLINE void for_each_arch(F&& f)
{
    detail::for_each_of<Built>(detail::usable_archs<Built>(), f);
}

/// Makes `name` the active instruction set of this target, for all threads, from the next dispatch on. For tests, and for
/// engines with an option for it. Error, nothing changes: bad_argument (unknown, not built, or not on this processor).
template <unsigned Built = detail::built_archs>
[[nodiscard]] KVARN_INLINE status select_arch(std::string_view name) noexcept
{
    unsigned found = 0;
    for_each_arch<Built>([&](auto arch) KVARN_LAMBDA {
        if (detail::same_name(name, simd::arch_traits<decltype(arch)>::name)) found = detail::arch_bit<decltype(arch)>;
    });
    if (found == 0) return status::bad_argument;
    detail::active_arch<Built>.store(found, std::memory_order_relaxed);
    return status::ok;
}

}  // namespace kvarn
