// SPDX-License-Identifier: Apache-2.0
// Quantizes and dequantizes pseudo-random tiles of many formats, attends to their records, leads sequences of a cache through a short life,
// saves and loads them, and prints an FNV-1a digest of each result: the text must be the same from every compiler, instruction set and
// optimisation level. Integers make the values.
// To save time a variant may leave out element types, and the comparison of its native kernels with the portable ones.
#include <cstdio>
#include <cstring>
#include <span>
#include <type_traits>
#include <vector>

#include <kvarn/cache/load.hpp>  // first: it must know the order of bytes by itself
#include <kvarn/cache/seal.hpp>
#include <kvarn/cache/tasks.hpp>
#include <kvarn/kvarn.hpp>

#if !defined(KVARN_DIGEST_HALF)
#define KVARN_DIGEST_HALF 1
#endif
#if !defined(KVARN_DIGEST_BFLOAT16)
#define KVARN_DIGEST_BFLOAT16 1
#endif
#if !defined(KVARN_DIGEST_PORTABLE)
#define KVARN_DIGEST_PORTABLE 1
#endif
#if !defined(KVARN_DIGEST_ATTENTION)
#define KVARN_DIGEST_ATTENTION 1
#endif
#if !defined(KVARN_DIGEST_CACHE)
#define KVARN_DIGEST_CACHE 1
#endif

namespace {

struct generator {
    std::uint32_t state;

    std::uint32_t bits() noexcept { return (state = state * 1664525u + 1013904223u) >> 16; }
    /// A sum of four uniform integers, roughly normal, |x| < 2^17.
    std::int32_t value() noexcept
    {
        std::int32_t sum = 0;
        for (int i = 0; i < 4; ++i) sum += static_cast<std::int32_t>(bits()) - 32768;
        return sum;
    }
};

enum class content { random, outliers, zero, constant, tiny, minus_zero, not_finite };

/// The unsigned integer of an element's size.
template <class T>
    requires(sizeof(T) == 2 || sizeof(T) == 4)
using bits_of = std::conditional_t<sizeof(T) == 2, std::uint16_t, std::uint32_t>;

template <class T>
T make(float x)
{
    return kvarn::saturate_to<T>(x);
}

/// Exact in float: an integer of less than 24 bits times a power of two.
template <class T>
std::vector<T> fill(std::size_t tokens, std::size_t channels, content c, std::uint32_t seed)
{
    const kvarn::simd::float_environment guard;  // flags may have the program start with subnormals flushed
    generator g{seed};
    std::vector<T> x(tokens * channels);
    for (std::size_t t = 0; t < tokens; ++t)
        for (std::size_t d = 0; d < channels; ++d) {
            float value = static_cast<float>(g.value()) * 0x1p-15f;
            if (c == content::outliers) {
                value = static_cast<float>(g.value() * (d % 13 == 5 ? 12 : 1)) * (t % 7 == 3 ? 0x1p-12f : 0x1p-14f);
                if (d % 29 == 7) value += 16.0f;
            }
            if (c == content::zero) value = 0.0f;
            if (c == content::constant) value = 1.5f;
            if (c == content::tiny) value *= 0x1p-126f;
            x[t * channels + d] = make<T>(value);
        }
    // As integers: flags may let the compiler exchange zeros, and assume that all values are finite.
    const auto set_top = [&x](std::size_t i, std::uint32_t bits) {
        const auto word = static_cast<bits_of<T>>(bits << (8 * sizeof(T) - 16));
        std::memcpy(&x[i], &word, sizeof word);
    };
    if (c == content::minus_zero)
        for (std::size_t i = 0; i < x.size(); ++i) set_top(i, 0x8000u);
    if (c == content::not_finite) set_top(x.size() / 3, seed % 2 != 0 ? 0x7f80u : 0x7fc0u);
    return x;
}

struct fnv1a {
    std::uint64_t hash = 14695981039346656037u;

