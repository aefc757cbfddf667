// SPDX-License-Identifier: Apache-2.0
#pragma once
// Attention of a layer over the sequences of a cache. In: for each sequence new K and V, queries and where the output goes. Out:
// work items in three phases that any thread pool can run, with a barrier after each: store, attend, finish.
//
// A short step (up to rows_per_task query rows a KV head) splits over the history, a prompt over blocks of queries; the result
// is the same bits either way, for any number of threads. Works in the caller's memory; no allocation.

#include <kvarn/base/config.hpp>  // first: it refuses older standards

#include <cstddef>
#include <cstdint>
#include <span>

#include <kvarn/attention.hpp>
#include <kvarn/cache/history.hpp>
#include <kvarn/cache/pool.hpp>
#include <kvarn/cache/tokens.hpp>

namespace kvarn {

/// One sequence in one layer for one step.
struct sequence_step {
    sequence_id sequence{};
    input_view k{}, v{};  ///< its drafts from `first_draft` on, [tokens][KV heads][channels]; empty: stored already
    std::size_t first_draft = 0;
    input_view q{};                       ///< [m][query heads][key_channels]: the newest m positions, drafts included
    output_view out{};                    ///< [m][query heads][channels]
    float* log_sum_exp = nullptr;         ///< [KV heads][m][query heads of each]; may be null
    const float* sink_logits = nullptr;   ///< [query heads]; may be null
    const float* alibi_slopes = nullptr;  ///< [query heads], as attention_task has them; may be null
    const std::uint64_t* mask = nullptr;  ///< [m][mask_stride] words, as attention_task has them; may be null
    std::size_t mask_stride = 0;
    std::size_t mask_tokens = 0;  ///< newest positions that the mask speaks of
};

/// How a layer attends, and how its work is cut into items.
struct layer_options {
    attention_options attention{};
    std::size_t threads = 1;          ///< that will run the items: from four tasks a thread on, histories are not split
    std::size_t rows_per_task = 32;   ///< most query rows of a task (tokens x query heads of a KV head); one token at least
    std::size_t chunks_per_item = 4;  ///< of 1024 tokens, where a history is split
};

/// Bytes of memory for plan_layer, at any alignment, for these steps.
[[nodiscard]] std::size_t layer_memory_bytes(const cache_pool& pool, std::span<const sequence_step> steps,
                                             const layer_options& options) noexcept;

/// Bytes that are enough for any `steps` sequences of up to `rows` query rows a KV head (m x its query heads, `group_heads`).
[[nodiscard]] constexpr std::size_t layer_memory_bound(const cache_config& config, std::size_t steps, std::size_t rows,
                                                       std::size_t group_heads, const layer_options& options = {}) noexcept;

/// Bytes of scratch that each thread needs for every item of a layer, sealing and reading included, at any alignment.
/// `rows`: rows_per_task, or the query heads of a KV head where those are more.
[[nodiscard]] constexpr std::size_t cache_scratch_bytes(const cache_config& config,
                                                        std::size_t rows = layer_options{}.rows_per_task) noexcept;

namespace detail {

/// A block of query rows of one KV head.
struct layer_task {
    attention_task task{};
    const format* f = nullptr;
    std::size_t first_item = 0, items = 0;  // of the attend phase; one item does the whole task
    std::size_t workspace = 0;              // bytes before its part
    sequence_id sequence{};
    std::uint32_t place = 0;  // layer and head
    std::uint32_t step = 0;

    KVARN_INLINE layer_task() noexcept {}
};

}  // namespace detail

/// The items of one layer. A value over the memory given to plan_layer.
class layer_items {
public:
    KVARN_INLINE layer_items() noexcept {}

    [[nodiscard]] KVARN_INLINE std::size_t store_items() const noexcept { return steps_.size() * pool_.heads(); }
    [[nodiscard]] KVARN_INLINE std::size_t attend_items() const noexcept { return items_; }
    [[nodiscard]] KVARN_INLINE std::size_t finish_items() const noexcept { return split_; }

