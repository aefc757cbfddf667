// SPDX-License-Identifier: Apache-2.0
#pragma once
// Compares a record with what the double-precision reference makes of the same tile.

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdlib>

#include "library.hpp"

namespace support {

/// What was seen over many tiles.
struct agreement {
    std::size_t code_bytes = 0, different_code_bytes = 0;
    std::size_t parts = 0;
    double sum_of_differences = 0.0, worst_difference = 0.0;

    void add_codes(const std::uint8_t* got, const std::uint8_t* wanted, std::size_t count)
    {
        code_bytes += count;
        for (std::size_t i = 0; i < count; ++i) different_code_bytes += got[i] != wanted[i];
    }
    void add_difference(double d)
    {
        ++parts;
        sum_of_differences += d;
        worst_difference = std::max(worst_difference, d);
    }
    void add(const agreement& other)
    {
        code_bytes += other.code_bytes;
        different_code_bytes += other.different_code_bytes;
        parts += other.parts;
        sum_of_differences += other.sum_of_differences;
        worst_difference = std::max(worst_difference, other.worst_difference);
    }
    [[nodiscard]] double mean_difference() const { return parts ? sum_of_differences / static_cast<double>(parts) : 0.0; }
    [[nodiscard]] bool codes_agree() const { return different_code_bytes * 5000 <= code_bytes; }
};

/// The reference's normalisation of one tile; rounding to any number of bits is cheap after that.
struct reference_tile {
    reference::normalized_tile keys, values;
};

inline reference_tile reference_of(const kvarn::format& f, const kv_tiles& x, std::size_t tile, std::size_t head, int iterations = 8)
{
    const reference::shape s = shape_of(f);
    reference_tile r;
    r.keys = reference::normalized_keys(s, key_matrix(f, x, tile, head), iterations);
    if (f.has_values()) r.values = reference::normalized_values(s, value_matrix(f, x, tile, head), iterations);
    return r;
}

/// Code bytes against the reference's, and the decoded part against the reference's exact reconstruction. A code beside the
/// reference's by one (a tie that float broke the other way) is counted among the bytes, and only there: one such code of two
/// bits moves a small tile by more than all its scalars do. A code further off counts in both.
inline agreement compare_part(const reference::part& got, reference::part wanted, const std::uint8_t* stream)
{
    agreement seen;
    const auto codes = reference::packed_codes(wanted.codes, wanted.bits);
    seen.add_codes(stream, codes.data(), codes.size());
    for (Eigen::Index i = 0; i < wanted.codes.rows(); ++i)
        for (Eigen::Index j = 0; j < wanted.codes.cols(); ++j)
            if (std::abs(got.codes(i, j) - wanted.codes(i, j)) == 1) wanted.codes(i, j) = got.codes(i, j);
    seen.add_difference(reference::relative_difference(got.decoded(), wanted.decoded()));
    return seen;
}

inline agreement compare_record(const kvarn::format& f, const std::uint8_t* record, const reference_tile& wanted)
{
    const reference::shape s = shape_of(f);
    const reference::field_offsets at = reference::offsets(s);
    agreement seen = compare_part(reference::read_key_part(s, record), reference::rounded(wanted.keys, s.key_bits), record + at.k_codes);
    if (f.has_values())
        seen.add(compare_part(reference::read_value_part(s, record), reference::rounded(wanted.values, s.value_bits), record + at.v_codes));
    return seen;
}

/// Largest |a - b| over a matrix and a dense library output, relative to the matrix's largest magnitude.
inline double relative_maximum_difference(const reference::matrix& got, const reference::matrix& wanted)
{
    const double largest = wanted.size() ? wanted.cwiseAbs().maxCoeff() : 0.0;
    const double difference = wanted.size() ? (got - wanted).cwiseAbs().maxCoeff() : 0.0;
    return largest > 0.0 ? difference / largest : difference;
}

}  // namespace support
