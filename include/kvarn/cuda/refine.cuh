// SPDX-License-Identifier: Apache-2.0
#pragma once
// The refined encoder of a tile, the twin of codec/refine.hpp: clip search, alternating least-squares fits of both axes, and the
// norm of every token. In: a float tile [axis 0][axis 1], the normaliser's s0 and s1 (kept). Out: the fields of one part of a
// record. float arithmetic in the CPU's order. No allocation; for one thread block.
//
// Codes are not kept between passes: a row's origin and two numbers (code_of) give them again.

#include <cstddef>
#include <cstdint>

#include <kvarn/cuda/encode.cuh>
#include <kvarn/layout/tile_unit.hpp>

namespace kvarn::cuda::detail {

using kvarn::detail::tile_unit;
using kvarn::detail::unit_of;

/// The numbers of codec/refine.hpp.
inline constexpr int fits_after_search = 3;
inline constexpr float refit_step = 2.0f;
inline constexpr float least_scale = 1e-12f;
inline constexpr float least_factor = 0x1p-10f;
inline constexpr int most_leverage = 2;
inline constexpr float most_mean_square = 16.0f;
inline constexpr float least_variance = 1e-5f;

KVARN_DEVICE KVARN_INLINE int binade(float x) noexcept { return static_cast<int>(bits_as<std::uint32_t>(x) >> 23); }
/// 2^n, or 1 where n is negative.
KVARN_DEVICE KVARN_INLINE float lift_by(int n) noexcept { return bits_as<float>(static_cast<std::uint32_t>(n > 0 ? 127 + n : 127) << 23); }

template <class Team>
struct refine_pass {
    Team& team;
    const tile_view& t;
    float levels;
    float* rows;     // [size0][4]: origin, then by and plus of the codes, then scale
    float* zero;     // [size0]
    float* lift;     // [size0]
    float* s1;       // [size1]
    float* columns;  // [size1][2]: 1 / s1 and s1^2 * share, the weight
    float* share;    // [size1]
    float* product;  // [size1]
    float* scratch;
    tile_unit unit;
    float total_weight = 0.0f;

    /// Arrays that the normaliser no longer needs; its s0 and s1 stay.
    KVARN_DEVICE KVARN_INLINE refine_pass(Team& team_, const tile_view& t_, const tile_factors& f, int bits, const tile_unit& unit_) noexcept
        : team(team_), t(t_), levels(static_cast<float>((1 << bits) - 1)), rows(f.current0), zero(f.partial), lift(f.partial + t_.size0),
          s1(f.current1), columns(f.reciprocal1), share(f.pivot1), product(f.sum1), scratch(f.scratch), unit(unit_)
    {}

    /// The code of x - origin before it is rounded, clamped.
    KVARN_DEVICE KVARN_INLINE float unrounded(float x, float by, float plus) const noexcept
    {
        return bounded(fma(x, by, plus), 0.0f, levels);
    }
    /// The code of x - origin: round_half_even, clamped.
    KVARN_DEVICE KVARN_INLINE float code_of(float x, float by, float plus) const noexcept
    {
        return sub(add(unrounded(x, by, plus), rounding_magic), rounding_magic);
    }

    /// Reciprocals and weights of the present s1, which this thread's columns need not share yet. Ends with a barrier.
    KVARN_DEVICE KVARN_INLINE void take_factors() noexcept
    {
        for_each(team, t.size1, [&](int j) {
            store_group(columns + 2 * j, float_group<2>{{div(1.0f, s1[j]), mul(mul(s1[j], s1[j]), share[j])}});
        });
        team.barrier();
        if (team.rank() < lane_count) {
            const float* const weight = columns + 1;
            float sum = weight[2 * team.rank()];
            for (int j = team.rank() + lane_count; j < t.size1; j += lane_count) sum = add(sum, weight[2 * j]);
            scratch[team.rank()] = sum;
        }
        team.barrier();
        total_weight = fold_lanes(scratch);
    }

