// SPDX-License-Identifier: Apache-2.0
// Saved sequences: the same bytes and the same attention after loading, whole and by layers; every truncation and every change of a byte
// refused, and nothing left behind; failures of the caller's functions; other configurations, with the field that differs.

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <span>
#include <string>
#include <vector>

#include "../catch.hpp"
#include "../support/repair_file.hpp"
#include "../support/seeded_cache.hpp"

#include <kvarn/cache/load.hpp>

namespace {

using kvarn::sequence_id;
using kvarn::status;
using support::expect_ok;
using support::test_cache;
using file_bytes = std::vector<std::byte>;

kvarn::cache_config small_config(kvarn::exact_type exact = kvarn::exact_type::f16)
{
    static const kvarn::bit_rule rules[] = {{.first_layer = 1, .first_head = 1, .key_bits = 2, .key_rotation = kvarn::rotation::none}};
    kvarn::cache_config c;
    c.policy = *kvarn::make_policy(*kvarn::parse_format("k4v2_g32", 32), 2, 2, rules);
    c.exact = exact;
    c.sink_tokens = 32;
    c.recent_tokens = 8;
    c.sequences = 4;
    c.most_tokens = 256;
    c.record_blocks = 12;
    c.exact_blocks = 24;
    return c;
}

file_bytes saved(const kvarn::cache_pool& pool, sequence_id id, kvarn::layer_range layers = {})
{
    file_bytes file;
    expect_ok(kvarn::save(pool, id, [&](std::span<const std::byte> piece) {
        file.insert(file.end(), piece.begin(), piece.end());
        return true;
    }, layers));
    CHECK(file.size() == kvarn::saved_bytes(pool, id, layers));
    return file;
}

kvarn::result<sequence_id> loaded(const kvarn::cache_pool& pool, std::span<const std::byte> file, const char** differs = nullptr)
{
    return kvarn::load(pool, kvarn::buffer_source(file), differs);
}

/// A sequence with everything in it: sink, records, a cut record, two parts of one block, a gap of positions, a tail.
sequence_id mixed_sequence(test_cache& cache)
{
    const sequence_id id = cache.open(5);
    cache.append(id, 1, 150);
    CHECK(cache.seal(id).sealed == 3);
    expect_ok(cache.pool.erase(id, 75, 80));
    expect_ok(cache.pool.erase(id, 150, 152));
    expect_ok(cache.pool.truncate(id, 120));
    cache.append(id, 2, 20);
    return id;
}

struct blocks_used {
    std::size_t records, exact, shared_records, shared_exact, sequences;
    friend bool operator==(const blocks_used&, const blocks_used&) = default;
};
blocks_used used(const kvarn::cache_pool& pool)
{
    const kvarn::pool_statistics n = pool.statistics();
    return {n.records.used, n.exact.used, n.records.shared, n.exact.shared, n.sequences};
}

}  // namespace

TEST_CASE("cache/save: what is loaded is what was saved, and goes on as it would have", "[unit]")
{
    for (const kvarn::exact_type exact : {kvarn::exact_type::f16, kvarn::exact_type::bf16, kvarn::exact_type::f32}) {
        test_cache cache(small_config(exact)), other(small_config(exact));
        const sequence_id id = mixed_sequence(cache);
        const file_bytes file = saved(cache.pool, id);
        const auto back = loaded(other.pool, file);
        REQUIRE(back.ok());
        CHECK(other.pool.tokens(*back) == cache.pool.tokens(id));
        CHECK(other.pool.next_position(*back) == cache.pool.next_position(id));
        CHECK(saved(other.pool, *back) == file);
        CHECK(other.attend(*back, 3, 2) == cache.attend(id, 3, 2));
        for (int i = 0; i < 3; ++i) {
            cache.append(id, 3, 30);
            other.append(*back, 3, 30);
            CHECK(cache.seal(id).sealed == other.seal(*back).sealed);
            CHECK(other.attend(*back, 1, 4) == cache.attend(id, 1, 4));
        }
        CHECK(saved(other.pool, *back) == saved(cache.pool, id));
        expect_ok(other.pool.close(*back));
        CHECK(used(other.pool) == blocks_used{0, 0, 0, 0, 0});
    }
}

