// SPDX-License-Identifier: Apache-2.0
#pragma once
// The functions that kvarn_add_kernels compiles once for each instruction set: one list, instantiated by the generated files
// (KVARN_ENTRY_POINTS(template, Arch)) and declared by dispatch.hpp (KVARN_ENTRY_POINTS(extern template, Arch)), both inside
// namespace kvarn. Which element types belong to it is said by KVARN_KERNELS_FLOAT, KVARN_KERNELS_HALF and
// KVARN_KERNELS_BFLOAT16, which kvarn_add_kernels defines for the whole target.
//
// What is listed here must be a plain function template: neither inline nor constexpr, and without a deduced return type.
// Otherwise a file compiled for the lowest processor would instantiate it, although it has no kernels for the higher ones.

#include <kvarn/base/config.hpp>  // first: it refuses older standards

#include <cstddef>
#include <cstdint>
#include <span>

#include <kvarn/attention.hpp>
#include <kvarn/codec/packing.hpp>
#include <kvarn/convert.hpp>
#include <kvarn/quantize.hpp>
#include <kvarn/rotate/hadamard.hpp>

/// Bit streams have no element type, conversions run-time ones.
#define KVARN_PACKING_ENTRY_POINTS(KIND, Arch)                                                                                 \
    KIND status convert<Arch>(const input_view&, const output_view&) noexcept;                                                 \
    KIND status pack_codes<Arch>(int, const std::uint8_t*, std::size_t, std::uint8_t*) noexcept;                               \
    KIND status unpack_codes<Arch>(int, const std::uint8_t*, std::size_t, std::uint8_t*) noexcept;

/// Decode attention on records: element types are run-time values.
#define KVARN_ATTENTION_ENTRY_POINTS(KIND, Arch)                                                                               \
    KIND status attend<Arch>(const format&, const attention_task&, const attention_options&, std::span<std::byte>) noexcept;   \
    KIND status attend_item<Arch>(const format&, std::span<const attention_task>, const attention_options&, std::size_t,       \
                                  std::size_t, std::span<std::byte>, std::span<std::byte>) noexcept;                           \
    KIND status combine_items<Arch>(const format&, std::span<const attention_task>, const attention_options&, std::size_t,     \
                                    std::span<const std::byte>, std::span<std::byte>) noexcept;

/// Tiles to records and back, rotation: for one element type.
#define KVARN_TILE_ENTRY_POINTS(KIND, Arch, T)                                                                                 \
    KIND status quantize_kv<Arch>(const format&, kv_view<T>, kv_view<T>, record_grid<std::byte>, std::span<std::byte>,         \
                                  const encode_options&, record_range, std::span<record_errors>) noexcept;                     \
    KIND status quantize_kv<Arch>(const format&, kv_view<const T>, kv_view<const T>, record_grid<std::byte>,                   \
                                  std::span<std::byte>, const encode_options&, record_range,                                   \
                                  std::span<record_errors>) noexcept;                                                          \
    KIND status dequantize_kv<Arch>(const format&, record_grid<std::byte>, kv_view<T>, kv_view<T>, basis,                      \
                                    std::span<std::byte>, record_range) noexcept;                                              \
    KIND status dequantize_kv<Arch>(const format&, record_grid<const std::byte>, kv_view<T>, kv_view<T>, basis,                \
                                    std::span<std::byte>, record_range) noexcept;                                              \
    KIND status rotate<Arch>(kv_view<T>) noexcept;                                                                             \
    KIND status unrotate<Arch>(kv_view<T>) noexcept;

#if defined(KVARN_KERNELS_FLOAT)
#define KVARN_FLOAT_ENTRY_POINTS(KIND, Arch) KVARN_TILE_ENTRY_POINTS(KIND, Arch, float)
#else
#define KVARN_FLOAT_ENTRY_POINTS(KIND, Arch)
#endif
#if defined(KVARN_KERNELS_HALF)
#define KVARN_HALF_ENTRY_POINTS(KIND, Arch) KVARN_TILE_ENTRY_POINTS(KIND, Arch, half)
#else
#define KVARN_HALF_ENTRY_POINTS(KIND, Arch)
#endif
#if defined(KVARN_KERNELS_BFLOAT16)
#define KVARN_BFLOAT16_ENTRY_POINTS(KIND, Arch) KVARN_TILE_ENTRY_POINTS(KIND, Arch, bfloat16)
#else
#define KVARN_BFLOAT16_ENTRY_POINTS(KIND, Arch)
#endif

/// The whole list for one instruction set; KIND is `template` or `extern template`.
#define KVARN_ENTRY_POINTS(KIND, Arch)                                                                                         \
    KVARN_PACKING_ENTRY_POINTS(KIND, Arch)                                                                                     \
    KVARN_ATTENTION_ENTRY_POINTS(KIND, Arch)                                                                                   \
    KVARN_FLOAT_ENTRY_POINTS(KIND, Arch)                                                                                       \
    KVARN_HALF_ENTRY_POINTS(KIND, Arch)                                                                                        \
    KVARN_BFLOAT16_ENTRY_POINTS(KIND, Arch)
