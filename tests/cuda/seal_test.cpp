// SPDX-License-Identifier: Apache-2.0
// The sealing kernel against quantize_kv: the same bytes. Compiled for fibers and for devices (run.hpp).

#include <kvarn/quantize.hpp>

#include <limits>

#include "../catch.hpp"
#include "../support/library.hpp"
#include "../support/npy.hpp"
#include "kernel_data.hpp"

namespace {

struct sealed {
    support::shared_vector<std::uint64_t> words;  // 8-byte aligned
    support::shared_vector<kvarn::cuda::record_status> statuses;
    std::size_t one = 0;

    [[nodiscard]] const std::uint8_t* record(std::size_t i) const
    {
        return reinterpret_cast<const std::uint8_t*>(words.data()) + i * one;
    }
};

template <class T>
sealed seal(const kvarn::format& f, const std::vector<T>& k, const std::vector<T>& v, int tiles, int heads,
            const kvarn::encode_options& o, int step = 1, int shared_bytes = support::block_shared_bytes())
{
    auto keys = support::shared_copy(k), values = support::shared_copy(v);
    sealed out;
    out.one = kvarn::record_bytes(f);
    out.words.assign(static_cast<std::size_t>(tiles * heads) * out.one / 8, 0xa5a5a5a5a5a5a5a5u);
    out.statuses.assign(static_cast<std::size_t>(tiles * heads), {kvarn::status::corrupt, kvarn::status::corrupt});
    kvarn::cuda::seal_arguments a;
    a.k = support::dense<const void>(keys.data(), support::type_of<T>, heads, f.key_channels());
    a.v = support::dense<const void>(values.data(), support::type_of<T>, heads, f.head_dim_v());
    a.records = {reinterpret_cast<std::byte*>(out.words.data()), out.one * static_cast<std::size_t>(heads), out.one, out.one,
                 nullptr};
    a.tiles = tiles;
    a.heads = heads;
    a.statuses = out.statuses.data();
    // Without a number in it, and with a guard behind it.
    const std::size_t floats = kvarn::cuda::seal_workspace_bytes(f, tiles, heads, shared_bytes) / 4;
    const float nan = std::nanf("");
    support::shared_vector<float> workspace(floats + 16, nan);
    if (floats != 0) a.workspace = workspace.data();
    support::expect_ok(support::run(f, a, o, step, shared_bytes));
    for (std::size_t i = floats; i < workspace.size(); ++i) REQUIRE(std::memcmp(&workspace[i], &nan, 4) == 0);
    return out;
}

/// Shared memory in which only the factors of a tile have room.
int factors_only(const kvarn::format& f)
{
    return kvarn::cuda::detail::seal_shared_bytes(f, true);
}

/// Seals on both and counts the bytes that differ; statuses must be ok.
template <class T>
void expect_same(const kvarn::format& f, const std::vector<T>& k, const std::vector<T>& v, std::size_t tiles, std::size_t heads,
                 const kvarn::encode_options& o, int step = 1, int shared_bytes = support::block_shared_bytes())
{
    support::cpu_records wanted;
    support::expect_ok(support::seal_on_cpu(f, k, v, tiles, heads, o, wanted));
    const sealed got = seal(f, k, v, static_cast<int>(tiles), static_cast<int>(heads), o, step, shared_bytes);
    for (const kvarn::cuda::record_status s : got.statuses) {
        CHECK(s.k == kvarn::status::ok);
        CHECK(s.v == kvarn::status::ok);
    }
    std::size_t different = 0;
    const std::size_t bytes = wanted.words.size() * 8;
    for (std::size_t i = 0; i < bytes; ++i) different += std::byte{got.record(0)[i]} != wanted.data()[i];
    CAPTURE(support::describe(f), sizeof(T), static_cast<int>(o.encoder), bytes);
    CHECK(different == 0);
}

}  // namespace

TEST_CASE("cuda/seal: the bytes of the CPU for every width and size", "[cuda][seal]")
{
    support::random_source random(71);
    std::size_t number = 0;
    for (const kvarn::format& f : support::kernel_formats(128)) {
        const support::tile_kind kind = support::all_tile_kinds[number++ % 5];
        const support::kv_tiles x = support::random_tiles(random, f, 1, 1, kind);
        CAPTURE(support::name_of(kind));
        expect_same<kvarn::half>(f, support::stored<kvarn::half>(x.k), support::stored<kvarn::half>(x.v), 1, 1, support::paper());
        expect_same<kvarn::half>(f, support::stored<kvarn::half>(x.k), support::stored<kvarn::half>(x.v), 1, 1, {});
    }
}

