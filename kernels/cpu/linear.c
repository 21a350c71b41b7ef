/* linear.c: out = epilogue(x w^T), the one matrix product of the CPU, for one row and for a thousand.
 *
 * Every output has one accumulator of W lanes (2W products a step with the bf16 dot instruction) that walks its row of
 * K in order; lanes are summed at the end of each K block, and K blocks are added in order. Neither M nor the tile's
 * shape enters, so a row's result is the same alone and in any batch. Rows of x and w are read as they lie: no packing.
 *
 * Few rows (decode) are bound by the stream of weights: 8 rows of w at a time, with the next 8 prefetched line by line
 * in address order, so that memory sees one forward stream. Many rows (prefill) are bound by arithmetic: MR x NR
 * register tiles under a block of NB rows of w and one K block, which stay in the second-level cache, while the x tile
 * stays in the first. */
#include "simd.h"

#if defined(__AVX512F__)
enum { MR = 4, NR = 6 };
#elif defined(__AVX2__)
enum { MR = 3, NR = 4 };
#else
enum { MR = 2, NR = 4 };
#endif
enum { STREAM_NR = 8, NB = 96, MB = 64 }; /* NB is a multiple of every tile width */
enum { MAX_KB = 2048 };                   /* products of a K block: 4 + 6 rows of it fit in 48 KB */

_Static_assert(NB % NR == 0 && NB % STREAM_NR == 0, "a full block must split into whole tiles");

/* Length of a K block: K alone decides. */
INLINE size_t k_block(size_t k) {
    size_t count = (k + MAX_KB - 1) / MAX_KB;
    return count <= 1 ? k : ((k + count - 1) / count + 63) / 64 * 64;
}

/* acc[m * NB + n] += x [M rows, k] . w [N rows, k]; prefetches from `ahead` as many bytes as it reads of w. */
INLINE void tile(const int M, const int N, const int dt, const void *x, size_t ldx, const void *w, size_t ldw, size_t k,
                 float *acc, const char *ahead) {
    vf sum[32];
    UNROLL for (int i = 0; i < M * N; i++) sum[i] = vf_zero();
    size_t i = 0;
#if defined(__AVX512BF16__)
    if (dt == BF16) {
        const uint16_t *xs = x, *ws = w;
        for (; i + 32 <= k; i += 32) {
            __m512bh xv[MR];
            UNROLL for (int m = 0; m < M; m++) xv[m] = (__m512bh)_mm512_loadu_si512(xs + m * ldx + i);
            UNROLL for (int n = 0; n < N; n++) {
                _mm_prefetch(ahead + i * 2 * N + 64 * n, _MM_HINT_T0);
                __m512bh wv = (__m512bh)_mm512_loadu_si512(ws + n * ldw + i);
                UNROLL for (int m = 0; m < M; m++) sum[m * N + n] = _mm512_dpbf16_ps(sum[m * N + n], xv[m], wv);
            }
        }
        if (i < k) {
            const __mmask32 mask = ((__mmask32)1 << (k - i)) - 1;
            __m512bh xv[MR];
            UNROLL for (int m = 0; m < M; m++) xv[m] = (__m512bh)_mm512_maskz_loadu_epi16(mask, xs + m * ldx + i);
            UNROLL for (int n = 0; n < N; n++) {
                __m512bh wv = (__m512bh)_mm512_maskz_loadu_epi16(mask, ws + n * ldw + i);
                UNROLL for (int m = 0; m < M; m++) sum[m * N + n] = _mm512_dpbf16_ps(sum[m * N + n], xv[m], wv);
            }
            i = k;
        }
    }
#endif
    for (; i + W <= k; i += W) {
        vf xv[MR];
        UNROLL for (int m = 0; m < M; m++) xv[m] = vf_load(x, m * ldx + i, dt);
        UNROLL for (int n = 0; n < N; n++) {
            __builtin_prefetch(ahead + (i * N + n * W) * size_of(dt), 0, 3);
            vf wv = vf_load(w, n * ldw + i, dt);
            UNROLL for (int m = 0; m < M; m++) sum[m * N + n] = vf_fma(xv[m], wv, sum[m * N + n]);
        }
    }
    if (i < k) {
        vf xv[MR];
        UNROLL for (int m = 0; m < M; m++) xv[m] = vf_load_n(x, m * ldx + i, k - i, dt);
        UNROLL for (int n = 0; n < N; n++) {
            vf wv = vf_load_n(w, n * ldw + i, k - i, dt);
            UNROLL for (int m = 0; m < M; m++) sum[m * N + n] = vf_fma(xv[m], wv, sum[m * N + n]);
        }
    }
    UNROLL for (int j = 0; j < M * N; j += 4) {
        const vf zero = vf_zero();
        __typeof__(vf_sum4(zero, zero, zero, zero)) s =
            vf_sum4(sum[j], j + 1 < M * N ? sum[j + 1] : zero, j + 2 < M * N ? sum[j + 2] : zero,
                    j + 3 < M * N ? sum[j + 3] : zero);
        UNROLL for (int l = 0; l < 4; l++) if (j + l < M * N) acc[(j + l) / N * NB + (j + l) % N] += s[l];
    }
}

