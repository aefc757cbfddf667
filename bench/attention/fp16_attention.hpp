// SPDX-License-Identifier: Apache-2.0
#pragma once
// The baseline of the attention benchmarks: one decode step over an fp16 cache, as well tuned as we know how. It is what an
// engine would run instead of this library, so the ratios that are published stand on it. Frozen: its source changes only with a
// note in docs/performance.md. It shares nothing with the library but the type `half`.
// In: one KV head, K and V [token][channel] contiguous; the R query heads of its group, float, already multiplied by the softmax
// scale. Out: R x head_dim floats, normalised. Accumulates in float. No allocation, no state: any number of threads.
//
// Form: blocks of 4 KiB of K and V; scores of a block, online softmax, weighted sum of its V. Each half is converted once for all
// heads. Both products keep eight accumulators (eight chains hide the latency of two FMA per cycle): 8 / R tokens x R heads for
// the scores, R heads x 8 / R vectors of channels for the sum. While one operand is multiplied the next one is prefetched.
// Scores lie as [token][head], so lane i of every score vector belongs to head i % R, for maximum, exp and sum alike.
// Without AVX2 + FMA + F16C a plain form runs, which is left to the compiler and is no yardstick.

#include <cmath>
#include <cstddef>
#include <limits>
#include <type_traits>

#include <kvarn/base/element.hpp>

#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#define KVARN_BENCH_FP16_AVX2 1
#include <immintrin.h>
#endif

