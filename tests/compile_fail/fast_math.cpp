// SPDX-License-Identifier: Apache-2.0
// flags: -ffast-math -Ofast -ffinite-math-only -D__ASSOCIATIVE_MATH__ -D__RECIPROCAL_MATH__ -D__FLT_EVAL_METHOD__=2
// expect: kvarn: records must be the same bytes on every machine
#include <kvarn/kvarn.hpp>
