/* bench_serve.c: `llaisys-bench serve`: replays a workload against the engine API, as a server would, and measures what
 * its clients would see: tokens a second, time to first token, time between tokens.
 *
 * Times are taken where events are polled, from the moment at which a request was due. A request that finds the queue
 * full is offered again as soon as something has ended; its clock runs on. */
#include "../engine/load.h"
#include "bench.h"
#include "serve.h"

#ifdef LLA_CUDA
#include "../graph/exec_cuda.h"
#endif

#include <math.h>
#include <stdlib.h>
#include <time.h>

static double now(void) {
    return 1e-9 * (double)lla_now_ns();
}

/* ---- workloads ---- */

static double uniform(uint64_t *state) { /* above 0, at most 1 */
    return ((double)(bench_mix(state) >> 11) + 1) * 0x1p-53;
}

static size_t between(uint64_t *state, size_t lo, size_t hi) {
    return lo + (size_t)(bench_mix(state) % (hi - lo + 1));
}

static lla_status make_workload(const struct serve_options *o, size_t vocab, struct serve_request *requests) {
    uint64_t state = o->seed;
    double due = 0;
    const bool is_nano = !strcmp(o->workload, "nano-vllm"), is_shared = !strcmp(o->workload, "shared-prefix");
    const size_t prefix = is_shared ? o->prefix : 0;
    int64_t *common = malloc((prefix + 1) * sizeof *common);
    LLA_REQUIRE(common, LLA_ENOMEM, "no memory for a prefix of %zu tokens", prefix);
    for (size_t i = 0; i < prefix; i++) common[i] = (int64_t)(bench_mix(&state) % vocab);
    for (size_t i = 0; i < o->requests; i++) {
        struct serve_request *r = &requests[i];
        r->nprompt = is_nano ? between(&state, 100, 1024) / o->shrink : prefix + o->input;
        r->nanswer = is_nano ? between(&state, 100, 1024) / o->shrink : o->output;
        if (!r->nprompt) r->nprompt = 1;
        if (!r->nanswer) r->nanswer = 1;
        r->due = due;
        if (o->rate > 0) due += (strcmp(o->workload, "poisson") ? 1 : -log(uniform(&state))) / o->rate;
        r->prompt = malloc(r->nprompt * sizeof *r->prompt);
        if (!r->prompt) {
            free(common);
            return lla_fail(LLA_ENOMEM, "no memory for a prompt of %zu tokens", r->nprompt);
        }
        for (size_t j = 0; j < r->nprompt; j++)
            r->prompt[j] = j < prefix ? common[j] : (int64_t)(bench_mix(&state) % vocab);
    }
    free(common);
    return LLA_OK;
}

/* ---- the engine ---- */

/* Tokens of the KV cache where none were asked for: what the workload needs, `limits->kv_tokens`, as far as it goes. A
 * CPU takes what the engine would take by itself at most; a GPU's memory has no other use, so there it is halved until
 * the plan leaves a sixteenth free. */
static lla_status fit_kv(const struct lla_spec *spec, struct lla_limits *limits) {
    const size_t unasked = limits->max_seq > 65536 ? limits->max_seq : 65536;
#ifdef LLA_CUDA
    if (limits->device == LLAISYS_DEVICE_NVIDIA) {
        size_t available;
        LLA_TRY(lla_exec_cuda_available(0, &available));
        for (; limits->kv_tokens > unasked; limits->kv_tokens /= 2) {
            struct lla_graph graph;
            LLA_TRY(lla_graph_make(spec, limits, (struct lla_shard){0, 1}, &graph));
            const lla_status status = lla_plan_fit(&graph.plan, available - available / 16);
            lla_graph_free(&graph);
            if (!status) return LLA_OK;
        }
    }
#endif
    (void)spec;
    if (limits->kv_tokens > unasked) limits->kv_tokens = unasked;
    return LLA_OK;
}

