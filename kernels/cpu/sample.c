/* sample.c: the next token of each logit row: greedy, or drawn from the top-k, top-p part of softmax(logits /
 * temperature). */
#include "isa.h"

#include <math.h>

/* Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC11): the first word for a key and a
 * counter. */
static uint32_t philox(uint64_t key, uint64_t counter) {
    uint32_t c0 = (uint32_t)counter, c1 = (uint32_t)(counter >> 32), c2 = 0, c3 = 0;
    uint32_t k0 = (uint32_t)key, k1 = (uint32_t)(key >> 32);
    for (int round = 0; round < 10; round++) {
        const uint64_t p0 = (uint64_t)0xD2511F53u * c0, p1 = (uint64_t)0xCD9E8D57u * c2;
        const uint32_t n0 = (uint32_t)(p1 >> 32) ^ c1 ^ k0, n2 = (uint32_t)(p0 >> 32) ^ c3 ^ k1;
        c1 = (uint32_t)p1;
        c3 = (uint32_t)p0;
        c0 = n0;
        c2 = n2;
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    return c0;
}

/* Larger values first; of equal ones, the smaller token. */
static int descending(const void *a, const void *b) {
    const struct lla_candidate *x = a, *y = b;
    if (x->value != y->value) return x->value > y->value ? -1 : 1;
    return (x->token > y->token) - (x->token < y->token);
}

/* Sifts candidate i of a heap of n down; the heap's root is the worst. */
static void sift(struct lla_candidate *heap, size_t n, size_t i) {
    for (size_t child; (child = 2 * i + 1) < n; i = child) {
        if (child + 1 < n && descending(&heap[child + 1], &heap[child]) > 0) child++;
        if (descending(&heap[i], &heap[child]) > 0) return;
        struct lla_candidate t = heap[i];
        heap[i] = heap[child];
        heap[child] = t;
    }
}

int32_t lla_cpu_draw(llaisysDataType_t dtype, size_t n, const void *logits, const struct lla_sampling_row *s,
                     struct lla_candidate *c) {
    size_t k = s->top_k > 0 && (size_t)s->top_k < n ? (size_t)s->top_k : n;
    /* the k best, by a heap whose root is the worst of them */
    for (size_t i = 0; i < n; i++) {
        struct lla_candidate x = {lla_load_float(logits, i, dtype) / s->temperature, (int32_t)i};
        if (i < k) {
            c[i] = x;
            if (i + 1 == k)
                for (size_t j = k / 2; j-- > 0;) sift(c, k, j);
        } else if (descending(&x, &c[0]) < 0) {
            c[0] = x;
            sift(c, k, 0);
        }
    }
    /* heap sort: the C library's qsort would allocate */
    for (size_t end = k; end-- > 1;) {
        struct lla_candidate worst = c[0];
        c[0] = c[end];
        c[end] = worst;
        sift(c, end, 0);
    }
    const float top = c[0].value;
    double sum = 0;
    for (size_t i = 0; i < k; i++) {
        c[i].value = expf(c[i].value - top);
        sum += c[i].value;
    }
    /* the smallest prefix that reaches top_p of the mass; at least one */
    double mass = 0;
    size_t kept = 0;
    while (kept < k && (kept == 0 || s->top_p >= 1 || mass < s->top_p * sum)) mass += c[kept++].value;
    double target = philox(s->seed, (uint64_t)(uint32_t)s->position) * 0x1p-32 * mass;
    for (size_t i = 0; i < kept; i++) {
        target -= c[i].value;
        if (target < 0) return c[i].token;
    }
    return c[kept - 1].token;
}

void lla_cpu_sample(const struct lla_ctx *ctx, const struct lla_sample_args *args, struct lla_team team) {
    const struct lla_dims *d = ctx->dims;
    const size_t rows = (size_t)((const struct lla_step_header *)(ctx->arena + ctx->io->header))->nlogit;
    const struct lla_sampling_row *sampling = (const struct lla_sampling_row *)(ctx->arena + ctx->io->sampling);
    int32_t *next = (int32_t *)(ctx->arena + ctx->io->next);
    size_t lo, hi;
    lla_share(rows, 1, team, &lo, &hi);
    for (size_t r = lo; r < hi; r++) {
        const void *logits = ctx->arena + args->logits + r * d->vocab * lla_dtype_size(d->dtype);
        struct lla_candidate *candidates = (struct lla_candidate *)(ctx->arena + args->candidates) + r * d->vocab;
        if (lla_is_greedy(&sampling[r]))
            next[r] = (int32_t)lla_isa()->argmax(d->dtype, d->vocab, logits);
        else
            next[r] = lla_cpu_draw(d->dtype, d->vocab, logits, &sampling[r], candidates);
    }
}
