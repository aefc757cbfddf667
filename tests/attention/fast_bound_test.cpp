// SPDX-License-Identifier: Apache-2.0
// attention_options::fast_bound: which rows of a tile take 16-bit weights for K with `fast`. It is a matter of the record and the row alone.

#include <cmath>
#include <limits>
#include <vector>

#include "../catch.hpp"
#include "../support/attention.hpp"

namespace {

constexpr float infinity = std::numeric_limits<float>::infinity();
constexpr std::size_t tiles = 3;

/// K in bytes where the bound lets it; the 3 bits of V have no product of bytes, so that V is the same for `fine` and `fast`.
const kvarn::format f = *kvarn::parse_format("k4v3_g64", 64);

struct records {
    support::bytes data;

    records()
    {
        support::random_source random(71);
        data = support::encode(f, support::random_tiles(random, f, tiles, 1, support::tile_kind::gaussian));
    }
    [[nodiscard]] kvarn::kv_segment segment() const
    {
        return kvarn::sealed_tiles(f, kvarn::tile_major_records(f, support::as_bytes(data.data()), data.size(), tiles, 1), 0);
    }
};

/// `rows` query heads, each twice as large as the one before: scores of standard deviation 0.1, 0.2, ...
std::vector<float> queries(std::size_t rows)
{
    std::vector<float> q(rows * 64);
    support::random_source random(72);
    for (std::size_t i = 0; i < q.size(); ++i)
        q[i] = static_cast<float>(std::ldexp(0.1 * random.gaussian(), static_cast<int>(i / 64)));
    return q;
}

/// The outputs of query heads [first, first + rows) of q, as one task.
template <class Arch = kvarn::simd::native_arch>
std::vector<float> attend(const kvarn::kv_segment& history, const std::vector<float>& q, std::size_t first, std::size_t rows,
                          kvarn::precision p, float bound)
{
    std::vector<float> out(rows * 64, -77.0f);
    kvarn::attention_task task;
    task.history = {&history, 1};
    task.q = kvarn::token_major(q.data() + first * 64, 1, rows, 64);
    task.out = kvarn::token_major(out.data(), 1, rows, 64);
    kvarn::attention_options options;
    options.precision = p;
    options.fast_bound = bound;
    std::vector<std::byte> scratch(kvarn::attention_scratch_bytes(f, rows));
    support::expect_ok(kvarn::attend<Arch>(f, task, options, scratch));
    return out;
}

using kvarn::precision;

}  // namespace

TEST_CASE("attention/fast_bound: none and any", "[unit]")
{
    const records r;
    const auto q = queries(4);
    const auto fine = attend(r.segment(), q, 0, 4, precision::fine, 0.03f);
    CHECK(support::same_bits(attend(r.segment(), q, 0, 4, precision::fast, 0.0f), fine));
    CHECK_FALSE(support::same_bits(attend(r.segment(), q, 0, 4, precision::fast, infinity), fine));
    CHECK(support::same_bits(attend(r.segment(), q, 0, 4, precision::fine, infinity), fine));  // only fast asks for it
}

TEST_CASE("attention/fast_bound: of rows in one task each decides for itself, on every instruction set", "[unit]")
{
    const records r;
    constexpr std::size_t rows = 9;
    const auto q = queries(rows);
    const auto together = attend<kvarn::simd::portable>(r.segment(), q, 0, rows, precision::fast, 0.03f);
    support::for_each_arch([&](auto arch) {
        CHECK(support::same_bits(attend<decltype(arch)>(r.segment(), q, 0, rows, precision::fast, 0.03f), together));
    });
    std::size_t as_fine = 0, as_fast = 0;
    for (std::size_t row = 0; row < rows; ++row) {
        INFO("row " << row);
        const auto alone = attend(r.segment(), q, row, 1, precision::fast, 0.03f);
        CHECK(support::same_bits(alone, {together.begin() + static_cast<std::ptrdiff_t>(row * 64),
                                         together.begin() + static_cast<std::ptrdiff_t>((row + 1) * 64)}));
        const auto fine = attend(r.segment(), q, row, 1, precision::fine, 0.0f);
        const auto unbound = attend(r.segment(), q, row, 1, precision::fast, infinity);
        CHECK_FALSE(support::same_bits(fine, unbound));
        as_fine += support::same_bits(alone, fine);
        as_fast += support::same_bits(alone, unbound);
    }
    CHECK(as_fine >= 2);  // the largest queries
    CHECK(as_fast >= 4);  // the smallest
}

TEST_CASE("attention/fast_bound: scales of tokens that are not in the history do not count", "[unit]")
{
    const records r;
    records other = r;
    // Token 63 of the last tile gets a scale of 30000.
    const std::size_t last = (tiles - 1) * kvarn::record_bytes(f) + kvarn::layout_of(f).k_token_scale + 2 * 63;
    const kvarn::half large = kvarn::to_half(30000.0f);
    other.data[last] = static_cast<std::uint8_t>(large.bits & 0xff);
    other.data[last + 1] = static_cast<std::uint8_t>(large.bits >> 8);
    const auto q = queries(3);
    const auto without = [](const records& x) { return kvarn::first_tokens(f, x.segment(), tiles * 64 - 1); };
    CHECK(support::same_bits(attend(without(r), q, 0, 3, precision::fast, 0.03f), attend(without(other), q, 0, 3, precision::fast, 0.03f)));
    CHECK_FALSE(support::same_bits(attend(without(r), q, 0, 3, precision::fast, 0.03f), attend(without(r), q, 0, 3, precision::fine, 0.03f)));
}