static lla_status open_engine(struct serve_options *o, struct serve_request *requests, struct serve_report *report,
                              struct LlaisysEngine **engine) {
    struct lla_spec spec;
    struct lla_checkpoint *checkpoint = NULL;
    report->name = o->shape ? o->shape : o->model;
    LLA_TRY(o->shape ? bench_shape(o->shape, &spec) : lla_spec_load(o->model, &spec));
    LLA_TRY(make_workload(o, spec.vocab, requests));
    size_t longest = 0, total = 0;
    for (size_t i = 0; i < o->requests; i++) {
        const size_t n = requests[i].nprompt + requests[i].nanswer;
        longest = n > longest ? n : longest;
        total += n;
    }
    if (!o->max_seq) o->max_seq = longest;
    LLA_REQUIRE(longest <= o->max_seq, LLA_ELIMIT, "a request of %zu tokens exceeds --max-seq %zu", longest,
                o->max_seq);
    const size_t most = o->max_seqs * (o->max_seq + 32) < total + o->max_seqs * 32 + o->max_seq
                            ? o->max_seqs * (o->max_seq + 32)
                            : total + o->max_seqs * 32 + o->max_seq;
    struct lla_limits limits = {.device = strcmp(o->device, "nvidia") ? LLAISYS_DEVICE_CPU : LLAISYS_DEVICE_NVIDIA,
                                .max_seq = o->max_seq,
                                .max_seqs = o->max_seqs,
                                .kv_tokens = o->kv_tokens ? o->kv_tokens : most,
                                .kv_block = o->kv_block,
                                .prefill_chunk = o->chunk};
    if (!o->kv_tokens) LLA_TRY(fit_kv(&spec, &limits));
    struct lla_runner *runner = calloc(1, sizeof *runner);
    LLA_REQUIRE(runner, LLA_ENOMEM, "no memory for a runner");
    lla_status status = LLA_OK;
    if (!o->shape) status = lla_checkpoint_open(o->model, &checkpoint);
    if (!status) status = lla_runner_create(&spec, &limits, (struct lla_shard){0, 1}, 0, o->nthread, runner);
    if (!status) status = checkpoint ? lla_load_weights(runner, checkpoint, lla_progress_bar) : bench_randomize(runner);
    if (!status) status = lla_runner_ready(runner);
    lla_checkpoint_close(checkpoint);
    if (status) {
        lla_runner_destroy(runner);
        free(runner);
        return status;
    }
    const struct LlaisysEngineOptions options = {
        .max_queue = o->requests < 65536 ? o->requests : 65536, .mixed_rows = o->mixed_rows, .max_logprobs = -1};
    LLA_TRY(lla_engine_create_over(runner, &options, engine));
    o->mixed_rows = (*engine)->scheduler.config.mixed_rows;
    return LLA_OK;
}

/* ---- the run ---- */

struct times { /* all gaps between tokens */
    double *gap;
    size_t ngap;
};

static void note(struct serve_request *r, const struct LlaisysEvent *e, double t, struct times *times) {
    r->cached = e->cached_tokens;
    r->preemptions = e->preemptions;
    for (size_t i = 0; i < e->ntoken; i++) r->hash = (r->hash ^ (uint64_t)e->tokens[i]) * 0x100000001b3u;
    if (!e->ntoken) return;
    size_t gaps = e->ntoken;
    if (!r->ntoken) {
        r->first = r->last = t;
        gaps--;
    }
    /* tokens that were polled together have come at equal distances, as far as can be seen */
    for (size_t i = 0; i < gaps; i++) times->gap[times->ngap++] = (t - r->last) / (double)gaps;
    r->last = t;
    r->ntoken += e->ntoken;
}

/* Samples over time, kept while the length of the run is not known: each stands for the time since the one before. */
struct history {
    struct sample {
        double at, tokens, running, waiting, kv;
    } *samples;
    size_t count, room;
};

static void sample(struct history *h, double at, double tokens, const struct LlaisysEngineStats *s) {
    if (h->count == h->room) return;
    h->samples[h->count++] =
        (struct sample){at, tokens, (double)s->running, (double)(s->waiting), (double)s->kv_active};
}

