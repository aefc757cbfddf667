// SPDX-License-Identifier: Apache-2.0
// The example serving as a process. Nearly every run checks itself: each request again, alone, with the same tokens, bits of logits and bytes
// in its cache. Here: that what is meant to happen does happen (sharing, rollbacks, preemption, waiting for tiles), that the pool is empty at
// the end, and every error path, which must give exit code 2, one line on stderr and no file.

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <string>
#include <vector>

#include <nlohmann/json.hpp>

#include "tests/catch.hpp"
#include "tests/language_model/tiny_model.hpp"
#include "tests/support/program.hpp"

namespace {

using nlohmann::json;
using support::check_refused, support::outcome, support::read_text;

struct workplace : support::workplace {
    workplace() : support::workplace(KVARN_SERVING_PROGRAM, "serving")
    {
        tiny::spec s;
        s.vocabulary = 90;
        tiny::write_directory(*this / "m", s, tiny::random_tensors(s, 3));
        std::vector<std::int64_t> ids;
        for (const int t : tiny::random_tokens(3 * 400, s.vocabulary, 8)) ids.push_back(t);
        tiny::write(*this / "s.npy", tiny::npy_file(ids, 3, 400));
    }

    /// On the small model, checked.
    [[nodiscard]] json run_tiny(const std::string& arguments) const
    {
        return run_json("--model m --sequences s.npy --cache k3v2_g32 --sink 32 " + arguments);
    }
    [[nodiscard]] json run_json(const std::string& arguments) const
    {
        CAPTURE(arguments);
        const outcome result = run("--json --check " + arguments);
        CAPTURE(result.err);
        REQUIRE(result.code == 0);
        CHECK(result.err.empty());
        const json all = json::parse(result.out);
        CHECK(all["checked"] == true);
        return all;
    }
};

std::vector<json> ids_of(const json& run)
{
    std::vector<json> all;
    for (const json& r : run["requests"]) all.push_back(r["ids"]);
    return all;
}

/// Sum, or most, of a figure over the steps.
std::size_t sum_of(const json& run, const char* key)
{
    std::size_t n = 0;
    for (const json& m : run["moments"]) n += m[key].get<std::size_t>();
    return n;
}
std::size_t most_of(const json& run, const char* key)
{
    std::size_t n = 0;
    for (const json& m : run["moments"]) n = std::max(n, m[key].get<std::size_t>());
    return n;
}

}  // namespace

TEST_CASE("serving: walks on shared contexts, with drafts, on the default model", "[program]")
{
    const workplace here;
    const json all = here.run_json("--count 6 --contexts 2 --drafts expected --draft-accuracy 0.7 --reject 0.1 --gap 6");
    REQUIRE(all["requests"].size() == 6);
    std::size_t right = 0, generated = 0, shared = 0;
    for (const json& r : all["requests"]) {
        CHECK(r["prompt"] == 1026);
        generated += r["ids"].size();
        right += r["ids"] == r["expected"];
        shared += r["shared"].get<std::size_t>();
    }
    CHECK(right == 6);  // the model walks to the end with four bits of K
    CHECK(shared >= 1024);
    CHECK(shared % 1024 == 0);
    CHECK((all["shared_tokens"] == shared && all["generated_tokens"] == generated));
    CHECK(all["pool"]["most_shared"] >= 16);
    CHECK(all["prompt_tokens"].get<std::size_t>() == 6 * 1026 - shared);
    const std::size_t drafted = all["drafted"], accepted = all["accepted"];
    CHECK((accepted > generated / 4 && accepted < drafted));
    CHECK(sum_of(all, "decoded_tokens") + 6 == generated);
    CHECK(all["preemptions"] == 0);
}

