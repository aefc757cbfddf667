// SPDX-License-Identifier: Apache-2.0
#pragma once
// A thread block without a GPU: one fiber per thread, switched at barriers and shuffles. The bodies of the CUDA kernels run on it
// from the same source (include/kvarn/cuda/team.cuh says what a team offers), so that their results can be compared on any
// machine. Shared memory is not a number before every run and has guards behind it. The order in which fibers run is a parameter:
// a missing barrier shows as a result that depends on it.

#if defined(_FORTIFY_SOURCE) && _FORTIFY_SOURCE > 0
#error "fiber_block.hpp: compile with -U_FORTIFY_SOURCE, whose longjmp allows no other stack"
#endif

#include <csetjmp>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#include <ucontext.h>

#include <kvarn/base/element.hpp>

namespace support {

class fiber_block {
public:
    /// What a kernel's body sees of one thread.
    class team {
    public:
        team(fiber_block& block, int rank) : block_(block), rank_(rank) {}
        [[nodiscard]] int rank() const { return rank_; }
        [[nodiscard]] int size() const { return block_.threads_; }
        void warp_barrier() { block_.meet(block_.warps_[static_cast<std::size_t>(rank_ / 32)], 32, rank_); }
        void barrier() { block_.meet(block_.all_, block_.threads_, rank_); }
        template <class T>
        T shuffle_xor(T x, int mask)
        {
            static_assert(sizeof(T) == 4);
            // Two sets of slots in turn: a thread that is one shuffle ahead must not overwrite what others have yet to read.
            meeting& warp = block_.warps_[static_cast<std::size_t>(rank_ / 32)];
            const std::size_t set = warp.generation % 2 * static_cast<std::size_t>(block_.threads_);
            std::memcpy(&block_.slots_[set + static_cast<std::size_t>(rank_)], &x, 4);
            block_.meet(warp, 32, rank_);
            T other;
            std::memcpy(&other, &block_.slots_[set + static_cast<std::size_t>(rank_ ^ mask)], 4);
            return other;
        }

        /// mma.m16n8k16 of halves: thread 4 g + j holds a = {(g, 2j), (g + 8, 2j), (g, 2j + 8), (g + 8, 2j + 8)} and the column
        /// after each, b = {(2j, g), (2j + 8, g)} and the row after each, c = {(g, 2j), (g, 2j + 1), (g + 8, 2j), (g + 8, 2j +
        /// 1)}.
        void mma(float (&c)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2])
        {
            const std::uint32_t* const operands = exchange(a, b);
            const int first = rank_ / 32 * 32, g = rank_ % 32 / 4, j = rank_ % 4;
            const auto half_of = [](std::uint32_t word, int high) {
                return kvarn::to_float(kvarn::half{static_cast<std::uint16_t>(word >> (16 * high))});
            };
            for (int i = 0; i < 4; ++i) {
                const int row = g + i / 2 * 8, column = 2 * j + i % 2;
                double sum = 0.0;
                for (int k = 0; k < 16; ++k) {
                    const std::uint32_t* const from_a = operands + 6 * (first + row % 8 * 4 + k % 8 / 2);
                    const std::uint32_t* const from_b = operands + 6 * (first + column * 4 + k % 8 / 2);
                    sum += static_cast<double>(half_of(from_a[row / 8 + k / 8 * 2], k % 2)) * half_of(from_b[4 + k / 8], k % 2);
                }
                c[i] = static_cast<float>(c[i] + sum);
            }
        }

        /// mma.m16n8k8 of tf32: thread 4 g + j holds a = {(g, j), (g + 8, j), (g, j + 4), (g + 8, j + 4)}, b = {(j, g), (j + 4,
        /// g)}, c as above. What tf32 has no bits for is cut off.
        void mma_tf32(float (&c)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2])
        {
            const std::uint32_t* const operands = exchange(a, b);
            const int first = rank_ / 32 * 32, g = rank_ % 32 / 4, j = rank_ % 4;
            const auto value = [](std::uint32_t bits) {
                bits &= 0xffffe000u;
                float x;
                std::memcpy(&x, &bits, 4);
                return static_cast<double>(x);
            };
            for (int i = 0; i < 4; ++i) {
                const int row = g + i / 2 * 8, column = 2 * j + i % 2;
                double sum = 0.0;
                for (int k = 0; k < 8; ++k)
                    sum += value(operands[6 * (first + row % 8 * 4 + k % 4) + row / 8 + k / 4 * 2]) *
                           value(operands[6 * (first + column * 4 + k % 4) + 4 + k / 4]);
                c[i] = static_cast<float>(c[i] + sum);
            }
        }

