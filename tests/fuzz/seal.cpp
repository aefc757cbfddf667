// SPDX-License-Identifier: Apache-2.0
// quantize_kv. In: format, shapes, strides, values, options, ranges and buffers. The kernels of this build and the portable ones return the
// same status and the same bytes, whatever the strides, the addresses and what scratch held before; an error writes nothing; success
// writes the records of the range and nothing else; and what was sealed can be opened.

#include "shapes.hpp"

namespace {

using namespace fuzz;
using kvarn::status;

struct seal_case {
    kvarn::format f;
    grid records;
    kvarn::record_range range;
    kvarn::encode_options options;
    std::size_t items = 0;       ///< of the range
    std::size_t less_scratch = 0, less_records = 0;
    bool report = false, few_errors = false;
};

kvarn::encode_options take_options(source& in)
{
    kvarn::encode_options o;
    o.encoder = in.flag() ? kvarn::encoder::paper : kvarn::encoder::refined;
    if (in.one_in(3)) {
        o.iterations = in.take() % 12;
        o.refined_iterations = in.take() % 4;
        o.refit_rounds = in.take() % 8;
        o.clip_steps = in.take() % 9;
    }
    if (in.one_in(64)) (in.flag() ? o.iterations : o.clip_steps) = in.take<std::int32_t>();
    if (in.one_in(4)) o.key_basis = kvarn::basis::rotated;
    if (in.one_in(4)) o.value_basis = kvarn::basis::rotated;
    if (in.one_in(64)) o.encoder = static_cast<kvarn::encoder>(in.take());
    if (in.one_in(64)) (in.flag() ? o.key_basis : o.value_basis) = static_cast<kvarn::basis>(in.take());
    if (o.iterations > 12 && o.iterations <= 64) o.iterations = 12;  // more would take long
    return o;
}

bool is_valid(const kvarn::encode_options& o)
{
    const auto within = [](int n, int most) { return n >= 0 && n <= most; };
    return o.encoder <= kvarn::encoder::refined && within(o.iterations, 64) && within(o.refined_iterations, 64) &&
           within(o.refit_rounds, 16) && within(o.clip_steps, 8) && o.key_basis <= kvarn::basis::rotated && o.value_basis <= kvarn::basis::rotated;
}

/// What one call left behind.
struct sealed {
    memory records, scratch, errors;
    status result = status::ok;

    sealed(const seal_case& c, std::size_t misalignment, std::uint8_t scratch_fill)
        : records(c.records.bytes(c.f) - std::min(c.less_records, c.records.bytes(c.f)), misalignment, 0xa5),
          scratch(kvarn::scratch_bytes(c.f) - c.less_scratch, misalignment * 7 % 64, scratch_fill),
          errors(c.report ? (c.items - (c.few_errors ? 1 : 0)) * sizeof(kvarn::record_errors) : 0, 0, 0xa5)
    {}

