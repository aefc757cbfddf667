// SPDX-License-Identifier: Apache-2.0
#pragma once
// Caches for tests: a pool in guarded memory of just the planned size that held NaN before, values that depend on the token alone, one-line
// calls, and snapshots of everything that can be seen of a pool. Knows where the pool keeps its blocks, to spoil what nobody may read.

#include <algorithm>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <span>
#include <stdexcept>
#include <utility>
#include <vector>

#include <kvarn/cache/pool.hpp>
#include <kvarn/cache/seal.hpp>
#include <kvarn/cache/tasks.hpp>
#include <kvarn/cache/tokens.hpp>

#include "expect.hpp"
#include "guarded_bytes.hpp"

namespace support {

/// About normal, standard deviation 1; what a seed gives does not depend on how many there are.
inline void fill_values(std::span<float> x, std::uint64_t seed)
{
    std::uint64_t z = seed * 0x94d049bb133111ebu + 1;
    for (float& each : x) {
        z = (z ^ (z >> 29)) * 0xbf58476d1ce4e5b9u + 0x9e3779b97f4a7c15u;
        const auto sum = static_cast<std::int32_t>((z >> 48) + (z >> 32 & 0xffffu) + (z >> 16 & 0xffffu)) - 98304;
        each = static_cast<float>(sum) * 0x1p-15f;
    }
}

/// A configuration whose rules live as long as it does.
struct cache_setup {
    kvarn::format base{};
    int layers = 2, heads = 2;
    std::vector<kvarn::bit_rule> rules{};
    kvarn::cache_config config{};

    [[nodiscard]] kvarn::cache_config complete() const
    {
        kvarn::cache_config c = config;
        const auto policy = kvarn::make_policy(base, layers, heads, rules);
        expect_ok(policy.error);
        c.policy = *policy;
        return c;
    }
};

/// k2v2 and k4v4 mixed, half, 32 tokens of sink, the paper's encoder with one round: cheap.
inline cache_setup small_cache()
{
    cache_setup x;
    x.base = *kvarn::parse_format("k2v2_g32", 32);
    x.rules = {{.first_layer = 1, .key_bits = 4, .value_bits = 4}};
    x.config.sink_tokens = 32;
    x.config.sequences = 4;
    x.config.most_tokens = 512;
    x.config.most_step = 64;
    x.config.encode.encoder = kvarn::encoder::paper;
    x.config.encode.iterations = 1;
    return x;
}

/// Everything that a reader can see of a sequence, as bits. `attention` needs finite values.
struct sequence_view {
    kvarn::sequence_statistics numbers{};
    std::vector<std::uint32_t> read, attention;

    bool operator==(const sequence_view& other) const
    {
        const auto& a = numbers;
        const auto& b = other.numbers;
        return a.tokens == b.tokens && a.drafts == b.drafts && a.sealed_tokens == b.sealed_tokens && a.dead_tokens == b.dead_tokens &&
               a.kept_tiles == b.kept_tiles && a.record_blocks == b.record_blocks && a.exact_blocks == b.exact_blocks && a.spans == b.spans &&
               a.next_position == b.next_position && read == other.read && attention == other.attention;
    }
};

inline bool same_numbers(const kvarn::pool_statistics& a, const kvarn::pool_statistics& b)
{
    const auto same = [](const kvarn::block_usage& x, const kvarn::block_usage& y) { return x.used == y.used && x.free == y.free && x.shared == y.shared; };
    return same(a.records, b.records) && same(a.exact, b.exact) && a.bytes_used == b.bytes_used && a.tiles_sealed == b.tiles_sealed &&
           a.tiles_kept_not_finite == b.tiles_kept_not_finite && a.tiles_kept_overflowed == b.tiles_kept_overflowed && a.sequences == b.sequences;
}

/// Everything that can be seen of a pool.
struct cache_view {
    kvarn::pool_statistics numbers{};
    std::vector<sequence_view> sequences;

