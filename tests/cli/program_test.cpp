// SPDX-License-Identifier: Apache-2.0
// The command line example as a process: round trips, sizes, tails, and every error path, which must give exit code 2, one
// line on stderr and no file; nor may a signal leave one. Each test case works in its own empty folder.

#include <algorithm>
#include <chrono>
#include <cmath>
#include <csignal>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <functional>
#include <iterator>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include <fcntl.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <kvarn/base/element.hpp>

#include "tests/catch.hpp"
#include "tests/support/program.hpp"

namespace {

namespace fs = std::filesystem;

using support::check_refused, support::outcome, support::read_text, support::write_text;

struct workplace : support::workplace {
    workplace() : support::workplace(KVARN_CLI_PROGRAM, "kvarn") {}
};

struct array {
    std::size_t heads = 0, tokens = 0, channels = 0;
    bool is_half = false;
    std::vector<float> values;
};

/// Written by hand, so that a mistake in the program's own writer cannot hide one in its reader.
void write_npy(const fs::path& path, const array& a, bool two_dimensional = false)
{
    const std::string shape =
        (two_dimensional ? "" : std::to_string(a.heads) + ", ") + std::to_string(a.tokens) + ", " + std::to_string(a.channels);
    std::string dict =
        std::string("{'descr': '") + (a.is_half ? "<f2" : "<f4") + "', 'fortran_order': False, 'shape': (" + shape + "), }";
    dict.resize(117, ' ');
    dict += '\n';
    std::string file("\x93NUMPY\x01\x00\x76\x00", 10);
    file += dict;
    for (const float x : a.values) {
        const kvarn::half h = kvarn::to_half(x);
        file.append(a.is_half ? reinterpret_cast<const char*>(&h) : reinterpret_cast<const char*>(&x), a.is_half ? 2 : 4);
    }
    write_text(path, file);
}

array read_npy(const fs::path& path)
{
    const std::string file = read_text(path);
    REQUIRE(file.size() > 10);
    REQUIRE(file.substr(0, 8) == std::string("\x93NUMPY\x01\x00", 8));
    const std::size_t start = 10 + static_cast<unsigned char>(file[8]) + 256u * static_cast<unsigned char>(file[9]);
    REQUIRE(start % 64 == 0);
    array a;
    a.is_half = file.find("'<f2'") != std::string::npos;
    REQUIRE(std::sscanf(file.c_str() + file.find('('), "(%zu, %zu, %zu)", &a.heads, &a.tokens, &a.channels) == 3);
    const std::size_t each = a.is_half ? 2 : 4, count = a.heads * a.tokens * a.channels;
    REQUIRE(file.size() == start + each * count);
    for (std::size_t i = 0; i < count; ++i) {
        kvarn::half h{};
        float x = 0;
        if (a.is_half) {
            std::memcpy(&h, file.data() + start + 2 * i, 2);
            x = kvarn::to_float(h);
        } else {
            std::memcpy(&x, file.data() + start + 4 * i, 4);
        }
        a.values.push_back(x);
    }
    return a;
}

/// Normal values, some channels eight times as large, already rounded when half.
array random_array(std::size_t heads, std::size_t tokens, std::size_t channels, bool is_half, unsigned seed)
{
    std::mt19937 random(seed);
    std::normal_distribution<float> normal;
    array a{heads, tokens, channels, is_half, {}};
    for (std::size_t i = 0; i < heads * tokens * channels; ++i) {
        const float x = normal(random) * (i % channels % 29 == 3 ? 8.0f : 1.0f);
        a.values.push_back(is_half ? kvarn::to_float(kvarn::to_half(x)) : x);
    }
    return a;
}

double relative_error(const array& exact, const array& decoded)
{
    REQUIRE(exact.values.size() == decoded.values.size());
    double difference = 0, norm = 0;
    for (std::size_t i = 0; i < exact.values.size(); ++i) {
        const double x = static_cast<double>(exact.values[i]), d = x - static_cast<double>(decoded.values[i]);
        difference += d * d;
        norm += x * x;
    }
    return std::sqrt(difference / norm);
}

void check_runs(const workplace& here, const std::string& arguments)
{
    CAPTURE(arguments);
    const outcome result = here.run(arguments);
    CAPTURE(result.err);
    REQUIRE(result.code == 0);
    CHECK(result.err.empty());
}

}  // namespace

TEST_CASE("cli: a container comes back within the format's error, tail tokens exactly", "[program]")
{
    const workplace here;
    for (const bool is_half : {true, false}) {
        const array k = random_array(3, 200, 64, is_half, 1), v = random_array(3, 200, 64, is_half, 2);
        write_npy(here / "k.npy", k);
        write_npy(here / "v.npy", v);
        check_runs(here, "quantize --format k4v4_g64 k.npy v.npy x.kvarn");
        // 3 tiles of 3 heads, 8 tail tokens; the file's header and end, a chunk that says what it is, three for each head.
        const std::size_t record = 64 * 64 / 2 * 2 + 2 * 64 * 6;
        CHECK(fs::file_size(here / "x.kvarn") == 80 + (40 + 48) + 9 * 40 + 9 * record + 2 * 3 * 8 * 64 * (is_half ? 2 : 4));
        check_runs(here, "dequantize x.kvarn k2.npy v2.npy");
        for (const auto& [exact, name] : {std::pair{&k, "k2.npy"}, std::pair{&v, "v2.npy"}}) {
            const array back = read_npy(here / name);
            CHECK((back.heads == 3 && back.tokens == 200 && back.channels == 64 && back.is_half == is_half));
            CHECK(relative_error(*exact, back) < 0.12);
            CHECK(relative_error(*exact, back) > 0.01);
            bool exact_tail = true;
            for (std::size_t head = 0; head < 3; ++head)
                for (std::size_t i = (head * 200 + 192) * 64; i < (head + 1) * 200 * 64; ++i)
                    exact_tail &= back.values[i] == exact->values[i];
            CHECK(exact_tail);
        }
        CHECK(here.files() == std::vector<std::string>{"k.npy", "k2.npy", "v.npy", "v2.npy", "x.kvarn"});
    }
}

