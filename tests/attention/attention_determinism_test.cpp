// SPDX-License-Identifier: Apache-2.0
// Attention gives the same bits however its chunks are spread over items and threads, however a run of records is cut into segments,
// on every instruction set, and under any floating-point settings of the caller.

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <deque>
#include <limits>
#include <thread>
#include <vector>

#include "../catch.hpp"
#include "../support/attention.hpp"

#if defined(__SSE__)
#include <xmmintrin.h>
#endif

namespace {

using kvarn::basis;
using support::attention_outcome;
using support::attention_query;
using support::format_of;
using support::kv_history;
using support::record_storage;

std::vector<kvarn::format> test_formats()
{
    return {format_of(128, 128, 4, 2, 128),
            format_of(64, 64, 2, 4, 64),
            format_of(36, 36, 3, 3, 32),
            format_of(100, 44, 5, 6, 32, false, 4),
            format_of(80, 112, 6, 8, 64),
            format_of(72, 256, 8, 2, 256),
            format_of(512, 512, 4, 0, 32, true, 64),
            format_of(576, 64, 2, 2, 32),
            format_of(48, 56, 4, 4, 64, false, 12),
            format_of(40, 40, 6, 0, 64)};
}

/// Several sequences in one batch: long and short histories, one without tokens, one without queries.
struct batch {
    kvarn::format format;
    std::deque<kv_history> histories;
    std::vector<attention_query> queries;

    explicit batch(const kvarn::format& f, std::uint64_t seed) : format(f)
    {
        const std::size_t per_chunk = kvarn::chunk_tokens / static_cast<std::size_t>(f.group());
        const auto add = [&](std::size_t sink, std::size_t tiles, std::size_t tail, std::size_t m, std::size_t r) {
            kv_history& h = histories.emplace_back(f, seed);
            if (sink != 0) h.add_exact(sink, basis::rotated);
            if (tiles != 0) h.add_tiles(tiles, support::all_record_storages[histories.size() % 4]);
            if (tail != 0) h.add_exact(tail);
            queries.push_back(support::random_query(f, m, r, seed + 1));
            seed += 2;
        };
        add(4, 3 * per_chunk + 3, 40, 1, 4);
        add(0, 0, 0, 2, 2);
        add(0, per_chunk, 0, 3, 2);
        add(7, 1, 1030, 1, 3);
        add(3, 1, 3, 0, 4);
        queries[3].sink_logits = {0.25f, -1.0f, 2.0f};
    }

    template <class Arch = kvarn::simd::native_arch>
    [[nodiscard]] std::vector<attention_outcome> attend_all(const kvarn::attention_options& options) const
    {
        std::vector<attention_outcome> all;
        for (std::size_t i = 0; i < queries.size(); ++i) {
            attention_query x = queries[i];
            x.options = options;
            all.push_back(support::attend<Arch>(format, histories[i].segments(), x));
        }
        return all;
    }

