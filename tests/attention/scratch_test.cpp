// SPDX-License-Identifier: Apache-2.0

#include <cstddef>
#include <vector>

#include <kvarn/scratch.hpp>

#include "../catch.hpp"
#include "../support/library.hpp"

namespace {

constexpr kvarn::format made(int head_dim_k, int head_dim_v, int value_bits, int group, int exact_channels)
{
    kvarn::format_spec spec;
    spec.head_dim_k = head_dim_k;
    spec.head_dim_v = head_dim_v;
    spec.value_bits = value_bits;
    spec.group = group;
    spec.exact_channels = exact_channels;
    return kvarn::make_format(spec).value;
}

constexpr bool is_largest(const kvarn::format& f, std::size_t rows)
{
    const std::size_t all = kvarn::call_scratch_bytes(f, rows), codec = kvarn::scratch_bytes(f), attention = kvarn::attention_scratch_bytes(f, rows);
    return all >= codec && all >= attention && (all == codec || all == attention);
}

constexpr kvarn::format usual;
static_assert(is_largest(usual, 0) && is_largest(usual, 1) && is_largest(usual, 4) && is_largest(usual, kvarn::max_query_rows));
static_assert(is_largest(made(512, 64, 0, 64, 64), 16) && is_largest(made(36, 80, 3, 256, 4), 8) && is_largest(made(64, 256, 8, 32, 0), 100));
// Both sides of the maximum occur.
static_assert(kvarn::call_scratch_bytes(usual, 1) == kvarn::scratch_bytes(usual));
static_assert(kvarn::call_scratch_bytes(usual, kvarn::max_query_rows) == kvarn::attention_scratch_bytes(usual, kvarn::max_query_rows));
static_assert(kvarn::scratch_bytes(usual) != kvarn::attention_scratch_bytes(usual, kvarn::max_query_rows));

}  // namespace

TEST_CASE("attention/scratch: one buffer is enough for every call, and without its last byte the largest is refused", "[unit]")
{
    using kvarn::status;
    support::random_source random(401);
    const kvarn::format all[] = {usual, made(64, 96, 3, 32, 0), made(36, 80, 4, 64, 4)};
    for (const kvarn::format& f : all)
        for (const std::size_t rows : {1u, 8u, 600u}) {
            INFO(support::describe(f) << ", " << rows << " rows");
            const auto x = support::random_tiles(random, f, 1, 1, support::tile_kind::gaussian);
            std::vector<float> k = x.k, v = x.v, q(rows * static_cast<std::size_t>(f.key_channels()), 0.1f), out(rows * static_cast<std::size_t>(f.head_dim_v()));
            support::bytes record(kvarn::record_bytes(f));
            const auto grid = kvarn::tile_major_records(f, support::as_bytes(record.data()), record.size(), 1, 1);
            const kvarn::kv_segment history[] = {kvarn::sealed_tiles(f, grid, 0)};
            kvarn::attention_task task;
            task.history = history;
            task.q = kvarn::token_major(q.data(), 1, rows, static_cast<std::size_t>(f.key_channels()));
            task.out = kvarn::token_major(out.data(), 1, rows, static_cast<std::size_t>(f.head_dim_v()));
            const auto run = [&](std::size_t bytes) {
                std::vector<std::byte> scratch(bytes);
                const auto keys = support::dense_keys(f, k.data(), 1, 1), values = support::dense_values(f, v.data(), 1, 1);
                const status each[] = {kvarn::quantize_kv(f, keys, values, grid, scratch), kvarn::attend(f, task, {}, scratch),
                                       kvarn::dequantize_kv(f, grid, keys, values, kvarn::basis::original, scratch)};
                for (const status s : each)
                    if (s != status::ok) return s;
                return status::ok;
            };
            CHECK(run(kvarn::call_scratch_bytes(f, rows)) == status::ok);
            CHECK(run(kvarn::call_scratch_bytes(f, rows) - 1) == status::buffer_too_small);
        }
}
