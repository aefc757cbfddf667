// SPDX-License-Identifier: Apache-2.0
#pragma once
// One or more KV caches in lock step: every cache sees the same tokens, its errors feed its own later layers and tokens. In: token ids of one
// sequence. Out: hidden states [cache][token], and logits. One thread calls it.

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <numeric>
#include <span>
#include <utility>
#include <vector>

#include "kv_cache.hpp"
#include "transformer.hpp"

namespace language_model {

/// What one layer did in one step with one cache.
struct layer_step {
    std::size_t layer, tokens;
    const float* q;
    const kvarn::half *k, *v;
    const float* attention;
};

[[nodiscard]] inline cache_shape shape_of(const model_config& c)
{
    return {c.layers, c.kv_heads, c.head_dim, c.group_heads()};
}

class decoder {
public:
    /// All caches hold equally many tokens of the same sequence. Without a team, the caller does all the work.
    decoder(const model& m, std::vector<kv_cache*> caches, team* helpers = nullptr)
        : model_(&m), caches_(std::move(caches)), pass_(m, helpers), seconds_(caches_.size())
    {}
    decoder(const model& m, kv_cache& cache, team* helpers = nullptr) : decoder(m, std::vector{&cache}, helpers) {}

    /// Tokens until one of the caches has a full tile: the longest step after which each holds what it does token by token.
    [[nodiscard]] std::size_t until_seal() const
    {
        std::size_t n = caches_.front()->until_seal();
        for (const kv_cache* cache : caches_) n = std::min(n, cache->until_seal());
        return n;
    }

    /// Seconds that a cache took so far: appending, attention and sealing, on one thread.
    [[nodiscard]] double seconds_of(std::size_t cache) const { return seconds_[cache]; }

    /// Runs the next `tokens`, and calls observe(layer_step) after the attention of each layer of each cache.
    template <class Observer>
    void run(std::span<const std::int32_t> tokens, Observer&& observe)
    {
        tokens_ = tokens.size();
        lanes_.assign(caches_.size(), {tokens, static_cast<std::int64_t>(caches_.front()->tokens())});
        pass_.run(lanes_, [&](std::size_t layer, std::span<const lane_rows> rows) {
            pass_.each(rows.size(), [&](std::size_t i) {
                const stopwatch watch(seconds_[i]);
                const lane_rows& r = rows[i];
                caches_[i]->attend(layer, r.q, r.k, r.v, r.attention, r.tokens, attention_of(model_->config, layer));
            });
            for (const lane_rows& r : rows) observe(layer_step{layer, r.tokens, r.q, r.k, r.v, r.attention});
        });
        pass_.each(caches_.size(), [&](std::size_t i) {
            const stopwatch watch(seconds_[i]);
            caches_[i]->finish();
        });
    }
    void run(std::span<const std::int32_t> tokens)
    {
        run(tokens, [](const layer_step&) {});
    }

    /// Runs any number of tokens, cut where a cache seals.
    void run_all(std::span<const std::int32_t> tokens)
    {
        while (!tokens.empty()) {
            const std::size_t count = std::min(tokens.size(), until_seal());
            run(tokens.first(count));
            tokens = tokens.subspan(count);
        }
    }

    /// What the output layer gets of the last step: [cache][token][hidden].
    [[nodiscard]] const matrix& states() const noexcept { return pass_.states(); }

    /// Logits [count][vocabulary] of tokens [first, first + count) of the last step with the first cache; valid until the next call.
    [[nodiscard]] const matrix& logits(std::size_t first, std::size_t count)
    {
        std::vector<std::size_t> rows(count);
        std::iota(rows.begin(), rows.end(), first);
        return pass_.logits(rows);
    }
    /// Those of the last token.
    [[nodiscard]] const matrix& last_logits() { return logits(tokens_ - 1, 1); }

private:
    /// Adds its lifetime to a sum.
    class stopwatch {
    public:
        explicit stopwatch(double& seconds) : seconds_(seconds) {}
        stopwatch(const stopwatch&) = delete;
        stopwatch& operator=(const stopwatch&) = delete;
        ~stopwatch() { seconds_ += std::chrono::duration<double>(std::chrono::steady_clock::now() - begin_).count(); }

    private:
        double& seconds_;
        std::chrono::steady_clock::time_point begin_ = std::chrono::steady_clock::now();
    };

    const model* model_;
    std::vector<kv_cache*> caches_;
    forward_pass pass_;
    std::vector<double> seconds_;
    std::vector<lane> lanes_;
    std::size_t tokens_ = 0;  ///< of the last step
};

}  // namespace language_model
