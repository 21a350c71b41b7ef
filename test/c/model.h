/* model.h: small random models for tests. */
#ifndef LLA_TEST_MODEL_H
#define LLA_TEST_MODEL_H

#include "../../graph/program.h"
#include "random.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

/* The region of a buffer: the one at its offset that has its name. */
static inline const struct lla_region *region_of(const struct lla_graph *graph, int id) {
    static const char *const names[LLA_B_COUNT] = {[LLA_B_HEADER] = "header",
                                                   [LLA_B_TOKENS] = "tokens",
                                                   [LLA_B_POSITIONS] = "positions",
                                                   [LLA_B_ROW_SEQ] = "row_seq",
                                                   [LLA_B_BLOCK_TABLE] = "block_table",
                                                   [LLA_B_LOGIT_ROWS] = "logit_rows",
                                                   [LLA_B_SAMPLING] = "sampling",
                                                   [LLA_B_BIAS] = "bias",
                                                   [LLA_B_MASK] = "mask",
                                                   [LLA_B_NEXT] = "next",
                                                   [LLA_B_ODDS] = "odds",
                                                   [LLA_B_TWIN] = "twin",
                                                   [LLA_B_ARRIVED] = "arrived",
                                                   [LLA_B_BEST] = "best",
                                                   [LLA_B_ROPE] = "rope",
                                                   [LLA_B_KV_TOKENS] = "kv_tokens",
                                                   [LLA_B_K_CACHE] = "k_cache",
                                                   [LLA_B_V_CACHE] = "v_cache",
                                                   [LLA_B_X] = "x",
                                                   [LLA_B_SQUARES] = "squares",
                                                   [LLA_B_ATTN_NORMED] = "attn_normed",
                                                   [LLA_B_QKV] = "qkv",
                                                   [LLA_B_Q] = "q",
                                                   [LLA_B_PARTIAL] = "partial",
                                                   [LLA_B_ATTN_OUT] = "attn_out",
                                                   [LLA_B_MLP_NORMED] = "mlp_normed",
                                                   [LLA_B_ACT] = "act",
                                                   [LLA_B_HEAD_NORMED] = "head_normed",
                                                   [LLA_B_LOGITS] = "logits",
                                                   [LLA_B_CANDIDATES] = "candidates"};
    for (size_t i = 0; i < graph->plan.nregion; i++)
        if (graph->plan.regions[i].offset == graph->offset[id] && !strcmp(graph->plan.regions[i].name, names[id]))
            return &graph->plan.regions[i];
    fprintf(stderr, "buffer %s has no region\n", names[id]);
    abort();
}

/* Random values of a size that keeps activations near 1, dense [w->rows, w->cols]. */
static inline void random_weight(const struct lla_weight *w, llaisysDataType_t dtype, uint64_t seed, void *dense) {
    struct rng rng = {seed};
    const bool is_norm = w->kind == LLA_W_ATTN_NORM || w->kind == LLA_W_MLP_NORM || w->kind == LLA_W_NORM;
    const float mean = is_norm ? 1.0f : 0.0f;
    const float scale = is_norm                     ? 0.2f
                        : w->kind == LLA_W_QKV_BIAS ? 0.5f
                        : w->kind == LLA_W_EMBED    ? 1.0f
                                                    : 1.5f / sqrtf((float)w->cols);
    for (size_t j = 0; j < w->rows * w->cols; j++) lla_store_float(dense, j, mean + scale * rng_normal(&rng), dtype);
}

/* Straight into an arena of the graph's plan, on the CPU. */
static inline void fill_weights(const struct lla_graph *graph, char *arena, uint64_t seed) {
    const struct lla_plan *plan = &graph->plan;
    for (size_t i = 0; i < plan->nweight; i++) {
        const struct lla_weight *w = &plan->weights[i];
        if (w->kind == LLA_W_HEAD && plan->spec.tied) continue;
        random_weight(w, plan->spec.dtype, seed + i, arena + w->offset);
    }
}

#endif
