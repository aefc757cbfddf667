// SPDX-License-Identifier: Apache-2.0
// attend, and attend_item with combine_items. In: histories of exact tokens and of any bytes as records, whole or in part, with gaps;
// queries, masks, slopes, sink logits, options and buffers; formats by task. The kernels of this build and the portable ones agree bit for
// bit, and so do one call, work items in any order, and a task that spells out what another leaves out, as far as the documentation promises
// it; outputs are finite where records and tokens are; an error writes nothing.

#include <list>
#include <numeric>
#include <variant>

#include "shapes.hpp"

namespace {

using namespace fuzz;
using kvarn::status;

using any_array = std::variant<array<float>, array<kvarn::half>, array<kvarn::bfloat16>>;
using segments = std::vector<kvarn::kv_segment>;

// The layout by value: GCC 13 and 14 suspect the returned reference to be one into a temporary argument.
any_array& add_array(std::list<any_array>& to, element type, layout l, std::size_t misalignment)
{
    return with_element(type, [&]<class T>(T) -> any_array& { return to.emplace_back(std::in_place_type<array<T>>, l, misalignment); });
}

template <bool Const>
kvarn::any_view<Const> view_of(const any_array& x)
{
    return std::visit([](const auto& a) { return kvarn::any_view<Const>(a.view()); }, x);
}

struct attend_case {
    kvarn::format f;
    kvarn::attention_options options;
    scalars kind = scalars::plausible;
    bool moderate_tokens = true;  ///< scores of exact tokens are far from overflow
    bool negative_scales = false;
};

/// The memory of everything that tasks read.
struct history_memory {
    std::list<any_array> arrays;
    std::list<memory> records;
    std::list<std::vector<std::int32_t>> tables;
    std::list<std::vector<const std::byte*>> lists;
    std::list<std::vector<float>> logits;
    std::list<memory> masks;
    std::list<kvarn::format> formats;
    std::list<segments> histories;
};

/// Values must be finite.
void fill_finite(source& in, attend_case& c, const any_array& x)
{
    std::visit(
        [&](const auto& a) {
            fill(in, a);
            a.for_each([&](std::size_t, std::size_t, std::size_t, auto& e) {
                if (!std::isfinite(value_of(e))) e = {};
                if (!(std::fabs(value_of(e)) < 1e9f)) c.moderate_tokens = false;
            });
        },
        x);
}

void add_exact(source& in, attend_case& c, const kvarn::format& f, history_memory& m, segments& to)
{
    const std::size_t tokens = in.take() % 48, heads = 1 + in.take() % 3;
    const auto make = [&](std::size_t channels) -> const any_array& {
        const any_array& x = add_array(m.arrays, take_element(in), take_input(in, tokens, heads, channels), in.take() % 16);
        fill_finite(in, c, x);
        return x;
    };
    const any_array& k = make(static_cast<std::size_t>(f.key_channels()));
    const kvarn::input_view v = f.has_values() ? view_of<true>(make(static_cast<std::size_t>(f.head_dim_v()))) : kvarn::input_view{};
    const auto any_basis = [&] { return in.one_in(3) ? kvarn::basis::rotated : kvarn::basis::original; };
    const kvarn::basis key_basis = any_basis(), value_basis = any_basis();
    to.push_back(kvarn::exact_tokens(view_of<true>(k), v, in.take() % heads, key_basis, value_basis));
}

/// Records are few; a history may name one more than once.
void add_records(source& in, attend_case& c, const kvarn::format& f, history_memory& m, segments& to)
{
    const std::size_t content = kvarn::layout_of(f).content_bytes, own = 1 + in.take() % 3, gap = in.take() % 16;
    const std::size_t stride = content + gap;
    const bool small = f.group() == 32 && f.head_dim_k() <= 64 && f.head_dim_v() <= 64;
    const std::size_t count = small && in.one_in(8) ? 30 + in.take() % 16 : in.take() % 4;  // 32 records are one chunk
    const memory& records = m.records.emplace_back((own - 1) * stride + content, in.take() % 64, std::uint8_t{0xff});
    random_source numbers(in.take<std::uint32_t>());
    const kvarn::record_layout at = kvarn::layout_of(f);
    for (std::size_t i = 0; i < own; ++i) {
        std::byte* const record = records.data() + i * stride;
        fill_record(in, numbers, f, c.kind, record);
        for (std::size_t b = at.v_token_scale; b < at.v_token_zero; b += 2)
            if ((record[b + 1] & std::byte{0x80}) != std::byte{0}) c.negative_scales = true;
    }
    switch (in.take() % 3) {
    case 0: {
        const kvarn::record_grid<const std::byte> g{records.data(), records.size(), own, 1, stride, 0, content};
        to.push_back(kvarn::sealed_tiles(f, g, 0, in.take() % 2, in.flag() ? SIZE_MAX : count));
        break;
    }
    case 1: {
        auto& table = m.tables.emplace_back(count);
        for (std::int32_t& e : table) e = static_cast<std::int32_t>(in.take() % own);
        to.push_back(kvarn::paged_tiles(f, records.data(), static_cast<std::ptrdiff_t>(stride), table));
        break;
    }
    default: {
        auto& list = m.lists.emplace_back(count);
        for (const std::byte*& e : list) e = records.data() + in.take() % own * stride;
        to.push_back(kvarn::listed_tiles(f, list));
    }
    }
}

/// A part of a segment, and its position: behind a gap, or the one it has anyway. `behind` is where the segment before ends. False: no
/// history has it there.
bool take_part(source& in, const kvarn::format& f, kvarn::kv_segment& s, std::int64_t& behind)
{
    if (in.one_in(4)) {
        const std::size_t first = in.below(s.tokens + 1);
        s = kvarn::token_range(f, s, first, in.flag() ? SIZE_MAX : in.below(s.tokens + 1));
    }
    if (in.one_in(3)) {
        const std::int64_t gap = in.pick<std::int64_t>({1, 0, 31, 100, 1000, 1 << 24, std::int64_t{1} << 40, INT64_MAX / 8});
        s = kvarn::at_position(s, in.one_in(32) ? in.take<std::int64_t>() : behind + gap);
    }
    if (s.tokens == 0) return true;
    const std::int64_t begin = s.position == -1 ? behind : s.position, last = kvarn::detail::last_position;
    if (begin < behind || begin > last || static_cast<std::int64_t>(s.tokens) > last - begin) return false;
    behind = begin + static_cast<std::int64_t>(s.tokens);
    return true;
}

kvarn::attention_options take_options(source& in)
{
    kvarn::attention_options o;
    o.precision = in.pick({kvarn::precision::exact, kvarn::precision::fine, kvarn::precision::fast});
    o.causal = !in.one_in(3);
    o.query_basis = in.one_in(3) ? kvarn::basis::rotated : kvarn::basis::original;
    o.output_basis = in.one_in(3) ? kvarn::basis::rotated : kvarn::basis::original;
    if (in.one_in(3)) o.softmax_scale = in.pick({1.0f, 0.1f, 1e-20f, 100.0f, 1e30f});
    if (in.one_in(4)) o.logit_soft_cap = in.pick({1.0f, 50.0f, 0.01f, 1000.0f});
    if (in.one_in(4)) o.window = in.pick<std::int64_t>({1, 5, 33, 1000, INT64_MAX});
    if (in.one_in(3)) o.fast_bound = in.pick({std::numeric_limits<float>::infinity(), 0.0f, 0.3f, 0.003f, 1e-30f, 1e30f});
    if (in.one_in(64)) o.logit_soft_cap = special<float>(in);
    if (in.one_in(64)) o.softmax_scale = special<float>(in);
    if (in.one_in(64)) o.fast_bound = special<float>(in);
    if (in.one_in(128)) o.window = in.take<std::int64_t>();
    if (in.one_in(128)) o.precision = static_cast<kvarn::precision>(in.take());
    return o;
}

bool is_valid(const kvarn::attention_options& o)
{
    return o.precision <= kvarn::precision::fast && o.window >= 0 && o.softmax_scale >= 0 && o.softmax_scale <= 1e30f &&
           o.logit_soft_cap >= 0 && o.logit_soft_cap <= 1000.0f && o.fast_bound >= 0;
}

/// The question of one KV head, without a place for the answer.
struct question {
    kvarn::attention_task task;
    const kvarn::format* f = nullptr;
    element out_type = element::f32;
    layout out;
    bool log_sum_exp = true;
    bool finite = true;          ///< queries, sink logits and slopes
    bool valid = true;           ///< positions and the mask
    double largest_query = 0;
    std::size_t rows = 0;
    std::int64_t end = 0;        ///< of the history
};

/// `new_tokens` rows of `words` words that lie `stride` apart, and no word more.
std::uint64_t* add_mask(history_memory& m, std::size_t new_tokens, std::size_t words, std::size_t stride, std::size_t misalignment)
{
    const std::size_t all = new_tokens == 0 || words == 0 ? 0 : (new_tokens - 1) * stride + words;
    return reinterpret_cast<std::uint64_t*>(m.masks.emplace_back(all * 8, misalignment * 8, std::uint8_t{0}).bytes());
}

void take_mask(source& in, question& x, history_memory& m)
{
    const std::size_t new_tokens = x.task.q.tokens;
    kvarn::attention_task& t = x.task;
    t.mask_tokens = in.pick<std::size_t>({new_tokens, 1, 33, 63, 64, 65, 200, 1300});
    const std::size_t words = (t.mask_tokens + 63) / 64;
    t.mask_stride = words + in.take() % 3;
    std::uint64_t* const mask = add_mask(m, new_tokens, words, t.mask_stride, in.take() % 8);
    const unsigned kind = in.take() % 8;
    random_source numbers(in.take<std::uint16_t>());
    for (std::size_t i = 0; i < new_tokens; ++i)
        for (std::size_t w = 0; w < words; ++w) {  // bits behind mask_tokens say nothing
            std::uint64_t bits = numbers.bits();
            if (kind < 3) bits &= numbers.bits() & numbers.bits();
            if (kind == 3) bits |= ~numbers.bits();
            if (kind == 4) bits = ~std::uint64_t{0};
            if (kind == 5) bits = 0;
            if (kind == 6) bits = std::uint64_t{1} << bits % 64;
            mask[i * t.mask_stride + w] = bits;
        }
    t.mask = mask;
    if (in.one_in(64)) t.mask = nullptr;
    if (in.one_in(64)) t.mask_stride = words - 1;
    x.valid = x.valid && (t.mask_tokens == 0 || (t.mask != nullptr && t.mask_stride >= words));
}

question take_question(source& in, attend_case& c, history_memory& m)
{
    question x;
    x.f = in.one_in(4) ? &m.formats.emplace_back(take_format(in)) : &c.f;
    if (x.f != &c.f || in.one_in(4)) x.task.format = x.f;
    const kvarn::format& f = *x.f;
    segments& history = m.histories.emplace_back();
    for (unsigned n = in.pick({1u, 1u, 2u, 2u, 3u, 5u, 0u, 1u}); n > 0; --n) {
        if (in.flag()) add_records(in, c, f, m, history);
        else add_exact(in, c, f, m, history);
        if (!take_part(in, f, history.back(), x.end)) x.valid = false;
    }
    const std::size_t tokens = in.pick<std::size_t>({1, 1, 1, 2, 3, 5, 1, 0}), heads = in.pick<std::size_t>({1, 1, 2, 3, 4, 7, 8, 0});
    x.rows = tokens * heads;
    const any_array& q =
        add_array(m.arrays, take_element(in), take_input(in, tokens, heads, static_cast<std::size_t>(f.key_channels())), in.take() % 16);
    std::visit(
        [&](const auto& a) {
            fill(in, a);
            a.for_each([&](std::size_t, std::size_t, std::size_t, auto& e) {
                x.finite = x.finite && std::isfinite(value_of(e));
                x.largest_query = std::max(x.largest_query, std::fabs(static_cast<double>(value_of(e))));
            });
        },
        q);
    x.task.history = history;
    x.task.q = view_of<true>(q);
    if (in.one_in(4)) {
        auto& logits = m.logits.emplace_back(heads);
        for (float& l : logits) l = in.one_in(16) ? special<float>(in) : static_cast<float>(static_cast<std::int8_t>(in.take()));
        for (const float l : logits) x.finite = x.finite && l < 1e20f;
        x.task.sink_logits = logits.data();
    }
    if (in.one_in(4)) x.task.first_position = in.pick<std::int64_t>({0, 3, 40, 1100, INT64_MAX - 65536});
    if (in.one_in(3)) take_mask(in, x, m);
    if (in.one_in(4)) {
        auto& slopes = m.logits.emplace_back(heads);
        const float largest = in.pick({1.0f, 1.0f, 0.01f, -0.5f, 1e-20f, 1e18f});
        for (float& l : slopes) l = in.one_in(32) ? special<float>(in) : largest / static_cast<float>(1 << in.take() % 9);
        for (const float l : slopes) x.finite = x.finite && std::fabs(l) <= 1e18f;
        x.task.alibi_slopes = slopes.data();
    }
    x.log_sum_exp = !in.one_in(3);
    x.out_type = take_element(in);
    x.out = take_output(in, tokens, heads, static_cast<std::size_t>(f.has_values() ? f.head_dim_v() : f.head_dim_k()));
    return x;
}

/// The same question with every position said, the causal mask as one of bits, and slopes of zero where there are none.
question spelled_out(const attend_case& c, const question& x, history_memory& m)
{
    question y = x;
    segments& history = m.histories.emplace_back(x.task.history.begin(), x.task.history.end());
    std::int64_t behind = 0;
    for (kvarn::kv_segment& s : history) {
        if (s.tokens == 0) continue;
        if (s.position < 0) s = kvarn::at_position(s, behind);
        behind = s.position + static_cast<std::int64_t>(s.tokens);
    }
    y.task.history = history;
    const auto new_tokens = static_cast<std::int64_t>(x.task.q.tokens);
    const std::int64_t first = x.task.first_position >= 0 ? x.task.first_position : x.end - new_tokens;
    if (first >= 0) y.task.first_position = first;
    y.task.format = x.f;
    if (x.task.alibi_slopes == nullptr) y.task.alibi_slopes = m.logits.emplace_back(x.task.q.heads).data();
    if (x.task.mask_tokens != 0) return y;
    const std::size_t tokens = std::min<std::size_t>(static_cast<std::size_t>(x.end), 150), words = (tokens + 63) / 64;
    std::uint64_t* const mask = add_mask(m, x.task.q.tokens, words, words + 1, 0);
    for (std::int64_t i = 0; i < new_tokens; ++i)
        for (std::size_t t = 0; t < tokens; ++t) {
            const std::int64_t position = x.end - static_cast<std::int64_t>(tokens - t);
            if (!c.options.causal || position <= first + i) mask[static_cast<std::size_t>(i) * (words + 1) + t / 64] |= std::uint64_t{1} << t % 64;
        }
    y.task.mask = mask;
    y.task.mask_stride = words + 1;
    y.task.mask_tokens = tokens;
    return y;
}

/// A question with a place for its answer.
class answer {
public:
    answer(const question& x, std::size_t misalignment)
        : out_(add_array(storage_, x.out_type, x.out, misalignment)),
          log_sum_exp_(x.log_sum_exp ? x.rows * sizeof(float) : 0, misalignment * sizeof(float), 0xff), task_(x.task)
    {
        task_.out = view_of<false>(out_);
        if (x.log_sum_exp) task_.log_sum_exp = reinterpret_cast<float*>(log_sum_exp_.bytes());
    }

