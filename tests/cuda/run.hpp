// SPDX-License-Identifier: Apache-2.0
#pragma once
// Runs the kernels for the tests, which are compiled twice: on fibers (fiber_block.hpp), where every machine has them, and, with
// KVARN_TEST_ON_DEVICE, by real launches (launch.cu). Memory that kernels touch is a shared_vector: ordinary or managed memory.

#include <kvarn/cuda/append.cuh>
#include <kvarn/cuda/attention.cuh>
#include <kvarn/cuda/dequantize.cuh>
#include <kvarn/cuda/seal.cuh>

#include <cstddef>
#include <cstdlib>
#include <vector>

#include "../catch.hpp"
#if !defined(KVARN_TEST_ON_DEVICE)
#include <sys/mman.h>
#include <unistd.h>

#include "fiber_block.hpp"
#endif

namespace support {

#if defined(KVARN_TEST_ON_DEVICE)
void* allocate_managed(std::size_t bytes);  // launch.cu
void free_managed(void* p, std::size_t bytes);
void wait_for_device();  // throws with CUDA's message if a kernel failed
int block_shared_bytes();
kvarn::status launch(const kvarn::format& f, const kvarn::cuda::seal_arguments& a, const kvarn::encode_options& o,
                     int shared_bytes);
kvarn::status launch(const kvarn::format& f, const kvarn::cuda::dequantize_arguments& a);
kvarn::status launch(const kvarn::format& f, const kvarn::cuda::append_arguments& a, const kvarn::encode_options& o);
kvarn::status launch(const kvarn::format& f, const kvarn::cuda::attention_arguments& a);
#else
/// Shared memory of a block: the device's, or what the fibers play.
inline int block_shared_bytes()
{
    return kvarn::cuda::shared_bytes_sm90;
}
/// 16-byte aligned memory behind which nothing may be touched: a page without rights follows.
inline std::size_t pages_of(std::size_t bytes)
{
    const auto page = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
    return (bytes + page - 1) / page * page;
}
inline void* allocate_managed(std::size_t bytes)
{
    const std::size_t used = pages_of(bytes), room = (bytes + 15) / 16 * 16;
    void* const pages = mmap(nullptr, used + pages_of(1), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (pages == MAP_FAILED || mprotect(static_cast<std::byte*>(pages) + used, pages_of(1), PROT_NONE) != 0) std::abort();
    return static_cast<std::byte*>(pages) + used - room;
}
inline void free_managed(void* p, std::size_t bytes)
{
    const std::size_t used = pages_of(bytes), room = (bytes + 15) / 16 * 16;
    munmap(static_cast<std::byte*>(p) + room - used, used + pages_of(1));
}

/// Runs `items` blocks of `threads` threads.
template <class Body>
void run_blocks(int items, int threads, int shared_bytes, int step, Body&& body)
{
    fiber_block block(threads, step);
    for (int item = 0; item < items; ++item)
        REQUIRE(block.run(shared_bytes, [&](auto& team, float* shared) { body(team, item, shared); }));
}
#endif

template <class T>
struct shared_allocator {
    using value_type = T;
    shared_allocator() = default;
    template <class U>
    shared_allocator(const shared_allocator<U>&) noexcept
    {}
    T* allocate(std::size_t n) { return static_cast<T*>(allocate_managed((n == 0 ? 1 : n) * sizeof(T))); }
    void deallocate(T* p, std::size_t n) { free_managed(p, (n == 0 ? 1 : n) * sizeof(T)); }
    friend bool operator==(const shared_allocator&, const shared_allocator&) { return true; }
};
template <class T>
using shared_vector = std::vector<T, shared_allocator<T>>;

/// `step` is the order of the fibers; a device has its own. With less `shared_bytes` than a tile needs, it goes to the workspace.
inline kvarn::status run(const kvarn::format& f, const kvarn::cuda::seal_arguments& a, const kvarn::encode_options& o,
                         [[maybe_unused]] int step = 1, int shared_bytes = block_shared_bytes())
{
#if defined(KVARN_TEST_ON_DEVICE)
    const kvarn::status s = launch(f, a, o, shared_bytes);
    wait_for_device();
    return s;
#else
    namespace body = kvarn::cuda::detail;
    if (const kvarn::status s = body::check_seal(f, a, o, shared_bytes); s != kvarn::status::ok) return s;
    if (a.tiles == 0 || a.heads == 0) return kvarn::status::ok;
    const body::seal_call call = body::make_seal_call(f, a, o, shared_bytes);
    const bool in_workspace = call.workspace != nullptr;
    run_blocks(call.blocks, body::seal_threads, body::seal_shared_bytes(f, in_workspace), step,
               [&](auto& team, int block, float* shared) {
                   if (in_workspace)
                       body::seal_block<true>(team, call, block, shared);
                   else
                       body::seal_block<false>(team, call, block, shared);
               });
    return kvarn::status::ok;
#endif
}

inline kvarn::status run(const kvarn::format& f, const kvarn::cuda::dequantize_arguments& a, [[maybe_unused]] int step = 1)
{
#if defined(KVARN_TEST_ON_DEVICE)
    const kvarn::status s = launch(f, a);
    wait_for_device();
    return s;
#else
    namespace body = kvarn::cuda::detail;
    if (const kvarn::status s = body::check_dequantize(f, a); s != kvarn::status::ok) return s;
    if (a.tiles == 0 || a.heads == 0) return kvarn::status::ok;
    const body::dequantize_call call = body::make_dequantize_call(f, a);
    run_blocks(body::dequantize_blocks(call, a), call.threads, call.shared_bytes, step,
               [&](auto& team, int item, float* shared) { body::dequantize_item(team, call, item, shared); });
    return kvarn::status::ok;
#endif
}

inline kvarn::status run(const kvarn::format& f, const kvarn::cuda::append_arguments& a, const kvarn::encode_options& o)
{
#if defined(KVARN_TEST_ON_DEVICE)
    const kvarn::status s = launch(f, a, o);
    wait_for_device();
    return s;
#else
    namespace body = kvarn::cuda::detail;
    if (const kvarn::status s = body::check_append(f, a); s != kvarn::status::ok) return s;
    if (const kvarn::status s = body::check_seal(f, a.sealed, o, block_shared_bytes()); s != kvarn::status::ok) return s;
    const body::append_call call = body::make_append_call(f, a);
    run_blocks(a.tokens * call.parts, body::append_threads, 0, 1,
               [&](auto& team, int item, float*) { body::append_item(team, call, item); });
    return run(f, a.sealed, o);
#endif
}

inline kvarn::status run(const kvarn::format& f, const kvarn::cuda::attention_arguments& a, [[maybe_unused]] int step = 1)
{
#if defined(KVARN_TEST_ON_DEVICE)
    const kvarn::status s = launch(f, a);
    wait_for_device();
    return s;
#else
    namespace body = kvarn::cuda::detail;
    if (const kvarn::status s = body::check_attention(f, a, kvarn::cuda::shared_bytes_sm90); s != kvarn::status::ok) return s;
    if (a.sequences == 0 || a.kv_heads == 0 || a.new_tokens == 0 || a.heads_per_kv == 0) return kvarn::status::ok;
    const body::attention_call call = body::make_attention_call(f, a);
    run_blocks(body::attention_blocks(call), body::attention_threads, body::attention_shared_bytes(f), step,
               [&](auto& team, int item, float* shared) { body::attend_item(team, call, item, shared); });
    run_blocks(body::combine_blocks(call), body::combine_threads, body::combine_shared_bytes(call.out_dim), step,
               [&](auto& team, int item, float* shared) { body::combine_item(team, call, item, shared); });
    return kvarn::status::ok;
#endif
}

}  // namespace support
