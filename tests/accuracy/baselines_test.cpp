// SPDX-License-Identifier: Apache-2.0
// The methods that accuracy is compared with, each against its definition: a comparison is worth what its baselines are.

#include <algorithm>
#include <cmath>
#include <random>
#include <set>
#include <vector>

#include "accuracy_tiles.hpp"
#include "tests/catch.hpp"

namespace {

std::vector<float> normal_values(std::size_t n, unsigned seed, float deviation = 1)
{
    std::mt19937 random(seed);
    std::normal_distribution<float> normal(0, deviation);
    std::vector<float> x(n);
    for (float& one : x) one = normal(random);
    return x;
}

}  // namespace

TEST_CASE("accuracy/baselines: Lloyd-Max levels are those of the literature, and optimal", "[accuracy]")
{
    // Max, 1960, table I: levels above zero, and the mean squared error.
    const struct {
        int bits;
        std::vector<double> levels;
        double error;
    } known[] = {{1, {0.7980}, 0.3634},
                 {2, {0.4528, 1.510}, 0.1175},
                 {3, {0.2451, 0.7560, 1.344, 2.152}, 0.03454},
                 {4, {0.1284, 0.3881, 0.6568, 0.9424, 1.256, 1.618, 2.069, 2.733}, 0.009497}};
    for (const auto& table : known) {
        CAPTURE(table.bits);
        const kvarn_cli::lloyd_max codes(table.bits);
        const std::size_t half = table.levels.size();
        REQUIRE(codes.levels().size() == 2 * half);
        for (std::size_t i = 0; i < half; ++i) {
            CHECK(codes.levels()[half + i] == Approx(table.levels[i]).epsilon(1e-3));
            CHECK(codes.levels()[half - 1 - i] == Approx(-codes.levels()[half + i]).epsilon(1e-9));
        }
        double error = 0;
        const auto x = normal_values(400000, 1);
        for (const float one : x) {
            const float rounded = codes.round(one);
            error += static_cast<double>((one - rounded) * (one - rounded)) / static_cast<double>(x.size());
            if (&one - x.data() < 1000)
                for (const double level : codes.levels())
                    CHECK(std::fabs(static_cast<double>(one) - level) >= std::fabs(static_cast<double>(one - rounded)) - 1e-6);
        }
        CHECK(error == Approx(table.error).epsilon(0.02));
    }
}

TEST_CASE("accuracy/baselines: TurboQuant keeps norms, and its error is that of its codes", "[accuracy]")
{
    for (const std::size_t d : {std::size_t{64}, std::size_t{128}})
        for (const int bits : {2, 3, 4}) {
            CAPTURE(d, bits);
            // Outlier channels and tokens of all sizes: the rotation makes every token alike.
            accuracy::matrix exact{2, 100, d, normal_values(2 * 100 * d, 2)};
            for (std::size_t t = 0; t < 200; ++t)
                for (std::size_t c = 0; c < d; ++c)
                    exact.values[t * d + c] *= (c % 16 == 3 ? 9.0f : 1.0f) * std::exp2(static_cast<float>(t % 12) - 6);
            for (std::size_t c = 0; c < d; ++c) exact.token(1, 7)[c] = 0;
            accuracy::matrix stored = exact;
            kvarn_cli::round_trip({"", "x", kvarn_cli::baseline_kind::turboquant, bits, 0, false}, stored, true);
            const auto scale = kvarn_cli::token_scale_errors(exact, stored);
            CHECK(scale.back() < 1e-3);
            CHECK(scale.size() == 199);
            for (std::size_t c = 0; c < d; ++c) CHECK(stored.token(1, 7)[c] == 0);
            // Codes of squared error D leave an angle whose cosine is sqrt(1 - D); with the norm kept, that is all of
            // the error. The outlier channels, four or eight in step with the Hadamard matrix, are not quite normal
            // numbers after it.
            const double codes = bits == 2 ? 0.1175 : bits == 3 ? 0.03454 : 0.009497, expected = 2 * (1 - std::sqrt(1 - codes));
            CHECK(std::pow(kvarn_cli::relative_error(exact.values, stored.values), 2) == Approx(expected).epsilon(0.3));
            // Normal numbers over their own norm have lighter tails at few channels, hence a little less.
            accuracy::matrix plain{1, 400, d, normal_values(400 * d, 3)}, plain_stored = plain;
            kvarn_cli::round_trip({"", "x", kvarn_cli::baseline_kind::turboquant, bits, 0, false}, plain_stored, false);
            CHECK(std::pow(kvarn_cli::relative_error(plain.values, plain_stored.values), 2) == Approx(expected).epsilon(0.1));
            // A stored token holds 2^bits values at most, up to its norm.
            const std::vector<float> signs = kvarn_cli::random_signs(d);
            accuracy::matrix rotated = stored;
            for (std::size_t i = 0; i < rotated.values.size(); ++i) rotated.values[i] *= signs[i % d];
            REQUIRE(kvarn::rotate(rotated.view()) == kvarn::status::ok);
            std::set<long> levels;
            const float largest = *std::max_element(rotated.token(0, 5), rotated.token(0, 5) + d);
            for (std::size_t c = 0; c < d; ++c) levels.insert(std::lround(1000 * rotated.token(0, 5)[c] / largest));
            CHECK(levels.size() <= std::size_t{1} << bits);
            CHECK(levels.size() > (std::size_t{1} << bits) / 2);
        }
    const auto signs = kvarn_cli::random_signs(128);
    const auto minus = std::count(signs.begin(), signs.end(), -1.0f);
    CHECK((minus > 40 && minus < 88 && minus + std::count(signs.begin(), signs.end(), 1.0f) == 128));
}

