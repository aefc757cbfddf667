// SPDX-License-Identifier: Apache-2.0
#include <cstdio>

#include <codec.hpp>

const char* engine_kvarn_version();

int main()
{
    std::vector<float> k(2 * 64 * 64), v(k.size());
    for (std::size_t i = 0; i < k.size(); ++i) {
        k[i] = static_cast<float>(i * 37 % 101) - 50.0f;
        v[i] = static_cast<float>(i * 53 % 97) * 0.25f;
    }
#ifdef ENGINE_PUBLIC
    if (!kvarn::parse_format("k4v2_g64", 64)) return 1;
#endif
    const auto bytes = engine_static::seal(k, v);
    unsigned hash = 2166136261u;
    for (std::byte b : bytes) hash = (hash ^ static_cast<unsigned>(b)) * 16777619u;
    std::printf("kvarn %s: %zu bytes, hash %08x\n", engine_kvarn_version(), bytes.size(), hash);
    return bytes.size() == 2 * 3840 && bytes == engine_shared::seal(k, v) ? 0 : 2;
}
