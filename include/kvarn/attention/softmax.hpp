// SPDX-License-Identifier: Apache-2.0
#pragma once
// Online softmax in base 2: the state (m, l, o) of one query row, how scores enter it and how two states merge
// (Milakov and Gimelshein 2018; Dao et al. 2022). In: scores times log2(e). Out: weights 2^(s - m), and their sum.
// float arithmetic in a fixed order, without libm, so that every instruction set agrees. No allocation.

#include <kvarn/base/config.hpp>  // first: it refuses older standards

#include <bit>
#include <cstdint>
#include <limits>

#include <kvarn/simd/lanes.hpp>

namespace kvarn::detail {

inline constexpr float log2_e = 1.44269504088896341f;
inline constexpr float ln_2 = 0.69314718055994531f;
inline constexpr float lowest_score = -3.0e38f;  // of a row that has seen nothing: finite, so that differences are never NaN

/// 2^x for x <= 127, relative error below 3e-7; 0 for x <= -127. `K` is a kernels<Arch>.
template <class K>
KVARN_INLINE typename K::reg exp2(typename K::reg x) noexcept
{
    const auto magic = K::broadcast(12582912.0f + 127.0f);
    const auto bounded = K::maximum(x, K::broadcast(-127.0f));
    const auto shifted = K::add(bounded, magic);
    const auto f = K::sub(bounded, K::sub(shifted, magic));  // in [-1/2, 1/2]
    // Taylor, ln(2)^n / n!
    auto p = K::fma(f, K::broadcast(1.54035304e-4f), K::broadcast(1.33335581e-3f));
    p = K::fma(p, f, K::broadcast(9.61812911e-3f));
    p = K::fma(p, f, K::broadcast(5.55041087e-2f));
    p = K::fma(p, f, K::broadcast(2.40226507e-1f));
    p = K::fma(p, f, K::broadcast(6.93147181e-1f));
    p = K::fma(p, f, K::broadcast(1.0f));
    return K::mul(p, K::power_of_two(shifted));
}

/// The same for one float.
KVARN_INLINE float exp2_of(float x) noexcept { return exp2<simd::kernels<simd::portable>>(x); }

/// log2 of a positive normal float, to half a unit in the last place plus 1e-7; -infinity for 0.
KVARN_INLINE float log2_of(float x) noexcept
{
    using one = simd::kernels<simd::portable>;
    if (!(x > 0.0f)) return -std::numeric_limits<float>::infinity();
    // x = 2^n m with m in [sqrt(1/2), sqrt(2)), and log2(m) = 2 / ln(2) * (t + t^3 / 3 + t^5 / 5 + ...) with t = (m - 1) / (m + 1).
    const std::uint32_t shifted = std::bit_cast<std::uint32_t>(x) - 0x3f3504f3u;
    const float m = std::bit_cast<float>((shifted & 0x007fffffu) + 0x3f3504f3u);
    const float n = static_cast<float>(static_cast<std::int32_t>(shifted) >> 23);
    const float t = one::div(one::sub(m, 1.0f), one::add(m, 1.0f)), s = one::mul(t, t);
    float p = one::fma(s, 0.320598897f, 0.412198585f);
    p = one::fma(p, s, 0.577078016f);
    p = one::fma(p, s, 0.961796694f);
    p = one::fma(p, s, 2.885390082f);
    return one::fma(p, t, n);
}

/// What one query row knows about the tokens it has seen. The output so far, sum of 2^(s - m) v, lies elsewhere.
struct softmax_state {
    float largest;  ///< m, the largest score
    float total;    ///< l, the sum of 2^(s - m)
};

inline constexpr softmax_state empty_state{lowest_score, 0.0f};

/// Tokens of a block that one query row may see: [begin, end).
struct visible_range {
    int begin;
    int end;

