// SPDX-License-Identifier: Apache-2.0
// examples/ggml/README.md, with the declarations of ggml that tests/ggml has.
// flags: -I examples/ggml -I tests/ggml/stand_in
#include <stdio.h>

#include "kvarn_ggml.h"

typedef struct ggml_backend* ggml_backend_t;
int ggml_backend_graph_compute(ggml_backend_t backend, struct ggml_cgraph* graph);

void step(kvarn_ggml_cache* cache, ggml_backend_t cpu, struct ggml_cgraph* graph);
void step(kvarn_ggml_cache* cache, ggml_backend_t cpu, struct ggml_cgraph* graph)
{
    // snippet: step
}
