// SPDX-License-Identifier: Apache-2.0
// The adapter for ggml (examples/ggml): bit for bit what the cache core gives by itself, and within the format's error of exact attention.

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

#include <kvarn/cache/bases.hpp>
#include <kvarn/cache/shift.hpp>

#include "engine.hpp"
#include "tests/catch.hpp"

using namespace adapter;

namespace {

/// A file in memory, which ends where a test says.
struct buffer {
    std::vector<unsigned char> bytes{};
    std::size_t at = 0;

    static bool write(void* self, const void* data, std::size_t n)
    {
        auto& b = *static_cast<buffer*>(self);
        const auto* const from = static_cast<const unsigned char*>(data);
        b.bytes.insert(b.bytes.end(), from, from + n);
        return true;
    }
    static bool read(void* self, void* data, std::size_t n)
    {
        auto& b = *static_cast<buffer*>(self);
        if (n > b.bytes.size() - b.at) return false;
        std::memcpy(data, b.bytes.data() + b.at, n);
        b.at += n;
        return true;
    }
};

/// What a text gives in steps of the given lengths, from position `first` on.
template <class Cache>
std::vector<outputs> run_steps(Cache& c, int sequence, const std::vector<std::uint64_t>& t,
                               const std::vector<std::size_t>& lengths, std::size_t first = 0)
{
    std::vector<outputs> all;
    for (const std::size_t n : lengths) {
        all.push_back(c.run(sequence, static_cast<std::int64_t>(first), slice(t, first, n)));
        first += n;
    }
    return all;
}

bool same_bits(const std::vector<outputs>& a, const std::vector<outputs>& b)
{
    return a.size() == b.size() &&
           std::equal(a.begin(), a.end(), b.begin(), [](const outputs& x, const outputs& y) { return adapter::same_bits(x, y); });
}

const std::vector<std::size_t> prompt_and_tokens = {50, 100, 37, 1, 1, 1, 1, 1, 1, 1, 1};

}  // namespace

TEST_CASE("ggml/adapter: chunks of a prompt and tokens, any number of threads")
{
    const shape s;
    const auto t = text(1, 195);
    core twin(s, params_of(s));
    const auto want = run_steps(twin, 0, t, prompt_and_tokens);
    REQUIRE(twin.all_ok);
    for (const int threads : {1, 2, 3, 4, 6}) {  // two of the six have no scratch
        engine e(s, {}, threads);
        INFO(threads << " threads");
        REQUIRE(e.cache() != nullptr);
        const auto got = run_steps(e, 0, t, prompt_and_tokens);
        CHECK(e.said == KVARN_GGML_OK);
        CHECK(same_bits(got, want));
        CHECK(e.graphs() == 4);  // 8 tokens went through one of them
        CHECK(kvarn_ggml_tokens(e.cache(), 0) == 195);
        CHECK(kvarn_ggml_last_position(e.cache(), 0) == 194);
        CHECK(kvarn_ggml_get_statistics(e.cache()).sealed_tiles == 5);  // behind the sink, full before the last step: 32..191
    }
    // The number of threads may change from step to step.
    engine e(s, {}, 1);
    std::vector<outputs> got;
    std::size_t first = 0;
    for (const std::size_t n : prompt_and_tokens) {
        e.threads = static_cast<int>(first % 4) + 1;
        got.push_back(e.run(0, static_cast<std::int64_t>(first), slice(t, first, n)));
        first += n;
    }
    CHECK(same_bits(got, want));

    // Near exact attention: k8v8.
    engine fine(s, params_of(s, "k8v8_g32"));
    run_steps(fine, 0, t, {50, 100, 37});
    CHECK(relative_error(fine.run(0, 187, slice(t, 187, 8))[0], exact(s, {}, history(t), 8)) < 0.01);
    engine coarse(s, params_of(s, "k2v2_g32"));
    run_steps(coarse, 0, t, {50, 100, 37});
    const double error = relative_error(coarse.run(0, 187, slice(t, 187, 8))[0], exact(s, {}, history(t), 8));
    CHECK(error > 0.02);
    CHECK(error < 0.6);
}

TEST_CASE("ggml/adapter: sequences in a batch, rows in any order")
{
    const shape s;
    const auto a = text(1, 120), b = text(2, 120), c = text(3, 120);
    core twin(s, params_of(s));
    for (const int threads : {1, 3}) {
        engine e(s, {}, threads);
        twin.ids.clear();
        const auto both = [&](const std::vector<part>& parts) { return adapter::same_bits(e.run(parts), twin.run(parts)); };
        CHECK(both({{0, 0, slice(a, 0, 70)}}));
        CHECK(both({{0, 70, slice(a, 70, 5)}, {1, 0, slice(b, 0, 40)}}));
        // Token by token in turn, and the first sequence behind the second.
        CHECK(both({{0, 75, slice(a, 75, 20), 0, 2}, {1, 40, slice(b, 40, 20), 1, 2}}));
        CHECK(both({{0, 95, slice(a, 95, 1), 2}, {1, 60, slice(b, 60, 1), 0}, {3, 7, slice(c, 0, 1), 1}}));
        CHECK(both({{3, 8, slice(c, 1, 33)}, {1, 61, slice(b, 61, 2)}}));
        CHECK(twin.all_ok);
        CHECK(kvarn_ggml_first_position(e.cache(), 3) == 7);
        CHECK(kvarn_ggml_tokens(e.cache(), 2) == 0);
        CHECK(kvarn_ggml_first_position(e.cache(), 2) == -1);
    }
    // A sequence's bits do not depend on the others.
    engine alone(s), batch(s);
    const auto first = alone.run(0, 0, slice(a, 0, 90)), second = alone.run(0, 90, slice(a, 90, 3));
    batch.run({{2, 0, slice(b, 0, 10)}, {0, 0, slice(a, 0, 90)}});
    CHECK(adapter::same_bits({batch.run({{2, 10, slice(b, 10, 30)}, {0, 90, slice(a, 90, 3)}})[1]}, second));
}

