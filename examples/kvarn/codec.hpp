// SPDX-License-Identifier: Apache-2.0
#pragma once
// quantize_kv and dequantize_kv over all cores: threads take work items (tile * heads + head) from one counter, each with
// its own scratch. Records are a pure function of the values, so the bytes do not depend on the number of threads.

#include <algorithm>
#include <cstddef>
#include <span>
#include <string>
#include <vector>

#include <kvarn/kvarn.hpp>

#include "../common/failure.hpp"
#include "../common/npy.hpp"
#include "../common/threads.hpp"

namespace kvarn_cli {

/// Quantizes views of whole tiles into dense tile-major records.
template <class T>
[[nodiscard]] kvarn::status encode(const kvarn::format& f, kvarn::kv_view<T> k, kvarn::kv_view<T> v,
                                   std::vector<std::byte>& records, kvarn::record_stride stride,
                                   const kvarn::encode_options& options, unsigned threads)
{
    const std::size_t tiles = kvarn::full_tiles(f, k.tokens);
    records.assign(kvarn::grid_bytes(f, tiles, k.heads, stride), std::byte{0});
    if (tiles == 0) return kvarn::status::ok;
    const auto grid = kvarn::tile_major_records<std::byte>(f, records.data(), records.size(), tiles, k.heads, stride);
    return for_ranges(tiles * k.heads, kvarn::scratch_bytes(f), threads, "quantizing",
                      [&](kvarn::record_range range, std::span<std::byte> scratch) {
                          return kvarn::quantize_kv(f, k, v, grid, scratch, options, range);
                      });
}

/// Decodes dense tile-major records into views of as many tokens.
[[nodiscard]] inline kvarn::status decode(const kvarn::format& f, bytes records, kvarn::kv_view<float> k, kvarn::kv_view<float> v,
                                          kvarn::record_stride stride, kvarn::basis basis, unsigned threads)
{
    const std::size_t tiles = kvarn::full_tiles(f, k.tokens);
    if (tiles == 0) return kvarn::status::ok;
    const auto grid = kvarn::tile_major_records<const std::byte>(f, records.data(), records.size(), tiles, k.heads, stride);
    return for_ranges(tiles * k.heads, kvarn::scratch_bytes(f), threads, "dequantizing",
                      [&](kvarn::record_range range, std::span<std::byte> scratch) {
                          return kvarn::dequantize_kv(f, grid, k, v, basis, scratch, range);
                      });
}

/// The same where every head has a format of its own, all of one size of record; the grid stays tile-major.
template <class T>
[[nodiscard]] kvarn::status encode(const std::vector<kvarn::format>& of_heads, kvarn::kv_view<T> k, kvarn::kv_view<T> v,
                                   std::vector<std::byte>& records, kvarn::record_stride stride, const kvarn::encode_options& options, unsigned threads)
{
    const kvarn::format& any = of_heads.front();
    if (std::all_of(of_heads.begin(), of_heads.end(), [&](const kvarn::format& f) { return f == any; }))
        return encode(any, k, v, records, stride, options, threads);
    const std::size_t tiles = kvarn::full_tiles(any, k.tokens), heads = of_heads.size();
    records.assign(kvarn::grid_bytes(any, tiles, heads, stride), std::byte{0});
    if (tiles == 0) return kvarn::status::ok;
    const auto grid = kvarn::tile_major_records<std::byte>(any, records.data(), records.size(), tiles, heads, stride);
    return for_ranges(heads, kvarn::scratch_bytes(any), threads, "quantizing", [&](kvarn::record_range range, std::span<std::byte> scratch) {
        for (std::size_t h = range.begin; h < range.end; ++h) {
            const kvarn::kv_view<T> values = of_heads[h].has_values() ? v.head(h) : v;
            if (const auto s = kvarn::quantize_kv(of_heads[h], k.head(h), values, grid.head(h), scratch, options); s != kvarn::status::ok) return s;
        }
        return kvarn::status::ok;
    });
}

[[nodiscard]] inline kvarn::status decode(const std::vector<kvarn::format>& of_heads, bytes records, kvarn::kv_view<float> k, kvarn::kv_view<float> v,
                                          kvarn::record_stride stride, kvarn::basis basis, unsigned threads)
{
    const kvarn::format& any = of_heads.front();
    if (std::all_of(of_heads.begin(), of_heads.end(), [&](const kvarn::format& f) { return f == any; }))
        return decode(any, records, k, v, stride, basis, threads);
    const std::size_t tiles = kvarn::full_tiles(any, k.tokens), heads = of_heads.size();
    if (tiles == 0) return kvarn::status::ok;
    const auto grid = kvarn::tile_major_records<const std::byte>(any, records.data(), records.size(), tiles, heads, stride);
    return for_ranges(heads, kvarn::scratch_bytes(any), threads, "dequantizing", [&](kvarn::record_range range, std::span<std::byte> scratch) {
        for (std::size_t h = range.begin; h < range.end; ++h) {
            const kvarn::kv_view<float> values = of_heads[h].has_values() ? v.head(h) : v;
            if (const auto s = kvarn::dequantize_kv(of_heads[h], grid.head(h), k.head(h), values, basis, scratch); s != kvarn::status::ok) return s;
        }
        return kvarn::status::ok;
    });
}

/// The first `tokens` tokens of an array, as a view.
template <class T>
[[nodiscard]] kvarn::kv_view<const T> view_of(const tensor& array, std::size_t tokens)
{
    auto view = kvarn::head_major(array.as<T>(), array.tokens, array.heads, array.channels);
    view.tokens = tokens;
    return view;
}

[[nodiscard]] inline kvarn::kv_view<float> view_of(std::vector<float>& values, std::size_t heads, std::size_t tokens,
                                                   std::size_t channels)
{
    return kvarn::head_major(values.data(), tokens, heads, channels);
}

}  // namespace kvarn_cli
