// SPDX-License-Identifier: Apache-2.0

#include <cstdint>
#include <string>
#include <vector>

#include "../catch.hpp"
#include "../support/library.hpp"

namespace {

constexpr int code_widths[] = {2, 3, 4, 5, 6, 8};
constexpr std::size_t guard = 64;

/// Packs with guards on both sides, checks every bit against the reference's reader and unpacks again.
template <class Arch>
void check_round_trip(int bits, const std::vector<std::uint8_t>& codes, std::size_t misalignment)
{
    const std::size_t count = codes.size(), packed_bytes = count * static_cast<std::size_t>(bits) / 8;
    std::vector<std::uint8_t> packed(guard + misalignment + packed_bytes + guard, 0xc3);
    std::uint8_t* const stream = packed.data() + guard + misalignment;
    REQUIRE(kvarn::pack_codes<Arch>(bits, codes.data(), count, stream) == kvarn::status::ok);
    std::size_t wrong = 0, touched = 0;
    for (std::size_t i = 0; i < count; ++i) wrong += reference::read_code(stream, i, bits) != codes[i];
    for (std::size_t i = 0; i < packed.size(); ++i) {
        const std::uint8_t* const at = packed.data() + i;
        if (at < stream || at >= stream + packed_bytes) touched += *at != 0xc3;
    }
    CHECK(wrong == 0);
    CHECK(touched == 0);

    std::vector<std::uint8_t> unpacked(guard + misalignment + count + guard, 0x99);
    std::uint8_t* const out = unpacked.data() + guard + misalignment;
    REQUIRE(kvarn::unpack_codes<Arch>(bits, stream, count, out) == kvarn::status::ok);
    wrong = touched = 0;
    for (std::size_t i = 0; i < count; ++i) wrong += out[i] != codes[i];
    for (std::size_t i = 0; i < unpacked.size(); ++i) {
        const std::uint8_t* const at = unpacked.data() + i;
        if (at < out || at >= out + count) touched += *at != 0x99;
    }
    CHECK(wrong == 0);
    CHECK(touched == 0);
}

template <class Test>
void for_each_arch_and_width(Test&& test)
{
    support::for_each_arch([&](auto arch) {
        for (const int bits : code_widths) {
            INFO(kvarn::simd::arch_traits<decltype(arch)>::name << ", " << bits << " bits");
            test(arch, bits);
        }
    });
}

}  // namespace

TEST_CASE("codec/packing: a known stream of every width", "[unit]")
{
    // Codes 1, 2, 3, 0, 3, 1, 0, 2 written out by hand, first code in the lowest bits.
    const std::vector<std::uint8_t> codes = {1, 2, 3, 0, 3, 1, 0, 2};
    support::for_each_arch([&](auto arch) {
        using arch_type = decltype(arch);
        const auto packed = [&](int bits) {
            std::vector<std::uint8_t> out(static_cast<std::size_t>(bits), 0xff);
            REQUIRE(kvarn::pack_codes<arch_type>(bits, codes.data(), 8, out.data()) == kvarn::status::ok);
            return out;
        };
        CHECK(packed(2) == std::vector<std::uint8_t>{0x39, 0x87});
        // 3 bits, low bit of every code first: 100 010 110 000 110 100 000 010.
        CHECK(packed(3) == std::vector<std::uint8_t>{0xd1, 0xb0, 0x40});
        CHECK(packed(4) == std::vector<std::uint8_t>{0x21, 0x03, 0x13, 0x20});
        CHECK(packed(8) == codes);
    });
}