    bool operator==(const cache_view& other) const { return same_numbers(numbers, other.numbers) && sequences == other.sequences; }
};

/// Bits of floats; all NaNs are one.
inline std::vector<std::uint32_t> bits_of(std::span<const float> x)
{
    std::vector<std::uint32_t> bits(x.size());
    for (std::size_t i = 0; i < x.size(); ++i) bits[i] = x[i] != x[i] ? 0x7fc00000u : std::bit_cast<std::uint32_t>(x[i]);
    return bits;
}

class guarded_cache {
public:
    explicit guarded_cache(cache_setup x, std::size_t misalignment = 1)
        : setup_(std::move(x)), config_(setup_.complete()), memory_(planned_bytes(), misalignment), pool_(made()),
          scratch_(kvarn::cache_scratch_bytes(config_, 64), 7)
    {}
    guarded_cache(const guarded_cache&) = delete;
    guarded_cache& operator=(const guarded_cache&) = delete;

    kvarn::cache_pool& pool() { return pool_; }
    [[nodiscard]] const kvarn::cache_config& config() const { return pool_.config(); }
    [[nodiscard]] std::size_t group() const { return static_cast<std::size_t>(config_.policy.base().group()); }
    [[nodiscard]] std::span<std::byte> scratch() { return scratch_.span(); }
    [[nodiscard]] bool intact() const { return memory_.intact() && scratch_.intact(); }
    [[nodiscard]] std::span<std::byte> memory() { return memory_.span(); }

    /// K (or V) of tokens [first, first + tokens) of a stream in one layer, [token][head][channel]: a function of the stream, the token's number,
    /// the layer, the head and the channel.
    [[nodiscard]] std::vector<float> values(bool key, std::uint64_t stream, std::size_t first, std::size_t tokens, std::size_t layer) const
    {
        const auto channels = static_cast<std::size_t>(key ? config_.policy.base().key_channels() : config_.policy.base().head_dim_v());
        const std::size_t heads = pool_.heads();
        std::vector<float> x(tokens * heads * channels);
        for (std::size_t t = 0; t < tokens; ++t)
            for (std::size_t h = 0; h < heads; ++h) {
                const std::uint64_t token = (stream * 0x9e3779b97f4a7c15u + first + t) * 0xbf58476d1ce4e5b9u;
                fill_values(std::span(x).subspan((t * heads + h) * channels, channels), token + layer * 64 + h * 2 + key);
            }
        return x;
    }

    /// Stores tokens [first, first + tokens) of a stream as the drafts from first_draft on: one layer, heads [first_head, first_head + heads).
    kvarn::status store(kvarn::sequence_id id, std::uint64_t stream, std::size_t first, std::size_t tokens, std::size_t first_draft, std::size_t layer,
                        std::size_t first_head, std::size_t heads)
    {
        const auto part = [&](bool key, std::vector<float>& x) {
            x = values(key, stream, first, tokens, layer);
            const auto channels = static_cast<std::size_t>(key ? config_.policy.base().key_channels() : config_.policy.base().head_dim_v());
            kvarn::input_view view = kvarn::token_major<const float>(x.data(), tokens, pool_.heads(), channels);
            view = view.head(first_head);
            view.heads = heads;
            return view;
        };
        std::vector<float> k, v;
        const kvarn::input_view keys = part(true, k), vals = config_.policy.base().has_values() ? part(false, v) : kvarn::input_view{};
        return kvarn::store(pool_, id, layer, keys, vals, first_draft, first_head);
    }
    kvarn::status store(kvarn::sequence_id id, std::uint64_t stream, std::size_t first, std::size_t tokens, std::size_t first_draft = 0)
    {
        for (std::size_t layer = 0; layer < pool_.layers(); ++layer)
            if (const auto s = store(id, stream, first, tokens, first_draft, layer, 0, pool_.heads()); s != kvarn::status::ok) return s;
        return kvarn::status::ok;
    }
    /// Commits tokens [first, first + tokens) of a stream, `step` at a time.
    void feed(kvarn::sequence_id id, std::uint64_t stream, std::size_t first, std::size_t tokens, std::size_t step = SIZE_MAX, bool sealing = false)
    {
        for (std::size_t done = 0; done < tokens;) {
            const std::size_t n = std::min(step, tokens - done);
            expect_ok(pool_.reserve(id, n));
            expect_ok(store(id, stream, first + done, n));
            expect_ok(pool_.commit(id, n));
            if (sealing) seal(id);
            done += n;
        }
    }
    kvarn::seal_report seal(kvarn::sequence_id id)
    {
        const auto report = kvarn::seal(pool_, id, scratch());
        expect_ok(report.error);
        return *report;
    }
    [[nodiscard]] kvarn::sequence_id open(std::int64_t first_position = 0)
    {
        const auto id = pool_.open(first_position);
        expect_ok(id.error);
        return *id;
    }
    [[nodiscard]] kvarn::sequence_id fork(kvarn::sequence_id id)
    {
        const auto made = pool_.fork(id);
        expect_ok(made.error);
        return *made;
    }
    [[nodiscard]] kvarn::sequence_statistics numbers(kvarn::sequence_id id)
    {
        const auto n = pool_.statistics(id);
        expect_ok(n.error);
        return *n;
    }

