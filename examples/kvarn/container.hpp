// SPDX-License-Identifier: Apache-2.0
#pragma once
// The container file of `kvarn quantize` (docs/record-format.md): a file of chunks (kvarn/cache/file.hpp) that says first what it holds, then
// for each KV head its records, in the order in which attention reads them, and its exact tail tokens. So a reader of some heads skips the
// others, and all records of a chunk have one size, even where every head has a format of its own. The reader trusts no field.

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <exception>
#include <string>
#include <vector>

#include <kvarn/cache/file.hpp>
#include <kvarn/layout/format.hpp>
#include <kvarn/layout/record.hpp>

#include "../common/failure.hpp"
#include "../common/files.hpp"
#include "../common/npy.hpp"

namespace kvarn_cli {

inline constexpr std::uint32_t info_chunk = kvarn::chunk_type("info"), records_chunk = kvarn::chunk_type("recs"),
                               k_tail_chunk = kvarn::chunk_type("ktok"), v_tail_chunk = kvarn::chunk_type("vtok");
inline constexpr std::size_t info_bytes = 24, info_format_bytes = 24;

/// A quantized K and V: what the file says of them, and the parts.
struct container {
    std::vector<kvarn::format> formats{1};  ///< one for all heads, or one for each: of the same sizes, other bits and bases
    kvarn::record_stride stride = kvarn::record_stride::packed;
    std::uint8_t encoder = 0;
    std::uint32_t iterations = 0;
    element_type type = element_type::float16;  ///< of the input, hence of the tail
    std::size_t heads = 0;
    std::size_t tokens = 0;
    std::vector<std::byte> records;  ///< [head][tile]
    std::vector<std::byte> k_tail;   ///< [head][tail token][key_channels]
    std::vector<std::byte> v_tail;   ///< [head][tail token][head_dim_v]

    /// What all heads have in common: everything but bits and bases.
    [[nodiscard]] const kvarn::format& shape() const noexcept { return formats.front(); }
    [[nodiscard]] const kvarn::format& format_of(std::size_t head) const noexcept { return formats.size() == 1 ? formats.front() : formats[head]; }
    [[nodiscard]] std::vector<kvarn::format> formats_of_heads() const
    {
        return formats.size() == 1 ? std::vector<kvarn::format>(heads, formats.front()) : formats;
    }

