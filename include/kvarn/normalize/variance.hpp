// SPDX-License-Identifier: Apache-2.0
#pragma once
// Iterative normalisation of the standard deviation along both axes of a tile (paper section 4.2, docs/numerics.md).
// In: a float tile [axis 0][axis 1]. Out: one factor per axis-0 index (s0) and per axis-1 index (s1), so that
// tile / s0 / s1 is balanced. float arithmetic in a fixed order. No allocation; thread safe.
//
// No normalised tile is ever written. An index's own factor cancels out of its own moments, so the sums of m * r and
// (m * r)^2 with the other axis' reciprocal factors r are all that is needed, and one pass over the tile serves both axes:
// for sixteen rows at a time it takes the rows' moments, updates their factors, and adds the rows into the columns' sums.
// The moments are taken about the means of the pass before (m * r - pivot is one fused operation), so that channels far from
// zero lose no digits to cancellation.

#include <cstddef>
#include <initializer_list>

#include <kvarn/base/extent.hpp>
#include <kvarn/simd/lanes.hpp>

namespace kvarn {

/// Working memory and result of normalize_variance; each array holds its axis' size rounded up to 16 floats.
struct variance_factors {
    float* s0 = nullptr;           ///< result, axis 0
    float* s1 = nullptr;           ///< result, axis 1
    float* current0 = nullptr;     ///< factors of the present iterate
    float* current1 = nullptr;
    float* reciprocal0 = nullptr;  ///< 1 / current
    float* reciprocal1 = nullptr;
    float* deviation0 = nullptr;   ///< standard deviations of the present iterate
    float* deviation1 = nullptr;
    float* pivot0 = nullptr;       ///< means of m * reciprocal1 along axis 1 in the pass before, or 0
    float* pivot1 = nullptr;       ///< means of m * reciprocal0 along axis 0
    float* sum1 = nullptr;         ///< along axis 0: sum of m * reciprocal0 - pivot1, and of its square
    float* square1 = nullptr;
};

/// Floats that the arrays of `variance_factors` need together.
[[nodiscard]] KVARN_INLINE constexpr std::size_t variance_floats(int size0, int size1) noexcept
{
    return 5 * static_cast<std::size_t>(simd::whole_lanes(size0)) + 7 * static_cast<std::size_t>(simd::whole_lanes(size1));
}

/// Places the arrays in `memory`, variance_floats(size0, size1) floats.
[[nodiscard]] KVARN_INLINE constexpr variance_factors place_variance_factors(float* memory, int size0, int size1) noexcept
{
    const int n0 = simd::whole_lanes(size0), n1 = simd::whole_lanes(size1);
    variance_factors f;
    f.s0 = memory;
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
    return f;
}

/// Normalises tile[i * stride + j], i < size0, j < size1. The tile must be readable, and zero, up to whole lanes of sixteen in
/// both directions. At most `iterations` rounds; it stops early when no later iterate could be kept: the imbalance max/min + max/min is
/// never below 2, and must fall by one part in 10^5 to count. More than `enough` rounds are for tiles whose imbalance is still above
/// `balanced`, as one token or channel of another size makes it.
/// `unit`, a power of two, is what axis 1 starts from and what its clamps are multiples of: tile * 2^n with unit * 2^n has the same s0, and
/// s1 * 2^n. The paper's is 1.
template <class Arch>
void normalize_variance(const float* tile, std::ptrdiff_t stride, int size0, int size1, int iterations, int enough, float unit,
                        const variance_factors& f) noexcept;

namespace detail {

/// Floats from the end of one row of a tile, rounded up to sixteen, to the next row, against cache-set conflicts. Any other distance works
/// too, through code without compile-time bounds.
inline constexpr int tile_padding = 16;

inline constexpr float factor_floor = 0.740818220681717866f;    // exp(-0.3)
inline constexpr float factor_ceiling = 22026.4657948067165f;   // exp(10)
inline constexpr float deviation_floor = 1e-3f;
inline constexpr float deviation_ceiling = 1e3f;
inline constexpr float least_deviation = 1e-8f;                 // in max / min
inline constexpr float needed_gain = 1.0f - 1e-5f;
inline constexpr float balanced = 4.0f;                         // an imbalance

template <class Arch>
struct variance_pass {
    using v = simd::lanes<Arch>;
    using part = simd::part_lanes<Arch>;
    using k = simd::kernels<Arch>;

