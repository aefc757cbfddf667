// SPDX-License-Identifier: Apache-2.0
// Scores, scales and histories at the edge of what the numbers can hold, and records made so that the integer sums come as close to
// their limits as the rounding of weights allows.

#include <cmath>
#include <cstdint>
#include <limits>
#include <string>
#include <vector>

#include "../catch.hpp"
#include "../support/attention.hpp"

namespace {

using kvarn::precision;
using support::attention_query;
using support::format_of;
using support::kv_history;

constexpr float infinity = std::numeric_limits<float>::infinity();

void write_halves(const reference::vector& v, std::uint8_t* to)
{
    for (Eigen::Index i = 0; i < v.size(); ++i) {
        const std::uint16_t bits = reference::half_bits(v(i));
        to[2 * i] = static_cast<std::uint8_t>(bits);
        to[2 * i + 1] = static_cast<std::uint8_t>(bits >> 8);
    }
}

/// A record of the given parts; `values` is ignored without a V part, the exact channels are zero.
support::bytes record_of(const kvarn::format& f, const reference::part& keys, const reference::part& values)
{
    const reference::field_offsets at = reference::offsets(support::shape_of(f));
    support::bytes record(at.end, 0);
    const auto put_codes = [&](const reference::part& p, std::size_t offset) {
        const auto packed = reference::packed_codes(p.codes, p.bits);
        std::copy(packed.begin(), packed.end(), record.begin() + static_cast<std::ptrdiff_t>(offset));
    };
    put_codes(keys, at.k_codes);
    write_halves(keys.scale0, &record[at.k_channel_scale]);
    write_halves(keys.zero0, &record[at.k_channel_zero]);
    write_halves(keys.scale1, &record[at.k_token_scale]);
    if (f.has_values()) {
        put_codes(values, at.v_codes);
        write_halves(values.scale1, &record[at.v_channel_scale]);
        write_halves(values.scale0, &record[at.v_token_scale]);
        write_halves(values.zero0, &record[at.v_token_zero]);
    }
    return record;
}

/// Codes of rows x columns, scales 1, zeros such that values lie around 0.
template <class Code>
reference::part part_of(int bits, int rows, int columns, Code&& code)
{
    reference::part p;
    p.bits = bits;
    p.codes.resize(rows, columns);
    for (int i = 0; i < rows; ++i)
        for (int j = 0; j < columns; ++j) p.codes(i, j) = code(i, j);
    p.scale0 = reference::vector::Ones(rows);
    p.zero0 = reference::vector::Constant(rows, -0.5 * ((1 << bits) - 1));
    p.scale1 = reference::vector::Ones(columns);
    return p;
}

constexpr const char* patterns[] = {"equal",      "negative",     "one huge", "alternating",
                                    "rounded up", "rounded down", "halves",   "random"};

/// `n` weights with magnitudes of 1 at most. "rounded up": all but one are a little above k + 1/2 steps of a sum that may reach `limit` steps.
std::vector<double> weights_of(const std::string& pattern, int n, double limit, support::random_source& random)
{
    std::vector<double> w(static_cast<std::size_t>(n));
    const double middle = std::floor(limit / n - 0.5) + 0.505, last = limit - (n - 1) * middle, lower = middle - 0.01,
                 lower_last = limit - (n - 1) * lower;
    const double largest = std::max(std::max(middle, std::fabs(last)), std::fabs(lower_last));
    for (int i = 0; i < n; ++i) {
        double& x = w[static_cast<std::size_t>(i)];
        if (pattern == "equal")
            x = 1.0;
        else if (pattern == "negative")
            x = -1.0;
        else if (pattern == "one huge")
            x = i == n / 3 ? 1.0 : 1e-4;
        else if (pattern == "alternating")
            x = i % 2 ? -1.0 : 1.0;
        else if (pattern == "rounded up")
            x = (i == n - 1 ? last : middle) / largest;
        else if (pattern == "rounded down")
            x = (i == n - 1 ? lower_last : lower) / largest;
        else if (pattern == "halves")
            x = i < n / 2 ? 1.0 : -1.0;
        else
            x = random.uniform(-1.0, 1.0);
    }
    return w;
}

/// What rounding to integers may take from the sum of w * code at most: half a step of every weight times the largest code. The largest
/// weight has `most` steps at most, and their sum `limit`.
double rounding_bound(const std::vector<double>& w, int levels, double most, double limit)
{
    double largest = 0.0, total = 0.0;
    for (const double each : w) {
        largest = std::max(largest, std::fabs(each));
        total += std::fabs(each);
    }
    return 0.5 * std::max(largest / most, total / limit) * static_cast<double>(w.size()) * levels;
}

/// The same for a sum of floats, one fused multiply-add after the other.
double float_bound(const std::vector<double>& w, int levels)
{
    double total = 0.0;
    for (const double each : w) total += std::fabs(each);
    return 0x1p-24 * static_cast<double>(w.size()) * total * levels;
}

double word_sum_limit(int bits, int n)
{
    return 2147483648.0 / kvarn::simd::word_limit(bits) - n;
}

/// One call on every instruction set: the same bits, and not a NaN.
support::attention_outcome attend_everywhere(const kvarn::format& f, std::span<const kvarn::kv_segment> segments,
                                             const attention_query& x)
{
    const auto first = support::attend<kvarn::simd::portable>(f, segments, x);
    CHECK(first.status == kvarn::status::ok);
    CHECK(first.intact);
    support::for_each_arch([&](auto arch) {
        INFO(kvarn::simd::arch_traits<decltype(arch)>::name);
        CHECK(support::same_bits(support::attend<decltype(arch)>(f, segments, x), first));
    });
    std::size_t not_finite = 0;
    for (const float each : first.out) not_finite += !std::isfinite(each);
    for (const float each : first.log_sum_exp) not_finite += std::isnan(each);
    CHECK(not_finite == 0);
    return first;
}

}  // namespace