    void add(unsigned byte) noexcept { hash = (hash ^ byte) * 1099511628211u; }
};

unsigned long long digest(std::span<const std::byte> bytes)
{
    fnv1a sum;
    for (const std::byte b : bytes) sum.add(std::to_integer<unsigned>(b));
    return sum.hash;
}

/// Of values in memory, the least significant byte first on every machine.
template <class T>
unsigned long long digest(const T* values, std::size_t count)
{
    fnv1a sum;
    for (std::size_t i = 0; i < count; ++i) {
        bits_of<T> word;
        std::memcpy(&word, values + i, sizeof word);
        for (unsigned shift = 0; shift < 8 * sizeof word; shift += 8) sum.add(word >> shift & 0xffu);
    }
    return sum.hash;
}

template <class T>
unsigned long long digest(const std::vector<T>& values)
{
    return digest(values.data(), values.size());
}

unsigned long long digest(const std::vector<kvarn::record_errors>& errors)
{
    std::vector<float> values;
    for (const kvarn::record_errors& e : errors)
        for (const kvarn::part_errors& part : {e.k, e.v})
            values.insert(values.end(), {part.worst_scale_error, part.worst_relative_error, part.relative_error});
    return digest(values);
}

int failures = 0;

template <class Arch, class T>
std::vector<std::byte> run(const char* type, const kvarn::format& f, const kvarn::encode_options& options, content c, std::uint32_t seed,
                           bool report)
{
    const auto group = static_cast<std::size_t>(f.group());
    const auto dk = static_cast<std::size_t>(f.key_channels());
    const auto dv = static_cast<std::size_t>(f.head_dim_v());
    const std::size_t heads = 2;
    const std::vector<T> k = fill<T>(group * heads, dk, c, seed);
    const std::vector<T> v = fill<T>(group * heads, dv, c, seed + 1);
    std::vector<std::byte> records(kvarn::grid_bytes(f, 1, heads));
    std::vector<std::byte> scratch(kvarn::scratch_bytes(f));
    const auto grid = kvarn::tile_major_records(f, records.data(), records.size(), 1, heads);

    std::vector<kvarn::record_errors> errors(heads);
    const auto keys = kvarn::token_major(k.data(), group, heads, dk);
    const auto values = f.has_values() ? kvarn::head_major(v.data(), group, heads, dv) : kvarn::kv_view<const T>{};
    const kvarn::status quantized = kvarn::quantize_kv<Arch>(f, keys, values, grid, scratch, options, {}, errors);

    std::vector<T> k_back(k.size()), v_back(v.size());
    const auto keys_back = kvarn::head_major(k_back.data(), group, heads, dk);
    const auto values_back = f.has_values() ? kvarn::token_major(v_back.data(), group, heads, dv) : kvarn::kv_view<T>{};
    unsigned long long decoded[2] = {};
    for (int b = 0; b < 2; ++b) {
        const auto basis = b == 0 ? kvarn::basis::original : kvarn::basis::rotated;
        const kvarn::status done = kvarn::dequantize_kv<Arch>(f, grid, keys_back, values_back, basis, scratch);
        if (done != kvarn::status::ok) ++failures;
        decoded[b] = digest(k_back) ^ digest(v_back) << 1;
    }
    if (quantized != (c == content::not_finite ? kvarn::status::not_finite : kvarn::status::ok)) ++failures;
    if (report)
        std::printf("%s %s k%dv%d_g%d D%d/%d+%d rot%d content%d: %s, %zu bytes, record %016llx, original %016llx, rotated %016llx, errors %016llx\n",
                    type, options.encoder == kvarn::encoder::paper ? "paper" : "refined", f.key_bits(), f.value_bits(), f.group(), f.head_dim_k(), f.head_dim_v(), f.exact_channels(),
                    (f.keys_rotated() ? 1 : 0) + (f.values_rotated() ? 2 : 0), static_cast<int>(c), kvarn::message(quantized), records.size(),
                    digest(std::span<const std::byte>(records)), decoded[0], decoded[1], digest(errors));
    // The decoded values belong to what is compared between the two kernels.
    records.resize(records.size() + sizeof decoded);
    std::memcpy(records.data() + records.size() - sizeof decoded, decoded, sizeof decoded);
    return records;
}

/// Decode attention over two records, a part of them once more and a few exact tokens, at each precision.
template <class Arch>
void attend(const kvarn::format& f, std::span<const std::byte> records, std::uint32_t seed)
{
    const auto dk = static_cast<std::size_t>(f.key_channels());
    const auto dv = static_cast<std::size_t>(f.has_values() ? f.head_dim_v() : f.head_dim_k());
    const auto group = static_cast<std::size_t>(f.group());
    constexpr std::size_t m = 2, r = 7, tail = 21;
    const auto q = fill<float>(m * r, dk, content::random, seed), k = fill<float>(tail, dk, content::random, seed + 1);
    const auto v = fill<float>(tail, dv, content::random, seed + 2);
    std::vector<float> out(m * r * dv);
    std::vector<std::byte> scratch(kvarn::attention_scratch_bytes(f, m * r));
    const kvarn::kv_segment tiles = kvarn::sealed_tiles(f, kvarn::tile_major_records(f, records.data(), 2 * kvarn::record_bytes(f), 2, 1), 0);
    const kvarn::kv_segment history[] = {
        tiles,
        kvarn::token_range(f, tiles, group / 2 + 3, group - 7),
        kvarn::exact_tokens(kvarn::head_major(k.data(), tail, 1, dk), f.has_values() ? kvarn::head_major(v.data(), tail, 1, dv) : kvarn::kv_view<const float>{}, 0)};
    kvarn::attention_task task;
    task.history = history;
    task.q = kvarn::token_major(q.data(), m, r, dk);
    task.out = kvarn::token_major(out.data(), m, r, dv);
    kvarn::attention_options options;
    options.logit_soft_cap = seed % 2 != 0 ? 3.0f : 0.0f;
    options.window = static_cast<std::int64_t>(group) + 40;
    for (const auto p : {kvarn::precision::exact, kvarn::precision::fine, kvarn::precision::fast}) {
        options.precision = p;
        if (kvarn::attend<Arch>(f, task, options, scratch) != kvarn::status::ok) ++failures;
        std::printf("attention k%dv%d_g%d D%d/%d+%d rot%d seed%u precision%d: %016llx\n", f.key_bits(), f.value_bits(), f.group(), f.head_dim_k(),
                    f.head_dim_v(), f.exact_channels(), (f.keys_rotated() ? 1 : 0) + (f.values_rotated() ? 2 : 0), seed, static_cast<int>(p), digest(out));
    }
}

template <class T>
void both(const char* type, const kvarn::format_spec& spec, content c, std::uint32_t seed)
{
    const auto f = kvarn::make_format(spec);
    if (!f) {
        std::printf("%s D%d: %s\n", type, spec.head_dim_k, kvarn::message(f.error));
        ++failures;
        return;
    }
    kvarn::encode_options paper;
    paper.encoder = kvarn::encoder::paper;
    run<kvarn::simd::native_arch, T>(type, *f, paper, c, seed, true);
    const auto native = run<kvarn::simd::native_arch, T>(type, *f, {}, c, seed, true);
#if KVARN_DIGEST_ATTENTION
    if constexpr (std::is_same_v<T, float>) attend<kvarn::simd::native_arch>(*f, native, seed);
#endif
#if KVARN_DIGEST_PORTABLE
    if constexpr (std::is_same_v<T, float>) {  // the variants whose native kernels are the portable ones cover the other types
        const auto portable = run<kvarn::simd::portable, T>(type, *f, {}, c, seed, false);
        if (native != portable) {
            std::printf("  the native and the portable kernels differ\n");
            ++failures;
        }
    }
#else
    static_cast<void>(native);
#endif
}

[[gnu::noinline]] void every_case()
{
    using kvarn::rotation;
    const kvarn::format_spec specs[] = {
        {32, 32, 4, 2, 32, rotation::hadamard, rotation::hadamard, 0},   {36, 36, 8, 8, 32, rotation::hadamard, rotation::hadamard, 0},
        {64, 64, 4, 2, 64, rotation::hadamard, rotation::hadamard, 0},   {80, 80, 3, 5, 64, rotation::hadamard, rotation::hadamard, 0},
        {96, 96, 5, 3, 32, rotation::hadamard, rotation::hadamard, 0},   {112, 112, 6, 6, 64, rotation::hadamard, rotation::hadamard, 0},
        {128, 128, 4, 2, 128, rotation::hadamard, rotation::hadamard, 0}, {128, 128, 2, 2, 128, rotation::hadamard, rotation::hadamard, 0},
        {128, 64, 3, 4, 64, rotation::hadamard, rotation::hadamard, 0},  {144, 144, 2, 8, 32, rotation::hadamard, rotation::hadamard, 0},
        {192, 128, 5, 6, 32, rotation::hadamard, rotation::hadamard, 0}, {256, 256, 4, 4, 64, rotation::hadamard, rotation::hadamard, 0},
        {512, 512, 4, 0, 64, rotation::hadamard, rotation::hadamard, 64}, {576, 576, 4, 2, 32, rotation::hadamard, rotation::hadamard, 0},
        {64, 64, 8, 3, 256, rotation::hadamard, rotation::hadamard, 0},  {100, 44, 4, 3, 32, rotation::none, rotation::none, 0},
        {128, 128, 6, 5, 32, rotation::none, rotation::none, 8}, {64, 64, 4, 2, 64, rotation::none, rotation::hadamard, 0},
        {128, 100, 2, 4, 32, rotation::hadamard, rotation::none, 0},
    };
    std::uint32_t seed = 1;
    const auto all_types = [&seed](const kvarn::format_spec& spec, content a, [[maybe_unused]] content b) {
        both<float>("float", spec, a, seed += 1000);
#if KVARN_DIGEST_HALF
        both<kvarn::half>("half", spec, b, seed + 300);
#endif
#if KVARN_DIGEST_BFLOAT16
        both<kvarn::bfloat16>("bfloat16", spec, a, seed + 600);
#endif
    };
    for (const auto& spec : specs) all_types(spec, content::outliers, content::random);
    for (const content c : {content::zero, content::constant, content::tiny, content::minus_zero})
        for (const int i : {2, 3, 4, 6}) all_types(specs[i], c, c);
    for (const int i : {2, 4}) both<float>("float", specs[i], content::not_finite, seed += 1001);
}

/// Files of chunks: checksums over payloads of many sizes, as the machine's own XXH3 makes and reads them.
void file_case()
{
    std::vector<std::byte> payload(3000), file(64 * 1024);
    for (std::size_t i = 0; i < payload.size(); ++i) payload[i] = static_cast<std::byte>(i * i >> 3 & 255u);
    kvarn::buffer_writer writer{kvarn::buffer_sink(file)};
    bool ok = writer.begin(kvarn::file_kind::sequence) == kvarn::status::ok;
    for (const std::size_t bytes : {0u, 3u, 8u, 16u, 128u, 240u, 241u, 1024u, 3000u})
        ok = ok && writer.chunk(kvarn::chunk_type("data"), bytes, std::span(payload).first(bytes)) == kvarn::status::ok;
    ok = ok && writer.finish() == kvarn::status::ok;
    const auto written = std::span<const std::byte>(file).first(static_cast<std::size_t>(writer.bytes()));
    kvarn::buffer_reader reader{kvarn::buffer_source(written)};
    ok = ok && reader.begin(kvarn::file_kind::sequence) == kvarn::status::ok;
    for (int i = 0; i < 9; ++i) ok = ok && reader.next().ok() && (i % 2 != 0 ? reader.skip() : reader.payload().error) == kvarn::status::ok;
    ok = ok && reader.next().ok() && reader.at_end() == kvarn::status::ok;
    if (!ok) ++failures;
    std::printf("file: %016llx\n", digest(written));
}

#if KVARN_DIGEST_CACHE
/// A cache of two layers with two heads each, and what was made of it.
class small_cache {
public:
    explicit small_cache(kvarn::exact_type exact)
    {
        static constexpr kvarn::bit_rule rules[] = {{.first_layer = 1, .key_bits = 2, .value_rotation = kvarn::rotation::none}};
        config_.policy = *kvarn::make_policy(*kvarn::parse_format("k4v2_g32", 32), 2, 2, rules);
        config_.exact = exact;
        config_.sink_tokens = 32;
        config_.sequences = 3;
        config_.most_tokens = 128;
        config_.record_blocks = 6;
        config_.exact_blocks = 14;
        memory_.assign(kvarn::plan_cache(config_)->bytes(), std::byte{0xff});
        scratch_.resize(kvarn::cache_scratch_bytes(config_));
        pool = *kvarn::make_pool(config_, memory_);
    }

