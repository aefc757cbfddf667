// SPDX-License-Identifier: Apache-2.0
// A whole cache: what is rolled back, forked, spread over items or saved goes on with the bits of a run that never was. And what every
// operation refuses.
#include "check.h"

#include <math.h>

enum { dim = 64, group = 32, layers = 2, kv_heads = 2, query_heads = 6, sink = 32, most = 512, width = query_heads * dim };

/// A cache with a little engine around it: a token's K, V and q depend on its position and `seed` alone.
struct engine {
    kvarn_format format;
    kvarn_cache_config config;
    void *memory, *scratch, *work;
    size_t scratch_bytes, work_bytes;
    kvarn_pool* pool;
};

static void make_engine(struct engine* e, size_t sequences, size_t record_blocks)
{
    *e = (struct engine){.format = KVARN_FORMAT_INIT, .config = KVARN_CACHE_CONFIG_INIT};
    CHECK_OK(kvarn_format_parse("k4v2_g32", dim, dim, &e->format));
    e->config.format = &e->format;
    e->config.layers = layers;
    e->config.heads = kv_heads;
    e->config.sink_tokens = sink;
    e->config.sequences = sequences;
    e->config.most_tokens = most;
    e->config.most_step = 64;
    e->config.record_blocks = record_blocks;
    kvarn_cache_plan plan = KVARN_CACHE_PLAN_INIT;
    CHECK_OK(kvarn_plan_cache(&e->config, &plan));
    CHECK(plan.bytes == plan.records + plan.exact + plan.state);
    CHECK(plan.record_block_bytes == layers * kv_heads * kvarn_record_bytes(&e->format, 0));
    CHECK(plan.exact_block_bytes == layers * kv_heads * group * 2 * dim * 2);
    e->memory = take_memory(plan.bytes);
    CHECK_STATUS(kvarn_pool_make(&e->config, e->memory, plan.bytes - 1, &e->pool), KVARN_BUFFER_TOO_SMALL);
    CHECK_OK(kvarn_pool_make(&e->config, e->memory, plan.bytes, &e->pool));
    e->scratch_bytes = kvarn_cache_scratch_bytes(&e->config, 0);
    e->scratch = take_memory(e->scratch_bytes);
    e->work_bytes = 0;
    e->work = NULL;
}

static void drop_engine(struct engine* e)
{
    give_back(e->memory), give_back(e->scratch);
    if (e->work != NULL) give_back(e->work);
}

/// One step of m tokens: reserved, stored and attended to, not committed. `out`: [layers][m][query heads][dim].
static kvarn_status step(struct engine* e, kvarn_sequence s, size_t m, uint64_t seed, float* out, int by_items)
{
    static float k[64 * kv_heads * dim], v[64 * kv_heads * dim], q[64 * width];
    const int64_t position = kvarn_next_position(e->pool, s);
    kvarn_status said = kvarn_reserve(e->pool, s, m);
    if (said != KVARN_OK) return said;
    for (size_t layer = 0; layer < layers; ++layer) {
        for (size_t t = 0; t < m; ++t) {
            const uint64_t token = seed * 1000003u + (uint64_t)position + t;
            fill(k + t * kv_heads * dim, kv_heads * dim, dim, token * 8 + layer);
            fill(v + t * kv_heads * dim, kv_heads * dim, dim, token * 8 + 2 + layer);
            for (size_t i = 0; i < width; ++i) q[t * width + i] = random_value(token * 8 + 4 + layer, i);
        }
        kvarn_step one = KVARN_STEP_INIT;
        one.sequence = s;
        one.k = kvarn_token_major(k, KVARN_F32, m, kv_heads, dim);
        one.v = kvarn_token_major(v, KVARN_F32, m, kv_heads, dim);
        one.q = kvarn_token_major(q, KVARN_F32, m, query_heads, dim);
        one.out = kvarn_token_major(out + layer * m * width, KVARN_F32, m, query_heads, dim);
        kvarn_layer_options options = KVARN_LAYER_OPTIONS_INIT;
        options.threads = by_items ? 8 : 1;
        options.chunks_per_item = 1;
        const size_t need = kvarn_layer_bytes(e->pool, &one, 1, &options);
        CHECK(need != 0 &&
              need <= kvarn_layer_bound(&e->config, 1, m * (query_heads / kv_heads), query_heads / kv_heads, &options));
        if (e->work != NULL && e->work_bytes < need) give_back(e->work), e->work = NULL;
        if (e->work == NULL) e->work = take_memory(e->work_bytes = need);
        kvarn_layer* items = NULL;
        CHECK_STATUS(kvarn_layer_plan(e->pool, layer, &one, 1, &options, e->work, need - 1, &items, NULL),
                     KVARN_BUFFER_TOO_SMALL);
        said = kvarn_layer_plan(e->pool, layer, &one, 1, &options, e->work, need, &items, NULL);
        if (said != KVARN_OK) return said;
        if (!by_items) {
            said = kvarn_layer_run(items, e->scratch, e->scratch_bytes);
            if (said != KVARN_OK) return said;
            continue;
        }
        memset(&one, 0xff, sizeof one);  // what a plan needs of its steps it has kept
        CHECK(kvarn_store_items(items) == kv_heads);
        for (size_t i = kvarn_store_items(items); i-- != 0;) CHECK_OK(kvarn_layer_store(items, i));
        for (size_t i = kvarn_attend_items(items); i-- != 0;)
            CHECK_OK(kvarn_layer_attend(items, i, e->scratch, e->scratch_bytes));
        for (size_t i = kvarn_finish_items(items); i-- != 0;)
            CHECK_OK(kvarn_layer_finish(items, i, e->scratch, e->scratch_bytes));
        CHECK(kvarn_step_of_store(items, 0) == 0 && kvarn_step_of_attend(items, 0) == 0);
        CHECK(kvarn_step_of_store(items, 99999) == SIZE_MAX && kvarn_step_of_attend(items, 99999) == SIZE_MAX &&
              kvarn_step_of_finish(items, 99999) == SIZE_MAX);
        CHECK_STATUS(kvarn_layer_store(items, 99999), KVARN_BAD_ARGUMENT);
        CHECK_STATUS(kvarn_layer_attend(items, 99999, e->scratch, e->scratch_bytes), KVARN_BAD_ARGUMENT);
        CHECK_STATUS(kvarn_layer_finish(items, 99999, e->scratch, e->scratch_bytes), KVARN_BAD_ARGUMENT);
        CHECK_STATUS(kvarn_layer_attend(items, 0, e->scratch, 64), KVARN_BUFFER_TOO_SMALL);
    }
    return KVARN_OK;
}

