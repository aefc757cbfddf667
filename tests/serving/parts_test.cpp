// SPDX-License-Identifier: Apache-2.0
// The parts of the example serving: that a row's bits do not depend on the batch, that the check sees every kind of difference, what drafts are, what
// a parked sequence holds, and how requests are made up.

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "examples/serving/check.hpp"
#include "tests/catch.hpp"
#include "tests/language_model/tiny_model.hpp"

namespace {

using namespace serving;
using tiny::refusal;

struct bench {
    bench()
    {
        s.vocabulary = 90;
        tiny::write_directory(here / "m", s, tiny::random_tensors(s, 5));
        m = language_model::read_model((here / "m").string());
        plan = language_model::plan_of("k3v2_g32", s.head_dim, {32, {}, s.layers, s.kv_heads});
        for (unsigned i = 0; i < 3; ++i) {
            request r;
            const auto x = tiny::random_tokens(70 + 20 * i, s.vocabulary, i);
            r.prompt.assign(x.begin(), x.end());
            r.generate = 40;
            requests.push_back(r);
        }
    }
    tiny::spec s;
    tiny::folder here;
    language_model::model m;
    language_model::cache_plan plan;
    std::vector<request> requests;
};

/// The rows of logits of the tokens of some sequences, run in steps of given lengths, all sequences in every step.
std::vector<std::vector<float>> logits_of(const bench& b, const std::vector<tokens>& all, const std::vector<std::size_t>& lengths, unsigned threads)
{
    language_model::team helpers(threads);
    engine e(b.m, config_for(b.plan, b.m.config, 200, all.size(), all.size()), helpers);
    std::vector<kvarn::sequence_id> ids;
    for (std::size_t i = 0; i < all.size(); ++i) ids.push_back(*e.pool().open());
    std::vector<std::vector<float>> out(all.size());
    std::size_t at = 0;
    for (const std::size_t length : lengths) {
        std::vector<part> parts;
        for (std::size_t i = 0; i < all.size(); ++i) {
            REQUIRE(e.pool().reserve(ids[i], length) == kvarn::status::ok);
            parts.push_back({ids[i], std::span(all[i]).subspan(at, length)});
        }
        e.run(parts);
        std::vector<std::size_t> rows(all.size() * length);
        for (std::size_t r = 0; r < rows.size(); ++r) rows[r] = r;
        const language_model::matrix& logits = e.logits(rows);
        for (std::size_t i = 0; i < all.size(); ++i) {
            const float* const first = logits.row(static_cast<Eigen::Index>(i * length)).data();
            out[i].insert(out[i].end(), first, first + length * b.m.config.vocabulary);
            REQUIRE(e.pool().commit(ids[i], length) == kvarn::status::ok);
        }
        at += length;
    }
    return out;
}

}  // namespace

TEST_CASE("serving/parts: a row has the bits that it has alone", "[parts]")
{
    const bench b;
    std::vector<tokens> all;
    for (const request& r : b.requests) all.push_back({r.prompt.begin(), r.prompt.begin() + 60});
    const auto together = logits_of(b, all, {60}, 3);
    CHECK((together == logits_of(b, all, {1, 30, 2, 27}, 2)));
    CHECK((together == logits_of(b, all, std::vector<std::size_t>(60, 1), 1)));
    for (std::size_t i = 0; i < all.size(); ++i) {
        CHECK((logits_of(b, {all[i]}, {60}, 1).front() == together[i]));
        CHECK((logits_of(b, {all[i]}, {7, 53}, 1).front() == together[i]));
    }
    // And they are the model's: as the products that are made for all rows together, up to rounding.
    language_model::matrix from(5, 70), weight(33, 70), alone, mixed;
    from.setRandom();
    weight.setRandom();
    language_model::multiply(from, weight, alone, nullptr, language_model::row_sums::alone);
    language_model::multiply(from, weight, mixed, nullptr);
    CHECK((alone - mixed).cwiseAbs().maxCoeff() < 1e-4f);
    CHECK(mixed.cwiseAbs().maxCoeff() > 1);
}

