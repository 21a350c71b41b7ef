/* test_engine.c: every request ends once, with a reason and the tokens that it has alone, and all blocks come back,
 * whatever happens: floods, cancel storms, failures, slow pollers, an engine stopped at work. Threads and locks are
 * real; the model is a stand-in. ThreadSanitizer runs this file, too (scripts/test.sh). */
#include "../../engine/engine.h"
#include "fake_device.h"
#include "random.h"

#include <poll.h>
#include <stdatomic.h>
#include <unistd.h>

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
enum { SLOW = 1 };
#else
enum { SLOW = 0 };
#endif

enum { MAX_SEQ = 200, MAX_EVENTS = 16 };

static struct LlaisysEngine *engine;
static struct fake_device device;
static const int64_t eos[] = {3};

/* The stand-in's step: it can be held up and made to fail. */
static pthread_mutex_t gate = PTHREAD_MUTEX_INITIALIZER;
static atomic_long steps_before_failure = -1;
static atomic_uint step_us;

static int64_t launched[2][64]; /* what steps in flight have chosen */
static size_t nlaunched, nwaited;
static bool overlaps; /* the second time that all tests run */

static lla_status launch(void *arg, const struct lla_step *step) {
    CHECK(nlaunched - nwaited < (overlaps ? 2 : 1));
    fake_step(arg, step, launched[nlaunched++ % 2]);
    return LLA_OK;
}

static lla_status await(void *arg, const struct lla_step *step, int64_t *next) {
    (void)arg;
    pthread_mutex_lock(&gate);
    pthread_mutex_unlock(&gate);
    if (step_us) usleep(step_us);
    const long left = atomic_load(&steps_before_failure);
    if (left == 0) return lla_fail(LLA_EDEVICE, "the stand-in was told to fail");
    if (left > 0) atomic_fetch_sub(&steps_before_failure, 1);
    memcpy(next, launched[nwaited++ % 2], step->nseq * sizeof *next);
    return LLA_OK;
}

static void open_engine(size_t seqs, size_t max_queue, size_t blocks) {
    const struct lla_engine_config config = {.scheduler = {.max_seqs = seqs,
                                                           .max_seq = MAX_SEQ,
                                                           .max_rows = 64,
                                                           .mixed_rows = seqs > 32 ? seqs : 32,
                                                           .nblock = blocks + 1,
                                                           .kv_block = 8,
                                                           .eos = eos,
                                                           .neos = 1},
                                             .vocab = 500,
                                             .max_queue = max_queue,
                                             .max_logprobs = 3};
    device = fake_open(blocks + 1, 8, 500);
    nlaunched = nwaited = 0;
    const struct lla_executor executor = {launch, await, &device, overlaps};
    CHECK_INT(lla_engine_create(&config, executor, &engine), LLA_OK);
}

static struct LlaisysEngineStats stats(void) {
    struct LlaisysEngineStats s;
    llaisysEngineStats(engine, &s);
    CHECK_INT(s.kv_free + s.kv_cached + s.kv_active, s.kv_blocks);
    return s;
}

/* Nothing runs: every block is back, every request has ended. */
static void check_idle(void) {
    const struct LlaisysEngineStats s = stats();
    uint64_t ended = 0;
    for (size_t i = 1; i < 7; i++) ended += s.finished[i];
    CHECK_INT(s.kv_active, 0);
    CHECK_INT(s.running, 0);
    CHECK_INT(s.waiting, 0);
    CHECK_INT(ended, s.submitted);
    CHECK_INT(s.finished[0], 0);
}

static void close_engine(void) {
    CHECK_INT(llaisysEngineStop(engine), LLAISYS_OK);
    check_idle();
    if (lla_kvpool_check(&engine->scheduler.pool)) HARNESS_FAIL("%s", lla_last_error());
    llaisysEngineClose(engine);
    fake_close(&device);
}

/* ---- requests and what became of them ---- */

struct outcome {
    int64_t prompt[MAX_SEQ], tokens[MAX_SEQ];
    struct LlaisysRequest request;
    uint64_t id;
    size_t ntoken, events;
    enum LlaisysFinish finish;
    struct LlaisysEvent last;
};

static struct outcome outcomes[2000]; /* by tag */

