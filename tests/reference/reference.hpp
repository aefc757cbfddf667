// SPDX-License-Identifier: Apache-2.0
#pragma once
// The whole method in double precision, written straight from the record specification: rotation, variance normalisation,
// rounding, packing, the record and its decoding. Textbook form, slow on purpose, shares nothing with the library.
// K and V of a tile are matrices [token][channel]; codes of one axis-0 index form a row of a `part`.

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <map>
#include <vector>

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC 12's own AVX-512 intrinsics, inlined into Eigen
#endif
#include <Eigen/Dense>
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic pop
#endif

#include "half_precision.hpp"

namespace reference {

using matrix = Eigen::MatrixXd;
using vector = Eigen::VectorXd;
using code_matrix = Eigen::MatrixXi;

// ---------------------------------------------------------------------------------------------------------------- rotation

/// Quadratic character of a modulo the prime q.
inline int quadratic_character(int a, int q)
{
    a = ((a % q) + q) % q;
    if (a == 0) return 0;
    for (int x = 1; x < q; ++x)
        if (x * x % q == a) return 1;
    return -1;
}

inline matrix jacobsthal(int q)
{
    matrix m(q, q);
    for (int i = 0; i < q; ++i)
        for (int j = 0; j < q; ++j) m(i, j) = quadratic_character(i - j, q);
    return m;
}

/// H = I + [[0, 1^T], [-1, Q]], size q + 1.
inline matrix paley_one(int q)
{
    matrix h = matrix::Identity(q + 1, q + 1);
    h.block(0, 1, 1, q).array() += 1.0;
    h.block(1, 0, q, 1).array() -= 1.0;
    h.block(1, 1, q, q) += jacobsthal(q);
    return h;
}

/// C = [[0, 1^T], [1, Q]]; zeros become [[1,-1],[-1,-1]], +-1 become +-[[1,1],[1,-1]]; size 2 (q + 1).
inline matrix paley_two(int q)
{
    matrix c = matrix::Zero(q + 1, q + 1);
    c.block(0, 1, 1, q).setOnes();
    c.block(1, 0, q, 1).setOnes();
    c.block(1, 1, q, q) = jacobsthal(q);
    Eigen::Matrix2d zero, one;
    zero << 1, -1, -1, -1;
    one << 1, 1, 1, -1;
    matrix h(2 * (q + 1), 2 * (q + 1));
    for (int i = 0; i <= q; ++i)
        for (int j = 0; j <= q; ++j) h.block<2, 2>(2 * i, 2 * j) = c(i, j) == 0.0 ? zero : Eigen::Matrix2d(c(i, j) * one);
    return h;
}

inline matrix kronecker(const matrix& outer, const matrix& inner)
{
    matrix product(outer.rows() * inner.rows(), outer.cols() * inner.cols());
    for (Eigen::Index i = 0; i < outer.rows(); ++i)
        for (Eigen::Index j = 0; j < outer.cols(); ++j)
            product.block(i * inner.rows(), j * inner.cols(), inner.rows(), inner.cols()) = outer(i, j) * inner;
    return product;
}

/// The orthonormal H of size n; an empty matrix if the specification knows none.
inline const matrix& hadamard(int n)
{
    static std::map<int, matrix> known;
    const auto found = known.find(n);
    if (found != known.end()) return found->second;
    int inner = n > 0 ? 1 : 0;
    while (inner && n % (2 * inner) == 0) inner *= 2;
    int outer = inner ? n / inner : 0;
    matrix h;
    if (outer == 3 || outer == 5 || outer == 7 || outer == 9) {
        if (inner >= 4) {
            outer *= 4;
            inner /= 4;
            h = outer == 12 ? paley_one(11) : outer == 20 ? paley_one(19) : outer == 28 ? paley_two(13) : paley_two(17);
        }
    } else if (outer == 1) {
        h = matrix::Ones(1, 1);
    }
    if (h.size()) {
        matrix sylvester = matrix::Ones(1, 1);
        Eigen::Matrix2d two;
        two << 1, 1, 1, -1;
        while (sylvester.rows() < inner) sylvester = kronecker(two, sylvester);
        h = kronecker(h, sylvester) / std::sqrt(static_cast<double>(n));
    }
    return known.emplace(n, h).first->second;
}

/// y = H x for every token.
inline matrix rotated(const matrix& token_by_channel)
{
    return token_by_channel * hadamard(static_cast<int>(token_by_channel.cols())).transpose();
}

/// x = H^T y for every token.
inline matrix unrotated(const matrix& token_by_channel)
{
    return token_by_channel * hadamard(static_cast<int>(token_by_channel.cols()));
}

// ------------------------------------------------------------------------------------------------------------ normalisation

/// Sample standard deviation of each row about its mean, two passes.
inline vector row_deviation(const matrix& m)
{
    const vector mean = m.rowwise().mean();
    return ((m.colwise() - mean).rowwise().squaredNorm() / static_cast<double>(m.cols() - 1)).cwiseSqrt();
}

inline vector column_deviation(const matrix& m)
{
    const Eigen::RowVectorXd mean = m.colwise().mean();
    return ((m.rowwise() - mean).colwise().squaredNorm() / static_cast<double>(m.rows() - 1)).cwiseSqrt().transpose();
}

inline double imbalance(const matrix& m)
{
    const vector along0 = column_deviation(m), along1 = row_deviation(m);
    return along0.maxCoeff() / std::max(along0.minCoeff(), 1e-8) + along1.maxCoeff() / std::max(along1.minCoeff(), 1e-8);
}

inline vector rescaled(const vector& scale, const vector& deviation)
{
    return scale.cwiseProduct(deviation.cwiseMax(1e-3).cwiseMin(1e3)).cwiseMax(std::exp(-0.3)).cwiseMin(std::exp(10.0));
}

struct normalized_tile {
    vector s0, s1;
    matrix m;  ///< M / s0 / s1
    int kept = 0;  ///< 0: the input, i: after i iterations
};

inline matrix divided(const matrix& m, const vector& s0, const vector& s1)
{
    return s0.cwiseInverse().asDiagonal() * m * s1.cwiseInverse().asDiagonal();
}

/// `m` is axis 0 by axis 1. A later iterate replaces the kept one only if it is better by more than one part in 10^5.
/// No more than `enough` rounds once the imbalance is below 4.
inline normalized_tile normalize(const matrix& m, int iterations, int enough)
{
    vector s0 = vector::Ones(m.rows()), s1 = vector::Ones(m.cols());
    normalized_tile best{s0, s1, m, 0};
    double best_imbalance = imbalance(m);
    matrix current = m;
    for (int i = 1; i <= iterations; ++i) {
        if (i > enough && best_imbalance < 4.0) break;
        s1 = rescaled(s1, column_deviation(current));
        current = divided(m, s0, s1);
        s0 = rescaled(s0, row_deviation(current));
        current = divided(m, s0, s1);
        const double now = imbalance(current);
        if (now < best_imbalance * (1.0 - 1e-5)) {
            best_imbalance = now;
            best = {s0, s1, current, i};
        }
    }
    return best;
}

// ------------------------------------------------------------------------------------------------------- rounding, one part

/// Codes and scalars of K or V: value(i, j) = (code(i, j) * scale0[i] + zero0[i]) * scale1[j], i along axis 0.
struct part {
    int bits = 0;
    code_matrix codes;
    vector scale0, zero0, scale1;

