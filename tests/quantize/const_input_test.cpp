// SPDX-License-Identifier: Apache-2.0
// Inputs are often views of const memory, and records of const bytes are decoded.

#include <cstddef>
#include <vector>

#include "../catch.hpp"
#include "../support/library.hpp"

TEST_CASE("quantize/const_input: views of const give the same records, const records the same values", "[unit]")
{
    support::random_source random(101);
    const kvarn::format f = support::make(reference::shape{80, 64, 3, 4, 32, true, 4});
    const auto x = support::random_tiles(random, f, 2, 2, support::tile_kind::gaussian);
    const auto wanted = support::encode<kvarn::simd::portable>(f, x);
    const auto decoded = support::decode<kvarn::simd::portable>(f, wanted, 2, 2, kvarn::basis::original);
    std::vector<std::byte> scratch(kvarn::scratch_bytes(f));

    support::bytes records(wanted.size(), 0xa5);
    const kvarn::kv_view<const float> k = support::dense_keys(f, x.k.data(), 2, 2), v = support::dense_values(f, x.v.data(), 2, 2);
    REQUIRE(kvarn::quantize_kv<kvarn::simd::portable>(
                f, k, v, kvarn::tile_major_records(f, support::as_bytes(records.data()), records.size(), 2, 2),
                std::span<std::byte>(scratch)) == kvarn::status::ok);
    CHECK(records == wanted);

    std::vector<float> k_out(x.k.size()), v_out(x.v.size());
    const kvarn::record_grid<const std::byte> grid = kvarn::tile_major_records(f, support::as_bytes(records.data()), records.size(), 2, 2);
    REQUIRE(kvarn::dequantize_kv<kvarn::simd::portable>(f, grid, support::dense_keys(f, k_out.data(), 2, 2),
                                                        support::dense_values(f, v_out.data(), 2, 2), kvarn::basis::original,
                                                        std::span<std::byte>(scratch)) == kvarn::status::ok);
    CHECK(support::same_bits(k_out, decoded.k));
    CHECK(support::same_bits(v_out, decoded.v));
}
