// SPDX-License-Identifier: Apache-2.0
// The dequantizing and the appending kernel against dequantize_kv and plain copies. Compiled
// for fibers and for devices (run.hpp).

#include <cstring>
#include <vector>

#include "../catch.hpp"
#include "kernel_data.hpp"

namespace {

/// Decodes on both and compares bit by bit; returns K.
template <class T>
support::shared_vector<T> expect_same(const kvarn::format& f, support::cpu_records& records, std::size_t tiles, std::size_t heads,
                                      kvarn::basis wanted)
{
    const std::size_t tokens = support::tokens_of(f, tiles), k_size = tokens * heads * static_cast<std::size_t>(f.key_channels()),
                      v_size = tokens * heads * static_cast<std::size_t>(f.head_dim_v());
    std::vector<T> k(k_size), v(v_size), poison_k(k_size), poison_v(v_size);
    for (std::vector<T>* x : {&poison_k, &poison_v})
        if (!x->empty()) std::memset(x->data(), 0xab, x->size() * sizeof(T));
    std::vector<std::byte> scratch(kvarn::scratch_bytes(f));
    const std::byte* const bytes = records.data();
    support::expect_ok(kvarn::dequantize_kv(f, kvarn::tile_major_records(f, bytes, records.words.size() * 8, tiles, heads),
                                            support::dense_keys(f, k.data(), tiles, heads),
                                            support::dense_values(f, v.data(), tiles, heads), wanted, scratch));
    auto got_k = support::shared_copy(poison_k), got_v = support::shared_copy(poison_v);
    kvarn::cuda::dequantize_arguments a;
    const std::size_t one = kvarn::record_bytes(f);
    a.records = {records.data(), one * heads, one, one, nullptr};
    a.k = support::dense<void>(got_k.data(), support::type_of<T>, static_cast<int>(heads), f.key_channels());
    if (f.has_values()) a.v = support::dense<void>(got_v.data(), support::type_of<T>, static_cast<int>(heads), f.head_dim_v());
    a.tiles = static_cast<int>(tiles);
    a.heads = static_cast<int>(heads);
    a.wanted = wanted;
    support::expect_ok(support::run(f, a, 37));
    CAPTURE(support::describe(f), sizeof(T), static_cast<int>(wanted));
    CHECK(std::memcmp(got_k.data(), k.data(), k_size * sizeof(T)) == 0);
    CHECK((v_size == 0 || std::memcmp(got_v.data(), v.data(), v_size * sizeof(T)) == 0));
    return got_k;
}

}  // namespace

TEST_CASE("cuda/dequantize: the bits of the CPU for every width, size, element and basis", "[cuda][dequantize]")
{
    support::random_source random(81);
    std::size_t number = 0;
    std::vector<kvarn::format> formats = support::kernel_formats(256);
    formats.push_back(support::format_of(512, 512, 4, 0, 64, true, 64));
    formats.push_back(support::format_of(512, 256, 3, 6, 32, true, 24));
    for (const kvarn::format& f : formats) {
        const support::kv_tiles x = support::random_tiles(random, f, 2, 2, support::all_tile_kinds[number++ % 5]);
        support::cpu_records records;
        support::expect_ok(support::seal_on_cpu(f, x.k, x.v, 2, 2, support::paper(), records));
        for (const kvarn::basis b : {kvarn::basis::original, kvarn::basis::rotated}) {
            expect_same<kvarn::half>(f, records, 2, 2, b);
            expect_same<kvarn::bfloat16>(f, records, 2, 2, b);
            expect_same<float>(f, records, 2, 2, b);
        }
    }
}

TEST_CASE("cuda/dequantize: values beyond a half saturate", "[cuda][dequantize]")
{
    const kvarn::format f = support::format_of(64, 64, 4, 4, 32);
    support::random_source random(82);
    const support::kv_tiles x = support::random_tiles(random, f, 1, 1, support::tile_kind::gaussian);
    support::cpu_records records;
    support::expect_ok(support::seal_on_cpu(f, x.k, x.v, 1, 1, support::paper(), records));
    const kvarn::record_layout at = kvarn::layout_of(f);
    for (int t = 0; t < f.group(); ++t) {
        const kvarn::half large = kvarn::to_half(60000.0f);
        std::memcpy(records.data() + at.k_token_scale + 2 * static_cast<std::size_t>(t), &large, 2);
    }
    CHECK(expect_same<kvarn::half>(f, records, 1, 1, kvarn::basis::original).back().bits != 0xabab);
    const auto decoded = expect_same<kvarn::half>(f, records, 1, 1, kvarn::basis::rotated);
    std::size_t largest = 0;
    for (const kvarn::half h : decoded) largest += (h.bits & 0x7fffu) == 0x7bffu;
    CHECK(largest > 100);
}

