/* step.cuh: what the step's kernels share: dtypes, rounding, packed tiles, launching. */
#ifndef LLA_STEP_CUH
#define LLA_STEP_CUH

#include "nodes.h"
#include "ptx.cuh"

#include <cuda_runtime.h>

enum { WARPS = 8, THREADS = 32 * WARPS };
enum { PARTS = 8 }; /* of K, in a product's sums: nodes.h */

/* The launch's shared memory, as bytes. */
#ifndef LLA_DYNAMIC_SHARED
#define LLA_DYNAMIC_SHARED(name, alignment)                                                                            \
    extern __shared__ __align__(alignment)                                                                             \
    char name[]
#endif

template <class T> __device__ __forceinline__ float to_float(T v);
template <> __device__ __forceinline__ float to_float(float v) {
    return v;
}
template <> __device__ __forceinline__ float to_float(__half v) {
    return __half2float(v);
}
template <> __device__ __forceinline__ float to_float(__nv_bfloat16 v) {
    return __bfloat162float(v);
}

template <class T> __device__ __forceinline__ T from_float(float v);
template <> __device__ __forceinline__ float from_float<float>(float v) {
    return v;
}
template <> __device__ __forceinline__ __half from_float<__half>(float v) {
    return __float2half_rn(v);
}
template <> __device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float v) {
    return __float2bfloat16_rn(v);
}

/* round() of the contracts. */
template <class T> __device__ __forceinline__ float rounded(float v) {
    return to_float<T>(from_float<T>(v));
}

__host__ __device__ inline size_t tiles_of(size_t n) {
    return (n + LLA_TILE - 1) / LLA_TILE;
}

/* Row of the weight that row r (0 .. 15) of row tile `tile` holds; see nodes.h. */
__host__ __device__ inline size_t tile_row(size_t tile, size_t r, size_t half) {
    if (!half) return tile * LLA_TILE + r;
    const size_t pair = tile * 8 + r % 8;
    return pair / half * 2 * half + pair % half + (r >= 8 ? half : 0);
}

/* Position of element (row, col) in a packed weight of `ktiles` column tiles. */
__host__ __device__ inline size_t packed_index(size_t row, size_t col, size_t ktiles, size_t half) {
    size_t tile = row / LLA_TILE, r = row % LLA_TILE;
    if (half) {
        const size_t in_group = row % (2 * half), pair = row / (2 * half) * half + in_group % half;
        tile = pair / 8;
        r = pair % 8 + (in_group >= half ? 8 : 0);
    }
    const size_t c = col % LLA_TILE, lane = r % 8 * 4 + c % 8 / 2;
    return (tile * ktiles + col / LLA_TILE) * 256 + lane * 8 + (c >= 8 ? 4 : 0) + (r >= 8 ? 2 : 0) + c % 2;
}

/* Launches a kernel of the step, with a programmatic edge from the kernel before where the context says so, in clusters
 * of `cluster` blocks. */
template <class... Params, class... Args>
lla_status launch_clusters(const lla_cuda_ctx *ctx, const char *name, void (*kernel)(Params...), dim3 grid, int threads,
                           size_t smem, unsigned cluster, Args... args) {
    /* The most that the kernel may ever ask for, whatever it asks for now: a graph's nodes share the attribute. */
    cudaFuncAttributes code;
    cudaError_t e0 = cudaFuncGetAttributes(&code, reinterpret_cast<const void *>(kernel));
    if (e0 != cudaSuccess) return lla_fail(LLA_EDEVICE, "%s: %s", name, cudaGetErrorString(e0));
    if (smem + code.sharedSizeBytes > ctx->max_smem)
        return lla_fail(LLA_ELIMIT, "%s: %zu bytes of shared memory, a block may have %zu", name,
                        smem + code.sharedSizeBytes, ctx->max_smem);
    e0 = cudaFuncSetAttribute(reinterpret_cast<const void *>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                              (int)(ctx->max_smem - code.sharedSizeBytes));
    if (e0 != cudaSuccess) return lla_fail(LLA_EDEVICE, "%s: %s", name, cudaGetErrorString(e0));
    /* An SM changes the size of its shared memory only when it is empty: kernels that are to overlap ask for the same.
     */
    e0 = cudaFuncSetAttribute(reinterpret_cast<const void *>(kernel), cudaFuncAttributePreferredSharedMemoryCarveout,
                              cudaSharedmemCarveoutMaxShared);
    if (e0 != cudaSuccess) return lla_fail(LLA_EDEVICE, "%s: %s", name, cudaGetErrorString(e0));
    cudaLaunchAttribute attributes[2] = {};
    unsigned n = 0;
    if (ctx->pdl) {
        attributes[n].id = cudaLaunchAttributeProgrammaticStreamSerialization;
        attributes[n++].val.programmaticStreamSerializationAllowed = 1;
    }
    if (cluster > 1) {
        attributes[n].id = cudaLaunchAttributeClusterDimension;
        attributes[n].val.clusterDim.x = cluster;
        attributes[n].val.clusterDim.y = 1;
        attributes[n++].val.clusterDim.z = 1;
    }
    cudaLaunchConfig_t config = {};
    config.gridDim = grid;
    config.blockDim = dim3((unsigned)threads);
    config.dynamicSmemBytes = smem;
    config.stream = (cudaStream_t)ctx->stream;
    config.attrs = attributes;
    config.numAttrs = n;
    const cudaError_t e = cudaLaunchKernelEx(&config, kernel, static_cast<Params>(args)...);
    if (e != cudaSuccess) return lla_fail(LLA_EDEVICE, "%s: launch failed: %s", name, cudaGetErrorString(e));
    return LLA_OK;
}

