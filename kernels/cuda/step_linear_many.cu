/* step_linear_many.cu: the step's matrix products for up to 64 rows a block: x w^T + what follows, on packed weights
 * (nodes.h), after a norm kernel of its own where there is a norm.
 *
 * A warp takes one row tile of the weights at a time, 16 rows, and multiplies it with all of the block's columns (rows
 * of x). Weights and x come through a ring of stages in shared memory, filled by asynchronous copies; a stage holds KS
 * column tiles of every warp's row tile (a lane reads back the 16 bytes that it copied), and the same columns of x for
 * the whole block. The first stages' weights are requested before the wait for the kernel before.
 *
 * A tile's parts of K (nodes.h) are summed in one of two ways, with the same bits:
 *   whole: the warp goes through the parts one after the other and adds each to a total in its registers. This wants
 *     as many row tiles as there are warps on the GPU: gate and up, and the head (GPUs with wgmma come here only with
 *     shapes that step_gemm.cu does not take).
 *   split: eight blocks, a thread-block cluster, share the row tiles, and each takes a part of K; a block reads only
 *     its eighth of x. The parts' sums meet in the cluster's shared memory: block b gets those of
 *     columns 8 b .. 8 b + 7, and adds them in order. Clusters exist from sm_90 on. */
#include "step_linear.cuh"
#include "step_many.h"
#include "step_norm.cuh"

