#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# threads.sh <compiler>: threads.cpp with ThreadSanitizer: without a report as it is, with one where it is given a race.
set -eu
here=$(CDPATH= cd -- "$(dirname -- "$0")" && pwd)
compiler=$1 work=$KVARN_WORK/threads
mkdir -p "$work"

case $(uname -m) in
    x86_64) grep -q -w -m 1 avx2 /proc/cpuinfo && march=-march=x86-64-v3 || march= ;;
    *) march=-march=native ;;
esac
echo 'int main() {}' | "$compiler" -fsanitize=thread -x c++ - -o "$work/probe" 2>/dev/null || {
    echo "$compiler has no ThreadSanitizer: skipped"
    exit 77
}
# Where addresses are randomised by more bits than the runtime knows of, it needs them fixed.
run=
if ! "$work/probe" 2>"$work/probe.txt"; then
    run="setarch $(uname -m) -R"
    $run "$work/probe" 2>>"$work/probe.txt" || {
        cat "$work/probe.txt"
        echo "ThreadSanitizer does not run here: skipped"
        exit 77
    }
fi

"$compiler" -std=c++20 -O1 -g1 $march -fsanitize=thread -pthread -I "$KVARN_INCLUDE" -I "$here/../.." -isystem "$KVARN_ISOLATED" \
    "$here/threads.cpp" -o "$work/threads"
TSAN_OPTIONS=halt_on_error=1 $run "$work/threads"

if $run "$work/threads" race >"$work/race.txt" 2>&1 || ! grep -q 'WARNING: ThreadSanitizer: data race' "$work/race.txt"; then
    cat "$work/race.txt"
    echo "an injected race was not found"
    exit 1
fi
echo "an injected race was found"
