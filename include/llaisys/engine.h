/* engine.h: many requests at once over one model: continuous batching with a KV cache that shares prefixes.
 *
 * A request is a prompt in token ids and how to go on. Submit puts it into a bounded queue; a thread of the engine's
 * own computes all running requests together, step by step; Poll tells of new tokens and of ends. Every request that
 * was accepted ends with exactly one event whose finish is not NONE, whatever happens: also when it is cancelled, when
 * the device fails, and when the engine is stopped.
 *
 * Tokens of a request depend on its prompt and sampling alone: not on what else runs, on when it came, on the cache, on
 * chunking or on preemption. On the CPU this holds to the bit.
 *
 * Memory: all of it is taken by Open, masks included. An answer's tokens are written to memory set aside for its
 * request, and an event says how far they have come: a request has at most one event waiting, so that a slow poller
 * loses nothing and holds up nobody; it finds more tokens in one event. An ended request keeps its memory until the
 * call of Poll behind the one that told of its end: if too many wait for that, Submit refuses new ones.
 *
 * Ownership: Open returns an engine that the caller closes. Submit copies what the request points to. What an event
 * points to belongs to the engine and stays as it is until the next call of Poll.
 * Threads: all functions may be called from any thread at any time, with two exceptions: one thread polls at a time,
 * and Close comes when no other call is under way. Errors: functions return enum LlaisysStatus, and
 * llaisysGetLastError() says what was expected and what was found. Units: tokens are vocabulary ids, times are seconds.
 * A zeroed field means its default.
 *
 * A working example stands at the end. */
#ifndef LLAISYS_ENGINE_H
#define LLAISYS_ENGINE_H

#include "models/qwen2.h"

LLAISYS_BEGIN

enum LlaisysStatus {
    LLAISYS_OK = 0,
    LLAISYS_INVALID = 1,   /* an argument is wrong */
    LLAISYS_NO_MEMORY = 2, /* memory could not be had */
    LLAISYS_IO = 3,        /* the operating system refused a file */
    LLAISYS_FORMAT = 4,    /* a file's content is wrong */
    LLAISYS_LIMIT = 5,     /* a prompt longer than the engine's limits allow */
    LLAISYS_DEVICE = 6,    /* a device is missing or failed */
    LLAISYS_BUSY = 7,      /* the queue is full, or the time is up: try again later */
    LLAISYS_CLOSED = 8     /* the engine is draining or stopped: it takes no more requests */
};

enum LlaisysFinish {
    LLAISYS_FINISH_NONE = 0,      /* more is to come */
    LLAISYS_FINISH_STOP = 1,      /* the last token is an end token of the model or one of the request's stop tokens */
    LLAISYS_FINISH_LENGTH = 2,    /* max_tokens is reached, or the sequence is full */
    LLAISYS_FINISH_CANCELLED = 3, /* by Cancel */
    LLAISYS_FINISH_ERROR = 4,     /* the device failed; the event has a message */
    LLAISYS_FINISH_CLOSED = 5,    /* by Stop or Close */
    LLAISYS_FINISH_MASKED = 6     /* the mask of its next token allows none; the event has a message */
};

/* Whether a request's tokens are chosen under masks: see SetMask. */
enum LlaisysConstraint {
    LLAISYS_CONSTRAIN_NEVER = 0,
    LLAISYS_CONSTRAIN_ALWAYS = 1, /* from the first token on */
    LLAISYS_CONSTRAIN_AFTER = 2   /* once the answer has the request's constrain_after */
};

enum { LLAISYS_MAX_STOP = 64, LLAISYS_MAX_LOGIT_BIAS = 1024, LLAISYS_MAX_LOGPROBS = 20 };

