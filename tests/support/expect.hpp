// SPDX-License-Identifier: Apache-2.0
#pragma once
// Calls of a test that must succeed.

#include <stdexcept>
#include <string>

#include <kvarn/base/status.hpp>

namespace support {

/// Stops the test case with the status in words if a call that must succeed does not.
inline void expect_ok(kvarn::status s)
{
    if (s != kvarn::status::ok) throw std::runtime_error(std::string("unexpected status: ") + kvarn::message(s));
}

}  // namespace support
