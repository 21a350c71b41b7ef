/* step_math.cuh: the arithmetic between the step's sums, for all kernels that do it: one expression, one rounding. */
#ifndef LLA_STEP_MATH_CUH
#define LLA_STEP_MATH_CUH

#include "step.cuh"

#include <type_traits>

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

/* The products of two pairs, rounded. */
template <class T> __device__ __forceinline__ uint32_t multiply_pairs(uint32_t a, uint32_t b) {
    using Pair = typename std::conditional<std::is_same<T, __half>::value, __half2, __nv_bfloat162>::type;
    Pair x, y;
    memcpy(&x, &a, sizeof x);
    memcpy(&y, &b, sizeof y);
    x = __hmul2(x, y);
    memcpy(&a, &x, sizeof a);
    return a;
}

/* 1 / sqrt(mean + eps). It stands on a step's critical path; to 16 bits, approximations do. */
template <class T> __device__ __forceinline__ float norm_scale_of(float sum, unsigned k, float eps) {
    if (sizeof(T) == 2) return rsqrtf(__fadd_rn(__fdividef(sum, (float)k), eps));
    return 1.0f / sqrtf(sum / (float)k + eps);
}

/* The sum over a warp's lanes, for each of them, in a butterfly. */
__device__ __forceinline__ float warp_sum(float sum) {
    for (int o = 16; o; o /= 2) sum += __shfl_xor_sync(~0u, sum, o);
    return sum;
}

/* ---- sums of squares ----
 *
 * Who writes x leaves the sum of squares of every 16 columns of a row (lla_io.squares), and a norm adds those: it need
 * not read the row for it, and the two are under way together. Of 16 columns c and c + 8 are added first, then
 * neighbours, their neighbours, and the halves; of a row a lane adds four by four, then the lanes' sums meet. So a
 * row's sum has one order, whoever writes and reads it. */

/* The squares of columns c and c + 8. */
__device__ __forceinline__ float squares(float low, float high) {
    return fmaf(high, high, __fmul_rn(low, low));
}

/* The sum over eight lanes that stand APART apart, for each of them; all lanes of a warp call it. */
template <int APART> __device__ __forceinline__ float sum_of_eight(float sum) {
#pragma unroll
    for (int o = 1; o < 8; o *= 2) sum = __fadd_rn(sum, __shfl_xor_sync(~0u, sum, o * APART));
    return sum;
}

/* The same where four neighbours have the sum of two of the eight. */
__device__ __forceinline__ float sum_of_four(float sum) {
#pragma unroll
    for (int o = 1; o < 4; o *= 2) sum = __fadd_rn(sum, __shfl_xor_sync(~0u, sum, o));
    return sum;
}

/* 1 / sqrt(mean(x^2) + eps) of a row of k columns with these squares; all lanes of a warp call it and get it. */
template <class T>
__device__ __forceinline__ float norm_scale(const float *squares, unsigned k, float eps, unsigned lane) {
    float sum = 0;
#pragma unroll 1
    for (unsigned i = lane; i < lla_square_columns(k) / 4; i += 32) {
        const float4 v = reinterpret_cast<const float4 *>(squares)[i];
        sum = __fadd_rn(sum, __fadd_rn(__fadd_rn(v.x, v.y), __fadd_rn(v.z, v.w)));
    }
    return norm_scale_of<T>(warp_sum(sum), k, eps);
}

/* round(norm * round(x scale)) */
template <class T> __device__ __forceinline__ T normed(T x, T norm, float scale) {
    return from_float<T>(to_float<T>(norm) * rounded<T>(to_float<T>(x) * scale));
}

/* The same of a unit of 16 bytes. Of 16-bit elements two at a time: their product is rounded once. */
template <class T> __device__ __forceinline__ uint4 normed_unit(const uint4 &x, const uint4 &norm, float scale) {
    uint4 y;
    if constexpr (sizeof(T) == 2) {
        const uint32_t *from = reinterpret_cast<const uint32_t *>(&x), *by = reinterpret_cast<const uint32_t *>(&norm);
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const float2 v = unpack_pair<T>(from[i]);
            reinterpret_cast<uint32_t *>(&y)[i] = multiply_pairs<T>(by[i], pack_pair<T>(v.x * scale, v.y * scale));
        }
    } else {
#pragma unroll
        for (int e = 0; e < (int)(16 / sizeof(T)); e++)
            reinterpret_cast<T *>(&y)[e] =
                normed<T>(reinterpret_cast<const T *>(&x)[e], reinterpret_cast<const T *>(&norm)[e], scale);
    }
    return y;
}

/* to [k] = norm of the row x [k], by one warp; k is whole units of 16 bytes. */
template <class T>
__device__ __forceinline__ void norm_row(const T *x, const T *norm, const float *squares, unsigned k, float eps, T *to,
                                         unsigned lane) {
    constexpr unsigned IN_FLIGHT = 6, SPAN = 32 * IN_FLIGHT; /* units */
    const unsigned units = k / (16 / sizeof(T));
    uint4 v[IN_FLIGHT];
    const auto load = [&](unsigned base) {
#pragma unroll
        for (unsigned j = 0; j < IN_FLIGHT; j++) {
            const unsigned i = base + 32 * j + lane;
            v[j] = i < units ? reinterpret_cast<const uint4 *>(x)[i] : make_uint4(0, 0, 0, 0);
        }
    };
    load(0);
    const float scale = norm_scale<T>(squares, k, eps, lane);
#pragma unroll 1
    for (unsigned base = 0;;) {
#pragma unroll
        for (unsigned j = 0; j < IN_FLIGHT; j++) {
            const unsigned i = base + 32 * j + lane;
            if (i < units)
                reinterpret_cast<uint4 *>(to)[i] =
                    normed_unit<T>(v[j], reinterpret_cast<const uint4 *>(norm)[i], scale);
        }
        if ((base += SPAN) >= units) break;
        load(base);
    }
}

/* RoPE of the elements that stand half a head apart, rounded like transformers' code; the caller rounds the sums. */
template <class T> __device__ __forceinline__ void rotate(float &low, float &high, float c, float s) {
    const float ac = rounded<T>(low * c), bs = rounded<T>(high * s), bc = rounded<T>(high * c),
                as = rounded<T>(low * s);
    low = ac - bs;
    high = bc + as;
}

/* round(round(g / (1 + e^-g)) u) of the sums' rounded values. To 16 bits, approximations of the exponential and the
 * quotient do, with a part of the instructions. */
template <class T> __device__ __forceinline__ T swiglu(float gate, float up) {
    gate = rounded<T>(gate);
    up = rounded<T>(up);
    const float silu = sizeof(T) == 2 ? __fdividef(gate, __fadd_rn(1.0f, exp2_fast(-1.4426950408889634f * gate)))
                                      : gate / __fadd_rn(1.0f, expf(-gate));
    return from_float<T>(rounded<T>(silu) * up);
}

#endif
