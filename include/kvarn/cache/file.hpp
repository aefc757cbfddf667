// SPDX-License-Identifier: Apache-2.0
#pragma once
// The files of kvarn: a little-endian, versioned stream of chunks with checksums (docs/record-format.md), written and read from
// its beginning to its end without seeking, through functions of the caller or in a buffer. In: chunks, their payloads in one
// piece or several. Out: the same, or a status: no change of a byte, and no missing byte, goes unseen. Of what is read, heads
// are verified before they are believed, payloads when their chunk ends. Never allocates; an object takes about 700 bytes; one
// thread at a time. Needs xxhash.h (file_format.hpp).

#include <kvarn/base/config.hpp>  // first: it refuses older standards

#include <concepts>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>

#include <kvarn/base/little_endian.hpp>
#include <kvarn/base/status.hpp>
#include <kvarn/cache/file_format.hpp>

namespace kvarn {

/// Where a file goes: a function `bool(std::span<const std::byte>)`, false where it could not write all of it, or `status(...)`
/// for a reason of its own. Nothing else: what converts to bool might be a count, as that of std::fwrite. It must not throw.
template <class Write>
concept FileSink = requires(Write& write, std::span<const std::byte> piece) {
    requires std::same_as<decltype(write(piece)), bool> || std::same_as<decltype(write(piece)), status>;
};

/// Where a file comes from: a function `std::size_t(std::span<std::byte>)`, the bytes it has read, at most as many as asked for
/// and 0 where the stream has ended, or `result<std::size_t>(...)` for failures. Nothing else: true would be one byte. It must
/// not throw.
template <class Read>
concept FileSource = requires(Read& read, std::span<std::byte> to) {
    requires std::same_as<decltype(read(to)), std::size_t> || std::same_as<decltype(read(to)), result<std::size_t>>;
};

/// Writes a file through `Write`, a FileSink. The order is begin, then chunks, then finish; a call out of order, or with more
/// bytes than were announced, is a bad_argument that changes nothing. After a failure to write every call returns that failure.
template <class Write>
class file_writer {
    static_assert(FileSink<Write>, "what writes a file must return bool, whether it wrote all, or kvarn::status (FileSink)");

public:
    KVARN_INLINE explicit file_writer(Write write) noexcept : write_(static_cast<Write&&>(write)) {}

    KVARN_INLINE status begin(file_kind kind) noexcept
    {
        if (const status s = expect(place::before); s != status::ok) return s;
        std::byte head[detail::head_bytes];
        total_ = detail::put_header(head, kind);
        place_ = place::between;
        return put(head, sizeof head);
    }

    /// A whole chunk. `number` is the caller's own: an index, say.
    KVARN_INLINE status chunk(std::uint32_t type, std::uint64_t number, std::span<const std::byte> payload) noexcept
    {
        status s = open_chunk(type, number, payload.size());
        if (s == status::ok) s = append(payload);
        return s == status::ok ? close_chunk() : s;
    }

    /// A chunk whose payload of `bytes` comes in pieces, by append.
    KVARN_INLINE status open_chunk(std::uint32_t type, std::uint64_t number, std::uint64_t bytes) noexcept
    {
        if (const status s = expect(place::between); s != status::ok) return s;
        if (type == end_chunk_type) return status::bad_argument;
        std::byte head[detail::head_bytes];
        head_sum_ = detail::put_head(head, type, number, bytes);
        if constexpr (!counts_only) sum_.start();
        left_ = bytes;
        place_ = place::inside;
        return put(head, sizeof head);
    }

    KVARN_INLINE status append(std::span<const std::byte> piece) noexcept
    {
        if (const status s = expect(place::inside); s != status::ok) return s;
        if (piece.size() > left_) return status::bad_argument;
        left_ -= piece.size();
        if constexpr (counts_only) return put(piece.data(), piece.size());
        else return put_payload(piece);
    }

