// SPDX-License-Identifier: Apache-2.0
// Random configurations, shapes, positions and counts, most of them senseless: every call returns, with a status, and what it was told of
// memory is kept to. (With sanitizers, more is seen: compile the library and this with them.)
#include "check.h"

enum { rounds = 20000, largest_memory = 1 << 24, largest_scratch = 1 << 24, dim = 64 };

static uint64_t state = 88172645463325252u;
static float* values;
static unsigned char *memory, *work, *scratch;
static size_t made_pools, made_plans, attended;

static uint64_t next_random(void)
{
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return state;
}

static int one_of(uint64_t n)
{
    return next_random() % n == 0;
}

/// Sizes at the edges of types, and in between.
static size_t any_size(void)
{
    static const size_t edges[] = {
        0,       1, 2, 3, 31, 32, 64, 128, 1000, 4096, 1u << 20, INT32_MAX, (size_t)INT32_MAX + 1, SIZE_MAX / 2, SIZE_MAX - 1,
        SIZE_MAX};
    return one_of(3) ? (size_t)(next_random() >> next_random() % 64) : edges[next_random() % (sizeof edges / sizeof *edges)];
}

static int64_t any_position(void)
{
    return one_of(4) ? -(int64_t)(any_size() / 2) : (int64_t)any_size();
}

static int32_t any_number(void)
{
    static const int32_t edges[] = {0, 1, 2, 3, 4, 8, 32, 64, 128, -1, INT32_MAX, INT32_MIN};
    return one_of(4) ? (int32_t)(next_random() & INT32_MAX) : edges[next_random() % (sizeof edges / sizeof *edges)];
}

/// A status is one of those that there are.
static kvarn_status checked(kvarn_status said)
{
    CHECK(said >= KVARN_OK && said <= KVARN_OTHER_CONFIGURATION);
    return said;
}

static void random_format(kvarn_format* f)
{
    int32_t* const fields[] = {&f->head_dim_k, &f->head_dim_v,   &f->key_bits,      &f->value_bits,
                               &f->group,      &f->key_rotation, &f->exact_channels};
    f->head_dim_k = f->head_dim_v = dim;
    f->group = 32;
    if (one_of(2)) *fields[next_random() % 7] = any_number();
}

static void random_config(kvarn_cache_config* c, kvarn_bit_rule* rule)
{
    size_t* const fields[] = {&c->sink_tokens, &c->recent_tokens, &c->sequences,    &c->most_tokens,
                              &c->most_step,   &c->record_blocks, &c->exact_blocks, &c->most_spans};
    int32_t* const numbers[] = {&rule->first_layer, &rule->last_layer, &rule->first_head,   &rule->last_head,
                                &rule->key_bits,    &rule->value_bits, &rule->key_rotation, &c->exact};
    c->layers = one_of(8) ? any_number() : 2;
    c->heads = one_of(8) ? any_number() : 2;
    // Many layers and heads are allowed, and take long.
    if (c->layers > 64) c->layers = INT32_MAX;
    if (c->heads > 64) c->heads = INT32_MAX;
    c->most_tokens = 256;
    c->sequences = 3;
    c->sink_tokens = 32;
    for (int i = 0; i < 3; ++i)
        if (one_of(2)) *fields[next_random() % 8] = any_size();
    if (one_of(2)) *numbers[next_random() % 8] = any_number();
    c->rules = rule;
    c->rule_count = next_random() % 2;
}

static void random_attention(const kvarn_format* f)
{
    kvarn_segment segments[3] = {KVARN_SEGMENT_INIT, KVARN_SEGMENT_INIT, KVARN_SEGMENT_INIT};
    for (int i = 0; i < 3; ++i) {
        kvarn_segment* const s = segments + i;
        const size_t tokens = next_random() % 40;
        const kvarn_view x = kvarn_token_major(values, KVARN_F32, tokens, 1, dim);
        checked(kvarn_exact_tokens(&x, &x, 0, KVARN_BASIS_ORIGINAL, KVARN_BASIS_ORIGINAL, s));
        size_t* const fields[] = {&s->tokens, &s->head, &s->records, &s->skip, &s->k.channels, &s->v.tokens};
        if (one_of(3)) *fields[next_random() % 6] = any_size();
        if (one_of(6)) s->position = any_position();
        if (one_of(6)) checked(kvarn_segment_tokens(f, any_size(), any_size(), s));
    }
    kvarn_attention_task task = KVARN_ATTENTION_TASK_INIT;
    task.history = segments;
    task.history_count = next_random() % 4;
    task.q = kvarn_token_major(values, KVARN_F32, one_of(4) ? any_size() : 2, one_of(4) ? any_size() : 2,
                               one_of(8) ? any_size() : dim);
    task.out = task.q;
    task.out.data = values + (1 << 20);
    if (one_of(4)) task.first_position = any_position();
    if (one_of(4)) task.mask_tokens = any_size();
    const size_t bytes = kvarn_attention_bytes(f, &task, 1);
    kvarn_attention* plan = NULL;
    if (bytes <= largest_memory && checked(kvarn_attention_plan(f, &task, 1, NULL, any_size(), work, bytes, &plan)) == KVARN_OK) {
        const size_t items = kvarn_attention_items(plan);
        for (size_t i = 0; i < items && i < 3; ++i)
            attended += checked(kvarn_attend_item(plan, i, scratch, largest_scratch)) == KVARN_OK;
        if (items <= 3) checked(kvarn_combine_item(plan, 0, scratch, largest_scratch));
        checked(kvarn_attend_item(plan, any_size(), scratch, any_size() & 4095));
    }
    checked(kvarn_attend(f, &task, NULL, scratch, one_of(2) ? largest_scratch : any_size() & 4095));
}

