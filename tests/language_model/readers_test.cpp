// SPDX-License-Identifier: Apache-2.0
// The safetensors, JSON and integer .npy readers of the example language_model: what they accept, what they refuse and with which
// words, and thousands of random mutations with a fixed seed, each of which must end in a parsed file or a failure.

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "examples/common/npy.hpp"
#include "examples/language_model/config.hpp"
#include "examples/language_model/safetensors.hpp"
#include "examples/language_model/token_text.hpp"
#include "tests/catch.hpp"
#include "tiny_model.hpp"

namespace {

using namespace language_model;
using tiny::refusal;

std::vector<std::byte> to_bytes(const std::string& content)
{
    const auto raw = std::as_bytes(std::span(content.data(), content.size()));
    return {raw.begin(), raw.end()};
}

safetensors parsed(const std::string& content)
{
    return {to_bytes(content), "x"};
}

/// A file whose only tensor is `a` with these fields, and so many bytes of data.
std::string with_entry(const std::string& fields, std::size_t data_bytes)
{
    return tiny::safetensors_file("{\"a\": " + fields + "}", std::string(data_bytes, '\0'));
}

std::string small_file()
{
    return tiny::safetensors_file(
        {{"a", {"F32", {2, 3}, {1, 2, 3, 4, 5, 6}}}, {"b", {"F16", {4}, {0.5f, -1, 2, 8}}}, {"c", {"BF16", {1, 2}, {3, -7}}}},
        {{"task", "none"}});
}

/// Flips, overwrites, cuts, repeats or inserts; nearer the start more often, where the fields are.
void mutate(std::string& file, std::mt19937& random)
{
    const auto below = [&](std::size_t n) { return n == 0 ? 0 : static_cast<std::size_t>(random()) % n; };
    for (std::size_t count = 1 + below(4); count > 0 && !file.empty(); --count) {
        const std::size_t at = below(below(2) ? std::min<std::size_t>(file.size(), 60) : file.size());
        switch (below(6)) {
        case 0: file[at] = static_cast<char>(file[at] ^ (1 << below(8))); break;
        case 1: file[at] = static_cast<char>(random() & 0xff); break;
        case 2: file[at] = below(2) ? '9' : '\xff'; break;
        case 3: file.resize(at); break;
        case 4: file.insert(at, 1, "0123456789,[]{}\":-e"[below(19)]); break;
        default: file += file.substr(0, at); break;
        }
    }
}

}  // namespace

TEST_CASE("language_model/safetensors: tensors of all three types come back", "[readers]")
{
    const safetensors file = parsed(small_file());
    CHECK(file.entries().size() == 3);
    CHECK(file.metadata().at("task") == "none");
    CHECK(file.floats("a", {2, 3}) == std::vector<float>{1, 2, 3, 4, 5, 6});
    CHECK(file.floats("b") == std::vector<float>{0.5f, -1, 2, 8});
    CHECK(file.floats("c", {1, 2}) == std::vector<float>{3, -7});
    CHECK(parsed(with_entry(R"({"dtype": "F32", "shape": [], "data_offsets": [0, 4]})", 4)).floats("a") == std::vector<float>{0});
    CHECK(parsed(with_entry(R"({"dtype": "F32", "shape": [0, 5], "data_offsets": [4, 4]})", 4)).floats("a").empty());
    CHECK(parsed(tiny::safetensors_file("{}   ", "")).entries().empty());
}

