// SPDX-License-Identifier: Apache-2.0
// The CUDA kernels' speed on the GPU at hand: sealing and dequantizing against a device copy of as many bytes, decode attention on
// records against the faster of two paged fp16 ones over the same values (fp16_attention.cuh, fp16_tensor_attention.cuh). head_dim
// 128, group 128, 8 KV heads; sizes count tokens, r query heads of a KV head. Times are medians of runs in turn, of the whole
// call, its merging launch included. Nothing is flushed between runs: what fits the second-level cache (about 50 MB) is
// read from there, by both sides. Prints a table. Exit status: 0; 77 without a GPU; 1 if CUDA or a comparison fails, or the JSON
// file cannot be written.
//
//     cuda_bench [quick] [--json FILE]

#include <cuda_fp16.h>

#include <kvarn/cuda/attention.cuh>
#include <kvarn/cuda/dequantize.cuh>
#include <kvarn/cuda/seal.cuh>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <string>
#include <vector>

#include "fp16_tensor_attention.cuh"

namespace {

void check(cudaError_t e, const char* what)
{
    if (e == cudaSuccess) return;
    std::fprintf(stderr, "%s: %s\n", what, cudaGetErrorString(e));
    std::exit(1);
}
void check(kvarn::status s, const char* what)
{
    if (s == kvarn::status::ok) return;
    std::fprintf(stderr, "%s: %s\n", what, kvarn::message(s));
    std::exit(1);
}

template <class T>
struct device_array {
    T* data = nullptr;
    std::size_t size = 0;
    explicit device_array(std::size_t n) : size(n) { check(cudaMalloc(&data, n * sizeof(T)), "cudaMalloc"); }
    explicit device_array(const std::vector<T>& x) : device_array(x.size())
    {
        check(cudaMemcpy(data, x.data(), size * sizeof(T), cudaMemcpyHostToDevice), "cudaMemcpy");
    }
    device_array(const device_array&) = delete;
    device_array& operator=(const device_array&) = delete;
    ~device_array() { cudaFree(data); }
    [[nodiscard]] std::vector<T> host() const
    {
        std::vector<T> x(size);
        check(cudaMemcpy(x.data(), data, size * sizeof(T), cudaMemcpyDeviceToHost), "cudaMemcpy");
        return x;
    }
};

/// Roughly normal halves: the sum of four uniform numbers; every sixteenth channel is larger, as in real caches.
__global__ void fill_random(__half* x, std::size_t n, unsigned seed)
{
    for (std::size_t i = blockIdx.x * std::size_t{blockDim.x} + threadIdx.x; i < n; i += std::size_t{gridDim.x} * blockDim.x) {
        std::uint64_t z = (i + 1) * 0x9e3779b97f4a7c15u + seed;
        z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
        z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
        float sum = -2.0f;
        for (int k = 0; k < 4; ++k) sum += static_cast<float>(z >> (16 * k) & 0xffffu) * 0x1p-16f;
        x[i] = __float2half(sum * (i % 16 == 3 ? 8.0f : 1.7f));
    }
}

cudaStream_t stream;

/// Median microseconds of one run of each work, all in turn: five rounds at least, thirty at most, about 50 ms a work.
std::vector<double> microseconds(const std::vector<std::function<void()>>& works)
{
    cudaEvent_t begin, end;
    check(cudaEventCreate(&begin), "cudaEventCreate");
    check(cudaEventCreate(&end), "cudaEventCreate");
    std::vector<std::vector<float>> times(works.size());
    float spent = 0.0f;
    for (int round = -2; round < 30 && (round < 5 || spent < 50.0f * static_cast<float>(works.size())); ++round)
        for (std::size_t i = 0; i < works.size(); ++i) {
            check(cudaEventRecord(begin, stream), "cudaEventRecord");
            works[i]();
            check(cudaEventRecord(end, stream), "cudaEventRecord");
            check(cudaEventSynchronize(end), "cudaEventSynchronize");
            float ms = 0.0f;
            check(cudaEventElapsedTime(&ms, begin, end), "cudaEventElapsedTime");
            if (round >= 0) times[i].push_back(ms), spent += ms;
        }
    check(cudaGetLastError(), "kernel");
    cudaEventDestroy(begin);
    cudaEventDestroy(end);
    std::vector<double> medians;
    for (std::vector<float>& t : times) {
        std::sort(t.begin(), t.end());
        medians.push_back(1e3 * t[t.size() / 2]);
    }
    return medians;
}

constexpr int heads = 8, dim = 128, group = 128;
double copy_rate = 0.0;  // bytes per microsecond, read and written

/// One line of the table and of the JSON file.
struct measurement {
    std::string name;
    double us, bytes;
};
std::vector<measurement> measurements;

void print(const std::string& name, double us, double bytes)
{
    std::printf("%-44s %12.1f us %9.0f GB/s %6.2f of copy\n", name.c_str(), us, bytes / us * 1e-3, bytes / us / copy_rate);
    measurements.push_back({name, us, bytes});
}

kvarn::cuda::record_tiles<std::byte> pool(const kvarn::format& f, std::byte* data)
{
    const std::size_t one = kvarn::record_bytes(f);
    return {data, one * heads, one, one, nullptr};
}

template <class Void>
kvarn::cuda::token_tiles<Void> dense(Void* data)
{
    kvarn::cuda::token_tiles<Void> x;
    x.data = data;
    x.token_stride = heads * dim;
    x.head_stride = dim;
    return x;
}

void bench_tiles(const char* name, bool quick)
{
    const kvarn::format f = kvarn::parse_format(name, dim).value;
    const int tiles = quick ? 64 : 512;
    const auto elements = static_cast<std::size_t>(tiles) * group * heads * dim;
    device_array<__half> k(elements), v(elements);
    device_array<std::byte> records(kvarn::grid_bytes(f, static_cast<std::size_t>(tiles), heads));
    fill_random<<<1024, 256, 0, stream>>>(k.data, elements, 1);
    fill_random<<<1024, 256, 0, stream>>>(v.data, elements, 2);
    const double bytes = static_cast<double>(4 * elements + records.size);
    for (const bool refined : {false, true}) {
        kvarn::encode_options o;
        o.encoder = refined ? kvarn::encoder::refined : kvarn::encoder::paper;
        kvarn::cuda::seal_arguments a;
        a.k = dense<const void>(k.data);
        a.v = dense<const void>(v.data);
        a.records = pool(f, records.data);
        a.tiles = tiles;
        a.heads = heads;
        const double us = microseconds({[&] { check(kvarn::cuda::seal(f, a, o, stream), "seal"); }})[0];
        print(std::string("seal/") + (refined ? "refined/" : "paper/") + name, us, bytes);
    }
    for (const kvarn::basis wanted : {kvarn::basis::rotated, kvarn::basis::original}) {
        kvarn::cuda::dequantize_arguments a;
        const std::size_t one = kvarn::record_bytes(f);
        a.records = {records.data, one * heads, one, one, nullptr};
        a.k = dense<void>(k.data);
        a.v = dense<void>(v.data);
        a.tiles = tiles;
        a.heads = heads;
        a.wanted = wanted;
        const double us = microseconds({[&] { check(kvarn::cuda::dequantize(f, a, stream), "dequantize"); }})[0];
        print(std::string("dequantize/") + (wanted == kvarn::basis::rotated ? "rotated/" : "original/") + name, us, bytes);
    }
}

/// Records of `total` tiles of `kv_heads` heads: a few sealed ones, copied until the pool is full.
void fill_pool(const kvarn::format& f, int kv_heads, int total, const device_array<std::byte>& records)
{
    const std::size_t tile_bytes = kvarn::record_bytes(f) * static_cast<std::size_t>(kv_heads);
    const int made = std::min(total, 16), dk = f.key_channels(), dv = f.head_dim_v();
    const auto vectors = static_cast<std::size_t>(made) * static_cast<std::size_t>(f.group() * kv_heads);
    device_array<__half> k(vectors * static_cast<std::size_t>(dk)), v(vectors * static_cast<std::size_t>(dv) + 8);
    fill_random<<<1024, 256, 0, stream>>>(k.data, k.size, 3);
    fill_random<<<1024, 256, 0, stream>>>(v.data, v.size, 4);
    kvarn::cuda::seal_arguments a;
    a.k = {k.data, kvarn::cuda::element_type::f16, kv_heads * dk, dk, nullptr, 0, 0};
    a.v = {v.data, kvarn::cuda::element_type::f16, kv_heads * dv, dv, nullptr, 0, 0};
    a.records = {records.data, tile_bytes, kvarn::record_bytes(f), kvarn::record_bytes(f), nullptr};
    a.tiles = made;
    a.heads = kv_heads;
    device_array<float> workspace(
        kvarn::cuda::seal_workspace_bytes(f, made, kv_heads, kvarn::cuda::detail::device_shared_bytes()) / 4 + 4);
    a.workspace = workspace.data;
    check(kvarn::cuda::seal(f, a, {}, stream), "seal");
    for (int have = made; have < total;) {
        const int now = std::min(have, total - have);
        check(cudaMemcpyAsync(records.data + static_cast<std::size_t>(have) * tile_bytes, records.data,
                              static_cast<std::size_t>(now) * tile_bytes, cudaMemcpyDeviceToDevice, stream),
              "copy");
        have += now;
    }
    check(cudaStreamSynchronize(stream), "seal");
}

std::vector<std::int32_t> counted(std::size_t n)
{
    std::vector<std::int32_t> x(n);
    for (std::size_t i = 0; i < n; ++i) x[i] = static_cast<std::int32_t>(i);
    return x;
}

template <int Rows>
void launch_fp16(const bench::fp16_call& c, int sequences, bool tensor)
{
    const auto launch = [&](auto body) {
        using body_type = decltype(body);
        const auto kernel = bench::fp16_attention<body_type>;
        check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, body_type::shared_bytes),
              "shared memory");
        kernel<<<static_cast<unsigned>(sequences * c.kv_heads * c.splits), bench::fp16_threads, body_type::shared_bytes,
                 stream>>>(c);
    };
    if (tensor)
        launch(bench::fp16_tensor<Rows>{});
    else
        launch(bench::fp16_cores<Rows>{});
}

