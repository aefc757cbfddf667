#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# layering.sh accepts a good tree and finds each kind of violation.
set -eu
here=$(CDPATH= cd -- "$(dirname -- "$0")" && pwd)
tree=$KVARN_WORK/layering_self_test
failed=0

# case_of <ok|bad> <header> <line of code>
case_of() {
    rm -rf "$tree"
    mkdir -p "$tree/$(dirname "$2")"
    printf '// SPDX-License-Identifier: Apache-2.0\n#pragma once\n%s\n' "$3" >"$tree/$2"
    if sh "$here/layering.sh" "$tree" >"$tree.log" 2>&1; then found=ok; else found=bad; fi
    if [ "$found" != "$1" ]; then
        echo "expected $1, got $found: $2: $3"
        cat "$tree.log"
        failed=1
    fi
}

case_of ok base/a.hpp '#include <cstdint>'
case_of ok layout/a.hpp '#include <kvarn/base/view.hpp>'
case_of ok simd/a.hpp '#include <xsimd/xsimd.hpp>'
case_of ok codec/a.hpp '#include <kvarn/codec/pack.hpp>'
case_of ok attention/a.hpp '#include <kvarn/quantize.hpp>'
case_of ok convert.hpp '#include <kvarn/simd/xsimd.hpp>'
case_of ok cache/a.hpp '#include <vector>'
case_of ok cache/file_format.hpp '#include <xxhash.h>'
case_of ok interop/a.hpp '#include <Eigen/Core>'
case_of ok interop/a.hpp 'throw status_error(s);'
case_of ok dispatch.hpp '#include <kvarn/quantize.hpp>'
case_of ok dispatch/a.hpp '#include <kvarn/attention.hpp>'
case_of ok quantize.hpp '// never throws; abort() is not called'
case_of ok quantize.hpp 'const char* text = "throw";'
case_of ok cuda/a.cuh '#include <kvarn/layout/record.hpp>'
case_of ok cuda/attention/a.cuh '#include <kvarn/cuda/seal.cuh>'
case_of ok c/a.hpp '#include <kvarn/dispatch/cache.hpp>'
case_of ok c/a.hpp '#include <kvarn/c/kvarn.h>'
case_of ok c/a.hpp '#include <new>'
case_of bad c/a.hpp '#include <vector>'
case_of bad c/a.hpp '#include <kvarn/interop/owning.hpp>'
case_of bad dispatch.hpp '#include <kvarn/c/kvarn.h>'
case_of bad cuda/a.cuh '#include <kvarn/codec/encode.hpp>'
case_of bad cuda/a.cuh '#include <vector>'
case_of bad cuda/a.hpp 'int x;'
case_of bad quantize.hpp '#include <kvarn/cuda/seal.cuh>'
case_of bad codec/a.hpp '#include <kvarn/convert.hpp>'
case_of bad base/a.hpp '#include <kvarn/layout/format.hpp>'
case_of bad layout/a.hpp '#include <kvarn/simd/arch.hpp>'
case_of bad codec/a.hpp '#include <kvarn/rotate/hadamard.hpp>'
case_of bad normalize/a.hpp '#include <kvarn/codec/pack.hpp>'
case_of bad codec/a.hpp '#include <xsimd/xsimd.hpp>'
case_of bad quantize.hpp '#include <kvarn/cache/pool.hpp>'
case_of bad cache/a.hpp '#include <kvarn/interop/eigen.hpp>'
case_of bad cache/a.hpp '#include <Eigen/Core>'
case_of bad cache/a.hpp '#include <xxhash.h>'
case_of bad kvarn.hpp '#include <kvarn/interop/eigen.hpp>'
case_of bad kvarn.hpp '#include <kvarn/dispatch.hpp>'
case_of bad quantize.hpp '#include <kvarn/dispatch/cpu.hpp>'
case_of bad interop/a.hpp '#include <kvarn/dispatch.hpp>'
case_of bad dispatch/a.hpp '#include <kvarn/interop/owning.hpp>'
case_of bad dispatch/a.hpp '#include <vector>'
case_of bad dispatch.hpp 'float* p = new float[4];'
case_of bad quantize.hpp '#include <vector>'
case_of bad cache/a.hpp '#include <iostream>'
case_of bad cache/a.hpp '#include <functional>'
case_of bad base/a.hpp '#include "kvarn/base/view.hpp"'
case_of bad codec/a.hpp 'throw 1;'
case_of bad codec/a.hpp '  std::abort();'
case_of bad codec/a.hpp 'std::printf("x");'
case_of bad codec/a.hpp 'float* p = new float[4];'
case_of bad new_folder/a.hpp 'int x;'
exit $failed
