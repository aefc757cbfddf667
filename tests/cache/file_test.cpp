// SPDX-License-Identifier: Apache-2.0
// Files of chunks: round trips in pieces, the bytes themselves, and the refusal of every truncation and of every change of a byte.

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>
#include <string>
#include <string_view>
#include <type_traits>
#include <vector>

#include "../catch.hpp"

#include <kvarn/cache/file.hpp>

namespace {

using kvarn::chunk_head;
using kvarn::chunk_type;
using kvarn::file_kind;
using kvarn::status;
using file_bytes = std::vector<std::byte>;

constexpr std::uint32_t test_type = chunk_type("test"), other_type = chunk_type("othr");

struct chunk_of {
    std::uint32_t type = test_type;
    std::uint64_t number = 0;
    file_bytes payload{};

    friend bool operator==(const chunk_of&, const chunk_of&) = default;
};

file_bytes some_bytes(std::size_t count, unsigned seed)
{
    file_bytes out(count);
    for (std::byte& b : out) b = static_cast<std::byte>((seed = seed * 1664525u + 1013904223u) >> 24);
    return out;
}

/// A `Write` that appends to a vector until it holds `room` bytes.
struct vector_sink {
    file_bytes* to;
    std::size_t room = SIZE_MAX;
    bool operator()(std::span<const std::byte> piece) const noexcept
    {
        if (piece.size() > room - to->size()) return false;
        to->insert(to->end(), piece.begin(), piece.end());
        return true;
    }
};

/// A `Read` that gives at most `most` bytes at a time.
struct vector_source {
    std::span<const std::byte> rest;
    std::size_t most = SIZE_MAX;
    std::size_t operator()(std::span<std::byte> to) noexcept
    {
        const std::size_t n = std::min({to.size(), most, rest.size()});
        std::copy_n(rest.begin(), n, to.begin());
        rest = rest.subspan(n);
        return n;
    }
};

/// A function that returns what the documentation does not name.
template <class Returned>
struct returning {
    Returned operator()(std::span<std::byte>) const noexcept { return {}; }
};

static_assert(kvarn::FileSink<vector_sink> && kvarn::FileSink<kvarn::buffer_sink> && kvarn::FileSink<const kvarn::counting_sink>);
static_assert(kvarn::FileSource<vector_source> && kvarn::FileSource<kvarn::buffer_source>);
static_assert(kvarn::FileSource<const returning<std::size_t>> && kvarn::FileSource<returning<kvarn::result<std::size_t>>>);
static_assert(!kvarn::FileSource<returning<bool>> && !kvarn::FileSource<returning<int>> && !kvarn::FileSource<returning<status>>);
static_assert(!kvarn::FileSource<vector_sink> && !kvarn::FileSink<vector_source> && !kvarn::FileSink<returning<bool>>);
// As load and save see them: what changes while it reads must not be const, and may be a reference.
static_assert(!kvarn::FileSource<const kvarn::buffer_source> && kvarn::FileSource<kvarn::buffer_source&>);

file_bytes write(const std::vector<chunk_of>& chunks, std::size_t piece = SIZE_MAX, file_kind kind = file_kind::records)
{
    file_bytes out;
    kvarn::file_writer writer(vector_sink{&out});
    REQUIRE(writer.begin(kind) == status::ok);
    for (const chunk_of& c : chunks) {
        if (piece == SIZE_MAX) {
            REQUIRE(writer.chunk(c.type, c.number, c.payload) == status::ok);
            continue;
        }
        REQUIRE(writer.open_chunk(c.type, c.number, c.payload.size()) == status::ok);
        for (std::size_t at = 0; at < c.payload.size(); at += piece)
            REQUIRE(writer.append(std::span(c.payload).subspan(at, std::min(piece, c.payload.size() - at))) == status::ok);
        REQUIRE(writer.close_chunk() == status::ok);
    }
    REQUIRE(writer.finish() == status::ok);
    CHECK(writer.bytes() == out.size());
    return out;
}

enum class how { read, skip, in_place };

/// Reads a whole file; payloads only where `how` keeps them.
template <class Reader>
status read_all(Reader& reader, std::vector<chunk_of>& chunks, how h, std::size_t piece = SIZE_MAX)
{
    if (const auto kind = reader.begin(); !kind) return kind.error;
    for (;;) {
        const auto head = reader.next();
        if (!head) return head.error;
        if (head->is_end()) return reader.at_end();
        chunks.push_back({head->type, head->number, {}});
        file_bytes& payload = chunks.back().payload;
        if (h == how::skip) {
            if (const status s = reader.skip(); s != status::ok) return s;
            continue;
        }
        if constexpr (std::is_same_v<Reader, kvarn::buffer_reader>)
            if (h == how::in_place) {
                const auto all = reader.payload();
                if (!all) return all.error;
                payload.assign(all->begin(), all->end());
                continue;
            }
        while (reader.left() != 0) {
            const std::size_t step = std::min({static_cast<std::size_t>(reader.left()), piece, std::size_t{1} << 20});
            payload.resize(payload.size() + step);
            if (const status s = reader.read(std::span(payload).last(step)); s != status::ok) return s;
        }
        if (const status s = reader.end_chunk(); s != status::ok) return s;
    }
}

status read_stream(std::span<const std::byte> file, std::vector<chunk_of>& chunks, std::size_t piece = SIZE_MAX, std::size_t most = SIZE_MAX)
{
    kvarn::file_reader reader(vector_source{file, most});
    return read_all(reader, chunks, how::read, piece);
}

/// What every way of reading the file says, which must be the same.
status verdict(std::span<const std::byte> file)
{
    std::vector<chunk_of> ignored;
    const status streamed = read_stream(file, ignored);
    kvarn::file_reader skipping(vector_source{file});
    kvarn::buffer_reader in_place{kvarn::buffer_source(file)};
    if (read_all(skipping, ignored, how::skip) != streamed || read_all(in_place, ignored, how::in_place) != streamed) return status::ok;
    return streamed;
}

file_bytes of_hex(std::string_view hex)
{
    const auto digit = [](char c) { return c <= '9' ? c - '0' : c - 'a' + 10; };
    file_bytes out;
    for (std::size_t i = 0; i < hex.size(); i += 2) out.push_back(static_cast<std::byte>(digit(hex[i]) * 16 + digit(hex[i + 1])));
    return out;
}

/// Puts the right checksum behind the 24 bytes at `at`.
void sign(file_bytes& file, std::size_t at) { kvarn::put_u64(file.data() + at + 24, kvarn::detail::checksum(file.data() + at, 24)); }

const std::vector<chunk_of> small_chunks{{test_type, 7, of_hex("0102030405")}, {chunk_type("none"), 0x0123456789abcdef, {}}};
constexpr std::size_t first_chunk = kvarn::file_header_bytes, second_chunk = first_chunk + kvarn::chunk_overhead_bytes + 5,
                      end_chunk = second_chunk + kvarn::chunk_overhead_bytes;

// The statuses are the only answers, on every path.
using stream_writer = kvarn::file_writer<vector_sink>;
using stream_reader = kvarn::file_reader<vector_source>;
static_assert(noexcept(std::declval<stream_writer&>().chunk(1, 2, {})) && noexcept(std::declval<stream_writer&>().finish()));
static_assert(noexcept(std::declval<stream_reader&>().next()) && noexcept(std::declval<stream_reader&>().skip()));
static_assert(sizeof(kvarn::buffer_reader) <= 704 && sizeof(kvarn::buffer_writer) <= 704);
static_assert(chunk_type("done") == kvarn::end_chunk_type && chunk_type("abcd") == 0x64636261u);

constexpr bool fields_are_little_endian()
{
    std::byte bytes[9]{};
    kvarn::put_u64(bytes + 1, 0x8877665544332211u);
    if (bytes[1] != std::byte{0x11} || bytes[8] != std::byte{0x88} || kvarn::get_u64(bytes + 1) != 0x8877665544332211u) return false;
    kvarn::put_u32(bytes + 1, 0xfedcba98u);
    if (bytes[1] != std::byte{0x98} || bytes[4] != std::byte{0xfe} || kvarn::get_u32(bytes + 1) != 0xfedcba98u) return false;
    kvarn::put_u16(bytes + 3, 0xbeefu);
    kvarn::put_u8(bytes, 0x7f);
    return kvarn::get_u16(bytes + 3) == 0xbeefu && bytes[3] == std::byte{0xef} && kvarn::get_u8(bytes) == 0x7f && bytes[5] == std::byte{0x55};
}
static_assert(fields_are_little_endian());

}  // namespace

