// SPDX-License-Identifier: Apache-2.0
// The CUDA kernels' speed on the GPU at hand: sealing and dequantizing against a device copy
// of as many bytes, decode attention on records against a paged fp16 one over the same values (fp16_attention.cuh). head_dim 128,
// group 128. Prints a table; times are medians. Exit status: 0; 77 without a GPU; 1 if CUDA or a comparison fails.
//
//     cuda_bench [quick]

#include <kvarn/cuda/attention.cuh>
#include <kvarn/cuda/dequantize.cuh>
#include <kvarn/cuda/seal.cuh>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "fp16_attention.cuh"

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

/// Median microseconds of one run of `work`.
template <class Work>
double microseconds(int runs, Work&& work)
{
    cudaEvent_t begin, end;
    check(cudaEventCreate(&begin), "cudaEventCreate");
    check(cudaEventCreate(&end), "cudaEventCreate");
    for (int i = 0; i < 3; ++i) work();
    std::vector<float> times;
    for (int i = 0; i < runs; ++i) {
        check(cudaEventRecord(begin, stream), "cudaEventRecord");
        work();
        check(cudaEventRecord(end, stream), "cudaEventRecord");
        check(cudaEventSynchronize(end), "cudaEventSynchronize");
        float ms = 0.0f;
        check(cudaEventElapsedTime(&ms, begin, end), "cudaEventElapsedTime");
        times.push_back(ms);
    }
    check(cudaGetLastError(), "kernel");
    cudaEventDestroy(begin);
    cudaEventDestroy(end);
    std::sort(times.begin(), times.end());
    return 1e3 * times[times.size() / 2];
}

constexpr int heads = 8, dim = 128, group = 128;
double copy_rate = 0.0;  // bytes per microsecond, read and written

void print(const std::string& name, double us, double bytes)
{
    std::printf("%-44s %12.1f us %9.0f GB/s %6.2f of copy\n", name.c_str(), us, bytes / us * 1e-3, bytes / us / copy_rate);
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
    const int tiles = quick ? 64 : 512, runs = quick ? 5 : 20;
    const auto elements = static_cast<std::size_t>(tiles) * group * heads * dim;
    device_array<__half> k(elements), v(elements);
    device_array<std::byte> records(kvarn::grid_bytes(f, static_cast<std::size_t>(tiles), heads));
    fill_random<<<1024, 256, 0, stream>>>(k.data, elements, 1);
    fill_random<<<1024, 256, 0, stream>>>(v.data, elements, 2);
    const double bytes = static_cast<double>(4 * elements + records.size);
    for (const bool refined : {false, true}) {
        kvarn::cuda::encode_options o;
        o.refined = refined;
        kvarn::cuda::seal_arguments a;
        a.k = dense<const void>(k.data);
        a.v = dense<const void>(v.data);
        a.records = pool(f, records.data);
        a.tiles = tiles;
        a.heads = heads;
        const double us = microseconds(runs, [&] { check(kvarn::cuda::seal(f, a, o, stream), "seal"); });
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
        const double us = microseconds(runs, [&] { check(kvarn::cuda::dequantize(f, a, stream), "dequantize"); });
        print(std::string("dequantize/") + (wanted == kvarn::basis::rotated ? "rotated/" : "original/") + name, us, bytes);
    }
}

