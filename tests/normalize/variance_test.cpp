// SPDX-License-Identifier: Apache-2.0
// The scales of the record against the double-precision reference. (c * s0, s1 / c) is the same normalisation, so products
// of a channel's and a token's scale are compared, never the fields alone.

#include <cmath>
#include <cstdint>
#include <vector>

#include "../catch.hpp"
#include "../support/compare.hpp"

namespace {

/// Largest relative difference between products scale0[i] * scale1[j] of two parts.
double worst_product(const reference::part& got, const reference::part& wanted)
{
    double worst = 0.0;
    for (Eigen::Index i = 0; i < wanted.scale0.size(); ++i)
        for (Eigen::Index j = 0; j < wanted.scale1.size(); ++j) {
            const double want = wanted.scale0(i) * wanted.scale1(j);
            worst = std::max(worst, std::fabs(got.scale0(i) * got.scale1(j) - want) / want);
        }
    return worst;
}

kvarn::format_spec unrotated(int head_dim, int bits, int group)
{
    kvarn::format_spec spec;
    spec.head_dim_k = spec.head_dim_v = head_dim;
    spec.key_bits = spec.value_bits = bits;
    spec.group = group;
    spec.key_rotation = spec.value_rotation = kvarn::rotation::none;
    return spec;
}

}  // namespace

TEST_CASE("normalize/variance: the reference leaves unit deviations along both axes", "[unit]")
{
    support::random_source random(31);
    const std::vector<float> x = support::random_tile(random, 128, 96, support::tile_kind::channel_outliers);
    const reference::matrix m = 8.0 * support::tile_matrix(x, 0, 0, 1, 128, 96, 0, 96);  // away from the lower clamp
    const reference::normalized_tile n = reference::normalize(m, 8, 8);
    CHECK((reference::row_deviation(n.m).array() - 1.0).abs().maxCoeff() < 0.02);
    CHECK((reference::column_deviation(n.m).array() - 1.0).abs().maxCoeff() < 0.02);
    CHECK((n.s0.asDiagonal() * n.m * n.s1.asDiagonal() - m).cwiseAbs().maxCoeff() < 1e-9);
    CHECK(reference::imbalance(n.m) < reference::imbalance(m));
    CHECK(n.kept > 0);
}

TEST_CASE("normalize/variance: products of scales are the reference's to half precision", "[unit]")
{
    support::random_source random(32);
    for (const auto kind : support::all_tile_kinds)
        for (const int head_dim : {36, 64, 80, 128, 192})
            for (const int group : {32, 64, 256})
                for (const bool rotate : {false, true}) {
                    kvarn::format_spec spec = unrotated(head_dim, 4, group);
                    if (rotate) spec.key_rotation = spec.value_rotation = kvarn::rotation::hadamard;
                    const kvarn::format f = support::make(spec);
                    INFO(support::describe(f) << ", " << support::name_of(kind));
                    const auto x = support::random_tiles(random, f, 1, 1, kind);
                    const auto record = support::encode(f, x, support::paper());
                    const auto wanted = support::reference_of(f, x, 0, 0);
                    const reference::shape s = support::shape_of(f);
                    // Two factors rounded to half: 2^-11 each, and as much again for float arithmetic.
                    const double keys = worst_product(reference::read_key_part(s, record.data()), reference::rounded(wanted.keys, 4));
                    const double values =
                        worst_product(reference::read_value_part(s, record.data()), reference::rounded(wanted.values, 4));
                    CHECK(keys < 1.2e-3);
                    CHECK(values < 1.2e-3);
                }
}

TEST_CASE("normalize/variance: without iterations the second scale is one", "[unit]")
{
    support::random_source random(33);
    for (const int bits : {2, 3, 4, 5, 6, 8}) {
        const kvarn::format f = support::make(unrotated(64, bits, 32));
        const auto x = support::random_tiles(random, f, 1, 1, support::tile_kind::channel_outliers);
        const auto record = support::encode(f, x, support::paper(0));
        const reference::shape s = support::shape_of(f);
        const reference::part keys = reference::read_key_part(s, record.data()), values = reference::read_value_part(s, record.data());
        CHECK((keys.scale1.array() == 1.0).all());
        CHECK((values.scale1.array() == 1.0).all());
        const reference::matrix k = support::key_matrix(f, x, 0, 0), v = support::value_matrix(f, x, 0, 0);
        const double n = (1 << bits) - 1;
        for (int d = 0; d < 64; ++d) {
            CHECK(keys.zero0(d) == reference::round_to_half(k.col(d).minCoeff()));
            const double scale = (k.col(d).maxCoeff() - k.col(d).minCoeff()) / n;
            CHECK(std::fabs(keys.scale0(d) - scale) <= scale * 0x1p-11 * 1.001);
        }
        for (int t = 0; t < 32; ++t) CHECK(values.zero0(t) == reference::round_to_half(v.row(t).minCoeff()));
        CHECK(support::compare_record(f, record.data(), support::reference_of(f, x, 0, 0, 0)).different_code_bytes <= 1);
    }
}

