// SPDX-License-Identifier: Apache-2.0
#pragma once
// Variance normalisation of a tile, the twin of normalize/variance.hpp: the same operations in the same order, so the same
// factors to the last bit (paper section 4.2, docs/numerics.md). In: a float tile [axis 0][axis 1]. Out: s0, s1. Four threads
// take the moments of a row, or of two; a column's are summed by sixteen rows at a time in parallel, then over those blocks in
// order. float accumulators. No allocation; for one thread block.

#include <cstddef>
#include <cstdint>

#include <kvarn/cuda/rotate.cuh>
#include <kvarn/cuda/team.cuh>

namespace kvarn::cuda::detail {

/// A tile in shared memory, or in a workspace in device memory: (i, j) at data[i * stride + j], 16-byte aligned. Both sizes are
/// powers of two, 32 to 512.
struct tile_view {
    float* data;
    int size0, size1;
    int stride;  // size1 + 4, so that the threads of a row and of eight rows meet different banks
    int shift1;  // log2(size1)

    KVARN_DEVICE KVARN_INLINE float* row(int i) const noexcept { return data + i * stride; }
};

/// Shared memory of one tile's encoder; the letters are those of kvarn::variance_factors. All arrays are 16-byte aligned.
struct tile_factors {
    float *s0, *current0, *reciprocal0, *deviation0, *pivot0;
    float *s1, *current1, *reciprocal1, *deviation1, *pivot1, *sum1, *square1;
    float* partial;  // [column_blocks][2][size1]: sums over sixteen rows, of the values and of their squares
    float* scratch;  // [scratch_floats]
};

inline constexpr int scratch_floats = 64;
inline constexpr int tile_padding = 4;
inline constexpr int most_column_blocks = 16;

/// Blocks of sixteen rows whose column sums are kept at a time; more rows are taken in turns.
[[nodiscard]] KVARN_HOST_DEVICE KVARN_INLINE constexpr int column_blocks(int size0) noexcept
{
    return size0 / lane_count < most_column_blocks ? size0 / lane_count : most_column_blocks;
}

/// Floats of a tile, in whole sixteen bytes.
[[nodiscard]] KVARN_HOST_DEVICE KVARN_INLINE constexpr int tile_floats(int size0, int size1) noexcept
{
    return size0 * (size1 + tile_padding);
}
/// Floats of shared memory for its factors.
[[nodiscard]] KVARN_HOST_DEVICE KVARN_INLINE constexpr int factor_floats(int size0, int size1) noexcept
{
    return 5 * size0 + 7 * size1 + column_blocks(size0) * 2 * size1 + scratch_floats;
}

KVARN_DEVICE KVARN_INLINE tile_view place_tile(float* memory, int size0, int size1) noexcept
{
    int shift = 0;
    while (1 << shift < size1) ++shift;
    return {memory, size0, size1, size1 + tile_padding, shift};
}

KVARN_DEVICE KVARN_INLINE tile_factors place_factors(float* memory, const tile_view& t) noexcept
{
    const int n0 = t.size0, n1 = t.size1;
    tile_factors f;
    f.scratch = memory;
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

/// N neighbouring floats that move as one; N is 2 or 4.
template <int N>
struct alignas(4 * N) float_group {
    float x[N];
};
template <int N>
KVARN_DEVICE KVARN_INLINE float_group<N> load_group(const float* from) noexcept
{
    return *reinterpret_cast<const float_group<N>*>(from);
}
template <int N>
KVARN_DEVICE KVARN_INLINE void store_group(float* to, const float_group<N>& x) noexcept
{
    *reinterpret_cast<float_group<N>*>(to) = x;
}
/// Sixteen floats from a 16-byte aligned address.
KVARN_DEVICE KVARN_INLINE void load_lanes(const float* from, float (&x)[lane_count]) noexcept
{
    KVARN_UNROLL
    for (int n = 0; n < lane_count / 4; ++n) {
        const float_group<4> g = load_group<4>(from + 4 * n);
        KVARN_UNROLL
        for (int i = 0; i < 4; ++i) x[4 * n + i] = g.x[i];
    }
}

/// x clamped to [low, high], `low` if x is NaN, in two instructions. low is not -0, high is positive: a zero then has low's sign
/// either way.
KVARN_DEVICE KVARN_INLINE float bounded(float x, float low, float high) noexcept
{
    return quick_min(quick_max(x, low), high);
}

/// The numbers of normalize/variance.hpp.
inline constexpr float factor_floor = 0.740818220681717866f;   // exp(-0.3)
inline constexpr float factor_ceiling = 22026.4657948067165f;  // exp(10)
inline constexpr float deviation_floor = 1e-3f;
inline constexpr float deviation_ceiling = 1e3f;
inline constexpr float least_deviation = 1e-8f;
inline constexpr float needed_gain = 1.0f - 1e-5f;
inline constexpr float balanced = 4.0f;

template <class Team>
struct variance_pass {
    Team& team;
    const tile_view& t;
    const tile_factors& f;
    float inverse0, inverse0_less;  // 1 / size0, 1 / (size0 - 1)
    float inverse1, inverse1_less;
    float unit;  // where axis 1 starts, and what its bounds are multiples of

    KVARN_DEVICE KVARN_INLINE variance_pass(Team& team_, const tile_view& t_, const tile_factors& f_, float unit_) noexcept
        : team(team_), t(t_), f(f_), inverse0(div(1.0f, static_cast<float>(t_.size0))),
          inverse0_less(div(1.0f, static_cast<float>(t_.size0 - 1))), inverse1(div(1.0f, static_cast<float>(t_.size1))),
          inverse1_less(div(1.0f, static_cast<float>(t_.size1 - 1))), unit(unit_)
    {}

    /// Sample standard deviation from a sum and a sum of squares.
    KVARN_DEVICE KVARN_INLINE static float deviation(float sum, float square, float inverse_n, float inverse_n1) noexcept
    {
        const float centred = fnma(sum, mul(sum, inverse_n), square);
        return sqrt(mul(maximum(centred, 0.0f), inverse_n1));
    }
    KVARN_DEVICE KVARN_INLINE static float updated(float s, float present, float by) noexcept
    {
        return bounded(mul(s, bounded(present, deviation_floor, deviation_ceiling)), factor_floor * by, factor_ceiling * by);
    }
    /// Sixteen lanes one after the other, from a 16-byte aligned address.
    KVARN_DEVICE KVARN_INLINE static float total_of(const float* lanes) noexcept
    {
        float x[lane_count];
        load_lanes(lanes, x);
        KVARN_UNROLL
        for (int i = 1; i < lane_count; ++i) x[0] = add(x[0], x[i]);
        return x[0];
    }

    KVARN_DEVICE KVARN_INLINE void begin() const noexcept
    {
        for_each(team, t.size0, [&](int i) {
            f.s0[i] = f.current0[i] = f.reciprocal0[i] = 1.0f;
            f.pivot0[i] = 0.0f;
        });
        for_each(team, t.size1, [&](int j) {
            f.s1[j] = f.current1[j] = unit;
            f.reciprocal1[j] = div(1.0f, unit);
            const int stride = opaque(t.stride);
            float sum = t.data[j];  // the first pivots are the means of the first sixteen rows
            for (int i = 1; i < lane_count; ++i) sum = add(sum, t.data[i * stride + j]);
            f.pivot1[j] = mul(sum, 1.0f / lane_count);
        });
        team.barrier();
    }

    /// Moments of the rows i and, with Rows = 2, i + apart together, which share the loads of axis 1's reciprocals. With `update`
    /// also their new factors.
    template <int Rows>
    KVARN_DEVICE KVARN_INLINE void take_rows(bool update, int i, int apart, int k, float growth) const noexcept
    {
        const float* const row = t.row(i) + k;
        const float* const r = f.reciprocal1 + k;
        const int step = apart * t.stride;
        float pivot[Rows], minus[Rows], s[Rows][4] = {}, q[Rows][4] = {};
        KVARN_UNROLL
        for (int m = 0; m < Rows; ++m) {
            pivot[m] = mul(f.pivot0[i + m * apart], growth);
            minus[m] = mul(pivot[m], -1.0f);
        }
        for (int j = 0; j < t.size1; j += lane_count) {
            KVARN_UNROLL
            for (int n = 0; n < 4; ++n) {
                const float by = r[j + 4 * n];
                KVARN_UNROLL
                for (int m = 0; m < Rows; ++m) {
                    const float u = fma(by, row[m * step + j + 4 * n], minus[m]);
                    s[m][n] = add(s[m][n], u);
                    q[m][n] = fma(u, u, q[m][n]);
                }
            }
        }
        float sum = 0.0f, square = 0.0f, middle = 0.0f;
        KVARN_UNROLL
        for (int m = 0; m < Rows; ++m) {  // thread m of the four goes on with row m
            const float sum_m = fold(team, s[m]), square_m = fold(team, q[m]);
            sum = k == m ? sum_m : sum;
            square = k == m ? square_m : square;
            middle = k == m ? pivot[m] : middle;
        }
        team.warp_barrier();  // all four have read what one of them writes now
        if (k >= Rows) return;
        const int mine = i + k * apart;
        const float raw = deviation(sum, square, inverse1, inverse1_less);
        f.pivot0[mine] = fma(sum, inverse1, middle);
        float present = raw;
        if (update) {
            const float old = f.reciprocal0[mine], factor = updated(f.current0[mine], mul(raw, old), 1.0f), r0 = div(1.0f, factor);
            if (mine < lane_count) f.scratch[mine] = old;
            f.current0[mine] = factor;
            f.reciprocal0[mine] = r0;
            present = mul(raw, r0);
        }
        f.deviation0[mine] = present;
    }

    /// Sums over sixteen rows, the blocks [first, first + blocks), to f.partial. Two columns a thread.
    KVARN_DEVICE KVARN_INLINE void sum_blocks(int first, int blocks, float growth) const noexcept
    {
        for_each(team, blocks << (t.shift1 - 1), [&](int item) {
            const int stride = opaque(4 * t.stride);  // in bytes, so that an address is one instruction
            const int j = 2 * item & (t.size1 - 1), block = 2 * item >> t.shift1, i = (first + block) * lane_count;
            const std::byte* const columns = reinterpret_cast<const std::byte*>(t.row(i) + j);
            const float_group<2> pivot = load_group<2>(f.pivot1 + j);
            const float minus[2] = {mul(mul(pivot.x[0], growth), -1.0f), mul(mul(pivot.x[1], growth), -1.0f)};
            float r[lane_count];
            load_lanes(f.reciprocal0 + i, r);
            float_group<2> s{}, q{};
            KVARN_UNROLL
            for (int n = 0; n < lane_count; ++n) {
                const float_group<2> x = load_group<2>(reinterpret_cast<const float*>(columns + n * stride));
                KVARN_UNROLL
                for (int c = 0; c < 2; ++c) {
                    const float u = fma(r[n], x.x[c], minus[c]);
                    s.x[c] = add(s.x[c], u);
                    q.x[c] = fma(u, u, q.x[c]);
                }
            }
            store_group(f.partial + block * 2 * t.size1 + j, s);
            store_group(f.partial + (block * 2 + 1) * t.size1 + j, q);
        });
    }

    /// One pass over the tile: the rows' moments and, with `update`, their new factors; then the sums along axis 0. `growth` is
    /// that of axis 1's reciprocals since the pass before. Ends with the imbalance of the iterate.
    KVARN_DEVICE KVARN_INLINE float run(bool update, float growth) const noexcept
    {
        // Two rows a thread where there are enough of them for all threads.
        const int places = team.size() / row_threads, half_rows = t.size0 / 2, slot = team.rank() / row_threads,
                  k = team.rank() % row_threads;
        if (half_rows >= places)
            for (int i = slot; i < half_rows; i += places) take_rows<2>(update, i, half_rows, k, growth);
        else
            for (int i = slot; i < t.size0; i += places) take_rows<1>(update, i, 0, k, growth);
        team.barrier();
        // Pivots of columns are the means of the pass before, grown like the first sixteen rows' factors.
        const float growth0 = update ? div(total_of(f.reciprocal0), total_of(f.scratch)) : 1.0f;
        const int all = t.size0 / lane_count, together = column_blocks(t.size0);
        for (int first = 0; first < all; first += together) {
            sum_blocks(first, together, growth0);
            team.barrier();
            for_each(team, t.size1, [&](int j) {
                const float* partial = f.partial + j;
                float s = partial[0], q = partial[t.size1];
                if (first != 0) {
                    s = add(f.sum1[j], s);
                    q = add(f.square1[j], q);
                }
                for (int block = 1; block < together; ++block) {
                    partial += 2 * t.size1;
                    s = add(s, partial[0]);
                    q = add(q, partial[t.size1]);
                }
                f.sum1[j] = s;
                f.square1[j] = q;
                if (first + together != all) return;
                f.pivot1[j] = mul(f.pivot1[j], growth0);
                f.deviation1[j] = mul(deviation(s, q, inverse0, inverse0_less), f.reciprocal1[j]);
            });
            team.barrier();
        }
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
                low = quick_min(low, x[i]);
                high = quick_max(high, x[i]);
            }
            for (int mask = 16; mask >= 1; mask /= 2) {
                low = quick_min(low, team.shuffle_xor(low, mask));
                high = quick_max(high, team.shuffle_xor(high, mask));
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
            const float s = updated(f.current1[j], mul(raw, f.reciprocal1[j]), unit);
            f.current1[j] = s;
            f.reciprocal1[j] = div(1.0f, s);
            f.pivot1[j] = fma(f.sum1[j], inverse0, f.pivot1[j]);
        });
        team.barrier();
        sum_lanes(team, f.reciprocal1, t.size1, f.scratch + lane_count);
        team.barrier();
        const float before = total;
        total = total_of(f.scratch + lane_count);
        return div(total, before);
    }

