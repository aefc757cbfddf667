// SPDX-License-Identifier: Apache-2.0
#pragma once
// What decode attention on a GPU is asked, and the argument that its kernels get. Plain structs over the engine's device memory;
// all counts and tables lie on the device, so that a captured graph follows the sequences as they grow. Nothing is owned.

#include <cstddef>
#include <cstdint>

#include <kvarn/cuda/rotate.cuh>
#include <kvarn/cuda/support.cuh>
#include <kvarn/cuda/tokens.cuh>
#include <kvarn/layout/record.hpp>

namespace kvarn::cuda {

/// Vectors [sequence][token][head][channel], channels contiguous, strides in elements; 16-byte aligned, strides too.
template <class Void>
struct batch_vectors {
    Void* data = nullptr;
    element_type type = element_type::f16;
    std::ptrdiff_t sequence_stride = 0;
    std::ptrdiff_t token_stride = 0;
    std::ptrdiff_t head_stride = 0;
};

/// Exact tokens of every sequence, original basis, in pages: token t of sequence s lies in page table[s * pages + t /
/// page_tokens], place t % page_tokens, at data + page * page_stride + place * token_stride + head * head_stride elements. K and
/// V share the table.
struct exact_pages {
    const void* k = nullptr;
    const void* v = nullptr;  ///< unused if the format has no values
    element_type type = element_type::f16;
    std::ptrdiff_t k_page_stride = 0, k_token_stride = 0, k_head_stride = 0;
    std::ptrdiff_t v_page_stride = 0, v_token_stride = 0, v_head_stride = 0;
    const std::int32_t* table = nullptr;   ///< [sequences][pages]
    const std::int32_t* tokens = nullptr;  ///< [sequences]; null: there are none
    int pages = 0;
    int page_tokens = 0;
};

/// Records of every sequence: tile i of sequence s is record table[s * max_tiles + i] of the pool, its head h at
/// data + record * tile_stride + h * head_stride bytes, multiples of 8.
struct record_pages {
    const std::byte* data = nullptr;
    std::size_t tile_stride = 0, head_stride = 0;
    const std::int32_t* table = nullptr;  ///< [sequences][max_tiles]
    const std::int32_t* tiles = nullptr;  ///< [sequences]; null: there are none
    int max_tiles = 0;
};

/// One step of a batch: m new tokens of every sequence, r query heads for each KV head. A history is sink, records, tail, in this
/// order; the new tokens are the last m of it. Query row i of a sequence and KV head is token i / r, head kv_head * r + i % r.
struct attention_arguments {
    batch_vectors<const void> q{};       ///< [sequences][m][kv_heads * r][head_dim_k]
    batch_vectors<void> out{};           ///< [sequences][m][kv_heads * r][head_dim_v, or head_dim_k if V is read from K]
    float* log_sum_exp = nullptr;        ///< [sequences][m][kv_heads * r], natural logarithm; may be null
    const float* sink_logits = nullptr;  ///< [kv_heads * r], logits that take part without a value; may be null
    exact_pages sink{}, tail{};
    record_pages records{};
    int sequences = 0, kv_heads = 0, new_tokens = 1, heads_per_kv = 1;
    int splits = 1;               ///< blocks that share the records of a sequence and head
    float* workspace = nullptr;   ///< attention_workspace_bytes
    float softmax_scale = 0.0f;   ///< 0: 1 / sqrt(head_dim_k)
    float logit_soft_cap = 0.0f;  ///< s <- cap * tanh(s / cap), at most 1000; 0: none
    std::int64_t window = 0;      ///< a query sees this many newest positions up to its own; 0: all
    bool causal = true;
    basis query_basis = basis::original;
    basis output_basis = basis::original;
};

/// Query rows (new tokens times heads of a group) of one call at most.
inline constexpr int max_query_rows = 64;

namespace detail {

[[nodiscard]] KVARN_HOST_DEVICE KVARN_INLINE constexpr int output_dim(const format& f) noexcept
{
    return f.has_values() ? f.head_dim_v() : f.head_dim_k();
}

/// Rows that one block attends with: 1, 2, 4 or 8.
[[nodiscard]] KVARN_INLINE constexpr int rows_of_block(int rows) noexcept
{
    return rows >= 8 ? 8 : rows > 2 ? 4 : rows;
}

}  // namespace detail

/// Bytes of workspace, 4-byte aligned, for these sizes.
[[nodiscard]] constexpr std::size_t attention_workspace_bytes(const format& f, int sequences, int kv_heads, int rows,
                                                              int splits) noexcept
{
    return static_cast<std::size_t>(sequences) * static_cast<std::size_t>(kv_heads) * static_cast<std::size_t>(rows) *
           static_cast<std::size_t>(splits + 1) * static_cast<std::size_t>(detail::output_dim(f) + 2) * sizeof(float);
}

/// A number of splits that gives every multiprocessor two blocks, but no block less than two tiles.
[[nodiscard]] constexpr int suggested_splits(const format& f, int sequences, int kv_heads, int rows, int tiles,
                                             int multiprocessors) noexcept
{
    const int row_blocks = (rows + detail::rows_of_block(rows) - 1) / detail::rows_of_block(rows);
    const int blocks = sequences * kv_heads * row_blocks;
    const int wanted = blocks > 0 ? (2 * multiprocessors + blocks - 1) / blocks : 1, most = (tiles + 1) / 2;
    static_cast<void>(f);
    return wanted > most ? (most > 0 ? most : 1) : wanted;
}

namespace detail {

/// The argument of the kernels.
struct attention_call {
    attention_arguments a;
    int dk, dv, out_dim, group, key_bits, value_bits;  // dv 0: V is read from K
    int rows, row_blocks, block_rows;
    float query_scale;               // softmax scale times log2(e)
    float cap;                       // in base-2 units
    float k_rotation, out_rotation;  // 0: the format is not rotated
    std::uint32_t k_codes, k_scale, k_zero, k_token, v_codes, v_channel, v_scale, v_zero;
    int content_bytes;
    bool tensor;  // both products go to tensor cores
};

inline constexpr float log2_e = 1.44269504088896341f;
inline constexpr float ln_2 = 0.69314718055994531f;
inline constexpr float lowest_score = -3.0e38f;  // of a row that has seen nothing: finite, so that differences are numbers

[[nodiscard]] inline attention_call make_attention_call(const format& f, const attention_arguments& a) noexcept
{
    const record_layout at = layout_of(f);
    const auto offset = [](std::size_t x) { return static_cast<std::uint32_t>(x); };
    attention_call c{};
    c.a = a;
    c.dk = f.head_dim_k();
    c.dv = f.head_dim_v();
    c.out_dim = output_dim(f);
    c.group = f.group();
    c.key_bits = f.key_bits();
    c.value_bits = f.value_bits();
    c.rows = a.new_tokens * a.heads_per_kv;
    c.block_rows = rows_of_block(c.rows);
    c.row_blocks = (c.rows + c.block_rows - 1) / c.block_rows;
    c.query_scale = (a.softmax_scale != 0.0f ? a.softmax_scale : hadamard_scale(c.dk)) * log2_e;
    c.cap = a.logit_soft_cap * log2_e;
    c.k_rotation = f.rotated() ? hadamard_scale(c.dk) : 0.0f;
    c.out_rotation = f.rotated() ? hadamard_scale(c.out_dim) : 0.0f;
    c.k_codes = offset(at.k_codes);
    c.k_scale = offset(at.k_channel_scale);
    c.k_zero = offset(at.k_channel_zero);
    c.k_token = offset(at.k_token_scale);
    c.v_codes = offset(at.v_codes);
    c.v_channel = offset(at.v_channel_scale);
    c.v_scale = offset(at.v_token_scale);
    c.v_zero = offset(at.v_token_zero);
    c.content_bytes = static_cast<int>(at.content_bytes);
    c.tensor = on_tensor_cores(f);
    return c;
}

}  // namespace detail
}  // namespace kvarn::cuda
