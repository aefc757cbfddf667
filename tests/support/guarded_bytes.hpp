// SPDX-License-Identifier: Apache-2.0
#pragma once
// Memory for calls under test: at an odd address, filled, and between bytes that nobody may write.

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

namespace support {

/// Bytes of memory at an odd address between guards.
class guarded_bytes {
public:
    explicit guarded_bytes(std::size_t size, std::size_t misalignment = 1, std::uint8_t fill = 0xff)
        : memory_(size + 2 * guard, 0xa5), at_(guard + misalignment), size_(size)
    {
        std::fill_n(memory_.begin() + static_cast<std::ptrdiff_t>(at_), size, fill);
    }
    [[nodiscard]] std::byte* data() { return reinterpret_cast<std::byte*>(memory_.data() + at_); }
    [[nodiscard]] std::span<std::byte> span() { return {data(), size_}; }
    /// Whether nothing outside was written.
    [[nodiscard]] bool intact() const
    {
        const auto whole = [](std::uint8_t b) { return b == 0xa5; };
        return std::all_of(memory_.begin(), memory_.begin() + static_cast<std::ptrdiff_t>(at_), whole) &&
               std::all_of(memory_.begin() + static_cast<std::ptrdiff_t>(at_ + size_), memory_.end(), whole);
    }

private:
    static constexpr std::size_t guard = 192;
    std::vector<std::uint8_t> memory_;
    std::size_t at_, size_;
};

}  // namespace support
