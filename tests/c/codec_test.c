// SPDX-License-Identifier: Apache-2.0
// Records: the bytes of the C++ library, for every instruction set, element type, part of a call; and back.
#include "check.h"

#include <math.h>

enum { dim = 64, group = 64, tiles = 2, heads = 3, tokens = tiles * group, values = tokens * heads * dim };

static double difference(const float* a, const float* b, size_t count)
{
    double error = 0, all = 0;
    for (size_t i = 0; i < count; ++i) {
        const double d = (double)a[i] - (double)b[i];
        error += d * d;
        all += (double)a[i] * (double)a[i];
    }
    return sqrt(error / all);
}

void test_codec(void)
{
    kvarn_format f = KVARN_FORMAT_INIT;
    CHECK_OK(kvarn_format_parse("k4v2_g64", dim, dim, &f));
    const size_t one = kvarn_record_bytes(&f, 0), bytes = one * tiles * heads, scratch_bytes = kvarn_scratch_bytes(&f);
    unsigned char *const records = take_memory(bytes), *const expected = take_memory(bytes),
                         *const scratch = take_memory(scratch_bytes);
    float *const keys = malloc(values * sizeof *keys), *const values_ = malloc(values * sizeof *values_);
    float *const keys2 = malloc(values * sizeof *keys), *const values2 = malloc(values * sizeof *values_);
    uint16_t* const narrow = malloc(2 * values * sizeof *narrow);
    if (!keys || !values_ || !keys2 || !values2 || !narrow) exit(1);
    fill(keys, values, dim, 1);
    fill(values_, values, dim, 2);
    const kvarn_view kv = kvarn_token_major(keys, KVARN_F32, tokens, heads, dim),
                     vv = kvarn_token_major(values_, KVARN_F32, tokens, heads, dim);
    const kvarn_view kv2 = kvarn_head_major(keys2, KVARN_F32, tokens, heads, dim),
                     vv2 = kvarn_token_major(values2, KVARN_F32, tokens, heads, dim);
    const kvarn_records grid = kvarn_tile_major_records(&f, records, bytes, tiles, heads, 0);
    CHECK(grid.record_bytes == one && grid.tile_stride == heads * one);

    // The bytes of the C++ library, on each instruction set.
    CHECK(companion_quantize("k4v2_g64", dim, keys, values_, tiles, heads, expected, bytes));
    const char* const best = kvarn_active_arch();
    for (size_t i = 0; kvarn_usable_arch(i) != NULL; ++i) {
        CHECK_OK(kvarn_select_arch(kvarn_usable_arch(i)));
        memset(records, 0, bytes);
        CHECK_OK(kvarn_quantize(&f, &kv, &vv, &grid, NULL, scratch, scratch_bytes));
        CHECK(memcmp(records, expected, bytes) == 0);
    }
    CHECK_OK(kvarn_select_arch(best));

    // In parts, with what they lost.
    kvarn_record_errors lost[tiles * heads];
    memset(records, 0, bytes);
    CHECK_OK(kvarn_quantize_items(&f, &kv, &vv, &grid, NULL, 0, 4, scratch, scratch_bytes, lost, 4));
    CHECK(memcmp(records, expected, 4 * one) == 0 && memcmp(records, expected, bytes) != 0);
    CHECK_OK(kvarn_quantize_items(&f, &kv, &vv, &grid, NULL, 4, SIZE_MAX, scratch, scratch_bytes, lost + 4, 2));
    CHECK(memcmp(records, expected, bytes) == 0);
    for (size_t i = 0; i < tiles * heads; ++i)
        CHECK(lost[i].k.relative_error > 0.0f && lost[i].k.relative_error < 0.2f && lost[i].v.relative_error < 0.6f &&
              lost[i].v.relative_error > lost[i].k.relative_error && lost[i].k.worst_relative_error >= lost[i].k.relative_error);
    CHECK_STATUS(kvarn_quantize_items(&f, &kv, &vv, &grid, NULL, 0, 4, scratch, scratch_bytes, lost, 3), KVARN_BUFFER_TOO_SMALL);
    CHECK_STATUS(kvarn_quantize_items(&f, &kv, &vv, &grid, NULL, 4, 0, scratch, scratch_bytes, NULL, 0), KVARN_BAD_ARGUMENT);

    // And back, in other strides; the errors are those that were reported.
    CHECK_OK(kvarn_dequantize(&f, &grid, &kv2, &vv2, KVARN_BASIS_ORIGINAL, scratch, scratch_bytes));
    CHECK(difference(values_, values2, values) < 0.6);
    double error = 0, all = 0;
    for (size_t t = 0; t < group; ++t)
        for (size_t c = 0; c < dim; ++c) {
            const double x = (double)keys[t * heads * dim + c], d = (double)keys2[t * dim + c] - x;
            error += d * d, all += x * x;
        }
    CHECK(fabs(sqrt(error / all) - (double)lost[0].k.relative_error) < 1e-4);
    // As stored, then turned back: the same values but for rounding.
    float* const rotated = malloc(values * sizeof *rotated);
    if (!rotated) exit(1);
    const kvarn_view turned = kvarn_token_major(rotated, KVARN_F32, tokens, heads, dim);
    CHECK_OK(kvarn_dequantize(&f, &grid, NULL, &turned, KVARN_BASIS_ROTATED, scratch, scratch_bytes));
    CHECK(difference(values2, rotated, values) > 0.5);
    CHECK_OK(kvarn_unrotate(&turned));
    CHECK(difference(values2, rotated, values) < 1e-6);
    CHECK_OK(kvarn_rotate(&turned));
    CHECK(difference(values2, rotated, values) > 0.5);
    CHECK_OK(kvarn_unrotate(&turned));
    CHECK(difference(values2, rotated, values) < 1e-5);
    // A part of the records: the others' values stay.
    keys2[group * dim] = 123.0f;  // head 0, tile 1
    CHECK_OK(kvarn_dequantize_items(&f, &grid, &kv2, NULL, KVARN_BASIS_ORIGINAL, 0, heads, scratch, scratch_bytes));
    CHECK(keys2[group * dim] == 123.0f);

    // 16-bit input gives the records of the same values in float.
    static const int32_t types[] = {KVARN_F16, KVARN_BF16};
    for (size_t i = 0; i < 2; ++i) {
        const kvarn_view kn = kvarn_token_major(narrow, types[i], tokens, heads, dim);
        const kvarn_view vn = kvarn_token_major(narrow + values, types[i], tokens, heads, dim),
                         wide = kvarn_token_major(keys2, KVARN_F32, tokens, heads, dim);
        CHECK_OK(kvarn_convert(&kv, &kn));
        CHECK_OK(kvarn_convert(&vv, &vn));
        CHECK_OK(kvarn_quantize(&f, &kn, &vn, &grid, NULL, scratch, scratch_bytes));
        CHECK(memcmp(records, expected, bytes) != 0);
        memcpy(expected, records, bytes);
        CHECK_OK(kvarn_convert(&kn, &wide));
        CHECK_OK(kvarn_convert(&vn, &vv2));
        CHECK_OK(kvarn_quantize(&f, &wide, &vv2, &grid, NULL, scratch, scratch_bytes));
        CHECK(memcmp(records, expected, bytes) == 0);
        CHECK_STATUS(kvarn_quantize(&f, &kv, &vn, &grid, NULL, scratch, scratch_bytes), KVARN_BAD_ARGUMENT);
    }

    // Options, and wider records.
    kvarn_encode_options paper = KVARN_ENCODE_OPTIONS_INIT;
    paper.encoder = KVARN_ENCODER_PAPER;
    CHECK_OK(kvarn_quantize(&f, &kv, &vv, &grid, &paper, scratch, scratch_bytes));
    CHECK(memcmp(records, expected, bytes) != 0);
    paper.iterations = 65;
    CHECK_STATUS(kvarn_quantize(&f, &kv, &vv, &grid, &paper, scratch, scratch_bytes), KVARN_BAD_ARGUMENT);
    paper.iterations = 8;
    paper.encoder = 2;
    CHECK_STATUS(kvarn_quantize(&f, &kv, &vv, &grid, &paper, scratch, scratch_bytes), KVARN_BAD_ARGUMENT);
    const kvarn_view first = kvarn_view_tokens(&kv, 0, group), head = kvarn_view_head(&first, 0);
    const kvarn_view first_v = kvarn_view_tokens(&vv, 0, group), head_v = kvarn_view_head(&first_v, 0);
    const kvarn_records wide_grid = kvarn_head_major_records(&f, records, bytes, 1, 1, 1024);
    CHECK(wide_grid.record_bytes % 1024 == 0 && wide_grid.record_bytes >= one);
    memset(records, 0xff, bytes);
    CHECK_OK(kvarn_quantize(&f, &head, &head_v, &wide_grid, NULL, scratch, scratch_bytes));
    CHECK(records[wide_grid.record_bytes - 1] == (wide_grid.record_bytes == one ? records[one - 1] : 0) &&
          records[wide_grid.record_bytes] == 0xff);

    // Errors; nothing is written.
    memset(records, 0x5a, bytes);
    CHECK_STATUS(kvarn_quantize(NULL, &kv, &vv, &grid, NULL, scratch, scratch_bytes), KVARN_NULL_POINTER);
    CHECK_STATUS(kvarn_quantize(&f, NULL, &vv, &grid, NULL, scratch, scratch_bytes), KVARN_NULL_POINTER);
    CHECK_STATUS(kvarn_quantize(&f, &kv, NULL, &grid, NULL, scratch, scratch_bytes), KVARN_SHAPE_MISMATCH);
    CHECK_STATUS(kvarn_quantize(&f, &kv, &vv, NULL, NULL, scratch, scratch_bytes), KVARN_NULL_POINTER);
    CHECK_STATUS(kvarn_quantize(&f, &kv, &vv, &grid, NULL, NULL, scratch_bytes), KVARN_NULL_POINTER);
    CHECK_STATUS(kvarn_quantize(&f, &kv, &vv, &grid, NULL, scratch, scratch_bytes - 1), KVARN_BUFFER_TOO_SMALL);
    CHECK_STATUS(kvarn_quantize(&f, &first, &vv, &grid, NULL, scratch, scratch_bytes), KVARN_TOKEN_COUNT_MISMATCH);
    CHECK_STATUS(kvarn_quantize(&f, &head, &vv, &grid, NULL, scratch, scratch_bytes), KVARN_SHAPE_MISMATCH);
    kvarn_records short_grid = grid;
    short_grid.bytes -= 1;
    CHECK_STATUS(kvarn_quantize(&f, &kv, &vv, &short_grid, NULL, scratch, scratch_bytes), KVARN_BUFFER_TOO_SMALL);
    const float kept = keys[5];
    keys[5] = (float)INFINITY;
    CHECK_STATUS(kvarn_quantize(&f, &kv, &vv, &grid, NULL, scratch, scratch_bytes), KVARN_NOT_FINITE);
    keys[5] = 1e12f;
    CHECK_STATUS(kvarn_quantize(&f, &kv, &vv, &grid, NULL, scratch, scratch_bytes), KVARN_SCALE_OVERFLOW);
    keys[5] = kept;
    for (size_t i = 0; i < bytes; ++i)
        if (records[i] != 0x5a) CHECK(!"records were written to");
    CHECK_STATUS(kvarn_dequantize(&f, &grid, NULL, NULL, KVARN_BASIS_ORIGINAL, scratch, scratch_bytes), KVARN_NULL_POINTER);
    CHECK_STATUS(kvarn_dequantize(&f, &grid, &kv2, NULL, 2, scratch, scratch_bytes), KVARN_BAD_ARGUMENT);
    memset(records, 0xff, bytes);
    CHECK_STATUS(kvarn_dequantize(&f, &grid, &kv2, NULL, KVARN_BASIS_ORIGINAL, scratch, scratch_bytes), KVARN_NOT_FINITE);
    const kvarn_records none = kvarn_tile_major_records(NULL, records, bytes, tiles, heads, 0);
    CHECK(none.data == NULL && none.tiles == 0);
    const kvarn_records overflow = kvarn_tile_major_records(&f, records, bytes, tiles, SIZE_MAX / 8, 0);
    CHECK(overflow.data == NULL && overflow.heads == 0);
    kvarn_view odd = kvarn_token_major(keys2, KVARN_F32, 1, 1, 52);
    CHECK_STATUS(kvarn_rotate(&odd), KVARN_UNSUPPORTED_HEAD_DIM);
    CHECK_STATUS(kvarn_rotate(NULL), KVARN_NULL_POINTER);

    // The basis of a head by its data: channels far from zero ask for the original one.
    for (size_t t = 0; t < tokens * heads; ++t)
        for (size_t c = 0; c < dim; ++c)
            keys[t * dim + c] = random_value(3, t * dim + c) * 0.1f + (c == 9 ? 12.0f * random_value(4, t) : 0.0f);
    uint64_t moments[dim] = {0};
    float queries[8 * dim];
    for (size_t i = 0; i < 8 * dim; ++i) queries[i] = i % dim == 9 ? 0.0f : random_value(5, i);
    const kvarn_view q = kvarn_token_major(queries, KVARN_F32, 4, 2, dim);
    CHECK_OK(kvarn_add_query_moments(&f, &q, moments, dim));
    CHECK(moments[9] == 0 && moments[8] != 0);
    CHECK_STATUS(kvarn_add_query_moments(&f, &q, moments, dim - 1), KVARN_BUFFER_TOO_SMALL);
    CHECK_STATUS(kvarn_add_query_moments(&f, &q, NULL, dim), KVARN_NULL_POINTER);
    kvarn_format chosen = KVARN_FORMAT_INIT;
    const size_t choose_bytes = kvarn_choose_scratch_bytes(&f);
    void* const choose_scratch = take_memory(choose_bytes);
    CHECK_OK(kvarn_choose_format(&f, &head, &head_v, moments, dim, NULL, choose_scratch, choose_bytes, &chosen));
    CHECK(chosen.key_rotation == KVARN_ROTATION_NONE && chosen.key_bits == 4 && chosen.group == group &&
          chosen.head_dim_k == dim);
    kvarn_choose_options choose = KVARN_CHOOSE_OPTIONS_INIT;
    choose.most_key_error = 0.001f;
    CHECK_OK(kvarn_choose_format(&f, &head, NULL, moments, dim, &choose, choose_scratch, choose_bytes, &chosen));
    CHECK(chosen.key_bits > 4 && chosen.value_bits == 2);
    choose.margin = -1.0f;
    CHECK_STATUS(kvarn_choose_format(&f, &head, NULL, moments, dim, &choose, choose_scratch, choose_bytes, &chosen),
                 KVARN_BAD_ARGUMENT);
    CHECK_STATUS(kvarn_choose_format(&f, &head, NULL, moments, dim, NULL, choose_scratch, choose_bytes - 1, &chosen),
                 KVARN_BUFFER_TOO_SMALL);
    give_back(choose_scratch);

    give_back(records), give_back(expected), give_back(scratch);
    free(keys), free(values_), free(keys2), free(values2), free(narrow), free(rotated);
}
