// SPDX-License-Identifier: Apache-2.0
#pragma once
// What a model is, read from the config.json of a Llama, Mistral, Qwen2, Qwen3 or Gemma 3 directory, or from the
// tensors of one file alone. In: JSON, or names and shapes. Out: sizes and constants. Whatever would change the
// arithmetic and is not known here is refused by name.

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <map>
#include <numbers>
#include <string>
#include <utility>
#include <vector>

#include "safetensors.hpp"

namespace language_model {

struct model_config {
    std::size_t hidden = 0, layers = 0, heads = 0, kv_heads = 0, head_dim = 0, intermediate = 0, vocabulary = 0;
    float norm_epsilon = 1e-6f;
    float softmax_scale = 0;                ///< 0: 1 / sqrt(head_dim)
    std::vector<double> rope_frequencies;   ///< [head_dim / 2], radians per position
    std::vector<double> local_frequencies;  ///< those of layers with a window; empty: the same
    std::vector<std::int64_t> windows;      ///< tokens that a query sees, layer by layer; 0: all. Empty: all, in every layer
    bool tied = true;                       ///< the output layer is the embedding table
    bool head_norms = false;                ///< queries and keys are normalised; false: if the tensors for it are there
    bool post_norms = false;                ///< what attention and MLP add is normalised too
    bool offset_norms = false;              ///< norms multiply by 1 + weight
    bool gelu = false;                      ///< the MLP's activation; false: silu
    float embedding_scale = 1.0f;
    std::string task;  ///< from the metadata of the file; empty: a general language model

    [[nodiscard]] std::size_t group_heads() const noexcept { return heads / kv_heads; }
    [[nodiscard]] std::int64_t window(std::size_t layer) const { return windows.empty() ? 0 : windows[layer]; }
    [[nodiscard]] bool is_local(std::size_t layer) const { return !local_frequencies.empty() && window(layer) != 0; }
};

namespace config_detail {

inline constexpr std::size_t most_extent = std::size_t{1} << 24;  // keeps every product of two sizes far from overflow
inline constexpr std::size_t most_layers = 4096;                  // bounds what a damaged file can ask for

/// Reads one JSON object; every complaint names the file and the key.
class reader {
public:
    reader(const json& object, std::string path) : object_(object), path_(std::move(path))
    {
        if (!object_.is_object()) throw failure(path_ + ": it is no JSON object");
    }