TEST_CASE("serving: what is generated does not depend on batch, budget, threads, drafts or the pool", "[program]")
{
    const workplace here;
    const json plain = here.run_tiny("--count 10 --contexts 3 --generate 60 --running 1 --prefixes 0 --gap 0 --threads 1");
    CHECK((plain["drafted"] == 0 && plain["shared_tokens"] == 0 && plain["preemptions"] == 0));
    CHECK(most_of(plain, "running") <= 1);
    CHECK(plain["pool"]["used_at_end"] == 0);
    const std::string same = "--count 10 --contexts 3 --generate 60 --gap 0 ";
    for (const char* how : {"--running 10 --budget 17 --threads 3", "--running 4 --budget 1000 --seal-items 1 --threads 2",
                            "--running 10 --drafts ngram --draft-tokens 7 --reject 0.5", "--running 3 --drafts expected --draft-accuracy 0.1"}) {
        CAPTURE(how);
        const json other = here.run_tiny(same + how);
        CHECK(ids_of(other) == ids_of(plain));
        CHECK(most_of(other, "running") > 1);
        // Who comes while others run their prompts finds nothing to share yet.
        CHECK((other["shared_tokens"] > 0) == (most_of(other, "running") < 10));
    }
}

TEST_CASE("serving: a pool that is too small preempts, and the oldest request goes on", "[program]")
{
    const workplace here;
    const std::string same = "--count 8 --contexts 8 --generate 120 --gap 0 --running 6 ";
    const json wide = here.run_tiny(same);
    CHECK(wide["preemptions"] == 0);
    for (const char* how : {"--record-blocks 14", "--record-blocks 14 --exact-blocks 9 --threads 3 --seal-items 3", "--record-blocks 14 --drafts ngram",
                            "--record-blocks 14 --preempt save", "--record-blocks 14 --preempt save --drafts ngram --seal-items 1"}) {
        CAPTURE(how);
        const json small = here.run_tiny(same + how);
        CHECK(small["preemptions"] > 0);
        CHECK(ids_of(small) == ids_of(wide));
        CHECK((small["pool"]["most_records"] <= small["pool"]["record_blocks"] && small["pool"]["most_exact"] <= small["pool"]["exact_blocks"]));
        CHECK(sum_of(small, "preempted") == small["preemptions"]);
    }
    // Few exact blocks let few run: a sink and an open tile each.
    const json few = here.run_tiny(same + "--exact-blocks 4 --prefixes 0");
    CHECK(ids_of(few) == ids_of(wide));
    CHECK((most_of(few, "running") == 2 && most_of(wide, "running") == 6));
    check_refused(here, "--model m --sequences s.npy --cache k3v2_g32 --sink 32 --exact-blocks 1", "the pool is too small for request 0 alone");
    check_refused(here, "--model m --sequences s.npy --cache k3v2_g32 --sink 32 --record-blocks 1", "the pool is too small for request 0 alone");
}

TEST_CASE("serving: sequences wait for their tiles while others go on", "[program]")
{
    const workplace here;
    const std::string same = "--count 6 --contexts 6 --generate 80 --gap 2 ";
    const json at_once = here.run_tiny(same), slowly = here.run_tiny(same + "--seal-items 1");
    CHECK(sum_of(at_once, "sealing") == 0);
    CHECK(sum_of(slowly, "sealing") > 10);
    CHECK(ids_of(at_once) == ids_of(slowly));
    bool others_go_on = false;
    for (const json& m : slowly["moments"]) others_go_on = others_go_on || (m["sealing"] > 0 && m["decoded_tokens"] > 0);
    CHECK(others_go_on);
}

TEST_CASE("serving: exact caches, other formats, requests from a file", "[program]")
{
    const workplace here;
    for (const char* cache : {"exact", "k8v8_g64_ko", "k2v2_g128:paper+0=k4v4", "k4v4_g32"}) {
        CAPTURE(cache);
        const json all = here.run_json("--model m --sequences s.npy --count 5 --generate 190 --sink 40 --drafts expected --cache " + std::string(cache));
        CHECK((all["pool"]["tiles_sealed"] == 0) == (std::string(cache) == "exact"));
    }
    tiny::write(here / "r.json", R"([{"prompt": [5, 6, 7], "generate": 40, "arrival": 9}, {"prompt": [1], "arrival": 2},
                                     {"prompt": [5, 6, 7], "generate": 40, "arrival": 9, "expected": [1, 2, 3]}])");
    const json all = here.run_json("--model m --requests r.json --cache k4v4_g32 --sink 0 --drafts expected");
    REQUIRE(all["requests"].size() == 3);
    CHECK((all["requests"][0]["prompt"] == 1 && all["requests"][0]["ids"].size() == 16 && all["requests"][0]["first_step"] == 2));
    CHECK((all["requests"][1]["ids"].size() == 40 && all["requests"][1]["ids"] == all["requests"][2]["ids"]));
    CHECK(all["moments"][0]["step"] == 2);
    const outcome text = here.run("--model m --requests r.json");
    CHECK((text.code == 0 && text.out.find("3 requests, cache k4v2_g64") == 0 && text.out.find("check:") == std::string::npos));
    CHECK(here.run("--model m --requests r.json --check").out.find("bit for bit") != std::string::npos);
}

