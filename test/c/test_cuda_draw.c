/* The GPU's sample node against lla_cpu_draw: from the same logits the same token and the same log-probabilities, to
 * the bit, whatever a row asks for and whatever stands beside it. (Where a logit is NaN, all log-probabilities are, and
 * which tokens they name is left open but for the first.) Skips without a GPU.
 *
 * `test_cuda_draw bench` prints what draws from a vocabulary of 151,936 cost. */
#include "../../engine/device.h"
#include "../../engine/runner.h"
#include "../../graph/exec_cuda.h"
#include "harness.h"
#include "random.h"

#include <math.h>
#include <stdlib.h>

enum { ROWS = 16, MAX_ROWS = 160, MAX_SEQ = 320, BLOCK = 16 };

static void need_gpu(void) {
    if (lla_device_get(LLAISYS_DEVICE_NVIDIA)->count() > 0) return;
    printf("SKIPPED: no GPU\n");
    exit(77);
}

static struct lla_runner gpu;
static struct row {
    struct lla_sampling_row how;
    int64_t known[MAX_SEQ];
    size_t nknown;
    struct lla_bias bias[LLA_MAX_BIAS];
    uint32_t *mask; /* NULL: none */
} rows[ROWS];

/* Normal values, all equal ones, many ties, mostly -infinity, some that are no numbers. */
static void fill(struct rng *rng, void *row, size_t n, llaisysDataType_t dtype) {
    const size_t kind = rng_below(rng, 10);
    const float scale = (float[]){0.1f, 1, 4, 20}[rng_below(rng, 4)];
    for (size_t i = 0; i < n; i++) {
        float v = scale * rng_normal(rng);
        if (kind == 1) v = 2.5f;
        if (kind == 2) v = (float)rng_below(rng, 4) - 1;
        if (kind == 2 && v == 0 && i % 2) v = -0.0f;
        if (kind == 3 && rng_below(rng, 3)) v = -INFINITY;
        if (kind == 4 && rng_below(rng, 100) == 0) v = rng_below(rng, 2) ? NAN : -NAN;
        if (kind == 5 && rng_below(rng, n) == 0) v = INFINITY;
        lla_store_float(row, i, v, dtype);
    }
}

static void choose_how(struct rng *rng, struct row *r, size_t n) {
    struct lla_sampling_row *s = &r->how;
    *s = (struct lla_sampling_row){.temperature = (float[]){0.05f, 0.3f, 0.8f, 1, 1.5f, 10}[rng_below(rng, 6)],
                                   .top_p = (float[]){1, 1, 0.95f, 0.5f, 0.05f, 0}[rng_below(rng, 6)],
                                   .min_p = (float[]){0, 0, 0.01f, 0.3f, 1}[rng_below(rng, 5)],
                                   .seed = rng_next(rng)};
    if (rng_below(rng, 2)) s->top_k = (int32_t)rng_range(rng, 1, rng_below(rng, 2) ? 50 : n + 2);
    if (rng_below(rng, 6) == 0) s->temperature = 0;
    if (rng_below(rng, 30) == 0) s->temperature = (float[]){1e-45f, 1e-30f, 3e38f}[rng_below(rng, 3)];
    if (rng_below(rng, 2)) {
        s->repetition = (float[]){0, 1, 1.3f, 0.7f}[rng_below(rng, 4)];
        s->presence = (float[]){0, 0.5f, -1}[rng_below(rng, 3)];
        s->frequency = (float[]){0, 0.25f, -0.125f}[rng_below(rng, 3)];
    }
    if (rng_below(rng, 2)) s->nbias = (int32_t)rng_range(rng, 1, rng_below(rng, 4) ? 40 : LLA_MAX_BIAS);
    if (rng_below(rng, 2)) s->nlogprob = (int32_t)rng_range(rng, 1, LLA_MAX_LOGPROB);
    if (rng_below(rng, 6) == 0) *s = (struct lla_sampling_row){0}; /* plain rows among them */
    for (int32_t i = 0; i < s->nbias; i++)                         /* several for one token, often */
        r->bias[i] = (struct lla_bias){(int32_t)rng_below(rng, rng_below(rng, 2) ? n
                                                               : n < 9           ? n
                                                                                 : 9),
                                       (float[]){-100, 100, 0.3f, -2.7f, -INFINITY}[rng_below(rng, 5)]};
    r->nknown = rng_range(rng, 1, MAX_SEQ);
    s->position = (int32_t)r->nknown - 1;
    s->nprompt = (int32_t)rng_below(rng, r->nknown + 1);
    for (size_t i = 0; i < r->nknown; i++)
        r->known[i] = (int64_t)rng_below(rng, rng_below(rng, 2) ? n : n < 30 ? n : 30);
}