namespace {

enum {
    KS = 4,          /* column tiles of a stage */
    ROW_BYTES = 128, /* of x in a stage: eight units of 16 bytes, swizzled by row */
    PIECE = 512,     /* bytes of a 16 x 16 tile of weights, or of a 16 x 8 one of sums */
    CLUSTER = PARTS, /* blocks that share K, a part each */
    /* Of a block; of one in a cluster. */
    MAX_WARPS = 16,
    MAX_WARPS_SPLIT = 14,
};

/* Warps for which a thread's registers are counted out: 16 leave it 128; 18 leave 112, so that two of qkv's share an SM
 * where their rings are small, and attention finds others empty. */
template <int NT, bool SPLIT> constexpr int BOUND_WARPS = !SPLIT ? MAX_WARPS : NT <= 4 ? 18 : MAX_WARPS_SPLIT;

/* How the row tiles are shared. */
struct Shape {
    unsigned ntiles, ktiles;
    unsigned slots; /* row tiles that a block, or a cluster, works on at once */
    unsigned teams; /* blocks, or clusters */
    unsigned ring;  /* stages that shared memory has room for: fewer than STAGES where there are not as many */
    unsigned box;   /* split: offset of the barrier, and of the boxes behind it */
    bool overlaid;  /* one round: what goes to the other blocks lies where the ring was */
};

/* 8 NT columns a block (blockIdx.y chooses which). SPLIT: K is split over a cluster. Of the ring's STAGES, STEP are
 * multiplied between two barriers, while the others are on their way; of EARLY, the weights are asked for before the
 * wait for the kernel before. */
template <class T, int NT, Epilogue E, bool SPLIT, int STAGES, int STEP, int EARLY>
__global__ void __launch_bounds__(32 * BOUND_WARPS<NT, SPLIT>, 1) many_kernel(const Linear a, const Shape s) {
    LLA_DYNAMIC_SHARED(smem, 128);
    constexpr int AHEAD = STAGES - STEP;
    static_assert(EARLY <= AHEAD, "what is asked for early is asked for ahead");
    constexpr unsigned COLS = 8 * NT, X_BYTES = COLS * ROW_BYTES;
    const unsigned warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = blockDim.x / 32;
    const unsigned rank = SPLIT ? blockIdx.x % CLUSTER : 0, team = SPLIT ? blockIdx.x / CLUSTER : blockIdx.x;
    /* shared memory: the ring [ring][x [COLS][ROW_BYTES], weights [warps][KS][PIECE]]; split: a barrier, what goes
     * to the cluster's blocks and what comes from them, [CLUSTER][boxes][PIECE] each */
    const unsigned stage_bytes = X_BYTES + warps * KS * PIECE;
    const uint32_t ring = shared_address(smem), barrier = ring + s.box, outbox = s.overlaid ? ring : barrier + 128;

    /* The order in which stages are filled and used: round by round of row tiles, part by part, piece by piece. */
    const unsigned pieces = ((s.ktiles + PARTS - 1) / PARTS + KS - 1) / KS; /* of the longest part */
    const unsigned parts_in_turn = SPLIT ? 1 : PARTS, round_tiles = s.teams * s.slots;
    const unsigned stages = (s.ntiles + round_tiles - 1) / round_tiles * parts_in_turn * pieces;
    auto part_start = [&](unsigned p) { return s.ktiles * p / PARTS; };

    struct Request { /* what the next stage to be filled holds */
        unsigned tile, part, piece, stage;
        unsigned kt, end; /* column tiles of this warp's weights: from here, and the end of the part */
        const char *w;    /* this lane's 16 bytes of the first */
        uint32_t to;      /* and their place in the stage */
    } ask = {};
    auto ask_part = [&] {
        const unsigned p = SPLIT ? rank : ask.part;
        ask.kt = part_start(p);
        ask.end = ask.tile < s.ntiles ? part_start(p + 1) : 0;
        ask.w = (const char *)a.w + ((size_t)ask.tile * s.ktiles + ask.kt) * PIECE + lane * 16;
    };
    auto ask_first = [&] {
        ask.tile = team * s.slots + warp;
        ask.part = ask.piece = ask.stage = 0;
        ask.to = ring + X_BYTES + warp * KS * PIECE + lane * 16;
        ask_part();
    };
    auto ask_next = [&] {
        ask.to += stage_bytes;
        if (++ask.stage == STAGES) {
            ask.stage = 0;
            ask.to -= STAGES * stage_bytes;
        }
        ask.kt += KS;
        ask.w += KS * PIECE;
        if (++ask.piece < pieces) return;
        ask.piece = 0;
        if (++ask.part == parts_in_turn) {
            ask.part = 0;
            ask.tile += round_tiles;
        }
        ask_part();
    };
    auto request_weights = [&] {
#pragma unroll
        for (unsigned d = 0; d < KS; d++)
            cp_async_16(ask.to + d * PIECE, ask.w + d * PIECE, ask.kt + d < ask.end, evict_first());
    };

    /* Block n + NT (warp % SPREAD) of the cluster adds the sums of columns 8 n .. 8 n + 7 of that warp's tile. */
    constexpr unsigned SPREAD = CLUSTER / NT;
    const unsigned boxes = (s.slots + SPREAD - 1) / SPREAD, box_bytes = boxes * PIECE;
    const uint32_t inbox = barrier + 128 + (s.overlaid ? 0 : CLUSTER * box_bytes); /* [CLUSTER]: parts in order */
    unsigned round = 0;

    note(a.trace, LLA_BLOCK_BEGAN);
    pdl_launch_next();
    if (SPLIT) {
        if (threadIdx.x == 0) mbarrier_init(barrier, 1);
        cluster_arrive_relaxed();
    }
    ask_first();
    for (int i = 0; i < EARLY; i++) {
        request_weights();
        ask_next();
    }
    /* step inputs were there before the step's first kernel began */
    const unsigned total_rows = (unsigned)(a.by_logit ? a.header->nlogit : a.header->nrow), col0 = blockIdx.y * COLS;
    const unsigned rows = col0 >= total_rows ? 0 : min(total_rows - col0, COLS);
    const char *x = (const char *)(a.norm ? a.normed : a.x) + (size_t)col0 * a.k * sizeof(T);
    const unsigned x_pitch = (unsigned)a.k * sizeof(T);
    /* eight lanes a row */
    auto request_x = [&](unsigned part, unsigned piece, unsigned stage) {
        const unsigned unit = lane % 8;
        for (unsigned row = 4 * warp + lane / 8; row < COLS; row += 4 * warps) {
            const unsigned p = SPLIT ? rank : part;
            const unsigned from = (part_start(p) + piece * KS) * 32 + unit * 16;
            cp_async_16(ring + stage * stage_bytes + row * ROW_BYTES + ((unit ^ row % 8) << 4),
                        x + (size_t)(row * x_pitch) + from, row < rows && from < min(part_start(p + 1) * 32, x_pitch));
        }
    };

    /* split: this lane ends with the sums of columns col, col + 1 and rows g, g + 8 of the tile in slot my_slot. */
    const unsigned col = 8 * (rank % NT) + lane % 4 * 2, g = lane / 4, my_slot = warp * SPREAD + rank / NT;
    const bool reader = 8 * (rank % NT) < rows;
    unsigned tile0 = team * s.slots; /* slot 0's tile of the round */
    bool mine = false;
    Operands operands[2] = {};
    auto fetch = [&] {
        mine = reader && my_slot < s.slots && tile0 + my_slot < s.ntiles;
#pragma unroll
        for (unsigned e = 0; e < 2; e++)
            if (mine && col + e < rows)
                operands[e] = prepare<T, E, false>(a, col0 + col + e, tile0 + my_slot, g,
                                                   E == QKV ? slot_of(a, col0 + col + e) : Slot{});
    };
    if (SPLIT && E == QKV) fetch(); /* nothing of it comes from the kernel before */
    pdl_wait();
    note(a.trace, LLA_BLOCK_FREE);
    if (!rows) { /* a block leaves when what it asked for has come */
        cp_async_commit();
        cp_async_wait<0>();
        if (SPLIT) cluster_wait();
        return;
    }
    ask_first();
    for (int i = 0; i < AHEAD; i++) {
        if (i >= EARLY) request_weights();
        request_x(ask.part, ask.piece, ask.stage);
        cp_async_commit();
        ask_next();
    }

    float acc[NT][4] = {}, total[SPLIT ? 1 : NT][4];
    const uint32_t my_x = (lane / 16 * 8 + lane % 8) * ROW_BYTES; /* for ldmatrix */
    const unsigned my_unit = lane / 8 % 2, swizzle = lane % 8;
    unsigned part = 0, piece = 0, at = 0; /* what stage i holds, and where it lies */
    for (unsigned i = 0; i < stages; i++) {
        if (i % STEP == 0) {
            cp_async_wait<AHEAD - STEP>();
            __syncthreads();
            if (i == 0) note(a.trace, LLA_BLOCK_STAGED);
#pragma unroll
            for (int d = 0; d < STEP; d++) {
                if (i + AHEAD + d < stages) {
                    request_weights();
                    request_x(ask.part, ask.piece, ask.stage);
                    ask_next();
                }
                cp_async_commit();
            }
        }
        const uint32_t stage = ring + at * stage_bytes, weights = stage + X_BYTES + warp * KS * PIECE + lane * 16;
        if (++at == STAGES) at = 0;
#pragma unroll
        for (unsigned d = 0; d < KS; d++) {
            const uint4 w = load_shared_16(weights + d * PIECE);
#pragma unroll
            for (int n = 0; n < NT; n += 2) {
                const uint4 b = ldmatrix_x4(stage + my_x + n * 8 * ROW_BYTES + (((2 * d + my_unit) ^ swizzle) << 4));
                mma_16816<T>(acc[n], w, make_uint2(b.x, b.y));
                mma_16816<T>(acc[n + 1], w, make_uint2(b.z, b.w));
            }
        }
        if (++piece < pieces) continue;
        piece = 0;
        if constexpr (!SPLIT) {
#pragma unroll
            for (int n = 0; n < NT; n++)
#pragma unroll
                for (int c = 0; c < 4; c++) {
                    total[n][c] = part ? total[n][c] + acc[n][c] : acc[n][c];
                    acc[n][c] = 0;
                }
            if (++part < PARTS) continue;
            part = 0;
            const unsigned tile = tile0 + warp;
            tile0 += round_tiles;
            if (tile >= s.ntiles) continue;
            /* c0, c1 of a fragment are weight row g, columns 2t and 2t + 1; c2, c3 row g + 8 */
#pragma unroll
            for (int n = 0; n < NT; n++)
#pragma unroll
                for (unsigned e = 0; e < 2; e++) {
                    const unsigned row = 8 * n + lane % 4 * 2 + e;
                    const bool has_row = row < rows;
                    float two_squares = 0;
                    if (has_row)
                        two_squares = finish<T, E>(
                            a, col0 + row, tile, g, total[n][e], total[n][2 + e],
                            prepare<T, E, false>(a, col0 + row, tile, g, E == QKV ? slot_of(a, col0 + row) : Slot{}));
                    if (E == ADD) finish_squares<4>(a, has_row, col0 + row, tile, g, two_squares);
                }
        } else {
            if (s.overlaid) { /* nobody fills or reads the ring any more */
                cp_async_wait<0>();
                __syncthreads();
            }
            cluster_wait(); /* every block of the cluster runs, and has read the sums of the round before */
#pragma unroll
            for (unsigned n = 0; n < NT; n++) {
                const unsigned to = n + warp % SPREAD * NT;
                store_shared_16(outbox + ((to * boxes + warp / SPREAD) * 32 + lane) * 16,
                                *reinterpret_cast<const uint4 *>(acc[n]));
#pragma unroll
                for (int c = 0; c < 4; c++) acc[n][c] = 0;
            }
            fence_shared_async();
            if (reader && threadIdx.x == 0) mbarrier_expect(barrier, (CLUSTER - 1) * box_bytes);
            __syncthreads();
            /* its own box stays where it is: compute-sanitizer takes a copy to the block itself for an error */
            if (threadIdx.x < CLUSTER && threadIdx.x != rank && 8 * (threadIdx.x % NT) < rows)
                copy_to_cluster(inbox + rank * box_bytes, outbox + threadIdx.x * box_bytes, box_bytes, barrier,
                                threadIdx.x);
            if (E != QKV) fetch(); /* sooner, the products would wait for it; now it comes while the sums do */
            if (reader) mbarrier_wait(barrier, round++ & 1);
            __syncwarp();
            float sum[4] = {};
            if (mine) {
#pragma unroll
                for (unsigned p = 0; p < PARTS; p++) {
                    const uint4 raw =
                        load_shared_16((p == rank ? outbox : inbox) + ((p * boxes + warp) * 32 + lane) * 16);
#pragma unroll
                    for (int c = 0; c < 4; c++) {
                        const float v = reinterpret_cast<const float *>(&raw)[c];
                        sum[c] = p ? sum[c] + v : v;
                    }
                }
            }
            if (i + 1 < stages)
                cluster_arrive();
            else
                cluster_arrive_relaxed();
#pragma unroll
            for (unsigned e = 0; e < 2; e++) {
                const bool has_row = mine && col + e < rows;
                float two_squares = 0;
                if (has_row)
                    two_squares = finish<T, E>(a, col0 + col + e, tile0 + my_slot, g, sum[e], sum[2 + e], operands[e]);
                if (E == ADD) finish_squares<4>(a, has_row, col0 + col + e, tile0 + my_slot, g, two_squares);
            }
            tile0 += round_tiles;
            if (E == QKV && i + 1 < stages) fetch();
        }
    }
    cp_async_wait<0>();        /* there may be fewer stages than were asked for ahead */
    if (SPLIT) cluster_wait(); /* the outbox may still be on its way */
    note(a.trace, LLA_BLOCK_ENDED);
}

/* How `most` teams, each of up to `max_slots` row tiles at once, share the row tiles in the fewest rounds. */
Shape shape_for(size_t ntiles, size_t ktiles, size_t most, size_t max_slots) {
    const size_t each = (ntiles + most - 1) / most, rounds = (each + max_slots - 1) / max_slots,
                 slots = (each + rounds - 1) / rounds;
    const size_t teams = (ntiles + slots - 1) / slots;
    Shape s = {};
    s.ntiles = (unsigned)ntiles;
    s.ktiles = (unsigned)ktiles;
    s.slots = (unsigned)slots;
    s.teams = (unsigned)(teams < most ? teams : most);
    return s;
}

/* Launches the kernel where the GPU has the clusters and the shared memory, and says so. */
template <class T, int NT, Epilogue E, bool SPLIT, int STAGES, int STEP, int EARLY = STAGES - STEP>
lla_status launch_many(const lla_cuda_ctx *ctx, const char *name, const Linear &a, bool *done) {
    auto *kernel = many_kernel<T, NT, E, SPLIT, STAGES, STEP, EARLY>;
    const size_t ntiles = a.half ? (a.n / 2 + 7) / 8 : tiles_of(a.n), ktiles = tiles_of(a.k);
    const size_t max_warps = SPLIT ? MAX_WARPS_SPLIT : MAX_WARPS;
    const size_t most = SPLIT ? resident_clusters(ctx, kernel, 32 * max_warps, CLUSTER) : (size_t)ctx->sm_count;
    if (!most) return LLA_OK;
    Shape s = shape_for(ntiles, ktiles, most, max_warps);
    const size_t tiles = s.teams * s.slots, pieces = ((ktiles + PARTS - 1) / PARTS + KS - 1) / KS,
                 stages = (ntiles + tiles - 1) / tiles * (SPLIT ? 1 : PARTS) * pieces;
    const size_t fewest = STAGES - STEP; /* the kernel asks for so many before it looks */
    s.ring = (unsigned)(stages >= STAGES ? STAGES : stages > fewest ? stages : fewest);
    size_t smem = s.ring * (8 * NT * ROW_BYTES + s.slots * KS * PIECE);
    if (SPLIT) {
        const size_t boxes = CLUSTER * ((s.slots * NT + CLUSTER - 1) / CLUSTER) * PIECE; /* either way */
        s.overlaid = ntiles <= tiles;
        s.box = (unsigned)(s.overlaid && smem < boxes ? boxes : smem);
        smem = s.box + 128 + (s.overlaid ? 1 : 2) * boxes;
    }
    if (smem > ctx->max_smem) return LLA_OK;
    const dim3 grid(s.teams * (SPLIT ? CLUSTER : 1), (unsigned)((a.max_rows + 8 * NT - 1) / (8 * NT)));
    const int threads = (int)(32 * s.slots);
    if (SPLIT && !cluster_fits(kernel, grid, threads, smem, CLUSTER)) return LLA_OK;
    *done = true;
    return launch_clusters(ctx, name, kernel, grid, threads, smem, SPLIT ? CLUSTER : 1, a, s);
}

/* Split where a tile a warp would leave most of the GPU idle, if the GPU has clusters. Four stages keep 54 to 96 KB of
 * weights on their way to an SM. Where a stage has many products, warps that wait for each other after each lose more
 * time than its copies take: then a barrier for two. */
template <class T, int NT, Epilogue E>
lla_status launch_rows(const lla_cuda_ctx *ctx, const char *name, const Linear &a) {
    bool done = false;
    if constexpr (E == ADD && NT >= 4) /* down: a deep ring, of which x does not have to stand behind all */
        if (is_down(a)) LLA_TRY((launch_many<T, NT, E, true, NT == 4 ? 8 : 6, 2, 3>(ctx, name, a, &done)));
    if constexpr (E == ADD || E == QKV)
        if (!done) LLA_TRY((launch_many<T, NT, E, true, 4, 1>(ctx, name, a, &done)));
    if constexpr (NT >= 4)
        if (!done) LLA_TRY((launch_many<T, NT, E, false, 6, 2>(ctx, name, a, &done)));
    if (!done) LLA_TRY((launch_many<T, NT, E, false, 4, 1>(ctx, name, a, &done)));
    if (!done) LLA_TRY((launch_many<T, NT, E, false, 2, 1>(ctx, name, a, &done)));
    if (done) return LLA_OK;
    return lla_fail(LLA_ELIMIT, "%s: two stages do not fit in %zu bytes of shared memory", name, ctx->max_smem);
}

} // namespace

