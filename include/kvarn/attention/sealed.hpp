// SPDX-License-Identifier: Apache-2.0
#pragma once
// One record and all query rows of its KV head: scores from the K codes, online softmax, values from the V codes, in the basis of the records.
// K[t][d] = (code * a_d + z_d) * b_t, so <q, K[t]> = (sum_d (q_d a_d) code + <q, z>) * b_t: the channel scale goes into the query once a
// tile. V[t][d] = (code * b_t + z_t) * a_d, so sum_t p_t V[t][d] = (sum_t (p_t b_t) code + sum_t p_t z_t) * a_d. (docs/record-format.md)
// Neither K nor V is ever decoded to memory. No allocation; works in the caller's scratch.

#include <cstddef>
#include <cstring>

#include <kvarn/attention/visible.hpp>
#include <kvarn/codec/decode.hpp>
#include <kvarn/layout/record.hpp>

namespace kvarn::detail {

/// The scalars of a record: as they lie there (record_half), or as floats padded with zeros.
template <class Scalar>
struct record_scalars {
    const Scalar* k_scale;
    const Scalar* k_zero;
    const Scalar* k_token;
    const Scalar* v_channel;
    const Scalar* v_scale;
    const Scalar* v_zero;
};

KVARN_INLINE record_scalars<record_half> scalars_of(const record_layout& at, const std::byte* record) noexcept
{
    const auto field = [&](std::size_t offset) KVARN_LAMBDA { return reinterpret_cast<const record_half*>(record + offset); };
    return {field(at.k_channel_scale), field(at.k_channel_zero), field(at.k_token_scale),
            field(at.v_channel_scale), field(at.v_token_scale),  field(at.v_token_zero)};
}

template <class Arch>
KVARN_INLINE record_scalars<float> load_record_scalars(const format& f, const record_layout& at, const std::byte* record, float* to) noexcept
{
    const attention_extents e(f);
    const auto load = [&](std::size_t offset, int n, int padded) {
        float* const x = to;
        load_scalars<Arch>(record + offset, n, x);
        for (int i = n; i < padded; ++i) x[i] = 0.0f;
        to += padded;
        return static_cast<const float*>(x);
    };
    record_scalars<float> s{};
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

/// w[i] <- x(i) * scale[i], and the totals of w, for Bytes of the weights and not of their magnitudes; returns the sum of x(i) * zero[i].
/// x(i) are sixteen floats, `n` is a multiple of 16.
template <class Arch, bool Bytes, class Scalar, class Source>
KVARN_INLINE float weigh(Source&& x, const Scalar* scale, const Scalar* zero, int n, float* w, weight_totals& totals) noexcept
{
    using lane = simd::lanes<Arch>;
    lane zeros = lane::broadcast(0.0f), most = zeros, sum = zeros;
    for (int i = 0; i < n; i += simd::lane_count) {
        const lane v = x(i), y = mul(v, lane::load(scale + i));
        y.store(w + i);
        zeros = fma(v, lane::load(zero + i), zeros);
        const lane size = magnitude(y);
        most = maximum(most, size);
        if constexpr (Bytes) sum = add(sum, y);
        else sum = add(sum, size);
    }
    totals = {reduce_max(most), reduce_add(sum)};
    return reduce_add(zeros);
}

/// The weights of K: a row's query.
template <class Arch, bool Bytes, class Scalar>
KVARN_NOINLINE float weigh_query(const float* q, const Scalar* scale, const Scalar* zero, int n, float* w, weight_totals& totals) noexcept
{
    return weigh<Arch, Bytes>([&](int i) KVARN_LAMBDA { return simd::lanes<Arch>(simd::lanes<Arch>::load(q + i)); }, scale, zero, n, w, totals);
}

/// The weights of V: scores enter the state, whose largest is raised already.
template <class Arch, bool Bytes, class Scalar>
KVARN_NOINLINE float weigh_scores(const float* s, const Scalar* scale, const Scalar* zero, int n, float* w, weight_totals& totals,
                                  softmax_state& state) noexcept
{
    using lane = simd::lanes<Arch>;
    lane total = lane::broadcast(0.0f);
    const auto weights = [&](int i) KVARN_LAMBDA {
        const lane p = score_weights<Arch>(s + i, state.largest);
        total = add(total, p);
        return p;
    };
    const float zeros = weigh<Arch, Bytes>(weights, scale, zero, n, w, totals);
    state.total = simd::kernels<simd::portable>::add(state.total, reduce_add(total));
    return zeros;
}

/// Calls f with whether a product has bytes, as an integral constant.
template <class F>
KVARN_INLINE float with_bytes(product_kind kind, F&& f) noexcept
{
    if (kind == product_kind::bytes || kind == product_kind::positive_bytes) return f(std::true_type{});
    return f(std::false_type{});
}

/// Sums of products to scores, in place: s[t] <- (step * s[t] + offset) * token_scale[t]. Returns the largest.
template <class Arch, class Scalar>
KVARN_INLINE float finish_scores(float* s, int n, float step, float offset, const Scalar* token_scale) noexcept
{
    using lane = simd::lanes<Arch>;
    const lane by = lane::broadcast(step), plus = lane::broadcast(offset);
    lane most = lane::broadcast(lowest_score);
    for (int t = 0; t < n; t += simd::lane_count) {
        const lane x = mul(fma(lane::load(s + t), by, plus), lane::load(token_scale + t));
        most = maximum(most, x);
        x.store(s + t);
    }
    return reduce_max(most);
}

/// Adds to scores[t] the product of the query's exact channels with the record's: [group][exact_channels] half.
template <class Arch>
KVARN_NOINLINE void add_exact_scores(const format& f, const std::byte* exact, const float* query, float* stage, float* scores) noexcept
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

/// Token scalars of a row that does not see the whole tile: zeros for what is hidden, whatever the record holds there.
template <class Arch, class Scalar>
KVARN_NOINLINE const Scalar* visible_scalars(const Scalar* from, int group, const visible_block& block, int row, visible_range seen,
                                             Scalar* to) noexcept
{
    const auto bytes = [](int scalars) { return static_cast<std::size_t>(scalars) * sizeof(Scalar); };
    std::memset(to, 0, bytes(group));
    std::memcpy(to + seen.begin, reinterpret_cast<const std::byte*>(from) + bytes(seen.begin), bytes(seen.end - seen.begin));
    if (block.masked()) hide_masked<Arch>(block, row, seen, Scalar{}, to);
    return to;
}

/// What attend_rows needs to know of a record and of the call.
struct record_call {
    const format& f;
    const record_layout& at;
    const std::byte* record;
    product_kind keys;
    product_kind values;
    float step_bound;  // bytes: the largest step of weights of K, times the largest token scale
    float cap;         // in base-2 units, 0 for none
    const visible_block& block;
};

/// The largest of a tile's scalars.
template <class Arch, class Scalar>
KVARN_INLINE float largest_scalar(const Scalar* x, int group) noexcept
{
    using lane = simd::lanes<Arch>;
    lane most = lane::load(x);
    for (int t = simd::lane_count; t < group; t += simd::lane_count) most = maximum(most, lane::load(x + t));
    return reduce_max(most);
}

/// Whether weights of K in bytes are good enough for a row: their step times the largest scale of a token that it sees. `largest`: of all.
template <class Arch, class Scalar>
KVARN_INLINE bool within_bound(const record_call& call, const record_scalars<Scalar>& s, float largest, int row, const attention_rows& r,
                               float most) noexcept
{
    using one = simd::kernels<simd::portable>;
    const visible_range seen = r.seen[row];
    const int group = call.f.group();
    if (seen.empty()) return true;
    if (seen.begin > 0 || seen.end < group || call.block.masked())
        largest = largest_scalar<Arch>(visible_scalars<Arch>(s.k_token, group, call.block, row, seen, reinterpret_cast<Scalar*>(r.values)), group);
    return one::mul(one::mul(most, 1.0f / 127.0f), largest) <= call.step_bound;
}

/// One record and query rows [row, row + heads), at most most_heads.
template <class Arch, class Scalar>
KVARN_INLINE void attend_rows(const record_call& call, const record_scalars<Scalar>& s, int row, int heads, const attention_rows& r,
                              simd::read_ahead& ahead) noexcept
{
    using lane = simd::lanes<Arch>;
    using one = simd::kernels<simd::portable>;
    const auto& [f, at, record, keys, values, step_bound, cap, block] = call;
    const attention_extents e(f);
    const product_rows& x = r.product;
    const int group = f.group();
    const bool latent = !f.has_values();
    const Scalar* const value_scale = latent ? s.k_token : s.v_scale;
    const Scalar* const value_zero = latent ? s.k_token : s.v_zero;
    weight_totals totals[most_heads];
    product_scale scale[most_heads];
    float zero[most_heads];
    product_kind kinds[most_heads];  // of the products with K

    const float largest_token = keys == product_kind::bytes ? largest_scalar<Arch>(s.k_token, group) : 0.0f;
    for (int h = 0; h < heads; ++h) {
        const auto weigh_as = [&](product_kind kind) KVARN_LAMBDA {
            kinds[h] = kind;
            zero[h] = with_bytes(kind, [&](auto bytes) KVARN_LAMBDA {
                return weigh_query<Arch, bytes()>(r.rotated_query + (row + h) * e.query(), s.k_scale, s.k_zero, e.keys, x.w + h * x.stride, totals[h]);
            });
        };
        weigh_as(keys);
        if (keys == product_kind::bytes && !within_bound<Arch>(call, s, largest_token, row + h, r, totals[h].most)) weigh_as(product_kind::words);
    }
    for (int h = 0, same; h < heads; h += same) {  // rows of one kind share a pass
        same = 1;
        while (h + same < heads && kinds[h + same] == kinds[h]) ++same;
        multiply<Arch>(same, kinds[h], f.key_bits(), record + at.k_codes, f.head_dim_k(), group, rows_from(x, h), totals + h, scale + h, 0,
                       f.head_dim_k(), ahead);
    }

    int begin = group, end = 0;  // of the tokens that some row sees
    for (int h = 0; h < heads; ++h) {
        float* const score = x.y + h * x.stride;
        float* const w = x.w + h * x.stride;
        const visible_range seen = r.seen[row + h];
        if (seen.empty()) {
            for (int t = 0; t < group; ++t) w[t] = 0.0f;
            zero[h] = 0.0f;
            totals[h] = {};
            continue;
        }
        begin = seen.begin < begin ? seen.begin : begin;
        end = seen.end > end ? seen.end : end;
        const Scalar *weight_scale = value_scale, *weight_zero = value_zero;
        float largest = finish_scores<Arch>(score, group, scale[h].step, one::add(zero[h], scale[h].offset), s.k_token);
        const bool hides = seen.begin > 0 || seen.end < group || block.masked();
        if (f.exact_channels() != 0 || cap != 0.0f || block.slopes != nullptr || hides) {
            if (f.exact_channels() != 0)
                add_exact_scores<Arch>(f, record + at.exact, r.rotated_query + (row + h) * e.query() + e.keys, r.keys, score);
            if (cap != 0.0f) soft_cap<Arch>(score, group, cap);
            if (block.slopes != nullptr) add_alibi<Arch>(block, row + h, score, group);
            hide_scores(score, group, seen);
            if (block.masked()) hide_masked<Arch>(block, row + h, seen, -std::numeric_limits<float>::infinity(), score);
            largest = reduce_max(largest_of<Arch>(score, group));
            if (hides) {
                Scalar* const room = reinterpret_cast<Scalar*>(r.values);
                weight_scale = visible_scalars<Arch>(value_scale, group, block, row + h, seen, room);
                weight_zero = latent ? weight_scale : visible_scalars<Arch>(value_zero, group, block, row + h, seen, room + group);
            }
        }
        raise_largest<Arch>(largest, r.state[row + h], r.out + (row + h) * e.values, e.values);
        zero[h] = with_bytes(values, [&](auto bytes) KVARN_LAMBDA {
            return weigh_scores<Arch, bytes()>(score, weight_scale, weight_zero, group, w, totals[h], r.state[row + h]);
        });
    }

    if (latent) multiply_transposed<Arch>(f.key_bits(), record + at.k_codes, f.head_dim_k(), group, heads, x);
    else multiply<Arch>(heads, values, f.value_bits(), record + at.v_codes, group, f.head_dim_v(), x, totals, scale, begin / 8 * 8, (end + 7) / 8 * 8, ahead);
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
}

/// Adds one record to the states and outputs of all rows that see something of it (r.seen and `block`, relative to the tile). Token scalars, exact
/// channels and codes of tokens that a row does not see may hold anything. `ahead` is fetched on the way.
template <class Arch>
KVARN_NOINLINE void attend_record(const record_call& call, const attention_rows& r, simd::read_ahead ahead) noexcept
{
    const format& f = call.f;
    const record_layout& at = call.at;
    const std::byte* const record = call.record;
    // One row uses every scalar once; rows that share them, and odd sizes, get them as floats.
    if (r.rows == 1 && f.head_dim_k() % simd::lane_count == 0 && f.head_dim_v() % simd::lane_count == 0) {
        attend_rows<Arch>(call, scalars_of(at, record), 0, 1, r, ahead);
        return;
    }
    const record_scalars<float> s = load_record_scalars<Arch>(f, at, record, r.scalars);
    for_row_groups(r.rows, [&](int row, int heads) KVARN_LAMBDA {
        if (!any_visible(r.seen + row, heads)) return;
        attend_rows<Arch>(call, s, row, heads, r, ahead);
        ahead.at = ahead.last;  // only the first rows fetch
    });
}

}  // namespace kvarn::detail
