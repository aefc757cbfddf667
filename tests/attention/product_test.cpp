// SPDX-License-Identifier: Apache-2.0
// The integer products behind attention at their documented limits, against 64-bit sums, and that rounding keeps weights within them.

#include <array>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <type_traits>
#include <utility>
#include <vector>

#include "../catch.hpp"
#include "../reference/half_precision.hpp"
#include "../support/random_tiles.hpp"

#include <kvarn/attention/sealed.hpp>

namespace {

using kvarn::simd::portable;
using native = kvarn::simd::native_arch;

constexpr int all_bits[] = {2, 3, 4, 5, 6, 8};

/// One product; weights and sums of head h start at h * stride.
template <class Weight>
using product = void (*)(const std::uint8_t* codes, int rows, int columns, const Weight* weights, float* sums,
                         std::ptrdiff_t stride);

template <class Arch, int Bits, class Weight, int... Head>
void multiply(const std::uint8_t* codes, int rows, int columns, const Weight* weights, float* sums, std::ptrdiff_t stride)
{
    constexpr int heads = sizeof...(Head);
    const Weight* const w[heads] = {weights + Head * stride...};
    float* const to[heads] = {sums + Head * stride...};
    kvarn::simd::read_ahead ahead{reinterpret_cast<const std::byte*>(codes), reinterpret_cast<const std::byte*>(codes)};
    if constexpr (sizeof(Weight) == 2)
        kvarn::simd::kernels<Arch>::template multiply_words<Bits, heads>(codes, rows, columns, w, to, ahead);
    else
        kvarn::simd::kernels<Arch>::template multiply_bytes<Bits, heads>(codes, rows, columns, w, to, ahead);
}

/// Compiled for 1, 2 and 4 heads, for bytes for 8 where a kernel takes so many.
constexpr int head_counts[] = {1, 2, 4, 8};
constexpr std::size_t most_heads = 8;
template <class Arch, int Bits, class Weight>
constexpr std::array<product<Weight>, 4> products()
{
    std::array<product<Weight>, 4> all = {&multiply<Arch, Bits, Weight, 0>, &multiply<Arch, Bits, Weight, 0, 1>,
                                          &multiply<Arch, Bits, Weight, 0, 1, 2, 3>, nullptr};
    if constexpr (sizeof(Weight) == 1 && kvarn::simd::kernels<Arch>::most_byte_heads == 8)
        all[3] = &multiply<Arch, Bits, Weight, 0, 1, 2, 3, 4, 5, 6, 7>;
    return all;
}

template <class Weight>
std::array<product<Weight>, 4> products_of(bool is_native, int bits)
{
    std::array<product<Weight>, 4> found{};
    kvarn::detail::with_bits(bits, [&](auto b) {
        if constexpr (sizeof(Weight) == 2 || b() == 2 || b() == 4)
            found = is_native ? products<native, b(), Weight>() : products<portable, b(), Weight>();
    });
    return found;
}

/// How the magnitudes of weights share a total, and which signs they get.
enum class share { even, negative, alternating, few, random, random_signs };
constexpr share all_shares[] = {share::even, share::negative, share::alternating, share::few, share::random, share::random_signs};

template <class Weight>
std::vector<Weight> shared_out(support::random_source& random, share how, int rows, std::int64_t total, std::int64_t most)
{
    std::vector<std::int64_t> magnitude(static_cast<std::size_t>(rows), 0);
    std::int64_t left = total;
    if (how == share::even || how == share::negative || how == share::alternating) {
        for (std::int64_t i = 0; i < rows; ++i) {
            magnitude[static_cast<std::size_t>(i)] = std::min(most, left / (rows - i));
            left -= magnitude[static_cast<std::size_t>(i)];
        }
    } else {
        for (int turn = 0; turn < 20 * rows && left > 0; ++turn) {
            std::int64_t& one = magnitude[random.below(magnitude.size())];
            std::int64_t more = std::min(most - one, left);
            if (how != share::few)
                more = std::min(more, static_cast<std::int64_t>(random.below(static_cast<std::size_t>(1 + 2 * total / rows))));
            one += more;
            left -= more;
        }
    }
    std::vector<Weight> weights;
    for (std::size_t i = 0; i < magnitude.size(); ++i) {
        const bool minus =
            how == share::negative || (how == share::alternating && i % 2) || (how == share::random_signs && random.below(2));
        weights.push_back(static_cast<Weight>(minus && std::is_signed_v<Weight> ? -magnitude[i] : magnitude[i]));
    }
    return weights;
}

enum class code_kind { largest, random, by_sign };

/// One product of every head count with every share of weights, against sums in 64 bits.
template <class Weight>
void check_products(int bits, int rows, int columns, std::int64_t total, std::int64_t most, int largest_code,
                    support::random_source& random)
{
    const std::size_t r = static_cast<std::size_t>(rows), c = static_cast<std::size_t>(columns);
    const std::ptrdiff_t stride = std::max(rows, columns) + 16;
    for (const code_kind kind : {code_kind::largest, code_kind::random, code_kind::by_sign}) {
        std::vector<Weight> weights(most_heads * static_cast<std::size_t>(stride), Weight{1});
        const std::size_t rotate_shares = random.below(6);
        for (std::size_t h = 0; h < most_heads; ++h) {
            const auto one = shared_out<Weight>(random, all_shares[(rotate_shares + h) % 6], rows, total, most);
            std::copy(one.begin(), one.end(), weights.begin() + static_cast<std::ptrdiff_t>(h) * stride);
        }
        std::vector<std::uint8_t> codes(r * c);
        for (std::size_t i = 0; i < r; ++i)
            for (std::size_t j = 0; j < c; ++j) {
                const bool zero = kind == code_kind::by_sign && (static_cast<std::int64_t>(weights[i]) < 0) != (j % 2 == 1);
                codes[i * c + j] = static_cast<std::uint8_t>(
                    kind == code_kind::random ? static_cast<int>(random.below(static_cast<std::size_t>(largest_code) + 1))
                    : zero                    ? 0
                                              : largest_code);
            }
        std::vector<std::uint8_t> packed(r * c * static_cast<std::size_t>(bits) / 8 + 16,
                                         0xff);  // a product may read 16 bytes more
        kvarn::detail::with_bits(
            bits, [&](auto b) { kvarn::detail::pack_stream<portable, b()>(codes.data(), codes.size(), packed.data()); });
        std::vector<float> wanted(most_heads * c);
        for (std::size_t h = 0; h < most_heads; ++h)
            for (std::size_t j = 0; j < c; ++j) {
                std::int64_t sum = 0;
                for (std::size_t i = 0; i < r; ++i)
                    sum += static_cast<std::int64_t>(weights[h * static_cast<std::size_t>(stride) + i]) * codes[i * c + j];
                wanted[h * c + j] = static_cast<float>(sum);
            }
        for (const bool is_native : {false, true}) {
            const auto calls = products_of<Weight>(is_native, bits);
            for (std::size_t n = 0; n < calls.size(); ++n) {
                if (calls[n] == nullptr) continue;
                std::vector<float> sums(most_heads * static_cast<std::size_t>(stride), -77.0f);
                calls[n](packed.data(), rows, columns, weights.data(), sums.data(), stride);
                std::size_t different = 0;
                for (std::size_t h = 0; h < most_heads; ++h)
                    for (std::size_t j = 0; j < static_cast<std::size_t>(stride); ++j) {
                        const bool inside = h < static_cast<std::size_t>(head_counts[n]) && j < c;
                        different += sums[h * static_cast<std::size_t>(stride) + j] != (inside ? wanted[h * c + j] : -77.0f);
                    }
                INFO((is_native ? "native" : "portable")
                     << ", " << bits << " bits, " << rows << " rows, " << columns << " columns, heads " << head_counts[n]
                     << ", codes " << static_cast<int>(kind));
                CHECK(different == 0);
            }
        }
    }
}

constexpr int row_counts[] = {32, 36, 64, 128, 256, 576};
constexpr int column_counts[] = {16, 48, 64, 80, 96, 112, 128, 192, 256, 576};

/// Weights of every kind that the rounding meets, padded with zeros to whole lanes.
std::vector<std::vector<float>> awkward_weights(support::random_source& random, int n, double limit)
{
    std::vector<std::vector<float>> all;
    const auto add = [&](auto&& f) {
        std::vector<float> w(static_cast<std::size_t>(kvarn::simd::whole_lanes(n)), 0.0f);
        for (int i = 0; i < n; ++i) w[static_cast<std::size_t>(i)] = static_cast<float>(f(i));
        all.push_back(std::move(w));
    };
    // Every rounding goes up by half a step: all but one weight are a little above k + 1/2 steps, and the last makes up the total.
    const double middle = std::floor(limit / n - 0.5) + 0.505;
    for (const double gain : {1.0, 1e-20, 3.7e15, 1e28}) {
        add([&](int) { return gain; });
        add([&](int i) { return i == 0 ? gain : gain * 1e-7; });
        add([&](int i) { return i == n - 1 ? gain * (limit - (n - 1) * middle) : gain * middle; });
        add([&](int i) { return i == n - 1 ? gain * std::fabs(limit - (n - 1) * (middle - 1.0)) : gain * (middle - 1.0); });
        add([&](int) { return gain * std::exp(random.gaussian()); });
        add([&](int) { return gain * std::exp(4.0 * random.gaussian()); });
        add([&](int) { return gain * random.uniform(); });
        add([&](int i) { return i < n / 2 ? gain : 0.0; });
    }
    add([&](int) { return 0.0; });
    add([&](int) { return 1e-38; });
    add([&](int) { return 1e-42; });
    return all;
}

struct rounding {
    std::vector<int> weights;
    kvarn::detail::product_scale scale{};
};

/// Rounds the weights as attention does; one number beyond the padding must stay as it is.
template <class Arch, class Weight>
rounding rounded(int bits, int n, const std::vector<float>& w)
{
    const std::vector<float> ones(w.size(), 1.0f), zeros(w.size(), 0.0f);
    std::vector<float> same(w.size());
    kvarn::detail::weight_totals totals{};
    const int padded = static_cast<int>(w.size());
    kvarn::detail::weigh_query<Arch, sizeof(Weight) == 1>(w.data(), ones.data(), zeros.data(), padded, same.data(), totals);
    std::vector<Weight> to(w.size() + 1, Weight{77});
    rounding r;
    kvarn::detail::with_bits(bits, [&](auto b) {
        if constexpr (sizeof(Weight) == 2 || b() == 2 || b() == 4)
            r.scale = kvarn::detail::round_weights<Arch>(b(), w.data(), n, totals, to.data());
    });
    CHECK(to.back() == Weight{77});
    r.weights.assign(to.begin(), to.end() - 1);
    return r;
}

/// |weight| <= most and sum |weight| * factor <= limit; each weight within half a step; the offset is what all of them lost, times the middle
/// code, or 0 for words. `tight`: one of the two limits is nearly reached.
template <class Weight>
void check_rounding(int bits, int n, const std::vector<float>& w, std::int64_t most, std::int64_t limit,
                    std::int64_t factor, bool tight)
{
    const rounding r = rounded<native, Weight>(bits, n, w), other = rounded<portable, Weight>(bits, n, w);
    CHECK(r.weights == other.weights);
    CHECK(std::bit_cast<std::uint32_t>(r.scale.step) == std::bit_cast<std::uint32_t>(other.scale.step));
    CHECK(std::bit_cast<std::uint32_t>(r.scale.offset) == std::bit_cast<std::uint32_t>(other.scale.offset));
    const double step = static_cast<double>(r.scale.step), middle = 0.5 * ((1 << bits) - 1);
    std::int64_t sum = 0, largest = 0;
    double worst = 0.0, lost = 0.0, magnitudes = 0.0;
    for (std::size_t i = 0; i < w.size(); ++i) {
        const double loss = static_cast<double>(w[i]) - step * r.weights[i];
        sum += std::abs(r.weights[i]);
        largest = std::max<std::int64_t>(largest, std::abs(r.weights[i]));
        worst = std::max(worst, std::fabs(loss));
        lost += loss;
        magnitudes += std::fabs(static_cast<double>(w[i]));
    }
    CHECK(largest <= most);
    CHECK(sum * factor <= limit);
    CHECK(worst < 0.51 * step);
    if (sizeof(Weight) == 2)
        CHECK(r.scale.offset == 0.0f);
    else
        CHECK(std::fabs(static_cast<double>(r.scale.offset) - lost * middle) <= 1e-5 * middle * (magnitudes + step));
    if (tight) CHECK((largest >= most - 2 || static_cast<double>(sum * factor) > 0.97 * static_cast<double>(limit)));
}

}  // namespace

