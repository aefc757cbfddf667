// SPDX-License-Identifier: Apache-2.0
// expect: constraints not satisfied|no matching function
#include <kvarn/kvarn.hpp>

#if defined(KVARN_MUST_FAIL)
using element_type = double;
#else
using element_type = float;
#endif

auto view(element_type* data) { return kvarn::head_major(data, 128, 8, 128); }
