// SPDX-License-Identifier: Apache-2.0
#pragma once
// The refined encoder in double precision, written for reading: whole matrices, divisions instead of reciprocals, no blocks.

#include <algorithm>
#include <cmath>

#include "half_precision.hpp"
#include "reference.hpp"

namespace reference {

struct refined_options {
    int iterations = 1, rounds = 5, clip_steps = 2, most_iterations = 8;
};

namespace refined_detail {

using weights = Eigen::RowVectorXd;

struct line {
    double scale, zero;
    Eigen::RowVectorXd codes;
};

inline Eigen::RowVectorXd round_to_codes(const Eigen::RowVectorXd& x, double scale, double zero, double most)
{
    return x.unaryExpr([&](double value) { return std::clamp(std::nearbyint((value - zero) / scale), 0.0, most); });
}

/// x as the half that a record holds of x * factor.
inline double half_of(double x, double factor) { return round_to_half(x * factor) / factor; }

/// Weighted least squares of x on scale * codes + zero; `unbiased` exchanges what is regressed on what, and rounds the scale as the record does.
inline void fit(const Eigen::RowVectorXd& x, const weights& w, line& l, bool unbiased, double fold)
{
    const double all = w.sum(), mean_code = w.dot(l.codes) / all, mean = w.dot(x) / all;
    const Eigen::RowVectorXd c = l.codes.array() - mean_code, d = x.array() - mean;
    const double variance = (w.array() * c.array().square()).sum(), covariance = (w.array() * c.array() * d.array()).sum();
    const double mean_square = (w.array() * l.codes.array().square()).sum();
    if (variance > 1e-5 * mean_square && covariance / variance > 1e-12) {
        l.scale = covariance / variance;
        if (unbiased) l.scale = std::clamp((w.array() * d.array().square()).sum() / covariance, l.scale, 2 * l.scale);
    }
    if (unbiased) l.scale = half_of(l.scale, fold);
    l.zero = mean - l.scale * mean_code;
}

inline line search(const Eigen::RowVectorXd& x, const weights& w, double most, int clip_steps, double least_scale)
{
    const double low = x.minCoeff(), high = x.maxCoeff(), middle = (low + high) / 2;
    const double half_range = std::max((high - low) / 2, least_scale * most / 2);
    line best{};
    double least = 0;
    for (int step = 0; step <= clip_steps; ++step) {
        const double kept = half_range * (1 - 0.1 * step), scale = 2 * kept / most, zero = middle - kept;
        const Eigen::RowVectorXd codes = round_to_codes(x, scale, zero, most);
        const double error = (w.array() * (codes.array() * scale + zero - x.array()).square()).sum();
        if (step == 0 || error < least) {
            least = error;
            best = {scale, zero, codes};
        }
    }
    return best;
}

/// What is left of an index's weight: a factor's power of two counts as at most four times the mean one (rounded).
inline Eigen::VectorXd shares_of(const Eigen::VectorXd& factors)
{
    int sum = 0;
    for (const double s : factors) sum += std::ilogb(s) + 127;
    const int n = static_cast<int>(factors.size()), most = (sum + n / 2) / n - 127 + 2;
    return factors.unaryExpr([&](double s) { return std::ldexp(1.0, -2 * std::max(0, std::ilogb(s) - most)); });
}

}  // namespace refined_detail

/// `given` is axis 0 by axis 1; `token_is_axis1`: K, where axis 1 is the token, otherwise V. Scalars are not yet rounded where the record
/// rounds them last.
inline part refined(const matrix& given, int bits, bool token_is_axis1, const refined_options& o)
{
    using namespace refined_detail;
    // In units, a power of two of which the largest value is 2^10 to 2^11; the record folds what its halves could not hold into axis 0.
    const double largest = given.cwiseAbs().maxCoeff();
    const int exponent = largest > 0 ? std::clamp(std::ilogb(largest) - 10, -30, 30) : 0;
    const double unit = std::ldexp(1.0, exponent), fold = std::ldexp(1.0, exponent - std::clamp(exponent, -13, 4));
    const matrix m = given / unit;
    const double most = (1 << bits) - 1;
    const normalized_tile start = normalize(m, std::max(o.iterations, o.most_iterations), o.iterations);
    Eigen::RowVectorXd s1 = start.s1.transpose();
    if (!token_is_axis1)
        for (Eigen::Index j = 0; j < m.cols(); ++j)
            s1(j) = std::max(s1(j), std::sqrt(m.col(j).cwiseQuotient(start.s0).squaredNorm() / (16.0 * static_cast<double>(m.rows()))));
    const Eigen::VectorXd share0 = shares_of(start.s0);
    const weights share1 = shares_of(s1.transpose()).transpose();
    const auto weights1 = [&] { return weights(s1.cwiseAbs2().cwiseProduct(share1)); };
    std::vector<line> lines(static_cast<std::size_t>(m.rows()));
    const auto decoded_rows = [&] {
        matrix y(m.rows(), m.cols());
        for (Eigen::Index i = 0; i < m.rows(); ++i) {
            const line& l = lines[static_cast<std::size_t>(i)];
            y.row(i) = (l.codes.array() * l.scale + l.zero).matrix();
        }
        return y;
    };
    const auto refit = [&](double step) {
        const matrix y = decoded_rows();
        for (Eigen::Index j = 0; j < m.cols(); ++j) {
            const Eigen::VectorXd weighted = y.col(j).cwiseProduct(share0);
            const double square = y.col(j).dot(weighted);
            if (square > 0) s1(j) = std::max(s1(j) + step * (m.col(j).dot(weighted) / square - s1(j)), 0x1p-10);
        }
    };
    const auto round_and_fit = [&](Eigen::Index i, bool unbiased) {
        line& l = lines[static_cast<std::size_t>(i)];
        const Eigen::RowVectorXd x = m.row(i).cwiseQuotient(s1);
        l.codes = round_to_codes(x, l.scale, l.zero, most);
        fit(x, weights1(), l, unbiased, fold);
    };
    for (Eigen::Index i = 0; i < m.rows(); ++i) {
        line& l = lines[static_cast<std::size_t>(i)];
        const Eigen::RowVectorXd x = m.row(i).cwiseQuotient(s1);
        l = search(x, weights1(), most, o.clip_steps, 1e-10 * start.s0(i));
        for (int n = 0; n < 3; ++n) {
            l.codes = round_to_codes(x, l.scale, l.zero, most);
            fit(x, weights1(), l, false, fold);
        }
        l.codes = round_to_codes(x, l.scale, l.zero, most);
    }
    for (int round = 1; round < o.rounds; ++round) {
        refit(2);
        for (Eigen::Index i = 0; i < m.rows(); ++i) round_and_fit(i, false);
    }
    if (o.rounds > 0) refit(1);
    if (!token_is_axis1)
        for (Eigen::Index j = 0; j < m.cols(); ++j) s1(j) = half_of(s1(j), unit / fold);
    for (Eigen::Index i = 0; i < m.rows(); ++i) {
        round_and_fit(i, token_is_axis1);
        line& l = lines[static_cast<std::size_t>(i)];
        if (token_is_axis1) {
            l.zero = half_of(l.zero, fold);
        } else {
            const weights root = share1.cwiseSqrt();
            const double decoded = ((l.codes.array() * l.scale + l.zero).matrix().cwiseProduct(s1.cwiseProduct(root))).norm();
            const double ratio = decoded > 0 ? m.row(i).cwiseProduct(root).norm() / decoded : 1;
            l.scale *= ratio;
            l.zero *= ratio;
        }
    }
    if (token_is_axis1) {
        const matrix y = decoded_rows();
        for (Eigen::Index j = 0; j < m.cols(); ++j) {
            const Eigen::VectorXd root = share0.cwiseSqrt();
            const double decoded = y.col(j).cwiseProduct(root).norm();
            s1(j) = decoded > 0 ? m.col(j).cwiseProduct(root).norm() / decoded : 1;
        }
    }
    part p;
    p.bits = bits;
    p.codes.resize(m.rows(), m.cols());
    p.scale0.resize(m.rows());
    p.zero0.resize(m.rows());
    p.scale1 = s1.transpose() * (unit / fold);
    for (Eigen::Index i = 0; i < m.rows(); ++i) {
        const line& l = lines[static_cast<std::size_t>(i)];
        p.scale0(i) = l.scale * fold;
        p.zero0(i) = l.zero * fold;
        for (Eigen::Index j = 0; j < m.cols(); ++j) p.codes(i, j) = static_cast<int>(l.codes(j));
    }
    return p;
}

}  // namespace reference
