// SPDX-License-Identifier: Apache-2.0
#pragma once
// Files in the safetensors format: eight bytes with the length of a JSON header, the header, the data of all tensors.
// In: the whole file in memory. Out: names, types, shapes and metadata; a tensor of F32, F16 or BF16 as floats. The
// reader trusts no field: lengths, nesting, offsets and the sizes that shapes ask for are checked before anything is
// used.

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <initializer_list>
#include <map>
#include <set>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <nlohmann/json.hpp>

#include <kvarn/base/element.hpp>

#include "../common/failure.hpp"
#include "../common/files.hpp"

namespace language_model {

using kvarn_cli::bytes;
using kvarn_cli::failure;
using nlohmann::json;

/// Parses JSON from a file that may hold anything: nesting is bounded, and no key may appear twice in one object.
[[nodiscard]] inline json parse_json(std::string_view text, std::size_t most_depth, const std::string& path)
{
    std::vector<std::set<std::string>> keys;
    std::size_t depth = 0;
    const auto watch = [&](int, json::parse_event_t event, json& parsed) {
        switch (event) {
        case json::parse_event_t::object_start:
        case json::parse_event_t::array_start:
            if (++depth > most_depth) throw failure(path + ": its JSON is nested too deeply");
            keys.emplace_back();
            break;
        case json::parse_event_t::object_end:
        case json::parse_event_t::array_end:
            --depth;
            keys.pop_back();
            break;
        case json::parse_event_t::key:
            if (auto key = parsed.get<std::string>(); !keys.back().insert(key).second)
                throw failure(path + ": its JSON has the key '" + key + "' twice");
            break;
        case json::parse_event_t::value: break;
        }
        return true;
    };
    try {
        return json::parse(text.begin(), text.end(), watch);
    } catch (const json::parse_error& e) {
        throw failure(path + ": its JSON is malformed at byte " + std::to_string(e.byte));
    } catch (const json::exception&) {
        throw failure(path + ": its JSON holds a number that is too large");
    }
}

/// One tensor of a file: where it lies and what it claims to be.
struct tensor_entry {
    std::string type;
    std::vector<std::size_t> shape;
    std::size_t begin = 0, end = 0;  ///< bytes of the data part
};

namespace safetensors_detail {

inline constexpr std::size_t most_header_bytes = 100'000'000;  // what the format's own implementation accepts

/// Bytes of one element; 0 for a type that this reader does not know.
[[nodiscard]] inline std::size_t element_size(std::string_view type) noexcept
{
    static constexpr std::pair<std::string_view, std::size_t> known[] = {
        {"F32", 4}, {"F16", 2}, {"BF16", 2}, {"F64", 8}, {"I64", 8},  {"U64", 8},     {"I32", 4},    {"U32", 4},
        {"I16", 2}, {"U16", 2}, {"I8", 1},   {"U8", 1},  {"BOOL", 1}, {"F8_E4M3", 1}, {"F8_E5M2", 1}};
    for (const auto& [name, size] : known)
        if (name == type) return size;
    return 0;
}

[[nodiscard]] inline tensor_entry entry_of(const json& fields, std::size_t data_bytes, const std::string& where)
{
    const auto number = [&](const json& x) {
        if (!x.is_number_unsigned()) throw failure(where + ": a size is no whole number");
        const auto value = x.get<std::uint64_t>();
        if (value > SIZE_MAX) throw failure(where + ": a size is too large");
        return static_cast<std::size_t>(value);
    };
    tensor_entry entry;
    if (!fields.is_object() || !fields.contains("dtype") || !fields["dtype"].is_string() || !fields.contains("shape") ||
        !fields["shape"].is_array() || !fields.contains("data_offsets") || !fields["data_offsets"].is_array() ||
        fields["data_offsets"].size() != 2)
        throw failure(where + ": the header does not give dtype, shape and data_offsets");
    entry.type = fields["dtype"].get<std::string>();
    entry.begin = number(fields["data_offsets"][0]);
    entry.end = number(fields["data_offsets"][1]);
    if (entry.begin > entry.end || entry.end > data_bytes)
        throw failure(where + ": its data would lie at bytes " + std::to_string(entry.begin) + " to " +
                      std::to_string(entry.end) + " of " + std::to_string(data_bytes));
    std::size_t size = element_size(entry.type);
    const bool known = size != 0;
    for (const json& extent : fields["shape"]) {
        entry.shape.push_back(number(extent));
        if (known && !kvarn_cli::multiply(size, entry.shape.back(), size)) throw failure(where + ": its shape is too large");
    }
    if (known && size != entry.end - entry.begin)
        throw failure(where + ": its shape needs " + std::to_string(size) + " bytes, it has " +
                      std::to_string(entry.end - entry.begin));
    return entry;
}

}  // namespace safetensors_detail

/// Whether safetensors::floats reads it.
[[nodiscard]] inline bool holds_floats(const tensor_entry& entry) noexcept
{
    return entry.type == "F32" || entry.type == "F16" || entry.type == "BF16";
}

/// [2, 3] as people write it.
[[nodiscard]] inline std::string shape_text(const std::vector<std::size_t>& shape)
{
    std::string out = "[";
    for (std::size_t i = 0; i < shape.size(); ++i) out += (i == 0 ? "" : ", ") + std::to_string(shape[i]);
    return out + "]";
}

/// A parsed file. It owns the bytes, so entries can be read as long as it lives.
class safetensors {
public:
    safetensors(std::vector<std::byte> file, std::string path) : file_(std::move(file)), path_(std::move(path))
    {
        using namespace safetensors_detail;
        std::uint64_t header_bytes = 0;
        if (file_.size() < sizeof header_bytes) throw failure(path_ + ": not a safetensors file: it is shorter than 8 bytes");
        std::memcpy(&header_bytes, file_.data(), sizeof header_bytes);
        const std::size_t rest = file_.size() - sizeof header_bytes;
        if (header_bytes > most_header_bytes || header_bytes > rest)
            throw failure(path_ + ": not a usable safetensors file: its header would have " + std::to_string(header_bytes) +
                          " bytes, the file has " + std::to_string(rest) + " after its first 8");
        const auto length = static_cast<std::size_t>(header_bytes);
        data_ = bytes(file_).subspan(sizeof header_bytes + length);
        const json header = parse_json({reinterpret_cast<const char*>(file_.data()) + sizeof header_bytes, length}, 4, path_);
        if (!header.is_object()) throw failure(path_ + ": not a safetensors file: its header is no JSON object");
        for (const auto& [name, fields] : header.items()) {
            if (name == "__metadata__") {
                if (!fields.is_object()) throw failure(path_ + ": its metadata are no JSON object");
                for (const auto& [key, value] : fields.items()) {
                    if (!value.is_string()) throw failure(path_ + ": its metadata '" + key + "' are no text");
                    metadata_[key] = value.get<std::string>();
                }
            } else {
                entries_[name] = entry_of(fields, data_.size(), path_ + ": " + name);
            }
        }
        require_apart();
    }

