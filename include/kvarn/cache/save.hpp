// SPDX-License-Identifier: Apache-2.0
#pragma once
// A sequence of a cache as a file, written through the caller's function without seeking. In: the committed tokens as the pool
// holds them. Out: records and exact tokens byte for byte, little-endian, with the identity of the cache (cache/file.hpp has the
// framing and its checksums). No allocation. cache/load.hpp reads it.
//
// Chunks: `idnt` the identity; `span` positions and spans; then for each layer, in the order of the spans, `rcrd` for a block
// (the records of its heads) or `exct` for a span (for each head the tokens of K, then of V); number = layer * chunks of a layer
// + chunk.

#include <kvarn/base/config.hpp>  // first: it refuses older standards

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>

#include <kvarn/cache/file.hpp>
#include <kvarn/cache/pool.hpp>

namespace kvarn {

/// Layers [first, first + count) of a sequence, for connectors that send layers as they are computed.
struct layer_range {
    std::size_t first = 0;
    std::size_t count = SIZE_MAX;
};

/// Writes a sequence, or some layers of it, through `write`, a FileSink. The sequence does not change.
/// Errors: stale_handle, bad_argument (drafts: commit or truncate first; no such layers), or what `write` says (io_error).
template <class Write>
[[nodiscard]] status save(const cache_pool& pool, sequence_id id, Write&& write, layer_range layers = {}) noexcept;

/// The size of that file; 0 where it cannot be saved.
[[nodiscard]] std::uint64_t saved_bytes(const cache_pool& pool, sequence_id id, layer_range layers = {}) noexcept;

// --- implementation ----------------------------------------------------------------------------------------------------

namespace detail {

inline constexpr std::uint32_t identity_chunk = chunk_type("idnt"), spans_chunk = chunk_type("span"),
                               records_chunk = chunk_type("rcrd"), exact_chunk = chunk_type("exct");

/// One field of the identity, and what it is called where it differs.
struct identity_field {
    std::uint64_t value;
    const char* name;
};
inline constexpr std::size_t identity_fields = 10, format_bytes = 4, span_bytes = 16, span_head_bytes = 48;

struct cache_identity {
    identity_field fields[identity_fields];

