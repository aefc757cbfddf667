// SPDX-License-Identifier: Apache-2.0
#pragma once
// The C interface, first part: the library itself, views, formats, records, and the choice of a basis. Compiled once,
// by c/implementation.hpp. In and out: as kvarn.h says. No allocation.

#include <kvarn/base/config.hpp>  // first: it refuses older standards

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>
#include <string_view>

#include <kvarn/c/entry_points.hpp>
#include <kvarn/c/structs.hpp>
#include <kvarn/dispatch/cache.hpp>
#include <kvarn/dispatch/calls.hpp>
#include <kvarn/scratch.hpp>
#include <kvarn/version.hpp>

#if defined(KVARN_KERNELS_C)
namespace kvarn {
#if defined(KVARN_KERNELS_PORTABLE)
KVARN_C_ENTRY_POINTS(extern template, simd::portable)
#endif
#if defined(KVARN_KERNELS_NEON64)
KVARN_C_ENTRY_POINTS(extern template, simd::neon64)
#endif
#if defined(KVARN_KERNELS_SSE2)
KVARN_C_ENTRY_POINTS(extern template, simd::sse2)
#endif
#if defined(KVARN_KERNELS_AVX2)
KVARN_C_ENTRY_POINTS(extern template, simd::avx2)
#endif
#if defined(KVARN_KERNELS_AVX512)
KVARN_C_ENTRY_POINTS(extern template, simd::avx512)
#endif
}  // namespace kvarn
#endif

namespace kvarn::c {

/// The content of a record rounded up; 0 where that overflows.
[[nodiscard]] KVARN_INLINE std::size_t distance_of(const format& f, std::size_t round_to) noexcept
{
    const std::size_t content = layout_of(f).content_bytes, unit = round_to == 0 ? 8 : round_to;
    if (unit > SIZE_MAX / 2) return 0;
    return (content + unit - 1) / unit * unit;
}

[[nodiscard]] KVARN_INLINE kvarn_records dense_grid(const kvarn_format* format, const void* data, std::size_t bytes,
                                                    std::size_t tiles, std::size_t heads, std::size_t round_to,
                                                    bool by_heads) noexcept
{
    kvarn_records grid = KVARN_RECORDS_INIT;
    kvarn::format f;
    if (to_format(format, f) != status::ok) return grid;
    const std::size_t one = distance_of(f, round_to), along = by_heads ? tiles : heads;
    if (one == 0 || (along != 0 && one > SIZE_MAX / along)) return grid;
    grid.data = const_cast<void*>(data);
    grid.bytes = bytes;
    grid.tiles = tiles;
    grid.heads = heads;
    grid.tile_stride = by_heads ? one : one * along;
    grid.head_stride = by_heads ? one * along : one;
    grid.record_bytes = one;
    return grid;
}

[[nodiscard]] KVARN_INLINE kvarn_view dense_view(const void* data, std::int32_t type, std::size_t tokens, std::size_t heads,
                                                 std::size_t channels, bool by_heads) noexcept
{
    kvarn_view view = KVARN_VIEW_INIT;
    view.data = const_cast<void*>(data);
    view.type = type;
    view.tokens = tokens;
    view.heads = heads;
    view.channels = channels;
    view.token_stride = static_cast<std::ptrdiff_t>(by_heads ? channels : heads * channels);
    view.head_stride = static_cast<std::ptrdiff_t>(by_heads ? tokens * channels : channels);
    return view;
}

/// A view `elements` further on.
[[nodiscard]] KVARN_INLINE kvarn_view part_of(kvarn_view view, std::ptrdiff_t elements) noexcept
{
    if (view.data != nullptr) view.data = static_cast<std::byte*>(view.data) + elements * (view.type == KVARN_F32 ? 4 : 2);
    return view;
}

/// What quantizing and decoding are asked, checked as far as the library does not.
struct tile_call {
    kvarn::format f{};
    record_grid<std::byte> grid{};
    std::span<std::byte> scratch{};

