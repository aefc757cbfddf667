// SPDX-License-Identifier: Apache-2.0
#pragma once
// A sequence of a cache from a file that save() wrote, whole or by layers. In: the caller's function that reads. Out: a
// sequence, when every byte of it has been verified; until then nothing of it can be seen. No allocation, and no length is
// believed that was not compared. The checksums find damage, not malice: a file made on purpose can hold any values. A prompt
// cache: load once, then fork.

#include <kvarn/base/config.hpp>  // first: it refuses older standards

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>

#include <kvarn/cache/save.hpp>

namespace kvarn {

/// Makes a sequence from a file, which `read`, a FileSource, reads. It exists when all of the file has been read and verified, and
/// otherwise nothing of it is left. All of its blocks are its own, whatever the one that was saved shared with others.
/// `differs`, if given, is set to the field of the identity that does not fit, static storage, or null. `whole`: nothing may
/// follow the file. Errors: other_configuration, no_room, sequence_full (more tokens or spans than the pool allows), corrupt,
/// truncated, unsupported_version, or what `read` says (io_error).
template <class Read>
[[nodiscard]] result<sequence_id> load(const cache_pool& pool, Read&& read, const char** differs = nullptr,
                                       bool whole = true) noexcept;

/// Loads a sequence from several files, each with the layers behind those of the one before. What is not finished is given back
/// at its end.
class sequence_loader {
public:
    KVARN_INLINE explicit sequence_loader(const cache_pool& pool) noexcept : pool_(pool) {}
    sequence_loader(const sequence_loader&) = delete;
    sequence_loader& operator=(const sequence_loader&) = delete;
    KVARN_INLINE ~sequence_loader() { drop(); }

    /// The next file, from a FileSource. After an error all is given back, and the loader is as new. Errors as for load;
    /// bad_argument: other layers were to come, or another sequence.
    template <class Read>
    [[nodiscard]] status part(Read&& read, bool whole = true) noexcept;

    /// Layers that are there.
    [[nodiscard]] KVARN_INLINE std::size_t layers() const noexcept { return layers_; }
    /// The field of the identity that did not fit the last file, or null.
    [[nodiscard]] KVARN_INLINE const char* differs() const noexcept { return differs_; }

    /// The sequence, when all layers are there; otherwise bad_argument, and nothing changes.
    [[nodiscard]] KVARN_INLINE result<sequence_id> finish() noexcept
    {
        if (id_.generation == 0 || layers_ != pool_.layers()) return status::bad_argument;
        const sequence_id done = id_;
        id_ = {};
        layers_ = 0;
        return done;
    }

private:
    template <class Reader>
    status read_part(Reader& file, bool whole) noexcept;
    template <class Reader>
    status read_identity(Reader& file) noexcept;
    template <class Reader>
    status read_spans(Reader& file, layer_range& layers) noexcept;
    KVARN_INLINE void drop() noexcept
    {
        if (id_.generation != 0) static_cast<void>(pool_.close(id_));
        id_ = {};
        layers_ = 0;
    }

