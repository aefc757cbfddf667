// SPDX-License-Identifier: Apache-2.0
#pragma once
// The threads that run a kernel's body together, and the sums that they share. A body is a function template over its team:
// `block_team` is the thread block of a launch; the tests have a team of fibers that runs the same source without a GPU.
//
// What a Team offers: rank() and size() of the thread (size a multiple of 64); barrier(), which all threads reach equally often;
// shuffle_xor(x, mask), mask < 32, the x of thread rank ^ mask of the same warp, warp_barrier(), and the warp's matrix products
// c += a b, which all its threads call together: mma of 16 x 16 and 16 x 8 halves in the registers of PTX's mma.m16n8k16, mma_tf32
// of 16 x 8 and 8 x 8 floats, of which the first 11 significant bits count, in those of mma.m16n8k8.

#include <cstdint>

#include <kvarn/cuda/arithmetic.cuh>

namespace kvarn::cuda::detail {

#if defined(__CUDACC__)
/// The threads of a block.
struct block_team {
    KVARN_DEVICE KVARN_INLINE int rank() const noexcept { return static_cast<int>(threadIdx.x); }
    KVARN_DEVICE KVARN_INLINE int size() const noexcept { return static_cast<int>(blockDim.x); }
    KVARN_DEVICE KVARN_INLINE void barrier() const noexcept { __syncthreads(); }
    template <class T>
    KVARN_DEVICE KVARN_INLINE T shuffle_xor(T x, int mask) const noexcept
    {
        return __shfl_xor_sync(0xffffffffu, x, mask);
    }
    KVARN_DEVICE KVARN_INLINE void warp_barrier() const noexcept { __syncwarp(); }
    KVARN_DEVICE KVARN_INLINE void mma(float (&c)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2]) const noexcept
    {
        asm volatile(
            "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
    }
    KVARN_DEVICE KVARN_INLINE void mma_tf32(float (&c)[4], const std::uint32_t (&a)[4],
                                            const std::uint32_t (&b)[2]) const noexcept
    {
        asm volatile(
            "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
    }
};
#endif

/// Threads that share one row. Thread k of them plays the lanes k, k + 4, k + 8, k + 12 of the sixteen that a sum is made of.
inline constexpr int row_threads = 4;
inline constexpr int lane_count = 16;

/// The sum of sixteen lanes in halves, 8, 4, 2, 1, as on the CPU. `x` are this thread's four; all four threads get the sum.
template <class Team>
KVARN_DEVICE KVARN_INLINE float fold(Team& team, const float (&x)[4]) noexcept
{
    float sum = add(add(x[0], x[2]), add(x[1], x[3]));
    sum = add(sum, team.shuffle_xor(sum, 2));
    return add(sum, team.shuffle_xor(sum, 1));
}
template <class Team>
KVARN_DEVICE KVARN_INLINE float row_min(Team& team, float x) noexcept
{
    x = minimum(x, team.shuffle_xor(x, 2));
    return minimum(x, team.shuffle_xor(x, 1));
}
template <class Team>
KVARN_DEVICE KVARN_INLINE float row_max(Team& team, float x) noexcept
{
    x = maximum(x, team.shuffle_xor(x, 2));
    return maximum(x, team.shuffle_xor(x, 1));
}

/// In no order that records depend on.
template <class Team>
KVARN_DEVICE KVARN_INLINE float row_sum(Team& team, float x) noexcept
{
    x = add(x, team.shuffle_xor(x, 1));
    return add(x, team.shuffle_xor(x, 2));
}

/// body(row, k) for all rows, four threads each. `rows` is a multiple of 8, so that a warp is never divided.
template <class Team, class Body>
KVARN_DEVICE KVARN_INLINE void for_rows(Team& team, int rows, Body&& body) noexcept
{
    const int k = team.rank() % row_threads;
    for (int row = team.rank() / row_threads; row < rows; row += team.size() / row_threads) body(row, k);
}

/// body(i) for i < n, one thread each.
template <class Team, class Body>
KVARN_DEVICE KVARN_INLINE void for_each(Team& team, int n, Body&& body) noexcept
{
    for (int i = team.rank(); i < n; i += team.size()) body(i);
}

/// Lane sums of x[0 .. n) to lanes[16], by sixteen threads. A barrier before they are read.
template <class Team>
KVARN_DEVICE KVARN_INLINE void sum_lanes(Team& team, const float* x, int n, float* lanes) noexcept
{
    if (team.rank() >= lane_count) return;
    float sum = x[team.rank()];
    for (int i = team.rank() + lane_count; i < n; i += lane_count) sum = add(sum, x[i]);
    lanes[team.rank()] = sum;
}
/// Sixteen lanes in halves.
KVARN_DEVICE KVARN_INLINE float fold_lanes(const float* lanes) noexcept
{
    float x[8];
    KVARN_UNROLL
    for (int i = 0; i < 8; ++i) x[i] = add(lanes[i], lanes[i + 8]);
    KVARN_UNROLL
    for (int i = 0; i < 4; ++i) x[i] = add(x[i], x[i + 4]);
    return add(add(x[0], x[2]), add(x[1], x[3]));
}
/// The largest x of all threads; `room` holds size() / 32 words. Two barriers.
template <class Team>
KVARN_DEVICE KVARN_INLINE std::uint32_t largest_of_all(Team& team, std::uint32_t x, std::uint32_t* room) noexcept
{
    for (int mask = 16; mask >= 1; mask /= 2) {
        const std::uint32_t other = team.shuffle_xor(x, mask);
        x = other > x ? other : x;
    }
    team.barrier();
    if (team.rank() % 32 == 0) room[team.rank() / 32] = x;
    team.barrier();
    for (int w = 0; w < team.size() / 32; ++w) x = room[w] > x ? room[w] : x;
    return x;
}

}  // namespace kvarn::cuda::detail
