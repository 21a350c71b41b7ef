/* engine.c: the C API of llaisys/engine.h: opening, submitting, cancelling, polling, ending. */
#include "engine.h"

#include "load.h"
#include "open.h"

#include <errno.h>
#include <math.h>
#include <poll.h>
#include <stddef.h>
#include <stdlib.h>
#include <sys/eventfd.h>
#include <unistd.h>

_Static_assert((int)LLAISYS_OK == LLA_OK && (int)LLAISYS_INVALID == LLA_EINVAL &&
                   (int)LLAISYS_NO_MEMORY == LLA_ENOMEM && (int)LLAISYS_IO == LLA_EIO &&
                   (int)LLAISYS_FORMAT == LLA_EFORMAT && (int)LLAISYS_LIMIT == LLA_ELIMIT &&
                   (int)LLAISYS_DEVICE == LLA_EDEVICE && (int)LLAISYS_BUSY == LLA_EBUSY &&
                   (int)LLAISYS_CLOSED == LLA_ECLOSED,
               "the public status is the internal one");

static void push(struct lla_list *list, struct lla_request *r) {
    r->next = NULL;
    *(list->last ? &list->last->next : &list->first) = r;
    list->last = r;
}

static struct lla_request *pop(struct lla_list *list) {
    struct lla_request *r = list->first;
    list->first = r->next;
    if (!list->first) list->last = NULL;
    return r;
}

/* ---- create ---- */

static void stop(struct LlaisysEngine *e) {
    pthread_mutex_lock(&e->lock);
    e->is_stopping = true;
    pthread_cond_signal(&e->work);
    while (e->has_thread && !e->is_stopped) pthread_cond_wait(&e->quiet, &e->lock);
    pthread_mutex_unlock(&e->lock);
}

static void free_runner(struct lla_runner *runner) {
    if (!runner) return;
    lla_runner_destroy(runner);
    free(runner);
}

/* Leaves the thread's message as it is. */
void llaisysEngineClose(struct LlaisysEngine *e) {
    if (!e) return;
    stop(e);
    if (e->has_thread) pthread_join(e->thread, NULL);
    if (e->fd >= 0) close(e->fd);
    pthread_cond_destroy(&e->quiet);
    pthread_cond_destroy(&e->work);
    pthread_mutex_destroy(&e->lock);
    for (size_t i = 0; i < 2; i++) lla_step_destroy(&e->steps[i]);
    lla_scheduler_destroy(&e->scheduler);
    free(e->requests);
    free(e->tokens);
    free(e->biases);
    free(e->logprobs);
    free(e->blocks);
    free(e->masks);
    free(e->ring);
    free(e->chosen);
    free_runner(e->runner);
    free(e);
}

static size_t mask_words(const struct LlaisysEngine *e) {
    return (e->vocab + 31) / 32;
}

static lla_status allocate(struct LlaisysEngine *e, const struct lla_engine_config *config) {
    const struct lla_scheduler_config *c = &config->scheduler;
    const size_t max_blocks = (c->max_seq + c->kv_block - 1) / c->kv_block;
    LLA_REQUIRE(config->max_queue > 0 && config->max_queue <= 1 << 16, LLA_EINVAL,
                "max_queue is %zu, expected 1 to 65536", config->max_queue);
    e->nrequest = config->max_queue + 2 * c->max_seqs; /* running, waiting, and ended ones that are not polled yet */
    e->requests = calloc(e->nrequest, sizeof *e->requests);
    e->tokens = calloc(e->nrequest * c->max_seq, sizeof *e->tokens);
    e->biases = calloc(e->nrequest * LLAISYS_MAX_LOGIT_BIAS, sizeof *e->biases);
    e->logprobs = calloc(e->nrequest * c->max_seq, (1 + e->max_logprobs) * sizeof *e->logprobs);
    e->blocks = calloc(e->nrequest * max_blocks, sizeof *e->blocks);
    e->masks = calloc(e->nrequest * mask_words(e), sizeof *e->masks); /* touched by constrained requests alone */
    e->ring = calloc(e->nrequest, sizeof(struct lla_request *));
    e->chosen = calloc(c->max_seqs, sizeof *e->chosen);
    LLA_REQUIRE(e->requests && e->tokens && e->biases && e->logprobs && e->blocks && e->masks && e->ring && e->chosen,
                LLA_ENOMEM,
                "no memory for %zu requests of %zu tokens with %zu log-probabilities each: lower max_seqs, max_queue, "
                "maxseq or max_logprobs",
                e->nrequest, c->max_seq, 1 + e->max_logprobs);
    for (size_t i = 0; i < e->nrequest; i++) {
        e->requests[i].seq.tokens = e->tokens + i * c->max_seq;
        e->requests[i].seq.kv.blocks = e->blocks + i * max_blocks;
        push(&e->free, &e->requests[i]);
    }
    LLA_TRY(lla_scheduler_create(c, &e->scheduler));
    LLA_TRY(lla_step_create(c->max_seqs, &e->steps[0]));
    return lla_step_create(c->max_seqs, &e->steps[1]);
}

