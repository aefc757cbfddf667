// SPDX-License-Identifier: Apache-2.0
#pragma once
// The common calls of the library by dispatch: the same functions with the same parameters and results, for the best instruction set that
// kvarn_add_kernels (docs/building.md) built into this target and that the running processor has:
//
//     kvarn::dispatched::quantize_kv(format, keys, values, records, scratch);
//
// Views may be of any types that storage_of declares equal to the ELEMENTS of the target. Each is one dispatch: a load and a few compares.
// No allocation; thread safe. Everything has the sets of the target in its name: a program may consist of targets with different ones.

#include <kvarn/base/config.hpp>  // first: it refuses older standards

#include <cstddef>
#include <cstdint>
#include <span>

#include <kvarn/dispatch.hpp>
#include <kvarn/supports.hpp>

namespace kvarn::dispatched {

/// As kvarn's function of the same name, on the best instruction set.
/// @{

template <unsigned Built = kvarn::detail::built_archs, element T>
[[nodiscard]] KVARN_INLINE status quantize_kv(const format& f, kv_view<T> k, kv_view<T> v, record_grid<std::byte> records,
                                              std::span<std::byte> scratch, const encode_options& options = {}, record_range range = {},
                                              std::span<record_errors> errors = {}) noexcept
{
    const auto keys = kvarn::detail::as_storage(k), values = kvarn::detail::as_storage(v);
    return dispatch<Built>([&](auto arch) KVARN_LAMBDA {
        return kvarn::quantize_kv<decltype(arch)>(f, keys, values, records, scratch, options, range, errors);
    });
}

template <unsigned Built = kvarn::detail::built_archs, class Byte, element T>
[[nodiscard]] KVARN_INLINE status dequantize_kv(const format& f, record_grid<Byte> records, kv_view<T> k, kv_view<T> v, basis wanted,
                                                std::span<std::byte> scratch, record_range range = {}) noexcept
{
    const auto keys = kvarn::detail::as_storage(k), values = kvarn::detail::as_storage(v);
    return dispatch<Built>([&](auto arch) KVARN_LAMBDA {
        return kvarn::dequantize_kv<decltype(arch)>(f, records, keys, values, wanted, scratch, range);
    });
}

template <unsigned Built = kvarn::detail::built_archs>
[[nodiscard]] KVARN_INLINE status attend(const format& f, const attention_task& task, const attention_options& options,
                                         std::span<std::byte> scratch) noexcept
{
    return dispatch<Built>([&](auto arch) KVARN_LAMBDA { return kvarn::attend<decltype(arch)>(f, task, options, scratch); });
}

template <unsigned Built = kvarn::detail::built_archs>
[[nodiscard]] KVARN_INLINE status attend_item(const format& f, std::span<const attention_task> tasks, const attention_options& options,
                                              std::size_t item, std::size_t chunks_per_item, std::span<std::byte> workspace,
                                              std::span<std::byte> scratch) noexcept
{
    return dispatch<Built>([&](auto arch) KVARN_LAMBDA {
        return kvarn::attend_item<decltype(arch)>(f, tasks, options, item, chunks_per_item, workspace, scratch);
    });
}

template <unsigned Built = kvarn::detail::built_archs>
[[nodiscard]] KVARN_INLINE status combine_items(const format& f, std::span<const attention_task> tasks, const attention_options& options,
                                                std::size_t task, std::span<const std::byte> workspace, std::span<std::byte> scratch) noexcept
{
    return dispatch<Built>([&](auto arch) KVARN_LAMBDA {
        return kvarn::combine_items<decltype(arch)>(f, tasks, options, task, workspace, scratch);
    });
}

/// What the calls here run on.
template <unsigned Built = kvarn::detail::built_archs>
[[nodiscard]] KVARN_INLINE cpu_support supports(const format& f, operation what, precision wanted = precision::fine) noexcept
{
    return dispatch<Built>([&](auto arch) KVARN_LAMBDA { return kvarn::supports<decltype(arch)>(f, what, wanted); });
}

template <unsigned Built = kvarn::detail::built_archs>
[[nodiscard]] KVARN_INLINE status convert(const input_view& from, const output_view& to) noexcept
{
    return dispatch<Built>([&](auto arch) KVARN_LAMBDA { return kvarn::convert<decltype(arch)>(from, to); });
}

template <unsigned Built = kvarn::detail::built_archs, element From, element To>
[[nodiscard]] KVARN_INLINE status convert(const kv_view<From>& from, const kv_view<To>& to) noexcept
{
    return dispatch<Built>([&](auto arch) KVARN_LAMBDA { return kvarn::convert<decltype(arch)>(from, to); });
}

template <unsigned Built = kvarn::detail::built_archs, element T>
[[nodiscard]] KVARN_INLINE status rotate(kv_view<T> x) noexcept
{
    const auto vectors = kvarn::detail::as_storage(x);
    return dispatch<Built>([&](auto arch) KVARN_LAMBDA { return kvarn::rotate<decltype(arch)>(vectors); });
}

template <unsigned Built = kvarn::detail::built_archs, element T>
[[nodiscard]] KVARN_INLINE status unrotate(kv_view<T> x) noexcept
{
    const auto vectors = kvarn::detail::as_storage(x);
    return dispatch<Built>([&](auto arch) KVARN_LAMBDA { return kvarn::unrotate<decltype(arch)>(vectors); });
}

/// @}

}  // namespace kvarn::dispatched