TEST_CASE("cache/save: an empty sequence, and one whose tiles stay exact", "[unit]")
{
    test_cache cache(small_config(kvarn::exact_type::f32));
    const sequence_id empty = cache.open(77);
    const auto back = loaded(cache.pool, saved(cache.pool, empty));
    REQUIRE(back.ok());
    CHECK(cache.pool.tokens(*back) == 0);
    CHECK(cache.pool.next_position(*back) == 77);

    const sequence_id id = cache.open();
    cache.append(id, 1, 32);
    expect_ok(cache.pool.reserve(id, 40));
    cache.store(id, 1, 0, 40);
    const float nan = std::numeric_limits<float>::quiet_NaN();
    const std::vector<float> bad(32, nan);
    const auto one = kvarn::token_major<const float>(bad.data(), 1, 1, 32);
    expect_ok(kvarn::store(cache.pool, id, 1, one, one, 7, 1));
    expect_ok(cache.pool.commit(id, 40));
    const kvarn::seal_report report = cache.seal(id);
    CHECK(report.kept_exact == 1);
    const file_bytes file = saved(cache.pool, id);
    const auto kept = loaded(cache.pool, file);
    REQUIRE(kept.ok());
    // The number that files have for it, of the second span.
    CHECK(kvarn::get_u16(file.data() + kvarn::file_header_bytes + kvarn::chunk_overhead_bytes + 10 * 8 + 4 * 4 + kvarn::detail::head_bytes + 48 + 16 + 14) == 1);
    CHECK(cache.pool.statistics(*kept)->kept_tiles == 1);
    CHECK(kvarn::ready_tiles(cache.pool, *kept) == 0);
}

TEST_CASE("cache/save: every truncation and every change of a byte is refused, and leaves nothing", "[unit]")
{
    test_cache cache(small_config());
    const sequence_id id = mixed_sequence(cache);
    const file_bytes file = saved(cache.pool, id);
    const blocks_used before = used(cache.pool);
    INFO(file.size() << " bytes");
    for (std::size_t n = 0; n < file.size(); ++n) {
        const auto got = loaded(cache.pool, std::span(file).first(n));
        if (got.error != status::truncated) FAIL("of a file cut at byte " << n << ": " << kvarn::message(got.error));
    }
    file_bytes changed = file;
    for (std::size_t n = 0; n < file.size(); ++n) {
        for (const unsigned flip : {1u << n % 8, 0xffu}) {
            changed[n] = file[n] ^ static_cast<std::byte>(flip);
            if (loaded(cache.pool, changed).ok()) FAIL("byte " << n << " was changed by " << flip);
        }
        changed[n] = file[n];
    }
    changed.push_back(std::byte{0});
    CHECK(loaded(cache.pool, changed).error == status::corrupt);
    CHECK(used(cache.pool) == before);
    CHECK(loaded(cache.pool, file).ok());
}

TEST_CASE("cache/save: of a large file, cuts and changes all over it are refused", "[unit]")
{
    kvarn::cache_config c;
    c.policy = *kvarn::make_policy(*kvarn::parse_format("k4v4_g64", 64), 6, 2);
    c.sequences = 2;
    c.most_tokens = 1024;
    c.most_step = 256;
    c.encode.encoder = kvarn::encoder::paper;
    c.encode.iterations = 1;
    test_cache cache(c);
    const sequence_id id = cache.open();
    for (int i = 0; i < 3; ++i) {
        cache.append(id, 1, 256);
        CHECK(cache.seal(id).sealed != 0);
    }
    const file_bytes file = saved(cache.pool, id);
    INFO(file.size() << " bytes");
    CHECK(file.size() > 900000);
    const blocks_used before = used(cache.pool);
    file_bytes changed = file;
    std::uint64_t state = 1;
    for (int i = 0; i < 300; ++i) {
        state = state * 6364136223846793005u + 1442695040888963407u;
        const std::size_t n = static_cast<std::size_t>(state >> 33) % file.size();
        if (loaded(cache.pool, std::span(file).first(n)).error != status::truncated) FAIL("cut at byte " << n);
        changed[n] = file[n] ^ static_cast<std::byte>(1u << (state >> 20) % 8);
        if (loaded(cache.pool, changed).ok()) FAIL("byte " << n << " was changed");
        changed[n] = file[n];
    }
    CHECK(used(cache.pool) == before);
    CHECK(loaded(cache.pool, changed).ok());
}

