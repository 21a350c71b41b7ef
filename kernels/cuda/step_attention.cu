/* step_attention.cu: attention of the step's rows over KV blocks: flash-decoding by splits of LLA_CUDA_SPLIT tokens, on
 * the tensor cores (attention_tile.cuh).
 *
 * A block takes one split of one row and KV head, with the query heads of the group. The split's unnormalised output,
 * maximum and sum go to `partial`; the last block of a row and KV head to arrive merges the splits, in order. Where a
 * step has more splits than `partial` holds (prompts), a block takes a whole row and merges as it goes: the same
 * numbers in the same order. */
#include "step_attention.cuh"
#include "step_many.h"

namespace {

/* Keys and values of positions [start + from, start + to) of one KV head go to shared memory in the background. */
template <class T, int DIM>
__device__ void stage_old(const Attention &a, SplitMemory<T, DIM> &s, const int32_t *table, size_t kvhead, size_t start,
                          int from, int to) {
    constexpr int UNITS = SplitMemory<T, DIM>::UNITS;
    for (int i = from * UNITS + threadIdx.x; i < to * UNITS; i += THREADS) {
        const int token = i / UNITS, unit = i % UNITS;
        const size_t at = cache_offset(table, start + token, a.nkvhead, a.kv_block, DIM) + kvhead * a.kv_block * DIM;
        cp_async_16(shared_address(&s.k[s.at(token, unit)]), (const T *)a.k_cache + at + unit * 8, true);
        cp_async_16(shared_address(&s.v[s.at(token, unit)]), (const T *)a.v_cache + at + unit * 8, true);
    }
}

template <class T, int DIM>
__device__ void store_partial(const Attention &a, const Partial &part, size_t slot, size_t head0, size_t heads,
                              int warp, int lane) {
    const int g = lane / 4, t = lane % 4;
#pragma unroll
    for (int h = 0; h < 2; h++) {
        if ((size_t)(2 * t + h) >= heads) continue;
        float *to = a.partial + (slot * a.nhead + head0 + 2 * t + h) * (DIM + 2);
        to[16 * warp + g] = part.o[h];
        to[16 * warp + g + 8] = part.o[h + 2];
        if (warp == 0 && g == 0) {
            to[DIM] = part.m[h];
            to[DIM + 1] = part.l[h];
        }
    }
}

/* The splits of a row's head, merged in order, for one dimension; `part` is the first split's. */
template <class T, int DIM> __device__ T merge_splits(const float *part, size_t nsplit, size_t stride, size_t d) {
    float o = __ldcg(part + d), m = __ldcg(part + DIM), l = __ldcg(part + DIM + 1);
#pragma unroll 4
    for (size_t split = 1; split < nsplit; split++) {
        part += stride;
        const Weighting w(m, __ldcg(part + DIM));
        o = w.merged(o, __ldcg(part + d));
        l = w.merged(l, __ldcg(part + DIM + 1));
        m = w.top;
    }
    return from_float<T>(o / l);
}

template <class T, int DIM>
__global__ void __launch_bounds__(THREADS, 2) attention_kernel(const Attention a, float scale) {
    extern __shared__ __align__(16) char smem[];
    SplitMemory<T, DIM> &s = *reinterpret_cast<SplitMemory<T, DIM> *>(smem);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;

    pdl_launch_next();
    /* Step inputs were there before the step's first kernel began, and so were keys and values of earlier steps. */
    const size_t rows = (size_t)a.header->nrow, group = a.nhead / a.nkvhead;
    const size_t nslot = locate(a.positions, rows, ~(size_t)0).slot0;
    const bool by_split = nslot <= a.max_splits;
    const size_t items = (by_split ? nslot : rows) * a.nkvhead;
    bool waited = false;

    for (size_t item = blockIdx.x; item < items; item += gridDim.x) {
        const size_t kvhead = item % a.nkvhead;
        Place p = {item / a.nkvhead, 0, 0, 0};
        if (by_split)
            p = locate(a.positions, rows, item / a.nkvhead);
        else
            p.nsplit = (size_t)a.positions[p.row] / SPLIT + 1;
        const size_t first = by_split ? p.split : 0, last = by_split ? p.split + 1 : p.nsplit;
        const size_t length = (size_t)a.positions[p.row] + 1;
        const int32_t *table = a.table + (size_t)a.row_seq[p.row] * a.max_blocks;
        int staged = 0; /* tokens of the first split that are on their way already */
        if (!waited) {
            const size_t start = first * SPLIT, old = first_new(a.positions, a.row_seq, p.row);
            staged = old <= start ? 0 : old - start < SPLIT ? (int)(old - start) : SPLIT;
            stage_old(a, s, table, kvhead, start, 0, staged);
            pdl_wait();
            waited = true;
        }

        for (size_t h0 = 0; h0 < group; h0 += HEADS) {
            const size_t heads = group - h0 < HEADS ? group - h0 : HEADS, head0 = kvhead * group + h0;
            const uint4 *q = reinterpret_cast<const uint4 *>((const T *)a.q + (p.row * a.nhead + head0) * DIM);
            for (int i = threadIdx.x; i < (int)heads * (DIM / 8); i += THREADS)
                *reinterpret_cast<uint4 *>(&s.q[i / (DIM / 8)][i % (DIM / 8) * 4]) = q[i];
            Partial sum;
            for (size_t split = first; split < last; split++) {
                const size_t start = split * SPLIT;
                const int count = length - start < SPLIT ? (int)(length - start) : SPLIT;
                stage_old(a, s, table, kvhead, start, staged < count ? staged : count, count);
                staged = 0;
                for (int i = count * (DIM / 8) + threadIdx.x; i < SPLIT * (DIM / 8); i += THREADS)
                    s.v[s.at(i / (DIM / 8), i % (DIM / 8))] = make_uint4(0, 0, 0, 0);
                cp_async_commit();
                cp_async_wait<0>();
                __syncthreads();
                const Partial part = attend<T, DIM>(s, warp, lane, count, scale, [] { __syncthreads(); });
                if (split == first)
                    sum = part;
                else
                    merge(sum, part);
                __syncthreads();
            }
            if (warp >= DIM / 16) continue;
            const int g = lane / 4, t = lane % 4;
            if (by_split && p.nsplit > 1) {
                store_partial<T, DIM>(a, sum, p.slot0 + p.split, head0, heads, warp, lane);
                continue;
            }
            for (int h = 0; h < 2; h++) {
                if ((size_t)(2 * t + h) >= heads) continue;
                T *out = (T *)a.out + (p.row * a.nhead + head0 + 2 * t + h) * DIM + 16 * warp + g;
                out[0] = from_float<T>(sum.o[h] / sum.l[h]);
                out[8] = from_float<T>(sum.o[h + 2] / sum.l[h]);
            }
        }
        if (!by_split || p.nsplit == 1) continue;
        if (!is_last_block(&a.arrived[p.row * a.nkvhead + kvhead], p.nsplit)) continue;
        for (size_t i = threadIdx.x; i < group * DIM; i += THREADS) {
            const size_t head = kvhead * group + i / DIM, d = i % DIM;
            ((T *)a.out)[(p.row * a.nhead + head) * DIM + d] = merge_splits<T, DIM>(
                a.partial + (p.slot0 * a.nhead + head) * (DIM + 2), p.nsplit, a.nhead * (DIM + 2), d);
        }
    }
    if (!waited) pdl_wait(); /* a kernel ends only after those before it, so that a wait for it is a wait for all */
}

template <class T, int DIM> lla_status launch_attention(const lla_cuda_ctx *ctx, const Attention &a) {
    const size_t smem = sizeof(SplitMemory<T, DIM>);
    const size_t most = ctx->rows * a.nkvhead * (a.max_blocks * a.kv_block / SPLIT + 1), /* items of a step */
        resident = 2 * (size_t)ctx->sm_count;                                            /* by its registers */
    return launch(ctx, "attention", attention_kernel<T, DIM>, dim3((unsigned)(most < resident ? most : resident)),
                  THREADS, smem, a, attention_scale(DIM));
}

} // namespace

