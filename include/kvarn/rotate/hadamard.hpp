// SPDX-License-Identifier: Apache-2.0
#pragma once
// The rotation y = H x / sqrt(head_dim) along channels and its inverse (paper section 4.1).
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

/// Levels with spans `span` .. inner / 2 (in units), a few at a time, in place. If `finish`, the last pass multiplies by `factor`
/// (nothing happens when no level is left).
template <class Arch>
KVARN_INLINE void inner_levels(unit_row<float> x, int units, int inner, int span, bool finish, float factor) noexcept
{
    const auto scale = simd::kernels<Arch>::broadcast(factor);
    const auto pass = [&](auto radix) KVARN_LAMBDA {
        if (finish && span * radix() == inner) radix_pass<Arch, radix(), true>(x, x, units, span, scale);
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

/// All of inner_levels, finish, for sizes known at compile time: the passes follow each other without a loop. `to` may be `x`.
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

/// The outer transform of order M over the units l * inner + j, l < M, for each j < inner, in place; times `factor`.
template <class Arch, int M, bool Transposed>
KVARN_NOINLINE void outer_transform(unit_row<float> x, int inner, float factor) noexcept
{
    using k = simd::kernels<Arch>;
    constexpr const auto& table = paley_table<M, Transposed>;
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
            k::store(x.at(i * inner + j), k::mul(sum, scale));
        }
    }
}

