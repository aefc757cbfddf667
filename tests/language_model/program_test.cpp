// SPDX-License-Identifier: Apache-2.0
// The example language_model as a process: what it prints, that the exact cache walks to the end and quantized ones do worse in
// the right order, and every error path, which must give exit code 2, one line on stderr and no file.

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <map>
#include <string>
#include <vector>

#include <sys/wait.h>

#include <nlohmann/json.hpp>

#include "tests/catch.hpp"
#include "tests/support/program.hpp"
#include "tiny_model.hpp"

namespace {

namespace fs = std::filesystem;
using nlohmann::json;

using support::check_refused, support::outcome, support::read_text;

struct workplace : support::workplace {
    workplace() : support::workplace(KVARN_LANGUAGE_MODEL_PROGRAM, "language_model") {}
};

json run_json(const workplace& here, const std::string& arguments)
{
    CAPTURE(arguments);
    const outcome result = here.run("--json " + arguments);
    CAPTURE(result.err);
    REQUIRE(result.code == 0);
    CHECK(result.err.empty());
    return json::parse(result.out);
}

}  // namespace

TEST_CASE("language_model: the exact cache walks to the end, coarser ones do not", "[program]")
{
    const workplace here;
    const json list = run_json(here, "--limit 2 --caches exact,rtn2,k2v2_g128:paper,k2v2_g128:refined");
    REQUIRE(list.size() == 4);
    std::map<std::string, json> by_name;
    for (const json& one : list) by_name[one["cache"]] = one;
    const json &exact = by_name["exact"], &rtn = by_name["rtn2"], &paper = by_name["k2v2_g128:paper"],
               &refined = by_name["k2v2_g128:refined"];
    CHECK((exact["hops"] == 511.0 && exact["full_walks"] == 2 && exact["sequences"] == 2 && exact["accuracy"] == 1.0 &&
           exact["kl"] == 0.0));
    CHECK(exact["nll"] < 0.002);
    CHECK((exact["bits_per_element"] == 16.0 && exact["bits_per_element_total"] == 16.0 && exact["bytes"] == 3 * 1536 * 512));
    CHECK((paper["bits_per_element"] == 2.375 && paper["bytes"] == 3 * (128 * 512 + 11 * 9728)));
    CHECK(paper["bits_per_element_total"].get<double>() == Approx(8.0 * (128 * 512 + 11 * 9728) / (256.0 * 1536)));
    CHECK(rtn["hops"] < paper["hops"]);
    CHECK(paper["hops"] < exact["hops"]);
    CHECK(paper["hops"] < refined["hops"]);
    CHECK(exact["nll"] < refined["nll"]);
    CHECK(refined["nll"] < paper["nll"]);
    CHECK(paper["nll"] < rtn["nll"]);
    CHECK(refined["kl"] < paper["kl"]);
    CHECK(paper["kl"] < rtn["kl"]);
    CHECK((paper["hops_of_sequences"].size() == 2 && paper["nll_of_sequences"].size() == 2));
    CHECK(!paper.contains("blocks"));
}

