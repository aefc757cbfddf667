// SPDX-License-Identifier: Apache-2.0
#pragma once
// The bodies of the two kernels of decode attention. One thread block attends with up to eight query rows of a sequence and KV head
// to a range of its records, or to its exact tokens; its warps take tiles in turn, each with a softmax state and outputs of its
// own, and no barrier between them. What they leave goes to the workspace, outputs of records in the rotated basis, those of exact
// tokens in the original one; the second kernel merges and writes. float accumulators. No allocation; for thread blocks.

#include <cstddef>
#include <cstdint>
#include <type_traits>

#include <kvarn/cuda/attention/exact.cuh>
#include <kvarn/cuda/attention/records.cuh>

namespace kvarn::cuda::detail {

inline constexpr int combine_threads = 128;

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
    if (b.warp == 0 && j == 0) {
        to[0] = largest;
        to[1] = total;
    }
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
/// format's; Latent: V is read from K; General: there is a mask or ALiBi.
template <int Group, bool Latent, bool General, class Team>
KVARN_DEVICE KVARN_INLINE void attend_item(Team& team, const attention_call& c, int item, float* shared) noexcept
{
    const std::conditional_t<General, general_block, attention_block> b(team, c, item, shared);
    begin_rows(team, b);
    row_state state;
    if (b.is_exact()) {
        attend_exact(team, b, c.a.sink, b.sinks, b.sink_position, state);
        attend_exact(team, b, c.a.tail, b.tails, b.tail_position, state);
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
