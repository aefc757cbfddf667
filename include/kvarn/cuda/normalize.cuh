// SPDX-License-Identifier: Apache-2.0
#pragma once
// Variance normalisation of a tile in shared memory, the twin of normalize/variance.hpp: the same operations in the same order,
// so the same factors to the last bit (paper section 4.2, format.md section 3). In: a float tile [axis 0][axis 1]. Out: s0, s1.
// Four threads take a row's moments; a column's are summed by sixteen rows at a time in parallel, then over those blocks in
// order. float accumulators. No allocation; for one thread block.

#include <cstddef>
#include <cstdint>

#include <kvarn/cuda/team.cuh>

namespace kvarn::cuda::detail {

/// A tile in shared memory: (i, j) at data[i * stride + j]. Both sizes are powers of two, 32 to 256.
struct tile_view {
    float* data;
    int size0, size1;
    int stride;  // size1 + 4, so that the threads of a row and of eight rows meet different banks
    int shift1;  // log2(size1)

    KVARN_DEVICE KVARN_INLINE const float* row(int i) const noexcept { return data + i * stride; }
};

/// Shared memory of one tile's encoder; the letters are those of kvarn::variance_factors.
struct tile_factors {
    float *s0, *current0, *reciprocal0, *deviation0, *pivot0;
    float *s1, *current1, *reciprocal1, *deviation1, *pivot1, *sum1, *square1;
    float* partial;  // [size0 / 16][2][size1]: sums over sixteen rows, of the values and of their squares
    float* scratch;  // [scratch_floats]
};

inline constexpr int scratch_floats = 64;
inline constexpr int tile_padding = 4;

/// Floats of shared memory for a tile and its factors.
[[nodiscard]] KVARN_HOST_DEVICE KVARN_INLINE constexpr int tile_memory_floats(int size0, int size1) noexcept
{
    return size0 * (size1 + tile_padding) + 5 * size0 + 7 * size1 + size0 / lane_count * 2 * size1 + scratch_floats;
}

KVARN_DEVICE KVARN_INLINE tile_view place_tile(float* memory, int size0, int size1) noexcept
{
    int shift = 0;
    while (1 << shift < size1) ++shift;
    return {memory, size0, size1, size1 + tile_padding, shift};
}

KVARN_DEVICE KVARN_INLINE tile_factors place_factors(const tile_view& t) noexcept
{
    const int n0 = t.size0, n1 = t.size1;
    tile_factors f;
    f.scratch = t.data + n0 * t.stride;
    f.s0 = f.scratch + scratch_floats;
    f.current0 = f.s0 + n0;
    f.reciprocal0 = f.current0 + n0;
    f.deviation0 = f.reciprocal0 + n0;
    f.pivot0 = f.deviation0 + n0;
    f.s1 = f.pivot0 + n0;
    f.current1 = f.s1 + n1;
    f.reciprocal1 = f.current1 + n1;
    f.deviation1 = f.reciprocal1 + n1;
    f.pivot1 = f.deviation1 + n1;
    f.sum1 = f.pivot1 + n1;
    f.square1 = f.sum1 + n1;
    f.partial = f.square1 + n1;
    return f;
}

/// The numbers of normalize/variance.hpp.
inline constexpr float factor_floor = 0.740818220681717866f;   // exp(-0.3)
inline constexpr float factor_ceiling = 22026.4657948067165f;  // exp(10)
inline constexpr float deviation_floor = 1e-3f;
inline constexpr float deviation_ceiling = 1e3f;
inline constexpr float least_deviation = 1e-8f;
inline constexpr float needed_gain = 1.0f - 1e-5f;

template <class Team>
struct variance_pass {
    Team& team;
    const tile_view& t;
    const tile_factors& f;
    float inverse0, inverse0_less;  // 1 / size0, 1 / (size0 - 1)
    float inverse1, inverse1_less;

