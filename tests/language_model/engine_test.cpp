// SPDX-License-Identifier: Apache-2.0
// The inference engine of the example language_model: logits against PyTorch's (logits.npy) and against a forward pass in double
// with plain loops; blocks against one token at a time; when tiles are sealed and what attention sees before and after; bytes;
// names; threads.

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <random>
#include <span>
#include <string>
#include <vector>

#include "examples/common/npy.hpp"
#include "examples/language_model/report.hpp"
#include "tests/catch.hpp"
#include "tiny_model.hpp"

namespace {

using namespace language_model;
using tiny::refusal;

const model& chasing_model()
{
    static const model m = read_model(KVARN_POINTER_CHASE_DATA "/model.safetensors");
    return m;
}

tokens walk(std::size_t sequence)
{
    const std::string path = KVARN_POINTER_CHASE_DATA "/sequences.npy";
    const auto table = kvarn_cli::parse_npy_integers(kvarn_cli::read_file(path), path);
    const auto begin = table.values.begin() + static_cast<std::ptrdiff_t>(sequence * table.columns);
    return {begin, begin + static_cast<std::ptrdiff_t>(table.columns)};
}

/// Logits of every token, computed in blocks of at most `most` tokens.
std::vector<std::vector<float>> all_logits(const model& m, const cache_plan& plan, std::span<const std::int32_t> x,
                                           std::size_t most)
{
    kv_cache cache(plan, shape_of(m.config), x.size());
    decoder d(m, cache);
    std::vector<std::vector<float>> out;
    while (!x.empty()) {
        const std::size_t count = std::min({x.size(), cache.until_seal(), most});
        d.run(x.first(count));
        const matrix& logits = d.logits(0, count);
        for (Eigen::Index t = 0; t < logits.rows(); ++t)
            out.emplace_back(logits.row(t).data(), logits.row(t).data() + logits.cols());
        x = x.subspan(count);
    }
    return out;
}

template <class A, class B>
double worst_difference(const std::vector<std::vector<A>>& a, const std::vector<std::vector<B>>& b)
{
    REQUIRE(a.size() == b.size());
    double worst = 0;
    for (std::size_t t = 0; t < a.size(); ++t) {
        REQUIRE(a[t].size() == b[t].size());
        for (std::size_t i = 0; i < a[t].size(); ++i)
            worst = std::max(worst, std::fabs(static_cast<double>(a[t][i]) - static_cast<double>(b[t][i])));
    }
    return worst;
}

/// A cache of one layer that is fed random vectors, and what was fed.
struct fed_cache {
    fed_cache(const std::string& name, std::size_t sink, std::size_t tokens_in_all)
        : plan(plan_of(name, 64, {sink, {}})), shape{1, 2, 64, 3}, cache(plan, shape, tokens_in_all), length(tokens_in_all)
    {
        std::mt19937 random(7);
        std::normal_distribution<float> normal;
        for (auto* x : {&k, &v})
            for (std::size_t i = 0; i < length * 2 * 64; ++i)
                x->push_back(kvarn::to_half(normal(random) * (i % 64 == 5 ? 6.0f : 1.0f)));
        for (std::size_t i = 0; i < 6 * 64; ++i) q.push_back(normal(random));
    }

    /// Appends tokens and returns the attention of one query on each. finish() ends the step.
    std::vector<float> step(std::size_t count = 1)
    {
        const std::size_t at = cache.tokens() * 2 * 64;
        std::vector<float> queries, out(count * 6 * 64);
        for (std::size_t t = 0; t < count; ++t) queries.insert(queries.end(), q.begin(), q.end());
        cache.attend(0, queries.data(), k.data() + at, v.data() + at, out.data(), count);
        return out;
    }

    /// Attention in double over the first `all` tokens: those that `held` has as it has them, the others as they were fed.
    std::vector<double> expected(const kvarn_cli::matrix& held_k, const kvarn_cli::matrix& held_v, std::size_t all) const
    {
        std::vector<double> out;
        for (std::size_t head = 0; head < 6; ++head) {
            std::vector<double> weight(all), sum(64, 0.0);
            double total = 0;
            const auto value = [&](const kvarn_cli::matrix& held, const std::vector<kvarn::half>& fed, std::size_t t,
                                   std::size_t c) {
                return static_cast<double>(t < held.tokens ? held.token(head / 3, t)[c]
                                                           : kvarn::to_float(fed[(t * 2 + head / 3) * 64 + c]));
            };
            for (std::size_t t = 0; t < all; ++t) {
                double score = 0;
                for (std::size_t c = 0; c < 64; ++c) score += static_cast<double>(q[head * 64 + c]) * value(held_k, k, t, c);
                total += weight[t] = std::exp(score / 8);
            }
            for (std::size_t t = 0; t < all; ++t)
                for (std::size_t c = 0; c < 64; ++c) sum[c] += weight[t] / total * value(held_v, v, t, c);
            out.insert(out.end(), sum.begin(), sum.end());
        }
        return out;
    }

