// SPDX-License-Identifier: Apache-2.0
#pragma once
// convert: the values of one view into another, of any element types and strides: float, half and bfloat16.
// In: [token][head][channel]. Out: the same values, rounded to nearest even; a half saturates at +-65504.
// No accumulator, no allocation. Thread safe; to spread a call, give each thread token ranges or heads of its own.
//
// Between different types: to half, infinities become +-65504, as everything too large does; to float and bfloat16 they stay. NaN stays NaN,
// the one that to_float, to_half or to_bfloat16 gives. Between equal types bits are copied, whatever they are.
// Every instruction set gives the same bits.

#include <kvarn/base/config.hpp>  // first: it refuses older standards

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include <kvarn/base/status.hpp>
#include <kvarn/base/view.hpp>
#include <kvarn/simd/environment.hpp>
#include <kvarn/simd/xsimd.hpp>

namespace kvarn {

/// Copies `from` into `to`, which has the same tokens, heads and channels. Fastest with channel_stride 1 on both sides. `from` may repeat
/// itself by strides of zero or run backwards; `to` must overlap neither itself nor `from`.
/// Errors, nothing written: shape_mismatch, null_pointer. Zero tokens, heads or channels are fine.
template <class Arch = simd::native_arch>
[[nodiscard]] status convert(const input_view& from, const output_view& to) noexcept;

/// The same for views whose element types the compiler knows.
template <class Arch = simd::native_arch, element From, element To>
[[nodiscard]] KVARN_INLINE status convert(const kv_view<From>& from, const kv_view<To>& to) noexcept
{
    static_assert(!std::is_const_v<To>, "convert writes its second view");
    return convert<Arch>(input_view(from), output_view(to));
}

namespace detail {

/// The bits of infinity; those of a NaN, without the sign, are above.
template <class T>
inline constexpr std::uint32_t infinity_of = std::is_same_v<T, float> ? 0x7f800000u : std::is_same_v<T, half> ? 0x7c00u : 0x7f80u;

/// Contiguous elements. The loads and stores of instruction sets differ in what they make of a NaN, and only there; bfloat16 to float only
/// moves bits.
template <class Arch, class From, class To>
KVARN_INLINE void convert_contiguous(const From* from, To* to, std::size_t count) noexcept
{
    using k = simd::kernels<Arch>;
    using one = simd::kernels<simd::portable>;
    constexpr std::size_t width = static_cast<std::size_t>(k::width), block = 4 * width;
    std::size_t i = 0;
    if constexpr (width > 1) {
        constexpr bool moves_bits = std::is_same_v<From, bfloat16> && std::is_same_v<To, float>;
        if (moves_bits || k::largest_magnitude(from, count) <= infinity_of<From>) {
            for (; i + block <= count; i += block)
                KVARN_UNROLL
                for (std::size_t j = 0; j < block; j += width) k::store(to + i + j, k::load(from + i + j));
            for (; i + width <= count; i += width) k::store(to + i, k::load(from + i));
        }
    }
    for (; i < count; ++i) one::store(to + i, one::load(from + i));
}

template <class Arch, class From, class To>
KVARN_NOINLINE void convert_rows(const input_view& from, const output_view& to) noexcept
{
    constexpr std::size_t piece = 1024;  // elements that one NaN slows down, and that stay in the first-level cache
    using one = simd::kernels<simd::portable>;
    const bool contiguous = from.channel_stride == 1 && to.channel_stride == 1;
    for (std::size_t t = 0; t < to.tokens; ++t)
        for (std::size_t h = 0; h < to.heads; ++h) {
            const auto token = static_cast<std::ptrdiff_t>(t), head = static_cast<std::ptrdiff_t>(h);
            const From* const x = static_cast<const From*>(from.data) + token * from.token_stride + head * from.head_stride;
            To* const y = static_cast<To*>(to.data) + token * to.token_stride + head * to.head_stride;
            if (!contiguous) {
                for (std::ptrdiff_t c = 0; c < static_cast<std::ptrdiff_t>(to.channels); ++c) {
                    if constexpr (std::is_same_v<From, To>) std::memcpy(y + c * to.channel_stride, x + c * from.channel_stride, sizeof(To));
                    else one::store(y + c * to.channel_stride, one::load(x + c * from.channel_stride));
                }
            } else if constexpr (std::is_same_v<From, To>) {
                std::memcpy(y, x, to.channels * sizeof(To));
            } else {
                for (std::size_t c = 0; c < to.channels; c += piece)
                    convert_contiguous<Arch>(x + c, y + c, to.channels - c < piece ? to.channels - c : piece);
            }
        }
}

template <class Arch, class From>
KVARN_INLINE void convert_from(const input_view& from, const output_view& to) noexcept
{
    using kind = output_view::element_type;
    if (to.type == kind::f32) convert_rows<Arch, From, float>(from, to);
    else if (to.type == kind::f16) convert_rows<Arch, From, half>(from, to);
    else convert_rows<Arch, From, bfloat16>(from, to);
}

/// Whether `count` rows of `channels` elements follow each other without a gap.
KVARN_INLINE bool is_one_row(std::size_t count, std::ptrdiff_t stride, std::size_t channels) noexcept
{
    return count == 1 || stride == static_cast<std::ptrdiff_t>(channels);
}

}  // namespace detail

template <class Arch>
status convert(const input_view& from, const output_view& to) noexcept
{
    if (from.tokens != to.tokens || from.heads != to.heads || from.channels != to.channels) return status::shape_mismatch;
    if (to.tokens == 0 || to.heads == 0 || to.channels == 0) return status::ok;
    if (from.data == nullptr || to.data == nullptr) return status::null_pointer;
    const simd::float_environment guard;
    input_view x = from;
    output_view y = to;
    if (x.channel_stride == 1 && y.channel_stride == 1) {
        for (int axis = 0; axis < 3; ++axis) {  // heads, tokens, and heads again: [head][token] may be as dense as [token][head]
            std::size_t& count = axis == 1 ? y.tokens : y.heads;
            if (!detail::is_one_row(count, axis == 1 ? x.token_stride : x.head_stride, y.channels) ||
                !detail::is_one_row(count, axis == 1 ? y.token_stride : y.head_stride, y.channels))
                continue;
            y.channels *= count;
            count = 1;
        }
    }
    using kind = input_view::element_type;
    if (x.type == kind::f32) detail::convert_from<Arch, float>(x, y);
    else if (x.type == kind::f16) detail::convert_from<Arch, half>(x, y);
    else detail::convert_from<Arch, bfloat16>(x, y);
    return status::ok;
}

}  // namespace kvarn
