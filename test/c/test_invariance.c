/* test_invariance.c: through the whole engine, a request's tokens and logits are bit for bit those that it has alone:
 * in any batch, whenever it arrives, with its prompt cut anyhow, with a prefix from the cache or without, after
 * preemption, beside requests that are cancelled; greedy and sampled, with penalties, bias and log-probabilities.
 *
 * The reference of each request is a runner of its own, with one thread and nobody else. Another seed: `test_invariance
 * random 12345`, or the environment variable LLAISYS_TEST_SEED.
 *
 * Compiled with -DON_GPU it runs on a GPU, through the engine's own executor, one step ahead; logits are not seen then,
 * but in log-probabilities and tokens. It skips without a GPU. */
#include "../../engine/device.h"
#include "../../engine/engine.h"
#include "harness.h"
#include "model.h"

#include <unistd.h>

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
enum { SLOW = 1 };
#else
enum { SLOW = 0 };
#endif

enum { MAX_SEQ = 160, REQUESTS = 60, SYSTEM = 45, MAX_BIAS = 8, MAX_LOGPROBS = 5, AFTER = 7 };

#ifdef ON_GPU
static const llaisysDeviceType_t DEVICE = LLAISYS_DEVICE_NVIDIA;
static const struct lla_spec specs[] = {
    {LLAISYS_DTYPE_BF16, 2, 512, 8, 2, 64, 1408, 1000, 640, false, 1e-6f, 1e4, {0}, 0},
    {LLAISYS_DTYPE_BF16, 2, 384, 6, 1, 128, 1160, 1531, 640, true, 1e-5f, 1e6, {0}, 0},
    {LLAISYS_DTYPE_BF16, 3, 200, 14, 2, 64, 584, 5000, 640, false, 1e-6f, 1e4, {0}, 0},
};
#else
static const llaisysDeviceType_t DEVICE = LLAISYS_DEVICE_CPU;
static const struct lla_spec specs[] = {
    {LLAISYS_DTYPE_BF16, 2, 72, 6, 2, 24, 150, 131, 640, false, 1e-6f, 1e4, {0}, 0},
    {LLAISYS_DTYPE_F16, 2, 65, 7, 1, 16, 99, 101, 640, true, 1e-5f, 1e6, {0}, 0},
    {LLAISYS_DTYPE_F32, 3, 33, 2, 2, 64, 65, 77, 640, false, 1e-6f, 1e4, {0}, 0},
};
#endif
static const struct lla_limits limits[] = {
    {.max_seq = MAX_SEQ, .max_seqs = 5, .kv_tokens = 400, .kv_block = 16, .prefill_chunk = 40},
    {.max_seq = MAX_SEQ, .max_seqs = 8, .kv_tokens = 200, .kv_block = 4, .prefill_chunk = 23},
    {.max_seq = MAX_SEQ, .max_seqs = 3, .kv_tokens = 320, .kv_block = 32, .prefill_chunk = 150},
    {.max_seq = MAX_SEQ, .max_seqs = 6, .kv_tokens = 180, .kv_block = 1, .prefill_chunk = 9},
};

static uint64_t test_seed = 21;
static struct lla_runner alone;
static struct LlaisysEngine *engine;
static size_t vocab;
static float *row;
static uint32_t mask[5024 / 32]; /* [vocab / 32], rounded up */

/* ---- what the engine computes, logits and all ---- */

static uint64_t (*recorded)[MAX_SEQ]; /* [nrequest]: digest of the logits behind each position */

static uint64_t digest(const float *logits) {
    uint64_t h = 0xcbf29ce484222325u;
    for (size_t i = 0; i < vocab; i++) {
        uint32_t bits;
        memcpy(&bits, &logits[i], sizeof bits);
        h = (h ^ bits) * 0x100000001b3u;
    }
    return h;
}

struct recorder {
    struct lla_runner *runner;
    struct LlaisysEngine **engine;
    float *row;
};

static lla_status run_and_record(void *arg, const struct lla_step *step, int64_t *next) {
    const struct recorder *r = arg;
    const struct lla_step_seq *seqs = step->seqs;
    const size_t nseq = step->nseq;
    LLA_TRY(lla_runner_step(r->runner, seqs, nseq, next));
    size_t n = 0;
    for (size_t i = 0; i < nseq; i++) {
        if (!seqs[i].want_next) continue;
        LLA_TRY(lla_runner_logits(r->runner, n++, r->row));
        const size_t request = (size_t)(seqs[i].tokens - (*r->engine)->tokens) / MAX_SEQ;
        recorded[request][seqs[i].position0 + seqs[i].ntoken - 1] = digest(r->row);
    }
    return LLA_OK;
}