TEST_CASE("serving/parts: the check sees other tokens, other logits and other caches", "[parts]")
{
    const bench b;
    language_model::team helpers(2);
    engine e(b.m, config_for(b.plan, b.m.config, 150, 4, 3), helpers);
    schedule_options options;
    options.running = 3;
    options.prefixes = 1;
    options.drafts.source = draft_source::ngram;
    scheduler s(e, b.requests, options);
    std::size_t calls = 0;
    s.run([&](std::size_t) { ++calls; });
    CHECK(calls == s.moments().size());
    const auto says = [&](auto change) {
        std::vector<answer> answers = s.answers();
        change(answers);
        return refusal([&] { check_answers(b.m, b.plan, b.requests, answers, 1); });
    };
    CHECK(says([](std::vector<answer>&) {}) == "accepted");
    CHECK(says([](std::vector<answer>& a) { a[1].ids[7] ^= 1; }).find("check: request 1 has other tokens, from the 7th on, than it has alone") == 0);
    CHECK(says([](std::vector<answer>& a) { a[2].logits[39] ^= 1; }).find("check: request 2 has other logits, from the 39th") == 0);
    CHECK(says([](std::vector<answer>& a) { a[0].cache ^= 1; }).find("check: request 0 has other records or exact tokens") == 0);
    // Another format, or another sink, is another cache.
    language_model::cache_plan other = b.plan;
    other.sink = 64;
    CHECK(refusal([&] { check_answers(b.m, other, b.requests, s.answers(), 1); }).find("check: request 0 has other") == 0);
    // The digest is of every byte: a pool whose sequences differ in one value of one token.
    CHECK(s.answers()[0].cache != s.answers()[1].cache);
}

TEST_CASE("serving/parts: the digest of a sequence does not depend on where its blocks lie, and sees one bit", "[parts]")
{
    const bench b;
    language_model::team helpers(1);
    engine e(b.m, config_for(b.plan, b.m.config, 150, 4, 4), helpers);
    kvarn::cache_pool& pool = e.pool();
    const tokens x(b.requests[2].prompt.begin(), b.requests[2].prompt.begin() + 110);
    const auto filled = [&](const tokens& known) {
        const kvarn::sequence_id id = *pool.open();
        for (std::size_t at = 0; at < known.size();) {
            const std::size_t count = std::min<std::size_t>(32 - at % 32, known.size() - at);
            REQUIRE(pool.reserve(id, count) == kvarn::status::ok);
            const part one{id, std::span(known).subspan(at, count)};
            e.run({&one, 1});
            REQUIRE(pool.commit(id, count) == kvarn::status::ok);
            REQUIRE(kvarn::begin_seal(pool, id).ok());
            e.seal(SIZE_MAX);
            at += count;
        }
        return id;
    };
    const kvarn::sequence_id first = filled(x), second = filled(x);
    const std::uint64_t sum = digest_of(pool, first);
    CHECK(digest_of(pool, second) == sum);
    tokens changed = x;
    changed.back() ^= 1;
    CHECK(digest_of(pool, filled(changed)) != sum);
    REQUIRE(pool.truncate(second, 109) == kvarn::status::ok);
    CHECK(digest_of(pool, second) != sum);
    const parked_sequence parked(pool, first);
    REQUIRE(pool.close(first) == kvarn::status::ok);
    const auto loaded = parked.load(pool);
    REQUIRE(loaded.ok());
    CHECK(digest_of(pool, *loaded) == sum);
    // A pool without room says so, and the sequence is still there for later.
    kvarn::cache_config few = config_for(b.plan, b.m.config, 150, 1, 1);
    few.exact_blocks = 1;
    engine small(b.m, few, helpers);
    CHECK(parked.load(small.pool()).error == kvarn::status::no_room);
}