static void fill_buckets(const struct history *h, struct serve_report *r) {
    size_t seen[SERVE_BUCKETS] = {0};
    for (size_t i = 0; i < h->count; i++) {
        const struct sample *s = &h->samples[i];
        size_t b = (size_t)(SERVE_BUCKETS * s->at / r->wall);
        if (b >= SERVE_BUCKETS) b = SERVE_BUCKETS - 1;
        r->tokens[b] += s->tokens * SERVE_BUCKETS / r->wall;
        r->running[b] += s->running;
        r->waiting[b] += s->waiting;
        r->kv[b] += s->kv;
        seen[b]++;
    }
    for (size_t b = 0; b < SERVE_BUCKETS; b++) {
        const double n = seen[b] ? (double)seen[b] : 1;
        r->running[b] /= n, r->waiting[b] /= n, r->kv[b] /= n;
    }
}

static lla_status replay(const struct serve_options *o, struct LlaisysEngine *engine, struct serve_request *requests,
                         struct serve_report *report, struct times *times, struct history *history) {
    enum { EVENTS = 256 };
    static struct LlaisysEvent events[EVENTS];
    size_t sent = 0, ended = 0;
    const double start = now();
    while (ended < o->requests) {
        bool is_full = false;
        while (sent < o->requests && requests[sent].due <= now() - start && !is_full) {
            struct serve_request *r = &requests[sent];
            const struct LlaisysRequest q = {
                .prompt = r->prompt,
                .nprompt = r->nprompt,
                .max_tokens = r->nanswer,
                .ignore_eos = 1,
                .sampling = {.temperature = (float)o->temperature, .top_p = 1, .seed = o->seed + sent},
                .tag = sent,
                .no_cache = o->no_cache};
            const int status = llaisysEngineSubmit(engine, &q, &r->id);
            if (status != LLAISYS_BUSY && status) return status;
            is_full = status == LLAISYS_BUSY;
            report->refused += is_full;
            sent += !is_full;
        }
        int wait = -1;
        if (sent < o->requests && !is_full) {
            const double left = requests[sent].due - (now() - start);
            wait = left > 0 ? (int)(1e3 * left) : 0;
        }
        size_t count, tokens = 0;
        LLA_TRY(llaisysEnginePoll(engine, events, EVENTS, wait, &count));
        const double t = now() - start;
        for (size_t i = 0; i < count; i++) {
            note(&requests[events[i].tag], &events[i], t, times);
            tokens += events[i].ntoken;
            ended += events[i].finish != LLAISYS_FINISH_NONE;
            LLA_REQUIRE(events[i].finish != LLAISYS_FINISH_ERROR, LLA_EDEVICE, "%s", events[i].message);
        }
        struct LlaisysEngineStats stats;
        llaisysEngineStats(engine, &stats);
        if (stats.running > report->most_running) report->most_running = stats.running;
        if (count) sample(history, t, (double)tokens, &stats);
    }
    report->wall = now() - start;
    llaisysEngineStats(engine, &report->stats);
    return LLA_OK;
}