static void commit_and_seal(struct engine* e, kvarn_sequence s, size_t m)
{
    CHECK_OK(kvarn_commit(e->pool, s, m));
    CHECK_OK(kvarn_seal(e->pool, s, SIZE_MAX, e->scratch, e->scratch_bytes, NULL));
}

/// Tokens up to position `end`, one a step; the last outputs stay in `out`.
static void go_on(struct engine* e, kvarn_sequence s, int64_t end, float* out, int by_items)
{
    while (kvarn_next_position(e->pool, s) < end) {
        CHECK_OK(step(e, s, 1, 1, out, by_items));
        commit_and_seal(e, s, 1);
    }
}

static void same_bits(void)
{
    enum { end = 150 };
    struct engine e;
    make_engine(&e, 6, 0);
    static float expected[layers * width], out[layers * 64 * width];
    kvarn_sequence plain, other, fork, restored;
    CHECK_OK(kvarn_open(e.pool, 0, &plain));
    go_on(&e, plain, end, expected, 0);
    kvarn_sequence_statistics n = KVARN_SEQUENCE_STATISTICS_INIT;
    CHECK_OK(kvarn_statistics_of(e.pool, plain, &n));
    CHECK(n.tokens == end && n.sealed_tokens == 96 && n.record_blocks == 3 && n.exact_blocks == 2 && n.next_position == end &&
          n.dead_tokens == 0);

    // By items of many threads, in the slowest instruction set.
    CHECK_OK(kvarn_open(e.pool, 0, &other));
    const char* const best = kvarn_active_arch();
    CHECK_OK(kvarn_select_arch(kvarn_usable_arch(0)));
    go_on(&e, other, end, out, 1);
    CHECK_OK(kvarn_select_arch(best));
    CHECK(memcmp(out, expected, sizeof expected) == 0);
    CHECK_OK(kvarn_close(e.pool, other));

    // With drafts that are taken back, a truncated detour, and a prompt in pieces.
    CHECK_OK(kvarn_open(e.pool, 0, &other));
    CHECK_OK(step(&e, other, 32, 1, out, 0));
    commit_and_seal(&e, other, 32);
    CHECK_OK(step(&e, other, 20, 1, out, 1));
    CHECK_OK(kvarn_commit(e.pool, other, 20));
    CHECK_OK(step(&e, other, 3, 9, out, 0));
    CHECK(kvarn_drafts(e.pool, other) == 3);
    CHECK_OK(kvarn_commit(e.pool, other, 0));
    go_on(&e, other, 60, out, 0);
    CHECK_OK(step(&e, other, 2, 9, out, 0));
    CHECK_OK(kvarn_commit(e.pool, other, 2));
    CHECK_OK(kvarn_truncate(e.pool, other, 60));
    go_on(&e, other, 100, out, 0);

    // A fork goes on as the one that it came from, and does not change it.
    CHECK_OK(kvarn_fork(e.pool, other, &fork));
    CHECK_OK(step(&e, fork, 5, 7, out, 0));
    CHECK_OK(kvarn_commit(e.pool, fork, 5));
    go_on(&e, other, end, out, 0);
    CHECK(memcmp(out, expected, sizeof expected) == 0);
    CHECK_OK(kvarn_truncate(e.pool, fork, 100));
    // Saved and loaded, that one too.
    const uint64_t bytes = kvarn_saved_bytes(e.pool, fork, 0, SIZE_MAX);
    void* const buffer = take_memory(bytes);
    CHECK_OK(kvarn_save_to(e.pool, fork, 0, SIZE_MAX, buffer, bytes));
    CHECK_OK(kvarn_close(e.pool, fork));
    const char* differs = "x";
    CHECK_OK(kvarn_load_from(e.pool, buffer, bytes, &restored, &differs));
    CHECK(differs == NULL);
    memset(out, 0, sizeof out);
    go_on(&e, restored, end, out, 0);
    CHECK(memcmp(out, expected, sizeof expected) == 0);
    give_back(buffer);

    // A tree of drafts: the path 0, 2 is as if 1 had not been. Draft 1 is another token at the position that 2 takes.
    CHECK_OK(kvarn_truncate(e.pool, restored, 148));
    float k[3 * kv_heads * dim], v[3 * kv_heads * dim];
    CHECK_OK(kvarn_reserve(e.pool, restored, 3));
    static const int64_t positions[3] = {148, 777, 149};
    for (size_t layer = 0; layer < layers; ++layer) {
        for (size_t t = 0; t < 3; ++t) {
            const uint64_t token = 1000003u + (uint64_t)positions[t];
            fill(k + t * kv_heads * dim, kv_heads * dim, dim, token * 8 + layer);
            fill(v + t * kv_heads * dim, kv_heads * dim, dim, token * 8 + 2 + layer);
        }
        const kvarn_view kv = kvarn_token_major(k, KVARN_F32, 3, kv_heads, dim),
                         vv = kvarn_token_major(v, KVARN_F32, 3, kv_heads, dim);
        CHECK_OK(kvarn_store(e.pool, restored, layer, &kv, &vv, 0, 0));
    }
    static const size_t path[2] = {0, 2}, wrong_path[2] = {2, 0};
    CHECK_STATUS(kvarn_commit_path(e.pool, restored, wrong_path, 2), KVARN_BAD_ARGUMENT);
    CHECK_STATUS(kvarn_commit_path(e.pool, restored, NULL, 2), KVARN_NULL_POINTER);
    CHECK_OK(kvarn_commit_path(e.pool, restored, path, 2));
    CHECK(kvarn_next_position(e.pool, restored) == end && kvarn_tokens(e.pool, restored) == end);
    static float next[layers * width];
    go_on(&e, plain, end + 1, next, 0);
    go_on(&e, restored, end + 1, out, 0);
    CHECK(memcmp(out, next, sizeof next) == 0);

    // Everything is given back.
    CHECK_OK(kvarn_close(e.pool, plain));
    CHECK_OK(kvarn_close(e.pool, other));
    CHECK_OK(kvarn_close(e.pool, restored));
    kvarn_pool_statistics all = KVARN_POOL_STATISTICS_INIT;
    CHECK_OK(kvarn_statistics_of_pool(e.pool, &all));
    CHECK(all.sequences == 0 && all.records_used == 0 && all.exact_used == 0 && all.bytes_used == 0 && all.records_free > 0 &&
          all.tiles_sealed > 6);
    drop_engine(&e);
}

