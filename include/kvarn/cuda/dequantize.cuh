// SPDX-License-Identifier: Apache-2.0
#pragma once
// Records back to tokens on a GPU, the values that dequantize_kv writes (docs/record-format.md), in the original basis or as
// stored. One launch; a thread block takes some tokens of one part of one record. As stored, a thread decodes eight channels of
// eight tokens in registers and writes them. For the original basis it decodes sixteen channels of four tokens, does the
// butterflies among them, and leaves them in shared memory, from where the others are done and written (rotate.cuh). In: records.
// Out: float, half or bfloat16 tokens, strided or paged. float arithmetic. No allocation, no synchronisation; may be captured in
// a graph. Thread safe.
//
// Scalars of records are taken as they are: a record that is damaged gives values that are not finite, where dequantize_kv
// refuses.

#include <cstddef>
#include <cstdint>

#include <kvarn/cuda/codes.cuh>
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

inline constexpr int dequantize_threads = 128;    // of a block, at most
inline constexpr int dequantize_elements = 8192;  // of a block, at most; a thread decodes 64

/// n / d for n < 2^31 without a division.
struct divisor {
    std::uint32_t d = 1, multiplier = 1, shift = 0;

    divisor() = default;
    explicit divisor(int by) noexcept : d(static_cast<std::uint32_t>(by))
    {
        while ((std::uint64_t{1} << shift) < d) ++shift;
        multiplier = static_cast<std::uint32_t>((((std::uint64_t{1} << shift) - d) << 32) / d + 1);
    }
    KVARN_DEVICE KVARN_INLINE std::uint32_t quotient(std::uint32_t n) const noexcept
    {
        return (static_cast<std::uint32_t>(static_cast<std::uint64_t>(n) * multiplier >> 32) + n) >> shift;
    }
};

/// K or V of a format and its tokens. A row of codes is a channel of K, a token of V; its columns are the other axis.
struct dequantize_part {
    output_tiles tokens;
    std::uint32_t codes, row_bytes, row_scale, row_zero, column_scale;  // bytes from the record's start
    float rotation_scale;                                               // 0: stays as it is
    int bits, dim_log2;
    int tokens_log2, blocks;  // tokens of one block, blocks of a tile (none: left out)
    int page_log2;            // tokens of one page
};

struct dequantize_call {
    dequantize_part k, v;
    record_tiles<const std::byte> records;
    divisor heads, blocks;  // blocks of one record
    int group, exact_channels;
    divisor exact_pieces;  // of eight channels or less
    std::uint32_t exact_at;
    int threads, shared_bytes;
};

/// Where the tokens of one tile and head lie; a token's address takes no division.
template <class T>
struct token_rows {
    const dequantize_part& p;
    T* data;
    const std::int32_t* pages;  // of the tile

    KVARN_DEVICE KVARN_INLINE token_rows(const dequantize_part& part, int group, int tile, int head) noexcept
        : p(part), data(static_cast<T*>(part.tokens.data) + head * part.tokens.head_stride), pages(part.tokens.table)
    {
        if (p.tokens.table == nullptr)
            data += static_cast<std::ptrdiff_t>(tile) * group * p.tokens.token_stride;
        else
            pages += static_cast<std::ptrdiff_t>(tile) * (group >> p.page_log2);
    }
    KVARN_DEVICE KVARN_INLINE T* at(int token) const noexcept
    {
        if (p.tokens.table == nullptr) return data + token * p.tokens.token_stride;
        return data + pages[token >> p.page_log2] * p.tokens.page_stride +
               (token & ((1 << p.page_log2) - 1)) * p.tokens.token_stride;
    }
    /// Whether tokens [t, t + n) lie in one page for every t that is a multiple of n, a power of two.
    KVARN_DEVICE KVARN_INLINE bool together(int n) const noexcept { return p.tokens.table == nullptr || 1 << p.page_log2 >= n; }
};

/// N scalars of a field from scalar `i` on, both multiples of 4.
template <int N>
KVARN_DEVICE KVARN_INLINE void load_scalars(const std::byte* record, std::uint32_t field, int i, float (&x)[N]) noexcept
{
    load_scalars(record + (field + 2 * static_cast<std::uint32_t>(i)), x);
}

