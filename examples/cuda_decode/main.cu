// SPDX-License-Identifier: Apache-2.0
// The whole cycle of a KV cache on a GPU: every step appends the new token to exact pages,
// seals a tile as soon as it is full, and attends over sink, records and tail; all of it on one stream, without waiting for the
// device. The outputs are compared with exact attention on the CPU. Exit status: 0; 77 without a GPU; 1 if CUDA fails or the
// outputs are off.

#include <kvarn/cuda/append.cuh>
#include <kvarn/cuda/attention.cuh>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

namespace {

constexpr int kv_heads = 4, heads_per_kv = 4, dim = 128, sink_tokens = 128, page_tokens = 16, steps = 700;
constexpr int vector_heads = kv_heads * heads_per_kv;

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

/// Device memory of n elements, zero at first.
template <class T>
T* allocate(std::size_t n)
{
    T* p = nullptr;
    check(cudaMalloc(&p, n * sizeof(T)), "cudaMalloc");
    check(cudaMemset(p, 0, n * sizeof(T)), "cudaMemset");
    return p;
}

/// softmax(q k^T / sqrt(dim)) v of one query head, in double.
std::vector<double> exact_attention(const std::vector<kvarn::half>& k, const std::vector<kvarn::half>& v, const kvarn::half* q,
                                    int tokens, int head)
{
    std::vector<double> score(static_cast<std::size_t>(tokens)), out(dim);
    double most = -1e300, sum = 0.0;
    const auto at = [&](int t) { return (static_cast<std::size_t>(t) * kv_heads + static_cast<std::size_t>(head)) * dim; };
    for (int t = 0; t < tokens; ++t) {
        double dot = 0.0;
        for (int d = 0; d < dim; ++d)
            dot += static_cast<double>(kvarn::to_float(k[at(t) + static_cast<std::size_t>(d)])) *
                   static_cast<double>(kvarn::to_float(q[d]));
        score[static_cast<std::size_t>(t)] = dot / std::sqrt(static_cast<double>(dim));
        most = std::max(most, score[static_cast<std::size_t>(t)]);
    }
    for (int t = 0; t < tokens; ++t) {
        const double p = std::exp(score[static_cast<std::size_t>(t)] - most);
        sum += p;
        for (int d = 0; d < dim; ++d)
            out[static_cast<std::size_t>(d)] += p * static_cast<double>(kvarn::to_float(v[at(t) + static_cast<std::size_t>(d)]));
    }
    for (double& x : out) x /= sum;
    return out;
}

}  // namespace

