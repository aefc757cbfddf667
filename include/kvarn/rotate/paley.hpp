// SPDX-License-Identifier: Apache-2.0
#pragma once
// Hadamard matrices of order 12, 20, 28 and 36 (Paley 1933), built at compile time, in the form that
// the transform uses: each output is a sum over groups of four inputs, and each group has only eight combinations up to sign.

#include <kvarn/base/config.hpp>

namespace kvarn::detail {

/// Legendre symbol of a modulo the odd prime q: 0, +1 (square) or -1.
constexpr int quadratic_character(int a, int q) noexcept
{
    a = (a % q + q) % q;
    if (a == 0) return 0;
    for (int x = 1; x < q; ++x)
        if (x * x % q == a) return 1;
    return -1;
}

/// Entry (i, j), +1 or -1, of the Hadamard matrix of order m in {12, 20, 28, 36}.
/// 12 and 20: Paley I, H = I + [[0, 1], [-1, Q]]. 28 and 36: Paley II, C (x) [[1, 1], [1, -1]] + I (x) [[1, -1], [-1, -1]],
/// C = [[0, 1], [1, Q]]. Q(a, b) = quadratic character of a - b.
constexpr int paley_entry(int m, int i, int j) noexcept
{
    if (m == 12 || m == 20) {
        const int q = m - 1;
        if (i == j) return 1;
        if (i == 0) return 1;
        if (j == 0) return -1;
        return quadratic_character(i - j, q);
    }
    const int q = m / 2 - 1;
    const int a = i / 2, b = j / 2, p = i % 2, r = j % 2;
    if (a == b) return p == 0 && r == 0 ? 1 : -1;
    const int c = a == 0 || b == 0 ? 1 : quadratic_character(a - b, q);
    return p == 1 && r == 1 ? -c : c;
}

/// Whether the matrix of order m is its own transpose (Paley II).
KVARN_INLINE constexpr bool is_paley_symmetric(int m) noexcept { return m == 28 || m == 36; }

/// One summand of an output: `sign` times combination `index` of a group (a, b, c, d):
/// 0: (a+b)+(c+d)  1: (a+b)-(c+d)  2: (a+b)+(c-d)  3: (a+b)-(c-d)  4..7: the same with a-b.
struct paley_term {
    float sign;
    int index;
};

template <int M>
struct paley_terms {
    paley_term at[M][M / 4];
};

/// The terms of y = H x, or of y = transpose(H) x.
template <int M, bool Transposed>
inline constexpr paley_terms<M> paley_table = [] {
    paley_terms<M> table{};
    for (int i = 0; i < M; ++i)
        for (int g = 0; g < M / 4; ++g) {
            int s[4] = {};
            for (int e = 0; e < 4; ++e) s[e] = Transposed ? paley_entry(M, 4 * g + e, i) : paley_entry(M, i, 4 * g + e);
            table.at[i][g].sign = static_cast<float>(s[0]);
            table.at[i][g].index = (s[0] != s[1] ? 4 : 0) + (s[2] != s[3] ? 2 : 0) + (s[0] != s[2] ? 1 : 0);
        }
    return table;
}();

}  // namespace kvarn::detail
