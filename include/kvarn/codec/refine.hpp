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
    using one = simd::kernels<simd::portable>;
    static constexpr int block = simd::lane_count;
    static constexpr float magic = 12582912.0f;  // 1.5 * 2^23: adding and subtracting it rounds to an integer

    const float* tile;
    std::ptrdiff_t stride;
    int size1, padded1;
    float levels;  // the largest code
    refine_memory m;
    tile_unit unit;
    float total_weight = 0.0f;

    /// The code of x' = x - origin as a float: round_half_even(x' * inverse + offset), clamped.
    template <class V>
    KVARN_INLINE V code_of(const V& x, const V& inverse, const V& offset) const noexcept
    {
        const V y = minimum(maximum(fma(x, inverse, offset), V::broadcast(0.0f)), V::broadcast(levels));
        return sub(add(y, V::broadcast(magic)), V::broadcast(magic));
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
        for (int i = 0; i < size0; ++i) m.lift[i] = lift_by(binade(s0[i]) - most0);
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

    KVARN_INLINE float middle(int i) const noexcept { return one::fma(m.scale[i], 0.5f * levels, m.zero[i]); }

    /// x' = x - origin of row `row` to place i of the block.
    KVARN_INLINE void centre(int row, int i, float origin) const noexcept
    {
        const float* const values = tile + row * stride;
        float* const x = m.x + i * padded1;
        const v minus = v::broadcast(-origin);
        for (int j = 0; j < padded1; j += block) fma(v::load(values + j), v::load(m.reciprocal + j), minus).store(x + j);
    }

    /// Squared errors, in code units, of Count clip ranges that start at number `first`.
    template <int Count>
    KVARN_INLINE void clip_errors(const float* x, float half_range, int first, float* error) const noexcept
    {
        part inverse[Count];
        for (int c = 0; c < Count; ++c) inverse[c] = part::broadcast(one::div(0.5f * levels, one::mul(half_range, clip(first + c))));
        const part offset = part::broadcast(0.5f * levels), zero = part::broadcast(0.0f), most = part::broadcast(levels);
        v sums[Count];
        simd::sum_in_parts<Arch>(sums, [&](part (&sum)[Count], int first_lane) KVARN_LAMBDA {
            for (int c = 0; c < Count; ++c) sum[c] = zero;
            for (int j = first_lane; j < padded1; j += block) {
                const part value = part::load(x + j), weight = part::load(m.weight + j);
                KVARN_UNROLL
                for (int c = 0; c < Count; ++c) {
                    const part y = fma(value, inverse[c], offset);
                    const part code = sub(add(minimum(maximum(y, zero), most), part::broadcast(magic)), part::broadcast(magic));
                    const part e = sub(y, code);
                    sum[c] = fma(mul(e, weight), e, sum[c]);
                }
            }
        });
        for (int c = 0; c < Count; ++c) error[c] = reduce_add(sums[c]);
    }

    /// The share of the range that candidate number `i` keeps.
    KVARN_INLINE static float clip(int i) noexcept { return one::fma(-0.1f, static_cast<float>(i), 1.0f); }

    /// Row `row`: minimum and maximum of x, then the clip range of least squared error. Leaves x' about the middle, which it returns, at
    /// place i of the block.
    KVARN_NOINLINE float search(int row, int i, int clip_steps, float floor) const noexcept
    {
        const float* const values = tile + row * stride;
        float* const x = m.x + i * padded1;
        v least = mul(v::load(values), v::load(m.reciprocal)), most = least;
        for (int j = block; j < padded1; j += block) {
            const v value = mul(v::load(values + j), v::load(m.reciprocal + j));
            least = minimum(least, value);
            most = maximum(most, value);
        }
        const float low = reduce_min(least), high = reduce_max(most);
        const float origin = one::fma(one::sub(high, low), 0.5f, low);
        centre(row, i, origin);
        const float half_range = one::maximum(one::mul(one::sub(high, low), 0.5f), one::mul(floor, 0.5f * levels));
        int best = 0;
        float least_error = 0;
        for (int c = 0; c <= clip_steps; c += 3) {
            float error[3];
            clip_errors<3>(x, half_range, c, error);
            for (int n = 0; n < 3 && c + n <= clip_steps; ++n) {
                const float e = one::mul(one::mul(error[n], clip(c + n)), clip(c + n));  // code units to those of x
                if (c + n == 0 || e < least_error) {
                    least_error = e;
                    best = c + n;
                }
            }
        }
        const float kept = one::mul(half_range, clip(best));
        m.scale[row] = one::div(kept, 0.5f * levels);
        m.zero[row] = one::sub(origin, kept);
        return origin;
    }

    /// Rounds x' = x - origin of row `row`, taken from place i of the block (Staged) or from the tile, and fits scale and zero to the codes
    /// by weighted least squares. A scale that would not be positive stays as it is. Leaves the codes in the block. With Unbiased the
    /// scale is then widened about the mean, from cov(c, x) / var(c) to var(x) / cov(c, x), and takes its half precision: least squares
    /// pull values towards the channel's mean, and with them the differences between tokens that attention scores tell apart.
    template <bool Staged, bool Unbiased>
    KVARN_NOINLINE void fit(int row, int i, float origin) const noexcept
    {
        const float* const x = Staged ? m.x + i * padded1 : tile + row * stride;
        float* const codes = m.codes + i * padded1;
        float& scale = m.scale[row];
        float& zero = m.zero[row];
        const float inverse = one::div(1.0f, scale);
        const part by = part::broadcast(inverse), offset = part::broadcast(one::mul(one::sub(origin, zero), inverse));
        const part minus_origin = part::broadcast(-origin);
        v sums[Unbiased ? 5 : 4];
        const auto &sum_c = sums[0], &sum_cc = sums[1], &sum_cx = sums[2], &sum_x = sums[3], &sum_xx = sums[Unbiased ? 4 : 0];
        simd::sum_in_parts<Arch>(sums, [&](part (&sum)[Unbiased ? 5 : 4], int e) KVARN_LAMBDA {
            KVARN_UNROLL
            for (part& all : sum) all = part::broadcast(0.0f);
            for (int j = e; j < padded1; j += block) {
                const part value = Staged ? part::load(x + j) : fma(part::load(x + j), part::load(m.reciprocal + j), minus_origin);
                const part weight = part::load(m.weight + j), code = code_of(value, by, offset), weighted = mul(code, weight);
                code.store(codes + j);
                sum[0] = add(sum[0], weighted);
                sum[1] = fma(weighted, code, sum[1]);
                sum[2] = fma(weighted, value, sum[2]);
                sum[3] = fma(weight, value, sum[3]);
                if constexpr (Unbiased) sum[4] = fma(mul(weight, value), value, sum[4]);
            }
        });
        const float c = reduce_add(sum_c), s = reduce_add(sum_x), cc = reduce_add(sum_cc);
        const float mean_code = one::div(c, total_weight), mean = one::div(s, total_weight);
        const float variance = one::fnma(mean_code, c, cc), covariance = one::fnma(mean_code, s, reduce_add(sum_cx));
        if (variance > one::mul(cc, least_variance)) {
            const float fitted = one::div(covariance, variance);
            if (fitted > least_scale) {
                scale = fitted;
                if constexpr (Unbiased) {
                    const float widened = one::div(one::fnma(mean, s, reduce_add(sum_xx)), covariance);
                    scale = one::minimum(one::maximum(widened, fitted), one::mul(2.0f, fitted));
                }
            }
        }
        if constexpr (Unbiased) scale = as_scalar0(row, scale);
        zero = one::add(origin, one::fnma(scale, mean_code, mean));
    }

    /// Codes of row `row` for its present scale and zero, to the block.
    KVARN_NOINLINE void round(int row, int i, float origin) const noexcept
    {
        const float* const x = m.x + i * padded1;
        float* const codes = m.codes + i * padded1;
        const float inverse = one::div(1.0f, m.scale[row]);
        const v by = v::broadcast(inverse), offset = v::broadcast(one::mul(one::sub(origin, m.zero[row]), inverse));
        for (int j = 0; j < padded1; j += block) code_of<v>(v::load(x + j), by, offset).store(codes + j);
    }

    /// Adds rows [i0, i0 + rows) to the sums along axis 0, y = code * scale + zero: y^2, and tile * y or, with Norms, tile^2.
    template <bool Norms>
    KVARN_NOINLINE void add_columns(int i0, int rows) const noexcept
    {
        for (int j = 0; j < padded1; j += part::count) {
            part product = part::broadcast(0.0f), square = product;
            if (i0 != 0) product = part::load(m.product + j), square = part::load(m.square + j);
            for (int i = 0; i < rows; ++i) {
                const part value = part::load(tile + (i0 + i) * stride + j);
                const part y = fma(part::load(m.codes + i * padded1 + j), part::broadcast(m.scale[i0 + i]), part::broadcast(m.zero[i0 + i]));
                product = fma(value, Norms ? value : y, product);
                square = fma(y, y, square);
            }
            product.store(m.product + j);
            square.store(m.square + j);
        }
    }

    /// Moves s1 `step` times the way to the least-squares fit of the tile on y, and keeps it positive.
    KVARN_NOINLINE void refit_factors(float step) noexcept
    {
        for (int j = 0; j < size1; ++j) {
            if (!(m.square[j] > 0.0f)) continue;
            const float way = one::sub(one::div(m.product[j], m.square[j]), m.s1[j]);
            m.s1[j] = one::maximum(one::fma(step, way, m.s1[j]), least_factor * unit.unit);
        }
        take_factors();
    }

    /// ||exact|| / ||decoded|| from their squares; 1 where nothing was decoded.
    KVARN_INLINE static float norm_ratio(float exact, float decoded) noexcept
    {
        return decoded > 0.0f ? one::sqrt(one::div(exact, decoded)) : 1.0f;
    }

    /// A scalar in the precision that the record will have it in.
    KVARN_INLINE float as_scalar0(int row, float x) const noexcept
    {
        const float factor = unit.fold * m.lift[row];  // powers of two
        return to_float(to_half(x * factor)) * one::div(1.0f, factor);
    }
    KVARN_INLINE float as_scalar1(float x) const noexcept { return to_float(to_half(x * unit.inverse_fold)) * unit.fold; }

    /// The codes of place i of the block as bytes.
    KVARN_INLINE void store_codes(int i, std::uint8_t* to) const noexcept
    {
        const float* const codes = m.codes + i * padded1;
        for (int j = 0; j < padded1; j += block) k::store_codes(to + j, v(v::load(codes + j)).r, k::broadcast(1.0f));
    }

    /// V: multiplies scale and zero of row `row` so that its decoded norm is the exact one.
    KVARN_NOINLINE void keep_row_norm(int row, int i) const noexcept
    {
        const float* const values = tile + row * stride;
        const v scale = v::broadcast(m.scale[row]), zero = v::broadcast(m.zero[row]);
        v exact = v::broadcast(0.0f), decoded = exact;
        for (int j = 0; j < padded1; j += block) {
            const v y = fma(v::load(m.codes + i * padded1 + j), scale, zero), value = v::load(values + j);
            exact = fma(mul(value, v::load(m.share + j)), value, exact);
            decoded = fma(mul(y, v::load(m.weight + j)), y, decoded);
        }
        const float ratio = norm_ratio(reduce_add(exact), reduce_add(decoded));
        m.scale[row] = one::mul(m.scale[row], ratio);
        m.zero[row] = one::mul(m.zero[row], ratio);
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
    using one = typename pass::one;
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

    for_blocks([&](int i0, int rows) {
        float origin[block];
        const auto pad = [&](int i, float value) {
            for (int j = size1; j < padded1; ++j) tile[(i0 + i) * stride + j] = value;
        };
        // For minimum and maximum padding repeats column 0; otherwise it is zero, for the norms.
        for (int i = 0; i < rows; ++i) pad(i, tile[(i0 + i) * stride]);
        for (int i = 0; i < rows; ++i) origin[i] = p.search(i0 + i, i, clip_steps, one::mul(one::div(s0[i0 + i], m.lift[i0 + i]), 1e-10f));
        for (int n = 0; n < fits_after_search; ++n)
            for (int i = 0; i < rows; ++i) p.template fit<true, false>(i0 + i, i, origin[i]);
        for (int i = 0; i < rows; ++i) p.round(i0 + i, i, origin[i]);
        for (int i = 0; i < rows; ++i) pad(i, 0.0f);
        p.template add_columns<false>(i0, rows);
    });
    for (int n = 1; n < rounds; ++n) {
        p.refit_factors(refit_step);
        for_blocks([&](int i0, int rows) {
            for (int i = 0; i < rows; ++i) p.template fit<false, false>(i0 + i, i, p.middle(i0 + i));
            p.template add_columns<false>(i0, rows);
        });
    }
    if (rounds > 0) p.refit_factors(1.0f);
    if (token == token_axis::axis0) {
        for (int j = 0; j < size1; ++j) m.s1[j] = p.as_scalar1(m.s1[j]);
        p.take_factors();
    }

    float plus_zero = 0.0f;
    KVARN_PIN(plus_zero);  // -0 becomes +0, even with -fno-signed-zeros
    alignas(64) std::uint8_t codes[simd::lane_count * max_head_dim + simd::lane_count];
    for_blocks([&](int i0, int rows) {
        for (int i = 0; i < rows; ++i) {
            if (token == token_axis::axis1) {
                p.template fit<false, true>(i0 + i, i, p.middle(i0 + i));
                m.zero[i0 + i] = p.as_scalar0(i0 + i, m.zero[i0 + i]);
            } else {
                p.template fit<false, false>(i0 + i, i, p.middle(i0 + i));
                p.keep_row_norm(i0 + i, i);
            }
            m.zero[i0 + i] = one::add(m.zero[i0 + i], plus_zero);
            p.store_codes(i, codes + i * size1);  // may run over into the next row's codes, which come later
        }
        if (token == token_axis::axis1) p.template add_columns<true>(i0, rows);
        pack_rows<Arch>(codes, i0, rows, size1, bits, packed);
    });
    if (token == token_axis::axis1)
        for (int j = 0; j < size1; ++j) m.s1[j] = pass::norm_ratio(m.product[j], m.square[j]);

    p.scale_rows(tile, size0, true);
    for (int i = 0; i < size0; ++i) {
        m.scale[i] *= m.lift[i];
        m.zero[i] *= m.lift[i];
    }
    bool fit = true;
    const auto finish = [&](float* scalars, int n, float factor) {
        for (int i = 0; i < n; ++i) {
            scalars[i] *= factor;
            fit = fit && scalars[i] < half_overflow && -scalars[i] < half_overflow;
        }
    };
    finish(m.scale, size0, unit.fold);
    finish(m.zero, size0, unit.fold);
    finish(m.s1, size1, unit.inverse_fold);
    return fit;
}

}  // namespace kvarn::detail
