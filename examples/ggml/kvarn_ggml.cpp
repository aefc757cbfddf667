// SPDX-License-Identifier: Apache-2.0
// The adapter: a kvarn::cache_pool behind kvarn_ggml.h, and the custom operations of its layers. A layer is three of them, and ggml has
// a barrier after each: store K and V, and plan; attend; finish. Before those of layer 0 there is one that seals the tiles that the
// step before has filled. Whatever a step changes is in the cache, so that a graph may be computed again and again.
//
// Works share out by counters, so that any number of threads may come; those beyond kvarn_ggml_params::threads have no scratch and rest.
// Nothing is allocated in an operation. No exceptions.

#include "kvarn_ggml.h"

#include <algorithm>
#include <atomic>
#include <cinttypes>
#include <cmath>
#include <cstdarg>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <limits>
#include <memory>
#include <new>
#include <span>
#include <string_view>

#include <kvarn/cache/bases.hpp>
#include <kvarn/cache/load.hpp>
#include <kvarn/cache/shift.hpp>
#include <kvarn/dispatch/cache.hpp>

namespace {

using kvarn::status;

/// An array on the heap whose elements are not set; allocation that fails is told.
template <class T>
class heap_array {
public:
    /// At least n elements; those before are lost where it has to grow.
    [[nodiscard]] bool grow(std::size_t n) noexcept
    {
        if (n <= size_) return true;
        if (n > PTRDIFF_MAX / sizeof(T)) return false;
        T* const made = new (std::nothrow) T[n];
        if (made == nullptr) return false;
        data_.reset(made);
        size_ = n;
        return true;
    }
    void clear() noexcept
    {
        data_.reset();
        size_ = 0;
    }
    [[nodiscard]] T* data() const noexcept { return data_.get(); }
    [[nodiscard]] std::size_t size() const noexcept { return size_; }
    [[nodiscard]] T& operator[](std::size_t i) const noexcept { return data_[i]; }
    [[nodiscard]] std::span<T> span() const noexcept { return {data_.get(), size_}; }

private:
    std::unique_ptr<T[]> data_;
    std::size_t size_ = 0;
};

/// What the engine calls a sequence, and what the pool does; without tokens it is not open.
struct open_sequence {
    kvarn::sequence_id id{};
    bool open = false;
};

struct step_part {
    int sequence = 0;
    kvarn::sequence_id id{};
    std::size_t tokens = 0, first_row = 0, row_stride = 1;
    bool masked = false;
    std::size_t mask = 0, mask_stride = 0, mask_tokens = 0;  // words before it
};

struct layer {
    kvarn_ggml_cache* owner = nullptr;
    std::size_t number = 0;
    bool built = false;
    float scale = 0.0f, soft_cap = 0.0f;
    std::int64_t window = 0;
    bool alibi = false;
    heap_array<float> slopes;
};

}  // namespace

struct kvarn_ggml_cache {
    std::size_t query_heads = 0;
    kvarn::cache_config config{};
    heap_array<kvarn::bit_rule> rules;
    heap_array<std::byte> memory, scratch;  // of the pool; of all threads
    std::size_t threads = 0, scratch_each = 0;
    kvarn::cache_pool pool{};
    heap_array<layer> layers;
    heap_array<open_sequence> sequences;
    kvarn::precision precision = kvarn::precision::fine;

    // "_auto"
    bool choose = false, chosen = false;
    std::int64_t changed_bases = 0;
    heap_array<std::uint64_t> moments;

    // The step at hand, from begin to the end.
    bool pending = false, causal = true;
    heap_array<step_part> parts;
    heap_array<kvarn::sequence_room> rooms;
    std::size_t part_count = 0, rows = 0;
    heap_array<std::uint64_t> masks;
    heap_array<bool> taken;  // rows
    std::size_t seal_count = 0;
    std::atomic<std::size_t> next_seal{0}, seals_done{0};

    // The layer at hand, from its first operation to its last.
    heap_array<kvarn::sequence_step> steps;
    heap_array<std::byte> plan;
    kvarn::layer_items items{};
    std::atomic<std::size_t> next_attend{0}, next_finish{0};

    // What went wrong: in operations, the first of it (status << 32 | layer); and what the engine has not been told.
    std::atomic<std::uint64_t> failed{0};
    kvarn_ggml_status untold = KVARN_GGML_OK;
    char message[256] = "ok";
};

