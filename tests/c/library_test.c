// SPDX-License-Identifier: Apache-2.0
// The library itself, formats, views, and structs of other sizes than this header's.
#include "check.h"

static void versions_and_messages(void)
{
    CHECK(strlen(kvarn_version()) >= 5);
    CHECK(kvarn_abi() == KVARN_C_ABI);
    CHECK(kvarn_has_files() == 1);
    CHECK(strcmp(kvarn_message(KVARN_OK), "ok") == 0);
    for (int s = KVARN_OK; s <= KVARN_OTHER_CONFIGURATION; ++s)
        for (int t = KVARN_OK; t < s; ++t) CHECK(strcmp(kvarn_message((kvarn_status)s), kvarn_message((kvarn_status)t)) != 0);
    CHECK(strcmp(kvarn_message((kvarn_status)(KVARN_OTHER_CONFIGURATION + 1)), "unknown status") == 0);
    CHECK(strcmp(kvarn_message(KVARN_STATUS_IS_INT), "unknown status") == 0);
}

static void sets(void)
{
    const char* const best = kvarn_active_arch();
    size_t count = 0, seen = 0;
    for (const char* name; (name = kvarn_usable_arch(count)) != NULL; ++count) {
        seen += strcmp(name, best) == 0;
        CHECK_OK(kvarn_select_arch(name));
        CHECK(strcmp(kvarn_active_arch(), name) == 0);
    }
    CHECK(count > 0);
    CHECK(seen == 1);
    CHECK(kvarn_usable_arch(SIZE_MAX) == NULL);
    CHECK_OK(kvarn_select_arch(best));
    CHECK_STATUS(kvarn_select_arch("avx9"), KVARN_BAD_ARGUMENT);
    CHECK_STATUS(kvarn_select_arch(NULL), KVARN_NULL_POINTER);
    CHECK(strcmp(kvarn_active_arch(), best) == 0);
}

static void formats(void)
{
    kvarn_format f = KVARN_FORMAT_INIT;
    CHECK_OK(kvarn_format_make(&f));
    CHECK_OK(kvarn_format_parse("kvarn_k3v4_g64_ko", 96, 128, &f));
    CHECK(f.head_dim_k == 96 && f.head_dim_v == 128 && f.key_bits == 3 && f.value_bits == 4 && f.group == 64 &&
          f.exact_channels == 0);
    CHECK(f.key_rotation == KVARN_ROTATION_NONE && f.value_rotation == KVARN_ROTATION_HADAMARD);
    CHECK_STATUS(kvarn_format_parse("k4v2", 128, 128, &f), KVARN_BAD_FORMAT_NAME);
    CHECK_STATUS(kvarn_format_parse("k7v2_g128", 128, 128, &f), KVARN_UNSUPPORTED_BITS);
    CHECK_STATUS(kvarn_format_parse("k4v2_g100", 128, 128, &f), KVARN_UNSUPPORTED_GROUP);
    CHECK_STATUS(kvarn_format_parse("k4v2_g128", 4000, 128, &f), KVARN_UNSUPPORTED_HEAD_DIM);
    CHECK_STATUS(kvarn_format_parse(NULL, 128, 128, &f), KVARN_NULL_POINTER);
    CHECK_STATUS(kvarn_format_parse("k4v2_g128", 128, 128, NULL), KVARN_NULL_POINTER);
    CHECK(f.head_dim_k == 96 && f.key_bits == 3);  // as before

    // Without a V part its fields are K's.
    kvarn_format latent = KVARN_FORMAT_INIT;
    latent.head_dim_k = 512;
    latent.value_bits = 0;
    latent.exact_channels = 64;
    CHECK_OK(kvarn_format_make(&latent));
    CHECK(latent.head_dim_v == 512);
    latent.exact_channels = 3;
    CHECK_STATUS(kvarn_format_make(&latent), KVARN_UNSUPPORTED_CHANNELS);
    latent.exact_channels = 64;
    latent.key_rotation = 256;  // 0 in eight bits
    CHECK_STATUS(kvarn_format_make(&latent), KVARN_BAD_ARGUMENT);
    latent.key_rotation = -1;
    CHECK_STATUS(kvarn_format_make(&latent), KVARN_BAD_ARGUMENT);
    CHECK(kvarn_record_bytes(&latent, 0) == 0 && kvarn_scratch_bytes(&latent) == 0);

    kvarn_format base = KVARN_FORMAT_INIT, within = KVARN_FORMAT_INIT;
    CHECK_OK(kvarn_format_within(&base, 4.5, &within));
    CHECK(within.key_bits == 4 && within.value_bits == 4);
    CHECK(kvarn_bits_per_element(&within, 0) <= 4.5);
    CHECK_STATUS(kvarn_format_within(&base, 1.0, &within), KVARN_UNSUPPORTED_BITS);

    kvarn_record_layout at = KVARN_RECORD_LAYOUT_INIT;
    CHECK_OK(kvarn_layout_of(&base, &at));
    CHECK(at.k_codes == 0 && at.k_channel_scale == 128 * 128 / 2 && at.v_codes == at.k_token_scale + 256);
    CHECK(at.content_bytes == 128 * 128 / 2 + 128 * 128 / 4 + 6 * 256);
    CHECK(kvarn_record_bytes(&base, 0) == (at.content_bytes + 7) / 8 * 8);
    CHECK(kvarn_record_bytes(&base, 4096) == 16384);
    CHECK(kvarn_record_bytes(&base, 1) == at.content_bytes);
    CHECK(kvarn_record_bytes(&base, SIZE_MAX) == 0);
    CHECK(kvarn_bits_per_element(&base, 4096) == 4.0);
    CHECK(kvarn_call_scratch_bytes(&base, 8) >= kvarn_scratch_bytes(&base) && kvarn_scratch_bytes(&base) > 128 * 128 * 4);
    CHECK(kvarn_call_scratch_bytes(&base, SIZE_MAX) == 0);
    CHECK(kvarn_record_bytes(NULL, 0) == 0 && kvarn_bits_per_element(NULL, 0) == 0.0 && kvarn_choose_scratch_bytes(NULL) == 0);

    kvarn_support support = KVARN_SUPPORT_INIT;
    CHECK_OK(kvarn_supports(&base, KVARN_OPERATION_ATTEND, KVARN_PRECISION_FINE, &support));
    CHECK(strcmp(support.arch, kvarn_active_arch()) == 0 && support.fixed_bounds == 1 &&
          support.key_precision == KVARN_PRECISION_FINE && support.value_precision == KVARN_PRECISION_FINE);
    CHECK_STATUS(kvarn_supports(&base, KVARN_OPERATION_ATTEND, KVARN_PRECISION_FINE, NULL), KVARN_NULL_POINTER);
    CHECK_STATUS(kvarn_supports(&base, 3, KVARN_PRECISION_FINE, &support), KVARN_BAD_ARGUMENT);
    CHECK_STATUS(kvarn_supports(&base, KVARN_OPERATION_SEAL, -1, &support), KVARN_BAD_ARGUMENT);
    CHECK_STATUS(kvarn_layout_of(NULL, &at), KVARN_NULL_POINTER);
}

