// SPDX-License-Identifier: Apache-2.0
// What must hold between input, record and result for any tile.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

#include "../catch.hpp"
#include "../support/library.hpp"

namespace {

kvarn::format plain(int head_dim, int bits, int group, bool rotate, int exact = 0)
{
    return support::make(reference::shape{head_dim, head_dim, bits, bits, group, rotate, exact});
}

/// The reference's rotation of the input minus the record's values: within half a step of each code, plus the rounding of
/// the three scalars to half and of float arithmetic. Returns the largest excess over that bound, relative to it.
double worst_excess(const reference::part& part, const reference::matrix& wanted)
{
    double worst = 0.0;
    const double n = (1 << part.bits) - 1;
    const reference::matrix got = part.decoded();
    const double largest = wanted.cwiseAbs().maxCoeff();
    // Below, the least half and the least float count as well: s1 * n * 2^-24 and 1e-44.
    for (Eigen::Index i = 0; i < wanted.rows(); ++i)
        for (Eigen::Index j = 0; j < wanted.cols(); ++j) {
            const double s1 = part.scale1(j), step = part.scale0(i) * s1;
            const double scalars = (n * part.scale0(i) + 2.0 * std::fabs(part.zero0(i))) * s1 * 0x1p-10 + s1 * n * 0x1p-24 + 1e-44;
            const double bound = 0.5 * step * 1.001 + scalars + 1e-6 * largest;
            worst = std::max(worst, std::fabs(got(i, j) - wanted(i, j)) / bound);
        }
    return worst;
}

bool all_finite(const std::vector<float>& values)
{
    return std::all_of(values.begin(), values.end(), [](float f) { return std::isfinite(f); });
}

}  // namespace

TEST_CASE("property/values: every value comes back within half a step", "[property]")
{
    support::random_source random(81);
    for (const auto kind : support::all_tile_kinds)
        for (const int head_dim : {32, 64, 80, 112, 128, 192, 256, 288})
            for (const int bits : {2, 3, 4, 5, 6, 8})
                for (const bool rotate : {false, true}) {
                    const kvarn::format f = plain(head_dim, bits, 64, rotate);
                    INFO(support::describe(f) << ", " << support::name_of(kind));
                    const auto x = support::random_tiles(random, f, 1, 1, kind);
                    const auto record = support::encode(f, x, support::paper());
                    const reference::shape s = support::shape_of(f);
                    const reference::matrix k = reference::in_record_basis(s.rotate.k, support::key_matrix(f, x, 0, 0)).transpose();
                    const reference::matrix v = reference::in_record_basis(s.rotate.v, support::value_matrix(f, x, 0, 0));
                    const double keys = worst_excess(reference::read_key_part(s, record.data()), k);
                    const double values = worst_excess(reference::read_value_part(s, record.data()), v);
                    CHECK(keys <= 1.0);
                    CHECK(values <= 1.0);
                    CHECK(keys > 0.5);  // the bound is no larger than it has to be
                    CHECK(values > 0.5);
                }
}

TEST_CASE("property/values: more bits, less error", "[property]")
{
    support::random_source random(82);
    for (const int head_dim : {64, 96, 128}) {
        const auto x = support::random_tiles(random, plain(head_dim, 2, 128, true), 1, 1, support::tile_kind::channel_outliers);
        double last_k = 1.0, last_v = 1.0;
        for (const int bits : {2, 3, 4, 5, 6, 8}) {
            const kvarn::format f = plain(head_dim, bits, 128, true);
            const auto y = support::decode(f, support::encode(f, x), 1, 1, kvarn::basis::original);
            const double k = reference::relative_difference(support::key_matrix(f, y, 0, 0), support::key_matrix(f, x, 0, 0));
            const double v = reference::relative_difference(support::value_matrix(f, y, 0, 0), support::value_matrix(f, x, 0, 0));
            CHECK(k < 0.7 * last_k);
            CHECK(v < 0.7 * last_v);
            last_k = k;
            last_v = v;
        }
        CHECK(last_k < 0.01);
        CHECK(last_v < 0.01);
    }
}

