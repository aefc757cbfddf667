#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# Builds the command line tool and compares the formats on the activations in examples/data. Installs what is missing on Debian
# and Ubuntu; KVARN_BUILD_DIR chooses the build folder (default: build). Arguments go to `kvarn compare`.
set -eu
root=$(CDPATH= cd -- "$(dirname -- "$0")/.." && pwd)
. "$root/cmake/setup.sh"

kvarn_setup_examples
only=
if [ ! -f "$build/CMakeCache.txt" ]; then
    only='-DKVARN_BUILD_TESTS=OFF -DKVARN_BUILD_BENCHMARKS=OFF'  # they want more packages; a folder that has them keeps them
fi
kvarn_configure $only -DKVARN_BUILD_EXAMPLES=ON
cmake --build "$build" --parallel "${KVARN_JOBS:-$(getconf _NPROCESSORS_ONLN 2>/dev/null || echo 2)}" --target kvarn_cli

data=$root/examples/data
k=$(find "$data" -name '*k.npy' | LC_ALL=C sort | head -n 1)
if [ -z "$k" ]; then
    echo "no K array (*k.npy) in $data" >&2
    exit 1
fi
v=${k%k.npy}v.npy q=${k%k.npy}q.npy
set -- --html "$build/report.html" "$@"
[ ! -f "$q" ] || set -- --q "$q" "$@"

tool=$build/examples/kvarn/kvarn
echo
echo "$tool compare $k $v $*"
"$tool" compare "$k" "$v" "$@"
echo
echo "report: $build/report.html"
