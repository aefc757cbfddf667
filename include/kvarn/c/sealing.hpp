// SPDX-License-Identifier: Apache-2.0
#pragma once
// The C interface, fifth part: full tiles become records, and the bases that heads take before. Compiled once, by
// c/implementation.hpp. In and out: as kvarn.h says. No allocation.

#include <kvarn/base/config.hpp>  // first: it refuses older standards

#include <cstddef>
#include <cstdint>
#include <span>

#include <kvarn/c/codec.hpp>
#include <kvarn/c/pool.hpp>
#include <kvarn/c/sequences.hpp>
#include <kvarn/c/structs.hpp>
#include <kvarn/cache/bases.hpp>
#include <kvarn/cache/seal.hpp>
#include <kvarn/dispatch/cache.hpp>

namespace kvarn::c {

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

kvarn_status kvarn_begin_seal_all(kvarn_pool* pool, size_t most, size_t* queued) noexcept
{
    return kvarn::c::with_pool(pool, [&](const kvarn::cache_pool& p) {
        const auto count = kvarn::begin_seal_all(p, most);
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
