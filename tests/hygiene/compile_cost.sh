#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# compile_cost.sh <compiler> [<records>]: the library takes at most a third more to compile than <records> (compile_cost.txt) has it. Time is
# CPU time as a multiple of what compile_cost_reference.cpp takes, the least of several runs in turn, so that neither the machine nor
# what else runs on it counts; text of the portable kernels does not vary. A version of a compiler that has no record is held to twice
# the one of another version. Exit code 77: skipped.
set -eu
LC_ALL=C CCACHE_DISABLE=1
export LC_ALL CCACHE_DISABLE
here=$(CDPATH= cd -- "$(dirname -- "$0")" && pwd)
compiler=$1 records=${2:-$here/compile_cost.txt}

skip() {
    echo "$*: skipped"
    exit 77
}
case $compiler in
    '' | *-NOTFOUND) skip 'no such compiler is installed' ;;
esac
target=$("$compiler" -dumpmachine)
processor=${target%%-*}
case $target in
    *linux*) ;;
    *) skip "no record of compilers for $target" ;;
esac
macros=$("$compiler" -dM -E -x c++ /dev/null)
macro() { echo "$macros" | sed -n "s/^#define $1 //p"; }
case $macros in
    *__clang_major__*) family=clang version=$(macro __clang_major__) ;;
    *__GNUC__*) family=gcc version=$(macro __GNUC__) ;;
    *) skip "$compiler is neither GCC nor Clang" ;;
esac
# <version> <time> <text>: this version's record, or the last one of the family.
record=$(awk -v family="$family" -v version="$version" -v processor="$processor" '
    $1 == family && $3 == processor && found != version { found = $2; record = $2 " " $4 " " $5 }
    END { print record }' "$records")
[ -n "$record" ] || skip "no record of $family for $processor"
command -v size >/dev/null || skip 'no program `size` is installed'
set -- $record
recorded_version=$1 recorded_time=$2 recorded_text=$3
margin=1.33333333
[ "$recorded_version" = "$version" ] || margin=2

case $processor in
    x86_64) low=-march=x86-64 high=-march=x86-64-v3 ;;
    *) low= high= ;;
esac
work=$KVARN_WORK/compile_cost_$(basename -- "$compiler")
rm -rf "$work"
mkdir -p "$work"
trap 'rm -rf "$work"' EXIT
compile() { # <source> <flags>
    source=$1
    shift
    "$compiler" -std=c++20 -O2 "$@" -I "$KVARN_INCLUDE" -isystem "$KVARN_ISOLATED" -c "$here/$source" -o "$work/object.o"
}

# seconds <source> <flags>: CPU time, of which the second line of `times` has the compiler's.
seconds() {
    (
        compile "$@" || exit 1
        times >"$work/times"
    ) || exit 1
    awk 'NR == 2 { gsub(/[ms]/, " "); print $1 * 60 + $2 + $3 * 60 + $4 }' "$work/times"
}
least() { awk -v a="$1" -v b="$2" 'BEGIN { print a == "" || b + 0 < a + 0 ? b : a }'; }
holds() { awk -v x="$1" -v recorded="$2" -v margin=$margin 'BEGIN { exit !(x <= recorded * margin) }'; }
say() { # <what> <measured> <recorded>
    echo "$1: $2, recorded $3 ($family $recorded_version), at most $(awk -v x="$3" -v m=$margin 'BEGIN { print x * m }') for $family $version"
}

# A round that holds is enough: what else runs only adds to a time. The reference is measured before and after.
ours= reference= round=0 failed=0
reference=$(seconds compile_cost_reference.cpp $high)
while :; do
    round=$((round + 1))
    now=$(seconds compile_cost.cpp $high)
    ours=$(least "$ours" "$now")
    now=$(seconds compile_cost_reference.cpp $high)
    reference=$(least "$reference" "$now")
    ratio=$(awk -v a="$ours" -v b="$reference" 'BEGIN { printf "%.2f", a / b }')
    echo "round $round: quantize_kv and attend $ours s, reference $reference s (the least until now)"
    if holds "$ratio" "$recorded_time" || [ $round = 3 ]; then break; fi
done
say 'CPU time in units of the reference' "$ratio" "$recorded_time"
holds "$ratio" "$recorded_time" || { echo 'FAILED: takes longer to compile'; failed=1; }

compile compile_cost.cpp $low -DKVARN_COST_SET=simd::portable -DKVARN_KERNELS_HALF
text=$(size "$work/object.o" | awk 'NR == 2 { print $1 }')
say 'bytes of text of the portable kernels' "$text" "$recorded_text"
holds "$text" "$recorded_text" || { echo 'FAILED: more code'; failed=1; }
exit $failed
