// SPDX-License-Identifier: Apache-2.0
#pragma once
// What the kernels accept, to be asked before anything is launched: a shape is either supported or refused with a reason, never
// run slowly. In: a format, an operation, the shared memory that a block of the device may have. Out: a status and one sentence.
// constexpr, host.

#include <cstddef>

#include <kvarn/cuda/attention/memory.cuh>
#include <kvarn/cuda/normalize.cuh>
#include <kvarn/layout/format.hpp>

namespace kvarn::cuda {

/// What `supports` is asked about.
enum class operation { seal, dequantize, attend };

/// Shared memory of one thread block at most, in bytes, by compute capability; cudaDevAttrMaxSharedMemoryPerBlockOptin has it.
/// @{
inline constexpr int shared_bytes_sm80 = 163 * 1024;
inline constexpr int shared_bytes_sm86 = 99 * 1024;
inline constexpr int shared_bytes_sm90 = 227 * 1024;
/// @}

/// The answer of `supports`.
struct support {
    status error = status::ok;
    const char* reason = "supported";
    bool workspace = false;  ///< seal needs seal_workspace_bytes of device memory (append too)

    [[nodiscard]] constexpr explicit operator bool() const noexcept { return error == status::ok; }
};

namespace detail {

[[nodiscard]] KVARN_INLINE constexpr bool is_kernel_dim(int dim) noexcept
{
    return dim == 64 || dim == 128 || dim == 256 || dim == 512;
}

/// Blocks that seal with tiles in a workspace at a time, at most: one for each multiprocessor of a large device, so that most of
/// their tiles stay in its L2 cache.
inline constexpr int most_workspace_blocks = 160;

/// What the larger part of a tile takes, in floats: with the tile, its factors alone, the tile alone.
struct seal_floats {
    int all, factors, tile;
};
[[nodiscard]] KVARN_INLINE constexpr seal_floats seal_floats_of(const format& f) noexcept
{
    const auto larger = [](int a, int b) { return a > b ? a : b; };
    const int k0 = f.head_dim_k(), k1 = f.group(), v0 = f.has_values() ? f.group() : 0, v1 = f.has_values() ? f.head_dim_v() : 0;
    const int k = tile_floats(k0, k1), v = tile_floats(v0, v1), kf = factor_floats(k0, k1), vf = factor_floats(v0, v1);
    return {larger(k + kf, v + vf), larger(kf, vf), larger(k, v)};
}

/// Whether tiles lie in a workspace where a block has `shared_bytes` of shared memory.
[[nodiscard]] KVARN_INLINE constexpr bool seals_in_workspace(const format& f, int shared_bytes) noexcept
{
    return 4 * seal_floats_of(f).all > shared_bytes;
}

/// Shared memory of a block that seals one part of a tile.
[[nodiscard]] KVARN_INLINE constexpr int seal_shared_bytes(const format& f, bool workspace) noexcept
{
    const seal_floats n = seal_floats_of(f);
    return 4 * (workspace ? n.factors : n.all);
}

/// Blocks that seal `parts` parts of tiles.
[[nodiscard]] KVARN_INLINE constexpr int seal_blocks(int parts, bool workspace) noexcept
{
    return workspace && parts > most_workspace_blocks ? most_workspace_blocks : parts;
}

}  // namespace detail

/// Whether the kernels of an operation take a format on a device that gives a block `shared_bytes` of shared memory.
/// Statuses: unsupported_head_dim, unsupported_channels, buffer_too_small (shared memory).
[[nodiscard]] constexpr support supports(const format& f, operation what, int shared_bytes = shared_bytes_sm90) noexcept
{
    if (!detail::is_kernel_dim(f.head_dim_k()) || (f.has_values() && !detail::is_kernel_dim(f.head_dim_v())))
        return {status::unsupported_head_dim, "the CUDA kernels take head_dim 64, 128, 256 and 512"};
    if (what == operation::attend && f.exact_channels() % 8 != 0)
        return {status::unsupported_channels, "the CUDA attention kernel takes exact channels in multiples of 8"};
    if (what == operation::seal && detail::seals_in_workspace(f, shared_bytes)) {
        if (detail::seal_shared_bytes(f, true) > shared_bytes)
            return {status::buffer_too_small, "a tile's factors do not fit the shared memory of a thread block"};
        return {status::ok, "supported, with tiles in a workspace in device memory, which is slower", true};
    }
    if (what == operation::attend && detail::attention_shared_bytes(f) > shared_bytes)
        return {status::buffer_too_small,
                "the queries and outputs of this head_dim do not fit the shared memory of a thread block"};
    return {};
}

/// Device memory that `seal` and `append` need besides their output, in bytes: 0 where `supports` names no workspace, otherwise a
/// tile of floats for each of at most 160 blocks, whatever `tiles` and `heads` are. 0 or less of them: none.
[[nodiscard]] constexpr std::size_t seal_workspace_bytes(const format& f, int tiles, int heads,
                                                         int shared_bytes = shared_bytes_sm90) noexcept
{
    if (tiles <= 0 || heads <= 0 || !supports(f, operation::seal, shared_bytes).workspace) return 0;
    const int most = detail::most_workspace_blocks, parts = f.has_values() ? 2 : 1;
    const int blocks = tiles > most || heads > most ? most : detail::seal_blocks(tiles * heads * parts, true);
    return std::size_t{4} * static_cast<std::size_t>(blocks) * static_cast<std::size_t>(detail::seal_floats_of(f).tile);
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

/// Launches kernel(call). bad_argument if CUDA refuses; its error is left for cudaGetLastError. The attribute belongs to the
/// kernel, not to the launch: all threads set it to the device's most, whatever this call needs.
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
