/* The CUDA executor against the CPU's, node by node, with the same inputs and poisoned activations; and against itself:
 * the graph gives the bits of the single nodes, and a sequence's logits do not depend on the bucket or on the other
 * rows. Skips without a GPU. The argument `quick` runs what a sanitizer can watch in a minute: every kernel of the step
 * once, on small shapes, and captured graphs. */
#include "../../engine/device.h"
#include "../../engine/runner.h"
#include "../../graph/exec_cuda.h"
#include "harness.h"

#include <math.h>
#include <stdlib.h>

static uint64_t state = 1;
static uint32_t draw(void) {
    state = state * 6364136223846793005u + 1442695040888963407u;
    return (uint32_t)(state >> 33);
}
static float uniform(void) {
    return (float)draw() * 0x1p-30f - 1.0f;
}

/* Ends the program with the status that the test runner takes for "skipped" where there is no GPU. */
static void need_gpu(void) {
    if (lla_device_get(LLAISYS_DEVICE_NVIDIA)->count() > 0) return;
    printf("SKIPPED: no GPU\n");
    exit(77);
}

struct pair {
    struct lla_runner cpu, gpu;
};

static void fill(struct pair *p) {
    const struct lla_plan *plan = &p->cpu.graph.plan;
    for (size_t i = 0; i < plan->nweight; i++) {
        const struct lla_weight *w = &plan->weights[i], *wg = &p->gpu.graph.plan.weights[i];
        if (w->kind == LLA_W_HEAD && plan->spec.tied) continue;
        const size_t n = w->rows * w->cols;
        char *dense = malloc(n * lla_dtype_size(plan->spec.dtype));
        const float scale = w->cols > 1 ? sqrtf(3.0f / (float)w->cols) : 0.3f;
        for (size_t j = 0; j < n; j++)
            lla_store_float(dense, j, uniform() * scale + (w->cols == 1 && w->kind != LLA_W_QKV_BIAS ? 1.0f : 0.0f),
                            plan->spec.dtype);
        CHECK_INT(lla_runner_store(&p->cpu, w, 0, w->rows, dense), LLA_OK);
        CHECK_INT(lla_runner_store(&p->gpu, wg, 0, w->rows, dense), LLA_OK);
        free(dense);
    }
}

static bool make_with(struct pair *p, const struct lla_spec *spec, struct lla_limits limits) {
    const struct lla_shard whole = {0, 1};
    CHECK_INT(lla_runner_create(spec, &limits, whole, 0, 2, &p->cpu), LLA_OK);
    limits.device = LLAISYS_DEVICE_NVIDIA;
    const lla_status status = lla_runner_create(spec, &limits, whole, 0, 2, &p->gpu);
    CHECK_INT(status, LLA_OK);
    if (status) {
        printf("  %s\n", lla_last_error());
        lla_runner_destroy(&p->cpu);
        return false;
    }
    fill(p);
    CHECK_INT(lla_runner_ready(&p->gpu), LLA_OK);
    return true;
}

static bool make(struct pair *p, const struct lla_spec *spec, size_t max_seqs, size_t chunk) {
    return make_with(
        p, spec,
        (struct lla_limits){
            .max_seq = 2400, .max_seqs = max_seqs, .kv_tokens = 2800, .kv_block = 32, .prefill_chunk = chunk});
}

static void unmake(struct pair *p) {
    lla_runner_destroy(&p->cpu);
    lla_runner_destroy(&p->gpu);
}

/* Largest |a - b| of n elements, relative to the largest |a|. NaN counts as infinite. */
static double difference(const void *a, const void *b, size_t n, llaisysDataType_t dtype) {
    double most = 0, scale = 1e-6;
    for (size_t i = 0; i < n; i++) {
        const double x = lla_load_float(a, i, dtype), y = lla_load_float(b, i, dtype);
        if (!(fabs(x - y) < INFINITY)) return INFINITY;
        if (fabs(x - y) > most) most = fabs(x - y);
        if (fabs(x) > scale) scale = fabs(x);
    }
    return most / scale;
}

/* Elements of the buffers that a step of `rows` rows and `logits` logit rows leaves behind, or 0 for those that are not
 * compared. */
static size_t compared(const struct lla_graph *g, int id, size_t rows, size_t logits) {
    const struct lla_dims *d = &g->dims;
    switch (id) {
    case LLA_B_X:
        return rows * d->hidden;
    case LLA_B_Q:
    case LLA_B_ATTN_OUT:
        return rows * d->nhead * d->head_dim;
    case LLA_B_ACT:
        return rows * d->ffn;
    case LLA_B_LOGITS:
        return logits * d->vocab;
    case LLA_B_K_CACHE:
    case LLA_B_V_CACHE:
        return g->kv_layer_stride * g->plan.spec.nlayer / lla_dtype_size(d->dtype);
    default:
        return 0;
    }
}

