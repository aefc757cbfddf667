// SPDX-License-Identifier: Apache-2.0
// Drafts that are a tree: masks through plan_layer, and a path of them committed; the result is that of a sequence that never had the others.

#include <array>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "../catch.hpp"
#include "../support/seeded_cache.hpp"

namespace {

using kvarn::sequence_id;
using kvarn::status;
using support::cache_value;
using support::expect_ok;
using support::test_cache;

constexpr std::size_t heads = 2, group_heads = 2, dim = 32;

kvarn::cache_config tree_config()
{
    kvarn::cache_config c;
    c.policy = *kvarn::make_policy(*kvarn::parse_format("k4v4_g32", dim), 2, heads);
    c.sink_tokens = 32;
    c.sequences = 2;
    c.most_tokens = 256;
    c.most_step = 40;
    return c;
}

/// A node of the tree: its parent among the drafts (-1: the committed tokens) and its depth. Its values are those of its position and name.
struct node {
    int parent;
    std::size_t depth;
    std::uint64_t name;
};

/// Stores one node as draft number `draft` in all layers.
void store_node(test_cache& cache, sequence_id id, const node& n, std::size_t committed, std::size_t draft)
{
    std::vector<float> k(heads * dim), v(heads * dim);
    for (std::size_t layer = 0; layer < 2; ++layer) {
        for (std::size_t h = 0; h < heads; ++h)
            for (std::size_t c = 0; c < dim; ++c) {
                k[h * dim + c] = cache_value(n.name, static_cast<std::int64_t>(committed + n.depth), layer, h, 0, c);
                v[h * dim + c] = cache_value(n.name, static_cast<std::int64_t>(committed + n.depth), layer, h, 1, c);
            }
        expect_ok(kvarn::store(cache.pool, id, layer, kvarn::token_major<const float>(k.data(), 1, heads, dim),
                               kvarn::token_major<const float>(v.data(), 1, heads, dim), draft));
    }
}

std::vector<float> queries(const std::vector<node>& nodes)
{
    std::vector<float> q;
    for (const node& n : nodes)
        for (std::size_t h = 0; h < heads * group_heads; ++h)
            for (std::size_t c = 0; c < dim; ++c) q.push_back(cache_value(n.name, static_cast<std::int64_t>(n.depth), 1, h, 2, c));
    return q;
}

/// Outputs of the nodes as the newest tokens, [node][query head][channel].
std::vector<float> attend(test_cache& cache, sequence_id id, const std::vector<node>& nodes, const std::vector<std::uint64_t>& mask, std::size_t stride)
{
    const std::vector<float> q = queries(nodes);
    std::vector<float> out(q.size());
    kvarn::sequence_step step;
    step.sequence = id;
    step.q = kvarn::token_major<const float>(q.data(), nodes.size(), heads * group_heads, dim);
    step.out = kvarn::token_major(out.data(), nodes.size(), heads * group_heads, dim);
    if (!mask.empty()) {
        step.mask = mask.data();
        step.mask_stride = stride;
        step.mask_tokens = nodes.size();
    }
    for (const std::size_t rows : {2u, 4u, 32u, 1024u}) {
        kvarn::layer_options options;
        options.rows_per_task = rows;
        options.threads = 8;
        options.chunks_per_item = 1;
        std::vector<std::byte> work(kvarn::layer_memory_bytes(cache.pool, {&step, 1}, options));
        std::vector<std::byte> scratch(kvarn::cache_scratch_bytes(cache.pool.config(), rows));
        const auto items = kvarn::plan_layer(cache.pool, 1, {&step, 1}, options, work);
        expect_ok(items.error);
        const std::vector<float> before = out;
        expect_ok(items->run(scratch));
        if (rows != 2) CHECK(out == before);  // however the queries are cut
    }
    return out;
}

/// The drafts 0 to i that node i has above it, and itself, lowest first.
std::vector<std::size_t> path_of(const std::vector<node>& nodes, std::size_t i)
{
    std::vector<std::size_t> path;
    for (int at = static_cast<int>(i); at >= 0; at = nodes[static_cast<std::size_t>(at)].parent) path.insert(path.begin(), static_cast<std::size_t>(at));
    return path;
}

}  // namespace

