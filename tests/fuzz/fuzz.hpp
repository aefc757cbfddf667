// SPDX-License-Identifier: Apache-2.0
#pragma once
// What every fuzz target is made of: numbers drawn from the input, memory that shows who wrote where, and `require`, which ends the
// process when a property does not hold. A target is one LLVMFuzzerTestOneInput: libFuzzer calls it, and so does replay.cpp.

#include <algorithm>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <memory>
#include <span>
#include <type_traits>

#if defined(__SANITIZE_ADDRESS__)
#define KVARN_FUZZ_POISON 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define KVARN_FUZZ_POISON 1
#endif
#endif
#if defined(KVARN_FUZZ_POISON)
#include <sanitizer/asan_interface.h>
#else
#define ASAN_POISON_MEMORY_REGION(address, size) ((void)(address), (void)(size))
#define ASAN_UNPOISON_MEMORY_REGION(address, size) ((void)(address), (void)(size))
#endif

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size);

namespace fuzz {

/// A property of the code under test, in words. Not assert: it holds with NDEBUG too.
inline void require(bool holds, const char* property)
{
    if (holds) return;
    std::fprintf(stderr, "property violated: %s\n", property);
    std::abort();
}

/// Decisions and values from the bytes of one input, in order; zeros when it has ended.
class source {
public:
    source(const std::uint8_t* data, std::size_t size) : rest_(data, size) {}

    template <class Integer = std::uint8_t>
    Integer take()
    {
        Integer value = 0;
        const std::size_t n = std::min(sizeof value, rest_.size());
        if (n != 0) std::memcpy(&value, rest_.data(), n);
        rest_ = rest_.subspan(n);
        return value;
    }
    bool flag() { return (take() & 1) != 0; }
    /// True for one byte in `n`, none of them zero: a short input leaves the rare cases out.
    bool one_in(unsigned n) { return take() % n == n - 1; }
    std::size_t below(std::size_t n) { return take<std::uint16_t>() % n; }
    template <class T>
    T pick(std::initializer_list<T> all)
    {
        return all.begin()[take() % all.size()];
    }
    [[nodiscard]] std::span<const std::uint8_t> rest() const { return rest_; }

private:
    std::span<const std::uint8_t> rest_;
};

/// splitmix64.
class random_source {
public:
    explicit random_source(std::uint64_t seed) : state_(seed) {}

    std::uint64_t bits()
    {
        std::uint64_t z = (state_ += 0x9e3779b97f4a7c15u);
        z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
        z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
        return z ^ (z >> 31);
    }
    /// Roughly normal, standard deviation 1.
    float normal()
    {
        const std::uint64_t x = bits();
        std::int32_t sum = 0;
        for (int i = 0; i < 4; ++i) sum += static_cast<std::int32_t>(x >> (16 * i) & 0xffffu) - 32768;
        return static_cast<float>(sum) * 0x1.bb67aep-16f;
    }

private:
    std::uint64_t state_;
};

/// Bytes at any address, between red zones: unreadable under AddressSanitizer, and filled with a pattern that must survive.
class memory {
public:
    memory(std::size_t size, std::size_t misalignment, std::uint8_t fill)
        : at_(red_zone + misalignment), size_(size), all_(new std::uint8_t[at_ + size + red_zone])
    {
        std::memset(all_.get(), pattern, at_ + size + red_zone);
        std::memset(all_.get() + at_, fill, size);
        close();
    }
    memory(const memory&) = delete;
    memory& operator=(const memory&) = delete;
    ~memory() { open(); }

    [[nodiscard]] std::uint8_t* bytes() const { return all_.get() + at_; }
    [[nodiscard]] std::byte* data() const { return reinterpret_cast<std::byte*>(bytes()); }
    [[nodiscard]] std::span<std::byte> span() const { return {data(), size_}; }
    [[nodiscard]] std::size_t size() const { return size_; }

    /// Nothing outside was written.
    void require_intact() const
    {
        open();
        const auto whole = [](std::uint8_t b) { return b == pattern; };
        require(std::all_of(all_.get(), all_.get() + at_, whole) &&
                    std::all_of(all_.get() + at_ + size_, all_.get() + at_ + size_ + red_zone, whole),
                "nothing outside of a buffer is written");
        close();
    }
    [[nodiscard]] bool holds_only(std::uint8_t fill) const
    {
        return std::all_of(bytes(), bytes() + size_, [&](std::uint8_t b) { return b == fill; });
    }

private:
    static constexpr std::size_t red_zone = 64;
    static constexpr std::uint8_t pattern = 0xc3;

    void close() const
    {
        ASAN_POISON_MEMORY_REGION(all_.get(), at_);
        ASAN_POISON_MEMORY_REGION(all_.get() + at_ + size_, red_zone);
    }
    void open() const { ASAN_UNPOISON_MEMORY_REGION(all_.get(), at_ + size_ + red_zone); }

    std::size_t at_, size_;
    std::unique_ptr<std::uint8_t[]> all_;
};

inline bool same_bytes(const memory& a, const memory& b)
{
    return a.size() == b.size() && (a.size() == 0 || std::memcmp(a.bytes(), b.bytes(), a.size()) == 0);
}

}  // namespace fuzz
