// SPDX-License-Identifier: Apache-2.0
#pragma once
// From a tile to codes and scalars in global memory: the paper's min-max rounding, the twin of codec/encode.hpp, and the packing
// that both encoders share (paper section 4.3, docs/numerics.md). In: a float tile [axis 0][axis 1] and its factors.
// Out: the fields of one part of a record, 8-byte aligned. float arithmetic in the CPU's order. No allocation; for
// one thread block.

#include <cstddef>
#include <cstdint>

#include <kvarn/cuda/codes.cuh>
#include <kvarn/cuda/normalize.cuh>

namespace kvarn::cuda::detail {

/// Values of this magnitude and above round to an infinite half.
inline constexpr float half_overflow = 65520.0f;
inline constexpr float rounding_magic = 12582912.0f;  // 1.5 * 2^23: the low mantissa bits of a sum are the integer

/// Where one part of a record keeps its fields: bytes from the record's start.
struct part_fields {
    std::uint32_t codes, scale0, zero0, scale1;
};

/// Packs 32 codes of Bits bits into Bits words. codes_of(n, four): the codes n .. n + 3, each as the bits of code +
/// rounding_magic. `to` is 8-byte aligned if Bits is even.
template <int Bits, class CodesOf>
KVARN_DEVICE KVARN_INLINE void pack32(std::uint32_t* to, CodesOf&& codes_of) noexcept
{
    constexpr std::uint32_t magic_bits = 0x4b400000u;  // of rounding_magic
    constexpr bool whole = 32 % Bits == 0;             // no code lies in two words
    std::uint32_t words[Bits] = {};
    KVARN_UNROLL
    for (int n = 0; n < 32; n += 4) {
        std::uint32_t four[4];
        codes_of(n, four);
        KVARN_UNROLL
        for (int i = 0; i < 4; ++i) {
            const int at = (n + i) * Bits;
            if constexpr (whole) {
                // Shifted sums, modulo 2^32, need no mask: what the magic number adds to a word is a constant.
                words[at / 32] += (four[i] << (at % 32)) - (magic_bits << (at % 32));
            } else {
                const std::uint32_t code = four[i] & 255u;
                words[at / 32] |= code << (at % 32);
                if (at % 32 + Bits > 32) words[at / 32 + 1] |= code >> (32 - at % 32);
            }
        }
    }
    if constexpr (Bits % 2 == 0) {
        KVARN_UNROLL
        for (int i = 0; i < Bits; i += 2) *reinterpret_cast<word_pair*>(to + i) = word_pair{{words[i], words[i + 1]}};
    } else {
        KVARN_UNROLL
        for (int i = 0; i < Bits; ++i) to[i] = words[i];
    }
}

/// Codes of the whole tile to their place, 32 columns of a row a thread. row_codes(row) is a function (column, four) like
/// pack32's. Eight neighbouring threads take eight rows, whose quads lie in different banks.
template <int Bits, class Team, class RowCodes>
KVARN_DEVICE KVARN_INLINE void pack_tile(Team& team, const tile_view& t, std::uint32_t* to, RowCodes&& row_codes) noexcept
{
    const int shift = t.shift1 - 5;  // log2 of a row's pieces
    for_each(team, t.size0 << shift, [&](int item) {
        const int row = item >> (shift + 3) << 3 | (item & 7), piece = item >> 3 & ((1 << shift) - 1);
        const auto codes = row_codes(row);
        pack32<Bits>(to + ((row << shift) + piece) * Bits, [&](int n, std::uint32_t(&four)[4]) { codes(piece * 32 + n, four); });
    });
}

template <class Team, class RowCodes>
KVARN_DEVICE KVARN_INLINE void pack_tile(Team& team, const tile_view& t, int bits, std::byte* to, RowCodes&& row_codes) noexcept
{
    std::uint32_t* const words = reinterpret_cast<std::uint32_t*>(to);
    switch (bits) {
    case 2: return pack_tile<2>(team, t, words, row_codes);
    case 3: return pack_tile<3>(team, t, words, row_codes);
    case 4: return pack_tile<4>(team, t, words, row_codes);
    case 5: return pack_tile<5>(team, t, words, row_codes);
    case 6: return pack_tile<6>(team, t, words, row_codes);
    default: return pack_tile<8>(team, t, words, row_codes);
    }
}

/// n floats, `step` apart, to halves.
template <class Team>
KVARN_DEVICE KVARN_INLINE void store_scalars(Team& team, const float* from, int n, std::byte* to, int step = 1) noexcept
{
    for_each(team, n, [&](int i) { reinterpret_cast<half*>(to)[i] = narrow<half>(from[i * step]); });
}

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
            low = quick_min(low, x);
            high = quick_max(high, x);
        }
        low = add(row_min(team, low), 0.0f);  // -0 becomes +0
        high = row_max(team, high);
        const float step = maximum(div(add(high, mul(low, -1.0f)), levels), mul(f.s0[i], 1e-10f));
        largest = maximum(largest, maximum(step, maximum(low, mul(low, -1.0f))));
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
    pack_tile(team, t, bits, record + at.codes, [&](int i) {
        return [row = t.row(i), r = f.reciprocal1, minus = -f.pivot0[i], by = f.current0[i]](int j, std::uint32_t(&four)[4]) {
            const float_group<4> x = load_group<4>(row + j), reciprocal = load_group<4>(r + j);
            KVARN_UNROLL
            for (int n = 0; n < 4; ++n)
                four[n] = bits_as<std::uint32_t>(fma(add(mul(x.x[n], reciprocal.x[n]), minus), by, rounding_magic));
        };
    });
    store_scalars(team, f.deviation0, t.size0, record + at.scale0);
    store_scalars(team, f.pivot0, t.size0, record + at.zero0);
    store_scalars(team, f.s1, t.size1, record + at.scale1);
}

}  // namespace kvarn::cuda::detail
