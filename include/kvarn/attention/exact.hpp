// SPDX-License-Identifier: Apache-2.0
#pragma once
// Exact tokens (sink, tail) and all query rows of their KV head. In: float, half or bfloat16 K and V of any strides. Tokens are converted
// to float once, exact_block at a time, for all rows. float arithmetic in a fixed order. No allocation; works in the caller's scratch.

#include <cstddef>

#include <kvarn/attention/visible.hpp>
#include <kvarn/rotate/hadamard.hpp>

namespace kvarn::detail {

/// Scores of `tokens` <= exact_block keys [exact_block][channels] for `Heads` queries [channels]; scores[h * stride + t].
template <class Arch, int Heads>
KVARN_NOINLINE void score_exact(const float* keys, int tokens, const float* queries, int channels, float* scores, std::ptrdiff_t stride) noexcept
{
    using k = simd::kernels<Arch>;
    using lane = simd::lanes<Arch>;
    using part = simd::part_lanes<Arch>;
    constexpr int together = part::count < simd::lane_count ? 1 : 4 / Heads;  // tokens at a time
    alignas(64) float folded[Heads][16 * k::width];
    for (int first = 0; first < tokens; first += 16) {
        for (int t = 0; t < 16; t += together) {
            lane sums[together * Heads];
            const float* const key = keys + static_cast<std::ptrdiff_t>(first + t) * channels;
            simd::sum_in_parts<Arch>(sums, [&](part (&sum)[together * Heads], int e) KVARN_LAMBDA {
                KVARN_UNROLL
                for (int i = 0; i < together * Heads; ++i) sum[i] = part::broadcast(0.0f);
                for (int c = e; c < channels; c += simd::lane_count) {
                    part q[Heads];
                    KVARN_UNROLL
                    for (int h = 0; h < Heads; ++h) q[h] = part::load(queries + h * channels + c);
                    KVARN_UNROLL
                    for (int i = 0; i < together; ++i) {
                        const part x = part::load(key + i * channels + c);
                        KVARN_UNROLL
                        for (int h = 0; h < Heads; ++h) {
                            sum[i * Heads + h] = fma(x, q[h], sum[i * Heads + h]);
                            sum[i * Heads + h].hold();
                        }
                    }
                }
            });
            KVARN_UNROLL
            for (int i = 0; i < together; ++i)
                KVARN_UNROLL
                for (int h = 0; h < Heads; ++h) k::store(folded[h] + (t + i) * k::width, fold(sums[i * Heads + h]));
        }
        for (int h = 0; h < Heads; ++h) simd::sum_folded_rows<Arch>(folded[h]).store(scores + h * stride + first);
    }
}

/// out[h][channel] += sum over `tokens` of weights[h * stride + t] * values[t][channel].
template <class Arch, int Heads>
KVARN_NOINLINE void add_exact_values(const float* values, int tokens, const float* weights, std::ptrdiff_t stride, float* out, int channels) noexcept
{
    using lane = simd::part_lanes<Arch>;
    constexpr int n = lane::count;
    constexpr int blocks = 4 / Heads;  // of n channels at a time
    const auto block = [&](auto width, int c) KVARN_LAMBDA {
        constexpr int wide = decltype(width)::value;
        lane sum[Heads][wide];
        KVARN_UNROLL
        for (int h = 0; h < Heads; ++h)
            KVARN_UNROLL
            for (int j = 0; j < wide; ++j) sum[h][j] = lane::load(out + h * channels + c + n * j);
        for (int t = 0; t < tokens; ++t) {
            lane v[wide];
            KVARN_UNROLL
            for (int j = 0; j < wide; ++j) v[j] = lane::load(values + static_cast<std::ptrdiff_t>(t) * channels + c + n * j);
            KVARN_UNROLL
            for (int h = 0; h < Heads; ++h) {
                const lane w = lane::broadcast(weights[h * stride + t]);
                KVARN_UNROLL
                for (int j = 0; j < wide; ++j) {
                    sum[h][j] = fma(v[j], w, sum[h][j]);
                    sum[h][j].hold();
                }
            }
        }
        KVARN_UNROLL
        for (int h = 0; h < Heads; ++h)
            KVARN_UNROLL
            for (int j = 0; j < wide; ++j) sum[h][j].store(out + h * channels + c + n * j);
    };
    int c = 0;
    for (; c + n * blocks <= channels; c += n * blocks) block(std::integral_constant<int, blocks>{}, c);
    if constexpr (n * blocks > simd::lane_count)
        for (; c < channels; c += n) block(std::integral_constant<int, 1>{}, c);
}

/// Adds `tokens` <= exact_block tokens, already in r.keys and r.values, to the states and outputs of all rows.
template <class Arch>
KVARN_NOINLINE void attend_exact(const format& f, int tokens, bool rotated, float cap, const visible_block& block, const attention_rows& r) noexcept
{
    const attention_extents e(f);
    const float* const queries = rotated ? r.rotated_query : r.original_query;
    const product_rows& x = r.product;
    for_row_groups(r.rows, [&](int row, int heads) KVARN_LAMBDA {
        if (!any_visible(r.seen + row, heads)) return;
        with_heads<4>(heads, [&](auto n, int first) KVARN_LAMBDA {
            score_exact<Arch, n()>(r.keys, tokens, queries + (row + first) * e.query(), e.query(), x.y + first * x.stride, x.stride);
        });
        for (int h = 0; h < heads; ++h) {
            float* const s = x.y + h * x.stride;
            if (r.seen[row + h].empty()) {
                for (int t = 0; t < exact_block; ++t) s[t] = 0.0f;
                continue;
            }
            if (cap != 0.0f) soft_cap<Arch>(s, exact_block, cap);
            if (block.slopes != nullptr) add_alibi<Arch>(block, row + h, s, exact_block);
            hide_scores(s, exact_block, r.seen[row + h]);
            if (block.masked()) hide_masked<Arch>(block, row + h, r.seen[row + h], -std::numeric_limits<float>::infinity(), s);
            absorb_scores<Arch>(s, exact_block, reduce_max(largest_of<Arch>(s, exact_block)), r.state[row + h], r.out + (row + h) * e.values,
                                e.values);
        }
        with_heads<4>(heads, [&](auto n, int first) KVARN_LAMBDA {
            add_exact_values<Arch, n()>(r.values, tokens, x.y + first * x.stride, x.stride, r.out + (row + first) * e.values, e.values);
        });
    });
}

}  // namespace kvarn::detail
