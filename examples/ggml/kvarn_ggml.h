/* SPDX-License-Identifier: Apache-2.0 */
#ifndef KVARN_GGML_H
#define KVARN_GGML_H
/*
 * The K and V of a ggml-based engine as kvarn keeps them: K, V, Q in, attention out, as custom operations on ggml's own threads.
 * A C header: what includes it needs neither C++20 nor kvarn. It is implemented by the library kvarn_ggml.
 *
 * Once:           kvarn_ggml_create
 * Each graph:     kvarn_ggml_attention, once a layer, in place of storing K and V and of the attention on them
 * Each ubatch:    kvarn_ggml_begin; compute the graph; kvarn_ggml_end
 * In between:     rollback, fork, erase, shift, save, load, of sequences by the engine's numbers
 *
 * Graphs may be kept and computed again: nothing of a step is in them. Where the cache is full, kvarn_ggml_begin says so before
 * anything has changed. A custom operation cannot fail: what goes wrong in one leaves NaN in its output and is told by
 * kvarn_ggml_end. A tile of tokens that no record can hold (a NaN among them) stays exact, and is counted.
 *
 * Threads: one call at a time for each cache, and none but kvarn_ggml_attention while a graph with its operations is computed.
 */
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "ggml.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct kvarn_ggml_cache kvarn_ggml_cache;

enum kvarn_ggml_status {
    KVARN_GGML_OK = 0,
    KVARN_GGML_BAD_ARGUMENT,         /* an argument out of range: of the engine's making */
    KVARN_GGML_NO_ROOM,              /* no block is left: remove something, or take a larger pool */
    KVARN_GGML_SEQUENCE_FULL,        /* this sequence has as many tokens as the cache allows */
    KVARN_GGML_NOT_COMPUTED,         /* not every layer of the step was computed: its tokens are not in the cache */
    KVARN_GGML_NOT_FINITE,           /* NaN or infinity among queries; their outputs are NaN */
    KVARN_GGML_OUT_OF_MEMORY,
    KVARN_GGML_UNSUPPORTED,          /* a feature that the cache has not */
    KVARN_GGML_OTHER_CONFIGURATION,  /* saved by a cache of other sizes or formats */
    KVARN_GGML_CORRUPT,              /* saved data that is damaged, cut off, or of another version */
    KVARN_GGML_IO                    /* the engine's function could not read or write */
};

/* Other bits for some layers and KV heads, ends included; negative numbers count from the end. Later rules win. */
struct kvarn_ggml_rule {
    int first_layer, last_layer;
    int first_head, last_head;
    int key_bits, value_bits; /* 0: as the format has them */
};

enum kvarn_ggml_rotation {
    KVARN_GGML_ROTATED_BY_LIBRARY, /* K, V and Q come as the model has them */
    KVARN_GGML_ROTATED_BY_ENGINE   /* K and Q, and V, come rotated, and the engine turns the output back: no rotation here */
};

enum kvarn_ggml_exact { KVARN_GGML_F16, KVARN_GGML_BF16, KVARN_GGML_F32 };

/* What a cache is told once. kvarn_ggml_default_params() has everything that the comments call default. */
struct kvarn_ggml_params {
    const char* format; /* "k4v2_g128": bits of K, of V, tokens of a tile; "k4v2_g128_auto": each head in its own basis */
    int layers;         /* that have K and V in this cache */
    int kv_heads, query_heads; /* of each of those layers */
    int head_dim_k, head_dim_v;
    int sequences;        /* numbers 0 .. sequences - 1 */
    int64_t most_tokens;  /* of one sequence */
    int64_t pool_tokens;  /* of all sequences, shared ones once; 0 (default): sequences * most_tokens */
    int64_t most_step;    /* tokens of one step, of all sequences; default 512 */
    int64_t sink_tokens;  /* at the start of a sequence, kept exact; default 128 */
    int64_t recent_tokens; /* the newest, kept exact; default 0. A rollback to here leaves no tile cut */
    int threads;          /* most that compute a graph; others rest. default 16 */
    enum kvarn_ggml_rotation rotation;
    enum kvarn_ggml_exact exact; /* type of exact tokens; default F16 */
    bool fast;                   /* 8-bit weights for codes of 2 and 4 bits: faster, errors of about 1e-2 of the output; default false */
    const struct kvarn_ggml_rule* rules; /* default none; copied */
    int rule_count;
};