    /// The largest power of two that a factor may have without losing weight. A barrier at each end.
    KVARN_DEVICE KVARN_INLINE int most_binade(const float* factors, int n) const noexcept
    {
        auto* const sums = reinterpret_cast<std::uint32_t*>(scratch);
        team.barrier();
        if (team.rank() < lane_count) {
            std::uint32_t sum = 0;
            for (int i = team.rank(); i < n; i += lane_count) sum += static_cast<std::uint32_t>(binade(factors[i]));
            sums[team.rank()] = sum;
        }
        team.barrier();
        std::uint32_t sum = 0;
        for (int i = 0; i < lane_count; ++i) sum += sums[i];
        team.barrier();
        return (static_cast<int>(sum) + n / 2) / n + most_leverage;
    }

    /// The rows' and columns' weights, from the factors that the normaliser found.
    KVARN_DEVICE KVARN_INLINE void bound_weights(const float* s0) const noexcept
    {
        const int most0 = most_binade(s0, t.size0), most1 = most_binade(s1, t.size1);
        for_each(team, t.size0, [&](int i) { lift[i] = lift_by(binade(s0[i]) - most0); });
        for_each(team, t.size1, [&](int j) { share[j] = div(1.0f, lift_by(2 * (binade(s1[j]) - most1))); });
    }

    /// Takes the tile's rows times 1 / lift, or times lift. A barrier at each end.
    KVARN_DEVICE KVARN_INLINE void scale_rows(bool up) const noexcept
    {
        team.barrier();
        for_each(team, t.size0 << t.shift1, [&](int item) {
            const float by = lift[item >> t.shift1];
            float& x = t.row(item >> t.shift1)[item & (t.size1 - 1)];
            if (by > 1.0f) x = mul(x, up ? by : div(1.0f, by));
        });
        team.barrier();
    }

    /// V: a channel far from zero gets a larger factor. A barrier before and between.
    KVARN_DEVICE KVARN_INLINE void bound_means(const float* s0) noexcept
    {
        for_each(team, t.size0, [&](int i) { lift[i] = div(1.0f, s0[i]); });
        team.barrier();
        for_each(team, t.size1, [&](int j) {
            float sum = 0.0f;
            for (int i = 0; i < t.size0; ++i) {
                const float x = mul(t.data[i * t.stride + j], lift[i]);
                sum = fma(x, x, sum);
            }
            s1[j] = maximum(s1[j], sqrt(mul(sum, div(1.0f, mul(most_mean_square, static_cast<float>(t.size0))))));
        });
    }

    /// The share of the range that candidate number `i` keeps.
    KVARN_DEVICE KVARN_INLINE static float clip(int i) noexcept { return fma(-0.1f, static_cast<float>(i), 1.0f); }

    /// One row as its four threads see it: all of them hold the same numbers.
    struct row_state {
        const float* x;  // at this thread's first lane
        int k;
        float lift;
        float scale, zero, origin;
        float by = 0.0f, plus = 0.0f;  // of the codes
    };

    KVARN_DEVICE KVARN_INLINE row_state load_row(int i, int k) const noexcept
    {
        return {t.row(i) + k, k, lift[i], rows[4 * i + 3], zero[i], 0.0f};
    }
    KVARN_DEVICE KVARN_INLINE void store_row(int i, const row_state& r) const noexcept
    {
        team.warp_barrier();  // all four have read what one of them writes now
        if (r.k != 0) return;
        store_group(rows + 4 * i, float_group<4>{{r.origin, r.by, r.plus, r.scale}});
        zero[i] = r.zero;
    }
    /// body(lane, x - origin, weight, value, j) for this thread's elements of the row.
    template <class Body>
    KVARN_DEVICE KVARN_INLINE void for_elements(const row_state& r, Body&& body) const noexcept
    {
        const float* const column = columns + 2 * r.k;
        for (int j = 0; j < t.size1; j += lane_count) {
            KVARN_UNROLL
            for (int n = 0; n < 4; ++n) {
                const float value = r.x[j + 4 * n];
                const float_group<2> c = load_group<2>(column + 2 * (j + 4 * n));
                body(n, fma(value, c.x[0], -r.origin), c.x[1], value, r.k + j + 4 * n);
            }
        }
    }