TEST_CASE("cuda/dequantize: pages of any size, tiles left out, one part alone", "[cuda][dequantize]")
{
    using kvarn::half;
    const kvarn::format f = support::format_of(128, 64, 4, 2, 32, true, 8);
    const std::size_t tiles = 3, heads = 2, group = 32, channels = 136;
    support::random_source random(84);
    const support::kv_tiles x = support::random_tiles(random, f, tiles, heads, support::tile_kind::gaussian);
    support::cpu_records records;
    support::expect_ok(support::seal_on_cpu(f, x.k, x.v, tiles, heads, support::paper(), records));
    const std::size_t tokens = tiles * group, one = kvarn::record_bytes(f);
    const half poison{0xabab};
    for (const kvarn::basis wanted : {kvarn::basis::original, kvarn::basis::rotated}) {
        std::vector<half> k(tokens * heads * channels), v(tokens * heads * 64);
        std::vector<std::byte> scratch(kvarn::scratch_bytes(f));
        const std::byte* const bytes = records.data();
        support::expect_ok(kvarn::dequantize_kv(f, kvarn::tile_major_records(f, bytes, records.words.size() * 8, tiles, heads),
                                                support::dense_keys(f, k.data(), tiles, heads),
                                                support::dense_values(f, v.data(), tiles, heads), wanted, scratch));
        for (const std::size_t page_tokens : {1u, 2u, 4u, 16u, 32u})
            for (const int which : {0, 1, 2}) {  // both, K, V
                const std::size_t pages = tokens / page_tokens, of_tile = group / page_tokens;
                support::shared_vector<std::int32_t> table(pages);
                for (std::size_t i = 0; i < pages; ++i) table[i] = static_cast<std::int32_t>((i * 7 + 3) % pages);
                table[2 * of_tile - 1] = -1;  // leaves tile 1 out
                support::shared_vector<half> got_k(k.size(), poison), got_v(v.size(), poison);
                kvarn::cuda::dequantize_arguments a;
                a.records = {records.data(), one * heads, one, one, nullptr};
                const auto paged = [&](half* data, std::size_t width) {
                    auto y = support::dense<void>(data, kvarn::cuda::element_type::f16, static_cast<int>(heads),
                                                  static_cast<int>(width));
                    y.table = table.data();
                    y.page_tokens = static_cast<int>(page_tokens);
                    y.page_stride = static_cast<std::ptrdiff_t>(page_tokens * heads * width);
                    return y;
                };
                if (which != 2) a.k = paged(got_k.data(), channels);
                if (which != 1) a.v = paged(got_v.data(), 64);
                a.tiles = static_cast<int>(tiles);
                a.heads = static_cast<int>(heads);
                a.wanted = wanted;
                support::expect_ok(support::run(f, a, 37));
                std::size_t wrong_k = 0, wrong_v = 0, written = 0;
                std::vector<bool> is_page(pages, false);
                const auto compare = [&](const std::vector<half>& from, const support::shared_vector<half>& got,
                                         std::size_t width, bool there, std::size_t& wrong) {
                    for (std::size_t t = 0; t < tokens; ++t) {
                        const std::int32_t page = table[t / page_tokens];
                        if (page < 0 || t / group == 1) continue;
                        is_page[static_cast<std::size_t>(page)] = true;
                        const std::size_t to = (static_cast<std::size_t>(page) * page_tokens + t % page_tokens) * heads * width;
                        for (std::size_t c = 0; c < heads * width; ++c)
                            wrong += got[to + c] != (there ? from[t * heads * width + c] : poison);
                    }
                    for (std::size_t p = 0; p < pages; ++p)
                        for (std::size_t c = 0; !is_page[p] && c < page_tokens * heads * width; ++c)
                            written += got[p * page_tokens * heads * width + c] != poison;
                };
                compare(k, got_k, channels, which != 2, wrong_k);
                compare(v, got_v, 64, which != 1, wrong_v);
                CAPTURE(page_tokens, which, static_cast<int>(wanted));
                CHECK(wrong_k == 0);
                CHECK(wrong_v == 0);
                CHECK(written == 0);
            }
    }
}

