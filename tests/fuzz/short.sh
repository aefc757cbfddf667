#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# short.sh <folder> <target> <executions>: the short run of CTest, the same each time: seeds and regressions first, then mutations of them.
set -eu
here=$(CDPATH= cd -- "$(dirname -- "$0")" && pwd)
folder=$1 target=$2 executions=$3
if [ -f "$folder/skipped" ]; then
    cat "$folder/skipped"
    exit 77
fi
. "$here/options.sh"

corpus=$folder/short/$target
rm -rf "$corpus"
mkdir -p "$corpus"
regressions=$here/regressions/$target
[ -d "$regressions" ] || regressions=
# The paths have no blanks that would matter to anyone but a shell: the build folder is ours.
"$folder/$target" "$corpus" "$folder/seeds.d/$target" ${regressions:+"$regressions"} $(options_of "$target") \
    -seed=1 "-runs=$executions" -max_total_time=120 "-artifact_prefix=$corpus/../$target-" 2>"$corpus.txt" || {
    tail -n 60 "$corpus.txt"
    exit 1
}
grep -E 'DONE|stat::(number_of_executed_units|average_exec_per_sec|peak_rss_mb)' "$corpus.txt"
done=$(sed -n 's/^stat::number_of_executed_units: *//p' "$corpus.txt")
[ "${done:-0}" -gt 0 ]
