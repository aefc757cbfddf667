// SPDX-License-Identifier: Apache-2.0
#pragma once
// Full tiles of a cache become records. In: sequences whose tiles are ready (full, committed, older than recent_tokens, not
// sink). Out: spans of record blocks in their place. A record is a function of the tile's exact tokens and the format alone.
//
// At once: seal(). As work items for the engine's threads, a few in each step if it likes: begin_seal() queues tiles,
// seal_item() encodes one tile of one layer and head, finish_seal() puts finished tiles in place. Between those the sequences go
// on as ever. No allocation.

#include <kvarn/base/config.hpp>  // first: it refuses older standards

#include <cstddef>
#include <cstdint>
#include <span>

#include <kvarn/cache/pool.hpp>
#include <kvarn/cache/tokens.hpp>
#include <kvarn/quantize.hpp>

namespace kvarn {

/// What sealing did.
struct seal_report {
    std::size_t sealed = 0;      ///< tiles that are records now, but for those that a fork had sealed
    std::size_t kept_exact = 0;  ///< tiles that a record cannot hold: they stay exact
    std::size_t dropped = 0;     ///< tiles that their sequence cut or left meanwhile
    std::size_t unfinished = 0;  ///< tiles that were said to be done and were not: all their items are still to be done
    // The first tile that was kept, where there is one.
    sequence_id sequence{};
    std::int64_t position = 0;  ///< of its first token
    std::size_t layer = 0, head = 0;
    status why = status::ok;  ///< not_finite or scale_overflow
};

/// Tiles of a sequence that are ready.
[[nodiscard]] std::size_t ready_tiles(const cache_pool& pool, sequence_id id) noexcept;

/// Queues up to `most` ready tiles of a sequence, the oldest first; each takes a record block. Tiles that a fork has sealed
/// already are taken from there at once. Says how many were queued. Errors: stale_handle, no_room (tiles are ready, but nothing
/// could be done: no record block is free).
[[nodiscard]] result<std::size_t> begin_seal(const cache_pool& pool, sequence_id id, std::size_t most = SIZE_MAX) noexcept;

/// The same for all sequences of the pool, which must rest: the oldest ready tile of each, then the next of each, up to `most`
/// in all. Error: no_room (tiles are ready, but nothing could be done).
[[nodiscard]] result<std::size_t> begin_seal_all(const cache_pool& pool, std::size_t most = SIZE_MAX) noexcept;

/// Work items in the queue that are not done.
[[nodiscard]] std::size_t seal_items(const cache_pool& pool) noexcept;

/// Does item `item`, counted from the first that is not done. Different items may run at the same time, and beside everything
/// but finish_seal, cancel_seal and set_format. `scratch`: scratch_bytes(format). Errors: bad_argument (no such item), buffer_too_small. That
/// a tile cannot be sealed is no error here.
template <class Arch = simd::native_arch>
[[nodiscard]] status seal_item(const cache_pool& pool, std::size_t item, std::span<std::byte> scratch) noexcept;

/// The first `items` items are done: tiles whose last one is among them become records, or stay exact. No other thread may use
/// their sequences meanwhile. First in, first out: it stops at a tile that has an item which was not done, or failed.
seal_report finish_seal(const cache_pool& pool, std::size_t items) noexcept;

/// Takes a sequence's tiles out of the queue, closed or not, so that close() gives back all that it holds; says how many. No
/// item may run meanwhile.
std::size_t cancel_seal(const cache_pool& pool, sequence_id id) noexcept;

/// All ready tiles of a sequence, in this thread, without the queue; stops early where no record block is free.
/// Errors: stale_handle, buffer_too_small (scratch_bytes(format)), no_room (tiles are ready, but nothing could be done).
template <class Arch = simd::native_arch>
[[nodiscard]] result<seal_report> seal(const cache_pool& pool, sequence_id id, std::span<std::byte> scratch,
                                       std::size_t most = SIZE_MAX) noexcept;

// --- implementation ----------------------------------------------------------------------------------------------------

namespace detail {

/// Whether a span of committed tokens, old enough, is a tile to seal.
[[nodiscard]] KVARN_INLINE bool is_ready(const pool_state& s, const cache_span& span, std::int32_t block) noexcept
{
    return !span.sealed && !span.sink && span.count == s.group && s.blocks.kept[block] == status::ok &&
           s.blocks.exact.link[block] != being_sealed;
}

/// Calls body(index) for ready spans, oldest first, until it says false. Under the lock.
template <class F>
KVARN_INLINE void for_ready(const pool_state& s, std::uint32_t slot, F&& body) noexcept
{
    const sequence_state& q = s.sequences[slot];
    const cache_span* const spans = s.spans_of(slot);
    std::size_t before = 0;
    for (std::size_t i = 0; i < q.spans; ++i) {
        before += spans[i].count;
        if (before + s.config.recent_tokens > q.committed) return;
        if (is_ready(s, spans[i], s.table_of(slot)[i]) && !body(i)) return;
    }
}

/// Where the oldest ready tile begins; -1: none is ready.
[[nodiscard]] KVARN_INLINE std::int64_t first_ready_position(pool_state& s, std::uint32_t slot) noexcept
{
    const pool_lock lock(s.lock);
    std::int64_t position = -1;
    for_ready(s, slot, [&](std::size_t i) KVARN_LAMBDA {
        position = s.spans_of(slot)[i].position;
        return false;
    });
    return position;
}

/// The tile becomes one of the record's holders instead of the exact block's. Under the lock.
KVARN_INLINE void replace_by_record(pool_state& s, std::uint32_t slot, std::size_t span, std::int32_t record) noexcept
{
    std::int32_t& block = s.table_of(slot)[span];
    s.blocks.release_exact(block);
    block = record;
    s.spans_of(slot)[span].sealed = true;
}

/// No item of a tile is done.
KVARN_INLINE void forget_items(const pool_state& s, seal_job& job) noexcept
{
    job.failure = ~std::uint64_t{0};
    for (std::size_t i = 0; i < s.item_words; ++i) s.items_of(job.record)[i] = 0;
}

[[nodiscard]] KVARN_INLINE bool all_items(const pool_state& s, const seal_job& job) noexcept
{
    for (std::size_t i = 0, left = s.layers * s.heads; i < s.item_words; ++i, left -= 64) {
        const std::uint64_t all = left < 64 ? (std::uint64_t{1} << left) - 1 : ~std::uint64_t{0};
        if (__atomic_load_n(s.items_of(job.record) + i, __ATOMIC_ACQUIRE) != all) return false;
    }
    return true;
}

/// Takes the oldest ready tile of a sequence that has no record; those before it get theirs, and `changed` says that there were
/// any. False: nothing is left, or no record block; `out` says no_room if that is all that happened.
KVARN_INLINE bool take_tile(pool_state& s, sequence_id id, seal_job& job, bool& changed, status& out) noexcept
{
    bool taken = false;
    const pool_lock lock(s.lock);
    for_ready(s, id.slot, [&](std::size_t i) KVARN_LAMBDA {
        const std::int32_t block = s.table_of(id.slot)[i], made = s.blocks.exact.link[block];
        if (made >= 0) {
            s.blocks.records.hold(made);
            replace_by_record(s, id.slot, i, made);
            changed = true;
            return true;
        }
        if (s.blocks.records.free == 0) {
            if (!changed) out = status::no_room;
            return false;
        }
        s.blocks.exact.hold(block);
        s.blocks.exact.link[block] = being_sealed;
        job = {block, s.blocks.records.take(), id.slot, id.generation, s.spans_of(id.slot)[i].position, ~std::uint64_t{0}};
        forget_items(s, job);
        changed = taken = true;
        return false;
    });
    return taken;
}

/// Encodes one layer and head of a tile. A failure is kept in the job, that of the lowest item.
template <class Arch>
KVARN_NOINLINE status encode_item(const pool_state& s, seal_job& job, std::size_t item, std::span<std::byte> scratch) noexcept
{
    const head_place& place = s.places[item];
    if (scratch.size() < scratch_bytes(place.f)) return status::buffer_too_small;
    encode_options options = s.config.encode;
    options.key_basis = s.config.key_basis;
    options.value_basis = s.config.value_basis;
    const auto tile = [&]<class T>(std::type_identity<T>, std::byte* base, std::size_t row) KVARN_LAMBDA {
        if (row == 0) return kv_view<const T>{};
        return token_major(reinterpret_cast<const T*>(s.token_at(base, row, job.exact, 0)), s.group, 1, row / sizeof(T));
    };
    const auto encode = [&](auto type) KVARN_LAMBDA {
        return quantize_kv<Arch>(place.f, tile(type, place.keys, s.key_row), tile(type, place.values, s.value_row),
                                 place.record(job.record), scratch, options);
    };
    const status said = s.config.exact == exact_type::f32   ? encode(std::type_identity<float>{})
                        : s.config.exact == exact_type::f16 ? encode(std::type_identity<half>{})
                                                            : encode(std::type_identity<bfloat16>{});
    if (said != status::ok) {
        const std::uint64_t mine = std::uint64_t{item} << 8 | static_cast<std::uint64_t>(said);
        std::uint64_t known = __atomic_load_n(&job.failure, __ATOMIC_RELAXED);
        while (mine < known &&
               !__atomic_compare_exchange_n(&job.failure, &known, mine, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {}
    }
    __atomic_fetch_or(s.items_of(job.record) + item / 64, std::uint64_t{1} << item % 64, __ATOMIC_RELEASE);
    return status::ok;
}

/// All items of a tile are done: it becomes a record, where its sequence still has it whole.
KVARN_INLINE void settle(pool_state& s, const seal_job& job, seal_report& report) noexcept
{
    const pool_lock lock(s.lock);
    const sequence_state& q = s.sequences[job.slot];
    std::size_t span = q.spans;
    if (q.open && q.generation == job.generation) {
        const cache_span* const spans = s.spans_of(job.slot);
        for (std::size_t i = 0; i < q.spans && span == q.spans; ++i)
            if (spans[i].position == job.position && !spans[i].sealed && s.table_of(job.slot)[i] == job.exact &&
                spans[i].count == s.group)
                span = i;
    }
    s.blocks.exact.link[job.exact] = no_block;
    if (job.failure != ~std::uint64_t{0}) {
        const auto why = static_cast<status>(job.failure & 0xff);
        s.blocks.kept[job.exact] = why;
        s.blocks.records.release(job.record);
        (why == status::not_finite ? s.sealing.not_finite : s.sealing.overflowed) += 1;
        if (report.kept_exact++ == 0) {
            const std::size_t item = static_cast<std::uint32_t>(job.failure >> 8);
            report.sequence = {job.slot, job.generation};
            report.position = job.position;
            report.layer = item / s.heads;
            report.head = item % s.heads;
            report.why = why;
        }
    } else {
        // Others that hold the exact block find the record by the link, if it stays.
        s.blocks.link(job.exact, job.record);
        if (span != q.spans) {
            replace_by_record(s, job.slot, span, job.record);
            ++s.sealing.sealed;
            ++report.sealed;
        } else {
            s.blocks.release_record(job.record);
            ++report.dropped;
        }
    }
    s.blocks.release_exact(job.exact);
}

/// Puts a job at the end of the queue.
KVARN_INLINE void add_job(pool_state& s, const seal_job& job) noexcept
{
    const pool_lock lock(s.lock);
    ::new (static_cast<void*>(s.jobs + s.job_count)) seal_job(job);
    __atomic_store_n(&s.job_count, s.job_count + 1, __ATOMIC_RELEASE);
}

/// Takes the first jobs out of the queue.
KVARN_INLINE void drop_jobs(pool_state& s, std::size_t tiles) noexcept
{
    if (tiles == 0) return;
    const pool_lock lock(s.lock);
    const std::size_t left = s.job_count - tiles;
    for (std::size_t i = 0; i < left; ++i) s.jobs[i] = s.jobs[i + tiles];
    __atomic_store_n(&s.job_count, left, __ATOMIC_RELEASE);
}

}  // namespace detail

KVARN_INLINE std::size_t ready_tiles(const cache_pool& pool, sequence_id id) noexcept
{
    std::size_t n = 0;
    if (pool.find(id) == nullptr) return n;
    const detail::pool_lock lock(pool.state().lock);
    detail::for_ready(pool.state(), id.slot, [&](std::size_t) KVARN_LAMBDA { return ++n != 0; });
    return n;
}

KVARN_INLINE result<std::size_t> begin_seal(const cache_pool& pool, sequence_id id, std::size_t most) noexcept
{
    if (pool.find(id) == nullptr) return status::stale_handle;
    detail::pool_state& s = pool.state();
    std::size_t queued = 0;
    bool changed = false;
    status said = status::ok;
    for (detail::seal_job job; queued < most && detail::take_tile(s, id, job, changed, said); ++queued) detail::add_job(s, job);
    if (said != status::ok) return said;
    return queued;
}

KVARN_INLINE result<std::size_t> begin_seal_all(const cache_pool& pool, std::size_t most) noexcept
{
    detail::pool_state& s = pool.state();
    std::size_t queued = 0;
    bool changed = false;
    status said = status::ok;
    for (bool any = true; any && queued < most;) {
        any = false;
        for (std::uint32_t slot = 0; slot < s.config.sequences && queued < most; ++slot) {
            detail::seal_job job;
            if (!s.sequences[slot].open) continue;
            if (!detail::take_tile(s, {slot, s.sequences[slot].generation}, job, changed, said)) continue;
            detail::add_job(s, job);
            ++queued;
            any = true;
        }
    }
    if (!changed && said != status::ok) return said;  // otherwise another sequence had something
    return queued;
}

KVARN_INLINE std::size_t seal_items(const cache_pool& pool) noexcept
{
    const detail::pool_state& s = pool.state();
    return __atomic_load_n(&s.job_count, __ATOMIC_ACQUIRE) * s.layers * s.heads - s.items_done;
}

template <class Arch>
status seal_item(const cache_pool& pool, std::size_t item, std::span<std::byte> scratch) noexcept
{
    const detail::pool_state& s = pool.state();
    const std::size_t each = s.layers * s.heads, number = s.items_done + item;
    if (item >= seal_items(pool)) return status::bad_argument;
    return detail::encode_item<Arch>(s, s.jobs[number / each], number % each, scratch);
}

KVARN_INLINE seal_report finish_seal(const cache_pool& pool, std::size_t items) noexcept
{
    detail::pool_state& s = pool.state();
    const std::size_t each = s.layers * s.heads, open = seal_items(pool);
    std::size_t done = s.items_done + (items < open ? items : open), tiles = 0;
    seal_report report;
    for (; tiles < done / each; ++tiles) {
        detail::seal_job& job = s.jobs[tiles];
        if (!detail::all_items(s, job)) {
            for (std::size_t i = tiles; i <= done / each && i < s.job_count; ++i) {
                report.unfinished += i < done / each;
                detail::forget_items(s, s.jobs[i]);
            }
            done = tiles * each;
            break;
        }
        detail::settle(s, job, report);
    }
    detail::drop_jobs(s, tiles);
    s.items_done = done % each;
    return report;
}

KVARN_INLINE std::size_t cancel_seal(const cache_pool& pool, sequence_id id) noexcept
{
    detail::pool_state& s = pool.state();
    const detail::pool_lock lock(s.lock);
    std::size_t left = 0, count = s.job_count;
    for (std::size_t i = 0; i < count; ++i) {
        const detail::seal_job job = s.jobs[i];
        if (job.slot != id.slot || job.generation != id.generation) {
            s.jobs[left++] = job;
            continue;
        }
        if (i == 0) s.items_done = 0;
        s.blocks.exact.link[job.exact] = detail::no_block;
        s.blocks.release_record(job.record);
        s.blocks.release_exact(job.exact);
    }
    __atomic_store_n(&s.job_count, left, __ATOMIC_RELEASE);
    return count - left;
}

template <class Arch>
result<seal_report> seal(const cache_pool& pool, sequence_id id, std::span<std::byte> scratch, std::size_t most) noexcept
{
    if (pool.find(id) == nullptr) return status::stale_handle;
    detail::pool_state& s = pool.state();
    for (std::size_t i = 0; i < s.layers * s.heads; ++i)
        if (scratch.size() < scratch_bytes(s.places[i].f)) return status::buffer_too_small;
    seal_report report;
    bool changed = false;
    status said = status::ok;
    std::size_t tiles = 0;
    for (detail::seal_job job; tiles < most && detail::take_tile(s, id, job, changed, said); ++tiles) {
        for (std::size_t i = 0; i < s.layers * s.heads && job.failure == ~std::uint64_t{0}; ++i)
            static_cast<void>(detail::encode_item<Arch>(s, job, i, scratch));
        detail::settle(s, job, report);
    }
    if (said != status::ok) return said;
    return report;
}

}  // namespace kvarn
