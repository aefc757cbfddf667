// SPDX-License-Identifier: Apache-2.0
#pragma once
// The fp16 baseline on tensor cores, for up to eight query rows of a KV head. Every warp takes pages of sixteen tokens by itself,
// with a softmax state of its own and no barrier between pages:
//
//   S = Q K^T     Q is the operand a, its rows 8 .. 15 empty; a thread's 16-byte piece of a token's key is b of two steps. The
//                 order of channels is the loads', for Q as for K.
//   O^T = V^T P^T V^T is a, sixteen channels a step; P^T is b: exactly the registers of S, made halves.
//
// The next page's keys are asked for as soon as the present ones are used up, its values likewise: 4 to 8 KB in flight for each
// warp, 48 to 96 KB for the twelve warps of a multiprocessor. Frozen like fp16_attention.cuh.

#include "fp16_attention.cuh"

namespace bench {

/// Two floats as halves, a low.
KVARN_DEVICE KVARN_INLINE std::uint32_t pack_halves(float a, float b) noexcept
{
#if defined(__CUDA_ARCH__)
    std::uint32_t r;
    asm("cvt.rn.f16x2.f32 %0, %2, %1;" : "=r"(r) : "f"(a), "f"(b));
    return r;
#else
    return kvarn::to_half(a).bits | static_cast<std::uint32_t>(kvarn::to_half(b).bits) << 16;
#endif
}

/// The low or the high halves of two words.
KVARN_DEVICE KVARN_INLINE std::uint32_t pair_halves(std::uint32_t a, std::uint32_t b, bool high) noexcept
{
#if defined(__CUDA_ARCH__)
    return __byte_perm(a, b, high ? 0x7632u : 0x5410u);
#else
    return high ? a >> 16 | (b & 0xffff0000u) : (a & 0xffffu) | b << 16;
#endif
}

/// The body: block `item` of [sequence][kv head][split]. `shared`: shared_bytes.
template <int Rows>
struct fp16_tensor {
    static_assert(Rows >= 1 && Rows <= 8);
    using states = fp16_states<Rows, fp16_warps>;
    static constexpr int shared_bytes = states::bytes;
    static constexpr int resident = 3;  // blocks of a multiprocessor that registers must do for

