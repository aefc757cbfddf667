// SPDX-License-Identifier: Apache-2.0
// Configurations and plans: what zeros become, sizes to the byte, limits, and what fits into a number of bytes.

#include <cstddef>
#include <cstdint>
#include <vector>

#include "../catch.hpp"

#include <kvarn/cache/pool.hpp>

namespace {

using kvarn::status;

kvarn::cache_config model_config()
{
    kvarn::cache_config c;
    c.policy = *kvarn::make_policy(*kvarn::parse_format("k4v2_g128", 128), 28, 2);
    c.sequences = 4;
    c.most_tokens = 4096;
    c.most_step = 256;
    return c;
}

}  // namespace

TEST_CASE("cache/config: zeros are filled in, the sink is rounded up", "[unit]")
{
    kvarn::cache_config c = model_config();
    c.sink_tokens = 4;
    const kvarn::cache_config done = kvarn::completed(c);
    CHECK(done.sink_tokens == 128);
    CHECK(done.record_blocks == 4 * 31);
    CHECK(done.exact_blocks == 4 * (1 + 3));  // the sink; 127 tokens and a step of 256
    CHECK(done.most_spans == 2 * 32 + 16);
    c.record_blocks = 7;
    c.exact_blocks = 9;
    c.most_spans = 5;
    CHECK(kvarn::completed(c).record_blocks == 7);
    CHECK(kvarn::completed(c).exact_blocks == 9);
    CHECK(kvarn::completed(c).most_spans == 5);
    c.sink_tokens = SIZE_MAX;
    c.recent_tokens = SIZE_MAX;
    CHECK(kvarn::completed(c).recent_tokens == 4096);
    CHECK(kvarn::plan_cache(c).ok());
    static_assert(kvarn::blocks_of(kvarn::cache_config{}, 1).exact == 1);
}

TEST_CASE("cache/config: a plan counts every byte", "[unit]")
{
    const kvarn::cache_config c = model_config();
    const auto plan = kvarn::plan_cache(c);
    REQUIRE(plan.ok());
    CHECK(plan->record_block_bytes == 56u * 13824u);
    CHECK(plan->exact_block_bytes == 56u * 128u * 256u * 2u);
    CHECK(plan->records == 4u * 31u * plan->record_block_bytes);
    CHECK(plan->exact == 16u * plan->exact_block_bytes);
    CHECK(plan->state < 20000);
    CHECK(plan->bytes() == plan->records + plan->exact + plan->state);
    std::vector<std::byte> memory(plan->bytes());
    CHECK(kvarn::make_pool(c, memory).ok());
    CHECK(kvarn::make_pool(c, std::span(memory).first(memory.size() - 1)).error == status::buffer_too_small);
    CHECK(kvarn::make_pool(c, {}).error == status::null_pointer);
}

TEST_CASE("cache/config: what no pool can be", "[unit]")
{
    const auto refused = [](auto change, status wanted) {
        kvarn::cache_config c = model_config();
        change(c);
        CHECK(kvarn::plan_cache(c).error == wanted);
        std::vector<std::byte> memory(64);
        CHECK(kvarn::make_pool(c, memory).error == wanted);
        CHECK(kvarn::fit_cache(c, SIZE_MAX).error == wanted);
    };
    refused([](kvarn::cache_config& c) { c.policy = {}; }, status::bad_argument);
    refused([](kvarn::cache_config& c) { c.sequences = 0; }, status::bad_argument);
    refused([](kvarn::cache_config& c) { c.sequences = SIZE_MAX; }, status::bad_argument);
    refused([](kvarn::cache_config& c) { c.most_tokens = 0; }, status::bad_argument);
    refused([](kvarn::cache_config& c) { c.most_tokens = SIZE_MAX; }, status::bad_argument);
    refused([](kvarn::cache_config& c) { c.record_blocks = SIZE_MAX; }, status::bad_argument);
    refused([](kvarn::cache_config& c) { c.exact_blocks = std::size_t{1} << 32; }, status::bad_argument);
    refused([](kvarn::cache_config& c) { c.most_spans = SIZE_MAX; }, status::bad_argument);
    refused([](kvarn::cache_config& c) { c.exact = static_cast<kvarn::exact_type>(7); }, status::bad_argument);
    refused([](kvarn::cache_config& c) { c.key_basis = static_cast<kvarn::basis>(7); }, status::bad_argument);
    refused([](kvarn::cache_config& c) { c.encode.iterations = 1000; }, status::bad_argument);
    if constexpr (sizeof(std::size_t) == 8)
        refused([](kvarn::cache_config& c) {
            c.policy = *kvarn::make_policy(*kvarn::parse_format("k8v8_g256", 512), 1 << 15, 1 << 10);
            c.record_blocks = (std::size_t{1} << 31) - 1;
            c.policy = *kvarn::make_policy(*kvarn::parse_format("k8v8_g256", 512), 1 << 10, 1 << 10);
        }, status::buffer_too_small);
}

TEST_CASE("cache/config: as many record blocks as fit", "[unit]")
{
    const kvarn::cache_config c = model_config();
    const std::size_t all = kvarn::plan_cache(c)->bytes();
    const auto whole = kvarn::fit_cache(c, all);
    REQUIRE(whole.ok());
    CHECK(whole->record_blocks == 124);
    CHECK(kvarn::fit_cache(c, SIZE_MAX)->record_blocks == 124);
    CHECK(kvarn::fit_cache(c, all - 1)->record_blocks == 123);
    for (const std::size_t bytes : {all / 2, all * 3 / 4}) {
        kvarn::cache_config fitted = *kvarn::fit_cache(c, bytes);
        CHECK(kvarn::plan_cache(fitted)->bytes() <= bytes);
        ++fitted.record_blocks;
        CHECK(kvarn::plan_cache(fitted)->bytes() > bytes);
    }
    CHECK(kvarn::fit_cache(c, kvarn::plan_cache(c)->exact).error == status::no_room);
    CHECK(kvarn::fit_cache(c, 0).error == status::no_room);
}
