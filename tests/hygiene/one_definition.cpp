// SPDX-License-Identifier: Apache-2.0
// One of two translation units of a program, compiled for different instruction sets; see one_definition.sh.
#include <cstdio>
#include <vector>

#include <kvarn/cache/file.hpp>
#include <kvarn/kvarn.hpp>

#define KVARN_JOIN2(a, b) a##b
#define KVARN_JOIN(a, b) KVARN_JOIN2(a, b)

/// Uses what an engine uses. Returns a digest of the records.
unsigned KVARN_JOIN(use_, KVARN_PART)()
{
    const auto f = kvarn::parse_format("k4v2_g32", 64);
    if (!f) return 0;
    float k[32 * 64], v[32 * 64];
    for (int i = 0; i < 32 * 64; ++i) {
        k[i] = static_cast<float>(i * 37 % 101);
        v[i] = static_cast<float>(i * 53 % 97);
    }
    static std::byte records[16384], scratch[1 << 20];
    const std::size_t bytes = kvarn::grid_bytes(*f, 1, 1);
    if (bytes > sizeof records || kvarn::scratch_bytes(*f) > sizeof scratch) return 0;
    const auto grid = kvarn::tile_major_records(*f, records, bytes, 1, 1);
    if (kvarn::quantize_kv(*f, kvarn::token_major(k, 32, 1, 64), kvarn::token_major(v, 32, 1, 64), grid, scratch) != kvarn::status::ok)
        return 0;
    if (kvarn::dequantize_kv(*f, grid, kvarn::token_major(k, 32, 1, 64), kvarn::token_major(v, 32, 1, 64), kvarn::basis::original,
                             scratch) != kvarn::status::ok)
        return 0;
    // The records through a file, which is read in place, then piece by piece.
    static std::byte file[32768];
    kvarn::buffer_writer writer{kvarn::buffer_sink(file)};
    if (writer.begin(kvarn::file_kind::records) != kvarn::status::ok ||
        writer.chunk(kvarn::chunk_type("data"), 0, {records, bytes}) != kvarn::status::ok || writer.finish() != kvarn::status::ok)
        return 0;
    for (const bool in_place : {true, false}) {
        kvarn::buffer_reader reader{kvarn::buffer_source(file)};
        if (!reader.begin() || !reader.next()) return 0;
        if ((in_place ? reader.payload().error : reader.skip()) != kvarn::status::ok || !reader.next()) return 0;
    }
    unsigned hash = 2166136261u;
    for (std::size_t i = 0; i < bytes; ++i) hash = (hash ^ static_cast<unsigned>(records[i])) * 16777619u;
    return hash;
}

#if defined(KVARN_MAIN)
unsigned use_high();
int main()
{
    const unsigned low = use_low(), high = use_high();
    std::printf("%08x %08x\n", low, high);
    return low != 0 && low == high ? 0 : 1;
}
#endif
