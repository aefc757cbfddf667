// SPDX-License-Identifier: Apache-2.0
// What files of chunks and of sequences need is what kvarn::cache_files brings.
#include <cstdio>
#include <vector>

#include <kvarn/cache/file.hpp>
#include <kvarn/cache/load.hpp>

namespace {

bool chunks()
{
    std::byte buffer[256], letters[3]{};
    kvarn::buffer_writer writer{kvarn::buffer_sink(buffer)};
    const bool ok = writer.begin(kvarn::file_kind::records) == kvarn::status::ok &&
                    writer.chunk(kvarn::chunk_type("abcd"), 1, letters) == kvarn::status::ok && writer.finish() == kvarn::status::ok;
    kvarn::buffer_reader reader{kvarn::buffer_source({buffer, static_cast<std::size_t>(writer.bytes())})};
    return ok && reader.begin().ok() && reader.next().ok() && reader.skip() == kvarn::status::ok && reader.next().ok() &&
           reader.at_end() == kvarn::status::ok;
}

/// A sequence without tokens goes to a buffer and comes back: no kernel is needed for that.
bool sequence()
{
    kvarn::cache_config config;
    config.policy = *kvarn::make_policy(*kvarn::parse_format("k4v2_g64", 64), 2, 2);
    config.sequences = 2;
    std::vector<std::byte> memory(kvarn::plan_cache(config)->bytes());
    kvarn::cache_pool pool = *kvarn::make_pool(config, memory);
    const auto id = pool.open(3);
    if (!id) return false;
    std::vector<std::byte> file(static_cast<std::size_t>(kvarn::saved_bytes(pool, *id)));
    if (kvarn::save(pool, *id, kvarn::buffer_sink(file)) != kvarn::status::ok) return false;
    const auto back = kvarn::load(pool, kvarn::buffer_source(file));
    return back && pool.next_position(*back) == 3;
}

}  // namespace

int main()
{
    const bool ok = chunks() && sequence();
    std::puts(ok ? "files" : "FAILED");
    return ok ? 0 : 1;
}
