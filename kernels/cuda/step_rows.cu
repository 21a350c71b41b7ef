/* step_rows.cu: embedding, greedy choice, and the packing of weights. */
#include "step_draw.cuh"
#include "step_math.cuh"

namespace {

struct embed_inputs {
    const lla_step_header *header;
    const int32_t *tokens, *fed, *positions, *row_seq, *table;
    size_t max_blocks, kv_block;
};

template <class T>
__global__ void __launch_bounds__(THREADS)
    embed_kernel(embed_inputs in, const T *weight, size_t hidden, T *x, float *squares_of_x, int32_t *kv_tokens,
                 unsigned long long *best) {
    pdl_launch_next();
    pdl_wait();
    const size_t row = blockIdx.x, ktiles = tiles_of(hidden);
    if (row >= (size_t)in.header->nrow) return;
    const int32_t given = in.tokens[row], token = given < 0 ? in.fed[~given] : given;
    const size_t columns = lla_square_columns(hidden);
    for (size_t i = threadIdx.x; i < columns * 8; i += THREADS) { /* eight threads 16 columns, whole warps */
        const size_t low = i / 8 * LLA_TILE + i % 8, high = low + 8;
        T of_low = from_float<T>(0.0f), of_high = of_low;
        if (low < hidden) x[row * hidden + low] = of_low = weight[packed_index((size_t)token, low, ktiles, 0)];
        if (high < hidden) x[row * hidden + high] = of_high = weight[packed_index((size_t)token, high, ktiles, 0)];
        const float sum = sum_of_eight<1>(squares(to_float<T>(of_low), to_float<T>(of_high)));
        if (i % 8 == 0) squares_of_x[row * columns + i / 8] = sum;
    }
    if (threadIdx.x == 0) {
        if (row < (size_t)in.header->nlogit) best[row] = 0;
        const size_t position = (size_t)in.positions[row];
        const size_t block = (size_t)in.table[(size_t)in.row_seq[row] * in.max_blocks + position / in.kv_block];
        kv_tokens[block * in.kv_block + position % in.kv_block] = token;
    }
}

/* The best of the block's threads, on thread 0. */
__device__ void best_of_block(float &best, int32_t &where) {
    __shared__ float values[WARPS];
    __shared__ int32_t indices[WARPS];
    for (int o = 16; o; o /= 2) {
        const float v = __shfl_xor_sync(~0u, best, o);
        const int32_t i = __shfl_xor_sync(~0u, where, o);
        if (better(v, i, best, where)) best = v, where = i;
    }
    if (threadIdx.x % 32 == 0) values[threadIdx.x / 32] = best, indices[threadIdx.x / 32] = where;
    __syncthreads();
    if (threadIdx.x == 0)
        for (int w = 1; w < WARPS; w++)
            if (better(values[w], indices[w], best, where)) best = values[w], where = indices[w];
}

constexpr unsigned SLICES = 32; /* blocks that share a row of logits */

/* The largest logit of each plain row: the head's, where it found one. Else every block takes a slice of the row, the
 * last to arrive the best of the slices' bests. `candidates` has room for SLICES entries a row, row_stride apart. */
template <class T>
__global__ void __launch_bounds__(THREADS)
    sample_kernel(const lla_step_header *header, const lla_sampling_row *sampling, const T *logits, size_t n,
                  lla_candidate *candidates, size_t row_stride, const unsigned long long *found, int32_t *arrived,
                  int32_t *next) {
    __shared__ bool is_last;
    pdl_launch_next();
    pdl_wait();
    const size_t row = blockIdx.y;
    if (row >= (size_t)header->nlogit || !lla_is_plain(&sampling[row])) return;
    if (const unsigned long long key = found[row]) {
        if (blockIdx.x == 0 && threadIdx.x == 0) next[row] = (int32_t)~(uint32_t)key;
        return;
    }
    constexpr int UNIT = 16 / sizeof(T);
    const T *values = logits + row * n;
    float best = -INFINITY;
    int32_t where = 0x7fffffff;
    const bool wide = n % UNIT == 0;
    const size_t step = (size_t)SLICES * THREADS, place = blockIdx.x * (size_t)THREADS + threadIdx.x;
    if (wide) {
#pragma unroll 4
        for (size_t i = place; i < n / UNIT; i += step) {
            const uint4 raw = reinterpret_cast<const uint4 *>(values)[i];
#pragma unroll
            for (int e = 0; e < UNIT; e++) {
                const float v = to_float<T>(reinterpret_cast<const T *>(&raw)[e]);
                if (better(v, (int32_t)(i * UNIT + e), best, where)) best = v, where = (int32_t)(i * UNIT + e);
            }
        }
    } else {
        for (size_t i = place; i < n; i += step) {
            const float v = to_float<T>(values[i]);
            if (better(v, (int32_t)i, best, where)) best = v, where = (int32_t)i;
        }
    }
    best_of_block(best, where);
    lla_candidate *slices = candidates + row * row_stride;
    if (threadIdx.x == 0) {
        slices[blockIdx.x] = lla_candidate{best, where};
        __threadfence();
        is_last = atomicAdd(&arrived[row], 1) == (int32_t)SLICES - 1;
        if (is_last) arrived[row] = 0;
        __threadfence();
    }
    __syncthreads();
    if (!is_last || threadIdx.x >= 32) return;
    static_assert(SLICES == 32, "one warp takes one slice a lane");
    best = __ldcg(&slices[threadIdx.x].value);
    where = __ldcg(&slices[threadIdx.x].token);
    for (int o = 16; o; o /= 2) {
        const float v = __shfl_xor_sync(~0u, best, o);
        const int32_t i = __shfl_xor_sync(~0u, where, o);
        if (better(v, i, best, where)) best = v, where = i;
    }
    if (threadIdx.x == 0) next[row] = where;
}

template <class T>
__global__ void pack_kernel(const T *src, size_t rows, size_t cols, size_t dst_row, size_t half, T *packed) {
    const size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= rows * cols) return;
    packed[packed_index(dst_row + i / cols, i % cols, tiles_of(cols), half)] = src[i];
}

} // namespace