    [[nodiscard]] KVARN_INLINE status read(const kvarn_format* format, const kvarn_records* records, void* memory,
                                           std::size_t bytes) noexcept
    {
        if (const status s = to_format(format, f); s != status::ok) return s;
        if (records == nullptr || (memory == nullptr && records->tiles != 0 && records->heads != 0)) return status::null_pointer;
        grid = to_grid(*records);
        scratch = bytes_at(memory, bytes);
        return status::ok;
    }
};

[[nodiscard]] KVARN_INLINE status quantize(const kvarn_format* format, const kvarn_view* k, const kvarn_view* v,
                                           const kvarn_records* records, const kvarn_encode_options* options, std::size_t begin,
                                           std::size_t end, void* scratch, std::size_t scratch_bytes, kvarn_record_errors* errors,
                                           std::size_t error_count) noexcept
{
    tile_call call;
    encode_options o;
    input_view keys, values;
    if (k == nullptr) return status::null_pointer;
    if (const status s = call.read(format, records, scratch, scratch_bytes); s != status::ok) return s;
    if (const status s = to_encode_options(options, o); s != status::ok) return s;
    if (const status s = to_view(k, keys); s != status::ok) return s;
    if (const status s = to_view(v, values); s != status::ok) return s;
    if (const status s = same_type(keys.data, k->type, values.data, v != nullptr ? v->type : k->type); s != status::ok) return s;
    const std::span<record_errors> lost(reinterpret_cast<record_errors*>(errors), errors != nullptr ? error_count : 0);
    return with_type(keys, [&]<class T>(std::type_identity<T>) {
        return dispatched::quantize_kv(call.f, typed<const T>(keys), typed<const T>(values), call.grid, call.scratch, o,
                                       {begin, end}, lost);
    });
}

[[nodiscard]] KVARN_INLINE status dequantize(const kvarn_format* format, const kvarn_records* records, const kvarn_view* k,
                                             const kvarn_view* v, std::int32_t wanted_basis, std::size_t begin, std::size_t end,
                                             void* scratch, std::size_t scratch_bytes) noexcept
{
    tile_call call;
    basis wanted{};
    output_view keys, values;
    if (const status s = call.read(format, records, scratch, scratch_bytes); s != status::ok) return s;
    if (const status s = to_basis(wanted_basis, wanted); s != status::ok) return s;
    if (const status s = to_view(k, keys); s != status::ok) return s;
    if (const status s = to_view(v, values); s != status::ok) return s;
    if (const status s = same_type(keys.data, k != nullptr ? k->type : 0, values.data, v != nullptr ? v->type : 0);
        s != status::ok)
        return s;
    return with_type(keys.data != nullptr ? keys : values, [&]<class T>(std::type_identity<T>) {
        return dispatched::dequantize_kv(call.f, call.grid, typed<T>(keys), typed<T>(values), wanted, call.scratch, {begin, end});
    });
}

/// Calls f(typed view) in place, for a view that is read and written.
template <class F>
[[nodiscard]] KVARN_INLINE status in_place(const kvarn_view* x, F&& f) noexcept
{
    output_view view;
    if (x == nullptr) return status::null_pointer;
    if (const status s = to_view(x, view); s != status::ok) return s;
    return with_type(view, [&]<class T>(std::type_identity<T>) { return f(typed<T>(view)); });
}

/// A function of a format that says a number; 0 for no format.
template <class F>
[[nodiscard]] KVARN_INLINE auto number_of(const kvarn_format* given, F&& f) noexcept
{
    format made;
    using number = decltype(f(made));
    return to_format(given, made) == status::ok ? f(made) : number{};
}

}  // namespace kvarn::c

