/* test_masks.c: constrained requests: none of their tokens is chosen before its mask is there, none under another's or
 * an old one, whatever becomes of them meanwhile; others neither wait nor change. The model and the grammar are
 * stand-ins. ThreadSanitizer runs this file, too (scripts/test.sh). */
#include "../../engine/engine.h"
#include "fake_device.h"
#include "random.h"

#include <stdatomic.h>
#include <unistd.h>

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
enum { SLOW = 1 };
#else
enum { SLOW = 0 };
#endif

enum { VOCAB = 70, WORDS = 3, MAX_SEQ = 120, REQUESTS = 200, TRIGGER = 9 };

static struct LlaisysEngine *engine;
static struct fake_device device;
static const int64_t eos[] = {3};
static int64_t launched[2][64]; /* what steps in flight have chosen */
static size_t nlaunched, nwaited;
static bool ignores_eos; /* all requests */
static bool overlaps;    /* the second time that all tests run */
static atomic_long steps_before_failure = -1;

static lla_status launch(void *arg, const struct lla_step *step) {
    for (size_t i = 0; i < step->nseq; i++) {
        const struct lla_seq *seq = step->who[i];
        if (step->seqs[i].want_next) CHECK((step->seqs[i].mask != NULL) == seq->is_masked);
    }
    fake_step(arg, step, launched[nlaunched++ % 2]);
    return LLA_OK;
}

static lla_status await(void *arg, const struct lla_step *step, int64_t *next) {
    (void)arg;
    if (steps_before_failure == 0) return lla_fail(LLA_EDEVICE, "the stand-in was told to fail");
    memcpy(next, launched[nwaited++ % 2], step->nseq * sizeof *next);
    return LLA_OK;
}

static void open_engine(size_t seqs, size_t max_queue, size_t blocks) {
    const struct lla_engine_config config = {.scheduler = {.max_seqs = seqs,
                                                           .max_seq = MAX_SEQ,
                                                           .max_rows = 32,
                                                           .mixed_rows = 16,
                                                           .nblock = blocks + 1,
                                                           .kv_block = 4,
                                                           .eos = eos,
                                                           .neos = 1},
                                             .vocab = VOCAB,
                                             .max_queue = max_queue};
    device = fake_open(blocks + 1, 4, VOCAB);
    nlaunched = nwaited = 0;
    CHECK_INT(lla_engine_create(&config, (struct lla_executor){launch, await, &device, overlaps}, &engine), LLA_OK);
}

static struct LlaisysEngineStats stats(void) {
    struct LlaisysEngineStats s;
    llaisysEngineStats(engine, &s);
    return s;
}

static void close_engine(void) {
    CHECK_INT(llaisysEngineStop(engine), LLAISYS_OK);
    const struct LlaisysEngineStats s = stats();
    uint64_t ended = 0;
    for (size_t i = 1; i < 7; i++) ended += s.finished[i];
    CHECK_INT(ended, s.submitted);
    CHECK_INT(s.kv_active, 0);
    CHECK_INT(s.running + s.waiting, 0);
    if (lla_kvpool_check(&engine->scheduler.pool)) HARNESS_FAIL("%s", lla_last_error());
    llaisysEngineClose(engine);
    fake_close(&device);
}

/* ---- requests ---- */

static struct asked {
    struct LlaisysRequest request;
    int64_t prompt[MAX_SEQ], answer[MAX_SEQ];
    uint64_t id;
    size_t n;
    enum LlaisysFinish finish;
    char message[100];
    size_t preemptions;
    bool is_free;  /* as its driver sees it: no mask is needed now */
    bool is_owed;  /* a mask, now */
    bool is_quiet; /* and gets none */
} asked[REQUESTS];

/* The grammar: what may follow depends on the last token and the place; a fourth of the vocabulary, spread. An answer
 * goes free behind every token below 5, if it has a trigger. */
static bool goes_free(const struct LlaisysRequest *q, int64_t token) {
    return q->constrain_after == TRIGGER && token < 5;
}

static void make_mask(int64_t last, size_t index, uint32_t *mask) {
    memset(mask, 0, WORDS * sizeof *mask);
    for (int64_t t = 0; t < VOCAB; t++)
        if ((t * 7 + last * 3 + (int64_t)index) % 4 == 0) mask[t / 32] |= 1u << t % 32;
    mask[WORDS - 1] |= 0xffffffc0u; /* beyond the vocabulary: of no meaning */
}