    /// Minimum and maximum, then the clip range of least squared error.
    KVARN_DEVICE KVARN_INLINE void search(row_state& r, int clip_steps, float floor) const noexcept
    {
        const float* const reciprocal = columns + 2 * r.k;
        float low = mul(r.x[0], reciprocal[0]), high = low;
        for (int j = row_threads; j < t.size1; j += row_threads) {
            const float x = mul(r.x[j], reciprocal[2 * j]);
            low = quick_min(low, x);
            high = quick_max(high, x);
        }
        low = row_min(team, low);
        high = row_max(team, high);
        r.origin = fma(sub(high, low), 0.5f, low);
        const float half_range = maximum(mul(sub(high, low), 0.5f), mul(floor, 0.5f * levels)), middle = 0.5f * levels;
        int best = 0;
        float least_error = 0.0f;
        for (int first = 0; first <= clip_steps; first += 3) {
            float sum[3][4] = {}, by[3];
            KVARN_UNROLL
            for (int c = 0; c < 3; ++c) by[c] = div(middle, mul(half_range, clip(first + c)));
            for_elements(r, [&](int n, float x, float w, float, int) {
                KVARN_UNROLL
                for (int c = 0; c < 3; ++c) {
                    const float y = fma(x, by[c], middle);
                    const float code = sub(add(bounded(y, 0.0f, levels), rounding_magic), rounding_magic);
                    const float e = sub(y, code);
                    sum[c][n] = fma(mul(e, w), e, sum[c][n]);
                }
            });
            KVARN_UNROLL
            for (int c = 0; c < 3; ++c) {
                const float kept = clip(first + c), error = mul(mul(fold(team, sum[c]), kept), kept);
                if (first + c > clip_steps || (first + c != 0 && !greater(least_error, error))) continue;
                least_error = error;
                best = first + c;
            }
        }
        const float kept = mul(half_range, clip(best));
        r.scale = div(kept, middle);
        r.zero = sub(r.origin, kept);
    }

    /// by and plus of the codes for the present scale and zero.
    KVARN_DEVICE KVARN_INLINE void round(row_state& r) const noexcept
    {
        r.by = div(1.0f, r.scale);
        r.plus = mul(sub(r.origin, r.zero), r.by);
    }

    /// Rounds, then fits scale and zero to the codes by weighted least squares; codec/refine.hpp says what Unbiased is for.
    template <bool Unbiased>
    KVARN_DEVICE KVARN_INLINE void fit(row_state& r) const noexcept
    {
        round(r);
        float sum_c[4] = {}, sum_cc[4] = {}, sum_cx[4] = {}, sum_x[4] = {}, sum_xx[4] = {};
        for_elements(r, [&](int n, float x, float w, float, int) {
            const float code = code_of(x, r.by, r.plus), weighted = mul(code, w);
            sum_c[n] = add(sum_c[n], weighted);
            sum_cc[n] = fma(weighted, code, sum_cc[n]);
            sum_cx[n] = fma(weighted, x, sum_cx[n]);
            sum_x[n] = fma(w, x, sum_x[n]);
            if constexpr (Unbiased) sum_xx[n] = fma(mul(w, x), x, sum_xx[n]);
        });
        const float c = fold(team, sum_c), s = fold(team, sum_x), cc = fold(team, sum_cc), cx = fold(team, sum_cx);
        const float xx = Unbiased ? fold(team, sum_xx) : 0.0f;
        const float mean_code = div(c, total_weight), mean = div(s, total_weight);
        const float variance = fnma(mean_code, c, cc), covariance = fnma(mean_code, s, cx);
        if (greater(variance, mul(cc, least_variance))) {
            const float fitted = div(covariance, variance);
            if (greater(fitted, least_scale)) {
                r.scale = fitted;
                if constexpr (Unbiased) r.scale = minimum(maximum(div(fnma(mean, s, xx), covariance), fitted), mul(2.0f, fitted));
            }
        }
        if constexpr (Unbiased) r.scale = as_scalar0(r, r.scale);
        r.zero = add(r.origin, fnma(r.scale, mean_code, mean));
    }

