#include "scheduler.h"

#include <assert.h>
#include <stdlib.h>

lla_status lla_scheduler_create(const struct lla_scheduler_config *config, struct lla_scheduler *s) {
    *s = (struct lla_scheduler){.config = *config};
    LLA_REQUIRE(config->mixed_rows >= config->max_seqs && config->mixed_rows <= config->max_rows, LLA_EINVAL,
                "mixed_rows is %zu, expected max_seqs = %zu to the largest step's %zu rows", config->mixed_rows,
                config->max_seqs, config->max_rows);
    LLA_REQUIRE((config->nblock - 1) * config->kv_block >= config->max_seq, LLA_EINVAL,
                "%zu KV blocks of %zu tokens do not hold a sequence of %zu", config->nblock - 1, config->kv_block,
                config->max_seq);
    lla_status status;
    LLA_TRY_GOTO(status, lla_kvpool_create(config->nblock, config->kv_block, &s->pool), fail);
    s->running = calloc(config->max_seqs, sizeof *s->running);
    s->slots = calloc(config->max_seqs, sizeof *s->slots);
    if (!s->running || !s->slots) {
        status = lla_fail(LLA_ENOMEM, "no memory for %zu sequences", config->max_seqs);
        goto fail;
    }
    for (; s->nslot < config->max_seqs; s->nslot++) s->slots[s->nslot] = config->max_seqs - 1 - s->nslot;
    return LLA_OK;
fail:
    lla_scheduler_destroy(s);
    return status;
}

void lla_scheduler_destroy(struct lla_scheduler *s) {
    lla_kvpool_destroy(&s->pool);
    free(s->running);
    free(s->slots);
    memset(s, 0, sizeof *s);
}

lla_status lla_step_create(size_t max_seqs, struct lla_step *step) {
    *step = (struct lla_step){.seqs = calloc(max_seqs, sizeof *step->seqs),
                              .who = calloc(max_seqs, sizeof *step->who),
                              .feed = calloc(max_seqs, sizeof *step->feed)};
    if (step->seqs && step->who && step->feed) return LLA_OK;
    lla_step_destroy(step);
    return lla_fail(LLA_ENOMEM, "no memory for a step of %zu sequences", max_seqs);
}

void lla_step_destroy(struct lla_step *step) {
    free(step->seqs);
    free(step->who);
    free(step->feed);
    memset(step, 0, sizeof *step);
}

/* ---- order ---- */

static bool goes_before(const struct lla_seq *a, const struct lla_seq *b) {
    return a->priority != b->priority ? a->priority > b->priority : a->arrival < b->arrival;
}

/* Most sequences belong to the end: the search begins there. */
static void enqueue(struct lla_scheduler *s, struct lla_seq *seq) {
    struct lla_seq *before = s->last;
    while (before && goes_before(seq, before)) before = before->before;
    seq->before = before;
    seq->after = before ? before->after : s->first;
    *(seq->after ? &seq->after->before : &s->last) = seq;
    *(before ? &before->after : &s->first) = seq;
    seq->state = LLA_SEQ_WAITING;
    s->nwaiting++;
}

static void dequeue(struct lla_scheduler *s, struct lla_seq *seq) {
    *(seq->after ? &seq->after->before : &s->last) = seq->before;
    *(seq->before ? &seq->before->after : &s->first) = seq->after;
    seq->before = seq->after = NULL;
    s->nwaiting--;
    if (!seq->was_admitted) s->admitted++;
    seq->was_admitted = true;
}

static void start_running(struct lla_scheduler *s, struct lla_seq *seq) {
    size_t i = s->nrunning++;
    for (; i > 0 && goes_before(seq, s->running[i - 1]); i--) s->running[i] = s->running[i - 1];
    s->running[i] = seq;
    seq->slot = s->slots[--s->nslot];
    seq->grant = 0;
    seq->state = LLA_SEQ_RUNNING;
}

/* Gives back slot and blocks, and forgets what a step in flight chooses. */
static void stop_running(struct lla_scheduler *s, struct lla_seq *seq) {
    if (s->latest && seq->place < s->latest->nseq && s->latest->who[seq->place] == seq)
        s->latest->who[seq->place] = NULL;
    size_t i = 0;
    while (s->running[i] != seq) i++;
    memmove(&s->running[i], &s->running[i + 1], (--s->nrunning - i) * sizeof *s->running);
    s->slots[s->nslot++] = seq->slot;
    lla_kvpool_release(&s->pool, &seq->kv);
}

void lla_scheduler_add(struct lla_scheduler *s, struct lla_seq *seq) {
    assert(seq->nprompt > 0 && seq->nprompt < seq->limit && seq->limit <= s->config.max_seq);
    seq->ntoken = seq->nprompt;
    seq->arrival = ++s->arrivals;
    enqueue(s, seq);
}