TEST_CASE("ggml/adapter: rollback of drafts gives the bits of a run without them")
{
    const shape s;
    const auto t = text(1, 200), wrong = text(9, 200);
    engine with(s), without(s);
    CHECK(same_bits(run_steps(with, 0, t, {60}), run_steps(without, 0, t, {60})));
    for (std::size_t at = 60; at < 140; ++at) {  // over the ends of tiles
        with.run(0, static_cast<std::int64_t>(at), slice(wrong, at, 1 + at % 9));
        CHECK(kvarn_ggml_remove(with.cache(), 0, static_cast<std::int64_t>(at), -1) == KVARN_GGML_OK);
        const auto a = with.run(0, static_cast<std::int64_t>(at), slice(t, at, 1)),
                   b = without.run(0, static_cast<std::int64_t>(at), slice(t, at, 1));
        INFO("token " << at);
        CHECK(adapter::same_bits(a, b));
    }
    CHECK(kvarn_ggml_get_statistics(with.cache()).sealed_tiles == kvarn_ggml_get_statistics(without.cache()).sealed_tiles);

    // Deeper than a step: no tile is cut where recent_tokens are as many.
    kvarn_ggml_params p = params_of(s);
    p.recent_tokens = 40;
    engine deep(s, p);
    core twin(s, p);
    run_steps(deep, 0, t, {90});
    run_steps(twin, 0, t, {90});
    for (std::size_t at = 90; at < 130; ++at)
        CHECK(adapter::same_bits(deep.run(0, static_cast<std::int64_t>(at), slice(wrong, at, 1)),
                                 twin.run(0, static_cast<std::int64_t>(at), slice(wrong, at, 1))));
    CHECK(kvarn_ggml_remove(deep.cache(), 0, 90, -1) == KVARN_GGML_OK);
    REQUIRE(twin.pool.truncate(twin.id(0), 90) == kvarn::status::ok);
    CHECK(twin.pool.statistics(twin.id(0))->dead_tokens == 0);
    CHECK(twin.pool.statistics(twin.id(0))->sealed_tokens == 32);
    for (std::size_t at = 90; at < 140; ++at)
        CHECK(adapter::same_bits(deep.run(0, static_cast<std::int64_t>(at), slice(t, at, 1)),
                                 twin.run(0, static_cast<std::int64_t>(at), slice(t, at, 1))));

    // Into a sealed tile: cut, and gone on with, as the core does.
    engine e(s);
    core c(s, params_of(s));
    CHECK(same_bits(run_steps(e, 0, t, {100, 60, 1}), run_steps(c, 0, t, {100, 60, 1})));
    CHECK(kvarn_ggml_remove(e.cache(), 0, 75, 5000) == KVARN_GGML_OK);
    REQUIRE(c.pool.truncate(c.id(0), 75) == kvarn::status::ok);
    CHECK(kvarn_ggml_last_position(e.cache(), 0) == 74);
    CHECK(same_bits(run_steps(e, 0, t, {50, 1, 1}, 75), run_steps(c, 0, t, {50, 1, 1}, 75)));

    // All of it, of all sequences.
    CHECK(kvarn_ggml_remove(e.cache(), -1, 0, -1) == KVARN_GGML_OK);
    CHECK(kvarn_ggml_tokens(e.cache(), 0) == 0);
    const auto none = kvarn_ggml_get_statistics(e.cache());
    CHECK(none.bytes_used == 0);
    CHECK(none.free_record_blocks == none.record_blocks);
    CHECK(none.free_exact_blocks == none.exact_blocks);
    CHECK(same_bits(run_steps(e, 0, t, {100, 1}), run_steps(without, 1, t, {100, 1})));
}

TEST_CASE("ggml/adapter: a fork goes its own way")
{
    const shape s;
    const auto t = text(1, 200), u = text(2, 200);
    engine e(s), apart(s);
    run_steps(e, 0, t, {110, 1});
    run_steps(apart, 0, t, {110, 1});
    run_steps(apart, 1, t, {110, 1});
    CHECK(kvarn_ggml_copy(e.cache(), 0, 1, 0, -1) == KVARN_GGML_OK);
    CHECK(kvarn_ggml_get_statistics(e.cache()).bytes_used < kvarn_ggml_get_statistics(apart.cache()).bytes_used);
    for (std::size_t at = 111; at < 150; ++at) {
        const std::vector<part> parts = {{0, static_cast<std::int64_t>(at), slice(t, at, 1)},
                                         {1, static_cast<std::int64_t>(at), slice(u, at, 1)}};
        CHECK(adapter::same_bits(e.run(parts), apart.run(parts)));
    }
    CHECK(kvarn_ggml_copy(e.cache(), 0, 1, 0, -1) == KVARN_GGML_BAD_ARGUMENT);  // it has tokens
    CHECK(kvarn_ggml_copy(e.cache(), 0, 0, 0, -1) == KVARN_GGML_OK);
    CHECK(kvarn_ggml_copy(e.cache(), 3, 2, 0, -1) == KVARN_GGML_OK);
    CHECK(kvarn_ggml_tokens(e.cache(), 2) == 0);
    CHECK(kvarn_ggml_copy(e.cache(), 0, 7, 0, -1) == KVARN_GGML_BAD_ARGUMENT);

    // A prefix, and a piece.
    CHECK(kvarn_ggml_copy(e.cache(), 0, 2, 0, 96) == KVARN_GGML_OK);
    CHECK(kvarn_ggml_last_position(e.cache(), 2) == 95);
    CHECK(kvarn_ggml_copy(e.cache(), 0, 3, 40, 100) == KVARN_GGML_OK);
    CHECK(kvarn_ggml_first_position(e.cache(), 3) == 40);
    CHECK(kvarn_ggml_tokens(e.cache(), 3) == 60);
    core c(s, params_of(s));
    run_steps(c, 0, t, {110, 1});
    c.ids[2] = *c.pool.fork(c.id(0));
    REQUIRE(c.pool.truncate(c.id(2), 96) == kvarn::status::ok);
    CHECK(adapter::same_bits(e.run(2, 96, slice(u, 96, 3)), c.run(2, 96, slice(u, 96, 3))));

    CHECK(kvarn_ggml_keep(e.cache(), 2) == KVARN_GGML_OK);
    CHECK(kvarn_ggml_tokens(e.cache(), 0) == 0);
    CHECK(kvarn_ggml_tokens(e.cache(), 2) == 99);
    kvarn_ggml_clear(e.cache());
    CHECK(kvarn_ggml_get_statistics(e.cache()).bytes_used == 0);
}