lla_status lla_engine_create(const struct lla_engine_config *config, struct lla_executor executor,
                             struct LlaisysEngine **out) {
    const struct lla_scheduler_config *c = &config->scheduler;
    struct LlaisysEngine *e = calloc(1, sizeof *e);
    LLA_REQUIRE(e, LLA_ENOMEM, "no memory for an engine");
    *e = (struct LlaisysEngine){.executor = executor,
                                .vocab = config->vocab,
                                .max_seq = c->max_seq,
                                .max_logprobs = config->max_logprobs,
                                .fd = -1,
                                .max_under_way = c->max_seqs + config->max_queue};
    pthread_condattr_t monotonic;
    pthread_condattr_init(&monotonic);
    pthread_condattr_setclock(&monotonic, CLOCK_MONOTONIC);
    pthread_mutex_init(&e->lock, NULL);
    pthread_cond_init(&e->work, NULL);
    pthread_cond_init(&e->quiet, &monotonic);
    pthread_condattr_destroy(&monotonic);
    lla_status status;
    LLA_TRY_GOTO(status, allocate(e, config), fail);
    e->stats = (struct LlaisysEngineStats){.max_seqs = c->max_seqs,
                                           .max_queue = config->max_queue,
                                           .maxseq = c->max_seq,
                                           .kv_block = c->kv_block,
                                           .kv_blocks = e->scheduler.pool.total,
                                           .kv_free = e->scheduler.pool.total};
    e->fd = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
    if (e->fd < 0) {
        status = lla_fail(LLA_EIO, "no file descriptor for events: %s", strerror(errno));
        goto fail;
    }
    const int error = pthread_create(&e->thread, NULL, lla_engine_loop, e);
    if (error) {
        status = lla_fail(LLA_ENOMEM, "the engine's thread does not start: %s", strerror(error));
        goto fail;
    }
    e->has_thread = true;
    *out = e;
    return LLA_OK;
fail:
    llaisysEngineClose(e);
    return status;
}

/* On a GPU a step is started, and the next one behind it; on the CPU all of a step happens while it is waited for. */
static lla_status launch_step(void *runner, const struct lla_step *step) {
    return lla_runner_launch(runner, step->seqs, step->feed, step->nseq);
}

static lla_status wait_step(void *runner, const struct lla_step *step, int64_t *next) {
    for (size_t i = 0; i < step->nseq; i++)
        if (!step->who[i]) step->seqs[i].logprobs = NULL; /* its memory may be another request's by now */
    return lla_runner_wait(runner, step->seqs, step->nseq, next);
}

static lla_status run_step(void *runner, const struct lla_step *step, int64_t *next) {
    return lla_runner_step(runner, step->seqs, step->nseq, next);
}

_Static_assert((int)LLAISYS_MAX_LOGIT_BIAS <= (int)LLA_MAX_BIAS &&
                   1 + (int)LLAISYS_MAX_LOGPROBS <= (int)LLA_MAX_LOGPROB,
               "what a request may ask for has room in a step");