/// Structs of programs that were compiled with an older, or a newer header.
static void sizes_of_structs(void)
{
    struct {
        kvarn_format known;
        int32_t more[4];
    } newer = {KVARN_FORMAT_INIT, {0, 0, 0, 0}};
    newer.known.size = sizeof newer;
    CHECK_OK(kvarn_format_make(&newer.known));
    CHECK(newer.known.size == sizeof newer);
    CHECK(kvarn_record_bytes(&newer.known, 0) != 0);
    newer.more[3] = 1;  // something that this library does not know
    CHECK_STATUS(kvarn_format_make(&newer.known), KVARN_BAD_ARGUMENT);

    // An older one knew nothing of groups and what follows: what lies there is not looked at, and not written.
    kvarn_format older = KVARN_FORMAT_INIT;
    older.group = older.key_rotation = older.value_rotation = older.exact_channels = 77;
    older.size = offsetof(kvarn_format, group) + 2;  // no struct ends there
    CHECK_STATUS(kvarn_format_make(&older), KVARN_BAD_ARGUMENT);
    older.size = offsetof(kvarn_format, group);
    CHECK_OK(kvarn_format_make(&older));
    CHECK(older.size == offsetof(kvarn_format, group) && older.group == 77 && older.exact_channels == 77);
    kvarn_format whole = KVARN_FORMAT_INIT;
    CHECK(kvarn_record_bytes(&older, 0) == kvarn_record_bytes(&whole, 0));

    // What is filled is filled up to its size, and zero where this library has nothing.
    kvarn_record_layout small_one = KVARN_RECORD_LAYOUT_INIT;
    small_one.size = offsetof(kvarn_record_layout, v_codes);
    small_one.v_codes = 99;
    CHECK_OK(kvarn_layout_of(&whole, &small_one));
    CHECK(small_one.size == offsetof(kvarn_record_layout, v_codes) && small_one.k_token_scale == 128 * 128 / 2 + 512 &&
          small_one.v_codes == 99);
    struct {
        kvarn_record_layout known;
        size_t more[2];
    } large_one = {KVARN_RECORD_LAYOUT_INIT, {5, 5}};
    large_one.known.size = sizeof large_one;
    CHECK_OK(kvarn_layout_of(&whole, &large_one.known));
    CHECK(large_one.more[0] == 0 && large_one.more[1] == 0 && large_one.known.size == sizeof large_one &&
          large_one.known.content_bytes != 0);

    static const size_t nonsense[] = {0, 1, 4, 12, 5000, SIZE_MAX};
    for (size_t i = 0; i < sizeof nonsense / sizeof *nonsense; ++i) {
        if (nonsense[i] == 4 && sizeof(size_t) == 4) continue;
        if (nonsense[i] == 12 && sizeof(size_t) == 4) continue;
        kvarn_format f = KVARN_FORMAT_INIT;
        kvarn_record_layout at = KVARN_RECORD_LAYOUT_INIT;
        f.size = nonsense[i];
        CHECK_STATUS(kvarn_format_make(&f), KVARN_BAD_ARGUMENT);
        CHECK_STATUS(kvarn_format_parse("k4v2_g128", 128, 128, &f), KVARN_BAD_ARGUMENT);
        at.size = nonsense[i];
        CHECK_STATUS(kvarn_layout_of(&whole, &at), KVARN_BAD_ARGUMENT);
    }
}