    /// bad_argument while the payload is not complete.
    KVARN_INLINE status close_chunk() noexcept
    {
        if (const status s = expect(place::inside); s != status::ok) return s;
        if (left_ != 0) return status::bad_argument;
        std::byte sum[8]{};
        if constexpr (!counts_only) {
            const std::uint64_t payload_sum = sum_.value();
            total_ = detail::chain(total_, head_sum_, payload_sum);
            put_u64(sum, payload_sum);
        }
        ++chunks_;
        place_ = place::between;
        return put(sum, sizeof sum);
    }

    /// The end of the file, which is complete with it. What was written is the caller's to flush and close.
    KVARN_INLINE status finish() noexcept
    {
        if (const status s = expect(place::between); s != status::ok) return s;
        std::byte head[detail::head_bytes], rest[16];
        detail::put_head(head, end_chunk_type, chunks_, 8);
        put_u64(rest, total_);
        put_u64(rest + 8, detail::checksum(rest, 8));
        place_ = place::after;
        const status s = put(head, sizeof head);
        return s == status::ok ? put(rest, sizeof rest) : s;
    }

    /// Written so far.
    [[nodiscard]] KVARN_INLINE std::uint64_t bytes() const noexcept { return bytes_; }

private:
    static constexpr bool counts_only = requires { requires Write::counts_only; };
    enum class place : std::uint8_t { before, between, inside, after };

    [[nodiscard]] KVARN_INLINE status expect(place p) const noexcept
    {
        return failure_ != status::ok ? failure_ : place_ == p ? status::ok : status::bad_argument;
    }
    KVARN_INLINE status put(const std::byte* data, std::size_t bytes) noexcept
    {
        const std::span<const std::byte> piece(data, bytes);
        if constexpr (std::same_as<decltype(write_(piece)), status>) failure_ = write_(piece);
        else failure_ = write_(piece) ? status::ok : status::io_error;
        if (failure_ == status::ok) bytes_ += bytes;
        return failure_;
    }

    KVARN_INLINE status put_payload(std::span<const std::byte> piece) noexcept
    {
        for (std::size_t at = 0; at < piece.size();) {
            const std::size_t rest = piece.size() - at, step = rest < detail::cached_bytes ? rest : detail::cached_bytes;
            sum_.add(piece.data() + at, step);
            if (const status s = put(piece.data() + at, step); s != status::ok) return s;
            at += step;
        }
        return status::ok;
    }

    detail::running_checksum sum_;
    std::uint64_t total_ = 0, head_sum_ = 0, left_ = 0, chunks_ = 0, bytes_ = 0;
    status failure_ = status::ok;
    place place_ = place::before;
    Write write_;
};

/// Reads a file through `Read`, a FileSource. The order is begin, then next for each chunk, with read and end_chunk, or skip, or
/// payload, until next gives the end. A call out of order is a bad_argument that changes nothing. Errors that come from the file
/// (truncated, corrupt, unsupported_version) or from `Read` (io_error) stay: every later call returns them.
template <class Read>
class file_reader {
    static_assert(FileSource<Read>,
                  "what reads a file must return std::size_t or kvarn::result<std::size_t>: bytes read (FileSource)");

public:
    KVARN_INLINE explicit file_reader(Read read) noexcept : read_(static_cast<Read&&>(read)) {}

    KVARN_INLINE result<file_kind> begin() noexcept
    {
        if (const status s = expect(place::before); s != status::ok) return s;
        std::byte head[detail::head_bytes], same[detail::head_bytes];
        if (const status s = get(head, sizeof head); s != status::ok) return s;
        if (std::memcmp(head, detail::file_magic, sizeof detail::file_magic) != 0) return fail(status::corrupt);
        total_ = detail::checksum(head, sizeof head - 8);
        if (get_u64(head + sizeof head - 8) != total_) return fail(status::corrupt);
        if (get_u32(head + 8) != file_version) return fail(status::unsupported_version);
        const auto kind = static_cast<file_kind>(get_u32(head + 12));
        detail::put_header(same, kind);
        if ((kind != file_kind::records && kind != file_kind::sequence) || std::memcmp(head, same, sizeof head) != 0)
            return fail(status::corrupt);
        place_ = place::between;
        return kind;
    }

