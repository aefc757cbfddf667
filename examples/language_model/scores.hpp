// SPDX-License-Identifier: Apache-2.0
#pragma once
// What caches do to the prediction of each token, beside the exact one: negative log-likelihood of the right token,
// KL divergence from the exact distribution, whether the most likely token is the exact run's, and whether it is the
// right one. In: hidden states [cache][token] of one block, cache 0 exact. Out: four figures per cache and token.
// Logits are made and forgotten in blocks of the vocabulary, so that memory does not grow with it; float within a
// block, double across blocks, the same on any team.

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <span>
#include <vector>

#include <Eigen/Core>

#include "model.hpp"
#include "team.hpp"

namespace language_model {

/// Figures of one sequence with one cache, one per predicted token. Divergences and likelihoods are in nats.
struct token_scores {
    std::vector<float> nll, kl;
    std::vector<std::uint8_t> agrees, right;  ///< the most likely token is that of the exact cache; is the right one

    [[nodiscard]] std::size_t size() const noexcept { return nll.size(); }
};

namespace scores_detail {

/// What is known of one row of logits after some blocks of the vocabulary. Exponentials are relative to `largest`.
struct running {
    float largest = -std::numeric_limits<float>::infinity();
    std::int32_t argmax = 0;
    double sum = 0;       ///< of exponentials
    double distance = 0;  ///< sum of exact exponentials, relative to the exact row's largest, times (exact logit - this one)

    /// Takes in what comes after; `exact_before` and `exact_block` are the exact row's largest until now and in that
    /// block.
    void add(const running& block, float exact_before, float exact_block)
    {
        const float both = std::max(largest, block.largest), exact_both = std::max(exact_before, exact_block);
        sum = scaled(sum, largest - both) + scaled(block.sum, block.largest - both);
        distance = scaled(distance, exact_before - exact_both) + scaled(block.distance, exact_block - exact_both);
        if (block.largest > largest) argmax = block.argmax;
        largest = both;
    }
    [[nodiscard]] double log_sum() const { return static_cast<double>(largest) + std::log(sum); }

private:
    static double scaled(double x, float exponent) { return x == 0 ? 0 : x * std::exp(static_cast<double>(exponent)); }
};

}  // namespace scores_detail

/// Scores `count` tokens of a block from its token `first` on, whose right successors are `right`, and appends to
/// scores[cache]. states: [cache][token of the block]; cache 0 is exact.
inline void score_tokens(const model& m, const matrix& states, std::size_t caches, std::size_t first,
                         std::span<const std::int32_t> right, std::vector<token_scores>& scores, team& helpers)
{
    using scores_detail::running;
    constexpr std::size_t width = 1024;  // of a block of the vocabulary
    const std::size_t count = right.size(), rows = caches * count, in_block = static_cast<std::size_t>(states.rows()) / caches;
    const std::size_t vocabulary = m.config.vocabulary, blocks = (vocabulary + width - 1) / width;
    const auto index = [](std::size_t n) { return static_cast<Eigen::Index>(n); };
    matrix chosen(index(rows), states.cols());
    for (std::size_t cache = 0; cache < caches; ++cache)
        chosen.middleRows(index(cache * count), index(count)) = states.middleRows(index(cache * in_block + first), index(count));

    std::vector<running> parts(blocks * rows);
    std::vector<float> right_logit(rows);
    helpers.each(blocks, [&](std::size_t block) {
        const std::size_t begin = block * width, some = std::min(width, vocabulary - begin);
        matrix logits(index(rows), index(some));
        logits.noalias() = chosen * m.head().middleRows(index(begin), index(some)).transpose();
        Eigen::ArrayXf weights(index(some));
        for (std::size_t t = 0; t < count; ++t) {
            const auto exact = logits.row(index(t)).transpose().array();
            for (std::size_t cache = 0; cache < caches; ++cache) {
                const std::size_t row = cache * count + t;
                const auto x = logits.row(index(row)).transpose().array();
                running& part = parts[block * rows + row];
                Eigen::Index at = 0;
                part.largest = x.maxCoeff(&at);
                part.argmax = static_cast<std::int32_t>(begin + static_cast<std::size_t>(at));
                if (cache == 0) {
                    weights = (x - part.largest).exp();
                    part.sum = static_cast<double>(weights.sum());
                } else {
                    part.sum = static_cast<double>((x - part.largest).exp().sum());
                    part.distance = static_cast<double>((weights * (exact - x)).sum());
                }
                if (const auto id = static_cast<std::size_t>(right[t]); id >= begin && id < begin + some)
                    right_logit[row] = x[index(id - begin)];
            }
        }
    });

    std::vector<running> total(rows);
    for (std::size_t block = 0; block < blocks; ++block)
        for (std::size_t cache = caches; cache-- > 0;)  // the exact rows last, the others need what they were
            for (std::size_t t = 0; t < count; ++t)
                total[cache * count + t].add(parts[block * rows + cache * count + t], total[t].largest,
                                             parts[block * rows + t].largest);
    for (std::size_t cache = 0; cache < caches; ++cache)
        for (std::size_t t = 0; t < count; ++t) {
            const running &exact = total[t], &own = total[cache * count + t];
            if (!std::isfinite(own.log_sum())) throw failure("the logits of a token are not finite");
            const double log_sum = own.log_sum(), kl = own.distance / exact.sum + log_sum - exact.log_sum();
            scores[cache].nll.push_back(static_cast<float>(log_sum - static_cast<double>(right_logit[cache * count + t])));
            scores[cache].kl.push_back(static_cast<float>(std::max(kl, 0.0)));  // below zero by rounding only
            scores[cache].agrees.push_back(own.argmax == exact.argmax);
            scores[cache].right.push_back(own.argmax == right[t]);
        }
}

}  // namespace language_model