TEST_CASE("property/values: the first and the last code of every axis-0 index are in use", "[property]")
{
    support::random_source random(83);
    for (const int bits : {2, 3, 4, 5, 6, 8}) {
        const kvarn::format f = plain(80, bits, 64, true);
        const auto record = support::encode(f, support::random_tiles(random, f, 1, 1, support::tile_kind::token_scales), support::paper());
        const reference::shape s = support::shape_of(f);
        for (const auto& part : {reference::read_key_part(s, record.data()), reference::read_value_part(s, record.data())})
            for (Eigen::Index i = 0; i < part.codes.rows(); ++i) {
                CHECK(part.codes.row(i).minCoeff() == 0);
                CHECK(part.codes.row(i).maxCoeff() == (1 << bits) - 1);
            }
    }
}

TEST_CASE("property/values: V is K with tokens and channels exchanged", "[property]")
{
    support::random_source random(84);
    for (const auto kind : support::all_tile_kinds)
        for (const int dim : {32, 64, 128, 256})
            for (const int group : {32, 64, 128, 256})
                for (const int bits : {2, 3, 8}) {
                    // K: `group` tokens of `dim` channels. V: the transposed tile, `dim` tokens of `group` channels.
                    const kvarn::format k_format = plain(dim, bits, group, false), v_format = plain(group, bits, dim, false);
                    INFO(dim << " x " << group << ", " << bits << " bits, " << support::name_of(kind));
                    const auto k_tiles = support::random_tiles(random, k_format, 1, 1, kind);
                    support::kv_tiles v_tiles = support::random_tiles(random, v_format, 1, 1, kind);
                    for (int t = 0; t < group; ++t)
                        for (int d = 0; d < dim; ++d)
                            v_tiles.v[static_cast<std::size_t>(d * group + t)] = k_tiles.k[static_cast<std::size_t>(t * dim + d)];
                    const auto k_record = support::encode(k_format, k_tiles, support::paper()),
                               v_record = support::encode(v_format, v_tiles, support::paper());
                    const auto a = reference::offsets(support::shape_of(k_format)), b = reference::offsets(support::shape_of(v_format));
                    const auto same = [&](std::size_t in_k, std::size_t in_v, std::size_t count) {
                        return std::memcmp(k_record.data() + in_k, v_record.data() + in_v, count) == 0;
                    };
                    CHECK(same(a.k_codes, b.v_codes, a.k_channel_scale - a.k_codes));
                    CHECK(same(a.k_channel_scale, b.v_token_scale, static_cast<std::size_t>(2 * dim)));
                    CHECK(same(a.k_channel_zero, b.v_token_zero, static_cast<std::size_t>(2 * dim)));
                    CHECK(same(a.k_token_scale, b.v_channel_scale, static_cast<std::size_t>(2 * group)));
                }
}

TEST_CASE("property/values: K and V of a record do not know of each other", "[property]")
{
    support::random_source random(85);
    const kvarn::format both = support::make(reference::shape{64, 128, 4, 3, 32, true, 8});
    const kvarn::format alone = support::make(reference::shape{64, 128, 4, 0, 32, true, 0});
    auto x = support::random_tiles(random, both, 1, 1, support::tile_kind::channel_outliers);
    const auto record = support::encode(both, x);
    auto y = x;
    for (float& v : y.v) v *= 3.0f;
    const auto other = support::encode(both, y);
    const auto at = reference::offsets(support::shape_of(both));
    CHECK(std::equal(record.begin(), record.begin() + static_cast<std::ptrdiff_t>(at.v_codes), other.begin()));
    CHECK(!std::equal(record.begin() + static_cast<std::ptrdiff_t>(at.v_codes), record.end(),
                      other.begin() + static_cast<std::ptrdiff_t>(at.v_codes)));
    // The K part is the record of a format without V and without exact channels.
    support::kv_tiles keys;
    for (std::size_t t = 0; t < 32; ++t) keys.k.insert(keys.k.end(), x.k.begin() + static_cast<std::ptrdiff_t>(t * 72), x.k.begin() + static_cast<std::ptrdiff_t>(t * 72 + 64));
    const auto keys_record = support::encode(alone, keys);
    CHECK(std::equal(record.begin(), record.begin() + static_cast<std::ptrdiff_t>(at.v_codes), keys_record.begin()));
}

