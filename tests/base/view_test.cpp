// SPDX-License-Identifier: Apache-2.0

#include <cstdint>
#include <vector>

#include <kvarn/base/view.hpp>

#include "../catch.hpp"

TEST_CASE("base/view: dense views address [token][head][channel] and [head][token][channel]", "[unit]")
{
    std::vector<float> data(5 * 3 * 4);
    const auto by_token = kvarn::token_major(data.data(), 5, 3, 4);
    const auto by_head = kvarn::head_major(data.data(), 5, 3, 4);
    for (std::size_t t = 0; t < 5; ++t)
        for (std::size_t h = 0; h < 3; ++h) {
            CHECK(by_token.at(t, h) == data.data() + (t * 3 + h) * 4);
            CHECK(by_head.at(t, h) == data.data() + (h * 5 + t) * 4);
        }
    const kvarn::kv_view<const float> constant = by_token;
    CHECK(constant.at(4, 2) == data.data() + 14 * 4);
    CHECK((constant.tokens == 5 && constant.heads == 3 && constant.channels == 4 && constant.channel_stride == 1));
}

TEST_CASE("base/view: strides may be negative", "[unit]")
{
    std::vector<float> data(20);
    const kvarn::kv_view<float> reversed{data.data() + 16, 5, 1, 4, -4, 0, 1};
    CHECK(reversed.at(0, 0) == data.data() + 16);
    CHECK(reversed.at(4, 0) == data.data());
}

TEST_CASE("base/view: one head", "[unit]")
{
    std::vector<float> data(5 * 3 * 4);
    for (const auto& x : {kvarn::token_major(data.data(), 5, 3, 4), kvarn::head_major(data.data(), 5, 3, 4)}) {
        const auto one = x.head(2);
        CHECK((one.heads == 1 && one.tokens == 5 && one.channels == 4));
        for (std::size_t t = 0; t < 5; ++t) CHECK(one.at(t, 0) == x.at(t, 2));
    }
    CHECK(kvarn::kv_view<float>{}.head(3).data == nullptr);
}

TEST_CASE("base/view: a range of tokens ends where the view does", "[unit]")
{
    std::vector<float> data(5 * 3 * 4);
    const auto x = kvarn::token_major(data.data(), 5, 3, 4);
    CHECK(kvarn::first_tokens(x, 2).tokens == 2);
    CHECK(kvarn::first_tokens(x, 2).at(1, 2) == x.at(1, 2));
    CHECK(kvarn::first_tokens(x, 9).tokens == 5);
    CHECK(kvarn::first_tokens(x, 0).tokens == 0);
    CHECK(kvarn::token_range(x, 3, 9).tokens == 2);
    CHECK(kvarn::token_range(x, 3, 1).at(0, 1) == x.at(3, 1));
    CHECK(kvarn::token_range(x, 7, 1).tokens == 0);
    CHECK(kvarn::token_range(x, 1, SIZE_MAX).tokens == 4);
    CHECK(kvarn::first_tokens(kvarn::kv_view<float>{}, 3).data == nullptr);
    static_assert(kvarn::first_tokens(kvarn::kv_view<float>{nullptr, 7, 1, 64, 64, 0}, 3).tokens == 3);
}

TEST_CASE("base/view: heads and tokens of views whose type is a run-time value", "[unit]")
{
    std::vector<float> floats(5 * 3 * 4);
    std::vector<kvarn::half> halves(5 * 3 * 4);
    const auto check = [](const auto& x) {
        const kvarn::input_view any = x;
        const kvarn::input_view one = any.head(2), some = kvarn::token_range(any, 3, 9);
        CHECK((one.heads == 1 && one.tokens == 5 && one.channels == 4));
        CHECK(one.data == x.at(0, 2));
        CHECK((some.tokens == 2 && some.heads == 3));
        CHECK(some.data == x.at(3, 0));
        CHECK(kvarn::token_range(one, 1, 2).data == x.at(1, 2));
    };
    check(kvarn::token_major(floats.data(), 5, 3, 4));
    check(kvarn::head_major(halves.data(), 5, 3, 4));
    CHECK(kvarn::input_view{}.head(3).data == nullptr);
    CHECK(kvarn::token_range(kvarn::output_view{}, 1, 2).data == nullptr);
}
