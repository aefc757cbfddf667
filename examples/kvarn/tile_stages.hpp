// SPDX-License-Identifier: Apache-2.0
#pragma once
// One tile at the method's four stages (raw, rotated, normalised, quantized), for the heat maps of the report. The
// normalisation and the codes are read back from the record.

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstring>
#include <string>
#include <utility>
#include <vector>

#include <kvarn/kvarn.hpp>

#include "../common/failure.hpp"

namespace kvarn_cli {

/// One heat map: [channel][token] values.
struct stage {
    std::string title, unit;
    std::size_t tokens = 0, channels = 0;
    int most_code = 0;  ///< not 0: values are codes 0 .. most_code
    std::vector<float> values;
};

namespace report_detail {

[[nodiscard]] inline float scalar_at(bytes record, std::size_t offset)
{
    kvarn::half h;
    std::memcpy(&h, record.data() + offset, sizeof h);
    return kvarn::to_float(h);
}

/// Code number `index` of a little-endian bit stream.
[[nodiscard]] inline unsigned code_at(bytes stream, std::size_t index, int bits)
{
    unsigned code = 0;
    for (int bit = 0; bit < bits; ++bit) {
        const std::size_t at = index * static_cast<std::size_t>(bits) + static_cast<std::size_t>(bit);
        code |= (static_cast<unsigned>(stream[at / 8]) >> (at % 8) & 1u) << bit;
    }
    return code;
}

/// Divides each line (`n` values, `step` apart) by its standard deviation about its mean.
inline void divide_by_deviation(float* x, std::size_t n, std::size_t step)
{
    double mean = 0, squares = 0;
    for (std::size_t i = 0; i < n; ++i) mean += static_cast<double>(x[i * step]) / static_cast<double>(n);
    for (std::size_t i = 0; i < n; ++i) {
        const double d = static_cast<double>(x[i * step]) - mean;
        squares += d * d;
    }
    const float deviation = static_cast<float>(std::max(std::sqrt(squares / static_cast<double>(n - 1)), 1e-12));
    for (std::size_t i = 0; i < n; ++i) x[i * step] /= deviation;
}

/// The four stages of K (or V), [channel][token]; `tile` is [token][channel] in the original basis.
inline void append_stages(std::vector<stage>& out, bool is_key, const kvarn::format& f, bytes record, const float* tile)
{
    const kvarn::record_layout at = kvarn::layout_of(f);
    const auto tokens = static_cast<std::size_t>(f.group());
    const auto channels = static_cast<std::size_t>(is_key ? f.head_dim_k() : f.head_dim_v());
    const int bits = is_key ? f.key_bits() : f.value_bits();
    const std::string what = is_key ? "K " : "V ";
    const auto channel_major = [&](const std::vector<float>& m) {
        std::vector<float> turned(m.size());
        for (std::size_t t = 0; t < tokens; ++t)
            for (std::size_t c = 0; c < channels; ++c) turned[c * tokens + t] = m[t * channels + c];
        return turned;
    };
    std::vector<float> values(tile, tile + tokens * channels);
    out.push_back({what + "raw", "value", tokens, channels, 0, channel_major(values)});
    check(kvarn::rotate(kvarn::head_major(values.data(), tokens, 1, channels)), "tile");
    out.push_back({what + "rotated", "value", tokens, channels, 0, channel_major(values)});

    stage normalised{what + "normalised", "standard deviations", tokens, channels, 0, channel_major(values)};
    stage quantized{what + "quantized", "code", tokens, channels, (1 << bits) - 1, std::vector<float>(values.size())};
    for (std::size_t c = 0; c < channels; ++c)
        for (std::size_t t = 0; t < tokens; ++t) {
            const float scale =
                is_key ? scalar_at(record, at.k_token_scale + 2 * t) : scalar_at(record, at.v_channel_scale + 2 * c);
            normalised.values[c * tokens + t] /= std::max(scale, 1e-8f);
            quantized.values[c * tokens + t] = static_cast<float>(
                code_at(record.subspan(is_key ? at.k_codes : at.v_codes), is_key ? c * tokens + t : t * channels + c, bits));
        }
    if (is_key)
        for (std::size_t c = 0; c < channels; ++c) divide_by_deviation(normalised.values.data() + c * tokens, tokens, 1);
    else
        for (std::size_t t = 0; t < tokens; ++t) divide_by_deviation(normalised.values.data() + t, channels, tokens);
    out.push_back(std::move(normalised));
    out.push_back(std::move(quantized));
}

}  // namespace report_detail

/// Raw, rotated, normalised, quantized: of K, then of V. The normalisation is read back from the record.
[[nodiscard]] inline std::vector<stage> tile_stages(const kvarn::format& f, bytes record, const float* k, const float* v)
{
    std::vector<stage> stages;
    report_detail::append_stages(stages, true, f, record, k);
    report_detail::append_stages(stages, false, f, record, v);
    return stages;
}

}  // namespace kvarn_cli
