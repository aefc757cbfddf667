// SPDX-License-Identifier: Apache-2.0
// attend() against attention in double precision over the same records: every format, option, shape, history, storage and element type.

#include <cstdint>
#include <limits>
#include <string>
#include <vector>

#include "../catch.hpp"
#include "../support/attention.hpp"

namespace {

using kvarn::basis;
using kvarn::precision;
using support::attention_query;
using support::format_of;
using support::kv_history;
using support::record_storage;

constexpr float infinity = std::numeric_limits<float>::infinity();

/// Each width on either side, each group, head_dim with and without constant loops, odd ones, and values read from K.
std::vector<kvarn::format> all_formats()
{
    return {
        format_of(64, 64, 2, 3, 32),
        format_of(64, 64, 3, 2, 64),
        format_of(80, 80, 4, 4, 64),
        format_of(96, 96, 5, 6, 128),
        format_of(112, 112, 6, 5, 32),
        format_of(128, 128, 4, 2, 128),
        format_of(128, 128, 8, 4, 128),
        format_of(128, 128, 2, 8, 256),
        format_of(256, 256, 3, 4, 64),
        format_of(512, 512, 5, 2, 32),
        format_of(576, 576, 6, 3, 32),
        format_of(576, 128, 2, 4, 256),
        format_of(64, 128, 4, 4, 64),
        format_of(128, 64, 8, 6, 32),
        format_of(192, 128, 4, 2, 128, true, 64),
        format_of(36, 36, 3, 4, 32),
        format_of(40, 40, 4, 8, 64),
        format_of(56, 56, 2, 2, 128),
        format_of(36, 80, 8, 2, 128),
        format_of(64, 36, 5, 5, 32),
        format_of(44, 52, 4, 4, 32, false),
        format_of(128, 128, 4, 2, 128, false),
        format_of(100, 64, 6, 8, 256, false, 12),
        format_of(128, 96, 3, 2, 64, false, 4),
        format_of(64, 64, 4, 2, 64, {false, true}),
        format_of(100, 80, 3, 4, 32, {false, true}, 4),
        format_of(128, 128, 2, 4, 128, {true, false}),
        format_of(80, 44, 5, 3, 32, {true, false}, 8),
        format_of(512, 512, 4, 0, 64, true, 64),
        format_of(512, 512, 8, 0, 32, true, 64),
        format_of(64, 64, 2, 0, 256),
        format_of(36, 36, 3, 0, 32, true, 4),
        format_of(128, 128, 5, 0, 128, false, 8),
        format_of(96, 96, 6, 0, 64, false),
    };
}

void check(const kv_history& history, const attention_query& x, double slack = 1.0)
{
    const auto got = support::attend(history.format(), history.segments(), x);
    const auto error = support::error_of(got, support::wanted(history, x));
    INFO(support::describe(history.format()) << "; " << support::describe(x));
    CHECK(got.status == kvarn::status::ok);
    CHECK(error.out < slack * support::out_bound(x.options.precision));
    CHECK(error.log_sum_exp < slack * support::log_sum_exp_bound(x.options.precision));
}

}  // namespace

TEST_CASE("attention: every format agrees with the definition", "[unit]")
{
    std::uint64_t seed = 700;
    for (const kvarn::format& f : all_formats()) {
        kv_history history(f, seed++);
        history.add_exact(4);
        history.add_tiles(f.group() >= 128 ? 2 : 3, support::all_record_storages[seed % 4]);
        history.add_exact(37, seed % 2 ? basis::original : basis::rotated);
        attention_query x = support::random_query(f, 1 + seed % 2, 3 + seed % 3, seed);
        for (const precision p : support::all_precisions) {
            x.options.precision = p;
            check(history, x);
        }
    }
}

TEST_CASE("attention: every format, records alone", "[unit]")
{
    std::uint64_t seed = 760;
    for (const kvarn::format& f : all_formats()) {
        kv_history history(f, seed++);
        history.add_tiles(2, support::all_record_storages[seed % 4]);
        for (const std::size_t heads : {1u, 2u, 4u}) {
            attention_query x = support::random_query(f, 1, heads, seed);
            for (const precision p : support::all_precisions) {
                x.options.precision = p;
                check(history, x);
            }
        }
    }
}

