// SPDX-License-Identifier: Apache-2.0
// serving: a scheduler of many requests over one pool of quantized caches, without network. Exit code 0, or 2 with one line on stderr.

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include <CLI/CLI.hpp>

#include <kvarn/version.hpp>

#include "../common/arguments.hpp"
#include "../common/files.hpp"
#include "../common/npy.hpp"
#include "../common/program.hpp"
#include "../common/threads.hpp"
#include "check.hpp"
#include "report.hpp"

namespace {

using namespace serving;

constexpr const char* pointer_task = "pointer chasing";  // what the metadata of such a model say

struct options {
    std::string model = KVARN_POINTER_CHASE_DATA "/model.safetensors", sequences, requests, cache = "k4v2_g64";
    std::string drafts = "none", preempt = "again", html;
    traffic made_up;
    schedule_options schedule;
    language_model::plan_options plan;
    std::size_t record_blocks = 0, exact_blocks = 0, seal_items = 0;  // 0: enough, enough, all
    unsigned threads = 0;
    bool check = false, json = false;
};

std::vector<tokens> read_texts(const std::string& path, std::size_t vocabulary)
{
    const kvarn_cli::integer_table table = kvarn_cli::parse_npy_integers(kvarn_cli::read_file(path), path);
    std::vector<tokens> texts(table.rows);
    for (std::size_t i = 0; i < table.rows * table.columns; ++i) {
        const std::int64_t id = table.values[i];
        if (id < 0 || static_cast<std::uint64_t>(id) >= vocabulary)
            throw failure(text("%s: it holds the token %lld, the model has 0 to %zu", path.c_str(), static_cast<long long>(id), vocabulary - 1));
        texts[i / table.columns].push_back(static_cast<std::int32_t>(id));
    }
    return texts;
}

std::vector<request> requests_of(const options& given, const language_model::model& m)
{
    const std::size_t vocabulary = m.config.vocabulary;
    if (!given.requests.empty()) return parse_requests(language_model::model_detail::read_json(given.requests), vocabulary, given.requests);
    if (!given.sequences.empty()) return text_requests(given.made_up, read_texts(given.sequences, vocabulary));
    if (m.config.task != pointer_task || vocabulary < 5)
        throw failure("--requests or --sequences is missing: walks are made up for the pointer-chasing model, not for " + given.model);
    return walk_requests(given.made_up, (vocabulary - 1) / 2);
}

language_model::cache_plan plan_for(const options& given, const language_model::model_config& c)
{
    language_model::plan_options of_model = given.plan;
    of_model.layers = c.layers;
    of_model.kv_heads = c.kv_heads;
    const auto plan = language_model::plan_of(given.cache, c.head_dim, of_model);
    if (plan.storage == language_model::storage::round_trip)
        throw failure("--cache: " + given.cache + " is a round trip to compare with, not a format of records");
    if (plan.choose_basis)
        throw failure("--cache: " + given.cache + " would take its bases from the first request; name them, as in k4v2_g64_ko");
    return plan;
}

void run_serving(options& given)
{
    const language_model::model m = language_model::read_model(given.model);
    const language_model::cache_plan plan = plan_for(given, m.config);
    outcome result;
    result.requests = requests_of(given, m);
    std::size_t longest = 0;
    for (const request& r : result.requests) longest = std::max(longest, r.prompt.size() + r.generate);

    schedule_options& how = given.schedule;
    how.saves = given.preempt == "save";
    how.drafts.source = given.drafts == "ngram" ? draft_source::ngram : given.drafts == "expected" ? draft_source::expected : draft_source::none;
    how.drafts.seed = given.made_up.seed;
    if (given.seal_items != 0) how.seal_items = given.seal_items;
    kvarn::cache_config config = config_for(plan, m.config, longest, how.running + how.prefixes, how.running);
    if (given.record_blocks != 0) config.record_blocks = given.record_blocks;
    if (given.exact_blocks != 0) config.exact_blocks = given.exact_blocks;

    std::optional<kvarn_cli::output_file> html;
    if (!given.html.empty()) html.emplace(given.html);
    language_model::team helpers(given.threads);
    engine e(m, config, helpers);
    scheduler s(e, result.requests, how);
    {
        kvarn_cli::progress shown("serving");
        s.run([&](std::size_t done) { shown.show(done, result.requests.size(), "requests"); });
    }
    result.answers = s.answers();
    result.moments = s.moments();
    result.config = e.pool().config();
    result.plan = e.pool().plan();
    if (given.check) check_answers(m, plan, result.requests, result.answers, given.threads);
    result.checked = given.check;
    result.facts = text("%zu requests, cache %s with a sink of %zu tokens, up to %zu sequences and %zu tokens a step, %zu thread%s",
                        result.requests.size(), plan.name.c_str(), std::min(plan.sink, longest), how.running, how.budget, helpers.threads(),
                        helpers.threads() == 1 ? "" : "s");
    if (html) {
        html->write(html_report(result));
        html->finish();
    }
    kvarn_cli::print(given.json ? json_report(result) : text_report(result));
    if (html) html->commit();
}

int run(int argc, char** argv)
{
    CLI::App app(
        "Serves many requests to a language model from one pool of quantized KV caches: continuous batching, prompts in\n"
        "chunks beside decoding, prefixes shared by fork, speculative decoding, preemption where the pool is full. No network:\n"
        "requests come from a file, or are made up from a seed. Exit code 0, or 2 with one line on stderr.",
        "serving");
    app.set_version_flag("--version", "kvarn " KVARN_VERSION_STRING);
    options given;
    const auto number = [&](const char* name, auto& to, const char* what, std::size_t least, std::size_t most) {
        return app.add_option(name, to, what)->type_name("N")->check(CLI::Range(least, most));
    };
    app.add_option("--model", given.model, "as for language_model: a .safetensors file, or a directory (default: the pointer-chasing model)")
        ->type_name("PATH");
    CLI::Option* const requests =
        app.add_option("--requests", given.requests, "JSON: a list of {\"prompt\": [ids], \"generate\": n, \"arrival\": step, \"expected\": [ids]}")
            ->type_name("FILE");
    app.add_option("--sequences", given.sequences, ".npy of int32 or int64 [sequences, tokens]: prompts are their beginnings (default: new walks)")
        ->type_name("FILE")
        ->excludes(requests);
    number("--count", given.made_up.count, "requests that are made up (default 12)", 1, 1 << 16)->excludes(requests);
    number("--contexts", given.made_up.contexts, "different texts or walks that they begin with (default 3)", 1, 1 << 16)->excludes(requests);
    number("--generate", given.made_up.generate, "tokens that they ask for, at most (default 24)", 1, 1 << 16)->excludes(requests);
    number("--gap", given.made_up.gap, "steps between two of them, at most (default 3)", 0, 1 << 16)->excludes(requests);
    app.add_option("--seed", given.made_up.seed, "of requests that are made up, and of drafts (default 1)")->type_name("N");
    app.add_option("--cache", given.cache, "exact, or k<bits>v<bits>_g<group> as language_model has them (default k4v2_g64)")->type_name("NAME");
    number("--sink", given.plan.sink, "tokens at the start that stay exact, rounded up to whole tiles (default 128)", 0, 1 << 24);
    number("--record-blocks", given.record_blocks, "of the pool (default: enough for all sequences)", 1, 1 << 24);
    number("--exact-blocks", given.exact_blocks, "of the pool (default: enough for all sequences)", 1, 1 << 24);
    number("--running", given.schedule.running, "sequences at once (default 8)", 1, 1 << 12);
    number("--budget", given.schedule.budget, "tokens of a step, prompts and decoding together (default 256)", 1, 1 << 16);
    number("--prefixes", given.schedule.prefixes, "prompts that are kept, so that later ones share their blocks (default 4)", 0, 1 << 12);
    number("--seal-items", given.seal_items, "pieces of tiles (a layer of a KV head) that a step seals (default: all)", 1, 1 << 24);
    app.add_option("--drafts", given.drafts,
                   "speculative decoding. ngram: what followed the newest tokens before; expected: the expected text with errors, as a draft model "
                   "of that accuracy would write it (default none)")
        ->type_name("none|ngram|expected")
        ->check(CLI::IsMember({"none", "ngram", "expected"}));
    number("--draft-tokens", given.schedule.drafts.most, "at once (default 4)", 1, 1 << 10);
    const auto share = [&](const char* name, double& to, const char* what) {
        app.add_option(name, to, what)->type_name("X")->check(CLI::Range(0.0, 1.0));
    };
    share("--draft-accuracy", given.schedule.drafts.accuracy, "expected: the share of drafts that are left right (default 0.8)");
    share("--reject", given.schedule.drafts.rejection, "the share of right drafts that are rejected all the same (default 0)");
    app.add_option("--preempt", given.preempt, "again: what a preempted request knew is run again; save: its cache is saved and loaded (default again)")
        ->type_name("again|save")
        ->check(CLI::IsMember({"again", "save"}));
    app.add_option("--threads", given.threads, "threads (default: one per core)")->type_name("N")->check(CLI::Range(1, 1024));
    app.add_flag("--check", given.check, "run every request again, alone, and compare tokens, logits and caches bit for bit");
    app.add_flag("--progress", kvarn_cli::progress::as_lines, "progress and time left as lines on stderr, even if it is no terminal");
    app.add_flag("--json", given.json, "print JSON instead of tables");
    app.add_option("--html", given.html, "also write a report, one self-contained file")->type_name("FILE");
    if (!kvarn_cli::parse_arguments(app, argc, argv)) return 0;
    run_serving(given);
    return 0;
}

}  // namespace

int main(int argc, char** argv)
{
    return kvarn_cli::run_program("serving", [&] { return run(argc, argv); });
}
