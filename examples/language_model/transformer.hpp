// SPDX-License-Identifier: Apache-2.0
#pragma once
// The forward pass of a step: rows of several sequences, each at its own position, pass each weight matrix together, which is read once for
// all. In: lanes (the next tokens of a sequence, and where they are), and a function that does the attention of a layer for all of them. Out:
// hidden states, a row for each token, lane by lane, and logits. All in float; K and V leave as halves. It knows nothing of caches:
// decoder.hpp runs the lock step of several caches with it, examples/serving a batch of requests. The weights are shared and read only; a
// forward_pass has its own working memory, and one thread calls it.

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include <Eigen/Core>

#include <kvarn/kvarn.hpp>

#include "model.hpp"
#include "team.hpp"

namespace language_model {

/// What one sequence brings to a step.
struct lane {
    std::span<const std::int32_t> tokens;
    std::int64_t position = 0;  ///< of the first of them
};

/// One lane in one layer; halves and floats are [token][head][channel]. K has its norm and its position.
struct lane_rows {
    std::size_t tokens = 0;
    const float* q = nullptr;
    const kvarn::half *k = nullptr, *v = nullptr;
    float* attention = nullptr;  ///< where its attention goes: [token][query head][channel], before the output projection
};

/// How a layer attends.
[[nodiscard]] inline kvarn::attention_options attention_of(const model_config& c, std::size_t layer)
{
    kvarn::attention_options options;
    options.softmax_scale = c.softmax_scale;
    options.window = c.window(layer);
    return options;
}

/// How products with weights are summed up. `together` is faster, but which other rows are in the batch decides about the last bits of a row;
/// `alone` gives every row the bits that it has by itself.
enum class row_sums { together, alone };

namespace transformer_detail {

/// to[i] = <x, weight[first + i]> for i < count, each summed up in one order.
inline void multiply_row(const float* x, const matrix& weight, Eigen::Index first, Eigen::Index count, float* to)
{
    using lanes = Eigen::Array<float, 16, 1>;
    constexpr Eigen::Index some = 4;
    const Eigen::Index n = weight.cols(), whole = n / 16 * 16;
    for (Eigen::Index i = 0; i < count; i += some) {
        const float* w[some];
        lanes sums[some];
        for (Eigen::Index j = 0; j < some; ++j) {
            w[j] = weight.data() + (first + std::min(i + j, count - 1)) * n;
            sums[j].setZero();
        }
        for (Eigen::Index c = 0; c < whole; c += 16) {
            const Eigen::Map<const lanes> at(x + c);
            for (Eigen::Index j = 0; j < some; ++j) sums[j] += at * Eigen::Map<const lanes>(w[j] + c);
        }
        for (Eigen::Index j = 0; j < std::min(some, count - i); ++j) {
            float sum = sums[j].sum();
            for (Eigen::Index c = whole; c < n; ++c) sum += x[c] * w[j][c];
            to[i + j] = sum;
        }
    }
}

}  // namespace transformer_detail

/// to = from * transpose(weight), outputs spread over the team in blocks of one size, so that the result does not
/// depend on it. One row is a product with a vector, which reads the weights in order.
inline void multiply(const matrix& from, const matrix& weight, matrix& to, team* helpers, row_sums sums = row_sums::together)
{
    to.resize(from.rows(), weight.rows());
    const Eigen::Index each = sums == row_sums::alone ? 32 : from.rows() == 1 ? 1024 : 256, all = weight.rows();
    const auto block = [&](std::size_t number) {
        const Eigen::Index first = static_cast<Eigen::Index>(number) * each, count = std::min(each, all - first);
        if (sums == row_sums::alone)
            for (Eigen::Index r = 0; r < from.rows(); ++r)
                transformer_detail::multiply_row(from.row(r).data(), weight, first, count, to.row(r).data() + first);
        else if (from.rows() == 1)
            to.row(0).segment(first, count).transpose().noalias() = weight.middleRows(first, count) * from.row(0).transpose();
        else
            to.middleCols(first, count).noalias() = from * weight.middleRows(first, count).transpose();
    };
    const auto blocks = static_cast<std::size_t>((all + each - 1) / each);
    if (helpers != nullptr) return helpers->each(blocks, block);
    for (std::size_t i = 0; i < blocks; ++i) block(i);
}

class forward_pass {
public:
    /// Without a team, the caller does all the work.
    explicit forward_pass(const model& m, team* helpers = nullptr, row_sums sums = row_sums::together)
        : model_(&m), helpers_(helpers), sums_(sums)
    {}

