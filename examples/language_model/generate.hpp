// SPDX-License-Identifier: Apache-2.0
#pragma once
// Greedy continuations, to read: the first tokens of each sequence are given, then every cache goes on by itself,
// token by token. In: model, plans, sequences. Out: ids and seconds; as text, if the model's tokenizer.json is there,
// or as JSON.

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <filesystem>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include <nlohmann/json.hpp>

#include "../common/text.hpp"
#include "evaluate.hpp"
#include "token_text.hpp"

namespace language_model {

struct generation {
    tokens ids;
    double seconds = 0;  ///< from the first token on, the given ones are read before
};

[[nodiscard]] inline generation generate(const experiment& e, const cache_plan& plan, std::size_t sequence, std::size_t count,
                                         team& helpers)
{
    kv_cache cache(plan, shape_of(e.model->config), e.known + count);
    decoder d(*e.model, cache, &helpers);
    d.run_all(std::span(e.sequences[sequence]).first(e.known));
    generation g;
    const auto begin = std::chrono::steady_clock::now();
    while (g.ids.size() < count) {
        g.ids.push_back(evaluate_detail::argmax(d.last_logits().data(), e.model->config.vocabulary));
        if (g.ids.size() < count) d.run(std::span(g.ids).last(1));
    }
    g.seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
    return g;
}

/// The tokenizer.json beside the model, or none.
[[nodiscard]] inline std::optional<token_text> tokenizer_beside(const std::string& model_path)
{
    namespace fs = std::filesystem;
    const fs::path folder = fs::is_directory(model_path) ? fs::path(model_path) : fs::path(model_path).parent_path();
    const fs::path path = folder / "tokenizer.json";
    if (!fs::exists(path)) return std::nullopt;
    return token_text(model_detail::read_json(path.string()), path.string());
}

/// Everything that all caches go on with, sequence by sequence.
[[nodiscard]] inline std::string generations(const experiment& e, const std::vector<cache_plan>& plans, std::size_t count,
                                             const std::string& model_path, bool as_json)
{
    const std::optional<token_text> words = tokenizer_beside(model_path);
    const auto text_of_ids = [&](std::span<const std::int32_t> ids) {
        if (words) return words->of(ids);
        std::string list;
        for (const std::int32_t id : ids) list += kvarn_cli::text(list.empty() ? "%d" : " %d", static_cast<int>(id));
        return list;
    };
    team helpers(e.threads);
    kvarn_cli::progress shown("generating");
    std::string out = words ? "" : "There is no tokenizer.json beside the model: these are token ids.\n\n";
    nlohmann::ordered_json list = nlohmann::ordered_json::array();
    const cache_plan exact = exact_plan(*e.model);
    for (std::size_t s = 0; s < e.sequences.size(); ++s) {
        const std::span<const std::int32_t> given = std::span(e.sequences[s]).first(e.known);
        out += kvarn_cli::text("--- sequence %zu, the end of %zu given tokens:\n", s, e.known) +
               text_of_ids(given.last(std::min<std::size_t>(given.size(), 60))) + "\n";
        const generation reference = generate(e, exact, s, count, helpers);
        for (std::size_t i = 0; i < plans.size(); ++i) {
            shown.show(s * plans.size() + i, e.sequences.size() * plans.size(), plans[i].name);
            const generation g = plans[i].storage == storage::exact ? reference : generate(e, plans[i], s, count, helpers);
            const auto agreeing =
                static_cast<std::size_t>(std::mismatch(g.ids.begin(), g.ids.end(), reference.ids.begin()).first - g.ids.begin());
            out += kvarn_cli::text("\n--- %s, %zu of %zu tokens as with the exact cache, %.1f tokens/s:\n", plans[i].name.c_str(),
                                   agreeing, count, static_cast<double>(count) / g.seconds) +
                   text_of_ids(g.ids) + "\n";
            list.push_back({{"sequence", s},
                            {"cache", plans[i].name},
                            {"given", e.known},
                            {"ids", g.ids},
                            {"agreeing", agreeing},
                            {"tokens_per_second", static_cast<double>(count) / g.seconds}});
            if (words) list.back()["text"] = words->of(g.ids);
        }
        out += "\n";
    }
    return as_json ? list.dump(1, ' ', false, nlohmann::ordered_json::error_handler_t::replace) + "\n" : out;
}

}  // namespace language_model
