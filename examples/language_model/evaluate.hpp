// SPDX-License-Identifier: Apache-2.0
#pragma once
// How decoding suffers from a cache. teacher: every next token given the right history, all caches in lock step
// beside one exact run. greedy: the model's own walk until its first error. pseudo: a fixed sequence block by block
// beside the exact run, once with errors that feed later layers and blocks (accumulated), once with exact inputs
// everywhere (static, here `fixed`). In: model, plans, sequences. Out: measures of each. Lock step runs one sequence
// on all threads; the other modes spread sequences over threads, every one with its own caches. Results do not depend
// on the number of threads.

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <limits>
#include <memory>
#include <mutex>
#include <span>
#include <string>
#include <vector>

#include "../common/measures.hpp"
#include "../common/threads.hpp"
#include "decoder.hpp"
#include "scores.hpp"

namespace language_model {

using tokens = std::vector<std::int32_t>;

/// What is run.
struct experiment {
    const language_model::model* model = nullptr;
    std::vector<tokens> sequences;  ///< all of one length
    std::size_t known = 0;          ///< tokens given at the start; what follows is decoded
    std::size_t from = 1;           ///< the first token whose prediction counts, given the right ones before it; at least 1
    bool truth = false;             ///< the tokens that follow are right answers, not one continuation of many
    unsigned threads = 0;

    [[nodiscard]] std::size_t length() const { return sequences.front().size(); }
    [[nodiscard]] std::size_t predicted() const { return length() - known; }
    [[nodiscard]] std::size_t scored() const { return length() - from; }
};

/// A relative error in the making: sums of squares of the difference and of the exact values.
struct squares {
    double difference = 0, norm = 0;

