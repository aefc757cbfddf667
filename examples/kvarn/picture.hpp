// SPDX-License-Identifier: Apache-2.0
#pragma once
// A grid of values as an indexed PNG in a data: URI, for heat maps inside SVG. Stored (uncompressed) deflate blocks, so
// that no compression library is needed: one byte per cell.

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace kvarn_cli {

using palette = std::array<std::array<std::uint8_t, 3>, 256>;

/// Straight lines between evenly spaced colours.
[[nodiscard]] inline palette palette_through(const std::vector<std::array<int, 3>>& colours)
{
    palette out{};
    for (std::size_t i = 0; i < 256; ++i) {
        const double at = static_cast<double>(i) / 255 * static_cast<double>(colours.size() - 1);
        const auto left = std::min(static_cast<std::size_t>(at), colours.size() - 2);
        const double share = at - static_cast<double>(left);
        for (std::size_t c = 0; c < 3; ++c)
            out[i][c] = static_cast<std::uint8_t>(std::lround((1 - share) * colours[left][c] + share * colours[left + 1][c]));
    }
    return out;
}

/// Blue below zero, near-white at zero, red above.
[[nodiscard]] inline const palette& diverging_palette()
{
    static const palette colours = palette_through(
        {{16, 62, 130}, {67, 136, 196}, {163, 205, 227}, {246, 246, 244}, {245, 178, 145}, {210, 88, 72}, {128, 14, 38}});
    return colours;
}

/// Light to dark.
[[nodiscard]] inline const palette& sequential_palette()
{
    static const palette colours =
        palette_through({{241, 246, 250}, {178, 205, 229}, {92, 150, 202}, {30, 90, 160}, {10, 40, 92}});
    return colours;
}

[[nodiscard]] inline std::string css_colour(const std::array<std::uint8_t, 3>& c)
{
    return "rgb(" + std::to_string(c[0]) + "," + std::to_string(c[1]) + "," + std::to_string(c[2]) + ")";
}

namespace picture_detail {

[[nodiscard]] inline std::uint32_t crc32(const std::string& data)
{
    std::uint32_t crc = 0xffffffffu;
    for (const char c : data) {
        crc ^= static_cast<std::uint8_t>(c);
        for (int bit = 0; bit < 8; ++bit) crc = (crc >> 1) ^ ((crc & 1u) ? 0xedb88320u : 0u);
    }
    return ~crc;
}

inline void put_big_endian(std::string& out, std::uint32_t value)
{
    for (int shift = 24; shift >= 0; shift -= 8) out += static_cast<char>(value >> shift & 0xffu);
}

inline void put_chunk(std::string& out, const char* type, const std::string& content)
{
    put_big_endian(out, static_cast<std::uint32_t>(content.size()));
    out += type + content;
    put_big_endian(out, crc32(type + content));
}

[[nodiscard]] inline std::string base64(const std::string& data)
{
    static constexpr char digits[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    std::string out;
    for (std::size_t i = 0; i < data.size(); i += 3) {
        std::uint32_t three = 0;
        for (std::size_t j = 0; j < 3; ++j)
            three = three << 8 | (i + j < data.size() ? static_cast<std::uint8_t>(data[i + j]) : 0u);
        for (std::size_t j = 0; j < 4; ++j) out += i + j <= data.size() ? digits[three >> (18 - 6 * j) & 63u] : '=';
    }
    return out;
}

}  // namespace picture_detail

/// `cells` holds width * height palette indices, line by line.
[[nodiscard]] inline std::string png_uri(std::size_t width, std::size_t height, const std::vector<std::uint8_t>& cells,
                                         const palette& colours)
{
    using namespace picture_detail;
    std::string lines;
    for (std::size_t y = 0; y < height; ++y) {
        lines += '\0';  // no filter
        lines.append(reinterpret_cast<const char*>(cells.data()) + y * width, width);
    }
    std::string deflated{'\x78', '\x01'};
    std::uint32_t low = 1, high = 0;  // Adler-32
    for (const char c : lines) {
        low = (low + static_cast<std::uint8_t>(c)) % 65521;
        high = (high + low) % 65521;
    }
    for (std::size_t at = 0; at < lines.size(); at += 65535) {
        const std::size_t size = std::min<std::size_t>(65535, lines.size() - at);
        const std::size_t inverted = ~size;
        deflated += at + size == lines.size() ? '\x01' : '\x00';
        for (const std::size_t field : {size, inverted}) {
            deflated += static_cast<char>(field & 0xff);
            deflated += static_cast<char>(field >> 8 & 0xff);
        }
        deflated += lines.substr(at, size);
    }
    put_big_endian(deflated, high << 16 | low);

    std::string header, colour_table, png{"\x89PNG\r\n\x1a\n", 8};
    put_big_endian(header, static_cast<std::uint32_t>(width));
    put_big_endian(header, static_cast<std::uint32_t>(height));
    header += {'\x08', '\x03', '\x00', '\x00', '\x00'};  // 8 bits, indexed
    for (const auto& colour : colours)
        for (const std::uint8_t part : colour) colour_table += static_cast<char>(part);
    put_chunk(png, "IHDR", header);
    put_chunk(png, "PLTE", colour_table);
    put_chunk(png, "IDAT", deflated);
    put_chunk(png, "IEND", "");
    return "data:image/png;base64," + base64(png);
}

}  // namespace kvarn_cli