void lla_scheduler_end(struct lla_scheduler *s, struct lla_seq *seq, enum LlaisysFinish finish) {
    if (seq->state == LLA_SEQ_WAITING)
        dequeue(s, seq);
    else if (seq->state == LLA_SEQ_RUNNING)
        stop_running(s, seq);
    else
        return;
    seq->state = LLA_SEQ_ENDED;
    seq->finish = finish;
    s->blocked.seq = NULL; /* its memory may be another sequence's next time */
}

/* ---- blocks ---- */

static size_t blocks_for(const struct lla_scheduler *s, size_t ntoken) {
    return (ntoken + s->config.kv_block - 1) / s->config.kv_block;
}

/* Takes known blocks where the sequence's next token begins one. Its last token is always computed, for its logits. */
static void use_cache(struct lla_scheduler *s, struct lla_seq *seq) {
    if (seq->computed != seq->kv.nknown * s->config.kv_block) return;
    const size_t found = s->config.kv_block * lla_kvpool_match(&s->pool, &seq->kv, seq->tokens, seq->ntoken - 1);
    seq->computed = seq->settled += found;
    if (seq->preemptions) return; /* its own tokens, found again */
    seq->cached += found;
    s->prefix_hits += found;
}

/* The blocks of all known tokens are taken at once, so that a prompt under way never waits for blocks. */
static bool admit_first(struct lla_scheduler *s) {
    struct lla_seq *seq = s->first;
    if (!seq || !s->nslot) return false;
    if (s->blocked.seq == seq && s->blocked.given_back == s->pool.given_back && s->blocked.nrunning == s->nrunning)
        return false;
    const size_t hits = s->prefix_hits, cached = seq->cached;
    use_cache(s, seq);
    const size_t need = blocks_for(s, seq->ntoken), spare = s->nrunning;
    if (need - seq->kv.nblock + spare > lla_kvpool_available(&s->pool) ||
        lla_kvpool_grow(&s->pool, seq->kv.blocks, &seq->kv.nblock, need)) {
        lla_kvpool_release(&s->pool, &seq->kv);
        seq->computed = seq->settled = 0;
        seq->cached = cached;
        s->prefix_hits = hits;
        s->blocked.seq = seq;
        s->blocked.given_back = s->pool.given_back;
        s->blocked.nrunning = s->nrunning;
        return false;
    }
    if (!seq->was_admitted && !seq->kv.is_private) s->prefix_queries += seq->nprompt;
    dequeue(s, seq);
    start_running(s, seq);
    s->blocked.seq = NULL;
    return true;
}

static void preempt(struct lla_scheduler *s, struct lla_seq *seq) {
    stop_running(s, seq);
    seq->computed = seq->settled = seq->pending = 0;
    seq->preemptions++;
    s->preemptions++;
    enqueue(s, seq);
}

/* A block for the next token of running[i], taken from the last ones if need be; false: it was the last one itself. */
static bool make_room(struct lla_scheduler *s, size_t i) {
    struct lla_seq *seq = s->running[i];
    const size_t need = blocks_for(s, seq->ntoken + seq->pending);
    while (need - seq->kv.nblock > lla_kvpool_available(&s->pool)) {
        struct lla_seq *victim = s->running[s->nrunning - 1];
        preempt(s, victim);
        if (victim == seq) return false;
    }
    return lla_kvpool_grow(&s->pool, seq->kv.blocks, &seq->kv.nblock, need) == LLA_OK;
}

/* ---- the step ---- */

/* Whether the next token that has not been chosen yet needs a mask that has not come. */
static bool waits_for_mask(const struct lla_seq *seq) {
    return seq->is_masked && seq->nmask <= seq->ntoken + seq->pending - seq->nprompt;
}

/* Tokens that can be computed next. A token that is chosen just now and will be the last needs no row; one that would
 * be followed by a choice without its mask has none yet. */
static size_t tokens_left(const struct lla_seq *seq) {
    const size_t n = seq->ntoken + seq->pending;
    return n - seq->computed - (n == seq->limit || waits_for_mask(seq));
}

/* A row for every sequence with one token to compute: the one it chose last, or a prompt's last. Who is preempted on
 * the way stands behind and has no row yet. */
static size_t grant_decode(struct lla_scheduler *s) {
    size_t rows = 0;
    for (size_t i = 0; i < s->nrunning; i++) {
        struct lla_seq *seq = s->running[i];
        seq->grant = tokens_left(seq) == 1 && make_room(s, i);
        rows += seq->grant;
    }
    return rows;
}

static void grant(struct lla_scheduler *s, struct lla_seq *seq, size_t most, size_t *left) {
    if (!seq->grant) use_cache(s, seq);
    size_t n = tokens_left(seq) - seq->grant;
    n = n < most ? n : most;
    seq->grant += n;
    *left -= n;
}

