#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# All variants that ran printed the same digests for the cases that they share.
set -eu
cd "$KVARN_WORK/records"
count=0
for file in *.txt; do
    [ ! -f "$file" ] || count=$((count + 1))
done
if [ "$count" -lt 2 ]; then
    echo "fewer than two variants ran: nothing was compared"
    exit 1
fi
# A line is `<case>: <digests>`; variants may leave cases out.
awk -F ': ' '
/failures$/ || /^ / { next }
{
    lines++
    if (!($1 in first)) { first[$1] = $2; where[$1] = FILENAME; cases++ }
    else {
        compared++
        if (first[$1] != $2) {
            bad++
            if (bad <= 12) printf "%s\n  %s: %s\n  %s: %s\n", $1, where[$1], first[$1], FILENAME, $2
        }
    }
}
END {
    printf "%d cases, %d comparisons, %d differences\n", cases, compared, bad
    exit bad > 0 || compared == 0
}' gcc_*.txt $(ls | grep '\.txt$' | grep -v '^gcc_')
