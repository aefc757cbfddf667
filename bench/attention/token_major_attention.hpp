// SPDX-License-Identifier: Apache-2.0
#pragma once
// The second baseline of the attention benchmarks: attention as engines do it whose cache is token-major, [token][KV head][channel] in half,
// and whose kernel serves one query head at a time: K and V are read again for every query head of a group, rows of one head lie a whole
// token apart, and the softmax goes on token by token. Vectorised, one thread. It shares nothing with the library but the type `half`.
// In: K and V of one KV head through their stride, one query head, float, already multiplied by the softmax scale. Out: head_dim floats.

#include <cmath>
#include <cstddef>
#include <limits>

#include <kvarn/base/element.hpp>

#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#include <immintrin.h>
#endif

namespace kvarn_bench {

inline constexpr int most_channels = 1024;

#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
KVARN_INLINE __m256 eight_halves(const kvarn::half* p)
{
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
#endif

/// <k, q>; head_dim is a multiple of 16.
inline float half_dot(const kvarn::half* k, const float* q, int head_dim)
{
#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
    __m256 sum[2] = {_mm256_setzero_ps(), _mm256_setzero_ps()};
    for (int c = 0; c < head_dim; c += 16)
        for (int i = 0; i < 2; ++i) sum[i] = _mm256_fmadd_ps(eight_halves(k + c + 8 * i), _mm256_loadu_ps(q + c + 8 * i), sum[i]);
    const __m256 both = _mm256_add_ps(sum[0], sum[1]);
    __m128 x = _mm_add_ps(_mm256_castps256_ps128(both), _mm256_extractf128_ps(both, 1));
    x = _mm_add_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)));
#else
    float sum = 0.0f;
    for (int c = 0; c < head_dim; ++c) sum += kvarn::to_float(k[c]) * q[c];
    return sum;
#endif
}

/// sums += weight * v
inline void add_halves(const kvarn::half* v, float weight, float* sums, int head_dim)
{
#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
    const __m256 w = _mm256_set1_ps(weight);
    for (int c = 0; c < head_dim; c += 8)
        _mm256_storeu_ps(sums + c, _mm256_fmadd_ps(eight_halves(v + c), w, _mm256_loadu_ps(sums + c)));
#else
    for (int c = 0; c < head_dim; ++c) sums[c] += weight * kvarn::to_float(v[c]);
#endif
}

/// out[head_dim] = softmax(q k^T) v over `tokens` tokens whose rows begin `stride` elements apart. head_dim: a multiple of 16, at most
/// most_channels.
inline void token_major_attention(const kvarn::half* k, const kvarn::half* v, std::size_t tokens, std::ptrdiff_t stride, int head_dim,
                                  const float* q, float* out)
{
    float sums[most_channels] = {}, largest = -std::numeric_limits<float>::infinity(), total = 0.0f;
    for (std::size_t t = 0; t < tokens; ++t, k += stride, v += stride) {
        const float score = half_dot(k, q, head_dim);
        float weight = 1.0f;
        if (score > largest) {
            const float factor = std::exp(largest - score);
            for (int c = 0; c < head_dim; ++c) sums[c] *= factor;
            total *= factor;
            largest = score;
        } else {
            weight = std::exp(score - largest);
        }
        total += weight;
        add_halves(v, weight, sums, head_dim);
    }
    for (int c = 0; c < head_dim; ++c) out[c] = sums[c] / total;
}

}  // namespace kvarn_bench
