#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# headers_alone.sh <compiler>: every public header compiles alone and twice, without exceptions and RTTI, without warnings.
set -eu
compiler=$1
case $compiler in
    '' | *-NOTFOUND) echo "this compiler is not installed: skipped"; exit 77 ;;
esac
"$compiler" --version | head -n 1
# Without and with the instruction sets that change what the headers declare.
case $(uname -m) in
    x86_64) sets='-march=x86-64 -march=sapphirerapids' ;;
    *) sets='-march=native' ;;
esac
failed=0 count=0
cd "$KVARN_INCLUDE"
for set in $sets; do
    for header in $(find kvarn -name '*.hpp' | LC_ALL=C sort); do
        eigen= plain='-fno-exceptions -fno-rtti'
        case $set:$header in
            # These are parts of simd/xsimd.hpp, which includes the one that fits.
            -march=x86-64:kvarn/simd/x86*.hpp) continue ;;
            -march=[xs]*:kvarn/simd/neon*.hpp | -march=native:kvarn/simd/x86*.hpp | -march=native:kvarn/simd/sse2*.hpp) continue ;;
            *:kvarn/interop/eigen*) eigen="-isystem $KVARN_EIGEN" ;;
            *:kvarn/interop/throwing*) plain= ;;
        esac
        count=$((count + 1))
        printf '#include <%s>\n#include <%s>\nint main() {}\n' "$header" "$header" |
            "$compiler" -std=c++20 $set -fsyntax-only $plain -Wall -Wextra -Wpedantic -Wconversion -Wshadow -Werror \
                -I "$KVARN_INCLUDE" -isystem "$KVARN_ISOLATED" $eigen -x c++ - || {
            echo "FAILED: $header with $set"
            failed=1
        }
    done
done
echo "$count compilations"
[ "$count" -gt 0 ] || failed=1
exit $failed