namespace {

[[gnu::format(printf, 3, 4)]] kvarn_ggml_status refuse(kvarn_ggml_cache& c, kvarn_ggml_status said, const char* text,
                                                       ...) noexcept
{
    std::va_list list;
    va_start(list, text);
    std::vsnprintf(c.message, sizeof c.message, text, list);
    va_end(list);
    return said;
}

[[nodiscard]] kvarn_ggml_status code_of(status s) noexcept
{
    switch (s) {
    case status::ok: return KVARN_GGML_OK;
    case status::no_room: return KVARN_GGML_NO_ROOM;
    case status::sequence_full: return KVARN_GGML_SEQUENCE_FULL;
    case status::out_of_memory: return KVARN_GGML_OUT_OF_MEMORY;
    case status::not_finite:
    case status::scale_overflow: return KVARN_GGML_NOT_FINITE;
    case status::other_configuration: return KVARN_GGML_OTHER_CONFIGURATION;
    case status::truncated:
    case status::corrupt:
    case status::unsupported_version: return KVARN_GGML_CORRUPT;
    case status::io_error: return KVARN_GGML_IO;
    default: return KVARN_GGML_BAD_ARGUMENT;
    }
}

[[nodiscard]] kvarn_ggml_status refuse(kvarn_ggml_cache& c, status s, const char* where) noexcept
{
    return s == status::ok ? KVARN_GGML_OK : refuse(c, code_of(s), "%s: %s", where, kvarn::message(s));
}

[[nodiscard]] std::span<std::byte> scratch_of(const kvarn_ggml_cache& c, std::size_t thread) noexcept
{
    return c.scratch.span().subspan(thread * c.scratch_each, c.scratch_each);
}

// --- operations --------------------------------------------------------------------------------------------------------

void note(kvarn_ggml_cache& c, status s, std::size_t layer) noexcept
{
    if (s == status::ok) return;
    std::uint64_t none = 0;
    const std::uint64_t mine = std::uint64_t{static_cast<std::uint8_t>(s)} << 32 | static_cast<std::uint32_t>(layer);
    c.failed.compare_exchange_strong(none, mine, std::memory_order_relaxed);
}

[[nodiscard]] kvarn::input_view::element_type type_of(const ggml_tensor& x) noexcept
{
    using type = kvarn::input_view::element_type;
    return x.type == GGML_TYPE_F32 ? type::f32 : x.type == GGML_TYPE_F16 ? type::f16 : type::bf16;
}

[[nodiscard]] std::size_t element_bytes(const ggml_tensor& x) noexcept
{
    return x.type == GGML_TYPE_F32 ? 4 : 2;
}

/// A part's rows of a tensor [channels, heads, tokens].
[[nodiscard]] kvarn::input_view rows_of(const ggml_tensor& x, const step_part& part) noexcept
{
    const auto bytes = static_cast<std::ptrdiff_t>(element_bytes(x));
    kvarn::input_view rows;
    rows.data = static_cast<const char*>(x.data) + part.first_row * x.nb[2];
    rows.type = type_of(x);
    rows.tokens = part.tokens;
    rows.heads = static_cast<std::size_t>(x.ne[1]);
    rows.channels = static_cast<std::size_t>(x.ne[0]);
    rows.token_stride = static_cast<std::ptrdiff_t>(part.row_stride * x.nb[2]) / bytes;
    rows.head_stride = static_cast<std::ptrdiff_t>(x.nb[1]) / bytes;
    return rows;
}

/// A part's rows of the output [channels * heads, tokens].
[[nodiscard]] kvarn::output_view output_rows(const ggml_tensor& x, const step_part& part, std::size_t heads) noexcept
{
    kvarn::output_view rows;
    rows.data = static_cast<char*>(x.data) + part.first_row * x.nb[1];
    rows.tokens = part.tokens;
    rows.heads = heads;
    rows.channels = static_cast<std::size_t>(x.ne[0]) / heads;
    rows.token_stride = static_cast<std::ptrdiff_t>(part.row_stride * x.nb[1] / sizeof(float));
    rows.head_stride = static_cast<std::ptrdiff_t>(rows.channels);
    return rows;
}

/// The threads that work.
[[nodiscard]] std::size_t working(const kvarn_ggml_cache& c, int count) noexcept
{
    return std::min(static_cast<std::size_t>(count), c.threads);
}

/// In place on K of layer 0: the tiles that the steps before have filled become records.
void seal_operation(ggml_tensor*, int ith, int, void* data) noexcept
{
    kvarn_ggml_cache& c = *static_cast<layer*>(data)->owner;
    const auto thread = static_cast<std::size_t>(ith);
    if (thread >= c.threads) return;
    for (std::size_t i; (i = c.next_seal.fetch_add(1, std::memory_order_relaxed)) < c.seal_count;) {
        note(c, kvarn::dispatched::seal_item(c.pool, i, scratch_of(c, thread)), 0);
        // Whoever does the last one is the only one who is still at it.
        if (c.seals_done.fetch_add(1, std::memory_order_acq_rel) + 1 == c.seal_count)
            static_cast<void>(kvarn::finish_seal(c.pool, c.seal_count));
    }
}

/// Thread 0 says what there is to do in the operations that follow.
void plan_layer(kvarn_ggml_cache& c, const layer& l, const ggml_tensor& out, const ggml_tensor& q, const ggml_tensor* sinks,
                std::size_t threads) noexcept
{
    for (std::size_t i = 0; i < c.part_count; ++i) {
        const step_part& part = c.parts[i];
        kvarn::sequence_step step;
        step.sequence = part.id;
        step.q = rows_of(q, part);
        step.out = output_rows(out, part, c.query_heads);
        step.sink_logits = sinks != nullptr ? static_cast<const float*>(sinks->data) : nullptr;
        step.alibi_slopes = l.alibi ? l.slopes.data() : nullptr;
        if (part.masked) {
            step.mask = c.masks.data() + part.mask;
            step.mask_stride = part.mask_stride;
            step.mask_tokens = part.mask_tokens;
        }
        c.steps[i] = step;
    }
    kvarn::layer_options options;
    options.attention.softmax_scale = l.scale;
    options.attention.logit_soft_cap = l.soft_cap;
    options.attention.window = l.window;
    options.attention.causal = c.causal;
    options.attention.precision = c.precision;
    options.threads = threads;
    const auto items = kvarn::plan_layer(c.pool, l.number, c.steps.span().first(c.part_count), options, c.plan.span());
    note(c, items.error, l.number);
    c.items = items.value;
    c.next_attend.store(0, std::memory_order_relaxed);
    c.next_finish.store(0, std::memory_order_relaxed);
}

/// What no item writes is NaN: as an exact cache would have it, and nobody takes it for an answer.
void fill_with_nan(const ggml_tensor& out, std::size_t thread, std::size_t threads) noexcept
{
    const auto rows = static_cast<std::size_t>(out.ne[1]), channels = static_cast<std::size_t>(out.ne[0]);
    for (std::size_t r = thread * rows / threads, end = (thread + 1) * rows / threads; r < end; ++r)
        std::fill_n(reinterpret_cast<float*>(static_cast<char*>(out.data) + r * out.nb[1]), channels,
                    std::numeric_limits<float>::quiet_NaN());
}

/// Whether the tensors are those of the step; thread 0 tells if not.
[[nodiscard]] bool is_step(kvarn_ggml_cache& c, const layer& l, const ggml_tensor& q, std::size_t thread) noexcept
{
    if (c.pending && static_cast<std::size_t>(q.ne[2]) == c.rows) return true;
    if (thread == 0) {
        note(c, status::bad_argument, l.number);
        c.items = {};
    }
    return false;
}

/// src: q, k, v, sinks.
void store_operation(ggml_tensor* dst, int ith, int nth, void* data) noexcept
{
    const layer& l = *static_cast<layer*>(data);
    kvarn_ggml_cache& c = *l.owner;
    const std::size_t thread = static_cast<std::size_t>(ith), threads = working(c, nth), heads = c.pool.heads();
    if (thread >= threads) return;
    fill_with_nan(*dst, thread, threads);
    const ggml_tensor &q = *dst->src[0], &k = *dst->src[1], &v = *dst->src[2];
    if (!is_step(c, l, q, thread)) return;
    for (std::size_t i = thread; i < c.part_count * heads; i += threads) {
        const step_part& part = c.parts[i / heads];
        const std::size_t h = i % heads;
        note(c, kvarn::dispatched::store(c.pool, part.id, l.number, rows_of(k, part).head(h), rows_of(v, part).head(h), 0, h),
             l.number);
    }
    for (std::size_t h = thread; c.choose && !c.chosen && h < heads; h += threads)
        for (std::size_t i = 0; i < c.part_count; ++i) {
            const kvarn::input_view x = rows_of(q, c.parts[i]);
            const std::size_t each = c.query_heads / heads;
            kvarn::kv_view<const float> group{
                static_cast<const float*>(x.data), x.tokens, each, x.channels, x.token_stride, x.head_stride};
            group.data = group.at(0, h * each);
            const kvarn::format& f = c.pool.format_of(l.number, h);
            const auto dim = static_cast<std::size_t>(f.head_dim_k());
            note(c, kvarn::add_query_moments(f, group, c.moments.span().subspan((l.number * heads + h) * dim, dim)), l.number);
        }
    if (thread == 0) plan_layer(c, l, *dst, q, dst->src[3], threads);
}

/// The first operation of a layer that reads the K and V of another. src: q, sinks.
void plan_operation(ggml_tensor* dst, int ith, int nth, void* data) noexcept
{
    const layer& l = *static_cast<layer*>(data);
    kvarn_ggml_cache& c = *l.owner;
    const std::size_t thread = static_cast<std::size_t>(ith), threads = working(c, nth);
    if (thread >= threads) return;
    fill_with_nan(*dst, thread, threads);
    const ggml_tensor& q = *dst->src[0];
    if (is_step(c, l, q, thread) && thread == 0) plan_layer(c, l, *dst, q, dst->src[1], threads);
}

/// In place on the output. src: the operation before, q, which must live so long.
void attend_operation(ggml_tensor*, int ith, int, void* data) noexcept
{
    const layer& l = *static_cast<layer*>(data);
    kvarn_ggml_cache& c = *l.owner;
    const auto thread = static_cast<std::size_t>(ith);
    if (thread >= c.threads) return;
    const std::size_t count = c.items.attend_items();
    for (std::size_t i; (i = c.next_attend.fetch_add(1, std::memory_order_relaxed)) < count;)
        note(c, kvarn::dispatched::attend_item(c.items, i, scratch_of(c, thread)), l.number);
}

void finish_operation(ggml_tensor*, int ith, int, void* data) noexcept
{
    const layer& l = *static_cast<layer*>(data);
    kvarn_ggml_cache& c = *l.owner;
    const auto thread = static_cast<std::size_t>(ith);
    if (thread >= c.threads) return;
    const std::size_t count = c.items.finish_items();
    for (std::size_t i; (i = c.next_finish.fetch_add(1, std::memory_order_relaxed)) < count;)
        note(c, kvarn::dispatched::finish_item(c.items, i, scratch_of(c, thread)), l.number);
}

// --- steps -------------------------------------------------------------------------------------------------------------

/// What is left in the queue of sealing, in this thread.
void seal_rest(kvarn_ggml_cache& c) noexcept
{
    const std::size_t left = kvarn::seal_items(c.pool);
    for (std::size_t i = 0; i < left; ++i) static_cast<void>(kvarn::dispatched::seal_item(c.pool, i, scratch_of(c, 0)));
    if (left != 0) static_cast<void>(kvarn::finish_seal(c.pool, left));
    c.seal_count = 0;
}

void close(kvarn_ggml_cache& c, open_sequence& s) noexcept
{
    if (!s.open) return;
    static_cast<void>(kvarn::cancel_seal(c.pool, s.id));
    static_cast<void>(c.pool.close(s.id));
    s.open = false;
}

/// The step is over: its tokens count where all layers have them.
void settle(kvarn_ggml_cache& c) noexcept
{
    if (!c.pending) return;
    c.pending = false;
    bool all = true;
    for (std::size_t i = 0; i < c.part_count; ++i) {
        const step_part& part = c.parts[i];
        if (c.pool.commit(part.id, part.tokens) == status::ok) continue;
        all = false;
        static_cast<void>(c.pool.commit(part.id, 0));
        if (c.pool.tokens(part.id) == 0) close(c, c.sequences[static_cast<std::size_t>(part.sequence)]);
    }
    c.part_count = c.rows = c.seal_count = 0;
    if (const std::uint64_t failed = c.failed.exchange(0, std::memory_order_relaxed); failed != 0) {
        const auto s = static_cast<status>(failed >> 32);
        c.untold = refuse(c, code_of(s), "layer %" PRIu32 ": %s", static_cast<std::uint32_t>(failed), kvarn::message(s));
    }
    if (!all)
        c.untold = refuse(c, KVARN_GGML_NOT_COMPUTED,
                          "not every layer of the last step was computed, with the rows that kvarn_ggml_begin named");
}

/// The bases of all heads, as soon as a tile of any sequence and the queries so far tell: before the first is sealed.
[[nodiscard]] status choose(kvarn_ggml_cache& c) noexcept
{
    for (const open_sequence& s : c.sequences.span()) {
        if (!s.open || kvarn::ready_tiles(c.pool, s.id) == 0) continue;
        heap_array<std::byte> scratch;
        if (!scratch.grow(kvarn::choose_bases_scratch_bytes(c.pool.format_of(0, 0)))) return status::out_of_memory;
        const auto changed = kvarn::choose_bases(c.pool, s.id, c.moments.span(), scratch.span());
        if (!changed) return changed.error;
        c.changed_bases = static_cast<std::int64_t>(*changed);
        c.chosen = true;
        c.moments.clear();
        return status::ok;
    }
    return status::ok;
}

/// Room for all parts, or nothing has changed.
[[nodiscard]] status reserve(kvarn_ggml_cache& c, std::size_t& failed) noexcept
{
    for (std::size_t i = 0; i < c.part_count; ++i) c.rooms[i] = {c.parts[i].id, c.parts[i].tokens};
    return c.pool.reserve(c.rooms.span().first(c.part_count), &failed);
}

/// The engine's part, where it is one of a step of this cache.
[[nodiscard]] kvarn_ggml_status check(kvarn_ggml_cache& c, const kvarn_ggml_part& p) noexcept
{
    if (p.sequence < 0 || static_cast<std::size_t>(p.sequence) >= c.sequences.size())
        return refuse(c, KVARN_GGML_BAD_ARGUMENT, "sequence %d: the cache has %zu", p.sequence, c.sequences.size());
    constexpr std::int64_t many = std::int64_t{1} << 30;
    if (p.tokens < 1 || p.first_row < 0 || p.row_stride < 1 || p.first_row > many || p.row_stride > many)
        return refuse(c, KVARN_GGML_BAD_ARGUMENT, "sequence %d: %" PRId64 " tokens from row %" PRId64 " by %" PRId64, p.sequence,
                      p.tokens, p.first_row, p.row_stride);
    if (p.tokens > static_cast<std::int64_t>(c.config.most_tokens))
        return refuse(c, KVARN_GGML_SEQUENCE_FULL, "sequence %d: %" PRId64 " tokens at once, its most are %zu", p.sequence,
                      p.tokens, c.config.most_tokens);
    if (p.mask != nullptr && (p.mask_tokens < 0 || p.mask_tokens > std::int64_t{1} << 32 ||
                              p.mask_stride > std::int64_t{1} << 26 || p.mask_stride < (p.mask_tokens + 63) / 64))
        return refuse(c, KVARN_GGML_BAD_ARGUMENT, "sequence %d: a mask of %" PRId64 " tokens in %" PRId64 " words", p.sequence,
                      p.mask_tokens, p.mask_stride);
    const open_sequence& s = c.sequences[static_cast<std::size_t>(p.sequence)];
    if (p.position < 0 || (s.open && p.position != c.pool.next_position(s.id)))
        return refuse(c, KVARN_GGML_BAD_ARGUMENT, "sequence %d: position %" PRId64 ", it goes on at %" PRId64, p.sequence,
                      p.position, s.open ? c.pool.next_position(s.id) : 0);
    return KVARN_GGML_OK;
}

/// The parts as a step; sequences that are not open yet are.
[[nodiscard]] kvarn_ggml_status take_parts(kvarn_ggml_cache& c, const kvarn_ggml_part* parts, std::size_t count) noexcept
{
    std::size_t rows = 0, words = 0;
    for (std::size_t i = 0; i < count; ++i) {
        if (const kvarn_ggml_status said = check(c, parts[i]); said != KVARN_GGML_OK) return said;
        for (std::size_t j = 0; j < i; ++j)
            if (parts[j].sequence == parts[i].sequence)
                return refuse(c, KVARN_GGML_BAD_ARGUMENT, "sequence %d comes twice in a step", parts[i].sequence);
        rows += static_cast<std::size_t>(parts[i].tokens);
        if (parts[i].mask != nullptr) words += static_cast<std::size_t>(parts[i].tokens * parts[i].mask_stride);
    }
    if (!c.masks.grow(words) || !c.taken.grow(rows)) return refuse(c, status::out_of_memory, "kvarn_ggml_begin");
    std::fill_n(c.taken.data(), rows, false);
    for (std::size_t i = 0; i < count; ++i)
        for (std::int64_t t = 0; t < parts[i].tokens; ++t) {
            const auto row = static_cast<std::size_t>(parts[i].first_row + t * parts[i].row_stride);
            if (row >= rows || c.taken[row])
                return refuse(c, KVARN_GGML_BAD_ARGUMENT, "sequence %d: row %zu %s", parts[i].sequence, row,
                              row < rows ? "is another's, too" : "is beyond those of the step");
            c.taken[row] = true;
        }
    words = 0;
    for (std::size_t i = 0; i < count; ++i) {
        const kvarn_ggml_part& p = parts[i];
        open_sequence& s = c.sequences[static_cast<std::size_t>(p.sequence)];
        if (!s.open) {
            const auto made = c.pool.open(p.position);
            if (!made) return refuse(c, made.error, "kvarn_ggml_begin");
            s = {*made, true};
        }
        step_part& to = c.parts[c.part_count++];
        to = {};
        to.sequence = p.sequence;
        to.id = s.id;
        to.tokens = static_cast<std::size_t>(p.tokens);
        to.first_row = static_cast<std::size_t>(p.first_row);
        to.row_stride = static_cast<std::size_t>(p.row_stride);
        if (p.mask == nullptr) continue;
        to.masked = true;
        to.mask = words;
        to.mask_stride = static_cast<std::size_t>(p.mask_stride);
        to.mask_tokens = static_cast<std::size_t>(p.mask_tokens);
        std::copy_n(p.mask, to.tokens * to.mask_stride, c.masks.data() + words);
        words += to.tokens * to.mask_stride;
    }
    c.rows = rows;
    return KVARN_GGML_OK;
}

/// Gives back what a step took that is not to be.
void drop_step(kvarn_ggml_cache& c) noexcept
{
    for (std::size_t i = 0; i < c.part_count; ++i) {
        static_cast<void>(c.pool.commit(c.parts[i].id, 0));
        if (c.pool.tokens(c.parts[i].id) == 0) close(c, c.sequences[static_cast<std::size_t>(c.parts[i].sequence)]);
    }
    c.part_count = c.rows = 0;
}

/// Memory for the plan of a layer, whatever its tensors.
[[nodiscard]] bool grow_plan(kvarn_ggml_cache& c) noexcept
{
    for (std::size_t i = 0; i < c.part_count; ++i) {
        kvarn::sequence_step step;
        step.sequence = c.parts[i].id;
        step.q.tokens = c.parts[i].tokens;
        step.q.heads = c.query_heads;
        c.steps[i] = step;
    }
    kvarn::layer_options options;
    options.threads = c.threads;
    const std::size_t bytes = kvarn::layer_memory_bytes(c.pool, c.steps.span().first(c.part_count), options);
    return c.plan.size() >= bytes || c.plan.grow(bytes + bytes / 4);
}

// --- creation ----------------------------------------------------------------------------------------------------------

[[gnu::format(printf, 3, 4)]] void tell(char* why, std::size_t bytes, const char* text, ...) noexcept
{
    if (why == nullptr || bytes == 0) return;
    std::va_list list;
    va_start(list, text);
    std::vsnprintf(why, bytes, text, list);
    va_end(list);
}

[[nodiscard]] bool within(std::int64_t x, std::int64_t least, std::int64_t most, const char* name, char* why,
                          std::size_t bytes) noexcept
{
    if (x >= least && x <= most) return true;
    tell(why, bytes, "%s is %" PRId64 ", not %" PRId64 " to %" PRId64, name, x, least, most);
    return false;
}

[[nodiscard]] bool in_range(const kvarn_ggml_params& p, char* why, std::size_t bytes) noexcept
{
    constexpr std::int64_t many = std::int64_t{1} << 30;
    if (!within(p.layers, 1, 1 << 16, "layers", why, bytes) || !within(p.kv_heads, 1, 1 << 16, "kv_heads", why, bytes) ||
        !within(p.query_heads, 1, 1 << 16, "query_heads", why, bytes) ||
        !within(p.sequences, 1, 1 << 16, "sequences", why, bytes) || !within(p.most_tokens, 1, many, "most_tokens", why, bytes) ||
        !within(p.pool_tokens, 0, many, "pool_tokens", why, bytes) || !within(p.most_step, 1, many, "most_step", why, bytes) ||
        !within(p.sink_tokens, 0, many, "sink_tokens", why, bytes) ||
        !within(p.recent_tokens, 0, many, "recent_tokens", why, bytes) || !within(p.threads, 1, 4096, "threads", why, bytes) ||
        !within(p.rule_count, 0, 1 << 20, "rule_count", why, bytes))
        return false;
    if (p.query_heads % p.kv_heads != 0) {
        tell(why, bytes, "query_heads (%d) is no multiple of kv_heads (%d)", p.query_heads, p.kv_heads);
        return false;
    }
    if (p.format == nullptr || (p.rules == nullptr && p.rule_count != 0)) {
        tell(why, bytes, "%s is NULL", p.format == nullptr ? "format" : "rules");
        return false;
    }
    return true;
}

/// Blocks: of records as many as the tokens need, and two to spare for each sequence, whose rollbacks leave places unused; of exact
/// ones for each sequence the sink, what is recent, an open tile and one that a rollback began; and the tokens of one step.
void set_blocks(kvarn::cache_config& config, const kvarn_ggml_params& p) noexcept
{
    const kvarn::cache_config c = kvarn::completed(config);
    const std::size_t group = static_cast<std::size_t>(c.policy.base().group()),
                      sequences = static_cast<std::size_t>(p.sequences);
    const auto tiles = [&](std::size_t tokens) { return (tokens + group - 1) / group; };
    const std::size_t each = kvarn::blocks_of(c, c.most_tokens).records, pool = tiles(static_cast<std::size_t>(p.pool_tokens));
    config.record_blocks = (p.pool_tokens == 0 ? each * sequences : std::min(pool, each * sequences)) + 2 * sequences;
    const std::size_t of_one = std::min(tiles(c.most_tokens), c.sink_tokens / group + tiles(c.recent_tokens)) + 2;
    config.exact_blocks = of_one * sequences + tiles(static_cast<std::size_t>(p.most_step));
}

/// All of a cache but its memory.
[[nodiscard]] bool configure(kvarn_ggml_cache& c, const kvarn_ggml_params& p, char* why, std::size_t bytes) noexcept
{
    std::string_view name = p.format;
    constexpr std::string_view suffix = "_auto";
    c.choose = name.size() > suffix.size() && name.substr(name.size() - suffix.size()) == suffix;
    if (c.choose) name.remove_suffix(suffix.size());
    auto format = kvarn::parse_format(name, p.head_dim_k, p.head_dim_v);
    if (format && p.rotation == KVARN_GGML_ROTATED_BY_ENGINE) {
        kvarn::format_spec spec = format->spec();
        spec.key_rotation = spec.value_rotation = kvarn::rotation::none;
        format = kvarn::make_format(spec);
        if (c.choose) {
            tell(why, bytes, "format `%s` chooses the rotation of each head: let the library rotate", p.format);
            return false;
        }
    }
    if (!format) {
        tell(why, bytes, "format `%s`, head_dim %d and %d: %s", p.format, p.head_dim_k, p.head_dim_v,
             kvarn::message(format.error));
        return false;
    }
    if (!format->has_values()) {
        tell(why, bytes, "format `%s` has no V: latent attention is not supported", p.format);
        return false;
    }
    const auto count = static_cast<std::size_t>(p.rule_count);
    if (!c.rules.grow(count)) {
        tell(why, bytes, "%s", kvarn::message(status::out_of_memory));
        return false;
    }
    for (std::size_t i = 0; i < count; ++i) {
        const kvarn_ggml_rule& from = p.rules[i];
        kvarn::bit_rule& r = c.rules[i];
        r.first_layer = from.first_layer;
        r.last_layer = from.last_layer;
        r.first_head = from.first_head;
        r.last_head = from.last_head;
        if (from.key_bits != 0) r.key_bits = from.key_bits;
        if (from.value_bits != 0) r.value_bits = from.value_bits;
    }
    const auto policy = kvarn::make_policy(*format, p.layers, p.kv_heads, c.rules.span().first(count));
    if (!policy) {
        tell(why, bytes, "rules: %s", kvarn::message(policy.error));
        return false;
    }
    c.config.policy = *policy;
    c.config.exact = p.exact == KVARN_GGML_F32    ? kvarn::exact_type::f32
                     : p.exact == KVARN_GGML_BF16 ? kvarn::exact_type::bf16
                                                  : kvarn::exact_type::f16;
    c.config.sink_tokens = static_cast<std::size_t>(p.sink_tokens);
    c.config.recent_tokens = static_cast<std::size_t>(p.recent_tokens);
    c.config.most_tokens = static_cast<std::size_t>(p.most_tokens);
    c.config.most_step = static_cast<std::size_t>(std::min(p.most_step, p.most_tokens));
    c.config.sequences =
        static_cast<std::size_t>(p.sequences) + 1;  // one that is loaded, or shifted, before it takes the place of another
    set_blocks(c.config, p);
    if (const auto plan = kvarn::plan_cache(c.config); !plan) {
        tell(why, bytes, "sizes: %s", kvarn::message(plan.error));
        return false;
    }
    c.query_heads = static_cast<std::size_t>(p.query_heads);
    c.threads = static_cast<std::size_t>(p.threads);
    const auto group_heads = static_cast<std::size_t>(p.query_heads / p.kv_heads);
    if (group_heads > kvarn::max_query_rows) {
        tell(why, bytes, "%zu query heads for each KV head: at most %zu", group_heads,
             static_cast<std::size_t>(kvarn::max_query_rows));
        return false;
    }
    // A whole number of cache lines, for each thread its own.
    c.scratch_each =
        (kvarn::cache_scratch_bytes(c.config, std::max(group_heads, kvarn::layer_options{}.rows_per_task)) + 127) / 64 * 64;
    c.precision = p.fast ? kvarn::precision::fast : kvarn::precision::fine;
    return true;
}

[[nodiscard]] bool allocate(kvarn_ggml_cache& c) noexcept
{
    const auto count = static_cast<std::size_t>(c.config.policy.layers()), sequences = c.config.sequences - 1;
    if (!c.memory.grow(kvarn::plan_cache(c.config)->bytes()) || !c.scratch.grow(c.threads * c.scratch_each) ||
        !c.layers.grow(count) || !c.sequences.grow(sequences) || !c.parts.grow(sequences) || !c.rooms.grow(sequences) ||
        !c.steps.grow(sequences))
        return false;
    const auto made = kvarn::make_pool(c.config, c.memory.span());
    if (!made) return false;
    c.pool = *made;
    if (c.choose) {
        if (!c.moments.grow(kvarn::moment_count(c.pool))) return false;
        std::fill_n(c.moments.data(), c.moments.size(), std::uint64_t{0});
    }
    for (std::size_t i = 0; i < count; ++i) {
        c.layers[i].owner = &c;
        c.layers[i].number = i;
    }
    return true;
}

// --- graphs ------------------------------------------------------------------------------------------------------------

[[nodiscard]] bool has_shape(const ggml_tensor* x, std::int64_t channels, std::int64_t heads, std::int64_t tokens,
                             bool float_only) noexcept
{
    if (x->type != GGML_TYPE_F32 && (float_only || (x->type != GGML_TYPE_F16 && x->type != GGML_TYPE_BF16))) return false;
    const std::size_t bytes = element_bytes(*x);
    return x->ne[0] == channels && x->ne[1] == heads && x->ne[2] == tokens && x->ne[3] == 1 && x->nb[0] == bytes &&
           x->nb[1] % bytes == 0 && x->nb[2] % bytes == 0;
}

[[nodiscard]] kvarn_ggml_status wrong_shape(kvarn_ggml_cache& c, int layer, const char* name, const ggml_tensor* x,
                                            std::int64_t channels, std::int64_t heads) noexcept
{
    return refuse(c, KVARN_GGML_BAD_ARGUMENT,
                  "layer %d: %s is [%" PRId64 ", %" PRId64 ", %" PRId64 ", %" PRId64 "], not [%" PRId64 ", %" PRId64
                  ", tokens] of F32%s with its channels side by side",
                  layer, name, x->ne[0], x->ne[1], x->ne[2], x->ne[3], channels, heads, name[0] == 'q' ? "" : ", F16 or BF16");
}

/// The same model constants whenever a layer is built.
[[nodiscard]] kvarn_ggml_status take_constants(kvarn_ggml_cache& c, layer& l, const kvarn_ggml_attention_params& p) noexcept
{
    const auto finite = [](float x, float most) { return x >= 0.0f && x <= most; };
    if (!finite(p.scale, 1e6f) || !finite(p.soft_cap, 1000.0f) || p.window < 0)
        return refuse(c, KVARN_GGML_UNSUPPORTED, "layer %zu: scale %g, soft cap %g (at most 1000), window %" PRId64, l.number,
                      static_cast<double>(p.scale), static_cast<double>(p.soft_cap), p.window);
    if (!l.built) {
        l.scale = p.scale;
        l.soft_cap = p.soft_cap;
        l.window = p.window;
        l.alibi = p.alibi_slopes != nullptr;
        if (l.alibi && !l.slopes.grow(c.query_heads)) return refuse(c, status::out_of_memory, "kvarn_ggml_attention");
        if (l.alibi) std::copy_n(p.alibi_slopes, c.query_heads, l.slopes.data());
        l.built = true;
        return KVARN_GGML_OK;
    }
    const bool same = l.scale == p.scale && l.soft_cap == p.soft_cap && l.window == p.window &&
                      l.alibi == (p.alibi_slopes != nullptr) &&
                      (!l.alibi || std::equal(l.slopes.data(), l.slopes.data() + c.query_heads, p.alibi_slopes));
    return same ? KVARN_GGML_OK
                : refuse(c, KVARN_GGML_BAD_ARGUMENT, "layer %zu was built with another scale, soft cap, window or slopes before",
                         l.number);
}

// --- state -------------------------------------------------------------------------------------------------------------

// Before a saved sequence: what it is and the bases of all heads, which "_auto" has chosen from the data, and a checksum (FNV-1a).
constexpr std::size_t head_bytes = 16, sum_bytes = 8;
constexpr unsigned char magic[5] = {'K', 'V', 'G', 'G', 1};  // the last one is the version
constexpr unsigned char has_tokens = 1, is_chosen = 2;

[[nodiscard]] std::uint64_t checksum(const unsigned char* data, std::size_t bytes) noexcept
{
    std::uint64_t x = 14695981039346656037u;
    for (std::size_t i = 0; i < bytes; ++i) x = (x ^ data[i]) * 1099511628211u;
    return x;
}

void put(unsigned char* to, std::uint64_t x, std::size_t bytes) noexcept
{
    for (std::size_t i = 0; i < bytes; ++i) to[i] = static_cast<unsigned char>(x >> 8 * i);
}
[[nodiscard]] std::uint64_t get(const unsigned char* from, std::size_t bytes) noexcept
{
    std::uint64_t x = 0;
    for (std::size_t i = 0; i < bytes; ++i) x |= std::uint64_t{from[i]} << 8 * i;
    return x;
}

[[nodiscard]] unsigned char bases_of(const kvarn::format& f) noexcept
{
    return static_cast<unsigned char>((f.keys_rotated() ? 1 : 0) | (f.values_rotated() ? 2 : 0));
}

[[nodiscard]] status set_bases(kvarn_ggml_cache& c, const unsigned char* bases) noexcept
{
    const std::size_t heads = c.pool.heads();
    for (std::size_t i = 0; i < c.pool.layers() * heads; ++i) {
        kvarn::format_spec spec = c.pool.format_of(i / heads, i % heads).spec();
        spec.key_rotation = (bases[i] & 1) != 0 ? kvarn::rotation::hadamard : kvarn::rotation::none;
        spec.value_rotation = (bases[i] & 2) != 0 ? kvarn::rotation::hadamard : kvarn::rotation::none;
        const auto f = kvarn::make_format(spec);
        if (!f) return f.error;
        if (const status said = c.pool.set_format(i / heads, i % heads, *f); said != status::ok) return said;
    }
    return status::ok;
}

/// A sequence of the engine, its step settled.
[[nodiscard]] open_sequence* find(kvarn_ggml_cache& c, int sequence) noexcept
{
    settle(c);
    return sequence >= 0 && static_cast<std::size_t>(sequence) < c.sequences.size()
               ? &c.sequences[static_cast<std::size_t>(sequence)]
               : nullptr;
}

[[nodiscard]] kvarn_ggml_status no_sequence(kvarn_ggml_cache& c, int sequence) noexcept
{
    return refuse(c, KVARN_GGML_BAD_ARGUMENT, "sequence %d: the cache has %zu", sequence, c.sequences.size());
}

struct token_range {
    std::int64_t begin, end;
};

/// Where the tokens of an open sequence begin and end.
[[nodiscard]] token_range positions_of(const kvarn_ggml_cache& c, const open_sequence& s) noexcept
{
    const kvarn::detail::sequence_state& q = *c.pool.find(s.id);
    const kvarn::detail::cache_span* const spans = c.pool.state().spans_of(s.id.slot);
    return q.spans == 0 ? token_range{0, 0} : token_range{spans[0].position, spans[q.spans - 1].end()};
}

/// Tokens at [begin, end) go; a sequence that is left without any is closed.
[[nodiscard]] status remove(kvarn_ggml_cache& c, open_sequence& s, std::int64_t begin, std::int64_t end) noexcept
{
    if (!s.open) return status::ok;
    const token_range all = positions_of(c, s);
    begin = std::max(begin, all.begin);
    if (end < 0 || end > all.end) end = all.end;
    if (begin >= end) return status::ok;
    status said = status::ok;
    if (begin > all.begin || end < all.end)
        said = end == all.end ? c.pool.truncate(s.id, begin) : c.pool.erase(s.id, begin, end);
    else
        close(c, s);
    if (said == status::ok && s.open && c.pool.tokens(s.id) == 0) close(c, s);
    return said;
}

}  // namespace

