/* test_alloc.c: once a model is there, nothing is allocated: not by the library's own calls (the linker's --wrap counts
 * them), and, where no sanitizer has taken the allocator, not by libraries that it calls either. */
#include "../../engine/engine.h"
#include "../../include/llaisys/models/qwen2.h"
#include "harness.h"
#include "model.h"
#include "random.h"

#include <errno.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdlib.h>
#include <sys/mman.h>

static atomic_size_t calls;
static atomic_bool counting;

static void count(void) {
    if (counting) calls++;
}

#define WRAP(type, name, parameters, arguments)                                                                        \
    type __real_##name parameters;                                                                                     \
    type __wrap_##name parameters;                                                                                     \
    type __wrap_##name parameters {                                                                                    \
        count();                                                                                                       \
        return __real_##name arguments;                                                                                \
    }
WRAP(void *, malloc, (size_t n), (n))
WRAP(void *, calloc, (size_t n, size_t size), (n, size))
WRAP(void *, realloc, (void *p, size_t n), (p, n))
WRAP(void *, aligned_alloc, (size_t a, size_t n), (a, n))
WRAP(int, posix_memalign, (void **p, size_t a, size_t n), (p, a, n))
WRAP(void *, mmap, (void *p, size_t n, int prot, int flags, int fd, off_t at), (p, n, prot, flags, fd, at))

#if defined(__GLIBC__) && !defined(__SANITIZE_ADDRESS__)
/* The program's definitions stand before the C library's for every library, such as libgomp, and for libc itself. */
enum { HAS_LIBRARIES = 1 };
#pragma GCC visibility push(default)
void *__libc_malloc(size_t n);
void *__libc_calloc(size_t n, size_t size);
void *__libc_realloc(void *p, size_t n);
void *__libc_memalign(size_t alignment, size_t n);
void *malloc(size_t n) {
    count();
    return __libc_malloc(n);
}
void *calloc(size_t n, size_t size) {
    count();
    return __libc_calloc(n, size);
}
void *realloc(void *p, size_t n) {
    count();
    return __libc_realloc(p, n);
}
void *aligned_alloc(size_t alignment, size_t n) {
    count();
    return __libc_memalign(alignment, n);
}
int posix_memalign(void **p, size_t alignment, size_t n) {
    count();
    *p = __libc_memalign(alignment, n);
    return *p ? 0 : ENOMEM;
}
#pragma GCC visibility pop
#else
enum { HAS_LIBRARIES = 0 };
#endif

static struct LlaisysQwen2Model *make_model(void) {
    const struct LlaisysQwen2Meta meta = {.dtype = LLAISYS_DTYPE_BF16,
                                          .nlayer = 2,
                                          .hs = 64,
                                          .nh = 4,
                                          .nkvh = 2,
                                          .dh = 16,
                                          .di = 96,
                                          .maxseq = 700,
                                          .voc = 3000,
                                          .epsilon = 1e-6f,
                                          .theta = 1e4f,
                                          .end_token = -1};
    struct LlaisysQwen2Model *m = llaisysQwen2ModelCreate(&meta, LLAISYS_DEVICE_CPU, NULL, 1);
    CHECK(m);
    if (!m) exit(1);
    struct LlaisysQwen2Weights *w = llaisysQwen2ModelWeights(m);
    uint16_t *embed = tensorGetData(w->in_embed);
    struct rng rng = {3};
    for (size_t i = 0; i < meta.voc * meta.hs; i++) embed[i] = (uint16_t)(0x3c00 + rng_below(&rng, 0x300));
    return m;
}

/* Three prompts, two of them longer than a chunk, and fifty tokens behind each. */
static void run(struct LlaisysQwen2Model *m, const struct LlaisysSampling *sampling) {
    static const size_t lengths[] = {5, 600, 520};
    int64_t tokens[600];
    struct rng rng = {4};
    for (size_t i = 0; i < 600; i++) tokens[i] = (int64_t)rng_below(&rng, 3000);
    for (size_t i = 0; i < 3; i++) {
        int64_t token = llaisysQwen2ModelStep(m, tokens, lengths[i], sampling);
        for (int step = 0; step < 50; step++) {
            CHECK(token >= 0);
            token = llaisysQwen2ModelStep(m, &token, 1, sampling);
        }
        llaisysQwen2ModelReset(m);
    }
}

static size_t allocations(const struct LlaisysSampling *sampling) {
    struct LlaisysQwen2Model *m = make_model();
    calls = 0;
    counting = true;
    run(m, sampling);
    counting = false;
    llaisysQwen2ModelDestroy(m);
    return calls;
}

TEST(the_counter_counts) {
    calls = 0;
    counting = true;
    llaisysQwen2ModelDestroy(make_model());
    counting = false;
    CHECK(calls > 10);
    calls = 0;
    counting = true;
    char *volatile text = strdup("allocated by the C library"); /* seen only where all libraries are */
    counting = false;
    CHECK_INT(calls, HAS_LIBRARIES);
    free(text);
}

