/* serve_report.c: a served workload as text, as JSON and as a picture. */
#include "serve.h"

#include "../planner/render.h"

#include <errno.h>
#include <stdio.h>

static double ratio(double a, double b) {
    return b > 0 ? a / b : 0;
}

static double idle_seconds(const struct LlaisysEngineStats *s) {
    return s->device_s > 0 ? s->host_s + s->step_s - s->device_s : s->host_s;
}

/* Of the time in which there was work, what the device spent without a step. A GPU's own clock says what it spent in
 * steps, so that copies of a step's inputs and results count as idle. */
static double idle_share(const struct LlaisysEngineStats *s) {
    return ratio(idle_seconds(s), s->host_s + s->step_s);
}

static void print_spread(const char *name, const struct serve_spread *s) {
    printf("%s  p50 %9.2f ms   p90 %9.2f ms   p99 %9.2f ms   max %9.2f ms\n", name, 1e3 * s->p50, 1e3 * s->p90,
           1e3 * s->p99, 1e3 * s->max);
}

void serve_print_text(const struct serve_options *o, const struct serve_report *r) {
    const struct LlaisysEngineStats *s = &r->stats;
    printf("%s  %s, workload %s: %zu requests, %zu tokens in, %zu out\n", r->name, o->device, o->workload, o->requests,
           r->input, r->output);
    printf("engine    at most %zu at once, %zu KV blocks of %zu tokens, mixed steps of at most %zu rows\n", s->max_seqs,
           s->kv_blocks, s->kv_block, o->mixed_rows);
    printf("speed     %.1f output tokens/s, %.1f tokens/s in all, %.2f requests/s, %.3f s\n",
           ratio((double)r->output, r->wall), ratio((double)(r->input + r->output), r->wall),
           ratio((double)o->requests, r->wall), r->wall);
    print_spread("TTFT    ", &r->ttft);
    print_spread("token   ", &r->gap);
    print_spread("request ", &r->whole);
    printf("steps     %llu of %.3f ms and %.1f rows on average, at most %zu requests at once\n",
           (unsigned long long)s->steps, ratio(1e3 * s->step_s, (double)s->steps),
           ratio((double)s->rows, (double)s->steps), r->most_running);
    printf("host      %.1f us between steps (%.1f us of a core)\n", ratio(1e6 * s->host_s, (double)s->steps),
           ratio(1e6 * s->host_cpu_s, (double)s->steps));
    printf("device    idle for %.1f us a step, %.2f%% of the time with work\n",
           ratio(1e6 * idle_seconds(s), (double)s->steps), 100 * idle_share(s));
    printf("cache     %.1f%% of %llu prompt tokens found, %llu preemptions, %llu evictions, queue full %zu times\n",
           100 * ratio((double)s->cached_tokens, (double)s->prompt_tokens), (unsigned long long)s->prompt_tokens,
           (unsigned long long)s->preemptions, (unsigned long long)s->evictions, r->refused);
    printf("hash      %016llx\n", (unsigned long long)r->hash);
}

static void json_spread(const char *name, const struct serve_spread *s) {
    printf(" \"%s\": {\"mean\": %.4f, \"p50\": %.4f, \"p90\": %.4f, \"p99\": %.4f, \"max\": %.4f},\n", name,
           1e3 * s->mean, 1e3 * s->p50, 1e3 * s->p90, 1e3 * s->p99, 1e3 * s->max);
}

void serve_print_json(const struct serve_options *o, const struct serve_report *r) {
    const struct LlaisysEngineStats *s = &r->stats;
    printf("{\"model\": \"%s\", \"device\": \"%s\", \"workload\": \"%s\", \"requests\": %zu, \"input_tokens\": %zu, "
           "\"output_tokens\": %zu, \"wall_s\": %.6f,\n",
           r->name, o->device, o->workload, o->requests, r->input, r->output, r->wall);
    printf(" \"max_seqs\": %zu, \"kv_blocks\": %zu, \"kv_block\": %zu, \"mixed_rows\": %zu,\n", s->max_seqs,
           s->kv_blocks, s->kv_block, o->mixed_rows);
    printf(" \"output_tokens_per_s\": %.3f, \"tokens_per_s\": %.3f, \"requests_per_s\": %.4f,\n",
           ratio((double)r->output, r->wall), ratio((double)(r->input + r->output), r->wall),
           ratio((double)o->requests, r->wall));
    json_spread("ttft_ms", &r->ttft);
    json_spread("inter_token_ms", &r->gap);
    json_spread("request_ms", &r->whole);
    printf(" \"steps\": %llu, \"step_ms\": %.4f, \"rows_per_step\": %.2f, \"most_running\": %zu,\n",
           (unsigned long long)s->steps, ratio(1e3 * s->step_s, (double)s->steps),
           ratio((double)s->rows, (double)s->steps), r->most_running);
    printf(" \"host_us_per_step\": %.3f, \"host_cpu_us_per_step\": %.3f, \"device_idle_us_per_step\": %.3f, "
           "\"idle_share\": %.6f,\n",
           ratio(1e6 * s->host_s, (double)s->steps), ratio(1e6 * s->host_cpu_s, (double)s->steps),
           ratio(1e6 * idle_seconds(s), (double)s->steps), idle_share(s));
    printf(" \"cache_hit_rate\": %.4f, \"cached_tokens\": %llu, \"preemptions\": %llu, \"evictions\": %llu, "
           "\"queue_full\": %zu,\n",
           ratio((double)s->cached_tokens, (double)s->prompt_tokens), (unsigned long long)s->cached_tokens,
           (unsigned long long)s->preemptions, (unsigned long long)s->evictions, r->refused);
    printf(" \"hash\": \"%016llx\"}\n", (unsigned long long)r->hash);
}

