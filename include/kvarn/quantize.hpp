// SPDX-License-Identifier: Apache-2.0
#pragma once
// quantize_kv and dequantize_kv: K and V of any strides to records and back, many heads and tiles in one call.
// In: float, half or bfloat16 views [token][head][channel], original basis. Out: records (format.md section 5), or views.
// The caller owns all memory; nothing allocates. A record depends only on format, options and the tile's values: not on the
// instruction set, the thread, the strides or the rest of the call. Errors are found before anything is written.
//
// Threads: work item i is the record (tile i / heads, head i % heads). Give each thread its own range and its own scratch.

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>

#include <kvarn/base/extent.hpp>
#include <kvarn/base/view.hpp>
#include <kvarn/codec/decode.hpp>
#include <kvarn/codec/encode.hpp>
#include <kvarn/layout/record.hpp>
#include <kvarn/normalize/variance.hpp>
#include <kvarn/rotate/hadamard.hpp>

namespace kvarn {

struct encode_options {
    kvarn::encoder encoder = kvarn::encoder::paper;
    int iterations = 8;  ///< at most this many rounds of variance normalisation, 0..64
};

/// The work items of one call, [begin, end), clipped to the grid. The default is all of them.
struct record_range {
    std::size_t begin = 0;
    std::size_t end = SIZE_MAX;
};

/// Bytes of scratch that one call of quantize_kv or dequantize_kv needs (per thread), at any alignment.
[[nodiscard]] KVARN_INLINE constexpr std::size_t scratch_bytes(const format& f) noexcept;

/// Seals tiles: quantizes the tokens of `k` and `v` into `records`.
/// Shapes: k [tiles * group][heads][head_dim_k + exact_channels], v [tiles * group][heads][head_dim_v] (an empty view if the
/// format has no values), records [tiles][heads]. Only the range's items are read, checked and written.
/// Bytes between a record's content and the grid's record_bytes are set to zero.
/// Errors, nothing written: null_pointer, shape_mismatch, buffer_too_small (records or scratch), bad_argument (options),
/// not_finite, scale_overflow. Zero tiles or heads are fine. Source: paper section 4; format.md sections 2 to 5.
template <class Arch = simd::native_arch, element T>
[[nodiscard]] status quantize_kv(const format& f, kv_view<T> k, kv_view<T> v, record_grid<std::byte> records,
                                 std::span<std::byte> scratch, const encode_options& options = {},
                                 record_range range = {}) noexcept;

/// Decodes records into `k` and `v`, in the original basis or as they are stored (rotated). Exact channels come back
/// unchanged. Half results saturate at +-65504. Shapes as for quantize_kv; either view may be empty (data null) to skip it.
/// Errors, nothing written: null_pointer, shape_mismatch, buffer_too_small, bad_argument, not_finite (a scalar of a record).
template <class Arch = simd::native_arch, class Byte, element T>
[[nodiscard]] status dequantize_kv(const format& f, record_grid<Byte> records, kv_view<T> k, kv_view<T> v, basis wanted,
                                   std::span<std::byte> scratch, record_range range = {}) noexcept;

/// Which code a format runs on, for logs and for tests of a build.
struct kernel_path {
    const char* arch;           ///< instruction set: portable, avx2, avx512, neon64
    bool keys_specialised;      ///< loops over tokens of K have compile-time bounds
    bool values_specialised;    ///< loops over channels of V have compile-time bounds
    const char* reason;         ///< one sentence
};

template <class Arch = simd::native_arch>
[[nodiscard]] KVARN_INLINE constexpr kernel_path kernel_path_of(const format& f) noexcept
{
    const bool keys = detail::is_common_extent(f.head_dim_k()) && detail::is_common_extent(f.group());
    const bool values = f.has_values() && detail::is_common_extent(f.head_dim_v());
    const char* reason = keys && (values || !f.has_values()) ? "head_dim and group are 64, 128 or 256: compile-time loop bounds"
                         : keys || values ? "one of K and V has compile-time loop bounds; the other runs the same code with run-time bounds"
                                          : "head_dim or group is not 64, 128 or 256: the same code with run-time loop bounds";
    return {simd::arch_traits<Arch>::name, keys, values, reason};
}

namespace detail {

inline constexpr int tile_padding = 16;   // floats beyond a row, against cache-set conflicts
inline constexpr int staged_tokens = 32;  // tokens gathered or decoded at a time

/// Channels [first, first + channels) of one tile: token t starts at data + t * token_stride.
template <class T>
struct tile_source {
    T* data;
    std::ptrdiff_t token_stride;
    std::ptrdiff_t channel_stride;
};

/// Scratch, carved into aligned pieces. K tiles are held [channel][token], V tiles [token][channel]: axis 0 first, as in
/// format.md section 3, so that normaliser and encoder know only one orientation.
struct tile_memory {
    float* tile;
    float* factors;
    float* scale;
    float* zero;
    float* stage;  // [staged_tokens][widest]
    std::uint8_t* codes;  // shares the tile's memory; used when decoding
};

[[nodiscard]] KVARN_INLINE constexpr std::size_t tile_floats(const format& f) noexcept
{
    const int k = simd::whole_lanes(f.head_dim_k()) * (f.group() + tile_padding);
    const int v = f.group() * (simd::whole_lanes(f.head_dim_v()) + tile_padding);
    return static_cast<std::size_t>(k > v ? k : v);
}

[[nodiscard]] KVARN_INLINE constexpr int widest_axis(const format& f) noexcept
{
    const int d = f.head_dim_k() > f.head_dim_v() ? f.head_dim_k() : f.head_dim_v();
    return simd::whole_lanes(d > f.group() ? d : f.group());
}

[[nodiscard]] KVARN_INLINE tile_memory carve(const format& f, std::byte* scratch) noexcept
{
    const auto address = reinterpret_cast<std::uintptr_t>(scratch);
    float* at = reinterpret_cast<float*>(scratch + (64 - address % 64) % 64);
    const auto widest = static_cast<std::size_t>(widest_axis(f));
    tile_memory m;
    m.tile = at;
    m.codes = reinterpret_cast<std::uint8_t*>(at);
    m.factors = m.tile + tile_floats(f);
    m.scale = m.factors + variance_floats(static_cast<int>(widest), static_cast<int>(widest));
    m.zero = m.scale + widest;
    m.stage = m.zero + widest;
    return m;
}

template <class Arch>
KVARN_INLINE void clear(float* from, std::ptrdiff_t count) noexcept
{
    for (std::ptrdiff_t i = 0; i < count; i += simd::lane_count) simd::lanes<Arch>::broadcast(0.0f).store(from + i);
}

/// K: tokens to tile[channel * stride + token], rotated.
template <class Arch, class T, class Dim>
KVARN_NOINLINE void load_key_tile(const tile_source<const T>& from, bool rotated, Dim dim, int group, const tile_memory& m,
                                  std::ptrdiff_t stride) noexcept
{
    constexpr int width = simd::kernels<Arch>::width;
    constexpr auto forward = direction::forward;
    for (int t = 0; t < group; t += width) {
        const T* const tokens = from.data + t * from.token_stride;
        if (from.channel_stride == 1) {
            transform_transposed<Arch, forward>(tokens, from.token_stride, width, rotated, m.tile + t, stride, dim);
        } else {
            for (int i = 0; i < width; ++i) load_row<Arch>(tokens + i * from.token_stride, from.channel_stride, dim, m.stage + i * dim);
            transform_transposed<Arch, forward>(static_cast<const float*>(m.stage), dim, width, rotated, m.tile + t, stride, dim);
        }
    }
    clear<Arch>(m.tile + dim * stride, (simd::whole_lanes(dim) - dim) * stride);
}

/// V: tokens to tile[token * stride + channel], rotated.
template <class Arch, class T, class Dim>
KVARN_NOINLINE void load_value_tile(const tile_source<const T>& from, bool rotated, Dim dim, int group, const tile_memory& m,
                                    std::ptrdiff_t stride) noexcept
{
    using k = simd::kernels<Arch>;
    constexpr auto forward = direction::forward;
    const bool direct = is_constant_extent<Dim> && rotated && from.channel_stride == 1;
    for (int t = 0; t < group; ++t) {
        const T* const token = from.data + t * from.token_stride;
        float* const row = m.tile + t * stride;
        if constexpr (is_constant_extent<Dim>) {
            if (direct) {
                transform_vector<Arch, forward>([&](int d) __attribute__((always_inline)) { return k::load(token + d); }, row, row, dim);
                continue;
            }
        }
        load_row<Arch>(token, from.channel_stride, dim, row);
        for (int d = dim; d < simd::whole_lanes(dim); ++d) row[d] = 0.0f;
    }
    if (rotated && !direct) transform_any_rows<Arch, forward>(m.tile, stride, group, dim);
}

/// One part of a record, from values to codes and scalars. `record` null: only report whether the scalars fit.
/// The fields are axis-0 scales and zeros and the axis-1 scales, whatever K or V calls them.
template <class Arch, class Size1>
KVARN_INLINE bool encode_part(const tile_memory& m, std::ptrdiff_t stride, int size0, Size1 size1, int bits, int iterations,
                              std::byte* record, std::size_t codes, std::size_t scale0, std::size_t zero0, std::size_t scale1) noexcept
{
    const variance_factors f = place_variance_factors(m.factors, size0, size1);
    normalize_variance<Arch>(m.tile, stride, size0, size1, iterations, f);
    std::uint8_t* const packed = record ? reinterpret_cast<std::uint8_t*>(record + codes) : nullptr;
    const bool fits = encode_minmax<Arch>(m.tile, stride, size0, size1, f.s0, f.s1, f.reciprocal1, bits, packed, m.scale, m.zero);
    if (record == nullptr) return fits;
    store_scalars<Arch>(m.scale, size0, record + scale0);
    store_scalars<Arch>(m.zero, size0, record + zero0);
    store_scalars<Arch>(f.s1, size1, record + scale1);
    return fits;
}

template <class Arch, class T>
bool encode_keys(const format& f, const tile_source<const T>& k, const tile_memory& m, int iterations, std::byte* record) noexcept
{
    const record_layout at = layout_of(f);
    bool fits = false;
    const std::ptrdiff_t stride = f.group() + tile_padding;
    with_extent(f.head_dim_k(), [&](auto dim) { load_key_tile<Arch>(k, f.rotated(), dim, f.group(), m, stride); });
    with_extent(f.group(), [&](auto group) {
        fits = encode_part<Arch>(m, stride, f.head_dim_k(), group, f.key_bits(), iterations, record, at.k_codes, at.k_channel_scale,
                                 at.k_channel_zero, at.k_token_scale);
    });
    return fits;
}

template <class Arch, class T>
bool encode_values(const format& f, const tile_source<const T>& v, const tile_memory& m, int iterations, std::byte* record) noexcept
{
    const record_layout at = layout_of(f);
    bool fits = false;
    with_extent(f.head_dim_v(), [&](auto dim) {
        const std::ptrdiff_t stride = simd::whole_lanes(dim) + tile_padding;
        load_value_tile<Arch>(v, f.rotated(), dim, f.group(), m, stride);
        fits = encode_part<Arch>(m, stride, f.group(), dim, f.value_bits(), iterations, record, at.v_codes, at.v_token_scale,
                                 at.v_token_zero, at.v_channel_scale);
    });
    return fits;
}

/// The largest magnitude among `channels` of all tokens of a tile; infinity if one value is not finite.
template <class Arch, class T>
KVARN_NOINLINE float largest_value(const tile_source<const T>& from, int tokens, int channels) noexcept
{
    std::uint32_t most = 0;
    for (int t = 0; t < tokens; ++t) {
        const T* const token = from.data + t * from.token_stride;
        std::uint32_t bits = 0;
        if (from.channel_stride == 1) {
            bits = simd::kernels<Arch>::largest_magnitude(token, static_cast<std::size_t>(channels));
        } else {
            for (int d = 0; d < channels; ++d) {
                const std::uint32_t one = simd::kernels<simd::portable>::largest_magnitude(token + d * from.channel_stride, 1);
                bits = one > bits ? one : bits;
            }
        }
        most = bits > most ? bits : most;
    }
    float value;
    if constexpr (sizeof(T) == 2) {
        const T largest{static_cast<std::uint16_t>(most)};
        value = to_float(largest);
    } else {
        value = std::bit_cast<float>(most);
    }
    return value - value == 0.0f ? value : std::bit_cast<float>(0x7f800000u);
}

template <class T>
KVARN_INLINE tile_source<T> source_of(const kv_view<T>& x, std::size_t tile, std::size_t head, int group) noexcept
{
    return {x.at(tile * static_cast<std::size_t>(group), head), x.token_stride, x.channel_stride};
}

/// The view with the library's storage type as its element.
template <element T>
KVARN_INLINE auto as_storage(const kv_view<T>& x) noexcept
{
    using storage = std::conditional_t<std::is_const_v<T>, const storage_t<T>, storage_t<T>>;
    return kv_view<storage>{reinterpret_cast<storage*>(x.data), x.tokens, x.heads, x.channels,
                            x.token_stride, x.head_stride, x.channel_stride};
}

template <class T, class Byte>
KVARN_INLINE status check_view(const format& f, const kv_view<T>& x, int channels, const record_grid<Byte>& records) noexcept
{
    if (x.heads != records.heads || x.tokens != records.tiles * static_cast<std::size_t>(f.group()) ||
        x.channels != static_cast<std::size_t>(channels))
        return status::shape_mismatch;
    return status::ok;
}

/// Bytes of one record that a call may write.
template <class Byte>
KVARN_INLINE std::size_t owned_bytes(const format& f, const record_grid<Byte>& records) noexcept
{
    const std::size_t content = layout_of(f).content_bytes;
    return records.record_bytes > content ? records.record_bytes : content;
}

/// Whether the items [begin, end) of the grid lie inside its buffer, and scratch is large enough.
template <class Byte>
KVARN_INLINE status check_memory(const format& f, const record_grid<Byte>& records, std::span<std::byte> scratch, record_range range) noexcept
{
    if (records.data == nullptr || scratch.data() == nullptr) return status::null_pointer;
    if (scratch.size() < scratch_bytes(f)) return status::buffer_too_small;
    const std::size_t content = owned_bytes(f, records);
    if ((records.heads > 1 && records.head_stride < content) || (records.tiles > 1 && records.tile_stride < content))
        return status::shape_mismatch;
    const std::size_t last_tile = (range.end - 1) / records.heads;
    const std::size_t last_head = last_tile > range.begin / records.heads ? records.heads - 1 : (range.end - 1) % records.heads;
    const std::size_t limit = records.bytes;
    if (content > limit) return status::buffer_too_small;
    if (last_tile != 0 && records.tile_stride > (limit - content) / last_tile) return status::buffer_too_small;
    const std::size_t left = limit - content - last_tile * records.tile_stride;
    if (last_head != 0 && records.head_stride > left / last_head) return status::buffer_too_small;
    return status::ok;
}

/// Below `none` no scalar can overflow a half, whatever the tile: |scale * code + zero| <= |rotated value| / smallest factor.
KVARN_INLINE float safe_magnitude(const format& f, int dim) noexcept
{
    return f.rotated() ? 48000.0f / std::sqrt(static_cast<float>(dim)) : 48000.0f;
}

inline constexpr float hopeless_magnitude = 1e11f;  // above: the scalars of a tile cannot hold it, and squares may overflow

/// Checks one part of one tile: ok, not_finite, or scale_overflow (found by a trial encoding where it is not plain).
template <class T, class Trial>
KVARN_INLINE status check_part(const format& f, float largest, int dim, Trial&& trial) noexcept
{
    if (!(largest - largest == 0.0f)) return status::not_finite;
    if (largest <= safe_magnitude(f, dim)) return status::ok;
    if (largest > hopeless_magnitude || !trial()) return status::scale_overflow;
    return status::ok;
}

template <class Arch, class T>
status check_tile(const format& f, const tile_source<const T>& k, const tile_source<const T>& v, const tile_memory& m, int iterations) noexcept
{
    const status keys = check_part<T>(f, largest_value<Arch>(k, f.group(), f.head_dim_k()), f.head_dim_k(),
                                      [&] { return encode_keys<Arch>(f, k, m, iterations, nullptr); });
    if (keys != status::ok) return keys;
    if (f.exact_channels() != 0) {
        const tile_source<const T> exact{k.data + f.head_dim_k() * k.channel_stride, k.token_stride, k.channel_stride};
        const float largest = largest_value<Arch>(exact, f.group(), f.exact_channels());
        if (!(largest - largest == 0.0f)) return status::not_finite;
        if (largest >= half_overflow) return status::scale_overflow;
    }
    if (!f.has_values()) return status::ok;
    return check_part<T>(f, largest_value<Arch>(v, f.group(), f.head_dim_v()), f.head_dim_v(),
                         [&] { return encode_values<Arch>(f, v, m, iterations, nullptr); });
}

template <class Arch, class T>
void encode_exact(const format& f, const tile_source<const T>& k, std::byte* to) noexcept
{
    using one = simd::kernels<simd::portable>;
    half* p = reinterpret_cast<half*>(to);
    for (int t = 0; t < f.group(); ++t)
        for (int c = 0; c < f.exact_channels(); ++c)
            one::store(p++, one::load(k.data + t * k.token_stride + (f.head_dim_k() + c) * k.channel_stride));
}

template <class Arch, class T>
void decode_exact(const format& f, const std::byte* from, const tile_source<T>& k) noexcept
{
    using one = simd::kernels<simd::portable>;
    const half* p = reinterpret_cast<const half*>(from);
    for (int t = 0; t < f.group(); ++t)
        for (int c = 0; c < f.exact_channels(); ++c)
            one::store(k.data + t * k.token_stride + (f.head_dim_k() + c) * k.channel_stride, one::load(p++));
}

/// Writes `tokens` <= staged_tokens decoded tokens; row_of(t) gives the t-th as a key_row or value_row. Common sizes with
/// contiguous channels go straight to the output, all others through `stage`.
template <class Arch, class T, class Dim, class RowOf>
KVARN_INLINE void store_tokens(const tile_source<T>& to, int first, int tokens, Dim dim, bool unrotated, float* stage, RowOf&& row_of) noexcept
{
    using kern = simd::kernels<Arch>;
    if constexpr (is_constant_extent<Dim>) {
        if (to.channel_stride == 1) {
            for (int t = 0; t < tokens; ++t) {
                const auto row = row_of(t);
                T* const token = to.data + (first + t) * to.token_stride;
                if (unrotated) {
                    transform_vector<Arch, direction::inverse>(row, stage, token, dim);
                } else {
                    for (int d = 0; d < dim; d += kern::width) kern::store(token + d, row(d));
                }
            }
            return;
        }
    }
    const int stride = simd::whole_lanes(dim);
    for (int t = 0; t < tokens; ++t) {
        const auto row = row_of(t);
        for (int d = 0; d < dim; d += kern::width) kern::store(stage + t * stride + d, row(d));
    }
    if (unrotated) transform_any_rows<Arch, direction::inverse>(stage, stride, tokens, dim);
    for (int t = 0; t < tokens; ++t)
        store_row<Arch>(stage + t * stride, dim, to.data + (first + t) * to.token_stride, to.channel_stride);
}

template <class Arch, class T, class Dim>
KVARN_NOINLINE void decode_keys(const format& f, const std::byte* record, const tile_source<T>& k, bool unrotated, const tile_memory& m,
                                Dim dim) noexcept
{
    using kern = simd::kernels<Arch>;
    const record_layout at = layout_of(f);
    const int group = f.group(), padded = simd::whole_lanes(dim);
    const auto count = static_cast<std::size_t>(dim) * static_cast<std::size_t>(group);
    float* const scale = m.factors;
    float* const zero = scale + padded;
    float* const token_scale = zero + padded;
    load_scalars<Arch>(record + at.k_channel_scale, dim, scale);
    load_scalars<Arch>(record + at.k_channel_zero, dim, zero);
    load_scalars<Arch>(record + at.k_token_scale, group, token_scale);
    with_bits(f.key_bits(), [&](auto b) {
        unpack_stream<Arch, b()>(reinterpret_cast<const std::uint8_t*>(record + at.k_codes), count, m.codes);
    });
    std::uint8_t* const turned = m.codes + padded * group;  // [channel / width][token][width] of staged_tokens tokens
    constexpr int block_bytes = staged_tokens * kern::width;
    for (int t = 0; t < group; t += staged_tokens) {
        for (int d = 0; d < dim; d += kern::width)
            kern::transpose_codes(m.codes + d * group + t, group, turned + d / kern::width * block_bytes);
        store_tokens<Arch>(k, t, staged_tokens, dim, unrotated, m.stage, [&](int i) __attribute__((always_inline)) {
            return key_row<Arch>{turned + i * kern::width, block_bytes, scale, zero, kern::broadcast(token_scale[t + i])};
        });
    }
}

template <class Arch, class T, class Dim>
KVARN_NOINLINE void decode_values(const format& f, const std::byte* record, const tile_source<T>& v, bool unrotated,
                                  const tile_memory& m, Dim dim) noexcept
{
    using kern = simd::kernels<Arch>;
    const record_layout at = layout_of(f);
    const int group = f.group();
    float* const channel_scale = m.factors;
    float* const scale = channel_scale + simd::whole_lanes(dim);
    float* const zero = scale + group;
    load_scalars<Arch>(record + at.v_channel_scale, dim, channel_scale);
    load_scalars<Arch>(record + at.v_token_scale, group, scale);
    load_scalars<Arch>(record + at.v_token_zero, group, zero);
    const auto count = static_cast<std::size_t>(staged_tokens) * static_cast<std::size_t>(dim);
    const std::uint8_t* packed = reinterpret_cast<const std::uint8_t*>(record + at.v_codes);
    for (int t = 0; t < group; t += staged_tokens) {
        with_bits(f.value_bits(), [&](auto b) { unpack_stream<Arch, b()>(packed, count, m.codes); });
        packed += count * static_cast<std::size_t>(f.value_bits()) / 8;
        store_tokens<Arch>(v, t, staged_tokens, dim, unrotated, m.stage, [&](int i) __attribute__((always_inline)) {
            return value_row<Arch>{m.codes + i * dim, kern::broadcast(scale[t + i]), kern::broadcast(zero[t + i]), channel_scale};
        });
    }
}

/// Whether all half scalars in [from, to) of a record are finite.
template <class Arch>
KVARN_INLINE bool scalars_finite(const std::byte* record, std::size_t from, std::size_t to) noexcept
{
    return simd::kernels<Arch>::largest_magnitude(reinterpret_cast<const half*>(record + from), (to - from) / 2) < 0x7c00u;
}

/// The largest of `n` scalars of a record.
template <class Arch>
KVARN_INLINE float largest_scalar(const std::byte* scalars, int n) noexcept
{
    const std::uint32_t bits = simd::kernels<Arch>::largest_magnitude(reinterpret_cast<const half*>(scalars), static_cast<std::size_t>(n));
    return to_float(half{static_cast<std::uint16_t>(bits)});
}

/// Calls decode(to), with the cheaper store of bounded_half when no decoded value can exceed a half: their magnitude is at most
/// (scale * levels + zero) * other axis' scale, and that times sqrt(dim) in the original basis.
template <class Arch, class T, class F>
KVARN_INLINE void with_bound(const tile_source<T>& to, const std::byte* scale, const std::byte* zero, int n, const std::byte* other,
                             int others, int bits, int spread, F&& decode) noexcept
{
    if constexpr (std::is_same_v<T, half>) {
        const float bound = (largest_scalar<Arch>(scale, n) * static_cast<float>(1 << bits) + largest_scalar<Arch>(zero, n)) *
                            largest_scalar<Arch>(other, others) * std::sqrt(static_cast<float>(spread));
        if (bound < 65000.0f)
            return decode(tile_source<bounded_half>{reinterpret_cast<bounded_half*>(to.data), to.token_stride, to.channel_stride});
    }
    decode(to);
}

}  // namespace detail

KVARN_INLINE constexpr std::size_t scratch_bytes(const format& f) noexcept
{
    const auto widest = static_cast<std::size_t>(detail::widest_axis(f));
    const std::size_t floats = detail::tile_floats(f) + variance_floats(static_cast<int>(widest), static_cast<int>(widest)) +
                               2 * widest + detail::staged_tokens * widest;
    return floats * sizeof(float) + 63;
}

template <class Arch, element T>
status quantize_kv(const format& f, kv_view<T> k, kv_view<T> v, record_grid<std::byte> records, std::span<std::byte> scratch,
                   const encode_options& options, record_range range) noexcept
{
    using storage = storage_t<T>;
    if (options.encoder != encoder::paper || options.iterations < 0 || options.iterations > 64) return status::bad_argument;
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

    const simd::float_environment guard;
    const kv_view<const storage> keys = detail::as_storage(k), values = detail::as_storage(v);
    const detail::tile_memory memory = detail::carve(f, scratch.data());
    const auto source = [&](const kv_view<const storage>& x, std::size_t i) {
        return x.data ? detail::source_of(x, i / records.heads, i % records.heads, f.group()) : detail::tile_source<const storage>{};
    };
    for (std::size_t i = range.begin; i < range.end; ++i) {
        const status s = detail::check_tile<Arch, storage>(f, source(keys, i), source(values, i), memory, options.iterations);
        if (s != status::ok) return s;
    }
    const record_layout at = layout_of(f);
    const std::size_t owned = detail::owned_bytes(f, records);
    for (std::size_t i = range.begin; i < range.end; ++i) {
        std::byte* const record = records.at(i / records.heads, i % records.heads);
        detail::encode_keys<Arch, storage>(f, source(keys, i), memory, options.iterations, record);
        if (f.has_values()) detail::encode_values<Arch, storage>(f, source(values, i), memory, options.iterations, record);
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
    const bool unrotated = f.rotated() && wanted == basis::original;
    for (std::size_t i = range.begin; i < range.end; ++i) {
        const std::byte* const record = records.at(i / records.heads, i % records.heads);
        if (keys.data != nullptr) {
            const auto to = detail::source_of(keys, i / records.heads, i % records.heads, f.group());
            detail::with_bound<Arch>(
                to, record + at.k_channel_scale, record + at.k_channel_zero, f.head_dim_k(), record + at.k_token_scale, f.group(),
                f.key_bits(), unrotated ? f.head_dim_k() : 1, [&](const auto& out) {
                    detail::with_extent(f.head_dim_k(), [&](auto dim) { detail::decode_keys<Arch>(f, record, out, unrotated, memory, dim); });
                });
            if (f.exact_channels() != 0) detail::decode_exact<Arch>(f, record + at.exact, to);
        }
        if (values.data != nullptr) {
            const auto to = detail::source_of(values, i / records.heads, i % records.heads, f.group());
            detail::with_bound<Arch>(
                to, record + at.v_token_scale, record + at.v_token_zero, f.group(), record + at.v_channel_scale, f.head_dim_v(),
                f.value_bits(), unrotated ? f.head_dim_v() : 1, [&](const auto& out) {
                    detail::with_extent(f.head_dim_v(), [&](auto dim) { detail::decode_values<Arch>(f, record, out, unrotated, memory, dim); });
                });
        }
    }
    return status::ok;
}

}  // namespace kvarn