    /// Which of the steps an item belongs to: where it fails, the others go on. `item` is one of the phase's.
    [[nodiscard]] KVARN_INLINE std::size_t step_of_store(std::size_t item) const noexcept { return item / pool_.heads(); }
    [[nodiscard]] KVARN_INLINE std::size_t step_of_attend(std::size_t item) const noexcept { return tasks_[task_of(item)].step; }
    [[nodiscard]] KVARN_INLINE std::size_t step_of_finish(std::size_t item) const noexcept { return tasks_[item].step; }

    /// Item `item` of a phase; all of a phase may run at the same time, each phase after the one before. `scratch`:
    /// cache_scratch_bytes. Errors: those of store(), attend(), attend_item() and combine_items(); bad_argument (no such item,
    /// drafts that are not stored).
    template <class Arch = simd::native_arch>
    [[nodiscard]] status store_item(std::size_t item) const noexcept;
    template <class Arch = simd::native_arch>
    [[nodiscard]] status attend_item(std::size_t item, std::span<std::byte> scratch) const noexcept;
    template <class Arch = simd::native_arch>
    [[nodiscard]] status finish_item(std::size_t item, std::span<std::byte> scratch) const noexcept;

    /// All phases in this thread.
    template <class Arch = simd::native_arch>
    [[nodiscard]] status run(std::span<std::byte> scratch) const noexcept;

    friend result<layer_items> plan_layer(const cache_pool&, std::size_t, std::span<const sequence_step>, const layer_options&,
                                          std::span<std::byte>, std::size_t*) noexcept;

private:
    /// The last task that begins at or before an item of the attend phase.
    [[nodiscard]] KVARN_INLINE std::size_t task_of(std::size_t item) const noexcept
    {
        std::size_t low = 0, high = tasks_.size() - 1;
        while (low < high) {
            const std::size_t middle = low + (high - low + 1) / 2;
            if (tasks_[middle].first_item <= item)
                low = middle;
            else
                high = middle - 1;
        }
        return low;
    }

    cache_pool pool_{};
    std::size_t layer_ = 0, items_ = 0, split_ = 0;  // the first split_ tasks have more than one item
    attention_options attention_{};
    std::size_t chunks_per_item_ = 4;
    std::span<const sequence_step> steps_{};
    std::span<detail::layer_task> tasks_{};
    std::span<std::byte> workspace_{};
};

/// Plans one layer of a step. `steps` and `memory` must live until its items are done, and the sequences stay as they are
/// (reserve before). A sequence comes once. A step may have no queries (q of zero tokens): its K and V are stored. Errors, and
/// `failed`, if given, is set to the step that has it: stale_handle, shape_mismatch (of k, v, q, out with the formats and each
/// other; query heads that are no multiple of KV heads; more queries than tokens), null_pointer, bad_argument (no such layer;
/// options; more query heads than 1024 times the KV heads), buffer_too_small. Values are looked at by the items.
[[nodiscard]] result<layer_items> plan_layer(const cache_pool& pool, std::size_t layer, std::span<const sequence_step> steps,
                                             const layer_options& options, std::span<std::byte> memory,
                                             std::size_t* failed = nullptr) noexcept;

// --- implementation ----------------------------------------------------------------------------------------------------

namespace detail {

/// The heads of a group of queries or outputs, and a range of its tokens.
template <bool Const>
[[nodiscard]] KVARN_INLINE any_view<Const> query_block(any_view<Const> x, std::size_t head, std::size_t heads, std::size_t first,
                                                       std::size_t count) noexcept
{
    x = token_range(x.head(head), first, count);
    x.heads = heads;
    return x;
}

[[nodiscard]] KVARN_INLINE constexpr std::size_t tokens_per_task(std::size_t rows_per_task, std::size_t group_heads) noexcept
{
    const std::size_t rows = rows_per_task < max_query_rows ? rows_per_task : max_query_rows;
    return rows > group_heads ? rows / group_heads : 1;
}

}  // namespace detail

KVARN_INLINE constexpr std::size_t cache_scratch_bytes(const cache_config& config, std::size_t rows) noexcept
{
    const format f = config.policy.base();  // neither bits nor bases change what is needed
    const std::size_t attention = attention_scratch_bytes(f, rows < max_query_rows ? rows : max_query_rows),
                      reading = read_scratch_bytes(f);
    return attention > reading ? attention : reading;
}

KVARN_INLINE constexpr std::size_t layer_memory_bound(const cache_config& config, std::size_t steps, std::size_t rows,
                                                      std::size_t group_heads, const layer_options& options) noexcept
{
    const cache_config c = completed(config);
    const auto heads = static_cast<std::size_t>(c.policy.heads());
    const std::size_t each = detail::tokens_per_task(options.rows_per_task, group_heads), most = each * group_heads;
    const std::size_t blocks = detail::divide_up(detail::divide_up(rows, group_heads), each);
    const std::size_t workspace = attention_workspace_bound(c.policy.base(), 1, most, c.most_tokens, c.most_spans) + 64;
    detail::memory_cutter cut(nullptr);
    cut.bytes(steps * heads * blocks * sizeof(detail::layer_task));
    cut.bytes(steps * heads * c.most_spans * sizeof(kv_segment));
    cut.bytes(steps * heads * workspace);
    return cut.used() + 63;
}

namespace detail {

/// What a layer's items take.
struct layer_sizes {
    std::size_t tasks = 0, segments = 0, workspace = 0;
    bool may_split = false;  ///< histories, over threads

