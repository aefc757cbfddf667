// SPDX-License-Identifier: Apache-2.0
#pragma once
// A thread block of decode attention as one of its threads sees it: which sequence, head, query rows and share of the history it
// has, its shared memory, and how it begins: queries in the basis and the form that its tokens need. In: a call. Out: queries in
// shared memory, empty outputs. float. No allocation; for one thread block.

#include <cstddef>
#include <cstdint>

#include <kvarn/cuda/attention/call.cuh>
#include <kvarn/cuda/attention/fragments.cuh>
#include <kvarn/cuda/attention/softmax.cuh>
#include <kvarn/cuda/rotate.cuh>

namespace kvarn::cuda::detail {

/// One block's share of the work, as one of its threads sees it.
struct attention_block {
    const attention_call& c;
    attention_memory at;
    float* shared;
    int sequence, head, first_row, split;
    int sinks, tiles, tails;
    int sink_position = 0, tail_position;  // of the first tokens; with no tail, behind the records
    int warp, lane;

    template <class Team>
    KVARN_DEVICE KVARN_INLINE attention_block(Team& team, const attention_call& call, int item, float* memory) noexcept
        : c(call), at(call.dk, call.exact_channels, call.out_dim), shared(memory), warp(team.rank() / 32), lane(team.rank() % 32)
    {
        const int parts = c.a.splits + 1;
        split = item % parts;
        const int rest = item / parts;
        first_row = rest % c.row_blocks * block_rows;
        head = rest / c.row_blocks % c.a.kv_heads;
        sequence = rest / c.row_blocks / c.a.kv_heads;
        sinks = c.a.sink.tokens != nullptr ? c.a.sink.tokens[sequence] : 0;
        tiles = c.a.records.tiles != nullptr ? c.a.records.tiles[sequence] : 0;
        tails = c.a.tail.tokens != nullptr ? c.a.tail.tokens[sequence] : 0;
        if (sinks > 0 && c.a.sink.positions != nullptr) sink_position = c.a.sink.positions[sequence];
        tail_position = sink_position + sinks;
        if (tiles > 0) {
            const tile_span last = span(tiles - 1);
            tail_position = last.position + last.count;
        }
        if (tails > 0 && c.a.tail.positions != nullptr) tail_position = c.a.tail.positions[sequence];
    }

    [[nodiscard]] KVARN_DEVICE KVARN_INLINE bool is_exact() const noexcept { return split == c.a.splits; }
    [[nodiscard]] KVARN_DEVICE KVARN_INLINE float* query() const noexcept { return shared + at.query; }
    /// This thread's row of queries, and of their exact channels.
    [[nodiscard]] KVARN_DEVICE KVARN_INLINE const float* own_query() const noexcept
    {
        return query() + lane / 4 * at.query_stride;
    }
    [[nodiscard]] KVARN_DEVICE KVARN_INLINE const float* own_exact_query() const noexcept
    {
        return shared + at.exact_query + lane / 4 * at.exact_stride;
    }
    /// Floats 4 n .. 4 n + 3 of a thread's outputs, of out_dim / 4.
    [[nodiscard]] KVARN_DEVICE KVARN_INLINE quad* out(int of_warp, int n) const noexcept
    {
        return reinterpret_cast<quad*>(shared + at.out + of_warp * block_rows * c.out_dim) + n * 32 + lane;
    }
    [[nodiscard]] KVARN_DEVICE KVARN_INLINE float* states(int of_warp) const noexcept
    {
        return shared + at.states + of_warp * 2 * block_rows;
    }
    [[nodiscard]] KVARN_DEVICE KVARN_INLINE const std::byte* record(int tile) const noexcept
    {
        const record_pages& r = c.a.records;
        const auto slot = static_cast<std::size_t>(r.table[static_cast<std::ptrdiff_t>(sequence) * r.max_tiles + tile]);
        return r.data + slot * r.tile_stride + static_cast<std::size_t>(head) * r.head_stride;
    }

    /// What the history has of a tile.
    [[nodiscard]] KVARN_DEVICE KVARN_INLINE tile_span span(int tile) const noexcept
    {
        const record_pages& r = c.a.records;
        if (r.spans != nullptr) return r.spans[static_cast<std::ptrdiff_t>(sequence) * r.max_tiles + tile];
        return {sink_position + sinks + tile * c.group, 0, static_cast<std::uint16_t>(c.group)};
    }