struct sequence {
    size_t position0, ntoken;
};

/* Where the head has found the largest of a row's own logits, which it must for up to eight rows, that is what it is;
 * then forgets it, so that the sample node looks at the CPU's logits. */
static void check_best(struct pair *p, const struct lla_program *program, size_t nlogit) {
    const struct lla_graph *g = &p->gpu.graph;
    const size_t vocab = g->dims.vocab, e = lla_dtype_size(g->dims.dtype);
    const bool is_due = program->logits <= 8 && e == 2 && g->dims.hidden % 16 == 0;
    uint64_t best[128];
    char *logits = malloc(nlogit * vocab * e);
    CHECK(nlogit <= 128);
    lla_exec_cuda_read(p->gpu.cuda, g->io.best, nlogit * sizeof *best, best);
    lla_exec_cuda_read(p->gpu.cuda, g->offset[LLA_B_LOGITS], nlogit * vocab * e, logits);
    for (size_t r = 0; r < nlogit; r++) {
        CHECK(best[r] || !is_due);
        if (!best[r]) continue;
        const char *row = logits + r * vocab * e;
        size_t largest = 0;
        for (size_t t = 1; t < vocab; t++)
            if (lla_load_float(row, t, g->dims.dtype) > lla_load_float(row, largest, g->dims.dtype)) largest = t;
        CHECK_INT((uint32_t)~best[r], largest);
    }
    free(logits);
    memset(best, 0, sizeof best);
    lla_exec_cuda_write(p->gpu.cuda, g->io.best, nlogit * sizeof *best, best);
}

/* The squares that stand beside the rows of x, in the order that step_math.cuh gives; `columns` a row. */
static void square_rows(const char *x, size_t rows, const struct lla_dims *d, float *squares) {
    const size_t columns = lla_square_columns(d->hidden);
    for (size_t r = 0; r < rows; r++)
        for (size_t t = 0; t < columns; t++) {
            float sum[8];
            for (size_t c = 0; c < 8; c++) {
                const size_t low = t * 16 + c, high = low + 8;
                const float a = low < d->hidden ? lla_load_float(x, r * d->hidden + low, d->dtype) : 0,
                            b = high < d->hidden ? lla_load_float(x, r * d->hidden + high, d->dtype) : 0,
                            square = a * a;
                sum[c] = fmaf(b, b, square);
            }
            for (size_t n = 4; n; n /= 2)
                for (size_t c = 0; c < n; c++) sum[c] = sum[2 * c] + sum[2 * c + 1];
            squares[r * columns + t] = sum[0];
        }
}

/* A node that writes x has left the squares of its own x, to the bit; then they become those of the CPU's. */
static void check_squares(struct pair *p, const struct lla_node *node, size_t rows) {
    const struct lla_graph *g = &p->gpu.graph;
    const struct lla_dims *d = &g->dims;
    const size_t n = rows * lla_square_columns(d->hidden), nbytes = rows * d->hidden * lla_dtype_size(d->dtype);
    float *expected = malloc(n * sizeof *expected), *found = malloc(n * sizeof *found);
    char *x = malloc(nbytes);
    lla_exec_cuda_read(p->gpu.cuda, g->offset[LLA_B_X], nbytes, x);
    lla_exec_cuda_read(p->gpu.cuda, g->io.squares, n * sizeof *found, found);
    square_rows(x, rows, d, expected);
    size_t wrong = 0;
    while (wrong < n && !memcmp(&found[wrong], &expected[wrong], sizeof *found)) wrong++;
    if (wrong < n)
        printf("  %s of %zu rows: square %zu is %g instead of %g\n", node->name, rows, wrong, (double)found[wrong],
               (double)expected[wrong]);
    CHECK(wrong == n);
    square_rows(p->cpu.arena + p->cpu.graph.offset[LLA_B_X], rows, d, expected);
    lla_exec_cuda_write(p->gpu.cuda, g->io.squares, n * sizeof *expected, expected);
    free(expected);
    free(found);
    free(x);
}

/* One step of the sequences on both, node by node: after each node its results are compared, and the CPU's are copied
 * to the GPU. `nlogit`: 0, or logits of every sequence's last row. */
