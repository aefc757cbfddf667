// SPDX-License-Identifier: Apache-2.0
#pragma once
// Continuous batching over one pool: requests come and go between steps, each step has a budget of tokens that prompts and decoding share. In: an
// engine, requests, options. Out: for each request its tokens and what became of it, for each step what the pool held.
//
// What a sequence holds is a function of its tokens alone: a step ends where a tile is full at the latest, and the sequence waits until that
// tile is sealed, while the others go on. So a request gets the same bits whatever the batch, the drafts, the threads, the sharing and the
// preemptions were (check.hpp).

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <list>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "drafts.hpp"
#include "engine.hpp"
#include "parking.hpp"

namespace serving {

struct schedule_options {
    std::size_t running = 8;      ///< sequences at once
    std::size_t prefixes = 4;     ///< prefixes that are kept for requests to come
    std::size_t budget = 256;     ///< tokens of a step
    std::size_t seal_items = SIZE_MAX;  ///< of a step
    bool saves = false;           ///< preempted sequences are saved and loaded; otherwise their tokens are run again
    draft_options drafts;
};

/// What became of a request.
struct answer {
    tokens ids;
    std::vector<std::uint64_t> logits;  ///< digests of the rows that the ids were taken from
    std::uint64_t cache = 0;            ///< digest of what the pool held at the end
    std::size_t first_step = 0, last_step = 0;
    std::size_t shared = 0;             ///< tokens taken over from prefixes
    std::size_t drafted = 0, accepted = 0, preempted = 0;
};

/// What happened in one step, and what the pool held after it.
struct moment {
    std::size_t step = 0;
    kvarn::pool_statistics pool;
    std::size_t running = 0, waiting = 0, prefixes = 0, sealing = 0;           ///< sequences; sealing: those that wait for a tile
    std::size_t prompt_tokens = 0, decoded_tokens = 0, drafted = 0, accepted = 0;
    std::size_t preempted = 0, resumed_tokens = 0;                             ///< resumed: run again after a preemption
    double seconds = 0;
};

class scheduler {
public:
    scheduler(engine& e, const std::vector<request>& requests, const schedule_options& options)
        : engine_(&e), pool_(e.pool()), requests_(&requests), options_(options), drafter_(options.drafts, e.model().config.vocabulary),
          answers_(requests.size()), group_(static_cast<std::size_t>(pool_.config().policy.base().group()))
    {}

    /// Runs all requests to their end. progress(requests done) is called after each step.
    template <class Progress>
    void run(Progress&& progress)
    {
        while (finished_ < requests_->size()) {
            step();
            progress(finished_);
        }
    }

    [[nodiscard]] const std::vector<answer>& answers() const noexcept { return answers_; }
    [[nodiscard]] const std::vector<moment>& moments() const noexcept { return moments_; }

private:
    /// A request that is running.
    struct running {
        std::size_t number = 0;
        tokens known;  ///< prompt and what was generated
        kvarn::sequence_id id{};
        tokens drafts;
        std::size_t count = 0;  ///< tokens in this step, drafts included; 0: none
    };
    /// A request that is not running yet, or not any more.
    struct waiting {
        std::size_t number = 0;
        tokens known;
        std::optional<parked_sequence> parked;
    };
    struct prefix {
        tokens known;
        kvarn::sequence_id id{};
        std::size_t used = 0;  ///< the step of its last use
    };

    void step()
    {
        const auto begin = std::chrono::steady_clock::now();
        if (running_.empty() && waiting_.empty()) step_ = std::max(step_, (*requests_)[arrived_].arrival);
        moments_.emplace_back();
        now().step = step_;
        for (; arrived_ < requests_->size() && (*requests_)[arrived_].arrival <= step_; ++arrived_)
            waiting_.push_back({arrived_, (*requests_)[arrived_].prompt, std::nullopt});
        while (!waiting_.empty() && running_.size() < options_.running && admit()) {
        }
        seal();
        schedule();
        run_batch();
        now().pool = pool_.statistics();
        now().running = running_.size();
        now().waiting = waiting_.size();
        now().prefixes = prefixes_.size();
        now().seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
        ++step_;
    }

    // --- coming and going ---

