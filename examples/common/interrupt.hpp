// SPDX-License-Identifier: Apache-2.0
#pragma once
// Signals that end the program (Ctrl-C, kill, a closed terminal or pipe) take its unfinished files away first. Their names lie
// in static memory, because a signal handler may neither allocate nor lock. Without POSIX signals nothing here does anything.

#include <atomic>
#include <cstddef>
#include <cstring>
#include <string>

#if defined(__unix__) || defined(__APPLE__)
#include <csignal>
#include <unistd.h>
#endif

namespace kvarn_cli {

/// A name that the handler may read at any time.
struct unfinished_name {
    std::atomic<bool> used{false};
    char path[4096] = {};
};
static_assert(std::atomic<bool>::is_always_lock_free);

/// The name of at most one unfinished file, on the list that the handler reads. For the main thread.
class unfinished_file {
public:
    unfinished_file() = default;
    unfinished_file(const unfinished_file&) = delete;
    unfinished_file& operator=(const unfinished_file&) = delete;
    ~unfinished_file() { clear(); }

    void set(const std::string& path) noexcept
    {
        clear();
        if (path.size() >= sizeof(unfinished_name::path)) return;
        for (unfinished_name& e : list_) {
            if (e.used.load()) continue;
            std::memcpy(e.path, path.c_str(), path.size() + 1);
            e.used.store(true);
            mine_ = &e;
            return;
        }
    }

    void clear() noexcept
    {
        if (mine_ != nullptr) mine_->used.store(false);
        mine_ = nullptr;
    }

#if defined(__unix__) || defined(__APPLE__)
    static void remove_all() noexcept
    {
        for (unfinished_name& e : list_)
            if (e.used.load()) ::unlink(e.path);
    }
#endif

private:
    inline static unfinished_name list_[4];  // a command writes two files at most
    unfinished_name* mine_ = nullptr;
};

#if defined(__unix__) || defined(__APPLE__)
inline constexpr int ending_signals[] = {SIGHUP, SIGINT, SIGPIPE, SIGTERM};

/// Ending signals wait for the lifetime of this object: a file and its place on the list appear and disappear together.
class signals_held {
public:
    signals_held() noexcept
    {
        sigset_t ending;
        sigemptyset(&ending);
        for (const int signal : ending_signals) sigaddset(&ending, signal);
        pthread_sigmask(SIG_BLOCK, &ending, &before_);
    }
    signals_held(const signals_held&) = delete;
    signals_held& operator=(const signals_held&) = delete;
    ~signals_held() { pthread_sigmask(SIG_SETMASK, &before_, nullptr); }

private:
    sigset_t before_;
};

/// Installs the handler, except for signals that the caller of the program has chosen to ignore.
inline void remove_unfinished_files_on_signals() noexcept
{
    struct sigaction action = {};
    action.sa_handler = [](int signal) {
        unfinished_file::remove_all();
        raise(signal);  // waits until the handler returns, then does what it would have done without it
    };
    action.sa_flags = static_cast<int>(SA_RESETHAND);
    sigfillset(&action.sa_mask);
    for (const int signal : ending_signals) {
        struct sigaction before;
        if (sigaction(signal, nullptr, &before) == 0 && before.sa_handler != SIG_IGN) sigaction(signal, &action, nullptr);
    }
}
#else
struct signals_held {
    signals_held() noexcept {}
};

inline void remove_unfinished_files_on_signals() noexcept {}
#endif

}  // namespace kvarn_cli
