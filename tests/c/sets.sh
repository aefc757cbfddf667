#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# sets.sh <shared library> <test program> <qemu-x86_64 or nothing> <work folder> <object> ...: the objects for the instruction sets share no
# function, of which the linker would keep any one; outside of the functions for AVX2 and AVX-512 the library has no instruction of those
# sets; and on an emulated processor without them tests pass. Exit code 77: skipped.
set -eu
library=$1 program=$2 qemu=$3 work=$4
shift 4
[ "$(uname -m)" = x86_64 ] || { echo "the library has one instruction set here: skipped"; exit 77; }
command -v objdump >/dev/null 2>&1 || { echo "there is no objdump: skipped"; exit 77; }
mkdir -p "$work"

count=0
: >"$work/functions"
for object in "$@"; do
    case $object in
        */kvarn_kernels/*)
            nm "$object" | awk '$2 == "W" { print $3 }' | LC_ALL=C sort -u >>"$work/functions"
            count=$((count + 1))
            ;;
    esac
done
[ "$count" -gt 1 ] || { echo "FAILED: there are $count objects"; exit 1; }
LC_ALL=C sort "$work/functions" | uniq -d | c++filt >"$work/shared"
if [ -s "$work/shared" ]; then
    echo "FAILED: functions that several objects have:"
    cat "$work/shared"
    exit 1
fi
echo "$(wc -l <"$work/functions") functions in $count objects, none of them shared"

# Functions whose names bear no tag of a higher instruction set, but which have its instructions (VEX, EVEX and BMI encodings). Also says
# whether there are such instructions at all.
objdump -d --no-show-raw-insn "$library" | awk '
    /^[0-9a-f]+ <.*>:$/ { name = $2; tagged = name ~ /4avx2|6avx512/; functions++; next }
    $2 ~ /^v/ && $2 !~ /^v(err|erw|m[a-z]+)$/ || $0 ~ /%[yz]mm|%k[0-7]/ ||
    $2 ~ /^(andn|bextr|blsi|blsmsk|blsr|bzhi|mulx|pdep|pext|rorx|sarx|shlx|shrx|lzcnt|movbe|popcnt)[lqw]?$/ {
        if (tagged) seen++
        else if (!(name in bad)) { bad[name] = 1; print name " " $0 }
    }
    END { if (functions < 100 || !seen) print "no instruction of a higher set was found anywhere" }' >"$work/foreign"
if [ -s "$work/foreign" ]; then
    echo "FAILED: instructions of a higher set where every processor comes by:"
    cat "$work/foreign"
    exit 1
fi
echo "instructions of AVX2 are where they should be"

case $qemu in
    '' | *-NOTFOUND) echo "no qemu-x86_64 is installed: nothing was run on a processor without AVX2" ;;
    *)
        for group in codec attention files; do
            "$qemu" -cpu Nehalem "$program" $group | tee "$work/output"
            grep -q ' 0 failed, on sse2$' "$work/output" || { echo "FAILED: $group on Nehalem"; exit 1; }
        done
        ;;
esac
