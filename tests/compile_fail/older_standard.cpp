// SPDX-License-Identifier: Apache-2.0
// flags: -std=c++17 -std=gnu++17 -std=c++14
// expect: kvarn needs C\+\+20: compile the files
#include <kvarn/kvarn.hpp>
