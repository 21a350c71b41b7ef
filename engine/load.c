#include "load.h"

#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

/* dst [n] of dtype `to` from src [n] of dtype `from`; src may be unaligned. */
static void convert(void *dst, llaisysDataType_t to, const char *src, llaisysDataType_t from, size_t n) {
    if (to == from) {
        memcpy(dst, src, n * lla_dtype_size(from));
        return;
    }
    for (size_t i = 0; i < n; i++) lla_store_float(dst, i, lla_load_float(src, i, from), to);
}

static const char *shape_text(const size_t *shape, size_t ndim, char *text, size_t size) {
    size_t at = (size_t)snprintf(text, size, "[");
    for (size_t i = 0; i < ndim && at < size; i++)
        at += (size_t)snprintf(text + at, size - at, i ? ", %zu" : "%zu", shape[i]);
    if (at < size) snprintf(text + at, size - at, "]");
    return text;
}

/* Rows [r0, r1) of the part, dense, converted to the model's dtype, by all cores. */
static void convert_rows(const struct lla_weight_part *p, const struct lla_st_tensor *t, llaisysDataType_t dtype,
                         size_t r0, size_t r1, char *dst) {
    const size_t from = lla_dtype_size(t->dtype), to = lla_dtype_size(dtype);
    const char *src = (const char *)t->data + ((p->row0 + r0) * p->full_cols + p->col0) * from;
    if (p->cols == p->full_cols) { /* whole rows: pieces of a megabyte, so that all threads fault pages in */
        const size_t count = (r1 - r0) * p->cols, piece = 1 << 19;
#pragma omp parallel for schedule(dynamic)
        for (size_t i = 0; i < count; i += piece)
            convert(dst + i * to, dtype, src + i * from, t->dtype, count - i < piece ? count - i : piece);
    } else {
#pragma omp parallel for
        for (size_t r = 0; r < r1 - r0; r++)
            convert(dst + r * p->cols * to, dtype, src + r * p->full_cols * from, t->dtype, p->cols);
    }
}

static lla_status load_part(struct lla_runner *runner, const struct lla_weight *w, const struct lla_weight_part *p,
                            const struct lla_checkpoint *checkpoint, char *staging, size_t staging_bytes) {
    const llaisysDataType_t dtype = runner->graph.plan.spec.dtype;
    const struct lla_st_tensor *t = lla_checkpoint_find(checkpoint, p->name);
    LLA_REQUIRE(t, LLA_EFORMAT, "tensor '%s' is not in the checkpoint", p->name);
    const size_t want[2] = {p->full_rows, p->full_cols};
    if (t->ndim != p->ndim || t->shape[0] != want[0] || (p->ndim == 2 && t->shape[1] != want[1])) {
        char expected[64], found[256];
        return lla_fail(LLA_EFORMAT, "%s: tensor '%s': config.json asks for shape %s, found %s", t->file, p->name,
                        shape_text(want, p->ndim, expected, sizeof expected),
                        shape_text(t->shape, t->ndim, found, sizeof found));
    }
    LLA_REQUIRE(lla_dtype_is_compute(t->dtype), LLA_EFORMAT, "%s: tensor '%s': dtype is %s, expected bf16, f16 or f32",
                t->file, p->name, lla_dtype_name(t->dtype));
    const size_t row_bytes = w->cols * lla_dtype_size(dtype);
    if (!staging) { /* host memory: converted where it belongs */
        convert_rows(p, t, dtype, 0, p->rows, runner->arena + w->offset + p->dst_row * row_bytes);
        return LLA_OK;
    }
    const size_t most = staging_bytes / row_bytes;
    for (size_t r = 0, n; r < p->rows; r += n) {
        n = p->rows - r < most ? p->rows - r : most;
        convert_rows(p, t, dtype, r, r + n, staging);
        LLA_TRY(lla_runner_store(runner, w, p->dst_row + r, n, staging));
    }
    return LLA_OK;
}

lla_status lla_load_weights(struct lla_runner *runner, const struct lla_checkpoint *checkpoint, lla_progress progress) {
    enum { STAGING = 32 << 20 };
    const struct lla_plan *plan = &runner->graph.plan;
    char *staging = NULL;
    if (!runner->arena) {
        staging = malloc(STAGING);
        LLA_REQUIRE(staging, LLA_ENOMEM, "no memory to stage weights");
    }
    lla_status status = LLA_OK;
    size_t done = 0;
    for (size_t i = 0; i < plan->nweight; i++) {
        const struct lla_weight *w = &plan->weights[i];
        if (w->kind == LLA_W_HEAD && plan->spec.tied) continue; /* lies in the embedding table */
        for (size_t j = 0; j < w->nparts; j++)
            LLA_TRY_GOTO(status, load_part(runner, w, &w->parts[j], checkpoint, staging, STAGING), out);
        done += w->nbytes;
        if (progress) progress(done, plan->weight_bytes);
    }
out:
    free(staging);
    return status;
}

void lla_progress_bar(size_t done_bytes, size_t total_bytes) {
    enum { WIDTH = 40 };
    if (!isatty(STDERR_FILENO)) return;
    const size_t filled = done_bytes * WIDTH / total_bytes;
    static const char bar[WIDTH + 1] = "########################################";
    fprintf(stderr, "\rloading  [%.*s%*s] %4zu / %zu MiB", (int)filled, bar, (int)(WIDTH - filled), "",
            done_bytes >> 20, total_bytes >> 20);
    /* regions are aligned, so that the last weight may end a few bytes short of the total */
    if (total_bytes - done_bytes < (size_t)LLA_ALIGN * 4096 && done_bytes * 1000 > total_bytes * 999)
        fprintf(stderr, "\r\033[K");
}
