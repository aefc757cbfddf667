// SPDX-License-Identifier: Apache-2.0
// flags: -DKVARN_OF_SAVE -DKVARN_OF_FILE_WRITER
// expect: static.assert.*must return bool, whether it wrote all, or kvarn::status
#include <kvarn/cache/save.hpp>

// A count of bytes, as std::fwrite gives it, was taken for success wherever it was not 0.
#if defined(KVARN_MUST_FAIL)
using written = std::size_t;
#else
using written = bool;
#endif

struct sink {
    written operator()(std::span<const std::byte> piece) { return written(piece.size()); }
};

#if defined(KVARN_OF_SAVE) || !defined(KVARN_MUST_FAIL)
kvarn::status whole(const kvarn::cache_pool& pool, kvarn::sequence_id id) { return kvarn::save(pool, id, sink{}); }
#endif
#if defined(KVARN_OF_FILE_WRITER) || !defined(KVARN_MUST_FAIL)
kvarn::status chunks(sink to) { return kvarn::file_writer<sink>(to).begin(kvarn::file_kind::records); }
#endif
