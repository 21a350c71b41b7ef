/* attention.c: softmax(scale q k^T) v of one KV head, over KV blocks.
 *
 * Positions are cut into splits of LLA_ATTN_SPLIT tokens from position 0. Within a split: all scores, their maximum,
 * exponentials, sum, and the unnormalised output, each in order of position; splits are merged in order. Rows are taken
 * a few at a time so that keys and values are loaded once for all query heads of a group and several rows; a row's own
 * numbers do not depend on its tile: positions beyond a row's own get weight zero, and adding zero changes nothing. */
#include "simd.h"

enum {
    TILE_Q = 24,
    MAX_VDIM = 1024
}; /* queries (rows times heads) of a tile; one row of a larger group is split by heads */

struct tile {
    size_t nq;            /* queries in the tile */
    size_t limit[TILE_Q]; /* positions that query may see */
    const void *q[TILE_Q];
    float score[TILE_Q][LLA_ATTN_SPLIT + 16]; /* 16 beyond: whole vectors may be stored */
};

INLINE const void *k_at(const struct lla_attention *a, size_t position, const int dt) {
    return at(a->k,
              (size_t)a->table[position >> a->kv_shift] * a->k_block_stride +
                  (position & (((size_t)1 << a->kv_shift) - 1)) * a->k_token_stride,
              dt);
}
INLINE const void *v_at(const struct lla_attention *a, size_t position, const int dt) {
    return at(a->v,
              (size_t)a->table[position >> a->kv_shift] * a->v_block_stride +
                  (position & (((size_t)1 << a->kv_shift) - 1)) * a->v_token_stride,
              dt);
}

/* out[j] = q . k_j for N keys */
INLINE void dots(const int M, const int dt, const void *const *q, const void *const *k, size_t dim, float out[][4]) {
    vf sum[16];
    UNROLL for (int i = 0; i < 4 * M; i++) sum[i] = vf_zero();
    size_t i = 0;
#if defined(__AVX512BF16__)
    if (dt == BF16)
        for (; i < dim; i += 32) {
            const __mmask32 mask = dim - i < 32 ? ((__mmask32)1 << (dim - i)) - 1 : ~(__mmask32)0;
            __m512bh kv[4];
            UNROLL for (int n = 0; n < 4; n++) kv[n] =
                (__m512bh)_mm512_maskz_loadu_epi16(mask, (const uint16_t *)k[n] + i);
            UNROLL for (int m = 0; m < M; m++) {
                __m512bh qv = (__m512bh)_mm512_maskz_loadu_epi16(mask, (const uint16_t *)q[m] + i);
                UNROLL for (int n = 0; n < 4; n++) sum[m * 4 + n] = _mm512_dpbf16_ps(sum[m * 4 + n], qv, kv[n]);
            }
        }
#endif
    for (; i < dim; i += W) {
        const size_t len = dim - i < W ? dim - i : W;
        vf kv[4];
        UNROLL for (int n = 0; n < 4; n++) kv[n] = vf_load_n(k[n], i, len, dt);
        UNROLL for (int m = 0; m < M; m++) {
            vf qv = vf_load_n(q[m], i, len, dt);
            UNROLL for (int n = 0; n < 4; n++) sum[m * 4 + n] = vf_fma(qv, kv[n], sum[m * 4 + n]);
        }
    }
    UNROLL for (int m = 0; m < M; m++) {
        __typeof__(vf_sum4(sum[0], sum[0], sum[0], sum[0])) s =
            vf_sum4(sum[m * 4], sum[m * 4 + 1], sum[m * 4 + 2], sum[m * 4 + 3]);
        UNROLL for (int n = 0; n < 4; n++) out[m][n] = s[n];
    }
}

/* score[q][j] = scale * q . k_(start + j) for j < count, every query of the tile. */
INLINE void scores(const int dt, const struct lla_attention *a, struct tile *t, size_t start, size_t count) {
    for (size_t j = 0; j < count; j += 4) {
        const void *k[4];
        for (size_t n = 0; n < 4; n++) k[n] = k_at(a, start + (j + n < count ? j + n : count - 1), dt);
        float s[4][4];
        for (size_t i = 0; i < t->nq; i += 4) {
            const size_t m = t->nq - i < 4 ? t->nq - i : 4;
            switch (m) {
            case 1:
                dots(1, dt, t->q + i, k, a->dim, s);
                break;
            case 2:
                dots(2, dt, t->q + i, k, a->dim, s);
                break;
            case 3:
                dots(3, dt, t->q + i, k, a->dim, s);
                break;
            default:
                dots(4, dt, t->q + i, k, a->dim, s);
                break;
            }
            for (size_t l = 0; l < m; l++)
                for (size_t n = 0; n < 4; n++) t->score[i + l][j + n] = a->scale * s[l][n];
        }
    }
}

