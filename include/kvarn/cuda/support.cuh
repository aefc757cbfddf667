// SPDX-License-Identifier: Apache-2.0
#pragma once
// What the kernels accept, to be asked before anything is launched: a shape is either supported or refused with a reason, never
// run slowly. In: a format, an operation, the shared memory that a block of the device may have. Out: a status and one sentence.
// constexpr, host.

#include <kvarn/cuda/normalize.cuh>
#include <kvarn/layout/format.hpp>

namespace kvarn::cuda {

enum class operation { seal, dequantize, attend };

/// Shared memory of one thread block at most, in bytes, by compute capability; cudaDevAttrMaxSharedMemoryPerBlockOptin has it.
inline constexpr int shared_bytes_sm80 = 163 * 1024;
inline constexpr int shared_bytes_sm86 = 99 * 1024;
inline constexpr int shared_bytes_sm90 = 227 * 1024;

/// The answer of `supports`.
struct support {
    status error = status::ok;
    const char* reason = "supported";
    bool tensor_cores = false;  ///< attend: both products go to tensor cores; otherwise to CUDA cores, which are slower with many rows

    [[nodiscard]] constexpr explicit operator bool() const noexcept { return error == status::ok; }
};

namespace detail {

[[nodiscard]] KVARN_INLINE constexpr bool is_kernel_dim(int dim) noexcept
{
    return dim == 64 || dim == 128 || dim == 256;
}

/// Whether multiply_tensor (attention/tensor.cuh) takes `n` rows of `columns` codes.
[[nodiscard]] KVARN_INLINE constexpr bool is_tensor_shape(int bits, int n, int columns) noexcept
{
    return (bits == 2 || bits == 4 || bits == 8) && columns * bits % 256 == 0 && n % 16 == 0;
}

/// Whether decode attention over records of this format goes to tensor cores.
[[nodiscard]] KVARN_INLINE constexpr bool on_tensor_cores(const format& f) noexcept
{
    return f.has_values() && is_tensor_shape(f.key_bits(), f.head_dim_k(), f.group()) &&
           is_tensor_shape(f.value_bits(), f.group(), f.head_dim_v());
}

/// Shared memory of a block that seals: one part of one tile.
[[nodiscard]] KVARN_INLINE constexpr int seal_shared_bytes(const format& f) noexcept
{
    const int k = tile_memory_floats(f.head_dim_k(), f.group());
    const int v = f.has_values() ? tile_memory_floats(f.group(), f.head_dim_v()) : 0;
    return 4 * (k > v ? k : v);
}

}  // namespace detail

/// Whether the kernels of an operation take a format on a device that gives a block `shared_bytes` of shared memory.
/// Statuses: unsupported_head_dim, unsupported_channels, buffer_too_small (shared memory). What attention needs depends on the call's rows
/// too: within the 163 KiB of sm_80 and the 227 KiB of sm_90 everything fits; with less, `attend` may answer buffer_too_small.
[[nodiscard]] constexpr support supports(const format& f, operation what, int shared_bytes = shared_bytes_sm90) noexcept
{
    if (!detail::is_kernel_dim(f.head_dim_k()) || (f.has_values() && !detail::is_kernel_dim(f.head_dim_v())))
        return {status::unsupported_head_dim, "the CUDA kernels take head_dim 64, 128 and 256"};
    if (what == operation::attend && f.exact_channels() != 0)
        return {status::unsupported_channels, "the CUDA attention kernel takes no exact channels"};
    if (what == operation::seal && detail::seal_shared_bytes(f) > shared_bytes)
        return {status::buffer_too_small, "a tile of this head_dim and group does not fit the shared memory of a thread block"};
    if (what != operation::attend) return {};
    if (detail::on_tensor_cores(f)) return {status::ok, "supported, on tensor cores", true};
    return {status::ok, "supported, on CUDA cores: tensor cores take 2, 4 and 8 bits for K and V in rows of whole 32-byte pieces", false};
}

#if defined(__CUDACC__)
namespace detail {

/// Shared memory that a block of the current device may have.
[[nodiscard]] inline int device_shared_bytes() noexcept
{
    int device = 0, bytes = 0;
    if (cudaGetDevice(&device) != cudaSuccess) return 0;
    if (cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device) != cudaSuccess) return 0;
    return bytes;
}

/// Launches kernel(call). bad_argument if CUDA refuses; its error is left for cudaGetLastError. The attribute belongs to the kernel, not
/// to the launch: all threads set it to the device's most, whatever this call needs.
template <class Call>
[[nodiscard]] status launch(void (*kernel)(Call), int blocks, int threads, int shared, const Call& call,
                            cudaStream_t stream) noexcept
{
    if (shared > 48 * 1024 &&
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, device_shared_bytes()) != cudaSuccess)
        return status::bad_argument;
    void* arguments[] = {const_cast<Call*>(&call)};
    const cudaError_t error =
        cudaLaunchKernel(reinterpret_cast<const void*>(kernel), dim3(static_cast<unsigned>(blocks)),
                         dim3(static_cast<unsigned>(threads)), arguments, static_cast<std::size_t>(shared), stream);
    return error == cudaSuccess ? status::ok : status::bad_argument;
}

}  // namespace detail
#endif

}  // namespace kvarn::cuda