    cache_plan plan;
    cache_shape shape;
    kv_cache cache;
    std::size_t length;
    std::vector<kvarn::half> k, v;
    std::vector<float> q;
};

kvarn_cli::matrix empty_matrix(std::size_t count)
{
    return {2, count, 64, std::vector<float>(2 * count * 64)};
}

}  // namespace

TEST_CASE("language_model/engine: the logits are PyTorch's", "[engine]")
{
    const std::size_t positions[] = {0, 127, 128, 700, 1024, 1025, 1026, 1152, 1300, 1535};
    const kvarn_cli::tensor expected = kvarn_cli::read_npy(KVARN_LANGUAGE_MODEL_TESTS "/logits.npy");
    REQUIRE((expected.tokens == std::size(positions) && expected.channels == 1025));
    const tokens x = walk(0);
    const auto logits = all_logits(chasing_model(), exact_plan(chasing_model()), x, 128);
    double worst = 0;
    for (std::size_t i = 0; i < std::size(positions); ++i)
        for (std::size_t c = 0; c < 1025; ++c)
            worst = std::max(worst, std::fabs(static_cast<double>(expected.value(i * 1025 + c) - logits[positions[i]][c])));
    CHECK(worst < 2e-2);  // the reference keeps K and V in float
    CHECK(worst > 0);
}

TEST_CASE("language_model/engine: blocks of any size are one token at a time, up to rounding", "[engine]")
{
    const tokens x = walk(1);
    const std::span<const std::int32_t> some = std::span(x).first(300);
    for (const char* name : {"exact", "k4v4_g32:paper", "kivi4_g32"}) {
        CAPTURE(name);
        const cache_plan plan = plan_of(name, 128, {40, {}});
        const auto one = all_logits(chasing_model(), plan, some, 1);
        // Rounding alone may tip a code of a record over to its neighbour, so quantized caches agree less closely.
        const double tolerance = plan.storage == storage::exact ? 2e-2 : 0.5;
        CHECK(worst_difference(one, all_logits(chasing_model(), plan, some, 128)) < tolerance);
        CHECK(worst_difference(one, all_logits(chasing_model(), plan, some, 7)) < tolerance);
    }
}

TEST_CASE("language_model/engine: random models agree with plain loops in double", "[engine]")
{
    std::vector<tiny::spec> specs(8);
    specs[0].type = "BF16";
    specs[1].kind = "qwen3";
    specs[1].type = "F16";
    specs[1].biases = specs[1].tied = false;
    specs[1].head_norms = true;
    specs[1].rope_scaling = {{"rope_type", "llama3"},
                             {"factor", 8.0},
                             {"low_freq_factor", 1.0},
                             {"high_freq_factor", 4.0},
                             {"original_max_position_embeddings", 60}};
    specs[2].kind = "llama";
    specs[2].output_bias = true;
    specs[2].heads = specs[2].kv_heads = 2;
    specs[2].rope_scaling = {{"type", "linear"}, {"factor", 4.0}};
    specs[2].theta = 500000;
    specs[3].kind = "mistral";
    specs[3].biases = specs[3].tied = false;
    specs[3].window = 20;
    specs[4].layers = 1;
    specs[4].heads = 6;
    specs[4].head_dim = 96;
    specs[4].rope_scaling = {{"rope_type", "default"}};
    for (const std::size_t i : {5, 6, 7}) {
        specs[i].kind = "gemma3_text";
        specs[i].biases = false;
        specs[i].head_norms = true;
        specs[i].window = 20;
        specs[i].layers = 3;
        specs[i].theta = 1000000;
    }
    specs[5].pattern = 2;
    specs[6].pattern = 3;
    specs[6].newer = true;
    specs[6].query_scalar = 100;
    specs[6].rope_scaling = {{"rope_type", "linear"}, {"factor", 8.0}};
    specs[7].kv_heads = 1;
    specs[7].pattern = 1;  // no local layer at all
    specs[7].rope_scaling = {{"rope_type", "linear"}, {"factor", 4.0}};
    specs[7].tied = false;
    for (std::size_t i = 0; i < specs.size(); ++i) {
        CAPTURE(i);
        const tiny::folder here;
        const tiny::spec& s = specs[i];
        const tiny::tensors all = tiny::random_tensors(s, static_cast<unsigned>(i + 1));
        tiny::write_directory(here / "m", s, all, i == 1);
        const model m = read_model((here / "m").string());
        const std::vector<int> x = tiny::random_tokens(70, s.vocabulary, 3);
        const auto expected = tiny::reference_logits(s, all, x);
        const auto exact = all_logits(m, exact_plan(m), tokens(x.begin(), x.end()), 33);
        CHECK(worst_difference(exact, expected) < 5e-3);
        // The last logits depend on everything that the specification can vary.
        const auto sealed = all_logits(m, plan_of("k8v8_g32", s.head_dim, {16, {}}), tokens(x.begin(), x.end()), 33);
        CHECK(worst_difference(sealed, expected) < 0.2);
        CHECK(worst_difference(sealed, expected) > 1e-4);
    }
}

