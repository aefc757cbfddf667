// SPDX-License-Identifier: Apache-2.0
#pragma once
// Records back to tokens on a GPU, the values that dequantize_kv writes (format.md section 5), in the original basis or as
// stored. One launch; one thread block for 32 tokens of one part of one record, as floats in shared memory. In: records. Out:
// float, half or bfloat16 tokens, strided or paged. float arithmetic. No allocation, no synchronisation; may be captured in a
// graph. Thread safe.
//
// Scalars of records are taken as they are: a record that is damaged gives values that are not finite, where dequantize_kv
// refuses.

#include <cstddef>
#include <cstdint>

#include <kvarn/cuda/rotate.cuh>
#include <kvarn/cuda/support.cuh>
#include <kvarn/cuda/tokens.cuh>
#include <kvarn/layout/record.hpp>

namespace kvarn::cuda {

/// Shapes: records [tiles][heads], k [tiles * group][heads][head_dim_k + exact_channels], v [tiles * group][heads][head_dim_v];
/// either may be left empty (data null) to skip it. A tile that a table leaves out is not written.
struct dequantize_arguments {
    record_tiles<const std::byte> records{};
    output_tiles k{}, v{};
    int tiles = 0;
    int heads = 0;
    basis wanted = basis::original;
};

namespace detail {

inline constexpr int dequantize_threads = 256;
inline constexpr int dequantize_tokens = 32;  // of one block
inline constexpr int decoded_padding = 4;     // floats beyond a token, against bank conflicts

struct dequantize_part {
    output_tiles tokens;
    int dim, bits;
    std::uint32_t codes, channel_scale, channel_zero, token_scale, token_zero;  // bytes from the record's start
    float rotation_scale;                                                       // 0: stays as it is
    bool keys;
};

struct dequantize_call {
    dequantize_part part[2];
    record_tiles<const std::byte> records;
    int heads, parts, group, exact_channels;
    std::uint32_t exact_at;
};

KVARN_DEVICE KVARN_INLINE float scalar_at(const std::byte* record, std::uint32_t field, int i) noexcept
{
    return widen(reinterpret_cast<const half*>(record + field)[i]);
}

/// Unpacks 32 codes: body(n, code) for n = 0 .. 31. `from` is 4-byte aligned.
template <int Bits, class Body>
KVARN_DEVICE KVARN_INLINE void unpack_bits(const std::uint32_t* from, Body&& body) noexcept
{
    std::uint32_t words[Bits];
    KVARN_UNROLL
    for (int i = 0; i < Bits; ++i) words[i] = from[i];
    KVARN_UNROLL
    for (int n = 0; n < 32; ++n) {
        std::uint32_t code = words[n * Bits / 32] >> (n * Bits % 32);
        if constexpr (32 % Bits != 0)
            if (n * Bits % 32 + Bits > 32) code |= words[n * Bits / 32 + 1] << (32 - n * Bits % 32);
        body(n, code & ((1u << Bits) - 1u));
    }
}

/// Codes of K for tokens [first, first + 32) to floats [token][channel]: a thread has one channel.
template <int Bits, class Team>
KVARN_DEVICE KVARN_INLINE void decode_keys(Team& team, const dequantize_part& p, const std::byte* record, int group, int first,
                                           const float* other, const token_block& to) noexcept
{
    for_each(team, p.dim, [&](int d) {
        const float scale = scalar_at(record, p.channel_scale, d), zero = scalar_at(record, p.channel_zero, d);
        const auto* const from = reinterpret_cast<const std::uint32_t*>(record + p.codes) + (d * group + first) / 32 * Bits;
        unpack_bits<Bits>(
            from, [&](int t, std::uint32_t code) { to.at(t, d) = mul(fma(static_cast<float>(code), scale, zero), other[t]); });
    });
}

/// The same of V: a thread has 32 channels of one token.
template <int Bits, class Team>
KVARN_DEVICE KVARN_INLINE void decode_values(Team& team, const dequantize_part& p, const std::byte* record, int first,
                                             const float* other, const token_block& to) noexcept
{
    for_each(team, p.dim, [&](int item) {  // 32 tokens * dim / 32
        const int t = item % dequantize_tokens, d = item / dequantize_tokens * 32;
        const float scale = scalar_at(record, p.token_scale, first + t), zero = scalar_at(record, p.token_zero, first + t);
        const auto* const from = reinterpret_cast<const std::uint32_t*>(record + p.codes) + ((first + t) * p.dim + d) / 32 * Bits;
        unpack_bits<Bits>(from, [&](int n, std::uint32_t code) {
            to.at(t, d + n) = mul(fma(static_cast<float>(code), scale, zero), other[d + n]);
        });
    });
}

template <int Bits, class Team>
KVARN_DEVICE KVARN_INLINE void decode_part(Team& team, const dequantize_part& p, const std::byte* record, int group, int first,
                                           const float* other, const token_block& to) noexcept
{
    if (p.keys)
        decode_keys<Bits>(team, p, record, group, first, other, to);
    else
        decode_values<Bits>(team, p, record, first, other, to);
}

template <class T, class Team>
KVARN_DEVICE KVARN_INLINE void store_tokens(Team& team, const dequantize_call& c, const dequantize_part& p,
                                            const std::byte* record, int tile, int head, int first,
                                            const token_block& from) noexcept
{
    const int pieces = p.dim / 8;
    for_each(team, dequantize_tokens * pieces, [&](int item) {
        const int t = item / pieces, d = item % pieces * 8;
        const quad* const piece = reinterpret_cast<const quad*>(&from.at(t, d));
        float x[8];
        KVARN_UNROLL
        for (int n = 0; n < 2; ++n) {
            const quad q = piece[n];
            KVARN_UNROLL
            for (int i = 0; i < 4; ++i) x[4 * n + i] = bits_as<float>(q.w[i]);
        }
        store8(token_at<T>(p.tokens, c.group, tile, first + t, head) + d, x);
    });
    if (!p.keys || c.exact_channels == 0) return;
    for_each(team, dequantize_tokens * c.exact_channels, [&](int item) {
        const int t = item / c.exact_channels, d = item - t * c.exact_channels;
        const float x = scalar_at(record, c.exact_at, (first + t) * c.exact_channels + d);
        token_at<T>(p.tokens, c.group, tile, first + t, head)[p.dim + d] = narrow<T>(x);
    });
}

/// The body of the kernel: block `item` of [tile][head][part][group / 32]. `shared`: dequantize_shared_bytes, 16-byte aligned.
template <class Team>
KVARN_DEVICE KVARN_INLINE void dequantize_item(Team& team, const dequantize_call& c, int item, float* shared) noexcept
{
    const int pieces = c.group / dequantize_tokens, first = item % pieces * dequantize_tokens;
    const int rest = item / pieces, which = rest % c.parts, head = rest / c.parts % c.heads, tile = rest / c.parts / c.heads;
    const dequantize_part& p = c.part[which];
    const std::byte* const record = record_at(c.records, tile, head);
    if (record == nullptr || is_left_out(p.tokens, c.group, tile)) return;
    const token_block block{shared, p.dim + decoded_padding, 1};
    // The scalars of the axis that a thread runs along, once for all: K tokens, V channels.
    float* const other = shared + dequantize_tokens * (p.dim + decoded_padding);
    for_each(team, p.keys ? dequantize_tokens : p.dim, [&](int i) {
        other[i] = p.keys ? scalar_at(record, p.token_scale, first + i) : scalar_at(record, p.channel_scale, i);
    });
    team.barrier();
    switch (p.bits) {
    case 2: decode_part<2>(team, p, record, c.group, first, other, block); break;
    case 3: decode_part<3>(team, p, record, c.group, first, other, block); break;
    case 4: decode_part<4>(team, p, record, c.group, first, other, block); break;
    case 5: decode_part<5>(team, p, record, c.group, first, other, block); break;
    case 6: decode_part<6>(team, p, record, c.group, first, other, block); break;
    default: decode_part<8>(team, p, record, c.group, first, other, block); break;
    }
    team.barrier();
    if (p.rotation_scale != 0.0f) {
        for_each(team, dequantize_tokens * (p.dim / 16), [&](int i) {
            const int t = i % dequantize_tokens, d = i / dequantize_tokens * 16;
            float x[16];
            load16(&block.at(t, d), x);
            butterflies(x);
            put16(block, t, d, x);
        });
        team.barrier();
        finish_rotation(team, block, dequantize_tokens, p.dim, p.rotation_scale);
        team.barrier();
    }
    if (p.tokens.type == element_type::f16)
        store_tokens<half>(team, c, p, record, tile, head, first, block);
    else if (p.tokens.type == element_type::bf16)
        store_tokens<bfloat16>(team, c, p, record, tile, head, first, block);
    else
        store_tokens<float>(team, c, p, record, tile, head, first, block);
}

[[nodiscard]] KVARN_INLINE constexpr int dequantize_shared_bytes(const format& f) noexcept
{
    const int widest = f.head_dim_k() > f.head_dim_v() ? f.head_dim_k() : f.head_dim_v();
    return 4 * (dequantize_tokens * (widest + decoded_padding) + widest);
}

[[nodiscard]] inline dequantize_call make_dequantize_call(const format& f, const dequantize_arguments& a) noexcept
{
    const record_layout at = layout_of(f);
    const auto offset = [](std::size_t x) { return static_cast<std::uint32_t>(x); };
    const bool turn = f.rotated() && a.wanted == basis::original;
    dequantize_call c{};
    if (a.k.data != nullptr)
        c.part[c.parts++] = {a.k,
                             f.head_dim_k(),
                             f.key_bits(),
                             offset(at.k_codes),
                             offset(at.k_channel_scale),
                             offset(at.k_channel_zero),
                             offset(at.k_token_scale),
                             0,
                             turn ? hadamard_scale(f.head_dim_k()) : 0.0f,
                             true};
    if (a.v.data != nullptr)
        c.part[c.parts++] = {a.v,
                             f.head_dim_v(),
                             f.value_bits(),
                             offset(at.v_codes),
                             offset(at.v_channel_scale),
                             0,
                             offset(at.v_token_scale),
                             offset(at.v_token_zero),
                             turn ? hadamard_scale(f.head_dim_v()) : 0.0f,
                             false};
    c.records = a.records;
    c.heads = a.heads;
    c.group = f.group();
    c.exact_channels = f.exact_channels();
    c.exact_at = offset(at.exact);
    return c;
}

/// What `dequantize` refuses.
[[nodiscard]] inline status check_dequantize(const format& f, const dequantize_arguments& a) noexcept
{
    if (a.wanted != basis::original && a.wanted != basis::rotated) return status::bad_argument;
    if (const support s = supports(f, operation::dequantize); !s) return s.error;
    if (a.tiles < 0 || a.heads < 0) return status::bad_argument;
    if (a.tiles == 0 || a.heads == 0) return status::ok;
    if (a.heads > 0x3fffffff / 8 / a.tiles) return status::bad_argument;
    if (a.k.data == nullptr && a.v.data == nullptr) return status::null_pointer;
    if (a.v.data != nullptr && !f.has_values()) return status::shape_mismatch;
    for (const output_tiles* x : {&a.k, &a.v})
        if (x->data != nullptr)
            if (const status s = check_tokens(*x, f.group()); s != status::ok) return s;
    return check_records(f, a.records, 1, 1);
}

#if defined(__CUDACC__)
template <class Team>
__global__ void __launch_bounds__(dequantize_threads) dequantize_kernel(const __grid_constant__ dequantize_call c)
{
    extern __shared__ float4 kvarn_shared[];
    Team team;
    dequantize_item(team, c, static_cast<int>(blockIdx.x), reinterpret_cast<float*>(kvarn_shared));
}
#endif

}  // namespace detail

#if defined(__CUDACC__)
/// Decodes records on `stream`; returns before they are done. Errors, nothing launched: those of `supports`, null_pointer,
/// bad_argument (alignment, sizes, or a launch that CUDA refused), shape_mismatch. Zero tiles are fine.
[[nodiscard]] inline status dequantize(const format& f, const dequantize_arguments& a, cudaStream_t stream) noexcept
{
    if (const status s = detail::check_dequantize(f, a); s != status::ok) return s;
    if (a.tiles == 0 || a.heads == 0) return status::ok;
    const detail::dequantize_call call = detail::make_dequantize_call(f, a);
    return detail::launch(detail::dequantize_kernel<detail::block_team>,
                          a.tiles * a.heads * call.parts * (f.group() / detail::dequantize_tokens), detail::dequantize_threads,
                          detail::dequantize_shared_bytes(f), call, stream);
}
#endif

}  // namespace kvarn::cuda
