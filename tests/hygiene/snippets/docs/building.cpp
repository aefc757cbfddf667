// SPDX-License-Identifier: Apache-2.0
// docs/building.md
#include <kvarn/dispatch/calls.hpp>

kvarn::status build(const kvarn::format& format, kvarn::kv_view<const kvarn::half> keys, kvarn::kv_view<const kvarn::half> values,
                    kvarn::record_grid<std::byte> records, std::span<std::byte> scratch);
kvarn::status build(const kvarn::format& format, kvarn::kv_view<const kvarn::half> keys, kvarn::kv_view<const kvarn::half> values,
                    kvarn::record_grid<std::byte> records, std::span<std::byte> scratch)
{
    // snippet: dispatch
    return done;
}
