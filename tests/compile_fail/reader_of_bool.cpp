// SPDX-License-Identifier: Apache-2.0
// flags: -DKVARN_OF_LOAD -DKVARN_OF_LOADER -DKVARN_OF_FILE_READER
// expect: static.assert.*must return std::size_t or kvarn::result<std::size_t>
#include <kvarn/cache/load.hpp>

// A bool says whether a read succeeded, but was taken for one byte: every file looked damaged.
#if defined(KVARN_MUST_FAIL)
using bytes_read = bool;
#else
using bytes_read = std::size_t;
#endif

struct source {
    bytes_read operator()(std::span<std::byte> to) { return bytes_read(to.size()); }
};

#if defined(KVARN_OF_LOAD) || !defined(KVARN_MUST_FAIL)
kvarn::result<kvarn::sequence_id> whole(const kvarn::cache_pool& pool) { return kvarn::load(pool, source{}); }
#endif
#if defined(KVARN_OF_LOADER) || !defined(KVARN_MUST_FAIL)
kvarn::status part(kvarn::sequence_loader& loader, source& from) { return loader.part(from); }
#endif
#if defined(KVARN_OF_FILE_READER) || !defined(KVARN_MUST_FAIL)
kvarn::status chunks(source from) { return kvarn::file_reader<source>(from).begin(kvarn::file_kind::records); }
#endif
