// SPDX-License-Identifier: Apache-2.0
#pragma once
// The two kernels of decode attention. One thread block attends with up to eight query rows of a sequence and KV head to a range
// of its records, or to its exact tokens; its warps take tiles in turn, each with a softmax state and outputs of its own, and no
// barrier between them. What they leave goes to the workspace; a second launch merges it. K and V of records are never decoded: the
// channel scale goes into the query, the token scale into the weights (attention/sealed.hpp has the equations). Outputs of records
// are in the rotated basis, those of exact tokens in the original one. float accumulators. No allocation; for thread blocks.

#include <cstddef>
#include <cstdint>

#include <kvarn/cuda/attention/products.cuh>
#include <kvarn/cuda/attention/softmax.cuh>

namespace kvarn::cuda::detail {

inline constexpr int combine_threads = 128;
inline constexpr int exact_span = 32;  // exact tokens that a warp takes at a time
/// Tokens of a record that a warp takes at a time.
template <int Group>
inline constexpr int span_tokens = Group < 128 ? Group : 128;

/// One block's share of the work, as one of its threads sees it.
struct attention_block {
    const attention_call& c;
    attention_memory at;
    float* shared;
    int sequence, head, first_row, split;
    int sinks, tiles, tails;
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

    /// What row `row` of the block sees of `tokens` tokens from `position` on; rows beyond the last see what that one does.
    [[nodiscard]] KVARN_DEVICE KVARN_INLINE visible_tokens seen(int row, int position, int tokens) const noexcept
    {
        const int history = sinks + tiles * c.group + tails;
        const int number = first_row + row < c.rows ? first_row + row : c.rows - 1;
        return find_visible(c, history - c.a.new_tokens + number / c.a.heads_per_kv, position, tokens);
    }
    /// What any row sees of them: later rows see from later on and to later.
    [[nodiscard]] KVARN_DEVICE KVARN_INLINE visible_tokens seen_by_any(int position, int tokens) const noexcept
    {
        return {seen(0, position, tokens).begin, seen(block_rows - 1, position, tokens).end};
    }
    /// Whether some row does not see all of them.
    [[nodiscard]] KVARN_DEVICE KVARN_INLINE bool is_masked(int position, int tokens) const noexcept
    {
        return seen(0, position, tokens).end < tokens || seen(block_rows - 1, position, tokens).begin > 0;
    }
};

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

/// The largest magnitude of n stored halves, n a multiple of 64.
template <class Team>
KVARN_DEVICE KVARN_INLINE float largest_scalar(Team& team, const std::byte* from, int n, int lane) noexcept
{
    std::uint32_t most = 0;
    for (int i = lane; i < n / 2; i += 32) {
        const std::uint32_t two = reinterpret_cast<const std::uint32_t*>(from)[i], low = two & 0x7fffu,
                            high = two >> 16 & 0x7fffu;
        most = low > most ? low : most;
        most = high > most ? high : most;
    }
    for (int mask = 16; mask >= 1; mask /= 2) {
        const std::uint32_t other = team.shuffle_xor(most, mask);
        most = other > most ? other : most;
    }
    return widen(half{static_cast<std::uint16_t>(most)});
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

/// Softmax weights `p` of a span, times 2^weight_shift, into the state's total and, with V, into the outputs.
template <int V, int P, class Team>
KVARN_DEVICE KVARN_INLINE void attend_values(Team& team, const attention_block& b, const std::byte* record, int first,
                                             const float (&p)[2 * P], float factor, row_state& state) noexcept
{
    const attention_call& c = b.c;
    const int own = 2 * (first + 2 * P * (b.lane % 4));  // bytes of the thread's first token scalar
    const span_weights<code_pairs<0, 2 * P>, P> w(team, p, record + c.v_scale + own, record + c.v_zero + own, b.lane);
    state.total = fma(state.total, factor, w.total);
    const std::byte* const codes = record + c.v_codes;
    for (int channel = 0; channel < c.dv; channel += 8 * V) {
        float y[2 * V], by[2 * V];
        const auto multiply = [&](auto bits, std::uint32_t row_bytes) {
            multiply_values<decltype(bits)::value, V, P>(team, codes + static_cast<std::uint32_t>(first) * row_bytes, row_bytes,
                                                         w, channel, b.lane, y);
        };
        const auto row_bytes = static_cast<std::uint32_t>(c.dv * c.value_bits / 8);
        if constexpr (V == 8) {
            with_bits(c.value_bits, [&](auto bits) { multiply(bits, row_bytes); });
        } else {
            // A stride that the compiler knows, for the usual head_dim.
            constexpr std::integral_constant<int, 2> two{};
            constexpr std::integral_constant<int, 4> four{};
            if (c.value_bits == 2)
                c.dv == 8 * V ? multiply(two, 2 * V) : multiply(two, row_bytes);
            else
                c.dv == 8 * V ? multiply(four, 4 * V) : multiply(four, row_bytes);
        }
        load_scalars(record + c.v_channel + 2 * (channel + 2 * V * (b.lane % 4)), by);
        add_outputs<V / 2>(b, channel / 16, factor, [&](int i, float before) { return fma(y[i], by[i], before); });
    }
}

/// The same with K's codes, read as V.
template <int P, int Group, class Team>
KVARN_DEVICE KVARN_INLINE void attend_keys_as_values(Team& team, const attention_block& b, const std::byte* record,
                                                     const key_span& k, const float (&p)[2 * P], float factor,
                                                     row_state& state) noexcept
{
    const attention_call& c = b.c;
    const std::byte* const token_scale = record + c.k_token + 2 * (k.first + 2 * P * (b.lane % 4));
    with_bits(c.key_bits, [&](auto bits) {
        constexpr int Bits = decltype(bits)::value;
        const span_weights<code_pairs<Bits, 2 * P>, P> w(team, p, token_scale, token_scale, b.lane);
        state.total = fma(state.total, factor, w.total);
        key_columns<Bits, P, Group * Bits / 8> next;
        next.load(k, 0, b.lane);
        for (int channel = 0; channel < c.dk; channel += 16) {
            const auto now = next;
            if (channel + 16 < c.dk) next.load(k, channel + 16, b.lane);
            float y[4];
            now.multiply(team, w, y);
            const auto two = [&](const std::byte* from, int n) {
                return reinterpret_cast<const std::uint32_t*>(from)[channel / 2 + 4 * n + b.lane % 4];
            };
            const std::uint32_t by[2] = {two(k.scale, 0), two(k.scale, 1)}, zero[2] = {two(k.zero, 0), two(k.zero, 1)};
            add_outputs<1>(b, channel / 16, factor, [&](int i, float before) {
                const float s = i % 2 == 0 ? low_half(by[i / 2]) : high_half(by[i / 2]);
                const float z = i % 2 == 0 ? low_half(zero[i / 2]) : high_half(zero[i / 2]);
                return fma(y[i], s, fma(w.zeros, z, before));
            });
        }
    });
}

/// A warp and a span of a record: its tokens from `first` on, the first of them at `position` of the history.
template <int Group, bool Latent, class Team>
KVARN_DEVICE KVARN_INLINE void attend_span(Team& team, const attention_block& b, const std::byte* record, int first, int position,
                                           row_state& state) noexcept
{
    constexpr int P = span_tokens<Group> / 8;
    const attention_call& c = b.c;
    const int g = b.lane / 4, own = 2 * P * (b.lane % 4);  // the thread's first token
    const key_span k{record + c.k_codes, record + c.k_scale, record + c.k_zero, c.dk, first};
    const scalar_scale scale(largest_scalar(team, k.scale, c.dk, b.lane), 14);
    float s[2 * P];
    with_bits(c.key_bits, [&](auto bits) {
        constexpr int Bits = decltype(bits)::value;
        multiply_keys<Bits, P, Group * Bits / 8>(team, k, reinterpret_cast<const quad*>(b.query()), b.shared[b.at.row_down + g],
                                                 scale, b.lane, s);
    });
    {
        float by[2 * P];
        load_scalars(record + c.k_token + 2 * (first + own), by);
        KVARN_UNROLL
        for (int i = 0; i < 2 * P; ++i) s[i] = mul(s[i], by[i]);
    }
    if (c.exact_channels != 0) {
        const half* const exact = reinterpret_cast<const half*>(record + c.exact) + (first + P * g) * c.exact_channels;
        multiply_exact_keys<half, word_pair, P>(
            team, b.own_exact_query(), c.exact_channels, [&](int m) { return exact + m * c.exact_channels; }, b.lane, s);
    }
    const bool masked = b.is_masked(position, 8 * P);
    visible_tokens seen{0, 2 * P};
    if (masked) {
        seen = b.seen(g, position, 8 * P);
        seen = {seen.begin - own, seen.end - own};
    }
    const float factor = absorb_scores(team, c, s, masked, seen, weight_shift, state);
    if constexpr (Latent)
        attend_keys_as_values<P, Group>(team, b, record, k, s, factor, state);
    else if (c.value_block == 64)
        attend_values<8, P>(team, b, record, first, s, factor, state);
    else
        attend_values<16, P>(team, b, record, first, s, factor, state);
}

/// The block's records, a tile at a time for each warp.
template <int Group, bool Latent, class Team>
KVARN_DEVICE KVARN_INLINE void attend_records(Team& team, const attention_block& b, row_state& state) noexcept
{
    const attention_call& c = b.c;
    const int share = (b.tiles + c.a.splits - 1) / c.a.splits, begin = b.split * share;
    const int end = begin + share < b.tiles ? begin + share : b.tiles;
    for (int tile = begin + b.warp; tile < end; tile += attention_warps) {
        const int position = b.sinks + tile * Group;
        const visible_tokens live = b.seen_by_any(position, Group);
        if (live.begin >= live.end) continue;
        const std::byte* const record = b.record(tile);
        if (tile + attention_warps < end) prefetch(b.record(tile + attention_warps), c.content_bytes, b.lane);
        for (int first = 0; first < Group; first += span_tokens<Group>)
            attend_span<Group, Latent>(team, b, record, first, position + first, state);
    }
}

/// The exact tokens of one segment, which starts at `position`.
template <class T, class Team>
KVARN_DEVICE KVARN_INLINE void attend_exact(Team& team, const attention_block& b, const exact_pages& x, int tokens, int position,
                                            row_state& state) noexcept
{
    constexpr int P = exact_span / 8;
    const attention_call& c = b.c;
    const int lane = opaque(b.lane), g = lane / 4, own = 2 * P * (lane % 4);
    const visible_tokens live = b.seen_by_any(position, tokens);
    if (live.begin >= live.end) return;
    for (int first = live.begin / exact_span * exact_span + b.warp * exact_span; first < live.end;
         first += attention_warps * exact_span) {
        // Tokens that no row sees are not read: their pages may be gone.
        const auto place = [&](int t, std::ptrdiff_t page_stride, std::ptrdiff_t token_stride, std::ptrdiff_t head_stride) {
            const int token = first + t < live.begin ? live.begin : first + t < live.end ? first + t : live.end - 1;
            const int page = token / x.page_tokens;
            const std::ptrdiff_t at = x.table[static_cast<std::ptrdiff_t>(b.sequence) * x.pages + page];
            return at * page_stride + (token - page * x.page_tokens) * token_stride + b.head * head_stride;
        };
        float s[2 * P] = {};
        std::ptrdiff_t keys[P], values[2 * P];
        KVARN_UNROLL
        for (int m = 0; m < P; ++m) keys[m] = place(P * g + m, x.k_page_stride, x.k_token_stride, x.k_head_stride);
        const auto key = [&](int m) { return static_cast<const T*>(x.k) + keys[m]; };
        multiply_exact_keys<T, quad, P>(team, b.own_query(), c.dk, key, b.lane, s);
        if (c.exact_channels != 0)
            multiply_exact_keys<T, quad, P>(
                team, b.own_exact_query(), c.exact_channels, [&](int m) { return key(m) + c.dk; }, b.lane, s);
        visible_tokens seen = b.seen(g, position + first, tokens - first);
        seen = {seen.begin - own, seen.end - own};
        const float factor = absorb_scores(team, c, s, true, seen, 0.0f, state);
        float sum = 0.0f;
        KVARN_UNROLL
        for (int i = 0; i < 2 * P; ++i) sum = add(sum, s[i]);
        state.total = fma(state.total, factor, row_sum(team, sum));
        const T* const data = static_cast<const T*>(c.dv != 0 ? x.v : x.k);
        KVARN_UNROLL
        for (int i = 0; i < 2 * P; ++i)
            values[i] = c.dv != 0 ? place(own + i, x.v_page_stride, x.v_token_stride, x.v_head_stride)
                                  : place(own + i, x.k_page_stride, x.k_token_stride, x.k_head_stride);
        const auto value = [&](int i) { return data + values[i]; };
        for (int channel = 0; channel < c.out_dim; channel += 64) {
            float y[16];
            multiply_exact_values<T, P>(team, s, value, channel, b.lane, y);
            add_outputs<4>(b, channel / 16, factor, [&](int i, float before) { return add(y[i], before); });
        }
    }
}

template <class Team>
KVARN_DEVICE KVARN_INLINE void attend_exact(Team& team, const attention_block& b, const exact_pages& x, int tokens, int position,
                                            row_state& state) noexcept
{
    if (tokens > 0)
        with_element(x.type, [&](auto element) { attend_exact<decltype(element)>(team, b, x, tokens, position, state); });
}

/// Merges the block's warps into the workspace. `by_columns`: the outputs lie as attend_keys_as_values leaves them.
template <class Team>
KVARN_DEVICE KVARN_INLINE void finish_rows(Team& team, const attention_block& b, const row_state& state, bool by_columns) noexcept
{
    const attention_call& c = b.c;
    const int row = b.lane / 4, j = b.lane % 4, floats = c.out_dim + 2;
    if (j == 0) {
        b.states(b.warp)[row] = state.largest;
        b.states(b.warp)[block_rows + row] = state.total;
    }
    team.barrier();
    if (b.first_row + row >= c.rows) return;
    float largest = lowest_score, total = 0.0f, factor[attention_warps];
    for (int w = 0; w < attention_warps; ++w) largest = quick_max(largest, b.states(w)[row]);
    KVARN_UNROLL
    for (int w = 0; w < attention_warps; ++w) {
        factor[w] = exp2(sub(b.states(w)[row], largest));
        total = fma(b.states(w)[block_rows + row], factor[w], total);
    }
    const std::ptrdiff_t number = (static_cast<std::ptrdiff_t>(b.sequence) * c.a.kv_heads + b.head) * c.rows + b.first_row + row;
    float* const to = c.a.workspace + (number * (c.a.splits + 1) + b.split) * floats;
    if (b.warp == 0 && j == 0) to[0] = largest, to[1] = total;
    const int quads = b.is_exact() ? 4 : c.value_block / 16;  // of a thread in a block of channels
    for (int n = b.warp; n < c.out_dim / 16; n += attention_warps) {
        float sum[4] = {};
        KVARN_UNROLL
        for (int w = 0; w < attention_warps; ++w) {
            const quad o = *b.out(w, n);
            KVARN_UNROLL
            for (int k = 0; k < 4; ++k) sum[k] = fma(bits_as<float>(o.w[k]), factor[w], sum[k]);
        }
        const int channel = by_columns ? 16 * n + 2 * j : n / quads * 16 * quads + 4 * quads * j + n % quads * 4;
        KVARN_UNROLL
        for (int k = 0; k < 4; ++k) to[2 + channel + (by_columns && k >= 2 ? k + 6 : k)] = sum[k];
    }
}

/// The body of the first kernel: block `item` of [sequence][kv_head][row block][split, then the exact tokens]. Group is the
/// format's; Latent: V is read from K.
template <int Group, bool Latent, class Team>
KVARN_DEVICE KVARN_INLINE void attend_item(Team& team, const attention_call& c, int item, float* shared) noexcept
{
    const attention_block b(team, c, item, shared);
    begin_rows(team, b);
    row_state state;
    if (b.is_exact()) {
        attend_exact(team, b, c.a.sink, b.sinks, 0, state);
        attend_exact(team, b, c.a.tail, b.tails, b.sinks + b.tiles * c.group, state);
    } else {
        attend_records<Group, Latent>(team, b, state);
    }
    finish_rows(team, b, state, Latent && !b.is_exact());
}

/// Shared memory of a block that merges: records' and exact tokens' outputs.
[[nodiscard]] KVARN_HOST_DEVICE KVARN_INLINE constexpr int combine_shared_bytes(int out_dim) noexcept
{
    return 2 * 4 * out_dim;
}

/// The body of the second kernel: query row `item` of [sequence][kv_head][row]. `shared`: combine_shared_bytes.
template <class Team>
KVARN_DEVICE KVARN_INLINE void combine_item(Team& team, const attention_call& c, int item, float* shared) noexcept
{
    const int row = item % c.rows, kv_head = item / c.rows % c.a.kv_heads, sequence = item / c.rows / c.a.kv_heads;
    const int token = row / c.a.heads_per_kv, head = kv_head * c.a.heads_per_kv + row % c.a.heads_per_kv;
    const int parts = c.a.splits + 1, floats = c.out_dim + 2;
    const float* const states = c.a.workspace + static_cast<std::ptrdiff_t>(item) * parts * floats;
    float largest = lowest_score, total = 0.0f;
    if (c.a.sink_logits != nullptr && c.a.sink_logits[head] > -1e20f) {
        largest = mul(c.a.sink_logits[head], log2_e);
        total = 1.0f;
    }
    const float logit = largest;
    for (int s = 0; s < parts; ++s) largest = quick_max(largest, states[s * floats]);
    total = mul(total, exp2(sub(logit, largest)));
    for (int s = 0; s < parts; ++s) total = fma(states[s * floats + 1], exp2(sub(states[s * floats], largest)), total);
    const float inverse = total > 0.0f ? div(1.0f, total) : 0.0f;
    float* const exact = shared + c.out_dim;
    for_each(team, c.out_dim, [&](int d) {
        float sum = 0.0f;
        for (int s = 0; s < parts - 1; ++s) sum = fma(states[s * floats + 2 + d], exp2(sub(states[s * floats], largest)), sum);
        const float* const last = states + (parts - 1) * floats;
        shared[d] = mul(sum, inverse);
        exact[d] = mul(mul(last[2 + d], exp2(sub(last[0], largest))), inverse);
    });
    team.barrier();
    if (c.out_rotation != 0.0f)
        rotate_vectors(team, c.a.output_basis == basis::original ? shared : exact, 1, c.out_dim, c.out_dim, c.out_rotation);
    const std::ptrdiff_t to = sequence * c.a.out.sequence_stride + token * c.a.out.token_stride + head * c.a.out.head_stride;
    with_element(c.a.out.type, [&](auto element) {
        for_each(team, c.out_dim / 8, [&](int i) {
            float x[8];
            KVARN_UNROLL
            for (int k = 0; k < 8; ++k) x[k] = add(shared[i * 8 + k], exact[i * 8 + k]);
            store8(static_cast<decltype(element)*>(c.a.out.data) + to + i * 8, x);
        });
    });
    if (c.a.log_sum_exp == nullptr || team.rank() != 0) return;
    const int heads = c.a.kv_heads * c.a.heads_per_kv;
    c.a.log_sum_exp[(static_cast<std::ptrdiff_t>(sequence) * c.a.new_tokens + token) * heads + head] =
        total > 0.0f ? mul(add(largest, std::log2(total)), ln_2) : bits_as<float>(0xff800000u);
}

}  // namespace kvarn::cuda::detail
