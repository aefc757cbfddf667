// SPDX-License-Identifier: Apache-2.0
#pragma once
// lanes<portable>: sixteen floats in memory. An operation returns an expression, lane i of which is a function of i, and what keeps or
// stores it runs through the lanes once, in a loop: little code, and no array for what is only passed on. Same bits as any other lanes.
// Included by simd/lanes.hpp only.

#include <kvarn/base/config.hpp>  // first: it refuses older standards

#include <concepts>
#include <type_traits>

#include <kvarn/simd/portable.hpp>

namespace kvarn::simd {

inline constexpr int lane_count = 16;

template <class Arch, int Count = lane_count>
struct lanes;

/// Calls f(i) for every lane.
template <class F>
KVARN_INLINE void for_lanes(F&& f) noexcept
{
    KVARN_ROLL
    for (int i = 0; i < lane_count; ++i) f(i);
}

/// A value of sixteen lanes that nobody has computed yet. It lives no longer than the statement it is written in.
template <class F>
struct lane_expression {
    F lane;

    KVARN_INLINE float operator()(int i) const noexcept { return lane(i); }
    template <class T>
    KVARN_INLINE void store(T* p) const noexcept
    {
        for_lanes([&](int i) KVARN_LAMBDA { kernels<portable>::store(p + i, lane(i)); });
    }
};

template <>
struct lanes<portable, lane_count> {
    using k = kernels<portable>;
    static constexpr int count = lane_count;
    static constexpr int registers = lane_count;
    float r[lane_count];

    lanes() = default;
    template <class F>
    KVARN_INLINE lanes(const lane_expression<F>& x) noexcept
    {
        for_lanes([&](int i) KVARN_LAMBDA { r[i] = x(i); });
    }
    template <class F>
    KVARN_INLINE lanes& operator=(const lane_expression<F>& x) noexcept
    {
        for_lanes([&](int i) KVARN_LAMBDA { r[i] = x(i); });
        return *this;
    }

    template <class F>
    KVARN_INLINE static auto make(F f) noexcept
    {
        return lane_expression<F>{f};
    }
    KVARN_INLINE static auto broadcast(float v) noexcept
    {
        return make([v](int) KVARN_LAMBDA { return v; });
    }
    template <class T>
    KVARN_INLINE static auto load(const T* p) noexcept
    {
        return make([p](int i) KVARN_LAMBDA { return k::load(p + i); });
    }
    template <class T>
    KVARN_INLINE void store(T* p) const noexcept
    {
        for_lanes([&](int i) KVARN_LAMBDA { k::store(p + i, r[i]); });
    }
    KVARN_INLINE void hold() noexcept {}
};

namespace detail {

struct lane_reference {
    const float* r;

