// SPDX-License-Identifier: Apache-2.0
#pragma once
// The HTML report: one file, inline SVG, nothing loaded from outside. Hops by cache, likelihood against bits and
// position, errors against context length, then all numbers as a table. In: what the modes that ran measured. Out:
// text; points carry numbers as tooltips.

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

/// A measure of the teacher mode against bits per element, logarithmic; a dashed line for the exact cache, if it is
/// above zero.
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

[[nodiscard]] inline std::string bits_figure(const evaluation& all, const std::vector<svg::series_style>& styles)
{
    const std::vector<cache_report>& reports = all.caches;
    if (all.exact.empty()) return {};
    panel left, right;
    left.width = right.width = right.left = 580;
    left.title = "Negative log-likelihood";
    left.y_title = "nats per predicted token";
    right.title = "Divergence from the exact cache";
    right.y_title = "KL, nats per predicted token";
    const std::string out =
        bits_panel(reports, styles, left, [&](const cache_report& r) { return likelihood_of(r.teacher, all.exact).nll.mean; }) +
        bits_panel(reports, styles, right, [&](const cache_report& r) { return likelihood_of(r.teacher, all.exact).kl.mean; });
    return out.empty() ? out : drawing(390, "Likelihood against bits per element", out);
}

/// Divergence and agreement against position, in up to 24 ranges of one length.
[[nodiscard]] inline std::string position_figure(const evaluation& all, const std::vector<svg::series_style>& styles,
                                                 const experiment& e)
{
    const std::size_t parts = std::min<std::size_t>(24, e.scored() / 16);
    if (all.exact.empty() || parts < 2) return {};
    const auto first = [&](std::size_t i) { return e.scored() * i / parts; };
    std::string out;
    for (const bool divergence : {true, false}) {
        std::vector<std::vector<std::pair<double, double>>> curves(all.caches.size());
        double least = INFINITY, most = 0;
        for (std::size_t i = 0; i < all.caches.size(); ++i)
            for (std::size_t p = 0; p < parts && all.caches[i].plan.storage != storage::exact; ++p) {
                const likelihood l = likelihood_of(all.caches[i].teacher, all.exact, first(p), first(p + 1));
                const double value = divergence ? l.kl.mean : 1 - l.agreement;
                if (!(value > 1e-7)) continue;  // rounding, or no token at all
                least = std::min(least, value);
                most = std::max(most, value);
                curves[i].emplace_back(static_cast<double>(e.from) + 0.5 * static_cast<double>(first(p) + first(p + 1)), value);
            }
        if (!(most > 0)) continue;
        panel p;
        p.width = 580;
        p.left = divergence ? 0 : 580;
        p.title = divergence ? "Divergence from the exact cache" : "Another token is the most likely one";
        p.y_title = divergence ? "KL, nats per predicted token" : "share of tokens";
        p.x_title = "position, tokens";
        p.logarithmic = true;
        p.x_low = static_cast<double>(e.from);
        p.x_high = static_cast<double>(e.length());
        p.y_low = least / 1.4;
        p.y_high = most * 1.4;
        out += p.axes();
        for (std::size_t i = curves.size(); i-- > 0;) {
            out += p.curve(curves[i], styles[i].colour, is_ours(all.caches[i].plan));
            for (const auto& [at, value] : curves[i])
                out += svg::marker(p.x(at), p.y(value), styles[i],
                                   text("%s, around %.0f: %.4g", all.caches[i].plan.name.c_str(), at, value));
        }
    }
    return out.empty() ? out : drawing(390, "Likelihood against position", out);
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

/// What was measured of every cache; columns of modes that did not run are left out.
[[nodiscard]] inline std::string number_table(const evaluation& all, const experiment& e)
{
    const std::vector<cache_report>& reports = all.caches;
    const bool with_teacher = !all.exact.empty(), with_greedy = !reports.front().hops.empty();
    std::string out = "<div class=\"wide\"><table><thead><tr><th>cache</th><th>bits per<br>element</th><th>with sink<br>and "
                      "tail</th><th>bytes</th>";
    if (with_teacher)
        out += "<th>NLL</th><th>excess NLL</th><th>KL</th><th>KL<br>99 %</th><th>KL<br>99.9 "
               "%</th><th>KL<br>worst</th><th>top-1<br>agrees</th>"
               "<th>accuracy</th><th>cache<br>tokens/s</th>";
    if (with_greedy)
        out += std::string("<th>") + (e.truth ? "hops" : "agreeing<br>tokens") + "</th><th>" +
               (e.truth ? "full<br>walks" : "to the<br>end") + "</th>";
    out += "</tr></thead><tbody>\n";
    for (const cache_report& r : reports) {
        out += std::string("<tr") + (is_ours(r.plan) ? " class=\"ours\"" : "") + "><td>" + svg::escaped(r.plan.name) + "</td>";
        std::vector<std::string> cells{text("%.3f", r.plan.sealed_bits()), text("%.3f", r.bits_per_element_total),
                                       kvarn_cli::grouped(static_cast<std::size_t>(std::llround(r.bytes)))};
        if (with_teacher) {
            const likelihood l = likelihood_of(r.teacher, all.exact);
            for (const std::string& cell : {text("%.5f", l.nll.mean), text_of(l.excess, 5), text_of(l.kl, 5),
                                            text("%.4f", l.kl_p99), text("%.4f", l.kl_p999), text("%.4f", l.kl_worst),
                                            text("%.4f", l.agreement), text("%.4f", l.accuracy), text("%.0f", cache_speed(r, e))})
                cells.push_back(cell);
        }
        if (with_greedy) {
            cells.push_back(text("%.1f", mean_of(r.hops)));
            cells.push_back(text("%zu/%zu", full_walks(r.hops, e.predicted()), r.hops.size()));
        }
        for (const std::string& cell : cells) out += "<td>" + cell + "</td>";
        out += "</tr>\n";
    }
    return out + "</tbody></table></div>\n";
}

/// One figure per sequence and cache, or per range of positions and cache.
[[nodiscard]] inline std::string divergence_table(const evaluation& all, const experiment& e, bool by_position)
{
    const auto ranges = ranges_of(e);
    const std::size_t columns = by_position ? ranges.size() : e.sequences.size();
    if (all.exact.empty() || columns < 2 || columns > 32) return {};
    std::string out = std::string("<h3>KL by ") + (by_position ? "position" : "sequence") +
                      "</h3>\n<div class=\"wide\"><table><thead><tr><th>cache</th>";
    for (std::size_t i = 0; i < columns; ++i) out += "<th>" + (by_position ? range_text(ranges[i]) : std::to_string(i)) + "</th>";
    out += "</tr></thead><tbody>\n";
    for (const cache_report& r : all.caches) {
        out += std::string("<tr") + (is_ours(r.plan) ? " class=\"ours\"" : "") + "><td>" + svg::escaped(r.plan.name) + "</td>";
        for (std::size_t i = 0; i < columns; ++i)
            out += "<td>" +
                   text_of(by_position ? likelihood_of(r.teacher, all.exact, ranges[i].first - e.from, ranges[i].end - e.from).kl
                                       : likelihood_of({r.teacher[i]}, {all.exact[i]}).kl,
                           5) +
                   "</td>";
        out += "</tr>\n";
    }
    return out + "</tbody></table></div>\n";
}

/// Every cache less one of them, token by token.
[[nodiscard]] inline std::string difference_table(const evaluation& all, std::size_t against)
{
    if (all.exact.empty() || all.caches.size() < 2) return {};
    const cache_report& other = all.caches[against];
    std::string out = "<h3>Paired with " + svg::escaped(other.plan.name) +
                      "</h3>\n<div class=\"wide\"><table><thead><tr><th>cache, less " + svg::escaped(other.plan.name) +
                      "</th><th>KL</th><th>NLL</th></tr></thead><tbody>\n";
    for (std::size_t i = 0; i < all.caches.size(); ++i) {
        if (i == against) continue;
        const difference d = difference_of(all.caches[i].teacher, other.teacher);
        out += std::string("<tr") + (is_ours(all.caches[i].plan) ? " class=\"ours\"" : "") + "><td>" +
               svg::escaped(all.caches[i].plan.name) + "</td><td>" + text_of(d.kl, 5) + "</td><td>" + text_of(d.nll, 5) +
               "</td></tr>\n";
    }
    return out + "</tbody></table></div>\n";
}

}  // namespace figure_detail

