// SPDX-License-Identifier: Apache-2.0
// flags: -ffast-math -Ofast -ffinite-math-only
// expect: kvarn: records must be the same bytes on every machine
#include <kvarn/kvarn.hpp>
