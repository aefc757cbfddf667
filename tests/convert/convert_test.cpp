// SPDX-License-Identifier: Apache-2.0

#include <algorithm>
#include <cfenv>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <vector>

#include <kvarn/convert.hpp>
#include <kvarn/simd/environment.hpp>

#include "../catch.hpp"
#include "../support/library.hpp"

using kvarn::bfloat16;
using kvarn::half;
using kvarn::status;

namespace {

/// An engine's own 16-bit type.
struct fp16 {
    std::uint16_t bits;
};

}  // namespace

template <>
struct kvarn::storage_of<fp16> {
    using type = kvarn::half;
};

namespace {

template <class T>
using bits_t = std::conditional_t<sizeof(T) == 2, std::uint16_t, std::uint32_t>;

template <class T>
bits_t<T> bits_of(const T& x)
{
    bits_t<T> bits;
    std::memcpy(&bits, static_cast<const void*>(&x), sizeof bits);
    return bits;
}

template <class T>
T of_bits(std::uint32_t bits)
{
    const auto some = static_cast<bits_t<T>>(bits);
    T x;
    std::memcpy(static_cast<void*>(&x), &some, sizeof x);
    return x;
}

/// What one element becomes, by the reference's arithmetic in double; for NaN by the scalar functions.
template <class From, class To>
std::uint32_t wanted(From x)
{
    if constexpr (std::is_same_v<From, To>) {
        return bits_of(x);
    } else {
        const double value = support::value_of(x);
        if constexpr (std::is_same_v<To, float>) {
            return bits_of(std::isnan(value) ? kvarn::to_float(x) : static_cast<float>(value));
        } else if constexpr (std::is_same_v<To, half>) {
            if (std::isnan(value)) return kvarn::to_half(kvarn::to_float(x)).bits;
            const double bounded = value > 65504.0 ? 65504.0 : value < -65504.0 ? -65504.0 : value;
            return reference::half_bits(static_cast<float>(bounded));
        } else {
            return std::isnan(value) ? kvarn::to_bfloat16(kvarn::to_float(x)).bits : reference::bfloat16_bits(static_cast<float>(value));
        }
    }
}

/// Random bits, among them all that is special: one in `rare` elements is a NaN, an infinity, a tie or an end of a range.
template <class T>
T random_element(support::random_source& random, std::size_t rare)
{
    static constexpr std::uint32_t floats[] = {
        0x7f800000u, 0xff800000u, 0x7f800001u, 0xff800001u, 0x7fc00000u, 0x7fffffffu, 0xffffffffu, 0x7fbfffffu, 0x80000000u, 0x00000001u,
        0x807fffffu, 0x00800000u, 0x7f7fffffu, 0xff7fffffu, 0x7f7f8000u, 0x477fe000u, 0x477fefffu, 0x477ff000u, 0xc77ff000u, 0xc7800000u,
        0x33000000u, 0x33000001u, 0x33800000u, 0x387fe000u, 0x387fffffu, 0x38800000u, 0x3f801000u, 0x3f803000u, 0x3f808000u, 0x3f818000u,
        0x7f810000u, 0xffbf0001u};
    static constexpr std::uint32_t halves[] = {0x7c00u, 0xfc00u, 0x7c01u, 0xfdffu, 0x7e00u, 0x7fffu, 0xffffu, 0x8000u, 0x0001u, 0x83ffu, 0x0400u, 0x7bffu, 0xfbffu};
    static constexpr std::uint32_t brains[] = {0x7f80u, 0xff80u, 0x7f81u, 0xffbfu, 0x7fc0u, 0x7fffu, 0xffffu, 0x8000u, 0x0001u, 0x807fu, 0x0080u,
                                               0x7f7fu, 0xff7fu, 0x477fu, 0x4780u, 0x3300u, 0x3380u, 0x3880u, 0x3f81u};
    if (random.below(rare) == 0) {
        if constexpr (std::is_same_v<T, float>) return of_bits<T>(floats[random.below(std::size(floats))]);
        else if constexpr (std::is_same_v<T, half>) return of_bits<T>(halves[random.below(std::size(halves))]);
        else return of_bits<T>(brains[random.below(std::size(brains))]);
    }
    if constexpr (std::is_same_v<T, float>) {
        const auto exponent = static_cast<std::uint32_t>(98 + random.below(48));  // 2^-29 .. 2^18: a half's range, and beside it
        return of_bits<T>((static_cast<std::uint32_t>(random.bits()) & 0x807fffffu) | exponent << 23);
    } else {
        return support::stored<T>(static_cast<float>(random.gaussian()));
    }
}

/// Strides of a view, and where it begins in its buffer.
struct shape {
    std::size_t tokens, heads, channels;
    std::ptrdiff_t token, head, channel;
};

/// The elements that a view spans, counted from its lowest one, and where the view's origin is among them.
struct extent {
    std::size_t size, origin;
};
extent extent_of(const shape& s)
{
    std::ptrdiff_t low = 0, high = 0;
    const auto add = [&](std::size_t n, std::ptrdiff_t stride) {
        if (n != 0) (stride < 0 ? low : high) += static_cast<std::ptrdiff_t>(n - 1) * stride;
    };
    add(s.tokens, s.token), add(s.heads, s.head), add(s.channels, s.channel);
    return {static_cast<std::size_t>(high - low + 1), static_cast<std::size_t>(-low)};
}

template <class T, class Element>
kvarn::kv_view<Element> view_of(const shape& s, std::vector<T>& memory, std::size_t before)
{
    return {reinterpret_cast<Element*>(memory.data() + before + extent_of(s).origin), s.tokens, s.heads, s.channels, s.token, s.head, s.channel};
}

constexpr std::size_t guard = 40;

/// Converts with every instruction set and counts the bytes that differ from the reference, what must stay included. `FromElement` and
/// `ToElement` are what the views say: the type itself, or an engine's.
template <class From, class To, class FromElement = From, class ToElement = To>
void check(support::random_source& random, const shape& in, const shape& out, std::size_t rare)
{
    const auto filler = of_bits<To>(0x5a5a5a5au);
    for (const std::size_t offset : {0u, 1u, 3u}) {
        std::vector<From> memory(offset + extent_of(in).size);
        for (From& x : memory) x = random_element<From>(random, rare);
        std::vector<To> expected(offset + extent_of(out).size + 2 * guard, filler);
        const auto from = view_of<From, FromElement>(in, memory, offset);
        const auto target = view_of<To, To>(out, expected, offset + guard);
        for (std::size_t t = 0; t < in.tokens; ++t)
            for (std::size_t h = 0; h < in.heads; ++h)
                for (std::size_t c = 0; c < in.channels; ++c) {
                    From x;
                    std::memcpy(static_cast<void*>(&x), from.at(t, h) + static_cast<std::ptrdiff_t>(c) * in.channel, sizeof x);
                    target.at(t, h)[static_cast<std::ptrdiff_t>(c) * out.channel] = of_bits<To>(wanted<From, To>(x));
                }
        support::for_each_arch([&](auto arch) {
            using Arch = decltype(arch);
            INFO(kvarn::simd::arch_traits<Arch>::name << ": " << sizeof(From) << " to " << sizeof(To) << " bytes, " << in.tokens << " x " << in.heads << " x "
                                                      << in.channels << ", strides " << in.token << " " << in.head << " " << in.channel << " to "
                                                      << out.token << " " << out.head << " " << out.channel << ", offset " << offset);
            std::vector<To> got(expected.size(), filler);
            REQUIRE(kvarn::convert<Arch>(from, view_of<To, ToElement>(out, got, offset + guard)) == status::ok);
            CHECK(support::same_bits(got, expected));
            std::fill(got.begin(), got.end(), filler);
            const kvarn::output_view to(view_of<To, ToElement>(out, got, offset + guard));
            REQUIRE(kvarn::convert<Arch>(kvarn::input_view(from), to) == status::ok);
            CHECK(support::same_bits(got, expected));
        });
    }
}

template <class From, class To>
void check_shapes(support::random_source& random)
{
    const shape shapes[][2] = {
        {{5, 3, 128, 3 * 128, 128, 1}, {5, 3, 128, 3 * 128, 128, 1}},         // dense to dense: one row
        {{5, 3, 128, 3 * 128, 128, 1}, {5, 3, 128, 128, 5 * 128, 1}},         // [token][head] to [head][token]
        {{5, 3, 80, 80, 5 * 80, 1}, {5, 3, 80, 80, 5 * 80, 1}},               // [head][token] both: one row
        {{7, 2, 45, 2 * 50, 50, 1}, {7, 2, 45, 46, 7 * 46 + 3, 1}},           // gaps, an odd number of channels
        {{3, 2, 36, 72, 36, 1}, {3, 2, 36, 36 * 2 * 3, 3, 6}},                // channels apart in the output
        {{3, 2, 36, 1, 3 * 36, 3}, {3, 2, 36, 72, 36, 1}},                    // transposed input
        {{4, 2, 33, 2, 1, 8}, {4, 2, 33, 66, 33, 1}},
        {{4, 3, 64, 0, 0, 1}, {4, 3, 64, 3 * 64, 64, 1}},                     // one row, repeated
        {{4, 3, 64, 0, 64, 0}, {4, 3, 64, 3 * 64, 64, 1}},                    // one value for all channels
        {{4, 3, 64, -192, -64, -1}, {4, 3, 64, 3 * 64, 64, 1}},               // backwards
        {{4, 3, 64, -192, 64, 1}, {4, 3, 64, 3 * 64, -64, 1}},
        {{4, 3, 64, 3 * 64, 64, 1}, {4, 3, 64, 3 * 64, -64, -1}},
        {{1, 1, 1, 0, 0, 1}, {1, 1, 1, 0, 0, 1}},
        {{1, 1, 4100, 7, 9, 1}, {1, 1, 4100, 0, 0, 1}},                       // strides of an axis of one do not matter
        {{2, 1, 1, 1, 0, 77}, {2, 1, 1, 1, 0, -5}},
    };
    for (const auto& [in, out] : shapes)
        for (const std::size_t rare : {4u, 100u, 1u << 30}) check<From, To>(random, in, out, rare);
}

}  // namespace

