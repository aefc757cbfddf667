// SPDX-License-Identifier: Apache-2.0
#pragma once
// The forward pass of one sequence over a KV cache: blocks of any number of tokens that the cache has room for, one token included.
// In: token ids. Out: hidden states, and logits of the tokens that are asked for. All in float; K and V enter the cache as halves.
// The weights are shared and read only; a decoder has its own working memory and belongs to one thread.

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include <Eigen/Core>

#include "kv_cache.hpp"
#include "model.hpp"

namespace language_model {

/// What one layer did for one block; halves and floats are [token][head][channel].
struct layer_step {
    std::size_t layer, tokens;
    const float* q;
    const kvarn::half *k, *v;
    const float* attention;  ///< [token][query head][channel], before the output projection
};

[[nodiscard]] inline cache_shape shape_of(const model_config& c)
{
    return {c.layers, c.kv_heads, c.head_dim, c.group_heads(), c.window};
}

class decoder {
public:
    decoder(const model& m, kv_cache& cache) : model_(&m), cache_(&cache) {}

    /// Runs the next `tokens`, at most cache.room() of them, and calls observe(layer_step) after the attention of each layer.
    template <class Observer>
    void run(std::span<const std::int32_t> tokens, Observer&& observe)
    {
        const model_config& c = model_->config;
        const auto m = static_cast<Eigen::Index>(tokens.size());
        const auto q_width = index(c.heads * c.head_dim), kv_width = index(c.kv_heads * c.head_dim);
        prepare_rope(tokens.size());
        hidden_.resize(m, index(c.hidden));
        for (Eigen::Index t = 0; t < m; ++t)
            hidden_.row(t) = c.embedding_scale * model_->embedding.row(tokens[static_cast<std::size_t>(t)]);
        q_.resize(m, q_width);
        attention_.resize(m, q_width);
        k_.resize(static_cast<std::size_t>(m * kv_width));
        v_.resize(k_.size());
        for (std::size_t i = 0; i < c.layers; ++i) {
            const layer_weights& w = model_->layers[i];
            normalize(hidden_, w.attention_norm, normed_);
            multiply(normed_, w.qkv, qkv_);
            qkv_.rowwise() += w.qkv_bias;
            for (Eigen::Index t = 0; t < m; ++t) {
                float* const row = qkv_.row(t).data();
                turn_heads(row, c.heads, w.q_norm, t);
                turn_heads(row + q_width, c.kv_heads, w.k_norm, t);
                for (Eigen::Index j = 0; j < kv_width; ++j) {
                    const auto to = static_cast<std::size_t>(t * kv_width + j);
                    k_[to] = kvarn::saturate_to<kvarn::half>(row[q_width + j]);
                    v_[to] = kvarn::saturate_to<kvarn::half>(row[q_width + kv_width + j]);
                }
            }
            q_ = qkv_.leftCols(q_width);
            cache_->append(i, k_.data(), v_.data(), tokens.size());
            cache_->attend(i, q_.data(), attention_.data(), tokens.size());
            observe(layer_step{i, tokens.size(), q_.data(), k_.data(), v_.data(), attention_.data()});
            multiply(attention_, w.o, projected_);
            if (w.o_bias.size() != 0) projected_.rowwise() += w.o_bias;
            hidden_ += projected_;
            normalize(hidden_, w.mlp_norm, normed_);
            multiply(normed_, w.gate_up, gate_up_);
            const auto width = index(c.intermediate);
            const auto gate = gate_up_.leftCols(width).array();
            activated_ = (gate / (1.0f + (-gate).exp()) * gate_up_.rightCols(width).array()).matrix();
            multiply(activated_, w.down, projected_);
            hidden_ += projected_;
        }
        cache_->seal();
    }
    void run(std::span<const std::int32_t> tokens)
    {
        run(tokens, [](const layer_step&) {});
    }

    /// Runs any number of tokens, cut where the cache seals.
    void run_all(std::span<const std::int32_t> tokens)
    {
        while (!tokens.empty()) {
            const std::size_t count = std::min(tokens.size(), cache_->room());
            run(tokens.first(count));
            tokens = tokens.subspan(count);
        }
    }

    /// Logits [count][vocabulary] of tokens [first, first + count) of the last block; valid until the next call.
    [[nodiscard]] const matrix& logits(std::size_t first, std::size_t count)
    {
        normalize(hidden_.middleRows(index(first), index(count)), model_->norm, normed_);
        multiply(normed_, model_->head(), logits_);
        return logits_;
    }
    /// Those of the last token.
    [[nodiscard]] const matrix& last_logits() { return logits(static_cast<std::size_t>(hidden_.rows()) - 1, 1); }

private:
    static Eigen::Index index(std::size_t n) noexcept { return static_cast<Eigen::Index>(n); }

    /// to = from * transpose(weight); one token is a product with a vector, which reads the weights in order.
    static void multiply(const matrix& from, const matrix& weight, matrix& to)
    {
        to.resize(from.rows(), weight.rows());
        if (from.rows() == 1)
            to.row(0).transpose().noalias() = weight * from.row(0).transpose();
        else
            to.noalias() = from * weight.transpose();
    }

    template <class Rows>
    void normalize(const Rows& from, const row_vector& weight, matrix& to) const
    {
        to.resize(from.rows(), from.cols());
        for (Eigen::Index t = 0; t < from.rows(); ++t)
            to.row(t) = (from.row(t).array() * inverse_rms(from.row(t)) * weight.array()).matrix();
    }

    template <class Row>
    [[nodiscard]] float inverse_rms(const Row& x) const
    {
        return 1.0f / std::sqrt(x.squaredNorm() / static_cast<float>(x.size()) + model_->config.norm_epsilon);
    }

    /// Cosines and sines of the next `count` positions.
    void prepare_rope(std::size_t count)
    {
        const std::vector<double>& frequencies = model_->config.rope_frequencies;
        cosines_.resize(index(count), index(frequencies.size()));
        sines_.resize(cosines_.rows(), cosines_.cols());
        for (std::size_t t = 0; t < count; ++t)
            for (std::size_t i = 0; i < frequencies.size(); ++i) {
                const double angle = static_cast<double>(cache_->tokens() + t) * frequencies[i];
                cosines_(index(t), index(i)) = static_cast<float>(std::cos(angle));
                sines_(index(t), index(i)) = static_cast<float>(std::sin(angle));
            }
    }

    /// Normalises every head of a row, if the model does, and turns it by its position: channel i together with channel i + d / 2.
    void turn_heads(float* row, std::size_t heads, const row_vector& norm, Eigen::Index token) const
    {
        const Eigen::Index d = index(model_->config.head_dim), half = d / 2;
        for (std::size_t head = 0; head < heads; ++head, row += d) {
            Eigen::Map<row_vector> x(row, d);
            if (norm.size() != 0) x = (x.array() * inverse_rms(x) * norm.array()).matrix();
            for (Eigen::Index i = 0; i < half; ++i) {
                const float a = row[i], b = row[half + i], cosine = cosines_(token, i), sine = sines_(token, i);
                row[i] = a * cosine - b * sine;
                row[half + i] = b * cosine + a * sine;
            }
        }
    }

    const model* model_;
    kv_cache* cache_;
    matrix hidden_, normed_, qkv_, q_, attention_, projected_, gate_up_, activated_, logits_, cosines_, sines_;
    std::vector<kvarn::half> k_, v_;
};

}  // namespace language_model
