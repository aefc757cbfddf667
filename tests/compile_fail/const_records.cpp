// SPDX-License-Identifier: Apache-2.0
// expect: no matching function|could not convert|no viable conversion|constraints not satisfied|static assertion|static_assert
#include <kvarn/kvarn.hpp>

#if defined(KVARN_MUST_FAIL)
using output = const std::byte;
#else
using output = std::byte;
#endif

kvarn::status write(const kvarn::format& f, kvarn::kv_view<const float> k, kvarn::kv_view<const float> v,
                    kvarn::record_grid<output> records, std::span<std::byte> scratch)
{
    return kvarn::quantize_kv(f, k, v, records, scratch);
}