// --- the interface -----------------------------------------------------------------------------------------------------

kvarn_ggml_params kvarn_ggml_default_params(void)
{
    kvarn_ggml_params p{};
    p.format = "k4v2_g128";
    p.sequences = 1;
    p.most_step = 512;
    p.sink_tokens = 128;
    p.threads = 16;
    return p;
}

kvarn_ggml_cache* kvarn_ggml_create(const kvarn_ggml_params* params, char* why, size_t why_bytes)
{
    if (params == nullptr) {
        tell(why, why_bytes, "params is NULL");
        return nullptr;
    }
    if (!in_range(*params, why, why_bytes)) return nullptr;
    std::unique_ptr<kvarn_ggml_cache> c(new (std::nothrow) kvarn_ggml_cache);
    if (c != nullptr && !configure(*c, *params, why, why_bytes)) return nullptr;
    if (c == nullptr || !allocate(*c)) {
        tell(why, why_bytes, "%s", kvarn::message(status::out_of_memory));
        return nullptr;
    }
    return c.release();
}

void kvarn_ggml_free(kvarn_ggml_cache* cache)
{
    delete cache;
}

const char* kvarn_ggml_message(const kvarn_ggml_cache* cache)
{
    return cache->message;
}

ggml_tensor* kvarn_ggml_attention(kvarn_ggml_cache* cache, ggml_context* ctx, int number, ggml_tensor* q, ggml_tensor* k,
                                  ggml_tensor* v, ggml_tensor* sinks, const kvarn_ggml_attention_params* params)
{
    kvarn_ggml_cache& c = *cache;
    const kvarn::format f = c.config.policy.base();
    const std::int64_t dk = f.head_dim_k(), dv = f.head_dim_v();
    const auto query_heads = static_cast<std::int64_t>(c.query_heads), heads = static_cast<std::int64_t>(c.pool.heads());
    const auto refused = [](kvarn_ggml_status) -> ggml_tensor* { return nullptr; };
    if (number < 0 || static_cast<std::size_t>(number) >= c.layers.size())
        return refused(refuse(c, KVARN_GGML_BAD_ARGUMENT, "layer %d: the cache has %zu", number, c.layers.size()));
    if (ctx == nullptr || q == nullptr || params == nullptr || (k == nullptr) != (v == nullptr))
        return refused(refuse(c, KVARN_GGML_BAD_ARGUMENT, "layer %d: an argument is NULL", number));
    if (!has_shape(q, dk, query_heads, q->ne[2], true)) return refused(wrong_shape(c, number, "q", q, dk, query_heads));
    if (k != nullptr && !has_shape(k, dk, heads, q->ne[2], false)) return refused(wrong_shape(c, number, "k", k, dk, heads));
    if (v != nullptr && !has_shape(v, dv, heads, q->ne[2], false)) return refused(wrong_shape(c, number, "v", v, dv, heads));
    if (sinks != nullptr && (sinks->type != GGML_TYPE_F32 || sinks->ne[0] != query_heads || sinks->nb[0] != sizeof(float)))
        return refused(refuse(c, KVARN_GGML_BAD_ARGUMENT, "layer %d: sinks are not [%" PRId64 "] of F32", number, query_heads));
    layer& l = c.layers[static_cast<std::size_t>(number)];
    if (take_constants(c, l, *params) != KVARN_GGML_OK) return nullptr;

    if (number == 0 && k != nullptr) k = ggml_custom_inplace(ctx, k, nullptr, 0, seal_operation, GGML_N_TASKS_MAX, &l);
    ggml_tensor* stored[] = {q, k, v, sinks};
    ggml_tensor* shared[] = {q, sinks};
    const int extra = sinks != nullptr ? 1 : 0;
    ggml_tensor* out = k != nullptr ? ggml_custom_4d(ctx, GGML_TYPE_F32, dv * query_heads, q->ne[2], 1, 1, stored, 3 + extra,
                                                     store_operation, GGML_N_TASKS_MAX, &l)
                                    : ggml_custom_4d(ctx, GGML_TYPE_F32, dv * query_heads, q->ne[2], 1, 1, shared, 1 + extra,
                                                     plan_operation, GGML_N_TASKS_MAX, &l);
    ggml_tensor* read[] = {q, sinks};
    out = ggml_custom_inplace(ctx, out, read, 1 + extra, attend_operation, GGML_N_TASKS_MAX, &l);
    return ggml_custom_inplace(ctx, out, read + 1, extra, finish_operation, GGML_N_TASKS_MAX, &l);
}