    /// The same through items: in random order, on `threads` threads (0: this one).
    template <class Arch = kvarn::simd::native_arch>
    [[nodiscard]] std::vector<attention_outcome> attend_items(const kvarn::attention_options& options,
                                                              std::size_t chunks_per_item, std::size_t threads,
                                                              std::uint64_t seed) const
    {
        std::deque<support::attention_memory> memories;
        std::vector<kvarn::attention_task> tasks;
        std::size_t most_rows = 0;
        for (std::size_t i = 0; i < queries.size(); ++i) {
            memories.emplace_back(format, queries[i]);
            tasks.push_back(memories.back().task(histories[i].segments()));
            most_rows = std::max(most_rows, queries[i].rows());
        }
        const std::size_t items = kvarn::attention_items(tasks, chunks_per_item);
        std::vector<std::size_t> order(items);
        for (std::size_t i = 0; i < items; ++i) order[i] = i;
        support::random_source random(seed);
        for (std::size_t i = items; i > 1; --i) std::swap(order[i - 1], order[random.below(i)]);

        support::guarded_bytes workspace(kvarn::attention_workspace_bytes(format, tasks), 1 + seed % 63);
        std::atomic<std::size_t> next{0}, next_task{0}, refused{0};
        std::atomic<bool> intact{true};
        const auto on_threads = [&](auto&& work) {
            if (threads == 0) return work();
            std::vector<std::thread> all;
            for (std::size_t t = 0; t < threads; ++t) all.emplace_back(work);
            for (std::thread& t : all) t.join();
        };
        on_threads([&] {
            support::guarded_bytes scratch(kvarn::attention_scratch_bytes(format, most_rows));
            for (std::size_t i = next++; i < items; i = next++)
                if (kvarn::attend_item<Arch>(format, tasks, options, order[i], chunks_per_item, workspace.span(),
                                             scratch.span()) != kvarn::status::ok)
                    ++refused;
            if (!scratch.intact()) intact = false;
        });
        on_threads([&] {
            support::guarded_bytes scratch(kvarn::attention_scratch_bytes(format, most_rows));
            for (std::size_t i = next_task++; i < tasks.size(); i = next_task++)
                if (kvarn::combine_items<Arch>(format, tasks, options, i, workspace.span(), scratch.span()) != kvarn::status::ok)
                    ++refused;
            if (!scratch.intact()) intact = false;
        });
        std::vector<attention_outcome> all;
        for (const auto& m : memories)
            all.push_back(
                m.outcome(refused == 0 ? kvarn::status::ok : kvarn::status::bad_argument, intact && workspace.intact()));
        return all;
    }
};

bool same(const std::vector<attention_outcome>& a, const std::vector<attention_outcome>& b)
{
    bool all = a.size() == b.size();
    for (std::size_t i = 0; all && i < a.size(); ++i) all = a[i].intact && b[i].intact && support::same_bits(a[i], b[i]);
    return all;
}

}  // namespace

TEST_CASE("attention/determinism: items of any size in any order", "[unit]")
{
    for (const kvarn::format& f :
         {format_of(64, 64, 4, 2, 128), format_of(36, 48, 3, 5, 32, false, 4), format_of(64, 64, 2, 0, 64)}) {
        const batch b(f, 1000);
        kvarn::attention_options options;
        for (const kvarn::precision p : {kvarn::precision::exact, kvarn::precision::fast}) {
            options.precision = p;
            options.window = p == kvarn::precision::fast ? 1500 : 0;
            const auto wanted = b.attend_all(options);
            for (const auto& one : wanted) REQUIRE(one.status == kvarn::status::ok);
            for (const std::size_t chunks_per_item : {1u, 2u, 3u, 7u, 100u})
                for (const std::uint64_t seed : {1u, 2u}) {
                    INFO(support::describe(f) << ", " << chunks_per_item << " chunks an item");
                    CHECK(same(b.attend_items(options, chunks_per_item, 0, seed), wanted));
                }
            CHECK(same(b.attend_items(options, SIZE_MAX, 0, 3), wanted));
        }
    }
}

TEST_CASE("attention/determinism: the number of items", "[unit]")
{
    const kvarn::format f = format_of(64, 64, 4, 2, 32);
    kv_history history(f, 1010);
    history.add_exact(1);                             // 1 chunk
    history.add_tiles(2 * kvarn::chunk_tokens / 32);  // 2
    history.add_exact(kvarn::chunk_tokens + 1);       // 2
    history.add_exact(0);                             // none
    const auto x = support::random_query(f, 1, 1, 1011);
    support::attention_memory memory(f, x);
    kvarn::attention_task task = memory.task(history.segments());
    const kvarn::attention_task tasks[] = {task, task};
    for (const auto& [chunks_per_item, wanted] :
         {std::pair{1u, 5u}, std::pair{2u, 3u}, std::pair{3u, 2u}, std::pair{4u, 2u}, std::pair{5u, 1u}}) {
        CHECK(kvarn::attention_items({tasks, 1}, chunks_per_item) == wanted);
        CHECK(kvarn::attention_items(tasks, chunks_per_item) == 2 * wanted);
    }
    CHECK(kvarn::attention_items(tasks) == 4);
    CHECK(kvarn::attention_items({}) == 0);
}

TEST_CASE("attention/determinism: any number of threads", "[unit]")
{
    const kvarn::format f = format_of(64, 96, 4, 2, 64, true, 4);
    const batch b(f, 1020);
    const kvarn::attention_options options;
    const auto wanted = b.attend_all(options);
    for (std::size_t threads = 1; threads <= 4; ++threads)
        for (const std::size_t chunks_per_item : {1u, 2u}) {
            INFO(threads << " threads");
            CHECK(same(b.attend_items(options, chunks_per_item, threads, threads), wanted));
        }
}