TEST_CASE("attention: all options in all combinations", "[unit]")
{
    const kvarn::format formats[] = {format_of(64, 96, 4, 2, 32, true, 4), format_of(36, 36, 5, 0, 32),
                                     format_of(48, 64, 3, 4, 32, false)};
    std::uint64_t seed = 800;
    for (const kvarn::format& f : formats) {
        kv_history history(f, seed++);
        history.add_exact(3, basis::rotated);
        history.add_tiles(2);
        history.add_exact(13, basis::original);
        attention_query x = support::random_query(f, 3, 2, seed++);
        const std::vector<float> sinks[] = {{}, {0.5f, -infinity}};
        for (const float scale : {0.0f, 0.2f})
            for (const float cap : {0.0f, 3.0f})
                for (const std::int64_t window : {0, 1, 7, 60, 1000})
                    for (const bool causal : {true, false})
                        for (const auto& sink : sinks)
                            for (const std::int64_t first : {-1, 0, 40, 79, 500})
                                for (int bases = 0; bases < 4; ++bases) {
                                    x.options.softmax_scale = scale;
                                    x.options.logit_soft_cap = cap;
                                    x.options.window = window;
                                    x.options.causal = causal;
                                    x.options.query_basis = bases & 1 ? basis::rotated : basis::original;
                                    x.options.output_basis = bases & 2 ? basis::rotated : basis::original;
                                    x.sink_logits = sink;
                                    x.first_position = first;
                                    for (const precision p : support::all_precisions) {
                                        x.options.precision = p;
                                        check(history, x);
                                    }
                                }
    }
}

TEST_CASE("attention: the soft-caps of real models keep the precision", "[unit]")
{
    const kvarn::format f = format_of(128, 128, 4, 2, 64);
    kv_history history(f, 830);
    history.add_exact(5);
    history.add_tiles(3);
    history.add_exact(20);
    for (const float cap : {5.0f, 30.0f, 50.0f})
        for (const double gain : {1.0, 4.0}) {
            attention_query x = support::random_query(f, 2, 4, 831, gain);
            x.options.logit_soft_cap = cap;
            for (const precision p : support::all_precisions) {
                x.options.precision = p;
                check(history, x, 2.0 * gain);
            }
        }
}

TEST_CASE("attention: query rows times histories times ways to store records", "[unit]")
{
    const kvarn::format formats[] = {format_of(64, 64, 4, 2, 32), format_of(56, 40, 3, 5, 32, true, 4),
                                     format_of(64, 64, 4, 0, 32, false)};
    const std::size_t shapes[][2] = {{1, 1}, {1, 3}, {1, 4}, {2, 4}, {8, 2}, {3, 5}};
    struct history_kind {
        const char* name;
        std::size_t sink, tiles, tail;
    };
    const history_kind kinds[] = {
        {"empty", 0, 0, 0},  {"one token", 0, 0, 1},         {"sink", 5, 0, 0}, {"tail", 0, 0, 70}, {"one tile", 0, 1, 0},
        {"tiles", 0, 35, 0}, {"sink, tiles, tail", 4, 5, 33}};
    std::uint64_t seed = 840;
    for (const kvarn::format& f : formats)
        for (const history_kind& kind : kinds)
            for (const auto& shape : shapes) {
                INFO(kind.name);
                const auto x = support::random_query(f, shape[0], shape[1], seed + 1);
                const auto records = support::random_records(f, kind.tiles, seed);
                support::attention_outcome first;
                for (const record_storage where : support::all_record_storages) {
                    kv_history history(f, seed);
                    if (kind.sink != 0) history.add_exact(kind.sink, basis::rotated);
                    history.add_records(records, where);
                    if (kind.tail != 0) history.add_exact(kind.tail);
                    const auto got = support::attend(f, history.segments(), x);
                    if (where == record_storage::run) {
                        check(history, x);
                        first = got;
                    } else if (kind.tail == 0 && kind.sink == 0) {
                        CHECK(support::same_bits(got, first));  // the same values, another place
                    } else {
                        check(history, x);  // the source of random numbers has moved on
                    }
                }
                seed += 2;
            }
}

