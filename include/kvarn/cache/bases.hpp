// SPDX-License-Identifier: Apache-2.0
#pragma once
// The basis of every head of a cache by its data: each head of each layer keeps K and V in the basis that its first tile and the
// queries so far ask for (cache/choose.hpp). In: queries of each step, then a sequence whose first tile is ready. Out: the
// formats of the pool, set before its first record. The caller owns the moments; no allocation.

#include <kvarn/base/config.hpp>  // first: it refuses older standards

#include <cstddef>
#include <cstdint>
#include <span>

#include <kvarn/cache/choose.hpp>
#include <kvarn/cache/pool.hpp>
#include <kvarn/cache/seal.hpp>
#include <kvarn/cache/tokens.hpp>

namespace kvarn {

/// Moments of the queries of all heads, zero at first: [layers][KV heads][head_dim_k].
[[nodiscard]] KVARN_INLINE std::size_t moment_count(const cache_pool& pool) noexcept
{
    return pool.layers() * pool.heads() * static_cast<std::size_t>(pool.format_of(0, 0).head_dim_k());
}

/// Adds a layer's queries, [tokens][query heads][at least head_dim_k channels] in the original basis. Different layers may be
/// added at the same time. Errors: bad_argument (no such layer), shape_mismatch, null_pointer, buffer_too_small (moments).
template <class Arch = simd::native_arch, element T>
[[nodiscard]] status add_query_moments(const cache_pool& pool, std::size_t layer, kv_view<T> q,
                                       std::span<std::uint64_t> moments) noexcept;

/// Sets the bases of all heads by the first ready tile of a sequence; says how many changed. Only bases change: `options` must
/// not ask for bits. A head whose tile no record can hold keeps its bases. scratch: choose_bases_scratch_bytes. Errors:
/// stale_handle, bad_argument (no tile is ready, there are records already, tokens are stored in a rotated basis, options),
/// buffer_too_small.
template <class Arch = simd::native_arch>
[[nodiscard]] result<std::size_t> choose_bases(cache_pool& pool, sequence_id id, std::span<const std::uint64_t> moments,
                                               std::span<std::byte> scratch, const choose_options& options = {}) noexcept;

/// Bytes of scratch that choose_bases needs, at any alignment.
[[nodiscard]] KVARN_INLINE constexpr std::size_t choose_bases_scratch_bytes(const format& f) noexcept
{
    const auto channels = static_cast<std::size_t>(f.key_channels() + f.head_dim_v());
    const std::size_t reading = read_scratch_bytes(f), choosing = choose_scratch_bytes(f);
    return static_cast<std::size_t>(f.group()) * channels * sizeof(float) + 63 + (reading > choosing ? reading : choosing);
}

template <class Arch, element T>
status add_query_moments(const cache_pool& pool, std::size_t layer, kv_view<T> q, std::span<std::uint64_t> moments) noexcept
{
    if (layer >= pool.layers()) return status::bad_argument;
    if (q.heads % pool.heads() != 0) return status::shape_mismatch;
    if (moments.size() < moment_count(pool)) return status::buffer_too_small;
    const std::size_t each = q.heads / pool.heads();
    for (std::size_t head = 0; head < pool.heads(); ++head) {
        const format& f = pool.format_of(layer, head);
        const auto dim = static_cast<std::size_t>(f.head_dim_k());
        kv_view<T> group = q;
        if (q.data != nullptr) group.data = q.at(0, head * each);
        group.heads = each;
        const status said = add_query_moments<Arch>(f, group, moments.subspan((layer * pool.heads() + head) * dim, dim));
        if (said != status::ok) return said;
    }
    return status::ok;
}

template <class Arch>
result<std::size_t> choose_bases(cache_pool& pool, sequence_id id, std::span<const std::uint64_t> moments,
                                 std::span<std::byte> scratch, const choose_options& options) noexcept
{
    if (!pool.is_open(id)) return status::stale_handle;
    const detail::pool_state& s = pool.state();
    const format any = pool.format_of(0, 0);
    if (scratch.size() < choose_bases_scratch_bytes(any) || moments.size() < moment_count(pool)) return status::buffer_too_small;
    if (options.most_key_error > 0.0f || options.most_value_error > 0.0f) return status::bad_argument;
    if ((s.config.key_basis == basis::rotated) || (s.config.value_basis == basis::rotated)) return status::bad_argument;
    const std::int64_t first = detail::first_ready_position(pool.state(), id.slot);
    if (first < 0 || pool.statistics().records.used != 0) return status::bad_argument;

    const auto dk = static_cast<std::size_t>(any.key_channels()), dv = static_cast<std::size_t>(any.head_dim_v());
    const auto quantized = static_cast<std::size_t>(any.head_dim_k());
    float* const tile = reinterpret_cast<float*>(detail::aligned_to_line(scratch.data()));
    const kv_view<float> k = token_major(tile, s.group, 1, dk),
                         v = dv != 0 ? token_major(tile + s.group * dk, s.group, 1, dv) : kv_view<float>{};
    const std::span<std::byte> rest = scratch.subspan(s.group * (dk + dv) * sizeof(float) + 63);
    const auto last = first + static_cast<std::int64_t>(s.group);
    std::size_t changed = 0;
    for (std::size_t i = 0; i < s.layers * s.heads; ++i) {
        const std::size_t layer = i / s.heads, head = i % s.heads;
        if (const status said = read<Arch>(pool, id, layer, head, first, last, k, v, rest); said != status::ok) return said;
        const format before = pool.format_of(layer, head);
        const auto chosen = choose_format<Arch>(before, k, v, moments.subspan(i * quantized, quantized), rest, options);
        if (chosen.error == status::not_finite || chosen.error == status::scale_overflow) continue;
        if (!chosen) return chosen.error;
        if (*chosen == before) continue;
        if (const status said = pool.set_format(layer, head, *chosen); said != status::ok) return said;
        ++changed;
    }
    return changed;
}

}  // namespace kvarn
