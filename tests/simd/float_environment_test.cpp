// SPDX-License-Identifier: Apache-2.0
// Engines run with flush-to-zero, denormals-are-zero or another rounding mode. Records must not show it, and the caller
// must find its settings as it left them.

#include <limits>
#include <cstdint>
#include <vector>

#include "../catch.hpp"
#include "../support/library.hpp"

#if defined(__SSE__)
#include <xmmintrin.h>

namespace {

constexpr unsigned flush_to_zero = 0x8000u, denormals_are_zero = 0x0040u;

/// Sets the control and status register for its lifetime.
class register_setting {
public:
    explicit register_setting(unsigned value) : saved_(_mm_getcsr()) { _mm_setcsr(value); }
    ~register_setting() { _mm_setcsr(saved_); }
    register_setting(const register_setting&) = delete;
    register_setting& operator=(const register_setting&) = delete;

private:
    unsigned saved_;
};

struct outcome {
    support::bytes records;
    std::vector<float> k, v, rotated;
    unsigned register_after = 0;
    bool good = true;
};

/// All calls under one setting of the register. Nothing in here but the library computes with floats.
template <class Arch>
outcome run_with(unsigned setting, const kvarn::format& f, const support::kv_tiles& x)
{
    outcome out;
    support::kv_tiles in = x;
    out.records.assign(kvarn::grid_bytes(f, 1, 1), 0xa5);
    out.k.resize(x.k.size());
    out.v.resize(x.v.size());
    out.rotated = x.v;
    std::vector<std::byte> scratch(kvarn::scratch_bytes(f));
    const auto grid = kvarn::tile_major_records(f, support::as_bytes(out.records.data()), out.records.size(), 1, 1);
    const auto k_in = support::dense_keys(f, in.k.data(), 1, 1), v_in = support::dense_values(f, in.v.data(), 1, 1);
    const auto k_out = support::dense_keys(f, out.k.data(), 1, 1), v_out = support::dense_values(f, out.v.data(), 1, 1);
    const auto to_rotate = support::dense_values(f, out.rotated.data(), 1, 1);
    {
        const register_setting guard(setting);
        out.good = kvarn::quantize_kv<Arch>(f, k_in, v_in, grid, std::span<std::byte>(scratch)) == kvarn::status::ok && out.good;
        out.good = kvarn::dequantize_kv<Arch>(f, grid, k_out, v_out, kvarn::basis::original, std::span<std::byte>(scratch)) ==
                       kvarn::status::ok && out.good;
        out.good = kvarn::rotate<Arch>(to_rotate) == kvarn::status::ok && out.good;
        out.register_after = _mm_getcsr();
    }
    return out;
}

}  // namespace

TEST_CASE("simd/float_environment: flush-to-zero and rounding modes of the caller change no byte", "[unit]")
{
    support::random_source random(95);
    const unsigned standard = 0x1f80u;
    const unsigned settings[] = {standard | flush_to_zero | denormals_are_zero,
                                 standard | flush_to_zero,
                                 standard | denormals_are_zero,
                                 standard | 0x2000u,  // round down
                                 standard | 0x4000u,  // round up
                                 standard | 0x6000u | flush_to_zero | denormals_are_zero,
                                 standard | 0x003fu};  // every exception flag raised before the call
    for (const int head_dim : {36, 64, 128})
        for (const float gain : {1.0f, 1e-5f, 1e-38f, 1e-41f}) {  // the last two make floats and intermediate results denormal
            const kvarn::format f = support::make(reference::shape{head_dim, head_dim, 4, 3, 32, true, 4});
            auto x = support::random_tiles(random, f, 1, 1, support::tile_kind::channel_outliers);
            for (auto* all : {&x.k, &x.v})
                for (float& value : *all) value *= gain;
            support::for_each_arch([&](auto arch) {
                using arch_type = decltype(arch);
                const outcome wanted = run_with<arch_type>(standard, f, x);
                REQUIRE(wanted.good);
                for (const unsigned setting : settings) {
                    INFO(kvarn::simd::arch_traits<arch_type>::name << ", " << support::describe(f) << ", gain " << gain << ", register " << setting);
                    const outcome got = run_with<arch_type>(setting, f, x);
                    CHECK(got.good);
                    CHECK(got.register_after == setting);
                    CHECK(got.records == wanted.records);
                    CHECK(support::same_bits(got.k, wanted.k));
                    CHECK(support::same_bits(got.v, wanted.v));
                    CHECK(support::same_bits(got.rotated, wanted.rotated));
                }
            });
        }
}

TEST_CASE("simd/float_environment: denormal input is no zero", "[unit]")
{
    // What the test above would miss if every path flushed: with the unrotated sum of denormals the result is denormal too.
    std::vector<float> x(64, 1e-41f);
    const float first = x[0];
    {
        const register_setting guard(0x1f80u | flush_to_zero | denormals_are_zero);
        REQUIRE(kvarn::rotate(kvarn::token_major(x.data(), 1, 1, 64)) == kvarn::status::ok);
    }
    CHECK(static_cast<double>(x[0]) > 7.9 * static_cast<double>(first));
    CHECK(static_cast<double>(x[0]) < 8.1 * static_cast<double>(first));
}

TEST_CASE("simd/float_environment: refused calls leave the register alone as well", "[unit]")
{
    const kvarn::format f = support::make(reference::shape{64, 64, 4, 0, 32, true, 0});
    std::vector<float> k(64 * 32, std::numeric_limits<float>::quiet_NaN());
    support::bytes record(kvarn::record_bytes(f));
    std::vector<std::byte> scratch(kvarn::scratch_bytes(f));
    const unsigned setting = 0x1f80u | flush_to_zero | denormals_are_zero | 0x2000u;
    unsigned after = 0;
    kvarn::status got;
    {
        const register_setting guard(setting);
        got = kvarn::quantize_kv(f, support::dense_keys(f, k.data(), 1, 1), kvarn::kv_view<float>{},
                                 kvarn::tile_major_records(f, support::as_bytes(record.data()), record.size(), 1, 1), std::span<std::byte>(scratch));
        after = _mm_getcsr();
    }
    CHECK(got == kvarn::status::not_finite);
    CHECK(after == setting);
}
#else
TEST_CASE("simd/float_environment: tested on x86 only", "[unit]") { SUCCEED(); }
#endif
