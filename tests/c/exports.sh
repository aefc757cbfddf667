#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# exports.sh <shared library> <kvarn.h> <work folder>: the library exports what the header declares and functions.txt lists, no more and no
# less, all of one version; it needs no function of the C++ library or of the unwinder, and no library but the C library's. Exit code 77: skipped.
set -eu
here=$(CDPATH= cd -- "$(dirname -- "$0")" && pwd)
library=$1 header=$2 work=$3
for tool in nm readelf; do
    command -v $tool >/dev/null 2>&1 || { echo "there is no $tool: skipped"; exit 77; }
done
mkdir -p "$work"
failed=0

nm -D --defined-only "$library" | awk '$2 != "A" { print $3 }' | LC_ALL=C sort >"$work/exported"
abi=$(sed -n 's/^#define KVARN_C_ABI \([0-9]*\)$/\1/p' "$header")
if grep -v "@@KVARN_$abi\$" "$work/exported"; then
    echo "FAILED: these have no version KVARN_$abi"
    failed=1
fi
sed 's/@.*//' "$work/exported" >"$work/names"
# Declarations begin a line with KVARN_C_API; what follows may be on the next lines.
tr '\n' ' ' <"$header" | sed 's/KVARN_C_API /\
&/g' | sed -n 's/^KVARN_C_API [^(;]*[ *]\(kvarn_[a-z0-9_]*\)(.*/\1/p' | LC_ALL=C sort >"$work/declared"
for list in "$work/declared" "$here/functions.txt"; do
    diff "$list" "$work/names" || { echo "FAILED: $list (<) and what the library exports (>) differ"; failed=1; }
done
echo "$(wc -l <"$work/names") functions, $(wc -c <"$library") bytes"

nm -D --undefined-only "$library" | awk '$1 == "U" { print $2 }' >"$work/needed"
if grep -E '^(_Z|__cxa_|__gxx_|_Unwind)' "$work/needed"; then
    echo "FAILED: functions of the C++ library"
    failed=1
fi
readelf -d "$library" | sed -n 's/.*(NEEDED).*\[\(.*\)\]/\1/p' >"$work/libraries"
if grep -v -E '^(lib[cm]|ld-linux[a-z0-9-]*|ld64|libgcc_s)\.so' "$work/libraries"; then
    echo "FAILED: libraries that it should not need"
    failed=1
fi
echo "needs $(tr '\n' ' ' <"$work/libraries"), of them $(tr '\n' ' ' <"$work/needed")"
readelf -d "$library" | grep -q "(SONAME).*\.so\.$abi\]" || { echo "FAILED: the soname does not end with .so.$abi"; failed=1; }
exit $failed