TEST_CASE("attention: an empty history gives zeros, or the sink logit", "[unit]")
{
    const kvarn::format f = format_of(64, 64, 4, 2, 32);
    for (const bool with_empty_segments : {false, true}) {
        kv_history history(f, 860);
        if (with_empty_segments) {
            history.add_exact(0);
            history.add_exact(0, basis::rotated);
        }
        attention_query x = support::random_query(f, 2, 2, 861);
        auto got = support::attend(f, history.segments(), x);
        REQUIRE(got.status == kvarn::status::ok);
        CHECK(got.out == std::vector<float>(4 * 64, 0.0f));
        CHECK(got.log_sum_exp == std::vector<float>(4, -infinity));
        x.sink_logits = {1.5f, -infinity};
        got = support::attend(f, history.segments(), x);
        CHECK(got.out == std::vector<float>(4 * 64, 0.0f));
        for (const std::size_t row : {0u, 2u}) CHECK(got.log_sum_exp[row] == Approx(1.5).epsilon(1e-6));
        for (const std::size_t row : {1u, 3u}) CHECK(got.log_sum_exp[row] == -infinity);
    }
}

TEST_CASE("attention: a single visible token is returned as it is", "[unit]")
{
    const kvarn::format f = format_of(64, 64, 4, 4, 32);
    kv_history history(f, 865);
    history.add_tiles(2);
    attention_query x = support::random_query(f, 1, 2, 866);
    x.options.window = 1;
    for (std::int64_t position = 0; position < 64; position += 9) {
        x.first_position = position;
        for (const precision p : support::all_precisions) {
            x.options.precision = p;
            const auto got = support::attend(f, history.segments(), x);
            const reference::matrix out = support::to_matrix(got.out, 64);
            for (Eigen::Index row = 0; row < 2; ++row)
                CHECK(reference::relative_difference(out.row(row), history.v().row(position)) <
                      (p == precision::exact ? 1e-6 : 1e-4));
        }
    }
}

TEST_CASE("attention: element types and strides of the queries and of exact tokens", "[unit]")
{
    // With values that all three types hold, nothing but the numbers may matter; each combination agrees with the definition as well.
    std::uint64_t seed = 870;
    for (const kvarn::format& f :
         {format_of(64, 64, 4, 2, 32, true, 4), format_of(36, 40, 3, 4, 32, false), format_of(44, 44, 5, 0, 32, false, 8),
          format_of(64, 80, 2, 2, 32, {false, true}), format_of(64, 44, 2, 2, 32, {true, false})})
        for (const support::element_kind kind : support::all_element_kinds)
            for (const support::storage where : support::all_storages) {
                kv_history history(f, seed);
                history.add_exact(6, f.keys_rotated() ? basis::rotated : basis::original, kind, where);
                history.add_tiles(1);
                history.add_exact(35, basis::original, kind, where);
                attention_query x = support::random_query(f, 3, 2, seed + 1);
                for (float& each : x.q)
                    each =
                        static_cast<float>(reference::round_to_half(reference::bfloat16_value(reference::bfloat16_bits(each))));
                const auto plain = support::attend(f, history.segments(), x);
                x.q_kind = kind;
                x.q_storage = where;
                INFO("element kind " << static_cast<int>(kind) << ", storage " << static_cast<int>(where));
                CHECK(support::same_bits(support::attend(f, history.segments(), x), plain));
                x.options.precision = precision::exact;
                check(history, x);
                ++seed;
            }
}

TEST_CASE("attention: exact tokens whose K and V have bases of their own", "[unit]")
{
    std::uint64_t seed = 1400;
    for (const reference::rotations rotate : {reference::rotations{true, true}, {false, true}, {true, false}, {false, false}})
        for (const int value_bits : {4, 0}) {
            if (value_bits == 0 && rotate.k != rotate.v) continue;
            const kvarn::format f = format_of(64, value_bits == 0 ? 64 : 80, 3, value_bits, 32, rotate, 4);
            for (const basis keys : {basis::original, basis::rotated})
                for (const basis values : {basis::original, basis::rotated}) {
                    kv_history history(f, ++seed);
                    history.add_exact(11, keys, values);
                    history.add_tiles(1);
                    history.add_exact(40, values, keys, support::element_kind::f16);
                    for (const basis query : {basis::original, basis::rotated})
                        for (const basis output : {basis::original, basis::rotated}) {
                            attention_query x = support::random_query(f, 2, 3, seed + 50);
                            x.options.precision = precision::exact;
                            x.options.query_basis = query;
                            x.options.output_basis = output;
                            check(history, x);
                        }
                }
        }
    // One basis for both, and V's basis without a V of its own.
    const support::strided_array x(support::element_kind::f32, support::storage::dense, 3, 1, 64, std::vector<float>(3 * 64, 1.0f));
    for (const basis stored : {basis::original, basis::rotated}) {
        const kvarn::kv_segment s = kvarn::exact_tokens(x.view<true>(), x.view<true>(), 0, stored);
        CHECK(s.key_basis == stored);
        CHECK(s.value_basis == stored);
        const kvarn::kv_segment t = kvarn::exact_tokens(x.view<true>(), x.view<true>(), 0, stored, basis::rotated);
        CHECK(t.key_basis == stored);
        CHECK(t.value_basis == basis::rotated);
    }
    const kvarn::format latent = format_of(64, 64, 4, 0, 32);
    const auto q = support::random_query(latent, 1, 2, seed);
    const kvarn::kv_segment either[] = {kvarn::exact_tokens(x.view<true>(), {}, 0, basis::original, basis::original),
                                        kvarn::exact_tokens(x.view<true>(), {}, 0, basis::original, basis::rotated)};
    CHECK(support::same_bits(support::attend(latent, {&either[0], 1}, q), support::attend(latent, {&either[1], 1}, q)));
    static_assert(kvarn::exact_tokens({}, {}, 0).value_basis == basis::original);
}

