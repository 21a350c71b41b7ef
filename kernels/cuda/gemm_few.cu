/* gemm_few.cu: x w^T for up to 16 rows of x in 16 bits: bound by the stream of w, which goes from memory straight into
 * registers.
 *
 * w is the tensor core's 16-row operand, x its 8-column one. Lane 4 g + t holds 16 bytes, eight neighbours of k, of
 * rows g and g + 8 of w and of row g of x. mma.m16n8k16 wants pairs from k = 2t and k = 2t + 8; but a sum may be taken
 * in any order of k as long as both operands agree, so the eight neighbours serve, as they lie, as the lane's pairs of
 * two products.
 *
 * K is cut into chunks of 32; warp v of a block has chunks v, v + warps, ..., and the warps' sums are added in order.
 */
#include "gemm.cuh"

enum { FEW_TILE = 16, FEW_CHUNK = 32, FEW_MAX_WARPS = 16 };

/* A lane's part of EACH chunks of K, from element `at`, a distance of `step` apart; zeros beyond k. Rows beyond the end
 * are read as the last one: they reach only sums that are thrown away. */
template <class T, int GROUPS, int EACH> struct FewChunks {
    uint4 low[EACH], high[EACH], x[EACH][GROUPS];

    __device__ __forceinline__ void load(const T *low_row, const T *high_row, const T *const (&x_rows)[GROUPS],
                                         unsigned at, unsigned step, unsigned k) {
        const uint4 zero = make_uint4(0, 0, 0, 0);
#pragma unroll
        for (int u = 0; u < EACH; u++) {
            const unsigned from = at + u * step;
            low[u] = from < k ? load_stream(low_row + from) : zero;
            high[u] = from < k ? load_stream(high_row + from) : zero;
        }
#pragma unroll
        for (int u = 0; u < EACH; u++)
#pragma unroll
            for (int i = 0; i < GROUPS; i++) {
                const unsigned from = at + u * step;
                x[u][i] = from < k ? __ldg(reinterpret_cast<const uint4 *>(x_rows[i] + from)) : zero;
            }
    }

    __device__ __forceinline__ void add_to(float (&sum)[GROUPS][4]) const {
#pragma unroll
        for (int u = 0; u < EACH; u++)
#pragma unroll
            for (int i = 0; i < GROUPS; i++) {
                mma_16816<T>(sum[i], make_uint4(low[u].x, high[u].x, low[u].y, high[u].y),
                             make_uint2(x[u][i].x, x[u][i].y));
                mma_16816<T>(sum[i], make_uint4(low[u].z, high[u].z, low[u].w, high[u].w),
                             make_uint2(x[u][i].z, x[u][i].w));
            }
    }
};

/* GROUPS of 8 rows of x. */
template <class T, int GROUPS>
__global__ void __launch_bounds__(32 * FEW_MAX_WARPS)
    gemm_few(unsigned m, unsigned n, unsigned k, const T *x, const T *w, const T *bias, T *out) {
    __shared__ float parts[FEW_MAX_WARPS][GROUPS][8][FEW_TILE + 1]; /* [row of x][row of w] */
    const unsigned warp = threadIdx.x / 32, warps = blockDim.x / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    const unsigned n0 = blockIdx.x * FEW_TILE, step = warps * FEW_CHUNK;
    const T *low = w + static_cast<size_t>(min(n0 + g, n - 1)) * k;
    const T *high = w + static_cast<size_t>(min(n0 + g + 8, n - 1)) * k;
    const T *x_rows[GROUPS];
#pragma unroll
    for (int i = 0; i < GROUPS; i++) x_rows[i] = x + static_cast<size_t>(min(i * 8 + g, m - 1)) * k;

    float sum[GROUPS][4] = {};
    constexpr int EACH = 4 / GROUPS;         /* two groups of chunks of both operands fit in 128 registers */
    FewChunks<T, GROUPS, EACH> chunks, next; /* the next group is on its way while this one is multiplied */
    unsigned at = warp * FEW_CHUNK + t * 8;
    chunks.load(low, high, x_rows, at, step, k);
    for (at += EACH * step; at - t * 8 < k; at += EACH * step) { /* the same number of times in all lanes */
        next.load(low, high, x_rows, at, step, k);
        chunks.add_to(sum);
        chunks = next;
    }
    chunks.add_to(sum);
#pragma unroll
    for (int i = 0; i < GROUPS; i++)
#pragma unroll
        for (int c = 0; c < 4; c++) parts[warp][i][2 * t + c % 2][g + c / 2 * 8] = sum[i][c];
    __syncthreads();
    for (unsigned id = threadIdx.x; id < GROUPS * 8 * FEW_TILE; id += blockDim.x) {
        const unsigned row = id / FEW_TILE, column = id % FEW_TILE;
        if (row >= m || n0 + column >= n) continue;
        float total = 0;
        for (unsigned v = 0; v < warps; v++) total += parts[v][row / 8][row % 8][column];
        if (bias) total += as_float(bias[n0 + column]);
        out[static_cast<size_t>(row) * n + n0 + column] = round_to<T>(total);
    }
}

template <class T> static void launch_few(const lla_gemm_args *a, unsigned warps, cudaStream_t stream) {
    const auto kernel = a->m <= 8 ? gemm_few<T, 1> : gemm_few<T, 2>;
    static_assert(LLA_GEMM_MAX_FEW_ROWS == 16, "two groups of 8 rows");
    kernel<<<static_cast<unsigned>(ceil_div(a->n, FEW_TILE)), 32 * warps, 0, stream>>>(
        static_cast<unsigned>(a->m), static_cast<unsigned>(a->n), static_cast<unsigned>(a->k),
        static_cast<const T *>(a->x), static_cast<const T *>(a->w), static_cast<const T *>(a->bias),
        static_cast<T *>(a->out));
}

lla_status lla_gemm_few_rows(llaisysDataType_t dtype, const lla_gemm_args *args, unsigned warps, cudaStream_t stream) {
    if (dtype == LLAISYS_DTYPE_BF16)
        launch_few<__nv_bfloat16>(args, warps, stream);
    else
        launch_few<__half>(args, warps, stream);
    LLA_CUDA_LAUNCHED("linear: few rows");
    return LLA_OK;
}
