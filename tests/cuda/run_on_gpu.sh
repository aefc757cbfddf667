#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# run_on_gpu.sh [<build folder> [quick]]: the first run on a card in one command. Configures, builds, runs the kernels' tests on
# the GPU, under compute-sanitizer's memcheck and racecheck where it is installed, the example, and the benchmark, beside it
# PyTorch's attention where that is installed. Needs nvcc, CMake and what the tests need. Results also go to
# <build folder>/gpu_*.txt and gpu_*.json. Exit status: 0 if everything passed; 77 without a GPU.
# KVARN_GPU_ARCHITECTURES: CMAKE_CUDA_ARCHITECTURES, by default those of the cards at hand.
set -u
source=$(cd "$(dirname "$0")/../.." && pwd)
build=${1:-$source/build-cuda} mode=${2:-}
jobs=$(getconf _NPROCESSORS_ONLN 2>/dev/null || echo 2)
arch='80-real;90'
if command -v nvidia-smi >/dev/null 2>&1; then arch=native; fi
arch=${KVARN_GPU_ARCHITECTURES:-$arch}
cmake -S "$source" -B "$build" -DKVARN_CUDA=ON -DCMAKE_BUILD_TYPE=Release -DCMAKE_CUDA_ARCHITECTURES="$arch" \
    -DKVARN_BUILD_TESTS=ON -DKVARN_BUILD_BENCHMARKS=ON -DKVARN_BUILD_EXAMPLES=ON || exit 1
cmake --build "$build" -j "$jobs" --target kvarn_cuda_device_tests kvarn_cuda_bench kvarn_cuda_decode || exit 1

tests=$build/tests/cuda/kvarn_cuda_device_tests failed=''
# step <name> <command> ...: runs it, keeps its output.
step() {
    name=$1
    shift
    echo "== $name"
    "$@" >"$build/gpu_$name.txt" 2>&1
    code=$?
    tail -n "${lines:-8}" "$build/gpu_$name.txt"
    if [ $code -eq 77 ] && [ "$name" != sdpa ]; then
        exit 77
    elif [ $code -eq 77 ]; then
        echo "skipped: $name"
    elif [ $code -ne 0 ]; then
        echo "FAILED: $name, exit status $code"
        failed="$failed $name"
    fi
}
step tests "$tests"
if command -v compute-sanitizer >/dev/null 2>&1; then
    step memcheck compute-sanitizer --tool memcheck --error-exitcode 9 "$tests"
    step racecheck compute-sanitizer --tool racecheck --error-exitcode 9 "$tests" "~[golden]"
else
    echo "== compute-sanitizer is not installed: memcheck and racecheck skipped"
fi
step example "$build/examples/cuda_decode/kvarn_cuda_decode"
lines=400 step bench "$build/bench/cuda/kvarn_cuda_bench" $mode --json "$build/gpu_bench.json"
if python3 -c 'import torch' >/dev/null 2>&1; then
    lines=400 step sdpa python3 "$source/bench/cuda/sdpa.py" $mode --json "$build/gpu_sdpa.json"
else
    echo "== PyTorch is not installed: its attention is not measured"
fi
if [ -n "$failed" ]; then
    echo "failed:$failed"
    exit 1
fi
echo 'all passed'
