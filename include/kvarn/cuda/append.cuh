// SPDX-License-Identifier: Apache-2.0
#pragma once
// New tokens of a step into exact tail pages, and the tiles that they complete into records, on one stream. In: K and V as a
// model projects them, [token][head][channel], and a slot for each token. Out: the tail pages, and records. Tokens are copied bit
// by bit. No allocation, no synchronisation; may be captured in a graph, where the tables in device memory say what a replay
// does. Thread safe.

#include <cstddef>
#include <cstdint>

#include <kvarn/cuda/seal.cuh>

namespace kvarn::cuda {

/// Shapes: new_k [tokens][heads][head_dim_k + exact_channels], new_v [tokens][heads][head_dim_v]; no tables. slot_mapping
/// [tokens] in device memory: token i goes to page slot / page_tokens, place slot % page_tokens of the tail, where slot is
/// slot_mapping[i]; negative: nowhere (a padded step). tail_k and tail_v say where pages lie and have the elements' type; sealed.k
/// and sealed.v describe the tiles to seal out of the same pages (their tables name the pages of each full tile, negative where
/// none is full yet).
struct append_arguments {
    input_tiles new_k{}, new_v{};
    const std::int32_t* slot_mapping = nullptr;
    int tokens = 0;
    output_tiles tail_k{}, tail_v{};
    seal_arguments sealed{};
};

namespace detail {

inline constexpr int append_threads = 128;

struct append_part {
    input_tiles from;
    output_tiles to;
    int pieces;  // of 16 bytes in a vector
};

struct append_call {
    append_part part[2];
    const std::int32_t* slot_mapping;
    int heads, parts;
};

/// The body of the kernel: block `item` copies token item / parts of part item % parts, all heads.
template <class Team>
KVARN_DEVICE KVARN_INLINE void append_item(Team& team, const append_call& c, int item) noexcept
{
    const append_part& p = c.part[item % c.parts];
    const int token = item / c.parts, slot = c.slot_mapping[token];
    if (slot < 0) return;
    const int page = slot / p.to.page_tokens, place = slot - page * p.to.page_tokens, each = element_bytes(p.to.type);
    const std::byte* const from = static_cast<const std::byte*>(p.from.data) + token * p.from.token_stride * each;
    std::byte* const to = static_cast<std::byte*>(p.to.data) + (page * p.to.page_stride + place * p.to.token_stride) * each;
    for_each(team, c.heads * p.pieces, [&](int i) {
        const int head = i / p.pieces, piece = i - head * p.pieces;
        reinterpret_cast<quad*>(to + head * p.to.head_stride * each)[piece] =
            reinterpret_cast<const quad*>(from + head * p.from.head_stride * each)[piece];
    });
}

[[nodiscard]] inline append_call make_append_call(const format& f, const append_arguments& a) noexcept
{
    append_call c{};
    c.part[c.parts++] = {a.new_k, a.tail_k, f.key_channels() * element_bytes(a.tail_k.type) / 16};
    if (f.has_values()) c.part[c.parts++] = {a.new_v, a.tail_v, f.head_dim_v() * element_bytes(a.tail_v.type) / 16};
    c.slot_mapping = a.slot_mapping;
    c.heads = a.sealed.heads;
    return c;
}

/// What `append` refuses, besides what `seal` does.
[[nodiscard]] inline status check_append(const format& f, const append_arguments& a) noexcept
{
    if (a.tokens < 0 || a.tokens > 0x3fffffff || a.sealed.heads < 0) return status::bad_argument;
    if (a.tokens == 0 || a.sealed.heads == 0) return status::ok;
    if (a.slot_mapping == nullptr) return status::null_pointer;
    const auto part = [&](const input_tiles& from, const output_tiles& to, int channels) {
        if (from.table != nullptr || to.table != nullptr || from.type != to.type || to.page_tokens <= 0)
            return status::bad_argument;
        if (channels * element_bytes(to.type) % 16 != 0 || to.page_stride % (16 / element_bytes(to.type)) != 0)
            return status::bad_argument;
        if (const status s = check_tokens(from, f.group()); s != status::ok) return s;
        return check_tokens(to, f.group());
    };
    if (const status s = part(a.new_k, a.tail_k, f.key_channels()); s != status::ok) return s;
    return f.has_values() ? part(a.new_v, a.tail_v, f.head_dim_v()) : status::ok;
}

#if defined(__CUDACC__)
template <class Team>
__global__ void __launch_bounds__(append_threads) append_kernel(const __grid_constant__ append_call c)
{
    Team team;
    append_item(team, c, static_cast<int>(blockIdx.x));
}
#endif

}  // namespace detail

#if defined(__CUDACC__)
/// Copies the new tokens, then seals a.sealed, on `stream`; returns before it is done. a.sealed.tiles may be 0. Errors, nothing
/// launched: those of `seal` (a.sealed.workspace included), and the same of the tokens and the tail. (If CUDA itself refuses the
/// second launch, the first has run.)
[[nodiscard]] inline status append(const format& f, const append_arguments& a, const encode_options& options,
                                   cudaStream_t stream) noexcept
{
    if (const status s = detail::check_append(f, a); s != status::ok) return s;
    if (const status s = detail::check_seal(f, a.sealed, options, detail::device_shared_bytes()); s != status::ok) return s;
    if (a.tokens != 0 && a.sealed.heads != 0) {
        const detail::append_call call = detail::make_append_call(f, a);
        const status s = detail::launch(detail::append_kernel<detail::block_team>, a.tokens * call.parts, detail::append_threads,
                                        0, call, stream);
        if (s != status::ok) return s;
    }
    return seal(f, a.sealed, options, stream);
}
#endif

}  // namespace kvarn::cuda
