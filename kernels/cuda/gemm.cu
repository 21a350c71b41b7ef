/* gemm.cu: chooses how to compute a matrix product, and runs it. */
#include "gemm.cuh"

#include <stdio.h>

/* ---- the choice ---- */

struct TileSizes {
    const char *name;
    unsigned bm, bn, warps_m, warps_n, bk, stages;
};

static const TileSizes tile_sizes[LLA_GEMM_TILE_COUNT] = {
#define X(name, bm, bn, warps_m, warps_n, bk, stages) {#name, bm, bn, warps_m, warps_n, bk, stages},
    LLA_GEMM_TILES_TABLE(X)
#undef X
};

/* Cycles that the busiest SM takes, by a model whose constants were fitted to the figures in profiles/ops.md. A step of
 * 16 columns of a tile keeps the tensor cores busy for `mma` cycles and shared memory for `smem`; the two overlap in
 * part. */
static double tile_cycles(const TileSizes &t, size_t m, size_t n, size_t k, const lla_cuda_facts *facts) {
    /* on sm_90 a tensor core takes 6.5 cycles for an mma.m16n8k16; shared memory moves 128 bytes a cycle */
    const double mma = 6.5 * (t.bm / 16) * (t.bn / 8) / 4, warps = t.warps_m * t.warps_n;
    const double reads = warps * (t.bm / t.warps_m + t.bn / t.warps_n) * 32, writes = (t.bm + t.bn) * 32;
    const double step = 0.62 * (mma + (reads + writes) / 128);
    const size_t block_smem = static_cast<size_t>(t.stages) * (t.bm + t.bn) * t.bk * 2 + 1024;
    const size_t by_smem = facts->sm_smem / block_smem, by_registers = warps > 4 ? 1 : 2;
    const size_t resident = by_smem < 1 ? 1 : by_smem < by_registers ? by_smem : by_registers;
    const size_t q = ceil_div(ceil_div(m, t.bm) * ceil_div(n, t.bn), static_cast<size_t>(facts->sm_count));
    const size_t waves = ceil_div(q, resident);
    /* four warps alone hide little of their own latencies */
    const size_t alone = resident * warps > 4 && resident > 1 ? q % resident : 0;
    const double work = (static_cast<double>(q - alone) + 1.12 * static_cast<double>(alone)) * step;
    return work * static_cast<double>(ceil_div(k, t.bk) * t.bk / 16) + 6000 + 2000 * static_cast<double>(waves);
}

struct lla_gemm_choice lla_gemm_choose(llaisysDataType_t dtype, size_t m, size_t n, size_t k, bool is_wide,
                                       const struct lla_cuda_facts *facts) {
    struct lla_gemm_choice choice = {};
    const bool is_f32 = dtype == LLAISYS_DTYPE_F32;
    choice.kind = LLA_GEMM_SIMT;
    if (!is_wide || k == 0 || m > INT32_MAX || n > INT32_MAX || k > INT32_MAX) return choice;
    if (is_f32) {
        if (m <= LLA_GEMM_MAX_FEW_ROWS_F32) choice.kind = LLA_GEMM_FEW_F32;
        return choice;
    }
    if (m <= LLA_GEMM_MAX_FEW_ROWS) {
        choice.kind = LLA_GEMM_FEW_ROWS;
        choice.warps = n <= 4096 ? 16 : 8; /* few blocks: each needs more bytes under way */
        return choice;
    }
    double least = 0;
    for (int i = 0; i < LLA_GEMM_TILE_COUNT; i++) {
        const TileSizes &t = tile_sizes[i];
        if (static_cast<size_t>(t.stages) * (t.bm + t.bn) * t.bk * 2 > facts->max_smem) continue;
        const double cycles = tile_cycles(t, m, n, k, facts);
        if (choice.kind == LLA_GEMM_TILES && cycles >= least) continue;
        least = cycles;
        choice.kind = LLA_GEMM_TILES;
        choice.tile = static_cast<enum lla_gemm_tile>(i);
        choice.rows = static_cast<unsigned>(ceil_div(m, t.bm));
        choice.columns = static_cast<unsigned>(ceil_div(n, t.bn));
    }
    if (static_cast<uint64_t>(choice.rows) * choice.columns > INT32_MAX) choice.kind = LLA_GEMM_SIMT;
    return choice;
}

const char *lla_gemm_choice_text(struct lla_gemm_choice choice, char *text, size_t size) {
    switch (choice.kind) {
    case LLA_GEMM_TILES:
        snprintf(text, size, "tiles %s, %u x %u of them", tile_sizes[choice.tile].name, choice.rows, choice.columns);
        break;
    case LLA_GEMM_FEW_ROWS:
        snprintf(text, size, "few rows, %u warps", choice.warps);
        break;
    case LLA_GEMM_FEW_F32:
        snprintf(text, size, "few rows, f32");
        break;
    case LLA_GEMM_SIMT:
    default:
        snprintf(text, size, "f32 arithmetic");
    }
    return text;
}

/* ---- the product ---- */

/* No products to add: rows of the bias, or zeros. */
template <class T> __global__ void __launch_bounds__(256) bias_rows(size_t total, size_t n, const T *bias, T *out) {
    const size_t i = static_cast<size_t>(blockIdx.x) * 256 + threadIdx.x;
    if (i < total) out[i] = bias ? bias[i % n] : round_to<T>(0.0f);
}

static lla_status fill_with_bias(llaisysDataType_t dtype, const lla_gemm_args *a, cudaStream_t stream) {
    const size_t total = a->m * a->n;
    LLA_CUDA_DISPATCH(dtype, bias_rows<T><<<static_cast<unsigned>(ceil_div(total, 256)), 256, 0, stream>>>(
                                 total, a->n, static_cast<const T *>(a->bias), static_cast<T *>(a->out)));
    LLA_CUDA_LAUNCHED("linear: bias");
    return LLA_OK;
}

lla_status lla_cuda_op_linear(llaisysDataType_t dtype, size_t m, size_t n, size_t k, const void *x, const void *w,
                              const void *bias, void *out, cudaStream_t stream) {
    const struct lla_gemm_args args = {m, n, k, x, w, bias, out};
    if (m == 0 || n == 0) return LLA_OK;
    if (k == 0) return fill_with_bias(dtype, &args, stream);
    const struct lla_cuda_facts *facts;
    LLA_TRY(lla_cuda_facts_get(&facts));
    const bool is_wide = k % (16 / lla_dtype_size(dtype)) == 0 && aligned_16(x, w);
    const struct lla_gemm_choice choice = lla_gemm_choose(dtype, m, n, k, is_wide, facts);
    switch (choice.kind) {
    case LLA_GEMM_TILES:
        return dtype == LLAISYS_DTYPE_BF16 ? lla_gemm_tiles_bf16(&args, choice, stream)
                                           : lla_gemm_tiles_f16(&args, choice, stream);
    case LLA_GEMM_FEW_ROWS:
        return lla_gemm_few_rows(dtype, &args, choice.warps, stream);
    case LLA_GEMM_FEW_F32:
        return lla_gemm_few_f32(&args, stream);
    case LLA_GEMM_SIMT:
    default:
        return lla_gemm_simt(dtype, &args, stream);
    }
}
