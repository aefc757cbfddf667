// SPDX-License-Identifier: Apache-2.0
#pragma once
// The C interface, sixth part: attention of a layer over sequences, and other positions. Compiled once, by
// c/implementation.hpp. In and out: as kvarn.h says. Steps are copied into the memory of a plan. No allocation.

#include <kvarn/base/config.hpp>  // first: it refuses older standards

#include <cstddef>
#include <cstdint>
#include <span>

#include <kvarn/c/codec.hpp>
#include <kvarn/c/entry_points.hpp>
#include <kvarn/c/handles.hpp>
#include <kvarn/c/pool.hpp>
#include <kvarn/c/sequences.hpp>
#include <kvarn/c/structs.hpp>
#include <kvarn/cache/tasks.hpp>

/// The items of a layer in the caller's memory; their steps and what the library makes of them follow.
struct kvarn_layer {
    static constexpr kvarn::c::handle_kind its_kind = kvarn::c::handle_kind::layer;
    kvarn::c::handle_kind kind = its_kind;
    kvarn::layer_items items{};
};

namespace kvarn::c {

inline constexpr std::size_t most_threads = std::size_t{1} << 20;

[[nodiscard]] KVARN_INLINE status to_layer_options(const kvarn_layer_options* given, layer_options& o) noexcept
{
    kvarn_layer_options full;
    if (const status s = take_or_default(given, full); s != status::ok) return s;
    if (full.chunks_per_item == 0) return status::bad_argument;
    o.threads = full.threads < most_threads ? full.threads : most_threads;
    o.rows_per_task = full.rows_per_task;
    o.chunks_per_item = full.chunks_per_item;
    return to_attention_options(full.attention, o.attention);
}

[[nodiscard]] KVARN_INLINE status to_step(const kvarn_step& given, sequence_step& step) noexcept
{
    step = sequence_step();
    step.sequence = id_of(given.sequence);
    step.first_draft = given.first_draft;
    step.log_sum_exp = given.log_sum_exp;
    step.sink_logits = given.sink_logits;
    step.alibi_slopes = given.alibi_slopes;
    step.mask = given.mask;
    step.mask_stride = given.mask_stride;
    step.mask_tokens = given.mask_tokens;
    if (const status s = to_view(&given.k, step.k); s != status::ok) return s;
    if (const status s = to_view(&given.v, step.v); s != status::ok) return s;
    if (const status s = to_view(&given.q, step.q); s != status::ok) return s;
    return to_view(&given.out, step.out);
}

/// What a layer takes besides its handle and its steps, as layer_memory_bytes counts it, without an array of all steps.
[[nodiscard]] KVARN_INLINE status layer_sizes_of(const cache_pool& pool, const array_of<kvarn_step>& steps, layer_options options,
                                                 detail::layer_sizes& all, std::size_t* failed) noexcept
{
    const std::size_t threads = options.threads;
    options.threads = SIZE_MAX / 4;  // what a history that is split takes
    for (std::size_t i = 0; i < steps.count; ++i) {
        kvarn_step one;
        sequence_step step;
        status s = steps.at(i, one);
        if (s == status::ok) s = to_step(one, step);
        if (s == status::ok && step.q.tokens > pool.config().most_tokens) s = status::shape_mismatch;
        if (s == status::ok && step.q.heads / pool.heads() > max_query_rows) s = status::bad_argument;
        if (s != status::ok) {
            if (failed != nullptr) *failed = i;
            return s;
        }
        const detail::layer_sizes sizes = detail::sizes_of(pool, {&step, 1}, options);
        all.tasks = detail::add_sizes(all.tasks, sizes.tasks);
        all.segments = detail::add_sizes(all.segments, sizes.segments);
        all.workspace = detail::add_sizes(all.workspace, sizes.workspace);
    }
    all.may_split = all.tasks < 4 * threads;
    if (!all.may_split) all.workspace = 0;
    return status::ok;
}

/// Handle and steps, before the library's part.
[[nodiscard]] KVARN_INLINE std::size_t layer_head_bytes(std::size_t steps) noexcept
{
    detail::memory_cutter cut(nullptr);
    cut.array<kvarn_layer>(1);
    cut.array<sequence_step>(steps);
    return detail::add_sizes(cut.used(), 63);
}

[[nodiscard]] KVARN_INLINE status plan(const cache_pool& pool, std::size_t layer, const array_of<kvarn_step>& given,
                                       const kvarn_layer_options* options, void* memory, std::size_t bytes, kvarn_layer*& made,
                                       std::size_t* failed) noexcept
{
    layer_options o;
    detail::layer_sizes sizes;
    if (layer >= pool.layers()) return status::bad_argument;
    if (const status s = to_layer_options(options, o); s != status::ok) return s;
    if (const status s = given.sound(); s != status::ok) return s;
    if (const status s = layer_sizes_of(pool, given, o, sizes, failed); s != status::ok) return s;
    if (memory == nullptr) return status::null_pointer;
    if (bytes < detail::add_sizes(layer_head_bytes(given.count), sizes.bytes())) return status::buffer_too_small;
    std::byte* const base = aligned(memory);
    detail::memory_cutter cut(base);
    kvarn_layer* const handle = cut.array<kvarn_layer>(1);
    sequence_step* const steps = cut.array<sequence_step>(given.count);
    for (std::size_t i = 0; i < given.count; ++i) {
        kvarn_step one;
        if (const status s = given.at(i, one); s != status::ok) return s;
        detail::construct(steps + i, 1);
        if (const status s = to_step(one, steps[i]); s != status::ok) return s;
    }
    const std::size_t used = static_cast<std::size_t>(base - static_cast<std::byte*>(memory)) + cut.used();
    const auto items = plan_layer(pool, layer, {steps, given.count}, o, {base + cut.used(), bytes - used}, failed);
    if (!items) return items.error;
    made = detail::construct(handle, 1);
    made->items = *items;
    return status::ok;
}

/// A number of a layer's items; `none` without any.
template <class F>
[[nodiscard]] KVARN_INLINE std::size_t number_of_items(const kvarn_layer* layer, std::size_t none, F&& f) noexcept
{
    return check_handle(layer) == status::ok ? f(layer->items) : none;
}

/// Runs an item that needs scratch.
template <class F>
[[nodiscard]] KVARN_INLINE kvarn_status run_item(const kvarn_layer* layer, void* scratch, std::size_t bytes, F&& f) noexcept
{
    if (const status s = check_handle(layer); s != status::ok) return code(s);
    if (scratch == nullptr) return KVARN_NULL_POINTER;
    return code(f(layer->items, bytes_at(scratch, bytes)));
}

}  // namespace kvarn::c