static void random_layer(kvarn_pool* pool, kvarn_sequence s)
{
    kvarn_step step = KVARN_STEP_INIT;
    kvarn_layer_options options = KVARN_LAYER_OPTIONS_INIT;
    step.sequence = s;
    if (!one_of(3))
        step.k = step.v =
            kvarn_token_major(values, KVARN_F32, one_of(4) ? any_size() : kvarn_drafts(pool, s), kvarn_pool_heads(pool), dim);
    step.q = kvarn_token_major(values, KVARN_F32, one_of(4) ? any_size() : 1, one_of(4) ? any_size() : 4,
                               one_of(8) ? any_size() : dim);
    step.out = step.q;
    step.out.data = values + (1 << 20);
    if (one_of(4)) step.first_draft = any_size();
    if (one_of(3)) options.threads = any_size();
    if (one_of(3)) options.rows_per_task = any_size();
    if (one_of(3)) options.chunks_per_item = any_size();
    const size_t bytes = kvarn_layer_bytes(pool, &step, 1, &options);
    kvarn_layer* items = NULL;
    if (bytes > largest_memory) return;
    if (checked(kvarn_layer_plan(pool, next_random() % 3, &step, 1, &options, work, bytes, &items, NULL)) != KVARN_OK) return;
    ++made_plans;
    attended += checked(kvarn_layer_run(items, scratch, largest_scratch)) == KVARN_OK;
    (void)kvarn_step_of_attend(items, any_size());
}

static void random_cache(const kvarn_cache_config* c, size_t bytes)
{
    kvarn_pool* pool = NULL;
    kvarn_sequence s[2] = {{0, 0}, {0, 0}};
    if (checked(kvarn_pool_make(c, memory, bytes, &pool)) != KVARN_OK) return;
    ++made_pools;
    checked(kvarn_open(pool, one_of(4) ? any_position() : 0, &s[0]));
    for (int i = 0; i < 16; ++i) {
        const kvarn_sequence mine = s[next_random() % 2];
        const kvarn_sequence_room batch[2] = {{s[0], one_of(4) ? any_size() : 3}, {s[1], one_of(4) ? any_size() : 40}};
        switch (next_random() % 13) {
        case 0:
        case 1: checked(kvarn_reserve(pool, mine, one_of(3) ? any_size() : next_random() % 40)); break;
        case 2:
        case 3:
        case 4: random_layer(pool, mine); break;
        case 5: checked(kvarn_commit(pool, mine, one_of(3) ? any_size() : kvarn_drafts(pool, mine))); break;
        case 6: checked(kvarn_truncate(pool, mine, one_of(2) ? any_position() : (int64_t)(next_random() % 128))); break;
        case 7: checked(kvarn_erase(pool, mine, any_position(), any_position())); break;
        case 8: checked(kvarn_evict_front(pool, mine, any_size())); break;
        case 9:
            if (kvarn_is_open(pool, s[1])) checked(kvarn_close(pool, s[1]));
            checked(kvarn_fork(pool, s[0], &s[1]));
            break;
        case 10:
            checked(kvarn_seal(pool, mine, any_size(), scratch, one_of(4) ? any_size() & 4095 : largest_scratch, NULL));
            break;
        case 11:
            checked(kvarn_reserve_batch(pool, batch, one_of(4) ? 1 : 2, NULL));
            checked(kvarn_begin_seal_all(pool, any_size(), NULL));
            checked(kvarn_finish_seal(pool, any_size(), NULL));
            break;
        default: {
            const size_t size = (size_t)kvarn_saved_bytes(pool, mine, any_size(), any_size());
            if (size <= largest_memory) checked(kvarn_save_to(pool, mine, 0, SIZE_MAX, work, size));
            (void)kvarn_count_tokens(pool, mine, any_position(), any_position());
        }
        }
    }
}

void test_senseless(void)
{
    memory = take_memory(largest_memory), work = take_memory(largest_memory), scratch = take_memory(largest_scratch);
    values = calloc(1 << 21, sizeof *values);
    if (values == NULL) exit(1);
    for (int i = 0; i < rounds; ++i) {
        kvarn_format f = KVARN_FORMAT_INIT;
        kvarn_bit_rule rule = KVARN_BIT_RULE_INIT;
        kvarn_cache_config c = KVARN_CACHE_CONFIG_INIT;
        kvarn_cache_plan plan = KVARN_CACHE_PLAN_INIT;
        kvarn_sequence_plan sequence = KVARN_SEQUENCE_PLAN_INIT;
        random_format(&f);
        random_config(&c, &rule);
        c.format = &f;
        (void)kvarn_record_bytes(&f, any_size());
        (void)kvarn_call_scratch_bytes(&f, any_size());
        (void)kvarn_attend_scratch_bytes(&f, any_size(), any_size());
        (void)kvarn_cache_scratch_bytes(&c, any_size());
        (void)kvarn_layer_bound(&c, any_size(), any_size(), any_size(), NULL);
        checked(kvarn_plan_sequence(&c, any_size(), &sequence));
        if (one_of(3)) checked(kvarn_fit_cache(&c, any_size(), &c));
        random_attention(&f);
        if (checked(kvarn_plan_cache(&c, &plan)) == KVARN_OK && plan.bytes <= largest_memory && f.head_dim_k == dim)
            random_cache(&c, plan.bytes);
    }
    // Not all was senseless.
    CHECK(made_pools > rounds / 50 && made_plans > rounds / 50 && attended > rounds / 50);
    printf("%zu pools, %zu layers, %zu attended\n", made_pools, made_plans, attended);
    free(values);
    give_back(memory), give_back(work), give_back(scratch);
}