static void compare_logits(struct pair *p, const struct sequence *seqs, size_t nseq, size_t nlogit, double bound) {
    const struct lla_graph *c = &p->cpu.graph, *g = &p->gpu.graph;
    const struct lla_dims *d = &c->dims;
    const size_t e = lla_dtype_size(d->dtype);
    size_t rows = 0, block = 1;
    for (size_t i = 0; i < nseq; i++) rows += seqs[i].ntoken;
    for (int id = 0; id < LLA_B_COUNT; id++) { /* poison */
        if (id < LLA_B_X || id == LLA_B_LOGITS) continue;
        const size_t n = c->plan.regions[0].nbytes ? compared(c, id, rows, nlogit) * e : 0;
        if (!n) continue;
        char *bytes = malloc(n);
        memset(bytes, 0xff, n);
        lla_exec_cuda_write(p->gpu.cuda, g->offset[id], n, bytes);
        free(bytes);
    }
    const size_t nsquare = rows * lla_square_columns(d->hidden);
    float *no_squares = malloc(nsquare * sizeof *no_squares);
    memset(no_squares, 0xff, nsquare * sizeof *no_squares);
    lla_exec_cuda_write(p->gpu.cuda, g->io.squares, nsquare * sizeof *no_squares, no_squares);
    free(no_squares);
    /* keys and values of earlier positions: random, the same on both */
    for (int id = LLA_B_K_CACHE; id <= LLA_B_V_CACHE; id++) {
        const size_t n = compared(c, id, 0, 0);
        char *kv = p->cpu.arena + c->offset[id];
        for (size_t i = 0; i < n; i++) lla_store_float(kv, i, uniform(), d->dtype);
        lla_exec_cuda_write(p->gpu.cuda, g->offset[id], n * e, kv);
    }
    struct lla_step_header *header = (struct lla_step_header *)(p->cpu.arena + c->io.header);
    int32_t *tokens = (int32_t *)(p->cpu.arena + c->io.tokens);
    int32_t *positions = (int32_t *)(p->cpu.arena + c->io.positions),
            *row_seq = (int32_t *)(p->cpu.arena + c->io.row_seq);
    int32_t *table = (int32_t *)(p->cpu.arena + c->io.block_table),
            *logit_rows = (int32_t *)(p->cpu.arena + c->io.logit_rows);
    memset(p->cpu.arena + c->io.sampling, 0, d->max_seqs * sizeof(struct lla_sampling_row));
    int32_t *chosen = (int32_t *)(p->cpu.arena + c->io.next);
    size_t row = 0;
    for (size_t i = 0; i < nseq; i++) {
        for (size_t j = 0; j < seqs[i].ntoken; j++, row++) {
            chosen[row % d->max_seqs] = (int32_t)(draw() % d->vocab);
            tokens[row] = row < d->max_seqs && j % 2 ? ~(int32_t)row : (int32_t)(draw() % d->vocab); /* some are fed */
            positions[row] = (int32_t)(seqs[i].position0 + j);
            row_seq[row] = (int32_t)i;
        }
        for (size_t b = 0; b * d->kv_block < seqs[i].position0 + seqs[i].ntoken; b++)
            table[i * d->max_blocks + b] = (int32_t)block++;
        logit_rows[i] = (int32_t)row - 1;
    }
    CHECK(block <= c->plan.nblock);
    *header = (struct lla_step_header){.nrow = (int32_t)rows, .nlogit = (int32_t)nlogit};
    for (size_t i = 0; rows == nseq && i < nseq; i++) { /* each is alone of its sequence */
        const int32_t splits = (int32_t)(seqs[i].position0 / LLA_CUDA_SPLIT) + 1;
        header->nsplit += splits;
        header->longest = splits > header->longest ? splits : header->longest;
    }
    lla_exec_cuda_write(p->gpu.cuda, g->io.header, g->io.bias - g->io.header, p->cpu.arena + c->io.header);
    lla_exec_cuda_write(p->gpu.cuda, g->io.fed, d->max_seqs * sizeof *chosen, chosen);
    const size_t noted = c->plan.nblock * d->kv_block * sizeof(int32_t);
    int32_t *kv_tokens = malloc(noted);
    memset(p->cpu.arena + c->io.kv_tokens, 0xff, noted);
    lla_exec_cuda_write(p->gpu.cuda, g->io.kv_tokens, noted, p->cpu.arena + c->io.kv_tokens);

    size_t bucket = 0;
    while (p->gpu.programs[bucket].rows < rows || p->gpu.programs[bucket].logits < nseq) bucket++;
    const struct lla_program *program = &p->gpu.programs[bucket];
    for (size_t i = 0; i < program->nnode; i++) {
        lla_exec_cpu(&p->cpu.programs[bucket], p->cpu.arena, p->cpu.crew, i, i + 1);
        const lla_status status = lla_exec_cuda_nodes(p->gpu.cuda, program, i, i + 1);
        if (status) printf("  %s\n", lla_last_error());
        CHECK_INT(status, LLA_OK);
        if (status) break;
        if (nlogit && program->nodes[i].op == LLA_OP_HEAD) check_best(p, program, nlogit);
        if (program->nodes[i].writes >> LLA_B_SQUARES & 1) check_squares(p, &program->nodes[i], rows);
        for (int id = 0; id < LLA_B_COUNT; id++) {
            const size_t n = compared(c, id, rows, nlogit);
            if (!n || !(program->nodes[i].writes >> id & 1)) continue;
            char *theirs = malloc(n * e), *ours = p->cpu.arena + c->offset[id];
            lla_exec_cuda_read(p->gpu.cuda, g->offset[id], n * e, theirs);
            const double off = difference(ours, theirs, n, d->dtype);
            if (!(off <= bound))
                printf(
                    "  node %zu %s layer %zu buffer %d rows %zu bucket %zu: differs by %g of the largest, allowed %g\n",
                    i, program->nodes[i].name, program->nodes[i].layer, id, rows, program->rows, off, bound);
            CHECK(off <= bound);
            lla_exec_cuda_write(p->gpu.cuda, g->offset[id], n * e, ours);
            free(theirs);
        }
    }
    lla_exec_cuda_read(p->gpu.cuda, g->io.kv_tokens, noted, kv_tokens);
    CHECK(!memcmp(kv_tokens, p->cpu.arena + c->io.kv_tokens, noted));
    free(kv_tokens);
    int32_t next[128];
    CHECK(nlogit <= 128);
    if (nlogit) lla_exec_cuda_read(p->gpu.cuda, g->io.next, nlogit * sizeof *next, next);
    for (size_t i = 0; i < nlogit; i++) CHECK_INT(next[i], ((int32_t *)(p->cpu.arena + c->io.next))[i]);
}