static void make_request(struct outcome *o, size_t nprompt, size_t max_tokens, struct rng *rng) {
    *o = (struct outcome){
        .request = {
            .prompt = o->prompt, .nprompt = nprompt, .max_tokens = max_tokens, .tag = (uint64_t)(o - outcomes)}};
    struct rng text = {rng_below(rng, 5)};
    for (size_t i = 0; i < nprompt; i++) o->prompt[i] = (int64_t)rng_below(&text, 500);
    if (nprompt) o->prompt[rng_below(rng, nprompt)] = (int64_t)rng_below(rng, 500);
    if (rng_below(rng, 3) == 0)
        o->request.sampling = (struct LlaisysSampling){.temperature = 1, .top_p = 1, .seed = rng_next(rng)};
    o->request.logprobs = rng_below(rng, 3) == 0;
    if (o->request.logprobs) o->request.top_logprobs = (int)rng_below(rng, 4);
}

/* One call of Poll; the number of requests that have ended. */
static size_t poll_once(int timeout_ms) {
    struct LlaisysEvent events[MAX_EVENTS];
    size_t count = 0, ended = 0;
    const int status = llaisysEnginePoll(engine, events, MAX_EVENTS, timeout_ms, &count);
    CHECK(status == LLAISYS_OK || (status == LLAISYS_CLOSED && !count));
    for (size_t i = 0; i < count; i++) {
        struct outcome *o = &outcomes[events[i].tag];
        CHECK(!o->finish); /* nothing comes behind the end */
        CHECK(events[i].ntoken || events[i].finish);
        CHECK_INT(events[i].request, o->id);
        CHECK(o->ntoken + events[i].ntoken <= MAX_SEQ);
        const size_t nlogprob = o->request.logprobs ? 1 + (size_t)o->request.top_logprobs : 0;
        CHECK_INT(events[i].nlogprob, nlogprob);
        CHECK((events[i].logprobs != NULL) == (nlogprob > 0));
        for (size_t t = 0; t < events[i].ntoken * nlogprob; t++)
            CHECK_INT(events[i].logprobs[t].token, events[i].tokens[t / nlogprob] + (int64_t)(t % nlogprob));
        memcpy(o->tokens + o->ntoken, events[i].tokens, events[i].ntoken * sizeof *o->tokens);
        o->ntoken += events[i].ntoken;
        o->finish = events[i].finish;
        o->last = events[i];
        o->events++;
        CHECK_INT(events[i].completion_tokens, o->ntoken);
        CHECK_INT(events[i].prompt_tokens, o->request.nprompt);
        CHECK((events[i].message != NULL) == (o->finish == LLAISYS_FINISH_ERROR));
        ended += o->finish != LLAISYS_FINISH_NONE;
    }
    return ended;
}

static void poll_until(size_t ended) {
    for (size_t n = 0; n < ended && !TEST_FAILURES;) n += poll_once(5000);
}

/* The tokens are those of the request alone, as far as they go, and the end is where it says. */
static void check_outcome(const struct outcome *o) {
    int64_t answer[MAX_SEQ];
    const struct lla_sampling_row s = {.temperature = o->request.sampling.temperature,
                                       .seed = o->request.sampling.seed};
    fake_answer(&device, o->prompt, o->request.nprompt, &s, answer, o->ntoken);
    CHECK(!memcmp(answer, o->tokens, o->ntoken * sizeof *answer));
    const size_t room = MAX_SEQ - o->request.nprompt,
                 most = o->request.max_tokens && o->request.max_tokens < room ? o->request.max_tokens : room;
    size_t end = 0;
    while (end < o->ntoken && (answer[end] != eos[0] || o->request.ignore_eos)) end++;
    CHECK(o->finish);
    if (o->finish == LLAISYS_FINISH_STOP) CHECK_INT(end, o->ntoken - 1);
    if (o->finish == LLAISYS_FINISH_LENGTH) CHECK_INT(o->ntoken, most);
    if (o->finish != LLAISYS_FINISH_STOP) CHECK_INT(end, o->ntoken);
    if (o->ntoken) {
        CHECK(o->last.first_token_s >= o->last.queued_s && o->last.finished_s >= o->last.first_token_s);
        CHECK(o->last.queued_s > 0);
    }
}