kvarn_ggml_status kvarn_ggml_begin(kvarn_ggml_cache* cache, const kvarn_ggml_part* parts, int count, bool causal)
{
    kvarn_ggml_cache& c = *cache;
    settle(c);
    if (count < 1 || parts == nullptr || static_cast<std::size_t>(count) > c.sequences.size())
        return refuse(c, KVARN_GGML_BAD_ARGUMENT, "a step of %d parts: the cache has %zu sequences", count, c.sequences.size());
    seal_rest(c);
    kvarn_ggml_status said = take_parts(c, parts, static_cast<std::size_t>(count));
    if (said == KVARN_GGML_OK && c.choose && !c.chosen) said = refuse(c, choose(c), "the bases of heads");
    if (said != KVARN_GGML_OK) {
        drop_step(c);
        return said;
    }
    for (std::size_t i = 0; i < c.part_count; ++i)
        static_cast<void>(kvarn::begin_seal(c.pool, c.parts[i].id));  // no room: exact for now
    std::size_t failed = 0;
    status room = reserve(c, failed);
    if (room == status::no_room) {  // tiles in the queue hold blocks
        seal_rest(c);
        room = reserve(c, failed);
    }
    if (room == status::no_room) {  // and those of other sequences, which would else wait for their next step
        for (const open_sequence& s : c.sequences.span())
            if (s.open) static_cast<void>(kvarn::dispatched::seal(c.pool, s.id, scratch_of(c, 0)));
        room = reserve(c, failed);
    }
    if (room == status::ok && !grow_plan(c)) room = status::out_of_memory;
    if (room != status::ok) {
        said = refuse(c, code_of(room), "sequence %d: %s", c.parts[failed].sequence, kvarn::message(room));
        drop_step(c);
        return said;
    }
    c.seal_count = kvarn::seal_items(c.pool);
    c.next_seal.store(0, std::memory_order_relaxed);
    c.seals_done.store(0, std::memory_order_relaxed);
    c.failed.store(0, std::memory_order_relaxed);
    c.causal = causal;
    c.pending = true;
    return KVARN_GGML_OK;
}

