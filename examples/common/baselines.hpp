// SPDX-License-Identifier: Apache-2.0
#pragma once
// Other ways to store K and V, as round trips in memory, to compare against at stated real bits: per-token rounding
// (plain and rotated, QuaRot style), KIVI (K per channel, V per token, in groups), the block formats q4_0 .. q8_0,
// q4_1 and q5_1 of llama.cpp, TurboQuant, fp8. Scalars are rounded to half as they would be stored. Arrays are
// [head][token][channel] float.

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <string>
#include <vector>

#include <kvarn/kvarn.hpp>

#include "failure.hpp"
#include "turboquant.hpp"

namespace kvarn_cli {

/// A dense array [head][token][channel] of float.
struct matrix {
    std::size_t heads = 0, tokens = 0, channels = 0;
    std::vector<float> values;

    [[nodiscard]] float* token(std::size_t head, std::size_t t) { return values.data() + (head * tokens + t) * channels; }
    [[nodiscard]] const float* token(std::size_t head, std::size_t t) const
    {
        return values.data() + (head * tokens + t) * channels;
    }
    [[nodiscard]] kvarn::kv_view<float> view() { return kvarn::head_major(values.data(), tokens, heads, channels); }
};

[[nodiscard]] inline float as_half(float x)
{
    return kvarn::to_float(kvarn::saturate_to<kvarn::half>(x));
}

/// Rounds n values, `step` apart, between their minimum and maximum; scale and zero are halves.
inline void round_min_max(float* x, std::size_t n, std::size_t step, int bits)
{
    float low = x[0], high = x[0];
    for (std::size_t i = 1; i < n; ++i) {
        low = std::min(low, x[i * step]);
        high = std::max(high, x[i * step]);
    }
    const float most = static_cast<float>((1 << bits) - 1);
    const float scale = std::max((high - low) / most, 1e-10f);
    const float stored_scale = as_half(scale), stored_zero = as_half(low);
    for (std::size_t i = 0; i < n; ++i) {
        const float code = std::clamp(std::nearbyint((x[i * step] - low) / scale), 0.0f, most);
        x[i * step] = code * stored_scale + stored_zero;
    }
}

/// One scale and zero per token.
inline void round_per_token(matrix& m, int bits)
{
    for (std::size_t t = 0; t < m.heads * m.tokens; ++t) round_min_max(m.values.data() + t * m.channels, m.channels, 1, bits);
}

/// KIVI's K: one scale and zero per channel and `group` tokens.
inline void round_per_channel(matrix& m, int bits, std::size_t group)
{
    for (std::size_t head = 0; head < m.heads; ++head)
        for (std::size_t t = 0; t < m.tokens; t += group)
            for (std::size_t channel = 0; channel < m.channels; ++channel)
                round_min_max(m.token(head, t) + channel, std::min(group, m.tokens - t), m.channels, bits);
}

/// KIVI's V: one scale and zero per token and `group` channels.
inline void round_per_token_group(matrix& m, int bits, std::size_t group)
{
    for (std::size_t at = 0; at < m.values.size(); at += group) round_min_max(m.values.data() + at, group, 1, bits);
}

/// q4_0, q5_0 (bits 4, 5): 32 values share one half scale, whose sign is that of the value of largest magnitude.
inline void round_block_signed_max(float* x, int bits)
{
    float extreme = 0;
    for (int i = 0; i < 32; ++i)
        if (std::fabs(x[i]) > std::fabs(extreme)) extreme = x[i];
    const float half_range = static_cast<float>(1 << (bits - 1));
    const float scale = extreme / -half_range, inverse = scale != 0 ? 1 / scale : 0, stored = as_half(scale);
    for (int i = 0; i < 32; ++i) {
        const float code = std::min(2 * half_range - 1, std::trunc(x[i] * inverse + half_range + 0.5f));
        x[i] = (code - half_range) * stored;
    }
}

/// q8_0: 32 values share one half scale.
inline void round_block_symmetric(float* x)
{
    float extreme = 0;
    for (int i = 0; i < 32; ++i) extreme = std::max(extreme, std::fabs(x[i]));
    const float scale = extreme / 127, inverse = scale != 0 ? 1 / scale : 0, stored = as_half(scale);
    for (int i = 0; i < 32; ++i) x[i] = std::round(x[i] * inverse) * stored;
}

/// q4_1, q5_1 (bits 4, 5): 32 values share one half scale and one half minimum.
inline void round_block_min(float* x, int bits)
{
    const auto [low, high] = std::minmax_element(x, x + 32);
    const float most = static_cast<float>((1 << bits) - 1), minimum = *low;
    const float scale = (*high - minimum) / most, inverse = scale != 0 ? 1 / scale : 0;
    const float stored_scale = as_half(scale), stored_minimum = as_half(minimum);
    for (int i = 0; i < 32; ++i)
        x[i] = std::min(most, std::trunc((x[i] - minimum) * inverse + 0.5f)) * stored_scale + stored_minimum;
}

/// The nearest float8 e4m3 number (no infinities: 448 is the largest), ties to even.
[[nodiscard]] inline float as_e4m3(float x)
{
    const float magnitude = std::min(std::fabs(x), 448.0f);
    int exponent = 0;
    std::frexp(magnitude, &exponent);
    const int lowest = std::max(exponent - 1, -6) - 3;  // of the last of three digits; below 2^-6 they stay where they are
    return std::copysign(std::ldexp(std::nearbyint(std::ldexp(magnitude, -lowest)), lowest), x);
}

/// float8 e4m3 of n values over one scale, kept as float, that takes the largest magnitude to 448.
inline void round_fp8(float* x, std::size_t n)
{
    float extreme = 0;
    for (std::size_t i = 0; i < n; ++i) extreme = std::max(extreme, std::fabs(x[i]));
    if (extreme == 0) return;
    const float scale = extreme / 448;
    for (std::size_t i = 0; i < n; ++i) x[i] = as_e4m3(x[i] / scale) * scale;
}

/// TurboQuant: signs, rotation, the code of every coordinate, one half per token that gives the decoded token the
/// norm of the exact one.
inline void round_turboquant(matrix& m, int bits, const std::string& name)
{
    const lloyd_max codes(bits);
    const std::vector<float> signs = random_signs(m.channels);
    const auto turn_signs = [&] {
        for (std::size_t i = 0; i < m.values.size(); ++i) m.values[i] *= signs[i % m.channels];
    };
    turn_signs();
    check(kvarn::rotate(m.view()), name);
    for (std::size_t t = 0; t < m.heads * m.tokens; ++t) codes.round_token(m.values.data() + t * m.channels, m.channels);
    check(kvarn::unrotate(m.view()), name);
    turn_signs();
}

enum class baseline_kind { per_token, kivi, blocks, blocks_min, turboquant, fp8_tensor, fp8_token };

struct baseline {
    std::string series;  ///< methods of one series differ in bits only
    std::string name;
    baseline_kind kind;
    int bits;
    std::size_t group;  ///< kivi only
    bool rotated;       ///< by what stores them, before anything else; TurboQuant's own rotation is not meant
};

/// Whether heads of so many channels can be stored like that; false for groups that do not divide them and for what
/// cannot be rotated.
[[nodiscard]] inline bool fits(const baseline& b, std::size_t head_dim, bool is_key)
{
    if ((b.rotated || b.kind == baseline_kind::turboquant) && kvarn::factor_head_dim(static_cast<int>(head_dim)).outer == 0)
        return false;
    if (b.kind == baseline_kind::blocks || b.kind == baseline_kind::blocks_min) return head_dim % 32 == 0;
    return b.kind != baseline_kind::kivi || is_key || head_dim % std::min(b.group, head_dim) == 0;
}

/// Everything accuracy is compared with; the ones that do not fit the head dimensions are left out.
[[nodiscard]] inline std::vector<baseline> baselines_for(std::size_t head_dim_k, std::size_t head_dim_v, bool rotatable)
{
    using enum baseline_kind;
    std::vector<baseline> all;
    for (const bool rotated : {false, true})
        for (const int bits : {2, 3, 4}) {
            const std::string series = rotated ? "rotated rtn" : "rtn";
            all.push_back({series, series + " " + std::to_string(bits) + "-bit", per_token, bits, 0, rotated});
        }
    for (const std::size_t group : {std::size_t{32}, std::size_t{64}, std::size_t{128}})
        for (const int bits : {2, 3, 4}) {
            const std::string series = "kivi g" + std::to_string(group);
            all.push_back({series, series + " " + std::to_string(bits) + "-bit", kivi, bits, group, false});
        }
    for (const bool rotated : {false, true})
        for (const int bits : {4, 5, 8}) {
            const std::string series = rotated ? "rotated q4_0 .. q8_0" : "q4_0 .. q8_0";
            all.push_back(
                {series, std::string(rotated ? "rotated q" : "q") + std::to_string(bits) + "_0", blocks, bits, 0, rotated});
        }
    for (const int bits : {4, 5}) all.push_back({"q4_1, q5_1", "q" + std::to_string(bits) + "_1", blocks_min, bits, 0, false});
    for (const int bits : {2, 3, 4})
        all.push_back({"turboquant", "turboquant " + std::to_string(bits) + "-bit", turboquant, bits, 0, false});
    all.push_back({"fp8", "fp8 per tensor", fp8_tensor, 8, 0, false});
    all.push_back({"fp8", "fp8 per token", fp8_token, 8, 0, false});
    std::erase_if(all, [&](const baseline& b) {
        if ((b.rotated || b.kind == turboquant) && !rotatable) return true;
        return !fits(b, head_dim_k, true) || !fits(b, head_dim_v, false);
    });
    return all;
}

/// Bytes of one token of one head, K (or V), scalars included; kivi's K shares its scalars among `group` tokens, and
/// the one scale of a whole tensor does not count.
[[nodiscard]] inline double bytes_per_token(const baseline& b, std::size_t head_dim, bool is_key)
{
    const double d = static_cast<double>(head_dim), codes = d * b.bits / 8.0;
    switch (b.kind) {
    case baseline_kind::per_token: return codes + 4;
    case baseline_kind::kivi: return codes + 4 * d / static_cast<double>(is_key ? b.group : std::min(b.group, head_dim));
    case baseline_kind::blocks: return codes + 2 * d / 32;
    case baseline_kind::blocks_min: return codes + 4 * d / 32;
    case baseline_kind::turboquant: return codes + 2;
    case baseline_kind::fp8_tensor: return codes;
    case baseline_kind::fp8_token: return codes + 4;
    }
    return 0;
}

/// Stores and loads K or V by the method, in place; the result is in the original basis. The tensor of fp8's one
/// scale is all of `m`.
inline void round_trip(const baseline& b, matrix& m, bool is_key)
{
    if (b.rotated) check(kvarn::rotate(m.view()), b.name);
    switch (b.kind) {
    case baseline_kind::per_token: round_per_token(m, b.bits); break;
    case baseline_kind::kivi:
        if (is_key)
            round_per_channel(m, b.bits, b.group);
        else
            round_per_token_group(m, b.bits, std::min(b.group, m.channels));
        break;
    case baseline_kind::blocks:
        for (std::size_t at = 0; at < m.values.size(); at += 32) {
            if (b.bits == 8)
                round_block_symmetric(m.values.data() + at);
            else
                round_block_signed_max(m.values.data() + at, b.bits);
        }
        break;
    case baseline_kind::blocks_min:
        for (std::size_t at = 0; at < m.values.size(); at += 32) round_block_min(m.values.data() + at, b.bits);
        break;
    case baseline_kind::turboquant: round_turboquant(m, b.bits, b.name); break;
    case baseline_kind::fp8_tensor: round_fp8(m.values.data(), m.values.size()); break;
    case baseline_kind::fp8_token:
        for (std::size_t t = 0; t < m.heads * m.tokens; ++t) round_fp8(m.values.data() + t * m.channels, m.channels);
        break;
    }
    if (b.rotated) check(kvarn::unrotate(m.view()), b.name);
}

}  // namespace kvarn_cli