/// ||a - b|| / ||b||.
double difference(const device_array<__half>& a, const device_array<__half>& b)
{
    double error = 0.0, norm = 0.0;
    const std::vector<__half> mine = a.host(), theirs = b.host();
    for (std::size_t i = 0; i < mine.size(); ++i) {
        const double x = __half2float(mine[i]), y = __half2float(theirs[i]);
        error += (x - y) * (x - y);
        norm += y * y;
    }
    return std::sqrt(error / norm);
}

/// Attention on records and on the fp16 values that they decode to, for r = 1, 4, 8.
void bench_attention(const char* name, int sequences, int tokens, int multiprocessors)
{
    const kvarn::format f = kvarn::parse_format(name, dim).value;
    const int tiles = tokens / group, total = tiles * sequences;
    const std::size_t one = kvarn::record_bytes(f), fp16_elements = static_cast<std::size_t>(total) * group * heads * dim;
    const std::string shape = "/b" + std::to_string(sequences) + "/n" + std::to_string(tokens);
    std::size_t free_bytes = 0, all_bytes = 0;
    check(cudaMemGetInfo(&free_bytes, &all_bytes), "cudaMemGetInfo");
    if (4 * fp16_elements + one * heads * static_cast<std::size_t>(total) > free_bytes / 10 * 9) {
        std::printf("attention/%s%s skipped: not enough memory\n", name, shape.c_str());
        return;
    }
    const device_array<std::byte> records(one * heads * static_cast<std::size_t>(total));
    fill_pool(f, heads, total, records);
    device_array<__half> k(fp16_elements), v(fp16_elements);
    kvarn::cuda::dequantize_arguments decode;
    decode.records = {records.data, one * heads, one, one, nullptr};
    decode.k = dense<void>(k.data);
    decode.v = dense<void>(v.data);
    decode.tiles = total;
    decode.heads = heads;
    check(kvarn::cuda::dequantize(f, decode, stream), "dequantize");
    const device_array<std::int32_t> record_table(counted(static_cast<std::size_t>(total))),
        page_table(counted(static_cast<std::size_t>(total) * (group / bench::fp16_page_tokens))),
        counts(std::vector<std::int32_t>(static_cast<std::size_t>(sequences), tiles));

    for (const int r : {1, 4, 8}) {
        const std::string label = std::string(name) + "/r" + std::to_string(r) + shape;
        const auto vectors = static_cast<std::size_t>(sequences * heads * r);
        device_array<__half> q(vectors * dim), out(vectors * dim), fp16_out(vectors * dim);
        fill_random<<<64, 256, 0, stream>>>(q.data, q.size, 5);
        kvarn::cuda::attention_arguments a;
        a.q = {q.data, kvarn::cuda::element_type::f16, heads * r * dim, heads * r * dim, dim};
        a.out = {out.data, kvarn::cuda::element_type::f16, heads * r * dim, heads * r * dim, dim};
        a.records = {records.data, one * heads, one, record_table.data, counts.data, tiles};
        a.sequences = sequences;
        a.kv_heads = heads;
        a.heads_per_kv = r;
        a.splits = kvarn::cuda::suggested_splits(sequences, heads, r, tiles, multiprocessors);
        device_array<float> workspace(kvarn::cuda::attention_workspace_bytes(f, sequences, heads, r, a.splits) / 4);
        a.workspace = workspace.data;

        const int splits = std::max(1, std::min(tokens / 64, 8 * multiprocessors / (sequences * heads) + 1));
        device_array<float> fp16_workspace(bench::fp16_workspace_floats(vectors, splits));
        const bench::fp16_call c{reinterpret_cast<const kvarn::half*>(k.data),
                                 reinterpret_cast<const kvarn::half*>(v.data),
                                 page_table.data,
                                 reinterpret_cast<const kvarn::half*>(q.data),
                                 fp16_workspace.data,
                                 heads,
                                 tokens / bench::fp16_page_tokens,
                                 tokens,
                                 splits,
                                 kvarn::cuda::detail::log2_e / std::sqrt(static_cast<float>(dim))};
        kvarn::cuda::batch_vectors<void> to = a.out;
        to.data = fp16_out.data;
        const auto merge = bench::fp16_combine_call(c, sequences, r, to);
        const auto fp16 = [&](bool tensor) {
            if (r == 1)
                launch_fp16<1>(c, sequences, tensor);
            else if (r == 4)
                launch_fp16<4>(c, sequences, tensor);
            else
                launch_fp16<8>(c, sequences, tensor);
            kvarn::cuda::detail::combine_kernel<kvarn::cuda::detail::block_team>
                <<<static_cast<unsigned>(vectors), kvarn::cuda::detail::combine_threads,
                   kvarn::cuda::detail::combine_shared_bytes(dim), stream>>>(merge);
        };
        const std::vector<double> us = microseconds(
            {[&] { check(kvarn::cuda::attend(f, a, stream), "attend"); }, [&] { fp16(false); }, [&] { fp16(true); }});
        const bool tensor = us[2] < us[1];
        const double fp16_us = std::min(us[1], us[2]), apart = difference(out, fp16_out);
        print("attention/" + label, us[0], static_cast<double>(one) * heads * total);
        print("attention/fp16/" + label, fp16_us, static_cast<double>(4 * fp16_elements));
        std::printf("%-44s %12.2f times fp16's speed (%s), outputs differ by %.1e\n", "", fp16_us / us[0],
                    tensor ? "tensor cores" : "CUDA cores", apart);
        if (!(apart < 1e-2)) {
            std::fprintf(stderr, "the two attentions disagree\n");
            std::exit(1);
        }
        if (r != 4) continue;
        // The same with exact sink and tail tokens, which real caches have: 128 and 64 of them.
        constexpr int sinks = 128, tails = 64;
        const device_array<std::int32_t> exact_table(counted(static_cast<std::size_t>(sequences))),
            sink_counts(std::vector<std::int32_t>(static_cast<std::size_t>(sequences), sinks)),
            tail_counts(std::vector<std::int32_t>(static_cast<std::size_t>(sequences), tails));
        const auto pages = [&](const device_array<std::int32_t>& tokens_of) {
            constexpr std::ptrdiff_t token = heads * dim, page = 128 * token;
            return kvarn::cuda::exact_pages{k.data,
                                            v.data,
                                            kvarn::cuda::element_type::f16,
                                            page,
                                            token,
                                            dim,
                                            page,
                                            token,
                                            dim,
                                            exact_table.data,
                                            tokens_of.data,
                                            1,
                                            128};
        };
        a.sink = pages(sink_counts);
        a.tail = pages(tail_counts);
        const double exact_us = microseconds({[&] { check(kvarn::cuda::attend(f, a, stream), "attend"); }})[0];
        print("attention/exact/" + label, exact_us,
              static_cast<double>(one) * heads * total + 4.0 * (sinks + tails) * sequences * heads * dim);
    }
}

