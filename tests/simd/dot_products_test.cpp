// SPDX-License-Identifier: Apache-2.0
// Products by dot-product instructions against those of kernels<portable>: every shape of a row, weights of any size.
// Where this machine has AVX-512 VNNI, kernels<avxvnni> is checked through the other encoding of its one instruction.

#include <cstdint>
#include <type_traits>
#include <vector>

#include "../catch.hpp"
#include "../support/random_tiles.hpp"

#include <kvarn/simd/lanes.hpp>

#if defined(KVARN_HAS_AVX512VNNI) || defined(KVARN_HAS_AVXVNNI) || defined(KVARN_HAS_NEON64DOT)

namespace {

namespace simd = kvarn::simd;

/// The products of kernels<Arch>, and those of a vector type.
template <class Arch>
struct of_kernels {
    template <int Bits, int Heads, class Weight>
    static void multiply(const std::uint8_t* codes, int rows, int columns, const Weight* const (&w)[Heads], float* const (&to)[Heads])
    {
        simd::read_ahead ahead;
        if constexpr (sizeof(Weight) == 2) simd::kernels<Arch>::template multiply_words<Bits, Heads>(codes, rows, columns, w, to, ahead);
        else simd::kernels<Arch>::template multiply_bytes<Bits, Heads, Weight>(codes, rows, columns, w, to, ahead);
    }
};
#if defined(KVARN_HAS_AVX512VNNI)
struct evex_dot {
    static constexpr int accumulators = 8;
    static __m256i dot(__m256i sum, __m256i a, __m256i b) { return _mm256_dpbusd_epi32(sum, a, b); }
};
struct like_avxvnni {
    template <int Bits, int Heads, class Weight>
    static void multiply(const std::uint8_t* codes, int rows, int columns, const Weight* const (&w)[Heads], float* const (&to)[Heads])
    {
        using dot = simd::dot_products<simd::vnni_256<evex_dot>>;
        simd::read_ahead ahead;
        if constexpr (sizeof(Weight) == 2) dot::template words<Bits, Heads>(codes, rows, columns, w, to, ahead);
        else dot::template bytes<Bits, Heads, Weight>(codes, rows, columns, w, to, ahead);
    }
};
#endif

/// Random codes and weights; what lies behind the weights and the rows is not zero.
template <class Products, int Bits, int Heads, class Weight>
std::size_t differences(support::random_source& random, int rows, int columns)
{
    const std::size_t r = static_cast<std::size_t>(rows), c = static_cast<std::size_t>(columns);
    std::vector<std::uint8_t> codes(r * c * Bits / 8 + 16);
    for (std::uint8_t& x : codes) x = static_cast<std::uint8_t>(random.below(256));
    const bool extreme = random.below(4) == 0;
    constexpr int bound = std::is_unsigned_v<Weight> ? 255 : sizeof(Weight) == 1 ? 127 : 32767;
    const int most = extreme || sizeof(Weight) == 1 ? bound : 2147483647 / 4096 / rows;
    std::vector<Weight> weights(Heads * (r + 16), Weight{1});
    std::vector<float> sums(Heads * (c + 16), -77.0f), wanted = sums;
    const Weight* w[Heads];
    float *to[Heads], *expected[Heads];
    for (std::size_t h = 0; h < Heads; ++h) {
        for (std::size_t i = 0; i < r; ++i) {
            const int least = std::is_unsigned_v<Weight> ? 0 : -most;
            const int x = least + static_cast<int>(random.below(static_cast<std::size_t>(most - least) + 1));
            weights[h * (r + 16) + i] = static_cast<Weight>(extreme && sizeof(Weight) == 1 ? (x < most / 2 ? least : most) : x);
        }
        w[h] = weights.data() + h * (r + 16);
        to[h] = sums.data() + h * (c + 16);
        expected[h] = wanted.data() + h * (c + 16);
    }
    // Without bounds on the sums (which rounding takes care of) a kernel may lose the highest bits: few of them then.
    if (extreme && sizeof(Weight) == 2)
        for (std::size_t h = 0; h < Heads; ++h)
            for (std::size_t i = 15; i < r; ++i) weights[h * (r + 16) + i] = 0;
    using many = const Weight* const(&)[Heads];
    using floats = float* const(&)[Heads];
    Products::template multiply<Bits, Heads>(codes.data(), rows, columns, reinterpret_cast<many>(w), reinterpret_cast<floats>(to));
    of_kernels<simd::portable>::multiply<Bits, Heads>(codes.data(), rows, columns, reinterpret_cast<many>(w), reinterpret_cast<floats>(expected));
    std::size_t different = 0;
    for (std::size_t i = 0; i < sums.size(); ++i) different += sums[i] != wanted[i];
    return different;
}

template <class Products>
void check_products()
{
    support::random_source random(11);
    for (int columns = 16; columns <= 272; columns += columns < 128 ? 16 : 48)
        for (const int rows : {4, 8, 12, 16, 20, 64, 120, 128, 132, 576}) {
            const auto all_heads = [&](auto bits, auto weight) {
                using type = decltype(weight);
                INFO(bits() << " bits, " << rows << " rows, " << columns << " columns, weights of " << sizeof(weight) << " bytes");
                CHECK(differences<Products, bits(), 1, type>(random, rows, columns) == 0);
                CHECK(differences<Products, bits(), 2, type>(random, rows, columns) == 0);
                CHECK(differences<Products, bits(), 4, type>(random, rows, columns) == 0);
            };
            all_heads(std::integral_constant<int, 2>{}, std::int8_t{});
            all_heads(std::integral_constant<int, 4>{}, std::int8_t{});
            all_heads(std::integral_constant<int, 2>{}, std::uint8_t{});
            all_heads(std::integral_constant<int, 4>{}, std::uint8_t{});
            all_heads(std::integral_constant<int, 2>{}, std::int16_t{});
            all_heads(std::integral_constant<int, 4>{}, std::int16_t{});
        }
}

}  // namespace

TEST_CASE("simd/dot products: the same integers as the portable kernels'", "[unit]") { check_products<of_kernels<simd::native_arch>>(); }

#if defined(KVARN_HAS_AVX512VNNI)
TEST_CASE("simd/dot products: of 256 bits, by the encoding that this machine has", "[unit]") { check_products<like_avxvnni>(); }
#endif
#else
TEST_CASE("simd/dot products: this machine has no such instructions", "[unit]") { SUCCEED(); }
#endif
