/* fake_device.h: stands in for a model: KV is a digest of the exact prefix that it was computed from, and the next
 * token follows from it. A row that reads a block which does not hold its own sequence's KV is found out at once. */
#ifndef LLA_TEST_FAKE_DEVICE_H
#define LLA_TEST_FAKE_DEVICE_H

#include "../../engine/scheduler.h"
#include "harness.h"

#include <stdlib.h>

struct fake_device {
    size_t kv_block, vocab;
    uint64_t *content; /* [nblock, kv_block] */
    uint64_t *written; /* [nblock]: step of the last write, so that two sequences cannot write one block in a step */
    uint64_t steps, rows;
    int64_t chosen[512]; /* by the last step, on the device */
};

static inline struct fake_device fake_open(size_t nblock, size_t kv_block, size_t vocab) {
    return (struct fake_device){.kv_block = kv_block,
                                .vocab = vocab,
                                .content = calloc(nblock * kv_block, sizeof(uint64_t)),
                                .written = calloc(nblock, sizeof(uint64_t))};
}

static inline void fake_close(struct fake_device *d) {
    free(d->content);
    free(d->written);
}

static inline uint64_t fake_digest(uint64_t before, int64_t token) {
    uint64_t h = (before ^ (uint64_t)token) + 0x9e3779b97f4a7c15u;
    h = (h ^ h >> 30) * 0xbf58476d1ce4e5b9u;
    return h ^ h >> 27;
}

/* The token behind a prefix with that digest. */
static inline int64_t fake_next(const struct fake_device *d, uint64_t digest, const struct lla_sampling_row *s) {
    const uint64_t drawn = s->temperature > 0 ? fake_digest(digest, (int64_t)s->seed) : digest;
    return (int64_t)(drawn % d->vocab);
}

/* The token itself, or the next one that the mask allows. */
static inline int64_t fake_allowed(const struct fake_device *d, const uint32_t *mask, int64_t token) {
    if (!mask) return token;
    for (size_t i = 0; i < d->vocab; i++, token = (token + 1) % (int64_t)d->vocab)
        if (mask[token / 32] >> token % 32 & 1) return token;
    HARNESS_FAIL("a mask allows nothing");
    return 0;
}

/* As lla_runner_step; reads through the block table alone. */
static inline lla_status fake_run(void *arg, const struct lla_step_seq *seqs, size_t nseq, int64_t *next) {
    struct fake_device *d = arg;
    d->steps++;
    for (size_t i = 0; i < nseq; i++) {
        const struct lla_step_seq *s = &seqs[i];
        uint64_t h = 0;
        if (s->position0) {
            const size_t p = s->position0 - 1;
            h = d->content[(size_t)s->blocks[p / d->kv_block] * d->kv_block + p % d->kv_block];
        }
        for (size_t j = 0; j < s->ntoken; j++) {
            const size_t p = s->position0 + j, b = (size_t)s->blocks[p / d->kv_block];
            h = fake_digest(h, s->tokens[j]);
            d->content[b * d->kv_block + p % d->kv_block] = h;
            if (d->written[b] == d->steps && (j == 0 || p % d->kv_block == 0))
                HARNESS_FAIL("block %zu is written twice in a step", b);
            d->written[b] = d->steps;
        }
        d->rows += s->ntoken;
        next[i] = s->want_next ? fake_allowed(d, s->mask, fake_next(d, h, &s->sampling)) : -1;
        for (int32_t k = 0; s->want_next && k < s->sampling.nlogprob; k++)
            s->logprobs[k] = (struct lla_candidate){-(float)k, (int32_t)next[i] + k};
    }
    return LLA_OK;
}

/* A step whose tokens may be those that the step before has just chosen. */
static inline void fake_step(struct fake_device *d, const struct lla_step *step, int64_t *next) {
    struct lla_step_seq seqs[512];
    int64_t fed[512];
    memcpy(seqs, step->seqs, step->nseq * sizeof *seqs);
    for (size_t i = 0; i < step->nseq; i++) {
        for (size_t j = 0; j < seqs[i].ntoken; j++)
            if ((seqs[i].tokens[j] < 0) != (step->feed[i] >= 0)) HARNESS_FAIL("entry %zu lacks a token", i);
        if (step->feed[i] < 0) continue;
        if (seqs[i].ntoken != 1 || d->chosen[step->feed[i]] < 0) HARNESS_FAIL("entry %zu is fed by nobody", i);
        fed[i] = d->chosen[step->feed[i]];
        seqs[i].tokens = &fed[i];
    }
    fake_run(d, seqs, step->nseq, next);
    memcpy(d->chosen, next, step->nseq * sizeof *next);
}

/* The answer of a request that is alone: n tokens behind the prompt. */
static inline void fake_answer(const struct fake_device *d, const int64_t *prompt, size_t nprompt,
                               const struct lla_sampling_row *s, int64_t *answer, size_t n) {
    uint64_t h = 0;
    for (size_t i = 0; i < nprompt; i++) h = fake_digest(h, prompt[i]);
    for (size_t i = 0; i < n; i++) {
        answer[i] = fake_next(d, h, s);
        h = fake_digest(h, answer[i]);
    }
}

#endif
