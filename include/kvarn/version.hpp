// SPDX-License-Identifier: Apache-2.0
#pragma once
// The one definition of the library's version; CMake and the package files read it from here.

#define KVARN_VERSION_MAJOR 0
#define KVARN_VERSION_MINOR 1
#define KVARN_VERSION_PATCH 0
#define KVARN_VERSION_STRING "0.1.0"
