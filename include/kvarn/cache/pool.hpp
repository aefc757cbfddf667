// SPDX-License-Identifier: Apache-2.0
#pragma once
// The cache of an engine: sequences that grow by drafts, are committed, rolled back, cut, forked and closed, over blocks in the
// caller's memory. In: a cache_config and memory of plan_cache(config).bytes() bytes. Nothing allocates after make_pool.
//
// The life of a token: reserve() makes room for drafts in all layers, store() (cache/tokens.hpp) writes them layer by layer,
// commit() lets the first of them count and drops the others, sealing (cache/seal.hpp) turns full tiles into records. Attention
// is in cache/tasks.hpp. Every operation does all of what it says, or nothing and returns a status.
//
// Threads: operations on different sequences may run at the same time; one sequence belongs to one thread at a time, but for
// store() of different layers or heads, items of sealing and items of attention.

#include <kvarn/base/config.hpp>  // first: it refuses older standards

#include <cstddef>
#include <cstdint>
#include <span>

#include <kvarn/cache/state.hpp>

namespace kvarn {

/// Blocks of one kind: used + free is what the pool has, shared are held more than once: by forks, by the parts of a tile that
/// erase() has cut in two, by the queue of sealing.
struct block_usage {
    std::size_t used = 0, free = 0, shared = 0;
};

/// What a pool holds.
struct pool_statistics {
    block_usage records, exact;
    std::size_t bytes_used = 0;             ///< of blocks
    std::size_t tiles_sealed = 0;           ///< since the pool was made
    std::size_t tiles_kept_not_finite = 0;  ///< tiles that sealing refused, since the pool was made: they stay exact
    std::size_t tiles_kept_overflowed = 0;
    std::size_t sequences = 0;  ///< open
};

/// What a sequence holds.
struct sequence_statistics {
    std::size_t tokens = 0;  ///< committed
    std::size_t drafts = 0;
    std::size_t sealed_tokens = 0;  ///< of the committed ones, those in records
    std::size_t dead_tokens = 0;    ///< places of its record blocks that it does not see: behind rollbacks and erasures
    std::size_t kept_tiles = 0;     ///< tiles that sealing refused, of which it sees all or a part
    std::size_t record_blocks = 0, exact_blocks = 0, spans = 0;
    std::size_t own_records = 0, own_exact = 0;  ///< of those blocks, the ones that nobody else holds: what close() gives back
    std::int64_t next_position = 0;
};

/// Room for `tokens` more drafts of a sequence.
struct sequence_room {
    sequence_id sequence{};
    std::size_t tokens = 0;
};

/// A pool in the caller's memory. A value like a pointer: copies name the same pool. Made by make_pool.
class cache_pool {
public:
    KVARN_INLINE cache_pool() noexcept {}

    /// The configuration, completed.
    [[nodiscard]] KVARN_INLINE const cache_config& config() const noexcept { return s_->config; }
    [[nodiscard]] KVARN_INLINE const cache_plan& plan() const noexcept { return s_->plan; }
    [[nodiscard]] KVARN_INLINE std::size_t layers() const noexcept { return s_->layers; }
    [[nodiscard]] KVARN_INLINE std::size_t heads() const noexcept { return s_->heads; }  ///< KV heads of a layer
    [[nodiscard]] KVARN_INLINE const format& format_of(std::size_t layer, std::size_t head) const noexcept
    {
        return s_->place(layer, head).f;
    }

    /// Other bases for one head, as choose_format finds them; the sizes of the pool stay as they are. Errors, nothing changes:
    /// bad_argument (no such head, another format but for its rotations, or there are records already, or exact tokens in the
    /// basis of the records: they would be read in the wrong one).
    [[nodiscard]] status set_format(std::size_t layer, std::size_t head, const format& f) noexcept;

    /// A new sequence, its first token at `first_position` (left padding needs no tokens: begin behind it).
    /// Errors: no_room (all sequences are open), bad_argument (a position below 0 or beyond 2^60).
    [[nodiscard]] result<sequence_id> open(std::int64_t first_position = 0) noexcept;
    /// Gives its blocks back; tiles in the queue of sealing hold theirs until finish_seal, or cancel_seal before. Error:
    /// stale_handle, as for all functions below.
    [[nodiscard]] status close(sequence_id id) noexcept;

