// SPDX-License-Identifier: Apache-2.0
#pragma once
// Decode attention for tests: a history whose tokens the library sees through segments and the reference as plain matrices, arrays of
// any element type and strides, and calls whose output and scratch lie between guard bytes.

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <deque>
#include <memory>
#include <span>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "../reference/attention.hpp"
#include "guarded_bytes.hpp"
#include "library.hpp"

namespace support {

inline kvarn::format format_of(int dk, int dv, int kb, int vb, int group, reference::rotations rotate = true, int exact = 0)
{
    return support::make(reference::shape{dk, dv, kb, vb, group, rotate, exact});
}

enum class element_kind { f32, f16, bf16 };
inline constexpr element_kind all_element_kinds[] = {element_kind::f32, element_kind::f16, element_kind::bf16};

/// Where the elements of an array [token][head][channel] lie.
enum class storage { dense, head_major, padded, scattered, backwards };
inline constexpr storage all_storages[] = {storage::dense, storage::head_major, storage::padded, storage::scattered,
                                           storage::backwards};

/// An array [token][head][channel] of one element type; what lies between its elements, before and after is filled with 0xa5.
class strided_array {
public:
    strided_array(element_kind kind, storage where, std::size_t tokens, std::size_t heads, std::size_t channels)
        : kind_(kind), tokens_(tokens), heads_(heads), channels_(channels)
    {
        const auto c = static_cast<std::ptrdiff_t>(channels), h = static_cast<std::ptrdiff_t>(heads),
                   t = static_cast<std::ptrdiff_t>(tokens);
        switch (where) {
        case storage::dense: stride_[1] = c, stride_[0] = h * c; break;
        case storage::head_major: stride_[0] = c, stride_[1] = t * c; break;
        case storage::padded: stride_[1] = c + 3, stride_[0] = h * (c + 3) + 5; break;
        case storage::scattered: stride_[2] = 3, stride_[1] = 3 * c + 1, stride_[0] = h * (3 * c + 1) + 7; break;
        case storage::backwards: stride_[2] = -1, stride_[1] = c + 1, stride_[0] = -(h * (c + 1) + 3); break;
        }
        std::ptrdiff_t low = 0, high = 0;
        const std::ptrdiff_t last[] = {t - 1, h - 1, c - 1};
        for (int i = 0; i < 3; ++i) (stride_[i] < 0 ? low : high) += stride_[i] * std::max<std::ptrdiff_t>(last[i], 0);
        origin_ = guard - low;
        memory_.assign(static_cast<std::size_t>(high - low + 1 + 2 * guard) * bytes_each(), 0xa5);
    }
    strided_array(element_kind kind, storage where, std::size_t tokens, std::size_t heads, std::size_t channels,
                  const std::vector<float>& dense)
        : strided_array(kind, where, tokens, heads, channels)
    {
        for_each([&](std::size_t i, std::size_t at) { write(at, dense[i]); });
    }

    template <bool Const>
    [[nodiscard]] kvarn::any_view<Const> view() const
    {
        kvarn::any_view<Const> v;
        using type = typename kvarn::any_view<Const>::element_type;
        v.data = const_cast<std::uint8_t*>(memory_.data()) + static_cast<std::size_t>(origin_) * bytes_each();
        v.type = kind_ == element_kind::f32 ? type::f32 : kind_ == element_kind::f16 ? type::f16 : type::bf16;
        v.tokens = tokens_;
        v.heads = heads_;
        v.channels = channels_;
        v.token_stride = stride_[0];
        v.head_stride = stride_[1];
        v.channel_stride = stride_[2];
        return v;
    }
    [[nodiscard]] std::vector<float> dense() const
    {
        std::vector<float> x(tokens_ * heads_ * channels_);
        for_each([&](std::size_t i, std::size_t at) { x[i] = read(at); });
        return x;
    }
    /// Whether nothing but the elements was written.
    [[nodiscard]] bool intact() const
    {
        std::vector<std::uint8_t> copy = memory_;
        for_each([&](std::size_t, std::size_t at) { std::memset(copy.data() + at, 0xa5, bytes_each()); });
        return std::all_of(copy.begin(), copy.end(), [](std::uint8_t b) { return b == 0xa5; });
    }
    /// Whether nothing was written at all since it was made without values.
    [[nodiscard]] bool untouched() const
    {
        return std::all_of(memory_.begin(), memory_.end(), [](std::uint8_t b) { return b == 0xa5; });
    }

private:
    static constexpr std::ptrdiff_t guard = 40;
    [[nodiscard]] std::size_t bytes_each() const { return kind_ == element_kind::f32 ? 4 : 2; }

