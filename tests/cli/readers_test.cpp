// SPDX-License-Identifier: Apache-2.0
// The .npy and container readers of the command line example, in process: what they accept, what they refuse, and some
// thousand random mutations with a fixed seed, each of which must end in a parsed file or a failure, never in anything else.

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "examples/common/npy.hpp"
#include "examples/common/program.hpp"
#include "examples/kvarn/container.hpp"
#include "tests/catch.hpp"
#include "tests/support/bytes_output.hpp"
#include "tests/support/repair_file.hpp"

namespace {

using namespace kvarn_cli;

std::vector<std::byte> to_bytes(const std::string& content)
{
    const auto raw = std::as_bytes(std::span(content.data(), content.size()));
    return {raw.begin(), raw.end()};
}

/// A version 1.0 file with this dict and so many data bytes.
std::vector<std::byte> npy_of(std::string dict, std::size_t data_bytes, char major = 1)
{
    dict += '\n';
    std::string file("\x93NUMPY", 6);
    file += {major, '\0', static_cast<char>(dict.size() & 0xff), static_cast<char>(dict.size() >> 8)};
    if (major > 1) file += {'\0', '\0'};
    return to_bytes(file + dict + std::string(data_bytes, '\0'));
}

std::string refusal(const std::vector<std::byte>& file)
{
    try {
        (void)parse_npy(file, "x.npy");
    } catch (const failure& f) {
        return f.what();
    }
    return "accepted";
}

std::vector<std::byte> file_of(const container& c)
{
    support::bytes_output out;
    write_container(out, c);
    return out.content;
}

/// Parts of the sizes that the rest asks for.
void fill_in(container& c, std::mt19937& random)
{
    container_sizes sizes;
    REQUIRE(sizes_of(c, sizes));
    const auto fill = [&](std::vector<std::byte>& part, std::size_t size) {
        part.resize(size);
        for (std::byte& b : part) b = static_cast<std::byte>(random() & 0xff);
    };
    fill(c.records, sizes.records);
    fill(c.k_tail, sizes.k_tail);
    fill(c.v_tail, sizes.v_tail);
}

container small_container(std::mt19937& random, std::size_t tokens)
{
    kvarn::format_spec spec;
    spec.head_dim_k = spec.head_dim_v = 32;
    spec.group = 32;
    container c;
    c.formats = {*kvarn::make_format(spec)};
    c.encoder = 0;
    c.iterations = 8;
    c.heads = 2;
    c.tokens = tokens;
    fill_in(c, random);
    return c;
}

/// The file with another value at an offset of its first chunk's payload, and the right checksums.
std::vector<std::byte> with_info(std::vector<std::byte> file, std::size_t at, std::uint64_t value, std::size_t bytes)
{
    for (std::size_t i = 0; i < bytes; ++i) file[kvarn::file_header_bytes + 32 + at + i] = static_cast<std::byte>(value >> (8 * i) & 0xff);
    support::repair_file(file);
    return file;
}

/// Flips, overwrites, cuts, repeats or inserts; nearer the start more often, where the fields are.
void mutate(std::vector<std::byte>& file, std::mt19937& random)
{
    const auto below = [&](std::size_t n) { return n == 0 ? 0 : static_cast<std::size_t>(random()) % n; };
    for (std::size_t count = 1 + below(4); count > 0; --count) {
        const std::size_t reach = below(2) ? std::min<std::size_t>(file.size(), 128) : file.size(), at = below(reach);
        if (file.empty()) return;
        const auto position = file.begin() + static_cast<std::ptrdiff_t>(at);
        switch (below(6)) {
        case 0: file[at] ^= static_cast<std::byte>(1u << below(8)); break;
        case 1: file[at] = static_cast<std::byte>(random() & 0xff); break;
        case 2: file[at] = static_cast<std::byte>(below(2) ? 0xff : 0x39); break;  // large fields, larger decimal numbers
        case 3: file.resize(at); break;
        case 4: file.insert(position, static_cast<std::byte>("0123456789,(){}' "[below(17)])); break;
        default: file.insert(file.end(), file.begin(), position); break;
        }
    }
}

}  // namespace