TEST_CASE("cache/save: writing that fails at any byte, reading in small pieces and reading that fails", "[unit]")
{
    test_cache cache(small_config());
    const sequence_id id = mixed_sequence(cache);
    const file_bytes file = saved(cache.pool, id);
    for (std::size_t limit = 0; limit < file.size(); limit += 1 + limit / 50) {
        std::size_t written = 0;
        const status said = kvarn::save(cache.pool, id, [&](std::span<const std::byte> piece) { return (written += piece.size()) <= limit; });
        if (said != status::io_error) FAIL("a disk that is full after " << limit << " bytes: " << kvarn::message(said));
    }
    CHECK(saved(cache.pool, id) == file);

    for (const std::size_t most : {std::size_t{1}, std::size_t{7}, std::size_t{4096}}) {
        std::size_t at = 0;
        const auto back = kvarn::load(cache.pool, [&](std::span<std::byte> to) {
            const std::size_t n = std::min({most, to.size(), file.size() - at});
            std::copy_n(file.begin() + static_cast<std::ptrdiff_t>(at), n, to.begin());
            at += n;
            return n;
        });
        REQUIRE(back.ok());
        CHECK(saved(cache.pool, *back) == file);
        expect_ok(cache.pool.close(*back));
    }
    const blocks_used before = used(cache.pool);
    for (std::size_t limit = 0; limit < file.size(); limit += 1 + limit / 50) {
        kvarn::buffer_source source(file);
        const auto back = kvarn::load(cache.pool, [&](std::span<std::byte> to) -> kvarn::result<std::size_t> {
            if (file.size() - source.left() + to.size() > limit) return status::io_error;
            return source(to);
        });
        if (back.error != status::io_error) FAIL("reading that fails at byte " << limit << ": " << kvarn::message(back.error));
    }
    CHECK(used(cache.pool) == before);
}

TEST_CASE("cache/save: layers one after the other", "[unit]")
{
    test_cache cache(small_config());
    const sequence_id id = mixed_sequence(cache);
    const file_bytes all = saved(cache.pool, id), first = saved(cache.pool, id, {0, 1}), second = saved(cache.pool, id, {1});
    const blocks_used before = used(cache.pool);
    {
        kvarn::sequence_loader loader(cache.pool);
        CHECK(loader.part(kvarn::buffer_source(second)) == status::bad_argument);
        expect_ok(loader.part(kvarn::buffer_source(first)));
        CHECK(loader.layers() == 1);
        CHECK(loader.finish().error == status::bad_argument);
        expect_ok(loader.part(kvarn::buffer_source(second)));
        const auto back = loader.finish();
        REQUIRE(back.ok());
        CHECK(saved(cache.pool, *back) == all);
        expect_ok(cache.pool.close(*back));
    }
    {
        kvarn::sequence_loader loader(cache.pool);
        expect_ok(loader.part(kvarn::buffer_source(first)));
        CHECK(loader.part(kvarn::buffer_source(first)) == status::bad_argument);
        CHECK(used(cache.pool) == before);
        expect_ok(loader.part(kvarn::buffer_source(first)));
        cache.append(id, 4, 1);
        CHECK(loader.part(kvarn::buffer_source(saved(cache.pool, id, {1}))) == status::bad_argument);
        expect_ok(loader.part(kvarn::buffer_source(first)));
    }
    CHECK(used(cache.pool) == before);
    CHECK(loaded(cache.pool, first).error == status::bad_argument);
    CHECK(kvarn::save(cache.pool, id, [](std::span<const std::byte>) { return true; }, {2}) == status::bad_argument);
}

