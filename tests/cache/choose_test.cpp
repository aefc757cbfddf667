// SPDX-License-Identifier: Apache-2.0
// The basis of a head's keys: keys with a few large, quiet channels that queries avoid want the original one, isotropic noise on
// equal channels the rotation; and whatever the caller may get wrong.

#include <cmath>
#include <cstdint>
#include <limits>
#include <numeric>
#include <span>
#include <vector>

#include <kvarn/cache/choose.hpp>

#include "../catch.hpp"
#include "../support/library.hpp"

namespace {

using kvarn::status;

constexpr std::size_t dim = 64, group = 64, queries = 96;

struct head {
    std::vector<float> k = std::vector<float>(2 * group * dim), q = std::vector<float>(queries * dim);

    [[nodiscard]] kvarn::kv_view<const float> keys(std::size_t tiles = 1) const { return kvarn::token_major(k.data(), tiles * group, 1, dim); }
    [[nodiscard]] kvarn::kv_view<const float> all_queries() const { return kvarn::token_major(q.data(), queries / 3, 3, dim); }
};

kvarn::format base(const char* name = "k2v2_g64") { return kvarn::parse_format(name, static_cast<int>(dim)).value; }

/// Keys as some models have them: two channels of 50 times the size, from biases, which carry little of the scores.
head biased_head(std::uint64_t seed)
{
    support::random_source random(seed);
    head h;
    for (std::size_t i = 0; i < h.k.size(); ++i) {
        const std::size_t d = i % dim;
        h.k[i] = static_cast<float>(random.gaussian()) * (d % 29 == 3 ? 8.0f : 0.3f) + (d % 29 == 3 ? 60.0f : 0.0f);
    }
    for (std::size_t i = 0; i < h.q.size(); ++i) h.q[i] = static_cast<float>(random.gaussian()) * (i % dim % 29 == 3 ? 0.02f : 1.0f);
    return h;
}

/// Keys with outlier tokens in every channel alike; queries look everywhere.
head isotropic_head(std::uint64_t seed)
{
    support::random_source random(seed);
    head h;
    for (float& x : h.k) x = static_cast<float>(random.gaussian() * random.gaussian() * random.gaussian());  // heavy tails, which rotations mix away
    for (float& x : h.q) x = static_cast<float>(random.gaussian());
    return h;
}

std::vector<std::uint64_t> moments_of(const head& h, const kvarn::format& f)
{
    std::vector<std::uint64_t> m(dim);
    REQUIRE(kvarn::add_query_moments(f, h.all_queries(), std::span(m)) == status::ok);
    return m;
}

kvarn::result<kvarn::format> choose(const kvarn::format& f, const head& h, std::span<const std::uint64_t> moments,
                                    const kvarn::choose_options& options = {}, std::size_t tiles = 1)
{
    std::vector<std::byte> scratch(kvarn::choose_scratch_bytes(f) + 1);
    return kvarn::choose_format(f, h.keys(tiles), {}, moments, std::span(scratch).subspan(1), options);
}

}  // namespace

TEST_CASE("cache/choose: the basis follows the data", "[unit]")
{
    for (const char* name : {"k2v2_g64", "k4v4_g64", "k4v2_g64_ko", "k3v0_g64"})
        for (std::uint64_t seed = 1; seed <= 4; ++seed) {
            INFO(name << ", seed " << seed);
            const kvarn::format f = base(name);
            const head biased = biased_head(seed), isotropic = isotropic_head(seed);
            const auto off = choose(f, biased, moments_of(biased, f)), on = choose(f, isotropic, moments_of(isotropic, f), {}, 2);
            REQUIRE(off.ok());
            REQUIRE(on.ok());
            CHECK(!off->keys_rotated());
            CHECK(on->keys_rotated());
            CHECK(off->values_rotated() == (f.has_values() ? f.values_rotated() : false));  // V is read from K where there is no V part
            CHECK((off->key_bits() == f.key_bits() && off->value_bits() == f.value_bits() && off->group() == f.group()));
        }
}