namespace kvarn_bench {

/// The plain form: same arguments and result as fp16_attention.
template <int HeadDim, int R>
void fp16_attention_plain(const kvarn::half* k, const kvarn::half* v, std::size_t tokens, const float* q, float* out)
{
    constexpr int block = 64;
    float row[HeadDim], scores[R][block], sums[R][HeadDim] = {}, top[R], total[R] = {};
    for (float& x : top) x = -std::numeric_limits<float>::infinity();
    for (std::size_t done = 0; done < tokens; done += block, k += block * HeadDim, v += block * HeadDim) {
        for (int t = 0; t < block; ++t) {
            for (int c = 0; c < HeadDim; ++c) row[c] = kvarn::to_float(k[t * HeadDim + c]);
            for (int h = 0; h < R; ++h) {
                float part[8] = {};
                for (int c = 0; c < HeadDim; c += 8)
                    for (int i = 0; i < 8; ++i) part[i] += row[c + i] * q[h * HeadDim + c + i];
                scores[h][t] = ((part[0] + part[4]) + (part[2] + part[6])) + ((part[1] + part[5]) + (part[3] + part[7]));
            }
        }
        for (int h = 0; h < R; ++h) {
            float highest = top[h];
            for (const float s : scores[h]) highest = s > highest ? s : highest;
            const float factor = std::exp(top[h] - highest);
            top[h] = highest;
            total[h] *= factor;
            for (float& x : sums[h]) x *= factor;
            for (float& s : scores[h]) total[h] += s = std::exp(s - highest);
        }
        for (int t = 0; t < block; ++t) {
            for (int c = 0; c < HeadDim; ++c) row[c] = kvarn::to_float(v[t * HeadDim + c]);
            for (int h = 0; h < R; ++h)
                for (int c = 0; c < HeadDim; ++c) sums[h][c] += scores[h][t] * row[c];
        }
    }
    for (int h = 0; h < R; ++h)
        for (int c = 0; c < HeadDim; ++c) out[h * HeadDim + c] = sums[h][c] / total[h];
}

#if defined(KVARN_BENCH_FP16_AVX2)
namespace fp16_detail {

/// The shapes of one instance, and the pace of its prefetch: while eight accumulators advance once, one operand is read by
/// `fetched` bytes, and the next one is fetched by as many. A burst would fill the miss queue and stall.
template <int HeadDim, int R>
struct shape {
    // Tokens of 4 KiB or a little less; larger blocks lose the hardware prefetcher.
    static constexpr int block = HeadDim <= 128 ? 2048 / HeadDim / 16 * 16 : 2048 / HeadDim;
    static constexpr int tokens = 8 / R;          // of one step of the scores
    static constexpr int vectors = 8 / R;         // of channels of one pass over a block of V
    static constexpr int fetched = 16 * 8 / R;
};

/// Steps per prefetch of `fetched` bytes each, to fetch no line twice: as many as divide `steps`.
constexpr int steps_at_once(int fetched, int steps)
{
    int n = fetched < 64 ? 64 / fetched : 1;
    while (steps % n != 0) n /= 2;
    return n;
}

KVARN_INLINE __m256 load(const kvarn::half* p)
{
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}

enum class level { l1, l2 };

template <level To, int Bytes>
KVARN_INLINE void prefetch(const void* p)
{
    KVARN_UNROLL
    for (int i = 0; i < Bytes; i += 64) {
        if constexpr (To == level::l1)
            _mm_prefetch(static_cast<const char*>(p) + i, _MM_HINT_T0);
        else
            _mm_prefetch(static_cast<const char*>(p) + i, _MM_HINT_T1);
    }
}

/// Lane i of the result is the sum of the lanes of a[i].
KVARN_INLINE __m256 sums_of_8(const __m256 (&a)[8])
{
    __m256 b[4], c[2];
    KVARN_UNROLL
    for (int i = 0; i < 4; ++i)  // 128-bit halves: a[i], a[i + 4]
        b[i] = _mm256_add_ps(_mm256_blend_ps(a[i], a[i + 4], 0xf0), _mm256_permute2f128_ps(a[i], a[i + 4], 0x21));
    KVARN_UNROLL
    for (int i = 0; i < 2; ++i)  // pairs of lanes: a[i], a[i + 2], a[i + 4], a[i + 6]
        c[i] = _mm256_add_ps(_mm256_blend_ps(b[i], b[i + 2], 0xcc), _mm256_shuffle_ps(b[i], b[i + 2], 0x4e));
    const __m256 d = _mm256_add_ps(_mm256_shuffle_ps(c[0], c[1], 0x88), _mm256_shuffle_ps(c[0], c[1], 0xdd));
    return _mm256_permute_ps(d, 0xd8);  // each half was 0 2 1 3
}

/// Joins the lanes that belong to one head: i, i + R, i + 2 R ...
template <int R, class F>
KVARN_INLINE __m256 over_heads(__m256 x, F join)
{
    if constexpr (R < 8) x = join(x, _mm256_permute2f128_ps(x, x, 1));
    if constexpr (R < 4) x = join(x, _mm256_permute_ps(x, 0x4e));
    if constexpr (R < 2) x = join(x, _mm256_permute_ps(x, 0xb1));
    return x;
}

/// x[i] = 2^x[i] for N vectors side by side; x <= 0, below -126 counts as -126. Minimax on [-1/2, 1/2], relative error 1e-7.
template <int N>
KVARN_INLINE void exp2_all(__m256 (&x)[N])
{
    constexpr float coefficient[] = {1.327647198e-3f, 9.675541334e-3f, 5.550713274e-2f, 2.402211972e-1f, 6.931469671e-1f, 1.0f};
    const __m256 magic = _mm256_set1_ps(0x1.8p23f);  // adding it rounds to an integer, which is then in the low bits
    __m256 n[N], p[N];
    KVARN_UNROLL
    for (int i = 0; i < N; ++i) {
        x[i] = _mm256_max_ps(x[i], _mm256_set1_ps(-126.0f));
        n[i] = _mm256_add_ps(x[i], magic);
        x[i] = _mm256_sub_ps(x[i], _mm256_sub_ps(n[i], magic));
        p[i] = _mm256_set1_ps(coefficient[0]);
    }
    KVARN_UNROLL
    for (int k = 1; k < 6; ++k) {
        KVARN_UNROLL
        for (int i = 0; i < N; ++i) p[i] = _mm256_fmadd_ps(p[i], x[i], _mm256_set1_ps(coefficient[k]));
    }
    KVARN_UNROLL
    for (int i = 0; i < N; ++i)
        x[i] = _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(p[i]), _mm256_slli_epi32(_mm256_castps_si256(n[i]), 23)));
}

