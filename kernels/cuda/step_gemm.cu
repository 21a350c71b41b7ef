/* step_gemm.cu: the step's matrix products for many rows: norm, then x w^T on packed weights with what follows.
 *
 * Two kernels give the same bits: wgmma on sm_90a (step_gemm_sm90.cuh), mma.sync elsewhere. Either keeps two sets of
 * sums in registers, `part` of the current part of K and `total` of the parts before it: nodes.h has the order. That
 * second set bounds the tile, and the tile bounds the speed: with mma.sync a warp of WM x WN sums reads (WM + WN) 32
 * bytes of shared memory for every 16 columns, of 128 bytes that an SM moves in a cycle. */
#include "step_gemm.cuh"
#include "step_gemm_sm90.cuh"
#include "step_gemm_split.cuh"
#include "step_many.h"
#include "step_norm.cuh"

namespace {

/* ---- the product ---- */

template <class T, Epilogue E, class S>
__global__ void __launch_bounds__(S::THREADS_, S::RESIDENT) product_kernel(const Product a) {
    LLA_DYNAMIC_SHARED(smem, 16);
    constexpr int MI = S::MI, NI = S::NI, KT = S::KT;
    const unsigned warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const unsigned wm = warp / S::WARPS_N * MI, wn = warp % S::WARPS_N * (8 * NI);
    const unsigned pieces = ((a.k + 15) / 16 + KT - 1) / KT;
    pdl_launch_next();
    Ring<S> ring;
    ring.begin(a, smem);
    /* Goes on to the next piece: once it is there for all, nobody reads the one before, whose place is filled again. */
    const auto next_piece = [&] {
        cp_async_wait<S::STAGES - 2>();
        __syncthreads();
        ring.refill(a);
    };

    /* of x, lanes 0-7 give rows 0-7 lower columns, 8-15 rows 0-7 upper, 16-23 rows 8-15 lower, 24-31 rows 8-15 upper */
    const unsigned x_row = wn + lane % 8 + lane / 16 * 8;
    const uint32_t x_at = S::W_BYTES + x_row * S::ROW_BYTES, x_unit = place_of<S>(lane / 8 % 2, x_row);
    const uint32_t w_at = wm * KT * 512 + lane * 16;
    uint4 w[MI], x[NI / 2];

    for (unsigned tile = blockIdx.x; tile < ring.tiles; tile += gridDim.x) {
        float total[MI][NI][4] = {}, part[MI][NI][4] = {};
        Parts parts(a.k);
        next_piece();
#pragma unroll
        for (int j = 0; j < NI / 2; j++) x[j] = ldmatrix_x4(ring.reading + x_at + x_unit + j * 16 * S::ROW_BYTES);
#pragma unroll
        for (int i = 0; i < MI; i++) w[i] = load_shared_16(ring.reading + w_at + i * KT * 512);
        /* Multiplies k-tile kt - 1; each operand's register takes the next one's as soon as it is free. Behind K's end
         * the pieces are zeros, which change no sum. */
#pragma unroll 1
        for (unsigned kt = 1; kt <= pieces * KT; kt++) {
            const unsigned step = kt % KT;
            if (step == 0) {
                ring.reading = ring.after(ring.reading);
                if (kt < pieces * KT) next_piece();
            }
            const uint32_t next_w = ring.reading + w_at + step * 512,
                           next_x = ring.reading + x_at + (x_unit ^ (step * 32));
#pragma unroll
            for (int i = 0; i < MI; i++) {
#pragma unroll
                for (int j = 0; j < NI; j++) {
                    const uint4 &pair = x[j / 2];
                    mma_16816<T>(part[i][j], w[i], j % 2 ? make_uint2(pair.z, pair.w) : make_uint2(pair.x, pair.y));
                    if (i == MI - 1 && j % 2) x[j / 2] = ldmatrix_x4(next_x + j / 2 * 16 * S::ROW_BYTES);
                }
                w[i] = load_shared_16(next_w + i * KT * 512);
            }
            if (kt != parts.end) continue;
            parts.advance();
#pragma unroll
            for (int i = 0; i < MI; i++)
#pragma unroll
                for (int j = 0; j < NI; j++)
#pragma unroll
                    for (int c = 0; c < 4; c++) {
                        total[i][j][c] += part[i][j][c];
                        part[i][j][c] = 0;
                    }
        }
        finish<T, E, S>(a, total, tile / ring.columns * (S::BM / 16) + wm, tile % ring.columns * S::BN + wn, ring.rows,
                        lane);
    }
    cp_async_wait<0>();
}

/* ---- the choice of a tile ---- */

/* MI, NI, warps along weight rows and step rows, 16-column tiles of a piece, pieces of the ring, blocks on an SM. The
 * first is for GPUs whose blocks can have 160 KB of shared memory, the second has the same sums in less. */
using Large = Tile<3, 8, 4, 2, 4, 4, 1>;
using LargeShallow = Tile<3, 8, 4, 2, 2, 4, 1>;
using Small = Tile<2, 4, 2, 2, 4, 3, 2>;
/* The same for wgmma. */
using WideLarge = Tile<1, 24, 8, 1, 4, 5, 1>;
using WideTall = Tile<1, 16, 12, 1, 4, 5, 1>;
using WideMiddle = Tile<1, 16, 8, 1, 4, 6, 1>;
using WideSmall = Tile<1, 8, 4, 1, 4, 4, 3>;
using WideLone = Tile<1, 8, 4, 1, 4, 12, 1>; /* the same, if an SM has only one of them */
using Wide32 = Tile<1, 4, 4, 1, 4, 6, 3>;    /* for up to 32 rows, and up to 16 */
using Wide16 = Tile<1, 2, 4, 1, 4, 7, 3>;

/* A tile of four warps' height that a warp has in one piece is wgmma's. */
template <class S> constexpr bool is_wgmma = S::MI == 1 && S::WARPS_N == 1;

template <class T, Epilogue E, class S, bool PACED = false>
lla_status launch_product(const lla_cuda_ctx *ctx, const char *name, const Product &a) {
    const size_t tiles = (tiles_of(a.n) * 16 + S::BM - 1) / S::BM * ((a.max_rows + S::BN - 1) / S::BN);
    const size_t resident = (size_t)ctx->sm_count * S::RESIDENT;
    const dim3 grid((unsigned)(tiles < resident ? tiles : resident));
    if constexpr (is_wgmma<S>) {
        CUtensorMap w, x;
        LLA_TRY(map_product<S>(a, a.max_rows, &w, &x));
        const auto kernel =
            tiles_of(a.k) % (2 * PARTS) ? wgmma_kernel<T, E, S, 1, PACED> : wgmma_kernel<T, E, S, 2, PACED>;
        return launch(ctx, name, kernel, grid, S::THREADS_ + FILLERS<S>, S::SMEM, a, w, x);
    } else {
        return launch(ctx, name, product_kernel<T, E, S>, grid, S::THREADS_, S::SMEM, a);
    }
}

/* K over a cluster, a tile for each, if the GPU has so many clusters at once and it is not done yet. */
template <class T, Epilogue E, class S>
lla_status launch_split(const lla_cuda_ctx *ctx, const char *name, const Product &a, bool *done) {
    const size_t tiles = (tiles_of(a.n) * 16 + S::BM - 1) / S::BM * ((a.max_rows + S::BN - 1) / S::BN);
    if (*done || S::SMEM > ctx->max_smem || tiles_of(a.k) < PARTS) return LLA_OK;
    const size_t clusters = resident_clusters(ctx, split_kernel<T, E, S>, S::THREADS_ + 128, SHARERS);
    if (tiles > clusters) return LLA_OK;
    CUtensorMap w, x;
    LLA_TRY(map_product<S>(a, a.max_rows, &w, &x));
    *done = true;
    return launch_clusters(ctx, name, split_kernel<T, E, S>, dim3((unsigned)(tiles * SHARERS)), S::THREADS_ + 128,
                           S::SMEM, SHARERS, a, w, x);
}

/* The lower tile keeps more of the GPU busy. */
template <class T, Epilogue E, int NI, int STAGES>
lla_status try_splits(const lla_cuda_ctx *ctx, const char *name, const Product &a, bool *done) {
    if constexpr (E == ADD) {
        LLA_TRY((launch_split<T, E, SplitTile<3, NI, STAGES>>(ctx, name, a, done)));
    }
    return launch_split<T, E, SplitTile<4, NI, 4>>(ctx, name, a, done);
}

/* Tiles that the busiest SM has. */
template <class S> size_t turns(const lla_cuda_ctx *ctx, const Product &a) {
    const size_t tiles = (tiles_of(a.n) * 16 + S::BM - 1) / S::BM * ((a.max_rows + S::BN - 1) / S::BN);
    return (tiles + (size_t)ctx->sm_count - 1) / (size_t)ctx->sm_count;
}

/* The same times a tile's size over its speed. */
template <class S> double cost(const lla_cuda_ctx *ctx, const Product &a, double speed) {
    return (double)turns<S>(ctx, a) * S::BM * S::BN / speed;
}

template <class T, Epilogue E> lla_status dispatch(const lla_cuda_ctx *ctx, const char *name, const Product &a) {
    if (has_wgmma(ctx)) { /* speeds: profiles/prefill.md */
        bool done = false;
        if constexpr (E == ADD || E == QKV)
            LLA_TRY(a.max_rows <= 128 ? (try_splits<T, E, 8, 6>(ctx, name, a, &done))
                                      : (try_splits<T, E, 16, 5>(ctx, name, a, &done)));
        if (done) return LLA_OK;
        if constexpr (E == SWIGLU || E == STORE) /* profiles/decode_step.md */
            if (a.max_rows <= LLA_FEW_ROWS)
                return a.max_rows <= 16   ? launch_product<T, E, Wide16, true>(ctx, name, a)
                       : a.max_rows <= 32 ? launch_product<T, E, Wide32, true>(ctx, name, a)
                                          : launch_product<T, E, WideSmall, true>(ctx, name, a);
        const double large = cost<WideLarge>(ctx, a, 1.08), middle = cost<WideMiddle>(ctx, a, 1.0),
                     tall = cost<WideTall>(ctx, a, 1.0), small = cost<WideSmall>(ctx, a, 0.6);
        if (small < large && small < middle && small < tall)
            return turns<WideSmall>(ctx, a) > 1 ? launch_product<T, E, WideSmall>(ctx, name, a)
                                                : launch_product<T, E, WideLone>(ctx, name, a);
        if constexpr (E == SWIGLU)
            if (tall < large && tall <= middle) return launch_product<T, E, WideTall>(ctx, name, a);
        if (middle < large) return launch_product<T, E, WideMiddle>(ctx, name, a);
        return launch_product<T, E, WideLarge>(ctx, name, a);
    }
    if (cost<Small>(ctx, a, 0.6) < cost<Large>(ctx, a, 1.0)) return launch_product<T, E, Small>(ctx, name, a);
    if (Large::SMEM <= ctx->max_smem) return launch_product<T, E, Large>(ctx, name, a);
    return launch_product<T, E, LargeShallow>(ctx, name, a);
}

template <Epilogue E> lla_status by_dtype(const lla_cuda_ctx *ctx, const char *name, const Product &a) {
    if (ctx->dims.dtype == LLAISYS_DTYPE_BF16) return dispatch<__nv_bfloat16, E>(ctx, name, a);
    return dispatch<__half, E>(ctx, name, a);
}

lla_status norm_rows(const lla_cuda_ctx *ctx, size_t x, size_t norm, size_t normed) {
    char *m = ctx->arena;
    const Norm a = {(const lla_step_header *)(m + ctx->io.header),
                    nullptr,
                    m + x,
                    m + norm,
                    (const float *)(m + ctx->io.squares),
                    m + normed,
                    (unsigned)ctx->dims.hidden,
                    ctx->dims.eps};
    return ctx->dims.dtype == LLAISYS_DTYPE_BF16 ? launch_norm<__nv_bfloat16>(ctx, ctx->rows, a)
                                                 : launch_norm<__half>(ctx, ctx->rows, a);
}

/* Steps of at most so many rows have other kernels for gate, up and head: wgmma is faster from nine rows on. */
size_t few_rows(const lla_cuda_ctx *ctx) {
    return has_wgmma(ctx) ? 8 : LLA_FEW_ROWS;
}

bool takes(const lla_cuda_ctx *ctx, size_t rows, size_t n, size_t k, size_t few = LLA_FEW_ROWS) {
    return rows > few && ctx->dims.dtype != LLAISYS_DTYPE_F32 && n % 8 == 0 && k % 8 == 0 &&
           Small::SMEM <= ctx->max_smem;
}

Product product(const lla_cuda_ctx *ctx, size_t x, size_t w, size_t out, size_t n, size_t k) {
    Product a = {};
    a.header = (const lla_step_header *)(ctx->arena + ctx->io.header);
    a.max_rows = (unsigned)ctx->rows;
    a.x = ctx->arena + x;
    a.w = ctx->arena + w;
    a.out = ctx->arena + out;
    a.n = (unsigned)n;
    a.k = (unsigned)k;
    a.trace = ctx->trace;
    return a;
}

} // namespace

