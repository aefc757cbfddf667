// SPDX-License-Identifier: Apache-2.0
#pragma once
// A toy engine on ggml whose cache is the adapter's, and beside it the same cache on the core alone, and exact attention. Values of K, V
// and Q are a function of a token's text and position, so that the same tokens give the same values wherever they are computed.

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include <kvarn/dispatch/cache.hpp>

#include "ggml-cpu.h"
#include "kvarn_ggml.h"

namespace adapter {

struct shape {
    int layers = 2, kv_heads = 2, query_heads = 6, head_dim_k = 64, head_dim_v = 32;
    ggml_type kv_type = GGML_TYPE_F32;

    std::size_t output_channels() const { return static_cast<std::size_t>(query_heads * head_dim_v); }
};

enum part_of { of_k, of_v, of_q };

/// About normal, the same on every machine, and a half, so that K and V of any type hold it.
inline float value(std::uint64_t text, std::int64_t position, std::size_t layer, std::size_t head, part_of part,
                   std::size_t channel)
{
    std::uint64_t x = text * 0x9e3779b97f4a7c15u ^ static_cast<std::uint64_t>(position + 1) * 0xbf58476d1ce4e5b9u ^
                      (layer * 1031 + head * 67 + part * 7 + 1) * 0x94d049bb133111ebu ^ (channel + 1) * 0xd6e8feb86659fd93u;
    int sum = 0;
    for (int i = 0; i < 4; ++i) {
        x ^= x >> 30;
        x *= 0xbf58476d1ce4e5b9u;
        x ^= x >> 27;
        sum += static_cast<int>(x >> 56) - 128;
    }
    return static_cast<float>(sum / 4) / 64.0f;
}

/// What a step gives to one sequence.
struct part {
    int sequence = 0;
    std::int64_t position = 0;
    std::vector<std::uint64_t> text;
    std::int64_t first_row = -1, row_stride = 1;  // -1: behind the part before
    std::vector<std::uint64_t> mask{};
    std::int64_t mask_stride = 0, mask_tokens = 0;
};

/// Of each part [layer][token][query head][channel].
using outputs = std::vector<std::vector<float>>;

/// `count` tokens of a text.
inline std::vector<std::uint64_t> text(std::uint64_t seed, std::size_t count)
{
    std::vector<std::uint64_t> t(count);
    for (std::size_t i = 0; i < count; ++i) t[i] = seed * 1000003 + i;
    return t;
}

inline std::vector<std::uint64_t> slice(const std::vector<std::uint64_t>& t, std::size_t first, std::size_t count)
{
    return {t.begin() + static_cast<std::ptrdiff_t>(first), t.begin() + static_cast<std::ptrdiff_t>(first + count)};
}

inline bool same_bits(const outputs& a, const outputs& b)
{
    if (a.size() != b.size()) return false;
    for (std::size_t i = 0; i < a.size(); ++i)
        if (a[i].size() != b[i].size() || std::memcmp(a[i].data(), b[i].data(), a[i].size() * sizeof(float)) != 0) return false;
    return true;
}

inline double relative_error(const std::vector<float>& a, const std::vector<float>& b)
{
    double error = 0, square = 0;
    for (std::size_t i = 0; i < a.size(); ++i) {
        error +=
            (static_cast<double>(a[i]) - static_cast<double>(b[i])) * (static_cast<double>(a[i]) - static_cast<double>(b[i]));
        square += static_cast<double>(b[i]) * static_cast<double>(b[i]);
    }
    return std::sqrt(error / square);
}

inline bool all_nan(const std::vector<float>& x)
{
    for (const float y : x)
        if (!std::isnan(y)) return false;
    return true;
}
inline bool any_nan(const std::vector<float>& x)
{
    for (const float y : x)
        if (std::isnan(y)) return true;
    return false;
}

inline kvarn_ggml_params params_of(const shape& s, const char* format = "k4v2_g32")
{
    kvarn_ggml_params p = kvarn_ggml_default_params();
    p.format = format;
    p.layers = s.layers;
    p.kv_heads = s.kv_heads;
    p.query_heads = s.query_heads;
    p.head_dim_k = s.head_dim_k;
    p.head_dim_v = s.head_dim_v;
    p.sequences = 4;
    p.most_tokens = 400;
    p.most_step = 100;
    p.sink_tokens = 32;
    p.threads = 4;
    return p;
}

/// What the model says of attention, and what a test does to values.
struct model {
    kvarn_ggml_attention_params attention{};
    std::vector<float> slopes{};
    std::vector<float> sinks{};
    std::function<float(float, std::uint64_t text, std::size_t layer, std::size_t head, part_of, std::size_t channel)> change{};
    int shared_layer = -1;  ///< of the cache: after it comes another layer that reads its K and V

