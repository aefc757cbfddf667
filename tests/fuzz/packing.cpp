// SPDX-License-Identifier: Apache-2.0
// Bit streams. In: codes or packed bytes, any bits and counts. The kernels of this build and the portable ones agree, the bytes are those
// of docs/record-format.md, packing and unpacking invert each other, and nothing outside of the buffers is read or written.

#include <vector>

#include "kernels.hpp"

namespace {

using fuzz::memory;
using fuzz::require;
using kvarn::status;

template <class Arch>
status pack(int bits, const memory& codes, memory& packed)
{
    return kvarn::pack_codes<Arch>(bits, codes.bytes(), codes.size(), packed.bytes());
}
template <class Arch>
status unpack(int bits, const memory& packed, memory& codes)
{
    return kvarn::unpack_codes<Arch>(bits, packed.bytes(), codes.size(), codes.bytes());
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size)
{
    fuzz::source in(data, size);
    const int bits = in.one_in(16) ? in.take<std::int32_t>() : in.pick({2, 3, 4, 5, 6, 8});
    const bool supported = (bits >= 2 && bits <= 6) || bits == 8;
    const std::size_t misaligned = in.take() % 64;
    const std::span<const std::uint8_t> rest = in.rest();
    const std::size_t count = in.one_in(16) || !supported ? rest.size() : rest.size() / 8 * 8;
    const std::size_t packed_bytes = supported ? count * static_cast<std::size_t>(bits) / 8 : 0;

    memory codes(count, misaligned, 0);
    for (std::size_t i = 0; i < count; ++i)
        codes.bytes()[i] = static_cast<std::uint8_t>(supported ? rest[i] & ((1u << bits) - 1u) : rest[i]);
    memory packed(packed_bytes, misaligned + 5, 0xee), expected(packed_bytes, misaligned % 3, 0x11);
    const status s = pack<kvarn::simd::native_arch>(bits, codes, packed);
    require(s == pack<kvarn::simd::portable>(bits, codes, expected), "both kernels return the same status");
    require(s == (!supported ? status::unsupported_bits : count % 8 != 0 ? status::bad_argument : status::ok), "the status is right");
    packed.require_intact();
    expected.require_intact();
    if (s != status::ok) {
        require(packed.holds_only(0xee) && expected.holds_only(0x11), "an error writes nothing");
        return 0;
    }
    require(same_bytes(packed, expected), "both kernels pack alike");
    for (std::size_t i = 0; i < count * static_cast<std::size_t>(bits); ++i) {
        const std::size_t code = i / static_cast<std::size_t>(bits), bit = i % static_cast<std::size_t>(bits);
        require((packed.bytes()[i / 8] >> (i % 8) & 1) == (codes.bytes()[code] >> bit & 1), "code c has bits [c * bits, (c + 1) * bits)");
    }

    memory back(count, misaligned + 1, 0xee), expected_back(count, misaligned % 2, 0x11);
    require(unpack<kvarn::simd::native_arch>(bits, packed, back) == status::ok &&
                unpack<kvarn::simd::portable>(bits, packed, expected_back) == status::ok,
            "what was packed can be unpacked");
    back.require_intact();
    require(same_bytes(back, codes) && same_bytes(expected_back, codes), "unpacking inverts packing");
    return 0;
}
