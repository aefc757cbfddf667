// SPDX-License-Identifier: Apache-2.0
#pragma once
// Formats, arrays and records for the targets that run kernels. Small sizes come up most: a case should take a millisecond.

#include <cmath>
#include <optional>
#include <vector>

#include "kernels.hpp"

namespace fuzz {

inline kvarn::format take_format(source& in)
{
    kvarn::format_spec s;
    const auto dim = [&] {
        const unsigned b = in.take();
        if (b < 128) return 32 + static_cast<int>(b % 9) * 4;
        if (b < 224) return 48 + static_cast<int>(b % 24) * 4;
        return 32 + in.take() % 137 * 4;
    };
    s.head_dim_k = dim();
    s.head_dim_v = in.flag() ? s.head_dim_k : dim();
    s.key_bits = in.pick({2, 3, 4, 5, 6, 8});
    s.value_bits = in.pick({2, 3, 4, 5, 6, 8, 2, 0});
    s.group = in.pick({32, 32, 32, 32, 64, 64, 128, 256});
    s.exact_channels = in.pick({0, 0, 0, 0, 4, 16, 20, 64});
    if (in.one_in(64)) s.exact_channels = 256;
    if (in.one_in(4) || kvarn::factor_head_dim(s.head_dim_k).outer == 0) s.key_rotation = kvarn::rotation::none;
    if (in.one_in(4) || kvarn::factor_head_dim(s.head_dim_v).outer == 0) s.value_rotation = kvarn::rotation::none;
    const auto made = kvarn::make_format(s);
    require(made.ok(), "every head_dim that is a multiple of 4 has a format");
    return *made;
}

/// One of the element types, as a number; with_element calls f with its type.
enum class element : std::uint8_t { f32, f16, bf16 };

inline element take_element(source& in) { return in.pick({element::f32, element::f16, element::f16, element::bf16}); }

template <class F>
decltype(auto) with_element(element e, F&& f)
{
    if (e == element::f32) return f(float{});
    if (e == element::f16) return f(kvarn::half{});
    return f(kvarn::bfloat16{});
}

/// Where the elements of an array [token][head][channel] lie, in elements.
struct layout {
    std::size_t tokens = 0, heads = 0, channels = 0;
    std::ptrdiff_t token_stride = 0, head_stride = 0, channel_stride = 1;

    [[nodiscard]] std::size_t elements() const { return tokens * heads * channels; }
    [[nodiscard]] std::ptrdiff_t at(std::size_t t, std::size_t h, std::size_t c) const
    {
        return static_cast<std::ptrdiff_t>(t) * token_stride + static_cast<std::ptrdiff_t>(h) * head_stride +
               static_cast<std::ptrdiff_t>(c) * channel_stride;
    }
};

/// An array whose elements do not overlap: any order of the axes, gaps, any direction.
inline layout take_output(source& in, std::size_t tokens, std::size_t heads, std::size_t channels)
{
    layout l{tokens, heads, channels};
    std::ptrdiff_t* const strides[] = {&l.token_stride, &l.head_stride, &l.channel_stride};
    const std::size_t sizes[] = {tokens, heads, channels};
    static constexpr int orders[][3] = {{2, 1, 0}, {2, 0, 1}, {2, 1, 0}, {2, 0, 1}, {1, 2, 0}, {0, 2, 1}, {0, 1, 2}, {1, 0, 2}};
    const auto& order = orders[in.take() % std::size(orders)];
    const unsigned gaps = in.take(), backwards = in.one_in(4) ? in.take() : 0;
    std::ptrdiff_t stride = 1;
    for (int i = 0; i < 3; ++i) {
        const int axis = order[i];
        if (i > 0 || (gaps & 0x80) != 0) stride += static_cast<std::ptrdiff_t>(gaps >> (2 * i) & 3);
        *strides[axis] = (backwards >> i & 1) != 0 ? -stride : stride;
        stride *= static_cast<std::ptrdiff_t>(std::max<std::size_t>(sizes[axis], 1));
    }
    return l;
}

/// An array for reading: as above, or with strides that let elements coincide.
inline layout take_input(source& in, std::size_t tokens, std::size_t heads, std::size_t channels)
{
    layout l = take_output(in, tokens, heads, channels);
    if (!in.one_in(4)) return l;
    for (std::ptrdiff_t* const stride : {&l.token_stride, &l.head_stride, &l.channel_stride})
        if (in.flag()) *stride = static_cast<std::int8_t>(in.take()) % 8;
    return l;
}

/// The memory of an array, no byte more.
template <class T>
class array {
public:
    static constexpr std::uint8_t untouched = 0xff;  // a NaN in every type

    array(const layout& l, std::size_t misalignment)
        : layout_(l), low_(extent(l).first),
          memory_(l.elements() == 0 ? 0 : static_cast<std::size_t>(extent(l).second - low_ + 1) * sizeof(T), misalignment * alignof(T), untouched)
    {}

