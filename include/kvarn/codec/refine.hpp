// SPDX-License-Identifier: Apache-2.0
#pragma once
// The refined encoder: the same record as the paper's, with codes and scalars chosen for the least squared error of the decoded
// values and then for the norm of every token. In: a float tile [axis 0][axis 1] and its normalising factors s1. Out: packed
// codes, and the record's scalars as floats. float arithmetic in a fixed order. No allocation; thread safe.
//
// A value decodes to (code * scale_i + zero_i) * s1_j. With x_ij = tile_ij / s1_j and weights s1_j^2, which make the error of x
// count as that of the value:
//   1. each axis-0 index i tries clip ranges 1, 0.9, 0.8, ... about the middle of its x, keeps the best, and alternates rounding
//      with the least-squares fit of scale_i and zero_i;
//   2. rounds of refits: s1_j by least squares, round again, then scale_i and zero_i by least squares;
//   3. K: each channel's scale is widened to the unbiased fit; then the scalars of axis 0 (K) or axis 1 (V) take their half precision,
//      and the token's own scalar makes the norm of the decoded token that of the exact one (rotations keep norms).
//
// Weights have bounds, so that a token or channel much larger than the others, or in V far from zero, costs the others little: while it is
// encoded, a row beyond them is held smaller by a power of two, and a column weighs less by one (bound_weights, bound_means). Errors and
// norms are those of values so weighted. Tiles without such rows and columns are as without bounds.

#include <cstddef>
#include <cstdint>

#include <kvarn/codec/encode.hpp>
#include <kvarn/codec/packing.hpp>
#include <kvarn/layout/tile_unit.hpp>
#include <kvarn/simd/lanes.hpp>

namespace kvarn::detail {

/// Which axis of the tile is the token: its scalars are the ones that keep the norm.
enum class token_axis : std::uint8_t { axis0, axis1 };

/// Memory of encode_refined; arrays hold their axis' size rounded up to 16 floats.
struct refine_memory {
    float* scale;       ///< result, axis 0
    float* zero;        ///< result, axis 0
    float* s1;          ///< in: the normaliser's factors of axis 1; out: those of the record
    float* reciprocal;  ///< axis 1: 1 / s1
    float* weight;      ///< axis 1: s1^2 * share, 0 in the padding
    float* share;       ///< axis 1: what bounds leave of the weight: 1, 1/4, 1/16, ...
    float* lift;        ///< axis 0: by how much the row is held smaller: 1, 2, 4, ...
    float* product;     ///< axis 1: sums along axis 0
    float* square;      ///< axis 1: sums along axis 0
    float* x;           ///< [16][axis 1]
    float* codes;       ///< [16][axis 1]
};

/// Least-squares fits of axis 0 between the clip search and the first refit of axis 1.
inline constexpr int fits_after_search = 3;
/// How far a refit of axis 1 goes, but for the last one. The fit itself (1) leaves most codes as they are, and with them the scalars;
/// twice as far finds in 5 rounds what it needs 16 for (docs/accuracy.md).
inline constexpr float refit_step = 2.0f;
inline constexpr float least_scale = 1e-12f;      // of axis 0; half's least number is 6e-8
inline constexpr float least_factor = 0x1p-10f;   // of axis 1, in units
inline constexpr int most_leverage = 2;           // in binades, of a factor over the mean one: beyond, its weight does not grow
inline constexpr float most_mean_square = 16.0f;  // of a normalised channel of V
inline constexpr float least_variance = 1e-5f;    // of codes, relative to their mean square: below, they are all equal

/// The power of two of a positive float, and the largest that a factor may have without losing weight.
KVARN_INLINE int binade(float x) noexcept { return static_cast<int>(bits_as<std::uint32_t>(x) >> 23); }
KVARN_INLINE int most_binade(const float* factors, int n) noexcept
{
    int sum = 0;
    for (int i = 0; i < n; ++i) sum += binade(factors[i]);
    return (sum + n / 2) / n + most_leverage;
}
/// 2^n, or 1 where n is negative.
KVARN_INLINE float lift_by(int n) noexcept
{
    return bits_as<float>(static_cast<std::uint32_t>(n > 0 ? 127 + n : 127) << 23);
}

template <class Arch>
struct refine_pass {
    using v = simd::lanes<Arch>;
    using part = simd::part_lanes<Arch>;
    using k = simd::kernels<Arch>;
    using step = simd::step_lanes<Arch>;
    using one = simd::kernels<simd::portable>;
    static constexpr int block = simd::lane_count;

