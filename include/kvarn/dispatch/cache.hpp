// SPDX-License-Identifier: Apache-2.0
#pragma once
// The cache's calls by dispatch, as dispatch/calls.hpp has the library's: what looks at values runs on the best instruction set
// that kvarn_add_kernels(<target> ... CACHE) built into this target and that the running processor has. Everything else of a
// cache is the same on all of them. No allocation; threads as in the headers of cache/.

#include <kvarn/base/config.hpp>  // first: it refuses older standards

#include <cstddef>
#include <cstdint>
#include <span>

#include <kvarn/dispatch.hpp>
#include <kvarn/dispatch/cache_entry_points.hpp>

#if defined(KVARN_HAS_KERNELS) && !defined(KVARN_KERNELS_CACHE)
#error "kvarn: this target's kernels are without those of a cache: add CACHE to its kvarn_add_kernels"
#endif

namespace kvarn {

#if defined(KVARN_KERNELS_PORTABLE)
KVARN_CACHE_ENTRY_POINTS(extern template, simd::portable)
#endif
#if defined(KVARN_KERNELS_NEON64)
KVARN_CACHE_ENTRY_POINTS(extern template, simd::neon64)
#endif
#if defined(KVARN_KERNELS_NEON64DOT)
KVARN_CACHE_ENTRY_POINTS(extern template, simd::neon64dot)
#endif
#if defined(KVARN_KERNELS_SSE2)
KVARN_CACHE_ENTRY_POINTS(extern template, simd::sse2)
#endif
#if defined(KVARN_KERNELS_AVX2)
KVARN_CACHE_ENTRY_POINTS(extern template, simd::avx2)
#endif
#if defined(KVARN_KERNELS_AVXVNNI)
KVARN_CACHE_ENTRY_POINTS(extern template, simd::avxvnni)
#endif
#if defined(KVARN_KERNELS_AVX512)
KVARN_CACHE_ENTRY_POINTS(extern template, simd::avx512)
#endif
#if defined(KVARN_KERNELS_AVX512VNNI)
KVARN_CACHE_ENTRY_POINTS(extern template, simd::avx512vnni)
#endif

namespace dispatched {

/// As kvarn's function of the same name, or that of layer_items, on the best instruction set.
/// @{

template <unsigned Built = kvarn::detail::built_archs>
[[nodiscard]] KVARN_INLINE status store(const cache_pool& pool, sequence_id id, std::size_t layer, const input_view& k,
                                        const input_view& v, std::size_t first_draft = 0, std::size_t first_head = 0) noexcept
{
    return dispatch<Built>(
        [&](auto arch) KVARN_LAMBDA { return kvarn::store<decltype(arch)>(pool, id, layer, k, v, first_draft, first_head); });
}

template <unsigned Built = kvarn::detail::built_archs>
[[nodiscard]] KVARN_INLINE status read(const cache_pool& pool, sequence_id id, std::size_t layer, std::size_t head,
                                       std::int64_t begin, std::int64_t end, const output_view& k, const output_view& v,
                                       std::span<std::byte> scratch) noexcept
{
    return dispatch<Built>(
        [&](auto arch) KVARN_LAMBDA { return kvarn::read<decltype(arch)>(pool, id, layer, head, begin, end, k, v, scratch); });
}

template <unsigned Built = kvarn::detail::built_archs>
[[nodiscard]] KVARN_INLINE status seal_item(const cache_pool& pool, std::size_t item, std::span<std::byte> scratch) noexcept
{
    return dispatch<Built>([&](auto arch) KVARN_LAMBDA { return kvarn::seal_item<decltype(arch)>(pool, item, scratch); });
}

template <unsigned Built = kvarn::detail::built_archs>
[[nodiscard]] KVARN_INLINE result<seal_report> seal(const cache_pool& pool, sequence_id id, std::span<std::byte> scratch,
                                                    std::size_t most = SIZE_MAX) noexcept
{
    return dispatch<Built>([&](auto arch) KVARN_LAMBDA { return kvarn::seal<decltype(arch)>(pool, id, scratch, most); });
}

template <unsigned Built = kvarn::detail::built_archs>
[[nodiscard]] KVARN_INLINE status store_item(const layer_items& items, std::size_t item) noexcept
{
    return dispatch<Built>([&](auto arch) KVARN_LAMBDA { return items.store_item<decltype(arch)>(item); });
}
template <unsigned Built = kvarn::detail::built_archs>
[[nodiscard]] KVARN_INLINE status attend_item(const layer_items& items, std::size_t item, std::span<std::byte> scratch) noexcept
{
    return dispatch<Built>([&](auto arch) KVARN_LAMBDA { return items.attend_item<decltype(arch)>(item, scratch); });
}
template <unsigned Built = kvarn::detail::built_archs>
[[nodiscard]] KVARN_INLINE status finish_item(const layer_items& items, std::size_t item, std::span<std::byte> scratch) noexcept
{
    return dispatch<Built>([&](auto arch) KVARN_LAMBDA { return items.finish_item<decltype(arch)>(item, scratch); });
}
template <unsigned Built = kvarn::detail::built_archs>
[[nodiscard]] KVARN_INLINE status run(const layer_items& items, std::span<std::byte> scratch) noexcept
{
    return dispatch<Built>([&](auto arch) KVARN_LAMBDA { return items.run<decltype(arch)>(scratch); });
}

/// @}

}  // namespace dispatched
}  // namespace kvarn