TEST_CASE("language_model/engine: one file without config.json is a pointer-chasing decoder", "[engine]")
{
    const tiny::folder here;
    tiny::spec s;
    s.head_dim = 128;
    s.heads = 2;
    s.kv_heads = 1;
    s.layers = 1;
    s.epsilon = 1e-6;
    tiny::tensors all = tiny::random_tensors(s, 9);
    tiny::write(here / "m.safetensors", tiny::safetensors_file(all, {{"embedding_scale", "2.5"}, {"task", "pointer chasing"}}));
    const model m = read_model((here / "m.safetensors").string());
    CHECK(m.config.task == "pointer chasing");
    const std::vector<int> x = tiny::random_tokens(20, s.vocabulary, 4);
    const auto logits = all_logits(m, exact_plan(m), tokens(x.begin(), x.end()), 128);
    // The factor is on the input alone: an untied model whose table is scaled and whose output is not.
    s.tied = false;
    all["lm_head.weight"] = all["model.embed_tokens.weight"];
    for (float& e : all["model.embed_tokens.weight"].values) e *= 2.5f;
    CHECK(worst_difference(logits, tiny::reference_logits(s, all, x)) < 5e-3);
    CHECK(chasing_model().config.embedding_scale == 16.0f);
}

TEST_CASE("language_model/engine: models that are damaged or not known are refused by name", "[engine]")
{
    const tiny::spec s;
    const tiny::tensors good = tiny::random_tensors(s, 1);
    const auto says = [&](const std::string& reason, const tiny::tensors& all, const tiny::json& config) {
        const tiny::folder here;
        tiny::write(here / "config.json", config.dump());
        tiny::write(here / "model.safetensors", tiny::safetensors_file(all));
        const std::string text = refusal([&] { (void)read_model(here.path().string()); });
        CAPTURE(text, reason);
        CHECK(text.find(here.path().string()) == 0);
        CHECK(text.find(reason) != std::string::npos);
    };
    const tiny::json config = tiny::config_of(s);
    const auto without = [](auto x, const std::string& key) {
        x.erase(key);
        return x;
    };
    const auto with = [&](const char* key, const tiny::json& value) {
        tiny::json changed = config;
        changed[key] = value;
        return changed;
    };
    const std::string q = "model.layers.1.self_attn.q_proj.weight";
    for (const char* name : {"model.embed_tokens.weight", "model.norm.weight", "model.layers.0.mlp.up_proj.weight", q.c_str()})
        says(std::string(": the tensor ") + name + " is missing", without(good, name), config);
    tiny::tensors changed = good;
    changed[q].shape = {64, 128};
    says(q + " has the shape [64, 128], [128, 64] is needed", changed, config);
    changed = good;
    changed["model.norm.weight"].shape = {8, 8};
    says("model.safetensors: model.norm.weight has the shape [8, 8], [64] is needed", changed, config);
    changed = good;
    changed["model.layers.0.pre_feedforward_layernorm.weight"] = good.at("model.norm.weight");
    says("pre_feedforward_layernorm.weight has no place", changed, config);
    says("the tensor lm_head.weight is missing", good, with("tie_word_embeddings", false));
    says("the tensor model.layers.2.input_layernorm.weight is missing", good, with("num_hidden_layers", 1 << 24));
    // Sizes that a configuration only claims: refused before there is room for them.
    says("embed_tokens.weight has the shape", good, with("vocab_size", 1 << 24));
    says("embed_tokens.weight has the shape", good, with("hidden_size", 1 << 24));
    says("q_proj.weight has the shape", good, with("num_attention_heads", 1 << 24));
    says("gate_proj.weight has the shape", good, with("intermediate_size", 1 << 24));
    says("'hidden_size' is missing", good, without(config, "hidden_size"));
    for (const tiny::json& bad : {tiny::json(-1), tiny::json(0), tiny::json(1.5), tiny::json("64"), tiny::json(1u << 25)})
        says("'vocab_size' is no whole number", good, with("vocab_size", bad));
    for (const double bad : {0.0, -1.0, 1e-40, 1e300})
        says("'rms_norm_eps' is no positive number", good, with("rms_norm_eps", bad));
    for (const double bad : {0.0, 1e-300, 1e300}) says("'rope_theta' is no positive number", good, with("rope_theta", bad));
    says("the model_type 'gemma2' is not supported", good, with("model_type", "gemma2"));
    says("the hidden_act 'gelu' is not supported", good, with("hidden_act", "gelu"));
    tiny::spec g;
    g.kind = "gemma3_text";
    g.biases = false;
    g.head_norms = true;
    g.window = 8;
    const tiny::tensors gemma = tiny::random_tensors(g, 1);
    const auto gemma_with = [&](const char* key, const tiny::json& value) {
        tiny::json changed_config = tiny::config_of(g);
        changed_config[key] = value;
        return changed_config;
    };
    says("the tensor model.layers.0.post_feedforward_layernorm.weight is missing",
         without(gemma, "model.layers.0.post_feedforward_layernorm.weight"), tiny::config_of(g));
    says("the tensor model.layers.1.self_attn.k_norm.weight is missing", without(gemma, "model.layers.1.self_attn.k_norm.weight"),
         tiny::config_of(g));
    says("final_logit_softcapping is not supported", gemma, gemma_with("final_logit_softcapping", 30.0));
    says("attn_logit_softcapping is not supported", gemma, gemma_with("attn_logit_softcapping", 50.0));
    says("use_bidirectional_attention is not supported", gemma, gemma_with("use_bidirectional_attention", true));
    says("the hidden_activation 'silu' is not supported", gemma, gemma_with("hidden_activation", "silu"));
    says("'sliding_window' is missing", gemma, without(tiny::config_of(g), "sliding_window"));
    says("layer_types is no list", gemma, gemma_with("layer_types", {"full_attention"}));
    says("layer_types has a layer", gemma, gemma_with("layer_types", {"full_attention", "other"}));
    says("rope_parameters differ by layer", good,
         with("rope_parameters",
              {{"full_attention", {{"rope_type", "default"}}}, {"sliding_attention", {{"rope_type", "default"}}}}));
    says("the type 'yarn' is not supported", good, with("rope_scaling", {{"type", "yarn"}, {"factor", 2}}));
    says("'factor' is missing", good, with("rope_scaling", {{"type", "linear"}}));
    says("use_sliding_window is not supported", good, with("use_sliding_window", true));
    says("partial_rotary_factor is not supported", good, with("partial_rotary_factor", 0.5));
    says("num_attention_heads is no multiple", good, with("num_key_value_heads", 3));
    for (const int bad : {28, 30, 580, 1 << 24})
        says("config.json: head_dim " + std::to_string(bad) + " is not supported", good, with("head_dim", bad));
    says("it is no JSON object", good, tiny::json::array());

    const tiny::folder here;
    CHECK(refusal([&] { (void)read_model((here / "none").string()); }).find("cannot open") != std::string::npos);
    CHECK(refusal([&] { (void)read_model(here.path().string()); }).find("neither model.safetensors nor") != std::string::npos);
    tiny::write(here / "config.json", config.dump());
    tiny::write(here / "model.safetensors.index.json", R"({"weight_map": {"a": "../elsewhere"}})");
    CHECK(refusal([&] { (void)read_model(here.path().string()); }).find("the file of a is no plain file name") !=
          std::string::npos);
    tiny::write(here / "model.safetensors.index.json", R"({"weight_map": {"a": "shard"}})");
    CHECK(refusal([&] { (void)read_model(here.path().string()); }).find("shard: cannot open") != std::string::npos);
}

