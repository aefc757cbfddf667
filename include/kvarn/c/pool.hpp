// SPDX-License-Identifier: Apache-2.0
#pragma once
// The C interface, third part: configurations, pools, sequences and sealing. Compiled once, by c/implementation.hpp.
// In and out: as kvarn.h says. No allocation.

#include <kvarn/base/config.hpp>  // first: it refuses older standards

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>

#include <kvarn/c/attention.hpp>
#include <kvarn/c/codec.hpp>
#include <kvarn/c/structs.hpp>
#include <kvarn/cache/bases.hpp>
#include <kvarn/cache/pool.hpp>
#include <kvarn/cache/seal.hpp>
#include <kvarn/cache/tokens.hpp>

/// A pool in the caller's memory; what the library makes of the rest of it follows.
struct kvarn_pool {
    static constexpr kvarn::c::handle_kind its_kind = kvarn::c::handle_kind::pool;
    kvarn::c::handle_kind kind = its_kind;
    kvarn::cache_pool pool{};
};

namespace kvarn::c {

/// Bytes of a handle, and of memory before the first line.
inline constexpr std::size_t pool_overhead = (sizeof(kvarn_pool) + 63) / 64 * 64 + 63;

/// Layers x heads of one configuration at most: what is asked of each must end.
inline constexpr std::size_t most_heads = std::size_t{1} << 20;

[[nodiscard]] KVARN_INLINE status to_rule(const kvarn_bit_rule& given, bit_rule& r) noexcept
{
    r.first_layer = given.first_layer;
    r.last_layer = given.last_layer;
    r.first_head = given.first_head;
    r.last_head = given.last_head;
    r.key_bits = given.key_bits;
    r.value_bits = given.value_bits;
    const auto turn = [](std::int32_t number, std::optional<rotation>& to) {
        rotation value{};
        if (number == bit_rule::unchanged) return status::ok;
        const status s = enumerator(number, rotation::hadamard, value);
        if (s == status::ok) to = value;
        return s;
    };
    if (const status s = turn(given.key_rotation, r.key_rotation); s != status::ok) return s;
    return turn(given.value_rotation, r.value_rotation);
}

/// A configuration, and the rules that its policy points to.
struct configuration {
    bit_rule rules[KVARN_MOST_RULES];
    cache_config config{};

