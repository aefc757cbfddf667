// SPDX-License-Identifier: Apache-2.0
// One binary for many processors: this file is compiled for the lowest one, kvarn_add_kernels (CMakeLists.txt) compiles kvarn's
// functions for several instruction sets, and kvarn::dispatched takes the best that the running processor has.
//
//   multi_isa [repetitions] [instruction set]
//
// Seals and dequantizes the same tiles with each set, then with the dispatched one (or the one named), and runs a small cache. All must agree.
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include <kvarn/dispatch/cache.hpp>
#include <kvarn/dispatch/calls.hpp>

namespace {

unsigned long long fnv(const void* data, std::size_t bytes)
{
    unsigned long long hash = 0xcbf29ce484222325ull;
    for (std::size_t i = 0; i < bytes; ++i) hash = (hash ^ static_cast<const unsigned char*>(data)[i]) * 0x100000001b3ull;
    return hash;
}

/// K and V of some full tiles, their records, scratch.
class tile_buffers {
public:
    explicit tile_buffers(const kvarn::format& format)
        : format_(format), k_(heads * tokens() * dim()), v_(k_), k_back_(k_), v_back_(k_),
          records_(kvarn::grid_bytes(format, tiles, heads)), scratch_(kvarn::scratch_bytes(format))
    {
        std::uint32_t state = 1;
        const auto next = [&state] { return static_cast<float>((state = state * 1664525u + 1013904223u) >> 8) * 0x1p-23f - 1.0f; };
        for (std::size_t i = 0; i < k_.size(); ++i) {
            const float outlier = i % dim() == 3 ? 20.0f : 1.0f;  // K has channels like that
            k_[i] = kvarn::to_half(outlier * (next() + next()));
            v_[i] = kvarn::to_half(next() + next() * next());
        }
    }

    kvarn::status seal()
    {
        return kvarn::dispatched::quantize_kv(format_, view(k_), view(v_), grid(), scratch_);
    }

    kvarn::status open()
    {
        return kvarn::dispatched::dequantize_kv(format_, grid(), view(k_back_), view(v_back_), kvarn::basis::original, scratch_);
    }

    static constexpr std::size_t records() { return tiles * heads; }
    unsigned long long record_digest() const { return fnv(records_.data(), records_.size()); }
    unsigned long long value_digest() const
    {
        return fnv(k_back_.data(), 2 * k_back_.size()) ^ fnv(v_back_.data(), 2 * v_back_.size()) << 1;
    }

private:
    static constexpr std::size_t tiles = 2, heads = 4;

    std::size_t tokens() const { return tiles * static_cast<std::size_t>(format_.group()); }
    std::size_t dim() const { return static_cast<std::size_t>(format_.head_dim_k()); }
    kvarn::kv_view<kvarn::half> view(std::vector<kvarn::half>& x) const { return kvarn::token_major(x.data(), tokens(), heads, dim()); }
    kvarn::record_grid<std::byte> grid() { return kvarn::tile_major_records(format_, records_.data(), records_.size(), tiles, heads); }

