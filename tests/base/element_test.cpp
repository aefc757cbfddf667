// SPDX-License-Identifier: Apache-2.0
// half and bfloat16 against their definitions in double, all 65,536 patterns of each.

#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>

#include <kvarn/base/element.hpp>

#include "../catch.hpp"
#include "../reference/half_precision.hpp"
#include "../support/random_tiles.hpp"

namespace {

std::uint32_t bits_of(float f) { return std::bit_cast<std::uint32_t>(f); }

template <class T>
double exact_value(std::uint16_t bits)
{
    return std::is_same_v<T, kvarn::half> ? reference::half_value(bits) : reference::bfloat16_value(bits);
}

template <class T>
T library_round(float f)
{
    if constexpr (std::is_same_v<T, kvarn::half>)
        return kvarn::to_half(f);
    else
        return kvarn::to_bfloat16(f);
}

template <class T>
std::uint16_t reference_round(float f)
{
    return std::is_same_v<T, kvarn::half> ? reference::half_bits(f) : reference::bfloat16_bits(f);
}

/// Patterns that round or convert wrongly.
template <class T>
std::size_t wrong_widenings()
{
    std::size_t wrong = 0;
    for (std::uint32_t b = 0; b < 0x10000u; ++b) {
        const T stored{static_cast<std::uint16_t>(b)};
        const float f = kvarn::to_float(stored);
        const double wanted = exact_value<T>(static_cast<std::uint16_t>(b));
        if (std::isnan(wanted))
            wrong += !std::isnan(f);
        else
            wrong += static_cast<double>(f) != wanted || std::signbit(f) != std::signbit(wanted);
    }
    return wrong;
}

template <class T>
std::size_t wrong_round_trips()
{
    std::size_t wrong = 0;
    for (std::uint32_t b = 0; b < 0x10000u; ++b) {
        const T stored{static_cast<std::uint16_t>(b)};
        const float f = kvarn::to_float(stored);
        const T back = library_round<T>(f);
        wrong += std::isnan(f) ? !std::isnan(kvarn::to_float(back)) : back.bits != stored.bits;
    }
    return wrong;
}

/// Between neighbours: the midpoint (a tie) and the floats just beside it.
template <class T>
std::size_t wrong_midpoints(std::size_t& tested)
{
    std::size_t wrong = 0;
    for (std::uint32_t b = 0; b < 0xffffu; ++b) {
        const double low = exact_value<T>(static_cast<std::uint16_t>(b)), high = exact_value<T>(static_cast<std::uint16_t>(b + 1));
        if (!std::isfinite(low) || !std::isfinite(high)) continue;
        const auto middle = static_cast<float>((low + high) / 2.0);
        const float towards_low = std::nextafter(middle, static_cast<float>(low));
        const float towards_high = std::nextafter(middle, static_cast<float>(high));
        for (const float f : {middle, towards_low, towards_high}) {
            wrong += library_round<T>(f).bits != reference_round<T>(f);
            ++tested;
        }
        // The definition of a tie, spelt out: the pattern with the even last bit wins.
        if (static_cast<double>(middle) == (low + high) / 2.0 && low != high)
            wrong += library_round<T>(middle).bits != ((b & 1u) ? b + 1 : b);
    }
    return wrong;
}

}  // namespace

TEST_CASE("base/element: every half converts to float exactly and back", "[unit]")
{
    CHECK(wrong_widenings<kvarn::half>() == 0);
    CHECK(wrong_round_trips<kvarn::half>() == 0);
}

TEST_CASE("base/element: every bfloat16 converts to float exactly and back", "[unit]")
{
    CHECK(wrong_widenings<kvarn::bfloat16>() == 0);
    CHECK(wrong_round_trips<kvarn::bfloat16>() == 0);
}

TEST_CASE("base/element: floats at and beside every midpoint round to nearest, ties to even", "[unit]")
{
    std::size_t tested = 0;
    CHECK(wrong_midpoints<kvarn::half>(tested) == 0);
    CHECK(tested > 180000);
    tested = 0;
    CHECK(wrong_midpoints<kvarn::bfloat16>(tested) == 0);
    CHECK(tested > 180000);
}

