// SPDX-License-Identifier: Apache-2.0
#pragma once
// Decode attention straight on records: m new tokens x r query heads over the exact and sealed history of one KV head.
// In: attention_task (attention/task.hpp). Out: softmax(scale * q k^T) v in any element type, and the log-sum-exp on request.
// K and V are never materialised; a record is read once for all m * r query rows. The caller owns all memory; nothing allocates.
//
// The history is cut into chunks: every segment starts a new one, and chunk_tokens tokens make one. Chunks are attended to one by one
// and merged in order, so the result is the same bits for any number of threads, any item size, and for any split of a run of records
// into segments at multiples of chunk_tokens from its first record on. Instruction sets agree bit for bit too.
//
// One call: attend(). Many threads: attention_items() work items, each attend_item() from any thread, then, when all are done,
// combine_items() for each task, from any thread. The tasks of a batch may have formats of their own (attention_task::format); scratch
// must be large enough for each.

#include <kvarn/base/config.hpp>  // first: it refuses older standards

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>

#include <kvarn/attention/chunk.hpp>
#include <kvarn/attention/task.hpp>
#include <kvarn/simd/environment.hpp>

namespace kvarn {

/// Tokens between two merges; a whole number of tiles of every group.
inline constexpr std::size_t chunk_tokens = 1024;

/// Query rows (m * r) of one task at most.
inline constexpr std::size_t max_query_rows = 1024;

/// Bytes of scratch that attend, attend_item and combine_items need (per thread) for a task of m * r query rows, at any alignment.
[[nodiscard]] KVARN_INLINE constexpr std::size_t attention_scratch_bytes(const format& f, std::size_t query_rows) noexcept
{
    return detail::attention_floats(f, query_rows) * sizeof(float) + 63;
}

/// Attends to the whole history of one task.
/// An empty history (or none visible) gives zeros and a log-sum-exp of -infinity, unless there is a sink logit.
/// Errors, nothing written: null_pointer, shape_mismatch, bad_argument (options, positions), buffer_too_small (scratch),
/// not_finite (a query value not finite, or beyond 1e20 times the softmax scale and log2(e); a sink logit not below 1e20; an ALiBi slope
/// not within 1e18).
/// Scalars of records are taken as they are: `fast` needs V token scales that are not negative, as every encoder makes them. Those of tokens
/// that a query does not see play no part.
template <class Arch = simd::native_arch>
[[nodiscard]] status attend(const format& f, const attention_task& task, const attention_options& options, std::span<std::byte> scratch) noexcept;

/// Work items of a batch: each is up to `chunks_per_item` consecutive chunks of one task. Fewer chunks an item spread better over
/// threads, more repeat less work on the queries; the result is the same.
[[nodiscard]] KVARN_INLINE std::size_t attention_items(std::span<const attention_task> tasks, std::size_t chunks_per_item = 4) noexcept;

/// Bytes of memory in which the items leave their results, at any alignment. `f` is the format of tasks that name none.
[[nodiscard]] KVARN_INLINE std::size_t attention_workspace_bytes(const format& f, std::span<const attention_task> tasks) noexcept;

/// Bytes that attention_workspace_bytes cannot exceed for any batch of up to `tasks` tasks, each with up to `query_rows` query rows and a
/// history of up to `tokens` tokens in up to `segments` segments: for memory that is allocated once. Where formats are mixed, `f` is the
/// one with the widest output. SIZE_MAX if the number does not fit.
[[nodiscard]] KVARN_INLINE constexpr std::size_t attention_workspace_bound(const format& f, std::size_t tasks, std::size_t query_rows,
                                                                           std::size_t tokens, std::size_t segments) noexcept;

/// Attends to item `item` and leaves the result in `workspace`. Different items may run at the same time. Errors as for attend;
/// the output is not looked at: it may not be known yet.
template <class Arch = simd::native_arch>
[[nodiscard]] status attend_item(const format& f, std::span<const attention_task> tasks, const attention_options& options, std::size_t item,
                                 std::size_t chunks_per_item, std::span<std::byte> workspace, std::span<std::byte> scratch) noexcept;

/// Merges the items of task `task`, all of which have returned ok, and writes its output.
template <class Arch = simd::native_arch>
[[nodiscard]] status combine_items(const format& f, std::span<const attention_task> tasks, const attention_options& options, std::size_t task,
                                   std::span<const std::byte> workspace, std::span<std::byte> scratch) noexcept;

namespace detail {

/// Where the chunks of a task keep their results: [chunk], each [rows] states, then [rows][values] floats.
struct chunk_results {
    float* data;
    int rows;
    int values;

