// SPDX-License-Identifier: Apache-2.0
// Decode attention over records beside a tuned fp16 attention over an uncompressed cache, in one program and interleaved.
// Names: attention/decode/<precision>/d<head_dim>/k<bits>v<bits>/r<query heads per KV head>/n<tokens>/<arch>. One iteration is one decoding
// step of one layer: 8 KV heads of `n` tokens, group 128, queries and output in the rotated basis. Each step takes the next layer of a
// pool larger than the caches, as a model does. Counters: tokens/s (tokens of history times KV heads), bytes/s (of cache read), error (relative, against float weights).
// Run with --benchmark_enable_random_interleaving=true and compare within one run; bench/report makes the tables.

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <map>
#include <random>
#include <span>
#include <string>
#include <type_traits>
#include <vector>

#include <benchmark/benchmark.h>

#include <kvarn/attention.hpp>
#include <kvarn/quantize.hpp>

#include "fp16_attention.hpp"
#include "token_major_attention.hpp"

namespace {

using native = kvarn::simd::native_arch;
constexpr std::size_t kv_heads = 8;

/// Tokens of one KV head in a pool: 256 MiB of fp16 at head_dim 128.
constexpr std::size_t pool_tokens(int head_dim) { return kv_heads * (head_dim == 128 ? 65536u : 32768u); }

std::vector<float> normal_floats(std::size_t n, unsigned seed, float scale)
{
    std::mt19937 engine(seed);
    std::normal_distribution<float> normal;
    std::vector<float> x(n);
    for (float& v : x) v = scale * normal(engine);
    return x;
}

/// K and V in half, [head][token][channel], the same 64 tiles over and over.
const std::vector<kvarn::half>& half_pool(int head_dim)
{
    static std::map<int, std::vector<kvarn::half>> pools;
    auto& pool = pools[head_dim];
    if (pool.empty()) {
        pool.resize(2 * pool_tokens(head_dim) * static_cast<std::size_t>(head_dim));
        const auto some = normal_floats(64u * 128u * static_cast<std::size_t>(head_dim), 1, 1.0f);
        std::vector<kvarn::half> block(some.size());
        std::transform(some.begin(), some.end(), block.begin(), [](float x) { return kvarn::to_half(x); });
        for (std::size_t at = 0; at < pool.size(); at += block.size())
            std::memcpy(pool.data() + at, block.data(), std::min(block.size(), pool.size() - at) * sizeof(kvarn::half));
    }
    return pool;
}

/// Records of the same tiles, 64 different ones over and over.
std::span<const std::byte> record_pool(const kvarn::format& f, const std::string& name)
{
    static std::map<std::string, std::vector<std::byte>> pools;
    auto& pool = pools[name];
    if (pool.empty()) {
        const auto d = static_cast<std::size_t>(f.head_dim_k());
        const auto group = static_cast<std::size_t>(f.group());
        constexpr std::size_t tiles = 64;
        auto k = normal_floats(tiles * group * d, 1, 1.0f), v = normal_floats(tiles * group * d, 2, 1.0f);
        std::vector<std::byte> block(kvarn::grid_bytes(f, tiles, 1)), scratch(kvarn::scratch_bytes(f));
        (void)kvarn::quantize_kv(f, kvarn::head_major(k.data(), tiles * group, 1, d), kvarn::head_major(v.data(), tiles * group, 1, d),
                                 kvarn::tile_major_records(f, block.data(), block.size(), tiles, 1), scratch);
        pool.resize(pool_tokens(f.head_dim_k()) / group * kvarn::record_bytes(f));
        for (std::size_t at = 0; at < pool.size(); at += block.size())
            std::memcpy(pool.data() + at, block.data(), std::min(block.size(), pool.size() - at));
    }
    return pool;
}

void count(benchmark::State& state, std::size_t tokens, std::size_t bytes)
{
    const double runs = static_cast<double>(state.iterations());
    state.counters["bytes/s"] = benchmark::Counter(static_cast<double>(bytes) * runs, benchmark::Counter::kIsRate);
    state.counters["tokens/s"] = benchmark::Counter(static_cast<double>(tokens) * runs, benchmark::Counter::kIsRate);
}

std::string title(const char* precision, int d, const std::string& bits, std::size_t r, std::size_t n, const char* arch)
{
    std::string name("attention/decode/");
    name.append(precision).append("/d").append(std::to_string(d)).append("/").append(bits);
    name.append("/r").append(std::to_string(r)).append("/n").append(std::to_string(n)).append("/").append(arch);
    return name;
}

/// One step over an uncompressed cache, the next layer of the pool each time. attend(K and V of the layer, query head 0's q, out).
template <class Attend>
void add_uncompressed(const char* name, int head_dim, std::size_t r, std::size_t n, Attend attend)
{
    benchmark::RegisterBenchmark(title(name, head_dim, "k16v16", r, n, kvarn::simd::arch_traits<native>::name).c_str(), [=](benchmark::State& state) {
        const auto& pool = half_pool(head_dim);
        const auto d = static_cast<std::size_t>(head_dim);
        const auto q = normal_floats(kv_heads * r * d, 3, 1.0f / std::sqrt(static_cast<float>(head_dim)));
        std::vector<float> out(q.size());
        const std::size_t one = 2 * kv_heads * n * d, layers = pool.size() / one;
        std::size_t layer = 0;
        for (auto _ : state) {
            attend(pool.data() + layer * one, q.data(), out.data());
            benchmark::ClobberMemory();
            layer = (layer + 1) % layers;
        }
        count(state, kv_heads * n, 2 * one);
    });
}

/// The tuned baseline: [KV head][K, V][token][channel]. Eight, four, two or one query heads share a pass; other numbers are made of these.
template <int HeadDim>
void add_fp16(std::size_t r, std::size_t n)
{
    add_uncompressed("fp16", HeadDim, r, n, [=](const kvarn::half* layer, const float* q, float* out) {
        for (std::size_t h = 0; h < kv_heads; ++h) {
            const kvarn::half *const k = layer + h * 2 * n * HeadDim, *const v = k + n * HeadDim;
            for (std::size_t left = r, at = h * r * HeadDim; left != 0;) {
                const auto pass = [&](auto rows) {
                    kvarn_bench::fp16_attention<HeadDim, rows()>(k, v, n, q + at, out + at);
                    left -= rows();
                    at += rows() * HeadDim;
                };
                if (left >= 8) pass(std::integral_constant<int, 8>{});
                else if (left >= 4) pass(std::integral_constant<int, 4>{});
                else if (left >= 2) pass(std::integral_constant<int, 2>{});
                else pass(std::integral_constant<int, 1>{});
            }
        }
    });
}

/// The layout and the loops of engines with a token-major cache: [token][KV head][channel], one query head at a time.
void add_token_major(int head_dim, std::size_t r, std::size_t n)
{
    add_uncompressed("fp16_token_major", head_dim, r, n, [=](const kvarn::half* layer, const float* q, float* out) {
        const std::size_t d = static_cast<std::size_t>(head_dim), stride = kv_heads * d;
        for (std::size_t h = 0; h < kv_heads; ++h)
            for (std::size_t i = 0; i < r; ++i) {
                const std::size_t at = (h * r + i) * d;
                kvarn_bench::token_major_attention(layer + h * d, layer + n * stride + h * d, n, static_cast<std::ptrdiff_t>(stride), head_dim,
                                                   q + at, out + at);
            }
    });
}

/// The steps of one format: attends to head `h` of layer `layer`.
struct decoder {
    decoder(int head_dim, const std::string& bits, std::size_t r, std::size_t n)
        : format(*kvarn::parse_format(bits + "_g128", head_dim)), d(static_cast<std::size_t>(head_dim)), heads(r), tiles(n / 128),
          pool(record_pool(format, bits + "d" + std::to_string(head_dim))), q(normal_floats(kv_heads * r * d, 3, 1.0f)), out(q.size()),
          scratch(kvarn::attention_scratch_bytes(format, r))
    {
        options.query_basis = options.output_basis = kvarn::basis::rotated;
    }
    [[nodiscard]] std::size_t layer_bytes() const { return kv_heads * tiles * kvarn::record_bytes(format); }
    [[nodiscard]] std::size_t layers() const { return pool.size() / layer_bytes(); }

