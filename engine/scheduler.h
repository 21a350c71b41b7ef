/* scheduler.h: which rows of which sequences form the next step. Pure: it knows no model, no device and no clock.
 *
 *     lla_scheduler_add(&s, seq);                     a sequence joins the queue
 *     while (lla_scheduler_next(&s, &step)) {         rows for one step, or none: nothing to run
 *         run step.seqs[step.nseq], next tokens to next[]
 *         lla_scheduler_done(&s, &step, next);        tokens join their sequences; some end
 *     }
 *
 * Who gets rows. Every sequence that decodes has one row in every step. What is left of the step's rows goes to
 * prompts: half of it to the one first in order, the rest to those with the fewest tokens left, so that neither a long
 * prompt starves nor a short one waits for a long one. A step in which something decodes has at most mixed_rows rows:
 * that bounds how long a decoding sequence waits for its next token, whatever prompts arrive.
 *
 * Who runs. Sequences stand in order of priority, then of arrival. The first of the queue is admitted when there is a
 * slot and there are blocks for all its tokens and one more for each running sequence; nobody overtakes it. When a
 * decoding sequence needs a block and there is none, the last of the running ones gives up its blocks and returns to
 * its place in the queue, to be computed again: its tokens stay. The first one always advances, since one sequence of
 * max_seq tokens fits by itself. Among equal priorities nobody starves; a higher priority always goes first.
 *
 * Prefixes are looked up at admission and again whenever a prompt stands between two blocks, so that of many prompts
 * with one beginning that arrive together only the first computes it.
 *
 * A step in flight. The next step may be formed while the device still runs the one before, so that the host's work
 * hides behind the device's: next(a), next(b), done(a), next(c), done(b), ... A sequence that decodes in both takes its
 * token in the second from the first on the device: step.feed says from which of its entries. If that token turns out
 * to be its last, the second row was for nothing, and its result is dropped. Blocks that are given back may still be
 * written by the step in flight; none of them is a known prefix, and steps run in order, so that the next owner's
 * writes come later.
 *
 * Masks. A sequence may need a mask for each token that it chooses: what tokens are allowed follows from those before,
 * and somebody else works it out. Until the mask of the next token has come, the sequence has no row for it; its prompt
 * is computed meanwhile up to the last token, and nobody else waits. Such a sequence may also go free until it has
 * chosen a certain token. If a step in flight already has a row behind that token, the row's choice is dropped, since
 * no mask held for it, and the row is computed again.
 *
 * Ownership: sequences and their memory are the caller's; the scheduler keeps pointers from add until the sequence has
 * ended. Threads: one at a time. All memory is taken by lla_scheduler_create. */
#ifndef LLA_SCHEDULER_H
#define LLA_SCHEDULER_H

#include "../include/llaisys/engine.h"
#include "kvpool.h"
#include "runner.h"

enum lla_seq_state { LLA_SEQ_NEW, LLA_SEQ_WAITING, LLA_SEQ_RUNNING, LLA_SEQ_ENDED };

struct lla_seq {
    /* the caller's: fixed from add to end. All else zero. */
    int64_t *tokens; /* [limit]: the prompt, and room for the answer */
    size_t nprompt;  /* at least 1 */
    size_t limit;    /* tokens of prompt and answer together, more than nprompt, at most max_seq */
    const int64_t *stops;
    size_t nstop;
    bool ignore_eos;
    int priority; /* higher goes first */
    struct lla_sampling_row sampling;
    const struct lla_bias *bias;    /* [sampling.nbias] */
    struct lla_candidate *logprobs; /* [limit - nprompt, sampling.nlogprob]: of the answer's tokens, by steps */
    struct lla_kvseq kv;            /* with room for max_blocks blocks */
    const uint32_t *mask;           /* [ceil(vocab / 32)]: of the answer's token nmask - 1; NULL: never masked */
    int64_t trigger;                /* while it goes free: the token behind which it needs masks; -1: none */
    bool is_masked;                 /* from the first token on */
    size_t nmask;                   /* 0: none has come yet */
    /* the scheduler's */
    enum lla_seq_state state;
    enum LlaisysFinish finish; /* once ended */
    size_t ntoken;             /* known tokens: prompt and answer */
    size_t pending;            /* tokens behind them that steps in flight choose */
    size_t computed;           /* of all these, how many have KV, or have it when the steps in flight are done */
    size_t settled;            /* of these, how many have it now */
    size_t cached;             /* prompt tokens that did not have to be computed */
    size_t preemptions;
    bool was_admitted;
    size_t slot;
    size_t grant; /* rows in the step being formed */
    size_t place; /* entry in the last step that it had rows in */
    uint64_t arrival;
    struct lla_seq *before, *after; /* in the queue */
};

struct lla_step {
    struct lla_step_seq *seqs; /* [max_seqs] */
    struct lla_seq **who;      /* [max_seqs]: NULL for one that has ended or given way since */
    int32_t *feed;             /* [max_seqs]: the entry of the step before, still in flight, whose choice is this one's
                                  only token, in place of the -1 that stands there; -1: the tokens are known */
    size_t nseq, rows, ndecode;
};

struct lla_scheduler_config {
    size_t max_seqs, max_seq, max_rows;
    size_t mixed_rows; /* of a step in which something decodes; max_seqs to max_rows */
    size_t nblock, kv_block;
    const int64_t *eos; /* [neos], borrowed */
    size_t neos;
};

struct lla_scheduler {
    struct lla_scheduler_config config;
    struct lla_kvpool pool;
    struct lla_seq **running; /* [max_seqs] in order */
    size_t nrunning;
    struct lla_seq *first, *last; /* the queue, in order */
    size_t nwaiting;
    size_t *slots; /* stack of free ones */
    size_t nslot;
    uint64_t arrivals;
    struct lla_step *latest; /* the last step formed, until it is done */
    struct {                 /* why the first of the queue was not admitted: not asked again before something changes */
        const struct lla_seq *seq;
        uint64_t given_back;
        size_t nrunning;
    } blocked;
    /* since the beginning */
    uint64_t admitted; /* sequences that have left the queue for the first time, cancelled ones included */
    uint64_t preemptions, prefix_queries, prefix_hits; /* the last two in tokens */
};

lla_status lla_scheduler_create(const struct lla_scheduler_config *config, struct lla_scheduler *s);
void lla_scheduler_destroy(struct lla_scheduler *s);

lla_status lla_step_create(size_t max_seqs, struct lla_step *step);
void lla_step_destroy(struct lla_step *step);

void lla_scheduler_add(struct lla_scheduler *s, struct lla_seq *seq);
/* Ends a waiting or running sequence and takes its blocks back; what it computed stays cached. */
void lla_scheduler_end(struct lla_scheduler *s, struct lla_seq *seq, enum LlaisysFinish finish);
/* The mask of the next token has come: it lies in seq->mask. */
void lla_scheduler_mask(struct lla_seq *seq);
/* No more masks, from the next token on: until the trigger, if there is one. */
void lla_scheduler_unmask(struct lla_seq *seq);
/* Forms the next step, while at most one other is in flight; false: there is nothing to run until that one is done. */
bool lla_scheduler_next(struct lla_scheduler *s, struct lla_step *step);
/* Takes the tokens that the step chose [nseq], -1 for those that wanted none. Sequences that ended say so. */
void lla_scheduler_done(struct lla_scheduler *s, const struct lla_step *step, const int64_t *next);

#endif
