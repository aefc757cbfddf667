// SPDX-License-Identifier: Apache-2.0
// Input that is in the basis of the records already: the record of a format without rotation for the same values.

#include <cstddef>
#include <string>
#include <vector>

#include "../catch.hpp"
#include "../support/library.hpp"

using kvarn::basis;
using kvarn::status;

namespace {

struct call_result {
    status result;
    support::bytes records;
    std::vector<kvarn::record_errors> errors;
};

template <class Arch, class T>
call_result seal(const kvarn::format& f, const support::kv_tiles& x, const kvarn::encode_options& options)
{
    const std::vector<T> k = support::stored<T>(x.k), v = support::stored<T>(x.v);
    call_result r{status::ok, support::bytes(kvarn::grid_bytes(f, x.tiles, x.heads), 0xa5), std::vector<kvarn::record_errors>(x.tiles * x.heads)};
    std::vector<std::byte> scratch(kvarn::scratch_bytes(f));
    std::vector<T> copy_k = k, copy_v = v;
    r.result = kvarn::quantize_kv<Arch>(f, support::dense_keys(f, copy_k.data(), x.tiles, x.heads), support::dense_values(f, copy_v.data(), x.tiles, x.heads),
                                        kvarn::tile_major_records(f, support::as_bytes(r.records.data()), r.records.size(), x.tiles, x.heads),
                                        std::span<std::byte>(scratch), options, {}, std::span(r.errors));
    return r;
}

bool same(const kvarn::part_errors& a, const kvarn::part_errors& b)
{
    return a.worst_scale_error == b.worst_scale_error && a.worst_relative_error == b.worst_relative_error && a.relative_error == b.relative_error;
}

kvarn::format without_rotation(const kvarn::format& f, bool keys, bool values)
{
    kvarn::format_spec spec = f.spec();
    if (keys) spec.key_rotation = kvarn::rotation::none;
    if (values) spec.value_rotation = kvarn::rotation::none;
    return support::make(spec);
}

kvarn::encode_options rotated(kvarn::encode_options options, bool keys, bool values)
{
    if (keys) options.key_basis = basis::rotated;
    if (values) options.value_basis = basis::rotated;
    return options;
}

/// Values that say what is wrong where they are not equal: statuses, bytes and errors of both ways.
template <class Arch, class T>
void check(const kvarn::format& f, const support::kv_tiles& x, const kvarn::encode_options& options)
{
    for (const bool keys : {false, true})
        for (const bool values : {false, true}) {
            const call_result got = seal<Arch, T>(f, x, rotated(options, keys, values));
            const call_result wanted = seal<Arch, T>(without_rotation(f, keys, values), x, options);
            INFO(support::describe(f) << ", " << kvarn::simd::arch_traits<Arch>::name << ", " << sizeof(T) << " bytes, encoder "
                                      << static_cast<int>(options.encoder) << (keys ? ", K" : "") << (values ? ", V" : "") << " given rotated: "
                                      << kvarn::message(got.result) << ", wanted " << kvarn::message(wanted.result));
            CHECK(got.result == wanted.result);
            CHECK(got.records == wanted.records);
            for (std::size_t i = 0; i < got.errors.size(); ++i) {
                CHECK(same(got.errors[i].k, wanted.errors[i].k));
                CHECK(same(got.errors[i].v, wanted.errors[i].v));
            }
        }
}

std::vector<kvarn::format> formats()
{
    // The last: V in the original basis, where value_basis means nothing; and a format without V.
    return {support::make(reference::shape{128, 64, 4, 2, 32, true, 0}), support::make(reference::shape{64, 96, 3, 5, 64, true, 8}),
            support::make(reference::shape{36, 80, 2, 8, 32, true, 4}), support::make(reference::shape{256, 32, 6, 4, 32, {true, false}, 0}),
            support::make(reference::shape{128, 128, 4, 0, 32, true, 64})};
}

}  // namespace

TEST_CASE("quantize/input_basis: rotated input gives the record of a format that does not rotate", "[unit]")
{
    support::random_source random(111);
    for (const kvarn::format& f : formats())
        for (const auto& options : {kvarn::encode_options{}, support::paper()}) {
            const auto x = support::random_tiles(random, f, 2, 2, support::tile_kind::channel_outliers);
            check<kvarn::simd::native_arch, float>(f, x, options);
            check<kvarn::simd::native_arch, kvarn::half>(f, x, options);
            check<kvarn::simd::native_arch, kvarn::bfloat16>(f, x, options);
            check<kvarn::simd::portable, float>(f, x, options);
        }
}

