// SPDX-License-Identifier: Apache-2.0
// language_model: runs a language model with exact and quantized caches and reports how decoding suffers.
// Exit code 0, or 2 with one line on stderr.

#include <algorithm>
#include <filesystem>
#include <limits>
#include <optional>
#include <string>

#include <CLI/CLI.hpp>

#include <kvarn/version.hpp>

#include "../common/arguments.hpp"
#include "../common/files.hpp"
#include "../common/npy.hpp"
#include "../common/program.hpp"
#include "evaluate.hpp"
#include "figures.hpp"
#include "generate.hpp"
#include "model.hpp"
#include "report.hpp"
#include "walks.hpp"

namespace {

using namespace language_model;

constexpr const char* pointer_task = "pointer chasing";  // what the metadata of such a model say

constexpr const char* pointer_caches = "exact,rtn2,rotated_rtn2,kivi2_g128,kivi2_g32,rotated_q4_0,k2v2_g128:paper,k2v2_g128:"
                                       "refined,k4v2_g128:paper,k4v2_g128:refined";
constexpr const char* language_caches = "exact,k2v2_g128_auto,k3v2_g128_auto,k4v2_g128_auto,k4v4_g128_auto,k2v2_g128,k4v4_g128,"
                                        "k2v2_g128:paper,kivi2_g32,turboquant4,q4_0,"
                                        "rotated_q4_0";

struct options {
    std::string model = KVARN_POINTER_CHASE_DATA "/model.safetensors", sequences = KVARN_POINTER_CHASE_DATA "/sequences.npy";
    std::string caches;              // empty: the default of the kind of model
    std::vector<std::string> modes;  // empty: the default
    std::string html, csv, against;
    std::size_t prompt = 0, from = 0, limit = 0, walks = 0, generate = 0;  // 0: the default, or none
    std::uint64_t seed = 1;
    plan_options plans;
    unsigned threads = 0;
    bool json = false;
};

/// The sequences as token ids of the model.
std::vector<tokens> read_sequences(const options& given, std::size_t vocabulary)
{
    const kvarn_cli::integer_table table = kvarn_cli::parse_npy_integers(kvarn_cli::read_file(given.sequences), given.sequences);
    const std::size_t count = given.limit == 0 ? table.rows : std::min(table.rows, given.limit);
    std::vector<tokens> sequences(count);
    for (std::size_t i = 0; i < count; ++i)
        for (std::size_t t = 0; t < table.columns; ++t) {
            const std::int64_t id = table.values[i * table.columns + t];
            if (id < 0 || static_cast<std::uint64_t>(id) >= vocabulary)
                throw failure(text("%s: sequence %zu, token %zu is %lld, the model has tokens 0 to %zu", given.sequences.c_str(),
                                   i, t, static_cast<long long>(id), vocabulary - 1));
            sequences[i].push_back(static_cast<std::int32_t>(id));
        }
    return sequences;
}

/// How many tokens are given: the context and the first token of the walk, or half of any other text, unless --prompt says.
std::size_t known_tokens(const options& given, std::size_t length, bool is_pointer_chase)
{
    if (given.prompt != 0) {
        if (given.prompt >= length)
            throw failure(text("--prompt: %zu tokens leave nothing to predict of %zu", given.prompt, length));
        return given.prompt;
    }
    if (is_pointer_chase && (length % 3 != 1 || length < 7))
        throw failure(text("%s: sequences of %zu tokens are no walks: 2 n + 1 tokens of context and n of the walk are 3 n + 1",
                           given.sequences.c_str(), length));
    if (length < 2) throw failure(given.sequences + ": sequences of one token leave nothing to predict");
    return is_pointer_chase ? (length - 1) / 3 * 2 + 2 : length / 2;
}

/// The first token whose prediction counts: as --from says, the first that is not given, or the 256th of a long text.
std::size_t first_scored(const options& given, const experiment& e)
{
    if (given.from >= e.length())
        throw failure(text("--from: tokens from %zu on leave nothing to predict of %zu", given.from, e.length()));
    if (given.from != 0) return given.from;
    return e.truth || given.prompt != 0 ? e.known : std::min<std::size_t>(256, e.known);
}

/// As --mode says. Single steps and pseudo-decoding take long with a large model: by default they run on the pointer-chasing one only.
modes modes_of(const options& given, bool is_pointer_chase)
{
    const auto wanted = [&](const char* mode) {
        return std::find(given.modes.begin(), given.modes.end(), mode) != given.modes.end();
    };
    if (given.modes.empty()) return {true, is_pointer_chase, is_pointer_chase && !given.html.empty()};
    return {wanted("teacher"), wanted("greedy"), wanted("pseudo")};
}

/// The cache that the others are paired with: the one asked for, or the first that is not exact.
std::size_t paired_cache(const options& given, const std::vector<cache_plan>& plans)
{
    for (std::size_t i = 0; i < plans.size(); ++i)
        if (given.against.empty() ? plans[i].storage != storage::exact : plans[i].name == given.against) return i;
    if (!given.against.empty()) throw failure("--against: '" + given.against + "' is none of the --caches");
    return 0;
}

std::string facts_of(const options& given, const experiment& e, const std::vector<cache_plan>& plans)
{
    const bool rounded = std::any_of(plans.begin(), plans.end(), [&](const cache_plan& p) {
        return p.storage != storage::exact && p.sink != given.plans.sink;
    });
    const model_config& c = e.model->config;
    std::error_code ignored;
    const std::string name = std::filesystem::weakly_canonical(given.model, ignored).filename().string();
    return text("%s: %zu layers, hidden %zu, %zu query heads on %zu KV head%s of %zu channels, vocabulary %zu\n"
                "%zu sequence%s of %zu tokens; predictions count from token %zu on, decoding starts after %zu; sink %zu%s",
                name.empty() ? given.model.c_str() : name.c_str(), c.layers, c.hidden, c.heads, c.kv_heads,
                c.kv_heads == 1 ? "" : "s", c.head_dim, c.vocabulary, e.sequences.size(), e.sequences.size() == 1 ? "" : "s",
                e.length(), e.from, e.known, given.plans.sink, rounded ? ", rounded up to whole tiles" : "");
}

void run_experiment(const options& given)
{
    const model m = read_model(given.model);
    plan_options of_model = given.plans;
    of_model.layers = m.config.layers;
    of_model.kv_heads = m.config.kv_heads;
    const bool is_pointer_chase = m.config.task == pointer_task;
    const std::string caches = !given.caches.empty() ? given.caches : is_pointer_chase ? pointer_caches : language_caches;
    const std::vector<cache_plan> plans = plans_of(caches, m.config.head_dim, of_model);
    experiment e;
    e.model = &m;
    const std::size_t symbols = m.config.vocabulary > 0 ? (m.config.vocabulary - 1) / 2 : 0;
    if (given.walks != 0 && (!is_pointer_chase || symbols < 2))
        throw failure("--walks: " + given.model + " is no pointer-chasing model");
    if (given.walks == 0 && !is_pointer_chase && given.sequences == options{}.sequences)
        throw failure("--sequences is missing: the walks that are the default are for the pointer-chasing model, not for " +
                      given.model);
    e.sequences = given.walks != 0 ? new_walks(given.walks, given.seed, symbols) : read_sequences(given, m.config.vocabulary);
    e.truth = is_pointer_chase && given.prompt == 0;
    e.known = known_tokens(given, e.length(), is_pointer_chase);
    e.threads = given.threads;
    if (given.generate != 0) return kvarn_cli::print(generations(e, plans, given.generate, given.model, given.json));
    e.from = first_scored(given, e);
    const std::size_t against = paired_cache(given, plans);
    const modes wanted = modes_of(given, is_pointer_chase);
    if (!given.csv.empty() && !wanted.teacher) throw failure("--csv: it holds what the mode teacher measures");

    std::optional<kvarn_cli::output_file> html, csv;
    if (!given.html.empty()) html.emplace(given.html);
    if (!given.csv.empty()) csv.emplace(given.csv);
    const evaluation result = evaluate(e, plans, wanted);
    const std::string facts = facts_of(given, e, plans);
    if (html) {
        html->write(html_report(result, e, facts, against));
        html->finish();
    }
    if (csv) {
        csv->write(csv_report(result, e));
        csv->finish();
    }
    kvarn_cli::print(given.json ? json_report(result, e) : text_report(result, e, facts, against));
    if (html) html->commit();
    if (csv) csv->commit();
}

int run(int argc, char** argv)
{
    CLI::App app(
        "Runs a decoder-only language model with exact and quantized KV caches and reports how decoding suffers.\n"
        "Caches: exact, rtn<bits>, rotated_rtn<bits>, kivi<bits>_g<32|64|128>, q<4|5|8>_0, q<4|5>_1, rotated_q<4|5|8>_0,\n"
        "turboquant<2|3|4>, fp8_<tensor|token> (one scale per layer and tile, or per token and head), and\n"
        "k<bits>v<bits>_g<group>; after it _auto to keep each head's keys in the basis that its queries ask for, or _ko, _vo,\n"
        "_kovo for the original basis of K, V or both; then :paper or :refined, :exact, :fine (default) or :fast for the\n"
        "precision of attention; then rules for layers and heads that get other "
        "bits: k2v2_g128_auto:refined+0=k4v2+-1/0..3=k3v3. Exit code 0, or 2 with one line on stderr.",
        "language_model");
    app.set_version_flag("--version", "kvarn " KVARN_VERSION_STRING);
    options given;
    app.add_option("--model", given.model,
                   "a .safetensors file, or a directory with config.json and model.safetensors or its shards; llama, mistral, "
                   "qwen2, qwen3, gemma3_text (default: the pointer-chasing model)")
        ->type_name("PATH");
    app.add_option("--sequences", given.sequences, ".npy of int32 or int64 [sequences, tokens] (default: 16 walks)")
        ->type_name("FILE");
    app.add_option("--limit", given.limit, "use only the first N sequences")->type_name("N")->check(CLI::Range(1, 1 << 30));
    CLI::Option* const walks = app.add_option("--walks", given.walks, "instead of a file: N new walks")
                                   ->type_name("N")
                                   ->check(CLI::Range(1, 1 << 20))
                                   ->excludes("--sequences")
                                   ->excludes("--limit");
    app.add_option("--seed", given.seed, "of the new walks (default 1)")->type_name("N")->needs(walks);
    app.add_option("--caches", given.caches, "comma-separated names (default: about ten that are worth comparing)")
        ->type_name("LIST")
        ->check([](const std::string& list) { return list.empty() ? std::string("there is no cache ''") : std::string(); });
    app.add_option("--sink", given.plans.sink, "tokens at the start that stay exact, rounded up to whole tiles of each cache (default 128)")
        ->type_name("N")
        ->check(CLI::Range(0, 1 << 24));
    app.add_option("--mode", given.modes,
                   "teacher: next tokens given the right history, all caches in lock step; greedy: the model's own walk; pseudo: "
                   "block by block "
                   "beside the exact run. Several with commas (default: teacher; on the pointer-chasing model greedy too, and "
                   "all with --html)")
        ->type_name("teacher|greedy|pseudo")
        ->delimiter(',')
        ->check(CLI::IsMember({"teacher", "greedy", "pseudo"}));
    app.add_option("--from", given.from,
                   "teacher: the first token whose prediction counts (default: of the walk, else at most 256)")
        ->type_name("N")
        ->check(CLI::Range(1, 1 << 30));
    app.add_option("--against", given.against, "the cache that the others are paired with (default: the first that is not exact)")
        ->type_name("CACHE");
    app.add_option("--generate", given.generate,
                   "instead: N tokens after the given ones with every cache, as text by the model's tokenizer.json")
        ->type_name("N")
        ->check(CLI::Range(1, 1 << 20))
        ->excludes("--mode")
        ->excludes("--from");
    app.add_option("--prompt", given.prompt,
                   "greedy and --generate: tokens given at the start (default: context and first token of a walk, else half)")
        ->type_name("N")
        ->check(CLI::Range(1, 1 << 30));
    app.add_option("--iterations", given.plans.iterations,
                   "rounds of normalisation of k<bits>v<bits> caches (default: the encoder's)")
        ->type_name("N")
        ->check(CLI::Range(0, 64));
    app.add_option("--threads", given.threads, "threads (default: one per core)")->type_name("N")->check(CLI::Range(1, 1024));
    app.add_flag("--progress", kvarn_cli::progress::as_lines,
                 "progress and time left as lines on stderr, even if it is no terminal");
    app.add_flag("--json", given.json, "print JSON instead of tables");
    app.add_option("--html", given.html, "also write a report, one self-contained file")
        ->type_name("FILE")
        ->excludes("--generate");
    app.add_option("--csv", given.csv, "also write the likelihoods by cache, sequence and position")
        ->type_name("FILE")
        ->excludes("--generate");
    if (!kvarn_cli::parse_arguments(app, argc, argv)) return 0;
    run_experiment(given);
    return 0;
}

}  // namespace

int main(int argc, char** argv)
{
    return kvarn_cli::run_program("language_model", [&] { return run(argc, argv); });
}
