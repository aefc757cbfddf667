// SPDX-License-Identifier: Apache-2.0
#pragma once
// Which layer and head of a model gets how many bits, in which basis. In: a base format, and rules for ranges of layers and heads. Out: the format
// of each layer and head, and from it what one sequence takes (plan_sequence). constexpr, no allocation; rules stay the caller's.

#include <kvarn/base/config.hpp>  // first: it refuses older standards

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>

#include <kvarn/layout/format.hpp>
#include <kvarn/layout/record.hpp>

namespace kvarn {

/// Other bits, or another basis, for the heads [first_head, last_head] of the layers [first_layer, last_layer], ends included. Negative
/// numbers count from the end: -1 is the last one. Bits of `unchanged` and bases that are not given stay as they are.
struct bit_rule {
    static constexpr int unchanged = -1;

    int first_layer = 0, last_layer = -1;
    int first_head = 0, last_head = -1;
    int key_bits = unchanged;
    int value_bits = unchanged;
    std::optional<rotation> key_rotation{};  ///< what choose_format has found, say
    std::optional<rotation> value_rotation{};
};

/// The formats of a model's cache. Made by make_policy, which has checked every format that it can give.
class bit_policy {
public:
    KVARN_INLINE constexpr bit_policy() noexcept {}

    [[nodiscard]] KVARN_INLINE constexpr int layers() const noexcept { return layers_; }
    /// KV heads of each layer.
    [[nodiscard]] KVARN_INLINE constexpr int heads() const noexcept { return heads_; }
    [[nodiscard]] KVARN_INLINE constexpr const format& base() const noexcept { return base_; }

    /// The format of KV head `head` of layer `layer`, 0 <= layer < layers(), 0 <= head < heads(). Later rules win over earlier ones.
    [[nodiscard]] KVARN_INLINE constexpr format format_of(int layer, int head) const noexcept
    {
        format_spec spec = base_.spec();
        for (const bit_rule& r : rules_)
            if (within(layer, r.first_layer, r.last_layer, layers_) && within(head, r.first_head, r.last_head, heads_)) apply(r, spec);
        return make_format(spec).value;
    }

    friend constexpr result<bit_policy> make_policy(const format&, int layers, int heads, std::span<const bit_rule>) noexcept;

private:
    KVARN_INLINE static constexpr int from_start(int i, int count) noexcept { return i < 0 ? i + count : i; }
    KVARN_INLINE static constexpr bool within(int i, int first, int last, int count) noexcept
    {
        return i >= from_start(first, count) && i <= from_start(last, count);
    }
    KVARN_INLINE static constexpr bool is_range(int first, int last, int count) noexcept
    {
        const int a = from_start(first, count), b = from_start(last, count);
        return a >= 0 && a <= b && b < count;
    }
    KVARN_INLINE static constexpr void apply(const bit_rule& r, format_spec& spec) noexcept
    {
        if (r.key_bits != bit_rule::unchanged) spec.key_bits = r.key_bits;
        if (r.value_bits != bit_rule::unchanged) spec.value_bits = r.value_bits;
        if (r.key_rotation) spec.key_rotation = *r.key_rotation;
        if (r.value_rotation) spec.value_rotation = *r.value_rotation;
    }

    format base_{};
    int layers_ = 0;
    int heads_ = 0;
    std::span<const bit_rule> rules_{};
};

/// A policy for `layers` x `heads` KV heads, for example the first and the last layer at more bits:
/// `{{.last_layer = 0, .key_bits = 4}, {.first_layer = -1, .key_bits = 4}}`. `rules` must live as long as the policy.
/// Errors: bad_argument (no layers or heads, a range that is empty or outside), unsupported_bits, unsupported_head_dim (for a rotation),
/// shape_mismatch (a rule gives a
/// format without V bits for V, or takes them away).
[[nodiscard]] KVARN_INLINE constexpr result<bit_policy> make_policy(const format& base, int layers, int heads,
                                                                    std::span<const bit_rule> rules = {}) noexcept
{
    if (layers < 1 || heads < 1) return status::bad_argument;
    for (const bit_rule& r : rules) {
        if (!bit_policy::is_range(r.first_layer, r.last_layer, layers) || !bit_policy::is_range(r.first_head, r.last_head, heads))
            return status::bad_argument;
        if (r.value_bits != bit_rule::unchanged && (r.value_bits == 0) == base.has_values()) return status::shape_mismatch;
        format_spec spec = base.spec();
        bit_policy::apply(r, spec);
        if (const auto made = make_format(spec); !made) return made.error;
    }
    bit_policy p;
    p.base_ = base;
    p.layers_ = layers;
    p.heads_ = heads;
    p.rules_ = rules;
    return p;
}

/// What the caches of one sequence take, all layers and heads together.
struct sequence_plan {
    std::size_t record_bytes = 0;  ///< sealed tiles, scales and padding included
    std::size_t exact_bytes = 0;   ///< sink and tail
    std::size_t elements = 0;      ///< values of K and V

    [[nodiscard]] KVARN_INLINE constexpr std::size_t bytes() const noexcept { return record_bytes + exact_bytes; }
    [[nodiscard]] KVARN_INLINE constexpr double bits_per_element() const noexcept
    {
        return elements != 0 ? 8.0 * static_cast<double>(bytes()) / static_cast<double>(elements) : 0.0;
    }
};

/// The real bytes of a sequence of `tokens` tokens, where exact ones take what they fill: the first `sink_tokens` exact, then as
/// many whole tiles as there are, then an exact tail. (What a pool takes, whose exact blocks have room for a tile, plan_cache says.)
/// `exact_element_bytes` is 2 for half and bfloat16, 4 for float. Overflow of std::size_t is the caller's concern.
[[nodiscard]] KVARN_INLINE constexpr sequence_plan plan_sequence(const bit_policy& policy, std::size_t tokens, std::size_t sink_tokens = 128,
                                                           std::size_t exact_element_bytes = 2,
                                                           record_stride stride = {}) noexcept
{
    sequence_plan plan;
    for (int layer = 0; layer < policy.layers(); ++layer)
        for (int head = 0; head < policy.heads(); ++head) {
            const format f = policy.format_of(layer, head);
            const std::size_t tiles = tokens > sink_tokens ? full_tiles(f, tokens - sink_tokens) : 0;
            const std::size_t exact_tokens = tokens - tiles * static_cast<std::size_t>(f.group());
            const auto channels = static_cast<std::size_t>(f.key_channels() + f.head_dim_v());
            plan.record_bytes += tiles * record_bytes(f, stride);
            plan.exact_bytes += exact_tokens * channels * exact_element_bytes;
            plan.elements += tokens * channels;
        }
    return plan;
}

}  // namespace kvarn