TEST_CASE("attention/extreme: sums of keys as close to overflow as rounding allows", "[unit]")
{
    support::random_source random(1500);
    for (const int bits : {2, 3, 4, 5, 6, 8})
        for (const auto& size : {std::pair{576, 128}, std::pair{64, 256}, std::pair{128, 32}}) {
            const int dk = size.first, group = size.second;
            const kvarn::format f = format_of(dk, 32, bits, 4, group, false);
            const int levels = (1 << bits) - 1;
            // Of four tokens one has all codes largest, one has them where the weight is positive, one where it is negative, one at random.
            for (const char* pattern : patterns) {
                const auto w = weights_of(pattern, dk, word_sum_limit(bits, dk), random);
                double total = 0.0;
                for (const double each : w) total += std::fabs(each);
                kv_history history(f, 1501);
                const auto keys = part_of(bits, dk, group, [&](int d, int t) {
                    const bool positive = w[static_cast<std::size_t>(d)] > 0.0;
                    if (t % 4 == 3) return static_cast<int>(random.below(static_cast<std::size_t>(levels) + 1));
                    return t % 4 == 0 || (t % 4 == 1) == positive ? levels : 0;
                });
                const auto values = part_of(4, group, 32, [&](int, int) { return static_cast<int>(random.below(16)); });
                history.add_records({record_of(f, keys, values)});
                attention_query x;
                x.heads = 5;
                x.options.softmax_scale = 1.0f;
                for (std::size_t h = 0; h < x.heads; ++h)  // largest |score| 20; one head alone is served by other code than four
                    for (const double each : w)
                        x.q.push_back(static_cast<float>((h == 2 ? -1.0 : 1.0) * each * 40.0 / (total * levels)));
                const auto wanted = support::wanted(history, x);
                for (const precision p : support::all_precisions) {
                    x.options.precision = p;
                    INFO(support::describe(f) << ", " << pattern << ", precision " << static_cast<int>(p));
                    const auto error = support::error_of(attend_everywhere(f, history.segments(), x), wanted);
                    const double unit = 40.0 / (total * levels);  // a weight of 1 in the query
                    const bool bytes = p == precision::fast && (bits == 2 || bits == 4);
                    const double lost = p == precision::exact ? float_bound(w, levels)
                                        : bytes ? rounding_bound(w, levels, 127.0, 1e300)
                                                : rounding_bound(w, levels, 32767.0, word_sum_limit(bits, dk));
                    const double bound = 1e-5 + unit * lost;
                    CHECK(error.log_sum_exp < bound);
                    CHECK(error.out < 4.0 * bound);
                }
            }
        }
}