static void put(size_t offset, const void *from, size_t nbytes) {
    CHECK_INT(lla_exec_cuda_write(gpu.cuda, offset, nbytes, from), LLA_OK);
}

/* One step's rows on the device: the blocks of a sequence in any order, what is not written poison. */
static void put_rows(struct rng *rng, size_t nrow, size_t nmask, const uint32_t *masks) {
    const struct lla_graph *g = &gpu.graph;
    const struct lla_io *io = &g->io;
    const size_t per_seq = MAX_SEQ / BLOCK;
    const struct lla_step_header header = {(int32_t)nrow, (int32_t)nrow};
    struct lla_sampling_row how[ROWS];
    int32_t indices[ROWS], seqs[ROWS], blocks[ROWS * MAX_SEQ / BLOCK], table[ROWS * MAX_SEQ / BLOCK];
    static int32_t tokens[(ROWS * MAX_SEQ / BLOCK + 1) * BLOCK];
    static struct lla_bias bias[ROWS * LLA_MAX_BIAS];
    static char poison[ROWS * sizeof(struct lla_odds)];
    size_t nbias = 0;
    for (size_t i = 0; i < ROWS * per_seq; i++) blocks[i] = 1 + (int32_t)i;
    rng_shuffle(rng, blocks, ROWS * per_seq);
    memset(tokens, 0xff, sizeof tokens);
    memset(poison, 0xff, sizeof poison);
    for (size_t i = 0; i < nrow; i++) {
        indices[i] = (int32_t)i;
        seqs[i] = (int32_t)(nrow - 1 - i); /* slots */
        int32_t *mine = table + (size_t)seqs[i] * per_seq;
        memcpy(mine, blocks + i * per_seq, per_seq * sizeof *mine);
        for (size_t p = 0; p < rows[i].nknown; p++)
            tokens[(size_t)mine[p / BLOCK] * BLOCK + p % BLOCK] = (int32_t)rows[i].known[p];
        rows[i].how.first_bias = (int32_t)nbias;
        memcpy(bias + nbias, rows[i].bias, (size_t)rows[i].how.nbias * sizeof *bias);
        nbias += (size_t)rows[i].how.nbias;
        how[i] = rows[i].how;
    }
    put(io->header, &header, sizeof header);
    put(io->logit_rows, indices, nrow * sizeof *indices);
    put(io->row_seq, seqs, nrow * sizeof *seqs);
    put(io->block_table, table, nrow * per_seq * sizeof *table);
    put(io->sampling, how, nrow * sizeof *how);
    if (nbias) put(io->bias, bias, nbias * sizeof *bias);
    if (nmask) put(io->mask, masks, nmask * ((g->dims.vocab + 31) / 32) * sizeof *masks);
    put(io->kv_tokens, tokens, sizeof tokens);
    put(io->next, poison, nrow * sizeof(int32_t));
    put(io->odds, poison, nrow * sizeof(struct lla_odds));
}

