// SPDX-License-Identifier: Apache-2.0
// Records of both encoders stay what they were, to the byte, whatever is done to the speed of sealing: a digest of each format's records
// of tiles of every sort by every instruction set. Integers make the values, so that no machine's library takes part.

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <span>
#include <string>
#include <vector>

#include "../catch.hpp"
#include "../support/library.hpp"

namespace {

struct generator {
    std::uint64_t state;

    int below(int n) noexcept
    {
        state = state * 6364136223846793005u + 1442695040888963407u;
        return static_cast<int>((state >> 33) % static_cast<std::uint64_t>(n));
    }
    /// A sum of four uniform integers: roughly normal, of a deviation near 2^11.
    float value() noexcept
    {
        int sum = 0;
        for (int i = 0; i < 4; ++i) sum += below(4096);
        return static_cast<float>(sum - 2 * 4095);
    }
};

enum class content {
    normal,
    token_outliers,    // some tokens times powers of two
    channel_outliers,  // some channels times powers of two
    offsets,           // some channels far from zero
    nearly_constant,   // channels that move by their last bits
    constant_rows,     // whole tokens and channels of one value
    many_sizes,        // every value times a power of two of its own
    mostly_zero,
    equal,
    tiny,              // subnormal halves
    large,             // at the edge of what halves can hold
};
constexpr content all_contents[] = {content::normal, content::token_outliers, content::channel_outliers, content::offsets,
                                    content::nearly_constant, content::constant_rows, content::many_sizes, content::mostly_zero,
                                    content::equal, content::tiny, content::large};

std::vector<float> make_tile(generator& random, int tokens, int channels, content c)
{
    std::vector<int> of_token(static_cast<std::size_t>(tokens)), of_channel(static_cast<std::size_t>(channels));
    for (int& n : of_token) n = c == content::token_outliers && random.below(12) == 0 ? random.below(9) : 0;
    for (int& n : of_channel) n = c == content::channel_outliers && random.below(12) == 0 ? random.below(9) : 0;
    std::vector<float> far_from_zero(static_cast<std::size_t>(channels)), tile;
    for (float& x : far_from_zero) {
        if (c == content::offsets && random.below(3) == 0) x = 16 * random.value();
        if (c == content::nearly_constant) x = 1024 * random.value();
    }
    const int same = random.below(1000);
    for (int t = 0; t < tokens; ++t)
        for (int d = 0; d < channels; ++d) {
            float x = std::ldexp(random.value(), of_token[static_cast<std::size_t>(t)] + of_channel[static_cast<std::size_t>(d)]);
            x += far_from_zero[static_cast<std::size_t>(d)];
            if (c == content::nearly_constant) x = far_from_zero[static_cast<std::size_t>(d)] + static_cast<float>(random.below(3));
            if (c == content::constant_rows && (t % 7 == 3 || d % 5 == 2)) x = static_cast<float>(100 * (t % 7 == 3 ? t : d));
            if (c == content::many_sizes) x = std::ldexp(x, random.below(24) - 12);
            if (c == content::mostly_zero && random.below(8) != 0) x = 0;
            if (c == content::equal) x = static_cast<float>(same);
            tile.push_back(std::ldexp(x, c == content::tiny ? -36 : c == content::large ? 6 : -11));
        }
    return tile;
}

/// FNV-1a of the records and statuses of tiles of every content, by several sets of options.
template <class Arch>
std::uint64_t digest(const kvarn::format& f)
{
    const auto with = [](int normalisations, int rounds, int clip_steps) {
        kvarn::encode_options o;
        o.refined_iterations = normalisations;
        o.refit_rounds = rounds;
        o.clip_steps = clip_steps;
        return o;
    };
    const kvarn::encode_options all_options[] = {{}, support::paper(), with(1, 0, 0), with(3, 1, 2), with(0, 2, 3), with(2, 16, 8)};
    std::uint64_t sum = 14695981039346656037u;
    const auto add = [&](unsigned byte) { sum = (sum ^ byte) * 1099511628211u; };
    generator random{static_cast<std::uint64_t>(f.head_dim_k() * 1000 + f.key_bits())};
    std::vector<std::byte> scratch(kvarn::scratch_bytes(f));
    for (const content c : all_contents) {
        const auto k = make_tile(random, f.group(), f.key_channels(), c), v = make_tile(random, f.group(), f.head_dim_v(), c);
        for (const auto& options : all_options) {
            support::bytes record(kvarn::record_bytes(f), 0xa5);
            const kvarn::status status = kvarn::quantize_kv<Arch>(
                f, support::dense_keys(f, k.data(), 1, 1), support::dense_values(f, v.data(), 1, 1),
                kvarn::tile_major_records(f, support::as_bytes(record.data()), record.size(), 1, 1), std::span<std::byte>(scratch), options);
            add(static_cast<unsigned>(status));
            for (const std::uint8_t byte : record) add(byte);
        }
    }
    return sum;
}

}  // namespace

TEST_CASE("codec/records: the bytes of records stay what they were", "[unit]")
{
    const struct {
        reference::shape shape;
        std::uint64_t digest;
    } cases[] = {
        {{128, 128, 4, 2, 128, true, 0}, 0xbc172539973eef25u},
        {{64, 64, 2, 4, 128, true, 0}, 0xbad7b8df97bf2f12u},
        {{80, 112, 3, 5, 64, true, 0}, 0xf87bdee3172b978u},
        {{36, 36, 6, 6, 32, true, 0}, 0x397c6ebed2e70c88u},
        {{100, 44, 5, 4, 32, false, 4}, 0xf2ecc1011da16aacu},
        {{64, 128, 8, 8, 256, true, 0}, 0x181c36dd7dbcc698u},
        {{288, 32, 2, 3, 128, true, 0}, 0xd376bee131fb9016u},
        {{128, 128, 4, 4, 128, false, 0}, 0xcdd66e64d738ae8bu},
    };
    for (const auto& c : cases) {
        const kvarn::format f = support::make(c.shape);
        support::for_each_arch([&](auto arch) {
            const std::uint64_t got = digest<decltype(arch)>(f);
            char text[20];
            std::snprintf(text, sizeof text, "%#llx", static_cast<unsigned long long>(got));
            INFO(support::describe(f) << ", " << kvarn::simd::arch_traits<decltype(arch)>::name << ": " << text);
            CHECK(got == c.digest);
        });
    }
}
