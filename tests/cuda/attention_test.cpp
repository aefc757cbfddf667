// SPDX-License-Identifier: Apache-2.0
// The attention kernels against kvarn::attend at precision::exact. Compiled for fibers and for devices (run.hpp).

#include <kvarn/attention.hpp>

#include <cmath>
#include <limits>
#include <vector>

#include "../catch.hpp"
#include "kernel_data.hpp"

namespace {

/// A batch to attend to, and what may vary.
struct batch {
    explicit batch(const kvarn::format& f) : format(f) {}
    kvarn::format format;
    int kv_heads = 2, new_tokens = 1, heads_per_kv = 1, splits = 2;
    std::vector<int> sinks, tiles, tails;  // of each sequence
    float cap = 0.0f;
    double query_gain = 1.0;
    std::int64_t window = 0;
    bool causal = true, sink_logits = false;
    bool parts = false;     // tiles of which only some tokens count
    bool gaps = false;      // positions with gaps
    bool alibi = false;
    int mask_tokens = 0;    // newest positions with a mask of random bits
    bool causal_mask = false;  // or of those that the causal rule says
    bool poisoned = false;  // the kernels find no number where no query looks: sink tokens outside the window
    kvarn::basis query = kvarn::basis::original, output = kvarn::basis::original;
};

/// Everything on one side: tokens in pages, records, queries.
template <class T>
struct inputs {
    static constexpr int page_tokens = 16, pages = 20;
    support::shared_vector<T> sink_k, sink_v, tail_k, tail_v, q, out;
    support::shared_vector<std::int32_t> sink_table, tail_table, record_table, sinks, tiles, tails;
    support::shared_vector<std::int32_t> sink_positions, tail_positions;
    support::shared_vector<std::uint64_t> records, mask;
    support::shared_vector<kvarn::cuda::tile_span> spans;
    support::shared_vector<float> log_sum_exp, workspace, logits, slopes;
    std::size_t record_bytes = 0, mask_stride = 0;
    int max_tiles = 1;
};

template <class T>
inputs<T> make_inputs(const batch& b, std::uint64_t seed)
{
    support::random_source random(seed);
    inputs<T> x;
    const auto sequences = b.sinks.size(), heads = static_cast<std::size_t>(b.kv_heads);
    const auto dk = static_cast<std::size_t>(b.format.key_channels()), dv = static_cast<std::size_t>(b.format.head_dim_v());
    const auto out_dim = b.format.has_values() ? dv : static_cast<std::size_t>(b.format.head_dim_k());
    const auto fill = [&](support::shared_vector<T>& to, std::size_t n, double gain) {
        to.resize(n);
        for (T& e : to) e = support::stored<T>(static_cast<float>(gain * random.gaussian()));
    };
    const auto tables = [&](support::shared_vector<std::int32_t>& table, std::size_t per_sequence) {
        table.resize(sequences * per_sequence);
        REQUIRE(table.size() % 7 != 0);
        for (std::size_t i = 0; i < table.size(); ++i) table[i] = static_cast<std::int32_t>((i * 7 + 3) % table.size());
    };
    const std::size_t exact = sequences * inputs<T>::pages * inputs<T>::page_tokens * heads;
    fill(x.sink_k, exact * dk, 1.0);
    fill(x.tail_k, exact * dk, 1.0);
    fill(x.sink_v, exact * dv + 1, 1.0);
    fill(x.tail_v, exact * dv + 1, 1.0);
    tables(x.sink_table, inputs<T>::pages);
    tables(x.tail_table, inputs<T>::pages);
    x.sinks.assign(b.sinks.begin(), b.sinks.end());
    x.tiles.assign(b.tiles.begin(), b.tiles.end());
    x.tails.assign(b.tails.begin(), b.tails.end());
    for (const int n : b.tiles) x.max_tiles = std::max(x.max_tiles, n);
    const auto pool = sequences * static_cast<std::size_t>(x.max_tiles);
    x.record_table.resize(pool);
    for (std::size_t i = 0; i < pool; ++i) x.record_table[i] = static_cast<std::int32_t>(pool - 1 - i);
    x.record_bytes = kvarn::record_bytes(b.format);
    support::random_source any(seed + 77), apart(seed + 78);
    const auto gap = [&] { return b.gaps && apart.below(3) != 0 ? static_cast<std::int32_t>(apart.below(50)) : 0; };
    std::vector<std::int32_t> ends;
    for (std::size_t s = 0; s < sequences; ++s) {
        x.sink_positions.push_back(gap());
        ends.push_back(b.sinks[s] != 0 ? x.sink_positions.back() + b.sinks[s] : 0);
    }
    if (b.parts) {
        x.spans.resize(pool);
        for (std::size_t s = 0; s < sequences; ++s) {
            std::int32_t& position = ends[s];
            for (int i = 0; i < b.tiles[s]; ++i) {
                // All, the first so many, the last so many, a middle, one token, or none.
                const auto group = static_cast<std::size_t>(b.format.group());
                const std::size_t kind = any.below(6), first = kind == 0 || kind == 1 ? 0 : any.below(group),
                                  rest = group - first;
                const std::size_t count = kind == 0   ? group
                                          : kind == 2 ? rest
                                          : kind == 4 ? 1
                                          : kind == 5 ? 0
                                                      : 1 + any.below(rest);
                if (count != 0) position += gap();
                x.spans[s * static_cast<std::size_t>(x.max_tiles) + static_cast<std::size_t>(i)] = {
                    position, static_cast<std::uint16_t>(first), static_cast<std::uint16_t>(count)};
                position += static_cast<std::int32_t>(count);
            }
        }
    }
    if (!b.parts)
        for (std::size_t s = 0; s < sequences; ++s) ends[s] += b.tiles[s] * b.format.group();
    for (std::size_t s = 0; s < sequences; ++s) x.tail_positions.push_back(ends[s] + gap());
    const auto m = static_cast<std::size_t>(b.new_tokens), masked = static_cast<std::size_t>(b.mask_tokens);
    x.mask_stride = (masked + 63) / 64 + 1;
    x.mask.resize(sequences * m * x.mask_stride);
    for (std::uint64_t& word : x.mask) word = any.bits();
    for (std::size_t i = 0; b.causal_mask && i < sequences * m; ++i)
        for (std::size_t t = 0; t < masked; ++t) {
            std::uint64_t& word = x.mask[i * x.mask_stride + t / 64];
            const std::uint64_t bit = std::uint64_t{1} << t % 64;
            word = t + m <= masked + i % m ? word | bit : word & ~bit;
        }
    for (int i = 0; i < b.kv_heads * b.heads_per_kv; ++i) x.slopes.push_back(i % 5 == 4 ? -0.01f : std::exp2(-1.0f - static_cast<float>(i % 8)));
    const support::kv_tiles tokens = support::random_tiles(random, b.format, pool, heads, support::tile_kind::channel_offsets);
    support::cpu_records records;
    support::expect_ok(support::seal_on_cpu(b.format, tokens.k, tokens.v, pool, heads, {}, records));
    x.records = records.words;
    const std::size_t vectors = sequences * static_cast<std::size_t>(b.new_tokens * b.kv_heads * b.heads_per_kv);
    fill(x.q, vectors * dk, b.query_gain);
    x.out.assign(vectors * out_dim, support::stored<T>(std::numeric_limits<float>::quiet_NaN()));
    x.log_sum_exp.assign(vectors, std::numeric_limits<float>::quiet_NaN());
    x.logits.resize(heads * static_cast<std::size_t>(b.heads_per_kv));
    for (float& l : x.logits) l = static_cast<float>(2.0 * random.gaussian());
    const std::size_t bytes = kvarn::cuda::attention_workspace_bytes(b.format, static_cast<int>(sequences), b.kv_heads,
                                                                     b.new_tokens * b.heads_per_kv, b.splits);
    x.workspace.assign(bytes / 4, std::numeric_limits<float>::quiet_NaN());
    return x;
}

template <class T>
kvarn::cuda::attention_arguments arguments(const batch& b, inputs<T>& x)
{
    kvarn::cuda::attention_arguments a;
    const int dk = b.format.key_channels(), dv = b.format.head_dim_v(),
              out_dim = b.format.has_values() ? dv : b.format.head_dim_k();
    const int heads = b.kv_heads * b.heads_per_kv;
    a.q = {x.q.data(), support::type_of<T>, b.new_tokens * heads * dk, heads * dk, dk};
    a.out = {x.out.data(), support::type_of<T>, b.new_tokens * heads * out_dim, heads * out_dim, out_dim};
    a.log_sum_exp = x.log_sum_exp.data();
    a.sink_logits = b.sink_logits ? x.logits.data() : nullptr;
    const auto exact = [&](const T* k, const T* v, const support::shared_vector<std::int32_t>& table,
                           const support::shared_vector<std::int32_t>& tokens) {
        kvarn::cuda::exact_pages p;
        p.k = k;
        p.v = v;
        p.type = support::type_of<T>;
        p.k_token_stride = b.kv_heads * dk;
        p.k_page_stride = inputs<T>::page_tokens * p.k_token_stride;
        p.k_head_stride = dk;
        p.v_token_stride = b.kv_heads * dv;
        p.v_page_stride = inputs<T>::page_tokens * p.v_token_stride;
        p.v_head_stride = dv;
        p.table = table.data();
        p.tokens = tokens.data();
        p.pages = inputs<T>::pages;
        p.page_tokens = inputs<T>::page_tokens;
        return p;
    };
    a.sink = exact(x.sink_k.data(), x.sink_v.data(), x.sink_table, x.sinks);
    a.tail = exact(x.tail_k.data(), x.tail_v.data(), x.tail_table, x.tails);
    if (b.gaps) {
        a.sink.positions = x.sink_positions.data();
        a.tail.positions = x.tail_positions.data();
    }
    a.alibi_slopes = b.alibi ? x.slopes.data() : nullptr;
    if (b.mask_tokens != 0) {
        a.mask = x.mask.data();
        a.mask_stride = static_cast<int>(x.mask_stride);
        a.mask_tokens = b.mask_tokens;
    }
    a.records = {reinterpret_cast<const std::byte*>(x.records.data()),
                 x.record_bytes * static_cast<std::size_t>(b.kv_heads),
                 x.record_bytes,
                 x.record_table.data(),
                 x.tiles.data(),
                 x.max_tiles,
                 b.parts ? x.spans.data() : nullptr};
    a.sequences = static_cast<int>(b.sinks.size());
    a.kv_heads = b.kv_heads;
    a.new_tokens = b.new_tokens;
    a.heads_per_kv = b.heads_per_kv;
    a.splits = b.splits;
    a.workspace = x.workspace.data();
    a.logit_soft_cap = b.cap;
    a.window = b.window;
    a.causal = b.causal;
    a.query_basis = b.query;
    a.output_basis = b.output;
    return a;
}

struct difference {
    double output = 0.0, log_sum_exp = 0.0;  // ||got - wanted|| / ||wanted||, and the largest, relative from 1 on
};

/// Attends on both sides.
template <class T>
difference compare(const batch& b, std::uint64_t seed, int step = 1)
{
    inputs<T> x = make_inputs<T>(b, seed);
    const kvarn::cuda::attention_arguments a = arguments(b, x);
    const auto sink_k = x.sink_k, sink_v = x.sink_v;
    if (b.poisoned)
        for (std::size_t s = 0; s < b.sinks.size(); ++s) {
            const std::int64_t history = b.sinks[s] + b.tiles[s] * b.format.group() + b.tails[s];
            for (std::int64_t t = 0; t < std::min<std::int64_t>(b.sinks[s], history - b.new_tokens + 1 - b.window); ++t) {
                const int page = x.sink_table[s * inputs<T>::pages + static_cast<std::size_t>(t / inputs<T>::page_tokens)];
                const auto token = static_cast<std::size_t>(page * inputs<T>::page_tokens + t % inputs<T>::page_tokens);
                const auto poison = [&](support::shared_vector<T>& to, int channels) {
                    const auto n = static_cast<std::size_t>(b.kv_heads * channels);
                    for (std::size_t c = 0; c < n; ++c)
                        to[token * n + c] = support::stored<T>(std::numeric_limits<float>::quiet_NaN());
                };
                poison(x.sink_k, b.format.key_channels());
                poison(x.sink_v, b.format.head_dim_v());
            }
        }
    support::expect_ok(support::run(b.format, a, step));
    x.sink_k = sink_k, x.sink_v = sink_v;
    const auto dk = static_cast<std::size_t>(b.format.key_channels()), dv = static_cast<std::size_t>(b.format.head_dim_v());
    const std::size_t out_dim = b.format.has_values() ? dv : static_cast<std::size_t>(b.format.head_dim_k()),
                      m = static_cast<std::size_t>(b.new_tokens), r = static_cast<std::size_t>(b.heads_per_kv),
                      heads = static_cast<std::size_t>(b.kv_heads);
    double error = 0.0, norm = 0.0;
    difference d;
    for (std::size_t s = 0; s < b.sinks.size(); ++s)
        for (std::size_t h = 0; h < heads; ++h) {
            // Exact tokens of this head, dense.
            const auto gather = [&](const support::shared_vector<T>& from, const support::shared_vector<std::int32_t>& table,
                                    int tokens, std::size_t dim) {
                std::vector<T> to;
                for (int t = 0; t < tokens; ++t) {
                    const auto page = static_cast<std::size_t>(
                        table[s * inputs<T>::pages + static_cast<std::size_t>(t / inputs<T>::page_tokens)]);
                    const std::size_t token =
                        page * inputs<T>::page_tokens + static_cast<std::size_t>(t % inputs<T>::page_tokens);
                    for (std::size_t c = 0; c < dim; ++c) to.push_back(from[(token * heads + h) * dim + c]);
                }
                to.resize(to.size() + 1);
                return to;
            };
            const std::vector<T> sink_k = gather(x.sink_k, x.sink_table, b.sinks[s], dk),
                                 sink_v = gather(x.sink_v, x.sink_table, b.sinks[s], dv);
            const std::vector<T> tail_k = gather(x.tail_k, x.tail_table, b.tails[s], dk),
                                 tail_v = gather(x.tail_v, x.tail_table, b.tails[s], dv);
            const auto segment = [&](const std::vector<T>& k, const std::vector<T>& v, int tokens) {
                const auto n = static_cast<std::size_t>(tokens);
                kvarn::input_view values;
                if (b.format.has_values()) values = kvarn::token_major(v.data(), n, 1, dv);
                return kvarn::exact_tokens(kvarn::token_major(k.data(), n, 1, dk), values, 0);
            };
            std::vector<const std::byte*> list;
            for (int i = 0; i < b.tiles[s]; ++i) {
                const auto slot = static_cast<std::size_t>(
                    x.record_table[s * static_cast<std::size_t>(x.max_tiles) + static_cast<std::size_t>(i)]);
                list.push_back(a.records.data + slot * a.records.tile_stride + h * a.records.head_stride);
            }
            std::vector<kvarn::kv_segment> history{segment(sink_k, sink_v, b.sinks[s])};
            const kvarn::kv_segment tiles = kvarn::listed_tiles(b.format, list);
            if (!b.parts) history.push_back(tiles);
            for (std::size_t i = 0; b.parts && i < list.size(); ++i) {
                const kvarn::cuda::tile_span& t = x.spans[s * static_cast<std::size_t>(x.max_tiles) + i];
                history.push_back(
                    kvarn::token_range(b.format, tiles, i * static_cast<std::size_t>(b.format.group()) + t.first, t.count));
            }
            history.push_back(segment(tail_k, tail_v, b.tails[s]));
            if (b.gaps) {
                history.front().position = x.sink_positions[s];
                for (std::size_t i = 0; b.parts && i < list.size(); ++i)
                    history[i + 1].position = x.spans[s * static_cast<std::size_t>(x.max_tiles) + i].position;
                history.back().position = x.tail_positions[s];
            }
            std::vector<float> wanted(m * r * out_dim), lse(m * r);
            kvarn::attention_task task;
            task.history = history;
            const T* const q = x.q.data() + s * m * heads * r * dk + h * r * dk;
            task.q = kvarn::kv_view<const T>{
                q, m, r, dk, static_cast<std::ptrdiff_t>(heads * r * dk), static_cast<std::ptrdiff_t>(dk), 1};
            task.out = kvarn::token_major(wanted.data(), m, r, out_dim);
            task.log_sum_exp = lse.data();
            task.sink_logits = b.sink_logits ? x.logits.data() + h * r : nullptr;
            task.alibi_slopes = b.alibi ? x.slopes.data() + h * r : nullptr;
            if (b.mask_tokens != 0) {
                task.mask = x.mask.data() + s * m * x.mask_stride;
                task.mask_stride = x.mask_stride;
                task.mask_tokens = static_cast<std::size_t>(b.mask_tokens);
            }
            kvarn::attention_options o;
            o.logit_soft_cap = b.cap;
            o.window = b.window;
            o.causal = b.causal;
            o.query_basis = b.query;
            o.output_basis = b.output;
            o.precision = kvarn::precision::exact;
            std::vector<std::byte> scratch(kvarn::attention_scratch_bytes(b.format, m * r));
            support::expect_ok(kvarn::attend(b.format, task, o, scratch));
            for (std::size_t t = 0; t < m; ++t)
                for (std::size_t i = 0; i < r; ++i) {
                    const std::size_t vector = (s * m + t) * heads * r + h * r + i;
                    for (std::size_t c = 0; c < out_dim; ++c) {
                        const double w = wanted[(t * r + i) * out_dim + c],
                                     e = support::value_of(x.out[vector * out_dim + c]) - w;
                        error += e * e;
                        norm += w * w;
                    }
                    const float got = x.log_sum_exp[vector], want = lse[t * r + i];
                    if (got != want)
                        d.log_sum_exp =
                            std::max(d.log_sum_exp, std::isfinite(got) ? std::fabs(static_cast<double>(got) - want) /
                                                                             std::max(1.0, std::fabs(static_cast<double>(want)))
                                                                       : 1e9);
                }
        }
    d.output = norm > 0.0 ? std::sqrt(error / norm) : std::sqrt(error);
    if (!(d.output >= 0.0)) d.output = 1e9;  // not a number: something was not written
    return d;
}

/// Float outputs within what a sum of floats allows of the CPU (tensor cores may round sums down), 16-bit ones within their rounding.
#if defined(KVARN_TEST_ON_DEVICE)
constexpr double float_error = 1e-4;
#else
constexpr double float_error = 1e-5;
#endif
void expect_close(const batch& b, std::uint64_t seed)
{
    CAPTURE(support::describe(b.format), b.new_tokens, b.heads_per_kv, b.splits, seed);
    const difference f = compare<float>(b, seed, 37), h = compare<kvarn::half>(b, seed + 1000);
    CAPTURE(f.output, f.log_sum_exp, h.output, h.log_sum_exp);
    CHECK(f.output < float_error);
    CHECK(f.log_sum_exp < float_error);
    CHECK(h.output < 1e-3);
    CHECK(h.log_sum_exp < 1e-4);
}

}  // namespace

