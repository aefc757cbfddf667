// SPDX-License-Identifier: Apache-2.0
#ifndef KVARN_C_KVARN_H
#define KVARN_C_KVARN_H
// The C interface of kvarn: KV caches in records of 2 to 8 bits an element, attention straight on them, and the life
// of a whole cache. Plain C11, and C++. A shared or static library with these functions is made by
// kvarn_add_c_library (docs/c-api.md, which has the rules of the ABI too); it chooses among its instruction sets when
// it is first called.
//
// Memory: nothing allocates. Handles (kvarn_pool, kvarn_layer, kvarn_attention, kvarn_loader) lie in memory of the
// caller, of a size that a function says, at any alignment; they end with it, and have nothing to destroy unless a
// function here says so.
// Errors: functions that can fail return a kvarn_status and write their results through their last parameters; with
// anything but KVARN_OK nothing has changed. Functions that say a size or a count give 0 for arguments that make no
// sense. Nothing throws, prints or aborts. Null pointers are KVARN_NULL_POINTER wherever a comment does not say what
// they mean; enumerators that do not exist, KVARN_BAD_ARGUMENT.
// Structs: those that begin with `size` can grow. Make them by their _INIT, which sets `size` and the defaults. A
// library that knows more fields takes the defaults for those a smaller `size` leaves out; one that knows fewer
// refuses fields that it does not know unless they are zero (KVARN_BAD_ARGUMENT, as for a `size` of 0). Of structs
// that the library fills, it fills what `size` says. The elements of an array of such structs all have the same
// `size`, which is also their distance. Structs without `size` never change.
// Units: tokens, heads, channels and strides count elements, names with `bytes` count bytes, positions count tokens.
// Threads: functions on different data may run at the same time. One sequence belongs to one thread at a time, but
// for storing other layers and heads, and for items, as said there.

#include <stddef.h>
#include <stdint.h>

// KVARN_C_STATIC: the functions are in a static library. (Targets of kvarn_add_c_library hand it to those who link
// them.)
#if defined(KVARN_C_STATIC)
#define KVARN_C_API
#elif defined(_WIN32)
#if defined(KVARN_C_BUILD)
#define KVARN_C_API __declspec(dllexport)
#else
#define KVARN_C_API __declspec(dllimport)
#endif
#elif defined(__GNUC__)
#define KVARN_C_API __attribute__((visibility("default")))
#else
#define KVARN_C_API
#endif

#if defined(__GNUC__)
#define KVARN_C_CHECKED __attribute__((warn_unused_result))
#else
#define KVARN_C_CHECKED
#endif

// A function that keeps an address and does not look at what lies there, which may be written later.
#if defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 11
#define KVARN_C_ADDRESS(parameter) __attribute__((access(none, parameter)))
#else
#define KVARN_C_ADDRESS(parameter)
#endif