    /// Room for `tokens` more drafts in all layers. Errors: no_room (blocks), sequence_full (most_tokens, most_spans).
    [[nodiscard]] status reserve(sequence_id id, std::size_t tokens) noexcept;
    /// The same for a batch: room for all of it, or nothing changes. `failed`, if given, is set to the one that has the error, of
    /// no_room the first that finds none. Errors: those of each; bad_argument (a sequence is named twice).
    [[nodiscard]] status reserve(std::span<const sequence_room> batch, std::size_t* failed = nullptr) noexcept;
    /// The first `tokens` drafts count from now on, the others are gone. Errors: bad_argument (there are fewer drafts, or some
    /// of them were not stored in some layer and head).
    [[nodiscard]] status commit(sequence_id id, std::size_t tokens) noexcept;
    /// The same for a path through a tree of drafts: those with the given numbers, in rising order, follow each other from now
    /// on.
    [[nodiscard]] status commit(sequence_id id, std::span<const std::size_t> drafts) noexcept;
    /// Drops all drafts and every token at or behind `position`; the next one goes there, or where it would have gone, if that
    /// is before. Sealed tiles are cut, not decoded. Errors: bad_argument (before the first position).
    [[nodiscard]] status truncate(sequence_id id, std::int64_t position) noexcept;
    /// Drops the tokens at positions [begin, end); the others keep their positions. Errors: bad_argument (end < begin, or there
    /// are drafts), sequence_full (most_spans: a span would become two).
    [[nodiscard]] status(erase)(sequence_id id, std::int64_t begin, std::int64_t end) noexcept;  // curses.h has a macro erase()
    /// Drops the `tokens` oldest tokens behind the sink. Errors as for erase, and bad_argument (there are not so many).
    [[nodiscard]] status evict_front(sequence_id id, std::size_t tokens) noexcept;
    /// A second sequence with the same tokens; they share all blocks until one of them changes. Errors: no_room (all sequences
    /// are open), bad_argument (there are drafts).
    [[nodiscard]] result<sequence_id> fork(sequence_id id) noexcept;

    [[nodiscard]] KVARN_INLINE bool is_open(sequence_id id) const noexcept { return find(id) != nullptr; }
    /// Committed tokens; 0 for a stale handle.
    [[nodiscard]] KVARN_INLINE std::size_t tokens(sequence_id id) const noexcept
    {
        return find(id) != nullptr ? find(id)->committed : 0;
    }
    [[nodiscard]] KVARN_INLINE std::size_t drafts(sequence_id id) const noexcept
    {
        return find(id) != nullptr ? find(id)->drafts : 0;
    }
    /// Where the next draft goes; -1 for a stale handle.
    [[nodiscard]] KVARN_INLINE std::int64_t next_position(sequence_id id) const noexcept
    {
        return find(id) != nullptr ? find(id)->next_position : -1;
    }

    [[nodiscard]] pool_statistics statistics() const noexcept;
    [[nodiscard]] result<sequence_statistics> statistics(sequence_id id) const noexcept;

    /// For the other headers of cache/.
    [[nodiscard]] KVARN_INLINE detail::pool_state& state() const noexcept { return *s_; }
    [[nodiscard]] KVARN_INLINE detail::sequence_state* find(sequence_id id) const noexcept
    {
        if (id.slot >= s_->config.sequences) return nullptr;
        detail::sequence_state& q = s_->sequences[id.slot];
        return q.open && q.generation == id.generation ? &q : nullptr;
    }