TEST(greedy) {
    CHECK_INT(allocations(NULL), 0);
}

TEST(sampled_from_a_few) {
    CHECK_INT(allocations(&(struct LlaisysSampling){0.8f, 20, 0.9f, 1}), 0);
}

TEST(sampled_from_all) {
    CHECK_INT(allocations(&(struct LlaisysSampling){0.8f, 0, 0.9f, 1}), 0);
}

/* A step that fails allocates nothing either, and leaves the sequence as it was. */
TEST(failures) {
    struct LlaisysQwen2Model *m = make_model();
    int64_t tokens[701] = {1, 2, 3}, bad = 3000;
    CHECK(llaisysQwen2ModelStep(m, tokens, 3, NULL) >= 0);
    calls = 0;
    counting = true;
    CHECK_INT(llaisysQwen2ModelStep(m, &bad, 1, NULL), -1);
    CHECK_INT(llaisysQwen2ModelStep(m, tokens, 698, NULL), -1);
    CHECK_INT(llaisysQwen2ModelStep(m, tokens, 0, NULL), -1);
    CHECK_INT(llaisysQwen2ModelLength(m), 3);
    counting = false;
    CHECK_INT(calls, 0);
    llaisysQwen2ModelDestroy(m);
}

/* ---- the engine ---- */

static struct LlaisysEngine *make_engine(void) {
    const struct lla_spec spec = {LLAISYS_DTYPE_BF16, 2, 64, 4, 2, 16, 96, 3000, 700, true, 1e-6f, 1e4, {0}, 0};
    const struct lla_limits limits = {.max_seq = 300, .max_seqs = 4, .kv_tokens = 400, .prefill_chunk = 64};
    struct lla_runner *runner = calloc(1, sizeof *runner);
    struct LlaisysEngine *e = NULL;
    CHECK_INT(lla_runner_create(&spec, &limits, (struct lla_shard){0, 1}, 0, 2, runner), LLA_OK);
    fill_weights(&runner->graph, runner->arena, 3);
    CHECK_INT(lla_engine_create_over(runner, &(struct LlaisysEngineOptions){.max_queue = 16}, &e), LLA_OK);
    if (!e) exit(1);
    return e;
}

static size_t poll_engine(struct LlaisysEngine *e) {
    struct LlaisysEvent events[4];
    size_t count, ended = 0;
    CHECK_INT(llaisysEnginePoll(e, events, 4, 10000, &count), LLAISYS_OK);
    for (size_t i = 0; i < count; i++) ended += events[i].finish != LLAISYS_FINISH_NONE;
    return ended;
}

/* Forty requests, greedy and sampled, some cancelled, some preempted, some with a prefix from the cache, some refused.
 */
static void serve(struct LlaisysEngine *e) {
    static const struct LlaisysLogitBias bias[2] = {{17, 5}, {2999, -100}};
    int64_t prompt[200];
    struct rng rng = {5};
    for (size_t i = 0; i < 200; i++) prompt[i] = (int64_t)rng_below(&rng, 3000);
    size_t ended = 0, submitted = 0;
    while (submitted < 40) {
        struct LlaisysRequest q = {.prompt = prompt, .nprompt = rng_range(&rng, 1, 200), .max_tokens = 60};
        if (submitted % 2) q.sampling = (struct LlaisysSampling){0.8f, submitted % 4 == 1 ? 20 : 0, 0.9f, submitted};
        q.no_cache = submitted % 5 == 0;
        if (submitted % 3 == 0) {
            q.min_p = 0.01f;
            q.repetition_penalty = 1.2f;
            q.frequency_penalty = 0.5f;
            q.logit_bias = bias;
            q.nlogit_bias = 2;
            q.logprobs = 1;
            q.top_logprobs = 20;
        }
        uint64_t id;
        if (llaisysEngineSubmit(e, &q, &id) == LLAISYS_OK) {
            if (++submitted % 7 == 0) CHECK_INT(llaisysEngineCancel(e, id), LLAISYS_OK);
        } else {
            ended += poll_engine(e);
        }
    }
    while (ended < 40) ended += poll_engine(e);
    struct LlaisysEngineStats stats;
    llaisysEngineStats(e, &stats);
    CHECK(stats.preemptions && stats.cached_tokens && stats.finished[LLAISYS_FINISH_CANCELLED] && stats.refused);
}

TEST(engine) {
    struct LlaisysEngine *e = make_engine();
    calls = 0;
    counting = true;
    serve(e);
    CHECK_INT(llaisysEngineDrain(e, 1000), LLAISYS_OK);
    CHECK_INT(llaisysEngineStop(e), LLAISYS_OK);
    counting = false;
    CHECK_INT(calls, 0);
    llaisysEngineClose(e);
}

RUN_TESTS()