static void compare(struct pair *p, const struct sequence *seqs, size_t nseq, double bound) {
    compare_logits(p, seqs, nseq, nseq, bound);
}

static struct lla_spec shape(llaisysDataType_t dtype, size_t hidden, size_t nhead, size_t nkvhead, size_t head_dim,
                             size_t ffn, size_t vocab, bool tied) {
    return (struct lla_spec){.dtype = dtype,
                             .nlayer = 2,
                             .hidden = hidden,
                             .nhead = nhead,
                             .nkvhead = nkvhead,
                             .head_dim = head_dim,
                             .ffn = ffn,
                             .vocab = vocab,
                             .max_position = 4096,
                             .tied = tied,
                             .eps = 1e-6f,
                             .theta = 10000};
}

static double bound_of(llaisysDataType_t dtype) {
    return dtype == LLAISYS_DTYPE_F32 ? 2e-5 : dtype == LLAISYS_DTYPE_F16 ? 4e-3 : 2e-2;
}

static void compare_shape(struct lla_spec spec) {
    static const struct sequence one[] = {{5, 1}}, deep[] = {{650, 1}}, far[] = {{2300, 1}},
                                 three[] = {{0, 1}, {127, 1}, {128, 1}};
    static const struct sequence mixed[] = {{0, 20}, {300, 1}, {130, 12}}, prompt[] = {{100, 64}},
                                 many[] = {{7, 9}, {3, 8}};
    /* more than 64 rows: the kernels for many */
    static const struct sequence barely[] = {{0, 65}}, chunk[] = {{61, 130}}, two[] = {{0, 200}, {333, 57}},
                                 large[] = {{128, 500}}, among[] = {{40, 90}, {650, 1}, {0, 140}};
    struct pair p;
    if (!make(&p, &spec, 3, 512)) return;
    const double bound = bound_of(spec.dtype);
    compare(&p, one, 1, bound);
    compare(&p, deep, 1, bound);
    compare(&p, far, 1, bound);
    compare(&p, three, 3, bound);
    compare(&p, mixed, 3, bound);
    compare(&p, prompt, 1, bound);
    compare(&p, many, 2, bound);
    compare(&p, barely, 1, bound);
    compare(&p, chunk, 1, bound);
    compare(&p, two, 2, bound);
    compare(&p, large, 1, bound);
    compare(&p, among, 3, bound);
    unmake(&p);
}

