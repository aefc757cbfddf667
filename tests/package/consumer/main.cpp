// SPDX-License-Identifier: Apache-2.0
// Two translation units that include everything; this one calls the other and prints what both made.
#include <cstdio>

#include <kvarn/interop/owning.hpp>
#include <kvarn/kvarn.hpp>

#include "part.hpp"

int main()
{
    std::vector<float> k(2 * 64 * 64), v(k.size());
    for (std::size_t i = 0; i < k.size(); ++i) {
        k[i] = static_cast<float>(i * 37 % 101) - 50.0f;
        v[i] = static_cast<float>(i * 53 % 97) * 0.25f;
    }
    const auto format = kvarn::parse_format("k4v2_g64", 64);
    if (!format) return 1;
    const auto bytes = quantize_elsewhere(*format, k, v);
    std::vector<float> k2(k.size()), v2(v.size());
    const auto status = kvarn::dequantize_kv(
        *format, kvarn::record_grid<const std::byte>(kvarn::tile_major_records(*format, bytes.data(), bytes.size(), 1, 2)),
        kvarn::head_major(k2.data(), 64, 2, 64), kvarn::head_major(v2.data(), 64, 2, 64), kvarn::basis::original);
    if (status != kvarn::status::ok) return 2;
    double error = 0, power = 0;
    for (std::size_t i = 0; i < k.size(); ++i) {
        error += double(k2[i] - k[i]) * double(k2[i] - k[i]);
        power += double(k[i]) * double(k[i]);
    }
    unsigned hash = 2166136261u;
    for (std::byte b : bytes) hash = (hash ^ static_cast<unsigned>(b)) * 16777619u;
    std::printf("kvarn %s: %zu bytes, hash %08x, relative error %.4f\n", KVARN_VERSION_STRING, bytes.size(), hash, error / power);
    return bytes.size() == 2 * 3840 && error < 0.02 * power ? 0 : 3;
}
