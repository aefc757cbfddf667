// SPDX-License-Identifier: Apache-2.0
#pragma once
// What a pool keeps in the caller's memory, and where: plan_cache says how much, make_pool lays it out. In: a completed
// configuration. Records of one layer and head lie one after the other, [layer][head][block], and so do exact tokens,
// [layer][head][block][token]: a history is read in order, whatever its blocks.

#include <kvarn/base/config.hpp>  // first: it refuses older standards

#include <cstddef>
#include <cstdint>
#include <new>
#include <span>

#include <kvarn/cache/blocks.hpp>
#include <kvarn/cache/config.hpp>

namespace kvarn {

/// Names a sequence of a pool. A value; one that was closed is known as such for ever (status::stale_handle).
struct sequence_id {
    std::uint32_t slot = 0;
    std::uint32_t generation = 0;  ///< of the slot; 0 names nothing

    friend constexpr bool operator==(sequence_id, sequence_id) noexcept = default;
};

namespace detail {

/// What a sequence sees of a block: tokens [first, first + count) of it, the first of them at `position`.
struct cache_span {
    std::int64_t position = 0;
    std::uint16_t first = 0;
    std::uint16_t count = 0;
    bool sealed = false;  ///< a record block, otherwise an exact one
    bool sink = false;

    [[nodiscard]] KVARN_INLINE constexpr std::int64_t end() const noexcept { return position + count; }
};

/// A sequence: its spans in the order of positions, their blocks in an array beside them (a block table for attention).
struct sequence_state {
    std::uint32_t generation = 1;  ///< of the handle that is, or comes next
    bool open = false;
    bool in_batch = false, copies = false;  ///< while reserve() counts: it was named, and its last block has to be copied
    std::size_t spans = 0;
    std::size_t committed = 0, drafts = 0;  ///< tokens; the spans cover both
    std::int64_t first_position = 0;        ///< the sink is counted from here
    std::int64_t next_position = 0;         ///< of the next draft

    KVARN_INLINE sequence_state() noexcept {}
};

/// One tile on its way from an exact block to a record block. Holds both.
struct seal_job {
    std::int32_t exact = no_block, record = no_block;
    std::uint32_t slot = 0, generation = 0;
    std::int64_t position = 0;
    std::uint64_t failure = ~std::uint64_t{0};  ///< the first item that failed << 8 | its status; set atomically
};

/// Of one layer and head: its format, and where block 0 lies.
struct head_place {
    format f{};
    std::size_t record_bytes = 0;
    std::byte *records = nullptr, *keys = nullptr, *values = nullptr;

    KVARN_INLINE head_place() noexcept {}
    /// The record of a block, as a grid of one.
    [[nodiscard]] KVARN_INLINE record_grid<std::byte> record(std::int32_t block) const noexcept
    {
        return tile_major_records(f, records + static_cast<std::size_t>(block) * record_bytes, record_bytes, 1, 1);
    }
};

struct seal_counts {
    std::size_t sealed = 0, not_finite = 0, overflowed = 0;
};

struct pool_state {
    cache_config config{};  // completed; its policy's rules are the caller's and not looked at again
    std::size_t layers = 0, heads = 0, group = 0;
    std::size_t key_row = 0, value_row = 0;  // bytes of one exact token
    cache_plan plan{};
    pool_blocks blocks{};
    head_place* places = nullptr;         // [layers][heads]
    sequence_state* sequences = nullptr;  // [sequences]
    std::uint32_t* unused = nullptr;      // [sequences], a stack of slots
    std::size_t free_slots = 0;
    cache_span* spans = nullptr;      // [sequences][most_spans]
    std::int32_t* tables = nullptr;   // [sequences][most_spans]
    std::uint32_t* stored = nullptr;  // [sequences][layers][heads]: drafts that are written
    seal_job* jobs = nullptr;         // [record_blocks]
    std::uint64_t* sealed_items = nullptr;  // [record_blocks][item_words]: bits of the heads that are encoded; set atomically
    std::size_t item_words = 0;
    std::size_t job_count = 0, items_done = 0;
    seal_counts sealing{};
    std::uint32_t lock = 0;

