// SPDX-License-Identifier: Apache-2.0
#pragma once
// Errors as values: `status` names what was wrong, `result<T>` carries a value or a status.
// No exceptions, no allocation, no global state; everything here is constexpr and safe from any thread.

#include <cstdint>

#include <kvarn/base/config.hpp>

namespace kvarn {

/// What a fallible function returns. Anything but `ok` means that nothing was written.
enum class status : std::uint8_t {
    ok,
    bad_format_name,         ///< not `k<bits>v<bits>_g<group>`, with `_ko`, `_vo` or `_kovo` for the original basis
    unsupported_head_dim,    ///< outside 32..576, or no Hadamard matrix of that size is known to the library
    unsupported_bits,        ///< bits other than 2, 3, 4, 5, 6, 8 (values also 0)
    unsupported_group,       ///< tokens per tile other than 32, 64, 128, 256
    unsupported_channels,    ///< more exact channels than the library accepts
    bad_argument,            ///< an option out of range
    null_pointer,            ///< a needed buffer is missing
    shape_mismatch,          ///< sizes of the views disagree with the format or with each other
    token_count_mismatch,    ///< a view has not tiles * group tokens
    buffer_too_small,        ///< records or scratch smaller than the size functions say
    not_finite,              ///< NaN or infinity among the input
    scale_overflow,          ///< a scalar of the record would not fit a half
    out_of_memory,           ///< only from the overloads that allocate
    no_room,                 ///< a cache has no block or sequence left: others must go first
    sequence_full,           ///< a sequence has as many tokens or spans as its cache allows: nothing else going helps
    stale_handle,            ///< a sequence that was closed, or never opened
    truncated,               ///< a file or buffer ends before its content does
    corrupt,                 ///< a file or buffer whose checksum, magic or fields are wrong
    io_error,                ///< the caller's function could not read or write
    unsupported_version,     ///< a file of a version that this library does not read
    other_configuration,     ///< a saved sequence of a cache with other layers, formats or policy
};

/// One sentence for people, static storage, never null.
[[nodiscard]] KVARN_INLINE constexpr const char* message(status s) noexcept
{
    switch (s) {
    case status::ok: return "ok";
    case status::bad_format_name: return "format name is not k<bits>v<bits>_g<group>[_ko|_vo|_kovo], for example k4v2_g128";
    case status::unsupported_head_dim:
        return "head_dim must be m * 2^k with m in {1, 12, 20, 28, 36}, from 32 to 576 (without rotation: a multiple of 4)";
    case status::unsupported_bits: return "bits must be 2, 3, 4, 5, 6 or 8 (value bits also 0)";
    case status::unsupported_group: return "group must be 32, 64, 128 or 256 tokens";
    case status::unsupported_channels: return "exact_channels must be a multiple of 4, at most 256";
    case status::bad_argument: return "an option is out of range";
    case status::null_pointer: return "a buffer that is needed is null";
    case status::shape_mismatch: return "heads, channels or strides do not match the format or each other";
    case status::token_count_mismatch:
        return "a view must have exactly tiles * group tokens (full_tiles counts tiles, first_tokens shortens a view)";
    case status::buffer_too_small: return "a buffer is smaller than the format needs";
    case status::not_finite: return "input holds NaN or infinity";
    case status::scale_overflow: return "values are too large: a scale would overflow half precision";
    case status::out_of_memory: return "out of memory";
    case status::no_room: return "the cache has no block or sequence left";
    case status::sequence_full: return "the sequence has as many tokens, or spans, as the cache allows";
    case status::stale_handle: return "this sequence is not open: it was closed, or never opened";
    case status::truncated: return "data ends too early";
    case status::corrupt: return "data is damaged or not of this kind";
    case status::io_error: return "reading or writing failed";
    case status::unsupported_version: return "data is of a version that this library does not read";
    case status::other_configuration: return "the sequence was saved by a cache of another configuration";
    }
    return "unknown status";
}

/// A value or the reason why there is none. `T` is default constructible; read `value` only when `ok()`.
template <class T>
struct [[nodiscard]] result {
    T value{};
    status error = status::ok;

    KVARN_INLINE constexpr result(T v) noexcept : value(v) {}
    KVARN_INLINE constexpr result(status s) noexcept : error(s) {}

    [[nodiscard]] KVARN_INLINE constexpr bool ok() const noexcept { return error == status::ok; }
    [[nodiscard]] KVARN_INLINE constexpr explicit operator bool() const noexcept { return ok(); }
    [[nodiscard]] KVARN_INLINE constexpr const T& operator*() const noexcept { return value; }
    [[nodiscard]] KVARN_INLINE constexpr const T* operator->() const noexcept { return &value; }
};

}  // namespace kvarn
