// SPDX-License-Identifier: Apache-2.0
// Every status that quantize_kv and dequantize_kv can return, and that nothing is written then.

#include <cmath>
#include <cstdint>
#include <functional>
#include <limits>
#include <string>
#include <vector>

#include <kvarn/interop/owning.hpp>

#include "../catch.hpp"
#include "../support/library.hpp"

using kvarn::status;

namespace {

constexpr std::size_t tiles = 3, heads = 2;

kvarn::format test_format(int exact_channels = 0)
{
    kvarn::format_spec spec;
    spec.head_dim_k = 64;
    spec.head_dim_v = 96;
    spec.group = 32;
    spec.exact_channels = exact_channels;
    return support::make(spec);
}

/// One call of quantize_kv with everything right; a test changes what it wants wrong.
struct encode_call {
    kvarn::format format;
    std::vector<float> k, v;
    support::bytes records;
    std::vector<std::byte> scratch_memory;
    kvarn::kv_view<float> k_view, v_view;
    kvarn::record_grid<std::byte> grid;
    std::span<std::byte> scratch;
    kvarn::encode_options options;
    kvarn::record_range range;

    explicit encode_call(const kvarn::format& f) : format(f)
    {
        support::random_source random(51);
        auto x = support::random_tiles(random, f, tiles, heads, support::tile_kind::gaussian);
        k = std::move(x.k);
        v = std::move(x.v);
        records.assign(kvarn::grid_bytes(f, tiles, heads) + 64, 0xa5);
        scratch_memory.resize(kvarn::scratch_bytes(f));
        k_view = support::dense_keys(f, k.data(), tiles, heads);
        v_view = support::dense_values(f, v.data(), tiles, heads);
        grid = kvarn::tile_major_records(f, support::as_bytes(records.data()), records.size() - 64, tiles, heads);
        scratch = scratch_memory;
    }
    status run() { return kvarn::quantize_kv(format, k_view, v_view, grid, scratch, options, range); }
    [[nodiscard]] bool untouched() const
    {
        for (const auto b : records)
            if (b != 0xa5) return false;
        return true;
    }
    float& key(std::size_t token, std::size_t head, std::size_t channel)
    {
        return k[(token * heads + head) * static_cast<std::size_t>(format.key_channels()) + channel];
    }
    float& value(std::size_t token, std::size_t head, std::size_t channel)
    {
        return v[(token * heads + head) * static_cast<std::size_t>(format.head_dim_v()) + channel];
    }
};

/// The same for dequantize_kv, on good records.
struct decode_call {
    kvarn::format format;
    support::bytes records;
    std::vector<float> k, v;
    std::vector<std::byte> scratch_memory;
    kvarn::kv_view<float> k_view, v_view;
    kvarn::record_grid<std::byte> grid;
    std::span<std::byte> scratch;
    kvarn::basis basis = kvarn::basis::original;
    kvarn::record_range range;

    explicit decode_call(const kvarn::format& f) : format(f)
    {
        support::random_source random(52);
        records = support::encode(f, support::random_tiles(random, f, tiles, heads, support::tile_kind::gaussian));
        k.assign(support::tokens_of(f, tiles) * heads * static_cast<std::size_t>(f.key_channels()), -77.0f);
        v.assign(support::tokens_of(f, tiles) * heads * static_cast<std::size_t>(f.head_dim_v()), -77.0f);
        scratch_memory.resize(kvarn::scratch_bytes(f));
        k_view = support::dense_keys(f, k.data(), tiles, heads);
        v_view = support::dense_values(f, v.data(), tiles, heads);
        grid = kvarn::tile_major_records(f, support::as_bytes(records.data()), records.size(), tiles, heads);
        scratch = scratch_memory;
    }
    status run() { return kvarn::dequantize_kv(format, grid, k_view, v_view, basis, scratch, range); }
    [[nodiscard]] bool untouched() const
    {
        for (const float f : k)
            if (f != -77.0f) return false;
        for (const float f : v)
            if (f != -77.0f) return false;
        return true;
    }
};

template <class Call>
void refuses(const kvarn::format& f, status wanted, const std::function<void(Call&)>& spoil)
{
    Call call(f);
    spoil(call);
    const status got = call.run();
    INFO("wanted: " << kvarn::message(wanted) << "; got: " << kvarn::message(got));
    CHECK(got == wanted);
    CHECK(call.untouched());
}

void encode_refuses(status wanted, const std::function<void(encode_call&)>& spoil, int exact = 0)
{
    refuses<encode_call>(test_format(exact), wanted, spoil);
}
void decode_refuses(status wanted, const std::function<void(decode_call&)>& spoil, int exact = 0)
{
    refuses<decode_call>(test_format(exact), wanted, spoil);
}

constexpr float infinity = std::numeric_limits<float>::infinity();
constexpr float not_a_number = std::numeric_limits<float>::quiet_NaN();

}  // namespace