/* Whether the device can hold a cluster of such blocks at all: part of a GPU (MIG) may lack the multiprocessors. */
template <class Kernel> bool cluster_fits(Kernel *kernel, dim3 grid, int threads, size_t smem, unsigned cluster) {
    cudaLaunchAttribute attribute = {};
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = cluster;
    attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = grid;
    config.blockDim = dim3((unsigned)threads);
    config.dynamicSmemBytes = smem;
    config.attrs = &attribute;
    config.numAttrs = 1;
    int count = 0;
    const bool is_known =
        cudaFuncSetAttribute(reinterpret_cast<const void *>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                             (int)smem) == cudaSuccess &&
        cudaOccupancyMaxActiveClusters(&count, reinterpret_cast<const void *>(kernel), &config) == cudaSuccess;
    if (!is_known) (void)cudaGetLastError();
    return is_known && count > 0;
}

template <class... Params, class... Args>
lla_status launch(const lla_cuda_ctx *ctx, const char *name, void (*kernel)(Params...), dim3 grid, int threads,
                  size_t smem, Args... args) {
    return launch_clusters(ctx, name, kernel, grid, threads, smem, 1, args...);
}

/* Clusters of a kernel that the GPU holds at once where a block has an SM for itself: fewer than there are SMs for,
 * since a cluster stays within one of the GPU's groups of SMs. 0: none. */
template <class... Params>
size_t resident_clusters(const lla_cuda_ctx *ctx, void (*kernel)(Params...), int threads, unsigned cluster) {
    cudaFuncAttributes has;
    if (cudaFuncGetAttributes(&has, reinterpret_cast<const void *>(kernel)) != cudaSuccess) return 0;
    const size_t smem = ctx->max_smem - has.sharedSizeBytes;
    if (has.ptxVersion < 90 /* compiled for GPUs without clusters */ ||
        cudaFuncSetAttribute(reinterpret_cast<const void *>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                             (int)smem) != cudaSuccess)
        return 0;
    cudaLaunchAttribute attribute = {};
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = cluster;
    attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(cluster);
    config.blockDim = dim3((unsigned)threads);
    config.dynamicSmemBytes = smem;
    config.attrs = &attribute;
    config.numAttrs = 1;
    int count = 0;
    if (cudaOccupancyMaxActiveClusters(&count, reinterpret_cast<const void *>(kernel), &config) != cudaSuccess)
        return 0;
    return (size_t)count;
}

/* Whether the device runs code for sm_90a, and the build has some. */
inline bool has_wgmma(const lla_cuda_ctx *ctx) {
#ifdef LLA_SM90A
    return ctx->compute == 90;
#else
    return false;
#endif
}

/* Notes when the block has come to an event; see struct lla_block_times. */
__device__ __forceinline__ void note(lla_block_times *trace, lla_block_event event) {
#ifdef LLA_STEP_TRACE
    const unsigned block = blockIdx.y * gridDim.x + blockIdx.x;
    if (!trace || threadIdx.x || block >= LLA_TRACE_BLOCKS) return;
    trace[block].ns[event] = global_ns();
    if (event == LLA_BLOCK_BEGAN) trace[block].sm = sm_id();
#endif
}

/* Runs `call` with T bound to the dtype's C++ type. */
#define LLA_CUDA_BY_DTYPE(dtype, ...)                                                                                  \
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