TEST_CASE("quantize/input_basis: where the format does not rotate, both bases are the same", "[unit]")
{
    support::random_source random(112);
    const kvarn::format f = support::make(reference::shape{64, 64, 4, 4, 32, false, 8});
    const auto x = support::random_tiles(random, f, 1, 2, support::tile_kind::token_outliers);
    const auto plain = seal<kvarn::simd::native_arch, float>(f, x, {}), told = seal<kvarn::simd::native_arch, float>(f, x, rotated({}, true, true));
    CHECK(plain.result == status::ok);
    CHECK(told.result == status::ok);
    CHECK(told.records == plain.records);
}

TEST_CASE("quantize/input_basis: what rotate() gives is sealed as if quantize_kv had rotated it", "[unit]")
{
    support::random_source random(113);
    for (const kvarn::format& f : formats()) {
        const auto x = support::random_tiles(random, f, 2, 2, support::tile_kind::channel_offsets);
        support::kv_tiles turned = x;
        auto keys = support::dense_keys(f, turned.k.data(), x.tiles, x.heads), values = support::dense_values(f, turned.v.data(), x.tiles, x.heads);
        keys.channels = static_cast<std::size_t>(f.head_dim_k());  // the exact channels stay
        REQUIRE(kvarn::rotate(keys) == status::ok);
        if (f.has_values() && f.values_rotated()) REQUIRE(kvarn::rotate(values) == status::ok);
        const auto wanted = seal<kvarn::simd::native_arch, float>(f, x, {}), got = seal<kvarn::simd::native_arch, float>(f, turned, rotated({}, true, true));
        INFO(support::describe(f));
        CHECK(got.result == status::ok);
        CHECK(got.records == wanted.records);
        // And it comes back in either basis.
        const auto back = support::decode(f, got.records, 2, 2, basis::rotated);
        CHECK(reference::relative_difference(support::key_matrix(f, back, 1, 1), support::key_matrix(f, turned, 1, 1)) < 0.7);
        const auto original = support::decode(f, got.records, 2, 2, basis::original);
        CHECK(reference::relative_difference(support::key_matrix(f, original, 1, 1), support::key_matrix(f, x, 1, 1)) < 0.7);
    }
}

TEST_CASE("quantize/input_basis: what overflows is decided by the basis of the input", "[unit]")
{
    support::random_source random(114);
    const kvarn::format f = support::make(reference::shape{64, 128, 4, 4, 32, true, 8});
    int refused = 0, accepted = 0;
    for (const float magnitude : {4000.0f, 7000.0f, 30000.0f, 47999.0f, 60000.0f, 3e5f, 1e6f, 3e7f, 1e9f, 1e12f})
        for (const bool whole : {false, true})
            for (const auto& options : {kvarn::encode_options{}, support::paper()}) {
                auto x = support::random_tiles(random, f, 1, 1, support::tile_kind::gaussian);
                if (whole) {
                    for (std::size_t i = 0; i < x.k.size(); ++i)
                        if (i % 72 < 64) x.k[i] = i % 2 ? magnitude : -magnitude;
                    for (std::size_t i = 0; i < x.v.size(); ++i) x.v[i] = i % 3 ? magnitude : -magnitude;
                } else {
                    x.k[3] = magnitude;
                    x.v[5] = magnitude;
                }
                INFO(magnitude);
                check<kvarn::simd::native_arch, float>(f, x, options);
                (seal<kvarn::simd::native_arch, float>(f, x, rotated(options, true, true)).result == status::ok ? accepted : refused) += 1;
            }
    CHECK(refused >= 4);
    CHECK(accepted >= 12);
    // A constant token: rotated it would lie in one channel, eight times as large.
    auto x = support::random_tiles(random, f, 1, 1, support::tile_kind::gaussian);
    for (std::size_t i = 0; i < 64; ++i) x.k[i] = 40000.0f;
    check<kvarn::simd::native_arch, float>(f, x, support::paper(0));
}