kvarn_ggml_status kvarn_ggml_end(kvarn_ggml_cache* cache)
{
    settle(*cache);
    const kvarn_ggml_status said = cache->untold;
    cache->untold = KVARN_GGML_OK;
    return said;
}

void kvarn_ggml_clear(kvarn_ggml_cache* cache)
{
    settle(*cache);
    for (open_sequence& s : cache->sequences.span()) close(*cache, s);
}

kvarn_ggml_status kvarn_ggml_remove(kvarn_ggml_cache* cache, int sequence, int64_t begin, int64_t end)
{
    kvarn_ggml_cache& c = *cache;
    if (sequence < 0) {
        for (int i = 0; i < static_cast<int>(c.sequences.size()); ++i)
            if (const kvarn_ggml_status said = kvarn_ggml_remove(cache, i, begin, end); said != KVARN_GGML_OK) return said;
        return KVARN_GGML_OK;
    }
    open_sequence* const s = find(c, sequence);
    return s == nullptr ? no_sequence(c, sequence) : refuse(c, remove(c, *s, begin, end), "kvarn_ggml_remove");
}

kvarn_ggml_status kvarn_ggml_copy(kvarn_ggml_cache* cache, int from, int to, int64_t begin, int64_t end)
{
    kvarn_ggml_cache& c = *cache;
    const open_sequence* const source = find(c, from);
    open_sequence* const target = find(c, to);
    if (source == nullptr || target == nullptr) return no_sequence(c, source == nullptr ? from : to);
    if (source == target || !source->open) return KVARN_GGML_OK;
    if (target->open)
        return refuse(c, KVARN_GGML_BAD_ARGUMENT, "sequence %d has tokens: remove them before it becomes a copy of %d", to, from);
    const auto made = c.pool.fork(source->id);
    if (!made) return refuse(c, made.error, "kvarn_ggml_copy");
    *target = {*made, true};
    status said = end >= 0 ? remove(c, *target, std::max(end, std::int64_t{0}), -1) : status::ok;
    if (said == status::ok && begin > 0) said = remove(c, *target, 0, begin);
    if (said != status::ok) close(c, *target);
    return refuse(c, said, "kvarn_ggml_copy");
}