TEST_CASE("cli: every record of many is written and read, by any number of threads", "[program]")
{
    const workplace here;
    const array k = random_array(40, 130, 32, true, 23), v = random_array(40, 130, 32, true, 24);
    write_npy(here / "k.npy", k);
    write_npy(here / "v.npy", v);
    check_runs(here, "quantize --threads 1 --format k5v6_g32 k.npy v.npy one");
    check_runs(here, "quantize --threads 7 --format k5v6_g32 k.npy v.npy seven");
    CHECK(read_text(here / "one") == read_text(here / "seven"));
    check_runs(here, "dequantize --threads 1 one k1 v1");
    check_runs(here, "dequantize --threads 7 one k7 v7");
    CHECK(read_text(here / "k1") == read_text(here / "k7"));
    CHECK(read_text(here / "v1") == read_text(here / "v7"));
    CHECK(relative_error(k, read_npy(here / "k1")) < 0.05);
    CHECK(relative_error(v, read_npy(here / "v1")) < 0.03);
}

TEST_CASE("cli: fewer tokens than a tile are all tail", "[program]")
{
    const workplace here;
    const array k = random_array(2, 5, 128, true, 3);
    write_npy(here / "k.npy", k);
    check_runs(here, "quantize k.npy k.npy x");
    check_runs(here, "inspect x");
    check_runs(here, "dequantize x a b");
    CHECK(read_npy(here / "a").values == k.values);
    CHECK(read_npy(here / "b").values == k.values);
}

TEST_CASE("cli: the rotated basis is one basis, tail included", "[program]")
{
    const workplace here;
    const array k = random_array(2, 100, 64, false, 4), v = random_array(2, 100, 128, false, 5);
    write_npy(here / "k.npy", k);
    write_npy(here / "v.npy", v);
    check_runs(here, "quantize --format k8v8_g64 k.npy v.npy x");
    check_runs(here, "dequantize --basis rotated x kr vr");
    // Sylvester's H by its definition: sign = parity of the common bits.
    const auto rotated = [](const array& a) {
        array out = a;
        for (std::size_t token = 0; token < a.heads * a.tokens; ++token)
            for (std::size_t i = 0; i < a.channels; ++i) {
                double sum = 0;
                for (std::size_t j = 0; j < a.channels; ++j)
                    sum += static_cast<double>(a.values[token * a.channels + j]) * (__builtin_popcountll(i & j) % 2 ? -1.0 : 1.0);
                out.values[token * a.channels + i] = static_cast<float>(sum / std::sqrt(static_cast<double>(a.channels)));
            }
        return out;
    };
    for (const auto& [exact, name] : {std::pair{rotated(k), "kr"}, std::pair{rotated(v), "vr"}}) {
        const array back = read_npy(here / name);
        CHECK(relative_error(exact, back) < 0.02);
        double worst = 0;
        for (std::size_t head = 0; head < 2; ++head)
            for (std::size_t i = (head * 100 + 64) * exact.channels; i < (head + 1) * 100 * exact.channels; ++i)
                worst = std::max(worst, std::fabs(static_cast<double>(back.values[i] - exact.values[i])));
        CHECK(worst < 1e-4);
    }
}

TEST_CASE("cli: bare records have the sizes of the specification and decode as the container does", "[program]")
{
    struct {
        const char* format;
        std::size_t head_dim, group, bytes;
    } const cases[] = {{"k4v2_g128", 128, 128, 13824},
                       {"k4v4_g128", 128, 128, 17920},
                       {"k2v2_g128", 128, 128, 9728},
                       {"kvarn_k4v2_g64", 64, 64, 3840}};
    for (const auto& one : cases) {
        const workplace here;
        write_npy(here / "k.npy", random_array(2, 2 * one.group, one.head_dim, true, 6));
        write_npy(here / "v.npy", random_array(2, 2 * one.group, one.head_dim, true, 7));
        const std::string format = std::string("--format ") + one.format;
        check_runs(here, "quantize --raw " + format + " k.npy v.npy raw");
        check_runs(here, "quantize " + format + " k.npy v.npy boxed");
        check_runs(here, "quantize --threads 3 " + format + " k.npy v.npy boxed_by_3");
        const std::string raw = read_text(here / "raw"), boxed = read_text(here / "boxed");
        CHECK(raw.size() == 4 * one.bytes);
        // Tile by tile; head by head, in chunks behind the file's header and the first chunk.
        for (std::size_t head = 0; head < 2; ++head)
            for (std::size_t tile = 0; tile < 2; ++tile)
                CHECK(boxed.substr(32 + 88 + head * (2 * one.bytes + 40) + 32 + tile * one.bytes, one.bytes) ==
                      raw.substr((2 * tile + head) * one.bytes, one.bytes));
        CHECK(read_text(here / "boxed_by_3") == boxed);
        check_runs(here, "dequantize --raw " + format + " --heads 2 --head-dim " + std::to_string(one.head_dim) + " raw k1 v1");
        check_runs(here, "dequantize boxed k2 v2");
        CHECK(read_text(here / "k1") == read_text(here / "k2"));
        CHECK(read_text(here / "v1") == read_text(here / "v2"));
        CHECK(read_npy(here / "k1").tokens == 2 * one.group);
    }
}

