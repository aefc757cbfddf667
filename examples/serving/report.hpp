// SPDX-License-Identifier: Apache-2.0
#pragma once
// What a run was like, as tables for people, as JSON for programs, and as one HTML file with the pool over time. In: requests, answers, moments.

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <functional>
#include <string>
#include <utility>
#include <vector>

#include <nlohmann/json.hpp>

#include <kvarn/version.hpp>

#include "../language_model/charts.hpp"
#include "scheduler.hpp"

namespace serving {

namespace svg = kvarn_cli::report_detail;

/// Everything that is reported.
struct outcome {
    std::string facts;
    std::vector<request> requests;
    std::vector<answer> answers;
    std::vector<moment> moments;
    kvarn::cache_config config;
    kvarn::cache_plan plan;
    bool checked = false;
};

struct totals {
    std::size_t prompt_tokens = 0, generated = 0, shared = 0, drafted = 0, accepted = 0, preempted = 0, resumed = 0;
    std::size_t most_records = 0, most_exact = 0, most_shared = 0, kept_exact = 0;
    double seconds = 0;
};

[[nodiscard]] inline totals totals_of(const outcome& o)
{
    totals t;
    for (const answer& a : o.answers) {
        t.generated += a.ids.size();
        t.shared += a.shared;
        t.preempted += a.preempted;
    }
    for (const moment& m : o.moments) {
        t.prompt_tokens += m.prompt_tokens;
        t.drafted += m.drafted;
        t.accepted += m.accepted;
        t.resumed += m.resumed_tokens;
        t.seconds += m.seconds;
        t.most_records = std::max(t.most_records, m.pool.records.used);
        t.most_exact = std::max(t.most_exact, m.pool.exact.used);
        t.most_shared = std::max(t.most_shared, m.pool.records.shared + m.pool.exact.shared);
    }
    const kvarn::pool_statistics& last = o.moments.back().pool;
    t.kept_exact = last.tiles_kept_not_finite + last.tiles_kept_overflowed;
    return t;
}

[[nodiscard]] inline std::string summary(const outcome& o)
{
    const totals t = totals_of(o);
    std::string out = o.facts + "\n" +
                      text("pool: %zu record blocks of %zu bytes, %zu exact blocks of %zu bytes, %.1f MB with its tables; at most %zu and %zu were "
                           "used, %zu shared\n",
                           o.config.record_blocks, o.plan.record_block_bytes, o.config.exact_blocks, o.plan.exact_block_bytes,
                           static_cast<double>(o.plan.bytes()) / 1e6, t.most_records, t.most_exact, t.most_shared) +
                      text("%zu steps in %.2f s: %zu tokens of prompts run and %zu taken over from prefixes, %zu tokens generated, %.0f tokens/s\n",
                           o.moments.size(), t.seconds, t.prompt_tokens, t.shared, t.generated,
                           static_cast<double>(t.prompt_tokens + t.generated) / std::max(t.seconds, 1e-9)) +
                      text("%zu of %zu drafts accepted; %zu preemptions, %zu tokens dropped by them; %zu tiles sealed, %zu kept exact\n", t.accepted,
                           t.drafted, t.preempted, t.resumed, o.moments.back().pool.tiles_sealed, t.kept_exact);
    if (o.checked) out += "check: every request has the tokens, the logits and the cache that it has alone, bit for bit\n";
    return out;
}

[[nodiscard]] inline std::vector<std::vector<std::string>> request_rows(const outcome& o)
{
    std::vector<std::vector<std::string>> rows{
        {"request", "arrives", "first step", "last step", "prompt", "shared", "generated", "as expected", "drafts", "accepted", "preempted"}};
    for (std::size_t i = 0; i < o.answers.size(); ++i) {
        const request& r = o.requests[i];
        const answer& a = o.answers[i];
        const auto wrong = std::mismatch(a.ids.begin(), a.ids.end(), r.expected.begin(), r.expected.end()).first;
        rows.push_back({std::to_string(i), std::to_string(r.arrival), std::to_string(a.first_step), std::to_string(a.last_step),
                        std::to_string(r.prompt.size()), std::to_string(a.shared), std::to_string(a.ids.size()),
                        r.expected.empty() ? "-" : std::to_string(wrong - a.ids.begin()), std::to_string(a.drafted), std::to_string(a.accepted),
                        std::to_string(a.preempted)});
    }
    return rows;
}

[[nodiscard]] inline std::string text_report(const outcome& o)
{
    return summary(o) + "\n" + kvarn_cli::aligned(request_rows(o));
}

[[nodiscard]] inline std::string json_report(const outcome& o)
{
    using nlohmann::ordered_json;
    const totals t = totals_of(o);
    ordered_json out{{"steps", o.moments.size()},
                     {"seconds", t.seconds},
                     {"prompt_tokens", t.prompt_tokens},
                     {"generated_tokens", t.generated},
                     {"shared_tokens", t.shared},
                     {"drafted", t.drafted},
                     {"accepted", t.accepted},
                     {"preemptions", t.preempted},
                     {"checked", o.checked}};
    out["pool"] = {{"record_blocks", o.config.record_blocks},      {"exact_blocks", o.config.exact_blocks},
                   {"record_block_bytes", o.plan.record_block_bytes}, {"exact_block_bytes", o.plan.exact_block_bytes},
                   {"bytes", o.plan.bytes()},                      {"most_records", t.most_records},
                   {"most_exact", t.most_exact},                   {"most_shared", t.most_shared},
                   {"used_at_end", o.moments.back().pool.records.used + o.moments.back().pool.exact.used},
                   {"tiles_sealed", o.moments.back().pool.tiles_sealed}, {"tiles_kept_exact", t.kept_exact}};
    for (std::size_t i = 0; i < o.answers.size(); ++i) {
        const answer& a = o.answers[i];
        out["requests"].push_back({{"arrival", o.requests[i].arrival},
                                   {"first_step", a.first_step},
                                   {"last_step", a.last_step},
                                   {"prompt", o.requests[i].prompt.size()},
                                   {"shared", a.shared},
                                   {"ids", a.ids},
                                   {"expected", o.requests[i].expected},
                                   {"drafted", a.drafted},
                                   {"accepted", a.accepted},
                                   {"preempted", a.preempted}});
    }
    for (const moment& m : o.moments)
        out["moments"].push_back({{"step", m.step},
                                  {"records", m.pool.records.used},
                                  {"exact", m.pool.exact.used},
                                  {"shared", m.pool.records.shared + m.pool.exact.shared},
                                  {"running", m.running},
                                  {"waiting", m.waiting},
                                  {"sealing", m.sealing},
                                  {"prefixes", m.prefixes},
                                  {"prompt_tokens", m.prompt_tokens},
                                  {"decoded_tokens", m.decoded_tokens},
                                  {"drafted", m.drafted},
                                  {"accepted", m.accepted},
                                  {"preempted", m.preempted}});
    return out.dump(1) + "\n";
}

namespace report_detail {

struct series {
    const char *name, *colour;
    std::function<double(const moment&)> of;
};

/// Figures of every step as steps of lines, a mark where requests were preempted.
[[nodiscard]] inline std::string over_time(const outcome& o, const char* title, const char* unit, double capacity, const std::vector<series>& all)
{
    language_model::panel p;
    p.title = title;
    p.x_title = "step";
    p.y_title = unit;
    p.height = 240;
    p.x_high = static_cast<double>(o.moments.back().step + 1);
    p.y_high = std::max(capacity, 1.0);
    for (const series& s : all)
        for (const moment& m : o.moments) p.y_high = std::max(p.y_high, s.of(m));
    p.y_high *= 1.05;
    std::string out = p.axes(), legend = "<p class=\"legend\">";
    if (capacity > 0) out += svg::line(p.x0(), p.y(capacity), p.x1(), p.y(capacity), "p99") + svg::label(p.x1() - 4, p.y(capacity) - 5, "all blocks", "end", "quiet halo");
    for (const moment& m : o.moments)
        if (m.preempted != 0)
            out += text("<line x1=\"%.1f\" y1=\"%.1f\" x2=\"%.1f\" y2=\"%.1f\" stroke=\"#c2255c\" stroke-width=\"1.4\"><title>step %zu: %zu "
                        "preempted</title></line>\n",
                        p.x(static_cast<double>(m.step)), p.y1(), p.x(static_cast<double>(m.step)), p.y1() - 14, m.step, m.preempted);
    for (const series& s : all) {
        std::vector<std::pair<double, double>> points;
        for (const moment& m : o.moments) {
            points.emplace_back(static_cast<double>(m.step), s.of(m));
            points.emplace_back(static_cast<double>(m.step + 1), s.of(m));
        }
        out += p.curve(points, s.colour, false);
        legend += text("<span><svg width=\"14\" height=\"14\" viewBox=\"0 0 14 14\" aria-hidden=\"true\"><line x1=\"0\" y1=\"7\" x2=\"14\" "
                       "y2=\"7\" stroke=\"%s\" stroke-width=\"2.4\"/></svg>%s</span>",
                       s.colour, s.name);
    }
    return legend + "</p>\n" + language_model::drawing(340, title, out);
}

}  // namespace report_detail

[[nodiscard]] inline std::string html_report(const outcome& o)
{
    using report_detail::over_time;
    const auto number = [](std::size_t n) { return static_cast<double>(n); };
    std::string out = "<!DOCTYPE html>\n<html lang=\"en\"><head><meta charset=\"utf-8\"><meta name=\"viewport\" content=\"width=device-width\">\n"
                      "<title>kvarn: continuous batching over one pool</title>\n<style>" +
                      std::string(svg::style_sheet) + "</style></head><body>\n<h1>Continuous batching over one pool</h1>\n";
    std::string facts = svg::escaped(summary(o));
    for (std::size_t at = 0; (at = facts.find('\n', at)) != std::string::npos; at += 5) facts.replace(at, 1, "<br>\n");
    out += "<p class=\"facts\">" + facts + "kvarn " KVARN_VERSION_STRING "</p>\n<h2>The pool over time</h2>\n";
    out += over_time(o, "Record blocks", "blocks", number(o.config.record_blocks),
                     {{"used", "#1257b8", [&](const moment& m) { return number(m.pool.records.used); }},
                      {"shared by two sequences or more", "#12855d", [&](const moment& m) { return number(m.pool.records.shared); }}});
    out += over_time(o, "Exact blocks", "blocks", number(o.config.exact_blocks),
                     {{"used", "#1257b8", [&](const moment& m) { return number(m.pool.exact.used); }},
                      {"shared by two sequences or more", "#12855d", [&](const moment& m) { return number(m.pool.exact.shared); }}});
    out += "<p class=\"caption\">After each step. Prefixes that are kept count as used until their blocks are needed. Red marks: requests that were "
           "preempted.</p>\n<h2>Requests and tokens</h2>\n";
    out += over_time(o, "Sequences", "sequences", 0,
                     {{"running", "#1257b8", [&](const moment& m) { return number(m.running); }},
                      {"waiting", "#d9730d", [&](const moment& m) { return number(m.waiting); }},
                      {"waiting for a tile to be sealed", "#8a4fb5", [&](const moment& m) { return number(m.sealing); }}});
    out += over_time(o, "Tokens of a step", "tokens", 0,
                     {{"prompts", "#7f7f7f", [&](const moment& m) { return number(m.prompt_tokens); }},
                      {"generated", "#1257b8", [&](const moment& m) { return number(m.decoded_tokens); }},
                      {"drafts, rejected", "#c2255c", [&](const moment& m) { return number(m.drafted - m.accepted); }}});
    out += "<h2>All requests</h2>\n<div class=\"wide\"><table>";
    bool head = true;
    for (const auto& row : request_rows(o)) {
        out += head ? "<thead><tr>" : "<tr>";
        for (const std::string& cell : row) out += (head ? "<th>" : "<td>") + svg::escaped(cell) + (head ? "</th>" : "</td>");
        out += head ? "</tr></thead><tbody>\n" : "</tr>\n";
        head = false;
    }
    return out + "</tbody></table></div>\n</body></html>\n";
}

}  // namespace serving