    void draft(kvarn::sequence_id id, std::size_t tokens, std::uint32_t seed)
    {
        expect(pool.reserve(id, tokens));
        for (std::size_t layer = 0; layer < 2; ++layer) {
            const auto k = fill<float>(2 * tokens, 32, content::outliers, seed += 17), v = fill<float>(2 * tokens, 32, content::random, seed += 17);
            expect(kvarn::store(pool, id, layer, kvarn::token_major(k.data(), tokens, 2, 32), kvarn::token_major(v.data(), tokens, 2, 32)));
        }
    }
    void append(kvarn::sequence_id id, std::size_t tokens, std::uint32_t seed)
    {
        draft(id, tokens, seed);
        expect(pool.commit(id, tokens));
    }
    void seal(kvarn::sequence_id id, std::size_t tiles)
    {
        const auto report = kvarn::seal(pool, id, scratch_);
        if (!report || report->sealed != tiles) ++failures;
    }
    /// Attention of the newest three tokens in both layers, of which the third does not see the second.
    unsigned long long attention(kvarn::sequence_id id)
    {
        static constexpr float slopes[4] = {0.5f, 0.25f, 0.125f, 0.0625f};
        static constexpr std::uint64_t mask[3] = {1, 3, 5};
        std::vector<float> all, out(3 * 4 * 32);
        for (std::size_t layer = 0; layer < 2; ++layer) {
            const auto q = fill<float>(3 * 4, 32, content::random, 7);
            kvarn::sequence_step step;
            step.sequence = id;
            step.q = kvarn::token_major(q.data(), 3, 4, 32);
            step.out = kvarn::token_major(out.data(), 3, 4, 32);
            step.alibi_slopes = slopes;
            step.mask = mask;
            step.mask_stride = 1;
            step.mask_tokens = 3;
            kvarn::layer_options options;
            options.attention.window = 60;
            options.threads = 8;
            options.chunks_per_item = 1;
            std::vector<std::byte> work(kvarn::layer_memory_bytes(pool, {&step, 1}, options));
            const auto items = kvarn::plan_layer(pool, layer, {&step, 1}, options, work);
            expect(items ? items->run(scratch_) : items.error);
            all.insert(all.end(), out.begin(), out.end());
        }
        return digest(all);
    }
    unsigned long long values(kvarn::sequence_id id)
    {
        std::vector<float> all;
        const std::size_t tokens = pool.tokens(id) + pool.drafts(id);
        std::vector<float> k(tokens * 32), v(tokens * 32);
        for (std::size_t i = 0; i < 4; ++i) {
            expect(kvarn::read(pool, id, i / 2, i % 2, 0, 1000, kvarn::token_major(k.data(), tokens, 1, 32), kvarn::token_major(v.data(), tokens, 1, 32),
                               scratch_));
            all.insert(all.end(), k.begin(), k.end());
            all.insert(all.end(), v.begin(), v.end());
        }
        return digest(all);
    }
    std::vector<std::byte> file(kvarn::sequence_id id)
    {
        std::vector<std::byte> bytes(static_cast<std::size_t>(kvarn::saved_bytes(pool, id)));
        expect(kvarn::save(pool, id, kvarn::buffer_sink(bytes)));
        return bytes;
    }
    static void expect(kvarn::status s)
    {
        if (s != kvarn::status::ok) ++failures;
    }