TEST(nodes_bf16) {
    need_gpu();
    compare_shape(shape(LLAISYS_DTYPE_BF16, 256, 4, 2, 64, 768, 1536, true));
    compare_shape(shape(LLAISYS_DTYPE_BF16, 1536, 12, 2, 128, 8960, 4096, false));
    compare_shape(shape(LLAISYS_DTYPE_BF16, 100, 7, 1, 24, 301, 509, false));
    compare_shape(shape(LLAISYS_DTYPE_BF16, 48, 14, 14, 16, 65, 101, true));
    compare_shape(shape(LLAISYS_DTYPE_BF16, 897, 14, 1, 128, 33, 1000, false));
}

TEST(nodes_f16_f32) {
    need_gpu();
    compare_shape(shape(LLAISYS_DTYPE_F16, 256, 4, 2, 64, 768, 1536, true));
    compare_shape(shape(LLAISYS_DTYPE_F16, 264, 6, 2, 128, 328, 500, false));
    compare_shape(shape(LLAISYS_DTYPE_F32, 256, 4, 2, 64, 768, 1536, true));
    compare_shape(shape(LLAISYS_DTYPE_F32, 75, 5, 5, 32, 101, 77, false));
}

/* More row tiles than the clusters take in one round. */
TEST(nodes_hidden_3584) {
    need_gpu();
    compare_shape(shape(LLAISYS_DTYPE_BF16, 3584, 28, 4, 128, 1216, 300, false));
}

/* `count` sequences of `ntoken` tokens each behind 3, 4, 5, ... earlier ones. */
static void compare_count(struct pair *p, size_t count, size_t ntoken, size_t nlogit, double bound) {
    struct sequence seqs[128];
    CHECK(count <= 128);
    for (size_t i = 0; i < count && i < 128; i++) seqs[i] = (struct sequence){3 + i, ntoken};
    compare_logits(p, seqs, count, nlogit, bound);
}

/* Steps in the middle of a prompt want no logits; a bucket that is no power of two. */
TEST(nodes_without_logits_and_of_100_sequences) {
    need_gpu();
    struct lla_spec spec = shape(LLAISYS_DTYPE_BF16, 256, 6, 2, 64, 768, 1000, false);
    struct pair p;
    const struct lla_limits limits = {
        .max_seq = 256, .max_seqs = 100, .kv_tokens = 128 * 128, .kv_block = 16, .prefill_chunk = 256};
    if (!make_with(&p, &spec, limits)) return;
    const double bound = bound_of(spec.dtype);
    compare_count(&p, 1, 40, 0, bound);
    compare_count(&p, 1, 200, 0, bound);
    compare_count(&p, 9, 1, 0, bound);
    compare_count(&p, 12, 20, 0, bound);
    static const size_t counts[] = {9, 63, 64, 65, 99, 100};
    for (size_t i = 0; i < 6; i++) compare_count(&p, counts[i], 1, counts[i], bound);
    compare_count(&p, 100, 2, 100, bound);
    unmake(&p);
}

static void compare_kv_block(struct lla_spec spec, size_t kv_block) {
    static const struct sequence one[] = {{255, 1}}, three[] = {{0, 1}, {256, 1}, {511, 1}},
                                 mixed[] = {{200, 70}, {3, 1}};
    struct pair p;
    const struct lla_limits limits = {
        .max_seq = 600, .max_seqs = 3, .kv_tokens = 1536, .kv_block = kv_block, .prefill_chunk = 128};
    if (!make_with(&p, &spec, limits)) return;
    const double bound = bound_of(spec.dtype);
    compare(&p, one, 1, bound);
    compare(&p, three, 3, bound);
    compare(&p, mixed, 2, bound);
    unmake(&p);
}

TEST(nodes_of_the_smallest_and_largest_kv_blocks) {
    need_gpu();
    for (size_t kv_block = 1; kv_block <= 256; kv_block *= 256) {
        compare_kv_block(shape(LLAISYS_DTYPE_BF16, 256, 4, 2, 64, 768, 500, true), kv_block);
        compare_kv_block(shape(LLAISYS_DTYPE_F16, 256, 6, 1, 128, 328, 500, true), kv_block);
        compare_kv_block(shape(LLAISYS_DTYPE_F32, 72, 3, 1, 24, 101, 77, true), kv_block);
    }
}