TEST_CASE("cli: the authors' records decode to the authors' input", "[program]")
{
    // Case c: k4v2_g128 at head_dim 128, one record as a uint8 array.
    const workplace here;
    const std::string golden = KVARN_GOLDEN_DIR "/c_";
    const std::string record_file = read_text(golden + "record.npy");
    REQUIRE(record_file.size() > 13824);
    write_text(here / "record", record_file.substr(record_file.size() - 13824));
    check_runs(here, "dequantize --raw --format k4v2_g128 --heads 1 --head-dim 128 --dtype float32 record theirs_k theirs_v");
    check_runs(here, "quantize --raw --encoder paper --format k4v2_g128 '" + golden + "k.npy' '" + golden + "v.npy' own");
    CHECK(fs::file_size(here / "own") == 13824);
    check_runs(here, "dequantize --raw --format k4v2_g128 --heads 1 --head-dim 128 --dtype float32 own own_k own_v");
    CHECK(relative_error(read_npy(here / "theirs_k"), read_npy(here / "own_k")) < 4e-3);
    CHECK(relative_error(read_npy(here / "theirs_v"), read_npy(here / "own_v")) < 4e-3);
}

TEST_CASE("cli: strides, rotation none, exact channels, no V, two dimensions", "[program]")
{
    const workplace here;
    SECTION("reference stride")
    {
        write_npy(here / "k.npy", random_array(1, 128, 256, true, 8));
        check_runs(here, "quantize --raw --stride reference k.npy k.npy raw");
        check_runs(here, "quantize --stride reference k.npy k.npy boxed");
        CHECK(fs::file_size(here / "raw") == 256 * 128);  // 211 bytes per token, rounded up to a power of two
        check_runs(here, "dequantize --raw --stride reference --format k4v2_g128 --heads 1 --head-dim 256 raw k1 v1");
        check_runs(here, "dequantize boxed k2 v2");
        CHECK(read_text(here / "k1") == read_text(here / "k2"));
        CHECK(read_text(here / "v1") == read_text(here / "v2"));
        CHECK(here.run("inspect boxed").out.find("reference stride") != std::string::npos);
    }
    SECTION("rotation none takes other head dimensions")
    {
        const array k = random_array(1, 130, 44, false, 9);
        write_npy(here / "k.npy", k);
        check_refused(here, "quantize k.npy k.npy x", "head_dim");
        check_runs(here, "quantize --rotation none --format k8v8_g128 k.npy k.npy x");
        check_runs(here, "dequantize x a b");
        check_runs(here, "dequantize --basis rotated x c d");
        CHECK(relative_error(k, read_npy(here / "a")) < 0.01);
        CHECK(read_text(here / "a") == read_text(here / "c"));
    }
    SECTION("exact channels come back as they were, in either basis")
    {
        const array k = random_array(2, 70, 80, true, 10);
        write_npy(here / "k.npy", k);
        check_runs(here, "quantize --format k4v0_g64 --exact-channels 16 k.npy x");
        for (const char* basis : {"original", "rotated"}) {
            check_runs(here, std::string("dequantize --basis ") + basis + " x a");
            const array back = read_npy(here / "a");
            REQUIRE(back.channels == 80);
            bool same = true;
            for (std::size_t i = 0; i < back.values.size(); ++i)
                if (i % 80 >= 64) same &= back.values[i] == k.values[i];
            CHECK(same);
        }
    }
    SECTION("formats without V")
    {
        write_npy(here / "k.npy", random_array(2, 70, 64, true, 11));
        check_runs(here, "quantize --format k4v0_g64 k.npy x");
        check_runs(here, "quantize --format k4v0_g64 k.npy not_read.npy y");
        CHECK(read_text(here / "x") == read_text(here / "y"));
        check_runs(here, "dequantize x a");
        check_runs(here, "inspect x");
        check_refused(here, "dequantize x a b", "holds no V");
        check_refused(here, "quantize --format k4v2_g64 k.npy z", "OUT is missing");
    }
    SECTION("two dimensions are one head")
    {
        const array k = random_array(1, 128, 64, true, 12);
        write_npy(here / "k.npy", k, true);
        write_npy(here / "k3.npy", k);
        check_runs(here, "quantize k.npy k.npy x");
        check_runs(here, "quantize k3.npy k3.npy y");
        CHECK(read_text(here / "x") == read_text(here / "y"));
    }
    SECTION("element type of the output")
    {
        write_npy(here / "k.npy", random_array(1, 130, 64, false, 13));
        check_runs(here, "quantize k.npy k.npy x");
        check_runs(here, "dequantize --dtype float16 x a b");
        CHECK(read_npy(here / "a").is_half);
        check_runs(here, "dequantize x a b");
        CHECK_FALSE(read_npy(here / "a").is_half);
    }
}