TEST_CASE("cuda/seal: latent attention, 512 channels and exact ones", "[cuda][seal]")
{
    support::random_source random(76);
    const kvarn::format all[] = {support::format_of(512, 64, 4, 0, 64, true, 64), support::format_of(512, 64, 2, 0, 32, true, 64),
                                 support::format_of(512, 64, 3, 0, 32, false, 24), support::format_of(512, 512, 4, 2, 32)};
    for (const kvarn::format& f : all) {
        const support::kv_tiles x = support::random_tiles(random, f, 1, 1, support::tile_kind::channel_offsets);
        const auto k = support::stored<kvarn::bfloat16>(x.k), v = support::stored<kvarn::bfloat16>(x.v);
        expect_same<kvarn::bfloat16>(f, k, v, 1, 1, support::paper());
        expect_same<kvarn::bfloat16>(f, k, v, 1, 1, {});
    }
}

TEST_CASE("cuda/seal: tiles in a workspace give the same bytes", "[cuda][seal]")
{
    support::random_source random(77);
    const kvarn::format all[] = {support::format_of(512, 64, 4, 0, 64, true, 64), support::format_of(64, 128, 3, 4, 32),
                                 support::format_of(128, 64, 8, 5, 128, false, 8), support::format_of(64, 64, 2, 6, 64)};
    for (const kvarn::format& f : all) {
        const support::kv_tiles x = support::random_tiles(random, f, 1, 2, support::tile_kind::token_outliers);
        const int room = factors_only(f);
        REQUIRE(kvarn::cuda::supports(f, kvarn::cuda::operation::seal, room).workspace);
        expect_same<float>(f, x.k, x.v, 1, 2, support::paper(), 1, room);
        expect_same<float>(f, x.k, x.v, 1, 2, {}, 37, room);
    }
    // Tiles that fit no device's shared memory.
    const kvarn::format large = support::format_of(512, 64, 2, 0, 128, true, 64);
    REQUIRE(kvarn::cuda::supports(large, kvarn::cuda::operation::seal).workspace);
    const support::kv_tiles x = support::random_tiles(random, large, 1, 1, support::tile_kind::gaussian);
    expect_same<float>(large, x.k, x.v, 1, 1, support::paper(2));
    expect_same<float>(large, x.k, x.v, 1, 1, {});
}

TEST_CASE("cuda/seal: more tiles than a workspace holds at a time", "[cuda][seal]")
{
    support::random_source random(78);
    const kvarn::format f = support::format_of(64, 64, 4, 0, 32);
    const std::size_t tiles = 83, heads = 2;
    const support::kv_tiles x = support::random_tiles(random, f, tiles, heads, support::tile_kind::gaussian);
    const std::size_t one = kvarn::cuda::seal_workspace_bytes(f, 1, 1, factors_only(f));
    CHECK(one == 64 * 36 * 4);
    REQUIRE(kvarn::cuda::seal_workspace_bytes(f, 83, 2, factors_only(f)) < tiles * heads * one);
    expect_same<float>(f, x.k, x.v, tiles, heads, support::paper(1), 1, factors_only(f));
}

TEST_CASE("cuda/seal: every kind of tile, element and option", "[cuda][seal]")
{
    support::random_source random(72);
    const kvarn::format f = support::format_of(64, 64, 4, 2, 64);
    for (const support::tile_kind kind : support::all_tile_kinds) {
        const support::kv_tiles x = support::random_tiles(random, f, 1, 2, kind);
        CAPTURE(support::name_of(kind));
        expect_same<float>(f, x.k, x.v, 1, 2, support::paper());
        expect_same<float>(f, x.k, x.v, 1, 2, {});
        expect_same<kvarn::bfloat16>(f, support::stored<kvarn::bfloat16>(x.k), support::stored<kvarn::bfloat16>(x.v), 1, 2, {});
        kvarn::encode_options o;
        o.refit_rounds = 0;
        o.clip_steps = 8;
        o.refined_iterations = 3;
        expect_same<float>(f, x.k, x.v, 1, 2, o);
        o = support::paper();
        o.iterations = 0;
        expect_same<float>(f, x.k, x.v, 1, 2, o);
    }
}