    /// What the rows of a block are rounded by.
    struct block_rows {
        alignas(64) float origin[block];        ///< x' = x - origin
        alignas(64) float minus_origin[block];
        alignas(64) float inverse[block];       ///< 1 / scale
        alignas(64) float offset[block];        ///< the code of x' = 0
        alignas(64) float sum[block];           ///< of weight * x', of rows that are in the block
    };

    /// Sums over axis 1, for each row of a block, which are folded to one register each: the last additions are done for all rows at once.
    template <int Count>
    struct row_sums {
        alignas(64) float folded[Count][block * k::width];

        KVARN_INLINE explicit row_sums(int rows) noexcept
        {
            if (rows == block) return;
            for (auto& sum : folded)
                for (int i = rows * k::width; i < block * k::width; ++i) sum[i] = 0.0f;
        }
        KVARN_INLINE void take(int i, const v (&sums)[Count]) noexcept
        {
            KVARN_UNROLL
            for (int n = 0; n < Count; ++n) k::store(folded[n] + i * k::width, fold(sums[n]));
        }
        KVARN_INLINE v of(int n) const noexcept { return simd::sum_folded_rows<Arch>(folded[n]); }
    };

    const float* tile;
    std::ptrdiff_t stride;
    int size1, padded1;
    float levels;  // the largest code
    refine_memory m;
    tile_unit unit;
    float total_weight = 0.0f;

    /// The code of a value in code units: clamped to 0 .. most, and rounded.
    template <class V>
    KVARN_INLINE static V nearest_code(const V& x, const V& most) noexcept
    {
        return rounded(minimum(maximum(x, V::broadcast(0.0f)), most));
    }

    /// Reciprocals and weights of the present s1. Padding repeats column 0, with weight 0.
    KVARN_NOINLINE void take_factors() noexcept
    {
        for (int j = size1; j < padded1; ++j) m.s1[j] = m.s1[0];
        v sum = v::broadcast(0.0f);
        for (int j = 0; j < padded1; j += block) {
            const v s = v::load(m.s1 + j);
            div(v::broadcast(1.0f), s).store(m.reciprocal + j);
            mul(mul(s, s), v::load(m.share + j)).store(m.weight + j);
        }
        for (int j = size1; j < padded1; ++j) m.weight[j] = 0.0f;
        for (int j = 0; j < padded1; j += block) sum = add(sum, v::load(m.weight + j));
        total_weight = reduce_add(sum);
    }

    /// The rows' and columns' weights, from the factors that the normaliser found.
    KVARN_NOINLINE void bound_weights(const float* s0, int size0) const noexcept
    {
        const int most0 = most_binade(s0, size0), most1 = most_binade(m.s1, size1);
        for (int i = 0; i < simd::whole_lanes(size0); ++i) m.lift[i] = i < size0 ? lift_by(binade(s0[i]) - most0) : 1.0f;
        for (int j = 0; j < padded1; ++j) m.share[j] = j < size1 ? one::div(1.0f, lift_by(2 * (binade(m.s1[j]) - most1))) : 1.0f;
    }

    /// Takes the tile's rows times 1 / lift, or times lift.
    KVARN_NOINLINE void scale_rows(float* rows, int size0, bool up) const noexcept
    {
        for (int i = 0; i < size0; ++i) {
            if (!(m.lift[i] > 1.0f)) continue;
            const v by = v::broadcast(up ? m.lift[i] : one::div(1.0f, m.lift[i]));
            for (int j = 0; j < padded1; j += block) mul(v::load(rows + i * stride + j), by).store(rows + i * stride + j);
        }
    }

