// SPDX-License-Identifier: Apache-2.0
// Rotation, normalisation, seal and dequantization for head_dim 64, 128 and 256, group 128, beside memcpy and the textbook form.
// Names: <stage>/<op>/<type>/d<head_dim>/k<bits>v<bits>/n<tokens>/<arch>. Counters: bytes per second of 16-bit elements moved
// (memcpy: bytes written), tokens per second. Run with --benchmark_enable_random_interleaving=true and compare within one run.

#include <cstring>
#include <random>
#include <string>
#include <vector>

#include <benchmark/benchmark.h>

#include <kvarn/kvarn.hpp>

#include "textbook.hpp"

namespace {

constexpr int group = 128;
constexpr std::size_t tiles = 8;  // 8 tiles of one head: input and output of head_dim 128 are 256 KiB each in half
using native = kvarn::simd::native_arch;

struct data {
    explicit data(int head_dim, const char* name)
        : format(*kvarn::parse_format(name, head_dim)), tokens(tiles * group), k(tokens * static_cast<std::size_t>(head_dim)),
          out(k.size()), floats(k.size()), out_floats(k.size()), records(kvarn::grid_bytes(format, tiles, 1)),
          scratch(kvarn::scratch_bytes(format))
    {
        std::mt19937 engine(1);
        std::normal_distribution<float> normal;
        for (std::size_t i = 0; i < k.size(); ++i) {
            const std::size_t t = i / static_cast<std::size_t>(head_dim), d = i % static_cast<std::size_t>(head_dim);
            floats[i] = normal(engine) * (d % 37 == 3 ? 8.0f : 1.0f) * (t % 50 == 0 ? 4.0f : 1.0f);
            k[i] = kvarn::to_half(floats[i]);
        }
        (void)kvarn::quantize_kv(format, view(k), view(k), grid(), scratch);
    }
    template <class T>
    kvarn::kv_view<T> view(std::vector<T>& x)
    {
        return kvarn::head_major(x.data(), tokens, 1, x.size() / tokens);
    }
    kvarn::record_grid<std::byte> grid() { return kvarn::tile_major_records(format, records.data(), records.size(), tiles, 1); }

