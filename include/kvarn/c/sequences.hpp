// SPDX-License-Identifier: Apache-2.0
#pragma once
// The C interface, fourth part: sequences of a pool and their tokens. Compiled once, by c/implementation.hpp. In and out:
// as kvarn.h says. No allocation.

#include <kvarn/base/config.hpp>  // first: it refuses older standards

#include <cstddef>
#include <cstdint>
#include <span>

#include <kvarn/c/pool.hpp>
#include <kvarn/c/structs.hpp>
#include <kvarn/cache/tokens.hpp>
#include <kvarn/dispatch/cache.hpp>

namespace kvarn::c {

[[nodiscard]] KVARN_INLINE sequence_id id_of(kvarn_sequence s) noexcept
{
    return {s.slot, s.generation};
}

}  // namespace kvarn::c

extern "C" {

kvarn_status kvarn_open(kvarn_pool* pool, std::int64_t first_position, kvarn_sequence* sequence) noexcept
{
    return kvarn::c::with_pool(pool, [&](kvarn::cache_pool& p) {
        if (sequence == nullptr) return kvarn::status::null_pointer;
        const auto made = p.open(first_position);
        if (made) *sequence = {made->slot, made->generation};
        return made.error;
    });
}

kvarn_status kvarn_close(kvarn_pool* pool, kvarn_sequence sequence) noexcept
{
    return kvarn::c::with_pool(pool, [&](kvarn::cache_pool& p) { return p.close(kvarn::c::id_of(sequence)); });
}

kvarn_status kvarn_reserve(kvarn_pool* pool, kvarn_sequence sequence, size_t tokens) noexcept
{
    return kvarn::c::with_pool(pool, [&](kvarn::cache_pool& p) { return p.reserve(kvarn::c::id_of(sequence), tokens); });
}

kvarn_status kvarn_reserve_batch(kvarn_pool* pool, const kvarn_sequence_room* batch, size_t count, size_t* failed) noexcept
{
    return kvarn::c::with_pool(pool, [&](kvarn::cache_pool& p) {
        if (batch == nullptr && count != 0) return kvarn::status::null_pointer;
        return p.reserve({reinterpret_cast<const kvarn::sequence_room*>(batch), count}, failed);
    });
}

kvarn_status kvarn_store(kvarn_pool* pool, kvarn_sequence sequence, size_t layer, const kvarn_view* k, const kvarn_view* v,
                         size_t first_draft, size_t first_head) noexcept
{
    using namespace kvarn::c;
    return with_pool(pool, [&](const kvarn::cache_pool& p) {
        kvarn::input_view keys, values;
        if (k == nullptr) return kvarn::status::null_pointer;
        if (const kvarn::status s = to_view(k, keys); s != kvarn::status::ok) return s;
        if (const kvarn::status s = to_view(v, values); s != kvarn::status::ok) return s;
        return kvarn::dispatched::store(p, id_of(sequence), layer, keys, values, first_draft, first_head);
    });
}

kvarn_status kvarn_commit(kvarn_pool* pool, kvarn_sequence sequence, size_t tokens) noexcept
{
    return kvarn::c::with_pool(pool, [&](kvarn::cache_pool& p) { return p.commit(kvarn::c::id_of(sequence), tokens); });
}

kvarn_status kvarn_commit_path(kvarn_pool* pool, kvarn_sequence sequence, const size_t* drafts, size_t count) noexcept
{
    return kvarn::c::with_pool(pool, [&](kvarn::cache_pool& p) {
        if (drafts == nullptr && count != 0) return kvarn::status::null_pointer;
        return p.commit(kvarn::c::id_of(sequence), std::span<const std::size_t>(drafts, count));
    });
}

kvarn_status kvarn_truncate(kvarn_pool* pool, kvarn_sequence sequence, std::int64_t position) noexcept
{
    return kvarn::c::with_pool(pool, [&](kvarn::cache_pool& p) { return p.truncate(kvarn::c::id_of(sequence), position); });
}

kvarn_status kvarn_erase(kvarn_pool* pool, kvarn_sequence sequence, std::int64_t begin, std::int64_t end) noexcept
{
    return kvarn::c::with_pool(pool, [&](kvarn::cache_pool& p) { return (p.erase)(kvarn::c::id_of(sequence), begin, end); });
}

kvarn_status kvarn_evict_front(kvarn_pool* pool, kvarn_sequence sequence, size_t tokens) noexcept
{
    return kvarn::c::with_pool(pool, [&](kvarn::cache_pool& p) { return p.evict_front(kvarn::c::id_of(sequence), tokens); });
}

kvarn_status kvarn_fork(kvarn_pool* pool, kvarn_sequence sequence, kvarn_sequence* fork) noexcept
{
    return kvarn::c::with_pool(pool, [&](kvarn::cache_pool& p) {
        if (fork == nullptr) return kvarn::status::null_pointer;
        const auto made = p.fork(kvarn::c::id_of(sequence));
        if (made) *fork = {made->slot, made->generation};
        return made.error;
    });
}

std::int32_t kvarn_is_open(const kvarn_pool* pool, kvarn_sequence sequence) noexcept
{
    return kvarn::c::number_of_pool(pool, std::int32_t{0},
                                    [&](const kvarn::cache_pool& p) { return p.is_open(kvarn::c::id_of(sequence)); });
}

size_t kvarn_tokens(const kvarn_pool* pool, kvarn_sequence sequence) noexcept
{
    return kvarn::c::number_of_pool(pool, size_t{0},
                                    [&](const kvarn::cache_pool& p) { return p.tokens(kvarn::c::id_of(sequence)); });
}

size_t kvarn_drafts(const kvarn_pool* pool, kvarn_sequence sequence) noexcept
{
    return kvarn::c::number_of_pool(pool, size_t{0},
                                    [&](const kvarn::cache_pool& p) { return p.drafts(kvarn::c::id_of(sequence)); });
}

std::int64_t kvarn_next_position(const kvarn_pool* pool, kvarn_sequence sequence) noexcept
{
    return kvarn::c::number_of_pool(pool, std::int64_t{-1},
                                    [&](const kvarn::cache_pool& p) { return p.next_position(kvarn::c::id_of(sequence)); });
}

size_t kvarn_count_tokens(const kvarn_pool* pool, kvarn_sequence sequence, std::int64_t begin, std::int64_t end) noexcept
{
    return kvarn::c::number_of_pool(pool, size_t{0}, [&](const kvarn::cache_pool& p) {
        return kvarn::count_tokens(p, kvarn::c::id_of(sequence), begin, end);
    });
}

kvarn_status kvarn_read(const kvarn_pool* pool, kvarn_sequence sequence, size_t layer, size_t head, std::int64_t begin,
                        std::int64_t end, const kvarn_view* k, const kvarn_view* v, void* scratch, size_t scratch_bytes) noexcept
{
    using namespace kvarn::c;
    return with_pool(pool, [&](const kvarn::cache_pool& p) {
        kvarn::output_view keys, values;
        if (scratch == nullptr) return kvarn::status::null_pointer;
        if (const kvarn::status s = to_view(k, keys); s != kvarn::status::ok) return s;
        if (const kvarn::status s = to_view(v, values); s != kvarn::status::ok) return s;
        return kvarn::dispatched::read(p, id_of(sequence), layer, head, begin, end, keys, values,
                                       bytes_at(scratch, scratch_bytes));
    });
}

kvarn_status kvarn_statistics_of(const kvarn_pool* pool, kvarn_sequence sequence, kvarn_sequence_statistics* statistics) noexcept
{
    using namespace kvarn::c;
    return with_pool(pool, [&](const kvarn::cache_pool& p) {
        if (const kvarn::status s = can_give(statistics); s != kvarn::status::ok) return s;
        const auto n = p.statistics(id_of(sequence));
        if (n)
            give({sizeof(kvarn_sequence_statistics), n->tokens, n->drafts, n->sealed_tokens, n->dead_tokens, n->kept_tiles,
                  n->record_blocks, n->exact_blocks, n->spans, n->own_records, n->own_exact, n->next_position},
                 statistics);
        return n.error;
    });
}

}  // extern "C"