    template <class F>
    void for_each(F&& f) const
    {
        std::size_t i = 0;
        for (std::size_t t = 0; t < tokens_; ++t)
            for (std::size_t h = 0; h < heads_; ++h)
                for (std::size_t c = 0; c < channels_; ++c)
                    f(i++, static_cast<std::size_t>(origin_ + static_cast<std::ptrdiff_t>(t) * stride_[0] +
                                                    static_cast<std::ptrdiff_t>(h) * stride_[1] +
                                                    static_cast<std::ptrdiff_t>(c) * stride_[2]) *
                               bytes_each());
    }
    void write(std::size_t at, float x)
    {
        if (kind_ == element_kind::f32) {
            std::memcpy(memory_.data() + at, &x, 4);
            return;
        }
        const std::uint16_t bits = kind_ == element_kind::f16 ? reference::half_bits(x) : reference::bfloat16_bits(x);
        std::memcpy(memory_.data() + at, &bits, 2);
    }
    [[nodiscard]] float read(std::size_t at) const
    {
        if (kind_ == element_kind::f32) {
            float x;
            std::memcpy(&x, memory_.data() + at, 4);
            return x;
        }
        std::uint16_t bits;
        std::memcpy(&bits, memory_.data() + at, 2);
        return static_cast<float>(kind_ == element_kind::f16 ? reference::half_value(bits) : reference::bfloat16_value(bits));
    }