    /// V has no zero of its own for a channel: one far from zero gets a larger factor, so that it does not take up the rows' range.
    KVARN_NOINLINE void bound_means(const float* s0, int size0) const noexcept
    {
        for (int i = 0; i < size0; ++i) m.lift[i] = one::div(1.0f, s0[i]);
        for (int j = 0; j < padded1; j += block) {
            v sum = v::broadcast(0.0f);
            for (int i = 0; i < size0; ++i) {
                const v x = mul(v::load(tile + i * stride + j), v::broadcast(m.lift[i]));
                sum = fma(x, x, sum);
            }
            const v mean_square = mul(sum, v::broadcast(1.0f / (most_mean_square * static_cast<float>(size0))));
            maximum(v::load(m.s1 + j), sqrt(mean_square)).store(m.s1 + j);
        }
    }

    /// The share of the range that candidate number `i` keeps.
    KVARN_INLINE static float clip(int i) noexcept { return one::fma(-0.1f, static_cast<float>(i), 1.0f); }

    static constexpr int ranges = 3;  // tried in one pass

    /// The columns of a row, and what they have in common.
    struct column_data {
        int count;
        const float *reciprocals, *weights;
        float levels;
    };
    KVARN_INLINE column_data all_columns() const noexcept { return {padded1, m.reciprocal, m.weight, levels}; }

    /// One row, x' = x - origin of which goes to `x`: squared errors in code units of clip ranges whose steps have the reciprocals `inverse`,
    /// and the sum of weight * x'.
    KVARN_INLINE static void clip_errors(const column_data& at, const float* values, float minus_origin, const float (&inverse)[ranges], float* x,
                                         v (&sums)[ranges + 1]) noexcept
    {
        step by[ranges];
        KVARN_UNROLL
        for (int c = 0; c < ranges; ++c) by[c] = step::broadcast(inverse[c]);
        const step minus = step::broadcast(minus_origin), offset = step::broadcast(0.5f * at.levels), most = step::broadcast(at.levels);
        simd::sum_in_parts<Arch>(sums, [&](part (&sum)[ranges + 1], int first_lane) KVARN_LAMBDA {
            KVARN_UNROLL
            for (part& all : sum) all = part::broadcast(0.0f);
            for (int first = first_lane; first < at.count; first += block) {
                KVARN_UNROLL
                for (int e = 0; e < part::count; e += step::count) {
                    const int j = first + e;
                    const step value = fma(step::load(values + j), step::load(at.reciprocals + j), minus), weight = step::load(at.weights + j);
                    value.store(x + j);
                    KVARN_UNROLL
                    for (int c = 0; c < ranges; ++c) {
                        const step y = fma(value, by[c], offset), error = sub(y, nearest_code(y, most));
                        sum[c].set(e, fma(mul(error, weight), error, sum[c].template get<step>(e)));
                    }
                    sum[ranges].set(e, fma(weight, value, sum[ranges].template get<step>(e)));
                }
            }
        });
    }

    /// Rows [i0, i0 + rows): minimum and maximum of x, then the clip range of least squared error. Leaves x' about the middle in the block.
    KVARN_NOINLINE void search(int i0, int rows, int clip_steps, const float* s0, block_rows& b) const noexcept
    {
        alignas(64) float low[block] = {}, high[block] = {}, inverse[ranges][block];
        const float* const values = tile + i0 * stride;
        const std::ptrdiff_t distance = stride;
        float* const x = m.x;
        row_ranges<Arch>(values, distance, rows, padded1, m.reciprocal, low, high);
        const v half_levels = v::broadcast(0.5f * levels), half = v::broadcast(0.5f), range = sub(v::load(high), v::load(low));
        const v origin = fma(range, half, v::load(low));
        const v floor = mul(div(v::load(s0 + i0), v::load(m.lift + i0)), v::broadcast(1e-10f));
        const v half_range = maximum(mul(range, half), mul(floor, half_levels));
        origin.store(b.origin);
        mul(origin, v::broadcast(-1.0f)).store(b.minus_origin);
        v least_error = half, kept = half;
        const column_data at = all_columns();
        for (int first = 0; first <= clip_steps; first += ranges) {
            for (int c = 0; c < ranges; ++c) div(half_levels, mul(half_range, v::broadcast(clip(first + c)))).store(inverse[c]);
            row_sums<ranges + 1> sums(rows);
            for (int i = 0; i < rows; ++i) {
                v sum[ranges + 1];
                clip_errors(at, values + i * distance, b.minus_origin[i], {inverse[0][i], inverse[1][i], inverse[2][i]}, x + i * at.count, sum);
                sums.take(i, sum);
            }
            for (int c = 0; c < ranges && first + c <= clip_steps; ++c) {
                const v share = v::broadcast(clip(first + c)), e = mul(mul(sums.of(c), share), share);  // code units to those of x
                kept = first + c == 0 ? share : v(where_greater(least_error, e, share, kept));
                least_error = first + c == 0 ? e : v(where_greater(least_error, e, e, least_error));
            }
            if (first == 0) sums.of(ranges).store(b.sum);
        }
        kept = mul(half_range, kept);
        div(kept, half_levels).store(m.scale + i0);
        sub(origin, kept).store(m.zero + i0);
    }

