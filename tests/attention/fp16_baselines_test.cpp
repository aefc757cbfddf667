// SPDX-License-Identifier: Apache-2.0
// The baselines of the benchmarks compute attention: against double precision, for every shape that is measured.

#include <cmath>
#include <random>
#include <vector>

#include "../../bench/attention/fp16_attention.hpp"
#include "../../bench/attention/token_major_attention.hpp"
#include "../catch.hpp"

namespace {

constexpr std::size_t tokens = 192;

std::vector<kvarn::half> random_halves(std::size_t n, unsigned seed)
{
    std::mt19937 engine(seed);
    std::normal_distribution<float> normal;
    std::vector<kvarn::half> x(n);
    for (kvarn::half& each : x) each = kvarn::to_half(normal(engine));
    return x;
}

/// The largest difference of out[d] from attention of one query head over rows `stride` apart.
double error_of(const kvarn::half* k, const kvarn::half* v, std::size_t stride, std::size_t d, const float* q, const float* out)
{
    std::vector<double> sums(d);
    double total = 0.0, worst = 0.0;
    for (std::size_t t = 0; t < tokens; ++t) {
        double score = 0.0;
        for (std::size_t c = 0; c < d; ++c) score += static_cast<double>(kvarn::to_float(k[t * stride + c])) * static_cast<double>(q[c]);
        const double weight = std::exp(score);
        total += weight;
        for (std::size_t c = 0; c < d; ++c) sums[c] += weight * static_cast<double>(kvarn::to_float(v[t * stride + c]));
    }
    for (std::size_t c = 0; c < d; ++c) worst = std::max(worst, std::fabs(static_cast<double>(out[c]) - sums[c] / total));
    return worst;
}

template <int HeadDim, int R>
void check()
{
    constexpr std::size_t d = HeadDim;
    const auto k = random_halves(tokens * d, 1), v = random_halves(tokens * d, 2);
    std::mt19937 engine(3);
    std::normal_distribution<float> normal(0.0f, 2.0f / std::sqrt(static_cast<float>(d)));
    std::vector<float> q(R * d), out(R * d, -77.0f), other(d, -77.0f);
    for (float& x : q) x = normal(engine);
    kvarn_bench::fp16_attention<HeadDim, R>(k.data(), v.data(), tokens, q.data(), out.data());
    for (std::size_t h = 0; h < R; ++h) {
        INFO("head_dim " << d << ", " << R << " query heads, head " << h);
        CHECK(error_of(k.data(), v.data(), d, d, q.data() + h * d, out.data() + h * d) < 1e-5);
    }
    kvarn_bench::token_major_attention(k.data(), v.data(), tokens, HeadDim, HeadDim, q.data(), other.data());
    CHECK(error_of(k.data(), v.data(), d, d, q.data(), other.data()) < 1e-5);
}

template <int HeadDim>
void check_rows()
{
    check<HeadDim, 1>();
    check<HeadDim, 2>();
    check<HeadDim, 4>();
    check<HeadDim, 8>();
}

}  // namespace

TEST_CASE("attention/fp16_baselines: both are attention", "[unit]")
{
    check_rows<64>();
    check_rows<80>();
    check_rows<96>();
    check_rows<128>();
    check_rows<256>();
}

TEST_CASE("attention/fp16_baselines: rows of a token-major cache lie a token apart", "[unit]")
{
    constexpr std::size_t d = 48, heads = 3, stride = heads * d;
    const auto k = random_halves(tokens * stride, 4), v = random_halves(tokens * stride, 5);
    const std::vector<float> q(d, 0.1f);
    for (std::size_t h = 0; h < heads; ++h) {
        std::vector<float> out(d, -77.0f);
        kvarn_bench::token_major_attention(k.data() + h * d, v.data() + h * d, tokens, stride, d, q.data(), out.data());
        CHECK(error_of(k.data() + h * d, v.data() + h * d, stride, d, q.data(), out.data()) < 1e-5);
    }
}
