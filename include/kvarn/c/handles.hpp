// SPDX-License-Identifier: Apache-2.0
#pragma once
// Handles of the C interface: objects of the library in the caller's memory. For the other headers of c/, which are compiled
// once (c/implementation.hpp).

#include <kvarn/base/config.hpp>  // first: it refuses older standards

#include <cstddef>
#include <cstdint>

#include <kvarn/base/status.hpp>
#include <kvarn/cache/pool.hpp>

namespace kvarn::c {

/// What handles begin with, so that another pointer is seen before it is used.
enum class handle_kind : std::uint64_t {
    attention = 0x6b7661'726e6100,
    pool = 0x6b7661'726e7000,
    layer = 0x6b7661'726e6c00,
    loader = 0x6b7661'726e6f00,
};
template <class Handle>
[[nodiscard]] KVARN_INLINE status check_handle(const Handle* handle) noexcept
{
    return handle == nullptr ? status::null_pointer : handle->kind != Handle::its_kind ? status::bad_argument : status::ok;
}

[[nodiscard]] KVARN_INLINE std::byte* aligned(void* memory) noexcept
{
    return detail::aligned_to_line(static_cast<std::byte*>(memory));
}

}  // namespace kvarn::c
