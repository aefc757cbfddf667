// SPDX-License-Identifier: Apache-2.0
#pragma once
// Files of saved sequences, made without a sequence: any spans, right or wrong, with the chunks and checksums that would belong to them. For
// the target `saved` and for its seeds.

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <iterator>
#include <span>
#include <utility>
#include <vector>

#include <kvarn/cache/save.hpp>

#include "fuzz.hpp"

namespace saved_files {

inline constexpr unsigned setups = 3;

/// Small caches that differ in everything that a file depends on.
inline kvarn::cache_config config_of(unsigned setup)
{
    static constexpr kvarn::bit_rule mixed[] = {{.first_layer = 1, .key_bits = 2, .key_rotation = kvarn::rotation::none}};
    const auto policy = [](const char* name, int heads, std::span<const kvarn::bit_rule> rules) {
        const auto f = kvarn::parse_format(name, 32);
        fuzz::require(f.ok() && kvarn::make_policy(*f, 2, heads, rules).ok(), "the setup is one");
        return *kvarn::make_policy(*f, 2, heads, rules);
    };
    kvarn::cache_config c;
    c.sequences = 4;
    c.most_tokens = 160;
    c.most_spans = 9;
    c.record_blocks = 5;
    c.exact_blocks = 7;
    c.encode.encoder = kvarn::encoder::paper;
    c.encode.iterations = 1;
    c.sink_tokens = 0;
    switch (setup % setups) {
    case 0:
        c.policy = policy("k4v2_g32", 1, mixed);
        break;
    case 1:
        c.policy = policy("k3v0_g32", 1, {});
        c.exact = kvarn::exact_type::f32;
        c.sink_tokens = 32;
        break;
    default:
        c.policy = policy("k2v2_g32", 2, {});
        c.exact = kvarn::exact_type::bf16;
        c.key_basis = kvarn::basis::rotated;
        c.recent_tokens = 5;
    }
    return c;
}

/// As in the file.
struct file_span {
    std::uint64_t position = 0;
    std::uint16_t first = 0, count = 0, flags = 0, kept = 0;

    friend bool operator==(const file_span&, const file_span&) = default;
};
inline constexpr std::uint16_t sealed_flag = 1, sink_flag = 2, same_block_flag = 4;

struct contents {
    std::uint64_t first_position = 0, next_position = 0, committed = 0, count = 0, first_layer = 0, layers = 2;
    std::vector<file_span> spans{};
    std::uint64_t seed = 0;  ///< of the values
    bool tame = true;        ///< all halves, bfloat16s and floats are finite, and no larger than 1
};

/// The file. Spans that no block could have, and layers that are not there, have no chunks.
inline std::vector<std::byte> make(const kvarn::cache_pool& pool, const contents& x)
{
    namespace detail = kvarn::detail;
    const detail::pool_state& s = pool.state();
    std::vector<std::byte> out;
    kvarn::file_writer writer([&](std::span<const std::byte> piece) {
        out.insert(out.end(), piece.begin(), piece.end());
        return true;
    });
    const auto written = [](kvarn::status said) { fuzz::require(said == kvarn::status::ok, "a file is written"); };
    written(writer.begin(kvarn::file_kind::sequence));

    std::vector<std::byte> payload(8 * detail::identity_fields + detail::format_bytes * s.layers * s.heads);
    const detail::cache_identity identity(s);
    for (std::size_t i = 0; i < detail::identity_fields; ++i) kvarn::put_u64(payload.data() + 8 * i, identity.fields[i].value);
    for (std::size_t i = 0; i < s.layers * s.heads; ++i) {
        std::byte f[detail::format_bytes];
        detail::put_format(s.places[i].f, f);
        std::memcpy(payload.data() + 8 * detail::identity_fields + i * sizeof f, f, sizeof f);
    }
    written(writer.chunk(detail::identity_chunk, 0, payload));

    payload.assign(detail::span_head_bytes + detail::span_bytes * x.spans.size(), std::byte{});
    const std::uint64_t fields[] = {x.first_position, x.next_position, x.committed, x.count, x.first_layer, x.layers};
    for (std::size_t i = 0; i < std::size(fields); ++i) kvarn::put_u64(payload.data() + 8 * i, fields[i]);
    for (std::size_t i = 0; i < x.spans.size(); ++i) {
        std::byte* const at = payload.data() + detail::span_head_bytes + detail::span_bytes * i;
        kvarn::put_u64(at, x.spans[i].position);
        kvarn::put_u16(at + 8, x.spans[i].first);
        kvarn::put_u16(at + 10, x.spans[i].count);
        kvarn::put_u16(at + 12, x.spans[i].flags);
        kvarn::put_u16(at + 14, x.spans[i].kept);
    }
    written(writer.chunk(detail::spans_chunk, 0, payload));

    // A chunk for each record block and for each exact span.
    std::vector<std::pair<bool, detail::block_part>> chunks;
    for (std::size_t i = 0; i < x.spans.size(); ++i) {
        const bool sealed = (x.spans[i].flags & sealed_flag) != 0;
        if (i == 0 || !sealed || (x.spans[i].flags & same_block_flag) == 0) chunks.push_back({sealed, {i, i + 1, x.spans[i].first, x.spans[i].count}});
    }
    fuzz::random_source random(x.seed);
    if (x.layers > s.layers || x.first_layer > s.layers - x.layers) chunks.clear();
    std::uint64_t number = x.first_layer * chunks.size();
    for (std::uint64_t layer = x.first_layer; layer < x.first_layer + x.layers && !chunks.empty(); ++layer)
        for (const auto& [sealed, part] : chunks) {
            if (part.first + part.count > s.group) continue;
            payload.resize(detail::as_size(detail::payload_bytes(s, detail::as_size(layer), sealed, part)));
            for (std::size_t i = 0; i < payload.size(); ++i)
                payload[i] = static_cast<std::byte>(random.bits() & (x.tame && i % 2 != 0 ? 0xbbu : 0xffu));
            written(writer.chunk(sealed ? detail::records_chunk : detail::exact_chunk, number++, payload));
        }
    written(writer.finish());
    return out;
}

}  // namespace saved_files