static int submit(struct outcome *o) {
    return llaisysEngineSubmit(engine, &o->request, &o->id);
}

/* ---- tests ---- */

TEST(answers) {
    struct rng rng = {1};
    open_engine(6, 100, 60);
    for (size_t i = 0; i < 100; i++) {
        make_request(&outcomes[i], rng_range(&rng, 1, 150), rng_range(&rng, 1, 60), &rng);
        CHECK_INT(submit(&outcomes[i]), LLAISYS_OK);
    }
    poll_until(100);
    for (size_t i = 0; i < 100; i++) check_outcome(&outcomes[i]);
    CHECK(stats().cached_tokens > 0 && stats().generated_tokens > 1000);
    close_engine();
}

/* Limits: at, one below, one above; nothing is cut silently. */
TEST(limits) {
    struct rng rng = {2};
    open_engine(4, 10, 80);
    struct outcome *o = outcomes;
    make_request(o, MAX_SEQ - 1, 0, &rng);
    CHECK_INT(submit(o), LLAISYS_OK); /* room for one token */
    poll_until(1);
    CHECK_INT(o->ntoken, 1);
    check_outcome(o);
    make_request(o, MAX_SEQ - 2, 0, &rng);
    o->request.ignore_eos = 1;
    CHECK_INT(submit(o), LLAISYS_OK);
    poll_until(1);
    CHECK_INT(o->ntoken, 2);
    CHECK_INT(o->finish, LLAISYS_FINISH_LENGTH);
    make_request(o, MAX_SEQ, 0, &rng);
    CHECK_INT(submit(o), LLAISYS_LIMIT);
    CHECK_STR_HAS(llaisysGetLastError(), "the prompt has 200 tokens, but a sequence holds 200");
    make_request(o, 1, 0, &rng); /* as many as there is room for */
    o->request.ignore_eos = 1;
    CHECK_INT(submit(o), LLAISYS_OK);
    poll_until(1);
    CHECK_INT(o->ntoken, MAX_SEQ - 1);
    CHECK_INT(o->finish, LLAISYS_FINISH_LENGTH);
    check_outcome(o);
    close_engine();
}

