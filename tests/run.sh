#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# Builds and tests everything on a fresh Debian 12, Debian 13 or Ubuntu 24.04, as root or with sudo: `sh tests/run.sh [ctest arguments]`.
# KVARN_BUILD_DIR chooses the build folder (default: build), KVARN_JOBS how many jobs run at once (default: all cores). KVARN_NO_CROSS=1
# installs no compilers for other processors, KVARN_WINDOWS=1 also those for Windows.
set -eu
root=$(CDPATH= cd -- "$(dirname -- "$0")/.." && pwd)
. "$root/cmake/setup.sh"

kvarn_setup_tests
jobs=${KVARN_JOBS:-$(getconf _NPROCESSORS_ONLN 2>/dev/null || echo 2)}
kvarn_configure -DKVARN_BUILD_TESTS=ON -DKVARN_BUILD_BENCHMARKS=ON -DKVARN_BUILD_EXAMPLES=ON
cmake --build "$build" --parallel "$jobs"
cd "$build"
exec ctest --output-on-failure --parallel "$jobs" "$@"