TEST_CASE("ggml/adapter: erased tokens leave a gap")
{
    const shape s;
    const auto t = text(1, 200);
    const kvarn_ggml_params p = params_of(s, "k8v8_g32");
    engine e(s, p);
    core c(s, p);
    run_steps(e, 0, t, {100, 40});
    run_steps(c, 0, t, {100, 40});
    CHECK(kvarn_ggml_remove(e.cache(), 0, 40, 90) == KVARN_GGML_OK);
    REQUIRE(c.pool.erase(c.id(0), 40, 90) == kvarn::status::ok);
    const auto got = e.run(0, 140, slice(t, 140, 6));
    CHECK(adapter::same_bits(got, c.run(0, 140, slice(t, 140, 6))));
    std::vector<token> h = history(slice(t, 0, 146));
    h.erase(h.begin() + 40, h.begin() + 90);
    CHECK(relative_error(got[0], exact(s, {}, h, 6)) < 0.01);
    CHECK(kvarn_ggml_tokens(e.cache(), 0) == 96);

    // The front, and what is not there.
    CHECK(kvarn_ggml_remove(e.cache(), 0, 0, 20) == KVARN_GGML_OK);
    REQUIRE(c.pool.erase(c.id(0), 0, 20) == kvarn::status::ok);
    CHECK(kvarn_ggml_first_position(e.cache(), 0) == 20);
    CHECK(kvarn_ggml_remove(e.cache(), 0, 45, 60) == KVARN_GGML_OK);
    CHECK(kvarn_ggml_remove(e.cache(), 0, 500, 600) == KVARN_GGML_OK);
    CHECK(kvarn_ggml_remove(e.cache(), 2, 0, 600) == KVARN_GGML_OK);
    CHECK(adapter::same_bits(e.run(0, 146, slice(t, 146, 2)), c.run(0, 146, slice(t, 146, 2))));
}

TEST_CASE("ggml/adapter: tokens at other positions, by the engine's rotation")
{
    // Keys at position p are those at 0 turned by p, so that moved tokens can be compared with ones made there.
    const shape s;
    for (const bool neox : {false, true}) {
        const std::vector<float> factors(16, 1.25f);
        kvarn_ggml_rope rope{32, neox, 10000.0f, 0.5f, factors.data()};
        std::vector<float> there(64), moved(64);
        for (std::size_t i = 0; i < 64; ++i) there[i] = moved[i] = value(1, 0, 0, 0, of_k, i);
        kvarn_ggml_turn_rope(&rope, 0, 0, there.data(), 1, 64, 0, 30);
        kvarn_ggml_turn_rope(&rope, 0, 0, moved.data(), 1, 64, 0, 42);
        CHECK(relative_error(moved, there) > 0.1);
        kvarn_ggml_turn_rope(&rope, 0, 0, moved.data(), 1, 64, 42, -12);
        CHECK(relative_error(moved, there) < 1e-6);
        for (std::size_t i = 0; i < 64; ++i) {  // by the definition
            const std::size_t pair = neox ? i % 16 : i / 2, first = neox ? pair : 2 * pair,
                              second = neox ? pair + 16 : 2 * pair + 1;
            const double angle = 30 * 0.5 * std::pow(10000.0, -2.0 * static_cast<double>(pair) / 32) / 1.25;
            const double a = static_cast<double>(value(1, 0, 0, 0, of_k, first)),
                         b = static_cast<double>(value(1, 0, 0, 0, of_k, second));
            const double want = i >= 32      ? static_cast<double>(value(1, 0, 0, 0, of_k, i))
                                : i == first ? a * std::cos(angle) - b * std::sin(angle)
                                             : a * std::sin(angle) + b * std::cos(angle);
            CHECK(std::fabs(static_cast<double>(there[i]) - want) < 1e-5);
        }
    }

    const auto t = text(1, 200);
    kvarn_ggml_rope rope{64, true, 10000.0f, 1.0f, nullptr};
    const kvarn_ggml_params p = params_of(s, "k8v8_g32");
    engine e(s, p);
    core c(s, p);
    run_steps(e, 0, t, {100, 40});
    run_steps(c, 0, t, {100, 40});
    CHECK(kvarn_ggml_remove(e.cache(), 0, 32, 70) == KVARN_GGML_OK);
    REQUIRE(c.pool.erase(c.id(0), 32, 70) == kvarn::status::ok);
    CHECK(kvarn_ggml_shift(e.cache(), 0, 70, -1, -38, kvarn_ggml_turn_rope, &rope) == KVARN_GGML_OK);
    REQUIRE(kvarn::shift_positions(
        c.pool, c.id(0), 70, 140, -38,
        [&](std::size_t, std::size_t, const kvarn::kv_view<float>& k, std::int64_t at) {
            kvarn_ggml_turn_rope(&rope, 0, 0, k.data, static_cast<std::int64_t>(k.tokens), 64, at, -38);
        },
        c.scratch));
    CHECK(kvarn_ggml_last_position(e.cache(), 0) == 101);
    const auto got = e.run(0, 102, slice(t, 102, 5));
    CHECK(adapter::same_bits(got, c.run(0, 102, slice(t, 102, 5))));

    // Against exact attention on turned keys.
    std::vector<token> h = history(slice(t, 0, 32));
    for (std::size_t i = 70; i < 140; ++i) h.push_back({t[i], static_cast<std::int64_t>(i) - 38});
    for (std::size_t i = 102; i < 107; ++i) h.push_back({t[i], static_cast<std::int64_t>(i)});
    model turned;
    turned.change = [&](float x, std::uint64_t token_text, std::size_t layer, std::size_t head, part_of part,
                        std::size_t channel) {
        const std::size_t from = static_cast<std::size_t>(token_text - t[0]);
        if (part == of_q || from < 70) return x;
        if (part == of_v) return value(token_text, static_cast<std::int64_t>(from), layer, head, part, channel);
        float key[64];
        for (std::size_t i = 0; i < 64; ++i) key[i] = value(token_text, static_cast<std::int64_t>(from), layer, head, part, i);
        kvarn_ggml_turn_rope(&rope, 0, 0, key, 1, 64, 0, -38);
        return key[channel];
    };
    // Tokens 102 to 106 come twice: moved, and new where they belong.
    for (std::size_t i = 0; i < 5; ++i) h[102 + i].text = t[102 + i] + 1000;
    model again = turned;
    again.change = [&](float x, std::uint64_t token_text, std::size_t layer, std::size_t head, part_of part,
                       std::size_t channel) {
        if (token_text < t[0] + 1000) return turned.change(x, token_text, layer, head, part, channel);
        return value(token_text - 1000, static_cast<std::int64_t>(token_text - 1000 - t[0]), layer, head, part, channel);
    };
    CHECK(relative_error(got[0], exact(s, again, h, 5)) < 0.015);

    CHECK(kvarn_ggml_shift(e.cache(), 0, 50, 60, 1, kvarn_ggml_turn_rope, &rope) == KVARN_GGML_BAD_ARGUMENT);  // onto others
    CHECK(kvarn_ggml_shift(e.cache(), 0, 0, -1, 7, nullptr, &rope) == KVARN_GGML_BAD_ARGUMENT);
    CHECK(kvarn_ggml_shift(e.cache(), 2, 0, -1, 7, kvarn_ggml_turn_rope, &rope) == KVARN_GGML_OK);
}

