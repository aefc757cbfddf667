// SPDX-License-Identifier: Apache-2.0
#pragma once
// What a record holds: head dimensions, bits, tokens per tile, rotation. A `format` is validated once, when it is made;
// everything that takes one may assume it valid. constexpr, host and device, no memory.

#include <cstddef>
#include <cstdint>
#include <string_view>

#include <kvarn/base/status.hpp>

namespace kvarn {

inline constexpr int min_head_dim = 32;         ///< fewest quantized channels of a vector
inline constexpr int max_head_dim = 576;        ///< most of them
inline constexpr int max_group = 256;           ///< most tokens of a tile
inline constexpr int max_exact_channels = 256;  ///< most channels of K beside the quantized ones

/// Basis change along channels before normalisation (paper section 4.1).
enum class rotation : std::uint8_t { none, hadamard };

/// Which basis values, queries or outputs are in. `rotated` is the basis of the records: where a format does not rotate K (or V), it is
/// the original one for K (or V).
enum class basis : std::uint8_t { original, rotated };

/// The unchecked description of a format; `make_format` turns it into a `format`.
struct format_spec {
    int head_dim_k = 128;                      ///< quantized channels of a K vector
    int head_dim_v = 128;                      ///< channels of a V vector (ignored when value_bits is 0)
    int key_bits = 4;                          ///< 2, 3, 4, 5, 6, 8
    int value_bits = 2;                        ///< the same, or 0: no V part (latent attention reads V from K)
    int group = 128;                           ///< tokens per tile: 32, 64, 128, 256
    rotation key_rotation = rotation::hadamard;    ///< some models lose far less without it: choose_format (cache/choose.hpp)
    rotation value_rotation = rotation::hadamard;  ///< (K's when value_bits is 0)
    int exact_channels = 0;                    ///< further channels of K kept in fp16, un-rotated (decoupled rotary part)

    friend constexpr bool operator==(const format_spec&, const format_spec&) noexcept = default;
};

/// head_dim = outer * inner with inner a power of two and outer in {1, 12, 20, 28, 36}; outer 0 means: not rotatable.
struct hadamard_factors {
    int outer = 0;
    int inner = 0;
};

/// The factors of a head dimension.
[[nodiscard]] KVARN_HOST_DEVICE KVARN_INLINE constexpr hadamard_factors factor_head_dim(int head_dim) noexcept
{
    if (head_dim < 1) return {};
    int inner = 1;
    while (head_dim % (2 * inner) == 0) inner *= 2;
    const int odd = head_dim / inner;
    if (odd == 1) return {1, inner};
    if ((odd == 3 || odd == 5 || odd == 7 || odd == 9) && inner >= 4) return {4 * odd, inner / 4};
    return {};
}

/// A valid format. The default is k4v2_g128 at head_dim 128.
class format {
public:
    KVARN_INLINE constexpr format() noexcept {}

    [[nodiscard]] KVARN_HOST_DEVICE KVARN_INLINE constexpr const format_spec& spec() const noexcept { return spec_; }
    [[nodiscard]] KVARN_HOST_DEVICE KVARN_INLINE constexpr int head_dim_k() const noexcept { return spec_.head_dim_k; }
    /// 0 when the format has no V part.
    [[nodiscard]] KVARN_HOST_DEVICE KVARN_INLINE constexpr int head_dim_v() const noexcept { return spec_.value_bits ? spec_.head_dim_v : 0; }
    [[nodiscard]] KVARN_HOST_DEVICE KVARN_INLINE constexpr int key_bits() const noexcept { return spec_.key_bits; }
    [[nodiscard]] KVARN_HOST_DEVICE KVARN_INLINE constexpr int value_bits() const noexcept { return spec_.value_bits; }
    [[nodiscard]] KVARN_HOST_DEVICE KVARN_INLINE constexpr int group() const noexcept { return spec_.group; }
    [[nodiscard]] KVARN_HOST_DEVICE KVARN_INLINE constexpr int exact_channels() const noexcept { return spec_.exact_channels; }
    [[nodiscard]] KVARN_HOST_DEVICE KVARN_INLINE constexpr bool keys_rotated() const noexcept { return spec_.key_rotation == rotation::hadamard; }
    /// Of what attention reads as V: K's where the format has no V part.
    [[nodiscard]] KVARN_HOST_DEVICE KVARN_INLINE constexpr bool values_rotated() const noexcept { return spec_.value_rotation == rotation::hadamard; }
    [[nodiscard]] KVARN_HOST_DEVICE KVARN_INLINE constexpr bool has_values() const noexcept { return spec_.value_bits != 0; }
    /// Channels of a K vector as the engine sees it: the quantized ones, then the exact ones.
    [[nodiscard]] KVARN_HOST_DEVICE KVARN_INLINE constexpr int key_channels() const noexcept
    {
        return spec_.head_dim_k + spec_.exact_channels;
    }