    float at(std::uint64_t t, std::int64_t position, std::size_t layer, std::size_t head, part_of p, std::size_t channel) const
    {
        const float x = value(t, position, layer, head, p, channel);
        return change ? change(x, t, layer, head, p, channel) : x;
    }
};

class engine {
public:
    explicit engine(const shape& s, const kvarn_ggml_params& p, model m = {}, int threads = 2)
        : threads(threads), shape_(s), model_(std::move(m))
    {
        char why[256] = "";
        cache_.reset(kvarn_ggml_create(&p, why, sizeof why));
        refusal = why;
    }
    explicit engine(const shape& s, model m = {}, int threads = 2) : engine(s, params_of(s), std::move(m), threads) {}

    kvarn_ggml_cache* cache() const { return cache_.get(); }
    const char* message() const { return kvarn_ggml_message(cache()); }

    kvarn_ggml_status begin(const std::vector<part>& parts, bool causal = true)
    {
        std::vector<kvarn_ggml_part> raw;
        std::int64_t row = 0;
        for (const part& p : parts) {
            kvarn_ggml_part r{};
            r.sequence = p.sequence;
            r.position = p.position;
            r.tokens = static_cast<std::int64_t>(p.text.size());
            r.first_row = p.first_row >= 0 ? p.first_row : row;
            r.row_stride = p.row_stride;
            row += r.tokens;
            if (!p.mask.empty()) {
                r.mask = p.mask.data();
                r.mask_stride = p.mask_stride;
                r.mask_tokens = p.mask_tokens;
            }
            raw.push_back(r);
        }
        return kvarn_ggml_begin(cache(), raw.data(), static_cast<int>(raw.size()), causal);
    }

    /// The graph of so many rows, kept from the first time.
    struct built {
        ggml_context* ctx = nullptr;
        ggml_cgraph* graph = nullptr;
        std::vector<ggml_tensor*> q, k, v, out;
        std::vector<std::size_t> layer;  // of the cache
        ggml_tensor* sinks = nullptr;
    };
    built& graph_of(std::int64_t rows)
    {
        built& b = graphs_[rows];
        if (b.ctx != nullptr) return b;
        b.ctx = ggml_init({std::size_t{64} << 20, nullptr, false});
        b.graph = ggml_new_graph(b.ctx);
        if (!model_.sinks.empty()) {
            b.sinks = ggml_new_tensor_1d(b.ctx, GGML_TYPE_F32, shape_.query_heads);
            std::memcpy(b.sinks->data, model_.sinks.data(), model_.sinks.size() * sizeof(float));
        }
        model_.attention.alibi_slopes = model_.slopes.empty() ? nullptr : model_.slopes.data();
        const std::int64_t dk = shape_.head_dim_k, dv = shape_.head_dim_v, heads = shape_.kv_heads;
        for (int layer = 0; layer < shape_.layers; ++layer) {
            b.q.push_back(ggml_new_tensor_3d(b.ctx, GGML_TYPE_F32, dk, shape_.query_heads, rows));
            // K and V of a token side by side, as a fused projection leaves them.
            ggml_tensor* const both = ggml_new_tensor_3d(b.ctx, shape_.kv_type, (dk + dv) * heads, 1, rows);
            const std::size_t element = both->nb[0];
            b.k.push_back(ggml_view_3d(b.ctx, both, dk, heads, rows, static_cast<std::size_t>(dk) * element, both->nb[2], 0));
            b.v.push_back(ggml_view_3d(b.ctx, both, dv, heads, rows, static_cast<std::size_t>(dv) * element, both->nb[2],
                                       static_cast<std::size_t>(dk * heads) * element));
            for (const bool shared : {false, true}) {
                if (shared && layer != model_.shared_layer) continue;
                b.out.push_back(kvarn_ggml_attention(cache(), b.ctx, layer, b.q.back(), shared ? nullptr : b.k.back(),
                                                     shared ? nullptr : b.v.back(), b.sinks, &model_.attention));
                b.layer.push_back(static_cast<std::size_t>(layer));
                if (b.out.back() != nullptr) ggml_build_forward_expand(b.graph, b.out.back());
            }
        }
        return b;
    }

