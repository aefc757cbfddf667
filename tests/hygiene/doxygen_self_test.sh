#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# doxygen_self_test.sh <doxygen> <repository>: reference.sh accepts documented headers and finds each kind of mistake. Exit code 77: no Doxygen.
set -eu
doxygen=$1 root=$2
command -v "$doxygen" >/dev/null 2>&1 || {
    echo "no Doxygen (Debian and Ubuntu: doxygen)"
    exit 77
}
tree=$KVARN_WORK/doxygen_self_test
failed=0

# case_of <ok|bad> <line of a header in namespace kvarn> [line of the landing page]
case_of() {
    rm -rf "$tree"
    mkdir -p "$tree/include/kvarn" "$tree/docs"
    cp "$root/docs/Doxyfile" "$root/docs/namespaces.dox" "$tree/docs"
    for page in CONTRIBUTING SECURITY CHANGELOG; do echo "# $page" >"$tree/$page.md"; done
    printf '# Documents\n%s\n' "${3-text}" >"$tree/docs/README.md"
    printf '#pragma once\nnamespace kvarn {\n/// In its place.\nKVARN_INLINE int good();\n%b\nnamespace detail {\nint internal();\n}\n}\n' "$2" >"$tree/include/kvarn/a.hpp"
    mkdir -p "$tree/include/kvarn/c"
    printf "/// In C.\nint kvarn_good(void);\n" >"$tree/include/kvarn/c/kvarn.h"
    if sh "$root/cmake/reference.sh" "$doxygen" "$tree" "$tree/out" >"$tree.log" 2>&1; then found=ok; else found=bad; fi
    if [ "$found" != "$1" ]; then
        echo "expected $1, got $found: $2 ${3-}"
        cat "$tree.log"
        failed=1
    fi
}

case_of ok ''
case_of ok '/// A type.\nstruct good_one {\n    int member = 0;\n};'
case_of bad 'int function();'
case_of bad 'KVARN_INLINE int function();'
case_of bad 'struct type {\n    int member = 0;\n};'
case_of bad 'inline constexpr int number = 3;'
case_of bad 'using other = int;'
case_of bad '/// As \\ref nowhere says.\nint function();'
case_of bad '/// An \\unknown command.\nint function();'
case_of bad '' 'A [page](nowhere.md).'
exit $failed