/* ---- requests ---- */

struct request {
    int64_t tokens[MAX_SEQ]; /* prompt and answer */
    size_t nprompt, most, ntoken;
    struct LlaisysSampling sampling;
    float min_p, repetition, presence, frequency;
    struct LlaisysLogitBias bias[MAX_BIAS];
    size_t nbias, nlogprob;
    struct LlaisysLogprob logprobs[MAX_SEQ * (1 + MAX_LOGPROBS)]; /* of the answer */
    uint64_t id;
    enum LlaisysConstraint constrained;
    int64_t after; /* the token behind which masks are wanted, or -1 */
    enum LlaisysFinish finish;
    bool submitted, is_owed; /* the next token waits for its mask */
};

static struct request requests[REQUESTS];
static int64_t system_prompt[SYSTEM];
static size_t saw_cached, saw_preempted, saw_cancelled, saw_follow_up, saw_penalised, saw_logprobs, saw_masked;

/* A prompt of its own, one that begins with the system's, one that was asked before, or the next turn of another. */
static void make_request(struct request *r, struct rng *rng) {
    *r = (struct request){.nprompt = rng_range(rng, 1, MAX_SEQ / 2)};
    for (size_t i = 0; i < r->nprompt; i++) r->tokens[i] = (int64_t)rng_below(rng, vocab);
    const struct request *other = &requests[rng_below(rng, REQUESTS)];
    const size_t kind = rng_below(rng, 4);
    if (kind == 1) {
        r->nprompt = SYSTEM + rng_range(rng, 1, 30);
        for (size_t i = 0; i < r->nprompt; i++)
            r->tokens[i] = i < SYSTEM ? system_prompt[i] : (int64_t)rng_below(rng, vocab);
    } else if (kind >= 2 && other->finish && other->ntoken + 12 < MAX_SEQ) {
        memcpy(r->tokens, other->tokens, sizeof r->tokens);
        r->nprompt = kind == 2 ? other->nprompt : other->ntoken + rng_range(rng, 1, 10);
        for (size_t i = other->ntoken; i < r->nprompt; i++) r->tokens[i] = (int64_t)rng_below(rng, vocab);
        saw_follow_up += kind == 3;
    }
    r->ntoken = r->nprompt;
    r->most = rng_range(rng, 1, 60);
    if (rng_below(rng, 2))
        r->sampling = (struct LlaisysSampling){.temperature = 0.5f + (float)rng_below(rng, 10) / 5,
                                               .top_k = (int32_t)rng_below(rng, 20),
                                               .top_p = rng_below(rng, 2) ? 1 : 0.8f,
                                               .seed = rng_next(rng)};
    if (rng_below(rng, 2)) r->min_p = 0.05f;
    if (rng_below(rng, 2)) {
        r->repetition = 0.8f + (float)rng_below(rng, 6) / 10;
        r->presence = (float)rng_below(rng, 5) / 4 - 0.5f;
        r->frequency = (float)rng_below(rng, 5) / 4 - 0.5f;
    }
    if (rng_below(rng, 2)) r->nbias = rng_below(rng, MAX_BIAS);
    for (size_t i = 0; i < r->nbias; i++)
        r->bias[i] = (struct LlaisysLogitBias){(int64_t)rng_below(rng, vocab), i ? 4 * rng_normal(rng) : -INFINITY};
    if (rng_below(rng, 2)) r->nlogprob = rng_range(rng, 1, 1 + MAX_LOGPROBS);
    r->constrained = (enum LlaisysConstraint)rng_below(rng, 3);
    r->after = r->constrained == LLAISYS_CONSTRAIN_AFTER || rng_below(rng, 2) ? AFTER : -1;
}

/* ---- masks ---- */

/* The mask of a token: a fifth of the vocabulary, by the token before and the answer's length. */
static void make_mask(int64_t before, size_t index, uint32_t *words) {
    memset(words, 0, (vocab + 31) / 32 * sizeof *words);
    for (size_t t = 0; t < vocab; t++)
        if (((int64_t)t * 7 + before * 3 + (int64_t)index) % 5 == 0) words[t / 32] |= 1u << t % 32;
}

/* Some tokens lift the constraint until the answer comes to `after` again. */
static bool lifts(const struct request *r, int64_t token) {
    return r->after >= 0 && token % 8 == 3;
}