lla_status lla_engine_create_over(struct lla_runner *runner, const struct LlaisysEngineOptions *o,
                                  struct LlaisysEngine **out) {
    const struct lla_plan *plan = &runner->graph.plan;
    const struct lla_dims *d = &runner->graph.dims;
    size_t mixed_rows = o->mixed_rows;
    if (!mixed_rows) mixed_rows = plan->limits.device == LLAISYS_DEVICE_CPU ? d->max_seqs + 64 : d->max_rows;
    const struct lla_engine_config config = {
        .scheduler = {.max_seqs = d->max_seqs,
                      .max_seq = plan->limits.max_seq,
                      .max_rows = d->max_rows,
                      .mixed_rows = mixed_rows < d->max_rows ? mixed_rows : d->max_rows,
                      .nblock = plan->nblock,
                      .kv_block = d->kv_block,
                      .eos = plan->spec.eos,
                      .neos = plan->spec.neos},
        .vocab = plan->spec.vocab,
        .max_queue = o->max_queue ? o->max_queue : 256,
        .max_logprobs = o->max_logprobs < 0 ? 0
                        : o->max_logprobs   ? (size_t)o->max_logprobs
                                            : LLAISYS_MAX_LOGPROBS};
    struct lla_executor executor = {.wait = run_step, .arg = runner};
    if (runner->cuda)
        executor = (struct lla_executor){.launch = launch_step,
                                         .wait = wait_step,
                                         .arg = runner,
                                         .overlaps = true,
                                         .device_seconds = &runner->device_seconds};
    const lla_status status = lla_engine_create(&config, executor, out);
    if (status)
        free_runner(runner);
    else
        (*out)->runner = runner;
    return status;
}

/* The cache holds as many tokens as all requests together can have, but no more than is sensible to take unasked. */
static lla_status choose_limits(const struct lla_spec *spec, const struct LlaisysEngineOptions *o,
                                struct lla_limits *limits) {
    const size_t unasked = 65536;
    limits->max_seqs = o->max_seqs ? o->max_seqs : 64;
    limits->kv_block = o->kv_block;
    limits->kv_tokens = o->kv_tokens;
    if (o->kv_tokens) return LLA_OK;
    struct lla_limits resolved = *limits;
    LLA_TRY(lla_limits_resolve(spec, &resolved));
    const size_t most = resolved.max_seq > unasked ? resolved.max_seq : unasked;
    limits->kv_tokens = resolved.kv_tokens < most ? resolved.kv_tokens : most;
    return LLA_OK;
}

static lla_status open_engine(const char *path, const struct LlaisysEngineOptions *o, struct LlaisysEngine **out) {
    const struct LlaisysQwen2Options *m = &o->model;
    struct lla_spec spec;
    struct lla_limits limits;
    struct lla_checkpoint *checkpoint = NULL;
    LLA_REQUIRE(o->max_logprobs >= -1 && o->max_logprobs <= LLAISYS_MAX_LOGPROBS, LLA_EINVAL,
                "max_logprobs is %d, expected -1 to %d", o->max_logprobs, LLAISYS_MAX_LOGPROBS);
    LLA_TRY(lla_open_check(m->device, m->device_ids, m->ndevice ? m->ndevice : 1));
    LLA_TRY(lla_open_resolve(path, m, &spec, &limits, &checkpoint));
    lla_status status = choose_limits(&spec, o, &limits);
    struct lla_runner *runner = NULL;
    if (!status && !(runner = calloc(1, sizeof *runner))) status = lla_fail(LLA_ENOMEM, "no memory for a runner");
    if (!status)
        status = lla_runner_create(&spec, &limits, (struct lla_shard){0, 1}, m->device_ids ? m->device_ids[0] : 0,
                                   m->nthread, runner);
    if (!status) status = lla_load_weights(runner, checkpoint, m->progress ? lla_progress_bar : NULL);
    if (!status) status = lla_runner_ready(runner);
    lla_checkpoint_close(checkpoint);
    if (status)
        free_runner(runner);
    else
        status = lla_engine_create_over(runner, o, out);
    return status ? lla_fail_in(status, "%s", path) : LLA_OK;
}

struct LlaisysEngine *llaisysEngineOpen(const char *path, const struct LlaisysEngineOptions *given) {
    lla_clear_error();
    const struct LlaisysEngineOptions options = given ? *given : (struct LlaisysEngineOptions){0};
    struct LlaisysEngine *e = NULL;
    return open_engine(path, &options, &e) ? NULL : e;
}