TEST_CASE("cuda/seal: the order in which threads run changes nothing", "[cuda][seal]")
{
    support::random_source random(73);
    const kvarn::format f = support::format_of(64, 128, 4, 4, 64);
    const support::kv_tiles x = support::random_tiles(random, f, 1, 1, support::tile_kind::channel_offsets);
    for (const int step : {255, 37, 129}) {
        CAPTURE(step);
        expect_same<float>(f, x.k, x.v, 1, 1, support::paper(), step);
        expect_same<float>(f, x.k, x.v, 1, 1, {}, step);
    }
}

TEST_CASE("cuda/seal: zeros, constants, subnormals and rank one", "[cuda][seal]")
{
    const kvarn::format f = support::format_of(64, 64, 4, 2, 32);
    const std::size_t n = 32 * 64;
    std::vector<std::vector<float>> tiles(5, std::vector<float>(n));
    for (std::size_t i = 0; i < n; ++i) {
        tiles[1][i] = 3.25f;
        tiles[2][i] = static_cast<float>(static_cast<int>(i % 37) - 18) * 1e-41f;
        tiles[3][i] = static_cast<float>(1 + i / 64) * (static_cast<float>(i % 64) - 31.5f);
        tiles[4][i] = i % 3 == 0 ? -0.0f : 0.0f;
    }
    for (const auto& k : tiles)
        for (const auto& v : {tiles[0], k}) {
            expect_same<float>(f, k, v, 1, 1, support::paper());
            expect_same<float>(f, k, v, 1, 1, {});
        }
}

TEST_CASE("cuda/seal: what the CPU refuses is refused, and nothing of the part is written", "[cuda][seal]")
{
    support::random_source random(74);
    const kvarn::format f = support::format_of(64, 64, 4, 4, 32, true, 4);
    const support::kv_tiles x = support::random_tiles(random, f, 1, 1, support::tile_kind::gaussian);
    const float infinite = std::numeric_limits<float>::infinity();
    struct damage {
        std::size_t at;
        float value;
        bool in_values;
    };
    const std::size_t last = x.k.size() - 1;
    const damage all[] = {{5, infinite, false},    {700, std::nanf(""), false}, {last, infinite, false}, {last, 70000.0f, false},
                          {last, 65519.0f, false}, {40, 3e11f, false},          {41, 5e6f, false},       {90, 30000.0f, false},
                          {3, 1e9f, true},         {3, -infinite, true},        {77, 4e5f, true}};
    int refused = 0;
    for (const damage& d : all)
        for (const bool refined : {false, true}) {
            std::vector<float> k = x.k, v = x.v;
            (d.in_values ? v : k)[d.at] = d.value;
            support::cpu_records wanted;
            const kvarn::encode_options o = refined ? kvarn::encode_options{} : support::paper();
            const kvarn::status cpu = support::seal_on_cpu(f, k, v, 1, 1, o, wanted);
            const sealed got = seal(f, k, v, 1, 1, o);
            CAPTURE(d.at, d.value, d.in_values, refined, kvarn::message(cpu));
            CHECK((d.in_values ? got.statuses[0].v : got.statuses[0].k) == cpu);
            CHECK((d.in_values ? got.statuses[0].k : got.statuses[0].v) == kvarn::status::ok);
            if (cpu == kvarn::status::ok) {
                CHECK(std::memcmp(got.record(0), wanted.data(), wanted.words.size() * 8) == 0);
                continue;
            }
            ++refused;
            const kvarn::record_layout at = kvarn::layout_of(f);
            const std::size_t begin = d.in_values ? at.v_codes : 0, end = d.in_values ? at.exact : at.v_codes;
            for (std::size_t i = begin; i < end; ++i) REQUIRE(got.record(0)[i] == 0xa5);
        }
    CHECK(refused >= 12);
}

