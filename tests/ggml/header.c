/* SPDX-License-Identifier: Apache-2.0 */
/* The adapter's header by itself, as C and as older C++. */
#include "kvarn_ggml.h"

int kvarn_ggml_header_is_c(const struct kvarn_ggml_params* p);
int kvarn_ggml_header_is_c(const struct kvarn_ggml_params* p)
{
    static struct kvarn_ggml_part part;
    return p->layers + part.sequence + (int)KVARN_GGML_OK;
}
