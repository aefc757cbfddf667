// SPDX-License-Identifier: Apache-2.0
#pragma once
// How a cache stores its sealed tokens, by name: exact, records of the library, or the round trip of a baseline. In:
// a name such as k2v2_g128:refined, rotated_rtn2, kivi2_g32, q4_0. Out: a plan, with the real bytes of what it
// stores.

#include <algorithm>
#include <charconv>
#include <cstddef>
#include <optional>
#include <string>
#include <string_view>
#include <system_error>
#include <utility>
#include <vector>

#include <kvarn/cache/policy.hpp>
#include <kvarn/kvarn.hpp>

#include "../common/baselines.hpp"
#include "../common/failure.hpp"

namespace language_model {

using kvarn_cli::failure;

enum class storage { exact, records, round_trip };

struct cache_plan {
    std::string name;
    language_model::storage storage = storage::exact;
    kvarn::format format;                  ///< of the records; for the others what attention needs to know, the head dimension
    std::vector<kvarn::bit_rule> rules;    ///< records only: layers and heads with other bits
    std::size_t layers = 1, kv_heads = 1;  ///< of the model, which rules may name
    kvarn::encode_options how;             ///< records only
    bool choose_basis =
        false;  ///< records only: each head keeps its keys in the basis that its first tile and its queries ask for
    kvarn::precision precision = kvarn::precision::fine;  ///< records only: of attention
    kvarn_cli::baseline baseline{};                       ///< round trips only
    std::size_t sink = 0;            ///< tokens at the start that stay exact, in whole tiles; all of them when nothing is ever sealed
    std::size_t group = 128;         ///< tokens that are sealed at once

    /// The format of a layer's KV head; plan_of has checked the rules.
    [[nodiscard]] kvarn::format format_of(std::size_t layer, std::size_t head) const
    {
        return rules.empty() ? format : policy()->format_of(static_cast<int>(layer), static_cast<int>(head));
    }
    [[nodiscard]] kvarn::result<kvarn::bit_policy> policy() const
    {
        return kvarn::make_policy(format, static_cast<int>(layers), static_cast<int>(kv_heads), rules);
    }

