// SPDX-License-Identifier: Apache-2.0
// Every status that attend, attend_item and combine_items can return, and that nothing is written then.

#include <cstdint>
#include <functional>
#include <limits>
#include <vector>

#include "../catch.hpp"
#include "../support/attention.hpp"

using kvarn::status;

namespace {

constexpr float infinity = std::numeric_limits<float>::infinity();
constexpr float not_a_number = std::numeric_limits<float>::quiet_NaN();
constexpr std::size_t m = 2, r = 3;

kvarn::format test_format(int value_bits = 2)
{
    return support::make(reference::shape{64, 96, 4, value_bits, 32, true, 4});
}

/// One task with everything right, and memory for all three calls; a test changes what it wants wrong.
struct attention_case {
    kvarn::format format;
    support::kv_history history;
    support::attention_query query;
    support::attention_memory memory;
    std::vector<kvarn::kv_segment> segments;
    std::vector<float> sinks{0.5f, -1.0f, 2.0f};
    kvarn::attention_task task;
    kvarn::attention_options options;
    support::guarded_bytes scratch_memory, workspace_memory;
    std::span<std::byte> scratch, workspace;
    std::size_t item = 0, chunks_per_item = 1, task_number = 0;

    explicit attention_case(const kvarn::format& f)
        : format(f), history(filled_history(f)), query(support::random_query(f, m, r, 1201)), memory(f, query),
          segments(history.segments().begin(), history.segments().end()), task(memory.task(segments)),
          scratch_memory(kvarn::attention_scratch_bytes(f, m * r), 1, 0xa5),
          workspace_memory(kvarn::attention_workspace_bytes(f, {&task, 1}), 1, 0xa5), scratch(scratch_memory.span()),
          workspace(workspace_memory.span())
    {
        task.sink_logits = sinks.data();
    }
    attention_case(const attention_case&) = delete;
    attention_case& operator=(const attention_case&) = delete;

    status attend() { return kvarn::attend(format, task, options, scratch); }
    status attend_item() { return kvarn::attend_item(format, {&task, 1}, options, item, chunks_per_item, workspace, scratch); }
    status combine_items() { return kvarn::combine_items(format, {&task, 1}, options, task_number, workspace, scratch); }

    /// Output and log-sum-exp hold what they held before; so does the workspace, and nothing beside the scratch was touched.
    [[nodiscard]] bool untouched()
    {
        return memory.untouched() && workspace_untouched() && scratch_memory.intact() && workspace_memory.intact();
    }
    [[nodiscard]] bool workspace_untouched()
    {
        for (const std::byte b : workspace_memory.span())
            if (b != std::byte{0xa5}) return false;
        return true;
    }
    /// Element `i` of the dense query.
    float& q(std::size_t i) { return static_cast<float*>(const_cast<void*>(task.q.data))[i]; }

private:
    static support::kv_history filled_history(const kvarn::format& f)
    {
        support::kv_history h(f, 1200);
        h.add_exact(3);
        h.add_tiles(2, support::record_storage::list);
        h.add_tiles(1, support::record_storage::grid);
        h.add_exact(9);
        return h;
    }
};

enum which : unsigned { whole = 1, items = 2, combine = 4, all = 7 };

/// Each of the calls in `calls` refuses with `wanted` and writes nothing.
void refuses(status wanted, const std::function<void(attention_case&)>& spoil, unsigned calls = all,
             const kvarn::format& f = test_format())
{
    const auto check = [&](const char* name, status (attention_case::*call)()) {
        attention_case c(f);
        spoil(c);
        const status got = (c.*call)();
        INFO(name << ": wanted: " << kvarn::message(wanted) << "; got: " << kvarn::message(got));
        CHECK(got == wanted);
        CHECK(c.untouched());
    };
    if (calls & whole) check("attend", &attention_case::attend);
    if (calls & items) check("attend_item", &attention_case::attend_item);
    if (calls & combine) check("combine_items", &attention_case::combine_items);
}

}  // namespace