TEST_CASE("language_model/engine: a tile is sealed after its last token was attended to", "[engine]")
{
    for (const char* name : {"k4v4_g32:paper", "k2v3_g64:paper", "rotated_rtn3", "exact"})
        for (const std::size_t sink : {std::size_t{0}, std::size_t{37}, std::size_t{64}}) {
            CAPTURE(name, sink);
            fed_cache fed(name, sink, 300);
            const std::size_t group = fed.plan.group, whole = (sink + group - 1) / group * group;
            CHECK((fed.plan.storage == storage::exact || fed.plan.sink == whole));
            for (std::size_t t = 0; t < fed.length; ++t) {
                const bool exact = fed.plan.storage == storage::exact;
                CHECK(fed.cache.until_seal() == group - t % group);
                // Attention of token t: tiles that were full before it as the cache holds them, everything else as it was fed.
                auto held_k = empty_matrix(t), held_v = empty_matrix(t);
                if (t % 9 == 0 || t % group < 2 || t % group == group - 1) {
                    if (t != 0) fed.cache.read(0, 0, held_k, held_v);
                    const auto out = fed.step();
                    const auto expected = fed.expected(held_k, held_v, t + 1);
                    double difference = 0, norm = 0;
                    for (std::size_t i = 0; i < out.size(); ++i) {
                        difference += std::pow(static_cast<double>(out[i]) - expected[i], 2);
                        norm += expected[i] * expected[i];
                    }
                    CHECK(std::sqrt(difference / norm) < 2e-3);
                } else {
                    (void)fed.step();
                }
                fed.cache.finish();
                CHECK(fed.cache.tokens() == t + 1);
                CHECK(fed.cache.sealed_tokens() == (exact || t + 1 < whole ? 0 : (t + 1 - whole) / group * group));
            }
            // Sink and tail are the halves that were fed, sealed tokens are not.
            auto k = empty_matrix(fed.length), v = empty_matrix(fed.length);
            fed.cache.read(0, 0, k, v);
            for (std::size_t t = 0; t < fed.length; ++t) {
                bool same = true;
                for (std::size_t c = 0; c < 64; ++c)
                    same = same && k.token(1, t)[c] == kvarn::to_float(fed.k[(t * 2 + 1) * 64 + c]) &&
                           v.token(1, t)[c] == kvarn::to_float(fed.v[(t * 2 + 1) * 64 + c]);
                const bool sealed = t >= whole && t < whole + fed.cache.sealed_tokens();
                CHECK(same != sealed);
            }
        }
}