char *llaisysEnginePlan(const char *path, const struct LlaisysEngineOptions *given, const char *format) {
    lla_clear_error();
    const struct LlaisysEngineOptions options = given ? *given : (struct LlaisysEngineOptions){0};
    struct lla_spec spec;
    struct lla_limits limits;
    if (lla_open_resolve(path, &options.model, &spec, &limits, NULL) || choose_limits(&spec, &options, &limits))
        return NULL;
    return lla_open_plan(&spec, &limits, format);
}

/* ---- submit ---- */

/* NaN is in no range. */
static lla_status check_range(const char *name, float value, float least, float most) {
    LLA_REQUIRE(value >= least && value <= most, LLA_EINVAL, "%s is %g, expected %g to %g", name, (double)value,
                (double)least, (double)most);
    return LLA_OK;
}

static lla_status check_bias(const struct LlaisysEngine *e, const struct LlaisysRequest *q) {
    LLA_REQUIRE(q->nlogit_bias <= LLAISYS_MAX_LOGIT_BIAS && (q->logit_bias || !q->nlogit_bias), LLA_EINVAL,
                "%zu tokens with a logit_bias, expected at most %d", q->nlogit_bias, LLAISYS_MAX_LOGIT_BIAS);
    for (size_t i = 0; i < q->nlogit_bias; i++) {
        const struct LlaisysLogitBias *b = &q->logit_bias[i];
        LLA_REQUIRE(b->token >= 0 && (uint64_t)b->token < e->vocab, LLA_EINVAL,
                    "logit_bias of token %lld, expected an id from 0 to %zu", (long long)b->token, e->vocab - 1);
        LLA_REQUIRE((b->bias >= -100 && b->bias <= 100) || b->bias == -INFINITY, LLA_EINVAL,
                    "logit_bias of token %lld is %g, expected -100 to 100 or -infinity", (long long)b->token,
                    (double)b->bias);
    }
    return LLA_OK;
}

static lla_status check_sampling(const struct LlaisysEngine *e, const struct LlaisysRequest *q) {
    const struct LlaisysSampling *s = &q->sampling;
    LLA_REQUIRE(s->temperature >= 0 && isfinite(s->temperature), LLA_EINVAL,
                "temperature is %g, expected a finite number from 0", (double)s->temperature);
    LLA_REQUIRE(s->top_k >= 0, LLA_EINVAL, "top_k is %d, expected 0 or more", s->top_k);
    LLA_REQUIRE((s->top_p > 0 && s->top_p <= 1) || (s->top_p == 0 && s->temperature == 0), LLA_EINVAL,
                "top_p is %g, expected above 0 and at most 1", (double)s->top_p);
    LLA_TRY(check_range("min_p", q->min_p, 0, 1));
    LLA_TRY(check_range("presence_penalty", q->presence_penalty, -2, 2));
    LLA_TRY(check_range("frequency_penalty", q->frequency_penalty, -2, 2));
    LLA_REQUIRE(q->repetition_penalty >= 0 && isfinite(q->repetition_penalty), LLA_EINVAL,
                "repetition_penalty is %g, expected a finite number above 0, or 0 for none",
                (double)q->repetition_penalty);
    LLA_REQUIRE(q->logprobs == 0 || q->logprobs == 1, LLA_EINVAL, "logprobs is %d, expected 0 or 1", q->logprobs);
    LLA_REQUIRE(q->top_logprobs >= 0 && (size_t)q->top_logprobs <= e->max_logprobs, LLA_EINVAL,
                "top_logprobs is %d, expected 0 to %zu, with which this engine was opened", q->top_logprobs,
                e->max_logprobs);
    LLA_REQUIRE(q->logprobs || !q->top_logprobs, LLA_EINVAL, "top_logprobs is %d, but logprobs is 0, expected 1",
                q->top_logprobs);
    return check_bias(e, q);
}

