// SPDX-License-Identifier: Apache-2.0
#pragma once
// Text for people: printf into a string, grouped digits, tables with aligned columns.

#include <algorithm>
#include <cstddef>
#include <cstdio>
#include <string>
#include <vector>

namespace kvarn_cli {

template <class... Arguments>
[[nodiscard]] std::string text(const char* pattern, Arguments... arguments)
{
    const int length = std::snprintf(nullptr, 0, pattern, arguments...);
    std::string out(static_cast<std::size_t>(length), '\0');
    std::snprintf(out.data(), out.size() + 1, pattern, arguments...);
    return out;
}

/// 12345678 -> 12,345,678
[[nodiscard]] inline std::string grouped(std::size_t number)
{
    std::string digits = std::to_string(number);
    for (std::ptrdiff_t at = static_cast<std::ptrdiff_t>(digits.size()) - 3; at > 0; at -= 3)
        digits.insert(static_cast<std::size_t>(at), 1, ',');
    return digits;
}

/// Aligned columns: the first to the left, the others to the right.
[[nodiscard]] inline std::string aligned(const std::vector<std::vector<std::string>>& rows)
{
    std::vector<std::size_t> widths(rows.front().size());
    for (const auto& row : rows)
        for (std::size_t i = 0; i < row.size(); ++i) widths[i] = std::max(widths[i], row[i].size());
    std::string out;
    for (const auto& row : rows) {
        for (std::size_t i = 0; i < row.size(); ++i) {
            const std::string blanks(widths[i] - row[i].size(), ' ');
            if (i != 0) out += "  ";
            out += i == 0 ? row[i] + blanks : blanks + row[i];
        }
        out.erase(out.find_last_not_of(' ') + 1);
        out += '\n';
    }
    return out;
}

}  // namespace kvarn_cli