TEST_CASE("serving/parts: drafts", "[parts]")
{
    request r;
    r.prompt = {1, 2, 3, 4, 1, 2, 5, 1, 2};
    r.expected = {10, 11, 12, 13};
    draft_options o;
    const auto propose = [&](const tokens& known, std::size_t most) { return drafter(o, 50).propose(r, known, most); };
    CHECK(propose(r.prompt, 4).empty());
    o.source = draft_source::ngram;
    CHECK(propose(r.prompt, 4) == tokens{5, 1, 2});            // the last time after 1 2, not the first
    CHECK(propose(r.prompt, 2) == tokens{5, 1});
    CHECK(propose({3, 1, 2, 9, 1, 2, 8, 3, 1, 2}, 1) == tokens{9});  // three tokens say more than two
    CHECK(propose({1, 2, 3}, 4).empty());
    CHECK(propose({7}, 4).empty());
    CHECK(propose({7, 7}, 4) == tokens{7});
    o.source = draft_source::expected;
    o.accuracy = 1;
    CHECK(propose(r.prompt, 9) == tokens{10, 11, 12, 13});
    tokens known = r.prompt;
    known.insert(known.end(), {10, 11, 12});
    CHECK(propose(known, 9) == tokens{13});
    o.most = 2;
    CHECK(propose(r.prompt, 9) == tokens{10, 11});
    CHECK(propose(r.prompt, 0).empty());
    o.accuracy = 0.7;
    o.rejection = 0.2;
    o.most = 1000;
    r.expected.assign(1000, 77);
    drafter d(o, 50);
    const tokens many = d.propose(r, r.prompt, 1000);
    const auto right = std::count(many.begin(), many.end(), 77);
    CHECK((many.size() == 1000 && right > 640 && right < 760));
    std::size_t rejected = 0;
    for (int i = 0; i < 1000; ++i) rejected += d.rejects();
    CHECK((rejected > 150 && rejected < 250));
}

TEST_CASE("serving/parts: requests that are made up", "[parts]")
{
    traffic t;
    t.count = 20;
    t.contexts = 4;
    const auto walks = walk_requests(t, 30), again = walk_requests(t, 30);
    REQUIRE(walks.size() == 20);
    std::size_t shared = 0;
    for (std::size_t i = 0; i < walks.size(); ++i) {
        const request& r = walks[i];
        CHECK((r.prompt == again[i].prompt && r.generate == again[i].generate && r.arrival == again[i].arrival));
        CHECK((r.prompt.size() == 62 && r.prompt[60] == 60 && r.expected.size() == r.generate));
        CHECK((r.generate >= 12 && r.generate <= 24));
        CHECK((i == 0 || (r.arrival >= walks[i - 1].arrival && r.arrival <= walks[i - 1].arrival + t.gap)));
        // Every hop is what is stored under the one before.
        std::int32_t now = r.prompt[61];
        for (const std::int32_t next : r.expected) {
            const auto pair = std::find(r.prompt.begin(), r.prompt.begin() + 60, now + 30);
            CHECK(*(pair + 1) == next);
            now = next;
        }
        for (std::size_t j = 0; j < i; ++j) shared += std::equal(r.prompt.begin(), r.prompt.begin() + 61, walks[j].prompt.begin());
    }
    CHECK(shared >= 16);
    t.seed = 2;
    CHECK(walk_requests(t, 30)[0].prompt != walks[0].prompt);

    const std::vector<tokens> texts{{1, 2, 3, 4, 5, 6, 7, 8}, {9}};
    t.generate = 5;
    for (const request& r : text_requests(t, texts)) {
        CHECK(!r.prompt.empty());
        CHECK(r.prompt.size() <= 4);
        const tokens& x = texts[r.prompt[0] == 1 ? 0 : 1];
        tokens all = r.prompt;
        all.insert(all.end(), r.expected.begin(), r.expected.end());
        CHECK((all.size() <= x.size() && std::equal(all.begin(), all.end(), x.begin())));
        CHECK((r.generate >= 3 && r.generate <= 5));
    }
}
