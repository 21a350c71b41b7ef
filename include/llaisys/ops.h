/* ops.h: the nine LLAISYS operators over tensors.
 *
 * dtypes: f32, f16 or bf16, one for all floating tensors of a call; sums are accumulated in f32. Tensors may have any
 * strides; contiguous ones are faster. Outputs may not overlap inputs, except elementwise in place.
 * Errors: a wrong dtype, shape or device sets llaisysGetLastError() and leaves the output untouched.
 * A call returns when the result is there on the CPU, and in stream order on a GPU.
 *
 *     llaisysLinear(out, x, weight, NULL);
 *     if (llaisysGetLastError()) fprintf(stderr, "%s\n", llaisysGetLastError());
 */
#ifndef LLAISYS_OPS_H
#define LLAISYS_OPS_H

#include "tensor.h"

LLAISYS_BEGIN

/* c = a + b, all of one shape. */
LLAISYS_API void llaisysAdd(llaisysTensor_t c, llaisysTensor_t a, llaisysTensor_t b);
/* vals [n], n > 0; max_idx i64 [1], max_val [1]: the largest element and its index, the first of equals; a NaN counts
 * as larger than any number, as in PyTorch. */
LLAISYS_API void llaisysArgmax(llaisysTensor_t max_idx, llaisysTensor_t max_val, llaisysTensor_t vals);
/* out [n, d] = rows index i64 [n] of weight [voc, d]; an index outside [0, voc) is an error. */
LLAISYS_API void llaisysEmbedding(llaisysTensor_t out, llaisysTensor_t index, llaisysTensor_t weight);
/* out [m, n] = in [m, k] weight^T + bias, weight [n, k], bias [n] or NULL. */
LLAISYS_API void llaisysLinear(llaisysTensor_t out, llaisysTensor_t in, llaisysTensor_t weight, llaisysTensor_t bias);
/* Copies in to out, of one shape and dtype and any two stridings. */
LLAISYS_API void llaisysRearrange(llaisysTensor_t out, llaisysTensor_t in);
/* out = in / sqrt(mean(in^2) + eps) * weight over the last dimension; weight [d]. */
LLAISYS_API void llaisysRmsNorm(llaisysTensor_t out, llaisysTensor_t in, llaisysTensor_t weight, float eps);
/* in, out [seq, heads, d], pos_ids i64 [seq]. With a = x[..., :d/2], b = x[..., d/2:] and angle = pos / theta^(2j/d):
 * a' = a cos - b sin, b' = b cos + a sin. Angles are computed in double precision
 * (and rounded to f32 below 1024). */
LLAISYS_API void llaisysROPE(llaisysTensor_t out, llaisysTensor_t in, llaisysTensor_t pos_ids, float theta);
/* q [seq, nh, d], k [total, nkvh, d], v [total, nkvh, dv], attn_val [seq, nh, dv]; causal, the last query sees all of
 * k; query head h reads KV head h / (nh / nkvh). softmax(scale q k^T) v, in f32. */
LLAISYS_API void llaisysSelfAttention(llaisysTensor_t attn_val, llaisysTensor_t q, llaisysTensor_t k, llaisysTensor_t v,
                                      float scale);
/* out = up * gate / (1 + e^-gate), all of one shape. */
LLAISYS_API void llaisysSwiGLU(llaisysTensor_t out, llaisysTensor_t gate, llaisysTensor_t up);

LLAISYS_END

#endif