TEST_CASE("attention: outputs of other types and strides are the float output, rounded once", "[unit]")
{
    for (const kvarn::format& f :
         {format_of(64, 64, 4, 2, 32), format_of(36, 44, 3, 4, 32, false), format_of(128, 128, 8, 0, 32)}) {
        kv_history history(f, 900);
        history.add_tiles(2);
        history.add_exact(5);
        attention_query x = support::random_query(f, 2, 3, 901);
        const auto plain = support::attend(f, history.segments(), x);
        for (const support::element_kind kind : support::all_element_kinds)
            for (const support::storage where : support::all_storages) {
                x.out_kind = kind;
                x.out_storage = where;
                const auto got = support::attend(f, history.segments(), x);
                const auto rounded =
                    support::strided_array(kind, support::storage::dense, 2, 3, support::output_channels(f), plain.out).dense();
                INFO("element kind " << static_cast<int>(kind) << ", storage " << static_cast<int>(where));
                CHECK(got.intact);
                CHECK(support::same_bits(got.out, rounded));
                CHECK(support::same_bits(got.log_sum_exp, plain.log_sum_exp));
            }
    }
}

TEST_CASE("attention: scratch at any address", "[unit]")
{
    for (const kvarn::format& f : {format_of(64, 96, 4, 2, 64), format_of(36, 36, 6, 0, 32, true, 4)}) {
        kv_history history(f, 910);
        history.add_exact(3);
        history.add_tiles(2, record_storage::list);
        history.add_exact(9);
        const auto x = support::random_query(f, 3, 5, 911);
        const auto first = support::attend(f, history.segments(), x, 0);
        CHECK(first.intact);
        for (std::size_t misalignment = 1; misalignment <= 64; ++misalignment) {
            const auto got = support::attend(f, history.segments(), x, misalignment);
            CHECK(got.intact);
            CHECK(support::same_bits(got, first));
        }
    }
}

TEST_CASE("attention: as many query rows as are allowed", "[unit]")
{
    const kvarn::format f = format_of(36, 36, 4, 4, 32);
    kv_history history(f, 920);
    history.add_tiles(1);
    history.add_exact(20);
    for (const std::size_t heads : {std::size_t{1}, std::size_t{16}, kvarn::max_query_rows}) {
        auto x = support::random_query(f, kvarn::max_query_rows / heads, heads, 921);
        x.first_position = 50;
        check(history, x);
    }
}

TEST_CASE("attention: the log-sum-exp may be left out", "[unit]")
{
    const kvarn::format f = format_of(64, 64, 4, 2, 32);
    kv_history history(f, 930);
    history.add_tiles(1);
    const auto x = support::random_query(f, 1, 4, 931);
    support::attention_memory memory(f, x);
    auto task = memory.task(history.segments());
    task.log_sum_exp = nullptr;
    support::guarded_bytes scratch(kvarn::attention_scratch_bytes(f, 4));
    REQUIRE(kvarn::attend(f, task, x.options, scratch.span()) == kvarn::status::ok);
    const auto got = memory.outcome(kvarn::status::ok, scratch.intact());
    CHECK(got.intact);
    CHECK(support::same_bits(got.out, support::attend(f, history.segments(), x).out));
}