TEST_CASE("cache/choose: neither the scale of K or Q nor the order of queries matters", "[unit]")
{
    const kvarn::format f = base();
    const head h = biased_head(7);
    const auto whole = moments_of(h, f);
    std::vector<std::uint64_t> parts(dim), scaled(dim);
    for (std::size_t t = queries / 3; t-- > 0;)
        REQUIRE(kvarn::add_query_moments(f, kvarn::token_range(h.all_queries(), t, 1), std::span(parts)) == status::ok);
    CHECK(parts == whole);
    for (const float by : {0x1p-40f, 0x1p-9f, 0x1p13f, 0x1p60f}) {
        head other = h;
        for (float& x : other.q) x *= by;
        CHECK(moments_of(other, f) == whole);
    }
    // Every query counts once: the moments of n queries add up to n.
    const auto sum = static_cast<double>(std::accumulate(whole.begin(), whole.end(), std::uint64_t{0})) * 0x1p-32;
    CHECK(std::fabs(sum - static_cast<double>(queries)) < 1e-4);
    for (const float by : {0x1p-10f, 0x1p10f}) {
        head other = h;
        for (float& x : other.k) x *= by;
        CHECK(*choose(f, other, whole) == *choose(f, h, whole));
    }
}

TEST_CASE("cache/choose: V leaves the rotation for a channel far from zero, and only then", "[unit]")
{
    for (const char* name : {"k4v4_g64", "k4v4_g64_vo", "k6v6_g64"}) {
        const kvarn::format f = base(name);
        const head h = isotropic_head(5);
        const std::vector<std::uint64_t> none(dim);
        std::vector<float> v = h.q;
        v.resize(group * dim, 0.25f);
        std::vector<std::byte> scratch(kvarn::choose_scratch_bytes(f));
        const auto chosen = [&] { return *kvarn::choose_format(f, h.keys(), kvarn::kv_view<const float>(kvarn::token_major(v.data(), group, 1, dim)), std::span<const std::uint64_t>(none), std::span(scratch)); };
        CHECK(chosen().values_rotated());
        CHECK(chosen().keys_rotated() == f.keys_rotated());  // no queries
        for (std::size_t t = 0; t < group; ++t) v[t * dim + 7] += 300.0f;
        CHECK(!chosen().values_rotated());
    }
}

TEST_CASE("cache/choose: a target in bits takes the widest format of the frontier that fits", "[unit]")
{
    const auto widths = [](const kvarn::result<kvarn::format>& f) { return f.ok() ? 10 * f->key_bits() + f->value_bits() : -1; };
    const kvarn::format f = kvarn::parse_format("k2v2_g128_ko", 128).value;  // 2.375 bits
    CHECK(widths(kvarn::format_within(f, 2.375)) == 22);
    CHECK(widths(kvarn::format_within(f, 2.374)) == -1);
    CHECK(kvarn::format_within(f, 2.0).error == status::unsupported_bits);
    for (const auto& [bits, wanted] : {std::pair{2.9, 32}, std::pair{3.0, 32}, std::pair{3.4, 42}, std::pair{4.374, 42}, std::pair{4.5, 44}, std::pair{6.4, 66},
                                       std::pair{16.0, 88}}) {
        const auto chosen = kvarn::format_within(f, bits);
        CHECK(widths(chosen) == wanted);
        CHECK(!chosen->keys_rotated());
        CHECK(kvarn::bits_per_element(*chosen) <= bits);
    }
    const kvarn::format latent = kvarn::parse_format("k4v0_g128", 512).value;
    CHECK(widths(kvarn::format_within(latent, 4.5)) == 40);
    CHECK(kvarn::bits_per_element(*kvarn::format_within(f, 3.4, kvarn::record_stride::reference), kvarn::record_stride::reference) <= 3.4);
}

