#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# one_definition.sh <compiler>: two translation units for different instruction sets share no function, so that the linker
# cannot put code of the higher set where the lower one was asked for; and they link and agree.
set -eu
here=$(CDPATH= cd -- "$(dirname -- "$0")" && pwd)
compiler=$1
work=$KVARN_WORK/one_definition
rm -rf "$work"
mkdir -p "$work"
case $(uname -m) in
    x86_64) low=-march=x86-64 high=-march=x86-64-v3 ;;
    *) low= high=-march=native ;;
esac

build() { # <part> <flags>
    part=$1
    shift
    "$compiler" -std=c++20 "$@" -I "$KVARN_INCLUDE" -isystem "$KVARN_ISOLATED" -DKVARN_PART="$part" -c \
        "$here/one_definition.cpp" -o "$work/$part.o"
    # Functions that the linker may merge; data and what the compiler itself emits do not matter.
    nm -C "$work/$part.o" | awk '$2 == "W" || $2 == "u" && /\(/ { $1 = ""; print }' | LC_ALL=C sort -u >"$work/$part.txt"
}

failed=0
for level in -O1 -O0; do
    build low $level $low -DKVARN_MAIN
    build high $level $high
    # Without optimisation the standard library's small functions are shared too, in every such program: only ours count then.
    LC_ALL=C comm -12 "$work/low.txt" "$work/high.txt" | awk -v all=$([ $level = -O0 ] && echo 0 || echo 1) '{
        name = $0
        sub(/^ *[Wu] /, "", name)
        while (gsub(/<[^<>]*>/, "", name)) {}
        sub(/\(.*/, "", name)
        words = split(name, word, " ")
        if (all || word[words] ~ /^kvarn::/ || name ~ /kvarn::.*operator/) print
    }' >"$work/shared.txt"
    if [ -s "$work/shared.txt" ]; then
        echo "at $level both objects define:"
        cat "$work/shared.txt"
        failed=1
    fi
    "$compiler" "$work/low.o" "$work/high.o" -o "$work/program"
    if [ -z "$high" ] || grep -q -w -m 1 avx2 /proc/cpuinfo || [ "$(uname -m)" != x86_64 ]; then
        "$work/program" || failed=1
    else
        echo "this processor has no avx2: linked, not run"
    fi
done
exit $failed
