// SPDX-License-Identifier: Apache-2.0
#pragma once
// Small random models for the tests: a safetensors writer, a directory writer, and the forward pass in double with plain loops,
// written from the definition of the architecture and sharing no code with the example.

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <map>
#include <numbers>
#include <random>
#include <string>
#include <vector>

#include <nlohmann/json.hpp>

#include <kvarn/base/element.hpp>

#include "examples/common/failure.hpp"

namespace tiny {

namespace fs = std::filesystem;
using nlohmann::json;

/// What the failure that `action` ends with says.
template <class Action>
std::string refusal(Action action)
{
    try {
        action();
    } catch (const kvarn_cli::failure& f) {
        return f.what();
    }
    return "accepted";
}

/// A folder that goes away with the test.
class folder {
public:
    folder()
    {
        std::random_device random;
        path_ = fs::temp_directory_path() / ("kvarn_language_model_test_" + std::to_string(random()) + std::to_string(random()));
        fs::create_directories(path_);
    }
    folder(const folder&) = delete;
    folder& operator=(const folder&) = delete;
    ~folder()
    {
        std::error_code ignored;
        fs::remove_all(path_, ignored);
    }
    [[nodiscard]] const fs::path& path() const { return path_; }
    [[nodiscard]] fs::path operator/(const std::string& name) const { return path_ / name; }

private:
    fs::path path_;
};

struct tensor {
    std::string type = "F32";
    std::vector<std::size_t> shape;
    std::vector<float> values;  ///< already rounded to what the type holds
};
using tensors = std::map<std::string, tensor>;

inline std::string raw(const tensor& t)
{
    std::string out;
    for (const float x : t.values) {
        const kvarn::half h = kvarn::to_half(x);
        const kvarn::bfloat16 b = kvarn::to_bfloat16(x);
        if (t.type == "F32")
            out.append(reinterpret_cast<const char*>(&x), 4);
        else if (t.type == "F16")
            out.append(reinterpret_cast<const char*>(&h), 2);
        else
            out.append(reinterpret_cast<const char*>(&b), 2);
    }
    return out;
}

/// Header text and data to the bytes of a file.
inline std::string safetensors_file(const std::string& header, const std::string& data)
{
    const std::uint64_t length = header.size();
    return std::string(reinterpret_cast<const char*>(&length), 8) + header + data;
}

inline std::string safetensors_file(const tensors& all, const json& metadata = {})
{
    json header = json::object();
    std::string data;
    if (!metadata.empty()) header["__metadata__"] = metadata;
    for (const auto& [name, t] : all) {
        const std::string bytes = raw(t);
        header[name] = {{"dtype", t.type}, {"shape", t.shape}, {"data_offsets", {data.size(), data.size() + bytes.size()}}};
        data += bytes;
    }
    return safetensors_file(header.dump(), data);
}

inline void write(const fs::path& path, const std::string& content)
{
    std::ofstream(path, std::ios::binary) << content;
}

/// A .npy file of int32 or int64.
template <class T>
std::string npy_file(const std::vector<T>& values, std::size_t rows, std::size_t columns)
{
    std::string dict = "{'descr': '<i" + std::to_string(sizeof(T)) + "', 'fortran_order': False, 'shape': (" +
                       std::to_string(rows) + ", " + std::to_string(columns) + "), }";
    dict.resize(117, ' ');
    dict += '\n';
    return std::string("\x93NUMPY\x01\x00\x76\x00", 10) + dict +
           std::string(reinterpret_cast<const char*>(values.data()), values.size() * sizeof(T));
}

/// What a random model is made with.
struct spec {
    std::string kind = "qwen2", type = "F32";
    std::size_t layers = 2, hidden = 64, heads = 4, kv_heads = 2, head_dim = 32, intermediate = 96, vocabulary = 50;
    bool biases = true, output_bias = false, head_norms = false, tied = true;
    double theta = 10000, epsilon = 1e-5;
    json rope_scaling;  ///< null: none
    std::size_t window = 0;
    // gemma3_text only: every pattern-th layer sees everything, the others the window; the file as newer versions write it
    std::size_t pattern = 6;
    bool newer = false;
    double query_scalar = 32, local_theta = 5000;

