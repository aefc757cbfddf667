// SPDX-License-Identifier: Apache-2.0
// The refined encoder against its double-precision reference, against the paper's encoder, at every scale, and on tiles at the edge of
// what fits.

#include <algorithm>
#include <cmath>
#include <vector>

#include "../catch.hpp"
#include "../reference/refined.hpp"
#include "../support/library.hpp"

namespace {

/// The part of the record and the reference's, and how far each is from the exact values.
struct comparison {
    double error, reference_error, difference, differing_codes;
};

comparison compare(const reference::part& got, const reference::part& wanted, const reference::matrix& exact)
{
    const reference::matrix a = got.decoded(), b = wanted.with_half_scalars().decoded();
    const auto codes = (got.codes.array() != wanted.codes.array()).count();
    return {reference::relative_difference(a, exact), reference::relative_difference(b, exact), reference::relative_difference(a, b),
            static_cast<double>(codes) / static_cast<double>(got.codes.size())};
}

const reference::shape shapes[] = {{128, 128, 2, 2, 128, true, 0}, {64, 64, 4, 3, 64, true, 0},   {80, 112, 3, 5, 64, true, 0},
                                   {36, 36, 6, 6, 32, true, 0},    {100, 44, 5, 4, 32, false, 0}, {64, 128, 8, 8, 256, true, 0},
                                   {288, 32, 2, 8, 128, true, 0}};

}  // namespace

TEST_CASE("codec/refine: records agree with the double-precision reference", "[unit]")
{
    support::random_source random(151);
    double codes = 0, count = 0;
    for (const auto& s : shapes)
        for (const auto kind : support::all_tile_kinds)
            for (const auto& o : {reference::refined_options{}, reference::refined_options{3, 1, 0}, reference::refined_options{0, 0, 8}}) {
                const kvarn::format f = support::make(s);
                INFO(support::describe(f) << ", " << support::name_of(kind) << ", " << o.rounds << " rounds");
                const auto x = support::random_tiles(random, f, 1, 1, kind);
                kvarn::encode_options options;
                options.refined_iterations = o.iterations;
                options.refit_rounds = o.rounds;
                options.clip_steps = o.clip_steps;
                const auto record = support::encode(f, x, options);
                const reference::matrix k = reference::in_record_basis(s.rotate.k, support::key_matrix(f, x, 0, 0)).transpose();
                const reference::matrix v = reference::in_record_basis(s.rotate.v, support::value_matrix(f, x, 0, 0));
                for (const auto& c : {compare(reference::read_key_part(s, record.data()), reference::refined(k, s.key_bits, true, o), k),
                                      compare(reference::read_value_part(s, record.data()), reference::refined(v, s.value_bits, false, o), v)}) {
                    CAPTURE(c.error, c.reference_error, c.difference, c.differing_codes);
                    // A code at the edge of two changes what is fitted after it; what counts is that neither is better.
                    CHECK(std::fabs(c.error / c.reference_error - 1) <= 0.02);
                    CHECK(c.difference <= 0.35 * c.reference_error + 1e-3);
                    codes += c.differing_codes;
                    count += 1;
                }
            }
    CHECK(codes / count < 0.01);
}

TEST_CASE("codec/refine: less error than the paper's encoder on every kind of tile, and token norms kept", "[unit]")
{
    support::random_source random(152);
    for (const auto& s : shapes)
        for (const auto kind : support::all_tile_kinds) {
            const kvarn::format f = support::make(s);
            INFO(support::describe(f) << ", " << support::name_of(kind));
            const auto x = support::random_tiles(random, f, 1, 1, kind);
            const auto refined = support::encode_errors(f, x).front(), paper = support::encode_errors(f, x, support::paper()).front();
            CHECK(refined.k.relative_error <= 1.03f * paper.k.relative_error);  // bounded weights: small tokens count more than in the sum
            CHECK(refined.v.relative_error <= 1.005f * paper.v.relative_error);
            // Where a channel outweighs all others, its part of the norm counts less.
            const bool outweighed = kind == support::tile_kind::channel_outliers && !f.keys_rotated();
            CHECK(refined.k.worst_scale_error <= (outweighed ? 0.05f : 0.0005f));  // a token scale is a half: 2^-11
            // Scale and zero are halves, which have fewer digits below 2^-14: tokens of a hundredth of the usual norm at 8 bits.
            CHECK(refined.v.worst_scale_error <= (outweighed ? 0.1f : kind == support::tile_kind::token_scales ? 0.005f : 0.0015f));
        }
}