struct kvarn_ggml_params kvarn_ggml_default_params(void);

/* NULL: refused, and `why` (of why_bytes bytes, may be NULL) says which field, in one sentence. */
kvarn_ggml_cache* kvarn_ggml_create(const struct kvarn_ggml_params* params, char* why, size_t why_bytes);
void kvarn_ggml_free(kvarn_ggml_cache* cache);

/* One sentence about the last call or step that did not give OK, valid until the next. Never NULL. */
const char* kvarn_ggml_message(const kvarn_ggml_cache* cache);

/* --- graphs ---------------------------------------------------------------------------------------------------------- */

/* What the model says of a layer's attention; the same whenever the layer is built. */
struct kvarn_ggml_attention_params {
    float scale;                /* of <q, k>; 0: 1 / sqrt(head_dim_k) */
    float soft_cap;             /* s <- cap * tanh(s / cap) after scaling; 0: none */
    int64_t window;             /* a query sees so many newest tokens, its own included; 0: all */
    const float* alibi_slopes;  /* [query_heads], added times (position of the key - position of the query); NULL: none; copied */
};

/*
 * The attention of layer `layer` of the cache, 0 .. layers - 1, of the step that kvarn_ggml_begin named:
 *   q [head_dim_k, query_heads, tokens] F32; k [head_dim_k, kv_heads, tokens] and v [head_dim_v, kv_heads, tokens] F32, F16 or
 *   BF16; channels side by side, other strides as they come; k and v NULL: a layer that reads the K and V of `layer`, which was
 *   stored before in the same step; sinks [query_heads] F32, or NULL: a logit of each head that takes part in the softmax.
 * Returns [head_dim_v * query_heads, tokens] F32. Layer 0 must be computed before the others (it seals the tiles of the step
 * before). NULL: shapes or types that do not fit the cache; see kvarn_ggml_message. The operations are for the CPU backend.
 */
struct ggml_tensor* kvarn_ggml_attention(kvarn_ggml_cache* cache, struct ggml_context* ctx, int layer, struct ggml_tensor* q,
                                         struct ggml_tensor* k, struct ggml_tensor* v, struct ggml_tensor* sinks,
                                         const struct kvarn_ggml_attention_params* params);

/* --- steps ----------------------------------------------------------------------------------------------------------- */

/* The tokens of one sequence in a step. Its i-th one is row first_row + i * row_stride of the tensors, and goes to position + i. */
struct kvarn_ggml_part {
    int sequence;
    int64_t position; /* where the sequence ends; of one without tokens, any */
    int64_t tokens, first_row, row_stride;
    /* What the new tokens see of the newest mask_tokens positions, where that is not causal: a row of mask_stride 64-bit words a
     * token; bit t % 64 of word t / 64 is of the position mask_tokens - t from the end. NULL: causal. Copied. */
    const uint64_t* mask;
    int64_t mask_stride, mask_tokens;
};

/*
 * Room for a step; every row of its tensors belongs to one part, every sequence to one at most. causal = false: every token sees
 * those behind it, too (but for what a mask says). Tokens of the last step count from here on, if kvarn_ggml_end did not come.
 * Errors, nothing changes: BAD_ARGUMENT, NO_ROOM, SEQUENCE_FULL, OUT_OF_MEMORY.
 */
enum kvarn_ggml_status kvarn_ggml_begin(kvarn_ggml_cache* cache, const struct kvarn_ggml_part* parts, int count, bool causal);

/*
 * The graph was computed: its tokens count. Errors: NOT_COMPUTED (no token counts), and what went wrong in an operation, NOT_FINITE
 * say; tokens count then. Every function below does it, if need be; the next kvarn_ggml_end still tells what it found.
 */
enum kvarn_ggml_status kvarn_ggml_end(kvarn_ggml_cache* cache);