    /// Runs the tokens of all lanes, each at least one. attend(layer, rows) is called once a layer, with the rows of every lane, and fills in
    /// their attention.
    template <class Attend>
    void run(std::span<const lane> lanes, Attend&& attend)
    {
        const model_config& c = model_->config;
        place(lanes);
        const Eigen::Index rows = index(tokens_.size());
        hidden_.resize(rows, index(c.hidden));
        normed_.resize(rows, index(c.hidden));
        attention_.resize(rows, index(c.heads * c.head_dim));
        each_row([&](Eigen::Index r) {
            hidden_.row(r) = c.embedding_scale * model_->embedding.row(tokens_[static_cast<std::size_t>(r)].id);
            normalize(hidden_.row(r), model_->layers.front().attention_norm, normed_.row(r));
        });
        for (std::size_t i = 0; i < c.layers; ++i) {
            const layer_weights& w = model_->layers[i];
            const row_vector& next_norm = i + 1 < c.layers ? model_->layers[i + 1].attention_norm : model_->norm;
            multiply(normed_, w.qkv, qkv_, helpers_, sums_);
            each_row([&](Eigen::Index r) { make_queries_and_keys(i, r); });
            attend(i, std::span<const lane_rows>(lane_rows_));
            multiply(attention_, w.o, projected_, helpers_, sums_);
            each_row([&](Eigen::Index r) {
                if (w.o_bias.size() != 0) projected_.row(r) += w.o_bias;
                if (c.post_norms) normalize(projected_.row(r), w.post_attention_norm, projected_.row(r));
                hidden_.row(r) += projected_.row(r);
                normalize(hidden_.row(r), w.mlp_norm, normed_.row(r));
            });
            multiply(normed_, w.gate_up, gate_up_, helpers_, sums_);
            activated_.resize(rows, index(c.intermediate));
            each_row([&](Eigen::Index r) { activate(gate_up_.row(r), activated_.row(r)); });
            multiply(activated_, w.down, projected_, helpers_, sums_);
            each_row([&](Eigen::Index r) {
                if (c.post_norms) normalize(projected_.row(r), w.post_mlp_norm, projected_.row(r));
                hidden_.row(r) += projected_.row(r);
                normalize(hidden_.row(r), next_norm, normed_.row(r));
            });
        }
    }

    /// What the output layer gets of the last step, a row for each token of each lane.
    [[nodiscard]] const matrix& states() const noexcept { return normed_; }

    /// Logits [row][vocabulary] of some rows of the last step; valid until the next call.
    [[nodiscard]] const matrix& logits(std::span<const std::size_t> rows)
    {
        chosen_.resize(index(rows.size()), normed_.cols());
        for (std::size_t i = 0; i < rows.size(); ++i) chosen_.row(index(i)) = normed_.row(index(rows[i]));
        multiply(chosen_, model_->head(), logits_, helpers_, sums_);
        return logits_;
    }

    /// f(0) .. f(items - 1) on the team.
    template <class F>
    void each(std::size_t items, F&& f)
    {
        if (helpers_ != nullptr) return helpers_->each(items, f);
        for (std::size_t i = 0; i < items; ++i) f(i);
    }

private:
    /// One row: its token, and the row of the tables of RoPE for its position.
    struct placed_token {
        std::int32_t id;
        std::size_t turn;
    };

    static Eigen::Index index(std::size_t n) noexcept { return static_cast<Eigen::Index>(n); }

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

