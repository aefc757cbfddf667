// SPDX-License-Identifier: Apache-2.0
#pragma once
// Short ways to call the library from tests: dense float tiles in, record bytes out, and back.

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "../reference/reference.hpp"
#include "expect.hpp"
#include "random_tiles.hpp"

#include <kvarn/kvarn.hpp>

// The templates under test are compiled once per instruction set, in tests/simd/<arch>_test.cpp, as an engine would do it.
#define KVARN_TEST_INSTANTIATE_TYPE(EXTERN, ARCH, T)                                                                           \
    EXTERN template kvarn::status kvarn::quantize_kv<ARCH, T>(const kvarn::format&, kvarn::kv_view<T>, kvarn::kv_view<T>,      \
                                                              kvarn::record_grid<std::byte>, std::span<std::byte>,             \
                                                              const kvarn::encode_options&, kvarn::record_range,               \
                                                              std::span<kvarn::record_errors>) noexcept;                       \
    EXTERN template kvarn::status kvarn::dequantize_kv<ARCH, std::byte, T>(                                                    \
        const kvarn::format&, kvarn::record_grid<std::byte>, kvarn::kv_view<T>, kvarn::kv_view<T>, kvarn::basis,               \
        std::span<std::byte>, kvarn::record_range) noexcept;                                                                   \
    EXTERN template kvarn::status kvarn::rotate<ARCH, T>(kvarn::kv_view<T>) noexcept;                                          \
    EXTERN template kvarn::status kvarn::unrotate<ARCH, T>(kvarn::kv_view<T>) noexcept;
#define KVARN_TEST_INSTANTIATE(EXTERN, ARCH)                                                                                   \
    KVARN_TEST_INSTANTIATE_TYPE(EXTERN, ARCH, float)                                                                           \
    KVARN_TEST_INSTANTIATE_TYPE(EXTERN, ARCH, kvarn::half)                                                                     \
    KVARN_TEST_INSTANTIATE_TYPE(EXTERN, ARCH, kvarn::bfloat16)                                                                 \
    EXTERN template kvarn::status kvarn::convert<ARCH>(const kvarn::input_view&, const kvarn::output_view&) noexcept;          \
    EXTERN template kvarn::status kvarn::pack_codes<ARCH>(int, const std::uint8_t*, std::size_t, std::uint8_t*) noexcept;      \
    EXTERN template kvarn::status kvarn::unpack_codes<ARCH>(int, const std::uint8_t*, std::size_t, std::uint8_t*) noexcept;    \
    EXTERN template kvarn::status kvarn::attend<ARCH>(const kvarn::format&, const kvarn::attention_task&,                      \
                                                      const kvarn::attention_options&, std::span<std::byte>) noexcept;         \
    EXTERN template kvarn::status kvarn::attend_item<ARCH>(                                                                    \
        const kvarn::format&, std::span<const kvarn::attention_task>, const kvarn::attention_options&, std::size_t,            \
        std::size_t, std::span<std::byte>, std::span<std::byte>) noexcept;                                                     \
    EXTERN template kvarn::status kvarn::combine_items<ARCH>(                                                                  \
        const kvarn::format&, std::span<const kvarn::attention_task>, const kvarn::attention_options&, std::size_t,            \
        std::span<const std::byte>, std::span<std::byte>) noexcept;

KVARN_TEST_INSTANTIATE(extern, kvarn::simd::portable)
#if defined(KVARN_HAS_SSE2)
KVARN_TEST_INSTANTIATE(extern, kvarn::simd::sse2)
#endif
#if defined(KVARN_HAS_AVX2)
KVARN_TEST_INSTANTIATE(extern, kvarn::simd::avx2)
#endif
#if defined(KVARN_HAS_AVXVNNI)
KVARN_TEST_INSTANTIATE(extern, kvarn::simd::avxvnni)
#endif
#if defined(KVARN_HAS_AVX512)
KVARN_TEST_INSTANTIATE(extern, kvarn::simd::avx512)
#endif
#if defined(KVARN_HAS_AVX512VNNI)
KVARN_TEST_INSTANTIATE(extern, kvarn::simd::avx512vnni)
#endif
#if defined(KVARN_HAS_NEON64)
KVARN_TEST_INSTANTIATE(extern, kvarn::simd::neon64)
#endif
#if defined(KVARN_HAS_NEON64DOT)
KVARN_TEST_INSTANTIATE(extern, kvarn::simd::neon64dot)
#endif