    element_kind kind_;
    std::size_t tokens_, heads_, channels_;
    std::ptrdiff_t stride_[3] = {0, 0, 1};
    std::ptrdiff_t origin_ = 0;
    std::vector<std::uint8_t> memory_;
};

/// How records of one head lie in memory: all but `run` among bytes that would decode to NaN, and at odd addresses.
enum class record_storage { run, grid, table, list };
inline constexpr record_storage all_record_storages[] = {record_storage::run, record_storage::grid, record_storage::table,
                                                         record_storage::list};

inline reference::matrix to_matrix(const std::vector<float>& dense, std::size_t columns)
{
    reference::matrix m(static_cast<Eigen::Index>(dense.size() / columns), static_cast<Eigen::Index>(columns));
    for (Eigen::Index i = 0; i < m.rows(); ++i)
        for (Eigen::Index j = 0; j < m.cols(); ++j)
            m(i, j) = static_cast<double>(dense[static_cast<std::size_t>(i * m.cols() + j)]);
    return m;
}

inline std::vector<float> to_floats(const reference::matrix& m)
{
    std::vector<float> x;
    for (Eigen::Index i = 0; i < m.rows(); ++i)
        for (Eigen::Index j = 0; j < m.cols(); ++j) x.push_back(static_cast<float>(m(i, j)));
    return x;
}

inline std::vector<float> gaussian_floats(random_source& random, std::size_t n, double gain = 1.0)
{
    std::vector<float> x(n);
    for (float& each : x) each = static_cast<float>(gain * random.gaussian());
    return x;
}

/// Channels of the output.
inline std::size_t output_channels(const kvarn::format& f)
{
    return static_cast<std::size_t>(f.has_values() ? f.head_dim_v() : f.head_dim_k());
}

/// Gaussian records, one by one.
inline std::vector<bytes> random_records(const kvarn::format& f, std::size_t count, std::uint64_t seed)
{
    random_source random(seed);
    std::vector<bytes> records;
    const auto all = encode(f, random_tiles(random, f, count, 1, tile_kind::gaussian));
    const auto content = static_cast<std::ptrdiff_t>(kvarn::layout_of(f).content_bytes),
               each = static_cast<std::ptrdiff_t>(kvarn::record_bytes(f));
    for (std::size_t i = 0; i < count; ++i) {
        const auto first = all.begin() + static_cast<std::ptrdiff_t>(i) * each;
        records.emplace_back(first, first + content);
    }
    return records;
}

/// Overwrites what records hold of tokens, counted over all of `records`: codes by random ones, token scalars and exact channels by the
/// half with these bits. `chosen(token)` says which.
template <class Chosen>
void overwrite_tokens(const kvarn::format& f, std::vector<bytes>& records, Chosen&& chosen, std::uint16_t half, random_source& random)
{
    const kvarn::record_layout at = kvarn::layout_of(f);
    const auto group = static_cast<std::size_t>(f.group());
    for (std::size_t i = 0; i < records.size(); ++i)
        for (std::size_t t = 0; t < group; ++t) {
            if (!chosen(i * group + t)) continue;
            bytes& r = records[i];
            const auto put = [&](std::size_t scalars, std::size_t number) {
                r[scalars + 2 * number] = static_cast<std::uint8_t>(half & 0xffu);
                r[scalars + 2 * number + 1] = static_cast<std::uint8_t>(half >> 8);
            };
            const auto put_code = [&](std::size_t codes, std::size_t number, int bits) {
                for (std::size_t b = number * static_cast<std::size_t>(bits); b < (number + 1) * static_cast<std::size_t>(bits); ++b) {
                    const auto mask = static_cast<std::uint8_t>(1u << b % 8);
                    std::uint8_t& byte = r[codes + b / 8];
                    byte = static_cast<std::uint8_t>(random.below(2) ? byte | mask : byte & ~mask);
                }
            };
            for (std::size_t c = 0; c < static_cast<std::size_t>(f.head_dim_k()); ++c) put_code(at.k_codes, c * group + t, f.key_bits());
            put(at.k_token_scale, t);
            for (int c = 0; c < f.exact_channels(); ++c)
                put(at.exact, t * static_cast<std::size_t>(f.exact_channels()) + static_cast<std::size_t>(c));
            if (!f.has_values()) continue;
            const auto dv = static_cast<std::size_t>(f.head_dim_v());
            for (std::size_t c = 0; c < dv; ++c) put_code(at.v_codes, t * dv + c, f.value_bits());
            put(at.v_token_scale, t);
            put(at.v_token_zero, t);
        }
}

/// Those outside of [begin, end).
inline void overwrite_outside(const kvarn::format& f, std::vector<bytes>& records, std::size_t begin, std::size_t end, std::uint16_t half,
                              random_source& random)
{
    overwrite_tokens(f, records, [&](std::size_t t) { return t < begin || t >= end; }, half, random);
}

/// The history of one KV head: segments for the library, K and V in the original basis for the reference.
class kv_history {
public:
    kv_history(const kvarn::format& f, std::uint64_t seed) : format_(f), shape_(shape_of(f)), random_(seed)
    {
        k_.resize(0, f.key_channels());
        v_.resize(0, static_cast<Eigen::Index>(support::output_channels(f)));
    }

