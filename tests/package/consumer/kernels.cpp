// SPDX-License-Identifier: Apache-2.0
// A program with several instruction sets: kvarn_add_kernels has compiled them, this file knows none of them.
#include <cstdio>
#include <string>

#include <kvarn/dispatch.hpp>
#include <kvarn/interop/owning.hpp>

#include "part.hpp"

int main()
{
    std::vector<float> k(2 * 64 * 64), v(k.size()), k2(k.size()), v2(v.size()), k_first, v_first;
    for (std::size_t i = 0; i < k.size(); ++i) {
        k[i] = static_cast<float>(i * 37 % 101) - 50.0f;
        v[i] = static_cast<float>(i * 53 % 97) * 0.25f;
    }
    const auto format = kvarn::parse_format("k4v2_g64", 64);
    if (!format) return 1;
    const auto expected = quantize_elsewhere(*format, k, v);
    const auto view = [](std::vector<float>& x) { return kvarn::head_major(x.data(), 64, 2, 64); };
    std::vector<std::byte> scratch(kvarn::scratch_bytes(*format));

    const std::string best = kvarn::active_arch_name();
    std::string names;
    bool same = true;
    kvarn::for_each_arch([&](auto a) {
        names += kvarn::simd::arch_traits<decltype(a)>::name;
        names += ' ';
        same = same && kvarn::select_arch(kvarn::simd::arch_traits<decltype(a)>::name) == kvarn::status::ok;
        std::vector<std::byte> bytes(kvarn::grid_bytes(*format, 1, 2));
        const auto records = kvarn::tile_major_records(*format, bytes.data(), bytes.size(), 1, 2);
        auto done = kvarn::dispatch([&](auto arch) { return kvarn::quantize_kv<decltype(arch)>(*format, view(k), view(v), records); });
        if (done == kvarn::status::ok)
            done = kvarn::dispatch([&](auto arch) {
                return kvarn::dequantize_kv<decltype(arch)>(*format, records, view(k2), view(v2), kvarn::basis::rotated, scratch);
            });
        if (done == kvarn::status::ok) done = kvarn::dispatch([&](auto arch) { return kvarn::unrotate<decltype(arch)>(view(k2)); });
        if (k_first.empty()) k_first = k2, v_first = v2;
        same = same && done == kvarn::status::ok && bytes == expected && k2 == k_first && v2 == v_first;
    });
    std::printf("%s, dispatched: %s, %s\n", names.c_str(), best.c_str(), same ? "the same everywhere" : "DIFFERENT");
    return same && names.size() > best.size() && names.substr(names.size() - best.size() - 1) == best + ' ' ? 0 : 2;
}