TEST_CASE("attention/determinism: a run of records cut at multiples of the chunk", "[unit]")
{
    for (const kvarn::format& f : {format_of(64, 64, 4, 2, 32), format_of(64, 64, 3, 4, 256), format_of(40, 40, 5, 0, 128)}) {
        const std::size_t per_chunk = kvarn::chunk_tokens / static_cast<std::size_t>(f.group()), tiles = 3 * per_chunk + 1;
        kv_history history(f, 1030);
        history.add_exact(5);
        history.add_tiles(tiles, record_storage::table);
        history.add_exact(20);
        const auto x = support::random_query(f, 2, 3, 1031);
        const auto wanted = support::attend(f, history.segments(), x);
        REQUIRE(wanted.status == kvarn::status::ok);
        const kvarn::kv_segment& run = history.segments()[1];
        for (unsigned cuts = 1; cuts < 8; ++cuts) {
            std::vector<kvarn::kv_segment> segments{history.segments()[0]};
            for (std::size_t begin = 0, end; begin < tiles; begin = end) {
                end = begin + per_chunk;
                while (end < tiles && !(cuts >> (end / per_chunk - 1) & 1u)) end += per_chunk;
                end = std::min(end, tiles);
                segments.push_back(kvarn::paged_tiles(f, run.data, run.stride, {run.table + begin, end - begin}));
            }
            segments.push_back(history.segments()[2]);
            INFO(support::describe(f) << ", " << segments.size() << " segments");
            CHECK(segments.size() > 3);
            CHECK(support::same_bits(support::attend(f, segments, x), wanted));
        }
    }
}

TEST_CASE("attention/determinism: every instruction set gives the same bits", "[unit]")
{
    std::uint64_t seed = 1040;
    for (const kvarn::format& f : test_formats()) {
        kv_history history(f, seed);
        history.add_exact(5, basis::rotated, support::element_kind::f16);
        history.add_tiles(2, record_storage::list);
        history.add_exact(39, basis::original, support::element_kind::bf16, support::storage::scattered);
        attention_query x = support::random_query(f, 3, 5, seed + 1, 2.0);
        seed += 2;
        for (int variant = 0; variant < 3; ++variant)
            for (const kvarn::precision p : support::all_precisions) {
                x.options.precision = p;
                x.options.logit_soft_cap = variant == 1 ? 4.0f : 0.0f;
                x.options.window = variant == 2 ? 50 : 0;
                x.options.output_basis = variant == 2 ? basis::rotated : basis::original;
                x.sink_logits = variant == 1
                                    ? std::vector<float>{0.5f, 1.0f, -std::numeric_limits<float>::infinity(), -3.0f, 2.0f}
                                    : std::vector<float>{};
                const auto wanted = support::attend<kvarn::simd::portable>(f, history.segments(), x);
                REQUIRE(wanted.status == kvarn::status::ok);
                support::for_each_arch([&](auto arch) {
                    INFO(kvarn::simd::arch_traits<decltype(arch)>::name << ", " << support::describe(f) << ", "
                                                                        << support::describe(x));
                    const auto got = support::attend<decltype(arch)>(f, history.segments(), x);
                    CHECK(got.intact);
                    CHECK(support::same_bits(got, wanted));
                });
            }
    }
}

TEST_CASE("attention/determinism: every instruction set gives the same bits through items", "[unit]")
{
    for (const kvarn::format& f : {format_of(64, 64, 4, 2, 128), format_of(56, 36, 5, 3, 64, true, 4)}) {
        const batch b(f, 1070);
        const kvarn::attention_options options;
        const auto wanted = b.attend_all<kvarn::simd::portable>(options);
        support::for_each_arch([&](auto arch) {
            INFO(kvarn::simd::arch_traits<decltype(arch)>::name << ", " << support::describe(f));
            CHECK(same(b.attend_items<decltype(arch)>(options, 2, 0, 7), wanted));
        });
    }
}