    [[nodiscard]] const kvarn::attention_task& task() const { return task_; }

    void require_written(bool written) const
    {
        std::visit([&](const auto& a) { a.require_written([&](std::size_t, std::size_t) { return written; }); }, out_);
        log_sum_exp_.require_intact();
        if (!written) require(log_sum_exp_.holds_only(0xff), "an error writes nothing");
    }

    template <class F>
    void for_each(F&& f) const
    {
        std::visit([&](const auto& a) { a.for_each([&](std::size_t, std::size_t, std::size_t, const auto& x) { f(value_of(x)); }); }, out_);
    }
    [[nodiscard]] std::span<const float> log_sum_exp() const
    {
        return {reinterpret_cast<const float*>(log_sum_exp_.bytes()), log_sum_exp_.size() / sizeof(float)};
    }

    void require_same(const answer& other, const char* property) const
    {
        std::vector<float> mine, theirs;
        for_each([&](float x) { mine.push_back(x); });
        other.for_each([&](float x) { theirs.push_back(x); });
        const auto a = log_sum_exp(), b = other.log_sum_exp();
        mine.insert(mine.end(), a.begin(), a.end());
        theirs.insert(theirs.end(), b.begin(), b.end());
        for (std::size_t i = 0; i < mine.size(); ++i)
            require(std::bit_cast<std::uint32_t>(mine[i]) == std::bit_cast<std::uint32_t>(theirs[i]) ||
                        (std::isnan(mine[i]) && std::isnan(theirs[i])),
                    property);
    }

private:
    std::list<any_array> storage_;
    any_array& out_;
    memory log_sum_exp_;
    kvarn::attention_task task_;
};

struct buffers {
    std::size_t less = 0, misalignment = 0;
    std::uint8_t fill = 0;
};

buffers take_buffers(source& in)
{
    return {in.one_in(128) ? 1u : 0u, in.take() % 64u, in.take()};
}

template <class Arch>
status run(const attend_case& c, const question& x, const answer& to, const buffers& b)
{
    const memory scratch(kvarn::attention_scratch_bytes(*x.f, x.rows) - b.less, b.misalignment, b.fill);
    const status s = kvarn::attend<Arch>(c.f, to.task(), c.options, scratch.span());
    scratch.require_intact();
    to.require_written(s == status::ok);
    return s;
}

/// All tasks in work items, in a random order. Only for tasks that attend accepts.
void run_items(source& in, const attend_case& c, const std::vector<question>& questions, const std::list<answer>& to)
{
    std::vector<kvarn::attention_task> tasks;
    std::size_t scratch_bytes = 0, rows = 0, tokens = 0, segments = 0;
    const kvarn::format* widest = &c.f;
    const auto width = [](const kvarn::format& f) { return f.has_values() ? f.head_dim_v() : f.head_dim_k(); };
    for (const answer& a : to) tasks.push_back(a.task());
    for (const question& x : questions) {
        scratch_bytes = std::max(scratch_bytes, kvarn::attention_scratch_bytes(*x.f, x.rows));
        std::size_t n = 0;
        for (const kvarn::kv_segment& s : x.task.history) n += s.tokens;
        rows = std::max(rows, x.rows);
        tokens = std::max(tokens, n);
        segments = std::max(segments, x.task.history.size());
        if (width(*x.f) > width(*widest)) widest = x.f;
    }
    const std::size_t each = 1 + in.take() % 4, items = kvarn::attention_items(tasks, each);
    const buffers b = take_buffers(in);
    const memory scratch(scratch_bytes, b.misalignment, b.fill);
    const std::size_t workspace_bytes = kvarn::attention_workspace_bytes(c.f, tasks);
    require(kvarn::attention_workspace_bound(*widest, tasks.size(), rows, tokens, segments) >= workspace_bytes, "the bound of the workspace holds");
    const memory workspace(workspace_bytes, (b.misalignment * 13 + 5) % 64, static_cast<std::uint8_t>(b.fill ^ 0xff));
    std::vector<std::size_t> order(items);
    std::iota(order.begin(), order.end(), std::size_t{0});
    random_source numbers(in.take<std::uint16_t>());
    for (std::size_t i = items; i > 1; --i) std::swap(order[i - 1], order[numbers.bits() % i]);
    for (const std::size_t item : order)
        require(kvarn::attend_item<kvarn::simd::native_arch>(c.f, tasks, c.options, item, each, workspace.span(), scratch.span()) == status::ok,
                "an item of a task that attend accepts is accepted");
    for (std::size_t t = 0; t < tasks.size(); ++t)
        require(kvarn::combine_items<kvarn::simd::native_arch>(c.f, tasks, c.options, t, workspace.span(), scratch.span()) == status::ok,
                "the items of a task that attend accepts can be combined");
    require(kvarn::attend_item<kvarn::simd::native_arch>(c.f, tasks, c.options, items, each, workspace.span(), scratch.span()) != status::ok,
            "there is no further item");
    scratch.require_intact();
    workspace.require_intact();
}

/// What the documentation says of status and values.
void require_promised(const attend_case& c, const question& x, const answer& a, status s, const buffers& b)
{
    const bool valid = is_valid(c.options) && x.valid && b.less == 0;
    if (!valid) require(s != status::ok || x.rows == 0, "what is not valid is refused");
    if (x.rows == 0) return;
    if (valid && !x.finite) require(s == status::not_finite, "queries that are not finite are refused");
    const double scale = c.options.softmax_scale != 0 ? static_cast<double>(c.options.softmax_scale) : 1.0;
    if (valid && x.finite && x.largest_query * scale < 1e19) require(s == status::ok, "a valid task is answered");
    if (s != status::ok || c.kind == scalars::any || !c.moderate_tokens) return;
    if (c.options.precision == kvarn::precision::fast && c.negative_scales) return;
    a.for_each([](float value) { require(std::isfinite(value), "outputs are finite"); });
    for (const float l : a.log_sum_exp()) require(std::isfinite(l) || l == -std::numeric_limits<float>::infinity(), "the log-sum-exp is a number");
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size)
{
    source in(data, size);
    attend_case c;
    c.f = take_format(in);
    c.options = take_options(in);
    c.kind = in.pick({scalars::plausible, scalars::plausible, scalars::finite, scalars::any});
    history_memory m;
    std::vector<question> questions;
    for (unsigned n = in.one_in(4) ? 2 : 1; n > 0; --n) questions.push_back(take_question(in, c, m));

    // Scalars that are not finite, negative scales with `fast`, and scores that overflow: what comes out is not promised to agree.
    const bool same = c.moderate_tokens && c.kind != scalars::any && !(c.options.precision == kvarn::precision::fast && c.negative_scales);
    std::list<answer> native;
    bool all_ok = true;
    for (const question& x : questions) {
        const answer& a = native.emplace_back(x, in.take() % 16);
        const answer portable(x, in.take() % 16);
        const buffers b = take_buffers(in), other = {b.less, in.take() % 64u, in.take()};
        const status s = run<kvarn::simd::native_arch>(c, x, a, b);
        require(s == run<kvarn::simd::portable>(c, x, portable, other), "both kernels return the same status");
        require_promised(c, x, a, s, b);
        if (s == status::ok && same) a.require_same(portable, "both kernels attend alike");
        all_ok = all_ok && s == status::ok;
        if (s != status::ok || !in.one_in(4)) continue;
        const question y = spelled_out(c, x, m);
        const answer spelled(y, in.take() % 16);
        require(run<kvarn::simd::native_arch>(c, y, spelled, other) == status::ok, "positions and masks may be spelled out");
        a.require_same(spelled, "positions and masks that are spelled out change nothing");
    }
    if (!all_ok || !in.flag()) return 0;
    std::list<answer> items;
    for (const question& x : questions) items.emplace_back(x, in.take() % 16);
    run_items(in, c, questions, items);
    auto whole = native.begin();
    for (const answer& a : items) {
        a.require_written(true);
        a.require_same(*whole++, "work items give what one call gives");
    }
    return 0;
}
