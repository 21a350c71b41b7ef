#include "runner.h"

#include "arena.h"

#ifdef LLA_CUDA
#include "../graph/exec_cuda.h"
#endif

#include <stdlib.h>
#include <time.h>

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static lla_status add_bucket(struct lla_runner *r, size_t rows, size_t logits) {
    if (r->nprogram && r->programs[r->nprogram - 1].rows >= rows) return LLA_OK;
    LLA_REQUIRE(r->nprogram < LLA_MAX_BUCKETS, LLA_ELIMIT, "more than %d buckets", LLA_MAX_BUCKETS);
    LLA_TRY(lla_program_build(&r->graph, rows, logits, &r->programs[r->nprogram]));
    r->nprogram++;
    return LLA_OK;
}

/* Decode: 1, 2, 4, ... up to max_seqs rows; prefill above that, up to the largest step: four times, from 64 rows on
 * twice the one before (a GPU's kernels look at the step's rows, but their tiles are chosen for the bucket's). */
static lla_status build_buckets(struct lla_runner *r) {
    const size_t seqs = r->graph.dims.max_seqs, rows = r->graph.dims.max_rows;
    size_t n = 1;
    for (; n < seqs; n *= 2) LLA_TRY(add_bucket(r, n, n));
    LLA_TRY(add_bucket(r, seqs, seqs));
    for (n *= n < 64 ? 4 : 2; n < rows; n *= n < 64 ? 4 : 2) LLA_TRY(add_bucket(r, n, seqs));
    return add_bucket(r, rows, seqs);
}

static lla_status create_cpu(struct lla_runner *r) {
    LLA_TRY(lla_plan_fit(&r->graph.plan, lla_memory_available()));
    LLA_TRY(lla_arena_alloc(r->graph.plan.total, &r->arena));
    lla_graph_init_arena(&r->graph, r->arena);
    r->inputs = r->base = r->arena;
    return LLA_OK;
}

#ifdef LLA_CUDA
static lla_status create_cuda(struct lla_runner *r, int device_id) {
    size_t available;
    LLA_TRY(lla_exec_cuda_available(device_id, &available));
    LLA_TRY(lla_plan_fit(&r->graph.plan, available));
    LLA_TRY(lla_exec_cuda_create(&r->graph, device_id, &r->cuda));
    r->inputs = lla_exec_cuda_inputs(r->cuda);
    r->base = lla_exec_cuda_arena(r->cuda);
    const size_t vocab = r->graph.dims.vocab;
    r->candidates = malloc(vocab * sizeof *r->candidates);
    r->logits_row = malloc(vocab * lla_dtype_size(r->graph.dims.dtype));
    LLA_REQUIRE(r->candidates && r->logits_row, LLA_ENOMEM, "no memory to draw from a vocabulary of %zu", vocab);
    return LLA_OK;
}
#endif

lla_status lla_runner_create(const struct lla_spec *spec, const struct lla_limits *limits, struct lla_shard shard,
                             int device_id, int nthread, struct lla_runner *runner) {
    memset(runner, 0, sizeof *runner);
    lla_status status;
    LLA_TRY(lla_graph_make(spec, limits, shard, &runner->graph));
    LLA_TRY_GOTO(status, lla_crew_create(nthread > 0 ? (size_t)nthread : 0, &runner->crew), fail);
    const double start = now();
    if (limits->device == LLAISYS_DEVICE_CPU)
        status = create_cpu(runner);
    else
#ifdef LLA_CUDA
        status = create_cuda(runner, device_id);
#else
        status = lla_fail(LLA_EDEVICE, "device nvidia (%d) was asked for, but this build has no CUDA", device_id);
#endif
    (void)device_id;
    if (status) goto fail;
    const double allocated = now();
    LLA_TRY_GOTO(status, build_buckets(runner), fail);
    runner->alloc_seconds = allocated - start;
    runner->build_seconds = now() - allocated;
    return LLA_OK;
fail:
    lla_runner_destroy(runner);
    return status;
}

