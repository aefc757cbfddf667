// SPDX-License-Identifier: Apache-2.0
// The calls of dispatch/calls.hpp hand everything through: each result is that of the library's function, and each parameter counts.

#include <cstring>
#include <string>
#include <vector>

#include <kvarn/dispatch/calls.hpp>

#include "../catch.hpp"
#include "../support/library.hpp"

namespace dispatched = kvarn::dispatched;
namespace simd = kvarn::simd;
using kvarn::status;

namespace {

/// An engine's own 16-bit type: dispatch has the kernels of what it is stored as.
struct fp16 {
    std::uint16_t bits;
};

/// Sets that no other test uses, so that the choice among them is this file's.
constexpr unsigned both_sets = kvarn::detail::arch_bit<simd::portable> | kvarn::detail::arch_bit<simd::native_arch> | 77u << 8;

constexpr std::size_t tiles = 2, heads = 2;

struct fixture {
    kvarn::format f = support::make(reference::shape{64, 96, 4, 3, 32, true, 0});
    support::kv_tiles x;
    std::vector<kvarn::half> k, v;
    support::bytes records;
    std::vector<std::byte> scratch;

    fixture()
    {
        support::random_source random(201);
        x = support::random_tiles(random, f, tiles, heads, support::tile_kind::channel_outliers);
        k = support::stored<kvarn::half>(x.k), v = support::stored<kvarn::half>(x.v);
        records = support::encode<simd::portable, kvarn::half>(f, x);
        scratch.resize(std::max(kvarn::scratch_bytes(f), kvarn::attention_scratch_bytes(f, 8)));
    }
    [[nodiscard]] kvarn::record_grid<std::byte> grid(support::bytes& to) const
    {
        return kvarn::tile_major_records(f, support::as_bytes(to.data()), to.size(), tiles, heads);
    }
    template <class T>
    [[nodiscard]] kvarn::kv_view<T> keys(std::vector<kvarn::half>& of) const
    {
        return support::dense_keys(f, reinterpret_cast<T*>(of.data()), tiles, heads);
    }
    template <class T>
    [[nodiscard]] kvarn::kv_view<T> values(std::vector<kvarn::half>& of) const
    {
        return support::dense_values(f, reinterpret_cast<T*>(of.data()), tiles, heads);
    }
};

/// Runs the test with the sets of the flags, and with each of two that are selected at run time.
template <class Test>
void with_each_set(Test&& test)
{
    test(std::integral_constant<unsigned, kvarn::detail::built_archs>{});
    for (const char* name : {"portable", simd::arch_traits<simd::native_arch>::name}) {
        INFO(name);
        REQUIRE(kvarn::select_arch<both_sets>(name) == status::ok);
        test(std::integral_constant<unsigned, both_sets>{});
    }
}

}  // namespace

template <>
struct kvarn::storage_of<fp16> {
    using type = kvarn::half;
};

TEST_CASE("dispatch/calls: sealing and opening", "[unit]")
{
    with_each_set([](auto built) {
        constexpr unsigned sets = decltype(built)::value;
        fixture t;
        support::bytes got(t.records.size(), 0xa5);
        REQUIRE(dispatched::quantize_kv<sets>(t.f, t.keys<kvarn::half>(t.k), t.values<kvarn::half>(t.v), t.grid(got), t.scratch) == status::ok);
        CHECK(got == t.records);
        // An engine's type, const, a range, options and errors.
        std::vector<kvarn::record_errors> errors(1);
        support::bytes one(t.records.size(), 0xa5);
        REQUIRE(dispatched::quantize_kv<sets>(t.f, t.keys<const fp16>(t.k), t.values<const fp16>(t.v), t.grid(one), t.scratch, support::paper(), {1, 2},
                                              std::span(errors)) == status::ok);
        const std::size_t bytes = kvarn::record_bytes(t.f);
        const auto paper = support::encode<simd::portable, kvarn::half>(t.f, t.x, support::paper());
        CHECK(std::memcmp(one.data() + bytes, paper.data() + bytes, bytes) == 0);
        CHECK((one[0] == 0xa5 && one[2 * bytes] == 0xa5));
        CHECK((errors[0].k.relative_error > 0 && errors[0].v.relative_error > 0));
        CHECK(dispatched::quantize_kv<sets>(t.f, t.keys<fp16>(t.k), t.values<fp16>(t.v), t.grid(one), std::span<std::byte>{}) == status::null_pointer);

        const auto wanted = support::decode_as<simd::portable, kvarn::half>(t.f, t.records, tiles, heads, kvarn::basis::rotated);
        std::vector<kvarn::half> k(t.k.size()), v(t.v.size());
        const kvarn::record_grid<const std::byte> grid = t.grid(t.records);
        REQUIRE(dispatched::dequantize_kv<sets>(t.f, grid, t.keys<fp16>(k), t.values<fp16>(v), kvarn::basis::rotated, t.scratch) == status::ok);
        CHECK(support::same_bits(k, wanted.k));
        CHECK(support::same_bits(v, wanted.v));
        std::vector<kvarn::half> some(t.k.size(), kvarn::half{0x1234});
        REQUIRE(dispatched::dequantize_kv<sets>(t.f, t.grid(t.records), t.keys<kvarn::half>(some), kvarn::kv_view<kvarn::half>{}, kvarn::basis::rotated,
                                                t.scratch, {1, 2}) == status::ok);
        CHECK(some[0].bits == 0x1234);  // of head 0
        CHECK(std::memcmp(&some[64], &wanted.k[64], 128) == 0);
    });
}