    /// Gives every token its row, and every lane its part of the rows.
    void place(std::span<const lane> lanes)
    {
        const model_config& c = model_->config;
        tokens_.clear();
        positions_.clear();
        const lane* before = nullptr;
        for (const lane& l : lanes) {
            // Lanes at the same positions, as in the lock step, share what RoPE needs.
            const bool again = before != nullptr && before->position == l.position && before->tokens.size() == l.tokens.size();
            const std::size_t first = positions_.size() - (again ? l.tokens.size() : 0);
            for (std::size_t t = 0; t < l.tokens.size(); ++t) {
                if (!again) positions_.push_back(l.position + static_cast<std::int64_t>(t));
                tokens_.push_back({l.tokens[t], first + t});
            }
            before = &l;
        }
        const std::size_t rows = tokens_.size(), q_width = c.heads * c.head_dim, kv_width = c.kv_heads * c.head_dim;
        q_.resize(rows * q_width);
        k_.resize(rows * kv_width);
        v_.resize(rows * kv_width);
        attention_.resize(index(rows), index(q_width));
        lane_rows_.clear();
        std::size_t row = 0;
        for (const lane& l : lanes) {
            lane_rows_.push_back({l.tokens.size(), q_.data() + row * q_width, k_.data() + row * kv_width, v_.data() + row * kv_width,
                                  attention_.data() + row * q_width});
            row += l.tokens.size();
        }
        fill(rope_, c.rope_frequencies);
        fill(local_rope_, c.local_frequencies);
    }

    /// Queries and keys of one row get norm and position.
    void make_queries_and_keys(std::size_t layer, Eigen::Index r)
    {
        const model_config& c = model_->config;
        const layer_weights& w = model_->layers[layer];
        const std::size_t q_width = c.heads * c.head_dim, kv_width = c.kv_heads * c.head_dim, at = static_cast<std::size_t>(r);
        auto row = qkv_.row(r);
        row += w.qkv_bias;
        float* const x = row.data();
        turn_heads(x, c.heads, w.q_norm, layer, tokens_[at].turn);
        turn_heads(x + q_width, c.kv_heads, w.k_norm, layer, tokens_[at].turn);
        std::copy_n(x, q_width, q_.data() + at * q_width);
        for (std::size_t j = 0; j < kv_width; ++j) {
            k_[at * kv_width + j] = kvarn::saturate_to<kvarn::half>(x[q_width + j]);
            v_[at * kv_width + j] = kvarn::saturate_to<kvarn::half>(x[q_width + kv_width + j]);
        }
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

    /// Cosines and sines of positions.
    struct rope {
        matrix cosines, sines;  ///< [position][channel pair]
    };
    void fill(rope& r, const std::vector<double>& frequencies) const
    {
        r.cosines.resize(index(positions_.size()), index(frequencies.size()));
        r.sines.resize(index(positions_.size()), index(frequencies.size()));
        for (std::size_t t = 0; t < positions_.size(); ++t)
            for (std::size_t i = 0; i < frequencies.size(); ++i) {
                const double angle = static_cast<double>(positions_[t]) * frequencies[i];
                r.cosines(index(t), index(i)) = static_cast<float>(std::cos(angle));
                r.sines(index(t), index(i)) = static_cast<float>(std::sin(angle));
            }
    }

    /// Normalises every head of a row, if the model does, and turns it by its position: channel i together with
    /// channel i + d / 2.
    void turn_heads(float* row, std::size_t heads, const row_vector& norm, std::size_t layer, std::size_t turn) const
    {
        const rope& r = model_->config.is_local(layer) ? local_rope_ : rope_;
        const Eigen::Index d = index(model_->config.head_dim), half = d / 2;
        for (std::size_t head = 0; head < heads; ++head, row += d) {
            Eigen::Map<row_vector> x(row, d);
            if (norm.size() != 0) normalize(x, norm, x);
            for (Eigen::Index i = 0; i < half; ++i) {
                const float a = row[i], b = row[half + i], cosine = r.cosines(index(turn), i), sine = r.sines(index(turn), i);
                row[i] = a * cosine - b * sine;
                row[half + i] = b * cosine + a * sine;
            }
        }
    }

    const model* model_;
    team* helpers_;
    row_sums sums_;
    std::vector<placed_token> tokens_;      ///< of each row
    std::vector<std::int64_t> positions_;   ///< different ones, in the order of the tables
    std::vector<lane_rows> lane_rows_;
    std::vector<float> q_;
    std::vector<kvarn::half> k_, v_;
    matrix hidden_, normed_, qkv_, attention_, projected_, gate_up_, activated_, chosen_, logits_;
    rope rope_, local_rope_;  ///< local: of layers with a window of their own frequencies
};

}  // namespace language_model