void lla_runner_destroy(struct lla_runner *runner) {
#ifdef LLA_CUDA
    lla_exec_cuda_destroy(runner->cuda);
#endif
    free(runner->candidates);
    free(runner->logits_row);
    lla_crew_destroy(runner->crew);
    for (size_t i = 0; i < runner->nprogram; i++) lla_program_free(&runner->programs[i]);
    lla_arena_free(runner->arena, runner->graph.plan.total);
    lla_graph_free(&runner->graph);
    memset(runner, 0, sizeof *runner);
}

lla_status lla_runner_store(struct lla_runner *r, const struct lla_weight *w, size_t dst_row, size_t rows,
                            const void *dense) {
#ifdef LLA_CUDA
    if (r->cuda) return lla_exec_cuda_store(r->cuda, w, dst_row, rows, dense);
#endif
    const size_t row_bytes = w->cols * lla_dtype_size(r->graph.dims.dtype);
    memcpy(r->arena + w->offset + dst_row * row_bytes, dense, rows * row_bytes);
    return LLA_OK;
}

lla_status lla_runner_ready(struct lla_runner *r) {
    if (r->is_ready) return LLA_OK;
#ifdef LLA_CUDA
    const double start = now();
    if (r->cuda) LLA_TRY(lla_exec_cuda_capture(r->cuda, r->programs, r->nprogram));
    r->build_seconds += now() - start;
#endif
    r->is_ready = true;
    return LLA_OK;
}

/* What a draw reads beside the logits. */
static lla_status check_draw(const struct lla_runner *r, const struct lla_step_seq *s) {
    const size_t vocab = r->graph.dims.vocab, nknown = s->position0 + s->ntoken;
    const struct lla_sampling_row *how = &s->sampling;
    LLA_REQUIRE((how->nbias >= 0 && (s->bias || !how->nbias)) && how->nlogprob >= 0 && (s->logprobs || !how->nlogprob),
                LLA_EINVAL, "%d biases or %d log-probabilities without memory for them", how->nbias, how->nlogprob);
    for (int32_t i = 0; i < how->nbias; i++)
        LLA_REQUIRE(s->bias[i].token >= 0 && (size_t)s->bias[i].token < vocab, LLA_EINVAL,
                    "bias of token %d, expected an id from 0 to %zu", s->bias[i].token, vocab - 1);
    if (!lla_has_penalty(how)) return LLA_OK;
    LLA_REQUIRE(s->known && s->nprompt <= nknown, LLA_EINVAL,
                "penalties need the sequence's %zu tokens, of which %zu would be the prompt's", nknown, s->nprompt);
    for (size_t i = 0; i < nknown; i++)
        LLA_REQUIRE(s->known[i] >= 0 && (uint64_t)s->known[i] < vocab, LLA_EINVAL,
                    "known token %zu is %lld, expected an id from 0 to %zu", i, (long long)s->known[i], vocab - 1);
    return LLA_OK;
}