    KVARN_INLINE explicit cache_identity(const pool_state& s) noexcept
        : fields{{s.layers, "layers"},
                 {s.heads, "KV heads"},
                 {s.group, "group"},
                 {static_cast<std::uint64_t>(s.places[0].f.head_dim_k()), "head_dim of K"},
                 {static_cast<std::uint64_t>(s.places[0].f.head_dim_v()), "head_dim of V"},
                 {static_cast<std::uint64_t>(s.places[0].f.exact_channels()), "exact channels"},
                 {static_cast<std::uint64_t>(s.config.exact), "type of exact tokens"},
                 {static_cast<std::uint64_t>(s.config.key_basis) << 1 | static_cast<std::uint64_t>(s.config.value_basis),
                  "bases of exact tokens"},
                 {s.config.sink_tokens, "sink_tokens"},
                 {s.config.recent_tokens, "recent_tokens"}}
    {}
};

/// Bits and rotations of one layer and head.
KVARN_INLINE void put_format(const format& f, std::byte (&to)[format_bytes]) noexcept
{
    put_u8(to, static_cast<std::uint8_t>(f.key_bits()));
    put_u8(to + 1, static_cast<std::uint8_t>(f.value_bits()));
    put_u8(to + 2, f.keys_rotated() ? 1 : 0);
    put_u8(to + 3, f.values_rotated() ? 1 : 0);
}

/// Why a tile stays exact: 0 it does not. Numbers of files, whatever those of `status` become.
inline constexpr std::uint16_t kept_not_finite = 1, kept_overflowed = 2;

[[nodiscard]] KVARN_INLINE constexpr std::uint16_t kept_number(status why) noexcept
{
    return why == status::ok ? std::uint16_t{0} : why == status::not_finite ? kept_not_finite : kept_overflowed;
}

/// What one chunk holds: the record block of spans [from, to), or the tokens [first, first + count) that one exact span shows.
struct block_part {
    std::size_t from = 0, to = 0;
    std::size_t first = 0, count = 0;
};

/// The chunk that begins with span `from`.
[[nodiscard]] KVARN_INLINE block_part block_at(const sequence_state& q, const cache_span* spans, const std::int32_t* table,
                                               std::size_t from) noexcept
{
    block_part b{from, from + 1, spans[from].first, spans[from].count};
    while (spans[from].sealed && b.to < q.spans && table[b.to] == table[from] && spans[b.to].sealed) ++b.to;
    return b;
}

[[nodiscard]] KVARN_INLINE std::uint64_t block_count(const sequence_state& q, const cache_span* spans,
                                                     const std::int32_t* table) noexcept
{
    std::uint64_t n = 0;
    for (std::size_t i = 0; i < q.spans; i = block_at(q, spans, table, i).to) ++n;
    return n;
}

/// Swaps the bytes of elements on machines that keep them the other way round.
KVARN_INLINE void to_little_endian([[maybe_unused]] std::byte* data, [[maybe_unused]] std::size_t bytes,
                                   [[maybe_unused]] std::size_t element) noexcept
{
#if defined(KVARN_BIG_ENDIAN)
    for (std::size_t i = 0; i < bytes; i += element)
        for (std::size_t j = 0; j < element / 2; ++j) {
            const std::byte low = data[i + j];
            data[i + j] = data[i + element - 1 - j];
            data[i + element - 1 - j] = low;
        }
#endif
}

template <class Writer>
KVARN_INLINE status append_exact(Writer& file, const std::byte* data, std::size_t bytes,
                                 [[maybe_unused]] std::size_t element) noexcept
{
#if defined(KVARN_BIG_ENDIAN)
    std::byte buffer[4096];
    for (std::size_t at = 0; at < bytes; at += sizeof buffer) {
        const std::size_t step = bytes - at < sizeof buffer ? bytes - at : sizeof buffer;
        std::memcpy(buffer, data + at, step);
        to_little_endian(buffer, step, element);
        if (const status s = file.append({buffer, step}); s != status::ok) return s;
    }
    return status::ok;
#else
    return file.append({data, bytes});
#endif
}

/// Where the exact tokens of one head of a block lie: calls body(data, bytes) for K, then for V.
template <class F>
KVARN_INLINE status for_exact(const pool_state& s, const head_place& place, std::int32_t block, const block_part& part,
                              F&& body) noexcept
{
    const status said = body(s.token_at(place.keys, s.key_row, block, part.first), part.count * s.key_row);
    if (said != status::ok || s.value_row == 0) return said;
    return body(s.token_at(place.values, s.value_row, block, part.first), part.count * s.value_row);
}

[[nodiscard]] KVARN_INLINE std::uint64_t payload_bytes(const pool_state& s, std::size_t layer, bool sealed,
                                                       const block_part& part) noexcept
{
    if (!sealed) return s.heads * part.count * (s.key_row + s.value_row);
    std::uint64_t n = 0;
    for (std::size_t h = 0; h < s.heads; ++h) n += s.place(layer, h).record_bytes;
    return n;
}

template <class Writer>
KVARN_INLINE status write_head(Writer& file, const pool_state& s, std::uint32_t slot, layer_range layers) noexcept
{
    status said = file.open_chunk(identity_chunk, 0, 8 * identity_fields + format_bytes * s.layers * s.heads);
    const cache_identity identity(s);
    for (std::size_t i = 0; i < identity_fields && said == status::ok; ++i) {
        std::byte field[8];
        put_u64(field, identity.fields[i].value);
        said = file.append(field);
    }
    for (std::size_t i = 0; i < s.layers * s.heads && said == status::ok; ++i) {
        std::byte f[format_bytes];
        put_format(s.places[i].f, f);
        said = file.append(f);
    }
    if (said == status::ok) said = file.close_chunk();
    if (said != status::ok) return said;

    const sequence_state& q = s.sequences[slot];
    const cache_span* const spans = s.spans_of(slot);
    const std::int32_t* const table = s.table_of(slot);
    std::byte head[span_head_bytes];
    put_u64(head, static_cast<std::uint64_t>(q.first_position));
    put_u64(head + 8, static_cast<std::uint64_t>(q.next_position));
    put_u64(head + 16, q.committed);
    put_u64(head + 24, q.spans);
    put_u64(head + 32, layers.first);
    put_u64(head + 40, layers.count);
    said = file.open_chunk(spans_chunk, 0, span_head_bytes + span_bytes * q.spans);
    if (said == status::ok) said = file.append(head);
    for (std::size_t i = 0; i < q.spans && said == status::ok; ++i) {
        const bool again = i != 0 && spans[i].sealed == spans[i - 1].sealed && table[i] == table[i - 1];
        std::byte b[span_bytes];
        put_u64(b, static_cast<std::uint64_t>(spans[i].position));
        put_u16(b + 8, spans[i].first);
        put_u16(b + 10, spans[i].count);
        put_u16(b + 12, static_cast<std::uint16_t>(spans[i].sealed | spans[i].sink << 1 | again << 2));
        put_u16(b + 14, spans[i].sealed ? std::uint16_t{0} : kept_number(s.blocks.kept[table[i]]));
        said = file.append(b);
    }
    return said == status::ok ? file.close_chunk() : said;
}

template <class Writer>
KVARN_INLINE status write_sequence(Writer& file, const pool_state& s, std::uint32_t slot, layer_range layers) noexcept
{
    status said = file.begin(file_kind::sequence);
    if (said == status::ok) said = write_head(file, s, slot, layers);
    const sequence_state& q = s.sequences[slot];
    const cache_span* const spans = s.spans_of(slot);
    const std::int32_t* const table = s.table_of(slot);
    std::uint64_t number = layers.first * block_count(q, spans, table);
    for (std::size_t layer = layers.first; layer < layers.first + layers.count; ++layer) {
        block_part part;
        for (std::size_t i = 0; i < q.spans && said == status::ok; i = part.to) {
            part = block_at(q, spans, table, i);
            const bool sealed = spans[i].sealed;
            said = file.open_chunk(sealed ? records_chunk : exact_chunk, number++, payload_bytes(s, layer, sealed, part));
            for (std::size_t h = 0; h < s.heads && said == status::ok; ++h) {
                const head_place& place = s.place(layer, h);
                if (sealed)
                    said = file.append({place.record(table[i]).data, place.record_bytes});
                else
                    said = for_exact(s, place, table[i], part, [&](const std::byte* data, std::size_t bytes) KVARN_LAMBDA {
                        return append_exact(file, data, bytes, element_bytes(s.config.exact));
                    });
            }
            if (said == status::ok) said = file.close_chunk();
        }
    }
    return said == status::ok ? file.finish() : said;
}

/// Clips a range of layers; false: it is none.
[[nodiscard]] KVARN_INLINE bool clip_layers(const pool_state& s, layer_range& layers) noexcept
{
    if (layers.first >= s.layers || layers.count == 0) return false;
    if (layers.count > s.layers - layers.first) layers.count = s.layers - layers.first;
    return true;
}

}  // namespace detail

template <class Write>
KVARN_INLINE status save(const cache_pool& pool, sequence_id id, Write&& write, layer_range layers) noexcept
{
    static_assert(FileSink<Write>,
                  "what save writes through must return bool, whether it wrote all, or kvarn::status (FileSink)");
    const detail::sequence_state* const q = pool.find(id);
    if (q == nullptr) return status::stale_handle;
    if (q->drafts != 0 || !detail::clip_layers(pool.state(), layers)) return status::bad_argument;
    const auto forward = [&](std::span<const std::byte> piece) KVARN_LAMBDA { return write(piece); };
    file_writer<decltype(forward)> file(forward);
    return detail::write_sequence(file, pool.state(), id.slot, layers);
}

KVARN_INLINE std::uint64_t saved_bytes(const cache_pool& pool, sequence_id id, layer_range layers) noexcept
{
    const detail::sequence_state* const q = pool.find(id);
    if (q == nullptr || q->drafts != 0 || !detail::clip_layers(pool.state(), layers)) return 0;
    counting_writer file;
    return detail::write_sequence(file, pool.state(), id.slot, layers) == status::ok ? file.bytes() : 0;
}

}  // namespace kvarn
