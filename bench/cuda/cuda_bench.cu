// SPDX-License-Identifier: Apache-2.0
// The CUDA kernels' speed on the GPU at hand: sealing and dequantizing against a device copy of as many bytes, decode attention on
// records against the faster of two paged fp16 ones over the same values (fp16_attention.cuh, fp16_tensor_attention.cuh), each
// with the best of up to three numbers of splits. head_dim 128, group 128, 8 KV heads; r query heads of a KV head, b sequences
// of n tokens in records (exact/: and 192 exact ones). Times are medians, all sides in turn, of runs in CUDA graphs, merging
// launch included: no CPU time. Nothing is flushed between runs: what fits the second-level cache is read from there, on both
// sides, which is not what a model with many layers sees. Prints a table. Exit status: 0; 77 without a GPU; 1 if CUDA or a
// comparison fails, or the JSON file cannot be written.
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
#include <memory>
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

/// Runs of one work in a row as a graph, as engines launch a decode step: the time that the CPU takes to launch is not measured.
class captured {
public:
    captured(const std::function<void()>& work, int runs) : runs_(runs)
    {
        check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal), "cudaStreamBeginCapture");
        for (int i = 0; i < runs; ++i) work();
        cudaGraph_t graph = nullptr;
        check(cudaStreamEndCapture(stream, &graph), "cudaStreamEndCapture");
        check(cudaGraphInstantiate(&exec_, graph, 0), "cudaGraphInstantiate");
        check(cudaGraphDestroy(graph), "cudaGraphDestroy");
        check(cudaEventCreate(&begin_), "cudaEventCreate");
        check(cudaEventCreate(&end_), "cudaEventCreate");
    }
    captured(const captured&) = delete;
    captured& operator=(const captured&) = delete;
    ~captured()
    {
        cudaGraphExecDestroy(exec_);
        cudaEventDestroy(begin_);
        cudaEventDestroy(end_);
    }
    /// Microseconds of one run.
    [[nodiscard]] double microseconds() const
    {
        check(cudaEventRecord(begin_, stream), "cudaEventRecord");
        check(cudaGraphLaunch(exec_, stream), "cudaGraphLaunch");
        check(cudaEventRecord(end_, stream), "cudaEventRecord");
        check(cudaEventSynchronize(end_), "kernel");
        float ms = 0.0f;
        check(cudaEventElapsedTime(&ms, begin_, end_), "cudaEventElapsedTime");
        return 1e3 * static_cast<double>(ms) / runs_;
    }
    [[nodiscard]] int runs() const { return runs_; }

private:
    int runs_;
    cudaGraphExec_t exec_ = nullptr;
    cudaEvent_t begin_ = nullptr, end_ = nullptr;
};

/// Median microseconds of one run of each work, all in turn: five rounds at least, thirty at most, about 50 ms a work. A turn is as
/// many runs as take half a millisecond, at most 32.
std::vector<double> microseconds(const std::vector<std::function<void()>>& works)
{
    std::vector<std::unique_ptr<captured>> graphs;
    for (const std::function<void()>& work : works) {
        const captured once(work, 1);
        double us = 0.0;
        for (int i = 0; i < 3; ++i) us = once.microseconds();  // the first ones load code and fill caches
        graphs.push_back(std::make_unique<captured>(work, std::max(1, std::min(32, static_cast<int>(500.0 / us)))));
    }
    std::vector<std::vector<double>> times(works.size());
    double spent = 0.0;
    for (int round = -1; round < 30 && (round < 5 || spent < 5e4 * static_cast<double>(works.size())); ++round)
        for (std::size_t i = 0; i < works.size(); ++i) {
            const double us = graphs[i]->microseconds();
            if (round >= 0) times[i].push_back(us), spent += us * graphs[i]->runs();
        }
    std::vector<double> medians;
    for (std::vector<double>& t : times) {
        std::sort(t.begin(), t.end());
        medians.push_back(t[t.size() / 2]);
    }
    return medians;
}

constexpr int heads = 8, dim = 128, group = 128;
double copy_rate = 0.0;  // bytes per microsecond, read and written

/// One line of the table and of the JSON file.
struct measurement {
    std::string name;
    double us, bytes;
    std::string note;
};
std::vector<measurement> measurements;