TEST_CASE("codec/refine: channels of K keep their spread about the mean", "[unit]")
{
    // Rounding to few codes draws values to the mean of their channel; the encoder undoes that, so that <k_s - k_t, q> is right on average
    // where token norms allow: in keys with a common part, as those of most models are.
    support::random_source random(153);
    const reference::shape s{128, 128, 2, 2, 128, true, 0};
    const kvarn::format f = support::make(s);
    auto x = support::random_tiles(random, f, 1, 1, support::tile_kind::gaussian);
    for (std::size_t i = 0; i < x.k.size(); ++i) x.k[i] += i % 128 % 3 == 0 ? 4.0f : -3.0f;  // the same for every token
    const reference::matrix k = reference::in_record_basis(s.rotate.k, support::key_matrix(f, x, 0, 0)).transpose();
    const auto slope = [&](const kvarn::encode_options& options) {
        const auto record = support::encode(f, x, options);
        const reference::matrix y = reference::decoded_keys(s, record.data()).transpose();
        double product = 0, square = 0;
        for (Eigen::Index d = 0; d < k.rows(); ++d) {
            const double mean = k.row(d).mean(), decoded_mean = y.row(d).mean();
            product += ((k.row(d).array() - mean) * (y.row(d).array() - decoded_mean)).sum();
            square += (k.row(d).array() - mean).square().sum();
        }
        return product / square;
    };
    CHECK(std::fabs(slope({}) - 1) < 0.02);
}

TEST_CASE("codec/refine: one token or channel of another size, or far from zero, costs the others little", "[unit]")
{
    enum { plain, token, channel, offset };
    const auto error_of_others = [](const reference::shape& s, int kind, float size) {
        support::random_source random(155);
        const kvarn::format f = support::make(s);
        auto x = support::random_tiles(random, f, 1, 1, support::tile_kind::gaussian);
        constexpr int odd_token = 40, odd_channel = 7;
        const auto disturb = [&](std::vector<float>& values, int dim) {
            for (std::size_t i = 0; i < values.size(); ++i) {
                const int t = static_cast<int>(i) / dim, d = static_cast<int>(i) % dim;
                if ((kind == token && t == odd_token) || (kind == channel && d == odd_channel)) values[i] *= size;
                if (kind == offset && d == odd_channel) values[i] += size;
            }
        };
        disturb(x.k, s.head_dim_k);
        disturb(x.v, s.head_dim_v);
        const auto record = support::encode(f, x);
        const auto others = [&](reference::matrix exact, reference::matrix decoded) {  // [token][channel], original basis
            for (auto* m : {&exact, &decoded}) {
                if (kind == token) m->row(odd_token).setZero();
                if (kind == channel || kind == offset) m->col(odd_channel).setZero();
            }
            return reference::relative_difference(decoded, exact);
        };
        return std::pair(others(support::key_matrix(f, x, 0, 0), reference::in_record_basis(s.rotate.k, reference::decoded_keys(s, record.data()))),
                         others(support::value_matrix(f, x, 0, 0), reference::in_record_basis(s.rotate.v, reference::decoded_values(s, record.data()))));
    };
    for (const int dim : {64, 128})
        for (const int bits : {2, 4})
            for (const bool rotate : {true, false}) {
                const reference::shape s{dim, dim, bits, bits, 128, rotate, 0};
                const auto usual = error_of_others(s, plain, 0);
                for (const float size : {30.0f, 300.0f, 1000.0f})
                    for (const int kind : {token, channel, offset}) {
                        if (rotate && kind != token) continue;  // a rotation spreads a channel over all: that is what a basis is chosen for
                        const auto disturbed = error_of_others(s, kind, size);
                        CAPTURE(dim, bits, rotate, size, kind);
                        CHECK(disturbed.first <= 1.2 * usual.first);
                        CHECK(disturbed.second <= 1.2 * usual.second);
                    }
            }
}