    kvarn::format format_;
    std::vector<kvarn::half> k_, v_, k_back_, v_back_;
    std::vector<std::byte> records_, scratch_;
};

/// A digest of what attention gives while a sequence of a cache grows and its tiles are sealed; 0 where a call fails.
unsigned long long cache_digest(const kvarn::format& format)
{
    kvarn::cache_config config;
    config.policy = kvarn::make_policy(format, 1, 1).value;
    config.most_tokens = 512;
    config.most_step = 100;
    const auto plan = kvarn::plan_cache(config);
    if (!plan) return 0;
    std::vector<std::byte> memory(plan->bytes()), scratch(kvarn::cache_scratch_bytes(config));
    std::vector<std::byte> work(kvarn::layer_memory_bound(config, 1, 1, 1));
    const auto pool = kvarn::make_pool(config, memory);
    if (!pool) return 0;
    kvarn::cache_pool cache = *pool;
    const auto sequence = cache.open();
    if (!sequence) return 0;
    const auto dim = static_cast<std::size_t>(format.head_dim_k());
    std::vector<float> x(100 * dim), out(dim);
    unsigned long long digest = 1;
    for (std::size_t step = 0; step < 3; ++step) {
        for (std::size_t i = 0; i < x.size(); ++i) x[i] = static_cast<float>((i * 2654435761u + step * 40503u) % 1999u) * 0x1p-9f - 2.0f;
        kvarn::sequence_step s;
        s.sequence = *sequence;
        s.k = s.v = kvarn::token_major<const float>(x.data(), 100, 1, dim);
        s.q = kvarn::token_major<const float>(x.data(), 1, 1, dim);
        s.out = kvarn::token_major(out.data(), 1, 1, dim);
        if (cache.reserve(*sequence, 100) != kvarn::status::ok) return 0;
        const auto items = kvarn::plan_layer(cache, 0, {&s, 1}, {}, work);
        if (!items || kvarn::dispatched::run(*items, scratch) != kvarn::status::ok) return 0;
        if (cache.commit(*sequence, 100) != kvarn::status::ok || !kvarn::dispatched::seal(cache, *sequence, scratch)) return 0;
        digest = digest * 31 + fnv(out.data(), out.size() * sizeof(float));
    }
    return digest;
}

/// Microseconds for one record, the best of some repetitions; 0 without repetitions. Clears `ok` on any error.
template <class F>
double time_of(int repetitions, bool& ok, F&& f)
{
    using clock = std::chrono::steady_clock;
    double best = 0;
    for (int i = 0; i <= repetitions; ++i) {  // the first one only warms up
        const auto start = clock::now();
        if (f() != kvarn::status::ok) ok = false;
        const double time = std::chrono::duration<double, std::micro>(clock::now() - start).count() / static_cast<double>(tile_buffers::records());
        if (i != 0 && (best == 0 || time < best)) best = time;
    }
    return best;
}

struct digests {
    unsigned long long records = 0, values = 0, cache = 0;
    bool ok = true;
};

digests measure(const char* label, const kvarn::format& format, int repetitions)
{
    tile_buffers tiles(format);
    digests d;
    const double seal = time_of(repetitions, d.ok, [&] { return tiles.seal(); });
    const double open = time_of(repetitions, d.ok, [&] { return tiles.open(); });
    d.records = tiles.record_digest();
    d.values = tiles.value_digest();
    d.cache = cache_digest(format);
    d.ok = d.ok && d.cache != 0;
    std::printf("%-10s %-9s %9.1f %9.1f  %016llx  %016llx  %016llx%s\n", label, kvarn::active_arch_name(), seal, open, d.records, d.values,
                d.cache, d.ok ? "" : "  failed");
    return d;
}

}  // namespace

int main(int argc, char** argv)
{
    const auto format = kvarn::parse_format("k4v2_g128", 128);
    if (!format) return std::puts(kvarn::message(format.error)), 1;
    const int repetitions = argc > 1 ? std::atoi(argv[1]) : 20;

    const char* wanted = kvarn::active_arch_name();  // what dispatch chose for this processor
    if (argc > 2) {
        wanted = argv[2];
        if (kvarn::select_arch(wanted) != kvarn::status::ok) {
            std::printf("%s is not built in, or not for this processor\n", wanted);
            return 3;
        }
    }

    std::printf("%-10s %-9s %9s %9s  %-16s  %-16s  %-16s\n", "", "set", "seal us", "open us", "records", "values", "cache");
    std::vector<digests> all;
    kvarn::for_each_arch([&](auto arch) {
        const bool selected = kvarn::select_arch(kvarn::simd::arch_traits<decltype(arch)>::name) == kvarn::status::ok;
        all.push_back(measure("each", *format, repetitions));
        all.back().ok = all.back().ok && selected;
    });
    const bool restored = kvarn::select_arch(wanted) == kvarn::status::ok;
    all.push_back(measure("dispatched", *format, repetitions));

    bool same = restored;
    for (const digests& d : all) same = same && d.ok && d.records == all[0].records && d.values == all[0].values && d.cache == all[0].cache;
    std::puts(same ? "the same bytes everywhere" : "FAILED: the instruction sets disagree");
    return same ? 0 : 1;
}