kvarn_ggml_status kvarn_ggml_keep(kvarn_ggml_cache* cache, int sequence)
{
    kvarn_ggml_cache& c = *cache;
    const open_sequence* const kept = find(c, sequence);
    if (kept == nullptr) return no_sequence(c, sequence);
    for (open_sequence& s : c.sequences.span())
        if (&s != kept) close(c, s);
    return KVARN_GGML_OK;
}

kvarn_ggml_status kvarn_ggml_shift(kvarn_ggml_cache* cache, int sequence, int64_t begin, int64_t end, int64_t by,
                                   kvarn_ggml_turn turn, void* user)
{
    kvarn_ggml_cache& c = *cache;
    const open_sequence* const s = find(c, sequence);
    if (s == nullptr) return no_sequence(c, sequence);
    if (turn == nullptr) return refuse(c, status::null_pointer, "kvarn_ggml_shift");
    if (!s->open || by == 0) return KVARN_GGML_OK;
    const token_range all = positions_of(c, *s);
    begin = std::max(begin, all.begin);
    if (end < 0 || end > all.end) end = all.end;
    if (begin >= end) return KVARN_GGML_OK;
    seal_rest(c);
    heap_array<std::byte> scratch;
    if (!scratch.grow(kvarn::shift_scratch_bytes(c.pool.format_of(0, 0))))
        return refuse(c, status::out_of_memory, "kvarn_ggml_shift");
    const auto turn_keys = [&](std::size_t number, std::size_t head, const kvarn::kv_view<float>& keys, std::int64_t position) {
        turn(user, static_cast<int>(number), static_cast<int>(head), keys.data, static_cast<std::int64_t>(keys.tokens),
             static_cast<int>(keys.channels), position, by);
    };
    return refuse(c, kvarn::shift_positions(c.pool, s->id, begin, end, by, turn_keys, scratch.span()).error, "kvarn_ggml_shift");
}