    [[nodiscard]] KVARN_INLINE bool empty() const noexcept { return begin >= end; }
};

/// x <- x * factor, `n` a multiple of 16.
template <class Arch>
KVARN_INLINE void scale_floats(float* x, int n, float factor) noexcept
{
    using lane = simd::lanes<Arch>;
    const lane f = lane::broadcast(factor);
    for (int i = 0; i < n; i += simd::lane_count) mul(lane::load(x + i), f).store(x + i);
}

/// Hides what a row does not see: s[i] <- -infinity outside of `seen`. `n` scores.
KVARN_INLINE void hide_scores(float* s, int n, visible_range seen) noexcept
{
    constexpr float nothing = -std::numeric_limits<float>::infinity();
    for (int i = 0; i < seen.begin; ++i) s[i] = nothing;
    for (int i = seen.end; i < n; ++i) s[i] = nothing;
}

template <class Arch>
KVARN_INLINE simd::lanes<Arch> largest_of(const float* s, int n) noexcept
{
    using lane = simd::lanes<Arch>;
    lane most = lane::load(s);
    for (int i = simd::lane_count; i < n; i += simd::lane_count) most = maximum(most, lane::load(s + i));
    return most;
}

/// Scores of which `largest` is the largest are about to enter a state: the state and `out` ([channels], a multiple of 16) are rescaled if
/// the maximum rises.
template <class Arch>
KVARN_INLINE void raise_largest(float largest, softmax_state& state, float* out, int channels) noexcept
{
    using one = simd::kernels<simd::portable>;
    largest = one::minimum(largest, 3.0e38f);
    if (largest > state.largest) {
        const float factor = exp2_of(one::sub(state.largest, largest));
        state.largest = largest;
        state.total = one::mul(state.total, factor);
        scale_floats<Arch>(out, channels, factor);
    }
}

/// The weights 2^(s - m) of sixteen scores.
template <class Arch>
KVARN_INLINE simd::lanes<Arch> score_weights(const float* s, float largest) noexcept
{
    using lane = simd::lanes<Arch>;
    const lane d = minimum(sub(lane::load(s), lane::broadcast(largest)), lane::broadcast(0.0f));
    return lane::make([&](int j) KVARN_LAMBDA { return exp2<simd::kernels<Arch>>(d.r[j]); });
}

/// Scores enter a state and become weights, in place. `n` is a multiple of 16, `largest` the largest of the scores.
template <class Arch>
KVARN_INLINE void absorb_scores(float* s, int n, float largest, softmax_state& state, float* out, int channels) noexcept
{
    using lane = simd::lanes<Arch>;
    raise_largest<Arch>(largest, state, out, channels);
    lane total = lane::broadcast(0.0f);
    for (int i = 0; i < n; i += simd::lane_count) {
        const lane p = score_weights<Arch>(s + i, state.largest);
        total = add(total, p);
        p.store(s + i);
    }
    state.total = simd::kernels<simd::portable>::add(state.total, reduce_add(total));
}

/// to <- to merged with `from`, outputs of `channels` (a multiple of 16) channels. Associative only up to rounding: merge in order.
template <class Arch>
KVARN_INLINE void merge_states(softmax_state& to, float* to_out, const softmax_state& from, const float* from_out, int channels) noexcept
{
    using one = simd::kernels<simd::portable>;
    using lane = simd::lanes<Arch>;
    const float largest = one::maximum(to.largest, from.largest);
    const float a = exp2_of(one::sub(to.largest, largest)), b = exp2_of(one::sub(from.largest, largest));
    to.largest = largest;
    to.total = one::fma(from.total, b, one::mul(to.total, a));
    const lane fa = lane::broadcast(a), fb = lane::broadcast(b);
    for (int i = 0; i < channels; i += simd::lane_count)
        fma(lane::load(from_out + i), fb, mul(lane::load(to_out + i), fa)).store(to_out + i);
}

/// s <- cap * tanh(s / cap), both in base-2 units (Gemma 2's logit soft-cap).
template <class Arch>
KVARN_NOINLINE void soft_cap(float* s, int n, float cap) noexcept
{
    using k = simd::kernels<Arch>;
    using lane = simd::lanes<Arch>;
    // tanh(x) = 1 - 2 / (1 + e^(2x)); beyond +-12 it is +-1 in float.
    const lane inverse = lane::broadcast(1.0f / cap), bound = lane::broadcast(12.0f), low = lane::broadcast(-12.0f);
    const lane twice = lane::broadcast(2.0f * log2_e), one = lane::broadcast(1.0f), two = lane::broadcast(2.0f), by = lane::broadcast(cap);
    for (int i = 0; i < n; i += simd::lane_count) {
        const lane x = maximum(minimum(mul(lane::load(s + i), inverse), bound), low);
        const lane y = mul(x, twice);
        const lane e = lane::make([&](int j) KVARN_LAMBDA { return exp2<k>(y.r[j]); });
        mul(sub(one, div(two, add(one, e))), by).store(s + i);
    }
}

}  // namespace kvarn::detail
