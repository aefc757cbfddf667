// SPDX-License-Identifier: Apache-2.0
#pragma once
// quantize_kv and dequantize_kv for callers who do not care about scratch: the same functions without that argument.
// They allocate scratch per call (without throwing) and free it; everything else as in quantize.hpp.

#include <kvarn/base/config.hpp>  // first: it refuses older standards

#include <cstddef>
#include <memory>
#include <new>
#include <span>

#include <kvarn/quantize.hpp>

namespace kvarn {

/// quantize_kv with its own scratch. Further error: out_of_memory.
template <class Arch = simd::native_arch, element T>
[[nodiscard]] status quantize_kv(const format& f, kv_view<T> k, kv_view<T> v, record_grid<std::byte> records,
                                 const encode_options& options = {}, record_range range = {},
                                 std::span<record_errors> errors = {}) noexcept
{
    const std::size_t bytes = scratch_bytes(f);
    const std::unique_ptr<std::byte[]> scratch(new (std::nothrow) std::byte[bytes]);
    if (!scratch) return status::out_of_memory;
    return quantize_kv<Arch>(f, k, v, records, {scratch.get(), bytes}, options, range, errors);
}

/// dequantize_kv with its own scratch. Further error: out_of_memory.
template <class Arch = simd::native_arch, class Byte, element T>
[[nodiscard]] status dequantize_kv(const format& f, record_grid<Byte> records, kv_view<T> k, kv_view<T> v, basis wanted,
                                   record_range range = {}) noexcept
{
    const std::size_t bytes = scratch_bytes(f);
    const std::unique_ptr<std::byte[]> scratch(new (std::nothrow) std::byte[bytes]);
    if (!scratch) return status::out_of_memory;
    return dequantize_kv<Arch>(f, records, k, v, wanted, {scratch.get(), bytes}, range);
}

}  // namespace kvarn
