// SPDX-License-Identifier: Apache-2.0
// The lock step of the example language_model: its figures against logits of single runs in double, sequence by
// sequence; means, errors and percentiles by hand; threads that share the work.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstddef>
#include <random>
#include <span>
#include <stdexcept>
#include <string>
#include <vector>

#include "examples/language_model/likelihood.hpp"
#include "tests/catch.hpp"
#include "tiny_model.hpp"

namespace {

using namespace language_model;

/// A model and random sequences for it.
struct bench {
    explicit bench(const tiny::spec& s, std::size_t count, std::size_t length)
    {
        tiny::write_directory(here / "m", s, tiny::random_tensors(s, 5));
        m = read_model((here / "m").string());
        e.model = &m;
        for (std::size_t i = 0; i < count; ++i) {
            const auto x = tiny::random_tokens(length, s.vocabulary, static_cast<unsigned>(20 + i));
            e.sequences.emplace_back(x.begin(), x.end());
        }
    }
    tiny::folder here;
    model m;
    experiment e;
};

/// The figures of one sequence from whole rows of logits, each cache run alone.
token_scores scores_alone(const experiment& e, const cache_plan& plan, std::size_t sequence)
{
    using namespace evaluate_detail;
    const std::span<const std::int32_t> x = e.sequences[sequence];
    const std::size_t fed = x.size() - 1;
    const cache_plan exact = exact_plan(*e.model);
    kv_cache exact_cache(exact, shape_of(e.model->config), fed), cache(plan, shape_of(e.model->config), fed);
    decoder reference(*e.model, exact_cache), tested(*e.model, cache);
    token_scores out;
    std::vector<double> p, q;
    const std::size_t vocabulary = e.model->config.vocabulary;
    for (std::size_t at = 0; at < fed; ++at) {
        reference.run(x.subspan(at, 1));
        tested.run(x.subspan(at, 1));
        if (at + 1 < e.from) continue;
        const float *const a = reference.last_logits().data(), *const b = tested.last_logits().data();
        log_softmax(a, vocabulary, p);
        log_softmax(b, vocabulary, q);
        out.nll.push_back(static_cast<float>(-q[static_cast<std::size_t>(x[at + 1])]));
        out.kl.push_back(static_cast<float>(divergence(p, q)));
        out.agrees.push_back(argmax(a, vocabulary) == argmax(b, vocabulary));
        out.right.push_back(argmax(b, vocabulary) == x[at + 1]);
    }
    return out;
}

std::vector<float> rising(std::size_t n)
{
    std::vector<float> x(n);
    for (std::size_t i = 0; i < n; ++i) x[i] = static_cast<float>(i + 1);
    return x;
}

}  // namespace

TEST_CASE("language_model/lockstep: every figure is what the cache alone gives", "[lockstep]")
{
    // More tokens than one block of the vocabulary has, groups and sinks that cut blocks at different places.
    tiny::spec s;
    s.vocabulary = 2500;
    bench b(s, 2, 150);
    b.e.from = 60;
    b.e.threads = 3;
    auto plans = plans_of("k2v2_g32:paper,exact,k3v2_g64_auto,q8_0", s.head_dim, {20, {}, s.layers, s.kv_heads});
    plans[2].sink = 64;
    const evaluation all = evaluate(b.e, plans, {true, false, false});
    REQUIRE(all.exact.size() == 2);
    for (std::size_t i = 0; i < plans.size(); ++i)
        for (std::size_t sequence = 0; sequence < 2; ++sequence) {
            CAPTURE(plans[i].name, sequence);
            const token_scores &got = all.caches[i].teacher[sequence], want = scores_alone(b.e, plans[i], sequence);
            REQUIRE((got.size() == 90 && want.size() == 90 && got.kl.size() == 90 && got.agrees.size() == 90 &&
                     got.right.size() == 90));
            std::size_t other_top = 0;
            double nll = 0, kl = 0;  // mean differences
            for (std::size_t t = 0; t < 90; ++t) {
                nll += static_cast<double>(std::fabs(got.nll[t] - want.nll[t])) / 90;
                kl += static_cast<double>(std::fabs(got.kl[t] - want.kl[t])) / 90;
                other_top += got.agrees[t] != want.agrees[t] || got.right[t] != want.right[t];
            }
            // Float rounding differs between blocks and single tokens, and may tip a code of a record over to its
            // neighbour.
            CHECK(nll < (i == 1 ? 1e-3 : 0.02));
            CHECK(kl <= (i == 1 ? 0.0 : 0.01));
            CHECK(other_top <= 2);
            CHECK(likelihood_of({got}, {all.exact[sequence]}).kl.mean ==
                  Approx(likelihood_of({want}, {all.exact[sequence]}).kl.mean).epsilon(0.05).margin(1e-9));
        }
    CHECK(all.caches[0].teacher[0].kl != all.caches[0].teacher[1].kl);
    // The exact cache is the exact run itself.
    CHECK(all.caches[1].teacher[1].nll == all.exact[1].nll);
    for (const float kl : all.exact[0].kl) CHECK(kl == 0.0f);
}

