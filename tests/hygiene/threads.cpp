// SPDX-License-Identifier: Apache-2.0
// Everything that docs/embedding.md lets several threads do at once, for ThreadSanitizer: ranges of quantize_kv and dequantize_kv through
// the pool of the examples, work items of attention, the first dispatch. What they write must be what one thread writes, bit for bit.
// With the argument `race` there is one, to see that it is found.

#include <atomic>
#include <cstdio>
#include <cstring>
#include <latch>
#include <thread>
#include <vector>

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
    std::printf("%u threads, %d failures\n", workers, failures);
    return failures != 0;
}
