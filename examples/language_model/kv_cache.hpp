// SPDX-License-Identifier: Apache-2.0
#pragma once
// The K and V cache of one sequence: per layer an exact sink, sealed tiles, and an exact tail that becomes a tile when it is full.
// In: K and V of new tokens as halves [token][KV head][channel], queries. Out: attention over everything so far, by kvarn::attend.
// A tile is sealed by seal(), after its last token was attended to. Not thread safe; one cache for one sequence.

#include <algorithm>
#include <cstddef>
#include <cstring>
#include <span>
#include <stdexcept>
#include <vector>

#include <kvarn/kvarn.hpp>

#include "cache_plan.hpp"

namespace language_model {

struct cache_shape {
    std::size_t layers = 0, kv_heads = 0, head_dim = 0, group_heads = 1;  ///< group_heads: query heads on one KV head
};

/// Elements of K and V of one token.
[[nodiscard]] inline double cache_elements(const cache_shape& shape)
{
    return 2.0 * static_cast<double>(shape.layers) * static_cast<double>(shape.kv_heads) * static_cast<double>(shape.head_dim);
}

/// Bytes of a cache that holds `tokens` tokens: sink, sealed tiles with scales and padding, and the tail as far as it is filled.
[[nodiscard]] inline double cache_bytes(const cache_plan& plan, const cache_shape& shape, std::size_t tokens)
{
    const std::size_t sealed = (tokens - std::min(plan.sink, tokens)) / plan.group * plan.group;
    return static_cast<double>(shape.layers) * static_cast<double>(shape.kv_heads) *
           (plan.exact_token_bytes() * static_cast<double>(tokens - sealed) +
            plan.sealed_token_bytes() * static_cast<double>(sealed));
}

class kv_cache {
public:
    kv_cache(const cache_plan& plan, const cache_shape& shape, std::size_t most_tokens)
        : plan_(&plan), shape_(shape), sink_(std::min(plan.sink, most_tokens)), most_tiles_((most_tokens - sink_) / plan.group),
          layers_(shape.layers)
    {
        const std::size_t vector = shape.kv_heads * shape.head_dim;
        for (layer& l : layers_) {
            for (auto* exact : {&l.sink_k, &l.sink_v}) exact->resize(sink_ * vector);
            if (most_tokens > sink_)
                for (auto* exact : {&l.tail_k, &l.tail_v}) exact->resize(plan.group * vector);
            if (plan.storage == storage::records)
                for (std::size_t head = 0; head < shape.kv_heads; ++head) {
                    const kvarn::format f = plan.format_of(static_cast<std::size_t>(&l - layers_.data()), head);
                    l.formats.push_back(f);
                    l.records.emplace_back(kvarn::grid_bytes(f, most_tiles_, 1));
                    scratch_.resize(std::max(scratch_.size(), plan.choose_basis ? kvarn::choose_scratch_bytes(f) : kvarn::scratch_bytes(f)));
                }
            if (plan.choose_basis) l.moments.resize(shape.kv_heads * shape.head_dim);
            if (plan.storage == storage::round_trip)
                for (auto* decoded : {&l.decoded_k, &l.decoded_v}) decoded->resize(most_tiles_ * plan.group * vector);
        }
    }

    [[nodiscard]] const cache_plan& plan() const noexcept { return *plan_; }
    [[nodiscard]] std::size_t tokens() const noexcept { return tokens_; }
    [[nodiscard]] std::size_t sealed_tokens() const noexcept { return tiles_ * plan_->group; }

    /// Tokens that one block may bring, so that it ends where a tile is full, or where the sink is.
    [[nodiscard]] std::size_t room() const noexcept
    {
        return tokens_ < sink_ ? std::min(plan_->group, sink_ - tokens_) : plan_->group - tail_tokens();
    }

    /// Adds the K and V of a block to one layer; every layer gets the same number of tokens before seal().
    void append(std::size_t number, const kvarn::half* k, const kvarn::half* v, std::size_t count)
    {
        const std::size_t vector = shape_.kv_heads * shape_.head_dim;
        layer& l = layers_[number];
        const bool in_sink = tokens_ < sink_;
        if (count > (in_sink ? sink_ - tokens_ : l.tail_k.size() / vector - tail_tokens()))
            throw std::logic_error("a block crosses the end of the sink, of a tile, or of the cache");
        const std::size_t at = (in_sink ? tokens_ : tail_tokens()) * vector;
        std::copy_n(k, count * vector, (in_sink ? l.sink_k : l.tail_k).data() + at);
        std::copy_n(v, count * vector, (in_sink ? l.sink_v : l.tail_v).data() + at);
        appended_ = count;
    }