    [[nodiscard]] KVARN_INLINE status read(const kvarn_cache_config* from, kvarn_cache_config& given) noexcept
    {
        format base;
        if (const status s = take(from, given); s != status::ok) return s;
        if (const status s = to_format(given.format, base); s != status::ok) return s;
        if (given.reserved != 0 || given.layers < 1 || given.heads < 1 || given.rule_count > KVARN_MOST_RULES)
            return status::bad_argument;
        if (static_cast<std::size_t>(given.layers) > most_heads / static_cast<std::size_t>(given.heads))
            return status::bad_argument;
        const array_of<kvarn_bit_rule> all{given.rules, given.rule_count};
        if (const status s = all.sound(); s != status::ok) return s;
        for (std::size_t i = 0; i < all.count; ++i) {
            kvarn_bit_rule one;
            if (const status s = all.at(i, one); s != status::ok) return s;
            if (const status s = to_rule(one, rules[i]); s != status::ok) return s;
        }
        const auto policy = make_policy(base, given.layers, given.heads, {rules, all.count});
        if (!policy) return policy.error;
        config.policy = *policy;
        if (const status s = enumerator(given.exact, exact_type::bf16, config.exact); s != status::ok) return s;
        if (const status s = to_basis(given.key_basis, config.key_basis); s != status::ok) return s;
        if (const status s = to_basis(given.value_basis, config.value_basis); s != status::ok) return s;
        config.sink_tokens = given.sink_tokens;
        config.recent_tokens = given.recent_tokens;
        config.sequences = given.sequences;
        config.most_tokens = given.most_tokens;
        config.most_step = given.most_step;
        config.record_blocks = given.record_blocks;
        config.exact_blocks = given.exact_blocks;
        config.most_spans = given.most_spans;
        return to_encode_options(given.encode, config.encode);
    }
};

/// The numbers of a configuration back into the caller's struct; its pointers stay.
KVARN_INLINE void put_numbers(const cache_config& c, kvarn_cache_config& to) noexcept
{
    to.layers = c.policy.layers();
    to.heads = c.policy.heads();
    to.exact = static_cast<std::int32_t>(c.exact);
    to.key_basis = static_cast<std::int32_t>(c.key_basis);
    to.value_basis = static_cast<std::int32_t>(c.value_basis);
    to.sink_tokens = c.sink_tokens;
    to.recent_tokens = c.recent_tokens;
    to.sequences = c.sequences;
    to.most_tokens = c.most_tokens;
    to.most_step = c.most_step;
    to.record_blocks = c.record_blocks;
    to.exact_blocks = c.exact_blocks;
    to.most_spans = c.most_spans;
}

[[nodiscard]] KVARN_INLINE sequence_id id_of(kvarn_sequence s) noexcept
{
    return {s.slot, s.generation};
}

/// Calls f(pool) with the library's pool; what it says, or why there is no pool.
template <class F>
[[nodiscard]] KVARN_INLINE kvarn_status with_pool(const kvarn_pool* handle, F&& f) noexcept
{
    if (const status s = check_handle(handle); s != status::ok) return code(s);
    cache_pool pool = handle->pool;
    return code(f(pool));
}

/// The same for a function that says a number; `none` without a pool.
template <class T, class F>
[[nodiscard]] KVARN_INLINE T number_of_pool(const kvarn_pool* handle, T none, F&& f) noexcept
{
    if (check_handle(handle) != status::ok) return none;
    return static_cast<T>(f(handle->pool));
}

/// A report may be left out.
template <class T>
[[nodiscard]] KVARN_INLINE status can_report(const T* to) noexcept
{
    return to == nullptr ? status::ok : can_give(to);
}

KVARN_INLINE void give_report(const seal_report& r, kvarn_seal_report* to) noexcept
{
    if (to == nullptr) return;
    give({sizeof(kvarn_seal_report),
          r.sealed,
          r.kept_exact,
          r.dropped,
          r.unfinished,
          {r.sequence.slot, r.sequence.generation},
          r.position,
          r.layer,
          r.head,
          static_cast<std::int32_t>(r.why),
          0},
         to);
}

}  // namespace kvarn::c

