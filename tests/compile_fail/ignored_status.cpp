// SPDX-License-Identifier: Apache-2.0
// flags: -Werror=unused-result
// expect: nodiscard
#include <kvarn/kvarn.hpp>

void write(const kvarn::format& f, kvarn::kv_view<const float> k, kvarn::kv_view<const float> v,
           kvarn::record_grid<std::byte> records, std::span<std::byte> scratch)
{
    [[maybe_unused]] kvarn::status done{};
#if !defined(KVARN_MUST_FAIL)
    done =
#endif
        kvarn::quantize_kv(f, k, v, records, scratch);
}