    /// Causal attention of the `count` tokens appended last. q and out: [token][query head][channel].
    void attend(std::size_t number, const float* q, float* out, std::size_t count, const kvarn::attention_options& options = {})
    {
        layer& l = layers_[number];
        const std::size_t d = shape_.head_dim, kv = shape_.kv_heads, heads = kv * shape_.group_heads;
        const std::size_t all = tokens_ + appended_, in_sink = std::min(all, sink_), in_tail = all - in_sink - sealed_tokens();
        const std::size_t together = std::min(shape_.group_heads, std::max<std::size_t>(1, kvarn::max_query_rows / count));
        for (std::size_t head = 0; head < kv; ++head) {
            const kvarn::format& f = l.formats.empty() ? plan_->format : l.formats[head];
            if (plan_->choose_basis && tiles_ == 0)
                kvarn_cli::check(kvarn::add_query_moments(f,
                                                          kvarn::kv_view<const float>{q + head * shape_.group_heads * d, count,
                                                                                      shape_.group_heads, d, stride(heads * d), stride(d)},
                                                          moments_of(l, head)),
                                 plan_->name + ": moments of the queries");
            if (const std::size_t needed = kvarn::attention_scratch_bytes(f, count * together); attention_scratch_.size() < needed)
                attention_scratch_.resize(needed);
            kvarn::kv_segment history[3];
            std::size_t segments = 0;
            history[segments++] = exact(l.sink_k.data(), l.sink_v.data(), in_sink, head);
            if (tiles_ != 0)
                history[segments++] = plan_->storage == storage::records
                                          ? kvarn::sealed_tiles(f, grid(l, head), 0, 0, tiles_)
                                          : exact(l.decoded_k.data(), l.decoded_v.data(), sealed_tokens(), head);
            if (in_tail != 0) history[segments++] = exact(l.tail_k.data(), l.tail_v.data(), in_tail, head);
            for (std::size_t first = 0; first < shape_.group_heads; first += together) {
                const std::size_t some = std::min(together, shape_.group_heads - first),
                                  at = (head * shape_.group_heads + first) * d;
                kvarn::attention_task task;
                task.history = std::span(history, segments);
                task.q = kvarn::kv_view<const float>{q + at, count, some, d, stride(heads * d), stride(d)};
                task.out = kvarn::kv_view<float>{out + at, count, some, d, stride(heads * d), stride(d)};
                kvarn_cli::check(kvarn::attend(f, task, options, attention_scratch_), plan_->name + ": attention");
            }
        }
    }

    /// Ends a block: its tokens count from now on, and a full tail is replaced by its quantized values.
    void seal()
    {
        tokens_ += appended_;
        appended_ = 0;
        if (tokens_ <= sink_ || tail_tokens() < plan_->group) return;
        for (layer& l : layers_) {
            if (plan_->storage == storage::records)
                seal_records(l);
            else
                seal_round_trip(l);
        }
        ++tiles_;
    }

    /// What the cache holds of tokens [first, first + k.tokens) of a layer, as floats in the original basis; k and v have the size.
    void read(std::size_t number, std::size_t first, kvarn_cli::matrix& k, kvarn_cli::matrix& v)
    {
        layer& l = layers_[number];
        const std::size_t sealed_end = sink_ + sealed_tokens(), vector = shape_.kv_heads * shape_.head_dim;
        std::size_t opened = most_tiles_;
        for (std::size_t i = 0; i < k.tokens; ++i) {
            const std::size_t token = first + i;
            for (std::size_t head = 0; head < shape_.kv_heads; ++head) {
                const std::size_t at = head * shape_.head_dim;
                if (token < sink_) {
                    widen(l.sink_k.data() + token * vector + at, k.token(head, i));
                    widen(l.sink_v.data() + token * vector + at, v.token(head, i));
                } else if (token >= sealed_end) {
                    widen(l.tail_k.data() + (token - sealed_end) * vector + at, k.token(head, i));
                    widen(l.tail_v.data() + (token - sealed_end) * vector + at, v.token(head, i));
                } else {
                    const std::size_t sealed = token - sink_, tile = sealed / plan_->group;
                    const float *from_k = l.decoded_k.data() + sealed * vector, *from_v = l.decoded_v.data() + sealed * vector;
                    if (plan_->storage == storage::records) {
                        if (tile != opened) open(l, tile);
                        opened = tile;
                        from_k = opened_k_.data() + sealed % plan_->group * vector;
                        from_v = opened_v_.data() + sealed % plan_->group * vector;
                    }
                    std::copy_n(from_k + at, shape_.head_dim, k.token(head, i));
                    std::copy_n(from_v + at, shape_.head_dim, v.token(head, i));
                }
            }
        }
    }

private:
    struct layer {
        std::vector<kvarn::half> sink_k, sink_v, tail_k, tail_v;  ///< [token][KV head][channel]
        std::vector<kvarn::format> formats;                       ///< records: of each KV head
        std::vector<std::vector<std::byte>> records;              ///< [KV head][tile], the order that attention reads
        std::vector<float> decoded_k, decoded_v;                  ///< round trips: [token][KV head][channel]
        std::vector<std::uint64_t> moments;                       ///< of the queries: [KV head][channel], while no basis is chosen
    };