    /// K, then V, of one layer and head at positions [begin, end).
    [[nodiscard]] std::vector<float> read(kvarn::sequence_id id, std::size_t layer, std::size_t head, std::int64_t begin = 0, std::int64_t end = INT64_MAX)
    {
        const kvarn::format& f = pool_.format_of(layer, head);
        const std::size_t n = kvarn::count_tokens(pool_, id, begin, end);
        const auto dk = static_cast<std::size_t>(f.key_channels()), dv = static_cast<std::size_t>(f.head_dim_v());
        std::vector<float> x(n * (dk + dv), -77.0f);
        if (n == 0) return x;
        const kvarn::kv_view<float> k = kvarn::token_major(x.data(), n, 1, dk);
        const kvarn::kv_view<float> v = dv != 0 ? kvarn::token_major(x.data() + n * dk, n, 1, dv) : kvarn::kv_view<float>{};
        expect_ok(kvarn::read(pool_, id, layer, head, begin, end, k, v, scratch()));
        return x;
    }

    /// Bits of the outputs and log-sum-exps of m new tokens with 2 query heads a KV head, one layer.
    [[nodiscard]] std::vector<float> attend(kvarn::sequence_id id, std::size_t layer, std::size_t m, kvarn::layer_options options = {}, std::uint64_t seed = 9)
    {
        const kvarn::format f = config_.policy.base();
        const auto out_channels = static_cast<std::size_t>(f.has_values() ? f.head_dim_v() : f.head_dim_k());
        const std::size_t heads = 2 * pool_.heads();
        std::vector<float> q(m * heads * static_cast<std::size_t>(f.key_channels())), out(m * heads * (out_channels + 1), -77.0f);
        fill_values(q, seed);
        kvarn::sequence_step step;
        step.sequence = id;
        step.q = kvarn::token_major<const float>(q.data(), m, heads, static_cast<std::size_t>(f.key_channels()));
        step.out = kvarn::token_major(out.data(), m, heads, out_channels);
        step.log_sum_exp = out.data() + m * heads * out_channels;
        guarded_bytes memory(kvarn::layer_memory_bytes(pool_, {&step, 1}, options), 3);
        const auto items = kvarn::plan_layer(pool_, layer, {&step, 1}, options, memory.span());
        expect_ok(items.error);
        expect_ok(items->run(scratch()));
        if (!memory.intact()) throw std::runtime_error("written outside of the layer's memory");
        return out;
    }

