#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# multi_isa_windows.sh <cmake> <generator> <MinGW compiler>: examples/multi_isa for Windows, with the flags that kvarn_add_kernels has for
# this compiler. Whether GCC puts a register of 32 bytes where it is not aligned depends on its build, so the code is looked at: it must
# not contain a move that wants alignment. Runs in Wine, and has the bytes that hygiene.multi_isa had. Exit code 77: skipped.
set -eu
here=$(CDPATH= cd -- "$(dirname -- "$0")" && pwd)
cmake=$1 generator=$2 compiler=$3
on_request='KVARN_WINDOWS=1 sh tests/run.sh installs it'
case $compiler in
    '' | *-NOTFOUND) echo "no MinGW-w64 is installed ($on_request): skipped"; exit 77 ;;
esac
work=$KVARN_WORK/multi_isa_windows
rm -rf "$work"
mkdir -p "$work"
cat >"$work/CMakeLists.txt" <<END
cmake_minimum_required(VERSION 3.20)
project(windows LANGUAGES CXX)
add_library(xsimd INTERFACE)
target_include_directories(xsimd INTERFACE "$KVARN_ISOLATED")
add_subdirectory("$here/../.." kvarn)
add_executable(program "$here/../../examples/multi_isa/main.cpp")
target_link_libraries(program PRIVATE kvarn::kvarn)
target_link_options(program PRIVATE -static)
kvarn_add_kernels(program ARCHS sse2 avx2 CACHE)
END
"$cmake" -G "$generator" -S "$work" -B "$work/build" -DCMAKE_SYSTEM_NAME=Windows -DCMAKE_SYSTEM_PROCESSOR=x86_64 \
    -DCMAKE_CXX_COMPILER="$compiler" -DCMAKE_BUILD_TYPE=Release -DCMAKE_CXX_FLAGS_RELEASE=-O1 -DCMAKE_EXPORT_COMPILE_COMMANDS=ON >"$work/configure.log" || {
    cat "$work/configure.log"
    exit 1
}
"$cmake" --build "$work/build"

failed=0
flags() { grep '"command"' "$work/build/compile_commands.json" | grep "kvarn_$1.cpp" | grep -c -e -muse-unaligned-vector-move || :; }
[ "$(flags sse2) $(flags avx2)" = "0 1" ] || { echo "FAILED: the flag of the assembler is missing, or everywhere"; failed=1; }

dump=${compiler%-g++*}-objdump
aligned() { "$dump" -d --no-show-raw-insn "$1" | grep -E 'vmov(aps|apd|dqa|dqa32|dqa64) ' | grep '[yz]mm' | grep -c '(' || :; }
object=$(find "$work/build" -name 'kvarn_avx2.cpp.obj*')
"$dump" -d "$object" | grep -q ymm || { echo "FAILED: no code for AVX2 in $object"; failed=1; }
[ "$(aligned "$object")" = 0 ] || { echo "FAILED: $(aligned "$object") moves that want alignment"; failed=1; }
# They would be found.
printf '.text\nf: vmovaps %%ymm0, 16(%%rsp)\n' | "$compiler" -x assembler -c - -o "$work/move.o"
[ "$(aligned "$work/move.o")" = 1 ] || { echo "FAILED: an aligned move is not seen"; failed=1; }
printf '.text\nf: vmovaps %%ymm0, 16(%%rsp)\n' | "$compiler" -Wa,-muse-unaligned-vector-move -x assembler -c - -o "$work/move.o"
[ "$(aligned "$work/move.o")" = 0 ] || { echo "FAILED: the flag leaves an aligned move"; failed=1; }
[ "$failed" = 0 ] || exit 1

[ -n "$KVARN_WINE" ] || { echo "no Wine is installed ($on_request): compiled, not run"; exit 77; }
digests() { tr -d '\r' <"$1" | awk '$1 == "dispatched" { print $5, $6 }'; }
expected=$(digests "$KVARN_WORK/multi_isa/output.txt")
[ -n "$expected" ] || { echo "FAILED: hygiene.multi_isa left no output"; exit 1; }
sets=sse2
! grep -q -w -m 1 avx2 /proc/cpuinfo || sets="sse2 avx2"
. "$here/wine.sh"
wine_start "$work/prefix"
for set in $sets; do
    "$KVARN_WINE" "$work/build/program.exe" 0 $set >"$work/$set.txt" || { echo "FAILED: exit code $? with $set"; failed=1; }
    cat "$work/$set.txt"
    grep -q "^dispatched *$set " "$work/$set.txt" || { echo "FAILED: $set did not run"; failed=1; }
    [ "$(digests "$work/$set.txt")" = "$expected" ] || { echo "FAILED: other bytes than on this machine: $expected"; failed=1; }
done
wine_stop
exit $failed
