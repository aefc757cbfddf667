// SPDX-License-Identifier: Apache-2.0
#pragma once
// What a preempted sequence held, outside of the pool: the file that kvarn::save writes, in memory. In: a sequence. Out: the same one, in the
// same pool later.

#include <algorithm>
#include <cstddef>
#include <span>
#include <vector>

#include <kvarn/cache/load.hpp>

#include "../common/failure.hpp"

namespace serving {

class parked_sequence {
public:
    parked_sequence(const kvarn::cache_pool& pool, kvarn::sequence_id id)
    {
        file_.reserve(static_cast<std::size_t>(kvarn::saved_bytes(pool, id)));
        const auto append = [&](std::span<const std::byte> piece) {
            file_.insert(file_.end(), piece.begin(), piece.end());
            return true;
        };
        kvarn_cli::check(kvarn::save(pool, id, append), "saving a sequence");
    }

    /// Error: no_room, where the pool has not the blocks.
    [[nodiscard]] kvarn::result<kvarn::sequence_id> load(const kvarn::cache_pool& pool) const
    {
        std::size_t at = 0;
        const auto take = [&](std::span<std::byte> piece) {
            const std::size_t count = std::min(piece.size(), file_.size() - at);
            std::copy_n(file_.begin() + static_cast<std::ptrdiff_t>(at), count, piece.begin());
            at += count;
            return count;
        };
        const auto loaded = kvarn::load(pool, take);
        if (loaded.error != kvarn::status::no_room) kvarn_cli::check(loaded.error, "loading a sequence");
        return loaded;
    }

private:
    std::vector<std::byte> file_;
};

}  // namespace serving