namespace support {

using bytes = std::vector<std::uint8_t>;

inline std::byte* as_bytes(std::uint8_t* p) { return reinterpret_cast<std::byte*>(p); }
inline const std::byte* as_bytes(const std::uint8_t* p) { return reinterpret_cast<const std::byte*>(p); }

inline kvarn::format make(const kvarn::format_spec& spec)
{
    const auto made = kvarn::make_format(spec);
    expect_ok(made.error);
    return made.value;
}

inline kvarn::format make(const reference::shape& s)
{
    kvarn::format_spec spec;
    spec.head_dim_k = s.head_dim_k;
    spec.head_dim_v = s.head_dim_v;
    spec.key_bits = s.key_bits;
    spec.value_bits = s.value_bits;
    spec.group = s.group;
    if (!s.rotate.k) spec.key_rotation = kvarn::rotation::none;
    if (!s.rotate.v) spec.value_rotation = kvarn::rotation::none;
    spec.exact_channels = s.exact_channels;
    return make(spec);
}

inline reference::shape shape_of(const kvarn::format& f)
{
    reference::shape s;
    s.head_dim_k = f.head_dim_k();
    s.head_dim_v = f.head_dim_v();
    s.key_bits = f.key_bits();
    s.value_bits = f.value_bits();
    s.group = f.group();
    s.rotate = {f.keys_rotated(), f.values_rotated()};
    s.exact_channels = f.exact_channels();
    return s;
}

inline std::string describe(const kvarn::format& f)
{
    return "k" + std::to_string(f.key_bits()) + "v" + std::to_string(f.value_bits()) + "_g" + std::to_string(f.group()) +
           " head_dim " + std::to_string(f.head_dim_k()) + "/" + std::to_string(f.head_dim_v()) + " exact " +
           std::to_string(f.exact_channels()) + (f.keys_rotated() ? " K" : " no K") + (f.values_rotated() ? " and V rotated" : " and no V rotated");
}

template <class T>
T stored(float value)
{
    if constexpr (std::is_same_v<T, kvarn::half>)
        return {reference::half_bits(value)};
    else if constexpr (std::is_same_v<T, kvarn::bfloat16>)
        return {reference::bfloat16_bits(value)};
    else
        return value;
}

inline double value_of(float f) { return f; }
inline double value_of(kvarn::half h) { return reference::half_value(h.bits); }
inline double value_of(kvarn::bfloat16 b) { return reference::bfloat16_value(b.bits); }

template <class T>
std::vector<T> stored(const std::vector<float>& values)
{
    std::vector<T> out(values.size());
    for (std::size_t i = 0; i < values.size(); ++i) out[i] = stored<T>(values[i]);
    return out;
}

/// K and V of `tiles x heads` tiles, dense [token][head][channel]; the last channels of K are the exact ones.
struct kv_tiles {
    std::size_t tiles = 1, heads = 1;
    std::vector<float> k, v;
};

inline kv_tiles random_tiles(random_source& random, const kvarn::format& f, std::size_t tiles, std::size_t heads, tile_kind kind)
{
    kv_tiles x{tiles, heads, {}, {}};
    const auto g = static_cast<std::size_t>(f.group());
    const auto dk = static_cast<std::size_t>(f.key_channels()), dv = static_cast<std::size_t>(f.head_dim_v());
    x.k.resize(tiles * g * heads * dk);
    x.v.resize(tiles * g * heads * dv);
    const auto place = [&](std::vector<float>& all, std::size_t tile, std::size_t head, std::size_t channels) {
        if (!channels) return;
        const std::vector<float> one = random_tile(random, g, channels, kind);
        for (std::size_t t = 0; t < g; ++t)
            std::memcpy(&all[((tile * g + t) * heads + head) * channels], &one[t * channels], channels * sizeof(float));
    };
    for (std::size_t tile = 0; tile < tiles; ++tile)
        for (std::size_t head = 0; head < heads; ++head) {
            place(x.k, tile, head, dk);
            place(x.v, tile, head, dv);
        }
    return x;
}

/// Channels [first, first + count) of one tile of a dense [token][head][channel] array, as [token][channel].
inline reference::matrix tile_matrix(const std::vector<float>& all, std::size_t tile, std::size_t head, std::size_t heads,
                                     int group, int channels, int first, int count)
{
    reference::matrix m(group, count);
    for (int t = 0; t < group; ++t)
        for (int c = 0; c < count; ++c)
            m(t, c) = all[((tile * static_cast<std::size_t>(group) + static_cast<std::size_t>(t)) * heads + head) *
                              static_cast<std::size_t>(channels) +
                          static_cast<std::size_t>(first + c)];
    return m;
}

inline reference::matrix key_matrix(const kvarn::format& f, const kv_tiles& x, std::size_t tile, std::size_t head)
{
    return tile_matrix(x.k, tile, head, x.heads, f.group(), f.key_channels(), 0, f.head_dim_k());
}
inline reference::matrix exact_matrix(const kvarn::format& f, const kv_tiles& x, std::size_t tile, std::size_t head)
{
    return tile_matrix(x.k, tile, head, x.heads, f.group(), f.key_channels(), f.head_dim_k(), f.exact_channels());
}
inline reference::matrix value_matrix(const kvarn::format& f, const kv_tiles& x, std::size_t tile, std::size_t head)
{
    return tile_matrix(x.v, tile, head, x.heads, f.group(), f.head_dim_v(), 0, f.head_dim_v());
}

inline std::size_t tokens_of(const kvarn::format& f, std::size_t tiles) { return tiles * static_cast<std::size_t>(f.group()); }

template <class T>
kvarn::kv_view<T> dense_keys(const kvarn::format& f, T* k, std::size_t tiles, std::size_t heads)
{
    return kvarn::token_major(k, tokens_of(f, tiles), heads, static_cast<std::size_t>(f.key_channels()));
}

template <class T>
kvarn::kv_view<T> dense_values(const kvarn::format& f, T* v, std::size_t tiles, std::size_t heads)
{
    if (!f.has_values()) return {};
    return kvarn::token_major(v, tokens_of(f, tiles), heads, static_cast<std::size_t>(f.head_dim_v()));
}

/// The paper's encoder.
inline kvarn::encode_options paper(int iterations = 8)
{
    kvarn::encode_options options;
    options.encoder = kvarn::encoder::paper;
    options.iterations = iterations;
    return options;
}

/// The records of dense tiles, tile-major; every byte that the library does not write is 0xa5.
template <class Arch = kvarn::simd::native_arch, class T = float>
bytes encode(const kvarn::format& f, const kv_tiles& x, const kvarn::encode_options& options = {},
             kvarn::record_stride stride = kvarn::record_stride::packed)
{
    std::vector<T> k = stored<T>(x.k), v = stored<T>(x.v);
    bytes records(kvarn::grid_bytes(f, x.tiles, x.heads, stride), 0xa5);
    std::vector<std::byte> scratch(kvarn::scratch_bytes(f));
    expect_ok(kvarn::quantize_kv<Arch>(f, dense_keys(f, k.data(), x.tiles, x.heads), dense_values(f, v.data(), x.tiles, x.heads),
                                       kvarn::tile_major_records(f, as_bytes(records.data()), records.size(), x.tiles, x.heads, stride),
                                       std::span<std::byte>(scratch), options));
    return records;
}

/// What quantize_kv reports of each record of dense tiles, tile-major.
template <class Arch = kvarn::simd::native_arch>
std::vector<kvarn::record_errors> encode_errors(const kvarn::format& f, const kv_tiles& x, const kvarn::encode_options& options = {})
{
    std::vector<float> k = x.k, v = x.v;
    bytes records(kvarn::grid_bytes(f, x.tiles, x.heads));
    std::vector<std::byte> scratch(kvarn::scratch_bytes(f), std::byte{0xff});
    std::vector<kvarn::record_errors> errors(x.tiles * x.heads);
    expect_ok(kvarn::quantize_kv<Arch>(f, dense_keys(f, k.data(), x.tiles, x.heads), dense_values(f, v.data(), x.tiles, x.heads),
                                       kvarn::tile_major_records(f, as_bytes(records.data()), records.size(), x.tiles, x.heads),
                                       std::span<std::byte>(scratch), options, {}, std::span(errors)));
    return errors;
}

template <class T>
struct stored_tiles {
    std::vector<T> k, v;
};

template <class Arch = kvarn::simd::native_arch, class T = float>
stored_tiles<T> decode_as(const kvarn::format& f, const bytes& records, std::size_t tiles, std::size_t heads, kvarn::basis basis,
                          kvarn::record_stride stride = kvarn::record_stride::packed)
{
    stored_tiles<T> x;
    x.k.assign(tokens_of(f, tiles) * heads * static_cast<std::size_t>(f.key_channels()), stored<T>(-77.0f));
    x.v.assign(tokens_of(f, tiles) * heads * static_cast<std::size_t>(f.head_dim_v()), stored<T>(-77.0f));
    std::vector<std::byte> scratch(kvarn::scratch_bytes(f));
    expect_ok(kvarn::dequantize_kv<Arch>(f, kvarn::tile_major_records(f, const_cast<std::byte*>(as_bytes(records.data())), records.size(), tiles, heads, stride),
                                         dense_keys(f, x.k.data(), tiles, heads), dense_values(f, x.v.data(), tiles, heads), basis,
                                         std::span<std::byte>(scratch)));
    return x;
}

template <class Arch = kvarn::simd::native_arch>
kv_tiles decode(const kvarn::format& f, const bytes& records, std::size_t tiles, std::size_t heads, kvarn::basis basis,
                kvarn::record_stride stride = kvarn::record_stride::packed)
{
    stored_tiles<float> x = decode_as<Arch, float>(f, records, tiles, heads, basis, stride);
    return {tiles, heads, std::move(x.k), std::move(x.v)};
}

template <class T>
bool same_bits(const std::vector<T>& a, const std::vector<T>& b)
{
    return a.size() == b.size() && (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0);
}

/// Calls `test` with every architecture tag that this build can run: portable first.
template <class Test>
void for_each_arch(Test&& test)
{
    test(kvarn::simd::portable{});
#if defined(KVARN_HAS_SSE2)
    test(kvarn::simd::sse2{});
#endif
#if defined(KVARN_HAS_AVX2)
    test(kvarn::simd::avx2{});
#endif
#if defined(KVARN_HAS_AVXVNNI)
    test(kvarn::simd::avxvnni{});
#endif
#if defined(KVARN_HAS_AVX512)
    test(kvarn::simd::avx512{});
#endif
#if defined(KVARN_HAS_AVX512VNNI)
    test(kvarn::simd::avx512vnni{});
#endif
#if defined(KVARN_HAS_NEON64)
    test(kvarn::simd::neon64{});
#endif
#if defined(KVARN_HAS_NEON64DOT)
    test(kvarn::simd::neon64dot{});
#endif
}

}  // namespace support