TEST_CASE("cuda/attention: every width and size", "[cuda][attention]")
{
    std::vector<kvarn::format> formats = {
        support::format_of(128, 128, 4, 2, 128), support::format_of(128, 128, 4, 4, 128),
        support::format_of(128, 128, 2, 2, 128), support::format_of(128, 128, 8, 8, 128),
        support::format_of(256, 64, 6, 3, 32),   support::format_of(64, 256, 5, 6, 128),
        support::format_of(64, 64, 4, 2, 256),   support::format_of(64, 64, 4, 4, 64, false),
        support::format_of(512, 512, 2, 2, 32),
    };
    // All widths for K and V, and K read as V, in spans of 32, 64 and 128 tokens.
    const int widths[] = {2, 3, 4, 5, 6, 8};
    for (const int group : {32, 64, 128})
        for (std::size_t i = 0; i < 6; ++i) {
            formats.push_back(support::format_of(64, i % 2 == 0 ? 64 : 128, widths[i], widths[(i + 1) % 6], group));
            formats.push_back(support::format_of(64, 64, widths[i], 0, group));
        }
    // Exact channels; the latent form of the large models.
    formats.push_back(support::format_of(128, 128, 4, 2, 128, true, 8));
    formats.push_back(support::format_of(64, 64, 4, 4, 32, false, 40));
    formats.push_back(support::format_of(128, 128, 4, 0, 64, true, 64));
    formats.push_back(support::format_of(512, 512, 4, 0, 64, true, 64));
    std::uint64_t seed = 900;
    for (const kvarn::format& f : formats) {
        batch b{f};
        b.heads_per_kv = 1 + static_cast<int>(seed % 4);
        b.sinks = {33, 0};
        b.tiles = {3, 2};
        b.tails = {17, 40};
        expect_close(b, ++seed);
    }
}

