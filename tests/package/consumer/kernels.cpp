// SPDX-License-Identifier: Apache-2.0
// A program with several instruction sets: kvarn_add_kernels has compiled them, this file knows none of them. Tiles, and a whole cache.
#include <cstdio>
#include <cstring>
#include <string>

#include <kvarn/cache/load.hpp>
#include <kvarn/dispatch.hpp>
#include <kvarn/dispatch/cache.hpp>
#include <kvarn/interop/owning.hpp>

#include "part.hpp"

namespace {

/// A step of 80 tokens, its tiles sealed: the saved sequence, and behind it what attention gave. Empty where something fails.
std::vector<std::byte> cache_file(const std::vector<float>& k, const std::vector<float>& v)
{
    constexpr std::size_t tokens = 80, dim = 64;
    kvarn::cache_config config;
    config.policy = *kvarn::make_policy(*kvarn::parse_format("k4v2_g32", dim), 1, 1);
    config.sink_tokens = 0;
    config.sequences = 2;
    config.most_tokens = config.most_step = tokens;
    std::vector<std::byte> memory(kvarn::plan_cache(config)->bytes()), scratch(kvarn::cache_scratch_bytes(config));
    std::vector<std::byte> work(kvarn::layer_memory_bound(config, 1, 2, 2));
    kvarn::cache_pool pool = *kvarn::make_pool(config, memory);
    const kvarn::sequence_id id = *pool.open();
    std::vector<float> out(2 * dim), read(tokens * dim), again(read);
    kvarn::sequence_step step;
    step.sequence = id;
    step.k = kvarn::token_major(k.data(), tokens, 1, dim);
    step.v = kvarn::token_major(v.data(), tokens, 1, dim);
    step.q = kvarn::token_major(k.data(), 1, 2, dim);
    step.out = kvarn::token_major(out.data(), 1, 2, dim);
    if (pool.reserve(id, tokens) != kvarn::status::ok) return {};
    const auto items = kvarn::plan_layer(pool, 0, {&step, 1}, {}, work);
    if (!items || kvarn::dispatched::run(*items, scratch) != kvarn::status::ok || pool.commit(id, tokens) != kvarn::status::ok) return {};
    const auto sealed = kvarn::dispatched::seal(pool, id, scratch);
    if (!sealed || sealed->sealed != 2) return {};

    std::vector<std::byte> file(static_cast<std::size_t>(kvarn::saved_bytes(pool, id)));
    if (kvarn::save(pool, id, kvarn::buffer_sink(file)) != kvarn::status::ok) return {};
    const auto back = kvarn::load(pool, kvarn::buffer_source(file));
    const auto values = [&](kvarn::sequence_id which, std::vector<float>& to) {
        return kvarn::dispatched::read(pool, which, 0, 0, 0, tokens, kvarn::token_major(to.data(), tokens, 1, dim), {}, scratch) == kvarn::status::ok;
    };
    if (!back || !values(id, read) || !values(*back, again) || read != again) return {};
    file.resize(file.size() + out.size() * sizeof(float));
    std::memcpy(file.data() + file.size() - out.size() * sizeof(float), out.data(), out.size() * sizeof(float));
    return file;
}

}  // namespace

int main()
{
    std::vector<float> k(2 * 64 * 64), v(k.size()), k2(k.size()), v2(v.size()), k_first, v_first;
    for (std::size_t i = 0; i < k.size(); ++i) {
        k[i] = static_cast<float>(i * 37 % 101) - 50.0f;
        v[i] = static_cast<float>(i * 53 % 97) * 0.25f;
    }
    const auto format = kvarn::parse_format("k4v2_g64", 64);
    if (!format) return 1;
    const auto expected = quantize_elsewhere(*format, k, v);
    const auto view = [](std::vector<float>& x) { return kvarn::head_major(x.data(), 64, 2, 64); };
    std::vector<std::byte> scratch(kvarn::scratch_bytes(*format));

    const std::string best = kvarn::active_arch_name();
    std::string names;
    const std::vector<std::byte> first_file = cache_file(k, v);
    bool same = !first_file.empty();
    kvarn::for_each_arch([&](auto a) {
        names += kvarn::simd::arch_traits<decltype(a)>::name;
        names += ' ';
        same = same && kvarn::select_arch(kvarn::simd::arch_traits<decltype(a)>::name) == kvarn::status::ok;
        std::vector<std::byte> bytes(kvarn::grid_bytes(*format, 1, 2));
        const auto records = kvarn::tile_major_records(*format, bytes.data(), bytes.size(), 1, 2);
        auto done = kvarn::dispatch([&](auto arch) { return kvarn::quantize_kv<decltype(arch)>(*format, view(k), view(v), records); });
        if (done == kvarn::status::ok)
            done = kvarn::dispatch([&](auto arch) {
                return kvarn::dequantize_kv<decltype(arch)>(*format, records, view(k2), view(v2), kvarn::basis::rotated, scratch);
            });
        if (done == kvarn::status::ok) done = kvarn::dispatch([&](auto arch) { return kvarn::unrotate<decltype(arch)>(view(k2)); });
        if (k_first.empty()) k_first = k2, v_first = v2;
        same = same && cache_file(k, v) == first_file && done == kvarn::status::ok && bytes == expected && k2 == k_first && v2 == v_first;
    });
    std::printf("%s, dispatched: %s, %s\n", names.c_str(), best.c_str(), same ? "the same everywhere" : "DIFFERENT");
    return same && names.size() > best.size() && names.substr(names.size() - best.size() - 1) == best + ' ' ? 0 : 2;
}
