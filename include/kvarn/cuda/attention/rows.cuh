// SPDX-License-Identifier: Apache-2.0
#pragma once
// The query rows of one attention block in shared memory: queries, running softmax state, outputs, and the product of weights and
// codes that K and V share, y[row][column] = sum over i of w[i][row] * code[i][column]. float accumulators; not pinned to an
// order across versions, but the same on every run. No allocation; for one thread block of attention_threads.

#include <cstddef>
#include <cstdint>

#include <kvarn/cuda/attention/call.cuh>
#include <kvarn/cuda/dequantize.cuh>

namespace kvarn::cuda::detail {

inline constexpr int attention_threads = 256;
inline constexpr int code_padding = 16;  // bytes beyond a row of unpacked codes
inline constexpr int half_padding = 16;  // halves beyond a row of weights, so that the threads of mma's B meet different banks
inline constexpr int tensor_partial_floats = 8192;  // slices * 8 * columns of the narrowest codes
inline constexpr int exact_tokens = 32;             // exact tokens at a time
inline constexpr int staged_padding = 1;            // floats beyond a staged exact key

KVARN_DEVICE KVARN_INLINE float exp2(float x) noexcept
{
#if defined(__CUDA_ARCH__)
    float r;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
    return r;
#else
    return std::exp2(x);
#endif
}

/// Shared memory of an attention block, in floats from the start.
struct attention_memory {
    int query, out, weights, halves, sums, state, scalars, partial, codes, total;

    [[nodiscard]] KVARN_HOST_DEVICE KVARN_INLINE static constexpr int larger(int a, int b) noexcept { return a > b ? a : b; }

    KVARN_HOST_DEVICE KVARN_INLINE constexpr attention_memory(int dk, int dv, int out_dim, int group, int rows) noexcept
    {
        const int widest = larger(larger(dk, out_dim), group);
        query = 0;                         // [rows][dk]
        out = query + rows * dk;           // [rows][out_dim]
        weights = out + rows * out_dim;    // [widest][rows]
        halves = weights + rows * widest;  // [8, or 16 for 8 rows][widest + half_padding] halves: weights for tensor cores
        sums =
            halves + (rows > 4 ? 8 : 4) * (widest + half_padding);  // [rows][widest]: products, then scores and softmax weights
        state = sums + rows * widest;                               // [8] of each of row_states
        scalars = state + 6 * 8;                      // K scale, zero [dk], token [group]; V channel [dv], scale, zero [group]
        partial = scalars + 2 * dk + dv + 3 * group;  // [4 * attention_threads][rows], or tensor_partial_floats
        codes = partial + 4 * attention_threads * rows;
        const int k_bytes = dk * (group + code_padding), v_bytes = group * (dv + code_padding);
        const int exact_floats = exact_tokens * (larger(dk, out_dim) + staged_padding);
        total = larger(codes + larger(larger(k_bytes, v_bytes) / 4, exact_floats), partial + tensor_partial_floats);
    }
};

/// Unpacks `n` rows of `columns` codes to bytes, rows columns + code_padding apart. Words of 32 codes never cross rows.
template <int Bits, class Team>
KVARN_DEVICE KVARN_INLINE void unpack_codes(Team& team, const std::byte* from, int n, int columns, std::byte* to) noexcept
{
    const int each = columns / 32;
    for_each(team, n * each, [&](int item) {
        const int row = item / each, piece = item - row * each;
        quad out[2] = {};
        unpack_bits<Bits>(reinterpret_cast<const std::uint32_t*>(from) + item * Bits,
                          [&](int i, std::uint32_t code) { out[i / 16].w[i / 4 % 4] |= code << (i % 4 * 8); });
        quad* const at = reinterpret_cast<quad*>(to + row * (columns + code_padding) + piece * 32);
        at[0] = out[0];
        at[1] = out[1];
    });
}

template <class Team>
KVARN_DEVICE KVARN_INLINE void unpack_codes(Team& team, int bits, const std::byte* from, int n, int columns,
                                            std::byte* to) noexcept
{
    switch (bits) {
    case 2: return unpack_codes<2>(team, from, n, columns, to);
    case 3: return unpack_codes<3>(team, from, n, columns, to);
    case 4: return unpack_codes<4>(team, from, n, columns, to);
    case 5: return unpack_codes<5>(team, from, n, columns, to);
    case 6: return unpack_codes<6>(team, from, n, columns, to);
    default: return unpack_codes<8>(team, from, n, columns, to);
    }
}

/// Byte i of a word as a float: it becomes the low mantissa bits of 2^23.
KVARN_DEVICE KVARN_INLINE float byte_to_float(std::uint32_t word, int i) noexcept
{
    return sub(bits_as<float>(0x4b000000u | (word >> (8 * i) & 255u)), 8388608.0f);
}

/// y[row][column] = sum over i < n of w[i * Rows + row] * code[i][column], `columns` a power of two from 32 to 256. Four columns
/// a thread; as many groups of threads as there are share the rows of codes, and add up in `partial`. A barrier before; ends with
/// one.
template <int Rows, class Team>
KVARN_DEVICE KVARN_INLINE void multiply_codes(Team& team, const std::byte* codes, int n, int columns, const float* w,
                                              float* partial, float* y) noexcept
{
    const int each = columns / 4, groups = attention_threads / each;
    const int group = team.rank() / each, column = team.rank() % each * 4;
    float sum[Rows][4] = {};
    for (int i = group; i < n; i += groups) {
        const std::uint32_t word = *reinterpret_cast<const std::uint32_t*>(codes + i * (columns + code_padding) + column);
        float code[4];
        KVARN_UNROLL
        for (int k = 0; k < 4; ++k) code[k] = byte_to_float(word, k);
        KVARN_UNROLL
        for (int r = 0; r < Rows; ++r) {
            const float weight = w[i * Rows + r];
            KVARN_UNROLL
            for (int k = 0; k < 4; ++k) sum[r][k] = fma(weight, code[k], sum[r][k]);
        }
    }
    KVARN_UNROLL
    for (int r = 0; r < Rows; ++r) {
        KVARN_UNROLL
        for (int k = 0; k < 4; ++k) partial[(group * Rows + r) * columns + column + k] = sum[r][k];
    }
    team.barrier();
    for_each(team, Rows * columns, [&](int item) {
        float all = partial[item];
        for (int g = 1; g < groups; ++g) all = add(all, partial[g * Rows * columns + item]);
        y[item] = all;
    });
    team.barrier();
}

/// y[row][i] = sum over columns of w[column * Rows + row] * code[i][column]: K read as V. A barrier before; ends with one.
template <int Rows, class Team>
KVARN_DEVICE KVARN_INLINE void multiply_transposed(Team& team, const std::byte* codes, int n, int columns, const float* w,
                                                   float* y) noexcept
{
    for_each(team, n, [&](int i) {
        float sum[Rows] = {};
        for (int column = 0; column < columns; column += 4) {
            const std::uint32_t word = *reinterpret_cast<const std::uint32_t*>(codes + i * (columns + code_padding) + column);
            KVARN_UNROLL
            for (int k = 0; k < 4; ++k) {
                const float code = byte_to_float(word, k);
                KVARN_UNROLL
                for (int r = 0; r < Rows; ++r) sum[r] = fma(w[(column + k) * Rows + r], code, sum[r]);
            }
        }
        KVARN_UNROLL
        for (int r = 0; r < Rows; ++r) y[r * n + i] = sum[r];
    });
    team.barrier();
}

/// Positions [begin, end) of a block of tokens that a row sees.
struct visible_tokens {
    int begin, end;
};

/// Of `tokens` tokens from `position` on, for the query token at `own`.
KVARN_DEVICE KVARN_INLINE visible_tokens find_visible(const attention_call& c, std::int64_t own, std::int64_t position,
                                                      int tokens) noexcept
{
    std::int64_t end = c.a.causal ? own + 1 - position : tokens;
    std::int64_t begin = c.a.window != 0 && own >= c.a.window ? own + 1 - c.a.window - position : 0;
    end = end < 0 ? 0 : end > tokens ? tokens : end;
    begin = begin < 0 ? 0 : begin > tokens ? tokens : begin;
    return {static_cast<int>(begin), static_cast<int>(end)};
}

template <class Team>
KVARN_DEVICE KVARN_INLINE float warp_sum(Team& team, float x) noexcept
{
    for (int mask = 16; mask >= 1; mask /= 2) x = add(x, team.shuffle_xor(x, mask));
    return x;
}
template <class Team>
KVARN_DEVICE KVARN_INLINE float warp_max(Team& team, float x) noexcept
{
    for (int mask = 16; mask >= 1; mask /= 2) x = max(x, team.shuffle_xor(x, mask));
    return x;
}

/// cap * tanh(s / cap): 1 - 2 / (1 + e^(2x)); beyond +-12 it is +-1 in float.
KVARN_DEVICE KVARN_INLINE float soft_capped(float s, float cap) noexcept
{
    const float x = max(min(div(s, cap), 12.0f), -12.0f);
    return mul(sub(1.0f, div(2.0f, add(1.0f, exp2(mul(x, 2.0f * log2_e))))), cap);
}

/// The running state of the block's rows, the sums of query or weight times zero points, and 2^-k of split_weights.
struct row_states {
    float *largest, *total, *factor, *key_zero, *value_zero, *unscale;