TEST_CASE("codec/refine: what the paper's encoder accepts, the refined one accepts", "[unit]")
{
    // Scalars close to the largest half: where the refined ones do not fit, the paper's are stored.
    support::random_source random(154);
    std::size_t accepted = 0;
    for (const double magnitude : {1e3, 6e3, 1.2e4, 2e4, 4e4, 8e4, 2e5, 1e6, 1e7, 1e8})
        for (const bool rotate : {false, true})
            for (int i = 0; i < 4; ++i) {
                const kvarn::format f = support::make(reference::shape{64, 64, 2, 4, 32, rotate, 0});
                auto x = support::random_tiles(random, f, 1, 1, support::all_tile_kinds[i]);
                for (auto* all : {&x.k, &x.v}) {
                    float most = 0;
                    for (const float value : *all) most = std::max(most, std::fabs(value));
                    for (float& value : *all) value *= static_cast<float>(magnitude) / most;
                }
                std::vector<std::byte> scratch(kvarn::scratch_bytes(f));
                const auto run = [&](const kvarn::encode_options& options, support::bytes& record) {
                    record.assign(kvarn::record_bytes(f), 0xa5);
                    return kvarn::quantize_kv(f, support::dense_keys(f, x.k.data(), 1, 1), support::dense_values(f, x.v.data(), 1, 1),
                                              kvarn::tile_major_records(f, support::as_bytes(record.data()), record.size(), 1, 1),
                                              std::span<std::byte>(scratch), options);
                };
                support::bytes refined, paper;
                const kvarn::status status = run({}, refined);
                CHECK(status == run(support::paper(), paper));
                accepted += status == kvarn::status::ok;
                if (status != kvarn::status::ok) continue;
                const auto y = support::decode(f, refined, 1, 1, kvarn::basis::rotated);
                for (const auto* all : {&y.k, &y.v}) CHECK(std::all_of(all->begin(), all->end(), [](float v) { return std::isfinite(v); }));
            }
    CHECK(accepted > 30);
    CHECK(accepted < 80);
}

TEST_CASE("codec/refine: tokens and channels of zeros come back as zeros", "[unit]")
{
    support::random_source random(155);
    for (const int bits : {2, 4, 8}) {
        const kvarn::format f = support::make(reference::shape{64, 64, bits, bits, 64, false, 0});
        auto x = support::random_tiles(random, f, 1, 1, support::tile_kind::gaussian);
        for (std::size_t i = 0; i < 64; ++i) {
            x.k[11 * 64 + i] = x.v[13 * 64 + i] = 0.0f;  // tokens
            x.k[i * 64 + 17] = x.v[i * 64 + 19] = 0.0f;  // channels
        }
        const auto y = support::decode(f, support::encode(f, x), 1, 1, kvarn::basis::rotated);
        for (std::size_t i = 0; i < 64; ++i) {
            CHECK(y.k[11 * 64 + i] == 0.0f);
            CHECK(y.v[13 * 64 + i] == 0.0f);
            CHECK(y.k[i * 64 + 17] == 0.0f);
            CHECK(std::fabs(y.v[i * 64 + 19]) < 2e-3f);
        }
    }
}

TEST_CASE("codec/refine: a tile times a power of two has the same codes, and scalars times it", "[unit]")
{
    support::random_source random(156);
    for (const auto& s : {reference::shape{128, 128, 2, 4, 128, true, 0}, reference::shape{36, 80, 4, 2, 32, true, 0},
                          reference::shape{100, 64, 8, 3, 64, false, 0}})
        for (const auto kind : support::all_tile_kinds) {
            const kvarn::format f = support::make(s);
            const auto x = support::random_tiles(random, f, 1, 1, kind);
            const auto at_one = support::encode(f, x);
            const auto k = reference::read_key_part(s, at_one.data()), v = reference::read_value_part(s, at_one.data());
            for (int n = -12; n <= 12; ++n) {
                INFO(support::describe(f) << ", " << support::name_of(kind) << ", times 2^" << n);
                auto y = x;
                for (auto* all : {&y.k, &y.v})
                    for (float& value : *all) value = std::ldexp(value, n);
                const auto scaled = support::encode(f, y);
                const auto k_scaled = reference::read_key_part(s, scaled.data()), v_scaled = reference::read_value_part(s, scaled.data());
                // Scalars that a half holds with fewer digits may tip a code over: tokens of a hundredth of the usual norm, say.
                const bool subnormal = kind == support::tile_kind::token_scales;
                CHECK((k_scaled.codes.array() != k.codes.array()).count() <= (subnormal ? k.codes.size() / 200 : 0));
                CHECK((v_scaled.codes.array() != v.codes.array()).count() <= (subnormal ? v.codes.size() / 200 : 0));
                const double by = std::ldexp(1.0, n);
                CHECK(reference::relative_difference(k_scaled.decoded() / by, k.decoded()) < (subnormal ? 2e-2 : 1e-3));
                CHECK(reference::relative_difference(v_scaled.decoded() / by, v.decoded()) < (subnormal ? 2e-2 : 1e-3));
            }
        }
}
