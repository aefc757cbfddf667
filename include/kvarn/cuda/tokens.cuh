// SPDX-License-Identifier: Apache-2.0
#pragma once
// Where exact tokens and records lie in device memory: plain structs over the engine's pointers, nothing owned, nothing copied.
// Tokens are [token][head][channel] with contiguous channels, dense, strided, or in pages that a block table names.

#include <cstddef>
#include <cstdint>

#include <kvarn/base/status.hpp>
#include <kvarn/cuda/arithmetic.cuh>
#include <kvarn/layout/record.hpp>

namespace kvarn::cuda {

/// The type of tokens, queries and outputs.
enum class element_type : std::uint8_t { f32, f16, bf16 };

/// Bytes of one element.
[[nodiscard]] KVARN_HOST_DEVICE KVARN_INLINE constexpr int element_bytes(element_type type) noexcept
{
    return type == element_type::f32 ? 4 : 2;
}

/// Exact K or V tokens of tiles. Without a table, token t of tile i is token i * group + t, at
/// data + token * token_stride + head * head_stride. With one, a tile is group / page_tokens pages, and its page p lies at
/// data + table[i * (group / page_tokens) + p] * page_stride. Strides count elements; channels are contiguous.
/// data is 16-byte aligned, and so is every stride's number of bytes. A negative page leaves the whole tile out (K and V
/// each by its own table).
template <class Void>
struct token_tiles {
    Void* data = nullptr;
    element_type type = element_type::f16;
    std::ptrdiff_t token_stride = 0;
    std::ptrdiff_t head_stride = 0;
    const std::int32_t* table = nullptr;  ///< device memory, or null
    int page_tokens = 0;                  ///< divides group
    std::ptrdiff_t page_stride = 0;
};

using input_tiles = token_tiles<const void>;  ///< what is read
using output_tiles = token_tiles<void>;       ///< what is written

/// Records of tiles: (tile i, head h) at data + (table ? table[i] : i) * tile_stride + h * head_stride bytes. data and strides
/// are multiples of 8. A negative table entry leaves the tile out, so that a captured graph may run with fewer tiles than it was
/// made for. Bytes from a record's content to record_bytes are set to zero when it is written.
template <class Byte>
struct record_tiles {
    Byte* data = nullptr;
    std::size_t tile_stride = 0;
    std::size_t head_stride = 0;
    std::size_t record_bytes = 0;
    const std::int32_t* table = nullptr;  ///< device memory, or null
};

namespace detail {

/// body(a value of the element type).
template <class Body>
KVARN_DEVICE KVARN_INLINE void with_element(element_type type, Body&& body) noexcept
{
    if (type == element_type::f16)
        body(half{});
    else if (type == element_type::bf16)
        body(bfloat16{});
    else
        body(0.0f);
}

/// Where token 0 of a piece of a tile lies, and how far the next ones are; null if the tile is left out. The piece lies in one
/// page.
template <class T, class Void>
KVARN_DEVICE KVARN_INLINE T* token_at(const token_tiles<Void>& x, int group, int tile, int token, int head) noexcept
{
    T* const data = static_cast<T*>(x.data) + head * x.head_stride;
    if (x.table == nullptr) return data + (static_cast<std::ptrdiff_t>(tile) * group + token) * x.token_stride;
    const int page = token / x.page_tokens;
    const std::ptrdiff_t at = x.table[static_cast<std::ptrdiff_t>(tile) * (group / x.page_tokens) + page];
    return data + at * x.page_stride + (token - page * x.page_tokens) * x.token_stride;
}

/// Whether a tile has a negative page.
template <class Void>
KVARN_DEVICE KVARN_INLINE bool is_left_out(const token_tiles<Void>& x, int group, int tile) noexcept
{
    if (x.table == nullptr) return false;
    const int pages = group / x.page_tokens;
    for (int p = 0; p < pages; ++p)
        if (x.table[static_cast<std::ptrdiff_t>(tile) * pages + p] < 0) return true;
    return false;
}

/// The record's address, or null if the tile is left out.
template <class Byte>
KVARN_DEVICE KVARN_INLINE Byte* record_at(const record_tiles<Byte>& x, int tile, int head) noexcept
{
    const std::int64_t slot = x.table != nullptr ? x.table[tile] : tile;
    return slot < 0 ? nullptr
                    : x.data + static_cast<std::size_t>(slot) * x.tile_stride + static_cast<std::size_t>(head) * x.head_stride;
}

[[nodiscard]] KVARN_INLINE bool is_aligned(const void* p, std::size_t to) noexcept
{
    return reinterpret_cast<std::uintptr_t>(p) % to == 0;
}

/// What a launch refuses of tokens: null_pointer, bad_argument (alignment, page size, element type).
template <class Void>
[[nodiscard]] KVARN_INLINE status check_tokens(const token_tiles<Void>& x, int group) noexcept
{
    if (x.data == nullptr) return status::null_pointer;
    if (x.type > element_type::bf16) return status::bad_argument;
    const std::ptrdiff_t whole = 16 / element_bytes(x.type);
    if (!is_aligned(x.data, 16) || x.token_stride % whole != 0 || x.head_stride % whole != 0) return status::bad_argument;
    if (x.table == nullptr) return status::ok;
    if (x.page_tokens <= 0 || group % x.page_tokens != 0 || x.page_stride % whole != 0) return status::bad_argument;
    return status::ok;
}

/// The same of records: null_pointer, bad_argument (alignment), shape_mismatch (records that would overlap).
template <class Byte>
[[nodiscard]] KVARN_INLINE status check_records(const format& f, const record_tiles<Byte>& x, int tiles, int heads) noexcept
{
    if (x.data == nullptr) return status::null_pointer;
    if (!is_aligned(x.data, 8) || x.tile_stride % 8 != 0 || x.head_stride % 8 != 0 || x.record_bytes % 8 != 0)
        return status::bad_argument;
    const std::size_t content = layout_of(f).content_bytes, owned = x.record_bytes > content ? x.record_bytes : content;
    if ((heads > 1 && x.head_stride < owned) || (tiles > 1 && x.tile_stride < owned)) return status::shape_mismatch;
    return status::ok;
}

}  // namespace detail
}  // namespace kvarn::cuda
