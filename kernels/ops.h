/* ops.h: the LLAISYS operators of one device over dense row-major buffers, as a table.
 *
 * dtype is f32, f16 or bf16 for every floating buffer of a call; sums are accumulated in f32 and rounded once, except
 * where a contract says otherwise. The caller has validated shapes and devices; buffers do not overlap unless said.
 * Zero sizes are allowed and do nothing. Functions fail only for reasons of the device (LLA_EDEVICE, LLA_ENOMEM) or for
 * bad data where said. */
#ifndef LLA_OPS_H
#define LLA_OPS_H

#include "../base/dtype.h"
#include "../base/status.h"

struct lla_op_table {
    /* c[i] = a[i] + b[i]; c may be a or b. */
    lla_status (*add)(llaisysDataType_t dtype, size_t n, const void *a, const void *b, void *c);
    /* n > 0. *index, *value: the largest and where it first stands; a NaN counts as largest. */
    lla_status (*argmax)(llaisysDataType_t dtype, size_t n, const void *values, int64_t *index, void *value);
    /* out [n, d] = weight [vocab, d] at rows index [n]; LLA_EINVAL for an index outside, then out is untouched. */
    lla_status (*embedding)(llaisysDataType_t dtype, size_t n, size_t d, size_t vocab, const int64_t *index,
                            const void *weight, void *out);
    /* out [m, n] = x [m, k] w[n, k]^T + bias [n] (or NULL). k may be 0. */
    lla_status (*linear)(llaisysDataType_t dtype, size_t m, size_t n, size_t k, const void *x, const void *w,
                         const void *bias, void *out);
    /* out [rows, d] = w * round(x / sqrt(mean(x^2) + eps)), rounded again: transformers' Qwen2RMSNorm. */
    lla_status (*rms_norm)(llaisysDataType_t dtype, size_t rows, size_t d, const void *x, const void *w, float eps,
                           void *out);
    /* x, out [seq, heads, d], pos [seq]; d even. Angles in double (those below 1024 rounded to f32
     * once, as LLAISYS's test wants them), products and sum in f32. out may be x. */
    lla_status (*rope)(llaisysDataType_t dtype, size_t seq, size_t heads, size_t d, const void *x, const int64_t *pos,
                       double theta, void *out);
    /* q [seq, nh, d], k [total, nkvh, d], v [total, nkvh, dv], out [seq, nh, dv]; causal, aligned at the end; seq <=
     * total. */
    lla_status (*self_attention)(llaisysDataType_t dtype, size_t seq, size_t total, size_t nh, size_t nkvh, size_t d,
                                 size_t dv, const void *q, const void *k, const void *v, float scale, void *out);
    /* out[i] = up[i] * gate[i] / (1 + e^-gate[i]); out may be gate or up. */
    lla_status (*swiglu)(llaisysDataType_t dtype, size_t n, const void *gate, const void *up, void *out);
    /* Copies a strided array to another: strides in elements of `element` bytes; ndim <= 8; shapes equal. */
    lla_status (*rearrange)(size_t element, size_t ndim, const size_t *shape, const ptrdiff_t *out_strides, void *out,
                            const ptrdiff_t *in_strides, const void *in);
};

const struct lla_op_table *lla_cpu_ops(void);

#endif