TEST_CASE("cli/npy: reads what NumPy writes", "[readers]")
{
    const std::string dict = "{'descr': '<f4', 'fortran_order': False, 'shape': (2, 3, 4), }";
    for (const char major : {1, 2, 3}) {
        const tensor a = parse_npy(npy_of(dict, 96, major), "x.npy");
        CHECK(a.type == element_type::float32);
        CHECK((a.heads == 2 && a.tokens == 3 && a.channels == 4));
        CHECK(a.data.size() == 96);
    }
    const tensor flat = parse_npy(npy_of("{\"shape\": (3, 4), \"descr\": \"<f2\", \"fortran_order\": False}", 24), "x.npy");
    CHECK(flat.type == element_type::float16);
    CHECK((flat.heads == 1 && flat.tokens == 3 && flat.channels == 4));

    const std::string header = npy_header(element_type::float16, 2, 1234567, 128);
    CHECK(header.size() % 64 == 0);
    CHECK(refusal(to_bytes(header)).find("truncated") != std::string::npos);
    const tensor own = parse_npy(to_bytes(npy_header(element_type::float16, 2, 5, 3) + std::string(60, 'a')), "x.npy");
    CHECK((own.heads == 2 && own.tokens == 5 && own.channels == 3));
}

TEST_CASE("cli/npy: refuses everything else with the reason", "[readers]")
{
    const auto says = [](const std::vector<std::byte>& file, const char* reason) {
        INFO(reason);
        const std::string text = refusal(file);
        CAPTURE(text);
        CHECK(text.find("x.npy: ") == 0);
        CHECK(text.find(reason) != std::string::npos);
    };
    const auto with = [](const char* descr, const char* order, const char* shape) {
        return std::string("{'descr': '") + descr + "', 'fortran_order': " + order + ", 'shape': " + shape + ", }";
    };
    says({}, "not a .npy file");
    says(to_bytes("PK\x03\x04 something else"), "not a .npy file");
    says(npy_of(with("<f8", "False", "(1, 1, 1)"), 8), "only little-endian");
    says(npy_of(with(">f4", "False", "(1, 1, 1)"), 4), "only little-endian");
    says(npy_of(with("|O", "False", "(1, 1, 1)"), 4), "only little-endian");
    says(npy_of(with("<f4", "True", "(1, 1, 1)"), 4), "Fortran order");
    says(npy_of(with("<f4", "0", "(1, 1, 1)"), 4), "malformed");
    says(npy_of(with("<f4", "False", "()"), 4), "0 dimensions");
    says(npy_of(with("<f4", "False", "(3,)"), 12), "1 dimensions");
    says(npy_of(with("<f4", "False", "(1, 1, 1, 1)"), 4), "more than 3");
    says(npy_of(with("<f4", "False", "(1, -1, 1)"), 4), "shape is malformed");
    says(npy_of(with("<f4", "False", "(1, 1 1)"), 4), "malformed");
    says(npy_of(with("<f4", "False", "(2, 0, 4)"), 0), "empty");
    says(npy_of(with("<f4", "False", "(4294967296, 4294967296, 4294967296)"), 0), "too large");
    says(npy_of(with("<f4", "False", "(4611686018427387904, 4, 1)"), 0), "too large");  // 2^64 bytes: wraps to 0
    says(npy_of(with("<f4", "False", "(99999999999999999999, 1, 1)"), 0), "too large");
    says(npy_of(with("<f4", "False", "(2, 3, 4)"), 95), "truncated");
    says(npy_of(with("<f4", "False", "(2, 3, 4)"), 97), "too long");
    says(npy_of("{'descr': '<f4', 'fortran_order': False}", 4), "malformed");
    says(npy_of("{'descr': '<f4', 'descr': '<f4', 'fortran_order': False, 'shape': (1, 1)}", 4), "malformed");
    says(npy_of(with("<f4", "False", "(1, 1)") + " 7", 4), "malformed");
    says(npy_of("{'descr': '<f4", 4), "malformed");
    says(npy_of(with("<f4", "False", "(1, 1)"), 4, 4), "version 4.0");
    std::vector<std::byte> file = npy_of(with("<f4", "False", "(1, 1)"), 0);
    file[9] = std::byte{0xff};  // header longer than the file
    says(file, "truncated in its header");
}