TEST_CASE("attention/errors: the calls that the other cases spoil are good", "[unit]")
{
    for (const int value_bits : {2, 0}) {
        attention_case c(test_format(value_bits));
        REQUIRE(c.attend() == status::ok);
        const auto wanted = c.memory.outcome(status::ok, c.scratch_memory.intact());
        CHECK(wanted.intact);
        CHECK(!c.memory.untouched());
        attention_case d(test_format(value_bits));
        const std::size_t count = kvarn::attention_items({&d.task, 1}, 1);
        REQUIRE(count == 4);
        for (d.item = 0; d.item < count; ++d.item) CHECK(d.attend_item() == status::ok);
        CHECK(d.memory.untouched());
        CHECK(!d.workspace_untouched());
        CHECK(d.combine_items() == status::ok);
        const auto got = d.memory.outcome(status::ok, d.scratch_memory.intact() && d.workspace_memory.intact());
        CHECK(got.intact);
        CHECK(support::same_bits(got, wanted));
    }
}

TEST_CASE("attention/errors: null pointers", "[unit]")
{
    refuses(status::null_pointer, [](attention_case& c) { c.task.q.data = nullptr; });
    refuses(
        status::null_pointer, [](attention_case& c) { c.task.out.data = nullptr; }, whole | combine);
    for (const std::size_t exact : {0u, 3u}) {
        refuses(status::null_pointer, [&](attention_case& c) { c.segments[exact].k.data = nullptr; });
        refuses(status::null_pointer, [&](attention_case& c) { c.segments[exact].v.data = nullptr; });
        refuses(
            status::null_pointer, [&](attention_case& c) { c.segments[exact].k.data = nullptr; }, all, test_format(0));
    }
    std::vector<const std::byte*> list(2);
    for (const std::size_t missing : {0u, 1u})
        refuses(status::null_pointer, [&](attention_case& c) {
            list.assign(c.segments[1].list, c.segments[1].list + 2);
            list[missing] = nullptr;
            c.segments[1].list = list.data();
        });
    refuses(status::null_pointer, [](attention_case& c) { c.segments[2].data = nullptr; });
}

TEST_CASE("attention/errors: shapes that disagree", "[unit]")
{
    using spoiler = std::function<void(attention_case&)>;
    const spoiler spoilers[] = {
        [](attention_case& c) { --c.task.q.channels; },
        [](attention_case& c) { c.task.q.channels = 64; },  // without the exact ones
        [](attention_case& c) { c.task.q.channels = 0; },
        [](attention_case& c) { c.segments[0].tokens = 4; },  // more than the view has
        [](attention_case& c) { --c.segments[0].k.tokens; },
        [](attention_case& c) { --c.segments[3].v.tokens; },
        [](attention_case& c) { --c.segments[0].k.channels; },
        [](attention_case& c) { ++c.segments[3].v.channels; },
        [](attention_case& c) { c.segments[0].head = 3; },
        [](attention_case& c) { c.segments[0].v.heads = 1; },
        [](attention_case& c) { c.segments[3].k.heads = 1; },
        [](attention_case& c) { ++c.segments[1].tokens; },
        [](attention_case& c) { c.segments[1].records = 1; },
        [](attention_case& c) { c.segments[2].tokens = 64; },
        // Parts of tiles: segment 1 has 64 tokens in 2 records, segment 2 has 32 in 1.
        [](attention_case& c) { c.segments[0].skip = 1; },  // exact tokens have none to skip
        [](attention_case& c) { c.segments[3].skip = 1; },
        [](attention_case& c) { c.segments[1].skip = 1; },                             // and 64 tokens: another record
        [](attention_case& c) { c.segments[1].tokens = 32; },                          // a record too many
        [](attention_case& c) { c.segments[1].tokens = 1, c.segments[1].skip = 31; },  // the same
        [](attention_case& c) { c.segments[1].tokens = 34, c.segments[1].skip = 31; },
        [](attention_case& c) { c.segments[1].tokens = 32, c.segments[1].skip = 32; },  // a whole record is not skipped but left out
        [](attention_case& c) { c.segments[1].tokens = 1, c.segments[1].skip = 63; },
        [](attention_case& c) { c.segments[2].tokens = 1, c.segments[2].skip = 32; },
        [](attention_case& c) { c.segments[2].tokens = 33; },
        [](attention_case& c) { c.segments[2].skip = SIZE_MAX; },
        [](attention_case& c) { c.segments[2].skip = SIZE_MAX - 31, c.segments[2].tokens = 32; },
    };
    for (const spoiler& spoil : spoilers) refuses(status::shape_mismatch, spoil);
    const spoiler other_output[] = {
        [](attention_case& c) { ++c.task.out.tokens; },  [](attention_case& c) { --c.task.out.tokens; },
        [](attention_case& c) { --c.task.out.heads; },   [](attention_case& c) { ++c.task.q.heads; },
        [](attention_case& c) { c.task.q.tokens = 0; },  [](attention_case& c) { ++c.task.out.channels; },
        [](attention_case& c) { c.task.out = {}; },      [](attention_case& c) { c.task.out.channels = 64; },
    };
    for (const spoiler& spoil : other_output) refuses(status::shape_mismatch, spoil, whole | combine);
    // Made for another group.
    refuses(status::shape_mismatch, [](attention_case& c) {
        c.segments[1] = kvarn::listed_tiles(support::make(reference::shape{64, 96, 4, 2, 64, true, 4}), {c.segments[1].list, 1});
    });
    // A format without values takes no V, and its output has K's quantized channels.
    refuses(
        status::shape_mismatch, [](attention_case& c) { c.segments[0].v = c.segments[0].k; }, all, test_format(0));
    refuses(
        status::shape_mismatch, [](attention_case& c) { c.task.out.channels = 96; }, whole | combine, test_format(0));
}

