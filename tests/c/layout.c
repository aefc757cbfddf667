// SPDX-License-Identifier: Apache-2.0
// Prints where every field of every struct of kvarn.h lies, one a line: struct, field, offset, size. Fails where fields are missing here,
// or there is padding, in which a later field could hide: fields follow each other without a gap.
#include <kvarn/c/kvarn.h>

#include <stdio.h>

static const char* in_struct;
static size_t end;
static int failed;

static void begin(const char* name)
{
    in_struct = name;
    end = 0;
}

static void field(const char* name, size_t offset, size_t size)
{
    printf("%s %s %zu %zu\n", in_struct, name, offset, size);
    if (offset != end) {
        fprintf(stderr, "%s: before %s there is padding, or a field that is not listed\n", in_struct, name);
        failed = 1;
    }
    end = offset + size;
}

static void finish(size_t size)
{
    printf("%s - %zu\n", in_struct, size);
    if (size != end) {
        fprintf(stderr, "%s: after its last field there is padding, or a field that is not listed\n", in_struct);
        failed = 1;
    }
}

#define BEGIN(type)                     \
    {                                   \
        typedef type this_struct;       \
        static const this_struct* here; \
        (void)here;                     \
        begin(#type);
#define FIELD(name) field(#name, offsetof(this_struct, name), sizeof here->name);
#define END                      \
    finish(sizeof(this_struct)); \
    }

int main(void)
{
    BEGIN(kvarn_view)
    FIELD(data) FIELD(tokens) FIELD(heads) FIELD(channels) FIELD(token_stride) FIELD(head_stride)
    FIELD(channel_stride) FIELD(type) FIELD(reserved)
    END
    BEGIN(kvarn_format)
    FIELD(size) FIELD(head_dim_k) FIELD(head_dim_v) FIELD(key_bits) FIELD(value_bits) FIELD(group)
    FIELD(key_rotation) FIELD(value_rotation) FIELD(exact_channels)
    END
    BEGIN(kvarn_record_layout)
    FIELD(size) FIELD(k_codes) FIELD(k_channel_scale) FIELD(k_channel_zero) FIELD(k_token_scale)
    FIELD(v_codes) FIELD(v_channel_scale) FIELD(v_token_scale) FIELD(v_token_zero) FIELD(exact)
    FIELD(content_bytes)
    END
    BEGIN(kvarn_support)
    FIELD(size) FIELD(arch) FIELD(fixed_bounds) FIELD(key_precision) FIELD(value_precision) FIELD(time)
    END
    BEGIN(kvarn_records)
    FIELD(data) FIELD(bytes) FIELD(tiles) FIELD(heads) FIELD(tile_stride) FIELD(head_stride)
    FIELD(record_bytes)
    END
    BEGIN(kvarn_encode_options)
    FIELD(size) FIELD(encoder) FIELD(iterations) FIELD(refined_iterations) FIELD(refit_rounds)
    FIELD(clip_steps) FIELD(key_basis) FIELD(value_basis) FIELD(reserved)
    END
    BEGIN(kvarn_part_errors)
    FIELD(worst_scale_error) FIELD(worst_relative_error) FIELD(relative_error)
    END
    BEGIN(kvarn_record_errors)
    FIELD(k) FIELD(v)
    END
    BEGIN(kvarn_segment)
    FIELD(size) FIELD(tokens) FIELD(position) FIELD(k) FIELD(v) FIELD(head) FIELD(key_basis)
    FIELD(value_basis) FIELD(data) FIELD(stride) FIELD(table) FIELD(list) FIELD(records) FIELD(skip)
    END
    BEGIN(kvarn_attention_task)
    FIELD(size) FIELD(history) FIELD(history_count) FIELD(q) FIELD(out) FIELD(log_sum_exp) FIELD(sink_logits)
    FIELD(alibi_slopes) FIELD(first_position) FIELD(format) FIELD(mask) FIELD(mask_stride) FIELD(mask_tokens)
    END
    BEGIN(kvarn_attention_options)
    FIELD(size) FIELD(softmax_scale) FIELD(logit_soft_cap) FIELD(window) FIELD(causal) FIELD(query_basis)
    FIELD(output_basis) FIELD(precision) FIELD(fast_bound)
    FIELD(reserved)
    END
    BEGIN(kvarn_choose_options)
    FIELD(size) FIELD(margin) FIELD(value_margin) FIELD(most_key_error) FIELD(most_value_error) FIELD(encode)
    END
    BEGIN(kvarn_bit_rule)
    FIELD(size) FIELD(first_layer) FIELD(last_layer) FIELD(first_head) FIELD(last_head) FIELD(key_bits)
    FIELD(value_bits) FIELD(key_rotation) FIELD(value_rotation)
    END
    BEGIN(kvarn_cache_config)
    FIELD(size) FIELD(format) FIELD(rules) FIELD(rule_count) FIELD(layers) FIELD(heads) FIELD(exact)
    FIELD(key_basis) FIELD(value_basis) FIELD(reserved) FIELD(sink_tokens) FIELD(recent_tokens)
    FIELD(sequences) FIELD(most_tokens) FIELD(most_step) FIELD(record_blocks) FIELD(exact_blocks)
    FIELD(most_spans) FIELD(encode)
    END
    BEGIN(kvarn_cache_plan)
    FIELD(size) FIELD(bytes) FIELD(records) FIELD(exact) FIELD(state) FIELD(record_block_bytes)
    FIELD(exact_block_bytes) FIELD(record_blocks) FIELD(exact_blocks)
    END
    BEGIN(kvarn_sequence_plan)
    FIELD(size) FIELD(record_bytes) FIELD(exact_bytes) FIELD(elements) FIELD(bits_per_element)
    END
    BEGIN(kvarn_sequence)
    FIELD(slot) FIELD(generation)
    END
    BEGIN(kvarn_sequence_room)
    FIELD(sequence) FIELD(tokens)
    END
    BEGIN(kvarn_pool_statistics)
    FIELD(size) FIELD(records_used) FIELD(records_free) FIELD(records_shared) FIELD(exact_used)
    FIELD(exact_free) FIELD(exact_shared) FIELD(bytes_used) FIELD(tiles_sealed) FIELD(tiles_kept_not_finite)
    FIELD(tiles_kept_overflowed) FIELD(sequences)
    END
    BEGIN(kvarn_sequence_statistics)
    FIELD(size) FIELD(tokens) FIELD(drafts) FIELD(sealed_tokens) FIELD(dead_tokens) FIELD(kept_tiles)
    FIELD(record_blocks) FIELD(exact_blocks) FIELD(spans) FIELD(own_records) FIELD(own_exact)
    FIELD(next_position)
    END
    BEGIN(kvarn_seal_report)
    FIELD(size) FIELD(sealed) FIELD(kept_exact) FIELD(dropped) FIELD(unfinished) FIELD(sequence)
    FIELD(position) FIELD(layer) FIELD(head) FIELD(why) FIELD(reserved)
    END
    BEGIN(kvarn_step)
    FIELD(size) FIELD(sequence) FIELD(k) FIELD(v) FIELD(first_draft) FIELD(q) FIELD(out) FIELD(log_sum_exp)
    FIELD(sink_logits) FIELD(alibi_slopes) FIELD(mask) FIELD(mask_stride) FIELD(mask_tokens)
    END
    BEGIN(kvarn_layer_options)
    FIELD(size) FIELD(attention) FIELD(threads) FIELD(rows_per_task) FIELD(chunks_per_item)
    END
    BEGIN(kvarn_shift_report)
    FIELD(size) FIELD(tokens) FIELD(sealed_tokens) FIELD(relative_error)
    END
    // Numbers that programs have compiled in.
    printf("kvarn_status - %zu\n", sizeof(kvarn_status));
#define NUMBER(name) printf("%s %ld\n", #name, (long)(name));
    NUMBER(KVARN_C_ABI) NUMBER(KVARN_MOST_RULES) NUMBER(KVARN_OK) NUMBER(KVARN_BAD_FORMAT_NAME)
    NUMBER(KVARN_UNSUPPORTED_HEAD_DIM) NUMBER(KVARN_UNSUPPORTED_BITS) NUMBER(KVARN_UNSUPPORTED_GROUP)
    NUMBER(KVARN_UNSUPPORTED_CHANNELS) NUMBER(KVARN_BAD_ARGUMENT) NUMBER(KVARN_NULL_POINTER)
    NUMBER(KVARN_SHAPE_MISMATCH) NUMBER(KVARN_TOKEN_COUNT_MISMATCH) NUMBER(KVARN_BUFFER_TOO_SMALL)
    NUMBER(KVARN_NOT_FINITE) NUMBER(KVARN_SCALE_OVERFLOW) NUMBER(KVARN_OUT_OF_MEMORY) NUMBER(KVARN_NO_ROOM)
    NUMBER(KVARN_SEQUENCE_FULL) NUMBER(KVARN_STALE_HANDLE) NUMBER(KVARN_TRUNCATED) NUMBER(KVARN_CORRUPT)
    NUMBER(KVARN_IO_ERROR) NUMBER(KVARN_UNSUPPORTED_VERSION) NUMBER(KVARN_OTHER_CONFIGURATION)
    NUMBER(KVARN_STATUS_IS_INT) NUMBER(KVARN_F32) NUMBER(KVARN_F16) NUMBER(KVARN_BF16)
    NUMBER(KVARN_BASIS_ORIGINAL) NUMBER(KVARN_BASIS_ROTATED) NUMBER(KVARN_ROTATION_NONE)
    NUMBER(KVARN_ROTATION_HADAMARD) NUMBER(KVARN_ENCODER_PAPER) NUMBER(KVARN_ENCODER_REFINED)
    NUMBER(KVARN_PRECISION_EXACT) NUMBER(KVARN_PRECISION_FINE) NUMBER(KVARN_PRECISION_FAST)
    return failed;
}
