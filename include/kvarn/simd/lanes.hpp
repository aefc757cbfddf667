// SPDX-License-Identifier: Apache-2.0
#pragma once
// lanes<Arch>: sixteen floats, however many registers that takes. The stages are written once, against sixteen virtual lanes,
// so that a sum runs in the same order on every instruction set: lane j adds the elements j, j + 16, j + 32, ... and the
// lanes are then added in halves (8, 4, 2, 1). Loops that carry sums of lanes, with which no other lane meets, run in parts of them.

#include <kvarn/simd/portable_lanes.hpp>
#include <kvarn/simd/xsimd.hpp>

namespace kvarn::simd {

/// `n` rounded up to whole lanes.
[[nodiscard]] KVARN_INLINE constexpr int whole_lanes(int n) noexcept { return (n + lane_count - 1) / lane_count * lane_count; }

template <class Arch, int Count>
struct lanes {
    using k = kernels<Arch>;
    static constexpr int count = Count;
    static constexpr int registers = Count / k::width;
    typename k::reg r[registers];

    template <class F>
    KVARN_INLINE static lanes make(F&& f) noexcept
    {
        lanes x;
        KVARN_UNROLL
        for (int i = 0; i < registers; ++i) x.r[i] = f(i);
        return x;
    }

    KVARN_INLINE static lanes broadcast(float v) noexcept
    {
        return make([&](int) KVARN_LAMBDA { return k::broadcast(v); });
    }
    template <class T>
    KVARN_INLINE static lanes load(const T* p) noexcept
    {
        return make([&](int i) KVARN_LAMBDA { return k::load(p + i * k::width); });
    }
    template <class T>
    KVARN_INLINE void store(T* p) const noexcept
    {
        KVARN_UNROLL
        for (int i = 0; i < registers; ++i) k::store(p + i * k::width, r[i]);
    }

    /// Lanes [e, e + Part::count).
    template <class Part>
    KVARN_INLINE Part get(int e) const noexcept
    {
        return Part::make([&](int i) KVARN_LAMBDA { return r[e / k::width + i]; });
    }
    template <class Part>
    KVARN_INLINE void set(int e, const Part& x) noexcept
    {
        KVARN_UNROLL
        for (int i = 0; i < Part::registers; ++i) r[e / k::width + i] = x.r[i];
    }

    KVARN_INLINE void hold() noexcept
    {
        KVARN_UNROLL
        for (int i = 0; i < registers; ++i) k::hold(r[i]);
    }

    KVARN_INLINE friend lanes add(const lanes& a, const lanes& b) noexcept
    {
        return make([&](int i) KVARN_LAMBDA { return k::add(a.r[i], b.r[i]); });
    }
    KVARN_INLINE friend lanes sub(const lanes& a, const lanes& b) noexcept
    {
        return make([&](int i) KVARN_LAMBDA { return k::sub(a.r[i], b.r[i]); });
    }
    KVARN_INLINE friend lanes mul(const lanes& a, const lanes& b) noexcept
    {
        return make([&](int i) KVARN_LAMBDA { return k::mul(a.r[i], b.r[i]); });
    }
    KVARN_INLINE friend lanes div(const lanes& a, const lanes& b) noexcept
    {
        return make([&](int i) KVARN_LAMBDA { return k::div(a.r[i], b.r[i]); });
    }
    KVARN_INLINE friend lanes sqrt(const lanes& a) noexcept
    {
        return make([&](int i) KVARN_LAMBDA { return k::sqrt(a.r[i]); });
    }
    KVARN_INLINE friend lanes fma(const lanes& a, const lanes& b, const lanes& c) noexcept
    {
        if constexpr (requires(lanes sum) { k::fma_all(a.r, b.r, c.r, sum.r); }) {
            lanes sum;
            k::fma_all(a.r, b.r, c.r, sum.r);
            return sum;
        } else {
            return make([&](int i) KVARN_LAMBDA { return k::fma(a.r[i], b.r[i], c.r[i]); });
        }
    }
    KVARN_INLINE friend lanes fnma(const lanes& a, const lanes& b, const lanes& c) noexcept
    {
        return make([&](int i) KVARN_LAMBDA { return k::fnma(a.r[i], b.r[i], c.r[i]); });
    }
    KVARN_INLINE friend lanes minimum(const lanes& a, const lanes& b) noexcept
    {
        return make([&](int i) KVARN_LAMBDA { return k::minimum(a.r[i], b.r[i]); });
    }
    KVARN_INLINE friend lanes maximum(const lanes& a, const lanes& b) noexcept
    {
        return make([&](int i) KVARN_LAMBDA { return k::maximum(a.r[i], b.r[i]); });
    }