TEST_CASE("cli: existing outputs are replaced, links followed", "[program]")
{
    const workplace here;
    write_npy(here / "k.npy", random_array(1, 32, 32, true, 14));
    write_text(here / "x", "something else");
    fs::create_symlink("x", here / "link");
    check_runs(here, "quantize --format k4v2_g32 k.npy k.npy link");
    CHECK(fs::is_symlink(here / "link"));
    check_runs(here, "inspect x");
    check_runs(here, "dequantize x a k.npy");
    // A refused command leaves what was there.
    const std::string before = read_text(here / "x");
    check_refused(here, "quantize --format k4v2_g33 k.npy k.npy x", "group");
    CHECK(read_text(here / "x") == before);
}

TEST_CASE("cli: help and version succeed", "[program]")
{
    const workplace here;
    for (const char* arguments : {"--help", "quantize --help", "dequantize -h", "inspect --help", "compare --help"}) {
        const outcome result = here.run(arguments);
        CHECK(result.code == 0);
        CHECK(result.err.empty());
        CHECK(result.out.find("Usage: kvarn") != std::string::npos);
    }
    const outcome version = here.run("--version");
    CHECK(version.code == 0);
    CHECK(version.out.rfind("kvarn ", 0) == 0);
}

TEST_CASE("cli: bad arguments are refused", "[program]")
{
    const workplace here;
    write_npy(here / "k.npy", random_array(2, 128, 64, true, 15));
    write_npy(here / "odd.npy", random_array(1, 128, 63, true, 15));
    write_npy(here / "k130.npy", random_array(2, 130, 64, true, 15));
    write_npy(here / "heads.npy", random_array(1, 128, 64, true, 15));
    write_npy(here / "single.npy", random_array(2, 128, 64, false, 15));
    check_runs(here, "quantize k.npy k.npy box");
    check_runs(here, "quantize --raw k.npy k.npy raw");

    check_refused(here, "", "subcommand");
    check_refused(here, "frobnicate", "");
    check_refused(here, "quantize", "required");
    check_refused(here, "quantize k.npy k.npy", "OUT is missing");
    check_refused(here, "quantize k.npy k.npy x y", "not expected");
    check_refused(here, "quantize --bogus k.npy k.npy x", "--bogus");
    check_refused(here, "quantize --format k4v2 k.npy k.npy x", "k4v2_g128");
    check_refused(here, "quantize --format k7v2_g128 k.npy k.npy x", "bits");
    check_refused(here, "quantize --format k4v2_g100 k.npy k.npy x", "group");
    check_refused(here, "quantize --format k99999999999v2_g100 k.npy k.npy x", "format");
    check_refused(here, "quantize --encoder best k.npy k.npy x", "--encoder");
    check_refused(here, "quantize --stride wide k.npy k.npy x", "--stride");
    check_refused(here, "quantize --iterations -1 k.npy k.npy x", "--iterations");
    check_refused(here, "quantize --iterations 65 k.npy k.npy x", "--iterations");
    check_refused(here, "quantize --iterations many k.npy k.npy x", "--iterations");
    check_refused(here, "quantize --threads 0 k.npy k.npy x", "--threads");
    check_refused(here, "quantize --exact-channels 64 k.npy k.npy x", "--exact-channels");
    check_refused(here, "quantize --exact-channels -4 k.npy k.npy x", "--exact-channels");
    check_refused(here, "quantize odd.npy odd.npy x", "head_dim");
    check_refused(here, "quantize k.npy k130.npy x", "shapes do not match");
    check_refused(here, "quantize k.npy heads.npy x", "shapes do not match");
    check_refused(here, "quantize k.npy single.npy x", "element types do not match");
    check_refused(here, "quantize nothing.npy k.npy x", "nothing.npy: cannot open");
    check_refused(here, "quantize box k.npy x", "box: not a .npy file");
    check_refused(here, "quantize . k.npy x", "cannot read");
    check_refused(here, "quantize --raw k130.npy k130.npy x", "do not fill the last tile");
    check_refused(here, "quantize k.npy k.npy nowhere/x", "nowhere/x: cannot create");
    check_refused(here, "quantize k.npy k.npy .", "is a directory");

    check_refused(here, "dequantize box a", "V.npy is missing");
    check_refused(here, "dequantize box a a", "same file");
    check_refused(here, "dequantize --basis skewed box a b", "--basis");
    check_refused(here, "dequantize --dtype float64 box a b", "--dtype");
    check_refused(here, "dequantize --heads 2 box a b", "--raw");
    check_refused(here, "dequantize k.npy a b", "not a kvarn container");
    check_refused(here, "dequantize box a nowhere/b", "nowhere/b");
    check_refused(here, "dequantize box nowhere/a b", "nowhere/a");
    check_refused(here, "dequantize --raw raw a b", "needs --format");
    check_refused(here, "dequantize --raw --format k4v2_g128 --heads 0 --head-dim 64 raw a b", "--heads");
    check_refused(here, "dequantize --raw --format k4v2_g128 --heads 2 --head-dim 63 raw a b", "head_dim");
    check_refused(here, "dequantize --raw --format k4v2_g128 --heads 3 --head-dim 64 raw a b", "no whole number of tiles");
    check_refused(here, "dequantize --raw --format k4v2_g128 --heads 2 --head-dim 64 box a b", "leave out --raw");
    check_refused(here, "dequantize --raw --format k4v2_g128 --heads 2 --head-dim 64 /dev/null a b", "no whole number of tiles");

    check_refused(here, "inspect", "required");
    check_refused(here, "inspect k.npy", "not a kvarn container");
    check_refused(here, "compare k.npy", "required");
    check_refused(here, "compare --formats k2v2_g128,x k.npy k.npy", "format x");
    check_refused(here, "compare --formats '' k.npy k.npy", "formats");
    check_refused(here, "compare --formats k2v2_g128_auto k.npy k.npy", "--q is missing");
    check_refused(here, "compare --formats _auto --q k.npy k.npy k.npy", "format _auto");
    check_refused(here, "compare --formats k2v2_g256 --html x.html k.npy k.npy", "too few");
    check_refused(here, "compare --q k130.npy k.npy k.npy", "shape does not match");
    check_refused(here, "compare --html nowhere/x.html k.npy k.npy", "nowhere/x.html");
}

