// SPDX-License-Identifier: Apache-2.0
// expect: kvarn: cl.exe cannot keep floating-point operations apart
// cl.exe defines _MSC_VER and not __clang__. The control is clang-cl, which defines both: what it is refused for would show here.
#if defined(KVARN_MUST_FAIL)
#undef __clang__
#define _MSC_VER 1940
#elif defined(__clang__)
#define _MSC_VER 1940
#endif
#include <kvarn/base/config.hpp>