TEST_CASE("ggml/adapter: a saved sequence goes on bit for bit")
{
    const shape s;
    const auto t = text(1, 250);
    engine e(s), other(s);
    run_steps(e, 0, t, {100, 45, 1});
    buffer file;
    REQUIRE(kvarn_ggml_save(e.cache(), 0, buffer::write, &file) == KVARN_GGML_OK);
    const std::size_t one = file.bytes.size();
    REQUIRE(kvarn_ggml_save(e.cache(), 3, buffer::write, &file) == KVARN_GGML_OK);  // without tokens, behind it
    run_steps(other, 1, text(5, 60), {50});
    run_steps(other, 3, text(5, 60), {50});
    CHECK(kvarn_ggml_load(other.cache(), 1, buffer::read, &file) == KVARN_GGML_OK);
    CHECK(file.at == one);
    CHECK(kvarn_ggml_load(other.cache(), 3, buffer::read, &file) == KVARN_GGML_OK);
    CHECK(kvarn_ggml_tokens(other.cache(), 3) == 0);
    CHECK(kvarn_ggml_tokens(other.cache(), 1) == 146);
    for (std::size_t at = 146; at < 200; ++at)
        CHECK(adapter::same_bits(other.run(1, static_cast<std::int64_t>(at), slice(t, at, 1)),
                                 e.run(0, static_cast<std::int64_t>(at), slice(t, at, 1))));

    // What is damaged or cut off is refused, and the sequence keeps what it had.
    for (const std::size_t at :
         {std::size_t{0}, std::size_t{4}, std::size_t{5}, std::size_t{9}, std::size_t{17}, std::size_t{22}, one / 2, one - 1}) {
        buffer bad = file;
        bad.at = 0;
        bad.bytes[at] ^= 1;
        INFO("byte " << at);
        const auto said = kvarn_ggml_load(other.cache(), 1, buffer::read, &bad);
        CHECK((said == KVARN_GGML_CORRUPT || (at >= 8 && at < 16 && said == KVARN_GGML_OTHER_CONFIGURATION)));
        CHECK(kvarn_ggml_tokens(other.cache(), 1) == 200);
    }
    buffer cut = file;
    cut.at = 0;
    cut.bytes.resize(one / 2);
    CHECK(kvarn_ggml_load(other.cache(), 1, buffer::read, &cut) == KVARN_GGML_IO);
    CHECK(adapter::same_bits(other.run(1, 200, slice(t, 200, 1)), e.run(0, 200, slice(t, 200, 1))));

    engine unlike(s, params_of(s, "k4v4_g32"));
    file.at = 0;
    CHECK(kvarn_ggml_load(unlike.cache(), 0, buffer::read, &file) == KVARN_GGML_OTHER_CONFIGURATION);
    shape more;
    more.layers = 3;
    engine layers(more);
    file.at = 0;
    CHECK(kvarn_ggml_load(layers.cache(), 0, buffer::read, &file) == KVARN_GGML_OTHER_CONFIGURATION);
    CHECK(std::string(layers.message()).find("2 layers") != std::string::npos);
}

TEST_CASE("ggml/adapter: windows, soft caps, sinks, slopes, scales")
{
    const shape s;
    const auto t = text(1, 150);
    std::vector<model> models(6);
    models[0].attention.window = 50;
    models[1].attention.soft_cap = 0.5f;
    models[2].sinks = {0.5f, -1.0f, 2.0f, 4.0f, 0.0f, 1.0f};
    models[3].slopes = {0.5f, 0.25f, 0.125f, 0.0625f, 0.03125f, 0.015625f};
    models[4].attention.scale = 0.5f;
    models[5] = models[2];
    models[5].slopes = models[3].slopes;
    models[5].attention = {0.25f, 3.0f, 70, nullptr};
    const auto plain = exact(s, {}, history(t), 5);
    for (std::size_t i = 0; i < models.size(); ++i) {
        INFO("model " << i);
        const kvarn_ggml_params p = params_of(s, "k8v8_g32");
        engine e(s, p, models[i]);
        core c(s, p, models[i]);
        run_steps(e, 0, t, {90, 55});
        run_steps(c, 0, t, {90, 55});
        const auto got = e.run(0, 145, slice(t, 145, 5));
        CHECK(e.said == KVARN_GGML_OK);
        CHECK(adapter::same_bits(got, c.run(0, 145, slice(t, 145, 5))));
        CHECK(relative_error(got[0], exact(s, models[i], history(t), 5)) < 0.02);
        CHECK(relative_error(got[0], plain) > 0.05);
    }
}

