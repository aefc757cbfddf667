// SPDX-License-Identifier: Apache-2.0
#pragma once
// The codes of TurboQuant (arXiv 2504.19874, the variant that minimises squared error): after a random rotation every
// coordinate of a token of norm sqrt(d) is close to a standard normal number, so each is rounded to the nearest level
// of that distribution's optimal scalar quantizer. Kept besides: one half per token. The quantizer is computed, not
// tabulated.

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <numbers>
#include <vector>

#include <kvarn/base/element.hpp>

namespace kvarn_cli {

/// The levels that minimise the mean squared error of rounding a standard normal number to 2^bits levels (Lloyd, Max).
class lloyd_max {
public:
    explicit lloyd_max(int bits) : levels_(std::size_t{1} << bits)
    {
        const auto n = static_cast<double>(levels_.size());
        for (std::size_t i = 0; i < levels_.size(); ++i) levels_[i] = 4 * (2 * static_cast<double>(i) + 1 - n) / n;
        // Borders halfway between levels, levels at the means of their cells, until nothing moves.
        for (double moved = 1; moved > 1e-12;) {
            moved = 0;
            const std::vector<double> before = levels_;
            for (std::size_t i = 0; i < levels_.size(); ++i) {
                const double low = i == 0 ? -INFINITY : (before[i - 1] + before[i]) / 2;
                const double high = i + 1 == levels_.size() ? INFINITY : (before[i] + before[i + 1]) / 2;
                levels_[i] = (density(low) - density(high)) / (below(high) - below(low));
                moved = std::max(moved, std::fabs(levels_[i] - before[i]));
            }
        }
        for (std::size_t i = 0; i + 1 < levels_.size(); ++i) borders_.push_back((levels_[i] + levels_[i + 1]) / 2);
    }

    [[nodiscard]] const std::vector<double>& levels() const noexcept { return levels_; }

    /// The level nearest to x.
    [[nodiscard]] float round(float x) const
    {
        const auto above = std::lower_bound(borders_.begin(), borders_.end(), static_cast<double>(x));
        return static_cast<float>(levels_[static_cast<std::size_t>(above - borders_.begin())]);
    }

    /// Rounds one rotated token; the stored half is what gives the levels the norm of the token.
    void round_token(float* x, std::size_t channels) const
    {
        double norm = 0, coded = 0;
        for (std::size_t i = 0; i < channels; ++i) norm += static_cast<double>(x[i]) * static_cast<double>(x[i]);
        if (norm == 0) return;
        const auto to_unit = static_cast<float>(std::sqrt(static_cast<double>(channels) / norm));
        for (std::size_t i = 0; i < channels; ++i) {
            x[i] = round(x[i] * to_unit);
            coded += static_cast<double>(x[i]) * static_cast<double>(x[i]);
        }
        const float stored = kvarn::to_float(kvarn::saturate_to<kvarn::half>(static_cast<float>(std::sqrt(norm / coded))));
        for (std::size_t i = 0; i < channels; ++i) x[i] *= stored;
    }

private:
    static double density(double x) { return std::isinf(x) ? 0 : std::exp(-x * x / 2) / std::sqrt(2 * std::numbers::pi); }
    static double below(double x) { return std::erfc(-x / std::numbers::sqrt2) / 2; }

    std::vector<double> levels_, borders_;
};

/// The signs that stand before the Hadamard matrix, the same for every token: top bits of splitmix64 from the seed 0.
[[nodiscard]] inline std::vector<float> random_signs(std::size_t channels)
{
    std::vector<float> signs(channels);
    std::uint64_t state = 0;
    for (float& sign : signs) {
        std::uint64_t z = (state += 0x9e3779b97f4a7c15u);
        z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
        z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
        sign = ((z ^ (z >> 31)) >> 63) != 0 ? -1.0f : 1.0f;
    }
    return signs;
}

}  // namespace kvarn_cli