TEST_CASE("language_model/engine: sealed tiles are what the quantizers make of the halves", "[engine]")
{
    fed_cache fed("k3v2_g32:paper", 10, 32 + 3 * 32);
    while (fed.cache.tokens() < fed.length) {
        (void)fed.step();
        fed.cache.finish();
    }
    const kvarn::format& f = fed.plan.format;
    std::vector<std::byte> records(kvarn::grid_bytes(f, 3, 2)), scratch(kvarn::scratch_bytes(f));
    const auto grid = kvarn::tile_major_records(f, records.data(), records.size(), 3, 2);
    const auto view = [&](const std::vector<kvarn::half>& x) {
        return kvarn::token_major<const kvarn::half>(x.data() + 32 * 2 * 64, 96, 2, 64);
    };
    REQUIRE(kvarn::quantize_kv(f, view(fed.k), view(fed.v), grid, scratch, fed.plan.how) == kvarn::status::ok);
    auto k = empty_matrix(96), v = empty_matrix(96), held_k = empty_matrix(96), held_v = empty_matrix(96);
    REQUIRE(kvarn::dequantize_kv(f, grid, k.view(), v.view(), kvarn::basis::original, scratch) == kvarn::status::ok);
    fed.cache.read(0, 32, held_k, held_v);
    CHECK((held_k.values == k.values));
    CHECK((held_v.values == v.values));

    fed_cache rounded("kivi3_g32", 10, 128 + 128);
    while (rounded.cache.tokens() < rounded.length) {
        (void)rounded.step();
        rounded.cache.finish();
    }
    auto tile = empty_matrix(128), held = empty_matrix(128), unused = empty_matrix(128);
    for (std::size_t t = 0; t < 128; ++t)
        for (std::size_t head = 0; head < 2; ++head)
            for (std::size_t c = 0; c < 64; ++c)
                tile.token(head, t)[c] = kvarn::to_float(rounded.k[((t + 128) * 2 + head) * 64 + c]);
    kvarn_cli::round_per_channel(tile, 3, 32);
    rounded.cache.read(0, 128, held, unused);
    CHECK((tile.values == held.values));
}

TEST_CASE("language_model/engine: a step may go on behind the end of a tile", "[engine]")
{
    for (const char* name : {"k4v4_g32:paper", "rotated_rtn3", "kivi3_g64", "exact"}) {
        CAPTURE(name);
        fed_cache one(name, 32, 300), many(name, 32, 300);
        const std::size_t step = one.plan.group - 5;
        for (std::size_t t = 0; t < one.length; ++t) {
            (void)one.step();
            one.cache.finish();
        }
        for (std::size_t t = 0; t < many.length; t += step) {
            (void)many.step(std::min(step, many.length - t));
            many.cache.finish();
        }
        CHECK(one.cache.sealed_tokens() == many.cache.sealed_tokens());
        CHECK((one.cache.sealed_tokens() != 0) == (one.plan.storage != storage::exact));
        auto k = empty_matrix(300), v = empty_matrix(300), k2 = empty_matrix(300), v2 = empty_matrix(300);
        one.cache.read(0, 0, k, v);
        many.cache.read(0, 0, k2, v2);
        CHECK((k.values == k2.values));
        CHECK((v.values == v2.values));
    }
}

