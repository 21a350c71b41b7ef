/* step_gemm.cu: the step's matrix products for many rows: norm, then x w^T on packed weights with what follows, by
 * mma.sync on tiles that a ring in shared memory feeds.
 *
 * A block has BM weight rows (the 16-row operand of the tensor core) by BN rows of the step, and keeps two sets of
 * sums in registers: `part` of the current part of K, and `total` of the parts before it (nodes.h has the order that
 * all kernels keep). That second set is what bounds the tile, and the tile bounds the speed: shared memory moves 128
 * bytes a cycle, and a warp of WM x WN sums needs (WM + WN) 32 bytes for every 16 columns.
 *
 * The ring: pieces of KT 16-column tiles of the block's weights and rows, STAGES - 1 of them under way. Packed weights
 * lie as the tensor core wants them: a lane's operand of a tile is 16 bytes, and 512 bytes in a row are a tile. Rows of
 * x are swizzled: see `place_of`. Blocks stay for several tiles; the ring runs on across them, so that the next tile's
 * first pieces arrive while this one's results are written. */
#include "step_many.h"
#include "step_math.cuh"

namespace {

enum Epilogue { QKV, ADD, SWIGLU };

struct Product {
    const lla_step_header *header;
    const void *x; /* [rows, k]: normed, or as it is */
    const void *w; /* packed [n, k] */
    void *out;     /* ADD: [rows, n], added to; SWIGLU: [rows, half] */
    unsigned n, k, half;
    unsigned parts; /* of K */
    /* QKV */
    const void *bias, *rope;
    const int32_t *positions, *row_seq, *table;
    void *q, *k_cache, *v_cache;
    unsigned nhead, nkvhead, head_dim, kv_block, max_blocks;
};

/* Sizes of a tile: warps WARPS_M x WARPS_N, each with MI x 16 weight rows by NI x 8 rows of the step. */
template <int MI_, int NI_, int WARPS_M_, int WARPS_N_, int KT_, int STAGES_, int RESIDENT_> struct Tile {
    static constexpr int MI = MI_, NI = NI_, WARPS_M = WARPS_M_, WARPS_N = WARPS_N_, KT = KT_, STAGES = STAGES_;
    static constexpr int RESIDENT = RESIDENT_; /* blocks on an SM */
    static constexpr int BM = 16 * MI * WARPS_M, BN = 8 * NI * WARPS_N, THREADS_ = 32 * WARPS_M * WARPS_N;
    static constexpr int UNITS = 2 * KT, ROW_BYTES = 16 * UNITS; /* of a row of x in a piece */
    static constexpr int W_BYTES = BM / 16 * KT * 512, STAGE_BYTES = W_BYTES + BN * ROW_BYTES;
    static constexpr int SMEM = STAGES * STAGE_BYTES;
    static constexpr int W_PASS = THREADS_ / (KT * 32), X_PASS = THREADS_ / UNITS; /* copied by all threads at once */
    static_assert(KT == 2 || KT == 4, "a row of a piece is 64 or 128 bytes, which the swizzle spreads over the banks");
    static_assert(NI % 2 == 0, "ldmatrix.x4 loads 16 rows of x");
    static_assert(THREADS_ % (KT * 32) == 0 && BM / 16 % W_PASS == 0, "all threads copy as many units of weights");
    static_assert(X_PASS % 8 == 0 && BN % X_PASS == 0, "and of x, all in the same place of their rows");
    static_assert(STAGES >= 3, "one piece is read, one is complete, one is being copied");
    static_assert(SMEM * RESIDENT <= 227 * 1024, "the rings fit in shared memory");
};

/* Where unit u (16 bytes) of row r of x lies in its row of a piece: the eight rows of an 8 x 8 matrix lie in different
 * banks. */
template <class S> __device__ __forceinline__ unsigned place_of(unsigned u, unsigned r) {
    return (u ^ (r / (8 / S::UNITS) % S::UNITS)) * 16;
}

/* ---- the ring's filling end ---- */

/* The pieces of the block's tiles, one after the other. */
template <class S> struct Feed {
    const char *w_from, *x_from;    /* of this thread's first unit of the piece */
    unsigned w_rows, x_rows, piece; /* copies of the thread that lie inside n and the step's rows */
    unsigned tile;

    __device__ __forceinline__ void seek(const Product &a, unsigned rows, unsigned columns, unsigned tiles) {
        piece = 0;
        w_rows = x_rows = 0;
        if (tile >= tiles) return;
        const unsigned ktiles = (a.k + 15) / 16, ntiles = (a.n + 15) / 16;
        const unsigned w_first = tile / columns * (S::BM / 16) + threadIdx.x / (S::KT * 32);
        const unsigned x_first = tile % columns * S::BN + threadIdx.x / S::UNITS;
        w_from = (const char *)a.w + (size_t)w_first * ktiles * 512 + threadIdx.x % (S::KT * 32) * 16;
        x_from = (const char *)a.x + (size_t)x_first * a.k * 2 + threadIdx.x % S::UNITS * 16;
        if (w_first < ntiles) w_rows = (ntiles - w_first + S::W_PASS - 1) / S::W_PASS;
        if (x_first < rows) x_rows = (rows - x_first + S::X_PASS - 1) / S::X_PASS;
    }
    __device__ __forceinline__ void copy_w(const Product &a, uint32_t place) const {
        const unsigned ktiles = (a.k + 15) / 16;
        const bool inside = piece * S::KT + threadIdx.x / 32 % S::KT < ktiles;
        const char *from = w_from;
#pragma unroll
        for (int i = 0; i < S::BM / 16 / S::W_PASS; i++) {
            cp_async_16(place + (threadIdx.x + i * S::THREADS_) * 16, from, inside && i < w_rows);
            from += (size_t)(S::W_PASS * 512) * ktiles;
        }
    }
    __device__ __forceinline__ void copy_x(const Product &a, uint32_t place) const {
        const unsigned row = threadIdx.x / S::UNITS, unit = threadIdx.x % S::UNITS;
        const bool inside = piece * (S::KT * 16) + unit * 8 < a.k;
        const char *from = x_from;
        place += S::W_BYTES + row * S::ROW_BYTES + place_of<S>(unit, row);
#pragma unroll
        for (int i = 0; i < S::BN / S::X_PASS; i++) {
            cp_async_16(place + i * S::X_PASS * S::ROW_BYTES, from, inside && i < x_rows);
            from += (size_t)(S::X_PASS * 2) * a.k;
        }
    }
    __device__ __forceinline__ void advance(const Product &a, unsigned rows, unsigned columns, unsigned tiles) {
        w_from += S::KT * 512;
        x_from += S::ROW_BYTES;
        if (++piece * (S::KT * 16) < a.k) return;
        tile += gridDim.x;
        seek(a, rows, columns, tiles);
    }
};

/* ---- what follows a product ---- */

/* Where keys and values of a row go: element offset of the position in the cache, KV head 0. */
__device__ __forceinline__ size_t slot_of(const Product &a, unsigned row) {
    const unsigned position = (unsigned)a.positions[row];
    const size_t block = (size_t)a.table[(size_t)a.row_seq[row] * a.max_blocks + position / a.kv_block];
    return (block * a.nkvhead * a.kv_block + position % a.kv_block) * a.head_dim;
}

/* Writes a warp's sums: tiles of 16 weight rows from `tile0`, rows of the step from `row0`. Rounded sums of eight rows
 * are transposed in registers: a lane then holds neighbours 2 t, 2 t + 1 of one row, and of the paired 16-row halves.
 */
template <class T, Epilogue E, class S>
__device__ __forceinline__ void finish(const Product &a, const float (&sum)[S::MI][S::NI][4], unsigned tile0,
                                       unsigned row0, unsigned rows, unsigned lane) {
    const unsigned t2 = lane % 4 * 2, ntiles = (a.n + 15) / 16;
#pragma unroll
    for (int j = 0; j < S::NI; j++) {
        const unsigned row = row0 + 8 * j + lane / 4;
        const bool inside = row < rows;
        size_t slot = 0;
        const T *rope = nullptr;
        if (E == QKV && inside) {
            slot = slot_of(a, row);
            rope = (const T *)a.rope + (size_t)a.positions[row] * a.head_dim;
        }
#pragma unroll
        for (int i = 0; i < S::MI; i++) {
            const unsigned tile = tile0 + i;
            if (tile >= ntiles) break;
            const float(&c)[4] = sum[i][j];
            if (E == SWIGLU) {
                const T y[2] = {swiglu<T>(c[0], c[2]), swiglu<T>(c[1], c[3])};
                uint32_t pair;
                memcpy(&pair, y, sizeof pair);
                pair = transpose_8x8(pair);
                if (inside) *(uint32_t *)((T *)a.out + (size_t)row * a.half + tile * 8 + t2) = pair;
            } else if (E == ADD) {
                const float2 low = unpack_pair<T>(transpose_8x8(pack_pair<T>(c[0], c[1]))),
                             high = unpack_pair<T>(transpose_8x8(pack_pair<T>(c[2], c[3])));
                if (!inside) continue;
                uint32_t *out = (uint32_t *)((T *)a.out + (size_t)row * a.n + tile * 16 + t2);
                const float2 x = unpack_pair<T>(out[0]);
                out[0] = pack_pair<T>(x.x + low.x, x.y + low.y);
                if (tile * 16 + 8 >= a.n) continue;
                const float2 y = unpack_pair<T>(out[4]);
                out[4] = pack_pair<T>(y.x + high.x, y.y + high.y);
            } else {
                const unsigned head = tile * 8 / a.half, at = tile * 8 % a.half; /* of the tile's eight pairs */
                const T *bias = (const T *)a.bias + head * a.head_dim + at + lane / 4;
                const float b0 = to_float<T>(bias[0]), b1 = to_float<T>(bias[a.half]);
                float2 low = unpack_pair<T>(transpose_8x8(pack_pair<T>(c[0] + b0, c[1] + b0))),
                       high = unpack_pair<T>(transpose_8x8(pack_pair<T>(c[2] + b1, c[3] + b1)));
                if (!inside) continue;
                if (head < a.nhead + a.nkvhead) {
                    const float2 cosine = unpack_pair<T>(*(const uint32_t *)(rope + at + t2)),
                                 sine = unpack_pair<T>(*(const uint32_t *)(rope + at + t2 + a.half));
                    rotate<T>(low.x, high.x, cosine.x, sine.x);
                    rotate<T>(low.y, high.y, cosine.y, sine.y);
                }
                T *to;
                if (head < a.nhead) {
                    to = (T *)a.q + ((size_t)row * a.nhead + head) * a.head_dim;
                } else {
                    const bool is_v = head >= a.nhead + a.nkvhead;
                    const unsigned kvhead = head - a.nhead - (is_v ? a.nkvhead : 0);
                    to = (T *)(is_v ? a.v_cache : a.k_cache) + slot + (size_t)kvhead * a.kv_block * a.head_dim;
                }
                *(uint32_t *)(to + at + t2) = pack_pair<T>(low.x, low.y);
                *(uint32_t *)(to + at + t2 + a.half) = pack_pair<T>(high.x, high.y);
            }
        }
    }
}

/* ---- the product ---- */

template <class T, Epilogue E, class S>
__global__ void __launch_bounds__(S::THREADS_, S::RESIDENT) product_kernel(const Product a) {
    extern __shared__ __align__(128) char ring[];
    constexpr int MI = S::MI, NI = S::NI, KT = S::KT;
    const unsigned warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const unsigned wm = warp / S::WARPS_N * MI, wn = warp % S::WARPS_N * (8 * NI);
    const uint32_t base = shared_address(ring), end = base + S::SMEM;
    const unsigned ktiles = (a.k + 15) / 16, pieces = (ktiles + KT - 1) / KT;

    pdl_launch_next();
    const unsigned rows = (unsigned)a.header->nrow; /* a step input: it was there before the step's first kernel */
    const unsigned columns = (rows + S::BN - 1) / S::BN;
    const unsigned tiles = ((a.n + 15) / 16 + S::BM / 16 - 1) / (S::BM / 16) * columns;

    Feed<S> feed;
    uint32_t writing = base; /* places of the ring */
    feed.tile = blockIdx.x;
    feed.seek(a, rows, columns, tiles);
    {
        Feed<S> ahead = feed; /* weights do not depend on the kernel before */
        for (int s = 0; s < S::STAGES - 1; s++) {
            ahead.copy_w(a, base + s * S::STAGE_BYTES);
            ahead.advance(a, rows, columns, tiles);
        }
    }
    pdl_wait();
    for (int s = 0; s < S::STAGES - 1; s++) {
        feed.copy_x(a, writing);
        cp_async_commit();
        feed.advance(a, rows, columns, tiles);
        writing += S::STAGE_BYTES;
    }
    uint32_t reading = end - S::STAGE_BYTES;
    /* Goes on to the next piece: once it is there for all, nobody reads the one before, whose place is filled again. */
    const auto next_piece = [&] {
        cp_async_wait<S::STAGES - 2>();
        __syncthreads();
        feed.copy_w(a, writing);
        feed.copy_x(a, writing);
        cp_async_commit();
        feed.advance(a, rows, columns, tiles);
        writing = writing + S::STAGE_BYTES == end ? base : writing + S::STAGE_BYTES;
        reading = reading + S::STAGE_BYTES == end ? base : reading + S::STAGE_BYTES;
    };

    /* of x, lanes 0-7 give rows 0-7 lower columns, 8-15 rows 0-7 upper, 16-23 rows 8-15 lower, 24-31 rows 8-15 upper */
    const unsigned x_row = wn + lane % 8 + lane / 16 * 8;
    const uint32_t x_at = S::W_BYTES + x_row * S::ROW_BYTES, x_unit = place_of<S>(lane / 8 % 2, x_row);
    const uint32_t w_at = wm * KT * 512 + lane * 16;
    uint4 w[MI], x[NI / 2];

    for (unsigned tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
        float total[MI][NI][4] = {}, part[MI][NI][4] = {};
        unsigned p = 0, part_end = 0; /* first k-tile behind part p - 1 */
        const auto next_part = [&] {
            for (const unsigned from = part_end; part_end == from && p < a.parts;) part_end = ktiles * ++p / a.parts;
        };
        next_part();
        next_piece();
#pragma unroll
        for (int j = 0; j < NI / 2; j++) x[j] = ldmatrix_x4(reading + x_at + x_unit + j * 16 * S::ROW_BYTES);
#pragma unroll
        for (int i = 0; i < MI; i++) w[i] = load_shared_16(reading + w_at + i * KT * 512);
        /* Multiplies k-tile kt - 1; each operand's register takes the next one's as soon as it is free. Behind K's end
         * the pieces are zeros, which change no sum. */
#pragma unroll 1
        for (unsigned kt = 1; kt <= pieces * KT; kt++) {
            const unsigned step = kt % KT;
            if (step == 0 && kt < pieces * KT) next_piece();
            const uint32_t next_w = reading + w_at + step * 512, next_x = reading + x_at + (x_unit ^ (step * 32));
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
            if (kt != part_end) continue;
            next_part();
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
        finish<T, E, S>(a, total, tile / columns * (S::BM / 16) + wm, tile % columns * S::BN + wn, rows, lane);
    }
    cp_async_wait<0>();
}

/* ---- the norm before it ---- */

/* out [rows, k] = the normed rows of x; one warp a row. */
template <class T>
__global__ void __launch_bounds__(THREADS)
    norm_kernel(const lla_step_header *header, const T *x, const T *norm, size_t k, float eps, T *out) {
    constexpr int UNIT = 16 / sizeof(T);
    const size_t row = blockIdx.x * (size_t)WARPS + threadIdx.x / 32;
    const int lane = threadIdx.x % 32;
    pdl_launch_next();
    pdl_wait();
    if (row >= (size_t)header->nrow) return;
    const uint4 *from = reinterpret_cast<const uint4 *>(x + row * k), *weight = reinterpret_cast<const uint4 *>(norm);
    uint4 *to = reinterpret_cast<uint4 *>(out + row * k);
    const float scale = norm_scale<T>(x + row * k, k, eps, lane);
    for (size_t i = lane; i < k / UNIT; i += 32) to[i] = normed_unit<T>(from[i], weight[i], scale);
}

template <class T>
lla_status launch_norm(const lla_cuda_ctx *ctx, size_t x, size_t norm, size_t normed) {
    char *m = ctx->arena;
    const dim3 grid((unsigned)((ctx->rows + WARPS - 1) / WARPS));
    return launch(ctx, "norm", norm_kernel<T>, grid, THREADS, 0, (const lla_step_header *)(m + ctx->io.header),
                  (const T *)(m + x), (const T *)(m + norm), ctx->dims.hidden, ctx->dims.eps, (T *)(m + normed));
}

/* ---- the choice of a tile ---- */

/* MI, NI, warps along weight rows and step rows, 16-column tiles of a piece, pieces of the ring, blocks on an SM. The
 * first is for GPUs whose blocks can have 160 KB of shared memory, the second has the same sums in less. */
using Large = Tile<3, 8, 4, 2, 4, 4, 1>;
using LargeShallow = Tile<3, 8, 4, 2, 2, 4, 1>;
using Small = Tile<2, 4, 2, 2, 4, 3, 2>;

template <class T, Epilogue E, class S>
lla_status launch_product(const lla_cuda_ctx *ctx, const char *name, const Product &a) {
    const size_t tiles = (tiles_of(a.n) * 16 + S::BM - 1) / S::BM * ((ctx->rows + S::BN - 1) / S::BN);
    const size_t resident = (size_t)ctx->sm_count * S::RESIDENT;
    return launch(ctx, name, product_kernel<T, E, S>, dim3((unsigned)(tiles < resident ? tiles : resident)),
                  S::THREADS_, S::SMEM, a);
}

/* Tiles that the busiest SM has, times a tile's size over its speed. */
template <class S> double cost(const lla_cuda_ctx *ctx, const Product &a, double speed) {
    const size_t tiles = (tiles_of(a.n) * 16 + S::BM - 1) / S::BM * ((ctx->rows + S::BN - 1) / S::BN);
    const size_t sms = (size_t)ctx->sm_count;
    return (double)((tiles + sms - 1) / sms) * S::BM * S::BN / speed;
}

template <class T, Epilogue E> lla_status dispatch(const lla_cuda_ctx *ctx, const char *name, const Product &a) {
    if (cost<Small>(ctx, a, 0.6) < cost<Large>(ctx, a, 1.0)) return launch_product<T, E, Small>(ctx, name, a);
    if (Large::SMEM <= ctx->max_smem) return launch_product<T, E, Large>(ctx, name, a);
    return launch_product<T, E, LargeShallow>(ctx, name, a);
}

template <Epilogue E> lla_status by_dtype(const lla_cuda_ctx *ctx, const char *name, const Product &a) {
    if (ctx->dims.dtype == LLAISYS_DTYPE_BF16) return dispatch<__nv_bfloat16, E>(ctx, name, a);
    return dispatch<__half, E>(ctx, name, a);
}

lla_status norm_rows(const lla_cuda_ctx *ctx, size_t x, size_t norm, size_t normed) {
    if (ctx->dims.dtype == LLAISYS_DTYPE_BF16) return launch_norm<__nv_bfloat16>(ctx, x, norm, normed);
    return launch_norm<__half>(ctx, x, norm, normed);
}

bool takes(const lla_cuda_ctx *ctx, size_t n, size_t k) {
    return ctx->rows > LLA_FEW_ROWS && ctx->dims.dtype != LLAISYS_DTYPE_F32 && n % 8 == 0 && k % 8 == 0 &&
           Small::SMEM <= ctx->max_smem;
}

/* The kernel after this one's norm depends on it alone: it always gets an edge of its own. */
Product product(const lla_cuda_ctx *ctx, size_t x, size_t w, size_t out, size_t n, size_t k) {
    Product a = {};
    a.header = (const lla_step_header *)(ctx->arena + ctx->io.header);
    a.x = ctx->arena + x;
    a.w = ctx->arena + w;
    a.out = ctx->arena + out;
    a.n = (unsigned)n;
    a.k = (unsigned)k;
    a.parts = 8;
    return a;
}

} // namespace

bool lla_many_qkv_takes(const lla_cuda_ctx *ctx) {
    return ctx->dims.head_dim % 16 == 0 && takes(ctx, ctx->dims.head_dim, ctx->dims.hidden);
}

bool lla_many_linear_add_takes(const lla_cuda_ctx *ctx, const lla_linear_add_args *args) {
    return takes(ctx, ctx->dims.hidden, args->k);
}

bool lla_many_gate_up_takes(const lla_cuda_ctx *ctx) {
    return takes(ctx, ctx->dims.ffn, ctx->dims.hidden);
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
    if (args->k >= 4096) a.parts = 16; /* as in step_linear.cu */
    return by_dtype<ADD>(ctx, "linear_add", a);
}

lla_status lla_many_gate_up(const lla_cuda_ctx *ctx, const lla_gate_up_args *args) {
    LLA_TRY(norm_rows(ctx, args->x, args->norm, args->normed));
    Product a = product(ctx, args->normed, args->w, args->act, 2 * ctx->dims.ffn, ctx->dims.hidden);
    a.half = (unsigned)ctx->dims.ffn;
    return by_dtype<SWIGLU>(ctx, "gate_up", a);
}