    [[nodiscard]] matrix decoded() const
    {
        matrix m = scale0.asDiagonal() * codes.cast<double>();
        m.colwise() += zero0;
        return m * scale1.asDiagonal();
    }
    [[nodiscard]] part with_half_scalars() const
    {
        part p = *this;
        p.scale0 = scale0.unaryExpr([](double x) { return round_to_half(x); });
        p.zero0 = zero0.unaryExpr([](double x) { return round_to_half(x); });
        p.scale1 = scale1.unaryExpr([](double x) { return round_to_half(x); });
        return p;
    }
};

inline part rounded(const normalized_tile& tile, int bits)
{
    const double n = static_cast<double>((1 << bits) - 1);
    part p;
    p.bits = bits;
    p.codes.resize(tile.m.rows(), tile.m.cols());
    p.scale0.resize(tile.m.rows());
    p.zero0.resize(tile.m.rows());
    p.scale1 = tile.s1;
    for (Eigen::Index i = 0; i < tile.m.rows(); ++i) {
        const double zero = tile.m.row(i).minCoeff();
        const double scale = std::max((tile.m.row(i).maxCoeff() - zero) / n, 1e-10);
        for (Eigen::Index j = 0; j < tile.m.cols(); ++j)
            p.codes(i, j) = static_cast<int>(std::clamp(std::nearbyint((tile.m(i, j) - zero) / scale), 0.0, n));
        p.scale0(i) = tile.s0(i) * scale;
        p.zero0(i) = tile.s0(i) * zero;
    }
    return p;
}

// --------------------------------------------------------------------------------------------------------------- bit streams

/// Code c of a little-endian stream sits in bits [c * bits, (c + 1) * bits); read bit by bit.
inline int read_code(const std::uint8_t* stream, std::size_t index, int bits)
{
    int code = 0;
    for (int b = 0; b < bits; ++b) {
        const std::size_t at = index * static_cast<std::size_t>(bits) + static_cast<std::size_t>(b);
        code |= ((stream[at / 8] >> (at % 8)) & 1) << b;
    }
    return code;
}

/// The stream's bits there must be zero.
inline void write_code(std::uint8_t* stream, std::size_t index, int bits, int code)
{
    for (int b = 0; b < bits; ++b) {
        const std::size_t at = index * static_cast<std::size_t>(bits) + static_cast<std::size_t>(b);
        stream[at / 8] = static_cast<std::uint8_t>(stream[at / 8] | ((code >> b) & 1) << (at % 8));
    }
}

inline std::vector<std::uint8_t> packed_codes(const code_matrix& codes, int bits)
{
    std::vector<std::uint8_t> bytes(static_cast<std::size_t>(codes.size()) * static_cast<std::size_t>(bits) / 8, 0);
    std::size_t index = 0;
    for (Eigen::Index i = 0; i < codes.rows(); ++i)
        for (Eigen::Index j = 0; j < codes.cols(); ++j) write_code(bytes.data(), index++, bits, codes(i, j));
    return bytes;
}

// -------------------------------------------------------------------------------------------------------------------- record

/// Whether K and V are rotated: both or neither from one bool, or each by its own.
struct rotations {
    bool k = true, v = true;