    template <bool Unbiased>
    KVARN_DEVICE KVARN_INLINE void fit_again(row_state& r) const noexcept
    {
        r.origin = fma(r.scale, 0.5f * levels, r.zero);
        fit<Unbiased>(r);
    }

    /// A scalar in the precision that the record will have it in.
    KVARN_DEVICE KVARN_INLINE float as_scalar0(const row_state& r, float x) const noexcept
    {
        const float factor = unit.fold * r.lift;  // powers of two
        return as_half(x * factor) * div(1.0f, factor);
    }
    KVARN_DEVICE KVARN_INLINE float as_scalar1(float x) const noexcept { return as_half(x * unit.inverse_fold) * unit.fold; }

    /// ||exact|| / ||decoded|| from their squares; 1 where nothing was decoded.
    KVARN_DEVICE KVARN_INLINE static float norm_ratio(float exact, float decoded) noexcept
    {
        return greater(decoded, 0.0f) ? sqrt(div(exact, decoded)) : 1.0f;
    }

    /// Multiplies scale and zero so that the decoded norm of the row is the exact one.
    KVARN_DEVICE KVARN_INLINE void keep_row_norm(row_state& r) const noexcept
    {
        float exact[4] = {}, decoded[4] = {};
        for_elements(r, [&](int n, float x, float w, float value, int j) {
            const float y = fma(code_of(x, r.by, r.plus), r.scale, r.zero);
            exact[n] = fma(mul(value, share[j]), value, exact[n]);
            decoded[n] = fma(mul(y, w), y, decoded[n]);
        });
        const float ratio = norm_ratio(fold(team, exact), fold(team, decoded));
        r.scale = mul(r.scale, ratio);
        r.zero = mul(r.zero, ratio);
    }

    /// Sums along axis 0 of this thread's column: y^2, and tile * y or, with Norms, tile^2. One chain of rows, as on the CPU.
    template <bool Norms>
    KVARN_DEVICE KVARN_INLINE void sum_column(int j, float& products, float& squares) const noexcept
    {
        products = squares = 0.0f;
        const float reciprocal = columns[2 * j];
        const float* value = t.data + j;
        for (int i = 0; i < t.size0; i += 4) {  // in fours, so that loads need not wait for the sums
            KVARN_UNROLL
            for (int n = 0; n < 4; ++n) {
                const float_group<4> row = load_group<4>(rows + 4 * (i + n));
                const float x = value[n * t.stride], code = code_of(fma(x, reciprocal, -row.x[0]), row.x[1], row.x[2]);
                const float y = fma(code, row.x[3], zero[i + n]);
                products = fma(x, Norms ? x : y, products);
                squares = fma(y, y, squares);
            }
            value += 4 * t.stride;
        }
    }

