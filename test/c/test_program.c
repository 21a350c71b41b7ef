/* test_program.c: the step's list of nodes: what stands in it, and that no node reads what is not there. */
#include "../../graph/program.h"
#include "harness.h"
#include "model.h"

#include <stdlib.h>

static const struct lla_spec specs[] = {
    {LLAISYS_DTYPE_BF16, 28, 1536, 12, 2, 128, 8960, 151936, 131072, false, 1e-6f, 1e4, {151643}, 1},
    {LLAISYS_DTYPE_F32, 1, 36, 6, 3, 10, 42, 101, 512, true, 1e-6f, 1e4, {0}, 0},
    {LLAISYS_DTYPE_F16, 3, 64, 4, 4, 16, 99, 300, 512, false, 1e-6f, 1e4, {0}, 0},
};
static const struct lla_limits limits[] = {{.max_seqs = 16}, {.max_seq = 100}, {.max_seqs = 64, .prefill_chunk = 8}};
enum { NSPEC = sizeof specs / sizeof *specs };

static struct lla_graph graph;
static struct lla_program program;

static void open_model(size_t i) {
    CHECK_INT(lla_graph_make(&specs[i], &limits[i], (struct lla_shard){0, 1}, &graph), LLA_OK);
    CHECK_INT(lla_program_build(&graph, graph.dims.max_rows, graph.dims.max_seqs, &program), LLA_OK);
}

static void close_model(void) {
    lla_program_free(&program);
    lla_graph_free(&graph);
}

TEST(nodes_stand_in_order) {
    static const char *const layer[] = {"qkv", "attention", "o", "gate_up", "down"};
    static const enum lla_op ops[] = {LLA_OP_QKV, LLA_OP_ATTENTION, LLA_OP_LINEAR_ADD, LLA_OP_GATE_UP,
                                      LLA_OP_LINEAR_ADD};
    for (size_t i = 0; i < NSPEC; i++) {
        open_model(i);
        const size_t n = specs[i].nlayer;
        CHECK_INT(program.nnode, 1 + 5 * n + 2);
        CHECK(!strcmp(program.nodes[0].name, "embed") && program.nodes[0].op == LLA_OP_EMBED);
        for (size_t k = 0; k < 5 * n; k++) {
            const struct lla_node *node = &program.nodes[1 + k];
            CHECK(!strcmp(node->name, layer[k % 5]));
            CHECK_INT(node->op, ops[k % 5]);
            CHECK_INT(node->layer, k / 5);
        }
        CHECK_INT(program.nodes[1 + 5 * n].op, LLA_OP_HEAD);
        CHECK_INT(program.nodes[2 + 5 * n].op, LLA_OP_SAMPLE);
        CHECK_INT(graph.plan.nnode, 8);
        CHECK_INT(graph.plan.repeat, n);
        for (size_t k = 0; k < graph.plan.nnode; k++) /* the plan's names are the program's */
            CHECK(!strcmp(graph.plan.node_names[k], program.nodes[k < 6 ? k : k + 5 * (n - 1)].name));
        close_model();
    }
}

/* Every operand that a node names is a weight of its layer or a buffer that it reads or writes. */
TEST(operands) {
    open_model(2);
    const struct lla_plan *p = &graph.plan;
    const size_t *at = graph.offset;
    for (size_t l = 0; l < 3; l++) {
        const struct lla_node *n = &program.nodes[1 + 5 * l];
        const size_t kv = l * graph.kv_layer_stride;
        CHECK_INT(n[0].qkv.w, lla_plan_weight(p, LLA_W_QKV, l)->offset);
        CHECK_INT(n[0].qkv.bias, lla_plan_weight(p, LLA_W_QKV_BIAS, l)->offset);
        CHECK_INT(n[0].qkv.norm, lla_plan_weight(p, LLA_W_ATTN_NORM, l)->offset);
        CHECK_INT(n[0].qkv.k_cache, at[LLA_B_K_CACHE] + kv);
        CHECK_INT(n[0].qkv.v_cache, at[LLA_B_V_CACHE] + kv);
        CHECK_INT(n[1].attention.k_cache, n[0].qkv.k_cache);
        CHECK_INT(n[1].attention.v_cache, n[0].qkv.v_cache);
        CHECK_INT(n[2].linear_add.w, lla_plan_weight(p, LLA_W_O, l)->offset);
        CHECK_INT(n[2].linear_add.k, 64);
        CHECK_INT(n[3].gate_up.norm, lla_plan_weight(p, LLA_W_MLP_NORM, l)->offset);
        CHECK_INT(n[3].gate_up.w, lla_plan_weight(p, LLA_W_GATE_UP, l)->offset);
        CHECK_INT(n[4].linear_add.w, lla_plan_weight(p, LLA_W_DOWN, l)->offset);
        CHECK_INT(n[4].linear_add.k, 99);
    }
    CHECK_INT(graph.kv_layer_stride * 3, region_of(&graph, LLA_B_K_CACHE)->nbytes);
    CHECK_INT(graph.kv_layer_stride, graph.plan.nblock * 32 * 64 * 2);
    close_model();
}