bool lla_many_qkv_takes(const lla_cuda_ctx *ctx) {
    return ctx->dims.head_dim % 16 == 0 && takes(ctx, ctx->rows, ctx->dims.head_dim, ctx->dims.hidden);
}

bool lla_many_linear_add_takes(const lla_cuda_ctx *ctx, const lla_linear_add_args *args) {
    return takes(ctx, ctx->rows, ctx->dims.hidden, args->k);
}

bool lla_many_gate_up_takes(const lla_cuda_ctx *ctx) {
    return takes(ctx, ctx->rows, ctx->dims.ffn, ctx->dims.hidden, few_rows(ctx));
}

lla_status lla_many_qkv(const lla_cuda_ctx *ctx, const lla_qkv_args *args) {
    const lla_dims &d = ctx->dims;
    char *m = ctx->arena;
    LLA_TRY(norm_rows(ctx, args->x, args->norm, args->normed));
    Product a = product(ctx, args->normed, args->w, args->q, (d.nhead + 2 * d.nkvhead) * d.head_dim, d.hidden);
    a.half = (unsigned)(d.head_dim / 2);
    a.bias = m + args->bias;
    a.rope = m + args->rope;
    a.positions = (const int32_t *)(m + ctx->io.positions);
    a.row_seq = (const int32_t *)(m + ctx->io.row_seq);
    a.table = (const int32_t *)(m + ctx->io.block_table);
    a.q = m + args->q;
    a.k_cache = m + args->k_cache;
    a.v_cache = m + args->v_cache;
    a.nhead = (unsigned)d.nhead;
    a.nkvhead = (unsigned)d.nkvhead;
    a.head_dim = (unsigned)d.head_dim;
    a.kv_block = (unsigned)d.kv_block;
    a.max_blocks = (unsigned)d.max_blocks;
    return by_dtype<QKV>(ctx, "qkv", a);
}