/* Whether token n of the sequence, one of the answer's, is chosen under a mask. */
static bool is_masked(const struct request *r, size_t n) {
    bool masked = r->constrained == LLAISYS_CONSTRAIN_ALWAYS;
    for (size_t i = r->nprompt; i < n && r->constrained; i++)
        masked = r->tokens[i] == r->after || (masked && !lifts(r, r->tokens[i]));
    return masked;
}

static void supply_mask(struct request *r) {
    const size_t index = r->ntoken - r->nprompt;
    const int64_t before = r->tokens[r->ntoken - 1];
    r->is_owed = false;
    if (index && lifts(r, before)) {
        CHECK_INT(llaisysEngineSetMask(engine, r->id, index, NULL, 0), LLAISYS_OK);
        return;
    }
    make_mask(before, index, mask);
    CHECK_INT(llaisysEngineSetMask(engine, r->id, index, mask, (vocab + 31) / 32), LLAISYS_OK);
    saw_masked++;
}

static void submit(struct request *r, struct rng *rng) {
    const struct LlaisysRequest request = {.prompt = r->tokens,
                                           .nprompt = r->nprompt,
                                           .max_tokens = r->most,
                                           .sampling = r->sampling,
                                           .min_p = r->min_p,
                                           .repetition_penalty = r->repetition,
                                           .presence_penalty = r->presence,
                                           .frequency_penalty = r->frequency,
                                           .logit_bias = r->bias,
                                           .nlogit_bias = r->nbias,
                                           .logprobs = r->nlogprob > 0,
                                           .top_logprobs = r->nlogprob ? (int)r->nlogprob - 1 : 0,
                                           .constrained = r->constrained,
                                           .constrain_after = r->after,
                                           .tag = (uint64_t)(r - requests),
                                           .priority = rng_below(rng, 5) == 0,
                                           .no_cache = rng_below(rng, 8) == 0,
                                           .cache_salt = rng_below(rng, 8) == 0};
    CHECK_INT(llaisysEngineSubmit(engine, &request, &r->id), LLAISYS_OK);
    r->submitted = true;
    r->is_owed = r->constrained == LLAISYS_CONSTRAIN_ALWAYS;
}

/* Again, alone: the prompt in the largest chunks, then one token at a time; tokens and logits must be the same. */
static void check_alone(const struct request *r, const uint64_t *digests, const char *label) {
    const size_t rows = alone.graph.dims.max_rows;
    int32_t blocks[MAX_SEQ];
    int64_t next = -1;
    struct lla_bias bias[MAX_BIAS];
    struct lla_candidate logprobs[1 + MAX_LOGPROBS];
    for (size_t i = 0; i < r->nbias; i++) bias[i] = (struct lla_bias){(int32_t)r->bias[i].token, r->bias[i].bias};
    for (int32_t b = 0; b < MAX_SEQ; b++) blocks[b] = b + 1;
    for (size_t done = 0, n; done + 1 < r->ntoken + (r->ntoken == r->nprompt); done += n) {
        n = done < r->nprompt ? r->nprompt - done : 1;
        n = n < rows ? n : rows;
        const struct LlaisysSampling *s = &r->sampling;
        const bool masked = done + n >= r->nprompt && is_masked(r, done + n);
        if (masked) make_mask(r->tokens[done + n - 1], done + n - r->nprompt, mask);
        const struct lla_step_seq seq = {.tokens = r->tokens + done,
                                         .ntoken = n,
                                         .position0 = done,
                                         .blocks = blocks,
                                         .want_next = done + n >= r->nprompt,
                                         .sampling = {.temperature = s->temperature,
                                                      .top_p = s->top_p,
                                                      .min_p = r->min_p,
                                                      .repetition = r->repetition,
                                                      .presence = r->presence,
                                                      .frequency = r->frequency,
                                                      .top_k = s->top_k,
                                                      .nbias = (int32_t)r->nbias,
                                                      .nlogprob = (int32_t)r->nlogprob,
                                                      .seed = s->seed},
                                         .known = r->tokens,
                                         .nprompt = r->nprompt,
                                         .bias = bias,
                                         .logprobs = logprobs,
                                         .mask = masked ? mask : NULL};
        CHECK_INT(lla_runner_step(&alone, &seq, 1, &next), LLA_OK);
        if (!seq.want_next || done + n >= r->ntoken) continue;
        if (next != r->tokens[done + n]) {
            HARNESS_FAIL("%s: request %d, prompt of %zu: token %zu is %lld, alone it is %lld", label,
                         (int)(r - requests), r->nprompt, done + n - r->nprompt, (long long)r->tokens[done + n],
                         (long long)next);
            return;
        }
        if (memcmp(logprobs, &r->logprobs[(done + n - r->nprompt) * r->nlogprob], r->nlogprob * sizeof *logprobs)) {
            HARNESS_FAIL("%s: request %d, prompt of %zu: log-probabilities of token %zu differ", label,
                         (int)(r - requests), r->nprompt, done + n - r->nprompt);
            return;
        }
        if (DEVICE != LLAISYS_DEVICE_CPU) continue;
        lla_runner_logits(&alone, 0, row);
        if (digest(row) != digests[done + n - 1]) {
            HARNESS_FAIL("%s: request %d, prompt of %zu: logits of token %zu differ", label, (int)(r - requests),
                         r->nprompt, done + n - r->nprompt);
            return;
        }
    }
}

