// SPDX-License-Identifier: Apache-2.0
// Everything that docs/embedding.md lets several threads do at once, for ThreadSanitizer: ranges of quantize_kv and dequantize_kv through
// the pool of the examples, work items of attention, the first dispatch, sequences of one cache. What they write must be what one thread
// writes, bit for bit.
// With the argument `race` there is one, to see that it is found.

#include <atomic>
#include <cstdio>
#include <cstring>
#include <latch>
#include <thread>
#include <vector>

#include <kvarn/cache/seal.hpp>
#include <kvarn/cache/tasks.hpp>
#include <kvarn/dispatch.hpp>
#include <kvarn/kvarn.hpp>

#include "examples/common/threads.hpp"

namespace {

constexpr unsigned workers = 4;
constexpr std::size_t tiles = 6, heads = 2;

int failures = 0;
bool race = false;

void check(bool holds, const char* what)
{
    if (holds) return;
    std::printf("FAILED: %s\n", what);
    ++failures;
}

/// Calls work(worker) on every thread, all at the same moment.
template <class Work>
void together(Work work)
{
    std::latch start(workers);
    std::vector<std::thread> pool;
    for (unsigned w = 0; w < workers; ++w)
        pool.emplace_back([&, w] {
            start.arrive_and_wait();
            work(w);
        });
    for (std::thread& thread : pool) thread.join();
}

std::vector<float> values_of(std::size_t n, unsigned seed)
{
    std::vector<float> x(n);
    for (float& each : x) {
        seed = seed * 1664525u + 1013904223u;
        each = static_cast<float>(static_cast<int>(seed >> 16) - 32768) * 0x1p-14f;
    }
    return x;
}

/// The memory of one cache: values, and the records that are made of them.
struct cache {
    kvarn::format format;
    std::size_t tokens = tiles * static_cast<std::size_t>(format.group());
    std::size_t channels = static_cast<std::size_t>(format.head_dim_k());
    std::vector<float> k = values_of(tokens * heads * channels, 1), v = values_of(tokens * heads * channels, 2);
    std::vector<std::byte> bytes{kvarn::grid_bytes(format, tiles, heads)};

    explicit cache(const kvarn::format& f) : format(f) {}

