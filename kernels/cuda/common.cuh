/* common.cuh: what the operators' files share: errors, dtypes, packs of elements, facts and scratch of a device. */
#ifndef LLA_CUDA_COMMON_CUH
#define LLA_CUDA_COMMON_CUH

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

extern "C" { /* the project's C headers */
#include "../../base/dtype.h"
#include "../../base/status.h"
}

#include "ptx.cuh"

#include <cuda_runtime.h>

/* ---- errors ---- */

/* Sets the thread's message, "nvidia: what: CUDA's words", and takes the error back from the CUDA runtime. */
lla_status lla_cuda_fail(cudaError_t error, const char *what);

#define LLA_CUDA_TRY(call, what)                                                                                       \
    do {                                                                                                               \
        cudaError_t lla_cuda_error_ = (call);                                                                          \
        if (lla_cuda_error_ != cudaSuccess) return lla_cuda_fail(lla_cuda_error_, what);                               \
    } while (0)

/* After a launch: what the launch itself says. Errors of the running kernel come with the next call that waits. */
#define LLA_CUDA_LAUNCHED(what) LLA_CUDA_TRY(cudaGetLastError(), what)

/* ---- a device ---- */

enum { LLA_CUDA_MAX_DEVICES = 64 };

struct lla_cuda_facts {
    int sm_count;
    int compute;     /* 80, 89, 90 */
    size_t max_smem; /* bytes of shared memory that one block can have */
    size_t sm_smem;  /* bytes that the blocks of a multiprocessor share; each block also takes 1 KB of it */
};

/* Of the current device; kept after the first call. */
lla_status lla_cuda_facts_get(const struct lla_cuda_facts **facts);

/* Raises a kernel's limit of dynamic shared memory where it is above the 48 KB that every kernel has. */
template <class Kernel> static inline lla_status allow_smem(Kernel *kernel, size_t smem, const char *what) {
    if (smem > 48 * 1024)
        LLA_CUDA_TRY(cudaFuncSetAttribute(reinterpret_cast<const void *>(kernel),
                                          cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(smem)),
                     what);
    return LLA_OK;
}

/* ---- dtypes ---- */

__device__ __forceinline__ float as_float(float v) {
    return v;
}
__device__ __forceinline__ float as_float(__half v) {
    return __half2float(v);
}
/* By its bits: __bfloat162float is opaque to the compiler, which then keeps its results in registers. */
__device__ __forceinline__ float as_float(__nv_bfloat16 v) {
    uint16_t bits;
    memcpy(&bits, &v, sizeof bits);
    return __uint_as_float(static_cast<uint32_t>(bits) << 16);
}

template <class T> __device__ __forceinline__ T round_to(float v);
template <> __device__ __forceinline__ float round_to<float>(float v) {
    return v;
}
template <> __device__ __forceinline__ __half round_to<__half>(float v) {
    return __float2half_rn(v);
}
template <> __device__ __forceinline__ __nv_bfloat16 round_to<__nv_bfloat16>(float v) {
    return __float2bfloat16_rn(v);
}

/* Two rounded values as they lie in memory, the first one lower. */
template <class T> __device__ __forceinline__ uint32_t round_pair(float low, float high);
template <> __device__ __forceinline__ uint32_t round_pair<__half>(float low, float high) {
    const __half2 pair = __floats2half2_rn(low, high);
    uint32_t bits;
    memcpy(&bits, &pair, sizeof bits);
    return bits;
}
template <> __device__ __forceinline__ uint32_t round_pair<__nv_bfloat16>(float low, float high) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    uint32_t bits;
    memcpy(&bits, &pair, sizeof bits);
    return bits;
}

/* N neighbours that move together: 16 bytes where alignment allows it. */
template <class T, int N> struct alignas(sizeof(T) * N) Pack {
    T at[N];
};

/* Plain loads: hints that keep data out of the first-level cache cost 2% here (profiles/ops.md). */
template <class T, int N> __device__ __forceinline__ Pack<T, N> load_pack(const T *p) {
    return *reinterpret_cast<const Pack<T, N> *>(p);
}

template <class T, int N> __device__ __forceinline__ void store_pack(T *p, const Pack<T, N> &pack) {
    *reinterpret_cast<Pack<T, N> *>(p) = pack;
}

/* See make_opaque. */
template <class T, int N> __device__ __forceinline__ void forget(Pack<T, N> &pack) {
    if constexpr (sizeof(T) * N == 16) make_opaque(reinterpret_cast<uint4 &>(pack));
}

template <class... Pointers> static inline bool aligned_16(Pointers... pointers) {
    return ((reinterpret_cast<uintptr_t>(pointers) | ...) & 15) == 0;
}

static inline size_t ceil_div(size_t a, size_t b) {
    return (a + b - 1) / b;
}

/* Runs a statement with T as the dtype's C++ type. */
#define LLA_CUDA_DISPATCH(dtype, ...)                                                                                  \
    do {                                                                                                               \
        if ((dtype) == LLAISYS_DTYPE_BF16) {                                                                           \
            using T = __nv_bfloat16;                                                                                   \
            __VA_ARGS__;                                                                                               \
        } else if ((dtype) == LLAISYS_DTYPE_F16) {                                                                     \
            using T = __half;                                                                                          \
            __VA_ARGS__;                                                                                               \
        } else {                                                                                                       \
            using T = float;                                                                                           \
            __VA_ARGS__;                                                                                               \
        }                                                                                                              \
    } while (0)

#endif