TEST_CASE("convert: all pairs of types and all kinds of strides, on every instruction set", "[unit]")
{
    support::random_source random(301);
    check_shapes<float, float>(random);
    check_shapes<float, half>(random);
    check_shapes<float, bfloat16>(random);
    check_shapes<half, float>(random);
    check_shapes<half, half>(random);
    check_shapes<half, bfloat16>(random);
    check_shapes<bfloat16, float>(random);
    check_shapes<bfloat16, half>(random);
    check_shapes<bfloat16, bfloat16>(random);
}

TEST_CASE("convert: types declared by storage_of", "[unit]")
{
    support::random_source random(302);
    const shape in{3, 2, 48, 96, 48, 1}, out{3, 2, 48, 48, 144, 1}, apart{3, 2, 48, 192, 96, 2};
    check<half, half, fp16, half>(random, in, out, 10);
    check<half, float, const fp16, float>(random, in, out, 10);
    check<float, half, const float, fp16>(random, in, apart, 10);
    check<half, bfloat16, fp16, bfloat16>(random, apart, in, 10);
#if defined(KVARN_HAS_FLOAT16)
    check<float, half, float, _Float16>(random, in, out, 10);
    check<half, float, _Float16, float>(random, in, out, 10);
#endif
}

TEST_CASE("convert: every 16-bit pattern", "[unit]")
{
    std::vector<half> halves(1u << 16);
    std::vector<bfloat16> brains(1u << 16);
    for (std::uint32_t i = 0; i < halves.size(); ++i) halves[i].bits = brains[i].bits = static_cast<std::uint16_t>(i);
    const auto line = [](auto* p) { return kvarn::token_major(p, 1, 1, 1u << 16); };
    support::for_each_arch([&](auto arch) {
        using Arch = decltype(arch);
        INFO(kvarn::simd::arch_traits<Arch>::name);
        std::size_t wrong = 0;
        std::vector<float> wide(1u << 16), wide_brains(1u << 16);
        std::vector<half> to_halves(1u << 16);
        std::vector<bfloat16> to_brains(1u << 16);
        // Once all together, where each piece holds a NaN or not, and once alone: the tail of a row has its own loop.
        for (const std::size_t each : {std::size_t{1} << 16, std::size_t{1}, std::size_t{16}}) {
            const auto cut = [&](auto* p) { return kvarn::token_major(p, (std::size_t{1} << 16) / each, 1, each); };
            REQUIRE(kvarn::convert<Arch>(cut(halves.data()), cut(wide.data())) == status::ok);
            REQUIRE(kvarn::convert<Arch>(cut(brains.data()), cut(wide_brains.data())) == status::ok);
            REQUIRE(kvarn::convert<Arch>(cut(brains.data()), cut(to_halves.data())) == status::ok);
            REQUIRE(kvarn::convert<Arch>(cut(halves.data()), cut(to_brains.data())) == status::ok);
            for (std::size_t i = 0; i < halves.size(); ++i) {
                wrong += bits_of(wide[i]) != wanted<half, float>(halves[i]);
                wrong += bits_of(wide_brains[i]) != wanted<bfloat16, float>(brains[i]);
                wrong += to_halves[i].bits != wanted<bfloat16, half>(brains[i]);
                wrong += to_brains[i].bits != wanted<half, bfloat16>(halves[i]);
            }
        }
        CHECK(wrong == 0);
        // Through float and back, everything but a NaN's bits returns; a half's infinity comes back as the largest half.
        REQUIRE(kvarn::convert<Arch>(line(wide.data()), line(to_halves.data())) == status::ok);
        REQUIRE(kvarn::convert<Arch>(line(wide_brains.data()), line(to_brains.data())) == status::ok);
        for (std::size_t i = 0; i < halves.size(); ++i) {
            const auto magnitude = i & 0x7fffu;
            if (magnitude == 0x7c00u) wrong += to_halves[i].bits != i - 1;
            else if (magnitude < 0x7c00u) wrong += to_halves[i] != halves[i];
            else wrong += (to_halves[i].bits & 0x7fffu) <= 0x7c00u;
            if (magnitude <= 0x7f80u) wrong += to_brains[i] != brains[i];
            else wrong += (to_brains[i].bits & 0x7fffu) <= 0x7f80u;
        }
        CHECK(wrong == 0);
    });
}

