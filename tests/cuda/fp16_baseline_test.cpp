// SPDX-License-Identifier: Apache-2.0
// The benchmark's fp16 baseline (bench/cuda) against softmax(q k^T / sqrt(d)) v in double: what is compared with must be right.
// Compiled for fibers; on a device the benchmark itself compares its outputs.

#include "../catch.hpp"

#if defined(KVARN_TEST_ON_DEVICE)

TEST_CASE("cuda/fp16 baseline: on fibers only", "[cuda][baseline]")
{
    WARN("not run on a device: kvarn_cuda_bench compares the baseline's outputs there");
}

#else

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <vector>

#include "../../bench/cuda/fp16_tensor_attention.cuh"
#include "../support/random_tiles.hpp"
#include "run.hpp"

namespace {

constexpr int dim = bench::fp16_dim, page_tokens = bench::fp16_page_tokens, kv_heads = 2, sequences = 2;

struct problem {
    int tokens, rows, splits;
    float gain;  // of the keys: a large one makes one token win
};

/// Tokens and queries; places that no token has are not numbers.
struct cache {
    explicit cache(const problem& p, std::uint64_t seed) : pages((p.tokens + page_tokens - 1) / page_tokens)
    {
        support::random_source random(seed);
        const auto n = static_cast<std::size_t>(sequences * pages);
        table.resize(n);
        std::iota(table.begin(), table.end(), 0);
        for (std::size_t i = n; i > 1; --i) std::swap(table[i - 1], table[random.below(i)]);
        k.assign(n * page_tokens * kv_heads * dim, kvarn::to_half(std::numeric_limits<float>::quiet_NaN()));
        v = k;
        const auto gaussian = [&](double gain) { return kvarn::to_half(static_cast<float>(gain * random.gaussian())); };
        for (int s = 0; s < sequences; ++s)
            for (int t = 0; t < p.tokens; ++t)
                for (int i = 0; i < kv_heads * dim; ++i) {
                    k[at(s, t, 0) + static_cast<std::size_t>(i)] = gaussian(static_cast<double>(p.gain));
                    v[at(s, t, 0) + static_cast<std::size_t>(i)] = gaussian(1.0);
                }
        q.resize(static_cast<std::size_t>(sequences * kv_heads * p.rows * dim));
        for (kvarn::half& x : q) x = gaussian(1.0);
    }
    [[nodiscard]] std::size_t at(int sequence, int token, int head) const
    {
        const auto page = static_cast<std::size_t>(table[static_cast<std::size_t>(sequence * pages + token / page_tokens)]);
        return ((page * page_tokens + static_cast<std::size_t>(token % page_tokens)) * kv_heads +
                static_cast<std::size_t>(head)) *
               dim;
    }
    int pages;
    std::vector<std::int32_t> table;
    support::shared_vector<kvarn::half> k, v, q;
};

/// The attention of query vector `row` of [sequence][kv head][row], in double.
std::vector<double> expected(const problem& p, const cache& x, int row)
{
    const int head = row / p.rows % kv_heads, sequence = row / p.rows / kv_heads;
    const auto value = [](kvarn::half h) { return static_cast<double>(kvarn::to_float(h)); };
    std::vector<double> score(static_cast<std::size_t>(p.tokens)), out(dim);
    for (int t = 0; t < p.tokens; ++t) {
        const kvarn::half* const key = x.k.data() + x.at(sequence, t, head);
        double dot = 0.0;
        for (int d = 0; d < dim; ++d) dot += value(key[d]) * value(x.q[static_cast<std::size_t>(row * dim + d)]);
        score[static_cast<std::size_t>(t)] = dot / std::sqrt(static_cast<double>(dim));
    }
    const double most = *std::max_element(score.begin(), score.end());
    double total = 0.0;
    for (int t = 0; t < p.tokens; ++t) {
        const double weight = std::exp(score[static_cast<std::size_t>(t)] - most);
        total += weight;
        const kvarn::half* const from = x.v.data() + x.at(sequence, t, head);
        for (int d = 0; d < dim; ++d) out[static_cast<std::size_t>(d)] += weight * value(from[d]);
    }
    for (double& o : out) o /= total;
    return out;
}

/// ||got - expected|| / ||expected|| of one body.
template <class Body>
double error_of(const problem& p, const cache& x, int step)
{
    namespace body = kvarn::cuda::detail;
    const auto vectors = static_cast<std::size_t>(sequences * kv_heads * p.rows);
    support::shared_vector<float> workspace(bench::fp16_workspace_floats(vectors, p.splits)), out(vectors * dim);
    std::fill(workspace.begin(), workspace.end(), std::numeric_limits<float>::quiet_NaN());
    const bench::fp16_call c{
        x.k.data(), x.v.data(), x.table.data(), x.q.data(), workspace.data(),
        kv_heads,   x.pages,    p.tokens,       p.splits,   body::log2_e / std::sqrt(static_cast<float>(dim))};
    support::run_blocks(sequences * kv_heads * p.splits, bench::fp16_threads, Body::shared_bytes, step,
                        [&](auto& team, int item, float* shared) { Body::run(team, c, item, shared); });
    const int vector_heads = kv_heads * p.rows;
    const body::attention_call merge = bench::fp16_combine_call(
        c, sequences, p.rows, {out.data(), kvarn::cuda::element_type::f32, vector_heads * dim, vector_heads * dim, dim});
    support::run_blocks(static_cast<int>(vectors), body::combine_threads, body::combine_shared_bytes(dim), step,
                        [&](auto& team, int item, float* shared) { body::combine_item(team, merge, item, shared); });
    double error = 0.0, norm = 0.0;
    for (std::size_t row = 0; row < vectors; ++row) {
        const std::vector<double> wanted = expected(p, x, static_cast<int>(row));
        for (std::size_t d = 0; d < dim; ++d) {
            const double e = static_cast<double>(out[row * dim + d]) - wanted[d];
            error += e * e;
            norm += wanted[d] * wanted[d];
        }
    }
    const double relative = std::sqrt(error / norm);
    return relative >= 0.0 ? relative : 1e9;  // not a number: something was not written, or read that must not be
}

template <int Rows>
void expect_close(int tokens, int splits, float gain)
{
    const problem p{tokens, Rows, splits, gain};
    const cache x(p, static_cast<std::uint64_t>(tokens * 100 + splits * 10 + Rows));
    const double tensor = error_of<bench::fp16_tensor<Rows>>(p, x, 37), cores = error_of<bench::fp16_cores<Rows>>(p, x, 1);
    CAPTURE(tokens, Rows, splits, gain, tensor, cores);
    CHECK(tensor < 1e-3);
    CHECK(cores < 1e-5);
}

}  // namespace

TEST_CASE("cuda/fp16 baseline: token counts, splits and rows", "[cuda][baseline]")
{
    for (const int tokens : {1, 15, 16, 17, 100, 1000})
        for (const int splits : {1, 3}) {
            expect_close<1>(tokens, splits, 1.0f);
            expect_close<4>(tokens, splits, 1.0f);
            expect_close<8>(tokens, splits, 1.0f);
        }
    expect_close<8>(1000, 20, 1.0f);  // some splits have nothing
}

TEST_CASE("cuda/fp16 baseline: weights from even to one", "[cuda][baseline]")
{
    for (const float gain : {0.0f, 4.0f, 30.0f}) {
        expect_close<1>(200, 2, gain);
        expect_close<8>(200, 2, gain);
    }
}

#endif
