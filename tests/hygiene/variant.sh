#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# variant.sh <name> <compiler> <isa> [flags]: compiles record_digest.cpp without warnings, exceptions and RTTI, runs it where
# this machine can, and leaves the digests in records/<name>.txt. Exit code 77: skipped, or compiled but not run.
set -eu
here=$(CDPATH= cd -- "$(dirname -- "$0")" && pwd)
name=$1 compiler=$2 isa=$3
shift 3
mkdir -p "$KVARN_WORK/records"
out=$KVARN_WORK/records/$name
rm -f "$out" "$out.txt"

case $compiler in
    '' | *-NOTFOUND) echo "no compiler for $name is installed: skipped"; exit 77 ;;
esac

run= failed=0
flags="-march=$isa"
needs=
case $isa in
    aarch64) flags="-march=armv8-a -static" run=$KVARN_QEMU_AARCH64 ;;
    x86-64-v2) needs='cx16 popcnt sse4_1 sse4_2 ssse3' ;;
    x86-64-v3) needs='avx avx2 bmi1 bmi2 f16c fma movbe' ;;
    x86-64-v4)
        # GCC 12 warns about its own AVX-512 intrinsics (GCC bug 105593).
        case $("$compiler" --version) in
            *clang*) ;;
            *) flags="$flags -Wno-uninitialized -Wno-maybe-uninitialized" ;;
        esac
        needs='avx512f avx512bw avx512cd avx512dq avx512vl'
        ;;
esac

"$compiler" -std=c++20 -fno-exceptions -fno-rtti -Wall -Wextra -Wconversion -Wshadow -Werror $flags "$@" \
    -I "$KVARN_INCLUDE" -isystem "$KVARN_ISOLATED" "$here/record_digest.cpp" -o "$out"

if [ "$isa" = aarch64 ] && [ "$(uname -m)" != aarch64 ] && [ -z "$run" ]; then
    echo "no qemu-aarch64: compiled, not run"
    exit 77
fi
for feature in $needs; do
    grep -q -w -m 1 "$feature" /proc/cpuinfo || {
        echo "this processor has no $feature: compiled, not run"
        exit 77
    }
done
$run "$out" >"$out.txt" || failed=1
grep -B 1 '^ ' "$out.txt" || :
tail -n 1 "$out.txt"
rm -f "$out"
exit $failed