/* Half of the rows to the first prompt in order, the rest to those with the fewest tokens left. */
static void grant_prompts(struct lla_scheduler *s, size_t left) {
    size_t i = 0;
    while (i < s->nrunning && tokens_left(s->running[i]) == s->running[i]->grant) i++;
    if (i < s->nrunning) grant(s, s->running[i], (left + 1) / 2, &left);
    while (left) {
        struct lla_seq *next = NULL;
        for (i = 0; i < s->nrunning; i++) {
            struct lla_seq *seq = s->running[i];
            const size_t n = tokens_left(seq) - seq->grant;
            if (n && (!next || n < tokens_left(next) - next->grant)) next = seq;
        }
        if (!next) break;
        grant(s, next, left, &left);
    }
}

/* The entry for the rows that the sequence was granted. */
static void add_rows(struct lla_step *step, struct lla_seq *seq) {
    const size_t i = step->nseq++;
    step->feed[i] = -1;
    if (seq->computed == seq->ntoken) { /* its one token is not known yet */
        step->feed[i] = (int32_t)seq->place;
        seq->tokens[seq->computed] = -1;
    }
    const size_t end = seq->computed + seq->grant; /* where the next token will stand */
    step->seqs[i] = (struct lla_step_seq){.slot = seq->slot,
                                          .tokens = seq->tokens + seq->computed,
                                          .ntoken = seq->grant,
                                          .position0 = seq->computed,
                                          .blocks = seq->kv.blocks,
                                          .want_next = seq->grant == tokens_left(seq) && !waits_for_mask(seq),
                                          .sampling = seq->sampling,
                                          .known = seq->tokens,
                                          .nprompt = seq->nprompt,
                                          .bias = seq->bias,
                                          .mask = seq->is_masked ? seq->mask : NULL};
    if (end >= seq->nprompt && seq->sampling.nlogprob)
        step->seqs[i].logprobs = seq->logprobs + (end - seq->nprompt) * (size_t)seq->sampling.nlogprob;
    step->who[i] = seq;
    step->rows += seq->grant;
    seq->place = i;
    seq->computed = end;
    seq->pending += step->seqs[i].want_next;
}

bool lla_scheduler_next(struct lla_scheduler *s, struct lla_step *step) {
    step->nseq = step->rows = 0;
    step->ndecode = grant_decode(s);
    while (admit_first(s)) {}
    grant_prompts(s, (step->ndecode ? s->config.mixed_rows : s->config.max_rows) - step->ndecode);
    for (size_t i = 0; i < s->nrunning; i++)
        if (s->running[i]->grant) add_rows(step, s->running[i]);
    if (step->nseq) s->latest = step;
    return step->nseq > 0;
}

static bool is_stop(const struct lla_scheduler *s, const struct lla_seq *seq, int64_t token) {
    for (size_t i = 0; i < seq->nstop; i++)
        if (seq->stops[i] == token) return true;
    for (size_t i = 0; i < s->config.neos && !seq->ignore_eos; i++)
        if (s->config.eos[i] == token) return true;
    return false;
}

/* The token behind which masks are needed: a row that a step in flight has behind it chooses without one. It has the
 * right token, so that its KV stays; the row is computed once more, to choose again. */
static void begin_masks(struct lla_scheduler *s, struct lla_seq *seq) {
    seq->is_masked = true;
    if (!seq->pending) return;
    assert(s->latest && s->latest->who[seq->place] == seq);
    s->latest->who[seq->place] = NULL;
    seq->pending = 0;
    seq->computed--;
}

void lla_scheduler_mask(struct lla_seq *seq) {
    seq->nmask = seq->ntoken - seq->nprompt + 1;
}

void lla_scheduler_unmask(struct lla_seq *seq) {
    seq->is_masked = false;
}

void lla_scheduler_done(struct lla_scheduler *s, const struct lla_step *step, const int64_t *next) {
    if (s->latest == step) s->latest = NULL;
    for (size_t i = 0; i < step->nseq; i++) {
        struct lla_seq *seq = step->who[i];
        if (!seq) continue;
        seq->settled += step->seqs[i].ntoken;
        if (step->seqs[i].want_next) {
            seq->tokens[seq->ntoken++] = next[i];
            seq->pending--;
        }
        lla_kvpool_commit(&s->pool, &seq->kv, seq->tokens, seq->settled);
        if (!step->seqs[i].want_next) continue;
        if (is_stop(s, seq, next[i]))
            lla_scheduler_end(s, seq, LLAISYS_FINISH_STOP);
        else if (seq->ntoken == seq->limit)
            lla_scheduler_end(s, seq, LLAISYS_FINISH_LENGTH);
        else if (seq->mask && !seq->is_masked && next[i] == seq->trigger)
            begin_masks(s, seq);
    }
}
