// SPDX-License-Identifier: Apache-2.0
// docs/cache.md: its adapter runs five steps of a sequence, which is sealed in pieces, saved and loaded.
// snippet: adapter

#include <cstdio>

#include <kvarn/cache/load.hpp>

struct one_thread {
    template <class F>
    void run(std::size_t n, F&& f)
    {
        for (std::size_t i = 0; i < n; ++i) f(i, std::size_t{0});
    }
};

static status step(engine_cache& cache, one_thread& threads, kvarn::sequence_id sequence, std::size_t layers, std::size_t kv_heads,
                   std::size_t query_heads, std::size_t head_dim, const float* k, const float* v, const float* q, float* out, std::size_t m,
                   std::size_t accepted)
{
    // snippet: step
    return sealed.error;
}

static std::size_t seal_some(kvarn::cache_pool& pool, std::size_t items_per_step, one_thread& threads,
                             std::vector<std::vector<std::byte>>& scratch)
{
    std::size_t failures = 0;
    const auto check = [&](status said) { failures += said != status::ok; };
    // snippet: seal
    return failures + (queued ? 0 : 1);
}

static bool comes_back(kvarn::cache_pool& pool, kvarn::sequence_id sequence)
{
    std::FILE* const file = std::tmpfile();
    if (file == nullptr) return false;
    const char* differs = nullptr;
    // snippet: save
    std::fclose(file);
    return saved == status::ok && restored && differs == nullptr && pool.statistics(*restored)->tokens == pool.statistics(sequence)->tokens;
}

int main()
{
    engine_cache cache;
    one_thread threads;
    if (cache.start(2, 2, 64, 1) != status::ok) return std::puts("start"), 1;
    const auto sequence = cache.pool.open();
    if (!sequence) return std::puts("open"), 1;
    std::vector<float> x(100 * 4 * 64), out(x.size());
    for (std::size_t i = 0; i < x.size(); ++i) x[i] = static_cast<float>(i * 2654435761u % 1999u) * 0x1p-9f - 2.0f;
    for (int i = 0; i < 5; ++i) {
        const status said = step(cache, threads, *sequence, 2, 2, 4, 64, x.data(), x.data(), x.data(), out.data(), 100, 90);
        if (said != status::ok) return std::puts(kvarn::message(said)), 1;
    }
    const auto numbers = cache.pool.statistics(*sequence);
    float largest = 0;
    for (const float y : out) largest = std::max(largest, y < 0 ? -y : y);
    std::printf("%zu tokens, %zu of them in records, outputs up to %.3f\n", numbers->tokens, numbers->sealed_tokens, static_cast<double>(largest));
    if (seal_some(cache.pool, 100, threads, cache.scratch) != 0) return std::puts("sealing"), 1;
    if (!comes_back(cache.pool, *sequence)) return std::puts("saving"), 1;
    return numbers->tokens == 450 && numbers->sealed_tokens == 256 && largest > 0.01f && largest < 4 ? 0 : 1;
}
