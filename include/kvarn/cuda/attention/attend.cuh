// SPDX-License-Identifier: Apache-2.0
#pragma once
// The two kernels of decode attention. One thread block attends with up to eight query rows of a sequence and KV head to a range
// of its records, or to its exact tokens, and leaves softmax states and outputs, in the rotated basis, in the workspace; a second
// launch merges them. K and V of records are never decoded to memory: the channel scale goes into the query, the token scale into
// the weights (attention/sealed.hpp has the equations). float accumulators. No allocation; for thread blocks.

#include <cstddef>
#include <cstdint>

#include <kvarn/cuda/attention/rows.cuh>
#include <kvarn/cuda/attention/tensor.cuh>

namespace kvarn::cuda::detail {

inline constexpr int combine_threads = 128;

/// One block's share of the work.
template <int Rows>
struct attention_block {
    const attention_call& c;
    attention_memory at;
    float* shared;
    row_states state;
    int sequence, head, first_row, split;
    int sinks, tiles, tails;

    KVARN_DEVICE KVARN_INLINE attention_block(const attention_call& call, int item, float* memory) noexcept
        : c(call), at(call.dk, call.dv, call.out_dim, call.group, Rows), shared(memory), state(memory + at.state)
    {
        const int parts = c.a.splits + 1;
        split = item % parts;
        const int rest = item / parts;
        first_row = rest % c.row_blocks * Rows;
        head = rest / c.row_blocks % c.a.kv_heads;
        sequence = rest / c.row_blocks / c.a.kv_heads;
        sinks = c.a.sink.tokens != nullptr ? c.a.sink.tokens[sequence] : 0;
        tiles = c.a.records.tiles != nullptr ? c.a.records.tiles[sequence] : 0;
        tails = c.a.tail.tokens != nullptr ? c.a.tail.tokens[sequence] : 0;
    }

    KVARN_DEVICE KVARN_INLINE float* query() const noexcept { return shared + at.query; }
    KVARN_DEVICE KVARN_INLINE float* out() const noexcept { return shared + at.out; }
    KVARN_DEVICE KVARN_INLINE float* weights() const noexcept { return shared + at.weights; }
    KVARN_DEVICE KVARN_INLINE float* sums() const noexcept { return shared + at.sums; }
    KVARN_DEVICE KVARN_INLINE float* scalars() const noexcept { return shared + at.scalars; }
    KVARN_DEVICE KVARN_INLINE std::byte* codes() const noexcept { return reinterpret_cast<std::byte*>(shared + at.codes); }

    KVARN_DEVICE KVARN_INLINE const std::byte* record(int tile) const noexcept
    {
        const record_pages& r = c.a.records;
        const auto slot = static_cast<std::size_t>(r.table[static_cast<std::ptrdiff_t>(sequence) * r.max_tiles + tile]);
        return r.data + slot * r.tile_stride + static_cast<std::size_t>(head) * r.head_stride;
    }

