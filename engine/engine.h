/* engine.h: the inside of llaisys/engine.h: requests in memory set aside for them, and the thread that computes them.
 *
 *     submit: free -> inbox          (any thread)
 *     loop:   inbox -> scheduler -> ended, announcing tokens in the ring on the way
 *     poll:   ring -> events; a request whose end has been told is free again at the next poll
 *
 * Threads: `lock` guards everything that is marked so below, and is held for a few list operations at a time. The
 * scheduler, the steps and a request's seq belong to the loop's thread alone; a request's prompt is written by its
 * submitter before it enters the inbox, and tokens are read by the poller only up to `published`. */
#ifndef LLA_ENGINE_H
#define LLA_ENGINE_H

#include "scheduler.h"

#include <pthread.h>

/* What runs steps: the runner, or a test's stand-in. Called by the loop's thread alone. */
struct lla_executor {
    /* Starts a step and returns, having read all that it points to; NULL: nothing is done before wait. */
    lla_status (*launch)(void *arg, const struct lla_step *step);
    /* Returns when the step is done, with the tokens that it chose [nseq]. */
    lla_status (*wait)(void *arg, const struct lla_step *step, int64_t *next);
    void *arg;
    bool overlaps;                /* launch takes a step while the one before is in flight, and heeds step->feed */
    const double *device_seconds; /* what the device has spent in steps that were waited for; NULL: nobody knows */
};

struct lla_request {
    struct lla_seq seq; /* first: the scheduler's sequence is the request */
    int64_t stops[LLAISYS_MAX_STOP];
    uint64_t tag;
    int64_t submitted_ns;
    struct lla_request *next; /* in the inbox, among the free ones, or among those told */
    /* guarded by lock */
    uint64_t id;
    bool is_live; /* submitted, and its end not polled yet; nobody but its submitter looks at the rest before */
    struct lla_request *next_cancelled, *next_masked;
    struct lla_news {
        bool is_cancelled, is_announced;
        bool is_constrained;
        enum lla_mask_news { LLA_MASK_NONE, LLA_MASK_SET, LLA_MASK_EMPTY, LLA_MASK_LIFTED } mask; /* loop: not seen */
        size_t nmask;    /* as seq's; the words are written before the loop sees the news, and read behind that */
        bool needs_mask; /* the token behind the published ones does, or has it */
        size_t published, delivered; /* answer tokens that may be polled; that have been */
        enum LlaisysFinish finish;
        size_t cached, preemptions;
        int64_t admitted_ns, first_ns, finished_ns; /* 0: not yet */
    } news;
};

struct lla_list { /* first in, first out, through `next` */
    struct lla_request *first, *last;
};

struct LlaisysEngine {
    struct lla_runner *runner; /* owned; NULL under a test's executor */
    struct lla_executor executor;
    size_t vocab, max_seq;
    uint32_t *masks;              /* [nrequest, ceil(vocab / 32)] */
    size_t max_under_way;         /* requests running or waiting */
    struct lla_request *requests; /* [nrequest] */
    size_t nrequest;
    int64_t *tokens;                /* [nrequest, max_seq] */
    struct lla_bias *biases;        /* [nrequest, LLAISYS_MAX_LOGIT_BIAS] */
    struct lla_candidate *logprobs; /* [nrequest, max_seq, 1 + max_logprobs]; a request uses 1 + top_logprobs of these a
                                       token, close together */
    size_t max_logprobs;
    int32_t *blocks; /* [nrequest, blocks of a sequence] */
    /* the loop's */
    struct lla_scheduler scheduler;
    struct lla_step steps[2]; /* one may be in flight while the other is formed */
    int64_t *chosen;          /* [max_seqs] */
    pthread_t thread;
    bool has_thread;
    /* guarded by lock */
    pthread_mutex_t lock;
    pthread_cond_t work;  /* for the loop: there may be something to do */
    pthread_cond_t quiet; /* for drain: a request has ended */
    struct lla_list free, inbox;
    struct lla_request *cancelled; /* through next_cancelled */
    struct lla_request *masked;    /* of which there is news of the mask, through next_masked */
    struct lla_request **ring;     /* [nrequest]: requests with news, each once */
    size_t ring_first, ring_count;
    struct lla_list told; /* ended requests of the last poll: what it returned points to them */
    uint64_t serial;
    uint64_t ended, left_queue; /* of those submitted */
    bool is_draining, is_stopping, is_stopped, has_failed;
    char failure[256];
    struct LlaisysEngineStats stats;
    int fd; /* an eventfd, readable while the ring holds something or the engine is stopped */
};

struct lla_engine_config {
    struct lla_scheduler_config scheduler;
    size_t vocab, max_queue;
    size_t max_logprobs; /* alternatives that a request may have with each token */
};

/* An engine over an executor, its thread started. */
lla_status lla_engine_create(const struct lla_engine_config *config, struct lla_executor executor,
                             struct LlaisysEngine **out);

/* An engine over a runner with its weights, which it owns from now on, also where this fails. Of the options, those
 * that the runner does not embody. */
lla_status lla_engine_create_over(struct lla_runner *runner, const struct LlaisysEngineOptions *options,
                                  struct LlaisysEngine **out);

/* ---- loop.c ---- */

void *lla_engine_loop(void *engine);
int64_t lla_now_ns(void);

/* ---- engine.c ---- */

void lla_engine_signal(struct LlaisysEngine *e); /* makes the file descriptor readable */

#endif
