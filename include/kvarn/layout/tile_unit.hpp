// SPDX-License-Identifier: Apache-2.0
#pragma once
// The scale of a tile for the refined encoder: a power of two. In: the tile's largest magnitude. Out: the unit of axis 1's factors, and how
// the record shares it out between the scalars of both axes. constexpr, host and device.
//
// Axis 1's factors start from one unit and are bounded by multiples of it, so that a tile times 2^n has the same codes, and no token or
// channel down to a thousandth of the largest stays as it is. (docs/numerics.md; the paper's encoder has a unit of 1.)

#include <cstdint>

#include <kvarn/base/element.hpp>

namespace kvarn::detail {

struct tile_unit {
    float unit = 1.0f;
    float fold = 1.0f;          ///< what the record multiplies axis 0's scalars by, so that halves can hold those of axis 1
    float inverse_fold = 1.0f;  ///< what it multiplies those by
};

inline constexpr int unit_binades = 10;                // the largest value is 2^10 to 2^11 units
inline constexpr int most_unit = 30;                   // of the unit's exponent: beyond, squares of values would leave float's range
inline constexpr int least_held = -13, most_held = 4;  // exponents of units whose multiples, up to the largest value, are normal halves

/// `largest`: the bits of the tile's largest magnitude, finite.
[[nodiscard]] KVARN_HOST_DEVICE KVARN_INLINE constexpr tile_unit unit_of(std::uint32_t largest) noexcept
{
    if (largest == 0) return {};
    int n = static_cast<int>(largest >> 23) - 127 - unit_binades;
    n = n < -most_unit ? -most_unit : n > most_unit ? most_unit : n;
    const int fold = n < least_held ? n - least_held : n > most_held ? n - most_held : 0;
    return {bits_as<float>(static_cast<std::uint32_t>(127 + n) << 23), bits_as<float>(static_cast<std::uint32_t>(127 + fold) << 23),
            bits_as<float>(static_cast<std::uint32_t>(127 - fold) << 23)};
}

}  // namespace kvarn::detail