/// Attention of one shape on records and on the fp16 values that they decode to.
void bench_attention(const char* name, int sequences, int tokens, int r, int multiprocessors, bool quick)
{
    const kvarn::format f = kvarn::parse_format(name, dim).value;
    const int tiles = tokens / group, total = tiles * sequences, runs = quick ? 5 : 30;
    const std::size_t one = kvarn::record_bytes(f), fp16_elements = static_cast<std::size_t>(total) * group * heads * dim;
    std::size_t free_bytes = 0, all_bytes = 0;
    check(cudaMemGetInfo(&free_bytes, &all_bytes), "cudaMemGetInfo");
    const std::string label =
        std::string(name) + "/r" + std::to_string(r) + "/b" + std::to_string(sequences) + "/n" + std::to_string(tokens);
    if (4 * fp16_elements + one * heads * static_cast<std::size_t>(total) > free_bytes / 10 * 8) {
        std::printf("attention/%s skipped: not enough memory\n", label.c_str());
        return;
    }
    // A few sealed tiles, copied until the pool is full; then the fp16 cache is what they decode to.
    device_array<std::byte> records(one * heads * static_cast<std::size_t>(total));
    const int made = std::min(total, 16);
    {
        const auto elements = static_cast<std::size_t>(made) * group * heads * dim;
        device_array<__half> k(elements), v(elements);
        fill_random<<<1024, 256, 0, stream>>>(k.data, elements, 3);
        fill_random<<<1024, 256, 0, stream>>>(v.data, elements, 4);
        kvarn::cuda::seal_arguments a;
        a.k = dense<const void>(k.data);
        a.v = dense<const void>(v.data);
        a.records = pool(f, records.data);
        a.tiles = made;
        a.heads = heads;
        check(kvarn::cuda::seal(f, a, {}, stream), "seal");
        check(cudaStreamSynchronize(stream), "seal");
    }
    for (int have = made; have < total;) {
        const int now = std::min(have, total - have);
        check(cudaMemcpyAsync(records.data + static_cast<std::size_t>(have) * one * heads, records.data,
                              static_cast<std::size_t>(now) * one * heads, cudaMemcpyDeviceToDevice, stream),
              "copy");
        have += now;
    }
    device_array<__half> k(fp16_elements), v(fp16_elements);
    kvarn::cuda::dequantize_arguments decode;
    decode.records = {records.data, one * heads, one, one, nullptr};
    decode.k = dense<void>(k.data);
    decode.v = dense<void>(v.data);
    decode.tiles = total;
    decode.heads = heads;
    check(kvarn::cuda::dequantize(f, decode, stream), "dequantize");

    const auto vectors = static_cast<std::size_t>(sequences * heads * r);
    device_array<__half> q(vectors * dim), out(vectors * dim), fp16_out(vectors * dim);
    fill_random<<<64, 256, 0, stream>>>(q.data, q.size, 5);
    std::vector<std::int32_t> table(static_cast<std::size_t>(total)),
        pages(static_cast<std::size_t>(total) * (group / bench::fp16_page_tokens));
    for (std::size_t i = 0; i < table.size(); ++i) table[i] = static_cast<std::int32_t>(i);
    for (std::size_t i = 0; i < pages.size(); ++i) pages[i] = static_cast<std::int32_t>(i);
    const device_array<std::int32_t> record_table(table), page_table(pages),
        counts(std::vector<std::int32_t>(static_cast<std::size_t>(sequences), tiles));

    kvarn::cuda::attention_arguments a;
    a.q = {q.data, kvarn::cuda::element_type::f16, heads * r * dim, heads * r * dim, dim};
    a.out = {out.data, kvarn::cuda::element_type::f16, heads * r * dim, heads * r * dim, dim};
    a.records = {records.data, one * heads, one, record_table.data, counts.data, tiles};
    a.sequences = sequences;
    a.kv_heads = heads;
    a.heads_per_kv = r;
    a.splits = kvarn::cuda::suggested_splits(f, sequences, heads, r, tiles, multiprocessors);
    device_array<float> workspace(kvarn::cuda::attention_workspace_bytes(f, sequences, heads, r, a.splits) / 4);
    a.workspace = workspace.data;
    const double us = microseconds(runs, [&] { check(kvarn::cuda::attend(f, a, stream), "attend"); });
    const double bytes = static_cast<double>(one) * heads * total;
    print("attention/" + label, us, bytes);

    const int splits = std::max(1, std::min(tokens / 64, 8 * multiprocessors / (sequences * heads) + 1));
    device_array<float> fp16_workspace(vectors * static_cast<std::size_t>(splits) * (dim + 2));
    const bench::fp16_call c{k.data,
                             v.data,
                             page_table.data,
                             q.data,
                             fp16_workspace.data,
                             heads,
                             tokens / bench::fp16_page_tokens,
                             tokens,
                             splits,
                             kvarn::cuda::detail::log2_e / std::sqrt(static_cast<float>(dim))};
    kvarn::cuda::detail::attention_call merge = kvarn::cuda::detail::make_attention_call(f, a);
    merge.a.workspace = fp16_workspace.data;
    merge.a.out.data = fp16_out.data;
    merge.a.splits = splits - 1;  // no part for exact tokens
    merge.out_rotation = 0.0f;
    const dim3 grid(static_cast<unsigned>(splits), heads, static_cast<unsigned>(sequences));
    const double fp16_us = microseconds(runs, [&] {
        if (r == 1)
            bench::fp16_attention<1><<<grid, bench::fp16_threads, 0, stream>>>(c);
        else if (r == 4)
            bench::fp16_attention<4><<<grid, bench::fp16_threads, 0, stream>>>(c);
        else
            bench::fp16_attention<8><<<grid, bench::fp16_threads, 0, stream>>>(c);
        kvarn::cuda::detail::combine_kernel<kvarn::cuda::detail::block_team>
            <<<static_cast<unsigned>(vectors), kvarn::cuda::detail::combine_threads, dim * 4, stream>>>(merge);
    });
    print("attention/fp16/" + label, fp16_us, static_cast<double>(4 * fp16_elements));

    double error = 0.0, norm = 0.0;
    const std::vector<__half> mine = out.host(), theirs = fp16_out.host();
    for (std::size_t i = 0; i < mine.size(); ++i) {
        const double x = __half2float(mine[i]), y = __half2float(theirs[i]);
        error += (x - y) * (x - y);
        norm += y * y;
    }
    const double relative = std::sqrt(error / norm);
    std::printf("%-44s %12.2f times fp16's speed, outputs differ by %.1e\n", "", fp16_us / us, relative);
    if (!(relative < 1e-2)) {
        std::fprintf(stderr, "the two attentions disagree\n");
        std::exit(1);
    }
}

}  // namespace