TEST_CASE("serving: the report is one file with everything in it", "[program]")
{
    const workplace here;
    const outcome result = here.run("--model m --sequences s.npy --cache k3v2_g32 --sink 32 --record-blocks 14 --generate 120 --gap 0 --html r.html");
    CHECK((result.code == 0 && result.err.empty()));
    CHECK(here.files() == std::vector<std::string>{"m", "r.html", "s.npy"});
    const std::string html = read_text(here / "r.html");
    CHECK(html.find("</html>") != std::string::npos);
    for (const char* part : {"Record blocks", "Exact blocks", "shared by two", "Tokens of a step", "All requests", "preempted</title>"})
        CHECK(html.find(part) != std::string::npos);
    for (const char* bad : {"nan", "inf\"", "http", "-0<"}) CHECK(html.find(bad) == std::string::npos);
}

TEST_CASE("serving: what is wrong is said in one line, and no file stays", "[program]")
{
    const workplace here;
    const std::string m = "--model m --sequences s.npy ";
    check_refused(here, "--model m", "--requests or --sequences is missing");
    check_refused(here, "--model none", "none");
    check_refused(here, m + "--cache k2v2", "there is no cache 'k2v2'");
    check_refused(here, m + "--cache rtn2", "is a round trip to compare with");
    check_refused(here, m + "--cache k2v2_g32_auto", "would take its bases from the first request");
    check_refused(here, m + "--drafts oracle", "--drafts");
    check_refused(here, m + "--preempt never", "--preempt");
    check_refused(here, m + "--budget 0", "--budget");
    check_refused(here, m + "--running 0", "--running");
    check_refused(here, m + "--reject 1.5", "--reject");
    check_refused(here, m + "--threads 0", "--threads");
    check_refused(here, m + "--requests r.json", "--sequences");
    check_refused(here, "--model m --requests none.json", "none.json: cannot open");
    check_refused(here, m + "--unknown", "--unknown");
    const auto says = [&](const std::string& content, const std::string& reason) {
        tiny::write(here / "r.json", content);
        check_refused(here, "--model m --requests r.json", reason);
    };
    says("{", "r.json");
    says("{}", "r.json: it is no list of requests");
    says("[]", "r.json: it is no list of requests");
    says("[3]", "request 0 is no object");
    says(R"([{"generate": 3}])", "request 0: it has no prompt");
    says(R"([{"prompt": []}])", "request 0: it has no prompt");
    says(R"([{"prompt": 3}])", "request 0: 'prompt' is no list of token ids");
    says(R"([{"prompt": [1]}, {"prompt": [90]}])", "request 1: 'prompt' holds what is no token of the model, which has 0 to 89");
    says(R"([{"prompt": [-1]}])", "holds what is no token");
    says(R"([{"prompt": [1.5]}])", "holds what is no token");
    says(R"([{"prompt": [1], "generate": 0}])", "'generate' is no whole number from 1");
    says(R"([{"prompt": [1], "arrival": -1}])", "'arrival' is no whole number from 0");
    says(R"([{"prompt": [1], "prio": 1}])", "'prio' is not known");
    check_refused(here, m + "--html no/such/folder/r.html", "cannot create");
    if (std::filesystem::exists("/dev/full")) {
        check_refused(here, m + "--count 2 --generate 4 --html /dev/full", "cannot write");
        check_refused(here, m + "--count 2 --generate 4", "standard output: cannot write", "/dev/full");
        check_refused(here, m + "--count 2 --generate 4 --html r.html", "standard output: cannot write", "/dev/full");
    }
}
