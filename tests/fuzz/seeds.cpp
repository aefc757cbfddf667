// SPDX-License-Identifier: Apache-2.0
// Writes the seed corpora: `seeds <folder>` makes <folder>/<target>/<name>, small valid inputs of every kind, the same each time.

#include <cstdio>
#include <filesystem>
#include <fstream>
#include <span>
#include <string>
#include <vector>

#include "examples/common/npy.hpp"
#include "examples/kvarn/container.hpp"
#include "fuzz.hpp"
#include "saved_files.hpp"
#include "tests/support/bytes_output.hpp"
#if __has_include(<nlohmann/json.hpp>)
#include "tests/language_model/tiny_model.hpp"
#define KVARN_FUZZ_JSON 1
#endif

namespace {

namespace fs = std::filesystem;

fs::path root;

void write(const char* target, const std::string& name, std::span<const std::byte> content)
{
    fs::create_directories(root / target);
    std::ofstream out(root / target / name, std::ios::binary);
    out.write(reinterpret_cast<const char*>(content.data()), static_cast<std::streamsize>(content.size()));
    if (!out.flush()) throw std::runtime_error("cannot write " + name);
}

void write(const char* target, const std::string& name, const std::string& content)
{
    write(target, name, std::as_bytes(std::span(content.data(), content.size())));
}

std::vector<std::byte> random_bytes(std::uint64_t seed, std::size_t size)
{
    fuzz::random_source random(seed);
    std::vector<std::byte> bytes(size);
    for (std::byte& b : bytes) b = static_cast<std::byte>(random.bits() & 0xff);
    return bytes;
}

void write_npy_seeds()
{
    using namespace kvarn_cli;
    for (const auto type : {element_type::float16, element_type::float32}) {
        support::bytes_output out;
        write_npy(out, type, 2, 3, 4, {1, -2, 0.5f, 65504, 0, -0.0f, 1e-8f, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19});
        write("npy", name_of(type), out.content);
    }
    const auto file = [](char major, std::string dict, std::size_t data_bytes) {
        dict += '\n';
        std::string out("\x93NUMPY", 6);
        out += {major, '\0', static_cast<char>(dict.size() & 0xff), static_cast<char>(dict.size() >> 8)};
        if (major > 1) out += {'\0', '\0'};
        return out + dict + std::string(data_bytes, '\x3c');
    };
    write("npy", "version2", file('\2', "{'descr': '<f2', 'fortran_order': False, 'shape': (2, 3)}", 12));
    write("npy", "version3", file('\3', "{\"shape\": (1, 1, 2,), \"fortran_order\": False, \"descr\": \"<f4\", }", 8));
    write("npy", "int32", file('\1', "{'descr': '<i4', 'fortran_order': False, 'shape': (2, 3), }", 24));
    write("npy", "int64", file('\1', "{'descr': '<i8', 'fortran_order': False, 'shape': (1, 2), }", 16));
}

void write_containers()
{
    const auto add = [](const char* name, std::vector<kvarn::format_spec> specs, kvarn_cli::element_type type, std::size_t heads, std::size_t tokens,
                        kvarn::record_stride stride = kvarn::record_stride::packed) {
        kvarn_cli::container c;
        c.formats.clear();
        for (const kvarn::format_spec& spec : specs) c.formats.push_back(*kvarn::make_format(spec));
        c.stride = stride;
        c.encoder = 1;
        c.iterations = 1;
        c.type = type;
        c.heads = heads;
        c.tokens = tokens;
        kvarn_cli::container_sizes sizes;
        if (!kvarn_cli::sizes_of(c, sizes)) throw std::runtime_error(name);
        c.records = random_bytes(1, sizes.records);
        c.k_tail = random_bytes(2, sizes.k_tail);
        c.v_tail = random_bytes(3, sizes.v_tail);
        support::bytes_output out;
        kvarn_cli::write_container(out, c);
        write("container", name, out.content);
    };
    using enum kvarn_cli::element_type;
    kvarn::format_spec spec{.head_dim_k = 32, .head_dim_v = 32, .key_bits = 2, .value_bits = 2, .group = 32};
    add("tail_only", {spec}, float16, 1, 1);
    add("tile_and_tail", {spec}, float32, 1, 33);
    kvarn::format_spec other = spec;
    other.key_bits = 3;
    other.value_rotation = kvarn::rotation::none;
    add("formats_by_head", {spec, other}, float16, 2, 33);
    spec.value_bits = 0;
    spec.exact_channels = 4;
    add("latent", {spec}, float16, 2, 33);
    spec = {.head_dim_k = 36, .head_dim_v = 44, .key_bits = 3, .value_bits = 5, .group = 32, .key_rotation = kvarn::rotation::none,
            .value_rotation = kvarn::rotation::none};
    add("unrotated", {spec}, float16, 1, 32, kvarn::record_stride::reference);
}

void write_files()
{
    const auto add = [](const char* name, kvarn::file_kind kind, std::initializer_list<std::size_t> payloads) {
        std::vector<std::byte> out(4096);
        kvarn::buffer_writer writer{kvarn::buffer_sink(out)};
        bool ok = writer.begin(kind) == kvarn::status::ok;
        std::uint64_t number = 0;
        for (const std::size_t bytes : payloads)
            ok = ok && writer.chunk(kvarn::chunk_type(number % 2 == 0 ? "data" : "rest"), number, random_bytes(number, bytes)) == kvarn::status::ok, ++number;
        if (!ok || writer.finish() != kvarn::status::ok) throw std::runtime_error(name);
        out.resize(static_cast<std::size_t>(writer.bytes()));
        write("file", name, out);
    };
    add("empty", kvarn::file_kind::records, {});
    add("one", kvarn::file_kind::sequence, {5});
    add("three", kvarn::file_kind::records, {0, 17, 300});
}

void write_saved()
{
    using namespace saved_files;
    const auto add = [](const std::string& name, unsigned setup, const contents& x) {
        const kvarn::cache_config config = config_of(setup);
        std::vector<std::byte> memory(kvarn::plan_cache(config)->bytes()), out{static_cast<std::byte>(setup), std::byte{5}};
        const auto pool = kvarn::make_pool(config, memory);
        if (!pool) throw std::runtime_error(name);
        contents part = x;
        for (part.first_layer = 0; part.first_layer < 2; part.first_layer += part.layers) {
            const auto file = make(*pool, part);
            out.insert(out.end(), file.begin(), file.end());
        }
        write("saved", name, out);
    };
    contents x;
    x.first_position = x.next_position = 5;
    for (unsigned setup = 0; setup < setups; ++setup) add("empty_" + std::to_string(setup), setup, x);
    x.spans = {{5, 0, 3, sink_flag, 0}, {9, 20, 2, 0, 0}};
    x.next_position = 11;
    x.committed = 5;
    x.count = 2;
    for (unsigned setup = 0; setup < setups; ++setup) add("exact_" + std::to_string(setup), setup, x);
    x.layers = 1;
    add("layers", 0, x);
    x = {};
    x.spans = {{0, 0, 32, sealed_flag, 0}, {40, 0, 9, sealed_flag, 0}, {60, 20, 12, sealed_flag | same_block_flag, 0}, {72, 0, 4, 0, 0}};
    x.next_position = 80;
    x.committed = 57;
    x.count = 4;
    add("records", 0, x);
    add("latent_records", 1, x);
}

#if defined(KVARN_FUZZ_JSON)
void write_safetensors()
{
    const tiny::tensors three{{"a", {"F32", {2, 3}, {1, 2, 3, 4, 5, 6}}}, {"b", {"F16", {4}, {0.5f, -1, 2, 8}}}, {"c", {"BF16", {1, 2}, {3, -7}}}};
    write("safetensors", "three", tiny::safetensors_file(three, {{"task", "none"}, {"embedding_scale", "1.5"}}));
    write("safetensors", "empty", tiny::safetensors_file("{}   ", ""));
    // The least decoder whose configuration can be guessed, and its shapes alone, of tensors without values.
    const tiny::tensors least{{"model.embed_tokens.weight", {"F16", {1, 1}, {1}}},
                              {"model.layers.0.input_layernorm.weight", {"BF16", {1}, {1}}},
                              {"model.layers.0.mlp.gate_proj.weight", {"F16", {1, 1}, {1}}},
                              {"model.layers.0.self_attn.k_proj.weight", {"F16", {128, 1}, std::vector<float>(128, 1)}},
                              {"model.layers.0.self_attn.q_proj.weight", {"F16", {128, 1}, std::vector<float>(128, 1)}}};
    write("safetensors", "decoder", tiny::safetensors_file(least));
    std::string shapes;
    for (const auto& [name, tensor] : least) {
        shapes.append(shapes.empty() ? "{\"" : ",\"").append(name).append(R"(":{"dtype":"X","shape":[)");
        if (tensor.shape.size() == 2) shapes.append(std::to_string(tensor.shape[0])).append(",");
        shapes.append(R"(256],"data_offsets":[0,0]})");
    }
    write("safetensors", "shapes", tiny::safetensors_file(shapes + "}", ""));
}

void write_configs()
{
    const std::string sizes = R"("hidden_size":256,"num_hidden_layers":2,"num_attention_heads":4,"intermediate_size":64,)"
                              R"("vocab_size":99,"rms_norm_eps":1e-5)";
    write("config", "llama", R"({"model_type":"llama","hidden_act":"silu",)" + sizes +
                                 R"(,"rope_theta":500000.0,"rope_scaling":{"rope_type":"llama3","factor":8.0,"low_freq_factor":1.0,)"
                                 R"("high_freq_factor":4.0,"original_max_position_embeddings":8192}})");
    write("config", "mistral", R"({"model_type":"mistral",)" + sizes + R"(,"num_key_value_heads":2,"sliding_window":128})");
    write("config", "qwen2", R"({"model_type":"qwen2",)" + sizes +
                                 R"(,"use_sliding_window":false,"tie_word_embeddings":true,"rope_scaling":{"type":"linear","factor":4}})");
    write("config", "qwen3", R"({"model_type":"qwen3",)" + sizes +
                                 R"(,"head_dim":128,"rope_parameters":{"rope_type":"default","rope_theta":1e6,"partial_rotary_factor":1.0}})");
    const std::string gemma = R"({"model_type":"gemma3_text","hidden_activation":"gelu_pytorch_tanh","sliding_window":512,"head_dim":256,)" + sizes;
    write("config", "gemma3", gemma + R"(,"query_pre_attn_scalar":256,"sliding_window_pattern":2,"rope_local_base_freq":1e4,"rope_theta":1e6})");
    write("config", "gemma3_newer",
          gemma + R"(,"layer_types":["sliding_attention","full_attention"],"rope_parameters":{"full_attention":{"rope_type":"linear",)"
                  R"("factor":8.0,"rope_theta":1e6},"sliding_attention":{"rope_type":"default","rope_theta":1e4}}})");
    write("config", "index", R"({"metadata":{},"weight_map":{"a":"model-1.safetensors","b":"model-2.safetensors"}})");
    write("config", "values", R"([null,true,-1,1.5e3,"\u00e9\n",{},[[]]])");
}
#endif

/// Targets that draw their case from the input: any bytes are a case.
void write_cases()
{
    for (const auto& [target, sizes] : {std::pair{"format", std::vector<std::size_t>{24, 40}}, {"packing", {20, 200}}, {"rotate", {30, 60}},
                                        {"seal", {40, 80, 300}}, {"open", {40, 80, 300}}, {"attend", {60, 120, 400}},
                                        {"cache", {200, 600, 1900}}})
        for (const std::size_t size : sizes)
            for (std::uint64_t seed = 0; seed < 4; ++seed)
                write(target, std::to_string(size) + "_" + std::to_string(seed), random_bytes(size + seed, size));
    for (std::uint64_t seed = 0; seed < 12; ++seed) {  // what spans a file is made of
        auto drawn = random_bytes(seed, 200);
        drawn[0] = static_cast<std::byte>(0x80 | (seed % 4 == 3 ? 0x40 : 0) | seed % saved_files::setups);
        write("saved", "drawn_" + std::to_string(seed), drawn);
    }
    for (const char* name : {"k4v2_g128", "kvarn_k8v0_g32"}) write("format", name, std::string("\x01\x80\0\x80\0", 5) + name);
}

}  // namespace

int main(int argc, char** argv)
{
    if (argc != 2) return std::fputs("usage: seeds <folder>\n", stderr), 2;
    root = argv[1];
    write_npy_seeds();
    write_containers();
    write_files();
    write_saved();
#if defined(KVARN_FUZZ_JSON)
    write_safetensors();
    write_configs();
#endif
    write_cases();
    return 0;
}