    /// A file of another kind is corrupt.
    KVARN_INLINE status begin(file_kind expected) noexcept
    {
        const result<file_kind> kind = begin();
        return !kind ? kind.error : *kind == expected ? status::ok : fail(status::corrupt);
    }

    /// The next chunk, or with is_end() the end, by which everything before it has been verified. The payload of the chunk
    /// before must have been read or skipped.
    KVARN_INLINE result<chunk_head> next() noexcept
    {
        if (const status s = expect(place::between); s != status::ok) return s;
        std::byte head[detail::head_bytes];
        if (const status s = get(head, sizeof head); s != status::ok) return s;
        head_sum_ = detail::checksum(head, sizeof head - 8);
        if (get_u64(head + sizeof head - 8) != head_sum_ || get_u32(head + 4) != 0) return fail(status::corrupt);
        const chunk_head chunk{get_u32(head), get_u64(head + 8), get_u64(head + 16)};
        if (chunk.is_end()) {
            if (chunk.number != chunks_ || chunk.bytes != 8) return fail(status::corrupt);
            std::byte rest[16];
            if (const status s = get(rest, sizeof rest); s != status::ok) return s;
            if (get_u64(rest) != total_ || get_u64(rest + 8) != detail::checksum(rest, 8)) return fail(status::corrupt);
            place_ = place::after;
            return chunk;
        }
        if constexpr (knows_its_end)
            if (chunk.bytes > read_.left()) return fail(status::truncated);
        sum_.start();
        left_ = chunk.bytes;
        place_ = place::inside;
        return chunk;
    }

    /// Of the payload of the chunk that next gave, not yet read.
    [[nodiscard]] KVARN_INLINE std::uint64_t left() const noexcept { return left_; }

    /// The next bytes of the payload, not verified before end_chunk says so. bad_argument for more than there are left.
    KVARN_INLINE status read(std::span<std::byte> to) noexcept
    {
        if (const status s = expect(place::inside); s != status::ok) return s;
        if (to.size() > left_) return status::bad_argument;
        for (std::size_t at = 0; at < to.size();) {
            const std::size_t rest = to.size() - at, step = rest < detail::cached_bytes ? rest : detail::cached_bytes;
            if (const status s = get(to.data() + at, step); s != status::ok) return s;
            sum_.add(to.data() + at, step);
            at += step;
        }
        left_ -= to.size();
        return status::ok;
    }

    /// Verifies the payload; bad_argument while some of it is left.
    KVARN_INLINE status end_chunk() noexcept
    {
        if (const status s = expect(place::inside); s != status::ok) return s;
        if (left_ != 0) return status::bad_argument;
        return end_payload(sum_.value());
    }

    /// Reads and verifies what is left of the payload without keeping it.
    KVARN_INLINE status skip() noexcept
    {
        if (const status s = expect(place::inside); s != status::ok) return s;
        std::byte buffer[4096];
        while (left_ != 0) {
            const std::size_t step = left_ < sizeof buffer ? detail::as_size(left_) : sizeof buffer;
            if (const status s = read(std::span<std::byte>(buffer, step)); s != status::ok) return s;
        }
        return end_chunk();
    }

    /// What is left of the payload where it lies in the buffer, verified; the chunk has ended.
    KVARN_INLINE result<std::span<const std::byte>> payload() noexcept
        requires requires(Read& r) { r.take(std::size_t{}); }
    {
        if (const status s = expect(place::inside); s != status::ok) return s;
        const std::span<const std::byte> all = read_.take(detail::as_size(left_));  // next has seen that it is there
        if (!all.empty()) sum_.add(all.data(), all.size());
        left_ = 0;
        const status s = end_payload(sum_.value());
        if (s != status::ok) return s;
        return all;
    }

