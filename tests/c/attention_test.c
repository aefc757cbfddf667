// SPDX-License-Identifier: Apache-2.0
// Attention: against a softmax in double over the decoded values; and the same bits however a history is given and split.
#include "check.h"

#include <math.h>

enum { dim = 64, group = 64, rows = 2, sink = 10, sealed = 20 * group, tail = 37, tokens = sink + sealed + tail, new_tokens = 3 };

static kvarn_format f = KVARN_FORMAT_INIT;
static float k[tokens * dim], v[tokens * dim];  // as attention sees them: sealed ones decoded
static float q[new_tokens * rows * dim], out[new_tokens * rows * dim], other[new_tokens * rows * dim];
static float lse[new_tokens * rows];

static void reference(const kvarn_attention_options* o, const float* sink_logits, float* result, float* log_sum_exp)
{
    static double score[tokens];
    for (size_t t = 0; t < new_tokens; ++t)
        for (size_t r = 0; r < rows; ++r) {
            const float* const query = q + (t * rows + r) * dim;
            const int64_t mine = (int64_t)(tokens - new_tokens + t);
            double most = sink_logits != NULL ? (double)sink_logits[r] : -1e300, sum = 0;
            for (int64_t i = 0; i < tokens; ++i) {
                double s = 0;
                for (size_t c = 0; c < dim; ++c) s += (double)query[c] * (double)k[(size_t)i * dim + c];
                s /= 8.0;
                if (o->logit_soft_cap > 0.0f) s = (double)o->logit_soft_cap * tanh(s / (double)o->logit_soft_cap);
                if ((o->causal && i > mine) || (o->window != 0 && i <= mine - o->window)) s = -INFINITY;
                score[i] = s;
                if (s > most) most = s;
            }
            double all[dim] = {0};
            if (sink_logits != NULL) sum += exp((double)sink_logits[r] - most);
            for (size_t i = 0; i < tokens; ++i) {
                const double p = exp(score[i] - most);
                sum += p;
                for (size_t c = 0; c < dim; ++c) all[c] += p * (double)v[i * dim + c];
            }
            for (size_t c = 0; c < dim; ++c) result[(t * rows + r) * dim + c] = (float)(all[c] / sum);
            log_sum_exp[t * rows + r] = (float)(most + log(sum));
        }
}

static double largest_difference(const float* a, const float* b, size_t count)
{
    double most = 0;
    for (size_t i = 0; i < count; ++i) {
        const double d = fabs((double)a[i] - (double)b[i]);
        if (!(d <= most)) most = d;
    }
    return most;
}

