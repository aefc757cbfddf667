// SPDX-License-Identifier: Apache-2.0
// Members of kernels that records show only on rare tiles: rounding, selection, the largest magnitude of rows, sums of sixteen rows at once.

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "../catch.hpp"
#include "../support/library.hpp"

namespace {

constexpr int lanes = kvarn::simd::lane_count;

/// Sixteen results of an operation on lanes.
template <class Arch, class F>
std::vector<float> sixteen(F&& f)
{
    std::vector<float> out(lanes);
    const kvarn::simd::lanes<Arch> x = f();
    x.store(out.data());
    return out;
}

}  // namespace

TEST_CASE("simd/kernels: rounded goes to the nearest integer, ties to even", "[unit]")
{
    std::vector<float> x;
    for (int i = 0; i < 8 * 256; ++i)
        for (const float next : {-1.0f, 0.0f, 1.0f}) {
            const float value = static_cast<float>(i) / 8;
            x.push_back(next == 0.0f ? value : std::max(0.0f, std::nextafter(value, 1000.0f * next)));
        }
    support::for_each_arch([&](auto arch) {
        using v = kvarn::simd::lanes<decltype(arch)>;
        INFO(kvarn::simd::arch_traits<decltype(arch)>::name);
        int wrong = 0;
        for (std::size_t i = 0; i + lanes <= x.size(); i += lanes) {
            const auto got = sixteen<decltype(arch)>([&]() -> v { return rounded(v(v::load(x.data() + i))); });
            for (std::size_t l = 0; l < lanes; ++l) wrong += got[l] != std::nearbyint(x[i + l]) || std::signbit(got[l]);
        }
        CHECK(wrong == 0);
    });
}

TEST_CASE("simd/kernels: where_greater chooses lane by lane, and no is what NaN gets", "[unit]")
{
    constexpr float inf = std::numeric_limits<float>::infinity(), nan = std::numeric_limits<float>::quiet_NaN();
    constexpr float values[] = {0.0f, -0.0f, 1.0f, -1.0f, 0x1p-149f, -0x1p-149f, 1.0000001f, 3e38f, inf, -inf, nan};
    std::vector<float> a, b;
    for (const float x : values)
        for (const float y : values) a.push_back(x), b.push_back(y);
    a.resize((a.size() + lanes - 1) / lanes * lanes), b.resize(a.size());
    support::for_each_arch([&](auto arch) {
        using v = kvarn::simd::lanes<decltype(arch)>;
        INFO(kvarn::simd::arch_traits<decltype(arch)>::name);
        int wrong = 0;
        for (std::size_t i = 0; i < a.size(); i += lanes) {
            const v x = v::load(a.data() + i), y = v::load(b.data() + i), yes = v::broadcast(7.0f);
            const auto got = sixteen<decltype(arch)>([&]() -> v { return where_greater(x, y, yes, y); });
            for (std::size_t l = 0; l < lanes; ++l) {
                const float wanted = a[i + l] > b[i + l] ? 7.0f : b[i + l];
                wrong += std::bit_cast<std::uint32_t>(got[l]) != std::bit_cast<std::uint32_t>(wanted);
            }
        }
        CHECK(wrong == 0);
    });
}

TEST_CASE("simd/kernels: the largest magnitude of rows, wherever it is and whatever lies between them", "[unit]")
{
    support::for_each_arch([&](auto arch) {
        using k = kvarn::simd::kernels<decltype(arch)>;
        INFO(kvarn::simd::arch_traits<decltype(arch)>::name);
        const auto check_type = [&](auto element) {
            using T = decltype(element);
            for (const int count : {1, 3, 16, 33, 64, 100})
                for (const int rows : {1, 2, 5}) {
                    const int stride = count + 3;
                    std::vector<T> x(static_cast<std::size_t>(rows * stride), support::stored<T>(-1e4f));  // between rows: more than in them
                    for (int r = 0; r < rows; ++r)
                        for (int i = 0; i < count; ++i) x[static_cast<std::size_t>(r * stride + i)] = support::stored<T>(static_cast<float>(i % 7 - 3));
                    int wrong = 0;
                    for (int r = 0; r < rows; ++r)
                        for (int i = 0; i < count; ++i) {
                            T& at = x[static_cast<std::size_t>(r * stride + i)];
                            const T before = at;
                            at = support::stored<T>(-100.0f - static_cast<float>(i));
                            wrong += k::largest_magnitude(x.data(), static_cast<std::size_t>(count), rows, stride) !=
                                     kvarn::simd::kernels<kvarn::simd::portable>::largest_magnitude(&at, 1);
                            at = before;
                        }
                    CAPTURE(sizeof(T), count, rows);
                    CHECK(wrong == 0);
                }
        };
        check_type(0.0f);
        check_type(kvarn::half{});
        check_type(kvarn::bfloat16{});
    });
}

TEST_CASE("simd/kernels: sums of sixteen rows have the bits of one row's sum", "[unit]")
{
    support::random_source random(77);
    std::vector<float> x(lanes * lanes);
    for (float& value : x) value = static_cast<float>(random.gaussian() * std::pow(10.0, random.uniform(-3.0, 3.0)));
    std::vector<float> wanted;
    for (std::size_t row = 0; row < lanes; ++row) {  // halves first
        std::vector<float> sum(x.begin() + static_cast<std::ptrdiff_t>(row * lanes), x.begin() + static_cast<std::ptrdiff_t>((row + 1) * lanes));
        for (std::size_t half = lanes / 2; half >= 1; half /= 2)
            for (std::size_t i = 0; i < half; ++i) sum[i] += sum[i + half];
        wanted.push_back(sum[0]);
    }
    support::for_each_arch([&](auto arch) {
        using Arch = decltype(arch);
        using v = kvarn::simd::lanes<Arch>;
        using k = kvarn::simd::kernels<Arch>;
        INFO(kvarn::simd::arch_traits<Arch>::name);
        std::vector<float> folded(static_cast<std::size_t>(lanes * k::width));
        for (int row = 0; row < lanes; ++row) {
            const v all = v::load(x.data() + row * lanes);
            k::store(folded.data() + row * k::width, fold(all));
            CHECK(reduce_add(all) == wanted[static_cast<std::size_t>(row)]);
        }
        CHECK(sixteen<Arch>([&] { return kvarn::simd::sum_folded_rows<Arch>(folded.data()); }) == wanted);
    });
}
