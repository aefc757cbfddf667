// SPDX-License-Identifier: Apache-2.0
// The readers of config.json and of the index of a model in several files. In: JSON text. Whatever it holds, they return a
// configuration that a transformer can be built from, or a failure that begins with the file's name.

#include <cmath>
#include <string_view>

#include "examples/language_model/config.hpp"
#include "readers.hpp"

namespace {

using namespace language_model;
using fuzz::accepts;
using fuzz::require;

void check(const model_config& c)
{
    for (const std::size_t n : {c.hidden, c.layers, c.heads, c.kv_heads, c.intermediate, c.vocabulary})
        require(n >= 1 && n <= std::size_t{1} << 24, "a size is from 1 to 2^24");
    require(c.heads % c.kv_heads == 0, "query heads are a multiple of KV heads");
    require(c.head_dim >= 32 && c.head_dim <= 576 && c.head_dim % 4 == 0, "head_dim is supported");
    require(c.rope_frequencies.size() == c.head_dim / 2, "there is a frequency for each pair of channels");
    require(c.local_frequencies.empty() || c.local_frequencies.size() == c.head_dim / 2, "and for each pair of local layers");
    for (const auto* all : {&c.rope_frequencies, &c.local_frequencies})
        for (const double f : *all) require(f > 0 && std::isfinite(f), "a frequency is a positive number");
    require(c.softmax_scale >= 0 && std::isfinite(c.softmax_scale), "the scale of scores is a number");
    require(c.windows.empty() || c.windows.size() == c.layers, "every layer has its window");
    require(c.norm_epsilon > 0 && std::isfinite(c.norm_epsilon), "the epsilon is a positive number");
    for (const std::int64_t window : c.windows) require(window >= 0, "a window is not negative");
}

bool same(const model_config& a, const model_config& b)
{
    return a.hidden == b.hidden && a.layers == b.layers && a.heads == b.heads && a.kv_heads == b.kv_heads &&
           a.head_dim == b.head_dim && a.intermediate == b.intermediate && a.vocabulary == b.vocabulary &&
           a.norm_epsilon == b.norm_epsilon && a.rope_frequencies == b.rope_frequencies && a.tied == b.tied &&
           a.local_frequencies == b.local_frequencies && a.windows == b.windows &&
           a.softmax_scale == b.softmax_scale && a.head_norms == b.head_norms && a.post_norms == b.post_norms &&
           a.offset_norms == b.offset_norms && a.gelu == b.gelu && a.embedding_scale == b.embedding_scale;
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size)
{
    json object;
    if (!accepts([&] { object = parse_json({reinterpret_cast<const char*>(data), size}, 32, "x"); })) return 0;
    model_config c;
    if (accepts([&] { c = parse_config(object, "x"); })) {
        check(c);
        const std::string text = object.dump();
        model_config again;
        require(accepts([&] { again = parse_config(parse_json(text, 32, "x"), "x"); }), "a rewritten configuration is accepted");
        require(same(again, c), "a rewritten configuration comes back");
    }
    std::set<std::string> shards;
    if (accepts([&] { shards = shards_of(object, "x"); }))
        for (const std::string& name : shards) require(name.find('/') == std::string::npos, "a shard lies beside its index");
    return 0;
}
