/* plan.h: where every byte of a model lies: weights, KV blocks, step inputs and outputs, activations, in one arena.
 *
 * The planner is pure: it knows no device and allocates no arena. Activations come from the graph as buffers with
 * lifetimes; lla_plan_make() places everything and lla_plan_render() shows it. Offsets and sizes are bytes from the
 * arena's base; every region starts on a multiple of LLA_ALIGN. */
#ifndef LLA_PLAN_H
#define LLA_PLAN_H

#include "safetensors.h"
#include "spec.h"

#include <stdio.h>

enum { LLA_ALIGN = 256, LLA_MAX_PARTS = 3, LLA_NAME = 80, LLA_WEIGHT_TILE = 16 };

/* What bounds the memory of an engine; all in tokens, sequences or rows. Every field is positive once resolved. */
struct lla_limits {
    llaisysDeviceType_t device; /* where the arena lies: on NVIDIA, matrices are padded to tiles of LLA_WEIGHT_TILE */
    size_t max_seq;             /* tokens of one sequence, prompt and answer together */
    size_t max_seqs;            /* sequences that can be in flight at once */
    size_t kv_tokens;           /* tokens held by the KV cache over all sequences, rounded up to blocks */
    size_t kv_block;            /* tokens of one KV block, a power of two */
    size_t prefill_chunk;       /* rows of the largest step */
};

/* Tensor parallelism: this arena is for rank `rank` of `degree`. */
struct lla_shard {
    size_t rank, degree;
};

/* One source tensor of a weight: rows [row0, row0 + rows) and columns [col0, col0 + cols) of a checkpoint tensor of
 * shape [full_rows, full_cols] (full_cols 1 and ndim 1 for vectors) go to rows dst_row .. of the weight. */
struct lla_weight_part {
    char name[LLA_NAME];
    size_t ndim, full_rows, full_cols;
    size_t row0, rows, col0, cols;
    size_t dst_row;
};

enum lla_weight_kind {
    LLA_W_EMBED,     /* [vocab, hidden] on every rank */
    LLA_W_ATTN_NORM, /* [hidden] */
    LLA_W_QKV,       /* [(nhead + 2 nkvhead) head_dim, hidden]: q rows, k rows, v rows */
    LLA_W_QKV_BIAS,  /* [(nhead + 2 nkvhead) head_dim] */
    LLA_W_O,         /* [hidden, nhead head_dim] */
    LLA_W_MLP_NORM,  /* [hidden] */
    LLA_W_GATE_UP,   /* [2 ffn, hidden]: gate rows, up rows */
    LLA_W_DOWN,      /* [hidden, ffn] */
    LLA_W_NORM,      /* [hidden] */
    LLA_W_HEAD,      /* [vocab, hidden]; shares the embedding's bytes where they are tied */
    LLA_W_KINDS
};

struct lla_weight {
    enum lla_weight_kind kind;
    size_t layer;      /* 0 for weights outside the layers */
    size_t rows, cols; /* of this rank's share; cols 1 for vectors */
    size_t offset, nbytes;
    struct lla_weight_part parts[LLA_MAX_PARTS];
    size_t nparts;
};

enum lla_region_kind {
    LLA_R_WEIGHT,
    LLA_R_TABLE, /* constants made at plan time, such as RoPE's */
    LLA_R_KV,
    LLA_R_STEP, /* step inputs and outputs */
    LLA_R_ACTIVATION
};

/* A named piece of the arena. `shape` is text for people, such as "[512, 1536] bf16". Nodes count from 0; a region that
 * lives over the whole step has first 0 and last nnode - 1. Activations whose lifetimes do not meet may share bytes. */
struct lla_region {
    char name[LLA_NAME];
    char shape[LLA_NAME];
    enum lla_region_kind kind;
    size_t offset, nbytes;
    size_t first, last; /* first node that writes it, last that reads it, inclusive */
};

struct lla_plan {
    struct lla_spec spec;     /* of the whole model */
    struct lla_limits limits; /* resolved */
    struct lla_shard shard;
    /* this rank's share */
    size_t nhead, nkvhead, ffn, vocab, vocab0; /* vocab0: first vocabulary row of the rank's lm_head */
    size_t kvhead0;                            /* first KV head of the rank */
    size_t max_blocks;                         /* KV blocks of one sequence */
    size_t nblock;              /* KV blocks in the arena, with block 0, the dummy that padding rows write to */
    size_t max_rows;            /* rows of the largest step */
    struct lla_weight *weights; /* embed, layers in order, norm, head */
    size_t nweight;
    struct lla_region *regions; /* weights (one region a kind and layer), then the graph's buffers; activations
                                                 last, in the graph's order: their offsets follow lifetimes */
    size_t nregion;
    size_t nnode;                  /* nodes of the largest step program, the repeated ones once */
    const char *const *node_names; /* [nnode], borrowed; NULL where nodes have no names */
    size_t repeat_first, repeat_last,
        repeat; /* nodes repeat_first .. repeat_last run `repeat` times, once a layer; 0 and 1: no repeats */
    size_t weight_bytes, kv_bytes, activation_bytes; /* activation_bytes: with lifetimes overlaid */
    size_t activation_sum;                           /* without overlaying them */
    size_t total;                                    /* bytes of the arena */
};

/* Dimensions of one rank; refuses a degree that the heads, the FFN or the vocabulary do not allow. KV heads are
 * replicated where ranks outnumber them. */
lla_status lla_plan_shard(const struct lla_spec *spec, struct lla_shard shard, struct lla_plan *plan);

/* From the plan's limits: max_blocks, nblock, max_rows. */
void lla_plan_blocks(struct lla_plan *plan);

/* Fills zero fields of limits with defaults and checks them against the spec. */
lla_status lla_limits_resolve(const struct lla_spec *spec, struct lla_limits *limits);

/* A buffer of the step as the graph declares it: extra regions with lifetimes, placed by the planner. */
struct lla_buffer {
    const char *name;
    char shape[LLA_NAME];
    enum lla_region_kind kind;
    size_t nbytes;
    size_t first, last; /* nodes; used for LLA_R_ACTIVATION only */
    size_t offset;      /* out */
};

/* Gives each buffer an offset from 0 so that buffers whose lifetimes meet do not overlap (greedy by size, lowest gap
 * that fits, after Pisarchyk and Lee, "Efficient Memory Management for Deep Neural Net Inference", 2020); *total is the
 * bytes needed. */
lla_status lla_layout(struct lla_buffer *buffers, size_t count, size_t *total);

/* Places weights and the graph's buffers in one arena. `nnode` is the length of the step's program. On success the
 * caller frees the plan with lla_plan_free; buffers[i].offset then are arena offsets. */
lla_status lla_plan_make(const struct lla_spec *spec, const struct lla_limits *limits, struct lla_shard shard,
                         struct lla_buffer *buffers, size_t nbuffer, size_t nnode, struct lla_plan *plan);
void lla_plan_free(struct lla_plan *plan);

/* Refuses a plan larger than `available` bytes, saying what is needed and which limit to lower. */
lla_status lla_plan_fit(const struct lla_plan *plan, size_t available);

/* The weight of a kind and layer. */
const struct lla_weight *lla_plan_weight(const struct lla_plan *plan, enum lla_weight_kind kind, size_t layer);

enum lla_plan_format { LLA_PLAN_TEXT, LLA_PLAN_JSON, LLA_PLAN_SVG };

/* Writes the plan: a table, JSON, or a picture (the arena's map and the buffers' lifetimes over the step). */
lla_status lla_plan_render(const struct lla_plan *plan, enum lla_plan_format format, FILE *out);

#endif