static void views(void)
{
    float data[2 * 3 * 4];
    const kvarn_view none = KVARN_VIEW_INIT, x = kvarn_token_major(data, KVARN_F32, 2, 3, 4),
                     y = kvarn_head_major(data, KVARN_F32, 2, 3, 4);
    CHECK(x.data == data && x.tokens == 2 && x.heads == 3 && x.channels == 4 && x.token_stride == 12 && x.head_stride == 4 &&
          x.channel_stride == 1);
    CHECK(y.token_stride == 4 && y.head_stride == 8);
    kvarn_view part = kvarn_view_tokens(&x, 1, 7);
    CHECK(part.data == data + 12 && part.tokens == 1);
    part = kvarn_view_tokens(&x, 9, 7);
    CHECK(part.tokens == 0);
    part = kvarn_view_head(&x, 2);
    CHECK(part.data == data + 8 && part.heads == 1);
    part = kvarn_view_head(&x, 3);
    CHECK(part.data == NULL && part.heads == 0);
    part = kvarn_view_tokens(NULL, 0, 1);
    CHECK(part.data == NULL && part.tokens == 0);

    // Conversions: round to nearest even, halves saturate, bits stay between equal types.
    const float values[4] = {1.0f, 100000.0f, -0.333333f, 65519.0f};
    uint16_t halves[4], same[4];
    float back[4];
    const kvarn_view from = kvarn_token_major(values, KVARN_F32, 1, 1, 4), to = kvarn_token_major(halves, KVARN_F16, 1, 1, 4);
    const kvarn_view again = kvarn_token_major(back, KVARN_F32, 1, 1, 4), copy = kvarn_token_major(same, KVARN_F16, 1, 1, 4);
    CHECK_OK(kvarn_convert(&from, &to));
    CHECK(halves[0] == 0x3c00 && halves[1] == 0x7bff && halves[2] == 0xb555 && halves[3] == 0x7bff);
    CHECK_OK(kvarn_convert(&to, &again));
    CHECK(back[1] == 65504.0f && from_half(halves[2]) == back[2]);
    CHECK_OK(kvarn_convert(&to, &copy));
    CHECK(memcmp(same, halves, sizeof same) == 0);
    const kvarn_view bf = kvarn_token_major(halves, KVARN_BF16, 1, 1, 4);
    CHECK_OK(kvarn_convert(&from, &bf));
    CHECK(halves[0] == 0x3f80);
    kvarn_view wrong = from;
    wrong.type = 3;
    CHECK_STATUS(kvarn_convert(&wrong, &to), KVARN_BAD_ARGUMENT);
    wrong = from;
    wrong.reserved = 1;
    CHECK_STATUS(kvarn_convert(&wrong, &to), KVARN_BAD_ARGUMENT);
    CHECK_STATUS(kvarn_convert(&from, &none), KVARN_SHAPE_MISMATCH);
    CHECK_STATUS(kvarn_convert(NULL, &to), KVARN_NULL_POINTER);
    wrong = from;
    wrong.data = NULL;
    CHECK_STATUS(kvarn_convert(&wrong, &to), KVARN_NULL_POINTER);
}

float from_half(uint16_t bits)
{
    const int exponent = bits >> 10 & 31;
    float x = (float)(bits & 1023) / 1024.0f + (exponent != 0 ? 1.0f : 0.0f);
    for (int e = exponent != 0 ? exponent : 1; e < 15; ++e) x /= 2.0f;
    for (int e = 15; e < exponent; ++e) x *= 2.0f;
    return bits & 0x8000 ? -x : x;
}

void test_library(void)
{
    versions_and_messages();
    sets();
    formats();
    sizes_of_structs();
    views();
}