/// Latent attention: 512 quantized channels and 64 exact ones, V read from K, one KV head.
void bench_latent(int sequences, int tokens, int r, int multiprocessors)
{
    kvarn::format_spec spec;
    spec.head_dim_k = 512;
    spec.head_dim_v = 512;
    spec.key_bits = 4;
    spec.value_bits = 0;
    spec.group = 64;
    spec.exact_channels = 64;
    const kvarn::format f = kvarn::make_format(spec).value;
    const std::string label =
        "attention/latent/k4/r" + std::to_string(r) + "/b" + std::to_string(sequences) + "/n" + std::to_string(tokens);
    const kvarn::cuda::support s =
        kvarn::cuda::supports(f, kvarn::cuda::operation::attend, kvarn::cuda::detail::device_shared_bytes());
    if (!s) {
        std::printf("%s skipped: %s\n", label.c_str(), s.reason);
        return;
    }
    const int tiles = tokens / f.group(), total = tiles * sequences, channels = f.key_channels();
    const std::size_t one = kvarn::record_bytes(f);
    const device_array<std::byte> records(one * static_cast<std::size_t>(total));
    fill_pool(f, 1, total, records);
    const auto vectors = static_cast<std::size_t>(sequences * r);
    device_array<__half> q(vectors * static_cast<std::size_t>(channels)), out(vectors * 512);
    fill_random<<<64, 256, 0, stream>>>(q.data, q.size, 6);
    const device_array<std::int32_t> table(counted(static_cast<std::size_t>(total))),
        counts(std::vector<std::int32_t>(static_cast<std::size_t>(sequences), tiles));
    kvarn::cuda::attention_arguments a;
    a.q = {q.data, kvarn::cuda::element_type::f16, r * channels, r * channels, channels};
    a.out = {out.data, kvarn::cuda::element_type::f16, r * 512, r * 512, 512};
    a.records = {records.data, one, one, table.data, counts.data, tiles};
    a.sequences = sequences;
    a.kv_heads = 1;
    a.heads_per_kv = r;
    a.splits = kvarn::cuda::suggested_splits(sequences, 1, r, tiles, multiprocessors);
    device_array<float> workspace(kvarn::cuda::attention_workspace_bytes(f, sequences, 1, r, a.splits) / 4);
    a.workspace = workspace.data;
    print(label, microseconds({[&] { check(kvarn::cuda::attend(f, a, stream), "attend"); }})[0],
          static_cast<double>(one) * total);
}