TEST_CASE("codec/packing: every code at every position of a block round-trips", "[unit]")
{
    for_each_arch_and_width([](auto arch, int bits) {
        for (std::size_t position = 0; position < 64; ++position)
            for (int code = 0; code < (1 << bits); code += bits == 8 ? 5 : 1) {
                std::vector<std::uint8_t> codes(64, 0), packed(static_cast<std::size_t>(8 * bits), 0xff), back(64, 0xff);
                codes[position] = static_cast<std::uint8_t>(code);
                REQUIRE(kvarn::pack_codes<decltype(arch)>(bits, codes.data(), 64, packed.data()) == kvarn::status::ok);
                bool good = true;
                for (std::size_t i = 0; i < 64; ++i) good = good && reference::read_code(packed.data(), i, bits) == codes[i];
                REQUIRE(kvarn::unpack_codes<decltype(arch)>(bits, packed.data(), 64, back.data()) == kvarn::status::ok);
                if (!good || back != codes) FAIL("position " << position << " code " << code);
            }
    });
}

TEST_CASE("codec/packing: random codes of every multiple of eight round-trip inside their buffers", "[property]")
{
    support::random_source random(21);
    for_each_arch_and_width([&](auto arch, int bits) {
        for (std::size_t count = 0; count <= 320; count += 8) {
            std::vector<std::uint8_t> codes(count);
            for (auto& c : codes) c = static_cast<std::uint8_t>(random.below(std::size_t{1} << bits));
            check_round_trip<decltype(arch)>(bits, codes, count / 8 % 9);
        }
        for (int i = 0; i < 12; ++i) {
            std::vector<std::uint8_t> codes(8 * random.below(4000));
            for (auto& c : codes) c = static_cast<std::uint8_t>(random.below(std::size_t{1} << bits));
            check_round_trip<decltype(arch)>(bits, codes, random.below(64));
        }
        check_round_trip<decltype(arch)>(bits, std::vector<std::uint8_t>(1024, static_cast<std::uint8_t>((1 << bits) - 1)), 1);
    });
}

TEST_CASE("codec/packing: any bytes unpack to what the bits say", "[property]")
{
    support::random_source random(22);
    for_each_arch_and_width([&](auto arch, int bits) {
        const std::size_t count = 8 * (1 + random.below(500));
        std::vector<std::uint8_t> packed(count * static_cast<std::size_t>(bits) / 8), codes(count);
        for (auto& b : packed) b = static_cast<std::uint8_t>(random.bits());
        REQUIRE(kvarn::unpack_codes<decltype(arch)>(bits, packed.data(), count, codes.data()) == kvarn::status::ok);
        std::size_t wrong = 0;
        for (std::size_t i = 0; i < count; ++i) wrong += reference::read_code(packed.data(), i, bits) != codes[i];
        CHECK(wrong == 0);
        std::vector<std::uint8_t> again(packed.size());
        REQUIRE(kvarn::pack_codes<decltype(arch)>(bits, codes.data(), count, again.data()) == kvarn::status::ok);
        CHECK(again == packed);
    });
}

TEST_CASE("codec/packing: bad arguments are refused and nothing is written", "[unit]")
{
    std::vector<std::uint8_t> in(64, 1), out(64, 0x77);
    const std::vector<std::uint8_t> untouched = out;
    for (const int bits : {-1, 0, 1, 7, 9, 16}) {
        CHECK(kvarn::pack_codes(bits, in.data(), 8, out.data()) == kvarn::status::unsupported_bits);
        CHECK(kvarn::unpack_codes(bits, in.data(), 8, out.data()) == kvarn::status::unsupported_bits);
    }
    for (const std::size_t count : {1u, 4u, 7u, 9u, 31u}) {
        CHECK(kvarn::pack_codes(4, in.data(), count, out.data()) == kvarn::status::bad_argument);
        CHECK(kvarn::unpack_codes(4, in.data(), count, out.data()) == kvarn::status::bad_argument);
    }
    CHECK(kvarn::pack_codes(4, nullptr, 8, out.data()) == kvarn::status::null_pointer);
    CHECK(kvarn::unpack_codes(4, nullptr, 8, out.data()) == kvarn::status::null_pointer);
    CHECK(kvarn::pack_codes(4, in.data(), 8, nullptr) == kvarn::status::null_pointer);
    CHECK(kvarn::unpack_codes(4, in.data(), 8, nullptr) == kvarn::status::null_pointer);
    CHECK(out == untouched);
}
