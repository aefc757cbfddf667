// SPDX-License-Identifier: Apache-2.0
// What compile_cost.sh measures the library against: templates of the standard library that every compiler at hand knows, and loops over
// small arrays that the optimiser unrolls. It never changes: whoever changes it measures all of compile_cost.txt again.

#include <algorithm>
#include <cstddef>
#include <functional>
#include <map>
#include <regex>
#include <sstream>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

namespace {

/// One product of small matrices in registers: loops of constant counts, as in the library's kernels.
template <int Rows, int Columns>
void product(const float* a, const float* b, float* c, int n)
{
    float sum[Rows][Columns]{};
    for (int i = 0; i < n; ++i)
        for (int r = 0; r < Rows; ++r)
            for (int s = 0; s < Columns; ++s) sum[r][s] += a[i * Rows + r] * b[i * Columns + s];
    for (int r = 0; r < Rows; ++r)
        for (int s = 0; s < Columns; ++s) c[r * Columns + s] = sum[r][s];
}

template <int... Rows>
void products(const float* a, const float* b, float* c, int n, std::integer_sequence<int, Rows...>)
{
    (..., (product<Rows + 1, 4>(a, b, c, n), product<Rows + 1, 8>(a, b, c, n)));
}

template <class T>
std::size_t sorted(std::vector<T> x)
{
    std::sort(x.begin(), x.end());
    std::stable_sort(x.begin(), x.end(), std::greater<T>());
    std::nth_element(x.begin(), x.begin() + static_cast<std::ptrdiff_t>(x.size() / 2), x.end());
    std::map<T, std::size_t> places;
    std::unordered_map<T, std::size_t> counts;
    for (const T& y : x) ++places[y], ++counts[y];
    for (const auto& [value, count] : counts)
        if (places[value] != count) return 0;
    return places.size();
}

}  // namespace

std::size_t reference(const std::string& text, const float* a, const float* b, float* c, int n)
{
    std::ostringstream out;
    const std::regex word("([a-z]+)([0-9]*)");
    for (std::sregex_iterator i(text.begin(), text.end(), word), end; i != end; ++i) out << i->str(1) << ' ' << i->position() << '\n';
    products(a, b, c, n, std::make_integer_sequence<int, 8>{});
    return out.str().size() + sorted<int>({n, 1}) + sorted<std::string>({text, out.str()});
}
