// SPDX-License-Identifier: Apache-2.0
#include "ggml.h"

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdlib>
#include <deque>
#include <memory>
#include <thread>
#include <vector>

#include "ggml-cpu.h"

struct ggml_cgraph {
    std::vector<ggml_tensor*> nodes;
};

struct ggml_context {
    std::deque<ggml_tensor> tensors;
    std::deque<std::unique_ptr<std::byte[]>> memory;
    std::deque<ggml_cgraph> graphs;
};

namespace {

std::size_t element_bytes(ggml_type type)
{
    return type == GGML_TYPE_F32 || type == GGML_TYPE_I32 ? 4 : 2;
}

ggml_tensor* make(ggml_context* ctx, ggml_type type, int64_t ne0, int64_t ne1, int64_t ne2, int64_t ne3)
{
    ggml_tensor& x = ctx->tensors.emplace_back();
    x.type = type;
    const int64_t ne[] = {ne0, ne1, ne2, ne3};
    std::size_t bytes = element_bytes(type);
    for (int i = 0; i < GGML_MAX_DIMS; ++i) {
        x.ne[i] = ne[i];
        x.nb[i] = bytes;
        bytes *= static_cast<std::size_t>(ne[i]);
    }
    x.data = ctx->memory.emplace_back(new std::byte[bytes]).get();
    return &x;
}

void set_operation(ggml_tensor* x, ggml_custom_op_t fun, int n_tasks, void* userdata)
{
    x->fun = fun;
    x->n_tasks = n_tasks;
    x->userdata = userdata;
}

void expand(ggml_cgraph& graph, ggml_tensor* x)
{
    if (x == nullptr || std::find(graph.nodes.begin(), graph.nodes.end(), x) != graph.nodes.end()) return;
    for (ggml_tensor* const source : x->src) expand(graph, source);
    graph.nodes.push_back(x);
}

/// As ggml's: threads wait for each other, turning.
class barrier {
public:
    explicit barrier(int threads) : threads_(threads) {}
    void wait()
    {
        const int turn = turn_.load();
        if (waiting_.fetch_add(1) + 1 == threads_) {
            waiting_.store(0);
            turn_.fetch_add(1);
            return;
        }
        while (turn_.load() == turn) std::this_thread::yield();
    }

private:
    const int threads_;
    std::atomic<int> waiting_{0}, turn_{0};
};

}  // namespace

ggml_context* ggml_init(ggml_init_params)
{
    return new ggml_context;
}
void ggml_free(ggml_context* ctx)
{
    delete ctx;
}

ggml_tensor* ggml_new_tensor_1d(ggml_context* ctx, ggml_type type, int64_t ne0)
{
    return make(ctx, type, ne0, 1, 1, 1);
}
ggml_tensor* ggml_new_tensor_3d(ggml_context* ctx, ggml_type type, int64_t ne0, int64_t ne1, int64_t ne2)
{
    return make(ctx, type, ne0, ne1, ne2, 1);
}

ggml_tensor* ggml_view_3d(ggml_context* ctx, ggml_tensor* a, int64_t ne0, int64_t ne1, int64_t ne2, size_t nb1, size_t nb2,
                          size_t offset)
{
    ggml_tensor& x = ctx->tensors.emplace_back();
    x.type = a->type;
    const int64_t ne[] = {ne0, ne1, ne2, 1};
    const size_t nb[] = {a->nb[0], nb1, nb2, nb2 * static_cast<size_t>(ne2)};
    std::copy_n(ne, 4, x.ne);
    std::copy_n(nb, 4, x.nb);
    x.src[0] = a;
    x.data = static_cast<std::byte*>(a->data) + offset;
    return &x;
}

ggml_tensor* ggml_custom_4d(ggml_context* ctx, ggml_type type, int64_t ne0, int64_t ne1, int64_t ne2, int64_t ne3,
                            ggml_tensor** args, int n_args, ggml_custom_op_t fun, int n_tasks, void* userdata)
{
    if (n_args >= GGML_MAX_SRC) std::abort();
    ggml_tensor* const x = make(ctx, type, ne0, ne1, ne2, ne3);
    std::copy_n(args, n_args, x->src);
    set_operation(x, fun, n_tasks, userdata);
    return x;
}

ggml_tensor* ggml_custom_inplace(ggml_context* ctx, ggml_tensor* a, ggml_tensor** args, int n_args, ggml_custom_op_t fun,
                                 int n_tasks, void* userdata)
{
    if (n_args >= GGML_MAX_SRC - 1) std::abort();
    ggml_tensor& x = ctx->tensors.emplace_back(*a);
    std::fill_n(x.src, GGML_MAX_SRC, nullptr);
    x.src[0] = a;
    if (n_args > 0) std::copy_n(args, n_args, x.src + 1);
    set_operation(&x, fun, n_tasks, userdata);
    return &x;
}

ggml_cgraph* ggml_new_graph(ggml_context* ctx)
{
    return &ctx->graphs.emplace_back();
}
void ggml_build_forward_expand(ggml_cgraph* graph, ggml_tensor* tensor)
{
    expand(*graph, tensor);
}

ggml_status ggml_graph_compute_with_ctx(ggml_context*, ggml_cgraph* graph, int n_threads)
{
    barrier between(n_threads);
    const auto work = [&](int ith) {
        for (ggml_tensor* const x : graph->nodes) {
            if (x->fun == nullptr) continue;
            const int threads = x->n_tasks == GGML_N_TASKS_MAX ? n_threads : std::min(x->n_tasks, n_threads);
            if (ith < threads) x->fun(x, ith, threads, x->userdata);
            between.wait();
        }
    };
    std::vector<std::thread> threads;
    for (int i = 1; i < n_threads; ++i) threads.emplace_back(work, i);
    work(0);
    for (std::thread& t : threads) t.join();
    return GGML_STATUS_SUCCESS;
}
