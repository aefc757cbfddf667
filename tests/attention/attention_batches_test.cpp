// SPDX-License-Identifier: Apache-2.0
// Batches: tasks whose records have formats of their own, items before the output is known, and workspaces that are allocated once.

#include <algorithm>
#include <cstdint>
#include <string>
#include <vector>

#include "../catch.hpp"
#include "../support/attention.hpp"

namespace {

using kvarn::status;
using support::attention_query;
using support::format_of;
using support::kv_history;
using support::record_storage;

kv_history some_history(const kvarn::format& f, std::uint64_t seed)
{
    kv_history h(f, seed);
    support::random_source random(seed);
    const std::size_t per_chunk = kvarn::chunk_tokens / static_cast<std::size_t>(f.group());
    h.add_exact(random.below(6));
    h.add_tiles(random.below(2 * per_chunk + 2), support::all_record_storages[seed % 4]);
    h.add_exact(1 + random.below(30), kvarn::basis::original, kvarn::basis::rotated);
    return h;
}

}  // namespace

TEST_CASE("attention/batches: heads of different formats", "[unit]")
{
    const auto named = [](const char* name) { return kvarn::parse_format(name, 64).value; };
    const std::vector<kvarn::format> layer = {named("k2v2_g128"), named("k4v4_g128_ko"), named("k8v4_g128"), named("k2v2_g128")};
    const std::vector<kvarn::format> anything = {format_of(36, 36, 3, 3, 32),  format_of(128, 128, 4, 2, 256), format_of(64, 64, 4, 0, 64),
                                                 format_of(80, 256, 8, 5, 32), format_of(64, 40, 2, 4, 128, {false, true}, 4)};
    std::uint64_t seed = 4000;
    for (const auto& formats : {layer, anything})
        for (const kvarn::format& of_call : {formats[0], formats[1], format_of(576, 576, 2, 2, 32)}) {
            std::vector<kv_history> histories;
            std::vector<attention_query> queries;
            std::vector<support::attention_outcome> wanted;
            kvarn::attention_options options;
            options.precision = support::all_precisions[seed % 3];
            for (const kvarn::format& f : formats) {
                histories.push_back(some_history(f, ++seed));
                queries.push_back(support::random_query(f, 1 + seed % 3, 1 + seed % 5, seed));
                queries.back().options = options;
                wanted.push_back(support::attend(f, histories.back().segments(), queries.back()));
                REQUIRE(wanted.back().status == status::ok);
            }
            const auto same = [&](const std::vector<support::attention_outcome>& got) {
                for (std::size_t i = 0; i < wanted.size(); ++i)
                    if (!got[i].intact || !support::same_bits(got[i], wanted[i])) return false;
                return true;
            };
            for (const std::size_t chunks_per_item : {1u, 2u, 9u})
                for (const std::size_t threads : {0u, 3u}) {
                    INFO(support::describe(of_call) << ", " << chunks_per_item << " chunks an item, " << threads << " threads");
                    CHECK(same(support::attend_items(of_call, histories, queries, options, chunks_per_item, threads, ++seed)));
                }
            support::for_each_arch([&](auto arch) {
                CHECK(same(support::attend_items<decltype(arch)>(of_call, histories, queries, options, 2, 0, ++seed)));
            });
        }
}

TEST_CASE("attention/batches: the task's format is the one that counts", "[unit]")
{
    const kvarn::format own = format_of(64, 64, 4, 2, 32), wider = format_of(128, 128, 4, 2, 32);
    kv_history history(own, 4100);
    history.add_tiles(2);
    const attention_query x = support::random_query(own, 1, 2, 4101);
    const auto wanted = support::attend(own, history.segments(), x);
    support::attention_memory memory(own, x);
    kvarn::attention_task task = memory.task(history.segments());
    support::guarded_bytes scratch(kvarn::attention_scratch_bytes(own, 2)), less(kvarn::attention_scratch_bytes(own, 2) - 1);
    CHECK(kvarn::attend(wider, task, x.options, scratch.span()) != status::ok);
    task.format = &own;
    CHECK(kvarn::attend(wider, task, x.options, less.span()) == status::buffer_too_small);
    CHECK(memory.untouched());
    CHECK(kvarn::attend(wider, task, x.options, scratch.span()) == status::ok);
    CHECK(support::same_bits(memory.outcome(status::ok, scratch.intact()), wanted));
    task.format = &wider;
    CHECK(kvarn::attend(own, task, x.options, scratch.span()) != status::ok);
    // Each task of a batch counts with its own.
    kvarn::attention_task two[] = {task, task};
    two[0].format = nullptr;
    CHECK(kvarn::attention_workspace_bytes(own, two) ==
          kvarn::attention_workspace_bytes(own, {two, 1}) + kvarn::attention_workspace_bytes(own, {two + 1, 1}) - 63);
    CHECK(kvarn::attention_workspace_bytes(own, {two + 1, 1}) > kvarn::attention_workspace_bytes(own, {two, 1}));
    CHECK(kvarn::attention_workspace_bytes(wider, {two, 1}) == kvarn::attention_workspace_bytes(own, {two + 1, 1}));
}