TEST_CASE("language_model: modes, sinks and what they print", "[program]")
{
    const workplace here;
    const json pseudo = run_json(here, "--limit 1 --mode pseudo --caches k2v2_g128:paper");
    REQUIRE(pseudo[0]["blocks"].size() == 12);
    CHECK((!pseudo[0].contains("nll") && !pseudo[0].contains("hops")));
    const json& last = pseudo[0]["blocks"].back();
    CHECK((last["context"] == 1536 && last["tokens"] == 128));
    for (const char* error : {"attention_error", "key_error", "value_error"}) {
        const double fixed = last[error]["static"], accumulated = last[error]["accumulated"];
        CHECK((fixed > 0.05 && accumulated > fixed && accumulated < 1));
        CHECK(last[error]["accumulation"].get<double>() == Approx(accumulated - fixed));
    }
    for (const char* scale : {"key_token_scale", "value_token_scale"})
        for (const char* run : {"static", "accumulated"}) {
            const json& s = last[scale][run];
            CHECK((s["mean"] > 0 && s["mean"] < s["p99"] && s["p99"] <= s["worst"]));
        }
    CHECK(last["kl"] > 0);
    CHECK(run_json(here, "--limit 1 --mode teacher --caches rtn2 --sink 256")[0]["bytes"] == 3 * (256 * 512 + 1280 * 72));

    const outcome text = here.run("--limit 1 --mode greedy --caches exact,rtn3");
    CHECK(text.code == 0);
    CHECK(text.out.find("rtn3 ") != std::string::npos);
    CHECK(text.out.find("511.0") != std::string::npos);
    CHECK(text.out.find("NLL") == std::string::npos);
    const outcome help = here.run("--help");
    CHECK((help.code == 0 && help.out.find("--sequences") != std::string::npos));
    CHECK(here.run("--version").out.find("kvarn ") == 0);
}

TEST_CASE("language_model: any model of the known kinds, against its own exact continuation", "[program]")
{
    const workplace here;
    const tiny::spec s;
    tiny::write_directory(here / "m", s, tiny::random_tensors(s, 3), true);
    std::vector<std::int64_t> ids;
    for (const int t : tiny::random_tokens(2 * 200, s.vocabulary, 8)) ids.push_back(t);
    tiny::write(here / "s.npy", tiny::npy_file(ids, 2, 200));
    const json list = run_json(
        here, "--model m --sequences s.npy --sink 16 --caches exact,k2v2_g32,k8v8_g32 --prompt 120 --mode teacher,greedy");
    CHECK((list[0]["predicted"] == 80 && list[0]["hops"] == 80.0 && list[0]["reference"] == "exact"));
    CHECK(list[1]["hops"] < 80.0);
    CHECK(list[2]["kl"] < list[1]["kl"]);
    CHECK((list[1]["scored"] == 160 && list[1]["from"] == 120 && list[1]["positions"].size() == 1));
    // By default the likelihoods alone, from the middle of a short text on.
    const json teacher = run_json(here, "--model m --sequences s.npy --caches k2v2_g32,exact,k8v8_g32 --sink 16");
    CHECK((teacher[0]["from"] == 100 && teacher[0]["scored"] == 200 && !teacher[0].contains("hops")));
    const json early = run_json(here, "--model m --sequences s.npy --caches k2v2_g32,exact,k8v8_g32 --sink 16 --from 20")[0];
    CHECK((early["from"] == 20 && early["scored"] == 360));
    REQUIRE(early["positions"].size() == 3);
    CHECK((early["positions"][1]["first"] == 64 && early["positions"][1]["end"] == 128));
    CHECK((early["kl_worst"] >= early["kl_p999"] && early["kl_p999"] >= early["kl_p99"] && early["kl_p99"] > early["kl"]));
    CHECK((early["agreement"] > 0.0 && early["agreement"] < 1.0 && early["kl_error"] > 0.0 &&
           early["kl_of_sequences"].size() == 2));
    CHECK((early["less"].size() == 2 && early["less"][0]["cache"] == "exact"));
    CHECK(early["less"][0]["kl"].get<double>() == Approx(early["kl"].get<double>()));
    CHECK(early["less"][0]["nll"].get<double>() == Approx(early["excess_nll"].get<double>()));
    CHECK(early["less"][1]["kl"].get<double>() > 0);
    check_refused(here, "--model m --caches exact", "--sequences is missing");
    check_refused(here, "--model m --sequences s.npy --from 200", "leave nothing to predict");
    check_refused(here, "--model m --sequences s.npy --caches exact --against q4_0", "'q4_0' is none of the --caches");
    check_refused(here, "--model m --sequences s.npy --caches exact --mode greedy --csv t.csv", "--csv");

    const outcome text =
        here.run("--model m --sequences s.npy --sink 16 --from 20 --caches exact,k2v2_g32,k8v8_g32 --against k8v8_g32 "
                 "--csv t.csv --html t.html");
    CHECK((text.code == 0 && text.err.empty()));
    for (const char* part :
         {"top-1", "KL of sequence", "KL at positions", "64..127", "excess NLL at positions", "less k8v8_g32, paired", "99.9 %"})
        CHECK(text.out.find(part) != std::string::npos);
    const std::string csv = read_text(here / "t.csv");
    CHECK(std::count(csv.begin(), csv.end(), '\n') == 1 + 3 * 2 * 3);
    CHECK(csv.find("\nk2v2_g32,") != std::string::npos);
    const std::string html = read_text(here / "t.html");
    for (const char* part :
         {"Likelihood against position", "KL by sequence", "KL by position", "Paired with k8v8_g32", "All numbers"})
        CHECK(html.find(part) != std::string::npos);
    for (const char* bad : {"Hops", "Greedy", "nan", "inf\"", "Attention error"}) CHECK(html.find(bad) == std::string::npos);
    const json bases = run_json(here, "--model m --sequences s.npy --mode teacher --sink 16 --caches k2v2_g32_ko,k2v2_g32_auto");
    CHECK((bases[0]["kl"] > 0.0 && bases[1]["kl"] > 0.0 && bases[0]["bytes"] == bases[1]["bytes"]));
}