    /// One row, x' of which comes from `x` (Staged) or from the tile: its codes, and the sums that a fit of scale and zero needs: of c, c^2, c x',
    /// then x' unless Staged, and x'^2 with Unbiased.
    template <bool Staged, bool Unbiased, int Sums>
    KVARN_INLINE static void round_row(const column_data& at, const float* x, float inverse, float code_of_origin, float minus_origin, float* codes,
                                       v (&sums)[Sums]) noexcept
    {
        const step by = step::broadcast(inverse), offset = step::broadcast(code_of_origin), minus = step::broadcast(minus_origin);
        const step most = step::broadcast(at.levels);
        simd::sum_in_parts<Arch>(sums, [&](part (&sum)[Sums], int first_lane) KVARN_LAMBDA {
            KVARN_UNROLL
            for (part& all : sum) all = part::broadcast(0.0f);
            for (int first = first_lane; first < at.count; first += block) {
                KVARN_UNROLL
                for (int e = 0; e < part::count; e += step::count) {
                    const int j = first + e;
                    const step value = Staged ? step::load(x + j) : fma(step::load(x + j), step::load(at.reciprocals + j), minus);
                    if constexpr (!Staged) sum[3].set(e, fma(step::load(at.weights + j), value, sum[3].template get<step>(e)));
                    const step code = nearest_code(fma(value, by, offset), most);
                    code.store(codes + j);
                    const step weight = step::load(at.weights + j), weighted = mul(code, weight);
                    sum[0].set(e, add(sum[0].template get<step>(e), weighted));
                    sum[1].set(e, fma(weighted, code, sum[1].template get<step>(e)));
                    sum[2].set(e, fma(weighted, value, sum[2].template get<step>(e)));
                    if constexpr (Unbiased) sum[4].set(e, fma(mul(weight, value), value, sum[4].template get<step>(e)));
                }
            }
        });
    }

    /// What rows from i0 on are rounded by, from their scales and zeros. The origin is the middle of the codes, or, of rows that are in the block,
    /// what it was.
    KVARN_NOINLINE void place(int i0, bool staged, block_rows& b) const noexcept
    {
        const v scale = v::load(m.scale + i0), zero = v::load(m.zero + i0);
        if (!staged) fma(scale, v::broadcast(0.5f * levels), zero).store(b.origin);
        const v origin = v::load(b.origin), inverse = div(v::broadcast(1.0f), scale);
        inverse.store(b.inverse);
        mul(sub(origin, zero), inverse).store(b.offset);
        mul(origin, v::broadcast(-1.0f)).store(b.minus_origin);
    }

    /// Scales and zeros of rows from i0 on from the sums of round_row.
    KVARN_NOINLINE void solve(int i0, const float* folded, bool staged, bool unbiased, const block_rows& b) const noexcept
    {
        alignas(64) float sums[5][block];
        for (int n = 0; n < (staged ? 3 : unbiased ? 5 : 4); ++n) simd::sum_folded_rows<Arch>(folded + n * block * k::width).store(sums[n]);
        const v c = v::load(sums[0]), cc = v::load(sums[1]), s = v::load(staged ? b.sum : sums[3]), weight = v::broadcast(total_weight);
        const v mean_code = div(c, weight), mean = div(s, weight);
        const v variance = fnma(mean_code, c, cc), covariance = fnma(mean_code, s, v::load(sums[2]));
        const v fitted = div(covariance, variance);
        v better = fitted, scale = v::load(m.scale + i0);
        if (unbiased) {
            const v widened = div(fnma(mean, s, v::load(sums[4])), covariance);
            better = minimum(maximum(widened, fitted), mul(fitted, v::broadcast(2.0f)));
        }
        better = where_greater(fitted, v(v::broadcast(least_scale)), better, scale);
        scale = where_greater(variance, v(mul(cc, v::broadcast(least_variance))), better, scale);
        scale.store(m.scale + i0);
        if (unbiased) {
            take_half_precision(m.scale + i0, m.lift + i0, unit.fold);
            scale = v::load(m.scale + i0);
        }
        add(v::load(b.origin), fnma(scale, mean_code, mean)).store(m.zero + i0);
    }

