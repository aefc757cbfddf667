// SPDX-License-Identifier: Apache-2.0
#pragma once
// The rotation y = H x / sqrt(head_dim) along channels and its inverse (paper section 4.1, format.md section 2).
// In: vectors of float, half or bfloat16. Out: float, or the input in place. float arithmetic, one fixed order of additions.
// No allocation; a few dozen KiB of stack. Thread safe.
//
// head_dim = outer * inner. Along the inner index, a power of two, runs the Walsh-Hadamard butterfly with spans 1, 2, 4, ...;
// along the outer one (12, 20, 28, 36) the sum of paley.hpp. The same code transforms "units" of one register: consecutive
// pieces of a vector, or, for a transposed block, one channel of several tokens.

#include <cmath>
#include <cstddef>

#include <kvarn/base/extent.hpp>
#include <kvarn/base/view.hpp>
#include <kvarn/layout/format.hpp>
#include <kvarn/rotate/paley.hpp>
#include <kvarn/simd/environment.hpp>
#include <kvarn/simd/lanes.hpp>

namespace kvarn {

/// Rotates every vector of `x` in place: x <- H x / sqrt(d), d = x.channels. For queries, so that scores against rotated keys
/// survive: <q, k> = <Hq, Hk>. Errors: null_pointer, unsupported_head_dim. Zero tokens or heads are fine.
template <class Arch = simd::native_arch, element T>
[[nodiscard]] status rotate(kv_view<T> x) noexcept;

/// The inverse, in place: x <- transpose(H) x / sqrt(d). For attention outputs computed in the rotated basis.
template <class Arch = simd::native_arch, element T>
[[nodiscard]] status unrotate(kv_view<T> x) noexcept;

namespace detail {

enum class direction { forward, inverse };

/// 1 / sqrt(n), rounded to float once.
KVARN_INLINE float hadamard_scale(int n) noexcept { return static_cast<float>(1.0 / std::sqrt(static_cast<double>(n))); }

/// Butterfly levels across R registers: spans 1, 2, ..., R / 2, those below `limit` only.
template <class Arch, int R>
KVARN_INLINE void cross_butterflies(typename simd::kernels<Arch>::reg (&v)[R], int limit = R) noexcept
{
    using k = simd::kernels<Arch>;
    KVARN_UNROLL
    for (int h = 1; h < R; h *= 2) {
        const bool level = h < limit;
        KVARN_UNROLL
        for (int i = 0; i < R; ++i)
            if (level && !(i & h)) {
                const auto a = v[i], b = v[i + h];
                v[i] = k::add(a, b);
                v[i + h] = k::sub(a, b);
            }
    }
}

/// A row of registers in memory: register u lies at data[u * stride].
template <class T>
struct unit_row {
    T* data;
    std::ptrdiff_t stride;