TEST_CASE("language_model: continuations to read", "[program]")
{
    const workplace here;
    tiny::spec s;
    s.vocabulary = 300;
    tiny::write_directory(here / "m", s, tiny::random_tensors(s, 4));
    std::vector<std::int64_t> ids;
    for (const int t : tiny::random_tokens(2 * 100, s.vocabulary, 9)) ids.push_back(t);
    tiny::write(here / "s.npy", tiny::npy_file(ids, 2, 100));
    const std::string arguments = "--model m --sequences s.npy --sink 16 --caches k2v2_g32,exact --prompt 90 --generate 30";
    const json list = run_json(here, arguments);
    REQUIRE(list.size() == 4);
    for (const json& one : list) CHECK((one["ids"].size() == 30 && one["given"] == 90 && !one.contains("text")));
    CHECK((list[1]["agreeing"] == 30 && list[3]["agreeing"] == 30 && list[1]["sequence"] == 0 && list[3]["sequence"] == 1));
    // What the exact cache says is its own greedy walk, which the mode greedy compares with.
    const json walk = run_json(here, "--model m --sequences s.npy --sink 16 --caches k2v2_g32,exact --prompt 90 --mode greedy");
    CHECK(walk[0]["hops_of_sequences"][0] == std::min(10, list[0]["agreeing"].get<int>()));
    CHECK(here.run(arguments).out.find("no tokenizer.json") != std::string::npos);

    // A byte-level vocabulary: every id is a byte or a word.
    json vocabulary = json::object();
    for (int id = 0; id < 300; ++id) vocabulary["\u0120w" + std::to_string(id)] = id;
    tiny::write(here / "m" / "tokenizer.json",
                json{{"model", {{"vocab", vocabulary}}}, {"decoder", {{"type", "ByteLevel"}}}}.dump());
    const json with_text = run_json(here, arguments);
    std::string expected;
    for (const json& id : list[1]["ids"]) expected += " w" + std::to_string(id.get<int>());
    CHECK(with_text[1]["text"] == expected);
    CHECK(here.run(arguments).out.find(expected) != std::string::npos);
    tiny::write(here / "m" / "tokenizer.json", "{}");
    check_refused(here, arguments, "tokenizer.json: it holds no vocabulary");
    check_refused(here, arguments + " --mode greedy", "--mode");
}