    KVARN_DEVICE KVARN_INLINE void keep() const noexcept
    {
        for_each(team, t.size0, [&](int i) { f.s0[i] = f.current0[i]; });
        for_each(team, t.size1, [&](int j) { f.s1[j] = f.current1[j]; });
    }
};

/// Leaves s0 and s1 in `f`. `unit` as in normalize/variance.hpp. The tile must be complete (a barrier after its last store); ends with a barrier.
template <class Team>
KVARN_DEVICE KVARN_INLINE void normalize_variance(Team& team, const tile_view& t, int iterations, int enough, float unit, const tile_factors& f) noexcept
{
    const variance_pass<Team> pass(team, t, f, unit);
    pass.begin();
    float total = div(static_cast<float>(t.size1), unit);  // of reciprocals that are all alike
    float best = 0.0f;
    for (int i = 0; i <= iterations; ++i) {  // 0: the tile as it is
        if (i != 0 && best >= 2.0f && mul(best, needed_gain) <= 2.0f) break;
        if (i > enough && best < balanced) break;
        const float growth = i != 0 ? pass.update_columns(total) : 1.0f;
        const float imbalance = pass.run(i != 0, growth);
        if (i != 0 && !(imbalance < mul(best, needed_gain))) continue;
        best = imbalance;
        pass.keep();
    }
    team.barrier();
}

}  // namespace kvarn::cuda::detail
