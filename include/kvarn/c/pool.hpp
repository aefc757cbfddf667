// SPDX-License-Identifier: Apache-2.0
#pragma once
// The C interface, third part: plans and pools. Compiled once, by c/implementation.hpp. In and out: as kvarn.h says. No
// allocation.

#include <kvarn/base/config.hpp>  // first: it refuses older standards

#include <cstddef>
#include <cstdint>

#include <kvarn/c/configuration.hpp>
#include <kvarn/c/handles.hpp>
#include <kvarn/c/structs.hpp>
#include <kvarn/cache/pool.hpp>
#include <kvarn/cache/tasks.hpp>

/// A pool in the caller's memory; what the library makes of the rest of it follows.
struct kvarn_pool {
    static constexpr kvarn::c::handle_kind its_kind = kvarn::c::handle_kind::pool;
    kvarn::c::handle_kind kind = its_kind;
    kvarn::cache_pool pool{};
};

namespace kvarn::c {

/// Bytes of a handle, and of memory before the first line.
inline constexpr std::size_t pool_overhead = (sizeof(kvarn_pool) + 63) / 64 * 64 + 63;

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

}  // namespace kvarn::c

extern "C" {

// --- plans ---------------------------------------------------------------------------------------------------------

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

}  // extern "C"