    kvarn::cache_pool pool;

private:
    kvarn::cache_config config_;
    std::vector<std::byte> memory_, scratch_;
};

void cache_case(const char* type, kvarn::exact_type exact)
{
    small_cache cache(exact), other(exact);
    const kvarn::sequence_id id = *cache.pool.open(3);
    for (const std::size_t tokens : {50u, 1u, 25u}) cache.append(id, tokens, 1000 + static_cast<std::uint32_t>(tokens));
    cache.seal(id, 1);
    small_cache::expect(cache.pool.truncate(id, 48));  // in the tile that was sealed
    cache.append(id, 40, 2000);
    cache.seal(id, 1);
    small_cache::expect(cache.pool.erase(id, 20, 25));
    const kvarn::sequence_id fork = *cache.pool.fork(id);
    const auto file = cache.file(fork);
    cache.draft(fork, 3, 3000);
    const auto attention = cache.attention(fork);
    std::printf("cache %s: values %016llx, attention %016llx, file %016llx\n", type, cache.values(fork), attention, digest(std::span<const std::byte>(file)));

    const auto back = kvarn::load(other.pool, kvarn::buffer_source(file));
    if (!back || other.file(*back) != file || other.values(*back) != cache.values(id)) ++failures;
    if (!back) return;
    other.draft(*back, 3, 3000);
    if (other.attention(*back) != attention) ++failures;
}
#endif

}  // namespace

int main(int count, char**)
{
    // An argument moves the stack by 16 bytes. Windows promises no more for the place of an AVX register that is spilled there.
    auto* const moved = static_cast<volatile char*>(__builtin_alloca(static_cast<std::size_t>(16 * (count - 1) + 1)));
    moved[0] = 0;
    every_case();
    file_case();
#if KVARN_DIGEST_CACHE
    cache_case("f32", kvarn::exact_type::f32);
    cache_case("f16", kvarn::exact_type::f16);
    cache_case("bf16", kvarn::exact_type::bf16);
#endif
    std::printf("%d failures\n", failures);
    return failures != 0;
}
