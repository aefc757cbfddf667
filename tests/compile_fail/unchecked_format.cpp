// SPDX-License-Identifier: Apache-2.0
// expect: no matching function|could not convert|no viable conversion|no matching constructor|no known conversion
#include <kvarn/kvarn.hpp>

// A format is validated when it is made: there is no way around make_format and parse_format.
#if defined(KVARN_MUST_FAIL)
kvarn::format f(kvarn::format_spec{.head_dim_k = 100});
#else
auto f = kvarn::make_format(kvarn::format_spec{.head_dim_k = 100});
#endif