    [[nodiscard]] kvarn::kv_view<const float> view(const std::vector<float>& x) const
    {
        return kvarn::token_major(x.data(), tokens, heads, channels);
    }
    [[nodiscard]] kvarn::record_grid<std::byte> records(std::vector<std::byte>& to) const
    {
        return kvarn::tile_major_records(format, to.data(), to.size(), tiles, heads);
    }
};

void seal(cache& c, const kvarn::encode_options& options)
{
    const auto run = [&](std::vector<std::byte>& to, unsigned threads) {
        return kvarn_cli::for_ranges(tiles * heads, kvarn::scratch_bytes(c.format), threads, "sealing",
                                     [&](kvarn::record_range range, std::span<std::byte> scratch) {
                                         if (race && range.begin > 0) --range.begin;  // a record of another thread's range
                                         return kvarn::quantize_kv(c.format, c.view(c.k), c.view(c.v), c.records(to), scratch, options, range);
                                     });
    };
    std::vector<std::byte> alone(c.bytes.size());
    check(run(alone, 1) == kvarn::status::ok, "one thread seals");
    check(run(c.bytes, workers) == kvarn::status::ok, "several threads seal");
    check(alone == c.bytes, "records do not depend on the threads");
}

void open(cache& c)
{
    const auto run = [&](std::vector<float>& k, std::vector<float>& v, unsigned threads) {
        k.assign(c.k.size(), 0.0f);
        v.assign(c.v.size(), 0.0f);
        const kvarn::record_grid<const std::byte> records = c.records(c.bytes);
        return kvarn_cli::for_ranges(tiles * heads, kvarn::scratch_bytes(c.format), threads, "opening",
                                     [&](kvarn::record_range range, std::span<std::byte> scratch) {
                                         return kvarn::dequantize_kv(c.format, records, kvarn::token_major(k.data(), c.tokens, heads, c.channels),
                                                                     kvarn::token_major(v.data(), c.tokens, heads, c.channels),
                                                                     kvarn::basis::original, scratch, range);
                                     });
    };
    std::vector<float> k, v, k_alone, v_alone;
    check(run(k_alone, v_alone, 1) == kvarn::status::ok, "one thread opens");
    check(run(k, v, workers) == kvarn::status::ok, "several threads open");
    check(k == k_alone && v == v_alone, "decoded values do not depend on the threads");
}

/// One task for each KV head: a run of records twice over, so that there are several chunks, and exact tokens.
void attend(cache& c)
{
    constexpr std::size_t group_heads = 3, tail = 20;
    const std::vector<float> q = values_of(heads * group_heads * c.channels, 3);
    const auto view = [&](const std::vector<float>& x) { return kvarn::token_major(x.data(), tail, heads, c.channels); };
    std::vector<std::vector<kvarn::kv_segment>> histories;
    for (std::size_t h = 0; h < heads; ++h) {
        const kvarn::kv_segment sealed = kvarn::sealed_tiles(c.format, c.records(c.bytes), h);
        histories.push_back({sealed, sealed, kvarn::exact_tokens(view(c.k), view(c.v), h)});
    }
    const auto tasks_into = [&](std::vector<float>& out, std::vector<float>& log_sum_exp) {
        out.assign(q.size(), 0.0f);
        log_sum_exp.assign(heads * group_heads, 0.0f);
        std::vector<kvarn::attention_task> tasks(heads);
        for (std::size_t h = 0; h < heads; ++h) {
            const std::size_t at = h * group_heads * c.channels;
            tasks[h].history = histories[h];
            tasks[h].q = kvarn::token_major(q.data() + at, 1, group_heads, c.channels);
            tasks[h].out = kvarn::token_major(out.data() + at, 1, group_heads, c.channels);
            tasks[h].log_sum_exp = log_sum_exp.data() + h * group_heads;
        }
        return tasks;
    };
    const std::size_t scratch_bytes = kvarn::attention_scratch_bytes(c.format, group_heads);
    std::vector<float> alone, alone_lse, out, lse;
    std::vector<std::byte> scratch(scratch_bytes);
    for (const kvarn::attention_task& task : tasks_into(alone, alone_lse))
        check(kvarn::attend(c.format, task, {}, scratch) == kvarn::status::ok, "one call attends");

    const std::vector<kvarn::attention_task> tasks = tasks_into(out, lse);
    std::vector<std::byte> workspace(kvarn::attention_workspace_bytes(c.format, tasks));
    const std::size_t items = kvarn::attention_items(tasks, 1);
    check(items == heads * 5, "two chunks for a run of records, one for the tail");
    std::atomic<std::size_t> next_item{0}, next_task{0};
    std::atomic<int> refused{0};
    together([&](unsigned) {
        std::vector<std::byte> mine(scratch_bytes);
        for (std::size_t i; (i = next_item.fetch_add(1)) < items;)
            refused += kvarn::attend_item(c.format, tasks, {}, i, 1, workspace, mine) != kvarn::status::ok;
    });
    together([&](unsigned) {
        std::vector<std::byte> mine(scratch_bytes);
        for (std::size_t t; (t = next_task.fetch_add(1)) < tasks.size();)
            refused += kvarn::combine_items(c.format, tasks, {}, t, workspace, mine) != kvarn::status::ok;
    });
    check(refused == 0, "several threads attend");
    check(std::memcmp(out.data(), alone.data(), out.size() * sizeof(float)) == 0 &&
              std::memcmp(lse.data(), alone_lse.data(), lse.size() * sizeof(float)) == 0,
          "attention does not depend on the threads");
}

/// The first use of dispatch, by all threads at once, of a target that was built for two sets.
void dispatch()
{
    constexpr unsigned built = kvarn::detail::arch_bit<kvarn::simd::portable> | kvarn::detail::arch_bit<kvarn::simd::native_arch>;
    const char* names[workers] = {};
    std::uint8_t packed[workers][32] = {};
    together([&](unsigned w) {
        const std::vector<std::uint8_t> codes(64, 5);
        const kvarn::status s = kvarn::dispatch<built>([&](auto arch) {
            names[w] = kvarn::simd::arch_traits<decltype(arch)>::name;
            return kvarn::pack_codes<decltype(arch)>(4, codes.data(), codes.size(), packed[w]);
        });
        if (s != kvarn::status::ok) names[w] = nullptr;
    });
    for (unsigned w = 0; w < workers; ++w) {
        check(names[w] != nullptr && names[w] == names[0], "all threads use the same instruction set");
        check(std::memcmp(packed[w], packed[0], sizeof packed[0]) == 0 && packed[0][0] == 0x55, "all threads pack alike");
    }
    // One thread chooses a set while the others use what there is.
    together([&](unsigned w) {
        if (w == 0) names[0] = kvarn::select_arch<built>("portable") == kvarn::status::ok ? kvarn::active_arch_name<built>() : "";
        else names[w] = kvarn::active_arch_name<built>();
    });
    check(std::strcmp(names[0], "portable") == 0, "a set can be chosen");
}

/// A cache with sequences, and everything around it that one thread needs.
struct serving {
    static constexpr std::size_t layers = 2, channels = 32;
    kvarn::cache_config config;
    std::vector<std::byte> memory;
    kvarn::cache_pool pool;