    static std::ptrdiff_t stride(std::size_t n) noexcept { return static_cast<std::ptrdiff_t>(n); }

    [[nodiscard]] std::size_t tail_tokens() const noexcept { return tokens_ < sink_ ? 0 : tokens_ - sink_ - sealed_tokens(); }

    template <class T>
    [[nodiscard]] kvarn::kv_segment exact(const T* k, const T* v, std::size_t count, std::size_t head) const
    {
        const std::size_t kv = shape_.kv_heads, d = shape_.head_dim;
        return kvarn::exact_tokens(kvarn::token_major(k, count, kv, d), kvarn::token_major(v, count, kv, d), head);
    }
    /// All tiles of one head.
    [[nodiscard]] kvarn::record_grid<std::byte> grid(layer& l, std::size_t head) const
    {
        return kvarn::head_major_records(l.formats[head], l.records[head].data(), l.records[head].size(), most_tiles_, 1);
    }
    /// One tile of one head.
    [[nodiscard]] kvarn::record_grid<std::byte> one_tile(layer& l, std::size_t head, std::size_t tile) const
    {
        auto one = grid(l, head);
        one.data += tile * one.tile_stride;
        one.bytes -= tile * one.tile_stride;
        one.tiles = 1;
        return one;
    }
    /// One head of a tile of [token][KV head][channel].
    template <class T>
    [[nodiscard]] kvarn::kv_view<T> one_head(T* tile, std::size_t head) const
    {
        auto view = kvarn::token_major(tile, plan_->group, shape_.kv_heads, shape_.head_dim);
        view.data += head * shape_.head_dim;
        view.heads = 1;
        return view;
    }

    void widen(const kvarn::half* from, float* to) const
    {
        for (std::size_t c = 0; c < shape_.head_dim; ++c) to[c] = kvarn::to_float(from[c]);
    }

    [[nodiscard]] std::span<std::uint64_t> moments_of(layer& l, std::size_t head) const
    {
        return std::span(l.moments).subspan(head * shape_.head_dim, shape_.head_dim);
    }

    void seal_records(layer& l)
    {
        for (std::size_t head = 0; plan_->choose_basis && tiles_ == 0 && head < shape_.kv_heads; ++head) {
            kvarn::choose_options options;
            options.encode = plan_->how;
            const auto chosen = kvarn::choose_format(l.formats[head], one_head(l.tail_k.data(), head), {}, moments_of(l, head), scratch_, options);
            kvarn_cli::check(chosen.error, plan_->name + ": choosing a basis");
            l.formats[head] = *chosen;
        }
        for (std::size_t head = 0; head < shape_.kv_heads; ++head)
            kvarn_cli::check(kvarn::quantize_kv(l.formats[head], one_head(l.tail_k.data(), head), one_head(l.tail_v.data(), head),
                                                one_tile(l, head, tiles_), scratch_, plan_->how),
                             plan_->name + ": sealing a tile");
    }

    void seal_round_trip(layer& l)
    {
        const std::size_t vector = shape_.kv_heads * shape_.head_dim;
        kvarn_cli::matrix m{shape_.kv_heads, plan_->group, shape_.head_dim, std::vector<float>(plan_->group * vector)};
        for (const bool is_key : {true, false}) {
            const auto& tail = is_key ? l.tail_k : l.tail_v;
            auto& decoded = is_key ? l.decoded_k : l.decoded_v;
            for (std::size_t t = 0; t < plan_->group; ++t)
                for (std::size_t head = 0; head < shape_.kv_heads; ++head)
                    widen(tail.data() + t * vector + head * shape_.head_dim, m.token(head, t));
            kvarn_cli::round_trip(plan_->baseline, m, is_key);
            for (std::size_t t = 0; t < plan_->group; ++t)
                for (std::size_t head = 0; head < shape_.kv_heads; ++head)
                    std::copy_n(m.token(head, t), shape_.head_dim,
                                decoded.data() + (sealed_tokens() + t) * vector + head * shape_.head_dim);
        }
    }

    void open(layer& l, std::size_t tile)
    {
        const std::size_t vector = shape_.kv_heads * shape_.head_dim;
        for (auto* opened : {&opened_k_, &opened_v_}) opened->resize(plan_->group * vector);
        for (std::size_t head = 0; head < shape_.kv_heads; ++head)
            kvarn_cli::check(kvarn::dequantize_kv(l.formats[head], one_tile(l, head, tile), one_head(opened_k_.data(), head),
                                                  one_head(opened_v_.data(), head), kvarn::basis::original, scratch_),
                             plan_->name + ": opening a tile");
    }

    const cache_plan* plan_;
    cache_shape shape_;
    std::size_t sink_, most_tiles_;
    std::size_t tokens_ = 0, appended_ = 0, tiles_ = 0;
    std::vector<layer> layers_;
    std::vector<std::byte> scratch_, attention_scratch_;
    std::vector<float> opened_k_, opened_v_;
};

}  // namespace language_model
