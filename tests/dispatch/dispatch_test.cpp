// SPDX-License-Identifier: Apache-2.0
// The choice itself; that the kernels behind it are the right ones is the matter of hygiene.multi_isa.

#include <string>
#include <type_traits>

#include <kvarn/dispatch.hpp>

#include "../catch.hpp"

namespace simd = kvarn::simd;
using kvarn::status;
using kvarn::detail::arch_bit;

namespace {

// What a Zen 4 and a Skylake-SP say, cut down to the bits of x86-64-v3 and v4.
constexpr kvarn::detail::x86_report v3{0x38d83201u, 0x00000128u, 0x00000021u, 0x07u};
constexpr kvarn::detail::x86_report v4{v3.leaf1_ecx, 0xd0030128u, 0x00000021u, 0xe7u};

/// A set of built instruction sets that no other test uses: `Tag` keeps their states apart.
template <unsigned Tag>
constexpr unsigned all_sets = arch_bit<simd::portable> | arch_bit<simd::neon64> | arch_bit<simd::neon64dot> | arch_bit<simd::sse2> |
                              arch_bit<simd::avx2> | arch_bit<simd::avxvnni> | arch_bit<simd::avx512> | arch_bit<simd::avx512vnni> | Tag << 8;

template <unsigned Built>
std::string dispatched()
{
    return kvarn::dispatch<Built>([](auto arch) { return std::string(simd::arch_traits<decltype(arch)>::name); });
}

}  // namespace

TEST_CASE("dispatch/cpu: x86-64-v3 and v4 are taken with all of their features only", "[unit]")
{
    using kvarn::detail::x86_arch_bits;
    using kvarn::detail::x86_report;
    CHECK(x86_arch_bits({}) == 0);
    CHECK(x86_arch_bits(v3) == arch_bit<simd::avx2>);
    CHECK(x86_arch_bits(v4) == (arch_bit<simd::avx2> | arch_bit<simd::avx512>));

    for (int bit = 0; bit < 32; ++bit) {
        const std::uint32_t one = 1u << bit;
        for (std::uint32_t x86_report::*field : {&x86_report::leaf1_ecx, &x86_report::extended1_ecx}) {
            x86_report r = v4;
            if ((r.*field & one) == 0) continue;
            r.*field &= ~one;
            INFO("bit " << bit);
            CHECK(x86_arch_bits(r) == 0);
        }
        x86_report r = v4;
        if ((r.leaf7_ebx & one) == 0) continue;
        r.leaf7_ebx &= ~one;
        INFO("bit " << bit << " of leaf 7");
        CHECK(x86_arch_bits(r) == ((v3.leaf7_ebx & one) != 0 ? 0u : arch_bit<simd::avx2>));
    }
}

TEST_CASE("dispatch/cpu: dot products are taken with the level that they stand on only", "[unit]")
{
    using kvarn::detail::x86_arch_bits;
    constexpr unsigned avx2 = arch_bit<simd::avx2>, avx512 = arch_bit<simd::avx512>;
    for (int bit = 0; bit < 32; ++bit) {
        INFO("bit " << bit);
        auto r = v4;
        r.leaf7_ecx = 1u << bit;
        CHECK(x86_arch_bits(r) == (avx2 | avx512 | (bit == 11 ? arch_bit<simd::avx512vnni> : 0u)));
        r = v4;
        r.leaf7_1_eax = 1u << bit;
        CHECK(x86_arch_bits(r) == (avx2 | avx512 | (bit == 4 ? arch_bit<simd::avxvnni> : 0u)));
    }
    auto r = v3;  // an Alder Lake
    r.leaf7_1_eax = 1u << 4;
    CHECK(x86_arch_bits(r) == (avx2 | arch_bit<simd::avxvnni>));
    r.leaf7_ecx = 1u << 11;
    CHECK(x86_arch_bits(r) == (avx2 | arch_bit<simd::avxvnni>));
    r.leaf7_ebx = 0;
    CHECK(x86_arch_bits(r) == 0);
    r = v4;
    r.leaf7_ecx = 1u << 11;
    r.saved_state = v3.saved_state;
    CHECK(x86_arch_bits(r) == avx2);
}