/// scores[token][head] of one block; q is [channel / 8][head][8]. Fetches the block's V meanwhile: to L1, but for R = 1, where
/// nothing but memory counts, to L2, since the L1 keeps too few misses in flight.
template <int HeadDim, int R>
KVARN_INLINE void multiply_keys(const kvarn::half* k, const float* q, float* scores, const kvarn::half* v)
{
    using s = shape<HeadDim, R>;
    constexpr int unroll = steps_at_once(s::fetched, HeadDim / 8);
    const char* fetch = reinterpret_cast<const char*>(v);
    for (int t = 0; t < s::block; t += s::tokens, k += s::tokens * HeadDim) {
        __m256 sum[8];
        KVARN_UNROLL
        for (int i = 0; i < 8; ++i) sum[i] = _mm256_setzero_ps();
        for (int c0 = 0; c0 < HeadDim; c0 += 8 * unroll, fetch += unroll * s::fetched) {
            prefetch<R == 1 ? level::l2 : level::l1, unroll * s::fetched>(fetch);
            KVARN_UNROLL
            for (int c = c0; c < c0 + 8 * unroll; c += 8) {
                __m256 x[s::tokens];
                KVARN_UNROLL
                for (int i = 0; i < s::tokens; ++i) x[i] = load(k + i * HeadDim + c);
                KVARN_UNROLL
                for (int h = 0; h < R; ++h) {
                    const __m256 y = _mm256_load_ps(q + c * R + h * 8);
                    KVARN_UNROLL
                    for (int i = 0; i < s::tokens; ++i) sum[i * R + h] = _mm256_fmadd_ps(x[i], y, sum[i * R + h]);
                }
            }
        }
        _mm256_store_ps(scores + t * R, sums_of_8(sum));
    }
}

/// sums[head][channel] += weights[token][head] * v[token][channel] over one block; fetches the next block's K meanwhile.
template <int HeadDim, int R>
KVARN_INLINE void add_values(const kvarn::half* v, const float* weights, float* sums, const kvarn::half* next)
{
    using s = shape<HeadDim, R>;
    const char* fetch = reinterpret_cast<const char*>(next);
    const auto pass = [&](auto vectors_now, int c) {
        constexpr int vectors = decltype(vectors_now)::value, fetched = 16 * vectors, unroll = steps_at_once(fetched, s::block);
        __m256 sum[R][vectors];
        KVARN_UNROLL
        for (int h = 0; h < R; ++h) {
            KVARN_UNROLL
            for (int i = 0; i < vectors; ++i) sum[h][i] = _mm256_load_ps(sums + h * HeadDim + c + 8 * i);
        }
        for (int t0 = 0; t0 < s::block; t0 += unroll, fetch += unroll * fetched) {
            prefetch<level::l1, unroll * fetched>(fetch);
            KVARN_UNROLL
            for (int t = t0; t < t0 + unroll; ++t) {
                __m256 x[vectors];
                KVARN_UNROLL
                for (int i = 0; i < vectors; ++i) x[i] = load(v + t * HeadDim + c + 8 * i);
                KVARN_UNROLL
                for (int h = 0; h < R; ++h) {
                    const __m256 w = _mm256_broadcast_ss(weights + t * R + h);
                    KVARN_UNROLL
                    for (int i = 0; i < vectors; ++i) sum[h][i] = _mm256_fmadd_ps(x[i], w, sum[h][i]);
                }
            }
        }
        KVARN_UNROLL
        for (int h = 0; h < R; ++h) {
            KVARN_UNROLL
            for (int i = 0; i < vectors; ++i) _mm256_store_ps(sums + h * HeadDim + c + 8 * i, sum[h][i]);
        }
    };
    int c = 0;
    for (; c + 8 * s::vectors <= HeadDim; c += 8 * s::vectors) pass(std::integral_constant<int, s::vectors>{}, c);
    constexpr int left = HeadDim / 8 % s::vectors;
    if constexpr (left != 0) pass(std::integral_constant<int, left>{}, c);
}

/// Maximum and sum of the weights so far, lane i for head i % R, and the sum of the weighted values.
template <int HeadDim, int R>
struct softmax_state {
    alignas(64) float sums[R * HeadDim] = {};
    __m256 top = _mm256_set1_ps(-std::numeric_limits<float>::infinity()), total = _mm256_setzero_ps();