TEST_CASE("quantize/errors: the calls that the other cases spoil are good", "[unit]")
{
    for (const int exact : {0, 8}) {
        encode_call e(test_format(exact));
        CHECK(e.run() == status::ok);
        CHECK(!e.untouched());
        decode_call d(test_format(exact));
        CHECK(d.run() == status::ok);
        CHECK(!d.untouched());
    }
}

TEST_CASE("quantize/errors: a value that is not finite anywhere in the call, and nothing is written", "[unit]")
{
    for (const float bad : {not_a_number, -not_a_number, infinity, -infinity})
        for (const std::size_t token : {0u, 31u, 32u, 95u})
            for (const std::size_t head : {0u, 1u}) {
                INFO("token " << token << ", head " << head);
                for (const std::size_t channel : {0u, 37u, 63u})
                    encode_refuses(status::not_finite, [&](encode_call& c) { c.key(token, head, channel) = bad; });
                for (const std::size_t channel : {0u, 50u, 95u})
                    encode_refuses(status::not_finite, [&](encode_call& c) { c.value(token, head, channel) = bad; });
                for (const std::size_t channel : {0u, 64u, 71u})  // the exact channels are 64 to 71
                    encode_refuses(status::not_finite, [&](encode_call& c) { c.key(token, head, channel) = bad; }, 8);
            }
}

TEST_CASE("quantize/errors: half and bfloat16 inputs that are not finite", "[unit]")
{
    const kvarn::format f = test_format(8);
    const auto check = [&](auto zero, std::initializer_list<std::uint16_t> bad_patterns) {
        using T = decltype(zero);
        encode_call good(f);
        for (const std::uint16_t bad : bad_patterns)
            for (const bool in_values : {false, true})
                for (const bool last : {false, true}) {
                    std::vector<T> k = support::stored<T>(good.k), v = support::stored<T>(good.v);
                    (in_values ? v : k)[last ? (in_values ? v : k).size() - 1 : 0] = T{bad};
                    support::bytes records(good.grid.bytes, 0xa5);
                    const auto grid = kvarn::tile_major_records(f, support::as_bytes(records.data()), records.size(), tiles, heads);
                    CHECK(kvarn::quantize_kv(f, support::dense_keys(f, k.data(), tiles, heads),
                                             support::dense_values(f, v.data(), tiles, heads), grid,
                                             good.scratch) == status::not_finite);
                    CHECK(records == support::bytes(records.size(), 0xa5));
                }
    };
    check(kvarn::half{}, {0x7c00, 0xfc00, 0x7c01, 0x7e00, 0xffff});
    check(kvarn::bfloat16{}, {0x7f80, 0xff80, 0x7f81, 0x7fc0, 0xffff});
}

TEST_CASE("quantize/errors: values whose scales no half can hold", "[unit]")
{
    for (const float huge : {1e10f, 1e15f, 1e19f, 1e25f, 1e30f, 3e38f}) {
        INFO(huge);
        encode_refuses(status::scale_overflow, [&](encode_call& c) {
            for (float& x : c.k) x *= huge / 8.0f;
            for (float& x : c.k) x = std::fmin(std::fmax(x, -huge), huge);
        });
        encode_refuses(status::scale_overflow, [&](encode_call& c) {
            for (float& x : c.v) x *= huge / 8.0f;
            for (float& x : c.v) x = std::fmin(std::fmax(x, -huge), huge);
        });
    }
    for (const float huge : {1e20f, 1e30f, -3e38f}) {  // one value of the last tile
        encode_refuses(status::scale_overflow, [&](encode_call& c) { c.key(95, 1, 63) = huge; });
        encode_refuses(status::scale_overflow, [&](encode_call& c) { c.value(95, 1, 95) = huge; });
    }
    // Exact channels are halves themselves.
    encode_refuses(status::scale_overflow, [&](encode_call& c) { c.key(95, 1, 71) = 70000.0f; }, 8);
    encode_refuses(status::scale_overflow, [&](encode_call& c) { c.key(0, 0, 64) = -1e30f; }, 8);
}

