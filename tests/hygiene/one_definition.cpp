// SPDX-License-Identifier: Apache-2.0
// One of two translation units of a program, compiled for different instruction sets; see one_definition.sh.
#include <cstdio>
#include <vector>

#include <kvarn/cache/file.hpp>
#include <kvarn/cache/seal.hpp>
#include <kvarn/cache/tasks.hpp>
#include <kvarn/kvarn.hpp>
#if __has_include(<xxhash.h>)
#include <kvarn/cache/load.hpp>
#endif

#define KVARN_JOIN2(a, b) a##b
#define KVARN_JOIN(a, b) KVARN_JOIN2(a, b)

/// The life of two sequences of a cache.
static kvarn::status use_cache(const kvarn::format& f, const float* k, std::span<std::byte> scratch)
{
    kvarn::cache_config c;
    c.policy = kvarn::make_policy(f, 1, 1).value;
    c.sink_tokens = 32;
    c.sequences = 3;
    c.most_tokens = 256;
    static std::byte memory[1 << 20], work[1 << 18], file[1 << 18];
    auto pool = kvarn::make_pool(c, memory);
    if (!pool) return pool.error;
    kvarn::cache_pool cache = *pool;
    const auto id = cache.open();
    const kvarn::input_view tokens = kvarn::token_major(k, 32, 1, 64);
    for (int i = 0; i < 3; ++i) {
        if (const auto s = cache.reserve(*id, 32); s != kvarn::status::ok) return s;
        kvarn::sequence_step step;
        step.sequence = *id;
        step.k = step.v = step.q = tokens;
        static float out[32 * 64];
        step.out = kvarn::token_major(out, 32, 1, 64);
        const auto items = kvarn::plan_layer(cache, 0, {&step, 1}, {}, work);
        if (!items) return items.error;
        if (const auto s = items->run(scratch); s != kvarn::status::ok) return s;
        if (const auto s = cache.commit(*id, 32); s != kvarn::status::ok) return s;
        if (i == 1 && kvarn::seal(cache, *id, scratch).error != kvarn::status::ok) return kvarn::status::corrupt;
    }
    const auto queued = kvarn::begin_seal(cache, *id);
    if (!queued) return queued.error;
    if (const auto s = kvarn::seal_item(cache, 0, scratch); s != kvarn::status::ok) return s;
    if (kvarn::finish_seal(cache, 1).sealed != 1) return kvarn::status::corrupt;
    const auto other = cache.fork(*id);
    if (cache.truncate(*other, 70) != kvarn::status::ok || cache.erase(*other, 40, 45) != kvarn::status::ok ||
        cache.evict_front(*other, 3) != kvarn::status::ok || cache.statistics().sequences != 2 || !cache.statistics(*other))
        return kvarn::status::corrupt;
#if __has_include(<xxhash.h>)
    if (const auto s = kvarn::save(cache, *other, kvarn::buffer_sink(file)); s != kvarn::status::ok) return s;
    const auto loaded = kvarn::load(cache, kvarn::buffer_source({file, static_cast<std::size_t>(kvarn::saved_bytes(cache, *other))}));
    if (!loaded) return loaded.error;
#else
    static_cast<void>(file);
#endif
    return cache.close(*id);
}

/// Uses what an engine uses. Returns a digest of the records.
unsigned KVARN_JOIN(use_, KVARN_PART)()
{
    const auto f = kvarn::parse_format("k4v2_g32", 64);
    if (!f) return 0;
    float k[32 * 64], v[32 * 64];
    for (int i = 0; i < 32 * 64; ++i) {
        k[i] = static_cast<float>(i * 37 % 101);
        v[i] = static_cast<float>(i * 53 % 97);
    }
    static std::byte records[16384], scratch[1 << 20];
    const std::size_t bytes = kvarn::grid_bytes(*f, 1, 1);
    if (bytes > sizeof records || kvarn::scratch_bytes(*f) > sizeof scratch) return 0;
    const auto grid = kvarn::tile_major_records(*f, records, bytes, 1, 1);
    if (kvarn::quantize_kv(*f, kvarn::token_major(k, 32, 1, 64), kvarn::token_major(v, 32, 1, 64), grid, scratch) != kvarn::status::ok)
        return 0;
    if (kvarn::dequantize_kv(*f, grid, kvarn::token_major(k, 32, 1, 64), kvarn::token_major(v, 32, 1, 64), kvarn::basis::original,
                             scratch) != kvarn::status::ok)
        return 0;
    // The records through a file, which is read in place, then piece by piece.
    static std::byte file[32768];
    kvarn::buffer_writer writer{kvarn::buffer_sink(file)};
    if (writer.begin(kvarn::file_kind::records) != kvarn::status::ok ||
        writer.chunk(kvarn::chunk_type("data"), 0, {records, bytes}) != kvarn::status::ok || writer.finish() != kvarn::status::ok)
        return 0;
    for (const bool in_place : {true, false}) {
        kvarn::buffer_reader reader{kvarn::buffer_source(file)};
        if (!reader.begin() || !reader.next()) return 0;
        if ((in_place ? reader.payload().error : reader.skip()) != kvarn::status::ok || !reader.next()) return 0;
    }
    if (use_cache(*f, k, scratch) != kvarn::status::ok) return 0;
    unsigned hash = 2166136261u;
    for (std::size_t i = 0; i < bytes; ++i) hash = (hash ^ static_cast<unsigned>(records[i])) * 16777619u;
    return hash;
}

#if defined(KVARN_MAIN)
unsigned use_high();
int main()
{
    const unsigned low = use_low(), high = use_high();
    std::printf("%08x %08x\n", low, high);
    return low != 0 && low == high ? 0 : 1;
}
#endif
