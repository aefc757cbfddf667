// SPDX-License-Identifier: Apache-2.0

#include <cmath>
#include <limits>
#include <vector>

#include "../catch.hpp"
#include "../support/library.hpp"

namespace {

constexpr int head_dims[] = {32,  36,  40,  48,  56,  64,  72,  80,  96,  112, 128,
                             144, 160, 192, 224, 256, 288, 320, 384, 448, 512, 576};

std::vector<float> random_values(std::uint64_t seed, std::size_t count)
{
    support::random_source random(seed);
    std::vector<float> x(count);
    for (float& value : x) value = static_cast<float>(random.gaussian());
    return x;
}

template <class T>
reference::matrix matrix_of(const std::vector<T>& x, int tokens, int channels)
{
    reference::matrix m(tokens, channels);
    for (int t = 0; t < tokens; ++t)
        for (int c = 0; c < channels; ++c) m(t, c) = support::value_of(x[static_cast<std::size_t>(t * channels + c)]);
    return m;
}

template <class T>
kvarn::kv_view<T> dense(std::vector<T>& x, int tokens, int channels)
{
    return kvarn::token_major(x.data(), static_cast<std::size_t>(tokens), 1, static_cast<std::size_t>(channels));
}

}  // namespace

TEST_CASE("rotate/hadamard: the reference matrices are orthonormal, and symmetric where they should be", "[unit]")
{
    for (const int d : head_dims) {
        INFO("head_dim " << d);
        const reference::matrix& h = reference::hadamard(d);
        REQUIRE(h.rows() == d);
        CHECK((h * h.transpose() - reference::matrix::Identity(d, d)).cwiseAbs().maxCoeff() < 1e-12);
        CHECK((h.cwiseAbs().array() - 1.0 / std::sqrt(d)).abs().maxCoeff() < 1e-12);
        if ((d & (d - 1)) == 0) CHECK(h.isApprox(h.transpose()));
    }
    CHECK(reference::hadamard(100).size() == 0);
    CHECK(!reference::hadamard(48).isApprox(reference::hadamard(48).transpose()));
}

TEST_CASE("rotate/hadamard: rotate is multiplication by H, unrotate by its transpose", "[unit]")
{
    support::for_each_arch([](auto arch) {
        using arch_type = decltype(arch);
        INFO(kvarn::simd::arch_traits<arch_type>::name);
        for (const int d : head_dims) {
            INFO("head_dim " << d);
            const int tokens = 19;  // no multiple of any register
            const std::vector<float> x = random_values(static_cast<std::uint64_t>(d), static_cast<std::size_t>(tokens * d));
            const reference::matrix m = matrix_of(x, tokens, d);
            const double largest = m.cwiseAbs().maxCoeff();

            std::vector<float> forward = x;
            REQUIRE(kvarn::rotate<arch_type>(dense(forward, tokens, d)) == kvarn::status::ok);
            CHECK((matrix_of(forward, tokens, d) - reference::rotated(m)).cwiseAbs().maxCoeff() < 1e-6 * largest);

            std::vector<float> backward = x;
            REQUIRE(kvarn::unrotate<arch_type>(dense(backward, tokens, d)) == kvarn::status::ok);
            CHECK((matrix_of(backward, tokens, d) - reference::unrotated(m)).cwiseAbs().maxCoeff() < 1e-6 * largest);

            REQUIRE(kvarn::unrotate<arch_type>(dense(forward, tokens, d)) == kvarn::status::ok);
            CHECK((matrix_of(forward, tokens, d) - m).cwiseAbs().maxCoeff() < 2e-6 * largest);
        }
    });
}

TEST_CASE("rotate/hadamard: every column of H, one unit vector at a time", "[unit]")
{
    support::for_each_arch([](auto arch) {
        using arch_type = decltype(arch);
        INFO(kvarn::simd::arch_traits<arch_type>::name);
        for (const int d : head_dims) {
            INFO("head_dim " << d);
            std::vector<float> x(static_cast<std::size_t>(d * d), 0.0f);
            for (int i = 0; i < d; ++i) x[static_cast<std::size_t>(i * d + i)] = 1.0f;
            REQUIRE(kvarn::rotate<arch_type>(dense(x, d, d)) == kvarn::status::ok);
            // Token i holds column i of H.
            CHECK((matrix_of(x, d, d) - reference::hadamard(d).transpose()).cwiseAbs().maxCoeff() < 1e-7);
        }
    });
}

TEST_CASE("rotate/hadamard: lengths and scores survive", "[unit]")
{
    for (const int d : head_dims) {
        INFO("head_dim " << d);
        std::vector<float> k = random_values(1, static_cast<std::size_t>(8 * d)), q = random_values(2, static_cast<std::size_t>(8 * d));
        const reference::matrix scores = matrix_of(q, 8, d) * matrix_of(k, 8, d).transpose();
        const reference::vector lengths = matrix_of(k, 8, d).rowwise().norm();
        REQUIRE(kvarn::rotate(dense(k, 8, d)) == kvarn::status::ok);
        REQUIRE(kvarn::rotate(dense(q, 8, d)) == kvarn::status::ok);
        const reference::matrix rotated_scores = matrix_of(q, 8, d) * matrix_of(k, 8, d).transpose();
        CHECK((rotated_scores - scores).cwiseAbs().maxCoeff() < 1e-5 * std::sqrt(d));
        const reference::vector rotated_lengths = matrix_of(k, 8, d).rowwise().norm();
        CHECK((rotated_lengths - lengths).cwiseAbs().maxCoeff() < 1e-6 * lengths.maxCoeff());
    }
}