    serving()
    {
        config.policy = *kvarn::make_policy(*kvarn::parse_format("k4v2_g32", static_cast<int>(channels)), static_cast<int>(layers), static_cast<int>(heads));
        config.sink_tokens = 32;
        config.sequences = 3 * workers + 2;
        config.most_tokens = 400;
        config.most_step = 64;
        config.encode.encoder = kvarn::encoder::paper;
        memory.resize(kvarn::plan_cache(config)->bytes());
        pool = *kvarn::make_pool(config, memory);
    }
};

/// What one thread saw: outputs of attention, values read, and whether all went well.
struct account {
    std::vector<float> values;
    std::size_t refused = 0;
    std::vector<std::byte> scratch;

    void expect(kvarn::status s) { refused += s != kvarn::status::ok; }
};

/// Drafts of a sequence for a step in one layer: its values depend on the stream and on the step.
kvarn::sequence_step step_of(kvarn::sequence_id id, std::vector<float>& k, std::vector<float>& v, std::vector<float>& q, std::vector<float>& out,
                             std::size_t tokens, unsigned seed)
{
    constexpr std::size_t query_heads = 2 * heads, channels = serving::channels;
    k = values_of(tokens * heads * channels, seed);
    v = values_of(tokens * heads * channels, seed + 1);
    q = values_of(tokens * query_heads * channels, seed + 2);
    out.assign(q.size(), 0.0f);
    kvarn::sequence_step step;
    step.sequence = id;
    step.k = kvarn::token_major<const float>(k.data(), tokens, heads, channels);
    step.v = kvarn::token_major<const float>(v.data(), tokens, heads, channels);
    step.q = kvarn::token_major<const float>(q.data(), tokens, query_heads, channels);
    step.out = kvarn::token_major(out.data(), tokens, query_heads, channels);
    return step;
}

void append(const serving& s, account& a, kvarn::sequence_id id, std::size_t tokens, unsigned seed, std::size_t commit)
{
    kvarn::cache_pool pool = s.pool;
    a.expect(pool.reserve(id, tokens));
    std::vector<float> k, v, q, out;
    std::vector<std::byte> plan_memory;
    for (std::size_t layer = 0; layer < serving::layers; ++layer) {
        const kvarn::sequence_step step = step_of(id, k, v, q, out, tokens, seed + 100 * static_cast<unsigned>(layer));
        plan_memory.resize(kvarn::layer_memory_bytes(pool, {&step, 1}, {}));
        const auto items = kvarn::plan_layer(pool, layer, {&step, 1}, {}, plan_memory);
        a.expect(items.error);
        if (items) a.expect(items->run(a.scratch));
        a.values.insert(a.values.end(), out.begin(), out.end());
    }
    a.expect(pool.commit(id, commit));
}

void read_all(const serving& s, account& a, kvarn::sequence_id id)
{
    const std::size_t tokens = s.pool.tokens(id);
    std::vector<float> k(tokens * serving::channels), v(k.size());
    for (std::size_t layer = 0; layer < serving::layers; ++layer)
        for (std::size_t head = 0; head < heads; ++head) {
            a.expect(kvarn::read(s.pool, id, layer, head, 0, 1 << 20, kvarn::token_major(k.data(), tokens, 1, serving::channels),
                                 kvarn::token_major(v.data(), tokens, 1, serving::channels), a.scratch));
            a.values.insert(a.values.end(), k.begin(), k.end());
            a.values.insert(a.values.end(), v.begin(), v.end());
        }
}

/// The whole life of sequences of one thread, twice over. `shared` is this thread's fork of a prefix that all of them have.
account live(const serving& s, unsigned worker, kvarn::sequence_id shared)
{
    kvarn::cache_pool pool = s.pool;
    account a;
    a.scratch.resize(kvarn::cache_scratch_bytes(s.config));
    // Tiles of the prefix become records in whichever thread comes first.
    a.expect(pool.reserve(shared, 1));
    a.expect(pool.truncate(shared, pool.next_position(shared)));
    a.expect(kvarn::seal(pool, shared, a.scratch).error);
    for (unsigned round = 0; round < 2; ++round) {
        const unsigned seed = 1000 * worker + 10 * round;
        const auto id = pool.open();
        a.expect(id.error);
        append(s, a, *id, 50, seed, 50);
        append(s, a, *id, 60, seed + 1, 60);
        a.expect(kvarn::seal(pool, *id, a.scratch).error);
        append(s, a, *id, 5, seed + 2, 2);  // drafts that are taken back
        a.expect(pool.truncate(*id, 70));   // into a record
        append(s, a, *id, 40, seed + 3, 40);
        const auto branch = pool.fork(*id);
        a.expect(branch.error);
        append(s, a, *branch, 30, seed + 4, 30);
        append(s, a, *id, 30, seed + 5, 30);
        a.expect(pool.erase(*id, 40, 45));
        a.expect(pool.evict_front(*id, 10));
        a.expect(kvarn::seal(pool, *id, a.scratch).error);
        a.expect(kvarn::seal(pool, *branch, a.scratch).error);
        a.expect(pool.statistics(*id).error);
        a.refused += pool.statistics().sequences == 0;
        append(s, a, *id, 1, seed + 6, 1);
        append(s, a, *branch, 1, seed + 7, 1);
        read_all(s, a, *id);
        read_all(s, a, *branch);
        a.expect(pool.close(*id));
        a.expect(pool.close(*branch));
    }
    append(s, a, shared, 9, 77 + worker, 9);
    return a;
}

/// Sequences of one pool in threads of their own, and forks of one prefix.
void sequences()
{
    std::vector<account> alone(workers), seen(workers);
    std::size_t records[2] = {}, exact[2] = {};
    for (const bool together_now : {false, true}) {
        serving s;
        account a;
        a.scratch.resize(kvarn::cache_scratch_bytes(s.config));
        const auto prefix = s.pool.open();
        for (unsigned i = 0; i < 3; ++i) append(s, a, *prefix, 50, 5 + i, 50);
        std::vector<kvarn::sequence_id> forks;
        for (unsigned w = 0; w < workers; ++w) forks.push_back(*s.pool.fork(*prefix));
        if (together_now) together([&](unsigned w) { seen[w] = live(s, w, forks[w]); });
        else
            for (unsigned w = 0; w < workers; ++w) alone[w] = live(s, w, forks[w]);
        check(a.refused == 0, "one thread makes a prefix");
        // When a shared tile is sealed depends on the threads, what becomes of it does not.
        for (unsigned w = 0; w < workers; ++w) {
            account& mine = together_now ? seen[w] : alone[w];
            mine.values.resize(mine.values.size() - serving::layers * 9 * 2 * heads * serving::channels);
            mine.expect(kvarn::seal(s.pool, forks[w], mine.scratch).error);
            read_all(s, mine, forks[w]);
        }
        records[together_now] = s.pool.statistics().records.used;
        exact[together_now] = s.pool.statistics().exact.used;
        check(s.pool.close(*prefix) == kvarn::status::ok, "the prefix is closed");
        for (const auto id : forks) check(s.pool.close(id) == kvarn::status::ok, "a fork is closed");
        check(s.pool.statistics().records.used == 0 && s.pool.statistics().exact.used == 0, "all blocks are free in the end");
    }
    for (unsigned w = 0; w < workers; ++w) {
        check(alone[w].refused == 0, "one thread serves");
        check(seen[w].refused == 0, "several threads serve");
        check(alone[w].values.size() == seen[w].values.size() &&
                  std::memcmp(alone[w].values.data(), seen[w].values.data(), alone[w].values.size() * sizeof(float)) == 0,
              "sequences do not depend on those of other threads");
    }
    check(records[0] == records[1] && exact[0] == exact[1], "blocks do not depend on the threads");
}

/// Items of one layer's plan and of the queue of tiles, all threads on the same sequences.
void steps()
{
    constexpr std::size_t batch = 3;
    std::vector<float> results[2];
    for (const bool together_now : {false, true}) {
        serving s;
        account a;
        a.scratch.resize(kvarn::cache_scratch_bytes(s.config));
        std::vector<kvarn::sequence_id> ids;
        for (unsigned i = 0; i < batch; ++i) {
            ids.push_back(*s.pool.open());
            append(s, a, ids[i], 60, 3 * i, 60);
            append(s, a, ids[i], 60 + 10 * i, 3 * i + 1, 60 + 10 * i);
        }
        std::atomic<std::size_t> refused{0};
        const auto run_items = [&](std::size_t items, auto&& item) {
            std::atomic<std::size_t> next{0};
            const auto work = [&](unsigned) {
                std::vector<std::byte> mine(kvarn::cache_scratch_bytes(s.config));
                for (std::size_t i; (i = next.fetch_add(1)) < items;) refused += item(i, std::span(mine)) != kvarn::status::ok;
            };
            if (together_now) together(work);
            else work(0);
        };
        for (unsigned round = 0; round < 4; ++round) {
            for (const auto id : ids) {
                refused += s.pool.reserve(id, 1 + round) != kvarn::status::ok;
                refused += !kvarn::begin_seal(s.pool, id, 1);
            }
            std::vector<float> k[batch], v[batch], q[batch], out[batch];
            const std::size_t sealing = kvarn::seal_items(s.pool);
            for (std::size_t layer = 0; layer < serving::layers; ++layer) {
                std::vector<kvarn::sequence_step> plan;
                for (unsigned i = 0; i < batch; ++i)
                    plan.push_back(step_of(ids[i], k[i], v[i], q[i], out[i], 1 + round, 500 * i + 10 * round + static_cast<unsigned>(layer)));
                kvarn::layer_options options;
                options.threads = workers;
                std::vector<std::byte> memory(kvarn::layer_memory_bytes(s.pool, plan, options));
                const auto items = kvarn::plan_layer(s.pool, layer, plan, options, memory);
                refused += !items;
                if (!items) continue;
                run_items(items->store_items(), [&](std::size_t i, std::span<std::byte>) { return items->store_item(i); });
                // Tiles are encoded beside attention.
                const std::size_t attending = items->attend_items(), first = layer == 0 ? 0 : sealing / 2, last = layer == 0 ? sealing / 2 : sealing;
                run_items(attending + last - first, [&](std::size_t i, std::span<std::byte> scratch) {
                    return i < attending ? items->attend_item(i, scratch) : kvarn::seal_item(s.pool, first + i - attending, scratch);
                });
                run_items(items->finish_items(), [&](std::size_t i, std::span<std::byte> scratch) { return items->finish_item(i, scratch); });
                for (const auto& each : out) results[together_now].insert(results[together_now].end(), each.begin(), each.end());
            }
            for (const auto id : ids) refused += s.pool.commit(id, 1 + round) != kvarn::status::ok;
            check(kvarn::finish_seal(s.pool, sealing).dropped == 0, "tiles in the queue are sealed");
        }
        for (const auto id : ids) {
            read_all(s, a, id);
            check(s.pool.statistics(id)->sealed_tokens >= 64, "there are records");
        }
        results[together_now].insert(results[together_now].end(), a.values.begin(), a.values.end());
        check(refused == 0 && a.refused == 0, "items of steps and of the queue are done");
    }
    check(results[0].size() == results[1].size() && std::memcmp(results[0].data(), results[1].data(), results[0].size() * sizeof(float)) == 0,
          "steps do not depend on the threads");
}

}  // namespace

int main(int argc, char** argv)
{
    race = argc > 1 && std::strcmp(argv[1], "race") == 0;
    dispatch();
    cache c(*kvarn::parse_format("k4v2_g256", 32));
    for (const auto encoder : {kvarn::encoder::paper, kvarn::encoder::refined}) {
        kvarn::encode_options options;
        options.encoder = encoder;
        seal(c, options);
        open(c);
        attend(c);
    }
    sequences();
    steps();
    std::printf("%u threads, %d failures\n", workers, failures);
    return failures != 0;
}