    /// Lets the first request that waits run, unless there is no room for what it knows.
    bool admit()
    {
        waiting& w = waiting_.front();
        prefix* const shared = w.parked ? nullptr : find_prefix(w.known);
        const std::size_t from_prefix = shared != nullptr ? usable(*shared, w.known) : 0;
        if (!running_.empty() && !has_room(w.known.size(), from_prefix, shared)) return false;
        running r{w.number, std::move(w.known), {}, {}, 0};
        if (w.parked) {
            const auto loaded = w.parked->load(pool_);
            if (!loaded) {
                w.known = std::move(r.known);
                if (drop_oldest_prefix()) return true;  // and once more
                if (!running_.empty()) return false;
                check(loaded.error, text("the pool is too small for request %zu alone", w.number));
            }
            r.id = *loaded;
        } else if (shared != nullptr) {
            r.id = value_of(pool_.fork(shared->id), "a shared prefix");
            check(pool_.truncate(r.id, static_cast<std::int64_t>(from_prefix)), "a shared prefix");
            shared->used = step_;
        } else {
            r.id = value_of(pool_.open(), "a new sequence");
        }
        if (answers_[r.number].preempted == 0) answers_[r.number].first_step = step_;
        answers_[r.number].shared += from_prefix;
        waiting_.pop_front();
        running_.push_back(std::move(r));
        return true;
    }

    /// Whether there are blocks for `known` tokens, `shared` of them taken over, besides what the running requests still need for the tokens that
    /// they know; prefixes other than `keep` make way. What all of them will generate is not counted: that is what preemption is for.
    bool has_room(std::size_t known, std::size_t shared, const prefix* keep)
    {
        const std::size_t in_sink = std::min(pool_.config().sink_tokens, shared);
        kvarn::block_counts needed;
        const auto add = [&](std::size_t count, std::size_t records, std::size_t exact) {
            const kvarn::block_counts all = kvarn::blocks_of(pool_.config(), count + 1);
            needed.records += all.records - std::min(all.records, records);
            needed.exact += all.exact - std::min(all.exact, exact);
        };
        add(known, (shared - in_sink) / group_, in_sink / group_);
        for (const running& r : running_) {
            const kvarn::sequence_statistics s = value_of(pool_.statistics(r.id), "a sequence");
            add(r.known.size(), s.record_blocks, s.exact_blocks);
        }
        for (;;) {
            const kvarn::pool_statistics s = pool_.statistics();
            if (s.records.free >= needed.records && s.exact.free >= needed.exact) return true;
            if (!drop_oldest_prefix([&](const prefix& p) { return &p != keep && is_idle(p); })) return false;
        }
    }

    /// Takes blocks from prefixes, then from the request that came last. False: that was `r` itself, which does not run any more.
    bool make_room(running& r)
    {
        if (drop_oldest_prefix([&](const prefix& p) { return is_idle(p); })) return true;
        if (running_.size() == 1 && drop_oldest_prefix()) return true;
        if (running_.size() == 1)
            throw failure(text("the pool is too small for request %zu alone: it has %zu record blocks and %zu exact blocks", r.number,
                               pool_.config().record_blocks, pool_.config().exact_blocks));
        running& last = running_.back();
        const bool itself = &last == &r;
        std::erase(batch_, &last);
        check(pool_.commit(last.id, 0), "taking back drafts");
        waiting w{last.number, std::move(last.known), std::nullopt};
        if (options_.saves) w.parked.emplace(pool_, last.id);
        else now().resumed_tokens += pool_.tokens(last.id);
        check(pool_.close(last.id), "closing a sequence");
        ++answers_[last.number].preempted;
        ++now().preempted;
        running_.pop_back();
        waiting_.push_front(std::move(w));
        return !itself;
    }

    // --- prefixes ---