static void spread_sealing(void)
{
    struct engine e;
    make_engine(&e, 2, 0);
    static float out[layers * 64 * width], k[group * dim], spread[group * dim];
    kvarn_sequence at_once, later;
    CHECK_OK(kvarn_open(e.pool, 0, &at_once));
    CHECK_OK(kvarn_open(e.pool, 0, &later));
    for (int i = 0; i < 2; ++i) {
        const kvarn_sequence s = i == 0 ? at_once : later;
        CHECK_OK(step(&e, s, 64, 1, out, 0));
        CHECK_OK(kvarn_commit(e.pool, s, 64));
        CHECK(kvarn_ready_tiles(e.pool, s) == 1);
    }
    kvarn_seal_report report = KVARN_SEAL_REPORT_INIT;
    CHECK_OK(kvarn_seal(e.pool, at_once, SIZE_MAX, e.scratch, e.scratch_bytes, &report));
    CHECK(report.sealed == 1 && report.kept_exact == 0);
    size_t queued = 0;
    CHECK_OK(kvarn_begin_seal(e.pool, later, SIZE_MAX, &queued));
    CHECK(queued == 1 && kvarn_seal_items(e.pool) == layers * kv_heads);
    CHECK(kvarn_cancel_seal(e.pool, later) == 1 && kvarn_seal_items(e.pool) == 0);
    CHECK_OK(kvarn_begin_seal_all(e.pool, 0, &queued));
    CHECK(queued == 0);
    CHECK_STATUS(kvarn_begin_seal_all(NULL, 1, &queued), KVARN_NULL_POINTER);
    CHECK_OK(kvarn_begin_seal_all(e.pool, SIZE_MAX, &queued));
    CHECK(queued == 1);
    CHECK_OK(kvarn_begin_seal_all(e.pool, SIZE_MAX, NULL));  // nothing is ready any more
    CHECK_OK(kvarn_seal_item(e.pool, 0, e.scratch, e.scratch_bytes));
    CHECK_OK(kvarn_finish_seal(e.pool, 2, &report));  // but item 1 was not done
    CHECK(report.sealed == 0 && report.unfinished == 0);
    const size_t left = kvarn_seal_items(e.pool);
    CHECK(left == layers * kv_heads - 2);
    for (size_t i = 0; i < left; ++i) CHECK_OK(kvarn_seal_item(e.pool, i, e.scratch, e.scratch_bytes));
    CHECK_OK(kvarn_finish_seal(e.pool, left, &report));
    CHECK(report.sealed == 0 && report.unfinished == 1 && kvarn_seal_items(e.pool) == layers * kv_heads);
    for (size_t i = 0; i < layers * kv_heads; ++i) CHECK_OK(kvarn_seal_item(e.pool, i, e.scratch, e.scratch_bytes));
    CHECK_STATUS(kvarn_seal_item(e.pool, layers * kv_heads, e.scratch, e.scratch_bytes), KVARN_BAD_ARGUMENT);
    CHECK_STATUS(kvarn_seal_item(e.pool, 0, e.scratch, 5), KVARN_BUFFER_TOO_SMALL);
    CHECK_OK(kvarn_finish_seal(e.pool, SIZE_MAX, &report));
    CHECK(report.sealed == 1 && kvarn_seal_items(e.pool) == 0 && kvarn_ready_tiles(e.pool, later) == 0);

    // Both hold the same.
    const kvarn_view one = kvarn_token_major(k, KVARN_F32, group, 1, dim),
                     two = kvarn_token_major(spread, KVARN_F32, group, 1, dim);
    CHECK(kvarn_count_tokens(e.pool, later, 32, 64) == 32);
    CHECK_OK(kvarn_read(e.pool, at_once, 1, 1, 32, 64, &one, NULL, e.scratch, e.scratch_bytes));
    CHECK_OK(kvarn_read(e.pool, later, 1, 1, 32, 64, &two, NULL, e.scratch, e.scratch_bytes));
    CHECK(memcmp(k, spread, sizeof k) == 0);

    // A tile with a NaN stays exact, and is told of.
    CHECK_OK(kvarn_reserve(e.pool, later, group));
    for (size_t layer = 0; layer < layers; ++layer)
        for (size_t head = 0; head < kv_heads; ++head) {
            fill(k, group * dim, dim, 5);
            if (layer == 1 && head == 0) k[77] = (float)NAN;
            CHECK_OK(kvarn_store(e.pool, later, layer, &one, &one, 0, head));
        }
    CHECK_OK(kvarn_commit(e.pool, later, group));
    CHECK_OK(kvarn_seal(e.pool, later, SIZE_MAX, e.scratch, e.scratch_bytes, &report));
    CHECK(report.sealed == 0 && report.kept_exact == 1 && report.layer == 1 && report.head == 0 && report.position == 64 &&
          report.why == KVARN_NOT_FINITE && report.sequence.slot == later.slot && report.sequence.generation == later.generation);
    kvarn_pool_statistics all = KVARN_POOL_STATISTICS_INIT;
    CHECK_OK(kvarn_statistics_of_pool(e.pool, &all));
    CHECK(all.tiles_kept_not_finite == 1 && all.sequences == 2);
    drop_engine(&e);
}

