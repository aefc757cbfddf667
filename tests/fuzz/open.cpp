// SPDX-License-Identifier: Apache-2.0
// dequantize_kv. In: any bytes as records, format, shapes, strides and buffers. A scalar that is not finite is refused before anything is
// written; everything else decodes to finite values, the same from the kernels of this build and the portable ones.

#include "shapes.hpp"

namespace {

using namespace fuzz;
using kvarn::status;

struct open_case {
    kvarn::format f;
    grid records;
    kvarn::record_range range;
    std::size_t items = 0;
    kvarn::basis basis = kvarn::basis::original;
    bool k = true, v = true;
    std::size_t less_scratch = 0;

    [[nodiscard]] bool in_range(std::size_t item) const { return item >= range.begin && item < range.begin + items; }
};

template <class T>
struct opened {
    array<T> k, v;
    status result = status::ok;
};

template <class Arch, class T>
void run(const open_case& c, const memory& records, opened<T>& to, std::size_t misalignment, std::uint8_t scratch_fill)
{
    const memory scratch(kvarn::scratch_bytes(c.f) - c.less_scratch, misalignment, scratch_fill);
    const kvarn::record_grid<const std::byte> g = c.records.over(records);
    to.result = kvarn::dequantize_kv<Arch>(c.f, g, c.k ? to.k.view() : kvarn::kv_view<T>{}, c.v ? to.v.view() : kvarn::kv_view<T>{},
                                           c.basis, scratch.span(), c.range);
    scratch.require_intact();
}

template <class T>
void require_same(const array<T>& a, const array<T>& b)
{
    a.for_each([&](std::size_t t, std::size_t h, std::size_t ch, const T& x) {
        require(std::memcmp(&x, &b(t, h, ch), sizeof x) == 0, "both kernels decode alike");
    });
}

/// Finite values where the range is, and the exact channels as they lie in the record.
template <class T>
void require_values(const open_case& c, const memory& records, const opened<T>& out)
{
    const auto group = static_cast<std::size_t>(c.f.group()), exact = static_cast<std::size_t>(c.f.exact_channels()),
               quantized = static_cast<std::size_t>(c.f.head_dim_k());
    const auto g = c.records.over(records);
    const auto look = [&](bool wanted, const array<T>& x, bool keys) {
        x.require_written([&](std::size_t t, std::size_t h) { return wanted && c.in_range(t / group * c.records.heads + h); });
        if (!wanted) return;
        x.for_each([&](std::size_t t, std::size_t h, std::size_t channel, const T& value) {
            if (!c.in_range(t / group * c.records.heads + h)) return;
            require(std::isfinite(value_of(value)), "what is decoded is finite");
            if (!keys || channel < quantized) return;
            kvarn::half kept;
            const std::byte* const record = g.at(t / group, h);
            std::memcpy(&kept, record + kvarn::layout_of(c.f).exact + 2 * (t % group * exact + channel - quantized), sizeof kept);
            const T wanted_value = kvarn::saturate_to<T>(kvarn::to_float(kept));
            require(std::memcmp(&wanted_value, &value, sizeof value) == 0, "exact channels come back as they are");
        });
    };
    look(c.k, out.k, true);
    look(c.v, out.v, false);
}

template <class T>
void check(source& in, const open_case& c, const memory& records)
{
    const std::size_t tokens = c.records.tiles * static_cast<std::size_t>(c.f.group());
    const auto channels_k = static_cast<std::size_t>(c.f.key_channels()), channels_v = static_cast<std::size_t>(c.f.head_dim_v());
    const auto room = [&](std::size_t channels) { return take_output(in, tokens, c.records.heads, channels); };
    opened<T> native{{room(channels_k), in.take() % 16u}, {room(channels_v), in.take() % 16u}};
    opened<T> portable{{room(channels_k), in.take() % 16u}, {room(channels_v), in.take() % 16u}};
    run<kvarn::simd::native_arch>(c, records, native, in.take() % 64, in.take());
    run<kvarn::simd::portable>(c, records, portable, in.take() % 64, in.take());
    require(native.result == portable.result, "both kernels return the same status");

    const bool valid = c.basis <= kvarn::basis::rotated && c.range.begin <= c.range.end && c.less_scratch == 0;
    bool finite = true;
    for (std::size_t i = c.range.begin; i < c.range.begin + c.items; ++i)
        finite = finite && is_finite(c.f, c.records.over(records).at(i / c.records.heads, i % c.records.heads));
    if (valid && c.items != 0 && (c.k || c.v)) require(native.result == (finite ? status::ok : status::not_finite), "the status is right");
    if (native.result != status::ok) {
        for (const array<T>* x : {&native.k, &native.v, &portable.k, &portable.v}) x->require_written([](std::size_t, std::size_t) { return false; });
        return;
    }
    require(valid || (c.items == 0 && c.basis <= kvarn::basis::rotated), "what is not valid is refused");
    require_values(c, records, native);
    require_values(c, records, portable);
    if (c.k) require_same(native.k, portable.k);
    if (c.v) require_same(native.v, portable.v);
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size)
{
    source in(data, size);
    open_case c;
    c.f = take_format(in);
    c.records = take_grid(in, c.f);
    const std::size_t all = c.records.tiles * c.records.heads;
    c.range = take_range(in, all);
    c.items = c.range.begin < std::min(c.range.end, all) ? std::min(c.range.end, all) - c.range.begin : 0;
    c.basis = in.one_in(64) ? static_cast<kvarn::basis>(in.take()) : in.flag() ? kvarn::basis::original : kvarn::basis::rotated;
    c.k = !in.one_in(8);
    c.v = c.f.has_values() && !in.one_in(8);
    if (in.one_in(64)) c.less_scratch = 1;
    const memory records(c.records.bytes(c.f), in.take() % 64, 0xff);
    const auto kind = in.pick({scalars::plausible, scalars::finite, scalars::any});
    const element type = take_element(in);
    random_source numbers(in.take<std::uint32_t>());
    for (std::size_t i = 0; i < all; ++i) fill_record(in, numbers, c.f, kind, c.records.over(records).at(i / c.records.heads, i % c.records.heads));
    with_element(type, [&]<class T>(T) { check<T>(in, c, records); });
    return 0;
}