    /// Tokens of a prefix that a request can take over: whole tiles, and not its last token, whose logits it needs.
    [[nodiscard]] std::size_t usable(const prefix& p, const tokens& known) const
    {
        const auto end = std::mismatch(p.known.begin(), p.known.end(), known.begin(), known.end()).first;
        return std::min(static_cast<std::size_t>(end - p.known.begin()), known.size() - 1) / group_ * group_;
    }
    prefix* find_prefix(const tokens& known)
    {
        prefix* best = nullptr;
        for (prefix& p : prefixes_)
            if (usable(p, known) > (best != nullptr ? usable(*best, known) : 0)) best = &p;
        return best;
    }
    /// Whether no running request begins with it: while one does, most likely by the same blocks, there is little to gain from it.
    [[nodiscard]] bool is_idle(const prefix& p) const
    {
        return std::none_of(running_.begin(), running_.end(), [&](const running& r) {
            return r.known.size() >= p.known.size() && std::equal(p.known.begin(), p.known.end(), r.known.begin());
        });
    }
    /// Drops the one of those that may go which was not used for longest. False: there is none.
    template <class May>
    bool drop_oldest_prefix(May&& may)
    {
        auto oldest = prefixes_.end();
        for (auto p = prefixes_.begin(); p != prefixes_.end(); ++p)
            if (may(*p) && (oldest == prefixes_.end() || p->used < oldest->used)) oldest = p;
        if (oldest == prefixes_.end()) return false;
        check(pool_.close(oldest->id), "closing a prefix");
        prefixes_.erase(oldest);
        return true;
    }
    bool drop_oldest_prefix()
    {
        return drop_oldest_prefix([](const prefix&) { return true; });
    }
    /// Keeps the whole tiles of a prompt, where no prefix has them.
    void keep_prefix(const running& r)
    {
        const std::size_t whole = (*requests_)[r.number].prompt.size() / group_ * group_;
        const std::span<const std::int32_t> known = std::span(r.known).first(whole);
        for (prefix& p : prefixes_)
            if (p.known.size() >= whole && std::equal(known.begin(), known.end(), p.known.begin())) return;
        if (whole == 0 || options_.prefixes == 0) return;
        if (prefixes_.size() == options_.prefixes) drop_oldest_prefix();
        const kvarn::sequence_id id = value_of(pool_.fork(r.id), "a prefix");
        check(pool_.truncate(id, static_cast<std::int64_t>(whole)), "a prefix");
        prefixes_.push_back({{known.begin(), known.end()}, id, step_});
    }

    // --- sealing ---

    /// Whether every full tile behind the sink is a record, or is known to stay exact.
    [[nodiscard]] bool is_settled(const running& r) const
    {
        const kvarn::sequence_statistics s = value_of(pool_.statistics(r.id), "a sequence");
        const std::size_t sink = std::min(pool_.config().sink_tokens, s.tokens);
        return s.sealed_tokens / group_ + s.kept_tiles == (s.tokens - sink) / group_;
    }
    void seal()
    {
        for (auto r = running_.begin(); r != running_.end();) {
            running& one = *r++;
            while (kvarn::ready_tiles(pool_, one.id) != 0) {
                const auto queued = kvarn::begin_seal(pool_, one.id);
                if (queued.error == kvarn::status::no_room) {
                    const bool last = r == running_.end();
                    if (!make_room(one)) break;
                    if (!last && running_.back().number == one.number) r = running_.end();  // the one after it is gone
                } else {
                    check(queued.error, "sealing");
                }
            }
        }
        engine_->seal(options_.seal_items);
    }

    // --- a step ---

    void schedule()
    {
        batch_.clear();
        std::size_t left = options_.budget;
        for (const bool decodes : {true, false})
            for (auto r = running_.begin(); r != running_.end() && left != 0;) {
                running& one = *r++;
                const std::size_t there = pool_.tokens(one.id), pending = one.known.size() - there;
                if ((pending == 1) != decodes || !is_settled(one)) continue;
                const std::size_t most = std::min(left, group_ - there % group_);
                one.drafts.clear();
                if (decodes) one.drafts = drafter_.propose((*requests_)[one.number], one.known, std::min(most, to_come(one)) - 1);
                one.count = std::min(most, pending + one.drafts.size());
                if (!reserve(one)) break;  // it was the last one
                if (running_.back().number == one.number) r = running_.end();
                batch_.push_back(&one);
                left -= one.count;
            }
    }
    [[nodiscard]] std::size_t to_come(const running& r) const
    {
        return (*requests_)[r.number].generate - answers_[r.number].ids.size();
    }
    bool reserve(running& r)
    {
        for (;;) {
            const kvarn::status s = pool_.reserve(r.id, r.count);
            if (s == kvarn::status::ok) return true;
            if (s != kvarn::status::no_room) check(s, "room for new tokens");
            if (!make_room(r)) return false;
        }
    }