    [[nodiscard]] KVARN_INLINE std::size_t bytes() const noexcept
    {
        memory_cutter cut(nullptr);
        cut.bytes(tasks * sizeof(layer_task));
        cut.bytes(segments * sizeof(kv_segment));
        cut.bytes(workspace);
        return cut.used() + 63;
    }
};

/// Steps that plan_layer would refuse take nothing.
[[nodiscard]] KVARN_INLINE layer_sizes sizes_of(const cache_pool& pool, std::span<const sequence_step> steps,
                                                const layer_options& options) noexcept
{
    const pool_state& s = pool.state();
    layer_sizes sizes;
    for (const bool workspace : {false, true}) {
        for (const sequence_step& step : steps) {
            const sequence_state* const q = pool.find(step.sequence);
            if (q == nullptr || step.q.heads < s.heads || step.q.tokens == 0) continue;
            const std::size_t group_heads = step.q.heads / s.heads;
            const std::size_t blocks = divide_up(step.q.tokens, tokens_per_task(options.rows_per_task, group_heads));
            const std::size_t segments = count_segments(s, step.sequence.slot);
            if (!workspace) {
                sizes.tasks += s.heads * blocks;
                sizes.segments += s.heads * segments;
            } else if (blocks == 1) {
                const std::size_t rows = step.q.tokens * group_heads;
                sizes.workspace +=
                    s.heads * (attention_workspace_bound(s.places[0].f, 1, rows, q->committed + q->drafts, segments) + 64);
            }
        }
        sizes.may_split = sizes.tasks < 4 * options.threads;
        if (!sizes.may_split) break;
    }
    return sizes;
}

/// Everything about a step but its values.
[[nodiscard]] KVARN_INLINE status check_step(const cache_pool& pool, const sequence_step& step) noexcept
{
    const pool_state& s = pool.state();
    const sequence_state* const q = pool.find(step.sequence);
    if (q == nullptr) return status::stale_handle;
    const format& f = s.places[0].f;
    const auto keys = static_cast<std::size_t>(f.key_channels()), values = static_cast<std::size_t>(f.head_dim_v());
    if (step.k.data == nullptr && step.v.data != nullptr) return status::shape_mismatch;
    if (step.k.data != nullptr && !has_shape(step.k, step.k.tokens, s.heads, keys)) return status::shape_mismatch;
    if (step.k.data != nullptr && (f.has_values() ? !has_shape(step.v, step.k.tokens, s.heads, values) : step.v.data != nullptr))
        return status::shape_mismatch;
    if (step.k.data != nullptr && f.has_values() && step.v.data == nullptr) return status::null_pointer;
    if (step.q.tokens == 0) return status::ok;
    if (step.q.heads == 0 || step.q.heads % s.heads != 0 || step.q.channels != keys) return status::shape_mismatch;
    if (step.q.tokens > q->committed + q->drafts) return status::shape_mismatch;
    const auto out = static_cast<std::size_t>(output_channels(f));
    if (step.out.tokens != step.q.tokens || step.out.heads != step.q.heads || step.out.channels != out)
        return status::shape_mismatch;
    if (step.q.data == nullptr || step.out.data == nullptr) return status::null_pointer;
    return step.q.heads / s.heads > max_query_rows ? status::bad_argument : status::ok;
}

}  // namespace detail

KVARN_INLINE std::size_t layer_memory_bytes(const cache_pool& pool, std::span<const sequence_step> steps,
                                            const layer_options& options) noexcept
{
    return detail::sizes_of(pool, steps, options).bytes();
}

KVARN_INLINE result<layer_items> plan_layer(const cache_pool& pool, std::size_t layer, std::span<const sequence_step> steps,
                                            const layer_options& options, std::span<std::byte> memory,
                                            std::size_t* failed) noexcept
{
    const detail::pool_state& s = pool.state();
    if (layer >= s.layers || options.chunks_per_item == 0) return status::bad_argument;
    for (std::size_t i = 0; i < steps.size(); ++i)
        if (const status said = detail::check_step(pool, steps[i]); said != status::ok) {
            if (failed != nullptr) *failed = i;
            return said;
        }
    const detail::layer_sizes sizes = detail::sizes_of(pool, steps, options);
    const std::size_t task_count = sizes.tasks, segment_count = sizes.segments;
    if (memory.size() < sizes.bytes()) return status::buffer_too_small;
    if (memory.data() == nullptr) return status::null_pointer;
    detail::memory_cutter cut(detail::aligned_to_line(memory.data()));
    detail::layer_task* const tasks = cut.array<detail::layer_task>(task_count);
    kv_segment* segments = cut.array<kv_segment>(segment_count);
    std::byte* const workspace = detail::aligned_to_line(memory.data()) + cut.used();

    layer_items items;
    items.pool_ = pool;
    items.layer_ = layer;
    items.attention_ = options.attention;
    items.chunks_per_item_ = options.chunks_per_item;
    items.steps_ = steps;
    items.tasks_ = {tasks, task_count};
    items.workspace_ = memory.last(static_cast<std::size_t>(memory.data() + memory.size() - workspace));
    std::size_t workspace_bytes = 0, whole = task_count;  // split tasks from the front, whole ones from the back
    for (const sequence_step& step : steps) {
        const std::size_t m = step.q.tokens;
        if (m == 0) continue;
        const detail::sequence_state& q = *pool.find(step.sequence);
        const std::size_t group_heads = step.q.heads / s.heads,
                          each = detail::tokens_per_task(options.rows_per_task, group_heads);
        const std::size_t most_segments = detail::count_segments(s, step.sequence.slot);
        for (std::size_t head = 0; head < s.heads; ++head) {
            const auto history = history_of(pool, step.sequence, layer, head, {segments, most_segments});
            const std::span<const kv_segment> mine{segments, *history};
            segments += *history;
            for (std::size_t first = 0; first < m; first += each) {
                const std::size_t count = m - first < each ? m - first : each;
                detail::layer_task t;
                t.f = &s.place(layer, head).f;
                t.sequence = step.sequence;
                t.step = static_cast<std::uint32_t>(&step - steps.data());
                t.place = static_cast<std::uint32_t>(layer * s.heads + head);
                t.task.history = mine;
                t.task.q = detail::query_block(step.q, head * group_heads, group_heads, first, count);
                t.task.out = detail::query_block(step.out, head * group_heads, group_heads, first, count);
                t.task.first_position = q.next_position - static_cast<std::int64_t>(m - first);
                if (step.log_sum_exp != nullptr) t.task.log_sum_exp = step.log_sum_exp + (head * m + first) * group_heads;
                if (step.sink_logits != nullptr) t.task.sink_logits = step.sink_logits + head * group_heads;
                if (step.alibi_slopes != nullptr) t.task.alibi_slopes = step.alibi_slopes + head * group_heads;
                if (step.mask != nullptr) t.task.mask = step.mask + first * step.mask_stride;
                t.task.mask_stride = step.mask_stride;
                t.task.mask_tokens = step.mask_tokens;
                const std::span<const attention_task> alone{&t.task, 1};
                t.items = sizes.may_split && m <= each ? kvarn::attention_items(alone, options.chunks_per_item) : 1;
                if (t.items > 1) {
                    t.workspace = workspace_bytes;
                    workspace_bytes += detail::divide_up(attention_workspace_bytes(*t.f, alone), 64) * 64;
                } else {
                    t.items = 1;
                }
                detail::construct(tasks + (t.items > 1 ? items.split_++ : --whole), 1);
                tasks[t.items > 1 ? items.split_ - 1 : whole] = t;
            }
        }
    }
    for (detail::layer_task& t : items.tasks_) {
        t.first_item = items.items_;
        items.items_ += t.items;
    }
    if (workspace_bytes > items.workspace_.size()) return status::buffer_too_small;
    return items;
}

template <class Arch>
status layer_items::store_item(std::size_t item) const noexcept
{
    if (item >= store_items()) return status::bad_argument;
    const sequence_step& step = steps_[item / pool_.heads()];
    const std::size_t head = item % pool_.heads();
    if (step.k.data == nullptr) return status::ok;
    if (step.k.heads != pool_.heads() || (step.v.data != nullptr && step.v.heads != pool_.heads())) return status::shape_mismatch;
    const input_view v = step.v.data != nullptr ? step.v.head(head) : step.v;
    return store<Arch>(pool_, step.sequence, layer_, step.k.head(head), v, step.first_draft, head);
}

template <class Arch>
status layer_items::attend_item(std::size_t item, std::span<std::byte> scratch) const noexcept
{
    if (item >= items_) return status::bad_argument;
    const detail::layer_task& t = tasks_[task_of(item)];
    const detail::sequence_state* const q = pool_.find(t.sequence);
    if (q == nullptr) return status::stale_handle;
    const detail::pool_state& s = pool_.state();
    if (s.stored_of(t.sequence.slot)[t.place] < q->drafts) return status::bad_argument;
    if (t.items == 1) return attend<Arch>(*t.f, t.task, attention_, scratch);
    return kvarn::attend_item<Arch>(*t.f, {&t.task, 1}, attention_, item - t.first_item, chunks_per_item_,
                                    workspace_.subspan(t.workspace), scratch);
}

template <class Arch>
status layer_items::finish_item(std::size_t item, std::span<std::byte> scratch) const noexcept
{
    if (item >= split_) return status::bad_argument;
    const detail::layer_task& t = tasks_[item];
    return combine_items<Arch>(*t.f, {&t.task, 1}, attention_, 0, workspace_.subspan(t.workspace), scratch);
}

template <class Arch>
status layer_items::run(std::span<std::byte> scratch) const noexcept
{
    for (std::size_t i = 0; i < store_items(); ++i)
        if (const status said = store_item<Arch>(i); said != status::ok) return said;
    for (std::size_t i = 0; i < attend_items(); ++i)
        if (const status said = attend_item<Arch>(i, scratch); said != status::ok) return said;
    for (std::size_t i = 0; i < finish_items(); ++i)
        if (const status said = finish_item<Arch>(i, scratch); said != status::ok) return said;
    return status::ok;
}

}  // namespace kvarn