TEST_CASE("property/values: a decoded tile quantizes to the same record where nothing is normalised", "[property]")
{
    // With no iterations and no rotation a decoded value is code * scale + zero exactly, and its tile has the same minimum and range.
    support::random_source random(86);
    const kvarn::encode_options options = support::paper(0);
    for (const int bits : {2, 3, 4, 5, 6, 8})
        for (const int head_dim : {44, 64, 100}) {
            const kvarn::format f = plain(head_dim, bits, 64, false, 4);
            INFO(support::describe(f));
            const auto record = support::encode(f, support::random_tiles(random, f, 1, 1, support::tile_kind::gaussian), options);
            const auto once = support::decode(f, record, 1, 1, kvarn::basis::original);
            const auto again = support::encode(f, once, options);
            CHECK(again == record);
            const auto twice = support::decode(f, again, 1, 1, kvarn::basis::original);
            CHECK(support::same_bits(once.k, twice.k));
            CHECK(support::same_bits(once.v, twice.v));
        }
}

TEST_CASE("property/values: scores against rotated queries are scores in the original basis", "[property]")
{
    support::random_source random(87);
    for (const int head_dim : {36, 64, 80, 128, 160, 576}) {
        const kvarn::format f = plain(head_dim, 4, 32, true);
        INFO(support::describe(f));
        const auto record = support::encode(f, support::random_tiles(random, f, 1, 1, support::tile_kind::channel_outliers));
        const auto original = support::decode(f, record, 1, 1, kvarn::basis::original);
        const auto rotated = support::decode(f, record, 1, 1, kvarn::basis::rotated);
        std::vector<float> q(static_cast<std::size_t>(head_dim));
        for (float& value : q) value = static_cast<float>(random.gaussian());
        auto rotated_q = q;
        REQUIRE(kvarn::rotate(kvarn::token_major(rotated_q.data(), 1, 1, q.size())) == kvarn::status::ok);
        for (std::size_t t = 0; t < 32; ++t) {
            double a = 0.0, b = 0.0, norm = 0.0;
            for (std::size_t d = 0; d < q.size(); ++d) {
                a += static_cast<double>(q[d]) * original.k[t * q.size() + d];
                b += static_cast<double>(rotated_q[d]) * rotated.k[t * q.size() + d];
                norm += std::fabs(static_cast<double>(q[d]) * original.k[t * q.size() + d]);
            }
            CHECK(std::fabs(a - b) <= 2e-6 * norm);
        }
        auto unrotated = rotated.v;
        REQUIRE(kvarn::unrotate(kvarn::token_major(unrotated.data(), 32, 1, q.size())) == kvarn::status::ok);
        double worst = 0.0, largest = 0.0;
        for (std::size_t i = 0; i < unrotated.size(); ++i) {
            worst = std::max(worst, std::fabs(static_cast<double>(unrotated[i]) - original.v[i]));
            largest = std::max(largest, std::fabs(static_cast<double>(original.v[i])));
        }
        CHECK(worst <= 1e-6 * largest);
    }
}

TEST_CASE("property/values: exact channels come back as they went in", "[property]")
{
    support::random_source random(88);
    for (const int exact : {4, 12, 64, 256})
        for (const bool rotate : {false, true}) {
            const kvarn::format f = support::make(reference::shape{64, 64, 4, 0, 32, rotate, exact});
            INFO(support::describe(f));
            // Every finite half pattern in turn, subnormals and negative zero included.
            std::vector<kvarn::half> k(32 * static_cast<std::size_t>(64 + exact));
            std::uint16_t next = static_cast<std::uint16_t>(random.bits());
            for (std::size_t t = 0; t < 32; ++t)
                for (std::size_t c = 0; c < static_cast<std::size_t>(64 + exact); ++c) {
                    std::uint16_t bits = 0x3c00;
                    if (c >= 64) {
                        next = static_cast<std::uint16_t>(next + 7919u);
                        bits = (next & 0x7c00u) == 0x7c00u ? static_cast<std::uint16_t>(next & 0x83ffu) : next;
                    } else {
                        bits = reference::half_bits(random.gaussian());
                    }
                    k[t * static_cast<std::size_t>(64 + exact) + c].bits = bits;
                }
            support::for_each_arch([&](auto arch) {
                using arch_type = decltype(arch);
                support::bytes record(kvarn::record_bytes(f), 0xa5);
                std::vector<std::byte> scratch(kvarn::scratch_bytes(f));
                const auto grid = kvarn::tile_major_records(f, support::as_bytes(record.data()), record.size(), 1, 1);
                REQUIRE(kvarn::quantize_kv<arch_type>(f, support::dense_keys(f, k.data(), 1, 1), kvarn::kv_view<kvarn::half>{}, grid,
                                                      std::span<std::byte>(scratch)) == kvarn::status::ok);
                const std::size_t at = kvarn::layout_of(f).exact;
                for (const auto basis : {kvarn::basis::original, kvarn::basis::rotated}) {
                    const auto y = support::decode_as<arch_type, kvarn::half>(f, record, 1, 1, basis);
                    std::size_t different = 0;
                    for (std::size_t t = 0; t < 32; ++t)
                        for (std::size_t c = 0; c < static_cast<std::size_t>(exact); ++c) {
                            const std::size_t i = t * static_cast<std::size_t>(64 + exact) + 64 + c;
                            const std::size_t byte = at + 2 * (t * static_cast<std::size_t>(exact) + c);
                            different += y.k[i].bits != k[i].bits;
                            different += (record[byte] | record[byte + 1] << 8) != k[i].bits;
                        }
                    CHECK(different == 0);
                }
            });
        }
}

