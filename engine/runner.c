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
    r->base = r->arena;
    for (size_t i = 0; i < 2; i++) {
        r->flights[i].inputs = r->arena;
        r->flights[i].chosen = calloc(r->graph.dims.max_seqs, sizeof *r->flights[i].chosen);
        LLA_REQUIRE(r->flights[i].chosen, LLA_ENOMEM, "no memory for %zu tokens", r->graph.dims.max_seqs);
    }
    return LLA_OK;
}

#ifdef LLA_CUDA
static lla_status create_cuda(struct lla_runner *r, int device_id) {
    size_t available;
    LLA_TRY(lla_exec_cuda_available(device_id, &available));
    LLA_TRY(lla_plan_fit(&r->graph.plan, available));
    LLA_TRY(lla_exec_cuda_create(&r->graph, device_id, &r->cuda));
    r->base = lla_exec_cuda_arena(r->cuda);
    for (size_t i = 0; i < 2; i++) {
        r->flights[i].inputs = lla_exec_cuda_inputs(r->cuda, i);
        r->flights[i].chosen = (int32_t *)(r->flights[i].inputs + r->graph.io.next);
    }
    r->logits_row = malloc(r->graph.dims.vocab * lla_dtype_size(r->graph.dims.dtype));
    LLA_REQUIRE(r->logits_row, LLA_ENOMEM, "no memory for logits of a vocabulary of %zu", r->graph.dims.vocab);
    return LLA_OK;
}
#endif

static lla_status create_host(struct lla_runner *r) {
    const size_t seqs = r->graph.dims.max_seqs;
    r->stamps = calloc(seqs, sizeof *r->stamps);
    for (size_t i = 0; i < 2; i++) r->flights[i].logit = calloc(seqs, sizeof *r->flights[i].logit);
    LLA_REQUIRE(r->stamps && r->flights[0].logit && r->flights[1].logit, LLA_ENOMEM, "no memory for %zu sequences",
                seqs);
    return LLA_OK;
}