lla_status lla_cuda_embed(const lla_cuda_ctx *ctx, const lla_embed_args *args) {
    char *arena = ctx->arena;
    const lla_io *io = &ctx->io;
    const embed_inputs in = {.header = (const lla_step_header *)(arena + io->header),
                             .tokens = (const int32_t *)(arena + io->tokens),
                             .fed = (const int32_t *)(arena + io->fed),
                             .positions = (const int32_t *)(arena + io->positions),
                             .row_seq = (const int32_t *)(arena + io->row_seq),
                             .table = (const int32_t *)(arena + io->block_table),
                             .max_blocks = ctx->dims.max_blocks,
                             .kv_block = ctx->dims.kv_block};
    LLA_CUDA_BY_DTYPE(ctx->dims.dtype,
                      return launch(ctx, "embed", embed_kernel<T>, dim3((unsigned)ctx->rows), THREADS, 0, in,
                                    (const T *)(arena + args->weight), ctx->dims.hidden, (T *)(arena + args->x),
                                    (float *)(arena + io->squares), (int32_t *)(arena + io->kv_tokens),
                                    (unsigned long long *)(arena + io->best)));
}

/* Plain rows, then the others: each kernel leaves at once where a row is not its own. */
lla_status lla_cuda_sample(const lla_cuda_ctx *ctx, const lla_sample_args *args) {
    char *arena = ctx->arena;
    lla_status status = LLA_OK;
    LLA_CUDA_BY_DTYPE(ctx->dims.dtype,
                      status = launch(ctx, "sample", sample_kernel<T>, dim3(SLICES, (unsigned)ctx->logits), THREADS, 0,
                                      (const lla_step_header *)(arena + ctx->io.header),
                                      (const lla_sampling_row *)(arena + ctx->io.sampling),
                                      (const T *)(arena + args->logits), ctx->dims.vocab,
                                      (lla_candidate *)(arena + args->candidates),
                                      ctx->dims.vocab > SLICES ? ctx->dims.vocab : (size_t)SLICES,
                                      (const unsigned long long *)(arena + ctx->io.best),
                                      (int32_t *)(arena + ctx->io.arrived), (int32_t *)(arena + ctx->io.next)));
    return status ? status : lla_cuda_draw(ctx, args);
}

size_t lla_cuda_packed_bytes(llaisysDataType_t dtype, size_t rows, size_t cols) {
    return tiles_of(rows) * tiles_of(cols) * LLA_TILE * LLA_TILE * lla_dtype_size(dtype);
}

lla_status lla_cuda_pack(llaisysDataType_t dtype, const void *src, size_t rows, size_t cols, size_t dst_row,
                         size_t half, void *packed, void *stream) {
    if (!rows || !cols) return LLA_OK;
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3((unsigned)((rows * cols + 255) / 256));
    config.blockDim = dim3(256);
    config.stream = (cudaStream_t)stream;
    cudaError_t e;
    LLA_CUDA_BY_DTYPE(
        dtype, e = cudaLaunchKernelEx(&config, pack_kernel<T>, (const T *)src, rows, cols, dst_row, half, (T *)packed));
    if (e != cudaSuccess) return lla_fail(LLA_EDEVICE, "pack: launch failed: %s", cudaGetErrorString(e));
    return LLA_OK;
}
