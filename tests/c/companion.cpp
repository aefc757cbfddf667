// SPDX-License-Identifier: Apache-2.0
// The C++ library on the values of the C tests, compiled here and not in the library under test.
#include <cstddef>
#include <span>
#include <vector>

#include <kvarn/quantize.hpp>

extern "C" int companion_quantize(const char* name, int dim, const float* k, const float* v, std::size_t tiles, std::size_t heads,
                                  void* records, std::size_t bytes);

extern "C" int companion_quantize(const char* name, int dim, const float* k, const float* v, std::size_t tiles, std::size_t heads,
                                  void* records, std::size_t bytes)
{
    const auto format = kvarn::parse_format(name, dim);
    if (!format) return 0;
    const auto channels = static_cast<std::size_t>(dim), tokens = tiles * static_cast<std::size_t>(format->group());
    std::vector<std::byte> scratch(kvarn::scratch_bytes(*format));
    const auto grid = kvarn::tile_major_records(*format, static_cast<std::byte*>(records), bytes, tiles, heads);
    return kvarn::quantize_kv<kvarn::simd::portable>(*format, kvarn::token_major(k, tokens, heads, channels),
                                                     kvarn::token_major(v, tokens, heads, channels), grid,
                                                     scratch) == kvarn::status::ok;
}
