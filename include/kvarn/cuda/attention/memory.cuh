// SPDX-License-Identifier: Apache-2.0
#pragma once
// The thread block of decode attention: its size and its shared memory, from a format alone. Constexpr, host and device.

#include <kvarn/layout/format.hpp>

namespace kvarn::cuda {
namespace detail {

inline constexpr int attention_warps = 4;
inline constexpr int attention_threads = 32 * attention_warps;
inline constexpr int block_rows = 8;  // query rows that one thread block attends with
inline constexpr int max_splits = 1024;

/// Blocks of a multiprocessor that registers must do for. Of latent attention with 512 channels shared memory holds two; masks and
/// ALiBi take some registers more.
[[nodiscard]] KVARN_HOST_DEVICE KVARN_INLINE constexpr int resident_blocks(int group, bool latent, bool general = false) noexcept
{
    return latent || general || group == 32 ? 2 : 3;
}

[[nodiscard]] KVARN_HOST_DEVICE KVARN_INLINE constexpr int output_dim(const format& f) noexcept
{
    return f.has_values() ? f.head_dim_v() : f.head_dim_k();
}
[[nodiscard]] KVARN_INLINE constexpr int row_blocks_of(int rows) noexcept
{
    return (rows + block_rows - 1) / block_rows;
}

/// Shared memory of an attention block, in floats from its start.
struct attention_memory {
    int query_stride, exact_stride;
    int query;        // [block_rows][query_stride]: rotated channels; for records then A of them, [dk / 16][32] quads
    int exact_query;  // [block_rows][exact_stride]: exact channels, then zeros
    int row_down;     // [block_rows]: for records, what the queries were divided by, a power of two
    int out;          // [attention_warps][block_rows * out_dim]: as the threads of a warp keep them
    int states;       // [attention_warps][2][block_rows]
    int total;

    KVARN_HOST_DEVICE KVARN_INLINE constexpr attention_memory(int dk, int exact_channels, int out_dim) noexcept
    {
        // The threads of two rows that read 16 bytes each meet different banks.
        query_stride = dk + 16;
        exact_stride = exact_channels == 0 ? 0 : (exact_channels + 31) / 32 * 32 + 16;
        query = 0;
        exact_query = block_rows * query_stride;
        row_down = exact_query + block_rows * exact_stride;
        out = row_down + block_rows;
        states = out + attention_warps * block_rows * out_dim;
        total = states + attention_warps * 2 * block_rows;
    }
};

[[nodiscard]] KVARN_HOST_DEVICE KVARN_INLINE constexpr int attention_shared_bytes(const format& f) noexcept
{
    return 4 * attention_memory(f.head_dim_k(), f.exact_channels(), output_dim(f)).total;
}

}  // namespace detail
}  // namespace kvarn::cuda