void kvarn_ggml_turn_rope(void* rope, int, int, float* keys, int64_t tokens, int channels, int64_t, int64_t by)
{
    const auto& r = *static_cast<const kvarn_ggml_rope*>(rope);
    const int half = std::min(r.dims, channels) / 2;
    for (int i = 0; i < half; ++i) {
        const double factor = r.factors != nullptr ? static_cast<double>(r.factors[i]) : 1.0;
        const double angle = static_cast<double>(by) * static_cast<double>(r.freq_scale) *
                             std::pow(static_cast<double>(r.freq_base), -2.0 * i / r.dims) / factor;
        const auto cosine = static_cast<float>(std::cos(angle)), sine = static_cast<float>(std::sin(angle));
        const int first = r.neox ? i : 2 * i, second = r.neox ? i + half : 2 * i + 1;
        for (std::int64_t t = 0; t < tokens; ++t) {
            float* const key = keys + t * channels;
            const float a = key[first], b = key[second];
            key[first] = a * cosine - b * sine;
            key[second] = a * sine + b * cosine;
        }
    }
}

int64_t kvarn_ggml_tokens(kvarn_ggml_cache* cache, int sequence)
{
    const open_sequence* const s = find(*cache, sequence);
    return s != nullptr && s->open ? static_cast<std::int64_t>(cache->pool.tokens(s->id)) : 0;
}