TEST_CASE("convert: infinities, NaN and the ends of a half", "[unit]")
{
    constexpr float infinity = std::numeric_limits<float>::infinity(), nan = std::numeric_limits<float>::quiet_NaN();
    const std::vector<float> x = {infinity, -infinity, nan, 65504.0f, 65519.9f, 65520.0f, 1e30f, -1e30f, 1.5f, -0.0f};
    support::for_each_arch([&](auto arch) {
        using Arch = decltype(arch);
        // Alone, and among so many others that whole registers are loaded; with NaN and without.
        for (const std::size_t copies : {1u, 20u})
            for (const bool without_nan : {false, true}) {
                std::vector<float> in;
                for (std::size_t i = 0; i < copies; ++i) in.insert(in.end(), x.begin(), x.end());
                if (without_nan)
                    for (float& f : in) f = std::isnan(f) ? 2.0f : f;
                std::vector<half> h(in.size());
                std::vector<bfloat16> b(in.size());
                const auto line = [&](auto* p) { return kvarn::token_major(p, 1, 1, in.size()); };
                REQUIRE(kvarn::convert<Arch>(line(in.data()), line(h.data())) == status::ok);
                REQUIRE(kvarn::convert<Arch>(line(in.data()), line(b.data())) == status::ok);
                for (std::size_t i = 0; i < in.size(); i += x.size()) {
                    CHECK(h[i].bits == 0x7bff);
                    CHECK(h[i + 1].bits == 0xfbff);
                    CHECK(h[i + 2].bits == (without_nan ? 0x4000 : 0x7e00));
                    for (std::size_t j = 3; j < 7; ++j) CHECK(h[i + j].bits == 0x7bff);
                    CHECK(h[i + 7].bits == 0xfbff);
                    CHECK(h[i + 8].bits == 0x3e00);
                    CHECK(h[i + 9].bits == 0x8000);
                    CHECK(b[i].bits == 0x7f80);
                    CHECK(b[i + 1].bits == 0xff80);
                    CHECK(b[i + 2].bits == (without_nan ? 0x4000 : 0x7fc0));
                }
            }
    });
}