TEST_CASE("cli: NaN and infinity are refused wherever they are", "[program]")
{
    const workplace here;
    const array good = random_array(2, 70, 32, true, 16);
    write_npy(here / "good.npy", good);
    for (const float bad : {static_cast<float>(NAN), static_cast<float>(INFINITY)})
        for (const std::size_t at : {std::size_t{0}, std::size_t{69 * 32}, std::size_t{2 * 70 * 32 - 1}})  // tile, tail, last
            for (const bool is_half : {true, false}) {
                array a = good;
                a.is_half = is_half;
                a.values[at] = bad;
                write_npy(here / "bad.npy", a);
                check_refused(here, "quantize --format k4v2_g32 bad.npy good.npy x",
                              is_half ? "bad.npy: holds NaN" : "element types");
                check_refused(here, "quantize --format k4v2_g32 bad.npy bad.npy x", "bad.npy: holds NaN");
            }
    array huge = random_array(1, 32, 32, false, 17);
    for (float& x : huge.values) x *= 1e30f;
    write_npy(here / "huge.npy", huge);
    check_refused(here, "quantize --format k4v2_g32 huge.npy huge.npy x", "overflow");
    // Bare records have no checksum, but a scale that is not finite shows.
    write_text(here / "raw", std::string(32 * 32 / 2 + 4 * 32 + 2 * 32 + 32 * 32 / 4 + 6 * 32, '\xff'));
    check_refused(here, "dequantize --raw --format k4v2_g32 --heads 1 --head-dim 32 raw a b", "");
}

TEST_CASE("cli: truncated and altered containers are refused", "[program]")
{
    const workplace here;
    write_npy(here / "k.npy", random_array(1, 40, 32, true, 18));
    check_runs(here, "quantize --format k4v2_g32 k.npy k.npy box");
    const std::string box = read_text(here / "box");
    write_text(here / "cut", "");
    write_text(here / "altered", "");
    for (std::size_t size = 0; size < box.size(); size += size < 96 ? 5 : 97) {
        write_text(here / "cut", box.substr(0, size));
        check_refused(here, "dequantize cut a b", size == 0 ? "empty" : "truncated");
    }
    write_text(here / "cut", box + "x");
    check_refused(here, "dequantize cut a b", "more bytes");
    for (std::size_t at = 0; at < box.size(); at += at < 96 ? 3 : 83) {
        std::string altered = box;
        altered[at] = static_cast<char>(altered[at] ^ (1 << (at % 8)));
        write_text(here / "altered", altered);
        check_refused(here, at % 2 ? "inspect altered" : "dequantize altered a b", "altered: ");
    }
}

TEST_CASE("cli: a full disk is refused and leaves nothing", "[program]")
{
    if (!fs::exists("/dev/full")) return;
    const workplace here;
    write_npy(here / "k.npy", random_array(1, 160, 64, true, 19));
    check_runs(here, "quantize k.npy k.npy box");
    check_refused(here, "quantize k.npy k.npy /dev/full", "/dev/full: cannot write");
    check_refused(here, "quantize --format k4v0_g32 --raw k.npy /dev/full", "/dev/full: cannot write");
    check_refused(here, "dequantize box /dev/full b", "/dev/full: cannot write");
    check_refused(here, "dequantize box a /dev/full", "/dev/full: cannot write");
    check_refused(here, "compare --html /dev/full k.npy k.npy", "/dev/full: cannot write");
    check_refused(here, "inspect box", "standard output", "/dev/full");
    check_refused(here, "--help", "standard output", "/dev/full");
    check_refused(here, "compare --html x.html k.npy k.npy", "standard output", "/dev/full");
    CHECK(fs::is_character_file("/dev/full"));
}