/* The tiles as functions: one for each dtype, number of rows of x (1 .. MR) and of w. */
typedef void tile_fn(const void *x, size_t ldx, const void *w, size_t ldw, size_t k, float *acc, const char *ahead);

#define TILE(dt, M, N)                                                                                                 \
    static void tile_##dt##_##M##x##N(const void *x, size_t ldx, const void *w, size_t ldw, size_t k, float *acc,      \
                                      const char *ahead) {                                                             \
        tile(M, N, dt, x, ldx, w, ldw, k, acc, ahead);                                                                 \
    }
#if defined(__AVX512F__)
#define TILES(dt, N) TILE(dt, 1, N) TILE(dt, 2, N) TILE(dt, 3, N) TILE(dt, 4, N)
#define TILE_ROW(dt, N) {tile_##dt##_1x##N, tile_##dt##_2x##N, tile_##dt##_3x##N, tile_##dt##_4x##N}
#elif defined(__AVX2__)
#define TILES(dt, N) TILE(dt, 1, N) TILE(dt, 2, N) TILE(dt, 3, N)
#define TILE_ROW(dt, N) {tile_##dt##_1x##N, tile_##dt##_2x##N, tile_##dt##_3x##N}
#else
#define TILES(dt, N) TILE(dt, 1, N) TILE(dt, 2, N)
#define TILE_ROW(dt, N) {tile_##dt##_1x##N, tile_##dt##_2x##N}
#endif
/* Widths by name, as the macros paste them: one row of w, NR, STREAM_NR (for one or two rows of x only). */
#if defined(__AVX512F__)
#define WIDE 6
#else
#define WIDE 4
#endif
_Static_assert(WIDE == NR && STREAM_NR == 8, "tile functions are named by these widths");
#define TILES_(dt, N) TILES(dt, N)
#define TILE_ROW_(dt, N) TILE_ROW(dt, N)
#define ALL_TILES(dt) TILES(dt, 1) TILES_(dt, WIDE) TILE(dt, 1, 8) TILE(dt, 2, 8)
ALL_TILES(BF16)
ALL_TILES(F16)
ALL_TILES(F32)

enum width { ONE_ROW, NR_ROWS, STREAM_ROWS };
#define ALL_ROWS(dt)                                                                                                   \
    {                                                                                                                  \
        TILE_ROW(dt, 1), TILE_ROW_(dt, WIDE), {                                                                        \
            tile_##dt##_1x8, tile_##dt##_2x8                                                                           \
        }                                                                                                              \
    }
static tile_fn *const tiles[3][3][MR] = {ALL_ROWS(BF16), ALL_ROWS(F16), ALL_ROWS(F32)};
static const size_t tile_width[] = {1, NR, STREAM_NR};

struct product {
    tile_fn *const (*tiles)[MR]; /* of the dtype, by width */
    size_t element;              /* bytes */
    size_t m, n, k;              /* m <= MB, n <= NB */
    const char *x, *w;
    float *acc; /* [m, NB] */
};

/* acc += x [:, k0 .. k1) . w [rows j .. j + width, k0 .. k1). The rows of w behind these are prefetched with the first
 * rows of x. */
static void cell(const struct product *p, enum width width, size_t j, size_t k0, size_t k1) {
    const char *w = p->w + (j * p->k + k0) * p->element;
    const char *ahead = p->w + ((j + tile_width[width]) * p->k + k0 * tile_width[width]) * p->element;
    for (size_t r = 0; r < p->m; r += MR, ahead = w)
        p->tiles[width][(p->m - r < MR ? p->m - r : MR) - 1](p->x + (r * p->k + k0) * p->element, p->k, w, p->k,
                                                             k1 - k0, p->acc + r * NB + j, ahead);
}