/* What the request answers when it is alone. */
static void check_answer(const struct asked *a) {
    const struct LlaisysRequest *q = &a->request;
    const struct lla_sampling_row s = {.temperature = q->sampling.temperature, .seed = q->sampling.seed};
    bool is_free = q->constrained != LLAISYS_CONSTRAIN_ALWAYS;
    uint64_t h = 0;
    uint32_t mask[WORDS];
    for (size_t i = 0; i < q->nprompt; i++) h = fake_digest(h, q->prompt[i]);
    for (size_t i = 0; i < a->n; i++) {
        make_mask(i ? a->answer[i - 1] : q->prompt[q->nprompt - 1], i, mask);
        const int64_t token = fake_allowed(&device, is_free ? NULL : mask, fake_next(&device, h, &s));
        if (a->answer[i] != token)
            HARNESS_FAIL("request %zu, token %zu is %d, expected %d (%s)", (size_t)q->tag, i, (int)a->answer[i],
                         (int)token, is_free ? "free" : "masked");
        h = fake_digest(h, token);
        if (q->constrained && goes_free(q, token)) is_free = true;
        if (q->constrained && token == q->constrain_after) is_free = false;
    }
    if (a->finish == LLAISYS_FINISH_LENGTH) CHECK_INT(a->n, q->max_tokens);
    if (a->finish == LLAISYS_FINISH_STOP) CHECK_INT(a->answer[a->n - 1], eos[0]);
}

static int submit(size_t tag, size_t nprompt, size_t max_tokens, enum LlaisysConstraint constrained, struct rng *rng) {
    struct asked *a = &asked[tag];
    *a = (struct asked){.request = {.prompt = a->prompt,
                                    .nprompt = nprompt,
                                    .max_tokens = max_tokens,
                                    .tag = tag,
                                    .ignore_eos = ignores_eos,
                                    .constrained = constrained,
                                    .constrain_after = -1},
                        .is_free = constrained != LLAISYS_CONSTRAIN_ALWAYS,
                        .is_owed = constrained == LLAISYS_CONSTRAIN_ALWAYS};
    if (constrained == LLAISYS_CONSTRAIN_AFTER) a->request.constrain_after = TRIGGER;
    if (constrained == LLAISYS_CONSTRAIN_ALWAYS && rng_below(rng, 3) == 0) a->request.constrain_after = TRIGGER;
    struct rng text = {rng_below(rng, 4)}; /* prefixes are shared */
    for (size_t i = 0; i < nprompt; i++) a->prompt[i] = (int64_t)rng_below(&text, VOCAB);
    if (rng_below(rng, 2)) a->prompt[nprompt - 1] = (int64_t)rng_below(rng, VOCAB);
    if (rng_below(rng, 3) == 0)
        a->request.sampling = (struct LlaisysSampling){.temperature = 1, .top_p = 1, .seed = rng_next(rng)};
    return llaisysEngineSubmit(engine, &a->request, &a->id);
}

static int set_mask(struct asked *a, const uint32_t *mask) {
    return llaisysEngineSetMask(engine, a->id, a->n, mask, mask ? WORDS : 0);
}

/* Supplies the mask that is owed, or says that none is. */
static void supply(struct asked *a) {
    const struct LlaisysRequest *q = &a->request;
    uint32_t mask[WORDS];
    const int64_t last = a->n ? a->answer[a->n - 1] : q->prompt[q->nprompt - 1];
    a->is_owed = false;
    if (a->n && goes_free(q, last)) {
        a->is_free = true;
        CHECK_INT(set_mask(a, NULL), LLAISYS_OK);
        return;
    }
    make_mask(last, a->n, mask);
    CHECK_INT(set_mask(a, mask), LLAISYS_OK);
}

static size_t poll_once(int timeout_ms) {
    struct LlaisysEvent events[16];
    size_t count = 0, ended = 0;
    const int status = llaisysEnginePoll(engine, events, 16, timeout_ms, &count);
    CHECK(status == LLAISYS_OK || status == LLAISYS_CLOSED);
    for (size_t i = 0; i < count; i++) {
        struct asked *a = &asked[events[i].tag];
        CHECK(a->is_free || events[i].ntoken <= 1); /* one for a mask */
        memcpy(a->answer + a->n, events[i].tokens, events[i].ntoken * sizeof *a->answer);
        a->n += events[i].ntoken;
        a->finish = events[i].finish;
        a->preemptions = events[i].preemptions;
        if (events[i].message) snprintf(a->message, sizeof a->message, "%s", events[i].message);
        ended += a->finish != LLAISYS_FINISH_NONE;
        if (a->finish || !events[i].ntoken || !a->request.constrained) continue;
        if (a->answer[a->n - 1] == a->request.constrain_after) a->is_free = false;
        a->is_owed = !a->is_free;
    }
    return ended;
}

/* ---- tests ---- */

