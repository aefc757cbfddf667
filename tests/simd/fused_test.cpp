// SPDX-License-Identifier: Apache-2.0
// The multiply-add without an instruction for it, against the C library's (glibc's is correctly rounded) or this machine's instruction.

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <limits>
#include <string>

#include <kvarn/simd/xsimd.hpp>

#include "../catch.hpp"

namespace {

namespace simd = kvarn::simd;

bool same(float a, float b)
{
    return std::bit_cast<std::uint32_t>(a) == std::bit_cast<std::uint32_t>(b) || (std::isnan(a) && std::isnan(b));
}

/// Compares emulated_fma and all kernels with std::fma; says what went wrong first.
class comparison {
public:
    void operator()(float a, float b, float c)
    {
        check("emulated_fma", simd::emulated_fma(a, b, c), a, b, c);
        a_[filled_] = a, b_[filled_] = b, c_[filled_] = c;
        if (++filled_ == 4) flush();
    }
    void finish() const
    {
        INFO(compared_ << " compared, " << wrong_ << " wrong, the first: " << first_);
        CHECK(compared_ > 0);
        CHECK(wrong_ == 0);
    }
    [[nodiscard]] std::uint64_t compared() const { return compared_; }

private:
    void check(const char* name, float found, float a, float b, float c)
    {
        ++compared_;
        if (same(found, std::fma(a, b, c))) return;
        if (wrong_++ != 0) return;
        char text[160];
        std::snprintf(text, sizeof text, "%s(%a, %a, %a) = %a, not %a", name, a, b, c, found, std::fma(a, b, c));
        first_ = text;
    }
    void flush()
    {
        filled_ = 0;
#if defined(KVARN_HAS_SSE2)
        using k = simd::kernels<simd::sse2>;
        float r[4];
        k::store(r, k::fma(k::load(a_), k::load(b_), k::load(c_)));
        for (int i = 0; i < 4; ++i) check("sse2 fma", r[i], a_[i], b_[i], c_[i]);
        k::store(r, k::fnma(k::load(a_), k::load(b_), k::load(c_)));
        for (int i = 0; i < 4; ++i) check("sse2 fnma", r[i], -a_[i], b_[i], c_[i]);
#endif
    }

    float a_[4], b_[4], c_[4];
    int filled_ = 0;
    std::uint64_t compared_ = 0, wrong_ = 0;
    std::string first_;
};

struct triples {
    std::uint64_t state = 0x9e3779b97f4a7c15u;

    std::uint64_t bits()
    {
        state ^= state << 13, state ^= state >> 7, state ^= state << 17;
        return state * 0x2545f4914f6cdd1du;
    }
    float any() { return std::bit_cast<float>(static_cast<std::uint32_t>(bits() >> 32)); }
    /// An integer of `width` bits with a sign, times 2^exponent.
    float integer(int width, int exponent)
    {
        const auto x = static_cast<double>(bits() >> (64 - width));
        return static_cast<float>(std::ldexp((bits() & 1u) != 0 ? -x : x, exponent));
    }
    int between(int low, int high) { return low + static_cast<int>((bits() >> 33) % static_cast<std::uint64_t>(high - low + 1)); }
};

void compare_many(int rounds)
{
    comparison compare;
    triples t;
    for (int i = 0; i < rounds; ++i) {
        compare(t.any(), t.any(), t.any());
        // Short factors, and an addend near the product's place: sums in the middle between two floats, exact and just beside it.
        const int ea = t.between(-30, 30), eb = t.between(-30, 30);
        const float a = t.integer(t.between(2, 13), ea), b = t.integer(t.between(2, 13), eb);
        compare(a, b, t.integer(24, ea + eb + t.between(-40, 40)));
        compare(a, b, t.integer(2, ea + eb + t.between(-80, 80)));
        // Cancellation: the addend is the rounded product, or its neighbour.
        const float x = t.integer(24, ea), y = t.integer(24, eb), p = -(x * y);
        compare(x, y, p);
        compare(x, y, std::nextafter(p, (t.bits() & 1u) != 0 ? 1e38f : -1e38f));
        // Subnormal results, and addends that the product only nudges.
        const int small = t.between(-110, -60);
        compare(t.integer(24, small), t.integer(24, -126 - small - t.between(20, 60)), t.integer(t.between(1, 24), -149));
        compare(t.integer(t.between(1, 24), -100), t.integer(t.between(1, 24), -100), t.integer(t.between(1, 24), t.between(-149, -120)));
        // Overflow.
        compare(t.integer(24, t.between(40, 104)), t.integer(24, t.between(0, 60)), t.integer(24, 104));
    }
    compare.finish();
}

}  // namespace

TEST_CASE("simd/fused: infinities, NaN, zeros and their signs", "[unit]")
{
    constexpr float inf = std::numeric_limits<float>::infinity(), nan = std::numeric_limits<float>::quiet_NaN();
    constexpr float special[] = {0.0f, -0.0f, 1.0f, -1.0f, 0x1p-149f, -0x1p-149f, 0x1p-126f, 0x1.fffffep127f, -0x1.fffffep127f, 0x1p-75f,
                                 0x1.000002p0f, 0x1.8p-75f, inf, -inf, nan};
    comparison compare;
    for (const float a : special)
        for (const float b : special)
            for (const float c : special) compare(a, b, c);
    compare.finish();
}

TEST_CASE("simd/fused: a triple that a C library rounds wrongly", "[unit]")
{
    CHECK(same(simd::emulated_fma(0x1.b4733ap+0f, 0x1.0cf06cp+0f, -0x1.5e98cp-23f), 0x1.ca8282p+0f));
    CHECK(same(simd::kernels<simd::portable>::fma(0x1.b4733ap+0f, 0x1.0cf06cp+0f, -0x1.5e98cp-23f), 0x1.ca8282p+0f));
}

TEST_CASE("simd/fused: random and adversarial triples", "[unit]") { compare_many(200000); }

TEST_CASE("simd/fused: a hundred million comparisons", "[slow]") { compare_many(5000000); }
