// SPDX-License-Identifier: Apache-2.0
// Sequences to files and back: through functions that write and read, into buffers, by layers, damaged, and into other caches.
#include "check.h"

enum { dim = 64, group = 32, layers = 3, kv_heads = 2, tokens = 100 };

struct stream {
    unsigned char* data;
    size_t bytes, at, limit;
};

static kvarn_status write_stream(void* user, const void* data, size_t bytes)
{
    struct stream* const s = user;
    if (bytes > s->limit - s->bytes) return KVARN_IO_ERROR;
    memcpy(s->data + s->bytes, data, bytes);
    s->bytes += bytes;
    return KVARN_OK;
}

/// Never more than 1000 bytes at once, as a pipe.
static size_t read_stream(void* user, void* data, size_t bytes)
{
    struct stream* const s = user;
    size_t n = s->bytes - s->at;
    if (n > bytes) n = bytes;
    if (n > 1000) n = 1000;
    memcpy(data, s->data + s->at, n);
    s->at += n;
    return n;
}

static size_t read_nothing(void* user, void* data, size_t bytes)
{
    (void)user, (void)data, (void)bytes;
    return KVARN_READ_FAILED;
}

static kvarn_status write_no_status(void* user, const void* data, size_t bytes)
{
    (void)user, (void)data, (void)bytes;
    return (kvarn_status)4711;
}

static kvarn_pool* make_pool(const char* format, void** memory)
{
    kvarn_format f = KVARN_FORMAT_INIT;
    kvarn_cache_config c = KVARN_CACHE_CONFIG_INIT;
    kvarn_cache_plan plan = KVARN_CACHE_PLAN_INIT;
    kvarn_pool* pool = NULL;
    CHECK_OK(kvarn_format_parse(format, dim, dim, &f));
    c.format = &f;
    c.layers = layers;
    c.heads = kv_heads;
    c.sink_tokens = group;
    c.most_tokens = 256;
    c.most_step = tokens;
    c.sequences = 2;
    CHECK_OK(kvarn_plan_cache(&c, &plan));
    *memory = take_memory(plan.bytes);
    CHECK_OK(kvarn_pool_make(&c, *memory, plan.bytes, &pool));
    return pool;
}

static size_t used_blocks(const kvarn_pool* pool)
{
    kvarn_pool_statistics n = KVARN_POOL_STATISTICS_INIT;
    CHECK_OK(kvarn_statistics_of_pool(pool, &n));
    return n.records_used + n.exact_used + n.sequences;
}