    void add(const float* exact, const float* other, std::size_t n)
    {
        for (std::size_t i = 0; i < n; ++i) {
            const double x = static_cast<double>(exact[i]), d = x - static_cast<double>(other[i]);
            difference += d * d;
            norm += x * x;
        }
    }
    void add(const squares& other)
    {
        difference += other.difference;
        norm += other.norm;
    }
    [[nodiscard]] double relative() const { return norm > 0 ? std::sqrt(difference / norm) : 0.0; }
};

/// One block of one run beside the exact one.
struct block_errors {
    std::vector<squares> attention;        ///< per layer
    squares k, v;                          ///< what the cache holds after the block, over layers and heads
    std::vector<double> k_scale, v_scale;  ///< token-scale errors, per token, layer and head
};

struct block_result {
    std::size_t first = 0, tokens = 0;
    block_errors fixed, accumulated;
    double kl = 0;  ///< sum over the tokens of the block, accumulated run
};

namespace evaluate_detail {

/// Logarithms of the probabilities.
inline void log_softmax(const float* logits, std::size_t n, std::vector<double>& out)
{
    out.resize(n);
    const double largest = static_cast<double>(*std::max_element(logits, logits + n));
    double sum = 0;
    for (std::size_t i = 0; i < n; ++i) sum += std::exp(out[i] = static_cast<double>(logits[i]) - largest);
    const double total = std::log(sum);
    for (double& x : out) x -= total;
}

[[nodiscard]] inline double divergence(const std::vector<double>& exact, const std::vector<double>& other)
{
    double sum = 0;
    for (std::size_t i = 0; i < exact.size(); ++i) sum += std::exp(exact[i]) * (exact[i] - other[i]);
    return std::max(sum, 0.0);  // rounding only
}

[[nodiscard]] inline std::int32_t argmax(const float* logits, std::size_t n)
{
    return static_cast<std::int32_t>(std::max_element(logits, logits + n) - logits);
}

/// Runs one(i) for i below `items` on all threads; of the items that ran, the failure of the lowest is thrown.
template <class One>
void for_all(std::size_t items, unsigned threads, const char* what, One one)
{
    std::mutex guard;
    std::exception_ptr problem;
    std::size_t problem_at = std::numeric_limits<std::size_t>::max();
    const kvarn::status s = kvarn_cli::for_ranges(
        items, 0, threads, what,
        [&](kvarn::record_range range, std::span<std::byte>) noexcept {
            for (std::size_t i = range.begin; i < range.end; ++i) {
                try {
                    one(i);
                } catch (...) {
                    const std::lock_guard lock(guard);
                    if (i < problem_at) problem = std::current_exception(), problem_at = i;
                    return kvarn::status::bad_argument;  // stops the others; the exception says why
                }
            }
            return kvarn::status::ok;
        },
        "sequences");
    if (problem) std::rethrow_exception(problem);
    kvarn_cli::check(s, what);
}

}  // namespace evaluate_detail

/// A cache plan that stores everything as it is.
[[nodiscard]] inline cache_plan exact_plan(const model& m)
{
    return plan_of("exact", m.config.head_dim, {});
}

/// The model's own continuation of the known tokens, as long as the sequence, or up to the first token that
/// `reference` has not.
[[nodiscard]] inline tokens continuation(const experiment& e, const cache_plan& plan, std::size_t sequence,
                                         std::span<const std::int32_t> reference = {})
{
    const std::span<const std::int32_t> x = e.sequences[sequence];
    kv_cache cache(plan, shape_of(e.model->config), x.size() - 1);
    decoder d(*e.model, cache);
    d.run_all(x.first(e.known));
    tokens out;
    for (;;) {
        out.push_back(evaluate_detail::argmax(d.last_logits().data(), e.model->config.vocabulary));
        const std::size_t last = out.size() - 1;
        if (out.size() == e.predicted() || (!reference.empty() && out[last] != reference[last])) return out;
        d.run(std::span(out).last(1));
    }
}

/// Greedy decoding: tokens before the first that differs from `reference`.
[[nodiscard]] inline std::size_t hops(const experiment& e, const cache_plan& plan, std::size_t sequence,
                                      std::span<const std::int32_t> reference)
{
    const tokens own = continuation(e, plan, sequence, reference);
    return own.size() - (own.back() == reference[own.size() - 1] ? 0 : 1);
}

/// Where the blocks of the pseudo-decoding run end: after the last whole tile, or after the sequence when no tile
/// gets full.
[[nodiscard]] inline std::size_t pseudo_length(const experiment& e, const cache_plan& plan)
{
    const std::size_t sink = std::min(plan.sink, e.length()), tiles = (e.length() - sink) / plan.group;
    return tiles == 0 ? e.length() : sink + tiles * plan.group;
}

[[nodiscard]] inline std::vector<block_result> pseudo(const experiment& e, const cache_plan& plan, std::size_t sequence)
{
    using namespace evaluate_detail;
    const model_config& c = e.model->config;
    const std::size_t all = pseudo_length(e, plan), width = c.heads * c.head_dim;
    const std::span<const std::int32_t> x = std::span(e.sequences[sequence]).first(all);
    const cache_plan exact = exact_plan(*e.model);
    const cache_shape shape = shape_of(c);
    kv_cache exact_cache(exact, shape, all), fixed_cache(plan, shape, all), accumulated_cache(plan, shape, all);
    decoder reference(*e.model, exact_cache), accumulated(*e.model, accumulated_cache);
    std::vector<std::vector<float>> exact_attention(c.layers);
    std::vector<float> out;
    std::vector<double> p, q;
    std::vector<block_result> blocks;
    for (std::size_t at = 0; at < all;) {
        const std::size_t count = std::min(accumulated_cache.until_seal(), all - at);
        block_result b;
        b.first = at;
        b.tokens = count;
        b.fixed.attention.resize(c.layers);
        b.accumulated.attention.resize(c.layers);
        out.resize(count * width);
        reference.run(x.subspan(at, count), [&](const layer_step& s) {
            exact_attention[s.layer].assign(s.attention, s.attention + count * width);
            fixed_cache.attend(s.layer, s.q, s.k, s.v, out.data(), count, attention_of(c, s.layer));
            b.fixed.attention[s.layer].add(s.attention, out.data(), count * width);
        });
        fixed_cache.finish();
        accumulated.run(x.subspan(at, count), [&](const layer_step& s) {
            b.accumulated.attention[s.layer].add(exact_attention[s.layer].data(), s.attention, count * width);
        });
        kvarn_cli::matrix k{c.kv_heads, count, c.head_dim, std::vector<float>(c.kv_heads * count * c.head_dim)}, v(k), k2(k),
            v2(k);
        for (std::size_t layer = 0; layer < c.layers; ++layer) {
            exact_cache.read(layer, at, k, v);
            for (auto* run : {&b.fixed, &b.accumulated}) {
                (run == &b.fixed ? fixed_cache : accumulated_cache).read(layer, at, k2, v2);
                run->k.add(k.values.data(), k2.values.data(), k.values.size());
                run->v.add(v.values.data(), v2.values.data(), v.values.size());
                for (const double error : kvarn_cli::token_scale_errors(k, k2)) run->k_scale.push_back(error);
                for (const double error : kvarn_cli::token_scale_errors(v, v2)) run->v_scale.push_back(error);
            }
        }
        const matrix &a = reference.logits(0, count), &other = accumulated.logits(0, count);
        for (std::size_t i = 0; i < count; ++i) {
            log_softmax(a.data() + i * c.vocabulary, c.vocabulary, p);
            log_softmax(other.data() + i * c.vocabulary, c.vocabulary, q);
            b.kl += divergence(p, q);
        }
        blocks.push_back(std::move(b));
        at += count;
    }
    return blocks;
}

/// Adds the blocks of another sequence to those of the ones before.
inline void merge(std::vector<block_result>& total, std::vector<block_result>&& one)
{
    if (total.empty()) {
        total = std::move(one);
        return;
    }
    for (std::size_t i = 0; i < total.size(); ++i) {
        total[i].kl += one[i].kl;
        for (auto part : {&block_result::fixed, &block_result::accumulated}) {
            block_errors &to = total[i].*part, &from = one[i].*part;
            for (std::size_t layer = 0; layer < to.attention.size(); ++layer) to.attention[layer].add(from.attention[layer]);
            to.k.add(from.k);
            to.v.add(from.v);
            to.k_scale.insert(to.k_scale.end(), from.k_scale.begin(), from.k_scale.end());
            to.v_scale.insert(to.v_scale.end(), from.v_scale.begin(), from.v_scale.end());
        }
    }
}

/// Everything that was measured of one cache.
struct cache_report {
    cache_plan plan;
    double bytes = 0, bits_per_element_total = 0;  ///< of the cache of one sequence at its end
    std::vector<token_scores> teacher;             ///< per sequence; empty: not run
    double teacher_seconds = 0;                    ///< appending, attention and sealing, one thread
    std::vector<std::size_t> hops;                 ///< per sequence; empty: not run
    std::vector<block_result> blocks;              ///< over all sequences; empty: not run
};

struct evaluation {
    std::vector<cache_report> caches;
    std::vector<token_scores> exact;  ///< of the exact run, per sequence; empty: not run
    double teacher_seconds = 0;       ///< the whole lock step, all threads
};

struct modes {
    bool teacher = true, greedy = true, pseudo = false;
};

namespace evaluate_detail {

/// One sequence with all caches beside the exact run. `advance` is told how many tokens were done.
template <class Advance>
void lock_step(const experiment& e, std::size_t sequence, evaluation& to, team& helpers, Advance&& advance)
{
    const std::span<const std::int32_t> x = e.sequences[sequence];
    const std::size_t fed = x.size() - 1;  // nothing follows the last token
    const cache_shape shape = shape_of(e.model->config);
    const cache_plan exact = exact_plan(*e.model);
    std::vector<std::unique_ptr<kv_cache>> caches;
    std::vector<kv_cache*> all;
    std::vector<std::size_t> lane_of(to.caches.size());  // exact caches are the exact run itself
    const auto add = [&](const cache_plan& plan) {
        all.push_back(caches.emplace_back(std::make_unique<kv_cache>(plan, shape, fed)).get());
        return all.size() - 1;
    };
    add(exact);
    for (std::size_t i = 0; i < to.caches.size(); ++i)
        lane_of[i] = to.caches[i].plan.storage == storage::exact ? 0 : add(to.caches[i].plan);
    decoder d(*e.model, all, &helpers);
    std::vector<token_scores> scores(all.size());
    for (std::size_t at = 0; at < fed;) {
        const std::size_t count = std::min(d.until_seal(), fed - at);
        d.run(x.subspan(at, count));
        const std::size_t first = std::max(at + 1, e.from) - 1;  // its successor is the first that counts
        if (first < at + count)
            score_tokens(*e.model, d.states(), all.size(), first - at, x.subspan(first + 1, at + count - first), scores, helpers);
        at += count;
        advance(count);
    }
    to.exact[sequence] = scores.front();
    for (std::size_t i = 0; i < to.caches.size(); ++i) {
        to.caches[i].teacher[sequence] = scores[lane_of[i]];
        to.caches[i].teacher_seconds += d.seconds_of(lane_of[i]);
    }
}

}  // namespace evaluate_detail

/// Runs all caches over all sequences.
[[nodiscard]] inline evaluation evaluate(const experiment& e, const std::vector<cache_plan>& plans, const modes& wanted)
{
    using evaluate_detail::for_all;
    const std::size_t n = e.sequences.size(), items = plans.size() * n;
    evaluation result;
    std::vector<cache_report>& reports = result.caches;
    reports.resize(plans.size());
    const cache_shape shape = shape_of(e.model->config);
    for (std::size_t i = 0; i < plans.size(); ++i) {
        reports[i].plan = plans[i];
        reports[i].bytes = cache_bytes(plans[i], shape, e.length() - 1);
        reports[i].bits_per_element_total = 8 * reports[i].bytes / (cache_elements(shape) * static_cast<double>(e.length() - 1));
    }
    if (wanted.teacher) {
        const auto begin = std::chrono::steady_clock::now();
        kvarn_cli::progress shown("lock step");
        team helpers(e.threads);
        result.exact.resize(n);
        for (cache_report& r : reports) r.teacher.resize(n);
        for (std::size_t i = 0, done = 0; i < n; ++i)
            evaluate_detail::lock_step(e, i, result, helpers,
                                       [&](std::size_t count) { shown.show(done += count, n * (e.length() - 1), "tokens"); });
        result.teacher_seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
    }
    if (wanted.greedy) {
        std::vector<tokens> references(n);
        if (e.truth) {
            for (std::size_t i = 0; i < n; ++i)
                references[i].assign(e.sequences[i].begin() + static_cast<std::ptrdiff_t>(e.known), e.sequences[i].end());
        } else {
            const cache_plan exact = exact_plan(*e.model);
            for_all(n, e.threads, "greedy, exact", [&](std::size_t i) { references[i] = continuation(e, exact, i); });
        }
        for (cache_report& r : reports) r.hops.resize(n);
        for_all(items, e.threads, "greedy",
                [&](std::size_t i) { reports[i / n].hops[i % n] = hops(e, plans[i / n], i % n, references[i % n]); });
    }
    if (wanted.pseudo) {
        std::vector<std::vector<block_result>> blocks(items);
        for_all(items, e.threads, "pseudo-decoding", [&](std::size_t i) { blocks[i] = pseudo(e, plans[i / n], i % n); });
        for (std::size_t i = 0; i < items; ++i) merge(reports[i / n].blocks, std::move(blocks[i]));
        for (cache_report& r : reports)
            for (block_result& b : r.blocks)
                for (auto* errors : {&b.fixed.k_scale, &b.fixed.v_scale, &b.accumulated.k_scale, &b.accumulated.v_scale})
                    std::sort(errors->begin(), errors->end());
    }
    return result;
}

}  // namespace language_model
