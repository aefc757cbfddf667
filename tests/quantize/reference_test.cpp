// SPDX-License-Identifier: Apache-2.0
// Records of random tiles against the double-precision reference: a pairwise covering selection of formats by default,
// every head_dim x bits x group x rotation under [slow].

#include <array>
#include <cstdint>
#include <iterator>
#include <vector>

#include "../catch.hpp"
#include "../support/compare.hpp"

namespace {

constexpr int head_dims[] = {32,  36,  40,  48,  56,  64,  72,  80,  96,  112, 128,
                             144, 160, 192, 224, 256, 288, 320, 384, 448, 512, 576};
constexpr int key_widths[] = {2, 3, 4, 5, 6, 8};
constexpr int value_widths[] = {0, 2, 3, 4, 5, 6, 8};
constexpr int groups[] = {32, 64, 128, 256};

enum factor { by_head_dim, by_value_head_dim, by_key_bits, by_value_bits, by_group, by_rotation, by_kind, by_exact, by_type, factors };
constexpr int levels[factors] = {22, 8, 6, 7, 4, 4, 5, 3, 3};
using choice = std::array<int, factors>;

/// Greedy pairwise covering: every two levels of two factors meet in at least one choice.
std::vector<choice> pairwise_choices()
{
    std::vector<std::vector<char>> met(factors * factors);
    std::size_t missing = 0;
    for (int a = 0; a < factors; ++a)
        for (int b = a + 1; b < factors; ++b) {
            met[static_cast<std::size_t>(a * factors + b)].assign(static_cast<std::size_t>(levels[a] * levels[b]), 0);
            missing += static_cast<std::size_t>(levels[a] * levels[b]);
        }
    const auto cell = [&](int a, int b, const choice& c) -> char& {
        return met[static_cast<std::size_t>(a * factors + b)][static_cast<std::size_t>(c[static_cast<std::size_t>(a)] * levels[b] +
                                                                                      c[static_cast<std::size_t>(b)])];
    };
    const auto gain = [&](const choice& c) {
        int fresh = 0;
        for (int a = 0; a < factors; ++a)
            for (int b = a + 1; b < factors; ++b) fresh += !cell(a, b, c);
        return fresh;
    };
    support::random_source random(41);
    std::vector<choice> chosen;
    while (missing > 0) {
        choice best{};
        int best_gain = -1;
        for (int attempt = 0; attempt < 60; ++attempt) {
            choice c;
            for (std::size_t i = 0; i < factors; ++i) c[i] = static_cast<int>(random.below(static_cast<std::size_t>(levels[i])));
            if (const int g = gain(c); g > best_gain) {
                best_gain = g;
                best = c;
            }
        }
        if (best_gain <= 0) {  // luck has run out: take the first pair that is still missing
            for (int a = 0; a < factors && best_gain <= 0; ++a)
                for (int b = a + 1; b < factors && best_gain <= 0; ++b)
                    for (int i = 0; i < levels[a] * levels[b] && best_gain <= 0; ++i)
                        if (!met[static_cast<std::size_t>(a * factors + b)][static_cast<std::size_t>(i)]) {
                            best[static_cast<std::size_t>(a)] = i / levels[b];
                            best[static_cast<std::size_t>(b)] = i % levels[b];
                            best_gain = 1;
                        }
        }
        for (int a = 0; a < factors; ++a)
            for (int b = a + 1; b < factors; ++b) {
                missing -= !cell(a, b, best);
                cell(a, b, best) = 1;
            }
        chosen.push_back(best);
    }
    return chosen;
}

kvarn::format format_of(const choice& c)
{
    kvarn::format_spec spec;
    spec.head_dim_k = head_dims[c[by_head_dim]];
    const int other[] = {spec.head_dim_k, 128, spec.head_dim_k, 64, spec.head_dim_k, 512, 96, 36};
    spec.head_dim_v = other[c[by_value_head_dim]];
    spec.key_bits = key_widths[c[by_key_bits]];
    spec.value_bits = value_widths[c[by_value_bits]];
    spec.group = groups[c[by_group]];
    if (c[by_rotation] % 2 != 0) spec.key_rotation = kvarn::rotation::none;
    if (c[by_rotation] / 2 != 0) spec.value_rotation = kvarn::rotation::none;
    const int exact[] = {0, 4, 64};
    spec.exact_channels = exact[c[by_exact]];
    return support::make(spec);
}

/// Encodes with `Arch`, compares with the reference and checks the bytes that are no code.
template <class Arch>
support::agreement check_tile(const kvarn::format& f, const support::kv_tiles& x, const support::reference_tile& wanted, int type)
{
    const support::bytes record = type == 0   ? support::encode<Arch, float>(f, x, support::paper())
                                  : type == 1 ? support::encode<Arch, kvarn::half>(f, x, support::paper())
                                              : support::encode<Arch, kvarn::bfloat16>(f, x, support::paper());
    const support::agreement seen = support::compare_record(f, record.data(), wanted);
    CAPTURE(seen.code_bytes, seen.different_code_bytes, seen.worst_difference);
    CHECK(seen.worst_difference <= 4e-3);
    CHECK(seen.different_code_bytes <= 2 + seen.code_bytes / 500);  // one tile; check_total holds all of them to 1 in 5,000

    const reference::shape s = support::shape_of(f);
    CHECK(reference::decoded_exact(s, record.data()) == support::exact_matrix(f, x, 0, 0));
    std::size_t padding_not_zero = 0;
    for (std::size_t i = reference::offsets(s).end; i < record.size(); ++i) padding_not_zero += record[i] != 0;
    CHECK(padding_not_zero == 0);

    // And back: dequantize_kv against the reference's reader.
    const auto y = support::decode<Arch>(f, record, 1, 1, kvarn::basis::original);
    const reference::matrix keys = reference::decoded_keys(s, record.data());
    const double keys_differ =
        support::relative_maximum_difference(support::key_matrix(f, y, 0, 0), s.rotate.k ? reference::unrotated(keys) : keys);
    CHECK(keys_differ <= 2e-6);
    if (f.has_values()) {
        const reference::matrix values = reference::decoded_values(s, record.data());
        const double values_differ =
            support::relative_maximum_difference(support::value_matrix(f, y, 0, 0), s.rotate.v ? reference::unrotated(values) : values);
        CHECK(values_differ <= 2e-6);
    }
    CHECK(support::exact_matrix(f, y, 0, 0) == support::exact_matrix(f, x, 0, 0));
    return seen;
}

void check_total(const support::agreement& all)
{
    CAPTURE(all.code_bytes, all.different_code_bytes, all.mean_difference(), all.worst_difference);
    CHECK(all.codes_agree());
    CHECK(all.mean_difference() <= 1.5e-3);
}

/// Values as bfloat16 would hold them, so that every input type carries the same tile.
void coarsen(std::vector<float>& values)
{
    for (float& v : values) v = static_cast<float>(reference::bfloat16_value(reference::bfloat16_bits(v)));
}

}  // namespace

