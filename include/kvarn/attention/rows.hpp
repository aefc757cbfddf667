// SPDX-License-Identifier: Apache-2.0
#pragma once
// The query rows of one attention call in the caller's scratch: row = new token * query heads of the group + query head.
// Sizes are padded to 16 floats, pads are zero. No allocation. Layer 4; for the rest of attention/ only.

#include <cstddef>
#include <cstdint>

#include <kvarn/attention/product.hpp>
#include <kvarn/attention/softmax.hpp>
#include <kvarn/layout/format.hpp>

namespace kvarn::detail {

/// Padded extents of a format, in floats.
struct attention_extents {
    int keys;      ///< quantized channels of K
    int exact;     ///< exact channels of K, after them
    int values;    ///< channels of the output
    int widest;    ///< of the above and of a tile's tokens

    KVARN_INLINE explicit constexpr attention_extents(const format& f) noexcept
        : keys(simd::whole_lanes(f.head_dim_k())), exact(simd::whole_lanes(f.exact_channels())),
          values(simd::whole_lanes(f.has_values() ? f.head_dim_v() : f.head_dim_k())), widest(keys)
    {
        if (values > widest) widest = values;
        if (f.group() > widest) widest = f.group();
    }
    [[nodiscard]] KVARN_INLINE constexpr int query() const noexcept { return keys + exact; }
};

inline constexpr int exact_block = 32;  // exact tokens converted to floats at a time

/// Scratch of one call, carved into aligned arrays of floats.
struct attention_rows {
    int rows;                 // query rows
    float* rotated_query;     // [rows][query], scaled, channels in the basis of the records' K
    float* original_query;    // [rows][query], scaled, original basis
    softmax_state* state;     // [rows], of the chunk at hand
    float* out;               // [rows][values], of the chunk at hand
    softmax_state* total;     // [rows], of everything merged so far
    float* total_out;         // [rows][values]
    visible_range* seen;      // [rows], of the block at hand
    float* scalars;           // K: scale, zero [keys], token scale [group]; V: channel scale [values], token scale, zero [group]
    float* keys;              // [exact_block][query]
    float* values;            // [exact_block][values]
    product_rows product;     // of most_heads rows
};

[[nodiscard]] KVARN_INLINE constexpr std::size_t attention_floats(const format& f, std::size_t rows) noexcept
{
    const attention_extents e(f);
    const auto query = static_cast<std::size_t>(e.query()), values = static_cast<std::size_t>(e.values);
    const auto widest = static_cast<std::size_t>(e.widest), group = static_cast<std::size_t>(f.group());
    const std::size_t padded_rows = (rows + 7) / 8 * 8;
    return rows * 2 * query + rows * 2 * values + padded_rows * 6 + 2 * static_cast<std::size_t>(e.keys) + values + 3 * group +
           exact_block * (query + values) + most_heads * widest * 3 + (unpacked_rows * widest + 64) / 4;
}

[[nodiscard]] KVARN_INLINE attention_rows carve_rows(const format& f, std::size_t rows, std::byte* scratch) noexcept
{
    const attention_extents e(f);
    const auto address = reinterpret_cast<std::uintptr_t>(scratch);
    float* at = reinterpret_cast<float*>(scratch + (64 - address % 64) % 64);
    const auto take = [&](std::size_t floats) KVARN_LAMBDA {
        float* const p = at;
        at += floats;
        return p;
    };
    const auto query = static_cast<std::size_t>(e.query()), values = static_cast<std::size_t>(e.values);
    const auto widest = static_cast<std::size_t>(e.widest), group = static_cast<std::size_t>(f.group());
    const std::size_t padded_rows = (rows + 7) / 8 * 8;
    attention_rows r;
    r.rows = static_cast<int>(rows);
    r.rotated_query = take(rows * query);
    r.original_query = take(rows * query);
    r.out = take(rows * values);
    r.total_out = take(rows * values);
    r.scalars = take(2 * static_cast<std::size_t>(e.keys) + values + 3 * group);
    r.keys = take(exact_block * query);
    r.values = take(exact_block * values);
    r.product.w = take(most_heads * widest);
    r.product.y = take(most_heads * widest);
    float* const rounded = take(most_heads * widest);
    r.product.words = reinterpret_cast<std::int16_t*>(rounded);
    r.product.bytes = reinterpret_cast<std::int8_t*>(rounded);
    r.product.positive_bytes = reinterpret_cast<std::uint8_t*>(rounded);
    r.product.codes = reinterpret_cast<std::uint8_t*>(take((unpacked_rows * widest + 64) / 4));
    r.product.stride = e.widest;
    r.state = reinterpret_cast<softmax_state*>(take(padded_rows * 2));
    r.total = reinterpret_cast<softmax_state*>(take(padded_rows * 2));
    r.seen = reinterpret_cast<visible_range*>(take(padded_rows * 2));
    return r;
}

/// Calls body(first row, heads) over all rows, `heads` 8, then 4, 2 or 1 for what is left.
template <class F>
KVARN_INLINE void for_row_groups(int rows, F&& body) noexcept
{
    static_assert(most_heads == 8);
    for (int row = 0, heads; row < rows; row += heads) {
        const int left = rows - row;
        heads = left >= 8 ? 8 : left >= 4 ? 4 : left >= 2 ? 2 : 1;
        body(row, heads);
    }
}

/// Whether any of the rows sees something.
[[nodiscard]] KVARN_INLINE bool any_visible(const visible_range* seen, int rows) noexcept
{
    for (int h = 0; h < rows; ++h)
        if (!seen[h].empty()) return true;
    return false;
}

}  // namespace kvarn::detail