TEST_CASE("cache/file: the bytes of a small file", "[unit]")
{
    // Made by another program, with another XXH3.
    const file_bytes golden = of_hex("894b5641524e0d0a02000000010000000000000000000000723851a0d73da429"
                                     "746573740000000007000000000000000500000000000000238ce5458cab3b4e"
                                     "0102030405c18392648783b6596e6f6e6500000000efcdab8967452301000000"
                                     "0000000000615c672b5b8641bfc294d3380580062d646f6e6500000000020000"
                                     "000000000008000000000000008102a0a242c5f20c727c8c44810cca6cd952a6"
                                     "0bd09d1c83");
    CHECK(write(small_chunks) == golden);
    CHECK(golden.size() == end_chunk + kvarn::file_end_bytes);
    std::vector<chunk_of> back;
    CHECK(read_stream(golden, back) == status::ok);
    CHECK(back == small_chunks);
    CHECK(verdict(golden) == status::ok);
}

TEST_CASE("cache/file: round trips, written and read in pieces", "[unit]")
{
    // Around the block sizes of the checksum, and around what is hashed at a time.
    std::vector<chunk_of> chunks;
    for (const std::size_t bytes : {0, 1, 3, 16, 17, 128, 129, 240, 241, 255, 256, 257, 1023, 1024, 1025, 131071, 131072, 131073, 300000})
        chunks.push_back({bytes % 2 != 0 ? test_type : other_type, ~std::uint64_t{0} - bytes, some_bytes(bytes, static_cast<unsigned>(bytes))});
    const file_bytes file = write(chunks);
    for (const std::size_t piece : {1, 2, 7, 63, 64, 65, 255, 257, 4096, 131073}) {
        INFO("pieces of " << piece);
        CHECK((piece < 7 || write(chunks, piece) == file));
        for (const std::size_t most : {std::size_t{1}, std::size_t{5}, std::size_t{4095}, std::size_t{SIZE_MAX}}) {
            std::vector<chunk_of> back;
            CHECK(read_stream(file, back, piece, most) == status::ok);
            CHECK(back == chunks);
        }
    }
    std::vector<chunk_of> back;
    kvarn::buffer_reader reader{kvarn::buffer_source(file)};
    CHECK(read_all(reader, back, how::in_place) == status::ok);
    CHECK(back == chunks);
    CHECK(verdict(file) == status::ok);

    const file_bytes empty = write({}, SIZE_MAX, file_kind::sequence);
    CHECK(empty.size() == kvarn::file_header_bytes + kvarn::file_end_bytes);
    CHECK(verdict(empty) == status::ok);
    kvarn::buffer_reader kinds{kvarn::buffer_source(empty)};
    const auto kind = kinds.begin();
    CHECK((kind.ok() && *kind == file_kind::sequence));
}