TEST_CASE("language_model/engine: a cache that chooses its basis holds what the better one holds, head by head", "[engine]")
{
    // KV head 0 has two large channels that its queries hardly look at, head 1 has heavy tails everywhere.
    const auto keys_of = [](const char* name) {
        fed_cache fed(name, 0, 64);
        std::mt19937 random(8);
        std::normal_distribution<float> normal;
        for (std::size_t i = 0; i < fed.k.size(); ++i) {
            const bool large = i % 64 == 5 || i % 64 == 37;
            const float x = normal(random), y = normal(random), z = normal(random);
            fed.k[i] = kvarn::to_half(i / 64 % 2 == 1 ? x * y * z : large ? 50.0f + 8.0f * x : 0.3f * x);
        }
        for (std::size_t i = 0; i < fed.q.size(); ++i)
            if (i / 64 < 3 && (i % 64 == 5 || i % 64 == 37)) fed.q[i] *= 0.01f;
        for (int t = 0; t < 64; ++t) {
            fed.step();
            fed.cache.finish();
        }
        kvarn_cli::matrix k{2, 64, 64, std::vector<float>(2 * 64 * 64)}, v = k;
        fed.cache.read(0, 0, k, v);
        return k;
    };
    const auto chosen = keys_of("k2v2_g64_auto"), rotated = keys_of("k2v2_g64"), original = keys_of("k2v2_g64_ko");
    for (std::size_t head = 0; head < 2; ++head)
        for (std::size_t t = 0; t < 64; ++t)
            for (std::size_t c = 0; c < 64; ++c)
                CHECK(chosen.token(head, t)[c] == (head == 0 ? original : rotated).token(head, t)[c]);
    CHECK(rotated.token(0, 3)[7] != original.token(0, 3)[7]);
}

TEST_CASE("language_model/engine: bytes are those of records, scalars, sink and tail", "[engine]")
{
    const cache_shape shape{3, 1, 128, 2};
    const auto bytes = [&](const char* name, std::size_t length) { return cache_bytes(plan_of(name, 128, {}), shape, length); };
    CHECK(bytes("exact", 1536) == 3 * 1536 * 512);
    CHECK(bytes("k2v2_g128", 1536) == 3 * (128 * 512 + 11 * 9728));
    CHECK(bytes("k2v2_g128", 1535) == 3 * ((128 + 127) * 512 + 10 * 9728));
    CHECK(bytes("k2v2_g128", 100) == 3 * 100 * 512);
    CHECK(bytes("rtn2", 256) == 3 * (128 * 512 + 128 * 2 * (32 + 4)));
    CHECK(bytes("kivi2_g32", 256) == 3 * (128 * 512 + 128 * 2 * (32 + 16)));
    CHECK(bytes("q4_0", 256) == 3 * (128 * 512 + 128 * 2 * (64 + 8)));
    CHECK(plan_of("k2v2_g128", 128, {}).sealed_bits() == 2.375);
    CHECK(plan_of("rotated_q4_0", 128, {}).sealed_bits() == 4.5);
    CHECK(plan_of("exact", 128, {}).sealed_bits() == 16);
    const std::pair<const char*, double> bits[] = {{"turboquant4", 4.25}, {"turboquant2", 2.25}, {"q5_1", 6},
                                                   {"kivi2_g64", 2.5},    {"fp8_tensor", 8},     {"fp8_token", 8.5}};
    for (const auto& [name, expected] : bits) CHECK(plan_of(name, 64, {}).sealed_bits() == expected);
}

TEST_CASE("language_model/engine: rules give layers and heads other bits", "[engine]")
{
    const plan_options of_model{128, {}, 3, 2};
    const cache_plan plan = plan_of("k2v2_g128:refined+0=k4v2+*/-1=k3v8+1..2/0=k5v6", 128, of_model);
    const auto is = [&](std::size_t layer, std::size_t head, int key_bits, int value_bits) {
        const kvarn::format f = plan.format_of(layer, head);
        return f.key_bits() == key_bits && f.value_bits() == value_bits && f.group() == 128;
    };
    CHECK((is(0, 0, 4, 2) && is(0, 1, 3, 8) && is(1, 0, 5, 6) && is(1, 1, 3, 8) && is(2, 0, 5, 6) && is(2, 1, 3, 8)));
    const double bytes = 3 * kvarn::record_bytes(plan.format_of(0, 1)) + 2 * kvarn::record_bytes(plan.format_of(1, 0)) +
                         kvarn::record_bytes(plan.format_of(0, 0));
    CHECK(std::fabs(plan.sealed_token_bytes() - bytes / (6 * 128)) < 1e-9);
    CHECK(cache_bytes(plan, {3, 2, 128, 1}, 128 + 256) == 6 * 128 * 512 + 2 * bytes);
}