    KVARN_INLINE pool_state() noexcept {}

    [[nodiscard]] KVARN_INLINE cache_span* spans_of(std::uint32_t slot) const noexcept
    {
        return spans + slot * config.most_spans;
    }
    [[nodiscard]] KVARN_INLINE std::int32_t* table_of(std::uint32_t slot) const noexcept
    {
        return tables + slot * config.most_spans;
    }
    [[nodiscard]] KVARN_INLINE std::uint32_t* stored_of(std::uint32_t slot) const noexcept
    {
        return stored + slot * layers * heads;
    }
    [[nodiscard]] KVARN_INLINE std::uint64_t* items_of(std::int32_t record) const noexcept
    {
        return sealed_items + static_cast<std::size_t>(record) * item_words;
    }
    /// A token of an exact block, among the keys or values of a head: `base` and `row` are those of either.
    [[nodiscard]] KVARN_INLINE std::byte* token_at(std::byte* base, std::size_t row, std::int32_t block,
                                                   std::size_t token) const noexcept
    {
        return base + (static_cast<std::size_t>(block) * group + token) * row;
    }
    [[nodiscard]] KVARN_INLINE const head_place& place(std::size_t layer, std::size_t head) const noexcept
    {
        return places[layer * heads + head];
    }
};

/// Hands out pieces of memory one after the other, each at a multiple of 64 bytes; without memory it only counts.
class memory_cutter {
public:
    KVARN_INLINE constexpr explicit memory_cutter(std::byte* base) noexcept : base_(base) {}