    /// Raises the maximum to that of a block of scores.
    KVARN_INLINE void raise(const float* scores)
    {
        __m256 highest = top;
        for (int i = 0; i < shape<HeadDim, R>::block * R; i += 8) highest = _mm256_max_ps(highest, _mm256_load_ps(scores + i));
        highest = over_heads<R>(highest, [](__m256 a, __m256 b) { return _mm256_max_ps(a, b); });
        if (_mm256_movemask_ps(_mm256_cmp_ps(highest, top, _CMP_GT_OQ)) == 0) return;
        __m256 factor[1] = {_mm256_sub_ps(top, highest)};
        exp2_all(factor);
        top = highest;
        total = _mm256_mul_ps(total, factor[0]);
        alignas(32) float each[8];
        _mm256_store_ps(each, factor[0]);
        for (int h = 0; h < R; ++h)
            for (int c = h * HeadDim; c < (h + 1) * HeadDim; c += 8)
                _mm256_store_ps(sums + c, _mm256_mul_ps(_mm256_load_ps(sums + c), _mm256_set1_ps(each[h])));
    }

    /// Turns a block of scores into weights.
    KVARN_INLINE void weigh(float* scores)
    {
        constexpr int all = shape<HeadDim, R>::block * R / 8, at_once = all < 8 ? all : 8;
        for (int i = 0; i < 8 * all; i += 8 * at_once) {
            __m256 p[at_once];
            KVARN_UNROLL
            for (int j = 0; j < at_once; ++j) p[j] = _mm256_sub_ps(_mm256_load_ps(scores + i + 8 * j), top);
            exp2_all(p);
            KVARN_UNROLL
            for (int j = 0; j < at_once; ++j) {
                total = _mm256_add_ps(total, p[j]);
                _mm256_store_ps(scores + i + 8 * j, p[j]);
            }
        }
    }
};

template <int HeadDim, int R>
void attention_avx2(const kvarn::half* k, const kvarn::half* v, std::size_t tokens, const float* q, float* out)
{
    constexpr int block = shape<HeadDim, R>::block;
    alignas(64) float queries[R * HeadDim], scores[block * R];
    for (int h = 0; h < R; ++h)
        for (int c = 0; c < HeadDim; ++c)  // times log2(e): weights are powers of two
            queries[(c / 8 * R + h) * 8 + c % 8] = q[h * HeadDim + c] * 1.44269504f;
    softmax_state<HeadDim, R> state;
    for (std::size_t done = 0; done < tokens; done += block) {
        const kvarn::half* const next = done + block < tokens ? k + block * HeadDim : k;
        multiply_keys<HeadDim, R>(k, queries, scores, v);
        state.raise(scores);
        state.weigh(scores);
        add_values<HeadDim, R>(v, scores, state.sums, next);
        k = next;
        v += block * HeadDim;
    }
    alignas(32) float total[8];
    _mm256_store_ps(total, over_heads<R>(state.total, [](__m256 a, __m256 b) { return _mm256_add_ps(a, b); }));
    for (int h = 0; h < R; ++h)
        for (int c = 0; c < HeadDim; ++c) out[h * HeadDim + c] = state.sums[h * HeadDim + c] / total[h];
}

}  // namespace fp16_detail
#endif

/// out[r][head_dim] = softmax(q k^T) v over `tokens` tokens (a multiple of 64, not 0). k and v are [token][HeadDim], q and out
/// [R][HeadDim].
template <int HeadDim, int R>
void fp16_attention(const kvarn::half* k, const kvarn::half* v, std::size_t tokens, const float* q, float* out)
{
    static_assert(HeadDim == 64 || HeadDim == 80 || HeadDim == 96 || HeadDim == 128 || HeadDim == 256);
    static_assert(R == 1 || R == 2 || R == 4 || R == 8);
#if defined(KVARN_BENCH_FP16_AVX2)
    fp16_detail::attention_avx2<HeadDim, R>(k, v, tokens, q, out);
#else
    fp16_attention_plain<HeadDim, R>(k, v, tokens, q, out);
#endif
}

}  // namespace kvarn_bench
