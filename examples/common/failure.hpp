// SPDX-License-Identifier: Apache-2.0
#pragma once
// How the program reports what went wrong: one exception type whose text becomes the one line on stderr.
// Also the overflow-safe arithmetic that every size read from a file goes through.

#include <bit>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <span>
#include <stdexcept>
#include <string>

#include <kvarn/base/status.hpp>

namespace kvarn_cli {

static_assert(std::endian::native == std::endian::little,
              "the readers and writers of this example assume a little-endian machine");

using bytes = std::span<const std::byte>;

/// Ends the command with exit code 2; the text names the file or option and the problem.
struct failure : std::runtime_error {
    using std::runtime_error::runtime_error;
};

/// Turns a status of the library into a failure that starts with `where`.
inline void check(kvarn::status s, const std::string& where)
{
    if (s != kvarn::status::ok) throw failure(where + ": " + kvarn::message(s));
}

/// The value of a result that is one.
template <class T>
[[nodiscard]] T value_of(const kvarn::result<T>& r, const std::string& where)
{
    check(r.error, where);
    return *r;
}

/// a * b; false when it does not fit.
[[nodiscard]] inline bool multiply(std::size_t a, std::size_t b, std::size_t& product) noexcept
{
    if (b != 0 && a > std::numeric_limits<std::size_t>::max() / b) return false;
    product = a * b;
    return true;
}

/// a + b; false when it does not fit.
[[nodiscard]] inline bool add(std::size_t a, std::size_t b, std::size_t& sum) noexcept
{
    if (a > std::numeric_limits<std::size_t>::max() - b) return false;
    sum = a + b;
    return true;
}

}  // namespace kvarn_cli
