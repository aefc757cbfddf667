// SPDX-License-Identifier: Apache-2.0
#pragma once
// What a program makes of its arguments: they are right, or help and version were asked for and printed, or it ends with one line.

#include <sstream>

#include <CLI/CLI.hpp>

#include "failure.hpp"
#include "files.hpp"

namespace kvarn_cli {

/// Whether the program goes on: false after --help and --version. Throws failure.
[[nodiscard]] inline bool parse_arguments(CLI::App& app, int argc, char** argv)
{
    try {
        app.parse(argc, argv);
    } catch (const CLI::ParseError& e) {
        if (e.get_exit_code() != 0) throw failure(e.what());
        std::ostringstream help, unused;
        app.exit(e, help, unused);
        print(help.str());
        return false;
    }
    return true;
}

}  // namespace kvarn_cli