TEST_CASE("cache/save: other configurations are refused by name", "[unit]")
{
    test_cache cache(small_config());
    const file_bytes file = saved(cache.pool, mixed_sequence(cache));
    const auto refused = [&](auto change, const std::string& field) {
        kvarn::cache_config c = small_config();
        change(c);
        test_cache other(c);
        const char* differs = nullptr;
        CHECK(loaded(other.pool, file, &differs).error == status::other_configuration);
        CHECK(std::string(differs != nullptr ? differs : "") == field);
        CHECK(used(other.pool) == blocks_used{0, 0, 0, 0, 0});
    };
    const auto with = [](const char* name, int dim, int layers, int heads, std::span<const kvarn::bit_rule> rules = {}) {
        return [=](kvarn::cache_config& c) { c.policy = *kvarn::make_policy(*kvarn::parse_format(name, dim), layers, heads, rules); };
    };
    static const kvarn::bit_rule rotated[] = {{.first_layer = 1, .first_head = 1, .key_bits = 2}};
    static const kvarn::bit_rule more[] = {{.first_layer = 1, .first_head = 1, .key_bits = 3, .key_rotation = kvarn::rotation::none}};
    refused(with("k4v2_g32", 32, 3, 2), "layers");
    refused(with("k4v2_g32", 32, 2, 1), "KV heads");
    refused(with("k4v2_g64", 32, 2, 2), "group");
    refused(with("k4v2_g32", 64, 2, 2), "head_dim of K");
    refused(with("k4v3_g32", 32, 2, 2), "bits of V");
    refused(with("k4v2_g32", 32, 2, 2, rotated), "rotations");
    refused(with("k4v2_g32", 32, 2, 2, more), "bits of K");
    refused([](kvarn::cache_config& c) { c.exact = kvarn::exact_type::bf16; }, "type of exact tokens");
    refused([](kvarn::cache_config& c) { c.key_basis = kvarn::basis::rotated; }, "bases of exact tokens");
    refused([](kvarn::cache_config& c) { c.sink_tokens = 64; }, "sink_tokens");
    refused([](kvarn::cache_config& c) { c.recent_tokens = 0; }, "recent_tokens");
}

TEST_CASE("cache/save: of a damaged file no field is said to differ", "[unit]")
{
    test_cache cache(small_config());
    const file_bytes file = saved(cache.pool, mixed_sequence(cache));
    kvarn::cache_config c = small_config();
    c.policy = *kvarn::make_policy(*kvarn::parse_format("k4v2_g32", 32), 3, 2);
    test_cache other(c);
    const std::size_t behind_layers = kvarn::file_header_bytes + kvarn::detail::head_bytes + 8;
    for (std::size_t n = 0; n < behind_layers + 200; ++n) {
        const char* differs = "";
        const status said = loaded(other.pool, std::span(file).first(n), &differs).error;
        if ((said == status::other_configuration) != (differs != nullptr)) FAIL("of a file cut at byte " << n << ": " << kvarn::message(said));
    }
}

TEST_CASE("cache/save: fields that no sequence has are corrupt, whatever the checksums say", "[unit]")
{
    test_cache cache(small_config());
    const sequence_id id = mixed_sequence(cache);
    const auto spans = cache.pool.statistics(id)->spans;
    const file_bytes file = saved(cache.pool, id);
    // Behind the header, the identity of ten fields and four formats, and the head of the chunk of spans.
    const std::size_t numbers = kvarn::file_header_bytes + kvarn::chunk_overhead_bytes + 10 * 8 + 4 * 4 + kvarn::detail::head_bytes, first = numbers + 48;
    REQUIRE(kvarn::get_u64(file.data() + numbers) == 5);
    REQUIRE(kvarn::get_u64(file.data() + numbers + 24) == spans);
    // A sink tile, two parts of the second tile, the rest of a third behind the gap, a tail.
    const auto flags_of = [&](std::size_t span) { return kvarn::get_u16(file.data() + first + 16 * span + 12); };
    REQUIRE((flags_of(0) == 2 && flags_of(2) == 1 && flags_of(3) == 5));
    const std::size_t tail = spans - 1;
    REQUIRE(flags_of(tail) == 0);

    const blocks_used before = used(cache.pool);
    const auto refused = [&](const char* what, std::size_t at, int bytes, std::uint64_t value, status wanted = status::corrupt) {
        INFO(what);
        file_bytes changed = file;
        if (bytes == 8) kvarn::put_u64(changed.data() + at, value);
        else kvarn::put_u16(changed.data() + at, static_cast<std::uint16_t>(value));
        REQUIRE(changed != file);
        support::repair_file(changed);
        CHECK(loaded(cache.pool, changed).error == wanted);
        CHECK(used(cache.pool) == before);
    };
    const auto span = [&](std::size_t i, std::size_t field) { return first + 16 * i + field; };
    const std::uint64_t largest = std::uint64_t{1} << 60;
    refused("a first position behind the first token", numbers, 8, 6);
    refused("a next position before the last token", numbers + 8, 8, 139);
    refused("a next position that is no position", numbers + 8, 8, ~std::uint64_t{0});
    refused("other tokens than there are", numbers + 16, 8, kvarn::get_u64(file.data() + numbers + 16) + 1);
    refused("more tokens than a sequence may have", numbers + 16, 8, 257, status::sequence_full);
    refused("other spans than there are", numbers + 24, 8, spans + 1);
    refused("layers that are not there", numbers + 40, 8, 3);
    refused("no layers", numbers + 40, 8, 0);
    refused("other layers than come next", numbers + 32, 8, 2);
    refused("a token before its turn", span(1, 0), 8, 36);
    refused("a token far behind", span(tail, 0), 8, largest * 2 + 1);
    refused("no token", span(tail, 10), 2, 0);
    refused("more tokens than a tile has", span(tail, 10), 2, 33);
    refused("tokens behind a tile's end", span(tail, 8), 2, 31);
    refused("a flag that is none", span(tail, 12), 2, 8);
    refused("a sealed sink", span(0, 12), 2, 3);
    refused("a first span in the block before", span(0, 12), 2, 6);
    refused("another kind in the same block", span(3, 12), 2, 4);
    refused("the same tokens in the same block", span(3, 8), 2, 0);
    refused("a tile that is kept for no reason", span(tail, 14), 2, 3);
    refused("a record that is kept exact", span(3, 14), 2, 1);
    refused("one token more: its chunk is too small", span(tail, 10), 2, kvarn::get_u16(file.data() + span(tail, 10)) + 1u);
}

