// SPDX-License-Identifier: Apache-2.0
// Format names, descriptions of formats, and rules for layers and heads. In: a name and numbers. A format that is made is within the
// documented limits and has a layout without gaps; everything else is refused.

#include <climits>
#include <string>
#include <vector>

#include <kvarn/attention/rows.hpp>
#include <kvarn/cache/policy.hpp>
#include <kvarn/layout/format.hpp>
#include <kvarn/layout/record.hpp>
#include <kvarn/quantize/tile.hpp>

#include "fuzz.hpp"

namespace {

using fuzz::require;

bool is_width(int bits)
{
    return (bits >= 2 && bits <= 6) || bits == 8;
}

bool is_dim(int dim, bool rotated)
{
    if (dim < 32 || dim > 576 || dim % 4 != 0) return false;
    if (!rotated) return true;
    for (const int m : {1, 12, 20, 28, 36})
        for (int n = m; n <= dim; n *= 2)
            if (n == dim) return true;
    return false;
}

bool is_possible(const kvarn::format_spec& s)
{
    const auto is_rotation = [](kvarn::rotation r) { return r == kvarn::rotation::hadamard || r == kvarn::rotation::none; };
    return is_rotation(s.key_rotation) && is_rotation(s.value_rotation) && is_width(s.key_bits) && (s.value_bits == 0 || is_width(s.value_bits)) &&
           (s.group == 32 || s.group == 64 || s.group == 128 || s.group == 256) && is_dim(s.head_dim_k, s.key_rotation == kvarn::rotation::hadamard) &&
           (s.value_bits == 0 || is_dim(s.head_dim_v, s.value_rotation == kvarn::rotation::hadamard)) && s.exact_channels >= 0 && s.exact_channels <= 256 &&
           s.exact_channels % 4 == 0;
}

void check(const kvarn::format& f)
{
    require(is_possible(f.spec()) && kvarn::make_format(f.spec()).ok(), "a format is within the limits");
    const kvarn::record_layout at = kvarn::layout_of(f);
    const std::size_t ends[] = {at.k_codes,         at.k_channel_scale, at.k_channel_zero, at.k_token_scale, at.v_codes,
                                at.v_channel_scale, at.v_token_scale,   at.v_token_zero,   at.exact,         at.content_bytes};
    require(std::is_sorted(std::begin(ends), std::end(ends)) && at.k_codes == 0, "fields follow one another");
    std::size_t bits = 0;
    const auto count = [&](int n, int each) { bits += static_cast<std::size_t>(n) * static_cast<std::size_t>(each); };
    count(f.head_dim_k() * f.group(), f.key_bits());
    count(f.head_dim_v() * f.group(), f.value_bits());
    count(2 * f.head_dim_k() + f.group() + f.head_dim_v() + (f.has_values() ? 2 : 0) * f.group() + f.group() * f.exact_channels(), 16);
    require(8 * at.content_bytes == bits, "a record has the bits of its fields");
    for (const auto stride : {kvarn::record_stride::packed, kvarn::record_stride::reference}) {
        const std::size_t one = kvarn::record_bytes(f, stride);
        require(one >= at.content_bytes && one % 8 == 0 && one < 2 * at.content_bytes + 2 * static_cast<std::size_t>(f.group()),
                "the stride is the content, padded");
    }
    require(kvarn::scratch_bytes(f) < 4u << 20 && kvarn::detail::attention_floats(f, 1024) < 8u << 20, "scratch is bounded");
}

void check_names(fuzz::source& in)
{
    const int dk = in.take<std::int16_t>(), dv = in.take<std::int16_t>();
    const std::string name(in.rest().begin(), in.rest().end());
    const auto parsed = kvarn::parse_format(name, dk, dv);
    if (!parsed) return;
    check(*parsed);
    require(parsed->head_dim_k() == dk && (!parsed->has_values() || parsed->head_dim_v() == dv), "the head dimensions are taken over");
    const std::string own = "k" + std::to_string(parsed->key_bits()) + "v" + std::to_string(parsed->value_bits()) + "_g" +
                            std::to_string(parsed->group()) + (parsed->keys_rotated() && parsed->values_rotated() ? "" : "_") +
                            (parsed->keys_rotated() ? "" : "ko") + (parsed->values_rotated() ? "" : "vo");
    const auto again = kvarn::parse_format(own, dk, dv);
    require(again.ok() && *again == *parsed, "the name that a format has gives the same format");
}

kvarn::format_spec take_spec(fuzz::source& in)
{
    kvarn::format_spec s;
    const bool wild = in.one_in(8);
    const auto number = [&](int usual) { return wild ? in.take<std::int32_t>() : usual; };
    s.head_dim_k = number(in.take<std::int16_t>() % 600);
    s.head_dim_v = number(in.take<std::int16_t>() % 600);
    s.key_bits = number(in.take() % 10);
    s.value_bits = number(in.take() % 10);
    s.group = number(in.pick({32, 64, 128, 256, 0, 16, 512, 33}));
    s.key_rotation = static_cast<kvarn::rotation>(in.take() % 3);
    s.value_rotation = static_cast<kvarn::rotation>(in.take() % 3);
    s.exact_channels = number(in.pick({0, 4, 64, 256, 260, -4, 2}));
    return s;
}

void check_specs(fuzz::source& in)
{
    const kvarn::format_spec spec = take_spec(in);
    const auto made = kvarn::make_format(spec);
    require(made.ok() == is_possible(spec), "what is possible is made, and nothing else");
    if (!made) return;
    check(*made);

    std::vector<kvarn::bit_rule> rules(in.take() % 4);
    const auto place = [&] { return in.one_in(8) ? in.take<std::int32_t>() : static_cast<std::int8_t>(in.take()) % 8; };
    for (kvarn::bit_rule& r : rules)
        r = {place(), place(), place(), place(), in.flag() ? kvarn::bit_rule::unchanged : place(),
             in.flag() ? kvarn::bit_rule::unchanged : place(), {}, {}};
    for (kvarn::bit_rule& r : rules) {
        if (in.one_in(4)) r.key_rotation = static_cast<kvarn::rotation>(in.take() % 3);
        if (in.one_in(4)) r.value_rotation = static_cast<kvarn::rotation>(in.take() % 3);
    }
    const int layers = in.take() % 6, heads = in.take() % 6;
    const auto policy = kvarn::make_policy(*made, layers, heads, rules);
    if (!policy) return;
    std::size_t bytes = 0;
    for (int layer = 0; layer < layers; ++layer)
        for (int head = 0; head < heads; ++head) {
            const kvarn::format f = policy->format_of(layer, head);
            check(f);
            require(f.has_values() == made->has_values() && f.group() == made->group(), "rules change bits and bases only");
            bytes += kvarn::full_tiles(f, 1000 - 100) * kvarn::record_bytes(f);
        }
    require(kvarn::plan_sequence(*policy, 1000, 100).record_bytes == bytes, "the plan counts every head");
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size)
{
    fuzz::source in(data, size);
    if (in.flag()) check_names(in);
    else check_specs(in);
    return 0;
}