TEST(answers_are_those_of_the_request_alone) {
    for (uint64_t round = 0; round < (SLOW ? 4 : 30) && !TEST_FAILURES; round++) {
        struct rng rng = {100 + round};
        const size_t blocks = MAX_SEQ / 4 + rng_below(&rng, 60), n = 60;
        size_t ended = 0, cancelled = 0, preempted = 0;
        open_engine(rng_range(&rng, 1, 8), REQUESTS, blocks);
        for (size_t i = 0; i < n; i++)
            CHECK_INT(submit(i, rng_range(&rng, 1, 60), rng_range(&rng, 1, 50),
                             (enum LlaisysConstraint)rng_below(&rng, 3), &rng),
                      LLAISYS_OK);
        while (ended < n && !TEST_FAILURES) {
            ended += poll_once(rng_below(&rng, 4) ? 0 : 1);
            for (size_t i = 0; i < n; i++) {
                struct asked *a = &asked[i];
                if (a->finish) continue;
                if (a->is_owed && rng_below(&rng, 3)) supply(a);
                if (rng_below(&rng, 4000) == 0) {
                    CHECK_INT(llaisysEngineCancel(engine, a->id), LLAISYS_OK);
                    a->is_quiet = true;
                }
            }
        }
        for (size_t i = 0; i < n; i++) {
            check_answer(&asked[i]);
            cancelled += asked[i].finish == LLAISYS_FINISH_CANCELLED;
            preempted += asked[i].preemptions > 0;
            CHECK(asked[i].finish == LLAISYS_FINISH_STOP || asked[i].finish == LLAISYS_FINISH_LENGTH ||
                  asked[i].finish == LLAISYS_FINISH_CANCELLED);
            CHECK(asked[i].finish != LLAISYS_FINISH_CANCELLED || asked[i].is_quiet);
        }
        if (round < 3) printf("%zu cancelled, %zu preempted\n", cancelled, preempted);
        close_engine();
    }
}

/* A request whose mask does not come holds up nobody, has its prompt computed, and goes on when the mask comes. */
TEST(others_go_on) {
    struct rng rng = {1};
    open_engine(4, 20, 100);
    CHECK_INT(submit(0, 50, 20, LLAISYS_CONSTRAIN_ALWAYS, &rng), LLAISYS_OK);
    while (stats().rows < 49) usleep(100);
    usleep(2000);
    CHECK_INT(stats().rows, 49); /* all but the one that chooses */
    CHECK_INT(stats().running, 1);
    for (size_t i = 1; i < 10; i++) CHECK_INT(submit(i, 20, 20, LLAISYS_CONSTRAIN_NEVER, &rng), LLAISYS_OK);
    for (size_t ended = 0; ended < 9 && !TEST_FAILURES;) ended += poll_once(1000);
    for (size_t i = 1; i < 10; i++) check_answer(&asked[i]);
    CHECK_INT(asked[0].n, 0);
    const uint64_t steps = stats().steps;
    usleep(2000);
    CHECK_INT(stats().steps, steps); /* nor does it keep the engine busy */
    for (size_t ended = 0; !ended && !TEST_FAILURES; ended += poll_once(1000))
        if (asked[0].is_owed) supply(&asked[0]);
    check_answer(&asked[0]);
    close_engine();
}

