#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# compile_cost_self_test.sh <compiler>: compile_cost.sh accepts what is as recorded, and finds more time, more code and missing records.
# A stand-in for the compiler takes about 0.3 s for the library, 0.1 s for the reference, and leaves an object of known size.
set -eu
here=$(CDPATH= cd -- "$(dirname -- "$0")" && pwd)
real=$1
tree=$KVARN_WORK/compile_cost_self_test
rm -rf "$tree"
mkdir -p "$tree"
trap 'rm -rf "$tree"' EXIT
command -v size >/dev/null || { echo 'no program `size` is installed: skipped'; exit 77; }

# The stand-in: `-dumpmachine`, `-dM` and the macros are what the environment says.
printf 'extern "C" const char text[4096];\nextern "C" const char text[4096] = {1};\n' | "$real" -x c++ -c - -o "$tree/text.o"
cat >"$tree/compiler" <<'end'
#!/bin/sh
case "$*" in
    -dumpmachine) echo "$STAND_IN_TARGET"; exit ;;
    *-dM*) echo "#define $STAND_IN_MACRO 12"; exit ;;
    *reference.cpp*) turns=1 ;;
    *) turns=3 ;;
esac
awk -v turns=$turns 'BEGIN { for (i = 0; i < turns * 1000000; ++i) x += i % 7 }'
for last; do :; done
cp "$STAND_IN_OBJECT" "$last"
end
chmod +x "$tree/compiler"
STAND_IN_OBJECT=$tree/text.o
export STAND_IN_OBJECT
text=$(size "$tree/text.o" | awk 'NR == 2 { print $1 }')
failed=0

# case_of <exit code> <words that must appear> <target> <macro> <record>
case_of() {
    echo "$5" >"$tree/records.txt"
    code=0
    STAND_IN_TARGET=$3 STAND_IN_MACRO=$4 sh "$here/compile_cost.sh" "$tree/compiler" "$tree/records.txt" >"$tree/log" 2>&1 || code=$?
    if [ $code != "$1" ] || ! grep -q -- "$2" "$tree/log"; then
        echo "expected exit code $1 and \`$2\`, got $code with the record \`$5\` for $3 and $4:"
        cat "$tree/log"
        failed=1
    fi
}

case_of 0 'round 1:' x86_64-linux-gnu __GNUC__ "gcc 12 x86_64 4 $text"
case_of 1 'FAILED: takes longer' x86_64-linux-gnu __GNUC__ "gcc 12 x86_64 1 $text"
grep -q 'round 3:' "$tree/log" || { echo 'gave up before the third round'; failed=1; }
case_of 1 'FAILED: more code' x86_64-linux-gnu __GNUC__ "gcc 12 x86_64 4 $((text * 7 / 10))"
case_of 0 'recorded 4 (gcc 11)' x86_64-linux-gnu __GNUC__ "gcc 11 x86_64 4 $((text * 6 / 10))"
case_of 1 'FAILED: more code' x86_64-linux-gnu __GNUC__ "gcc 11 x86_64 4 $((text * 4 / 10))"
case_of 77 'no record of clang' x86_64-linux-gnu __clang_major__ "gcc 12 x86_64 4 $text"
case_of 77 'no record of gcc' riscv64-linux-gnu __GNUC__ "gcc 12 x86_64 4 $text"
case_of 77 'no record of compilers' x86_64-w64-mingw32 __GNUC__ "gcc 12 x86_64 4 $text"
case_of 77 'neither GCC nor Clang' x86_64-linux-gnu __other__ "gcc 12 x86_64 4 $text"
exit $failed