    /// Sample standard deviation of n numbers from their sum and their sum of squares.
    KVARN_INLINE static v deviation(const v& sum, const v& square, float inverse_n, float inverse_n1) noexcept
    {
        const v centred = fnma(sum, mul(sum, v::broadcast(inverse_n)), square);
        return sqrt(mul(maximum(centred, v::broadcast(0.0f)), v::broadcast(inverse_n1)));
    }

    KVARN_INLINE static v clamp(const v& x, float low, float high) noexcept
    {
        return minimum(maximum(x, v::broadcast(low)), v::broadcast(high));
    }

    /// s <- clamp(s * clamp(deviation of the present iterate)); returns the new s.
    KVARN_INLINE static v updated(const v& s, const v& present, float unit) noexcept
    {
        return clamp(mul(s, clamp(present, deviation_floor, deviation_ceiling)), factor_floor * unit, factor_ceiling * unit);
    }

    /// Sums over axis 1 of m * r - pivot and its square for Rows rows, folded to one register each.
    template <int Rows, class Size1>
    KVARN_INLINE static void row_sums(const float* row, std::ptrdiff_t stride, Size1 size1, const float* r, const float* minus_pivot,
                                      float* sum, float* square) noexcept
    {
        typename k::reg offset[Rows];
        KVARN_UNROLL
        for (int i = 0; i < Rows; ++i) offset[i] = k::broadcast(minus_pivot[i]);
        v sums[2 * Rows];
        simd::sum_in_parts<Arch>(sums, [&](part (&s)[2 * Rows], int e) KVARN_LAMBDA {
            KVARN_UNROLL
            for (int i = 0; i < 2 * Rows; ++i) s[i] = part::broadcast(0.0f);
            for (int j = e; j < size1; j += simd::lane_count) {
                const part factor = part::load(r + j);
                KVARN_UNROLL
                for (int i = 0; i < Rows; ++i) {
                    const part m = part::load(row + i * stride + j);
                    const part u = part::make([&](int l) KVARN_LAMBDA { return k::fma(factor.r[l], m.r[l], offset[i]); });
                    s[2 * i] = add(s[2 * i], u);
                    s[2 * i + 1] = fma(u, u, s[2 * i + 1]);
                }
            }
        });
        KVARN_UNROLL
        for (int i = 0; i < Rows; ++i) {
            k::store(sum + i * k::width, fold(sums[2 * i]));
            k::store(square + i * k::width, fold(sums[2 * i + 1]));
        }
    }