    KVARN_DEVICE KVARN_INLINE variance_pass(Team& team_, const tile_view& t_, const tile_factors& f_) noexcept
        : team(team_), t(t_), f(f_), inverse0(div(1.0f, static_cast<float>(t_.size0))),
          inverse0_less(div(1.0f, static_cast<float>(t_.size0 - 1))), inverse1(div(1.0f, static_cast<float>(t_.size1))),
          inverse1_less(div(1.0f, static_cast<float>(t_.size1 - 1)))
    {}

    /// Sample standard deviation from a sum and a sum of squares.
    KVARN_DEVICE KVARN_INLINE static float deviation(float sum, float square, float inverse_n, float inverse_n1) noexcept
    {
        const float centred = fnma(sum, mul(sum, inverse_n), square);
        return sqrt(mul(max(centred, 0.0f), inverse_n1));
    }
    KVARN_DEVICE KVARN_INLINE static float clamp(float x, float low, float high) noexcept { return min(max(x, low), high); }
    KVARN_DEVICE KVARN_INLINE static float updated(float s, float present) noexcept
    {
        return clamp(mul(s, clamp(present, deviation_floor, deviation_ceiling)), factor_floor, factor_ceiling);
    }

    KVARN_DEVICE KVARN_INLINE void begin() const noexcept
    {
        for_each(team, t.size0, [&](int i) {
            f.s0[i] = f.current0[i] = f.reciprocal0[i] = 1.0f;
            f.pivot0[i] = 0.0f;
        });
        for_each(team, t.size1, [&](int j) {
            f.s1[j] = f.current1[j] = f.reciprocal1[j] = 1.0f;
            float sum = t.data[j];  // the first pivots are the means of the first sixteen rows
            for (int i = 1; i < lane_count; ++i) sum = add(sum, t.row(i)[j]);
            f.pivot1[j] = mul(sum, 1.0f / lane_count);
        });
        team.barrier();
    }

    /// One pass over the tile: the rows' moments and, if Update, their new factors; then the sums along axis 0. `growth` is that
    /// of axis 1's reciprocals since the pass before. Ends with the imbalance of the iterate.
    template <bool Update>
    KVARN_DEVICE KVARN_INLINE float run(float growth) const noexcept
    {
        for_rows(team, t.size0, [&](int i, int k) {
            const float pivot = mul(f.pivot0[i], growth), minus = mul(pivot, -1.0f);
            const float* const row = t.row(i) + k;
            const float* const r = f.reciprocal1 + k;
            float s[4] = {}, q[4] = {};
            for (int j = 0; j < t.size1; j += lane_count) {
                KVARN_UNROLL
                for (int n = 0; n < 4; ++n) {
                    const float u = fma(r[j + 4 * n], row[j + 4 * n], minus);
                    s[n] = add(s[n], u);
                    q[n] = fma(u, u, q[n]);
                }
            }
            const float sum = fold(team, s), square = fold(team, q);
            team.warp_barrier();  // all four have read what one of them writes now
            if (k != 0) return;
            const float raw = deviation(sum, square, inverse1, inverse1_less);
            f.pivot0[i] = fma(sum, inverse1, pivot);
            if constexpr (Update) {
                const float old = f.reciprocal0[i], factor = updated(f.current0[i], mul(raw, old)), r0 = div(1.0f, factor);
                if (i < lane_count) f.scratch[i] = old;
                f.current0[i] = factor;
                f.reciprocal0[i] = r0;
                f.deviation0[i] = mul(raw, r0);
            } else {
                f.deviation0[i] = raw;
            }
        });
        team.barrier();
        // Pivots of columns are the means of the pass before, grown like the first sixteen rows' factors.
        const float growth0 = Update ? div(add_lanes(f.reciprocal0), add_lanes(f.scratch)) : 1.0f;
        for_each(team, t.size0 / lane_count << t.shift1, [&](int item) {
            const int j = item & (t.size1 - 1), block = item >> t.shift1;
            const float minus = mul(mul(f.pivot1[j], growth0), -1.0f);
            const float* const column = t.row(block * lane_count) + j;
            const float* const r = f.reciprocal0 + block * lane_count;
            float s = 0.0f, q = 0.0f;
            KVARN_UNROLL
            for (int i = 0; i < lane_count; ++i) {
                const float u = fma(r[i], column[i * t.stride], minus);
                s = add(s, u);
                q = fma(u, u, q);
            }
            f.partial[block * 2 * t.size1 + j] = s;
            f.partial[(block * 2 + 1) * t.size1 + j] = q;
        });
        team.barrier();
        for_each(team, t.size1, [&](int j) {
            float s = f.partial[j], q = f.partial[t.size1 + j];
            for (int block = 1; block < t.size0 / lane_count; ++block) {
                s = add(s, f.partial[block * 2 * t.size1 + j]);
                q = add(q, f.partial[(block * 2 + 1) * t.size1 + j]);
            }
            f.sum1[j] = s;
            f.square1[j] = q;
            f.pivot1[j] = mul(f.pivot1[j], growth0);
            f.deviation1[j] = mul(deviation(s, q, inverse0, inverse0_less), f.reciprocal1[j]);
        });
        team.barrier();
        return imbalance();
    }