lla_status lla_cuda_attention(const lla_cuda_ctx *ctx, const lla_attention_args *args) {
    if (lla_many_attention_takes(ctx)) return lla_many_attention(ctx, args);
    const lla_dims &d = ctx->dims;
    char *arena = ctx->arena;
    Attention a = {};
    a.header = (const lla_step_header *)(arena + ctx->io.header);
    a.positions = (const int32_t *)(arena + ctx->io.positions);
    a.row_seq = (const int32_t *)(arena + ctx->io.row_seq);
    a.table = (const int32_t *)(arena + ctx->io.block_table);
    a.q = arena + args->q;
    a.k_cache = arena + args->k_cache;
    a.v_cache = arena + args->v_cache;
    a.out = arena + args->out;
    a.partial = (float *)(arena + args->partial);
    a.arrived = (int32_t *)(arena + ctx->io.arrived);
    a.nhead = d.nhead;
    a.nkvhead = d.nkvhead;
    a.dim = d.head_dim;
    a.kv_block = d.kv_block;
    a.max_blocks = d.max_blocks;
    a.max_splits = d.max_splits;
    if (d.dtype == LLAISYS_DTYPE_BF16 && d.head_dim == 128) return launch_attention<__nv_bfloat16, 128>(ctx, a);
    if (d.dtype == LLAISYS_DTYPE_BF16 && d.head_dim == 64) return launch_attention<__nv_bfloat16, 64>(ctx, a);
    if (d.dtype == LLAISYS_DTYPE_F16 && d.head_dim == 128) return launch_attention<__half, 128>(ctx, a);
    if (d.dtype == LLAISYS_DTYPE_F16 && d.head_dim == 64) return launch_attention<__half, 64>(ctx, a);
    return lla_cuda_attention_any(ctx, a);
}
