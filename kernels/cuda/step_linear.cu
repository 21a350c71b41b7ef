/* step_linear.cu: the step's matrix products: [norm +] x w^T + what follows, on packed weights (nodes.h), for up to
 * eight rows a block; step_linear_many.cu has those for more, and where that is faster, step_linear_any.cu those for
 * odd shapes and f32.
 *
 * Few rows are bound by the stream of weights, and by what happens while it does not flow. Every warp owns an eighth of
 * K and streams its part of a row tile through a ring in shared memory, which no other thread looks at: a lane
 * multiplies the 16 bytes that it has asked for. The ring is filled before the wait for the kernel before, since
 * weights do not depend on it. What follows the wait is on the step's critical path: warps norm their own part of x, so
 * that they need not wait for each other; indices are 32 bits wide; and the code is short, since each kernel's turn
 * finds the instruction cache cold. Few registers leave room on an SM for the kernels to come.
 */
#include "step_draw.cuh"
#include "step_linear.cuh"
#include "step_many.h"

#include <type_traits>

namespace {

enum { W = PARTS }; /* warps of a block, each with a part of K */
enum { COLS = 8 };  /* rows of x that a block takes: columns of the tensor core's operand */
enum { DEPTH = 4 }; /* column tiles, 512 bytes each, that a warp asks for at a time: a group */
/* Groups in a ring: as much of a stream as lets two blocks share an SM; of a single tile, all of a warp's part of it
 * where K is 1,536, or what a block alone on an SM needs under way where K is long. */
enum { STREAM_GROUPS = 5, TILE_GROUPS = 3, LONG_GROUPS = 9 };
/* Groups under way while the ring is filled for the first time. More fill the memory's queues, and what the kernels
 * before this one wait for stands behind them. gate_up's, 21 MB in all, are filled while qkv fetches x: beside the x of
 * 2 to 4 rows even fewer are better (measured when a lane fetched them one unit at a time). Down asks for all of its
 * groups at once: only its own x stands behind them. */
enum { FILLING = 2, FILLING_BESIDE_ROWS = 1 };
/* How a block fetches x: units of 16 bytes that a lane has under way of its warp's part of the columns, all of it where
 * K is 1,536 and rows are one, or up to four, and a row's of down's 8,960; or row by row, a warp a row. */
enum { UNITS_OF_ONE = 1, UNITS_OF_FOUR = 3, UNITS_OF_SUMS = 5, WHOLE_ROWS = 0 };

/* A warp's columns [16 k_first, 16 (k_first + length)) of the rows of x on their way to shared memory, in units of 16
 * bytes, UNITS of them a lane at once. */
template <class T, bool NORM, int UNITS> struct Part {
    const Linear &a;
    const unsigned first, rows, k_first, per_row;
    unsigned row = 0, at = threadIdx.x % 32; /* of the lane's next unit */
    unsigned in_row[UNITS], unit[UNITS];     /* of those under way; from `rows` on there is none */
    uint4 x[UNITS];

    __device__ __forceinline__ Part(const Linear &a, unsigned first, unsigned rows, unsigned k_first, unsigned length)
        : a(a), first(first), rows(rows), k_first(k_first), per_row(2 * length) {}

    __device__ __forceinline__ bool is_over() const { return in_row[UNITS - 1] >= rows; }
    __device__ __forceinline__ void choose() {
#pragma unroll
        for (int j = 0; j < UNITS; j++) {
            while (at >= per_row && row < rows) at -= per_row, row++;
            in_row[j] = row;
            unit[j] = 2 * k_first + at;
            at += 32;
        }
    }
    __device__ __forceinline__ void load() {
#pragma unroll
        for (int j = 0; j < UNITS; j++)
            if (in_row[j] < rows)
                x[j] = ((const uint4 *)((const T *)a.x + source(a, first + in_row[j]) * a.k))[unit[j]];
    }
    __device__ __forceinline__ void store(T *staged, unsigned pitch, float scale, const float *scales) const {
#pragma unroll
        for (int j = 0; j < UNITS; j++)
            if (in_row[j] < rows)
                reinterpret_cast<uint4 *>(staged + in_row[j] * pitch)[unit[j]] =
                    NORM ? normed_unit<T>(x[j], ((const uint4 *)a.norm)[unit[j]], rows == 1 ? scale : scales[in_row[j]])
                         : x[j];
    }
};

/* Up to eight rows a block (blockIdx.y chooses which); row tiles blockIdx.x, + gridDim.x, ... W warps, a ring of GROUPS
 * times DEPTH slots of 16 bytes a thread. */
template <class T, Epilogue E, int GROUPS, int UNITS>
__global__ void __launch_bounds__(32 * W, 4) linear_kernel(const Linear a) {
    constexpr unsigned SLOT = 32 * W * 16, RING = GROUPS * DEPTH * SLOT; /* bytes */
    constexpr bool NORM = E != ADD, BY_ROW = UNITS == WHOLE_ROWS;
    LLA_DYNAMIC_SHARED(smem, 16);
    __shared__ float scales[COLS];
    float *sums = reinterpret_cast<float *>(smem + RING); /* [tiles > 1 ? 2 : 1][W][16][COLS] */
    const unsigned warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const unsigned ntiles = (unsigned)(a.half ? a.n / 16 : tiles_of(a.n)), ktiles = (unsigned)a.k / LLA_TILE;
    const unsigned pitch = (unsigned)a.k + 8; /* of a row of x: eight rows lie in different banks */
    const unsigned k_first = ktiles * warp / W, length = ktiles * (warp + 1) / W - k_first;
    T *staged = reinterpret_cast<T *>(sums + (ntiles > gridDim.x ? 2 : 1) * W * 16 * COLS); /* [rows][pitch] */

    /* ---- the stream of weights ---- */
    const uint32_t ring = shared_address(smem) + threadIdx.x * 16;
    const uint4 *weights = (const uint4 *)a.w + (size_t)(blockIdx.x * ktiles + k_first) * 32 + lane;
    unsigned wanted_tile = blockIdx.x, wanted = 0; /* tile and column tile to ask for next */
    uint32_t fill = ring;                          /* and their slot */
    auto request = [&] {
        if (wanted_tile < ntiles) {
#pragma unroll
            for (unsigned d = 0; d < DEPTH; d++)
                if (wanted + d < length) cp_async_16(fill + d * SLOT, weights + (wanted + d) * 32, true, evict_first());
            wanted += DEPTH;
            if (wanted >= length) {
                wanted = 0;
                wanted_tile += gridDim.x;
                weights += (size_t)gridDim.x * ktiles * 32;
            }
        }
        cp_async_commit();
        fill += DEPTH * SLOT;
        if (fill == ring + RING) fill = ring;
    };
    note(a.trace, LLA_BLOCK_BEGAN);
    /* Down, which asks for much at once, is not to begin before one row's x has been asked for. */
    const bool is_launch_late = E == SWIGLU && a.max_rows == 1;
    if (!is_launch_late) pdl_launch_next();
#pragma unroll 1
    for (int i = 0; i < GROUPS; i++) {
        request();
#if __CUDA_ARCH__ >= 900 /* elsewhere nothing runs before this kernel's turn */
        if (GROUPS == LONG_GROUPS && is_down(a)) continue;
        if (E == SWIGLU && UNITS == UNITS_OF_FOUR)
            cp_async_wait<FILLING_BESIDE_ROWS - 1>();
        else
            cp_async_wait<FILLING - 1>();
#endif
    }

    /* ---- what else is there before the kernel before has finished: step inputs, biases, norm weights ---- */
    const unsigned total = (unsigned)(a.by_logit ? a.header->nlogit : a.header->nrow), first = blockIdx.y * COLS;
    const unsigned rows = first >= total ? 0 : min(total - first, (unsigned)COLS);
    const unsigned my_g = threadIdx.x % 8, my_col = threadIdx.x / 8;
    const bool is_mine = my_col < rows; /* this thread ends rows my_g and my_g + 8 of the tiles for that row of x */
    unsigned tile = blockIdx.x;
    Slot slot = {};
    Operands operands = {};
    if (E == QKV && is_mine) {
        slot = slot_of(a, first + my_col);
        operands = prepare<T, E, false>(a, first + my_col, tile, my_g, slot);
    }
    Part<T, NORM, BY_ROW ? 1 : UNITS> part(a, first, rows, k_first, length);
    if (!BY_ROW) part.choose();
    if (NORM && lane * 128 < length * (LLA_TILE * sizeof(T)))
        prefetch_l1((const T *)a.norm + k_first * LLA_TILE + lane * (128 / sizeof(T)));
    pdl_wait();
    note(a.trace, LLA_BLOCK_FREE);
    if (!rows) {
        cp_async_wait<0>();
        return;
    }

    /* ---- x, normed ---- */
    if (!BY_ROW) part.load();
    if (is_launch_late) pdl_launch_next();
    if (E == ADD && is_mine) operands = prepare<T, E, false>(a, first + my_col, tile, my_g, slot);
    float scale = 0;
    if (BY_ROW) {
#pragma unroll 1
        for (unsigned r = warp; r < rows; r += W)
            norm_row<T>((const T *)a.x + source(a, first + r) * a.k, (const T *)a.norm,
                        a.squares + source(a, first + r) * lla_square_columns(a.k), (unsigned)a.k, a.eps,
                        staged + r * pitch, lane);
        __syncthreads();
    } else {
        if (NORM) { /* of one row every warp finds the scale for itself, so that none waits; of more a warp a row's */
#pragma unroll 1
            for (unsigned r = rows == 1 ? 0 : warp; r < rows; r += W) {
                scale = norm_scale<T>(a.squares + source(a, first + r) * lla_square_columns(a.k), (unsigned)a.k, a.eps,
                                      lane);
                if (lane == 0 && rows > 1) scales[r] = scale;
            }
            if (rows > 1) __syncthreads();
        }
#pragma unroll 1
        while (true) {
            part.store(staged, pitch, scale, scales);
            if (part.is_over()) break;
            part.choose();
            part.load();
        }
    }
    __syncwarp();
    note(a.trace, LLA_BLOCK_STAGED);

    /* ---- the products; columns beyond the last row repeat it, and nobody looks at them ---- */
    const uint32_t x = shared_address(staged + min(lane / 4, rows - 1) * pitch + k_first * LLA_TILE + lane % 4 * 2);
    unsigned drain = 0, turn = 0;
    unsigned long long best = 0;
#pragma unroll 1
    while (tile < ntiles) {
        float acc[4] = {};
#pragma unroll 1
        for (unsigned k = 0; k < length; k += DEPTH) {
            cp_async_wait<GROUPS - 1>();
            const auto weights_at = [&](unsigned d) { return load_shared_16(ring + drain + d * SLOT); };
            const auto columns_at = [&](unsigned d) {
                const uint32_t column = x + (k + d) * (LLA_TILE * sizeof(T));
                return make_uint2(load_shared_4(column), load_shared_4(column + 8 * sizeof(T)));
            };
            if (k + DEPTH <= length) { /* operands of a whole group first: none waits for the product before */
                uint4 w[DEPTH];
                uint2 columns[DEPTH];
#pragma unroll
                for (unsigned d = 0; d < DEPTH; d++) w[d] = weights_at(d), columns[d] = columns_at(d);
#pragma unroll
                for (unsigned d = 0; d < DEPTH; d++) mma_16816<T>(acc, w[d], columns[d]);
            } else {
#pragma unroll 1
                for (unsigned d = 0; k + d < length; d++) mma_16816<T>(acc, weights_at(d), columns_at(d));
            }
            request();
            drain = drain + DEPTH * SLOT == RING ? 0 : drain + DEPTH * SLOT;
        }
        /* the parts of K meet: c0, c1 of the fragment are rows g, columns 2t and 2t + 1; c2, c3 rows g + 8 */
        float *to = sums + turn + (warp * 16 + lane / 4) * COLS + lane % 4 * 2;
        *reinterpret_cast<float2 *>(to) = make_float2(acc[0], acc[1]);
        *reinterpret_cast<float2 *>(to + 8 * COLS) = make_float2(acc[2], acc[3]);
        __syncthreads();
        const unsigned next = tile + gridDim.x;
        float two_squares = 0;
        if (is_mine) {
            const float *from = sums + turn + my_g * COLS + my_col;
            float low = from[0], high = from[8 * COLS];
#pragma unroll
            for (int w = 1; w < W; w++) {
                low += from[w * 16 * COLS];
                high += from[(w * 16 + 8) * COLS];
            }
            two_squares = finish<T, E>(a, first + my_col, tile, my_g, low, high, operands);
            if (E == STORE) {
                const unsigned n = tile * LLA_TILE + my_g;
                if (n < a.n) best = max(best, key_of(rounded<T>(low), n));
                if (n + 8 < a.n) best = max(best, key_of(rounded<T>(high), n + 8));
            }
            if (next < ntiles) operands = prepare<T, E, false>(a, first + my_col, next, my_g, slot);
        }
        if (E == ADD) finish_squares<1>(a, is_mine, first + my_col, tile, my_g, two_squares);
        turn ^= W * 16 * COLS; /* the next tile's sums lie elsewhere: nobody waits for those who read these */
        tile = next;
    }
    if (E == STORE) {
#pragma unroll
        for (int o = 1; o < 8; o *= 2) best = max(best, __shfl_xor_sync(~0u, best, o));
        if (is_mine && my_g == 0) atomicMax(a.best + first + my_col, best);
    }
    note(a.trace, LLA_BLOCK_ENDED);
}

template <class T, Epilogue E, int GROUPS, int UNITS>
lla_status launch_groups(const lla_cuda_ctx *ctx, const char *name, const Linear &a, bool *done) {
    const size_t ntiles = tiles_of(a.n), rows = a.max_rows < COLS ? a.max_rows : COLS,
                 sums = W * 16 * COLS * sizeof(float);
    const size_t least = (size_t)GROUPS * DEPTH * 32 * W * 16 + sums + rows * (a.k + 8) * sizeof(T);
    /* two blocks on an SM, where it has room for both and the kilobyte that each takes besides */
    const size_t most = (size_t)ctx->sm_count * (2 * (least + sums + 1024) <= ctx->max_smem + 1024 ? 2 : 1);
    const unsigned grid = (unsigned)(ntiles < most ? ntiles : most);
    const size_t smem = least + (ntiles > grid ? sums : 0);
    *done = smem + COLS * sizeof(float) <= ctx->max_smem; /* with the norms' scales */
    if (!*done) return LLA_OK;
    return launch(ctx, name, linear_kernel<T, E, GROUPS, UNITS>, dim3(grid, (unsigned)((a.max_rows + COLS - 1) / COLS)),
                  32 * W, smem, a);
}

/* The deepest ring that fits. Results do not depend on it. */
template <class T, Epilogue E, int UNITS>
lla_status launch_units(const lla_cuda_ctx *ctx, const char *name, const Linear &a) {
    bool done = false;
    if constexpr (E == SWIGLU || E == STORE) LLA_TRY((launch_groups<T, E, STREAM_GROUPS, UNITS>(ctx, name, a, &done)));
    if constexpr (E == ADD)
        if (tiles_of(a.k) > (size_t)W * TILE_GROUPS * DEPTH)
            LLA_TRY((launch_groups<T, E, LONG_GROUPS, UNITS>(ctx, name, a, &done)));
    if (!done) LLA_TRY((launch_groups<T, E, TILE_GROUPS, UNITS>(ctx, name, a, &done)));
    if (!done) LLA_TRY((launch_groups<T, E, 2, UNITS>(ctx, name, a, &done)));
    return done ? LLA_OK : linear_any<T, E>(ctx, name, a);
}

template <class T, Epilogue E> lla_status launch_few(const lla_cuda_ctx *ctx, const char *name, const Linear &a) {
    if constexpr (E == ADD) {
        return launch_units<T, E, UNITS_OF_SUMS>(ctx, name, a);
    } else {
        if (a.max_rows == 1) return launch_units<T, E, UNITS_OF_ONE>(ctx, name, a);
        if constexpr (E != QKV) /* whose slots and angles leave no registers */
            if (a.max_rows > 4) return launch_units<T, E, WHOLE_ROWS>(ctx, name, a);
        return launch_units<T, E, UNITS_OF_FOUR>(ctx, name, a);
    }
}

template <class T, Epilogue E> lla_status dispatch(const lla_cuda_ctx *ctx, const char *name, const Linear &a) {
    if constexpr (!std::is_same<T, float>::value) {
        if (has_many_rows<T, E>(ctx, a)) return linear_many<T, E>(ctx, name, a);
        if (a.k % LLA_TILE == 0 && a.half % 8 == 0) return launch_few<T, E>(ctx, name, a);
    }
    return linear_any<T, E>(ctx, name, a);
}

} // namespace

