#include "load.h"

#include <stdio.h>
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

static lla_status load_part(const struct lla_weight *w, const struct lla_weight_part *p, llaisysDataType_t dtype,
                            const struct lla_checkpoint *checkpoint, char *arena) {
    const struct lla_st_tensor *t = lla_checkpoint_find(checkpoint, p->name);
    LLA_REQUIRE(t, LLA_EFORMAT, "tensor '%s' is not in the checkpoint", p->name);
    const size_t want[2] = {p->full_rows, p->full_cols};
    if (t->ndim != p->ndim || t->shape[0] != want[0] || (p->ndim == 2 && t->shape[1] != want[1])) {
        char expected[64], found[256];
        return lla_fail(LLA_EFORMAT, "%s: tensor '%s': config.json asks for shape %s, found %s", t->file, p->name,
                        shape_text(want, p->ndim, expected, sizeof expected), shape_text(t->shape, t->ndim, found, sizeof found));
    }
    LLA_REQUIRE(lla_dtype_is_compute(t->dtype), LLA_EFORMAT, "%s: tensor '%s': dtype is %s, expected bf16, f16 or f32", t->file,
                p->name, lla_dtype_name(t->dtype));

    const size_t from = lla_dtype_size(t->dtype), to = lla_dtype_size(dtype);
    char *dst = arena + w->offset + p->dst_row * w->cols * to;
    const char *src = (const char *)t->data + (p->row0 * p->full_cols + p->col0) * from;
    if (p->cols == p->full_cols) { /* whole rows: pieces of a megabyte, so that all threads fault pages in */
        const size_t count = p->rows * p->cols, piece = 1 << 19;
#pragma omp parallel for schedule(dynamic)
        for (size_t i = 0; i < count; i += piece)
            convert(dst + i * to, dtype, src + i * from, t->dtype, count - i < piece ? count - i : piece);
    } else {
#pragma omp parallel for
        for (size_t r = 0; r < p->rows; r++)
            convert(dst + r * p->cols * to, dtype, src + r * p->full_cols * from, t->dtype, p->cols);
    }
    return LLA_OK;
}

lla_status lla_load_weights(const struct lla_plan *plan, const struct lla_checkpoint *checkpoint, char *arena,
                            lla_progress progress) {
    size_t done = 0;
    for (size_t i = 0; i < plan->nweight; i++) {
        const struct lla_weight *w = &plan->weights[i];
        if (w->kind == LLA_W_HEAD && plan->spec.tied) continue; /* lies in the embedding table */
        for (size_t j = 0; j < w->nparts; j++)
            LLA_TRY(load_part(w, &w->parts[j], plan->spec.dtype, checkpoint, arena));
        done += w->nbytes;
        if (progress) progress(done, plan->weight_bytes);
    }
    return LLA_OK;
}

void lla_progress_bar(size_t done_bytes, size_t total_bytes) {
    enum { WIDTH = 40 };
    if (!isatty(STDERR_FILENO)) return;
    const size_t filled = done_bytes * WIDTH / total_bytes;
    static const char bar[WIDTH + 1] = "########################################";
    fprintf(stderr, "\rloading  [%.*s%*s] %4zu / %zu MiB", (int)filled, bar, (int)(WIDTH - filled), "", done_bytes >> 20,
            total_bytes >> 20);
    /* regions are aligned, so that the last weight may end a few bytes short of the total */
    if (total_bytes - done_bytes < (size_t)LLA_ALIGN * 4096 && done_bytes * 1000 > total_bytes * 999) fprintf(stderr, "\r\033[K");
}