TEST_CASE("quantize/reference: a pairwise covering selection of formats agrees with the reference", "[unit]")
{
    support::random_source random(42);
    support::agreement portable_total, native_total;
    const std::vector<choice> choices = pairwise_choices();
    CHECK(choices.size() >= 22 * 8);
    for (const choice& c : choices) {
        const kvarn::format f = format_of(c);
        const auto kind = support::all_tile_kinds[c[by_kind]];
        INFO(support::describe(f) << ", " << support::name_of(kind) << ", input type " << c[by_type]);
        auto x = support::random_tiles(random, f, 1, 1, kind);
        if (c[by_type] == 2) {
            coarsen(x.k);
            coarsen(x.v);
        }
        const auto wanted = support::reference_of(f, x, 0, 0);
        portable_total.add(check_tile<kvarn::simd::portable>(f, x, wanted, c[by_type]));
        native_total.add(check_tile<kvarn::simd::native_arch>(f, x, wanted, c[by_type]));
    }
    check_total(portable_total);
    check_total(native_total);
}

TEST_CASE("quantize/reference: the shapes of latent attention and of unequal heads", "[unit]")
{
    struct shape_case {
        int dk, dv, kb, vb, exact;
    };
    support::random_source random(43);
    support::agreement all;
    for (const shape_case& c : {shape_case{192, 128, 4, 2, 0}, {192, 128, 2, 4, 0}, {576, 512, 4, 4, 0}, {576, 512, 3, 5, 0},
                                {512, 512, 4, 0, 64}, {512, 512, 8, 0, 64}, {128, 128, 4, 2, 64}, {512, 64, 2, 0, 64}})
        for (const int group : {64, 128}) {
            kvarn::format_spec spec;
            spec.head_dim_k = c.dk;
            spec.head_dim_v = c.dv;
            spec.key_bits = c.kb;
            spec.value_bits = c.vb;
            spec.group = group;
            spec.exact_channels = c.exact;
            const kvarn::format f = support::make(spec);
            INFO(support::describe(f));
            const auto x = support::random_tiles(random, f, 1, 1, support::tile_kind::channel_outliers);
            all.add(check_tile<kvarn::simd::native_arch>(f, x, support::reference_of(f, x, 0, 0), 1));
        }
    check_total(all);
}