static size_t take_events(int timeout_ms, const char *label) {
    struct LlaisysEvent events[8];
    size_t count, ended = 0;
    for (size_t i = 0; i < REQUESTS; i++)
        if (requests[i].is_owed && !requests[i].finish) supply_mask(&requests[i]);
    CHECK_INT(llaisysEnginePoll(engine, events, 8, timeout_ms, &count), LLAISYS_OK);
    for (size_t i = 0; i < count; i++) {
        struct request *r = &requests[events[i].tag];
        memcpy(r->tokens + r->ntoken, events[i].tokens, events[i].ntoken * sizeof *r->tokens);
        if (r->nlogprob)
            memcpy(&r->logprobs[(r->ntoken - r->nprompt) * r->nlogprob], events[i].logprobs,
                   events[i].ntoken * r->nlogprob * sizeof *r->logprobs);
        r->ntoken += events[i].ntoken;
        r->finish = events[i].finish;
        if (!r->finish) {
            /* a token that was chosen under a mask asks for the next one's, if only to hear that there is none */
            r->is_owed |=
                events[i].ntoken && r->constrained && (is_masked(r, r->ntoken - 1) || is_masked(r, r->ntoken));
            continue;
        }
        ended++;
        check_alone(r, recorded[events[i].request % engine->nrequest], label);
        if (r->finish == LLAISYS_FINISH_LENGTH)
            CHECK_INT(r->ntoken, r->nprompt + r->most < MAX_SEQ ? r->nprompt + r->most : MAX_SEQ);
        else
            CHECK_INT(r->finish, LLAISYS_FINISH_CANCELLED);
        saw_cached += events[i].cached_tokens > 0;
        saw_preempted += events[i].preemptions > 0;
        saw_cancelled += r->finish == LLAISYS_FINISH_CANCELLED;
        saw_penalised += r->repetition > 0 && events[i].preemptions + events[i].cached_tokens > 0;
        saw_logprobs += r->nlogprob > 0 && events[i].preemptions + events[i].cached_tokens > 0;
    }
    return ended;
}

/* A runner with random weights, ready to run. */
static void open_runner(const struct lla_spec *spec, struct lla_limits l, int nthread, uint64_t seed,
                        struct lla_runner *runner) {
    l.device = DEVICE;
    CHECK_INT(lla_runner_create(spec, &l, (struct lla_shard){0, 1}, 0, nthread, runner), LLA_OK);
    const struct lla_plan *plan = &runner->graph.plan;
    for (size_t i = 0; i < plan->nweight; i++) {
        const struct lla_weight *w = &plan->weights[i];
        if (w->kind == LLA_W_HEAD && spec->tied) continue;
        char *dense = malloc(w->rows * w->cols * lla_dtype_size(spec->dtype));
        random_weight(w, spec->dtype, seed + i, dense);
        CHECK_INT(lla_runner_store(runner, w, 0, w->rows, dense), LLA_OK);
        free(dense);
    }
    CHECK_INT(lla_runner_ready(runner), LLA_OK);
}