bool write_json(const char* path, const std::string& card)
{
    std::FILE* const file = std::fopen(path, "w");
    if (file == nullptr) return false;
    std::fprintf(file, "{\"card\": \"%s\", \"copy_gb_per_s\": %.1f, \"rows\": [", card.c_str(), copy_rate * 1e-3);
    for (std::size_t i = 0; i < measurements.size(); ++i)
        std::fprintf(file, "%s\n  {\"name\": \"%s\", \"us\": %.2f, \"bytes\": %.0f}", i == 0 ? "" : ",",
                     measurements[i].name.c_str(), measurements[i].us, measurements[i].bytes);
    std::fprintf(file, "\n]}\n");
    const bool written = std::ferror(file) == 0;
    return std::fclose(file) == 0 && written;
}

}  // namespace

int main(int argc, char** argv)
{
    bool quick = false;
    const char* json = nullptr;
    for (int i = 1; i < argc; ++i) {
        const std::string argument = argv[i];
        if (argument == "quick") {
            quick = true;
        } else if (argument == "--json" && i + 1 < argc) {
            json = argv[++i];
        } else {
            std::fprintf(stderr, "cuda_bench [quick] [--json FILE]\n");
            return 1;
        }
    }
    int devices = 0;
    const cudaError_t found = cudaGetDeviceCount(&devices);
    if (found != cudaSuccess || devices == 0) {
        std::printf("skipped: no CUDA device (%s)\n",
                    found == cudaSuccess ? "the driver reports none" : cudaGetErrorString(found));
        return 77;
    }
    cudaDeviceProp properties;
    check(cudaGetDeviceProperties(&properties, 0), "cudaGetDeviceProperties");
    int driver = 0, clock = 0, memory_clock = 0;
    check(cudaDriverGetVersion(&driver), "cudaDriverGetVersion");
    check(cudaDeviceGetAttribute(&clock, cudaDevAttrClockRate, 0), "clock");
    check(cudaDeviceGetAttribute(&memory_clock, cudaDevAttrMemoryClockRate, 0), "memory clock");
    const std::string card = std::string(properties.name) + ", " + std::to_string(properties.multiProcessorCount) +
                             " multiprocessors, sm_" + std::to_string(properties.major) + std::to_string(properties.minor) +
                             ", at most " + std::to_string(clock / 1000) + " and " + std::to_string(memory_clock / 1000) +
                             " MHz, driver " + std::to_string(driver / 1000) + "." + std::to_string(driver % 1000 / 10);
    std::printf("%s\n", card.c_str());
    check(cudaStreamCreate(&stream), "cudaStreamCreate");

    {
        const std::size_t bytes = std::size_t{quick ? 64u : 512u} << 20;
        device_array<std::byte> from(bytes), to(bytes);
        fill_random<<<1024, 256, 0, stream>>>(reinterpret_cast<__half*>(from.data), bytes / 2, 9);
        const double us = microseconds(
            {[&] { check(cudaMemcpyAsync(to.data, from.data, bytes, cudaMemcpyDeviceToDevice, stream), "copy"); }})[0];
        copy_rate = 2.0 * static_cast<double>(bytes) / us;
        print("copy", us, 2.0 * static_cast<double>(bytes));
    }
    for (const char* name : {"k4v2_g128", "k4v4_g128", "k2v2_g128", "k8v8_g128"}) bench_tiles(name, quick);
    const std::vector<int> depths = quick ? std::vector<int>{1024, 8192} : std::vector<int>{1024, 4096, 32768, 131072};
    const std::vector<int> batches = quick ? std::vector<int>{1, 8} : std::vector<int>{1, 8, 64};
    for (const char* name : {"k4v2_g128", "k4v4_g128", "k2v2_g128", "k8v8_g128"})
        for (const int n : depths)
            for (const int b : batches) bench_attention(name, b, n, properties.multiProcessorCount);
    for (const int n : depths)
        for (const int r : {16, 128}) bench_latent(8, n, r, properties.multiProcessorCount);
    check(cudaStreamDestroy(stream), "cudaStreamDestroy");
    if (json != nullptr && !write_json(json, card)) {
        std::fprintf(stderr, "%s: cannot be written\n", json);
        return 1;
    }
    return 0;
}
