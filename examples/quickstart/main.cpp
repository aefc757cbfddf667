#include <cstdio>
#include <vector>

#include <kvarn/interop/owning.hpp>
#include <kvarn/kvarn.hpp>

int main()
{
    const std::size_t tokens = 1024, heads = 8, head_dim = 128;
    std::vector<float> k(heads * tokens * head_dim, 0.5f), v(k);  // [head][token][channel]: your engine's cache

    const auto format = kvarn::parse_format("k4v2_g128", head_dim);
    if (!format) return std::puts(kvarn::message(format.error)), 1;

    const std::size_t tiles = kvarn::full_tiles(*format, tokens);
    std::vector<std::byte> bytes(kvarn::grid_bytes(*format, tiles, heads));  // 16 bits per element become 3.4
    const auto records = kvarn::tile_major(*format, bytes.data(), bytes.size(), tiles, heads);

    const auto keys = kvarn::head_major(k.data(), tokens, heads, head_dim);
    const auto values = kvarn::head_major(v.data(), tokens, heads, head_dim);
    kvarn::status done = kvarn::quantize_kv(*format, keys, values, records);
    if (done == kvarn::status::ok) done = kvarn::dequantize_kv(*format, records, keys, values, kvarn::basis::original);
    std::printf("%s: %zu bytes, k[0] = %.3f\n", kvarn::message(done), bytes.size(), double(k[0]));
    return done == kvarn::status::ok ? 0 : 1;
}
