// SPDX-License-Identifier: Apache-2.0
// The library compiled for avx512vnni; the other tests link to these instances.

#include "../catch.hpp"
#include "../support/library.hpp"

#if defined(KVARN_HAS_AVX512VNNI)
KVARN_TEST_INSTANTIATE(, kvarn::simd::avx512vnni)

TEST_CASE("simd/avx512vnni: a tile survives the way to a record and back", "[unit]")
{
    support::random_source random(5);
    const kvarn::format f;
    const auto x = support::random_tiles(random, f, 1, 1, support::tile_kind::gaussian);
    const auto y = support::decode<kvarn::simd::avx512vnni>(f, support::encode<kvarn::simd::avx512vnni>(f, x), 1, 1, kvarn::basis::original);
    CHECK(reference::relative_difference(support::key_matrix(f, y, 0, 0), support::key_matrix(f, x, 0, 0)) < 0.12);
    CHECK(reference::relative_difference(support::value_matrix(f, y, 0, 0), support::value_matrix(f, x, 0, 0)) < 0.6);
}
#else
TEST_CASE("simd/avx512vnni: not compiled for this machine", "[unit]") { SUCCEED(); }
#endif
