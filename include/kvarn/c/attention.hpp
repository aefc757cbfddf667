// SPDX-License-Identifier: Apache-2.0
#pragma once
// The C interface, second part: attention on records. Compiled once, by c/implementation.hpp. In and out: as kvarn.h
// says. What the library wants as arrays of its own structs is made of the caller's in scratch, or in the memory of a
// plan. No allocation.

#include <kvarn/base/config.hpp>  // first: it refuses older standards

#include <cstddef>
#include <cstdint>
#include <new>
#include <span>

#include <kvarn/c/codec.hpp>
#include <kvarn/c/handles.hpp>
#include <kvarn/c/structs.hpp>
#include <kvarn/cache/state.hpp>

namespace kvarn::c {

[[nodiscard]] KVARN_INLINE status to_segment(const kvarn_segment& given, kv_segment& s) noexcept
{
    s = kv_segment();
    s.tokens = given.tokens;
    s.position = given.position;
    s.head = given.head;
    s.data = static_cast<const std::byte*>(given.data);
    s.stride = given.stride;
    s.table = given.table;
    s.list = reinterpret_cast<const std::byte* const*>(given.list);
    s.records = given.records;
    s.skip = given.skip;
    if (const status said = to_view(&given.k, s.k); said != status::ok) return said;
    if (const status said = to_view(&given.v, s.v); said != status::ok) return said;
    if (const status said = to_basis(given.key_basis, s.key_basis); said != status::ok) return said;
    return to_basis(given.value_basis, s.value_basis);
}

KVARN_INLINE void give_segment(const kv_segment& s, kvarn_segment* to) noexcept
{
    const auto view = [](const input_view& x) {
        return kvarn_view{
            const_cast<void*>(x.data),         x.tokens, x.heads, x.channels, x.token_stride, x.head_stride, x.channel_stride,
            static_cast<std::int32_t>(x.type), 0};
    };
    give({sizeof(kvarn_segment), s.tokens, s.position, view(s.k), view(s.v), s.head, static_cast<std::int32_t>(s.key_basis),
          static_cast<std::int32_t>(s.value_basis), s.data, s.stride, s.table, reinterpret_cast<const void* const*>(s.list),
          s.records, s.skip},
         to);
}

/// Everything of a task but its history and its format.
[[nodiscard]] KVARN_INLINE status to_task(const kvarn_attention_task& given, attention_task& t) noexcept
{
    t = attention_task();
    t.log_sum_exp = given.log_sum_exp;
    t.sink_logits = given.sink_logits;
    t.alibi_slopes = given.alibi_slopes;
    t.first_position = given.first_position;
    t.mask = given.mask;
    t.mask_stride = given.mask_stride;
    t.mask_tokens = given.mask_tokens;
    if (const status s = to_view(&given.q, t.q); s != status::ok) return s;
    return to_view(&given.out, t.out);
}

/// The history of a task into an array that has room for it.
[[nodiscard]] KVARN_INLINE status to_history(const kvarn_attention_task& given, kv_segment* segments, attention_task& t) noexcept
{
    const array_of<kvarn_segment> history{given.history, given.history_count};
    if (const status s = history.sound(); s != status::ok) return s;
    for (std::size_t i = 0; i < history.count; ++i) {
        kvarn_segment one;
        if (const status s = history.at(i, one); s != status::ok) return s;
        ::new (static_cast<void*>(segments + i)) kv_segment();
        if (const status s = to_segment(one, segments[i]); s != status::ok) return s;
    }
    t.history = {segments, history.count};
    return status::ok;
}

[[nodiscard]] KVARN_INLINE std::size_t rows_of(const attention_task& t) noexcept
{
    return detail::multiply_sizes(t.q.tokens, t.q.heads);
}

/// What a batch takes: its handle, tasks, formats, segments, and floats of workspace.
struct batch_sizes {
    std::size_t tasks = 0, segments = 0, floats = 0;

