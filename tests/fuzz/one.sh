#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# one.sh <folder> <limit> <target> <number>: one process of a long run, for run.sh. Adds what it executed to <folder>/executions.txt.
set -eu
here=$(CDPATH= cd -- "$(dirname -- "$0")" && pwd)
folder=$1 limit=$2 target=$3 log=$1/logs/$3-$4.txt
. "$here/options.sh"

corpus=$folder/corpus/$target found=$folder/found/$target
mkdir -p "$corpus" "$found" "$folder/logs"
regressions=$here/regressions/$target
[ -d "$regressions" ] || regressions=
failed=0
"$folder/$target" "$corpus" "$folder/seeds.d/$target" ${regressions:+"$regressions"} $(options_of "$target") \
    "$limit" "-artifact_prefix=$found/" >"$log" 2>&1 || failed=1
count=$(sed -n 's/^stat::number_of_executed_units: *//p' "$log")
echo "$target ${count:-0}" >>"$folder/executions.txt"
echo "$target: ${count:-0} executions, $(grep -E -o 'cov: [0-9]+ ft: [0-9]+' "$log" | tail -n 1)"
[ $failed = 0 ] || {
    grep -E -m 3 'violated|ERROR|runtime error' "$log" || :
    echo "FOUND by $target: see $log and $found"
}
