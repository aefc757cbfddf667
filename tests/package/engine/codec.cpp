// SPDX-License-Identifier: Apache-2.0
// One source for both libraries; ENGINE says which.
#include "codec.hpp"

#include <kvarn/dispatch.hpp>
#include <kvarn/interop/owning.hpp>

#ifdef ENGINE_CUDA
static_assert(KVARN_HAS_CUDA == 1);
#endif

std::vector<std::byte> ENGINE::seal(const std::vector<float>& k, const std::vector<float>& v)
{
    const auto format = kvarn::parse_format("k4v2_g64", 64);
    if (!format || k.size() != 2 * 64 * 64 || v.size() != k.size()) return {};
    std::vector<std::byte> bytes(kvarn::grid_bytes(*format, 1, 2));
    const auto status = kvarn::dispatch([&](auto arch) {
        return kvarn::quantize_kv<decltype(arch)>(*format, kvarn::head_major(k.data(), 64, 2, 64),
                                                  kvarn::head_major(v.data(), 64, 2, 64),
                                                  kvarn::tile_major_records(*format, bytes.data(), bytes.size(), 1, 2));
    });
    return status == kvarn::status::ok ? bytes : std::vector<std::byte>{};
}