/// What remains of the transforms of `rows` rows, of factors.outer * factors.inner units each, after the levels below `span`.
template <class Arch>
KVARN_NOINLINE void finish_rows(unit_row<float> x, std::ptrdiff_t row_stride, int rows, hadamard_factors factors, int span, float scale,
                                direction to) noexcept
{
    const auto outer = [&](auto m) KVARN_LAMBDA {
        if (is_paley_symmetric(m()) || to == direction::forward) outer_transform<Arch, m(), false>(x, factors.inner, scale);
        else outer_transform<Arch, m(), !is_paley_symmetric(m())>(x, factors.inner, scale);
    };
    for (int row = 0; row < rows; ++row, x.data += row_stride) {
        inner_levels<Arch>(x, factors.outer * factors.inner, factors.inner, span, factors.outer == 1, scale);
        switch (factors.outer) {
        case 12: outer(std::integral_constant<int, 12>{}); break;
        case 20: outer(std::integral_constant<int, 20>{}); break;
        case 28: outer(std::integral_constant<int, 28>{}); break;
        case 36: outer(std::integral_constant<int, 36>{}); break;
        default: break;
        }
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

/// The levels inside blocks of Registers registers of one vector. load(d) gives channels d .. d + width. A vector of one block is
/// finished: it goes to `out`, times `factor`; others go to `work`.
template <class Arch, int Registers, class Load, class T, class Dim>
KVARN_INLINE void transform_blocks(Load&& load, float* work, T* out, Dim dim, float factor) noexcept
{
    using k = simd::kernels<Arch>;
    constexpr int block = Registers * k::width;
    const auto scale = k::broadcast(factor);
    for (int d = 0; d < dim; d += block) {
        typename k::reg v[Registers];
        KVARN_UNROLL
        for (int i = 0; i < Registers; ++i) v[i] = load(d + i * k::width);
        butterflies<Arch, Registers>(v);
        if (dim == block) {
            KVARN_UNROLL
            for (int i = 0; i < Registers; ++i) k::store(out + d + i * k::width, k::mul(v[i], scale));
        } else {
            KVARN_UNROLL
            for (int i = 0; i < Registers; ++i) k::store(work + d + i * k::width, v[i]);
        }
    }
}

/// One vector of a common size, which is a power of two: its transform is its own inverse. `work` is room for the vector and may be
/// `out` if that is float.
template <class Arch, class Load, class T, int Dim>
KVARN_INLINE void transform_vector(Load&& load, float* work, T* out, std::integral_constant<int, Dim> dim) noexcept
{
    constexpr int width = simd::kernels<Arch>::width, registers = Dim / width < 8 ? Dim / width : 8;
    static_assert(factor_head_dim(Dim).outer == 1);
    const float factor = hadamard_scale(Dim);
    transform_blocks<Arch, registers>(load, work, out, dim, factor);
    constant_levels<Arch, Dim / width, registers>(unit_row<float>{work, width}, unit_row<T>{out, width}, factor);
}

/// Loads the width x width block of channels [d, d + width) of `rows` tokens, transposed: register c holds channel d + c of
/// the tokens, one a lane. Channels beyond `dim` and tokens beyond `rows` read as zero: for the edges.
template <class Arch, class T>
KVARN_INLINE void load_transposed(const T* tokens, std::ptrdiff_t token_stride, int rows, int d, int dim,
                                  typename simd::kernels<Arch>::reg (&x)[simd::kernels<Arch>::width]) noexcept
{
    using k = simd::kernels<Arch>;
    using scalar = simd::kernels<simd::portable>;
    float padded[k::width] = {};
    for (int j = 0; j < k::width; ++j) {
        for (int c = 0; c < k::width; ++c) padded[c] = j < rows && d + c < dim ? scalar::load(tokens + j * token_stride + d + c) : 0.0f;
        x[j] = k::load(padded);
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

/// Transposes `rows` <= width tokens of `dim` channels to out[channel * stride], with the levels of spans below `limit` and width.
template <class Arch, class T>
KVARN_NOINLINE void transpose_tokens(const T* tokens, std::ptrdiff_t token_stride, int rows, int limit, float* out, std::ptrdiff_t stride,
                                     int dim) noexcept
{
    using k = simd::kernels<Arch>;
    int d = 0;
    const auto whole_blocks = [&](auto levels) KVARN_LAMBDA {
        for (; d + k::width <= dim; d += k::width, out += k::width * stride) {
            typename k::reg x[k::width];
            KVARN_UNROLL
            for (int j = 0; j < k::width; ++j) x[j] = k::load(tokens + j * token_stride + d);
            k::transpose(x);
            cross_butterflies<Arch, k::width>(x, levels);
            KVARN_UNROLL
            for (int c = 0; c < k::width; ++c) k::store(out + c * stride, x[c]);
        }
    };
    if (rows == k::width) {
        if (limit >= k::width) whole_blocks(std::integral_constant<int, k::width>{});
        else whole_blocks(limit);
    }
    for (; d < dim; d += k::width, out += k::width * stride) {
        typename k::reg x[k::width];
        load_transposed<Arch>(tokens, token_stride, rows, d, dim, x);
        cross_butterflies<Arch, k::width>(x, limit);
        const int channels = dim - d;
        KVARN_UNROLL
        for (int c = 0; c < k::width; ++c)
            if (c < channels) k::store(out + c * stride, x[c]);
    }
}

/// What remains of the transform of transposed tokens.
template <class Arch>
KVARN_NOINLINE void finish_transposed(float* x, std::ptrdiff_t stride, int dim, direction to) noexcept
{
    constexpr int width = simd::kernels<Arch>::width;
    const unit_row<float> units{x, stride};
    const float factor = hadamard_scale(dim);
    with_extent(dim, [&](auto d) KVARN_LAMBDA {
        if constexpr (is_constant_extent<decltype(d)>) {
            constant_levels<Arch, d(), width>(units, units, factor);
        } else {
            const hadamard_factors factors = factor_head_dim(d);
            finish_rows<Arch>(units, 0, 1, factors, factors.inner < width ? factors.inner : width, factor, to);
        }
    });
}

/// Transposes `rows` <= width tokens of `dim` channels to out[channel * stride], and rotates them on the way if asked.
template <class Arch, class T>
KVARN_INLINE void transform_transposed(const T* tokens, std::ptrdiff_t token_stride, int rows, bool rotate, float* out,
                                       std::ptrdiff_t stride, int dim, direction to) noexcept
{
    transpose_tokens<Arch>(tokens, token_stride, rows, rotate ? factor_head_dim(dim).inner : 1, out, stride, dim);
    if (rotate) finish_transposed<Arch>(out, stride, dim, to);
}

/// Rotates `rows` vectors of any size in place, channels contiguous. Compiled once for all sizes.
template <class Arch>
KVARN_NOINLINE void transform_any_rows(float* x, std::ptrdiff_t stride, int rows, int dim, direction to) noexcept
{
    using k = simd::kernels<Arch>;
    const hadamard_factors factors = factor_head_dim(dim);
    if (factors.inner % k::width == 0) {
        const int inner = factors.inner / k::width;
        const float factor = hadamard_scale(dim);
        const auto transform = [&](auto registers) KVARN_LAMBDA {
            constexpr int together = 16;  // rows that stay in the first-level cache
            for (int t = 0; t < rows; t += together) {
                const int some = rows - t < together ? rows - t : together;
                for (int i = t; i < t + some; ++i) {
                    float* const row = x + i * stride;
                    transform_blocks<Arch, registers()>([&](int d) KVARN_LAMBDA { return k::load(row + d); }, row, row, dim, factor);
                }
                finish_rows<Arch>({x + t * stride, k::width}, stride, some, {factors.outer, inner}, registers, factor, to);
            }
        };
        if (inner >= 8) transform(std::integral_constant<int, 8>{});
        else if (inner == 4) transform(std::integral_constant<int, 4>{});
        else if (inner == 2) transform(std::integral_constant<int, 2>{});
        else transform(std::integral_constant<int, 1>{});
        return;
    }
    float block[max_head_dim * k::width];  // too few contiguous channels for a register: several tokens side by side
    for (int t = 0; t < rows; t += k::width) {
        const int some = rows - t < k::width ? rows - t : k::width;
        transform_transposed<Arch>(static_cast<const float*>(x + t * stride), stride, some, true, block, k::width, dim, to);
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

/// Rotates tokens of a common size with contiguous channels in place, straight from and to T.
template <class Arch, class T, int Dim>
KVARN_NOINLINE void transform_contiguous(T* data, std::ptrdiff_t token_stride, std::size_t tokens, std::integral_constant<int, Dim> dim) noexcept
{
    using k = simd::kernels<Arch>;
    float work[Dim];
    for (std::size_t t = 0; t < tokens; ++t) {
        T* const token = data + static_cast<std::ptrdiff_t>(t) * token_stride;
        transform_vector<Arch>([&](int d) KVARN_LAMBDA { return k::load(token + d); }, work, token, dim);
    }
}

/// Rotates tokens of any size and channel stride in place, through rows of floats.
template <class Arch, class T>
KVARN_NOINLINE void transform_any(T* data, std::ptrdiff_t token_stride, std::ptrdiff_t channel_stride, std::size_t tokens, int dim,
                                  direction to) noexcept
{
    constexpr int block = 16;
    float rows[block * max_head_dim];
    for (std::size_t t = 0; t < tokens; t += block) {
        const int some = static_cast<int>(tokens - t < block ? tokens - t : block);
        T* const at = data + static_cast<std::ptrdiff_t>(t) * token_stride;
        for (int i = 0; i < some; ++i) load_row<Arch>(at + i * token_stride, channel_stride, dim, rows + i * dim);
        transform_any_rows<Arch>(rows, dim, some, dim, to);
        for (int i = 0; i < some; ++i) store_row<Arch>(rows + i * dim, dim, at + i * token_stride, channel_stride);
    }
}

template <class Arch, element T>
status transform_view(kv_view<T> x, direction to) noexcept
{
    static_assert(!std::is_const_v<T>, "rotation works in place: the view must be writable");
    using storage = storage_t<T>;
    if (x.channels < static_cast<std::size_t>(min_head_dim) || x.channels > static_cast<std::size_t>(max_head_dim) ||
        factor_head_dim(static_cast<int>(x.channels)).outer == 0)
        return status::unsupported_head_dim;
    if (x.tokens == 0 || x.heads == 0) return status::ok;
    if (x.data == nullptr) return status::null_pointer;
    const simd::float_environment guard;
    for (std::size_t h = 0; h < x.heads; ++h) {
        storage* const head = reinterpret_cast<storage*>(x.at(0, h));
        with_extent(static_cast<int>(x.channels), [&](auto dim) KVARN_LAMBDA {
            if constexpr (is_constant_extent<decltype(dim)>) {
                if (x.channel_stride == 1) return transform_contiguous<Arch>(head, x.token_stride, x.tokens, dim);
            }
            transform_any<Arch>(head, x.token_stride, x.channel_stride, x.tokens, dim, to);
        });
    }
    return status::ok;
}

}  // namespace detail

template <class Arch, element T>
status rotate(kv_view<T> x) noexcept
{
    return detail::transform_view<Arch>(x, detail::direction::forward);
}

template <class Arch, element T>
status unrotate(kv_view<T> x) noexcept
{
    return detail::transform_view<Arch>(x, detail::direction::inverse);
}

}  // namespace kvarn
