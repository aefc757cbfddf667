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

container small_container(std::mt19937& random, std::size_t tokens)
{
    kvarn::format_spec spec;
    spec.head_dim_k = spec.head_dim_v = 32;
    spec.group = 32;
    container c;
    c.format = *kvarn::make_format(spec);
    c.encoder = 0;
    c.iterations = 8;
    c.heads = 2;
    c.tokens = tokens;
    container_sizes sizes;
    REQUIRE(sizes_of(c, sizes));
    const auto fill = [&](std::vector<std::byte>& part, std::size_t size) {
        part.resize(size);
        for (std::byte& b : part) b = static_cast<std::byte>(random() & 0xff);
    };
    fill(c.records, sizes.records);
    fill(c.k_tail, sizes.k_tail);
    fill(c.v_tail, sizes.v_tail);
    return c;
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
        const container back = parse_container(file_of(c), "x");
        CHECK(back.format == c.format);
        CHECK((back.heads == 2 && back.tokens == tokens && back.type == element_type::float16 && back.iterations == 8));
        CHECK((back.records == c.records && back.k_tail == c.k_tail && back.v_tail == c.v_tail));
    }
}

TEST_CASE("cli/container: the checksum is FNV-1a", "[readers]")
{
    fnv1a checksum;
    CHECK(checksum.value() == 0xcbf29ce484222325u);
    checksum.update(to_bytes("foobar"));
    CHECK(checksum.value() == 0x85944171f73967e8u);
}

TEST_CASE("cli/container: every cut and every flipped bit is noticed", "[readers]")
{
    std::mt19937 random(2);
    const std::vector<std::byte> file = file_of(small_container(random, 35));
    for (std::size_t size = 0; size < file.size(); size += size < 200 ? 1 : 37)
        CHECK_THROWS_AS((void)parse_container(bytes(file).first(size), "x"), failure);
    for (std::size_t bit = 0; bit < 8 * file.size(); bit += bit < 8 * container_header_bytes ? 1 : 61) {
        std::vector<std::byte> altered = file;
        altered[bit / 8] ^= static_cast<std::byte>(1u << (bit % 8));
        CHECK_THROWS_AS((void)parse_container(altered, "x"), failure);
    }
}

TEST_CASE("cli/container: impossible counts with a right checksum are refused", "[readers]")
{
    std::mt19937 random(3);
    const container good = small_container(random, 35);
    for (const std::size_t tokens : {std::size_t{0}, std::size_t{1} << 62, SIZE_MAX}) {
        container c = good;
        c.tokens = tokens;
        CHECK_THROWS_AS((void)parse_container(file_of(c), "x"), failure);
    }
    container c = good;
    c.heads = 0xffffffffu;
    CHECK_THROWS_AS((void)parse_container(file_of(c), "x"), failure);
    c = good;
    c.type = static_cast<element_type>(3);
    CHECK_THROWS_AS((void)parse_container(file_of(c), "x"), failure);
}

TEST_CASE("cli/container: header bytes that mean nothing are refused", "[readers]")
{
    std::mt19937 random(4);
    const auto repaired = [](std::vector<std::byte> file, std::size_t at) {
        file[at] = std::byte{7};
        fnv1a checksum;
        checksum.update(bytes(file).first(file.size() - container_checksum_bytes));
        const std::uint64_t value = checksum.value();
        std::memcpy(file.data() + file.size() - container_checksum_bytes, &value, sizeof value);
        return file;
    };
    const container good = small_container(random, 35);
    for (const std::size_t at : {68, 79})
        CHECK_THROWS_WITH((void)parse_container(repaired(file_of(good), at), "x"),
                          "x: the file is damaged: its header is not what a writer would write");
    CHECK_NOTHROW((void)parse_container(repaired(file_of(good), 31), "x"));  // an encoder of the future

    kvarn::format_spec spec = good.format.spec();
    spec.value_bits = 0;
    container latent = good;
    latent.format = *kvarn::make_format(spec);
    latent.tokens = 3;
    latent.records.clear();
    latent.k_tail.resize(3 * latent.heads * 32 * 2);
    latent.v_tail.clear();
    CHECK_NOTHROW((void)parse_container(file_of(latent), "x"));
    CHECK_THROWS_WITH((void)parse_container(repaired(file_of(latent), 20), "x"),
                      "x: the file is damaged: its header is not what a writer would write");
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
        if (file.size() < container_checksum_bytes) continue;
        // The same file with its checksum made right: only the checks of the fields are left.
        fnv1a checksum;
        checksum.update(bytes(file).first(file.size() - container_checksum_bytes));
        const std::uint64_t value = checksum.value();
        std::memcpy(file.data() + file.size() - container_checksum_bytes, &value, sizeof value);
        try {
            const container c = parse_container(file, "x");
            REQUIRE(c.records.size() == c.tiles() * c.heads * c.record_bytes());
            REQUIRE(c.k_tail.size() ==
                    c.tail_tokens() * c.heads * static_cast<std::size_t>(c.format.key_channels()) * element_bytes(c.type));
            ++repaired;
        } catch (const failure&) {}
    }
    CHECK(repaired > 100);
}