TEST_CASE("cuda/attention: query rows, splits and empty histories", "[cuda][attention]")
{
    std::uint64_t seed = 950;
    struct shape {
        int m, r, splits;
    };
    for (const shape s :
         {shape{1, 1, 1}, shape{1, 8, 3}, shape{3, 1, 2}, shape{2, 6, 5}, shape{8, 8, 1}, shape{5, 1, 4}, shape{1, 128, 1}}) {
        batch b{support::format_of(64, 64, 4, 2, 32)};
        b.kv_heads = 1;
        b.new_tokens = s.m;
        b.heads_per_kv = s.r;
        b.splits = s.splits;
        b.sinks = {16, 0, 0, 5};
        b.tiles = {4, 3, 0, 0};
        b.tails = {s.m, 0, s.m + 3, s.m};
        expect_close(b, ++seed);
    }
    batch nothing{support::format_of(64, 64, 4, 2, 32)};
    nothing.sinks = nothing.tiles = nothing.tails = {0};
    const difference d = compare<float>(nothing, 1);
    CHECK(d.output == 0.0);
    CHECK(d.log_sum_exp == 0.0);
}

TEST_CASE("cuda/attention: long histories, weights from even to one", "[cuda][attention]")
{
    std::uint64_t seed = 970;
    for (const double gain : {0.01, 1.0, 8.0, 60.0}) {
        for (const kvarn::format& f : {support::format_of(64, 64, 4, 2, 128), support::format_of(64, 64, 4, 0, 128)}) {
            batch b{f};
            b.kv_heads = 1;
            b.heads_per_kv = 3;
            b.query_gain = gain;
            b.splits = 3;
            b.sinks = {128};
            b.tiles = {40};
            b.tails = {90};
            expect_close(b, ++seed);
        }
    }
}