static lla_status check(const struct lla_runner *r, const struct lla_step_seq *seqs, size_t nseq, size_t *rows,
                        size_t *logits) {
    const struct lla_dims *d = &r->graph.dims;
    const struct lla_plan *plan = &r->graph.plan;
    *rows = *logits = 0;
    for (size_t i = 0; i < nseq; i++) {
        const struct lla_step_seq *s = &seqs[i];
        LLA_REQUIRE(s->slot < d->max_seqs, LLA_EINVAL, "sequence slot %zu, expected less than %zu", s->slot,
                    d->max_seqs);
        LLA_REQUIRE(s->ntoken > 0, LLA_EINVAL, "a step needs at least one token of each sequence");
        LLA_REQUIRE(s->position0 <= plan->limits.max_seq && s->ntoken <= plan->limits.max_seq - s->position0,
                    LLA_ELIMIT, "%zu tokens behind %zu exceed the sequence limit of %zu tokens", s->ntoken,
                    s->position0, plan->limits.max_seq);
        for (size_t j = 0; j < s->ntoken; j++)
            LLA_REQUIRE(s->tokens[j] >= 0 && (uint64_t)s->tokens[j] < plan->spec.vocab, LLA_EINVAL,
                        "token %zu is %lld, expected an id from 0 to %zu", j, (long long)s->tokens[j],
                        plan->spec.vocab - 1);
        const size_t blocks = (s->position0 + s->ntoken + d->kv_block - 1) / d->kv_block;
        for (size_t b = 0; b < blocks; b++)
            LLA_REQUIRE(s->blocks[b] > 0 && (size_t)s->blocks[b] < plan->nblock, LLA_EINVAL,
                        "KV block %d, expected 1 to %zu", s->blocks[b], plan->nblock - 1);
        if (s->want_next) LLA_TRY(check_draw(r, s));
        *rows += s->ntoken;
        *logits += s->want_next;
    }
    LLA_REQUIRE(nseq > 0 && nseq <= d->max_seqs, LLA_ELIMIT, "a step of %zu sequences, the plan allows 1 to %zu", nseq,
                d->max_seqs);
    LLA_REQUIRE(*rows <= d->max_rows, LLA_ELIMIT, "a step of %zu rows, the plan allows 1 to %zu", *rows, d->max_rows);
    for (size_t i = 1; i < nseq; i++)
        for (size_t j = 0; j < i; j++)
            LLA_REQUIRE(seqs[i].slot != seqs[j].slot, LLA_EINVAL, "sequence slot %zu stands twice in a step",
                        seqs[i].slot);
    return LLA_OK;
}

/* ---- drawing ---- */

struct draws {
    struct lla_runner *runner;
    const struct lla_step_seq *seqs;
    size_t nseq, nthread;
    lla_status status;
};

static const struct lla_sampling_row *sampling_rows(const struct lla_runner *r) {
    return (const struct lla_sampling_row *)(r->inputs + r->graph.io.sampling);
}

/* The logits of a row, and scratch for a draw: on the CPU where they lie, each row with its own, so that threads can
 * draw at once; for a GPU one row at a time on the host. */
static lla_status fetch(struct lla_runner *r, size_t row, const void **logits, struct lla_candidate **scratch) {
    const size_t vocab = r->graph.dims.vocab, row_bytes = vocab * lla_dtype_size(r->graph.dims.dtype);
    const size_t offset = r->graph.offset[LLA_B_LOGITS] + row * row_bytes;
    if (r->arena) {
        *logits = r->arena + offset;
        *scratch = (struct lla_candidate *)(r->arena + r->graph.offset[LLA_B_CANDIDATES]) + row * vocab;
        return LLA_OK;
    }
    *logits = r->logits_row;
    *scratch = r->candidates;
#ifdef LLA_CUDA
    return lla_exec_cuda_read(r->cuda, offset, row_bytes, r->logits_row);
#else
    return LLA_OK;
#endif
}

/* Whether the largest logit, which the program has taken, is not the row's token. */
static bool is_drawn(const struct lla_sampling_row *how, const struct lla_step_seq *s) {
    return !lla_is_plain(how) || s->mask;
}

/* The thread's share of the rows that want more than the largest logit. */
static void draw_rows(void *arg, size_t rank) {
    struct draws *d = arg;
    struct lla_runner *r = d->runner;
    int32_t *next = (int32_t *)(r->inputs + r->graph.io.next);
    size_t row = 0, drawn = 0;
    for (size_t i = 0; i < d->nseq; i++) {
        const struct lla_step_seq *s = &d->seqs[i];
        if (!s->want_next) continue;
        const struct lla_sampling_row *how = &sampling_rows(r)[row];
        if (is_drawn(how, s) && drawn++ % d->nthread == rank) {
            struct lla_draw draw = {.dtype = r->graph.dims.dtype,
                                    .n = r->graph.dims.vocab,
                                    .how = how,
                                    .known = s->known,
                                    .nknown = s->position0 + s->ntoken,
                                    .nprompt = s->nprompt,
                                    .bias = s->bias,
                                    .mask = s->mask,
                                    .logprobs = s->logprobs};
            const lla_status status = fetch(r, row, &draw.logits, &draw.scratch);
            if (status)
                d->status = status; /* one thread alone reads from a GPU */
            else
                next[row] = lla_cpu_draw(&draw);
        }
        row++;
    }
}

