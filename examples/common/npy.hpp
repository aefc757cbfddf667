// SPDX-License-Identifier: Apache-2.0
#pragma once
// Arrays in NumPy's .npy format, versions 1.0 to 3.0: little-endian float16 and float32, and tables of int32 and int64, in C order.
// The reader trusts no field: sizes are computed without overflow and must equal the file's size exactly.

#include <algorithm>
#include <cctype>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <string>
#include <string_view>
#include <vector>

#include <kvarn/base/element.hpp>

#include "failure.hpp"
#include "files.hpp"

namespace kvarn_cli {

enum class element_type : std::uint8_t { float16 = 1, float32 = 2 };

[[nodiscard]] constexpr std::size_t element_bytes(element_type t) noexcept
{
    return t == element_type::float16 ? 2 : 4;
}
[[nodiscard]] constexpr const char* name_of(element_type t) noexcept
{
    return t == element_type::float16 ? "float16" : "float32";
}

/// A dense array [head][token][channel] in memory.
struct tensor {
    element_type type = element_type::float32;
    std::size_t heads = 0;
    std::size_t tokens = 0;
    std::size_t channels = 0;
    std::vector<std::byte> data;

    [[nodiscard]] std::size_t elements() const noexcept { return heads * tokens * channels; }
    [[nodiscard]] std::size_t vector_bytes() const noexcept { return channels * element_bytes(type); }

    template <class T>
    [[nodiscard]] const T* as() const noexcept
    {
        return reinterpret_cast<const T*>(data.data());  // operator new aligns for every element type
    }

    [[nodiscard]] float value(std::size_t index) const noexcept
    {
        return type == element_type::float16 ? kvarn::to_float(as<kvarn::half>()[index]) : as<float>()[index];
    }
};

namespace npy_detail {

inline constexpr std::string_view magic{"\x93NUMPY", 6};

/// Reads the Python dict of the header, piece by piece; every piece that is not there is an error.
class header_reader {
public:
    header_reader(std::string_view text, const std::string& path) : text_(text), path_(path) {}

    [[noreturn]] void fail(const std::string& why) const { throw failure(path_ + ": not a usable .npy file: " + why); }

    void skip_blanks() noexcept
    {
        while (!text_.empty() && (text_.front() == ' ' || text_.front() == '\t' || text_.front() == '\n')) text_.remove_prefix(1);
    }

    [[nodiscard]] bool accept(char wanted) noexcept
    {
        skip_blanks();
        if (text_.empty() || text_.front() != wanted) return false;
        text_.remove_prefix(1);
        return true;
    }

    void expect(char wanted)
    {
        if (!accept(wanted)) fail("its header is malformed");
    }

    [[nodiscard]] std::string_view quoted()
    {
        skip_blanks();
        if (text_.empty() || (text_.front() != '\'' && text_.front() != '"')) fail("its header is malformed");
        const std::size_t end = text_.find(text_.front(), 1);
        if (end == std::string_view::npos) fail("its header is malformed");
        const std::string_view inside = text_.substr(1, end - 1);
        text_.remove_prefix(end + 1);
        return inside;
    }

    [[nodiscard]] bool word(std::string_view wanted) noexcept
    {
        skip_blanks();
        if (text_.substr(0, wanted.size()) != wanted) return false;
        text_.remove_prefix(wanted.size());
        return true;
    }

    [[nodiscard]] std::size_t number()
    {
        skip_blanks();
        if (text_.empty() || text_.front() < '0' || text_.front() > '9') fail("its shape is malformed");
        std::size_t value = 0;
        while (!text_.empty() && text_.front() >= '0' && text_.front() <= '9') {
            if (!multiply(value, 10, value) || !add(value, static_cast<std::size_t>(text_.front() - '0'), value))
                fail("its shape is too large");
            text_.remove_prefix(1);
        }
        return value;
    }