TEST_CASE("quantize/reference: head_dims without rotation that are no power of anything", "[unit]")
{
    support::random_source random(44);
    support::agreement all;
    for (const int d : {44, 52, 60, 68, 76, 84, 92, 100, 108, 116, 124, 132, 140, 148, 172, 204, 236, 260, 300, 340, 404, 500, 572})
        for (const int bits : {2, 3, 5}) {
            kvarn::format_spec spec;
            spec.head_dim_k = d;
            spec.head_dim_v = 616 - d <= 576 ? 616 - d : d;
            spec.key_bits = bits;
            spec.value_bits = bits == 2 ? 6 : bits == 3 ? 3 : 5;
            spec.group = 32;
            spec.key_rotation = spec.value_rotation = kvarn::rotation::none;
            const kvarn::format f = support::make(spec);
            INFO(support::describe(f));
            const auto x = support::random_tiles(random, f, 1, 1, support::tile_kind::channel_offsets);
            const auto wanted = support::reference_of(f, x, 0, 0);
            all.add(check_tile<kvarn::simd::portable>(f, x, wanted, 0));
            all.add(check_tile<kvarn::simd::native_arch>(f, x, wanted, 1));
        }
    check_total(all);
}

TEST_CASE("quantize/reference: any finite record decodes to what its bytes say", "[unit]")
{
    support::random_source random(45);
    for (const choice& c : pairwise_choices()) {
        const kvarn::format f = format_of(c);
        const reference::shape s = support::shape_of(f);
        const reference::field_offsets at = reference::offsets(s);
        support::bytes record(kvarn::record_bytes(f));
        for (auto& b : record) b = static_cast<std::uint8_t>(random.bits());
        const auto scalars = [&](std::size_t first, std::size_t last) {  // moderate halves of both signs, subnormals among them
            for (std::size_t i = first; i < last; i += 2) {
                const auto exponent = random.below(8) == 0 ? 0u : static_cast<unsigned>(8 + random.below(12));
                const auto bits = static_cast<unsigned>(random.bits() & 0x83ffu) | exponent << 10;
                record[i] = static_cast<std::uint8_t>(bits);
                record[i + 1] = static_cast<std::uint8_t>(bits >> 8);
            }
        };
        scalars(at.k_channel_scale, at.v_codes);
        scalars(at.v_channel_scale, at.end);
        INFO(support::describe(f));
        const reference::matrix keys = reference::decoded_keys(s, record.data());
        const reference::matrix values = f.has_values() ? reference::decoded_values(s, record.data()) : reference::matrix();
        support::for_each_arch([&](auto arch) {
            using arch_type = decltype(arch);
            const auto y = support::decode<arch_type>(f, record, 1, 1, kvarn::basis::rotated);
            const double keys_differ = support::relative_maximum_difference(support::key_matrix(f, y, 0, 0), keys);
            CHECK(keys_differ <= 1e-6);
            if (f.has_values()) {
                const double values_differ = support::relative_maximum_difference(support::value_matrix(f, y, 0, 0), values);
                CHECK(values_differ <= 1e-6);
            }
            CHECK(support::exact_matrix(f, y, 0, 0) == reference::decoded_exact(s, record.data()));
        });
    }
}

TEST_CASE("quantize/reference: every head_dim, width, group and rotation agrees with the reference", "[.][slow]")
{
    support::random_source random(46);
    support::agreement portable_total, native_total;
    for (const int head_dim : head_dims)
        for (const int group : groups)
            for (const bool rotate : {false, true})
                for (const auto kind : support::all_tile_kinds) {
                    kvarn::format_spec spec;
                    spec.head_dim_k = spec.head_dim_v = head_dim;
                    spec.group = group;
                    if (!rotate) spec.key_rotation = spec.value_rotation = kvarn::rotation::none;
                    const auto x = support::random_tiles(random, support::make(spec), 1, 1, kind);
                    const auto wanted = support::reference_of(support::make(spec), x, 0, 0);
                    for (std::size_t i = 0; i < std::size(key_widths); ++i) {
                        spec.key_bits = key_widths[i];
                        spec.value_bits = key_widths[(i + 1 + static_cast<std::size_t>(kind)) % std::size(key_widths)];
                        const kvarn::format f = support::make(spec);
                        INFO(support::describe(f) << ", " << support::name_of(kind));
                        if (kind == support::tile_kind::gaussian)
                            portable_total.add(check_tile<kvarn::simd::portable>(f, x, wanted, 0));
                        native_total.add(check_tile<kvarn::simd::native_arch>(f, x, wanted, 1));
                    }
                }
    check_total(portable_total);
    check_total(native_total);
}
