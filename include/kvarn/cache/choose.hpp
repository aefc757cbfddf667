// SPDX-License-Identifier: Apache-2.0
#pragma once
// Which basis a head is sealed in, rotated or original, for K and for V, and in how many bits, chosen by the data: some models lose a hundred
// times less in one basis than in the other (docs/accuracy.md). In: one or more tiles of K and V, and the moments of the queries seen so far.
// Out: the format for that head. What counts for K is not its own error but that of the scores: sum over channels of E[q_d^2] e_d^2 in the
// original basis; for V the squared error. The caller owns all memory; nothing allocates. float arithmetic in a fixed order: the same choice
// on every machine.

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

/// What decides the basis, and the bits, of a head.
struct choose_options {
    /// K leaves the rotation where that divides the weighted error by more than this. Above 1, because a rotation is the safer choice for
    /// tiles that come later.
    float margin = 1.5f;
    /// The same for V and its squared error. V gains on channels far from zero, which a rotation spreads over all.
    float value_margin = 2.0f;
    /// Where above 0: the part takes the fewest bits, from those of `base` to 8, at which its relative error (of K: weighted by the queries)
    /// is at most this; 8 where none is enough. (record_errors tell what to keep exact.)
    float most_key_error = 0.0f;
    float most_value_error = 0.0f;
    encode_options encode{};  ///< K and V in the original basis: rotated input cannot be compared with what it was
};

/// `base` with the widths of codes that keep most at no more than `bits` bits per element, scalars and padding included: k2v2, k3v2, k4v2 and
/// k4v4, the frontier that docs/accuracy.md measures on real models, then 6 and 8 bits for both. Its basis and group stay; a format without a V part
/// gets the K width alone. Errors: unsupported_bits (the narrowest takes more).
[[nodiscard]] KVARN_INLINE constexpr result<format> format_within(const format& base, double bits,
                                                                  record_stride stride = {}) noexcept
{
    constexpr int frontier[][2] = {{2, 2}, {3, 2}, {4, 2}, {4, 4}, {6, 6}, {8, 8}};
    result<format> best = status::unsupported_bits;
    for (const auto& [key_bits, value_bits] : frontier) {
        format_spec spec = base.spec();
        spec.key_bits = key_bits;
        if (base.has_values()) spec.value_bits = value_bits;
        const auto f = make_format(spec);
        if (f.ok() && bits_per_element(*f, stride) <= bits) best = f;
    }
    return best;
}

/// Bytes of scratch that choose_format needs, at any alignment.
[[nodiscard]] KVARN_INLINE constexpr std::size_t choose_scratch_bytes(const format& f) noexcept;

/// `base` with its parts rotated or not, whichever loses less on the tiles of `k` and `v`, [tiles * group][1][channels], and with more bits
/// where `options` say so. Everything else of `base` stays: V's part where `v` has no tokens, K's basis without queries (moments all zero).
/// Head dimensions that cannot be rotated are not. Costs two seals and two decodings of the tiles, and one for every further width tried; take
/// the first tile of a head. Errors: those of quantize_kv; bad_argument (a margin that is not above 0, a bound below 0, a basis of options.encode
/// other than the original one), buffer_too_small.
template <class Arch = simd::native_arch, element T>
[[nodiscard]] result<format> choose_format(const format& base, kv_view<T> k, kv_view<T> v, std::span<const std::uint64_t> moments,
                                           std::span<std::byte> scratch, const choose_options& options = {}) noexcept;

namespace detail {

/// A part's squared error on the tiles, and what it is relative to; up to a common factor.
struct part_loss {
    float error = 0.0f;
    float energy = 0.0f;