    [[nodiscard]] std::size_t group() const noexcept { return static_cast<std::size_t>(shape().group()); }
    [[nodiscard]] std::size_t tiles() const noexcept { return tokens / group(); }
    [[nodiscard]] std::size_t tail_tokens() const noexcept { return tokens % group(); }
    [[nodiscard]] std::size_t record_bytes(std::size_t head) const noexcept { return kvarn::record_bytes(format_of(head), stride); }
    /// Of one head.
    [[nodiscard]] std::size_t k_tail_bytes() const noexcept { return tail_bytes(shape().key_channels()); }
    [[nodiscard]] std::size_t v_tail_bytes() const noexcept { return tail_bytes(shape().head_dim_v()); }
    [[nodiscard]] std::size_t tail_bytes(int channels) const noexcept
    {
        return tail_tokens() * static_cast<std::size_t>(channels) * element_bytes(type);
    }
};

/// Sizes of the three parts and of the file; false when they do not fit a size_t.
struct container_sizes {
    std::size_t records = 0, k_tail = 0, v_tail = 0, file = 0;
};

[[nodiscard]] inline bool sizes_of(const container& c, container_sizes& sizes) noexcept
{
    std::size_t per_tile = 0, chunks = 0;
    for (const kvarn::format& f : c.formats)
        if (!add(per_tile, kvarn::record_bytes(f, c.stride), per_tile)) return false;
    if (c.formats.size() == 1 && !multiply(per_tile, c.heads, per_tile)) return false;
    const std::size_t of_a_head = (c.tiles() != 0 ? 1u : 0u) + (c.k_tail_bytes() != 0 ? 1u : 0u) + (c.v_tail_bytes() != 0 ? 1u : 0u);
    return multiply(per_tile, c.tiles(), sizes.records) && multiply(c.k_tail_bytes(), c.heads, sizes.k_tail) && multiply(c.v_tail_bytes(), c.heads, sizes.v_tail) &&
           multiply(c.heads, of_a_head * kvarn::chunk_overhead_bytes, chunks) &&
           add(kvarn::file_header_bytes + kvarn::file_end_bytes + kvarn::chunk_overhead_bytes + info_bytes, chunks, sizes.file) &&
           add(sizes.file, c.formats.size() * info_format_bytes, sizes.file) && add(sizes.file, sizes.records, sizes.file) &&
           add(sizes.file, sizes.k_tail, sizes.file) && add(sizes.file, sizes.v_tail, sizes.file);
}

/// May the heads of one container have these formats?
[[nodiscard]] inline bool same_shape(const kvarn::format& a, const kvarn::format& b) noexcept
{
    return a.head_dim_k() == b.head_dim_k() && a.head_dim_v() == b.head_dim_v() && a.group() == b.group() &&
           a.exact_channels() == b.exact_channels() && a.has_values() == b.has_values();
}

/// Formats of the heads as a container keeps them: one, if they are all the same.
[[nodiscard]] inline std::vector<kvarn::format> as_few(std::vector<kvarn::format> of_heads)
{
    if (std::all_of(of_heads.begin(), of_heads.end(), [&](const kvarn::format& f) { return f == of_heads.front(); })) of_heads.resize(1);
    return of_heads;
}

/// The payload of the first chunk.
[[nodiscard]] inline std::vector<std::byte> info_of(const container& c)
{
    std::vector<std::byte> info(info_bytes + c.formats.size() * info_format_bytes);
    std::byte* at = info.data();
    kvarn::put_u32(at, static_cast<std::uint32_t>(c.heads));
    kvarn::put_u32(at + 4, static_cast<std::uint32_t>(c.formats.size()));
    kvarn::put_u64(at + 8, c.tokens);
    kvarn::put_u8(at + 16, static_cast<std::uint8_t>(c.type));
    kvarn::put_u8(at + 17, c.stride == kvarn::record_stride::reference ? 1 : 0);
    kvarn::put_u8(at + 18, c.encoder);
    kvarn::put_u32(at + 20, c.iterations);
    at += info_bytes;
    for (const kvarn::format& f : c.formats) {
        kvarn::put_u32(at, static_cast<std::uint32_t>(f.head_dim_k()));
        kvarn::put_u32(at + 4, static_cast<std::uint32_t>(f.head_dim_v()));
        kvarn::put_u8(at + 8, static_cast<std::uint8_t>(f.key_bits()));
        kvarn::put_u8(at + 9, static_cast<std::uint8_t>(f.value_bits()));
        kvarn::put_u16(at + 10, static_cast<std::uint16_t>(f.group()));
        const kvarn::format_spec& spec = f.spec();
        kvarn::put_u8(at + 12, static_cast<std::uint8_t>((spec.key_rotation == kvarn::rotation::hadamard ? 1 : 0) |
                                                         (spec.value_rotation == kvarn::rotation::hadamard ? 2 : 0)));
        kvarn::put_u32(at + 16, static_cast<std::uint32_t>(f.exact_channels()));
        kvarn::put_u32(at + 20, static_cast<std::uint32_t>(kvarn::record_bytes(f, c.stride)));
        at += info_format_bytes;
    }
    return info;
}

/// Writes to an output_file, or to anything else with its write and finish.
template <class Output>
void write_container(Output& out, const container& c)
{
    std::exception_ptr problem;
    kvarn::file_writer file([&](bytes piece) noexcept {
        try {
            out.write(piece);
            return true;
        } catch (...) {
            problem = std::current_exception();
            return false;
        }
    });
    const auto must = [&](kvarn::status s) {
        if (problem) std::rethrow_exception(problem);
        check(s, "container");
    };
    must(file.begin(kvarn::file_kind::records));
    must(file.chunk(info_chunk, 0, info_of(c)));
    std::size_t at = 0;
    for (std::size_t head = 0; head < c.heads; ++head) {
        const auto part = [&](std::uint32_t type, const std::vector<std::byte>& all, std::size_t begin, std::size_t size) {
            if (size != 0) must(file.chunk(type, head, bytes(all).subspan(begin, size)));
        };
        const std::size_t size = c.tiles() * c.record_bytes(head);
        part(records_chunk, c.records, at, size);
        part(k_tail_chunk, c.k_tail, head * c.k_tail_bytes(), c.k_tail_bytes());
        part(v_tail_chunk, c.v_tail, head * c.v_tail_bytes(), c.v_tail_bytes());
        at += size;
    }
    must(file.finish());
    out.finish();
}

[[nodiscard]] inline bool is_container(bytes file) noexcept
{
    constexpr std::size_t length = sizeof kvarn::detail::file_magic;
    return file.size() >= length && std::memcmp(file.data(), kvarn::detail::file_magic, length) == 0;
}

namespace container_detail {

/// What the first chunk says, without the parts; the reason if a writer would not have written it.
[[nodiscard]] inline const char* parse_info(bytes info, container& c)
{
    if (info.size() < info_bytes + info_format_bytes) return "its first chunk is too short";
    const std::size_t heads = kvarn::get_u32(info.data()), formats = kvarn::get_u32(info.data() + 4);
    if (heads == 0 || (formats != 1 && formats != heads) || (info.size() - info_bytes) / info_format_bytes != formats ||
        info.size() % info_format_bytes != info_bytes % info_format_bytes)
        return "its counts are impossible";
    const std::uint64_t tokens = kvarn::get_u64(info.data() + 8);
    const std::uint8_t type = kvarn::get_u8(info.data() + 16), stride = kvarn::get_u8(info.data() + 17);
    if (tokens == 0 || tokens > SIZE_MAX) return "its counts are impossible";
    if (stride > 1 || (type != 1 && type != 2)) return "its stride or element type is unknown";
    c.stride = stride == 1 ? kvarn::record_stride::reference : kvarn::record_stride::packed;
    c.type = static_cast<element_type>(type);
    c.encoder = kvarn::get_u8(info.data() + 18);
    c.iterations = kvarn::get_u32(info.data() + 20);
    c.heads = heads;
    c.tokens = static_cast<std::size_t>(tokens);
    c.formats.clear();
    for (std::size_t i = 0; i < formats; ++i) {
        const std::byte* at = info.data() + info_bytes + i * info_format_bytes;
        const std::uint32_t head_dim_k = kvarn::get_u32(at), head_dim_v = kvarn::get_u32(at + 4), exact_channels = kvarn::get_u32(at + 16);
        const std::uint8_t rotation = kvarn::get_u8(at + 12);
        constexpr std::uint32_t most = 1u << 20;  // keeps the casts below exact; make_format has the real limits
        if (head_dim_k > most || head_dim_v > most || exact_channels > most || rotation > 3) return "its format is impossible";
        kvarn::format_spec spec;
        spec.head_dim_k = static_cast<int>(head_dim_k);
        spec.head_dim_v = static_cast<int>(head_dim_v);
        spec.key_bits = kvarn::get_u8(at + 8);
        spec.value_bits = kvarn::get_u8(at + 9);
        spec.group = kvarn::get_u16(at + 10);
        spec.key_rotation = (rotation & 1) != 0 ? kvarn::rotation::hadamard : kvarn::rotation::none;
        spec.value_rotation = (rotation & 2) != 0 ? kvarn::rotation::hadamard : kvarn::rotation::none;
        spec.exact_channels = static_cast<int>(exact_channels);
        const auto format = kvarn::make_format(spec);
        if (!format || (i != 0 && !same_shape(*format, c.formats.front()))) return "its format is impossible";
        c.formats.push_back(*format);
    }
    // What is left: bytes that are zero, sizes that follow, head_dim_v where there are no values, one format for all where it would do.
    const auto same = info_of(c);
    if (as_few(c.formats).size() != formats || same.size() != info.size() || std::memcmp(same.data(), info.data(), info.size()) != 0)
        return "its first chunk is not what a writer would write";
    return nullptr;
}

}  // namespace container_detail

/// Parses a whole container; any byte too few, too many or altered is a failure. `path` is for messages.
[[nodiscard]] inline container parse_container(bytes file, const std::string& path)
{
    if (!is_container(file)) {
        const bool begins_alike = !file.empty() && file.size() < sizeof kvarn::detail::file_magic &&
                                  std::memcmp(file.data(), kvarn::detail::file_magic, file.size()) == 0;
        throw failure(path + (file.empty()   ? ": the file is empty"
                              : begins_alike ? ": the file is truncated"
                                             : ": not a kvarn container (for bare records use --raw)"));
    }
    const std::uint32_t version = file.size() < 12 ? kvarn::file_version : kvarn::get_u32(file.data() + 8);
    if (version == 1)
        throw failure(path + ": container version 1 is older than this program, which reads version " + std::to_string(kvarn::file_version) +
                      ": quantize K and V again");
    const auto damaged = [&path](const char* what) { return failure(path + ": the file is damaged: " + what); };
    const auto must = [&](kvarn::status s, const char* what) {
        if (s == kvarn::status::truncated) throw failure(path + ": the file is truncated");
        if (s == kvarn::status::unsupported_version)
            throw failure(path + ": container version " + std::to_string(version) + " is unknown, this program reads version " +
                          std::to_string(kvarn::file_version));
        if (s != kvarn::status::ok) throw damaged(what);
    };

    kvarn::buffer_reader reader{kvarn::buffer_source(file)};
    const auto kind = reader.begin();
    must(kind.error, "its header");
    if (*kind != kvarn::file_kind::records) throw failure(path + ": holds a saved sequence, not the records of `kvarn quantize`");
    const auto chunk = [&](std::uint32_t type, std::uint64_t number) {
        const auto head = reader.next();
        must(head.error, "the head of a chunk");
        if (head->type != type || head->number != number) throw damaged("its chunks are not in order");
        const auto payload = reader.payload();
        must(payload.error, "a checksum does not match");
        return *payload;
    };
    container c;
    if (const char* wrong = container_detail::parse_info(chunk(info_chunk, 0), c)) throw damaged(wrong);
    container_sizes sizes;
    if (!sizes_of(c, sizes)) throw damaged("its counts are impossible");
    if (file.size() < sizes.file)
        throw failure(path + ": the file is truncated: " + std::to_string(file.size()) + " of " + std::to_string(sizes.file) + " bytes");
    c.records.reserve(sizes.records);
    c.k_tail.reserve(sizes.k_tail);
    c.v_tail.reserve(sizes.v_tail);
    for (std::size_t head = 0; head < c.heads; ++head) {
        const auto part = [&](std::uint32_t type, std::vector<std::byte>& all, std::size_t size) {
            if (size == 0) return;
            const bytes payload = chunk(type, head);
            if (payload.size() != size) throw damaged("a chunk has the wrong size");
            all.insert(all.end(), payload.begin(), payload.end());
        };
        part(records_chunk, c.records, c.tiles() * c.record_bytes(head));
        part(k_tail_chunk, c.k_tail, c.k_tail_bytes());
        part(v_tail_chunk, c.v_tail, c.v_tail_bytes());
    }
    const auto end = reader.next();
    must(end.error, "the checksum of the whole does not match");
    if (!end->is_end()) throw damaged("it has more chunks than it says");
    if (reader.at_end() != kvarn::status::ok) throw damaged("it has more bytes than it says");
    return c;
}

}  // namespace kvarn_cli