TEST_CASE("quantize/errors: large values that still fit come back", "[unit]")
{
    // Beyond half's range as values, within it as scales: two factors share the magnitude.
    encode_call c(test_format());
    for (float& x : c.k) x *= 20000.0f;
    for (float& x : c.v) x *= 20000.0f;
    REQUIRE(c.run() == status::ok);
    const auto y = support::decode(c.format, support::bytes(c.records.begin(), c.records.end() - 64), tiles, heads, kvarn::basis::original);
    double error = 0.0, norm = 0.0;
    for (std::size_t i = 0; i < c.k.size(); ++i) {
        error += std::pow(static_cast<double>(y.k[i]) - c.k[i], 2);
        norm += std::pow(static_cast<double>(c.k[i]), 2);
    }
    CHECK(std::sqrt(error / norm) < 0.12);
}

TEST_CASE("quantize/errors: null pointers", "[unit]")
{
    encode_refuses(status::null_pointer, [](encode_call& c) { c.k_view.data = nullptr; });
    encode_refuses(status::null_pointer, [](encode_call& c) { c.v_view.data = nullptr; });
    encode_refuses(status::null_pointer, [](encode_call& c) { c.grid.data = nullptr; });
    encode_refuses(status::null_pointer, [](encode_call& c) { c.scratch = {static_cast<std::byte*>(nullptr), 0}; });
    decode_refuses(status::null_pointer, [](decode_call& c) { c.grid.data = nullptr; });
    decode_refuses(status::null_pointer, [](decode_call& c) { c.scratch = {static_cast<std::byte*>(nullptr), 0}; });
    decode_refuses(status::null_pointer, [](decode_call& c) { c.k_view.data = c.v_view.data = nullptr; });
}

TEST_CASE("quantize/errors: shapes that disagree", "[unit]")
{
    using spoiler = std::function<void(kvarn::kv_view<float>&)>;
    const auto all_refuse = [](status why, const std::vector<spoiler>& spoilers) {
        for (const spoiler& spoil : spoilers)
            for (const int exact : {0, 8}) {
                encode_refuses(why, [&](encode_call& c) { spoil(c.k_view); }, exact);
                encode_refuses(why, [&](encode_call& c) { spoil(c.v_view); }, exact);
                decode_refuses(why, [&](decode_call& c) { spoil(c.k_view); }, exact);
                decode_refuses(why, [&](decode_call& c) { spoil(c.v_view); }, exact);
            }
    };
    all_refuse(status::token_count_mismatch, {[](auto& x) { --x.tokens; }, [](auto& x) { ++x.tokens; }, [](auto& x) { x.tokens -= 32; },
                                              [](auto& x) { x.tokens = 0; }});
    all_refuse(status::shape_mismatch, {[](auto& x) { --x.heads; }, [](auto& x) { ++x.heads; }, [](auto& x) { x.heads = 0; },
                                        [](auto& x) { --x.channels; }, [](auto& x) { ++x.channels; }, [](auto& x) { x.channels *= 2; },
                                        [](auto& x) { x.channels = 0; }});
    encode_refuses(status::token_count_mismatch, [](encode_call& c) { --c.grid.tiles; });
    encode_refuses(status::shape_mismatch, [](encode_call& c) { ++c.grid.heads; });
    decode_refuses(status::token_count_mismatch, [](decode_call& c) { ++c.grid.tiles; });
    decode_refuses(status::shape_mismatch, [](decode_call& c) { --c.grid.heads; });
    // Records on top of each other.
    encode_refuses(status::shape_mismatch, [](encode_call& c) { c.grid.head_stride = 8; });
    encode_refuses(status::shape_mismatch, [](encode_call& c) { c.grid.tile_stride = 8; });
    decode_refuses(status::shape_mismatch, [](decode_call& c) { c.grid.tile_stride = 8; });
    // A format without values takes no V.
    kvarn::format_spec spec;
    spec.head_dim_k = 64;
    spec.value_bits = 0;
    spec.group = 32;
    std::vector<float> stray(1000000);
    const auto add_values = [&](auto& c) { c.v_view = kvarn::token_major(stray.data(), 96, heads, 64); };
    refuses<encode_call>(support::make(spec), status::shape_mismatch, add_values);
    refuses<decode_call>(support::make(spec), status::shape_mismatch, add_values);
}