TEST_CASE("cuda/seal: input that is rotated already", "[cuda][seal]")
{
    support::random_source random(79);
    const kvarn::format all[] = {support::format_of(64, 128, 4, 2, 32, true, 8), support::format_of(128, 64, 3, 4, 64), support::format_of(512, 64, 4, 0, 32, true, 64)};
    for (const kvarn::format& f : all)
        for (const bool refined : {false, true})
            for (const int which : {1, 2, 3}) {
                kvarn::encode_options o = refined ? kvarn::encode_options{} : support::paper();
                if (which & 1) o.key_basis = kvarn::basis::rotated;
                if (which & 2) o.value_basis = kvarn::basis::rotated;
                const support::kv_tiles x = support::random_tiles(random, f, 1, 1, support::tile_kind::channel_outliers);
                CAPTURE(which);
                expect_same<kvarn::half>(f, support::stored<kvarn::half>(x.k), support::stored<kvarn::half>(x.v), 1, 1, o);
                expect_same<float>(f, x.k, x.v, 1, 1, o, 37, factors_only(f));
                // Not by both doing nothing: the record is that of a format without rotation.
                kvarn::format_spec spec = f.spec();
                if (which & 1) spec.key_rotation = kvarn::rotation::none;
                if (which & 2) spec.value_rotation = kvarn::rotation::none;
                support::cpu_records wanted;
                support::expect_ok(support::seal_on_cpu(support::make(spec), x.k, x.v, 1, 1, refined ? kvarn::encode_options{} : support::paper(), wanted));
                CHECK(std::memcmp(seal(f, x.k, x.v, 1, 1, o).record(0), wanted.data(), wanted.words.size() * 8) == 0);
                // Magnitudes at which the two rules of overflow differ.
                for (const float large : {20000.0f, 1e6f, 3e7f}) {
                    std::vector<float> k = x.k, v = x.v;
                    k[7] = large;
                    if (!v.empty()) v[9] = -large;
                    support::cpu_records records;
                    const kvarn::status cpu = support::seal_on_cpu(f, k, v, 1, 1, o, records);
                    const sealed got = seal(f, k, v, 1, 1, o);
                    const kvarn::status first = got.statuses[0].k != kvarn::status::ok ? got.statuses[0].k : got.statuses[0].v;
                    CAPTURE(large, kvarn::message(cpu));
                    CHECK(first == cpu);
                    if (cpu == kvarn::status::ok) CHECK(std::memcmp(got.record(0), records.data(), records.words.size() * 8) == 0);
                }
            }
    kvarn::encode_options wrong;
    wrong.value_basis = static_cast<kvarn::basis>(2);
    kvarn::cuda::seal_arguments a;
    CHECK(support::run(all[0], a, wrong) == kvarn::status::bad_argument);
}

TEST_CASE("cuda/seal: pages, record tables and tiles left out", "[cuda][seal]")
{
    support::random_source random(75);
    const kvarn::format f = support::format_of(64, 64, 4, 2, 64);
    const std::size_t tiles = 3, heads = 2, channels = 64;
    const support::kv_tiles x = support::random_tiles(random, f, tiles, heads, support::tile_kind::token_outliers);
    const auto k = support::stored<kvarn::half>(x.k), v = support::stored<kvarn::half>(x.v);
    support::cpu_records wanted;
    support::expect_ok(support::seal_on_cpu(f, k, v, tiles, heads, {}, wanted));

    const int page_tokens = 16, pages = static_cast<int>(tiles) * 4;
    support::shared_vector<std::int32_t> table;
    for (int p = 0; p < pages; ++p) table.push_back((p * 5 + 3) % pages);
    const std::size_t page_elements = page_tokens * heads * channels;
    std::vector<kvarn::half> paged_k(k.size()), paged_v(v.size());
    for (std::size_t p = 0; p < table.size(); ++p) {
        const std::size_t to = static_cast<std::size_t>(table[p]) * page_elements;
        std::memcpy(&paged_k[to], &k[p * page_elements], page_elements * 2);
        std::memcpy(&paged_v[to], &v[p * page_elements], page_elements * 2);
    }
    auto keys = support::shared_copy(paged_k), values = support::shared_copy(paged_v);
    table[7] = -1;  // leaves out tile 1
    const support::shared_vector<std::int32_t> slots = {4, 0, 2};
    const std::size_t one = kvarn::record_bytes(f) + 16;  // 16 bytes of padding, to be cleared
    support::shared_vector<std::uint64_t> out(5 * heads * one / 8, 0xa5a5a5a5a5a5a5a5u);
    support::shared_vector<kvarn::cuda::record_status> statuses(tiles * heads, {kvarn::status::corrupt, kvarn::status::corrupt});
    kvarn::cuda::seal_arguments a;
    a.k = support::dense<const void>(keys.data(), kvarn::cuda::element_type::f16, static_cast<int>(heads),
                                     static_cast<int>(channels));
    a.k.table = table.data();
    a.k.page_tokens = page_tokens;
    a.k.page_stride = static_cast<std::ptrdiff_t>(page_elements);
    a.v = a.k;
    a.v.data = values.data();
    a.records = {reinterpret_cast<std::byte*>(out.data()), one * heads, one, one, slots.data()};
    a.tiles = static_cast<int>(tiles);
    a.heads = static_cast<int>(heads);
    a.statuses = statuses.data();
    support::expect_ok(support::run(f, a, kvarn::encode_options{}));
    const auto* const bytes = reinterpret_cast<const std::uint8_t*>(out.data());
    const std::size_t content = kvarn::layout_of(f).content_bytes;
    for (std::size_t slot = 0; slot < 5; ++slot)
        for (std::size_t h = 0; h < heads; ++h) {
            const std::uint8_t* const record = bytes + (slot * heads + h) * one;
            const std::size_t tile = slot == 4 ? 0 : slot == 2 ? 2 : 99;
            CAPTURE(slot, h);
            if (tile == 99) {
                for (std::size_t i = 0; i < one; ++i) REQUIRE(record[i] == 0xa5);
                continue;
            }
            CHECK(std::memcmp(record, wanted.data() + (tile * heads + h) * kvarn::record_bytes(f), content) == 0);
            for (std::size_t i = content; i < one; ++i) REQUIRE(record[i] == 0);
        }
    for (const kvarn::cuda::record_status s : statuses) CHECK((s.k == kvarn::status::ok && s.v == kvarn::status::ok));
}