/* acc [m, NB] = x w^T. The order of the loops follows the number of rows; results do not depend on it. */
static void product(const struct product *p) {
    memset(p->acc, 0, p->m * NB * sizeof *p->acc);
    const enum width width = p->m <= 2 ? STREAM_ROWS : NR_ROWS;
    const size_t step = tile_width[width], kb = k_block(p->k), whole = p->n / step * step;
    if (p->m <= 16) { /* w in address order, as memory streams it */
        for (size_t j = 0; j < whole; j += step)
            for (size_t i = 0; i < p->k; i += kb) cell(p, width, j, i, i + kb < p->k ? i + kb : p->k);
    } else { /* one K block of all of w's rows stays in cache */
        for (size_t i = 0; i < p->k; i += kb)
            for (size_t j = 0; j < whole; j += step) cell(p, width, j, i, i + kb < p->k ? i + kb : p->k);
    }
    for (size_t j = whole; j < p->n; j++)
        for (size_t i = 0; i < p->k; i += kb) cell(p, ONE_ROW, j, i, i + kb < p->k ? i + kb : p->k);
}

INLINE void linear(const int dt, const struct lla_linear *a, size_t n0, size_t n1) {
    float acc[MB * NB], acc2[MB * NB];
    for (size_t nb = n0; nb < n1; nb += NB) {
        const size_t n = n1 - nb < NB ? n1 - nb : NB;
        for (size_t mb = 0; mb < a->m; mb += MB) {
            const size_t m = a->m - mb < MB ? a->m - mb : MB;
            struct product p = {.tiles = tiles[dt == BF16  ? 0
                                               : dt == F16 ? 1
                                                           : 2],
                                .element = size_of(dt),
                                .m = m,
                                .n = n,
                                .k = a->k,
                                .x = at(a->x, mb * a->k, dt),
                                .w = at(a->w, nb * a->k, dt),
                                .acc = acc};
            product(&p);
            if (a->epilogue == LLA_EPI_SWIGLU) {
                p.w = at(a->w2, nb * a->k, dt);
                p.acc = acc2;
                product(&p);
            }
            for (size_t i = 0; i < m; i++) {
                void *out = at_mut(a->out, (mb + i) * a->n + nb, dt);
                for (size_t j = 0; j < n; j += W) {
                    const size_t len = n - j < W ? n - j : W;
                    vf v = vf_load_n(acc + i * NB, j, len, F32);
                    if (a->epilogue == LLA_EPI_ADD)
                        v = vf_add(vf_load_n(out, j, len, dt), vf_round(v, dt));
                    else if (a->epilogue == LLA_EPI_SWIGLU)
                        v = vf_mul(vf_round(vf_silu(vf_round(v, dt)), dt),
                                   vf_round(vf_load_n(acc2 + i * NB, j, len, F32), dt));
                    else if (a->bias)
                        v = vf_add(v, vf_load_n(a->bias, nb + j, len, dt));
                    vf_store_n(out, j, len, v, dt);
                }
            }
        }
    }
}

void LLA_FN(lla_linear)(const struct lla_linear *a, size_t n0, size_t n1) {
    LLA_BY_DTYPE(a->dtype, linear(dt, a, n0, n1));
}

float LLA_FN(lla_read)(const float *x, size_t n) {
    vf sum[8];
    for (int j = 0; j < 8; j++) sum[j] = vf_zero();
    size_t i = 0;
    for (; i + 8 * W <= n; i += 8 * W) UNROLL for (int j = 0; j < 8; j++) {
            __builtin_prefetch(x + i + j * W + 1024, 0, 3); /* 4 KB ahead: measured best */
            sum[j] = vf_add(sum[j], vf_load(x, i + j * W, F32));
        }
    float total = 0;
    for (int j = 0; j < 8; j++) total += vf_sum(sum[j]);
    for (; i < n; i++) total += x[i];
    return total;
}

double LLA_FN(lla_peak)(llaisysDataType_t dtype, size_t iterations) {
    vf sum[16];
    for (int j = 0; j < 16; j++) sum[j] = vf_zero();
    vf x = vf_set(1.0f);
    double per_instruction = W;
#if defined(__AVX512BF16__)
    if (dtype == LLAISYS_DTYPE_BF16) {
        per_instruction = 2 * W;
        for (size_t i = 0; i < iterations; i++) {
            UNROLL for (int j = 0; j < 16; j++) sum[j] = _mm512_dpbf16_ps(sum[j], (__m512bh)x, (__m512bh)x);
            __asm__ volatile("" : "+v"(x));
        }
    } else
#endif
    {
        (void)dtype;
        for (size_t i = 0; i < iterations; i++) {
            UNROLL for (int j = 0; j < 16; j++) sum[j] = vf_fma(x, x, sum[j]);
            __asm__ volatile("" : "+x"(x));
        }
    }
    float total = 0;
    for (int j = 0; j < 16; j++) total += vf_sum(sum[j]);
    volatile float keep = total;
    (void)keep;
    return per_instruction * 16 * (double)iterations;
}