    rotations(bool both = true) : k(both), v(both) {}
    rotations(bool keys, bool values) : k(keys), v(values) {}
};

/// The format as plain numbers.
struct shape {
    int head_dim_k = 128, head_dim_v = 128;
    int key_bits = 4, value_bits = 2;
    int group = 128;
    rotations rotate;
    int exact_channels = 0;
};

struct field_offsets {
    std::size_t k_codes, k_channel_scale, k_channel_zero, k_token_scale;
    std::size_t v_codes, v_channel_scale, v_token_scale, v_token_zero, exact, end;
};

inline field_offsets offsets(const shape& s)
{
    const auto dk = static_cast<std::size_t>(s.head_dim_k), g = static_cast<std::size_t>(s.group);
    const auto dv = s.value_bits ? static_cast<std::size_t>(s.head_dim_v) : 0u;
    field_offsets at{};
    std::size_t next = 0;
    const auto take = [&next](std::size_t bytes) { return (next += bytes) - bytes; };
    at.k_codes = take(dk * g * static_cast<std::size_t>(s.key_bits) / 8);
    at.k_channel_scale = take(2 * dk);
    at.k_channel_zero = take(2 * dk);
    at.k_token_scale = take(2 * g);
    at.v_codes = take(g * dv * static_cast<std::size_t>(s.value_bits) / 8);
    at.v_channel_scale = take(2 * dv);
    at.v_token_scale = take(dv ? 2 * g : 0);
    at.v_token_zero = take(dv ? 2 * g : 0);
    at.exact = take(2 * g * static_cast<std::size_t>(s.exact_channels));
    at.end = next;
    return at;
}

inline double read_half(const std::uint8_t* p) { return half_value(static_cast<std::uint16_t>(p[0] | p[1] << 8)); }

inline vector read_halves(const std::uint8_t* p, int count)
{
    vector v(count);
    for (int i = 0; i < count; ++i) v(i) = read_half(p + 2 * i);
    return v;
}

inline code_matrix read_codes(const std::uint8_t* stream, int rows, int columns, int bits)
{
    code_matrix codes(rows, columns);
    std::size_t index = 0;
    for (int i = 0; i < rows; ++i)
        for (int j = 0; j < columns; ++j) codes(i, j) = read_code(stream, index++, bits);
    return codes;
}

inline part read_key_part(const shape& s, const std::uint8_t* record)
{
    const field_offsets at = offsets(s);
    part p;
    p.bits = s.key_bits;
    p.codes = read_codes(record + at.k_codes, s.head_dim_k, s.group, s.key_bits);
    p.scale0 = read_halves(record + at.k_channel_scale, s.head_dim_k);
    p.zero0 = read_halves(record + at.k_channel_zero, s.head_dim_k);
    p.scale1 = read_halves(record + at.k_token_scale, s.group);
    return p;
}

inline part read_value_part(const shape& s, const std::uint8_t* record)
{
    const field_offsets at = offsets(s);
    part p;
    p.bits = s.value_bits;
    p.codes = read_codes(record + at.v_codes, s.group, s.head_dim_v, s.value_bits);
    p.scale1 = read_halves(record + at.v_channel_scale, s.head_dim_v);
    p.scale0 = read_halves(record + at.v_token_scale, s.group);
    p.zero0 = read_halves(record + at.v_token_zero, s.group);
    return p;
}

/// K [token][quantized channel] of a record, rotated basis.
inline matrix decoded_keys(const shape& s, const std::uint8_t* record) { return read_key_part(s, record).decoded().transpose(); }

/// V [token][channel] of a record, rotated basis.
inline matrix decoded_values(const shape& s, const std::uint8_t* record) { return read_value_part(s, record).decoded(); }

/// The exact channels [token][channel] of a record.
inline matrix decoded_exact(const shape& s, const std::uint8_t* record)
{
    const field_offsets at = offsets(s);
    matrix m(s.group, s.exact_channels);
    for (int t = 0; t < s.group; ++t)
        for (int c = 0; c < s.exact_channels; ++c) m(t, c) = read_half(record + at.exact + 2 * (t * s.exact_channels + c));
    return m;
}

inline matrix in_record_basis(bool rotate, const matrix& token_by_channel)
{
    return rotate ? rotated(token_by_channel) : token_by_channel;
}

/// Normalised K tile: axis 0 is the channel. `keys` are the quantized channels [token][channel], original basis.
inline normalized_tile normalized_keys(const shape& s, const matrix& keys, int iterations)
{
    return normalize(in_record_basis(s.rotate.k, keys).transpose(), iterations, iterations);
}

/// Normalised V tile: axis 0 is the token.
inline normalized_tile normalized_values(const shape& s, const matrix& values, int iterations)
{
    return normalize(in_record_basis(s.rotate.v, values), iterations, iterations);
}

/// |a - b| / |b| in the Frobenius norm.
inline double relative_difference(const matrix& a, const matrix& b)
{
    const double norm = b.norm();
    return norm > 0.0 ? (a - b).norm() / norm : a.norm();
}

}  // namespace reference
