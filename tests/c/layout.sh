#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# layout.sh <program of layout.c> <kvarn.h> <work folder>: sizes and offsets of all structs, and all numbers, are those of layout_64.txt.
# Exit code 77: skipped.
set -eu
here=$(CDPATH= cd -- "$(dirname -- "$0")" && pwd)
program=$1 header=$2 work=$3
mkdir -p "$work"
"$program" >"$work/layout" || exit 1
if ! grep -q '^kvarn_view data 0 8$' "$work/layout"; then
    echo "pointers have not 64 bits here: only padding was checked"
    exit 77
fi
diff "$here/layout_64.txt" "$work/layout" || { echo "FAILED: layout_64.txt (<) and the header (>): docs/c-api.md says what may change"; exit 1; }
# Every struct of the header is there.
sed -n 's/^} \(kvarn_[a-z_]*\);$/\1/p' "$header" | LC_ALL=C sort >"$work/declared"
awk '$2 == "-" { print $1 }' "$work/layout" | LC_ALL=C sort | diff "$work/declared" - || { echo "FAILED: structs of the header (<) and of layout.c (>)"; exit 1; }
echo "$(wc -l <"$work/declared") structs and enumerations, $(wc -l <"$work/layout") lines"