TEST_CASE("attention/determinism: one row alone is the same as among others", "[unit]")
{
    // Rows are served four, two and one at a time; which of these must not show.
    const kvarn::format f = format_of(64, 80, 4, 4, 64);
    kv_history history(f, 1080);
    history.add_exact(3);
    history.add_tiles(2);
    attention_query x = support::random_query(f, 1, 7, 1081);
    x.first_position = 100;
    for (const kvarn::precision p : support::all_precisions) {
        x.options.precision = p;
        const auto all = support::attend(f, history.segments(), x);
        for (std::size_t row = 0; row < 7; ++row) {
            attention_query one = x;
            one.heads = 1;
            one.q.assign(x.q.begin() + static_cast<std::ptrdiff_t>(row) * 64,
                         x.q.begin() + static_cast<std::ptrdiff_t>(row + 1) * 64);
            const auto got = support::attend(f, history.segments(), one);
            CHECK(std::equal(got.out.begin(), got.out.end(), all.out.begin() + static_cast<std::ptrdiff_t>(row) * 80));
            CHECK(got.log_sum_exp[0] == all.log_sum_exp[row]);
        }
    }
}

#if defined(__SSE__)
TEST_CASE("attention/determinism: flush-to-zero and rounding modes of the caller change nothing", "[unit]")
{
    constexpr unsigned standard = 0x1f80u, flush_to_zero = 0x8000u, denormals_are_zero = 0x0040u, down = 0x2000u, up = 0x4000u;
    const auto attend_with = [](unsigned setting, auto arch, const kvarn::format& f, support::attention_memory& memory,
                                const kvarn::attention_task& task, const kvarn::attention_options& options, unsigned& after) {
        using arch_type = decltype(arch);
        support::guarded_bytes scratch(kvarn::attention_scratch_bytes(f, task.q.tokens * task.q.heads)),
            more(scratch.span().size());
        support::guarded_bytes workspace(kvarn::attention_workspace_bytes(f, {&task, 1}));
        const unsigned before = _mm_getcsr();
        _mm_setcsr(setting);
        kvarn::status s = kvarn::attend<arch_type>(f, task, options, scratch.span());
        after = _mm_getcsr();
        _mm_setcsr(before);
        const attention_outcome whole = memory.outcome(s, scratch.intact());
        for (std::size_t i = 0; i < kvarn::attention_items({&task, 1}, 1); ++i) {
            _mm_setcsr(setting);
            s = kvarn::attend_item<arch_type>(f, {&task, 1}, options, i, 1, workspace.span(), more.span());
            after |= _mm_getcsr();
            _mm_setcsr(before);
            if (s != kvarn::status::ok) return attention_outcome{s, {}, {}, false};
        }
        _mm_setcsr(setting);
        s = kvarn::combine_items<arch_type>(f, {&task, 1}, options, 0, workspace.span(), more.span());
        after |= _mm_getcsr();
        _mm_setcsr(before);
        const attention_outcome items = memory.outcome(s, more.intact());
        return support::same_bits(whole, items) ? whole : attention_outcome{kvarn::status::corrupt, {}, {}, false};
    };
    // Values that make denormal weights, products and outputs.
    for (const kvarn::format& f : {format_of(64, 64, 4, 2, 32), format_of(36, 36, 5, 0, 32)})
        for (const float gain : {1.0f, 40.0f, 1e-38f}) {
            kv_history history(f, 1090);
            history.add_exact(9, basis::original, support::element_kind::f32, support::storage::dense, static_cast<double>(gain));
            history.add_tiles(3);
            attention_query x = support::random_query(f, 1, 3, 1091, static_cast<double>(gain));
            for (const kvarn::precision p : support::all_precisions) {
                x.options.precision = p;
                support::for_each_arch([&](auto arch) {
                    support::attention_memory memory(f, x);
                    const kvarn::attention_task task = memory.task(history.segments());
                    unsigned after = 0;
                    const auto wanted = attend_with(standard, arch, f, memory, task, x.options, after);
                    REQUIRE(wanted.status == kvarn::status::ok);
                    for (const unsigned setting : {standard | flush_to_zero | denormals_are_zero, standard | flush_to_zero,
                                                   standard | denormals_are_zero, standard | down, standard | up,
                                                   standard | down | up | flush_to_zero | denormals_are_zero, standard | 0x3fu}) {
                        INFO(kvarn::simd::arch_traits<decltype(arch)>::name << ", " << support::describe(f) << ", gain " << gain
                                                                            << ", register " << setting);
                        const auto got = attend_with(setting, arch, f, memory, task, x.options, after);
                        CHECK(after == setting);
                        CHECK(support::same_bits(got, wanted));
                    }
                });
            }
        }
}
#endif