    KVARN_DEVICE KVARN_INLINE bool is_row(int row) const noexcept { return first_row + row < c.rows; }
    /// What row `row` sees of `tokens` tokens from `position` on.
    KVARN_DEVICE KVARN_INLINE visible_tokens seen(int row, std::int64_t position, int tokens) const noexcept
    {
        if (!is_row(row)) return {0, 0};
        const std::int64_t history = static_cast<std::int64_t>(sinks) + static_cast<std::int64_t>(tiles) * c.group + tails;
        return find_visible(c, history - c.a.new_tokens + (first_row + row) / c.a.heads_per_kv, position, tokens);
    }
    KVARN_DEVICE KVARN_INLINE bool any_seen(std::int64_t position, int tokens) const noexcept
    {
        for (int row = 0; row < Rows; ++row) {
            const visible_tokens v = seen(row, position, tokens);
            if (v.begin < v.end) return true;
        }
        return false;
    }
};

/// Fetches bytes into the second-level cache.
template <class Team>
KVARN_DEVICE KVARN_INLINE void prefetch([[maybe_unused]] Team& team, [[maybe_unused]] const std::byte* from,
                                        [[maybe_unused]] int bytes) noexcept
{
#if defined(__CUDA_ARCH__)
    for_each(team, (bytes + 127) / 128, [&](int line) { asm volatile("prefetch.global.L2 [%0];" : : "l"(from + line * 128)); });
#endif
}

/// Rotates vectors of `dim` contiguous channels in shared memory. A barrier before; ends with one.
template <class Team>
KVARN_DEVICE KVARN_INLINE void rotate_vectors(Team& team, float* x, int vectors, int dim, float scale) noexcept
{
    const token_block block{x, dim, 1};
    for_each(team, vectors * (dim / 16), [&](int i) {
        float v[16];
        load16(x + i * 16, v);
        butterflies(v);
        put16(block, 0, i * 16, v);
    });
    team.barrier();
    finish_rotation(team, block, vectors, dim, scale);
    team.barrier();
}

/// Queries to shared memory, times the softmax scale, in the basis that the block's tokens need; empty states and outputs. Ends
/// with a barrier.
template <int Rows, class Team>
KVARN_DEVICE KVARN_INLINE void begin_rows(Team& team, const attention_block<Rows>& b, bool exact) noexcept
{
    const attention_call& c = b.c;
    const auto load = [&](auto element) {
        using T = decltype(element);
        for_each(team, Rows * (c.dk / 16), [&](int i) {
            const int row = i / (c.dk / 16), d = i % (c.dk / 16) * 16, number = b.first_row + row;
            float v[16] = {};
            if (b.is_row(row)) {
                const int token = number / c.a.heads_per_kv, head = b.head * c.a.heads_per_kv + number % c.a.heads_per_kv;
                load16(static_cast<const T*>(c.a.q.data) + b.sequence * c.a.q.sequence_stride + token * c.a.q.token_stride +
                           head * c.a.q.head_stride + d,
                       v);
            }
            KVARN_UNROLL
            for (int k = 0; k < 16; ++k) v[k] = mul(v[k], c.query_scale);
            put16(token_block{b.query(), c.dk, 1}, row, d, v);
        });
    };
    if (c.a.q.type == element_type::f16)
        load(half{});
    else if (c.a.q.type == element_type::bf16)
        load(bfloat16{});
    else
        load(0.0f);
    for_each(team, Rows * c.out_dim, [&](int i) { b.out()[i] = 0.0f; });
    for_each(team, 8, [&](int row) {
        b.state.largest[row] = lowest_score;
        b.state.total[row] = 0.0f;
    });
    team.barrier();
    if (c.k_rotation != 0.0f && exact == (c.a.query_basis == basis::rotated))
        rotate_vectors(team, b.query(), Rows, c.dk, c.k_rotation);
}

/// Pointers to a record's scalars as floats in shared memory.
struct scalar_arrays {
    float *k_scale, *k_zero, *k_token, *v_channel, *v_scale, *v_zero;

