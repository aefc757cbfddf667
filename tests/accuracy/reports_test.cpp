// SPDX-License-Identifier: Apache-2.0
// What quantize_kv reports of a record against the same figures computed in double precision from the decoded tokens.

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "tests/catch.hpp"
#include "tests/support/library.hpp"

namespace {

struct worst {
    double scale = 0, relative = 0, whole = 0;
};

/// Of dense tokens [tokens][channels] that belong to one record; only the first `quantized` channels count.
worst errors_of(const std::vector<float>& exact, const std::vector<float>& decoded, std::size_t tokens, std::size_t channels, std::size_t quantized)
{
    worst w;
    double all = 0, all_difference = 0;
    for (std::size_t t = 0; t < tokens; ++t) {
        double x = 0, y = 0, d = 0;
        for (std::size_t c = 0; c < quantized; ++c) {
            const double a = exact[t * channels + c], b = decoded[t * channels + c];
            x += a * a;
            y += b * b;
            d += (a - b) * (a - b);
        }
        w.scale = std::max(w.scale, std::fabs(std::sqrt(y / x) - 1));
        w.relative = std::max(w.relative, std::sqrt(d / x));
        all += x;
        all_difference += d;
    }
    w.whole = std::sqrt(all_difference / all);
    return w;
}

void check(const kvarn::part_errors& reported, const worst& wanted)
{
    CHECK(std::fabs(static_cast<double>(reported.worst_scale_error) - wanted.scale) <= 2e-5 + 1e-4 * wanted.scale);
    CHECK(std::fabs(static_cast<double>(reported.worst_relative_error) - wanted.relative) <= 1e-4 * wanted.relative);
    CHECK(std::fabs(static_cast<double>(reported.relative_error) - wanted.whole) <= 1e-4 * wanted.whole);
}

}  // namespace

TEST_CASE("accuracy/reports: the errors reported are those of the decoded tokens", "[accuracy]")
{
    support::random_source random(101);
    for (const reference::shape& s :
         {reference::shape{128, 128, 2, 2, 128, true, 0}, reference::shape{64, 96, 4, 3, 64, true, 8}, reference::shape{36, 44, 5, 6, 32, false, 0},
          reference::shape{80, 256, 8, 2, 256, true, 0}, reference::shape{576, 64, 3, 8, 32, true, 4}, reference::shape{512, 512, 4, 0, 64, true, 64}})
        for (const auto kind : support::all_tile_kinds)
            for (const auto& options : {kvarn::encode_options{}, support::paper()}) {
                const kvarn::format f = support::make(s);
                INFO(support::describe(f) << ", " << support::name_of(kind));
                const auto x = support::random_tiles(random, f, 1, 1, kind);
                const auto y = support::decode(f, support::encode(f, x, options), 1, 1, kvarn::basis::rotated);
                const auto reported = support::encode_errors(f, x, options).front();
                const auto group = static_cast<std::size_t>(f.group()), dk = static_cast<std::size_t>(f.head_dim_k());
                const auto keys = static_cast<std::size_t>(f.key_channels()), dv = static_cast<std::size_t>(f.head_dim_v());
                auto rotated = x;
                if (f.keys_rotated()) {
                    auto view = support::dense_keys(f, rotated.k.data(), 1, 1);
                    view.channels = dk;
                    REQUIRE(kvarn::rotate(view) == kvarn::status::ok);
                }
                if (f.has_values() && f.values_rotated())
                    REQUIRE(kvarn::rotate(support::dense_values(f, rotated.v.data(), 1, 1)) == kvarn::status::ok);
                check(reported.k, errors_of(rotated.k, y.k, group, keys, dk));
                if (f.has_values())
                    check(reported.v, errors_of(rotated.v, y.v, group, dv, dv));
                else
                    CHECK((reported.v.worst_scale_error == 0.0f && reported.v.worst_relative_error == 0.0f && reported.v.relative_error == 0.0f));
            }
}

TEST_CASE("accuracy/reports: asking for the errors changes no byte, and each record has its own", "[accuracy]")
{
    support::random_source random(102);
    const kvarn::format f = support::make(reference::shape{64, 64, 2, 2, 64, true, 0});
    auto x = support::random_tiles(random, f, 3, 2, support::tile_kind::gaussian);
    const auto plain = support::encode(f, x);
    support::bytes records(plain.size(), 0xa5);
    std::vector<std::byte> scratch(kvarn::scratch_bytes(f));
    std::vector<kvarn::record_errors> errors(6), some(2);
    const auto run = [&](kvarn::record_range range, std::span<kvarn::record_errors> to) {
        return kvarn::quantize_kv(f, support::dense_keys(f, x.k.data(), 3, 2), support::dense_values(f, x.v.data(), 3, 2),
                                  kvarn::tile_major_records(f, support::as_bytes(records.data()), records.size(), 3, 2), std::span<std::byte>(scratch),
                                  {}, range, to);
    };
    REQUIRE(run({}, errors) == kvarn::status::ok);
    CHECK(records == plain);
    REQUIRE(run({3, 5}, some) == kvarn::status::ok);
    for (int i = 0; i < 2; ++i) CHECK(some[static_cast<std::size_t>(i)].k.relative_error == errors[static_cast<std::size_t>(3 + i)].k.relative_error);
    CHECK(errors[0].k.relative_error != errors[1].k.relative_error);
}

TEST_CASE("accuracy/reports: tokens of norm zero", "[accuracy]")
{
    support::random_source random(103);
    const kvarn::format f = support::make(reference::shape{64, 64, 4, 4, 32, true, 0});
    auto x = support::random_tiles(random, f, 1, 1, support::tile_kind::gaussian);
    for (std::size_t c = 0; c < 64; ++c) x.k[7 * 64 + c] = x.v[9 * 64 + c] = 0.0f;
    // The refined encoder's token scale makes them zero again; the paper's leaves K what the zero points decode to.
    const auto refined = support::encode_errors(f, x).front();
    CHECK(refined.k.worst_scale_error < 0.001f);
    CHECK(refined.v.worst_scale_error < 0.001f);
    const auto paper = support::encode_errors(f, x, support::paper()).front();
    CHECK(paper.k.worst_scale_error == std::numeric_limits<float>::infinity());
    CHECK(paper.k.worst_relative_error == std::numeric_limits<float>::infinity());
    CHECK(std::isfinite(paper.k.relative_error));
}
