// SPDX-License-Identifier: Apache-2.0
#pragma once
// Attention in double precision, from its definition: the whole matrix of scores, softmax over what a query may see, times the values.
// Works on plain K and V in the original basis; `append_record` decodes a record to them. Shares nothing with the library.

#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "reference.hpp"

namespace reference {

/// One KV head: m * r query rows (row = new token * r + query head) over all tokens, in the original basis. Every token has its position.
struct attention_problem {
    matrix q;     // [m * r][channels of K]
    matrix k, v;  // [tokens][channels]
    int query_heads = 1;
    std::int64_t first_position = 0;  // of the first new token
    std::vector<std::int64_t> positions;  // of the tokens
    double scale = 1.0;
    double soft_cap = 0.0;    // 0: none
    std::int64_t window = 0;  // 0: all
    bool causal = true;
    std::vector<std::vector<bool>> mask;  // [m][newest positions] instead of the causal rule, or empty
    vector sink_logits;   // [r], or empty
    vector alibi_slopes;  // [r], or empty
};

struct attention_result {
    matrix out;          // [m * r][channels of V]
    vector log_sum_exp;  // [m * r]
};

/// Whether new token `m` sees what is at `position`.
inline bool is_visible(const attention_problem& p, std::int64_t m, std::int64_t position)
{
    const std::int64_t own = p.first_position + m;
    if (p.window != 0 && position <= own - p.window) return false;
    if (!p.mask.empty()) {
        const auto& bits = p.mask[static_cast<std::size_t>(m)];
        const std::int64_t from_end = p.positions.back() + 1 - position;  // 1: the last one
        if (from_end <= static_cast<std::int64_t>(bits.size())) return bits[bits.size() - static_cast<std::size_t>(from_end)];
    }
    return !p.causal || position <= own;
}

inline attention_result attention(const attention_problem& p)
{
    constexpr double nothing = -std::numeric_limits<double>::infinity();
    attention_result r;
    r.out = matrix::Zero(p.q.rows(), p.v.cols());
    r.log_sum_exp = vector::Constant(p.q.rows(), nothing);
    matrix scores = matrix::Constant(p.q.rows(), p.k.rows(), nothing);
    for (Eigen::Index i = 0; i < p.q.rows(); ++i) {
        for (Eigen::Index t = 0; t < p.k.rows(); ++t) {
            if (!is_visible(p, i / p.query_heads, p.positions[static_cast<std::size_t>(t)])) continue;
            const double s = p.scale * p.q.row(i).dot(p.k.row(t));
            scores(i, t) = p.soft_cap != 0.0 ? p.soft_cap * std::tanh(s / p.soft_cap) : s;
            if (p.alibi_slopes.size() == 0) continue;
            const std::int64_t distance = p.positions[static_cast<std::size_t>(t)] - (p.first_position + i / p.query_heads);
            scores(i, t) += p.alibi_slopes(i % p.query_heads) * static_cast<double>(distance);
        }
        const double sink = p.sink_logits.size() ? p.sink_logits(i % p.query_heads) : nothing;
        double largest = sink;
        for (Eigen::Index t = 0; t < p.k.rows(); ++t) largest = std::max(largest, scores(i, t));
        if (std::isinf(largest)) continue;  // sees nothing
        double sum = std::exp(sink - largest);
        for (Eigen::Index t = 0; t < p.k.rows(); ++t) {
            const double weight = std::exp(scores(i, t) - largest);
            sum += weight;
            if (weight != 0.0) r.out.row(i) += weight * p.v.row(t);
        }
        r.out.row(i) /= sum;
        r.log_sum_exp(i) = largest + std::log(sum);
    }
    return r;
}

inline void append_rows(matrix& to, const matrix& rows)
{
    const Eigen::Index before = to.rows();
    to.conservativeResize(before + rows.rows(), rows.cols());
    to.bottomRows(rows.rows()) = rows;
}

/// The first `count` channels of every token from the rotated to the original basis, if they are rotated; the others stay.
inline matrix in_original_basis(bool rotate, matrix tokens, int count)
{
    if (rotate && tokens.rows() > 0) tokens.leftCols(count) = unrotated(tokens.leftCols(count)).eval();
    return tokens;
}

/// And back.
inline matrix in_rotated_basis(bool rotate, matrix tokens, int count)
{
    if (rotate && tokens.rows() > 0) tokens.leftCols(count) = rotated(tokens.leftCols(count)).eval();
    return tokens;
}

/// Adds the tokens of one record to K and V. Without a V part the values are the quantized channels of K.
inline void append_record(const shape& s, const std::uint8_t* record, matrix& k, matrix& v)
{
    matrix keys(s.group, s.head_dim_k + s.exact_channels);
    keys.leftCols(s.head_dim_k) = decoded_keys(s, record);
    keys.rightCols(s.exact_channels) = decoded_exact(s, record);
    keys = in_original_basis(s.rotate.k, keys, s.head_dim_k);
    append_rows(k, keys);
    append_rows(v, s.value_bits ? in_original_basis(s.rotate.v, decoded_values(s, record), s.head_dim_v)
                                : matrix(keys.leftCols(s.head_dim_k)));
}

}  // namespace reference