    KVARN_INLINE T* at(int u) const noexcept { return data + u * stride; }
};

/// log2(R) butterfly levels, spans `span`, 2 span, ..., over `units` registers; times `scale` if Last. `to` may be `x`.
template <class Arch, int R, bool Last, class T>
KVARN_INLINE void radix_pass(unit_row<float> x, unit_row<T> to, int units, int span, typename simd::kernels<Arch>::reg scale) noexcept
{
    using k = simd::kernels<Arch>;
    for (int block = 0; block < units; block += R * span)
        for (int j = block; j < block + span; ++j) {
            typename k::reg v[R];
            KVARN_UNROLL
            for (int i = 0; i < R; ++i) v[i] = k::load(x.at(j + i * span));
            cross_butterflies<Arch, R>(v);
            KVARN_UNROLL
            for (int i = 0; i < R; ++i) k::store(to.at(j + i * span), Last ? k::mul(v[i], scale) : v[i]);
        }
}

/// How many registers the next pass joins, when 2^levels remain.
[[nodiscard]] KVARN_INLINE constexpr int next_radix(int left) noexcept { return left == 2 ? 2 : left == 8 || left >= 32 ? 8 : 4; }

/// Levels with spans `span` .. inner / 2 (in units), a few at a time, in place. If Finish, the last pass multiplies by `factor`
/// and stores to `to` (nothing happens when no level is left).
template <class Arch, bool Finish, class T>
KVARN_INLINE void inner_levels(unit_row<float> x, unit_row<T> to, int units, int inner, int span, float factor) noexcept
{
    const auto scale = simd::kernels<Arch>::broadcast(factor);
    const auto pass = [&](auto radix) KVARN_LAMBDA {
        if (Finish && span * radix() == inner) radix_pass<Arch, radix(), true>(x, to, units, span, scale);
        else radix_pass<Arch, radix(), false>(x, x, units, span, scale);
        span *= radix();
    };
    while (span < inner) {
        const int radix = next_radix(inner / span);
        if (radix == 2) pass(std::integral_constant<int, 2>{});
        else if (radix == 8) pass(std::integral_constant<int, 8>{});
        else pass(std::integral_constant<int, 4>{});
    }
}

/// All of inner_levels, Finish, for sizes known at compile time: the passes follow each other without a loop.
template <class Arch, int Inner, int Span, class T>
KVARN_INLINE void constant_levels(unit_row<float> x, unit_row<T> to, float factor) noexcept
{
    if constexpr (Span < Inner) {
        constexpr int radix = next_radix(Inner / Span);
        const auto scale = simd::kernels<Arch>::broadcast(factor);
        if constexpr (Span * radix == Inner) {
            radix_pass<Arch, radix, true>(x, to, Inner, Span, scale);
        } else {
            radix_pass<Arch, radix, false>(x, x, Inner, Span, scale);
            constant_levels<Arch, Inner, Span * radix>(x, to, factor);
        }
    }
}

/// The outer transform of order M over the units l * inner + j, l < M, for each j < inner; times `factor`. `to` may be `x`.
template <class Arch, int M, direction Direction, class T>
KVARN_NOINLINE void outer_transform(unit_row<float> x, unit_row<T> to, int inner, float factor) noexcept
{
    using k = simd::kernels<Arch>;
    constexpr const auto& table = paley_table<M, Direction == direction::inverse>;
    const auto scale = k::broadcast(factor);
    float combinations[M / 4][8][k::width];
    for (int j = 0; j < inner; ++j) {
        const auto at = [&](int l) KVARN_LAMBDA { return x.at(l * inner + j); };
        for (int g = 0; g < M / 4; ++g) {
            const auto a = k::load(at(4 * g)), b = k::load(at(4 * g + 1)), c = k::load(at(4 * g + 2)), d = k::load(at(4 * g + 3));
            const auto first_sum = k::add(a, b), first_difference = k::sub(a, b);
            const auto second_sum = k::add(c, d), second_difference = k::sub(c, d);
            k::store(combinations[g][0], k::add(first_sum, second_sum));
            k::store(combinations[g][1], k::sub(first_sum, second_sum));
            k::store(combinations[g][2], k::add(first_sum, second_difference));
            k::store(combinations[g][3], k::sub(first_sum, second_difference));
            k::store(combinations[g][4], k::add(first_difference, second_sum));
            k::store(combinations[g][5], k::sub(first_difference, second_sum));
            k::store(combinations[g][6], k::add(first_difference, second_difference));
            k::store(combinations[g][7], k::sub(first_difference, second_difference));
        }
        for (int i = 0; i < M; ++i) {
            auto sum = k::mul(k::load(combinations[0][table.at[i][0].index]), k::broadcast(table.at[i][0].sign));
            KVARN_UNROLL
            for (int g = 1; g < M / 4; ++g)  // the products with +-1 are exact: this is addition or subtraction
                sum = k::fma(k::load(combinations[g][table.at[i][g].index]), k::broadcast(table.at[i][g].sign), sum);
            k::store(to.at(i * inner + j), k::mul(sum, scale));
        }
    }
}

/// What remains of the transform after the levels below `span`, of `outer * inner` registers, from `x` (overwritten) to `to`.
template <class Arch, direction Direction, class T>
KVARN_INLINE void finish_transform(unit_row<float> x, unit_row<T> to, int outer, int inner, int span, float scale) noexcept
{
    if (outer == 1) return inner_levels<Arch, true>(x, to, inner, inner, span, scale);
    inner_levels<Arch, false>(x, x, outer * inner, inner, span, scale);
    switch (outer) {
    case 12: return outer_transform<Arch, 12, Direction>(x, to, inner, scale);
    case 20: return outer_transform<Arch, 20, Direction>(x, to, inner, scale);
    case 28: return outer_transform<Arch, 28, Direction>(x, to, inner, scale);
    case 36: return outer_transform<Arch, 36, Direction>(x, to, inner, scale);
    default: return;
    }
}

/// All levels inside a register, then those across Registers registers.
template <class Arch, int Registers>
KVARN_INLINE void butterflies(typename simd::kernels<Arch>::reg (&v)[Registers]) noexcept
{
    using k = simd::kernels<Arch>;
    KVARN_UNROLL
    for (int i = 0; i < Registers; ++i) {
        if constexpr (k::width > 1) v[i] = k::template butterfly<1>(v[i]);
        if constexpr (k::width > 2) v[i] = k::template butterfly<2>(v[i]);
        if constexpr (k::width > 4) v[i] = k::template butterfly<4>(v[i]);
        if constexpr (k::width > 8) v[i] = k::template butterfly<8>(v[i]);
    }
    cross_butterflies<Arch, Registers>(v);
}

/// One vector, in blocks of Registers registers, then across blocks in memory. load(d) gives channels d .. d + width;
/// `work` is room for the vector and may be `out` if that is float.
template <class Arch, direction Direction, int Registers, class Load, class T, class Dim>
KVARN_INLINE void transform_blocks(Load&& load, float* work, T* out, Dim dim, const hadamard_factors& factors) noexcept
{
    using k = simd::kernels<Arch>;
    constexpr int block = Registers * k::width;
    const float factor = hadamard_scale(dim);
    const auto scale = k::broadcast(factor);
    for (int d = 0; d < dim; d += block) {
        typename k::reg v[Registers];
        KVARN_UNROLL
        for (int i = 0; i < Registers; ++i) v[i] = load(d + i * k::width);
        butterflies<Arch, Registers>(v);
        KVARN_UNROLL
        for (int i = 0; i < Registers; ++i) {
            if (dim == block) k::store(out + d + i * k::width, k::mul(v[i], scale));
            else k::store(work + d + i * k::width, v[i]);
        }
    }
    const unit_row<float> units{work, k::width};
    const unit_row<T> to{out, k::width};
    if constexpr (is_constant_extent<Dim>) constant_levels<Arch, Dim::value / k::width, Registers>(units, to, factor);
    else finish_transform<Arch, Direction>(units, to, factors.outer, factors.inner / k::width, Registers, factor);
}

/// Whether transform_vector can take vectors of this size: their contiguous butterflies fill a register.
template <class Arch>
KVARN_INLINE constexpr bool is_vector_transform(int dim) noexcept
{
    return factor_head_dim(dim).inner % simd::kernels<Arch>::width == 0;
}

/// One vector of any size that is_vector_transform allows.
template <class Arch, direction Direction, class Load, class T, class Dim>
KVARN_INLINE void transform_vector(Load&& load, float* work, T* out, Dim dim) noexcept
{
    constexpr int width = simd::kernels<Arch>::width;
    if constexpr (is_constant_extent<Dim>) {
        constexpr hadamard_factors factors = factor_head_dim(Dim::value);
        static_assert(factors.outer == 1);
        constexpr int registers = factors.inner / width < 8 ? factors.inner / width : 8;
        transform_blocks<Arch, Direction, registers>(load, work, out, dim, factors);
    } else {
        const hadamard_factors factors = factor_head_dim(dim);
        const int registers = factors.inner / width;
        if (registers >= 8) transform_blocks<Arch, Direction, 8>(load, work, out, dim, factors);
        else if (registers == 4) transform_blocks<Arch, Direction, 4>(load, work, out, dim, factors);
        else if (registers == 2) transform_blocks<Arch, Direction, 2>(load, work, out, dim, factors);
        else transform_blocks<Arch, Direction, 1>(load, work, out, dim, factors);
    }
}

/// Loads the width x width block of channels [d, d + width) of `rows` tokens, transposed: register c holds channel d + c of
/// the tokens, one a lane. Channels beyond `dim` and tokens beyond `rows` read as zero.
template <class Arch, class T>
KVARN_INLINE void load_transposed(const T* tokens, std::ptrdiff_t token_stride, int rows, int d, int dim,
                                  typename simd::kernels<Arch>::reg (&x)[simd::kernels<Arch>::width]) noexcept
{
    using k = simd::kernels<Arch>;
    if (d + k::width <= dim && rows == k::width) {
        KVARN_UNROLL
        for (int j = 0; j < k::width; ++j) x[j] = k::load(tokens + j * token_stride + d);
    } else {
        using scalar = simd::kernels<simd::portable>;
        float padded[k::width] = {};
        for (int j = 0; j < k::width; ++j) {
            for (int c = 0; c < k::width; ++c)
                padded[c] = j < rows && d + c < dim ? scalar::load(tokens + j * token_stride + d + c) : 0.0f;
            x[j] = k::load(padded);
        }
    }
    k::transpose(x);
}

/// Stores a block of load_transposed back as rows of tokens, as many as there are.
template <class Arch>
KVARN_INLINE void store_transposed(float* tokens, std::ptrdiff_t token_stride, int rows, int d, int dim,
                                   typename simd::kernels<Arch>::reg (&x)[simd::kernels<Arch>::width]) noexcept
{
    using k = simd::kernels<Arch>;
    k::transpose(x);
    if (d + k::width <= dim && rows == k::width) {
        KVARN_UNROLL
        for (int j = 0; j < k::width; ++j) k::store(tokens + j * token_stride + d, x[j]);
    } else {
        float padded[k::width];
        for (int j = 0; j < rows; ++j) {
            k::store(padded, x[j]);
            for (int c = 0; c < k::width && d + c < dim; ++c)
                simd::kernels<simd::portable>::store(tokens + j * token_stride + d + c, padded[c]);
        }
    }
}

/// finish_transform in place, compiled once for all sizes known only at run time.
template <class Arch, direction Direction>
KVARN_NOINLINE void finish_any_transform(unit_row<float> x, hadamard_factors factors, int span, float scale) noexcept
{
    finish_transform<Arch, Direction>(x, x, factors.outer, factors.inner, span, scale);
}

/// Transposes `rows` <= width tokens of `dim` channels to out[channel * stride], and rotates them on the way if asked.
template <class Arch, direction Direction, class T, class Dim>
KVARN_INLINE void transform_transposed(const T* tokens, std::ptrdiff_t token_stride, int rows, bool rotate, float* out,
                                       std::ptrdiff_t stride, Dim dim) noexcept
{
    using k = simd::kernels<Arch>;
    const hadamard_factors factors = rotate ? factor_head_dim(dim) : hadamard_factors{1, 1};
    for (int d = 0; d < dim; d += k::width) {
        typename k::reg x[k::width];
        load_transposed<Arch>(tokens, token_stride, rows, d, dim, x);
        cross_butterflies<Arch, k::width>(x, factors.inner);
        KVARN_UNROLL
        for (int c = 0; c < k::width; ++c)
            if (d + c < dim) k::store(out + (d + c) * stride, x[c]);
    }
    if (!rotate) return;
    const unit_row<float> units{out, stride};
    if constexpr (is_constant_extent<Dim>)
        constant_levels<Arch, Dim::value, k::width>(units, units, hadamard_scale(dim));
    else
        finish_any_transform<Arch, Direction>(units, factors, factors.inner < k::width ? factors.inner : k::width, hadamard_scale(dim));
}

/// Rotates `rows` vectors of any size in place, channels contiguous. Compiled once for all sizes known only at run time.
template <class Arch, direction Direction>
KVARN_NOINLINE void transform_any_rows(float* x, std::ptrdiff_t stride, int rows, int dim) noexcept
{
    using k = simd::kernels<Arch>;
    if (is_vector_transform<Arch>(dim)) {
        for (int t = 0; t < rows; ++t) {
            float* const row = x + t * stride;
            transform_vector<Arch, Direction>([&](int d) KVARN_LAMBDA { return k::load(row + d); }, row, row, dim);
        }
        return;
    }
    float block[max_head_dim * k::width];  // too few contiguous channels for a register: several tokens side by side
    for (int t = 0; t < rows; t += k::width) {
        const int some = rows - t < k::width ? rows - t : k::width;
        transform_transposed<Arch, Direction>(static_cast<const float*>(x + t * stride), stride, some, true, block, k::width, dim);
        for (int d = 0; d < dim; d += k::width) {
            typename k::reg v[k::width];
            KVARN_UNROLL
            for (int c = 0; c < k::width; ++c) v[c] = d + c < dim ? k::load(block + (d + c) * k::width) : k::broadcast(0.0f);
            store_transposed<Arch>(x + t * stride, stride, some, d, dim, v);
        }
    }
}

/// One vector of any channel stride to contiguous floats.
template <class Arch, class T>
KVARN_INLINE void load_row(const T* in, std::ptrdiff_t stride, int dim, float* out) noexcept
{
    using k = simd::kernels<Arch>;
    int d = 0;
    if (stride == 1)
        for (; d + k::width <= dim; d += k::width) k::store(out + d, k::load(in + d));
    for (; d < dim; ++d) out[d] = simd::kernels<simd::portable>::load(in + d * stride);
}

/// Contiguous floats to one vector of any channel stride.
template <class Arch, class T>
KVARN_INLINE void store_row(const float* in, int dim, T* out, std::ptrdiff_t stride) noexcept
{
    using k = simd::kernels<Arch>;
    int d = 0;
    if (stride == 1)
        for (; d + k::width <= dim; d += k::width) k::store(out + d, k::load(in + d));
    for (; d < dim; ++d) simd::kernels<simd::portable>::store(out + d * stride, in[d]);
}

/// Rotates the tokens of one head in place. Common sizes go straight from and to T, all others through rows of floats.
template <class Arch, direction Direction, class T, class Dim>
KVARN_NOINLINE void transform_tokens(T* data, std::ptrdiff_t token_stride, std::ptrdiff_t channel_stride, std::size_t tokens, Dim dim) noexcept
{
    using k = simd::kernels<Arch>;
    constexpr int block = 16;
    float rows[block * max_head_dim];
    for (std::size_t t = 0; t < tokens; t += block) {
        const int some = static_cast<int>(tokens - t < block ? tokens - t : block);
        T* const at = data + static_cast<std::ptrdiff_t>(t) * token_stride;
        if constexpr (is_constant_extent<Dim>) {
            if (channel_stride == 1) {
                for (int i = 0; i < some; ++i) {
                    T* const token = at + i * token_stride;
                    transform_vector<Arch, Direction>([&](int d) KVARN_LAMBDA { return k::load(token + d); }, rows,
                                                      token, dim);
                }
                continue;
            }
        }
        for (int i = 0; i < some; ++i) load_row<Arch>(at + i * token_stride, channel_stride, dim, rows + i * dim);
        transform_any_rows<Arch, Direction>(rows, dim, some, dim);
        for (int i = 0; i < some; ++i) store_row<Arch>(rows + i * dim, dim, at + i * token_stride, channel_stride);
    }
}

template <class Arch, direction Direction, element T>
status transform_view(kv_view<T> x) noexcept
{
    static_assert(!std::is_const_v<T>, "rotation works in place: the view must be writable");
    using storage = storage_t<T>;
    if (x.channels < static_cast<std::size_t>(min_head_dim) || x.channels > static_cast<std::size_t>(max_head_dim) ||
        factor_head_dim(static_cast<int>(x.channels)).outer == 0)
        return status::unsupported_head_dim;
    if (x.tokens == 0 || x.heads == 0) return status::ok;
    if (x.data == nullptr) return status::null_pointer;
    const simd::float_environment guard;
    with_extent(static_cast<int>(x.channels), [&](auto dim) {
        for (std::size_t h = 0; h < x.heads; ++h)
            transform_tokens<Arch, Direction>(reinterpret_cast<storage*>(x.at(0, h)), x.token_stride, x.channel_stride,
                                                x.tokens, dim);
    });
    return status::ok;
}

}  // namespace detail

template <class Arch, element T>
status rotate(kv_view<T> x) noexcept
{
    return detail::transform_view<Arch, detail::direction::forward>(x);
}

template <class Arch, element T>
status unrotate(kv_view<T> x) noexcept
{
    return detail::transform_view<Arch, detail::direction::inverse>(x);
}

}  // namespace kvarn
