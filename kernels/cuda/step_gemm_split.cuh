/* step_gemm_split.cuh: the product by wgmma with K split over a cluster, for sm_90a: where a step has too few tiles to
 * keep the GPU busy, and K is long enough to share.
 *
 * Eight blocks share a tile; each sums one of the parts of K (nodes.h), and reads only its share of weights and rows.
 * Then the parts' sums meet: block b gets those of the tile's b-th eighth of columns (rows of the step) in its shared
 * memory, where the ring was, and adds them in order. */
#ifndef LLA_STEP_GEMM_SPLIT_CUH
#define LLA_STEP_GEMM_SPLIT_CUH

#include "step_gemm_sm90.cuh"

namespace {

enum { SHARERS = PARTS /* blocks of a cluster */ };

/* Groups of four warps, each with 64 weight rows by NI x 8 rows of the step; pieces of the ring. */
template <int GROUPS_, int NI_, int STAGES_> struct SplitTile {
    static constexpr int GROUPS = GROUPS_, MI = 1, NI = NI_, KT = 4, STAGES = STAGES_;
    static constexpr int WARPS_M = 4 * GROUPS, BM = 64 * GROUPS, BN = 8 * NI, THREADS_ = 128 * GROUPS;
    static constexpr int W_BYTES = BM / 16 * KT * 512, STAGE_BYTES = W_BYTES + BN * 128;
    static constexpr int SUMMED = NI / SHARERS; /* eights of columns that a block sums in the end */
    static constexpr int PART_BYTES = SUMMED * WARPS_M * 512, INBOX = SHARERS * PART_BYTES;
    static constexpr int RING = STAGES * STAGE_BYTES > INBOX ? STAGES * STAGE_BYTES : INBOX;
    static constexpr int SMEM = RING + 1024;                  /* the ring starts at a multiple of 1024 */
    static constexpr int REGISTERS = GROUPS == 3 ? 160 : 112; /* of a thread that multiplies */
    static constexpr int AT_ENTRY = 65536 / (THREADS_ + 128) / 8 * 8;
    static_assert(GROUPS == 3 || GROUPS == 4, "registers are shared out for 512 or 640 threads");
    static_assert((REGISTERS - AT_ENTRY) * THREADS_ <= (AT_ENTRY - 24) * 128,
                  "those that fill the ring have given them");
    static_assert(4 * NI + 16 + 16 <= REGISTERS, "sums and weights are in registers");
    static_assert(NI % SHARERS == 0 && BN <= 256, "columns are shared out in eights; a box has at most 256 rows");
    static_assert(SMEM <= 227 * 1024, "the ring fits in shared memory");
};

/* What is left for finish(). */
template <class S> struct SummedTile {
    static constexpr int MI = 1, NI = S::SUMMED;
};

template <class T, Epilogue E, class S>
__global__ void __launch_bounds__(S::THREADS_ + 128, 1)
    split_kernel(const Product a, const __grid_constant__ CUtensorMap w_map,
                 const __grid_constant__ CUtensorMap x_map) {
#ifdef LLA_SM90A_CODE
    LLA_DYNAMIC_SHARED(smem, 16);
    __shared__ uint64_t barriers[2][S::STAGES];
    __shared__ uint4 zeros[32];
    constexpr int NI = S::NI, KT = S::KT;
    const unsigned warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    note(a.trace, LLA_BLOCK_BEGAN);
    const uint32_t base = (shared_address(smem) + 1023) / 1024 * 1024;
    const uint32_t full = shared_address(barriers[0]), empty = shared_address(barriers[1]);
    if (threadIdx.x < 32) zeros[threadIdx.x] = make_uint4(0, 0, 0, 0);
    if (threadIdx.x == 0) {
        for (int s = 0; s < S::STAGES; s++) {
            barrier_init(full + 8 * s, 1);
            barrier_init(empty + 8 * s, S::WARPS_M);
        }
        barriers_ready();
    }
    __syncthreads();
    pdl_launch_next();
    const unsigned rows = rows_of(a); /* a step input: it was there before the step's first kernel */
    const unsigned columns = (a.max_rows + S::BN - 1) / S::BN, rank = blockIdx.x % SHARERS, tile = blockIdx.x / SHARERS,
                   row0 = tile % columns * S::BN, tile0 = tile / columns * S::WARPS_M;
    if (row0 >= rows) return; /* as do all blocks of the cluster */
    const unsigned ktiles = (a.k + 15) / 16, k_first = ktiles * rank / PARTS, k_last = ktiles * (rank + 1) / PARTS;
    const unsigned pieces = (k_last - k_first + KT - 1) / KT;

    if (warp >= S::WARPS_M) { /* those that fill the ring */
        give_registers<24>();
        if (threadIdx.x != S::WARPS_M * 32) return;
        unsigned stage = 0, parity = 0; /* of the next piece, behind those that are asked for ahead */
        const auto copy_w = [&](unsigned piece, unsigned at) {
            barrier_arrive_for(full + 8 * at, S::STAGE_BYTES);
            copy_boxes(base + at * S::STAGE_BYTES, &w_map, 0, k_first + piece * KT, tile0, full + 8 * at, true);
        };
        const auto copy_x = [&](unsigned piece, unsigned at) {
            copy_box(base + at * S::STAGE_BYTES + S::W_BYTES, &x_map, (k_first + piece * KT) * 16, row0, full + 8 * at);
        };
        const unsigned ahead = pieces < S::STAGES ? pieces : S::STAGES;
        for (unsigned i = 0; i < ahead; i++) copy_w(i, i); /* weights do not depend on the kernel before */
        pdl_wait();
        for (unsigned i = 0; i < ahead; i++) copy_x(i, i);
        for (unsigned i = ahead; i < pieces; i++) {
            barrier_wait(empty + 8 * stage, parity);
            copy_w(i, stage);
            copy_x(i, stage);
            if (++stage == S::STAGES) {
                stage = 0;
                parity ^= 1;
            }
        }
        return;
    }

    take_registers<S::REGISTERS>();
    pdl_wait(); /* results are added to what the kernels before wrote */
    note(a.trace, LLA_BLOCK_FREE);
    const uint32_t w_at = base + warp * KT * 512 + lane * 16, zeros_at = shared_address(&zeros[lane]);
    const auto load = [&](uint32_t place, bool inside) {
        return load_shared_16(inside ? w_at + place : zeros_at); /* what is not inside is the next part's */
    };
    float part[NI][4] = {};
    uint4 w[KT];
    unsigned piece = 0, stage = 0, parity = 0, before = 0; /* before: barrier of the place that the piece before had */
    unsigned left = k_last - k_first;                      /* column tiles */
    int accumulate = 0;
    barrier_wait(full, 0);
    note(a.trace, LLA_BLOCK_STAGED);
    w[0] = load(0, true);
    w[1] = load(512, left > 1);
#pragma unroll 1
    while (piece < pieces) {
        const uint32_t place = stage * S::STAGE_BYTES, mine = empty + 8 * stage;
        if (++stage == S::STAGES) {
            stage = 0;
            parity ^= 1;
        }
        piece++;
        const uint32_t next = stage * S::STAGE_BYTES;
        const unsigned then = left > KT ? left - KT : 0;
#pragma unroll
        for (unsigned h = 0; h < KT; h += 2) {
            const uint64_t x = wgmma_rows(base + place + S::W_BYTES) + 2 * h;
            wgmma_fence();
            Wgmma<T, NI>::run(part, w[h], x, accumulate);
            Wgmma<T, NI>::run(part, w[h + 1], x + 2, 1);
            wgmma_commit();
            accumulate = 1;
            wgmma_wait<1>(); /* the two products before these are done: their weights' registers are free */
            if (h == 0 && before && lane == 0) barrier_arrive(before);
            if (h == 2 && piece < pieces) barrier_wait(full + 8 * stage, parity);
#pragma unroll
            for (unsigned e = 0; e < 2; e++)
                w[2 - h + e] = h == 0 ? load(place + (2 + e) * 512, 2 + e < left) : load(next + e * 512, e < then);
        }
        before = mine;
        left = then;
    }
    wgmma_wait<0>();
    wgmma_arrived(part);

    if (E == ADD && lane < 8 * S::SUMMED) { /* what the sums are added to, for finish() */
        const unsigned row = row0 + rank * (8 * S::SUMMED) + lane;
        if (row < rows && (tile0 + warp) * 16 < a.n)
            prefetch_l1((const T *)a.out + (size_t)row * a.n + (tile0 + warp) * 16);
    }
    cluster_arrive(); /* nobody reads the ring any more */
    cluster_wait();
    const uint32_t box = base + warp * 512 + lane * 16;
    /* Warps and blocks begin with different blocks: all at once to one take 4 us longer at 256 rows. Registers have no
     * index, so each beginning has code of its own. */
    const auto send_from = [&](unsigned first) {
#pragma unroll
        for (unsigned i = 0; i < SHARERS; i++) {
            const unsigned to = (first + i) % SHARERS;
            if (row0 + to * (8 * S::SUMMED) >= rows) continue;
#pragma unroll
            for (unsigned j = 0; j < S::SUMMED; j++)
                store_cluster_16(box + rank * S::PART_BYTES + j * (S::WARPS_M * 512), to, part[to * S::SUMMED + j]);
        }
    };
    static_assert(SHARERS == 8, "a case for each");
    switch ((warp + rank) % SHARERS) {
    case 0:
        send_from(0);
        break;
    case 1:
        send_from(1);
        break;
    case 2:
        send_from(2);
        break;
    case 3:
        send_from(3);
        break;
    case 4:
        send_from(4);
        break;
    case 5:
        send_from(5);
        break;
    case 6:
        send_from(6);
        break;
    default:
        send_from(7);
    }
    cluster_arrive();
    cluster_wait();
    if (row0 + rank * (8 * S::SUMMED) >= rows) return;
    float total[1][S::SUMMED][4];
#pragma unroll
    for (unsigned p = 0; p < SHARERS; p++)
#pragma unroll
        for (unsigned j = 0; j < S::SUMMED; j++) {
            const uint4 raw = load_shared_16(box + p * S::PART_BYTES + j * (S::WARPS_M * 512));
            const float sums[4] = {__uint_as_float(raw.x), __uint_as_float(raw.y), __uint_as_float(raw.z),
                                   __uint_as_float(raw.w)};
#pragma unroll
            for (int c = 0; c < 4; c++) total[0][j][c] = p ? total[0][j][c] + sums[c] : sums[c];
        }
    finish<T, E, SummedTile<S>>(a, total, tile0 + warp, row0 + rank * (8 * S::SUMMED), rows, lane);
    note(a.trace, LLA_BLOCK_ENDED);
#endif
}

} // namespace

#endif