int main(int argc, char** argv)
{
    const bool quick = argc > 1 && std::string(argv[1]) == "quick";
    int devices = 0;
    const cudaError_t found = cudaGetDeviceCount(&devices);
    if (found != cudaSuccess || devices == 0) {
        std::printf("skipped: no CUDA device (%s)\n",
                    found == cudaSuccess ? "the driver reports none" : cudaGetErrorString(found));
        return 77;
    }
    cudaDeviceProp card;
    check(cudaGetDeviceProperties(&card, 0), "cudaGetDeviceProperties");
    int driver = 0, clock = 0, memory_clock = 0;
    check(cudaDriverGetVersion(&driver), "cudaDriverGetVersion");
    check(cudaDeviceGetAttribute(&clock, cudaDevAttrClockRate, 0), "clock");
    check(cudaDeviceGetAttribute(&memory_clock, cudaDevAttrMemoryClockRate, 0), "memory clock");
    std::printf("%s, %d multiprocessors, sm_%d%d, clocks %d and %d MHz, driver %d.%d\n", card.name, card.multiProcessorCount,
                card.major, card.minor, clock / 1000, memory_clock / 1000, driver / 1000, driver % 1000 / 10);
    check(cudaStreamCreate(&stream), "cudaStreamCreate");

    {
        const std::size_t bytes = std::size_t{quick ? 64u : 512u} << 20;
        device_array<std::byte> from(bytes), to(bytes);
        fill_random<<<1024, 256, 0, stream>>>(reinterpret_cast<__half*>(from.data), bytes / 2, 9);
        const double us = microseconds(
            20, [&] { check(cudaMemcpyAsync(to.data, from.data, bytes, cudaMemcpyDeviceToDevice, stream), "copy"); });
        copy_rate = 2.0 * static_cast<double>(bytes) / us;
        print("copy", us, 2.0 * static_cast<double>(bytes));
    }
    for (const char* name : {"k4v2_g128", "k4v4_g128", "k2v2_g128", "k8v8_g128"}) bench_tiles(name, quick);
    const std::vector<int> depths = quick ? std::vector<int>{1024, 8192} : std::vector<int>{1024, 4096, 32768, 131072};
    const std::vector<int> batches = quick ? std::vector<int>{1, 8} : std::vector<int>{1, 8, 64};
    for (const char* name : {"k4v2_g128", "k4v4_g128", "k2v2_g128"})
        for (const int n : depths)
            for (const int b : batches)
                for (const int r : {1, 4, 8}) bench_attention(name, b, n, r, card.multiProcessorCount, quick);
    check(cudaStreamDestroy(stream), "cudaStreamDestroy");
    return 0;
}
