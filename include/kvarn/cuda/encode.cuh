// SPDX-License-Identifier: Apache-2.0
#pragma once
// From a tile in shared memory to codes and scalars in global memory: the paper's min-max rounding, the twin of codec/encode.hpp,
// and the packing that both encoders share (paper section 4.3, format.md sections 4 and 5). In: a float tile [axis 0][axis 1] and
// its factors. Out: the fields of one part of a record, 4-byte aligned. float arithmetic in the CPU's order. No allocation; for
// one thread block.

#include <cstddef>
#include <cstdint>

#include <kvarn/cuda/normalize.cuh>

namespace kvarn::cuda::detail {

/// Values of this magnitude and above round to an infinite half.
inline constexpr float half_overflow = 65520.0f;
inline constexpr float rounding_magic = 12582912.0f;  // 1.5 * 2^23: the low mantissa bits of a sum are the integer

/// Where one part of a record keeps its fields: bytes from the record's start.
struct part_fields {
    std::uint32_t codes, scale0, zero0, scale1;
};

/// Packs 32 codes of Bits bits, code_of(n) for n = 0 .. 31, into Bits words.
template <int Bits, class CodeOf>
KVARN_DEVICE KVARN_INLINE void pack32(std::uint32_t* to, CodeOf&& code_of) noexcept
{
    std::uint32_t words[Bits] = {};
    KVARN_UNROLL
    for (int n = 0; n < 32; ++n) {
        const std::uint32_t code = code_of(n);
        words[n * Bits / 32] |= code << (n * Bits % 32);
        if constexpr (32 % Bits != 0)
            if (n * Bits % 32 + Bits > 32) words[n * Bits / 32 + 1] |= code >> (32 - n * Bits % 32);
    }
    KVARN_UNROLL
    for (int i = 0; i < Bits; ++i) to[i] = words[i];
}

/// Codes of the whole tile to their place: code_of(row, column) for 32 columns a thread.
template <int Bits, class Team, class CodeOf>
KVARN_DEVICE KVARN_INLINE void pack_tile(Team& team, const tile_view& t, std::uint32_t* to, CodeOf&& code_of) noexcept
{
    for_each(team, t.size0 << (t.shift1 - 5), [&](int item) {
        const int row = item >> (t.shift1 - 5), column = (item << 5) & (t.size1 - 1);
        pack32<Bits>(to + item * Bits, [&](int n) { return code_of(row, column + n); });
    });
}

template <class Team, class CodeOf>
KVARN_DEVICE KVARN_INLINE void pack_tile(Team& team, const tile_view& t, int bits, std::byte* to, CodeOf&& code_of) noexcept
{
    std::uint32_t* const words = reinterpret_cast<std::uint32_t*>(to);
    switch (bits) {
    case 2: return pack_tile<2>(team, t, words, code_of);
    case 3: return pack_tile<3>(team, t, words, code_of);
    case 4: return pack_tile<4>(team, t, words, code_of);
    case 5: return pack_tile<5>(team, t, words, code_of);
    case 6: return pack_tile<6>(team, t, words, code_of);
    default: return pack_tile<8>(team, t, words, code_of);
    }
}

template <class Team>
KVARN_DEVICE KVARN_INLINE void store_scalars(Team& team, const float* from, int n, std::byte* to) noexcept
{
    for_each(team, n, [&](int i) { reinterpret_cast<half*>(to)[i] = narrow<half>(from[i]); });
}

/// Results of an encoder in shared memory: arrays that the normaliser no longer needs.
struct part_scalars {
    float *scale, *zero;  // axis 0
    const float* s1;
};

/// The first half of encode_minmax: scale and zero of all rows to f.deviation0 and f.pivot0, their reciprocals to f.current0,
/// those of s1 to f.reciprocal1. Returns whether all scalars of axis 0 fit a half.
template <class Team>
KVARN_DEVICE KVARN_INLINE bool find_ranges(Team& team, const tile_view& t, const tile_factors& f, int bits) noexcept
{
    const float levels = static_cast<float>((1 << bits) - 1);
    for_each(team, t.size1, [&](int j) { f.reciprocal1[j] = div(1.0f, f.s1[j]); });
    team.barrier();
    float largest = 0.0f;
    for_rows(team, t.size0, [&](int i, int k) {
        const float* const row = t.row(i) + k;
        const float* const r = f.reciprocal1 + k;
        float low = mul(row[0], r[0]), high = low;
        for (int j = row_threads; j < t.size1; j += row_threads) {
            const float x = mul(row[j], r[j]);
            low = min(low, x);
            high = max(high, x);
        }
        low = add(row_min(team, low), 0.0f);  // -0 becomes +0
        high = row_max(team, high);
        const float step = max(div(add(high, mul(low, -1.0f)), levels), mul(f.s0[i], 1e-10f));
        largest = max(largest, max(step, max(low, mul(low, -1.0f))));
        if (k != 0) return;
        f.pivot0[i] = low;
        f.deviation0[i] = step;
        f.current0[i] = div(1.0f, step);
    });
    // Ends with the barrier that the arrays need.
    return bits_as<float>(largest_of_all(team, bits_as<std::uint32_t>(largest), reinterpret_cast<std::uint32_t*>(f.scratch))) <
           half_overflow;
}

/// The second half: codes and scalars to the record.
template <class Team>
KVARN_DEVICE KVARN_INLINE void store_minmax(Team& team, const tile_view& t, const tile_factors& f, int bits, std::byte* record,
                                            const part_fields& at) noexcept
{
    // x - min lies between 0 and the range, as both come from the same products: no code needs a clamp.
    pack_tile(team, t, bits, record + at.codes, [&](int i, int j) {
        const float x = add(mul(t.row(i)[j], f.reciprocal1[j]), -f.pivot0[i]);
        return bits_as<std::uint32_t>(fma(x, f.current0[i], rounding_magic)) & 255u;
    });
    store_scalars(team, f.deviation0, t.size0, record + at.scale0);
    store_scalars(team, f.pivot0, t.size0, record + at.zero0);
    store_scalars(team, f.s1, t.size1, record + at.scale1);
}

}  // namespace kvarn::cuda::detail
