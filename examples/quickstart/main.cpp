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
    const auto records = kvarn::tile_major_records(*format, bytes.data(), bytes.size(), tiles, heads);

    const auto keys = kvarn::head_major(k.data(), tokens, heads, head_dim);
    const auto values = kvarn::head_major(v.data(), tokens, heads, head_dim);
    kvarn::status done = kvarn::quantize_kv(*format, keys, values, records);

    // One decoding step: the 4 query heads that share KV head 0 attend to its records, which stay packed.
    const std::size_t group = 4;
    std::vector<float> q(group * head_dim, 0.1f), out(q);
    const kvarn::kv_segment history[] = {kvarn::sealed_tiles(*format, records, 0)};  // and exact_tokens(...) for sink and tail
    std::vector<std::byte> scratch(kvarn::attention_scratch_bytes(*format, group));
    kvarn::attention_task step;
    step.history = history;
    step.q = kvarn::token_major(q.data(), 1, group, head_dim);  // [new token][query head][channel]
    step.out = kvarn::token_major(out.data(), 1, group, head_dim);
    if (done == kvarn::status::ok) done = kvarn::attend(*format, step, {}, scratch);

    std::printf("%s: %zu bytes, out[0] = %.3f\n", kvarn::message(done), bytes.size(), double(out[0]));
    return done == kvarn::status::ok ? 0 : 1;
}