TEST_CASE("language_model/lockstep: scores of given logits", "[lockstep]")
{
    // An output layer that hands states through as logits, 3000 of them: three blocks of the vocabulary.
    constexpr std::size_t vocabulary = 3000;
    model m;
    m.config.vocabulary = m.config.hidden = vocabulary;
    m.embedding = matrix::Identity(vocabulary, vocabulary);
    std::mt19937 random(3);
    std::normal_distribution<float> normal(0, 4);
    matrix states(6, vocabulary);  // caches 0 to 2, two tokens each
    for (Eigen::Index i = 0; i < states.size(); ++i) states.data()[i] = normal(random);
    states.row(4) = states.row(0);
    states(4, 2999) = 60;                         // nearly all probability, in the last block
    states.row(5) = states.row(1).array() + 500;  // logits are relative
    team helpers(2);
    std::vector<token_scores> scores(3);
    const std::int32_t right[] = {7, 2999};
    score_tokens(m, states, 3, 0, right, scores, helpers);
    for (Eigen::Index cache = 0; cache < 3; ++cache)
        for (Eigen::Index t = 0; t < 2; ++t) {
            CAPTURE(cache, t);
            std::vector<double> p, q;
            evaluate_detail::log_softmax(states.row(t).data(), vocabulary, p);
            evaluate_detail::log_softmax(states.row(2 * cache + t).data(), vocabulary, q);
            const token_scores& got = scores[static_cast<std::size_t>(cache)];
            const auto at = static_cast<std::size_t>(t);
            CHECK(got.nll[at] == Approx(-q[static_cast<std::size_t>(right[at])]).epsilon(1e-5));
            CHECK(got.kl[at] == Approx(evaluate_detail::divergence(p, q)).epsilon(1e-5).margin(3e-5));
            CHECK(got.agrees[at] == (cache == 0 || (cache == 2 && t == 1)));
        }
    CHECK((scores[2].kl[0] > 30 && scores[2].kl[1] < 1e-4f && scores[0].kl[0] == 0));
    // Some tokens of a block only.
    std::vector<token_scores> last(3);
    score_tokens(m, states, 3, 1, std::span(right).last(1), last, helpers);
    CHECK((last[1].size() == 1 && last[1].kl[0] == scores[1].kl[1] && last[1].nll[0] == scores[1].nll[1]));
    states(0, 5) = NAN;
    CHECK(tiny::refusal([&] { score_tokens(m, states, 3, 0, right, scores, helpers); }).find("not finite") != std::string::npos);
}

TEST_CASE("language_model/lockstep: figures do not depend on the number of threads", "[lockstep]")
{
    bench b(tiny::spec{}, 2, 200);
    const auto plans = plans_of("exact,k2v2_g32,kivi2_g32", 32, {16, {}, 2, 2});
    b.e.threads = 1;
    const evaluation one = evaluate(b.e, plans, {true, false, false});
    b.e.threads = 4;
    const evaluation four = evaluate(b.e, plans, {true, false, false});
    for (std::size_t i = 0; i < plans.size(); ++i)
        for (std::size_t s = 0; s < 2; ++s) {
            CHECK(one.caches[i].teacher[s].nll == four.caches[i].teacher[s].nll);
            CHECK(one.caches[i].teacher[s].kl == four.caches[i].teacher[s].kl);
        }
    CHECK(csv_report(one, b.e) == csv_report(four, b.e));
}

