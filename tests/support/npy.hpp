// SPDX-License-Identifier: Apache-2.0
#pragma once
// Reads .npy files (version 1, C order) of uint8 or float16, for the golden tests. Throws std::runtime_error.

#include <cstddef>
#include <cstdint>
#include <fstream>
#include <iterator>
#include <stdexcept>
#include <string>
#include <vector>

namespace support {

struct npy_array {
    std::string type;  ///< "|u1" or "<f2"
    std::vector<std::size_t> shape;
    std::vector<std::uint8_t> bytes;

    [[nodiscard]] std::vector<std::uint16_t> half_bits() const
    {
        if (type != "<f2") throw std::runtime_error("npy: not float16");
        std::vector<std::uint16_t> halves(bytes.size() / 2);
        for (std::size_t i = 0; i < halves.size(); ++i)
            halves[i] = static_cast<std::uint16_t>(bytes[2 * i] | bytes[2 * i + 1] << 8);
        return halves;
    }
};

inline std::string read_file(const std::string& path)
{
    std::ifstream file(path, std::ios::binary);
    if (!file) throw std::runtime_error("cannot open " + path);
    return {std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
}

inline npy_array read_npy(const std::string& path)
{
    const std::string text = read_file(path);
    if (text.size() < 10 || text.compare(0, 6, "\x93NUMPY") != 0 || text[6] != 1) throw std::runtime_error("not npy v1: " + path);
    const std::size_t header_bytes =
        static_cast<unsigned char>(text[8]) | static_cast<std::size_t>(static_cast<unsigned char>(text[9])) << 8;
    if (text.size() < 10 + header_bytes) throw std::runtime_error("truncated: " + path);
    const std::string header = text.substr(10, header_bytes);
    if (header.find("'fortran_order': False") == std::string::npos) throw std::runtime_error("not C order: " + path);

    npy_array array;
    const std::size_t type = header.find("'descr': '");
    if (type == std::string::npos) throw std::runtime_error("no type: " + path);
    array.type = header.substr(type + 10, 3);
    std::size_t at = header.find("'shape': (");
    if (at == std::string::npos) throw std::runtime_error("no shape: " + path);
    std::size_t elements = 1;
    for (at += 10; at < header.size() && header[at] != ')';) {
        if (header[at] < '0' || header[at] > '9') {
            ++at;
            continue;
        }
        std::size_t length = 0;
        for (; header[at] >= '0' && header[at] <= '9'; ++at) length = 10 * length + static_cast<std::size_t>(header[at] - '0');
        array.shape.push_back(length);
        elements *= length;
    }
    const std::size_t element_bytes = array.type == "|u1" ? 1 : array.type == "<f2" ? 2 : 0;
    if (!element_bytes) throw std::runtime_error("unexpected type " + array.type + ": " + path);
    if (text.size() != 10 + header_bytes + elements * element_bytes) throw std::runtime_error("wrong size: " + path);
    array.bytes.assign(text.begin() + static_cast<std::ptrdiff_t>(10 + header_bytes), text.end());
    return array;
}

}  // namespace support