    [[nodiscard]] KVARN_INLINE status read(const format& f, const array_of<kvarn_attention_task>& given) noexcept
    {
        tasks = given.count;
        for (std::size_t i = 0; i < given.count; ++i) {
            kvarn_attention_task one;
            attention_task t;
            format own = f;
            if (const status s = given.at(i, one); s != status::ok) return s;
            if (const status s = to_task(one, t); s != status::ok) return s;
            if (one.format != nullptr)
                if (const status s = to_format(one.format, own); s != status::ok) return s;
            const array_of<kvarn_segment> history{one.history, one.history_count};
            if (const status s = history.sound(); s != status::ok) return s;
            if (rows_of(t) > max_query_rows) return status::bad_argument;
            std::size_t chunks = 0;
            for (std::size_t j = 0; j < history.count; ++j) {
                kvarn_segment segment;
                kv_segment s;
                if (const status said = history.at(j, segment); said != status::ok) return said;
                if (const status said = to_segment(segment, s); said != status::ok) return said;
                if (s.tokens > SIZE_MAX / 2 || s.skip > SIZE_MAX / 2) return status::bad_argument;
                chunks = detail::add_sizes(chunks, detail::chunks_of(s, chunk_tokens));
            }
            const std::size_t each = detail::chunk_results::floats(rows_of(t), detail::attention_extents(own).values);
            floats = detail::add_sizes(floats, detail::multiply_sizes(chunks, each));
            segments = detail::add_sizes(segments, history.count);
        }
        return status::ok;
    }
};

}  // namespace kvarn::c

/// A batch in the caller's memory.
struct kvarn_attention {
    static constexpr kvarn::c::handle_kind its_kind = kvarn::c::handle_kind::attention;
    kvarn::c::handle_kind kind = its_kind;
    kvarn::format format{};
    kvarn::attention_options options{};
    std::size_t chunks_per_item = 0;
    std::span<const kvarn::attention_task> tasks{};
    std::span<std::byte> workspace{};
};

namespace kvarn::c {

struct batch_memory {
    kvarn_attention* handle;
    attention_task* tasks;
    format* formats;
    kv_segment* segments;
    std::byte* workspace;
    std::size_t workspace_bytes;

    KVARN_INLINE batch_memory(const batch_sizes& n, detail::memory_cutter& cut) noexcept
        : handle(cut.array<kvarn_attention>(1)), tasks(cut.array<attention_task>(n.tasks)), formats(cut.array<format>(n.tasks)),
          segments(cut.array<kv_segment>(n.segments)), workspace(nullptr),
          workspace_bytes(detail::add_sizes(detail::multiply_sizes(n.floats, sizeof(float)), 63))
    {
        workspace = cut.bytes(workspace_bytes);
    }
};

[[nodiscard]] KVARN_INLINE std::size_t batch_bytes(const batch_sizes& n) noexcept
{
    detail::memory_cutter cut(nullptr);
    static_cast<void>(batch_memory(n, cut));
    return detail::add_sizes(cut.used(), 63);
}

[[nodiscard]] KVARN_INLINE status plan_batch(const kvarn_format* format, const array_of<kvarn_attention_task>& given,
                                             const kvarn_attention_options* options, std::size_t chunks_per_item, void* memory,
                                             std::size_t bytes, kvarn_attention*& made) noexcept
{
    kvarn::format f;
    attention_options o;
    batch_sizes sizes;
    if (const status s = to_format(format, f); s != status::ok) return s;
    if (const status s = to_attention_options(options, o); s != status::ok) return s;
    if (const status s = given.sound(); s != status::ok) return s;
    if (const status s = sizes.read(f, given); s != status::ok) return s;
    if (memory == nullptr) return status::null_pointer;
    if (bytes < batch_bytes(sizes)) return status::buffer_too_small;
    detail::memory_cutter cut(aligned(memory));
    const batch_memory m(sizes, cut);
    kv_segment* segments = m.segments;
    for (std::size_t i = 0; i < given.count; ++i) {
        kvarn_attention_task one;
        if (const status s = given.at(i, one); s != status::ok) return s;
        detail::construct(m.tasks + i, 1);
        detail::construct(m.formats + i, 1);
        attention_task& t = m.tasks[i];
        if (const status s = to_task(one, t); s != status::ok) return s;
        if (const status s = to_history(one, segments, t); s != status::ok) return s;
        segments += one.history_count;
        m.formats[i] = f;
        if (one.format != nullptr)
            if (const status s = to_format(one.format, m.formats[i]); s != status::ok) return s;
        t.format = m.formats + i;
        if (const status s = detail::check_output(m.formats[i], t); s != status::ok) return s;
        if (const status s = detail::check_task(m.formats[i], t, max_query_rows); s != status::ok) return s;
    }
    made = detail::construct(m.handle, 1);
    made->format = f;
    made->options = o;
    made->chunks_per_item = chunks_per_item == 0 ? 4 : chunks_per_item;
    made->tasks = {m.tasks, given.count};
    made->workspace = {m.workspace, m.workspace_bytes};
    return status::ok;
}

[[nodiscard]] KVARN_INLINE status attend_once(const kvarn_format* format, const kvarn_attention_task* task,
                                              const kvarn_attention_options* options, void* scratch,
                                              std::size_t scratch_bytes) noexcept
{
    kvarn::format f, own;
    attention_options o;
    kvarn_attention_task given;
    attention_task t;
    if (const status s = to_format(format, f); s != status::ok) return s;
    if (const status s = take(task, given); s != status::ok) return s;
    if (const status s = to_attention_options(options, o); s != status::ok) return s;
    if (const status s = to_task(given, t); s != status::ok) return s;
    if (given.format != nullptr) {
        if (const status s = to_format(given.format, own); s != status::ok) return s;
        t.format = &own;
    }
    if (scratch == nullptr) return status::null_pointer;
    detail::memory_cutter count(nullptr);
    count.array<kv_segment>(given.history_count);
    if (scratch_bytes < 63 || count.used() > scratch_bytes - 63) return status::buffer_too_small;
    std::byte* const base = aligned(scratch);
    detail::memory_cutter cut(base);
    kv_segment* const segments = cut.array<kv_segment>(given.history_count);
    if (const status s = to_history(given, segments, t); s != status::ok) return s;
    return dispatched::attend(f, t, o, {base + cut.used(), scratch_bytes - 63 - cut.used()});
}

}  // namespace kvarn::c

