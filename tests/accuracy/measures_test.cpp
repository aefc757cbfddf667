// SPDX-License-Identifier: Apache-2.0
// The measures themselves, on tokens whose errors are known.

#include <cmath>

#include "accuracy_tiles.hpp"
#include "tests/catch.hpp"

TEST_CASE("accuracy/measures: norms and directions", "[accuracy]")
{
    // Token 0: half as long. Token 1: turned by a right angle. Token 2: unchanged. Token 3: of norm zero, decoded to something.
    const accuracy::matrix x{1, 4, 2, {3, 4, 5, 0, 1, 2, 0, 0}}, y{1, 4, 2, {1.5f, 2, 0, 5, 1, 2, 0, 1}};
    CHECK(std::fabs(kvarn_cli::relative_error(x.values, y.values) - std::sqrt((6.25 + 50 + 1) / 55.0)) < 1e-12);
    const auto scale = kvarn_cli::token_scale_errors(x, y);
    CHECK(scale == std::vector<double>{0, 0, 0.5});
    CHECK(kvarn_cli::spread_of(scale).worst == 0.5);
    CHECK(std::fabs(kvarn_cli::magnitude_share(x, y) - (6.25 + 1) / (6.25 + 50 + 1)) < 1e-12);
    CHECK(kvarn_cli::magnitude_share(x, x) == 0.0);
}

TEST_CASE("accuracy/measures: attention of one query head", "[accuracy]")
{
    // Two tokens; the second query scores ln 3 / sqrt(2) * sqrt(2) apart, so that it takes 3/4 and 1/4.
    const double apart = std::log(3.0) * std::sqrt(2.0);
    const accuracy::matrix q{1, 2, 2, {0, 0, 1, 0}}, k{1, 2, 2, {static_cast<float>(apart), 0, 0, 0}}, v{1, 2, 2, {4, 0, 0, 8}};
    const auto out = kvarn_cli::attend(q, k, v, 1);
    REQUIRE(out.size() == 4);
    CHECK((out[0] == 4.0f && out[1] == 0.0f));
    CHECK((std::fabs(out[2] - 3.0f) < 1e-5f && std::fabs(out[3] - 2.0f) < 1e-5f));
    CHECK(kvarn_cli::attend(q, k, v, 2).size() == 2);
}

TEST_CASE("accuracy/measures: what a baseline takes", "[accuracy]")
{
    using enum kvarn_cli::baseline_kind;
    std::size_t seen = 0;
    for (const auto& b : kvarn_cli::baselines_for(128, 128, true)) {
        INFO(b.name);
        const double k = kvarn_cli::bytes_per_token(b, 128, true), v = kvarn_cli::bytes_per_token(b, 128, false);
        const double scalars = b.kind == per_token || b.kind == fp8_token ? 4
                               : b.kind == blocks                         ? 8
                               : b.kind == blocks_min                     ? 16
                               : b.kind == turboquant                     ? 2
                               : b.kind == fp8_tensor                     ? 0
                                                                          : 4 * 128.0 / static_cast<double>(b.group);
        CHECK(k == 16.0 * b.bits + scalars);
        CHECK(v == 16.0 * b.bits + scalars);
        ++seen;
    }
    CHECK(seen == 28);
    // With heads of 64 channels kivi's V has one group per token, its K still shares among 128 tokens.
    for (const auto& b : kvarn_cli::baselines_for(64, 64, true))
        if (b.name == "kivi g128 2-bit") CHECK((kvarn_cli::bytes_per_token(b, 64, true) == 18 && kvarn_cli::bytes_per_token(b, 64, false) == 20));
    for (const auto& b : kvarn_cli::baselines_for(44, 44, false)) CHECK((!b.rotated && b.kind != turboquant && b.kind != blocks && b.kind != blocks_min));
}
