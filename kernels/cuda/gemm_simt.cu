/* gemm_simt.cu: matrix products in f32 arithmetic: f32 itself, and 16-bit operands whose rows are not aligned.
 *
 * An output's products are added in order of k by one thread (tiles), or by one warp whose lanes each take every 32nd
 * group of four (few rows); neither order depends on m. */
#include "gemm.cuh"

/* ---- tiles: BM x BN a block, TM x TN a thread, both operands transposed to [k][row] in shared memory, double-buffered
 * ---- */

enum { SIMT_THREADS = 256, SIMT_BK = 16 };

template <class T>
static __device__ __forceinline__ void load_four(const T *p, size_t k, size_t end, bool is_row, bool is_wide,
                                                 float (&v)[4]) {
    if (sizeof(T) == 4 && is_wide) { /* k and end are multiples of 4 */
        const float4 f = is_row && k < end ? *reinterpret_cast<const float4 *>(p + k) : make_float4(0, 0, 0, 0);
        v[0] = f.x, v[1] = f.y, v[2] = f.z, v[3] = f.w;
        return;
    }
#pragma unroll
    for (int i = 0; i < 4; i++) v[i] = is_row && k + i < end ? as_float(p[k + i]) : 0.0f;
}

template <class T, int BM, int BN, int TM, int TN>
__global__ void __launch_bounds__(SIMT_THREADS) gemm_simt(size_t m, size_t n, size_t k, const T *x, const T *w,
                                                          const T *bias, T *out, unsigned columns, bool is_wide) {
    static_assert(BM / TM * (BN / TN) == SIMT_THREADS, "every thread has a part of the tile");
    static_assert(TM % 4 == 0 && TN % 4 == 0, "parts are made of 4 x 4 pieces, far apart to keep banks apart");
    static_assert(BM % 64 == 0 && BN % 64 == 0, "every thread loads as many groups of four as the others");
    constexpr int HM = TM / 4, HN = TN / 4, LOAD_M = BM / 64, LOAD_N = BN / 64;
    __shared__ float xs[2][SIMT_BK][BM + 4], ws[2][SIMT_BK][BN + 4];
    const size_t m0 = static_cast<size_t>(blockIdx.x / columns) * BM,
                 n0 = static_cast<size_t>(blockIdx.x % columns) * BN;
    const unsigned tx = threadIdx.x % (BN / TN), ty = threadIdx.x / (BN / TN);
    const unsigned load_row = threadIdx.x / 4, load_k = threadIdx.x % 4 * 4;
    float next_x[LOAD_M][4], next_w[LOAD_N][4], sum[TM][TN] = {};

    const auto load = [&](size_t k0) {
#pragma unroll
        for (int i = 0; i < LOAD_M; i++) {
            const size_t row = m0 + load_row + i * 64;
            load_four(x + row * k, k0 + load_k, k, row < m, is_wide, next_x[i]);
        }
#pragma unroll
        for (int i = 0; i < LOAD_N; i++) {
            const size_t row = n0 + load_row + i * 64;
            load_four(w + row * k, k0 + load_k, k, row < n, is_wide, next_w[i]);
        }
    };
    const auto store = [&](int buffer) {
#pragma unroll
        for (int j = 0; j < 4; j++) {
#pragma unroll
            for (int i = 0; i < LOAD_M; i++) xs[buffer][load_k + j][load_row + i * 64] = next_x[i][j];
#pragma unroll
            for (int i = 0; i < LOAD_N; i++) ws[buffer][load_k + j][load_row + i * 64] = next_w[i][j];
        }
    };

    load(0);
    store(0);
    __syncthreads();
    int buffer = 0;
    for (size_t k0 = 0; k0 < k; k0 += SIMT_BK, buffer ^= 1) {
        const bool is_last = k0 + SIMT_BK >= k;
        if (!is_last) load(k0 + SIMT_BK);
#pragma unroll
        for (int kk = 0; kk < SIMT_BK; kk++) {
            float a[TM], b[TN];
#pragma unroll
            for (int h = 0; h < HM; h++) {
                const float4 f = *reinterpret_cast<const float4 *>(&xs[buffer][kk][h * (BM / HM) + ty * 4]);
                a[4 * h] = f.x, a[4 * h + 1] = f.y, a[4 * h + 2] = f.z, a[4 * h + 3] = f.w;
            }
#pragma unroll
            for (int h = 0; h < HN; h++) {
                const float4 f = *reinterpret_cast<const float4 *>(&ws[buffer][kk][h * (BN / HN) + tx * 4]);
                b[4 * h] = f.x, b[4 * h + 1] = f.y, b[4 * h + 2] = f.z, b[4 * h + 3] = f.w;
            }
#pragma unroll
            for (int i = 0; i < TM; i++)
#pragma unroll
                for (int j = 0; j < TN; j++) sum[i][j] = fmaf(a[i], b[j], sum[i][j]);
        }
        if (!is_last) store(buffer ^ 1); /* read two steps ago, before the last barrier */
        __syncthreads();
    }

    const bool is_store_wide = n % 4 == 0 && reinterpret_cast<uintptr_t>(out) % (4 * sizeof(T)) == 0;
#pragma unroll
    for (int hn = 0; hn < HN; hn++) {
        const size_t column = n0 + hn * (BN / HN) + tx * 4;
        float shift[4];
#pragma unroll
        for (int j = 0; j < 4; j++) shift[j] = bias && column + j < n ? as_float(bias[column + j]) : 0.0f;
#pragma unroll
        for (int i = 0; i < TM; i++) {
            const size_t row = m0 + i / 4 * (BM / HM) + ty * 4 + i % 4;
            if (row >= m) continue;
            Pack<T, 4> pack;
#pragma unroll
            for (int j = 0; j < 4; j++) pack.at[j] = round_to<T>(sum[i][4 * hn + j] + shift[j]);
            if (is_store_wide && column < n) {
                *reinterpret_cast<Pack<T, 4> *>(out + row * n + column) = pack;
            } else {
#pragma unroll
                for (int j = 0; j < 4; j++)
                    if (column + j < n) out[row * n + column + j] = pack.at[j];
            }
        }
    }
}