TEST(bad_requests) {
    open_engine(2, 4, 40);
    const int64_t prompt[3] = {1, 2, 3}, high[2] = {1, 500}, low[1] = {-1};
    const float nan = 0.0f / 0.0f;
    const struct LlaisysLogitBias high_bias = {1, 100.5f}, nan_bias = {1, nan}, far_bias = {500, 1};
    const struct LlaisysRequest good = {.prompt = prompt, .nprompt = 3, .max_tokens = 1};
    const struct {
        struct LlaisysRequest request;
        const char *message;
    } bad[] = {
        {{.nprompt = 3}, "the prompt is empty"},
        {{.prompt = prompt}, "the prompt is empty"},
        {{.prompt = high, .nprompt = 2}, "prompt token 1 of 2 is 500, expected an id from 0 to 499"},
        {{.prompt = low, .nprompt = 1}, "prompt token 0 of 1 is -1"},
        {{.prompt = prompt, .nprompt = 3, .stop = low, .nstop = 1}, "stop token 0 of 1 is -1"},
        {{.prompt = prompt, .nprompt = 3, .stop = low, .nstop = 65}, "65 stop tokens, expected at most 64"},
        {{.prompt = prompt, .nprompt = 3, .sampling = {.temperature = -1}}, "temperature is -1"},
        {{.prompt = prompt, .nprompt = 3, .sampling = {.temperature = 0.0f / 0.0f}}, "temperature is"},
        {{.prompt = prompt, .nprompt = 3, .sampling = {.temperature = 1}}, "top_p is 0"},
        {{.prompt = prompt, .nprompt = 3, .sampling = {.top_p = 2}}, "top_p is 2"},
        {{.prompt = prompt, .nprompt = 3, .sampling = {.top_k = -1}}, "top_k is -1"},
        {{.prompt = prompt, .nprompt = 3, .min_p = 1.1f}, "min_p is 1.1, expected 0 to 1"},
        {{.prompt = prompt, .nprompt = 3, .min_p = nan}, "min_p is"},
        {{.prompt = prompt, .nprompt = 3, .repetition_penalty = -1.5f}, "repetition_penalty is -1.5"},
        {{.prompt = prompt, .nprompt = 3, .repetition_penalty = 1 / 0.0f}, "repetition_penalty is inf"},
        {{.prompt = prompt, .nprompt = 3, .repetition_penalty = nan}, "repetition_penalty is"},
        {{.prompt = prompt, .nprompt = 3, .presence_penalty = -2.1f}, "presence_penalty is -2.1, expected -2 to 2"},
        {{.prompt = prompt, .nprompt = 3, .frequency_penalty = nan}, "frequency_penalty is"},
        {{.prompt = prompt, .nprompt = 3, .logit_bias = &high_bias, .nlogit_bias = 1},
         "logit_bias of token 1 is 100.5"},
        {{.prompt = prompt, .nprompt = 3, .logit_bias = &nan_bias, .nlogit_bias = 1}, "logit_bias of token 1 is"},
        {{.prompt = prompt, .nprompt = 3, .logit_bias = &far_bias, .nlogit_bias = 1},
         "logit_bias of token 500, expected an id from 0 to 499"},
        {{.prompt = prompt, .nprompt = 3, .logit_bias = &high_bias, .nlogit_bias = 1025},
         "1025 tokens with a logit_bias"},
        {{.prompt = prompt, .nprompt = 3, .nlogit_bias = 1}, "1 tokens with a logit_bias"},
        {{.prompt = prompt, .nprompt = 3, .logprobs = 5}, "logprobs is 5, expected 0 or 1"},
        {{.prompt = prompt, .nprompt = 3, .logprobs = 1, .top_logprobs = 4}, "top_logprobs is 4, expected 0 to 3"},
        {{.prompt = prompt, .nprompt = 3, .logprobs = 1, .top_logprobs = -1}, "top_logprobs is -1"},
        {{.prompt = prompt, .nprompt = 3, .top_logprobs = 2}, "top_logprobs is 2, but logprobs is 0"},
        {{.prompt = prompt, .nprompt = 3, .constrained = (enum LlaisysConstraint)3},
         "constrained is 3, expected 0 to 2"},
        {{.prompt = prompt, .nprompt = 3, .constrained = LLAISYS_CONSTRAIN_AFTER, .constrain_after = -1},
         "constrain_after token 0 of 1 is -1, expected an id from 0 to 499"},
        {{.prompt = prompt, .nprompt = 3, .constrained = LLAISYS_CONSTRAIN_ALWAYS, .constrain_after = 500},
         "constrain_after token 0 of 1 is 500"},
    };
    uint64_t id = 0;
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        CHECK_INT(llaisysEngineSubmit(engine, &bad[i].request, &id), LLAISYS_INVALID);
        CHECK_STR_HAS(llaisysGetLastError(), bad[i].message);
    }
    CHECK_INT(llaisysEngineSubmit(NULL, &good, &id), LLAISYS_INVALID);
    CHECK_INT(llaisysEngineSubmit(engine, NULL, &id), LLAISYS_INVALID);
    CHECK_INT(llaisysEngineCancel(NULL, 1), LLAISYS_INVALID);
    CHECK_INT(llaisysEngineCancel(engine, 1), LLAISYS_OK); /* of a finalizer, say: the last error stays */
    CHECK_STR_HAS(llaisysGetLastError(), "engine is NULL");
    CHECK_INT(stats().submitted, 0);
    struct LlaisysRequest neutral = good;
    neutral.repetition_penalty = 1;
    CHECK_INT(llaisysEngineSubmit(engine, &neutral, &id), LLAISYS_OK);
    CHECK(id != 0);
    CHECK(!llaisysGetLastError());
    close_engine();
}

/* A full queue refuses and says so; what was accepted is answered. */
TEST(queue_flood) {
    struct rng rng = {3};
    open_engine(2, 20, 60);
    pthread_mutex_lock(&gate); /* no step ends */
    size_t accepted = 0, refused = 0;
    for (size_t i = 0; i < 1000; i++) {
        make_request(&outcomes[accepted], 10, 5, &rng);
        const int status = submit(&outcomes[accepted]);
        if (status == LLAISYS_OK) {
            accepted++;
            continue;
        }
        CHECK_INT(status, LLAISYS_BUSY);
        CHECK_STR_HAS(llaisysGetLastError(), "the queue is full: 22 requests are running or waiting");
        refused++;
    }
    CHECK_INT(accepted, 22); /* two run */
    CHECK_INT(stats().refused, refused);
    pthread_mutex_unlock(&gate);
    poll_until(accepted);
    for (size_t i = 0; i < accepted; i++) check_outcome(&outcomes[i]);
    close_engine();
}