/* The program has taken the largest logit of each row; rows that want more are drawn here, from the same logits. */
static lla_status draw(struct lla_runner *r, const struct lla_step_seq *seqs, size_t nseq) {
    struct draws d = {.runner = r, .seqs = seqs, .nseq = nseq, .nthread = 1};
    size_t count = 0, row = 0;
    for (size_t i = 0; i < nseq; i++)
        if (seqs[i].want_next) count += is_drawn(&sampling_rows(r)[row++], &seqs[i]);
    if (!count) return LLA_OK;
    if (r->arena && count > 1) {
        d.nthread = lla_crew_size(r->crew);
        lla_crew_run(r->crew, draw_rows, &d);
    } else {
        draw_rows(&d, 0);
    }
    return d.status;
}

lla_status lla_runner_step(struct lla_runner *r, const struct lla_step_seq *seqs, size_t nseq, int64_t *next) {
    size_t rows, logits;
    LLA_TRY(check(r, seqs, nseq, &rows, &logits));
    const struct lla_io *io = &r->graph.io;
    const struct lla_dims *d = &r->graph.dims;
    int32_t *tokens = (int32_t *)(r->inputs + io->tokens), *positions = (int32_t *)(r->inputs + io->positions);
    int32_t *row_seq = (int32_t *)(r->inputs + io->row_seq), *logit_rows = (int32_t *)(r->inputs + io->logit_rows);
    int32_t *table = (int32_t *)(r->inputs + io->block_table);
    struct lla_sampling_row *sampling = (struct lla_sampling_row *)(r->inputs + io->sampling);
    *(struct lla_step_header *)(r->inputs + io->header) = (struct lla_step_header){(int32_t)rows, (int32_t)logits};

    size_t row = 0, logit = 0;
    for (size_t i = 0; i < nseq; i++) {
        const struct lla_step_seq *s = &seqs[i];
        const size_t blocks = (s->position0 + s->ntoken + d->kv_block - 1) / d->kv_block;
        memcpy(table + s->slot * d->max_blocks, s->blocks, blocks * sizeof *table);
        for (size_t j = 0; j < s->ntoken; j++, row++) {
            tokens[row] = (int32_t)s->tokens[j];
            positions[row] = (int32_t)(s->position0 + j);
            row_seq[row] = (int32_t)s->slot;
        }
        if (!s->want_next) continue;
        logit_rows[logit] = (int32_t)row - 1;
        sampling[logit] = s->sampling;
        sampling[logit++].position = (int32_t)(s->position0 + s->ntoken - 1);
    }

    size_t bucket = 0;
    while (r->programs[bucket].rows < rows || r->programs[bucket].logits < logits) bucket++;
    const struct lla_program *program = &r->programs[bucket];
#ifdef LLA_CUDA
    if (r->cuda)
        LLA_TRY(lla_exec_cuda_run(r->cuda, bucket));
    else
#endif
        lla_exec_cpu(program, r->arena, r->crew, 0, program->nnode);
    LLA_TRY(draw(r, seqs, nseq));

    const int32_t *chosen = (const int32_t *)(r->inputs + io->next);
    logit = 0;
    for (size_t i = 0; i < nseq; i++) next[i] = seqs[i].want_next ? chosen[logit++] : -1;
    return LLA_OK;
}

lla_status lla_runner_logits(struct lla_runner *r, size_t i, float *logits) {
    const struct lla_dims *d = &r->graph.dims;
    const size_t row_bytes = d->vocab * lla_dtype_size(d->dtype),
                 offset = r->graph.offset[LLA_B_LOGITS] + i * row_bytes;
    const void *row = r->arena + offset;
#ifdef LLA_CUDA
    if (r->cuda) {
        LLA_TRY(lla_exec_cuda_read(r->cuda, offset, row_bytes, r->logits_row));
        row = r->logits_row;
    }
#endif
    for (size_t j = 0; j < d->vocab; j++) logits[j] = lla_load_float(row, j, d->dtype);
    return LLA_OK;
}
