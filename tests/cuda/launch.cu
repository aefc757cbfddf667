// SPDX-License-Identifier: Apache-2.0
// The launchers for tests that a C++ compiler compiles: managed memory, launches on a stream
// of their own, CUDA's errors as exceptions.

#include <kvarn/cuda/append.cuh>
#include <kvarn/cuda/attention.cuh>
#include <kvarn/cuda/dequantize.cuh>
#include <kvarn/cuda/seal.cuh>

#include <stdexcept>
#include <string>

namespace support {

namespace {

void check(cudaError_t e, const char* what)
{
    if (e != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(e));
}

cudaStream_t stream()
{
    static const cudaStream_t s = [] {
        cudaStream_t made = nullptr;
        check(cudaStreamCreateWithFlags(&made, cudaStreamNonBlocking), "cudaStreamCreate");
        return made;
    }();
    return s;
}

/// Launches into a graph and runs that: what may be captured must work captured.
template <class Launch>
kvarn::status captured(Launch&& launch)
{
    check(cudaStreamBeginCapture(stream(), cudaStreamCaptureModeThreadLocal), "cudaStreamBeginCapture");
    const kvarn::status s = launch();
    cudaGraph_t graph = nullptr;
    check(cudaStreamEndCapture(stream(), &graph), "cudaStreamEndCapture");
    cudaGraphExec_t exec = nullptr;
    check(cudaGraphInstantiate(&exec, graph, 0), "cudaGraphInstantiate");
    if (s == kvarn::status::ok) check(cudaGraphLaunch(exec, stream()), "cudaGraphLaunch");
    check(cudaStreamSynchronize(stream()), "cudaStreamSynchronize");
    check(cudaGraphExecDestroy(exec), "cudaGraphExecDestroy");
    check(cudaGraphDestroy(graph), "cudaGraphDestroy");
    return s;
}

}  // namespace

const char* device_name()
{
    static cudaDeviceProp properties;
    int devices = 0;
    if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) return nullptr;
    return cudaGetDeviceProperties(&properties, 0) == cudaSuccess ? properties.name : nullptr;
}

const char* why_no_device()
{
    int devices = 0;
    const cudaError_t e = cudaGetDeviceCount(&devices);
    return e == cudaSuccess ? "the driver reports none" : cudaGetErrorString(e);
}

void* allocate_managed(std::size_t bytes)
{
    void* p = nullptr;
    check(cudaMallocManaged(&p, bytes), "cudaMallocManaged");
    return p;
}
void free_managed(void* p, std::size_t)
{
    cudaFree(p);
}

void wait_for_device()
{
    check(cudaGetLastError(), "launch");
    check(cudaStreamSynchronize(stream()), "kernel");
}

int block_shared_bytes()
{
    return kvarn::cuda::detail::device_shared_bytes();
}
kvarn::status launch(const kvarn::format& f, const kvarn::cuda::seal_arguments& a, const kvarn::encode_options& o,
                     int shared_bytes)
{
    if (shared_bytes == block_shared_bytes()) return captured([&] { return kvarn::cuda::seal(f, a, o, stream()); });
    return captured([&] { return kvarn::cuda::detail::launch_seal(f, a, o, shared_bytes, stream()); });
}
kvarn::status launch(const kvarn::format& f, const kvarn::cuda::dequantize_arguments& a)
{
    return captured([&] { return kvarn::cuda::dequantize(f, a, stream()); });
}
kvarn::status launch(const kvarn::format& f, const kvarn::cuda::append_arguments& a, const kvarn::encode_options& o)
{
    return captured([&] { return kvarn::cuda::append(f, a, o, stream()); });
}
kvarn::status launch(const kvarn::format& f, const kvarn::cuda::attention_arguments& a)
{
    return captured([&] { return kvarn::cuda::attend(f, a, stream()); });
}

}  // namespace support