static lla_status check_ids(const struct LlaisysEngine *e, const char *what, const int64_t *ids, size_t n) {
    for (size_t i = 0; i < n; i++)
        LLA_REQUIRE(ids[i] >= 0 && (uint64_t)ids[i] < e->vocab, LLA_EINVAL,
                    "%s token %zu of %zu is %lld, expected an id from 0 to %zu", what, i, n, (long long)ids[i],
                    e->vocab - 1);
    return LLA_OK;
}

static lla_status check_constraint(const struct LlaisysEngine *e, const struct LlaisysRequest *q) {
    LLA_REQUIRE((int)q->constrained >= LLAISYS_CONSTRAIN_NEVER && (int)q->constrained <= LLAISYS_CONSTRAIN_AFTER,
                LLA_EINVAL, "constrained is %d, expected 0 to 2", (int)q->constrained);
    if (q->constrained == LLAISYS_CONSTRAIN_NEVER) return LLA_OK;
    if (q->constrained == LLAISYS_CONSTRAIN_ALWAYS && q->constrain_after == -1) return LLA_OK;
    return check_ids(e, "constrain_after", &q->constrain_after, 1);
}

static lla_status check_request(const struct LlaisysEngine *e, const struct LlaisysRequest *q) {
    LLA_REQUIRE(q->prompt && q->nprompt > 0, LLA_EINVAL, "the prompt is empty, expected at least one token");
    LLA_REQUIRE(q->nprompt < e->max_seq, LLA_ELIMIT,
                "the prompt has %zu tokens, but a sequence holds %zu, the answer included", q->nprompt, e->max_seq);
    LLA_REQUIRE(q->nstop <= LLAISYS_MAX_STOP && (q->stop || !q->nstop), LLA_EINVAL,
                "%zu stop tokens, expected at most %d", q->nstop, LLAISYS_MAX_STOP);
    LLA_TRY(check_ids(e, "prompt", q->prompt, q->nprompt));
    LLA_TRY(check_ids(e, "stop", q->stop, q->nstop));
    LLA_TRY(check_constraint(e, q));
    return check_sampling(e, q);
}

/* Under the lock. */
static lla_status check_open(struct LlaisysEngine *e) {
    LLA_REQUIRE(!e->has_failed, LLA_EDEVICE, "the engine has failed: %s", e->failure);
    LLA_REQUIRE(!e->is_draining && !e->is_stopping, LLA_ECLOSED, "the engine is shutting down");
    return LLA_OK;
}

/* Under the lock: memory for a request, if one more may wait. */
static lla_status reserve(struct LlaisysEngine *e, struct lla_request **out) {
    LLA_TRY(check_open(e));
    const size_t under_way = (size_t)(e->stats.submitted - e->ended);
    if (under_way >= e->max_under_way || !e->free.first) e->stats.refused++;
    LLA_REQUIRE(under_way < e->max_under_way, LLA_EBUSY, "the queue is full: %zu requests are running or waiting",
                under_way);
    LLA_REQUIRE(e->free.first, LLA_EBUSY, "the memory for %zu requests is in use: ended ones wait to be polled",
                e->nrequest);
    *out = pop(&e->free);
    e->stats.submitted++; /* now, so that others who fill in theirs count */
    return LLA_OK;
}

