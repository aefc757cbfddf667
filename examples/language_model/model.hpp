// SPDX-License-Identifier: Apache-2.0
#pragma once
// The weights of a decoder-only transformer as row-major float matrices [out][in], read from one safetensors file or
// from a directory as Hugging Face lays it out. Every tensor is checked; one that is missing, misshapen or not known
// to the forward pass is a failure that names it. Matrices with the same input are stacked: q, k, v, and gate, up.

#include <algorithm>
#include <cstddef>
#include <filesystem>
#include <map>
#include <string>
#include <vector>

#include <Eigen/Core>

#include "config.hpp"
#include "safetensors.hpp"

namespace language_model {

using matrix = Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
using row_vector = Eigen::RowVectorXf;

struct layer_weights {
    row_vector attention_norm, mlp_norm;
    row_vector post_attention_norm, post_mlp_norm;  ///< of what attention and MLP add; empty: none
    matrix qkv;                                     ///< query heads, key heads, value heads
    row_vector qkv_bias;
    matrix o;
    row_vector o_bias;
    row_vector q_norm, k_norm;  ///< per channel of a head; empty: none
    matrix gate_up, down;
};

struct model {
    model_config config;
    matrix embedding;  ///< [vocabulary][hidden]
    matrix output;     ///< the same; empty when tied
    row_vector norm;
    std::vector<layer_weights> layers;

