// SPDX-License-Identifier: Apache-2.0
#pragma once
// Reproducible random numbers and K/V tiles with the features that caches of real models show.

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "../reference/half_precision.hpp"

namespace support {

/// splitmix64; the same numbers on every platform.
class random_source {
public:
    explicit random_source(std::uint64_t seed) : state_(seed) {}

    std::uint64_t bits()
    {
        std::uint64_t z = (state_ += 0x9e3779b97f4a7c15u);
        z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
        z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
        return z ^ (z >> 31);
    }
    std::size_t below(std::size_t n) { return static_cast<std::size_t>(bits() % n); }
    double uniform() { return static_cast<double>(bits() >> 11) * 0x1p-53; }
    double uniform(double low, double high) { return low + (high - low) * uniform(); }
    double gaussian()
    {
        const double radius = std::sqrt(-2.0 * std::log(1.0 - uniform()));
        return radius * std::cos(6.283185307179586 * uniform());
    }

private:
    std::uint64_t state_;
};

enum class tile_kind { gaussian, channel_outliers, channel_offsets, token_outliers, token_scales };

inline constexpr tile_kind all_tile_kinds[] = {tile_kind::gaussian, tile_kind::channel_outliers, tile_kind::channel_offsets,
                                               tile_kind::token_outliers, tile_kind::token_scales};

inline const char* name_of(tile_kind kind)
{
    switch (kind) {
    case tile_kind::gaussian: return "gaussian";
    case tile_kind::channel_outliers: return "channel_outliers";
    case tile_kind::channel_offsets: return "channel_offsets";
    case tile_kind::token_outliers: return "token_outliers";
    case tile_kind::token_scales: return "token_scales";
    }
    return "?";
}

/// [token][channel], every value representable in half precision.
inline std::vector<float> random_tile(random_source& random, std::size_t tokens, std::size_t channels, tile_kind kind)
{
    std::vector<double> gain(channels, 1.0), offset(channels, 0.0), scale(tokens, 1.0);
    for (auto& g : gain) g = std::exp(0.3 * random.gaussian());
    if (kind == tile_kind::channel_outliers)
        for (std::size_t i = 0; i < channels / 16; ++i) gain[random.below(channels)] *= 8.0;
    if (kind == tile_kind::channel_offsets)
        for (std::size_t i = 0; i < channels / 4; ++i) offset[random.below(channels)] = 6.0 * random.gaussian();
    if (kind == tile_kind::token_outliers)
        for (std::size_t i = 0; i < tokens / 16; ++i) scale[random.below(tokens)] *= 8.0;
    if (kind == tile_kind::token_scales)
        for (auto& s : scale) s = std::pow(10.0, random.uniform(-2.0, 2.0));
    std::vector<float> tile(tokens * channels);
    for (std::size_t t = 0; t < tokens; ++t)
        for (std::size_t c = 0; c < channels; ++c)
            tile[t * channels + c] =
                static_cast<float>(reference::round_to_half(scale[t] * (gain[c] * random.gaussian() + offset[c])));
    return tile;
}

}  // namespace support
