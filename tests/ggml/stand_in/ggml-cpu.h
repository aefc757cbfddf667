/* SPDX-License-Identifier: Apache-2.0 */
#ifndef KVARN_TESTS_STAND_IN_GGML_CPU_H
#define KVARN_TESTS_STAND_IN_GGML_CPU_H

#include "ggml.h"

#ifdef __cplusplus
extern "C" {
#endif

enum ggml_status ggml_graph_compute_with_ctx(struct ggml_context* ctx, struct ggml_cgraph* graph, int n_threads);

#ifdef __cplusplus
}
#endif

#endif