    /// The graph of a step that began, with `rows` rows.
    outputs compute(const std::vector<part>& parts, std::int64_t rows)
    {
        built& b = graph_of(rows);
        std::int64_t row = 0;
        std::vector<std::vector<std::int64_t>> where;
        for (const part& p : parts) {
            std::vector<std::int64_t>& mine = where.emplace_back();
            for (std::size_t i = 0; i < p.text.size(); ++i)
                mine.push_back((p.first_row >= 0 ? p.first_row : row) + static_cast<std::int64_t>(i) * p.row_stride);
            row += static_cast<std::int64_t>(p.text.size());
            for (std::size_t i = 0; i < p.text.size(); ++i)
                for (std::size_t layer = 0; layer < b.q.size(); ++layer) {
                    const std::int64_t at = p.position + static_cast<std::int64_t>(i);
                    fill(b.q[layer], layer, p.text[i], at, mine[i], of_q);
                    fill(b.k[layer], layer, p.text[i], at, mine[i], of_k);
                    fill(b.v[layer], layer, p.text[i], at, mine[i], of_v);
                }
        }
        ggml_graph_compute_with_ctx(b.ctx, b.graph, threads);
        outputs out(parts.size());
        for (std::size_t i = 0; i < parts.size(); ++i)
            for (const ggml_tensor* const x : b.out)
                for (const std::int64_t r : where[i]) {
                    const auto* const from = reinterpret_cast<const float*>(static_cast<const char*>(x->data) +
                                                                            static_cast<std::size_t>(r) * x->nb[1]);
                    out[i].insert(out[i].end(), from, from + shape_.output_channels());
                }
        return out;
    }

    /// A whole step. What it says besides outputs is in `said`.
    outputs run(const std::vector<part>& parts, bool causal = true)
    {
        said = begin(parts, causal);
        if (said != KVARN_GGML_OK) return {};
        std::int64_t rows = 0;
        for (const part& p : parts) rows += static_cast<std::int64_t>(p.text.size());
        outputs out = compute(parts, rows);
        said = kvarn_ggml_end(cache());
        return out;
    }
    outputs run(int sequence, std::int64_t position, const std::vector<std::uint64_t>& t)
    {
        return run({{sequence, position, t}});
    }

    std::size_t graphs() const { return graphs_.size(); }

    ~engine()
    {
        for (auto& [rows, b] : graphs_) ggml_free(b.ctx);
    }
    engine(const engine&) = delete;
    engine& operator=(const engine&) = delete;

    int threads;
    kvarn_ggml_status said = KVARN_GGML_OK;
    std::string refusal;

private:
    void fill(ggml_tensor* x, std::size_t layer, std::uint64_t t, std::int64_t position, std::int64_t row, part_of p) const
    {
        for (std::size_t h = 0; h < static_cast<std::size_t>(x->ne[1]); ++h)
            for (std::size_t c = 0; c < static_cast<std::size_t>(x->ne[0]); ++c) {
                char* const at =
                    static_cast<char*>(x->data) + static_cast<std::size_t>(row) * x->nb[2] + h * x->nb[1] + c * x->nb[0];
                const float y = model_.at(t, position, layer, h, p, c);
                if (x->type == GGML_TYPE_F32) {
                    std::memcpy(at, &y, 4);
                } else {
                    const std::uint16_t bits = x->type == GGML_TYPE_F16 ? kvarn::to_half(y).bits : kvarn::to_bfloat16(y).bits;
                    std::memcpy(at, &bits, 2);
                }
            }
    }