TEST_CASE("quantize/errors: buffers that are too small", "[unit]")
{
    encode_refuses(status::buffer_too_small, [](encode_call& c) { c.scratch = c.scratch.first(c.scratch.size() - 1); });
    encode_refuses(status::buffer_too_small, [](encode_call& c) { c.scratch = c.scratch.first(1); });
    encode_refuses(status::buffer_too_small, [](encode_call& c) { c.grid.bytes -= 8; });
    encode_refuses(status::buffer_too_small, [](encode_call& c) { c.grid.bytes = 0; });
    encode_refuses(status::buffer_too_small, [](encode_call& c) { c.grid.bytes /= 2; });
    encode_refuses(status::buffer_too_small, [](encode_call& c) { c.grid.tile_stride *= 2; });
    encode_refuses(status::buffer_too_small, [](encode_call& c) { c.grid.tile_stride = SIZE_MAX / 2; });
    encode_refuses(status::buffer_too_small, [](encode_call& c) { c.grid.head_stride = SIZE_MAX - 7; });
    decode_refuses(status::buffer_too_small, [](decode_call& c) { c.scratch = c.scratch.first(c.scratch.size() - 1); });
    decode_refuses(status::buffer_too_small, [](decode_call& c) { c.grid.bytes -= 8; });
    decode_refuses(status::buffer_too_small, [](decode_call& c) { c.grid.bytes = 0; });
    decode_refuses(status::buffer_too_small, [](decode_call& c) { c.grid.head_stride *= 6; });
    decode_refuses(status::buffer_too_small, [](decode_call& c) { c.grid.tile_stride = SIZE_MAX - 7; });
}

TEST_CASE("quantize/errors: options out of range", "[unit]")
{
    for (const int iterations : {-1, 65, 1000, std::numeric_limits<int>::min(), std::numeric_limits<int>::max()})
        for (const auto option : {&kvarn::encode_options::iterations, &kvarn::encode_options::refined_iterations,
                                  &kvarn::encode_options::refit_rounds, &kvarn::encode_options::clip_steps})
            encode_refuses(status::bad_argument, [&](encode_call& c) { c.options.*option = iterations; });
    encode_refuses(status::bad_argument, [](encode_call& c) { c.options.encoder = static_cast<kvarn::encoder>(99); });
    encode_refuses(status::bad_argument, [](encode_call& c) { c.options.key_basis = static_cast<kvarn::basis>(2); });
    encode_refuses(status::bad_argument, [](encode_call& c) { c.options.value_basis = static_cast<kvarn::basis>(255); });
    decode_refuses(status::bad_argument, [](decode_call& c) { c.basis = static_cast<kvarn::basis>(7); });
    for (const auto encoder : {kvarn::encoder::paper, kvarn::encoder::refined})
        for (const bool most : {false, true}) {
            encode_call c(test_format());
            c.options = {encoder, most ? 64 : 0, most ? 64 : 0, most ? 16 : 0, most ? 8 : 0};
            CHECK(c.run() == status::ok);
        }
}

TEST_CASE("quantize/errors: room for the errors of every record of the range, or none", "[unit]")
{
    encode_call c(test_format());
    std::vector<kvarn::record_errors> errors(c.grid.tiles * c.grid.heads);
    const auto run = [&](std::size_t room, kvarn::record_range range) {
        return kvarn::quantize_kv(c.format, c.k_view, c.v_view, c.grid, c.scratch, c.options, range, std::span(errors).first(room));
    };
    CHECK(run(errors.size() - 1, {}) == status::buffer_too_small);
    CHECK(run(1, {0, 2}) == status::buffer_too_small);
    CHECK(c.untouched());
    CHECK(run(1, {1, 2}) == status::ok);
    CHECK(run(errors.size(), {}) == status::ok);
}

TEST_CASE("quantize/errors: a record's scalar that is not finite", "[unit]")
{
    const kvarn::format f = test_format();
    const auto at = kvarn::layout_of(f);
    const std::size_t firsts[] = {at.k_channel_scale, at.k_channel_zero, at.k_token_scale,
                                  at.v_channel_scale, at.v_token_scale,  at.v_token_zero};
    const std::size_t lasts[] = {at.k_channel_zero, at.k_token_scale, at.v_codes, at.v_token_scale, at.v_token_zero, at.exact};
    for (std::size_t field = 0; field < 6; ++field)
        for (const std::size_t scalar : {firsts[field], lasts[field] - 2})
            for (const std::uint16_t bad : {0x7c00, 0xfc00, 0x7e00, 0xfdff})
                for (const std::size_t record : {std::size_t{0}, tiles * heads - 1}) {
                    INFO("field " << field << ", byte " << scalar << ", pattern " << bad << ", record " << record);
                    decode_refuses(status::not_finite, [&](decode_call& c) {
                        std::uint8_t* const p = c.records.data() + record * kvarn::record_bytes(f) + scalar;
                        p[0] = static_cast<std::uint8_t>(bad);
                        p[1] = static_cast<std::uint8_t>(bad >> 8);
                    });
                }
    // Codes may be any bytes, patterns of NaN too.
    decode_call c(f);
    for (std::size_t i = 0; i < at.k_channel_scale; ++i) c.records[i] = 0xff;
    CHECK(c.run() == status::ok);
}

