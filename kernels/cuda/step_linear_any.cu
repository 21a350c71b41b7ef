/* step_linear_any.cu: the step's matrix products for what the kernels of step_linear.cu do not take: f32, rows that are
 * not whole tiles, rows too long for shared memory.
 *
 * As there every warp owns a part of K, but reads it straight into registers, DEPTH tiles at a time, with the next
 * DEPTH on their way while it multiplies. */
#include "step_linear.cuh"

#include <type_traits>

namespace {

enum { W = PARTS }; /* warps of a block, each with a part of K */
enum { COLS = 8 };  /* rows of x that a block takes: columns of the tensor core's operand */

/* Registers hold 2 DEPTH pieces of 16 bytes a thread: with two blocks on an SM, 48 to 96 KB in flight. */
enum { DEPTH = 6 };

/* Elements k, k + 1 of a row of activations as the B operand wants them; zero beyond the row's end. */
template <class T> __device__ __forceinline__ uint32_t load_pair(const T *row, unsigned k, unsigned end) {
    if (k + 1 < end && (end & 1) == 0) return *reinterpret_cast<const uint32_t *>(row + k);
    union {
        T h[2];
        uint32_t u;
    } pair;
    pair.h[0] = k < end ? row[k] : from_float<T>(0.0f);
    pair.h[1] = k + 1 < end ? row[k + 1] : from_float<T>(0.0f);
    return pair.u;
}

/* Weights of one tile that a lane holds: 16 bytes, or 32 for f32. */
template <class T> struct Weights {
    uint4 v[sizeof(T) / 2];
    __device__ __forceinline__ void load(const T *p) {
#pragma unroll
        for (int i = 0; i < (int)(sizeof(T) / 2); i++) v[i] = load_stream(reinterpret_cast<const uint4 *>(p) + i);
    }
    __device__ __forceinline__ void clear() {
#pragma unroll
        for (int i = 0; i < (int)(sizeof(T) / 2); i++) v[i] = make_uint4(0, 0, 0, 0);
    }
};

/* acc += weights of the tile times columns k0 .. k0 + 15 of eight rows of x (row `lane / 4` of them is `row`). PADDED:
 * rows go on with zeros to a whole tile. */
template <class T, bool PADDED> struct Multiply {
    static __device__ __forceinline__ void run(float (&acc)[4], const Weights<T> &a, const T *row, unsigned k0,
                                               unsigned end, unsigned lane, const T *const *) {
        const unsigned k = k0 + lane % 4 * 2;
        const uint2 b = PADDED ? make_uint2(*reinterpret_cast<const uint32_t *>(row + k),
                                            *reinterpret_cast<const uint32_t *>(row + k + 8))
                               : make_uint2(load_pair(row, k, end), load_pair(row, k + 8, end));
        mma_16816<T>(acc, a.v[0], b);
    }
};
/* f32 has no exact tensor core: the same layout by multiply-adds; the four lanes of a row hand their weights round. */
template <bool PADDED> struct Multiply<float, PADDED> {
    static __device__ __forceinline__ void run(float (&acc)[4], const Weights<float> &a, const float *, unsigned k0,
                                               unsigned end, unsigned lane, const float *const *pair) {
        const float *w = reinterpret_cast<const float *>(a.v); /* (g,2t) (g,2t+1) (g+8,2t) (g+8,2t+1) (g,2t+8) ... */
        for (int t = 0; t < 4; t++)
            for (int e = 0; e < 8; e += 4)
                for (int i = 0; i < 2; i++) {
                    const int from = (int)(lane & ~3u) | t;
                    const float low = __shfl_sync(~0u, w[e + i], from), high = __shfl_sync(~0u, w[e + 2 + i], from);
                    const unsigned k = k0 + 2 * t + (e ? 8 : 0) + i;
                    for (int c = 0; c < 2; c++) {
                        const float x = PADDED || k < end ? pair[c][k] : 0.0f;
                        acc[c] = fmaf(low, x, acc[c]);
                        acc[2 + c] = fmaf(high, x, acc[2 + c]);
                    }
                }
    }
};

/* staged [rows, pitch] = norm of rows first .. first + rows of x; one warp a row, or all warps the same row where there
 * is one: a row's sum is always one warp's. */
template <class T>
__device__ __forceinline__ void stage_norm(const Linear &a, unsigned first, unsigned rows, T *staged, unsigned pitch,
                                           unsigned warp, unsigned lane) {
    constexpr unsigned UNIT = 16 / sizeof(T); /* elements of a 16-byte load */
    const bool shared_row = rows == 1;
    const unsigned place = shared_row ? threadIdx.x : lane, places = shared_row ? 32 * W : 32, k = (unsigned)a.k;
#pragma unroll 1
    for (unsigned r = shared_row ? 0 : warp; r < rows; r += W) {
        const T *x = (const T *)a.x + source(a, first + r) * k, *norm = (const T *)a.norm;
        T *to = staged + r * pitch;
        const float scale = norm_scale<T>(a.squares + source(a, first + r) * lla_square_columns(k), k, a.eps, lane);
        if (k % UNIT == 0) {
#pragma unroll 1
            for (unsigned i = place; i < k / UNIT; i += places)
                reinterpret_cast<uint4 *>(to)[i] = normed_unit<T>(reinterpret_cast<const uint4 *>(x)[i],
                                                                  reinterpret_cast<const uint4 *>(norm)[i], scale);
#pragma unroll 1
            for (unsigned i = k + place; i < pitch; i += places) to[i] = from_float<T>(0.0f);
        } else {
            for (unsigned i = place; i < pitch; i += places)
                to[i] = i < k ? normed<T>(x[i], norm[i], scale) : from_float<T>(0.0f);
        }
    }
}

/* staged [rows, pitch] = rows first .. first + rows of x as they are. */
template <class T> __device__ void stage_plain(const Linear &a, size_t first, size_t rows, T *staged, size_t pitch) {
    constexpr int UNIT = 16 / sizeof(T);
    if (a.k % UNIT == 0) {
        const size_t units = a.k / UNIT;
#pragma unroll 4
        for (size_t i = threadIdx.x; i < rows * units; i += 32 * W)
            reinterpret_cast<uint4 *>(staged + i / units * pitch)[i % units] =
                reinterpret_cast<const uint4 *>((const T *)a.x + source(a, first + i / units) * a.k)[i % units];
        for (size_t i = threadIdx.x; i < rows * (pitch - a.k); i += 32 * W)
            staged[i / (pitch - a.k) * pitch + a.k + i % (pitch - a.k)] = from_float<T>(0.0f);
    } else {
        for (size_t i = threadIdx.x; i < rows * pitch; i += 32 * W) {
            const size_t r = i / pitch, c = i % pitch;
            staged[i] = c < a.k ? ((const T *)a.x)[source(a, first + r) * a.k + c] : from_float<T>(0.0f);
        }
    }
}

/* Up to eight rows a block (blockIdx.y chooses which); row tiles blockIdx.x, + gridDim.x, ... STAGED: the rows of x go
 * to shared memory first, normed where there is a norm; otherwise they are read where they lie. */
template <class T, Epilogue E, bool STAGED> __global__ void __launch_bounds__(32 * W, 2) linear_kernel(const Linear a) {
    LLA_DYNAMIC_SHARED(smem, 16);
    __shared__ Slot slots[E == QKV ? COLS : 1];
    float *sums = reinterpret_cast<float *>(smem);                           /* [W][16][COLS] */
    T *staged = reinterpret_cast<T *>(smem + W * 16 * COLS * sizeof(float)); /* [rows][pitch] */
    const unsigned warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const unsigned ktiles = (unsigned)tiles_of(a.k), pitch = ktiles * LLA_TILE + 16 / sizeof(T);
    const unsigned ntiles = (unsigned)(a.half ? (a.n / 2 + 7) / 8 : tiles_of(a.n));
    const unsigned k_first = ktiles * warp / W, k_last = ktiles * (warp + 1) / W;
    const unsigned batches = ((ktiles + W - 1) / W + DEPTH - 1) / DEPTH; /* enough for the longest part */

    /* Two sets of registers take turns: one is multiplied while the other is filled. */
    Weights<T> even[DEPTH], odd[DEPTH];
    unsigned tile = blockIdx.x, batch = 0;     /* what is multiplied next */
    unsigned next_tile = tile, next_batch = 0; /* what is requested next */
    auto request = [&](Weights<T>(&to)[DEPTH]) {
#pragma unroll
        for (int d = 0; d < DEPTH; d++) {
            const unsigned kt = k_first + next_batch * DEPTH + d;
            if (next_tile < ntiles && kt < k_last)
                to[d].load((const T *)a.w + (size_t)((next_tile * ktiles + kt) * 32 + lane) * 8);
            else
                to[d].clear();
        }
        if (++next_batch == batches) {
            next_batch = 0;
            next_tile += gridDim.x;
        }
    };
    note(a.trace, LLA_BLOCK_BEGAN);
    pdl_launch_next();
    request(even);
    request(odd);
    /* step inputs were there before the step's first kernel began */
    const size_t total = a.by_logit ? (size_t)a.header->nlogit : (size_t)a.header->nrow,
                 first = blockIdx.y * (size_t)COLS;
    const size_t rows = first >= total ? 0 : total - first < COLS ? total - first : COLS;
    if (E == QKV && threadIdx.x < rows) slots[threadIdx.x] = slot_of(a, first + threadIdx.x);
    if (E == QKV && threadIdx.x / 8 < rows)
        prepare<T, E, true>(a, first + threadIdx.x / 8, tile, threadIdx.x % 8, Slot{});
    if (STAGED && a.norm && threadIdx.x * 128 < a.k * sizeof(T)) prefetch_l1((const char *)a.norm + threadIdx.x * 128);
    pdl_wait();
    note(a.trace, LLA_BLOCK_FREE);
    if (!rows) return;
    if (STAGED) {
        if (a.norm)
            stage_norm<T>(a, first, rows, staged, pitch, warp, lane);
        else
            stage_plain<T>(a, first, rows, staged, pitch);
        __syncthreads();
        note(a.trace, LLA_BLOCK_STAGED);
    }
    /* the row that this lane feeds to the product, and (f32) the two whose sums it holds; columns beyond the last row
     * repeat it, and nobody looks at them */
    auto row_at = [&](size_t r) -> const T * {
        r = r < rows ? r : rows - 1;
        return STAGED ? staged + r * pitch : (const T *)a.x + source(a, first + r) * a.k;
    };
    const T *row = row_at(lane / 4), *pair[2] = {row_at(lane % 4 * 2), row_at(lane % 4 * 2 + 1)};
    const unsigned end = STAGED ? ktiles * LLA_TILE : (unsigned)a.k;

    float acc[4] = {};
    Operands operands = {}; /* of this thread's output */
    const int my_g = threadIdx.x % 8, my_col = threadIdx.x / 8;
    auto multiply = [&](const Weights<T>(&w)[DEPTH]) {
        if (batch == 0 && (size_t)my_col < rows)
            operands = prepare<T, E, false>(a, first + my_col, tile, my_g, slots[E == QKV ? my_col : 0]);
#pragma unroll
        for (int d = 0; d < DEPTH; d++) {
            /* beyond the warp's part the weights are zeros, and any columns do */
            const unsigned kt = min(k_first + batch * DEPTH + d, ktiles - 1);
            Multiply<T, STAGED>::run(acc, w[d], row, kt * LLA_TILE, end, lane, pair);
        }
        if (++batch < batches) return;
        /* the parts of K meet: c0, c1 of the fragment are rows g, columns 2t and 2t + 1; c2, c3 rows g + 8 */
#pragma unroll
        for (int c = 0; c < 4; c++) {
            const unsigned r = lane / 4 + (c >= 2 ? 8 : 0), col = lane % 4 * 2 + c % 2;
            sums[(warp * 16 + r) * COLS + col] = acc[c];
            acc[c] = 0;
        }
        __syncthreads();
        const bool is_mine = (size_t)my_col < rows;
        float two_squares = 0;
        if (is_mine) {
            float low = sums[my_g * COLS + my_col], high = sums[(my_g + 8) * COLS + my_col];
            for (int part = 1; part < W; part++) {
                low += sums[(part * 16 + my_g) * COLS + my_col];
                high += sums[(part * 16 + my_g + 8) * COLS + my_col];
            }
            two_squares = finish<T, E>(a, first + my_col, tile, my_g, low, high, operands);
        }
        if (E == ADD) finish_squares<1>(a, is_mine, first + my_col, tile, my_g, two_squares);
        __syncthreads();
        tile += gridDim.x;
        batch = 0;
    };
    while (tile < ntiles) {
        multiply(even);
        request(even);
        if (tile >= ntiles) break;
        multiply(odd);
        request(odd);
    }
    note(a.trace, LLA_BLOCK_ENDED);
}

/* Bytes of shared memory of a block, for the rows that the bucket can have. */
template <class T, Epilogue E> size_t shared_bytes(const Linear &a, bool staged) {
    const size_t pitch = tiles_of(a.k) * LLA_TILE + 16 / sizeof(T), rows = a.max_rows < COLS ? a.max_rows : COLS;
    return W * 16 * COLS * sizeof(float) + (staged ? rows * pitch * sizeof(T) : 0);
}

template <class T, Epilogue E, bool STAGED>
lla_status launch_linear(const lla_cuda_ctx *ctx, const char *name, const Linear &a) {
    const size_t ntiles = a.half ? (a.n / 2 + 7) / 8 : tiles_of(a.n), smem = shared_bytes<T, E>(a, STAGED);
    const size_t resident = (size_t)ctx->sm_count * (smem <= ctx->max_smem / 2 ? 2 : 1);
    const dim3 grid((unsigned)(ntiles < resident ? ntiles : resident), (unsigned)((a.max_rows + COLS - 1) / COLS));
    return launch(ctx, name, linear_kernel<T, E, STAGED>, grid, 32 * W, smem, a);
}

} // namespace

template <class T, Epilogue E> lla_status linear_any(const lla_cuda_ctx *ctx, const char *name, const Linear &a) {
    if (shared_bytes<T, E>(a, true) + COLS * sizeof(Slot) <= ctx->max_smem)
        return launch_linear<T, E, true>(ctx, name, a);
    if (!a.norm) return launch_linear<T, ADD, false>(ctx, name, a); /* can do without shared memory */
    return lla_fail(LLA_ELIMIT, "%s: eight rows of %zu elements do not fit in %zu bytes of shared memory", name, a.k,
                    ctx->max_smem);
}

#define INSTANTIATE(T)                                                                                                 \
    template lla_status linear_any<T, QKV>(const lla_cuda_ctx *, const char *, const Linear &);                        \
    template lla_status linear_any<T, ADD>(const lla_cuda_ctx *, const char *, const Linear &);                        \
    template lla_status linear_any<T, SWIGLU>(const lla_cuda_ctx *, const char *, const Linear &);                     \
    template lla_status linear_any<T, STORE>(const lla_cuda_ctx *, const char *, const Linear &);
INSTANTIATE(float)
INSTANTIATE(__half)
INSTANTIATE(__nv_bfloat16)
