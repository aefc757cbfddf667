// SPDX-License-Identifier: Apache-2.0
#pragma once
// quantize_kv and dequantize_kv: K and V of any strides to records and back, many heads and tiles in one call.
// In: float, half or bfloat16 views [token][head][channel], in the original basis or, by options, rotated. Out: records (docs/record-format.md), or
// views.
// The caller owns all memory; nothing allocates. A record depends only on format, options and the tile's values: not on the
// instruction set, the thread, the strides or the rest of the call. Errors are found before anything is written.
//
// Scratch: scratch_bytes(format), see quantize/tile.hpp.
// Threads: work item i is the record (tile i / heads, head i % heads). Give each thread its own range and its own scratch.

#include <kvarn/base/config.hpp>  // first: it refuses older standards

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>

#include <kvarn/base/extent.hpp>
#include <kvarn/base/view.hpp>
#include <kvarn/codec/encode.hpp>
#include <kvarn/layout/record.hpp>
#include <kvarn/quantize/check.hpp>
#include <kvarn/quantize/open.hpp>
#include <kvarn/quantize/seal.hpp>
#include <kvarn/simd/environment.hpp>

namespace kvarn {

/// Seals tiles: quantizes the tokens of `k` and `v` into `records`.
/// Shapes: k [tiles * group][heads][head_dim_k + exact_channels], v [tiles * group][heads][head_dim_v] (an empty view if the
/// format has no values), records [tiles][heads]. Only the range's items are read, checked and written.
/// `k` and `v` are in the original basis unless options.key_basis and value_basis say that they are rotated already.
/// Bytes between a record's content and the grid's record_bytes are set to zero.
/// `errors` empty, or one entry for each item of the range in its order: what the record lost (6 to 8 per cent of the time of sealing).
/// Errors, nothing written: null_pointer, shape_mismatch, token_count_mismatch, buffer_too_small (records, scratch or errors),
/// bad_argument (options), not_finite, scale_overflow. Zero tiles or heads are fine. Source: paper section 4; docs/numerics.md.
template <class Arch = simd::native_arch, element T>
[[nodiscard]] status quantize_kv(const format& f, kv_view<T> k, kv_view<T> v, record_grid<std::byte> records,
                                 std::span<std::byte> scratch, const encode_options& options = {}, record_range range = {},
                                 std::span<record_errors> errors = {}) noexcept;

/// Decodes records into `k` and `v`, in the original basis or as they are stored (`rotated`). Exact channels come back
/// unchanged. Half results saturate at +-65504. Shapes as for quantize_kv; either view may be empty (data null) to skip it.
/// Errors, nothing written: null_pointer, shape_mismatch, token_count_mismatch, buffer_too_small, bad_argument, not_finite (a scalar
/// of a record).
template <class Arch = simd::native_arch, class Byte, element T>
[[nodiscard]] status dequantize_kv(const format& f, record_grid<Byte> records, kv_view<T> k, kv_view<T> v, basis wanted,
                                   std::span<std::byte> scratch, record_range range = {}) noexcept;

template <class Arch, element T>
status quantize_kv(const format& f, kv_view<T> k, kv_view<T> v, record_grid<std::byte> records, std::span<std::byte> scratch,
                   const encode_options& options, record_range range, std::span<record_errors> errors) noexcept
{
    using storage = storage_t<T>;
    if (!detail::is_valid(options)) return status::bad_argument;
    if (const status s = detail::check_view(f, k, f.key_channels(), records); s != status::ok) return s;
    if (f.has_values()) {
        if (const status s = detail::check_view(f, v, f.head_dim_v(), records); s != status::ok) return s;
    } else if (v.data != nullptr) {
        return status::shape_mismatch;
    }
    if (records.tiles != 0 && records.heads > SIZE_MAX / records.tiles) return status::shape_mismatch;
    const std::size_t items = records.tiles * records.heads;
    if (range.begin > range.end) return status::bad_argument;
    if (range.end > items) range.end = items;
    if (range.begin >= range.end) return status::ok;
    if (k.data == nullptr || (f.has_values() && v.data == nullptr)) return status::null_pointer;
    if (const status s = detail::check_memory(f, records, scratch, range); s != status::ok) return s;
    if (!errors.empty() && errors.size() < range.end - range.begin) return status::buffer_too_small;

    const simd::float_environment guard;
    const kv_view<const storage> keys = detail::as_storage(k), values = detail::as_storage(v);
    const detail::tile_memory memory = detail::carve(f, scratch.data());
    const auto source = [&](const kv_view<const storage>& x, std::size_t i) {
        return x.data ? detail::source_of(x, i / records.heads, i % records.heads, f.group()) : detail::tile_source<const storage>{};
    };
    for (std::size_t i = range.begin; i < range.end; ++i) {
        const status s = detail::check_tile<Arch, storage>(f, source(keys, i), source(values, i), memory, options);
        if (s != status::ok) return s;
    }
    const record_layout at = layout_of(f);
    const std::size_t owned = detail::owned_bytes(f, records);
    for (std::size_t i = range.begin; i < range.end; ++i) {
        std::byte* const record = records.at(i / records.heads, i % records.heads);
        record_errors lost, *const report = errors.empty() ? nullptr : &lost;
        detail::encode_keys<Arch, storage>(f, source(keys, i), memory, options, record, report ? &report->k : nullptr);
        if (f.has_values()) detail::encode_values<Arch, storage>(f, source(values, i), memory, options, record, report ? &report->v : nullptr);
        if (report) errors[i - range.begin] = lost;
        if (f.exact_channels() != 0) detail::encode_exact<Arch, storage>(f, source(keys, i), record + at.exact);
        std::memset(record + at.content_bytes, 0, owned - at.content_bytes);
    }
    return status::ok;
}

template <class Arch, class Byte, element T>
status dequantize_kv(const format& f, record_grid<Byte> records, kv_view<T> k, kv_view<T> v, basis wanted,
                     std::span<std::byte> scratch, record_range range) noexcept
{
    static_assert(std::is_same_v<std::remove_const_t<Byte>, std::byte>, "records are bytes");
    static_assert(!std::is_const_v<T>, "dequantize_kv writes its views");
    if (wanted != basis::original && wanted != basis::rotated) return status::bad_argument;
    if (k.data != nullptr)
        if (const status s = detail::check_view(f, k, f.key_channels(), records); s != status::ok) return s;
    if (v.data != nullptr) {
        if (!f.has_values()) return status::shape_mismatch;
        if (const status s = detail::check_view(f, v, f.head_dim_v(), records); s != status::ok) return s;
    }
    if (records.tiles != 0 && records.heads > SIZE_MAX / records.tiles) return status::shape_mismatch;
    const std::size_t items = records.tiles * records.heads;
    if (range.begin > range.end) return status::bad_argument;
    if (range.end > items) range.end = items;
    if (range.begin >= range.end) return status::ok;
    if (k.data == nullptr && v.data == nullptr) return status::null_pointer;
    if (const status s = detail::check_memory(f, records, scratch, range); s != status::ok) return s;

    const simd::float_environment guard;
    const record_layout at = layout_of(f);
    for (std::size_t i = range.begin; i < range.end; ++i) {
        const std::byte* const record = records.at(i / records.heads, i % records.heads);
        if (!detail::scalars_finite<Arch>(record, at.k_channel_scale, at.v_codes) ||
            !detail::scalars_finite<Arch>(record, at.v_channel_scale, at.content_bytes))
            return status::not_finite;
    }
    const auto keys = detail::as_storage(k);
    const auto values = detail::as_storage(v);
    const detail::tile_memory memory = detail::carve(f, scratch.data());
    const bool unrotated_k = f.keys_rotated() && wanted == basis::original;
    const bool unrotated_v = f.values_rotated() && wanted == basis::original;
    for (std::size_t i = range.begin; i < range.end; ++i) {
        const std::byte* const record = records.at(i / records.heads, i % records.heads);
        if (keys.data != nullptr) {
            const auto to = detail::source_of(keys, i / records.heads, i % records.heads, f.group());
            detail::with_bound<Arch>(
                to, record + at.k_channel_scale, record + at.k_channel_zero, f.head_dim_k(), record + at.k_token_scale, f.group(),
                f.key_bits(), unrotated_k ? f.head_dim_k() : 1, [&](const auto& out) { detail::decode_keys<Arch>(f, record, out, unrotated_k, memory); });
            if (f.exact_channels() != 0) detail::decode_exact<Arch>(f, record + at.exact, to);
        }
        if (values.data != nullptr) {
            const auto to = detail::source_of(values, i / records.heads, i % records.heads, f.group());
            detail::with_bound<Arch>(
                to, record + at.v_token_scale, record + at.v_token_zero, f.group(), record + at.v_channel_scale, f.head_dim_v(),
                f.value_bits(), unrotated_v ? f.head_dim_v() : 1, [&](const auto& out) { detail::decode_values<Arch>(f, record, out, unrotated_v, memory); });
        }
    }
    return status::ok;
}

}  // namespace kvarn