TEST_CASE("cli/npy: finds the place of a value that is not finite", "[readers]")
{
    for (const std::uint16_t bad : {std::uint16_t{0x7c00}, std::uint16_t{0xfc00}, std::uint16_t{0x7e01}}) {
        tensor a{element_type::float16, 2, 3, 4, std::vector<std::byte>(48)};
        CHECK_NOTHROW(require_finite(a, "x.npy"));
        std::memcpy(a.data.data() + 2 * (1 * 12 + 2 * 4 + 3), &bad, 2);
        CHECK_THROWS_WITH(require_finite(a, "x.npy"), "x.npy: holds NaN or infinity (head 1, token 2, channel 3)");
    }
}

TEST_CASE("cli/program: a message is one line without control characters", "[readers]")
{
    CHECK(one_line("x: a\n\tb\r\n") == "x: a  b");
    CHECK(one_line(std::string("x: \x1b[31mred\x7f\0.", 14)) == "x:  [31mred  .");
    CHECK(one_line("x: gr\xc3\xbc\xc3\x9f") == "x: gr\xc3\xbc\xc3\x9f");
}

TEST_CASE("cli/container: comes back as it was written", "[readers]")
{
    std::mt19937 random(1);
    for (const std::size_t tokens : {std::size_t{7}, std::size_t{64}, std::size_t{75}}) {
        const container c = small_container(random, tokens);
        const std::vector<std::byte> file = file_of(c);
        container_sizes sizes;
        REQUIRE(sizes_of(c, sizes));
        CHECK(file.size() == sizes.file);
        const container back = parse_container(file, "x");
        CHECK((back.formats == c.formats && back.format_of(1) == c.shape()));
        CHECK((back.heads == 2 && back.tokens == tokens && back.type == element_type::float16 && back.iterations == 8));
        CHECK((back.records == c.records && back.k_tail == c.k_tail && back.v_tail == c.v_tail));
    }
}

TEST_CASE("cli/container: heads with formats of their own", "[readers]")
{
    std::mt19937 random(5);
    container c = small_container(random, 75);
    const auto format = [](int key_bits, kvarn::rotation keys, int head_dim) {
        kvarn::format_spec spec;
        spec.head_dim_k = spec.head_dim_v = head_dim;
        spec.group = 32;
        spec.key_bits = key_bits;
        spec.key_rotation = keys;
        return *kvarn::make_format(spec);
    };
    const auto a = format(4, kvarn::rotation::hadamard, 32), b = format(2, kvarn::rotation::none, 32);
    c.heads = 3;
    c.formats = {a, b, a};
    fill_in(c, random);
    const std::vector<std::byte> file = file_of(c);
    container_sizes sizes;
    REQUIRE(sizes_of(c, sizes));
    CHECK(file.size() == sizes.file);
    CHECK(sizes.records == 2 * (2 * kvarn::record_bytes(a) + kvarn::record_bytes(b)));
    const container back = parse_container(file, "x");
    CHECK((back.formats == c.formats && back.records == c.records && back.k_tail == c.k_tail && back.v_tail == c.v_tail));
    CHECK((back.record_bytes(1) == kvarn::record_bytes(b) && back.record_bytes(2) == kvarn::record_bytes(a)));

    // One format three times is one format; heads of other sizes do not belong together.
    CHECK(as_few({a, a, a}).size() == 1);
    CHECK(as_few({a, b, a}).size() == 3);
    c.formats = {a, a, a};
    fill_in(c, random);
    CHECK_THROWS_WITH((void)parse_container(file_of(c), "x"), "x: the file is damaged: its first chunk is not what a writer would write");
    c.formats = {a, b, format(4, kvarn::rotation::hadamard, 64)};
    fill_in(c, random);
    CHECK_THROWS_WITH((void)parse_container(file_of(c), "x"), "x: the file is damaged: its format is impossible");
    const auto two_of_two = with_info(file_of(small_container(random, 75)), 4, 2, 4);  // and one format follows
    CHECK_THROWS_WITH((void)parse_container(two_of_two, "x"), "x: the file is damaged: its counts are impossible");
}

