/* step_gemm_sm90.cuh: the product by wgmma, for sm_90a.
 *
 * Its sums have mma.sync's bits: both add the products of 16 columns at a time in one way (profiles/prefill.md). A
 * group of four warps multiplies 64 weight rows, each warp's 16 from registers, with all BN rows of x, which the tensor
 * core reads from shared memory itself.
 *
 * One thread fills the ring, with two copies a piece: a box of packed weights, and a box of x, swizzled on the way.
 * Groups that multiply wait for a piece's `full` barrier, and give its place back through `empty`. Products run behind
 * the warps: while two k-tiles are multiplied, the weights of the next come into the registers that those before had.
 * PACED: while the ring is filled for the first time only PACE pieces of weights are under way, so that what the
 * kernels before read does not stand behind all of them. The thread that fills may then still be waiting when x is
 * there to be copied: another, which multiplies, copies x that first time, and x has a barrier of its own.
 */
#ifndef LLA_STEP_GEMM_SM90_CUH
#define LLA_STEP_GEMM_SM90_CUH

#include "sm90.cuh"
#include "step_gemm.cuh"

namespace {

/* Where a thread is in the stream of pieces. */
template <class S> struct Cursor {
    unsigned tile, piece = 0;
    unsigned stage = 0, parity = 0; /* place in the ring, and how often it went round */
    __device__ __forceinline__ void advance(unsigned pieces) {
        if (++piece == pieces) {
            piece = 0;
            tile += gridDim.x;
        }
        if (++stage == S::STAGES) {
            stage = 0;
            parity ^= 1;
        }
    }
};

/* Threads that fill the ring: a group of four warps can give its registers to the others, else a warp will do. */
template <class S> constexpr int FILLERS = S::WARPS_M > 4 ? 128 : 32;
template <class S> constexpr int REGISTERS = S::WARPS_M == 12 ? 160 : 240; /* then, of a thread that multiplies */
template <class S> constexpr int AT_ENTRY = 65536 / (S::THREADS_ + FILLERS<S>) / 8 * 8;
enum { PACE = 2 };

/* Steps of up to so many rows read a weight once, or by two tiles at the same time. */
enum { READ_ONCE_ROWS = 256 };

/* STEP: k-tiles that are multiplied between two waits: 2 where all parts of K are whole pairs of them, else 1. */
template <class T, Epilogue E, class S, int STEP, bool PACED>
__global__ void __launch_bounds__(S::THREADS_ + FILLERS<S>, S::RESIDENT)
    wgmma_kernel(const Product a, const __grid_constant__ CUtensorMap w_map,
                 const __grid_constant__ CUtensorMap x_map) {
#ifdef LLA_SM90A_CODE
    LLA_DYNAMIC_SHARED(smem, 16);
    __shared__ uint64_t barriers[PACED ? 3 : 2][S::STAGES];
    constexpr int NI = S::NI, KT = S::KT;
    static_assert(S::MI == 1 && S::WARPS_N == 1 && S::WARPS_M % 4 == 0, "a warp has 16 weight rows and all rows of x");
    static_assert(FILLERS<S> == 32 || (REGISTERS<S> - AT_ENTRY<S>)*S::THREADS_ <= (AT_ENTRY<S> - 24) * 128,
                  "a block waits for ever for registers that nobody gives");
    static_assert(KT == 4 && S::BN <= 256, "a box of x: 128 bytes of at most 256 rows");
    const unsigned warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    note(a.trace, LLA_BLOCK_BEGAN);
    const unsigned ktiles = (a.k + 15) / 16, pieces = (ktiles + KT - 1) / KT, ntiles = (a.n + 15) / 16;
    const uint32_t base = (shared_address(smem) + 1023) / 1024 * 1024;
    const uint32_t full = shared_address(barriers[0]), empty = shared_address(barriers[1]),
                   full_x = PACED ? shared_address(barriers[2]) : full;
    if (threadIdx.x == 0) {
        for (int s = 0; s < S::STAGES; s++) {
            barrier_init(full + 8 * s, 1);
            if (PACED) barrier_init(full_x + 8 * s, 1);
            barrier_init(empty + 8 * s, S::WARPS_M);
        }
        barriers_ready();
    }
    __syncthreads();
    pdl_launch_next();
    const unsigned rows = rows_of(a); /* a step input: it was there before the step's first kernel */
    const unsigned columns = (rows + S::BN - 1) / S::BN;
    constexpr unsigned HEIGHT = S::BM / 16; /* in row tiles */
    const unsigned tiles = (ntiles + HEIGHT - 1) / HEIGHT * columns;

    const auto copy_x = [&](const Cursor<S> &at) {
        if (PACED) barrier_arrive_for(full_x + 8 * at.stage, S::STAGE_BYTES - S::W_BYTES);
        copy_box(base + at.stage * S::STAGE_BYTES + S::W_BYTES, &x_map, at.piece * (KT * 16), at.tile % columns * S::BN,
                 full_x + 8 * at.stage);
    };
    const auto fill_x = [&] {
        Cursor<S> at = {blockIdx.x};
        for (int i = 0; i < S::STAGES && at.tile < tiles; i++) {
            copy_x(at);
            at.advance(pieces);
        }
    };

    if (warp >= S::WARPS_M) { /* those that fill the ring */
        if constexpr (FILLERS<S> == 128) give_registers<24>();
        const bool is_read_once = a.max_rows <= READ_ONCE_ROWS;
        const auto copy_w = [&](const Cursor<S> &at) {
            barrier_arrive_for(full + 8 * at.stage, PACED ? S::W_BYTES : S::STAGE_BYTES);
            copy_boxes(base + at.stage * S::STAGE_BYTES, &w_map, 0, at.piece * KT, at.tile / columns * HEIGHT,
                       full + 8 * at.stage, is_read_once);
        };
        if (lane || warp > S::WARPS_M) return;
        Cursor<S> at = {blockIdx.x};
        for (int i = 0; i < S::STAGES && at.tile < tiles; i++) { /* weights do not depend on the kernel before */
            if (PACED && i >= PACE) barrier_wait(full + 8 * (i - PACE), 0);
            copy_w(at);
            at.advance(pieces);
        }
        pdl_wait();
        if (!PACED) fill_x();
        while (at.tile < tiles) {
            barrier_wait(empty + 8 * at.stage, at.parity ^ 1);
            copy_w(at);
            copy_x(at);
            at.advance(pieces);
        }
        return;
    }

    if constexpr (FILLERS<S> == 128) take_registers<REGISTERS<S>>();
    if (E == QKV && blockIdx.x < tiles)
        prefetch_operands<T, S::BN>(a, blockIdx.x / columns * HEIGHT + warp, blockIdx.x % columns * S::BN, rows, lane);
    pdl_wait(); /* results are added to what the kernels before wrote */
    if (PACED) {
        if (threadIdx.x == 0) fill_x();
        __syncwarp();
    }
    note(a.trace, LLA_BLOCK_FREE);
    const uint32_t w_at = base + warp * KT * 512 + lane * 16;
    uint4 w[KT];
    Cursor<S> at = {blockIdx.x};
    if (at.tile < tiles) {
        barrier_wait(full, 0);
        if (PACED) barrier_wait(full_x, 0);
        note(a.trace, LLA_BLOCK_STAGED);
        w[0] = load_shared_16(w_at);
        w[1] = load_shared_16(w_at + 512);
    }
    float sums[2][1][NI][4]; /* total, part */
    float (&total)[NI][4] = sums[0][0], (&part)[NI][4] = sums[1][0];
    while (at.tile < tiles) {
        Parts parts(a.k);
        const unsigned tile = at.tile;
        int accumulate = 0;
        unsigned kt = 0, before = 0; /* before: barrier of the place that the piece before had */
#pragma unroll
        for (int j = 0; j < NI; j++)
#pragma unroll
            for (int c = 0; c < 4; c++) total[j][c] = 0;
        const auto end_part = [&] {
            wgmma_wait<0>();
            wgmma_arrived(part);
#pragma unroll
            for (int j = 0; j < NI; j++)
#pragma unroll
                for (int c = 0; c < 4; c++) total[j][c] += part[j][c];
            accumulate = 0;
            parts.advance();
        };
#pragma unroll 1
        while (at.tile == tile) {
            const uint32_t place = at.stage * S::STAGE_BYTES, mine = empty + 8 * at.stage;
            at.advance(pieces);
            const uint32_t next = at.stage * S::STAGE_BYTES;
#pragma unroll
            for (int h = 0; h < KT; h += STEP) {
                const uint64_t x = wgmma_rows(base + place + S::W_BYTES) + 2 * h;
                wgmma_fence();
                Wgmma<T, NI>::run(part, w[h], x, accumulate);
                if (STEP == 2) Wgmma<T, NI>::run(part, w[h + 1], x + 2, 1);
                wgmma_commit();
                accumulate = 1;
                wgmma_wait<2 / STEP>(); /* products before the last two are done: their weights' registers are free */
                if (h == 2 - STEP && before && lane == 0) barrier_arrive(before);
                if (h == 2 && at.tile < tiles) {
                    barrier_wait(full + 8 * at.stage, at.parity);
                    if (PACED) barrier_wait(full_x + 8 * at.stage, at.parity);
                }
#pragma unroll
                for (int i = h + 2; i < h + 2 + STEP; i++)
                    w[i % KT] = load_shared_16(w_at + (i < KT ? place + i * 512 : next + (i - KT) * 512));
                kt += STEP;
                if (kt == parts.end) end_part();
            }
            before = mine;
        }
        wgmma_wait<0>(); /* products of what lies behind K's end */
        wgmma_arrived(part);
        if (lane == 0) barrier_arrive(before);
        finish<T, E, S>(a, sums[0], tile / columns * HEIGHT + warp, tile % columns * S::BN, rows, lane);
    }
    note(a.trace, LLA_BLOCK_ENDED);
#endif
}

/* A map of 16-bit elements [sizes] for boxes of [box] of them, innermost first; rows follow each other. */
template <int N>
lla_status make_map(const void *at, const cuuint64_t (&sizes)[N], const cuuint32_t (&box)[N],
                    CUtensorMapSwizzle swizzle, CUtensorMap *map) {
    using Encode = CUresult (*)(CUtensorMap *, CUtensorMapDataType, cuuint32_t, void *, const cuuint64_t *,
                                const cuuint64_t *, const cuuint32_t *, const cuuint32_t *, CUtensorMapInterleave,
                                CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill);
    static Encode encode = nullptr;
    if (!encode) {
        void *found = nullptr;
        cudaDriverEntryPointQueryResult result;
        const cudaError_t e =
            cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result);
        if (e != cudaSuccess || !found)
            return lla_fail(LLA_EDEVICE, "the driver has no cuTensorMapEncodeTiled: %s", cudaGetErrorString(e));
        encode = (Encode)found;
    }
    cuuint64_t strides[N] = {sizes[0] * 2};
    cuuint32_t steps[N];
    for (int i = 1; i < N; i++) strides[i] = strides[i - 1] * sizes[i];
    for (int i = 0; i < N; i++) steps[i] = 1;
    const CUresult r = encode(map, CU_TENSOR_MAP_DATA_TYPE_UINT16, N, const_cast<void *>(at), sizes, strides, box,
                              steps, CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                              CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    if (r != CUDA_SUCCESS)
        return lla_fail(LLA_EDEVICE, "no tensor map for rows of %zu elements: error %d", (size_t)sizes[0], (int)r);
    return LLA_OK;
}

/* Packed weights [row tiles, k-tiles, 256] and x [rows, k], for pieces of the ring. */
template <class S> lla_status map_product(const Product &a, size_t rows, CUtensorMap *w, CUtensorMap *x) {
    LLA_TRY(
        make_map<3>(a.w, {256, tiles_of(a.k), tiles_of(a.n)}, {256, S::KT, S::BM / 16}, CU_TENSOR_MAP_SWIZZLE_NONE, w));
    return make_map<2>(a.x, {a.k, rows}, {S::KT * 16, S::BN}, CU_TENSOR_MAP_SWIZZLE_128B, x);
}

} // namespace

#endif
