// SPDX-License-Identifier: Apache-2.0
// The main function of Catch2 2.13; Catch2 3 brings a library with one, and this file is not compiled then.
#define CATCH_CONFIG_MAIN
#include <catch2/catch.hpp>
