// SPDX-License-Identifier: Apache-2.0
// docs/embedding.md: what its pieces find around them in an engine.
#include <algorithm>
#include <cstdio>
#include <span>
#include <vector>

#include <kvarn/cache/file.hpp>
#include <kvarn/kvarn.hpp>

namespace engine {
struct fp16 {
    std::uint16_t bits;
};
struct tensor_of_halves {
    const fp16* data() const { return nullptr; }
};
struct threads {
    template <class F>
    void run(std::size_t workers, F&& f)
    {
        for (std::size_t w = 0; w < workers; ++w) f(w);
    }
    template <class F>
    void for_each(std::size_t items, F&& f)
    {
        for (std::size_t i = 0; i < items; ++i) f(i, std::size_t{0});
    }
};
}  // namespace engine

// snippet: storage

namespace {

constexpr std::size_t tokens = 300, heads = 2, head_dim = 64, group = 128, workers = 2;
const kvarn::format format = kvarn::parse_format("k4v2_g128", head_dim).value;
using half_view = kvarn::kv_view<const kvarn::half>;

void views(const kvarn::half* k)
{
    // snippet: views
    static_cast<void>(keys);
    static_cast<void>(other);
}

half_view cast(const engine::tensor_of_halves& tensor)
{
    // snippet: cast
    const kvarn::kv_view<const engine::fp16> named = kvarn::token_major(tensor.data(), tokens, heads, head_dim);
    static_cast<void>(named);
    return kvarn::token_major(k, tokens, heads, head_dim);
}

kvarn::status seal(half_view all_keys, std::vector<kvarn::status>& statuses, std::vector<std::vector<std::byte>>& scratch, engine::threads pool)
{
    // snippet: whole_tiles
    const half_view values = keys;
    std::vector<std::byte> bytes(kvarn::grid_bytes(format, tiles, heads));
    const auto records = kvarn::tile_major_records(format, bytes.data(), bytes.size(), tiles, heads);
    // snippet: ranges
    return tail.tokens != 0 ? statuses[0] : statuses[1];
}

kvarn::status open(kvarn::record_grid<const std::byte> records, std::size_t tiles, std::span<std::byte> scratch)
{
    kvarn::status status = kvarn::status::ok;
    // snippet: open
    return status;
}

bool page_of(const kvarn::format& narrow, const kvarn::format& wide, std::byte* pages, std::size_t bytes, std::size_t tiles)
{
    // snippet: pages
    return grid.record_bytes == kvarn::record_bytes(wide);
}

template <class F>
kvarn::status errors(half_view keys, half_view values, kvarn::record_grid<std::byte> records, std::size_t tiles, std::span<std::byte> scratch,
                     F&& keep_exact)
{
    kvarn::status status = kvarn::status::ok;
    // snippet: encoder
    return status;
}

double policy_of(int layers, int kv_heads, int layer, int head)
{
    // snippet: policy
    return f.key_bits() + bits;
}

kvarn::status choose(half_view queries_of_this_head, half_view keys_of_this_head, half_view values_of_this_head, std::span<std::byte> scratch)
{
    kvarn::status status = kvarn::status::ok;
    // snippet: choose
    return chosen ? status : chosen.error;
}

kvarn::status rotated(half_view rotated_keys, half_view rotated_values, kvarn::record_grid<std::byte> records, std::span<std::byte> scratch)
{
    kvarn::status status = kvarn::status::ok;
    // snippet: rotated
    return status;
}

void attend(std::span<const kvarn::attention_task> tasks, const kvarn::attention_options& options, std::vector<std::byte>& workspace,
            std::vector<std::vector<std::byte>>& scratch, std::vector<kvarn::status>& statuses, std::vector<kvarn::status>& done,
            engine::threads pool)
{
    // snippet: items
}

kvarn::status write(std::FILE* f, std::span<const std::byte> payload)
{
    // snippet: file
    return s;
}

}  // namespace

int main()
{
    views(nullptr);
    std::vector<kvarn::half> x(tokens * heads * head_dim, kvarn::to_half(0.5f));
    const half_view all = kvarn::token_major<const kvarn::half>(x.data(), tokens, heads, head_dim), whole = kvarn::first_tokens(all, 2 * group),
                    one = kvarn::first_tokens(all, group).head(0);
    std::vector<std::vector<std::byte>> scratch(workers, std::vector<std::byte>(kvarn::call_scratch_bytes(format, 4) + kvarn::choose_scratch_bytes(format)));
    std::vector<std::byte> bytes(kvarn::grid_bytes(format, 2, heads)), workspace;
    const auto records = kvarn::tile_major_records(format, bytes.data(), bytes.size(), 2, heads);
    std::vector<kvarn::status> statuses(workers, kvarn::status::io_error);
    std::size_t kept = 0;
    bool good = cast({}).tokens == tokens && seal(all, statuses, scratch, {}) == kvarn::status::ok;
    good = good && errors(whole, whole, records, 2, scratch[0], [&](std::size_t) { ++kept; }) == kvarn::status::ok;
    good = good && open(records, 2, scratch[0]) == kvarn::status::ok && rotated(whole, whole, records, scratch[0]) == kvarn::status::ok;
    good = good && page_of(format, kvarn::parse_format("k4v2_g128", 128).value, bytes.data(), bytes.size(), 2);
    good = good && policy_of(28, 8, 0, 7) > 4 && choose(one, one, one, scratch[0]) == kvarn::status::ok;
    std::vector<kvarn::status> done(1, kvarn::status::io_error);
    std::vector<float> q(head_dim, 0.25f), out(head_dim);
    const kvarn::kv_segment history[] = {kvarn::sealed_tiles(format, records, 0)};
    kvarn::attention_task task;
    task.history = history;
    task.q = kvarn::token_major<const float>(q.data(), 1, 1, head_dim);
    task.out = kvarn::token_major(out.data(), 1, 1, head_dim);
    attend({&task, 1}, {}, workspace, scratch, statuses, done, {});
    good = good && done[0] == kvarn::status::ok && out[0] != 0.0f;
    std::FILE* const file = std::tmpfile();
    good = good && file != nullptr && write(file, bytes) == kvarn::status::ok;
    if (file != nullptr) std::fclose(file);
    std::printf("%zu of 4 records lost more than the bound\n", kept);
    return good ? 0 : 1;
}
