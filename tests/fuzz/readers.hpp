// SPDX-License-Identifier: Apache-2.0
#pragma once
// For the targets of the examples' file readers, which return a value or throw a failure.

#include <string_view>
#include <utility>

#include "examples/common/failure.hpp"
#include "fuzz.hpp"

namespace fuzz {

/// Calls read(), which returns or ends with a failure that names the file, "x"; says whether it returned.
template <class Read>
bool accepts(Read&& read)
{
    try {
        std::forward<Read>(read)();
        return true;
    } catch (const kvarn_cli::failure& f) {
        require(std::string_view(f.what()).substr(0, 3) == "x: ", "a failure begins with the file's name");
        return false;
    }
}

}  // namespace fuzz