    [[nodiscard]] bool has(const char* key) const { return object_.contains(key) && !object_[key].is_null(); }
    [[nodiscard]] const json& at(const char* key) const
    {
        if (!has(key)) throw failure(path_ + ": '" + key + "' is missing");
        return object_[key];
    }
    [[nodiscard]] std::size_t size(const char* key) const
    {
        const json& value = at(key);
        if (!value.is_number_unsigned() || value.get<std::uint64_t>() == 0 || value.get<std::uint64_t>() > most_extent)
            throw failure(path_ + ": '" + key + "' is no whole number from 1 to " + std::to_string(most_extent));
        return value.get<std::size_t>();
    }
    [[nodiscard]] double positive(const char* key) const
    {
        const json& value = at(key);
        // Within 1e-30 and 1e30, float can hold it, and neither products nor quotients of a few such numbers overflow.
        if (!value.is_number() || !(value.get<double>() >= 1e-30) || !(value.get<double>() <= 1e30))
            throw failure(path_ + ": '" + key + "' is no positive number from 1e-30 to 1e30");
        return value.get<double>();
    }
    [[nodiscard]] bool flag(const char* key, bool otherwise) const
    {
        if (!has(key)) return otherwise;
        if (!at(key).is_boolean()) throw failure(path_ + ": '" + key + "' is neither true nor false");
        return at(key).get<bool>();
    }
    [[nodiscard]] std::string word(const char* key) const
    {
        if (!at(key).is_string()) throw failure(path_ + ": '" + key + "' is no text");
        return at(key).get<std::string>();
    }
    [[nodiscard]] reader inside(const char* key) const { return {at(key), path_ + ": " + key}; }
    [[noreturn]] void refuse(const std::string& what) const { throw failure(path_ + ": " + what); }

private:
    const json& object_;
    std::string path_;
};

[[nodiscard]] inline std::vector<double> plain_frequencies(std::size_t head_dim, double theta)
{
    std::vector<double> f(head_dim / 2);
    for (std::size_t i = 0; i < f.size(); ++i)
        f[i] = std::pow(theta, -2.0 * static_cast<double>(i) / static_cast<double>(head_dim));
    return f;
}

/// Slows the frequencies down as the `rope_scaling` object says; `scaling` has its kind under rope_type or, in older
/// files, type.
inline void scale_frequencies(std::vector<double>& frequencies, const reader& scaling)
{
    const std::string kind = scaling.word(scaling.has("rope_type") ? "rope_type" : "type");
    if (kind == "default") return;
    if (kind != "linear" && kind != "llama3") scaling.refuse("the type '" + kind + "' is not supported, linear and llama3 are");
    const double factor = scaling.positive("factor");
    if (kind == "linear") {
        for (double& f : frequencies) f /= factor;
        return;
    }
    const double low = scaling.positive("low_freq_factor"), high = scaling.positive("high_freq_factor");
    const double trained = scaling.positive("original_max_position_embeddings");
    if (!(high > low)) scaling.refuse("high_freq_factor is not above low_freq_factor");
    for (double& f : frequencies) {
        // Turns over the context that the model was trained on: few turns are slowed down, many are kept, a ramp lies
        // between.
        const double turns = trained * f / (2 * std::numbers::pi);
        const double kept = std::clamp((turns - low) / (high - low), 0.0, 1.0);
        f = kept * f + (1 - kept) * f / factor;
    }
}

/// What Gemma 3 has besides: layers that see a window, with a RoPE of their own, and more norms.
inline void parse_gemma3(model_config& c, const reader& in)
{
    for (const char* const key : {"attn_logit_softcapping", "final_logit_softcapping"})
        if (in.has(key)) in.refuse(std::string(key) + " is not supported");
    if (in.flag("use_bidirectional_attention", false)) in.refuse("use_bidirectional_attention is not supported");
    c.head_norms = c.post_norms = c.offset_norms = c.gelu = true;
    c.embedding_scale = std::sqrt(static_cast<float>(c.hidden));
    c.softmax_scale =
        static_cast<float>(1 / std::sqrt(in.has("query_pre_attn_scalar") ? in.positive("query_pre_attn_scalar") : 256.0));
    const auto window = static_cast<std::int64_t>(in.size("sliding_window"));
    const char* const newer = "layer_types";
    if (in.has(newer)) {
        if (!in.at(newer).is_array() || in.at(newer).size() != c.layers) in.refuse("layer_types is no list of one word a layer");
        for (const json& type : in.at(newer)) {
            if (type != "full_attention" && type != "sliding_attention")
                in.refuse("layer_types has a layer that is neither full_attention nor sliding_attention");
            c.windows.push_back(type == "full_attention" ? 0 : window);
        }
        return;
    }
    const std::size_t pattern = in.has("sliding_window_pattern") ? in.size("sliding_window_pattern") : 6;
    if (c.layers > most_layers) in.refuse("num_hidden_layers is more than " + std::to_string(most_layers));
    for (std::size_t i = 1; i <= c.layers; ++i) c.windows.push_back(i % pattern == 0 ? 0 : window);
}

/// The frequencies of RoPE: `rope_theta` and scaling, from the top of the file or from an object of their own in
/// newer ones.
inline void parse_rope(model_config& c, const reader& in, double theta)
{
    const char *const newer = "rope_parameters", *const full = "full_attention", *const local = "sliding_attention";
    const auto read = [&](const reader& rope, double otherwise, bool is_newer) {
        if (rope.has("partial_rotary_factor") && rope.positive("partial_rotary_factor") != 1.0)
            rope.refuse("partial_rotary_factor is not supported");
        std::vector<double> f = plain_frequencies(c.head_dim, rope.has("rope_theta") ? rope.positive("rope_theta") : otherwise);
        if (is_newer)
            scale_frequencies(f, rope);
        else if (rope.has("rope_scaling"))
            scale_frequencies(f, rope.inside("rope_scaling"));
        return f;
    };
    const bool is_newer = in.has(newer), by_layer = is_newer && in.inside(newer).has(full);
    if (by_layer && c.windows.empty()) in.refuse("rope_parameters differ by layer, which is not supported for this kind");
    c.rope_frequencies = by_layer   ? read(in.inside(newer).inside(full), theta, true)
                         : is_newer ? read(in.inside(newer), theta, true)
                                    : read(in, theta, false);
    if (!c.offset_norms) return;
    c.local_frequencies =
        by_layer ? read(in.inside(newer).inside(local), 10000.0, true)
                 : plain_frequencies(c.head_dim, in.has("rope_local_base_freq") ? in.positive("rope_local_base_freq") : 10000.0);
}

}  // namespace config_detail

/// Reads config.json. `path` is for messages.
[[nodiscard]] inline model_config parse_config(const json& object, const std::string& path)
{
    const config_detail::reader in(object, path);
    const std::string kind = in.word("model_type");
    const bool gemma = kind == "gemma3_text";
    if (kind != "llama" && kind != "mistral" && kind != "qwen2" && kind != "qwen3" && !gemma)
        in.refuse("the model_type '" + kind + "' is not supported: llama, mistral, qwen2, qwen3 and gemma3_text are");
    const char *const activation = gemma ? "hidden_activation" : "hidden_act", *const known =
                                                                                   gemma ? "gelu_pytorch_tanh" : "silu";
    if (in.has(activation) && in.word(activation) != known)
        in.refuse("the " + std::string(activation) + " '" + in.word(activation) + "' is not supported: " + known + " is");
    model_config c;
    c.hidden = in.size("hidden_size");
    c.layers = in.size("num_hidden_layers");
    c.heads = in.size("num_attention_heads");
    c.kv_heads = in.has("num_key_value_heads") ? in.size("num_key_value_heads") : c.heads;
    c.intermediate = in.size("intermediate_size");
    c.vocabulary = in.size("vocab_size");
    c.norm_epsilon = static_cast<float>(in.positive("rms_norm_eps"));
    c.tied = in.flag("tie_word_embeddings", gemma);
    c.head_norms = kind == "qwen3";
    if (c.heads % c.kv_heads != 0) in.refuse("num_attention_heads is no multiple of num_key_value_heads");
    if (!in.has("head_dim") && c.hidden % c.heads != 0) in.refuse("hidden_size is no multiple of num_attention_heads");
    c.head_dim = in.has("head_dim") ? in.size("head_dim") : c.hidden / c.heads;
    if (c.head_dim < 32 || c.head_dim > 576 || c.head_dim % 4 != 0)
        in.refuse("head_dim " + std::to_string(c.head_dim) + " is not supported: multiples of 4 from 32 to 576 are");

    if (gemma) config_detail::parse_gemma3(c, in);
    config_detail::parse_rope(c, in, gemma ? 1e6 : 10000.0);
    if (kind != "mistral" && in.flag("use_sliding_window", false))
        in.refuse("use_sliding_window is not supported: its layers would differ");
    if (kind == "mistral" && in.has("sliding_window")) {
        if (c.layers > config_detail::most_layers)
            in.refuse("num_hidden_layers is more than " + std::to_string(config_detail::most_layers));
        c.windows.assign(c.layers, static_cast<std::int64_t>(in.size("sliding_window")));
    }
    return c;
}

/// The configuration of a file that stands alone: a decoder as the pointer-chasing one, 128 channels a head, RoPE
/// base 10000.
[[nodiscard]] inline model_config guess_config(const safetensors& file)
{
    const auto shape = [&](const std::string& name) {
        const auto found = file.entries().find(name);
        if (found == file.entries().end()) throw failure(file.path() + ": the tensor " + name + " is missing");
        const std::vector<std::size_t>& s = found->second.shape;
        if (s.size() != 2 || s[0] == 0 || s[1] == 0 || s[0] > config_detail::most_extent || s[1] > config_detail::most_extent)
            throw failure(file.path() + ": " + name + " has the shape " + shape_text(s) + ", two dimensions are needed");
        return s;
    };
    model_config c;
    c.head_dim = 128;
    c.vocabulary = shape("model.embed_tokens.weight")[0];
    c.hidden = shape("model.embed_tokens.weight")[1];
    const std::string first = "model.layers.0.";
    for (const auto& [name, rows] : {std::pair{"q_proj", &c.heads}, std::pair{"k_proj", &c.kv_heads}}) {
        *rows = shape(first + "self_attn." + name + ".weight")[0] / c.head_dim;
        if (*rows == 0) throw failure(file.path() + ": " + first + "self_attn." + name + ".weight has less than 128 rows");
    }
    if (c.heads % c.kv_heads != 0) throw failure(file.path() + ": the query heads are no multiple of the KV heads");
    c.intermediate = shape(first + "mlp.gate_proj.weight")[0];
    while (file.entries().contains("model.layers." + std::to_string(c.layers) + ".input_layernorm.weight")) ++c.layers;
    if (c.layers == 0) throw failure(file.path() + ": the tensor " + first + "input_layernorm.weight is missing");
    c.rope_frequencies = config_detail::plain_frequencies(c.head_dim, 10000.0);
    return c;
}

/// Takes over what only our own files say, in their metadata.
inline void apply_metadata(model_config& c, const safetensors& file)
{
    if (const auto found = file.metadata().find("task"); found != file.metadata().end()) c.task = found->second;
    if (const auto found = file.metadata().find("embedding_scale"); found != file.metadata().end()) {
        char* end = nullptr;
        c.embedding_scale = std::strtof(found->second.c_str(), &end);
        if (found->second.empty() || end != found->second.c_str() + found->second.size() || !std::isfinite(c.embedding_scale))
            throw failure(file.path() + ": its metadata 'embedding_scale' are no number");
    }
}

/// Fails unless the tensors that the sizes stand for are there and as large, in every layer: before room is made for
/// what a damaged configuration only claims. `path` is for messages.
inline void require_sizes(const model_config& c, const std::map<std::string, tensor_entry>& entries, const std::string& path)
{
    const auto require = [&](const std::string& name, const std::vector<std::size_t>& shape) {
        const auto found = entries.find(name);
        if (found == entries.end()) throw failure(path + ": the tensor " + name + " is missing");
        const tensor_entry& entry = found->second;
        if (entry.shape != shape)
            throw failure(path + ": " + name + " has the shape " + shape_text(entry.shape) + ", " + shape_text(shape) +
                          " is needed");
        if (!holds_floats(entry))
            throw failure(path + ": " + name + " has the type " + entry.type + ", only F32, F16 and BF16 are read");
    };
    require("model.embed_tokens.weight", {c.vocabulary, c.hidden});
    for (std::size_t i = 0; i < c.layers; ++i) {
        const std::string layer = "model.layers." + std::to_string(i) + ".";
        require(layer + "input_layernorm.weight", {c.hidden});
        require(layer + "self_attn.q_proj.weight", {c.heads * c.head_dim, c.hidden});
        require(layer + "self_attn.k_proj.weight", {c.kv_heads * c.head_dim, c.hidden});
        require(layer + "mlp.gate_proj.weight", {c.intermediate, c.hidden});
    }
}

}  // namespace language_model