TEST_CASE("cuda/attention: window, soft-cap, sink logits, bases, no mask", "[cuda][attention]")
{
    batch b{support::format_of(64, 128, 4, 4, 32)};
    b.new_tokens = 4;
    b.heads_per_kv = 2;
    b.sinks = {20, 3};
    b.tiles = {3, 5};
    b.tails = {10, 4};
    std::uint64_t seed = 980;
    for (const std::int64_t window : {1, 7, 33, 70, 1000}) {
        batch w = b;
        w.window = window;
        expect_close(w, ++seed);
    }
    batch gone = b;
    gone.sinks = {100, 70};
    gone.window = 180;
    gone.poisoned = true;
    expect_close(gone, ++seed);
    for (const float cap : {20.0f, 1e-3f, 1000.0f}) {
        batch capped = b;
        capped.cap = cap;
        expect_close(capped, ++seed);
    }
    batch logits = b;
    logits.sink_logits = true;
    expect_close(logits, ++seed);
    batch open = b;
    open.causal = false;
    expect_close(open, ++seed);
    batch rotated = b;
    rotated.query = kvarn::basis::rotated;
    expect_close(rotated, ++seed);
    rotated.output = kvarn::basis::rotated;
    expect_close(rotated, ++seed);
}

TEST_CASE("cuda/attention: parts of tiles", "[cuda][attention]")
{
    std::uint64_t seed = 1000;
    // Spans of 32, 64 and 128 tokens, tiles of one span and of two, V of its own and read from K, exact channels.
    for (const kvarn::format& f :
         {support::format_of(64, 64, 4, 2, 32), support::format_of(64, 128, 3, 4, 64), support::format_of(128, 128, 4, 2, 128),
          support::format_of(64, 64, 2, 6, 256), support::format_of(64, 64, 4, 0, 256), support::format_of(64, 64, 5, 0, 32),
          support::format_of(128, 128, 4, 4, 64, true, 8), support::format_of(128, 128, 4, 0, 64, true, 64)})
        for (const int new_tokens : {1, 3}) {
            batch b{f};
            b.parts = true;
            b.new_tokens = new_tokens;
            b.heads_per_kv = 2;
            b.splits = 1 + static_cast<int>(seed % 3);
            b.sinks = {33, 0, 5};
            b.tiles = {9, 1, 4};
            b.tails = {17, 4, 3};
            expect_close(b, ++seed);
        }
    // No tail: the newest token is the last that counts of the last tile. Windows that begin inside of parts, soft-cap, no mask.
    batch b{support::format_of(64, 64, 4, 2, 32)};
    b.parts = true;
    b.heads_per_kv = 2;
    b.sinks = {4, 0};
    b.tiles = {12, 7};
    b.tails = {0, 0};
    expect_close(b, ++seed);
    b.tails = {3, 2};
    b.new_tokens = 2;
    for (const std::int64_t window : {1, 5, 20, 40, 64, 90, 130, 1000}) {
        b.window = window;
        expect_close(b, ++seed);
    }
    b.window = 0;
    b.cap = 20.0f;
    expect_close(b, ++seed);
    b.causal = false;
    b.sink_logits = true;
    expect_close(b, ++seed);
}

