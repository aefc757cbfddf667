// SPDX-License-Identifier: Apache-2.0
#pragma once
// What decode attention on records is compared with: a paged fp16 decode attention, one new token, head_dim 128, grouped query
// heads, split over tokens. K and V [page][token][head][channel] half, q and out [sequence][head][channel] half. float
// accumulators. Sixteen lanes read a token's vector in one 16-byte load each; every half-warp has eight loads in flight and a
// softmax state of its own. Frozen: its source changes only with a note beside the numbers.

#include <cuda_fp16.h>

#include <cstdint>

namespace bench {

inline constexpr int fp16_threads = 128;
inline constexpr int fp16_dim = 128;
inline constexpr int fp16_page_tokens = 16;

struct fp16_call {
    const __half* k;
    const __half* v;
    const std::int32_t* table;  // [sequence][pages]
    const __half* q;
    float* workspace;  // [sequence][kv head][row][split][2 + fp16_dim]: as kvarn's combine kernel reads it
    int kv_heads, pages, tokens, splits;
    float scale;  // softmax scale times log2(e)
};

__device__ inline void widen8(const uint4& x, float (&to)[8])
{
    const __half2* const h = reinterpret_cast<const __half2*>(&x);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const float2 f = __half22float2(h[i]);
        to[2 * i] = f.x;
        to[2 * i + 1] = f.y;
    }
}

template <int Rows>
__global__ void __launch_bounds__(fp16_threads) fp16_attention(const __grid_constant__ fp16_call c)
{
    constexpr int groups = fp16_threads / 16, together = 4;
    const int split = static_cast<int>(blockIdx.x), head = static_cast<int>(blockIdx.y), sequence = static_cast<int>(blockIdx.z);
    const int lane = static_cast<int>(threadIdx.x) % 16, group = static_cast<int>(threadIdx.x) / 16;
    const int share = ((c.tokens + c.splits - 1) / c.splits + fp16_page_tokens - 1) / fp16_page_tokens * fp16_page_tokens;
    const int first = split * share, last = min(first + share, c.tokens);
    const std::int32_t* const table = c.table + static_cast<std::ptrdiff_t>(sequence) * c.pages;

    float q[Rows][8], acc[Rows][8] = {}, largest[Rows], total[Rows];
#pragma unroll
    for (int r = 0; r < Rows; ++r) {
        const auto row = (static_cast<std::ptrdiff_t>(sequence) * c.kv_heads + head) * Rows + r;
        widen8(reinterpret_cast<const uint4*>(c.q + row * fp16_dim)[lane], q[r]);
#pragma unroll
        for (int i = 0; i < 8; ++i) q[r][i] *= c.scale;
        largest[r] = -3.0e38f;
        total[r] = 0.0f;
    }
    for (int t = first + group; t < last; t += groups * together) {
        uint4 keys[together], values[together];
#pragma unroll
        for (int u = 0; u < together; ++u) {
            const int token = min(t + u * groups, last - 1);
            const auto place =
                static_cast<std::ptrdiff_t>(table[token / fp16_page_tokens]) * fp16_page_tokens + token % fp16_page_tokens;
            const std::ptrdiff_t at = (place * c.kv_heads + head) * fp16_dim;
            keys[u] = reinterpret_cast<const uint4*>(c.k + at)[lane];
            values[u] = reinterpret_cast<const uint4*>(c.v + at)[lane];
        }
        float s[Rows][together];
#pragma unroll
        for (int u = 0; u < together; ++u) {
            float k[8];
            widen8(keys[u], k);
#pragma unroll
            for (int r = 0; r < Rows; ++r) {
                float dot = 0.0f;
#pragma unroll
                for (int i = 0; i < 8; ++i) dot = fmaf(q[r][i], k[i], dot);
#pragma unroll
                for (int mask = 8; mask >= 1; mask /= 2) dot += __shfl_xor_sync(0xffffu << (group % 2 * 16), dot, mask);
                s[r][u] = t + u * groups < last ? dot : -INFINITY;
            }
        }
#pragma unroll
        for (int r = 0; r < Rows; ++r) {
            float most = largest[r];
#pragma unroll
            for (int u = 0; u < together; ++u) most = fmaxf(most, s[r][u]);
            const float factor = exp2f(largest[r] - most);
            largest[r] = most;
            total[r] *= factor;
#pragma unroll
            for (int i = 0; i < 8; ++i) acc[r][i] *= factor;
#pragma unroll
            for (int u = 0; u < together; ++u) {
                s[r][u] = exp2f(s[r][u] - most);
                total[r] += s[r][u];
            }
        }
#pragma unroll
        for (int u = 0; u < together; ++u) {
            float v[8];
            widen8(values[u], v);
#pragma unroll
            for (int r = 0; r < Rows; ++r)
#pragma unroll
                for (int i = 0; i < 8; ++i) acc[r][i] = fmaf(s[r][u], v[i], acc[r][i]);
        }
    }

    __shared__ float states[groups][2], outs[groups][fp16_dim];
#pragma unroll
    for (int r = 0; r < Rows; ++r) {
        __syncthreads();
        if (lane == 0) states[group][0] = largest[r], states[group][1] = total[r];
#pragma unroll
        for (int i = 0; i < 8; ++i) outs[group][lane * 8 + i] = acc[r][i];
        __syncthreads();
        float most = states[0][0];
        for (int g = 1; g < groups; ++g) most = fmaxf(most, states[g][0]);
        float sum = 0.0f, out = 0.0f;
        for (int g = 0; g < groups; ++g) {
            const float factor = exp2f(states[g][0] - most);
            sum = fmaf(states[g][1], factor, sum);
            out = fmaf(outs[g][threadIdx.x], factor, out);
        }
        const auto row = (static_cast<std::ptrdiff_t>(sequence) * c.kv_heads + head) * Rows + r;
        float* const to = c.workspace + (row * c.splits + split) * (fp16_dim + 2);
        if (threadIdx.x == 0) to[0] = most, to[1] = sum;
        to[2 + threadIdx.x] = out;
    }
}

}  // namespace bench
