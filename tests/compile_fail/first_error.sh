#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# first_error.sh <include> <xsimd include> <work> <compiler> ...: with an older standard the first error of every header, whichever is
# included first, is the sentence that says so. The standard library may lack C++20's headers then: here including one is an error, unless
# the standard library's older headers include it themselves (GCC 14's <cmath> does so with <bit>).
set -eu
include=$1 xsimd=$2 work=$3
shift 3
sentence='kvarn needs C++20'
newer='bit compare concepts coroutine numbers ranges source_location span version'
count=0
cd "$include"
older=$(find kvarn -name '*.hpp' -exec sed -n 's/^#include <\([a-z_]*\)>.*/\1/p' {} + | LC_ALL=C sort -u)
for name in $newer; do older=$(printf '%s\n' $older | grep -v -x "$name"); done
for compiler in "$@"; do
    case $compiler in
        '' | *-NOTFOUND) continue ;;
    esac
    rm -rf "$work/missing"
    mkdir -p "$work/missing"
    printf '#include <%s>\n' $older | "$compiler" -std=c++17 -M -x c++ - | tr -s ' \\' '\n' | sed 's|.*/||' >"$work/there.txt"
    for name in $newer; do
        grep -q -x "$name" "$work/there.txt" || echo "#error \"no header <$name>\"" >"$work/missing/$name"
    done
    # <span> is what most of the headers include.
    [ -f "$work/missing/span" ] || { echo "$compiler: <span> is there with an older standard"; exit 1; }
    for header in $(find kvarn \( -name '*.hpp' -o -name '*.cuh' \) | LC_ALL=C sort); do
        case $header in
            # Without any include, or part of simd/xsimd.hpp, or Eigen first.
            kvarn/version.hpp | kvarn/simd/x86*.hpp | kvarn/simd/neon*.hpp | kvarn/simd/sse2*.hpp | kvarn/interop/eigen.hpp) continue ;;
        esac
        for standard in 17 14; do
            count=$((count + 1))
            if printf '#include <%s>\n' "$header" | "$compiler" -std=c++$standard -fsyntax-only -Wfatal-errors -I "$work/missing" -I "$include" \
                -isystem "$xsimd" -x c++ - >"$work/first_error.log" 2>&1; then
                echo "$compiler -std=c++$standard accepts $header"
                exit 1
            fi
            first=$(grep -E -m 1 "(^|[: ])error: " "$work/first_error.log")
            case $first in
                *"$sentence"*) ;;
                *) echo "$compiler -std=c++$standard, $header: the first error is: $first"; exit 1 ;;
            esac
        done
    done
    echo "$compiler: $first"
done
[ "$count" -gt 0 ] || { echo "no compiler"; exit 1; }
echo "$count compilations"