    [[nodiscard]] std::span<kvarn::record_errors> lost() const
    {
        return {reinterpret_cast<kvarn::record_errors*>(errors.bytes()), errors.size() / sizeof(kvarn::record_errors)};
    }
};

template <class Arch, class T>
void run(const seal_case& c, const array<T>& k, const array<T>& v, sealed& to)
{
    const kvarn::kv_view<const T> values = c.f.has_values() ? kvarn::kv_view<const T>(v.view()) : kvarn::kv_view<const T>{};
    to.result = kvarn::quantize_kv<Arch>(c.f, kvarn::kv_view<const T>(k.view()), values, c.records.over(to.records), to.scratch.span(),
                                         c.options, c.range, to.lost());
    to.records.require_intact();
    to.scratch.require_intact();
    to.errors.require_intact();
}

/// The items of the range that the grid has.
std::size_t items_of(const grid& g, const kvarn::record_range& r)
{
    const std::size_t end = std::min(r.end, g.tiles * g.heads);
    return end > r.begin ? end - r.begin : 0;
}

/// The bytes that may differ from what was there: the records of the range.
void require_only_range(const seal_case& c, const sealed& s)
{
    memory rest(s.records.size(), 0, 0);
    std::memcpy(rest.bytes(), s.records.bytes(), rest.size());
    const kvarn::record_grid<std::byte> g = c.records.over(rest);
    const std::size_t content = kvarn::layout_of(c.f).content_bytes, owned = std::max(content, c.records.record_bytes);
    for (std::size_t i = c.range.begin; i < c.range.begin + c.items; ++i) {
        std::byte* const record = g.at(i / g.heads, i % g.heads);
        require(is_finite(c.f, record), "the scalars of a record are finite");
        for (std::size_t b = content; b < owned; ++b) require(record[b] == std::byte{0}, "the padding of a record is zero");
        std::memset(record, 0xa5, owned);
    }
    require(rest.holds_only(0xa5), "nothing but the records of the range is written");
}

/// The magnitudes that the range may hold are known, and so is what must come of them.
template <class T>
void require_status(const seal_case& c, const array<T>& k, const array<T>& v, status s)
{
    bool finite = true;
    float largest = 0;
    const auto look = [&](const array<T>& x) {
        x.for_each([&](std::size_t t, std::size_t h, std::size_t, const T& e) {
            const std::size_t item = t / static_cast<std::size_t>(c.f.group()) * c.records.heads + h;
            if (item < c.range.begin || item >= c.range.begin + c.items) return;
            const float value = std::fabs(value_of(e));
            finite = finite && std::isfinite(value);
            largest = std::max(largest, value);
        });
    };
    look(k);
    if (c.f.has_values()) look(v);
    if (!finite) require(s == status::not_finite || s == status::scale_overflow, "a value that is not finite is refused");
    else if (largest <= 48000.0f / 24.0f) require(s == status::ok, "moderate values are sealed");
    else require(s == status::ok || s == status::scale_overflow, "finite values are sealed or too large");
}

/// The records in pieces, one call for each: the same bytes.
template <class T>
void require_pieces(const seal_case& c, const array<T>& k, const array<T>& v, const sealed& whole)
{
    seal_case piece = c;
    piece.report = false;
    sealed parts(piece, 3, 0x33);
    for (std::size_t i = 0; i < c.items; ++i) {
        piece.range = {c.range.begin + i, c.range.begin + i + 1};
        run<kvarn::simd::native_arch>(piece, k, v, parts);
        require(parts.result == status::ok, "a part of what can be sealed can be sealed");
    }
    require(same_bytes(parts.records, whole.records), "a record does not depend on the rest of the call");
}

template <class T>
void require_opens(const seal_case& c, const sealed& s)
{
    const auto group = static_cast<std::size_t>(c.f.group());
    const array<T> k({c.records.tiles * group, c.records.heads, static_cast<std::size_t>(c.f.key_channels()),
                      static_cast<std::ptrdiff_t>(c.records.heads) * c.f.key_channels(), c.f.key_channels(), 1},
                     0);
    const status opened = kvarn::dequantize_kv<kvarn::simd::native_arch>(c.f, c.records.over(s.records), k.view(), kvarn::kv_view<T>{},
                                                                         kvarn::basis::original, s.scratch.span(), c.range);
    require(opened == status::ok, "what was sealed can be opened");
    k.require_written([&](std::size_t t, std::size_t h) {
        const std::size_t item = t / group * c.records.heads + h;
        return item >= c.range.begin && item < c.range.begin + c.items;
    });
}

template <class T>
void check(source& in, seal_case& c)
{
    const std::size_t tokens = c.records.tiles * static_cast<std::size_t>(c.f.group());
    const array<T> k(take_input(in, tokens, c.records.heads, static_cast<std::size_t>(c.f.key_channels())), in.take() % 16);
    const array<T> v(take_input(in, tokens, c.records.heads, static_cast<std::size_t>(c.f.head_dim_v())), in.take() % 16);
    sealed native(c, in.take() % 64, in.take()), portable(c, in.take() % 64, in.take());
    const bool thorough = in.one_in(4);
    fill(in, k);
    fill(in, v);
    run<kvarn::simd::native_arch>(c, k, v, native);
    run<kvarn::simd::portable>(c, k, v, portable);
    require(native.result == portable.result, "both kernels return the same status");
    require(same_bytes(native.records, portable.records), "both kernels write the same records");
    require(same_bytes(native.errors, portable.errors), "both kernels report the same errors");

    const bool valid = is_valid(c.options) && c.range.begin <= c.range.end && c.less_scratch == 0 && c.less_records == 0 &&
                       !c.few_errors;
    if (native.result != status::ok || c.items == 0) {
        require(native.records.holds_only(0xa5) && native.errors.holds_only(0xa5), "an error writes nothing");
        if (valid && c.items != 0) require_status(c, k, v, native.result);
        return;
    }
    require(valid, "what is not valid is refused");
    require_status(c, k, v, native.result);
    require_only_range(c, native);
    if (!thorough) return;
    require_opens<T>(c, native);
    require_pieces(c, k, v, native);
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size)
{
    source in(data, size);
    seal_case c;
    c.f = take_format(in);
    c.records = take_grid(in, c.f);
    c.range = take_range(in, c.records.tiles * c.records.heads);
    c.items = items_of(c.records, c.range);
    c.options = take_options(in);
    c.report = c.items != 0 && in.flag();
    c.few_errors = c.report && c.items > 1 && in.one_in(32);
    if (c.items != 0 && in.one_in(64)) c.less_scratch = 1;
    // The last record of the grid lies at the end of the buffer.
    if (c.items != 0 && c.range.begin + c.items == c.records.tiles * c.records.heads && in.one_in(64)) c.less_records = 1;
    with_element(take_element(in), [&]<class T>(T) { check<T>(in, c); });
    return 0;
}