TEST_CASE("dispatch/cpu: registers that the operating system does not save are not used", "[unit]")
{
    auto r = v4;
    for (const std::uint32_t avx512_off : {0x07u, 0x27u, 0x67u, 0xa7u, 0xc7u}) {
        r.saved_state = avx512_off;
        CHECK(kvarn::detail::x86_arch_bits(r) == arch_bit<simd::avx2>);
    }
    for (const std::uint32_t avx_off : {0x00u, 0x01u, 0x03u, 0x05u, 0xe3u}) {
        r.saved_state = avx_off;
        CHECK(kvarn::detail::x86_arch_bits(r) == 0);
    }
}

TEST_CASE("dispatch: without kvarn_add_kernels the one set is that of the flags", "[unit]")
{
    const std::string native = simd::arch_traits<simd::native_arch>::name;
    CHECK(kvarn::active_arch_name() == native);
    CHECK(kvarn::dispatch([](auto arch) { return std::is_same_v<decltype(arch), simd::native_arch>; }));
    CHECK(kvarn::select_arch(native) == status::ok);
    if (native != "portable") CHECK(kvarn::select_arch("portable") == status::bad_argument);
}

TEST_CASE("dispatch: f is called once, with the best set that the machine has", "[unit]")
{
    constexpr unsigned built = all_sets<1>;
    std::string best, each;
    kvarn::for_each_arch<built>([&](auto arch) { each += best = simd::arch_traits<decltype(arch)>::name, each += ' '; });
    CHECK(each.rfind("portable ", 0) == 0);
    CHECK(kvarn::active_arch_name<built>() == best);
    int calls = 0;
    CHECK(kvarn::dispatch<built>([&](auto arch) {
        ++calls;
        return (kvarn::detail::machine_arch_bits() & arch_bit<decltype(arch)>) != 0;
    }));
    CHECK(calls == 1);
    // The set that this file is compiled for is there, unless it was emulated away.
    CHECK(each.find(simd::arch_traits<simd::native_arch>::name) != std::string::npos);
}

TEST_CASE("dispatch: references are handed through", "[unit]")
{
    int x = 0;
    const auto f = [&x](auto) -> int& { return x; };
    static_assert(std::is_same_v<decltype(kvarn::dispatch<all_sets<2>>(f)), int&>);
    kvarn::dispatch<all_sets<2>>(f) = 3;
    CHECK(x == 3);
}

TEST_CASE("dispatch: a selected set stays, and a refused name changes nothing", "[unit]")
{
    constexpr unsigned built = all_sets<3>;
    REQUIRE(kvarn::select_arch<built>("portable") == status::ok);
    CHECK(dispatched<built>() == "portable");
    for (const char* name : {"", "avx", "avx22", "AVX2", "sse", "portable "}) {
        INFO(name);
        CHECK(kvarn::select_arch<built>(name) == status::bad_argument);
        CHECK(dispatched<built>() == "portable");
    }
    CHECK(kvarn::select_arch<built>(std::string_view("portable\0", 9)) == status::bad_argument);
    CHECK(kvarn::select_arch<built>({}) == status::bad_argument);
    kvarn::for_each_arch<built>([&](auto arch) {
        const char* const name = simd::arch_traits<decltype(arch)>::name;
        CHECK(kvarn::select_arch<built>(name) == status::ok);
        CHECK(dispatched<built>() == name);
    });
#if defined(__x86_64__)
    CHECK(kvarn::select_arch<built>("neon64") == status::bad_argument);
#endif
    // Other targets of the same program have a choice of their own.
    CHECK(kvarn::select_arch<built>("portable") == status::ok);
    CHECK(dispatched<all_sets<4>>() == kvarn::active_arch_name<all_sets<1>>());
    // What was not built cannot be selected.
    CHECK(kvarn::select_arch<arch_bit<simd::avx512>>("portable") == status::bad_argument);
}

TEST_CASE("dispatch: where the machine has none of the sets, the lowest is taken", "[unit]")
{
#if defined(__x86_64__)
    CHECK(dispatched<arch_bit<simd::neon64>>() == "neon64");
    CHECK(dispatched<(arch_bit<simd::neon64> | arch_bit<simd::avx512>)>() ==
          ((kvarn::detail::machine_arch_bits() & arch_bit<simd::avx512>) != 0 ? "avx512" : "neon64"));
#else
    CHECK(dispatched<(arch_bit<simd::avx2> | arch_bit<simd::avx512>)>() == "avx2");
#endif
}