TEST_CASE("quantize/errors: an empty grid or range is fine and writes nothing", "[unit]")
{
    encode_call e(test_format());
    e.range = {2, 2};
    CHECK(e.run() == status::ok);
    CHECK(e.untouched());
    e.range = {tiles * heads, tiles * heads + 5};
    CHECK(e.run() == status::ok);
    CHECK(e.untouched());
    e.range = {};
    e.grid.tiles = 0;
    e.k_view.tokens = e.v_view.tokens = 0;
    CHECK(e.run() == status::ok);
    CHECK(e.untouched());
    decode_call d(test_format());
    d.range = {5, 5};
    CHECK(d.run() == status::ok);
    CHECK(d.untouched());
}

TEST_CASE("quantize/errors: only the range's items are read and written", "[unit]")
{
    const kvarn::format f = test_format();
    const std::size_t one = kvarn::record_bytes(f);
    encode_call c(f);
    c.value(0, 0, 3) = not_a_number;  // item 0
    c.range = {3, 5};
    REQUIRE(c.run() == status::ok);
    std::size_t touched_outside = 0;
    for (std::size_t i = 0; i < c.records.size(); ++i) touched_outside += (i < 3 * one || i >= 5 * one) && c.records[i] != 0xa5;
    CHECK(touched_outside == 0);
    c.range = {0, 1};
    CHECK(c.run() == status::not_finite);

    decode_call d(f);
    d.range = {3, 4};  // tile 1, head 1
    REQUIRE(d.run() == status::ok);
    for (std::size_t token = 0; token < 96; ++token)
        for (std::size_t head = 0; head < heads; ++head) {
            const bool inside = token >= 32 && token < 64 && head == 1;
            std::size_t written = 0;
            for (std::size_t i = 0; i < 64; ++i) written += d.k[(token * heads + head) * 64 + i] != -77.0f;
            for (std::size_t i = 0; i < 96; ++i) written += d.v[(token * heads + head) * 96 + i] != -77.0f;
            CHECK(written == (inside ? 160u : 0u));
        }
}

TEST_CASE("quantize/errors: dequantize_kv skips the view that is empty", "[unit]")
{
    decode_call both(test_format(8));
    REQUIRE(both.run() == status::ok);
    decode_call keys(test_format(8));
    keys.v_view = {};
    REQUIRE(keys.run() == status::ok);
    CHECK(support::same_bits(keys.k, both.k));
    CHECK(keys.v == std::vector<float>(keys.v.size(), -77.0f));
    decode_call values(test_format(8));
    values.k_view = {};
    REQUIRE(values.run() == status::ok);
    CHECK(support::same_bits(values.v, both.v));
    CHECK(values.k == std::vector<float>(values.k.size(), -77.0f));
}

TEST_CASE("quantize/errors: the overloads that allocate do and refuse the same", "[unit]")
{
    encode_call plain(test_format(8)), owning(test_format(8));
    REQUIRE(plain.run() == status::ok);
    CHECK(kvarn::quantize_kv(owning.format, owning.k_view, owning.v_view, owning.grid) == status::ok);
    CHECK(owning.records == plain.records);

    decode_call a(test_format(8)), b(test_format(8));
    REQUIRE(a.run() == status::ok);
    CHECK(kvarn::dequantize_kv(b.format, b.grid, b.k_view, b.v_view, kvarn::basis::original) == status::ok);
    CHECK(support::same_bits(a.k, b.k));
    CHECK(support::same_bits(a.v, b.v));

    encode_call spoilt(test_format());
    spoilt.value(95, 1, 95) = not_a_number;
    CHECK(kvarn::quantize_kv(spoilt.format, spoilt.k_view, spoilt.v_view, spoilt.grid) == status::not_finite);
    CHECK(spoilt.untouched());
    kvarn::encode_options options;
    options.iterations = 65;
    CHECK(kvarn::quantize_kv(plain.format, plain.k_view, plain.v_view, plain.grid, options) == status::bad_argument);
}
