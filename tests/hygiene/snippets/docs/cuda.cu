// SPDX-License-Identifier: Apache-2.0
// docs/cuda.md
#include <kvarn/cuda/attention.cuh>
#include <kvarn/cuda/seal.cuh>

const char* seal(const kvarn::format& format, const kvarn::cuda::seal_arguments& arguments, cudaStream_t stream);
const char* seal(const kvarn::format& format, const kvarn::cuda::seal_arguments& arguments, cudaStream_t stream)
{
    // snippet: seal
    return kvarn::message(launched);
}