    KVARN_INLINE friend lanes magnitude(const lanes& a) noexcept
    {
        return make([&](int i) KVARN_LAMBDA { return k::magnitude(a.r[i]); });
    }
    KVARN_INLINE friend lanes rounded(const lanes& a) noexcept
    {
        return make([&](int i) KVARN_LAMBDA { return k::rounded(a.r[i]); });
    }
    KVARN_INLINE friend lanes where_greater(const lanes& a, const lanes& b, const lanes& yes, const lanes& no) noexcept
    {
        return make([&](int i) KVARN_LAMBDA { return k::where_greater(a.r[i], b.r[i], yes.r[i], no.r[i]); });
    }

    KVARN_INLINE friend float reduce_min(const lanes& a) noexcept
    {
        auto x = a.r[0];
        KVARN_UNROLL
        for (int i = 1; i < registers; ++i) x = k::minimum(x, a.r[i]);
        return k::reduce_min(x);
    }
    KVARN_INLINE friend float reduce_max(const lanes& a) noexcept
    {
        auto x = a.r[0];
        KVARN_UNROLL
        for (int i = 1; i < registers; ++i) x = k::maximum(x, a.r[i]);
        return k::reduce_max(x);
    }

    KVARN_INLINE friend float reduce_add(const lanes& a) noexcept { return k::reduce_add(fold(a)); }

    /// The first folds of a sum over the lanes, until one register is left.
    KVARN_INLINE friend typename k::reg fold(const lanes& a) noexcept
    {
        lanes x = a;
        KVARN_UNROLL
        for (int half = registers / 2; half >= 1; half /= 2)
            for (int i = 0; i < half; ++i) x.r[i] = k::add(x.r[i], x.r[i + half]);
        return x.r[0];
    }
};

/// As many of the sixteen lanes as a loop can carry several sums of in registers: four where a register is one lane.
template <class Arch>
using part_lanes = lanes<Arch, kernels<Arch>::width == 1 ? 4 : lane_count>;

/// As many of those as such a loop takes through all its operations before it goes on to the next: one register, so that few are
/// needed beside the sums; all where fused additions are emulated, and cost less together.
template <class Arch>
KVARN_INLINE constexpr int step_count() noexcept
{
#if defined(KVARN_HAS_FMA)
    if constexpr (!requires(part_lanes<Arch> x) { kernels<Arch>::fma_all(x.r, x.r, x.r, x.r); }) return kernels<Arch>::width;
#endif
    return part_lanes<Arch>::count;
}
template <class Arch>
using step_lanes = lanes<Arch, step_count<Arch>()>;

/// Calls work(sum, e) for the lanes from e on of all sums, which are part_lanes then: the loop that carries them stands inside `work`.
template <class Arch, int Sums, class F>
KVARN_INLINE void sum_in_parts(lanes<Arch> (&sum)[Sums], F&& work) noexcept
{
    using part = part_lanes<Arch>;
    if constexpr (part::count == lane_count) {
        work(sum, 0);
    } else {
        for (int e = 0; e < lane_count; e += part::count) {
            part some[Sums];
            work(some, e);
            KVARN_UNROLL
            for (int i = 0; i < Sums; ++i) some[i].store(sum[i].r + e);
        }
    }
}

/// Sums of sixteen rows that were folded to one register each: `folded` is [16][width]; lane i of the result is row i's sum.
template <class Arch>
KVARN_INLINE lanes<Arch> sum_folded_rows(const float* folded) noexcept
{
    using k = kernels<Arch>;
    return lanes<Arch>::make([&](int i) KVARN_LAMBDA {
        typename k::reg rows[k::width];
        KVARN_UNROLL
        for (int j = 0; j < k::width; ++j) rows[j] = k::load(folded + (i * k::width + j) * k::width);
        return k::sum_rows(rows);
    });
}

}  // namespace kvarn::simd