TEST_CASE("attention/extreme: sums of values as close to overflow as rounding allows", "[unit]")
{
    support::random_source random(1510);
    for (const int bits : {2, 3, 4, 5, 6, 8})
        for (const auto& size : {std::pair{576, 128}, std::pair{64, 256}, std::pair{80, 32}, std::pair{112, 64}}) {
            const int dv = size.first, group = size.second;
            const kvarn::format f = format_of(32, dv, 4, bits, group, false);
            const int levels = (1 << bits) - 1;
            for (const char* pattern : patterns)
                for (const precision p : support::all_precisions) {
                    const bool bytes = p == precision::fast && (bits == 2 || bits == 4);
                    const double limit = bytes ? 1e6 : word_sum_limit(bits, group);
                    auto w = weights_of(pattern, group, limit, random);
                    if (p != precision::exact)
                        for (double& each : w)
                            each = std::fabs(each);  // no record has negative scales of V, and rounding relies on it
                    kv_history history(f, 1511);
                    const auto keys = part_of(4, 32, group, [&](int, int) { return static_cast<int>(random.below(16)); });
                    // Columns: all largest; largest where the weight is positive, where it is negative; random.
                    auto values = part_of(bits, group, dv, [&](int t, int c) {
                        const bool positive = w[static_cast<std::size_t>(t)] > 0.0;
                        if (c % 4 == 3) return static_cast<int>(random.below(static_cast<std::size_t>(levels) + 1));
                        return c % 4 == 0 || (c % 4 == 1) == positive ? levels : 0;
                    });
                    for (int t = 0; t < group; ++t) {
                        values.scale0(t) = w[static_cast<std::size_t>(t)];
                        values.zero0(t) = -0.5 * levels * w[static_cast<std::size_t>(t)];
                    }
                    history.add_records({record_of(f, keys, values)});
                    attention_query x;
                    x.heads = 5;
                    x.q.assign(5 * 32, 0.0f);  // all tokens weigh the same
                    x.options.precision = p;
                    INFO(support::describe(f) << ", " << pattern << ", precision " << static_cast<int>(p));
                    const auto wanted = support::wanted(history, x);
                    const auto error = support::error_of(attend_everywhere(f, history.segments(), x), wanted);
                    const double column = p == precision::exact ? float_bound(w, levels)
                                                                : rounding_bound(w, levels, bytes ? 255.0 : 32767.0, limit);
                    CHECK(error.out <
                          1e-5 + column / group * std::sqrt(static_cast<double>(wanted.out.size())) / wanted.out.norm());
                    CHECK(error.log_sum_exp < 1e-5);
                }
        }
}

TEST_CASE("attention/extreme: every code largest in K and V, uneven attention", "[unit]")
{
    for (const int bits : {2, 3, 4, 5, 6, 8}) {
        for (const int value_bits : {bits, 0}) {
            const kvarn::format f = format_of(96, 96, bits, value_bits, 128, false);
            const auto largest = [&](int, int) { return (1 << bits) - 1; };
            auto keys = part_of(bits, 96, 128, largest);
            auto values = part_of(bits, 128, 96, largest);
            for (int t = 0; t < 128; ++t) keys.scale1(t) = 0.01 * t;
            for (int t = 0; t < 128; ++t) values.scale0(t) = 1.0 + t % 7, values.zero0(t) = t % 5;
            kv_history history(f, 1520);
            history.add_records({record_of(f, keys, values), record_of(f, keys, values)});
            attention_query x;
            x.heads = 4;
            x.options.softmax_scale = 1.0f;
            for (int i = 0; i < 4 * 96; ++i) x.q.push_back((i % 96 < 50 ? 1.0f : -0.5f) * 0.1f / static_cast<float>(1 << bits));
            for (const precision p : support::all_precisions) {
                x.options.precision = p;
                INFO(support::describe(f) << ", precision " << static_cast<int>(p));
                const auto error = support::error_of(attend_everywhere(f, history.segments(), x), support::wanted(history, x));
                CHECK(error.out < 2.0 * support::out_bound(p));
                CHECK(error.log_sum_exp < 2.0 * support::log_sum_exp_bound(p));
            }
        }
    }
}