TEST_CASE("cache/file: every truncation is truncated, every other byte corrupt", "[unit]")
{
    const file_bytes file = write({{test_type, 7, some_bytes(9, 1)}, {other_type, 0, {}}, {test_type, 8, some_bytes(260, 2)}});
    for (std::size_t bytes = 0; bytes < file.size(); ++bytes) {
        const file_bytes part(file.begin(), file.begin() + static_cast<std::ptrdiff_t>(bytes));
        if (verdict(part) != status::truncated) FAIL("the first " << bytes << " of " << file.size() << " bytes");
    }
    file_bytes changed = file;
    for (std::size_t at = 0; at < file.size(); ++at) {
        for (unsigned value = 0; value < 256; ++value) {
            changed[at] = static_cast<std::byte>(value);
            if (verdict(changed) != (changed[at] == file[at] ? status::ok : status::corrupt)) FAIL("byte " << at << " = " << value);
        }
        changed[at] = file[at];
    }
    for (unsigned value = 0; value < 256; ++value) {
        changed = file;
        changed.push_back(static_cast<std::byte>(value));
        if (verdict(changed) != status::corrupt) FAIL("a byte " << value << " follows");
        // Who reads on behind a file does not ask.
        kvarn::buffer_reader reader{kvarn::buffer_source(changed)};
        REQUIRE(reader.begin(file_kind::records) == status::ok);
        for (int chunk = 0; chunk < 3; ++chunk) {
            REQUIRE(reader.next().ok());
            REQUIRE(reader.skip() == status::ok);
        }
        const auto end = reader.next();
        REQUIRE((end.ok() && end->is_end() && end->number == 3));
    }
}