/// Decodes channels [d, d + Channels) of tokens [first, first + Tokens), both multiples: body(t, x[Channels]) for t = 0, 1, ...
template <int Bits, bool Keys, int Channels, int Tokens, class Body>
KVARN_DEVICE KVARN_INLINE void decode(const dequantize_part& p, const std::byte* record, int d, int first, Body&& body) noexcept
{
    constexpr int rows = Keys ? Channels : Tokens, columns = Keys ? Tokens : Channels;
    const int row = Keys ? d : first, column = Keys ? first : d;
    const std::byte* const from =
        record + (p.codes + static_cast<std::uint32_t>(row) * p.row_bytes + piece_offset<Bits, columns>(column));
    code_piece<Bits, columns> codes[rows];
    KVARN_UNROLL
    for (int r = 0; r < rows; ++r)
        codes[r] = load_piece_at<Bits, columns>(from + static_cast<std::size_t>(r) * p.row_bytes, column);
    float scale[rows], zero[rows], other[columns];
    load_scalars(record, p.row_scale, row, scale);
    load_scalars(record, p.row_zero, row, zero);
    load_scalars(record, p.column_scale, column, other);
    KVARN_UNROLL
    for (int t = 0; t < Tokens; ++t) {
        float x[Channels];
        KVARN_UNROLL
        for (int n = 0; n < Channels; ++n) {
            const int r = Keys ? n : t, c = Keys ? t : n;
            x[n] = mul(fma(float_of(codes[r], c), scale[r], zero[r]), other[c]);
        }
        body(t, x);
    }
}

/// As stored. Eight threads take 64 neighbouring channels, the next eight the next tokens.
template <int Bits, bool Keys, class T, class Team>
KVARN_DEVICE KVARN_INLINE void decode_to_tokens(Team& team, const dequantize_part& p, const std::byte* record, int begin,
                                                const token_rows<T>& rows) noexcept
{
    if (team.rank() >= 1 << (p.tokens_log2 + p.dim_log2 - 6)) return;
    const int place = team.rank() / 8, groups_log2 = p.tokens_log2 - 3, mask = (1 << groups_log2) - 1;
    const int d = (place >> groups_log2) * 64 + team.rank() % 8 * 8, first = begin + (place & mask) * 8;
    const bool together = rows.together(8);
    T* to = rows.at(first) + d;
    decode<Bits, Keys, 8, 8>(p, record, d, first, [&](int t, const float(&x)[8]) {
        if (t != 0) to = together ? to + p.tokens.token_stride : rows.at(first + t) + d;
        store(to, x);
    });
}

/// How tokens lie in shared memory between the two halves of a rotation: tokens 2 pair and 2 pair + 1, of them channels
/// [16 group, 16 group + 16) in 128 bytes, four channels from 4 n on in the 16 bytes 4 (token % 2) + n of them, permuted so that
/// neither threads along tokens nor threads along channels meet in a bank: a bitwise exclusive or with place_of takes the offset
/// of the 128 bytes there.
KVARN_DEVICE KVARN_INLINE std::uint32_t turned(std::uint32_t group) noexcept
{
    return (group & 1) << 6 | (group & 2) << 4 | (group & 4) << 2;
}
KVARN_DEVICE KVARN_INLINE std::uint32_t offset_of(std::uint32_t pair, std::uint32_t group, int dim_log2) noexcept
{
    return ((pair << (dim_log2 - 4)) + group) << 7 | ((pair << 3 & 0x70) ^ turned(group));
}
KVARN_DEVICE KVARN_INLINE std::uint32_t place_of(int token, int n) noexcept
{
    return static_cast<std::uint32_t>((token & 1) << 6 | n << 4);
}

/// For the original basis: the first four levels, to shared memory. Neighbouring threads take neighbours in the rows of codes.
template <int Bits, bool Keys, class Team>
KVARN_DEVICE KVARN_INLINE void decode_to_shared(Team& team, const dequantize_part& p, const std::byte* record, int begin,
                                                float* shared) noexcept
{
    if (team.rank() >= 1 << (p.tokens_log2 + p.dim_log2 - 6)) return;
    const int inner_log2 = Keys ? p.tokens_log2 - 2 : p.dim_log2 - 4;
    const int inner = team.rank() & ((1 << inner_log2) - 1), outer = team.rank() >> inner_log2;
    const int group = Keys ? outer : inner, tokens = Keys ? inner : outer;  // sixteen channels, four tokens
    auto* const to = reinterpret_cast<std::byte*>(shared);
    decode<Bits, Keys, 16, 4>(p, record, group * 16, begin + tokens * 4, [&](int t, float(&x)[16]) {
        butterflies(x);
        const std::uint32_t offset =
            offset_of(static_cast<std::uint32_t>(tokens * 2 + t / 2), static_cast<std::uint32_t>(group), p.dim_log2);
        KVARN_UNROLL
        for (int n = 0; n < 4; ++n) {
            const float four[4] = {x[4 * n], x[4 * n + 1], x[4 * n + 2], x[4 * n + 3]};
            store(reinterpret_cast<float*>(to + (offset ^ place_of(t, n))), four);
        }
    });
}