lla_status lla_runner_create(const struct lla_spec *spec, const struct lla_limits *limits, struct lla_shard shard,
                             int device_id, int nthread, struct lla_runner *runner) {
    memset(runner, 0, sizeof *runner);
    lla_status status;
    LLA_TRY(lla_graph_make(spec, limits, shard, &runner->graph));
    LLA_TRY_GOTO(status, lla_crew_create(nthread > 0 ? (size_t)nthread : 0, &runner->crew), fail);
    LLA_TRY_GOTO(status, create_host(runner), fail);
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
    for (size_t i = 0; i < 2; i++) {
        if (runner->arena) free(runner->flights[i].chosen);
        free(runner->flights[i].logit);
    }
#ifdef LLA_CUDA
    lla_exec_cuda_destroy(runner->cuda);
#endif
    free(runner->stamps);
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

/* ---- what a step may ask for ---- */

/* What a draw reads beside the logits. The CPU is given the known tokens; a GPU has noted them itself. */
static lla_status check_draw(const struct lla_runner *r, const struct lla_step_seq *s) {
    const size_t vocab = r->graph.dims.vocab, nknown = s->position0 + s->ntoken;
    const struct lla_sampling_row *how = &s->sampling;
    LLA_REQUIRE((how->nbias >= 0 && (s->bias || !how->nbias)) && how->nlogprob >= 0 && (s->logprobs || !how->nlogprob),
                LLA_EINVAL, "%d biases or %d log-probabilities without memory for them", how->nbias, how->nlogprob);
    LLA_REQUIRE(how->nbias <= LLA_MAX_BIAS && how->nlogprob <= LLA_MAX_LOGPROB, LLA_EINVAL,
                "%d biases and %d log-probabilities, expected at most %d and %d", how->nbias, how->nlogprob,
                LLA_MAX_BIAS, LLA_MAX_LOGPROB);
    for (int32_t i = 0; i < how->nbias; i++)
        LLA_REQUIRE(s->bias[i].token >= 0 && (size_t)s->bias[i].token < vocab, LLA_EINVAL,
                    "bias of token %d, expected an id from 0 to %zu", s->bias[i].token, vocab - 1);
    if (!lla_has_penalty(how)) return LLA_OK;
    LLA_REQUIRE((s->known || r->cuda) && s->nprompt <= nknown, LLA_EINVAL,
                "penalties need the sequence's %zu tokens, of which %zu would be the prompt's", nknown, s->nprompt);
    for (size_t i = 0; i < nknown && !r->cuda; i++)
        LLA_REQUIRE(s->known[i] >= 0 && (uint64_t)s->known[i] < vocab, LLA_EINVAL,
                    "known token %zu is %lld, expected an id from 0 to %zu", i, (long long)s->known[i], vocab - 1);
    return LLA_OK;
}

/* The entry's tokens: known, or one that the step before chooses. */
static lla_status check_tokens(const struct lla_runner *r, const struct lla_step_seq *s, int32_t feed) {
    const size_t vocab = r->graph.plan.spec.vocab;
    if (feed < 0) {
        for (size_t j = 0; j < s->ntoken; j++)
            LLA_REQUIRE(s->tokens[j] >= 0 && (uint64_t)s->tokens[j] < vocab, LLA_EINVAL,
                        "token %zu is %lld, expected an id from 0 to %zu", j, (long long)s->tokens[j], vocab - 1);
        return LLA_OK;
    }
    LLA_REQUIRE(s->ntoken == 1 && s->tokens[0] == -1, LLA_EINVAL,
                "%zu tokens, the first %lld, of an entry that takes the choice of entry %d: expected one, -1",
                s->ntoken, (long long)s->tokens[0], feed);
    LLA_REQUIRE(r->launched && (size_t)feed < r->graph.dims.max_seqs &&
                    r->flights[(r->launched - 1) % 2].logit[feed] >= 0,
                LLA_EINVAL, "entry %d of the step before has chosen no token", feed);
    return LLA_OK;
}

static lla_status check(struct lla_runner *r, const struct lla_step_seq *seqs, const int32_t *feed, size_t nseq,
                        size_t *rows, size_t *logits) {
    const struct lla_dims *d = &r->graph.dims;
    const struct lla_plan *plan = &r->graph.plan;
    *rows = *logits = 0;
    r->stamp++;
    for (size_t i = 0; i < nseq; i++) {
        const struct lla_step_seq *s = &seqs[i];
        LLA_REQUIRE(s->slot < d->max_seqs, LLA_EINVAL, "sequence slot %zu, expected less than %zu", s->slot,
                    d->max_seqs);
        LLA_REQUIRE(r->stamps[s->slot] != r->stamp, LLA_EINVAL, "sequence slot %zu stands twice in a step", s->slot);
        r->stamps[s->slot] = r->stamp;
        LLA_REQUIRE(s->ntoken > 0, LLA_EINVAL, "a step needs at least one token of each sequence");
        LLA_REQUIRE(s->position0 <= plan->limits.max_seq && s->ntoken <= plan->limits.max_seq - s->position0,
                    LLA_ELIMIT, "%zu tokens behind %zu exceed the sequence limit of %zu tokens", s->ntoken,
                    s->position0, plan->limits.max_seq);
        LLA_TRY(check_tokens(r, s, feed ? feed[i] : -1));
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
    return LLA_OK;
}

/* ---- drawing on the CPU ---- */

struct draws {
    struct lla_runner *runner;
    const struct lla_step_seq *seqs;
    size_t nseq, nthread;
};

static const struct lla_sampling_row *sampling_rows(const struct lla_runner *r) {
    return (const struct lla_sampling_row *)(r->arena + r->graph.io.sampling);
}

/* The thread's share of the rows that want more than the largest logit, each with its own scratch. */
static void draw_rows(void *arg, size_t rank) {
    const struct draws *d = arg;
    const struct lla_graph *g = &d->runner->graph;
    char *arena = d->runner->arena;
    const size_t vocab = g->dims.vocab, row_bytes = vocab * lla_dtype_size(g->dims.dtype);
    int32_t *next = (int32_t *)(arena + g->io.next);
    size_t row = 0, drawn = 0;
    for (size_t i = 0; i < d->nseq; i++) {
        const struct lla_step_seq *s = &d->seqs[i];
        if (!s->want_next) continue;
        const struct lla_sampling_row *how = &sampling_rows(d->runner)[row];
        if (!lla_is_plain(how) && drawn++ % d->nthread == rank)
            next[row] = lla_cpu_draw(&(struct lla_draw){
                .dtype = g->dims.dtype,
                .n = vocab,
                .logits = arena + g->offset[LLA_B_LOGITS] + row * row_bytes,
                .how = how,
                .known = s->known,
                .nknown = s->position0 + s->ntoken,
                .nprompt = s->nprompt,
                .bias = s->bias,
                .mask = s->mask,
                .scratch = (struct lla_candidate *)(arena + g->offset[LLA_B_CANDIDATES]) + row * vocab,
                .logprobs = s->logprobs});
        row++;
    }
}

/* The program has taken the largest logit of each row; rows that want more are drawn here, from the same logits. */
static void draw(struct lla_runner *r, const struct lla_step_seq *seqs, size_t nseq, size_t logits) {
    struct draws d = {.runner = r, .seqs = seqs, .nseq = nseq, .nthread = 1};
    size_t count = 0;
    for (size_t i = 0; i < logits; i++) count += !lla_is_plain(&sampling_rows(r)[i]);
    if (!count) return;
    if (count > 1) {
        d.nthread = lla_crew_size(r->crew);
        lla_crew_run(r->crew, draw_rows, &d);
    } else {
        draw_rows(&d, 0);
    }
}

/* ---- the step ---- */

/* How much of the step's regions of changing length is in use. */
struct extent {
    size_t nbias, nmask;
};

/* How the row behind the entry's last token chooses. What it points to follows for a GPU, which has no other access;
 * the CPU reads it where it is. */
static void put_sampling(const struct lla_runner *r, char *inputs, const struct lla_step_seq *s,
                         struct lla_sampling_row *row, struct extent *used) {
    const struct lla_io *io = &r->graph.io;
    const size_t words = (r->graph.dims.vocab + 31) / 32;
    *row = s->sampling;
    row->position = (int32_t)(s->position0 + s->ntoken - 1);
    row->nprompt = (int32_t)s->nprompt;
    row->first_bias = (int32_t)used->nbias;
    row->mask = s->mask ? 1 + (int32_t)used->nmask : 0;
    if (r->cuda && row->nbias)
        memcpy((struct lla_bias *)(inputs + io->bias) + used->nbias, s->bias, (size_t)row->nbias * sizeof *s->bias);
    if (r->cuda && s->mask)
        memcpy((uint32_t *)(inputs + io->mask) + used->nmask * words, s->mask, words * sizeof *s->mask);
    used->nbias += (size_t)row->nbias;
    used->nmask += s->mask != NULL;
}

/* Writes the step region. */
static void put_inputs(const struct lla_runner *r, struct lla_flight *flight, const struct lla_step_seq *seqs,
                       const int32_t *feed, size_t nseq, struct extent *used) {
    const struct lla_io *io = &r->graph.io;
    const struct lla_dims *d = &r->graph.dims;
    char *inputs = flight->inputs;
    const int32_t *before = r->flights[(r->launched + 1) % 2].logit; /* of the step before this one */
    int32_t *tokens = (int32_t *)(inputs + io->tokens), *positions = (int32_t *)(inputs + io->positions);
    int32_t *row_seq = (int32_t *)(inputs + io->row_seq), *logit_rows = (int32_t *)(inputs + io->logit_rows);
    int32_t *table = (int32_t *)(inputs + io->block_table);
    struct lla_sampling_row *sampling = (struct lla_sampling_row *)(inputs + io->sampling);
    struct lla_step_header header = {0};
    int32_t row = 0, logit = 0;
    bool are_alone = true;
    flight->has_odds = false;
    for (size_t i = 0; i < nseq; i++) {
        const struct lla_step_seq *s = &seqs[i];
        const size_t blocks = (s->position0 + s->ntoken + d->kv_block - 1) / d->kv_block;
        memcpy(table + s->slot * d->max_blocks, s->blocks, blocks * sizeof *table);
        for (size_t j = 0; j < s->ntoken; j++, row++) {
            tokens[row] = feed && feed[i] >= 0 ? ~before[feed[i]] : (int32_t)s->tokens[j];
            positions[row] = (int32_t)(s->position0 + j);
            row_seq[row] = (int32_t)s->slot;
        }
        const int32_t splits = (int32_t)(s->position0 / LLA_CUDA_SPLIT) + 1;
        are_alone &= s->ntoken == 1;
        header.nsplit += splits;
        if (splits > header.longest) header.longest = splits;
        flight->logit[i] = s->want_next ? logit : -1;
        if (!s->want_next) continue;
        logit_rows[logit] = row - 1;
        put_sampling(r, inputs, s, &sampling[logit++], used);
        flight->has_odds |= s->sampling.nlogprob > 0;
    }
    for (size_t i = nseq; i < d->max_seqs; i++) flight->logit[i] = -1; /* no later step takes a choice from there */
    header.nrow = row;
    header.nlogit = logit;
    if (!are_alone) header.nsplit = header.longest = 0;
    *(struct lla_step_header *)(inputs + io->header) = header;
}

lla_status lla_runner_launch(struct lla_runner *r, const struct lla_step_seq *seqs, const int32_t *feed, size_t nseq) {
    size_t rows, logits;
    LLA_REQUIRE(r->launched - r->waited < 2, LLA_EINVAL, "a third step was launched while two are in flight");
    LLA_TRY(check(r, seqs, feed, nseq, &rows, &logits));
    struct lla_flight *flight = &r->flights[r->launched % 2];
    struct extent used = {0};
    put_inputs(r, flight, seqs, feed, nseq, &used);
    size_t bucket = 0;
    while (r->programs[bucket].rows < rows || r->programs[bucket].logits < logits) bucket++;
    const struct lla_program *program = &r->programs[bucket];
#ifdef LLA_CUDA
    if (r->cuda) {
        const struct lla_cuda_step step = {.program = bucket,
                                           .mirror = r->launched % 2,
                                           .nlogit = logits,
                                           .nbias = used.nbias,
                                           .nmask = used.nmask,
                                           .wants_odds = flight->has_odds};
        LLA_TRY(lla_exec_cuda_launch(r->cuda, &step));
        r->launched++;
        return LLA_OK;
    }
#endif
    lla_exec_cpu(program, r->arena, r->crew, 0, program->nnode);
    draw(r, seqs, nseq, logits);
    memcpy(flight->chosen, r->arena + r->graph.io.next, logits * sizeof *flight->chosen);
    r->launched++;
    return LLA_OK;
}

lla_status lla_runner_wait(struct lla_runner *r, const struct lla_step_seq *seqs, size_t nseq, int64_t *next) {
    LLA_REQUIRE(r->launched > r->waited, LLA_EINVAL, "no step is in flight");
    const struct lla_flight *flight = &r->flights[r->waited % 2];
    r->waited++; /* whatever comes of it */
#ifdef LLA_CUDA
    if (r->cuda) LLA_TRY(lla_exec_cuda_wait(r->cuda, (r->waited - 1) % 2, &r->device_seconds));
    if (r->cuda && flight->has_odds) {
        const struct lla_odds *odds = (const struct lla_odds *)(flight->inputs + r->graph.io.odds);
        for (size_t i = 0; i < nseq; i++)
            if (flight->logit[i] >= 0 && seqs[i].logprobs && seqs[i].sampling.nlogprob)
                lla_finish_logprobs(&odds[flight->logit[i]], (size_t)seqs[i].sampling.nlogprob, seqs[i].logprobs);
    }
#endif
    (void)seqs;
    for (size_t i = 0; i < nseq; i++) next[i] = flight->logit[i] < 0 ? -1 : flight->chosen[flight->logit[i]];
    return LLA_OK;
}

lla_status lla_runner_step(struct lla_runner *r, const struct lla_step_seq *seqs, size_t nseq, int64_t *next) {
    LLA_REQUIRE(r->launched == r->waited, LLA_EINVAL, "a step is in flight");
    LLA_TRY(lla_runner_launch(r, seqs, NULL, nseq));
    return lla_runner_wait(r, seqs, nseq, next);
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
