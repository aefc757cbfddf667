// SPDX-License-Identifier: Apache-2.0
// expect: constraints not satisfied
#include <cstdint>

#include <kvarn/kvarn.hpp>

#if defined(KVARN_MUST_FAIL)
kvarn::kv_view<std::uint16_t> view;  // half or bfloat16? The caller has to say
#else
kvarn::kv_view<kvarn::half> view;
#endif
