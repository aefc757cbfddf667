// SPDX-License-Identifier: Apache-2.0
#pragma once
// Pieces of the HTML reports: inline SVG text, lines and markers, the colours of the methods, the style sheet.

#include <cmath>
#include <initializer_list>
#include <string>
#include <utility>

#include "text.hpp"

namespace kvarn_cli::report_detail {

[[nodiscard]] inline std::string escaped(const std::string& plain)
{
    std::string out;
    for (const char c : plain) {
        if (c == '<')
            out += "&lt;";
        else if (c == '>')
            out += "&gt;";
        else if (c == '&')
            out += "&amp;";
        else if (c == '"')
            out += "&quot;";
        else
            out += c;
    }
    return out;
}

[[nodiscard]] inline std::string label(double x, double y, const std::string& what, const char* anchor = "middle",
                                       const char* css = "", const char* more = "")
{
    return text("<text x=\"%.1f\" y=\"%.1f\" text-anchor=\"%s\" class=\"%s\" %s>", x, y, anchor, css, more) + escaped(what) +
           "</text>\n";
}

[[nodiscard]] inline std::string line(double x1, double y1, double x2, double y2, const char* css)
{
    return text("<line x1=\"%.1f\" y1=\"%.1f\" x2=\"%.1f\" y2=\"%.1f\" class=\"%s\"/>\n", x1, y1, x2, y2, css);
}

struct series_style {
    const char* colour;
    int shape;  ///< 0 circle, 1 square, 2 triangle up, 3 triangle down, 4 diamond
};

[[nodiscard]] inline series_style style_of(const std::string& series)
{
    if (series.rfind("kvarn/", 0) == 0) {
        const std::string group = series.substr(series.find(' ') + 1);
        if (series.rfind("kvarn/paper", 0) == 0)
            return {group == "g128" ? "#0c8c9c" : group == "g64" ? "#4fb3bf" : group == "g32" ? "#88cdd4" : "#075e68", 0};
        return {group == "g128" ? "#1257b8" : group == "g64" ? "#3f9be0" : group == "g32" ? "#7fb9ec" : "#3a2f9e", 0};
    }
    if (series == "rtn") return {"#7f7f7f", 1};
    if (series == "rotated rtn") return {"#d9730d", 1};
    if (series == "kivi g32") return {"#12855d", 2};
    if (series == "kivi g64") return {"#5f9e6e", 2};
    if (series == "turboquant") return {"#c99700", 3};
    if (series == "q4_1, q5_1") return {"#7a5c3e", 4};
    if (series == "fp8") return {"#4d4d4d", 2};
    if (series == "kivi g128") return {"#8a4fb5", 3};
    if (series == "q4_0 .. q8_0") return {"#a08a6a", 4};
    return {"#c2255c", 4};
}

[[nodiscard]] inline std::string marker(double x, double y, series_style s, const std::string& tooltip)
{
    std::string points;
    const auto polygon = [&](std::initializer_list<std::pair<double, double>> corners) {
        for (const auto& [dx, dy] : corners) points += text("%.1f,%.1f ", x + dx, y + dy);
        return "<polygon points=\"" + points + "\"";
    };
    std::string shape;
    switch (s.shape) {
    case 0: shape = text("<circle cx=\"%.1f\" cy=\"%.1f\" r=\"5\"", x, y); break;
    case 1: shape = text("<rect x=\"%.1f\" y=\"%.1f\" width=\"8\" height=\"8\"", x - 4, y - 4); break;
    case 2: shape = polygon({{0, -5.5}, {5, 4}, {-5, 4}}); break;
    case 3: shape = polygon({{0, 5.5}, {5, -4}, {-5, -4}}); break;
    default: shape = polygon({{0, -6}, {5, 0}, {0, 6}, {-5, 0}}); break;
    }
    return shape + text(" fill=\"%s\" class=\"mark\"><title>", s.colour) + escaped(tooltip) + "</title>" +
           (s.shape == 0   ? "</circle>\n"
            : s.shape == 1 ? "</rect>\n"
                           : "</polygon>\n");
}

[[nodiscard]] inline std::string power_of_ten(int exponent)
{
    return exponent >= 0 ? std::to_string(static_cast<long>(std::lround(std::pow(10, exponent))))
                         : text("%.*f", -exponent, std::pow(10, exponent));
}

inline constexpr const char* style_sheet = R"(
:root { color-scheme: light; }
body { margin: 0 auto; max-width: 1180px; padding: 28px 20px 60px; background: #fff; color: #1d2430; font: 16px/1.5 system-ui, "Segoe UI", "DejaVu Sans", sans-serif; }
h1 { font-size: 26px; margin: 0 0 6px; } h2 { font-size: 19px; margin: 40px 0 4px; }
p { margin: 4px 0 10px; max-width: 95ch; } .facts, .caption { color: #4c5666; font-size: 14.5px; }
svg { width: 100%; height: auto; display: block; overflow: visible; }
svg text { font-size: 12.5px; fill: #39424f; } svg text.panel { font-size: 14.5px; font-weight: 600; fill: #1d2430; }
svg text.direct { font-weight: 600; fill: #1257b8; paint-order: stroke; stroke: #fff; stroke-width: 3px; }
svg text.quiet { font-size: 11.5px; fill: #66707e; } svg text.halo { paint-order: stroke; stroke: #fff; stroke-width: 3px; }
.grid { stroke: #e9ecf1; } .strong { stroke: #cfd5de; } .axis { stroke: #7d8794; } .p99 { stroke: #1d2430; stroke-dasharray: 3 3; }
.curve { fill: none; stroke-width: 1.6; } .ours { stroke-width: 2.6; } .mark { stroke: #fff; stroke-width: 1; }
.map { image-rendering: pixelated; } .frame { stroke: #9aa3af; } rect.frame[fill=none], .frame:not([fill]) { fill: none; }
.legend { display: flex; flex-wrap: wrap; gap: 4px 22px; font-size: 14px; margin: 10px 0 4px; max-width: none; } .legend span { display: inline-flex; align-items: center; gap: 6px; } .legend svg { width: 14px; height: 14px; }
.wide { overflow-x: auto; } table { border-collapse: collapse; width: 100%; font-size: 13px; font-variant-numeric: tabular-nums; white-space: nowrap; }
th, td { padding: 3px 7px; text-align: right; border-bottom: 1px solid #e9ecf1; } th { background: #f6f7f9; font-weight: 600; } td:first-child, th:first-child { text-align: left; }
tr.ours td { background: #eef4fc; stroke-width: 1; }
)";

}  // namespace kvarn_cli::report_detail
