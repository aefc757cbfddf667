#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# docs.sh c|rust <compiler> <include folder> <shared library> <work folder>: the program in docs/c-api.md compiles as it is printed, without
# warnings, and runs. Exit code 77: skipped.
set -eu
here=$(CDPATH= cd -- "$(dirname -- "$0")" && pwd)
language=$1 compiler=$2 include=$3 library=$4 work=$5
case $compiler in '' | *-NOTFOUND) echo "there is no compiler for $language: skipped"; exit 77 ;; esac
"$compiler" --version | head -n 1
mkdir -p "$work"
folder=$(dirname "$library")
# The blocks of that language, one after the other.
awk -v begin="\`\`\`$language" '$0 == begin { inside = 1; next } /^```$/ { inside = 0 } inside' "$here/../../docs/c-api.md" >"$work/program.$language"
grep -q main "$work/program.$language" || { echo "FAILED: docs/c-api.md has no program in $language"; exit 1; }
case $language in
    c)
        "$compiler" -std=c11 -O1 -Wall -Wextra -Wpedantic -Wconversion -Wshadow -Werror -I "$include" "$work/program.c" "$library" -lm \
            -o "$work/program_c"
        ;;
    rust)
        ln -sf "$library" "$work/libkvarn_c.so"
        "$compiler" --edition 2021 -D warnings -L "$work" -C link-arg=-Wl,-rpath,"$folder" -o "$work/program_rust" "$work/program.rust"
        ;;
esac
LD_LIBRARY_PATH=$folder "$work/program_$language" | tee "$work/output_$language"
grep -q '^ok' "$work/output_$language" || { echo "FAILED: it does not end well"; exit 1; }