TEST_CASE("language_model/engine: names of caches", "[engine]")
{
    for (const char* name : {"exact",
                             "rtn2",
                             "rtn8",
                             "rotated_rtn3",
                             "kivi2_g32",
                             "kivi2_g64",
                             "kivi4_g128",
                             "q4_0",
                             "q5_0",
                             "q8_0",
                             "q4_1",
                             "q5_1",
                             "turboquant2",
                             "turboquant4",
                             "fp8_tensor",
                             "fp8_token",
                             "rotated_q5_0",
                             "k2v2_g128",
                             "k2v2_g128:paper",
                             "k2v2_g128:refined",
                             "k8v3_g32",
                             "k2v2_g128_ko",
                             "k2v2_g128_auto:paper",
                             "k4v4_g64_kovo",
                             "k2v2_g128_auto+0=k4v2"})
        CHECK(plan_of(name, 128, {}).name == name);
    CHECK(plan_of("k2v2_g128_auto:paper", 128, {}).choose_basis);
    CHECK(!plan_of("k2v2_g128", 128, {}).choose_basis);
    CHECK(!plan_of("k2v2_g128_ko", 128, {}).format.keys_rotated());
    CHECK(plan_of("k2v2_g128:refined", 128, {}).how.encoder == kvarn::encoder::refined);
    CHECK(plan_of("k2v2_g128:paper", 128, {}).how.encoder == kvarn::encoder::paper);
    CHECK(plan_of("k2v2_g128", 128, {}).how.encoder == kvarn::encode_options{}.encoder);
    CHECK(plan_of("k2v2_g128", 128, {128, 3}).how.iterations == 3);
    CHECK(plan_of("k2v2_g128", 128, {128, 3}).how.refined_iterations == 3);
    CHECK(plan_of("k2v2_g128", 128, {}).how.iterations == kvarn::encode_options{}.iterations);
    for (const char* name : {"",
                             "Exact",
                             "rtn",
                             "rtn7",
                             "rtn22",
                             "rotated_",
                             "rotated_kivi2_g32",
                             "kivi2",
                             "kivi2_g16",
                             "kivi2_g640",
                             "q6_0",
                             "q8_1",
                             "rotated_q5_1",
                             "turboquant5",
                             "turboquant",
                             "fp8",
                             "fp8_head",
                             "fp8_tokens",
                             "rotated_fp8_token",
                             "q4_00",
                             "k2v2",
                             "k2v2_g128 ",
                             "rotated_exact"})
        CHECK(refusal([&] { (void)plan_of(name, 128, {}); }).find("there is no cache") == 0);
    CHECK(refusal([&] { (void)plan_of("k7v2_g128", 128, {}); }).find("bits must be") != std::string::npos);
    CHECK(refusal([&] { (void)plan_of("k4v0_g128", 128, {}); }).find("bits of their own") != std::string::npos);
    CHECK(refusal([&] { (void)plan_of("k2v2_g128:best", 128, {}); }).find("no encoder 'best'") != std::string::npos);
    CHECK(refusal([&] { (void)plan_of("k2v2_g128", 44, {}); }).find("head_dim must be") != std::string::npos);
    CHECK(refusal([&] { (void)plan_of("rotated_rtn2", 44, {}); }).find("cannot be rotated") != std::string::npos);
    CHECK(refusal([&] { (void)plan_of("turboquant2", 44, {}); }).find("cannot be rotated") != std::string::npos);
    CHECK(refusal([&] { (void)plan_of("q4_0", 44, {}); }).find("groups of 32") != std::string::npos);
    CHECK(refusal([&] { (void)plan_of("kivi2_g64", 96, {}); }).find("groups of 64") != std::string::npos);
    CHECK(plans_of("exact,rtn2", 128, {}).size() == 2);
    for (const char* name : {"rtn2+0=k4v4", "kivi2_g128+0=k4v4", "exact+0=k4v4"})
        CHECK(refusal([&] { (void)plan_of(name, 128, {}); }).find("only k<bits>v<bits> caches have rules") != std::string::npos);
    for (const char* rule :
         {"", "0", "0=k4", "0=v4", "0=k4v", "x=k4v4", "0..=k4v4", "0..1..2=k4v4", "0/=k4v4", "0=k7v4", "0=k4v0", "0=k4v4 "})
        CHECK(refusal([&] { (void)plan_of(std::string("k2v2_g128:paper+") + rule, 128, {}); }).find("is no rule") !=
              std::string::npos);
    for (const char* rule : {"3=k4v4", "-4=k4v4", "2..1=k4v4", "0/2=k4v4"})
        CHECK(refusal([&] {
                  (void)plan_of(std::string("k2v2_g128+") + rule, 128, {128, {}, 3, 2});
              }).find("does not have") != std::string::npos);
    CHECK(refusal([&] { (void)plans_of("exact,,rtn2", 128, {}); }).find("there is no cache ''") == 0);
    CHECK(refusal([&] { (void)plans_of("rtn2,rtn2", 128, {}); }).find("twice") != std::string::npos);
}