TEST_CASE("cache/file: lengths that lie, with the right checksum", "[unit]")
{
    const file_bytes file = write(small_chunks);
    for (const std::uint64_t bytes : {std::uint64_t{0}, std::uint64_t{4}, std::uint64_t{6}, std::uint64_t{94}, std::uint64_t{101},
                                      std::uint64_t{1} << 31, std::uint64_t{1} << 32, std::uint64_t{1} << 63, ~std::uint64_t{0}}) {
        INFO("bytes " << bytes);
        file_bytes lying = file;
        kvarn::put_u64(lying.data() + first_chunk + 16, bytes);
        sign(lying, first_chunk);
        // 101 bytes are left behind the head: what goes beyond them is known at once in a buffer, and skipping does not take long.
        CHECK(verdict(lying) == (bytes < 94 ? status::corrupt : status::truncated));
        kvarn::buffer_reader reader{kvarn::buffer_source(lying)};
        REQUIRE(reader.begin().ok());
        const auto head = reader.next();
        CHECK(head.ok() == (bytes <= 101));
        if (head) CHECK(head->bytes == bytes);
    }
    // The last chunk: how many there were, and how many bytes it has.
    for (const std::size_t field : {std::size_t{8}, std::size_t{16}}) {
        file_bytes lying = file;
        lying[end_chunk + field] ^= std::byte{1};
        sign(lying, end_chunk);
        CHECK(verdict(lying) == status::corrupt);
    }
    // A field that must be zero is seen at once, another type by the last checksum.
    for (const std::size_t field : {std::size_t{4}, std::size_t{0}}) {
        file_bytes lying = file;
        lying[first_chunk + field] ^= std::byte{1};
        sign(lying, first_chunk);
        CHECK(verdict(lying) == status::corrupt);
        kvarn::file_reader reader(vector_source{lying});
        REQUIRE(reader.begin().ok());
        CHECK(reader.next().error == (field == 4 ? status::corrupt : status::ok));
    }
}

TEST_CASE("cache/file: chunks left out, doubled, in another order or from another file", "[unit]")
{
    const std::vector<chunk_of> chunks{{test_type, 0, some_bytes(24, 1)}, {test_type, 1, some_bytes(24, 2)}, {test_type, 2, some_bytes(24, 3)}};
    const file_bytes file = write(chunks);
    constexpr std::size_t step = kvarn::chunk_overhead_bytes + 24;
    const auto chunk = [&](const file_bytes& f, std::size_t i) { return std::span(f).subspan(kvarn::file_header_bytes + i * step, step); };
    const auto join = [&](std::initializer_list<std::span<const std::byte>> parts) {
        file_bytes out(file.begin(), file.begin() + kvarn::file_header_bytes);
        for (const auto part : parts) out.insert(out.end(), part.begin(), part.end());
        const auto end = std::span(file).last(kvarn::file_end_bytes);
        out.insert(out.end(), end.begin(), end.end());
        return out;
    };
    CHECK(verdict(join({chunk(file, 0), chunk(file, 1), chunk(file, 2)})) == status::ok);
    CHECK(verdict(join({chunk(file, 0), chunk(file, 2)})) == status::corrupt);
    CHECK(verdict(join({chunk(file, 0), chunk(file, 1), chunk(file, 1), chunk(file, 2)})) == status::corrupt);
    CHECK(verdict(join({chunk(file, 1), chunk(file, 0), chunk(file, 2)})) == status::corrupt);
    CHECK(verdict(join({chunk(file, 0), chunk(file, 1), chunk(file, 1)})) == status::corrupt);
    const file_bytes other = write({chunks[0], {test_type, 1, some_bytes(24, 4)}, chunks[2]});
    CHECK(verdict(join({chunk(file, 0), chunk(other, 1), chunk(file, 2)})) == status::corrupt);
    file_bytes kinds = write(chunks, SIZE_MAX, file_kind::sequence);
    std::copy_n(file.begin(), kvarn::file_header_bytes, kinds.begin());
    CHECK(verdict(kinds) == status::corrupt);
}