TEST_CASE("language_model/safetensors: refuses everything else with the reason", "[readers]")
{
    const auto says = [](const std::string& content, const char* reason) {
        INFO(reason);
        const std::string text = refusal([&] { (void)parsed(content); });
        CAPTURE(text);
        CHECK(text.find("x: ") == 0);
        CHECK(text.find(reason) != std::string::npos);
    };
    says("", "shorter than 8 bytes");
    says("1234567", "shorter than 8 bytes");
    says(std::string(8, '\xff') + "{}", "its header would have");
    says(std::string("\x03\0\0\0\0\0\0\0", 8) + "{}", "its header would have");
    says(tiny::safetensors_file("", ""), "malformed");
    says(tiny::safetensors_file("{", ""), "malformed");
    says(tiny::safetensors_file("[]", ""), "no JSON object");
    says(tiny::safetensors_file("{} x", ""), "malformed");
    says(tiny::safetensors_file(R"({"a": {"b": {"c": {"d": {}}}}})", ""), "nested too deeply");
    says(tiny::safetensors_file(std::string(100000, '['), ""), "nested too deeply");
    says(tiny::safetensors_file(R"({"a": 1e999})", ""), "too large");
    says(tiny::safetensors_file(R"({"__metadata__": 1})", ""), "metadata");
    says(tiny::safetensors_file(R"({"__metadata__": {"a": 1}})", ""), "metadata 'a'");
    says(tiny::safetensors_file(R"({"a": {"dtype": "F32"}, "a": {"dtype": "F32"}})", ""), "the key 'a' twice");
    says(with_entry("7", 0), "does not give dtype, shape and data_offsets");
    says(with_entry(R"({"dtype": "F32", "shape": [1]})", 4), "does not give");
    says(with_entry(R"({"dtype": 5, "shape": [1], "data_offsets": [0, 4]})", 4), "does not give");
    says(with_entry(R"({"dtype": "F32", "shape": [1], "data_offsets": [0]})", 4), "does not give");
    says(with_entry(R"({"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]})", 4), "no whole number");
    says(with_entry(R"({"dtype": "F32", "shape": [1.0], "data_offsets": [0, 4]})", 4), "no whole number");
    says(with_entry(R"({"dtype": "F32", "shape": ["1"], "data_offsets": [0, 4]})", 4), "no whole number");
    says(with_entry(R"({"dtype": "F32", "shape": [1], "data_offsets": [0, 18446744073709551616]})", 4), "no whole number");
    says(with_entry(R"({"dtype": "F32", "shape": [1], "data_offsets": [4, 0]})", 4), "would lie at bytes 4 to 0 of 4");
    says(with_entry(R"({"dtype": "F32", "shape": [1], "data_offsets": [0, 8]})", 4), "would lie at bytes 0 to 8 of 4");
    says(with_entry(R"({"dtype": "F32", "shape": [2], "data_offsets": [0, 4]})", 4), "its shape needs 8 bytes, it has 4");
    says(with_entry(R"({"dtype": "F32", "shape": [4611686018427387904, 4], "data_offsets": [0, 0]})", 4),
         "its shape is too large");  // 2^64
    says(with_entry(R"({"dtype": "U8", "shape": [4294967296, 4294967296], "data_offsets": [0, 0]})", 4),
         "its shape is too large");

    const std::string a = R"({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}, )";
    says(tiny::safetensors_file(a + R"("b": {"dtype": "I8", "shape": [4], "data_offsets": [4, 8]}})", std::string(8, '\0')),
         "b: its data overlap those of a");
    says(tiny::safetensors_file(a + R"("0": {"dtype": "?", "shape": [], "data_offsets": [7, 9]}})", std::string(9, '\0')),
         "0: its data overlap those of a");
    CHECK(parsed(tiny::safetensors_file(a + R"("b": {"dtype": "F32", "shape": [0], "data_offsets": [4, 4]}})", std::string(8, '\0')))
              .floats("b")
              .empty());

    const safetensors file = parsed(small_file());
    CHECK(refusal([&] { (void)file.floats("z"); }) == "x: the tensor z is missing");
    CHECK(refusal([&] { (void)file.floats("a", {3, 2}); }) == "x: a has the shape [2, 3], [3, 2] is needed");
    const safetensors other = parsed(with_entry(R"({"dtype": "I64", "shape": [1], "data_offsets": [0, 8]})", 8));
    CHECK(refusal([&] { (void)other.floats("a"); }) == "x: a has the type I64, only F32, F16 and BF16 are read");
}

TEST_CASE("language_model/safetensors: every cut of the data is noticed", "[readers]")
{
    const std::string file = small_file();
    for (std::size_t size = 0; size < file.size(); ++size) CHECK_THROWS_AS((void)parsed(file.substr(0, size)), failure);
}

TEST_CASE("language_model/safetensors: thousands of random mutations parse or fail, nothing else", "[readers]")
{
    std::mt19937 random(20240613);
    std::size_t accepted = 0, refused = 0;
    for (int i = 0; i < 8000; ++i) {
        std::string content = small_file();
        mutate(content, random);
        try {
            const safetensors file = parsed(content);
            std::uint64_t header_bytes = 0;
            std::memcpy(&header_bytes, content.data(), 8);
            const std::size_t data_bytes = content.size() - 8 - static_cast<std::size_t>(header_bytes);
            for (const auto& [name, entry] : file.entries()) {
                REQUIRE(entry.begin <= entry.end);
                REQUIRE(entry.end <= data_bytes);
                if (entry.type != "F32" && entry.type != "F16" && entry.type != "BF16") continue;
                REQUIRE(file.floats(name).size() * (entry.type == "F32" ? 4 : 2) == entry.end - entry.begin);
            }
            ++accepted;
        } catch (const failure& f) {
            REQUIRE(std::string(f.what()).find("x: ") == 0);
            ++refused;
        }
    }
    CHECK(accepted > 300);  // data and names may change freely
    CHECK(refused > 4000);
}