int main()
{
    int devices = 0;
    const cudaError_t found = cudaGetDeviceCount(&devices);
    if (found != cudaSuccess || devices == 0) {
        std::printf("skipped: no CUDA device (%s)\n",
                    found == cudaSuccess ? "the driver reports none" : cudaGetErrorString(found));
        return 77;
    }
    const kvarn::format f = kvarn::parse_format("k4v4_g128", dim).value;
    const int group = f.group(), pages_per_tile = group / page_tokens, max_tiles = steps / group + 1;
    if (const auto s = kvarn::cuda::supports(f, kvarn::cuda::operation::seal); !s) {
        std::fprintf(stderr, "%s\n", s.reason);
        return 1;
    }

    // Pages 0 .. 7 hold the sink for ever, 8 .. 23 two tiles of tail in turn: one is sealed while the other fills.
    const int pages = sink_tokens / page_tokens + 2 * pages_per_tile;
    const std::size_t page_elements = std::size_t{page_tokens} * kv_heads * dim, one = kvarn::record_bytes(f);
    auto* const exact_k = allocate<kvarn::half>(static_cast<std::size_t>(pages) * page_elements);
    auto* const exact_v = allocate<kvarn::half>(static_cast<std::size_t>(pages) * page_elements);
    auto* const records = allocate<std::byte>(static_cast<std::size_t>(max_tiles) * kv_heads * one);
    auto* const new_kv = allocate<kvarn::half>(2 * kv_heads * dim);
    auto* const q = allocate<kvarn::half>(vector_heads * dim);
    auto* const out = allocate<float>(vector_heads * dim);
    const int splits = kvarn::cuda::suggested_splits(f, 1, kv_heads, heads_per_kv, max_tiles, 132);
    auto* const workspace =
        allocate<float>(kvarn::cuda::attention_workspace_bytes(f, 1, kv_heads, heads_per_kv, splits) / sizeof(float));
    // What changes from step to step, written by one small copy: slot; tokens of sink and tail, tiles; then the tables.
    enum { slot_at, sink_at, tail_at, tiles_at, seal_at, pages_at };
    const int sink_pages = sink_tokens / page_tokens, words = pages_at + sink_pages + pages_per_tile + max_tiles;
    auto* const control = allocate<std::int32_t>(static_cast<std::size_t>(words));
    const std::int32_t* const sink_table = control + pages_at;
    const std::int32_t* const tail_table = sink_table + sink_pages;
    const std::int32_t* const record_table = tail_table + pages_per_tile;

    cudaStream_t stream = nullptr;
    check(cudaStreamCreate(&stream), "cudaStreamCreate");
    std::mt19937 random(1);
    std::normal_distribution<float> normal;
    std::vector<kvarn::half> all_k, all_v, all_q;
    std::vector<std::int32_t> host(static_cast<std::size_t>(words));
    std::vector<float> channel(kv_heads * dim);
    for (float& c : channel) c = 2.0f * normal(random);  // offsets of K's channels, which make real keys hard
    std::vector<float> got(vector_heads * dim);
    double worst = 0.0;
    for (int step = 0; step < steps; ++step) {
        std::vector<kvarn::half> k, v, query;
        for (const float c : channel) k.push_back(kvarn::to_half(normal(random) + c));
        for (int i = 0; i < kv_heads * dim; ++i) v.push_back(kvarn::to_half(normal(random)));
        for (int i = 0; i < vector_heads * dim; ++i) query.push_back(kvarn::to_half(normal(random)));
        all_k.insert(all_k.end(), k.begin(), k.end());
        all_v.insert(all_v.end(), v.begin(), v.end());

        const int behind = step - sink_tokens, tile = behind >= 0 ? behind / group : 0, place = behind >= 0 ? behind % group : 0;
        const int first_page = sink_pages + tile % 2 * pages_per_tile;
        const bool full = behind >= 0 && place == group - 1;
        host[slot_at] = behind < 0 ? step : first_page * page_tokens + place;
        host[sink_at] = std::min(step + 1, sink_tokens);
        host[tail_at] = behind < 0 || full ? 0 : place + 1;
        host[tiles_at] = tile + full;
        host[seal_at] = tile;  // the record's place in the pool
        for (int i = 0; i < sink_pages; ++i) host[static_cast<std::size_t>(pages_at + i)] = i;
        for (int i = 0; i < pages_per_tile; ++i) host[static_cast<std::size_t>(pages_at + sink_pages + i)] = first_page + i;
        for (int i = 0; i < max_tiles; ++i) host[static_cast<std::size_t>(pages_at + sink_pages + pages_per_tile + i)] = i;
        check(cudaMemcpyAsync(control, host.data(), host.size() * 4, cudaMemcpyHostToDevice, stream), "copy");
        check(cudaMemcpyAsync(new_kv, k.data(), k.size() * 2, cudaMemcpyHostToDevice, stream), "copy");
        check(cudaMemcpyAsync(new_kv + kv_heads * dim, v.data(), v.size() * 2, cudaMemcpyHostToDevice, stream), "copy");
        check(cudaMemcpyAsync(q, query.data(), query.size() * 2, cudaMemcpyHostToDevice, stream), "copy");

        kvarn::cuda::append_arguments a;
        a.new_k.data = new_kv;
        a.new_k.token_stride = kv_heads * dim;
        a.new_k.head_stride = dim;
        a.new_v = a.new_k;
        a.new_v.data = new_kv + kv_heads * dim;
        a.slot_mapping = control + slot_at;
        a.tokens = 1;
        a.tail_k.data = exact_k;
        a.tail_k.token_stride = kv_heads * dim;
        a.tail_k.head_stride = dim;
        a.tail_k.page_tokens = page_tokens;
        a.tail_k.page_stride = static_cast<std::ptrdiff_t>(page_elements);
        a.tail_v = a.tail_k;
        a.tail_v.data = exact_v;
        a.sealed.k = {exact_k,    a.tail_k.type, a.tail_k.token_stride, a.tail_k.head_stride,
                      tail_table, page_tokens,   a.tail_k.page_stride};
        a.sealed.v = a.sealed.k;
        a.sealed.v.data = exact_v;
        a.sealed.records = {records, one * kv_heads, one, one, control + seal_at};
        a.sealed.tiles = full ? 1 : 0;
        a.sealed.heads = kv_heads;
        check(kvarn::cuda::append(f, a, {}, stream), "append");

        kvarn::cuda::attention_arguments t;
        t.q = {q, kvarn::cuda::element_type::f16, vector_heads * dim, vector_heads * dim, dim};
        t.out = {out, kvarn::cuda::element_type::f32, vector_heads * dim, vector_heads * dim, dim};
        kvarn::cuda::exact_pages exact;
        exact.k = exact_k;
        exact.v = exact_v;
        exact.k_page_stride = exact.v_page_stride = a.tail_k.page_stride;
        exact.k_token_stride = exact.v_token_stride = kv_heads * dim;
        exact.k_head_stride = exact.v_head_stride = dim;
        exact.page_tokens = page_tokens;
        t.sink = t.tail = exact;
        t.sink.table = sink_table;
        t.sink.tokens = control + sink_at;
        t.sink.pages = sink_pages;
        t.tail.table = tail_table;
        t.tail.tokens = control + tail_at;
        t.tail.pages = pages_per_tile;
        t.records = {records, one * kv_heads, one, record_table, control + tiles_at, max_tiles};
        t.sequences = 1;
        t.kv_heads = kv_heads;
        t.heads_per_kv = heads_per_kv;
        t.splits = splits;
        t.workspace = workspace;
        check(kvarn::cuda::attend(f, t, stream), "attend");

        if (step % 100 != 99) continue;
        check(cudaMemcpyAsync(got.data(), out, got.size() * sizeof(float), cudaMemcpyDeviceToHost, stream), "copy");
        check(cudaStreamSynchronize(stream), "kernels");
        double error = 0.0, norm = 0.0;
        for (int h = 0; h < vector_heads; ++h) {
            const std::vector<double> wanted = exact_attention(all_k, all_v, query.data() + h * dim, step + 1, h / heads_per_kv);
            for (int d = 0; d < dim; ++d) {
                const double e =
                    static_cast<double>(got[static_cast<std::size_t>(h * dim + d)]) - wanted[static_cast<std::size_t>(d)];
                error += e * e;
                norm += wanted[static_cast<std::size_t>(d)] * wanted[static_cast<std::size_t>(d)];
            }
        }
        const double relative = std::sqrt(error / norm);
        worst = std::max(worst, relative);
        std::printf("%4d tokens: %3d sink, %d records, %3d tail; output differs from exact attention by %.2e\n", step + 1,
                    host[sink_at], host[tiles_at], host[tail_at], relative);
    }
    for (void* p :
         {static_cast<void*>(exact_k), static_cast<void*>(exact_v), static_cast<void*>(records), static_cast<void*>(new_kv),
          static_cast<void*>(q), static_cast<void*>(out), static_cast<void*>(workspace), static_cast<void*>(control)})
        check(cudaFree(p), "cudaFree");
    check(cudaStreamDestroy(stream), "cudaStreamDestroy");
    return worst < 0.2 ? 0 : 1;
}
