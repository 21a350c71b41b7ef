/* step_attention.cu: attention of the step's rows over KV blocks: flash-decoding by splits of LLA_CUDA_SPLIT tokens, on
 * the tensor cores (attention_tile.cuh), row by row (step_attention_rows.cuh). Steps of many rows, among which there
 * may be prompts, go to step_flash.cu. */
#include "step_attention_rows.cuh"
#include "step_many.h"

namespace {

template <class T, int DIM, int W>
__global__ void __launch_bounds__(32 * W, 1) rows_kernel(const Attention a, float scale) {
    LLA_DYNAMIC_SHARED(smem, 16);
    note(a.trace, LLA_BLOCK_BEGAN);
    pdl_launch_next();
    Jobs jobs(a);
    if (!jobs.are_alone) jobs.count_splits();
    attend_rows<T, DIM, W>(a, smem, jobs, scale);
    /* A kernel ends only after those before it, so that a wait for it is a wait for all; but blocks without work make
     * room for the next kernel's. */
    if (blockIdx.x == 0) pdl_wait();
}

template <class T, int DIM, int W> lla_status launch_rows(const lla_cuda_ctx *ctx, const Attention &a) {
    const size_t most = ctx->rows * a.per_run * (a.max_blocks * a.kv_block / SPLIT + 1), /* jobs of a step */
        resident = (size_t)ctx->sm_count;
    return launch(ctx, "attention", rows_kernel<T, DIM, W>, dim3((unsigned)(most < resident ? most : resident)), 32 * W,
                  sizeof(RowsMemory<T, DIM, W>), a, attention_scale(DIM));
}

template <class T, int DIM> lla_status launch_attention(const lla_cuda_ctx *ctx, const Attention &a) {
    if (sizeof(RowsMemory<T, DIM, 6>) <= ctx->max_smem) return launch_rows<T, DIM, 6>(ctx, a);
    if (sizeof(RowsMemory<T, DIM, 4>) <= ctx->max_smem) return launch_rows<T, DIM, 4>(ctx, a);
    static_assert(sizeof(RowsMemory<T, DIM, 2>) <= 99 * 1024, "every GPU from sm_80 on gives a block so much");
    return launch_rows<T, DIM, 2>(ctx, a);
}

} // namespace

lla_status lla_cuda_attention(const lla_cuda_ctx *ctx, const lla_attention_args *args) {
    const lla_dims &d = ctx->dims;
    char *arena = ctx->arena;
    Attention a = {};
    a.trace = ctx->trace;
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
    a.max_rows = (unsigned)ctx->rows;
    a.group = (unsigned)(d.nhead / d.nkvhead);
    a.chunks = (a.group + HEADS - 1) / HEADS;
    a.per_run = (unsigned)d.nkvhead * a.chunks;
    while ((size_t)1 << a.block_bits < d.kv_block) a.block_bits++;
    if (lla_many_attention_takes(ctx)) return lla_many_attention(ctx, a);
    if (d.dtype == LLAISYS_DTYPE_BF16 && d.head_dim == 128) return launch_attention<__nv_bfloat16, 128>(ctx, a);
    if (d.dtype == LLAISYS_DTYPE_BF16 && d.head_dim == 64) return launch_attention<__nv_bfloat16, 64>(ctx, a);
    if (d.dtype == LLAISYS_DTYPE_F16 && d.head_dim == 128) return launch_attention<__half, 128>(ctx, a);
    if (d.dtype == LLAISYS_DTYPE_F16 && d.head_dim == 64) return launch_attention<__half, 64>(ctx, a);
    return lla_cuda_attention_any(ctx, a);
}