TEST_CASE("attention/errors: buffers that are too small", "[unit]")
{
    refuses(status::buffer_too_small, [](attention_case& c) { c.scratch = c.scratch.first(c.scratch.size() - 1); });
    refuses(status::buffer_too_small, [](attention_case& c) { c.scratch = c.scratch.first(1); });
    refuses(status::buffer_too_small, [](attention_case& c) { c.scratch = {}; });
    refuses(
        status::buffer_too_small, [](attention_case& c) { c.workspace = c.workspace.first(c.workspace.size() - 1); },
        items | combine);
    refuses(
        status::buffer_too_small, [](attention_case& c) { c.workspace = c.workspace.first(64); }, items | combine);
    refuses(
        status::buffer_too_small, [](attention_case& c) { c.workspace = {}; }, items | combine);
}

TEST_CASE("attention/errors: options out of range", "[unit]")
{
    for (const float bad :
         {not_a_number, -not_a_number, infinity, -infinity, -1.0f, -1e-30f, 1.1e30f, std::numeric_limits<float>::max()}) {
        INFO(bad);
        refuses(status::bad_argument, [&](attention_case& c) { c.options.softmax_scale = bad; });
        refuses(status::bad_argument, [&](attention_case& c) { c.options.logit_soft_cap = bad; });
    }
    refuses(status::bad_argument, [](attention_case& c) { c.options.logit_soft_cap = 1001.0f; });
    for (const float bad : {not_a_number, -not_a_number, -infinity, -1.0f, -1e-30f})
        refuses(status::bad_argument, [&](attention_case& c) { c.options.fast_bound = bad; });
    for (const std::int64_t bad : {std::int64_t{-1}, std::int64_t{-1000}, std::numeric_limits<std::int64_t>::min()})
        refuses(status::bad_argument, [&](attention_case& c) { c.options.window = bad; });
    refuses(status::bad_argument, [](attention_case& c) { c.options.precision = static_cast<kvarn::precision>(3); });
    refuses(status::bad_argument, [](attention_case& c) { c.options.precision = static_cast<kvarn::precision>(255); });
    refuses(status::bad_argument, [](attention_case& c) { c.options.query_basis = static_cast<kvarn::basis>(2); });
    refuses(status::bad_argument, [](attention_case& c) { c.options.output_basis = static_cast<kvarn::basis>(200); });
    for (const std::int64_t bad : {std::int64_t{-2}, std::numeric_limits<std::int64_t>::min(), std::numeric_limits<std::int64_t>::max()})
        refuses(status::bad_argument, [&](attention_case& c) { c.task.first_position = bad; });
    refuses(
        status::bad_argument, [](attention_case& c) { c.chunks_per_item = 0; }, items);
    for (const std::size_t bad : {std::size_t{4}, std::size_t{5}, SIZE_MAX})
        refuses(
            status::bad_argument, [&](attention_case& c) { c.item = bad; }, items);
    refuses(
        status::bad_argument, [](attention_case& c) { c.item = 2, c.chunks_per_item = 2; }, items);
    for (const std::size_t bad : {std::size_t{1}, SIZE_MAX})
        refuses(
            status::bad_argument, [&](attention_case& c) { c.task_number = bad; }, combine);
    // The largest that are allowed.
    attention_case c(test_format());
    c.options.window = std::numeric_limits<std::int64_t>::max();
    c.options.logit_soft_cap = 1000.0f;
    c.chunks_per_item = SIZE_MAX;
    CHECK(c.attend() == status::ok);
    CHECK(c.attend_item() == status::ok);
}