TEST_CASE("cache/tree: what a node sees is its path, and the path can be committed", "[unit]")
{
    // Enough nodes for two mask words and two exact blocks: a trunk, and branches at every third of it.
    std::vector<node> nodes;
    for (int i = 0, trunk = -1; i < 70; ++i) {
        const bool branch = i % 3 == 2;
        const std::size_t depth = trunk < 0 ? 0 : nodes[static_cast<std::size_t>(trunk)].depth + 1;
        nodes.push_back({trunk, depth, 1000 + static_cast<std::uint64_t>(i)});
        if (!branch) trunk = i;
    }
    constexpr std::size_t stride = 2;
    std::vector<std::uint64_t> mask(nodes.size() * stride);
    for (std::size_t i = 0; i < nodes.size(); ++i)
        for (const std::size_t seen : path_of(nodes, i)) mask[i * stride + seen / 64] |= std::uint64_t{1} << seen % 64;

    test_cache cache(tree_config());
    const sequence_id id = cache.open();
    constexpr std::size_t committed = 110;
    cache.append(id, 1, committed);
    CHECK(cache.seal(id).sealed == 2);
    const auto plain = cache.pool.fork(id);
    expect_ok(plain.error);
    expect_ok(cache.pool.reserve(id, nodes.size()));
    for (std::size_t i = 0; i < nodes.size(); ++i) store_node(cache, id, nodes[i], committed, i);
    const std::vector<float> out = attend(cache, id, nodes, mask, stride);

    const std::vector<std::size_t> path = path_of(nodes, 69);
    REQUIRE(path.size() == 47);
    std::vector<node> chosen;
    for (const std::size_t i : path) chosen.push_back(nodes[i]);
    expect_ok(cache.pool.reserve(*plain, chosen.size()));
    for (std::size_t i = 0; i < chosen.size(); ++i) store_node(cache, *plain, chosen[i], committed, i);
    const std::vector<float> alone = attend(cache, *plain, chosen, {}, 0);
    const std::size_t row = heads * group_heads * dim;
    double error = 0, square = 0;
    for (std::size_t i = 0; i < path.size(); ++i)
        for (std::size_t c = 0; c < row; ++c) {
            const double d = double{out[path[i] * row + c]} - alone[i * row + c];
            error += d * d;
            square += double{alone[i * row + c]} * alone[i * row + c];
        }
    CHECK(error < 1e-10 * square);

    expect_ok(cache.pool.commit(id, path));
    expect_ok(cache.pool.commit(*plain, chosen.size()));
    CHECK(cache.pool.tokens(id) == committed + path.size());
    CHECK(cache.seal(id).sealed == cache.seal(*plain).sealed);
    CHECK(cache.attend(id, 3, 2) == cache.attend(*plain, 3, 2));
    cache.append(id, 1, 30);
    cache.append(*plain, 1, 30);
    cache.seal(id);
    cache.seal(*plain);
    CHECK(cache.attend(id, 3, 2) == cache.attend(*plain, 3, 2));
}

TEST_CASE("cache/tree: paths that are none are refused, and change nothing", "[unit]")
{
    test_cache cache(tree_config());
    const sequence_id id = cache.open();
    cache.append(id, 1, 20);
    expect_ok(cache.pool.reserve(id, 5));
    cache.store(id, 2, 0, 4);
    const auto refused = [&](std::initializer_list<std::size_t> path) {
        CHECK(cache.pool.commit(id, std::vector<std::size_t>(path)) == status::bad_argument);
        CHECK(cache.pool.drafts(id) == 5);
        CHECK(cache.pool.tokens(id) == 20);
    };
    refused({1, 0});
    refused({2, 2});
    refused({0, 5});
    refused({1, 4});  // not stored
    CHECK(cache.pool.commit({1, 1}, std::array<std::size_t, 1>{0}) == status::stale_handle);
    expect_ok(cache.pool.commit(id, std::array<std::size_t, 2>{1, 3}));
    CHECK(cache.pool.tokens(id) == 22);
    CHECK(cache.pool.next_position(id) == 22);
    expect_ok(cache.pool.reserve(id, 2));
    expect_ok(cache.pool.commit(id, std::span<const std::size_t>{}));
    CHECK(cache.pool.tokens(id) == 22);
}
