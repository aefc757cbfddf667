// SPDX-License-Identifier: Apache-2.0
#ifndef KVARN_TESTS_C_CHECK_H
#define KVARN_TESTS_C_CHECK_H
// What the tests of the C interface share: checks that go on, random values, and memory of exact sizes.

#include <kvarn/c/kvarn.h>

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

extern int failures, checks;

#define CHECK(condition)                                                                                                         \
    do {                                                                                                                         \
        ++checks;                                                                                                                \
        if (!(condition)) {                                                                                                      \
            ++failures;                                                                                                          \
            fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #condition);                                                      \
        }                                                                                                                        \
    } while (0)

#define CHECK_STATUS(call, expected)                                                                                             \
    do {                                                                                                                         \
        const kvarn_status said_ = (call);                                                                                       \
        ++checks;                                                                                                                \
        if (said_ != (expected)) {                                                                                               \
            ++failures;                                                                                                          \
            fprintf(stderr, "%s:%d: %s: %s, not %s\n", __FILE__, __LINE__, #call, kvarn_message(said_), #expected);              \
        }                                                                                                                        \
    } while (0)

#define CHECK_OK(call) CHECK_STATUS(call, KVARN_OK)

/// Memory of exactly so many bytes, one byte off any alignment, filled with rubbish. Ends the program when there is none.
void* take_memory(size_t bytes);
void give_back(void* memory);

/// A number in [-1, 1) that depends on `seed` and `index` alone.
float random_value(uint64_t seed, uint64_t index);
/// `count` of them, with a few channels much larger than the others, as keys have them.
void fill(float* values, size_t count, size_t channels, uint64_t seed);

/// A half as a float, by plain arithmetic.
float from_half(uint16_t bits);

void test_library(void);
void test_codec(void);
void test_attention(void);
void test_cache(void);
void test_files(void);
void test_senseless(void);

/// companion.cpp: the C++ library on the same values. Records of k and v, [tiles * group][heads][dim], tile-major; 0: failed.
int companion_quantize(const char* name, int dim, const float* k, const float* v, size_t tiles, size_t heads, void* records,
                       size_t bytes);

#endif