    void step(std::size_t layer)
    {
        for (std::size_t h = 0; h < kv_heads; ++h) {
            const std::byte* const records = pool.data() + layer * layer_bytes() + h * tiles * kvarn::record_bytes(format);
            const auto grid = kvarn::head_major_records(format, records, tiles * kvarn::record_bytes(format), tiles, 1);
            const std::array history{kvarn::sealed_tiles(format, grid, 0)};
            kvarn::attention_task task;
            task.history = history;
            task.q = kvarn::head_major(static_cast<const float*>(q.data() + h * heads * d), 1, heads, d);
            task.out = kvarn::head_major(out.data() + h * heads * d, 1, heads, d);
            if (kvarn::attend(format, task, options, scratch) != kvarn::status::ok) std::abort();
        }
    }

    kvarn::format format;
    std::size_t d, heads, tiles;
    std::span<const std::byte> pool;
    std::vector<float> q, out;
    std::vector<std::byte> scratch;
    kvarn::attention_options options;
};

double relative_error(const std::vector<float>& a, const std::vector<float>& b)
{
    double difference = 0, size = 0;
    for (std::size_t i = 0; i < a.size(); ++i) {
        difference += (static_cast<double>(a[i]) - b[i]) * (static_cast<double>(a[i]) - b[i]);
        size += static_cast<double>(b[i]) * b[i];
    }
    return std::sqrt(difference / size);
}

void add(int head_dim, const std::string& bits, std::size_t r, std::size_t n, kvarn::precision precision, const char* name)
{
    benchmark::RegisterBenchmark(title(name, head_dim, bits, r, n, kvarn::simd::arch_traits<native>::name).c_str(), [=](benchmark::State& state) {
        decoder x(head_dim, bits, r, n);
        x.options.precision = kvarn::precision::exact;
        x.step(0);
        const std::vector<float> exact = x.out;
        x.options.precision = precision;
        x.step(0);
        const double error = relative_error(x.out, exact);
        const std::size_t layers = x.layers();
        std::size_t layer = 0;
        for (auto _ : state) {
            x.step(layer);
            benchmark::ClobberMemory();
            layer = (layer + 1) % layers;
        }
        count(state, kv_heads * n, x.layer_bytes());
        state.counters["error"] = error;
    });
}

/// What an engine without attention on records does: decode to half, then attend to that.
void add_decode_first(std::size_t n)
{
    benchmark::RegisterBenchmark(title("dequantized", 128, "k4v2", 1, n, kvarn::simd::arch_traits<native>::name).c_str(), [n](benchmark::State& state) {
        decoder x(128, "k4v2", 1, n);
        std::vector<kvarn::half> k(n * 128), v(n * 128);
        std::vector<std::byte> scratch(kvarn::scratch_bytes(x.format));
        std::size_t layer = 0;
        for (auto _ : state) {
            for (std::size_t h = 0; h < kv_heads; ++h) {
                const std::byte* const records = x.pool.data() + layer * x.layer_bytes() + h * x.tiles * kvarn::record_bytes(x.format);
                const auto grid = kvarn::head_major_records(x.format, records, x.tiles * kvarn::record_bytes(x.format), x.tiles, 1);
                (void)kvarn::dequantize_kv(x.format, grid, kvarn::head_major(k.data(), n, 1, 128), kvarn::head_major(v.data(), n, 1, 128),
                                           kvarn::basis::rotated, scratch);
                kvarn_bench::fp16_attention<128, 1>(k.data(), v.data(), n, x.q.data() + h * 128, x.out.data() + h * 128);
            }
            benchmark::ClobberMemory();
            layer = (layer + 1) % x.layers();
        }
        count(state, kv_heads * n, x.layer_bytes());
    });
}

}  // namespace