    /// After the end of the file: corrupt where another byte follows (which has then been read).
    KVARN_INLINE status at_end() noexcept
    {
        if (const status s = expect(place::after); s != status::ok) return s;
        std::byte more[1];
        switch (const status s = get(more, sizeof more)) {
        case status::truncated: return failure_ = status::ok;
        case status::ok: return fail(status::corrupt);
        default: return s;
        }
    }

private:
    static constexpr bool knows_its_end = requires(const Read& r) { r.left(); };
    enum class place : std::uint8_t { before, between, inside, after };

    [[nodiscard]] KVARN_INLINE status expect(place p) const noexcept
    {
        return failure_ != status::ok ? failure_ : place_ == p ? status::ok : status::bad_argument;
    }
    KVARN_INLINE status fail(status s) noexcept { return failure_ = s; }
    KVARN_INLINE status get(std::byte* to, std::size_t bytes) noexcept
    {
        while (bytes != 0) {
            const result<std::size_t> got = read_(std::span<std::byte>(to, bytes));
            if (!got) return fail(got.error);
            if (*got == 0) return fail(status::truncated);
            if (*got > bytes) return fail(status::io_error);
            to += *got;
            bytes -= *got;
        }
        return status::ok;
    }
    KVARN_INLINE status end_payload(std::uint64_t sum) noexcept
    {
        std::byte stored[8];
        if (const status s = get(stored, sizeof stored); s != status::ok) return s;
        if (get_u64(stored) != sum) return fail(status::corrupt);
        total_ = detail::chain(total_, head_sum_, sum);
        ++chunks_;
        place_ = place::between;
        return status::ok;
    }

    detail::running_checksum sum_;
    std::uint64_t total_ = 0, head_sum_ = 0, left_ = 0, chunks_ = 0;
    status failure_ = status::ok;
    place place_ = place::before;
    Read read_;
};

/// `Write` and `Read` of buffers.
class buffer_sink {
public:
    KVARN_INLINE buffer_sink(std::span<std::byte> buffer) noexcept : at_(buffer.data()), left_(buffer.size()) {}
    KVARN_INLINE status operator()(std::span<const std::byte> piece) noexcept
    {
        if (piece.size() > left_) return status::buffer_too_small;
        if (!piece.empty()) std::memcpy(at_, piece.data(), piece.size());
        at_ += piece.size();
        left_ -= piece.size();
        return status::ok;
    }

private:
    std::byte* at_;
    std::size_t left_;
};

/// Reads a file from a buffer.
class buffer_source {
public:
    KVARN_INLINE buffer_source(std::span<const std::byte> buffer) noexcept : at_(buffer.data()), left_(buffer.size()) {}
    KVARN_INLINE std::size_t operator()(std::span<std::byte> to) noexcept
    {
        const std::span<const std::byte> piece = take(to.size() < left_ ? to.size() : left_);
        if (!piece.empty()) std::memcpy(to.data(), piece.data(), piece.size());
        return piece.size();
    }
    [[nodiscard]] KVARN_INLINE std::size_t left() const noexcept { return left_; }
    /// At most left().
    KVARN_INLINE std::span<const std::byte> take(std::size_t bytes) noexcept
    {
        const std::byte* from = at_;
        at_ += bytes;
        left_ -= bytes;
        return {from, bytes};
    }

private:
    const std::byte* at_;
    std::size_t left_;
};

/// Looks at no payload: only their sizes count, and the pointers may be null.
struct counting_sink {
    static constexpr bool counts_only = true;
    KVARN_INLINE bool operator()(std::span<const std::byte>) const noexcept { return true; }
};

/// A file in a buffer, buffer_too_small where it does not fit; bytes() is its size.
using buffer_writer = file_writer<buffer_sink>;
/// A file that lies in a buffer. A chunk that would go beyond it is truncated at next: its size can be believed.
using buffer_reader = file_reader<buffer_source>;
/// What a file would take: the same calls, then bytes().
class counting_writer : public file_writer<counting_sink> {
public:
    KVARN_INLINE counting_writer() noexcept : file_writer<counting_sink>(counting_sink{}) {}
};

}  // namespace kvarn