int64_t kvarn_ggml_first_position(kvarn_ggml_cache* cache, int sequence)
{
    const open_sequence* const s = find(*cache, sequence);
    return s != nullptr && s->open ? positions_of(*cache, *s).begin : -1;
}

int64_t kvarn_ggml_last_position(kvarn_ggml_cache* cache, int sequence)
{
    const open_sequence* const s = find(*cache, sequence);
    return s != nullptr && s->open ? positions_of(*cache, *s).end - 1 : -1;
}

kvarn_ggml_status kvarn_ggml_save(kvarn_ggml_cache* cache, int sequence, kvarn_ggml_write write, void* user)
{
    kvarn_ggml_cache& c = *cache;
    const open_sequence* const s = find(c, sequence);
    if (s == nullptr) return no_sequence(c, sequence);
    if (write == nullptr) return refuse(c, status::null_pointer, "kvarn_ggml_save");
    const std::size_t heads = c.pool.heads(), all = c.pool.layers() * heads;
    heap_array<unsigned char> head;
    if (!head.grow(head_bytes + all + sum_bytes)) return refuse(c, status::out_of_memory, "kvarn_ggml_save");
    put(head.data(), 0, 8);
    std::copy_n(magic, sizeof magic, head.data());
    head[sizeof magic] = static_cast<unsigned char>((s->open ? has_tokens : 0) | (c.chosen ? is_chosen : 0));
    put(head.data() + 8, c.pool.layers(), 4);
    put(head.data() + 12, heads, 4);
    for (std::size_t i = 0; i < all; ++i) head[head_bytes + i] = bases_of(c.pool.format_of(i / heads, i % heads));
    put(head.data() + head_bytes + all, checksum(head.data(), head_bytes + all), sum_bytes);
    status said = write(user, head.data(), head_bytes + all + sum_bytes) ? status::ok : status::io_error;
    if (said == status::ok && s->open)
        said =
            kvarn::save(c.pool, s->id, [&](std::span<const std::byte> piece) { return write(user, piece.data(), piece.size()); });
    return refuse(c, said, "kvarn_ggml_save");
}

kvarn_ggml_status kvarn_ggml_load(kvarn_ggml_cache* cache, int sequence, kvarn_ggml_read read, void* user)
{
    kvarn_ggml_cache& c = *cache;
    open_sequence* const s = find(c, sequence);
    if (s == nullptr) return no_sequence(c, sequence);
    if (read == nullptr) return refuse(c, status::null_pointer, "kvarn_ggml_load");
    const std::size_t heads = c.pool.heads(), all = c.pool.layers() * heads;
    heap_array<unsigned char> head, before;
    if (!head.grow(head_bytes + all + sum_bytes) || !before.grow(all)) return refuse(c, status::out_of_memory, "kvarn_ggml_load");
    if (!read(user, head.data(), head_bytes)) return refuse(c, status::io_error, "kvarn_ggml_load");
    if (!std::equal(magic, magic + sizeof magic, head.data())) return refuse(c, status::corrupt, "kvarn_ggml_load");
    if (get(head.data() + 8, 4) != c.pool.layers() || get(head.data() + 12, 4) != heads)
        return refuse(c, KVARN_GGML_OTHER_CONFIGURATION, "saved by a cache of %" PRIu64 " layers and %" PRIu64 " KV heads",
                      get(head.data() + 8, 4), get(head.data() + 12, 4));
    if (!read(user, head.data() + head_bytes, all + sum_bytes)) return refuse(c, status::io_error, "kvarn_ggml_load");
    if (get(head.data() + head_bytes + all, sum_bytes) != checksum(head.data(), head_bytes + all))
        return refuse(c, status::corrupt, "kvarn_ggml_load");
    const unsigned char flags = head[sizeof magic];
    if ((flags & has_tokens) == 0) {
        close(c, *s);
        return KVARN_GGML_OK;
    }
    // A cache that has not chosen takes the choice of the file, unless loading fails.
    seal_rest(c);
    for (std::size_t i = 0; i < all; ++i) before[i] = bases_of(c.pool.format_of(i / heads, i % heads));
    const bool adopt = (flags & is_chosen) != 0 && c.choose && !c.chosen;
    if (adopt)
        if (const status said = set_bases(c, head.data() + head_bytes); said != status::ok) {
            static_cast<void>(set_bases(c, before.data()));
            return refuse(c, said, "kvarn_ggml_load");
        }
    const char* differs = nullptr;
    const auto all_of = [&](std::span<std::byte> to) -> kvarn::result<std::size_t> {
        if (!read(user, to.data(), to.size())) return status::io_error;
        return to.size();
    };
    const auto made = kvarn::load(c.pool, all_of, &differs, false);
    if (!made) {
        if (adopt) static_cast<void>(set_bases(c, before.data()));
        return refuse(c, code_of(made.error), "kvarn_ggml_load: %s%s%s", kvarn::message(made.error),
                      differs != nullptr ? ": " : "", differs != nullptr ? differs : "");
    }
    if (adopt) {
        c.chosen = true;
        c.moments.clear();
        for (std::size_t i = 0; i < all; ++i) c.changed_bases += before[i] != head[head_bytes + i] ? 1 : 0;
    } else if (c.pool.statistics().records.used != 0) {
        c.chosen = c.choose;  // there are records of the bases as they are
    }
    close(c, *s);
    *s = {*made, true};
    return KVARN_GGML_OK;
}

kvarn_ggml_statistics kvarn_ggml_get_statistics(kvarn_ggml_cache* cache)
{
    kvarn_ggml_cache& c = *cache;
    settle(c);
    const kvarn::pool_statistics from = c.pool.statistics();
    kvarn_ggml_statistics to{};
    to.bytes = c.memory.size() + c.scratch.size() + c.plan.size() + c.masks.size() * sizeof(std::uint64_t);
    to.bytes_used = from.bytes_used;
    to.record_blocks = static_cast<std::int64_t>(from.records.used + from.records.free);
    to.free_record_blocks = static_cast<std::int64_t>(from.records.free);
    to.exact_blocks = static_cast<std::int64_t>(from.exact.used + from.exact.free);
    to.free_exact_blocks = static_cast<std::int64_t>(from.exact.free);
    to.sealed_tiles = static_cast<std::int64_t>(from.tiles_sealed);
    to.kept_tiles = static_cast<std::int64_t>(from.tiles_kept_not_finite + from.tiles_kept_overflowed);
    to.changed_bases = c.choose && !c.chosen ? -1 : c.changed_bases;
    to.instruction_set = kvarn::active_arch_name<>();
    return to;
}
