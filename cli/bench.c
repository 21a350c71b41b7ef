/* llaisys-bench: prefill and decode speed of the engine alone, token ids only, beside the limits of the same machine
 * measured in the same run. `llaisys-bench --help` lists the options.
 *
 * Decode is bound by bytes: every step reads all weights but the embedding table, and each sequence's KV cache. Its
 * ceiling is a plain read of the same memory by the same threads, taken between the decode steps, so that both see the
 * same machine. Prefill is bound by arithmetic: two operations for every weight and token, and attention; its ceiling
 * is the dot-product instruction. */
#include "bench.h"
#include "../engine/load.h"
#include "../engine/runner.h"
#include "../kernels/cpu/isa.h"

#ifdef LLA_CUDA
#include "../graph/exec_cuda.h"
#endif

#include <math.h>
#include <stdlib.h>
#include <time.h>
#include <unistd.h>

struct options {
    const char *model, *shape, *device, *trace;
    size_t batch, context, tokens, repeat, chunk;
    int nthread;
    bool json, is_cuda, ablate;
};

struct sample { /* of times in seconds */
    double median, low, high;
};

struct report {
    const char *name, *isa;
    struct lla_graph *graph;
    double plan_s, alloc_s, build_s, load_s, open_s;
    double read_gbs, peak_flops;
    struct sample prefill, decode; /* by the host's clock */
    struct sample device;          /* a decode step alone, by the GPU's */
    double prefill_flops, decode_flops, prefill_bytes, decode_bytes;
    size_t free_before, free_after; /* the GPU's memory, before the first token and after the last */
    uint64_t hash;
};

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static int ascending(const void *a, const void *b) {
    const double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

/* Median, tenth and ninetieth percentile; sorts the values. */
static struct sample summarize(double *values, size_t n) {
    qsort(values, n, sizeof *values, ascending);
    return (struct sample){values[n / 2], values[n / 10], values[n - 1 - n / 10]};
}

/* ---- what is measured against ---- */

struct region {
    const float *data;
    size_t count;
    struct lla_crew *crew;
};

static void read_share(void *arg, size_t rank) {
    const struct region *r = arg;
    const struct lla_team team = {.rank = rank, .size = lla_crew_size(r->crew)};
    size_t lo, hi;
    lla_share(r->count, 1 << 16, team, &lo, &hi);
    volatile float keep = lla_isa()->read(r->data + lo, hi - lo);
    (void)keep;
}

/* Seconds of one plain read of the bytes by all threads of the crew. */
static double read_once(const char *bytes, size_t nbytes, struct lla_crew *crew) {
    struct region region = {(const float *)(const void *)bytes, nbytes / sizeof(float), crew};
    const double start = now();
    lla_crew_run(crew, read_share, &region);
    return now() - start;
}

enum {
    PEAK_ITERATIONS = 4000000,
    PEAK_TRIES = 40
}; /* half a second: time enough for threads to find cores of their own */

static void compute_share(void *arg, size_t rank) {
    (void)rank;
    lla_isa()->peak(*(const llaisysDataType_t *)arg, PEAK_ITERATIONS);
}

/* Operations a second (a multiply-add is two) of the dot-product instruction that the dtype's kernels use, on all
 * threads: the best of five tries. */
static double peak_flops(llaisysDataType_t dtype, struct lla_crew *crew) {
    const double done = (double)lla_crew_size(crew) * lla_isa()->peak(dtype, PEAK_ITERATIONS);
    double best = 0;
    for (int t = 0; t < PEAK_TRIES; t++) {
        const double start = now();
        lla_crew_run(crew, compute_share, &dtype);
        const double rate = 2 * done / (now() - start);
        best = rate > best ? rate : best;
    }
    return best;
}

/* ---- the model ---- */

static lla_status open_model(const struct options *o, struct lla_runner *runner, struct report *report) {
    struct lla_spec spec;
    struct lla_checkpoint *checkpoint = NULL;
    const double start = now();
    if (o->shape) {
        LLA_TRY(bench_shape(o->shape, &spec));
        report->name = o->shape;
    } else {
        LLA_TRY(lla_spec_load(o->model, &spec));
        LLA_TRY(lla_checkpoint_open(o->model, &checkpoint));
        report->name = o->model;
    }
    struct lla_limits limits = {.device = o->is_cuda ? LLAISYS_DEVICE_NVIDIA : LLAISYS_DEVICE_CPU,
                                .max_seq = o->context + o->tokens + 1,
                                .max_seqs = o->batch,
                                .prefill_chunk = o->chunk};
    if (limits.max_seq > spec.max_position) limits.max_seq = spec.max_position;
    lla_status status = LLA_OK;
    if (o->context + o->tokens > limits.max_seq)
        status = lla_fail(LLA_ELIMIT, "--context %zu and --new %zu exceed the model's context of %zu tokens",
                          o->context, o->tokens, limits.max_seq);
    const double planned = now();
    if (!status) status = lla_runner_create(&spec, &limits, (struct lla_shard){0, 1}, 0, o->nthread, runner);
    const double created = now();
    if (!status && checkpoint) status = lla_load_weights(runner, checkpoint, lla_progress_bar);
    if (!status && !checkpoint) status = bench_randomize(runner);
    const double loaded = now();
    if (!status) status = lla_runner_ready(runner);
    lla_checkpoint_close(checkpoint);
    report->open_s = planned - start;
    report->load_s = loaded - created;
    if (status) return status;
    report->alloc_s = runner->alloc_seconds;
    report->build_s = runner->build_seconds;
    report->plan_s = created - planned - runner->alloc_seconds - runner->build_seconds;
    report->graph = &runner->graph;
    return LLA_OK;
}

/* Bytes that one decode step must read: the weights of the layers and the head, an embedding row and the KV cache of
 * every sequence. */
static double step_bytes(const struct lla_graph *g, double batch, double context) {
    const struct lla_plan *p = &g->plan;
    const double e = (double)lla_dtype_size(p->spec.dtype);
    double bytes = 0;
    for (size_t i = 0; i < p->nweight; i++)
        if (p->weights[i].kind != LLA_W_EMBED) bytes += (double)p->weights[i].nbytes;
    bytes += batch * (double)p->spec.hidden * e;
    return bytes + batch * context * 2 * (double)(p->nkvhead * p->spec.head_dim * p->spec.nlayer) * e;
}

/* Operations of `batch` sequences' n tokens: two for every weight of the layers and token, two for every weight of the
 * head and row of logits, and four for every earlier token, query head and dimension: q k^T and p v. */
static double token_flops(const struct lla_graph *g, double batch, double n, double logits, double earlier) {
    const struct lla_plan *p = &g->plan;
    double weights = 0, head = 0;
    for (size_t i = 0; i < p->nweight; i++) {
        const struct lla_weight *w = &p->weights[i];
        if (w->kind == LLA_W_HEAD) head = (double)(w->rows * w->cols);
        if (w->kind != LLA_W_HEAD && w->kind != LLA_W_EMBED && w->cols > 1) weights += (double)(w->rows * w->cols);
    }
    const double attention = 4 * earlier * (double)(p->nhead * p->spec.head_dim * p->spec.nlayer);
    return batch * (2 * weights * n + 2 * head * logits + attention * n);
}

/* ---- the run ---- */

/* Every sequence's prompt, in steps of at most the plan's rows. */
static lla_status prefill(struct lla_runner *r, const struct options *o, const int64_t *prompts, const int32_t *blocks,
                          int64_t *next) {
    const size_t rows = r->graph.dims.max_rows;
    for (size_t s = 0; s < o->batch; s++)
        for (size_t done = 0, n; done < o->context; done += n) {
            n = o->context - done < rows ? o->context - done : rows;
            const struct lla_step_seq seq = {.slot = s,
                                             .tokens = prompts + s * o->context + done,
                                             .ntoken = n,
                                             .position0 = done,
                                             .blocks = blocks + s * r->graph.dims.max_blocks,
                                             .want_next = done + n == o->context};
            LLA_TRY(lla_runner_step(r, &seq, 1, &next[s]));
        }
    return LLA_OK;
}

#ifdef LLA_CUDA
/* What each op of the last step costs, by leaving it out, and alone. Without the head, sample looks for what the head
 * of up to eight rows would have found. */
static lla_status ablate(struct lla_runner *r, size_t bucket, size_t count) {
    static const char *const names[] = {
#define X(NAME, suffix) #suffix,
        LLA_NODE_OPS(X)
#undef X
    };
    const struct lla_program *program = &r->programs[bucket];
    double whole[3], ms[3];
    LLA_TRY(lla_exec_cuda_time(r->cuda, program, 0, count, whole));
    printf("bucket of %zu rows: %.1f us\n", program->rows, 1e3 * whole[0]);
    for (unsigned op = 0; op < LLA_OP_COUNT; op++) {
        LLA_TRY(lla_exec_cuda_time(r->cuda, program, 1u << op, count, ms));
        printf("without %-10s %8.1f us less\n", names[op], 1e3 * (whole[0] - ms[0]));
    }
    for (unsigned op = 0; op < LLA_OP_COUNT; op++) {
        LLA_TRY(lla_exec_cuda_time(r->cuda, program, ~(1u << op), count, ms));
        printf("alone   %-10s %8.1f us\n", names[op], 1e3 * ms[0]);
    }
    return LLA_OK;
}

/* The last decode step replayed many times in a row, and the plain-read ceiling of the same memory. */
static lla_status measure_device(struct lla_runner *r, const struct options *o, struct report *report) {
    double ms[3];
    size_t bucket = 0;
    while (r->programs[bucket].rows < o->batch) bucket++;
    if (o->ablate) LLA_TRY(ablate(r, bucket, 200));
    if (o->trace) {
        FILE *out = fopen(o->trace, "w");
        LLA_REQUIRE(out, LLA_EIO, "%s: cannot be written", o->trace);
        const lla_status status = lla_exec_cuda_trace(r->cuda, &r->programs[bucket], out);
        const bool is_written = !ferror(out);
        LLA_REQUIRE(!fclose(out) && is_written, LLA_EIO, "%s: cannot be written", o->trace);
        LLA_TRY(status);
    }
    LLA_TRY(lla_exec_cuda_time(r->cuda, &r->programs[bucket], 0, 200, ms));
    report->device = (struct sample){1e-3 * ms[0], 1e-3 * ms[1], 1e-3 * ms[2]};
    return lla_exec_cuda_read_ceiling(r->cuda, &report->read_gbs);
}
#endif

static lla_status measure(struct lla_runner *r, const struct options *o, struct report *report) {
    const struct lla_dims *d = &r->graph.dims;
    const size_t vocab = r->graph.plan.spec.vocab;
    int64_t *prompts = calloc(o->batch * o->context, sizeof *prompts), *next = calloc(o->batch, sizeof *next);
    int32_t *blocks = calloc(o->batch * d->max_blocks, sizeof *blocks);
    struct lla_step_seq *seqs = calloc(o->batch, sizeof *seqs);
    double *prefills = calloc(o->repeat, sizeof *prefills), *decodes = calloc(o->tokens, sizeof *decodes);
    double *reads = calloc(o->tokens, sizeof *reads);
    lla_status status = LLA_OK;
    if (!prompts || !next || !blocks || !seqs || !prefills || !decodes || !reads) {
        status = lla_fail(LLA_ENOMEM, "no memory for the run");
        goto out;
    }
    uint64_t state = 1;
    for (size_t i = 0; i < o->batch * o->context; i++) prompts[i] = (int64_t)(bench_mix(&state) % vocab);
    for (size_t i = 0; i < o->batch * d->max_blocks; i++) blocks[i] = (int32_t)i + 1;

    if (!o->is_cuda) report->peak_flops = peak_flops(d->dtype, r->crew);
#ifdef LLA_CUDA
    if (o->is_cuda) LLA_TRY_GOTO(status, lla_exec_cuda_available(0, &report->free_before), out);
#endif
    for (size_t i = 0; i < o->repeat; i++) {
        const double start = now();
        LLA_TRY_GOTO(status, prefill(r, o, prompts, blocks, next), out);
        prefills[i] = now() - start;
    }

#ifdef LLA_CUDA
    if (o->is_cuda && o->ablate) { /* the prompt's last step */
        const size_t most = r->graph.dims.max_rows, rest = o->context % most ? o->context % most : most;
        size_t bucket = 0;
        while (r->programs[bucket].rows < rest) bucket++;
        LLA_TRY_GOTO(status, ablate(r, bucket, 20), out);
    }
#endif

    /* a plain read of the same weights, at most 4 GB of them, after every eighth decode step */
    const size_t read_bytes =
        r->graph.plan.weight_bytes < (size_t)4 << 30 ? r->graph.plan.weight_bytes : (size_t)4 << 30;
    size_t nread = 0;
    report->hash = 0xcbf29ce484222325u; /* FNV-1a over the tokens */
    for (size_t t = 0; t < o->tokens; t++) {
        for (size_t s = 0; s < o->batch; s++) {
            report->hash = (report->hash ^ (uint64_t)next[s]) * 0x100000001b3u;
            seqs[s] = (struct lla_step_seq){.slot = s,
                                            .tokens = &next[s],
                                            .ntoken = 1,
                                            .position0 = o->context + t,
                                            .blocks = blocks + s * d->max_blocks,
                                            .want_next = true};
        }
        const double start = now();
        LLA_TRY_GOTO(status, lla_runner_step(r, seqs, o->batch, next), out);
        decodes[t] = now() - start;
        if (!o->is_cuda && (t % 8 == 0 || t < 4)) reads[nread++] = read_once(r->arena, read_bytes, r->crew);
    }
    if (!o->is_cuda) report->read_gbs = 1e-9 * (double)read_bytes / summarize(reads, nread).median;
#ifdef LLA_CUDA
    if (o->is_cuda) {
        LLA_TRY_GOTO(status, lla_exec_cuda_available(0, &report->free_after), out);
        LLA_TRY_GOTO(status, measure_device(r, o, report), out);
    }
#endif
    report->prefill = summarize(prefills, o->repeat);
    report->decode = summarize(decodes, o->tokens);
    const double context = (double)o->context, batch = (double)o->batch, middle = context + 0.5 * (double)o->tokens;
    report->prefill_flops = token_flops(&r->graph, batch, context, 1, context / 2); /* half of the square */
    /* the weights, once a step */
    report->prefill_bytes = batch * ceil(context / (double)d->max_rows) * step_bytes(&r->graph, 0, 0);
    report->decode_flops = token_flops(&r->graph, batch, 1, 1, middle);
    report->decode_bytes = step_bytes(&r->graph, batch, middle);
out:
    free(prompts);
    free(next);
    free(blocks);
    free(seqs);
    free(prefills);
    free(decodes);
    free(reads);
    return status;
}

/* ---- output ---- */

static void print_text(const struct options *o, const struct report *r, int nthread) {
    const struct lla_plan *p = &r->graph->plan;
    const double prompt = (double)(o->batch * o->context);
    if (o->is_cuda)
        printf("%s  %s, nvidia, batch %zu, context %zu, new %zu\n", r->name, lla_dtype_name(p->spec.dtype), o->batch,
               o->context, o->tokens);
    else
        printf("%s  %s, cpu (%s), %d thread%s, batch %zu, context %zu, new %zu\n", r->name,
               lla_dtype_name(p->spec.dtype), r->isa, nthread, nthread == 1 ? "" : "s", o->batch, o->context,
               o->tokens);
    printf("start-up  config and map %.3f s, plan %.4f s, arena %.3f s, tables and programs %.3f s, weights %.2f s "
           "(%.2f GB)\n",
           r->open_s, r->plan_s, r->alloc_s, r->build_s, r->load_s, 1e-9 * (double)p->weight_bytes);
    printf("limits    plain read %.1f GB/s", r->read_gbs);
    if (r->peak_flops > 0) printf(", dot products %.0f GFLOP/s", 1e-9 * r->peak_flops);
    printf("\n");
    printf("prefill   %8.1f tokens/s   %.2f ms (%.2f to %.2f)   %.0f GFLOP/s", prompt / r->prefill.median,
           1e3 * r->prefill.median, 1e3 * r->prefill.low, 1e3 * r->prefill.high,
           1e-9 * r->prefill_flops / r->prefill.median);
    if (r->peak_flops > 0) printf(", %.1f%% of the peak", 100 * r->prefill_flops / r->prefill.median / r->peak_flops);
    printf("\n");
    const double gbs = 1e-9 * r->decode_bytes / r->decode.median;
    printf("decode    %8.1f tokens/s   %.3f ms (%.3f to %.3f)   %.3f GB a step, %.1f GB/s, %.1f%% of the plain read\n",
           (double)o->batch / r->decode.median, 1e3 * r->decode.median, 1e3 * r->decode.low, 1e3 * r->decode.high,
           1e-9 * r->decode_bytes, gbs, 100 * gbs / r->read_gbs);
    if (o->is_cuda)
        printf("replay    %8.1f tokens/s   %.3f ms (%.3f to %.3f)   %.1f GB/s, %.1f%% of the plain read\n",
               (double)o->batch / r->device.median, 1e3 * r->device.median, 1e3 * r->device.low, 1e3 * r->device.high,
               1e-9 * r->decode_bytes / r->device.median, 100e-9 * r->decode_bytes / r->device.median / r->read_gbs);
    if (o->is_cuda)
        printf("memory    %.3f GB of the GPU free before the first token, %+.3f MB by the last\n",
               1e-9 * (double)r->free_before, 1e-6 * ((double)r->free_after - (double)r->free_before));
    printf("hash      %016llx of %zu tokens\n", (unsigned long long)r->hash, o->batch * o->tokens);
}

static void print_json(const struct options *o, const struct report *r, int nthread) {
    const struct lla_plan *p = &r->graph->plan;
    const double gbs = 1e-9 * r->decode_bytes / r->decode.median;
    printf(
        "{\"model\": \"%s\", \"dtype\": \"%s\", \"device\": \"%s\", \"isa\": \"%s\", \"threads\": %d, \"batch\": %zu, "
        "\"context\": %zu, \"new_tokens\": %zu,\n",
        r->name, lla_dtype_name(p->spec.dtype), o->device, r->isa, nthread, o->batch, o->context, o->tokens);
    printf(" \"startup_s\": {\"open\": %.6f, \"plan\": %.6f, \"arena\": %.6f, \"programs\": %.6f, \"weights\": %.6f}, "
           "\"weight_bytes\": %zu, \"arena_bytes\": %zu,\n",
           r->open_s, r->plan_s, r->alloc_s, r->build_s, r->load_s, p->weight_bytes, p->total);
    printf(" \"plain_read_gbs\": %.3f, \"peak_gflops\": %.1f,\n", r->read_gbs, 1e-9 * r->peak_flops);
    printf(" \"prefill\": {\"tokens_per_s\": %.3f, \"ms\": %.4f, \"ms_p10\": %.4f, \"ms_p90\": %.4f, \"gflops\": %.1f, "
           "\"percent_of_peak\": %.2f, \"flops\": %.0f, \"bytes\": %.0f},\n",
           (double)(o->batch * o->context) / r->prefill.median, 1e3 * r->prefill.median, 1e3 * r->prefill.low,
           1e3 * r->prefill.high, 1e-9 * r->prefill_flops / r->prefill.median,
           r->peak_flops > 0 ? 100 * r->prefill_flops / r->prefill.median / r->peak_flops : 0, r->prefill_flops,
           r->prefill_bytes);
    if (o->is_cuda)
        printf(" \"replay\": {\"ms\": %.4f, \"ms_p10\": %.4f, \"ms_p90\": %.4f, \"percent_of_read\": %.2f},\n",
               1e3 * r->device.median, 1e3 * r->device.low, 1e3 * r->device.high,
               100e-9 * r->decode_bytes / r->device.median / r->read_gbs);
    if (o->is_cuda)
        printf(" \"device_free_bytes\": {\"before\": %zu, \"after\": %zu},\n", r->free_before, r->free_after);
    printf(" \"decode\": {\"tokens_per_s\": %.3f, \"ms\": %.4f, \"ms_p10\": %.4f, \"ms_p90\": %.4f, \"bytes\": %.0f, "
           "\"flops\": %.0f, \"gbs\": %.3f, "
           "\"percent_of_read\": %.2f},\n",
           (double)o->batch / r->decode.median, 1e3 * r->decode.median, 1e3 * r->decode.low, 1e3 * r->decode.high,
           r->decode_bytes, r->decode_flops, gbs, 100 * gbs / r->read_gbs);
    printf(" \"hash\": \"%016llx\"}\n", (unsigned long long)r->hash);
}

static void usage(FILE *out) {
    fprintf(out, "usage: llaisys-bench [options]          speed of prefill and decode\n"
                 "       llaisys-bench serve [options]    many requests at once; see llaisys-bench serve --help\n"
                 "  --model DIR      a model folder in transformers' format\n"
                 "  --shape NAME     random weights of a known shape instead:");
    bench_print_shapes(out);
    fprintf(out,
            "\n                   (default: deepseek-r1-distill-qwen-1.5b)\n"
            "  --device NAME    cpu or nvidia (cpu)\n"
            "  --batch N        sequences decoded together (1)\n"
            "  --context N      tokens of each prompt (128)\n"
            "  --new N          tokens decoded for each sequence (64)\n"
            "  --repeat N       times that the prompts are prefilled (3)\n"
            "  --prefill-chunk N  rows of a prefill step (512, nvidia: 2048)\n"
            "  --threads N      CPU threads (all)\n"
            "  --ablate         nvidia: what each op costs, by leaving it out, and alone\n"
            "  --trace FILE     nvidia: when each block of a decode step's kernels ran, as CSV (meson's step_trace)\n"
            "  --json           one JSON object instead of text\n");
}

/* The positive number behind option argv[*i]. */
static lla_status number(int argc, char **argv, int *i, size_t *out) {
    LLA_REQUIRE(*i + 1 < argc, LLA_EINVAL, "%s needs a number", argv[*i]);
    char *end;
    const char *text = argv[++*i];
    const unsigned long long value = strtoull(text, &end, 10);
    LLA_REQUIRE(*text >= '0' && *text <= '9' && !*end && value > 0 && value < 1u << 30, LLA_EINVAL,
                "%s %s: expected a positive number", argv[*i - 1], text);
    *out = (size_t)value;
    return LLA_OK;
}

static lla_status parse(int argc, char **argv, struct options *o) {
    size_t threads = 0;
    for (int i = 1; i < argc; i++) {
        const char *a = argv[i];
        struct {
            const char *name;
            size_t *value;
        } numbers[] = {{"--batch", &o->batch},   {"--context", &o->context},     {"--new", &o->tokens},
                       {"--repeat", &o->repeat}, {"--prefill-chunk", &o->chunk}, {"--threads", &threads}};
        struct {
            const char *name;
            const char **value;
        } texts[] = {{"--model", &o->model}, {"--shape", &o->shape}, {"--device", &o->device}, {"--trace", &o->trace}};
        size_t n = 0, t = 0;
        while (n < 6 && strcmp(a, numbers[n].name)) n++;
        while (t < 4 && strcmp(a, texts[t].name)) t++;
        if (n < 6) {
            LLA_TRY(number(argc, argv, &i, numbers[n].value));
        } else if (t < 4) {
            LLA_REQUIRE(i + 1 < argc, LLA_EINVAL, "%s needs a value", a);
            *texts[t].value = argv[++i];
        } else if (!strcmp(a, "--json")) {
            o->json = true;
        } else if (!strcmp(a, "--ablate")) {
            o->ablate = true;
        } else {
            return lla_fail(LLA_EINVAL, "unknown option %s; see --help", a);
        }
    }
    LLA_REQUIRE(!o->model || !o->shape, LLA_EINVAL, "--model and --shape exclude each other");
    o->is_cuda = !strcmp(o->device, "nvidia");
    LLA_REQUIRE(o->is_cuda || !strcmp(o->device, "cpu"), LLA_EINVAL, "--device %s: expected cpu or nvidia", o->device);
#ifndef LLA_STEP_TRACE
    LLA_REQUIRE(!o->trace, LLA_EINVAL, "--trace: this build's kernels note no times: meson setup -Dstep_trace=true");
#endif
    LLA_REQUIRE(!o->trace || o->is_cuda, LLA_EINVAL, "--trace needs --device nvidia");
    if (!o->model && !o->shape) o->shape = "deepseek-r1-distill-qwen-1.5b";
    o->nthread = (int)threads;
    return LLA_OK;
}

int main(int argc, char **argv) {
    if (argc > 1 && !strcmp(argv[1], "serve")) return bench_serve(argc - 1, argv + 1);
    for (int i = 1; i < argc; i++)
        if (!strcmp(argv[i], "--help")) {
            usage(stdout);
            return 0;
        }
    struct options options = {.device = "cpu", .batch = 1, .context = 128, .tokens = 64, .repeat = 3};
    struct report report = {.isa = lla_cpu_isa_name()};
    struct lla_runner runner = {0};
    lla_status status = parse(argc, argv, &options);
    if (!status) status = open_model(&options, &runner, &report);
    if (!status) status = measure(&runner, &options, &report);
    if (status)
        fprintf(stderr, "llaisys-bench: error: %s\n", lla_last_error());
    else
        (options.json ? print_json : print_text)(&options, &report, (int)lla_crew_size(runner.crew));
    lla_runner_destroy(&runner);
    return status ? 1 : 0;
}