/* Scores of one query become weights e^(s - max); those from `limit` to `count` become zero. */
INLINE void soften(float *score, size_t limit, size_t count, float *max, float *sum) {
    vf top = vf_set(-INFINITY), total = vf_zero();
    size_t j = 0;
    for (; j + W <= limit; j += W) top = vf_max(top, vf_load(score, j, F32));
    float m = vf_hmax(top);
    for (; j < limit; j++) m = score[j] > m ? score[j] : m;
    for (j = 0; j < count; j += W) {
        const size_t len = limit <= j ? 0 : limit - j < W ? limit - j : W;
        if (len < W) { /* clear the lanes that do not count, before and after the exponential */
            for (size_t l = len; l < W; l++) score[j + l] = m;
        }
        vf e = vf_exp(vf_sub(vf_load(score, j, F32), vf_set(m)));
        vf_store(score, j, e, F32);
        if (len < W) {
            for (size_t l = len; l < W; l++) score[j + l] = 0;
            e = vf_load(score, j, F32);
        }
        total = vf_add(total, e);
    }
    *max = m;
    *sum = vf_sum(total);
}

/* out[m][0 .. N*W) = sum over j of score[m][j] * v_j, from column c; the last vector may be partial. */
INLINE void mix(const int M, const int N, const int dt, const struct lla_attention *a,
                float (*score)[LLA_ATTN_SPLIT + 16], size_t start, size_t count, size_t c, float *const *out) {
    vf sum[16];
    UNROLL for (int i = 0; i < M * N; i++) sum[i] = vf_zero();
    const size_t tail = a->vdim - c < (size_t)N * W ? a->vdim - c - (N - 1) * W : W;
    for (size_t j = 0; j < count; j++) {
        const void *v = v_at(a, start + j, dt);
        UNROLL for (int n = 0; n < N; n++) {
            vf x = n == N - 1 && tail < W ? vf_load_n(v, c + n * W, tail, dt) : vf_load(v, c + n * W, dt);
            UNROLL for (int m = 0; m < M; m++) sum[m * N + n] = vf_fma(vf_set(score[m][j]), x, sum[m * N + n]);
        }
    }
    UNROLL for (int m = 0; m < M; m++) UNROLL for (int n = 0; n < N; n++)
        vf_store_n(out[m], c + n * W, n == N - 1 ? tail : W, sum[m * N + n], F32);
}

INLINE void mix_rows(const int M, const int dt, const struct lla_attention *a, float (*score)[LLA_ATTN_SPLIT + 16],
                     size_t start, size_t count, float *const *out) {
    size_t c = 0;
    for (; c + 3 * W < a->vdim; c += 4 * W) mix(M, 4, dt, a, score, start, count, c, out);
    for (; c < a->vdim; c += W) mix(M, 1, dt, a, score, start, count, c, out);
}

/* The partial of one split for every query of the tile: part[i] = output [vdim], maximum, sum. Queries that see nothing
 * of it get maximum -inf and sum 0. */
INLINE void split_inline(const int dt, const struct lla_attention *a, struct tile *t, size_t start,
                         float *const *part) {
    size_t end = 0;
    for (size_t i = 0; i < t->nq; i++) end = t->limit[i] > end ? t->limit[i] : end;
    const size_t count = end - start < LLA_ATTN_SPLIT ? end - start : LLA_ATTN_SPLIT;
    scores(dt, a, t, start, count);
    for (size_t i = 0; i < t->nq; i++) {
        const size_t limit = t->limit[i] <= start ? 0 : t->limit[i] - start < count ? t->limit[i] - start : count;
        soften(t->score[i], limit, count, &part[i][a->vdim], &part[i][a->vdim + 1]);
    }
    for (size_t i = 0; i < t->nq; i += 4) {
        switch (t->nq - i) {
        case 1:
            mix_rows(1, dt, a, t->score + i, start, count, part + i);
            break;
        case 2:
            mix_rows(2, dt, a, t->score + i, start, count, part + i);
            break;
        case 3:
            mix_rows(3, dt, a, t->score + i, start, count, part + i);
            break;
        default:
            mix_rows(4, dt, a, t->score + i, start, count, part + i);
            break;
        }
    }
}

/* The same as functions, one a dtype. */
#define SPLIT(dt)                                                                                                      \
    static void split_##dt(const struct lla_attention *a, struct tile *t, size_t start, float *const *part) {          \
        split_inline(dt, a, t, start, part);                                                                           \
    }
SPLIT(BF16)
SPLIT(F16)
SPLIT(F32)