    kvarn::format format;
    std::size_t tokens;
    std::vector<kvarn::half> k, out;
    std::vector<float> floats, out_floats;
    std::vector<std::byte> records, scratch;
};

void count(benchmark::State& state, std::size_t bytes, std::size_t tokens)
{
    const double runs = static_cast<double>(state.iterations());
    state.counters["bytes/s"] = benchmark::Counter(static_cast<double>(bytes) * runs, benchmark::Counter::kIsRate);
    state.counters["tokens/s"] = benchmark::Counter(static_cast<double>(tokens) * runs, benchmark::Counter::kIsRate);
}

std::string title(const char* stage_and_type, int d, const char* bits, const char* arch)
{
    return std::string(stage_and_type) + "/d" + std::to_string(d) + "/" + bits + "/n" + std::to_string(tiles * group) + "/" + arch;
}

template <class F>
void add(const std::string& name, int d, const char* format, F body)
{
    benchmark::RegisterBenchmark(name.c_str(), [=](benchmark::State& state) {
        data x(d, format);
        for (auto _ : state) {
            body(x);
            benchmark::ClobberMemory();
        }
        count(state, x.k.size() * 2, x.tokens);
    });
}

void add_all(int d)
{
    const char* const arch = kvarn::simd::arch_traits<native>::name;
    const char* const both = "k4v4_g128";

    add(title("copy/memcpy/half", d, "k16v16", "libc"), d, both, [](data& x) { std::memcpy(x.out.data(), x.k.data(), x.k.size() * 2); });
    add(title("copy/memcpy/float", d, "k32v32", "libc"), d, both,
        [](data& x) { std::memcpy(x.out_floats.data(), x.floats.data(), x.floats.size() * 4); });

    add(title("rotate/hadamard/float", d, "k32v32", arch), d, both, [](data& x) { (void)kvarn::rotate(x.view(x.out_floats)); });
    add(title("rotate/hadamard/half", d, "k16v16", arch), d, both, [](data& x) { (void)kvarn::rotate(x.view(x.out)); });
    add(title("rotate/textbook/float", d, "k32v32", "compiler"), d, both, [d](data& x) {
        for (std::size_t i = 0; i < x.out_floats.size(); i += static_cast<std::size_t>(d)) textbook::hadamard(x.out_floats.data() + i, d);
    });

    // Normalisation alone, of rotated V tiles [token][channel]; the padding is the library's own.
    add(title("normalize/variance/float", d, "k32v32", arch), d, both, [d](data& x) {
        const std::ptrdiff_t stride = d + 16;
        static std::vector<float> tile, factors;
        tile.assign(static_cast<std::size_t>(group * stride), 0.0f);
        factors.resize(kvarn::variance_floats(group, d));
        for (std::size_t n = 0; n < tiles; ++n) {
            for (int t = 0; t < group; ++t)
                std::memcpy(tile.data() + t * stride, x.floats.data() + (n * group + static_cast<std::size_t>(t)) * static_cast<std::size_t>(d),
                            static_cast<std::size_t>(d) * 4);
            kvarn::normalize_variance<native>(tile.data(), stride, group, d, 8, 8, 1.0f, kvarn::place_variance_factors(factors.data(), group, d));
        }
    });
    add(title("normalize/textbook/float", d, "k32v32", "compiler"), d, both, [d](data& x) {
        textbook::tile t(group, d);
        for (std::size_t n = 0; n < tiles; ++n) {
            std::memcpy(t.m.data(), x.floats.data() + n * t.size(), t.size() * 4);
            textbook::normalize(t);
        }
    });

    for (const int bits : {4, 2}) {
        const std::string keys = std::string("k") + std::to_string(bits) + "v0", values = "k0v" + std::to_string(bits);
        const char* const only_keys = bits == 4 ? "k4v0_g128" : "k2v0_g128";
        const char* const format = bits == 4 ? "k4v4_g128" : "k2v2_g128";
        const kvarn::kv_view<kvarn::half> none{};
        for (const auto encoder : {kvarn::encoder::paper, kvarn::encoder::refined}) {
            kvarn::encode_options how;
            how.encoder = encoder;
            const std::string name = encoder == kvarn::encoder::paper ? "paper" : "refined";
            add(title(("seal/" + name + "_keys/half").c_str(), d, keys.c_str(), arch), d, only_keys,
                [=](data& x) { (void)kvarn::quantize_kv(x.format, x.view(x.k), none, x.grid(), x.scratch, how); });
            add(title(("seal/" + name + "/half").c_str(), d, bits == 4 ? "k4v4" : "k2v2", arch), d, format,
                [=](data& x) { (void)kvarn::quantize_kv(x.format, x.view(x.k), x.view(x.k), x.grid(), x.scratch, how); });
        }
        kvarn::encode_options refined;
        refined.encoder = kvarn::encoder::refined;
        add(title("seal/refined_errors/half", d, bits == 4 ? "k4v4" : "k2v2", arch), d, format, [=](data& x) {
            kvarn::record_errors errors[tiles];
            (void)kvarn::quantize_kv(x.format, x.view(x.k), x.view(x.k), x.grid(), x.scratch, refined, {}, errors);
        });
        add(title("seal/textbook/float", d, values.c_str(), "compiler"), d, format, [d, bits](data& x) {
            textbook::tile t(group, d);
            for (std::size_t n = 0; n < tiles; ++n)
                textbook::seal(x.floats.data() + n * t.size(), t, bits, reinterpret_cast<std::uint8_t*>(x.out.data()));
        });
        for (const auto basis : {kvarn::basis::rotated, kvarn::basis::original}) {
            const std::string op = basis == kvarn::basis::rotated ? "rotated" : "original";
            add(title(("dequantize/" + op + "/half").c_str(), d, keys.c_str(), arch), d, format,
                [=](data& x) { (void)kvarn::dequantize_kv(x.format, x.grid(), x.view(x.out), none, basis, x.scratch); });
            add(title(("dequantize/" + op + "/half").c_str(), d, values.c_str(), arch), d, format,
                [=](data& x) { (void)kvarn::dequantize_kv(x.format, x.grid(), none, x.view(x.out), basis, x.scratch); });
            add(title(("dequantize/" + op + "/float").c_str(), d, keys.c_str(), arch), d, format, [=](data& x) {
                (void)kvarn::dequantize_kv(x.format, x.grid(), x.view(x.out_floats), kvarn::kv_view<float>{}, basis, x.scratch);
            });
            add(title(("dequantize/" + op + "/float").c_str(), d, values.c_str(), arch), d, format, [=](data& x) {
                (void)kvarn::dequantize_kv(x.format, x.grid(), kvarn::kv_view<float>{}, x.view(x.out_floats), basis, x.scratch);
            });
        }
    }
}

}  // namespace

int main(int argc, char** argv)
{
    for (const int d : {64, 128, 256}) add_all(d);
    benchmark::Initialize(&argc, argv);
    if (benchmark::ReportUnrecognizedArguments(argc, argv)) return 1;
    benchmark::RunSpecifiedBenchmarks();
    benchmark::Shutdown();
    return 0;
}
