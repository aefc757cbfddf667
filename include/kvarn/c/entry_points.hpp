// SPDX-License-Identifier: Apache-2.0
#pragma once
// The functions that kvarn_add_kernels compiles once for each instruction set for the C interface, besides those of
// dispatch/: one list, as in dispatch/entry_points.hpp and under the same rule. Inside namespace kvarn.

#include <kvarn/base/config.hpp>  // first: it refuses older standards

#include <cstddef>
#include <cstdint>
#include <span>

#include <kvarn/c/kvarn.h>
#include <kvarn/cache/bases.hpp>
#include <kvarn/cache/choose.hpp>
#include <kvarn/cache/shift.hpp>

namespace kvarn::c {

/// A kvarn_turn as shift_positions calls it.
struct plain_turn {
    kvarn_turn turn;
    void* user;

    KVARN_INLINE void operator()(std::size_t layer, std::size_t head, const kv_view<float>& keys,
                                 std::int64_t position) const noexcept
    {
        turn(user, layer, head, keys.data, keys.tokens, keys.channels, position);
    }
};

}  // namespace kvarn::c

#define KVARN_C_ELEMENT_ENTRY_POINTS(KIND, Arch, T)                                                                              \
    KIND status add_query_moments<Arch>(const format&, kv_view<const T>, std::span<std::uint64_t>) noexcept;                     \
    KIND status add_query_moments<Arch>(const cache_pool&, std::size_t, kv_view<const T>, std::span<std::uint64_t>) noexcept;    \
    KIND result<format> choose_format<Arch>(const format&, kv_view<const T>, kv_view<const T>, std::span<const std::uint64_t>,   \
                                            std::span<std::byte>, const choose_options&) noexcept;

#define KVARN_C_ENTRY_POINTS(KIND, Arch)                                                                                         \
    KVARN_C_ELEMENT_ENTRY_POINTS(KIND, Arch, float)                                                                              \
    KVARN_C_ELEMENT_ENTRY_POINTS(KIND, Arch, half)                                                                               \
    KVARN_C_ELEMENT_ENTRY_POINTS(KIND, Arch, bfloat16)                                                                           \
    KIND result<std::size_t> choose_bases<Arch>(cache_pool&, sequence_id, std::span<const std::uint64_t>, std::span<std::byte>,  \
                                                const choose_options&) noexcept;                                                 \
    KIND result<shift_report> shift_positions<Arch>(const cache_pool&, sequence_id, std::int64_t, std::int64_t, std::int64_t,    \
                                                    const c::plain_turn&, std::span<std::byte>) noexcept;
