/* step_draw.cuh: the order of logits, and the choice from rows that want more than their largest one. */
#ifndef LLA_STEP_DRAW_CUH
#define LLA_STEP_DRAW_CUH

#include "step.cuh"

/* Whether (v, i) comes before (w, j): larger first, the first of equals, NaN before all. */
__device__ __forceinline__ bool better(float v, int32_t i, float w, int32_t j) {
    const bool vn = isnan(v), wn = isnan(w);
    if (vn != wn) return vn;
    if (!vn && v != w) return v > w;
    return i < j;
}

/* Integers in the order of floats; -0 is 0, and NaN, which has been computed, larger than any. */
__device__ __forceinline__ uint32_t key_of(float value) {
    const uint32_t bits = __float_as_uint(__fadd_rn(value, 0.0f));
    return bits ^ ((0u - (bits >> 31)) | 0x80000000u);
}

/* The same with its token, in the order of better(); never 0. */
__device__ __forceinline__ unsigned long long key_of(float value, uint32_t token) {
    return (unsigned long long)key_of(value) << 32 | ~token;
}

/* Chooses the tokens of rows that are not plain, and finds their odds (struct lla_draw has the formulas). */
lla_status lla_cuda_draw(const lla_cuda_ctx *ctx, const lla_sample_args *args);

#endif
