/* loop.c: the engine's thread: one turn is one step of all running requests. */
#include "engine.h"

#include <stdio.h>
#include <time.h>

static int64_t read_clock(clockid_t clock) {
    struct timespec t;
    clock_gettime(clock, &t);
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

int64_t lla_now_ns(void) {
    return read_clock(CLOCK_MONOTONIC);
}

/* The time that this thread has had a core: what the host's work takes where others take the core away. */
static int64_t cpu_ns(void) {
    return read_clock(CLOCK_THREAD_CPUTIME_ID);
}

/* ---- telling; all under the lock ---- */

/* A request has at most one entry, so that the ring, with room for all requests, never overflows. */
static void announce(struct LlaisysEngine *e, struct lla_request *r) {
    if (r->news.is_announced) return;
    r->news.is_announced = true;
    e->ring[(e->ring_first + e->ring_count++) % e->nrequest] = r;
}

static void publish(struct LlaisysEngine *e, struct lla_request *r, int64_t now) {
    const size_t answer = r->seq.ntoken - r->seq.nprompt;
    if (answer > r->news.published && !r->news.published) r->news.first_ns = now;
    e->stats.generated_tokens += answer - r->news.published;
    if (answer == r->news.published && r->seq.state != LLA_SEQ_ENDED) return;
    if (answer > r->news.published) r->news.needs_mask = r->seq.is_masked;
    r->news.published = answer;
    r->news.cached = r->seq.cached;
    r->news.preemptions = r->seq.preemptions;
    if (r->seq.state == LLA_SEQ_ENDED) {
        r->news.finish = r->seq.finish;
        r->news.finished_ns = now;
        e->ended++;
        e->stats.finished[r->news.finish]++;
        pthread_cond_broadcast(&e->quiet);
    }
    announce(e, r);
}

static void copy_stats(struct LlaisysEngine *e) {
    const struct lla_scheduler *s = &e->scheduler;
    struct LlaisysEngineStats *t = &e->stats;
    t->running = s->nrunning;
    t->kv_free = s->pool.nfree;
    t->kv_cached = s->pool.ncached;
    t->kv_active = s->pool.nactive;
    t->prompt_tokens = s->prefix_queries;
    t->cached_tokens = s->prefix_hits;
    t->preemptions = s->preemptions;
    t->evictions = s->pool.evicted;
    e->left_queue = s->admitted;
}

/* ---- the turns ---- */

/* Under the lock: takes in what others have asked for. The lock has not been released since the last step was told of,
 * so that a cancelled request that has ended since is still that request. */
static void take_requests(struct LlaisysEngine *e, int64_t now) {
    for (struct lla_request *r = e->inbox.first, *next; r; r = next) {
        next = r->next;
        r->next = NULL;
        lla_scheduler_add(&e->scheduler, &r->seq);
    }
    e->inbox = (struct lla_list){0};
    for (struct lla_request *r = e->cancelled, *next; r; r = next) {
        next = r->next_cancelled;
        r->next_cancelled = NULL;
        if (r->seq.state == LLA_SEQ_ENDED) continue;
        lla_scheduler_end(&e->scheduler, &r->seq, LLAISYS_FINISH_CANCELLED);
        publish(e, r, now);
    }
    e->cancelled = NULL;
    for (struct lla_request *r = e->masked, *next; r; r = next) {
        const enum lla_mask_news news = r->news.mask;
        next = r->next_masked;
        r->next_masked = NULL;
        r->news.mask = LLA_MASK_NONE;
        if (r->seq.state == LLA_SEQ_ENDED) continue;
        if (news == LLA_MASK_SET) {
            lla_scheduler_mask(&r->seq);
        } else if (news == LLA_MASK_LIFTED) {
            lla_scheduler_unmask(&r->seq);
        } else {
            lla_scheduler_end(&e->scheduler, &r->seq, LLAISYS_FINISH_MASKED);
            publish(e, r, now);
        }
    }
    e->masked = NULL;
}

static void end_all(struct LlaisysEngine *e, enum LlaisysFinish finish, int64_t now) {
    for (size_t i = 0; i < e->nrequest; i++) {
        struct lla_request *r = &e->requests[i];
        if (!r->is_live || r->seq.state == LLA_SEQ_NEW || r->seq.state == LLA_SEQ_ENDED) continue;
        lla_scheduler_end(&e->scheduler, &r->seq, finish);
        publish(e, r, now);
    }
}

/* Under the lock: what a step has brought. */
static void tell(struct LlaisysEngine *e, const struct lla_step *step, int64_t formed, int64_t now) {
    for (size_t i = 0; i < step->nseq; i++) {
        struct lla_request *r = (struct lla_request *)step->who[i];
        if (!r) continue; /* cancelled, or preempted */
        if (!r->news.admitted_ns) r->news.admitted_ns = formed;
        publish(e, r, now);
    }
    e->stats.steps++;
    e->stats.rows += step->rows;
}

/* Under the lock: the device has failed, and the requests will be told so. */
static void fail(struct LlaisysEngine *e) {
    if (e->has_failed) return;
    e->has_failed = true;
    snprintf(e->failure, sizeof e->failure, "%s", lla_last_error());
}

/* One turn takes requests in, forms a step, launches it, waits for a step and tells what came of it: for the one just
 * launched, or, if the executor overlaps, for the one before, so that the device has work while the host does its own.
 */
void *lla_engine_loop(void *engine) {
    struct LlaisysEngine *e = engine;
    const struct lla_executor *executor = &e->executor;
    struct lla_step *in_flight = NULL;
    int64_t formed_ns[2], host_from = 0, cpu_from = 0; /* when the host's work began, while there is work */
    size_t turn = 0;
    pthread_mutex_lock(&e->lock);
    for (;; turn++) {
        const int64_t now = lla_now_ns();
        if (!host_from) host_from = now, cpu_from = cpu_ns();
        bool had_none = e->ring_count == 0;
        take_requests(e, now);
        if (e->is_stopping) end_all(e, LLAISYS_FINISH_CLOSED, now);
        if (e->has_failed) end_all(e, LLAISYS_FINISH_ERROR, now);
        copy_stats(e); /* before anybody can see the ends */
        if (e->is_stopping) break;
        if (had_none && e->ring_count) lla_engine_signal(e);
        pthread_mutex_unlock(&e->lock);

        struct lla_step *formed = &e->steps[turn % 2];
        if (!lla_scheduler_next(&e->scheduler, formed)) formed = NULL;
        const int64_t begun = formed_ns[turn % 2] = lla_now_ns(), cpu_until = cpu_ns();
        lla_status status = formed && executor->launch ? executor->launch(executor->arg, formed) : LLA_OK;
        struct lla_step *finished = executor->overlaps ? in_flight : formed;
        in_flight = executor->overlaps ? formed : NULL;
        if (finished && !status) status = executor->wait(executor->arg, finished, e->chosen);
        const int64_t ended = lla_now_ns(), cpu_ended = cpu_ns();
        if (finished && !status) lla_scheduler_done(&e->scheduler, finished, e->chosen);

        pthread_mutex_lock(&e->lock);
        e->stats.host_s += 1e-9 * (double)(begun - host_from);
        e->stats.host_cpu_s += 1e-9 * (double)(cpu_until - cpu_from);
        e->stats.step_s += 1e-9 * (double)(ended - begun);
        if (executor->device_seconds) e->stats.device_s = *executor->device_seconds;
        host_from = ended, cpu_from = cpu_ended;
        had_none = e->ring_count == 0;
        if (status) {
            fail(e);
            in_flight = NULL;
        } else if (finished) {
            tell(e, finished, formed_ns[finished - e->steps], ended);
        }
        copy_stats(e);
        if (had_none && e->ring_count) lla_engine_signal(e);
        while (!formed && !finished && !e->inbox.first && !e->cancelled && !e->masked && !e->is_stopping) {
            host_from = 0;
            pthread_cond_wait(&e->work, &e->lock);
        }
    }
    if (in_flight) { /* nobody waits for its tokens, but the device still writes */
        pthread_mutex_unlock(&e->lock);
        executor->wait(executor->arg, in_flight, e->chosen);
        pthread_mutex_lock(&e->lock);
    }
    e->is_stopped = true;
    lla_engine_signal(e);
    pthread_cond_broadcast(&e->quiet);
    pthread_mutex_unlock(&e->lock);
    return NULL;
}