/* Attention over more than 64 splits of 64 tokens. */
static void compare_long(struct lla_spec spec) {
    static const struct sequence one[] = {{4800, 1}}, three[] = {{4095, 1}, {10, 1}, {4096, 1}},
                                 mixed[] = {{4500, 20}, {100, 1}}, chunk[] = {{4700, 70}},
                                 among[] = {{60, 90}, {4400, 1}, {300, 1}};
    struct pair p;
    const struct lla_limits limits = {
        .max_seq = 5000, .max_seqs = 3, .kv_tokens = 9600, .kv_block = 32, .prefill_chunk = 128};
    spec.max_position = 8192;
    if (!make_with(&p, &spec, limits)) return;
    const double bound = bound_of(spec.dtype);
    compare(&p, one, 1, bound);
    compare(&p, three, 3, bound);
    compare(&p, mixed, 2, bound);
    compare(&p, chunk, 1, bound);
    compare(&p, among, 3, bound);
    unmake(&p);
}

TEST(nodes_of_a_long_context) {
    need_gpu();
    compare_long(shape(LLAISYS_DTYPE_BF16, 256, 12, 2, 128, 512, 300, true));
    compare_long(shape(LLAISYS_DTYPE_F16, 128, 14, 1, 64, 328, 300, true));
    compare_long(shape(LLAISYS_DTYPE_F32, 72, 3, 1, 24, 101, 77, true));
}

/* Attention over more splits than a block merges at once (504), and a short row beside. */
static void compare_very_long(struct lla_spec spec) {
    static const struct sequence two[] = {{33000, 1}, {700, 1}};
    struct pair p;
    const struct lla_limits limits = {
        .max_seq = 33024, .max_seqs = 2, .kv_tokens = 34048, .kv_block = 32, .prefill_chunk = 32};
    spec.nlayer = 1;
    spec.max_position = 40000;
    if (!make_with(&p, &spec, limits)) return;
    compare(&p, two, 1, bound_of(spec.dtype));
    compare(&p, two, 2, bound_of(spec.dtype));
    unmake(&p);
}

TEST(nodes_of_a_very_long_context) {
    need_gpu();
    compare_very_long(shape(LLAISYS_DTYPE_BF16, 128, 6, 1, 128, 256, 300, true));
    compare_very_long(shape(LLAISYS_DTYPE_F16, 128, 18, 2, 64, 256, 300, true));
}

/* Every kernel of the step, on small shapes. */
/* A head of zeros but for rows 5 and 9, which are equal: the first of the largest logits is 0's or 5's. */
static void store_equal_rows(struct pair *p) {
    for (size_t i = 0; i < p->cpu.graph.plan.nweight; i++) {
        const struct lla_weight *w = &p->cpu.graph.plan.weights[i], *wg = &p->gpu.graph.plan.weights[i];
        if (w->kind != LLA_W_HEAD) continue;
        const llaisysDataType_t dtype = p->cpu.graph.dims.dtype;
        char *dense = calloc(w->rows * w->cols, lla_dtype_size(dtype));
        for (size_t j = 0; j < w->cols; j++) {
            const float v = uniform();
            lla_store_float(dense, 5 * w->cols + j, v, dtype);
            lla_store_float(dense, 9 * w->cols + j, v, dtype);
        }
        CHECK_INT(lla_runner_store(&p->cpu, w, 0, w->rows, dense), LLA_OK);
        CHECK_INT(lla_runner_store(&p->gpu, wg, 0, w->rows, dense), LLA_OK);
        free(dense);
    }
}

TEST(quick_nodes) {
    need_gpu();
    static const struct sequence one[] = {{70, 1}}, few[] = {{0, 7}, {66, 2}, {130, 1}}, prompt[] = {{60, 40}},
                                 chunk[] = {{61, 70}}, large[] = {{3, 200}, {0, 1}};
    static const struct {
        llaisysDataType_t dtype;
        size_t hidden, nhead, nkvhead, head_dim, ffn;
    } shapes[] = {{LLAISYS_DTYPE_BF16, 256, 4, 2, 64, 328},
                  {LLAISYS_DTYPE_BF16, 128, 6, 1, 128, 4160},
                  {LLAISYS_DTYPE_F16, 128, 2, 1, 64, 200},
                  {LLAISYS_DTYPE_F16, 100, 3, 1, 24, 101},
                  {LLAISYS_DTYPE_F32, 72, 3, 1, 16, 101}};
    for (size_t i = 0; i < sizeof shapes / sizeof *shapes; i++) {
        struct lla_spec spec = shape(shapes[i].dtype, shapes[i].hidden, shapes[i].nhead, shapes[i].nkvhead,
                                     shapes[i].head_dim, shapes[i].ffn, 77, i % 2);
        struct pair p;
        const struct lla_limits limits = {
            .max_seq = 256, .max_seqs = 3, .kv_tokens = 768, .kv_block = 16, .prefill_chunk = 256};
        spec.nlayer = 1;
        if (!make_with(&p, &spec, limits)) return;
        const double bound = bound_of(spec.dtype);
        compare(&p, one, 1, bound);
        compare(&p, few, 3, bound);
        compare(&p, prompt, 1, bound);
        compare(&p, chunk, 1, bound);
        compare(&p, large, 2, bound);
        if (!spec.tied) {
            store_equal_rows(&p);
            compare(&p, few, 3, bound);
        }
        unmake(&p);
    }
}