/// Adds `by` to the first channel: as good as a rotation here.
struct turning {
    size_t calls, tokens;
    int64_t least;
};
static void turn(void* user, size_t layer, size_t head, float* keys, size_t tokens, size_t channels, int64_t position)
{
    struct turning* const t = user;
    ++t->calls;
    t->tokens += tokens;
    if (position < t->least) t->least = position;
    if (layer >= layers || head >= kv_heads || channels != dim) abort();
    for (size_t i = 0; i < tokens; ++i) keys[i * channels] += 1.0f;
}

static void edited(void)
{
    struct engine e;
    make_engine(&e, 3, 0);
    static float out[layers * 64 * width], before[64 * dim], after[64 * dim];
    kvarn_sequence s;
    CHECK_OK(kvarn_open(e.pool, 1000, &s));
    CHECK(kvarn_next_position(e.pool, s) == 1000);
    go_on(&e, s, 1000 + 140, out, 0);
    CHECK_OK(kvarn_erase(e.pool, s, 1040, 1050));
    CHECK(kvarn_tokens(e.pool, s) == 130 && kvarn_next_position(e.pool, s) == 1140 &&
          kvarn_count_tokens(e.pool, s, 1030, 1060) == 20);
    CHECK_STATUS(kvarn_erase(e.pool, s, 1050, 1040), KVARN_BAD_ARGUMENT);
    CHECK_OK(kvarn_evict_front(e.pool, s, 3));
    CHECK(kvarn_count_tokens(e.pool, s, 1032, 1035) == 0 && kvarn_count_tokens(e.pool, s, 1000, 1032) == 32 &&
          kvarn_tokens(e.pool, s) == 127);
    CHECK_STATUS(kvarn_evict_front(e.pool, s, 1000), KVARN_BAD_ARGUMENT);
    kvarn_sequence_statistics n = KVARN_SEQUENCE_STATISTICS_INIT;
    CHECK_OK(kvarn_statistics_of(e.pool, s, &n));
    CHECK(n.dead_tokens == 13 && n.spans == n.record_blocks + n.exact_blocks + 1);

    // Behind the gaps everything moves towards them: exact tokens and records.
    const kvarn_view x = kvarn_token_major(before, KVARN_F32, 64, 1, dim), y = kvarn_token_major(after, KVARN_F32, 64, 1, dim);
    CHECK_OK(kvarn_read(e.pool, s, 1, 0, 1076, 1140, &x, NULL, e.scratch, e.scratch_bytes));
    struct turning t = {0, 0, INT64_MAX};
    kvarn_shift_report report = KVARN_SHIFT_REPORT_INIT;
    const size_t bytes = kvarn_shift_scratch_bytes(&e.format);
    void* const scratch = take_memory(bytes);
    CHECK_STATUS(kvarn_shift_positions(e.pool, s, 1050, 1140, -10, NULL, &t, scratch, bytes, &report), KVARN_NULL_POINTER);
    CHECK_STATUS(kvarn_shift_positions(e.pool, s, 1050, 1140, -10, turn, &t, scratch, bytes - 1, &report),
                 KVARN_BUFFER_TOO_SMALL);
    CHECK_STATUS(kvarn_shift_positions(e.pool, s, 1050, 1140, -11, turn, &t, scratch, bytes, &report), KVARN_BAD_ARGUMENT);
    CHECK(t.calls == 0);
    CHECK_OK(kvarn_shift_positions(e.pool, s, 1050, 1140, -10, turn, &t, scratch, bytes, &report));
    CHECK(report.tokens == 90 && report.sealed_tokens > 60 && report.relative_error > 0.0 && report.relative_error < 0.3);
    CHECK(t.tokens == 90 * layers * kv_heads && t.least == 1050);
    CHECK(kvarn_next_position(e.pool, s) == 1130 && kvarn_tokens(e.pool, s) == 127);
    CHECK_OK(kvarn_read(e.pool, s, 1, 0, 1066, 1130, &y, NULL, e.scratch, e.scratch_bytes));
    double error = 0;
    for (size_t i = 0; i < 64; ++i) error += fabs((double)after[i * dim] - (double)before[i * dim] - 1.0);
    CHECK(error / 64 < 0.3);
    give_back(scratch);
    // And it goes on.
    go_on(&e, s, 1150, out, 1);

    // The bases of heads by their data; and by hand.
    struct engine fresh;
    make_engine(&fresh, 1, 0);
    CHECK_OK(kvarn_open(fresh.pool, 0, &s));
    CHECK_OK(step(&fresh, s, 64, 1, out, 0));
    CHECK_OK(kvarn_commit(fresh.pool, s, 64));
    const size_t count = kvarn_pool_moment_count(fresh.pool), choose_bytes = kvarn_choose_bases_scratch_bytes(&fresh.format);
    CHECK(count == layers * kv_heads * dim);
    uint64_t* const moments = calloc(count, sizeof *moments);
    void* const choose_scratch = take_memory(choose_bytes);
    if (moments == NULL) exit(1);
    const kvarn_view q = kvarn_token_major(out, KVARN_F32, 4, query_heads, dim);
    for (size_t layer = 0; layer < layers; ++layer) CHECK_OK(kvarn_pool_add_query_moments(fresh.pool, layer, &q, moments, count));
    CHECK_STATUS(kvarn_pool_add_query_moments(fresh.pool, layers, &q, moments, count), KVARN_BAD_ARGUMENT);
    size_t changed = 99;
    kvarn_choose_options options = KVARN_CHOOSE_OPTIONS_INIT;
    options.margin = options.value_margin = 1e-6f;  // the original basis wherever it is not a million times worse
    CHECK_OK(kvarn_pool_choose_bases(fresh.pool, s, moments, count, &options, choose_scratch, choose_bytes, &changed));
    CHECK(changed == layers * kv_heads);
    kvarn_format f = KVARN_FORMAT_INIT;
    CHECK_OK(kvarn_pool_format(fresh.pool, 1, 1, &f));
    CHECK(f.key_rotation == KVARN_ROTATION_NONE && f.value_rotation == KVARN_ROTATION_NONE && f.group == group);
    f.key_rotation = KVARN_ROTATION_HADAMARD;
    CHECK_OK(kvarn_pool_set_format(fresh.pool, 1, 1, &f));
    f.key_bits = 8;
    CHECK_STATUS(kvarn_pool_set_format(fresh.pool, 1, 1, &f), KVARN_BAD_ARGUMENT);
    CHECK_OK(kvarn_seal(fresh.pool, s, SIZE_MAX, fresh.scratch, fresh.scratch_bytes, NULL));
    f.key_bits = 4;
    CHECK_STATUS(kvarn_pool_set_format(fresh.pool, 1, 1, &f), KVARN_BAD_ARGUMENT);  // there are records
    CHECK_STATUS(kvarn_pool_choose_bases(fresh.pool, s, moments, count, NULL, choose_scratch, choose_bytes, NULL),
                 KVARN_BAD_ARGUMENT);
    CHECK_STATUS(kvarn_pool_format(fresh.pool, layers, 0, &f), KVARN_BAD_ARGUMENT);
    free(moments);
    give_back(choose_scratch);
    drop_engine(&fresh);
    drop_engine(&e);
}

