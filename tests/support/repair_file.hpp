// SPDX-License-Identifier: Apache-2.0
#pragma once
// Makes the checksums of a damaged file of chunks right, so that only the checks behind them are left to notice the damage.

#include <cstddef>
#include <cstdint>
#include <vector>

#include <kvarn/cache/file.hpp>

namespace support {

/// Every checksum of what is there, as far as heads and lengths lead; and the number of chunks that the last one says.
inline void repair_file(std::vector<std::byte>& file)
{
    namespace detail = kvarn::detail;
    const auto sign = [&](std::size_t at) {
        const std::uint64_t sum = detail::checksum(file.data() + at, 24);
        kvarn::put_u64(file.data() + at + 24, sum);
        return sum;
    };
    if (file.size() < kvarn::file_header_bytes) return;
    std::uint64_t total = sign(0), chunks = 0;
    for (std::size_t at = kvarn::file_header_bytes; file.size() - at >= detail::head_bytes; ++chunks) {
        const bool last = kvarn::get_u32(file.data() + at) == kvarn::end_chunk_type;
        if (last) kvarn::put_u64(file.data() + at + 8, chunks);
        const std::uint64_t head = sign(at), bytes = kvarn::get_u64(file.data() + at + 16);
        at += detail::head_bytes;
        if (file.size() - at < 8 || file.size() - at - 8 < bytes) return;
        if (last && bytes == 8) kvarn::put_u64(file.data() + at, total);
        const std::uint64_t payload = detail::checksum(file.data() + at, static_cast<std::size_t>(bytes));
        at += static_cast<std::size_t>(bytes);
        kvarn::put_u64(file.data() + at, payload);
        at += 8;
        total = detail::chain(total, head, payload);
        if (last) return;
    }
}

}  // namespace support