TEST_CASE("cuda/seal: the authors' inputs", "[cuda][seal][golden]")
{
    const std::string folder = KVARN_GOLDEN_DIR, text = support::read_file(folder + "/manifest.json");
    int compared = 0;
    for (std::size_t at = text.find("\"cases\""); (at = text.find('{', at)) != std::string::npos; ++at) {
        const std::string object = text.substr(at, text.find('}', at) - at);
        const auto number = [&](const std::string& key) {
            return std::atoi(object.c_str() + object.find("\"" + key + "\":") + key.size() + 3);
        };
        const std::string name = object.substr(object.find("\"case\": \"") + 9, 1);
        const int dim = number("head_dim"), group = number("group");
        const kvarn::format f = support::format_of(dim, dim, number("key_bits"), number("value_bits"), group);
        if (!kvarn::cuda::supports(f, kvarn::cuda::operation::seal)) continue;
        const auto halves = [&](const char* which) {
            std::vector<kvarn::half> x;
            for (const std::uint16_t bits : support::read_npy(folder + "/" + name + which).half_bits()) x.push_back({bits});
            return x;
        };
        CAPTURE(name);
        expect_same<kvarn::half>(f, halves("_k.npy"), halves("_v.npy"), 1, 1, support::paper());
        ++compared;
    }
    CHECK(compared >= 6);
}