TEST_CASE("cuda/dequantize: nothing to do, and what is wrong with the arguments", "[cuda][dequantize]")
{
    const kvarn::format f = support::format_of(64, 64, 4, 4, 32);
    const std::size_t one = kvarn::record_bytes(f);
    support::shared_vector<std::uint64_t> records(one / 8);
    support::shared_vector<kvarn::half> k(32 * 64, kvarn::half{0xabab});
    const auto run = [&](auto&& change) {
        kvarn::cuda::dequantize_arguments a;
        a.records = {reinterpret_cast<const std::byte*>(records.data()), one, one, one, nullptr};
        a.k = support::dense<void>(k.data(), kvarn::cuda::element_type::f16, 1, 64);
        a.tiles = a.heads = 1;
        change(a);
        return support::run(f, a);
    };
    CHECK(run([](auto& a) { a.tiles = 0; }) == kvarn::status::ok);
    CHECK(run([](auto& a) { a.heads = 0; }) == kvarn::status::ok);
    CHECK(run([](auto& a) { a.tiles = -1; }) == kvarn::status::bad_argument);
    CHECK(run([](auto& a) { a.k.data = nullptr; }) == kvarn::status::null_pointer);
    CHECK(run([](auto& a) { a.records.data = nullptr; }) == kvarn::status::null_pointer);
    CHECK(run([](auto& a) { a.records.data += 4; }) == kvarn::status::bad_argument);
    CHECK(run([](auto& a) { a.k.token_stride = 63; }) == kvarn::status::bad_argument);
    for (const kvarn::half h : k) REQUIRE(h.bits == 0xababu);
    CHECK(run([](auto&) {}) == kvarn::status::ok);
    for (const kvarn::half h : k) REQUIRE(h.bits == 0);  // a record of zeros
}

TEST_CASE("cuda/dequantize: scalars that are no numbers come out as they are", "[cuda][dequantize]")
{
    const kvarn::format f = support::format_of(64, 64, 4, 4, 32);
    support::random_source random(85);
    const support::kv_tiles x = support::random_tiles(random, f, 1, 1, support::tile_kind::gaussian);
    support::cpu_records records;
    support::expect_ok(support::seal_on_cpu(f, x.k, x.v, 1, 1, support::paper(), records));
    const kvarn::record_layout at = kvarn::layout_of(f);
    const std::uint16_t nan = 0x7e00, infinity = 0x7c00;
    std::memcpy(records.data() + at.k_channel_scale + 2 * 5, &nan, 2);
    std::memcpy(records.data() + at.v_token_zero + 2 * 7, &infinity, 2);
    const std::size_t one = kvarn::record_bytes(f);
    support::shared_vector<kvarn::half> k(32 * 64), v(32 * 64);
    kvarn::cuda::dequantize_arguments a;
    a.records = {records.data(), one, one, one, nullptr};
    a.k = support::dense<void>(k.data(), kvarn::cuda::element_type::f16, 1, 64);
    a.v = support::dense<void>(v.data(), kvarn::cuda::element_type::f16, 1, 64);
    a.tiles = a.heads = 1;
    a.wanted = kvarn::basis::rotated;
    support::expect_ok(support::run(f, a));
    const auto is_nan = [](kvarn::half h) { return (h.bits & 0x7fffu) > 0x7c00u; };
    for (std::size_t t = 0; t < 32; ++t)
        for (std::size_t d = 0; d < 64; ++d) {
            REQUIRE(is_nan(k[t * 64 + d]) == (d == 5));
            REQUIRE(!is_nan(v[t * 64 + d]));
            // An infinite value saturates like any that is too large.
            REQUIRE(((v[t * 64 + d].bits & 0x7fffu) == 0x7bffu) == (t == 7));
        }
}