    safetensors(const safetensors&) = delete;
    safetensors& operator=(const safetensors&) = delete;
    safetensors(safetensors&&) noexcept = default;
    safetensors& operator=(safetensors&&) noexcept = default;

    [[nodiscard]] const std::string& path() const noexcept { return path_; }
    [[nodiscard]] const std::map<std::string, tensor_entry>& entries() const noexcept { return entries_; }
    [[nodiscard]] const std::map<std::string, std::string>& metadata() const noexcept { return metadata_; }

    /// The values of a tensor that must be there, of F32, F16 or BF16 and, unless `shape` is empty, of that shape.
    [[nodiscard]] std::vector<float> floats(const std::string& name, const std::vector<std::size_t>& shape = {}) const
    {
        const auto found = entries_.find(name);
        if (found == entries_.end()) throw failure(path_ + ": the tensor " + name + " is missing");
        const tensor_entry& entry = found->second;
        if (!shape.empty() && entry.shape != shape)
            throw failure(path_ + ": " + name + " has the shape " + shape_text(entry.shape) + ", " + shape_text(shape) +
                          " is needed");
        const std::byte* const from = data_.data() + entry.begin;
        const std::size_t size = entry.end - entry.begin;
        if (entry.type == "F32") {
            std::vector<float> values(size / 4);
            if (size != 0) std::memcpy(values.data(), from, size);
            return values;
        }
        if (entry.type == "F16") return widened<kvarn::half>(from, size);
        if (entry.type == "BF16") return widened<kvarn::bfloat16>(from, size);
        throw failure(path_ + ": " + name + " has the type " + entry.type + ", only F32, F16 and BF16 are read");
    }

private:
    /// No byte belongs to two tensors: what a header can ask for is bounded by the size of the file.
    void require_apart() const
    {
        std::vector<const std::pair<const std::string, tensor_entry>*> order;
        for (const auto& entry : entries_)
            if (entry.second.begin != entry.second.end) order.push_back(&entry);
        std::sort(order.begin(), order.end(), [](const auto* a, const auto* b) { return a->second.begin < b->second.begin; });
        for (std::size_t i = 1; i < order.size(); ++i)
            if (order[i]->second.begin < order[i - 1]->second.end)
                throw failure(path_ + ": " + order[i]->first + ": its data overlap those of " + order[i - 1]->first);
    }

    /// The data need not be aligned, so each element is copied out.
    template <class T>
    [[nodiscard]] static std::vector<float> widened(const std::byte* from, std::size_t size)
    {
        std::vector<float> values(size / sizeof(T));
        for (std::size_t i = 0; i < values.size(); ++i) {
            T x{};
            std::memcpy(&x, from + i * sizeof(T), sizeof(T));
            values[i] = kvarn::to_float(x);
        }
        return values;
    }

    std::vector<std::byte> file_;
    std::string path_;
    bytes data_;
    std::map<std::string, tensor_entry> entries_;
    std::map<std::string, std::string> metadata_;
};

/// The files beside model.safetensors.index.json that hold the tensors. `path` is the index's, for messages.
[[nodiscard]] inline std::set<std::string> shards_of(const json& index, const std::string& path)
{
    if (!index.is_object() || !index.contains("weight_map") || !index["weight_map"].is_object())
        throw failure(path + ": 'weight_map' is missing");
    std::set<std::string> names;
    for (const auto& [tensor, shard] : index["weight_map"].items()) {
        if (!shard.is_string() || std::filesystem::path(shard.get<std::string>()).filename() != shard.get<std::string>())
            throw failure(path + ": the file of " + tensor + " is no plain file name");
        names.insert(shard.get<std::string>());
    }
    return names;
}

/// Fails for a file of the other format that models come in, before all of it is read.
inline void require_no_gguf(const std::string& path)
{
    char magic[4] = {};
    const kvarn_cli::file_handle file(std::fopen(path.c_str(), "rb"));
    if (file && std::fread(magic, 1, sizeof magic, file.get()) == sizeof magic && std::string_view(magic, 4) == "GGUF")
        throw failure(path + ": this is a GGUF file; convert it by `sh examples/language_model/get.sh " + path + " <folder>`");
}

[[nodiscard]] inline safetensors read_safetensors(const std::string& path)
{
    require_no_gguf(path);
    return {kvarn_cli::read_file(path), path};
}

}  // namespace language_model