void test_files(void)
{
    void *memory, *other_memory, *loader_memory;
    kvarn_pool *const pool = make_pool("k4v2_g32", &memory), *const other = make_pool("k4v4_g32", &other_memory);
    kvarn_format f = KVARN_FORMAT_INIT;
    CHECK_OK(kvarn_pool_format(pool, 0, 0, &f));
    const size_t scratch_bytes = kvarn_scratch_bytes(&f) + 65536;
    void* const scratch = take_memory(scratch_bytes);
    static float values[tokens * kv_heads * dim], back[2][tokens * dim];
    const kvarn_view kv = kvarn_token_major(values, KVARN_F32, tokens, kv_heads, dim);
    kvarn_sequence s, made = {7, 7};
    CHECK_OK(kvarn_open(pool, 0, &s));
    CHECK_OK(kvarn_reserve(pool, s, tokens));
    for (size_t layer = 0; layer < layers; ++layer) {
        fill(values, tokens * kv_heads * dim, dim, 20 + layer);
        CHECK_OK(kvarn_store(pool, s, layer, &kv, &kv, 0, 0));
    }
    CHECK(kvarn_saved_bytes(pool, s, 0, SIZE_MAX) == 0);  // drafts
    CHECK_OK(kvarn_commit(pool, s, tokens));
    CHECK_OK(kvarn_seal(pool, s, SIZE_MAX, scratch, scratch_bytes, NULL));

    const size_t bytes = (size_t)kvarn_saved_bytes(pool, s, 0, SIZE_MAX);
    struct stream file = {take_memory(bytes), 0, 0, bytes};
    unsigned char* const buffer = take_memory(bytes);
    CHECK_OK(kvarn_save(pool, s, 0, SIZE_MAX, write_stream, &file));
    CHECK(file.bytes == bytes);
    CHECK_OK(kvarn_save_to(pool, s, 0, SIZE_MAX, buffer, bytes));
    CHECK(memcmp(buffer, file.data, bytes) == 0);

    // Loaded by pieces; every value is as it was.
    const size_t before = used_blocks(pool);
    CHECK_OK(kvarn_load(pool, read_stream, &file, 1, &made, NULL));
    CHECK(kvarn_tokens(pool, made) == tokens && kvarn_next_position(pool, made) == tokens);
    for (size_t layer = 0; layer < layers; ++layer)
        for (int i = 0; i < 2; ++i) {
            const kvarn_view x = kvarn_token_major(back[i], KVARN_F32, tokens, 1, dim);
            CHECK_OK(kvarn_read(pool, i == 0 ? s : made, layer, 1, 0, tokens, NULL, &x, scratch, scratch_bytes));
            if (i == 1) CHECK(memcmp(back[0], back[1], sizeof back[0]) == 0);
        }
    CHECK_OK(kvarn_close(pool, made));
    CHECK(used_blocks(pool) == before);

    // What cannot be written, and what cannot be read. No block stays behind.
    made = (kvarn_sequence){7, 7};
    const char* differs = NULL;
    file.bytes = 0, file.limit = bytes - 1;
    CHECK_STATUS(kvarn_save(pool, s, 0, SIZE_MAX, write_stream, &file), KVARN_IO_ERROR);
    CHECK_STATUS(kvarn_save(pool, s, 0, SIZE_MAX, write_no_status, NULL), KVARN_IO_ERROR);
    CHECK_STATUS(kvarn_save(pool, s, 0, SIZE_MAX, NULL, NULL), KVARN_NULL_POINTER);
    CHECK_STATUS(kvarn_save(pool, s, layers, 1, write_stream, &file), KVARN_BAD_ARGUMENT);
    CHECK_STATUS(kvarn_save_to(pool, s, 0, SIZE_MAX, file.data, bytes - 1), KVARN_BUFFER_TOO_SMALL);
    CHECK_STATUS(kvarn_save_to(pool, s, 0, SIZE_MAX, NULL, bytes), KVARN_NULL_POINTER);
    CHECK_STATUS(kvarn_load_from(pool, buffer, bytes - 1, &made, NULL), KVARN_TRUNCATED);
    CHECK_STATUS(kvarn_load(pool, read_nothing, NULL, 1, &made, NULL), KVARN_IO_ERROR);
    CHECK_STATUS(kvarn_load(pool, NULL, NULL, 1, &made, NULL), KVARN_NULL_POINTER);
    CHECK_STATUS(kvarn_load_from(pool, buffer, bytes, NULL, NULL), KVARN_NULL_POINTER);
    CHECK_STATUS(kvarn_load_from(pool, NULL, bytes, &made, NULL), KVARN_NULL_POINTER);
    CHECK_STATUS(kvarn_load_from(other, buffer, bytes, &made, &differs), KVARN_OTHER_CONFIGURATION);
    CHECK(differs != NULL && strcmp(differs, "bits of V") == 0);
    for (size_t i = 0; i < bytes; i += bytes / 37) {
        buffer[i] ^= 16;
        const kvarn_status said = kvarn_load_from(pool, buffer, bytes, &made, NULL);
        CHECK(said != KVARN_OK);
        buffer[i] ^= 16;
    }
    CHECK(made.slot == 7 && made.generation == 7);
    CHECK(used_blocks(pool) == before);
    CHECK(used_blocks(other) == 0);

    // By layers, as they are computed: three files, one sequence. What follows a file stays unread.
    kvarn_loader* loader = NULL;
    const size_t loader_bytes = kvarn_loader_bytes();
    loader_memory = take_memory(loader_bytes);
    CHECK_STATUS(kvarn_loader_make(pool, loader_memory, loader_bytes - 1, &loader), KVARN_BUFFER_TOO_SMALL);
    CHECK_OK(kvarn_loader_make(pool, loader_memory, loader_bytes, &loader));
    CHECK_STATUS(kvarn_loader_finish(loader, &made), KVARN_BAD_ARGUMENT);
    struct stream parts = {take_memory(2 * bytes), 0, 0, 2 * bytes};
    for (size_t layer = 0; layer < layers; ++layer) CHECK_OK(kvarn_save(pool, s, layer, 1, write_stream, &parts));
    for (size_t layer = 0; layer < layers; ++layer) {
        CHECK(kvarn_loader_layers(loader) == layer);
        CHECK_OK(kvarn_loader_part(loader, read_stream, &parts, 0, &differs));
        CHECK(differs == NULL);
    }
    CHECK(parts.at == parts.bytes);
    CHECK_OK(kvarn_loader_finish(loader, &made));
    CHECK(kvarn_tokens(pool, made) == tokens);
    CHECK_OK(kvarn_close(pool, made));
    // The second part first is refused; a part that is not finished is given back.
    parts.at = 0;
    CHECK_OK(kvarn_loader_part(loader, read_stream, &parts, 0, NULL));
    CHECK(used_blocks(pool) > before);
    parts.at = 0;
    CHECK_STATUS(kvarn_loader_part(loader, read_stream, &parts, 0, NULL), KVARN_BAD_ARGUMENT);
    CHECK(used_blocks(pool) == before && kvarn_loader_layers(loader) == 0);
    parts.at = 0;
    CHECK_OK(kvarn_loader_part(loader, read_stream, &parts, 0, NULL));
    kvarn_loader_end(loader);
    CHECK(used_blocks(pool) == before);
    kvarn_loader_end(loader);  // twice is fine, and so is null
    kvarn_loader_end(NULL);
    CHECK_STATUS(kvarn_loader_part(loader, read_stream, &parts, 0, NULL), KVARN_BAD_ARGUMENT);
    CHECK_STATUS(kvarn_loader_part(NULL, read_stream, &parts, 0, NULL), KVARN_NULL_POINTER);

    give_back(parts.data), give_back(file.data), give_back(buffer), give_back(loader_memory), give_back(scratch);
    give_back(memory), give_back(other_memory);
}