TEST_CASE("cache/choose: bits under an error bound", "[unit]")
{
    const kvarn::format f = base("k2v2_g64");
    const head h = isotropic_head(6);
    const std::vector<float> v(h.k.begin() + group * dim, h.k.end());
    const auto moments = moments_of(h, f);
    const auto values = kvarn::kv_view<const float>(kvarn::token_major(v.data(), group, 1, dim));
    std::vector<std::byte> scratch(kvarn::choose_scratch_bytes(f));
    int key_bits = 0, value_bits = 0;
    for (const float bound : {1.0f, 0.18f, 0.12f, 0.08f, 0.04f, 0.015f, 1e-6f}) {
        kvarn::choose_options o;
        o.most_key_error = bound;
        const auto keys_only = *kvarn::choose_format(f, h.keys(), values, std::span<const std::uint64_t>(moments), std::span(scratch), o);
        CHECK(keys_only.value_bits() == 2);
        o.most_value_error = bound;
        const auto both = *kvarn::choose_format(f, h.keys(), values, std::span<const std::uint64_t>(moments), std::span(scratch), o);
        CHECK(both.key_bits() == keys_only.key_bits());
        CHECK(both.key_bits() >= key_bits);
        CHECK(both.value_bits() >= value_bits);
        key_bits = both.key_bits();
        value_bits = both.value_bits();
        CHECK((bound < 1.0f) == (key_bits > 2));
        CHECK((bound < 1.0f) == (value_bits > 2));
        if (bound < 1e-3f) break;
        // What was promised holds.
        std::vector<std::byte> record(kvarn::record_bytes(both)), room(kvarn::scratch_bytes(both));
        const auto grid = kvarn::tile_major_records(both, record.data(), record.size(), 1, 1);
        REQUIRE(kvarn::quantize_kv(both, h.keys(), values, grid, room) == status::ok);
        std::vector<float> a(group * dim), b(group * dim);
        REQUIRE(kvarn::dequantize_kv(both, grid, kvarn::token_major(a.data(), group, 1, dim), kvarn::token_major(b.data(), group, 1, dim),
                                     kvarn::basis::original, room) == status::ok);
        double error = 0, energy = 0, weighted = 0, weighted_energy = 0;
        for (std::size_t i = 0; i < group * dim; ++i) {
            const auto weight = static_cast<double>(moments[i % dim]);
            weighted += weight * std::pow(a[i] - h.k[i], 2);
            weighted_energy += weight * std::pow(h.k[i], 2);
            error += std::pow(b[i] - v[i], 2);
            energy += std::pow(v[i], 2);
        }
        CHECK(std::sqrt(weighted / weighted_energy) <= bound * 1.001);
        CHECK(std::sqrt(error / energy) <= bound * 1.001);
    }
    CHECK(key_bits == 8);
    CHECK(value_bits == 8);
}

TEST_CASE("cache/choose: all instruction sets and element types choose alike", "[unit]")
{
    const kvarn::format f = base();
    for (const head& h : {biased_head(3), isotropic_head(3)}) {
        const auto keys = support::stored<kvarn::half>(h.k), asked = support::stored<kvarn::half>(h.q);
        std::vector<std::uint64_t> first;
        support::for_each_arch([&](auto arch) {
            using arch_type = decltype(arch);
            std::vector<std::uint64_t> m(dim);
            REQUIRE(kvarn::add_query_moments<arch_type>(f, kvarn::token_major(asked.data(), queries, 1, dim), std::span(m)) == status::ok);
            if (first.empty()) first = m;
            CHECK(m == first);
        });
        std::vector<std::byte> scratch(kvarn::choose_scratch_bytes(f));
        const auto chosen = kvarn::choose_format(f, kvarn::kv_view<const kvarn::half>(kvarn::token_major(keys.data(), group, 1, dim)), {},
                                                 std::span<const std::uint64_t>(first), std::span(scratch));
        REQUIRE(chosen.ok());
        CHECK(*chosen == *choose(f, h, moments_of(h, f)));
    }
}

TEST_CASE("cache/choose: without queries nothing changes, and what cannot be rotated is not", "[unit]")
{
    const std::vector<std::uint64_t> none(128);
    for (const char* name : {"k2v2_g64", "k2v2_g64_ko"}) CHECK(*choose(base(name), biased_head(1), none) == base(name));
    head h;
    for (float& x : h.q) x = 0.0f;
    h.q[5] = std::numeric_limits<float>::infinity();
    h.q[dim + 5] = std::numeric_limits<float>::quiet_NaN();
    for (const std::uint64_t m : moments_of(h, base())) CHECK(m == 0);

    const kvarn::format odd = kvarn::parse_format("k2v2_g64_ko", 100, 64).value;
    std::vector<float> k(group * 100, 1.0f);
    std::vector<std::byte> scratch(kvarn::choose_scratch_bytes(odd));
    const auto chosen = kvarn::choose_format(odd, kvarn::token_major(k.data(), group, 1, 100), {}, std::span<const std::uint64_t>(none), std::span(scratch));
    REQUIRE(chosen.ok());
    CHECK(!chosen->keys_rotated());
}

