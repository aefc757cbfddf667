#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# One binary for many processors, on the objects of examples/multi_isa.
# multi_isa.sh link <compiler> <object> ...: links them in both orders, with a main file compiled with and without optimisation;
#   all programs print the same, and outside of the functions for AVX2, AVX-512 and their kin there is no instruction of those sets.
# multi_isa.sh emulate: runs these programs on emulated processors without AVX2. Exit code 77: skipped.
set -eu
here=$(CDPATH= cd -- "$(dirname -- "$0")" && pwd)
work=$KVARN_WORK/multi_isa
mode=$1
shift
failed=0

wrong() {
    echo "FAILED: $*"
    failed=1
}

# Functions of a program whose names bear no tag of a higher instruction set, but which have its instructions (VEX, EVEX and
# BMI encodings; tzcnt is also what objdump calls a baseline `rep bsf`). Also says whether there are such instructions at all.
foreign_code() { # <program>
    objdump -d --no-show-raw-insn "$1" | awk '
    /^[0-9a-f]+ <.*>:$/ { name = $2; tagged = name ~ /4avx2|7avxvnni|6avx512|10avx512vnni/; functions++; next }
    $2 ~ /^v/ && $2 !~ /^v(err|erw|m[a-z]+)$/ || $0 ~ /%[yz]mm|%k[0-7]/ ||
    $2 ~ /^(andn|bextr|blsi|blsmsk|blsr|bzhi|mulx|pdep|pext|rorx|sarx|shlx|shrx|lzcnt|movbe|popcnt)[lqw]?$/ {
        if (tagged) seen++
        else if (!(name in bad)) { bad[name] = 1; print name " " $0 }
    }
    END { if (functions < 10 || !seen) print "no instruction of a higher set was found anywhere" }'
}

if [ "$mode" = emulate ]; then
    if [ "$(uname -m)" != x86_64 ]; then
        echo "every AArch64 processor has NEON, other ones have only the portable kernels: skipped"
        exit 77
    fi
    if [ -z "$KVARN_QEMU_X86_64" ]; then
        echo "no qemu-x86_64 is installed: skipped"
        exit 77
    fi
    digests() { awk '$1 == "dispatched" { print $5, $6, $7 }' "$1"; }
    [ -n "$(digests "$work/output.txt")" ] || wrong "hygiene.multi_isa left no output"
    emulated() { # <processor> <required set or any> <program>
        echo "$3 on $1:"
        "$KVARN_QEMU_X86_64" -cpu "$1" "$work/$3" 0 >"$work/emulated.txt" 2>"$work/emulated.log" ||
            wrong "exit code $? $(tail -n 3 "$work/emulated.log")"
        cat "$work/emulated.txt"
        [ "$(digests "$work/emulated.txt")" = "$(digests "$work/output.txt")" ] || wrong "other bytes than on this machine"
        [ "$2" = any ] || grep -q "^dispatched *$2 " "$work/emulated.txt" || wrong "$2 should have been chosen"
    }
    emulated Nehalem sse2 optimised-low-first
    emulated Nehalem sse2 optimised-high-first
    emulated Nehalem sse2 plain-low-first
    emulated Nehalem sse2 plain-high-first
    code=0
    "$KVARN_QEMU_X86_64" -cpu Nehalem "$work/plain-high-first" 0 avx2 || code=$?
    [ "$code" = 3 ] || wrong "avx2 was not refused: exit code $code"
    # AVX2 without the rest of x86-64-v3 is not enough; with it, it is taken if the emulator can do it (QEMU 7.2).
    emulated Haswell,-f16c sse2 plain-high-first
    emulated Haswell,-bmi2 sse2 plain-high-first
    emulated Haswell any plain-high-first
    exit $failed
fi

compiler=$1
shift
rm -rf "$work"
mkdir -p "$work"
own= kernels= reversed= definitions="-DKVARN_KERNELS_HALF -DKVARN_KERNELS_CACHE"
for object in "$@"; do
    case ${object##*/} in
        kvarn_*.cpp.o)
            arch=${object##*/kvarn_} arch=${arch%.cpp.o}
            kernels="$kernels $object" reversed="$object $reversed"
            definitions="$definitions -DKVARN_KERNELS_$(echo "$arch" | tr a-z A-Z)"
            # Every function of such an object bears the tag: none can stand in for one of the same name elsewhere.
            nm -C --defined-only "$object" | awk -v tag="kvarn::simd::$arch" '
                $2 ~ /^[TtWw]$/ { functions++; if (!index($0, tag)) { print; bad = 1 } }
                END { exit bad || !functions }' || wrong "$object defines functions without its tag, or none"
            ;;
        *) own="$own $object" ;;
    esac
done
[ -n "$own" ] && [ -n "$kernels" ] || wrong "objects of the program and of the kernels were expected: $*"

baseline=
[ "$(uname -m)" != x86_64 ] || baseline=-march=x86-64
"$compiler" -std=c++20 -O0 $baseline $definitions -I "$KVARN_INCLUDE" -isystem "$KVARN_ISOLATED" -c \
    "$here/../../examples/multi_isa/main.cpp" -o "$work/plain.o"
"$compiler" $own $kernels -o "$work/optimised-low-first"
"$compiler" $reversed $own -o "$work/optimised-high-first"
"$compiler" "$work/plain.o" $kernels -o "$work/plain-low-first"
"$compiler" $reversed "$work/plain.o" -o "$work/plain-high-first"

for program in optimised-low-first optimised-high-first plain-low-first plain-high-first; do
    "$work/$program" 0 >"$work/$program.txt" || wrong "$program: exit code $?"
    [ -f "$work/output.txt" ] || { cp "$work/$program.txt" "$work/output.txt" && cat "$work/output.txt"; }
    cmp "$work/output.txt" "$work/$program.txt" || wrong "$program prints something else"
    if [ "$(uname -m)" = x86_64 ]; then
        foreign_code "$work/$program" >"$work/foreign.txt"
        [ ! -s "$work/foreign.txt" ] || { cat "$work/foreign.txt" && wrong "$program has code of a higher instruction set in these"; }
    fi
done
code=0
"$work/plain-low-first" 0 sse17 || code=$?
[ "$code" = 3 ] || wrong "an unknown instruction set was not refused: exit code $code"

# The check finds what it is for: a function of the same name in two files, of which the linker takes the wrong one.
if [ "$(uname -m)" = x86_64 ]; then
    cat >"$work/shared.cpp" <<'END'
inline __attribute__((noinline)) void shared(float* x) { for (int i = 0; i < 64; ++i) x[i] *= 2; }
#ifdef KVARN_MAIN
void tagged_4avx2(float*);
int main(int n, char**) { float x[64] = {static_cast<float>(n)}; shared(x); tagged_4avx2(x); return x[0] > 1e9f; }
#else
void tagged_4avx2(float* x) { shared(x); for (int i = 0; i < 64; ++i) x[i] += 1; }
#endif
END
    "$compiler" -O1 -march=x86-64 -DKVARN_MAIN -c "$work/shared.cpp" -o "$work/low.o"
    "$compiler" -O1 -march=x86-64-v3 -c "$work/shared.cpp" -o "$work/high.o"
    "$compiler" "$work/low.o" "$work/high.o" -o "$work/shared-low-first"
    "$compiler" "$work/high.o" "$work/low.o" -o "$work/shared-high-first"
    [ -z "$(foreign_code "$work/shared-low-first")" ] || wrong "the check sees what is not there: $(foreign_code "$work/shared-low-first")"
    foreign_code "$work/shared-high-first" | grep -q shared || wrong "the check does not see a shared function"
fi
exit $failed
