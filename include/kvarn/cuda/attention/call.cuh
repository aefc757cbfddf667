// SPDX-License-Identifier: Apache-2.0
#pragma once
// What decode attention on a GPU is asked, and the argument that its kernels get. Plain structs over the engine's device memory;
// all counts and tables lie on the device, so that a captured graph follows the sequences as they grow. Nothing is owned.

#include <cstddef>
#include <cstdint>
#include <limits>

#include <kvarn/cuda/attention/memory.cuh>
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

/// Exact tokens of every sequence, original basis, K with its exact channels behind the others, in pages: token t of sequence s
/// lies in page table[s * pages + t / page_tokens], place t % page_tokens, at data + page * page_stride + place * token_stride +
/// head * head_stride elements. K and V share the table. Pages of which no query sees a token are not looked at; which of the newest
/// tokens a mask hides plays no part in that.
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
    const std::int32_t* positions = nullptr;  ///< [sequences], of the first token; null: the sink is at 0, the tail behind the records
};

/// What a history has of one tile: tokens [first, first + count), the first of them at `position` of the history, sink included.
struct alignas(8) tile_span {
    std::int32_t position = 0;
    std::uint16_t first = 0, count = 0;
};

/// Records of every sequence: tile i of sequence s is record table[s * max_tiles + i] of the pool, its head h at
/// data + record * tile_stride + h * head_stride bytes, multiples of 8. With `spans` any tile may be a part, as a rollback into a
/// sealed tile leaves it. Positions go up: tile i + 1 begins where tile i ends, or behind a gap where tokens were erased; a tile of
/// which nothing counts is where the one before ends. A part costs what a whole tile does.
struct record_pages {
    const std::byte* data = nullptr;
    std::size_t tile_stride = 0, head_stride = 0;
    const std::int32_t* table = nullptr;  ///< [sequences][max_tiles]
    const std::int32_t* tiles = nullptr;  ///< [sequences]; null: there are none
    int max_tiles = 0;
    const tile_span* spans = nullptr;  ///< [sequences][max_tiles]; null: all tokens of every tile
};

/// One step of a batch: m new tokens of every sequence, r query heads for each KV head. A history is sink, records, tail, in this
/// order, all positions less than 2^31; the new tokens are at the last m of them. Query row i of a sequence and KV head is token i / r,
/// head kv_head * r + i % r. The mask says what each new token sees of the newest positions, in place of the causal rule
/// (attention_task::mask): bit t % 64 of word t / 64 is of the position mask_tokens - t from the end of the sequence.
struct attention_arguments {
    batch_vectors<const void> q{};       ///< [sequences][m][kv_heads * r][head_dim_k + exact_channels], the exact ones unrotated
    batch_vectors<void> out{};           ///< [sequences][m][kv_heads * r][head_dim_v, or head_dim_k if V is read from K]
    float* log_sum_exp = nullptr;        ///< [sequences][m][kv_heads * r], natural logarithm; may be null
    const float* sink_logits = nullptr;  ///< [kv_heads * r], logits that take part without a value; may be null
    const float* alibi_slopes = nullptr; ///< [kv_heads * r], score += slope * (position of the key - of the query); may be null
    const std::uint64_t* mask = nullptr; ///< [sequences][m][mask_stride] words, 8-byte aligned; may be null
    int mask_stride = 0, mask_tokens = 0;
    exact_pages sink{}, tail{};
    record_pages records{};
    int sequences = 0, kv_heads = 0, new_tokens = 1, heads_per_kv = 1;
    int splits = 1;               ///< blocks that share the records of a sequence and head
    float* workspace = nullptr;   ///< attention_workspace_bytes
    float softmax_scale = 0.0f;   ///< 0: 1 / sqrt(head_dim_k + exact_channels)
    float logit_soft_cap = 0.0f;  ///< s <- cap * tanh(s / cap), at most 1000; 0: none
    std::int64_t window = 0;      ///< a query sees this many newest positions up to its own; 0: all
    bool causal = true;
    basis query_basis = basis::original;
    basis output_basis = basis::original;
};

/// Query rows (new tokens times heads of a group) of one call at most.
inline constexpr int max_query_rows = 1024;