TEST_CASE("cli/container: every cut and every flipped bit is noticed", "[readers]")
{
    std::mt19937 random(2);
    const std::vector<std::byte> file = file_of(small_container(random, 35));
    for (std::size_t size = 0; size < file.size(); ++size) CHECK_THROWS_AS((void)parse_container(bytes(file).first(size), "x"), failure);
    for (std::size_t bit = 0; bit < 8 * file.size(); bit += bit < 8 * 256 ? 1 : 7) {
        std::vector<std::byte> altered = file;
        altered[bit / 8] ^= static_cast<std::byte>(1u << (bit % 8));
        CHECK_THROWS_AS((void)parse_container(altered, "x"), failure);
    }
}

TEST_CASE("cli/container: impossible counts with right checksums are refused", "[readers]")
{
    std::mt19937 random(3);
    const std::vector<std::byte> good = file_of(small_container(random, 35));
    CHECK_NOTHROW((void)parse_container(with_info(good, 8, 35, 8), "x"));
    for (const std::uint64_t tokens : std::vector<std::uint64_t>{0, 1, 36, 67, std::uint64_t{1} << 62, ~std::uint64_t{0}})
        CHECK_THROWS_AS((void)parse_container(with_info(good, 8, tokens, 8), "x"), failure);
    for (const std::uint64_t heads : {0u, 1u, 3u, 0xffffffffu}) CHECK_THROWS_AS((void)parse_container(with_info(good, 0, heads, 4), "x"), failure);
    for (const std::uint64_t type : {0u, 2u, 3u}) CHECK_THROWS_AS((void)parse_container(with_info(good, 16, type, 1), "x"), failure);
    CHECK_THROWS_WITH((void)parse_container(with_info(good, 16, 3, 1), "x"), "x: the file is damaged: its stride or element type is unknown");
    CHECK_THROWS_WITH((void)parse_container(with_info(good, 24 + 20, 7, 4), "x"), "x: the file is damaged: its first chunk is not what a writer would write");
}

TEST_CASE("cli/container: bytes that mean nothing are refused", "[readers]")
{
    std::mt19937 random(4);
    const container good = small_container(random, 35);
    for (const std::size_t at : {19, 24 + 13, 24 + 14, 24 + 15})
        CHECK_THROWS_WITH((void)parse_container(with_info(file_of(good), at, 7, 1), "x"),
                          "x: the file is damaged: its first chunk is not what a writer would write");
    CHECK_NOTHROW((void)parse_container(with_info(file_of(good), 18, 7, 1), "x"));  // an encoder of the future

    kvarn::format_spec spec = good.shape().spec();
    spec.value_bits = 0;
    container latent = good;
    latent.formats = {*kvarn::make_format(spec)};
    latent.tokens = 3;
    fill_in(latent, random);
    CHECK_NOTHROW((void)parse_container(file_of(latent), "x"));
    CHECK_THROWS_WITH((void)parse_container(with_info(file_of(latent), 24 + 4, 44, 4), "x"),
                      "x: the file is damaged: its first chunk is not what a writer would write");
}