    friend constexpr bool operator==(const format&, const format&) noexcept = default;
    friend constexpr result<format> make_format(const format_spec&) noexcept;

private:
    format_spec spec_{};
};

namespace detail {
KVARN_INLINE constexpr bool is_code_width(int bits) noexcept { return bits == 2 || bits == 3 || bits == 4 || bits == 5 || bits == 6 || bits == 8; }

KVARN_INLINE constexpr bool is_rotation(rotation r) noexcept { return r == rotation::none || r == rotation::hadamard; }

KVARN_INLINE constexpr bool is_head_dim(int head_dim, rotation r) noexcept
{
    if (head_dim < min_head_dim || head_dim > max_head_dim) return false;
    return r == rotation::hadamard ? factor_head_dim(head_dim).outer != 0 : head_dim % 4 == 0;
}

/// Reads a decimal number of at most three digits; -1 if there is none.
KVARN_INLINE constexpr int take_number(std::string_view& text) noexcept
{
    int value = -1;
    for (int digits = 0; digits < 3 && !text.empty() && text.front() >= '0' && text.front() <= '9'; ++digits) {
        value = (value < 0 ? 0 : value) * 10 + (text.front() - '0');
        text.remove_prefix(1);
    }
    return value;
}

KVARN_INLINE constexpr bool take_letter(std::string_view& text, char letter) noexcept
{
    if (text.empty() || text.front() != letter) return false;
    text.remove_prefix(1);
    return true;
}
/// By letters: the standard library's comparison would be a function shared by files compiled for different instruction sets.
KVARN_INLINE constexpr bool take_word(std::string_view& text, std::string_view word) noexcept
{
    std::string_view rest = text;
    for (const char letter : word)
        if (!take_letter(rest, letter)) return false;
    text = rest;
    return true;
}
}  // namespace detail

/// Validates a description. Errors: unsupported_head_dim, unsupported_bits, unsupported_group, unsupported_channels,
/// bad_argument (rotation is no enumerator).
[[nodiscard]] KVARN_INLINE constexpr result<format> make_format(const format_spec& spec) noexcept
{
    if (!detail::is_rotation(spec.key_rotation) || !detail::is_rotation(spec.value_rotation)) return status::bad_argument;
    if (!detail::is_code_width(spec.key_bits)) return status::unsupported_bits;
    if (spec.value_bits != 0 && !detail::is_code_width(spec.value_bits)) return status::unsupported_bits;
    if (spec.group != 32 && spec.group != 64 && spec.group != 128 && spec.group != 256) return status::unsupported_group;
    if (!detail::is_head_dim(spec.head_dim_k, spec.key_rotation)) return status::unsupported_head_dim;
    if (spec.value_bits != 0 && !detail::is_head_dim(spec.head_dim_v, spec.value_rotation)) return status::unsupported_head_dim;
    if (spec.exact_channels < 0 || spec.exact_channels > max_exact_channels || spec.exact_channels % 4 != 0)
        return status::unsupported_channels;
    format made;
    made.spec_ = spec;
    if (spec.value_bits == 0) {
        made.spec_.head_dim_v = spec.head_dim_k;
        made.spec_.value_rotation = spec.key_rotation;
    }
    return made;
}

/// Parses a preset name: `k<bits>v<bits>_g<group>`, for example k4v2_g128, and after it `_ko`, `_vo` or `_kovo` where K, V or both stay in
/// the original basis; a leading `kvarn_` is accepted.
/// Errors: bad_format_name, or those of make_format.
[[nodiscard]] KVARN_INLINE constexpr result<format> parse_format(std::string_view name, int head_dim_k, int head_dim_v) noexcept
{
    detail::take_word(name, "kvarn_");
    format_spec spec;
    spec.head_dim_k = head_dim_k;
    spec.head_dim_v = head_dim_v;
    if (!detail::take_letter(name, 'k') || (spec.key_bits = detail::take_number(name)) < 0) return status::bad_format_name;
    if (!detail::take_letter(name, 'v') || (spec.value_bits = detail::take_number(name)) < 0) return status::bad_format_name;
    if (!detail::take_letter(name, '_') || !detail::take_letter(name, 'g')) return status::bad_format_name;
    if ((spec.group = detail::take_number(name)) < 0) return status::bad_format_name;
    if (!name.empty()) {
        if (!detail::take_letter(name, '_')) return status::bad_format_name;
        if (detail::take_word(name, "ko")) spec.key_rotation = rotation::none;
        if (detail::take_word(name, "vo")) spec.value_rotation = rotation::none;
        if (!name.empty() || (spec.key_rotation == rotation::hadamard && spec.value_rotation == rotation::hadamard))
            return status::bad_format_name;
    }
    return make_format(spec);
}

/// The same where K and V have as many channels.
[[nodiscard]] KVARN_INLINE constexpr result<format> parse_format(std::string_view name, int head_dim) noexcept
{
    return parse_format(name, head_dim, head_dim);
}

}  // namespace kvarn
