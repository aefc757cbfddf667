// SPDX-License-Identifier: Apache-2.0
#pragma once
// What per-token figures amount to: means with standard errors, percentiles, ranges of positions.
// In: one list of figures per sequence, in order of position. Out: numbers. Sums in double.

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <span>
#include <vector>

namespace language_model {

/// A mean and how far it may be off. Neighbouring tokens are alike, so the error is that of means over runs of
/// `run_tokens` tokens, which never cross from one sequence to the next; NaN where there are fewer than two of them.
struct estimate {
    static constexpr std::size_t run_tokens = 64;

    double mean = 0, error = 0;
};

/// `figures(sequence)` is the list of one sequence: anything that has size() and [].
template <class Figures>
[[nodiscard]] estimate estimate_of(std::size_t sequences, Figures&& figures)
{
    double sum = 0;
    std::size_t count = 0;
    std::vector<std::pair<double, double>> runs;  // length, sum
    for (std::size_t s = 0; s < sequences; ++s) {
        const auto& one = figures(s);
        for (std::size_t first = 0; first < one.size(); first += estimate::run_tokens) {
            const std::size_t end = std::min(one.size(), first + estimate::run_tokens);
            double run = 0;
            for (std::size_t i = first; i < end; ++i) run += static_cast<double>(one[i]);
            runs.emplace_back(static_cast<double>(end - first), run);
            sum += run;
            count += end - first;
        }
    }
    if (count == 0) return {NAN, NAN};
    estimate e{sum / static_cast<double>(count), NAN};
    if (runs.size() < 2) return e;
    // The error of a ratio of sums; runs weigh as much as they are long.
    double squares = 0;
    for (const auto& [length, total] : runs) squares += (total - e.mean * length) * (total - e.mean * length);
    const auto n = static_cast<double>(runs.size());
    e.error = std::sqrt(squares * n / (n - 1)) / static_cast<double>(count);
    return e;
}

/// The smallest figure that at least `share` of all are not above; `sorted` is not empty.
[[nodiscard]] inline double quantile(const std::vector<float>& sorted, double share)
{
    const double rank = std::ceil(share * static_cast<double>(sorted.size()) - 1e-9);
    return static_cast<double>(sorted[std::min(sorted.size(), static_cast<std::size_t>(std::max(rank, 1.0))) - 1]);
}

/// Positions [first, end).
struct position_range {
    std::size_t first = 0, end = 0;
};

/// Cuts [first, end) at powers of two from 64 on; a piece that is less than half of what it would be joins its neighbour.
[[nodiscard]] inline std::vector<position_range> ranges_of(std::size_t first, std::size_t end)
{
    std::vector<position_range> ranges;
    for (std::size_t at = first, cut = 64; at < end; cut *= 2) {
        if (cut <= at || (ranges.empty() && cut < end && 4 * (cut - at) < cut)) continue;
        const std::size_t stop = std::min(cut, end);
        if (!ranges.empty() && stop == end && 2 * (stop - at) < cut / 2)
            ranges.back().end = end;
        else
            ranges.push_back({at, stop});
        at = stop;
    }
    return ranges;
}

}  // namespace language_model