TEST_CASE("attention/errors: more query rows than are allowed", "[unit]")
{
    const std::size_t shapes[][2] = {
        {kvarn::max_query_rows + 1, 1}, {1, kvarn::max_query_rows + 1}, {33, 32}, {SIZE_MAX / 2 + 1, 2}, {SIZE_MAX, SIZE_MAX}};
    for (const auto& shape : shapes)
        refuses(
            status::bad_argument,
            [&](attention_case& c) {
                c.task.q.tokens = c.task.out.tokens = shape[0];
                c.task.q.heads = c.task.out.heads = shape[1];
                c.task.sink_logits = nullptr;
            },
            whole);
}

TEST_CASE("attention/errors: queries and sink logits that are not finite or too large", "[unit]")
{
    const std::size_t channels = 68;
    for (const float bad : {not_a_number, -not_a_number, infinity, -infinity, 1e25f, -1e25f, std::numeric_limits<float>::max()})
        for (const std::size_t row : {std::size_t{0}, m * r - 1})
            for (const std::size_t channel : {0u, 17u, 63u, 64u, 67u}) {
                INFO(bad << " in row " << row << ", channel " << channel);
                refuses(
                    status::not_finite, [&](attention_case& c) { c.q(row * channels + channel) = bad; }, whole | items);
            }
    for (const float bad : {not_a_number, infinity, 1e21f})
        for (std::size_t head = 0; head < r; ++head)
            refuses(status::not_finite, [&](attention_case& c) { c.sinks[head] = bad; });
    // Scaling counts: large times small is fine, and the other way round is not.
    refuses(
        status::not_finite, [&](attention_case& c) { c.options.softmax_scale = 1e25f; }, whole | items);
    attention_case c(test_format());
    c.q(3) = 1e25f;
    c.options.softmax_scale = 1e-10f;
    c.sinks[1] = -infinity;
    CHECK(c.attend() == status::ok);
    CHECK(c.attend_item() == status::ok);
}

TEST_CASE("attention/errors: no query tokens or heads is fine and writes nothing", "[unit]")
{
    for (const int tokens : {0, 2})
        for (const int heads : {0, 3}) {
            if (tokens != 0 && heads != 0) continue;
            attention_case c(test_format());
            c.task.q.tokens = c.task.out.tokens = static_cast<std::size_t>(tokens);
            c.task.q.heads = c.task.out.heads = static_cast<std::size_t>(heads);
            c.task.q.data = nullptr;
            c.task.out.data = nullptr;
            CHECK(c.attend() == status::ok);
            CHECK(c.attend_item() == status::ok);
            CHECK(c.combine_items() == status::ok);
            CHECK(c.untouched());
        }
}

TEST_CASE("attention/errors: empty segments need no memory", "[unit]")
{
    const kvarn::format f = test_format();
    attention_case plain(f), padded(f);
    kvarn::kv_segment nothing = kvarn::exact_tokens({}, {}, 5);
    padded.segments.insert(padded.segments.begin(), nothing);
    padded.segments.insert(padded.segments.begin() + 2, kvarn::listed_tiles(f, {}));
    padded.segments.push_back(kvarn::paged_tiles(f, nullptr, 0, {}));
    padded.segments.push_back(kvarn::sealed_tiles(f, kvarn::record_grid<const std::byte>{}, 0));
    padded.task.history = padded.segments;
    REQUIRE(plain.attend() == status::ok);
    REQUIRE(padded.attend() == status::ok);
    CHECK(support::same_bits(plain.memory.outcome(status::ok, true), padded.memory.outcome(status::ok, true)));
}