TEST_CASE("cache/save: no first position is accepted that open() refuses", "[unit]")
{
    test_cache cache(small_config());
    const std::int64_t largest = std::int64_t{1} << 60;
    file_bytes file = saved(cache.pool, cache.open(largest));
    const auto back = loaded(cache.pool, file);
    REQUIRE(back.ok());
    CHECK(cache.pool.next_position(*back) == largest);
    CHECK(cache.pool.fork(*back).ok());

    const std::size_t numbers = kvarn::file_header_bytes + kvarn::chunk_overhead_bytes + 10 * 8 + 4 * 4 + kvarn::detail::head_bytes;
    REQUIRE(kvarn::get_u64(file.data() + numbers) == static_cast<std::uint64_t>(largest));
    for (const std::size_t at : {numbers, numbers + 8}) kvarn::put_u64(file.data() + at, static_cast<std::uint64_t>(largest) + 1);
    support::repair_file(file);
    CHECK(loaded(cache.pool, file).error == status::corrupt);
}

namespace {

/// What save() wrote on x86-64 when version 2 of files came: from position 7 on, 30 tokens of a record that has two more, then one exact token.
constexpr char written_once[] =
    "894b5641524e0d0a02000000020000000000000000000000fd0f3c772ffea7df69646e7400000000000000000000000054000000000000001e2776544e969557"
    "01000000000000000100000000000000200000000000000020000000000000002000000000000000000000000000000001000000000000000000000000000000"
    "00000000000000000000000000000000020201011889e094d492d2307370616e0000000000000000000000005000000000000000c8a1a5a67199f27307000000"
    "0000000026000000000000001f00000000000000020000000000000000000000000000000100000000000000070000000000000000001e000100000025000000"
    "0000000000000100000000007ffea482dcdb5ffc72637264000000000000000000000000800300000000000089ad4d7ff3005949dc7ab7dedc7ab7decccccccc"
    "cccccccc2e2e2e2e2e2e2e2eb8b8b8b8b8b8b8b8b88bb88bb88bb88b6e516e516e516e5188bb88bb88bb88bbe91ae91ae91ae91a992aaad9992aaad92556d665"
    "2556d66576638d5876638d5862dd5d2262dd5d22d9992aaad9992aaaa9299adaa9299ada9c76a7cd9c76a7cd2262dd5d2262dd5d000000000000000000000000"
    "00000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000"
    "000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000002021af36a53aa73aa73a963e"
    "a73a963e873e7c3ee6408c3e7c3e873eee40963e00000000000000000000000000000000000000000000000000000000000000000bb90bb9fcbc0bbd0bbde5c0"
    "0bbdfcc0fcc0d6c04ac3d6c0e5c0fcc091c3e5c000000000000000000000000000000000000000000000000000000000000000007d3cb53c963cae3ca83ca03c"
    "b33c8a3cb63c8a3cb33ca03ca83cae3c963cb53c7d3cb53c963cae3ca83ca03cb33c8a3cb63c8a3cb33ca03ca83cae3c963cb53c655da5255cda354d59d5544d"
    "56597115a56599e66459e671b9aeba7aa364caa215a6205aa5725ae749154d9796a51499958ae26299db664ab9a27a4a4a9ea16865595ada254da76599eaabb2"
    "b229a9a695646218e6719ba6695d4585c5a15c9b15a6daa05ae75a89992ab26869de695ae5df1d9d768e7664695185b55058f5611548a020a765dab259d5544d"
    "95654dd6956599e69ba6198e695db5355c9b354d65f7255f5e8db55849154d9714199625e59be767662499b569517545b5615e9755595adadab2589a99eaabb2"
    "8eea6a9ae575671d1dce7459a9ae4a8a3a5ea36465b7dfa5a518a576992ab268eb76ebf6958a189899b199dba9a28abaafa70a9eed39ed39ed39ed39ed39273c"
    "ed39113c7b3acc3ad33cae3ecc3a7b3ab73cb43e903d743b723b873d033d0940753eda41873d713b733b903d003d0d407e3ed841dc3aa83c113caf3be93b133c"
    "003ccb3b183ca83c783b0e3c003c913b543b0d3c713ba83c113cc33a543b133c003ccb3b183ca83ce63a0e3c003c913be93b0d3c1abefbbe1abe13be15bd90bd"
    "3abd15be24befbbe10bd14be3abda8bec9be13be10bdfbbe1abe11bcc9be90bdc6be9bbd24befbbe24be15bec6bea8be15bd13be825fbb527846da6c65786374"
    "000000000100000000000000800000000000000087adba6afc09cf8b00be00ba0000003a003e00bf00bc00b40038003d00c000bd00b80034003c003f00be00ba"
    "0000003a003e00bf00bc00b40038003d00c000bd00b80034003c003f003a80bf00b8003b00bf00b6003c80be00b4803c00be00b0003d80bd0000803d00bd0030"
    "003e80bc0034803e00bc0036003f00bb0038803f00ba003900c000b923123784ca0d6a38646f6e650000000004000000000000000800000000000000d9499a1f"
    "b7d4773533443f8271af99ad541abffae4401f10";

/// K (part 0) or V of that sequence.
float written_value(std::size_t part, std::size_t token, std::size_t channel)
{
    const auto t = static_cast<int>(token), c = static_cast<int>(channel);
    return part == 0 ? static_cast<float>((t * 7 + c * 3) % 16 - 8) / 4 : static_cast<float>((t * 5 + c * 11) % 32 - 16) / 8;
}

}  // namespace

