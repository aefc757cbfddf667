// SPDX-License-Identifier: Apache-2.0
// The pieces of the online softmax: 2^x, log2, the soft-cap and the merging of states, on every instruction set.

#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "../catch.hpp"
#include "../support/library.hpp"

#include <kvarn/attention/softmax.hpp>

namespace {

constexpr float infinity = std::numeric_limits<float>::infinity();

template <class Arch>
std::vector<float> exp2_all(std::vector<float> x)
{
    using k = kvarn::simd::kernels<Arch>;
    const std::size_t count = x.size();
    x.resize(count + 16);
    for (std::size_t i = 0; i < count; i += static_cast<std::size_t>(k::width))
        k::store(&x[i], kvarn::detail::exp2<k>(k::load(&x[i])));
    x.resize(count);
    return x;
}

std::vector<float> arguments(double low, double high, std::size_t count)
{
    support::random_source random(1400);
    std::vector<float> x;
    for (std::size_t i = 0; i < count; ++i) x.push_back(static_cast<float>(random.uniform(low, high)));
    for (double each = low; each <= high; each += 0.5)
        for (const float near : {std::nextafter(static_cast<float>(each), -infinity), static_cast<float>(each),
                                 std::nextafter(static_cast<float>(each), infinity)})
            if (static_cast<double>(near) >= low && static_cast<double>(near) <= high) x.push_back(near);
    return x;
}

}  // namespace

TEST_CASE("attention/softmax: 2^x is accurate and the same everywhere", "[unit]")
{
    const std::vector<float> x = arguments(-126.0, 127.0, 200000);
    const std::vector<float> wanted = exp2_all<kvarn::simd::portable>(x);
    double worst = 0.0;
    for (std::size_t i = 0; i < x.size(); ++i) {
        const double exact = std::exp2(static_cast<double>(x[i]));
        worst = std::max(worst, std::fabs(static_cast<double>(wanted[i]) - exact) / exact);
    }
    INFO("largest relative error " << worst);
    CHECK(worst < 3e-7);
    CHECK(worst > 1e-9);
    support::for_each_arch([&](auto arch) {
        INFO(kvarn::simd::arch_traits<decltype(arch)>::name);
        CHECK(support::same_bits(exp2_all<decltype(arch)>(x), wanted));
    });
    CHECK(kvarn::detail::exp2_of(x[7]) == wanted[7]);
}

TEST_CASE("attention/softmax: 2^x of integers is exact, and 0 from -127 on", "[unit]")
{
    std::vector<float> x, wanted;
    for (int n = -126; n <= 127; ++n) {
        x.push_back(static_cast<float>(n));
        wanted.push_back(std::ldexp(1.0f, n));
    }
    for (const float low : {-127.0f, -127.1f, -128.0f, -150.0f, -1000.0f, -1e10f, -3e38f, -infinity}) {
        x.push_back(low);
        wanted.push_back(0.0f);
    }
    support::for_each_arch([&](auto arch) {
        INFO(kvarn::simd::arch_traits<decltype(arch)>::name);
        CHECK(support::same_bits(exp2_all<decltype(arch)>(x), wanted));
    });
    for (const float between : exp2_all<kvarn::simd::portable>(arguments(-127.0, -126.0, 1000))) {
        CHECK(between >= 0.0f);
        CHECK(between <= 0x1.00001p-126f);
    }
}

TEST_CASE("attention/softmax: log2", "[unit]")
{
    CHECK(kvarn::detail::log2_of(0.0f) == -infinity);
    CHECK(kvarn::detail::log2_of(1.0f) == 0.0f);
    CHECK(kvarn::detail::log2_of(1024.0f) == 10.0f);
    support::random_source random(1410);
    for (int i = 0; i < 2000; ++i) {
        const double x = random.uniform(-20.0, 30.0);
        CHECK(std::fabs(static_cast<double>(kvarn::detail::log2_of(static_cast<float>(std::exp2(x)))) - x) < 3e-6);
    }
}