TEST_CASE("cuda/attention: spans of whole tiles are the tiles, bit for bit", "[cuda][attention]")
{
    for (const kvarn::format& f : {support::format_of(64, 64, 4, 2, 32), support::format_of(64, 64, 4, 0, 256)}) {
        batch b{f};
        b.heads_per_kv = 3;
        b.new_tokens = 2;
        b.window = 150;
        b.sinks = {20, 0};
        b.tiles = {6, 2};
        b.tails = {10, 2};
        inputs<float> x = make_inputs<float>(b, 1100), y = make_inputs<float>(b, 1100);
        support::expect_ok(support::run(f, arguments(b, x)));
        y.spans.resize(2 * 6);
        for (std::size_t s = 0; s < 2; ++s)
            for (int i = 0; i < b.tiles[s]; ++i)
                y.spans[s * 6 + static_cast<std::size_t>(i)] = {b.sinks[s] + i * f.group(), 0, static_cast<std::uint16_t>(f.group())};
        b.parts = true;
        support::expect_ok(support::run(f, arguments(b, y)));
        CHECK(support::same_bits<float>({x.out.begin(), x.out.end()}, {y.out.begin(), y.out.end()}));
        CHECK(support::same_bits<float>({x.log_sum_exp.begin(), x.log_sum_exp.end()}, {y.log_sum_exp.begin(), y.log_sum_exp.end()}));
        // And something else if one of them is not whole.
        --y.spans[5].count;
        support::expect_ok(support::run(f, arguments(b, y)));
        CHECK(!support::same_bits<float>({x.out.begin(), x.out.end()}, {y.out.begin(), y.out.end()}));
    }
}

