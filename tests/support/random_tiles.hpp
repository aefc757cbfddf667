// SPDX-License-Identifier: Apache-2.0
#pragma once
// Reproducible K/V tiles with the features that caches of real models show.

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "../reference/half_precision.hpp"
#include "random_source.hpp"

namespace support {

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