    [[nodiscard]] KVARN_INLINE static constexpr std::size_t floats(std::size_t rows, int values) noexcept
    {
        return rows * (2 + static_cast<std::size_t>(values));
    }
    [[nodiscard]] KVARN_INLINE softmax_state* state(std::size_t chunk) const noexcept
    {
        return reinterpret_cast<softmax_state*>(data + chunk * floats(static_cast<std::size_t>(rows), values));
    }
    [[nodiscard]] KVARN_INLINE float* out(std::size_t chunk) const noexcept { return reinterpret_cast<float*>(state(chunk) + rows); }
};

[[nodiscard]] KVARN_INLINE std::size_t query_rows(const attention_task& task) noexcept { return task.q.tokens * task.q.heads; }

[[nodiscard]] KVARN_INLINE const format& format_of(const format& f, const attention_task& task) noexcept
{
    return task.format != nullptr ? *task.format : f;
}

/// Floats of workspace of the tasks before `task`.
[[nodiscard]] KVARN_INLINE std::size_t workspace_floats(const format& f, std::span<const attention_task> tasks, std::size_t task) noexcept
{
    std::size_t n = 0;
    for (std::size_t i = 0; i < task; ++i)
        n += chunks_of(tasks[i], chunk_tokens) * chunk_results::floats(query_rows(tasks[i]), attention_extents(format_of(f, tasks[i])).values);
    return n;
}

[[nodiscard]] KVARN_INLINE chunk_results results_of(const format& f, std::span<const attention_task> tasks, std::size_t task,
                                                    const std::byte* workspace) noexcept
{
    const auto address = reinterpret_cast<std::uintptr_t>(workspace);
    float* const base = reinterpret_cast<float*>(const_cast<std::byte*>(workspace) + (64 - address % 64) % 64);
    return {base + workspace_floats(f, tasks, task), static_cast<int>(query_rows(tasks[task])),
            attention_extents(format_of(f, tasks[task])).values};
}

[[nodiscard]] KVARN_INLINE std::size_t items_of(const attention_task& task, std::size_t chunks_per_item) noexcept
{
    const std::size_t chunks = chunks_of(task, chunk_tokens);
    return chunks / chunks_per_item + (chunks % chunks_per_item != 0);
}

KVARN_INLINE status check_call(const format& f, const attention_task& task, const attention_options& options, std::size_t scratch) noexcept
{
    if (const status s = check_options(options); s != status::ok) return s;
    if (const status s = check_task(f, task, max_query_rows); s != status::ok) return s;
    return scratch < attention_scratch_bytes(f, query_rows(task)) ? status::buffer_too_small : status::ok;
}

template <class Arch>
KVARN_INLINE void merge_chunk(const attention_rows& r, const softmax_state* state, const float* out, int values) noexcept
{
    for (int i = 0; i < r.rows; ++i) merge_states<Arch>(r.total[i], r.total_out + i * values, state[i], out + i * values, values);
}

}  // namespace detail

KVARN_INLINE std::size_t attention_items(std::span<const attention_task> tasks, std::size_t chunks_per_item) noexcept
{
    std::size_t n = 0;
    for (const attention_task& task : tasks) n += detail::items_of(task, chunks_per_item == 0 ? 1 : chunks_per_item);
    return n;
}

KVARN_INLINE std::size_t attention_workspace_bytes(const format& f, std::span<const attention_task> tasks) noexcept
{
    return detail::workspace_floats(f, tasks, tasks.size()) * sizeof(float) + 63;
}

KVARN_INLINE constexpr std::size_t attention_workspace_bound(const format& f, std::size_t tasks, std::size_t query_rows, std::size_t tokens,
                                                             std::size_t segments) noexcept
{
    // A segment of n tokens has up to (n + group - 1) / chunk_tokens chunks, rounded up; one without tokens has none.
    const auto times = [](std::size_t a, std::size_t b) KVARN_LAMBDA { return b != 0 && a > SIZE_MAX / b ? SIZE_MAX : a * b; };
    const auto plus = [](std::size_t a, std::size_t b) KVARN_LAMBDA { return a > SIZE_MAX - b ? SIZE_MAX : a + b; };
    if (segments > tokens) segments = tokens;
    const std::size_t room = times(segments, chunk_tokens - 1 + static_cast<std::size_t>(max_group) - 1);
    const std::size_t chunks = room == SIZE_MAX ? SIZE_MAX : plus(tokens / chunk_tokens, plus(room, tokens % chunk_tokens) / chunk_tokens);
    const std::size_t each = times(query_rows, detail::chunk_results::floats(1, detail::attention_extents(f).values) * sizeof(float));
    return plus(times(tasks, times(chunks, each)), 63);
}

template <class Arch>
status attend(const format& call_format, const attention_task& task, const attention_options& options, std::span<std::byte> scratch) noexcept
{
    const format& f = detail::format_of(call_format, task);
    if (const status s = detail::check_output(f, task); s != status::ok) return s;
    if (const status s = detail::check_call(f, task, options, scratch.size()); s != status::ok) return s;
    if (detail::query_rows(task) == 0) return status::ok;
    const simd::float_environment guard;
    const detail::attention_rows r = detail::carve_rows(f, detail::query_rows(task), scratch.data());
    if (const status s = detail::prepare_queries<Arch>(f, task, options, r); s != status::ok) return s;
    const detail::call_positions positions = detail::positions_of(task);
    detail::begin_total(f, task, r);
    detail::for_chunks(task, chunk_tokens, 0, SIZE_MAX, [&](const detail::chunk& c) {
        detail::attend_chunk<Arch>(f, task, options, positions, c, r);
        detail::merge_chunk<Arch>(r, r.state, r.out, detail::attention_extents(f).values);
    });
    detail::write_output<Arch>(f, task, options, r);
    return status::ok;
}

template <class Arch>
status attend_item(const format& call_format, std::span<const attention_task> tasks, const attention_options& options, std::size_t item,
                   std::size_t chunks_per_item, std::span<std::byte> workspace, std::span<std::byte> scratch) noexcept
{
    if (chunks_per_item == 0) return status::bad_argument;
    std::size_t task = 0;
    for (; task < tasks.size(); ++task) {
        const std::size_t items = detail::items_of(tasks[task], chunks_per_item);
        if (item < items) break;
        item -= items;
    }
    if (task == tasks.size()) return status::bad_argument;
    const attention_task& mine = tasks[task];
    const format& f = detail::format_of(call_format, mine);
    if (const status s = detail::check_call(f, mine, options, scratch.size()); s != status::ok) return s;
    if (detail::query_rows(mine) == 0) return status::ok;
    if (workspace.size() < attention_workspace_bytes(call_format, tasks)) return status::buffer_too_small;
    const simd::float_environment guard;
    const detail::attention_rows r = detail::carve_rows(f, detail::query_rows(mine), scratch.data());
    if (const status s = detail::prepare_queries<Arch>(f, mine, options, r); s != status::ok) return s;
    const detail::call_positions positions = detail::positions_of(mine);
    const detail::chunk_results results = detail::results_of(call_format, tasks, task, workspace.data());
    std::size_t number = item * chunks_per_item;
    detail::for_chunks(mine, chunk_tokens, number, number + chunks_per_item, [&](const detail::chunk& c) {
        detail::attention_rows mine_rows = r;
        mine_rows.state = results.state(number);
        mine_rows.out = results.out(number);
        detail::attend_chunk<Arch>(f, mine, options, positions, c, mine_rows);
        ++number;
    });
    return status::ok;
}

template <class Arch>
status combine_items(const format& call_format, std::span<const attention_task> tasks, const attention_options& options, std::size_t task,
                     std::span<const std::byte> workspace, std::span<std::byte> scratch) noexcept
{
    if (task >= tasks.size()) return status::bad_argument;
    const attention_task& mine = tasks[task];
    const format& f = detail::format_of(call_format, mine);
    if (const status s = detail::check_output(f, mine); s != status::ok) return s;
    if (const status s = detail::check_call(f, mine, options, scratch.size()); s != status::ok) return s;
    if (detail::query_rows(mine) == 0) return status::ok;
    if (workspace.size() < attention_workspace_bytes(call_format, tasks)) return status::buffer_too_small;
    const simd::float_environment guard;
    const detail::attention_rows r = detail::carve_rows(f, detail::query_rows(mine), scratch.data());
    const detail::chunk_results results = detail::results_of(call_format, tasks, task, workspace.data());
    detail::begin_total(f, mine, r);
    const std::size_t chunks = detail::chunks_of(mine, chunk_tokens);
    for (std::size_t c = 0; c < chunks; ++c) detail::merge_chunk<Arch>(r, results.state(c), results.out(c), detail::attention_extents(f).values);
    detail::write_output<Arch>(f, mine, options, r);
    return status::ok;
}

}  // namespace kvarn