TEST_CASE("language_model/engine: results do not depend on the number of threads", "[engine]")
{
    experiment e;
    e.model = &chasing_model();
    for (std::size_t i = 0; i < 3; ++i) {
        e.sequences.push_back(walk(i));
        e.sequences.back().resize(500);
    }
    e.known = 490;  // the walk itself is not reached: continuations are compared with the exact cache's
    const auto plans = plans_of("exact,rtn2,k2v2_g128:paper", 128, {});
    e.from = 490;
    const auto figures = [&](unsigned threads) {
        e.threads = threads;
        nlohmann::json all = nlohmann::json::parse(json_report(evaluate(e, plans, {true, true, true}), e));
        for (nlohmann::json& one : all) one.erase("cache_tokens_per_second");
        return all;
    };
    const nlohmann::json one = figures(1);
    CHECK(figures(5) == one);
    CHECK(one[0]["hops"] == 10);
    CHECK(one[0]["kl"] == 0);
}

TEST_CASE("language_model/engine: pseudo-decoding, static and accumulated", "[engine]")
{
    experiment e;
    e.model = &chasing_model();
    e.sequences.push_back(walk(2));
    e.sequences.back().resize(700);
    e.known = 600;
    const auto blocks = pseudo(e, plan_of("k2v2_g128:paper", 128, {}), 0);
    REQUIRE(blocks.size() == 5);  // of 128; 60 tokens are left over
    for (std::size_t i = 0; i < blocks.size(); ++i) {
        const block_result& b = blocks[i];
        CAPTURE(i);
        CHECK((b.first == 128 * i && b.tokens == 128));
        CHECK(b.fixed.k_scale.size() == 3 * 128);
        // The first layer sees embeddings, which no error reaches: there both runs are the same.
        CHECK(b.accumulated.attention[0].relative() == Approx(b.fixed.attention[0].relative()).margin(1e-6));
        if (i < 2) {
            CHECK(b.fixed.attention[1].relative() < 1e-5);  // nothing is sealed yet
            CHECK(b.accumulated.attention[1].relative() < 1e-3);
            CHECK(b.kl < 1e-4);
        } else {
            CHECK(b.fixed.attention[1].relative() > 0.05);
            CHECK(b.accumulated.attention[2].relative() > 1.02 * b.fixed.attention[2].relative());
            CHECK(b.accumulated.k.relative() > 1.02 * b.fixed.k.relative());
            CHECK(b.kl > 1);
        }
        CHECK((b.fixed.k.relative() > 0.3) == (i != 0));
        CHECK((b.fixed.v.relative() > 0.3) == (i != 0));
    }
    for (const block_result& b : pseudo(e, exact_plan(chasing_model()), 0)) {
        CHECK(b.accumulated.attention[2].relative() == 0);
        CHECK(b.fixed.v.relative() == 0);
        CHECK(b.kl == 0);
    }
}

TEST_CASE("language_model/engine: a divergence is zero for equals, positive for others, and right by hand", "[engine]")
{
    using namespace evaluate_detail;
    const float a[] = {1, 2, 3}, b[] = {3, 2, 1}, large[] = {1000, 0, -1000};
    std::vector<double> p, q, r;
    log_softmax(a, 3, p);
    log_softmax(b, 3, q);
    log_softmax(large, 3, r);
    CHECK(divergence(p, p) == 0);
    const double z = std::exp(1.0) + std::exp(2.0) + std::exp(3.0);
    CHECK(p[0] == Approx(1 - std::log(z)));
    CHECK(divergence(p, q) == Approx((std::exp(1.0) * -2 + std::exp(3.0) * 2) / z));
    CHECK(r[0] == Approx(0));
    CHECK(divergence(r, r) == 0);
}
