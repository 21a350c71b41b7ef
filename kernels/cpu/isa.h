/* isa.h: the primitives that are compiled once per instruction set, and the table through which they are called.
 *
 * kernels/cpu/{linear,rows,attention,draw}.c are compiled for each instruction set with LLA_ISA set to its name;
 * everything else calls them through lla_isa(). Buffers are dense unless a stride is given; strides count elements. */
#ifndef LLA_CPU_ISA_H
#define LLA_CPU_ISA_H

#include "../kernels.h"

enum lla_epilogue {
    LLA_EPI_STORE,  /* out = round(acc + bias) */
    LLA_EPI_ADD,    /* out = round(out + round(acc)) */
    LLA_EPI_SWIGLU, /* out = round(round(silu(round(acc))) * round(acc2)), acc2 from w2 */
};

/* out [m, n] = epilogue(x [m, k] w[n, k]^T). */
struct lla_linear {
    llaisysDataType_t dtype;
    enum lla_epilogue epilogue;
    size_t m, n, k;
    const void *x;
    const void *w, *w2;
    const void *bias; /* [n] or NULL */
    void *out;        /* row stride n */
};

/* One KV head of one sequence, for rows that stand together: rows i = 0 .. nrow - 1 at positions position0 + i. */
struct lla_attention {
    llaisysDataType_t dtype;
    size_t nrow, position0;
    size_t group;     /* query heads of the KV head */
    size_t dim, vdim; /* of q and k, and of v */
    float scale;
    const void *q; /* row i, head h at q + i * q_stride + h * dim */
    size_t q_stride;
    const void *k, *v; /* token t of block b at k + table[b] * k_block_stride + t * k_token_stride */
    size_t k_block_stride, k_token_stride, v_block_stride, v_token_stride;
    const int32_t *table; /* block of positions [b << kv_shift, (b + 1) << kv_shift) */
    size_t kv_shift;
    void *out; /* row i, head h at out + i * out_stride + h * vdim */
    size_t out_stride;
};

struct lla_isa {
    const char *name;
    /* Columns [n0, n1) for every row. */
    void (*linear)(const struct lla_linear *args, size_t n0, size_t n1);
    /* out[i, :] = round(w * round(x[r, :] / sqrt(mean + eps))), r = index ? index[i] : i, for i in [i0, i1). */
    void (*rms_norm)(llaisysDataType_t dtype, size_t d, const void *x, const int32_t *index, const void *w, float eps,
                     void *out, size_t i0, size_t i1);
    /* One head: out [dim] = x rotated by cos, sin [dim/2] (f32); products are rounded to dtype where `round_products`.
     * out may be x. */
    void (*rotate)(llaisysDataType_t dtype, size_t dim, const void *x, const float *cos_sin, bool round_products,
                   void *out);
    void (*add)(llaisysDataType_t dtype, size_t n, const void *a, const void *b, void *out);
    /* round(up * silu(gate)), with silu rounded in between where `round_silu`. */
    void (*swiglu)(llaisysDataType_t dtype, size_t n, const void *gate, const void *up, bool round_silu, void *out);
    /* Largest of n > 0 values and its first index; NaN counts as largest. */
    size_t (*argmax)(llaisysDataType_t dtype, size_t n, const void *values);
    /* dtype -> f32. */
    void (*to_float)(llaisysDataType_t dtype, size_t n, const void *x, float *out);
    void (*attention)(const struct lla_attention *args);
    /* One split of one row: partial [group][vdim + 2] = unnormalised output, maximum, sum. */
    void (*attention_split)(const struct lla_attention *args, size_t split, float *partial);
    /* out = round of `nsplit` partials, partial s at partial + s * stride floats, merged in order. */
    void (*attention_merge)(const struct lla_attention *args, size_t nsplit, const float *partial, size_t stride);
    /* As lla_cpu_draw; the same token and bits in every instruction set. */
    int32_t (*draw)(const struct lla_draw *args);
    /* Sum of n floats read as fast as they come: the plain-read ceiling of the benchmark. */
    float (*read)(const float *x, size_t n);
    /* Runs `iterations` dot-product instructions on each of 16 accumulators; returns the multiply-adds done. */
    double (*peak)(llaisysDataType_t dtype, size_t iterations);
};

/* The one in use. */
const struct lla_isa *lla_isa(void);
/* One by name, for tests; NULL where the CPU does not have it. */
const struct lla_isa *lla_isa_named(const char *name);

/* [lo, hi): the share of the team's rank in `count` units of `grain` items. */
static inline void lla_share(size_t count, size_t grain, struct lla_team team, size_t *lo, size_t *hi) {
    size_t units = (count + grain - 1) / grain;
    size_t a = units * team.rank / team.size * grain, b = units * (team.rank + 1) / team.size * grain;
    *lo = a < count ? a : count;
    *hi = b < count ? b : count;
}

#endif