TEST_CASE("cuda/seal: what is wrong with the arguments is said before a launch", "[cuda][seal]")
{
    const kvarn::format f = support::format_of(64, 64, 4, 2, 32);
    support::shared_vector<kvarn::cuda::detail::quad> memory(4096);
    kvarn::cuda::seal_arguments good;
    good.k = good.v = support::dense<const void>(memory.data(), kvarn::cuda::element_type::f16, 1, 64);
    good.records = {reinterpret_cast<std::byte*>(memory.data() + 2048), kvarn::record_bytes(f), kvarn::record_bytes(f), 0,
                    nullptr};
    good.tiles = good.heads = 1;
    support::expect_ok(support::run(f, good, {}));
    const auto refused = [&](auto&& change) {
        kvarn::cuda::seal_arguments a = good;
        change(a);
        return support::run(f, a, {});
    };
    CHECK(refused([](auto& a) { a.k.data = nullptr; }) == kvarn::status::null_pointer);
    CHECK(refused([](auto& a) { a.v.data = nullptr; }) == kvarn::status::null_pointer);
    CHECK(refused([](auto& a) { a.records.data = nullptr; }) == kvarn::status::null_pointer);
    CHECK(refused([](auto& a) { a.k.data = static_cast<const std::byte*>(a.k.data) + 2; }) == kvarn::status::bad_argument);
    CHECK(refused([](auto& a) { a.k.token_stride = 65; }) == kvarn::status::bad_argument);
    CHECK(refused([](auto& a) { a.records.data += 4; }) == kvarn::status::bad_argument);
    CHECK(refused([](auto& a) { a.records.head_stride = 64, a.heads = 2; }) == kvarn::status::shape_mismatch);
    CHECK(refused([](auto& a) { a.tiles = -1; }) == kvarn::status::bad_argument);
    CHECK(refused([](auto& a) { a.k.table = reinterpret_cast<const std::int32_t*>(a.k.data); }) == kvarn::status::bad_argument);
    CHECK(refused([](auto& a) { a.tiles = 0, a.k.data = nullptr; }) == kvarn::status::ok);
    kvarn::encode_options many;
    many.refit_rounds = 17;
    CHECK(support::run(f, good, many) == kvarn::status::bad_argument);
    CHECK(support::run(support::format_of(96, 96, 4, 2, 32), good, {}) == kvarn::status::unsupported_head_dim);
    many = {};
    many.encoder = static_cast<kvarn::encoder>(2);
    CHECK(support::run(f, good, many) == kvarn::status::bad_argument);
    const int room = factors_only(f);
    const auto in_workspace = [&](float* workspace, int shared_bytes) {
        kvarn::cuda::seal_arguments a = good;
        a.workspace = workspace;
        return support::run(f, a, {}, 1, shared_bytes);
    };
    support::shared_vector<float> workspace(kvarn::cuda::seal_workspace_bytes(f, 1, 1, room) / 4 + 4);
    CHECK(in_workspace(workspace.data(), room) == kvarn::status::ok);
    CHECK(in_workspace(nullptr, room) == kvarn::status::null_pointer);
    CHECK(in_workspace(workspace.data() + 1, room) == kvarn::status::bad_argument);
    CHECK(in_workspace(workspace.data() + 1, support::block_shared_bytes()) == kvarn::status::ok);  // needs none
    CHECK(in_workspace(workspace.data(), room - 1) == kvarn::status::buffer_too_small);
    CHECK(support::run(support::format_of(256, 256, 4, 2, 256), good, {}) == kvarn::status::null_pointer);
    kvarn::cuda::append_arguments step;
    step.sealed = good;
    CHECK(support::run(support::format_of(256, 256, 4, 2, 256), step, {}) == kvarn::status::null_pointer);
}

TEST_CASE("cuda/seal: which tiles need a workspace on which device", "[cuda][seal]")
{
    constexpr int sm80 = kvarn::cuda::shared_bytes_sm80, sm86 = kvarn::cuda::shared_bytes_sm86,
                  sm90 = kvarn::cuda::shared_bytes_sm90;
    const auto needs = [](const kvarn::format& f, int shared_bytes) {
        const kvarn::cuda::support s = kvarn::cuda::supports(f, kvarn::cuda::operation::seal, shared_bytes);
        CHECK(s);
        CHECK((kvarn::cuda::seal_workspace_bytes(f, 1, 1, shared_bytes) != 0) == s.workspace);
        CHECK((std::string(s.reason) == "supported") == !s.workspace);
        return s.workspace;
    };
    const auto latent = [](int group) { return support::format_of(512, 64, 4, 0, group, true, 64); };
    CHECK((!needs(latent(64), sm80) && needs(latent(64), sm86) && !needs(latent(64), sm90)));
    CHECK((needs(latent(128), sm80) && needs(latent(128), sm86) && needs(latent(128), sm90)));
    CHECK((needs(latent(256), sm80) && needs(latent(256), sm86) && needs(latent(256), sm90)));
    const kvarn::format square = support::format_of(256, 256, 4, 2, 256), usual = support::format_of(128, 128, 4, 2, 128);
    CHECK((needs(square, sm80) && needs(square, sm86) && needs(square, sm90)));
    CHECK((!needs(usual, sm80) && !needs(usual, sm86) && !needs(usual, sm90)));
    CHECK((!needs(support::format_of(256, 256, 4, 2, 128), sm80) && needs(support::format_of(256, 64, 4, 2, 128), sm86)));
    CHECK(kvarn::cuda::seal_workspace_bytes(square, 1, 1) == 2 * 256 * 260 * 4);
    CHECK(kvarn::cuda::seal_workspace_bytes(square, 1 << 20, 1 << 20) == 160 * 256 * 260 * 4);
    CHECK(kvarn::cuda::seal_workspace_bytes(square, 0, 1) == 0);
}