static void check_row(size_t i, const char *logits, struct lla_candidate *scratch, int32_t drawn,
                      const struct lla_odds *odds) {
    const struct lla_dims *d = &gpu.graph.dims;
    const struct row *r = &rows[i];
    struct lla_candidate expected[LLA_MAX_LOGPROB], found[LLA_MAX_LOGPROB];
    const size_t nlogprob = (size_t)r->how.nlogprob;
    const struct lla_draw draw = {.dtype = d->dtype,
                                  .n = d->vocab,
                                  .logits = logits,
                                  .how = &r->how,
                                  .known = r->known,
                                  .nknown = r->nknown,
                                  .nprompt = (size_t)r->how.nprompt,
                                  .bias = r->bias,
                                  .mask = r->mask,
                                  .scratch = scratch,
                                  .logprobs = expected};
    const int32_t token = lla_cpu_draw(&draw);
    lla_finish_logprobs(odds, nlogprob, found);
    bool same = drawn == token;
    for (size_t j = 0; j < nlogprob; j++)
        same = same &&
               (isnan(expected[j].value) ? isnan(found[j].value) && (j || expected[j].token == found[j].token)
                                         : expected[j].value == found[j].value && expected[j].token == found[j].token);
    if (same) return;
    HARNESS_FAIL("row %zu of %zu %s: token %d, expected %d (temperature %g, top_k %d, top_p %g, min_p %g, penalties %g "
                 "%g %g, %d biases, %d log-probabilities, %s)",
                 i, d->vocab, lla_dtype_name(d->dtype), drawn, token, (double)r->how.temperature, r->how.top_k,
                 (double)r->how.top_p, (double)r->how.min_p, (double)r->how.repetition, (double)r->how.presence,
                 (double)r->how.frequency, r->how.nbias, r->how.nlogprob, r->mask ? "masked" : "no mask");
    for (size_t j = 0; j < nlogprob && drawn == token; j++)
        printf("  %zu: %d %.9g, expected %d %.9g\n", j, found[j].token, (double)found[j].value, expected[j].token,
               (double)expected[j].value);
}

/* A model that is little but its vocabulary. */
static bool open_vocab(llaisysDataType_t dtype, size_t vocab, size_t max_seqs) {
    const struct lla_spec spec = {dtype, 1, 16, 1, 1, 16, 16, vocab, 4096, false, 1e-6f, 1e4, {0}, 0};
    const struct lla_limits limits = {.device = LLAISYS_DEVICE_NVIDIA,
                                      .max_seq = MAX_SEQ,
                                      .max_seqs = max_seqs,
                                      .kv_tokens = ROWS * MAX_SEQ,
                                      .kv_block = BLOCK,
                                      .prefill_chunk = max_seqs};
    const lla_status status = lla_runner_create(&spec, &limits, (struct lla_shard){0, 1}, 0, 1, &gpu);
    if (status) printf("  %s\n", lla_last_error());
    CHECK_INT(status, LLA_OK);
    return !status;
}

static void check_vocab(llaisysDataType_t dtype, size_t vocab, size_t rounds, uint64_t seed) {
    if (!open_vocab(dtype, vocab, MAX_ROWS)) return;
    const size_t row_bytes = vocab * lla_dtype_size(dtype), words = (vocab + 31) / 32;
    char *logits = malloc(ROWS * row_bytes);
    uint32_t *masks = malloc(ROWS * words * sizeof *masks);
    struct lla_candidate *scratch = malloc(vocab * sizeof *scratch);
    struct rng rng = {seed};
    for (size_t round = 0; round < rounds && TEST_FAILURES < 5; round++) {
        const size_t nrow = rng_range(&rng, 1, ROWS);
        size_t nmask = 0, bucket = 0;
        for (size_t i = 0; i < nrow; i++) {
            fill(&rng, logits + i * row_bytes, vocab, dtype);
            choose_how(&rng, &rows[i], vocab);
            rows[i].mask = NULL;
            if (rng_below(&rng, 3)) continue;
            rows[i].mask = masks + nmask * words;
            rows[i].how.mask = 1 + (int32_t)nmask++;
            const size_t share = rng_below(&rng, 3);
            for (size_t w = 0; w < words; w++) /* about half, few, or one */
                rows[i].mask[w] = share == 0   ? (uint32_t)rng_next(&rng)
                                  : share == 1 ? 1u << rng_below(&rng, 32) & (uint32_t)rng_next(&rng)
                                               : 0;
            const size_t one = rng_below(&rng, vocab);
            rows[i].mask[one / 32] |= 1u << one % 32;
        }
        put_rows(&rng, nrow, nmask, masks);
        put(gpu.graph.offset[LLA_B_LOGITS], logits, nrow * row_bytes);
        while (gpu.programs[bucket].logits < nrow) bucket++;
        bucket += rng_below(&rng, gpu.nprogram - bucket); /* more blocks share a row where there are few */
        const struct lla_program *p = &gpu.programs[bucket];
        CHECK_INT(p->nodes[p->nnode - 1].op, LLA_OP_SAMPLE);
        const lla_status ran = lla_exec_cuda_nodes(gpu.cuda, p, p->nnode - 1, p->nnode);
        if (ran) printf("  %s\n", lla_last_error());
        CHECK_INT(ran, LLA_OK);
        if (ran) break;
        int32_t next[ROWS];
        struct lla_odds odds[ROWS];
        lla_exec_cuda_read(gpu.cuda, gpu.graph.io.next, nrow * sizeof *next, next);
        lla_exec_cuda_read(gpu.cuda, gpu.graph.io.odds, nrow * sizeof *odds, odds);
        for (size_t i = 0; i < nrow; i++) check_row(i, logits + i * row_bytes, scratch, next[i], &odds[i]);
    }
    free(logits);
    free(masks);
    free(scratch);
    lla_runner_destroy(&gpu);
}

