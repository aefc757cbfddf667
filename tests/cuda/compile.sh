#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# compile.sh <nvcc> <include> <work>: every CUDA header alone, then all kernels for sm_80 and sm_90, without warnings; prints
# registers, stack and spills of the kernels, and fails if one spills.
set -eu
nvcc=$1 include=$2 work=$3
"$nvcc" --version | tail -n 2
mkdir -p "$work"
flags='-std=c++20 -Werror all-warnings -Xcompiler -Wall,-Wextra,-Wshadow,-Wconversion,-Werror'
failed=0 count=0
for header in $(cd "$include" && find kvarn/cuda -name '*.cuh' | LC_ALL=C sort); do
    count=$((count + 1))
    printf '#include <%s>\n#include <%s>\n' "$header" "$header" >"$work/alone.cu"
    "$nvcc" $flags -arch=sm_80 -I "$include" -ptx -o "$work/alone.ptx" "$work/alone.cu" || {
        echo "FAILED: $header"
        failed=1
    }
done
echo "$count headers alone"
[ "$count" -gt 0 ] || failed=1

cat >"$work/kernels.cu" <<'SOURCE'
#include <kvarn/cuda/append.cuh>
#include <kvarn/cuda/attention.cuh>
#include <kvarn/cuda/dequantize.cuh>
#include <kvarn/cuda/seal.cuh>
namespace cuda = kvarn::cuda;
kvarn::status run(const kvarn::format& f, const cuda::append_arguments& a, cudaStream_t s) { return cuda::append(f, a, {}, s); }
kvarn::status run(const kvarn::format& f, const cuda::dequantize_arguments& a, cudaStream_t s) { return cuda::dequantize(f, a, s); }
kvarn::status run(const kvarn::format& f, const cuda::attention_arguments& a, cudaStream_t s) { return cuda::attend(f, a, s); }
SOURCE
for arch in 80 90; do
    "$nvcc" $flags -gencode "arch=compute_$arch,code=sm_$arch" -Xptxas -v -I "$include" \
        -c -o "$work/kernels_$arch.o" "$work/kernels.cu" 2>"$work/ptxas_$arch.txt" || {
        cat "$work/ptxas_$arch.txt"
        echo "FAILED: sm_$arch"
        exit 1
    }
    echo "sm_$arch: registers, bytes of stack, of spill stores and of spill loads"
    awk '
    /Compiling entry function/ {
        name = $0
        sub(/.*entry function ._ZN5kvarn4cuda6detail[0-9]+/, "", name)
        # Template arguments: attention_kernel<group, V read from K, with mask or ALiBi>, seal_kernel<tiles in a workspace>.
        what = ""
        if (match(name, /kernelILi[0-9]+/)) {
            what = substr(name, RSTART + 9, RLENGTH - 9)
            if (name ~ /kernelILi[0-9]+ELb1E/) what = what ", latent"
            if (name ~ /ELb[01]ELb1E/) what = what ", general"
        }
        else if (name ~ /kernelILb1E/) what = "workspace"
        sub(/I(NS|Li|Lb).*/, what == "" ? "" : "<" what ">", name)
    }
    /bytes stack frame/ { stack = $1; stores = $5; loads = $9 }
    /Used [0-9]+ registers/ {
        match($0, /Used [0-9]+/)
        printf "  %-38s %4d %4d %4d %4d\n", name, substr($0, RSTART + 5, RLENGTH - 5), stack, stores, loads
        kernels++
        if (stores + loads > 0) { print "  ^ spills"; bad = 1 }
    }
    END { if (kernels < 21) { print "only " kernels + 0 " kernels found"; bad = 1 }; exit bad }' "$work/ptxas_$arch.txt" || failed=1
done
exit $failed