TEST_CASE("cache/save: a file that was written once is read, and written again", "[unit]")
{
    file_bytes file;
    for (const char* at = written_once; *at != '\0'; at += 2) {
        const auto digit = [](char c) { return static_cast<unsigned>(c <= '9' ? c - '0' : c - 'a' + 10); };
        file.push_back(static_cast<std::byte>(digit(at[0]) << 4 | digit(at[1])));
    }
    REQUIRE(file.size() == 1428);
    kvarn::cache_config c;
    c.policy = *kvarn::make_policy(*kvarn::parse_format("k2v2_g32", 32), 1, 1);
    c.sink_tokens = 0;
    c.sequences = 2;
    c.most_tokens = 64;
    c.most_step = 40;
    c.encode.encoder = kvarn::encoder::paper;
    test_cache cache(c);

    const auto back = loaded(cache.pool, file);
    REQUIRE(back.ok());
    CHECK(cache.pool.next_position(*back) == 38);
    CHECK(cache.pool.statistics(*back)->sealed_tokens == 30);
    CHECK(saved(cache.pool, *back) == file);
    std::vector<float> k(31 * 32), v(31 * 32);
    expect_ok(kvarn::read(cache.pool, *back, 0, 0, 7, 38, kvarn::token_major(k.data(), 31, 1, 32), kvarn::token_major(v.data(), 31, 1, 32),
                          cache.scratch));
    for (std::size_t i = 0; i < 32; ++i) {
        CHECK(k[30 * 32 + i] == written_value(0, 30, i));
        CHECK(v[30 * 32 + i] == written_value(1, 30, i));
    }
    const std::vector<float> first{-0x1.bed8ap+0f, -0x1.03404ap+0f, -0x1.f76d5ep-3f, 0x1.52cab6p-3f}, later{0x1.82fap+0f, 0x1.bf9964p+0f, -0x1.b5f4dap+0f, -0x1.ab4796p-2f};
    const std::vector<float> first_v{-0x1.0c24f6p+1f, -0x1.082404p+0f, 0x1.c91752p-1f, -0x1.d32beap+0f},
        later_v{-0x1.79bc5ap-1f, -0x1.1150a6p-1f, 0x1.0f577ep-1f, -0x1.63e272p+0f};
    const auto four = [](const std::vector<float>& x, std::size_t token) {
        const auto at = x.begin() + static_cast<std::ptrdiff_t>(token * 32);
        return std::vector<float>(at, at + 4);
    };
    CHECK(four(k, 0) == first);
    CHECK(four(v, 0) == first_v);
    CHECK(four(k, 13) == later);
    CHECK(four(v, 13) == later_v);

    // From its tokens it comes out the same today.
    const sequence_id id = cache.open(7);
    const auto append = [&](std::size_t from, std::size_t tokens) {
        std::vector<float> keys, values;
        for (std::size_t t = from; t < from + tokens; ++t)
            for (std::size_t d = 0; d < 32; ++d) {
                keys.push_back(written_value(0, t, d));
                values.push_back(written_value(1, t, d));
            }
        expect_ok(cache.pool.reserve(id, tokens));
        expect_ok(kvarn::store(cache.pool, id, 0, kvarn::token_major<const float>(keys.data(), tokens, 1, 32),
                               kvarn::token_major<const float>(values.data(), tokens, 1, 32)));
        expect_ok(cache.pool.commit(id, tokens));
    };
    append(0, 33);
    CHECK(cache.seal(id).sealed == 1);
    expect_ok(cache.pool.truncate(id, 37));
    append(30, 1);
    CHECK(saved(cache.pool, id) == file);
}