TEST_CASE("ggml/adapter: masks that are not causal")
{
    const shape s;
    const auto t = text(1, 150);
    const kvarn_ggml_params p = params_of(s, "k8v8_g32");
    engine e(s, p);
    core c(s, p);
    run_steps(e, 0, t, {100});
    run_steps(c, 0, t, {100});

    // All see all of the step.
    part all{0, 100, slice(t, 100, 20)};
    const auto free = e.run({all}, false);
    CHECK(adapter::same_bits(free, c.run({all}, false)));
    CHECK(relative_error(free[0], exact(s, {}, history(slice(t, 0, 120)), 20, [](std::size_t, std::size_t) { return true; })) <
          0.01);

    // A tree of drafts: 0 is the parent of 1 and 2, 2 of 3; and it is gone again but for the path 0, 2, 3, as an engine does it: by a new step.
    part tree{0, 120, slice(t, 120, 4)};
    tree.mask = {0b0001, 0b0011, 0b0101, 0b1101};
    tree.mask_stride = 1;
    tree.mask_tokens = 4;
    const auto seen = [&](std::size_t i, std::size_t j) { return j < 120 || (tree.mask[i - 120] >> (j - 120) & 1) != 0; };
    const auto got = e.run({tree});
    CHECK(adapter::same_bits(got, c.run({tree})));
    CHECK(relative_error(got[0], exact(s, {}, history(slice(t, 0, 124)), 4, seen)) < 0.01);
    CHECK(relative_error(got[0], exact(s, {}, history(slice(t, 0, 124)), 4)) > 0.02);

    // In a batch, one with a mask of several words, one causal.
    part wide{0, 124, slice(t, 124, 3)};
    wide.mask_tokens = 70;
    wide.mask_stride = 2;
    wide.mask = {~std::uint64_t{0}, 0b001111, ~std::uint64_t{2}, 0b011111, 0, 0b100000};
    const part beside{1, 0, slice(t, 0, 10)};
    CHECK(adapter::same_bits(e.run({wide, beside}), c.run({wide, beside})));
    CHECK(c.all_ok);

    part bad = wide;
    bad.position = 127;
    bad.mask_stride = 1;
    CHECK(e.begin({bad}) == KVARN_GGML_BAD_ARGUMENT);
}

TEST_CASE("ggml/adapter: a layer that reads the K and V of another")
{
    const shape s;
    model m;
    m.shared_layer = 1;
    engine e(s, m);
    core c(s, params_of(s), m);
    const auto t = text(1, 100);
    CHECK(same_bits(run_steps(e, 0, t, {60, 10, 1, 1}), run_steps(c, 0, t, {60, 10, 1, 1})));
    CHECK(e.said == KVARN_GGML_OK);
}

TEST_CASE("ggml/adapter: types, rotation by the engine, formats by rules")
{
    const auto t = text(1, 150);
    shape s;
    const auto want = [&](const kvarn_ggml_params& p, const char* format, std::span<const kvarn::bit_rule> rules = {}) {
        core c(s, p, {}, format, rules);
        return run_steps(c, 0, t, {60, 70, 1, 1});
    };
    const auto got = [&](const kvarn_ggml_params& p) {
        engine e(s, p);
        REQUIRE(e.cache() != nullptr);
        return run_steps(e, 0, t, {60, 70, 1, 1});
    };
    for (const ggml_type type : {GGML_TYPE_F16, GGML_TYPE_BF16}) {
        s.kv_type = type;
        CHECK(same_bits(got(params_of(s)), want(params_of(s), "k4v2_g32")));
    }
    s.kv_type = GGML_TYPE_F32;
    kvarn_ggml_params p = params_of(s);
    const auto plain = got(p);
    p.rotation = KVARN_GGML_ROTATED_BY_ENGINE;
    CHECK(same_bits(got(p), want(p, "k4v2_g32_kovo")));
    CHECK_FALSE(same_bits(got(p), plain));
    for (const kvarn_ggml_exact exact_type : {KVARN_GGML_BF16, KVARN_GGML_F32}) {
        p = params_of(s);
        p.exact = exact_type;
        CHECK(same_bits(got(p), want(p, "k4v2_g32")));
    }
    p = params_of(s);
    p.fast = true;
    CHECK(same_bits(got(p), want(p, "k4v2_g32")));
    CHECK_FALSE(same_bits(got(p), plain));

    const kvarn_ggml_rule rules[] = {{0, -1, 1, 1, 8, 0}, {-1, -1, 0, -1, 6, 5}};
    const kvarn::bit_rule same[] = {{.first_head = 1, .last_head = 1, .key_bits = 8},
                                    {.first_layer = -1, .key_bits = 6, .value_bits = 5}};
    p = params_of(s);
    p.rules = rules;
    p.rule_count = 2;
    CHECK(same_bits(got(p), want(p, "k4v2_g32", same)));
    CHECK_FALSE(same_bits(got(p), plain));
}