extern "C" {

kvarn_status kvarn_exact_tokens(const kvarn_view* k, const kvarn_view* v, size_t head, std::int32_t key_basis,
                                std::int32_t value_basis, kvarn_segment* segment) noexcept
{
    using namespace kvarn::c;
    kvarn::input_view keys, values;
    kvarn::basis key{}, value{};
    if (k == nullptr) return KVARN_NULL_POINTER;
    if (const kvarn::status s = can_give(segment); s != kvarn::status::ok) return code(s);
    if (const kvarn::status s = to_view(k, keys); s != kvarn::status::ok) return code(s);
    if (const kvarn::status s = to_view(v, values); s != kvarn::status::ok) return code(s);
    if (const kvarn::status s = to_basis(key_basis, key); s != kvarn::status::ok) return code(s);
    if (const kvarn::status s = to_basis(value_basis, value); s != kvarn::status::ok) return code(s);
    give_segment(kvarn::exact_tokens(keys, values, head, key, value), segment);
    return KVARN_OK;
}

kvarn_status kvarn_sealed_tiles(const kvarn_format* format, const kvarn_records* records, size_t head, size_t first, size_t count,
                                kvarn_segment* segment) noexcept
{
    using namespace kvarn::c;
    kvarn::format f;
    if (records == nullptr) return KVARN_NULL_POINTER;
    if (const kvarn::status s = can_give(segment); s != kvarn::status::ok) return code(s);
    if (const kvarn::status s = to_format(format, f); s != kvarn::status::ok) return code(s);
    if (head >= records->heads || (records->data == nullptr && records->tiles != 0)) return KVARN_BAD_ARGUMENT;
    give_segment(kvarn::sealed_tiles(f, to_grid(*records), head, first, count), segment);
    return KVARN_OK;
}

kvarn_status kvarn_paged_tiles(const kvarn_format* format, const void* base, std::ptrdiff_t stride, const std::int32_t* table,
                               size_t count, kvarn_segment* segment) noexcept
{
    using namespace kvarn::c;
    kvarn::format f;
    if ((base == nullptr || table == nullptr) && count != 0) return KVARN_NULL_POINTER;
    if (const kvarn::status s = can_give(segment); s != kvarn::status::ok) return code(s);
    if (const kvarn::status s = to_format(format, f); s != kvarn::status::ok) return code(s);
    give_segment(kvarn::paged_tiles(f, static_cast<const std::byte*>(base), stride, std::span(table, count)), segment);
    return KVARN_OK;
}

kvarn_status kvarn_listed_tiles(const kvarn_format* format, const void* const* records, size_t count,
                                kvarn_segment* segment) noexcept
{
    using namespace kvarn::c;
    kvarn::format f;
    if (records == nullptr && count != 0) return KVARN_NULL_POINTER;
    if (const kvarn::status s = can_give(segment); s != kvarn::status::ok) return code(s);
    if (const kvarn::status s = to_format(format, f); s != kvarn::status::ok) return code(s);
    give_segment(kvarn::listed_tiles(f, {reinterpret_cast<const std::byte* const*>(records), count}), segment);
    return KVARN_OK;
}

kvarn_status kvarn_segment_tokens(const kvarn_format* format, size_t first, size_t count, kvarn_segment* segment) noexcept
{
    using namespace kvarn::c;
    kvarn::format f;
    kvarn_segment given;
    kvarn::kv_segment whole;
    if (const kvarn::status s = to_format(format, f); s != kvarn::status::ok) return code(s);
    if (const kvarn::status s = take(segment, given); s != kvarn::status::ok) return code(s);
    if (const kvarn::status s = to_segment(given, whole); s != kvarn::status::ok) return code(s);
    const auto group = static_cast<std::size_t>(f.group());
    if (whole.sealed() && (whole.skip >= group || whole.tokens > whole.records * group - whole.skip)) return KVARN_SHAPE_MISMATCH;
    give_segment(kvarn::token_range(f, whole, first, count), segment);
    return KVARN_OK;
}

kvarn_status kvarn_attend(const kvarn_format* format, const kvarn_attention_task* task, const kvarn_attention_options* options,
                          void* scratch, size_t scratch_bytes) noexcept
{
    return kvarn::c::code(kvarn::c::attend_once(format, task, options, scratch, scratch_bytes));
}

size_t kvarn_attend_scratch_bytes(const kvarn_format* format, size_t query_rows, size_t segments) noexcept
{
    if (query_rows > kvarn::max_query_rows) return 0;
    return kvarn::c::number_of(format, [&](const kvarn::format& f) {
        kvarn::detail::memory_cutter cut(nullptr);
        cut.array<kvarn::kv_segment>(segments);
        return kvarn::detail::add_sizes(cut.used(), kvarn::attention_scratch_bytes(f, query_rows) + 63);
    });
}

size_t kvarn_attention_bytes(const kvarn_format* format, const kvarn_attention_task* tasks, size_t count) noexcept
{
    using namespace kvarn::c;
    kvarn::format f;
    batch_sizes sizes;
    const array_of<kvarn_attention_task> given{tasks, count};
    if (to_format(format, f) != kvarn::status::ok || given.sound() != kvarn::status::ok) return 0;
    return sizes.read(f, given) == kvarn::status::ok ? batch_bytes(sizes) : 0;
}

kvarn_status kvarn_attention_plan(const kvarn_format* format, const kvarn_attention_task* tasks, size_t count,
                                  const kvarn_attention_options* options, size_t chunks_per_item, void* memory, size_t bytes,
                                  kvarn_attention** attention) noexcept
{
    if (attention == nullptr) return KVARN_NULL_POINTER;
    kvarn_attention* made = nullptr;
    const kvarn::status said = kvarn::c::plan_batch(format, {tasks, count}, options, chunks_per_item, memory, bytes, made);
    if (said == kvarn::status::ok) *attention = made;
    return kvarn::c::code(said);
}

size_t kvarn_attention_items(const kvarn_attention* attention) noexcept
{
    if (kvarn::c::check_handle(attention) != kvarn::status::ok) return 0;
    return kvarn::attention_items(attention->tasks, attention->chunks_per_item);
}

kvarn_status kvarn_attend_item(const kvarn_attention* attention, size_t item, void* scratch, size_t scratch_bytes) noexcept
{
    using namespace kvarn::c;
    if (const kvarn::status s = check_handle(attention); s != kvarn::status::ok) return code(s);
    if (scratch == nullptr) return KVARN_NULL_POINTER;
    return code(kvarn::dispatched::attend_item(attention->format, attention->tasks, attention->options, item,
                                               attention->chunks_per_item, attention->workspace,
                                               bytes_at(scratch, scratch_bytes)));
}

kvarn_status kvarn_combine_item(const kvarn_attention* attention, size_t task, void* scratch, size_t scratch_bytes) noexcept
{
    using namespace kvarn::c;
    if (const kvarn::status s = check_handle(attention); s != kvarn::status::ok) return code(s);
    if (scratch == nullptr) return KVARN_NULL_POINTER;
    return code(kvarn::dispatched::combine_items(attention->format, attention->tasks, attention->options, task,
                                                 attention->workspace, bytes_at(scratch, scratch_bytes)));
}

}  // extern "C"