/* The logits of one sequence's prompt and some decode steps: alone, and among others in every bucket. */
static void compare_buckets(struct lla_spec spec, size_t max_batch) {
    struct pair p;
    if (!make(&p, &spec, max_batch, 64)) return;
    enum { PROMPT = 40, NEW = 6 };
    const size_t vocab = spec.vocab;
    float *alone = malloc(NEW * vocab * sizeof *alone), *among = malloc(vocab * sizeof *among);
    int64_t prompt[PROMPT], others[128][2], first = 0;
    for (int i = 0; i < PROMPT; i++) prompt[i] = draw() % vocab;
    int32_t blocks[128][8];
    for (int s = 0; s < 128; s++)
        for (int b = 0; b < 8; b++) blocks[s][b] = s == 0 ? 1 + b : 9 + s % 64;
    for (size_t batch = 1, then; batch <= max_batch; batch = then) {
        then = batch < 4 ? batch + 1 : batch * 2;
        if (batch < max_batch && then > max_batch) then = max_batch; /* a bucket of its own */
        struct lla_step_seq seqs[128];
        int64_t next[128], token = 0;
        for (size_t done = 0; done < PROMPT; done += batch == 2 ? 7 : PROMPT) {
            const size_t n = batch == 2 && PROMPT - done > 7 ? 7 : PROMPT - done;
            seqs[0] = (struct lla_step_seq){.slot = 0,
                                            .tokens = prompt + done,
                                            .ntoken = n,
                                            .position0 = done,
                                            .blocks = blocks[0],
                                            .want_next = true};
            CHECK_INT(lla_runner_step(&p.gpu, seqs, 1, next), LLA_OK);
        }
        token = next[0];
        if (batch == 1) first = token;
        CHECK_INT(token, first);
        for (int t = 0; t < NEW; t++) {
            const size_t place = batch / 2; /* not the first row */
            for (size_t s = 0; s < batch; s++) {
                others[s][0] = draw() % vocab;
                seqs[s] = (struct lla_step_seq){.slot = s == place  ? 0
                                                        : s < place ? s + 1
                                                                    : s,
                                                .tokens = s == place ? &token : others[s],
                                                .ntoken = 1,
                                                .position0 = s == place ? (size_t)(PROMPT + t) : 3,
                                                .blocks = s == place ? blocks[0] : blocks[s < place ? s + 1 : s],
                                                .want_next = true};
            }
            const lla_status status = lla_runner_step(&p.gpu, seqs, batch, next);
            if (status) printf("  %s\n", lla_last_error());
            CHECK_INT(status, LLA_OK);
            token = next[place];
            lla_runner_logits(&p.gpu, place, batch == 1 ? alone + t * vocab : among);
            if (batch > 1) {
                const int same = !memcmp(among, alone + t * vocab, vocab * sizeof *among);
                if (!same) printf("  batch %zu step %d differs\n", batch, t);
                CHECK(same);
            }
        }
    }
    free(alone);
    free(among);
    unmake(&p);
}

TEST(bits_do_not_depend_on_the_bucket) {
    need_gpu();
    compare_buckets(shape(LLAISYS_DTYPE_BF16, 512, 8, 2, 64, 1408, 3000, false), 64);
    compare_buckets(shape(LLAISYS_DTYPE_BF16, 512, 8, 2, 64, 1408, 3000, false), 100);
    compare_buckets(shape(LLAISYS_DTYPE_F16, 240, 10, 2, 24, 584, 1000, true), 48);
}

TEST(quick_graphs) {
    need_gpu();
    compare_buckets(shape(LLAISYS_DTYPE_BF16, 128, 4, 1, 64, 328, 300, false), 24);
}

enum { LONG_PROMPT = 300 };

/* Logits behind a prompt that was fed in these chunks (the last size again and again), and keys and values of all
 * layers. What memory held before is poison. */