TEST_CASE("cuda/attention: positions with gaps", "[cuda][attention]")
{
    std::uint64_t seed = 1200;
    for (const kvarn::format& f : {support::format_of(64, 64, 4, 2, 32), support::format_of(64, 128, 3, 4, 64), support::format_of(64, 64, 4, 0, 256)})
        for (const bool parts : {false, true})
            for (const std::int64_t window : {0, 30, 100, 300}) {
                batch b{f};
                b.parts = parts;
                b.gaps = true;
                b.window = window;
                b.new_tokens = 1 + static_cast<int>(seed % 3);
                b.heads_per_kv = 2;
                b.sinks = {33, 0, 5};
                b.tiles = {5, 1, 3};
                b.tails = {17, 4, 3};
                if (seed % 4 == 0) b.tails = {0, 0, 0};
                b.causal = seed % 5 != 0;
                expect_close(b, ++seed);
            }
}

TEST_CASE("cuda/attention: masks of the newest positions", "[cuda][attention]")
{
    std::uint64_t seed = 1300;
    for (const kvarn::format& f : {support::format_of(64, 64, 4, 2, 32), support::format_of(128, 128, 4, 2, 128), support::format_of(64, 64, 2, 6, 256),
                                   support::format_of(64, 64, 4, 0, 64)})
        for (const int tokens : {1, 4, 20, 64, 100, 5000})
            for (const bool parts : {false, true}) {
                batch b{f};
                b.parts = b.gaps = parts;
                b.mask_tokens = tokens;
                b.new_tokens = 4;
                b.heads_per_kv = 1 + static_cast<int>(seed % 4);
                b.sinks = {20, 0};
                b.tiles = {3, 2};
                b.tails = {10, seed % 2 == 0 ? 0 : 4};
                b.window = seed % 3 == 0 ? 50 : 0;
                b.causal = seed % 5 != 0;
                b.sink_logits = seed % 7 == 0;
                expect_close(b, ++seed);
            }
}

