/* build.c: the Qwen2 layer, in order; the buffers that it needs; and where they lie. */
#include "program.h"

#include <stdlib.h>

#define BIT(buffer) (1u << LLA_B_##buffer)

_Static_assert(LLA_B_COUNT <= 32, "bit sets of buffers are 32 bits wide");

/* ---- buffers ---- */

/* In the order of enum lla_buf. */
static const char *const buffer_names[LLA_B_COUNT] = {
    "header",   "tokens",     "positions", "row_seq",     "block_table", "logit_rows", "sampling", "bias",
    "mask",     "next",       "odds",      "twin",        "arrived",     "best",       "rope",     "kv_tokens",
    "k_cache",  "v_cache",    "x",         "squares",     "attn_normed", "qkv",        "q",        "partial",
    "attn_out", "mlp_normed", "act",       "head_normed", "logits",      "candidates"};

struct builder {
    const struct lla_graph *graph;
    struct lla_node *nodes; /* NULL: only count */
    size_t nnode;
};

static struct lla_buffer *declare(struct lla_buffer *buffers, enum lla_buf id, enum lla_region_kind kind, size_t rows,
                                  size_t cols, size_t element, const char *type) {
    struct lla_buffer *b = &buffers[id];
    *b = (struct lla_buffer){.name = buffer_names[id], .kind = kind, .nbytes = rows * cols * element};
    if (cols == 1)
        snprintf(b->shape, sizeof b->shape, "[%zu] %s", rows, type);
    else
        snprintf(b->shape, sizeof b->shape, "[%zu, %zu] %s", rows, cols, type);
    return b;
}