    void add_exact(std::size_t tokens, kvarn::basis stored = kvarn::basis::original, element_kind kind = element_kind::f32,
                   storage where = storage::dense, double gain = 1.0)
    {
        add_exact(tokens, stored, stored, kind, where, gain);
    }
    void add_exact(std::size_t tokens, kvarn::basis key_basis, kvarn::basis value_basis, element_kind kind = element_kind::f32,
                   storage where = storage::dense, double gain = 1.0)
    {
        const auto channels = static_cast<std::size_t>(format_.key_channels()),
                   values = static_cast<std::size_t>(format_.head_dim_v());
        constexpr std::size_t heads = 3, head = 1;
        auto k = std::make_shared<strided_array>(kind, where, tokens, heads, channels,
                                                 gaussian_floats(random_, tokens * heads * channels, gain));
        auto v = std::make_shared<strided_array>(kind, where, tokens, heads, values,
                                                 gaussian_floats(random_, tokens * heads * values));
        add_exact(k->view<true>(), format_.has_values() ? v->view<true>() : kvarn::input_view{}, head, key_basis, value_basis,
                  k->dense(), v->dense(), heads);
        owned_.push_back(k);
        owned_.push_back(v);
    }

    void add_records(const std::vector<bytes>& records, record_storage where = record_storage::run)
    {
        for (const bytes& r : records) reference::append_record(shape_, r.data(), k_, v_);
        const std::size_t content = kvarn::layout_of(format_).content_bytes, each = kvarn::record_bytes(format_),
                          n = records.size();
        if (n == 0) return;
        if (where == record_storage::list) {
            auto list = std::make_shared<std::vector<const std::byte*>>();
            for (const bytes& r : records) {
                auto own = std::make_shared<bytes>(content + 1, std::uint8_t{0xff});  // ends with the record
                std::copy(r.begin(), r.end(), own->begin() + 1);
                list->push_back(as_bytes(own->data() + 1));
                owned_.push_back(own);
            }
            segments_.push_back(kvarn::listed_tiles(format_, *list));
            owned_.push_back(list);
        } else if (where == record_storage::table) {
            const std::size_t slots = 2 * n + 1, stride = content + (content % 2 == 0 ? 5 : 4);
            auto pool = std::make_shared<bytes>(slots * stride, std::uint8_t{0xff});
            auto table = std::make_shared<std::vector<std::int32_t>>();
            std::vector<std::int32_t> free(slots);
            for (std::size_t i = 0; i < slots; ++i) free[i] = static_cast<std::int32_t>(i);
            for (std::size_t i = 0; i < n; ++i) {
                const auto pick = random_.below(free.size());
                table->push_back(free[pick]);
                std::copy(records[i].begin(), records[i].end(), pool->begin() + static_cast<std::ptrdiff_t>(stride) * free[pick]);
                free.erase(free.begin() + static_cast<std::ptrdiff_t>(pick));
            }
            segments_.push_back(kvarn::paged_tiles(format_, as_bytes(pool->data()), static_cast<std::ptrdiff_t>(stride), *table));
            owned_.push_back(pool);
            owned_.push_back(table);
        } else {
            const std::size_t heads = where == record_storage::grid ? 3 : 1, head = where == record_storage::grid ? 1 : 0;
            const std::size_t odd = where == record_storage::grid ? 1 : 0;
            auto all = std::make_shared<bytes>(n * heads * each + odd, std::uint8_t{0xff});
            auto grid = kvarn::tile_major_records(format_, as_bytes(all->data()) + odd, all->size() - odd, n, heads);
            for (std::size_t i = 0; i < n; ++i) std::memcpy(grid.at(i, head), records[i].data(), content);
            segments_.push_back(kvarn::sealed_tiles(format_, grid, head));
            owned_.push_back(all);
        }
    }
    void add_tiles(std::size_t count, record_storage where = record_storage::run)
    {
        add_records(random_records(format_, count, random_.bits()), where);
    }