TEST_CASE("cuda/attention: a mask that says what the rule says changes no bit", "[cuda][attention]")
{
    for (const kvarn::format& f : {support::format_of(64, 64, 4, 2, 32), support::format_of(64, 64, 4, 0, 256)})
        for (const int tokens : {3, 20, 70, 2000}) {
            batch b{f};
            b.heads_per_kv = 3;
            b.new_tokens = 3;
            b.window = tokens == 70 ? 90 : 0;
            b.sinks = {20, 0};
            b.tiles = {6, 2};
            b.tails = {10, 0};
            inputs<float> x = make_inputs<float>(b, 1400);
            support::expect_ok(support::run(f, arguments(b, x)));
            b.mask_tokens = tokens;
            b.causal_mask = true;
            inputs<float> y = make_inputs<float>(b, 1400);
            support::expect_ok(support::run(f, arguments(b, y)));
            CHECK(support::same_bits<float>({x.out.begin(), x.out.end()}, {y.out.begin(), y.out.end()}));
            CHECK(support::same_bits<float>({x.log_sum_exp.begin(), x.log_sum_exp.end()}, {y.log_sum_exp.begin(), y.log_sum_exp.end()}));
            y.mask[0] ^= 1;  // the oldest of them, for the first token
            support::expect_ok(support::run(f, arguments(b, y)));
            CHECK(support::same_bits<float>({x.out.begin(), x.out.end()}, {y.out.begin(), y.out.end()}) == (tokens == 2000));
        }
}

TEST_CASE("cuda/attention: ALiBi", "[cuda][attention]")
{
    std::uint64_t seed = 1500;
    for (const kvarn::format& f : {support::format_of(64, 64, 4, 2, 32), support::format_of(128, 128, 4, 4, 128), support::format_of(64, 64, 4, 0, 256),
                                   support::format_of(128, 128, 4, 4, 64, true, 8)})
        for (const bool more : {false, true}) {
            batch b{f};
            b.alibi = true;
            b.new_tokens = 3;
            b.heads_per_kv = 3;
            b.sinks = {20, 0};
            b.tiles = {3, 5};
            b.tails = {10, 4};
            expect_close(b, ++seed);
            b.parts = b.gaps = more;
            b.cap = more ? 5.0f : 0.0f;
            b.causal = !more;
            b.mask_tokens = 15;
            b.window = 60;
            expect_close(b, ++seed);
        }
}