    cache_pool pool_;
    sequence_id id_{};
    std::size_t layers_ = 0;
    const char* differs_ = nullptr;
};

// --- implementation ----------------------------------------------------------------------------------------------------

template <class Reader>
KVARN_INLINE status sequence_loader::read_identity(Reader& file) noexcept
{
    const detail::pool_state& s = pool_.state();
    const auto head = file.next();
    if (!head) return head.error;
    if (head->type != detail::identity_chunk || head->number != 0 || head->bytes < 8 * detail::identity_fields)
        return status::corrupt;
    const detail::cache_identity identity(s);
    for (const detail::identity_field& field : identity.fields) {
        std::byte value[8];
        if (const status said = file.read(value); said != status::ok) return said;
        if (get_u64(value) != field.value && differs_ == nullptr) differs_ = field.name;
    }
    if (differs_ == nullptr) {
        if (file.left() != detail::format_bytes * s.layers * s.heads) return status::corrupt;
        for (std::size_t i = 0; i < s.layers * s.heads; ++i) {
            std::byte theirs[detail::format_bytes], mine[detail::format_bytes];
            if (const status said = file.read(theirs); said != status::ok) return said;
            detail::put_format(s.places[i].f, mine);
            if (differs_ != nullptr || std::memcmp(theirs, mine, sizeof mine) == 0) continue;
            differs_ = theirs[0] != mine[0] ? "bits of K" : theirs[1] != mine[1] ? "bits of V" : "rotations";
        }
    }
    const status said = file.skip();  // verifies what was read
    if (said != status::ok) return said;
    return differs_ != nullptr ? status::other_configuration : status::ok;
}

template <class Reader>
KVARN_INLINE status sequence_loader::read_spans(Reader& file, layer_range& layers) noexcept
{
    detail::pool_state& s = pool_.state();
    const auto chunk = file.next();
    if (!chunk) return chunk.error;
    if (chunk->type != detail::spans_chunk || chunk->number != 0 || chunk->bytes < detail::span_head_bytes)
        return status::corrupt;
    std::byte head[detail::span_head_bytes];
    if (const status said = file.read(head); said != status::ok) return said;
    const std::uint64_t first_position = get_u64(head), next_position = get_u64(head + 8), committed = get_u64(head + 16),
                        count = get_u64(head + 24);
    const std::uint64_t first_layer = get_u64(head + 32), layer_count = get_u64(head + 40);
    constexpr auto largest = static_cast<std::uint64_t>(detail::largest_position), most = largest * 2;
    if (first_position > largest || next_position > most || next_position < first_position) return status::corrupt;
    if (file.left() % detail::span_bytes != 0 || count != file.left() / detail::span_bytes) return status::corrupt;
    if (first_layer > s.layers || layer_count == 0 || layer_count > s.layers - first_layer) return status::corrupt;
    layers = {detail::as_size(first_layer), detail::as_size(layer_count)};
    const bool again = id_.generation != 0;
    if (layers.first != layers_) return status::bad_argument;
    if (count > s.config.most_spans || committed > s.config.most_tokens) return status::sequence_full;
    if (!again) {
        const auto opened = pool_.open(0);
        if (!opened) return opened.error;
        id_ = *opened;
    }
    detail::sequence_state& q = s.sequences[id_.slot];
    detail::cache_span* const spans = s.spans_of(id_.slot);
    std::int32_t* const table = s.table_of(id_.slot);
    if (again && (q.committed != committed || q.spans != count || q.first_position != static_cast<std::int64_t>(first_position) ||
                  q.next_position != static_cast<std::int64_t>(next_position)))
        return status::bad_argument;

    std::uint64_t tokens = 0;
    for (std::size_t i = 0; i < count; ++i) {
        std::byte b[detail::span_bytes];
        if (const status said = file.read(b); said != status::ok) return said;
        const std::uint64_t position = get_u64(b);
        const std::uint16_t flags = get_u16(b + 12), kept = get_u16(b + 14);
        const detail::cache_span before = i != 0 ? spans[i - 1] : detail::cache_span{};
        const std::uint64_t earliest = i != 0 ? static_cast<std::uint64_t>(before.end()) : first_position;
        const detail::cache_span span{static_cast<std::int64_t>(position), get_u16(b + 8), get_u16(b + 10), (flags & 1) != 0,
                                      (flags & 2) != 0};
        const bool same_block = (flags & 4) != 0;
        if (flags > 7 || position < earliest || position > most || span.count == 0 || span.count > s.group ||
            span.first > s.group - span.count || span.end() > static_cast<std::int64_t>(next_position) ||
            (span.sealed && (span.sink || kept != 0)) || kept > detail::kept_overflowed)
            return status::corrupt;
        if (same_block && (i == 0 || span.sealed != before.sealed || span.first < before.first + before.count))
            return status::corrupt;
        tokens += span.count;
        if (again) {
            const bool known_same = i != 0 && table[i] == table[i - 1] && spans[i].sealed == before.sealed;
            if (std::memcmp(&spans[i].position, &span.position, sizeof span.position) != 0 || spans[i].first != span.first ||
                spans[i].count != span.count || spans[i].sealed != span.sealed || spans[i].sink != span.sink ||
                known_same != same_block || (!span.sealed && detail::kept_number(s.blocks.kept[table[i]]) != kept))
                return status::bad_argument;
            continue;
        }
        const detail::pool_lock lock(s.lock);
        if (same_block) {
            if (!span.sealed && detail::kept_number(s.blocks.kept[table[i - 1]]) != kept) return status::corrupt;
            table[i] = table[i - 1];
            detail::hold_block(s, span, table[i]);
        } else {
            if ((span.sealed ? s.blocks.records : s.blocks.exact).free == 0) return status::no_room;
            table[i] = span.sealed ? s.blocks.records.take() : s.blocks.take_exact();
            if (kept != 0)
                s.blocks.kept[table[i]] = kept == detail::kept_not_finite ? status::not_finite : status::scale_overflow;
        }
        spans[i] = span;
        ++q.spans;
        q.committed += span.count;  // so that close() gives back what is there
    }
    if (tokens != committed) return status::corrupt;
    q.first_position = static_cast<std::int64_t>(first_position);
    q.next_position = static_cast<std::int64_t>(next_position);
    return file.end_chunk();
}

template <class Reader>
KVARN_INLINE status sequence_loader::read_part(Reader& file, bool whole) noexcept
{
    differs_ = nullptr;
    if (const status said = file.begin(file_kind::sequence); said != status::ok) return said;
    if (const status said = read_identity(file); said != status::ok) return said;
    layer_range layers;
    if (const status said = read_spans(file, layers); said != status::ok) return said;
    detail::pool_state& s = pool_.state();
    const detail::sequence_state& q = s.sequences[id_.slot];
    const detail::cache_span* const spans = s.spans_of(id_.slot);
    const std::int32_t* const table = s.table_of(id_.slot);
    std::uint64_t number = layers.first * detail::block_count(q, spans, table);
    for (std::size_t layer = layers.first; layer < layers.first + layers.count; ++layer) {
        detail::block_part part;
        for (std::size_t i = 0; i < q.spans; i = part.to) {
            part = detail::block_at(q, spans, table, i);
            const bool sealed = spans[i].sealed;
            const auto chunk = file.next();
            if (!chunk) return chunk.error;
            if (chunk->type != (sealed ? detail::records_chunk : detail::exact_chunk) || chunk->number != number++ ||
                chunk->bytes != detail::payload_bytes(s, layer, sealed, part))
                return status::corrupt;
            for (std::size_t h = 0; h < s.heads; ++h) {
                const detail::head_place& place = s.place(layer, h);
                const auto get = [&](std::byte* data, std::size_t bytes) KVARN_LAMBDA {
                    const status said = file.read({data, bytes});
                    if (said == status::ok && !sealed) detail::to_little_endian(data, bytes, element_bytes(s.config.exact));
                    return said;
                };
                const status said = sealed ? get(place.record(table[i]).data, place.record_bytes)
                                           : detail::for_exact(s, place, table[i], part, get);
                if (said != status::ok) return said;
            }
            if (const status said = file.end_chunk(); said != status::ok) return said;
        }
    }
    const auto end = file.next();
    if (!end) return end.error;
    if (!end->is_end()) return status::corrupt;
    if (const status said = whole ? file.at_end() : status::ok; said != status::ok) return said;
    layers_ += layers.count;
    return status::ok;
}

template <class Read>
KVARN_INLINE status sequence_loader::part(Read&& read, bool whole) noexcept
{
    static_assert(FileSource<Read>,
                  "what loads a sequence must return std::size_t or kvarn::result<std::size_t>: bytes read (FileSource)");
    const auto forward = [&](std::span<std::byte> to) KVARN_LAMBDA { return read(to); };
    file_reader<decltype(forward)> file(forward);
    const status said = read_part(file, whole);
    if (said != status::ok) drop();
    if (said != status::other_configuration) differs_ = nullptr;  // what was read before an error is not to be believed
    return said;
}

template <class Read>
KVARN_INLINE result<sequence_id> load(const cache_pool& pool, Read&& read, const char** differs, bool whole) noexcept
{
    sequence_loader loader(pool);
    const status said = loader.part(read, whole);
    if (differs != nullptr) *differs = loader.differs();
    if (said != status::ok) return said;
    return loader.finish();
}

}  // namespace kvarn
