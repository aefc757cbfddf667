// SPDX-License-Identifier: Apache-2.0
#pragma once
// What kvarn's files are made of: kinds, the heads of files and chunks, checksums (docs/record-format.md has them byte by byte).
// The only header that includes xxhash.h, which is needed as headers only (the CMake target kvarn::cache_files; Debian
// libxxhash-dev, vcpkg xxhash). Never allocates.

#include <kvarn/base/config.hpp>  // first: it refuses older standards

#include <cstddef>
#include <cstdint>
#include <cstring>

#if !__has_include(<xxhash.h>)
#error "kvarn: <kvarn/cache/file.hpp> needs xxhash.h, 0.8 or newer (Debian and Ubuntu libxxhash-dev, vcpkg xxhash): link kvarn::cache_files"
#endif
#if !defined(XXH_INLINE_ALL)
#define XXH_INLINE_ALL  // static functions, compiled with this file's own flags
#endif
#if defined(__AVX512F__) && defined(__AVX2__) && !defined(XXH_VECTOR)
#define XXH_VECTOR XXH_AVX2  // as fast, and GCC 12 warns about its AVX-512 intrinsics (bug 105593)
#endif
#include <xxhash.h>
#if XXH_VERSION_NUMBER < 800
#error "kvarn: xxhash.h 0.8 or newer is needed: XXH3 was not final before"
#endif

#include <kvarn/base/little_endian.hpp>
#include <kvarn/base/status.hpp>

namespace kvarn {

/// What a file holds.
enum class file_kind : std::uint32_t {
    records = 1,   ///< records and exact tokens of K and V, as `kvarn quantize` writes them
    sequence = 2,  ///< a saved sequence of a cache
};

/// The four letters that name a type of chunk, as their number.
[[nodiscard]] KVARN_INLINE constexpr std::uint32_t chunk_type(const char (&letters)[5]) noexcept
{
    std::uint32_t type = 0;
    for (int i = 0; i < 4; ++i) type |= static_cast<std::uint32_t>(static_cast<unsigned char>(letters[i])) << (8 * i);
    return type;
}

inline constexpr std::uint32_t end_chunk_type = chunk_type("done");  ///< the last chunk of every file; not for others

/// What a chunk says of itself before its payload.
struct chunk_head {
    std::uint32_t type = 0;
    std::uint64_t number = 0;
    std::uint64_t bytes = 0;  ///< of the payload. What somebody wrote: compare it with what it must be before allocating by it

    [[nodiscard]] KVARN_INLINE constexpr bool is_end() const noexcept { return type == end_chunk_type; }
};

inline constexpr std::uint32_t file_version = 2;  ///< 1 was a container without chunks

inline constexpr std::size_t file_header_bytes = 32;     ///< what a file takes besides its chunks
inline constexpr std::size_t chunk_overhead_bytes = 40;  ///< what a chunk takes besides its payload
inline constexpr std::size_t file_end_bytes = 48;        ///< what the last chunk takes

namespace detail {

inline constexpr unsigned char file_magic[8] = {0x89, 'K', 'V', 'A', 'R', 'N', '\r', '\n'};
inline constexpr std::size_t head_bytes = 32;                     ///< of the file's header and of a chunk's head, with their checksum
inline constexpr std::size_t cached_bytes = std::size_t{1} << 17;  ///< so much at a time is read or written and hashed

/// A number of bytes that is known to fit. A plain cast would be one too many for -Wuseless-cast where both types are the same.
[[nodiscard]] KVARN_INLINE constexpr std::size_t as_size(std::uint64_t n) noexcept
{
    return std::size_t{static_cast<std::uint32_t>(n >> 32)} << 16 << 16 | static_cast<std::uint32_t>(n);
}

[[nodiscard]] KVARN_INLINE std::uint64_t checksum(const std::byte* data, std::size_t bytes) noexcept { return XXH3_64bits(data, bytes); }

/// Closes a head: its checksum behind its 24 bytes.
KVARN_INLINE std::uint64_t sign_head(std::byte (&head)[head_bytes]) noexcept
{
    const std::uint64_t sum = checksum(head, head_bytes - 8);
    put_u64(head + head_bytes - 8, sum);
    return sum;
}

KVARN_INLINE std::uint64_t put_header(std::byte (&head)[head_bytes], file_kind kind) noexcept
{
    std::memcpy(head, file_magic, sizeof file_magic);
    put_u32(head + 8, file_version);
    put_u32(head + 12, static_cast<std::uint32_t>(kind));
    put_u64(head + 16, 0);
    return sign_head(head);
}

KVARN_INLINE std::uint64_t put_head(std::byte (&head)[head_bytes], std::uint32_t type, std::uint64_t number, std::uint64_t bytes) noexcept
{
    put_u32(head, type);
    put_u32(head + 4, 0);
    put_u64(head + 8, number);
    put_u64(head + 16, bytes);
    return sign_head(head);
}

/// The checksum over everything: each chunk's two checksums are chained to what was before.
KVARN_INLINE std::uint64_t chain(std::uint64_t total, std::uint64_t head, std::uint64_t payload) noexcept
{
    std::byte link[24];
    put_u64(link, total);
    put_u64(link + 8, head);
    put_u64(link + 16, payload);
    return checksum(link, sizeof link);
}

/// XXH3-64 of bytes that come in pieces.
class running_checksum {
public:
    KVARN_INLINE void start() noexcept { XXH3_64bits_reset(&state_); }
    KVARN_INLINE void add(const std::byte* data, std::size_t bytes) noexcept { XXH3_64bits_update(&state_, data, bytes); }
    [[nodiscard]] KVARN_INLINE std::uint64_t value() const noexcept { return XXH3_64bits_digest(&state_); }

private:
    XXH3_state_t state_;
};

}  // namespace detail

}  // namespace kvarn