    [[nodiscard]] bool gemma() const { return kind == "gemma3_text"; }
    [[nodiscard]] bool local(std::size_t layer) const { return gemma() && (layer + 1) % pattern != 0; }
};

inline tensors random_tensors(const spec& s, unsigned seed)
{
    std::mt19937 random(seed);
    tensors all;
    const auto add = [&](const std::string& name, std::vector<std::size_t> shape, float mean, float deviation) {
        std::normal_distribution<float> normal(mean, deviation);
        tensor t{s.type, std::move(shape), {}};
        std::size_t n = 1;
        for (const std::size_t extent : t.shape) n *= extent;
        for (std::size_t i = 0; i < n; ++i) {
            const float x = normal(random);
            t.values.push_back(s.type == "F16"    ? kvarn::to_float(kvarn::to_half(x))
                               : s.type == "BF16" ? kvarn::to_float(kvarn::to_bfloat16(x))
                                                  : x);
        }
        all[name] = t;
    };
    const std::size_t q = s.heads * s.head_dim, kv = s.kv_heads * s.head_dim;
    const float small = 1.2f / std::sqrt(static_cast<float>(s.hidden)), unit = s.gemma() ? 0 : 1;  // the mean of a norm's weights
    add("model.embed_tokens.weight", {s.vocabulary, s.hidden}, 0, 1);
    add("model.norm.weight", {s.hidden}, unit, 0.2f);
    if (!s.tied) add("lm_head.weight", {s.vocabulary, s.hidden}, 0, small);
    for (std::size_t i = 0; i < s.layers; ++i) {
        const std::string layer = "model.layers." + std::to_string(i) + ".", attention = layer + "self_attn.";
        add(layer + "input_layernorm.weight", {s.hidden}, unit, 0.2f);
        add(layer + "post_attention_layernorm.weight", {s.hidden}, unit, 0.2f);
        if (s.gemma()) {
            add(layer + "pre_feedforward_layernorm.weight", {s.hidden}, unit, 0.2f);
            add(layer + "post_feedforward_layernorm.weight", {s.hidden}, unit, 0.2f);
        }
        add(attention + "q_proj.weight", {q, s.hidden}, 0, small);
        add(attention + "k_proj.weight", {kv, s.hidden}, 0, small);
        add(attention + "v_proj.weight", {kv, s.hidden}, 0, small);
        add(attention + "o_proj.weight", {s.hidden, q}, 0, small);
        if (s.biases) {
            add(attention + "q_proj.bias", {q}, 0, 0.5f);
            add(attention + "k_proj.bias", {kv}, 0, 0.5f);
            add(attention + "v_proj.bias", {kv}, 0, 0.5f);
        }
        if (s.output_bias) add(attention + "o_proj.bias", {s.hidden}, 0, 0.5f);
        if (s.head_norms) {
            add(attention + "q_norm.weight", {s.head_dim}, unit, 0.2f);
            add(attention + "k_norm.weight", {s.head_dim}, unit, 0.2f);
        }
        add(layer + "mlp.gate_proj.weight", {s.intermediate, s.hidden}, 0, small);
        add(layer + "mlp.up_proj.weight", {s.intermediate, s.hidden}, 0, small);
        add(layer + "mlp.down_proj.weight", {s.hidden, s.intermediate}, 0, small);
    }
    return all;
}

inline json config_of(const spec& s)
{
    json c{{"model_type", s.kind},
           {"hidden_size", s.hidden},
           {"num_hidden_layers", s.layers},
           {"num_attention_heads", s.heads},
           {"num_key_value_heads", s.kv_heads},
           {"head_dim", s.head_dim},
           {"intermediate_size", s.intermediate},
           {"rms_norm_eps", s.epsilon},
           {"rope_theta", s.theta},
           {"hidden_act", "silu"},
           {"vocab_size", s.vocabulary},
           {"tie_word_embeddings", s.tied},
           {"architectures", {"ignored"}}};
    if (!s.rope_scaling.is_null()) c["rope_scaling"] = s.rope_scaling;
    if (s.window != 0) c["sliding_window"] = s.window;
    if (!s.gemma()) return c;
    c.erase("hidden_act");
    c["hidden_activation"] = "gelu_pytorch_tanh";
    c["query_pre_attn_scalar"] = s.query_scalar;
    if (!s.newer) {
        c["sliding_window_pattern"] = s.pattern;
        c["rope_local_base_freq"] = s.local_theta;
        return c;
    }
    json full = s.rope_scaling.is_null() ? json{{"rope_type", "default"}} : s.rope_scaling;
    full["rope_theta"] = s.theta;
    c.erase("rope_theta");
    c.erase("rope_scaling");
    c["rope_parameters"] = {{"full_attention", full}, {"sliding_attention", {{"rope_type", "default"}, {"rope_theta", s.local_theta}}}};
    for (std::size_t i = 0; i < s.layers; ++i) c["layer_types"].push_back(s.local(i) ? "sliding_attention" : "full_attention");
    return c;
}

/// config.json and the tensors in one file, or in two shards with their index.
inline void write_directory(const fs::path& directory, const spec& s, const tensors& all, bool sharded = false)
{
    fs::create_directories(directory);
    write(directory / "config.json", config_of(s).dump());
    if (!sharded) {
        write(directory / "model.safetensors", safetensors_file(all));
        return;
    }
    tensors part[2];
    json index{{"metadata", {{"total_size", 1}}}, {"weight_map", json::object()}};
    std::size_t number = 0;
    for (const auto& [name, t] : all) {
        const std::size_t shard = number++ % 2;
        part[shard][name] = t;
        index["weight_map"][name] = "model-0000" + std::to_string(shard + 1) + "-of-00002.safetensors";
    }
    for (std::size_t i = 0; i < 2; ++i)
        write(directory / ("model-0000" + std::to_string(i + 1) + "-of-00002.safetensors"), safetensors_file(part[i]));
    write(directory / "model.safetensors.index.json", index.dump());
}

/// Logits [token][vocabulary] in double. K and V pass through half, as in a cache.
inline std::vector<std::vector<double>> reference_logits(const spec& s, const tensors& all, const std::vector<int>& tokens)
{
    using row = std::vector<double>;
    const auto weights = [&](const std::string& name) -> const tensor& { return all.at(name); };
    const auto product = [&](const std::string& name, const row& x) {
        const tensor& w = weights(name + ".weight");
        row y(w.shape[0], 0.0);
        for (std::size_t i = 0; i < y.size(); ++i)
            for (std::size_t j = 0; j < x.size(); ++j) y[i] += static_cast<double>(w.values[i * x.size() + j]) * x[j];
        if (const auto bias = all.find(name + ".bias"); bias != all.end())
            for (std::size_t i = 0; i < y.size(); ++i) y[i] += static_cast<double>(bias->second.values[i]);
        return y;
    };
    const auto norm = [&](const std::string& name, const double* x, std::size_t n) {
        double sum = 0;
        for (std::size_t i = 0; i < n; ++i) sum += x[i] * x[i];
        row y(n);
        for (std::size_t i = 0; i < n; ++i)
            y[i] = x[i] / std::sqrt(sum / static_cast<double>(n) + s.epsilon) * ((s.gemma() ? 1 : 0) + static_cast<double>(weights(name).values[i]));
        return y;
    };
    const auto rotate = [&](double* x, std::size_t position, bool local) {
        for (std::size_t i = 0; i < s.head_dim / 2; ++i) {
            double f = 1 / std::pow(local ? s.local_theta : s.theta, static_cast<double>(2 * i) / static_cast<double>(s.head_dim));
            const json r = local ? json{} : s.rope_scaling;
            const std::string kind = r.is_null() ? "default" : r.contains("type") ? r["type"] : r["rope_type"];
            if (kind == "linear") {
                f /= r["factor"].get<double>();
            } else if (kind == "llama3") {
                const double wave = 2 * std::numbers::pi / f, old = r["original_max_position_embeddings"], factor = r["factor"];
                const double low = r["low_freq_factor"], high = r["high_freq_factor"];
                if (wave > old / low) {
                    f /= factor;
                } else if (wave >= old / high) {
                    const double smooth = (old / wave - low) / (high - low);
                    f = (1 - smooth) * f / factor + smooth * f;
                }
            }
            const double angle = f * static_cast<double>(position), a = x[i], b = x[i + s.head_dim / 2];
            x[i] = a * std::cos(angle) - b * std::sin(angle);
            x[i + s.head_dim / 2] = b * std::cos(angle) + a * std::sin(angle);
        }
    };
    std::vector<row> hidden;
    for (const int token : tokens) {
        const auto begin = weights("model.embed_tokens.weight").values.begin() +
                           static_cast<std::ptrdiff_t>(token) * static_cast<std::ptrdiff_t>(s.hidden);
        hidden.emplace_back(begin, begin + static_cast<std::ptrdiff_t>(s.hidden));
        for (double& h : hidden.back()) h *= s.gemma() ? std::sqrt(static_cast<double>(s.hidden)) : 1;
    }
    for (std::size_t layer = 0; layer < s.layers; ++layer) {
        const std::string name = "model.layers." + std::to_string(layer) + ".", attention = name + "self_attn.";
        std::vector<row> keys, values;
        for (std::size_t t = 0; t < hidden.size(); ++t) {
            row& h = hidden[t];
            const row x = norm(name + "input_layernorm.weight", h.data(), s.hidden);
            row q = product(attention + "q_proj", x), k = product(attention + "k_proj", x), v = product(attention + "v_proj", x);
            for (auto [heads, which, file] :
                 {std::tuple{s.heads, &q, "q_norm.weight"}, std::tuple{s.kv_heads, &k, "k_norm.weight"}})
                for (std::size_t head = 0; head < heads; ++head) {
                    double* const one = which->data() + head * s.head_dim;
                    if (s.head_norms) {
                        const row normed = norm(attention + file, one, s.head_dim);
                        std::copy(normed.begin(), normed.end(), one);
                    }
                    rotate(one, t, s.local(layer));
                }
            for (row* stored : {&k, &v})
                for (double& e : *stored) e = static_cast<double>(kvarn::to_float(kvarn::to_half(static_cast<float>(e))));
            keys.push_back(k);
            values.push_back(v);
            row out(s.heads * s.head_dim, 0.0);
            const std::size_t first = s.window != 0 && (!s.gemma() || s.local(layer)) && t + 1 > s.window ? t + 1 - s.window : 0;
            for (std::size_t head = 0; head < s.heads; ++head) {
                const std::size_t at = head * s.head_dim, kv = head / (s.heads / s.kv_heads) * s.head_dim;
                row weight(t + 1, 0.0);
                double sum = 0;
                for (std::size_t u = first; u <= t; ++u) {
                    double score = 0;
                    for (std::size_t i = 0; i < s.head_dim; ++i) score += q[at + i] * keys[u][kv + i];
                    sum += weight[u] = std::exp(score / std::sqrt(s.gemma() ? s.query_scalar : static_cast<double>(s.head_dim)));
                }
                for (std::size_t u = first; u <= t; ++u)
                    for (std::size_t i = 0; i < s.head_dim; ++i) out[at + i] += weight[u] / sum * values[u][kv + i];
            }
            row projected = product(attention + "o_proj", out);
            if (s.gemma()) projected = norm(name + "post_attention_layernorm.weight", projected.data(), s.hidden);
            for (std::size_t i = 0; i < s.hidden; ++i) h[i] += projected[i];
            const row y = norm(name + (s.gemma() ? "pre_feedforward_layernorm.weight" : "post_attention_layernorm.weight"), h.data(), s.hidden);
            row gate = product(name + "mlp.gate_proj", y);
            const row up = product(name + "mlp.up_proj", y);
            for (std::size_t i = 0; i < gate.size(); ++i) {
                const double g = gate[i];
                gate[i] = up[i] * (s.gemma() ? g / 2 * (1 + std::tanh(std::sqrt(2 / std::numbers::pi) * (g + 0.044715 * g * g * g)))
                                             : g / (1 + std::exp(-g)));
            }
            row down = product(name + "mlp.down_proj", gate);
            if (s.gemma()) down = norm(name + "post_feedforward_layernorm.weight", down.data(), s.hidden);
            for (std::size_t i = 0; i < s.hidden; ++i) h[i] += down[i];
        }
    }
    std::vector<row> logits;
    for (const row& h : hidden) {
        const row x = norm("model.norm.weight", h.data(), s.hidden);
        logits.push_back(product(s.tied ? "model.embed_tokens" : "lm_head", x));
    }
    return logits;
}

inline std::vector<int> random_tokens(std::size_t n, std::size_t vocabulary, unsigned seed)
{
    std::mt19937 random(seed);
    std::vector<int> tokens(n);
    for (int& t : tokens) t = static_cast<int>(random() % vocabulary);
    return tokens;
}

}  // namespace tiny