TEST_CASE("attention/extreme: queries of 1e15 pick the token with the largest score", "[unit]")
{
    for (const kvarn::format& f : {format_of(64, 64, 4, 2, 32), format_of(128, 64, 8, 4, 64, true, 4),
                                   format_of(64, 64, 4, 0, 32), format_of(36, 36, 5, 6, 32)})
        for (const double gain : {1e6, 1e15, 3e19})
            for (const precision p : support::all_precisions) {
                kv_history history(f, 1530);
                history.add_exact(3);
                history.add_tiles(2);
                history.add_exact(9);
                attention_query x = support::random_query(f, 1, 4, 1532, gain);
                x.options.precision = p;
                INFO(support::describe(f) << ", gain " << gain << ", precision " << static_cast<int>(p));
                const auto got = attend_everywhere(f, history.segments(), x);
                const auto wanted = support::wanted(history, x);
                const auto error = support::error_of(got, wanted);
                CHECK(error.out < (p == precision::exact ? 1e-5 : 2e-4));
                for (std::size_t row = 0; row < 4; ++row) {
                    const double exact = wanted.log_sum_exp(static_cast<Eigen::Index>(row));
                    CHECK(std::fabs(static_cast<double>(got.log_sum_exp[row]) - exact) < 1e-3 * std::fabs(exact));
                }
            }
}

TEST_CASE("attention/extreme: the largest scales that a half holds", "[unit]")
{
    for (const int bits : {2, 3, 4, 8})
        for (const int value_bits : {bits, 0})
            for (const float gain : {1e-12f, 1.0f, 1e15f, 6e19f})
                for (const precision p : support::all_precisions) {
                    const kvarn::format f = format_of(576, 576, bits, value_bits, 32, false, 4);
                    support::random_source random(1540);
                    const auto any = [&](int, int) { return static_cast<int>(random.below(std::size_t{1} << bits)); };
                    auto keys = part_of(bits, 576, 32, any), values = part_of(bits, 32, 576, any);
                    for (reference::part* each : {&keys, &values}) {
                        each->scale0.setConstant(65504.0);
                        each->zero0.setConstant(-65504.0);
                        each->scale1.setConstant(65504.0);
                    }
                    kv_history history(f, 1541);
                    history.add_records({record_of(f, keys, values)});
                    attention_query x;
                    x.heads = 3;
                    x.options.precision = p;
                    for (std::size_t i = 0; i < 3 * 580; ++i)
                        x.q.push_back(gain * static_cast<float>(i % 3 == 0 ? 1.0 : random.uniform(-1.0, 1.0)));
                    INFO(support::describe(f) << ", gain " << gain << ", precision " << static_cast<int>(p));
                    const auto got = attend_everywhere(f, history.segments(), x);
                    // Whatever the weights, the result lies between the smallest and the largest value.
                    const double low = history.v().minCoeff(), high = history.v().maxCoeff(), slack = 0.01 * (high - low);
                    for (const float each : got.out) {
                        CHECK(static_cast<double>(each) >= low - slack);
                        CHECK(static_cast<double>(each) <= high + slack);
                    }
                    x.out_kind = support::element_kind::f16;  // saturates
                    const auto halves = support::attend(f, history.segments(), x);
                    for (const float each : halves.out) CHECK(std::fabs(each) <= 65504.0f);
                }
}

TEST_CASE("attention/extreme: exact tokens with the largest halves", "[unit]")
{
    const kvarn::format f = format_of(64, 64, 4, 2, 32);
    std::vector<float> k(20 * 64), v(20 * 64);
    support::random_source random(1545);
    for (float& each : k) each = random.below(2) ? 65504.0f : -65504.0f;
    for (float& each : v) each = random.below(2) ? 65504.0f : -65504.0f;
    const support::strided_array keys(support::element_kind::f16, support::storage::dense, 20, 1, 64, k);
    const support::strided_array values(support::element_kind::f16, support::storage::dense, 20, 1, 64, v);
    const kvarn::kv_segment s = kvarn::exact_tokens(keys.view<true>(), values.view<true>(), 0);
    for (const double gain : {1e-6, 1.0, 1e15, 1e19}) {
        auto x = support::random_query(f, 2, 2, 1546, gain);
        const auto got = attend_everywhere(f, {&s, 1}, x);
        for (const float each : got.out) CHECK(std::fabs(each) <= 65504.0f * 1.0001f);
    }
}

TEST_CASE("attention/extreme: equal scores give the mean", "[unit]")
{
    for (const kvarn::format& f : {format_of(64, 64, 4, 2, 128), format_of(40, 56, 8, 3, 32), format_of(64, 64, 4, 0, 64)}) {
        kv_history history(f, 1550);
        history.add_exact(3);
        history.add_tiles(3);
        history.add_exact(40);
        attention_query x = support::random_query(f, 1, 3, 1551, 0.0);
        for (const precision p : support::all_precisions) {
            x.options.precision = p;
            INFO(support::describe(f) << ", precision " << static_cast<int>(p));
            const auto got = attend_everywhere(f, history.segments(), x);
            reference::matrix mean(3, history.v().cols());
            for (Eigen::Index i = 0; i < 3; ++i) mean.row(i) = history.v().colwise().mean();
            CHECK(reference::relative_difference(support::to_matrix(got.out, static_cast<std::size_t>(mean.cols())), mean) <
                  2.0 * support::out_bound(p));
            for (const float each : got.log_sum_exp)
                CHECK(each == Approx(std::log(static_cast<double>(history.tokens()))).epsilon(1e-6));
        }
    }
}

