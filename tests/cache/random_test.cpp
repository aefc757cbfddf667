// SPDX-License-Identifier: Apache-2.0
// Random operations on caches of all kinds, against the model of random.hpp. KVARN_RANDOM_OPERATIONS=<number> runs so many, and
// KVARN_RANDOM_SEED=<number> begins elsewhere; a script that fails is shortened and printed.

#include <cstdlib>
#include <string>

#include "../catch.hpp"
#include "../support/library.hpp"
#include "random.hpp"

namespace {

using namespace cache_model;

std::uint64_t variable(const char* name, std::uint64_t otherwise)
{
    const char* const text = std::getenv(name);
    return text != nullptr ? std::strtoull(text, nullptr, 10) : otherwise;
}

void run_seeds(std::uint64_t first_seed, std::size_t operations, std::size_t each)
{
    coverage seen;
    for (std::uint64_t seed = first_seed; operations != 0; ++seed) {
        const std::size_t n = std::min(each, operations);
        operations -= n;
        const script s = random_script(seed, n);
        const outcome result = run_script(s);
        if (result.failure) {
            const script less = shortened(s);
            const auto again = run_script(less);
            FAIL("KVARN_RANDOM_SEED=" << seed << ": " << *result.failure << "\nshortened, " << again.failure.value_or("it holds") << ":\n" << text_of(less));
        }
        seen += result.seen;
    }
    INFO("committed " << seen.committed << ", no room " << seen.refused << ", sealed " << seen.sealed << ", linked " << seen.linked << ", kept " << seen.kept
                      << ", dropped " << seen.dropped << ", copied " << seen.copied << ", split " << seen.split << ", attended " << seen.attended
                      << ", parts " << seen.attended_parts << ", loaded " << seen.loaded << ", batches " << seen.batches << " and refused "
                      << seen.batches_refused << ", collected " << seen.collected);
    // The operations came to where they were meant to.
    for (const std::size_t n : {seen.committed, seen.refused, seen.sealed, seen.linked, seen.kept, seen.dropped, seen.copied, seen.split, seen.attended,
                                seen.attended_parts, seen.loaded, seen.batches, seen.batches_refused, seen.collected})
        CHECK(n > 10);
}

}  // namespace

TEST_CASE("cache/random: operations do what the model does", "[unit]")
{
    const std::uint64_t operations = variable("KVARN_RANDOM_OPERATIONS", 100000);
    run_seeds(variable("KVARN_RANDOM_SEED", 1), operations, 600);
}