    /// One pass: deviations of axis 0 (and, if `update`, new factors for it), then the sums over axis 0. `growth` is by how much
    /// the reciprocal factors of axis 1 have grown since the pass before, on average.
    template <class Size1, class Stride>
    KVARN_NOINLINE static void run(bool update, const float* tile, Stride row_stride, int size0, Size1 size1, float growth,
                                   const variance_factors& f) noexcept
    {
        const std::ptrdiff_t stride = row_stride;
        // Padding would not be zero about a pivot.
        const bool centre0 = size1 % simd::lane_count == 0, centre1 = size0 % simd::lane_count == 0;
        constexpr int block = simd::lane_count;
        const int padded1 = simd::whole_lanes(size1);
        constexpr int together = v::registers == 1 ? 4 : k::width == 1 ? 1 : 2;
        const float inverse_n = 1.0f / static_cast<float>(size1), inverse_n1 = 1.0f / static_cast<float>(size1 - 1);
        alignas(64) float sum[block * k::width], square[block * k::width], minus_pivot[block];
        for (int i0 = 0; i0 < size0; i0 += block) {
            const float* const rows = tile + i0 * stride;
            const v pivot = mul(v::load(f.pivot0 + i0), v::broadcast(growth));
            mul(pivot, v::broadcast(-1.0f)).store(minus_pivot);
            for (int i = 0; i < block; i += together)
                row_sums<together>(rows + i * stride, stride, size1, f.reciprocal1, minus_pivot + i, sum + i * k::width,
                                   square + i * k::width);
            const v sums = simd::sum_folded_rows<Arch>(sum);
            const v raw = deviation(sums, simd::sum_folded_rows<Arch>(square), inverse_n, inverse_n1);
            if (centre0) fma(sums, v::broadcast(inverse_n), pivot).store(f.pivot0 + i0);
            if (update) {
                const v old = v::load(f.reciprocal0 + i0);
                const v s = updated(v::load(f.current0 + i0), mul(raw, old), 1.0f);
                const v r = div(v::broadcast(1.0f), s);
                if (i0 == 0 && centre1) scale_pivots(f.pivot1, size1, total(r) / total(old));
                s.store(f.current0 + i0);
                r.store(f.reciprocal0 + i0);
                mul(raw, r).store(f.deviation0 + i0);
            } else {
                raw.store(f.deviation0 + i0);
                if (i0 == 0 && centre1) first_pivots(rows, stride, size1, f.pivot1);
            }
            for (int j = 0; j < padded1; j += part::count) {
                const part offset = mul(part::load(f.pivot1 + j), part::broadcast(-1.0f));
                part s = part::broadcast(0.0f), q = s;
                const auto add_row = [&](int i) KVARN_LAMBDA {
                    const part u = fma(part::broadcast(f.reciprocal0[i0 + i]), part::load(rows + i * stride + j), offset);
                    s = add(s, u);
                    q = fma(u, u, q);
                };
                if constexpr (k::width == 1) {
                    for (int i = 0; i < block; ++i) add_row(i);
                } else {
                    KVARN_UNROLL
                    for (int i = 0; i < block; ++i) add_row(i);
                }
                if (i0 != 0) {
                    s = add(part::load(f.sum1 + j), s);
                    q = add(part::load(f.square1 + j), q);
                }
                s.store(f.sum1 + j);
                q.store(f.square1 + j);
            }
        }
    }

    /// Deviations along axis 0 from the sums; with Update also new factors for axis 1 (whose deviations then are of the iterate
    /// with the new factors) and pivots for the next pass. Returns the growth of axis 1's reciprocals.
    template <bool Update>
    KVARN_NOINLINE static float columns(int size0, int size1, float unit, const variance_factors& f) noexcept
    {
        const bool centre1 = size0 % simd::lane_count == 0;
        const float before = Update ? total(f.reciprocal1, size1) : 1.0f;
        const float inverse_n = 1.0f / static_cast<float>(size0), inverse_n1 = 1.0f / static_cast<float>(size0 - 1);
        for (int j = 0; j < size1; j += simd::lane_count) {
            const v raw = deviation(v::load(f.sum1 + j), v::load(f.square1 + j), inverse_n, inverse_n1);
            v r = v::load(f.reciprocal1 + j);
            if constexpr (Update) {
                const v s = updated(v::load(f.current1 + j), mul(raw, r), unit);
                r = div(v::broadcast(1.0f), s);
                s.store(f.current1 + j);
                r.store(f.reciprocal1 + j);
                if (centre1) fma(v::load(f.sum1 + j), v::broadcast(inverse_n), v::load(f.pivot1 + j)).store(f.pivot1 + j);
            }
            mul(raw, r).store(f.deviation1 + j);
        }
        return Update ? total(f.reciprocal1, size1) / before : 1.0f;
    }

    /// The sum of sixteen numbers, or of all whole lanes among n.
    KVARN_INLINE static float total(const v& x) noexcept
    {
        float each[simd::lane_count];
        x.store(each);
        float all = each[0];
        for (int i = 1; i < simd::lane_count; ++i) all = simd::kernels<simd::portable>::add(all, each[i]);
        return all;
    }
    KVARN_INLINE static float total(const float* x, int n) noexcept
    {
        v sum = v::load(x);
        for (int i = simd::lane_count; i + simd::lane_count <= n; i += simd::lane_count) sum = add(sum, v::load(x + i));
        return total(sum);
    }

