// SPDX-License-Identifier: Apache-2.0
#pragma once
// The command plan: what a pool of a model's caches takes, to the byte, and what fits into a given memory. In: the shape of a model, by name or
// by numbers, formats, tokens and sequences. Out: a table by kind, beside float16.

#include <algorithm>
#include <cctype>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include <kvarn/cache/state.hpp>

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
    std::size_t context = 131072, sequences = 1, sink = 128, recent = 0, step = 1;
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

/// What a pool of such caches takes; no format: float16 alone.
struct planned_bytes {
    double records = 0, exact = 0, tables = 0;
    bool fits = true;  ///< into one pool, which has 2^31 blocks at most

    [[nodiscard]] double all() const noexcept { return records + exact + tables; }
};

class planned_cache {
public:
    planned_cache(const plan_request& p, const std::string& name) : request_(p)
    {
        config_.sink_tokens = p.sink;
        config_.recent_tokens = p.recent;
        config_.most_step = p.step;
        const auto dim = static_cast<std::size_t>(p.head_dim);
        quantized_ = name != "float16";
        const kvarn::format f = make_format(quantized_ ? name : "k8v8_g128", dim, dim, kvarn::rotation::none, 0);
        config_.policy = kvarn::make_policy(f, p.layers, p.kv_heads).value;
    }

    /// Values of K and V of one sequence.
    [[nodiscard]] double elements(std::size_t tokens) const { return static_cast<double>(kvarn::cache_elements(config_, tokens)); }

    [[nodiscard]] planned_bytes take(std::size_t tokens, std::size_t sequences) const
    {
        if (!quantized_) return {0, 2 * elements(tokens) * static_cast<double>(sequences), 0, true};
        kvarn::cache_config c = config_;
        c.most_tokens = tokens;
        c.sequences = sequences;
        const auto plan = kvarn::plan_cache(c);
        if (!plan) return {0, 0, 0, false};
        return {static_cast<double>(plan->records), static_cast<double>(plan->exact), static_cast<double>(plan->state), true};
    }
    [[nodiscard]] bool fits(std::size_t tokens, std::size_t sequences, double memory) const
    {
        const planned_bytes size = take(tokens, sequences);
        return size.fits && size.all() <= memory;
    }
    /// The longest sequences of which so many fit.
    [[nodiscard]] std::size_t longest(std::size_t sequences, double memory) const
    {
        return last_that(most_tokens, [&](std::size_t n) { return fits(n, sequences, memory); });
    }
    [[nodiscard]] std::size_t most_sequences(std::size_t tokens, double memory) const
    {
        return last_that(std::size_t{1} << 30, [&](std::size_t n) { return fits(tokens, n, memory); });
    }

    static constexpr std::size_t most_tokens = std::size_t{1} << 28;

private:
    /// The largest of 1 to `most` that still holds, 0 if 1 does not.
    template <class Holds>
    static std::size_t last_that(std::size_t most, Holds&& holds)
    {
        std::size_t low = 0, high = most;
        while (low < high) {
            const std::size_t middle = low + (high - low + 1) / 2;
            if (holds(middle)) low = middle;
            else high = middle - 1;
        }
        return low;
    }

    plan_request request_;
    kvarn::cache_config config_;
    bool quantized_ = true;
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

    std::vector<std::vector<std::string>> table{{"cache", "bits per element", "records", "sink and tails", "tables", "bytes", "", "of float16"}};
    if (memory > 0) table[0].insert(table[0].end(), {"longest context", "most sequences"});
    std::vector<std::string> names{"float16"};
    names.insert(names.end(), p.formats.begin(), p.formats.end());
    const double exact = planned_cache(p, "float16").take(p.context, p.sequences).all();
    for (const std::string& name : names) {
        const planned_cache cache(p, name);
        const planned_bytes size = cache.take(p.context, p.sequences);
        if (!size.fits) throw failure(name + ": more than one pool holds, 2^31 blocks of a tile each");
        const double elements = cache.elements(p.context) * static_cast<double>(p.sequences), all = size.all();
        table.push_back({name, text("%.4f", 8 * all / elements), bytes_text(size.records), bytes_text(size.exact), bytes_text(size.tables),
                         all < 0x1p63 ? grouped(static_cast<std::size_t>(all)) : "-", bytes_text(all), text("%.1f %%", 100 * all / exact)});
        if (!(memory > 0)) continue;
        const std::size_t longest = cache.longest(p.sequences, memory);
        table.back().push_back((longest == planned_cache::most_tokens ? "more than " : "") + grouped(longest));
        table.back().push_back(grouped(cache.most_sequences(p.context, memory)));
    }
    const auto count = [](std::size_t n, const char* what) { return grouped(n) + " " + what + (n == 1 ? "" : "s"); };
    std::string out = text("%d layers, %d KV heads, head_dim %d; %s of %s, steps of up to %s; the first %zu and the newest %zu tokens in float16, and "
                           "what fills no tile\n",
                           p.layers, p.kv_heads, p.head_dim, count(p.sequences, "sequence").c_str(), count(p.context, "token").c_str(),
                           count(p.step, "token").c_str(), p.sink, p.recent);
    if (memory > 0)
        out += text("in %s: the longest context of %s, and the most sequences of %s\n", bytes_text(memory).c_str(),
                    count(p.sequences, "sequence").c_str(), count(p.context, "token").c_str());
    print(out + "\n" + aligned(table));
}

}  // namespace kvarn_cli
