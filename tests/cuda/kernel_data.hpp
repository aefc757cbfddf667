// SPDX-License-Identifier: Apache-2.0
#pragma once
// What the tests of the kernels' bodies share: formats, aligned copies of tokens, views of them, and the CPU's records.

#include <kvarn/cuda/tokens.cuh>
#include <kvarn/quantize.hpp>

#include <cstring>
#include <vector>

#include "../support/library.hpp"
#include "run.hpp"

namespace support {

template <class T>
constexpr kvarn::cuda::element_type type_of = sizeof(T) == 4                   ? kvarn::cuda::element_type::f32
                                              : std::is_same_v<T, kvarn::half> ? kvarn::cuda::element_type::f16
                                                                               : kvarn::cuda::element_type::bf16;

/// A copy that kernels may read and write.
template <class T>
shared_vector<T> shared_copy(const std::vector<T>& x)
{
    return {x.begin(), x.end()};
}

/// Dense tokens [token][head][channel].
template <class Void>
kvarn::cuda::token_tiles<Void> dense(Void* data, kvarn::cuda::element_type type, int heads, int channels)
{
    kvarn::cuda::token_tiles<Void> x;
    x.data = data;
    x.type = type;
    x.token_stride = heads * channels;
    x.head_stride = channels;
    return x;
}

inline kvarn::format format_of(int dk, int dv, int kb, int vb, int group, bool rotate_k = true, int exact = 0, bool rotate_v = true)
{
    kvarn::format_spec s;
    s.head_dim_k = dk;
    s.head_dim_v = dv;
    s.key_bits = kb;
    s.value_bits = vb;
    s.group = group;
    if (!rotate_k) s.key_rotation = kvarn::rotation::none;
    if (!rotate_v) s.value_rotation = kvarn::rotation::none;
    s.exact_channels = exact;
    return make(s);
}

/// Every width for K and for V, every head_dim and group, with and without rotation, values and exact channels. `group`: of the
/// largest tile, of 256 channels, which shared memory does not hold at every size.
inline std::vector<kvarn::format> kernel_formats(int group)
{
    return {
        format_of(128, 128, 4, 2, 128),
        format_of(64, 64, 4, 4, 32),
        format_of(64, 128, 2, 8, 64),
        format_of(256, 64, 3, 5, 64),
        format_of(128, 256, 8, 3, 32),
        format_of(64, 64, 6, 6, 256),
        format_of(128, 64, 5, 2, 128),
        format_of(64, 64, 4, 2, 64, false, 0, false),
        format_of(128, 64, 4, 2, 64, false),
        format_of(64, 128, 2, 4, 32, true, 0, false),
        format_of(128, 128, 4, 0, 64, true, 64),
        format_of(256, 256, 2, 2, group),
        format_of(64, 128, 4, 4, 32, false, 8, false),
    };
}

/// Dense records [tile][head] of the CPU, 8-byte aligned.
struct cpu_records {
    shared_vector<std::uint64_t> words;
    std::byte* data() { return reinterpret_cast<std::byte*>(words.data()); }
};

template <class T>
kvarn::status seal_on_cpu(const kvarn::format& f, const std::vector<T>& k, const std::vector<T>& v, std::size_t tiles,
                          std::size_t heads, const kvarn::encode_options& o, cpu_records& records)
{
    records.words.assign(kvarn::grid_bytes(f, tiles, heads) / 8, 0);
    std::vector<std::byte> scratch(kvarn::scratch_bytes(f));
    return kvarn::quantize_kv(f, dense_keys(f, k.data(), tiles, heads), dense_values(f, v.data(), tiles, heads),
                              kvarn::tile_major_records(f, records.data(), records.words.size() * 8, tiles, heads), scratch, o);
}

}  // namespace support