template <class T, Epilogue E> lla_status linear_many(const lla_cuda_ctx *ctx, const char *name, const Linear &a) {
    if (a.norm) {
        const Norm norm = {a.header, a.by_logit ? a.index : nullptr, a.x, a.norm, a.squares, a.normed, (unsigned)a.k,
                           a.eps};
        LLA_TRY(launch_norm<T>(ctx, a.max_rows, norm));
    }
    if (E == STORE && lla_many_head_takes(ctx)) return lla_many_head(ctx, a.normed, a.w, a.out);
    if (a.max_rows <= 16) return launch_rows<T, 2, E>(ctx, name, a);
    if (a.max_rows <= 32) return launch_rows<T, 4, E>(ctx, name, a);
    return launch_rows<T, 8, E>(ctx, name, a);
}

#define MANY(T)                                                                                                        \
    template lla_status linear_many<T, QKV>(const lla_cuda_ctx *, const char *, const Linear &);                       \
    template lla_status linear_many<T, ADD>(const lla_cuda_ctx *, const char *, const Linear &);                       \
    template lla_status linear_many<T, SWIGLU>(const lla_cuda_ctx *, const char *, const Linear &);                    \
    template lla_status linear_many<T, STORE>(const lla_cuda_ctx *, const char *, const Linear &);
MANY(__nv_bfloat16)
MANY(__half)
