// SPDX-License-Identifier: Apache-2.0
#pragma once
// What output_file of the examples is for a file, in memory.

#include <cstddef>
#include <span>
#include <string_view>
#include <vector>

namespace support {

struct bytes_output {
    std::vector<std::byte> content;

    void write(std::span<const std::byte> part) { content.insert(content.end(), part.begin(), part.end()); }
    void write(std::string_view text) { write(std::as_bytes(std::span(text.data(), text.size()))); }
    void finish() {}
};

}  // namespace support
