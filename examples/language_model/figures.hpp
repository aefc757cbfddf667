// SPDX-License-Identifier: Apache-2.0
#pragma once
// The HTML report: one file, inline SVG, nothing loaded from outside. Hops by cache, likelihood against bits, errors against
// context length, then all numbers as a table. In: what all three modes measured. Out: text; points carry numbers as tooltips.

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <functional>
#include <string>
#include <utility>
#include <vector>

#include <kvarn/version.hpp>

#include "charts.hpp"
#include "report.hpp"

namespace language_model {

namespace figure_detail {

[[nodiscard]] inline bool is_ours(const cache_plan& plan)
{
    return plan.storage == storage::records;
}

/// Colour and marker of every cache; no two caches share a colour as long as there are enough.
[[nodiscard]] inline std::vector<svg::series_style> styles_of(const std::vector<cache_report>& reports)
{
    // As in the other reports: the paper's encoder in greens, the refined one in blues.
    static constexpr const char* paper[] = {"#12a5a5", "#075e68", "#7cc5cc", "#2f7f86"};
    static constexpr const char* refined[] = {"#1257b8", "#0b1f4d", "#6aaee8", "#3a6fb0"};
    static constexpr const char* spare[] = {"#b0413e", "#6b8e23", "#c77dbb", "#5f6b7a", "#b8860b", "#2f8f6b"};
    std::vector<svg::series_style> styles;
    std::size_t next_paper = 0, next_refined = 0, next_spare = 0;
    for (const cache_report& r : reports) {
        svg::series_style s{"#1d2430", 4};
        if (is_ours(r.plan)) {
            const bool is_paper = r.plan.how.encoder == kvarn::encoder::paper;
            s = {is_paper ? paper[next_paper++ % std::size(paper)] : refined[next_refined++ % std::size(refined)], 0};
        } else if (r.plan.storage == storage::round_trip) {
            s = svg::style_of(r.plan.baseline.series);
            for (const svg::series_style& other : styles)
                if (std::string(other.colour) == s.colour) {
                    s.colour = spare[next_spare++ % std::size(spare)];
                    break;
                }
        }
        styles.push_back(s);
    }
    return styles;
}

[[nodiscard]] inline std::string legend(const std::vector<cache_report>& reports, const std::vector<svg::series_style>& styles,
                                        bool with_exact)
{
    std::string out = "<p class=\"legend\">";
    for (std::size_t i = 0; i < reports.size(); ++i)
        if (with_exact || reports[i].plan.storage != storage::exact)
            out += "<span><svg width=\"14\" height=\"14\" viewBox=\"0 0 14 14\" aria-hidden=\"true\">" +
                   svg::marker(7, 7, styles[i], reports[i].plan.name) + "</svg>" + svg::escaped(reports[i].plan.name) + "</span>";
    return out + "</p>\n";
}

/// One row a cache, one dot a sequence, a bar at the mean.
[[nodiscard]] inline std::string hops_figure(const std::vector<cache_report>& reports,
                                             const std::vector<svg::series_style>& styles, const experiment& e)
{
    const double row = 40, names = 190, notes = 250, bottom = 40 + row * static_cast<double>(reports.size());
    panel p;
    p.left = names - panel::margin;
    p.width = 1160 - p.left - notes;
    p.top = 40;
    p.height = bottom - p.top;
    p.x_high = static_cast<double>(e.predicted());
    const double step = panel::nice_step(p.x_high, 6);
    std::string out = svg::label(names - 12, 26, "cache", "end", "quiet") +
                      svg::label(p.x1() + 26, 26, "bits per element", "start", "quiet") +
                      svg::label(p.x1() + 146, 26, "mean", "start", "quiet") +
                      svg::label(p.x1() + 200, 26, e.truth ? "full walks" : "to the end", "start", "quiet");
    for (double v = 0; v <= p.x_high; v += step) {
        if (p.x_high - v > step / 3 || v == 0) out += svg::label(p.x(v), bottom + 17, text("%g", v));
        out += svg::line(p.x(v), p.top, p.x(v), bottom, "grid");
    }
    out += svg::line(p.x(p.x_high), p.top, p.x(p.x_high), bottom, "grid strong") +
           svg::label(p.x(p.x_high), bottom + 17, text("%g", p.x_high));
    out += svg::label((p.x0() + p.x1()) / 2, bottom + 38,
                      e.truth ? "hops before the first error" : "tokens before the first that differs from the exact cache's");
    for (std::size_t i = 0; i < reports.size(); ++i) {
        const cache_report& r = reports[i];
        const double middle = p.top + row * (static_cast<double>(i) + 0.5), mean = mean_of(r.hops);
        out += svg::line(p.x0(), middle + row / 2, p.x1(), middle + row / 2, "grid");
        out += svg::label(names - 12, middle + 4, r.plan.name, "end", is_ours(r.plan) ? "direct" : "");
        out += text("<rect x=\"%.1f\" y=\"%.1f\" width=\"%.1f\" height=\"%.1f\" fill=\"%s\" fill-opacity=\"0.13\"/>\n", p.x0(),
                    middle - row / 2 + 4, p.x(mean) - p.x0(), row - 8, styles[i].colour);
        for (std::size_t s = 0; s < r.hops.size(); ++s) {
            const double off =
                r.hops.size() < 2 ? 0 : (static_cast<double>(s) / static_cast<double>(r.hops.size() - 1) - 0.5) * (row - 18);
            out += text("<circle cx=\"%.1f\" cy=\"%.1f\" r=\"3.4\" fill=\"%s\" fill-opacity=\"0.75\" "
                        "class=\"mark\"><title>sequence %zu: %zu</title></circle>\n",
                        p.x(static_cast<double>(r.hops[s])), middle + off, styles[i].colour, s, r.hops[s]);
        }
        out += text("<line x1=\"%.1f\" y1=\"%.1f\" x2=\"%.1f\" y2=\"%.1f\" stroke=\"%s\" stroke-width=\"2.6\"/>\n", p.x(mean),
                    middle - row / 2 + 4, p.x(mean), middle + row / 2 - 4, styles[i].colour);
        out +=
            svg::label(p.x1() + 26, middle + 4, text("%.3f", r.plan.sealed_bits()), "start") +
            svg::label(p.x1() + 146, middle + 4, text("%.0f", mean), "start") +
            svg::label(p.x1() + 200, middle + 4, text("%zu of %zu", full_walks(r.hops, e.predicted()), r.hops.size()), "start");
    }
    out += svg::line(p.x0(), p.top, p.x0(), bottom, "axis") + svg::line(p.x0(), bottom, p.x1(), bottom, "axis");
    return drawing(bottom + 48, "Hops by cache", out);
}

/// A measure of the teacher mode against bits per element, logarithmic; a dashed line for the exact cache, if it is above zero.
[[nodiscard]] inline std::string bits_panel(const std::vector<cache_report>& reports,
                                            const std::vector<svg::series_style>& styles, panel p,
                                            const std::function<double(const cache_report&)>& measure)
{
    double least = INFINITY, most = 0, least_bits = 2, most_bits = 3;
    for (const cache_report& r : reports) {
        const double value = measure(r);
        if (!(value > 0) || !std::isfinite(value)) continue;
        least = std::min(least, value);
        most = std::max(most, value);
        if (r.plan.storage == storage::exact) continue;
        least_bits = std::min(least_bits, r.plan.sealed_bits());
        most_bits = std::max(most_bits, r.plan.sealed_bits());
    }
    if (!(most > 0)) return {};
    p.logarithmic = true;
    p.y_low = least / 1.5;
    p.y_high = most * 1.5;
    p.x_low = std::floor(least_bits);
    p.x_high = std::ceil(most_bits + 0.1);
    p.x_step = p.x_high - p.x_low <= 4 ? 0.5 : 1;
    p.x_title = "bits per element of sealed tokens";
    std::string out = p.axes();
    for (std::size_t i = reports.size(); i-- > 0;) {  // the first ones lie on top
        const cache_report& r = reports[i];
        const double value = measure(r);
        if (!(value > 0) || !std::isfinite(value)) continue;
        if (r.plan.storage == storage::exact) {
            out += svg::line(p.x0(), p.y(value), p.x1(), p.y(value), "p99");
            out += svg::label(p.x1() - 4, p.y(value) - 6, text("exact cache: %.2g", value), "end", "quiet halo");
        } else {
            out += svg::marker(p.x(r.plan.sealed_bits()), p.y(value), styles[i],
                               text("%s: %.3f bits per element, %.4g", r.plan.name.c_str(), r.plan.sealed_bits(), value));
        }
    }
    return out;
}

[[nodiscard]] inline std::string bits_figure(const std::vector<cache_report>& reports,
                                             const std::vector<svg::series_style>& styles)
{
    panel left, right;
    left.width = right.width = right.left = 580;
    left.title = "Negative log-likelihood";
    left.y_title = "nats per predicted token";
    right.title = "Divergence from the exact cache";
    right.y_title = "KL, nats per predicted token";
    const std::string out = bits_panel(reports, styles, left, [](const cache_report& r) { return mean_of(r.teacher).nll; }) +
                            bits_panel(reports, styles, right, [](const cache_report& r) { return mean_of(r.teacher).kl; });
    return out.empty() ? out : drawing(390, "Likelihood against bits per element", out);
}

using block_value = std::function<double(const block_result&)>;

/// One value per block against context length, a line for every cache but the exact one.
[[nodiscard]] inline std::string context_panel(const std::vector<cache_report>& reports,
                                               const std::vector<svg::series_style>& styles, panel p, const experiment& e,
                                               const block_value& value)
{
    p.x_high = 1;
    for (const cache_report& r : reports)
        if (!r.blocks.empty()) p.x_high = std::max(p.x_high, static_cast<double>(r.blocks.back().first + r.blocks.back().tokens));
    p.x_title = "context length, tokens";
    std::string out = p.axes();
    if (const double begin = static_cast<double>(e.known); e.truth && begin < p.x_high) {
        out += svg::line(p.x(begin), p.top, p.x(begin), p.y1(), "p99");
        out += svg::label(p.x(begin) + 5, p.top + 12, "walk", "start", "quiet halo");
    }
    for (std::size_t i = reports.size(); i-- > 0;) {
        if (reports[i].plan.storage == storage::exact) continue;
        std::vector<std::pair<double, double>> points;
        std::string marks;
        for (const block_result& b : reports[i].blocks) {
            const double v = value(b), at = static_cast<double>(b.first + b.tokens);
            if (!std::isfinite(v) || (p.logarithmic && v < p.y_low)) continue;
            points.emplace_back(at, v);
            marks += text("<circle cx=\"%.1f\" cy=\"%.1f\" r=\"2.6\" fill=\"%s\"><title>", p.x(at), p.y(v), styles[i].colour) +
                     svg::escaped(text("%s, block ending at %.0f: %.4g", reports[i].plan.name.c_str(), at, v)) +
                     "</title></circle>\n";
        }
        out += p.curve(points, styles[i].colour, is_ours(reports[i].plan)) + marks;
    }
    return out;
}

/// The least and the largest value of all blocks of all caches but the exact one.
[[nodiscard]] inline std::pair<double, double> range_of(const std::vector<cache_report>& reports, const block_value& value)
{
    std::pair<double, double> range{INFINITY, -INFINITY};
    for (const cache_report& r : reports)
        if (r.plan.storage != storage::exact)
            for (const block_result& b : r.blocks)
                if (const double v = value(b); std::isfinite(v)) range = {std::min(range.first, v), std::max(range.second, v)};
    return range;
}

/// Static, accumulated, and their difference.
[[nodiscard]] inline std::string accumulation_figure(const std::vector<cache_report>& reports,
                                                     const std::vector<svg::series_style>& styles, const experiment& e,
                                                     const block_measure& measure)
{
    const block_value fixed = [&](const block_result& b) { return measure.of(b.fixed); };
    const block_value accumulated = [&](const block_result& b) { return measure.of(b.accumulated); };
    const block_value difference = [&](const block_result& b) { return measure.of(b.accumulated) - measure.of(b.fixed); };
    const double most = std::max({range_of(reports, fixed).second, range_of(reports, accumulated).second, 1e-6});
    const auto [low, high] = range_of(reports, difference);
    const std::pair<const char*, const block_value*> panels[] = {
        {"static", &fixed}, {"accumulated", &accumulated}, {"accumulation: difference", &difference}};
    std::string out;
    for (std::size_t i = 0; i < 3; ++i) {
        panel p;
        p.left = 1160.0 / 3 * static_cast<double>(i);
        p.width = 1160.0 / 3;
        p.height = 240;
        p.title = panels[i].first;
        p.y_title = measure.unit;
        p.y_high = 1.05 * most;
        if (i == 2) {
            const double margin = std::max(0.05 * (high - std::min(low, 0.0)), 1e-6);
            p.y_low = low < 0 ? low - margin : 0;
            p.y_high = std::max(high, 0.0) + margin;
        }
        out += context_panel(reports, styles, p, e, *panels[i].second);
    }
    return drawing(330, std::string(measure.title) + ", " + measure.unit, out);
}

[[nodiscard]] inline std::string divergence_figure(const std::vector<cache_report>& reports,
                                                   const std::vector<svg::series_style>& styles, const experiment& e)
{
    const block_value kl = [&](const block_result& b) { return mean_kl(b, e.sequences.size()); };
    constexpr double floor = 1e-6;  // what float rounding alone makes
    const double most = range_of(reports, kl).second;
    if (!(most > floor)) return {};
    const double least =
        std::max(range_of(reports, [&](const block_result& b) { return kl(b) > floor ? kl(b) : INFINITY; }).first, floor);
    panel p;
    p.title = "Divergence of the logits, accumulated run";
    p.y_title = "KL, nats per token";
    p.logarithmic = true;
    p.y_low = least / 1.4;
    p.y_high = most * 1.4;
    return drawing(390, p.title, context_panel(reports, styles, p, e, kl));
}

[[nodiscard]] inline std::string number_table(const std::vector<cache_report>& reports, const experiment& e)
{
    std::string out = "<div class=\"wide\"><table><thead><tr><th>cache</th><th>bits per<br>element</th><th>with sink<br>and "
                      "tail</th><th>bytes</th>"
                      "<th>NLL</th><th>KL</th><th>accuracy</th>";
    out += std::string("<th>") + (e.truth ? "hops" : "agreeing<br>tokens") + "</th><th>" +
           (e.truth ? "full<br>walks" : "to the<br>end") + "</th></tr></thead><tbody>\n";
    for (const cache_report& r : reports) {
        const teacher_result mean = mean_of(r.teacher);
        out += std::string("<tr") + (is_ours(r.plan) ? " class=\"ours\"" : "") + "><td>" + svg::escaped(r.plan.name) + "</td>";
        for (const std::string& cell :
             {text("%.3f", r.plan.sealed_bits()), text("%.3f", r.bits_per_element_total),
              kvarn_cli::grouped(static_cast<std::size_t>(std::llround(r.bytes))), text("%.5f", mean.nll), text("%.5f", mean.kl),
              text("%.4f", mean.accuracy), text("%.1f", mean_of(r.hops)),
              text("%zu/%zu", full_walks(r.hops, e.predicted()), r.hops.size())})
            out += "<td>" + cell + "</td>";
        out += "</tr>\n";
    }
    return out + "</tbody></table></div>\n";
}

}  // namespace figure_detail

/// The whole report as one HTML file.
[[nodiscard]] inline std::string html_report(const std::vector<cache_report>& reports, const experiment& e,
                                             const std::string& facts)
{
    using namespace figure_detail;
    const std::vector<svg::series_style> styles = styles_of(reports);
    const bool quantized =
        std::any_of(reports.begin(), reports.end(), [](const cache_report& r) { return r.plan.storage != storage::exact; });
    std::string out = "<!DOCTYPE html>\n<html lang=\"en\"><head><meta charset=\"utf-8\"><meta name=\"viewport\" "
                      "content=\"width=device-width\">\n"
                      "<title>kvarn: decoding with quantized caches</title>\n<style>" +
                      std::string(svg::style_sheet) + "</style></head><body>\n";
    std::string sentence = facts;
    if (const std::size_t end = sentence.find('\n'); end != std::string::npos) sentence.replace(end, 1, ". ");
    out += "<h1>Decoding with quantized KV caches</h1>\n<p class=\"facts\">" + svg::escaped(sentence) +
           ". kvarn " KVARN_VERSION_STRING
           ". Every cache keeps the sink and the newest tokens up to a whole tile exact; a tile is quantized once it is "
           "full, and decoding goes on with what it holds.</p>\n";
    out += std::string("<h2>") + (e.truth ? "Hops survived" : "Greedy agreement") + "</h2>\n" + hops_figure(reports, styles, e);
    out += std::string("<p class=\"caption\">") +
           (e.truth ? "Greedy decoding: every hop is one exact retrieval from the cache, and a wrong one ends the walk. "
                    : "Greedy decoding beside the exact cache's own continuation. ") +
           "One dot is one sequence, the bar reaches to the mean; farther right is better. Bits count codes, scales and padding "
           "of sealed "
           "tokens.</p>\n";
    if (quantized) {
        if (const std::string bits = bits_figure(reports, styles); !bits.empty()) {
            out += "<h2>Likelihood against bits</h2>\n" + legend(reports, styles, false) + bits;
            out += "<p class=\"caption\">Teacher forcing: every predicted token given the right history. Vertical axes are "
                   "logarithmic; lower left is better.</p>\n";
        }
        const std::string names = legend(reports, styles, false);
        const struct {
            const char *title, *caption;
            std::size_t first, end;
        } sections[] = {{"Attention error against context length",
                         "A fixed sequence, block by block, beside a run with an exact cache. Static: every block and layer gets "
                         "the exact run's inputs, only the "
                         "history of its own attention is quantized. Accumulated: errors feed later layers and later blocks, as "
                         "in decoding. The third panel is "
                         "what decoding adds. Relative error ||y - y'|| / ||y|| of the attention output, mean over layers.",
                         0, 1},
                        {"Error of the cached K and V",
                         "What the cache holds of the tokens of each block, against the exact run's K and V: ||x - x'|| / ||x|| "
                         "over layers and heads.",
                         1, 3},
                        {"Error of the token scales",
                         "| ||x'|| / ||x|| - 1 |, mean over the tokens of a block, layers and heads: how wrong the length of "
                         "each cached vector is.",
                         3, 5}};
        for (const auto& section : sections) {
            out += std::string("<h2>") + section.title + "</h2>\n" + names;
            for (std::size_t i = section.first; i < section.end; ++i) {
                if (section.end - section.first > 1) out += std::string("<h3>") + block_measures[i].title + "</h3>\n";
                out += accumulation_figure(reports, styles, e, block_measures[i]);
            }
            out += std::string("<p class=\"caption\">") + section.caption + "</p>\n";
        }
        if (const std::string kl = divergence_figure(reports, styles, e); !kl.empty())
            out += "<h2>Logits</h2>\n" + names + kl +
                   "<p class=\"caption\">KL from the exact run's distribution, mean over all tokens of a block, logarithmic "
                   "axis. The tokens of the "
                   "context are random, so nothing depends on the large values there; those of the walk do.</p>\n";
    }
    out += "<h2>All numbers</h2>\n" + number_table(reports, e);
    return out + "</body></html>\n";
}

}  // namespace language_model