TEST_CASE("language_model: new walks", "[program]")
{
    const workplace here;
    const json a = run_json(here, "--walks 2 --caches exact"), b = run_json(here, "--walks 2 --seed 2 --caches exact");
    CHECK((a[0]["hops"] == 511.0 && a[0]["full_walks"] == 2 && a[0]["sequences"] == 2));
    CHECK(b[0]["hops"] == 511.0);
    CHECK(a[0]["nll"] != b[0]["nll"]);
    CHECK(run_json(here, "--walks 2 --seed 1 --mode teacher --caches exact")[0]["nll"] == a[0]["nll"]);
    check_refused(here, "--walks 0", "--walks");
    check_refused(here, "--walks 2 --sequences s.npy", "--sequences");
    check_refused(here, "--walks 2 --limit 1", "--limit");
    check_refused(here, "--seed 3", "--seed");
}

TEST_CASE("language_model: a rule for everything is another format", "[program]")
{
    const workplace here;
    const json list =
        run_json(here, "--limit 1 --mode teacher --caches k2v2_g128:refined+*/*=k3v4,k3v4_g128:refined,k2v2_g128:refined+1=k3v4");
    for (const char* key : {"nll", "kl", "bits_per_element", "bytes"}) CHECK(list[0][key] == list[1][key]);
    CHECK(list[2]["kl"] != list[1]["kl"]);
    CHECK(list[2]["bytes"] < list[1]["bytes"]);
}

TEST_CASE("language_model: decoding survives the refined encoder, and no other method of two bits", "[accuracy]")
{
    const workplace here;
    const json list = run_json(here, "--caches exact,rtn2,rotated_rtn2,kivi2_g128,k2v2_g128:paper,k2v2_g128:refined");
    std::map<std::string, json> by_name;
    for (const json& one : list) {
        by_name[one["cache"]] = one;
        std::printf("%-18s %5.3f bits  nll %.5f  kl %.5f  hops %5.1f  full walks %d of %d\n",
                    one["cache"].get<std::string>().c_str(), one["bits_per_element"].get<double>(), one["nll"].get<double>(),
                    one["kl"].get<double>(), one["hops"].get<double>(), one["full_walks"].get<int>(),
                    one["sequences"].get<int>());
    }
    const auto value = [&](const char* cache, const char* key) { return by_name[cache][key].get<double>(); };
    const double exact = value("exact", "nll"), paper = value("k2v2_g128:paper", "nll"),
                 refined = value("k2v2_g128:refined", "nll");
    CHECK(value("exact", "full_walks") == 16);
    CHECK(refined - exact <= 0.2 * (paper - exact));
    CHECK(value("k2v2_g128:refined", "hops") >= 440);
    CHECK(value("k2v2_g128:refined", "full_walks") >= 12);
    for (const char* other : {"rtn2", "rotated_rtn2", "kivi2_g128"}) {
        CHECK(value(other, "nll") > paper);
        CHECK(value(other, "kl") > value("k2v2_g128:paper", "kl"));
        CHECK(value(other, "hops") < value("k2v2_g128:paper", "hops"));
    }
}

TEST_CASE("language_model: the report is one file with everything in it", "[program]")
{
    const workplace here;
    const outcome result = here.run("--limit 1 --html r.html --caches exact,rtn2,k2v2_g128:paper");
    CHECK((result.code == 0 && result.err.empty()));
    CHECK(here.files() == std::vector<std::string>{"r.html"});
    const std::string html = read_text(here / "r.html");
    CHECK(html.find("</html>") != std::string::npos);
    for (const char* part : {"Hops survived", "Likelihood against bits", "Attention error against context length",
                             "Error of the token scales", "All numbers"})
        CHECK(html.find(part) != std::string::npos);
    for (const char* bad : {"nan", "inf\"", "http", "-0<"}) CHECK(html.find(bad) == std::string::npos);
    // With an exact cache alone there are no errors to draw.
    CHECK(here.run("--limit 1 --html e.html --caches exact").code == 0);
    CHECK(read_text(here / "e.html").find("Attention error") == std::string::npos);
}