    KVARN_DEVICE KVARN_INLINE scalar_arrays(const attention_call& c, float* at) noexcept
        : k_scale(at), k_zero(k_scale + c.dk), k_token(k_zero + c.dk), v_channel(k_token + c.group), v_scale(v_channel + c.dv),
          v_zero(v_scale + c.group)
    {}
};

template <class Team>
KVARN_DEVICE KVARN_INLINE void load_scalars(Team& team, const attention_call& c, const std::byte* record,
                                            const scalar_arrays& s) noexcept
{
    const auto load = [&](float* to, std::uint32_t field, int n) {
        for_each(team, n / 2, [&](int i) {
            const std::uint32_t two = reinterpret_cast<const std::uint32_t*>(record + field)[i];
            to[2 * i] = widen(half{static_cast<std::uint16_t>(two)});
            to[2 * i + 1] = widen(half{static_cast<std::uint16_t>(two >> 16)});
        });
    };
    load(s.k_scale, c.k_scale, c.dk);
    load(s.k_zero, c.k_zero, c.dk);
    load(s.k_token, c.k_token, c.group);
    if (c.dv == 0) return;
    load(s.v_channel, c.v_channel, c.dv);
    load(s.v_scale, c.v_scale, c.group);
    load(s.v_zero, c.v_zero, c.group);
}

/// One warp: the sum of query times K's zero points.
template <int Rows, class Team>
KVARN_DEVICE KVARN_INLINE void sum_key_zeros(Team& team, const attention_block<Rows>& b, const float* k_zero, int row) noexcept
{
    float zeros = 0.0f;
    for (int d = team.rank() % 32; d < b.c.dk; d += 32) zeros = fma(b.query()[row * b.c.dk + d], k_zero[d], zeros);
    zeros = warp_sum(team, zeros);
    if (team.rank() % 32 == 0) b.state.key_zero[row] = zeros;
}

/// One warp: products of `row` to scores, and those to softmax weights.
template <int Rows, class Team>
KVARN_DEVICE KVARN_INLINE void absorb_products(Team& team, const attention_block<Rows>& b, const scalar_arrays& s,
                                               std::int64_t position, int row) noexcept
{
    const attention_call& c = b.c;
    float* const score = b.sums() + row * c.group;
    for (int t = team.rank() % 32; t < c.group; t += 32) score[t] = mul(add(score[t], b.state.key_zero[row]), s.k_token[t]);
    absorb_scores(team, c, score, c.group, b.seen(row, position, c.group), row, b.state, c.dv == 0 ? s.k_token : s.v_zero);
}

/// One record with codes of 2, 4 or 8 bits, on tensor cores; nothing of it goes through shared memory but the scalars.
template <int Rows, class Team>
KVARN_DEVICE KVARN_INLINE void attend_record_tensor(Team& team, const attention_block<Rows>& b, const std::byte* record,
                                                    std::int64_t position) noexcept
{
    const attention_call& c = b.c;
    const int warp = team.rank() / 32, widest = attention_memory::larger(attention_memory::larger(c.dk, c.out_dim), c.group);
    const int stride = widest + half_padding;
    half* const weights = reinterpret_cast<half*>(b.shared + b.at.halves);
    float* const partial = b.shared + b.at.partial;
    const scalar_arrays s(c, b.scalars());
    tensor_words keys, values;
    fetch_words(team, c.key_bits, record + c.k_codes, c.dk, c.group, keys);
    load_scalars(team, c, record, s);
    team.barrier();
    if (warp < Rows) {
        sum_key_zeros(team, b, s.k_zero, warp);
        const float* const q = b.query() + warp * c.dk;
        split_weights<Rows>(team, warp, c.dk, weights, stride, b.state.unscale, [&](int d) { return mul(q[d], s.k_scale[d]); });
    }
    team.barrier();
    multiply_tensor<Rows>(team, c.key_bits, record + c.k_codes, c.dk, c.group, weights, stride, keys, b.state.unscale, partial,
                          b.sums());
    fetch_words(team, c.value_bits, record + c.v_codes, c.group, c.dv, values);
    if (warp < Rows) {
        absorb_products(team, b, s, position, warp);
        const float* const p = b.sums() + warp * c.group;
        split_weights<Rows>(team, warp, c.group, weights, stride, b.state.unscale,
                            [&](int t) { return mul(p[t], s.v_scale[t]); });
    }
    team.barrier();
    multiply_tensor<Rows>(team, c.value_bits, record + c.v_codes, c.group, c.dv, weights, stride, values, b.state.unscale,
                          partial, b.sums());
    for_each(team, Rows * c.dv, [&](int i) {
        const int row = i / c.dv, d = i - row * c.dv;
        b.out()[i] = fma(add(b.sums()[i], b.state.value_zero[row]), s.v_channel[d], mul(b.out()[i], b.state.factor[row]));
    });
    team.barrier();
}

/// One record of any other width, and K read as V: codes as bytes in shared memory, products in float.
template <int Rows, class Team>
KVARN_DEVICE KVARN_INLINE void attend_record(Team& team, const attention_block<Rows>& b, const std::byte* record,
                                             std::int64_t position) noexcept
{
    const attention_call& c = b.c;
    const int warp = team.rank() / 32;
    const bool latent = c.dv == 0;
    const scalar_arrays s(c, b.scalars());
    load_scalars(team, c, record, s);
    unpack_codes(team, c.key_bits, record + c.k_codes, c.dk, c.group, b.codes());
    team.barrier();
    for_each(team, Rows * c.dk, [&](int i) { b.weights()[i] = mul(b.query()[i % Rows * c.dk + i / Rows], s.k_scale[i / Rows]); });
    if (warp < Rows) sum_key_zeros(team, b, s.k_zero, warp);
    team.barrier();
    multiply_codes<Rows>(team, b.codes(), c.dk, c.group, b.weights(), b.shared + b.at.partial, b.sums());
    if (!latent) unpack_codes(team, c.value_bits, record + c.v_codes, c.group, c.dv, b.codes());
    if (warp < Rows) absorb_products(team, b, s, position, warp);
    team.barrier();
    const float* const by = latent ? s.k_token : s.v_scale;
    for_each(team, Rows * c.group, [&](int i) { b.weights()[i] = mul(b.sums()[i % Rows * c.group + i / Rows], by[i / Rows]); });
    team.barrier();
    if (latent)
        multiply_transposed<Rows>(team, b.codes(), c.dk, c.group, b.weights(), b.sums());
    else
        multiply_codes<Rows>(team, b.codes(), c.group, c.dv, b.weights(), b.shared + b.at.partial, b.sums());
    for_each(team, Rows * c.out_dim, [&](int i) {
        const int row = i / c.out_dim, d = i - row * c.out_dim;
        const float before = mul(b.out()[i], b.state.factor[row]), y = b.sums()[i], zeros = b.state.value_zero[row];
        b.out()[i] = latent ? fma(y, s.k_scale[d], fma(zeros, s.k_zero[d], before)) : fma(add(y, zeros), s.v_channel[d], before);
    });
    team.barrier();
}

/// The exact tokens of one segment, which starts at `position`.
template <int Rows, class T, class Team>
KVARN_DEVICE KVARN_INLINE void attend_exact(Team& team, const attention_block<Rows>& b, const exact_pages& x, int tokens,
                                            std::int64_t position) noexcept
{
    const attention_call& c = b.c;
    const int warp = team.rank() / 32;
    float* const stage = reinterpret_cast<float*>(b.codes());
    for (int first = 0; first < tokens; first += exact_tokens) {
        const int now = tokens - first < exact_tokens ? tokens - first : exact_tokens;
        if (!b.any_seen(position + first, now)) continue;
        const auto stage_tokens = [&](const void* data, std::ptrdiff_t page_stride, std::ptrdiff_t token_stride,
                                      std::ptrdiff_t head_stride, int dim) {
            for_each(team, now * (dim / 16), [&](int i) {
                const int t = i / (dim / 16), d = i % (dim / 16) * 16, page = (first + t) / x.page_tokens;
                const std::ptrdiff_t place = first + t - page * x.page_tokens;
                const std::ptrdiff_t where = x.table[static_cast<std::ptrdiff_t>(b.sequence) * x.pages + page];
                float v[16];
                load16(static_cast<const T*>(data) + where * page_stride + place * token_stride + b.head * head_stride + d, v);
                KVARN_UNROLL
                for (int k = 0; k < 16; ++k) stage[t * (dim + staged_padding) + d + k] = v[k];
            });
        };
        stage_tokens(x.k, x.k_page_stride, x.k_token_stride, x.k_head_stride, c.dk);
        team.barrier();
        for_each(team, Rows * exact_tokens, [&](int i) {
            const int t = i % exact_tokens, row = i / exact_tokens;
            float sum = 0.0f;
            if (t < now)
                for (int d = 0; d < c.dk; ++d) sum = fma(b.query()[row * c.dk + d], stage[t * (c.dk + staged_padding) + d], sum);
            b.sums()[i] = sum;
        });
        team.barrier();
        if (c.dv != 0) stage_tokens(x.v, x.v_page_stride, x.v_token_stride, x.v_head_stride, c.dv);
        if (warp < Rows)
            absorb_scores(team, c, b.sums() + warp * exact_tokens, exact_tokens, b.seen(warp, position + first, now), warp,
                          b.state, nullptr);
        team.barrier();
        for_each(team, Rows * c.out_dim, [&](int i) {
            const int row = i / c.out_dim, d = i - row * c.out_dim;
            float sum = mul(b.out()[i], b.state.factor[row]);
            for (int t = 0; t < now; ++t)
                sum = fma(b.sums()[row * exact_tokens + t], stage[t * (c.out_dim + staged_padding) + d], sum);
            b.out()[i] = sum;
        });
        team.barrier();
    }
}

template <int Rows, class Team>
KVARN_DEVICE KVARN_INLINE void attend_exact(Team& team, const attention_block<Rows>& b, const exact_pages& x, int tokens,
                                            std::int64_t position) noexcept
{
    if (tokens == 0) return;
    if (x.type == element_type::f16)
        attend_exact<Rows, half>(team, b, x, tokens, position);
    else if (x.type == element_type::bf16)
        attend_exact<Rows, bfloat16>(team, b, x, tokens, position);
    else
        attend_exact<Rows, float>(team, b, x, tokens, position);
}

/// The body of the first kernel: block `item` of [sequence][kv_head][row block][split, then the exact tokens]. Tensor is the
/// call's.
template <int Rows, bool Tensor, class Team>
KVARN_DEVICE KVARN_INLINE void attend_item(Team& team, const attention_call& c, int item, float* shared) noexcept
{
    const attention_block<Rows> b(c, item, shared);
    const bool exact = b.split == c.a.splits;
    begin_rows(team, b, exact);
    if (exact) {
        attend_exact(team, b, c.a.sink, b.sinks, 0);
        attend_exact(team, b, c.a.tail, b.tails, b.sinks + static_cast<std::int64_t>(b.tiles) * c.group);
        if (c.out_rotation != 0.0f) rotate_vectors(team, b.out(), Rows, c.out_dim, c.out_rotation);
    } else {
        const int share = (b.tiles + c.a.splits - 1) / c.a.splits, first = b.split * share;
        const int last = first + share < b.tiles ? first + share : b.tiles;
        for (int tile = first; tile < last; ++tile) {
            const std::int64_t position = b.sinks + static_cast<std::int64_t>(tile) * c.group;
            if (!b.any_seen(position, c.group)) continue;
            const std::byte* const record = b.record(tile);
            if (tile + 1 < last) prefetch(team, b.record(tile + 1), c.content_bytes);
            if constexpr (Tensor)
                attend_record_tensor(team, b, record, position);
            else
                attend_record(team, b, record, position);
        }
    }
    const int floats = c.out_dim + 2;
    const auto state_of = [&](int row) {
        const std::ptrdiff_t number =
            (static_cast<std::ptrdiff_t>(b.sequence) * c.a.kv_heads + b.head) * c.rows + b.first_row + row;
        return c.a.workspace + (number * (c.a.splits + 1) + b.split) * floats;
    };
    for_each(team, Rows * floats, [&](int i) {
        const int row = i / floats, at = i - row * floats;
        if (!b.is_row(row)) return;
        state_of(row)[at] = at == 0 ? b.state.largest[row] : at == 1 ? b.state.total[row] : b.out()[row * c.out_dim + at - 2];
    });
}

/// The body of the second kernel: query row `item` of [sequence][kv_head][row]. `shared`: out_dim floats.
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
    for (int s = 0; s < parts; ++s) largest = max(largest, states[s * floats]);
    total = mul(total, exp2(sub(logit, largest)));
    for (int s = 0; s < parts; ++s) total = fma(states[s * floats + 1], exp2(sub(states[s * floats], largest)), total);
    const float inverse = total > 0.0f ? div(1.0f, total) : 0.0f;
    for_each(team, c.out_dim, [&](int d) {
        float sum = 0.0f;
        for (int s = 0; s < parts; ++s) sum = fma(states[s * floats + 2 + d], exp2(sub(states[s * floats], largest)), sum);
        shared[d] = mul(sum, inverse);
    });
    team.barrier();
    if (c.out_rotation != 0.0f && c.a.output_basis == basis::original) rotate_vectors(team, shared, 1, c.out_dim, c.out_rotation);
    const std::ptrdiff_t to = sequence * c.a.out.sequence_stride + token * c.a.out.token_stride + head * c.a.out.head_stride;
    for_each(team, c.out_dim / 8, [&](int i) {
        float x[8];
        KVARN_UNROLL
        for (int k = 0; k < 8; ++k) x[k] = shared[i * 8 + k];
        if (c.a.out.type == element_type::f16)
            store8(static_cast<half*>(c.a.out.data) + to + i * 8, x);
        else if (c.a.out.type == element_type::bf16)
            store8(static_cast<bfloat16*>(c.a.out.data) + to + i * 8, x);
        else
            store8(static_cast<float*>(c.a.out.data) + to + i * 8, x);
    });
    if (c.a.log_sum_exp == nullptr || team.rank() != 0) return;
    const int heads = c.a.kv_heads * c.a.heads_per_kv;
    c.a.log_sum_exp[(static_cast<std::ptrdiff_t>(sequence) * c.a.new_tokens + token) * heads + head] =
        total > 0.0f ? mul(add(largest, std::log2(total)), ln_2) : bits_as<float>(0xff800000u);
}

}  // namespace kvarn::cuda::detail
