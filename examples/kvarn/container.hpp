// SPDX-License-Identifier: Apache-2.0
#pragma once
// The container file of `kvarn quantize` (docs/record-format.md): an 80-byte header, the records tile-major, the tail
// tokens exactly as they came, a checksum over all of it. Little-endian. The reader trusts no field.

#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

#include <kvarn/layout/format.hpp>
#include <kvarn/layout/record.hpp>

#include "../common/failure.hpp"
#include "../common/files.hpp"
#include "../common/npy.hpp"

namespace kvarn_cli {

inline constexpr std::string_view container_magic{"\x89KVARN\r\n", 8};
inline constexpr std::uint32_t container_version = 1;
inline constexpr std::size_t container_header_bytes = 80;
inline constexpr std::size_t container_checksum_bytes = 8;

/// FNV-1a, 64 bits. Every step is a bijection of the state, so a change within one byte never goes unseen.
class fnv1a {
public:
    void update(bytes content) noexcept
    {
        for (const std::byte b : content) state_ = (state_ ^ static_cast<std::uint64_t>(b)) * 0x100000001b3u;
    }
    [[nodiscard]] std::uint64_t value() const noexcept { return state_; }

private:
    std::uint64_t state_ = 0xcbf29ce484222325u;
};

/// A quantized K and V: what the header says, and the parts.
struct container {
    kvarn::format format;
    kvarn::record_stride stride = kvarn::record_stride::packed;
    std::uint8_t encoder = 0;
    std::uint32_t iterations = 0;
    element_type type = element_type::float16;  ///< of the input, hence of the tail
    std::size_t heads = 0;
    std::size_t tokens = 0;
    std::vector<std::byte> records;  ///< [tile][head]
    std::vector<std::byte> k_tail;   ///< [head][tail token][key_channels]
    std::vector<std::byte> v_tail;   ///< [head][tail token][head_dim_v]

