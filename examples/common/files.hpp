// SPDX-License-Identifier: Apache-2.0
#pragma once
// Whole files in and out. Output goes to a temporary beside the target and is renamed at the end, so that a failed or
// interrupted command leaves nothing behind; devices and pipes (/dev/stdout, /dev/full) are written in place.

#include <bit>
#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <memory>
#include <random>
#include <string>
#include <string_view>
#include <system_error>
#include <vector>

#include "failure.hpp"
#include "interrupt.hpp"

namespace kvarn_cli {

static_assert(std::endian::native == std::endian::little,
              "the programs read and write little-endian files as they lie in memory; on this machine use the library alone");

struct file_closer {
    void operator()(std::FILE* f) const noexcept { std::fclose(f); }
};
using file_handle = std::unique_ptr<std::FILE, file_closer>;

[[nodiscard]] inline std::string system_error_text(int code)
{
    return std::generic_category().message(code);
}

/// The whole content of a file or pipe.
[[nodiscard]] inline std::vector<std::byte> read_file(const std::string& path)
{
    file_handle file(std::fopen(path.c_str(), "rb"));
    if (!file) throw failure(path + ": cannot open: " + system_error_text(errno));
    std::vector<std::byte> content;
    std::error_code ignored;
    if (const auto size = std::filesystem::file_size(path, ignored); !ignored) content.reserve(static_cast<std::size_t>(size));
    std::vector<std::byte> chunk(std::size_t{1} << 20);
    for (;;) {
        errno = 0;
        const std::size_t got = std::fread(chunk.data(), 1, chunk.size(), file.get());
        content.insert(content.end(), chunk.begin(), chunk.begin() + static_cast<std::ptrdiff_t>(got));
        if (got == chunk.size()) continue;
        if (std::ferror(file.get())) throw failure(path + ": cannot read: " + system_error_text(errno));
        return content;
    }
}

/// A file being written. Without commit() its destructor removes what was written.
class output_file {
public:
    explicit output_file(const std::string& target) : target_(target)
    {
        namespace fs = std::filesystem;
        std::error_code error;
        const fs::file_status what = fs::status(target, error);
        if (fs::is_directory(what)) throw failure(target + ": cannot write: is a directory");
        in_place_ = fs::exists(what) && !fs::is_regular_file(what);
        if (in_place_) {
            file_.reset(std::fopen(target.c_str(), "wb"));
        } else {
            // Follow a link, so that the rename replaces the file and not the link.
            if (fs::exists(what))
                if (const fs::path real = fs::canonical(target, error); !error) final_ = real.string();
            if (final_.empty()) final_ = target;
            std::random_device random;
            for (int attempt = 0; attempt < 8 && !file_; ++attempt) {
                char suffix[32];
                std::snprintf(suffix, sizeof suffix, ".%08x.tmp", static_cast<unsigned>(random()));
                temporary_ = final_ + suffix;
                errno = 0;
                const signals_held held;
                file_.reset(std::fopen(temporary_.c_str(), "wbx"));
                if (file_) unfinished_.set(temporary_);
                else if (errno != EEXIST) break;
            }
            if (!file_) temporary_.clear();
        }
        if (!file_) throw failure(target + ": cannot create: " + system_error_text(errno));
    }

    output_file(const output_file&) = delete;
    output_file& operator=(const output_file&) = delete;

    ~output_file()
    {
        file_.reset();
        const signals_held held;
        if (!temporary_.empty()) std::remove(temporary_.c_str());
        unfinished_.clear();
    }

    void write(bytes content)
    {
        errno = 0;
        if (!content.empty() && std::fwrite(content.data(), 1, content.size(), file_.get()) != content.size()) fail_writing();
    }

    void write(std::string_view text) { write(std::as_bytes(std::span(text.data(), text.size()))); }

    /// Flushes and closes; every failure to write has been seen when this returns.
    void finish()
    {
        errno = 0;
        if (std::fflush(file_.get()) != 0) fail_writing();
        if (std::fclose(file_.release()) != 0) fail_writing();
    }

    /// Gives the finished file its name.
    void commit()
    {
        if (in_place_) return;
        std::error_code error;
        const signals_held held;
        std::filesystem::rename(temporary_, final_, error);
        if (error) throw failure(target_ + ": cannot write: " + error.message());
        temporary_.clear();
        unfinished_.clear();
        committed_ = true;
    }

    /// Takes the name away again, because another output of the same command failed.
    void revoke() noexcept
    {
        if (committed_) std::remove(final_.c_str());
    }

private:
    [[noreturn]] void fail_writing() const { throw failure(target_ + ": cannot write: " + system_error_text(errno)); }

    std::string target_;
    std::string final_;
    std::string temporary_;
    unfinished_file unfinished_;
    file_handle file_;
    bool in_place_ = false;
    bool committed_ = false;
};

/// Prints to stdout; a closed or full stdout is a failure like any other.
inline void print(std::string_view text)
{
    errno = 0;
    if (std::fwrite(text.data(), 1, text.size(), stdout) != text.size() || std::fflush(stdout) != 0)
        throw failure("standard output: cannot write: " + system_error_text(errno));
}

}  // namespace kvarn_cli