    /// Rounds x' = x - origin of rows [i0, i0 + rows), taken from the block (Staged) or from the tile, and fits scale and zero to the codes by
    /// weighted least squares. A scale that would not be positive stays as it is. Leaves the codes in the block. With Unbiased the scale is then
    /// widened about the mean, from cov(c, x) / var(c) to var(x) / cov(c, x), and takes its half precision: least squares pull values
    /// towards the channel's mean, and with them the differences between tokens that attention scores tell apart.
    template <bool Staged, bool Unbiased>
    KVARN_NOINLINE void fit(int i0, int rows, block_rows& b) const noexcept
    {
        constexpr int count = Staged ? 3 : Unbiased ? 5 : 4;
        place(i0, Staged, b);
        const column_data at = all_columns();
        const float* const x = Staged ? m.x : tile + i0 * stride;
        const std::ptrdiff_t distance = Staged ? padded1 : stride;
        float* const codes = m.codes;
        row_sums<count> sums(rows);
        for (int i = 0; i < rows; ++i) {
            v sum[count];
            round_row<Staged, Unbiased>(at, x + i * distance, b.inverse[i], b.offset[i], b.minus_origin[i], codes + i * at.count, sum);
            sums.take(i, sum);
        }
        solve(i0, sums.folded[0], Staged, Unbiased, b);
    }

    /// What add_columns takes from the tile, and its codes.
    enum class columns_of { codes, codes_for_norms, staged };

    /// Adds rows [i0, i0 + rows) to the sums along axis 0, y = code * scale + zero: y^2, and tile * y or, for norms, tile^2. Staged rows have no
    /// codes yet for their scales and zeros.
    template <columns_of From>
    KVARN_NOINLINE void add_columns(int i0, int rows, block_rows& b) const noexcept
    {
        if constexpr (From == columns_of::staged) place(i0, true, b);
        int j = 0;
        if constexpr (k::width >= 8 && From != columns_of::codes_for_norms)  // with eight sums at a time no addition waits for another
            for (; j + 2 * block <= padded1; j += 2 * block) add_some_columns<simd::lanes<Arch, 2 * block>, From>(i0, rows, j, b);
        for (; j < padded1; j += part::count) add_some_columns<part, From>(i0, rows, j, b);
    }
    template <class Some, columns_of From>
    KVARN_INLINE void add_some_columns(int i0, int rows, int j, const block_rows& b) const noexcept
    {
        const float *values = tile + i0 * stride + j, *codes = (From == columns_of::staged ? m.x : m.codes) + j;
        const float *const scale = m.scale + i0, *const zero = m.zero + i0;
        const std::ptrdiff_t distance = stride, columns = padded1;
        const Some most = Some::broadcast(levels);
        Some product = Some::broadcast(0.0f), square = product;
        if (i0 != 0) product = Some::load(m.product + j), square = Some::load(m.square + j);
        for (int i = 0; i < rows; ++i, values += distance, codes += columns) {
            Some code = Some::load(codes);
            if constexpr (From == columns_of::staged)
                code = nearest_code(fma(code, Some::broadcast(b.inverse[i]), Some::broadcast(b.offset[i])), most);
            const Some value = Some::load(values), y = fma(code, Some::broadcast(scale[i]), Some::broadcast(zero[i]));
            product = fma(value, From == columns_of::codes_for_norms ? value : y, product);
            square = fma(y, y, square);
        }
        product.store(m.product + j);
        square.store(m.square + j);
    }

