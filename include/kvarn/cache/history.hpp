// SPDX-License-Identifier: Apache-2.0
#pragma once
// The history of a sequence as attention takes it: its spans as segments at their positions, runs of records as one. In: a
// sequence, a layer, a KV head. Out: segments that point into the pool. No allocation.

#include <kvarn/base/config.hpp>  // first: it refuses older standards

#include <cstddef>
#include <cstdint>
#include <span>

#include <kvarn/attention/task.hpp>
#include <kvarn/cache/pool.hpp>
#include <kvarn/cache/tokens.hpp>

namespace kvarn {

/// The history of one sequence, layer and KV head as segments for attention, drafts included, in out[0, n). They point into the
/// pool and hold until the sequence changes. Drafts must be stored before they are attended to. Says n. Errors: stale_handle,
/// bad_argument (no such layer or head), buffer_too_small (as many segments as the sequence has spans are enough).
[[nodiscard]] result<std::size_t> history_of(const cache_pool& pool, sequence_id id, std::size_t layer, std::size_t head,
                                             std::span<kv_segment> out) noexcept;

namespace detail {

/// Whether span i goes on in the same segment as the one before: a run of records, each where the one before ended, at the end
/// of its tile.
[[nodiscard]] KVARN_INLINE bool continues_run(const pool_state& s, const cache_span* spans, std::size_t i) noexcept
{
    return spans[i].sealed && spans[i - 1].sealed && spans[i].first == 0 && spans[i].position == spans[i - 1].end() &&
           spans[i - 1].first + spans[i - 1].count == static_cast<int>(s.group);
}

[[nodiscard]] KVARN_INLINE std::size_t count_segments(const pool_state& s, std::uint32_t slot) noexcept
{
    const cache_span* const spans = s.spans_of(slot);
    std::size_t n = 0;
    for (std::size_t i = 0; i < s.sequences[slot].spans; ++i) n += i == 0 || !continues_run(s, spans, i);
    return n;
}

}  // namespace detail

KVARN_INLINE result<std::size_t> history_of(const cache_pool& pool, sequence_id id, std::size_t layer, std::size_t head,
                                            std::span<kv_segment> out) noexcept
{
    const detail::sequence_state* const q = pool.find(id);
    if (q == nullptr) return status::stale_handle;
    const detail::pool_state& s = pool.state();
    if (layer >= s.layers || head >= s.heads) return status::bad_argument;
    const detail::head_place& place = s.place(layer, head);
    const detail::cache_span* const spans = s.spans_of(id.slot);
    const std::int32_t* const table = s.table_of(id.slot);
    std::size_t n = 0;
    for (std::size_t i = 0; i < q->spans;) {
        if (n == out.size()) return status::buffer_too_small;
        const detail::cache_span& begin = spans[i];
        if (!begin.sealed) {
            const input_view k = detail::exact_rows<true>(s, place.keys, s.key_row, table[i], begin.first, begin.count);
            const input_view v = detail::exact_rows<true>(s, place.values, s.value_row, table[i], begin.first, begin.count);
            out[n++] = at_position(exact_tokens(k, v, 0, s.config.key_basis, s.config.value_basis), begin.position);
            ++i;
            continue;
        }
        std::size_t end = i + 1, tokens = begin.count;
        for (; end < q->spans && detail::continues_run(s, spans, end); ++end) tokens += spans[end].count;
        const auto run =
            paged_tiles(place.f, place.records, static_cast<std::ptrdiff_t>(place.record_bytes), std::span(table + i, end - i));
        out[n++] = at_position(token_range(place.f, run, begin.first, tokens), begin.position);
        i = end;
    }
    return n;
}

}  // namespace kvarn