    private:
        /// The operands of all threads, six words each: four of a, then two of b.
        const std::uint32_t* exchange(const std::uint32_t (&a)[4], const std::uint32_t (&b)[2])
        {
            meeting& warp = block_.warps_[static_cast<std::size_t>(rank_ / 32)];
            const std::size_t set = 6 * (warp.generation % 2 * static_cast<std::size_t>(block_.threads_));
            std::uint32_t* const operands = block_.operands_.data() + set;
            std::memcpy(operands + 6 * rank_, a, sizeof a);
            std::memcpy(operands + 6 * rank_ + 4, b, sizeof b);
            block_.meet(warp, 32, rank_);
            return operands;
        }

        fiber_block& block_;
        int rank_;
    };

    /// `step` is odd: after thread r runs thread r + step.
    explicit fiber_block(int threads, int step = 1)
        : threads_(threads), step_(step), fibers_(static_cast<std::size_t>(threads)),
          warps_(static_cast<std::size_t>(threads / 32)), slots_(2 * static_cast<std::size_t>(threads)),
          operands_(12 * static_cast<std::size_t>(threads))
    {
        for (fiber& f : fibers_) f.stack = std::make_unique<unsigned char[]>(stack_bytes);
    }

    /// Runs body(team, shared) on all threads; `shared_bytes` of memory, 16-byte aligned. Whether the guards behind it are
    /// intact.
    template <class Body>
    bool run(int shared_bytes, Body&& body)
    {
        constexpr std::size_t guard_words = 64;
        const std::size_t words = static_cast<std::size_t>(shared_bytes) / 4;
        std::vector<std::uint32_t> memory(words + guard_words + 4, 0xffffabcdu);  // not a number
        void* aligned = memory.data();
        std::size_t space = memory.size() * 4;
        std::align(16, words * 4 + guard_words * 4, aligned, space);
        float* const shared = static_cast<float*>(aligned);
        body_ = [&body, shared](team& t) { body(t, shared); };
        for (int r = 0; r < threads_; ++r) start(r);
        left_ = threads_;
        idle_ = 0;
        current_ = 0;
        run_all();
        const std::uint32_t* const guard = static_cast<const std::uint32_t*>(aligned) + words;
        for (std::size_t i = 0; i < guard_words; ++i)
            if (guard[i] != 0xffffabcdu) return false;
        return true;
    }

private:
    static constexpr std::size_t stack_bytes = 64 * 1024;
    struct meeting {
        unsigned generation = 0;
        int arrived = 0;
    };
    struct fiber {
        std::unique_ptr<unsigned char[]> stack;
        ucontext_t context;
        jmp_buf at;
        bool started = false, done = false;
    };

    __attribute__((noinline)) void run_all()
    {
        if (_setjmp(home_) == 0) resume(0);
    }

    void start(int r)
    {
        fiber& f = fibers_[static_cast<std::size_t>(r)];
        f.started = f.done = false;
        getcontext(&f.context);
        f.context.uc_stack.ss_sp = f.stack.get();
        f.context.uc_stack.ss_size = stack_bytes;
        f.context.uc_link = nullptr;
        const auto address = reinterpret_cast<std::uintptr_t>(this);
        makecontext(&f.context, reinterpret_cast<void (*)()>(&enter), 2, static_cast<unsigned>(address),
                    static_cast<unsigned>(static_cast<std::uint64_t>(address) >> 32));
    }

    static void enter(unsigned low, unsigned high)
    {
        auto* const block =
            reinterpret_cast<fiber_block*>(static_cast<std::uintptr_t>(low | static_cast<std::uint64_t>(high) << 32));
        const int rank = block->current_;
        team t(*block, rank);
        block->body_(t);
        block->fibers_[static_cast<std::size_t>(rank)].done = true;
        block->idle_ = 0;
        if (--block->left_ == 0) _longjmp(block->home_, 1);
        block->resume(block->next(rank));
    }

    [[nodiscard]] int next(int r) const
    {
        do r = (r + step_) % threads_;
        while (fibers_[static_cast<std::size_t>(r)].done);
        return r;
    }

    [[noreturn]] void resume(int r)
    {
        fiber& f = fibers_[static_cast<std::size_t>(r)];
        current_ = r;
        if (f.started) _longjmp(f.at, 1);
        f.started = true;
        setcontext(&f.context);
        std::abort();
    }

    void meet(meeting& m, int expected, int rank)
    {
        const unsigned mine = m.generation;
        if (++m.arrived == expected) {
            m.arrived = 0;
            ++m.generation;
            idle_ = 0;
            return;
        }
        while (m.generation == mine) {
            if (++idle_ > 4 * threads_) {
                std::fprintf(stderr, "fiber_block: some threads wait for others that do not come\n");
                std::abort();
            }
            if (_setjmp(fibers_[static_cast<std::size_t>(rank)].at) == 0) resume(next(rank));
        }
    }

    int threads_, step_;
    std::vector<fiber> fibers_;
    std::vector<meeting> warps_;
    meeting all_;
    std::vector<std::uint32_t> slots_, operands_;
    std::function<void(team&)> body_;
    jmp_buf home_;
    int current_ = 0, left_ = 0, idle_ = 0;
};

}  // namespace support