/// The other levels, the scale, and to the tokens. A thread takes `Width` neighbouring channels and those 16, 32, ... further.
template <int Dim, class T, class Team>
KVARN_DEVICE KVARN_INLINE void rotate_to_tokens(Team& team, const dequantize_part& p, const float* shared, int begin,
                                                const token_rows<T>& rows) noexcept
{
    constexpr int groups = Dim / 16, width = Dim > 128 ? 2 : 4, threads = 16 / width,
                  dim_log2 = Dim == 64    ? 6
                             : Dim == 128 ? 7
                             : Dim == 256 ? 8
                                          : 9;
    struct alignas(4 * width) piece {
        float x[width];
    };
    const auto* const from = reinterpret_cast<const std::byte*>(shared);
    const auto body = [&](int item) {
        const int token = item / threads, d = item % threads * width;
        const std::uint32_t offset = offset_of(static_cast<std::uint32_t>(token / 2), 0, dim_log2) ^ place_of(token, d / 4);
        float x[width][groups];
        KVARN_UNROLL
        for (int i = 0; i < groups; ++i) {
            const std::uint32_t group = static_cast<std::uint32_t>(i), at = (offset ^ turned(group)) + (group << 7);
            const piece q = *reinterpret_cast<const piece*>(from + at + d % 4 * 4);
            KVARN_UNROLL
            for (int n = 0; n < width; ++n) x[n][i] = q.x[n];
        }
        KVARN_UNROLL
        for (int n = 0; n < width; ++n) butterflies(x[n]);
        T* const to = rows.at(begin + token) + d;
        KVARN_UNROLL
        for (int i = 0; i < groups; ++i) {
            float y[width];
            KVARN_UNROLL
            for (int n = 0; n < width; ++n) y[n] = mul(x[n][i], p.rotation_scale);
            store(to + 16 * i, y);
        }
    };
    // A token of 512 channels is enough for one thread of each: no loop, whose variables would take registers from it.
    if constexpr (Dim == 512) {
        if (team.rank() < threads << p.tokens_log2) body(team.rank());
    } else {
        for_each(team, threads << p.tokens_log2, body);
    }
}

/// The exact channels of the block's tokens, in pieces of eight or what is left.
template <class T, class Team>
KVARN_DEVICE KVARN_INLINE void copy_exact(Team& team, const dequantize_call& c, const dequantize_part& p, const std::byte* record,
                                          int begin, const token_rows<T>& rows) noexcept
{
    const int pieces = static_cast<int>(c.exact_pieces.d);
    for_each(team, pieces << p.tokens_log2, [&](int item) {
        const int token = static_cast<int>(c.exact_pieces.quotient(static_cast<std::uint32_t>(item))),
                  d = (item - token * pieces) * 8, at = (begin + token) * c.exact_channels + d;
        T* const to = rows.at(begin + token) + (1 << p.dim_log2) + d;
        float low[4], high[4];
        load_scalars(record, c.exact_at, at, low);
        store(to, low);
        if (d + 4 == c.exact_channels) return;
        load_scalars(record, c.exact_at, at + 4, high);
        store(to + 4, high);
    });
}

/// Block `block` of K or V of one record.
template <bool Keys, class Team>
KVARN_DEVICE KVARN_INLINE void dequantize_block(Team& team, const dequantize_call& c, const dequantize_part& p, int block,
                                                int tile, int head, float* shared) noexcept
{
    const std::byte* const record = record_at(c.records, tile, head);
    if (record == nullptr || is_left_out(p.tokens, c.group, tile)) return;
    const int begin = block << p.tokens_log2;
    const bool turn = p.rotation_scale != 0.0f, exact = Keys && c.exact_channels != 0;
    with_bits(p.bits, [&](auto width) {
        constexpr int bits = decltype(width)::value;
        if (turn) return decode_to_shared<bits, Keys>(team, p, record, begin, shared);
        with_element(p.tokens.type, [&](auto element) {
            decode_to_tokens<bits, Keys>(team, p, record, begin, token_rows<decltype(element)>(p, c.group, tile, head));
        });
    });
    if (turn) team.barrier();
    if (!turn && !exact) return;
    with_element(p.tokens.type, [&](auto element) {
        const token_rows<decltype(element)> rows(p, c.group, tile, head);
        if (turn) {
            if (p.dim_log2 == 6)
                rotate_to_tokens<64>(team, p, shared, begin, rows);
            else if (p.dim_log2 == 7)
                rotate_to_tokens<128>(team, p, shared, begin, rows);
            else if (p.dim_log2 == 8)
                rotate_to_tokens<256>(team, p, shared, begin, rows);
            else
                rotate_to_tokens<512>(team, p, shared, begin, rows);
        }
        if (exact) copy_exact(team, c, p, record, begin, rows);
    });
}