TEST_CASE("cache/choose: what is wrong is named", "[unit]")
{
    const kvarn::format f = base();
    const head h = biased_head(1);
    const auto m = moments_of(h, f);
    std::vector<std::byte> scratch(kvarn::choose_scratch_bytes(f));
    const auto refusal = [&](kvarn::kv_view<const float> k, std::span<const std::uint64_t> moments, std::span<std::byte> room,
                             const kvarn::choose_options& options = {}) { return kvarn::choose_format(f, k, {}, moments, room, options).error; };
    auto view = h.keys();
    CHECK(refusal(view, m, scratch) == status::ok);
    CHECK(refusal(kvarn::first_tokens(view, group - 1), m, scratch) == status::token_count_mismatch);
    CHECK(refusal(kvarn::first_tokens(view, 0), m, scratch) == status::token_count_mismatch);
    view.channels = dim - 4;
    CHECK(refusal(view, m, scratch) == status::shape_mismatch);
    view = h.keys();
    view.heads = 2;
    CHECK(refusal(view, m, scratch) == status::shape_mismatch);
    view = h.keys();
    view.data = nullptr;
    CHECK(refusal(view, m, scratch) == status::null_pointer);
    CHECK(refusal(h.keys(), std::span(m).first(dim - 1), scratch) == status::buffer_too_small);
    CHECK(refusal(h.keys(), m, std::span(scratch).first(scratch.size() - 1)) == status::buffer_too_small);
    for (const float margin : {0.0f, -1.0f, std::numeric_limits<float>::quiet_NaN()}) {
        kvarn::choose_options wrong;
        wrong.margin = margin;
        CHECK(refusal(h.keys(), m, scratch, wrong) == status::bad_argument);
        wrong = {};
        wrong.value_margin = margin;
        CHECK(refusal(h.keys(), m, scratch, wrong) == status::bad_argument);
        if (margin == 0.0f) continue;
        wrong = {};
        wrong.most_key_error = margin;
        CHECK(refusal(h.keys(), m, scratch, wrong) == status::bad_argument);
        wrong = {};
        wrong.most_value_error = margin;
        CHECK(refusal(h.keys(), m, scratch, wrong) == status::bad_argument);
    }
    for (const auto given : {&kvarn::encode_options::key_basis, &kvarn::encode_options::value_basis})
        for (const auto other : {kvarn::basis::rotated, static_cast<kvarn::basis>(2)}) {
            kvarn::choose_options wrong;
            wrong.encode.*given = other;
            CHECK(refusal(h.keys(), m, scratch, wrong) == status::bad_argument);
        }
    const auto refused_values = [&](kvarn::kv_view<const float> v) {
        return kvarn::choose_format(f, h.keys(2), v, std::span<const std::uint64_t>(m), std::span(scratch)).error;
    };
    auto values = h.keys(2);
    CHECK(refused_values(values) == status::ok);
    CHECK(refused_values(h.keys(1)) == status::token_count_mismatch);
    values.channels = dim - 4;
    CHECK(refused_values(values) == status::shape_mismatch);
    values = h.keys(2);
    values.data = nullptr;
    CHECK(refused_values(values) == status::null_pointer);
    kvarn::choose_options bad;
    bad.encode.refit_rounds = 99;
    CHECK(refusal(h.keys(), m, scratch, bad) == status::bad_argument);
    head broken = h;
    broken.k[77] = std::numeric_limits<float>::infinity();
    CHECK(refusal(broken.keys(), m, scratch) == status::not_finite);

    std::vector<std::uint64_t> to(dim);
    CHECK(kvarn::add_query_moments(f, h.all_queries(), std::span(to).first(dim - 1)) == status::buffer_too_small);
    auto q = h.all_queries();
    q.channels = dim - 1;
    CHECK(kvarn::add_query_moments(f, q, std::span(to)) == status::shape_mismatch);
    q = h.all_queries();
    q.data = nullptr;
    CHECK(kvarn::add_query_moments(f, q, std::span(to)) == status::null_pointer);
    CHECK(kvarn::add_query_moments(f, kvarn::first_tokens(h.all_queries(), 0), std::span(to)) == status::ok);
    CHECK(to == std::vector<std::uint64_t>(dim));
}