TEST_CASE("language_model/metadata: the embedding scale is a number to its last byte", "[readers]")
{
    const auto scale = [](const std::string& value) {
        model_config c;
        apply_metadata(c, parsed(tiny::safetensors_file(R"({"__metadata__": {"embedding_scale": ")" + value + "\"}}", "")));
        return c.embedding_scale;
    };
    CHECK(scale("1.5") == 1.5f);
    for (const char* bad : {"", "1.5x", "nan", "1e99", R"(1.5\u0000)", R"(1.5\u0000x)"})
        CHECK(refusal([&] { (void)scale(bad); }) == "x: its metadata 'embedding_scale' are no number");
}

TEST_CASE("language_model/sequences: int32 and int64 tables, and what is none", "[readers]")
{
    const auto table = kvarn_cli::parse_npy_integers(to_bytes(tiny::npy_file<std::int32_t>({1, -2, 3, 4, 5, 6}, 2, 3)), "x");
    CHECK((table.rows == 2 && table.columns == 3));
    CHECK(table.values == std::vector<std::int64_t>{1, -2, 3, 4, 5, 6});
    const std::int64_t large = std::int64_t{1} << 40;
    CHECK(kvarn_cli::parse_npy_integers(to_bytes(tiny::npy_file<std::int64_t>({-large, large}, 1, 2)), "x").values ==
          std::vector<std::int64_t>{-large, large});

    const auto says = [](std::string content, const char* reason) {
        const std::string text = refusal([&] { (void)kvarn_cli::parse_npy_integers(to_bytes(content), "x"); });
        CAPTURE(text);
        CHECK(text.find("x: ") == 0);
        CHECK(text.find(reason) != std::string::npos);
    };
    const std::string good = tiny::npy_file<std::int32_t>({1, 2, 3, 4}, 2, 2);
    const auto replaced = [&](const std::string& from, const std::string& to) {
        std::string content = good;
        return content.replace(content.find(from), from.size(), to);
    };
    says("", "not a .npy file");
    says(good.substr(0, 140), "truncated");
    says(good + "x", "too long");
    says(replaced("<i4", "<f4"), "only little-endian int32");
    says(replaced("(2, 2)", "(4,)  "), "1 dimensions, [sequences, tokens] is needed");
    says(replaced("(2, 2)", "(2, 0)"), "the array is empty");
    says(replaced("(2, 2)", "(0, 2)"), "the array is empty");

    std::mt19937 random(5);
    std::size_t accepted = 0, refused = 0;
    for (int i = 0; i < 3000; ++i) {
        std::string content = good;
        mutate(content, random);
        try {
            const auto t = kvarn_cli::parse_npy_integers(to_bytes(content), "x");
            REQUIRE(t.values.size() == t.rows * t.columns);
            ++accepted;
        } catch (const failure&) {
            ++refused;
        }
    }
    CHECK(accepted > 10);  // its data are few
    CHECK(refused > 1500);
}

TEST_CASE("language_model/tokens: the text of byte-level and of SentencePiece tokens", "[readers]")
{
    const auto words = [](const std::string& file) { return token_text(parse_json(file, 32, "x"), "x"); };
    const auto text = [](const token_text& t, std::vector<std::int32_t> ids) { return t.of(ids); };
    // U+0120 is a blank, U+010A a line end, U+00C3 U+00A9 the bytes of e acute, U+0101 byte 1, U+0143 the last of all.
    const token_text bytes = words(R"({"model": {"vocab": {"a": 0, "\u0120b": 1, "\u010a": 2, "\u00c3\u00a9": 3, "\u0101": 4, "\u0143": 6}},
                                       "added_tokens": [{"id": 7, "content": "<|end|>", "special": true}],
                                       "decoder": {"type": "Sequence", "decoders": [{"type": "ByteLevel"}]}})");
    CHECK(text(bytes, {0, 1, 2, 3, 7}) == "a b\n\xc3\xa9<|end|>");
    CHECK(text(bytes, {4, 6, 5, 100, -1}) == " \xad<5><100><-1>");
    const token_text pieces = words(R"({"model": {"vocab": {"\u2581the": 0, "<0xE2>": 1, "<0x98>": 2, "<0x83>": 3, "<0x0A>": 4, "x\u2581\u2581": 5, "<0xg0>": 6}},
                                        "decoder": {"type": "Sequence", "decoders": [{"type": "ByteFallback"}]}})");
    CHECK(text(pieces, {0, 1, 2, 3, 4, 5, 6}) == " the\xe2\x98\x83\nx  <0xg0>");
    for (const char* bad : {"[]", "{}", R"({"model": {"vocab": []}})", R"({"model": {"vocab": {"a": -1}}})", R"({"model": {"vocab": {"a": 16777216}}})",
                            R"({"model": {"vocab": {}}, "added_tokens": {}})", R"({"model": {"vocab": {}}, "added_tokens": [{"id": 1}]})"})
        CHECK(refusal([&] { (void)words(bad); }).find("x: ") == 0);
}
