// SPDX-License-Identifier: Apache-2.0
#pragma once
// Eigen's types as views: Eigen::half and Eigen::bfloat16 as elements, and row-major matrices of one head as kv_view.
// No copy, no allocation; the view lives as long as the matrix.

#include <Eigen/Core>

#include <kvarn/base/view.hpp>

namespace kvarn {

template <> struct storage_of<Eigen::half> { using type = half; };
template <> struct storage_of<Eigen::bfloat16> { using type = bfloat16; };

/// A matrix [token][channel] of one head (any inner and outer stride) as a view of K or V.
template <class Derived>
[[nodiscard]] auto view_of(Eigen::DenseBase<Derived>& matrix) noexcept
{
    using scalar = typename Derived::Scalar;
    auto& m = matrix.derived();
    const std::ptrdiff_t token = m.rowStride(), channel = m.colStride();
    return kv_view<scalar>{m.data(), static_cast<std::size_t>(m.rows()), 1, static_cast<std::size_t>(m.cols()), token, 0, channel};
}
/// The same of a matrix that is only read.
template <class Derived>
[[nodiscard]] auto view_of(const Eigen::DenseBase<Derived>& matrix) noexcept
{
    using scalar = typename Derived::Scalar;
    const auto& m = matrix.derived();
    const std::ptrdiff_t token = m.rowStride(), channel = m.colStride();
    return kv_view<const scalar>{m.data(), static_cast<std::size_t>(m.rows()), 1, static_cast<std::size_t>(m.cols()), token, 0, channel};
}

}  // namespace kvarn