    /// Tokens [first, first + count) of these records.
    void add_part(const std::vector<bytes>& records, std::size_t first, std::size_t count,
                  record_storage where = record_storage::run)
    {
        const Eigen::Index before = k_.rows();
        add_records(records, where);
        if (records.empty()) return;
        segments_.back() = kvarn::token_range(format_, segments_.back(), first, count);
        for (reference::matrix* const m : {&k_, &v_}) {
            const reference::matrix part =
                m->middleRows(before + static_cast<Eigen::Index>(first), static_cast<Eigen::Index>(count));
            m->conservativeResize(before, Eigen::NoChange);
            reference::append_rows(*m, part);
        }
    }
    /// Cuts the last segment in two in front of its token `at`.
    void cut(std::size_t at)
    {
        const kvarn::kv_segment whole = segments_.back();
        segments_.back() = kvarn::first_tokens(format_, whole, at);
        segments_.push_back(kvarn::token_range(format_, whole, at, SIZE_MAX));
    }

    /// Puts the last segment at `position`, behind a gap.
    void move_last(std::int64_t position) { segments_.back() = kvarn::at_position(segments_.back(), position); }
    /// Of all tokens.
    [[nodiscard]] std::vector<std::int64_t> positions() const
    {
        std::vector<std::int64_t> all;
        for (const kvarn::kv_segment& s : segments_)
            for (std::size_t t = 0; t < s.tokens; ++t)
                all.push_back(t == 0 && s.position >= 0 ? s.position : all.empty() ? 0 : all.back() + 1);
        return all;
    }

    [[nodiscard]] const kvarn::format& format() const { return format_; }
    [[nodiscard]] std::span<const kvarn::kv_segment> segments() const { return segments_; }
    [[nodiscard]] const reference::matrix& k() const { return k_; }
    [[nodiscard]] const reference::matrix& v() const { return v_; }
    [[nodiscard]] std::size_t tokens() const { return static_cast<std::size_t>(k_.rows()); }

private:
    void add_exact(const kvarn::input_view& k, const kvarn::input_view& v, std::size_t head, kvarn::basis key_basis,
                   kvarn::basis value_basis, const std::vector<float>& all_keys, const std::vector<float>& all_values, std::size_t heads)
    {
        segments_.push_back(kvarn::exact_tokens(k, v, head, key_basis, value_basis));
        const auto one_head = [&](const std::vector<float>& all, int channels, int quantized, bool rotate, kvarn::basis stored) {
            const auto c = static_cast<std::ptrdiff_t>(channels);
            std::vector<float> own;
            for (std::size_t t = 0; t < k.tokens; ++t) {
                const auto first = all.begin() + static_cast<std::ptrdiff_t>(t * heads + head) * c;
                own.insert(own.end(), first, first + c);
            }
            const reference::matrix x = to_matrix(own, static_cast<std::size_t>(channels));
            return stored == kvarn::basis::rotated ? reference::in_original_basis(rotate, x, quantized) : x;
        };
        const reference::matrix keys = one_head(all_keys, format_.key_channels(), format_.head_dim_k(), format_.keys_rotated(), key_basis);
        reference::append_rows(k_, keys);
        if (format_.has_values())
            reference::append_rows(v_, one_head(all_values, format_.head_dim_v(), format_.head_dim_v(), format_.values_rotated(), value_basis));
        else
            reference::append_rows(v_, keys.leftCols(format_.head_dim_k()));
    }

    kvarn::format format_;
    reference::shape shape_;
    random_source random_;
    std::vector<kvarn::kv_segment> segments_;
    std::vector<std::shared_ptr<const void>> owned_;
    reference::matrix k_, v_;
};

/// The queries and options of one call. `q` is [m][r][channels of K] in options.query_basis.
struct attention_query {
    std::size_t tokens = 1, heads = 1;
    std::vector<float> q{};
    kvarn::attention_options options{};
    std::vector<float> sink_logits{}, alibi_slopes{};
    std::int64_t first_position = -1;
    std::vector<std::vector<bool>> mask{};  // [m][newest positions], or empty
    element_kind q_kind = element_kind::f32, out_kind = element_kind::f32;
    storage q_storage = storage::dense, out_storage = storage::dense;

