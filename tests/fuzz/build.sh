#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# build.sh <compiler> <folder> [cmake arguments]: builds the fuzz targets and writes their seeds. Exit code 77, with the reason in the
# output and in <folder>/skipped, where the compiler cannot build them.
set -eu
here=$(CDPATH= cd -- "$(dirname -- "$0")" && pwd)
compiler=$1 folder=$2
shift 2
mkdir -p "$folder"
rm -f "$folder/skipped"

skip() {
    echo "$1: skipped" | tee "$folder/skipped"
    exit 77
}
case $compiler in
    '' | *-NOTFOUND) skip "no Clang is installed" ;;
esac
printf '#include <cstddef>\n#include <cstdint>\nextern "C" int LLVMFuzzerTestOneInput(const std::uint8_t*, std::size_t) { return 0; }\n' |
    "$compiler" -fsanitize=fuzzer,address,undefined -x c++ - -o "$folder/probe" 2>"$folder/probe.txt" ||
    skip "$compiler has no libFuzzer (Debian and Ubuntu: libclang-rt-dev)"
rm -f "$folder/probe" "$folder/probe.txt"

generator=
if [ ! -f "$folder/CMakeCache.txt" ] && command -v ninja >/dev/null 2>&1; then
    generator=-GNinja
fi
cmake -S "$here/project" -B "$folder" $generator "-DCMAKE_CXX_COMPILER=$compiler" "$@"
cmake --build "$folder" --parallel "${KVARN_JOBS:-2}"