    [[nodiscard]] KVARN_INLINE bool within(float most) const noexcept
    {
        using one = simd::kernels<simd::portable>;
        return error <= one::mul(one::mul(most, most), energy);
    }
};
struct tile_loss {
    part_loss k, v;
};

[[nodiscard]] KVARN_INLINE constexpr std::size_t whole_lines(std::size_t bytes) noexcept { return (bytes + 63) / 64 * 64; }

/// Adds what `decoded`, [tokens][dim], loses of `exact`. weights: [dim], or null for 1.
template <class Arch, class T>
KVARN_NOINLINE void add_loss(const kv_view<T>& exact, std::size_t dim, const float* decoded, const float* weights, part_loss& loss) noexcept
{
    using one = simd::kernels<simd::portable>;
    for (std::size_t t = 0; t < exact.tokens; ++t)
        for (std::size_t d = 0; d < dim; ++d) {
            const float x = one::load(exact.at(t, 0) + static_cast<std::ptrdiff_t>(d) * exact.channel_stride);
            const float e = one::sub(decoded[t * dim + d], x), weight = weights != nullptr ? weights[d] : 1.0f;
            loss.error = one::fma(one::mul(e, weight), e, loss.error);
            loss.energy = one::fma(one::mul(x, weight), x, loss.energy);
        }
}

/// What `f`, without exact channels, loses of the tiles. `memory`: one record, then the decoded tokens of K and of V.
template <class Arch, element T>
result<tile_loss> loss_of(const format& f, const kv_view<T>& k, const kv_view<T>& v, const float* weights, std::byte* memory,
                          std::span<std::byte> scratch, const encode_options& options) noexcept
{
    const auto group = static_cast<std::size_t>(f.group()), dim = static_cast<std::size_t>(f.head_dim_k()),
               value_dim = static_cast<std::size_t>(f.head_dim_v());
    const auto record = tile_major_records(f, memory, record_bytes(f), 1, 1);
    float* const keys = reinterpret_cast<float*>(memory + whole_lines(record_bytes(f)));
    float* const values = keys + group * dim;
    const auto value_tokens = f.has_values() ? token_major(values, group, 1, value_dim) : kv_view<float>{};
    tile_loss loss;
    for (std::size_t first = 0; first < k.tokens; first += group) {
        const auto key_tile = token_range(k, first, group);
        const auto value_tile = f.has_values() ? token_range(v, first, group) : kv_view<T>{};
        if (const status s = quantize_kv<Arch>(f, key_tile, value_tile, record, scratch, options); s != status::ok) return s;
        const auto key_tokens = token_major(keys, group, 1, dim);
        if (const status s = dequantize_kv<Arch>(f, record, key_tokens, value_tokens, basis::original, scratch); s != status::ok) return s;
        add_loss<Arch>(as_storage(key_tile), dim, keys, weights, loss.k);
        if (f.has_values()) add_loss<Arch>(as_storage(value_tile), value_dim, values, nullptr, loss.v);
    }
    return loss;
}

/// The next width of codes, or 0.
[[nodiscard]] KVARN_INLINE constexpr int wider(int bits) noexcept
{
    return bits >= 8 ? 0 : bits == 6 ? 8 : bits + 1;
}

}  // namespace detail

