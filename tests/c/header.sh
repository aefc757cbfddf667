#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# header.sh <C compiler> <C++ compiler> <include folder> <work folder>: kvarn.h alone, twice, and every _INIT of it, in all C and C++ since
# C11 and C++11, without a warning. Exit code 77: skipped.
set -eu
cc=$1 cxx=$2 include=$3 work=$4
for compiler in "$cc" "$cxx"; do
    case $compiler in '' | *-NOTFOUND) echo "this compiler is not installed: skipped"; exit 77 ;; esac
done
"$cc" --version | head -n 1
mkdir -p "$work"
{
    echo '#include <kvarn/c/kvarn.h>'
    echo '#include <kvarn/c/kvarn.h>'
    echo 'int use(void);'
    echo 'int use(void)'
    echo '{'
    for init in $(sed -n 's/^#define \(KVARN_[A-Z_]*_INIT\).*/\1/p' "$include/kvarn/c/kvarn.h"); do
        type=$(echo "${init%_INIT}" | tr 'A-Z' 'a-z')
        printf '    %s %s_ = %s;\n    (void)%s_;\n' "$type" "$type" "$init" "$type"
    done
    echo '    return KVARN_OK;'
    echo '}'
} >"$work/use.c"
count=$(grep -c '_INIT;' "$work/use.c")
structs=$(grep -c '^    size_t size;$' "$include/kvarn/c/kvarn.h")
# kvarn_view and kvarn_records have an _INIT too, and do not grow.
[ "$count" -eq $((structs + 2)) ] || { echo "FAILED: $structs structs with a size, but $count initialisers"; exit 1; }
cp "$work/use.c" "$work/use.cpp"
common='-Wall -Wextra -Wpedantic -Wconversion -Wsign-conversion -Wshadow -Wundef -Wcast-qual -Wredundant-decls -Werror -fsyntax-only'
tried=0
for standard in c11 c17 gnu11 gnu2x; do
    "$cc" -std=$standard $common -Wstrict-prototypes -Wmissing-prototypes -Wold-style-definition -I "$include" "$work/use.c" || exit 1
    tried=$((tried + 1))
done
for standard in c++11 c++14 c++17 c++20 gnu++20; do
    "$cxx" -std=$standard $common -Wold-style-cast -Wmissing-declarations -I "$include" "$work/use.cpp" || exit 1
    tried=$((tried + 1))
done
# And for who links the static library, or Windows' compilers.
"$cc" -std=c11 $common -DKVARN_C_STATIC -I "$include" "$work/use.c"
echo "$count initialisers, $tried standards"