/* Every buffer with its shape. Rows are those of the largest step; all buckets share them. */
static void declare_all(const struct lla_plan *p, const struct lla_dims *d, struct lla_buffer *b) {
    const char *type = lla_dtype_name(d->dtype);
    const size_t e = lla_dtype_size(d->dtype), rows = d->max_rows, seqs = d->max_seqs, layers = p->spec.nlayer;
    const size_t q = d->nhead * d->head_dim, kv = d->nkvhead * d->head_dim;

    declare(b, LLA_B_HEADER, LLA_R_STEP, 1, 1, sizeof(struct lla_step_header), "header");
    declare(b, LLA_B_TOKENS, LLA_R_STEP, rows, 1, 4, "i32");
    declare(b, LLA_B_POSITIONS, LLA_R_STEP, rows, 1, 4, "i32");
    declare(b, LLA_B_ROW_SEQ, LLA_R_STEP, rows, 1, 4, "i32");
    declare(b, LLA_B_BLOCK_TABLE, LLA_R_STEP, seqs, d->max_blocks, 4, "i32");
    declare(b, LLA_B_LOGIT_ROWS, LLA_R_STEP, seqs, 1, 4, "i32");
    declare(b, LLA_B_SAMPLING, LLA_R_STEP, seqs, 1, sizeof(struct lla_sampling_row), "sampling");
    const bool is_cpu = p->limits.device == LLAISYS_DEVICE_CPU; /* which draws from the host's own memory */
    declare(b, LLA_B_BIAS, LLA_R_STEP, is_cpu ? 1 : seqs, is_cpu ? 1 : LLA_MAX_BIAS, sizeof(struct lla_bias), "bias");
    declare(b, LLA_B_MASK, LLA_R_STEP, is_cpu ? 1 : seqs, is_cpu ? 1 : (d->vocab + 31) / 32, 4, "u32");
    declare(b, LLA_B_NEXT, LLA_R_STEP, seqs, 1, 4, "i32");
    declare(b, LLA_B_ODDS, LLA_R_STEP, is_cpu ? 1 : seqs, 1, sizeof(struct lla_odds), "odds");
    size_t twin = 0;
    for (int id = LLA_B_HEADER; id <= LLA_B_ODDS; id++) twin += (b[id].nbytes + LLA_ALIGN - 1) / LLA_ALIGN * LLA_ALIGN;
    declare(b, LLA_B_TWIN, LLA_R_STEP, 1, 1, is_cpu ? 1 : twin, "header to odds again");
    declare(b, LLA_B_ARRIVED, LLA_R_STEP, rows, d->nkvhead, 4, "i32");
    declare(b, LLA_B_BEST, LLA_R_STEP, is_cpu ? 1 : seqs, 1, 8, "u64");
    declare(b, LLA_B_ROPE, LLA_R_TABLE, p->limits.max_seq, d->head_dim, e, type);

    declare(b, LLA_B_KV_TOKENS, LLA_R_KV, p->nblock, d->kv_block, 4, "i32");
    for (int i = 0; i < 2; i++) {
        struct lla_buffer *c = declare(b, LLA_B_K_CACHE + i, LLA_R_KV, layers * p->nblock * d->kv_block, kv, e, type);
        snprintf(c->shape, sizeof c->shape, "[%zu, %zu, %zu, %zu, %zu] %s", layers, p->nblock, d->nkvhead, d->kv_block,
                 d->head_dim, type);
    }

    declare(b, LLA_B_X, LLA_R_ACTIVATION, rows, d->hidden, e, type);
    declare(b, LLA_B_SQUARES, LLA_R_ACTIVATION, is_cpu ? 1 : rows, is_cpu ? 1 : lla_square_columns(d->hidden), 4,
            "f32");
    declare(b, LLA_B_ATTN_NORMED, LLA_R_ACTIVATION, rows, d->hidden, e, type);
    declare(b, LLA_B_QKV, LLA_R_ACTIVATION, rows, q + 2 * kv, e, type);
    declare(b, LLA_B_Q, LLA_R_ACTIVATION, rows, q, e, type);
    declare(b, LLA_B_PARTIAL, LLA_R_ACTIVATION, d->max_splits, d->nhead * (d->head_dim + 2), 4, "f32");
    declare(b, LLA_B_ATTN_OUT, LLA_R_ACTIVATION, rows, q, e, type);
    declare(b, LLA_B_MLP_NORMED, LLA_R_ACTIVATION, rows, d->hidden, e, type);
    declare(b, LLA_B_ACT, LLA_R_ACTIVATION, rows, d->ffn, e, type);
    declare(b, LLA_B_HEAD_NORMED, LLA_R_ACTIVATION, seqs, d->hidden, e, type);
    declare(b, LLA_B_LOGITS, LLA_R_STEP, seqs, d->vocab, e, type); /* a result: it outlives the step */
    declare(b, LLA_B_CANDIDATES, LLA_R_ACTIVATION, seqs, d->vocab > 32 ? d->vocab : 32, sizeof(struct lla_candidate),
            "candidate");
}

/* ---- nodes ---- */

/* Offset of a weight. */
static size_t w(const struct builder *b, enum lla_weight_kind kind, size_t layer) {
    return lla_plan_weight(&b->graph->plan, kind, layer)->offset;
}

static void node(struct builder *b, struct lla_node node) {
    if (b->nodes) b->nodes[b->nnode] = node;
    b->nnode++;
}

static void embed(struct builder *b) {
    node(b, (struct lla_node){.op = LLA_OP_EMBED,
                              .name = "embed",
                              .reads = BIT(HEADER) | BIT(TOKENS) | BIT(POSITIONS) | BIT(ROW_SEQ) | BIT(BLOCK_TABLE) |
                                       BIT(NEXT) | BIT(TWIN),
                              .writes = BIT(X) | BIT(SQUARES) | BIT(KV_TOKENS) | BIT(BEST),
                              .embed = {.weight = w(b, LLA_W_EMBED, 0), .x = b->graph->offset[LLA_B_X]}});
}