    /// max / min of the deviations along both axes, added. One barrier.
    KVARN_DEVICE KVARN_INLINE float imbalance() const noexcept
    {
        if (team.rank() < 64) {
            const bool second = team.rank() >= 32;
            const float* const x = second ? f.deviation1 : f.deviation0;
            const int n = second ? t.size1 : t.size0, lane = team.rank() % 32;
            float low = x[lane], high = low;
            for (int i = lane + 32; i < n; i += 32) {
                low = min(low, x[i]);
                high = max(high, x[i]);
            }
            for (int mask = 16; mask >= 1; mask /= 2) {
                low = min(low, team.shuffle_xor(low, mask));
                high = max(high, team.shuffle_xor(high, mask));
            }
            if (lane == 0) f.scratch[32 + second] = div(high, low > least_deviation ? low : least_deviation);
        }
        team.barrier();
        return add(f.scratch[32], f.scratch[33]);
    }

    /// New factors for axis 1, and pivots for the next pass. Returns the growth of the reciprocals, whose sum is `total`.
    KVARN_DEVICE KVARN_INLINE float update_columns(float& total) const noexcept
    {
        for_each(team, t.size1, [&](int j) {
            const float raw = deviation(f.sum1[j], f.square1[j], inverse0, inverse0_less);
            const float s = updated(f.current1[j], mul(raw, f.reciprocal1[j]));
            f.current1[j] = s;
            f.reciprocal1[j] = div(1.0f, s);
            f.pivot1[j] = fma(f.sum1[j], inverse0, f.pivot1[j]);
        });
        team.barrier();
        sum_lanes(team, f.reciprocal1, t.size1, f.scratch + lane_count);
        team.barrier();
        const float before = total;
        total = add_lanes(f.scratch + lane_count);
        return div(total, before);
    }

    KVARN_DEVICE KVARN_INLINE void keep() const noexcept
    {
        for_each(team, t.size0, [&](int i) { f.s0[i] = f.current0[i]; });
        for_each(team, t.size1, [&](int j) { f.s1[j] = f.current1[j]; });
    }
};

/// Leaves s0 and s1 in `f`. The tile must be complete (a barrier after its last store); ends with a barrier.
template <class Team>
KVARN_DEVICE KVARN_INLINE void normalize_variance(Team& team, const tile_view& t, int iterations, const tile_factors& f) noexcept
{
    const variance_pass<Team> pass(team, t, f);
    pass.begin();
    float total = static_cast<float>(t.size1);  // of reciprocals that are all 1
    float best = pass.template run<false>(1.0f);
    for (int i = 0; i < iterations; ++i) {
        if (best >= 2.0f && mul(best, needed_gain) <= 2.0f) break;
        const float growth = pass.update_columns(total);
        const float imbalance = pass.template run<true>(growth);
        if (imbalance < mul(best, needed_gain)) {
            best = imbalance;
            pass.keep();
        }
    }
    team.barrier();
}

}  // namespace kvarn::cuda::detail