void print(const std::string& name, double us, double bytes, const std::string& note = "")
{
    std::printf("%-44s %12.1f us %9.0f GB/s %6.2f of copy\n", name.c_str(), us, bytes / us * 1e-3, bytes / us / copy_rate);
    measurements.push_back({name, us, bytes, note});
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

/// use(body) for one of the two fp16 kernels and r = 1, 4 or 8.
template <class Use>
void with_fp16(bool tensor, int r, Use&& use)
{
    const auto with_rows = [&](auto one, auto four, auto eight) {
        if (r == 1)
            use(one);
        else if (r == 4)
            use(four);
        else
            use(eight);
    };
    if (tensor)
        with_rows(bench::fp16_tensor<1>{}, bench::fp16_tensor<4>{}, bench::fp16_tensor<8>{});
    else
        with_rows(bench::fp16_cores<1>{}, bench::fp16_cores<4>{}, bench::fp16_cores<8>{});
}

/// Numbers of splits that fill the card once, twice and four times, no block with less than 64 tokens.
std::vector<int> fp16_splits(bool tensor, int r, int sequences, int tokens, int multiprocessors)
{
    int resident = 0;
    with_fp16(tensor, r, [&](auto body) {
        using body_type = decltype(body);
        const auto kernel = bench::fp16_attention<body_type>;
        check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, body_type::shared_bytes),
              "shared memory");
        check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, kernel, bench::fp16_threads, body_type::shared_bytes),
              "occupancy");
    });
    std::vector<int> splits;
    for (const int fill : {1, 2, 4}) {
        const int n = std::max(1, std::min(tokens / 64, fill * resident * multiprocessors / (sequences * heads)));
        if (splits.empty() || splits.back() != n) splits.push_back(n);
    }
    return splits;
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

/// A cache of records, and the fp16 values that they decode to.
struct caches {
    const char* name;
    kvarn::format f;
    int sequences, tokens, tiles, multiprocessors;
    device_array<std::byte> records;
    device_array<__half> k, v;
    device_array<std::int32_t> record_table, counts;

    caches(const char* format_name, int batch, int depth, int processors)
        : name(format_name), f(kvarn::parse_format(format_name, dim).value), sequences(batch), tokens(depth),
          tiles(depth / group), multiprocessors(processors),
          records(kvarn::grid_bytes(f, static_cast<std::size_t>(tiles * batch), heads)),
          k(static_cast<std::size_t>(batch) * static_cast<std::size_t>(depth) * heads * dim), v(k.size),
          record_table(counted(static_cast<std::size_t>(tiles * batch))),
          counts(std::vector<std::int32_t>(static_cast<std::size_t>(batch), tiles))
    {
        fill_pool(f, heads, tiles * batch, records);
        const std::size_t one = kvarn::record_bytes(f);
        kvarn::cuda::dequantize_arguments decode;
        decode.records = {records.data, one * heads, one, one, nullptr};
        decode.k = dense<void>(k.data);
        decode.v = dense<void>(v.data);
        decode.tiles = tiles * batch;
        decode.heads = heads;
        check(kvarn::cuda::dequantize(f, decode, stream), "dequantize");
    }
};