    template <class Team>
    KVARN_DEVICE KVARN_INLINE static void run(Team& team, const fp16_call& c, int item, float* shared) noexcept
    {
        constexpr int tokens = fp16_page_tokens, step = tokens * fp16_warps;
        const fp16_share b(c, item, Rows);
        const int warp = team.rank() / 32, lane = team.rank() % 32, g = lane / 4, j = lane % 4;

        quad q[4] = {};  // row g: channels 32 i + 8 j .. + 7
        if (g < Rows) {
            KVARN_UNROLL
            for (int i = 0; i < 4; ++i) q[i] = load_quad(c.q + (b.row + g) * fp16_dim + 32 * i + 8 * j);
        }
        float acc[8][4] = {};                       // channels 8 g + i and 64 + 8 g + i of rows 2 j and 2 j + 1
        float largest = fp16_lowest, total = 0.0f;  // of row g; the total is of this thread's tokens

        quad keys[2][4];    // tokens g and g + 8: channels 32 i + 8 j
        quad values[4][2];  // tokens 2 j, 2 j + 1, 2 j + 8, 2 j + 9: channels 8 g and 64 + 8 g
        int page = 0;       // of the next load
        // Tokens behind the last one are read as that: a page's rest may be anything.
        const auto at = [&](int start, int t) { return b.place(page, start + t < b.last ? t : b.last - 1 - start); };
        const auto load_keys = [&](int start) {
            KVARN_UNROLL
            for (int t = 0; t < 2; ++t) {
                const kvarn::half* const from = c.k + at(start, g + 8 * t) + 8 * j;
                KVARN_UNROLL
                for (int i = 0; i < 4; ++i) keys[t][i] = load_quad(from + 32 * i);
            }
        };
        const auto load_values = [&](int start) {
            KVARN_UNROLL
            for (int t = 0; t < 4; ++t) {
                const kvarn::half* const from = c.v + at(start, 2 * j + t % 2 + t / 2 * 8) + 8 * g;
                values[t][0] = load_quad(from);
                values[t][1] = load_quad(from + 64);
            }
        };

        const int start = b.first + tokens * warp;
        if (start < b.last) {
            page = b.table[start / tokens];
            load_keys(start);
            load_values(start);
        }
        if (start + step < b.last) page = b.table[(start + step) / tokens];
        for (int now = start; now < b.last; now += step) {
            const int next = now + step;
            float s[2][4] = {};  // row g: tokens 2 j and 2 j + 1 of each eight
            KVARN_UNROLL
            for (int i = 0; i < 4; ++i) {
                KVARN_UNROLL
                for (int u = 0; u < 4; u += 2) {
                    const std::uint32_t a[4] = {q[i].w[u], 0, q[i].w[u + 1], 0};
                    KVARN_UNROLL
                    for (int t = 0; t < 2; ++t) {
                        const std::uint32_t key[2] = {keys[t][i].w[u], keys[t][i].w[u + 1]};
                        team.mma(s[t], a, key);
                    }
                }
            }
            if (next < b.last) load_keys(next);

            std::uint32_t p[2];
            const float factor = absorb(team, s, c.scale, b.last - now - 2 * j, largest, total, p);
            float by[2];
            turn(team, factor, g, j, by);
            KVARN_UNROLL
            for (int i = 0; i < 8; ++i) {
                KVARN_UNROLL
                for (int k = 0; k < 4; ++k) acc[i][k] *= by[k % 2];
                const int w = i / 2;
                const bool high = i % 2 != 0;
                const std::uint32_t a[4] = {pair_halves(values[0][0].w[w], values[1][0].w[w], high),
                                            pair_halves(values[0][1].w[w], values[1][1].w[w], high),
                                            pair_halves(values[2][0].w[w], values[3][0].w[w], high),
                                            pair_halves(values[2][1].w[w], values[3][1].w[w], high)};
                team.mma(acc[i], a, p);
            }
            if (next < b.last) load_values(next);
            if (next + step < b.last) page = b.table[(next + step) / tokens];
        }
        total += team.shuffle_xor(total, 1);
        total += team.shuffle_xor(total, 2);

        const states left{shared};
        if (g < Rows && j == 0) left.at(warp, g)[0] = largest, left.at(warp, g)[1] = total;
        KVARN_UNROLL
        for (int k = 0; k < 4; ++k) {
            const int row = 2 * j + k % 2;
            if (row >= Rows) continue;
            float* const to = left.at(warp, row) + 4 + 8 * g + k / 2 * 64;
            KVARN_UNROLL
            for (int i = 0; i < 8; ++i) to[i] = acc[i][k];
        }
        left.merge(team, b);
    }

private:
    /// Takes the page's scores into the state and makes them weights p, those of tokens from `end` on 0; `end` counts from the
    /// thread's first token. Returns by how much what came before shrinks.
    template <class Team>
    KVARN_DEVICE KVARN_INLINE static float absorb(Team& team, float (&s)[2][4], float scale, int end, float& largest,
                                                  float& total, std::uint32_t (&p)[2]) noexcept
    {
        float most = largest;
        KVARN_UNROLL
        for (int i = 0; i < 4; ++i) {
            float& x = s[i / 2][i % 2];
            x = i / 2 * 8 + i % 2 < end ? x * scale : fp16_hidden;
            most = x > most ? x : most;
        }
        KVARN_UNROLL
        for (int mask = 1; mask <= 2; mask *= 2) {
            const float other = team.shuffle_xor(most, mask);
            most = other > most ? other : most;
        }
        const float factor = exp2(largest - most);
        total *= factor;
        KVARN_UNROLL
        for (int t = 0; t < 2; ++t) {
            const float x = exp2(s[t][0] - most), y = exp2(s[t][1] - most);
            total += x + y;
            p[t] = pack_halves(x, y);
        }
        largest = most;
        return factor;
    }

    /// The x of rows 2 j and 2 j + 1, where the four threads of row g have that of row g.
    template <class Team>
    KVARN_DEVICE KVARN_INLINE static void turn(Team& team, float x, int g, int j, float (&y)[2]) noexcept
    {
        float other = team.shuffle_xor(x, 16);
        if (g / 4 != j / 2) x = other;
        other = team.shuffle_xor(x, 8);
        if (g / 2 % 2 != j % 2) x = other;
        other = team.shuffle_xor(x, 4);
        y[0] = g % 2 != 0 ? other : x;
        y[1] = g % 2 != 0 ? x : other;
    }
};

}  // namespace bench