static void layer(struct builder *b, size_t l) {
    const size_t *at = b->graph->offset;
    const size_t k_cache = at[LLA_B_K_CACHE] + l * b->graph->kv_layer_stride;
    const size_t v_cache = at[LLA_B_V_CACHE] + l * b->graph->kv_layer_stride;

    node(b, (struct lla_node){.op = LLA_OP_QKV,
                              .layer = l,
                              .name = "qkv",
                              .reads = BIT(HEADER) | BIT(X) | BIT(SQUARES) | BIT(POSITIONS) | BIT(ROW_SEQ) |
                                       BIT(BLOCK_TABLE) | BIT(ROPE),
                              .writes = BIT(ATTN_NORMED) | BIT(QKV) | BIT(Q) | BIT(K_CACHE) | BIT(V_CACHE),
                              .qkv = {.x = at[LLA_B_X],
                                      .norm = w(b, LLA_W_ATTN_NORM, l),
                                      .w = w(b, LLA_W_QKV, l),
                                      .bias = w(b, LLA_W_QKV_BIAS, l),
                                      .rope = at[LLA_B_ROPE],
                                      .normed = at[LLA_B_ATTN_NORMED],
                                      .qkv = at[LLA_B_QKV],
                                      .q = at[LLA_B_Q],
                                      .k_cache = k_cache,
                                      .v_cache = v_cache}});
    node(b, (struct lla_node){.op = LLA_OP_ATTENTION,
                              .layer = l,
                              .name = "attention",
                              .reads = BIT(HEADER) | BIT(Q) | BIT(K_CACHE) | BIT(V_CACHE) | BIT(POSITIONS) |
                                       BIT(ROW_SEQ) | BIT(BLOCK_TABLE),
                              .writes = BIT(PARTIAL) | BIT(ARRIVED) | BIT(ATTN_OUT),
                              .attention = {.q = at[LLA_B_Q],
                                            .k_cache = k_cache,
                                            .v_cache = v_cache,
                                            .partial = at[LLA_B_PARTIAL],
                                            .out = at[LLA_B_ATTN_OUT]}});
    node(b, (struct lla_node){.op = LLA_OP_LINEAR_ADD,
                              .layer = l,
                              .name = "o",
                              .reads = BIT(HEADER) | BIT(ATTN_OUT) | BIT(X),
                              .writes = BIT(X) | BIT(SQUARES),
                              .linear_add = {.in = at[LLA_B_ATTN_OUT],
                                             .w = w(b, LLA_W_O, l),
                                             .x = at[LLA_B_X],
                                             .k = b->graph->dims.nhead * b->graph->dims.head_dim}});
    node(b, (struct lla_node){.op = LLA_OP_GATE_UP,
                              .layer = l,
                              .name = "gate_up",
                              .reads = BIT(HEADER) | BIT(X) | BIT(SQUARES),
                              .writes = BIT(MLP_NORMED) | BIT(ACT),
                              .gate_up = {.x = at[LLA_B_X],
                                          .norm = w(b, LLA_W_MLP_NORM, l),
                                          .w = w(b, LLA_W_GATE_UP, l),
                                          .normed = at[LLA_B_MLP_NORMED],
                                          .act = at[LLA_B_ACT]}});
    node(b,
         (struct lla_node){
             .op = LLA_OP_LINEAR_ADD,
             .layer = l,
             .name = "down",
             .reads = BIT(HEADER) | BIT(ACT) | BIT(X),
             .writes = BIT(X) | BIT(SQUARES),
             .linear_add = {.in = at[LLA_B_ACT], .w = w(b, LLA_W_DOWN, l), .x = at[LLA_B_X], .k = b->graph->dims.ffn}});
}

static void head(struct builder *b) {
    const size_t *at = b->graph->offset;
    node(b, (struct lla_node){.op = LLA_OP_HEAD,
                              .name = "head",
                              .reads = BIT(HEADER) | BIT(X) | BIT(SQUARES) | BIT(LOGIT_ROWS) | BIT(BEST),
                              .writes = BIT(HEAD_NORMED) | BIT(LOGITS) | BIT(BEST),
                              .head = {.x = at[LLA_B_X],
                                       .norm = w(b, LLA_W_NORM, 0),
                                       .w = w(b, LLA_W_HEAD, 0),
                                       .normed = at[LLA_B_HEAD_NORMED],
                                       .logits = at[LLA_B_LOGITS]}});
    node(b, (struct lla_node){.op = LLA_OP_SAMPLE,
                              .name = "sample",
                              .reads = BIT(HEADER) | BIT(LOGITS) | BIT(LOGIT_ROWS) | BIT(ROW_SEQ) | BIT(BLOCK_TABLE) |
                                       BIT(SAMPLING) | BIT(BIAS) | BIT(MASK) | BIT(KV_TOKENS) | BIT(BEST),
                              .writes = BIT(CANDIDATES) | BIT(ARRIVED) | BIT(NEXT) | BIT(ODDS),
                              .sample = {.logits = at[LLA_B_LOGITS], .candidates = at[LLA_B_CANDIDATES]}});
}

