// SPDX-License-Identifier: Apache-2.0
#pragma once
// The command plan: what the caches of a model take, and what fits into a given memory. In: the shape of a model, by name or by numbers, formats,
// tokens and sequences. Out: a table beside float16.

#include <algorithm>
#include <cctype>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include <kvarn/cache/policy.hpp>

#include "../common/failure.hpp"
#include "../common/text.hpp"
#include "commands.hpp"

namespace kvarn_cli {

struct model_shape {
    const char* name;
    int layers, kv_heads, head_dim;
};

/// Models without sliding windows, whose layers are all alike.
inline constexpr model_shape known_models[] = {
    {"llama-3.1-8b", 32, 8, 128}, {"llama-3.1-70b", 80, 8, 128}, {"llama-3.2-1b", 16, 8, 64},      {"llama-3.2-3b", 28, 8, 128},
    {"qwen2.5-0.5b", 24, 2, 64},  {"qwen2.5-1.5b", 28, 2, 128},  {"qwen2.5-3b", 36, 2, 128},       {"qwen2.5-7b", 28, 4, 128},
    {"qwen2.5-14b", 48, 8, 128},  {"qwen2.5-32b", 64, 8, 128},   {"qwen2.5-72b", 80, 8, 128},      {"qwen3-0.6b", 28, 8, 128},
    {"qwen3-1.7b", 28, 8, 128},   {"qwen3-4b", 36, 8, 128},      {"qwen3-8b", 36, 8, 128},         {"qwen3-14b", 40, 8, 128},
    {"qwen3-32b", 64, 8, 128},    {"smollm2-135m", 30, 3, 64},   {"smollm2-360m", 32, 5, 64},      {"smollm2-1.7b", 24, 32, 64},
    {"phi-3-mini", 32, 32, 96},   {"mistral-7b-v0.3", 32, 8, 128},
};

struct plan_request {
    std::string model;  ///< empty: the numbers
    int layers = 0, kv_heads = 0, head_dim = 0;
    std::vector<std::string> formats{"k4v4_g128", "k4v2_g128", "k3v2_g128", "k2v2_g128"};
    std::size_t context = 131072, sequences = 1, sink = 128;
    std::string memory;  ///< such as 8GiB; empty: none given
};

/// "8GiB", "24 GB", "1.5e9": bytes. Throws failure.
[[nodiscard]] inline double parse_bytes(const std::string& given)
{
    std::size_t end = 0;
    double number = -1;
    try {
        number = std::stod(given, &end);
    } catch (const std::exception&) {
    }
    std::string unit;
    for (const char c : given.substr(end))
        if (c != ' ') unit += static_cast<char>(std::tolower(static_cast<unsigned char>(c)));
    constexpr std::pair<const char*, double> units[] = {{"", 1},     {"b", 1},          {"kb", 1e3},        {"mb", 1e6},           {"gb", 1e9},
                                                        {"tb", 1e12}, {"kib", 0x1p10}, {"mib", 0x1p20}, {"gib", 0x1p30}, {"tib", 0x1p40}};
    for (const auto& [name, each] : units)
        if (unit == name && number > 0 && number * each < 1e18) return number * each;
    throw failure("--memory: '" + given + "' is no size: 8GiB, 24GB and 500MB are");
}

[[nodiscard]] inline std::string bytes_text(double size)
{
    constexpr std::pair<const char*, double> units[] = {{"PiB", 0x1p50}, {"TiB", 0x1p40}, {"GiB", 0x1p30}, {"MiB", 0x1p20}, {"KiB", 0x1p10}};
    for (const auto& [name, each] : units)
        if (size >= each) return text("%.2f %s", size / each, name);
    return text("%.0f bytes", size);
}

/// The caches of one sequence in one format; no format: float16.
class planned_cache {
public:
    planned_cache(const plan_request& p, const std::string& name) : request_(p)
    {
        if (name == "float16") return;
        const auto dim = static_cast<std::size_t>(p.head_dim);
        policy_ = kvarn::make_policy(make_format(name, dim, dim, kvarn::rotation::hadamard, 0), p.layers, p.kv_heads).value;
    }

