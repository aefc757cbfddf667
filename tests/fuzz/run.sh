#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# Long runs: `sh tests/fuzz/run.sh [<seconds>s | <executions>] [target ...]`, 600s and all targets unless said otherwise; each target gets
# the whole time or number. Corpora stay in the build folder and grow from run to run; executions are counted there.
#   CXX              a Clang (default: clang++)
#   KVARN_FUZZ_DIR   the build folder (default: build-fuzz)
#   KVARN_JOBS       how many processes fuzz at once (default: all cores)
#   KVARN_FUZZ_CMAKE further arguments for cmake: -DKVARN_FUZZ_MARCH=x86-64-v4
set -eu
here=$(CDPATH= cd -- "$(dirname -- "$0")" && pwd)
root=$(CDPATH= cd -- "$here/../.." && pwd)
folder=${KVARN_FUZZ_DIR:-$root/build-fuzz}
jobs=${KVARN_JOBS:-$(getconf _NPROCESSORS_ONLN 2>/dev/null || echo 2)}
amount=${1:-600s}
[ $# = 0 ] || shift
KVARN_JOBS=$jobs sh "$here/build.sh" "${CXX:-clang++}" "$folder" ${KVARN_FUZZ_CMAKE:-}

[ $# != 0 ] || set -- $(ls "$folder/seeds.d")
each=$((jobs / $# > 1 ? jobs / $# : 1))  # processes of one target
case $amount in
    *s) limit="-max_total_time=${amount%s}" ;;
    *) limit="-runs=$(((amount + each - 1) / each))" ;;
esac
for number in $(seq "$each"); do
    printf "%s $number\n" "$@"
done | xargs -n 2 -P "$jobs" sh "$here/one.sh" "$folder" "$limit"

echo "executions in $folder so far:"
awk '{ n[$1] += $2; all += $2 } END { for (t in n) printf "  %-12s %15d\n", t, n[t]; printf "  %-12s %15d\n", "all", all }' "$folder/executions.txt" | sort
if [ -n "$(find "$folder/found" -type f)" ]; then
    echo "inputs that fail are in $folder/found"
    exit 1
fi
