// SPDX-License-Identifier: Apache-2.0
#pragma once
// The scratch of all calls on a format: one buffer for each thread of an engine, instead of one for each function. constexpr; no memory.

#include <kvarn/base/config.hpp>  // first: it refuses older standards

#include <cstddef>

#include <kvarn/attention.hpp>
#include <kvarn/quantize.hpp>

namespace kvarn {

/// Bytes of scratch, at any alignment, that are enough for any one call of quantize_kv, dequantize_kv, attend, attend_item and combine_items
/// on this format: the largest of scratch_bytes and attention_scratch_bytes, for tasks of up to `query_rows` rows (m * r). Of several formats
/// take the largest. (choose_format is called once for a head and has choose_scratch_bytes.)
[[nodiscard]] KVARN_INLINE constexpr std::size_t call_scratch_bytes(const format& f, std::size_t query_rows) noexcept
{
    const std::size_t codec = scratch_bytes(f), attention = attention_scratch_bytes(f, query_rows);
    return codec > attention ? codec : attention;
}

}  // namespace kvarn