TEST_CASE("cli/container: other files, other versions, chunks that do not belong there", "[readers]")
{
    std::mt19937 random(6);
    const std::vector<std::byte> good = file_of(small_container(random, 35));
    const auto with = [&](std::size_t at, std::uint32_t value) {
        std::vector<std::byte> file = good;
        kvarn::put_u32(file.data() + at, value);
        support::repair_file(file);
        return file;
    };
    const auto says = [](const std::vector<std::byte>& file, const char* message) { CHECK_THROWS_WITH((void)parse_container(file, "x"), message); };
    // A container of version 1 has its version at the same place, and other checksums.
    std::vector<std::byte> old = good;
    kvarn::put_u32(old.data() + 8, 1);
    says(old, "x: container version 1 is older than this program, which reads version 2: quantize K and V again");
    says(with(8, 3), "x: container version 3 is unknown, this program reads version 2");
    says(with(12, 2), "x: holds a saved sequence, not the records of `kvarn quantize`");
    const std::size_t second = kvarn::file_header_bytes + kvarn::chunk_overhead_bytes + info_bytes + info_format_bytes;
    says(with(second, kvarn::chunk_type("more")), "x: the file is damaged: its chunks are not in order");
    says(with(second + 8, 1), "x: the file is damaged: its chunks are not in order");
    says(to_bytes("\x93NUMPY, say"), "x: not a kvarn container (for bare records use --raw)");
    says({}, "x: the file is empty");

    // A chunk more than the first one says.
    std::vector<std::byte> more(good.size() + 100);
    kvarn::buffer_writer writer{kvarn::buffer_sink(more)};
    kvarn::buffer_reader reader{kvarn::buffer_source(good)};
    REQUIRE((reader.begin().ok() && writer.begin(kvarn::file_kind::records) == kvarn::status::ok));
    for (auto head = reader.next(); head.ok() && !head->is_end(); head = reader.next())
        REQUIRE(writer.chunk(head->type, head->number, *reader.payload()) == kvarn::status::ok);
    REQUIRE((writer.chunk(records_chunk, 2, {}) == kvarn::status::ok && writer.finish() == kvarn::status::ok));
    more.resize(static_cast<std::size_t>(writer.bytes()));
    says(more, "x: the file is damaged: it has more chunks than it says");
}

TEST_CASE("cli/readers: thousands of random mutations parse or fail, nothing else", "[readers]")
{
    std::mt19937 random(20240607);
    const std::vector<std::byte> npy = npy_of("{'descr': '<f2', 'fortran_order': False, 'shape': (2, 3, 4), }", 48);
    std::size_t accepted = 0, refused = 0;
    for (int i = 0; i < 6000; ++i) {
        std::vector<std::byte> file = npy;
        mutate(file, random);
        try {
            const tensor a = parse_npy(file, "x.npy");
            REQUIRE(a.data.size() == a.elements() * element_bytes(a.type));
            ++accepted;
        } catch (const failure& f) {
            REQUIRE(std::string(f.what()).find("x.npy: ") == 0);
            ++refused;
        }
    }
    CHECK(accepted > 100);  // data bytes may change freely
    CHECK(refused > 3000);

    const std::vector<std::byte> packed = file_of(small_container(random, 35));
    std::size_t repaired = 0;
    for (int i = 0; i < 6000; ++i) {
        std::vector<std::byte> file = packed;
        mutate(file, random);
        if (file == packed) continue;
        CHECK_THROWS_AS((void)parse_container(file, "x"), failure);
        // The same file with its checksums made right: only the checks of the fields are left.
        support::repair_file(file);
        try {
            const container c = parse_container(file, "x");
            REQUIRE(c.records.size() == c.tiles() * (c.formats.size() == 1 ? c.heads * c.record_bytes(0) : c.record_bytes(0) + c.record_bytes(1)));
            REQUIRE(c.k_tail.size() == c.heads * c.k_tail_bytes());
            ++repaired;
        } catch (const failure&) {}
    }
    CHECK(repaired > 100);
}