static int ascending(const void *a, const void *b) {
    const double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

/* Sorts the values. */
static struct serve_spread spread(double *values, size_t n) {
    if (!n) return (struct serve_spread){0};
    double sum = 0;
    for (size_t i = 0; i < n; i++) sum += values[i];
    qsort(values, n, sizeof *values, ascending);
    return (struct serve_spread){sum / (double)n, values[n / 2], values[n * 9 / 10], values[n * 99 / 100],
                                 values[n - 1]};
}

static lla_status measure(struct serve_options *o, struct serve_request *requests, struct serve_report *report) {
    struct LlaisysEngine *engine = NULL;
    LLA_TRY(open_engine(o, requests, report, &engine));
    report->hash = 0xcbf29ce484222325u;
    for (size_t i = 0; i < o->requests; i++) {
        requests[i].hash = report->hash;
        report->input += requests[i].nprompt;
        report->output += requests[i].nanswer;
    }
    struct times times = {.gap = malloc(report->output * sizeof(double))};
    struct history history = {.samples = malloc((report->output + o->requests) * sizeof(struct sample)),
                              .room = report->output + o->requests};
    double *ttft = malloc(o->requests * sizeof *ttft), *whole = malloc(o->requests * sizeof *whole);
    lla_status status = times.gap && history.samples && ttft && whole
                            ? replay(o, engine, requests, report, &times, &history)
                            : lla_fail(LLA_ENOMEM, "no memory for the times of %zu tokens", report->output);
    if (!status) {
        for (size_t i = 0; i < o->requests; i++) {
            ttft[i] = requests[i].first - requests[i].due;
            whole[i] = requests[i].last - requests[i].due;
            report->hash = (report->hash ^ requests[i].hash) * 0x100000001b3u;
        }
        report->ttft = spread(ttft, o->requests);
        report->whole = spread(whole, o->requests);
        report->gap = spread(times.gap, times.ngap);
        fill_buckets(&history, report);
    }
    free(times.gap);
    free(history.samples);
    free(ttft);
    free(whole);
    llaisysEngineClose(engine);
    return status;
}

/* ---- options ---- */

static void usage(FILE *out) {
    fprintf(out, "usage: llaisys-bench serve [options]\n"
                 "  --model DIR        a model folder in transformers' format\n"
                 "  --shape NAME       random weights of a known shape instead:");
    bench_print_shapes(out);
    fprintf(out, "\n  --device NAME      cpu or nvidia (cpu)\n"
                 "  --workload NAME    fixed: equal requests, all at once or --rate a second (the default)\n"
                 "                     poisson: the same, arriving at random, --rate a second\n"
                 "                     shared-prefix: as fixed, behind --prefix common tokens\n"
                 "                     nano-vllm: 256 requests at once, 100 to 1024 tokens in and out\n"
                 "  --requests N       (64; nano-vllm 256)\n"
                 "  --input N          tokens of a prompt, without the prefix (128)\n"
                 "  --output N         tokens of an answer (64)\n"
                 "  --prefix N         (512)\n"
                 "  --rate R           requests a second; 0: all at once (poisson: 4)\n"
                 "  --shrink N         nano-vllm with lengths divided by N, for slow machines (1)\n"
                 "  --temperature T    0 is greedy (0)\n"
                 "  --seed N           of prompts, lengths, arrivals and sampling (1)\n"
                 "  --max-seqs N       requests computed at once (64)\n"
                 "  --max-seq N        tokens of a request (what the workload needs)\n"
                 "  --kv-tokens N      tokens of the KV cache (what the workload needs; cpu: at most 65536)\n"
                 "  --kv-block N       tokens of a KV block (32)\n"
                 "  --prefill-chunk N  rows of the largest step (cpu 512)\n"
                 "  --mixed-rows N     rows of a step in which something decodes (cpu --max-seqs + 64)\n"
                 "  --no-cache         without prefix matching\n"
                 "  --threads N        CPU threads (all)\n"
                 "  --svg FILE         the run as a picture\n"
                 "  --json             one JSON object instead of text\n");
}

static lla_status parse(int argc, char **argv, struct serve_options *o) {
    size_t seed = 1, threads = 0, requests = 0;
    for (int i = 1; i < argc; i++) {
        const char *a = argv[i], *value = i + 1 < argc ? argv[i + 1] : NULL;
        const struct {
            const char *name;
            size_t *whole;
            double *real;
            const char **text;
            bool *flag;
        } known[] = {{"--requests", &requests},
                     {"--input", &o->input},
                     {"--output", &o->output},
                     {"--prefix", &o->prefix},
                     {"--shrink", &o->shrink},
                     {"--seed", &seed},
                     {"--max-seqs", &o->max_seqs},
                     {"--max-seq", &o->max_seq},
                     {"--kv-tokens", &o->kv_tokens},
                     {"--kv-block", &o->kv_block},
                     {"--prefill-chunk", &o->chunk},
                     {"--mixed-rows", &o->mixed_rows},
                     {"--threads", &threads},
                     {"--rate", .real = &o->rate},
                     {"--temperature", .real = &o->temperature},
                     {"--model", .text = &o->model},
                     {"--shape", .text = &o->shape},
                     {"--device", .text = &o->device},
                     {"--workload", .text = &o->workload},
                     {"--svg", .text = &o->svg},
                     {"--json", .flag = &o->json},
                     {"--no-cache", .flag = &o->no_cache}};
        size_t k = 0, n = sizeof known / sizeof *known;
        while (k < n && strcmp(a, known[k].name)) k++;
        LLA_REQUIRE(k < n, LLA_EINVAL, "unknown option %s; see llaisys-bench serve --help", a);
        if (known[k].flag) {
            *known[k].flag = true;
            continue;
        }
        LLA_REQUIRE(value, LLA_EINVAL, "%s needs a value", a);
        i++;
        char *end = NULL;
        if (known[k].text) {
            *known[k].text = value;
        } else if (known[k].real) {
            *known[k].real = strtod(value, &end);
            LLA_REQUIRE(end != value && !*end && *known[k].real >= 0 && *known[k].real < 1e9, LLA_EINVAL,
                        "%s %s: expected a number from 0", a, value);
        } else {
            const unsigned long long number = strtoull(value, &end, 10);
            LLA_REQUIRE(*value >= '0' && *value <= '9' && !*end && number > 0 && number < 1u << 30, LLA_EINVAL,
                        "%s %s: expected a positive number", a, value);
            *known[k].whole = (size_t)number;
        }
    }
    static const char *const workloads[] = {"fixed", "poisson", "shared-prefix", "nano-vllm"};
    size_t w = 0;
    while (w < 4 && strcmp(o->workload, workloads[w])) w++;
    LLA_REQUIRE(w < 4, LLA_EINVAL, "--workload %s: expected fixed, poisson, shared-prefix or nano-vllm", o->workload);
    LLA_REQUIRE(!o->model || !o->shape, LLA_EINVAL, "--model and --shape exclude each other");
    LLA_REQUIRE(!strcmp(o->device, "cpu") || !strcmp(o->device, "nvidia"), LLA_EINVAL,
                "--device %s: expected cpu or nvidia", o->device);
    if (!o->model && !o->shape) o->shape = "deepseek-r1-distill-qwen-1.5b";
    if (!strcmp(o->workload, "poisson") && o->rate == 0) o->rate = 4;
    o->requests = requests ? requests : (!strcmp(o->workload, "nano-vllm") ? 256 : 64);
    o->seed = seed;
    o->nthread = (int)threads;
    return LLA_OK;
}

int bench_serve(int argc, char **argv) {
    for (int i = 1; i < argc; i++)
        if (!strcmp(argv[i], "--help")) {
            usage(stdout);
            return 0;
        }
    struct serve_options o = {
        .device = "cpu", .workload = "fixed", .input = 128, .output = 64, .prefix = 512, .shrink = 1, .max_seqs = 64};
    static struct serve_report report;
    struct serve_request *requests = NULL;
    lla_status status = parse(argc, argv, &o);
    if (!status && !(requests = calloc(o.requests, sizeof *requests)))
        status = lla_fail(LLA_ENOMEM, "no memory for %zu requests", o.requests);
    if (!status) status = measure(&o, requests, &report);
    if (!status) (o.json ? serve_print_json : serve_print_text)(&o, &report);
    if (!status && o.svg) status = serve_draw(&o, &report, o.svg);
    for (size_t i = 0; requests && i < o.requests; i++) free(requests[i].prompt);
    free(requests);
    if (status) fprintf(stderr, "llaisys-bench: error: %s\n", lla_last_error());
    return status ? 1 : 0;
}