    [[nodiscard]] double elements(std::size_t tokens) const
    {
        const int values = policy_ && !policy_->base().has_values() ? 0 : request_.head_dim;
        return static_cast<double>(tokens) * request_.layers * request_.kv_heads * (request_.head_dim + values);
    }
    [[nodiscard]] double size(std::size_t tokens) const
    {
        return policy_ ? static_cast<double>(kvarn::plan_sequence(*policy_, tokens, request_.sink).bytes()) : 2 * elements(tokens);
    }
    /// The most that a sequence takes while it grows to `tokens` tokens: an exact tail takes more than the tile that it becomes.
    [[nodiscard]] double most_size(std::size_t tokens) const
    {
        const double now = size(tokens);
        if (!policy_ || tokens <= request_.sink) return now;
        const auto group = static_cast<std::size_t>(policy_->base().group());
        const std::size_t sealed = (tokens - request_.sink) / group;
        return sealed == 0 ? now : std::max(now, size(request_.sink + sealed * group - 1));
    }
    /// The longest sequence that never takes more than `room` bytes.
    [[nodiscard]] std::size_t longest(double room) const
    {
        std::size_t low = 0, high = most_tokens;
        while (low < high) {
            const std::size_t middle = low + (high - low + 1) / 2;
            if (most_size(middle) <= room) low = middle;
            else high = middle - 1;
        }
        return low;
    }

    static constexpr std::size_t most_tokens = std::size_t{1} << 28;

private:
    plan_request request_;
    std::optional<kvarn::bit_policy> policy_;
};

inline void plan(plan_request p)
{
    if (!p.model.empty()) {
        const auto found = std::find_if(std::begin(known_models), std::end(known_models),
                                        [&](const model_shape& m) { return p.model == m.name; });
        if (found == std::end(known_models)) {
            std::string names;
            for (const model_shape& m : known_models) names += (names.empty() ? "" : ", ") + std::string(m.name);
            throw failure("no model '" + p.model + "' is known: " + names + "; or give --layers, --kv-heads and --head-dim");
        }
        if (p.layers == 0) p.layers = found->layers;
        if (p.kv_heads == 0) p.kv_heads = found->kv_heads;
        if (p.head_dim == 0) p.head_dim = found->head_dim;
    }
    if (p.layers == 0 || p.kv_heads == 0 || p.head_dim == 0)
        throw failure("the shape is missing: a model's name, or --layers, --kv-heads and --head-dim");
    if (p.formats.empty()) throw failure("--formats: the list is empty");
    const double memory = p.memory.empty() ? 0 : parse_bytes(p.memory);  // 0: not asked for

    const double sequences = static_cast<double>(p.sequences), exact = planned_cache(p, "float16").size(p.context);
    std::vector<std::vector<std::string>> table{{"cache", "bits per element", "bytes", "", "most on the way", "of float16"}};
    if (memory > 0) table[0].insert(table[0].end(), {"longest context", "most sequences"});
    std::vector<std::string> names{"float16"};
    names.insert(names.end(), p.formats.begin(), p.formats.end());
    for (const std::string& name : names) {
        const planned_cache cache(p, name);
        const double size = cache.size(p.context), most = cache.most_size(p.context);
        const double all = size * sequences;
        table.push_back({name, text("%.4f", 8 * size / cache.elements(p.context)), all < 0x1p63 ? grouped(static_cast<std::size_t>(all)) : "-",
                         bytes_text(all), bytes_text(most * sequences), text("%.1f %%", 100 * size / exact)});
        if (!(memory > 0)) continue;
        const std::size_t longest = cache.longest(memory / sequences);
        table.back().push_back((longest == planned_cache::most_tokens ? "more than " : "") + grouped(longest));
        table.back().push_back(grouped(static_cast<std::size_t>(memory / most)));
    }
    const auto count = [](std::size_t n, const char* what) { return grouped(n) + " " + what + (n == 1 ? "" : "s"); };
    std::string out = text("%d layers, %d KV heads, head_dim %d; %s, %s; the first %zu tokens and the newest up to a tile in float16\n",
                           p.layers, p.kv_heads, p.head_dim, count(p.context, "token").c_str(), count(p.sequences, "sequence").c_str(), p.sink);
    if (memory > 0)
        out += text("in %s: the longest context of %s, and the most sequences of %s, with room for the most on the way\n",
                    bytes_text(memory).c_str(), count(p.sequences, "sequence").c_str(), count(p.context, "token").c_str());
    print(out + "\n" + aligned(table));
}

}  // namespace kvarn_cli