lla_status lla_cuda_qkv(const lla_cuda_ctx *ctx, const lla_qkv_args *args) {
    if (lla_many_qkv_takes(ctx)) return lla_many_qkv(ctx, args);
    const lla_dims &d = ctx->dims;
    char *m = ctx->arena;
    Linear a = {};
    a.trace = ctx->trace;
    a.header = (const lla_step_header *)(m + ctx->io.header);
    a.max_rows = ctx->rows;
    a.x = m + args->x;
    a.norm = m + args->norm;
    a.normed = m + args->normed;
    a.squares = (float *)(m + ctx->io.squares);
    a.w = m + args->w;
    a.n = (d.nhead + 2 * d.nkvhead) * d.head_dim;
    a.k = d.hidden;
    a.half = d.head_dim / 2;
    a.eps = d.eps;
    a.bias = m + args->bias;
    a.rope = m + args->rope;
    a.positions = (const int32_t *)(m + ctx->io.positions);
    a.row_seq = (const int32_t *)(m + ctx->io.row_seq);
    a.table = (const int32_t *)(m + ctx->io.block_table);
    a.q = m + args->q;
    a.k_cache = m + args->k_cache;
    a.v_cache = m + args->v_cache;
    a.nhead = d.nhead;
    a.nkvhead = d.nkvhead;
    a.head_dim = d.head_dim;
    a.kv_block = d.kv_block;
    a.max_blocks = d.max_blocks;
    LLA_CUDA_BY_DTYPE(d.dtype, return (dispatch<T, QKV>(ctx, "qkv", a)));
}