extern "C" {

size_t kvarn_layer_bytes(const kvarn_pool* pool, const kvarn_step* steps, size_t count,
                         const kvarn_layer_options* options) noexcept
{
    using namespace kvarn::c;
    kvarn::layer_options o;
    kvarn::detail::layer_sizes sizes;
    const array_of<kvarn_step> given{steps, count};
    if (check_handle(pool) != kvarn::status::ok || to_layer_options(options, o) != kvarn::status::ok) return 0;
    if (given.sound() != kvarn::status::ok || layer_sizes_of(pool->pool, given, o, sizes, nullptr) != kvarn::status::ok) return 0;
    return kvarn::detail::add_sizes(layer_head_bytes(count), sizes.bytes());
}

size_t kvarn_layer_bound(const kvarn_cache_config* config, size_t steps, size_t rows, size_t group_heads,
                         const kvarn_layer_options* options) noexcept
{
    using namespace kvarn::c;
    using kvarn::detail::add_sizes;
    using kvarn::detail::multiply_sizes;
    configuration c;
    kvarn_cache_config given;
    kvarn::layer_options o;
    if (c.read(config, given) != kvarn::status::ok || to_layer_options(options, o) != kvarn::status::ok) return 0;
    if (!kvarn::plan_cache(c.config) || group_heads == 0 || group_heads > kvarn::max_query_rows) return 0;
    const kvarn::cache_config whole = kvarn::completed(c.config);
    const std::size_t lines =
        multiply_sizes(multiply_sizes(steps, static_cast<std::size_t>(given.heads)), add_sizes(rows, whole.most_spans));
    if (lines > SIZE_MAX / 4096) return SIZE_MAX;  // it would not fit
    return add_sizes(layer_head_bytes(steps), kvarn::layer_memory_bound(c.config, steps, rows, group_heads, o));
}

kvarn_status kvarn_layer_plan(const kvarn_pool* pool, size_t layer, const kvarn_step* steps, size_t count,
                              const kvarn_layer_options* options, void* memory, size_t bytes, kvarn_layer** items,
                              size_t* failed) noexcept
{
    using namespace kvarn::c;
    return with_pool(pool, [&](const kvarn::cache_pool& p) {
        kvarn_layer* made = nullptr;
        if (items == nullptr) return kvarn::status::null_pointer;
        const kvarn::status s = plan(p, layer, {steps, count}, options, memory, bytes, made, failed);
        if (s == kvarn::status::ok) *items = made;
        return s;
    });
}

size_t kvarn_store_items(const kvarn_layer* layer) noexcept
{
    return kvarn::c::number_of_items(layer, 0, [](const kvarn::layer_items& items) { return items.store_items(); });
}

size_t kvarn_attend_items(const kvarn_layer* layer) noexcept
{
    return kvarn::c::number_of_items(layer, 0, [](const kvarn::layer_items& items) { return items.attend_items(); });
}

size_t kvarn_finish_items(const kvarn_layer* layer) noexcept
{
    return kvarn::c::number_of_items(layer, 0, [](const kvarn::layer_items& items) { return items.finish_items(); });
}

kvarn_status kvarn_layer_store(const kvarn_layer* layer, size_t item) noexcept
{
    using namespace kvarn::c;
    if (const kvarn::status s = check_handle(layer); s != kvarn::status::ok) return code(s);
    return code(kvarn::dispatched::store_item(layer->items, item));
}

kvarn_status kvarn_layer_attend(const kvarn_layer* layer, size_t item, void* scratch, size_t scratch_bytes) noexcept
{
    return kvarn::c::run_item(layer, scratch, scratch_bytes, [&](const kvarn::layer_items& items, std::span<std::byte> memory) {
        return kvarn::dispatched::attend_item(items, item, memory);
    });
}

kvarn_status kvarn_layer_finish(const kvarn_layer* layer, size_t item, void* scratch, size_t scratch_bytes) noexcept
{
    return kvarn::c::run_item(layer, scratch, scratch_bytes, [&](const kvarn::layer_items& items, std::span<std::byte> memory) {
        return kvarn::dispatched::finish_item(items, item, memory);
    });
}

kvarn_status kvarn_layer_run(const kvarn_layer* layer, void* scratch, size_t scratch_bytes) noexcept
{
    return kvarn::c::run_item(layer, scratch, scratch_bytes, [](const kvarn::layer_items& items, std::span<std::byte> memory) {
        return kvarn::dispatched::run(items, memory);
    });
}

size_t kvarn_step_of_store(const kvarn_layer* layer, size_t item) noexcept
{
    return kvarn::c::number_of_items(layer, SIZE_MAX, [&](const kvarn::layer_items& items) {
        return item < items.store_items() ? items.step_of_store(item) : SIZE_MAX;
    });
}

size_t kvarn_step_of_attend(const kvarn_layer* layer, size_t item) noexcept
{
    return kvarn::c::number_of_items(layer, SIZE_MAX, [&](const kvarn::layer_items& items) {
        return item < items.attend_items() ? items.step_of_attend(item) : SIZE_MAX;
    });
}

size_t kvarn_step_of_finish(const kvarn_layer* layer, size_t item) noexcept
{
    return kvarn::c::number_of_items(layer, SIZE_MAX, [&](const kvarn::layer_items& items) {
        return item < items.finish_items() ? items.step_of_finish(item) : SIZE_MAX;
    });
}

// --- other positions -----------------------------------------------------------------------------------------------

kvarn_status kvarn_shift_positions(kvarn_pool* pool, kvarn_sequence sequence, std::int64_t begin, std::int64_t end,
                                   std::int64_t by, kvarn_turn turn, void* user, void* scratch, size_t scratch_bytes,
                                   kvarn_shift_report* report) noexcept
{
    using namespace kvarn::c;
    return with_pool(pool, [&](const kvarn::cache_pool& p) {
        if (turn == nullptr || scratch == nullptr) return kvarn::status::null_pointer;
        if (const kvarn::status s = can_report(report); s != kvarn::status::ok) return s;
        const plain_turn call{turn, user};
        const auto done = kvarn::dispatch([&](auto arch) KVARN_LAMBDA {
            return kvarn::shift_positions<decltype(arch)>(p, id_of(sequence), begin, end, by, call,
                                                          bytes_at(scratch, scratch_bytes));
        });
        if (done && report != nullptr)
            give({sizeof(kvarn_shift_report), done->tokens, done->sealed_tokens, done->relative_error}, report);
        return done.error;
    });
}

size_t kvarn_shift_scratch_bytes(const kvarn_format* format) noexcept
{
    return kvarn::c::number_of(format, [](const kvarn::format& f) { return kvarn::shift_scratch_bytes(f); });
}

}  // extern "C"