    template <class T>
    KVARN_INLINE constexpr T* array(std::size_t count) noexcept
    {
        std::byte* const at = bytes(multiply_sizes(count, sizeof(T)));
        return at != nullptr ? reinterpret_cast<T*>(at) : nullptr;
    }
    KVARN_INLINE constexpr std::byte* bytes(std::size_t size) noexcept
    {
        std::byte* const at = base_ != nullptr ? base_ + used_ : nullptr;
        used_ = add_sizes(used_, add_sizes(size, 63) / 64 * 64);
        return at;
    }
    [[nodiscard]] KVARN_INLINE constexpr std::size_t used() const noexcept { return used_; }

private:
    std::byte* base_;
    std::size_t used_ = 0;
};

/// Where the arrays of a pool lie; in a constant expression, how much they take.
struct pool_arrays {
    pool_state* state = nullptr;
    std::uint32_t *record_holders = nullptr, *exact_holders = nullptr;
    std::int32_t *record_link = nullptr, *exact_link = nullptr, *record_unused = nullptr, *exact_unused = nullptr;
    status* kept = nullptr;
    head_place* places = nullptr;
    sequence_state* sequences = nullptr;
    std::uint32_t* unused = nullptr;
    cache_span* spans = nullptr;
    std::int32_t* tables = nullptr;
    std::uint32_t* stored = nullptr;
    seal_job* jobs = nullptr;
    std::uint64_t* sealed_items = nullptr;
};

KVARN_INLINE constexpr pool_arrays cut_arrays(const cache_config& c, memory_cutter& cut) noexcept
{
    const std::size_t heads = static_cast<std::size_t>(c.policy.layers()) * static_cast<std::size_t>(c.policy.heads());
    const std::size_t spans = multiply_sizes(c.sequences, c.most_spans);
    pool_arrays a;
    a.state = cut.array<pool_state>(1);
    a.record_holders = cut.array<std::uint32_t>(c.record_blocks);
    a.record_link = cut.array<std::int32_t>(c.record_blocks);
    a.record_unused = cut.array<std::int32_t>(c.record_blocks);
    a.exact_holders = cut.array<std::uint32_t>(c.exact_blocks);
    a.exact_link = cut.array<std::int32_t>(c.exact_blocks);
    a.exact_unused = cut.array<std::int32_t>(c.exact_blocks);
    a.kept = cut.array<status>(c.exact_blocks);
    a.places = cut.array<head_place>(heads);
    a.sequences = cut.array<sequence_state>(c.sequences);
    a.unused = cut.array<std::uint32_t>(c.sequences);
    a.spans = cut.array<cache_span>(spans);
    a.tables = cut.array<std::int32_t>(spans);
    a.stored = cut.array<std::uint32_t>(multiply_sizes(c.sequences, heads));
    a.jobs = cut.array<seal_job>(c.record_blocks);
    a.sealed_items = cut.array<std::uint64_t>(multiply_sizes(c.record_blocks, divide_up(heads, 64)));
    return a;
}

/// All elements, made by their default constructors.
template <class T>
KVARN_INLINE T* construct(T* at, std::size_t count) noexcept
{
    for (std::size_t i = 0; i < count; ++i) ::new (static_cast<void*>(at + i)) T();
    return at;
}

}  // namespace detail

/// What a pool of this configuration takes. Errors: bad_argument (no layers, sequences, blocks or tokens, or more of them than
/// 2^31; options of the encoder; bases), buffer_too_small (the sizes do not fit std::size_t).
[[nodiscard]] KVARN_INLINE constexpr result<cache_plan> plan_cache(const cache_config& given) noexcept
{
    if (given.policy.layers() < 1 || given.policy.heads() < 1) return status::bad_argument;
    const cache_config c = completed(given);
    if (c.sequences == 0 || c.most_tokens == 0 || c.exact_blocks == 0) return status::bad_argument;
    if (c.sequences > detail::most_blocks || c.record_blocks > detail::most_blocks || c.exact_blocks > detail::most_blocks ||
        c.most_tokens > detail::most_blocks || c.most_spans > detail::most_blocks)
        return status::bad_argument;
    if (c.exact > exact_type::bf16 || c.key_basis > basis::rotated || c.value_basis > basis::rotated ||
        !detail::is_valid(c.encode))
        return status::bad_argument;
    cache_plan plan;
    for (int layer = 0; layer < c.policy.layers(); ++layer)
        for (int head = 0; head < c.policy.heads(); ++head)
            plan.record_block_bytes = detail::add_sizes(plan.record_block_bytes, record_bytes(c.policy.format_of(layer, head)));
    plan.exact_block_bytes = detail::multiply_sizes(cache_elements(c, detail::group_of(c)), element_bytes(c.exact));
    plan.records = detail::multiply_sizes(plan.record_block_bytes, c.record_blocks);
    plan.exact = detail::multiply_sizes(plan.exact_block_bytes, c.exact_blocks);
    detail::memory_cutter cut(nullptr);
    detail::cut_arrays(c, cut);
    plan.state = detail::add_sizes(cut.used(), 3 * 63);  // and where memory, records and exact tokens begin
    if (detail::add_sizes(detail::add_sizes(plan.records, plan.exact), plan.state) > SIZE_MAX / 2)
        return status::buffer_too_small;
    return plan;
}

/// The configuration, completed, with as many record blocks as fit into `bytes` beside its exact blocks, but no more than it
/// has. Errors: those of plan_cache, no_room (not one fits).
[[nodiscard]] KVARN_INLINE constexpr result<cache_config> fit_cache(const cache_config& given, std::size_t bytes) noexcept
{
    cache_config c = completed(given);
    if (const auto plan = plan_cache(c); !plan) return plan.error;
    std::size_t low = 0, high = c.record_blocks;
    while (low < high) {
        c.record_blocks = low + (high - low + 1) / 2;
        if (plan_cache(c)->bytes() <= bytes)
            low = c.record_blocks;
        else
            high = c.record_blocks - 1;
    }
    c.record_blocks = low;
    if (low == 0) return status::no_room;
    return c;
}

}  // namespace kvarn
