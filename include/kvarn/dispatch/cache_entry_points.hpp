// SPDX-License-Identifier: Apache-2.0
#pragma once
// The functions of a cache that kvarn_add_kernels compiles once for each instruction set where it is told CACHE: one list, as in
// dispatch/entry_points.hpp and under the same rule. Inside namespace kvarn.

#include <kvarn/base/config.hpp>  // first: it refuses older standards

#include <cstddef>
#include <cstdint>
#include <span>

#include <kvarn/cache/seal.hpp>
#include <kvarn/cache/tasks.hpp>
#include <kvarn/cache/tokens.hpp>

#define KVARN_CACHE_ENTRY_POINTS(KIND, Arch)                                                                                   \
    KIND status store<Arch>(const cache_pool&, sequence_id, std::size_t, const input_view&, const input_view&, std::size_t,    \
                            std::size_t) noexcept;                                                                             \
    KIND status read<Arch>(const cache_pool&, sequence_id, std::size_t, std::size_t, std::int64_t, std::int64_t,               \
                           const output_view&, const output_view&, std::span<std::byte>) noexcept;                             \
    KIND status seal_item<Arch>(const cache_pool&, std::size_t, std::span<std::byte>) noexcept;                                \
    KIND result<seal_report> seal<Arch>(const cache_pool&, sequence_id, std::span<std::byte>, std::size_t) noexcept;           \
    KIND status layer_items::store_item<Arch>(std::size_t) const noexcept;                                                     \
    KIND status layer_items::attend_item<Arch>(std::size_t, std::span<std::byte>) const noexcept;                              \
    KIND status layer_items::finish_item<Arch>(std::size_t, std::span<std::byte>) const noexcept;                              \
    KIND status layer_items::run<Arch>(std::span<std::byte>) const noexcept;
