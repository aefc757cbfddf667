#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# hostile_macros.sh <compiler>: every header, alone and all together with everything instantiated, between the macros that other people's
# headers define, each of them turned into a syntax error. Standard headers and xsimd do not all survive those themselves, so they
# come first; min and max, which windows.h defines early in most programs, are also defined before anything.
# Afterwards the macros must still be there.
set -eu
here=$(CDPATH= cd -- "$(dirname -- "$0")" && pwd)
compiler=$1
case $compiler in
    '' | *-NOTFOUND) echo "this compiler is not installed: skipped"; exit 77 ;;
esac
"$compiler" --version | head -n 1
work=$KVARN_WORK/hostile_$(basename "$compiler")
rm -rf "$work"
mkdir -p "$work"
failed=0

# windows.h and what it includes
objects='near far NEAR FAR huge small hyper interface pascal cdecl CALLBACK WINAPI IN OUT INOUT OPTIONAL CONST VOID TRUE FALSE ERROR
    NO_ERROR DELETE IGNORE INFINITE STRICT ABSOLUTE RELATIVE DIFFERENCE TRANSPARENT OPAQUE DOMAIN OVERFLOW UNDERFLOW UNICODE THIS
    GetMessage SendMessage CreateFile GetObject CopyMemory FillMemory MoveMemory ZeroMemory'
# X11
objects="$objects None Bool Status True False Success Always WhenMapped NotUseful Unsorted YSorted Complex Nonconvex Convex Above
    Below Opposite Expose KeyPress FocusIn FocusOut CursorShape ControlMask DestroyAll"
# C, POSIX, compilers in their GNU modes, curses, Qt
objects="$objects complex I imaginary unix linux restrict stdcall B0 B50 B75 B110 ECHO CR0 NL0 OK ERR signals slots emit forever"
# logging, engines' own headers
objects="$objects DEBUG TRACE INFO NOTICE WARN WARNING CRITICAL FATAL OFF VERBOSE Yes No YES NO PI EPSILON SIZE ALIGN INLINE RESTRICT
    PREFETCH CACHE_LINE_SIZE PAGE_SIZE QK K_SCALE_SIZE UNROLL HOST DEVICE GLOBAL SHARED KERNEL"
functions='min max MIN MAX CLAMP SWAP abs sqr check verify require assert_true CHECK DCHECK REQUIRE ASSERT EXPECT LOG VLOG FAIL SECTION
    UNUSED TEXT major minor makedev likely unlikely LIKELY UNLIKELY foreach move clear erase refresh timeout echo RGB Yield
    ROUND_UP DIV_UP BIT F _'

{
    for name in $objects; do printf '#define %s )hostile(\n' "$name"; done
    for name in $functions; do printf '#define %s(a, b) )hostile(\n' "$name"; done
} >"$work/hostile.hpp"
for name in $objects $functions; do
    printf '#if !defined(%s)\n#error "%s was undefined"\n#endif\n#undef %s\n' "$name" "$name" "$name"
done >"$work/still_there.hpp"
printf '#define min(a, b) (((a) < (b)) ? (a) : (b))\n#define max(a, b) (((a) > (b)) ? (a) : (b))\n' >"$work/min_max.hpp"

cd "$KVARN_INCLUDE"
headers=$(find kvarn \( -name '*.hpp' -o -name '*.cuh' \) | LC_ALL=C sort)
# What kvarn includes of others, and what the consumer's file needs.
cat $headers | sed -n 's/^ *#include <\([^>]*\)>.*/\1/p' | grep -v '^kvarn/\|^Eigen/\|^cuda' | LC_ALL=C sort -u |
    while read -r name; do
        needs=
        [ "$name" != xxhash.h ] || printf '#define XXH_INLINE_ALL\n'  # as kvarn includes it
        [ "$name" != arm_neon.h ] || needs=' && defined(__aarch64__)'
        printf '#if __has_include(<%s>)%s\n#include <%s>\n#endif\n' "$name" "$needs" "$name"
    done >"$work/others.hpp"
printf '#include <Eigen/Core>\n' >"$work/eigen.hpp"

compile() { # <what> <flags> ... with the source on standard input
    what=$1
    shift
    "$compiler" -std=c++20 "$@" -fsyntax-only -Wall -Wextra -Werror -I "$KVARN_INCLUDE" -I "$work" -isystem "$KVARN_ISOLATED" \
        -isystem "$KVARN_EIGEN" -x c++ - || {
        echo "FAILED: $what $*"
        : >"$work/failed"  # a variable would be lost: this is the end of a pipeline
    }
}

# What the macros are for: kvarn's names next to them are found.
for name in near min; do
    printf '#include <hostile.hpp>\nint %s(int, int);\n' "$name" >"$work/use.cpp"
    if "$compiler" -fsyntax-only -I "$work" "$work/use.cpp" 2>"$work/use.log"; then
        echo "FAILED: the macro $name would not be noticed"
        failed=1
    fi
done

# The others' headers take most of the time: they are compiled once.
"$compiler" -std=c++20 -isystem "$KVARN_ISOLATED" -x c++-header "$work/others.hpp" -o "$work/others.hpp.pch"
case $("$compiler" --version) in
    *clang*) others="-include-pch $work/others.hpp.pch" ;;
    *) mv "$work/others.hpp.pch" "$work/others.hpp.gch"; others="-include $work/others.hpp" ;;
esac
count=0
for header in $headers; do
    case $(uname -m):$header in
        # These are parts of simd/xsimd.hpp, which includes the one that fits.
        *:kvarn/simd/x86*.hpp | x86_64:kvarn/simd/neon*.hpp) continue ;;
        *:kvarn/interop/eigen*) first='#include <eigen.hpp>' ;;
        *) first= ;;
    esac
    count=$((count + 1))
    printf '%s\n#include <hostile.hpp>\n#include <%s>\n#include <still_there.hpp>\n' "$first" "$header" | compile "$header" $others
done
echo "$count headers alone"
[ "$count" -gt 40 ] || failed=1

case $(uname -m) in
    x86_64) sets='-march=x86-64 -march=x86-64-v3 -march=x86-64-v4' ;;
    *) sets='-march=native' ;;
esac
for set in $sets; do
    {
        printf '#include <others.hpp>\n#include <eigen.hpp>\n#include <hostile.hpp>\n'
        printf '#define KVARN_EIGEN 1\n#include "%s"\n#include <still_there.hpp>\n' "$here/every_function.cpp"
    } | compile "everything" "$set"
    printf '#include <min_max.hpp>\n#include "%s"\n' "$here/every_function.cpp" | compile "min and max first" "$set"
done
[ ! -e "$work/failed" ] || failed=1
[ "$failed" = 0 ] && echo "everything instantiated for:$(printf ' %s' $sets)"
exit $failed
