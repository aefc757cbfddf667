// SPDX-License-Identifier: Apache-2.0
#pragma once
// The forward pass of one sequence over one or more KV caches in lock step: every cache sees the same tokens, its
// errors feed its own later layers and tokens, and the rows of all of them pass each weight matrix together, which is
// read once for all. In: token ids, in blocks that every cache has room for. Out: hidden states [cache][token], and
// logits. All in float; K and V enter the caches as halves. The weights are shared and read only; a decoder has its
// own working memory, and one thread calls it.

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include <Eigen/Core>

#include "kv_cache.hpp"
#include "model.hpp"
#include "team.hpp"

namespace language_model {

/// What one layer did for one block with one cache; halves and floats are [token][head][channel].
struct layer_step {
    std::size_t layer, tokens;
    const float* q;
    const kvarn::half *k, *v;
    const float* attention;  ///< [token][query head][channel], before the output projection
};

[[nodiscard]] inline cache_shape shape_of(const model_config& c)
{
    return {c.layers, c.kv_heads, c.head_dim, c.group_heads()};
}

/// How a layer attends.
[[nodiscard]] inline kvarn::attention_options attention_of(const model_config& c, std::size_t layer)
{
    kvarn::attention_options options;
    options.softmax_scale = c.softmax_scale;
    options.window = c.window(layer);
    return options;
}

/// to = from * transpose(weight), outputs spread over the team in blocks of one size, so that the result does not
/// depend on it. One row is a product with a vector, which reads the weights in order.
inline void multiply(const matrix& from, const matrix& weight, matrix& to, team* helpers)
{
    to.resize(from.rows(), weight.rows());
    const Eigen::Index each = from.rows() == 1 ? 1024 : 256, all = weight.rows();
    const auto block = [&](std::size_t number) {
        const Eigen::Index first = static_cast<Eigen::Index>(number) * each, count = std::min(each, all - first);
        if (from.rows() == 1)
            to.row(0).segment(first, count).transpose().noalias() = weight.middleRows(first, count) * from.row(0).transpose();
        else
            to.middleCols(first, count).noalias() = from * weight.middleRows(first, count).transpose();
    };
    const auto blocks = static_cast<std::size_t>((all + each - 1) / each);
    if (helpers != nullptr) return helpers->each(blocks, block);
    for (std::size_t i = 0; i < blocks; ++i) block(i);
}

class decoder {
public:
    /// All caches hold equally many tokens of the same sequence. Without a team, the caller does all the work.
    decoder(const model& m, std::vector<kv_cache*> caches, team* helpers = nullptr)
        : model_(&m), caches_(std::move(caches)), helpers_(helpers), lanes_(caches_.size())
    {}
    decoder(const model& m, kv_cache& cache, team* helpers = nullptr) : decoder(m, std::vector{&cache}, helpers) {}

    /// Tokens that one block may bring.
    [[nodiscard]] std::size_t room() const
    {
        std::size_t room = caches_.front()->room();
        for (const kv_cache* cache : caches_) room = std::min(room, cache->room());
        return room;
    }

    /// Seconds that a cache took so far: appending, attention and sealing, on one thread.
    [[nodiscard]] double seconds_of(std::size_t cache) const { return lanes_[cache].seconds; }