/* Nobody polls: requests run to their ends, new ones are refused when their memory is used up, and nothing is lost. */
TEST(slow_poller) {
    struct rng rng = {4};
    open_engine(4, 8, 60); /* memory for 16 requests */
    size_t accepted = 0;
    for (int tries = 0; tries < 20000 && accepted < 16; tries++) {
        make_request(&outcomes[accepted], 10, 40, &rng);
        if (submit(&outcomes[accepted]) == LLAISYS_OK)
            accepted++;
        else
            usleep(100);
    }
    CHECK_INT(accepted, 16);
    make_request(&outcomes[16], 10, 5, &rng);
    CHECK_INT(llaisysEngineDrain(engine, 0) == LLAISYS_BUSY || stats().running == 0, 1);
    while (stats().running || stats().waiting) usleep(100);
    CHECK_INT(stats().unread, 16);
    poll_until(16);
    for (size_t i = 0; i < 16; i++) {
        CHECK_INT(outcomes[i].events, 1); /* all tokens at once */
        check_outcome(&outcomes[i]);
    }
    close_engine();
}

TEST(results_that_nobody_reads_keep_their_memory) {
    struct rng rng = {5};
    open_engine(2, 4, 60); /* memory for 8 requests */
    for (size_t i = 0; i < 8;) {
        make_request(&outcomes[i], 5, 1, &rng);
        i += submit(&outcomes[i]) == LLAISYS_OK;
    }
    while (stats().running || stats().waiting) usleep(100);
    make_request(&outcomes[8], 5, 1, &rng);
    CHECK_INT(submit(&outcomes[8]), LLAISYS_BUSY);
    CHECK_STR_HAS(llaisysGetLastError(), "ended ones wait to be polled");
    poll_until(8);
    CHECK_INT(submit(&outcomes[8]), LLAISYS_BUSY); /* what Poll returned is still being read */
    CHECK_INT(poll_once(0), 0);
    CHECK_INT(submit(&outcomes[8]), LLAISYS_OK);
    poll_until(1);
    for (size_t i = 0; i < 9; i++) check_outcome(&outcomes[i]);
    close_engine();
}

TEST(a_thousand_requests_of_one_token) {
    struct rng rng = {6};
    open_engine(16, 64, 500);
    size_t ended = 0;
    for (size_t i = 0; i < 1000;) {
        make_request(&outcomes[i], rng_range(&rng, 1, 20), 1, &rng);
        if (submit(&outcomes[i]) == LLAISYS_OK)
            i++;
        else
            ended += poll_once(1000);
    }
    poll_until(1000 - ended);
    for (size_t i = 0; i < 1000; i++) {
        CHECK_INT(outcomes[i].ntoken, 1);
        check_outcome(&outcomes[i]);
    }
    close_engine();
}

/* ---- many threads ---- */

enum { SUBMITTERS = 4, EACH = 100 };

static atomic_bool storm_over;

static void *submit_some(void *arg) {
    const size_t first = (size_t)(uintptr_t)arg * EACH;
    struct rng rng = {100 + first};
    for (size_t i = first; i < first + EACH;) {
        if (submit(&outcomes[i]) == LLAISYS_OK)
            i++;
        else
            usleep(200);
        if (rng_below(&rng, 10) == 0) usleep(300);
    }
    return NULL;
}

/* Cancels anything: running, waiting, ended and never submitted requests. */
static void *cancel_anything(void *arg) {
    struct rng rng = {(uintptr_t)arg};
    struct LlaisysEngineStats s;
    while (!storm_over) {
        llaisysEngineStats(engine, &s);
        CHECK_INT(llaisysEngineCancel(engine, rng_below(&rng, 40 * (s.submitted + 10))), LLAISYS_OK);
        if (rng_below(&rng, 50) == 0) usleep(50);
    }
    return NULL;
}