/* The whole step; `layers` is the model's, or 1 for a picture of the step in which one layer stands for all. */
static void step(struct builder *b, size_t layers) {
    embed(b);
    for (size_t l = 0; l < layers; l++) layer(b, l);
    head(b);
}

/* ---- graph ---- */

enum { STEP_NODES = 8 }; /* of a step with one layer */
static const char *const step_names[STEP_NODES] = {"embed",   "qkv",  "attention", "o",
                                                   "gate_up", "down", "head",      "sample"};

/* A buffer lives from its first write to its last use. One layer stands for all: what crosses from layer to layer (x,
 * its squares) is written before the layers and read behind them, so it lives through all of them. */
static lla_status set_lifetimes(struct lla_buffer *buffers) {
    struct lla_node nodes[STEP_NODES];
    struct lla_weight no_weights[16] = {0};
    struct lla_graph blank = {.plan = {.weights = no_weights, .nweight = 10}};
    struct builder b = {.graph = &blank, .nodes = nodes};
    step(&b, 1);
    for (int id = 0; id < LLA_B_COUNT; id++) {
        bool seen = false;
        for (size_t n = 0; n < b.nnode; n++) {
            if (!((nodes[n].reads | nodes[n].writes) >> id & 1)) continue;
            if (!seen) buffers[id].first = n;
            buffers[id].last = n;
            seen = true;
        }
        LLA_REQUIRE(seen, LLA_EINVAL, "buffer %s is used by no node", buffers[id].name);
    }
    return LLA_OK;
}

lla_status lla_graph_make(const struct lla_spec *spec, const struct lla_limits *limits, struct lla_shard shard,
                          struct lla_graph *graph) {
    memset(graph, 0, sizeof *graph);
    struct lla_limits resolved = *limits;
    struct lla_plan share = {0}; /* this rank's dimensions, before anything is placed */
    LLA_TRY(lla_spec_check(spec));
    LLA_REQUIRE(lla_dtype_is_compute(spec->dtype), LLA_EINVAL, "dtype: expected bf16, f16 or f32, found %s",
                lla_dtype_name(spec->dtype));
    LLA_TRY(lla_limits_resolve(spec, &resolved));
    LLA_TRY(lla_plan_shard(spec, shard, &share));
    share.spec = *spec;
    share.limits = resolved;
    lla_plan_blocks(&share);
    const size_t split = resolved.device == LLAISYS_DEVICE_CPU ? LLA_ATTN_SPLIT : LLA_CUDA_SPLIT;
    graph->dims = (struct lla_dims){.dtype = spec->dtype,
                                    .hidden = spec->hidden,
                                    .nhead = share.nhead,
                                    .nkvhead = share.nkvhead,
                                    .head_dim = spec->head_dim,
                                    .ffn = share.ffn,
                                    .vocab = share.vocab,
                                    .kv_block = resolved.kv_block,
                                    .max_blocks = share.max_blocks,
                                    .max_rows = share.max_rows,
                                    .max_seqs = resolved.max_seqs,
                                    .max_splits = resolved.kv_tokens / split + resolved.max_seqs,
                                    .eps = spec->eps};
    struct lla_buffer buffers[LLA_B_COUNT];
    declare_all(&share, &graph->dims, buffers);
    LLA_TRY(set_lifetimes(buffers));
    LLA_TRY(lla_plan_make(spec, &resolved, shard, buffers, LLA_B_COUNT, STEP_NODES, &graph->plan));
    graph->plan.node_names = step_names;
    graph->plan.repeat_first = 1;
    graph->plan.repeat_last = 5;
    graph->plan.repeat = spec->nlayer;
    for (int id = 0; id < LLA_B_COUNT; id++) graph->offset[id] = buffers[id].offset;
    graph->kv_layer_stride = buffers[LLA_B_K_CACHE].nbytes / spec->nlayer;
    const size_t *at = graph->offset;
    graph->twin = resolved.device == LLAISYS_DEVICE_CPU ? 0 : at[LLA_B_TWIN] - at[LLA_B_HEADER];
    graph->io = (struct lla_io){.header = at[LLA_B_HEADER],
                                .tokens = at[LLA_B_TOKENS],
                                .positions = at[LLA_B_POSITIONS],
                                .row_seq = at[LLA_B_ROW_SEQ],
                                .block_table = at[LLA_B_BLOCK_TABLE],
                                .logit_rows = at[LLA_B_LOGIT_ROWS],
                                .sampling = at[LLA_B_SAMPLING],
                                .bias = at[LLA_B_BIAS],
                                .mask = at[LLA_B_MASK],
                                .next = at[LLA_B_NEXT],
                                .odds = at[LLA_B_ODDS],
                                .fed = at[LLA_B_NEXT] + graph->twin,
                                .arrived = at[LLA_B_ARRIVED],
                                .best = at[LLA_B_BEST],
                                .squares = at[LLA_B_SQUARES],
                                .kv_tokens = at[LLA_B_KV_TOKENS]};
    return LLA_OK;
}

