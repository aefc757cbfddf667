// SPDX-License-Identifier: Apache-2.0
#pragma once
// Reproducible random numbers.

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <initializer_list>

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
    template <class T>
    T pick(std::initializer_list<T> all)
    {
        return all.begin()[below(all.size())];
    }
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

}  // namespace support