/// The whole report as one HTML file.
[[nodiscard]] inline std::string html_report(const evaluation& all, const experiment& e, const std::string& facts,
                                             std::size_t against)
{
    using namespace figure_detail;
    const std::vector<cache_report>& reports = all.caches;
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
    if (!reports.front().hops.empty()) {
        out +=
            std::string("<h2>") + (e.truth ? "Hops survived" : "Greedy agreement") + "</h2>\n" + hops_figure(reports, styles, e);
        out +=
            std::string("<p class=\"caption\">") +
            (e.truth ? "Greedy decoding: every hop is one exact retrieval from the cache, and a wrong one ends the walk. "
                     : "Greedy decoding beside the exact cache's own continuation. ") +
            "One dot is one sequence, the bar reaches to the mean; farther right is better. Bits count codes, scales and padding "
            "of sealed tokens.</p>\n";
    }
    if (quantized) {
        if (const std::string bits = bits_figure(all, styles); !bits.empty()) {
            out += "<h2>Likelihood against bits</h2>\n" + legend(reports, styles, false) + bits;
            out += "<p class=\"caption\">Teacher forcing: every predicted token given the right history. Vertical axes are "
                   "logarithmic; lower left is better.</p>\n";
        }
        const std::string names = legend(reports, styles, false);
        if (const std::string positions = position_figure(all, styles, e); !positions.empty())
            out += "<h2>Likelihood against position</h2>\n" + names + positions +
                   "<p class=\"caption\">All caches in lock step beside one exact run; one point is a mean over neighbouring "
                   "positions of all "
                   "sequences. Vertical axes are logarithmic; lower is better.</p>\n";
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
            if (reports.front().blocks.empty()) break;
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
    out += "<h2>All numbers</h2>\n" + number_table(all, e);
    if (!all.exact.empty())
        out += text("<p class=\"caption\">%zu predictions from token %zu on; nats; +- is one standard error, of means over %zu "
                    "neighbouring "
                    "tokens. cache tokens/s: appending, attention and sealing alone, one thread.</p>\n",
                    e.sequences.size() * e.scored(), e.from, estimate::run_tokens) +
               divergence_table(all, e, false) + divergence_table(all, e, true) + difference_table(all, against);
    return out + "</body></html>\n";
}

}  // namespace language_model
