// SPDX-License-Identifier: Apache-2.0
#pragma once
// Drafts for speculative decoding: guesses of the next tokens, which the model checks all at once. In: the tokens so far. Out: a few more. Two
// sources: n-grams (what followed the last time that the newest tokens occurred), and the expected text with errors at a given rate, which
// stands for a draft model of that accuracy. Besides, checked drafts can be rejected at random, so that rollbacks happen at any rate.

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "requests.hpp"

namespace serving {

enum class draft_source { none, ngram, expected };

struct draft_options {
    draft_source source = draft_source::none;
    std::size_t most = 4;    ///< tokens at once
    double accuracy = 0.8;   ///< of the expected text: the share of tokens that are left as they are
    double rejection = 0.0;  ///< the share of right drafts that are rejected all the same
    std::uint64_t seed = 1;
};

class drafter {
public:
    drafter(const draft_options& options, std::size_t vocabulary) : options_(options), vocabulary_(vocabulary), random_(options.seed) {}

    /// At most `most` tokens after the `known` ones of a request.
    [[nodiscard]] tokens propose(const request& r, std::span<const std::int32_t> known, std::size_t most)
    {
        most = std::min(most, options_.most);
        switch (options_.source) {
        case draft_source::none: break;
        case draft_source::ngram: return after_last_ngram(known, most);
        case draft_source::expected: return expected_with_errors(r, known.size() - r.prompt.size(), most);
        }
        return {};
    }

    /// Whether a draft that is right is rejected.
    [[nodiscard]] bool rejects() { return options_.rejection > 0 && below(options_.rejection); }

private:
    [[nodiscard]] bool below(double share)
    {
        return static_cast<double>(random_.below(std::size_t{1} << 20)) < share * static_cast<double>(std::size_t{1} << 20);
    }

    [[nodiscard]] static tokens after_last_ngram(std::span<const std::int32_t> known, std::size_t most)
    {
        for (const std::size_t n : {std::size_t{3}, std::size_t{2}, std::size_t{1}}) {
            if (known.size() <= n) continue;
            const auto newest = known.last(n);
            for (std::size_t begin = known.size() - n; begin-- > 0;)
                if (std::equal(newest.begin(), newest.end(), known.begin() + static_cast<std::ptrdiff_t>(begin))) {
                    const auto rest = known.subspan(begin + n);
                    return {rest.begin(), rest.begin() + static_cast<std::ptrdiff_t>(std::min(most, rest.size()))};
                }
        }
        return {};
    }

    [[nodiscard]] tokens expected_with_errors(const request& r, std::size_t generated, std::size_t most)
    {
        tokens out;
        for (std::size_t i = generated; i < r.expected.size() && out.size() < most; ++i)
            out.push_back(below(options_.accuracy) ? r.expected[i] : static_cast<std::int32_t>(random_.below(vocabulary_)));
        return out;
    }

    draft_options options_;
    std::size_t vocabulary_;
    language_model::walk_random random_;
};

}  // namespace serving