template <class T, int BM, int BN, int TM, int TN>
static lla_status launch_simt(const lla_gemm_args *a, bool is_wide, cudaStream_t stream) {
    const size_t rows = ceil_div(a->m, BM), columns = ceil_div(a->n, BN);
    LLA_REQUIRE(columns <= INT32_MAX && rows <= INT32_MAX / columns, LLA_EINVAL,
                "linear: expected an output of at most %d tiles of %d x %d, found %zu x %zu of them", INT32_MAX, BM, BN,
                rows, columns);
    gemm_simt<T, BM, BN, TM, TN><<<static_cast<unsigned>(rows * columns), SIMT_THREADS, 0, stream>>>(
        a->m, a->n, a->k, static_cast<const T *>(a->x), static_cast<const T *>(a->w), static_cast<const T *>(a->bias),
        static_cast<T *>(a->out), static_cast<unsigned>(columns), is_wide);
    LLA_CUDA_LAUNCHED("linear: f32 tiles");
    return LLA_OK;
}

lla_status lla_gemm_simt(llaisysDataType_t dtype, const lla_gemm_args *args, cudaStream_t stream) {
    if (dtype == LLAISYS_DTYPE_BF16) return launch_simt<__nv_bfloat16, 64, 64, 4, 4>(args, false, stream);
    if (dtype == LLAISYS_DTYPE_F16) return launch_simt<__half, 64, 64, 4, 4>(args, false, stream);
    const bool is_wide = args->k % 4 == 0 && aligned_16(args->x, args->w);
    const struct lla_cuda_facts *facts;
    LLA_TRY(lla_cuda_facts_get(&facts));
    /* large tiles do twice the work a byte of shared memory: worth it once they fill the device */
    if (ceil_div(args->m, 128) * ceil_div(args->n, 128) >= static_cast<size_t>(facts->sm_count))
        return launch_simt<float, 128, 128, 8, 8>(args, is_wide, stream);
    return launch_simt<float, 64, 64, 4, 4>(args, is_wide, stream);
}

/* ---- few rows: a warp has one row of w and all rows of x ---- */

enum { FEW_THREADS = 256, FEW_EACH = 4 };

/* M: rows of x, rounded up; the surplus ones read the last row, and are thrown away. */
template <int M>
__global__ void __launch_bounds__(FEW_THREADS)
    gemm_few_f32(unsigned m, size_t n, size_t k, const float *x, const float *w, const float *bias, float *out) {
    const size_t row = static_cast<size_t>(blockIdx.x) * (FEW_THREADS / 32) + threadIdx.x / 32;
    const unsigned lane = threadIdx.x % 32;
    if (row >= n) return;
    w += row * k;
    float sum[M] = {};
    for (size_t k0 = lane * 4; k0 < k; k0 += FEW_EACH * 128) {
        float4 v[FEW_EACH];
#pragma unroll
        for (int u = 0; u < FEW_EACH; u++) {
            const uint4 bits = k0 + u * 128 < k ? load_stream(w + k0 + u * 128) : make_uint4(0, 0, 0, 0);
            v[u] = make_float4(__uint_as_float(bits.x), __uint_as_float(bits.y), __uint_as_float(bits.z),
                               __uint_as_float(bits.w));
        }
#pragma unroll
        for (int u = 0; u < FEW_EACH; u++) {
            if (k0 + u * 128 >= k) break;
#pragma unroll
            for (int i = 0; i < M; i++) {
                const size_t from = i < static_cast<int>(m) ? i : m - 1;
                const float4 f = *reinterpret_cast<const float4 *>(x + from * k + k0 + u * 128);
                sum[i] = fmaf(v[u].x, f.x, fmaf(v[u].y, f.y, fmaf(v[u].z, f.z, fmaf(v[u].w, f.w, sum[i]))));
            }
        }
    }
#pragma unroll
    for (int i = 0; i < M; i++) {
#pragma unroll
        for (int offset = 16; offset > 0; offset /= 2) sum[i] += __shfl_xor_sync(0xffffffffu, sum[i], offset);
        if (lane == static_cast<unsigned>(i) && lane < m) out[lane * n + row] = sum[i] + (bias ? bias[row] : 0.0f);
    }
}

lla_status lla_gemm_few_f32(const lla_gemm_args *a, cudaStream_t stream) {
    const auto kernel = a->m == 1 ? gemm_few_f32<1> : a->m <= 4 ? gemm_few_f32<4> : gemm_few_f32<8>;
    static_assert(LLA_GEMM_MAX_FEW_ROWS_F32 == 8, "the widest of the kernels");
    kernel<<<static_cast<unsigned>(ceil_div(a->n, FEW_THREADS / 32)), FEW_THREADS, 0, stream>>>(
        static_cast<unsigned>(a->m), a->n, a->k, static_cast<const float *>(a->x), static_cast<const float *>(a->w),
        static_cast<const float *>(a->bias), static_cast<float *>(a->out));
    LLA_CUDA_LAUNCHED("linear: few rows");
    return LLA_OK;
}