    [[nodiscard]] T* first() const { return reinterpret_cast<T*>(memory_.bytes()) - low_; }
    [[nodiscard]] kvarn::kv_view<T> view() const
    {
        return {first(), layout_.tokens, layout_.heads, layout_.channels, layout_.token_stride, layout_.head_stride, layout_.channel_stride};
    }
    [[nodiscard]] T& operator()(std::size_t t, std::size_t h, std::size_t c) const { return first()[layout_.at(t, h, c)]; }
    [[nodiscard]] const layout& where() const { return layout_; }
    [[nodiscard]] bool is_untouched() const { return memory_.holds_only(untouched); }

    template <class F>
    void for_each(F&& f) const
    {
        for (std::size_t t = 0; t < layout_.tokens; ++t)
            for (std::size_t h = 0; h < layout_.heads; ++h)
                for (std::size_t c = 0; c < layout_.channels; ++c) f(t, h, c, (*this)(t, h, c));
    }

    /// Nothing but tokens [first, last) of some heads was written: wrote(token, head) says which.
    template <class Wrote>
    void require_written(Wrote&& wrote) const
    {
        memory_.require_intact();
        array rest(layout_, 0);
        std::memcpy(rest.memory_.bytes(), memory_.bytes(), memory_.size());
        rest.for_each([&](std::size_t t, std::size_t h, std::size_t, T& x) {
            if (wrote(t, h)) std::memset(&x, untouched, sizeof x);
        });
        require(rest.is_untouched(), "nothing but the elements of the output is written");
    }

private:
    static std::pair<std::ptrdiff_t, std::ptrdiff_t> extent(const layout& l)
    {
        std::ptrdiff_t low = 0, high = 0;
        const auto axis = [&](std::ptrdiff_t stride, std::size_t n) {
            (stride < 0 ? low : high) += stride * static_cast<std::ptrdiff_t>(n == 0 ? 0 : n - 1);
        };
        axis(l.token_stride, l.tokens);
        axis(l.head_stride, l.heads);
        axis(l.channel_stride, l.channels);
        return {low, high};
    }

    layout layout_;
    std::ptrdiff_t low_;
    memory memory_;
};

/// Bit patterns that are worth a try, for 32 and 16 bits.
template <class T>
T special(source& in)
{
    T x;
    if constexpr (sizeof(T) == 4) {
        const std::uint32_t bits = in.pick<std::uint32_t>({0x7f800000u, 0xff800000u, 0x7fc00000u, 0x7f800001u, 0x7f7fffffu, 0xff7fffffu, 0x00000001u,
                                                           0x807fffffu, 0x80000000u, 0x477fe000u, 0x477ff000u, 0xc77fefffu, 0x51ba43b7u, 0x00800000u,
                                                           0x60ad78ecu, in.take<std::uint32_t>()});
        std::memcpy(&x, &bits, sizeof x);
    } else {
        const std::uint16_t bits = in.pick<std::uint16_t>({0x7c00, 0xfc00, 0x7e00, 0x7c01, 0x7bff, 0xfbff, 0x0001, 0x83ff, 0x8000, 0x7f80, 0xff80, 0x7f7f,
                                                           0x7fc0, 0x0400, 0x0080, in.take<std::uint16_t>()});
        std::memcpy(&x, &bits, sizeof x);
    }
    return x;
}

/// Gives the elements values: normal ones of any size, with outliers, all the same, or bytes of the input; then a few special ones.
template <class T>
void fill(source& in, const array<T>& to)
{
    const unsigned kind = in.take() % 8;
    const int exponent = in.one_in(4) ? static_cast<int>(in.take<std::int16_t>() % 160) : static_cast<std::int8_t>(in.take()) % 8;
    const float size = std::ldexp(1.0f, std::min(exponent, 127));
    const std::size_t odd_channel = 1 + in.take() % 31, odd_token = 1 + in.take() % 15;
    random_source numbers(in.take<std::uint32_t>());
    const std::span<const std::uint8_t> raw = in.rest();
    std::size_t at = 0;
    to.for_each([&](std::size_t t, std::size_t, std::size_t c, T& x) {
        if (kind == 0 && raw.size() >= sizeof(T)) {
            std::memcpy(&x, raw.data() + at, sizeof x);
            at = at + 2 * sizeof(T) <= raw.size() ? at + sizeof(T) : 0;
            return;
        }
        float value = kind == 1 ? size : size * numbers.normal();
        if (kind >= 5 && c % 32 == odd_channel) value = value * 16.0f + size * 4.0f;
        if (kind >= 6 && t % 16 == odd_token) value *= 32.0f;
        x = kvarn::saturate_to<T>(value);
    });
    if (to.where().elements() == 0) return;
    for (unsigned n = in.one_in(3) ? in.take() % 4 : 0; n > 0; --n) {
        const layout& l = to.where();
        T& x = to(in.below(l.tokens), in.below(l.heads), in.below(l.channels));
        x = special<T>(in);
    }
}

template <class T>
float value_of(const T& x)
{
    return kvarn::to_float(x);
}

/// What the scalars of a record are.
enum class scalars : std::uint8_t {
    plausible,  ///< as encoders make them: scales positive, all moderate
    finite,     ///< any that are finite
    any,        ///< any bits
};

/// Writes one record: codes of all kinds, scalars as asked for. `record` need not be aligned.
inline void fill_record(source& in, random_source& numbers, const kvarn::format& f, scalars kind, std::byte* record)
{
    const kvarn::record_layout at = kvarn::layout_of(f);
    const unsigned codes = in.take();
    for (std::size_t i = 0; i < at.content_bytes; ++i)
        record[i] = static_cast<std::byte>(codes < 16 ? 0xff : codes < 24 ? 0 : numbers.bits() & 0xff);
    const auto put = [&](std::size_t from, std::size_t to, bool positive) {
        const float size = std::ldexp(1.0f, static_cast<std::int8_t>(in.take()) % (kind == scalars::plausible ? 4 : 15));
        const bool same = in.one_in(8), spoiled = kind == scalars::any && in.one_in(4);
        for (std::size_t i = from; i < to; i += 2) {
            float value = same ? size : size * numbers.normal();
            if (positive) value = std::fabs(value);
            kvarn::half h = kvarn::saturate_to<kvarn::half>(value);
            if (spoiled && numbers.bits() % 64 == 0) h.bits = static_cast<std::uint16_t>(numbers.bits());
            std::memcpy(record + i, &h, sizeof h);
        }
    };
    const bool as_encoded = kind == scalars::plausible;
    put(at.k_channel_scale, at.k_channel_zero, as_encoded);
    put(at.k_channel_zero, at.k_token_scale, false);
    put(at.k_token_scale, at.v_codes, as_encoded);
    put(at.v_channel_scale, at.v_token_scale, as_encoded);
    put(at.v_token_scale, at.v_token_zero, as_encoded);
    put(at.v_token_zero, at.exact, false);
    put(at.exact, at.content_bytes, false);
    if (as_encoded) return;
    for (unsigned n = in.take() % 4; n > 0; --n) {
        const bool keys = in.flag() || at.v_channel_scale == at.content_bytes;
        const std::size_t from = keys ? at.k_channel_scale : at.v_channel_scale, to = keys ? at.v_codes : at.content_bytes;
        kvarn::half h = special<kvarn::half>(in);
        if (kind == scalars::finite && (h.bits & 0x7c00u) == 0x7c00u) h.bits = static_cast<std::uint16_t>(h.bits & 0xfbffu);
        std::memcpy(record + from + in.below((to - from) / 2) * 2, &h, sizeof h);
    }
}

/// Whether all scalars of a record are finite halves.
inline bool is_finite(const kvarn::format& f, const std::byte* record)
{
    const kvarn::record_layout at = kvarn::layout_of(f);
    const auto finite = [&](std::size_t from, std::size_t to) {
        for (std::size_t i = from; i < to; i += 2) {
            kvarn::half h;
            std::memcpy(&h, record + i, sizeof h);
            if ((h.bits & 0x7c00u) == 0x7c00u) return false;
        }
        return true;
    };
    return finite(at.k_channel_scale, at.v_codes) && finite(at.v_channel_scale, at.content_bytes);
}

/// A grid of records with gaps, at any address.
struct grid {
    std::size_t tiles, heads, tile_stride, head_stride, record_bytes;

