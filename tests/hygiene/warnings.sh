#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# warnings.sh <name> <compiler> [flags]: a consumer's file that instantiates everything (every_function.cpp) compiles without a warning.
# Only parsed, which shows all that the language's rules have to say; with GCC the rotation is also optimised, because there a warning
# about array bounds once came from. Exit code 77: skipped.
#
# Not asked for, because no change to the headers would help:
# -Wsign-conversion with GCC: it warns about every array whose bound is a template parameter of type int, used in a template.
# -Wuseless-cast where size_t has 32 bits: a cast to it is useless there and needed elsewhere.
set -eu
here=$(CDPATH= cd -- "$(dirname -- "$0")" && pwd)
name=$1 compiler=$2
shift 2
case $compiler in
    '' | *-NOTFOUND) echo "no compiler for $name is installed: skipped"; exit 77 ;;
esac
version=$("$compiler" --version)
echo "$version" | head -n 1

if ! printf '#include <string>\n' | "$compiler" "$@" -std=c++20 -fsyntax-only -x c++ - 2>/dev/null; then
    echo "$compiler $* has no standard library: skipped"
    exit 77
fi

defined() { # <macro> [flags]
    macro=$1
    shift
    echo | "$compiler" "$@" -dM -E -x c++ - | grep -q " $macro "
}
strict='-Wall -Wextra -Wpedantic -Wconversion -Wshadow -Wold-style-cast -Wdouble-promotion -Wundef -Wnon-virtual-dtor -Wcast-qual
    -Wunused -Wextra-semi -Wredundant-decls -Wformat=2 -Werror'
clang=
case $version in
    *clang*) clang=1 strict="$strict -Wsign-conversion -Wcomma" ;;
    *)
        strict="$strict -Wlogical-op -Wduplicated-cond -Wduplicated-branches"
        ! defined __SIZEOF_INT128__ "$@" || strict="$strict -Wuseless-cast"
        ;;
esac
first= last=
! defined _WIN32 "$@" || first='#include <windows.h>' last='#include <intrin.h>'
sets=default
! defined __x86_64__ "$@" || sets='-march=x86-64 -march=x86-64-v3 -march=x86-64-v4 -march=sapphirerapids'

# A template's body is looked at, and a warning is an error.
if printf 'template <class T> short narrow(T x) { return x; }\ntemplate short narrow(int);\n' |
    "$compiler" "$@" -std=c++20 -fsyntax-only $strict -x c++ - 2>/dev/null; then
    echo "FAILED: a warning in an instantiation would not be noticed"
    exit 1
fi

failed=0
for set in $sets; do
    [ "$set" != default ] || set=
    printf '%s\n#include "%s"\n%s\n' "$first" "$here/every_function.cpp" "$last" |
        "$compiler" "$@" $set -std=c++20 -fsyntax-only $strict -I "$KVARN_INCLUDE" -isystem "$KVARN_ISOLATED" -x c++ - || {
        echo "FAILED: $* $set"
        failed=1
    }
    # On the other targets the rotation is the same.
    [ -n "$set" ] && [ -z "$clang$first" ] || continue
    printf '#include <kvarn/rotate/hadamard.hpp>\nnamespace kvarn {\n' >"$KVARN_WORK/rotation_$name.cpp"
    for type in float half bfloat16; do
        printf 'template status rotate(kv_view<%s>) noexcept;\ntemplate status unrotate(kv_view<%s>) noexcept;\n' $type $type
    done >>"$KVARN_WORK/rotation_$name.cpp"
    echo '}' >>"$KVARN_WORK/rotation_$name.cpp"
    # The flags are for GCC 12, which warns about its own AVX-512 intrinsics (GCC bug 105593).
    "$compiler" "$@" $set -std=c++20 -O3 -Wall -Wextra -Werror -Wno-uninitialized -Wno-maybe-uninitialized -I "$KVARN_INCLUDE" \
        -isystem "$KVARN_ISOLATED" -S "$KVARN_WORK/rotation_$name.cpp" -o /dev/null || {
        echo "FAILED: the rotation with $* $set"
        failed=1
    }
done
[ "$failed" = 1 ] || echo "no warning:$(printf ' %s' $sets)"
exit $failed