TEST_CASE("language_model: what is wrong is said in one line, and no file stays", "[program]")
{
    const workplace here;
    const std::string good = read_text(KVARN_POINTER_CHASE_DATA "/model.safetensors");
    tiny::write(here / "cut.safetensors", good.substr(0, good.size() / 2));
    tiny::write(here / "cut_header.safetensors", good.substr(0, 100));
    fs::create_directories(here / "empty");
    const auto npy = [&](const char* name, const std::vector<std::int32_t>& ids, std::size_t rows, std::size_t columns) {
        tiny::write(here / name, tiny::npy_file(ids, rows, columns));
    };
    npy("none.npy", {}, 0, 1537);
    npy("short.npy", std::vector<std::int32_t>(12, 5), 2, 6);
    npy("large.npy", {1, 2, 3, 4, 1025, 6, 7}, 1, 7);
    npy("negative.npy", {1, 2, -3, 4, 5, 6, 7}, 1, 7);
    std::string flat = tiny::npy_file(std::vector<std::int32_t>(7, 1), 1, 7);
    tiny::write(here / "flat.npy", flat.replace(flat.find("(1, 7)"), 6, "(7,)  "));
    tiny::write(here / "floats.npy", flat.replace(flat.find("<i4"), 3, "<f4"));

    check_refused(here, "--caches k2v2", "there is no cache 'k2v2'");
    check_refused(here, "--caches ''", "there is no cache ''");
    check_refused(here, "--caches exact,k2v2_g128:best", "there is no encoder 'best'");
    check_refused(here, "--caches exact,exact", "twice");
    check_refused(here, "--model missing.safetensors", "missing.safetensors: cannot open");
    check_refused(here, "--model empty", "empty: there is neither model.safetensors nor");
    check_refused(here, "--model cut.safetensors", "cut.safetensors: model.");
    check_refused(here, "--model cut_header.safetensors", "cut_header.safetensors: not a usable safetensors file");
    check_refused(here, "--model flat.npy", "flat.npy: not a usable safetensors file");
    tiny::write(here / "m.gguf", "GGUF" + std::string(100, '\3'));
    fs::create_directories(here / "gguf");
    fs::copy_file(here / "m.gguf", here / "gguf" / "weights.bin");
    check_refused(here, "--model m.gguf", "m.gguf: this is a GGUF file; convert it by");
    check_refused(here, "--model gguf", "weights.bin: this is a GGUF file");
    check_refused(here, "--sequences missing.npy", "missing.npy: cannot open");
    check_refused(here, "--sequences none.npy", "none.npy: the array is empty");
    check_refused(here, "--sequences short.npy", "short.npy: sequences of 6 tokens are no walks");
    check_refused(here, "--sequences large.npy", "large.npy: sequence 0, token 4 is 1025");
    check_refused(here, "--sequences negative.npy", "negative.npy: sequence 0, token 2 is -3");
    check_refused(here, "--sequences flat.npy", "1 dimensions");
    check_refused(here, "--sequences floats.npy", "only little-endian int32");
    check_refused(here, "--prompt 1537", "leave nothing to predict");
    check_refused(here, "--prompt 0", "--prompt");
    check_refused(here, "--mode fast", "--mode");
    check_refused(here, "--iterations 65", "--iterations");
    check_refused(here, "--sink -1", "--sink");
    check_refused(here, "--unknown", "--unknown");
    check_refused(here, "--limit 1 --caches exact --html no/such/folder/r.html", "cannot create");
    check_refused(here, "--limit 1 --caches exact --html empty", "is a directory");
    if (fs::exists("/dev/full")) {
        check_refused(here, "--limit 1 --caches exact --html /dev/full", "cannot write");
        check_refused(here, "--limit 1 --caches exact --mode greedy", "standard output: cannot write", "/dev/full");
        check_refused(here, "--limit 1 --caches exact --html r.html", "standard output: cannot write", "/dev/full");
    }
}