TEST_CASE("attention/errors: the largest parts that are allowed, and an empty one whatever else it says", "[unit]")
{
    for (const auto& [tokens, skip] : {std::pair{33u, 0u}, {64u, 0u}, {33u, 31u}, {2u, 31u}, {63u, 1u}}) {
        attention_case c(test_format());
        c.segments[1].tokens = tokens;
        c.segments[1].skip = skip;
        CHECK(c.attend() == status::ok);
        CHECK(c.attend_item() == status::ok);
    }
    attention_case plain(test_format()), with_empty(test_format());
    kvarn::kv_segment nothing = plain.segments[1];
    nothing.tokens = 0;
    nothing.skip = 77;
    with_empty.segments.insert(with_empty.segments.begin(), nothing);
    with_empty.task.history = with_empty.segments;
    REQUIRE(plain.attend() == status::ok);
    REQUIRE(with_empty.attend() == status::ok);
    CHECK(support::same_bits(plain.memory.outcome(status::ok, true), with_empty.memory.outcome(status::ok, true)));
}

TEST_CASE("attention/errors: a segment of part of a grid or of a view", "[unit]")
{
    const kvarn::format f = test_format();
    const auto records = support::random_records(f, 4, 1210);
    support::kv_history three(f, 1211), two(f, 1211);
    three.add_records(records);
    two.add_records({records[1], records[2]});
    const auto x = support::random_query(f, 1, 2, 1212);
    support::bytes dense(kvarn::grid_bytes(f, 4, 1));
    const auto grid = kvarn::tile_major_records(f, support::as_bytes(dense.data()), dense.size(), 4, 1);
    for (std::size_t i = 0; i < 4; ++i)
        std::copy(records[i].begin(), records[i].end(), dense.begin() + static_cast<std::ptrdiff_t>(i * kvarn::record_bytes(f)));
    const auto attend_to = [&](const kvarn::kv_segment& s) { return support::attend(f, {&s, 1}, x); };
    CHECK(support::same_bits(attend_to(kvarn::sealed_tiles(f, grid, 0)), support::attend(f, three.segments(), x)));
    CHECK(support::same_bits(attend_to(kvarn::sealed_tiles(f, grid, 0, 1, 2)), support::attend(f, two.segments(), x)));
    CHECK(kvarn::sealed_tiles(f, grid, 0, 3, 7).tokens == 32);
    CHECK(kvarn::sealed_tiles(f, grid, 0, 9).tokens == 0);
    // Fewer tokens than the view holds: the rest is room to grow.
    support::kv_history tail(f, 1213);
    tail.add_exact(12);
    kvarn::kv_segment shorter = tail.segments()[0], wanted = shorter;
    shorter.tokens = 7;
    wanted.tokens = wanted.k.tokens = wanted.v.tokens = 7;
    CHECK(support::same_bits(attend_to(shorter), attend_to(wanted)));
    CHECK(attend_to(shorter).status == status::ok);
}

TEST_CASE("attention/errors: only the item's results are written", "[unit]")
{
    attention_case c(test_format());
    std::vector<std::byte> before(c.workspace.begin(), c.workspace.end());
    std::size_t changed[4] = {}, first[4] = {};
    for (c.item = 0; c.item < 4; ++c.item) {
        REQUIRE(c.attend_item() == status::ok);
        for (std::size_t i = before.size(); i-- > 0;)
            if (before[i] != c.workspace[i]) ++changed[c.item], first[c.item] = i;
        before.assign(c.workspace.begin(), c.workspace.end());
    }
    for (std::size_t i = 0; i < 4; ++i) {
        CHECK(changed[i] > 0);
        CHECK(changed[i] <= m * r * (96 + 2) * sizeof(float));
        if (i > 0) CHECK(first[i] > first[i - 1]);
    }
}
