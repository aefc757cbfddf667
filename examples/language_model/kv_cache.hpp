// SPDX-License-Identifier: Apache-2.0
#pragma once
// The K and V cache of one sequence by the plan of its name: a kvarn::cache_pool of one sequence, which does all the work. In: K and V of new
// tokens as halves [token][KV head][channel], queries. Out: attention over everything so far. finish() ends a step: tiles that are full
// become records, or hold the values that a baseline gives back. Not thread safe.

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include <kvarn/cache/bases.hpp>
#include <kvarn/cache/seal.hpp>
#include <kvarn/cache/tasks.hpp>

#include "pool_config.hpp"

namespace language_model {

class kv_cache {
public:
    kv_cache(const cache_plan& plan, const cache_shape& shape, std::size_t most_tokens)
        : plan_(&plan), shape_(shape), config_(pool_config(plan, shape, most_tokens)), memory_(pool_memory(config_)),
          pool_(*kvarn::make_pool(config_, memory_)), id_(*pool_.open()),
          scratch_(std::max(kvarn::cache_scratch_bytes(config_, std::max<std::size_t>(shape.group_heads, kvarn::layer_options{}.rows_per_task)),
                            plan.choose_basis ? kvarn::choose_bases_scratch_bytes(plan.format) : 0)),
          moments_(plan.choose_basis ? kvarn::moment_count(pool_) : 0)
    {}

    [[nodiscard]] const cache_plan& plan() const noexcept { return *plan_; }
    [[nodiscard]] std::size_t tokens() const noexcept { return pool_.tokens(id_); }
    [[nodiscard]] std::size_t sealed_tokens() const noexcept { return sealed_; }
    /// Tokens until the next tile is full. A step that goes on behind it attends to all of the tile as it was.
    [[nodiscard]] std::size_t until_seal() const noexcept { return plan_->group - tokens() % plan_->group; }

    /// Causal attention of `count` new tokens, whose K and V enter a layer; every layer gets as many before finish(). q and out: [token][query
    /// head][channel].
    void attend(std::size_t layer, const float* q, const kvarn::half* k, const kvarn::half* v, float* out, std::size_t count,
                const kvarn::attention_options& options = {})
    {
        const std::size_t d = shape_.head_dim, kv = shape_.kv_heads, each = shape_.group_heads;
        if (pool_.drafts(id_) == 0) check(pool_.reserve(id_, count), "room for new tokens");
        const auto queries = kvarn::token_major(q, count, kv * each, d);
        if (plan_->choose_basis && sealed_ == 0) check(kvarn::add_query_moments(pool_, layer, queries, moments_), "moments of the queries");
        kvarn::sequence_step step;
        step.sequence = id_;
        step.k = kvarn::token_major(k, count, kv, d);
        step.v = kvarn::token_major(v, count, kv, d);
        step.q = queries;
        step.out = kvarn::token_major(out, count, kv * each, d);
        kvarn::layer_options how{.attention = options};
        how.attention.precision = plan_->precision;
        items_.resize(std::max(items_.size(), kvarn::layer_memory_bytes(pool_, {&step, 1}, how)));
        const auto items = kvarn::plan_layer(pool_, layer, {&step, 1}, how, items_);
        check(items.error, "attention");
        check(items->run(scratch_), "attention");
    }

    /// Ends a step: its tokens count from now on, and full tiles are replaced by their quantized values.
    void finish()
    {
        check(pool_.commit(id_, pool_.drafts(id_)), "new tokens");
        if (plan_->storage == storage::records) {
            if (plan_->choose_basis && sealed_ == 0 && kvarn::ready_tiles(pool_, id_) != 0) choose_key_bases();
            const auto report = kvarn::seal(pool_, id_, scratch_);
            check(report ? report->why : report.error, "sealing a tile");
            sealed_ += report->sealed * plan_->group;
        } else if (plan_->storage == storage::round_trip) {
            for (; tokens() >= plan_->sink + sealed_ + plan_->group; sealed_ += plan_->group) round_trip(plan_->sink + sealed_);
        }
    }

    /// What the cache holds of tokens [first, first + k.tokens) of a layer, as floats in the original basis; k and v have the size.
    void read(std::size_t layer, std::size_t first, kvarn_cli::matrix& k, kvarn_cli::matrix& v)
    {
        const auto begin = static_cast<std::int64_t>(first), end = begin + static_cast<std::int64_t>(k.tokens);
        for (std::size_t head = 0; head < shape_.kv_heads; ++head)
            check(kvarn::read(pool_, id_, layer, head, begin, end, k.view().head(head), v.view().head(head), scratch_), "reading tokens");
    }

private:
    void check(kvarn::status s, const char* what) const { kvarn_cli::check(s, plan_->name + ": " + what); }

    /// Each head keeps its keys in the basis that its first tile and its queries ask for; no error is large enough for V to leave its own.
    void choose_key_bases()
    {
        const float margin = plan_->format.values_rotated() ? 1e30f : 1e-30f;
        check(kvarn::choose_bases(pool_, id_, moments_, scratch_, {.value_margin = margin, .encode = plan_->how}).error, "choosing a basis");
    }

    /// The tile at `first` holds what the baseline gives back: everything from there on is taken out and stored again.
    void round_trip(std::size_t first)
    {
        const std::size_t count = tokens() - first, heads = shape_.kv_heads, each = plan_->group * shape_.head_dim;
        const kvarn_cli::matrix room{heads, count, shape_.head_dim, std::vector<float>(heads * count * shape_.head_dim)};
        std::vector<kvarn_cli::matrix> all(2 * shape_.layers, room);  // K and V of each layer
        for (std::size_t layer = 0; layer < shape_.layers; ++layer) read(layer, first, all[2 * layer], all[2 * layer + 1]);
        check(pool_.truncate(id_, static_cast<std::int64_t>(first)), "a tile");
        check(pool_.reserve(id_, count), "a tile");
        for (std::size_t i = 0; i < all.size(); ++i) {
            kvarn_cli::matrix tile{heads, plan_->group, shape_.head_dim, std::vector<float>(heads * each)};
            for (std::size_t head = 0; head < heads; ++head) std::copy_n(all[i].token(head, 0), each, tile.token(head, 0));
            kvarn_cli::round_trip(plan_->baseline, tile, i % 2 == 0);
            for (std::size_t head = 0; head < heads; ++head) std::copy_n(tile.token(head, 0), each, all[i].token(head, 0));
            if (i % 2 == 1) check(kvarn::store(pool_, id_, i / 2, all[i - 1].view(), all[i].view()), "a tile");
        }
        check(pool_.commit(id_, count), "a tile");
    }

    const cache_plan* plan_;
    cache_shape shape_;
    kvarn::cache_config config_;
    std::vector<std::byte> memory_;
    kvarn::cache_pool pool_;
    kvarn::sequence_id id_;
    std::size_t sealed_ = 0;
    std::vector<std::byte> scratch_, items_;
    std::vector<std::uint64_t> moments_;  ///< of the queries: [layer][KV head][channel], while no basis is chosen
};

}  // namespace language_model