TEST(cancel_storm) {
    struct rng rng = {7};
    open_engine(8, 24, 70);
    step_us = 100;
    storm_over = false;
    pthread_t submitters[SUBMITTERS], cancellers[2];
    for (size_t i = 0; i < SUBMITTERS * EACH; i++) {
        make_request(&outcomes[i], rng_range(&rng, 1, 150), rng_range(&rng, 1, 50), &rng);
        outcomes[i].request.tag = i;
    }
    for (size_t i = 0; i < SUBMITTERS; i++) pthread_create(&submitters[i], NULL, submit_some, (void *)(uintptr_t)i);
    for (size_t i = 0; i < 2; i++) pthread_create(&cancellers[i], NULL, cancel_anything, (void *)(uintptr_t)(i + 1));
    struct LlaisysEvent events[MAX_EVENTS];
    size_t ended = 0, count, finished[6] = {0};
    while (ended < SUBMITTERS * EACH && !TEST_FAILURES) {
        CHECK_INT(llaisysEnginePoll(engine, events, MAX_EVENTS, 5000, &count), LLAISYS_OK);
        CHECK(count > 0);
        for (size_t i = 0; i < count; i++) {
            struct outcome *o = &outcomes[events[i].tag];
            memcpy(o->tokens + o->ntoken, events[i].tokens, events[i].ntoken * sizeof *o->tokens);
            o->ntoken += events[i].ntoken;
            o->last = events[i];
            CHECK(!o->finish);
            o->finish = events[i].finish;
            finished[o->finish]++;
            ended += o->finish != LLAISYS_FINISH_NONE;
        }
    }
    storm_over = true;
    for (size_t i = 0; i < SUBMITTERS; i++) pthread_join(submitters[i], NULL);
    for (size_t i = 0; i < 2; i++) pthread_join(cancellers[i], NULL);
    step_us = 0;
    for (size_t i = 0; i < SUBMITTERS * EACH; i++) check_outcome(&outcomes[i]);
    CHECK(finished[LLAISYS_FINISH_CANCELLED] > 20);
    CHECK(finished[LLAISYS_FINISH_LENGTH] + finished[LLAISYS_FINISH_STOP] > 20);
    close_engine();
}

TEST(cancel_at_once) {
    struct rng rng = {8};
    open_engine(2, 50, 60);
    pthread_mutex_lock(&gate);
    for (size_t i = 0; i < 40; i++) {
        make_request(&outcomes[i], 20, 20, &rng);
        CHECK_INT(submit(&outcomes[i]), LLAISYS_OK);
    }
    for (size_t i = 0; i < 40; i++)
        for (int twice = 0; twice < 2; twice++) CHECK_INT(llaisysEngineCancel(engine, outcomes[i].id), LLAISYS_OK);
    pthread_mutex_unlock(&gate);
    poll_until(40);
    for (size_t i = 0; i < 40; i++) {
        CHECK_INT(outcomes[i].finish, LLAISYS_FINISH_CANCELLED);
        CHECK(outcomes[i].ntoken <= 1);
        check_outcome(&outcomes[i]);
        CHECK_INT(llaisysEngineCancel(engine, outcomes[i].id), LLAISYS_OK); /* has ended: no error */
    }
    check_idle();
    close_engine();
}

/* ---- ends ---- */

TEST(stop_with_requests_in_flight) {
    struct rng rng = {9};
    for (int polled = 0; polled < 2; polled++) {
        open_engine(3, 30, 60);
        step_us = 200;
        for (size_t i = 0; i < 30; i++) {
            make_request(&outcomes[i], 20, 100, &rng);
            outcomes[i].request.ignore_eos = 1;
            CHECK_INT(submit(&outcomes[i]), LLAISYS_OK);
        }
        size_t ended = 0;
        if (polled)
            for (int i = 0; i < 5; i++) ended += poll_once(1000);
        CHECK_INT(llaisysEngineStop(engine), LLAISYS_OK);
        CHECK_INT(llaisysEngineStop(engine), LLAISYS_OK);
        step_us = 0;
        check_idle();
        struct pollfd fd = {.fd = llaisysEngineFd(engine), .events = POLLIN};
        CHECK_INT(poll(&fd, 1, 0), 1);
        poll_until(30 - ended);
        size_t closed = 0;
        for (size_t i = 0; i < 30; i++) {
            check_outcome(&outcomes[i]);
            closed += outcomes[i].finish == LLAISYS_FINISH_CLOSED;
        }
        CHECK(closed > 20);
        size_t count = 7;
        struct LlaisysEvent event;
        CHECK_INT(llaisysEnginePoll(engine, &event, 1, -1, &count), LLAISYS_CLOSED);
        CHECK_INT(count, 0);
        CHECK_INT(submit(&outcomes[0]), LLAISYS_CLOSED);
        close_engine();
    }
}