void lla_graph_free(struct lla_graph *graph) {
    lla_plan_free(&graph->plan);
}

void lla_graph_init_arena(const struct lla_graph *graph, char *arena) {
    const struct lla_dims *d = &graph->dims;
    lla_rope_table(d->dtype, graph->plan.limits.max_seq, d->head_dim, graph->plan.spec.theta,
                   arena + graph->offset[LLA_B_ROPE]);
    memset(arena + graph->io.block_table, 0, d->max_seqs * d->max_blocks * sizeof(int32_t));
}

lla_status lla_program_build(const struct lla_graph *graph, size_t rows, size_t logits, struct lla_program *program) {
    *program = (struct lla_program){.graph = graph, .rows = rows, .logits = logits};
    LLA_REQUIRE(rows > 0 && rows <= graph->dims.max_rows && logits > 0 && logits <= graph->dims.max_seqs, LLA_EINVAL,
                "a program for %zu rows and %zu logit rows, the plan allows %zu and %zu", rows, logits,
                graph->dims.max_rows, graph->dims.max_seqs);
    struct builder b = {.graph = graph};
    step(&b, graph->plan.spec.nlayer);
    program->nodes = calloc(b.nnode, sizeof *program->nodes);
    LLA_REQUIRE(program->nodes, LLA_ENOMEM, "no memory for a program of %zu nodes", b.nnode);
    b = (struct builder){.graph = graph, .nodes = program->nodes};
    step(&b, graph->plan.spec.nlayer);
    program->nnode = b.nnode;
    return LLA_OK;
}

void lla_program_free(struct lla_program *program) {
    free(program->nodes);
    memset(program, 0, sizeof *program);
}

static void print_set(uint32_t set, FILE *out) {
    for (int id = 0; id < LLA_B_COUNT; id++)
        if (set >> id & 1) fprintf(out, " %s", buffer_names[id]);
}

void lla_program_print(const struct lla_program *program, FILE *out) {
    fprintf(out, "program of %zu nodes for %zu rows and %zu logit rows\n", program->nnode, program->rows,
            program->logits);
    for (size_t i = 0; i < program->nnode; i++) {
        const struct lla_node *n = &program->nodes[i];
        fprintf(out, "%4zu  layer %2zu  %-10s reads", i, n->layer, n->name);
        print_set(n->reads, out);
        fprintf(out, "; writes");
        print_set(n->writes, out);
        fprintf(out, "\n");
    }
}