TEST_CASE("cache/file: other kinds and versions", "[unit]")
{
    const file_bytes file = write(small_chunks);
    const auto with_field = [&](std::size_t at, std::uint32_t value) {
        file_bytes out = file;
        kvarn::put_u32(out.data() + at, value);
        sign(out, 0);
        return out;
    };
    const auto begin = [](const file_bytes& f) { return kvarn::file_reader(vector_source{f}).begin().error; };
    for (const std::uint32_t version : {0u, 1u, 3u, 0x02000000u, ~0u}) CHECK(begin(with_field(8, version)) == status::unsupported_version);
    for (const std::uint32_t kind : {0u, 3u, 0x01000000u, ~0u}) CHECK(begin(with_field(12, kind)) == status::corrupt);
    for (const std::size_t at : {16, 20}) CHECK(begin(with_field(at, 1)) == status::corrupt);
    CHECK(begin(with_field(8, 2)) == status::ok);

    kvarn::file_reader other(vector_source{file});
    CHECK(other.begin(file_kind::sequence) == status::corrupt);
    CHECK(other.next().error == status::corrupt);
    kvarn::file_reader same(vector_source{file});
    CHECK(same.begin(file_kind::records) == status::ok);
}

TEST_CASE("cache/file: writing fails at every byte", "[unit]")
{
    const std::vector<chunk_of> chunks{{test_type, 0, some_bytes(40, 1)}, {other_type, 1, {}}};
    const file_bytes file = write(chunks);
    for (std::size_t room = 0; room <= file.size(); ++room) {
        INFO("room for " << room << " of " << file.size());
        file_bytes out;
        kvarn::file_writer writer(vector_sink{&out, room});
        std::vector<status> said{writer.begin(file_kind::records)};
        for (const chunk_of& c : chunks) said.push_back(writer.chunk(c.type, c.number, c.payload));
        said.push_back(writer.finish());
        const bool fits = room == file.size();
        CHECK(std::is_partitioned(said.begin(), said.end(), [](status s) { return s == status::ok; }));
        CHECK(said.back() == (fits ? status::ok : status::io_error));
        CHECK(std::equal(out.begin(), out.end(), file.begin()));
        CHECK(writer.bytes() == out.size());
        if (fits) continue;
        CHECK(writer.begin(file_kind::records) == status::io_error);
        CHECK(writer.append(chunks[0].payload) == status::io_error);
        CHECK(writer.close_chunk() == status::io_error);

        file_bytes buffer(room);
        kvarn::buffer_writer small{kvarn::buffer_sink(buffer)};
        status s = small.begin(file_kind::records);
        for (const chunk_of& c : chunks)
            if (s == status::ok) s = small.chunk(c.type, c.number, c.payload);
        if (s == status::ok) s = small.finish();
        CHECK(s == status::buffer_too_small);
        CHECK(small.finish() == status::buffer_too_small);
    }
    kvarn::counting_writer counting;
    CHECK(counting.begin(file_kind::records) == status::ok);
    CHECK(counting.open_chunk(test_type, 0, 40) == status::ok);
    CHECK(counting.append({static_cast<const std::byte*>(nullptr), 39}) == status::ok);
    CHECK(counting.close_chunk() == status::bad_argument);
    CHECK(counting.append({static_cast<const std::byte*>(nullptr), 1}) == status::ok);
    CHECK(counting.close_chunk() == status::ok);
    CHECK(counting.chunk(other_type, 1, {}) == status::ok);
    CHECK(counting.finish() == status::ok);
    CHECK(counting.bytes() == file.size());
    file_bytes exactly(file.size());
    kvarn::buffer_writer writer{kvarn::buffer_sink(exactly)};
    CHECK(writer.begin(file_kind::records) == status::ok);
    for (const chunk_of& c : chunks) CHECK(writer.chunk(c.type, c.number, c.payload) == status::ok);
    CHECK(writer.finish() == status::ok);
    CHECK(exactly == file);
}

