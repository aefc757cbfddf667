// SPDX-License-Identifier: Apache-2.0
#pragma once
// Which basis the keys of a head are sealed in, rotated or original, chosen by the data: some models lose a hundred times less in one than
// in the other (docs/accuracy.md). In: one or more tiles of K, and the moments of the queries seen so far. Out: the format for that head.
// What counts is not the error of K but that of the scores: sum over channels of E[q_d^2] e_d^2 in the original basis.
// The caller owns all memory; nothing allocates. float arithmetic in a fixed order: the same choice on every machine.

#include <kvarn/base/config.hpp>  // first: it refuses older standards

#include <cstddef>
#include <cstdint>
#include <span>

#include <kvarn/quantize.hpp>

namespace kvarn {

/// Adds queries to the moments of the KV head that they attend to. q: [tokens][query heads of the group][at least head_dim_k channels], in the
/// original basis, as they meet K (after the rotary embedding). moments: [head_dim_k], zero at first; each query adds its squares over
/// the square of its norm, in units of 2^-32, so sums are exact: any order, and those of several threads may be added up.
/// Queries that are zero or not finite count nothing. Errors: shape_mismatch, null_pointer, buffer_too_small (moments).
template <class Arch = simd::native_arch, element T>
[[nodiscard]] status add_query_moments(const format& f, kv_view<T> q, std::span<std::uint64_t> moments) noexcept;

struct choose_options {
    /// K leaves the rotation where that divides the weighted error by more than this. Above 1, because a rotation is the safer choice for
    /// tiles that come later.
    float margin = 1.5f;
    encode_options encode{};
};

/// Bytes of scratch that choose_format needs, at any alignment.
[[nodiscard]] KVARN_INLINE constexpr std::size_t choose_scratch_bytes(const format& f) noexcept;

/// `base` with its keys rotated or not, whichever loses less of the scores on the tiles of `k`: [tiles * group][1][key_channels]. Everything
/// else of `base` stays. Without queries (moments all zero) `base` itself. Head dimensions that cannot be rotated are not.
/// Costs two seals and two decodings of the keys; take the first tile of a head. Errors: those of quantize_kv, buffer_too_small.
template <class Arch = simd::native_arch, element T>
[[nodiscard]] result<format> choose_format(const format& base, kv_view<T> k, std::span<const std::uint64_t> moments,
                                           std::span<std::byte> scratch, const choose_options& options = {}) noexcept;

namespace detail {

/// The format of K alone, as choose_format tries it.
[[nodiscard]] KVARN_INLINE constexpr result<format> keys_alone(const format& f, rotation r) noexcept
{
    format_spec spec = f.spec();
    spec.value_bits = 0;
    spec.exact_channels = 0;
    spec.key_rotation = r;
    return make_format(spec);
}

/// The error of the scores that one tile of K costs, up to a factor: weights [head_dim_k] at most 1. `memory` is one record, then the
/// decoded tokens.
template <class Arch, element T>
result<float> score_error(const format& f, kv_view<T> tile, const float* weights, std::byte* memory, std::span<std::byte> scratch,
                          const encode_options& options) noexcept
{
    using one = simd::kernels<simd::portable>;
    const auto group = static_cast<std::size_t>(f.group()), dim = static_cast<std::size_t>(f.head_dim_k());
    const auto record = tile_major(f, memory, record_bytes(f), 1, 1);
    float* const decoded = reinterpret_cast<float*>(memory + (record_bytes(f) + 63) / 64 * 64);
    if (const status s = quantize_kv<Arch>(f, tile, kv_view<T>{}, record, scratch, options); s != status::ok) return s;
    if (const status s = dequantize_kv<Arch>(f, record, token_major(decoded, group, 1, dim), kv_view<float>{}, basis::original, scratch);
        s != status::ok)
        return s;
    const auto exact = as_storage(tile);
    float error = 0.0f;
    for (std::size_t t = 0; t < group; ++t)
        for (std::size_t d = 0; d < dim; ++d) {
            const float x = one::load(exact.at(t, 0) + static_cast<std::ptrdiff_t>(d) * exact.channel_stride);
            const float e = one::sub(decoded[t * dim + d], x);
            error = one::fma(one::mul(e, weights[d]), e, error);
        }
    return error;
}

}  // namespace detail

KVARN_INLINE constexpr std::size_t choose_scratch_bytes(const format& f) noexcept
{
    const auto group = static_cast<std::size_t>(f.group()), dim = static_cast<std::size_t>(f.head_dim_k());
    // Alignment, weights, one record of keys, decoded keys, scratch of the codec.
    return 63 + (dim * 4 + 63) / 64 * 64 + (record_bytes(f) + 63) / 64 * 64 + group * dim * 4 + scratch_bytes(f);
}

template <class Arch, element T>
status add_query_moments(const format& f, kv_view<T> q, std::span<std::uint64_t> moments) noexcept
{
    using one = simd::kernels<simd::portable>;
    const auto dim = static_cast<std::size_t>(f.head_dim_k());
    if (q.tokens == 0 || q.heads == 0) return status::ok;
    if (q.channels < dim) return status::shape_mismatch;
    if (q.data == nullptr || moments.data() == nullptr) return status::null_pointer;
    if (moments.size() < dim) return status::buffer_too_small;
    const simd::float_environment guard;
    const auto queries = detail::as_storage(q);
    float x[max_head_dim];
    for (std::size_t t = 0; t < q.tokens; ++t)
        for (std::size_t h = 0; h < q.heads; ++h) {
            detail::load_row<Arch>(queries.at(t, h), queries.channel_stride, f.head_dim_k(), x);
            const std::uint32_t most = one::largest_magnitude(x, dim);
            if (most == 0 || most >= detail::infinity_bits) continue;
            const float largest = std::bit_cast<float>(most);
            float norm = 0.0f;
            for (std::size_t d = 0; d < dim; ++d) {
                const float share = one::div(x[d], largest);  // so that no square overflows
                x[d] = one::mul(share, share);
                norm = one::add(norm, x[d]);
            }
            for (std::size_t d = 0; d < dim; ++d) moments[d] += static_cast<std::uint64_t>(one::mul(one::div(x[d], norm), 0x1p32f));
        }
    return status::ok;
}

template <class Arch, element T>
result<format> choose_format(const format& base, kv_view<T> k, std::span<const std::uint64_t> moments, std::span<std::byte> scratch,
                             const choose_options& options) noexcept
{
    using one = simd::kernels<simd::portable>;
    const auto dim = static_cast<std::size_t>(base.head_dim_k()), group = static_cast<std::size_t>(base.group());
    if (!(options.margin > 0.0f)) return status::bad_argument;
    if (k.heads != 1 || k.channels != static_cast<std::size_t>(base.key_channels())) return status::shape_mismatch;
    if (k.tokens == 0 || k.tokens % group != 0) return status::token_count_mismatch;
    if (moments.size() < dim || scratch.size() < choose_scratch_bytes(base)) return status::buffer_too_small;
    if (k.data == nullptr || moments.data() == nullptr || scratch.data() == nullptr) return status::null_pointer;
    const auto rotated = detail::keys_alone(base, rotation::hadamard), original = detail::keys_alone(base, rotation::none);
    format_spec spec = base.spec();
    if (!rotated) {
        spec.key_rotation = rotation::none;
        return make_format(spec);
    }

    std::uint64_t most = 0;
    for (std::size_t d = 0; d < dim; ++d) most = moments[d] > most ? moments[d] : most;
    if (most == 0) return base;
    std::byte* at = scratch.data() + (64 - reinterpret_cast<std::uintptr_t>(scratch.data()) % 64) % 64;
    float* const weights = reinterpret_cast<float*>(at);
    for (std::size_t d = 0; d < dim; ++d) weights[d] = one::div(static_cast<float>(moments[d]), static_cast<float>(most));
    at += (dim * sizeof(float) + 63) / 64 * 64;
    std::byte* const codec = at + (record_bytes(base) + 63) / 64 * 64 + group * dim * sizeof(float);
    const std::span<std::byte> left(codec, static_cast<std::size_t>(scratch.data() + scratch.size() - codec));

    float error[2] = {};
    k.channels = dim;
    const simd::float_environment guard;
    for (std::size_t first = 0; first < k.tokens; first += group)
        for (int i = 0; i < 2; ++i) {
            const auto one_tile = detail::score_error<Arch>(i == 0 ? *rotated : *original, token_range(k, first, group), weights, at, left, options.encode);
            if (!one_tile) return one_tile.error;
            error[i] = one::add(error[i], *one_tile);
        }
    spec.key_rotation = one::mul(error[1], options.margin) < error[0] ? rotation::none : rotation::hadamard;
    return make_format(spec);
}

}  // namespace kvarn
