// SPDX-License-Identifier: Apache-2.0
// The cache core beside the bare kernels: decoding steps (append, attention, sealing) of one layer, 2 KV heads with 4 query heads each, head_dim 128,
// k4v4_g128, at 16k tokens; saving and loading beside memcpy and a file; fork and truncate.
// Names: cache/step/<cache|bare>/s<sequences>, cache/<save|load|copy|write>, cache/<fork|truncate>. An iteration of a step is one token of each
// sequence, sealing included where a tile is full. Run with --benchmark_enable_random_interleaving=true and compare within one run.

#include <cstdio>
#include <cstring>
#include <memory>
#include <random>
#include <span>
#include <string>
#include <vector>

#include <benchmark/benchmark.h>

#include <kvarn/cache/load.hpp>
#include <kvarn/cache/seal.hpp>
#include <kvarn/cache/tasks.hpp>

namespace {

using kvarn::status;
constexpr std::size_t heads = 2, group_heads = 4, dim = 128, group = 128, context = 16384, most_context = context + 8 * group;

kvarn::format format() { return *kvarn::parse_format("k4v4_g128", dim); }

kvarn::cache_config config(std::size_t sequences, int layers = 1)
{
    kvarn::cache_config c;
    c.policy = *kvarn::make_policy(format(), layers, heads);
    c.sequences = sequences;
    c.most_tokens = most_context;
    c.most_step = group;
    return c;
}

/// K, V and queries of the tokens that come next, over and over.
struct input {
    input() : k(tokens * heads * dim), v(k.size()), q(tokens * heads * group_heads * dim)
    {
        std::mt19937 engine(1);
        std::normal_distribution<float> normal;
        for (auto* x : {&k, &v, &q})
            for (float& value : *x) value = normal(engine);
    }
    static constexpr std::size_t tokens = 256;
    std::vector<float> k, v, q;
};
const input& in()
{
    static const input x;
    return x;
}

void check(status s, benchmark::State& state)
{
    if (s != status::ok) state.SkipWithError(kvarn::message(s));
}

struct cached {
    explicit cached(std::size_t sequences, int layers = 1)
        : memory(kvarn::plan_cache(config(sequences, layers))->bytes()), scratch(kvarn::cache_scratch_bytes(config(sequences, layers))),
          pool(*kvarn::make_pool(config(sequences, layers), memory))
    {
        for (std::size_t i = 0; i < sequences; ++i) {
            ids.push_back(*pool.open());
            fill(ids.back(), context);
        }
    }
    void fill(kvarn::sequence_id id, std::size_t tokens)
    {
        for (std::size_t done = 0; done < tokens; done += group) {
            (void)pool.reserve(id, group);
            const auto k = kvarn::token_major(in().k.data(), group, heads, dim), v = kvarn::token_major(in().v.data(), group, heads, dim);
            for (std::size_t layer = 0; layer < pool.layers(); ++layer) (void)kvarn::store(pool, id, layer, k, v);
            (void)pool.commit(id, group);
            (void)kvarn::seal(pool, id, scratch);
        }
    }
    std::vector<std::byte> memory, scratch;
    kvarn::cache_pool pool;
    std::vector<kvarn::sequence_id> ids;
};

void step_cache(benchmark::State& state, std::size_t sequences)
{
    cached c(sequences);
    std::vector<float> out(sequences * heads * group_heads * dim);
    std::vector<kvarn::sequence_step> steps(sequences);
    const kvarn::layer_options options;
    std::vector<std::byte> work(kvarn::layer_memory_bound(c.pool.config(), sequences, group_heads, group_heads, options));
    std::size_t token = 0;
    for (auto _ : state) {
        if (c.pool.tokens(c.ids[0]) == most_context)
            for (const auto id : c.ids) check(c.pool.truncate(id, context), state);
        for (std::size_t i = 0; i < sequences; ++i) {
            check(c.pool.reserve(c.ids[i], 1), state);
            const std::size_t t = (token + i) % input::tokens;
            steps[i].sequence = c.ids[i];
            steps[i].k = kvarn::token_major(in().k.data() + t * heads * dim, 1, heads, dim);
            steps[i].v = kvarn::token_major(in().v.data() + t * heads * dim, 1, heads, dim);
            steps[i].q = kvarn::token_major(in().q.data() + t * heads * group_heads * dim, 1, heads * group_heads, dim);
            steps[i].out = kvarn::token_major(out.data() + i * heads * group_heads * dim, 1, heads * group_heads, dim);
        }
        const auto items = kvarn::plan_layer(c.pool, 0, steps, options, work);
        check(items.error, state);
        check(items->run(c.scratch), state);
        for (const auto id : c.ids) {
            check(c.pool.commit(id, 1), state);
            if (kvarn::ready_tiles(c.pool, id) != 0) check(kvarn::seal(c.pool, id, c.scratch).error, state);
        }
        ++token;
        benchmark::DoNotOptimize(out.data());
    }
    state.SetItemsProcessed(static_cast<std::int64_t>(state.iterations() * sequences));
}

/// The same by hand: records and tails in arrays, the kernels called straight.
void step_bare(benchmark::State& state, std::size_t sequences)
{
    const kvarn::format f = format();
    constexpr std::size_t most_tiles = most_context / group;
    struct one {
        std::vector<std::byte> records;
        std::vector<kvarn::half> sink_k, sink_v, tail_k, tail_v;  // [head][token][channel]
        std::size_t tiles = 0, tail = 0;
    };
    std::vector<one> all(sequences);
    std::vector<std::byte> scratch(std::max(kvarn::scratch_bytes(f), kvarn::attention_scratch_bytes(f, group_heads)));
    std::vector<float> out(sequences * heads * group_heads * dim);
    const auto rows = [](std::vector<kvarn::half>& x) { return kvarn::head_major(x.data(), group, heads, dim); };
    const auto k0 = kvarn::token_major(in().k.data(), group, heads, dim), v0 = kvarn::token_major(in().v.data(), group, heads, dim);
    const auto grid = [&](one& s) { return kvarn::head_major_records(f, s.records.data(), s.records.size(), most_tiles, heads); };
    const auto seal = [&](one& s) {
        for (std::size_t h = 0; h < heads; ++h)
            check(kvarn::quantize_kv(f, rows(s.tail_k).head(h), rows(s.tail_v).head(h), grid(s).one(s.tiles, h), scratch), state);
        ++s.tiles;
        s.tail = 0;
    };
    for (one& s : all) {
        s.records.resize(kvarn::grid_bytes(f, most_tiles, heads));
        for (auto* x : {&s.sink_k, &s.sink_v, &s.tail_k, &s.tail_v}) x->resize(group * heads * dim);
        check(kvarn::convert(k0, rows(s.sink_k)), state);
        check(kvarn::convert(v0, rows(s.sink_v)), state);
        while ((s.tiles + 1) * group < context) {
            check(kvarn::convert(k0, rows(s.tail_k)), state);
            check(kvarn::convert(v0, rows(s.tail_v)), state);
            seal(s);
        }
    }
    std::size_t token = 0;
    for (auto _ : state) {
        for (std::size_t i = 0; i < sequences; ++i) {
            one& s = all[i];
            const std::size_t t = (token + i) % input::tokens;
            if (s.tiles + 1 == most_tiles) s.tiles = context / group - 1;
            check(kvarn::convert(kvarn::token_major(in().k.data() + t * heads * dim, 1, heads, dim), kvarn::token_range(rows(s.tail_k), s.tail, 1)), state);
            check(kvarn::convert(kvarn::token_major(in().v.data() + t * heads * dim, 1, heads, dim), kvarn::token_range(rows(s.tail_v), s.tail, 1)), state);
            ++s.tail;
            for (std::size_t h = 0; h < heads; ++h) {
                const kvarn::kv_segment history[] = {kvarn::exact_tokens(rows(s.sink_k), rows(s.sink_v), h), kvarn::sealed_tiles(f, grid(s), h, 0, s.tiles),
                                                     kvarn::exact_tokens(kvarn::first_tokens(rows(s.tail_k), s.tail),
                                                                         kvarn::first_tokens(rows(s.tail_v), s.tail), h)};
                kvarn::attention_task task;
                task.history = history;
                task.q = kvarn::token_major(in().q.data() + (t * heads + h) * group_heads * dim, 1, group_heads, dim);
                task.out = kvarn::token_major(out.data() + (i * heads + h) * group_heads * dim, 1, group_heads, dim);
                check(kvarn::attend(f, task, {}, scratch), state);
            }
            if (s.tail == group) seal(s);
        }
        ++token;
        benchmark::DoNotOptimize(out.data());
    }
    state.SetItemsProcessed(static_cast<std::int64_t>(state.iterations() * sequences));
}

/// One sequence of 16k tokens and 8 layers: 36 MiB.
struct saved {
    saved() : c(3, 8), file(kvarn::saved_bytes(c.pool, c.ids[0]))
    {
        (void)c.pool.close(c.ids[2]);  // room for the one that is loaded
    }
    cached c;
    std::vector<std::byte> file;
};
saved& to_save()
{
    static saved s;
    return s;
}

void save_to_memory(benchmark::State& state)
{
    saved& s = to_save();
    for (auto _ : state) check(kvarn::save(s.c.pool, s.c.ids[0], kvarn::buffer_sink(s.file)), state);
    state.SetBytesProcessed(static_cast<std::int64_t>(state.iterations() * s.file.size()));
}

void load_from_memory(benchmark::State& state)
{
    saved& s = to_save();
    check(kvarn::save(s.c.pool, s.c.ids[0], kvarn::buffer_sink(s.file)), state);
    for (auto _ : state) {
        const auto id = kvarn::load(s.c.pool, kvarn::buffer_source(s.file));
        check(id.error, state);
        if (id) check(s.c.pool.close(*id), state);
    }
    state.SetBytesProcessed(static_cast<std::int64_t>(state.iterations() * s.file.size()));
}

void copy(benchmark::State& state)
{
    const saved& s = to_save();
    std::vector<std::byte> to(s.file.size());
    for (auto _ : state) {
        std::memcpy(to.data(), s.file.data(), to.size());
        benchmark::ClobberMemory();
    }
    state.SetBytesProcessed(static_cast<std::int64_t>(state.iterations() * to.size()));
}

void file_io(benchmark::State& state, bool through_cache)
{
    saved& s = to_save();
    for (auto _ : state) {
        const std::unique_ptr<std::FILE, int (*)(std::FILE*)> file(std::tmpfile(), std::fclose);
        if (file == nullptr) return state.SkipWithError("no temporary file");
        std::setvbuf(file.get(), nullptr, _IOFBF, std::size_t{1} << 20);
        const auto write = [&](std::span<const std::byte> piece) {
            return std::fwrite(piece.data(), 1, piece.size(), file.get()) == piece.size();
        };
        if (through_cache) check(kvarn::save(s.c.pool, s.c.ids[0], write), state);
        else if (!write(s.file)) state.SkipWithError("the disk is full");
        std::fflush(file.get());
    }
    state.SetBytesProcessed(static_cast<std::int64_t>(state.iterations() * s.file.size()));
}

void fork_and_close(benchmark::State& state)
{
    saved& s = to_save();
    for (auto _ : state) {
        const auto id = s.c.pool.fork(s.c.ids[0]);
        check(id.error, state);
        check(s.c.pool.close(*id), state);
    }
}

void truncate_by_a_tile(benchmark::State& state)
{
    saved& s = to_save();
    auto id = *s.c.pool.fork(s.c.ids[0]);
    std::int64_t at = context;
    for (auto _ : state) {
        at -= group;
        if (at < 4096) {
            state.PauseTiming();
            check(s.c.pool.close(id), state);
            id = *s.c.pool.fork(s.c.ids[0]);
            at = context - group;
            state.ResumeTiming();
        }
        check(s.c.pool.truncate(id, at), state);
    }
    check(s.c.pool.close(id), state);
}

const int registered = [] {
    for (const std::size_t sequences : {1u, 8u, 64u}) {
        const std::string tail = "/s" + std::to_string(sequences);
        benchmark::RegisterBenchmark(("cache/step/cache" + tail).c_str(), step_cache, sequences)->Unit(benchmark::kMicrosecond);
        benchmark::RegisterBenchmark(("cache/step/bare" + tail).c_str(), step_bare, sequences)->Unit(benchmark::kMicrosecond);
    }
    benchmark::RegisterBenchmark("cache/save", save_to_memory)->Unit(benchmark::kMicrosecond);
    benchmark::RegisterBenchmark("cache/load", load_from_memory)->Unit(benchmark::kMicrosecond);
    benchmark::RegisterBenchmark("cache/copy", copy)->Unit(benchmark::kMicrosecond);
    benchmark::RegisterBenchmark("cache/save_file", file_io, true)->Unit(benchmark::kMicrosecond);
    benchmark::RegisterBenchmark("cache/write_file", file_io, false)->Unit(benchmark::kMicrosecond);
    benchmark::RegisterBenchmark("cache/fork", fork_and_close);
    benchmark::RegisterBenchmark("cache/truncate", truncate_by_a_tile);
    return 0;
}();

}  // namespace

BENCHMARK_MAIN();
