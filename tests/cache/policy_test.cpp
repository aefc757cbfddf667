// SPDX-License-Identifier: Apache-2.0
// Bit policies: which format each layer and head gets, what is refused, and the bytes of a planned cache.

#include <array>
#include <cmath>

#include "../catch.hpp"
#include "../support/library.hpp"

#include <kvarn/cache/policy.hpp>

namespace {

using kvarn::bit_rule;
using kvarn::status;

constexpr kvarn::format base = kvarn::parse_format("k2v2_g128", 128).value;

kvarn::status refusal(const bit_rule& rule, const kvarn::format& f = base) { return kvarn::make_policy(f, 6, 4, std::span(&rule, 1)).error; }

}  // namespace

TEST_CASE("cache/policy: without rules every head has the base format", "[unit]")
{
    constexpr auto policy = kvarn::make_policy(base, 3, 2);
    static_assert(policy.ok() && policy->layers() == 3 && policy->heads() == 2 && policy->base() == base);
    for (int layer = 0; layer < 3; ++layer)
        for (int head = 0; head < 2; ++head) CHECK(policy->format_of(layer, head) == base);
}

TEST_CASE("cache/policy: rules change ranges of layers and heads, the last one wins", "[unit]")
{
    static constexpr std::array<bit_rule, 4> rules{{
        {.last_layer = 0, .key_bits = 4, .value_bits = 4},
        {.first_layer = -1, .key_bits = 4},
        {.first_head = 1, .last_head = 1, .key_bits = 8},
        {.first_layer = 2, .last_layer = 3, .first_head = -2, .last_head = -2, .value_bits = 3},
    }};
    constexpr auto policy = kvarn::make_policy(base, 6, 4, rules);
    static_assert(policy.ok());
    for (int layer = 0; layer < 6; ++layer)
        for (int head = 0; head < 4; ++head) {
            INFO("layer " << layer << ", head " << head);
            const kvarn::format f = policy->format_of(layer, head);
            CHECK(f.key_bits() == (head == 1 ? 8 : layer == 0 || layer == 5 ? 4 : 2));
            CHECK(f.value_bits() == (layer == 0 ? 4 : (layer == 2 || layer == 3) && head == 2 ? 3 : 2));
            CHECK((f.group() == 128 && f.head_dim_k() == 128 && f.head_dim_v() == 128));
        }
}

TEST_CASE("cache/policy: heads with another basis", "[unit]")
{
    static constexpr kvarn::bit_rule rules[] = {{.first_layer = 1, .last_layer = 1, .key_rotation = kvarn::rotation::none},
                                                {.first_head = 2, .last_head = 2, .key_bits = 4, .value_rotation = kvarn::rotation::none}};
    constexpr auto policy = kvarn::make_policy(base, 3, 4, rules);
    static_assert(policy.ok());
    for (int layer = 0; layer < 3; ++layer)
        for (int head = 0; head < 4; ++head) {
            const kvarn::format f = policy->format_of(layer, head);
            CHECK(f.keys_rotated() == (layer != 1));
            CHECK(f.values_rotated() == (head != 2));
            CHECK(f.key_bits() == (head == 2 ? 4 : base.key_bits()));
        }
    constexpr kvarn::format odd = kvarn::parse_format("k2v2_g64_ko", 100, 64).value;
    CHECK(refusal({.key_rotation = kvarn::rotation::hadamard}, odd) == status::unsupported_head_dim);
    CHECK(refusal({.value_rotation = kvarn::rotation::none}, odd) == status::ok);
}

TEST_CASE("cache/policy: what is refused", "[unit]")
{
    CHECK(kvarn::make_policy(base, 0, 4).error == status::bad_argument);
    CHECK(kvarn::make_policy(base, 6, 0).error == status::bad_argument);
    CHECK(kvarn::make_policy(base, -1, 4).error == status::bad_argument);
    CHECK(refusal({.first_layer = 6, .key_bits = 4}) == status::bad_argument);
    CHECK(refusal({.first_layer = -7, .key_bits = 4}) == status::bad_argument);
    CHECK(refusal({.first_layer = 3, .last_layer = 2, .key_bits = 4}) == status::bad_argument);
    CHECK(refusal({.last_head = 4, .key_bits = 4}) == status::bad_argument);
    CHECK(refusal({.first_head = -5, .key_bits = 4}) == status::bad_argument);
    CHECK(refusal({.key_bits = 7}) == status::unsupported_bits);
    CHECK(refusal({.key_bits = 0}) == status::unsupported_bits);
    CHECK(refusal({.value_bits = 9}) == status::unsupported_bits);
    CHECK(refusal({.value_bits = 0}) == status::shape_mismatch);
    constexpr kvarn::format latent = kvarn::parse_format("k4v0_g64", 512).value;
    CHECK(refusal({.value_bits = 4}, latent) == status::shape_mismatch);
    CHECK(refusal({.key_bits = 8}, latent) == status::ok);
}

TEST_CASE("cache/policy: a plan counts what the parts of a cache take", "[unit]")
{
    static constexpr std::array<bit_rule, 1> rules{{{.last_layer = 0, .key_bits = 4}}};
    const auto policy = kvarn::make_policy(base, 3, 2, rules);
    REQUIRE(policy.ok());
    // 1537 tokens: 128 in the sink, 11 tiles, one token in the tail.
    const kvarn::sequence_plan plan = kvarn::plan_sequence(*policy, 1537);
    CHECK(plan.record_bytes == 2u * 11u * (13824u + 9728u + 9728u));
    CHECK(plan.exact_bytes == 6u * 129u * 256u * 2u);
    CHECK(plan.elements == 6u * 1537u * 256u);
    CHECK(plan.bytes() == plan.record_bytes + plan.exact_bytes);
    CHECK(std::fabs(plan.bits_per_element() - 8.0 * static_cast<double>(plan.bytes()) / (6.0 * 1537.0 * 256.0)) < 1e-12);

    for (const std::size_t tokens : {std::size_t{0}, std::size_t{1}, std::size_t{127}, std::size_t{128}, std::size_t{255}}) {
        const kvarn::sequence_plan small = kvarn::plan_sequence(*policy, tokens);
        CHECK(small.record_bytes == 0);
        CHECK(small.exact_bytes == tokens * 6 * 256 * 2);
    }
    CHECK(kvarn::plan_sequence(*policy, 0).bits_per_element() == 0.0);
    CHECK(kvarn::plan_sequence(*policy, 256).record_bytes != 0);
    CHECK(kvarn::plan_sequence(*policy, 128, 0, 4).exact_bytes == 0);
    CHECK(kvarn::plan_sequence(*policy, 127, 0, 4).exact_bytes == 127u * 6u * 256u * 4u);
    const auto wide = kvarn::make_policy(kvarn::parse_format("k4v2_g128", 256).value, 1, 1);
    CHECK(kvarn::plan_sequence(*wide, 256, 0, 2, kvarn::record_stride::reference).record_bytes ==
          2 * kvarn::record_bytes(wide->base(), kvarn::record_stride::reference));
}