    struct release {
        void operator()(kvarn_ggml_cache* c) const { kvarn_ggml_free(c); }
    };
    shape shape_;
    model model_;
    std::unique_ptr<kvarn_ggml_cache, release> cache_;
    std::map<std::int64_t, built> graphs_;
};

/// The same cache on the core alone, in one thread, its tiles sealed before the step that follows.
class core {
public:
    core(const shape& s, const kvarn_ggml_params& p, model m = {}, const char* format = nullptr,
         std::span<const kvarn::bit_rule> rules = {})
        : shape_(s), model_(std::move(m))
    {
        config.policy = *kvarn::make_policy(
            *kvarn::parse_format(format != nullptr ? format : p.format, s.head_dim_k, s.head_dim_v), s.layers, s.kv_heads, rules);
        config.exact = p.exact == KVARN_GGML_F32    ? kvarn::exact_type::f32
                       : p.exact == KVARN_GGML_BF16 ? kvarn::exact_type::bf16
                                                    : kvarn::exact_type::f16;
        config.sink_tokens = static_cast<std::size_t>(p.sink_tokens);
        config.recent_tokens = static_cast<std::size_t>(p.recent_tokens);
        config.sequences = 8;
        config.most_tokens = 1000;
        config.most_step = 200;
        precision = p.fast ? kvarn::precision::fast : kvarn::precision::fine;
        memory.resize(kvarn::plan_cache(config)->bytes());
        scratch.resize(1 << 20);
        pool = *kvarn::make_pool(config, memory);
    }

    kvarn::sequence_id id(int sequence, std::int64_t position = 0)
    {
        const auto found = ids.find(sequence);
        return found != ids.end() ? found->second : ids[sequence] = *pool.open(position);
    }

    outputs run(const std::vector<part>& parts, bool causal = true)
    {
        std::vector<kvarn::sequence_step> steps(parts.size());
        outputs out(parts.size());
        const auto query_heads = static_cast<std::size_t>(shape_.query_heads),
                   kv_heads = static_cast<std::size_t>(shape_.kv_heads), dk = static_cast<std::size_t>(shape_.head_dim_k),
                   dv = static_cast<std::size_t>(shape_.head_dim_v);
        for (const part& p : parts) {
            static_cast<void>(kvarn::dispatched::seal(pool, id(p.sequence, p.position), scratch));
            all_ok = all_ok && pool.reserve(id(p.sequence), p.text.size()) == kvarn::status::ok;
        }
        for (std::size_t layer = 0; layer < pool.layers(); ++layer) {
            std::vector<std::vector<float>> q(parts.size()), k(parts.size()), v(parts.size()), o(parts.size());
            for (std::size_t i = 0; i < parts.size(); ++i) {
                const part& p = parts[i];
                const std::size_t m = p.text.size();
                for (std::size_t t = 0; t < m; ++t) {
                    const std::int64_t at = p.position + static_cast<std::int64_t>(t);
                    for (std::size_t h = 0; h < query_heads; ++h)
                        for (std::size_t c = 0; c < dk; ++c) q[i].push_back(model_.at(p.text[t], at, layer, h, of_q, c));
                    for (std::size_t h = 0; h < kv_heads; ++h)
                        for (std::size_t c = 0; c < dk; ++c) k[i].push_back(model_.at(p.text[t], at, layer, h, of_k, c));
                    for (std::size_t h = 0; h < kv_heads; ++h)
                        for (std::size_t c = 0; c < dv; ++c) v[i].push_back(model_.at(p.text[t], at, layer, h, of_v, c));
                }
                o[i].resize(m * query_heads * dv);
                kvarn::sequence_step& s = steps[i];
                s = {};
                s.sequence = id(p.sequence);
                s.q = kvarn::token_major<const float>(q[i].data(), m, query_heads, dk);
                s.k = kvarn::token_major<const float>(k[i].data(), m, kv_heads, dk);
                s.v = kvarn::token_major<const float>(v[i].data(), m, kv_heads, dv);
                s.out = kvarn::token_major(o[i].data(), m, query_heads, dv);
                s.sink_logits = model_.sinks.empty() ? nullptr : model_.sinks.data();
                s.alibi_slopes = model_.slopes.empty() ? nullptr : model_.slopes.data();
                if (!p.mask.empty()) {
                    s.mask = p.mask.data();
                    s.mask_stride = static_cast<std::size_t>(p.mask_stride);
                    s.mask_tokens = static_cast<std::size_t>(p.mask_tokens);
                }
            }
            kvarn::layer_options options;
            options.attention.softmax_scale = model_.attention.scale;
            options.attention.logit_soft_cap = model_.attention.soft_cap;
            options.attention.window = model_.attention.window;
            options.attention.causal = causal;
            options.attention.precision = precision;
            std::vector<std::byte> plan(kvarn::layer_memory_bytes(pool, steps, options));
            const auto items = kvarn::plan_layer(pool, layer, steps, options, plan);
            all_ok = all_ok && items.ok() && kvarn::dispatched::run(*items, scratch) == kvarn::status::ok;
            for (std::size_t i = 0; i < parts.size(); ++i)
                for (int times = static_cast<int>(layer) == model_.shared_layer ? 2 : 1; times != 0; --times)
                    out[i].insert(out[i].end(), o[i].begin(), o[i].end());
        }
        for (const part& p : parts) all_ok = all_ok && pool.commit(id(p.sequence), p.text.size()) == kvarn::status::ok;
        return out;
    }
    outputs run(int sequence, std::int64_t position, const std::vector<std::uint64_t>& t)
    {
        return run({{sequence, position, t}});
    }

