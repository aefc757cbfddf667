// SPDX-License-Identifier: Apache-2.0
#pragma once
// The method as the paper writes it, in plain loops over float: the yardstick of the benchmarks, left to the compiler's
// vectoriser. Not the library's arithmetic and not its oracle (tests/reference is that one).

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <vector>

namespace textbook {

/// In-place Walsh-Hadamard transform of n = 2^k values, scaled by 1 / sqrt(n).
inline void hadamard(float* x, int n)
{
    for (int h = 1; h < n; h *= 2)
        for (int i = 0; i < n; i += 2 * h)
            for (int j = i; j < i + h; ++j) {
                const float a = x[j], b = x[j + h];
                x[j] = a + b;
                x[j + h] = a - b;
            }
    const float scale = 1.0f / std::sqrt(static_cast<float>(n));
    for (int i = 0; i < n; ++i) x[i] *= scale;
}

/// Working memory of one tile of rows x columns.
struct tile {
    tile(int rows_, int columns_)
        : rows(rows_), columns(columns_), m(size()), cur(size()), log0(static_cast<std::size_t>(rows)), s0(log0), best0(log0),
          std0(log0), log1(static_cast<std::size_t>(columns)), s1(log1), best1(log1), std1(log1), mean1(log1)
    {
    }
    std::size_t size() const { return static_cast<std::size_t>(rows) * static_cast<std::size_t>(columns); }
    float& at(std::vector<float>& x, int i, int j) const { return x[static_cast<std::size_t>(i) * static_cast<std::size_t>(columns) + static_cast<std::size_t>(j)]; }

    int rows, columns;
    std::vector<float> m, cur, log0, s0, best0, std0, log1, s1, best1, std1, mean1;
};

inline void scale(tile& t)
{
    const auto n0 = static_cast<std::size_t>(t.rows), n1 = static_cast<std::size_t>(t.columns);
    for (std::size_t i = 0; i < n0; ++i) t.s0[i] = std::exp(t.log0[i]);
    for (std::size_t j = 0; j < n1; ++j) t.s1[j] = std::exp(t.log1[j]);
    for (std::size_t i = 0; i < n0; ++i)
        for (std::size_t j = 0; j < n1; ++j) t.cur[i * n1 + j] = t.m[i * n1 + j] / t.s0[i] / t.s1[j];
}

inline void deviations0(tile& t)
{
    const auto n0 = static_cast<std::size_t>(t.rows), n1 = static_cast<std::size_t>(t.columns);
    for (std::size_t i = 0; i < n0; ++i) {
        float sum = 0, square = 0;
        for (std::size_t j = 0; j < n1; ++j) sum += t.cur[i * n1 + j];
        const float mean = sum / static_cast<float>(n1);
        for (std::size_t j = 0; j < n1; ++j) square += (t.cur[i * n1 + j] - mean) * (t.cur[i * n1 + j] - mean);
        t.std0[i] = std::sqrt(square / static_cast<float>(n1 - 1));
    }
}

inline void deviations1(tile& t)
{
    const auto n0 = static_cast<std::size_t>(t.rows), n1 = static_cast<std::size_t>(t.columns);
    std::fill(t.mean1.begin(), t.mean1.end(), 0.0f);
    std::fill(t.std1.begin(), t.std1.end(), 0.0f);
    for (std::size_t i = 0; i < n0; ++i)
        for (std::size_t j = 0; j < n1; ++j) t.mean1[j] += t.cur[i * n1 + j];
    for (std::size_t j = 0; j < n1; ++j) t.mean1[j] /= static_cast<float>(n0);
    for (std::size_t i = 0; i < n0; ++i)
        for (std::size_t j = 0; j < n1; ++j) t.std1[j] += (t.cur[i * n1 + j] - t.mean1[j]) * (t.cur[i * n1 + j] - t.mean1[j]);
    for (std::size_t j = 0; j < n1; ++j) t.std1[j] = std::sqrt(t.std1[j] / static_cast<float>(n0 - 1));
}

inline float imbalance(tile& t)
{
    deviations0(t);
    deviations1(t);
    const auto ratio = [](const std::vector<float>& x) {
        return *std::max_element(x.begin(), x.end()) / std::max(*std::min_element(x.begin(), x.end()), 1e-8f);
    };
    return ratio(t.std0) + ratio(t.std1);
}

/// Eight iterations of variance normalisation of t.m; the kept factors are in best0 and best1.
inline void normalize(tile& t)
{
    const auto update = [](std::vector<float>& log, const std::vector<float>& deviation) {
        for (std::size_t i = 0; i < log.size(); ++i)
            log[i] = std::clamp(log[i] + std::log(std::clamp(deviation[i], 1e-3f, 1e3f)), -0.3f, 10.0f);
    };
    std::fill(t.log0.begin(), t.log0.end(), 0.0f);
    std::fill(t.log1.begin(), t.log1.end(), 0.0f);
    scale(t);
    float best = imbalance(t);
    t.best0 = t.s0;
    t.best1 = t.s1;
    for (int iteration = 0; iteration < 8; ++iteration) {
        deviations1(t);
        update(t.log1, t.std1);
        scale(t);
        deviations0(t);
        update(t.log0, t.std0);
        scale(t);
        const float now = imbalance(t);
        if (now <= best) {
            best = now;
            t.best0 = t.s0;
            t.best1 = t.s1;
        }
    }
}

/// Min-max rounding of the normalised tile to 2- or 4-bit codes, packed row after row.
inline void round_and_pack(tile& t, int bits, std::uint8_t* packed)
{
    const auto n0 = static_cast<std::size_t>(t.rows), n1 = static_cast<std::size_t>(t.columns);
    const float levels = static_cast<float>((1 << bits) - 1);
    const std::size_t per_byte = 8 / static_cast<std::size_t>(bits);
    for (std::size_t i = 0; i < n0; ++i)
        for (std::size_t j = 0; j < n1; ++j) t.cur[i * n1 + j] = t.m[i * n1 + j] / t.best0[i] / t.best1[j];
    for (std::size_t i = 0; i < n0; ++i) {
        const float* const row = t.cur.data() + i * n1;
        const float low = *std::min_element(row, row + n1), high = *std::max_element(row, row + n1);
        const float step = std::max((high - low) / levels, 1e-10f);
        for (std::size_t j = 0; j < n1; j += per_byte) {
            unsigned byte = 0;
            for (std::size_t e = 0; e < per_byte; ++e)
                byte |= static_cast<unsigned>(std::clamp(std::nearbyint((row[j + e] - low) / step), 0.0f, levels)) << (e * static_cast<std::size_t>(bits));
            *packed++ = static_cast<std::uint8_t>(byte);
        }
    }
}

/// The whole seal of one V tile [token][channel] of floats.
inline void seal(const float* values, tile& t, int bits, std::uint8_t* packed)
{
    std::copy(values, values + t.size(), t.m.begin());
    for (int i = 0; i < t.rows; ++i) hadamard(&t.at(t.m, i, 0), t.columns);
    normalize(t);
    round_and_pack(t, bits, packed);
}

}  // namespace textbook