    /// Row `row` of the block among all query rows; rows beyond the last are that one.
    [[nodiscard]] KVARN_DEVICE KVARN_INLINE int number_of(int row) const noexcept
    {
        return first_row + row < c.rows ? first_row + row : c.rows - 1;
    }
    [[nodiscard]] KVARN_DEVICE KVARN_INLINE int query_position(int row) const noexcept
    {
        return tail_position + tails - c.a.new_tokens + number_of(row) / c.a.heads_per_kv;
    }
    /// What row `row` of the block sees of the tokens `part` of those from `position` on.
    [[nodiscard]] KVARN_DEVICE KVARN_INLINE visible_tokens seen(int row, int position, visible_tokens part) const noexcept
    {
        return find_visible(c, c.a.causal, query_position(row), position, part);
    }
    static constexpr bool general = false;
};

/// The same of a call with a mask or ALiBi.
struct general_block : attention_block {
    using attention_block::attention_block;
    static constexpr bool general = true;

    /// Where the mask begins.
    [[nodiscard]] KVARN_DEVICE KVARN_INLINE int masked() const noexcept
    {
        return c.a.mask_tokens > 0 ? tail_position + tails - c.a.mask_tokens : largest_int;
    }
    /// What row `row` sees, or all that the mask may show it where it speaks of some of the tokens.
    [[nodiscard]] KVARN_DEVICE KVARN_INLINE visible_tokens seen(int row, int position, visible_tokens part) const noexcept
    {
        return find_visible(c, c.a.causal && masked() >= position + part.end, query_position(row), position, part);
    }
    /// Bits of what the mask shows a row of a thread's tokens; before the mask begins the rule counts.
    [[nodiscard]] KVARN_DEVICE KVARN_INLINE std::uint32_t shown(const thread_tokens& of) const noexcept
    {
        if (masked() >= of.position + of.part.end) return ~0u;
        const int first = of.position + of.own, bit = first - masked();
        const std::uint32_t before = low_bits(-bit) & (c.a.causal ? low_bits(query_position(of.row) + 1 - first) : ~0u);
        const std::ptrdiff_t line = static_cast<std::ptrdiff_t>(sequence) * c.a.new_tokens + number_of(of.row) / c.a.heads_per_kv;
        return before | mask_bits(c.a.mask + line * c.a.mask_stride, c.a.mask_stride, bit);
    }
    /// ALiBi's slope of a row, in base-2 units; 0: none.
    [[nodiscard]] KVARN_DEVICE KVARN_INLINE float slope(int row) const noexcept
    {
        if (c.a.alibi_slopes == nullptr) return 0.0f;
        return mul(c.a.alibi_slopes[head * c.a.heads_per_kv + number_of(row) % c.a.heads_per_kv], log2_e);
    }
};

/// What any row sees of the tokens `part` of those from `position` on: later rows see from later on and to later.
template <class Block>
[[nodiscard]] KVARN_DEVICE KVARN_INLINE visible_tokens seen_by_any(const Block& b, int position, visible_tokens part) noexcept
{
    return {b.seen(0, position, part).begin, b.seen(block_rows - 1, position, part).end};
}
/// Whether some row does not see all `tokens` tokens from `position` on, of which only `part` counts.
template <class Block>
[[nodiscard]] KVARN_DEVICE KVARN_INLINE bool is_masked(const Block& b, int position, visible_tokens part, int tokens) noexcept
{
    if constexpr (Block::general)
        if (b.masked() < position + part.end) return true;
    return b.seen(0, position, part).end < tokens || b.seen(block_rows - 1, position, part).begin > 0;
}

/// Fetches bytes into the second-level cache, for a warp.
KVARN_DEVICE KVARN_INLINE void prefetch([[maybe_unused]] const std::byte* from, [[maybe_unused]] int bytes,
                                        [[maybe_unused]] int lane) noexcept
{
#if defined(__CUDA_ARCH__)
    for (int at = lane * 128; at < bytes; at += 32 * 128) asm volatile("prefetch.global.L2 [%0];" : : "l"(from + at));
#endif
}

/// Rotates vectors of `dim` channels in shared memory, `stride` floats apart. A barrier before; ends with one.
template <class Team>
KVARN_DEVICE KVARN_INLINE void rotate_vectors(Team& team, float* x, int vectors, int stride, int dim, float scale) noexcept
{
    const token_block block{x, stride, 1};
    for_each(team, vectors * (dim / 16), [&](int i) {
        const int t = i / (dim / 16), d = i % (dim / 16) * 16;
        float v[16];
        load16(&block.at(t, d), v);
        butterflies(v);
        put16(block, t, d, v);
    });
    team.barrier();
    finish_rotation(team, block, vectors, dim, scale);
    team.barrier();
}

/// Queries of channels [first, first + count) to rows `stride` apart, times the softmax scale; zeros behind them and for rows that
/// are none.
template <class Team>
KVARN_DEVICE KVARN_INLINE void load_queries(Team& team, const attention_block& b, int first, int count, float* to,
                                            int stride) noexcept
{
    const attention_call& c = b.c;
    const int pieces = stride / 8;
    with_element(c.a.q.type, [&](auto element) {
        using T = decltype(element);
        for_each(team, block_rows * pieces, [&](int i) {
            const int row = i / pieces, d = i % pieces * 8, number = b.first_row + row;
            float v[8] = {};
            if (number < c.rows && d < count) {
                const int token = number / c.a.heads_per_kv, head = b.head * c.a.heads_per_kv + number % c.a.heads_per_kv;
                load<quad>(static_cast<const T*>(c.a.q.data) + b.sequence * c.a.q.sequence_stride + token * c.a.q.token_stride +
                               head * c.a.q.head_stride + first + d,
                           v);
            }
            KVARN_UNROLL
            for (int k = 0; k < 8; ++k) v[k] = mul(v[k], c.query_scale);
            store8(to + row * stride + d, v);
        });
    });
}

/// The rotated channels of the queries, in shared memory, to A of multiply_keys. A barrier before; ends with one.
template <class Team>
KVARN_DEVICE KVARN_INLINE void make_query_fragments(Team& team, const attention_block& b) noexcept
{
    constexpr int most = 512 / 16 * 32 / attention_threads;
    const int n = b.c.dk / 16 * 32;
    float* const down = b.shared + b.at.row_down;
    for (int row = b.warp; row < block_rows; row += attention_warps) {
        std::uint32_t largest = 0;
        for (int d = b.lane; d < b.c.dk; d += 32) {
            const std::uint32_t x = magnitude_bits(b.query()[row * b.at.query_stride + d]);
            largest = x > largest ? x : largest;
        }
        for (int mask = 16; mask >= 1; mask /= 2) {
            const std::uint32_t other = team.shuffle_xor(largest, mask);
            largest = other > largest ? other : largest;
        }
        int exponent = static_cast<int>(largest >> 23) - 127;
        exponent = exponent < -100 ? -100 : exponent > 100 ? 100 : exponent;
        if (b.lane == 0) down[row] = power_of_two(exponent);
    }
    team.barrier();
    quad held[most];
    KVARN_UNROLL
    for (int i = 0; i < most; ++i) {
        const int at = team.rank() + i * attention_threads;
        if (at >= n) break;
        const int row = at % 32 / 4;
        const float up = div(1.0f, down[row]);
        const quad q = *reinterpret_cast<const quad*>(b.query() + row * b.at.query_stride + at / 32 * 16 + at % 4 * 4);
        KVARN_UNROLL
        for (int k = 0; k < 2; ++k) {
            const split_pair x = split(mul(bits_as<float>(q.w[2 * k]), up), mul(bits_as<float>(q.w[2 * k + 1]), up));
            held[i].w[2 * k] = x.halves;
            held[i].w[2 * k + 1] = x.rest;
        }
    }
    team.barrier();  // all have read what they write now
    KVARN_UNROLL
    for (int i = 0; i < most; ++i) {
        const int at = team.rank() + i * attention_threads;
        if (at < n) reinterpret_cast<quad*>(b.query())[at] = held[i];
    }
    team.barrier();
}

/// Queries to shared memory, in the basis and the form that the block's tokens need; empty outputs. Ends with a barrier.
template <class Team>
KVARN_DEVICE KVARN_INLINE void begin_rows(Team& team, const attention_block& b) noexcept
{
    const attention_call& c = b.c;
    load_queries(team, b, 0, c.dk, b.query(), b.at.query_stride);
    if (c.exact_channels != 0) load_queries(team, b, c.dk, c.exact_channels, b.shared + b.at.exact_query, b.at.exact_stride);
    for (int n = 0; n < c.out_dim / 16; ++n) *b.out(b.warp, n) = quad{};
    team.barrier();
    if (c.k_rotation != 0.0f && b.is_exact() == (c.a.query_basis == basis::rotated))
        rotate_vectors(team, b.query(), block_rows, b.at.query_stride, c.dk, c.k_rotation);
    if (!b.is_exact()) make_query_fragments(team, b);
}

/// out = out * factor + body(n, k) for floats 4 n + k, n in [first, first + count).
template <int Count, class Body>
KVARN_DEVICE KVARN_INLINE void add_outputs(const attention_block& b, int first, float factor, Body&& body) noexcept
{
    KVARN_UNROLL
    for (int n = 0; n < Count; ++n) {
        quad* const at = b.out(b.warp, first + n);
        quad o = *at;
        KVARN_UNROLL
        for (int k = 0; k < 4; ++k) o.w[k] = bits_as<std::uint32_t>(body(4 * n + k, mul(bits_as<float>(o.w[k]), factor)));
        *at = o;
    }
}

}  // namespace kvarn::cuda::detail