    /// Bytes of one sealed token of one KV head, K and V, with scales and padding; the mean, where heads differ.
    [[nodiscard]] double sealed_token_bytes() const
    {
        const auto d = static_cast<std::size_t>(format.head_dim_k());
        switch (storage) {
        case storage::exact: break;
        case storage::records: {
            const kvarn::sequence_plan one_tile = kvarn::plan_sequence(*policy(), group, 0);
            return static_cast<double>(one_tile.record_bytes) / static_cast<double>(layers * kv_heads * group);
        }
        case storage::round_trip:
            return kvarn_cli::bytes_per_token(baseline, d, true) + kvarn_cli::bytes_per_token(baseline, d, false);
        }
        return exact_token_bytes();
    }
    /// Bytes of one exact token of one KV head.
    [[nodiscard]] double exact_token_bytes() const { return 2.0 * sizeof(kvarn::half) * format.head_dim_k(); }
    [[nodiscard]] double sealed_bits() const { return 8 * sealed_token_bytes() / (2.0 * format.head_dim_k()); }
};

/// Options that hold for every cache of a run.
struct plan_options {
    std::size_t sink = 128;                ///< rounded up to whole tiles
    std::optional<int> iterations;         ///< of the normalisation; none: as the library or the encoder has it
    std::size_t layers = 1, kv_heads = 1;  ///< of the model
};

namespace plan_detail {

/// Takes a number of bits off the front of `name`; none for what no method has.
[[nodiscard]] inline std::optional<int> take_bits(std::string_view& name)
{
    if (name.empty()) return std::nullopt;
    for (const int bits : {2, 3, 4, 5, 6, 8})
        if (name.front() == static_cast<char>('0' + bits)) {
            name.remove_prefix(1);
            return bits;
        }
    return std::nullopt;
}

[[nodiscard]] inline bool take(std::string_view& name, std::string_view prefix)
{
    if (!name.starts_with(prefix)) return false;
    name.remove_prefix(prefix.size());
    return true;
}

/// The baseline of that name, or none.
[[nodiscard]] inline std::optional<kvarn_cli::baseline> baseline_of(const std::string& full)
{
    using kvarn_cli::baseline_kind;
    std::string_view name = full;
    kvarn_cli::baseline b{};
    b.name = full;
    b.rotated = take(name, "rotated_");
    std::optional<int> bits;
    if (take(name, "rtn")) {
        b.kind = baseline_kind::per_token;
        b.series = b.rotated ? "rotated rtn" : "rtn";
        bits = take_bits(name);
    } else if (!b.rotated && take(name, "kivi")) {
        b.kind = baseline_kind::kivi;
        bits = take_bits(name);
        for (const std::size_t group : {32, 64, 128})
            if (name == "_g" + std::to_string(group)) b.group = group;
        if (b.group == 0) return std::nullopt;
        name = {};
        b.series = "kivi g" + std::to_string(b.group);
    } else if (!b.rotated && take(name, "turboquant")) {
        b.kind = baseline_kind::turboquant;
        b.series = "turboquant";
        bits = take_bits(name);
        if (bits && *bits > 4) return std::nullopt;
    } else if (!b.rotated && take(name, "fp8_")) {
        b.kind = name == "tensor" ? baseline_kind::fp8_tensor : baseline_kind::fp8_token;
        b.series = "fp8";
        if (!take(name, "tensor") && !take(name, "token")) return std::nullopt;
        bits = 8;
    } else if (take(name, "q")) {
        b.kind = baseline_kind::blocks;
        b.series = b.rotated ? "rotated q4_0 .. q8_0" : "q4_0 .. q8_0";
        bits = take_bits(name);
        if (bits && *bits != 4 && *bits != 5 && *bits != 8) return std::nullopt;
        if (bits && *bits != 8 && !b.rotated && take(name, "_1")) {
            b.kind = baseline_kind::blocks_min;
            b.series = "q4_1, q5_1";
        } else if (!take(name, "_0")) {
            return std::nullopt;
        }
    }
    if (!bits || !name.empty()) return std::nullopt;
    b.bits = *bits;
    return b;
}

[[nodiscard]] inline std::optional<kvarn::encoder> encoder_of(std::string_view name)
{
    if (name == "paper") return kvarn::encoder::paper;
    if (name == "refined") return kvarn::encoder::refined;
    return std::nullopt;
}

/// The precision of attention of that name, or none.
[[nodiscard]] inline std::optional<kvarn::precision> precision_of(std::string_view name)
{
    if (name == "exact") return kvarn::precision::exact;
    if (name == "fine") return kvarn::precision::fine;
    if (name == "fast") return kvarn::precision::fast;
    return std::nullopt;
}

/// A whole number, of the last ones if negative, off the front of `text`.
[[nodiscard]] inline std::optional<int> take_index(std::string_view& text)
{
    int value = 0;
    const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
    if (error != std::errc{}) return std::nullopt;
    text.remove_prefix(static_cast<std::size_t>(end - text.data()));
    return value;
}

/// `3`, `0..3`, `-1` or `*` off the front of `text`: first and last.
[[nodiscard]] inline bool take_range(std::string_view& text, int& first, int& last)
{
    if (take(text, "*")) return true;
    const auto from = take_index(text);
    const auto to = from && take(text, "..") ? take_index(text) : from;
    if (!from || !to) return false;
    first = *from;
    last = *to;
    return true;
}

/// One rule, <layers>[/<heads>]=k<bits>v<bits>, for example 0=k4v2 or -1/0..3=k3v2.
[[nodiscard]] inline std::optional<kvarn::bit_rule> rule_of(std::string_view text)
{
    kvarn::bit_rule rule;
    if (!take_range(text, rule.first_layer, rule.last_layer)) return std::nullopt;
    if (take(text, "/") && !take_range(text, rule.first_head, rule.last_head)) return std::nullopt;
    if (!take(text, "=k")) return std::nullopt;
    const auto key_bits = take_bits(text);
    if (!key_bits || !take(text, "v")) return std::nullopt;
    const auto value_bits = take_bits(text);
    if (!value_bits || !text.empty()) return std::nullopt;
    rule.key_bits = *key_bits;
    rule.value_bits = *value_bits;
    return rule;
}

/// Cuts the rules, each after a '+', off the end of a name.
inline void take_rules(std::string& name, cache_plan& plan)
{
    const std::size_t plus = std::min(name.find('+'), name.size());
    for (std::size_t begin = plus; begin < name.size();) {
        const std::size_t end = std::min(name.find('+', begin + 1), name.size());
        const std::string one = name.substr(begin + 1, end - begin - 1);
        const auto rule = rule_of(one);
        if (!rule)
            throw failure(plan.name + ": '" + one +
                          "' is no rule: <layers>[/<heads>]=k<bits>v<bits>, layers and heads as 3, 0..3, -1 or *");
        plan.rules.push_back(*rule);
        begin = end;
    }
    name.resize(plus);
}

/// A format that only says the head dimension: exact tokens need no rotation.
[[nodiscard]] inline kvarn::format dimension_only(std::size_t head_dim, const std::string& name)
{
    kvarn::format_spec spec;
    spec.head_dim_k = spec.head_dim_v = static_cast<int>(head_dim);
    spec.key_rotation = spec.value_rotation = kvarn::rotation::none;
    const auto made = kvarn::make_format(spec);
    kvarn_cli::check(made.error, name);
    return *made;
}

}  // namespace plan_detail

/// The plan of a cache for heads of `head_dim` channels; a name that is none, or does not fit the model, is a failure.
[[nodiscard]] inline cache_plan plan_of(std::string name, std::size_t head_dim, const plan_options& options)
{
    using namespace plan_detail;
    cache_plan plan;
    plan.name = name;
    const auto in_whole_tiles = [&] { plan.sink = (options.sink + plan.group - 1) / plan.group * plan.group; };
    plan.layers = options.layers;
    plan.kv_heads = options.kv_heads;
    take_rules(name, plan);
    const auto without_rules = [&] {
        if (!plan.rules.empty()) throw failure(plan.name + ": only k<bits>v<bits> caches have rules");
    };
    if (name == "exact") {
        without_rules();
        plan.format = dimension_only(head_dim, name);
        plan.sink = static_cast<std::size_t>(-1);
        return plan;
    }
    if (const auto b = baseline_of(name)) {
        without_rules();
        plan.storage = storage::round_trip;
        plan.baseline = *b;
        in_whole_tiles();
        plan.format = dimension_only(head_dim, name);
        if ((b->rotated || b->kind == kvarn_cli::baseline_kind::turboquant) &&
            kvarn::factor_head_dim(static_cast<int>(head_dim)).outer == 0)
            throw failure(name + ": heads of " + std::to_string(head_dim) + " channels cannot be rotated");
        if (!kvarn_cli::fits(*b, head_dim, false))
            throw failure(name + ": heads of " + std::to_string(head_dim) + " channels do not divide into groups of " +
                          std::to_string(b->kind == kvarn_cli::baseline_kind::kivi ? std::min(b->group, head_dim) : 32));
        return plan;
    }
    const std::size_t colon = name.find(':');
    std::string_view format_name = std::string_view(name).substr(0, colon);
    if (format_name.ends_with("_auto")) {
        format_name.remove_suffix(5);
        plan.choose_basis = true;
    }
    const auto format = kvarn::parse_format(format_name, static_cast<int>(head_dim));
    if (format.error == kvarn::status::bad_format_name)
        throw failure("there is no cache '" + name +
                      "': exact, rtn<bits>, rotated_rtn<bits>, kivi<bits>_g<32|64|128>, q<4|5|8>_0, q<4|5>_1, "
                      "rotated_q<4|5|8>_0, turboquant<2|3|4>, fp8_<tensor|token>, k<bits>v<bits>_g<group>[_ko|_vo|_kovo|_auto] "
                      "and the last with :paper or :refined, and with :exact, :fine or :fast for attention, are");
    kvarn_cli::check(format.error, name);
    if (!format->has_values()) throw failure(name + ": the values of this model need bits of their own");
    plan.storage = storage::records;
    plan.format = *format;
    plan.group = static_cast<std::size_t>(format->group());
    in_whole_tiles();
    for (std::size_t at = colon; at != std::string::npos; at = name.find(':', at + 1)) {
        const std::string_view word = std::string_view(name).substr(at + 1, name.find(':', at + 1) - at - 1);
        const auto encoder = encoder_of(word);
        const auto precision = precision_of(word);
        if (!encoder && !precision)
            throw failure(name + ": there is no encoder '" + std::string(word) +
                          "' (paper and refined are), and no such precision (exact, fine and fast are)");
        if (encoder) plan.how.encoder = *encoder;
        if (precision) plan.precision = *precision;
    }
    if (options.iterations) plan.how.iterations = plan.how.refined_iterations = *options.iterations;
    if (const auto policy = plan.policy(); !policy)
        throw failure(plan.name + (policy.error == kvarn::status::bad_argument
                                       ? ": a rule names layers or heads that the model does not have"
                                       : std::string(": ") + kvarn::message(policy.error)));
    return plan;
}

/// The plans of a comma-separated list; each name once.
[[nodiscard]] inline std::vector<cache_plan> plans_of(const std::string& list, std::size_t head_dim, const plan_options& options)
{
    std::vector<cache_plan> plans;
    for (std::size_t begin = 0; begin <= list.size();) {
        const std::size_t end = std::min(list.find(',', begin), list.size());
        const std::string name = list.substr(begin, end - begin);
        for (const cache_plan& other : plans)
            if (other.name == name) throw failure("--caches: '" + name + "' is there twice");
        plans.push_back(plan_of(name, head_dim, options));
        begin = end + 1;
    }
    return plans;
}

}  // namespace language_model