TEST_CASE("ggml/adapter: each head in its own basis")
{
    const shape s;
    model m;  // keys of head 1 are large in channels that queries hardly look at: better not rotated
    m.change = [](float x, std::uint64_t, std::size_t, std::size_t head, part_of part, std::size_t channel) {
        if (channel >= 4 || (part == of_k && head != 1) || (part == of_q && head < 3)) return x;
        return part == of_k ? x * 32 : part == of_q ? x / 64 : x;
    };
    const auto t = text(1, 200);
    const kvarn_ggml_params p = params_of(s, "k4v2_g32_auto");
    for (const int threads : {1, 4}) {
        engine e(s, p, m, threads);
        core c(s, p, m, "k4v2_g32");
        REQUIRE(e.cache() != nullptr);
        CHECK(kvarn_ggml_get_statistics(e.cache()).changed_bases == -1);
        std::vector<std::uint64_t> moments(kvarn::moment_count(c.pool));
        const auto add = [&](std::size_t first, std::size_t count) {
            std::vector<float> q;
            for (std::size_t layer = 0; layer < 2; ++layer) {
                q.clear();
                for (std::size_t i = first; i < first + count; ++i)
                    for (std::size_t h = 0; h < 6; ++h)
                        for (std::size_t ch = 0; ch < 64; ++ch)
                            q.push_back(m.at(t[i], static_cast<std::int64_t>(i), layer, h, of_q, ch));
                REQUIRE(kvarn::add_query_moments(c.pool, layer, kvarn::token_major<const float>(q.data(), count, 6, 64),
                                                 moments) == kvarn::status::ok);
            }
        };
        CHECK(same_bits(run_steps(e, 0, t, {50, 30}), run_steps(c, 0, t, {50, 30})));
        add(0, 80);
        REQUIRE(c.pool.statistics().records.used == 0);
        const auto changed = kvarn::choose_bases(c.pool, c.id(0), moments, c.scratch);
        REQUIRE(changed.ok());
        CHECK(*changed == 2);  // head 1 of both layers
        CHECK(same_bits(run_steps(e, 0, t, {40, 1, 1}, 80), run_steps(c, 0, t, {40, 1, 1}, 80)));
        CHECK(kvarn_ggml_get_statistics(e.cache()).changed_bases == 2);

        // Another cache takes the choice over with the sequence, unless that does not load.
        buffer file;
        REQUIRE(kvarn_ggml_save(e.cache(), 0, buffer::write, &file) == KVARN_GGML_OK);
        engine other(s, p, m);
        buffer bad = file;
        bad.bytes[bad.bytes.size() / 2] ^= 4;
        CHECK(kvarn_ggml_load(other.cache(), 0, buffer::read, &bad) == KVARN_GGML_CORRUPT);
        CHECK(kvarn_ggml_get_statistics(other.cache()).changed_bases == -1);
        CHECK(kvarn_ggml_load(other.cache(), 0, buffer::read, &file) == KVARN_GGML_OK);
        CHECK(kvarn_ggml_get_statistics(other.cache()).changed_bases == 2);
        CHECK(same_bits(run_steps(e, 0, t, {40, 1, 1}, 122), run_steps(other, 0, t, {40, 1, 1}, 122)));
    }
    // Where the first records come from a cache that does not choose, bases stay.
    engine fixed(s, params_of(s), m), taker(s, p, m);
    run_steps(fixed, 0, t, {100, 1});
    buffer file;
    REQUIRE(kvarn_ggml_save(fixed.cache(), 0, buffer::write, &file) == KVARN_GGML_OK);
    CHECK(kvarn_ggml_load(taker.cache(), 1, buffer::read, &file) == KVARN_GGML_OK);
    CHECK(kvarn_ggml_get_statistics(taker.cache()).changed_bases == 0);
    CHECK(same_bits(run_steps(taker, 1, t, {60, 1}, 101), run_steps(fixed, 0, t, {60, 1}, 101)));
    // A sequence that rests does not keep the others from going on.
    engine many(s, p, m);
    many.run(0, 0, slice(t, 0, 70));
    many.run(1, 0, slice(t, 0, 30));
    CHECK(many.said == KVARN_GGML_OK);
    CHECK(kvarn_ggml_get_statistics(many.cache()).changed_bases >= 0);

    kvarn_ggml_params both = p;
    both.rotation = KVARN_GGML_ROTATED_BY_ENGINE;
    CHECK(engine(s, both).cache() == nullptr);
}

TEST_CASE("ggml/adapter: a tile that no record can hold stays exact, and others do not see it")
{
    const shape s;
    const auto t = text(1, 200), u = text(2, 200);
    model m;
    m.change = [&](float x, std::uint64_t token_text, std::size_t layer, std::size_t head, part_of part, std::size_t channel) {
        return token_text == t[50] && layer == 1 && head == 0 && part == of_v && channel == 3
                   ? std::numeric_limits<float>::quiet_NaN()
                   : x;
    };
    engine e(s, m, 3), clean(s);
    core c(s, params_of(s), m);
    std::vector<outputs> got;
    for (std::size_t at = 0; at < 160; at += 40) {
        const auto position = static_cast<std::int64_t>(at);
        const auto both = e.run({{0, position, slice(t, at, 40)}, {1, position, slice(u, at, 40)}});
        CHECK(e.said == KVARN_GGML_OK);
        CHECK(adapter::same_bits({both[1]}, clean.run(1, position, slice(u, at, 40))));
        got.push_back({both[0]});
    }
    CHECK(any_nan(got[1][0]));
    const auto seen = kvarn_ggml_get_statistics(e.cache());
    CHECK(seen.kept_tiles == 1);  // 32..63
    CHECK(seen.sealed_tiles == 2 * 2 - 1);
    // When the token is gone, its sequence is whole again.
    CHECK(kvarn_ggml_remove(e.cache(), 0, 50, 51) == KVARN_GGML_OK);
    const auto after = e.run(0, 160, slice(t, 160, 2));
    CHECK_FALSE(any_nan(after[0]));
    run_steps(c, 0, t, {40, 40, 40, 40});
    REQUIRE(c.pool.erase(c.id(0), 50, 51) == kvarn::status::ok);
    CHECK(adapter::same_bits(after, c.run(0, 160, slice(t, 160, 2))));
}