    /// Runs the next `tokens`, at most room() of them, and calls observe(layer_step) after the attention of each
    /// layer of each cache.
    template <class Observer>
    void run(std::span<const std::int32_t> tokens, Observer&& observe)
    {
        const model_config& c = model_->config;
        tokens_ = tokens.size();
        const Eigen::Index rows = index(caches_.size() * tokens_);
        prepare_rope();
        hidden_.resize(rows, index(c.hidden));
        normed_.resize(rows, index(c.hidden));
        attention_.resize(rows, index(c.heads * c.head_dim));
        each_row([&](Eigen::Index r) {
            const auto token = tokens[static_cast<std::size_t>(r) % tokens_];
            hidden_.row(r) = c.embedding_scale * model_->embedding.row(token);
            normalize(hidden_.row(r), model_->layers.front().attention_norm, normed_.row(r));
        });
        for (std::size_t i = 0; i < c.layers; ++i) {
            const layer_weights& w = model_->layers[i];
            const row_vector& next_norm = i + 1 < c.layers ? model_->layers[i + 1].attention_norm : model_->norm;
            multiply(normed_, w.qkv, qkv_, helpers_);
            each(caches_.size(), [&](std::size_t lane) { attend(i, lane); });
            for (std::size_t lane = 0; lane < caches_.size(); ++lane)
                observe(layer_step{i, tokens_, lanes_[lane].q.data(), lanes_[lane].k.data(), lanes_[lane].v.data(),
                                   attention_.row(index(lane * tokens_)).data()});
            multiply(attention_, w.o, projected_, helpers_);
            each_row([&](Eigen::Index r) {
                if (w.o_bias.size() != 0) projected_.row(r) += w.o_bias;
                if (c.post_norms) normalize(projected_.row(r), w.post_attention_norm, projected_.row(r));
                hidden_.row(r) += projected_.row(r);
                normalize(hidden_.row(r), w.mlp_norm, normed_.row(r));
            });
            multiply(normed_, w.gate_up, gate_up_, helpers_);
            activated_.resize(rows, index(c.intermediate));
            each_row([&](Eigen::Index r) { activate(gate_up_.row(r), activated_.row(r)); });
            multiply(activated_, w.down, projected_, helpers_);
            each_row([&](Eigen::Index r) {
                if (c.post_norms) normalize(projected_.row(r), w.post_mlp_norm, projected_.row(r));
                hidden_.row(r) += projected_.row(r);
                normalize(hidden_.row(r), next_norm, normed_.row(r));
            });
        }
        each(caches_.size(), [&](std::size_t lane) {
            const stopwatch watch(lanes_[lane].seconds);
            caches_[lane]->seal();
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
            const std::size_t count = std::min(tokens.size(), room());
            run(tokens.first(count));
            tokens = tokens.subspan(count);
        }
    }

    /// What the output layer gets of the last block: [cache][token][hidden].
    [[nodiscard]] const matrix& states() const noexcept { return normed_; }

    /// Logits [count][vocabulary] of tokens [first, first + count) of the last block with the first cache; valid
    /// until the next call.
    [[nodiscard]] const matrix& logits(std::size_t first, std::size_t count)
    {
        chosen_ = normed_.middleRows(index(first), index(count));
        multiply(chosen_, model_->head(), logits_, helpers_);
        return logits_;
    }
    /// Those of the last token.
    [[nodiscard]] const matrix& last_logits() { return logits(tokens_ - 1, 1); }

private:
    /// Working memory of one cache, and its time.
    struct lane_state {
        std::vector<float> q;
        std::vector<kvarn::half> k, v;
        double seconds = 0;
    };

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

    static Eigen::Index index(std::size_t n) noexcept { return static_cast<Eigen::Index>(n); }

    template <class F>
    void each(std::size_t items, F&& f)
    {
        if (helpers_ != nullptr) return helpers_->each(items, f);
        for (std::size_t i = 0; i < items; ++i) f(i);
    }
    /// f(row) for every row of hidden_.
    template <class F>
    void each_row(F&& f)
    {
        constexpr Eigen::Index some = 16;
        const Eigen::Index rows = hidden_.rows();
        each(static_cast<std::size_t>((rows + some - 1) / some), [&](std::size_t number) {
            const Eigen::Index first = index(number) * some;
            for (Eigen::Index r = first; r < std::min(first + some, rows); ++r) f(r);
        });
    }

    /// One cache's part of a layer: queries and keys get norm and position, K and V enter the cache, attention.
    void attend(std::size_t layer, std::size_t number)
    {
        const model_config& c = model_->config;
        const layer_weights& w = model_->layers[layer];
        const std::size_t q_width = c.heads * c.head_dim, kv_width = c.kv_heads * c.head_dim;
        lane_state& l = lanes_[number];
        l.q.resize(tokens_ * q_width);
        l.k.resize(tokens_ * kv_width);
        l.v.resize(l.k.size());
        for (std::size_t t = 0; t < tokens_; ++t) {
            auto row = qkv_.row(index(number * tokens_ + t));
            row += w.qkv_bias;
            float* const x = row.data();
            turn_heads(x, c.heads, w.q_norm, layer, t);
            turn_heads(x + q_width, c.kv_heads, w.k_norm, layer, t);
            std::copy_n(x, q_width, l.q.data() + t * q_width);
            for (std::size_t j = 0; j < kv_width; ++j) {
                l.k[t * kv_width + j] = kvarn::saturate_to<kvarn::half>(x[q_width + j]);
                l.v[t * kv_width + j] = kvarn::saturate_to<kvarn::half>(x[q_width + kv_width + j]);
            }
        }
        const stopwatch watch(l.seconds);
        caches_[number]->append(layer, l.k.data(), l.v.data(), tokens_);
        caches_[number]->attend(layer, l.q.data(), attention_.row(index(number * tokens_)).data(), tokens_,
                                attention_of(c, layer));
    }

    /// silu(gate) * up, or gelu(gate) * up by its tanh approximation.
    template <class Row, class Out>
    void activate(const Row& gate_up, Out&& out) const
    {
        const Eigen::Index width = out.cols();
        const auto gate = gate_up.leftCols(width).array(), up = gate_up.rightCols(width).array();
        if (model_->config.gelu)
            out = (0.5f * gate * (1.0f + (0.7978845608f * (gate + 0.044715f * gate.cube())).tanh()) * up).matrix();
        else
            out = (gate / (1.0f + (-gate).exp()) * up).matrix();
    }

    /// to = from / rms(from) * weight; they may be one row.
    template <class Row, class Out>
    void normalize(const Row& from, const row_vector& weight, Out&& to) const
    {
        const float factor = inverse_rms(from);
        to = (from.array() * factor * weight.array()).matrix();
    }

    template <class Row>
    [[nodiscard]] float inverse_rms(const Row& x) const
    {
        return 1.0f / std::sqrt(x.squaredNorm() / static_cast<float>(x.size()) + model_->config.norm_epsilon);
    }

    /// Cosines and sines of the positions of the block, for layers of either kind.
    struct rope {
        matrix cosines, sines;  ///< [token][channel pair]
    };
    void prepare_rope()
    {
        const std::size_t first = caches_.front()->tokens();
        for (const bool local : {false, true}) {
            const std::vector<double>& frequencies = local ? model_->config.local_frequencies : model_->config.rope_frequencies;
            rope& r = local ? local_rope_ : rope_;
            r.cosines.resize(index(tokens_), index(frequencies.size()));
            r.sines.resize(index(tokens_), index(frequencies.size()));
            for (std::size_t t = 0; t < tokens_; ++t)
                for (std::size_t i = 0; i < frequencies.size(); ++i) {
                    const double angle = static_cast<double>(first + t) * frequencies[i];
                    r.cosines(index(t), index(i)) = static_cast<float>(std::cos(angle));
                    r.sines(index(t), index(i)) = static_cast<float>(std::sin(angle));
                }
        }
    }

    /// Normalises every head of a row, if the model does, and turns it by its position: channel i together with
    /// channel i + d / 2.
    void turn_heads(float* row, std::size_t heads, const row_vector& norm, std::size_t layer, std::size_t token) const
    {
        const rope& r = model_->config.is_local(layer) ? local_rope_ : rope_;
        const Eigen::Index d = index(model_->config.head_dim), half = d / 2;
        for (std::size_t head = 0; head < heads; ++head, row += d) {
            Eigen::Map<row_vector> x(row, d);
            if (norm.size() != 0) normalize(x, norm, x);
            for (Eigen::Index i = 0; i < half; ++i) {
                const float a = row[i], b = row[half + i], cosine = r.cosines(index(token), i), sine = r.sines(index(token), i);
                row[i] = a * cosine - b * sine;
                row[half + i] = b * cosine + a * sine;
            }
        }
    }

    const model* model_;
    std::vector<kv_cache*> caches_;
    team* helpers_;
    std::vector<lane_state> lanes_;
    std::size_t tokens_ = 0;  ///< of the last block
    matrix hidden_, normed_, qkv_, attention_, projected_, gate_up_, activated_, chosen_, logits_;
    rope rope_, local_rope_;
};

}  // namespace language_model