    [[nodiscard]] std::size_t bytes(const kvarn::format& f) const
    {
        if (tiles == 0 || heads == 0) return 0;
        return (tiles - 1) * tile_stride + (heads - 1) * head_stride + std::max(record_bytes, kvarn::layout_of(f).content_bytes);
    }
    [[nodiscard]] kvarn::record_grid<std::byte> over(const memory& m) const
    {
        return {m.data(), m.size(), tiles, heads, tile_stride, head_stride, record_bytes};
    }
};

inline grid take_grid(source& in, const kvarn::format& f)
{
    const bool large = f.head_dim_k() * f.group() > 4096 || f.head_dim_v() * f.group() > 4096;
    grid g{};
    g.tiles = large ? 1 : in.pick<std::size_t>({1, 1, 1, 2, 2, 3, 1, 0});
    g.heads = large ? 1 : in.pick<std::size_t>({1, 1, 1, 2, 2, 3, 1, 0});
    const std::size_t content = kvarn::layout_of(f).content_bytes;
    g.record_bytes = in.pick({content, kvarn::record_bytes(f), kvarn::record_bytes(f, kvarn::record_stride::reference), content + in.take()});
    if (in.one_in(8)) g.record_bytes = in.below(content);  // less than the content: the content is written all the same
    const std::size_t owned = std::max(g.record_bytes, content), gap = in.one_in(3) ? in.take() : 0;
    if (in.flag()) {
        g.head_stride = owned + gap % 16;
        g.tile_stride = std::max<std::size_t>(g.heads, 1) * g.head_stride + gap / 16;
    } else {
        g.tile_stride = owned + gap % 16;
        g.head_stride = std::max<std::size_t>(g.tiles, 1) * g.tile_stride + gap / 16;
    }
    return g;
}

inline kvarn::record_range take_range(source& in, std::size_t items)
{
    if (!in.one_in(4)) return {};
    const std::size_t begin = in.below(items + 2);
    return {begin, in.one_in(16) ? in.take<std::uint64_t>() : begin + in.below(items + 2)};
}

}  // namespace fuzz