    [[nodiscard]] const matrix& head() const noexcept { return config.tied ? embedding : output; }
};

namespace model_detail {

/// Where a tensor of the file goes.
struct destination {
    std::vector<std::size_t> shape;
    float* to = nullptr;
    bool required = true;
    bool found = false;
};
using destinations = std::map<std::string, destination>;

/// Makes room for all weights of the configuration and says where each tensor goes. `present` are those that some
/// file holds.
[[nodiscard]] inline destinations allocate(model& m, const std::map<std::string, tensor_entry>& present)
{
    const model_config& c = m.config;
    const auto index = [](std::size_t n) { return static_cast<Eigen::Index>(n); };
    destinations to;
    const auto add_matrix = [&](const std::string& name, matrix& x, std::size_t first_row, std::size_t rows) {
        to[name] = {{rows, static_cast<std::size_t>(x.cols())}, x.data() + index(first_row) * x.cols()};
    };
    const auto add_vector = [&](const std::string& name, row_vector& x, std::size_t first, std::size_t n, bool required) {
        to[name] = {{n}, x.data() + first, required};
    };
    m.embedding.resize(index(c.vocabulary), index(c.hidden));
    m.norm.resize(index(c.hidden));
    add_matrix("model.embed_tokens.weight", m.embedding, 0, c.vocabulary);
    add_vector("model.norm.weight", m.norm, 0, c.hidden, true);
    if (!c.tied) {
        m.output.resize(index(c.vocabulary), index(c.hidden));
        add_matrix("lm_head.weight", m.output, 0, c.vocabulary);
    }
    const std::size_t q = c.heads * c.head_dim, kv = c.kv_heads * c.head_dim;
    m.layers.resize(c.layers);
    for (std::size_t i = 0; i < c.layers; ++i) {
        layer_weights& l = m.layers[i];
        const std::string layer = "model.layers." + std::to_string(i) + ".", attention = layer + "self_attn.",
                          mlp = layer + "mlp.";
        l.attention_norm.resize(index(c.hidden));
        l.mlp_norm.resize(index(c.hidden));
        l.qkv.resize(index(q + 2 * kv), index(c.hidden));
        l.qkv_bias.setZero(index(q + 2 * kv));
        l.o.resize(index(c.hidden), index(q));
        l.gate_up.resize(index(2 * c.intermediate), index(c.hidden));
        l.down.resize(index(c.hidden), index(c.intermediate));
        add_vector(layer + "input_layernorm.weight", l.attention_norm, 0, c.hidden, true);
        add_vector(layer + (c.post_norms ? "pre_feedforward_layernorm.weight" : "post_attention_layernorm.weight"), l.mlp_norm, 0,
                   c.hidden, true);
        if (c.post_norms)
            for (const auto& [name, norm] : {std::pair{"post_attention_layernorm.weight", &l.post_attention_norm},
                                             std::pair{"post_feedforward_layernorm.weight", &l.post_mlp_norm}}) {
                norm->resize(index(c.hidden));
                add_vector(layer + name, *norm, 0, c.hidden, true);
            }
        const struct {
            const char* name;
            std::size_t first, rows;
        } parts[] = {{"q_proj", 0, q}, {"k_proj", q, kv}, {"v_proj", q + kv, kv}};
        for (const auto& part : parts) {
            add_matrix(attention + part.name + ".weight", l.qkv, part.first, part.rows);
            add_vector(attention + part.name + ".bias", l.qkv_bias, part.first, part.rows, false);
        }
        add_matrix(attention + "o_proj.weight", l.o, 0, c.hidden);
        if (present.contains(attention + "o_proj.bias")) {
            l.o_bias.resize(index(c.hidden));
            add_vector(attention + "o_proj.bias", l.o_bias, 0, c.hidden, true);
        }
        for (const auto& [name, norm] : {std::pair{"q_norm.weight", &l.q_norm}, std::pair{"k_norm.weight", &l.k_norm}})
            if (c.head_norms || present.contains(attention + name)) {
                norm->resize(index(c.head_dim));
                add_vector(attention + name, *norm, 0, c.head_dim, true);
            }
        add_matrix(mlp + "gate_proj.weight", l.gate_up, 0, c.intermediate);
        add_matrix(mlp + "up_proj.weight", l.gate_up, c.intermediate, c.intermediate);
        add_matrix(mlp + "down_proj.weight", l.down, 0, c.hidden);
    }
    return to;
}

/// Copies the tensors of one file to where they belong.
inline void fill(destinations& to, const safetensors& file, bool tied)
{
    for (const auto& [name, entry] : file.entries()) {
        if (name.ends_with("rotary_emb.inv_freq") || (tied && name == "lm_head.weight")) continue;  // known, not needed
        const auto found = to.find(name);
        if (found == to.end()) throw failure(file.path() + ": the tensor " + name + " has no place in this kind of model");
        const std::vector<float> values = file.floats(name, found->second.shape);
        std::copy(values.begin(), values.end(), found->second.to);
        found->second.found = true;
    }
}

/// For models whose norms multiply by 1 + weight.
inline void add_one_to_norms(model& m)
{
    m.norm.array() += 1.0f;
    for (layer_weights& l : m.layers)
        for (row_vector* norm : {&l.attention_norm, &l.mlp_norm, &l.post_attention_norm, &l.post_mlp_norm, &l.q_norm, &l.k_norm})
            norm->array() += 1.0f;
}

[[nodiscard]] inline json read_json(const std::string& path)
{
    const std::vector<std::byte> file = kvarn_cli::read_file(path);
    return parse_json({reinterpret_cast<const char*>(file.data()), file.size()}, 32, path);
}

/// The files that hold the tensors: one, or the shards of an index.
[[nodiscard]] inline std::vector<std::string> tensor_files(const std::filesystem::path& directory)
{
    namespace fs = std::filesystem;
    const fs::path whole = directory / "model.safetensors", index = directory / "model.safetensors.index.json";
    if (fs::exists(whole)) return {whole.string()};
    if (!fs::exists(index))
        for (const auto& entry : fs::directory_iterator(directory)) require_no_gguf(entry.path().string());
    if (!fs::exists(index))
        throw failure(directory.string() + ": there is neither model.safetensors nor model.safetensors.index.json");
    std::vector<std::string> files;
    for (const std::string& name : shards_of(read_json(index.string()), index.string()))
        files.push_back((directory / name).string());
    return files;
}

}  // namespace model_detail

/// Reads a directory, or a single file: with the config.json that lies beside it, or else as a pointer-chasing decoder.
[[nodiscard]] inline model read_model(const std::string& path)
{
    namespace fs = std::filesystem;
    using namespace model_detail;
    const bool is_directory = fs::is_directory(path);
    const fs::path config = is_directory ? fs::path(path) / "config.json" : fs::path(path).parent_path() / "config.json";
    const std::vector<std::string> names = is_directory ? tensor_files(path) : std::vector<std::string>{path};
    if (is_directory && names.empty()) throw failure(path + ": its index names no file");

    // Shards are read twice, so that only one is in memory at a time: first for their names, then for their values.
    model m;
    bool configured = false;
    if (fs::exists(config)) {
        m.config = parse_config(read_json(config.string()), config.string());
        configured = true;
    } else if (is_directory) {
        throw failure(config.string() + ": cannot open: there is no such file");
    }
    std::map<std::string, tensor_entry> present;
    std::vector<safetensors> single;
    for (const std::string& name : names) {
        safetensors file = read_safetensors(name);
        present.insert(file.entries().begin(), file.entries().end());
        if (!configured) m.config = guess_config(file);
        configured = true;
        apply_metadata(m.config, file);
        if (names.size() == 1) single.push_back(std::move(file));
    }
    const model_config& c = m.config;
    require_sizes(c, present, path);
    destinations to = allocate(m, present);
    if (!single.empty())
        fill(to, single.front(), c.tied);
    else
        for (const std::string& name : names) fill(to, read_safetensors(name), c.tied);
    for (const auto& [name, place] : to)
        if (place.required && !place.found) throw failure(path + ": the tensor " + name + " is missing");
    if (c.offset_norms) add_one_to_norms(m);
    return m;
}

}  // namespace language_model
