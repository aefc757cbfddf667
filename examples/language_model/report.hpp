// SPDX-License-Identifier: Apache-2.0
#pragma once
// What was measured, as tables for people and as JSON for programs. In: evaluation. Out: text.

#include <cmath>
#include <cstddef>
#include <string>
#include <vector>

#include <nlohmann/json.hpp>

#include "../common/text.hpp"
#include "likelihood.hpp"

namespace language_model {

[[nodiscard]] inline double mean_of(const std::vector<std::size_t>& all)
{
    double sum = 0;
    for (const std::size_t one : all) sum += static_cast<double>(one);
    return sum / static_cast<double>(all.size());
}

[[nodiscard]] inline std::size_t full_walks(const std::vector<std::size_t>& hops, std::size_t predicted)
{
    return static_cast<std::size_t>(std::count(hops.begin(), hops.end(), predicted));
}

/// Mean over layers of the relative error of the attention output.
[[nodiscard]] inline double attention_error(const block_errors& errors)
{
    double sum = 0;
    for (const squares& layer : errors.attention) sum += layer.relative();
    return sum / static_cast<double>(errors.attention.size());
}

[[nodiscard]] inline double mean_kl(const block_result& b, std::size_t sequences)
{
    return b.kl / static_cast<double>(b.tokens * sequences);
}

/// One quantity of the pseudo-decoding run, for tables and figures.
struct block_measure {
    const char* title;
    const char* unit;
    double (*of)(const block_errors&);
};

inline constexpr block_measure block_measures[] = {
    {"attention output", "relative error", [](const block_errors& e) { return attention_error(e); }},
    {"K", "relative error", [](const block_errors& e) { return e.k.relative(); }},
    {"V", "relative error", [](const block_errors& e) { return e.v.relative(); }},
    {"K", "token-scale error, mean", [](const block_errors& e) { return kvarn_cli::spread_of(e.k_scale).mean; }},
    {"V", "token-scale error, mean", [](const block_errors& e) { return kvarn_cli::spread_of(e.v_scale).mean; }},
};

[[nodiscard]] inline std::string summary_table(const evaluation& all, const experiment& e)
{
    const std::vector<cache_report>& reports = all.caches;
    const bool with_teacher = !reports.front().teacher.empty(), with_greedy = !reports.front().hops.empty();
    std::vector<std::vector<std::string>> rows{{"", "bits per", "with sink", ""}, {"cache", "element", "and tail", "bytes"}};
    const auto add = [&](const char* above, const char* below) {
        rows[0].push_back(above);
        rows[1].push_back(below);
    };
    if (with_teacher) add("teacher", "NLL"), add("teacher", "KL"), add("teacher", "accuracy");
    if (with_greedy) add("greedy", e.truth ? "hops" : "agreeing"), add("full", e.truth ? "walks" : "length");
    for (const cache_report& r : reports) {
        rows.push_back({r.plan.name, text("%.3f", r.plan.sealed_bits()), text("%.3f", r.bits_per_element_total),
                        kvarn_cli::grouped(static_cast<std::size_t>(std::llround(r.bytes)))});
        if (with_teacher) {
            const likelihood l = likelihood_of(r.teacher, all.exact);
            for (const std::string& cell : {text("%.5f", l.nll.mean), text("%.5f", l.kl.mean), text("%.4f", l.accuracy)})
                rows.back().push_back(cell);
        }
        if (with_greedy) {
            rows.back().push_back(text("%.1f", mean_of(r.hops)));
            rows.back().push_back(text("%zu/%zu", full_walks(r.hops, e.predicted()), r.hops.size()));
        }
    }
    return kvarn_cli::aligned(rows);
}

/// The blocks of one cache: errors with exact inputs (static), after everything before was quantized too (accum), the
/// difference.
[[nodiscard]] inline std::string block_table(const cache_report& r, std::size_t sequences)
{
    std::vector<std::vector<std::string>> rows{
        {"context", "attention", "", "", "K rel", "", "V rel", "", "K scale", "", "K p99", "V scale", "", "V p99", "KL"},
        {"tokens", "static", "accum", "diff", "static", "accum", "static", "accum", "static", "accum", "accum", "static", "accum",
         "accum", "accum"}};
    for (const block_result& b : r.blocks) {
        const double fixed = attention_error(b.fixed), accumulated = attention_error(b.accumulated);
        rows.push_back({std::to_string(b.first + b.tokens), text("%.4f", fixed), text("%.4f", accumulated),
                        text("%.4f", accumulated - fixed)});
        for (std::size_t i = 1; i < std::size(block_measures); ++i) {
            rows.back().push_back(text("%.4f", block_measures[i].of(b.fixed)));
            rows.back().push_back(text("%.4f", block_measures[i].of(b.accumulated)));
            if (i == 3) rows.back().push_back(text("%.4f", kvarn_cli::spread_of(b.accumulated.k_scale).p99));
            if (i == 4) rows.back().push_back(text("%.4f", kvarn_cli::spread_of(b.accumulated.v_scale).p99));
        }
        rows.back().push_back(text("%.5f", mean_kl(b, sequences)));
    }
    return r.plan.name + "\n" + kvarn_cli::aligned(rows);
}

[[nodiscard]] inline std::string text_report(const evaluation& all, const experiment& e, const std::string& facts,
                                             std::size_t against)
{
    const std::vector<cache_report>& reports = all.caches;
    std::string out = facts + "\n\n";
    if (!reports.front().teacher.empty() || !reports.front().hops.empty()) out += summary_table(all, e);
    if (!reports.front().teacher.empty()) out += "\n" + likelihood_tables(all, e, against);
    if (reports.front().blocks.empty()) return out;
    out += "\npseudo-decoding: a fixed sequence, block by block beside the exact run. static: exact inputs everywhere, only the "
           "history of\n"
           "each layer's own attention is quantized. accum: errors feed later layers and blocks. rel: ||x - x'|| / ||x||; scale: "
           "mean of\n"
           "| ||x'|| / ||x|| - 1 | per token, p99 its 99th percentile; KL: nats per token, from the exact logits.\n";
    for (const cache_report& r : reports) {
        out += '\n';
        out += block_table(r, e.sequences.size());
    }
    return out;
}

[[nodiscard]] inline nlohmann::ordered_json json_of(const block_result& b, std::size_t sequences)
{
    using nlohmann::ordered_json;
    const auto three = [](double fixed, double accumulated) {
        return ordered_json{{"static", fixed}, {"accumulated", accumulated}, {"accumulation", accumulated - fixed}};
    };
    const auto spread = [](const std::vector<double>& sorted) {
        const kvarn_cli::spread s = kvarn_cli::spread_of(sorted);
        return ordered_json{{"mean", s.mean}, {"p99", s.p99}, {"worst", s.worst}};
    };
    ordered_json out{{"context", b.first + b.tokens}, {"tokens", b.tokens}};
    out["attention_error"] = three(attention_error(b.fixed), attention_error(b.accumulated));
    for (std::size_t layer = 0; layer < b.fixed.attention.size(); ++layer)
        out["attention_error_of_layers"].push_back(
            three(b.fixed.attention[layer].relative(), b.accumulated.attention[layer].relative()));
    out["key_error"] = three(b.fixed.k.relative(), b.accumulated.k.relative());
    out["value_error"] = three(b.fixed.v.relative(), b.accumulated.v.relative());
    out["key_token_scale"] = {{"static", spread(b.fixed.k_scale)}, {"accumulated", spread(b.accumulated.k_scale)}};
    out["value_token_scale"] = {{"static", spread(b.fixed.v_scale)}, {"accumulated", spread(b.accumulated.v_scale)}};
    out["kl"] = mean_kl(b, sequences);
    return out;
}

/// A list of one object per cache.
[[nodiscard]] inline std::string json_report(const evaluation& all, const experiment& e)
{
    using nlohmann::ordered_json;
    ordered_json list = ordered_json::array();
    for (std::size_t i = 0; i < all.caches.size(); ++i) {
        const cache_report& r = all.caches[i];
        ordered_json one{{"cache", r.plan.name},
                         {"bits_per_element", r.plan.sealed_bits()},
                         {"bits_per_element_total", r.bits_per_element_total},
                         {"bytes", r.bytes},
                         {"sequences", e.sequences.size()},
                         {"predicted", e.predicted()}};
        if (!r.teacher.empty()) add_likelihood(one, all, e, i);
        if (!r.hops.empty()) {
            one["hops"] = mean_of(r.hops);
            one["full_walks"] = full_walks(r.hops, e.predicted());
            one["reference"] = e.truth ? "truth" : "exact";
            one["hops_of_sequences"] = r.hops;
        }
        for (const block_result& b : r.blocks) one["blocks"].push_back(json_of(b, e.sequences.size()));
        list.push_back(std::move(one));
    }
    return list.dump(1) + "\n";
}

}  // namespace language_model
