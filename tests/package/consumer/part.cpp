// SPDX-License-Identifier: Apache-2.0
#include "part.hpp"

#include <kvarn/interop/owning.hpp>
#include <kvarn/kvarn.hpp>

std::vector<std::byte> quantize_elsewhere(const kvarn::format& format, const std::vector<float>& k, const std::vector<float>& v)
{
    std::vector<std::byte> bytes(kvarn::grid_bytes(format, 1, 2));
    const auto status = kvarn::quantize_kv(format, kvarn::head_major(k.data(), 64, 2, 64), kvarn::head_major(v.data(), 64, 2, 64),
                                           kvarn::tile_major_records(format, bytes.data(), bytes.size(), 1, 2));
    return status == kvarn::status::ok ? bytes : std::vector<std::byte>{};
}