/* Close with everything in flight and nobody polling: nothing hangs or leaks (AddressSanitizer looks). */
TEST(close_at_any_time) {
    struct rng rng = {10};
    for (int round = 0; round < 50; round++) {
        open_engine(3, 20, 60);
        const size_t n = rng_below(&rng, 20);
        for (size_t i = 0; i < n; i++) {
            make_request(&outcomes[i], 20, 50, &rng);
            CHECK_INT(submit(&outcomes[i]), LLAISYS_OK);
        }
        if (rng_below(&rng, 2)) poll_once(0);
        if (rng_below(&rng, 2)) usleep((unsigned)rng_below(&rng, 300));
        llaisysEngineClose(engine);
        fake_close(&device);
    }
    llaisysEngineClose(NULL);
}

static void *poll_forever(void *arg) {
    struct LlaisysEvent events[4];
    size_t count, *ended = arg;
    while (llaisysEnginePoll(engine, events, 4, -1, &count) == LLAISYS_OK)
        for (size_t i = 0; i < count; i++) *ended += events[i].finish != LLAISYS_FINISH_NONE;
    return NULL;
}

/* A thread that waits in Poll without limit is woken by Stop, and has seen every end by then. */
TEST(stop_wakes_the_poller) {
    struct rng rng = {11};
    for (int round = 0; round < 20; round++) {
        size_t ended = 0;
        open_engine(3, 20, 60);
        pthread_t poller;
        pthread_create(&poller, NULL, poll_forever, &ended);
        for (size_t i = 0; i < 10; i++) {
            make_request(&outcomes[i], 20, 30, &rng);
            CHECK_INT(submit(&outcomes[i]), LLAISYS_OK);
        }
        usleep((unsigned)rng_below(&rng, 500));
        CHECK_INT(llaisysEngineStop(engine), LLAISYS_OK);
        pthread_join(poller, NULL);
        CHECK_INT(ended, 10);
        close_engine();
    }
}

TEST(drain) {
    struct rng rng = {12};
    open_engine(3, 20, 60);
    for (size_t i = 0; i < 10; i++) {
        make_request(&outcomes[i], 20, 30, &rng);
        outcomes[i].request.ignore_eos = 1;
        CHECK_INT(submit(&outcomes[i]), LLAISYS_OK);
    }
    pthread_mutex_lock(&gate);
    CHECK_INT(llaisysEngineDrain(engine, 0), LLAISYS_BUSY);
    CHECK_INT(llaisysEngineDrain(engine, 20), LLAISYS_BUSY);
    CHECK_STR_HAS(llaisysGetLastError(), "requests are still under way after 20 ms");
    CHECK_INT(submit(&outcomes[0]), LLAISYS_CLOSED);
    CHECK_STR_HAS(llaisysGetLastError(), "shutting down");
    pthread_mutex_unlock(&gate);
    CHECK_INT(llaisysEngineDrain(engine, -1), LLAISYS_OK);
    check_idle();
    poll_until(10);
    for (size_t i = 0; i < 10; i++) CHECK_INT(outcomes[i].finish, LLAISYS_FINISH_LENGTH);
    close_engine();
}

