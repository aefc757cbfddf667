// SPDX-License-Identifier: Apache-2.0
#pragma once
// One record and all query rows of its KV head: scores from the K codes, online softmax, values from the V codes, in the rotated basis.
// K[t][d] = (code * a_d + z_d) * b_t, so <q, K[t]> = (sum_d (q_d a_d) code + <q, z>) * b_t: the channel scale goes into the query once a
// tile. V[t][d] = (code * b_t + z_t) * a_d, so sum_t p_t V[t][d] = (sum_t (p_t b_t) code + sum_t p_t z_t) * a_d. (format.md section 5)
// Neither K nor V is ever decoded to memory. No allocation; works in the caller's scratch.

#include <cstddef>

#include <kvarn/attention/rows.hpp>
#include <kvarn/codec/decode.hpp>
#include <kvarn/layout/record.hpp>

namespace kvarn::detail {

/// The scalars of a record as floats, padded with zeros.
struct record_scalars {
    const float* k_scale;
    const float* k_zero;
    const float* k_token;
    const float* v_channel;
    const float* v_scale;
    const float* v_zero;
};

template <class Arch>
KVARN_INLINE record_scalars load_record_scalars(const format& f, const record_layout& at, const std::byte* record, float* to) noexcept
{
    const attention_extents e(f);
    const auto load = [&](std::size_t offset, int n, int padded) {
        float* const x = to;
        load_scalars<Arch>(record + offset, n, x);
        for (int i = n; i < padded; ++i) x[i] = 0.0f;
        to += padded;
        return static_cast<const float*>(x);
    };
    record_scalars s{};
    s.k_scale = load(at.k_channel_scale, f.head_dim_k(), e.keys);
    s.k_zero = load(at.k_channel_zero, f.head_dim_k(), e.keys);
    s.k_token = load(at.k_token_scale, f.group(), f.group());
    if (f.has_values()) {
        s.v_channel = load(at.v_channel_scale, f.head_dim_v(), e.values);
        s.v_scale = load(at.v_token_scale, f.group(), f.group());
        s.v_zero = load(at.v_token_zero, f.group(), f.group());
    }
    return s;
}

/// w[i] <- x[i] * scale[i]; returns the sum of x[i] * zero[i]. `n` is a multiple of 16.
template <class Arch>
KVARN_INLINE float weigh(const float* x, const float* scale, const float* zero, int n, float* w) noexcept
{
    using lane = simd::lanes<Arch>;
    lane sum = lane::broadcast(0.0f);
    for (int i = 0; i < n; i += simd::lane_count) {
        const lane v = lane::load(x + i);
        sum = fma(v, lane::load(zero + i), sum);
        mul(v, lane::load(scale + i)).store(w + i);
    }
    return reduce_add(sum);
}

/// Adds to scores[t] the product of the query's exact channels with the record's: [group][exact_channels] half.
template <class Arch>
KVARN_INLINE void add_exact_scores(const format& f, const std::byte* exact, const float* query, float* stage, float* scores) noexcept
{
    using lane = simd::lanes<Arch>;
    const int channels = f.exact_channels(), padded = simd::whole_lanes(channels);
    for (int t = 0; t < f.group(); ++t) {
        load_scalars<Arch>(exact + 2 * static_cast<std::ptrdiff_t>(t) * channels, channels, stage);
        for (int i = channels; i < padded; ++i) stage[i] = 0.0f;
        lane sum = lane::broadcast(0.0f);
        for (int i = 0; i < padded; i += simd::lane_count) sum = fma(lane::load(query + i), lane::load(stage + i), sum);
        scores[t] = simd::kernels<simd::portable>::add(scores[t], reduce_add(sum));
    }
}

/// Adds one record to the states and outputs of all rows that see something of it (r.seen, relative to the tile).
/// `cap` is the soft-cap in base-2 units, 0 for none. `ahead` is fetched on the way.
template <class Arch>
KVARN_NOINLINE void attend_record(const format& f, const record_layout& at, const std::byte* record, product_kind keys, product_kind values,
                                  float cap, const attention_rows& r, simd::read_ahead ahead) noexcept
{
    using lane = simd::lanes<Arch>;
    using one = simd::kernels<simd::portable>;
    const attention_extents e(f);
    const int group = f.group();
    const record_scalars s = load_record_scalars<Arch>(f, at, record, r.scalars);
    const product_rows& x = r.product;
    for_row_groups(r.rows, [&](int row, auto heads) __attribute__((always_inline)) {
        if (!any_visible(r.seen + row, heads)) return;
        product_scale scale[heads];
        float zero[heads];

        for (int h = 0; h < heads; ++h) zero[h] = weigh<Arch>(r.rotated_query + (row + h) * e.query(), s.k_scale, s.k_zero, e.keys, x.w + h * x.stride);
        multiply<Arch, heads()>(keys, f.key_bits(), record + at.k_codes, f.head_dim_k(), group, x, scale, ahead);
        for (int h = 0; h < heads; ++h) {
            float* const y = x.y + h * x.stride;
            const lane step = lane::broadcast(scale[h].step), offset = lane::broadcast(one::add(zero[h], scale[h].offset));
            for (int t = 0; t < group; t += simd::lane_count)
                mul(fma(lane::load(y + t), step, offset), lane::load(s.k_token + t)).store(y + t);
            if (f.exact_channels() != 0)
                add_exact_scores<Arch>(f, record + at.exact, r.rotated_query + (row + h) * e.query() + e.keys, r.keys, y);
            if (cap != 0.0f) soft_cap<Arch>(y, group, cap);
        }
        absorb_rows<Arch>(x.y, x.stride, heads, group, r, row, e.values);

        const bool latent = !f.has_values();
        for (int h = 0; h < heads; ++h) {
            float* const p = x.y + h * x.stride;
            float* const w = x.w + h * x.stride;
            if (latent) zero[h] = weigh<Arch>(p, s.k_token, s.k_token, group, w);
            else zero[h] = weigh<Arch>(p, s.v_scale, s.v_zero, group, w);
        }
        if (latent) {
            multiply_transposed<Arch>(f.key_bits(), record + at.k_codes, f.head_dim_k(), group, heads, x);
        } else {
            multiply<Arch, heads()>(values, f.value_bits(), record + at.v_codes, group, f.head_dim_v(), x, scale, ahead);
        }
        for (int h = 0; h < heads; ++h) {
            const float* const y = x.y + h * x.stride;
            float* const out = r.out + (row + h) * e.values;
            if (latent) {
                const lane weight = lane::broadcast(zero[h]);
                for (int d = 0; d < e.values; d += simd::lane_count)
                    fma(lane::load(y + d), lane::load(s.k_scale + d), fma(weight, lane::load(s.k_zero + d), lane::load(out + d))).store(out + d);
            } else {
                const lane step = lane::broadcast(scale[h].step), offset = lane::broadcast(one::add(zero[h], scale[h].offset));
                for (int d = 0; d < e.values; d += simd::lane_count)
                    fma(fma(lane::load(y + d), step, offset), lane::load(s.v_channel + d), lane::load(out + d)).store(out + d);
            }
        }
        ahead.at = ahead.last;  // only the first rows fetch
    });
}

}  // namespace kvarn::detail
