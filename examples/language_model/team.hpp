// SPDX-License-Identifier: Apache-2.0
#pragma once
// Threads that wait for work: each(n, f) runs f(0) .. f(n - 1) on all of them and on the caller, in any order, and
// returns when all are done. Who runs which item is left to chance, so items must not depend on each other. Of the
// items that fail the lowest one's exception is thrown. One each() at a time.

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstddef>
#include <exception>
#include <functional>
#include <limits>
#include <mutex>
#include <thread>
#include <vector>

namespace language_model {

class team {
public:
    /// `threads` in all, the caller counted; 0: one per core.
    explicit team(unsigned threads = 0)
    {
        const unsigned all = threads != 0 ? threads : std::max(1u, std::thread::hardware_concurrency());
        try {
            for (unsigned i = 1; i < all; ++i) helpers_.emplace_back([this] { help(); });
        } catch (const std::exception&) {
            // Fewer threads than asked for: the ones there are do all the work.
        }
    }
    team(const team&) = delete;
    team& operator=(const team&) = delete;
    ~team()
    {
        {
            const std::lock_guard lock(guard_);
            ending_ = true;
        }
        wake_.notify_all();
        for (std::thread& t : helpers_) t.join();
    }

    /// Threads that work, the caller counted.
    [[nodiscard]] std::size_t threads() const noexcept { return helpers_.size() + 1; }

    void each(std::size_t items, const std::function<void(std::size_t)>& f)
    {
        if (items <= 1 || helpers_.empty()) {
            for (std::size_t i = 0; i < items; ++i) f(i);
            return;
        }
        {
            const std::lock_guard lock(guard_);
            work_ = &f;
            items_ = items;
            next_ = 0;
            failed_at_ = std::numeric_limits<std::size_t>::max();
            problem_ = nullptr;
            ++round_;
        }
        wake_.notify_all();
        take_items(f);
        std::unique_lock lock(guard_);
        work_ = nullptr;  // who wakes up now comes too late
        done_.wait(lock, [this] { return busy_ == 0; });
        if (problem_) std::rethrow_exception(problem_);
    }

private:
    void help()
    {
        std::unique_lock lock(guard_);
        for (std::size_t seen = 0;;) {
            wake_.wait(lock, [&] { return ending_ || round_ != seen; });
            if (ending_) return;
            seen = round_;
            const std::function<void(std::size_t)>* const work = work_;
            if (work == nullptr) continue;
            ++busy_;
            lock.unlock();
            take_items(*work);
            lock.lock();
            if (--busy_ == 0) done_.notify_one();
        }
    }

    void take_items(const std::function<void(std::size_t)>& f)
    {
        for (std::size_t i; (i = next_.fetch_add(1)) < items_;) {
            try {
                f(i);
            } catch (...) {
                const std::lock_guard lock(guard_);
                if (i < failed_at_) problem_ = std::current_exception(), failed_at_ = i;
            }
        }
    }

    std::vector<std::thread> helpers_;
    std::mutex guard_;
    std::condition_variable wake_, done_;
    const std::function<void(std::size_t)>* work_ = nullptr;
    std::atomic<std::size_t> next_{0};
    std::size_t items_ = 0, round_ = 0, busy_ = 0, failed_at_ = 0;
    std::exception_ptr problem_;
    bool ending_ = false;
};

}  // namespace language_model