    [[nodiscard]] sequence_view look(kvarn::sequence_id id, bool with_attention = true)
    {
        sequence_view x;
        x.numbers = numbers(id);
        for (std::size_t layer = 0; layer < pool_.layers(); ++layer) {
            for (std::size_t head = 0; head < pool_.heads(); ++head) {
                // What is not stored cannot be read.
                const auto bits = bits_of(read(id, layer, head, 0, x.numbers.next_position - static_cast<std::int64_t>(x.numbers.drafts)));
                x.read.insert(x.read.end(), bits.begin(), bits.end());
            }
            if (!with_attention || x.numbers.drafts != 0 || x.numbers.tokens == 0) continue;
            const auto bits = bits_of(attend(id, layer, std::min<std::size_t>(x.numbers.tokens, 2)));
            x.attention.insert(x.attention.end(), bits.begin(), bits.end());
        }
        return x;
    }
    [[nodiscard]] cache_view look(std::initializer_list<kvarn::sequence_id> ids, bool with_attention = true)
    {
        cache_view x;
        x.numbers = pool_.statistics();
        for (const auto id : ids) x.sequences.push_back(look(id, with_attention));
        return x;
    }

    /// The record of one layer and head behind a sealed span.
    [[nodiscard]] std::vector<std::uint8_t> record(kvarn::sequence_id id, std::size_t span, std::size_t layer, std::size_t head)
    {
        const auto& s = pool_.state();
        if (!s.spans_of(id.slot)[span].sealed) return {};
        const auto& place = s.place(layer, head);
        const std::byte* const at = place.records + static_cast<std::size_t>(s.table_of(id.slot)[span]) * place.record_bytes;
        std::vector<std::uint8_t> copy(place.record_bytes);
        std::memcpy(copy.data(), at, copy.size());
        return copy;
    }
    /// All records of a sequence.
    [[nodiscard]] std::vector<std::uint8_t> records(kvarn::sequence_id id)
    {
        std::vector<std::uint8_t> all;
        for (std::size_t layer = 0; layer < pool_.layers(); ++layer)
            for (std::size_t head = 0; head < pool_.heads(); ++head)
                for (std::size_t i = 0; i < numbers(id).spans; ++i) {
                    const auto one = record(id, i, layer, head);
                    all.insert(all.end(), one.begin(), one.end());
                }
        return all;
    }

    /// Fills with ones (NaN in every type) what nobody may read: free blocks, and places of exact blocks that no span shows and no job reads.
    void poison()
    {
        auto& s = pool_.state();
        const std::size_t places = s.layers * s.heads;
        for (std::uint32_t b = 0; b < s.blocks.records.total; ++b)
            if (s.blocks.records.holders[b] == 0)
                for (std::size_t i = 0; i < places; ++i) std::memset(s.places[i].records + b * s.places[i].record_bytes, 0xff, s.places[i].record_bytes);
        std::vector<bool> shown(s.blocks.exact.total * s.group);
        for (std::uint32_t slot = 0; slot < s.config.sequences; ++slot)
            for (std::size_t i = 0; s.sequences[slot].open && i < s.sequences[slot].spans; ++i) {
                const auto& span = s.spans_of(slot)[i];
                if (span.sealed) continue;
                for (std::size_t t = span.first; t < static_cast<std::size_t>(span.first + span.count); ++t)
                    shown[static_cast<std::size_t>(s.table_of(slot)[i]) * s.group + t] = true;
            }
        for (std::size_t j = 0; j < s.job_count; ++j)
            for (std::size_t t = 0; t < s.group; ++t) shown[static_cast<std::size_t>(s.jobs[j].exact) * s.group + t] = true;
        for (std::size_t t = 0; t < shown.size(); ++t)
            if (!shown[t])
                for (std::size_t i = 0; i < places; ++i) {
                    std::memset(s.places[i].keys + t * s.key_row, 0xff, s.key_row);
                    if (s.value_row != 0) std::memset(s.places[i].values + t * s.value_row, 0xff, s.value_row);
                }
    }

private:
    [[nodiscard]] std::size_t planned_bytes() const
    {
        const auto plan = kvarn::plan_cache(config_);
        expect_ok(plan.error);
        return plan->bytes();
    }
    [[nodiscard]] kvarn::cache_pool made()
    {
        const auto pool = kvarn::make_pool(config_, memory_.span());
        expect_ok(pool.error);
        return *pool;
    }

    cache_setup setup_;
    kvarn::cache_config config_;
    guarded_bytes memory_;
    kvarn::cache_pool pool_;
    guarded_bytes scratch_;
};

}  // namespace support
