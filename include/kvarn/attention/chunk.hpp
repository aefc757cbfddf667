// SPDX-License-Identifier: Apache-2.0
#pragma once
// The steps of one attention call: check, prepare the queries, attend to a chunk, write the output. In: a task, options, carved scratch.
// No allocation. Layer 4; for attention.hpp only.

#include <cmath>
#include <cstddef>
#include <cstdint>

#include <kvarn/attention/exact.hpp>
#include <kvarn/attention/sealed.hpp>
#include <kvarn/attention/task.hpp>
#include <kvarn/attention/visible.hpp>

namespace kvarn::detail {

inline constexpr float largest_query = 1e20f;  // far from overflow in any product with a record's scalars

inline constexpr std::int64_t last_position = INT64_MAX / 4;  // of a history: far from overflow in any difference

inline constexpr float largest_slope = 1e18f;  // of ALiBi: times any distance far from overflow

inline constexpr float largest_soft_cap = 1000.0f;  // above, cancellation costs more than 1e-4

/// A run of tokens inside one segment: [first, first + tokens), counted from the first token of the segment's memory, which is, or would
/// be if it were visible (kv_segment::skip), at `position`.
struct chunk {
    const kv_segment* segment = nullptr;
    std::size_t first = 0;
    std::size_t tokens = 0;
    std::int64_t position = 0;
};

/// Tokens of a segment with those that are skipped, none if nothing is left: chunks begin and end where records do.
[[nodiscard]] KVARN_INLINE std::size_t extent_of(const kv_segment& s) noexcept { return s.tokens != 0 ? s.skip + s.tokens : 0; }

[[nodiscard]] KVARN_INLINE std::size_t chunks_of(const kv_segment& s, std::size_t chunk_tokens) noexcept
{
    const std::size_t n = extent_of(s);
    return n / chunk_tokens + (n % chunk_tokens != 0);
}
[[nodiscard]] KVARN_INLINE std::size_t chunks_of(const attention_task& task, std::size_t chunk_tokens) noexcept
{
    std::size_t n = 0;
    for (const kv_segment& s : task.history) n += chunks_of(s, chunk_tokens);
    return n;
}

/// Calls body(chunk) for chunks [begin, end) of the task, in order.
template <class F>
KVARN_INLINE void for_chunks(const attention_task& task, std::size_t chunk_tokens, std::size_t begin, std::size_t end, F&& body) noexcept
{
    std::size_t number = 0;
    std::int64_t behind = 0;
    for (const kv_segment& s : task.history) {
        if (s.tokens == 0) continue;
        const std::size_t n = extent_of(s);
        const std::int64_t position = begin_of(s, behind), start = position - static_cast<std::int64_t>(s.skip);
        for (std::size_t first = 0; first < n; first += chunk_tokens, ++number)
            if (number >= begin && number < end) body(chunk{&s, first, n - first < chunk_tokens ? n - first : chunk_tokens, start});
        behind = position + static_cast<std::int64_t>(s.tokens);
    }
}

[[nodiscard]] KVARN_INLINE int output_channels(const format& f) noexcept { return f.has_values() ? f.head_dim_v() : f.head_dim_k(); }

KVARN_INLINE status check_options(const attention_options& o) noexcept
{
    const auto in_range = [](float x) KVARN_LAMBDA { return x >= 0.0f && x <= 1e30f; };
    if (!in_range(o.softmax_scale) || !in_range(o.logit_soft_cap) || o.logit_soft_cap > largest_soft_cap || o.window < 0)
        return status::bad_argument;
    if (!(o.fast_bound >= 0.0f)) return status::bad_argument;
    if (o.precision > precision::fast || o.query_basis > basis::rotated || o.output_basis > basis::rotated) return status::bad_argument;
    return status::ok;
}

/// All of a task but its output.
KVARN_INLINE status check_task(const format& f, const attention_task& task, std::size_t max_rows) noexcept
{
    const auto channels = static_cast<std::size_t>(f.key_channels()), out = static_cast<std::size_t>(output_channels(f));
    if (task.q.tokens == 0 || task.q.heads == 0) return status::ok;
    if (task.q.channels != channels) return status::shape_mismatch;
    if (task.q.heads > max_rows || task.q.tokens > max_rows / task.q.heads) return status::bad_argument;
    if (task.q.data == nullptr) return status::null_pointer;
    if (task.first_position < -1 || task.first_position > INT64_MAX - 65536) return status::bad_argument;
    if (task.mask_tokens != 0 && task.mask == nullptr) return status::null_pointer;
    if (task.mask_tokens > static_cast<std::uint64_t>(last_position)) return status::bad_argument;
    if (task.mask_tokens / 64 + (task.mask_tokens % 64 != 0) > task.mask_stride) return status::shape_mismatch;
    if (task.sink_logits != nullptr)
        for (std::size_t h = 0; h < task.q.heads; ++h)
            if (!(task.sink_logits[h] < largest_query)) return status::not_finite;
    if (task.alibi_slopes != nullptr)
        for (std::size_t h = 0; h < task.q.heads; ++h)
            if (!(task.alibi_slopes[h] <= largest_slope && task.alibi_slopes[h] >= -largest_slope)) return status::not_finite;
    std::int64_t behind = 0;
    for (const kv_segment& s : task.history) {
        if (s.tokens == 0) continue;
        const std::int64_t position = begin_of(s, behind);
        if (s.position < -1 || position < behind || position > last_position) return status::bad_argument;
        if (s.tokens > static_cast<std::size_t>(last_position - position)) return status::bad_argument;
        behind = position + static_cast<std::int64_t>(s.tokens);
        if (s.sealed()) {
            const auto group = static_cast<std::size_t>(f.group());
            if (s.skip >= group || s.records != (s.skip + s.tokens + group - 1) / group) return status::shape_mismatch;
            if (s.list == nullptr && s.data == nullptr) return status::null_pointer;
            if (s.list != nullptr)
                for (std::size_t i = 0; i < s.records; ++i)
                    if (s.list[i] == nullptr) return status::null_pointer;
        } else {
            if (s.skip != 0) return status::shape_mismatch;
            if (s.k.data == nullptr || (f.has_values() && s.v.data == nullptr)) return status::null_pointer;
            if (s.k.tokens < s.tokens || s.k.channels != channels || s.head >= s.k.heads) return status::shape_mismatch;
            if (f.has_values()) {
                if (s.v.tokens < s.tokens || s.v.channels != out || s.head >= s.v.heads) return status::shape_mismatch;
            } else if (s.v.data != nullptr) {
                return status::shape_mismatch;
            }
        }
    }
    return status::ok;
}

KVARN_INLINE status check_output(const format& f, const attention_task& task) noexcept
{
    if (task.q.tokens != task.out.tokens || task.q.heads != task.out.heads) return status::shape_mismatch;
    if (task.q.tokens == 0 || task.q.heads == 0) return status::ok;
    if (task.out.channels != static_cast<std::size_t>(output_channels(f))) return status::shape_mismatch;
    return task.out.data == nullptr ? status::null_pointer : status::ok;
}

/// Calls f with the view's typed pointer to vector (token, head).
template <bool Const, class F>
KVARN_INLINE void with_vector(const any_view<Const>& x, std::size_t token, std::size_t head, F&& f) noexcept
{
    using kind = typename any_view<Const>::element_type;
    const std::ptrdiff_t at = static_cast<std::ptrdiff_t>(token) * x.token_stride + static_cast<std::ptrdiff_t>(head) * x.head_stride;
    const auto call = [&](auto tag) KVARN_LAMBDA {
        using T = std::conditional_t<Const, const typename decltype(tag)::type, typename decltype(tag)::type>;
        f(static_cast<T*>(x.data) + at);
    };
    if (x.type == kind::f32) call(std::type_identity<float>{});
    else if (x.type == kind::f16) call(std::type_identity<half>{});
    else call(std::type_identity<bfloat16>{});
}

/// Channels [first, first + n) of a vector as floats, zeros up to `padded`.
template <class Arch>
KVARN_INLINE void load_channels(const input_view& x, std::size_t token, std::size_t head, int first, int n, int padded, float* to) noexcept
{
    with_vector(x, token, head, [&](auto* p) KVARN_LAMBDA {
        load_row<Arch>(p + first * x.channel_stride, x.channel_stride, n, to);
    });
    for (int i = n; i < padded; ++i) to[i] = 0.0f;
}

/// Rotates rows in place. One compiled loop for each common size.
template <class Arch>
KVARN_NOINLINE void transform_rows(float* x, std::ptrdiff_t stride, int rows, int dim, direction to) noexcept
{
    using k = simd::kernels<Arch>;
    with_extent(dim, [&](auto d) KVARN_LAMBDA {
        if constexpr (is_constant_extent<decltype(d)>) {
            for (int i = 0; i < rows; ++i) {
                float* const row = x + i * stride;
                transform_vector<Arch>([&](int c) KVARN_LAMBDA { return k::load(row + c); }, row, row, d);
            }
        } else {
            transform_any_rows<Arch>(x, stride, rows, d, to);
        }
    });
}

/// Loads the queries, times the softmax scale and log2(e), in the bases that the history needs.
template <class Arch>
KVARN_NOINLINE status prepare_queries(const format& f, const attention_task& task, const attention_options& o, const attention_rows& r) noexcept
{
    using one = simd::kernels<simd::portable>;
    const attention_extents e(f);
    const float softmax_scale = o.softmax_scale != 0.0f ? o.softmax_scale : hadamard_scale(f.key_channels());
    const float scale = one::mul(softmax_scale, log2_e);
    bool rotated = false, original = false;
    for (const kv_segment& s : task.history) {
        if (s.tokens == 0) continue;
        if (s.sealed() || s.key_basis == basis::rotated) rotated = true;
        else original = true;
    }
    if (!f.keys_rotated()) {
        original = false;
        rotated = true;
    }
    const bool given_rotated = !f.keys_rotated() || o.query_basis == basis::rotated;
    float* const given = given_rotated ? r.rotated_query : r.original_query;
    float* const other = given_rotated ? r.original_query : r.rotated_query;
    for (int i = 0; i < r.rows; ++i) {
        const auto token = static_cast<std::size_t>(i) / task.q.heads, head = static_cast<std::size_t>(i) % task.q.heads;
        float* const row = given + i * e.query();
        load_channels<Arch>(task.q, token, head, 0, f.head_dim_k(), e.keys, row);
        load_channels<Arch>(task.q, token, head, f.head_dim_k(), f.exact_channels(), e.exact, row + e.keys);
        scale_floats<Arch>(row, e.query(), scale);
        const std::uint32_t most = simd::kernels<Arch>::largest_magnitude(row, static_cast<std::size_t>(e.query()));
        if (!(most <= std::bit_cast<std::uint32_t>(largest_query))) return status::not_finite;
    }
    if (given_rotated ? original : rotated) {
        std::memcpy(other, given, static_cast<std::size_t>(r.rows) * static_cast<std::size_t>(e.query()) * sizeof(float));
        if (given_rotated) transform_rows<Arch>(other, e.query(), r.rows, f.head_dim_k(), direction::inverse);
        else transform_rows<Arch>(other, e.query(), r.rows, f.head_dim_k(), direction::forward);
    }
    return status::ok;
}

/// The products with the codes of K and of V.
struct tile_products {
    product_kind keys, values;
};
[[nodiscard]] KVARN_INLINE constexpr tile_products products_of(const format& f, precision p) noexcept
{
    const bool fast = p == precision::fast;
    const product_kind other = p == precision::exact ? product_kind::exact : product_kind::words;
    return {kind_for(fast ? product_kind::bytes : other, f.key_bits(), f.group()),
            f.has_values() ? kind_for(fast ? product_kind::positive_bytes : other, f.value_bits(), f.head_dim_v()) : product_kind::exact};
}

/// What weights of K that are rounded to a step of 1 do to a score, before the token's scale, as a standard deviation in natural units:
/// the losses of the channels are even within half a step, codes even over their levels, their mean accounted for.
[[nodiscard]] KVARN_INLINE float deviation_of_codes(const format& f) noexcept
{
    const double levels = static_cast<double>(1 << f.key_bits());
    const double variance = static_cast<double>(f.head_dim_k()) / 12.0 * (levels * levels - 1.0) / 12.0;
    return static_cast<float>(static_cast<double>(ln_2) * std::sqrt(variance));
}

inline constexpr std::size_t page_bytes = 4096;  // of virtual memory: the smallest ones

/// Fetches a line of each page of records [begin, end), as far as there are such. The processor then knows where the pages are: several
/// are looked up at once, where the lines of a record that are fetched one after the other would wait for each.
KVARN_INLINE void look_up_pages(const kv_segment& s, std::size_t begin, std::size_t end, std::size_t bytes) noexcept
{
    for (std::size_t i = begin; i < end && i < s.records; ++i)
        for (std::size_t at = 0; at < bytes; at += page_bytes) KVARN_PREFETCH(s.record(i) + at);
}

/// One chunk from nothing: r.state and r.out, in the basis of the records' V.
template <class Arch>
KVARN_NOINLINE void attend_chunk(const format& f, const attention_task& task, const attention_options& o, const call_positions& positions, const chunk& c,
                                 const attention_rows& r) noexcept
{
    const attention_extents e(f);
    const kv_segment& s = *c.segment;
    const float cap = simd::kernels<simd::portable>::mul(o.logit_soft_cap, log2_e);
    for (int i = 0; i < r.rows; ++i) r.state[i] = empty_state;
    for (int i = 0; i < r.rows * e.values; ++i) r.out[i] = 0.0f;
    if (s.sealed()) {
        const record_layout at = layout_of(f);
        const auto group = static_cast<std::size_t>(f.group());
        const std::size_t end = c.first + c.tokens;
        const tile_products products = products_of(f, o.precision);
        const float bound = simd::kernels<simd::portable>::div(o.fast_bound, deviation_of_codes(f));
        const std::size_t first = c.first / group;
        const std::size_t together = at.content_bytes < 16 * page_bytes ? 16 * page_bytes / at.content_bytes : 1;  // look their pages up
        for (std::size_t i = first; i * group < end; ++i) {
            if ((i - first) % together == 0) look_up_pages(s, i == first ? i + 1 : i + 2, i + 2 + together, at.content_bytes);
            const visible_range part{i == 0 ? static_cast<int>(s.skip) : 0, end - i * group < group ? static_cast<int>(end - i * group) : f.group()};
            const visible_block block = find_visible<Arch>(task, o, positions, c.position + static_cast<std::int64_t>(i * group), part, r);
            if (block.any.empty()) continue;
            const std::byte* const record = s.record(i);
            simd::read_ahead ahead{record, record};
            if (i + 1 < s.records) ahead = {s.record(i + 1), s.record(i + 1) + at.content_bytes};
            attend_record<Arch>({f, at, record, products.keys, products.values, bound, cap, block}, r, ahead);
        }
        return;
    }
    const bool keys_as_stored = !f.keys_rotated() || s.key_basis == basis::rotated;
    const bool values_as_stored = !f.values_rotated() || (f.has_values() ? s.value_basis : s.key_basis) == basis::rotated;
    for (std::size_t t = c.first; t < c.first + c.tokens; t += exact_block) {
        const int tokens = c.first + c.tokens - t < exact_block ? static_cast<int>(c.first + c.tokens - t) : exact_block;
        const visible_block block = find_visible<Arch>(task, o, positions, c.position + static_cast<std::int64_t>(t), {0, tokens}, r);
        if (block.any.empty()) continue;
        for (int i = 0; i < tokens; ++i) {
            const std::size_t token = t + static_cast<std::size_t>(i);
            float* const key = r.keys + i * e.query();
            float* const value = r.values + i * e.values;
            if (!is_seen<Arch>(i, block, r)) {  // it may hold anything
                std::memset(key, 0, static_cast<std::size_t>(e.query()) * sizeof(float));
                std::memset(value, 0, static_cast<std::size_t>(e.values) * sizeof(float));
                continue;
            }
            load_channels<Arch>(s.k, token, s.head, 0, f.head_dim_k(), e.keys, key);
            load_channels<Arch>(s.k, token, s.head, f.head_dim_k(), f.exact_channels(), e.exact, key + e.keys);
            if (f.has_values()) load_channels<Arch>(s.v, token, s.head, 0, f.head_dim_v(), e.values, value);
            else std::memcpy(value, key, static_cast<std::size_t>(e.values) * sizeof(float));
        }
        attend_exact<Arch>(f, tokens, keys_as_stored, cap, block, r);
    }
    if (!values_as_stored) transform_rows<Arch>(r.out, e.values, r.rows, output_channels(f), direction::forward);
}

/// r.total before the first chunk: the sink logits, if any.
KVARN_INLINE void begin_total(const format& f, const attention_task& task, const attention_rows& r) noexcept
{
    const attention_extents e(f);
    for (int i = 0; i < r.rows; ++i) {
        r.total[i] = empty_state;
        if (task.sink_logits != nullptr) {
            const float logit = task.sink_logits[static_cast<std::size_t>(i) % task.q.heads];
            if (logit > -largest_query) r.total[i] = {simd::kernels<simd::portable>::mul(logit, log2_e), 1.0f};
        }
    }
    for (int i = 0; i < r.rows * e.values; ++i) r.total_out[i] = 0.0f;
}

/// Divides by the sums, leaves the basis of the records if asked, and writes output and log-sum-exp.
template <class Arch>
KVARN_NOINLINE void write_output(const format& f, const attention_task& task, const attention_options& o, const attention_rows& r) noexcept
{
    const attention_extents e(f);
    const int channels = output_channels(f);
    for (int i = 0; i < r.rows; ++i) {
        const softmax_state& s = r.total[i];
        if (task.log_sum_exp != nullptr)
            task.log_sum_exp[i] = s.total > 0.0f ? (s.largest + log2_of(s.total)) * ln_2 : -std::numeric_limits<float>::infinity();
        scale_floats<Arch>(r.total_out + i * e.values, e.values, s.total > 0.0f ? 1.0f / s.total : 0.0f);
    }
    if (f.values_rotated() && o.output_basis == basis::original) transform_rows<Arch>(r.total_out, e.values, r.rows, channels, direction::inverse);
    for (int i = 0; i < r.rows; ++i) {
        const auto token = static_cast<std::size_t>(i) / task.q.heads, head = static_cast<std::size_t>(i) % task.q.heads;
        with_vector(task.out, token, head, [&](auto* p) KVARN_LAMBDA {
            store_row<Arch>(r.total_out + i * e.values, channels, p, task.out.channel_stride);
        });
    }
}

}  // namespace kvarn::detail