TEST_CASE("convert: refused views are not written, empty ones are fine", "[unit]")
{
    std::vector<float> from(64, 1.0f), to(64, 7.0f);
    const auto x = kvarn::token_major(from.data(), 2, 2, 16), y = kvarn::token_major(to.data(), 2, 2, 16);
    const auto changed = [](auto v, auto member, std::size_t n) {
        v.*member = n;
        return v;
    };
    using view = kvarn::kv_view<float>;
    for (const auto member : {&view::tokens, &view::heads, &view::channels}) {
        CHECK(kvarn::convert(changed(x, member, 1), y) == status::shape_mismatch);
        CHECK(kvarn::convert(x, changed(y, member, 1)) == status::shape_mismatch);
        CHECK(kvarn::convert(changed(x, member, 0), changed(view{}, member, 0)) == status::shape_mismatch);
        auto nothing = changed(y, member, 0);
        nothing.data = nullptr;
        CHECK(kvarn::convert(changed(x, member, 0), nothing) == status::ok);
    }
    auto missing = y;
    missing.data = nullptr;
    CHECK(kvarn::convert(x, missing) == status::null_pointer);
    CHECK(kvarn::convert(missing, y) == status::null_pointer);
    CHECK(kvarn::convert(view{}, view{}) == status::ok);
    CHECK(to == std::vector<float>(64, 7.0f));
    CHECK(kvarn::convert(x, y) == status::ok);
    CHECK(to == from);
}

