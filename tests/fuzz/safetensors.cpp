// SPDX-License-Identifier: Apache-2.0
// The safetensors reader, and what is guessed from the tensors of a file that stands alone. In: a file. Whatever it holds, the reader
// returns entries that lie inside the data, or a failure that begins with the file's name. Rewritten, the same comes back.

#include <cmath>
#include <cstring>
#include <string>
#include <utility>
#include <vector>

#include "examples/language_model/config.hpp"
#include "examples/language_model/safetensors.hpp"
#include "readers.hpp"

namespace {

using namespace language_model;
using fuzz::accepts;
using fuzz::require;

/// The same entries, metadata and data in a file with a header of our own.
std::vector<std::byte> rewritten(const safetensors& file, bytes data)
{
    json header = json::object();
    if (!file.metadata().empty()) header["__metadata__"] = file.metadata();
    for (const auto& [name, e] : file.entries())
        header[name] = {{"dtype", e.type}, {"shape", e.shape}, {"data_offsets", {e.begin, e.end}}};
    const std::string text = header.dump();
    const std::uint64_t length = text.size();
    std::vector<std::byte> out(sizeof length + text.size());
    std::memcpy(out.data(), &length, sizeof length);
    std::memcpy(out.data() + sizeof length, text.data(), text.size());
    out.insert(out.end(), data.begin(), data.end());
    return out;
}

bool same(const tensor_entry& a, const tensor_entry& b)
{
    return a.type == b.type && a.shape == b.shape && a.begin == b.begin && a.end == b.end;
}

void check_tensors(const safetensors& file, std::size_t data_bytes)
{
    for (const auto& entry : file.entries()) {
        const tensor_entry& e = entry.second;
        require(e.begin <= e.end && e.end <= data_bytes, "a tensor lies inside the data");
        std::vector<float> values;
        const std::size_t each = !holds_floats(e) ? 0 : e.type == "F32" ? 4 : 2;
        require(accepts([&] { values = file.floats(entry.first); }) == (each != 0), "F32, F16 and BF16 are read");
        require(each == 0 || values.size() * each == e.end - e.begin, "all values of a tensor are read");
    }
}

void guess(const safetensors& file, std::size_t data_bytes)
{
    model_config c;
    if (accepts([&] { c = guess_config(file); })) {
        require(c.kv_heads != 0 && c.heads % c.kv_heads == 0 && c.layers != 0 && c.rope_frequencies.size() == c.head_dim / 2,
                "what is guessed is possible");
        const std::size_t rows = c.vocabulary + c.layers * ((c.heads + c.kv_heads) * c.head_dim + c.intermediate);
        if (accepts([&] { require_sizes(c, file.entries(), "x"); }))
            require(2 * rows * c.hidden <= data_bytes, "the weights for which there will be room are no more than the file holds");
    }
    if (accepts([&] { apply_metadata(c, file); })) require(std::isfinite(c.embedding_scale), "the embedding scale is a number");
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size)
{
    const auto content = std::as_bytes(std::span(data, size));
    accepts([&] {
        const safetensors file({content.begin(), content.end()}, "x");
        std::uint64_t header_bytes = 0;
        std::memcpy(&header_bytes, data, sizeof header_bytes);
        const bytes tensors = content.subspan(sizeof header_bytes + static_cast<std::size_t>(header_bytes));
        check_tensors(file, tensors.size());
        guess(file, tensors.size());

        std::vector<std::byte> again = rewritten(file, tensors);
        require(accepts([&] {
                    const safetensors back(std::move(again), "x");
                    require(std::equal(back.entries().begin(), back.entries().end(), file.entries().begin(), file.entries().end(),
                                       [](const auto& a, const auto& b) { return a.first == b.first && same(a.second, b.second); }),
                            "rewritten tensors come back");
                    require(back.metadata() == file.metadata(), "rewritten metadata come back");
                }),
                "a rewritten file is accepted");
    });
    return 0;
}
