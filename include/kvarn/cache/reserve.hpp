// SPDX-License-Identifier: Apache-2.0
#pragma once
// Room for drafts, of one sequence or a batch: what it takes is counted for all before any of it is taken, under one lock; last
// blocks that others hold too are copied afterwards, without it. The interface is in cache/pool.hpp, which includes this.

#include <kvarn/base/config.hpp>  // first: it refuses older standards

#include <cstddef>
#include <cstdint>
#include <span>

#include <kvarn/cache/pool.hpp>
#include <kvarn/cache/sequence.hpp>

namespace kvarn {

namespace detail {

/// What more drafts of a sequence take: the places behind its last token, where they go on in its block, and further blocks.
struct drafts_room {
    std::size_t left = 0, more = 0;
};
[[nodiscard]] KVARN_INLINE drafts_room room_of(const pool_state& s, std::uint32_t slot, std::size_t tokens) noexcept
{
    const sequence_state& q = s.sequences[slot];
    drafts_room r;
    if (tokens == 0) return r;
    if (q.spans != 0) {
        const cache_span& last = s.spans_of(slot)[q.spans - 1];
        if (!last.sealed && last.end() == q.next_position) r.left = s.group - last.first - last.count;
    }
    if (tokens > r.left) r.more = divide_up(tokens - r.left, s.group);
    return r;
}

/// Whether a sequence may have so many more drafts, blocks or not.
[[nodiscard]] KVARN_INLINE status check_room(const pool_state& s, std::uint32_t slot, std::size_t tokens) noexcept
{
    const sequence_state& q = s.sequences[slot];
    if (tokens == 0) return status::ok;
    if (tokens > s.config.most_tokens - q.committed - q.drafts || q.next_position > largest_position)
        return status::sequence_full;
    return room_of(s, slot, tokens).more > s.config.most_spans - q.spans ? status::sequence_full : status::ok;
}

/// How many of a batch find room, one after the other; sets `copies` of these. A shared last block is copied for all of its
/// holders but the last. Under the lock.
[[nodiscard]] KVARN_INLINE std::size_t count_rooms(pool_state& s, std::span<const sequence_room> batch) noexcept
{
    const auto last_holders = [&](std::uint32_t slot) KVARN_LAMBDA -> std::uint32_t& {
        return s.blocks.exact.holders[s.table_of(slot)[s.sequences[slot].spans - 1]];
    };
    std::size_t needed = 0, i = 0;
    for (; i < batch.size(); ++i) {
        const std::uint32_t slot = batch[i].sequence.slot;
        const drafts_room r = room_of(s, slot, batch[i].tokens);
        const bool copies = r.left != 0 && last_holders(slot) > 1;
        needed += r.more + copies;
        if (needed > s.blocks.exact.free) break;
        s.sequences[slot].copies = copies;
        if (copies) --last_holders(slot);
    }
    for (std::size_t j = 0; j < i; ++j)
        if (s.sequences[batch[j].sequence.slot].copies) ++last_holders(batch[j].sequence.slot);
    return i;
}

/// Takes the blocks for them. A copy says by its link what it is to be a copy of, until finish_room. Under the lock.
KVARN_INLINE void take_room(pool_state& s, std::uint32_t slot, std::size_t tokens) noexcept
{
    const sequence_state& q = s.sequences[slot];
    const drafts_room r = room_of(s, slot, tokens);
    cache_span* const spans = s.spans_of(slot);
    std::int32_t* const table = s.table_of(slot);
    if (q.copies) {
        const std::int32_t copy = s.blocks.take_exact();
        s.blocks.exact.link[copy] = table[q.spans - 1];
        table[q.spans - 1] = copy;
    } else if (r.left != 0) {
        s.blocks.unlink_exact(table[q.spans - 1]);
    }
    const std::int64_t sink_end = q.first_position + static_cast<std::int64_t>(s.config.sink_tokens);
    std::size_t rest = tokens - (tokens < r.left ? tokens : r.left);
    std::int64_t position = q.next_position + static_cast<std::int64_t>(tokens - rest);
    for (std::size_t i = 0; i < r.more; ++i) {
        const std::size_t count = rest < s.group ? rest : s.group;
        table[q.spans + i] = s.blocks.take_exact();
        spans[q.spans + i] = {position, 0, static_cast<std::uint16_t>(count), false, position < sink_end};
        position += static_cast<std::int64_t>(count);
        rest -= count;
    }
}

/// Copies what has to be, and the sequence has its drafts.
KVARN_INLINE void finish_room(pool_state& s, std::uint32_t slot, std::size_t tokens) noexcept
{
    sequence_state& q = s.sequences[slot];
    const drafts_room r = room_of(s, slot, tokens);
    if (r.left != 0) {
        cache_span& last = s.spans_of(slot)[q.spans - 1];
        const std::int32_t block = s.table_of(slot)[q.spans - 1];
        if (q.copies) {
            const std::int32_t shared = s.blocks.exact.link[block];
            copy_exact(s, {shared, last.first}, {block, last.first}, last.count);
            const pool_lock lock(s.lock);
            s.blocks.exact.link[block] = no_block;
            s.blocks.release_exact(shared);
        }
        last.count = static_cast<std::uint16_t>(last.count + (tokens < r.left ? tokens : r.left));
    }
    q.spans += r.more;
    q.drafts += tokens;
    q.next_position += static_cast<std::int64_t>(tokens);
}

}  // namespace detail

KVARN_INLINE status cache_pool::reserve(sequence_id id, std::size_t tokens) noexcept
{
    const sequence_room one{id, tokens};
    return reserve(std::span<const sequence_room>(&one, 1));
}

KVARN_INLINE status cache_pool::reserve(std::span<const sequence_room> batch, std::size_t* failed) noexcept
{
    detail::pool_state& s = *s_;
    std::size_t known = 0;  // of the batch, those that could have their room alone
    status said = status::ok;
    while (known < batch.size()) {
        const sequence_room& one = batch[known];
        detail::sequence_state* const q = find(one.sequence);
        said = q == nullptr  ? status::stale_handle
               : q->in_batch ? status::bad_argument
                             : detail::check_room(s, one.sequence.slot, one.tokens);
        if (said != status::ok) break;
        q->in_batch = true;
        q->copies = false;
        ++known;
    }
    std::size_t at = known;
    if (said == status::ok) {
        const detail::pool_lock lock(s.lock);
        at = detail::count_rooms(s, batch);
        if (at != batch.size())
            said = status::no_room;
        else
            for (const sequence_room& one : batch) detail::take_room(s, one.sequence.slot, one.tokens);
    }
    if (said == status::ok)
        for (const sequence_room& one : batch) detail::finish_room(s, one.sequence.slot, one.tokens);
    for (const sequence_room& one : batch.first(known)) s.sequences[one.sequence.slot].in_batch = false;
    if (said != status::ok && failed != nullptr) *failed = at;
    return said;
}

}  // namespace kvarn
