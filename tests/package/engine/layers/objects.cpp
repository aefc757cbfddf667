// SPDX-License-Identifier: Apache-2.0
#include <kvarn/version.hpp>

const char* engine_kvarn_version() { return KVARN_VERSION_STRING; }
