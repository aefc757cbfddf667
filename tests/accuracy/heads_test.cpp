// SPDX-License-Identifier: Apache-2.0
// Floors on recorded heads of real models (heads/README.md): one whose keys a rotation ruins, one that needs it, and two between. The
// figures are the same on every machine; the bounds are what was measured, with a tenth of room.

#include <algorithm>
#include <cstdio>
#include <string>

#include <kvarn/cache/choose.hpp>

#include "accuracy_tiles.hpp"
#include "tests/catch.hpp"

namespace {

using namespace accuracy;

struct recorded_head {
    kv_pair kv;
    matrix q;
};

recorded_head read_head(const std::string& name)
{
    const kvarn_cli::tensor all = kvarn_cli::read_npy(std::string(KVARN_EXAMPLE_DATA) + "/../../tests/accuracy/heads/" + name + ".npy");
    const auto part = [&](std::size_t index) {
        matrix m{1, all.tokens, all.channels, std::vector<float>(all.tokens * all.channels)};
        for (std::size_t i = 0; i < m.values.size(); ++i) m.values[i] = all.value(index * m.values.size() + i);
        return m;
    };
    return {{part(0), part(1)}, part(2)};
}

/// The format that the first tile and its queries choose.
kvarn::format chosen(const kvarn::format& base, const recorded_head& h)
{
    const auto group = static_cast<std::size_t>(base.group());
    matrix k = h.kv.k, v = h.kv.v, q = h.q;
    std::vector<std::uint64_t> moments(k.channels);
    std::vector<std::byte> scratch(kvarn::choose_scratch_bytes(base));
    support::expect_ok(kvarn::add_query_moments(base, first_tokens(q.view(), group), std::span(moments)));
    const auto f = kvarn::choose_format(base, first_tokens(k.view(), group), first_tokens(v.view(), group), std::span<const std::uint64_t>(moments),
                                        std::span(scratch));
    support::expect_ok(f.error);
    return *f;
}

double attention_error(const recorded_head& h, const kvarn::format& f, kvarn::encoder encoder = kvarn::encoder::refined)
{
    kvarn::encode_options options;
    options.encoder = encoder;
    return measure(h.kv, through_records(f, h.kv, options), kvarn::bits_per_element(f), &h.q).attention;
}

kvarn::format format_of(const std::string& name) { return kvarn::parse_format(name, 64).value; }

}  // namespace

TEST_CASE("accuracy/heads: attention on recorded heads of real models", "[accuracy]")
{
    struct floors {
        const char* name;
        bool rotated;                  ///< what is chosen for K
        double k2v2, k3v2, k4v2, k4v4;  ///< the most that _auto may lose
    };
    for (const floors& most : {floors{"qwen2.5-coder-0.5b_layer0_head0", false, 0.218, 0.184, 0.175, 0.061}, floors{"qwen2.5-coder-0.5b_layer22_head1", true, 0.533, 0.38, 0.332, 0.13},
                               floors{"smollm2-135m_layer20_head2", true, 0.471, 0.372, 0.318, 0.118}, floors{"smollm2-135m_layer16_head2", false, 0.212, 0.179, 0.171, 0.055}}) {
        const recorded_head h = read_head(most.name);
        std::printf("%-34s", most.name);
        for (const auto& [format, bound] : {std::pair{"k2v2_g128", most.k2v2}, std::pair{"k3v2_g128", most.k3v2}, std::pair{"k4v2_g128", most.k4v2},
                                            std::pair{"k4v4_g128", most.k4v4}}) {
            INFO(most.name << ", " << format);
            const kvarn::format rotated = format_of(format), original = format_of(format + std::string("_ko")), choice = chosen(rotated, h);
            const double error = attention_error(h, choice);
            std::printf("  %s %.4f (rotated %.4f, not %.4f, paper %.4f)", format, error, attention_error(h, rotated), attention_error(h, original),
                        attention_error(h, rotated, kvarn::encoder::paper));
            CHECK(choice.keys_rotated() == most.rotated);
            CHECK(choice.values_rotated());
            CHECK(error <= bound);
            CHECK(error <= 1.2 * std::min(attention_error(h, rotated), attention_error(h, original)));
            CHECK(error < 1.02 * attention_error(h, rotated, kvarn::encoder::paper));
        }
        std::printf("\n");
    }
}
