// SPDX-License-Identifier: Apache-2.0
#pragma once
// Configurations of the C interface into those of the library and back. In and out: as kvarn.h says. No allocation. For
// c/pool.hpp.

#include <kvarn/base/config.hpp>  // first: it refuses older standards

#include <cstddef>
#include <cstdint>
#include <optional>

#include <kvarn/c/structs.hpp>
#include <kvarn/cache/config.hpp>
#include <kvarn/cache/policy.hpp>

namespace kvarn::c {

/// Layers x heads of one configuration at most: what is asked of each must end.
inline constexpr std::size_t most_heads = std::size_t{1} << 20;

[[nodiscard]] KVARN_INLINE status to_rule(const kvarn_bit_rule& given, bit_rule& r) noexcept
{
    r.first_layer = given.first_layer;
    r.last_layer = given.last_layer;
    r.first_head = given.first_head;
    r.last_head = given.last_head;
    r.key_bits = given.key_bits;
    r.value_bits = given.value_bits;
    const auto turn = [](std::int32_t number, std::optional<rotation>& to) {
        rotation value{};
        if (number == bit_rule::unchanged) return status::ok;
        const status s = enumerator(number, rotation::hadamard, value);
        if (s == status::ok) to = value;
        return s;
    };
    if (const status s = turn(given.key_rotation, r.key_rotation); s != status::ok) return s;
    return turn(given.value_rotation, r.value_rotation);
}

/// A configuration, and the rules that its policy points to.
struct configuration {
    bit_rule rules[KVARN_MOST_RULES];
    cache_config config{};

    [[nodiscard]] KVARN_INLINE status read(const kvarn_cache_config* from, kvarn_cache_config& given) noexcept
    {
        format base;
        if (const status s = take(from, given); s != status::ok) return s;
        if (const status s = to_format(given.format, base); s != status::ok) return s;
        if (given.reserved != 0 || given.layers < 1 || given.heads < 1 || given.rule_count > KVARN_MOST_RULES)
            return status::bad_argument;
        if (static_cast<std::size_t>(given.layers) > most_heads / static_cast<std::size_t>(given.heads))
            return status::bad_argument;
        const array_of<kvarn_bit_rule> all{given.rules, given.rule_count};
        if (const status s = all.sound(); s != status::ok) return s;
        for (std::size_t i = 0; i < all.count; ++i) {
            kvarn_bit_rule one;
            if (const status s = all.at(i, one); s != status::ok) return s;
            if (const status s = to_rule(one, rules[i]); s != status::ok) return s;
        }
        const auto policy = make_policy(base, given.layers, given.heads, {rules, all.count});
        if (!policy) return policy.error;
        config.policy = *policy;
        if (const status s = enumerator(given.exact, exact_type::bf16, config.exact); s != status::ok) return s;
        if (const status s = to_basis(given.key_basis, config.key_basis); s != status::ok) return s;
        if (const status s = to_basis(given.value_basis, config.value_basis); s != status::ok) return s;
        config.sink_tokens = given.sink_tokens;
        config.recent_tokens = given.recent_tokens;
        config.sequences = given.sequences;
        config.most_tokens = given.most_tokens;
        config.most_step = given.most_step;
        config.record_blocks = given.record_blocks;
        config.exact_blocks = given.exact_blocks;
        config.most_spans = given.most_spans;
        return to_encode_options(given.encode, config.encode);
    }
};

/// The numbers of a configuration back into the caller's struct; its pointers stay.
KVARN_INLINE void put_numbers(const cache_config& c, kvarn_cache_config& to) noexcept
{
    to.layers = c.policy.layers();
    to.heads = c.policy.heads();
    to.exact = static_cast<std::int32_t>(c.exact);
    to.key_basis = static_cast<std::int32_t>(c.key_basis);
    to.value_basis = static_cast<std::int32_t>(c.value_basis);
    to.sink_tokens = c.sink_tokens;
    to.recent_tokens = c.recent_tokens;
    to.sequences = c.sequences;
    to.most_tokens = c.most_tokens;
    to.most_step = c.most_step;
    to.record_blocks = c.record_blocks;
    to.exact_blocks = c.exact_blocks;
    to.most_spans = c.most_spans;
}

}  // namespace kvarn::c