    kvarn::cache_config config{};
    kvarn::cache_pool pool{};
    kvarn::precision precision{};
    std::map<int, kvarn::sequence_id> ids;
    std::vector<std::byte> memory, scratch;
    bool all_ok = true;  ///< every call was

private:
    shape shape_;
    model model_;
};

/// A token of a history.
struct token {
    std::uint64_t text;
    std::int64_t position;
};

/// Attention in double on exact values, of the last `queries` tokens of a history; sees(query, key) says what they see.
inline std::vector<float> exact(const shape& s, const model& m, const std::vector<token>& history, std::size_t queries,
                                const std::function<bool(std::size_t, std::size_t)>& sees)
{
    const auto heads = static_cast<std::size_t>(s.query_heads), group = static_cast<std::size_t>(s.query_heads / s.kv_heads),
               dk = static_cast<std::size_t>(s.head_dim_k), dv = static_cast<std::size_t>(s.head_dim_v), n = history.size();
    const double scale =
        m.attention.scale != 0.0f ? static_cast<double>(m.attention.scale) : 1.0 / std::sqrt(static_cast<double>(dk));
    const auto cap = static_cast<double>(m.attention.soft_cap);
    std::vector<float> out;
    for (std::size_t layer = 0; layer < static_cast<std::size_t>(s.layers); ++layer)
        for (std::size_t i = n - queries; i < n; ++i)
            for (std::size_t h = 0; h < heads; ++h) {
                std::vector<double> score(n, -1e30), sum(dv);
                double top = m.sinks.empty() ? -1e30 : static_cast<double>(m.sinks[h]);
                for (std::size_t j = 0; j < n; ++j) {
                    const std::int64_t back = history[i].position - history[j].position;
                    if (!sees(i, j) || (m.attention.window != 0 && back >= m.attention.window)) continue;
                    double x = 0;
                    for (std::size_t c = 0; c < dk; ++c)
                        x += static_cast<double>(m.at(history[i].text, history[i].position, layer, h, of_q, c)) *
                             static_cast<double>(m.at(history[j].text, history[j].position, layer, h / group, of_k, c));
                    x *= scale;
                    if (cap != 0) x = cap * std::tanh(x / cap);
                    if (!m.slopes.empty()) x -= static_cast<double>(m.slopes[h]) * static_cast<double>(back);
                    score[j] = x;
                    top = std::max(top, x);
                }
                double total = m.sinks.empty() ? 0 : std::exp(static_cast<double>(m.sinks[h]) - top);
                for (std::size_t j = 0; j < n; ++j) {
                    const double weight = std::exp(score[j] - top);
                    if (weight == 0) continue;
                    total += weight;
                    for (std::size_t c = 0; c < dv; ++c)
                        sum[c] +=
                            weight * static_cast<double>(m.at(history[j].text, history[j].position, layer, h / group, of_v, c));
                }
                for (std::size_t c = 0; c < dv; ++c) out.push_back(static_cast<float>(sum[c] / total));
            }
    return out;
}

inline std::vector<float> exact(const shape& s, const model& m, const std::vector<token>& history, std::size_t queries)
{
    return exact(s, m, history, queries, [](std::size_t i, std::size_t j) { return j <= i; });
}

inline std::vector<token> history(const std::vector<std::uint64_t>& t, std::int64_t position = 0)
{
    std::vector<token> h;
    for (const std::uint64_t x : t) h.push_back({x, position++});
    return h;
}

}  // namespace adapter