    /// The pivots of the first pass: means of the first sixteen rows.
    KVARN_INLINE static void first_pivots(const float* rows, std::ptrdiff_t stride, int size1, float* pivot) noexcept
    {
        for (int j = 0; j < size1; j += simd::lane_count) {
            v sum = v::load(rows + j);
            for (int i = 1; i < simd::lane_count; ++i) sum = add(sum, v::load(rows + i * stride + j));
            mul(sum, v::broadcast(1.0f / simd::lane_count)).store(pivot + j);
        }
    }
    /// The pivots of a later pass: the means of the one before, grown like the first sixteen rows' factors.
    KVARN_INLINE static void scale_pivots(float* pivot, int size1, float growth) noexcept
    {
        for (int j = 0; j < size1; j += simd::lane_count) mul(v::load(pivot + j), v::broadcast(growth)).store(pivot + j);
    }

    /// max / min of n deviations.
    KVARN_INLINE static float spread(const float* deviations, int n) noexcept
    {
        float low = deviations[0], high = low;
        int i = 0;
        if (n >= simd::lane_count) {
            v least = v::load(deviations), most = least;
            for (; i + simd::lane_count <= n; i += simd::lane_count) {
                least = minimum(least, v::load(deviations + i));
                most = maximum(most, v::load(deviations + i));
            }
            low = reduce_min(least);
            high = reduce_max(most);
        }
        for (; i < n; ++i) {
            low = deviations[i] < low ? deviations[i] : low;
            high = deviations[i] > high ? deviations[i] : high;
        }
        return high / (low > least_deviation ? low : least_deviation);
    }

    KVARN_INLINE static void fill(float* to, int n, float value) noexcept
    {
        for (int i = 0; i < n; i += simd::lane_count) v::broadcast(value).store(to + i);
    }
    KVARN_INLINE static void copy(const float* from, int n, float* to) noexcept
    {
        for (int i = 0; i < n; i += simd::lane_count) v::load(from + i).store(to + i);
    }
};

}  // namespace detail

template <class Arch>
void normalize_variance(const float* tile, std::ptrdiff_t stride, int size0, int size1, int iterations, int enough, float unit,
                        const variance_factors& f) noexcept
{
    using pass = detail::variance_pass<Arch>;
    const auto run = [&](bool update, float growth) {
        const bool padded = stride == size1 + detail::tile_padding;
        detail::with_extent(padded ? size1 : 0, [&](auto n) KVARN_LAMBDA {
            if constexpr (detail::is_constant_extent<decltype(n)> && pass::k::width > 1)
                pass::run(update, tile, std::integral_constant<int, n() + detail::tile_padding>{}, size0, n, growth, f);
            else
                pass::run(update, tile, stride, size0, size1, growth, f);
        });
    };
    for (float* const ones : {f.s0, f.current0, f.reciprocal0}) pass::fill(ones, size0, 1.0f);
    for (float* const units : {f.s1, f.current1}) pass::fill(units, size1, unit);
    pass::fill(f.reciprocal1, size1, 1.0f / unit);
    pass::fill(f.pivot0, size0, 0.0f);
    pass::fill(f.pivot1, size1, 0.0f);

    run(false, 1.0f);
    pass::template columns<false>(size0, size1, unit, f);
    float best = pass::spread(f.deviation0, size0) + pass::spread(f.deviation1, size1);
    for (int i = 0; i < iterations; ++i) {
        if ((best >= 2.0f && best * detail::needed_gain <= 2.0f) || (i >= enough && best < detail::balanced)) break;
        const float growth = pass::template columns<true>(size0, size1, unit, f);
        run(true, growth);
        pass::template columns<false>(size0, size1, unit, f);
        const float imbalance = pass::spread(f.deviation0, size0) + pass::spread(f.deviation1, size1);
        if (imbalance < best * detail::needed_gain) {
            best = imbalance;
            pass::copy(f.current0, size0, f.s0);
            pass::copy(f.current1, size1, f.s1);
        }
    }
}

}  // namespace kvarn