TEST_CASE("language_model/lockstep: means and their errors", "[lockstep]")
{
    // Runs of 64 in each sequence: 1, 3 and, half as long, 5.
    const std::vector<std::vector<float>> figures{std::vector<float>(64, 1), std::vector<float>(96, 3)};
    std::vector<std::vector<float>> with_rest = figures;
    for (std::size_t i = 64; i < 96; ++i) with_rest[1][i] = 5;
    const estimate e = estimate_of(2, [&](std::size_t s) { return with_rest[s]; });
    const double mean = (64 * 1 + 64 * 3 + 32 * 5) / 160.0;
    CHECK(e.mean == Approx(mean));
    const double squares = std::pow(64 * (1 - mean), 2) + std::pow(64 * (3 - mean), 2) + std::pow(32 * (5 - mean), 2);
    CHECK(e.error == Approx(std::sqrt(squares * 3 / 2) / 160));
    CHECK(std::isnan(estimate_of(1, [&](std::size_t) { return figures[0]; }).error));
    CHECK(std::isnan(estimate_of(0, [&](std::size_t) { return figures[0]; }).mean));
    // The error says how far means of new samples lie from the truth.
    std::mt19937 random(4);
    std::normal_distribution<float> normal(1, 2);
    double squared = 0, claimed = 0;
    for (int trial = 0; trial < 200; ++trial) {
        std::vector<float> x(640);
        for (float& one : x) one = normal(random);
        const estimate sample = estimate_of(1, [&](std::size_t) { return x; });
        squared += std::pow(sample.mean - 1, 2) / 200;
        claimed += sample.error * sample.error / 200;
    }
    CHECK(claimed == Approx(squared).epsilon(0.25));
    CHECK(claimed == Approx(4.0 / 640).epsilon(0.15));
}

TEST_CASE("language_model/lockstep: percentiles and ranges", "[lockstep]")
{
    CHECK(quantile(rising(1000), 0.99) == 990);
    CHECK(quantile(rising(1000), 0.999) == 999);
    CHECK(quantile(rising(10), 0.99) == 10);
    CHECK(quantile(rising(1), 0.5) == 1);
    const auto is = [](std::size_t first, std::size_t end, const std::vector<std::size_t>& cuts) {
        const auto ranges = language_model::ranges_of(first, end);
        std::vector<std::size_t> got{ranges.front().first};
        for (const position_range& r : ranges) {
            CHECK(r.first == got.back());
            got.push_back(r.end);
        }
        return got == cuts;
    };
    CHECK(is(256, 2048, {256, 512, 1024, 2048}));
    CHECK(is(1, 100, {1, 64, 100}));
    CHECK(is(1026, 1537, {1026, 1537}));
    CHECK(is(256, 1100, {256, 512, 1100}));  // the rest would be a short piece
    CHECK(is(300, 301, {300, 301}));
    CHECK(is(120, 200, {120, 200}));  // and so would be the beginning
    CHECK(is(120, 128, {120, 128}));
}

TEST_CASE("language_model/lockstep: pairs", "[lockstep]")
{
    // Two caches whose figures are far from each other but differ by nearly the same everywhere: the pairing sees it.
    std::vector<token_scores> a(1), b(1);
    std::mt19937 random(6);
    std::normal_distribution<float> normal(0, 3);
    for (std::size_t i = 0; i < 640; ++i) {
        const float x = normal(random);
        a[0].nll.push_back(x + 0.01f * static_cast<float>(i % 2));
        b[0].nll.push_back(x - 0.1f);
        for (auto* one : {&a[0], &b[0]}) one->kl.push_back(1), one->agrees.push_back(1), one->right.push_back(i % 4 == 0);
    }
    const difference d = difference_of(a, b);
    CHECK(d.nll.mean == Approx(0.105).epsilon(1e-3));
    CHECK(d.nll.error < 1e-3);
    CHECK((d.kl.mean == 0 && d.kl.error == 0));
    const likelihood l = likelihood_of(a, b);
    CHECK((l.accuracy == 0.25 && l.agreement == 1 && l.kl_p99 == 1));
    CHECK(l.excess.mean == d.nll.mean);
}

TEST_CASE("language_model/lockstep: a team does every item once, and fails with the first failure", "[lockstep]")
{
    for (const unsigned threads : {1u, 2u, 5u}) {
        team helpers(threads);
        for (std::size_t round = 0; round < 300; ++round) {
            std::vector<std::atomic<int>> done(round % 50);
            helpers.each(done.size(), [&](std::size_t i) { ++done[i]; });
            CHECK(std::all_of(done.begin(), done.end(), [](const auto& x) { return x == 1; }));
        }
        std::string problem;
        try {
            helpers.each(20, [](std::size_t i) {
                if (i % 7 == 3) throw std::runtime_error(std::to_string(i));
            });
        } catch (const std::runtime_error& e) {
            problem = e.what();
        }
        CHECK(problem == "3");
        std::atomic<int> after{0};
        helpers.each(9, [&](std::size_t) { ++after; });
        CHECK(after == 9);
    }
}
