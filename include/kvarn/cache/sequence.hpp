// SPDX-License-Identifier: Apache-2.0
#pragma once
// What the operations of cache_pool on sequences do: spans are made, cut and shared, blocks taken and given back; no value is
// looked at, and none is copied but for the path of a tree, and in reserve.hpp, where a shared exact block is written to. In: a
// pool. The interface is in cache/pool.hpp, which includes this.

#include <kvarn/base/config.hpp>  // first: it refuses older standards

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>

#include <kvarn/cache/pool.hpp>

namespace kvarn {

namespace detail {

/// Where the last `tokens` tokens of a sequence, one at least, begin: a span, and a token of it.
struct span_place {
    std::size_t span = 0, token = 0;
};
[[nodiscard]] KVARN_INLINE span_place place_from_end(const pool_state& s, std::uint32_t slot, std::size_t tokens) noexcept
{
    const cache_span* const spans = s.spans_of(slot);
    std::size_t i = s.sequences[slot].spans;
    while (spans[--i].count < tokens) tokens -= spans[i].count;
    return {i, spans[i].count - tokens};
}

/// A token of an exact block.
struct exact_place {
    std::int32_t block = no_block;
    std::size_t token = 0;
};
[[nodiscard]] KVARN_INLINE exact_place place_of_draft(const pool_state& s, std::uint32_t slot, std::size_t draft) noexcept
{
    const span_place at = place_from_end(s, slot, s.sequences[slot].drafts - draft);
    return {s.table_of(slot)[at.span], s.spans_of(slot)[at.span].first + at.token};
}

/// Copies `count` tokens of an exact block in all layers and heads.
KVARN_INLINE void copy_exact(const pool_state& s, exact_place from, exact_place to, std::size_t count) noexcept
{
    const auto copy = [&](std::byte* base, std::size_t row) KVARN_LAMBDA {
        if (row == 0) return;
        std::memcpy(s.token_at(base, row, to.block, to.token), s.token_at(base, row, from.block, from.token), count * row);
    };
    for (std::size_t i = 0; i < s.layers * s.heads; ++i) {
        copy(s.places[i].keys, s.key_row);
        copy(s.places[i].values, s.value_row);
    }
}

/// One holder more, or one less, of a span's block. Under the lock.
KVARN_INLINE void hold_block(pool_state& s, const cache_span& span, std::int32_t block) noexcept
{
    (span.sealed ? s.blocks.records : s.blocks.exact).hold(block);
}
KVARN_INLINE void release_block(pool_state& s, const cache_span& span, std::int32_t block) noexcept
{
    if (span.sealed)
        s.blocks.release_record(block);
    else
        s.blocks.release_exact(block);
}

/// Cuts span i in two behind `count` tokens; there is room for one more. Under the lock.
KVARN_INLINE void split_span(pool_state& s, std::uint32_t slot, std::size_t i, std::size_t count) noexcept
{
    sequence_state& q = s.sequences[slot];
    cache_span* const spans = s.spans_of(slot);
    std::int32_t* const table = s.table_of(slot);
    std::memmove(spans + i + 1, spans + i, (q.spans - i) * sizeof(*spans));
    std::memmove(table + i + 1, table + i, (q.spans - i) * sizeof(*table));
    ++q.spans;
    hold_block(s, spans[i], table[i]);
    spans[i].count = static_cast<std::uint16_t>(count);
    cache_span& rest = spans[i + 1];
    rest.first = static_cast<std::uint16_t>(rest.first + count);
    rest.count = static_cast<std::uint16_t>(rest.count - count);
    rest.position += static_cast<std::int64_t>(count);
}

/// Takes `tokens` tokens off the end of a sequence. Under the lock.
KVARN_INLINE void trim_end(pool_state& s, std::uint32_t slot, std::size_t tokens) noexcept
{
    sequence_state& q = s.sequences[slot];
    cache_span* const spans = s.spans_of(slot);
    while (tokens != 0) {
        cache_span& last = spans[q.spans - 1];
        if (last.count > tokens) {
            last.count = static_cast<std::uint16_t>(last.count - tokens);
            return;
        }
        tokens -= last.count;
        release_block(s, last, s.table_of(slot)[--q.spans]);
    }
}

KVARN_INLINE void forget_stored(pool_state& s, std::uint32_t slot) noexcept
{
    std::uint32_t* const stored = s.stored_of(slot);
    for (std::size_t i = 0; i < s.layers * s.heads; ++i) stored[i] = 0;
}

/// Drops the drafts. Under the lock.
KVARN_INLINE void drop_drafts(pool_state& s, std::uint32_t slot, std::size_t from) noexcept
{
    sequence_state& q = s.sequences[slot];
    const std::size_t gone = q.drafts - from;
    trim_end(s, slot, gone);
    q.next_position -= static_cast<std::int64_t>(gone);
    q.drafts = from;
}

inline constexpr std::int64_t largest_position = std::int64_t{1} << 60;

}  // namespace detail

KVARN_INLINE result<sequence_id> cache_pool::open(std::int64_t first_position) noexcept
{
    if (first_position < 0 || first_position > detail::largest_position) return status::bad_argument;
    const detail::pool_lock lock(s_->lock);
    if (s_->free_slots == 0) return status::no_room;
    const std::uint32_t slot = s_->unused[--s_->free_slots];
    detail::sequence_state& q = s_->sequences[slot];
    const std::uint32_t generation = q.generation;
    q = {};
    q.generation = generation;
    q.open = true;
    q.first_position = q.next_position = first_position;
    detail::forget_stored(*s_, slot);
    return sequence_id{slot, generation};
}

KVARN_INLINE status cache_pool::close(sequence_id id) noexcept
{
    detail::sequence_state* const q = find(id);
    if (q == nullptr) return status::stale_handle;
    const detail::pool_lock lock(s_->lock);
    detail::trim_end(*s_, id.slot, q->committed + q->drafts);
    q->open = false;
    if (++q->generation == 0) return status::ok;  // after 2^32 sequences the slot has no more handles to give
    s_->unused[s_->free_slots++] = id.slot;
    return status::ok;
}

KVARN_INLINE status cache_pool::commit(sequence_id id, std::size_t tokens) noexcept
{
    detail::sequence_state* const q = find(id);
    if (q == nullptr) return status::stale_handle;
    if (tokens > q->drafts) return status::bad_argument;
    const std::uint32_t* const stored = s_->stored_of(id.slot);
    for (std::size_t i = 0; i < s_->layers * s_->heads; ++i)
        if (stored[i] < tokens) return status::bad_argument;
    {
        const detail::pool_lock lock(s_->lock);
        detail::drop_drafts(*s_, id.slot, tokens);
    }
    q->committed += tokens;
    q->drafts = 0;
    detail::forget_stored(*s_, id.slot);
    return status::ok;
}

KVARN_INLINE status cache_pool::commit(sequence_id id, std::span<const std::size_t> drafts) noexcept
{
    const detail::sequence_state* const q = find(id);
    if (q == nullptr) return status::stale_handle;
    std::size_t end = 0;  // of the drafts that must be stored
    for (const std::size_t draft : drafts) {
        if (draft < end || draft >= q->drafts) return status::bad_argument;
        end = draft + 1;
    }
    const std::uint32_t* const stored = s_->stored_of(id.slot);
    for (std::size_t i = 0; i < s_->layers * s_->heads; ++i)
        if (stored[i] < end) return status::bad_argument;
    // Blocks with drafts have one holder. A draft moves forwards, to where one was that is gone or has moved already.
    for (std::size_t i = 0; i < drafts.size(); ++i)
        if (drafts[i] != i)
            detail::copy_exact(*s_, detail::place_of_draft(*s_, id.slot, drafts[i]), detail::place_of_draft(*s_, id.slot, i), 1);
    return commit(id, drafts.size());
}

KVARN_INLINE status cache_pool::truncate(sequence_id id, std::int64_t position) noexcept
{
    detail::sequence_state* const q = find(id);
    if (q == nullptr) return status::stale_handle;
    if (position < q->first_position) return status::bad_argument;
    const detail::cache_span* const spans = s_->spans_of(id.slot);
    const detail::pool_lock lock(s_->lock);
    detail::drop_drafts(*s_, id.slot, 0);
    detail::forget_stored(*s_, id.slot);
    std::size_t gone = 0;
    for (std::size_t i = q->spans; i-- != 0 && spans[i].end() > position;)
        gone += spans[i].position >= position ? spans[i].count : static_cast<std::size_t>(spans[i].end() - position);
    detail::trim_end(*s_, id.slot, gone);
    q->committed -= gone;
    if (position < q->next_position) q->next_position = position;
    return status::ok;
}

/// @cond Doxygen takes the brackets amiss.
KVARN_INLINE status(cache_pool::erase)(sequence_id id, std::int64_t begin, std::int64_t end) noexcept
{
    detail::sequence_state* const q = find(id);
    if (q == nullptr) return status::stale_handle;
    if (end < begin || q->drafts != 0) return status::bad_argument;
    if (begin == end) return status::ok;
    detail::cache_span* const spans = s_->spans_of(id.slot);
    std::int32_t* const table = s_->table_of(id.slot);

    // Spans [from, to) have tokens that go; the first may keep some before them, the last some behind.
    std::size_t from = 0;
    while (from < q->spans && spans[from].end() <= begin) ++from;
    std::size_t to = from;
    while (to < q->spans && spans[to].position < end) ++to;
    if (from == to) return status::ok;
    const std::size_t head = begin > spans[from].position ? static_cast<std::size_t>(begin - spans[from].position) : 0;
    const std::size_t tail = spans[to - 1].end() > end ? static_cast<std::size_t>(spans[to - 1].end() - end) : 0;
    const bool split = to - from == 1 && head != 0 && tail != 0;
    if (split && q->spans == s_->config.most_spans) return status::sequence_full;
    std::size_t gone = 0;
    for (std::size_t i = from; i < to; ++i) gone += spans[i].count;
    gone -= head + tail;

    const detail::pool_lock lock(s_->lock);
    if (split) {
        detail::split_span(*s_, id.slot, from, head);
        ++to;
    }
    std::size_t first = from, last = to;  // what goes entirely
    if (head != 0) spans[first++].count = static_cast<std::uint16_t>(head);
    if (tail != 0) {
        detail::cache_span& s = spans[--last];
        s.position = end;
        s.first = static_cast<std::uint16_t>(s.first + s.count - tail);
        s.count = static_cast<std::uint16_t>(tail);
    }
    for (std::size_t i = first; i < last; ++i) detail::release_block(*s_, spans[i], table[i]);
    std::memmove(spans + first, spans + last, (q->spans - last) * sizeof(*spans));
    std::memmove(table + first, table + last, (q->spans - last) * sizeof(*table));
    q->spans -= last - first;
    q->committed -= gone;
    return status::ok;
}
/// @endcond

KVARN_INLINE status cache_pool::evict_front(sequence_id id, std::size_t tokens) noexcept
{
    detail::sequence_state* const q = find(id);
    if (q == nullptr) return status::stale_handle;
    if (tokens == 0) return q->drafts != 0 ? status::bad_argument : status::ok;
    const std::int64_t sink_end = q->first_position + static_cast<std::int64_t>(s_->config.sink_tokens);
    const detail::cache_span* const spans = s_->spans_of(id.slot);
    for (std::size_t i = 0; i < q->spans; ++i) {
        if (spans[i].end() <= sink_end) continue;
        const std::int64_t begin = spans[i].position > sink_end ? spans[i].position : sink_end;
        const auto count = static_cast<std::size_t>(spans[i].end() - begin);
        if (tokens <= count) return (erase)(id, sink_end, begin + static_cast<std::int64_t>(tokens));
        tokens -= count;
    }
    return status::bad_argument;
}

KVARN_INLINE result<sequence_id> cache_pool::fork(sequence_id id) noexcept
{
    const detail::sequence_state* const q = find(id);
    if (q == nullptr) return status::stale_handle;
    if (q->drafts != 0) return status::bad_argument;
    const auto made = open(q->first_position);
    if (!made) return made;
    detail::sequence_state& copy = s_->sequences[made->slot];
    copy.spans = q->spans;
    copy.committed = q->committed;
    copy.next_position = q->next_position;
    if (q->spans == 0) return made;
    std::memcpy(s_->spans_of(made->slot), s_->spans_of(id.slot), q->spans * sizeof(detail::cache_span));
    std::memcpy(s_->table_of(made->slot), s_->table_of(id.slot), q->spans * sizeof(std::int32_t));
    const detail::pool_lock lock(s_->lock);
    for (std::size_t i = 0; i < q->spans; ++i) detail::hold_block(*s_, s_->spans_of(id.slot)[i], s_->table_of(id.slot)[i]);
    return made;
}

}  // namespace kvarn

#include <kvarn/cache/reserve.hpp>  // room for drafts