TEST_CASE("attention/softmax: the soft-cap", "[unit]")
{
    for (const float cap : {0.5f, 5.0f, 30.0f, 50.0f, 1000.0f}) {
        std::vector<float> x;
        support::random_source random(1420);
        for (int i = 0; i < 4000; ++i) x.push_back(static_cast<float>(random.uniform(-15.0, 15.0) * static_cast<double>(cap)));
        for (int i = 0; i < 4000; ++i) x.push_back(static_cast<float>(random.gaussian()));
        for (const float each : {0.0f, -0.0f, 1e-30f, 3e38f, -3e38f, infinity, -infinity, cap}) x.push_back(each);
        x.resize((x.size() + 15) / 16 * 16, 0.25f);
        std::vector<float> wanted = x;
        kvarn::detail::soft_cap<kvarn::simd::portable>(wanted.data(), static_cast<int>(wanted.size()), cap);
        double worst = 0.0;
        for (std::size_t i = 0; i < x.size(); ++i) {
            const double exact = static_cast<double>(cap) * std::tanh(static_cast<double>(x[i]) / static_cast<double>(cap));
            worst = std::max(worst, std::fabs(static_cast<double>(wanted[i]) - exact) / static_cast<double>(cap));
            if (x[i] == 0.0f) CHECK(wanted[i] == 0.0f);
            CHECK(std::fabs(wanted[i]) <= cap);
        }
        INFO("cap " << cap << ", largest error " << worst << " of the cap");
        CHECK(worst < 3e-7);
        support::for_each_arch([&](auto arch) {
            std::vector<float> got = x;
            kvarn::detail::soft_cap<decltype(arch)>(got.data(), static_cast<int>(got.size()), cap);
            INFO(kvarn::simd::arch_traits<decltype(arch)>::name);
            CHECK(support::same_bits(got, wanted));
        });
    }
}

TEST_CASE("attention/softmax: scores enter a state block by block, and states merge", "[unit]")
{
    support::random_source random(1430);
    constexpr int n = 96, channels = 32;
    for (const double gain : {1.0, 100.0, 1e6}) {
        std::vector<float> scores;
        for (int i = 0; i < n; ++i) scores.push_back(static_cast<float>(gain * random.gaussian()));
        scores[40] = -1e30f;
        support::for_each_arch([&](auto arch) {
            using arch_type = decltype(arch);
            using kvarn::detail::softmax_state;
            INFO(kvarn::simd::arch_traits<arch_type>::name << ", gain " << gain);
            // Each score is also the only value, in every channel.
            const auto absorb = [&](std::vector<float> s, int first, softmax_state& state, std::vector<float>& out) {
                const int count = static_cast<int>(s.size());
                kvarn::detail::hide_scores(s.data(), count, {5, count - 3});
                const float largest = reduce_max(kvarn::detail::largest_of<arch_type>(s.data(), count));
                kvarn::detail::absorb_scores<arch_type>(s.data(), count, largest, state, out.data(), channels);
                for (std::size_t i = 0; i < s.size(); ++i)
                    for (float& each : out)
                        each += s[i] * (scores[static_cast<std::size_t>(first) + i] / static_cast<float>(gain));
                return s;
            };
            softmax_state whole = kvarn::detail::empty_state, left = whole, right = whole;
            std::vector<float> whole_out(channels, 0.0f), left_out = whole_out, right_out = whole_out;
            const auto part = [&](int first, int last) {
                return std::vector<float>(scores.begin() + first, scores.begin() + last);
            };
            const std::vector<float> weights = absorb(part(0, 32), 0, whole, whole_out);
            for (const std::size_t masked : {0u, 4u, 29u, 31u}) CHECK(weights[masked] == 0.0f);
            absorb(part(32, 64), 32, whole, whole_out);
            absorb(part(64, 96), 64, whole, whole_out);
            absorb(part(0, 32), 0, left, left_out);
            absorb(part(32, 64), 32, left, left_out);
            absorb(part(64, 96), 64, right, right_out);

            double largest = -1e300, total = 0.0, value = 0.0;
            for (int i = 0; i < n; ++i)
                if (i % 32 >= 5 && i % 32 < 29)
                    largest = std::max(largest, static_cast<double>(scores[static_cast<std::size_t>(i)]));
            for (int i = 0; i < n; ++i)
                if (i % 32 >= 5 && i % 32 < 29) {
                    const double s = static_cast<double>(scores[static_cast<std::size_t>(i)]), p = std::exp2(s - largest);
                    total += p;
                    value += p * s / gain;
                }
            const auto check = [&](const softmax_state& state, const std::vector<float>& out) {
                CHECK(static_cast<double>(state.largest) == largest);
                CHECK(std::fabs(static_cast<double>(state.total) - total) < 1e-5 * total);
                for (const float each : out)
                    CHECK(std::fabs(static_cast<double>(each) - value) < 1e-5 * (std::fabs(value) + total));
            };
            check(whole, whole_out);
            // With nothing a state merges to itself, bit for bit, from either side.
            softmax_state merged = kvarn::detail::empty_state;
            std::vector<float> merged_out(channels, 0.0f);
            const std::vector<float> nothing(channels, 0.0f);
            kvarn::detail::merge_states<arch_type>(merged, merged_out.data(), left, left_out.data(), channels);
            kvarn::detail::merge_states<arch_type>(merged, merged_out.data(), kvarn::detail::empty_state, nothing.data(),
                                                   channels);
            CHECK(merged.largest == left.largest);
            CHECK(merged.total == left.total);
            CHECK(support::same_bits(merged_out, left_out));
            kvarn::detail::merge_states<arch_type>(merged, merged_out.data(), right, right_out.data(), channels);
            check(merged, merged_out);
        });
    }
}