lla_status lla_cuda_linear_add(const lla_cuda_ctx *ctx, const lla_linear_add_args *args) {
    if (lla_many_linear_add_takes(ctx, args)) return lla_many_linear_add(ctx, args);
    Linear a = {};
    a.trace = ctx->trace;
    a.header = (const lla_step_header *)(ctx->arena + ctx->io.header);
    a.max_rows = ctx->rows;
    a.x = ctx->arena + args->in;
    a.w = ctx->arena + args->w;
    a.out = ctx->arena + args->x;
    a.squares = (float *)(ctx->arena + ctx->io.squares);
    a.n = ctx->dims.hidden;
    a.k = args->k;
    LLA_CUDA_BY_DTYPE(ctx->dims.dtype, return (dispatch<T, ADD>(ctx, "linear_add", a)));
}

lla_status lla_cuda_gate_up(const lla_cuda_ctx *ctx, const lla_gate_up_args *args) {
    if (lla_many_gate_up_takes(ctx)) return lla_many_gate_up(ctx, args);
    Linear a = {};
    a.trace = ctx->trace;
    a.header = (const lla_step_header *)(ctx->arena + ctx->io.header);
    a.max_rows = ctx->rows;
    a.x = ctx->arena + args->x;
    a.norm = ctx->arena + args->norm;
    a.normed = ctx->arena + args->normed;
    a.squares = (float *)(ctx->arena + ctx->io.squares);
    a.w = ctx->arena + args->w;
    a.out = ctx->arena + args->act;
    a.n = 2 * ctx->dims.ffn;
    a.k = ctx->dims.hidden;
    a.half = ctx->dims.ffn;
    a.eps = ctx->dims.eps;
    LLA_CUDA_BY_DTYPE(ctx->dims.dtype, return (dispatch<T, SWIGLU>(ctx, "gate_up", a)));
}

lla_status lla_cuda_head(const lla_cuda_ctx *ctx, const lla_head_args *args) {
    Linear a = {};
    a.trace = ctx->trace;
    a.header = (const lla_step_header *)(ctx->arena + ctx->io.header);
    a.max_rows = ctx->logits;
    a.by_logit = true;
    a.index = (const int32_t *)(ctx->arena + ctx->io.logit_rows);
    a.x = ctx->arena + args->x;
    a.norm = ctx->arena + args->norm;
    a.normed = ctx->arena + args->normed;
    a.squares = (float *)(ctx->arena + ctx->io.squares);
    a.w = ctx->arena + args->w;
    a.out = ctx->arena + args->logits;
    a.best = (unsigned long long *)(ctx->arena + ctx->io.best);
    a.n = ctx->dims.vocab;
    a.k = ctx->dims.hidden;
    a.eps = ctx->dims.eps;
    LLA_CUDA_BY_DTYPE(ctx->dims.dtype, return (dispatch<T, STORE>(ctx, "head", a)));
}
