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

/* normed = norm of x. TEAM warps a row: each sums all of it, as norm_scale() does, and writes its part. */
template <class T, int TEAM> __global__ void __launch_bounds__(THREADS) norm_kernel(const Norm a) {
    const unsigned warp = threadIdx.x / 32, lane = threadIdx.x % 32, row = (blockIdx.x * WARPS + warp) / TEAM;
    pdl_launch_next();
    for (unsigned i = threadIdx.x * 128; i < a.k * sizeof(T); i += THREADS * 128) prefetch_l1((const char *)a.norm + i);
    const unsigned rows = (unsigned)(a.index ? a.header->nlogit : a.header->nrow); /* step inputs: there before */
    if (row >= rows) return pdl_wait();
    const T *x = (const T *)a.x + (size_t)(a.index ? a.index[row] : row) * a.k, *norm = (const T *)a.norm;
    T *to = (T *)a.normed + (size_t)row * a.k;
    pdl_wait();
    if constexpr (TEAM == 1) {
        norm_row<T>(x, norm, a.k, a.eps, to, lane);
    } else {
        const float scale = norm_scale<T, true>(x, a.k, a.eps, lane);
#pragma unroll 1 /* little code: it is fetched while nothing else runs */
        for (unsigned i = warp % TEAM * 32 + lane; i < a.k / (16 / sizeof(T)); i += 32 * TEAM)
            reinterpret_cast<uint4 *>(to)[i] =
                normed_unit<T>(reinterpret_cast<const uint4 *>(x)[i], reinterpret_cast<const uint4 *>(norm)[i], scale);
    }
}

/* Up to 512 rows by a block each: 128 rows take 3 us instead of 7. Of prompts, a warp a row: 2,048 take 11 us less. */
template <class T> lla_status launch_norm(const lla_cuda_ctx *ctx, size_t rows, const Norm &a) {
    if (rows <= 512) return launch(ctx, "norm", norm_kernel<T, WARPS>, dim3((unsigned)rows), THREADS, 0, a);
    return launch(ctx, "norm", norm_kernel<T, 1>, dim3((unsigned)((rows + WARPS - 1) / WARPS)), THREADS, 0, a);
}

} // namespace

#endif
