// SPDX-License-Identifier: Apache-2.0
#pragma once
// How a program ends: 0, or 2 with one line on stderr, whatever was thrown; unfinished files are gone in either case.

#include <cstdio>
#include <exception>
#include <new>
#include <stdexcept>
#include <string>

#include "interrupt.hpp"

namespace kvarn_cli {

/// One line, whatever the text: names from files may hold anything, and no control character of theirs reaches a terminal.
[[nodiscard]] inline std::string one_line(std::string message)
{
    for (char& c : message)
        if (static_cast<unsigned char>(c) < 0x20 || c == 0x7f) c = ' ';
    message.erase(message.find_last_not_of(' ') + 1);
    return message;
}

/// The exit code of run(), which returns it or throws.
template <class Run>
[[nodiscard]] int run_program(const char* name, Run&& run)
{
    remove_unfinished_files_on_signals();
    std::string problem;
    try {
        return run();
    } catch (const std::bad_alloc&) {
        problem = "out of memory";
    } catch (const std::length_error&) {
        problem = "out of memory";
    } catch (const std::exception& e) {
        problem = one_line(e.what());
    }
    std::fprintf(stderr, "%s: %s\n", name, problem.c_str());
    return 2;
}

}  // namespace kvarn_cli