TEST_CASE("property/values: exact channels of float input are rounded to half, ties to even", "[property]")
{
    support::random_source random(89);
    const kvarn::format f = support::make(reference::shape{64, 64, 4, 2, 32, true, 16});
    auto x = support::random_tiles(random, f, 1, 1, support::tile_kind::gaussian);
    for (std::size_t t = 0; t < 32; ++t)
        for (std::size_t c = 64; c < 80; ++c) {
            const double coarse = reference::half_value(static_cast<std::uint16_t>(random.below(0x7bff)));
            const double fine = reference::half_value(static_cast<std::uint16_t>(reference::half_bits(coarse) + 1));
            x.k[t * 80 + c] = static_cast<float>(random.below(2) ? (coarse + fine) / 2.0 : coarse + random.uniform() * (fine - coarse));
            if (x.k[t * 80 + c] > 65504.0f) x.k[t * 80 + c] = 65504.0f;
        }
    support::for_each_arch([&](auto arch) {
        const auto y = support::decode<decltype(arch)>(f, support::encode<decltype(arch)>(f, x), 1, 1, kvarn::basis::original);
        std::size_t wrong = 0;
        for (std::size_t t = 0; t < 32; ++t)
            for (std::size_t c = 64; c < 80; ++c) wrong += y.k[t * 80 + c] != static_cast<float>(reference::round_to_half(x.k[t * 80 + c]));
        CHECK(wrong == 0);
    });
}

TEST_CASE("property/values: zero, constant and denormal tiles come back finite and within half a step", "[property]")
{
    support::random_source random(90);
    const float tiny = std::numeric_limits<float>::denorm_min(), least = std::numeric_limits<float>::min();
    struct special {
        const char* name;
        float level, spread;
    };
    for (const special& tile :
         {special{"zero", 0.0f, 0.0f}, special{"negative zero", -0.0f, 0.0f}, special{"one", 1.0f, 0.0f}, special{"constant", -3.7f, 0.0f},
          special{"large constant", 3000.0f, 0.0f}, special{"least normal", least, 0.0f}, special{"least denormal", tiny, 0.0f},
          special{"denormals", 0.0f, 1e-40f}, special{"near denormal", 0.0f, 1e-37f}, special{"tiny", 0.0f, 1e-20f},
          special{"below half", 0.0f, 1e-9f}, special{"small", 0.0f, 1e-4f}, special{"flat", 100.0f, 1e-5f}})
        for (const int head_dim : {36, 64, 80, 128})
            for (const bool rotate : {false, true})
                for (const int bits : {2, 5, 8}) {
                    const kvarn::format f = plain(head_dim, bits, 32, rotate, 4);
                    INFO(tile.name << ", " << support::describe(f));
                    support::kv_tiles x = support::random_tiles(random, f, 1, 1, support::tile_kind::gaussian);
                    for (auto* all : {&x.k, &x.v})
                        for (float& value : *all) value = tile.level + tile.spread * value;
                    const auto wanted = support::encode<kvarn::simd::portable>(f, x, support::paper());
                    const auto refined = support::encode<kvarn::simd::portable>(f, x);
                    const reference::shape s = support::shape_of(f);
                    CHECK(worst_excess(reference::read_key_part(s, wanted.data()),
                                       reference::in_record_basis(s.rotate.k, support::key_matrix(f, x, 0, 0)).transpose()) <= 1.0);
                    CHECK(worst_excess(reference::read_value_part(s, wanted.data()),
                                       reference::in_record_basis(s.rotate.v, support::value_matrix(f, x, 0, 0))) <= 1.0);
                    support::for_each_arch([&](auto arch) {
                        using arch_type = decltype(arch);
                        const bool same = support::encode<arch_type>(f, x, support::paper()) == wanted;
                        CHECK(same);
                        const bool same_refined = support::encode<arch_type>(f, x) == refined;
                        CHECK(same_refined);
                        for (const auto& record : {wanted, refined})
                            for (const auto basis : {kvarn::basis::original, kvarn::basis::rotated}) {
                                const auto y = support::decode<arch_type>(f, record, 1, 1, basis);
                                CHECK(all_finite(y.k));
                                CHECK(all_finite(y.v));
                            }
                    });
                }
}