TEST_CASE("cache/file: failures of the caller's functions", "[unit]")
{
    const file_bytes file = write(small_chunks);
    for (std::size_t good = 0; good < file.size(); ++good) {
        // Fails where the bytes that can be read end, in one of three ways.
        std::size_t left = 0, at = 0;
        const auto some = [&](std::span<std::byte> to) {
            const std::size_t n = std::min(to.size(), left);
            std::copy_n(file.begin() + static_cast<std::ptrdiff_t>(at), n, to.begin());
            at += n;
            left -= n;
            return n;
        };
        std::vector<chunk_of> ignored;
        left = good;
        kvarn::file_reader failing([&](std::span<std::byte> to) noexcept -> kvarn::result<std::size_t> {
            if (left == 0) return status::io_error;
            return some(to);
        });
        CHECK(read_all(failing, ignored, how::read) == status::io_error);
        CHECK(failing.next().error == status::io_error);
        CHECK(failing.at_end() == status::io_error);
        left = good, at = 0;
        kvarn::file_reader lying([&](std::span<std::byte> to) noexcept { return left == 0 ? to.size() + 1 : some(to); });
        CHECK(read_all(lying, ignored, how::skip) == status::io_error);
    }
    int calls = 0;
    kvarn::file_writer writer([&calls](std::span<const std::byte>) noexcept { return ++calls < 3 ? status::ok : status::out_of_memory; });
    CHECK(writer.begin(file_kind::sequence) == status::ok);
    CHECK(writer.chunk(test_type, 0, some_bytes(3, 1)) == status::out_of_memory);
    CHECK(writer.chunk(test_type, 0, {}) == status::out_of_memory);
    CHECK(calls == 3);
}

TEST_CASE("cache/file: calls out of order change nothing", "[unit]")
{
    const file_bytes file = write({{test_type, 0, some_bytes(10, 1)}});
    const file_bytes payload = some_bytes(10, 1);
    file_bytes out;
    kvarn::file_writer writer(vector_sink{&out});
    CHECK(writer.open_chunk(test_type, 0, 10) == status::bad_argument);
    CHECK(writer.finish() == status::bad_argument);
    CHECK(writer.begin(file_kind::records) == status::ok);
    CHECK(writer.begin(file_kind::records) == status::bad_argument);
    CHECK(writer.append(payload) == status::bad_argument);
    CHECK(writer.close_chunk() == status::bad_argument);
    CHECK(writer.open_chunk(kvarn::end_chunk_type, 0, 10) == status::bad_argument);
    CHECK(writer.open_chunk(test_type, 0, 10) == status::ok);
    CHECK(writer.open_chunk(test_type, 0, 10) == status::bad_argument);
    CHECK(writer.append(std::span(payload).first(9)) == status::ok);
    CHECK(writer.append(std::span(payload).first(2)) == status::bad_argument);
    CHECK(writer.close_chunk() == status::bad_argument);
    CHECK(writer.finish() == status::bad_argument);
    CHECK(writer.append(std::span(payload).last(1)) == status::ok);
    CHECK(writer.append({}) == status::ok);
    CHECK(writer.close_chunk() == status::ok);
    CHECK(writer.finish() == status::ok);
    CHECK(writer.finish() == status::bad_argument);
    CHECK(writer.open_chunk(test_type, 0, 0) == status::bad_argument);
    CHECK(out == file);

    kvarn::file_reader reader(vector_source{file});
    file_bytes to(10);
    CHECK(reader.next().error == status::bad_argument);
    CHECK(reader.at_end() == status::bad_argument);
    CHECK(reader.begin(file_kind::records) == status::ok);
    CHECK(reader.begin().error == status::bad_argument);
    CHECK(reader.read(to) == status::bad_argument);
    CHECK(reader.skip() == status::bad_argument);
    CHECK(reader.end_chunk() == status::bad_argument);
    CHECK(reader.at_end() == status::bad_argument);
    CHECK(reader.next().ok());
    CHECK(reader.next().error == status::bad_argument);
    CHECK(reader.read(std::span(to).first(4)) == status::ok);
    CHECK(reader.end_chunk() == status::bad_argument);
    CHECK(reader.left() == 6);
    CHECK(reader.read(std::span(to).first(7)) == status::bad_argument);
    CHECK(reader.read(std::span(to).last(6)) == status::ok);
    CHECK(to == payload);
    CHECK(reader.end_chunk() == status::ok);
    CHECK(reader.end_chunk() == status::bad_argument);
    const auto end = reader.next();
    CHECK((end.ok() && end->is_end()));
    CHECK(reader.next().error == status::bad_argument);
    CHECK(reader.at_end() == status::ok);
    CHECK(reader.at_end() == status::ok);
}