/* Without the lock: nobody else looks at a request that is not live. */
static void fill(const struct LlaisysEngine *e, const struct LlaisysRequest *q, struct lla_request *r) {
    const struct LlaisysSampling *p = &q->sampling;
    const size_t room = e->max_seq - q->nprompt, place = (size_t)(r - e->requests);
    struct lla_bias *bias = e->biases + place * LLAISYS_MAX_LOGIT_BIAS;
    r->seq =
        (struct lla_seq){.tokens = r->seq.tokens,
                         .nprompt = q->nprompt,
                         .limit = q->nprompt + (q->max_tokens && q->max_tokens < room ? q->max_tokens : room),
                         .stops = r->stops,
                         .nstop = q->nstop,
                         .ignore_eos = q->ignore_eos != 0,
                         .priority = q->priority,
                         .sampling = {.temperature = p->temperature,
                                      .top_p = p->top_p,
                                      .min_p = q->min_p,
                                      .repetition = q->repetition_penalty,
                                      .presence = q->presence_penalty,
                                      .frequency = q->frequency_penalty,
                                      .top_k = p->top_k,
                                      .nbias = (int32_t)q->nlogit_bias,
                                      .nlogprob = q->logprobs ? 1 + q->top_logprobs : 0,
                                      .seed = p->seed},
                         .bias = bias,
                         .logprobs = e->logprobs + place * e->max_seq * (1 + e->max_logprobs),
                         .mask = q->constrained ? e->masks + place * mask_words(e) : NULL,
                         .trigger = q->constrained ? q->constrain_after : -1,
                         .is_masked = q->constrained == LLAISYS_CONSTRAIN_ALWAYS,
                         .kv = {.blocks = r->seq.kv.blocks, .salt = q->cache_salt, .is_private = q->no_cache != 0}};
    r->tag = q->tag;
    r->submitted_ns = lla_now_ns();
    r->news =
        (struct lla_news){.is_constrained = q->constrained != LLAISYS_CONSTRAIN_NEVER, .needs_mask = r->seq.is_masked};
    memcpy(r->seq.tokens, q->prompt, q->nprompt * sizeof *q->prompt);
    for (size_t i = 0; i < q->nlogit_bias; i++)
        bias[i] = (struct lla_bias){(int32_t)q->logit_bias[i].token, q->logit_bias[i].bias};
    if (q->nstop) memcpy(r->stops, q->stop, q->nstop * sizeof *q->stop);
}

int llaisysEngineSubmit(struct LlaisysEngine *e, const struct LlaisysRequest *q, uint64_t *id) {
    lla_clear_error();
    LLA_REQUIRE(e && q && id, LLA_EINVAL, "llaisysEngineSubmit: an argument is NULL");
    LLA_TRY(check_request(e, q));
    struct lla_request *r = NULL;
    pthread_mutex_lock(&e->lock);
    lla_status status = reserve(e, &r);
    pthread_mutex_unlock(&e->lock);
    if (status) return status;
    fill(e, q, r); /* long prompts are copied without holding anybody up */
    pthread_mutex_lock(&e->lock);
    status = check_open(e);
    if (status) {
        e->stats.submitted--;
        pthread_cond_broadcast(&e->quiet);
        push(&e->free, r);
    } else {
        *id = r->id = ++e->serial * e->nrequest + (uint64_t)(r - e->requests);
        r->is_live = true;
        push(&e->inbox, r);
        pthread_cond_signal(&e->work);
    }
    pthread_mutex_unlock(&e->lock);
    return status;
}

int llaisysEngineCancel(struct LlaisysEngine *e, uint64_t id) {
    /* The thread's error message stays: Python's collector may cancel between another call and a look at its error. */
    LLA_REQUIRE(e, LLA_EINVAL, "llaisysEngineCancel: engine is NULL");
    pthread_mutex_lock(&e->lock);
    struct lla_request *r = &e->requests[id % e->nrequest];
    if (r->is_live && r->id == id && !r->news.finish && !r->news.is_cancelled && !e->is_stopping) {
        r->news.is_cancelled = true;
        r->next_cancelled = e->cancelled;
        e->cancelled = r;
        pthread_cond_signal(&e->work);
    }
    pthread_mutex_unlock(&e->lock);
    return LLA_OK;
}

/* ---- masks ---- */

static bool allows_any(const struct LlaisysEngine *e, const uint32_t *words) {
    const size_t n = mask_words(e), spare = 32 * n - e->vocab;
    for (size_t i = 0; i + 1 < n; i++)
        if (words[i]) return true;
    return words[n - 1] & UINT32_MAX >> spare;
}