TEST_CASE("cli: a signal ends the program and leaves nothing", "[program]")
{
    const workplace here;
    write_npy(here / "k.npy", random_array(1, 160, 64, true, 25));
    check_runs(here, "quantize k.npy k.npy box");
    // Nobody reads from the pipe: the program waits for that between creating K's file and writing it.
    REQUIRE(mkfifo((here / "pipe").c_str(), 0600) == 0);
    write_text(here / "other", "what was there");
    const auto before = here.files();
    const auto ended_by = [](pid_t child) {
        int status = 0;
        REQUIRE(waitpid(child, &status, 0) == child);
        return WIFSIGNALED(status) ? WTERMSIG(status) : -1;
    };
    const auto wait_for_file = [&](pid_t child) {
        const auto deadline = std::chrono::steady_clock::now() + std::chrono::seconds(60);
        while (here.files().size() == before.size() && std::chrono::steady_clock::now() < deadline) {
            REQUIRE(waitpid(child, nullptr, WNOHANG) == 0);
            std::this_thread::sleep_for(std::chrono::milliseconds(2));
        }
        CHECK(here.files().size() == before.size() + 1);
    };
    for (const int signal : {SIGHUP, SIGINT, SIGTERM}) {
        CAPTURE(signal);
        const pid_t child = here.start({"dequantize", "box", "other", "pipe"});
        REQUIRE(child > 0);
        wait_for_file(child);
        CHECK(kill(child, signal) == 0);
        CHECK(ended_by(child) == signal);
        CHECK(here.files() == before);
    }
    {
        INFO("a signal that the caller ignores, as nohup does, is still ignored");
        const pid_t child = here.start({"dequantize", "box", "other", "pipe"}, SIGHUP);
        REQUIRE(child > 0);
        wait_for_file(child);
        CHECK(kill(child, SIGHUP) == 0);
        CHECK(kill(child, SIGTERM) == 0);
        CHECK(ended_by(child) == SIGTERM);
        CHECK(here.files() == before);
    }
    {
        INFO("the reader of stdout has gone before the report gets its name");
        int ends[2];
        REQUIRE(pipe(ends) == 0);
        close(ends[0]);
        const pid_t child = here.start({"compare", "--html", "x.html", "k.npy", "k.npy"}, 0, ends[1]);
        close(ends[1]);
        REQUIRE(child > 0);
        CHECK(ended_by(child) == SIGPIPE);
        CHECK(here.files() == before);
    }
    CHECK(read_text(here / "other") == "what was there");
}

namespace {

/// K of two heads and queries of four. Head 0: two large channels of K at which no query looks; head 1: none.
void write_uneven_heads(const workplace& here)
{
    array k = random_array(2, 256, 64, true, 30), q = random_array(4, 256, 64, true, 31);
    const auto scale = [](array& a, std::size_t heads, float by) {
        for (std::size_t i = 0; i < a.values.size(); ++i) {
            if (i % 64 % 29 == 3) a.values[i] /= 8;  // random_array's own large channels
            if (i < heads * 256 * 64 && (i % 64 == 5 || i % 64 == 40)) a.values[i] *= by;
        }
    };
    scale(k, 1, 60.0f);
    scale(q, 2, 0.001f);
    write_npy(here / "k.npy", k);
    write_npy(here / "q.npy", q);
    write_npy(here / "v.npy", random_array(2, 256, 64, true, 32));
}

}  // namespace

TEST_CASE("cli: quantize lets each head choose its basis", "[program]")
{
    const workplace here;
    write_uneven_heads(here);
    check_runs(here, "quantize --format k4v4_g64_auto --q q.npy k.npy v.npy x");
    const std::string said = here.run("inspect x").out;
    CAPTURE(said);
    CHECK(said.find("format      k4v4_g64_ko, head_dim 64, rotation hadamard for V, none for K: heads 0\n") != std::string::npos);
    CHECK(said.find("            k4v4_g64, head_dim 64, rotation hadamard: heads 1\n") != std::string::npos);
    // Without queries K keeps its basis; with one format for all there is one line.
    check_runs(here, "quantize --format k4v4_g64_auto k.npy v.npy y");
    CHECK(here.run("inspect y").out.find("format      k4v4_g64, head_dim 64, rotation hadamard\n") != std::string::npos);
    check_runs(here, "quantize --format k4v4_g64 k.npy v.npy z");
    CHECK(read_text(here / "y") == read_text(here / "z"));

    // Each head's records are those of its own format, whatever the others have; threads change nothing.
    check_runs(here, "quantize --format k4v4_g64_ko k.npy v.npy ko");
    check_runs(here, "quantize --threads 3 --format k4v4_g64_auto --q q.npy k.npy v.npy by_3");
    CHECK(read_text(here / "by_3") == read_text(here / "x"));
    const std::size_t record = 2 * (64 * 64 / 2 + 64 * 6), chunk = 4 * record + 40;
    const auto head = [&](const char* name, std::size_t h) {
        const std::string file = read_text(here / name);
        return file.substr(file.size() - 48 - (2 - h) * chunk + 32, 4 * record);
    };
    CHECK(head("x", 0) == head("ko", 0));
    CHECK(head("x", 1) == head("z", 1));
    CHECK(head("x", 0) != head("z", 0));
    for (const char* basis : {"original", "rotated"}) {
        for (const char* name : {"x", "ko", "z"})
            check_runs(here, std::string("dequantize --basis ") + basis + " " + name + " k_" + name + " v_" + name);
        const array x = read_npy(here / "k_x"), ko = read_npy(here / "k_ko"), z = read_npy(here / "k_z");
        const std::ptrdiff_t half = static_cast<std::ptrdiff_t>(x.values.size() / 2);
        CHECK(std::equal(x.values.begin(), x.values.begin() + half, ko.values.begin()));
        CHECK(std::equal(x.values.begin() + half, x.values.end(), z.values.begin() + half));
    }

    check_refused(here, "quantize --format k4v4_g64_auto --raw k.npy v.npy no", "which basis each head has chosen");
    check_refused(here, "quantize --format k4v4_g64_auto --rotation none k.npy v.npy no", "nothing to choose");
    check_refused(here, "quantize --format k4v4_g64 --q q.npy k.npy v.npy no", "append _auto");
    check_refused(here, "quantize --format k4v4_g64_auto --q nothing.npy k.npy v.npy no", "nothing.npy: cannot open");
    write_npy(here / "q3.npy", random_array(3, 256, 64, true, 33));
    check_refused(here, "quantize --format k4v4_g64_auto --q q3.npy k.npy v.npy no", "shape does not match K");
    check_refused(here, "quantize --format _auto k.npy v.npy no", "format _auto");
    // Too few tokens for a tile leave the format as it is.
    const array tail = random_array(2, 70, 64, true, 34);
    write_npy(here / "t.npy", tail);
    check_runs(here, "quantize --format k4v4_g128_auto --q t.npy t.npy t.npy few");
    CHECK(here.run("inspect few").out.find("format      k4v4_g128, head_dim 64, rotation hadamard\n") != std::string::npos);
}