    /// Moves s1 `reach` times the way to the least-squares fit of the tile on y, and keeps it positive.
    KVARN_NOINLINE void refit_factors(float reach) noexcept
    {
        for (int j = 0; j < padded1; j += block) {
            const v square = v::load(m.square + j), s1 = v::load(m.s1 + j), way = sub(div(v::load(m.product + j), square), s1);
            const v moved = maximum(fma(v::broadcast(reach), way, s1), v::broadcast(least_factor * unit.unit));
            where_greater(square, v(v::broadcast(0.0f)), moved, s1).store(m.s1 + j);
        }
        take_factors();
    }

    /// ||exact|| / ||decoded|| from their squares; 1 where nothing was decoded.
    KVARN_INLINE static v norm_ratio(const v& exact, const v& decoded) noexcept
    {
        return where_greater(decoded, v(v::broadcast(0.0f)), v(sqrt(div(exact, decoded))), v(v::broadcast(1.0f)));
    }

    /// Gives sixteen scalars the precision that the record will have them in: as multiples of 1 / factor, a power of two, and, where `lift` is not
    /// null, of 1 / lift.
    KVARN_NOINLINE static void take_half_precision(float* scalars, const float* lift, float factor) noexcept
    {
        half halves[block];
        v by = v::broadcast(factor);
        if (lift != nullptr) by = mul(by, v::load(lift));
        const v bound = v::broadcast(2.0f * 32768.0f), scaled = mul(v::load(scalars), by);  // a half that is infinite, whatever is beyond
        minimum(maximum(scaled, mul(bound, v::broadcast(-1.0f))), bound).store(reinterpret_cast<bounded_half*>(halves));
        mul(v::load(static_cast<const half*>(halves)), div(v::broadcast(1.0f), by)).store(scalars);
    }

    /// Scalars times powers of two: by row where `lift` is not null, and one for all. Returns whether halves can hold them.
    KVARN_NOINLINE static bool finish(float* scalars, int n, const float* lift, float factor) noexcept
    {
        v excess = v::broadcast(0.0f);
        for (int i = 0; i < n; i += block) {
            v x = v::load(scalars + i);
            if (lift != nullptr) x = mul(x, v::load(lift + i));
            x = mul(x, v::broadcast(factor));
            x.store(scalars + i);
            excess = maximum(excess, where_greater(v(v::broadcast(half_overflow)), v(magnitude(x)), v(v::broadcast(0.0f)), v(v::broadcast(1.0f))));
        }
        return !(reduce_max(excess) > 0.0f);
    }

    /// The codes of place i of the block as bytes.
    KVARN_INLINE void store_codes(int i, std::uint8_t* to) const noexcept
    {
        const float* const codes = m.codes + i * padded1;
        for (int j = 0; j < padded1; j += block) k::store_codes(to + j, v(v::load(codes + j)).r, k::broadcast(1.0f));
    }