static void plans(void)
{
    kvarn_format f = KVARN_FORMAT_INIT;
    kvarn_cache_config c = KVARN_CACHE_CONFIG_INIT, fitted = KVARN_CACHE_CONFIG_INIT;
    kvarn_cache_plan plan = KVARN_CACHE_PLAN_INIT, with_rules = KVARN_CACHE_PLAN_INIT;
    CHECK_STATUS(kvarn_plan_cache(&c, &plan), KVARN_NULL_POINTER);  // no format
    c.format = &f;
    CHECK_STATUS(kvarn_plan_cache(&c, &plan), KVARN_BAD_ARGUMENT);  // no layers
    c.layers = 4;
    c.heads = 2;
    CHECK_OK(kvarn_plan_cache(&c, &plan));
    CHECK_STATUS(kvarn_plan_cache(NULL, &plan), KVARN_NULL_POINTER);
    CHECK_STATUS(kvarn_plan_cache(&c, NULL), KVARN_NULL_POINTER);

    kvarn_bit_rule rules[2] = {KVARN_BIT_RULE_INIT, KVARN_BIT_RULE_INIT};
    rules[0].last_layer = 0;
    rules[0].key_bits = 8;
    rules[1].first_layer = -1;
    rules[1].first_head = 1;
    rules[1].key_rotation = KVARN_ROTATION_NONE;
    c.rules = rules;
    c.rule_count = 2;
    CHECK_OK(kvarn_plan_cache(&c, &with_rules));
    CHECK(with_rules.record_block_bytes == plan.record_block_bytes + 2 * 128 * 128 / 2);
    void* const memory = take_memory(with_rules.bytes);
    kvarn_pool* pool = NULL;
    CHECK_OK(kvarn_pool_make(&c, memory, with_rules.bytes, &pool));
    memset(rules, 0, sizeof rules);  // nobody looks at them any more
    kvarn_format g = KVARN_FORMAT_INIT;
    CHECK_OK(kvarn_pool_format(pool, 0, 1, &g));
    CHECK(g.key_bits == 8 && g.key_rotation == KVARN_ROTATION_HADAMARD);
    CHECK_OK(kvarn_pool_format(pool, 3, 1, &g));
    CHECK(g.key_bits == 4 && g.key_rotation == KVARN_ROTATION_NONE);
    CHECK_OK(kvarn_pool_format(pool, 3, 0, &g));
    CHECK(g.key_bits == 4 && g.key_rotation == KVARN_ROTATION_HADAMARD);
    CHECK(kvarn_pool_layers(pool) == 4 && kvarn_pool_heads(pool) == 2);
    kvarn_cache_config whole = KVARN_CACHE_CONFIG_INIT;
    CHECK_OK(kvarn_pool_config(pool, &whole));
    CHECK(whole.format == NULL && whole.layers == 4 && whole.record_blocks == with_rules.record_blocks &&
          whole.sink_tokens == 128 && whole.most_spans == 80);
    give_back(memory);

    CHECK_STATUS(kvarn_plan_cache(&c, &plan), KVARN_BAD_ARGUMENT);  // rules without a size
    c.rules = NULL;
    CHECK_STATUS(kvarn_plan_cache(&c, &plan), KVARN_NULL_POINTER);
    c.rule_count = 0;
    CHECK_OK(kvarn_fit_cache(&c, plan.bytes - 1, &fitted));
    CHECK(fitted.record_blocks == plan.record_blocks - 1 && fitted.format == &f);
    CHECK_OK(kvarn_fit_cache(&c, plan.bytes, &fitted));
    CHECK(fitted.record_blocks == plan.record_blocks && fitted.exact_blocks == plan.exact_blocks);
    CHECK_OK(kvarn_fit_cache(&fitted, plan.bytes - 1, &fitted));
    CHECK_STATUS(kvarn_fit_cache(&c, 1000, &fitted), KVARN_NO_ROOM);

    kvarn_sequence_plan sequence = KVARN_SEQUENCE_PLAN_INIT;
    CHECK_OK(kvarn_plan_sequence(&c, 1000, &sequence));
    CHECK(sequence.elements == 1000 * 8 * 256 && sequence.record_bytes == 6 * plan.record_block_bytes);
    CHECK(sequence.exact_bytes == (1000 - 6 * 128) * 8 * 256 * 2);
    CHECK(fabs(sequence.bits_per_element -
               8.0 * (double)(sequence.record_bytes + sequence.exact_bytes) / (double)sequence.elements) < 1e-9);

    static const int32_t layers_[] = {-1, INT32_MAX, 1 << 20};
    for (size_t i = 0; i < 3; ++i) {
        c.layers = layers_[i];
        CHECK_STATUS(kvarn_plan_cache(&c, &plan), KVARN_BAD_ARGUMENT);
    }
    c.layers = 4;
    c.exact = 3;
    CHECK_STATUS(kvarn_plan_cache(&c, &plan), KVARN_BAD_ARGUMENT);
    c.exact = KVARN_BF16;
    c.sequences = SIZE_MAX;
    CHECK_STATUS(kvarn_plan_cache(&c, &plan), KVARN_BAD_ARGUMENT);
    c.sequences = 1;
    c.reserved = 1;
    CHECK_STATUS(kvarn_plan_cache(&c, &plan), KVARN_BAD_ARGUMENT);
    c.reserved = 0;
    CHECK(kvarn_cache_scratch_bytes(NULL, 0) == 0 && kvarn_cache_scratch_bytes(&c, 0) > 128 * 128 * 4);
    CHECK(kvarn_layer_bound(&c, 1, 8, 0, NULL) == 0 && kvarn_layer_bound(&c, SIZE_MAX / 2, 8, 1, NULL) == SIZE_MAX);
}

