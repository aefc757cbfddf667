// SPDX-License-Identifier: Apache-2.0
#pragma once
// Whether the batch changed anything: every request again, alone, in a pool of its own, without drafts, prefixes and preemptions, on one thread. In:
// the answers of a run. Out: a failure that names the first request that has other tokens, other bits of logits, or other bytes in its cache.

#include <cstddef>
#include <string>
#include <vector>

#include "scheduler.hpp"

namespace serving {

/// A pool for `sequences` sequences of requests like these, with blocks for `at_once` of them.
[[nodiscard]] inline kvarn::cache_config config_for(const language_model::cache_plan& plan, const language_model::model_config& model,
                                                    std::size_t longest, std::size_t sequences, std::size_t at_once)
{
    kvarn::cache_config c = language_model::pool_config(plan, {model.layers, model.kv_heads, model.head_dim, model.group_heads()}, longest);
    const kvarn::block_counts each = kvarn::blocks_of(c, longest, plan.group);
    c.sequences = sequences;
    c.record_blocks = each.records * at_once;
    c.exact_blocks = each.exact * at_once;
    return c;
}

[[nodiscard]] inline answer run_alone(const language_model::model& m, const language_model::cache_plan& plan, const request& r)
{
    language_model::team alone(1);
    const std::vector<request> requests{r};
    engine e(m, config_for(plan, m.config, r.prompt.size() + r.generate, 1, 1), alone);
    schedule_options options;
    options.running = 1;
    options.prefixes = 0;
    options.budget = SIZE_MAX;
    scheduler s(e, requests, options);
    s.run([](std::size_t) {});
    return s.answers().front();
}

inline void check_answers(const language_model::model& m, const language_model::cache_plan& plan, const std::vector<request>& requests,
                          const std::vector<answer>& answers, unsigned threads)
{
    language_model::evaluate_detail::for_all(requests.size(), threads, "check", [&](std::size_t i) {
        const answer &got = answers[i], want = run_alone(m, plan, requests[i]);
        const auto differ = [&](const std::string& what) { throw failure(text("check: request %zu has other ", i) + what + " than it has alone"); };
        for (std::size_t t = 0; t < want.ids.size(); ++t) {
            if (got.ids[t] != want.ids[t]) differ(text("tokens, from the %zuth on,", t));
            if (got.logits[t] != want.logits[t]) differ(text("logits, from the %zuth token on,", t));
        }
        if (got.cache != want.cache) differ("records or exact tokens in its cache");
    });
}

}  // namespace serving