/// Bytes of workspace in device memory, 4-byte aligned, for these sizes; rows: new_tokens * heads_per_kv.
[[nodiscard]] constexpr std::size_t attention_workspace_bytes(const format& f, int sequences, int kv_heads, int rows,
                                                              int splits) noexcept
{
    return static_cast<std::size_t>(sequences) * static_cast<std::size_t>(kv_heads) * static_cast<std::size_t>(rows) *
           static_cast<std::size_t>(splits + 1) * static_cast<std::size_t>(detail::output_dim(f) + 2) * sizeof(float);
}

/// A number of splits for `tiles` tiles a sequence: the one with the least work for the multiprocessor that has most, if each takes
/// as many blocks at a time as registers allow and a block's start and end cost a quarter of a tile. rows: new_tokens *
/// heads_per_kv; multiprocessors: of the card. At least 1.
[[nodiscard]] constexpr int suggested_splits(const format& f, int sequences, int kv_heads, int rows, int tiles,
                                             int multiprocessors) noexcept
{
    const int blocks = sequences * kv_heads * detail::row_blocks_of(rows),
              places = detail::resident_blocks(f.group(), !f.has_values()) * multiprocessors;
    if (blocks <= 0 || places <= 0) return 1;
    const int most = (tiles + detail::attention_warps - 1) / detail::attention_warps;
    int best = 1;
    std::int64_t least = (std::numeric_limits<std::int64_t>::max)();
    for (int splits = 1; splits <= most && splits <= detail::max_splits; ++splits) {
        const std::int64_t turns = (static_cast<std::int64_t>(blocks) * splits + places - 1) / places;
        const int share = (tiles + splits - 1) / splits,
                  of_warp = (share + detail::attention_warps - 1) / detail::attention_warps;
        if (turns * (4 * of_warp + 1) < least) {
            least = turns * (4 * of_warp + 1);
            best = splits;
        }
    }
    return best;
}

namespace detail {

/// The argument of the kernels.
struct attention_call {
    attention_arguments a;
    int dk, dv, out_dim, group, key_bits, value_bits;  // dv 0: V is read from K
    int exact_channels, rows, row_blocks;
    int value_block;                 // channels of V at a time: 128 where that pays, or 64
    int window;                      // the largest int: none
    float query_scale;               // softmax scale times log2(e)
    float cap, inverse_cap;          // in base-2 units; cap 0: none
    float k_rotation, out_rotation;  // 0: K, V of the format is not rotated
    std::uint32_t k_codes, k_scale, k_zero, k_token, v_codes, v_channel, v_scale, v_zero, exact;
    int content_bytes;
};

inline constexpr float log2_e = 1.44269504088896341f;
inline constexpr float ln_2 = 0.69314718055994531f;
inline constexpr float lowest_score = -3.0e38f;  // of a row that has seen nothing: finite, so that differences are numbers
inline constexpr int largest_int = (std::numeric_limits<int>::max)();
inline constexpr float hidden_score = -std::numeric_limits<float>::infinity();

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
    c.exact_channels = f.exact_channels();
    c.window = a.window == 0 || a.window > largest_int ? largest_int : static_cast<int>(a.window);
    c.value_block = c.dv % 128 == 0 && (c.value_bits == 2 || c.value_bits == 4) ? 128 : 64;
    c.rows = a.new_tokens * a.heads_per_kv;
    c.row_blocks = row_blocks_of(c.rows);
    c.query_scale = (a.softmax_scale != 0.0f ? a.softmax_scale : hadamard_scale(f.key_channels())) * log2_e;
    c.cap = a.logit_soft_cap * log2_e;
    c.inverse_cap = c.cap > 1e-37f ? 1.0f / c.cap : 1e37f;
    c.k_rotation = f.keys_rotated() ? hadamard_scale(c.dk) : 0.0f;
    c.out_rotation = f.values_rotated() ? hadamard_scale(c.out_dim) : 0.0f;
    c.k_codes = offset(at.k_codes);
    c.k_scale = offset(at.k_channel_scale);
    c.k_zero = offset(at.k_channel_zero);
    c.k_token = offset(at.k_token_scale);
    c.v_codes = offset(at.v_codes);
    c.v_channel = offset(at.v_channel_scale);
    c.v_scale = offset(at.v_token_scale);
    c.v_zero = offset(at.v_token_zero);
    c.exact = offset(at.exact);
    c.content_bytes = static_cast<int>(at.content_bytes);
    return c;
}

}  // namespace detail
}  // namespace kvarn::cuda