    [[nodiscard]] bool at_end() noexcept
    {
        skip_blanks();
        return text_.empty();
    }

private:
    std::string_view text_;
    const std::string& path_;
};

/// What a header says; the data begin at `data_at`.
struct header_fields {
    std::string_view type;
    std::vector<std::size_t> shape;
    std::size_t data_at = 0;
};

/// Reads the header of an array whose type is one of `types`; `refusal` says which are. No extent is zero.
[[nodiscard]] inline header_fields read_header(bytes file, const std::string& path, std::initializer_list<std::string_view> types,
                                               const char* refusal)
{
    const auto byte_at = [&](std::size_t i) { return static_cast<std::size_t>(file[i]); };
    if (file.size() < 10 || std::memcmp(file.data(), magic.data(), magic.size()) != 0) throw failure(path + ": not a .npy file");
    const std::size_t major = byte_at(6), minor = byte_at(7);
    if (major < 1 || major > 3 || minor != 0)
        throw failure(path + ": .npy version " + std::to_string(major) + "." + std::to_string(minor) + " is unknown");
    const std::size_t length_bytes = major == 1 ? 2 : 4, start = 8 + length_bytes;
    if (file.size() < start) throw failure(path + ": .npy file is truncated in its header");
    std::size_t header_bytes = 0;
    for (std::size_t i = 0; i < length_bytes; ++i) header_bytes |= byte_at(8 + i) << (8 * i);
    if (header_bytes > file.size() - start) throw failure(path + ": .npy file is truncated in its header");

    header_reader reader({reinterpret_cast<const char*>(file.data()) + start, header_bytes}, path);
    header_fields header;
    header.data_at = start + header_bytes;
    bool has_type = false, has_order = false, has_shape = false;
    reader.expect('{');
    while (!reader.accept('}')) {
        const std::string_view key = reader.quoted();
        reader.expect(':');
        if (key == "descr" && !has_type) {
            header.type = reader.quoted();
            if (std::find(types.begin(), types.end(), header.type) == types.end()) reader.fail(refusal);
            has_type = true;
        } else if (key == "fortran_order" && !has_order) {
            if (reader.word("True")) reader.fail("it is in Fortran order, C order is needed");
            if (!reader.word("False")) reader.fail("its header is malformed");
            has_order = true;
        } else if (key == "shape" && !has_shape) {
            reader.expect('(');
            while (!reader.accept(')')) {
                if (header.shape.size() == 3) reader.fail("it has more than 3 dimensions");
                header.shape.push_back(reader.number());
                if (!reader.accept(',')) {
                    reader.expect(')');
                    break;
                }
            }
            has_shape = true;
        } else {
            reader.fail("its header is malformed");
        }
        if (!reader.accept(',')) {
            reader.expect('}');
            break;
        }
    }
    if (!has_type || !has_order || !has_shape || !reader.at_end()) reader.fail("its header is malformed");
    return header;
}

/// The data of the array, whose size must be that of the shape exactly.
[[nodiscard]] inline bytes payload_of(bytes file, const std::string& path, const header_fields& header, std::size_t element_size)
{
    std::size_t size = element_size;
    for (const std::size_t extent : header.shape) {
        if (extent == 0) throw failure(path + ": the array is empty");
        if (!multiply(size, extent, size)) throw failure(path + ": not a usable .npy file: its shape is too large");
    }
    const bytes payload = file.subspan(header.data_at);
    if (payload.size() != size)
        throw failure(path + ": .npy file " + (payload.size() < size ? "is truncated" : "is too long") + ": its shape needs " +
                      std::to_string(size) + " data bytes, it has " + std::to_string(payload.size()));
    return payload;
}

[[noreturn]] inline void fail_dimensions(const std::string& path, std::size_t dimensions, const char* needed)
{
    throw failure(path + ": not a usable .npy file: it has " + std::to_string(dimensions) + " dimensions, " + needed +
                  " is needed");
}

}  // namespace npy_detail

/// Parses a whole .npy file: [heads, tokens, head_dim], or [tokens, head_dim] as one head. `path` is for messages.
[[nodiscard]] inline tensor parse_npy(bytes file, const std::string& path)
{
    using namespace npy_detail;
    const header_fields header =
        read_header(file, path, {"<f2", "<f4"}, "only little-endian float16 (<f2) and float32 (<f4) are read");
    const std::vector<std::size_t>& shape = header.shape;
    if (shape.size() < 2) fail_dimensions(path, shape.size(), "[heads, tokens, head_dim]");
    tensor array;
    array.type = header.type == "<f2" ? element_type::float16 : element_type::float32;
    array.heads = shape.size() == 3 ? shape[0] : 1;
    array.tokens = shape[shape.size() - 2];
    array.channels = shape[shape.size() - 1];
    const bytes payload = payload_of(file, path, header, element_bytes(array.type));
    array.data.assign(payload.begin(), payload.end());
    return array;
}

/// A dense table of integers, [row][column].
struct integer_table {
    std::size_t rows = 0, columns = 0;
    std::vector<std::int64_t> values;
};

/// Parses a whole .npy file of int32 or int64, [rows, columns]. `path` is for messages.
[[nodiscard]] inline integer_table parse_npy_integers(bytes file, const std::string& path)
{
    using namespace npy_detail;
    const header_fields header =
        read_header(file, path, {"<i4", "<i8"}, "only little-endian int32 (<i4) and int64 (<i8) are read here");
    if (header.shape.size() != 2) fail_dimensions(path, header.shape.size(), "[sequences, tokens]");
    const std::size_t each = header.type == "<i4" ? 4 : 8;
    const bytes payload = payload_of(file, path, header, each);
    integer_table table{header.shape[0], header.shape[1], std::vector<std::int64_t>(header.shape[0] * header.shape[1])};
    for (std::size_t i = 0; i < table.values.size(); ++i) {
        if (each == 8) {
            std::memcpy(&table.values[i], payload.data() + 8 * i, 8);
        } else {
            std::int32_t value = 0;
            std::memcpy(&value, payload.data() + 4 * i, 4);
            table.values[i] = value;
        }
    }
    return table;
}

[[nodiscard]] inline tensor read_npy(const std::string& path)
{
    return parse_npy(read_file(path), path);
}

/// Fails and names the place if the array holds NaN or infinity.
inline void require_finite(const tensor& array, const std::string& path)
{
    for (std::size_t i = 0; i < array.elements(); ++i) {
        if (std::isfinite(array.value(i))) continue;
        const std::size_t token = i / array.channels;
        throw failure(path + ": holds NaN or infinity (head " + std::to_string(token / array.tokens) + ", token " +
                      std::to_string(token % array.tokens) + ", channel " + std::to_string(i % array.channels) + ")");
    }
}

/// The header of a version 1.0 file of [heads, tokens, channels]; the data follow it, aligned to 64 bytes.
[[nodiscard]] inline std::string npy_header(element_type type, std::size_t heads, std::size_t tokens, std::size_t channels)
{
    std::string dict = std::string("{'descr': '") + (type == element_type::float16 ? "<f2" : "<f4") +
                       "', 'fortran_order': False, 'shape': (" + std::to_string(heads) + ", " + std::to_string(tokens) + ", " +
                       std::to_string(channels) + "), }";
    while ((10 + dict.size() + 1) % 64 != 0) dict += ' ';
    dict += '\n';
    std::string header(npy_detail::magic);
    header += {'\x01', '\x00', static_cast<char>(dict.size() & 0xff), static_cast<char>(dict.size() >> 8)};
    return header + dict;
}

/// Writes float values as `type`; float16 saturates. To an output_file, or to anything else with its write and finish.
template <class Output>
void write_npy(Output& out, element_type type, std::size_t heads, std::size_t tokens, std::size_t channels,
               const std::vector<float>& values)
{
    out.write(npy_header(type, heads, tokens, channels));
    if (type == element_type::float32) {
        out.write(std::as_bytes(std::span(values)));
    } else {
        std::vector<kvarn::half> halves(values.size());
        for (std::size_t i = 0; i < values.size(); ++i) halves[i] = kvarn::saturate_to<kvarn::half>(values[i]);
        out.write(std::as_bytes(std::span(halves)));
    }
    out.finish();
}

}  // namespace kvarn_cli
