// SPDX-License-Identifier: Apache-2.0
// The tests of the C interface, in C: kvarn_c_tests <group>.
#include "check.h"

int failures, checks;

void* take_memory(size_t bytes)
{
    unsigned char* const memory = malloc(bytes + 1);
    if (memory == NULL) {
        fputs("out of memory\n", stderr);
        exit(1);
    }
    memset(memory, 0xa5, bytes + 1);
    return memory + 1;
}

void give_back(void* memory)
{
    free((unsigned char*)memory - 1);
}

float random_value(uint64_t seed, uint64_t index)
{
    uint64_t x = seed * 0x9e3779b97f4a7c15u + index + 1;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
    x ^= x >> 31;
    return (float)(x >> 40) / 8388608.0f - 1.0f;
}

void fill(float* values, size_t count, size_t channels, uint64_t seed)
{
    for (size_t i = 0; i < count; ++i) {
        const size_t channel = i % channels;
        values[i] = random_value(seed, i) * (channel % 23 == 5 ? 8.0f : 1.0f) + (channel % 31 == 7 ? 3.0f : 0.0f);
    }
}

int main(int argc, char** argv)
{
    static const struct {
        const char* name;
        void (*run)(void);
    } groups[] = {{"library", test_library}, {"codec", test_codec}, {"attention", test_attention},
                  {"cache", test_cache},     {"files", test_files}, {"senseless", test_senseless}};
    for (size_t i = 0; i < sizeof groups / sizeof *groups; ++i)
        if (argc < 2 || strcmp(argv[1], groups[i].name) == 0) groups[i].run();
    printf("%d checks, %d failed, on %s\n", checks, failures, kvarn_active_arch());
    return failures != 0 || checks == 0;
}
