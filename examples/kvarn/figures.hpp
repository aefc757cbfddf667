// SPDX-License-Identifier: Apache-2.0
#pragma once
// The figures of the report as inline SVG: error against bits per element, token-scale errors, heat maps of one tile.
// In: what was measured. Out: text; points and bars carry their numbers as tooltips.

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <string>
#include <utility>
#include <vector>

#include "../common/measures.hpp"
#include "../common/svg.hpp"
#include "picture.hpp"
#include "tile_stages.hpp"

namespace kvarn_cli {

/// One row of the comparison. What does not apply is NaN or empty.
struct method_result {
    std::string series, name;
    bool ours = false;   ///< a kvarn format, not a baseline
    bool mixed = false;  ///< K and V have different bits
    double k_bits = NAN, v_bits = NAN, bits = NAN, bytes = NAN;
    double k_error = NAN, v_error = NAN, attention_error = NAN;
    double k_magnitude = NAN, v_magnitude = NAN;  ///< share of the squared error that lies in token norms
    std::vector<double> k_scale, v_scale;  ///< token-scale errors, sorted
};

/// With the encoder in front, for example kvarn/paper k4v2_g128.
[[nodiscard]] inline std::string full_name(const method_result& m)
{
    return m.ours ? m.series.substr(0, m.series.find(' ') + 1) + m.name : m.name;
}

/// What the figures and the table show.
struct report_data {
    std::string k_path, v_path, q_path;
    std::size_t tokens = 0, heads = 0, query_heads = 0, query_step = 1, head_dim_k = 0, head_dim_v = 0;
    std::vector<method_result> methods;
    std::string stage_format;
    std::size_t stage_tile = 0;
    std::vector<stage> stages;  ///< four of K, then four of V
};

namespace report_detail {

[[nodiscard]] inline std::vector<std::string> series_of(const report_data& report)
{
    std::vector<std::string> names;
    for (const auto& m : report.methods)
        if (std::find(names.begin(), names.end(), m.series) == names.end()) names.push_back(m.series);
    return names;
}

struct panel {
    const char* title;
    const char* x_axis;
    const char* y_axis;
    double method_result::*bits;
    double method_result::*error;
    bool mixed_apart;  ///< formats with different bits for K and V stand beside the line
};

/// Error against bits per element, logarithmic error axis.
[[nodiscard]] inline std::string error_panel(const report_data& report, const panel& p, double left, double width)
{
    const double top = 40, height = 330, x0 = left + 58, x1 = left + width - 14, y1 = top + height;
    double least = INFINITY, most = 0, most_bits = 9;
    for (const auto& m : report.methods)
        if (m.*p.error > 0 && std::isfinite(m.*p.error)) {
            least = std::min(least, m.*p.error);
            most = std::max(most, m.*p.error);
            if (std::isfinite(m.*p.bits)) most_bits = std::max(most_bits, m.*p.bits + 0.3);
        }
    if (!(most > 0)) return {};
    const double low = std::log10(least) - 0.12, high = std::log10(most) + 0.12;
    const auto x = [&](double bits) { return x0 + (bits - 2) / (most_bits - 2) * (x1 - x0); };
    const auto y = [&](double error) { return y1 - (std::log10(error) - low) / (high - low) * height; };

    std::string out = label((x0 + x1) / 2, 24, p.title, "middle", "panel");
    for (int bits = 2; bits <= static_cast<int>(most_bits); ++bits) {
        out += line(x(bits), top, x(bits), y1, "grid");
        out += label(x(bits), y1 + 17, std::to_string(bits));
    }
    for (int decade = static_cast<int>(std::floor(low)); decade <= static_cast<int>(std::ceil(high)); ++decade)
        for (const int digit : {1, 2, 5}) {
            const double error = digit * std::pow(10, decade);
            if (std::log10(error) < low || std::log10(error) > high) continue;
            out += line(x0, y(error), x1, y(error), digit == 1 ? "grid strong" : "grid");
            out += label(x0 - 7, y(error) + 4, digit == 1 ? power_of_ten(decade) : text("%g", error), "end");
        }
    out += line(x0, y1, x1, y1, "axis") + line(x0, top, x0, y1, "axis");
    out += label((x0 + x1) / 2, y1 + 38, p.x_axis);
    out += label(left + 12, (top + y1) / 2, p.y_axis, "middle", "",
                 text("transform=\"rotate(-90 %.1f %.1f)\"", left + 12, (top + y1) / 2).c_str());

    std::vector<std::pair<double, double>> labelled;
    // Baselines first, so that the formats lie on top.
    std::vector<std::string> names = series_of(report);
    std::reverse(names.begin(), names.end());
    for (const std::string& name : names) {
        std::vector<std::pair<double, double>> points;
        std::string marks;
        const series_style style = style_of(name);
        for (const auto& m : report.methods) {
            const double bits = m.*p.bits, error = m.*p.error;
            if (m.series != name || !(error > 0) || !std::isfinite(error) || !std::isfinite(bits)) continue;
            if (!(p.mixed_apart && m.mixed)) points.emplace_back(x(bits), y(error));
            marks += marker(x(bits), y(error), style, text("%s: %.3f bits per element, error %.4g", m.name.c_str(), bits, error));
            const bool at_edge = x(bits) > x1 - 44;
            // Labels for the first group only, and none on top of another; the tooltips name every point.
            const bool free = std::none_of(labelled.begin(), labelled.end(), [&](const auto& other) {
                return std::fabs(other.first - x(bits)) < 34 && std::fabs(other.second - y(error)) < 14;
            });
            if (m.series != report.methods.front().series || !p.mixed_apart || !free) continue;
            labelled.emplace_back(x(bits), y(error));
            marks += label(x(bits) + (at_edge ? -9 : 9), y(error) + (at_edge ? 4 : -7), m.name.substr(0, m.name.find('_')),
                           at_edge ? "end" : "start", "direct");
        }
        std::sort(points.begin(), points.end());
        std::string path;
        for (const auto& [px, py] : points) path += text("%.1f,%.1f ", px, py);
        if (points.size() > 1)
            out += "<polyline points=\"" + path +
                   text("\" stroke=\"%s\" class=\"curve%s\"/>\n", style.colour, name.rfind("kvarn/", 0) == 0 ? " ours" : "");
        out += marks;
    }
    return out;
}

[[nodiscard]] inline std::string legend(const report_data& report)
{
    std::string out = "<p class=\"legend\">";
    for (const std::string& name : series_of(report))
        out += "<span><svg width=\"14\" height=\"14\" viewBox=\"0 0 14 14\" aria-hidden=\"true\">" +
               marker(7, 7, style_of(name), name) + "</svg>" + escaped(name) + "</span>";
    return out + "</p>\n";
}

[[nodiscard]] inline std::string error_figure(const report_data& report)
{
    std::vector<panel> panels{
        {"K", "bits per element of K", "relative error of K", &method_result::k_bits, &method_result::k_error, false},
        {"V", "bits per element of V", "relative error of V", &method_result::v_bits, &method_result::v_error, false}};
    if (report.query_heads != 0)
        panels.push_back({"Attention output", "bits per element of K and V", "relative error of the output", &method_result::bits,
                          &method_result::attention_error, true});
    const double width = 1160.0 / static_cast<double>(panels.size());
    std::string out =
        legend(report) + "<svg viewBox=\"0 0 1160 415\" role=\"img\" aria-label=\"Error against bits per element\">\n";
    for (std::size_t i = 0; i < panels.size(); ++i) out += error_panel(report, panels[i], static_cast<double>(i) * width, width);
    return out + "</svg>\n";
}

/// The first format, and of every other series the method whose bits are nearest to it, if within one bit.
[[nodiscard]] inline std::vector<const method_result*> nearest_in_bits(const report_data& report)
{
    std::vector<const method_result*> chosen;
    for (const std::string& name : series_of(report)) {
        const method_result* best = nullptr;
        for (const auto& m : report.methods) {
            if (m.series != name || m.v_scale.empty()) continue;
            if (best == nullptr ||
                (!m.ours && std::fabs(m.bits - chosen.front()->bits) < std::fabs(best->bits - chosen.front()->bits)))
                best = &m;
        }
        if (best == nullptr && chosen.empty()) return {};
        if (best != nullptr && (chosen.empty() || std::fabs(best->bits - chosen.front()->bits) <= 1)) chosen.push_back(best);
    }
    return chosen;
}

/// Histograms below each other: share of tokens by token-scale error, logarithmic error axis from 1e-4 to 10.
[[nodiscard]] inline std::string scale_figure(const std::vector<const method_result*>& methods)
{
    constexpr int bins_per_decade = 8, first_decade = -4, decades = 5, bins = bins_per_decade * decades;
    const double row = 58, top = 40, names = 212, gap = 40, width = (1160 - names - gap - 20) / 2,
                 bottom = top + row * static_cast<double>(methods.size());
    std::string out = text("<svg viewBox=\"0 0 1160 %.0f\" role=\"img\" aria-label=\"Token-scale errors\">\n", bottom + 48);
    const auto histogram = [&](const std::vector<double>& errors) {
        std::array<double, bins> share{};
        for (const double e : errors) {
            const double at = e > 0 ? (std::log10(e) - first_decade) * bins_per_decade : 0;
            share[static_cast<std::size_t>(std::clamp(at, 0.0, bins - 1.0))] += 100.0 / static_cast<double>(errors.size());
        }
        return share;
    };
    double most = 0;
    for (const auto* m : methods)
        for (const auto* errors : {&m->k_scale, &m->v_scale})
            for (const double share : histogram(*errors)) most = std::max(most, share);

    for (std::size_t i = 0; i < methods.size(); ++i) {
        const double base = top + row * static_cast<double>(i + 1);
        out += label(names - 14, base - 22, full_name(*methods[i]), "end", methods[i]->ours ? "direct" : "");
        out += label(names - 14, base - 6, text("%.3f bits per element", methods[i]->bits), "end", "quiet");
    }
    for (int side = 0; side < 2; ++side) {
        const double left = names + side * (width + gap);
        const auto x = [&](double exponent) { return left + (exponent - first_decade) / decades * width; };
        out += label(left + width / 2, 24, side == 0 ? "K" : "V", "middle", "panel");
        for (int decade = first_decade; decade <= first_decade + decades; ++decade) {
            out += line(x(decade), top, x(decade), bottom, "grid");
            out += label(x(decade), bottom + 17, power_of_ten(decade));
        }
        out += label(left + width / 2, bottom + 38, "token-scale error | ||x'|| / ||x|| - 1 |, no unit");
        for (std::size_t i = 0; i < methods.size(); ++i) {
            const std::vector<double>& errors = side == 0 ? methods[i]->k_scale : methods[i]->v_scale;
            const double base = top + row * static_cast<double>(i + 1);
            const auto share = histogram(errors);
            const char* colour = style_of(methods[i]->series).colour;
            for (int bin = 0; bin < bins; ++bin) {
                const double height = share[static_cast<std::size_t>(bin)] / most * (row - 16);
                if (height <= 0) continue;
                out += text("<rect x=\"%.1f\" y=\"%.1f\" width=\"%.1f\" height=\"%.1f\" fill=\"%s\"><title>%.2f %% of the "
                            "tokens</title></rect>\n",
                            left + bin * width / bins + 0.5, base - height, width / bins - 1, height, colour,
                            share[static_cast<std::size_t>(bin)]);
            }
            out += line(left, base, left + width, base, "axis");
            const double p99 = spread_of(errors).p99;
            if (p99 > 0) {
                const double at =
                    std::clamp(std::log10(p99), static_cast<double>(first_decade), static_cast<double>(first_decade + decades));
                out += line(x(at), base - row + 10, x(at), base, "p99");
                const bool right = x(at) > left + width - 70;
                out += label(x(at) + (right ? -5 : 5), base - row + 20, text("p99 %.3g", p99), right ? "end" : "start",
                             "quiet halo");
            }
        }
    }
    out += text("<text x=\"14\" y=\"%.1f\" text-anchor=\"middle\" transform=\"rotate(-90 14 %.1f)\">share of tokens (tallest "
                "bar: %.0f %%)</text>\n",
                (top + bottom) / 2, (top + bottom) / 2, most);
    return out + "</svg>\n";
}

[[nodiscard]] inline std::string heat_map(const stage& s, double left, std::size_t number)
{
    const double size = 232, top = 34, x0 = left + 46;
    float most = 1;
    if (s.most_code == 0) {
        std::vector<float> magnitudes(s.values);
        for (float& v : magnitudes) v = std::fabs(v);
        const auto at = magnitudes.begin() + static_cast<std::ptrdiff_t>(static_cast<double>(magnitudes.size() - 1) * 0.995);
        std::nth_element(magnitudes.begin(), at, magnitudes.end());
        most = *at > 0 ? *at : 1;
    }
    std::vector<std::uint8_t> cells(s.values.size());
    for (std::size_t i = 0; i < cells.size(); ++i) {
        const float share = s.most_code != 0 ? s.values[i] / static_cast<float>(s.most_code) : 0.5f + 0.5f * s.values[i] / most;
        cells[i] = static_cast<std::uint8_t>(std::lround(255 * std::clamp(share, 0.0f, 1.0f)));
    }
    const palette& colours = s.most_code != 0 ? sequential_palette() : diverging_palette();
    std::string out = label(x0 + size / 2, 22, s.title, "middle", "panel");
    out += text("<image x=\"%.1f\" y=\"%.1f\" width=\"%.1f\" height=\"%.1f\" preserveAspectRatio=\"none\" class=\"map\" href=\"",
                x0, top, size, size) +
           png_uri(s.tokens, s.channels, cells, colours) + "\"/>\n";
    out += text("<rect x=\"%.1f\" y=\"%.1f\" width=\"%.1f\" height=\"%.1f\" class=\"frame\"/>\n", x0, top, size, size);
    for (int quarter = 0; quarter <= 4; ++quarter) {
        const double share = quarter / 4.0;
        if (quarter % 2 == 0)
            out += label(x0 + share * size, top + size + 15,
                         std::to_string(static_cast<int>(share * static_cast<double>(s.tokens))));
        if (quarter % 2 == 0)
            out += label(x0 - 5,
                         top + share * size +
                             (quarter == 0   ? 9
                              : quarter == 4 ? 0
                                             : 4),
                         std::to_string(static_cast<int>(share * static_cast<double>(s.channels))), "end");
    }
    out += label(x0 + size / 2, top + size + 32, "token in the tile");
    out += label(left + 12, top + size / 2, "channel", "middle", "",
                 text("transform=\"rotate(-90 %.1f %.1f)\"", left + 12, top + size / 2).c_str());

    const double bar = top + size + 46;
    out += text("<linearGradient id=\"g%zu\">", number);
    for (std::size_t i = 0; i <= 8; ++i)
        out += text("<stop offset=\"%.3f\" stop-color=\"%s\"/>", static_cast<double>(i) / 8,
                    css_colour(colours[std::min<std::size_t>(255, i * 32)]).c_str());
    out +=
        text("</linearGradient><rect x=\"%.1f\" y=\"%.1f\" width=\"%.1f\" height=\"9\" fill=\"url(#g%zu)\" class=\"frame\"/>\n",
             x0, bar, size, number);
    out += label(x0, bar + 23, s.most_code != 0 ? "0" : text("-%.3g", static_cast<double>(most)), "start");
    out += label(x0 + size / 2, bar + 23, s.unit, "middle", "quiet");
    out += label(x0 + size, bar + 23, s.most_code != 0 ? std::to_string(s.most_code) : text("%.3g", static_cast<double>(most)),
                 "end");
    return out;
}

[[nodiscard]] inline std::string stage_figure(const report_data& report)
{
    std::string out;
    for (std::size_t first = 0; first < report.stages.size(); first += 4) {
        out += "<svg viewBox=\"0 0 1160 345\" role=\"img\" aria-label=\"One tile at four stages\">\n";
        for (std::size_t i = 0; i < 4; ++i) out += heat_map(report.stages[first + i], static_cast<double>(i) * 290, first + i);
        out += "</svg>\n";
    }
    return out;
}

}  // namespace report_detail

}  // namespace kvarn_cli
