/* step_norm.cuh: the norm as a kernel of its own, before products of many rows. */
#ifndef LLA_STEP_NORM_CUH
#define LLA_STEP_NORM_CUH

#include "step_math.cuh"

namespace {

struct Norm {
    const lla_step_header *header;
    const int32_t *index; /* of logit row r, the row of x; NULL: rows are the step's */
    const void *x, *norm; /* [.., k], [k]; k is whole units of 16 bytes */
    const float *squares; /* lla_io.squares of x */
    void *normed;         /* [rows, k] */
    unsigned k;
    float eps;
};

/* normed = norm of x, a block a row: a thread has one unit of 16 bytes, or every THREADS-th, and every warp finds the
 * row's scale for itself. */
template <class T> __global__ void __launch_bounds__(THREADS) norm_kernel(const Norm a) {
    const unsigned units = a.k / (16 / sizeof(T)), row = blockIdx.x;
    const bool has_unit = threadIdx.x < units;
    const auto *const norm = reinterpret_cast<const uint4 *>(a.norm);
    pdl_launch_next();
    const uint4 none = make_uint4(0, 0, 0, 0), weights = has_unit ? norm[threadIdx.x] : none;
    const bool exists = row < (unsigned)(a.index ? a.header->nlogit : a.header->nrow); /* step inputs: there before */
    const size_t source = exists && a.index ? (size_t)a.index[row] : row;
    const auto *const x = reinterpret_cast<const uint4 *>((const T *)a.x + source * a.k);
    auto *const to = reinterpret_cast<uint4 *>((T *)a.normed + (size_t)row * a.k);
    pdl_wait();
    if (!exists) return;
    const uint4 v = has_unit ? x[threadIdx.x] : none;
    const float scale = norm_scale<T>(a.squares + source * lla_square_columns(a.k), a.k, a.eps, threadIdx.x % 32);
    if (has_unit) to[threadIdx.x] = normed_unit<T>(v, weights, scale);
#pragma unroll 1
    for (unsigned u = threadIdx.x + THREADS; u < units; u += THREADS) to[u] = normed_unit<T>(x[u], norm[u], scale);
}

template <class T> lla_status launch_norm(const lla_cuda_ctx *ctx, size_t rows, const Norm &a) {
    return launch(ctx, "norm", norm_kernel<T>, dim3((unsigned)rows), THREADS, 0, a);
}

} // namespace

#endif