TEST_CASE("dispatch/calls: attention", "[unit]")
{
    fixture t;
    const std::size_t rows = 4;
    support::random_source random(202);
    std::vector<float> q(rows * 64);
    for (float& x : q) x = static_cast<float>(random.gaussian());
    const kvarn::kv_segment history[] = {kvarn::sealed_tiles(t.f, t.grid(t.records), 1)};
    kvarn::attention_options options;
    options.softmax_scale = 0.25f;
    const auto task_to = [&](std::vector<float>& out) {
        kvarn::attention_task task;
        task.history = history;
        task.q = kvarn::token_major(q.data(), 1, rows, 64);
        task.out = kvarn::token_major(out.data(), 1, rows, 96);
        return task;
    };
    std::vector<float> wanted(rows * 96);
    support::expect_ok(kvarn::attend<simd::portable>(t.f, task_to(wanted), options, t.scratch));
    with_each_set([&](auto built) {
        constexpr unsigned sets = decltype(built)::value;
        std::vector<float> got(wanted.size()), plain(wanted.size()), parts(wanted.size());
        REQUIRE(dispatched::attend<sets>(t.f, task_to(got), options, t.scratch) == status::ok);
        CHECK(support::same_bits(got, wanted));
        REQUIRE(dispatched::attend<sets>(t.f, task_to(plain), {}, t.scratch) == status::ok);
        CHECK(!support::same_bits(plain, wanted));
        const kvarn::attention_task tasks[] = {task_to(plain), task_to(parts)};
        std::vector<std::byte> workspace(kvarn::attention_workspace_bytes(t.f, tasks));
        REQUIRE(kvarn::attention_items(tasks, 1) == 2);
        for (const std::size_t item : {1u, 0u}) REQUIRE(dispatched::attend_item<sets>(t.f, tasks, options, item, 1, workspace, t.scratch) == status::ok);
        REQUIRE(dispatched::combine_items<sets>(t.f, tasks, options, 1, workspace, t.scratch) == status::ok);
        CHECK(support::same_bits(parts, wanted));
        CHECK(dispatched::attend_item<sets>(t.f, tasks, options, 2, 1, workspace, t.scratch) == status::bad_argument);
        CHECK(dispatched::combine_items<sets>(t.f, tasks, options, 2, workspace, t.scratch) == status::bad_argument);
    });
}

TEST_CASE("dispatch/calls: rotations and conversions", "[unit]")
{
    with_each_set([](auto built) {
        constexpr unsigned sets = decltype(built)::value;
        fixture t;
        std::vector<kvarn::half> wanted = t.k, got = t.k;
        support::expect_ok(kvarn::rotate<simd::portable>(t.keys<kvarn::half>(wanted)));
        REQUIRE(dispatched::rotate<sets>(t.keys<fp16>(got)) == status::ok);
        CHECK(support::same_bits(got, wanted));
        support::expect_ok(kvarn::unrotate<simd::portable>(t.keys<kvarn::half>(wanted)));
        REQUIRE(dispatched::unrotate<sets>(t.keys<fp16>(got)) == status::ok);
        CHECK(support::same_bits(got, wanted));

        std::vector<float> floats(t.x.k.size()), again(floats.size());
        const auto to = support::dense_keys(t.f, floats.data(), tiles, heads), to_again = support::dense_keys(t.f, again.data(), tiles, heads);
        REQUIRE(dispatched::convert<sets>(t.keys<const fp16>(t.k), to) == status::ok);
        CHECK(support::same_bits(floats, t.x.k));  // random tiles hold halves
        REQUIRE(dispatched::convert<sets>(kvarn::input_view(t.keys<fp16>(t.k)), kvarn::output_view(to_again)) == status::ok);
        CHECK(support::same_bits(again, t.x.k));
        CHECK(dispatched::convert<sets>(t.keys<fp16>(t.k), kvarn::first_tokens(to, 1)) == status::shape_mismatch);
    });
}