extern "C" {

// --- configuration and plan ----------------------------------------------------------------------------------------

kvarn_status kvarn_plan_cache(const kvarn_cache_config* config, kvarn_cache_plan* plan) noexcept
{
    using namespace kvarn::c;
    configuration c;
    kvarn_cache_config given;
    if (const kvarn::status s = can_give(plan); s != kvarn::status::ok) return code(s);
    if (const kvarn::status s = c.read(config, given); s != kvarn::status::ok) return code(s);
    const auto made = kvarn::plan_cache(c.config);
    if (!made) return code(made.error);
    const kvarn::cache_config whole = kvarn::completed(c.config);
    give({sizeof(kvarn_cache_plan), made->bytes() + pool_overhead, made->records, made->exact, made->state + pool_overhead,
          made->record_block_bytes, made->exact_block_bytes, whole.record_blocks, whole.exact_blocks},
         plan);
    return KVARN_OK;
}

kvarn_status kvarn_fit_cache(const kvarn_cache_config* config, size_t bytes, kvarn_cache_config* fitted) noexcept
{
    using namespace kvarn::c;
    configuration c;
    kvarn_cache_config given;
    if (const kvarn::status s = can_give(fitted); s != kvarn::status::ok) return code(s);
    if (const kvarn::status s = c.read(config, given); s != kvarn::status::ok) return code(s);
    const auto made = kvarn::fit_cache(c.config, bytes > pool_overhead ? bytes - pool_overhead : 0);
    if (!made) return code(made.error);
    put_numbers(*made, given);
    give(given, fitted);
    return KVARN_OK;
}

kvarn_status kvarn_plan_sequence(const kvarn_cache_config* config, size_t tokens, kvarn_sequence_plan* plan) noexcept
{
    using namespace kvarn::c;
    configuration c;
    kvarn_cache_config given;
    if (const kvarn::status s = can_give(plan); s != kvarn::status::ok) return code(s);
    if (const kvarn::status s = c.read(config, given); s != kvarn::status::ok) return code(s);
    if (tokens > kvarn::detail::most_blocks || given.sink_tokens > kvarn::detail::most_blocks) return KVARN_BAD_ARGUMENT;
    const std::size_t sink = kvarn::completed(c.config).sink_tokens;
    const kvarn::sequence_plan p = kvarn::plan_sequence(c.config.policy, tokens, sink, kvarn::element_bytes(c.config.exact));
    give({sizeof(kvarn_sequence_plan), p.record_bytes, p.exact_bytes, p.elements, p.bits_per_element()}, plan);
    return KVARN_OK;
}

size_t kvarn_cache_scratch_bytes(const kvarn_cache_config* config, size_t rows) noexcept
{
    using namespace kvarn::c;
    configuration c;
    kvarn_cache_config given;
    if (c.read(config, given) != kvarn::status::ok) return 0;
    return kvarn::cache_scratch_bytes(c.config, rows == 0 ? kvarn::layer_options().rows_per_task : rows);
}

// --- pools ---------------------------------------------------------------------------------------------------------

kvarn_status kvarn_pool_make(const kvarn_cache_config* config, void* memory, size_t bytes, kvarn_pool** pool) noexcept
{
    using namespace kvarn::c;
    configuration c;
    kvarn_cache_config given;
    if (pool == nullptr) return KVARN_NULL_POINTER;
    if (const kvarn::status s = c.read(config, given); s != kvarn::status::ok) return code(s);
    const auto plan = kvarn::plan_cache(c.config);
    if (!plan) return code(plan.error);
    if (memory == nullptr) return KVARN_NULL_POINTER;
    if (bytes < plan->bytes() + pool_overhead) return KVARN_BUFFER_TOO_SMALL;
    std::byte* const base = aligned(memory);
    std::byte* const rest = base + (sizeof(kvarn_pool) + 63) / 64 * 64;
    const auto made =
        kvarn::make_pool(c.config, {rest, bytes - static_cast<std::size_t>(rest - static_cast<std::byte*>(memory))});
    if (!made) return code(made.error);
    kvarn_pool* const handle = kvarn::detail::construct(reinterpret_cast<kvarn_pool*>(base), 1);
    handle->pool = *made;
    *pool = handle;
    return KVARN_OK;
}

size_t kvarn_pool_layers(const kvarn_pool* pool) noexcept
{
    return kvarn::c::number_of_pool(pool, size_t{0}, [](const kvarn::cache_pool& p) { return p.layers(); });
}

size_t kvarn_pool_heads(const kvarn_pool* pool) noexcept
{
    return kvarn::c::number_of_pool(pool, size_t{0}, [](const kvarn::cache_pool& p) { return p.heads(); });
}

kvarn_status kvarn_pool_config(const kvarn_pool* pool, kvarn_cache_config* config) noexcept
{
    using namespace kvarn::c;
    return with_pool(pool, [&](const kvarn::cache_pool& p) {
        if (const kvarn::status s = can_give(config); s != kvarn::status::ok) return s;
        kvarn_cache_config full = initial<kvarn_cache_config>::make();
        put_numbers(p.config(), full);
        give(full, config);
        return kvarn::status::ok;
    });
}

kvarn_status kvarn_pool_format(const kvarn_pool* pool, size_t layer, size_t head, kvarn_format* format) noexcept
{
    using namespace kvarn::c;
    return with_pool(pool, [&](const kvarn::cache_pool& p) {
        if (const kvarn::status s = can_give(format); s != kvarn::status::ok) return s;
        if (layer >= p.layers() || head >= p.heads()) return kvarn::status::bad_argument;
        give_format(p.format_of(layer, head), format);
        return kvarn::status::ok;
    });
}

kvarn_status kvarn_pool_set_format(kvarn_pool* pool, size_t layer, size_t head, const kvarn_format* format) noexcept
{
    using namespace kvarn::c;
    return with_pool(pool, [&](kvarn::cache_pool& p) {
        kvarn::format f;
        const kvarn::status s = to_format(format, f);
        return s == kvarn::status::ok ? p.set_format(layer, head, f) : s;
    });
}

kvarn_status kvarn_statistics_of_pool(const kvarn_pool* pool, kvarn_pool_statistics* statistics) noexcept
{
    using namespace kvarn::c;
    return with_pool(pool, [&](const kvarn::cache_pool& p) {
        if (const kvarn::status s = can_give(statistics); s != kvarn::status::ok) return s;
        const kvarn::pool_statistics n = p.statistics();
        give({sizeof(kvarn_pool_statistics), n.records.used, n.records.free, n.records.shared, n.exact.used, n.exact.free,
              n.exact.shared, n.bytes_used, n.tiles_sealed, n.tiles_kept_not_finite, n.tiles_kept_overflowed, n.sequences},
             statistics);
        return kvarn::status::ok;
    });
}

kvarn_status kvarn_statistics_of(const kvarn_pool* pool, kvarn_sequence sequence, kvarn_sequence_statistics* statistics) noexcept
{
    using namespace kvarn::c;
    return with_pool(pool, [&](const kvarn::cache_pool& p) {
        if (const kvarn::status s = can_give(statistics); s != kvarn::status::ok) return s;
        const auto n = p.statistics(id_of(sequence));
        if (n)
            give({sizeof(kvarn_sequence_statistics), n->tokens, n->drafts, n->sealed_tokens, n->dead_tokens, n->kept_tiles,
                  n->record_blocks, n->exact_blocks, n->spans, n->own_records, n->own_exact, n->next_position},
                 statistics);
        return n.error;
    });
}

// --- sequences -----------------------------------------------------------------------------------------------------

kvarn_status kvarn_open(kvarn_pool* pool, std::int64_t first_position, kvarn_sequence* sequence) noexcept
{
    return kvarn::c::with_pool(pool, [&](kvarn::cache_pool& p) {
        if (sequence == nullptr) return kvarn::status::null_pointer;
        const auto made = p.open(first_position);
        if (made) *sequence = {made->slot, made->generation};
        return made.error;
    });
}

kvarn_status kvarn_close(kvarn_pool* pool, kvarn_sequence sequence) noexcept
{
    return kvarn::c::with_pool(pool, [&](kvarn::cache_pool& p) { return p.close(kvarn::c::id_of(sequence)); });
}

kvarn_status kvarn_reserve(kvarn_pool* pool, kvarn_sequence sequence, size_t tokens) noexcept
{
    return kvarn::c::with_pool(pool, [&](kvarn::cache_pool& p) { return p.reserve(kvarn::c::id_of(sequence), tokens); });
}

kvarn_status kvarn_store(kvarn_pool* pool, kvarn_sequence sequence, size_t layer, const kvarn_view* k, const kvarn_view* v,
                         size_t first_draft, size_t first_head) noexcept
{
    using namespace kvarn::c;
    return with_pool(pool, [&](const kvarn::cache_pool& p) {
        kvarn::input_view keys, values;
        if (k == nullptr) return kvarn::status::null_pointer;
        if (const kvarn::status s = to_view(k, keys); s != kvarn::status::ok) return s;
        if (const kvarn::status s = to_view(v, values); s != kvarn::status::ok) return s;
        return kvarn::dispatched::store(p, id_of(sequence), layer, keys, values, first_draft, first_head);
    });
}

kvarn_status kvarn_commit(kvarn_pool* pool, kvarn_sequence sequence, size_t tokens) noexcept
{
    return kvarn::c::with_pool(pool, [&](kvarn::cache_pool& p) { return p.commit(kvarn::c::id_of(sequence), tokens); });
}

kvarn_status kvarn_commit_path(kvarn_pool* pool, kvarn_sequence sequence, const size_t* drafts, size_t count) noexcept
{
    return kvarn::c::with_pool(pool, [&](kvarn::cache_pool& p) {
        if (drafts == nullptr && count != 0) return kvarn::status::null_pointer;
        return p.commit(kvarn::c::id_of(sequence), std::span<const std::size_t>(drafts, count));
    });
}

kvarn_status kvarn_truncate(kvarn_pool* pool, kvarn_sequence sequence, std::int64_t position) noexcept
{
    return kvarn::c::with_pool(pool, [&](kvarn::cache_pool& p) { return p.truncate(kvarn::c::id_of(sequence), position); });
}

kvarn_status kvarn_erase(kvarn_pool* pool, kvarn_sequence sequence, std::int64_t begin, std::int64_t end) noexcept
{
    return kvarn::c::with_pool(pool, [&](kvarn::cache_pool& p) { return (p.erase)(kvarn::c::id_of(sequence), begin, end); });
}

kvarn_status kvarn_evict_front(kvarn_pool* pool, kvarn_sequence sequence, size_t tokens) noexcept
{
    return kvarn::c::with_pool(pool, [&](kvarn::cache_pool& p) { return p.evict_front(kvarn::c::id_of(sequence), tokens); });
}

kvarn_status kvarn_fork(kvarn_pool* pool, kvarn_sequence sequence, kvarn_sequence* fork) noexcept
{
    return kvarn::c::with_pool(pool, [&](kvarn::cache_pool& p) {
        if (fork == nullptr) return kvarn::status::null_pointer;
        const auto made = p.fork(kvarn::c::id_of(sequence));
        if (made) *fork = {made->slot, made->generation};
        return made.error;
    });
}

std::int32_t kvarn_is_open(const kvarn_pool* pool, kvarn_sequence sequence) noexcept
{
    return kvarn::c::number_of_pool(pool, std::int32_t{0},
                                    [&](const kvarn::cache_pool& p) { return p.is_open(kvarn::c::id_of(sequence)); });
}

size_t kvarn_tokens(const kvarn_pool* pool, kvarn_sequence sequence) noexcept
{
    return kvarn::c::number_of_pool(pool, size_t{0},
                                    [&](const kvarn::cache_pool& p) { return p.tokens(kvarn::c::id_of(sequence)); });
}

size_t kvarn_drafts(const kvarn_pool* pool, kvarn_sequence sequence) noexcept
{
    return kvarn::c::number_of_pool(pool, size_t{0},
                                    [&](const kvarn::cache_pool& p) { return p.drafts(kvarn::c::id_of(sequence)); });
}

std::int64_t kvarn_next_position(const kvarn_pool* pool, kvarn_sequence sequence) noexcept
{
    return kvarn::c::number_of_pool(pool, std::int64_t{-1},
                                    [&](const kvarn::cache_pool& p) { return p.next_position(kvarn::c::id_of(sequence)); });
}

size_t kvarn_count_tokens(const kvarn_pool* pool, kvarn_sequence sequence, std::int64_t begin, std::int64_t end) noexcept
{
    return kvarn::c::number_of_pool(pool, size_t{0}, [&](const kvarn::cache_pool& p) {
        return kvarn::count_tokens(p, kvarn::c::id_of(sequence), begin, end);
    });
}

kvarn_status kvarn_read(const kvarn_pool* pool, kvarn_sequence sequence, size_t layer, size_t head, std::int64_t begin,
                        std::int64_t end, const kvarn_view* k, const kvarn_view* v, void* scratch, size_t scratch_bytes) noexcept
{
    using namespace kvarn::c;
    return with_pool(pool, [&](const kvarn::cache_pool& p) {
        kvarn::output_view keys, values;
        if (scratch == nullptr) return kvarn::status::null_pointer;
        if (const kvarn::status s = to_view(k, keys); s != kvarn::status::ok) return s;
        if (const kvarn::status s = to_view(v, values); s != kvarn::status::ok) return s;
        return kvarn::dispatched::read(p, id_of(sequence), layer, head, begin, end, keys, values,
                                       bytes_at(scratch, scratch_bytes));
    });
}

// --- sealing -------------------------------------------------------------------------------------------------------

kvarn_status kvarn_seal(kvarn_pool* pool, kvarn_sequence sequence, size_t most, void* scratch, size_t scratch_bytes,
                        kvarn_seal_report* report) noexcept
{
    using namespace kvarn::c;
    return with_pool(pool, [&](const kvarn::cache_pool& p) {
        if (scratch == nullptr) return kvarn::status::null_pointer;
        if (const kvarn::status s = can_report(report); s != kvarn::status::ok) return s;
        const auto done = kvarn::dispatched::seal(p, id_of(sequence), bytes_at(scratch, scratch_bytes), most);
        if (done) give_report(*done, report);
        return done.error;
    });
}

size_t kvarn_ready_tiles(const kvarn_pool* pool, kvarn_sequence sequence) noexcept
{
    return kvarn::c::number_of_pool(pool, size_t{0},
                                    [&](const kvarn::cache_pool& p) { return kvarn::ready_tiles(p, kvarn::c::id_of(sequence)); });
}

kvarn_status kvarn_begin_seal(kvarn_pool* pool, kvarn_sequence sequence, size_t most, size_t* queued) noexcept
{
    return kvarn::c::with_pool(pool, [&](const kvarn::cache_pool& p) {
        const auto count = kvarn::begin_seal(p, kvarn::c::id_of(sequence), most);
        if (count && queued != nullptr) *queued = *count;
        return count.error;
    });
}

size_t kvarn_seal_items(const kvarn_pool* pool) noexcept
{
    return kvarn::c::number_of_pool(pool, size_t{0}, [](const kvarn::cache_pool& p) { return kvarn::seal_items(p); });
}

kvarn_status kvarn_seal_item(kvarn_pool* pool, size_t item, void* scratch, size_t scratch_bytes) noexcept
{
    using namespace kvarn::c;
    return with_pool(pool, [&](const kvarn::cache_pool& p) {
        if (scratch == nullptr) return kvarn::status::null_pointer;
        return kvarn::dispatched::seal_item(p, item, bytes_at(scratch, scratch_bytes));
    });
}

kvarn_status kvarn_finish_seal(kvarn_pool* pool, size_t items, kvarn_seal_report* report) noexcept
{
    using namespace kvarn::c;
    return with_pool(pool, [&](const kvarn::cache_pool& p) {
        if (const kvarn::status s = can_report(report); s != kvarn::status::ok) return s;
        give_report(kvarn::finish_seal(p, items), report);
        return kvarn::status::ok;
    });
}

size_t kvarn_cancel_seal(kvarn_pool* pool, kvarn_sequence sequence) noexcept
{
    return kvarn::c::number_of_pool(pool, size_t{0},
                                    [&](const kvarn::cache_pool& p) { return kvarn::cancel_seal(p, kvarn::c::id_of(sequence)); });
}

// --- bases ---------------------------------------------------------------------------------------------------------

size_t kvarn_pool_moment_count(const kvarn_pool* pool) noexcept
{
    return kvarn::c::number_of_pool(pool, size_t{0}, [](const kvarn::cache_pool& p) { return kvarn::moment_count(p); });
}

kvarn_status kvarn_pool_add_query_moments(const kvarn_pool* pool, size_t layer, const kvarn_view* q, std::uint64_t* moments,
                                          size_t count) noexcept
{
    using namespace kvarn::c;
    return with_pool(pool, [&](const kvarn::cache_pool& p) {
        kvarn::input_view queries;
        if (q == nullptr || moments == nullptr) return kvarn::status::null_pointer;
        if (const kvarn::status s = to_view(q, queries); s != kvarn::status::ok) return s;
        return with_type(queries, [&]<class T>(std::type_identity<T>) {
            return kvarn::dispatch([&](auto arch) KVARN_LAMBDA {
                return kvarn::add_query_moments<decltype(arch)>(p, layer, typed<const T>(queries), std::span(moments, count));
            });
        });
    });
}

kvarn_status kvarn_pool_choose_bases(kvarn_pool* pool, kvarn_sequence sequence, const std::uint64_t* moments, size_t count,
                                     const kvarn_choose_options* options, void* scratch, size_t scratch_bytes,
                                     size_t* changed) noexcept
{
    using namespace kvarn::c;
    return with_pool(pool, [&](kvarn::cache_pool& p) {
        kvarn::choose_options o;
        if (moments == nullptr || scratch == nullptr) return kvarn::status::null_pointer;
        if (const kvarn::status s = to_choose_options(options, o); s != kvarn::status::ok) return s;
        const auto done = kvarn::dispatch([&](auto arch) KVARN_LAMBDA {
            return kvarn::choose_bases<decltype(arch)>(p, id_of(sequence), std::span(moments, count),
                                                       bytes_at(scratch, scratch_bytes), o);
        });
        if (done && changed != nullptr) *changed = *done;
        return done.error;
    });
}

size_t kvarn_choose_bases_scratch_bytes(const kvarn_format* format) noexcept
{
    return kvarn::c::number_of(format, [](const kvarn::format& f) { return kvarn::choose_bases_scratch_bytes(f); });
}

}  // extern "C"
