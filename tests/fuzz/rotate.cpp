// SPDX-License-Identifier: Apache-2.0
// rotate and unrotate, in place. In: shapes, strides and values. The kernels of this build and the portable ones give the same bits
// wherever the values are finite, touch nothing else, and the two directions undo each other.

#include "shapes.hpp"

namespace {

using namespace fuzz;
using kvarn::status;

template <class Arch, class T>
status run(bool forward, const array<T>& x)
{
    const status s = forward ? kvarn::rotate<Arch>(x.view()) : kvarn::unrotate<Arch>(x.view());
    x.require_written([&](std::size_t, std::size_t) { return true; });
    return s;
}

template <class T>
void copy(const array<T>& from, const array<T>& to)
{
    from.for_each([&](std::size_t t, std::size_t h, std::size_t c, const T& x) { to(t, h, c) = x; });
}

template <class T>
void check(source& in, const layout& l)
{
    const bool forward = in.flag();
    const array<T> native(l, in.take() % 16);
    const array<T> portable(take_output(in, l.tokens, l.heads, l.channels), in.take() % 16);
    fill(in, native);
    bool finite = true;
    double largest = 0;
    native.for_each([&](std::size_t, std::size_t, std::size_t, T& x) {
        finite = finite && std::isfinite(value_of(x));
        largest = std::max(largest, std::fabs(static_cast<double>(value_of(x))));
    });
    copy(native, portable);
    const array<T> before(l, 0);
    copy(native, before);
    const status s = run<kvarn::simd::native_arch>(forward, native);
    require(s == run<kvarn::simd::portable>(forward, portable), "both kernels return the same status");
    const bool supported = l.channels >= 32 && l.channels <= 576 && kvarn::factor_head_dim(static_cast<int>(l.channels)).outer != 0;
    require(s == (supported ? status::ok : status::unsupported_head_dim), "the status is right");
    if (!finite || largest > 1e36) return;  // sums may overflow
    native.for_each([&](std::size_t t, std::size_t h, std::size_t c, const T& x) {
        require(std::memcmp(&x, &portable(t, h, c), sizeof x) == 0, "both kernels rotate alike");
        if (!supported) require(std::memcmp(&x, &before(t, h, c), sizeof x) == 0, "an error writes nothing");
    });
    if (!supported || !std::is_same_v<T, float>) return;
    (void)run<kvarn::simd::native_arch>(!forward, native);
    const double bound = 1e-5 * largest * std::sqrt(static_cast<double>(l.channels)) + 1e-30;
    native.for_each([&](std::size_t t, std::size_t h, std::size_t c, const T& x) {
        require(std::fabs(static_cast<double>(value_of(x)) - static_cast<double>(value_of(before(t, h, c)))) <= bound, "the directions undo each other");
    });
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size)
{
    source in(data, size);
    std::size_t channels = static_cast<std::size_t>(take_format(in).head_dim_k());
    if (in.one_in(32)) channels = in.below(700);
    const std::size_t tokens = in.pick<std::size_t>({1, 1, 2, 3, 16, 17, 33, 0}), heads = in.pick<std::size_t>({1, 1, 2, 0});
    const element type = take_element(in);
    const layout l = take_output(in, tokens, heads, channels);
    with_element(type, [&]<class T>(T) { check<T>(in, l); });
    return 0;
}
