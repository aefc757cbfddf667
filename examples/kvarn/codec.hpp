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

/// Calls work(head, range of tiles, records of that head) for what a range of the work items [head][tile] covers. Returns the first failure.
template <class Byte, class Work>
[[nodiscard]] kvarn::status for_heads(const std::vector<kvarn::format>& of_heads, std::span<Byte> records, std::size_t tiles, kvarn::record_stride stride,
                                      kvarn::record_range range, Work work)
{
    std::size_t at = 0;
    for (std::size_t head = 0; head < of_heads.size() && head * tiles < range.end; ++head) {
        const std::size_t size = kvarn::grid_bytes(of_heads[head], tiles, 1, stride), first = head * tiles;
        if (range.begin < first + tiles) {
            const kvarn::record_range part{range.begin > first ? range.begin - first : 0, std::min(range.end - first, tiles)};
            const auto grid = kvarn::tile_major_records<Byte>(of_heads[head], records.data() + at, size, tiles, 1, stride);
            if (const auto s = work(head, part, grid); s != kvarn::status::ok) return s;
        }
        at += size;
    }
    return kvarn::status::ok;
}

/// Bytes of the records [head][tile].
[[nodiscard]] inline std::size_t all_record_bytes(const std::vector<kvarn::format>& of_heads, std::size_t tiles, kvarn::record_stride stride)
{
    std::size_t sum = 0;
    for (const kvarn::format& f : of_heads) sum += kvarn::grid_bytes(f, tiles, 1, stride);
    return sum;
}

/// Scratch for any of them.
[[nodiscard]] inline std::size_t scratch_bytes(const std::vector<kvarn::format>& of_heads)
{
    std::size_t most = 0;
    for (const kvarn::format& f : of_heads) most = std::max(most, kvarn::scratch_bytes(f));
    return most;
}

/// Quantizes views of whole tiles into dense records [head][tile]. The formats of the heads differ in bits and bases at most.
template <class T>
[[nodiscard]] kvarn::status encode(const std::vector<kvarn::format>& of_heads, kvarn::kv_view<T> k, kvarn::kv_view<T> v,
                                   std::vector<std::byte>& records, kvarn::record_stride stride, const kvarn::encode_options& options, unsigned threads)
{
    const std::size_t tiles = kvarn::full_tiles(of_heads.front(), k.tokens);
    records.assign(all_record_bytes(of_heads, tiles, stride), std::byte{0});
    if (tiles == 0) return kvarn::status::ok;
    return for_ranges(tiles * of_heads.size(), scratch_bytes(of_heads), threads, "quantizing", [&](kvarn::record_range range, std::span<std::byte> scratch) {
        return for_heads(of_heads, std::span(records), tiles, stride, range, [&](std::size_t head, kvarn::record_range part, auto grid) {
            const kvarn::kv_view<T> values = of_heads[head].has_values() ? v.head(head) : kvarn::kv_view<T>{};
            return kvarn::quantize_kv(of_heads[head], k.head(head), values, grid, scratch, options, part);
        });
    });
}

/// Decodes dense records [head][tile] into views of as many tokens.
[[nodiscard]] inline kvarn::status decode(const std::vector<kvarn::format>& of_heads, bytes records, kvarn::kv_view<float> k, kvarn::kv_view<float> v,
                                          kvarn::record_stride stride, kvarn::basis basis, unsigned threads)
{
    const std::size_t tiles = kvarn::full_tiles(of_heads.front(), k.tokens);
    if (tiles == 0) return kvarn::status::ok;
    return for_ranges(tiles * of_heads.size(), scratch_bytes(of_heads), threads, "dequantizing", [&](kvarn::record_range range, std::span<std::byte> scratch) {
        return for_heads(of_heads, records, tiles, stride, range, [&](std::size_t head, kvarn::record_range part, auto grid) {
            const kvarn::kv_view<float> values = of_heads[head].has_values() ? v.head(head) : kvarn::kv_view<float>{};
            return kvarn::dequantize_kv(of_heads[head], grid, k.head(head), values, basis, scratch, part);
        });
    });
}

/// [tile][head], the order of bare records, from [head][tile], or back: `outer` x `inner` records of one size change places.
[[nodiscard]] inline std::vector<std::byte> transposed(const std::vector<std::byte>& records, std::size_t outer, std::size_t inner, std::size_t record)
{
    std::vector<std::byte> out(records.size());
    for (std::size_t o = 0; o < outer; ++o)
        for (std::size_t i = 0; i < inner; ++i) std::copy_n(records.data() + (o * inner + i) * record, record, out.data() + (i * outer + o) * record);
    return out;
}

/// The format of each head when each chooses its basis by its first tile, and by the queries of that tile where there are any (`q`: [tokens]
/// [query heads][channels], query heads of a group in a row; no heads: K keeps its basis). Without a whole tile nobody chooses.
template <class T, class Q>
[[nodiscard]] std::vector<kvarn::format> choose_formats(const kvarn::format& base, kvarn::kv_view<T> k, kvarn::kv_view<T> v, kvarn::kv_view<Q> q,
                                                        const kvarn::encode_options& how, const std::string& name)
{
    std::vector<kvarn::format> formats(k.heads, base);
    const auto group = static_cast<std::size_t>(base.group());
    if (k.tokens < group) return formats;
    kvarn::choose_options options;
    options.encode = how;
    std::vector<std::byte> scratch(kvarn::choose_scratch_bytes(base));
    const std::size_t each = q.heads / k.heads;
    for (std::size_t head = 0; head < k.heads; ++head) {
        std::vector<std::uint64_t> moments(static_cast<std::size_t>(base.head_dim_k()));
        for (std::size_t i = 0; i < each; ++i)
            check(kvarn::add_query_moments(base, kvarn::first_tokens(q.head(head * each + i), group), std::span(moments)), name);
        const auto values = base.has_values() ? kvarn::first_tokens(v.head(head), group) : kvarn::kv_view<T>{};
        const auto chosen = kvarn::choose_format(base, kvarn::first_tokens(k.head(head), group), values, std::span<const std::uint64_t>(moments),
                                                 std::span(scratch), options);
        check(chosen.error, name);
        formats[head] = *chosen;
    }
    return formats;
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
