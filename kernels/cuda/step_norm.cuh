/* step_norm.cuh: the norm as a kernel of its own, before products of many rows. */
#ifndef LLA_STEP_NORM_CUH
#define LLA_STEP_NORM_CUH

#include "step_math.cuh"

namespace {

struct Norm {
    const lla_step_header *header;
    const int32_t *index; /* of logit row r, the row of x; NULL: rows are the step's */
    const void *x, *norm; /* [.., k], [k]; k is whole units of 16 bytes */
    void *normed;         /* [rows, k] */
    unsigned k;
    float eps;
};

/* The step's row of the block's or warp's `row`, if there is one, and where its norm goes. */
template <class T> struct NormRow {
    const T *x;
    T *to;
    bool exists;
    __device__ __forceinline__ NormRow(const Norm &a, unsigned row)
        : exists(row < (unsigned)(a.index ? a.header->nlogit : a.header->nrow)) { /* step inputs: there before */
        x = (const T *)a.x + (size_t)(exists && a.index ? a.index[row] : row) * a.k;
        to = (T *)a.normed + (size_t)row * a.k;
    }
};

/* normed = norm of x, a block a row: a thread has one unit of 16 bytes, or every THREADS-th. The units' sums meet in
 * shared memory, and each warp adds them as norm_scale() does. */
template <class T> __global__ void __launch_bounds__(THREADS) norm_kernel(const Norm a) {
    LLA_DYNAMIC_SHARED(unit_sums, 16);
    float *const sums = reinterpret_cast<float *>(unit_sums); /* [padded] */
    const unsigned lane = threadIdx.x % 32, units = a.k / (16 / sizeof(T)), padded = (units + 31) / 32 * 32;
    pdl_launch_next();
    const NormRow<T> row(a, blockIdx.x);
    const auto *const x = reinterpret_cast<const uint4 *>(row.x), *const norm = reinterpret_cast<const uint4 *>(a.norm);
    auto *const to = reinterpret_cast<uint4 *>(row.to);
    const bool has_unit = threadIdx.x < units;
    const uint4 none = make_uint4(0, 0, 0, 0), weights = has_unit ? norm[threadIdx.x] : none;
    pdl_wait();
    if (!row.exists) return;
    const uint4 v = has_unit ? x[threadIdx.x] : none;
    if (threadIdx.x < padded) sums[threadIdx.x] = squares<T>(v);
#pragma unroll 1
    for (unsigned u = threadIdx.x + THREADS; u < padded; u += THREADS) sums[u] = u < units ? squares<T>(x[u]) : 0;
    __syncthreads();
    float sum = 0;
#pragma unroll 6
    for (unsigned u = lane; u < padded; u += 32) sum += sums[u];
    const float scale = norm_scale_of<T>(warp_sum(sum), a.k, a.eps);
    if (has_unit) to[threadIdx.x] = normed_unit<T>(v, weights, scale);
#pragma unroll 1
    for (unsigned u = threadIdx.x + THREADS; u < units; u += THREADS) to[u] = normed_unit<T>(x[u], norm[u], scale);
}

/* The same, a warp a row. */
template <class T> __global__ void __launch_bounds__(THREADS) norm_rows_kernel(const Norm a) {
    const unsigned lane = threadIdx.x % 32;
    pdl_launch_next();
    for (unsigned i = threadIdx.x * 128; i < a.k * sizeof(T); i += THREADS * 128) prefetch_l1((const char *)a.norm + i);
    const NormRow<T> row(a, blockIdx.x * WARPS + threadIdx.x / 32);
    pdl_wait();
    if (row.exists) norm_row<T>(row.x, (const T *)a.norm, a.k, a.eps, row.to, lane);
}

/* Up to 512 rows by a block each; of prompts, a warp a row: 2,048 took 11 us less than by blocks whose warps each read
 * all of the row. */
template <class T> lla_status launch_norm(const lla_cuda_ctx *ctx, size_t rows, const Norm &a) {
    const size_t smem = (a.k / (16 / sizeof(T)) + 31) / 32 * 128;
    if (rows <= 512) return launch(ctx, "norm", norm_kernel<T>, dim3((unsigned)rows), THREADS, smem, a);
    return launch(ctx, "norm", norm_rows_kernel<T>, dim3((unsigned)((rows + WARPS - 1) / WARPS)), THREADS, 0, a);
}

} // namespace

#endif