/* Under the lock. */
static lla_status take_mask(struct LlaisysEngine *e, struct lla_request *r, size_t index, const uint32_t *words) {
    struct lla_news *news = &r->news;
    LLA_REQUIRE(news->is_constrained, LLA_EINVAL, "a mask for request %llu, which is not constrained",
                (unsigned long long)r->id);
    LLA_REQUIRE(index == news->published, LLA_EINVAL,
                "a mask for token %zu of an answer that has %zu tokens, expected %zu", index, news->published,
                news->published);
    LLA_REQUIRE(news->needs_mask, LLA_EINVAL, "a mask for token %zu, which needs none", index);
    LLA_REQUIRE(news->nmask <= index, LLA_EINVAL, "a second mask for token %zu", index);
    if (words) {
        memcpy(e->masks + (size_t)(r - e->requests) * mask_words(e), words, mask_words(e) * sizeof *words);
        news->nmask = index + 1;
        news->mask = allows_any(e, words) ? LLA_MASK_SET : LLA_MASK_EMPTY;
    } else {
        news->needs_mask = false;
        news->mask = LLA_MASK_LIFTED;
    }
    r->next_masked = e->masked;
    e->masked = r;
    pthread_cond_signal(&e->work);
    return LLA_OK;
}

int llaisysEngineSetMask(struct LlaisysEngine *e, uint64_t id, size_t index, const uint32_t *words, size_t nword) {
    lla_clear_error();
    LLA_REQUIRE(e, LLA_EINVAL, "llaisysEngineSetMask: engine is NULL");
    LLA_REQUIRE(!words || nword == mask_words(e), LLA_EINVAL,
                "a mask of %zu words, expected %zu for a vocabulary of %zu", nword, mask_words(e), e->vocab);
    lla_status status = LLA_OK;
    pthread_mutex_lock(&e->lock);
    struct lla_request *r = &e->requests[id % e->nrequest];
    if (r->is_live && r->id == id && !r->news.finish && !r->news.is_cancelled && !e->is_stopping && !e->has_failed)
        status = take_mask(e, r, index, words);
    pthread_mutex_unlock(&e->lock);
    return status;
}

/* ---- poll ---- */

void lla_engine_signal(struct LlaisysEngine *e) {
    const uint64_t one = 1;
    ssize_t n;
    do n = write(e->fd, &one, sizeof one);
    while (n < 0 && errno == EINTR);
}

static double since(const struct lla_request *r, int64_t ns) {
    return ns ? 1e-9 * (double)(ns - r->submitted_ns) : 0;
}

_Static_assert(sizeof(struct LlaisysLogprob) == sizeof(struct lla_candidate) &&
                   offsetof(struct LlaisysLogprob, logprob) == offsetof(struct lla_candidate, value) &&
                   offsetof(struct LlaisysLogprob, token) == offsetof(struct lla_candidate, token),
               "the draw writes what events point to");

/* Of the answer's tokens from `first` on. */
static const struct LlaisysLogprob *logprobs_of(const struct lla_request *r, size_t first) {
    const size_t n = (size_t)r->seq.sampling.nlogprob;
    return n ? (const struct LlaisysLogprob *)(r->seq.logprobs + first * n) : NULL;
}

static const char *message_of(const struct LlaisysEngine *e, const struct lla_request *r) {
    if (r->news.finish == LLAISYS_FINISH_ERROR) return e->failure;
    return r->news.finish == LLAISYS_FINISH_MASKED ? "the mask of the next token allows no token" : NULL;
}

/* Under the lock: the news of up to `capacity` requests. */
static size_t collect(struct LlaisysEngine *e, struct LlaisysEvent *events, size_t capacity) {
    while (e->told.first) { /* what the last poll returned has been read by now */
        struct lla_request *r = pop(&e->told);
        r->is_live = false;
        push(&e->free, r);
    }
    size_t n = 0;
    for (; n < capacity && e->ring_count; n++) {
        struct lla_request *r = e->ring[e->ring_first];
        e->ring_first = (e->ring_first + 1) % e->nrequest;
        e->ring_count--;
        r->news.is_announced = false;
        events[n] = (struct LlaisysEvent){.request = r->id,
                                          .tag = r->tag,
                                          .tokens = r->seq.tokens + r->seq.nprompt + r->news.delivered,
                                          .ntoken = r->news.published - r->news.delivered,
                                          .logprobs = logprobs_of(r, r->news.delivered),
                                          .nlogprob = (size_t)r->seq.sampling.nlogprob,
                                          .finish = r->news.finish,
                                          .message = message_of(e, r),
                                          .prompt_tokens = r->seq.nprompt,
                                          .completion_tokens = r->news.published,
                                          .cached_tokens = r->news.cached,
                                          .preemptions = r->news.preemptions,
                                          .queued_s = since(r, r->news.admitted_ns),
                                          .first_token_s = since(r, r->news.first_ns),
                                          .finished_s = since(r, r->news.finished_ns)};
        r->news.delivered = r->news.published;
        if (r->news.finish) push(&e->told, r);
    }
    uint64_t drop;
    if (!e->ring_count && !e->is_stopped && read(e->fd, &drop, sizeof drop) < 0) drop = 0; /* none was there */
    return n;
}