struct LlaisysEngineOptions {
    struct LlaisysQwen2Options model; /* device, dtype, threads; maxseq: tokens of one request, prompt and answer */
    size_t max_seqs;                  /* requests computed at once; 0: 64 */
    size_t kv_tokens;  /* tokens of the KV cache over all requests, at least maxseq; 0: max_seqs * maxseq, at most the
                          larger of 65536 and maxseq */
    size_t kv_block;   /* tokens of a KV block, a power of two up to 256; 0: 32. Prefixes are shared by whole blocks */
    size_t max_queue;  /* requests that may wait beside max_seqs that run; 0: 256 */
    size_t mixed_rows; /* tokens of a step in which a request decodes, max_seqs to the largest step's (the larger of
                          prefill_chunk and max_seqs): bounds how long answers wait for others' prompts. 0: max_seqs +
                          64 on the CPU, the largest on a GPU */
    int max_logprobs;  /* top_logprobs that a request may ask for, up to LLAISYS_MAX_LOGPROBS; 0: that many; -1: none.
                          8 (1 + max_logprobs) bytes are set aside for each token that a request can have, as address
                          space that only requests with logprobs fill */
};

struct LlaisysLogitBias {
    int64_t token;
    float bias; /* -100 to 100, or -INFINITY, which bans the token */
};

/* How likely the model found a token: the natural logarithm of its probability under the model's own distribution, that
 * is softmax of the logits before bias, penalties, temperature and filters, among the tokens that the mask allows, if
 * there is one. -INFINITY where the logit is, and where the mask does not allow the token; NaN where the
 * model's numbers have failed (a logit is NaN, or the largest is infinite). */
struct LlaisysLogprob {
    float logprob;
    int32_t token; /* -1 behind the last token of a vocabulary smaller than top_logprobs */
};

/* A request zeroed but for its prompt is answered greedily up to an end token or a full sequence.
 *
 * A token is chosen from the logits in this order, that of transformers: tokens that a mask does not allow are out;
 * logit_bias is added; repetition_penalty
 * divides positive and multiplies other logits of the tokens in prompt and answer; frequency_penalty times how often a
 * token stands in the answer, and presence_penalty if it does, are subtracted. Then the largest is taken, or, with a
 * temperature: logits / temperature, the top_k largest, the fewest of these that reach top_p of the probability, and of
 * these those at least min_p times as probable as the most probable. kernels/kernels.h has the formulas. */
struct LlaisysRequest {
    const int64_t *prompt;           /* [nprompt] */
    size_t nprompt;                  /* 1 to maxseq - 1 */
    size_t max_tokens;               /* of the answer; 0, or more than there is room for: until the sequence is full */
    const int64_t *stop;             /* [nstop]: tokens that end the answer, and are part of it */
    size_t nstop;                    /* at most LLAISYS_MAX_STOP */
    int ignore_eos;                  /* 1: the model's end tokens do not end the answer */
    struct LlaisysSampling sampling; /* with temperature 0, top_p may be 0 */
    float min_p;                     /* 0 to 1; 0: none */
    float repetition_penalty;        /* above 0; 0 and 1: none */
    float presence_penalty;          /* -2 to 2; 0: none */
    float frequency_penalty;         /* -2 to 2; 0: none */
    const struct LlaisysLogitBias *logit_bias; /* [nlogit_bias]; several for one token add up */
    size_t nlogit_bias;                        /* at most LLAISYS_MAX_LOGIT_BIAS */
    int logprobs;                              /* 1: events tell log-probabilities */
    int top_logprobs; /* with logprobs, also those of this many most probable tokens; up to the engine's max_logprobs */
    enum LlaisysConstraint constrained;
    int64_t constrain_after; /* a token; read where `constrained` is not NEVER, and -1 for none */
    /* for the caller and the scheduler */
    uint64_t tag;        /* comes back in every event */
    int priority;        /* higher leaves the queue first, always, and gives way last; equal ones by arrival */
    int no_cache;        /* 1: the prefix cache is neither used nor filled */
    uint64_t cache_salt; /* requests share cached prefixes only with those of the same salt */
};