    [[nodiscard]] std::size_t rows() const { return tokens * heads; }
};

inline attention_query random_query(const kvarn::format& f, std::size_t tokens, std::size_t heads, std::uint64_t seed,
                                    double gain = 1.0)
{
    random_source random(seed);
    attention_query x;
    x.tokens = tokens;
    x.heads = heads;
    x.q = gaussian_floats(random, tokens * heads * static_cast<std::size_t>(f.key_channels()), gain);
    return x;
}

inline std::string describe(const attention_query& x)
{
    const kvarn::attention_options& o = x.options;
    return "m " + std::to_string(x.tokens) + ", r " + std::to_string(x.heads) + ", precision " +
           std::to_string(static_cast<int>(o.precision)) + ", scale " + std::to_string(o.softmax_scale) + ", cap " +
           std::to_string(o.logit_soft_cap) + ", window " + std::to_string(o.window) + (o.causal ? "" : ", not causal") +
           (o.query_basis == kvarn::basis::rotated ? ", q rotated" : "") +
           (o.output_basis == kvarn::basis::rotated ? ", out rotated" : "") + (x.sink_logits.empty() ? "" : ", sink logits") + (x.alibi_slopes.empty() ? "" : ", ALiBi") +
           ", first " + std::to_string(x.first_position) + (x.mask.empty() ? "" : ", mask of " + std::to_string(x.mask[0].size()));
}

/// What a call of attend gave, dense.
struct attention_outcome {
    kvarn::status status = kvarn::status::ok;
    std::vector<float> out;
    std::vector<float> log_sum_exp;
    bool intact = false;  ///< nothing around out, lse and scratch was written
};

inline bool same_bits(const attention_outcome& a, const attention_outcome& b)
{
    return a.status == b.status && same_bits(a.out, b.out) && same_bits(a.log_sum_exp, b.log_sum_exp);
}

/// A task and the memory that it points to; the history's own memory stays where it is.
class attention_memory {
public:
    attention_memory(const kvarn::format& f, const attention_query& x)
        : q_(x.q_kind, x.q_storage, x.tokens, x.heads, static_cast<std::size_t>(f.key_channels()), x.q),
          out_(x.out_kind, x.out_storage, x.tokens, x.heads, output_channels(f)),
          log_sum_exp_(element_kind::f32, storage::dense, x.rows(), 1, 1), sink_logits_(x.sink_logits),
          alibi_slopes_(x.alibi_slopes), first_position_(x.first_position)
    {
        if (x.mask.empty()) return;
        // What is not spoken of is set: nobody may look there.
        mask_tokens_ = x.mask[0].size();
        mask_stride_ = (mask_tokens_ + 63) / 64 + 1;
        mask_.assign(x.tokens * mask_stride_, ~std::uint64_t{0});
        for (std::size_t m = 0; m < x.tokens; ++m)
            for (std::size_t t = 0; t < mask_tokens_; ++t)
                if (!x.mask[m][t]) mask_[m * mask_stride_ + t / 64] &= ~(std::uint64_t{1} << t % 64);
    }
    [[nodiscard]] kvarn::attention_task task(std::span<const kvarn::kv_segment> segments)
    {
        kvarn::attention_task t;
        t.history = segments;
        t.q = q_.view<true>();
        t.out = out_.view<false>();
        t.log_sum_exp = static_cast<float*>(log_sum_exp_.view<false>().data);
        t.sink_logits = sink_logits_.empty() ? nullptr : sink_logits_.data();
        t.alibi_slopes = alibi_slopes_.empty() ? nullptr : alibi_slopes_.data();
        t.first_position = first_position_;
        t.mask = mask_.empty() ? nullptr : mask_.data();
        t.mask_stride = mask_stride_;
        t.mask_tokens = mask_tokens_;
        return t;
    }
    [[nodiscard]] attention_outcome outcome(kvarn::status s, bool rest_intact) const
    {
        return {s, out_.dense(), log_sum_exp_.dense(), rest_intact && out_.intact() && log_sum_exp_.intact()};
    }
    [[nodiscard]] bool untouched() const { return out_.untouched() && log_sum_exp_.untouched(); }

private:
    strided_array q_, out_, log_sum_exp_;
    std::vector<float> sink_logits_, alibi_slopes_;
    std::int64_t first_position_;
    std::vector<std::uint64_t> mask_;
    std::size_t mask_stride_ = 0, mask_tokens_ = 0;
};

template <class Arch = kvarn::simd::native_arch>
attention_outcome attend(const kvarn::format& f, std::span<const kvarn::kv_segment> segments, const attention_query& x,
                         std::size_t misalignment = 1)
{
    attention_memory memory(f, x);
    guarded_bytes scratch(kvarn::attention_scratch_bytes(f, x.rows()), misalignment);  // 0xff: floats of all ones are NaN
    const kvarn::status s = kvarn::attend<Arch>(f, memory.task(segments), x.options, scratch.span());
    return memory.outcome(s, scratch.intact());
}

/// All tasks by items in random order, on `threads` threads (0: this one). Histories of another format than `f` say so in their tasks.
template <class Arch = kvarn::simd::native_arch>
std::vector<attention_outcome> attend_items(const kvarn::format& f, std::span<const kv_history> histories,
                                            const std::vector<attention_query>& queries, const kvarn::attention_options& options,
                                            std::size_t chunks_per_item, std::size_t threads, std::uint64_t seed)
{
    std::deque<attention_memory> memories;
    std::vector<kvarn::attention_task> tasks;
    std::size_t scratch_bytes = 0;
    for (std::size_t i = 0; i < queries.size(); ++i) {
        const kvarn::format& own = histories[i].format();
        memories.emplace_back(own, queries[i]);
        tasks.push_back(memories.back().task(histories[i].segments()));
        if (own != f) tasks.back().format = &own;
        scratch_bytes = std::max(scratch_bytes, kvarn::attention_scratch_bytes(own, queries[i].rows()));
    }
    std::vector<std::size_t> order(kvarn::attention_items(tasks, chunks_per_item));
    for (std::size_t i = 0; i < order.size(); ++i) order[i] = i;
    random_source random(seed);
    for (std::size_t i = order.size(); i > 1; --i) std::swap(order[i - 1], order[random.below(i)]);
    guarded_bytes workspace(kvarn::attention_workspace_bytes(f, tasks), 1 + seed % 63);
    const std::size_t workers = std::max<std::size_t>(threads, 1);
    std::vector<unsigned char> good(2 * workers, 1);
    const auto on_threads = [&](auto&& work) {
        if (threads == 0) return work(std::size_t{0});
        std::vector<std::thread> all;
        for (std::size_t t = 0; t < threads; ++t) all.emplace_back(work, t);
        for (std::thread& t : all) t.join();
    };
    on_threads([&](std::size_t worker) {
        guarded_bytes scratch(scratch_bytes);
        for (std::size_t i = worker; i < order.size(); i += workers)
            if (kvarn::attend_item<Arch>(f, tasks, options, order[i], chunks_per_item, workspace.span(), scratch.span()) !=
                kvarn::status::ok)
                good[worker] = 0;
        if (!scratch.intact()) good[worker] = 0;
    });
    on_threads([&](std::size_t worker) {
        guarded_bytes scratch(scratch_bytes);
        for (std::size_t i = worker; i < tasks.size(); i += workers)
            if (kvarn::combine_items<Arch>(f, tasks, options, i, workspace.span(), scratch.span()) != kvarn::status::ok)
                good[workers + worker] = 0;
        if (!scratch.intact()) good[workers + worker] = 0;
    });
    const bool fine = workspace.intact() && std::count(good.begin(), good.end(), 1) == static_cast<std::ptrdiff_t>(good.size());
    std::vector<attention_outcome> all;
    for (const auto& m : memories) all.push_back(m.outcome(fine ? kvarn::status::ok : kvarn::status::bad_argument, fine));
    return all;
}

inline reference::attention_result wanted(const kv_history& history, const attention_query& x)
{
    const kvarn::format& f = history.format();
    reference::attention_problem p;
    p.q = to_matrix(
        strided_array(x.q_kind, storage::dense, x.tokens, x.heads, static_cast<std::size_t>(f.key_channels()), x.q).dense(),
        static_cast<std::size_t>(f.key_channels()));
    if (x.options.query_basis == kvarn::basis::rotated) p.q = reference::in_original_basis(f.keys_rotated(), p.q, f.head_dim_k());
    p.k = history.k();
    p.v = history.v();
    p.query_heads = static_cast<int>(x.heads);
    p.positions = history.positions();
    const std::int64_t end = p.positions.empty() ? 0 : p.positions.back() + 1;
    p.first_position = x.first_position >= 0 ? x.first_position : end - static_cast<std::int64_t>(x.tokens);
    p.scale = x.options.softmax_scale != 0.0f ? static_cast<double>(x.options.softmax_scale)
                                              : 1.0 / std::sqrt(static_cast<double>(f.key_channels()));
    p.soft_cap = static_cast<double>(x.options.logit_soft_cap);
    p.window = x.options.window;
    p.causal = x.options.causal;
    p.mask = x.mask;
    const auto widened = [](const std::vector<float>& from) {
        reference::vector to(static_cast<Eigen::Index>(from.size()));
        for (std::size_t i = 0; i < from.size(); ++i) to(static_cast<Eigen::Index>(i)) = static_cast<double>(from[i]);
        return to;
    };
    p.sink_logits = widened(x.sink_logits);
    p.alibi_slopes = widened(x.alibi_slopes);
    reference::attention_result r = reference::attention(p);
    if (x.options.output_basis == kvarn::basis::rotated)
        r.out = reference::in_rotated_basis(f.values_rotated(), r.out, static_cast<int>(output_channels(f)));
    return r;
}

/// Relative L2 error of the output, and the largest error of the log-sum-exp; both infinite if a value is not what it must be.
struct attention_error {
    double out = 0.0, log_sum_exp = 0.0;
};

inline attention_error error_of(const attention_outcome& got, const reference::attention_result& r)
{
    attention_error e;
    constexpr double infinite = std::numeric_limits<double>::infinity();
    if (got.status != kvarn::status::ok || !got.intact) return {infinite, infinite};
    const reference::matrix out = to_matrix(got.out, static_cast<std::size_t>(r.out.cols()));
    e.out = out.allFinite() ? reference::relative_difference(out, r.out) : infinite;
    for (std::size_t i = 0; i < got.log_sum_exp.size(); ++i) {
        const double a = static_cast<double>(got.log_sum_exp[i]), b = r.log_sum_exp(static_cast<Eigen::Index>(i));
        const double difference = a == b ? 0.0 : std::fabs(a - b);
        e.log_sum_exp = std::max(e.log_sum_exp, std::isnan(difference) ? infinite : difference);
    }
    return e;
}

inline constexpr kvarn::precision all_precisions[] = {kvarn::precision::exact, kvarn::precision::fine, kvarn::precision::fast};

/// Bounds on Gaussian data with scores of standard deviation about 1. `fast` rounds queries to 8 bits: a score may be off by three times its
/// fast_bound, which where one token is seen is the whole error of the log-sum-exp.
inline double out_bound(kvarn::precision p)
{
    return p == kvarn::precision::exact ? 1e-5 : p == kvarn::precision::fine ? 1e-3 : 4e-2;
}
inline double log_sum_exp_bound(kvarn::precision p)
{
    return p == kvarn::precision::exact ? 1e-5 : p == kvarn::precision::fine ? 1e-3 : 6e-2;
}

}  // namespace support
