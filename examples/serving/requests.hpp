// SPDX-License-Identifier: Apache-2.0
#pragma once
// What the scheduler is asked: prompts, tokens to generate, and when they arrive. In: a JSON file, or a seed and the sequences that prompts are
// cut from. Out: requests in the order of their arrival, checked against the model's vocabulary.

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "../common/text.hpp"
#include "../language_model/evaluate.hpp"
#include "../language_model/walks.hpp"

namespace serving {

using kvarn_cli::failure, kvarn_cli::text;
using language_model::tokens;

struct request {
    tokens prompt;
    std::size_t generate = 1;
    std::size_t arrival = 0;  ///< the step it comes before
    tokens expected;          ///< what may follow the prompt, for drafts that are made from it; may be empty
};

inline constexpr std::size_t most_tokens = std::size_t{1} << 20;  // of one request, bounds what a damaged file can ask for

namespace requests_detail {

[[nodiscard]] inline std::size_t whole_number(const language_model::json& from, const char* key, std::size_t least, std::size_t otherwise,
                                              const std::string& where)
{
    if (!from.contains(key)) return otherwise;
    const language_model::json& value = from[key];
    if (!value.is_number_unsigned() || value.get<std::uint64_t>() < least || value.get<std::uint64_t>() > most_tokens)
        throw failure(where + text(": '%s' is no whole number from %zu to %zu", key, least, most_tokens));
    return value.get<std::size_t>();
}

[[nodiscard]] inline tokens ids(const language_model::json& from, const char* key, std::size_t vocabulary, const std::string& where)
{
    tokens out;
    if (!from.contains(key)) return out;
    if (!from[key].is_array() || from[key].size() > most_tokens) throw failure(where + text(": '%s' is no list of token ids", key));
    for (const language_model::json& id : from[key]) {
        if (!id.is_number_unsigned() || id.get<std::uint64_t>() >= vocabulary)
            throw failure(where + text(": '%s' holds what is no token of the model, which has 0 to %zu", key, vocabulary - 1));
        out.push_back(id.get<std::int32_t>());
    }
    return out;
}

inline void sort_by_arrival(std::vector<request>& all)
{
    std::stable_sort(all.begin(), all.end(), [](const request& a, const request& b) { return a.arrival < b.arrival; });
}

}  // namespace requests_detail

/// A list of objects {"prompt": [ids], "generate": n, "arrival": step, "expected": [ids]}; only the prompt must be there.
[[nodiscard]] inline std::vector<request> parse_requests(const language_model::json& file, std::size_t vocabulary, const std::string& path)
{
    using namespace requests_detail;
    if (!file.is_array() || file.empty()) throw failure(path + ": it is no list of requests");
    std::vector<request> all;
    for (const language_model::json& one : file) {
        const std::string where = path + text(": request %zu", all.size());
        if (!one.is_object()) throw failure(where + " is no object");
        for (const auto& [key, value] : one.items())
            if (key != "prompt" && key != "generate" && key != "arrival" && key != "expected")
                throw failure(where + ": '" + key + "' is not known: prompt, generate, arrival and expected are");
        request r;
        r.prompt = ids(one, "prompt", vocabulary, where);
        if (r.prompt.empty()) throw failure(where + ": it has no prompt");
        r.generate = whole_number(one, "generate", 1, 16, where);
        r.arrival = whole_number(one, "arrival", 0, 0, where);
        r.expected = ids(one, "expected", vocabulary, where);
        all.push_back(std::move(r));
    }
    sort_by_arrival(all);
    return all;
}

/// How requests are made up.
struct traffic {
    std::size_t count = 12;
    std::size_t contexts = 3;  ///< different beginnings: requests on the same one share a prefix
    std::size_t generate = 24; ///< at most; at least half
    std::size_t gap = 3;       ///< steps between arrivals, at most
    std::uint64_t seed = 1;
};

namespace requests_detail {

inline void place(request& r, const traffic& t, std::size_t& clock, language_model::walk_random& random)
{
    r.generate = t.generate - random.below(t.generate / 2 + 1);
    r.arrival = clock;
    clock += random.below(t.gap + 1);
}

}  // namespace requests_detail

/// Walks of the pointer-chasing model: every context is a cycle as shuffled pairs, every request on it walks from a symbol of its own.
[[nodiscard]] inline std::vector<request> walk_requests(const traffic& t, std::size_t symbols)
{
    language_model::walk_random random(t.seed);
    const auto walks = language_model::new_walks(t.contexts, t.seed, symbols);
    std::vector<request> all(t.count);
    std::size_t clock = 0;
    for (std::size_t i = 0; i < t.count; ++i) {
        const auto& walk = walks[i < t.contexts ? i : random.below(t.contexts)];
        const auto at = [&](std::size_t hop) { return walk[2 * symbols + 1 + hop % symbols]; };
        const std::size_t first = random.below(symbols);
        all[i].prompt.assign(walk.begin(), walk.begin() + static_cast<std::ptrdiff_t>(2 * symbols + 1));
        all[i].prompt.push_back(at(first));
        requests_detail::place(all[i], t, clock, random);
        for (std::size_t hop = 1; hop <= all[i].generate; ++hop) all[i].expected.push_back(at(first + hop));
    }
    return all;
}

/// Beginnings of texts, between a quarter and a half of them, and what follows.
[[nodiscard]] inline std::vector<request> text_requests(const traffic& t, const std::vector<tokens>& texts)
{
    language_model::walk_random random(t.seed);
    std::vector<request> all(t.count);
    std::size_t clock = 0;
    for (std::size_t i = 0; i < t.count; ++i) {
        const std::size_t contexts = std::min(t.contexts, texts.size());
        const tokens& x = texts[i < contexts ? i : random.below(contexts)];
        const std::size_t half = std::max<std::size_t>(1, x.size() / 2), prompt = half - random.below(half / 2 + 1);
        all[i].prompt.assign(x.begin(), x.begin() + static_cast<std::ptrdiff_t>(prompt));
        requests_detail::place(all[i], t, clock, random);
        const std::size_t known = std::min(all[i].generate, x.size() - prompt);
        all[i].expected.assign(x.begin() + static_cast<std::ptrdiff_t>(prompt), x.begin() + static_cast<std::ptrdiff_t>(prompt + known));
    }
    return all;
}

}  // namespace serving