void test_attention(void)
{
    CHECK_OK(kvarn_format_parse("k4v4_g64", dim, dim, &f));
    fill(k, tokens * dim, dim, 11);
    fill(v, tokens * dim, dim, 12);
    for (size_t i = 0; i < new_tokens * rows * dim; ++i) q[i] = random_value(13, i);

    // Records of the middle, and what they hold.
    const size_t one = kvarn_record_bytes(&f, 0), bytes = one * (sealed / group), codec_bytes = kvarn_scratch_bytes(&f);
    unsigned char* const records = take_memory(bytes);
    void* const codec_scratch = take_memory(codec_bytes);
    const kvarn_view all_k = kvarn_token_major(k, KVARN_F32, tokens, 1, dim),
                     all_v = kvarn_token_major(v, KVARN_F32, tokens, 1, dim);
    const kvarn_view mid_k = kvarn_view_tokens(&all_k, sink, sealed), mid_v = kvarn_view_tokens(&all_v, sink, sealed);
    const kvarn_records grid = kvarn_head_major_records(&f, records, bytes, sealed / group, 1, 0);
    CHECK_OK(kvarn_quantize(&f, &mid_k, &mid_v, &grid, NULL, codec_scratch, codec_bytes));
    CHECK_OK(kvarn_dequantize(&f, &grid, &mid_k, &mid_v, KVARN_BASIS_ORIGINAL, codec_scratch, codec_bytes));
    give_back(codec_scratch);

    const kvarn_view sink_k = kvarn_view_tokens(&all_k, 0, sink), sink_v = kvarn_view_tokens(&all_v, 0, sink);
    const kvarn_view tail_k = kvarn_view_tokens(&all_k, sink + sealed, tail),
                     tail_v = kvarn_view_tokens(&all_v, sink + sealed, tail);
    kvarn_segment history[4] = {KVARN_SEGMENT_INIT, KVARN_SEGMENT_INIT, KVARN_SEGMENT_INIT, KVARN_SEGMENT_INIT};
    CHECK_OK(kvarn_exact_tokens(&sink_k, &sink_v, 0, KVARN_BASIS_ORIGINAL, KVARN_BASIS_ORIGINAL, &history[0]));
    CHECK_OK(kvarn_sealed_tiles(&f, &grid, 0, 0, SIZE_MAX, &history[1]));
    CHECK_OK(kvarn_exact_tokens(&tail_k, &tail_v, 0, KVARN_BASIS_ORIGINAL, KVARN_BASIS_ORIGINAL, &history[2]));
    CHECK(history[0].tokens == sink && history[1].tokens == sealed && history[1].records == sealed / group &&
          history[2].tokens == tail);

    kvarn_attention_task task = KVARN_ATTENTION_TASK_INIT;
    task.history = history;
    task.history_count = 3;
    task.q = kvarn_token_major(q, KVARN_F32, new_tokens, rows, dim);
    task.out = kvarn_token_major(out, KVARN_F32, new_tokens, rows, dim);
    task.log_sum_exp = lse;
    const size_t scratch_bytes = kvarn_attend_scratch_bytes(&f, new_tokens * rows, 4);
    void* const scratch = take_memory(scratch_bytes);
    CHECK(scratch_bytes != 0 && kvarn_attend_scratch_bytes(&f, 1025, 3) == 0 && kvarn_attend_scratch_bytes(NULL, 1, 1) == 0);

    kvarn_attention_options options = KVARN_ATTENTION_OPTIONS_INIT;
    static const float logits[rows] = {2.0f, -1.0f};
    float expected[new_tokens * rows * dim], expected_lse[new_tokens * rows];
    for (int variant = 0; variant < 5; ++variant) {
        options.window = variant == 1 ? 700 : 0;
        options.logit_soft_cap = variant == 2 ? 3.0f : 0.0f;
        options.causal = variant != 3;
        task.sink_logits = variant == 4 ? logits : NULL;
        options.precision = variant == 0 ? KVARN_PRECISION_EXACT : KVARN_PRECISION_FINE;
        reference(&options, task.sink_logits, expected, expected_lse);
        memset(out, 0xff, sizeof out);
        CHECK_OK(kvarn_attend(&f, &task, &options, scratch, scratch_bytes));
        CHECK(largest_difference(out, expected, new_tokens * rows * dim) < (variant == 0 ? 1e-4 : 3e-3));
        CHECK(largest_difference(lse, expected_lse, new_tokens * rows) < 1e-3);
    }
    task.sink_logits = NULL;

    // The same history otherwise: by a block table, by addresses, and cut in two within a tile. Options left out are the defaults.
    CHECK_OK(kvarn_attend(&f, &task, NULL, scratch, scratch_bytes));
    int32_t table[sealed / group];
    const void* list[sealed / group];
    for (size_t i = 0; i < sealed / group; ++i) {
        table[i] = (int32_t)i;
        list[i] = records + i * one;
    }
    task.out = kvarn_token_major(other, KVARN_F32, new_tokens, rows, dim);
    const kvarn_segment whole = history[1];
    CHECK_OK(kvarn_paged_tiles(&f, records, (ptrdiff_t)one, table, sealed / group, &history[1]));
    CHECK_OK(kvarn_attend(&f, &task, NULL, scratch, scratch_bytes));
    CHECK(memcmp(out, other, sizeof out) == 0);
    CHECK_OK(kvarn_listed_tiles(&f, list, sealed / group, &history[1]));
    memset(other, 0, sizeof other);
    CHECK_OK(kvarn_attend(&f, &task, NULL, scratch, scratch_bytes));
    CHECK(memcmp(out, other, sizeof out) == 0);
    history[3] = history[2];
    history[1] = history[2] = whole;
    CHECK_OK(kvarn_segment_tokens(&f, 0, 100, &history[1]));
    CHECK_OK(kvarn_segment_tokens(&f, 100, SIZE_MAX, &history[2]));
    CHECK(history[1].tokens == 100 && history[1].records == 2 && history[2].tokens == sealed - 100 && history[2].skip == 36);
    task.history_count = 4;
    CHECK_OK(kvarn_attend(&f, &task, NULL, scratch, scratch_bytes));
    CHECK(largest_difference(out, other, new_tokens * rows * dim) < 1e-3);
    history[1] = whole;
    history[2] = history[3];
    task.history_count = 3;

    // As items, for any number of chunks an item: the bits of one call. A second task without queries costs nothing.
    kvarn_attention_task both[2] = {KVARN_ATTENTION_TASK_INIT, KVARN_ATTENTION_TASK_INIT};
    kvarn_attention* batch = NULL;
    both[0] = task;
    both[0].format = &f;
    kvarn_format another = KVARN_FORMAT_INIT;  // the call's, which no task uses
    const size_t plan_bytes = kvarn_attention_bytes(&another, both, 2),
                 item_bytes = kvarn_call_scratch_bytes(&f, new_tokens * rows);
    CHECK(plan_bytes != 0);
    void *const memory = take_memory(plan_bytes), *const item_scratch = take_memory(item_bytes);
    both[1].format = &f;
    for (size_t chunks = 0; chunks < 3; ++chunks) {
        CHECK_OK(kvarn_attention_plan(&another, both, 2, NULL, chunks, memory, plan_bytes, &batch));
        const size_t items = kvarn_attention_items(batch);
        CHECK(items == (chunks == 1 ? 4u : chunks == 2 ? 2u : 1u));  // chunks of 1024 tokens: sink, 2 of records, tail
        memset(other, 0, sizeof other);
        for (size_t i = items; i-- != 0;) CHECK_OK(kvarn_attend_item(batch, i, item_scratch, item_bytes));
        CHECK_OK(kvarn_combine_item(batch, 0, item_scratch, item_bytes));
        CHECK_OK(kvarn_combine_item(batch, 1, item_scratch, item_bytes));
        CHECK(memcmp(out, other, sizeof out) == 0);
        CHECK_STATUS(kvarn_attend_item(batch, items, item_scratch, item_bytes), KVARN_BAD_ARGUMENT);
        CHECK_STATUS(kvarn_combine_item(batch, 2, item_scratch, item_bytes), KVARN_BAD_ARGUMENT);
        CHECK_STATUS(kvarn_attend_item(batch, 0, item_scratch, 100), KVARN_BUFFER_TOO_SMALL);
        CHECK_STATUS(kvarn_attend_item(batch, 0, NULL, item_bytes), KVARN_NULL_POINTER);
    }
    CHECK_STATUS(kvarn_attention_plan(&another, both, 2, NULL, 1, memory, plan_bytes - 1, &batch), KVARN_BUFFER_TOO_SMALL);
    CHECK_STATUS(kvarn_attention_plan(&another, both, 2, NULL, 1, NULL, plan_bytes, &batch), KVARN_NULL_POINTER);
    CHECK_STATUS(kvarn_attention_plan(&another, NULL, 2, NULL, 1, memory, plan_bytes, &batch), KVARN_NULL_POINTER);
    both[1].size = 8;  // not the first one's
    CHECK_STATUS(kvarn_attention_plan(&another, both, 2, NULL, 1, memory, plan_bytes, &batch), KVARN_BAD_ARGUMENT);
    CHECK(kvarn_attention_bytes(&another, both, 2) == 0);
    memset(memory, 0, plan_bytes);
    CHECK_STATUS(kvarn_attend_item(NULL, 0, item_scratch, item_bytes), KVARN_NULL_POINTER);
    CHECK(kvarn_attention_items(NULL) == 0 && kvarn_attention_items(batch) == 0);  // no handle is there any more
    CHECK_STATUS(kvarn_attend_item(batch, 0, item_scratch, item_bytes), KVARN_BAD_ARGUMENT);

    // A tree of two drafts: the second does not see the first. Without a mask it does.
    static const uint64_t mask[new_tokens] = {1, 2, 7};
    task.mask = mask;
    task.mask_stride = 1;
    task.mask_tokens = 3;
    CHECK_OK(kvarn_attend(&f, &task, NULL, scratch, scratch_bytes));
    CHECK(memcmp(out, other, rows * dim * sizeof *out) == 0);
    CHECK(memcmp(out + rows * dim, other + rows * dim, rows * dim * sizeof *out) != 0);
    CHECK(memcmp(out + 2 * rows * dim, other + 2 * rows * dim, rows * dim * sizeof *out) == 0);
    task.mask_stride = 0;
    CHECK_STATUS(kvarn_attend(&f, &task, NULL, scratch, scratch_bytes), KVARN_SHAPE_MISMATCH);
    task.mask_tokens = 0;
    task.mask = NULL;

    // Errors; nothing is written.
    memset(other, 0x11, sizeof other);
    CHECK_STATUS(kvarn_attend(NULL, &task, NULL, scratch, scratch_bytes), KVARN_NULL_POINTER);
    CHECK_STATUS(kvarn_attend(&f, NULL, NULL, scratch, scratch_bytes), KVARN_NULL_POINTER);
    CHECK_STATUS(kvarn_attend(&f, &task, NULL, NULL, scratch_bytes), KVARN_NULL_POINTER);
    CHECK_STATUS(kvarn_attend(&f, &task, NULL, scratch, 10), KVARN_BUFFER_TOO_SMALL);
    CHECK_STATUS(kvarn_attend(&f, &task, NULL, scratch, kvarn_attend_scratch_bytes(&f, new_tokens * rows, 3) - 1),
                 KVARN_BUFFER_TOO_SMALL);
    options = (kvarn_attention_options)KVARN_ATTENTION_OPTIONS_INIT;
    options.window = -1;
    CHECK_STATUS(kvarn_attend(&f, &task, &options, scratch, scratch_bytes), KVARN_BAD_ARGUMENT);
    options.window = 0;
    options.causal = 2;
    CHECK_STATUS(kvarn_attend(&f, &task, &options, scratch, scratch_bytes), KVARN_BAD_ARGUMENT);
    options.causal = 1;
    options.precision = 3;
    CHECK_STATUS(kvarn_attend(&f, &task, &options, scratch, scratch_bytes), KVARN_BAD_ARGUMENT);
    task.history_count = SIZE_MAX;
    CHECK_STATUS(kvarn_attend(&f, &task, NULL, scratch, scratch_bytes), KVARN_BUFFER_TOO_SMALL);
    CHECK(kvarn_attention_bytes(&f, &task, 1) == 0);
    task.history_count = 3;
    history[1].key_basis = 2;
    CHECK_STATUS(kvarn_attend(&f, &task, NULL, scratch, scratch_bytes), KVARN_BAD_ARGUMENT);
    history[1].key_basis = 0;
    history[1].records += 1;
    CHECK_STATUS(kvarn_attend(&f, &task, NULL, scratch, scratch_bytes), KVARN_SHAPE_MISMATCH);
    CHECK_STATUS(kvarn_attention_plan(&f, &task, 1, NULL, 1, memory, plan_bytes, &batch), KVARN_SHAPE_MISMATCH);
    history[1].records -= 1;
    q[7] = (float)NAN;
    CHECK_STATUS(kvarn_attend(&f, &task, NULL, scratch, scratch_bytes), KVARN_NOT_FINITE);
    q[7] = 0.0f;
    task.q.channels = dim - 4;
    CHECK_STATUS(kvarn_attend(&f, &task, NULL, scratch, scratch_bytes), KVARN_SHAPE_MISMATCH);
    for (size_t i = 0; i < sizeof other; ++i)
        if (((const unsigned char*)other)[i] != 0x11) CHECK(!"the output was written to");
    CHECK_STATUS(kvarn_sealed_tiles(&f, &grid, 1, 0, 1, &history[1]), KVARN_BAD_ARGUMENT);
    CHECK_STATUS(kvarn_paged_tiles(&f, records, 1, NULL, 1, &history[1]), KVARN_NULL_POINTER);
    CHECK_STATUS(kvarn_listed_tiles(&f, NULL, 1, &history[1]), KVARN_NULL_POINTER);
    CHECK_STATUS(kvarn_exact_tokens(NULL, NULL, 0, 0, 0, &history[1]), KVARN_NULL_POINTER);
    history[1] = whole;
    history[1].skip = group;
    CHECK_STATUS(kvarn_segment_tokens(&f, 0, 1, &history[1]), KVARN_SHAPE_MISMATCH);

    give_back(scratch), give_back(item_scratch), give_back(memory), give_back(records);
}
