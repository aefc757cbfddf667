// SPDX-License-Identifier: Apache-2.0
#pragma once
// The C interface, seventh part: sequences to files and back. Compiled once, by c/implementation.hpp. In and out: as
// kvarn.h says. Needs xxhash.h; with KVARN_C_NO_FILES every call is an unsupported_version. No allocation.

#include <kvarn/base/config.hpp>  // first: it refuses older standards

#include <cstddef>
#include <cstdint>
#include <new>
#include <span>

#include <kvarn/c/handles.hpp>
#include <kvarn/c/pool.hpp>
#include <kvarn/c/sequences.hpp>
#include <kvarn/c/structs.hpp>
#if !defined(KVARN_C_NO_FILES)
#include <kvarn/cache/load.hpp>
#include <kvarn/cache/save.hpp>

/// A loader in the caller's memory.
struct kvarn_loader {
    static constexpr kvarn::c::handle_kind its_kind = kvarn::c::handle_kind::loader;
    kvarn::c::handle_kind kind = its_kind;
    kvarn::sequence_loader loader;

    KVARN_INLINE explicit kvarn_loader(const kvarn::cache_pool& pool) noexcept : loader(pool) {}
};

namespace kvarn::c {

struct writer {
    kvarn_write write;
    void* user;

    KVARN_INLINE status operator()(std::span<const std::byte> piece) const noexcept
    {
        const auto said = static_cast<unsigned>(write(user, piece.data(), piece.size()));
        return said <= last_status ? static_cast<status>(said) : status::io_error;
    }
};

struct reader {
    kvarn_read_some read;
    void* user;

    /// What says more than was asked for is an io_error, and so is KVARN_READ_FAILED.
    KVARN_INLINE std::size_t operator()(std::span<std::byte> to) const noexcept { return read(user, to.data(), to.size()); }
};

template <class Read>
[[nodiscard]] KVARN_INLINE status load_through(const cache_pool& pool, Read&& read, bool whole, kvarn_sequence* sequence,
                                               const char** differs) noexcept
{
    if (differs != nullptr) *differs = nullptr;
    if (sequence == nullptr) return status::null_pointer;
    const auto made = kvarn::load(pool, read, differs, whole);
    if (made) *sequence = {made->slot, made->generation};
    return made.error;
}

}  // namespace kvarn::c