TEST_CASE("rotate/hadamard: half and bfloat16 are rotated in float and rounded once", "[unit]")
{
    const auto check = [](auto element, double epsilon) {
        using T = decltype(element);
        for (const int d : head_dims) {
            INFO("head_dim " << d);
            std::vector<T> x = support::stored<T>(random_values(3, static_cast<std::size_t>(5 * d)));
            const reference::matrix wanted = reference::rotated(matrix_of(x, 5, d));
            REQUIRE(kvarn::rotate(dense(x, 5, d)) == kvarn::status::ok);
            const reference::matrix difference = (matrix_of(x, 5, d) - wanted).cwiseAbs();
            const reference::matrix allowed = (wanted.cwiseAbs() * epsilon).array() + 2e-6;
            CHECK((difference - allowed).maxCoeff() <= 0.0);
        }
    };
    check(kvarn::half{}, 0x1p-11);
    check(kvarn::bfloat16{}, 0x1p-8);
}

TEST_CASE("rotate/hadamard: half saturates", "[unit]")
{
    std::vector<kvarn::half> x(64, support::stored<kvarn::half>(60000.0f));
    REQUIRE(kvarn::rotate(dense(x, 1, 64)) == kvarn::status::ok);
    CHECK(x[0].bits == 0x7bff);
    for (std::size_t i = 1; i < 64; ++i) CHECK((x[i].bits & 0x7fff) == 0);
    for (auto& h : x) h = support::stored<kvarn::half>(-60000.0f);
    REQUIRE(kvarn::rotate(dense(x, 1, 64)) == kvarn::status::ok);
    CHECK(x[0].bits == 0xfbff);
}

TEST_CASE("rotate/hadamard: every instruction set and every stride gives the same bits", "[property]")
{
    for (const int d : head_dims) {
        INFO("head_dim " << d);
        const int tokens = 7, heads = 3;
        const std::vector<float> x = random_values(4, static_cast<std::size_t>(tokens * heads * d));
        std::vector<float> wanted = x;
        const auto n = static_cast<std::size_t>(d);
        REQUIRE(kvarn::rotate<kvarn::simd::portable>(kvarn::token_major(wanted.data(), 7, 3, n)) == kvarn::status::ok);
        support::for_each_arch([&](auto arch) {
            using arch_type = decltype(arch);
            std::vector<float> dense_result = x;
            REQUIRE(kvarn::rotate<arch_type>(kvarn::token_major(dense_result.data(), 7, 3, n)) == kvarn::status::ok);
            CHECK(support::same_bits(dense_result, wanted));

            // Channels two apart, tokens backwards, heads outside; what lies between is not touched.
            std::vector<float> spread(static_cast<std::size_t>(tokens * heads * d * 2) + 2, -5.0f);
            const auto place = [&](int t, int h, int c) {
                return static_cast<std::size_t>(1 + ((h * tokens + (tokens - 1 - t)) * d + c) * 2);
            };
            for (int t = 0; t < tokens; ++t)
                for (int h = 0; h < heads; ++h)
                    for (int c = 0; c < d; ++c) spread[place(t, h, c)] = x[static_cast<std::size_t>((t * heads + h) * d + c)];
            const kvarn::kv_view<float> view{&spread[place(0, 0, 0)], 7, 3, n, -2 * d, 2 * d * tokens, 2};
            REQUIRE(kvarn::rotate<arch_type>(view) == kvarn::status::ok);
            std::size_t different = 0, touched = 0;
            for (int t = 0; t < tokens; ++t)
                for (int h = 0; h < heads; ++h)
                    for (int c = 0; c < d; ++c)
                        different += spread[place(t, h, c)] != wanted[static_cast<std::size_t>((t * heads + h) * d + c)];
            for (std::size_t i = 0; i < spread.size(); i += 2) touched += spread[i] != -5.0f;
            CHECK(different == 0);
            CHECK(touched == 0);
        });
    }
}

TEST_CASE("rotate/hadamard: what cannot be rotated is refused and untouched", "[unit]")
{
    for (const int d : {1, 4, 33, 44, 52, 60, 88, 100, 176, 1000}) {
        INFO("head_dim " << d);
        std::vector<float> x(static_cast<std::size_t>(2 * d), 3.0f);
        CHECK(kvarn::rotate(dense(x, 2, d)) == kvarn::status::unsupported_head_dim);
        CHECK(kvarn::unrotate(dense(x, 2, d)) == kvarn::status::unsupported_head_dim);
        for (const float f : x) REQUIRE(f == 3.0f);
    }
    kvarn::kv_view<float> missing{nullptr, 2, 1, 64, 64, 64, 1};
    CHECK(kvarn::rotate(missing) == kvarn::status::null_pointer);
    CHECK(kvarn::unrotate(missing) == kvarn::status::null_pointer);
}