TEST_CASE("cli: tails of heads in different bases", "[program]")
{
    const workplace here;
    write_uneven_heads(here);
    // 250 tokens: 3 tiles of 64 and 58 left over.
    for (const char* name : {"k.npy", "v.npy", "q.npy"}) {
        const array all = read_npy(here / name);
        array cut{all.heads, 250, 64, true, {}};
        for (std::size_t h = 0; h < all.heads; ++h)
            for (std::size_t i = h * 256 * 64; i < (h * 256 + 250) * 64; ++i) cut.values.push_back(all.values[i]);
        write_npy(here / name, cut);
    }
    check_runs(here, "quantize --format k4v4_g64_auto --q q.npy k.npy v.npy x");
    CHECK(here.run("inspect x").out.find("k4v4_g64_ko") != std::string::npos);
    check_runs(here, "dequantize --dtype float32 x ko vo");
    check_runs(here, "dequantize --dtype float32 --basis rotated x kr vr");
    const array original = read_npy(here / "ko"), rotated = read_npy(here / "kr"), exact = read_npy(here / "k.npy");
    const auto tail = [](const array& a, std::size_t h) {
        const auto from = [&](std::size_t token) { return a.values.begin() + static_cast<std::ptrdiff_t>(token * 64); };
        return std::vector<float>(from(h * 250 + 192), from((h + 1) * 250));
    };
    for (std::size_t h = 0; h < 2; ++h) {
        CHECK(tail(original, h) == tail(exact, h));
        CHECK((tail(rotated, h) == tail(exact, h)) == (h == 0));
    }
}

TEST_CASE("cli: compare lets each head choose its basis by the queries", "[program]")
{
    const workplace here;
    write_uneven_heads(here);
    const outcome compared = here.run("compare --formats k4v4_g128,k4v4_g128_ko,k4v4_g128_auto --encoder refined --q q.npy k.npy v.npy");
    CAPTURE(compared.out, compared.err);
    REQUIRE(compared.code == 0);
    const auto attention_error = [&](const std::string& name) {
        const std::size_t at = compared.out.find("kvarn/refined " + name + " ");
        REQUIRE(at != std::string::npos);
        const std::string line = compared.out.substr(at, compared.out.find('\n', at) - at);
        return std::stod(line.substr(line.rfind(' ')));
    };
    CHECK(attention_error("k4v4_g128_auto") < 0.7 * attention_error("k4v4_g128"));
    CHECK(attention_error("k4v4_g128_auto") < 1.1 * attention_error("k4v4_g128_ko"));
    check_runs(here, "compare --q q.npy k.npy v.npy");
    const outcome defaults = here.run("compare --q q.npy k.npy v.npy");
    CHECK(defaults.out.find("k2v2_g128_auto") != std::string::npos);
}