static void refused(void)
{
    struct engine e;
    make_engine(&e, 2, 1);
    static float out[layers * 64 * width];
    kvarn_sequence s, more, none = {0, 0};
    CHECK_STATUS(kvarn_open(e.pool, -1, &s), KVARN_BAD_ARGUMENT);
    CHECK_STATUS(kvarn_open(e.pool, 0, NULL), KVARN_NULL_POINTER);
    CHECK_STATUS(kvarn_open(NULL, 0, &s), KVARN_NULL_POINTER);
    CHECK_OK(kvarn_open(e.pool, 0, &s));
    CHECK_OK(kvarn_open(e.pool, 0, &more));
    kvarn_sequence third;
    CHECK_STATUS(kvarn_open(e.pool, 0, &third), KVARN_NO_ROOM);
    CHECK_STATUS(kvarn_fork(e.pool, s, &third), KVARN_NO_ROOM);
    CHECK_OK(kvarn_close(e.pool, more));

    // A handle that was closed is stale, also when its slot is open again.
    kvarn_sequence again;
    CHECK_OK(kvarn_open(e.pool, 0, &again));
    CHECK(again.slot == more.slot && again.generation != more.generation);
    const kvarn_sequence stale[] = {more, none, {UINT32_MAX, 1}};
    for (size_t i = 0; i < 3; ++i) {
        size_t number = 0;
        kvarn_sequence_statistics n = KVARN_SEQUENCE_STATISTICS_INIT;
        const kvarn_view x = kvarn_token_major(out, KVARN_F32, 0, kv_heads, dim);
        CHECK_STATUS(kvarn_close(e.pool, stale[i]), KVARN_STALE_HANDLE);
        CHECK_STATUS(kvarn_reserve(e.pool, stale[i], 1), KVARN_STALE_HANDLE);
        CHECK_STATUS(kvarn_commit(e.pool, stale[i], 0), KVARN_STALE_HANDLE);
        CHECK_STATUS(kvarn_truncate(e.pool, stale[i], 0), KVARN_STALE_HANDLE);
        CHECK_STATUS(kvarn_erase(e.pool, stale[i], 0, 1), KVARN_STALE_HANDLE);
        CHECK_STATUS(kvarn_evict_front(e.pool, stale[i], 1), KVARN_STALE_HANDLE);
        CHECK_STATUS(kvarn_fork(e.pool, stale[i], &third), KVARN_STALE_HANDLE);
        CHECK_STATUS(kvarn_store(e.pool, stale[i], 0, &x, &x, 0, 0), KVARN_STALE_HANDLE);
        CHECK_STATUS(kvarn_read(e.pool, stale[i], 0, 0, 0, 1, NULL, NULL, e.scratch, e.scratch_bytes), KVARN_STALE_HANDLE);
        CHECK_STATUS(kvarn_seal(e.pool, stale[i], 1, e.scratch, e.scratch_bytes, NULL), KVARN_STALE_HANDLE);
        CHECK_STATUS(kvarn_begin_seal(e.pool, stale[i], 1, &number), KVARN_STALE_HANDLE);
        CHECK_STATUS(kvarn_statistics_of(e.pool, stale[i], &n), KVARN_STALE_HANDLE);
        CHECK(kvarn_is_open(e.pool, stale[i]) == 0 && kvarn_tokens(e.pool, stale[i]) == 0 &&
              kvarn_next_position(e.pool, stale[i]) == -1);
        CHECK(kvarn_saved_bytes(e.pool, stale[i], 0, 1) == 0);
        kvarn_step one = KVARN_STEP_INIT;
        kvarn_layer* items = NULL;
        size_t failed = 99;
        one.sequence = stale[i];
        kvarn_step two[2] = {KVARN_STEP_INIT, KVARN_STEP_INIT};
        two[0].sequence = s;
        two[1] = one;
        void* const work = take_memory(4096);
        CHECK_STATUS(kvarn_layer_plan(e.pool, 0, two, 2, NULL, work, 4096, &items, &failed), KVARN_STALE_HANDLE);
        CHECK(failed == 1 && items == NULL);
        give_back(work);
    }
    CHECK(kvarn_is_open(e.pool, again) == 1);

    // Not enough blocks: nothing has changed.
    CHECK_STATUS(kvarn_reserve(e.pool, s, most + 1), KVARN_SEQUENCE_FULL);
    CHECK_STATUS(kvarn_reserve(e.pool, s, SIZE_MAX), KVARN_SEQUENCE_FULL);
    CHECK_STATUS(kvarn_reserve(e.pool, s, most), KVARN_NO_ROOM);
    CHECK(kvarn_drafts(e.pool, s) == 0);
    size_t which = 99;
    kvarn_sequence_room batch[3] = {{s, 8}, {again, 9}, {more, 1}};
    CHECK_STATUS(kvarn_reserve_batch(e.pool, batch, 3, &which), KVARN_STALE_HANDLE);
    CHECK(which == 2);
    batch[1].tokens = most;
    CHECK_STATUS(kvarn_reserve_batch(e.pool, batch, 2, &which), KVARN_NO_ROOM);
    CHECK(which == 1);
    CHECK_STATUS(kvarn_reserve_batch(e.pool, batch, 2, NULL), KVARN_NO_ROOM);
    CHECK_STATUS(kvarn_reserve_batch(e.pool, NULL, 1, &which), KVARN_NULL_POINTER);
    CHECK_STATUS(kvarn_reserve_batch(NULL, batch, 1, &which), KVARN_NULL_POINTER);
    CHECK(kvarn_drafts(e.pool, s) == 0 && kvarn_drafts(e.pool, again) == 0);
    CHECK_OK(kvarn_reserve_batch(e.pool, NULL, 0, NULL));
    batch[1].tokens = 9;
    CHECK_OK(kvarn_reserve_batch(e.pool, batch, 2, NULL));
    CHECK(kvarn_drafts(e.pool, s) == 8 && kvarn_drafts(e.pool, again) == 9);
    CHECK_OK(kvarn_commit(e.pool, s, 0));
    CHECK_OK(kvarn_commit(e.pool, again, 0));
    CHECK_OK(step(&e, s, 64, 1, out, 0));
    CHECK_STATUS(kvarn_commit(e.pool, s, 65), KVARN_BAD_ARGUMENT);
    CHECK_STATUS(kvarn_erase(e.pool, s, 0, 1), KVARN_BAD_ARGUMENT);  // there are drafts
    CHECK_STATUS(kvarn_fork(e.pool, s, &third), KVARN_BAD_ARGUMENT);
    commit_and_seal(&e, s, 64);
    CHECK_OK(step(&e, s, 32, 1, out, 0));
    CHECK_OK(kvarn_commit(e.pool, s, 32));
    CHECK_STATUS(kvarn_seal(e.pool, s, SIZE_MAX, e.scratch, e.scratch_bytes, NULL),
                 KVARN_NO_ROOM);  // the pool has one record block
    CHECK_STATUS(kvarn_begin_seal_all(e.pool, SIZE_MAX, NULL), KVARN_NO_ROOM);

    // Drafts that are not stored are neither committed nor attended to.
    CHECK_OK(kvarn_reserve(e.pool, s, 1));
    CHECK_STATUS(kvarn_commit(e.pool, s, 1), KVARN_BAD_ARGUMENT);
    float k[kv_heads * dim] = {0}, q[width] = {0};
    kvarn_step one = KVARN_STEP_INIT;
    one.sequence = s;
    one.q = kvarn_token_major(q, KVARN_F32, 1, query_heads, dim);
    one.out = kvarn_token_major(out, KVARN_F32, 1, query_heads, dim);
    size_t need = kvarn_layer_bytes(e.pool, &one, 1, NULL);
    void* const work = take_memory(need);
    kvarn_layer* items = NULL;
    CHECK_OK(kvarn_layer_plan(e.pool, 0, &one, 1, NULL, work, need, &items, NULL));
    CHECK_STATUS(kvarn_layer_run(items, e.scratch, e.scratch_bytes), KVARN_BAD_ARGUMENT);
    const kvarn_view kv = kvarn_token_major(k, KVARN_F32, 1, kv_heads, dim);
    CHECK_OK(kvarn_store(e.pool, s, 0, &kv, &kv, 0, 0));
    CHECK_OK(kvarn_layer_run(items, e.scratch, e.scratch_bytes));
    CHECK_STATUS(kvarn_store(e.pool, s, 0, &kv, NULL, 0, 0), KVARN_SHAPE_MISMATCH);
    CHECK_STATUS(kvarn_store(e.pool, s, 0, NULL, &kv, 0, 0), KVARN_NULL_POINTER);
    CHECK_STATUS(kvarn_store(e.pool, s, layers, &kv, &kv, 0, 0), KVARN_BAD_ARGUMENT);
    CHECK_STATUS(kvarn_store(e.pool, s, 0, &kv, &kv, 1, 0), KVARN_BAD_ARGUMENT);

    // Plans that are refused, and which step it was.
    struct {
        kvarn_step step;
        kvarn_status expected;
    } wrong[5];
    for (size_t i = 0; i < 5; ++i) wrong[i].step = one;
    wrong[0].step.q.heads = 5, wrong[0].expected = KVARN_SHAPE_MISMATCH;
    wrong[1].step.q.data = NULL, wrong[1].expected = KVARN_NULL_POINTER;
    wrong[2].step.out.channels = 8, wrong[2].expected = KVARN_SHAPE_MISMATCH;
    wrong[3].step.q.tokens = SIZE_MAX, wrong[3].expected = KVARN_SHAPE_MISMATCH;
    wrong[4].step.k.type = 9, wrong[4].expected = KVARN_BAD_ARGUMENT;
    for (size_t i = 0; i < 5; ++i) {
        size_t failed = 99;
        CHECK_STATUS(kvarn_layer_plan(e.pool, 0, &wrong[i].step, 1, NULL, work, need, &items, &failed), wrong[i].expected);
        CHECK(failed == 0);
    }
    CHECK_STATUS(kvarn_layer_plan(e.pool, layers, &one, 1, NULL, work, need, &items, NULL), KVARN_BAD_ARGUMENT);
    CHECK_STATUS(kvarn_layer_plan(e.pool, 0, NULL, 1, NULL, work, need, &items, NULL), KVARN_NULL_POINTER);
    CHECK_STATUS(kvarn_layer_plan(e.pool, 0, &one, SIZE_MAX, NULL, work, need, &items, NULL), KVARN_BAD_ARGUMENT);
    kvarn_layer_options options = KVARN_LAYER_OPTIONS_INIT;
    options.chunks_per_item = 0;
    CHECK_STATUS(kvarn_layer_plan(e.pool, 0, &one, 1, &options, work, need, &items, NULL), KVARN_BAD_ARGUMENT);
    options.chunks_per_item = 4;
    options.threads = SIZE_MAX;
    options.rows_per_task = SIZE_MAX;
    CHECK(kvarn_layer_bytes(e.pool, &one, 1, &options) >= need);
    CHECK(kvarn_layer_bytes(NULL, &one, 1, NULL) == 0 && kvarn_store_items(NULL) == 0);
    give_back(work);

    // Memory without a pool in it is seen as such.
    memset(e.memory, 0, 256);
    CHECK_STATUS(kvarn_reserve(e.pool, s, 1), KVARN_BAD_ARGUMENT);
    CHECK(kvarn_tokens(e.pool, s) == 0 && kvarn_pool_layers(e.pool) == 0);
    drop_engine(&e);
}

void test_cache(void)
{
    plans();
    same_bits();
    spread_sealing();
    edited();
    refused();
}
