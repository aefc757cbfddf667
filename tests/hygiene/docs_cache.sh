#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# docs_cache.sh <compiler>: the program in docs/cache.md compiles without warnings, as it is printed, and runs.
set -eu
here=$(CDPATH= cd -- "$(dirname -- "$0")" && pwd)
compiler=$1
work=$KVARN_WORK/docs_cache
rm -rf "$work"
mkdir -p "$work"

block() { # <number>: a block of C++ in the document
    awk -v wanted="$1" '/^```cpp$/ { number++; inside = number == wanted; next } /^```$/ { inside = 0 } inside' "$here/../../docs/cache.md"
}
{
    block 1
    cat <<'END'

#include <cstdio>

struct one_thread {
    template <class F>
    void run(std::size_t n, F&& f)
    {
        for (std::size_t i = 0; i < n; ++i) f(i, std::size_t{0});
    }
};

static status step(engine_cache& cache, one_thread& threads, kvarn::sequence_id sequence, std::size_t layers, std::size_t kv_heads,
                   std::size_t query_heads, std::size_t head_dim, const float* k, const float* v, const float* q, float* out, std::size_t m,
                   std::size_t accepted)
{
END
    block 2
    cat <<'END'
    return sealed.error;
}

int main()
{
    engine_cache cache;
    one_thread threads;
    if (cache.start(2, 2, 64, 1) != status::ok) return std::puts("start"), 1;
    const auto sequence = cache.pool.open();
    if (!sequence) return std::puts("open"), 1;
    std::vector<float> x(100 * 4 * 64), out(x.size());
    for (std::size_t i = 0; i < x.size(); ++i) x[i] = static_cast<float>(i * 2654435761u % 1999u) * 0x1p-9f - 2.0f;
    for (int i = 0; i < 5; ++i) {
        const status said = step(cache, threads, *sequence, 2, 2, 4, 64, x.data(), x.data(), x.data(), out.data(), 100, 90);
        if (said != status::ok) return std::puts(kvarn::message(said)), 1;
    }
    const auto numbers = cache.pool.statistics(*sequence);
    float largest = 0;
    for (const float y : out) largest = std::max(largest, y < 0 ? -y : y);
    std::printf("%zu tokens, %zu of them in records, outputs up to %.3f\n", numbers->tokens, numbers->sealed_tokens, static_cast<double>(largest));
    return numbers->tokens == 450 && numbers->sealed_tokens == 256 && largest > 0.01f && largest < 4 ? 0 : 1;
}
END
} >"$work/program.cpp"
"$compiler" -std=c++20 -O1 -fno-exceptions -Wall -Wextra -Wshadow -Werror -I "$KVARN_INCLUDE" -isystem "$KVARN_ISOLATED" "$work/program.cpp" -o "$work/program"
"$work/program"