/* A device that fails ends everything that runs or waits with a message, and nothing new is taken. */
TEST(failure) {
    struct rng rng = {13};
    open_engine(3, 20, 60);
    steps_before_failure = 12;
    size_t accepted = 0;
    for (; accepted < 20; accepted++) {
        make_request(&outcomes[accepted], 20, 30, &rng);
        outcomes[accepted].request.ignore_eos = 1;
        if (submit(&outcomes[accepted])) break;
    }
    poll_until(accepted);
    for (size_t i = 0; i < accepted; i++) {
        CHECK_INT(outcomes[i].finish, LLAISYS_FINISH_ERROR);
        CHECK_STR_HAS(outcomes[i].last.message, "the stand-in was told to fail");
        check_outcome(&outcomes[i]);
    }
    CHECK_INT(submit(&outcomes[0]), LLAISYS_DEVICE);
    CHECK_STR_HAS(llaisysGetLastError(), "the engine has failed: the stand-in was told to fail");
    CHECK_INT(llaisysEngineDrain(engine, 1000), LLAISYS_OK);
    steps_before_failure = -1;
    close_engine();
}

/* ---- readiness ---- */

TEST(the_descriptor_says_when) {
    struct rng rng = {14};
    open_engine(4, 20, 60);
    struct pollfd fd = {.fd = llaisysEngineFd(engine), .events = POLLIN};
    CHECK_INT(poll(&fd, 1, 0), 0);
    CHECK_INT(poll_once(0), 0);
    CHECK_INT(poll_once(20), 0); /* the time is up */
    for (size_t i = 0; i < 6; i++) {
        make_request(&outcomes[i], 20, 1, &rng);
        CHECK_INT(submit(&outcomes[i]), LLAISYS_OK);
    }
    while (stats().unread < 6) usleep(100);
    CHECK_INT(poll(&fd, 1, 0), 1);
    struct LlaisysEvent event;
    size_t count;
    for (size_t i = 0; i < 6; i++) { /* one by one: readable until the last is read */
        CHECK_INT(poll(&fd, 1, 0), 1);
        CHECK_INT(llaisysEnginePoll(engine, &event, 1, 0, &count), LLAISYS_OK);
        CHECK_INT(count, 1);
        CHECK_INT(event.tag, i);
    }
    CHECK_INT(poll(&fd, 1, 0), 0);
    CHECK_INT(llaisysEnginePoll(engine, &event, 0, 0, &count), LLAISYS_INVALID);
    close_engine();
}

/* Tokens in an event stay as they are until the next call, whatever the engine computes meanwhile. */
TEST(tokens_stay_until_the_next_poll) {
    struct rng rng = {15};
    open_engine(4, 4, 60);
    make_request(&outcomes[0], 20, 5, &rng);
    outcomes[0].request.ignore_eos = 1;
    CHECK_INT(submit(&outcomes[0]), LLAISYS_OK);
    while (!stats().finished[LLAISYS_FINISH_LENGTH]) usleep(100);
    struct LlaisysEvent event;
    size_t count;
    CHECK_INT(llaisysEnginePoll(engine, &event, 1, 1000, &count), LLAISYS_OK);
    CHECK_INT(event.ntoken, 5);
    int64_t before[5];
    memcpy(before, event.tokens, sizeof before);
    size_t n = 0;
    for (; n < 11; n++) { /* memory for 12 requests */
        make_request(&outcomes[n], 20, 3, &rng);
        while (submit(&outcomes[n])) usleep(100);
    }
    while (stats().running || stats().waiting) usleep(100);
    CHECK(!memcmp(before, event.tokens, sizeof before));
    close_engine();
}

/* The thread's work between steps at 64 requests, polled all the time: below 50 microseconds a step. Counted is the
 * time for which it has a core, since other tests run beside this one. */
TEST(host_work_is_small) {
    enum { REQUESTS = 64 };
    struct rng rng = {16};
    open_engine(REQUESTS, REQUESTS, 64 * MAX_SEQ / 8);
    for (size_t i = 0; i < REQUESTS; i++) {
        make_request(&outcomes[i], 20, 150, &rng);
        outcomes[i].request.ignore_eos = 1;
        CHECK_INT(submit(&outcomes[i]), LLAISYS_OK);
    }
    poll_until(REQUESTS);
    const struct LlaisysEngineStats s = stats();
    const double us = 1e6 * s.host_cpu_s / (double)s.steps;
    printf("engine at %d requests: %.1f us a step\n", REQUESTS, us);
    CHECK(SLOW || us < 50);
    close_engine();
}

int main(int argc, char **argv) {
    const int failed = harness_main(argc > 1 ? argv[1] : NULL);
    overlaps = true;
    return harness_main(argc > 1 ? argv[1] : NULL) || failed;
}