TEST(wrong_masks_are_refused) {
    struct rng rng = {2};
    uint32_t mask[WORDS] = {0}, none[WORDS] = {0, 0, 0xffffffc0u};
    open_engine(2, 20, 100);
    CHECK_INT(submit(0, 10, 20, LLAISYS_CONSTRAIN_NEVER, &rng), LLAISYS_OK);
    set_mask(&asked[0], mask); /* refused, or it has ended by then */
    CHECK_INT(poll_once(1000) <= 1, 1);
    while (!asked[0].finish && !TEST_FAILURES) poll_once(1000);
    check_answer(&asked[0]);

    struct asked *a = &asked[1];
    CHECK_INT(submit(1, 10, 20, LLAISYS_CONSTRAIN_ALWAYS, &rng), LLAISYS_OK);
    a->request.constrain_after = -1;
    make_mask(a->prompt[9], 0, mask);
    CHECK_INT(llaisysEngineSetMask(NULL, a->id, 0, mask, WORDS), LLAISYS_INVALID);
    CHECK_INT(llaisysEngineSetMask(engine, a->id, 0, mask, WORDS - 1), LLAISYS_INVALID);
    CHECK_STR_HAS(llaisysGetLastError(), "a mask of 2 words, expected 3 for a vocabulary of 70");
    CHECK_INT(llaisysEngineSetMask(engine, a->id, 1, mask, WORDS), LLAISYS_INVALID);
    CHECK_STR_HAS(llaisysGetLastError(), "a mask for token 1 of an answer that has 0 tokens, expected 0");
    CHECK_INT(llaisysEngineSetMask(engine, a->id + 100000, 0, mask, WORDS), LLAISYS_OK); /* nobody, or not any more */
    CHECK_INT(set_mask(a, mask), LLAISYS_OK);
    const int again = set_mask(a, mask); /* a second one, or an old one by now */
    CHECK_INT(again, LLAISYS_INVALID);
    while (!a->n && !TEST_FAILURES) poll_once(1000);
    CHECK_INT(llaisysEngineSetMask(engine, a->id, 0, mask, WORDS), LLAISYS_INVALID);
    CHECK_STR_HAS(llaisysGetLastError(), "a mask for token 0 of an answer that has 1 tokens, expected 1");
    check_answer(a);

    if (!a->finish) { /* a mask of nothing: bits beyond the vocabulary do not count */
        CHECK_INT(set_mask(a, none), LLAISYS_OK);
        while (!a->finish && !TEST_FAILURES) poll_once(1000);
        CHECK_INT(a->finish, LLAISYS_FINISH_MASKED);
        CHECK_STR_HAS(a->message, "the mask of the next token allows no token");
        CHECK_INT(a->n, 1);
        CHECK_INT(set_mask(a, mask), LLAISYS_OK); /* it has ended */
    }

    a = &asked[2]; /* one that goes free needs none */
    CHECK_INT(submit(2, 10, MAX_SEQ - 10, LLAISYS_CONSTRAIN_ALWAYS, &rng), LLAISYS_OK);
    CHECK_INT(set_mask(a, NULL), LLAISYS_OK);
    const int idle = set_mask(a, mask);
    CHECK(idle == LLAISYS_INVALID || idle == LLAISYS_OK); /* OK: it has ended */
    a->is_free = true;
    while (!a->finish && !TEST_FAILURES) {
        poll_once(1000);
        if (a->is_owed) supply(a);
    }
    close_engine();
}

/* Cancelled, stopped, failed or closed while it waits, in the queue or running. */
TEST(ends_while_waiting) {
    static const enum LlaisysFinish ends[] = {LLAISYS_FINISH_CANCELLED, LLAISYS_FINISH_CLOSED, LLAISYS_FINISH_ERROR};
    const uint32_t mask[WORDS] = {1};
    for (int how = 0; how < 4; how++) {
        struct rng rng = {3};
        open_engine(3, 20, 100);
        for (size_t i = 0; i < 6; i++) CHECK_INT(submit(i, 20, 20, LLAISYS_CONSTRAIN_ALWAYS, &rng), LLAISYS_OK);
        while (stats().rows < 19) usleep(100);
        if (how == 0) {
            for (size_t i = 0; i < 6; i++) CHECK_INT(llaisysEngineCancel(engine, asked[i].id), LLAISYS_OK);
        } else if (how == 1) {
            CHECK_INT(llaisysEngineStop(engine), LLAISYS_OK);
        } else if (how == 2) {
            while (stats().rows < 3 * 19 && stats().cached_tokens == 0) usleep(100);
            usleep(2000);
            steps_before_failure = 0;
            supply(&asked[0]);
        } else {
            close_engine(); /* events are lost, memory is not */
            continue;
        }
        for (size_t ended = 0; ended < 6 && !TEST_FAILURES;) ended += poll_once(1000);
        for (size_t i = 0; i < 6; i++) {
            CHECK_INT(asked[i].finish, ends[how]);
            CHECK_INT(set_mask(&asked[i], mask), LLAISYS_OK); /* no error: it has ended */
        }
        steps_before_failure = -1;
        close_engine();
    }
}

/* A mask that is there when its request gives way to others is still there when the request comes back. */
TEST(a_mask_survives_preemption) {
    struct rng rng = {4};
    open_engine(3, 20, MAX_SEQ / 4); /* for one sequence of full length, or three short ones */
    ignores_eos = true;
    for (size_t i = 0; i < 3; i++) CHECK_INT(submit(i, 8, 100, LLAISYS_CONSTRAIN_ALWAYS, &rng), LLAISYS_OK);
    for (size_t ended = 0; ended < 3 && !TEST_FAILURES;) {
        ended += poll_once(1);
        for (size_t i = 3; i-- > 0;) /* the last first: it has its mask while the first takes its blocks */
            if (asked[i].is_owed && !asked[i].finish) supply(&asked[i]);
    }
    ignores_eos = false;
    for (size_t i = 0; i < 3; i++) {
        check_answer(&asked[i]);
        CHECK_INT(asked[i].finish, LLAISYS_FINISH_LENGTH);
    }
    CHECK(asked[1].preemptions + asked[2].preemptions > 0);
    close_engine();
}

int main(int argc, char **argv) {
    const int failed = harness_main(argc > 1 ? argv[1] : NULL);
    overlaps = true;
    return harness_main(argc > 1 ? argv[1] : NULL) || failed;
}
