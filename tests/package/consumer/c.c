// SPDX-License-Identifier: Apache-2.0
// A record from C, through a library that this project has made.
#include <kvarn/c/kvarn.h>

#include <stdio.h>
#include <stdlib.h>

int main(void)
{
    static float k[64 * 64], back[64 * 64];
    for (int i = 0; i < 64 * 64; ++i) k[i] = (float)(i * 7919 % 1009) / 504.0f - 1.0f;
    kvarn_format format = KVARN_FORMAT_INIT;
    if (kvarn_format_parse("k4v4_g64", 64, 64, &format) != KVARN_OK) return 1;
    const size_t bytes = kvarn_record_bytes(&format, 0), scratch_bytes = kvarn_scratch_bytes(&format);
    void *const record = malloc(bytes), *const scratch = malloc(scratch_bytes);
    const kvarn_records records = kvarn_tile_major_records(&format, record, bytes, 1, 1, 0);
    const kvarn_view keys = kvarn_token_major(k, KVARN_F32, 64, 1, 64), again = kvarn_token_major(back, KVARN_F32, 64, 1, 64);
    kvarn_status said = kvarn_quantize(&format, &keys, &keys, &records, NULL, scratch, scratch_bytes);
    if (said == KVARN_OK) said = kvarn_dequantize(&format, &records, &again, NULL, KVARN_BASIS_ORIGINAL, scratch, scratch_bytes);
    float error = 0, all = 0;
    for (int i = 0; i < 64 * 64; ++i) {
        error += (back[i] - k[i]) * (back[i] - k[i]);
        all += k[i] * k[i];
    }
    printf("%s, version %s: %s\n", kvarn_active_arch(), kvarn_version(), kvarn_message(said));
    free(record), free(scratch);
    kvarn_sequence none;
    const int refused = kvarn_has_files() == 0 && kvarn_load_from(NULL, k, 1, &none, NULL) == KVARN_UNSUPPORTED_VERSION;
    return said == KVARN_OK && error < 0.02f * all && refused ? 0 : 1;
}
