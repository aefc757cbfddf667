// SPDX-License-Identifier: Apache-2.0
#pragma once
// What decode attention on records is compared with: paged fp16 decode attention, one new token, head_dim 128, grouped query
// heads, split over tokens. K and V [page][token][head][channel], q [sequence][head][channel], all half; float accumulators. Here
// what its two kernels share, and the one on CUDA cores: sixteen lanes read a token's vector in one 16-byte load each; every
// half-warp has eight loads in flight and a softmax state of its own. fp16_tensor_attention.cuh has the other. Bodies over a team,
// as the library's kernels (include/kvarn/cuda/team.cuh). What they leave in the workspace is merged by the library's combine
// kernel. Frozen: its source changes only with a note beside the numbers.

#include <kvarn/cuda/attention.cuh>

#include <cstddef>
#include <cstdint>
#include <limits>

namespace bench {

using kvarn::cuda::detail::exp2;
using kvarn::cuda::detail::quad;

inline constexpr int fp16_warps = 4;
inline constexpr int fp16_threads = 32 * fp16_warps;
inline constexpr int fp16_dim = 128;
inline constexpr int fp16_page_tokens = 16;
inline constexpr float fp16_lowest = -3.0e38f;                                 // of a row that has seen nothing
inline constexpr float fp16_hidden = -std::numeric_limits<float>::infinity();  // the score of no token

struct fp16_call {
    const kvarn::half* k;
    const kvarn::half* v;
    const std::int32_t* table;  // [sequence][pages]
    const kvarn::half* q;
    float* workspace;  // [sequence][kv head][row][split][2 + fp16_dim]: as the library's combine kernel reads it
    int kv_heads, pages, tokens, splits;
    float scale;  // softmax scale times log2(e)
};

/// Floats of workspace for `vectors` query vectors.
[[nodiscard]] constexpr std::size_t fp16_workspace_floats(std::size_t vectors, int splits) noexcept
{
    return vectors * static_cast<std::size_t>(splits) * (fp16_dim + 2);
}

/// What merges the splits: one query row of every head for each combine block. `out` takes the outputs.
[[nodiscard]] inline kvarn::cuda::detail::attention_call fp16_combine_call(const fp16_call& c, int sequences, int rows,
                                                                           const kvarn::cuda::batch_vectors<void>& out) noexcept
{
    kvarn::cuda::attention_arguments a;
    a.out = out;
    a.sequences = sequences;
    a.kv_heads = c.kv_heads;
    a.heads_per_kv = rows;
    a.splits = c.splits - 1;  // no part for exact tokens: the last one is as good as the others
    a.workspace = c.workspace;
    auto merge = kvarn::cuda::detail::make_attention_call(kvarn::parse_format("k8v8_g128", fp16_dim).value, a);
    merge.out_rotation = 0.0f;
    return merge;
}

/// One block's share of the work.
struct fp16_share {
    const fp16_call& c;
    int split, head, first, last;
    const std::int32_t* table;  // of the sequence
    std::ptrdiff_t row;         // the block's first query vector

    KVARN_DEVICE KVARN_INLINE fp16_share(const fp16_call& call, int item, int rows) noexcept : c(call)
    {
        split = item % c.splits;
        head = item / c.splits % c.kv_heads;
        const int sequence = item / c.splits / c.kv_heads;
        const int each = ((c.tokens + c.splits - 1) / c.splits + fp16_page_tokens - 1) / fp16_page_tokens * fp16_page_tokens;
        first = split * each;
        last = first + each < c.tokens ? first + each : c.tokens;
        table = c.table + static_cast<std::ptrdiff_t>(sequence) * c.pages;
        row = (static_cast<std::ptrdiff_t>(sequence) * c.kv_heads + head) * rows;
    }
    /// Elements from K's or V's start to a token of a page.
    [[nodiscard]] KVARN_DEVICE KVARN_INLINE std::ptrdiff_t place(int page, int token) const noexcept
    {
        return ((static_cast<std::ptrdiff_t>(page) * fp16_page_tokens + token) * c.kv_heads + head) * fp16_dim;
    }
};

/// Eight halves from a 16-byte aligned address.
KVARN_DEVICE KVARN_INLINE quad load_quad(const kvarn::half* from) noexcept
{
    return *reinterpret_cast<const quad*>(from);
}

KVARN_DEVICE KVARN_INLINE void widen8(const quad& x, float (&to)[8]) noexcept
{
    KVARN_UNROLL
    for (int i = 0; i < 4; ++i) {
#if defined(__CUDA_ARCH__)
        asm("{ .reg .f16 l, h; mov.b32 {l, h}, %2; cvt.f32.f16 %0, l; cvt.f32.f16 %1, h; }"
            : "=f"(to[2 * i]), "=f"(to[2 * i + 1])
            : "r"(x.w[i]));
#else
        to[2 * i] = kvarn::to_float(kvarn::half{static_cast<std::uint16_t>(x.w[i])});
        to[2 * i + 1] = kvarn::to_float(kvarn::half{static_cast<std::uint16_t>(x.w[i] >> 16)});
#endif
    }
}

/// Softmax states and outputs of the parts of a block, in shared memory: [part][row]{largest, total, -, -, out[fp16_dim]}.
template <int Rows, int Parts>
struct fp16_states {
    static constexpr int stride = 4 + fp16_dim, bytes = 4 * Parts * Rows * stride;
    float* shared;