extern "C" {

std::int32_t kvarn_has_files(void) noexcept
{
    return 1;
}

kvarn_status kvarn_save(const kvarn_pool* pool, kvarn_sequence sequence, size_t first_layer, size_t layer_count,
                        kvarn_write write, void* user) noexcept
{
    using namespace kvarn::c;
    return with_pool(pool, [&](const kvarn::cache_pool& p) {
        if (write == nullptr) return kvarn::status::null_pointer;
        return kvarn::save(p, id_of(sequence), writer{write, user}, {first_layer, layer_count});
    });
}

std::uint64_t kvarn_saved_bytes(const kvarn_pool* pool, kvarn_sequence sequence, size_t first_layer, size_t layer_count) noexcept
{
    return kvarn::c::number_of_pool(pool, std::uint64_t{0}, [&](const kvarn::cache_pool& p) {
        return kvarn::saved_bytes(p, kvarn::c::id_of(sequence), {first_layer, layer_count});
    });
}

kvarn_status kvarn_save_to(const kvarn_pool* pool, kvarn_sequence sequence, size_t first_layer, size_t layer_count, void* buffer,
                           size_t bytes) noexcept
{
    using namespace kvarn::c;
    return with_pool(pool, [&](const kvarn::cache_pool& p) {
        if (buffer == nullptr) return kvarn::status::null_pointer;
        return kvarn::save(p, id_of(sequence), kvarn::buffer_sink(bytes_at(buffer, bytes)), {first_layer, layer_count});
    });
}

kvarn_status kvarn_load(kvarn_pool* pool, kvarn_read_some read, void* user, std::int32_t whole, kvarn_sequence* sequence,
                        const char** differs) noexcept
{
    using namespace kvarn::c;
    return with_pool(pool, [&](const kvarn::cache_pool& p) {
        if (read == nullptr) return kvarn::status::null_pointer;
        return load_through(p, reader{read, user}, whole != 0, sequence, differs);
    });
}

kvarn_status kvarn_load_from(kvarn_pool* pool, const void* buffer, size_t bytes, kvarn_sequence* sequence,
                             const char** differs) noexcept
{
    using namespace kvarn::c;
    return with_pool(pool, [&](const kvarn::cache_pool& p) {
        if (buffer == nullptr) return kvarn::status::null_pointer;
        return load_through(p, kvarn::buffer_source({static_cast<const std::byte*>(buffer), bytes}), true, sequence, differs);
    });
}

size_t kvarn_loader_bytes(void) noexcept
{
    return sizeof(kvarn_loader) + 63;
}

kvarn_status kvarn_loader_make(kvarn_pool* pool, void* memory, size_t bytes, kvarn_loader** loader) noexcept
{
    using namespace kvarn::c;
    return with_pool(pool, [&](const kvarn::cache_pool& p) {
        if (memory == nullptr || loader == nullptr) return kvarn::status::null_pointer;
        if (bytes < kvarn_loader_bytes()) return kvarn::status::buffer_too_small;
        *loader = ::new (static_cast<void*>(aligned(memory))) kvarn_loader(p);
        return kvarn::status::ok;
    });
}

kvarn_status kvarn_loader_part(kvarn_loader* loader, kvarn_read_some read, void* user, std::int32_t whole,
                               const char** differs) noexcept
{
    using namespace kvarn::c;
    if (differs != nullptr) *differs = nullptr;
    if (const kvarn::status s = check_handle(loader); s != kvarn::status::ok) return code(s);
    if (read == nullptr) return KVARN_NULL_POINTER;
    const kvarn::status said = loader->loader.part(reader{read, user}, whole != 0);
    if (differs != nullptr) *differs = loader->loader.differs();
    return code(said);
}

size_t kvarn_loader_layers(const kvarn_loader* loader) noexcept
{
    return kvarn::c::check_handle(loader) == kvarn::status::ok ? loader->loader.layers() : 0;
}

kvarn_status kvarn_loader_finish(kvarn_loader* loader, kvarn_sequence* sequence) noexcept
{
    using namespace kvarn::c;
    if (const kvarn::status s = check_handle(loader); s != kvarn::status::ok) return code(s);
    if (sequence == nullptr) return KVARN_NULL_POINTER;
    const auto made = loader->loader.finish();
    if (made) *sequence = {made->slot, made->generation};
    return code(made.error);
}

void kvarn_loader_end(kvarn_loader* loader) noexcept
{
    if (kvarn::c::check_handle(loader) != kvarn::status::ok) return;
    loader->kind = {};
    loader->~kvarn_loader();
}

}  // extern "C"

#else  // without files

extern "C" {

std::int32_t kvarn_has_files(void) noexcept
{
    return 0;
}

kvarn_status kvarn_save(const kvarn_pool*, kvarn_sequence, size_t, size_t, kvarn_write, void*) noexcept
{
    return KVARN_UNSUPPORTED_VERSION;
}
std::uint64_t kvarn_saved_bytes(const kvarn_pool*, kvarn_sequence, size_t, size_t) noexcept
{
    return 0;
}
kvarn_status kvarn_save_to(const kvarn_pool*, kvarn_sequence, size_t, size_t, void*, size_t) noexcept
{
    return KVARN_UNSUPPORTED_VERSION;
}
kvarn_status kvarn_load(kvarn_pool*, kvarn_read_some, void*, std::int32_t, kvarn_sequence*, const char**) noexcept
{
    return KVARN_UNSUPPORTED_VERSION;
}
kvarn_status kvarn_load_from(kvarn_pool*, const void*, size_t, kvarn_sequence*, const char**) noexcept
{
    return KVARN_UNSUPPORTED_VERSION;
}
size_t kvarn_loader_bytes(void) noexcept
{
    return 0;
}
kvarn_status kvarn_loader_make(kvarn_pool*, void*, size_t, kvarn_loader**) noexcept
{
    return KVARN_UNSUPPORTED_VERSION;
}
kvarn_status kvarn_loader_part(kvarn_loader*, kvarn_read_some, void*, std::int32_t, const char**) noexcept
{
    return KVARN_UNSUPPORTED_VERSION;
}
size_t kvarn_loader_layers(const kvarn_loader*) noexcept
{
    return 0;
}
kvarn_status kvarn_loader_finish(kvarn_loader*, kvarn_sequence*) noexcept
{
    return KVARN_UNSUPPORTED_VERSION;
}
void kvarn_loader_end(kvarn_loader*) noexcept {}

}  // extern "C"
#endif