extern "C" {

// --- library -------------------------------------------------------------------------------------------------------

const char* kvarn_message(kvarn_status status) noexcept
{
    const auto number = static_cast<unsigned>(status);
    return number <= kvarn::c::last_status ? kvarn::message(static_cast<kvarn::status>(number)) : "unknown status";
}

const char* kvarn_version(void) noexcept
{
    return KVARN_VERSION_STRING;
}
std::int32_t kvarn_abi(void) noexcept
{
    return KVARN_C_ABI;
}

const char* kvarn_active_arch(void) noexcept
{
    return kvarn::active_arch_name();
}

const char* kvarn_usable_arch(size_t number) noexcept
{
    const char* name = nullptr;
    std::size_t i = 0;
    kvarn::for_each_arch([&](auto arch) {
        if (i++ == number) name = kvarn::simd::arch_traits<decltype(arch)>::name;
    });
    return name;
}

kvarn_status kvarn_select_arch(const char* name) noexcept
{
    if (name == nullptr) return KVARN_NULL_POINTER;
    return kvarn::c::code(kvarn::select_arch(std::string_view(name, std::strlen(name))));
}

// --- views ---------------------------------------------------------------------------------------------------------

kvarn_view kvarn_token_major(const void* data, std::int32_t type, size_t tokens, size_t heads, size_t channels) noexcept
{
    return kvarn::c::dense_view(data, type, tokens, heads, channels, false);
}

kvarn_view kvarn_head_major(const void* data, std::int32_t type, size_t tokens, size_t heads, size_t channels) noexcept
{
    return kvarn::c::dense_view(data, type, tokens, heads, channels, true);
}

kvarn_view kvarn_view_tokens(const kvarn_view* view, size_t first, size_t count) noexcept
{
    if (view == nullptr) return KVARN_VIEW_INIT;
    if (first > view->tokens) first = view->tokens;
    kvarn_view part = kvarn::c::part_of(*view, static_cast<std::ptrdiff_t>(first) * view->token_stride);
    part.tokens = count < view->tokens - first ? count : view->tokens - first;
    return part;
}

kvarn_view kvarn_view_head(const kvarn_view* view, size_t head) noexcept
{
    if (view == nullptr || head >= view->heads) return KVARN_VIEW_INIT;
    kvarn_view part = kvarn::c::part_of(*view, static_cast<std::ptrdiff_t>(head) * view->head_stride);
    part.heads = 1;
    return part;
}

kvarn_status kvarn_convert(const kvarn_view* from, const kvarn_view* to) noexcept
{
    using namespace kvarn::c;
    kvarn::input_view x;
    kvarn::output_view y;
    if (from == nullptr || to == nullptr) return KVARN_NULL_POINTER;
    if (const kvarn::status s = to_view(from, x); s != kvarn::status::ok) return code(s);
    if (const kvarn::status s = to_view(to, y); s != kvarn::status::ok) return code(s);
    return code(kvarn::dispatched::convert(x, y));
}

kvarn_status kvarn_rotate(const kvarn_view* x) noexcept
{
    return kvarn::c::code(kvarn::c::in_place(x, [](auto view) { return kvarn::dispatched::rotate(view); }));
}

kvarn_status kvarn_unrotate(const kvarn_view* x) noexcept
{
    return kvarn::c::code(kvarn::c::in_place(x, [](auto view) { return kvarn::dispatched::unrotate(view); }));
}

// --- formats -------------------------------------------------------------------------------------------------------

kvarn_status kvarn_format_parse(const char* name, std::int32_t head_dim_k, std::int32_t head_dim_v, kvarn_format* format) noexcept
{
    using namespace kvarn::c;
    if (name == nullptr) return KVARN_NULL_POINTER;
    if (const kvarn::status s = can_give(format); s != kvarn::status::ok) return code(s);
    const auto made = kvarn::parse_format(std::string_view(name, std::strlen(name)), head_dim_k, head_dim_v);
    if (made) give_format(*made, format);
    return code(made.error);
}

kvarn_status kvarn_format_make(kvarn_format* format) noexcept
{
    using namespace kvarn::c;
    kvarn::format made;
    const kvarn::status said = to_format(format, made);
    if (said == kvarn::status::ok) give_format(made, format);
    return code(said);
}

kvarn_status kvarn_format_within(const kvarn_format* base, double bits, kvarn_format* format) noexcept
{
    using namespace kvarn::c;
    kvarn::format from;
    if (const kvarn::status s = can_give(format); s != kvarn::status::ok) return code(s);
    if (const kvarn::status s = to_format(base, from); s != kvarn::status::ok) return code(s);
    const auto made = kvarn::format_within(from, bits);
    if (made) give_format(*made, format);
    return code(made.error);
}

kvarn_status kvarn_layout_of(const kvarn_format* format, kvarn_record_layout* layout) noexcept
{
    using namespace kvarn::c;
    kvarn::format f;
    if (const kvarn::status s = can_give(layout); s != kvarn::status::ok) return code(s);
    if (const kvarn::status s = to_format(format, f); s != kvarn::status::ok) return code(s);
    const kvarn::record_layout at = kvarn::layout_of(f);
    give({sizeof(kvarn_record_layout), at.k_codes, at.k_channel_scale, at.k_channel_zero, at.k_token_scale, at.v_codes,
          at.v_channel_scale, at.v_token_scale, at.v_token_zero, at.exact, at.content_bytes},
         layout);
    return KVARN_OK;
}

size_t kvarn_record_bytes(const kvarn_format* format, size_t round_to) noexcept
{
    return kvarn::c::number_of(format, [&](const kvarn::format& f) { return kvarn::c::distance_of(f, round_to); });
}

double kvarn_bits_per_element(const kvarn_format* format, size_t round_to) noexcept
{
    return kvarn::c::number_of(format, [&](const kvarn::format& f) {
        const double elements = static_cast<double>(f.group()) * static_cast<double>(f.key_channels() + f.head_dim_v());
        return 8.0 * static_cast<double>(kvarn::c::distance_of(f, round_to)) / elements;
    });
}

size_t kvarn_scratch_bytes(const kvarn_format* format) noexcept
{
    return kvarn::c::number_of(format, [](const kvarn::format& f) { return kvarn::scratch_bytes(f); });
}

size_t kvarn_call_scratch_bytes(const kvarn_format* format, size_t query_rows) noexcept
{
    if (query_rows > kvarn::max_query_rows) return 0;
    return kvarn::c::number_of(format, [&](const kvarn::format& f) { return kvarn::call_scratch_bytes(f, query_rows); });
}

kvarn_status kvarn_supports(const kvarn_format* format, int32_t operation, int32_t precision, kvarn_support* support) noexcept
{
    using namespace kvarn::c;
    kvarn::format f;
    if (const kvarn::status s = can_give(support); s != kvarn::status::ok) return code(s);
    if (const kvarn::status s = to_format(format, f); s != kvarn::status::ok) return code(s);
    kvarn::operation what{};
    kvarn::precision wanted{};
    if (const kvarn::status s = enumerator(operation, kvarn::operation::attend, what); s != kvarn::status::ok) return code(s);
    if (const kvarn::status s = enumerator(precision, kvarn::precision::fast, wanted); s != kvarn::status::ok) return code(s);
    const kvarn::cpu_support x = kvarn::dispatched::supports(f, what, wanted);
    give({sizeof(kvarn_support), x.arch, x.fixed_bounds, static_cast<int32_t>(x.keys), static_cast<int32_t>(x.values), x.time}, support);
    return KVARN_OK;
}

// --- records -------------------------------------------------------------------------------------------------------

kvarn_records kvarn_tile_major_records(const kvarn_format* format, const void* data, size_t bytes, size_t tiles, size_t heads,
                                       size_t round_to) noexcept
{
    return kvarn::c::dense_grid(format, data, bytes, tiles, heads, round_to, false);
}

kvarn_records kvarn_head_major_records(const kvarn_format* format, const void* data, size_t bytes, size_t tiles, size_t heads,
                                       size_t round_to) noexcept
{
    return kvarn::c::dense_grid(format, data, bytes, tiles, heads, round_to, true);
}

kvarn_status kvarn_quantize(const kvarn_format* format, const kvarn_view* k, const kvarn_view* v, const kvarn_records* records,
                            const kvarn_encode_options* options, void* scratch, size_t scratch_bytes) noexcept
{
    return kvarn::c::code(kvarn::c::quantize(format, k, v, records, options, 0, SIZE_MAX, scratch, scratch_bytes, nullptr, 0));
}

kvarn_status kvarn_quantize_items(const kvarn_format* format, const kvarn_view* k, const kvarn_view* v,
                                  const kvarn_records* records, const kvarn_encode_options* options, size_t begin, size_t end,
                                  void* scratch, size_t scratch_bytes, kvarn_record_errors* errors, size_t error_count) noexcept
{
    return kvarn::c::code(
        kvarn::c::quantize(format, k, v, records, options, begin, end, scratch, scratch_bytes, errors, error_count));
}

kvarn_status kvarn_dequantize(const kvarn_format* format, const kvarn_records* records, const kvarn_view* k, const kvarn_view* v,
                              std::int32_t wanted_basis, void* scratch, size_t scratch_bytes) noexcept
{
    return kvarn::c::code(kvarn::c::dequantize(format, records, k, v, wanted_basis, 0, SIZE_MAX, scratch, scratch_bytes));
}

kvarn_status kvarn_dequantize_items(const kvarn_format* format, const kvarn_records* records, const kvarn_view* k,
                                    const kvarn_view* v, std::int32_t wanted_basis, size_t begin, size_t end, void* scratch,
                                    size_t scratch_bytes) noexcept
{
    return kvarn::c::code(kvarn::c::dequantize(format, records, k, v, wanted_basis, begin, end, scratch, scratch_bytes));
}

// --- the basis of a head -------------------------------------------------------------------------------------------

kvarn_status kvarn_add_query_moments(const kvarn_format* format, const kvarn_view* q, std::uint64_t* moments,
                                     size_t count) noexcept
{
    using namespace kvarn::c;
    kvarn::format f;
    kvarn::input_view queries;
    if (q == nullptr || moments == nullptr) return KVARN_NULL_POINTER;
    if (const kvarn::status s = to_format(format, f); s != kvarn::status::ok) return code(s);
    if (const kvarn::status s = to_view(q, queries); s != kvarn::status::ok) return code(s);
    return code(with_type(queries, [&]<class T>(std::type_identity<T>) {
        return kvarn::dispatch([&](auto arch) KVARN_LAMBDA {
            return kvarn::add_query_moments<decltype(arch)>(f, typed<const T>(queries), std::span(moments, count));
        });
    }));
}

kvarn_status kvarn_choose_format(const kvarn_format* base, const kvarn_view* k, const kvarn_view* v, const std::uint64_t* moments,
                                 size_t count, const kvarn_choose_options* options, void* scratch, size_t scratch_bytes,
                                 kvarn_format* format) noexcept
{
    using namespace kvarn::c;
    kvarn::format f;
    kvarn::input_view keys, values;
    kvarn::choose_options o;
    if (k == nullptr || moments == nullptr || scratch == nullptr) return KVARN_NULL_POINTER;
    if (const kvarn::status s = can_give(format); s != kvarn::status::ok) return code(s);
    if (const kvarn::status s = to_format(base, f); s != kvarn::status::ok) return code(s);
    if (const kvarn::status s = to_view(k, keys); s != kvarn::status::ok) return code(s);
    if (const kvarn::status s = to_view(v, values); s != kvarn::status::ok) return code(s);
    if (const kvarn::status s = same_type(keys.data, k->type, values.data, v != nullptr ? v->type : 0); s != kvarn::status::ok)
        return code(s);
    if (const kvarn::status s = to_choose_options(options, o); s != kvarn::status::ok) return code(s);
    const auto chosen = with_type(keys, [&]<class T>(std::type_identity<T>) {
        return kvarn::dispatch([&](auto arch) KVARN_LAMBDA {
            return kvarn::choose_format<decltype(arch)>(f, typed<const T>(keys), typed<const T>(values),
                                                        std::span(moments, count), bytes_at(scratch, scratch_bytes), o);
        });
    });
    if (chosen) give_format(*chosen, format);
    return code(chosen.error);
}

size_t kvarn_choose_scratch_bytes(const kvarn_format* format) noexcept
{
    return kvarn::c::number_of(format, [](const kvarn::format& f) { return kvarn::choose_scratch_bytes(f); });
}

}  // extern "C"
