// SPDX-License-Identifier: Apache-2.0

#include <string>

#include <kvarn/layout/format.hpp>

#include "../catch.hpp"

using kvarn::status;

namespace {

status error_of(const kvarn::format_spec& spec) { return kvarn::make_format(spec).error; }

}  // namespace

TEST_CASE("layout/format: names parse to their formats", "[unit]")
{
    for (const int k : {2, 3, 4, 5, 6, 8})
        for (const int v : {0, 2, 3, 4, 5, 6, 8})
            for (const int g : {32, 64, 128, 256})
                for (const char* prefix : {"", "kvarn_"}) {
                    const std::string name = prefix + ("k" + std::to_string(k)) + "v" + std::to_string(v) + "_g" + std::to_string(g);
                    INFO(name);
                    const auto parsed = kvarn::parse_format(name, 96);
                    REQUIRE(parsed.ok());
                    CHECK(parsed->key_bits() == k);
                    CHECK(parsed->value_bits() == v);
                    CHECK(parsed->group() == g);
                    CHECK(parsed->head_dim_k() == 96);
                    CHECK(parsed->head_dim_v() == (v ? 96 : 0));
                    CHECK(parsed->has_values() == (v != 0));
                    CHECK((parsed->keys_rotated() && parsed->values_rotated()));
                    CHECK(parsed->exact_channels() == 0);
                }
    const auto two = kvarn::parse_format("k4v2_g128", 192, 128);
    REQUIRE(two.ok());
    CHECK((two->head_dim_k() == 192 && two->head_dim_v() == 128));
}

TEST_CASE("layout/format: what is no name is bad_format_name", "[unit]")
{
    for (const char* name :
         {"", "k", "k4", "k4v", "k4v2", "k4v2_", "k4v2_g", "k4v2_g1000", "k4v2_g128x", "k4v2_g128 ", " k4v2_g128", "K4v2_g128",
          "k4V2_g128", "k4v2_G128", "k4v2-g128", "k4v2g128", "v2k4_g128", "kv2_g128", "k4v_g128", "k-4v2_g128", "k+4v2_g128",
          "k4.0v2_g128", "kvarn_", "kvarn", "kvarnk4v2_g128", "kvarn_kvarn_k4v2_g128", "k4v2_g128_", "k0004v2_g128", "k4v2_g0x80"}) {
        INFO('"' << name << '"');
        CHECK(kvarn::parse_format(name, 128).error == status::bad_format_name);
    }
    CHECK(kvarn::parse_format(std::string_view("k4v2_g128\0", 10), 128).error == status::bad_format_name);
    CHECK(kvarn::parse_format(std::string_view{}, 128).error == status::bad_format_name);
}

TEST_CASE("layout/format: names of formats that do not exist say what is wrong", "[unit]")
{
    CHECK(kvarn::parse_format("k44v2_g128", 128).error == status::unsupported_bits);
    CHECK(kvarn::parse_format("k7v2_g128", 128).error == status::unsupported_bits);
    CHECK(kvarn::parse_format("k0v2_g128", 128).error == status::unsupported_bits);
    CHECK(kvarn::parse_format("k4v1_g128", 128).error == status::unsupported_bits);
    CHECK(kvarn::parse_format("k4v999_g128", 128).error == status::unsupported_bits);
    CHECK(kvarn::parse_format("k4v2_g127", 128).error == status::unsupported_group);
    CHECK(kvarn::parse_format("k4v2_g0", 128).error == status::unsupported_group);
    CHECK(kvarn::parse_format("k4v2_g512", 128).error == status::unsupported_group);
    CHECK(kvarn::parse_format("k4v2_g128", 100).error == status::unsupported_head_dim);
    CHECK(kvarn::parse_format("k4v2_g128", 0).error == status::unsupported_head_dim);
    CHECK(kvarn::parse_format("k4v2_g128", -128).error == status::unsupported_head_dim);
    CHECK(kvarn::parse_format("k4v2_g128", 128, 100).error == status::unsupported_head_dim);
}

TEST_CASE("layout/format: exactly the head_dims with a Hadamard matrix are accepted", "[unit]")
{
    for (int d = -8; d <= 1200; ++d) {
        // m * 2^k with m in {1, 12, 20, 28, 36}, from the words of the specification.
        bool known = false;
        for (const int m : {1, 12, 20, 28, 36})
            for (int size = m; size <= 576; size *= 2) known = known || size == d;
        known = known && d >= 32;
        kvarn::format_spec spec;
        spec.head_dim_k = d;
        INFO("head_dim " << d);
        CHECK(error_of(spec) == (known ? status::ok : status::unsupported_head_dim));
        spec.head_dim_k = 128;
        spec.head_dim_v = d;
        CHECK(error_of(spec) == (known ? status::ok : status::unsupported_head_dim));
        spec.value_bits = 0;  // then head_dim_v says nothing
        CHECK(error_of(spec) == status::ok);
    }
}