/* --- sequences ------------------------------------------------------------------------------------------------------- */
/* Positions [begin, end); end < 0: to the last. Sequences that have no token are there all the same. */

void kvarn_ggml_clear(kvarn_ggml_cache* cache);

/* Rollback where `end` is behind the last token, at any position; else a gap: the tokens behind it keep their positions. Sealed
 * tiles are cut, not decoded. Tiles are sealed when the next step begins, so taking back tokens of the last step gives the bits of a
 * run that never had them. sequence < 0: all. */
enum kvarn_ggml_status kvarn_ggml_remove(kvarn_ggml_cache* cache, int sequence, int64_t begin, int64_t end);

/* `to` becomes `from`, or the tokens of it at those positions; they share memory until one changes. BAD_ARGUMENT: `to` has tokens. */
enum kvarn_ggml_status kvarn_ggml_copy(kvarn_ggml_cache* cache, int from, int to, int64_t begin, int64_t end);

/* All others lose their tokens. */
enum kvarn_ggml_status kvarn_ggml_keep(kvarn_ggml_cache* cache, int sequence);

/* Turns keys [tokens][channels], of positions from `position` on, by `by` positions, in place, in the basis in which they come. */
typedef void (*kvarn_ggml_turn)(void* user, int layer, int head, float* keys, int64_t tokens, int channels, int64_t position,
                                int64_t by);

/* Tokens go to other positions: exact keys are turned, sealed ones decoded, turned and encoded again, which costs accuracy each
 * time; a gap (kvarn_ggml_remove) costs none. Needs as many free blocks as the range has. */
enum kvarn_ggml_status kvarn_ggml_shift(kvarn_ggml_cache* cache, int sequence, int64_t begin, int64_t end, int64_t by,
                                        kvarn_ggml_turn turn, void* user);

/* A kvarn_ggml_turn for rotary embeddings: the angle of pair i is position * freq_scale * freq_base^(-2 i / dims) / factors[i]. */
struct kvarn_ggml_rope {
    int dims;     /* channels that turn, the first ones */
    bool neox;    /* pairs are (i, i + dims / 2), else (2 i, 2 i + 1) */
    float freq_base, freq_scale;
    const float* factors; /* [dims / 2]; NULL: 1 */
};
void kvarn_ggml_turn_rope(void* rope, int layer, int head, float* keys, int64_t tokens, int channels, int64_t position, int64_t by);

int64_t kvarn_ggml_tokens(kvarn_ggml_cache* cache, int sequence);
int64_t kvarn_ggml_first_position(kvarn_ggml_cache* cache, int sequence); /* -1: no token */
int64_t kvarn_ggml_last_position(kvarn_ggml_cache* cache, int sequence);  /* -1: no token */

/* --- state ----------------------------------------------------------------------------------------------------------- */

typedef bool (*kvarn_ggml_write)(void* user, const void* data, size_t bytes);
typedef bool (*kvarn_ggml_read)(void* user, void* data, size_t bytes);

/* One sequence, every byte covered by checksums; what is loaded goes on bit for bit as what was saved. Loading replaces what the
 * sequence had; it has that still where loading fails. */
enum kvarn_ggml_status kvarn_ggml_save(kvarn_ggml_cache* cache, int sequence, kvarn_ggml_write write, void* user);
enum kvarn_ggml_status kvarn_ggml_load(kvarn_ggml_cache* cache, int sequence, kvarn_ggml_read read, void* user);

/* --- what is there --------------------------------------------------------------------------------------------------- */

struct kvarn_ggml_statistics {
    size_t bytes;       /* allocated */
    size_t bytes_used;  /* of blocks that hold tokens */
    int64_t record_blocks, free_record_blocks; /* each a tile of all layers and heads */
    int64_t exact_blocks, free_exact_blocks;
    int64_t sealed_tiles, kept_tiles; /* since creation: became records, stay exact for their values */
    int64_t changed_bases;            /* heads that "_auto" has put into another basis; -1: not decided yet */
    const char* instruction_set;      /* what the kernels run on */
};
struct kvarn_ggml_statistics kvarn_ggml_get_statistics(kvarn_ggml_cache* cache);

#ifdef __cplusplus
}
#endif

#endif