/// Attention with r query heads of a KV head on both caches. `sinks` exact tokens before the records and `tails` behind them, 128
/// at most, are those of the sequence's place among the fp16 tiles.
void compare(const caches& x, int r, int sinks, int tails)
{
    constexpr std::ptrdiff_t token_stride = heads * dim;
    const int sequences = x.sequences, tokens = sinks + x.tokens + tails, total = x.tiles * sequences;
    const auto batch = static_cast<std::size_t>(sequences), vectors = batch * static_cast<std::size_t>(heads * r);
    const std::string label = std::string(sinks + tails > 0 ? "exact/" : "") + x.name + "/r" + std::to_string(r) + "/b" +
                              std::to_string(sequences) + "/n" + std::to_string(x.tokens);
    device_array<__half> q(vectors * dim), out(vectors * dim), fp16_out(vectors * dim);
    fill_random<<<64, 256, 0, stream>>>(q.data, q.size, 5);

    const std::size_t one = kvarn::record_bytes(x.f);
    const device_array<std::int32_t> exact_table(counted(batch)), sink_counts(std::vector<std::int32_t>(batch, sinks)),
        tail_counts(std::vector<std::int32_t>(batch, tails));
    kvarn::cuda::attention_arguments a;
    a.q = {q.data, kvarn::cuda::element_type::f16, r * token_stride, r * token_stride, dim};
    a.out = {out.data, kvarn::cuda::element_type::f16, r * token_stride, r * token_stride, dim};
    a.records = {x.records.data, one * heads, one, x.record_table.data, x.counts.data, x.tiles};
    if (sinks + tails > 0) {
        kvarn::cuda::exact_pages pages;
        pages.k = x.k.data;
        pages.v = x.v.data;
        pages.k_page_stride = pages.v_page_stride = group * token_stride;
        pages.k_token_stride = pages.v_token_stride = token_stride;
        pages.k_head_stride = pages.v_head_stride = dim;
        pages.table = exact_table.data;
        pages.pages = 1;
        pages.page_tokens = group;
        a.sink = a.tail = pages;
        a.sink.tokens = sink_counts.data;
        a.tail.tokens = tail_counts.data;
    }
    a.sequences = sequences;
    a.kv_heads = heads;
    a.heads_per_kv = r;
    a.splits = kvarn::cuda::suggested_splits(x.f, sequences, heads, r, x.tiles, x.multiprocessors);
    const device_array<float> workspace(kvarn::cuda::attention_workspace_bytes(x.f, sequences, heads, r, a.splits) / 4);
    a.workspace = workspace.data;
    std::vector<std::function<void()>> works = {[&] { check(kvarn::cuda::attend(x.f, a, stream), "attend"); }};

    // The same tokens in pages of fp16.
    constexpr int page_tokens = bench::fp16_page_tokens;
    std::vector<std::int32_t> table;
    for (int s = 0; s < sequences; ++s) {
        const auto add = [&](int first, int count) {
            for (int t = 0; t < count; t += page_tokens) table.push_back((first + t) / page_tokens);
        };
        add(s * group, sinks);
        add(s * x.tokens, x.tokens);
        add(s * group, tails);
    }
    const device_array<std::int32_t> page_table(table);
    struct candidate {
        bool tensor;
        int splits;
    };
    std::vector<candidate> candidates;
    int most = 1;
    for (const bool tensor : {false, true})
        for (const int splits : fp16_splits(tensor, r, sequences, tokens, x.multiprocessors)) {
            candidates.push_back({tensor, splits});
            most = std::max(most, splits);
        }
    const device_array<float> fp16_workspace(bench::fp16_workspace_floats(vectors, most));
    kvarn::cuda::batch_vectors<void> to = a.out;
    to.data = fp16_out.data;
    const auto fp16 = [&](const candidate& with) {
        const bench::fp16_call c{reinterpret_cast<const kvarn::half*>(x.k.data),
                                 reinterpret_cast<const kvarn::half*>(x.v.data),
                                 page_table.data,
                                 reinterpret_cast<const kvarn::half*>(q.data),
                                 fp16_workspace.data,
                                 heads,
                                 tokens / page_tokens,
                                 tokens,
                                 with.splits,
                                 kvarn::cuda::detail::log2_e / std::sqrt(static_cast<float>(dim))};
        const auto merge = bench::fp16_combine_call(c, sequences, r, to);
        namespace device = kvarn::cuda::detail;
        with_fp16(with.tensor, r, [&](auto body) {
            using body_type = decltype(body);
            check(device::launch(bench::fp16_attention<body_type>, sequences * heads * with.splits, bench::fp16_threads,
                                 body_type::shared_bytes, c, stream),
                  "fp16 attention");
        });
        check(device::launch(device::combine_kernel<device::block_team>, static_cast<int>(vectors), device::combine_threads,
                             device::combine_shared_bytes(dim), merge, stream),
              "combine");
    };
    for (const candidate& with : candidates) works.emplace_back([&] { fp16(with); });

    const std::vector<double> us = microseconds(works);
    const auto fastest = std::min_element(us.begin() + 1, us.end());
    const candidate& best = candidates[static_cast<std::size_t>(fastest - us.begin()) - 1];
    const std::string how =
        std::string(best.tensor ? "tensor cores, " : "CUDA cores, ") + std::to_string(best.splits) + " splits";
    const double exact_bytes = 4.0 * (sinks + tails) * sequences * heads * dim;
    print("attention/" + label, us[0], static_cast<double>(one) * heads * total + exact_bytes,
          std::to_string(a.splits) + " splits");
    print("attention/fp16/" + label, *fastest, static_cast<double>(4 * x.k.size) + exact_bytes, how);
    // Every candidate must be right, not only fast.
    double apart = 0.0;
    for (const candidate& with : candidates) {
        fp16(with);
        check(cudaStreamSynchronize(stream), "fp16 attention");
        const double d = difference(out, fp16_out);
        if (!(d < 1e-2)) {
            std::fprintf(stderr, "%s: the two attentions differ by %g (%s)\n", label.c_str(), d,
                         with.tensor ? "tensor cores" : "CUDA cores");
            std::exit(1);
        }
        apart = std::max(apart, d);
    }
    std::printf("%-44s %12.2f times fp16's speed (%s), outputs differ by %.1e\n", "", *fastest / us[0], how.c_str(), apart);
}

/// One depth and batch, for r = 1, 4, 8, and with exact tokens as real caches have them.
void bench_attention(const char* name, int sequences, int tokens, int multiprocessors)
{
    const double vectors = static_cast<double>(sequences) * tokens * heads;
    const double one = static_cast<double>(kvarn::record_bytes(kvarn::parse_format(name, dim).value)) / group;
    std::size_t free_bytes = 0, all_bytes = 0;
    check(cudaMemGetInfo(&free_bytes, &all_bytes), "cudaMemGetInfo");
    if (vectors * (4 * dim + one) + 5e8 > static_cast<double>(free_bytes)) {
        std::printf("attention/%s/b%d/n%d skipped: not enough memory\n", name, sequences, tokens);
        return;
    }
    const caches x(name, sequences, tokens, multiprocessors);
    for (const int r : {1, 4, 8}) compare(x, r, 0, 0);
    compare(x, 4, 128, 64);
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
    a.splits = kvarn::cuda::suggested_splits(f, sequences, 1, r, tiles, multiprocessors);
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
        std::fprintf(file, "%s\n  {\"name\": \"%s\", \"us\": %.2f, \"bytes\": %.0f, \"note\": \"%s\"}", i == 0 ? "" : ",",
                     measurements[i].name.c_str(), measurements[i].us, measurements[i].bytes, measurements[i].note.c_str());
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
                             " MHz, L2 " + std::to_string(properties.l2CacheSize >> 20) + " MB, driver " +
                             std::to_string(driver / 1000) + "." + std::to_string(driver % 1000 / 10);
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