static void run_chunks(struct lla_runner *r, const int64_t *prompt, const size_t *chunks, float *logits, char *kv) {
    const struct lla_graph *g = &r->graph;
    const size_t bytes = g->kv_layer_stride * g->plan.spec.nlayer;
    memset(kv, 0xff, 2 * bytes);
    lla_exec_cuda_write(r->cuda, g->offset[LLA_B_K_CACHE], bytes, kv);
    lla_exec_cuda_write(r->cuda, g->offset[LLA_B_V_CACHE], bytes, kv);
    int32_t blocks[16];
    for (int b = 0; b < 16; b++) blocks[b] = 3 + 2 * b;
    int64_t next;
    for (size_t done = 0, n; done < LONG_PROMPT; done += n) {
        n = LONG_PROMPT - done < *chunks ? LONG_PROMPT - done : *chunks;
        if (chunks[1]) chunks++;
        const struct lla_step_seq seq = {
            .tokens = prompt + done, .ntoken = n, .position0 = done, .blocks = blocks, .want_next = true};
        const lla_status status = lla_runner_step(r, &seq, 1, &next);
        if (status) printf("  %s\n", lla_last_error());
        CHECK_INT(status, LLA_OK);
    }
    lla_runner_logits(r, 0, logits);
    lla_exec_cuda_read(r->cuda, g->offset[LLA_B_K_CACHE], bytes, kv);
    lla_exec_cuda_read(r->cuda, g->offset[LLA_B_V_CACHE], bytes, kv + bytes);
}

static void compare_chunks(struct lla_spec spec, const size_t (*chunks)[8], size_t count) {
    struct pair p;
    if (!make(&p, &spec, 1, 300)) return;
    const size_t bytes = 2 * p.gpu.graph.kv_layer_stride * spec.nlayer;
    float *whole = malloc(spec.vocab * sizeof *whole), *logits = malloc(spec.vocab * sizeof *logits);
    char *whole_kv = malloc(bytes), *kv = malloc(bytes);
    int64_t prompt[LONG_PROMPT];
    for (int i = 0; i < LONG_PROMPT; i++) prompt[i] = draw() % spec.vocab;
    run_chunks(&p.gpu, prompt, (const size_t[]){LONG_PROMPT, 0}, whole, whole_kv);
    CHECK(isfinite(whole[0]));
    for (size_t i = 0; i < count; i++) {
        run_chunks(&p.gpu, prompt, chunks[i], logits, kv);
        const int same_logits = !memcmp(whole, logits, spec.vocab * sizeof *whole),
                  same_kv = !memcmp(whole_kv, kv, bytes);
        if (!same_logits || !same_kv)
            printf("  head_dim %zu, chunks of %zu, %zu, ...: %s differ\n", spec.head_dim, chunks[i][0], chunks[i][1],
                   same_logits ? "keys and values" : "logits");
        CHECK(same_logits && same_kv);
    }
    free(whole);
    free(logits);
    free(whole_kv);
    free(kv);
    unmake(&p);
}

static const struct {
    llaisysDataType_t dtype;
    size_t hidden, nhead, nkvhead, head_dim, ffn;
} chunked_shapes[] = {{LLAISYS_DTYPE_BF16, 512, 8, 2, 64, 1408},
                      {LLAISYS_DTYPE_BF16, 384, 6, 1, 128, 4160},
                      {LLAISYS_DTYPE_BF16, 200, 14, 2, 64, 584},
                      {LLAISYS_DTYPE_F16, 384, 28, 2, 128, 1408},
                      {LLAISYS_DTYPE_F16, 256, 28, 2, 64, 4160}};

static void compare_all_chunks(const size_t (*chunks)[8], size_t count) {
    for (size_t i = 0; i < sizeof chunked_shapes / sizeof *chunked_shapes; i++)
        compare_chunks(shape(chunked_shapes[i].dtype, chunked_shapes[i].hidden, chunked_shapes[i].nhead,
                             chunked_shapes[i].nkvhead, chunked_shapes[i].head_dim, chunked_shapes[i].ffn, 1000, false),
                       chunks, count);
}

/* In chunks that are all computed by the kernels for many rows. */
TEST(bits_do_not_depend_on_large_chunks) {
    need_gpu();
    static const size_t chunks[][8] = {{65, 170, 65}, {100}, {150}, {233, 67}};
    compare_all_chunks(chunks, 4);
}

/* In chunks for the kernels for few rows, too. */
TEST(bits_do_not_depend_on_small_chunks) {
    need_gpu();
    static const size_t chunks[][8] = {{64}, {7}, {200, 1}, {1, 150, 20}};
    compare_all_chunks(chunks, 4);
}

RUN_TESTS()