lla_status lla_many_linear_add(const lla_cuda_ctx *ctx, const lla_linear_add_args *args) {
    Product a = product(ctx, args->in, args->w, args->x, ctx->dims.hidden, args->k);
    a.squares = (float *)(ctx->arena + ctx->io.squares);
    return by_dtype<ADD>(ctx, "linear_add", a);
}

lla_status lla_many_gate_up(const lla_cuda_ctx *ctx, const lla_gate_up_args *args) {
    LLA_TRY(norm_rows(ctx, args->x, args->norm, args->normed));
    Product a = product(ctx, args->normed, args->w, args->act, 2 * ctx->dims.ffn, ctx->dims.hidden);
    a.half = (unsigned)ctx->dims.ffn;
    return by_dtype<SWIGLU>(ctx, "gate_up", a);
}

bool lla_many_head_takes(const lla_cuda_ctx *ctx) {
    return takes(ctx, ctx->logits, ctx->dims.vocab, ctx->dims.hidden, few_rows(ctx));
}

lla_status lla_many_head(const lla_cuda_ctx *ctx, const void *normed, const void *w, void *logits) {
    Product a = product(ctx, 0, 0, 0, ctx->dims.vocab, ctx->dims.hidden);
    a.max_rows = (unsigned)ctx->logits;
    a.by_logit = true;
    a.x = normed;
    a.w = w;
    a.out = logits;
    return by_dtype<STORE>(ctx, "head", a);
}