TEST_CASE("layout/format: without rotation every multiple of four will do", "[unit]")
{
    for (int d = 0; d <= 640; ++d) {
        kvarn::format_spec spec;
        spec.key_rotation = spec.value_rotation = kvarn::rotation::none;
        spec.head_dim_k = d;
        INFO("head_dim " << d);
        CHECK(error_of(spec) == (d >= 32 && d <= 576 && d % 4 == 0 ? status::ok : status::unsupported_head_dim));
    }
}

TEST_CASE("layout/format: K and V are rotated apart", "[unit]")
{
    struct name {
        const char* text;
        bool k, v;
    };
    for (const name& n : {name{"k4v2_g64", true, true}, name{"k4v2_g64_ko", false, true}, name{"k4v2_g64_vo", true, false},
                          name{"kvarn_k4v2_g64_kovo", false, false}, name{"k4v0_g64_ko", false, false}, name{"k4v0_g64_vo", true, true}}) {
        INFO(n.text);
        const auto f = kvarn::parse_format(n.text, 64);
        REQUIRE(f.ok());
        CHECK(f->keys_rotated() == n.k);
        CHECK(f->values_rotated() == n.v);
    }
    for (const char* text : {"k4v2_g64_", "k4v2_g64_o", "k4v2_g64ko", "k4v2_g64_koko", "k4v2_g64_voko", "k4v2_g64_ko ", "k4v2_g64_KO"}) {
        INFO(text);
        CHECK(kvarn::parse_format(text, 64).error == status::bad_format_name);
    }
    // A size that has no Hadamard matrix will do for the part that is not rotated, and for that alone.
    CHECK(kvarn::parse_format("k4v2_g64_ko", 100, 64).ok());
    CHECK(kvarn::parse_format("k4v2_g64_vo", 100, 64).error == status::unsupported_head_dim);
    CHECK(kvarn::parse_format("k4v2_g64_ko", 64, 100).error == status::unsupported_head_dim);
}

TEST_CASE("layout/format: every other field is checked", "[unit]")
{
    for (int bits = -1; bits <= 17; ++bits) {
        const bool known = bits == 2 || bits == 3 || bits == 4 || bits == 5 || bits == 6 || bits == 8;
        kvarn::format_spec spec;
        spec.key_bits = bits;
        CHECK(error_of(spec) == (known ? status::ok : status::unsupported_bits));
        spec.key_bits = 4;
        spec.value_bits = bits;
        CHECK(error_of(spec) == (known || bits == 0 ? status::ok : status::unsupported_bits));
    }
    for (int group = -64; group <= 600; ++group) {
        kvarn::format_spec spec;
        spec.group = group;
        const bool known = group == 32 || group == 64 || group == 128 || group == 256;
        CHECK(error_of(spec) == (known ? status::ok : status::unsupported_group));
    }
    for (int exact = -4; exact <= 300; ++exact) {
        kvarn::format_spec spec;
        spec.exact_channels = exact;
        CHECK(error_of(spec) == (exact >= 0 && exact <= 256 && exact % 4 == 0 ? status::ok : status::unsupported_channels));
    }
    for (kvarn::rotation kvarn::format_spec::*field : {&kvarn::format_spec::key_rotation, &kvarn::format_spec::value_rotation}) {
        kvarn::format_spec spec;
        spec.*field = static_cast<kvarn::rotation>(2);
        CHECK(error_of(spec) == status::bad_argument);
    }
}

TEST_CASE("layout/format: equal descriptions make equal formats", "[unit]")
{
    kvarn::format_spec spec;
    CHECK(kvarn::make_format(spec).value == kvarn::format{});
    CHECK(kvarn::make_format(spec).value == kvarn::parse_format("k4v2_g128", 128).value);
    spec.exact_channels = 64;
    const auto other = kvarn::make_format(spec);
    REQUIRE(other.ok());
    CHECK(!(other.value == kvarn::format{}));
    CHECK(other->key_channels() == 192);
}

TEST_CASE("layout/format: factors multiply to head_dim", "[unit]")
{
    for (int d = 1; d <= 1200; ++d) {
        const kvarn::hadamard_factors f = kvarn::factor_head_dim(d);
        if (!f.outer) continue;
        CHECK(f.outer * f.inner == d);
        CHECK((f.inner & (f.inner - 1)) == 0);
    }
    CHECK(kvarn::factor_head_dim(576).outer == 36);
    CHECK(kvarn::factor_head_dim(576).inner == 16);
    CHECK(kvarn::factor_head_dim(80).outer == 20);
    CHECK(kvarn::factor_head_dim(128).outer == 1);
    CHECK(kvarn::factor_head_dim(6).outer == 0);
    CHECK(kvarn::factor_head_dim(0).outer == 0);
    CHECK(kvarn::factor_head_dim(-4).outer == 0);
}