TEST_CASE("normalize/variance: every number of iterations agrees with the reference", "[unit]")
{
    support::random_source random(34);
    kvarn::format_spec spec = unrotated(96, 4, 64);
    spec.key_rotation = spec.value_rotation = kvarn::rotation::hadamard;
    const kvarn::format f = support::make(spec);
    support::agreement all;
    for (const auto kind : support::all_tile_kinds) {
        const auto x = support::random_tiles(random, f, 1, 1, kind);
        for (const int iterations : {0, 1, 2, 3, 5, 8, 16, 33, 64}) {
            INFO(support::name_of(kind) << ", " << iterations << " iterations");
            const auto seen =
                support::compare_record(f, support::encode(f, x, support::paper(iterations)).data(), support::reference_of(f, x, 0, 0, iterations));
            CAPTURE(seen.different_code_bytes, seen.worst_difference);
            CHECK(seen.worst_difference <= 4e-3);
            all.add(seen);
        }
    }
    CAPTURE(all.code_bytes, all.different_code_bytes, all.mean_difference());
    CHECK(all.codes_agree());
    CHECK(all.mean_difference() <= 1.5e-3);
}

TEST_CASE("normalize/variance: channels far from zero are normalised by their deviation about the mean", "[unit]")
{
    // A sum of squares minus the square of the sum loses the deviation of such channels in float.
    support::random_source random(37);
    support::agreement all;
    for (const int head_dim : {64, 128})
        for (const int group : {32, 128})
            for (const float offset : {10.0f, 30.0f, 100.0f}) {
                const kvarn::format f = support::make(unrotated(head_dim, 4, group));
                INFO(support::describe(f) << ", offset " << offset);
                auto x = support::random_tiles(random, f, 1, 1, support::tile_kind::gaussian);
                for (std::size_t i = 0; i < x.k.size(); i += 4) {
                    x.k[i] += offset;
                    x.v[i] += offset;
                }
                const auto record = support::encode(f, x, support::paper());
                const auto wanted = support::reference_of(f, x, 0, 0);
                const reference::shape s = support::shape_of(f);
                const double keys = worst_product(reference::read_key_part(s, record.data()), reference::rounded(wanted.keys, 4));
                const double values = worst_product(reference::read_value_part(s, record.data()), reference::rounded(wanted.values, 4));
                CHECK(keys < 1.2e-3);
                CHECK(values < 1.2e-3);
                all.add(support::compare_record(f, record.data(), wanted));
            }
    CAPTURE(all.code_bytes, all.different_code_bytes, all.mean_difference());
    CHECK(all.codes_agree());
}

TEST_CASE("normalize/variance: a token eight times as long gets a scale eight times as large", "[unit]")
{
    support::random_source random(35);
    const kvarn::format f = support::make(unrotated(128, 4, 64));
    auto x = support::random_tiles(random, f, 1, 1, support::tile_kind::gaussian);
    for (std::size_t c = 0; c < 128; ++c) {
        x.k[17 * 128 + c] *= 8.0f;
        x.v[23 * 128 + c] *= 8.0f;
    }
    const auto record = support::encode(f, x, support::paper());
    const reference::shape s = support::shape_of(f);
    const reference::vector k = reference::read_key_part(s, record.data()).scale1;
    const reference::vector v = reference::read_value_part(s, record.data()).scale0;
    const auto ratio = [](const reference::vector& scale, int token) {
        return scale(token) / ((scale.sum() - scale(token)) / static_cast<double>(scale.size() - 1));
    };
    CHECK(ratio(k, 17) > 6.0);
    CHECK(ratio(k, 17) < 10.0);
    CHECK(ratio(v, 23) > 5.0);
    CHECK(ratio(v, 23) < 12.0);
}

TEST_CASE("normalize/variance: token outliers cost the other tokens nothing", "[unit]")
{
    // The point of the method: token scales survive. Four tokens 30 times as long must not spoil their neighbours' K.
    support::random_source random(36);
    kvarn::format_spec spec;
    const kvarn::format f = support::make(spec);
    auto x = support::random_tiles(random, f, 1, 1, support::tile_kind::gaussian);
    for (const std::size_t t : {5u, 40u, 77u, 120u})
        for (std::size_t c = 0; c < 128; ++c) x.k[t * 128 + c] *= 30.0f;
    const auto error_of_others = [&](int iterations) {
        const auto y = support::decode(f, support::encode(f, x, support::paper(iterations)), 1, 1, kvarn::basis::original);
        double error = 0.0, norm = 0.0;
        for (std::size_t t = 0; t < 128; ++t) {
            if (t == 5 || t == 40 || t == 77 || t == 120) continue;
            for (std::size_t c = 0; c < 128; ++c) {
                const double a = x.k[t * 128 + c], b = y.k[t * 128 + c];
                error += (a - b) * (a - b);
                norm += a * a;
            }
        }
        return std::sqrt(error / norm);
    };
    CHECK(error_of_others(8) < 0.12);
    CHECK(error_of_others(0) > 4.0 * error_of_others(8));
}