    /// V: multiplies scales and zeros of rows [i0, i0 + rows) so that their decoded norms are the exact ones.
    KVARN_NOINLINE void keep_row_norms(int i0, int rows) const noexcept
    {
        const float *const shares = m.share, *const weights = m.weight;
        const int columns = padded1;
        row_sums<2> sums(rows);
        for (int i = 0; i < rows; ++i) {
            const float *const values = tile + (i0 + i) * stride, *const codes = m.codes + i * columns;
            const v scale = v::broadcast(m.scale[i0 + i]), zero = v::broadcast(m.zero[i0 + i]);
            v sum[2] = {v::broadcast(0.0f), v::broadcast(0.0f)};
            for (int j = 0; j < columns; j += block) {
                const v y = fma(v::load(codes + j), scale, zero), value = v::load(values + j);
                sum[0] = fma(mul(value, v::load(shares + j)), value, sum[0]);
                sum[1] = fma(mul(y, v::load(weights + j)), y, sum[1]);
            }
            sums.take(i, sum);
        }
        const v ratio = norm_ratio(sums.of(0), sums.of(1));
        mul(v::load(m.scale + i0), ratio).store(m.scale + i0);
        mul(v::load(m.zero + i0), ratio).store(m.zero + i0);
    }
};

/// Encodes the tile; see the top. Codes of `bits` bits go to `packed`, scalars to m.scale, m.zero and m.s1. `rounds` >= 0 refits, and
/// clip ranges 1, 0.9, ... 1 - 0.1 * clip_steps. `unit` is what the factors were made with. Returns whether all scalars fit a half; if not, what was written is of no use.
/// Rows and columns must be readable up to whole lanes; columns of the tile from size1 up to there are overwritten.
template <class Arch>
bool encode_refined(float* tile, std::ptrdiff_t stride, int size0, int size1, token_axis token, int bits, int rounds, int clip_steps,
                    const float* s0, const refine_memory& m, const tile_unit& unit, std::uint8_t* packed) noexcept
{
    using pass = refine_pass<Arch>;
    using v = typename pass::v;
    constexpr int block = pass::block;
    const int padded1 = simd::whole_lanes(size1);
    pass p{tile, stride, size1, padded1, static_cast<float>((1 << bits) - 1), m, unit};
    if (token == token_axis::axis0) p.bound_means(s0, size0);
    p.bound_weights(s0, size0);
    p.scale_rows(tile, size0, false);
    p.take_factors();
    const auto for_blocks = [&](auto&& work) {
        for (int i0 = 0; i0 < size0; i0 += block) work(i0, size0 - i0 < block ? size0 - i0 : block);
    };

    typename pass::block_rows b;
    for_blocks([&](int i0, int rows) {
        const auto pad = [&](int i, float value) {
            for (int j = size1; j < padded1; ++j) tile[(i0 + i) * stride + j] = value;
        };
        // For minimum and maximum padding repeats column 0; otherwise it is zero, for the norms.
        for (int i = 0; i < rows; ++i) pad(i, tile[(i0 + i) * stride]);
        p.search(i0, rows, clip_steps, s0, b);
        for (int n = 0; n < fits_after_search; ++n) p.template fit<true, false>(i0, rows, b);
        for (int i = 0; i < rows; ++i) pad(i, 0.0f);
        p.template add_columns<pass::columns_of::staged>(i0, rows, b);
    });
    for (int n = 1; n < rounds; ++n) {
        p.refit_factors(refit_step);
        for_blocks([&](int i0, int rows) {
            p.template fit<false, false>(i0, rows, b);
            p.template add_columns<pass::columns_of::codes>(i0, rows, b);
        });
    }
    if (rounds > 0) p.refit_factors(1.0f);
    if (token == token_axis::axis0) {
        for (int j = 0; j < size1; j += block) pass::take_half_precision(m.s1 + j, nullptr, unit.inverse_fold);
        p.take_factors();
    }

    float plus_zero = 0.0f;
    KVARN_PIN(plus_zero);  // -0 becomes +0, even with -fno-signed-zeros
    alignas(64) std::uint8_t codes[simd::lane_count * max_head_dim + simd::lane_count];
    for_blocks([&](int i0, int rows) {
        if (token == token_axis::axis1) {
            p.template fit<false, true>(i0, rows, b);
            pass::take_half_precision(m.zero + i0, m.lift + i0, unit.fold);
        } else {
            p.template fit<false, false>(i0, rows, b);
            p.keep_row_norms(i0, rows);
        }
        add(v::load(m.zero + i0), v::broadcast(plus_zero)).store(m.zero + i0);
        for (int i = 0; i < rows; ++i) p.store_codes(i, codes + i * size1);  // may run over into the next row's codes, which come later
        if (token == token_axis::axis1) p.template add_columns<pass::columns_of::codes_for_norms>(i0, rows, b);
        pack_rows<Arch>(codes, i0, rows, size1, bits, packed);
    });
    if (token == token_axis::axis1)
        for (int j = 0; j < size1; j += block)
            pass::norm_ratio(v::load(m.product + j), v::load(m.square + j)).store(m.s1 + j);

    p.scale_rows(tile, size0, true);
    for (int i = size0; i < simd::whole_lanes(size0); ++i) m.scale[i] = m.zero[i] = 0.0f;
    const bool scales = pass::finish(m.scale, size0, m.lift, unit.fold), zeros = pass::finish(m.zero, size0, m.lift, unit.fold);
    return pass::finish(m.s1, size1, nullptr, unit.inverse_fold) && scales && zeros;
}

}  // namespace kvarn::detail