TEST_CASE("attention/extreme: one token dominates", "[unit]")
{
    // All weights of a tile but one vanish, from every place in the history.
    const kvarn::format f = format_of(64, 64, 4, 4, 32, false);
    for (const int place : {0, 17, 31}) {
        support::random_source random(1560);
        const auto any = [&](int, int) { return static_cast<int>(random.below(16)); };
        auto keys = part_of(4, 64, 32, any);
        const auto values = part_of(4, 32, 64, any);
        keys.codes.col(place).setConstant(15);
        keys.scale1(place) = 10.0;
        kv_history history(f, 1561);
        history.add_exact(2);
        history.add_tiles(1);
        history.add_records({record_of(f, keys, values)});
        history.add_exact(2);
        attention_query x;
        x.heads = 2;
        for (int i = 0; i < 2 * 64; ++i) x.q.push_back(1.0f);
        for (const precision p : support::all_precisions) {
            x.options.precision = p;
            const auto got = attend_everywhere(f, history.segments(), x);
            CHECK(support::error_of(got, support::wanted(history, x)).out < 1e-4);
            const reference::matrix out = support::to_matrix(got.out, 64);
            CHECK(reference::relative_difference(out.row(1), history.v().row(2 + 32 + place)) < 1e-4);
        }
    }
}

TEST_CASE("attention/extreme: sink logits from nothing to everything", "[unit]")
{
    const kvarn::format f = format_of(64, 64, 4, 2, 32);
    kv_history history(f, 1570);
    history.add_exact(3);
    history.add_tiles(2);
    attention_query x = support::random_query(f, 1, 3, 1571);
    const auto without = attend_everywhere(f, history.segments(), x);
    x.sink_logits = {-infinity, -1e19f, -1000.0f};  // nothing, in words of three lengths
    const auto nothing = attend_everywhere(f, history.segments(), x);
    CHECK(support::same_bits(nothing.out, without.out));
    CHECK(support::same_bits(nothing.log_sum_exp, without.log_sum_exp));
    x.sink_logits = {1000.0f, 1e6f, 9e19f};  // everything
    const auto everything = attend_everywhere(f, history.segments(), x);
    for (const float each : everything.out) CHECK(std::fabs(each) < 1e-30f);
    for (std::size_t h = 0; h < 3; ++h)
        CHECK(everything.log_sum_exp[h] == Approx(static_cast<double>(x.sink_logits[h])).epsilon(1e-6));
    x.sink_logits = {2.0f, 5.0f, -infinity};
    x.options.precision = precision::exact;
    const auto error = support::error_of(attend_everywhere(f, history.segments(), x), support::wanted(history, x));
    CHECK(error.out < 1e-5);
    CHECK(error.log_sum_exp < 1e-5);
}

TEST_CASE("attention/extreme: a window that no token lies in", "[unit]")
{
    const kvarn::format f = format_of(64, 64, 4, 2, 32);
    kv_history history(f, 1580);
    history.add_exact(3);
    history.add_tiles(2);
    history.add_exact(5);
    attention_query x = support::random_query(f, 2, 3, 1581);
    x.options.window = 10;
    for (const std::int64_t first : {std::int64_t{81}, std::int64_t{1000}, std::int64_t{1} << 40, std::int64_t{1} << 62}) {
        x.first_position = first;
        for (const bool causal : {true, false}) {
            x.options.causal = causal;
            x.sink_logits = {};
            auto got = attend_everywhere(f, history.segments(), x);
            CHECK(got.out == std::vector<float>(6 * 64, 0.0f));
            CHECK(got.log_sum_exp == std::vector<float>(6, -infinity));
            x.sink_logits = {-2.0f, 0.0f, 3.0f};
            got = attend_everywhere(f, history.segments(), x);
            CHECK(got.out == std::vector<float>(6 * 64, 0.0f));
            for (std::size_t i = 0; i < 6; ++i)
                CHECK(got.log_sum_exp[i] == Approx(static_cast<double>(x.sink_logits[i % 3])).margin(1e-6));
        }
    }
    // The last token of the window's far end, alone.
    x.sink_logits = {};
    x.first_position = 80;
    const auto wanted = support::wanted(history, x);
    x.options.precision = precision::exact;
    CHECK(support::error_of(attend_everywhere(f, history.segments(), x), wanted).out < 1e-5);
    // More new tokens than history: the first ones see nothing.
    kv_history two(f, 1582);
    two.add_exact(2);
    attention_query y = support::random_query(f, 5, 1, 1583);
    y.options.precision = precision::exact;
    const auto got = attend_everywhere(f, two.segments(), y);
    CHECK(std::vector<float>(got.log_sum_exp.begin(), got.log_sum_exp.begin() + 3) == std::vector<float>(3, -infinity));
    CHECK(support::error_of(got, support::wanted(two, y)).out < 1e-5);
}

