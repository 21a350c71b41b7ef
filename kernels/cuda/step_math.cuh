/* step_math.cuh: the arithmetic between the step's sums, for all kernels that do it: one expression, one rounding. */
#ifndef LLA_STEP_MATH_CUH
#define LLA_STEP_MATH_CUH

#include "step.cuh"

/* Two rounded values as they lie in memory, the first one lower; and back. */
template <class T> __device__ __forceinline__ uint32_t pack_pair(float low, float high) {
    const T pair[2] = {from_float<T>(low), from_float<T>(high)};
    uint32_t bits;
    memcpy(&bits, pair, sizeof bits);
    return bits;
}
template <class T> __device__ __forceinline__ float2 unpack_pair(uint32_t bits) {
    T pair[2];
    memcpy(pair, &bits, sizeof pair);
    return make_float2(to_float<T>(pair[0]), to_float<T>(pair[1]));
}

/* 1 / sqrt(mean(x^2) + eps) of a row x [k]; all lanes of a warp call it and get it. Lane l sums units l, l + 32, ... of
 * 16 bytes (elements where k is odd), then the lanes' sums meet in a butterfly. IS_WIDE: k is whole units. */
template <class T, bool IS_WIDE = false>
__device__ __forceinline__ float norm_scale(const T *x, unsigned k, float eps, unsigned lane) {
    constexpr int UNIT = 16 / sizeof(T), IN_FLIGHT = 6; /* elements of a 16-byte load, and loads at once */
    float sum = 0;
    if (IS_WIDE || k % UNIT == 0) {
#pragma unroll 1
        for (unsigned i = lane; i < k / UNIT; i += 32 * IN_FLIGHT) {
            uint4 v[IN_FLIGHT];
#pragma unroll
            for (int j = 0; j < IN_FLIGHT; j++)
                if (i + 32 * j < k / UNIT) v[j] = reinterpret_cast<const uint4 *>(x)[i + 32 * j];
#pragma unroll
            for (int j = 0; j < IN_FLIGHT; j++)
                if (i + 32 * j < k / UNIT)
#pragma unroll
                    for (int e = 0; e < UNIT; e++) {
                        const float f = to_float<T>(reinterpret_cast<const T *>(&v[j])[e]);
                        sum = fmaf(f, f, sum);
                    }
        }
    } else {
        for (unsigned i = lane; i < k; i += 32) {
            const float v = to_float<T>(x[i]);
            sum = fmaf(v, v, sum);
        }
    }
    for (int o = 16; o; o /= 2) sum += __shfl_xor_sync(~0u, sum, o);
    return 1.0f / sqrtf(sum / (float)k + eps);
}

/* round(norm * round(x scale)) */
template <class T> __device__ __forceinline__ T normed(T x, T norm, float scale) {
    return from_float<T>(to_float<T>(norm) * rounded<T>(to_float<T>(x) * scale));
}

/* The same of a unit of 16 bytes. */
template <class T> __device__ __forceinline__ uint4 normed_unit(const uint4 &x, const uint4 &norm, float scale) {
    uint4 y;
#pragma unroll
    for (int e = 0; e < (int)(16 / sizeof(T)); e++)
        reinterpret_cast<T *>(&y)[e] =
            normed<T>(reinterpret_cast<const T *>(&x)[e], reinterpret_cast<const T *>(&norm)[e], scale);
    return y;
}

/* RoPE of the elements that stand half a head apart, rounded like transformers' code; the caller rounds the sums. */
template <class T> __device__ __forceinline__ void rotate(float &low, float &high, float c, float s) {
    const float ac = rounded<T>(low * c), bs = rounded<T>(high * s), bc = rounded<T>(high * c),
                as = rounded<T>(low * s);
    low = ac - bs;
    high = bc + as;
}

/* round(round(g / (1 + e^-g)) u) of the sums' rounded values. */
template <class T> __device__ __forceinline__ T swiglu(float gate, float up) {
    gate = rounded<T>(gate);
    up = rounded<T>(up);
    return from_float<T>(rounded<T>(gate / __fadd_rn(1.0f, expf(-gate))) * up);
}

#endif
