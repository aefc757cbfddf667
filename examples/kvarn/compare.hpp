// SPDX-License-Identifier: Apache-2.0
#pragma once
// The command compare: every format and every baseline over the same tokens, as a table and as an HTML report.
// In: K and V (and Q) [heads, tokens, head_dim], converted to float once. A format name that ends in _auto lets each head choose the bases
// of its keys and values from its first tile and the queries of that tile.

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <filesystem>
#include <limits>
#include <optional>
#include <string>
#include <vector>

#include "../common/baselines.hpp"
#include "../common/files.hpp"
#include "../common/measures.hpp"
#include "../common/npy.hpp"
#include "codec.hpp"
#include "commands.hpp"
#include "report.hpp"

namespace kvarn_cli {

struct compare_options {
    std::vector<std::string> formats;  ///< empty: default_formats
    std::vector<kvarn::encoder> encoders{kvarn::encoder::refined, kvarn::encoder::paper};
    std::optional<int> iterations;
    unsigned threads = 0;
    std::string k, v, q, html;  ///< q, html empty: none
};

/// With queries each head may choose its basis.
[[nodiscard]] inline std::vector<std::string> default_formats(bool with_queries)
{
    if (with_queries) return {"k2v2_g128_auto", "k2v2_g128", "k3v2_g128_auto", "k4v2_g128_auto", "k4v4_g128_auto", "k4v4_g128", "k8v8_g128"};
    return {"k2v2_g128", "k3v3_g128", "k4v2_g128", "k4v4_g128", "k8v8_g128"};
}

/// The format of each head of K and V; q: [query heads][tokens][channels], query heads of a group in a row.
[[nodiscard]] inline std::vector<kvarn::format> formats_of_heads(const candidate& c, matrix& k, matrix& v, const std::optional<matrix>& q,
                                                                 const kvarn::encode_options& how)
{
    if (!c.chooses) return std::vector<kvarn::format>(k.heads, c.format);
    const auto queries = kvarn::head_major(q->values.data(), q->tokens, q->heads, q->channels);
    return choose_formats(c.format, k.view(), c.format.has_values() ? v.view() : kvarn::kv_view<float>{}, queries, how, c.name);
}

/// The first `tokens` tokens of an array as float.
[[nodiscard]] inline matrix to_matrix(const tensor& array, std::size_t tokens)
{
    matrix m{array.heads, tokens, array.channels, std::vector<float>(array.heads * tokens * array.channels)};
    for (std::size_t head = 0; head < m.heads; ++head)
        for (std::size_t i = 0; i < tokens * m.channels; ++i)
            m.token(head, 0)[i] = array.value(head * array.tokens * array.channels + i);
    return m;
}

/// Fills in the measures of one method from what it decoded; `v` empty: the format stores no V.
inline void measure(method_result& row, const matrix& k, const matrix& v, const matrix& k_decoded, const matrix& v_decoded,
                    const std::optional<matrix>& q, const std::vector<float>& exact_output, std::size_t step)
{
    row.k_error = relative_error(k.values, k_decoded.values);
    row.k_scale = token_scale_errors(k, k_decoded);
    row.k_magnitude = magnitude_share(k, k_decoded);
    if (v_decoded.values.empty()) return;
    row.v_error = relative_error(v.values, v_decoded.values);
    row.v_scale = token_scale_errors(v, v_decoded);
    row.v_magnitude = magnitude_share(v, v_decoded);
    if (q) row.attention_error = relative_error(exact_output, attend(*q, k_decoded, v_decoded, step));
}

inline void compare(const compare_options& options)
{
    const tensor k_file = read_npy(options.k), v_file = read_npy(options.v);
    if (k_file.heads != v_file.heads || k_file.tokens != v_file.tokens)
        throw failure(text("%s and %s: shapes do not match: %zu heads of %zu tokens, and %zu heads of %zu tokens",
                           options.k.c_str(), options.v.c_str(), k_file.heads, k_file.tokens, v_file.heads, v_file.tokens));
    require_finite(k_file, options.k);
    require_finite(v_file, options.v);

    std::vector<candidate> formats;
    std::size_t largest_group = 128;  // kivi g128 is always among the baselines
    for (const std::string& name : options.formats.empty() ? default_formats(!options.q.empty()) : options.formats) {
        formats.push_back(parse_candidate(name, k_file.channels, v_file.channels, kvarn::rotation::hadamard, 0));
        if (formats.back().chooses && options.q.empty()) throw failure(name + ": --q is missing: the queries are what a basis is chosen by");
        largest_group = std::max(largest_group, static_cast<std::size_t>(formats.back().format.group()));
    }
    report_data report;
    report.tokens = k_file.tokens / largest_group * largest_group;
    if (report.tokens == 0)
        throw failure(
            text("%s: %zu tokens are too few, the largest group needs %zu", options.k.c_str(), k_file.tokens, largest_group));
    const matrix k = to_matrix(k_file, report.tokens), v = to_matrix(v_file, report.tokens);

    std::optional<matrix> q;
    std::size_t step = 1;
    if (!options.q.empty()) {
        const tensor q_file = read_npy(options.q);
        require_queries(q_file, options.q, k_file);
        require_finite(q_file, options.q);
        q = to_matrix(q_file, report.tokens);
        step = query_step(q->heads, report.tokens);
    }
    std::optional<output_file> html;
    if (!options.html.empty()) html.emplace(options.html);

    const auto file_name = [](const std::string& path) { return std::filesystem::path(path).filename().string(); };
    report.k_path = file_name(options.k);
    report.v_path = file_name(options.v);
    report.q_path = file_name(options.q);
    report.heads = k.heads;
    report.query_heads = q ? q->heads : 0;
    report.query_step = step;
    report.head_dim_k = k.channels;
    report.head_dim_v = v.channels;
    std::vector<float> exact_output;
    if (q) exact_output = attend(*q, k, v, step);

    const std::vector<baseline> baselines = baselines_for(k.channels, v.channels, true);
    const double vectors = static_cast<double>(k.heads) * static_cast<double>(report.tokens);
    const auto dk = static_cast<double>(k.channels), dv = static_cast<double>(v.channels);
    progress shown("comparing");
    const std::size_t rows = formats.size() * options.encoders.size() + baselines.size();
    for (std::size_t i = 0; i < formats.size() * options.encoders.size(); ++i) {
        const candidate& c = formats[i % formats.size()];
        const kvarn::format& f = c.format;
        const kvarn::encode_options how = encoding(options.encoders[i / formats.size()], options.iterations);
        shown.show(report.methods.size(), rows, c.name);
        method_result row;
        row.series = text("kvarn/%s g%d", name_of(how.encoder), f.group());
        row.name = c.name;
        row.ours = true;
        row.mixed = f.key_bits() != f.value_bits();
        const kvarn::record_layout at = kvarn::layout_of(f);
        const double group = static_cast<double>(f.group());
        row.k_bits = 8 * static_cast<double>(at.v_codes) / (group * dk);
        row.v_bits = f.has_values() ? 8 * static_cast<double>(at.exact - at.v_codes) / (group * dv) : NAN;
        row.bits = kvarn::bits_per_element(f);
        row.bytes = static_cast<double>(kvarn::record_bytes(f)) / group * vectors;

        matrix k_decoded = k, v_decoded;
        if (f.has_values()) v_decoded = v;
        const kvarn::kv_view<float> v_view = f.has_values() ? v_decoded.view() : kvarn::kv_view<float>{};
        const std::vector<kvarn::format> of_heads = formats_of_heads(c, k_decoded, v_decoded, q, how);
        std::vector<std::byte> records;
        check(encode(of_heads, k_decoded.view(), v_view, records, kvarn::record_stride::packed, how, options.threads), row.name);
        if (report.stages.empty() && f.has_values()) {
            // One tile in the middle of the sequence, head 0.
            const std::size_t tile = kvarn::full_tiles(f, report.tokens) / 2;
            report.stage_format = row.name;
            report.stage_tile = tile;
            const bytes record = bytes(records).subspan(tile * kvarn::record_bytes(f), kvarn::record_bytes(f));
            report.stages = tile_stages(of_heads.front(), record, k.token(0, tile * static_cast<std::size_t>(f.group())),
                                        v.token(0, tile * static_cast<std::size_t>(f.group())));
        }
        check(decode(of_heads, records, k_decoded.view(), v_view, kvarn::record_stride::packed, kvarn::basis::original, options.threads), row.name);
        measure(row, k, v, k_decoded, v_decoded, q, exact_output, step);
        report.methods.push_back(std::move(row));
    }
    for (const baseline& b : baselines) {
        shown.show(report.methods.size(), rows, b.name);
        method_result row;
        row.series = b.series;
        row.name = b.name;
        const double k_bytes = bytes_per_token(b, k.channels, true), v_bytes = bytes_per_token(b, v.channels, false);
        row.k_bits = 8 * k_bytes / dk;
        row.v_bits = 8 * v_bytes / dv;
        row.bits = 8 * (k_bytes + v_bytes) / (dk + dv);
        row.bytes = (k_bytes + v_bytes) * vectors;
        matrix k_decoded = k, v_decoded = v;
        round_trip(b, k_decoded, true);
        round_trip(b, v_decoded, false);
        measure(row, k, v, k_decoded, v_decoded, q, exact_output, step);
        report.methods.push_back(std::move(row));
    }

    std::vector<std::vector<std::string>> table{
        {"", "bits per", "", "K rel", "K scale", "K scale", "K scale", "K", "V rel", "V scale", "V scale", "V scale", "V"},
        {"method", "element", "bytes", "error", "mean", "p99", "worst", "magn.", "error", "mean", "p99", "worst", "magn."}};
    if (q) {
        table[0].push_back("attention");
        table[1].push_back("rel error");
    }
    const auto number = [](double x) { return std::isnan(x) ? std::string("-") : text("%.4f", x); };
    for (const method_result& row : report.methods) {
        const spread ks = spread_of(row.k_scale), vs = spread_of(row.v_scale);
        const bool no_v = row.v_scale.empty() && std::isnan(row.v_error);
        table.push_back({full_name(row), text("%.4f", row.bits), grouped(static_cast<std::size_t>(std::llround(row.bytes))),
                         number(row.k_error), number(ks.mean), number(ks.p99), number(ks.worst), number(row.k_magnitude),
                         number(row.v_error), number(no_v ? NAN : vs.mean), number(no_v ? NAN : vs.p99),
                         number(no_v ? NAN : vs.worst), number(row.v_magnitude)});
        if (q) table.back().push_back(number(row.attention_error));
    }
    std::string out = text("%zu of %zu tokens, %zu head%s, head_dim %zu (K) and %zu (V); float16 would take %s bytes\n",
                           report.tokens, k_file.tokens, k.heads, k.heads == 1 ? "" : "s", k.channels, v.channels,
                           grouped(static_cast<std::size_t>(vectors * (dk + dv) * 2)).c_str());
    if (q)
        out += text("attention: %zu query heads on %zu, causal, %s\n", q->heads, k.heads,
                    step == 1 ? "every query" : text("one query in %zu (the others left out for speed)", step).c_str());
    out += "rel error: ||X - X'|| / ||X||; scale: token-scale error | ||x'|| / ||x|| - 1 | per token; magn.: share of the squared error "
           "that lies in token norms\n\n" +
           aligned(table);

    if (html) {
        html->write(html_report(report));
        html->finish();
    }
    print(out);
    if (html) html->commit();
}

}  // namespace kvarn_cli
