// SPDX-License-Identifier: Apache-2.0
// supports: what it says of a format is what a call does, for every instruction set of this build.

#include <limits>
#include <string>
#include <vector>

#include <kvarn/dispatch/calls.hpp>
#include <kvarn/supports.hpp>

#include "../catch.hpp"
#include "../support/attention.hpp"
#include "../support/library.hpp"

using kvarn::operation;
using kvarn::precision;

namespace {

kvarn::format named(const char* name, int head_dim)
{
    const auto made = kvarn::parse_format(name, head_dim);
    REQUIRE(made.ok());
    return *made;
}

/// The output of one query row over one record.
template <class Arch>
std::vector<float> attend(const kvarn::format& f, precision p)
{
    support::random_source random(4);
    const auto x = support::random_tiles(random, f, 1, 1, support::tile_kind::channel_outliers);
    const auto records = support::encode<Arch>(f, x);
    const auto grid = kvarn::tile_major_records(f, support::as_bytes(records.data()), records.size(), 1, 1);
    std::vector<float> q(static_cast<std::size_t>(f.key_channels()));
    for (float& y : q) y = static_cast<float>(random.gaussian());
    std::vector<float> out(static_cast<std::size_t>(f.head_dim_v()));
    const kvarn::kv_segment history[] = {kvarn::sealed_tiles(f, grid, 0)};
    kvarn::attention_task task;
    task.history = history;
    task.q = kvarn::token_major(q.data(), 1, 1, q.size());
    task.out = kvarn::token_major(out.data(), 1, 1, out.size());
    kvarn::attention_options options;
    options.precision = p;
    options.fast_bound = std::numeric_limits<float>::infinity();
    std::vector<std::byte> scratch(kvarn::attention_scratch_bytes(f, 1));
    support::expect_ok(kvarn::attend<Arch>(f, task, options, scratch));
    return out;
}

}  // namespace

TEST_CASE("attention/supports: precisions that a shape does not allow become the next more precise one", "[unit]")
{
    const auto both = [](const kvarn::format& f, precision p) {
        const auto s = kvarn::supports(f, operation::attend, p);
        return std::pair{s.keys, s.values};
    };
    using pair = std::pair<precision, precision>;
    CHECK(both(named("k4v2_g128", 128), precision::exact) == pair{precision::exact, precision::exact});
    CHECK(both(named("k4v2_g128", 128), precision::fine) == pair{precision::fine, precision::fine});
    CHECK(both(named("k4v2_g256", 128), precision::fast) == pair{precision::fast, precision::fast});
    CHECK(both(named("k4v3_g128", 128), precision::fast) == pair{precision::fast, precision::fine});
    CHECK(both(named("k5v4_g128", 128), precision::fast) == pair{precision::fine, precision::fast});
    CHECK(both(named("k5v4_g128_kovo", 100), precision::fast) == pair{precision::fine, precision::exact});
    CHECK(both(named("k4v4_g32_kovo", 100), precision::fine) == pair{precision::fine, precision::exact});
}

TEST_CASE("attention/supports: what is said to be the same arithmetic gives the same bits", "[unit]")
{
    support::for_each_arch([](auto arch) {
        using Arch = decltype(arch);
        for (const auto& f : {named("k4v2_g128", 128), named("k4v3_g64", 96), named("k3v4_g256", 64), named("k4v4_g32_kovo", 100)}) {
            const auto exact = kvarn::supports<Arch>(f, operation::attend, precision::exact);
            const auto fine = kvarn::supports<Arch>(f, operation::attend, precision::fine);
            const auto fast = kvarn::supports<Arch>(f, operation::attend, precision::fast);
            CHECK(std::string(exact.arch) == kvarn::simd::arch_traits<Arch>::name);
            CHECK(support::same_bits(attend<Arch>(f, precision::exact), attend<Arch>(f, precision::fine)) ==
                  (exact.keys == fine.keys && exact.values == fine.values));
            CHECK(support::same_bits(attend<Arch>(f, precision::fine), attend<Arch>(f, precision::fast)) ==
                  (fine.keys == fast.keys && fine.values == fast.values));
        }
    });
}

TEST_CASE("attention/supports: times", "[unit]")
{
    const auto common = named("k4v2_g128", 128), odd = named("k4v2_g128", 96);
    using kvarn::simd::avx2;
    for (const auto what : {operation::seal, operation::dequantize, operation::attend}) {
        CHECK(kvarn::supports<avx2>(common, what).time == 1.0f);
        CHECK(kvarn::supports<avx2>(odd, what).time > 1.0f);
        CHECK(kvarn::supports<kvarn::simd::sse2>(common, what).time > 1.0f);
        CHECK(kvarn::supports<kvarn::simd::portable>(common, what).time > kvarn::supports<kvarn::simd::sse2>(common, what).time);
        CHECK(kvarn::supports<kvarn::simd::avx512vnni>(common, what).time < 1.0f);
        CHECK(kvarn::supports<kvarn::simd::avx512vnni>(common, what).time <= kvarn::supports<kvarn::simd::avx512>(common, what).time);
        CHECK(kvarn::supports<kvarn::simd::avxvnni>(common, what).time == 0.0f);
        CHECK(kvarn::supports<kvarn::simd::neon64>(common, what).time == 0.0f);
        CHECK(kvarn::supports<kvarn::simd::neon64dot>(common, what).time == 0.0f);
    }
    CHECK(kvarn::supports<avx2>(common, operation::attend, precision::exact).time > 1.0f);
    CHECK(kvarn::supports<avx2>(common, operation::seal).fixed_bounds);
    CHECK_FALSE(kvarn::supports<avx2>(odd, operation::seal).fixed_bounds);
    CHECK(std::string(kvarn::dispatched::supports(common, operation::seal).arch) == kvarn::active_arch_name());
}