int main(int argc, char** argv)
{
    using kvarn::precision;
    constexpr std::size_t depth = 16384;  // of all but the first sweep
    for (const std::size_t n : {512u, 4096u, 16384u, 65536u})
        for (const std::size_t r : {1u, 2u, 4u, 8u}) {
            add_fp16<128>(r, n);
            for (const char* bits : {"k8v8", "k4v4", "k4v2", "k2v2"}) add(128, bits, r, n, precision::fine, "fine");
        }
    for (const std::size_t r : {1u, 2u, 4u, 8u})
        for (const char* bits : {"k4v4", "k4v2", "k2v2"}) {
            add(128, bits, r, depth, precision::fast, "fast");
            add(128, bits, r, depth, precision::exact, "exact");
        }
    // Other numbers of query heads, and what other engines do.
    for (const std::size_t r : {3u, 6u, 16u}) {
        add_fp16<128>(r, depth);
        for (const precision p : {precision::fine, precision::fast}) add(128, "k4v2", r, depth, p, p == precision::fine ? "fine" : "fast");
    }
    for (const std::size_t r : {1u, 4u, 8u}) add_token_major(128, r, depth);
    add_token_major(64, 4, depth);
    // The other widths and head dimensions.
    for (const std::size_t r : {1u, 4u})
        for (const char* bits : {"k3v3", "k5v5", "k6v6", "k3v2", "k6v4"}) add(128, bits, r, depth, precision::fine, "fine");
    for (const std::size_t r : {1u, 2u, 4u, 8u}) {
        add_fp16<64>(r, depth);
        add_fp16<80>(r, depth);
        add_fp16<96>(r, depth);
        add_fp16<256>(r, depth);
        for (const char* bits : {"k4v4", "k4v2", "k2v2"})
            for (const precision p : {precision::fine, precision::fast}) add(64, bits, r, depth, p, p == precision::fine ? "fine" : "fast");
    }
    for (const int d : {80, 96, 112, 192, 256, 512, 576})
        for (const std::size_t r : {1u, 4u}) add(d, "k4v2", r, depth, precision::fine, "fine");
    add_decode_first(16384);
    benchmark::Initialize(&argc, argv);
    if (benchmark::ReportUnrecognizedArguments(argc, argv)) return 1;
    benchmark::RunSpecifiedBenchmarks();
    benchmark::Shutdown();
    return 0;
}
