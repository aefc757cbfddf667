// SPDX-License-Identifier: Apache-2.0
#pragma once
// One warp and the records of its block, a tile at a time, in spans of 32, 64 or 128 tokens. K and V are never decoded: the channel
// scale goes into the query, the token scale into the weights (attention/sealed.hpp has the equations). In: records. Out: the
// warp's softmax state and outputs, rotated basis. float accumulators. No allocation, no barrier.

#include <cstddef>
#include <cstdint>

#include <kvarn/cuda/attention/block.cuh>
#include <kvarn/cuda/attention/products.cuh>

namespace kvarn::cuda::detail {

/// Tokens of a record that a warp takes at a time.
template <int Group>
inline constexpr int span_tokens = Group < 128 ? Group : 128;

/// What a history has of `tokens` tokens of a tile from its token `first` on, and the position of that one, if it has any.
struct tile_part {
    int position;
    visible_tokens part;

    KVARN_DEVICE KVARN_INLINE tile_part(const tile_span& s, int first, int tokens) noexcept
        : position(s.position - s.first + first), part{s.first - first, s.first + s.count - first}
    {
        part.begin = part.begin < 0 ? 0 : part.begin > tokens ? tokens : part.begin;
        part.end = part.end < part.begin ? part.begin : part.end > tokens ? tokens : part.end;
    }
};

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

/// A warp and a span of a tile's record: its tokens from `first` on.
template <int Group, bool Latent, class Team, class Block>
KVARN_DEVICE KVARN_INLINE void attend_span(Team& team, const Block& b, const std::byte* record, int tile, int first,
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
    const tile_part of(b.span(tile), first, 8 * P);
    const bool masked = is_masked(b, of.position, of.part, 8 * P);
    const float factor = absorb_scores(team, b, s, masked, {g, own, of.position, of.part}, weight_shift, state);
    if constexpr (Latent)
        attend_keys_as_values<P, Group>(team, b, record, k, s, factor, state);
    else if (c.value_block == 64)
        attend_values<8, P>(team, b, record, first, s, factor, state);
    else
        attend_values<16, P>(team, b, record, first, s, factor, state);
}

/// The block's records, a tile at a time for each warp.
template <int Group, bool Latent, class Team, class Block>
KVARN_DEVICE KVARN_INLINE void attend_records(Team& team, const Block& b, row_state& state) noexcept
{
    const attention_call& c = b.c;
    const int share = (b.tiles + c.a.splits - 1) / c.a.splits, begin = b.split * share;
    const int end = begin + share < b.tiles ? begin + share : b.tiles;
    for (int tile = begin + b.warp; tile < end; tile += attention_warps) {
        const tile_part of(b.span(tile), 0, Group);
        const visible_tokens live = seen_by_any(b, of.position, of.part);
        if (live.begin >= live.end) continue;
        const std::byte* const record = b.record(tile);
        if (tile + attention_warps < end) prefetch(b.record(tile + attention_warps), c.content_bytes, b.lane);
        for (int first = 0; first < Group; first += span_tokens<Group>)
            attend_span<Group, Latent>(team, b, record, tile, first, state);
    }
}

}  // namespace kvarn::cuda::detail