struct LlaisysEvent {
    uint64_t request, tag;
    const int64_t *tokens; /* [ntoken]: the answer's new tokens since the request's last event */
    size_t ntoken;
    /* [ntoken, nlogprob]: of each token, its own log-probability, then those of the top_logprobs most probable tokens
     * from the highest, the smaller token first of equals. NULL where the request does not ask. */
    const struct LlaisysLogprob *logprobs;
    size_t nlogprob; /* 1 + top_logprobs, or 0 */
    enum LlaisysFinish finish;
    const char *message; /* of finish ERROR and MASKED, else NULL */
    /* usage so far */
    size_t prompt_tokens, completion_tokens;
    size_t cached_tokens; /* prompt tokens whose KV was found in the cache */
    size_t preemptions;   /* how often the request had to be computed again for want of KV blocks */
    /* seconds since Submit; 0 where it has not happened */
    double queued_s, first_token_s, finished_s;
};

struct LlaisysEngineStats {
    size_t waiting, running; /* requests now */
    size_t unread;           /* requests with an event to be polled */
    size_t max_seqs, max_queue, maxseq;
    size_t kv_block, kv_blocks, kv_free, kv_cached, kv_active; /* free + cached + active = blocks */
    /* since Open */
    uint64_t submitted, refused; /* refused: queue full */
    uint64_t finished[7];        /* by enum LlaisysFinish */
    uint64_t prompt_tokens;      /* computed or found, of admitted requests that use the cache */
    uint64_t cached_tokens;      /* of these, found */
    uint64_t generated_tokens, preemptions, evictions;
    uint64_t steps, rows;  /* rows: tokens computed, recomputed ones included */
    double step_s, host_s; /* in steps on the device, and between them while there was work. On a GPU the next step is
                              there before one ends, so that the work of host_s need not keep the device waiting */
    double host_cpu_s;     /* of host_s, what the engine's thread had a core for */
    double device_s;       /* of step_s and host_s together, what a GPU spent in steps; 0 on the CPU */
};

struct LlaisysEngine;

/* Opens a folder in transformers' format; options may be NULL. NULL on failure. */
LLAISYS_API struct LlaisysEngine *llaisysEngineOpen(const char *path, const struct LlaisysEngineOptions *options);
/* As llaisysQwen2Plan, of an engine: where every byte of its arena would lie. */
LLAISYS_API char *llaisysEnginePlan(const char *path, const struct LlaisysEngineOptions *options, const char *format);
/* As Stop, and frees the engine; events that were not polled are lost. NULL is allowed. */
LLAISYS_API void llaisysEngineClose(struct LlaisysEngine *engine);

/* Queues a request; *id is its number, never 0 and never used again. BUSY: the queue is full, or too many ended
 * requests wait for Poll. LIMIT: the prompt is too long. CLOSED: the engine is draining or stopped. */
LLAISYS_API int llaisysEngineSubmit(struct LlaisysEngine *engine, const struct LlaisysRequest *request, uint64_t *id);
/* Ends a request soon, with CANCELLED if it has not ended otherwise by then. One that has ended already is no error. */
LLAISYS_API int llaisysEngineCancel(struct LlaisysEngine *engine, uint64_t id);

/* Says which tokens may stand at `index` of a constrained request's answer, 0 being its first token: bit t % 32 of
 * words[t / 32] allows token t; nword is the vocabulary / 32, rounded up. The words are copied.
 *
 * A constrained request gets its next token only once the mask for it is there. Until then its prompt is computed, it
 * keeps its place among the running ones, and nobody else waits for it. One mask is in place at a time: index is the
 * number of the answer's tokens so far, all of which an event has told or is about to tell. The mask belongs to that
 * index, whatever becomes of the request meanwhile; preemption does not lose it. A mask that allows no token ends the
 * request with MASKED.
 *
 * words NULL: no masks from this token on, and none is needed until the answer has the request's constrain_after. With
 * CONSTRAIN_AFTER a request begins like that. The mask for the token behind constrain_after is needed again.
 *
 * A request that has ended is no error, as with Cancel. INVALID: the request is not constrained, or the token at index
 * is known already, or is not next, or has a mask, or needs none; or nword is wrong. The request goes on unchanged. */
