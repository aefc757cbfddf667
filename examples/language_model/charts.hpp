// SPDX-License-Identifier: Apache-2.0
#pragma once
// Axes of one panel as inline SVG: grid, ticks, titles, and where a value lies. Linear or logarithmic y, linear x.
// In: ranges and a place on the page. Out: text. examples/common/svg.hpp has the pieces and the style sheet.

#include <algorithm>
#include <cmath>
#include <string>
#include <utility>
#include <vector>

#include "../common/svg.hpp"

namespace language_model {

namespace svg = kvarn_cli::report_detail;
using kvarn_cli::text;

struct panel {
    static constexpr double margin = 74;  ///< for the title and the ticks of y

    double left = 0, width = 1160, top = 40, height = 300;
    std::string title, x_title, y_title;
    double x_low = 0, x_high = 1, x_step = 0;  ///< x_step 0: chosen
    double y_low = 0, y_high = 1;              ///< logarithmic: both above zero
    bool logarithmic = false;

    [[nodiscard]] double x0() const { return left + margin; }
    [[nodiscard]] double x1() const { return left + width - 14; }
    [[nodiscard]] double y1() const { return top + height; }
    [[nodiscard]] double x(double value) const { return x0() + (value - x_low) / (x_high - x_low) * (x1() - x0()); }
    [[nodiscard]] double y(double value) const
    {
        const auto at = [&](double v) { return logarithmic ? std::log10(v) : v; };
        return y1() - (at(value) - at(y_low)) / (at(y_high) - at(y_low)) * height;
    }

    /// A step of 1, 2 or 5 times a power of ten that cuts a range into about `parts`.
    [[nodiscard]] static double nice_step(double range, double parts)
    {
        const double rough = range / parts, power = std::pow(10.0, std::floor(std::log10(rough))), digit = rough / power;
        return power * (digit < 1.5 ? 1 : digit < 3.5 ? 2 : digit < 7.5 ? 5 : 10);
    }

    [[nodiscard]] std::string axes() const
    {
        std::string out = svg::label((x0() + x1()) / 2, top - 16, title, "middle", "panel");
        const double step = x_step > 0 ? x_step : nice_step(x_high - x_low, (x1() - x0()) / 70);
        for (double v = x_low == 0 ? 0 : std::ceil(x_low / step - 1e-9) * step; v <= x_high + step * 1e-9; v += step) {
            out += svg::line(x(v), top, x(v), y1(), "grid");
            out += svg::label(x(v), y1() + 17, text("%g", v));
        }
        const auto tick = [&](double v, const std::string& name, bool strong) {
            out += svg::line(x0(), y(v), x1(), y(v), strong ? "grid strong" : "grid");
            out += svg::label(x0() - 7, y(v) + 4, name, "end");
        };
        if (logarithmic) {
            const double decades = std::log10(y_high / y_low);
            for (int decade = static_cast<int>(std::floor(std::log10(y_low)));
                 decade <= static_cast<int>(std::ceil(std::log10(y_high))); ++decade)
                for (const int digit : {1, 2, 5}) {
                    const double v = digit * std::pow(10.0, decade);
                    if (v < y_low * (1 - 1e-9) || v > y_high * (1 + 1e-9) || (digit != 1 && decades > 3.2)) continue;
                    tick(v, text("%g", v), digit == 1);
                }
        } else {
            const double y_step = nice_step(y_high - y_low, height / 50);
            for (double i = std::ceil(y_low / y_step - 1e-9); i * y_step <= y_high + y_step * 1e-9; ++i)
                tick(i * y_step, text("%g", i == 0 ? 0.0 : i * y_step), i == 0);
        }
        out += svg::line(x0(), y1(), x1(), y1(), "axis") + svg::line(x0(), top, x0(), y1(), "axis");
        out += svg::label((x0() + x1()) / 2, y1() + 38, x_title);
        out += svg::label(left + 13, (top + y1()) / 2, y_title, "middle", "",
                          text("transform=\"rotate(-90 %.1f %.1f)\"", left + 13, (top + y1()) / 2).c_str());
        return out;
    }

    /// A line through points, in the panel's units.
    [[nodiscard]] std::string curve(const std::vector<std::pair<double, double>>& points, const char* colour, bool ours) const
    {
        std::string path;
        for (const auto& [px, py] : points) path += text("%.1f,%.1f ", x(px), y(py));
        return "<polyline points=\"" + path + text("\" stroke=\"%s\" class=\"curve%s\"/>\n", colour, ours ? " ours" : "");
    }
};

/// An inline drawing, 1160 wide.
[[nodiscard]] inline std::string drawing(double height, const std::string& about, const std::string& content)
{
    return text("<svg viewBox=\"0 0 1160 %.0f\" role=\"img\" aria-label=\"", height) + svg::escaped(about) + "\">\n" + content +
           "</svg>\n";
}

}  // namespace language_model