#if defined(__cplusplus)
#define KVARN_C_NOEXCEPT noexcept
extern "C" {
#else
#define KVARN_C_NOEXCEPT
#endif

// --- library -------------------------------------------------------------------------------------------------------

/// The number of this interface. It changes when programs built for an older one would no longer work
/// (docs/c-api.md).
#define KVARN_C_ABI 1

/// What a function that can fail returns: the numbers of kvarn::status. New ones may come at the end.
typedef enum kvarn_status {
    KVARN_OK = 0,
    KVARN_BAD_FORMAT_NAME = 1,        ///< not `k<bits>v<bits>_g<group>`, with `_ko`, `_vo` or `_kovo` for the original basis
    KVARN_UNSUPPORTED_HEAD_DIM = 2,   ///< outside 32..576, or no Hadamard matrix of that size is known to the library
    KVARN_UNSUPPORTED_BITS = 3,       ///< bits other than 2, 3, 4, 5, 6, 8 (values also 0)
    KVARN_UNSUPPORTED_GROUP = 4,      ///< tokens per tile other than 32, 64, 128, 256
    KVARN_UNSUPPORTED_CHANNELS = 5,   ///< exact channels: not a multiple of 4, or more than 256
    KVARN_BAD_ARGUMENT = 6,           ///< an argument or option out of range, or a struct of an unknown size
    KVARN_NULL_POINTER = 7,           ///< a needed buffer or struct is missing
    KVARN_SHAPE_MISMATCH = 8,         ///< sizes of the views disagree with the format or with each other
    KVARN_TOKEN_COUNT_MISMATCH = 9,   ///< a view has not tiles * group tokens
    KVARN_BUFFER_TOO_SMALL = 10,      ///< memory, records or scratch smaller than the size functions say
    KVARN_NOT_FINITE = 11,            ///< NaN or infinity among the input
    KVARN_SCALE_OVERFLOW = 12,        ///< a scalar of the record would not fit a half
    KVARN_OUT_OF_MEMORY = 13,         ///< not returned: nothing here allocates
    KVARN_NO_ROOM = 14,               ///< a cache has no block or sequence left: others must go first
    KVARN_SEQUENCE_FULL = 15,         ///< a sequence has as many tokens or spans as its cache allows
    KVARN_STALE_HANDLE = 16,          ///< a sequence that was closed, or never opened
    KVARN_TRUNCATED = 17,             ///< a file or buffer ends before its content does
    KVARN_CORRUPT = 18,               ///< a file or buffer whose checksum, magic or fields are wrong
    KVARN_IO_ERROR = 19,              ///< the caller's function could not read or write
    KVARN_UNSUPPORTED_VERSION = 20,   ///< a file of a version that this library does not read, or any file without kvarn_has_files
    KVARN_OTHER_CONFIGURATION = 21,   ///< a saved sequence of a cache with other layers, formats or policy
    KVARN_STATUS_IS_INT = 0x7fffffff  ///< not returned
} kvarn_status;

/// One sentence for people, static storage, never null.
KVARN_C_API const char* kvarn_message(kvarn_status status) KVARN_C_NOEXCEPT;

/// The version of the library that runs, for example "0.1.0", and the KVARN_C_ABI that it was built with.
KVARN_C_API const char* kvarn_version(void) KVARN_C_NOEXCEPT;
KVARN_C_API int32_t kvarn_abi(void) KVARN_C_NOEXCEPT;

/// 1 where this library was built with saving and loading, otherwise 0: those functions then answer
/// KVARN_UNSUPPORTED_VERSION.
KVARN_C_API int32_t kvarn_has_files(void) KVARN_C_NOEXCEPT;

/// The name of the instruction set in use: portable, neon64, sse2, avx2 or avx512. All give the same bits.
KVARN_C_API const char* kvarn_active_arch(void) KVARN_C_NOEXCEPT;
/// The sets that this library has and this machine runs, number 0 being the slowest; null behind the last.
KVARN_C_API const char* kvarn_usable_arch(size_t number) KVARN_C_NOEXCEPT;
/// Makes one of them the set in use, for all threads and from the next call on. Error, nothing changes:
/// KVARN_BAD_ARGUMENT.
KVARN_C_API KVARN_C_CHECKED kvarn_status kvarn_select_arch(const char* name) KVARN_C_NOEXCEPT;

// --- enumerations: struct fields and parameters hold them as int32_t -----------------------------------------------

/// Element types. KVARN_F16 is IEEE binary16, KVARN_BF16 the upper half of a binary32, both as two bytes of the
/// machine's order.
enum { KVARN_F32 = 0, KVARN_F16 = 1, KVARN_BF16 = 2 };

/// Which basis values, queries or outputs are in. Rotated is the basis of the records: where a format does not rotate
/// K (or V), it is the original one for K (or V).
enum { KVARN_BASIS_ORIGINAL = 0, KVARN_BASIS_ROTATED = 1 };

/// What a format does to K, or V, before it rounds.
enum { KVARN_ROTATION_NONE = 0, KVARN_ROTATION_HADAMARD = 1 };

/// How codes and scalars are chosen; the record and its decoder are the same for both.
enum {
    KVARN_ENCODER_PAPER = 0,   ///< min-max rounding, the method of the paper
    KVARN_ENCODER_REFINED = 1  ///< codes and scalars of least squared error, token norms kept
};

/// Arithmetic of the products with codes; everything else is float. Errors of the output relative to exact arithmetic
/// on the records.
enum {
    KVARN_PRECISION_EXACT = 0,  ///< float weights: about 1e-5
    KVARN_PRECISION_FINE = 1,   ///< 16-bit weights: below 1e-3
    KVARN_PRECISION_FAST = 2    ///< 8-bit weights for codes of 2 and 4 bits, K's as far as fast_bound lets them: about 1e-2
};

// --- views ---------------------------------------------------------------------------------------------------------

/// K, V, queries or outputs of `tokens x heads x channels` in memory of the caller. Element (t, h, c) lies
/// t * token_stride + h * head_stride + c * channel_stride elements behind `data`. Fastest with channel_stride 1.
/// Strides may be negative or zero for what is read, which is never written to; what is written must not overlap
/// itself. Where a parameter may be left out, a null pointer and a view without data mean the same.
typedef struct kvarn_view {
    void* data;
    size_t tokens, heads, channels;
    ptrdiff_t token_stride, head_stride, channel_stride;
    int32_t type;      ///< KVARN_F32, KVARN_F16, KVARN_BF16
    int32_t reserved;  ///< 0
} kvarn_view;
#define KVARN_VIEW_INIT {NULL, 0, 0, 0, 0, 0, 1, KVARN_F32, 0}

/// A dense array [token][head][channel], as most engines project K and V.
KVARN_C_API kvarn_view kvarn_token_major(const void* data, int32_t type, size_t tokens, size_t heads,
                                         size_t channels) KVARN_C_NOEXCEPT KVARN_C_ADDRESS(1);
/// A dense array [head][token][channel], as most frameworks keep a cache.
KVARN_C_API kvarn_view kvarn_head_major(const void* data, int32_t type, size_t tokens, size_t heads,
                                        size_t channels) KVARN_C_NOEXCEPT KVARN_C_ADDRESS(1);
/// Tokens [first, first + count) of a view, clipped to what it has; an empty view of null.
KVARN_C_API kvarn_view kvarn_view_tokens(const kvarn_view* view, size_t first, size_t count) KVARN_C_NOEXCEPT;
/// One head of a view; an empty view of null, or where there is no such head.
KVARN_C_API kvarn_view kvarn_view_head(const kvarn_view* view, size_t head) KVARN_C_NOEXCEPT;

/// Copies the values of one view into another of the same tokens, heads and channels, of any strides and types:
/// rounded to nearest even, to KVARN_F16 without infinities (+-65504). Between equal types bits are copied. The views
/// must not overlap. Errors, nothing written: KVARN_SHAPE_MISMATCH, KVARN_NULL_POINTER, KVARN_BAD_ARGUMENT (a type).
KVARN_C_API KVARN_C_CHECKED kvarn_status kvarn_convert(const kvarn_view* from, const kvarn_view* to) KVARN_C_NOEXCEPT;

/// Rotates every vector of a view in place, x <- H x / sqrt(channels), and back. For queries against keys in the
/// rotated basis, and for outputs in it. Errors, nothing written: KVARN_NULL_POINTER, KVARN_UNSUPPORTED_HEAD_DIM,
/// KVARN_BAD_ARGUMENT (a type).
KVARN_C_API KVARN_C_CHECKED kvarn_status kvarn_rotate(const kvarn_view* x) KVARN_C_NOEXCEPT;
KVARN_C_API KVARN_C_CHECKED kvarn_status kvarn_unrotate(const kvarn_view* x) KVARN_C_NOEXCEPT;

// --- formats -------------------------------------------------------------------------------------------------------

/// What a record holds: one tile of `group` tokens of one KV head. Every function that takes a format checks it, and
/// answers what kvarn_format_make would.
typedef struct kvarn_format {
    size_t size;
    int32_t head_dim_k;      ///< 128; quantized channels of a K vector: m * 2^k with m in {1, 12, 20, 28, 36}, from 32 to 576
    int32_t head_dim_v;      ///< 128; channels of a V vector (head_dim_k where value_bits is 0)
    int32_t key_bits;        ///< 4; one of 2, 3, 4, 5, 6, 8
    int32_t value_bits;      ///< 2; the same, or 0: no V part (latent attention reads V from K)
    int32_t group;           ///< 128; tokens of a tile: 32, 64, 128, 256
    int32_t key_rotation;    ///< KVARN_ROTATION_HADAMARD; without one, head_dim may be any multiple of 4
    int32_t value_rotation;  ///< KVARN_ROTATION_HADAMARD (K's where value_bits is 0)
    int32_t exact_channels;  ///< 0; further channels of K in f16, un-rotated (decoupled rotary part): a multiple of 4, to 256
} kvarn_format;
#define KVARN_FORMAT_INIT \
    {sizeof(kvarn_format), 128, 128, 4, 2, 128, KVARN_ROTATION_HADAMARD, KVARN_ROTATION_HADAMARD, 0}

/// A format by its name, `k<bits>v<bits>_g<group>`, for example k4v2_g128, and after it `_ko`, `_vo` or `_kovo` where
/// K, V or both stay in the original basis; a leading `kvarn_` is accepted. Errors: KVARN_BAD_FORMAT_NAME, and those
/// of kvarn_format_make.
KVARN_C_API KVARN_C_CHECKED kvarn_status kvarn_format_parse(const char* name, int32_t head_dim_k, int32_t head_dim_v,
                                                            kvarn_format* format) KVARN_C_NOEXCEPT;
/// Checks a format, and fills in what value_bits of 0 leave open. Errors: KVARN_UNSUPPORTED_HEAD_DIM, _BITS, _GROUP,
/// _CHANNELS, KVARN_BAD_ARGUMENT (a rotation).
KVARN_C_API KVARN_C_CHECKED kvarn_status kvarn_format_make(kvarn_format* format) KVARN_C_NOEXCEPT;
/// `base` with the widths that keep most at no more than `bits` bits an element: k2v2, k3v2, k4v2, k4v4, then 6 and 8
/// for both. Errors: KVARN_UNSUPPORTED_BITS (the narrowest takes more).
KVARN_C_API KVARN_C_CHECKED kvarn_status kvarn_format_within(const kvarn_format* base, double bits,
                                                             kvarn_format* format) KVARN_C_NOEXCEPT;

/// Byte offsets of the fields of one record (docs/record-format.md). Scalars are IEEE halves, little-endian; D =
/// head_dim, G = group.
typedef struct kvarn_record_layout {
    size_t size;
    size_t k_codes;          ///< [D_k][G] codes, channel-major bit stream
    size_t k_channel_scale;  ///< [D_k]
    size_t k_channel_zero;   ///< [D_k]
    size_t k_token_scale;    ///< [G]
    size_t v_codes;          ///< [G][D_v] codes, token-major bit stream
    size_t v_channel_scale;  ///< [D_v]
    size_t v_token_scale;    ///< [G]
    size_t v_token_zero;     ///< [G]
    size_t exact;            ///< [G][exact_channels] halves, original basis
    size_t content_bytes;    ///< the sum of all fields
} kvarn_record_layout;
#define KVARN_RECORD_LAYOUT_INIT {sizeof(kvarn_record_layout), 0, 0, 0, 0, 0, 0, 0, 0, 0, 0}
KVARN_C_API KVARN_C_CHECKED kvarn_status kvarn_layout_of(const kvarn_format* format,
                                                         kvarn_record_layout* layout) KVARN_C_NOEXCEPT;

/// Bytes from one record to the next: its content, rounded up to a multiple of `round_to` bytes; 0 means 8, what a
/// pool does.
KVARN_C_API size_t kvarn_record_bytes(const kvarn_format* format, size_t round_to) KVARN_C_NOEXCEPT;
/// Bits per stored element of K and V at that distance, scalars and padding included; 0 for no format.
KVARN_C_API double kvarn_bits_per_element(const kvarn_format* format, size_t round_to) KVARN_C_NOEXCEPT;
/// Scratch for kvarn_quantize, kvarn_dequantize and kvarn_seal_item; and for any one of these, attention items of up
/// to `query_rows` rows (tokens x query heads of a KV head) and kvarn_combine_item too (0 for more
/// than 1024). Bytes, at any alignment.
KVARN_C_API size_t kvarn_scratch_bytes(const kvarn_format* format) KVARN_C_NOEXCEPT;
KVARN_C_API size_t kvarn_call_scratch_bytes(const kvarn_format* format, size_t query_rows) KVARN_C_NOEXCEPT;

enum { KVARN_OPERATION_SEAL, KVARN_OPERATION_DEQUANTIZE, KVARN_OPERATION_ATTEND };

/// What an operation on tiles of a format runs on, for plans and logs. Every format runs on every instruction set.
typedef struct kvarn_support {
    size_t size;
    const char* arch;         ///< the instruction set in use; static
    int32_t fixed_bounds;     ///< 1: head_dim and group are 64, 128 or 256, loops over a tile have compile-time bounds
    int32_t key_precision;    ///< KVARN_PRECISION_...; when attending, of the products with the codes of K
    int32_t value_precision;  ///< and of V: the next more precise one where the shape does not allow what was wanted
    float time;               ///< about how many times as long as on avx2 an element takes; 0: not measured there
} kvarn_support;
#define KVARN_SUPPORT_INIT {sizeof(kvarn_support), NULL, 0, KVARN_PRECISION_EXACT, KVARN_PRECISION_EXACT, 0.0f}
/// `operation`: KVARN_OPERATION_...; `precision`: KVARN_PRECISION_..., of attention.
KVARN_C_API KVARN_C_CHECKED kvarn_status kvarn_supports(const kvarn_format* format, int32_t operation, int32_t precision,
                                                        kvarn_support* support) KVARN_C_NOEXCEPT;

// --- records -------------------------------------------------------------------------------------------------------

/// A grid of records [tile][head] in memory of the caller: record (tile, head) starts tile * tile_stride + head *
/// head_stride bytes behind `data`. Records need no alignment.
typedef struct kvarn_records {
    void* data;           ///< not written to where records are read
    size_t bytes;         ///< of the whole buffer, for checking
    size_t tiles, heads;
    size_t tile_stride, head_stride;  ///< bytes
    size_t record_bytes;  ///< what a record owns: bytes beyond its content, up to here, are set to zero
} kvarn_records;
#define KVARN_RECORDS_INIT {NULL, 0, 0, 0, 0, 0, 0}

/// Dense grids at kvarn_record_bytes(format, round_to): all heads of tile 0, then of tile 1; or all tiles of head 0,
/// then of head 1, the order in which attention reads. Empty for no format, or where sizes overflow.
KVARN_C_API kvarn_records kvarn_tile_major_records(const kvarn_format* format, const void* data, size_t bytes,
                                                   size_t tiles, size_t heads,
                                                   size_t round_to) KVARN_C_NOEXCEPT KVARN_C_ADDRESS(2);
KVARN_C_API kvarn_records kvarn_head_major_records(const kvarn_format* format, const void* data, size_t bytes,
                                                   size_t tiles, size_t heads,
                                                   size_t round_to) KVARN_C_NOEXCEPT KVARN_C_ADDRESS(2);

/// How to encode. The record is the same on every machine for the same options.
typedef struct kvarn_encode_options {
    size_t size;
    int32_t encoder;             ///< KVARN_ENCODER_REFINED
    int32_t iterations;          ///< 8; paper: at most this many rounds of variance normalisation, 0..64
    int32_t refined_iterations;  ///< 1; refined: rounds for a balanced tile, 0..64; others take up to `iterations`, if more
    int32_t refit_rounds;        ///< 5; refined: refits of both axes' scalars, 0..16
    int32_t clip_steps;          ///< 2; refined: clip ranges 1, 0.9, 0.8, ... tried below the whole one, 0..8
    int32_t key_basis;           ///< KVARN_BASIS_ORIGINAL; of the input's quantized channels; rotated: as in the records already
    int32_t value_basis;         ///< KVARN_BASIS_ORIGINAL
    int32_t reserved;            ///< 0
} kvarn_encode_options;
#define KVARN_ENCODE_OPTIONS_INIT \
    {sizeof(kvarn_encode_options), KVARN_ENCODER_REFINED, 8, 1, 5, 2, KVARN_BASIS_ORIGINAL, KVARN_BASIS_ORIGINAL, 0}

/// Errors of the K or the V part of one record; x is an exact token, x' the decoded one (quantized channels only). No
/// unit.
typedef struct kvarn_part_errors {
    float worst_scale_error;     ///< largest | ||x'|| / ||x|| - 1 | over the tokens: the paper's token-scale error
    float worst_relative_error;  ///< largest ||x - x'|| / ||x|| over the tokens
    float relative_error;        ///< ||X - X'|| / ||X|| over the whole part
} kvarn_part_errors;
/// What a record lost.
typedef struct kvarn_record_errors {
    kvarn_part_errors k;
    kvarn_part_errors v;  ///< zeros where the format has no V part
} kvarn_record_errors;

/// Seals tiles: quantizes the tokens of `k` and `v` into `records`. Shapes: k [tiles * group][heads][head_dim_k +
/// exact_channels], v [tiles * group][heads][head_dim_v] (left out if the format has no V part), records
/// [tiles][heads]. Both views have one element type. `options` null: the defaults. Scratch: kvarn_scratch_bytes.
/// Errors, nothing written: KVARN_NULL_POINTER, KVARN_SHAPE_MISMATCH, KVARN_TOKEN_COUNT_MISMATCH,
/// KVARN_BUFFER_TOO_SMALL, KVARN_BAD_ARGUMENT (options, types), KVARN_NOT_FINITE, KVARN_SCALE_OVERFLOW. Zero tiles or
/// heads are fine.
KVARN_C_API KVARN_C_CHECKED kvarn_status kvarn_quantize(const kvarn_format* format, const kvarn_view* k,
                                                        const kvarn_view* v, const kvarn_records* records,
                                                        const kvarn_encode_options* options, void* scratch,
                                                        size_t scratch_bytes) KVARN_C_NOEXCEPT;
/// The same for the records [begin, end), clipped to the grid: record i is (tile i / heads, head i % heads). Only
/// these are read, checked and written, so that threads share a call, each with scratch of its own. `errors` null, or
/// [error_count] with room for each of them.
KVARN_C_API KVARN_C_CHECKED kvarn_status kvarn_quantize_items(const kvarn_format* format, const kvarn_view* k,
                                                              const kvarn_view* v, const kvarn_records* records,
                                                              const kvarn_encode_options* options, size_t begin,
                                                              size_t end, void* scratch, size_t scratch_bytes,
                                                              kvarn_record_errors* errors,
                                                              size_t error_count) KVARN_C_NOEXCEPT;

/// Decodes records into `k` and `v`, in the original basis or as they are stored (KVARN_BASIS_ROTATED). Shapes and
/// types as for kvarn_quantize; either view may be left out. Exact channels come back unchanged, f16 saturates at
/// +-65504. Errors, nothing written: as kvarn_quantize, and KVARN_NOT_FINITE (a scalar of a record).
KVARN_C_API KVARN_C_CHECKED kvarn_status kvarn_dequantize(const kvarn_format* format, const kvarn_records* records,
                                                          const kvarn_view* k, const kvarn_view* v,
                                                          int32_t wanted_basis, void* scratch,
                                                          size_t scratch_bytes) KVARN_C_NOEXCEPT;
/// The same for the records [begin, end).
KVARN_C_API KVARN_C_CHECKED kvarn_status kvarn_dequantize_items(const kvarn_format* format,
                                                                const kvarn_records* records, const kvarn_view* k,
                                                                const kvarn_view* v, int32_t wanted_basis,
                                                                size_t begin, size_t end, void* scratch,
                                                                size_t scratch_bytes) KVARN_C_NOEXCEPT;

// --- attention on records ------------------------------------------------------------------------------------------

/// Consecutive positions of the history of one KV head: exact tokens, or records. The functions below make them.
/// Positions decide what the causal mask and the window hide. There may be gaps between segments, but each begins at
/// or behind the end of the one before.
typedef struct kvarn_segment {
    size_t size;
    size_t tokens;     ///< that are part of the history
    int64_t position;  ///< of the first of them; -1: they follow the segment before, the first segment begins at 0
    kvarn_view k, v;   ///< exact tokens: [tokens][heads][key channels] and [head_dim_v]; v left out without a V part
    size_t head;       ///< of k and v
    int32_t key_basis, value_basis;
    const void* data;         ///< records: number i lies (table ? table[i] : i) * stride bytes behind data, or at list[i]
    ptrdiff_t stride;         ///< bytes
    const int32_t* table;     ///< may be null
    const void* const* list;  ///< may be null
    size_t records;           ///< ceil((skip + tokens) / group); 0: exact tokens
    size_t skip;              ///< tokens of the first record that come before the segment's; less than group
} kvarn_segment;
#define KVARN_SEGMENT_INIT                                                                                          \
    {sizeof(kvarn_segment), 0, -1, KVARN_VIEW_INIT, KVARN_VIEW_INIT, 0, KVARN_BASIS_ORIGINAL, KVARN_BASIS_ORIGINAL, \
     NULL, 0, NULL, NULL, 0, 0}

/// All tokens of one head of `k` and `v` (a sink or a tail). `v` is left out when V is read from K. Values of tokens
/// that some query sees must be finite. Error: KVARN_NULL_POINTER.
KVARN_C_API KVARN_C_CHECKED kvarn_status kvarn_exact_tokens(const kvarn_view* k, const kvarn_view* v, size_t head,
                                                            int32_t key_basis, int32_t value_basis,
                                                            kvarn_segment* segment) KVARN_C_NOEXCEPT;
/// Records [first, first + count) of one head of a grid, clipped to it. Error: KVARN_BAD_ARGUMENT (no such head).
KVARN_C_API KVARN_C_CHECKED kvarn_status kvarn_sealed_tiles(const kvarn_format* format, const kvarn_records* records,
                                                            size_t head, size_t first, size_t count,
                                                            kvarn_segment* segment) KVARN_C_NOEXCEPT;
/// `count` records, number i of them table[i] * stride bytes behind `base`: a block table.
KVARN_C_API KVARN_C_CHECKED kvarn_status kvarn_paged_tiles(const kvarn_format* format, const void* base,
                                                           ptrdiff_t stride, const int32_t* table, size_t count,
                                                           kvarn_segment* segment) KVARN_C_NOEXCEPT;
/// `count` records at the given addresses.
KVARN_C_API KVARN_C_CHECKED kvarn_status kvarn_listed_tiles(const kvarn_format* format, const void* const* records,
                                                            size_t count, kvarn_segment* segment) KVARN_C_NOEXCEPT;
/// Tokens [first, first + count) of a segment, clipped to what it has, in its place; of records too, wherever in a
/// tile they begin and end.
KVARN_C_API KVARN_C_CHECKED kvarn_status kvarn_segment_tokens(const kvarn_format* format, size_t first, size_t count,
                                                              kvarn_segment* segment) KVARN_C_NOEXCEPT;

/// One KV head of one sequence for one step: m new tokens times r query heads of the group, m * r at most 1024.
///
/// `mask` says, for the newest positions, what each new token sees: a tree of drafts, or a prefix within which all
/// see all. Row i, of `mask_stride` words, is of new token i; bit t % 64 of word t / 64 is of the position
/// `mask_tokens - t` from the end of the history. There it takes the place of the causal mask; the window counts as
/// ever.
typedef struct kvarn_attention_task {
    size_t size;
    const kvarn_segment* history;  ///< [history_count] in the order of positions, the new tokens included (at the end of the tail)
    size_t history_count;
    kvarn_view q;              ///< [m][r][head_dim_k + exact_channels]
    kvarn_view out;            ///< [m][r][head_dim_v, or head_dim_k when V is read from K]
    float* log_sum_exp;        ///< [m][r], natural logarithm of the sum of exp(score), sink logit included; may be null
    const float* sink_logits;  ///< [r], logits that take part in the softmax without a value; may be null
    const float* alibi_slopes;  ///< [r], score += slope * (position of the key - of the query), after the soft cap; may be null
    int64_t first_position;    ///< -1; of the first query token; -1: the new tokens are the last m positions of the history
    const kvarn_format* format;  ///< of the task's records; null: the call's
    const uint64_t* mask;      ///< [m][mask_stride] words; null: none
    size_t mask_stride;        ///< at least mask_tokens / 64, rounded up
    size_t mask_tokens;        ///< newest positions that the mask speaks of; may be more than there are
} kvarn_attention_task;
#define KVARN_ATTENTION_TASK_INIT \
    {sizeof(kvarn_attention_task), NULL, 0, KVARN_VIEW_INIT, KVARN_VIEW_INIT, NULL, NULL, NULL, -1, NULL, NULL, 0, 0}

/// How a call attends.
typedef struct kvarn_attention_options {
    size_t size;
    float softmax_scale;   ///< 0; factor on <q, k>; 0: 1 / sqrt(channels of K, exact ones included)
    float logit_soft_cap;  ///< 0; s <- cap * tanh(s / cap) after scaling, at most 1000; 0: none
    int64_t window;        ///< 0; a query sees this many newest positions up to its own; 0: all
    int32_t causal;        ///< 1; a query does not see positions after its own
    int32_t query_basis;   ///< KVARN_BASIS_ORIGINAL; of the quantized channels of q; rotated: as K of the records
    int32_t output_basis;  ///< KVARN_BASIS_ORIGINAL; of the output; rotated: as V of the records
    int32_t precision;     ///< KVARN_PRECISION_FINE
    float fast_bound;      ///< 0.03; standard deviation that 8-bit weights of K may give a score, with ..._FAST
    int32_t reserved;      ///< 0
} kvarn_attention_options;
#define KVARN_ATTENTION_OPTIONS_INIT \
    {sizeof(kvarn_attention_options), 0.0f, 0.0f, 0, 1, KVARN_BASIS_ORIGINAL, KVARN_BASIS_ORIGINAL, KVARN_PRECISION_FINE, \
     0.03f, 0}

/// Attends to the whole history of one task. An empty history (or none visible) gives zeros and a log-sum-exp of
/// -infinity, unless there is a sink logit. `options` null: the defaults. Scratch: kvarn_attend_scratch_bytes.
/// Errors, nothing written: KVARN_NULL_POINTER, KVARN_SHAPE_MISMATCH, KVARN_BAD_ARGUMENT (options, positions),
/// KVARN_BUFFER_TOO_SMALL, KVARN_NOT_FINITE (a query value not finite, or beyond 1e20 times the softmax scale and
/// log2(e); a sink logit not below 1e20; an ALiBi slope not within 1e18).
KVARN_C_API KVARN_C_CHECKED kvarn_status kvarn_attend(const kvarn_format* format, const kvarn_attention_task* task,
                                                      const kvarn_attention_options* options, void* scratch,
                                                      size_t scratch_bytes) KVARN_C_NOEXCEPT;
/// For tasks of up to `query_rows` rows (m * r) and `segments` segments; bytes, at any alignment.
KVARN_C_API size_t kvarn_attend_scratch_bytes(const kvarn_format* format, size_t query_rows,
                                              size_t segments) KVARN_C_NOEXCEPT;

/// A batch of tasks as work items for threads: each item is up to `chunks_per_item` runs of 1024 tokens of one task.
/// When all items have returned KVARN_OK, kvarn_combine_item writes the output of each task. The result is the same
/// bits for any number of threads or chunks.
typedef struct kvarn_attention kvarn_attention;

/// Bytes for kvarn_attention_plan, at any alignment; 0 for arguments that make no sense.
KVARN_C_API size_t kvarn_attention_bytes(const kvarn_format* format, const kvarn_attention_task* tasks,
                                         size_t count) KVARN_C_NOEXCEPT;
/// Plans a batch in `memory`, which keeps all it needs of `tasks` and their segments, but not what those point to
/// (values, records, tables, masks, slopes). Tasks may have formats of their own. chunks_per_item 0: 4. Errors: those
/// of kvarn_attend but for values, which items find.
KVARN_C_API KVARN_C_CHECKED kvarn_status kvarn_attention_plan(const kvarn_format* format,
                                                              const kvarn_attention_task* tasks, size_t count,
                                                              const kvarn_attention_options* options,
                                                              size_t chunks_per_item, void* memory, size_t bytes,
                                                              kvarn_attention** attention) KVARN_C_NOEXCEPT;
KVARN_C_API size_t kvarn_attention_items(const kvarn_attention* attention) KVARN_C_NOEXCEPT;
/// Item `item`; different ones at the same time. Scratch: kvarn_call_scratch_bytes of the largest format. Errors as
/// for kvarn_attend.
KVARN_C_API KVARN_C_CHECKED kvarn_status kvarn_attend_item(const kvarn_attention* attention, size_t item,
                                                           void* scratch, size_t scratch_bytes) KVARN_C_NOEXCEPT;
/// Merges the items of task `task`, all of which have returned KVARN_OK, and writes its output; different tasks at
/// the same time.
KVARN_C_API KVARN_C_CHECKED kvarn_status kvarn_combine_item(const kvarn_attention* attention, size_t task,
                                                            void* scratch, size_t scratch_bytes) KVARN_C_NOEXCEPT;

// --- the basis of a head, by its data ------------------------------------------------------------------------------

/// What decides the basis, and the bits, of a head.
typedef struct kvarn_choose_options {
    size_t size;
    float margin;            ///< 1.5; K leaves the rotation where that divides the weighted error by more than this
    float value_margin;      ///< 2; the same for V and its squared error
    float most_key_error;    ///< 0; above 0: K takes the fewest bits, up to 8, at which its weighted error is at most this
    float most_value_error;  ///< 0; the same for V
    const kvarn_encode_options* encode;  ///< null: the defaults; K and V in the original basis
} kvarn_choose_options;
#define KVARN_CHOOSE_OPTIONS_INIT {sizeof(kvarn_choose_options), 1.5f, 2.0f, 0.0f, 0.0f, NULL}

/// Adds queries to the moments of the KV head that they attend to. q: [tokens][query heads of the group][at least
/// head_dim_k channels], in the original basis, as they meet K (after the rotary embedding). moments: [count], count
/// >= head_dim_k, zero at first; sums are exact and in any order. Errors: KVARN_SHAPE_MISMATCH, KVARN_NULL_POINTER,
/// KVARN_BUFFER_TOO_SMALL (count).
KVARN_C_API KVARN_C_CHECKED kvarn_status kvarn_add_query_moments(const kvarn_format* format, const kvarn_view* q,
                                                                 uint64_t* moments, size_t count) KVARN_C_NOEXCEPT;
/// `base` with its parts rotated or not, whichever loses less on the tiles of `k` and `v`, [tiles *
/// group][1][channels], and with more bits where `options` (null: the defaults) say so. `v` may be left out: V's part
/// stays. Costs two seals and two decodings of the tiles; take the first tile of a head. Errors: those of
/// kvarn_quantize; KVARN_BAD_ARGUMENT (options).
KVARN_C_API KVARN_C_CHECKED kvarn_status kvarn_choose_format(const kvarn_format* base, const kvarn_view* k,
                                                             const kvarn_view* v, const uint64_t* moments,
                                                             size_t count, const kvarn_choose_options* options,
                                                             void* scratch, size_t scratch_bytes,
                                                             kvarn_format* format) KVARN_C_NOEXCEPT;
/// Scratch for it, in bytes at any alignment.
KVARN_C_API size_t kvarn_choose_scratch_bytes(const kvarn_format* format) KVARN_C_NOEXCEPT;

// --- a whole cache: configuration and plan -------------------------------------------------------------------------

/// Other bits, or another basis, for the heads [first_head, last_head] of the layers [first_layer, last_layer], ends
/// included. Negative numbers count from the end: -1 is the last one. -1 leaves bits and rotations as they are.
typedef struct kvarn_bit_rule {
    size_t size;
    int32_t first_layer, last_layer;  ///< 0, -1
    int32_t first_head, last_head;    ///< 0, -1
    int32_t key_bits, value_bits;     ///< -1, -1
    int32_t key_rotation, value_rotation;  ///< -1, -1; or KVARN_ROTATION_...
} kvarn_bit_rule;
#define KVARN_BIT_RULE_INIT {sizeof(kvarn_bit_rule), 0, -1, 0, -1, -1, -1, -1, -1}

/// Rules of one configuration at most.
#define KVARN_MOST_RULES 1024

/// Everything that a cache is told once. Fields of zero that say so are filled in. The pool keeps nothing of what the
/// pointers point to.
typedef struct kvarn_cache_config {
    size_t size;
    const kvarn_format* format;   ///< of every layer and head that no rule changes; must be given
    const kvarn_bit_rule* rules;  ///< [rule_count], later ones win; may be null
    size_t rule_count;            ///< 0; at most KVARN_MOST_RULES
    int32_t layers;               ///< 0: must be given
    int32_t heads;                ///< 0: must be given; KV heads of a layer
    int32_t exact;                ///< KVARN_F16; element type in which sink and tail are kept
    int32_t key_basis;            ///< KVARN_BASIS_ORIGINAL; of K as it is stored
    int32_t value_basis;          ///< KVARN_BASIS_ORIGINAL; of V
    int32_t reserved;             ///< 0
    size_t sink_tokens;    ///< 128; at the start of each sequence, never sealed; rounded up to whole tiles
    size_t recent_tokens;  ///< 0; the newest committed tokens, not sealed yet
    size_t sequences;      ///< 1; open at once
    size_t most_tokens;    ///< 4096; of one sequence, drafts included
    size_t most_step;      ///< 1; tokens of one step at most, for the default of exact_blocks
    size_t record_blocks;  ///< 0: enough for all sequences at most_tokens
    size_t exact_blocks;   ///< 0: the same, where sealing follows each step at once
    size_t most_spans;     ///< 0: twice the tiles of a sequence and 16. Rollbacks into sealed tiles and erasures add spans
    const kvarn_encode_options* encode;  ///< of the records; null: the defaults
} kvarn_cache_config;
#define KVARN_CACHE_CONFIG_INIT                                                                                       \
    {sizeof(kvarn_cache_config), NULL, NULL, 0, 0, 0, KVARN_F16, KVARN_BASIS_ORIGINAL, KVARN_BASIS_ORIGINAL, 0, 128, \
     0, 1, 4096, 1, 0, 0, 0, NULL}

/// What a pool takes, to the byte. A block is the place of one tile of tokens for all layers and KV heads.
typedef struct kvarn_cache_plan {
    size_t size;
    size_t bytes;               ///< of memory for kvarn_pool_make, at any alignment: the sum of the next three
    size_t records;             ///< bytes of all record blocks
    size_t exact;               ///< bytes of all exact blocks
    size_t state;               ///< bytes of tables, counts, spans of sequences, and alignment
    size_t record_block_bytes;  ///< of one record block: all layers and heads, scales and padding included
    size_t exact_block_bytes;   ///< of one exact block
    size_t record_blocks;       ///< blocks of the completed configuration
    size_t exact_blocks;
} kvarn_cache_plan;
#define KVARN_CACHE_PLAN_INIT {sizeof(kvarn_cache_plan), 0, 0, 0, 0, 0, 0, 0, 0}

/// Errors: those of kvarn_format_make; KVARN_BAD_ARGUMENT (no layers, heads, sequences, blocks or tokens, or more of
/// them than 2^31, or of layers x heads than 2^20; a rule with an empty range or outside; options);
/// KVARN_SHAPE_MISMATCH (a rule gives bits to a V part that is not there, or takes it away); KVARN_BUFFER_TOO_SMALL
/// (the sizes do not fit size_t).
KVARN_C_API KVARN_C_CHECKED kvarn_status kvarn_plan_cache(const kvarn_cache_config* config,
                                                          kvarn_cache_plan* plan) KVARN_C_NOEXCEPT;
/// The configuration with its zeros filled in and as many record blocks as fit into `bytes` of memory, but no more
/// than it has. `fitted` may be `config` itself. Errors: those of kvarn_plan_cache; KVARN_NO_ROOM (not one fits).
KVARN_C_API KVARN_C_CHECKED kvarn_status kvarn_fit_cache(const kvarn_cache_config* config, size_t bytes,
                                                         kvarn_cache_config* fitted) KVARN_C_NOEXCEPT;

/// What the caches of one sequence of `tokens` tokens take, all layers and heads together: the sink exact, then as
/// many whole tiles as there are, then an exact tail, where exact tokens take what they fill. Errors: those of
/// kvarn_plan_cache; KVARN_BAD_ARGUMENT (more than 2^31 tokens).
typedef struct kvarn_sequence_plan {
    size_t size;
    size_t record_bytes;      ///< sealed tiles, scales and padding included
    size_t exact_bytes;       ///< sink and tail
    size_t elements;          ///< values of K and V
    double bits_per_element;  ///< of all
} kvarn_sequence_plan;
#define KVARN_SEQUENCE_PLAN_INIT {sizeof(kvarn_sequence_plan), 0, 0, 0, 0.0}
KVARN_C_API KVARN_C_CHECKED kvarn_status kvarn_plan_sequence(const kvarn_cache_config* config, size_t tokens,
                                                             kvarn_sequence_plan* plan) KVARN_C_NOEXCEPT;

/// Bytes of scratch, at any alignment, for every item of a layer, sealing and reading. `rows`:
/// kvarn_layer_options.rows_per_task, or the query heads of a KV head where those are more; 0: 32.
KVARN_C_API size_t kvarn_cache_scratch_bytes(const kvarn_cache_config* config, size_t rows) KVARN_C_NOEXCEPT;

// --- pools and sequences -------------------------------------------------------------------------------------------

/// A cache in the caller's memory: sequences that grow by drafts, are committed, rolled back, cut, forked and closed.
///
/// The life of a token: kvarn_reserve makes room for drafts in all layers, kvarn_store (or the items of a layer)
/// writes them layer by layer, kvarn_commit lets the first of them count and drops the others, sealing turns full
/// tiles into records.
typedef struct kvarn_pool kvarn_pool;

/// Names a sequence of a pool. One that was closed is known as such for ever (KVARN_STALE_HANDLE). {0, 0} names
/// nothing.
typedef struct kvarn_sequence {
    uint32_t slot;
    uint32_t generation;
} kvarn_sequence;

/// Makes a pool in `memory`, of at least kvarn_cache_plan.bytes, at any alignment; nothing needs to be zero. Errors:
/// those of kvarn_plan_cache; KVARN_NULL_POINTER, KVARN_BUFFER_TOO_SMALL.
KVARN_C_API KVARN_C_CHECKED kvarn_status kvarn_pool_make(const kvarn_cache_config* config, void* memory, size_t bytes,
                                                         kvarn_pool** pool) KVARN_C_NOEXCEPT;

KVARN_C_API size_t kvarn_pool_layers(const kvarn_pool* pool) KVARN_C_NOEXCEPT;
KVARN_C_API size_t kvarn_pool_heads(const kvarn_pool* pool) KVARN_C_NOEXCEPT;
/// The completed configuration; its pointers (format, rules, encode) are null and its rule_count 0. kvarn_pool_format
/// has the formats.
KVARN_C_API KVARN_C_CHECKED kvarn_status kvarn_pool_config(const kvarn_pool* pool,
                                                           kvarn_cache_config* config) KVARN_C_NOEXCEPT;
KVARN_C_API KVARN_C_CHECKED kvarn_status kvarn_pool_format(const kvarn_pool* pool, size_t layer, size_t head,
                                                           kvarn_format* format) KVARN_C_NOEXCEPT;
/// Other bases for one head, as kvarn_choose_format finds them; sizes stay. Errors, nothing changes:
/// KVARN_BAD_ARGUMENT (no such head, another format but for its rotations, there are records already, or exact tokens
/// in the basis of the records).
KVARN_C_API KVARN_C_CHECKED kvarn_status kvarn_pool_set_format(kvarn_pool* pool, size_t layer, size_t head,
                                                               const kvarn_format* format) KVARN_C_NOEXCEPT;

/// Blocks in use and free are what the pool has; shared ones are held more than once: by forks, by the parts of a
/// tile that kvarn_erase has cut in two, by the queue of sealing.
typedef struct kvarn_pool_statistics {
    size_t size;
    size_t records_used, records_free, records_shared;
    size_t exact_used, exact_free, exact_shared;
    size_t bytes_used;             ///< of blocks
    size_t tiles_sealed;           ///< since the pool was made
    size_t tiles_kept_not_finite;  ///< tiles that sealing refused, since the pool was made: they stay exact
    size_t tiles_kept_overflowed;
    size_t sequences;              ///< open
} kvarn_pool_statistics;
#define KVARN_POOL_STATISTICS_INIT {sizeof(kvarn_pool_statistics), 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0}
KVARN_C_API KVARN_C_CHECKED kvarn_status kvarn_statistics_of_pool(const kvarn_pool* pool,
                                                                  kvarn_pool_statistics* statistics) KVARN_C_NOEXCEPT;

/// What a sequence holds.
typedef struct kvarn_sequence_statistics {
    size_t size;
    size_t tokens;         ///< committed
    size_t drafts;
    size_t sealed_tokens;  ///< of the committed ones, those in records
    size_t dead_tokens;    ///< places of its record blocks that it does not see: behind rollbacks and erasures
    size_t kept_tiles;     ///< tiles that sealing refused, of which it sees all or a part
    size_t record_blocks, exact_blocks, spans;
    size_t own_records, own_exact;  ///< of those blocks, the ones that nobody else holds: what closing gives back
    int64_t next_position;
} kvarn_sequence_statistics;
#define KVARN_SEQUENCE_STATISTICS_INIT {sizeof(kvarn_sequence_statistics), 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0}
KVARN_C_API KVARN_C_CHECKED kvarn_status kvarn_statistics_of(const kvarn_pool* pool, kvarn_sequence sequence,
                                                             kvarn_sequence_statistics* statistics) KVARN_C_NOEXCEPT;

/// A new sequence, its first token at `first_position` (left padding needs no tokens: begin behind it). Errors:
/// KVARN_NO_ROOM (all sequences are open), KVARN_BAD_ARGUMENT (a position below 0 or beyond 2^60).
KVARN_C_API KVARN_C_CHECKED kvarn_status kvarn_open(kvarn_pool* pool, int64_t first_position,
                                                    kvarn_sequence* sequence) KVARN_C_NOEXCEPT;
/// Gives its blocks back; tiles in the queue of sealing hold theirs until kvarn_finish_seal, or kvarn_cancel_seal
/// before. Error: KVARN_STALE_HANDLE, as for all functions below.
KVARN_C_API KVARN_C_CHECKED kvarn_status kvarn_close(kvarn_pool* pool, kvarn_sequence sequence) KVARN_C_NOEXCEPT;

/// Room for `tokens` more drafts in all layers. Errors: KVARN_NO_ROOM (blocks), KVARN_SEQUENCE_FULL (most_tokens,
/// most_spans).
KVARN_C_API KVARN_C_CHECKED kvarn_status kvarn_reserve(kvarn_pool* pool, kvarn_sequence sequence,
                                                       size_t tokens) KVARN_C_NOEXCEPT;
/// Room for `tokens` more drafts of a sequence.
typedef struct kvarn_sequence_room {
    kvarn_sequence sequence;
    size_t tokens;
} kvarn_sequence_room;
/// The same for a batch: room for all of it, or nothing changes. `failed`, if not null, is set to the one that has the
/// error, of KVARN_NO_ROOM the first that finds none. Errors: those of each; KVARN_BAD_ARGUMENT (a sequence is named
/// twice), KVARN_NULL_POINTER.
KVARN_C_API KVARN_C_CHECKED kvarn_status kvarn_reserve_batch(kvarn_pool* pool, const kvarn_sequence_room* batch,
                                                             size_t count, size_t* failed) KVARN_C_NOEXCEPT;
/// Writes K and V of one layer for the drafts [first_draft, first_draft + tokens of k), KV heads [first_head,
/// first_head + heads of k). Rounds to the exact type; f16 saturates. Threads may store different layers and heads of
/// a sequence at the same time. What is stored again replaces what was; the drafts of a layer and head are stored in
/// order. `v` is left out where the formats have no V part. Errors, nothing written: KVARN_BAD_ARGUMENT (no such
/// layer, heads or drafts, or earlier ones are missing), KVARN_SHAPE_MISMATCH, KVARN_NULL_POINTER.
KVARN_C_API KVARN_C_CHECKED kvarn_status kvarn_store(kvarn_pool* pool, kvarn_sequence sequence, size_t layer,
                                                     const kvarn_view* k, const kvarn_view* v, size_t first_draft,
                                                     size_t first_head) KVARN_C_NOEXCEPT;
/// The first `tokens` drafts count from now on, the others are gone; 0 drops all. Errors: KVARN_BAD_ARGUMENT (there
/// are fewer drafts, or some of them were not stored in some layer and head).
KVARN_C_API KVARN_C_CHECKED kvarn_status kvarn_commit(kvarn_pool* pool, kvarn_sequence sequence,
                                                      size_t tokens) KVARN_C_NOEXCEPT;
/// The same for a path through a tree of drafts: those with the given numbers, [count] in rising order, follow each
/// other from now on.
KVARN_C_API KVARN_C_CHECKED kvarn_status kvarn_commit_path(kvarn_pool* pool, kvarn_sequence sequence,
                                                           const size_t* drafts, size_t count) KVARN_C_NOEXCEPT;
/// Drops all drafts and every token at or behind `position`; the next one goes there, or where it would have gone, if
/// that is before. Sealed tiles are cut, not decoded. Errors: KVARN_BAD_ARGUMENT (before the first position).
KVARN_C_API KVARN_C_CHECKED kvarn_status kvarn_truncate(kvarn_pool* pool, kvarn_sequence sequence,
                                                        int64_t position) KVARN_C_NOEXCEPT;
/// Drops the tokens at positions [begin, end); the others keep their positions. Errors: KVARN_BAD_ARGUMENT (end <
/// begin, or there are drafts), KVARN_SEQUENCE_FULL (most_spans: a span would become two).
KVARN_C_API KVARN_C_CHECKED kvarn_status kvarn_erase(kvarn_pool* pool, kvarn_sequence sequence, int64_t begin,
                                                     int64_t end) KVARN_C_NOEXCEPT;
/// Drops the `tokens` oldest tokens behind the sink. Errors as for kvarn_erase, and KVARN_BAD_ARGUMENT (there are not
/// so many).
KVARN_C_API KVARN_C_CHECKED kvarn_status kvarn_evict_front(kvarn_pool* pool, kvarn_sequence sequence,
                                                           size_t tokens) KVARN_C_NOEXCEPT;
/// A second sequence with the same tokens; they share all blocks until one of them changes. Errors: KVARN_NO_ROOM
/// (all sequences are open), KVARN_BAD_ARGUMENT (there are drafts).
KVARN_C_API KVARN_C_CHECKED kvarn_status kvarn_fork(kvarn_pool* pool, kvarn_sequence sequence,
                                                    kvarn_sequence* fork) KVARN_C_NOEXCEPT;

/// 1 for a sequence that is open, otherwise 0; its committed tokens, its drafts, 0 for a stale handle; where the next
/// draft goes, -1 for a stale handle.
KVARN_C_API int32_t kvarn_is_open(const kvarn_pool* pool, kvarn_sequence sequence) KVARN_C_NOEXCEPT;
KVARN_C_API size_t kvarn_tokens(const kvarn_pool* pool, kvarn_sequence sequence) KVARN_C_NOEXCEPT;
KVARN_C_API size_t kvarn_drafts(const kvarn_pool* pool, kvarn_sequence sequence) KVARN_C_NOEXCEPT;
KVARN_C_API int64_t kvarn_next_position(const kvarn_pool* pool, kvarn_sequence sequence) KVARN_C_NOEXCEPT;
/// Tokens at positions [begin, end), committed ones and drafts; 0 for a stale handle.
KVARN_C_API size_t kvarn_count_tokens(const kvarn_pool* pool, kvarn_sequence sequence, int64_t begin,
                                      int64_t end) KVARN_C_NOEXCEPT;

/// What the cache holds of the tokens at positions [begin, end) of one KV head: exact values as they were stored,
/// records decoded, in the bases of the configuration. k [kvarn_count_tokens][1][key channels], v
/// [kvarn_count_tokens][1][head_dim_v]; either may be left out. Scratch: kvarn_cache_scratch_bytes. Errors:
/// KVARN_BAD_ARGUMENT (no such layer or head; drafts that are not stored), KVARN_SHAPE_MISMATCH,
/// KVARN_BUFFER_TOO_SMALL, KVARN_NOT_FINITE (a scalar of a record).
KVARN_C_API KVARN_C_CHECKED kvarn_status kvarn_read(const kvarn_pool* pool, kvarn_sequence sequence, size_t layer,
                                                    size_t head, int64_t begin, int64_t end, const kvarn_view* k,
                                                    const kvarn_view* v, void* scratch,
                                                    size_t scratch_bytes) KVARN_C_NOEXCEPT;

// --- sealing -------------------------------------------------------------------------------------------------------

/// What sealing did. A tile that a record cannot hold stays exact, and is no error.
typedef struct kvarn_seal_report {
    size_t size;
    size_t sealed;      ///< tiles that are records now, but for those that a fork had sealed
    size_t kept_exact;  ///< tiles that a record cannot hold
    size_t dropped;     ///< tiles that their sequence cut or left meanwhile
    size_t unfinished;  ///< tiles that were said to be done and were not: all their items are still to be done
    // The first tile that was kept, where there is one: its sequence, the position of its first token, where, and why.
    kvarn_sequence sequence;
    int64_t position;
    size_t layer, head;
    int32_t why;  ///< KVARN_NOT_FINITE or KVARN_SCALE_OVERFLOW
    int32_t reserved;
} kvarn_seal_report;
#define KVARN_SEAL_REPORT_INIT {sizeof(kvarn_seal_report), 0, 0, 0, 0, {0, 0}, 0, 0, 0, 0, 0}

/// Seals up to `most` ready tiles of a sequence, the oldest first, in this thread; stops early where no record block
/// is free. `report` may be null. Scratch: kvarn_scratch_bytes or kvarn_cache_scratch_bytes. Errors:
/// KVARN_STALE_HANDLE, KVARN_BUFFER_TOO_SMALL, KVARN_NO_ROOM (tiles are ready, but nothing could be done).
KVARN_C_API KVARN_C_CHECKED kvarn_status kvarn_seal(kvarn_pool* pool, kvarn_sequence sequence, size_t most,
                                                    void* scratch, size_t scratch_bytes,
                                                    kvarn_seal_report* report) KVARN_C_NOEXCEPT;

/// Tiles of a sequence that are ready: full, committed, neither sink nor recent.
KVARN_C_API size_t kvarn_ready_tiles(const kvarn_pool* pool, kvarn_sequence sequence) KVARN_C_NOEXCEPT;
/// Queues up to `most` ready tiles, the oldest first; each takes a record block and gives layers x heads items.
/// `queued` says how many and may be null. Errors: KVARN_STALE_HANDLE, KVARN_NO_ROOM (tiles are ready, but nothing
/// could be done).
KVARN_C_API KVARN_C_CHECKED kvarn_status kvarn_begin_seal(kvarn_pool* pool, kvarn_sequence sequence, size_t most,
                                                          size_t* queued) KVARN_C_NOEXCEPT;
/// The same for all sequences of the pool, none of which may be in use meanwhile: the oldest ready tile of each, then
/// the next of each, up to `most` in all. Error: KVARN_NO_ROOM.
KVARN_C_API KVARN_C_CHECKED kvarn_status kvarn_begin_seal_all(kvarn_pool* pool, size_t most,
                                                              size_t* queued) KVARN_C_NOEXCEPT;
/// Items in the queue that are not done.
KVARN_C_API size_t kvarn_seal_items(const kvarn_pool* pool) KVARN_C_NOEXCEPT;
/// Does item `item`, counted from the first that is not done. Different items may run at the same time, and beside
/// everything but kvarn_finish_seal, kvarn_cancel_seal and kvarn_pool_set_format. Errors: KVARN_BAD_ARGUMENT (no such
/// item), KVARN_BUFFER_TOO_SMALL.
KVARN_C_API KVARN_C_CHECKED kvarn_status kvarn_seal_item(kvarn_pool* pool, size_t item, void* scratch,
                                                         size_t scratch_bytes) KVARN_C_NOEXCEPT;
/// The first `items` items are done: tiles whose last one is among them become records, or stay exact. No other
/// thread may use their sequences meanwhile. First in, first out: it stops at a tile that has an item which was not
/// done, or failed. `report` may be null.
KVARN_C_API KVARN_C_CHECKED kvarn_status kvarn_finish_seal(kvarn_pool* pool, size_t items,
                                                           kvarn_seal_report* report) KVARN_C_NOEXCEPT;
/// Takes a sequence's tiles out of the queue, closed or not; says how many. No item may run meanwhile.
KVARN_C_API size_t kvarn_cancel_seal(kvarn_pool* pool, kvarn_sequence sequence) KVARN_C_NOEXCEPT;

/// The basis of every head by its data: moments of the queries of all heads, zero at first, as
/// kvarn_add_query_moments counts them.
KVARN_C_API size_t kvarn_pool_moment_count(const kvarn_pool* pool) KVARN_C_NOEXCEPT;
/// Adds a layer's queries, [tokens][query heads][at least head_dim_k channels] in the original basis. Different
/// layers may be added at the same time. Errors: KVARN_BAD_ARGUMENT (no such layer), KVARN_SHAPE_MISMATCH,
/// KVARN_NULL_POINTER, KVARN_BUFFER_TOO_SMALL (moments).
KVARN_C_API KVARN_C_CHECKED kvarn_status kvarn_pool_add_query_moments(const kvarn_pool* pool, size_t layer,
                                                                      const kvarn_view* q, uint64_t* moments,
                                                                      size_t count) KVARN_C_NOEXCEPT;
/// Sets the bases of all heads by the first ready tile of a sequence, before the first record; `changed` says of how
/// many and may be null. `options` (null: the defaults) must not ask for bits. Errors: KVARN_STALE_HANDLE,
/// KVARN_BAD_ARGUMENT (no tile is ready, there are records already, tokens are stored in a rotated basis, options),
/// KVARN_BUFFER_TOO_SMALL.
KVARN_C_API KVARN_C_CHECKED kvarn_status kvarn_pool_choose_bases(kvarn_pool* pool, kvarn_sequence sequence,
                                                                 const uint64_t* moments, size_t count,
                                                                 const kvarn_choose_options* options, void* scratch,
                                                                 size_t scratch_bytes,
                                                                 size_t* changed) KVARN_C_NOEXCEPT;
KVARN_C_API size_t kvarn_choose_bases_scratch_bytes(const kvarn_format* format) KVARN_C_NOEXCEPT;

// --- attention of a layer over sequences ---------------------------------------------------------------------------

/// One sequence in one layer for one step.
typedef struct kvarn_step {
    size_t size;
    kvarn_sequence sequence;
    kvarn_view k, v;     ///< its drafts from `first_draft` on, [tokens][KV heads][channels]; without data: stored already
    size_t first_draft;
    kvarn_view q;        ///< [m][query heads][key channels]: the newest m positions, drafts included; m = 0: stores only
    kvarn_view out;      ///< [m][query heads][channels of V]
    float* log_sum_exp;         ///< [KV heads][m][query heads of each]; may be null
    const float* sink_logits;   ///< [query heads]; may be null
    const float* alibi_slopes;  ///< [query heads], as kvarn_attention_task has them; may be null
    const uint64_t* mask;       ///< [m][mask_stride] words, as kvarn_attention_task has them; may be null
    size_t mask_stride;
    size_t mask_tokens;  ///< newest positions that the mask speaks of
} kvarn_step;
#define KVARN_STEP_INIT                                                                                              \
    {sizeof(kvarn_step), {0, 0}, KVARN_VIEW_INIT, KVARN_VIEW_INIT, 0, KVARN_VIEW_INIT, KVARN_VIEW_INIT, NULL, NULL, \
     NULL, NULL, 0, 0}

/// How a layer attends, and how its work is cut into items.
typedef struct kvarn_layer_options {
    size_t size;
    const kvarn_attention_options* attention;  ///< null: the defaults
    size_t threads;          ///< 1; that will run the items: from four tasks a thread on, histories are not split
    size_t rows_per_task;    ///< 32; most query rows of a task (tokens x query heads of a KV head); one token at least
    size_t chunks_per_item;  ///< 4; of 1024 tokens, where a history is split
} kvarn_layer_options;
#define KVARN_LAYER_OPTIONS_INIT {sizeof(kvarn_layer_options), NULL, 1, 32, 4}

/// The work of one layer: items in three phases that any thread pool can run, with a barrier after each: store,
/// attend, finish. Outputs are the same bits for any number of threads and any option but those of attention.
typedef struct kvarn_layer kvarn_layer;

/// Bytes of memory for kvarn_layer_plan, at any alignment, for these steps; 0 for arguments that make no sense.
/// `options` null: the defaults.
KVARN_C_API size_t kvarn_layer_bytes(const kvarn_pool* pool, const kvarn_step* steps, size_t count,
                                     const kvarn_layer_options* options) KVARN_C_NOEXCEPT;
/// Bytes that are enough for any `steps` sequences of up to `rows` query rows a KV head (m x its query heads,
/// `group_heads`); SIZE_MAX if the number does not fit.
KVARN_C_API size_t kvarn_layer_bound(const kvarn_cache_config* config, size_t steps, size_t rows, size_t group_heads,
                                     const kvarn_layer_options* options) KVARN_C_NOEXCEPT;
/// Plans one layer of a step in `memory`, which keeps all it needs of `steps`, but not what those point to. Until its
/// items are done the sequences stay as they are (reserve before). A sequence comes once. Errors, and `failed`, if
/// not null, is set to the step that has it: KVARN_STALE_HANDLE, KVARN_SHAPE_MISMATCH (of k, v, q, out with the
/// formats and each other; query heads that are no multiple of KV heads; more queries than tokens),
/// KVARN_NULL_POINTER, KVARN_BAD_ARGUMENT (no such layer; options; more query heads than 1024 times the KV heads),
/// KVARN_BUFFER_TOO_SMALL. Values are looked at by the items.
KVARN_C_API KVARN_C_CHECKED kvarn_status kvarn_layer_plan(const kvarn_pool* pool, size_t layer,
                                                          const kvarn_step* steps, size_t count,
                                                          const kvarn_layer_options* options, void* memory,
                                                          size_t bytes, kvarn_layer** items,
                                                          size_t* failed) KVARN_C_NOEXCEPT;

/// Items of each phase.
KVARN_C_API size_t kvarn_store_items(const kvarn_layer* layer) KVARN_C_NOEXCEPT;
KVARN_C_API size_t kvarn_attend_items(const kvarn_layer* layer) KVARN_C_NOEXCEPT;
KVARN_C_API size_t kvarn_finish_items(const kvarn_layer* layer) KVARN_C_NOEXCEPT;
/// Item `item` of a phase; all of a phase may run at the same time, each phase after the one before. Scratch, of each
/// thread: kvarn_cache_scratch_bytes. Errors: those of kvarn_store and kvarn_attend; KVARN_BAD_ARGUMENT (no such
/// item, drafts that are not stored). An item that fails writes nothing, and the others may go on.
KVARN_C_API KVARN_C_CHECKED kvarn_status kvarn_layer_store(const kvarn_layer* layer, size_t item) KVARN_C_NOEXCEPT;
KVARN_C_API KVARN_C_CHECKED kvarn_status kvarn_layer_attend(const kvarn_layer* layer, size_t item, void* scratch,
                                                            size_t scratch_bytes) KVARN_C_NOEXCEPT;
KVARN_C_API KVARN_C_CHECKED kvarn_status kvarn_layer_finish(const kvarn_layer* layer, size_t item, void* scratch,
                                                            size_t scratch_bytes) KVARN_C_NOEXCEPT;
/// All phases in this thread.
KVARN_C_API KVARN_C_CHECKED kvarn_status kvarn_layer_run(const kvarn_layer* layer, void* scratch,
                                                         size_t scratch_bytes) KVARN_C_NOEXCEPT;
/// Which of the steps an item belongs to; SIZE_MAX for one that is not there.
KVARN_C_API size_t kvarn_step_of_store(const kvarn_layer* layer, size_t item) KVARN_C_NOEXCEPT;
KVARN_C_API size_t kvarn_step_of_attend(const kvarn_layer* layer, size_t item) KVARN_C_NOEXCEPT;
KVARN_C_API size_t kvarn_step_of_finish(const kvarn_layer* layer, size_t item) KVARN_C_NOEXCEPT;

// --- other positions -----------------------------------------------------------------------------------------------

/// Turns keys, dense [tokens][channels], of one layer and KV head, of consecutive positions from `position` on, in
/// place, to where they go, in the basis of the configuration: the engine's rotary embedding. Must not throw, jump
/// out, or use the sequence.
typedef void (*kvarn_turn)(void* user, size_t layer, size_t head, float* keys, size_t tokens, size_t channels, int64_t position);

/// What kvarn_shift_positions did.
typedef struct kvarn_shift_report {
    size_t size;
    size_t tokens;          ///< that moved
    size_t sealed_tokens;   ///< of those, in records: encoded again
    double relative_error;  ///< that their new encoding adds to keys, all heads: |decoded - turned| / |turned|
} kvarn_shift_report;
#define KVARN_SHIFT_REPORT_INIT {sizeof(kvarn_shift_report), 0, 0, 0.0}

/// Moves the tokens at positions [begin, end) by `by`, which leaves their order as it is ("context shift"). Keys of
/// sealed tiles are decoded, turned and encoded again, which costs accuracy each time: kvarn_erase and positions with
/// gaps cost none. It takes a free sequence slot, a free block for each block with tokens in the range, and one exact
/// block. `report` may be null. Errors, nothing changes: KVARN_STALE_HANDLE, KVARN_BAD_ARGUMENT (end < begin, drafts,
/// positions that would overlap others or leave [first position, 2^60]), KVARN_NO_ROOM, KVARN_SEQUENCE_FULL
/// (most_spans), KVARN_BUFFER_TOO_SMALL, KVARN_SCALE_OVERFLOW (turned keys that no record can hold).
KVARN_C_API KVARN_C_CHECKED kvarn_status kvarn_shift_positions(kvarn_pool* pool, kvarn_sequence sequence,
                                                               int64_t begin, int64_t end, int64_t by,
                                                               kvarn_turn turn, void* user, void* scratch,
                                                               size_t scratch_bytes,
                                                               kvarn_shift_report* report) KVARN_C_NOEXCEPT;
KVARN_C_API size_t kvarn_shift_scratch_bytes(const kvarn_format* format) KVARN_C_NOEXCEPT;

// --- saving and loading --------------------------------------------------------------------------------------------

/// Writes `bytes` bytes, all of them: KVARN_OK, or why not (KVARN_IO_ERROR, or another status, which kvarn_save then
/// returns). Must not throw or jump out.
typedef kvarn_status (*kvarn_write)(void* user, const void* data, size_t bytes);
/// Reads up to `bytes` bytes, and says how many: 0 where the stream has ended, KVARN_READ_FAILED where it could not
/// be read.
typedef size_t (*kvarn_read_some)(void* user, void* data, size_t bytes);
#define KVARN_READ_FAILED SIZE_MAX

/// Writes the layers [first_layer, first_layer + layer_count) of a sequence, clipped to what there is (0, SIZE_MAX:
/// all), through `write`, without seeking. The sequence does not change. Errors: KVARN_STALE_HANDLE,
/// KVARN_BAD_ARGUMENT (drafts: commit or truncate first; no such layers), or what `write` says.
KVARN_C_API KVARN_C_CHECKED kvarn_status kvarn_save(const kvarn_pool* pool, kvarn_sequence sequence,
                                                    size_t first_layer, size_t layer_count, kvarn_write write,
                                                    void* user) KVARN_C_NOEXCEPT;
/// The size of that file; 0 where it cannot be saved.
KVARN_C_API uint64_t kvarn_saved_bytes(const kvarn_pool* pool, kvarn_sequence sequence, size_t first_layer,
                                       size_t layer_count) KVARN_C_NOEXCEPT;
/// The same into a buffer of kvarn_saved_bytes. Error besides: KVARN_BUFFER_TOO_SMALL, and what the buffer holds is
/// no file.
KVARN_C_API KVARN_C_CHECKED kvarn_status kvarn_save_to(const kvarn_pool* pool, kvarn_sequence sequence,
                                                       size_t first_layer, size_t layer_count, void* buffer,
                                                       size_t bytes) KVARN_C_NOEXCEPT;

/// Makes a sequence from a file of all layers. It exists when all of the file has been read and verified, and
/// otherwise nothing of it is left. All of its blocks are its own, whatever the one that was saved shared. `whole` not 0: nothing may follow the file. `differs`, if not null, is set to the
/// field of the configuration that does not fit, static storage, or null. Errors: KVARN_OTHER_CONFIGURATION,
/// KVARN_NO_ROOM, KVARN_SEQUENCE_FULL, KVARN_CORRUPT, KVARN_TRUNCATED, KVARN_UNSUPPORTED_VERSION, KVARN_IO_ERROR. The
/// checksums find damage, not malice.
KVARN_C_API KVARN_C_CHECKED kvarn_status kvarn_load(kvarn_pool* pool, kvarn_read_some read, void* user, int32_t whole,
                                                    kvarn_sequence* sequence, const char** differs) KVARN_C_NOEXCEPT;
/// The same from a buffer, which holds the file and nothing behind it.
KVARN_C_API KVARN_C_CHECKED kvarn_status kvarn_load_from(kvarn_pool* pool, const void* buffer, size_t bytes,
                                                         kvarn_sequence* sequence,
                                                         const char** differs) KVARN_C_NOEXCEPT;

/// Loads a sequence from several files, each with the layers behind those of the one before.
typedef struct kvarn_loader kvarn_loader;
KVARN_C_API size_t kvarn_loader_bytes(void) KVARN_C_NOEXCEPT;
/// `memory`: kvarn_loader_bytes at any alignment, until kvarn_loader_end.
KVARN_C_API KVARN_C_CHECKED kvarn_status kvarn_loader_make(kvarn_pool* pool, void* memory, size_t bytes,
                                                           kvarn_loader** loader) KVARN_C_NOEXCEPT;
/// The next file. After an error all is given back, and the loader is as new. Errors as for kvarn_load;
/// KVARN_BAD_ARGUMENT: other layers were to come, or another sequence.
KVARN_C_API KVARN_C_CHECKED kvarn_status kvarn_loader_part(kvarn_loader* loader, kvarn_read_some read, void* user,
                                                           int32_t whole, const char** differs) KVARN_C_NOEXCEPT;
/// Layers that are there.
KVARN_C_API size_t kvarn_loader_layers(const kvarn_loader* loader) KVARN_C_NOEXCEPT;
/// The sequence, when all layers are there; otherwise KVARN_BAD_ARGUMENT, and nothing changes. The loader is as new.
KVARN_C_API KVARN_C_CHECKED kvarn_status kvarn_loader_finish(kvarn_loader* loader,
                                                             kvarn_sequence* sequence) KVARN_C_NOEXCEPT;
/// Gives back what is not finished, and ends the loader; null is fine.
KVARN_C_API void kvarn_loader_end(kvarn_loader* loader) KVARN_C_NOEXCEPT;

#if defined(__cplusplus)
}
#endif

#endif  // KVARN_C_KVARN_H