static void run_schedule(const struct lla_spec *spec, const struct lla_limits *l, struct rng *rng) {
    char label[64];
    struct lla_runner *runner = calloc(1, sizeof *runner);
    vocab = spec->vocab;
    const struct lla_limits single = {.max_seq = MAX_SEQ, .max_seqs = 1, .kv_block = l->kv_block, .prefill_chunk = 64};
    snprintf(label, sizeof label, "head_dim %zu, blocks of %zu", spec->head_dim, l->kv_block);
    const uint64_t weights = rng_next(rng);
    open_runner(spec, single, 1, weights, &alone);
    open_runner(spec, *l, (int)rng_range(rng, 1, 2), weights, runner);
    const struct lla_dims *d = &runner->graph.dims;
    const size_t mixed_rows = rng_range(rng, d->max_seqs, d->max_rows);
    const struct lla_engine_config config = {.scheduler = {.max_seqs = d->max_seqs,
                                                           .max_seq = MAX_SEQ,
                                                           .max_rows = d->max_rows,
                                                           .mixed_rows = mixed_rows,
                                                           .nblock = runner->graph.plan.nblock,
                                                           .kv_block = d->kv_block},
                                             .vocab = vocab,
                                             .max_queue = REQUESTS,
                                             .max_logprobs = MAX_LOGPROBS};
    const struct LlaisysEngineOptions options = {
        .max_queue = REQUESTS, .mixed_rows = mixed_rows, .max_logprobs = MAX_LOGPROBS};
    struct recorder recorder = {runner, &engine, malloc(vocab * sizeof(float))};
    row = malloc(vocab * sizeof *row);
    recorded = calloc(REQUESTS + 2 * d->max_seqs, sizeof *recorded);
    if (DEVICE == LLAISYS_DEVICE_CPU)
        CHECK_INT(lla_engine_create(&config, (struct lla_executor){.wait = run_and_record, .arg = &recorder}, &engine),
                  LLA_OK);
    else
        CHECK_INT(lla_engine_create_over(runner, &options, &engine), LLA_OK); /* which owns the runner */
    CHECK_INT(engine->executor.overlaps, DEVICE != LLAISYS_DEVICE_CPU);
    for (size_t i = 0; i < SYSTEM; i++) system_prompt[i] = (int64_t)rng_below(rng, vocab);
    memset(requests, 0, sizeof requests);

    size_t ended = 0, burst = 0;
    for (size_t i = 0; i < REQUESTS && !TEST_FAILURES;) {
        if (!burst) {
            burst = rng_range(rng, 1, 12);
            for (size_t n = rng_below(rng, 30); n > 0 && ended < i; n--) ended += take_events(100, label);
        }
        make_request(&requests[i], rng);
        submit(&requests[i++], rng);
        burst--;
        if (rng_below(rng, 6) == 0) {
            if (rng_below(rng, 2)) usleep((unsigned)rng_below(rng, 2000));
            CHECK_INT(llaisysEngineCancel(engine, requests[rng_below(rng, i)].id), LLAISYS_OK);
        }
    }
    while (ended < REQUESTS && !TEST_FAILURES) ended += take_events(10000, label);
    CHECK_INT(llaisysEngineStop(engine), LLAISYS_OK);
    CHECK_INT(engine->scheduler.pool.nactive, 0);
    if (lla_kvpool_check(&engine->scheduler.pool)) HARNESS_FAIL("%s", lla_last_error());
    llaisysEngineClose(engine);
    lla_runner_destroy(&alone);
    if (DEVICE == LLAISYS_DEVICE_CPU) {
        lla_runner_destroy(runner);
        free(runner);
    }
    free(recorder.row);
    free(row);
    free(recorded);
}

TEST(random_schedules) {
    if (lla_device_get(DEVICE)->count() == 0) {
        printf("SKIPPED: no GPU\n");
        exit(77);
    }
    enum { NSPEC = sizeof specs / sizeof *specs, NLIMITS = sizeof limits / sizeof *limits };
    struct rng rng = {test_seed};
    const char *asked = getenv("LLAISYS_TEST_SCHEDULES");
    const size_t count = asked ? strtoull(asked, NULL, 10) : SLOW ? 4 : 2 * NSPEC * NLIMITS;
    for (size_t i = 0; i < count && !TEST_FAILURES; i++)
        run_schedule(&specs[i % NSPEC], &limits[i / NSPEC % NLIMITS], &rng);
    printf("%zu found a prefix, %zu were preempted, %zu cancelled, %zu follow up\n", saw_cached, saw_preempted,
           saw_cancelled, saw_follow_up);
    printf("of those with a prefix or preempted, %zu had penalties and %zu log-probabilities\n", saw_penalised,
           saw_logprobs);
    printf("%zu tokens were chosen under masks\n", saw_masked);
    CHECK(saw_penalised > 3 && saw_logprobs > 3 && saw_masked > 100);
    CHECK(saw_cached > 10 && saw_preempted > 3 && saw_cancelled > 3 && saw_follow_up > 3);
    if (TEST_FAILURES) fprintf(stderr, "seed %llu\n", (unsigned long long)test_seed);
}

int main(int argc, char **argv) {
    const char *seed = argc > 2 ? argv[2] : getenv("LLAISYS_TEST_SEED");
    if (seed) test_seed = strtoull(seed, NULL, 10);
    return harness_main(argc > 1 ? argv[1] : NULL);
}