    [[nodiscard]] KVARN_DEVICE KVARN_INLINE float* at(int part, int row) const noexcept
    {
        return shared + (part * Rows + row) * stride;
    }
    /// Merges the parts into the workspace.
    template <class Team>
    KVARN_DEVICE KVARN_INLINE void merge(Team& team, const fp16_share& b) const noexcept
    {
        team.barrier();
        const int channel = team.rank();
        for (int r = 0; r < Rows; ++r) {
            float most = at(0, r)[0], sum = 0.0f, out = 0.0f;
            KVARN_UNROLL
            for (int p = 1; p < Parts; ++p) most = at(p, r)[0] > most ? at(p, r)[0] : most;
            KVARN_UNROLL
            for (int p = 0; p < Parts; ++p) {
                const float factor = exp2(at(p, r)[0] - most);
                sum += at(p, r)[1] * factor;
                out += at(p, r)[4 + channel] * factor;
            }
            float* const to = b.c.workspace + ((b.row + r) * b.c.splits + b.split) * (fp16_dim + 2);
            if (channel == 0) to[0] = most, to[1] = sum;
            to[2 + channel] = out;
        }
    }
};

/// The body on CUDA cores: block `item` of [sequence][kv head][split]. `shared`: shared_bytes.
template <int Rows>
struct fp16_cores {
    static constexpr int groups = fp16_threads / 16, together = 4;
    using states = fp16_states<Rows, groups>;
    static constexpr int shared_bytes = states::bytes;
    static constexpr int resident = Rows > 4 ? 2 : 3;  // blocks of a multiprocessor that registers must do for

    template <class Team>
    KVARN_DEVICE KVARN_INLINE static void run(Team& team, const fp16_call& c, int item, float* shared) noexcept
    {
        const fp16_share b(c, item, Rows);
        const int lane = team.rank() % 16, group = team.rank() / 16;
        float q[Rows][8], acc[Rows][8] = {}, largest[Rows], total[Rows];
        KVARN_UNROLL
        for (int r = 0; r < Rows; ++r) {
            widen8(load_quad(c.q + (b.row + r) * fp16_dim + 8 * lane), q[r]);
            KVARN_UNROLL
            for (int i = 0; i < 8; ++i) q[r][i] *= c.scale;
            largest[r] = fp16_lowest;
            total[r] = 0.0f;
        }
        for (int start = b.first; start < b.last; start += groups * together) {
            quad keys[together], values[together];
            KVARN_UNROLL
            for (int u = 0; u < together; ++u) {
                const int wanted = start + group + u * groups, token = wanted < b.last ? wanted : b.last - 1;
                const std::ptrdiff_t at = b.place(b.table[token / fp16_page_tokens], token % fp16_page_tokens) + 8 * lane;
                keys[u] = load_quad(c.k + at);
                values[u] = load_quad(c.v + at);
            }
            float s[Rows][together];
            KVARN_UNROLL
            for (int u = 0; u < together; ++u) {
                float k[8];
                widen8(keys[u], k);
                KVARN_UNROLL
                for (int r = 0; r < Rows; ++r) {
                    float dot = 0.0f;
                    KVARN_UNROLL
                    for (int i = 0; i < 8; ++i) dot += q[r][i] * k[i];
                    KVARN_UNROLL
                    for (int mask = 8; mask >= 1; mask /= 2) dot += team.shuffle_xor(dot, mask);
                    s[r][u] = start + group + u * groups < b.last ? dot : fp16_hidden;
                }
            }
            KVARN_UNROLL
            for (int r = 0; r < Rows; ++r) {
                float most = largest[r];
                KVARN_UNROLL
                for (int u = 0; u < together; ++u) most = s[r][u] > most ? s[r][u] : most;
                const float factor = exp2(largest[r] - most);
                largest[r] = most;
                total[r] *= factor;
                KVARN_UNROLL
                for (int i = 0; i < 8; ++i) acc[r][i] *= factor;
                KVARN_UNROLL
                for (int u = 0; u < together; ++u) {
                    s[r][u] = exp2(s[r][u] - most);
                    total[r] += s[r][u];
                }
            }
            KVARN_UNROLL
            for (int u = 0; u < together; ++u) {
                float v[8];
                widen8(values[u], v);
                KVARN_UNROLL
                for (int r = 0; r < Rows; ++r) {
                    KVARN_UNROLL
                    for (int i = 0; i < 8; ++i) acc[r][i] += s[r][u] * v[i];
                }
            }
        }
        const states left{shared};
        KVARN_UNROLL
        for (int r = 0; r < Rows; ++r) {
            float* const to = left.at(group, r);
            if (lane == 0) to[0] = largest[r], to[1] = total[r];
            KVARN_UNROLL
            for (int i = 0; i < 8; ++i) to[4 + 8 * lane + i] = acc[r][i];
        }
        left.merge(team, b);
    }
};

#if defined(__CUDACC__)
/// `Body`: fp16_cores or fp16_tensor.
template <class Body>
__global__ void __launch_bounds__(fp16_threads, Body::resident) fp16_attention(const __grid_constant__ fp16_call c)
{
    extern __shared__ float4 fp16_shared[];
    kvarn::cuda::detail::block_team team;
    Body::run(team, c, static_cast<int>(blockIdx.x), reinterpret_cast<float*>(fp16_shared));
}
#endif

}  // namespace bench