TEST_CASE("property/values: a zero tile decodes to zero, exactly", "[property]")
{
    for (const int head_dim : {36, 64, 128})
        for (const bool rotate : {false, true})
            for (const int bits : {2, 3, 4, 5, 6, 8}) {
                const kvarn::format f = plain(head_dim, bits, 64, rotate, 4);
                support::kv_tiles x{2, 1, {}, {}};
                x.k.assign(support::tokens_of(f, 2) * static_cast<std::size_t>(f.key_channels()), 0.0f);
                x.v.assign(support::tokens_of(f, 2) * static_cast<std::size_t>(f.head_dim_v()), 0.0f);
                for (const auto& options : {kvarn::encode_options{}, support::paper()}) {
                    const auto y = support::decode(f, support::encode(f, x, options), 2, 1, kvarn::basis::original);
                    std::size_t not_zero = 0;
                    for (const float value : y.k) not_zero += value != 0.0f;
                    for (const float value : y.v) not_zero += value != 0.0f;
                    CHECK(not_zero == 0);
                }
            }
}

TEST_CASE("property/values: half results saturate at 65504", "[property]")
{
    const kvarn::format f = plain(64, 4, 32, false);
    const auto at = kvarn::layout_of(f);
    support::bytes record(kvarn::record_bytes(f), 0);
    const auto put = [&](std::size_t first, int count, double value) {
        const std::uint16_t bits = reference::half_bits(value);
        for (int i = 0; i < count; ++i) {
            record[first + 2 * static_cast<std::size_t>(i)] = static_cast<std::uint8_t>(bits);
            record[first + 2 * static_cast<std::size_t>(i) + 1] = static_cast<std::uint8_t>(bits >> 8);
        }
    };
    put(at.k_channel_scale, 64, 0.0);
    put(at.k_channel_zero, 64, 60000.0);
    put(at.k_token_scale, 32, 60000.0);
    put(at.v_channel_scale, 64, 3.0);
    put(at.v_token_scale, 32, 0.0);
    put(at.v_token_zero, 32, -65504.0);
    support::for_each_arch([&](auto arch) {
        using arch_type = decltype(arch);
        for (const auto basis : {kvarn::basis::original, kvarn::basis::rotated}) {
            const auto y = support::decode_as<arch_type, kvarn::half>(f, record, 1, 1, basis);
            for (const auto h : y.k) REQUIRE(h.bits == 0x7bff);
            for (const auto h : y.v) REQUIRE(h.bits == 0xfbff);
            const auto z = support::decode_as<arch_type, float>(f, record, 1, 1, basis);
            for (const float value : z.k) REQUIRE(value == static_cast<float>(reference::round_to_half(60000.0)) * static_cast<float>(reference::round_to_half(60000.0)));
            for (const float value : z.v) REQUIRE(value == -3.0f * 65504.0f);
        }
    });
    // The same through the inverse rotation.
    const kvarn::format rotated = plain(64, 4, 32, true);
    support::for_each_arch([&](auto arch) {
        const auto y = support::decode_as<decltype(arch), kvarn::half>(rotated, record, 1, 1, kvarn::basis::original);
        std::size_t infinite = 0, saturated = 0;
        for (const auto h : y.k) {
            infinite += (h.bits & 0x7fff) >= 0x7c00;
            saturated += h.bits == 0x7bff;
        }
        for (const auto h : y.v) infinite += (h.bits & 0x7fff) >= 0x7c00;
        CHECK(infinite == 0);
        CHECK(saturated == 32);  // H of a constant vector is one channel
    });
}
