// SPDX-License-Identifier: Apache-2.0
// What compile_cost.sh compiles: without KVARN_COST_SET, calls from an engine's file; with it, one set of kvarn_add_kernels.

#if defined(KVARN_COST_SET)
#include <kvarn/dispatch/entry_points.hpp>

namespace kvarn {
KVARN_ENTRY_POINTS(template, KVARN_COST_SET)
}
#else
#include <cstddef>
#include <span>

#include <kvarn/kvarn.hpp>

kvarn::status seal(const kvarn::format& f, kvarn::kv_view<const float> k, kvarn::kv_view<const float> v, kvarn::record_grid<std::byte> to,
                   std::span<std::byte> scratch)
{
    return kvarn::quantize_kv(f, k, v, to, scratch);
}

kvarn::status decode_step(const kvarn::format& f, const kvarn::attention_task& task, std::span<std::byte> scratch)
{
    return kvarn::attend(f, task, {}, scratch);
}
#endif