    [[nodiscard]] std::size_t group() const noexcept { return static_cast<std::size_t>(format.group()); }
    [[nodiscard]] std::size_t tiles() const noexcept { return tokens / group(); }
    [[nodiscard]] std::size_t tail_tokens() const noexcept { return tokens % group(); }
    [[nodiscard]] std::size_t record_bytes() const noexcept { return kvarn::record_bytes(format, stride); }
};

/// Sizes of the three parts; false when they do not fit a size_t.
struct container_sizes {
    std::size_t records = 0, k_tail = 0, v_tail = 0, file = 0;
};

[[nodiscard]] inline bool sizes_of(const container& c, container_sizes& sizes) noexcept
{
    std::size_t rows = 0;
    const bool fits = multiply(c.tiles(), c.heads, sizes.records) && multiply(sizes.records, c.record_bytes(), sizes.records) &&
                      multiply(c.tail_tokens(), c.heads, rows) &&
                      multiply(rows, static_cast<std::size_t>(c.format.key_channels()) * element_bytes(c.type), sizes.k_tail) &&
                      multiply(rows, static_cast<std::size_t>(c.format.head_dim_v()) * element_bytes(c.type), sizes.v_tail);
    return fits && add(container_header_bytes + container_checksum_bytes, sizes.records, sizes.file) &&
           add(sizes.file, sizes.k_tail, sizes.file) && add(sizes.file, sizes.v_tail, sizes.file);
}

namespace container_detail {

template <class Integer>
void put(std::array<std::byte, container_header_bytes>& header, std::size_t offset, Integer value) noexcept
{
    std::memcpy(header.data() + offset, &value, sizeof value);
}

/// 0: neither K nor V is rotated, 1: both, 2: K, 3: V.
[[nodiscard]] inline std::uint8_t rotation_code(const kvarn::format_spec& spec) noexcept
{
    const bool k = spec.key_rotation == kvarn::rotation::hadamard, v = spec.value_rotation == kvarn::rotation::hadamard;
    return static_cast<std::uint8_t>(k ? (v ? 1 : 2) : v ? 3 : 0);
}

template <class Integer>
[[nodiscard]] Integer get(bytes file, std::size_t offset) noexcept
{
    Integer value;
    std::memcpy(&value, file.data() + offset, sizeof value);
    return value;
}

}  // namespace container_detail

[[nodiscard]] inline std::array<std::byte, container_header_bytes> container_header(const container& c)
{
    using container_detail::put;
    std::array<std::byte, container_header_bytes> header{};
    const kvarn::format_spec& spec = c.format.spec();
    std::memcpy(header.data(), container_magic.data(), container_magic.size());
    put(header, 8, container_version);
    put(header, 12, static_cast<std::uint32_t>(container_header_bytes));
    put(header, 16, static_cast<std::uint32_t>(spec.head_dim_k));
    put(header, 20, static_cast<std::uint32_t>(spec.head_dim_v));
    put(header, 24, static_cast<std::uint8_t>(spec.key_bits));
    put(header, 25, static_cast<std::uint8_t>(spec.value_bits));
    put(header, 26, static_cast<std::uint16_t>(spec.group));
    put(header, 28, container_detail::rotation_code(spec));
    put(header, 29, static_cast<std::uint8_t>(c.stride == kvarn::record_stride::reference ? 1 : 0));
    put(header, 30, static_cast<std::uint8_t>(c.type));
    put(header, 31, c.encoder);
    put(header, 32, static_cast<std::uint32_t>(spec.exact_channels));
    put(header, 36, static_cast<std::uint32_t>(c.heads));
    put(header, 40, static_cast<std::uint64_t>(c.tokens));
    put(header, 48, static_cast<std::uint64_t>(c.tiles()));
    put(header, 56, static_cast<std::uint64_t>(c.record_bytes()));
    put(header, 64, c.iterations);
    return header;  // 68 .. 79 stay zero
}

/// Writes to an output_file, or to anything else with its write and finish.
template <class Output>
void write_container(Output& out, const container& c)
{
    const auto header = container_header(c);
    fnv1a checksum;
    for (const bytes part : {bytes(header), bytes(c.records), bytes(c.k_tail), bytes(c.v_tail)}) {
        checksum.update(part);
        out.write(part);
    }
    const std::uint64_t value = checksum.value();
    out.write(std::as_bytes(std::span(&value, 1)));
    out.finish();
}

[[nodiscard]] inline bool is_container(bytes file) noexcept
{
    return file.size() >= container_magic.size() && std::memcmp(file.data(), container_magic.data(), container_magic.size()) == 0;
}

/// Parses a whole container; any byte too few, too many or altered is a failure. `path` is for messages.
[[nodiscard]] inline container parse_container(bytes file, const std::string& path)
{
    using container_detail::get;
    if (!is_container(file)) {
        const bool begins_alike = !file.empty() && file.size() < container_magic.size() &&
                                  std::memcmp(file.data(), container_magic.data(), file.size()) == 0;
        throw failure(path + (file.empty()   ? ": the file is empty"
                              : begins_alike ? ": the file is truncated"
                                             : ": not a kvarn container (for bare records use --raw)"));
    }
    if (file.size() < container_header_bytes + container_checksum_bytes) throw failure(path + ": the file is truncated");
    if (const auto version = get<std::uint32_t>(file, 8); version != container_version)
        throw failure(path + ": container version " + std::to_string(version) + " is unknown, this program reads version " +
                      std::to_string(container_version));
    const auto damaged = [&path](const char* what) { return failure(path + ": the file is damaged: " + what); };

    if (get<std::uint32_t>(file, 12) != container_header_bytes) throw damaged("its header has the wrong size");
    const auto head_dim_k = get<std::uint32_t>(file, 16), head_dim_v = get<std::uint32_t>(file, 20);
    const auto rotation = get<std::uint8_t>(file, 28), stride = get<std::uint8_t>(file, 29), type = get<std::uint8_t>(file, 30);
    const auto exact_channels = get<std::uint32_t>(file, 32);
    constexpr std::uint32_t most = 1u << 20;  // keeps the casts below exact; make_format has the real limits
    if (head_dim_k > most || head_dim_v > most || exact_channels > most || rotation > 3)
        throw damaged("its format is impossible");
    kvarn::format_spec spec;
    spec.head_dim_k = static_cast<int>(head_dim_k);
    spec.head_dim_v = static_cast<int>(head_dim_v);
    spec.key_bits = get<std::uint8_t>(file, 24);
    spec.value_bits = get<std::uint8_t>(file, 25);
    spec.group = get<std::uint16_t>(file, 26);
    if (rotation == 0 || rotation == 3) spec.key_rotation = kvarn::rotation::none;
    if (rotation == 0 || rotation == 2) spec.value_rotation = kvarn::rotation::none;
    spec.exact_channels = static_cast<int>(exact_channels);
    const auto format = kvarn::make_format(spec);
    if (!format) throw damaged("its format is impossible");
    if (stride > 1 || (type != 1 && type != 2)) throw damaged("its stride or element type is unknown");

    container c;
    c.format = *format;
    c.stride = stride == 1 ? kvarn::record_stride::reference : kvarn::record_stride::packed;
    c.type = static_cast<element_type>(type);
    c.encoder = get<std::uint8_t>(file, 31);
    c.heads = get<std::uint32_t>(file, 36);
    c.tokens = get<std::uint64_t>(file, 40);
    c.iterations = get<std::uint32_t>(file, 64);
    container_sizes sizes;
    if (c.heads == 0 || c.tokens == 0 || get<std::uint64_t>(file, 48) != c.tiles() ||
        get<std::uint64_t>(file, 56) != c.record_bytes() || !sizes_of(c, sizes))
        throw damaged("its counts are impossible");
    // What is left: bytes that are zero, and head_dim_v where there are no values.
    if (const auto header = container_header(c); std::memcmp(header.data(), file.data(), header.size()) != 0)
        throw damaged("its header is not what a writer would write");
    if (file.size() < sizes.file)
        throw failure(path + ": the file is truncated: " + std::to_string(file.size()) + " of " + std::to_string(sizes.file) +
                      " bytes");
    if (file.size() > sizes.file) throw damaged("it has more bytes than its header says");

    fnv1a checksum;
    checksum.update(file.first(sizes.file - container_checksum_bytes));
    if (checksum.value() != get<std::uint64_t>(file, sizes.file - container_checksum_bytes))
        throw damaged("its checksum does not match");
    const auto cut = [&file](std::size_t offset, std::size_t size) {
        const bytes part = file.subspan(offset, size);
        return std::vector<std::byte>(part.begin(), part.end());
    };
    c.records = cut(container_header_bytes, sizes.records);
    c.k_tail = cut(container_header_bytes + sizes.records, sizes.k_tail);
    c.v_tail = cut(container_header_bytes + sizes.records + sizes.k_tail, sizes.v_tail);
    return c;
}

}  // namespace kvarn_cli