static void split(const struct lla_attention *a, struct tile *t, size_t start, float *const *part) {
    if (a->dtype == LLAISYS_DTYPE_BF16)
        split_BF16(a, t, start, part);
    else if (a->dtype == LLAISYS_DTYPE_F16)
        split_F16(a, t, start, part);
    else
        split_F32(a, t, start, part);
}

/* acc (output, maximum, sum) takes in the partial of the next split. */
INLINE void merge(size_t vdim, float *acc, const float *part) {
    if (part[vdim + 1] == 0) return; /* nothing seen */
    const float m = acc[vdim] > part[vdim] ? acc[vdim] : part[vdim];
    const float a = expf(acc[vdim] - m), b = expf(part[vdim] - m);
    for (size_t c = 0; c < vdim; c += W) {
        const size_t len = vdim - c < W ? vdim - c : W;
        vf_store_n(acc, c, len,
                   vf_fma(vf_load_n(acc, c, len, F32), vf_set(a), vf_mul(vf_load_n(part, c, len, F32), vf_set(b))),
                   F32);
    }
    acc[vdim] = m;
    acc[vdim + 1] = acc[vdim + 1] * a + part[vdim + 1] * b;
}

INLINE void finish(const int dt, size_t vdim, const float *acc, void *out) {
    const vf sum = vf_set(acc[vdim + 1]);
    for (size_t c = 0; c < vdim; c += W) {
        const size_t len = vdim - c < W ? vdim - c : W;
        vf_store_n(out, c, len, vf_div(vf_load_n(acc, c, len, F32), sum), dt);
    }
}

/* Queries [q0, q0 + nq) of all rows times heads, row-major, into the tile. */
INLINE void gather(const int dt, const struct lla_attention *a, size_t q0, size_t nq, struct tile *t) {
    t->nq = nq;
    for (size_t i = 0; i < nq; i++) {
        const size_t row = (q0 + i) / a->group, head = (q0 + i) % a->group;
        t->limit[i] = a->position0 + row + 1;
        t->q[i] = at(a->q, row * a->q_stride + head * a->dim, dt);
    }
}

INLINE void attention(const int dt, const struct lla_attention *a) {
    struct tile t;
    float acc[TILE_Q * (MAX_VDIM + 2)], part[TILE_Q * (MAX_VDIM + 2)];
    float *accs[TILE_Q], *parts[TILE_Q];
    for (size_t i = 0; i < TILE_Q; i++) accs[i] = acc + i * (a->vdim + 2), parts[i] = part + i * (a->vdim + 2);
    const size_t total = a->nrow * a->group;
    for (size_t q0 = 0; q0 < total; q0 += TILE_Q) {
        gather(dt, a, q0, total - q0 < TILE_Q ? total - q0 : TILE_Q, &t);
        const size_t end = t.limit[t.nq - 1];
        split(a, &t, 0, accs);
        for (size_t start = LLA_ATTN_SPLIT; start < end; start += LLA_ATTN_SPLIT) {
            split(a, &t, start, parts);
            for (size_t i = 0; i < t.nq; i++) merge(a->vdim, accs[i], parts[i]);
        }
        for (size_t i = 0; i < t.nq; i++) {
            const size_t row = (q0 + i) / a->group, head = (q0 + i) % a->group;
            finish(dt, a->vdim, accs[i], at_mut(a->out, row * a->out_stride + head * a->vdim, dt));
        }
    }
}

void LLA_FN(lla_attention)(const struct lla_attention *a) {
    LLA_BY_DTYPE(a->dtype, attention(dt, a));
}

INLINE void attention_split(const int dt, const struct lla_attention *a, size_t index, float *partial) {
    struct tile t;
    for (size_t q0 = 0; q0 < a->group; q0 += TILE_Q) {
        gather(dt, a, q0, a->group - q0 < TILE_Q ? a->group - q0 : TILE_Q, &t);
        float *parts[TILE_Q];
        for (size_t i = 0; i < t.nq; i++) parts[i] = partial + (q0 + i) * (a->vdim + 2);
        split(a, &t, index * LLA_ATTN_SPLIT, parts);
    }
}

void LLA_FN(lla_attention_split)(const struct lla_attention *a, size_t index, float *partial) {
    LLA_BY_DTYPE(a->dtype, attention_split(dt, a, index, partial));
}

void LLA_FN(lla_attention_merge)(const struct lla_attention *a, size_t nsplit, const float *partial, size_t stride) {
    float acc[MAX_VDIM + 2];
    for (size_t head = 0; head < a->group; head++) {
        const float *part = partial + head * (a->vdim + 2);
        memcpy(acc, part, (a->vdim + 2) * sizeof *acc);
        for (size_t s = 1; s < nsplit; s++) merge(a->vdim, acc, part + s * stride);
        LLA_BY_DTYPE(a->dtype, finish(dt, a->vdim, acc, at_mut(a->out, head * a->vdim, dt)));
    }
}