LLAISYS_API int llaisysEngineSetMask(struct LlaisysEngine *engine, uint64_t id, size_t index, const uint32_t *words,
                                     size_t nword);

/* Waits up to timeout_ms (0: not at all, below 0: without limit) for events and writes at most `capacity` of them, one
 * a request, the longest waiting first. *count 0: the time is up. CLOSED: the engine is stopped and all has been told.
 */
LLAISYS_API int llaisysEnginePoll(struct LlaisysEngine *engine, struct LlaisysEvent *events, size_t capacity,
                                  int timeout_ms, size_t *count);
/* A file descriptor, the engine's, that is readable while there are events (and, rarely, when there are none any more),
 * for poll, epoll and event loops. Only Poll reads it. */
LLAISYS_API int llaisysEngineFd(const struct LlaisysEngine *engine);

LLAISYS_API void llaisysEngineStats(struct LlaisysEngine *engine, struct LlaisysEngineStats *stats);
/* The model's dimensions; maxseq is the one in force. */
LLAISYS_API void llaisysEngineMeta(const struct LlaisysEngine *engine, struct LlaisysQwen2Meta *meta);
/* 1 if the token is one of the model's end tokens, those of config.json and generation_config.json. */
LLAISYS_API int llaisysEngineIsEnd(const struct LlaisysEngine *engine, int64_t token);

/* Takes no more requests from now on and waits until all have ended, up to timeout_ms (as Poll): OK, or BUSY. */
LLAISYS_API int llaisysEngineDrain(struct LlaisysEngine *engine, int timeout_ms);
/* Takes no more requests and ends those that have not ended with CLOSED, after the step under way. Poll still tells. */
LLAISYS_API int llaisysEngineStop(struct LlaisysEngine *engine);

LLAISYS_END

#ifdef LLAISYS_ENGINE_EXAMPLE
/* Compile with -DLLAISYS_ENGINE_EXAMPLE -x c, or include this file from a .c file: continues two prompts at once. */
#include <stdio.h>

int main(int argc, char **argv) {
    const struct LlaisysEngineOptions options = {.model = {.maxseq = 128}, .max_seqs = 8};
    struct LlaisysEngine *engine = llaisysEngineOpen(argc > 1 ? argv[1] : "models/refrain-mini", &options);
    if (!engine) return fprintf(stderr, "%s\n", llaisysGetLastError()), 1;

    const int64_t prompts[2][3] = {{1, 2, 3}, {4, 5, 6}};
    for (uint64_t i = 0; i < 2; i++) {
        struct LlaisysRequest request = {.prompt = prompts[i], .nprompt = 3, .max_tokens = 20, .tag = i};
        if (i == 1) request.sampling = (struct LlaisysSampling){.temperature = 0.8f, .top_p = 0.95f, .seed = 7};
        uint64_t id;
        if (llaisysEngineSubmit(engine, &request, &id)) return fprintf(stderr, "%s\n", llaisysGetLastError()), 1;
    }
    for (int running = 2; running > 0;) {
        struct LlaisysEvent events[8];
        size_t count;
        if (llaisysEnginePoll(engine, events, 8, -1, &count)) break;
        for (size_t i = 0; i < count; i++) {
            for (size_t t = 0; t < events[i].ntoken; t++)
                printf("%d: %lld\n", (int)events[i].tag, (long long)events[i].tokens[t]);
            running -= events[i].finish != LLAISYS_FINISH_NONE;
        }
    }
    llaisysEngineClose(engine);
    return 0;
}
#endif

#endif