TEST_CASE("attention/extreme: all scores far below zero", "[unit]")
{
    const kvarn::format f = format_of(64, 64, 4, 2, 32, false);
    const auto ones = part_of(4, 64, 32, [](int, int) { return 15; });
    const auto values = part_of(2, 32, 64, [](int t, int c) { return (t + c) % 4; });
    kv_history history(f, 1590);
    history.add_records({record_of(f, ones, values)});
    for (const float gain : {1.0f, 1e10f, 1e18f}) {
        attention_query x;
        x.q.assign(64, -gain);
        const auto got = attend_everywhere(f, history.segments(), x);  // equal scores all the same
        const reference::matrix mean = history.v().colwise().mean();
        CHECK((support::to_matrix(got.out, 64) - mean).cwiseAbs().maxCoeff() < 1e-4);
        CHECK(got.log_sum_exp[0] == Approx(support::wanted(history, x).log_sum_exp(0)).epsilon(1e-5));
    }
}

TEST_CASE("attention/extreme: a record of zeros, and one of the smallest halves", "[unit]")
{
    for (const int value_bits : {4, 0})
        for (const double scale : {0.0, 0x1p-24}) {
            const kvarn::format f = format_of(64, 64, 4, value_bits, 32);
            support::random_source random(1595);
            const auto any = [&](int, int) { return static_cast<int>(random.below(16)); };
            auto keys = part_of(4, 64, 32, any), values = part_of(4, 32, 64, any);
            for (reference::part* each : {&keys, &values}) {
                each->scale0.setConstant(scale);
                each->zero0.setConstant(-7.0 * scale);
                each->scale1.setConstant(scale == 0.0 ? 0.0 : 1.0);
            }
            kv_history history(f, 1596);
            history.add_records({record_of(f, keys, values)});
            attention_query x = support::random_query(f, 1, 3, 1597);
            for (const precision p : support::all_precisions) {
                x.options.precision = p;
                const auto got = attend_everywhere(f, history.segments(), x);
                INFO(support::describe(f) << ", scale " << scale << ", precision " << static_cast<int>(p));
                CHECK(support::error_of(got, support::wanted(history, x)).out < 2.0 * support::out_bound(p));
                for (const float each : got.log_sum_exp) CHECK(each == Approx(std::log(32.0)).epsilon(1e-5));
            }
        }
}

// Weights have no bound then; UndefinedBehaviorSanitizer watches the sums.
TEST_CASE("attention/extreme: a scale that is NaN costs the outputs, nothing else", "[unit]")
{
    const kvarn::format f = format_of(576, 64, 8, 2, 32, false);
    const auto keys = part_of(8, 576, 32, [](int, int) { return 255; });
    const auto values = part_of(2, 32, 64, [](int t, int c) { return (t + c) % 4; });
    support::bytes record = record_of(f, keys, values);
    const std::size_t scale = kvarn::layout_of(f).k_channel_scale + 2 * 300;
    record[scale] = 0x00;
    record[scale + 1] = 0x7e;
    const std::byte* const list[] = {support::as_bytes(record.data())};
    const kvarn::kv_segment history[] = {kvarn::listed_tiles(f, list)};
    for (int i = 0; i < 16; ++i) {
        attention_query x;
        x.q.assign(576, 1.0f + 0.06f * static_cast<float>(i));
        for (const precision p : support::all_precisions) {
            x.options.precision = p;
            support::for_each_arch([&](auto arch) {
                const auto got = support::attend<decltype(arch)>(f, history, x);
                CHECK((got.status == kvarn::status::ok && got.intact));
            });
        }
    }
}
