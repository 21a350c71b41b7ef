/* step_flash.cu: attention for steps of many rows. Rows that are alone of their sequence come first, row by row
 * (step_attention_rows.cuh). Of the others, prompts, a block takes some consecutive rows of one sequence and all query
 * heads of a KV head, and walks the sequence's keys and values once for them.
 *
 * The order of sums is the one that all attention of the step keeps (step_attention.cu): splits of LLA_CUDA_SPLIT
 * tokens from position 0. Within a split, scores, output and the sum of weights come from the tensor core, from zero,
 * and weights are relative to the split's own maximum:
 *
 *     s = q k^T (log2(e) / sqrt(head_dim));  m = max s;  p = round(2^(s - m));  l = sum p;  o = p v
 *
 * and splits are merged in order: M' = max(M, m), a = 2^(M - M'), b = 2^(m - M'); O = O a + o b, L = L a + l b. Tokens
 * behind a row's own have p = 0; their values are zeros, or those of later rows of the step.
 *
 * Rows of the block's matrix: row m is query head m % group of the step's row m / group. A warp has 32 of them: what it
 * reads of keys and values then feeds two tensor core operands. */
#include "step_flash.cuh"
#include "step_flash_sm90.cuh"
#include "step_many.h"

namespace {

/* ---- the kernel ---- */

/* Byte offset of unit u (16 bytes) of row r in a matrix of DIM columns in shared memory: the eight rows of an 8 x 8
 * matrix lie in different banks. */
template <int DIM> __device__ __forceinline__ unsigned place_of(unsigned r, unsigned u) {
    return r * (DIM * 2) + (u ^ (r % 8)) * 16;
}

enum { FLASH_WARPS = 4, FLASH_THREADS = 32 * FLASH_WARPS, FLASH_ROW_WARPS = 2 /* that take single rows */ };

/* q [TILE_ROWS, DIM]; twice: k, v [SPLIT, DIM]; places; behind it a survey */
template <int DIM>
constexpr size_t FLASH_SMEM = TILE_ROWS * DIM * 2 + 4 * SPLIT * DIM * 2 + 4 * SPLIT * sizeof(uint32_t);

template <class T, int DIM>
__global__ void __launch_bounds__(FLASH_THREADS, 2) flash_kernel(const Attention by_row, const Flash a) {
    LLA_DYNAMIC_SHARED(smem, 128);
    constexpr unsigned UNITS = DIM / 8, PASS = FLASH_THREADS / UNITS; /* rows that all threads copy at once */
    constexpr unsigned Q_BYTES = TILE_ROWS * DIM * 2, KV_BYTES = SPLIT * DIM * 2;
    static_assert(SPLIT % PASS == 0 && TILE_ROWS % PASS == 0 && PASS % 8 == 0, "every thread copies as many units");
    const unsigned warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const unsigned most = TILE_ROWS / a.group;
    note(by_row.trace, LLA_BLOCK_BEGAN);
    pdl_launch_next();
    Survey &survey = *reinterpret_cast<Survey *>(smem + FLASH_SMEM<DIM>);
    /* Step inputs were there before the step's first kernel began. */
    const unsigned tiles = survey_and_attend_rows<T, DIM, FLASH_ROW_WARPS>(by_row, a, most, smem, survey);
    /* A kernel ends only after those before it, so that a wait for it is a wait for all. */
    if (blockIdx.x == 0) pdl_wait();
    for (unsigned turn = 0; order_of(turn) < tiles; turn++) {
        const unsigned order = order_of(turn), kvhead = order % a.nkvhead;
        const Rows rows = find_rows(a, order / a.nkvhead, most, survey);
        __syncthreads(); /* nobody reads the memory any more */
        pdl_wait();
        const unsigned length = rows.position + rows.count; /* tokens that the last row sees */
        const int32_t *table = a.table + (size_t)a.row_seq[rows.first] * a.max_blocks;
        const uint32_t q_base = shared_address(smem), kv_base = q_base + Q_BYTES;

        const unsigned copy_row = threadIdx.x / UNITS, copy_unit = threadIdx.x % UNITS;
        const uint32_t copy_to = place_of<DIM>(copy_row, copy_unit);
#pragma unroll
        for (unsigned i = 0; i < TILE_ROWS / PASS; i++) {
            const unsigned m = copy_row + i * PASS, row = m / a.group, head = kvhead * a.group + m % a.group;
            const T *from = (const T *)a.q + ((size_t)(rows.first + row) * a.nhead + head) * DIM + copy_unit * 8;
            cp_async_16(q_base + copy_to + i * PASS * (DIM * 2), from, row < rows.count);
        }
        /* Where the tokens of a split lie: row numbers of the cache, a split ahead of their use. */
        auto *const places = reinterpret_cast<uint32_t (*)[SPLIT]>(smem + Q_BYTES + 4 * KV_BYTES); /* [4, SPLIT] */
        const auto find_places = [&](unsigned split) {
            const unsigned position = split * SPLIT + threadIdx.x;
            if (threadIdx.x < SPLIT && position < length)
                places[split % 4][threadIdx.x] = cache_row(a, table, kvhead, position);
        };
        const auto copy_split = [&](unsigned split) {
            const uint32_t to = kv_base + split % 2 * (2 * KV_BYTES) + copy_to;
#pragma unroll
            for (unsigned i = 0; i < SPLIT / PASS; i++) {
                const unsigned token = copy_row + i * PASS;
                const bool inside =
                    split * SPLIT + token < length; /* values behind the end must not be what was before */
                const size_t at = inside ? (size_t)places[split % 4][token] * DIM + copy_unit * 8 : 0;
                cp_async_16(to + i * PASS * (DIM * 2), (const T *)a.k_cache + at, inside);
                cp_async_16(to + KV_BYTES + i * PASS * (DIM * 2), (const T *)a.v_cache + at, inside);
            }
            cp_async_commit();
        };
        find_places(0);
        find_places(1);
        __syncthreads();
        copy_split(0);

        unsigned last[2][2]; /* the last positions that this thread's rows see */
        RowSums sums[2];
        float o[2][DIM / 8][4] = {};
#pragma unroll
        for (int i = 0; i < 2; i++)
#pragma unroll
            for (int h = 0; h < 2; h++) {
                const unsigned row = (warp * 32 + i * 16 + h * 8 + lane / 4) / a.group;
                last[i][h] = rows.position + (row < rows.count ? row : rows.count - 1);
                sums[i].max[h] = -INFINITY;
                sums[i].sum[h] = 0;
            }
        /* operands by ldmatrix: q: rows 0-15 lower columns, then upper; k: rows 0-7 lower, 0-7 upper, 8-15 lower, 8-15
         * upper; v, transposed: rows 0-15 of lower columns, then of upper */
        const uint32_t q_at = q_base + (warp * 32 + lane % 16) * (DIM * 2),
                       k_at = (lane % 8 + lane / 16 * 8) * (DIM * 2), v_at = KV_BYTES + lane % 16 * (DIM * 2);

        for (unsigned split = 0; split * SPLIT < length; split++) {
            cp_async_wait<0>();
            __syncthreads(); /* the split is there for all, and nobody reads the one before */
            if ((split + 1) * SPLIT < length) copy_split(split + 1);
            find_places(split + 2);
            const uint32_t kv = kv_base + split % 2 * (2 * KV_BYTES);

            float s[2][SPLIT / 8][4] = {};
#pragma unroll
            for (unsigned d = 0; d < DIM / 16; d++) {
                uint4 q[2];
#pragma unroll
                for (int i = 0; i < 2; i++)
                    q[i] = ldmatrix_x4(q_at + i * 16 * (DIM * 2) + ((2 * d + lane / 16) ^ (lane % 8)) * 16);
#pragma unroll
                for (int j = 0; j < SPLIT / 16; j++) {
                    const uint4 k =
                        ldmatrix_x4(kv + k_at + j * 16 * (DIM * 2) + ((2 * d + lane / 8 % 2) ^ (lane % 8)) * 16);
#pragma unroll
                    for (int i = 0; i < 2; i++) {
                        mma_16816<T>(s[i][2 * j], q[i], make_uint2(k.x, k.y));
                        mma_16816<T>(s[i][2 * j + 1], q[i], make_uint2(k.z, k.w));
                    }
                }
            }

            const bool is_edge =
                (split + 1) * SPLIT > rows.position; /* some row does not see all tokens of the split */
            uint4 p[2][SPLIT / 16];
#pragma unroll
            for (int i = 0; i < 2; i++) weigh<T>(s[i], a.scale, is_edge, split * SPLIT, last[i], sums[i], p[i]);

            /* 32 columns of the output at a time */
#pragma unroll
            for (unsigned d = 0; d < DIM / 32; d++) {
                float po[2][4][4] = {};
#pragma unroll
                for (int j = 0; j < SPLIT / 16; j++)
#pragma unroll
                    for (unsigned n = 0; n < 2; n++) {
                        const uint4 v = ldmatrix_x4_trans(kv + v_at + j * 16 * (DIM * 2) +
                                                          ((4 * d + 2 * n + lane / 16) ^ (lane % 8)) * 16);
#pragma unroll
                        for (int i = 0; i < 2; i++) {
                            mma_16816<T>(po[i][2 * n], p[i][j], make_uint2(v.x, v.y));
                            mma_16816<T>(po[i][2 * n + 1], p[i][j], make_uint2(v.z, v.w));
                        }
                    }
#pragma unroll
                for (int i = 0; i < 2; i++) merge(o[i] + 4 * d, po[i], sums[i]);
            }
        }
#pragma unroll
        for (int i = 0; i < 2; i++) write_rows<T, DIM>(a, rows, kvhead, warp * 32 + i * 16 + lane / 4, o[i], sums[i]);
    }
}

template <class T, int DIM> lla_status launch_flash(const lla_cuda_ctx *ctx, const Attention &by_row, const Flash &a) {
    const size_t sms = (size_t)ctx->sm_count, survey = survey_bytes(ctx->rows);
    if (has_wgmma(ctx) && FLASH_SM90_SMEM<T, DIM> + survey <= ctx->max_smem)
        return launch(ctx, "attention", flash_sm90_kernel<T, DIM>, dim3((unsigned)sms), FLASH_SM90_THREADS,
                      FLASH_SM90_SMEM<T, DIM> + survey, by_row, a);
    static_assert(sizeof(RowsMemory<T, DIM, FLASH_ROW_WARPS>) <= FLASH_SMEM<DIM>, "single rows fit where tiles do");
    /* Single rows that are cut want all blocks on the GPU at once: two on an SM where its memory is large enough, each
     * with 1 KB for CUDA itself. */
    const size_t resident = 2 * (FLASH_SMEM<DIM> + survey + 1024) <= ctx->max_smem + 1024 ? 2 : 1;
    return launch(ctx, "attention", flash_kernel<T, DIM>, dim3((unsigned)(resident * sms)), FLASH_THREADS,
                  FLASH_SMEM<DIM> + survey, by_row, a);
}

} // namespace

