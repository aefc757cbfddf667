// SPDX-License-Identifier: Apache-2.0
#pragma once
// What the lock step says about a cache: divergence, agreement and excess likelihood with errors, in all, by
// sequence, by position, and paired with another cache token by token. In: evaluation. Out: numbers, tables, JSON,
// CSV.

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <string>
#include <vector>

#include <nlohmann/json.hpp>

#include "../common/text.hpp"
#include "evaluate.hpp"
#include "statistics.hpp"

namespace language_model {

using kvarn_cli::text;

/// Some positions of one sequence.
template <class At>
struct slice {
    std::size_t first, end;
    At at;  ///< of an index into token_scores

    [[nodiscard]] std::size_t size() const noexcept { return end - first; }
    [[nodiscard]] double operator[](std::size_t i) const { return at(first + i); }
};

/// Of predictions [first, end) of every sequence: what value(sequence, index) is on average.
template <class Value>
[[nodiscard]] estimate average(std::size_t sequences, std::size_t first, std::size_t end, Value&& value)
{
    return estimate_of(sequences, [&](std::size_t s) {
        auto at = [&value, s](std::size_t i) { return static_cast<double>(value(s, i)); };
        return slice<decltype(at)>{first, end, at};
    });
}

struct likelihood {
    estimate nll, kl, excess;            ///< excess: of the negative log-likelihood above the exact cache's
    double accuracy = 0, agreement = 0;  ///< shares of tokens whose most likely one is right, is the exact cache's
    double kl_p99 = 0, kl_p999 = 0, kl_worst = 0;
};

/// Of predictions [first, end); those of all sequences, or of one.
[[nodiscard]] inline likelihood likelihood_of(const std::vector<token_scores>& own, const std::vector<token_scores>& exact,
                                              std::size_t first, std::size_t end)
{
    const std::size_t n = own.size();
    likelihood l;
    l.nll = average(n, first, end, [&](std::size_t s, std::size_t i) { return own[s].nll[i]; });
    l.kl = average(n, first, end, [&](std::size_t s, std::size_t i) { return own[s].kl[i]; });
    l.excess = average(n, first, end, [&](std::size_t s, std::size_t i) { return own[s].nll[i] - exact[s].nll[i]; });
    l.accuracy = average(n, first, end, [&](std::size_t s, std::size_t i) { return own[s].right[i]; }).mean;
    l.agreement = average(n, first, end, [&](std::size_t s, std::size_t i) { return own[s].agrees[i]; }).mean;
    std::vector<float> sorted;
    for (const token_scores& one : own)
        sorted.insert(sorted.end(), one.kl.begin() + static_cast<std::ptrdiff_t>(first),
                      one.kl.begin() + static_cast<std::ptrdiff_t>(end));
    std::sort(sorted.begin(), sorted.end());
    if (sorted.empty()) return l;
    l.kl_p99 = quantile(sorted, 0.99);
    l.kl_p999 = quantile(sorted, 0.999);
    l.kl_worst = static_cast<double>(sorted.back());
    return l;
}

[[nodiscard]] inline likelihood likelihood_of(const std::vector<token_scores>& own, const std::vector<token_scores>& exact)
{
    return likelihood_of(own, exact, 0, own.front().size());
}

/// One cache less another, token by token.
struct difference {
    estimate kl, nll;
};

[[nodiscard]] inline difference difference_of(const std::vector<token_scores>& a, const std::vector<token_scores>& b)
{
    const std::size_t n = a.size(), end = a.front().size();
    return {average(n, 0, end, [&](std::size_t s, std::size_t i) { return a[s].kl[i] - b[s].kl[i]; }),
            average(n, 0, end, [&](std::size_t s, std::size_t i) { return a[s].nll[i] - b[s].nll[i]; })};
}

/// The positions that the tables tell apart, of tokens whose prediction counts.
[[nodiscard]] inline std::vector<position_range> ranges_of(const experiment& e)
{
    return ranges_of(e.from, e.length());
}

[[nodiscard]] inline std::string text_of(const estimate& x, int digits)
{
    return std::isnan(x.error) ? text("%.*f", digits, x.mean) : text("%.*f +- %.*f", digits, x.mean, digits, x.error);
}
[[nodiscard]] inline std::string range_text(const position_range& r)
{
    return text("%zu..%zu", r.first, r.end - 1);
}

/// Tokens per second of what a cache adds to a token: appending, attention and sealing, one thread.
[[nodiscard]] inline double cache_speed(const cache_report& r, const experiment& e)
{
    return static_cast<double>(e.sequences.size() * (e.length() - 1)) / r.teacher_seconds;
}

/// Everything about the lock step. `against`: the cache that the others are paired with.
[[nodiscard]] inline std::string likelihood_tables(const evaluation& all, const experiment& e, std::size_t against)
{
    using rows = std::vector<std::vector<std::string>>;
    const std::size_t n = e.sequences.size();
    const double seconds = all.teacher_seconds;
    std::string out =
        text("Beside the exact cache, %zu predictions from token %zu on, nats; +- is one standard error (means of %zu "
             "neighbouring tokens).\n"
             "cache tokens/s: appending, attention and sealing alone, one thread. The run: %zu tokens with %zu caches in %s, "
             "%.0f tokens/s.\n\n",
             n * e.scored(), e.from, estimate::run_tokens, n * (e.length() - 1), all.caches.size(),
             kvarn_cli::clock_text(seconds).c_str(), static_cast<double>(n * (e.length() - 1) * all.caches.size()) / seconds);
    rows table{{"", "KL", "KL", "KL", "KL", "top-1", "excess", "cache"},
               {"cache", "mean", "99 %", "99.9 %", "worst", "agrees", "NLL", "tokens/s"}};
    for (const cache_report& r : all.caches) {
        const likelihood l = likelihood_of(r.teacher, all.exact);
        table.push_back({r.plan.name, text_of(l.kl, 5), text("%.4f", l.kl_p99), text("%.4f", l.kl_p999), text("%.4f", l.kl_worst),
                         text("%.4f", l.agreement), text_of(l.excess, 5), text("%.0f", cache_speed(r, e))});
    }
    out += kvarn_cli::aligned(table);
    if (n > 1 && n <= 8) {
        table = {{"KL of sequence"}};
        for (std::size_t s = 0; s < n; ++s) table[0].push_back(std::to_string(s));
        for (const cache_report& r : all.caches) {
            table.push_back({r.plan.name});
            for (const token_scores& one : r.teacher) table.back().push_back(text("%.5f", likelihood_of({one}, {one}).kl.mean));
        }
        out += "\n" + kvarn_cli::aligned(table);
    }
    if (const auto ranges = ranges_of(e); ranges.size() > 1) {
        const auto add = [&](const char* title, auto value) {
            table = {{title}};
            for (const position_range& range : ranges) table[0].push_back(range_text(range));
            for (const cache_report& r : all.caches) {
                table.push_back({r.plan.name});
                for (const position_range& range : ranges)
                    table.back().push_back(value(likelihood_of(r.teacher, all.exact, range.first - e.from, range.end - e.from)));
            }
            out += "\n" + kvarn_cli::aligned(table);
        };
        add("KL at positions", [](const likelihood& l) { return text_of(l.kl, 5); });
        add("excess NLL at positions", [](const likelihood& l) { return text_of(l.excess, 5); });
        add("top-1 agrees at positions", [](const likelihood& l) { return text("%.4f", l.agreement); });
    }
    if (all.caches.size() > 1) {
        const cache_report& other = all.caches[against];
        table = {{"less " + other.plan.name + ", paired", "KL", "NLL"}};
        for (std::size_t i = 0; i < all.caches.size(); ++i) {
            if (i == against) continue;
            const difference d = difference_of(all.caches[i].teacher, other.teacher);
            table.push_back({all.caches[i].plan.name, text_of(d.kl, 5), text_of(d.nll, 5)});
        }
        out += "\n" + kvarn_cli::aligned(table);
    }
    return out;
}

/// Adds what is known of one cache to its object.
inline void add_likelihood(nlohmann::ordered_json& to, const evaluation& all, const experiment& e, std::size_t number)
{
    const cache_report& r = all.caches[number];
    const likelihood l = likelihood_of(r.teacher, all.exact);
    to["scored"] = e.sequences.size() * e.scored();
    to["from"] = e.from;
    to["nll"] = l.nll.mean;
    to["kl"] = l.kl.mean;
    to["kl_error"] = l.kl.error;
    to["kl_p99"] = l.kl_p99;
    to["kl_p999"] = l.kl_p999;
    to["kl_worst"] = l.kl_worst;
    to["agreement"] = l.agreement;
    to["excess_nll"] = l.excess.mean;
    to["excess_nll_error"] = l.excess.error;
    to["accuracy"] = l.accuracy;
    for (std::size_t s = 0; s < r.teacher.size(); ++s) {
        const likelihood one = likelihood_of({r.teacher[s]}, {all.exact[s]});
        to["nll_of_sequences"].push_back(one.nll.mean);
        to["kl_of_sequences"].push_back(one.kl.mean);
        to["agreement_of_sequences"].push_back(one.agreement);
        to["excess_nll_of_sequences"].push_back(one.excess.mean);
    }
    for (const position_range& range : ranges_of(e)) {
        const likelihood part = likelihood_of(r.teacher, all.exact, range.first - e.from, range.end - e.from);
        to["positions"].push_back({{"first", range.first},
                                   {"end", range.end},
                                   {"kl", part.kl.mean},
                                   {"kl_error", part.kl.error},
                                   {"kl_p99", part.kl_p99},
                                   {"kl_worst", part.kl_worst},
                                   {"agreement", part.agreement},
                                   {"excess_nll", part.excess.mean},
                                   {"excess_nll_error", part.excess.error}});
    }
    for (std::size_t other = 0; other < all.caches.size(); ++other) {
        if (other == number) continue;
        const difference d = difference_of(r.teacher, all.caches[other].teacher);
        to["less"].push_back({{"cache", all.caches[other].plan.name},
                              {"kl", d.kl.mean},
                              {"kl_error", d.kl.error},
                              {"nll", d.nll.mean},
                              {"nll_error", d.nll.error}});
    }
    to["cache_tokens_per_second"] = cache_speed(r, e);
}

/// One line per cache, sequence and range of positions, for spreadsheets.
[[nodiscard]] inline std::string csv_report(const evaluation& all, const experiment& e)
{
    std::string out = "cache,bits_per_element,sequence,first,end,nll,exact_nll,kl,kl_p99,kl_worst,agreement,accuracy\n";
    for (const cache_report& r : all.caches)
        for (std::size_t s = 0; s < r.teacher.size(); ++s)
            for (const position_range& range : ranges_of(e)) {
                const likelihood l = likelihood_of({r.teacher[s]}, {all.exact[s]}, range.first - e.from, range.end - e.from);
                out += text("%s,%.4f,%zu,%zu,%zu,%.6g,%.6g,%.6g,%.6g,%.6g,%.6g,%.6g\n", r.plan.name.c_str(), r.plan.sealed_bits(),
                            s, range.first, range.end, l.nll.mean, l.nll.mean - l.excess.mean, l.kl.mean, l.kl_p99, l.kl_worst,
                            l.agreement, l.accuracy);
            }
    return out;
}

}  // namespace language_model