TEST_CASE("attention/product: 16-bit weights at the limit of the 32-bit sums", "[unit]")
{
    support::random_source random(1300);
    for (const int bits : all_bits)
        for (const int rows : row_counts)
            for (const int columns : column_counts) {
                const std::int64_t limit = ((std::int64_t{1} << 31) - 1) / kvarn::simd::word_limit(bits);
                check_products<std::int16_t>(bits, rows, columns, limit, 32767, (1 << bits) - 1, random);
            }
}

TEST_CASE("attention/product: 8-bit weights, all of them as large as they come", "[unit]")
{
    support::random_source random(1310);
    for (const int bits : {2, 4})
        for (const int rows : row_counts)
            for (const int columns : column_counts) {
                const int levels = (1 << bits) - 1;
                check_products<std::int8_t>(bits, rows, columns, std::int64_t{127} * rows, 127, levels, random);
                check_products<std::int8_t>(bits, rows, columns, std::int64_t{40} * rows, 127, levels, random);
            }
}

TEST_CASE("attention/product: rounding to 16 bits stays below the limit and within half a step", "[unit]")
{
    support::random_source random(1320);
    for (const int bits : all_bits)
        for (const int n : {32, 36, 40, 64, 100, 128, 256, 512, 576}) {
            const std::int64_t word_limit = kvarn::simd::word_limit(bits);
            const double limit = 2147483648.0 / static_cast<double>(word_limit) - n;
            std::size_t number = 0;
            for (std::vector<float>& w : awkward_weights(random, n, limit)) {
                for (const bool signs : {false, true}) {
                    if (signs)
                        for (std::size_t i = 1; i < w.size(); i += 2) w[i] = -w[i];
                    INFO(bits << " bits, " << n << " weights, kind " << number << (signs ? ", signs" : ""));
                    check_rounding<std::int16_t>(bits, n, w, 32767, (std::int64_t{1} << 31) - 1, word_limit,
                                                 number % 8 == 0 && number < 32);
                    if (!signs)
                        check_rounding<std::int16_t>(bits, n, w, 32767, (std::int64_t{1} << 31) - 1, word_limit, false);
                }
                ++number;
            }
        }
}

TEST_CASE("attention/product: rounding to 8 bits keeps half a step and makes up for what it takes away", "[unit]")
{
    support::random_source random(1330);
    for (const int bits : {2, 4})
        for (const int n : {32, 36, 64, 100, 128, 256, 576}) {
            std::size_t number = 0;
            for (std::vector<float>& w : awkward_weights(random, n, 127.0 * n)) {
                for (const bool signs : {false, true}) {
                    if (signs)
                        for (std::size_t i = 1; i < w.size(); i += 2) w[i] = -w[i];
                    INFO(bits << " bits, " << n << " weights, kind " << number << (signs ? ", signs" : ""));
                    check_rounding<std::int8_t>(bits, n, w, 127, std::int64_t{127} * n, 1, number % 8 == 0 && number < 32);
                }
                ++number;
            }
        }
}
