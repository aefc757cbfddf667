// SPDX-License-Identifier: Apache-2.0
#pragma once
// Work over all cores and its progress: threads take items from one counter, each with its own scratch.

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdio>
#include <exception>
#include <span>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#if defined(__unix__) || defined(__APPLE__)
#include <unistd.h>
#endif

#include <kvarn/base/status.hpp>
#include <kvarn/layout/record.hpp>

#include "text.hpp"

namespace kvarn_cli {

/// 75 -> 1:15, 7000 -> 1:56:40
[[nodiscard]] inline std::string clock_text(double seconds)
{
    const auto all = static_cast<unsigned long>(seconds + 0.5);
    return all < 3600 ? text("%lu:%02lu", all / 60, all % 60) : text("%lu:%02lu:%02lu", all / 3600, all / 60 % 60, all % 60);
}

/// Progress of long work, with the time left if it goes on like this: one line on stderr, rewritten in place, only if
/// stderr is a terminal; or, where that was asked for, a line of its own every ten seconds, wherever stderr goes.
class progress {
public:
    inline static bool as_lines = false;

    explicit progress(std::string what) : what_(std::move(what)) {}
    progress(const progress&) = delete;
    progress& operator=(const progress&) = delete;
    ~progress()
    {
        if (shown_) std::fputs("\r\x1b[K", stderr);
    }

    void show(std::size_t done, std::size_t all, const std::string& detail = {})
    {
        const auto now = std::chrono::steady_clock::now();
        if ((!as_lines && !terminal()) || now - last_ < std::chrono::milliseconds(as_lines ? 10000 : 200)) return;
        last_ = now;
        shown_ = !as_lines;
        const double seconds = std::chrono::duration<double>(now - begin_).count();
        const std::string left =
            seconds < 2 || done == 0
                ? ""
                : ", " + clock_text(seconds / static_cast<double>(done) * static_cast<double>(all - done)) + " left";
        std::fprintf(stderr, "%s%s %zu/%zu %s%s%s", as_lines ? "" : "\r\x1b[K", what_.c_str(), done, all, detail.c_str(),
                     left.c_str(), as_lines ? "\n" : "");
        std::fflush(stderr);
    }

private:
    static bool terminal() noexcept
    {
#if defined(__unix__) || defined(__APPLE__)
        static const bool is_terminal = isatty(2) != 0;
        return is_terminal;
#else
        return false;
#endif
    }

    std::string what_;
    std::chrono::steady_clock::time_point begin_ = std::chrono::steady_clock::now(), last_ = begin_;
    bool shown_ = false;
};

/// Runs work(range, scratch) -> status over `items` items. Returns the first status that is not ok. threads 0: all cores.
/// `what` and `unit` are for the progress line.
template <class Work>
[[nodiscard]] kvarn::status for_ranges(std::size_t items, std::size_t scratch_size, unsigned threads, const char* what, Work work,
                                       const char* unit = "tiles")
{
    const std::size_t cores = threads != 0 ? threads : std::max(1u, std::thread::hardware_concurrency());
    const std::size_t workers = std::max<std::size_t>(1, std::min(cores, items));
    const std::size_t step = std::clamp<std::size_t>(items / (workers * 8), 1, 64);
    std::vector<std::vector<std::byte>> scratch(workers);
    for (auto& one : scratch) one.resize(scratch_size);
    std::atomic<std::size_t> next{0};
    std::atomic<kvarn::status> outcome{kvarn::status::ok};
    progress shown(what);

    const auto run = [&](std::size_t worker) noexcept {
        for (;;) {
            const std::size_t begin = next.fetch_add(step);
            if (begin >= items || outcome.load() != kvarn::status::ok) return;
            const kvarn::status s =
                work(kvarn::record_range{begin, std::min(begin + step, items)}, std::span<std::byte>(scratch[worker]));
            if (s != kvarn::status::ok) outcome = s;
            if (worker == 0) shown.show(begin, items, unit);
        }
    };
    std::vector<std::thread> pool;
    try {
        for (std::size_t worker = 1; worker < workers; ++worker) pool.emplace_back(run, worker);
    } catch (const std::exception&) {
        // Fewer threads than asked for: the ones there are do all the work.
    }
    run(0);
    for (auto& thread : pool) thread.join();
    return outcome;
}

}  // namespace kvarn_cli