TEST_CASE("accuracy/baselines: float8 e4m3 by its definition", "[accuracy]")
{
    // All 127 numbers from zero up, from sign, exponent and digits.
    std::vector<float> all;
    for (int code = 0; code < 127; ++code) {
        const int exponent = code >> 3, digits = code & 7;
        all.push_back(exponent == 0 ? std::ldexp(static_cast<float>(digits), -9)
                                    : std::ldexp(static_cast<float>(8 + digits), exponent - 10));
    }
    CHECK(all.back() == 448);
    for (std::size_t i = 0; i < all.size(); ++i) {
        CHECK(kvarn_cli::as_e4m3(all[i]) == all[i]);
        CHECK(kvarn_cli::as_e4m3(-all[i]) == -all[i]);
        if (i + 1 == all.size()) continue;
        const float middle = (all[i] + all[i + 1]) / 2, up = std::nextafter(middle, INFINITY),
                    down = std::nextafter(middle, 0.0f);
        CHECK(kvarn_cli::as_e4m3(up) == all[i + 1]);
        CHECK(kvarn_cli::as_e4m3(down) == all[i]);
        CHECK(kvarn_cli::as_e4m3(middle) == all[i % 2 == 0 ? i : i + 1]);  // ties to the even code
    }
    CHECK(kvarn_cli::as_e4m3(1e9f) == 448);

    // One scale for everything, or one for each token.
    accuracy::matrix exact{1, 2, 4, {448, 1, 0.0009f, -3.3f, 0.5f, 0.25f, -0.1f, 0}};
    accuracy::matrix tensor = exact, token = exact;
    kvarn_cli::round_trip({"", "x", kvarn_cli::baseline_kind::fp8_tensor, 8, 0, false}, tensor, true);
    kvarn_cli::round_trip({"", "x", kvarn_cli::baseline_kind::fp8_token, 8, 0, false}, token, true);
    for (std::size_t i = 0; i < 8; ++i) CHECK(tensor.values[i] == kvarn_cli::as_e4m3(exact.values[i]));
    CHECK((token.values[0] == 448 && token.values[4] == 0.5f && token.values[5] == 0.25f));
    CHECK(std::fabs(token.values[6] + 0.1f) < 0.1f / 16);
    CHECK(tensor.values[2] == 0);
}

TEST_CASE("accuracy/baselines: blocks with a minimum", "[accuracy]")
{
    for (const int bits : {4, 5}) {
        CAPTURE(bits);
        const int most = (1 << bits) - 1;
        // Values on the grid come back as they are.
        accuracy::matrix grid{1, 1, 64, std::vector<float>(64)};
        for (int i = 0; i < 32; ++i)
            grid.values[static_cast<std::size_t>(i)] = -5 + 0.25f * static_cast<float>(i * 7 % (most + 1));
        for (int i = 0; i < 32; ++i) grid.values[static_cast<std::size_t>(32 + i)] = 3;
        grid.values[1] = -5 + 0.25f * static_cast<float>(most);
        const auto before = grid;
        const kvarn_cli::baseline b{"", "x", kvarn_cli::baseline_kind::blocks_min, bits, 0, false};
        kvarn_cli::round_trip(b, grid, false);
        CHECK(grid.values == before.values);
        // Others are off by half a step at most, and the rounding of the scalars.
        accuracy::matrix random{1, 8, 64, normal_values(512, 5)};
        auto stored = random;
        kvarn_cli::round_trip(b, stored, false);
        for (std::size_t at = 0; at < 512; at += 32) {
            const auto [low, high] = std::minmax_element(random.values.begin() + static_cast<std::ptrdiff_t>(at),
                                                         random.values.begin() + static_cast<std::ptrdiff_t>(at + 32));
            const float step = (*high - *low) / static_cast<float>(most);
            for (std::size_t i = at; i < at + 32; ++i)
                CHECK(std::fabs(stored.values[i] - random.values[i]) < 0.5f * step + 0.004f);
        }
    }
}

TEST_CASE("accuracy/baselines: groups of kivi", "[accuracy]")
{
    // Each group of 64 tokens of a channel of K, and of 64 channels of a token of V, has its own minimum and maximum.
    accuracy::matrix exact{1, 128, 128, normal_values(128 * 128, 6)};
    const kvarn_cli::baseline b{"", "x", kvarn_cli::baseline_kind::kivi, 2, 64, false};
    for (const bool is_key : {true, false}) {
        auto stored = exact;
        kvarn_cli::round_trip(b, stored, is_key);
        for (std::size_t line = 0; line < 128; ++line)
            for (std::size_t group = 0; group < 2; ++group) {
                std::set<float> levels;
                for (std::size_t i = group * 64; i < group * 64 + 64; ++i)
                    levels.insert(is_key ? stored.token(0, i)[line] : stored.token(0, line)[i]);
                CHECK(levels.size() == 4);
            }
        CHECK(kvarn_cli::relative_error(exact.values, stored.values) < 0.5);
    }
}
