/* serve.h: a workload, what became of it, and how it is reported. */
#ifndef LLA_SERVE_H
#define LLA_SERVE_H

#include "../engine/engine.h"

enum { SERVE_BUCKETS = 120 };

struct serve_options {
    const char *model, *shape, *device, *workload, *svg;
    size_t requests, input, output, prefix, shrink;
    size_t max_seqs, max_seq, kv_tokens, kv_block, chunk, mixed_rows;
    double rate, temperature;
    uint64_t seed;
    int nthread;
    bool json, no_cache;
};

struct serve_request {
    double due; /* seconds after the start at which it arrives */
    size_t nprompt, nanswer;
    int64_t *prompt;
    /* what was seen from outside, in seconds after the start; arrival to first token includes time before the engine
     * took the request */
    double first, last;
    size_t ntoken, cached, preemptions;
    uint64_t id, hash;
};

/* Percentiles of times in seconds. */
struct serve_spread {
    double mean, p50, p90, p99, max;
};

struct serve_report {
    const char *name;
    double wall;
    size_t input, output; /* tokens */
    struct serve_spread ttft, gap, whole;
    struct LlaisysEngineStats stats;
    size_t most_running, refused; /* refused: how often the queue was full */
    uint64_t hash;                /* of all answers, in order of the requests */
    /* over the run, in SERVE_BUCKETS equal parts of `wall` */
    double tokens[SERVE_BUCKETS], running[SERVE_BUCKETS], waiting[SERVE_BUCKETS], kv[SERVE_BUCKETS];
};

void serve_print_text(const struct serve_options *o, const struct serve_report *r);
void serve_print_json(const struct serve_options *o, const struct serve_report *r);
/* The run as a picture: tokens a second, requests and KV blocks over time. */
lla_status serve_draw(const struct serve_options *o, const struct serve_report *r, const char *path);

#endif
