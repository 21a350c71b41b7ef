/* program.h: the model's step as a list of fused nodes over arena offsets, and its replay on the CPU.
 *
 * lla_graph_make() declares the step's buffers, lets the planner place them, and fixes every offset;
 * lla_program_build() then writes the list for one bucket. A program is plain data: it can be printed, compared, and
 * run by any executor over any arena of the plan's size. */
#ifndef LLA_PROGRAM_H
#define LLA_PROGRAM_H

#include "../kernels/kernels.h"
#include "../planner/plan.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Buffers of the step. Weights are not among them: nodes name those by offset. What the host writes for a step lies
 * from the header on in this order, and what it reads behind that. */
enum lla_buf {
    LLA_B_HEADER,
    LLA_B_TOKENS,
    LLA_B_POSITIONS,
    LLA_B_ROW_SEQ,
    LLA_B_BLOCK_TABLE,
    LLA_B_LOGIT_ROWS,
    LLA_B_SAMPLING,
    LLA_B_BIAS,
    LLA_B_MASK,
    LLA_B_NEXT,
    LLA_B_ODDS,
    LLA_B_TWIN,
    LLA_B_ARRIVED,
    LLA_B_BEST,
    LLA_B_ROPE,
    LLA_B_KV_TOKENS,
    LLA_B_K_CACHE,
    LLA_B_V_CACHE,
    LLA_B_X,
    LLA_B_SQUARES,
    LLA_B_ATTN_NORMED,
    LLA_B_QKV,
    LLA_B_Q,
    LLA_B_PARTIAL,
    LLA_B_ATTN_OUT,
    LLA_B_MLP_NORMED,
    LLA_B_ACT,
    LLA_B_HEAD_NORMED,
    LLA_B_LOGITS,
    LLA_B_CANDIDATES,
    LLA_B_COUNT
};

struct lla_node {
    enum lla_op op;
    size_t layer;           /* for people; 0 outside the layers */
    const char *name;       /* "qkv", "o", "down", ... */
    uint32_t reads, writes; /* bit sets of enum lla_buf */
    union {
#define X(NAME, suffix) struct lla_##suffix##_args suffix;
        LLA_NODE_OPS(X)
#undef X
    };
};

/* One rank's plan with everything that its programs share. */
struct lla_graph {
    struct lla_plan plan;
    struct lla_dims dims;
    struct lla_io io;
    size_t offset[LLA_B_COUNT]; /* bytes from the arena's base */
    size_t kv_layer_stride;     /* bytes from one layer's K (or V) blocks to the next layer's */
    size_t twin;                /* bytes from a step's inputs and results to those of every other step, on a GPU: the
                                   next step's come while a step runs, and its results leave while the next one does */
};

/* The program of one bucket: for steps of at most `rows` rows and `logits` logit rows. */
struct lla_program {
    const struct lla_graph *graph;
    size_t rows, logits;
    struct lla_node *nodes;
    size_t nnode;
};

/* Plans an arena for one rank. The caller frees the graph with lla_graph_free. */
lla_status lla_graph_make(const struct lla_spec *spec, const struct lla_limits *limits, struct lla_shard shard,
                          struct lla_graph *graph);
void lla_graph_free(struct lla_graph *graph);

/* Writes into an arena what the plan fixes: the RoPE table, and a block table that sends every slot to the dummy block.
 */
void lla_graph_init_arena(const struct lla_graph *graph, char *arena);

lla_status lla_program_build(const struct lla_graph *graph, size_t rows, size_t logits, struct lla_program *program);
void lla_program_free(struct lla_program *program);

/* One line a node: index, op, layer, what it reads and writes. */
void lla_program_print(const struct lla_program *program, FILE *out);

/* Runs nodes [first, last) over the arena with all threads of the crew. */
void lla_exec_cpu(const struct lla_program *program, char *arena, struct lla_crew *crew, size_t first, size_t last);

#ifdef __cplusplus
}
#endif

#endif