int llaisysEnginePoll(struct LlaisysEngine *e, struct LlaisysEvent *events, size_t capacity, int timeout_ms,
                      size_t *count) {
    lla_clear_error();
    LLA_REQUIRE(e && events && capacity && count, LLA_EINVAL,
                "llaisysEnginePoll: expected an engine, events and room for at least one");
    const int64_t until = timeout_ms > 0 ? lla_now_ns() + (int64_t)timeout_ms * 1000000 : 0;
    for (;;) {
        pthread_mutex_lock(&e->lock);
        *count = collect(e, events, capacity);
        const bool is_over = e->is_stopped;
        pthread_mutex_unlock(&e->lock);
        if (*count) return LLA_OK;
        LLA_REQUIRE(!is_over, LLA_ECLOSED, "the engine is stopped, and all events have been polled");
        int wait = timeout_ms;
        if (timeout_ms > 0) {
            const int64_t left = until - lla_now_ns();
            wait = left > 0 ? (int)(left / 1000000) + 1 : 0;
        }
        if (wait == 0) return LLA_OK;
        struct pollfd fd = {.fd = e->fd, .events = POLLIN};
        if (poll(&fd, 1, wait) < 0 && errno == EINTR) return LLA_OK; /* so that a signal's handler gets its turn */
    }
}

int llaisysEngineFd(const struct LlaisysEngine *e) {
    return e ? e->fd : -1;
}

void llaisysEngineStats(struct LlaisysEngine *e, struct LlaisysEngineStats *stats) {
    if (!e || !stats) return;
    pthread_mutex_lock(&e->lock);
    *stats = e->stats;
    stats->waiting = (size_t)(e->stats.submitted - e->left_queue);
    stats->unread = e->ring_count;
    pthread_mutex_unlock(&e->lock);
}

void llaisysEngineMeta(const struct LlaisysEngine *e, struct LlaisysQwen2Meta *meta) {
    if (!e || !meta || !e->runner) return;
    lla_open_meta(&e->runner->graph.plan, meta);
}

int llaisysEngineIsEnd(const struct LlaisysEngine *e, int64_t token) {
    return e && e->runner && lla_open_is_end(&e->runner->graph.plan, token);
}

/* ---- the end ---- */

int llaisysEngineDrain(struct LlaisysEngine *e, int timeout_ms) {
    lla_clear_error();
    LLA_REQUIRE(e, LLA_EINVAL, "llaisysEngineDrain: engine is NULL");
    const int64_t until = lla_now_ns() + (int64_t)(timeout_ms > 0 ? timeout_ms : 0) * 1000000;
    const struct timespec at = {.tv_sec = until / 1000000000, .tv_nsec = until % 1000000000};
    pthread_mutex_lock(&e->lock);
    e->is_draining = true;
    int late = 0;
    while (e->stats.submitted != e->ended && !late) {
        if (timeout_ms < 0)
            pthread_cond_wait(&e->quiet, &e->lock);
        else
            late = timeout_ms == 0 || pthread_cond_timedwait(&e->quiet, &e->lock, &at) == ETIMEDOUT;
    }
    const size_t left = (size_t)(e->stats.submitted - e->ended);
    pthread_mutex_unlock(&e->lock);
    LLA_REQUIRE(!left, LLA_EBUSY, "%zu requests are still under way after %d ms", left, timeout_ms);
    return LLA_OK;
}

int llaisysEngineStop(struct LlaisysEngine *e) {
    lla_clear_error();
    LLA_REQUIRE(e, LLA_EINVAL, "llaisysEngineStop: engine is NULL");
    stop(e);
    return LLA_OK;
}
