// SPDX-License-Identifier: Apache-2.0
#pragma once
// One step of a batch: the forward pass of the model over the next tokens of several sequences of one pool, on all threads. In: a pool's
// configuration, sequences with room reserved for their tokens. Out: logits; K and V are in the pool as drafts. The layers of a step run in three
// phases, store, attend and finish, each of them items that any thread may take; seal() does items of sealing in the same way.
// Every row has the bits that it has alone, whatever else is in the batch.

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>
#include <vector>

#include <kvarn/cache/seal.hpp>
#include <kvarn/cache/tasks.hpp>

#include "../language_model/pool_config.hpp"
#include "../language_model/transformer.hpp"

namespace serving {

using kvarn_cli::check, kvarn_cli::value_of;

/// The next tokens of one sequence.
struct part {
    kvarn::sequence_id sequence{};
    std::span<const std::int32_t> tokens;
};

class engine {
public:
    engine(const language_model::model& m, const kvarn::cache_config& config, language_model::team& helpers)
        : model_(&m), helpers_(&helpers), pass_(m, &helpers, language_model::row_sums::alone), memory_(language_model::pool_memory(config)),
          pool_(value_of(kvarn::make_pool(config, memory_), "the pool")),
          scratch_bytes_(kvarn::cache_scratch_bytes(config, std::max(m.config.group_heads(), kvarn::layer_options{}.rows_per_task)))
    {}

    [[nodiscard]] kvarn::cache_pool& pool() noexcept { return pool_; }
    [[nodiscard]] const language_model::model& model() const noexcept { return *model_; }

    void run(std::span<const part> parts)
    {
        const language_model::model_config& c = model_->config;
        lanes_.clear();
        for (const part& p : parts)
            lanes_.push_back({p.tokens, pool_.next_position(p.sequence) - static_cast<std::int64_t>(p.tokens.size())});
        steps_.resize(parts.size());
        pass_.run(lanes_, [&](std::size_t layer, std::span<const language_model::lane_rows> rows) {
            for (std::size_t i = 0; i < rows.size(); ++i) {
                steps_[i].sequence = parts[i].sequence;
                steps_[i].k = kvarn::token_major(rows[i].k, rows[i].tokens, c.kv_heads, c.head_dim);
                steps_[i].v = kvarn::token_major(rows[i].v, rows[i].tokens, c.kv_heads, c.head_dim);
                steps_[i].q = kvarn::token_major(rows[i].q, rows[i].tokens, c.heads, c.head_dim);
                steps_[i].out = kvarn::token_major(rows[i].attention, rows[i].tokens, c.heads, c.head_dim);
            }
            kvarn::layer_options how;
            how.attention = attention_of(c, layer);
            how.threads = helpers_->threads();
            items_memory_.resize(std::max(items_memory_.size(), kvarn::layer_memory_bytes(pool_, steps_, how)));
            const kvarn::layer_items items = value_of(kvarn::plan_layer(pool_, layer, steps_, how, items_memory_), "the plan of a layer");
            each(items.store_items(), "storing", [&](std::size_t i, std::span<std::byte>) { return items.store_item(i); });
            each(items.attend_items(), "attention", [&](std::size_t i, std::span<std::byte> scratch) { return items.attend_item(i, scratch); });
            each(items.finish_items(), "attention", [&](std::size_t i, std::span<std::byte> scratch) { return items.finish_item(i, scratch); });
        });
    }

    /// Logits of some rows of the last step: its parts one after the other, a row a token.
    [[nodiscard]] const language_model::matrix& logits(std::span<const std::size_t> rows) { return pass_.logits(rows); }

    /// Does up to `most` items of the tiles that are queued.
    kvarn::seal_report seal(std::size_t most)
    {
        const std::size_t items = std::min(most, kvarn::seal_items(pool_));
        each(items, "sealing", [&](std::size_t i, std::span<std::byte> scratch) { return kvarn::seal_item(pool_, i, scratch); });
        return kvarn::finish_seal(pool_, items);
    }

private:
    /// Items of a phase on the team; every thread has scratch of its own.
    template <class Item>
    void each(std::size_t items, const char* what, Item&& item)
    {
        helpers_->each(items, [&](std::size_t i) {
            thread_local std::vector<std::byte> scratch;
            if (scratch.size() < scratch_bytes_) scratch.resize(scratch_bytes_);
            check(item(i, std::span(scratch)), what);
        });
    }

    const language_model::model* model_;
    language_model::team* helpers_;
    language_model::forward_pass pass_;
    std::vector<std::byte> memory_;
    kvarn::cache_pool pool_;
    std::size_t scratch_bytes_;
    std::vector<language_model::lane> lanes_;
    std::vector<kvarn::sequence_step> steps_;
    std::vector<std::byte> items_memory_;
};

/// A number that stands for bytes: FNV-1a over words of 8.
class digest {
public:
    void add(const void* data, std::size_t bytes)
    {
        const auto* at = static_cast<const unsigned char*>(data);
        for (; bytes >= 8; at += 8, bytes -= 8) {
            std::uint64_t word = 0;
            std::memcpy(&word, at, 8);
            mix(word);
        }
        for (; bytes != 0; ++at, --bytes) mix(*at);
    }
    void add(std::uint64_t word) { mix(word); }
    [[nodiscard]] std::uint64_t value() const noexcept { return value_; }

private:
    void mix(std::uint64_t word)
    {
        value_ = (value_ ^ word) * 0x100000001b3u;
        value_ ^= value_ >> 29;
    }
    std::uint64_t value_ = 0xcbf29ce484222325u;
};

/// Of everything that a sequence holds, in order: bytes of records, exact tokens, and where they are. Sequences that hold the same have the
/// same, wherever in whichever pool their blocks lie.
[[nodiscard]] inline std::uint64_t digest_of(const kvarn::cache_pool& pool, kvarn::sequence_id id)
{
    digest sum;
    std::vector<kvarn::kv_segment> history(value_of(pool.statistics(id), "a sequence").spans);
    for (std::size_t layer = 0; layer < pool.layers(); ++layer)
        for (std::size_t head = 0; head < pool.heads(); ++head) {
            const std::size_t n = value_of(kvarn::history_of(pool, id, layer, head, history), "a sequence");
            for (const kvarn::kv_segment& s : std::span(history).first(n)) {
                sum.add(static_cast<std::uint64_t>(s.position));
                sum.add(s.tokens);
                sum.add(s.skip);
                for (std::size_t i = 0; i < s.records; ++i) sum.add(s.record(i), kvarn::record_bytes(pool.format_of(layer, head)));
                if (s.sealed()) continue;
                for (const kvarn::input_view& x : {s.k, s.v}) sum.add(x.data, x.tokens * x.channels * kvarn::element_bytes(pool.config().exact));
            }
        }
    return sum.value();
}

}  // namespace serving