TEST_CASE("cuda/attention: what is wrong with the arguments is said before a launch", "[cuda][attention]")
{
    batch b{support::format_of(64, 64, 4, 2, 32)};
    b.sinks = {1};
    b.tiles = {1};
    b.tails = {1};
    inputs<float> x = make_inputs<float>(b, 5);
    const auto refused = [&](auto&& change) {
        kvarn::cuda::attention_arguments a = arguments(b, x);
        change(a);
        return support::run(b.format, a);
    };
    CHECK(refused([](auto&) {}) == kvarn::status::ok);
    x.out.assign(x.out.size(), 7.0f);
    CHECK(refused([](auto& a) { a.sequences = 0; }) == kvarn::status::ok);
    CHECK(refused([](auto& a) { a.kv_heads = 0; }) == kvarn::status::ok);
    CHECK(refused([](auto& a) { a.new_tokens = 0; }) == kvarn::status::ok);
    CHECK(refused([](auto& a) { a.heads_per_kv = 0; }) == kvarn::status::ok);
    CHECK(refused([](auto& a) { a.sequences = -1; }) == kvarn::status::bad_argument);
    for (const float o : x.out) REQUIRE(o == 7.0f);
    CHECK(refused([](auto& a) { a.workspace = nullptr; }) == kvarn::status::null_pointer);
    CHECK(refused([](auto& a) { a.q.data = nullptr; }) == kvarn::status::null_pointer);
    CHECK(refused([](auto& a) { a.tail.v = nullptr; }) == kvarn::status::null_pointer);
    CHECK(refused([](auto& a) { a.records.table = nullptr; }) == kvarn::status::null_pointer);
    std::vector<kvarn::cuda::tile_span> spans(2);
    CHECK(refused([&](auto& a) {
              a.records.spans = reinterpret_cast<const kvarn::cuda::tile_span*>(reinterpret_cast<const std::byte*>(spans.data()) + 4);
          }) == kvarn::status::bad_argument);
    CHECK(refused([](auto& a) { a.new_tokens = 9; }) == kvarn::status::bad_argument);
    CHECK(refused([](auto& a) { a.heads_per_kv = 1025; }) == kvarn::status::bad_argument);
    CHECK(refused([](auto& a) { a.splits = 0; }) == kvarn::status::bad_argument);
    CHECK(refused([](auto& a) { a.q.head_stride = 3; }) == kvarn::status::bad_argument);
    CHECK(refused([](auto& a) { a.logit_soft_cap = 1001.0f; }) == kvarn::status::bad_argument);
    CHECK(refused([](auto& a) { a.window = -1; }) == kvarn::status::bad_argument);
    const std::vector<std::uint64_t> words(4, 1);
    const auto masked = [&](const std::uint64_t* mask, int stride, int tokens) {
        return refused([&](auto& a) { a.mask = mask, a.mask_stride = stride, a.mask_tokens = tokens; });
    };
    CHECK(masked(nullptr, 2, 100) == kvarn::status::null_pointer);
    CHECK(masked(words.data(), 1, 65) == kvarn::status::bad_argument);
    CHECK(masked(words.data(), 0, 1) == kvarn::status::bad_argument);
    CHECK(masked(words.data(), 1, -1) == kvarn::status::bad_argument);
    CHECK(masked(words.data(), -1, 0) == kvarn::status::bad_argument);
    CHECK(masked(reinterpret_cast<const std::uint64_t*>(reinterpret_cast<const std::byte*>(words.data()) + 4), 1, 5) ==
          kvarn::status::bad_argument);
    const kvarn::cuda::attention_arguments a = arguments(b, x);
    CHECK(support::run(support::format_of(128, 128, 4, 2, 32, true, 4), a) == kvarn::status::unsupported_channels);
    using kvarn::cuda::operation;
    const kvarn::format latent = support::format_of(512, 512, 4, 0, 64, true, 64);
    CHECK(kvarn::cuda::supports(latent, operation::attend, kvarn::cuda::shared_bytes_sm80));
    CHECK(kvarn::cuda::supports(latent, operation::attend, kvarn::cuda::shared_bytes_sm86));
    CHECK(kvarn::cuda::supports(latent, operation::attend, 48 * 1024).error == kvarn::status::buffer_too_small);
    CHECK(support::run(support::format_of(96, 96, 4, 2, 32), a) == kvarn::status::unsupported_head_dim);
}

TEST_CASE("cuda/attention: suggested splits fill the card and no more", "[cuda][attention]")
{
    using kvarn::cuda::suggested_splits;
    const kvarn::format f = support::format_of(128, 128, 4, 2, 128), latent = support::format_of(128, 128, 4, 0, 128);
    CHECK(suggested_splits(f, 1, 8, 1, 0, 132) == 1);
    CHECK(suggested_splits(f, 0, 8, 1, 64, 132) == 1);
    CHECK(suggested_splits(f, 1, 8, 1, 8, 132) == 2);         // a tile for every warp
    CHECK(suggested_splits(f, 8, 8, 4, 256, 132) == 6);       // 384 of 396 places
    CHECK(suggested_splits(latent, 8, 8, 4, 256, 132) == 4);  // 256 of 264
    CHECK(suggested_splits(f, 1, 8, 1, 256, 132) == 32);      // two tiles for every warp, at one time
    CHECK(suggested_splits(f, 1, 1, 1, 1 << 20, 132) <= 396);
    CHECK(suggested_splits(f, 64, 8, 8, 1024, 132) <= 10);
}

namespace kvarn {
// The extern templates of support/library.hpp are instantiated in another program.
template status attend<simd::native_arch>(const format&, const attention_task&, const attention_options&,
                                          std::span<std::byte>) noexcept;
}  // namespace kvarn