/// The body of the kernel: block `item` of [tile][head][block of K, then of V]. `shared`: call.shared_bytes, 16-byte aligned.
template <class Team>
KVARN_DEVICE KVARN_INLINE void dequantize_item(Team& team, const dequantize_call& c, int item, float* shared) noexcept
{
    const std::uint32_t unit = c.blocks.quotient(static_cast<std::uint32_t>(item));
    const int block = item - static_cast<int>(unit * c.blocks.d), tile = static_cast<int>(c.heads.quotient(unit)),
              head = static_cast<int>(unit) - tile * static_cast<int>(c.heads.d);
    if (block < c.k.blocks)
        dequantize_block<true>(team, c, c.k, block, tile, head, shared);
    else
        dequantize_block<false>(team, c, c.v, block - c.k.blocks, tile, head, shared);
}

/// log2 of a power of two.
[[nodiscard]] KVARN_INLINE constexpr int log2_of(int n) noexcept
{
    int x = 0;
    while (1 << x < n) ++x;
    return x;
}

[[nodiscard]] inline dequantize_call make_dequantize_call(const format& f, const dequantize_arguments& a) noexcept
{
    const record_layout at = layout_of(f);
    const auto offset = [](std::size_t x) { return static_cast<std::uint32_t>(x); };
    dequantize_call c{};
    int blocks = 0, most = 0, turned = 0;
    const auto add_part = [&](dequantize_part& p, const output_tiles& to, int dim, int bits, std::size_t codes, int columns,
                              bool keys) {
        const int tokens = f.group() * dim > dequantize_elements ? dequantize_elements / dim : f.group();
        p.tokens = to;
        p.codes = offset(codes);
        p.row_bytes = static_cast<std::uint32_t>(columns * bits / 8);
        p.row_scale = offset(keys ? at.k_channel_scale : at.v_token_scale);
        p.row_zero = offset(keys ? at.k_channel_zero : at.v_token_zero);
        p.column_scale = offset(keys ? at.k_token_scale : at.v_channel_scale);
        const bool turn = (keys ? f.keys_rotated() : f.values_rotated()) && a.wanted == basis::original;
        p.rotation_scale = turn ? hadamard_scale(dim) : 0.0f;
        p.bits = bits;
        p.dim_log2 = log2_of(dim);
        p.tokens_log2 = log2_of(tokens);
        p.blocks = f.group() / tokens;
        p.page_log2 = log2_of(to.table != nullptr ? to.page_tokens : 1);
        blocks += p.blocks;
        most = tokens * dim > most ? tokens * dim : most;
        if (turn) turned = tokens * dim > turned ? tokens * dim : turned;
    };
    if (a.k.data != nullptr) add_part(c.k, a.k, f.head_dim_k(), f.key_bits(), at.k_codes, f.group(), true);
    if (a.v.data != nullptr) add_part(c.v, a.v, f.head_dim_v(), f.value_bits(), at.v_codes, f.head_dim_v(), false);
    c.records = a.records;
    c.heads = divisor(a.heads);
    c.blocks = divisor(blocks);
    c.group = f.group();
    c.exact_channels = f.exact_channels();
    c.exact_pieces = divisor(f.exact_channels() > 0 ? (f.exact_channels() + 7) / 8 : 1);
    c.exact_at = offset(at.exact);
    c.threads = most > dequantize_elements / 2 ? dequantize_threads : dequantize_threads / 2;
    c.shared_bytes = 4 * turned;
    return c;
}

/// Thread blocks of a call.
[[nodiscard]] inline int dequantize_blocks(const dequantize_call& c, const dequantize_arguments& a) noexcept
{
    return a.tiles * a.heads * static_cast<int>(c.blocks.d);
}

/// What `dequantize` refuses.
[[nodiscard]] inline status check_dequantize(const format& f, const dequantize_arguments& a) noexcept
{
    if (a.wanted != basis::original && a.wanted != basis::rotated) return status::bad_argument;
    if (const support s = supports(f, operation::dequantize); !s) return s.error;
    if (a.tiles < 0 || a.heads < 0) return status::bad_argument;
    if (a.tiles == 0 || a.heads == 0) return status::ok;
    if (a.heads > 0x3fffffff / 32 / a.tiles) return status::bad_argument;
    if (a.k.data == nullptr && a.v.data == nullptr) return status::null_pointer;
    if (a.v.data != nullptr && !f.has_values()) return status::shape_mismatch;
    for (const output_tiles* x : {&a.k, &a.v})
        if (x->data != nullptr)
            if (const status s = check_tokens(*x, f.group()); s != status::ok) return s;
    return check_records(f, a.records, 1, 1);
}

#if defined(__CUDACC__)
template <class Team>
__global__ void __launch_bounds__(dequantize_threads, 5) dequantize_kernel(const __grid_constant__ dequantize_call c)
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
    return detail::launch(detail::dequantize_kernel<detail::block_team>, detail::dequantize_blocks(call, a), call.threads,
                          call.shared_bytes, call, stream);
}
#endif

}  // namespace kvarn::cuda