KVARN_INLINE constexpr std::size_t choose_scratch_bytes(const format& f) noexcept
{
    const auto group = static_cast<std::size_t>(f.group()), dim = static_cast<std::size_t>(f.head_dim_k()),
               value_dim = static_cast<std::size_t>(f.head_dim_v());
    format_spec widest = f.spec();
    widest.key_bits = 8;
    if (f.has_values()) widest.value_bits = 8;
    // Alignment, weights, one record, decoded tokens, scratch of the codec.
    return 63 + detail::whole_lines(dim * 4) + detail::whole_lines(record_bytes(make_format(widest).value)) +
           detail::whole_lines(group * (dim + value_dim) * 4) + scratch_bytes(f);
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
result<format> choose_format(const format& base, kv_view<T> k, kv_view<T> v, std::span<const std::uint64_t> moments, std::span<std::byte> scratch,
                             const choose_options& options) noexcept
{
    using one = simd::kernels<simd::portable>;
    const auto dim = static_cast<std::size_t>(base.head_dim_k()), group = static_cast<std::size_t>(base.group());
    const bool with_values = base.has_values() && v.tokens != 0;
    if (!(options.margin > 0.0f) || !(options.value_margin > 0.0f)) return status::bad_argument;
    if (options.encode.key_basis != basis::original || options.encode.value_basis != basis::original) return status::bad_argument;
    if (!(options.most_key_error >= 0.0f) || !(options.most_value_error >= 0.0f)) return status::bad_argument;
    if (k.heads != 1 || k.channels != static_cast<std::size_t>(base.key_channels())) return status::shape_mismatch;
    if (k.tokens == 0 || k.tokens % group != 0) return status::token_count_mismatch;
    if (with_values && (v.heads != 1 || v.channels != static_cast<std::size_t>(base.head_dim_v()))) return status::shape_mismatch;
    if (with_values && v.tokens != k.tokens) return status::token_count_mismatch;
    if (moments.size() < dim || scratch.size() < choose_scratch_bytes(base)) return status::buffer_too_small;
    if (k.data == nullptr || (with_values && v.data == nullptr) || moments.data() == nullptr || scratch.data() == nullptr)
        return status::null_pointer;

    // The trials: no exact channels, no V where none is given.
    format_spec tried = base.spec();
    tried.exact_channels = 0;
    if (!with_values) tried.value_bits = 0;
    k.channels = dim;
    const bool key_can = detail::is_head_dim(tried.head_dim_k, rotation::hadamard);
    const bool value_can = detail::is_head_dim(with_values ? tried.head_dim_v : tried.head_dim_k, rotation::hadamard);

    std::byte* at = scratch.data() + (64 - reinterpret_cast<std::uintptr_t>(scratch.data()) % 64) % 64;
    float* weights = nullptr;
    std::uint64_t most = 0;
    for (std::size_t d = 0; d < dim; ++d) most = moments[d] > most ? moments[d] : most;
    if (most != 0) {
        weights = reinterpret_cast<float*>(at);
        for (std::size_t d = 0; d < dim; ++d) weights[d] = one::div(static_cast<float>(moments[d]), static_cast<float>(most));
    }
    at += detail::whole_lines(dim * sizeof(float));
    std::byte* const codec = scratch.data() + (scratch.size() - scratch_bytes(base));
    const std::span<std::byte> left(codec, scratch_bytes(base));
    const simd::float_environment guard;
    const auto loss_of = [&]() noexcept -> result<detail::tile_loss> {
        const auto f = make_format(tried);
        if (!f) return f.error;
        return detail::loss_of<Arch>(*f, k, v, weights, at, left, options.encode);
    };

    tried.key_rotation = tried.value_rotation = rotation::none;
    const auto original = loss_of();
    if (!original) return original.error;
    tried.key_rotation = key_can ? rotation::hadamard : rotation::none;
    tried.value_rotation = value_can ? rotation::hadamard : rotation::none;
    const auto rotated = loss_of();
    if (!rotated) return rotated.error;
    const auto choice = [](const detail::part_loss& in_original, const detail::part_loss& in_rotated, float margin) {
        return one::mul(in_original.error, margin) < in_rotated.error ? rotation::none : rotation::hadamard;
    };
    format_spec spec = base.spec();
    if (!key_can)
        spec.key_rotation = rotation::none;
    else if (weights != nullptr)
        spec.key_rotation = choice(original->k, rotated->k, options.margin);
    if (with_values) spec.value_rotation = value_can ? choice(original->v, rotated->v, options.value_margin) : rotation::none;

    tried.key_rotation = spec.key_rotation;
    tried.value_rotation = with_values ? spec.value_rotation : tried.key_rotation;
    detail::tile_loss loss{spec.key_rotation == rotation::none ? original->k : rotated->k,
                           spec.value_rotation == rotation::none ? original->v : rotated->v};
    const auto needs = [](const detail::part_loss& part, float bound, int bits) {
        return bound > 0.0f && detail::wider(bits) != 0 && !part.within(bound);
    };
    while (true) {
        const bool more_keys = needs(loss.k, options.most_key_error, tried.key_bits);
        const bool more_values = with_values && needs(loss.v, options.most_value_error, tried.value_bits);
        if (!more_keys && !more_values) break;
        if (more_keys) tried.key_bits = detail::wider(tried.key_bits);
        if (more_values) tried.value_bits = detail::wider(tried.value_bits);
        const auto next = loss_of();
        if (!next) return next.error;
        loss = *next;
    }
    spec.key_bits = tried.key_bits;
    if (with_values) spec.value_bits = tried.value_bits;
    return make_format(spec);
}

}  // namespace kvarn
