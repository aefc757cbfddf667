// SPDX-License-Identifier: Apache-2.0
#pragma once
// New sequences of the pointer-chasing task. n symbols form one random cycle. A sequence is the cycle as shuffled
// pairs of a symbol's key and the symbol after it, a START token, then the walk along the cycle from a random symbol:
// 3 n + 1 tokens. A symbol s is token s as a value and in the walk, n + s as a key; START is 2 n. The same seed gives
// the same sequences everywhere.

#include <cstddef>
#include <cstdint>
#include <numeric>
#include <utility>
#include <vector>

namespace language_model {

/// splitmix64.
class walk_random {
public:
    explicit walk_random(std::uint64_t seed) : state_(seed) {}

    /// A number below n; the bias of the remainder is below 2^-50 for the n in question.
    std::size_t below(std::size_t n)
    {
        std::uint64_t z = (state_ += 0x9e3779b97f4a7c15u);
        z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
        z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
        return static_cast<std::size_t>((z ^ (z >> 31)) % n);
    }

    /// 0 .. n - 1 in random order.
    std::vector<std::int32_t> permutation(std::size_t n)
    {
        std::vector<std::int32_t> p(n);
        std::iota(p.begin(), p.end(), 0);
        for (std::size_t i = n; i > 1; --i) std::swap(p[i - 1], p[below(i)]);
        return p;
    }

private:
    std::uint64_t state_;
};

[[nodiscard]] inline std::vector<std::vector<std::int32_t>> new_walks(std::size_t count, std::uint64_t seed, std::size_t symbols)
{
    const auto n = static_cast<std::int32_t>(symbols);
    walk_random random(seed);
    std::vector<std::vector<std::int32_t>> sequences(count);
    for (auto& sequence : sequences) {
        const auto cycle = random.permutation(symbols);
        sequence.reserve(3 * symbols + 1);
        for (const std::int32_t at : random.permutation(symbols)) {
            const auto place = static_cast<std::size_t>(at);
            sequence.push_back(n + cycle[place]);
            sequence.push_back(cycle[(place + 1) % symbols]);
        }
        sequence.push_back(2 * n);
        const std::size_t first = random.below(symbols);
        for (std::size_t i = 0; i < symbols; ++i) sequence.push_back(cycle[(first + i) % symbols]);
    }
    return sequences;
}

}  // namespace language_model