TEST_CASE("ggml/adapter: a NaN among queries is told, and only its sequence has it")
{
    const shape s;
    const auto t = text(1, 100), u = text(2, 100);
    model m;
    m.change = [&](float x, std::uint64_t token_text, std::size_t layer, std::size_t, part_of part, std::size_t) {
        return token_text == t[70] && layer == 1 && part == of_q ? std::numeric_limits<float>::infinity() : x;
    };
    for (const int threads : {1, 4}) {
        engine e(s, m, threads), clean(s);
        e.run({{0, 0, slice(t, 0, 70)}, {1, 0, slice(u, 0, 70)}});
        clean.run(1, 0, slice(u, 0, 70));
        const auto got = e.run({{0, 70, slice(t, 70, 1)}, {1, 70, slice(u, 70, 1)}});
        CHECK(e.said == KVARN_GGML_NOT_FINITE);
        CHECK(std::string(e.message()).find("layer 1") != std::string::npos);
        CHECK(adapter::same_bits({got[1]}, clean.run(1, 70, slice(u, 70, 1))));
        CHECK_FALSE(any_nan({got[0].begin(), got[0].begin() + got[0].size() / 2}));
        CHECK(all_nan({got[0].begin() + got[0].size() / 2, got[0].end()}));
        CHECK(kvarn_ggml_tokens(e.cache(), 0) == 71);
        e.run(0, 71, slice(t, 71, 1));
        CHECK(e.said == KVARN_GGML_OK);
    }
}

TEST_CASE("ggml/adapter: a full pool says so before anything has changed")
{
    const shape s;
    kvarn_ggml_params p = params_of(s);
    p.pool_tokens = 64;
    p.sequences = 3;
    p.most_step = 30;
    const auto t = text(1, 400), u = text(2, 400);
    engine e(s, p, {}, 1), roomy(s);
    std::int64_t at[2] = {0, 0};
    kvarn_ggml_status said = KVARN_GGML_OK;
    for (int i = 0; said == KVARN_GGML_OK && i < 40; ++i) {
        const int q = i % 2;
        e.run(q, at[q], slice(q == 0 ? t : u, static_cast<std::size_t>(at[q]), 30));
        said = e.said;
        if (said == KVARN_GGML_OK) {
            roomy.run(q, at[q], slice(q == 0 ? t : u, static_cast<std::size_t>(at[q]), 30));
            at[q] += 30;
        }
    }
    CHECK(said == KVARN_GGML_NO_ROOM);
    CHECK(at[0] + at[1] > 256);
    CHECK(kvarn_ggml_tokens(e.cache(), 0) == at[0]);
    CHECK(kvarn_ggml_tokens(e.cache(), 1) == at[1]);
    const auto room = kvarn_ggml_get_statistics(e.cache()).free_exact_blocks;
    // A batch of which one does not fit takes nothing, and a new sequence is not left behind.
    CHECK(e.begin({{2, 0, slice(t, 0, 1)}, {0, at[0], slice(t, static_cast<std::size_t>(at[0]), 100)}}) == KVARN_GGML_NO_ROOM);
    CHECK(kvarn_ggml_first_position(e.cache(), 2) == -1);
    CHECK(kvarn_ggml_get_statistics(e.cache()).free_exact_blocks >= room);
    // Room for one, when the other is gone.
    CHECK(kvarn_ggml_remove(e.cache(), 1, 0, -1) == KVARN_GGML_OK);
    e.run(0, at[0], slice(t, static_cast<std::size_t>(at[0]), 30));
    CHECK(e.said == KVARN_GGML_OK);

    // One sequence has its own end.
    engine one(s, params_of(s));
    for (std::int64_t i = 0; i < 400; i += 100) one.run(0, i, slice(t, static_cast<std::size_t>(i), 100));
    CHECK(one.said == KVARN_GGML_OK);
    CHECK(one.begin({{0, 400, slice(t, 0, 1)}}) == KVARN_GGML_SEQUENCE_FULL);
    CHECK(one.begin({{1, 0, text(1, 401)}}) == KVARN_GGML_SEQUENCE_FULL);
    CHECK(kvarn_ggml_first_position(one.cache(), 1) == -1);
}

TEST_CASE("ggml/adapter: steps that were not computed do not count")
{
    const shape s;
    const auto t = text(1, 100);
    engine e(s), plain(s);
    run_steps(e, 0, t, {40});
    run_steps(plain, 0, t, {40});
    CHECK(e.begin({{0, 40, slice(t, 40, 5)}, {1, 0, slice(t, 0, 5)}}) == KVARN_GGML_OK);
    CHECK(kvarn_ggml_end(e.cache()) == KVARN_GGML_NOT_COMPUTED);
    CHECK(kvarn_ggml_end(e.cache()) == KVARN_GGML_OK);  // told once
    CHECK(kvarn_ggml_tokens(e.cache(), 0) == 40);
    CHECK(kvarn_ggml_first_position(e.cache(), 1) == -1);
    // What settles a step does not swallow what it found.
    CHECK(e.begin({{0, 40, slice(t, 40, 5)}}) == KVARN_GGML_OK);
    CHECK(kvarn_ggml_tokens(e.cache(), 0) == 40);
    CHECK(kvarn_ggml_end(e.cache()) == KVARN_GGML_NOT_COMPUTED);
    // A graph without a step, and one of other rows: NaN.
    CHECK(all_nan(e.compute({{0, 40, slice(t, 40, 5)}}, 5)[0]));
    CHECK(kvarn_ggml_tokens(e.cache(), 0) == 40);
    CHECK(e.begin({{0, 40, slice(t, 40, 4)}}) == KVARN_GGML_OK);
    CHECK(all_nan(e.compute({{0, 40, slice(t, 40, 5)}}, 5)[0]));
    CHECK(kvarn_ggml_end(e.cache()) == KVARN_GGML_NOT_COMPUTED);
    // The next step without an end.
    CHECK(e.begin({{0, 40, slice(t, 40, 5)}}) == KVARN_GGML_OK);
    const auto a = e.compute({{0, 40, slice(t, 40, 5)}}, 5);
    CHECK(adapter::same_bits(a, plain.run(0, 40, slice(t, 40, 5))));
    CHECK(adapter::same_bits(e.run(0, 45, slice(t, 45, 40)), plain.run(0, 45, slice(t, 45, 40))));
    CHECK(e.said == KVARN_GGML_OK);
}