TEST_CASE("convert: the caller's floating-point environment neither matters nor changes", "[unit]")
{
    const std::vector<float> in = {0x1p-20f, 3e-41f, 1.00048828125f, 1.0009765625f, -2.0009765626f, 0x1p-24f, 0x1.8p-25f, 0x1p-26f};
    std::vector<half> wanted_halves(in.size()), got(in.size());
    std::vector<float> small(in.size()), wanted_small(in.size());
    const auto line = [&](auto* p) { return kvarn::token_major(p, 1, 1, in.size()); };
    REQUIRE(kvarn::convert<kvarn::simd::portable>(line(in.data()), line(wanted_halves.data())) == status::ok);
    REQUIRE(kvarn::convert<kvarn::simd::portable>(line(wanted_halves.data()), line(wanted_small.data())) == status::ok);
    support::for_each_arch([&](auto arch) {
        std::fenv_t saved;
        REQUIRE(std::fegetenv(&saved) == 0);
        REQUIRE(std::fesetround(FE_UPWARD) == 0);
#if defined(__SSE__)
        const unsigned flushing = _mm_getcsr() | 0x8040u;  // subnormals are zero
        _mm_setcsr(flushing);
#endif
        const status s = kvarn::convert<decltype(arch)>(line(in.data()), line(got.data()));
        const status t = kvarn::convert<decltype(arch)>(line(got.data()), line(small.data()));
        const int rounding = std::fegetround();
#if defined(__SSE__)
        const bool kept = (_mm_getcsr() & ~0x3fu) == (flushing & ~0x3fu);
#else
        const bool kept = true;
#endif
        std::fesetenv(&saved);
        CHECK((s == status::ok && t == status::ok));
        CHECK((rounding == FE_UPWARD && kept));
        CHECK(support::same_bits(got, wanted_halves));
        CHECK(support::same_bits(small, wanted_small));
    });
}
