// SPDX-License-Identifier: Apache-2.0
#pragma once
// Decode attention straight on records on a GPU: a batch of sequences with paged records and exact sink and tail tokens, m new
// tokens, grouped query heads, causal mask, window, soft-cap, sink logits and log-sum-exp, split over the records with a second
// launch that merges (attention/call.cuh has the shapes). Out: softmax(scale * q k^T) v. float accumulators. No allocation, no
// synchronisation; may be captured in a graph. Thread safe. Deterministic for equal splits; against kvarn::attend the error is
// that of float.
//
// Values, tables and counts are taken as they are: an engine must not pass records whose record_status is not ok.

#include <cstddef>
#include <cstdint>
#include <type_traits>

#include <kvarn/cuda/attention/attend.cuh>
#include <kvarn/cuda/attention/call.cuh>

namespace kvarn::cuda {
namespace detail {

/// Thread blocks of the two launches.
[[nodiscard]] KVARN_INLINE int attention_blocks(const attention_call& c) noexcept
{
    return c.a.sequences * c.a.kv_heads * c.row_blocks * (c.a.splits + 1);
}
[[nodiscard]] KVARN_INLINE int combine_blocks(const attention_call& c) noexcept
{
    return c.a.sequences * c.a.kv_heads * c.rows;
}

/// Calls body(group, whether V is read from K, whether there is a mask or ALiBi), all as integral constants.
template <class Body>
auto with_shape(const attention_call& c, Body&& body) noexcept
{
    constexpr std::integral_constant<bool, true> yes{};
    constexpr std::integral_constant<bool, false> no{};
    const bool general = c.a.mask_tokens > 0 || c.a.alibi_slopes != nullptr;
    const auto with_group = [&](auto group) {
        if (general) return c.dv == 0 ? body(group, yes, yes) : body(group, no, yes);
        return c.dv == 0 ? body(group, yes, no) : body(group, no, no);
    };
    switch (c.group) {
    case 32: return with_group(std::integral_constant<int, 32>{});
    case 64: return with_group(std::integral_constant<int, 64>{});
    case 128: return with_group(std::integral_constant<int, 128>{});
    default: return with_group(std::integral_constant<int, 256>{});
    }
}

#if !defined(__CUDACC__)
/// The body of the call's kernel, for teams of a C++ compiler.
template <class Team>
void attend_item(Team& team, const attention_call& c, int item, float* shared) noexcept
{
    with_shape(c, [&](auto group, auto latent, auto general) { attend_item<group(), latent(), general()>(team, c, item, shared); });
}
#endif

[[nodiscard]] inline status check_exact(const exact_pages& x, bool values) noexcept
{
    if (x.tokens == nullptr) return status::ok;
    if (x.k == nullptr || (values && x.v == nullptr) || x.table == nullptr) return status::null_pointer;
    if (x.type > element_type::bf16 || x.pages <= 0 || x.page_tokens <= 0) return status::bad_argument;
    const std::ptrdiff_t whole = 16 / element_bytes(x.type);
    for (const std::ptrdiff_t stride :
         {x.k_page_stride, x.k_token_stride, x.k_head_stride, x.v_page_stride, x.v_token_stride, x.v_head_stride})
        if (stride % whole != 0) return status::bad_argument;
    return is_aligned(x.k, 16) && (!values || is_aligned(x.v, 16)) ? status::ok : status::bad_argument;
}

template <class Void>
[[nodiscard]] status check_vectors(const batch_vectors<Void>& x) noexcept
{
    if (x.data == nullptr) return status::null_pointer;
    if (x.type > element_type::bf16) return status::bad_argument;
    const std::ptrdiff_t whole = 16 / element_bytes(x.type);
    const bool aligned = x.sequence_stride % whole == 0 && x.token_stride % whole == 0 && x.head_stride % whole == 0;
    return aligned && is_aligned(x.data, 16) ? status::ok : status::bad_argument;
}

[[nodiscard]] inline status check_attention(const format& f, const attention_arguments& a, int shared_bytes) noexcept
{
    if (const support s = supports(f, operation::attend, shared_bytes); !s) return s.error;
    if (a.sequences < 0 || a.kv_heads < 0 || a.new_tokens < 0 || a.heads_per_kv < 0) return status::bad_argument;
    if (a.sequences == 0 || a.kv_heads == 0 || a.new_tokens == 0 || a.heads_per_kv == 0) return status::ok;
    if (a.new_tokens > 8 || a.heads_per_kv > max_query_rows / a.new_tokens || a.splits < 1 || a.splits > max_splits)
        return status::bad_argument;
    if (a.sequences > 65536 || a.kv_heads > 65536 / a.sequences) return status::bad_argument;
    if (a.sequences * a.kv_heads > 0x3fffffff / (a.splits + 1) / (a.new_tokens * a.heads_per_kv)) return status::bad_argument;
    const auto in_range = [](float x, float most) { return x >= 0.0f && x <= most; };
    if (!in_range(a.softmax_scale, 1e30f) || !in_range(a.logit_soft_cap, 1000.0f) || a.window < 0) return status::bad_argument;
    if (a.query_basis > basis::rotated || a.output_basis > basis::rotated) return status::bad_argument;
    if (a.mask_tokens < 0 || a.mask_stride < 0 || a.mask_tokens / 64 + (a.mask_tokens % 64 != 0) > a.mask_stride || !is_aligned(a.mask, 8))
        return status::bad_argument;
    if (a.workspace == nullptr || (a.mask_tokens != 0 && a.mask == nullptr)) return status::null_pointer;
    if (const status s = check_vectors(a.q); s != status::ok) return s;
    if (const status s = check_vectors(a.out); s != status::ok) return s;
    if (const status s = check_exact(a.sink, f.has_values()); s != status::ok) return s;
    if (const status s = check_exact(a.tail, f.has_values()); s != status::ok) return s;
    if (a.records.tiles != nullptr) {
        if (a.records.data == nullptr || a.records.table == nullptr) return status::null_pointer;
        if (a.records.max_tiles <= 0 || !is_aligned(a.records.data, 8) || !is_aligned(a.records.spans, 8)) return status::bad_argument;
        if (a.records.tile_stride % 8 != 0 || a.records.head_stride % 8 != 0) return status::bad_argument;
    }
    return status::ok;
}

#if defined(__CUDACC__)
template <int Group, bool Latent, bool General, class Team>
__global__ void __launch_bounds__(attention_threads, resident_blocks(Group, Latent, General))
    attention_kernel(const __grid_constant__ attention_call c)
{
    extern __shared__ float4 kvarn_shared[];
    Team team;
    attend_item<Group, Latent, General>(team, c, static_cast<int>(blockIdx.x), reinterpret_cast<float*>(kvarn_shared));
}

template <class Team>
__global__ void __launch_bounds__(combine_threads) combine_kernel(const __grid_constant__ attention_call c)
{
    extern __shared__ float4 kvarn_shared[];
    Team team;
    combine_item(team, c, static_cast<int>(blockIdx.x), reinterpret_cast<float*>(kvarn_shared));
}
#endif

}  // namespace detail

#if defined(__CUDACC__)
/// Attends with all query rows of the batch, in two launches on `stream`; returns before they are done. Errors, nothing launched:
/// those of `supports`, null_pointer, bad_argument (sizes, options, alignment, or a launch that CUDA refused). If CUDA itself
/// refuses the second launch, the first has run, in the workspace only.
[[nodiscard]] inline status attend(const format& f, const attention_arguments& a, cudaStream_t stream) noexcept
{
    if (const status s = detail::check_attention(f, a, detail::device_shared_bytes()); s != status::ok) return s;
    if (a.sequences == 0 || a.kv_heads == 0 || a.new_tokens == 0 || a.heads_per_kv == 0) return status::ok;
    const detail::attention_call c = detail::make_attention_call(f, a);
    const status first = detail::with_shape(c, [&](auto group, auto latent, auto general) {
        return detail::launch(detail::attention_kernel<group(), latent(), general(), detail::block_team>, detail::attention_blocks(c),
                              detail::attention_threads, detail::attention_shared_bytes(f), c, stream);
    });
    if (first != status::ok) return first;
    return detail::launch(detail::combine_kernel<detail::block_team>, detail::combine_blocks(c), detail::combine_threads,
                          detail::combine_shared_bytes(c.out_dim), c, stream);
}
#endif

}  // namespace kvarn::cuda
