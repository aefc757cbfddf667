// SPDX-License-Identifier: Apache-2.0
// expect: no matching function|could not convert|no viable conversion|constraints not satisfied|static assertion|static_assert
#include <kvarn/kvarn.hpp>

#if defined(KVARN_MUST_FAIL)
using output = const float;
#else
using output = float;
#endif

kvarn::status read(const kvarn::format& f, kvarn::record_grid<const std::byte> records, kvarn::kv_view<output> k,
                   kvarn::kv_view<output> v, std::span<std::byte> scratch)
{
    return kvarn::dequantize_kv(f, records, k, v, kvarn::basis::original, scratch);
}