    friend result<cache_pool> make_pool(const cache_config& config, std::span<std::byte> memory) noexcept;

private:
    detail::pool_state* s_ = nullptr;
};

/// Makes a pool in `memory`, of at least plan_cache(config).bytes() bytes at any alignment, which must outlive it; nothing needs
/// to be zero. The pool ends with its memory: there is nothing to destroy. Errors: those of plan_cache, null_pointer,
/// buffer_too_small.
[[nodiscard]] result<cache_pool> make_pool(const cache_config& config, std::span<std::byte> memory) noexcept;

// --- implementation ----------------------------------------------------------------------------------------------------

namespace detail {

[[nodiscard]] KVARN_INLINE std::byte* aligned_to_line(std::byte* p) noexcept
{
    return p + (64 - reinterpret_cast<std::uintptr_t>(p) % 64) % 64;
}

}  // namespace detail

KVARN_INLINE result<cache_pool> make_pool(const cache_config& config, std::span<std::byte> memory) noexcept
{
    const auto plan = plan_cache(config);
    if (!plan) return plan.error;
    if (memory.data() == nullptr) return status::null_pointer;
    if (memory.size() < plan->bytes()) return status::buffer_too_small;
    const cache_config c = completed(config);
    detail::memory_cutter cut(detail::aligned_to_line(memory.data()));
    const detail::pool_arrays a = detail::cut_arrays(c, cut);

    detail::pool_state& s = *detail::construct(a.state, 1);
    s.config = c;
    s.plan = *plan;
    s.layers = static_cast<std::size_t>(c.policy.layers());
    s.heads = static_cast<std::size_t>(c.policy.heads());
    s.group = detail::group_of(c);
    const format base = c.policy.base();
    s.key_row = static_cast<std::size_t>(base.key_channels()) * element_bytes(c.exact);
    s.value_row = static_cast<std::size_t>(base.head_dim_v()) * element_bytes(c.exact);
    s.blocks.records = {a.record_holders, a.record_link, a.record_unused, static_cast<std::uint32_t>(c.record_blocks), 0, 0};
    s.blocks.exact = {a.exact_holders, a.exact_link, a.exact_unused, static_cast<std::uint32_t>(c.exact_blocks), 0, 0};
    s.blocks.kept = a.kept;
    s.blocks.reset();
    s.places = detail::construct(a.places, s.layers * s.heads);
    std::byte* records = detail::aligned_to_line(memory.data()) + cut.used();
    std::byte* exact = detail::aligned_to_line(records + plan->records);
    for (std::size_t i = 0; i < s.layers * s.heads; ++i) {
        detail::head_place& p = s.places[i];
        p.f = c.policy.format_of(static_cast<int>(i / s.heads), static_cast<int>(i % s.heads));
        p.record_bytes = record_bytes(p.f);
        p.records = records;
        records += p.record_bytes * c.record_blocks;
        p.keys = exact;
        exact += s.key_row * s.group * c.exact_blocks;
        p.values = exact;
        exact += s.value_row * s.group * c.exact_blocks;
    }
    s.sequences = detail::construct(a.sequences, c.sequences);
    s.unused = a.unused;
    s.free_slots = c.sequences;
    for (std::size_t i = 0; i < c.sequences; ++i) s.unused[i] = static_cast<std::uint32_t>(c.sequences - 1 - i);
    s.spans = a.spans;
    s.tables = a.tables;
    s.stored = a.stored;
    s.jobs = a.jobs;
    s.sealed_items = a.sealed_items;
    s.item_words = detail::divide_up(s.layers * s.heads, 64);
    cache_pool pool;
    pool.s_ = &s;
    return pool;
}

KVARN_INLINE status cache_pool::set_format(std::size_t layer, std::size_t head, const format& f) noexcept
{
    if (layer >= s_->layers || head >= s_->heads) return status::bad_argument;
    detail::head_place& place = s_->places[layer * s_->heads + head];
    format_spec same = f.spec();
    same.key_rotation = place.f.spec().key_rotation;
    same.value_rotation = place.f.spec().value_rotation;
    if (!(same == place.f.spec())) return status::bad_argument;
    const detail::pool_lock lock(s_->lock);
    if (s_->blocks.records.free != s_->blocks.records.total) return status::bad_argument;
    const bool moves = (s_->config.key_basis == basis::rotated && f.keys_rotated() != place.f.keys_rotated()) ||
                       (s_->config.value_basis == basis::rotated && f.values_rotated() != place.f.values_rotated());
    if (moves && s_->blocks.exact.free != s_->blocks.exact.total) return status::bad_argument;
    place.f = f;
    return status::ok;
}

KVARN_INLINE pool_statistics cache_pool::statistics() const noexcept
{
    const detail::pool_lock lock(s_->lock);
    const auto usage = [](const detail::block_list& b) KVARN_LAMBDA { return block_usage{b.total - b.free, b.free, b.shared}; };
    pool_statistics n;
    n.records = usage(s_->blocks.records);
    n.exact = usage(s_->blocks.exact);
    n.bytes_used = n.records.used * s_->plan.record_block_bytes + n.exact.used * s_->plan.exact_block_bytes;
    n.tiles_sealed = s_->sealing.sealed;
    n.tiles_kept_not_finite = s_->sealing.not_finite;
    n.tiles_kept_overflowed = s_->sealing.overflowed;
    n.sequences = s_->config.sequences - s_->free_slots;
    return n;
}

KVARN_INLINE result<sequence_statistics> cache_pool::statistics(sequence_id id) const noexcept
{
    const detail::sequence_state* const q = find(id);
    if (q == nullptr) return status::stale_handle;
    sequence_statistics n;
    n.tokens = q->committed;
    n.drafts = q->drafts;
    n.spans = q->spans;
    n.next_position = q->next_position;
    const detail::cache_span* const spans = s_->spans_of(id.slot);
    const std::int32_t* const table = s_->table_of(id.slot);
    const auto parts_of = [&](std::size_t i) KVARN_LAMBDA {
        std::uint32_t parts = 1;
        while (i + parts < q->spans && table[i + parts] == table[i] && spans[i + parts].sealed == spans[i].sealed) ++parts;
        return parts;
    };
    const detail::pool_lock lock(s_->lock);
    for (std::size_t i = 0; i < q->spans; ++i) {
        const bool again =
            i != 0 && spans[i].sealed == spans[i - 1].sealed && table[i] == table[i - 1];  // two parts of one block
        if (spans[i].sealed) {
            n.record_blocks += !again;
            n.own_records += !again && s_->blocks.records.holders[table[i]] == parts_of(i);
            n.sealed_tokens += spans[i].count;
            n.dead_tokens += (again ? 0 : s_->group) - spans[i].count;
        } else {
            n.exact_blocks += !again;
            n.own_exact += !again && s_->blocks.exact.holders[table[i]] == parts_of(i);
            n.kept_tiles += !again && s_->blocks.kept[table[i]] != status::ok;
        }
    }
    return n;
}

}  // namespace kvarn

#include <kvarn/cache/sequence.hpp>  // what the operations do