TEST_CASE("base/element: random float patterns round like the reference", "[unit]")
{
    support::random_source random(11);
    std::size_t wrong = 0, tested = 0;
    for (int i = 0; i < 300000; ++i) {
        const float f = std::bit_cast<float>(static_cast<std::uint32_t>(random.bits()));
        if (std::isnan(f)) continue;
        ++tested;
        wrong += kvarn::to_half(f).bits != reference::half_bits(f);
        wrong += kvarn::to_bfloat16(f).bits != reference::bfloat16_bits(f);
        // Most random patterns are far outside half's range: once more inside it.
        const auto exponent = static_cast<std::uint32_t>(98 + random.below(48));  // 2^-29 .. 2^18
        const float g = std::bit_cast<float>((bits_of(f) & 0x807fffffu) | exponent << 23);
        wrong += kvarn::to_half(g).bits != reference::half_bits(g);
    }
    CHECK(tested > 250000);
    CHECK(wrong == 0);
}

TEST_CASE("base/element: the ends of the ranges", "[unit]")
{
    CHECK(kvarn::to_half(65504.0f).bits == 0x7bff);
    CHECK(kvarn::to_half(std::nextafter(65520.0f, 0.0f)).bits == 0x7bff);
    CHECK(kvarn::to_half(65520.0f).bits == 0x7c00);
    CHECK(kvarn::to_half(-65520.0f).bits == 0xfc00);
    CHECK(kvarn::to_half(0x1p-24f).bits == 0x0001);
    CHECK(kvarn::to_half(0x1p-25f).bits == 0x0000);  // a tie, zero is even
    CHECK(kvarn::to_half(std::nextafter(0x1p-25f, 1.0f)).bits == 0x0001);
    CHECK(kvarn::to_half(-0.0f).bits == 0x8000);
    CHECK(kvarn::to_half(1e-45f).bits == 0x0000);
    CHECK(kvarn::to_bfloat16(std::numeric_limits<float>::max()).bits == 0x7f80);
    CHECK(kvarn::to_bfloat16(1.0f).bits == 0x3f80);
    CHECK(std::isnan(kvarn::to_float(kvarn::to_half(std::numeric_limits<float>::quiet_NaN()))));
    CHECK(std::isnan(kvarn::to_float(kvarn::to_half(std::bit_cast<float>(0x7f800001u)))));
    CHECK(std::isnan(kvarn::to_float(kvarn::to_bfloat16(std::bit_cast<float>(0x7f800001u)))));
    CHECK(std::isnan(kvarn::to_float(kvarn::to_bfloat16(std::bit_cast<float>(0x7fffffffu)))));
    CHECK(kvarn::to_half(std::numeric_limits<float>::infinity()).bits == 0x7c00);
    CHECK(kvarn::to_bfloat16(-std::numeric_limits<float>::infinity()).bits == 0xff80);
}

TEST_CASE("base/element: saturate_to stops half at 65504 and leaves the others alone", "[unit]")
{
    const float infinity = std::numeric_limits<float>::infinity();
    CHECK(kvarn::saturate_to<kvarn::half>(1e6f).bits == 0x7bff);
    CHECK(kvarn::saturate_to<kvarn::half>(-1e6f).bits == 0xfbff);
    CHECK(kvarn::saturate_to<kvarn::half>(infinity).bits == 0x7bff);
    CHECK(kvarn::saturate_to<kvarn::half>(65519.0f).bits == 0x7bff);
    CHECK(kvarn::saturate_to<kvarn::half>(1.5f).bits == 0x3e00);
    CHECK(kvarn::saturate_to<kvarn::bfloat16>(1e6f).bits == reference::bfloat16_bits(1e6f));
    CHECK(kvarn::saturate_to<float>(1e6f) == 1e6f);
}

TEST_CASE("base/element: conversions are usable at compile time", "[unit]")
{
    static_assert(kvarn::to_half(1.0f).bits == 0x3c00);
    static_assert(kvarn::to_float(kvarn::half{0x3c00}) == 1.0f);
    static_assert(kvarn::to_float(kvarn::half{0x0001}) == 0x1p-24f);
    static_assert(kvarn::to_bfloat16(-2.0f).bits == 0xc000);
    static_assert(kvarn::element<float> && kvarn::element<const kvarn::half> && kvarn::element<kvarn::bfloat16>);
    static_assert(!kvarn::element<double> && !kvarn::element<int>);
    SUCCEED();
}