/* ---- the picture ---- */

enum { PANEL = 150, GAP = 70, TOP = 90 };

/* A panel of bars, one a bucket, under a title that states the largest value. */
static void panel(FILE *out, double y, const char *title, const char *unit, const double *values, const char *fill,
                  double wall) {
    char text[128];
    double most = 0;
    for (size_t i = 0; i < SERVE_BUCKETS; i++) most = values[i] > most ? values[i] : most;
    snprintf(text, sizeof text, "at most %.0f %s", most, unit);
    lla_svg_heading(out, y, title, text);
    const double base = y + 16 + PANEL, width = (double)(SVG_RIGHT - SVG_LEFT) / SERVE_BUCKETS;
    for (size_t i = 0; i < SERVE_BUCKETS; i++) {
        const double height = most > 0 ? PANEL * values[i] / most : 0;
        snprintf(text, sizeof text, "%.2f s: %.1f %s", wall * ((double)i + 0.5) / SERVE_BUCKETS, values[i], unit);
        if (height > 0)
            lla_svg_box(out, SVG_LEFT + width * (double)i, base - height, width * 0.86, height, 0, fill, "", text);
    }
    lla_svg_line(out, SVG_LEFT, base, SVG_RIGHT, base, SVG_FAINT, "");
    lla_svg_label(out, SVG_LEFT, base + 16, 12, SVG_START, SVG_FAINT, false, "0 s");
    snprintf(text, sizeof text, "%.2f s", wall);
    lla_svg_label(out, SVG_RIGHT, base + 16, 12, SVG_END, SVG_FAINT, false, text);
}

lla_status serve_draw(const struct serve_options *o, const struct serve_report *r, const char *path) {
    FILE *out = fopen(path, "w");
    LLA_REQUIRE(out, LLA_EIO, "%s: %s", path, strerror(errno));
    const int height = TOP + 4 * (PANEL + GAP);
    fprintf(out,
            "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 %d %d\" font-family=\"sans-serif\">\n"
            "<rect width=\"%d\" height=\"%d\" fill=\"%s\"/>\n",
            SVG_PAGE, height, SVG_PAGE, height, SVG_PAPER);
    char text[256];
    snprintf(text, sizeof text, "%s on %s, workload %s", r->name, o->device, o->workload);
    lla_svg_label(out, SVG_LEFT, 36, 20, SVG_START, SVG_INK, true, text);
    snprintf(text, sizeof text,
             "%zu requests, %zu tokens in, %zu out in %.2f s: %.1f output tokens/s, TTFT p50 %.1f ms", o->requests,
             r->input, r->output, r->wall, ratio((double)r->output, r->wall), 1e3 * r->ttft.p50);
    lla_svg_label(out, SVG_LEFT, 58, 13, SVG_START, SVG_FAINT, false, text);
    double y = TOP;
    panel(out, y, "Output tokens", "tokens/s", r->tokens, "#3f6fbf", r->wall);
    panel(out, y += PANEL + GAP, "Running", "requests", r->running, "#1f8a80", r->wall);
    panel(out, y += PANEL + GAP, "Waiting", "requests", r->waiting, "#eab04a", r->wall);
    panel(out, y += PANEL + GAP, "KV blocks in use", "blocks", r->kv, "#8b6fc4", r->wall);
    fprintf(out, "</svg>\n");
    LLA_REQUIRE(!fclose(out), LLA_EIO, "%s: %s", path, strerror(errno));
    return LLA_OK;
}
