// SPDX-License-Identifier: Apache-2.0
#pragma once
// What `kvarn compare` measures on K, V and the attention output: relative error of a tensor, error of the token scales,
// relative error of causal grouped-query attention. float products, double sums. Arrays are [head][token][channel].

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <vector>

#include "baselines.hpp"

namespace kvarn_cli {

/// ||X - X'|| / ||X|| over the whole tensor.
[[nodiscard]] inline double relative_error(const std::vector<float>& exact, const std::vector<float>& decoded)
{
    double difference = 0, norm = 0;
    for (std::size_t i = 0; i < exact.size(); ++i) {
        const double x = static_cast<double>(exact[i]), d = x - static_cast<double>(decoded[i]);
        difference += d * d;
        norm += x * x;
    }
    return norm > 0 ? std::sqrt(difference / norm) : difference > 0 ? INFINITY : 0.0;
}

/// Sums over one token's channels.
struct token_squares {
    double exact = 0, decoded = 0, difference = 0;
};

/// Calls f(token_squares) for every token of every head.
template <class F>
void for_tokens(const matrix& exact, const matrix& decoded, F&& f)
{
    for (std::size_t head = 0; head < exact.heads; ++head)
        for (std::size_t t = 0; t < exact.tokens; ++t) {
            token_squares sums;
            for (std::size_t c = 0; c < exact.channels; ++c) {
                const double x = static_cast<double>(exact.token(head, t)[c]), y = static_cast<double>(decoded.token(head, t)[c]);
                sums.exact += x * x;
                sums.decoded += y * y;
                sums.difference += (x - y) * (x - y);
            }
            f(sums);
        }
}

/// | ||x'|| / ||x|| - 1 | of every token of every head, sorted; tokens of norm zero are left out.
[[nodiscard]] inline std::vector<double> token_scale_errors(const matrix& exact, const matrix& decoded)
{
    std::vector<double> errors;
    errors.reserve(exact.heads * exact.tokens);
    for_tokens(exact, decoded, [&](const token_squares& t) {
        if (t.exact > 0) errors.push_back(std::fabs(std::sqrt(t.decoded / t.exact) - 1));
    });
    std::sort(errors.begin(), errors.end());
    return errors;
}

/// The share of the squared error that lies in token norms: ||x - x'||^2 = (||x|| - ||x'||)^2 (magnitude) + 2 ||x|| ||x'|| (1 - cos)
/// (direction), each summed over the tokens. 0 where there is no error.
[[nodiscard]] inline double magnitude_share(const matrix& exact, const matrix& decoded)
{
    double magnitude = 0, all = 0;
    for_tokens(exact, decoded, [&](const token_squares& t) {
        const double d = std::sqrt(t.exact) - std::sqrt(t.decoded);
        magnitude += d * d;
        all += t.difference;
    });
    return all > 0 ? magnitude / all : 0.0;
}

struct spread {
    double mean = 0, p99 = 0, worst = 0;
};

[[nodiscard]] inline spread spread_of(const std::vector<double>& sorted)
{
    if (sorted.empty()) return {};
    double sum = 0;
    for (const double e : sorted) sum += e;
    const auto rank = static_cast<std::size_t>(std::ceil(0.99 * static_cast<double>(sorted.size()))) - 1;
    return {sum / static_cast<double>(sorted.size()), sorted[rank], sorted.back()};
}

/// Causal attention of every `step`-th query, the newest included: output [query head][query][head_dim_v].
/// Query t sees tokens 0 .. t; query head h reads KV head h / (query heads / KV heads).
[[nodiscard]] inline std::vector<float> attend(const matrix& q, const matrix& k, const matrix& v, std::size_t step)
{
    const std::size_t per_kv_head = q.heads / k.heads;
    const float scale = 1 / std::sqrt(static_cast<float>(k.channels));
    std::vector<float> out, weights(k.tokens), sum(v.channels);
    for (std::size_t head = 0; head < q.heads; ++head) {
        const std::size_t kv_head = head / per_kv_head;
        for (std::size_t t = (k.tokens - 1) % step; t < k.tokens; t += step) {
            const float* query = q.token(head, t);
            float largest = -INFINITY;
            for (std::size_t s = 0; s <= t; ++s) {
                const float* key = k.token(kv_head, s);
                float lanes[8] = {};  // independent sums, which the compiler may keep in one register
                std::size_t c = 0;
                for (; c + 8 <= k.channels; c += 8)
                    for (std::size_t lane = 0; lane < 8; ++lane) lanes[lane] += query[c + lane] * key[c + lane];
                float dot = 0;
                for (const float lane : lanes) dot += lane;
                for (; c < k.channels; ++c) dot += query[c] * key[c];
                weights[s] = dot * scale;
                largest = std::max(largest, weights[s]);
            }
            double total = 0;
            std::fill(sum.begin(), sum.end(), 0.0f);
            for (std::size_t s = 0; s <= t; ++s) {
                const float weight = std::exp(weights[s] - largest);
                total += static_cast<double>(weight);
                const float* value = v.token(kv_head, s);
                for (std::size_t c = 0; c < v.channels; ++c) sum[c] += weight * value[c];
            }
            for (const float x : sum) out.push_back(static_cast<float>(static_cast<double>(x) / total));
        }
    }
    return out;
}

/// The smallest step between queries that keeps one attention pass within about `pairs` query-key pairs.
[[nodiscard]] inline std::size_t query_step(std::size_t heads, std::size_t tokens, double pairs = 3e6)
{
    const double all = static_cast<double>(heads) * static_cast<double>(tokens) * static_cast<double>(tokens) / 2;
    return std::max<std::size_t>(1, static_cast<std::size_t>(std::ceil(all / pairs)));
}

}  // namespace kvarn_cli