    KVARN_DEVICE KVARN_INLINE explicit row_states(float* at) noexcept
        : largest(at), total(at + 8), factor(at + 16), key_zero(at + 24), value_zero(at + 32), unscale(at + 40)
    {}
};

/// One warp and one row: scores s[0 .. n) of which `seen` counts enter the state and become weights 2^(s - m), hidden ones 0;
/// leaves by how much what came before shrinks in factor. n is a multiple of 32. With `zero`, leaves the sum of weight * zero
/// too.
template <class Team>
KVARN_DEVICE KVARN_INLINE void absorb_scores(Team& team, const attention_call& c, float* s, int n, visible_tokens seen, int row,
                                             const row_states& state, const float* zero) noexcept
{
    const int lane = team.rank() % 32;
    float most = lowest_score;
    for (int t = lane; t < n; t += 32) {
        if (t < seen.begin || t >= seen.end) continue;
        if (c.cap != 0.0f) s[t] = soft_capped(s[t], c.cap);
        most = max(most, s[t]);
    }
    const float before = state.largest[row];
    most = max(warp_max(team, most), before);
    float sum = 0.0f, zeros = 0.0f;
    for (int t = lane; t < n; t += 32) {
        const float p = t < seen.begin || t >= seen.end ? 0.0f : exp2(sub(s[t], most));
        s[t] = p;
        sum = add(sum, p);
        if (zero != nullptr) zeros = fma(p, zero[t], zeros);
    }
    sum = warp_sum(team, sum);
    zeros = warp_sum(team, zeros);
    team.warp_barrier();  // all have read the state
    if (lane != 0) return;
    const float factor = exp2(sub(before, most));
    state.largest[row] = most;
    state.total[row] = fma(state.total[row], factor, sum);
    state.factor[row] = factor;
    state.value_zero[row] = zeros;
}

}  // namespace kvarn::cuda::detail
