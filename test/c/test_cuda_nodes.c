/* The CUDA executor against the CPU's, node by node, with the same inputs and poisoned activations; and against itself:
 * the graph gives the bits of the single nodes, and a sequence's logits do not depend on the bucket or on the other
 * rows. Skips without a GPU. */
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

static bool make(struct pair *p, const struct lla_spec *spec, size_t max_seqs, size_t chunk) {
    struct lla_limits limits = {
        .max_seq = 700, .max_seqs = max_seqs, .kv_tokens = 700 * 4, .kv_block = 32, .prefill_chunk = chunk};
    if (limits.kv_tokens < limits.max_seq) limits.kv_tokens = limits.max_seq;
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

/* One step of the sequences on both, node by node: after each node its results are compared, and the CPU's are copied
 * to the GPU. */
static void compare(struct pair *p, const struct sequence *seqs, size_t nseq, double bound) {
    const struct lla_graph *c = &p->cpu.graph, *g = &p->gpu.graph;
    const struct lla_dims *d = &c->dims;
    const size_t e = lla_dtype_size(d->dtype);
    size_t rows = 0, block = 1;
    for (size_t i = 0; i < nseq; i++) rows += seqs[i].ntoken;
    for (int id = 0; id < LLA_B_COUNT; id++) { /* poison */
        if (id < LLA_B_X || id == LLA_B_LOGITS) continue;
        const size_t n = c->plan.regions[0].nbytes ? compared(c, id, rows, nseq) * e : 0;
        if (!n) continue;
        char *bytes = malloc(n);
        memset(bytes, 0xff, n);
        lla_exec_cuda_write(p->gpu.cuda, g->offset[id], n, bytes);
        free(bytes);
    }
    /* keys and values of earlier positions: random, the same on both */
    for (int id = LLA_B_K_CACHE; id <= LLA_B_V_CACHE; id++) {
        const size_t n = compared(c, id, 0, 0);
        char *kv = p->cpu.arena + c->offset[id];
        for (size_t i = 0; i < n; i++) lla_store_float(kv, i, uniform(), d->dtype);
        lla_exec_cuda_write(p->gpu.cuda, g->offset[id], n * e, kv);
    }
    int32_t *header = (int32_t *)(p->cpu.arena + c->io.header), *tokens = (int32_t *)(p->cpu.arena + c->io.tokens);
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
    header[0] = (int32_t)rows;
    header[1] = (int32_t)nseq;
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
        for (int id = 0; id < LLA_B_COUNT; id++) {
            const size_t n = compared(c, id, rows, nseq);
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
    int32_t next[64];
    lla_exec_cuda_read(p->gpu.cuda, g->io.next, nseq * sizeof *next, next);
    for (size_t i = 0; i < nseq; i++) CHECK_INT(next[i], ((int32_t *)(p->cpu.arena + c->io.next))[i]);
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

static void compare_shape(struct lla_spec spec) {
    static const struct sequence one[] = {{5, 1}}, deep[] = {{650, 1}}, three[] = {{0, 1}, {127, 1}, {128, 1}};
    static const struct sequence mixed[] = {{0, 20}, {300, 1}, {130, 12}}, prompt[] = {{100, 64}},
                                 many[] = {{7, 9}, {3, 8}};
    /* more than 64 rows: the kernels for many */
    static const struct sequence barely[] = {{0, 65}}, chunk[] = {{61, 130}}, two[] = {{0, 200}, {333, 57}},
                                 large[] = {{128, 500}}, among[] = {{40, 90}, {650, 1}, {0, 140}};
    struct pair p;
    if (!make(&p, &spec, 3, 512)) return;
    const double bound = spec.dtype == LLAISYS_DTYPE_F32 ? 2e-5 : spec.dtype == LLAISYS_DTYPE_F16 ? 4e-3 : 2e-2;
    compare(&p, one, 1, bound);
    compare(&p, deep, 1, bound);
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

/* The logits of one sequence's prompt and some decode steps: alone, and among others in every bucket. */
TEST(bits_do_not_depend_on_the_bucket) {
    need_gpu();
    struct lla_spec spec = shape(LLAISYS_DTYPE_BF16, 512, 8, 2, 64, 1408, 3000, false);
    struct pair p;
    if (!make(&p, &spec, 64, 64)) return;
    enum { PROMPT = 40, NEW = 6 };
    const size_t vocab = spec.vocab;
    float *alone = malloc(NEW * vocab * sizeof *alone), *among = malloc(vocab * sizeof *among);
    int64_t prompt[PROMPT], others[64][2], first = 0;
    for (int i = 0; i < PROMPT; i++) prompt[i] = draw() % vocab;
    int32_t blocks[64][8];
    for (int s = 0; s < 64; s++)
        for (int b = 0; b < 8; b++) blocks[s][b] = s == 0 ? 1 + b : 9 + s % 64;
    for (size_t batch = 1; batch <= 64; batch = batch < 4 ? batch + 1 : batch * 2) {
        struct lla_step_seq seqs[64];
        int64_t next[64], token = 0;
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
    size_t hidden, nhead, nkvhead, head_dim, ffn;
} chunked_shapes[] = {{512, 8, 2, 64, 1408}, {384, 6, 1, 128, 4160}, {200, 14, 2, 64, 584}};

/* In chunks that are all computed by the kernels for many rows. */
TEST(bits_do_not_depend_on_large_chunks) {
    need_gpu();
    static const size_t chunks[][8] = {{65, 170, 65}, {100}, {150}, {233, 67}};
    for (size_t i = 0; i < 3; i++)
        compare_chunks(shape(LLAISYS_DTYPE_BF16, chunked_shapes[i].hidden, chunked_shapes[i].nhead,
                             chunked_shapes[i].nkvhead, chunked_shapes[i].head_dim, chunked_shapes[i].ffn, 1000, false),
                       chunks, 4);
}

/* In chunks for the kernels for few rows, too. */
TEST(bits_do_not_depend_on_small_chunks) {
    need_gpu();
    static const size_t chunks[][8] = {{64}, {7}, {200, 1}, {1, 150, 20}};
    for (size_t i = 0; i < 3; i++)
        compare_chunks(shape(LLAISYS_DTYPE_BF16, chunked_shapes[i].hidden, chunked_shapes[i].nhead,
                             chunked_shapes[i].nkvhead, chunked_shapes[i].head_dim, chunked_shapes[i].ffn, 1000, false),
                       chunks, 4);
}

RUN_TESTS()
