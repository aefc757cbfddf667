#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# decode_order.sh <benchmark> <report>: at 16k tokens and one query head per KV head, fewer bits are not slower, and all are faster than
# fp16, with margins for a noisy machine. Exit code 77: skipped, and why.
set -eu
benchmark=$1 report=$2
command -v python3 >/dev/null || { echo "no python3 for bench/report: skipped"; exit 77; }
cases='attention/decode/(fp16|fine)/d128/(k16v16|k4v4|k4v2|k2v2)/r1/n16384/'
if "$benchmark" --benchmark_list_tests=true --benchmark_filter="$cases" | grep -q /portable; then
    echo "portable kernels only: nothing is promised about their speed: skipped"
    exit 77
fi
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
attempt=1
while :; do
    "$benchmark" --benchmark_filter="$cases" --benchmark_enable_random_interleaving=true --benchmark_repetitions=9 \
        --benchmark_min_time=0.05 --benchmark_format=json >"$work/result.json" 2>"$work/messages" || { cat "$work/messages"; exit 1; }
    if python3 "$report" "$work/result.json" --markdown "$work/result.md" --check-order; then
        cat "$work/result.md"
        exit 0
    fi
    cat "$work/result.md"
    [ $attempt -lt 3 ] || exit 1  # a busy machine may spoil one run, not three
    attempt=$((attempt + 1))
done
