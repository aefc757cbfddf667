// SPDX-License-Identifier: Apache-2.0
#pragma once
// Values of a cache's tokens: store() writes drafts into exact blocks, read() gives back what the cache holds. In and out: views
// of any element type and strides, [token][KV head][channel]. No allocation; read() decodes in the caller's scratch.

#include <kvarn/base/config.hpp>  // first: it refuses older standards

#include <cstddef>
#include <cstdint>
#include <span>

#include <kvarn/attention/task.hpp>
#include <kvarn/cache/pool.hpp>
#include <kvarn/convert.hpp>
#include <kvarn/quantize.hpp>

namespace kvarn {

/// Writes K and V of one layer for the drafts [first_draft, first_draft + tokens of k), KV heads [first_head, first_head + heads
/// of k). Rounds to the exact type; halves saturate. Threads may store different layers and heads of a sequence at the same
/// time. What is stored again replaces what was; the drafts of a layer and head are stored in order. `v` is empty where the
/// formats have no V. Errors, nothing written: stale_handle, bad_argument (no such layer, heads or drafts, or earlier ones are
/// missing), shape_mismatch, null_pointer.
template <class Arch = simd::native_arch>
[[nodiscard]] status store(const cache_pool& pool, sequence_id id, std::size_t layer, const input_view& k, const input_view& v,
                           std::size_t first_draft = 0, std::size_t first_head = 0) noexcept;

/// Tokens at positions [begin, end), committed ones and drafts; 0 for a stale handle.
[[nodiscard]] std::size_t count_tokens(const cache_pool& pool, sequence_id id, std::int64_t begin, std::int64_t end) noexcept;

/// What the cache holds of the tokens at positions [begin, end) of one KV head: exact values as they were stored, records
/// decoded, all in the bases of cache_config. k [count_tokens][1][key_channels], v [count_tokens][1][head_dim_v]; either may be
/// empty (data null). Errors: stale_handle, bad_argument (no such layer or head; drafts that are not stored), shape_mismatch,
/// buffer_too_small (scratch), not_finite (a scalar of a record).
template <class Arch = simd::native_arch>
[[nodiscard]] status read(const cache_pool& pool, sequence_id id, std::size_t layer, std::size_t head, std::int64_t begin,
                          std::int64_t end, const output_view& k, const output_view& v, std::span<std::byte> scratch) noexcept;

/// Bytes of scratch that read() needs, at any alignment.
[[nodiscard]] KVARN_INLINE constexpr std::size_t read_scratch_bytes(const format& f) noexcept
{
    const int widest = f.head_dim_v() > f.key_channels() ? f.head_dim_v() : f.key_channels();
    return scratch_bytes(f) + static_cast<std::size_t>(f.group() * widest) * sizeof(float) + 63;
}

namespace detail {

template <bool Const>
[[nodiscard]] KVARN_INLINE constexpr typename any_view<Const>::element_type view_type(exact_type t) noexcept
{
    using type = typename any_view<Const>::element_type;
    return t == exact_type::f32 ? type::f32 : t == exact_type::f16 ? type::f16 : type::bf16;
}

/// Tokens [first, first + count) of an exact block, K (or V) of one head.
template <bool Const>
[[nodiscard]] KVARN_INLINE any_view<Const> exact_rows(const pool_state& s, std::byte* base, std::size_t row, std::int32_t block,
                                                      std::size_t first, std::size_t count) noexcept
{
    any_view<Const> x;
    if (row == 0) return x;
    x.data = s.token_at(base, row, block, first);
    x.type = view_type<Const>(s.config.exact);
    x.tokens = count;
    x.heads = 1;
    x.channels = row / element_bytes(s.config.exact);
    x.token_stride = x.head_stride = static_cast<std::ptrdiff_t>(x.channels);
    return x;
}

[[nodiscard]] KVARN_INLINE bool has_shape(const input_view& x, std::size_t tokens, std::size_t heads,
                                          std::size_t channels) noexcept
{
    return x.tokens == tokens && x.heads == heads && x.channels == channels;
}

}  // namespace detail

template <class Arch>
status store(const cache_pool& pool, sequence_id id, std::size_t layer, const input_view& k, const input_view& v,
             std::size_t first_draft, std::size_t first_head) noexcept
{
    const detail::sequence_state* const q = pool.find(id);
    if (q == nullptr) return status::stale_handle;
    const detail::pool_state& s = pool.state();
    if (layer >= s.layers || first_head > s.heads || k.heads > s.heads - first_head || first_draft > q->drafts ||
        k.tokens > q->drafts - first_draft)
        return status::bad_argument;
    const format& f = s.place(layer, 0).f;
    if (k.channels != static_cast<std::size_t>(f.key_channels())) return status::shape_mismatch;
    if (f.has_values() ? !detail::has_shape(v, k.tokens, k.heads, static_cast<std::size_t>(f.head_dim_v())) : v.data != nullptr)
        return status::shape_mismatch;
    if (k.tokens == 0 || k.heads == 0) return status::ok;
    if (k.data == nullptr || (f.has_values() && v.data == nullptr)) return status::null_pointer;
    std::uint32_t* const stored = s.stored_of(id.slot) + layer * s.heads + first_head;
    for (std::size_t h = 0; h < k.heads; ++h)
        if (stored[h] < first_draft) return status::bad_argument;

    const detail::cache_span* const spans = s.spans_of(id.slot);
    const std::int32_t* const table = s.table_of(id.slot);
    const detail::span_place start = detail::place_from_end(s, id.slot, q->drafts - first_draft);
    for (std::size_t h = 0; h < k.heads; ++h) {
        const detail::head_place& place = s.place(layer, first_head + h);
        const input_view keys = k.head(h), values = v.head(h);
        std::size_t token = start.token;
        for (std::size_t i = start.span, done = 0; done < k.tokens; ++i, token = 0) {
            const std::size_t room = spans[i].count - token, count = room < k.tokens - done ? room : k.tokens - done;
            const std::size_t first = spans[i].first + token;
            status written = convert<Arch>(token_range(keys, done, count),
                                           detail::exact_rows<false>(s, place.keys, s.key_row, table[i], first, count));
            if (written == status::ok && f.has_values())
                written = convert<Arch>(token_range(values, done, count),
                                        detail::exact_rows<false>(s, place.values, s.value_row, table[i], first, count));
            if (written != status::ok) return written;
            done += count;
        }
        const auto end = static_cast<std::uint32_t>(first_draft + k.tokens);
        if (stored[h] < end) stored[h] = end;
    }
    return status::ok;
}

KVARN_INLINE std::size_t count_tokens(const cache_pool& pool, sequence_id id, std::int64_t begin, std::int64_t end) noexcept
{
    const detail::sequence_state* const q = pool.find(id);
    std::size_t n = 0;
    for (std::size_t i = 0; q != nullptr && i < q->spans; ++i) {
        const detail::cache_span& span = pool.state().spans_of(id.slot)[i];
        const std::int64_t first = span.position > begin ? span.position : begin, last = span.end() < end ? span.end() : end;
        if (first < last) n += static_cast<std::size_t>(last - first);
    }
    return n;
}

template <class Arch>
status read(const cache_pool& pool, sequence_id id, std::size_t layer, std::size_t head, std::int64_t begin, std::int64_t end,
            const output_view& k, const output_view& v, std::span<std::byte> scratch) noexcept
{
    const detail::sequence_state* const q = pool.find(id);
    if (q == nullptr) return status::stale_handle;
    const detail::pool_state& s = pool.state();
    if (layer >= s.layers || head >= s.heads) return status::bad_argument;
    const detail::head_place& place = s.place(layer, head);
    const format& f = place.f;
    const std::size_t tokens = count_tokens(pool, id, begin, end);
    const std::size_t missing =
        q->drafts - s.stored_of(id.slot)[layer * s.heads + head];  // the newest; what was there before is not theirs
    if (tokens != 0 && missing != 0 && end > q->next_position - static_cast<std::int64_t>(missing)) return status::bad_argument;
    const auto fits = [&](const output_view& x, int channels) KVARN_LAMBDA {
        return x.data == nullptr || (x.tokens == tokens && x.heads == 1 && x.channels == static_cast<std::size_t>(channels));
    };
    if (!fits(k, f.key_channels()) || !fits(v, f.head_dim_v())) return status::shape_mismatch;
    if (scratch.size() < read_scratch_bytes(f)) return status::buffer_too_small;
    float* const decoded = reinterpret_cast<float*>(detail::aligned_to_line(scratch.data()));
    const std::span<std::byte> rest = scratch.last(scratch_bytes(f));

    const detail::cache_span* const spans = s.spans_of(id.slot);
    const std::int32_t* const table = s.table_of(id.slot);
    for (std::size_t i = 0, done = 0; done < tokens; ++i) {
        const std::int64_t from = spans[i].position > begin ? spans[i].position : begin,
                           to = spans[i].end() < end ? spans[i].end() : end;
        if (from >= to) continue;
        const auto count = static_cast<std::size_t>(to - from),
                   first = spans[i].first + static_cast<std::size_t>(from - spans[i].position);
        const auto copy = [&](const output_view& out, bool key, std::byte* base, std::size_t row, basis wanted) {
            if (out.data == nullptr) return status::ok;
            const output_view part = token_range(out, done, count);
            if (!spans[i].sealed) return convert<Arch>(detail::exact_rows<true>(s, base, row, table[i], first, count), part);
            const auto channels = static_cast<std::size_t>(key ? f.key_channels() : f.head_dim_v());
            const kv_view<float> tile = token_major(decoded, s.group, 1, channels), none{};
            const status opened =
                dequantize_kv<Arch>(f, place.record(table[i]), key ? tile : none, key ? none : tile, wanted, rest);
            if (opened != status::ok) return opened;
            return convert<Arch>(input_view(kv_view<const float>(token_range(tile, first, count))), part);
        };
        if (const status got = copy(k, true, place.keys, s.key_row, s.config.key_basis); got != status::ok) return got;
        if (const status got = copy(v, false, place.values, s.value_row, s.config.value_basis); got != status::ok) return got;
        done += count;
    }
    return status::ok;
}

}  // namespace kvarn
