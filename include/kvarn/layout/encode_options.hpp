// SPDX-License-Identifier: Apache-2.0
#pragma once
// The options of the encoders, the same for the CPU and for CUDA: plain data, and which values are accepted. The record and its
// decoder are the same for all. constexpr; no memory.

#include <kvarn/base/config.hpp>  // first: it refuses older standards

#include <cstdint>

#include <kvarn/layout/format.hpp>

namespace kvarn {

/// How codes and scalars are chosen; the record and its decoder are the same for all.
enum class encoder : std::uint8_t {
    paper,    ///< min-max rounding, the method of the paper
    refined,  ///< codes and scalars of least squared error, token norms kept (codec/refine.hpp)
};

/// How quantize_kv encodes. The record is the same on every machine for the same options; docs/accuracy.md measures them.
struct encode_options {
    kvarn::encoder encoder = kvarn::encoder::refined;
    int iterations = 8;          ///< paper: at most this many rounds of variance normalisation, 0..64
    int refined_iterations = 1;  ///< refined: rounds for a balanced tile; refits follow, after which more rounds change nothing. Others take
                                 ///< up to `iterations`, if those are more
    int refit_rounds = 5;        ///< refined: refits of both axes' scalars, 0..16
    int clip_steps = 2;          ///< refined: clip ranges 1, 0.9, 0.8, ... tried below the whole one, 0..8
    /// Which basis the quantized channels of the input are in. rotated: that of the records already, as where the rotation is folded into the
    /// projections, and nothing is rotated; the record is the one that a format without rotation gives for the same values. Exact channels
    /// are never rotated. Where the format does not rotate, both mean the same.
    basis key_basis = basis::original;
    basis value_basis = basis::original;
};

namespace detail {

/// The most rounds of normalisation that the refined encoder takes.
[[nodiscard]] KVARN_HOST_DEVICE KVARN_INLINE constexpr int most_rounds(const encode_options& o) noexcept
{
    return o.iterations > o.refined_iterations ? o.iterations : o.refined_iterations;
}

/// Whether an encoder has to rotate its K, or its V.
[[nodiscard]] KVARN_HOST_DEVICE KVARN_INLINE constexpr bool turns_keys(const format& f, const encode_options& o) noexcept
{
    return f.keys_rotated() && o.key_basis == basis::original;
}
[[nodiscard]] KVARN_HOST_DEVICE KVARN_INLINE constexpr bool turns_values(const format& f, const encode_options& o) noexcept
{
    return f.values_rotated() && o.value_basis == basis::original;
}

[[nodiscard]] KVARN_INLINE constexpr bool is_basis(basis b) noexcept { return b == basis::original || b == basis::rotated; }

[[nodiscard]] KVARN_INLINE constexpr bool is_count(int x, int most) noexcept
{
    return x >= 0 && x <= most;
}

/// Whether every option is within its range; anything else is bad_argument.
[[nodiscard]] KVARN_INLINE constexpr bool is_valid(const encode_options& o) noexcept
{
    return (o.encoder == encoder::paper || o.encoder == encoder::refined) && is_count(o.iterations, 64) &&
           is_count(o.refined_iterations, 64) && is_count(o.refit_rounds, 16) && is_count(o.clip_steps, 8) &&
           is_basis(o.key_basis) && is_basis(o.value_basis);
}

}  // namespace detail
}  // namespace kvarn
