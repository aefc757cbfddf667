// SPDX-License-Identifier: Apache-2.0
#pragma once
// A program of the examples run as its users run it, in a folder of its own. POSIX.

#include <algorithm>
#include <csignal>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <random>
#include <string>
#include <system_error>
#include <utility>
#include <vector>

#include <fcntl.h>
#include <sys/wait.h>
#include <unistd.h>

#include "tests/catch.hpp"

namespace support {

namespace fs = std::filesystem;

inline std::string read_text(const fs::path& path)
{
    std::ifstream in(path, std::ios::binary);
    return {std::istreambuf_iterator<char>(in), std::istreambuf_iterator<char>()};
}

inline void write_text(const fs::path& path, const std::string& content)
{
    std::ofstream(path, std::ios::binary) << content;
}

struct outcome {
    int code = -1;
    std::string out, err;
};

/// A folder that goes away with the test; the program runs inside it.
class workplace {
public:
    /// `program` is its path, `name` what its messages begin with.
    workplace(std::string program, std::string name) : program_(std::move(program)), name_(std::move(name))
    {
        std::random_device random;
        path_ = fs::temp_directory_path() / ("kvarn_" + name_ + "_test_" + std::to_string(random()) + std::to_string(random()));
        fs::create_directories(path_ / "logs");
        fs::create_directories(path_ / "work");
    }
    workplace(const workplace&) = delete;
    workplace& operator=(const workplace&) = delete;
    ~workplace()
    {
        std::error_code ignored;
        fs::remove_all(path_, ignored);
    }

    [[nodiscard]] const std::string& name() const { return name_; }
    [[nodiscard]] fs::path operator/(const std::string& name) const { return path_ / "work" / name; }

    [[nodiscard]] outcome run(const std::string& arguments, const std::string& out = "../logs/out") const
    {
        const std::string command = "cd '" + (path_ / "work").string() + "' && '" + program_ + "' " + arguments + " >" +
                                    out + " 2>../logs/err </dev/null";
        const int status = std::system(command.c_str());
        outcome result;
        result.code = WIFEXITED(status) ? WEXITSTATUS(status) : -1;
        if (out == "../logs/out") result.out = read_text(path_ / "logs" / "out");
        result.err = read_text(path_ / "logs" / "err");
        return result;
    }

    /// Starts the program with the signals it would have at a terminal, but for `ignored`; stdout goes to `out` if not negative.
    [[nodiscard]] pid_t start(std::vector<std::string> arguments, int ignored = 0, int out = -1) const
    {
        arguments.insert(arguments.begin(), program_);
        std::vector<char*> argv;
        for (std::string& argument : arguments) argv.push_back(argument.data());
        argv.push_back(nullptr);
        const std::string folder = (path_ / "work").string();
        const pid_t child = fork();
        if (child != 0) return child;
        for (const int signal : {SIGHUP, SIGINT, SIGPIPE, SIGTERM}) std::signal(signal, signal == ignored ? SIG_IGN : SIG_DFL);
        if (out < 0) out = open("/dev/null", O_WRONLY);
        if (chdir(folder.c_str()) != 0 || dup2(out, 1) != 1) _exit(125);
        execv(argv[0], argv.data());
        _exit(126);
    }

    [[nodiscard]] std::vector<std::string> files() const
    {
        std::vector<std::string> names;
        for (const auto& entry : fs::directory_iterator(path_ / "work")) names.push_back(entry.path().filename().string());
        std::sort(names.begin(), names.end());
        return names;
    }

private:
    std::string program_, name_;
    fs::path path_;
};

/// Exit code 2, one line on stderr that holds `reason`, and the folder as it was.
inline void check_refused(const workplace& here, const std::string& arguments, const std::string& reason,
                   const std::string& out = "../logs/out")
{
    CAPTURE(arguments);
    const auto before = here.files();
    const outcome result = here.run(arguments, out);
    CAPTURE(result.err);
    CHECK(result.code == 2);
    CHECK(result.out.empty());
    CHECK(result.err.rfind(here.name() + ": ", 0) == 0);
    CHECK(std::count(result.err.begin(), result.err.end(), '\n') == 1);
    CHECK((!result.err.empty() && result.err.back() == '\n'));
    CHECK(result.err.find(reason) != std::string::npos);
    CHECK(here.files() == before);
}

}  // namespace support
