// SPDX-License-Identifier: Apache-2.0
#pragma once
// The HTML report of `kvarn compare`: one file, inline SVG, nothing loaded from outside. Three figures with their
// captions, then the numbers as a table.

#include <cmath>
#include <string>

#include <kvarn/version.hpp>

#include "../common/measures.hpp"
#include "../common/svg.hpp"
#include "../common/text.hpp"
#include "figures.hpp"

namespace kvarn_cli {

namespace report_detail {

[[nodiscard]] inline std::string table(const report_data& report)
{
    const bool attention = report.query_heads != 0;
    std::string out = "<div class=\"wide\"><table><thead><tr><th rowspan=\"2\">method</th><th rowspan=\"2\">bits "
                      "per<br>element</th><th rowspan=\"2\">bytes</th>"
                      "<th colspan=\"5\">K</th><th colspan=\"5\">V</th>";
    if (attention) out += "<th rowspan=\"2\">attention<br>error</th>";
    out += "</tr><tr>";
    for (int side = 0; side < 2; ++side)
        out += "<th>rel<br>error</th><th>scale<br>mean</th><th>scale<br>p99</th><th>scale<br>worst</th><th>magn.</th>";
    out += "</tr></thead><tbody>\n";
    const auto cell = [](double x) { return "<td>" + (std::isnan(x) ? std::string("-") : text("%.4f", x)) + "</td>"; };
    for (const auto& m : report.methods) {
        const spread k = spread_of(m.k_scale), v = spread_of(m.v_scale);
        const bool no_v = m.v_scale.empty();
        out += std::string("<tr") + (m.ours ? " class=\"ours\"" : "") + "><td>" + escaped(full_name(m)) + "</td>" + cell(m.bits) +
               "<td>" + grouped(static_cast<std::size_t>(std::llround(m.bytes))) + "</td>" + cell(m.k_error) + cell(k.mean) +
               cell(k.p99) + cell(k.worst) + cell(m.k_magnitude) + cell(m.v_error) + cell(no_v ? NAN : v.mean) + cell(no_v ? NAN : v.p99) +
               cell(no_v ? NAN : v.worst) + cell(m.v_magnitude) + (attention ? cell(m.attention_error) : "") + "</tr>\n";
    }
    return out + "</tbody></table></div>\n";
}

}  // namespace report_detail

/// The whole report as one HTML file.
[[nodiscard]] inline std::string html_report(const report_data& report)
{
    using namespace report_detail;
    std::string out = "<!DOCTYPE html>\n<html lang=\"en\"><head><meta charset=\"utf-8\"><meta name=\"viewport\" "
                      "content=\"width=device-width\">\n"
                      "<title>kvarn: formats compared</title>\n<style>" +
                      std::string(style_sheet) + "</style></head><body>\n";
    out += "<h1>KV-cache formats compared</h1>\n<p class=\"facts\">" +
           escaped(text("K from %s, V from %s: %s tokens, %zu head%s, head_dim %zu (K) and %zu (V). kvarn " KVARN_VERSION_STRING
                        ". ",
                        report.k_path.c_str(), report.v_path.c_str(), grouped(report.tokens).c_str(), report.heads,
                        report.heads == 1 ? "" : "s", report.head_dim_k, report.head_dim_v)) +
           "Bits per element are real ones: codes, scales, zeros and padding.</p>\n";

    out += "<h2>Error against bits per element</h2>\n";
    out += error_figure(report);
    out += "<p class=\"caption\">Relative error ||X - X'|| / ||X|| (no unit, logarithmic axis); lower left is better. K and V "
           "against the bits of that part alone";
    if (report.query_heads != 0)
        out += escaped(
            text("; attention is softmax(q K^T / sqrt(d)) V, causal, %zu query heads from %s, %s, against all bits. Formats with "
                 "different bits for K and V stand beside the line",
                 report.query_heads, report.q_path.c_str(),
                 report.query_step == 1 ? "every query" : text("one query in %zu, for speed", report.query_step).c_str()));
    out += ".</p>\n";

    if (const auto methods = nearest_in_bits(report); !methods.empty()) {
        out += "<h2>Token-scale error</h2>\n" + scale_figure(methods);
        out += "<p class=\"caption\">How wrong the norm of each decoded token is: share of tokens by | ||x'|| / ||x|| - 1 |, per "
               "token and head. For " +
               escaped(full_name(*methods.front())) +
               " and, of every other method that comes within one bit per element of it, the nearest variant. Farther left is "
               "better; all rows share one height scale; the dashed line is the 99th percentile; "
               "errors outside the axis are counted in its first or last bar.</p>\n";
    }
    if (!report.stages.empty()) {
        out += "<h2>One tile, four stages</h2>\n" + stage_figure(report);
        out += "<p class=\"caption\">" +
               escaped(text("Tile %zu of head 0, format %s. ", report.stage_tile, report.stage_format.c_str())) +
               "Raw: as it came. Rotated: after the Hadamard transform over channels, which spreads outlier channels. "
               "Normalised, read back from the record: "
               "K is the rotated tile / k_token_scale of each token, then / the standard deviation of each channel; V is the "
               "rotated tile / v_channel_scale of each channel, then / the standard deviation of each token "
               "(the record keeps the other scale multiplied with the rounding step, so it is measured here). Quantized: the "
               "stored codes. "
               "Colours of the first three stages are centred on zero and reach to the 99.5th percentile of the magnitudes of "
               "each map.</p>\n";
    }
    out += "<h2>All numbers</h2>\n" + table(report);
    out += "<p class=\"caption\">scale: token-scale error | ||x'|| / ||x|| - 1 |, mean, 99th percentile and worst over tokens "
           "and heads; magn.: the share of the squared error that lies in token norms, the rest lies in directions. rtn: per-token min-max rounding; rotated rtn: the same after the Hadamard transform; "
           "kivi: K per channel, V per token, in groups of 32 or 128; q4_0, q5_0, q8_0: blocks of 32 values with one "
           "half-precision scale.</p>\n";
    return out + "</body></html>\n";
}

}  // namespace kvarn_cli