bool lla_many_attention_takes(const lla_cuda_ctx *ctx) {
    const lla_dims &d = ctx->dims;
    return ctx->rows > LLA_FEW_ROWS && d.dtype != LLAISYS_DTYPE_F32 && (d.head_dim == 64 || d.head_dim == 128) &&
           d.nhead / d.nkvhead <= TILE_ROWS && FLASH_SMEM<128> + survey_bytes(ctx->rows) <= ctx->max_smem;
}

lla_status lla_many_attention(const lla_cuda_ctx *ctx, const Attention &by_row) {
    const lla_dims &d = ctx->dims;
    Flash a = {};
    a.header = by_row.header;
    a.positions = by_row.positions;
    a.row_seq = by_row.row_seq;
    a.table = by_row.table;
    a.q = by_row.q;
    a.k_cache = by_row.k_cache;
    a.v_cache = by_row.v_cache;
    a.out = by_row.out;
    a.nhead = (unsigned)d.nhead;
    a.nkvhead = (unsigned)d.nkvhead;
    a.group = by_row.group;
    a.block_bits = by_row.block_bits;
    a.max_blocks = (unsigned)d.max_blocks;
    a.scale = attention_scale(d.head_dim);
    const bool is_wide = d.head_dim == 128;
    if (d.dtype == LLAISYS_DTYPE_BF16)
        return is_wide ? launch_flash<__nv_bfloat16, 128>(ctx, by_row, a)
                       : launch_flash<__nv_bfloat16, 64>(ctx, by_row, a);
    return is_wide ? launch_flash<__half, 128>(ctx, by_row, a) : launch_flash<__half, 64>(ctx, by_row, a);
}