    KVARN_INLINE float operator()(int i) const noexcept { return r[i]; }
};
KVARN_INLINE lane_reference operand(const lanes<portable>& x) noexcept { return {x.r}; }
template <class F>
KVARN_INLINE lane_expression<F> operand(const lane_expression<F>& x) noexcept
{
    return x;
}

}  // namespace detail

/// A lanes<portable>, or an expression of them.
template <class T>
concept portable_lanes = requires(const T& x) { detail::operand(x); };

template <portable_lanes A, portable_lanes B>
KVARN_INLINE auto add(const A& a, const B& b) noexcept
{
    return lanes<portable>::make([x = detail::operand(a), y = detail::operand(b)](int i) KVARN_LAMBDA { return kernels<portable>::add(x(i), y(i)); });
}
template <portable_lanes A, portable_lanes B>
KVARN_INLINE auto sub(const A& a, const B& b) noexcept
{
    return lanes<portable>::make([x = detail::operand(a), y = detail::operand(b)](int i) KVARN_LAMBDA { return kernels<portable>::sub(x(i), y(i)); });
}
template <portable_lanes A, portable_lanes B>
KVARN_INLINE auto mul(const A& a, const B& b) noexcept
{
    return lanes<portable>::make([x = detail::operand(a), y = detail::operand(b)](int i) KVARN_LAMBDA { return kernels<portable>::mul(x(i), y(i)); });
}
template <portable_lanes A, portable_lanes B>
KVARN_INLINE auto div(const A& a, const B& b) noexcept
{
    return lanes<portable>::make([x = detail::operand(a), y = detail::operand(b)](int i) KVARN_LAMBDA { return kernels<portable>::div(x(i), y(i)); });
}
template <portable_lanes A>
KVARN_INLINE auto sqrt(const A& a) noexcept
{
    return lanes<portable>::make([x = detail::operand(a)](int i) KVARN_LAMBDA { return kernels<portable>::sqrt(x(i)); });
}
template <portable_lanes A, portable_lanes B, portable_lanes C>
KVARN_INLINE auto fma(const A& a, const B& b, const C& c) noexcept
{
    return lanes<portable>::make([x = detail::operand(a), y = detail::operand(b), z = detail::operand(c)](int i) KVARN_LAMBDA {
        return kernels<portable>::fma(x(i), y(i), z(i));
    });
}
template <portable_lanes A, portable_lanes B, portable_lanes C>
KVARN_INLINE auto fnma(const A& a, const B& b, const C& c) noexcept
{
    return lanes<portable>::make([x = detail::operand(a), y = detail::operand(b), z = detail::operand(c)](int i) KVARN_LAMBDA {
        return kernels<portable>::fnma(x(i), y(i), z(i));
    });
}
template <portable_lanes A, portable_lanes B>
KVARN_INLINE auto minimum(const A& a, const B& b) noexcept
{
    return lanes<portable>::make([x = detail::operand(a), y = detail::operand(b)](int i) KVARN_LAMBDA { return kernels<portable>::minimum(x(i), y(i)); });
}
template <portable_lanes A, portable_lanes B>
KVARN_INLINE auto maximum(const A& a, const B& b) noexcept
{
    return lanes<portable>::make([x = detail::operand(a), y = detail::operand(b)](int i) KVARN_LAMBDA { return kernels<portable>::maximum(x(i), y(i)); });
}
template <portable_lanes A>
KVARN_INLINE auto magnitude(const A& a) noexcept
{
    return lanes<portable>::make([x = detail::operand(a)](int i) KVARN_LAMBDA { return kernels<portable>::magnitude(x(i)); });
}

template <portable_lanes A>
KVARN_INLINE auto rounded(const A& a) noexcept
{
    return lanes<portable>::make([x = detail::operand(a)](int i) KVARN_LAMBDA { return kernels<portable>::rounded(x(i)); });
}
template <portable_lanes A, portable_lanes B, portable_lanes C, portable_lanes D>
KVARN_INLINE auto where_greater(const A& a, const B& b, const C& yes, const D& no) noexcept
{
    return lanes<portable>::make([x = detail::operand(a), y = detail::operand(b), z = detail::operand(yes), w = detail::operand(no)](int i) KVARN_LAMBDA {
        return kernels<portable>::where_greater(x(i), y(i), z(i), w(i));
    });
}

KVARN_INLINE float reduce_min(const lanes<portable>& a) noexcept
{
    float x = a.r[0];
    KVARN_ROLL
    for (int i = 1; i < lane_count; ++i) x = kernels<portable>::minimum(x, a.r[i]);
    return x;
}
KVARN_INLINE float reduce_max(const lanes<portable>& a) noexcept
{
    float x = a.r[0];
    KVARN_ROLL
    for (int i = 1; i < lane_count; ++i) x = kernels<portable>::maximum(x, a.r[i]);
    return x;
}
/// The sum over the lanes, halves first.
KVARN_INLINE float fold(const lanes<portable>& a) noexcept
{
    float x[lane_count / 2];
    KVARN_ROLL
    for (int i = 0; i < lane_count / 2; ++i) x[i] = kernels<portable>::add(a.r[i], a.r[i + lane_count / 2]);
    for (int half = lane_count / 4; half >= 1; half /= 2)
        for (int i = 0; i < half; ++i) x[i] = kernels<portable>::add(x[i], x[i + half]);
    return x[0];
}
KVARN_INLINE float reduce_add(const lanes<portable>& a) noexcept { return fold(a); }

}  // namespace kvarn::simd