TEST_CASE("cli: plan says what caches take and what fits", "[program]")
{
    const workplace here;
    const auto line_of = [](const std::string& out, const std::string& name) {
        const std::size_t at = out.find("\n" + name + " ");
        REQUIRE(at != std::string::npos);
        return out.substr(at + 1, out.find('\n', at + 1) - at - 1);
    };
    const auto words_of = [&](const std::string& out, const std::string& name) {
        std::istringstream line(line_of(out, name));
        std::vector<std::string> words;
        for (std::string w; line >> w;) {
            w.erase(std::remove(w.begin(), w.end(), ','), w.end());
            words.push_back(w);
        }
        return words;
    };
    // 32 layers x 8 heads, 1023 tiles of 13,824 bytes; a block of 128 exact tokens of 256 values for the sink, one for the tail; tables.
    const std::size_t blocks = 256u * (1023u * 13824u + 2u * 128u * 512u);
    const outcome by_name = here.run("plan llama-3.1-8b --formats k4v2_g128 --memory 8GiB");
    CAPTURE(by_name.out, by_name.err);
    REQUIRE(by_name.code == 0);
    const std::vector<std::string> words = words_of(by_name.out, "k4v2_g128");
    REQUIRE(words.size() == 15);
    const auto bytes_in = [&](const std::string& arguments) {
        const outcome out = here.run("plan llama-3.1-8b --formats k4v2_g128 " + arguments);
        CAPTURE(out.out, out.err);
        REQUIRE(out.code == 0);
        return std::stoull(words_of(out.out, "k4v2_g128").at(8));
    };
    const unsigned long long all = std::stoull(words[8]), memory = 8ull << 30;
    CHECK(all > blocks);
    CHECK(all < blocks + 200000);
    for (const char* wanted : {"17,179,869,184", "16.00 GiB", "100.0 %", "65,536"}) CHECK(line_of(by_name.out, "float16").find(wanted) != std::string::npos);
    const outcome by_numbers = here.run("plan --layers 32 --kv-heads 8 --head-dim 128 --formats k4v2_g128 --memory '8 gib'");
    CHECK(by_numbers.out == by_name.out);
    // What is said to fit does, and one token or sequence more does not.
    const unsigned long long longest = std::stoull(words[13]), most = std::stoull(words[14]);
    CHECK(bytes_in("--context " + std::to_string(longest)) <= memory);
    CHECK(bytes_in("--context " + std::to_string(longest + 1)) > memory);
    CHECK(bytes_in("--sequences " + std::to_string(most)) <= memory);
    CHECK(bytes_in("--sequences " + std::to_string(most + 1)) > memory);
    // Five exact blocks and one record block less, and what tables take of that.
    const unsigned long long longer = bytes_in("--recent 128 --step 512"), expected = all + 256u * (5u * 128u * 512u - 13824u);
    CHECK((longer > expected ? longer - expected : expected - longer) < 1000);
    check_runs(here, "plan qwen2.5-0.5b --context 1 --sequences 3 --sink 0");
    const outcome huge = here.run("plan --layers 1024 --kv-heads 1024 --head-dim 512 --context 268435456");
    CHECK(huge.out.find("PiB") != std::string::npos);
    check_refused(here, "plan --layers 1 --kv-heads 1 --head-dim 128 --context 268435456 --sequences 1048576", "more than one pool holds");
    check_refused(here, "plan", "the shape is missing");
    check_refused(here, "plan no-model", "no model 'no-model' is known");
    check_refused(here, "plan llama-3.1-8b --memory 3x", "is no size");
    check_refused(here, "plan llama-3.1-8b --memory -1GB", "is no size");
    check_refused(here, "plan llama-3.1-8b --formats k9v9", "format k9v9");
    check_refused(here, "plan llama-3.1-8b --formats ''", "formats");
    check_refused(here, "plan llama-3.1-8b --head-dim 7", "head_dim");
    check_refused(here, "plan llama-3.1-8b --context 0", "context");
}

TEST_CASE("cli: inspect and compare say what they should", "[program]")
{
    const workplace here;
    write_npy(here / "k.npy", random_array(2, 300, 128, true, 20));
    write_npy(here / "v.npy", random_array(2, 300, 128, true, 21));
    write_npy(here / "q.npy", random_array(4, 300, 128, true, 22));
    check_runs(here, "quantize k.npy v.npy box");
    const std::string inspected = here.run("inspect box").out;
    CAPTURE(inspected);
    for (const char* wanted : {"k4v2_g128", "head_dim 128", "13,824 bytes", "108.00 bytes per token and head",
                               "3.3750 bits per element", "44 in the exact float16 tail"})
        CHECK(inspected.find(wanted) != std::string::npos);

    const outcome compared = here.run("compare --formats k2v2_g128,k4v0_g64 --q q.npy --html report.html k.npy v.npy");
    CAPTURE(compared.out, compared.err);
    REQUIRE(compared.code == 0);
    CHECK(compared.err.empty());
    for (const char* wanted : {"256 of 300 tokens", "kvarn/paper k2v2_g128", "kvarn/refined k2v2_g128", "k4v0_g64", "2.3750", "rotated rtn 2-bit",
                               "kivi g32 2-bit", "kivi g128 4-bit", "rotated q8_0", "4 query heads on 2"})
        CHECK(compared.out.find(wanted) != std::string::npos);
    const std::string html = read_text(here / "report.html");
    CHECK(html.rfind("<!DOCTYPE html>", 0) == 0);
    CHECK(html.find("</html>") != std::string::npos);
    for (const char* outside : {"http://", "https://", "<script", "<link", "@import", "url(/"})
        CHECK(html.find(outside) == std::string::npos);
    std::string words;  // what is left without the pictures, which are base64 and spell anything
    for (std::size_t at = 0; at < html.size();) {
        const std::size_t picture = std::min(html.find("base64,", at), html.size());
        words += html.substr(at, picture - at);
        at = std::min(html.find('"', picture), html.size());
    }
    CHECK(words.size() < html.size() / 2);
    CHECK(words.find("nan") == std::string::npos);
    CHECK(words.find("inf\"") == std::string::npos);
}