    void run_batch()
    {
        now().sealing = static_cast<std::size_t>(std::count_if(running_.begin(), running_.end(), [&](const running& r) { return !is_settled(r); }));
        if (batch_.empty()) return;
        std::vector<part> parts;
        std::vector<tokens> rows_of(batch_.size());
        std::vector<std::size_t> rows;  // whose logits count: of the newest known token, and of drafts
        std::size_t row = 0;
        for (std::size_t i = 0; i < batch_.size(); ++i) {
            const running& r = *batch_[i];
            const auto first = r.known.begin() + static_cast<std::ptrdiff_t>(pool_.tokens(r.id));
            rows_of[i].assign(first, first + static_cast<std::ptrdiff_t>(r.count - r.drafts.size()));
            rows_of[i].insert(rows_of[i].end(), r.drafts.begin(), r.drafts.end());
            parts.push_back({r.id, rows_of[i]});
            if (is_at_end(r))
                for (std::size_t d = r.count - r.drafts.size() - 1; d < r.count; ++d) rows.push_back(row + d);
            row += r.count;
        }
        engine_->run(parts);
        const language_model::matrix* const logits = rows.empty() ? nullptr : &engine_->logits(rows);
        std::size_t next_row = 0;
        for (running* const r : batch_) {
            const std::size_t fed = r->count - r->drafts.size();
            std::size_t accepted = 0;
            if (is_at_end(*r)) {
                const bool first = answers_[r->number].ids.empty();
                accepted = take(*r, *logits, next_row);
                next_row += 1 + r->drafts.size();
                now().decoded_tokens += first ? 0 : 1;
                now().prompt_tokens += first ? fed : 0;
                check(pool_.commit(r->id, fed + accepted), "new tokens");
                if (first) keep_prefix(*r);
            } else {
                now().prompt_tokens += fed;
                check(pool_.commit(r->id, fed), "new tokens");
            }
            now().decoded_tokens += accepted;
            now().drafted += r->drafts.size();
            now().accepted += accepted;
        }
        for (auto r = running_.begin(); r != running_.end();) r = to_come(*r) == 0 ? finish(r) : std::next(r);
    }
    /// Whether this step runs the newest known token of a request.
    [[nodiscard]] bool is_at_end(const running& r) const { return pool_.tokens(r.id) + r.count - r.drafts.size() == r.known.size(); }

    /// Takes the next tokens from rows of logits, as far as the drafts are right. Says how many of them are.
    std::size_t take(running& r, const language_model::matrix& logits, std::size_t row)
    {
        answer& a = answers_[r.number];
        std::size_t accepted = 0;
        for (;; ++accepted) {
            const auto& of_row = logits.row(static_cast<Eigen::Index>(row + accepted));
            digest bits;
            bits.add(of_row.data(), static_cast<std::size_t>(of_row.size()) * sizeof(float));
            const std::int32_t next = language_model::evaluate_detail::argmax(of_row.data(), static_cast<std::size_t>(of_row.size()));
            a.ids.push_back(next);
            a.logits.push_back(bits.value());
            r.known.push_back(next);
            if (accepted == r.drafts.size() || r.drafts[accepted] != next || drafter_.rejects()) break;
        }
        a.drafted += r.drafts.size();
        a.accepted += accepted;
        return accepted;
    }

    std::list<running>::iterator finish(std::list<running>::iterator r)
    {
        answers_[r->number].last_step = step_;
        answers_[r->number].cache = digest_of(pool_, r->id);
        check(pool_.close(r->id), "closing a sequence");
        ++finished_;
        return running_.erase(r);
    }

    [[nodiscard]] moment& now() { return moments_.back(); }

    engine* engine_;
    kvarn::cache_pool pool_;
    const std::vector<request>* requests_;
    schedule_options options_;
    drafter drafter_;
    std::vector<answer> answers_;
    std::vector<moment> moments_;
    std::size_t group_, step_ = 0, arrived_ = 0, finished_ = 0;
    std::list<running> running_;  ///< in the order of their admission
    std::deque<waiting> waiting_;
    std::list<prefix> prefixes_;
    std::vector<running*> batch_;
};

}  // namespace serving
