// SPDX-License-Identifier: Apache-2.0
// A cache, driven by a script of operations, against the model of tests/cache/random.hpp: the same tokens at the same positions, the same
// statistics, statuses, values, records and attention, in memory of just the planned size. In: a setup and operations. What fails is printed as a
// script that a test can hold.

#include <string>

#include "kernels.hpp"
#include "tests/cache/random.hpp"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size)
{
    const cache_model::script s = cache_model::script_from({data, size});
    const auto result = cache_model::run_script(s);
    if (result.failure) std::fprintf(stderr, "%s\n%s\n", result.failure->c_str(), cache_model::text_of(s).c_str());
    fuzz::require(!result.failure, "the cache does what the model does");
    return 0;
}
