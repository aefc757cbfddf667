#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# variant.sh <name> <compiler> <target> [flags]: compiles record_digest.cpp without warnings, exceptions and RTTI, runs it where
# this machine can, and leaves the digests in records/<name>.txt. Exit code 77: skipped, or compiled but not run.
# <target> is a level of x86-64, one of those after windows-, native, aarch64, i686, s390x or riscv64.
set -eu
here=$(CDPATH= cd -- "$(dirname -- "$0")" && pwd)
name=$1 compiler=$2 target=$3
shift 3
mkdir -p "$KVARN_WORK/records"
out=$KVARN_WORK/records/$name
rm -f "$out" "$out.txt"
trap 'rm -rf "$out" "$out.o" "$out.probe" "$out.crlf" "$out.moved"' EXIT

skip() {
    echo "$*"
    exit 77
}
on_request='KVARN_WINDOWS=1 sh tests/run.sh installs it'
case $target in
    # Clang too needs MinGW's libraries.
    windows-*) [ -n "${KVARN_MINGW_GXX:-}" ] || skip "no MinGW-w64 is installed ($on_request): skipped" ;;
esac
case $compiler in
    '' | *-NOTFOUND) skip "no compiler for $name is installed: skipped" ;;
esac
clang=
case $("$compiler" --version) in
    *clang*) clang=1 ;;
esac

level=${target#windows-}
flags=-march=$level
run= needs= link=
case $level in
    aarch64) flags='-march=armv8-a -static' run=${KVARN_QEMU_AARCH64:-none} ;;
    s390x) flags=-static run=${KVARN_QEMU_S390X:-none} ;;
    riscv64) flags=-static run=${KVARN_QEMU_RISCV64:-none} ;;
    i686)
        # Without Debian's gcc-multilib, which bears no cross compiler beside it, the kernel's headers are not in the compiler's path.
        flags="-m32 -msse2 -mfpmath=sse -static -march=i686"
        [ ! -d /usr/include/x86_64-linux-gnu ] || flags="$flags -idirafter /usr/include/x86_64-linux-gnu"
        printf '#include <string>\nint main() {}\n' | "$compiler" $flags -x c++ - -o "$out.probe" 2>/dev/null ||
            skip "$compiler has no 32-bit libraries: skipped"
        # The x87 unit computes with excess precision.
        printf '#include <kvarn/kvarn.hpp>\n' |
            "$compiler" -std=c++20 $flags -mfpmath=387 -fsyntax-only -I "$KVARN_INCLUDE" -x c++ - 2>&1 |
            grep -q 'error.*excess precision' || { echo "FAILED: the x87 unit was not refused"; exit 1; }
        # A kernel may be built without support for 32-bit programs.
        "$out.probe" 2>/dev/null || run=${KVARN_QEMU_I386:-none}
        ;;
    x86-64-v2) needs='cx16 popcnt sse4_1 sse4_2 ssse3' ;;
    x86-64-v3) needs='avx avx2 bmi1 bmi2 f16c fma movbe' ;;
    x86-64-v4)
        # GCC 12 warns about its own AVX-512 intrinsics (GCC bug 105593).
        [ -n "$clang" ] || flags="$flags -Wno-uninitialized -Wno-maybe-uninitialized"
        needs='avx512f avx512bw avx512cd avx512dq avx512vl'
        ;;
esac
case " $* " in
    *' -mavx512vnni '*) needs="$needs avx512_vnni" ;;
esac
if [ "$target" != "$level" ]; then
    flags="$flags -static" run=${KVARN_WINE:-none}
    if [ -n "$clang" ]; then
        # Clang knows neither every folder that a distribution gives MinGW's GCC, nor which libraries that one links.
        library=$("$KVARN_MINGW_GXX" -print-file-name=include/c++)
        flags="--target=x86_64-w64-mingw32 $flags -isystem $library -isystem $library/x86_64-w64-mingw32 -Wno-unused-command-line-argument"
        link=$KVARN_MINGW_GXX
    else
        # As kvarn_add_kernels does.
        case $level in
            x86-64-v[34]) flags="$flags -Wa,-muse-unaligned-vector-move" ;;
        esac
    fi
fi

"$compiler" -std=c++20 -fno-exceptions -fno-rtti -Wall -Wextra -Wconversion -Wshadow -Werror $flags "$@" \
    -I "$KVARN_INCLUDE" -isystem "$KVARN_ISOLATED" -c "$here/record_digest.cpp" -o "$out.o"
"${link:-$compiler}" $([ -n "$link" ] && echo -static || echo $flags) "$out.o" -o "$out"
[ ! -f "$out.exe" ] || mv "$out.exe" "$out"

[ "$level" != "$(uname -m)" ] || run=
[ "$run" != none ] || case $target in
    windows-*) skip "no Wine is installed ($on_request): compiled, not run" ;;
    *) skip "no emulator for $target is installed: compiled, not run" ;;
esac
for feature in $needs; do
    grep -q -w -m 1 "$feature" /proc/cpuinfo || skip "this processor has no $feature: compiled, not run"
done
failed=0
if [ "$target" = "$level" ]; then
    $run "$out" >"$out.txt" || failed=1
else
    . "$here/wine.sh"
    wine_start "$out.prefix"
    "$run" "$out" >"$out.crlf" || failed=1
    tr -d '\r' <"$out.crlf" >"$out.txt"
    "$run" "$out" moved >"$out.moved" || failed=1
    cmp "$out.crlf" "$out.moved" || failed=1
    wine_stop
fi
grep -B 1 '^ ' "$out.txt" || :
tail -n 1 "$out.txt"
grep -q '^0 failures$' "$out.txt" || failed=1
exit $failed