    /// Moves s1 `step` times the way to the least-squares fit of the tile on y. A barrier at each end.
    KVARN_DEVICE KVARN_INLINE void refit_factors(float step) noexcept
    {
        team.barrier();
        // A column's reciprocal is needed until its own sum is done, and by no other thread.
        for_each(team, t.size1, [&](int j) {
            float products, squares;
            sum_column<false>(j, products, squares);
            if (greater(squares, 0.0f)) s1[j] = maximum(fma(step, sub(div(products, squares), s1[j]), s1[j]), least_factor * unit.unit);
        });
        take_factors();
    }
};

/// Whether a scalar rounds to a finite half. Not a number: no.
KVARN_DEVICE KVARN_INLINE bool fits_half(float x) noexcept
{
    return x < half_overflow && -x < half_overflow;
}

/// Encodes the tile; the token is axis 1 for K and axis 0 for V. Returns false, with nothing stored, if a scalar does not fit a
/// half; the tile and f.s0, f.s1 are unchanged. `rounds` >= 0 refits; clip ranges 1, 0.9, ... 1 - 0.1 * clip_steps. `unit` is what the
/// factors were made with.
template <class Team>
KVARN_DEVICE KVARN_INLINE bool encode_refined(Team& team, const tile_view& t, const tile_factors& f, bool token_is_axis1,
                                              int bits, int rounds, int clip_steps, const tile_unit& unit,
                                              std::byte* record, const part_fields& at) noexcept
{
    refine_pass<Team> p(team, t, f, bits, unit);
    for_each(team, t.size1, [&](int j) { p.s1[j] = f.s1[j]; });
    if (!token_is_axis1) p.bound_means(f.s0);
    p.bound_weights(f.s0);
    p.scale_rows(false);
    p.take_factors();
    for_rows(team, t.size0, [&](int i, int k) {
        auto r = p.load_row(i, k);
        p.search(r, clip_steps, mul(div(f.s0[i], r.lift), 1e-10f));
        for (int n = 0; n < fits_after_search; ++n) p.template fit<false>(r);
        p.round(r);
        p.store_row(i, r);
    });
    for (int n = 1; n < rounds; ++n) {
        p.refit_factors(refit_step);
        for_rows(team, t.size0, [&](int i, int k) {
            auto r = p.load_row(i, k);
            p.template fit_again<false>(r);
            p.store_row(i, r);
        });
    }
    if (rounds > 0)
        p.refit_factors(1.0f);
    else
        team.barrier();
    if (!token_is_axis1) {
        for_each(team, t.size1, [&](int j) { p.s1[j] = p.as_scalar1(p.s1[j]); });
        p.take_factors();
    }
    bool fits = true;
    for_rows(team, t.size0, [&](int i, int k) {
        auto r = p.load_row(i, k);
        if (token_is_axis1) {
            p.template fit_again<true>(r);
            r.zero = p.as_scalar0(r, r.zero);
        } else {
            p.template fit_again<false>(r);
            p.keep_row_norm(r);
        }
        r.zero = add(r.zero, 0.0f);  // -0 becomes +0
        fits = fits && fits_half(r.scale * r.lift * unit.fold) && fits_half(r.zero * r.lift * unit.fold);
        p.store_row(i, r);
    });
    team.barrier();
    for_each(team, t.size1, [&](int j) {
        if (token_is_axis1) {
            float exact, decoded;
            p.template sum_column<true>(j, exact, decoded);
            p.product[j] = refine_pass<Team>::norm_ratio(exact, decoded);
        } else {
            p.product[j] = p.s1[j];
        }
        p.product[j] *= unit.inverse_fold;
        fits = fits && fits_half(p.product[j]);
    });
    if (largest_of_all(team, fits ? 0u : 1u, reinterpret_cast<std::uint32_t*>(p.scratch)) != 0) {
        p.scale_rows(true);
        return false;
    }
    pack_tile(team, t, bits, record + at.codes, [&](int i) {
        return [&p, values = t.row(i), row = load_group<4>(p.rows + 4 * i)](int j, std::uint32_t(&four)[4]) {
            const float_group<4> x = load_group<4>(values + j);
            KVARN_UNROLL
            for (int n = 0; n < 4; n += 2) {
                const float_group<4> c = load_group<4>(p.columns + 2 * (j + n));  // two columns
                KVARN_UNROLL
                for (int m = 0; m < 2; ++m) {
                    const float centred = fma(x.x[n + m], c.x[2 * m], -row.x[0]);
                    four[n + m] = bits_as<std::uint32_t>(add(p.unrounded(centred, row.x[1], row.x[2]), rounding_magic));
                }
            }
        };
    });
    // After the codes, which needed them as they were; scale and zero of a row belong to one thread.
    team.barrier();
    for_each(team, t.size0, [&](int i) {
        p.rows[4 * i + 3] *= p.lift[i];
        p.zero[i] *= p.lift[i];
        p.rows[4 * i + 3] *= unit.fold;
        p.zero[i] *= unit.fold;
    });
    team.barrier();
    store_scalars(team, p.rows + 3, t.size0, record + at.scale0, 4);
    store_scalars(team, p.zero, t.size0, record + at.zero0);
    store_scalars(team, p.product, t.size1, record + at.scale1);
    return true;
}

}  // namespace kvarn::cuda::detail