TEST_CASE("attention/batches: items do not need the output", "[unit]")
{
    for (const kvarn::format& f : {format_of(64, 80, 4, 2, 32), format_of(64, 64, 4, 0, 64)}) {
        const kv_history history = some_history(f, 4200);
        const attention_query x = support::random_query(f, 2, 3, 4201);
        const auto wanted = support::attend(f, history.segments(), x);
        REQUIRE(wanted.status == status::ok);
        support::attention_memory memory(f, x);
        const kvarn::attention_task task = memory.task(history.segments());
        kvarn::attention_task without = task;
        without.out = {};
        without.log_sum_exp = nullptr;
        support::guarded_bytes scratch(kvarn::attention_scratch_bytes(f, x.rows())), workspace(kvarn::attention_workspace_bytes(f, {&task, 1}));
        for (std::size_t i = 0; i < kvarn::attention_items({&without, 1}, 1); ++i)
            CHECK(kvarn::attend_item(f, {&without, 1}, x.options, i, 1, workspace.span(), scratch.span()) == status::ok);
        CHECK(kvarn::combine_items(f, {&without, 1}, x.options, 0, workspace.span(), scratch.span()) == status::shape_mismatch);
        CHECK(kvarn::attend(f, without, x.options, scratch.span()) == status::shape_mismatch);
        CHECK(memory.untouched());
        CHECK(kvarn::combine_items(f, {&task, 1}, x.options, 0, workspace.span(), scratch.span()) == status::ok);
        CHECK(support::same_bits(memory.outcome(status::ok, scratch.intact() && workspace.intact()), wanted));
    }
}

TEST_CASE("attention/batches: a bound of the workspace", "[unit]")
{
    constexpr kvarn::format usual{};
    static_assert(kvarn::attention_workspace_bound(usual, 0, 8, 1000, 3) == 63);
    static_assert(kvarn::attention_workspace_bound(usual, 1, 8, 0, 3) == 63);
    static_assert(kvarn::attention_workspace_bound(usual, 1, 8, 1, 3) == 8 * (128 + 2) * 4 + 63);
    static_assert(kvarn::attention_workspace_bound(usual, 3, 8, 2048, 1) == 3 * 3 * 8 * (128 + 2) * 4 + 63);
    static_assert(kvarn::attention_workspace_bound(usual, SIZE_MAX, 8, 2048, 1) == SIZE_MAX);
    static_assert(kvarn::attention_workspace_bound(usual, 2, 8, SIZE_MAX, SIZE_MAX) == SIZE_MAX);
    static_assert(kvarn::attention_scratch_bytes(usual, 8) > 0);

    // Segments as engines have them, most of all the ones with the most chunks: one token that ends a tile, one more than a chunk.
    support::random_source random(4300);
    const std::vector<kvarn::format> formats = {format_of(64, 64, 4, 2, 32), format_of(64, 112, 4, 2, 256), format_of(40, 40, 4, 0, 128)};
    const kvarn::format widest = formats[1];
    std::size_t reached = 0;
    for (int i = 0; i < 4000; ++i) {
        const std::size_t tasks = random.below(5), rows = 1 + random.below(9), segments = 1 + random.below(4);
        std::vector<std::vector<kvarn::kv_segment>> histories(tasks);
        std::vector<kvarn::attention_task> batch(tasks);
        std::size_t most_tokens = 0;
        for (std::size_t t = 0; t < tasks; ++t) {
            const kvarn::format& f = formats[random.below(formats.size())];
            const auto group = static_cast<std::size_t>(f.group());
            std::size_t tokens = 0;
            for (std::size_t s = 0; s < segments; ++s) {
                kvarn::kv_segment each;
                each.records = 1;  // workspace_bytes looks at tokens alone
                each.skip = random.below(3) != 0 ? group - 1 : random.below(group);
                each.tokens = random.below(3) == 0 ? random.below(5000) : random.below(4) * kvarn::chunk_tokens + random.below(2) + (1025 - group) % 1024;
                tokens += each.tokens;
                histories[t].push_back(each);
            }
            batch[t].history = histories[t];
            batch[t].q.tokens = 1;
            batch[t].q.heads = random.below(2) == 0 ? rows : 1 + random.below(rows);
            if (f != widest) batch[t].format = &f;
            most_tokens = std::max(most_tokens, tokens);
        }
        const std::size_t bytes = kvarn::attention_workspace_bytes(widest, batch),
                          bound = kvarn::attention_workspace_bound(widest, tasks, rows, most_tokens, segments);
        REQUIRE(bytes <= bound);
        if (bytes == bound && tasks != 0) ++reached;
        // And for more of everything.
        CHECK(kvarn::attention_workspace_bound(widest, tasks + 1, rows, most_tokens, segments) >= bound);
        CHECK(kvarn::attention_workspace_bound(widest, tasks, rows + 1, most_tokens, segments) >= bound);
        CHECK(kvarn::attention_workspace_bound(widest, tasks, rows, most_tokens + 1, segments) >= bound);
        CHECK(kvarn::attention_workspace_bound(widest, tasks, rows, most_tokens, segments + 1) >= bound);
    }
    CHECK(reached > 10);  // it is no larger than it must be
}