TEST_CASE("cache/save: why a tile stays exact is said once", "[unit]")
{
    // A sink tile of which tokens were erased: two parts of one exact block.
    test_cache cache(small_config());
    const sequence_id id = cache.open();
    cache.append(id, 1, 20);
    expect_ok(cache.pool.erase(id, 5, 8));
    const std::size_t first = kvarn::file_header_bytes + kvarn::chunk_overhead_bytes + 10 * 8 + 4 * 4 + kvarn::detail::head_bytes + 48;
    const blocks_used before = used(cache.pool);
    const auto changed = [&](file_bytes file, std::size_t span) {
        kvarn::put_u16(file.data() + first + 16 * span + 14, 1);
        support::repair_file(file);
        return file;
    };
    CHECK(loaded(cache.pool, changed(saved(cache.pool, id), 1)).error == status::corrupt);
    const file_bytes layer = saved(cache.pool, id, {0, 1}), other = saved(cache.pool, id, {1});
    for (const std::size_t span : {std::size_t{0}, std::size_t{1}}) {
        kvarn::sequence_loader loader(cache.pool);
        expect_ok(loader.part(kvarn::buffer_source(layer)));
        CHECK(loader.part(kvarn::buffer_source(changed(other, span))) == status::bad_argument);
    }
    CHECK(used(cache.pool) == before);
}

TEST_CASE("cache/save: no room, drafts and stale handles", "[unit]")
{
    test_cache cache(small_config());
    const sequence_id id = mixed_sequence(cache);
    const file_bytes file = saved(cache.pool, id);
    const auto nowhere = [](std::span<const std::byte>) { return true; };
    expect_ok(cache.pool.reserve(id, 1));
    CHECK(kvarn::save(cache.pool, id, nowhere) == status::bad_argument);
    CHECK(kvarn::saved_bytes(cache.pool, id) == 0);
    expect_ok(cache.pool.commit(id, 0));
    expect_ok(cache.pool.close(id));
    CHECK(kvarn::save(cache.pool, id, nowhere) == status::stale_handle);

    const auto refused = [&](auto change, status wanted = status::no_room) {
        kvarn::cache_config c = small_config();
        change(c);
        test_cache other(c);
        CHECK(loaded(other.pool, file).error == wanted);
        CHECK(used(other.pool) == blocks_used{0, 0, 0, 0, 0});
    };
    refused([](kvarn::cache_config& c) { c.record_blocks = 1; });
    refused([](kvarn::cache_config& c) { c.exact_blocks = 1; });
    refused([](kvarn::cache_config& c) { c.most_spans = 4; }, status::sequence_full);
    refused([](kvarn::cache_config& c) { c.most_tokens = 100; }, status::sequence_full);
    test_cache full(small_config());
    for (int i = 0; i < 4; ++i) (void)full.open();
    CHECK(loaded(full.pool, file).error == status::no_room);
}
