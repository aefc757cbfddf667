// SPDX-License-Identifier: Apache-2.0
// Engines' own types: Eigen's 16-bit floats and matrices, the compiler's _Float16, and the overloads that allocate.
#include <cstring>
#include <vector>

#include <kvarn/interop/eigen.hpp>
#include <kvarn/interop/owning.hpp>

#include "../catch.hpp"
#include "../support/library.hpp"

namespace {

constexpr std::size_t tokens = 64, head_dim = 64;

kvarn::format tested_format()
{
    const auto f = kvarn::parse_format("k4v2_g64", static_cast<int>(head_dim));
    REQUIRE(f.ok());
    return f.value;
}

float value_at(std::size_t i) { return static_cast<float>((i * 2654435761u >> 8) % 2001) / 500.0f - 2.0f; }

template <class T>
std::vector<std::byte> seal(kvarn::kv_view<T> k, kvarn::kv_view<T> v)
{
    const kvarn::format f = tested_format();
    std::vector<std::byte> bytes(kvarn::grid_bytes(f, 1, 1));
    REQUIRE(kvarn::quantize_kv(f, k, v, kvarn::tile_major_records(f, bytes.data(), bytes.size(), 1, 1)) == kvarn::status::ok);
    return bytes;
}

template <class T, class Convert>
void check_same_bits(Convert&& convert)
{
    std::vector<T> own(tokens * head_dim);
    std::vector<kvarn::storage_t<T>> stored(own.size());
    for (std::size_t i = 0; i < own.size(); ++i) own[i] = convert(value_at(i));
    std::memcpy(static_cast<void*>(stored.data()), own.data(), own.size() * sizeof(T));
    const auto a = kvarn::head_major(own.data(), tokens, 1, head_dim);
    const auto b = kvarn::head_major(stored.data(), tokens, 1, head_dim);
    const auto records = seal(a, a);
    CHECK(records == seal(b, b));

    const kvarn::format f = tested_format();
    const auto grid = kvarn::tile_major_records(f, records.data(), records.size(), 1, 1);
    REQUIRE(kvarn::dequantize_kv(f, grid, a, kvarn::kv_view<T>{}, kvarn::basis::original) == kvarn::status::ok);
    REQUIRE(kvarn::dequantize_kv(f, grid, b, kvarn::kv_view<kvarn::storage_t<T>>{}, kvarn::basis::original) == kvarn::status::ok);
    CHECK(std::memcmp(own.data(), stored.data(), own.size() * sizeof(T)) == 0);
}

}  // namespace

TEST_CASE("interop/eigen: Eigen's 16-bit types are read and written as the library's own", "[unit]")
{
    check_same_bits<Eigen::half>([](float x) { return Eigen::half(x); });
    check_same_bits<Eigen::bfloat16>([](float x) { return Eigen::bfloat16(x); });
}

TEST_CASE("interop/element: the compiler's _Float16 is read and written as half", "[unit]")
{
#if defined(KVARN_HAS_FLOAT16)
    check_same_bits<_Float16>([](float x) { return static_cast<_Float16>(x); });
#else
    WARN("skipped: this compiler has no _Float16 in C++ (GCC 13, Clang 15 and newer have)");
#endif
}

TEST_CASE("interop/eigen: matrices of either storage order are the same tile", "[unit]")
{
    using row_major = Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
    row_major rows(tokens, head_dim);
    for (Eigen::Index t = 0; t < rows.rows(); ++t)
        for (Eigen::Index d = 0; d < rows.cols(); ++d) rows(t, d) = value_at(static_cast<std::size_t>(t * rows.cols() + d));
    const Eigen::MatrixXf columns = rows;
    const row_major& constant = rows;
    const auto expected = seal(kvarn::view_of(rows), kvarn::view_of(rows));
    CHECK(expected == seal(kvarn::view_of(constant), kvarn::view_of(constant)));
    CHECK(expected == seal(kvarn::view_of(columns), kvarn::view_of(columns)));

    Eigen::MatrixXf decoded = Eigen::MatrixXf::Zero(tokens, head_dim);
    const kvarn::format f = tested_format();
    REQUIRE(kvarn::dequantize_kv(f, kvarn::tile_major_records(f, expected.data(), expected.size(), 1, 1), kvarn::view_of(decoded),
                                 kvarn::kv_view<float>{}, kvarn::basis::original) == kvarn::status::ok);
    CHECK((decoded - columns).norm() < 0.15f * columns.norm());
}

TEST_CASE("interop/owning: the allocating overloads do what the others do, errors included", "[unit]")
{
    const kvarn::format f = tested_format();
    std::vector<float> x(tokens * head_dim);
    for (std::size_t i = 0; i < x.size(); ++i) x[i] = value_at(i);
    const auto view = kvarn::head_major(x.data(), tokens, 1, head_dim);
    std::vector<std::byte> bytes(kvarn::grid_bytes(f, 1, 1)), scratch(kvarn::scratch_bytes(f));
    REQUIRE(kvarn::quantize_kv(f, view, view, kvarn::tile_major_records(f, bytes.data(), bytes.size(), 1, 1), scratch) == kvarn::status::ok);
    CHECK(bytes == seal(view, view));
    CHECK(kvarn::quantize_kv(f, view, view, kvarn::tile_major_records(f, bytes.data(), bytes.size() - 1, 1, 1)) ==
          kvarn::status::buffer_too_small);
}
