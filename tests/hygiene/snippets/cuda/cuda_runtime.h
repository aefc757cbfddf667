// SPDX-License-Identifier: Apache-2.0
#pragma once
// The names of CUDA that kvarn's headers and the programs in docs/ use, declared for a C++ compiler that only looks at their syntax and types,
// where there is no nvcc: with __CUDACC__ defined, -fsyntax-only. Nothing here does anything.
#include <cstddef>

#define __host__
#define __device__
#define __global__
#define __shared__
#define __grid_constant__
#define __launch_bounds__(...)

struct float4 {
    float x, y, z, w;
};
struct dim3 {
    unsigned x, y, z;
    explicit dim3(unsigned x_, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
extern const dim3 threadIdx, blockIdx, blockDim;
void __syncthreads();
void __syncwarp();
template <class T>
T __shfl_xor_sync(unsigned mask, T x, int other);

enum cudaError_t { cudaSuccess };
enum cudaMemcpyKind { cudaMemcpyHostToDevice, cudaMemcpyDeviceToHost };
enum cudaDeviceAttr { cudaDevAttrMaxSharedMemoryPerBlockOptin };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
typedef struct CUstream_st* cudaStream_t;

cudaError_t cudaGetDevice(int* device);
cudaError_t cudaGetDeviceCount(int* count);
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);
cudaError_t cudaDeviceSynchronize();
cudaError_t cudaFuncSetAttribute(const void* function, cudaFuncAttribute attribute, int value);
template <class Call>
cudaError_t cudaFuncSetAttribute(void (*function)(Call), cudaFuncAttribute attribute, int value);
cudaError_t cudaLaunchKernel(const void* function, dim3 grid, dim3 block, void** arguments, std::size_t shared, cudaStream_t stream);
const char* cudaGetErrorString(cudaError_t error);
cudaError_t cudaMalloc(void** memory, std::size_t bytes);
template <class T>
cudaError_t cudaMallocManaged(T** memory, std::size_t bytes);
cudaError_t cudaMemcpy(void* to, const void* from, std::size_t bytes, cudaMemcpyKind kind);
cudaError_t cudaFree(void* memory);
