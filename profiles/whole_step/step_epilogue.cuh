/* step_epilogue.cuh: what follows the sums of the step's products, with the roundings of the contracts (kernels.h). */
#ifndef LLA_STEP_EPILOGUE_CUH
#define LLA_STEP_EPILOGUE_CUH

#include "step.cuh"

/* RoPE: the two halves' elements of a head, rotated by the position's cosine and sine; not yet rounded. */
template <class T> __device__ __forceinline__ void rotate(float &low, float &high, float cos, float sin) {
    const float ac = rounded<T>(low * cos), bs = rounded<T>(high * sin), bc = rounded<T>(high * cos),
                as = rounded<T>(low * sin);
    low = ac - bs;
    high = bc + as;
}

/* round(silu(gate)) * up, not yet rounded. */
template <class T> __device__ __forceinline__ float swiglu(float gate, float up) {
    const float g = rounded<T>(gate);
    return rounded<T>(g / (1.0f + expf(-g))) * rounded<T>(up);
}

/* Whether logit (v, i) comes before (w, j): larger first, the first of equals, NaN before all. */
__device__ __forceinline__ bool better(float v, int32_t i, float w, int32_t j) {
    const bool vn = isnan(v), wn = isnan(w);
    if (vn != wn) return vn;
    if (!vn && v != w) return v > w;
    return i < j;
}

#endif