TEST(lifetimes_cover_every_use) {
    for (size_t i = 0; i < NSPEC; i++) {
        open_model(i);
        for (size_t n = 0; n < program.nnode; n++) {
            const size_t last = program.nnode - 2; /* head */
            const size_t step = n == 0 ? 0 : n >= last ? n - last + 6 : 1 + (n - 1) % 5;
            for (int id = 0; id < LLA_B_COUNT; id++) {
                if (!((program.nodes[n].reads | program.nodes[n].writes) >> id & 1)) continue;
                const struct lla_region *r = region_of(&graph, id);
                CHECK(r->first <= step && step <= r->last);
            }
        }
        close_model();
    }
}

/* Walks the whole program, all layers, and keeps for every byte of the activations which buffer wrote it last: what a
 * node reads must have been written earlier in the step, and nothing may have been written over it since. */
TEST(reads_find_what_was_written) {
    const uint32_t inputs = 1u << LLA_B_HEADER | 1u << LLA_B_TOKENS | 1u << LLA_B_POSITIONS | 1u << LLA_B_ROW_SEQ |
                            1u << LLA_B_BLOCK_TABLE | 1u << LLA_B_LOGIT_ROWS | 1u << LLA_B_SAMPLING | 1u << LLA_B_BIAS |
                            1u << LLA_B_MASK | 1u << LLA_B_NEXT | 1u << LLA_B_TWIN | 1u << LLA_B_ROPE |
                            1u << LLA_B_KV_TOKENS | 1u << LLA_B_K_CACHE | 1u << LLA_B_V_CACHE;
    for (size_t i = 1; i < NSPEC; i++) {
        open_model(i);
        signed char *owner = malloc(graph.plan.total);
        memset(owner, -1, graph.plan.total);
        for (size_t n = 0; n < program.nnode; n++) {
            const struct lla_node *node = &program.nodes[n];
            for (int pass = 0; pass < 2; pass++) /* reads, then writes */
                for (int id = 0; id < LLA_B_COUNT; id++) {
                    if (inputs >> id & 1 || !((pass ? node->writes : node->reads) >> id & 1)) continue;
                    const struct lla_region *r = region_of(&graph, id);
                    size_t wrong = 0;
                    for (size_t b = r->offset; b < r->offset + r->nbytes; b++)
                        if (pass)
                            owner[b] = (signed char)id;
                        else
                            wrong += owner[b] != id;
                    if (wrong)
                        HARNESS_FAIL("node %zu %s reads %s: %zu bytes are not there", n, node->name, r->name, wrong);
                }
            for (int a = 0; a < LLA_B_COUNT; a++) /* what it reads and writes lies apart */
                for (int b = 0; b < LLA_B_COUNT; b++) {
                    if (a == b || !((node->reads | node->writes) >> a & 1) || !(node->writes >> b & 1)) continue;
                    const struct lla_region *x = region_of(&graph, a), *y = region_of(&graph, b);
                    CHECK(x->offset >= y->offset + y->nbytes || y->offset >= x->offset + x->nbytes);
                }
        }
        free(owner);
        close_model();
    }
}

TEST(prints) {
    open_model(1);
    char *text = NULL;
    size_t size = 0, lines = 0;
    FILE *out = open_memstream(&text, &size);
    lla_program_print(&program, out);
    fclose(out);
    for (size_t i = 0; i < size; i++) lines += text[i] == '\n';
    CHECK_INT(lines, program.nnode + 1);
    CHECK_STR_HAS(text, "program of 8 nodes for 100 rows and 1 logit rows");
    CHECK_STR_HAS(
        text,
        "embed      reads header tokens positions row_seq block_table next twin; writes best kv_tokens x squares");
    CHECK_STR_HAS(text, "down       reads header x act; writes x squares");
    CHECK_STR_HAS(text, "head       reads header logit_rows best x squares; writes best head_normed logits");
    free(text);
    close_model();
}

TEST(refusals) {
    open_model(1);
    struct lla_program none;
    CHECK_INT(lla_program_build(&graph, 0, 1, &none), LLA_EINVAL);
    CHECK_INT(lla_program_build(&graph, 101, 1, &none), LLA_EINVAL);
    CHECK_STR_HAS(lla_last_error(), "a program for 101 rows and 1 logit rows, the plan allows 100 and 1");
    CHECK_INT(lla_program_build(&graph, 1, 2, &none), LLA_EINVAL);
    CHECK_INT(lla_program_build(&graph, 1, 0, &none), LLA_EINVAL);
    close_model();
    struct lla_graph bad;
    struct lla_spec spec = specs[1];
    spec.nkvhead = 4;
    CHECK(lla_graph_make(&spec, &limits[1], (struct lla_shard){0, 1}, &bad));
    CHECK(lla_graph_make(&specs[1], &(struct lla_limits){.max_seq = 1000}, (struct lla_shard){0, 1}, &bad));
}

/* A config may leave the dtype open; a graph cannot. */
TEST(a_graph_needs_a_dtype) {
    struct lla_graph bad;
    struct lla_spec spec = specs[1];
    spec.dtype = LLAISYS_DTYPE_INVALID;
    lla_clear_error();
    if (!lla_graph_make(&spec, &limits[1], (struct lla_shard){0, 1}, &bad)) {
        HARNESS_FAIL("a graph without a dtype was made, of %zu bytes of weights", bad.plan.weight_bytes);
        lla_graph_free(&bad);
        return;
    }
    CHECK_STR_HAS(lla_last_error(), "dtype");
}

RUN_TESTS()