TEST_CASE("ggml/adapter: what is refused, and why")
{
    const shape s;
    const auto why = [&](auto change) {
        kvarn_ggml_params p = params_of(s);
        change(p);
        char text_of[256] = "";
        kvarn_ggml_cache* const c = kvarn_ggml_create(&p, text_of, sizeof text_of);
        kvarn_ggml_free(c);
        return c != nullptr ? std::string() : std::string(text_of);
    };
    using params = kvarn_ggml_params;
    const auto has = [](const std::string& x, const char* part) { return x.find(part) != std::string::npos; };
    CHECK(why([](params&) {}).empty());
    CHECK(has(why([](params& p) { p.format = "q4_0"; }), "format `q4_0`"));
    CHECK(has(why([](params& p) { p.format = nullptr; }), "format"));
    CHECK(has(why([](params& p) { p.format = "k4v0_g32"; }), "latent"));
    CHECK(has(why([](params& p) { p.head_dim_k = 50; }), "head_dim 50"));
    CHECK(has(why([](params& p) { p.query_heads = 5; }), "query_heads"));
    CHECK(has(why([](params& p) { p.layers = 0; }), "layers"));
    CHECK(has(why([](params& p) { p.sequences = 0; }), "sequences"));
    CHECK(has(why([](params& p) { p.threads = 0; }), "threads"));
    CHECK(has(why([](params& p) { p.most_tokens = -1; }), "most_tokens"));
    CHECK(has(why([](params& p) { p.rule_count = 1; }), "rules"));
    const kvarn_ggml_rule nonsense = {0, -1, 0, -1, 7, 0};
    CHECK(has(why([&](params& p) { p.rules = &nonsense, p.rule_count = 1; }), "rules"));
    CHECK(kvarn_ggml_create(nullptr, nullptr, 0) == nullptr);

    engine e(s);
    ggml_context* const ctx = ggml_init({std::size_t{1} << 20, nullptr, false});
    const auto tensor = [&](ggml_type type, std::int64_t channels, std::int64_t heads, std::int64_t tokens) {
        return ggml_new_tensor_3d(ctx, type, channels, heads, tokens);
    };
    ggml_tensor *const q = tensor(GGML_TYPE_F32, 64, 6, 3), *const k = tensor(GGML_TYPE_F32, 64, 2, 3),
                       *const v = tensor(GGML_TYPE_F32, 32, 2, 3);
    const kvarn_ggml_attention_params a{}, capped{0, 5.0f, 0, nullptr}, wild{0, 2000.0f, 0, nullptr};
    const auto built = [&](int layer, ggml_tensor* x, ggml_tensor* y, ggml_tensor* z, const kvarn_ggml_attention_params* p) {
        return kvarn_ggml_attention(e.cache(), ctx, layer, x, y, z, nullptr, p);
    };
    CHECK(built(0, q, k, v, &wild) == nullptr);
    CHECK(has(e.message(), "soft cap"));
    CHECK(built(0, q, k, v, &a) != nullptr);
    CHECK(built(0, q, k, v, &capped) == nullptr);  // built otherwise before
    CHECK(has(e.message(), "layer 0"));
    CHECK(built(1, q, k, v, &capped) != nullptr);
    CHECK(built(2, q, k, v, &a) == nullptr);
    CHECK(built(0, q, k, nullptr, &a) == nullptr);
    CHECK(built(0, q, v, k, &a) == nullptr);
    CHECK(has(e.message(), "k is [32, 2, 3, 1], not [64, 2, tokens]"));
    CHECK(built(0, tensor(GGML_TYPE_F16, 64, 6, 3), k, v, &a) == nullptr);
    CHECK(built(0, q, tensor(GGML_TYPE_I32, 64, 2, 3), v, &a) == nullptr);
    CHECK(built(0, q, tensor(GGML_TYPE_F32, 64, 2, 4), v, &a) == nullptr);
    CHECK(kvarn_ggml_attention(e.cache(), ctx, 0, q, k, v, ggml_new_tensor_1d(ctx, GGML_TYPE_F32, 5), &a) == nullptr);
    ggml_free(ctx);

    const auto t = text(1, 40);
    const auto begins = [&](const std::vector<part>& parts) { return e.begin(parts); };
    CHECK(begins({}) == KVARN_GGML_BAD_ARGUMENT);
    CHECK(begins({{-1, 0, t}}) == KVARN_GGML_BAD_ARGUMENT);
    CHECK(begins({{4, 0, t}}) == KVARN_GGML_BAD_ARGUMENT);
    CHECK(begins({{0, -1, t}}) == KVARN_GGML_BAD_ARGUMENT);
    CHECK(begins({{0, 0, {}}}) == KVARN_GGML_BAD_ARGUMENT);
    CHECK(begins({{0, 0, t}, {0, 40, t}}) == KVARN_GGML_BAD_ARGUMENT);
    CHECK(begins({{0, 0, t, 1}}) == KVARN_GGML_BAD_ARGUMENT);
    CHECK(begins({{0, 0, t, 0, 2}}) == KVARN_GGML_BAD_ARGUMENT);
    CHECK(begins({{0, 0, t, 0, std::int64_t{1} << 62}}) == KVARN_GGML_BAD_ARGUMENT);
    CHECK(begins({{0, 0, t, 0}, {1, 0, t, 0}}) == KVARN_GGML_BAD_ARGUMENT);
    CHECK(has(e.message(), "row 0"));
    CHECK(begins({{0, 0, t, 40}, {1, 0, t, 0}}) == KVARN_GGML_OK);
    engine other(s);
    other.run(0, 0, t);
    CHECK(other.begin({{0, 39, t}}) == KVARN_GGML_BAD_ARGUMENT);
    CHECK(has(other.message(), "it goes on at 40"));
    CHECK(other.begin({{0, 41, t}}) == KVARN_GGML_BAD_ARGUMENT);
    CHECK(kvarn_ggml_tokens(other.cache(), 0) == 40);
}