TEST(draws_as_the_cpu) {
    need_gpu();
    check_vocab(LLAISYS_DTYPE_BF16, 1536, 150, 1);
    check_vocab(LLAISYS_DTYPE_F16, 5000, 80, 2);
    check_vocab(LLAISYS_DTYPE_F32, 2048, 80, 3);
    check_vocab(LLAISYS_DTYPE_F32, 301, 80, 4); /* rows that do not begin on 16 bytes */
    check_vocab(LLAISYS_DTYPE_BF16, 101, 80, 5);
    check_vocab(LLAISYS_DTYPE_BF16, 3, 40, 6);
}

TEST(draws_from_a_large_vocabulary) {
    need_gpu();
    check_vocab(LLAISYS_DTYPE_BF16, 151936, 12, 7);
    check_vocab(LLAISYS_DTYPE_F32, 151669, 5, 8);
}

/* ---- what it costs ---- */

static int bench(void) {
    enum { VOCAB = 151936, MOST = 256 };
    static const struct {
        const char *name;
        struct lla_sampling_row how;
    } cases[] = {{"greedy", {0}},
                 {"temperature 1", {.temperature = 1, .top_p = 1}},
                 {"temperature 1, top_k 50", {.temperature = 1, .top_p = 1, .top_k = 50}},
                 {"temperature 1, top_p 0.9", {.temperature = 1, .top_p = 0.9f}},
                 {"temperature 0.6, top_p 0.95", {.temperature = 0.6f, .top_p = 0.95f}},
                 {"the same, top_k 20, min_p 0.05", {.temperature = 0.6f, .top_p = 0.95f, .top_k = 20, .min_p = 0.05f}},
                 {"greedy, with a penalty over 300 tokens", {.repetition = 1.1f, .position = 299}},
                 {"greedy, 20 log-probabilities", {.nlogprob = 21}}};
    need_gpu();
    if (!open_vocab(LLAISYS_DTYPE_BF16, VOCAB, MOST)) return 1;
    struct rng rng = {2};
    uint16_t *row = malloc(VOCAB * sizeof *row);
    for (size_t i = 0; i < VOCAB; i++) row[i] = lla_f32_to_bf16(3 * rng_normal(&rng));
    for (size_t r = 0; r < MOST; r++)
        put(gpu.graph.offset[LLA_B_LOGITS] + r * VOCAB * sizeof *row, row, VOCAB * sizeof *row);
    printf("us of the sample node and the step's copies, median of 200, vocabulary %d, bf16\n%-40s", VOCAB, "rows");
    char *inputs = lla_exec_cuda_inputs(gpu.cuda, 0);
    for (size_t many = 1; many <= MOST; many *= 4) printf("%8zu", many);
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        printf("\n%-40s", cases[i].name);
        for (size_t many = 1; many <= MOST; many *= 4) {
            *(struct lla_step_header *)(inputs + gpu.graph.io.header) =
                (struct lla_step_header){(int32_t)many, (int32_t)many};
            for (size_t r = 0; r < many; r++) {
                struct lla_sampling_row how = cases[i].how;
                how.seed = r;
                memcpy(inputs + gpu.graph.io.sampling + r * sizeof how, &how, sizeof how);
            }
            double ms[3];
            size_t bucket = 0;
            while (gpu.programs[bucket].logits < many) bucket++;
            if (lla_exec_cuda_time(gpu.cuda, &gpu.programs[bucket], ~(1u << LLA_OP_SAMPLE), 200, ms)) return 1;
            printf("%8.1f", 1e3 * ms[0]);
        }
    }
    printf("\n");
    free(row);
    lla_runner_destroy(&gpu);
    return 0;
}

int main(int argc, char **argv) {
    if (argc > 1 && !strcmp(argv[1], "bench")) return bench();
    return harness_main(argc > 1 ? argv[1] : NULL);
}
