// SPDX-License-Identifier: Apache-2.0
#pragma once
// The blocks of a pool and who holds them: reference counts, free blocks, which record was made from which exact block; a lock
// for all of it. In: arrays in the pool's memory. No allocation. Functions that say so are called under the lock.

#include <kvarn/base/config.hpp>  // first: it refuses older standards

#include <cstddef>
#include <cstdint>

#include <kvarn/base/status.hpp>

namespace kvarn::detail {

/// A lock held for a few hundred instructions at most (fork, close: for as many spans as a sequence has).
class pool_lock {
public:
    KVARN_INLINE explicit pool_lock(std::uint32_t& word) noexcept : word_(&word)
    {
        while (__atomic_exchange_n(word_, 1u, __ATOMIC_ACQUIRE) != 0)
            while (__atomic_load_n(word_, __ATOMIC_RELAXED) != 0) {}
    }
    pool_lock(const pool_lock&) = delete;
    pool_lock& operator=(const pool_lock&) = delete;
    KVARN_INLINE ~pool_lock() { __atomic_store_n(word_, 0u, __ATOMIC_RELEASE); }

private:
    std::uint32_t* word_;
};

inline constexpr std::int32_t no_block = -1;
inline constexpr std::int32_t being_sealed = -2;  // link of an exact block whose record is on its way

/// Blocks of one kind. `link`: of an exact block the record made from it, of a record block the exact block that it was made
/// from, while both live and the exact tokens are the same.
struct block_list {
    std::uint32_t* holders = nullptr;  // [total], 0: free
    std::int32_t* link = nullptr;      // [total]
    std::int32_t* unused = nullptr;    // [total], a stack
    std::uint32_t total = 0;
    std::uint32_t free = 0;
    std::uint32_t shared = 0;  // blocks with two holders or more

    KVARN_INLINE void reset() noexcept
    {
        free = total;
        shared = 0;
        for (std::uint32_t i = 0; i < total; ++i) {
            holders[i] = 0;
            link[i] = no_block;
            unused[i] = static_cast<std::int32_t>(total - 1 - i);
        }
    }
    /// Under the lock, where free != 0.
    [[nodiscard]] KVARN_INLINE std::int32_t take() noexcept
    {
        const std::int32_t block = unused[--free];
        holders[block] = 1;
        link[block] = no_block;
        return block;
    }
    /// Under the lock.
    KVARN_INLINE void hold(std::int32_t block) noexcept
    {
        if (++holders[block] == 2) ++shared;
    }
    /// Under the lock; whether that was the last holder, and the block is free now.
    KVARN_INLINE bool release(std::int32_t block) noexcept
    {
        const std::uint32_t left = --holders[block];
        if (left == 1) --shared;
        if (left != 0) return false;
        unused[free++] = block;
        return true;
    }
};

/// Both kinds, and why exact blocks stay exact.
struct pool_blocks {
    block_list records, exact;
    status* kept = nullptr;  // [exact.total]: ok, or what sealing the tile said

    KVARN_INLINE void reset() noexcept
    {
        records.reset();
        exact.reset();
        for (std::uint32_t i = 0; i < exact.total; ++i) kept[i] = status::ok;
    }
    /// Under the lock, as are the others.
    [[nodiscard]] KVARN_INLINE std::int32_t take_exact() noexcept
    {
        const std::int32_t block = exact.take();
        kept[block] = status::ok;
        return block;
    }
    /// The tokens of an exact block change: no record is made from it any more.
    KVARN_INLINE void unlink_exact(std::int32_t block) noexcept
    {
        if (exact.link[block] >= 0) records.link[exact.link[block]] = no_block;
        exact.link[block] = no_block;
        kept[block] = status::ok;
    }
    KVARN_INLINE void release_exact(std::int32_t block) noexcept
    {
        if (exact.release(block)) unlink_exact(block);
    }
    KVARN_INLINE void release_record(std::int32_t block) noexcept
    {
        if (!records.release(block)) return;
        if (records.link[block] >= 0) exact.link[records.link[block]] = no_block;
        records.link[block] = no_block;
    }
    KVARN_INLINE void link(std::int32_t tile, std::int32_t record) noexcept
    {
        exact.link[tile] = record;
        records.link[record] = tile;
    }
};

}  // namespace kvarn::detail
