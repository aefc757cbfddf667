#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# compile_fail.sh <source> <include> <xsimd include> <compiler> ...
set -eu
source=$1 include=$2 xsimd=$3
shift 3
expect=$(sed -n 's|^// expect: ||p' "$source")
flags=$(sed -n 's|^// flags: ||p' "$source")
[ -n "$expect" ] || { echo "$source has no line // expect:"; exit 1; }

for compiler in "$@"; do
    case $compiler in
        '' | *-NOTFOUND) continue ;;
    esac
    compile() { "$compiler" -std=c++20 -fsyntax-only -I "$include" -isystem "$xsimd" "$@" "$source" 2>&1; }
    if ! log=$(compile); then
        echo "$compiler refuses the control, which is right:"
        echo "$log"
        exit 1
    fi
    # One flag at a time: each alone must be refused.
    for flag in ${flags:--DKVARN_MUST_FAIL}; do
        if log=$(compile -DKVARN_MUST_FAIL "$flag"); then
            echo "$compiler $flag accepts $source"
            exit 1
        fi
        if ! printf '%s\n' "$log" | grep -E -q -- "$expect"; then
            echo "$compiler $flag refuses $source, but not with: $expect"
            echo "$log"
            exit 1
        fi
        echo "$compiler $flag: refused as expected"
    done
done
