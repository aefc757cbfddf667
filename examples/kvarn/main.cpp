// SPDX-License-Identifier: Apache-2.0
// kvarn: quantize, dequantize, inspect and compare K and V arrays, and plan caches. Exit code 0, or 2 with one line on stderr.

#include <map>
#include <sstream>
#include <string>
#include <tuple>
#include <vector>

#include <CLI/CLI.hpp>

#include <kvarn/version.hpp>

#include "../common/arguments.hpp"
#include "../common/program.hpp"
#include "commands.hpp"
#include "compare.hpp"
#include "plan.hpp"

namespace {

using namespace kvarn_cli;

const std::map<std::string, kvarn::encoder> encoders{{name_of(kvarn::encoder::paper), kvarn::encoder::paper},
                                                     {name_of(kvarn::encoder::refined), kvarn::encoder::refined}};
const std::map<std::string, kvarn::record_stride> strides{{"packed", kvarn::record_stride::packed},
                                                          {"reference", kvarn::record_stride::reference}};
const std::map<std::string, kvarn::rotation> rotations{{"hadamard", kvarn::rotation::hadamard}, {"none", kvarn::rotation::none}};
const std::map<std::string, kvarn::basis> bases{{"original", kvarn::basis::original}, {"rotated", kvarn::basis::rotated}};
const std::map<std::string, element_type> element_types{{"float16", element_type::float16}, {"float32", element_type::float32}};

/// An option whose value is one of a few words; the words become the hint in --help and in the error.
template <class Enum>
CLI::Option* add_choice(CLI::App* command, const std::string& name, Enum& target, const std::map<std::string, Enum>& choices,
                        const std::string& about)
{
    std::string words;
    for (const auto& [word, value] : choices) words += (words.empty() ? "" : "|") + word;
    return command
        ->add_option_function<std::string>(
            name,
            [&target, &choices, name, words](const std::string& given) {
                const auto found = choices.find(given);
                if (found == choices.end()) throw CLI::ValidationError(name, "'" + given + "' is none of " + words);
                target = found->second;
            },
            about)
        ->type_name(words);
}

/// Options that quantize and dequantize share.
void add_codec_options(CLI::App* command, codec_options& options)
{
    command->add_flag("--raw", options.raw, "bare records [tile][head] instead of a container");
    add_choice(command, "--stride", options.stride, strides, "distance between records (default packed)");
    add_choice(command, "--rotation", options.rotation, rotations, "none: K and V stay in the original basis (default: as --format says, k4v2_g128_ko for K alone)");
    command
        ->add_option("--exact-channels", options.exact_channels,
                     "the last channels of K to keep in float16, unrotated (default 0)")
        ->type_name("N");
    command->add_option("--threads", options.threads, "threads (default: one per core)")
        ->type_name("N")
        ->check(CLI::Range(1, 1024));
}

int run(int argc, char** argv)
{
    CLI::App app(
        "KV-cache quantization of K and V arrays in .npy files: C order, [heads, tokens, head_dim] or [tokens, head_dim],\n"
        "float16 or float32. Exit code 0, or 2 with one line on stderr; a failed command leaves no file.",
        "kvarn");
    app.set_version_flag("--version", "kvarn " KVARN_VERSION_STRING);
    app.require_subcommand(1);

    quantize_options quantizing;
    CLI::App* quantize_command = app.add_subcommand("quantize", "K.npy and V.npy to a container (or to bare records)");
    quantize_command->add_option("K.npy", quantizing.k, "keys")->required();
    quantize_command->add_option("V.npy", quantizing.v, "values; may be left out, and is not read, for formats with 0 value bits")
        ->required();
    quantize_command->add_option("OUT", quantizing.out, "the file to write");
    quantize_command
        ->add_option("--format", quantizing.format,
                     "k<bits>v<bits>_g<group> (default k4v2_g128); with _auto each head chooses the basis of V by its first tile, and of K with --q")
        ->type_name("NAME");
    quantize_command->add_option("--q", quantizing.q, "with --format ..._auto: queries, [query heads, tokens, head_dim], to choose the basis of K by")
        ->type_name("Q.npy");
    add_choice(quantize_command, "--encoder", quantizing.encoder, encoders, "how codes and scales are chosen (default refined)");
    quantize_command->add_option("--iterations", quantizing.iterations, "rounds of normalisation (default 8 for paper, 1 for refined)")
        ->type_name("N")
        ->check(CLI::Range(0, 64));
    add_codec_options(quantize_command, quantizing);

    dequantize_options dequantizing;
    CLI::App* dequantize_command =
        app.add_subcommand("dequantize", "a container (or bare records) to K.npy and V.npy, [heads, tokens, head_dim]");
    dequantize_command->add_option("IN", dequantizing.in, "the file to read")->required();
    dequantize_command->add_option("K.npy", dequantizing.k, "keys to write")->required();
    dequantize_command->add_option("V.npy", dequantizing.v, "values to write; left out for formats with 0 value bits");
    add_choice(dequantize_command, "--basis", dequantizing.basis, bases, "basis of what is written (default original)");
    element_type type{};
    CLI::Option* type_option = add_choice(dequantize_command, "--dtype", type, element_types,
                                          "type of what is written (default: the input's; float16 for --raw)");
    CLI::Option* format_option =
        dequantize_command->add_option("--format", dequantizing.format, "with --raw: the format")->type_name("NAME");
    CLI::Option* heads_option = dequantize_command->add_option("--heads", dequantizing.heads, "with --raw: KV heads")
                                    ->type_name("N")
                                    ->check(CLI::Range(1, 1 << 20));
    CLI::Option* dim_option =
        dequantize_command->add_option("--head-dim", dequantizing.head_dim_k, "with --raw: quantized channels of K")
            ->type_name("N")
            ->check(CLI::Range(1, 1 << 20));
    CLI::Option* dim_v_option =
        dequantize_command->add_option("--head-dim-v", dequantizing.head_dim_v, "with --raw: channels of V (default: as K)")
            ->type_name("N")
            ->check(CLI::Range(1, 1 << 20));
    add_codec_options(dequantize_command, dequantizing);

    std::string inspected;
    CLI::App* inspect_command = app.add_subcommand("inspect", "what a container holds: format, sizes, scales");
    inspect_command->add_option("IN", inspected, "the container")->required();

    compare_options comparing;
    CLI::App* compare_command = app.add_subcommand("compare", "errors and bytes of formats beside those of other methods");
    compare_command->add_option("K.npy", comparing.k, "keys")->required();
    compare_command->add_option("V.npy", comparing.v, "values")->required();
    std::string formats;
    compare_command
        ->add_option("--formats", formats,
                     "comma-separated; with --q also ..._auto: each head chooses its basis (default: k2v2_g128 to k8v8_g128, with --q _auto too)")
        ->type_name("LIST");
    compare_command->add_option("--q", comparing.q, "queries, [query heads, tokens, head_dim]: adds the attention error")
        ->type_name("Q.npy");
    compare_command->add_option("--html", comparing.html, "also write a report, one self-contained file")->type_name("FILE");
    kvarn::encoder compared{};
    CLI::Option* compared_option = add_choice(compare_command, "--encoder", compared, encoders, "how codes and scales are chosen (default: both)");
    compare_command->add_option("--iterations", comparing.iterations, "rounds of normalisation (default 8 for paper, 1 for refined)")
        ->type_name("N")
        ->check(CLI::Range(0, 64));
    compare_command->add_option("--threads", comparing.threads, "threads (default: one per core)")
        ->type_name("N")
        ->check(CLI::Range(1, 1024));

    plan_request planned;
    CLI::App* plan_command = app.add_subcommand("plan", "what the caches of a model take, and what fits into a memory");
    plan_command->add_option("MODEL", planned.model, "a well-known model, such as llama-3.1-8b; or the numbers below, which win over its own");
    for (const auto& [option, number, about] : {std::tuple{"--layers", &planned.layers, "layers"}, std::tuple{"--kv-heads", &planned.kv_heads, "KV heads of a layer"},
                                                std::tuple{"--head-dim", &planned.head_dim, "channels of K and V"}})
        plan_command->add_option(option, *number, about)->type_name("N")->check(CLI::Range(1, 1024));
    std::string planned_formats;
    plan_command->add_option("--formats", planned_formats, "comma-separated (default k4v4_g128,k4v2_g128,k3v2_g128,k2v2_g128)")->type_name("LIST");
    plan_command->add_option("--context", planned.context, "tokens of a sequence (default 131072)")
        ->type_name("N")
        ->check(CLI::Range(std::size_t{1}, planned_cache::most_tokens));
    plan_command->add_option("--sequences", planned.sequences, "sequences (default 1)")->type_name("N")->check(CLI::Range(std::size_t{1}, std::size_t{1} << 20));
    plan_command->add_option("--sink", planned.sink, "first tokens of a sequence that stay in float16 (default 128)")
        ->type_name("N")
        ->check(CLI::Range(std::size_t{0}, planned_cache::most_tokens));
    plan_command->add_option("--recent", planned.recent, "newest tokens that stay in float16 besides (default 0)")
        ->type_name("N")
        ->check(CLI::Range(std::size_t{0}, planned_cache::most_tokens));
    plan_command->add_option("--step", planned.step, "tokens of a step at most: of a prompt's pieces, of drafts (default 1)")
        ->type_name("N")
        ->check(CLI::Range(std::size_t{1}, planned_cache::most_tokens));
    plan_command->add_option("--memory", planned.memory, "also solve for the longest context and the most sequences in this, such as 8GiB")->type_name("SIZE");

    if (!parse_arguments(app, argc, argv)) return 0;
    if (dequantize_command->parsed()) {
        if (type_option->count() != 0) dequantizing.type = type;
        const bool shaped = format_option->count() != 0 || heads_option->count() != 0 || dim_option->count() != 0 ||
                            dim_v_option->count() != 0;
        if (dequantizing.raw && (format_option->count() == 0 || heads_option->count() == 0 || dim_option->count() == 0))
            throw failure("--raw needs --format, --heads and --head-dim: bare records do not say what they are");
        if (!dequantizing.raw &&
            (shaped || dequantize_command->count("--stride") != 0 || dequantize_command->count("--rotation") != 0 ||
             dequantize_command->count("--exact-channels") != 0))
            throw failure("--format, --heads, --head-dim, --head-dim-v, --stride, --rotation and --exact-channels go with "
                          "--raw: a container holds them");
    }
    if (compared_option->count() != 0) comparing.encoders = {compared};
    if (quantize_command->parsed()) quantize(quantizing);
    if (dequantize_command->parsed()) dequantize(dequantizing);
    if (inspect_command->parsed()) inspect(inspected);
    const auto take_list = [](CLI::App* command, const std::string& given, std::vector<std::string>& names) {
        if (command->count("--formats") == 0) return;
        names.clear();
        std::istringstream list(given);
        for (std::string name; std::getline(list, name, ',');) names.push_back(name);
        if (names.empty()) throw failure("--formats: the list is empty");
    };
    take_list(compare_command, formats, comparing.formats);
    take_list(plan_command, planned_formats, planned.formats);
    if (compare_command->parsed()) compare(comparing);
    if (plan_command->parsed()) plan(planned);
    return 0;
}

}  // namespace

int main(int argc, char** argv)
{
    return run_program("kvarn", [&] { return run(argc, argv); });
}