TEST_CASE("cuda/append: tokens go to their slots, full tiles are sealed from the same pages", "[cuda][append]")
{
    const kvarn::format f = support::format_of(64, 128, 4, 2, 32);
    const int heads = 2, page_tokens = 16, pages = 5, tokens = 40;
    support::random_source random(83);
    const support::kv_tiles x =
        support::random_tiles(random, f, 2, 2, support::tile_kind::gaussian);  // 64 tokens, of which 40 are used
    const auto k = support::stored<kvarn::half>(x.k), v = support::stored<kvarn::half>(x.v);
    auto new_k = support::shared_copy(k), new_v = support::shared_copy(v);
    support::shared_vector<std::int32_t> slots;
    const int order[] = {3, 0, 4};
    for (int t = 0; t < tokens; ++t) slots.push_back(order[t / page_tokens] * page_tokens + t % page_tokens);
    slots[39] = -1;
    const kvarn::half poison{0xbeef};
    support::shared_vector<kvarn::half> tail_k(static_cast<std::size_t>(pages * page_tokens * heads * 64), poison),
        tail_v(static_cast<std::size_t>(pages * page_tokens * heads * 128), poison);
    const support::shared_vector<std::int32_t> table = {3, 0, -1, -1};  // tile 0 is full, tile 1 is not
    const std::size_t one = kvarn::record_bytes(f);
    support::shared_vector<std::uint64_t> out(2 * heads * one / 8, 0xa5a5a5a5a5a5a5a5u);

    kvarn::cuda::append_arguments a;
    a.new_k = support::dense<const void>(new_k.data(), kvarn::cuda::element_type::f16, heads, 64);
    a.new_v = support::dense<const void>(new_v.data(), kvarn::cuda::element_type::f16, heads, 128);
    a.slot_mapping = slots.data();
    a.tokens = tokens;
    const auto tail = [&](void* data, int channels) {
        auto y = support::dense<void>(data, kvarn::cuda::element_type::f16, heads, channels);
        y.page_tokens = page_tokens;
        y.page_stride = page_tokens * heads * channels;
        return y;
    };
    a.tail_k = tail(tail_k.data(), 64);
    a.tail_v = tail(tail_v.data(), 128);
    const auto pages_of = [&](const kvarn::cuda::output_tiles& y) {
        kvarn::cuda::input_tiles z{y.data, y.type, y.token_stride, y.head_stride, table.data(), y.page_tokens, y.page_stride};
        return z;
    };
    a.sealed.k = pages_of(a.tail_k);
    a.sealed.v = pages_of(a.tail_v);
    a.sealed.records = {reinterpret_cast<std::byte*>(out.data()), one * heads, one, one, nullptr};
    a.sealed.tiles = 2;
    a.sealed.heads = heads;

    support::expect_ok(support::run(f, a, kvarn::encode_options{}));

    std::size_t written = 0, wrong = 0;
    for (int p = 0; p < pages; ++p)
        for (int i = 0; i < page_tokens; ++i) {
            const int slot = p * page_tokens + i;
            int token = -1;
            for (int t = 0; t < tokens; ++t)
                if (slots[static_cast<std::size_t>(t)] == slot) token = t;
            written += token >= 0;
            const auto check = [&](const kvarn::half* tail_data, const std::vector<kvarn::half>& from, int channels) {
                for (int c = 0; c < heads * channels; ++c) {
                    const kvarn::half wanted = token < 0 ? poison : from[static_cast<std::size_t>(token * heads * channels + c)];
                    wrong += tail_data[slot * heads * channels + c] != wanted;
                }
            };
            check(tail_k.data(), k, 64);
            check(tail_v.data(), v, 128);
        }
    CHECK(written == 39);
    CHECK(wrong == 0);
    support::cpu_records wanted;
    support::expect_ok(support::seal_on_cpu(f, k, v, 2, 2, {}, wanted));
    CHECK(std::memcmp(out.data(), wanted.data(), heads * one) == 0);
    for (std::size_t i = heads * one / 8; i < out.size(); ++i) REQUIRE(out[i] == 0xa5a5a5a5a5a5a5a5u);
}
