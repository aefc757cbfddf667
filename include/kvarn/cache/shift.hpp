// SPDX-License-Identifier: Apache-2.0
#pragma once
// Tokens of a cache at other positions ("context shift"): keys hold their rotary position, so the engine turns them by the
// difference and they are kept anew. In: a range of positions, how far, and the engine's rotation. Exact tokens are rounded once
// more; keys of sealed tiles are decoded, turned and encoded again, which costs accuracy each time: erase() and positions with
// gaps cost none. Values of V do not change, and their part of a record is copied. No allocation; works in scratch.

#include <kvarn/base/config.hpp>  // first: it refuses older standards

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>

#include <kvarn/cache/pool.hpp>
#include <kvarn/cache/seal.hpp>
#include <kvarn/cache/tokens.hpp>

namespace kvarn {

/// What shift_positions did.
struct shift_report {
    std::size_t tokens = 0;         ///< that moved
    std::size_t sealed_tokens = 0;  ///< of those, in records: encoded again
    double relative_error = 0;      ///< that their new encoding adds to keys, all heads: |decoded - turned| / |turned|
};

/// Scratch for shift_positions, at any alignment.
[[nodiscard]] KVARN_INLINE constexpr std::size_t shift_scratch_bytes(const format& f) noexcept
{
    return read_scratch_bytes(f) + 2 * static_cast<std::size_t>(f.group() * f.key_channels()) * sizeof(float) + 63;
}

/// Moves the tokens at positions [begin, end) by `by`, which leaves their order as it is. `turn(layer, head, keys, position)`
/// turns keys [tokens][1][key_channels], of consecutive positions from `position` on, in place, from there to position + by; it
/// is called for each run of tokens, layer and KV head, with keys in the basis of cache_config. next_position moves along with
/// the last token. Other holders of the blocks keep theirs: it takes a free sequence slot, a free block for each block with
/// tokens in the range, and one exact block. Errors, nothing changes: stale_handle, bad_argument (end < begin, drafts, positions
/// that would overlap others or leave [first position, 2^60]), no_room, sequence_full (most_spans), buffer_too_small,
/// scale_overflow (turned keys that no record can hold).
template <class Arch = simd::native_arch, class Turn>
[[nodiscard]] result<shift_report> shift_positions(const cache_pool& pool, sequence_id id, std::int64_t begin, std::int64_t end,
                                                   std::int64_t by, Turn&& turn, std::span<std::byte> scratch) noexcept;

namespace detail {

struct shift_sums {
    double error = 0, square = 0;
};

/// Takes a block, or says that there is none.
[[nodiscard]] KVARN_INLINE std::int32_t take_block(pool_state& s, bool record) noexcept
{
    const pool_lock lock(s.lock);
    block_list& list = record ? s.blocks.records : s.blocks.exact;
    return list.free == 0 ? no_block : record ? list.take() : s.blocks.take_exact();
}

/// Span i of a sequence in a block of its own with turned keys: exact, or, where it is a whole record, a record again.
template <class Arch, class Turn>
status turn_span(const cache_pool& pool, sequence_id id, std::size_t i, Turn& turn, std::span<std::byte> scratch,
                 shift_report& report, shift_sums& sums) noexcept
{
    pool_state& s = pool.state();
    cache_span& span = s.spans_of(id.slot)[i];
    std::int32_t& block = s.table_of(id.slot)[i];
    const format& any = s.places[0].f;
    const auto channels = static_cast<std::size_t>(any.key_channels());
    float* const keys = reinterpret_cast<float*>(aligned_to_line(scratch.data()));
    float* const again = keys + s.group * channels;
    const std::span<std::byte> rest = scratch.last(read_scratch_bytes(any));
    const bool whole = span.sealed && span.count == s.group;

    seal_job job;
    job.exact = take_block(s, false);
    if (job.exact == no_block) return status::no_room;
    if (whole) job.record = take_block(s, true);
    status said = whole && job.record == no_block ? status::no_room : status::ok;
    const std::size_t first = whole ? 0 : span.first;
    for (std::size_t p = 0; p < s.layers * s.heads && said == status::ok; ++p) {
        const head_place& place = s.places[p];
        const kv_view<float> turned = token_major(keys, std::size_t{span.count}, 1, channels);
        const output_view k = exact_rows<false>(s, place.keys, s.key_row, job.exact, first, span.count);
        const output_view v = exact_rows<false>(s, place.values, s.value_row, job.exact, first, span.count);
        said = read<Arch>(pool, id, p / s.heads, p % s.heads, span.position, span.end(), output_view(turned), v, rest);
        if (said != status::ok) break;
        turn(p / s.heads, p % s.heads, turned, span.position);
        said = convert<Arch>(input_view(kv_view<const float>(turned)), k);
        if (said != status::ok || !whole) continue;
        said = encode_item<Arch>(s, job, p, rest);
        if (said != status::ok || job.failure != ~std::uint64_t{0}) break;
        const record_grid<std::byte> made = place.record(job.record);
        const record_layout at = layout_of(place.f);
        std::memcpy(made.data + at.v_codes, place.record(block).data + at.v_codes, at.exact - at.v_codes);
        said = dequantize_kv<Arch>(place.f, made, token_major(again, s.group, 1, channels), kv_view<float>{}, s.config.key_basis,
                                   rest);
        for (std::size_t c = 0; c < s.group * channels; ++c) {
            const auto x = static_cast<double>(keys[c]), d = static_cast<double>(again[c]) - x;
            sums.error += d * d;
            sums.square += x * x;
        }
    }
    if (said == status::ok && job.failure != ~std::uint64_t{0})
        said = status::scale_overflow;  // turned keys are no larger: only in records on the edge
    const pool_lock lock(s.lock);
    if (said != status::ok) {
        s.blocks.release_exact(job.exact);
        if (job.record >= 0) s.blocks.release_record(job.record);
        return said;
    }
    release_block(s, span, block);
    report.tokens += span.count;
    if (whole) {
        block = job.record;
        s.blocks.release_exact(job.exact);
        report.sealed_tokens += span.count;
    } else {
        block = job.exact;
        report.sealed_tokens += span.sealed ? span.count : 0u;
        span.sealed = false;
    }
    return status::ok;
}

}  // namespace detail

template <class Arch, class Turn>
result<shift_report> shift_positions(const cache_pool& pool, sequence_id id, std::int64_t begin, std::int64_t end,
                                     std::int64_t by, Turn&& turn, std::span<std::byte> scratch) noexcept
{
    detail::sequence_state* const q = pool.find(id);
    if (q == nullptr) return status::stale_handle;
    if (end < begin || q->drafts != 0 || by < -detail::largest_position || by > detail::largest_position)
        return status::bad_argument;
    detail::pool_state& s = pool.state();
    if (scratch.size() < shift_scratch_bytes(s.places[0].f)) return status::buffer_too_small;
    shift_report report;
    if (by == 0 || count_tokens(pool, id, begin, end) == 0) return report;

    // All of it in a fork, which then takes the sequence's place.
    cache_pool mine = pool;
    const auto fork = mine.fork(id);
    if (!fork) return fork.error;
    detail::sequence_state& f = s.sequences[fork->slot];
    detail::cache_span* const spans = s.spans_of(fork->slot);
    std::size_t from = 0;
    status said = status::ok;
    const auto split = [&](std::size_t i, std::int64_t position) KVARN_LAMBDA {
        if (f.spans == s.config.most_spans) {
            said = status::sequence_full;
            return;
        }
        const detail::pool_lock lock(s.lock);
        detail::split_span(s, fork->slot, i, static_cast<std::size_t>(position - spans[i].position));
    };
    while (spans[from].end() <= begin) ++from;
    if (spans[from].position < begin) split(from++, begin);
    std::size_t to = from;
    for (; said == status::ok && to < f.spans && spans[to].position < end; ++to)
        if (spans[to].end() > end) split(to, end);
    if (said == status::ok) {
        const std::int64_t least = from != 0 ? spans[from - 1].end() : f.first_position;
        const std::int64_t most = to != f.spans ? spans[to].position : detail::largest_position;
        if (spans[from].position + by < least || spans[to - 1].end() + by > most) said = status::bad_argument;
    }
    detail::shift_sums sums;
    for (std::size_t i = from; i < to && said == status::ok; ++i)
        said = detail::turn_span<Arch>(pool, *fork, i, turn, scratch, report, sums);
    if (said == status::ok) {
        const bool last = to == f.spans;
        for (std::size_t i = from; i < to; ++i) spans[i].position += by;
        if (last) f.next_position += by;
        report.relative_error = sums.square > 0 ? std::sqrt(sums.error / sums.square) : 0;
        detail::cache_span* const old_spans = s.spans_of(id.slot);
        std::int32_t *const table = s.table_of(fork->slot), *const old_table = s.table_of(id.slot);
        for (std::size_t i = 0; i < f.spans || i < q->spans; ++i) {
            const detail::cache_span span = spans[i];
            const std::int32_t block = table[i];
            spans[i] = old_spans[i];
            table[i] = old_table[i];
            old_spans[i] = span;
            old_table[i] = block;
        }
        const std::size_t count = q->spans;
        q->spans = f.spans;
        f.spans = count;
        q->next_position = f.next_position;
    }
    static_cast<void>(mine.close(*fork));
    if (said != status::ok) return said;
    return report;
}

}  // namespace kvarn
