/* step_gemm_sm90.cuh: the product by wgmma, for sm_90a.
 *
 * Its sums have mma.sync's bits: both add the products of 16 columns at a time in one way (profiles/prefill.md). A
 * group of four warps multiplies 64 weight rows, each warp's 16 from registers, with all BN rows of x, which the tensor
 * core reads from the ring itself: 64 bytes a cycle, whatever the tile.
 *
 * Products run behind the warps: while k-tile i is multiplied, the weights of i + 2 and i + 3 come into registers. */
#ifndef LLA_STEP_GEMM_SM90_CUH
#define LLA_STEP_GEMM_SM90_CUH

#include "step_gemm.cuh"
#include "wgmma.cuh"

namespace {

template <class T, Epilogue E, class S>
__global__ void __launch_bounds__(S::THREADS_, S::RESIDENT) wgmma_kernel(const Product a) {
#ifdef LLA_SM90A_CODE
    extern __shared__ char smem[];
    constexpr int NI = S::NI, KT = S::KT;
    static_assert(S::MI == 1 && S::WARPS_N == 1 && S::WARPS_M % 4 == 0, "a warp has 16 weight rows and all rows of x");
    static_assert(KT == 4 && S::STAGES >= 4, "128 bytes of a row; pieces: read, complete ahead of it, two under way");
    const unsigned warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const unsigned pieces = ((a.k + 15) / 16 + KT - 1) / KT;
    pdl_launch_next();
    Ring<S> ring;
    ring.begin(a, smem);
    cp_async_wait<S::STAGES - 2>();
    wgmma_publish();
    __syncthreads();

    const uint32_t w_at = warp * KT * 512 + lane * 16;
    uint4 w[KT];
#pragma unroll
    for (int s = 0; s < KT - 1; s++) w[s] = load_shared_16(ring.reading + w_at + s * 512);

    float sums[2][1][NI][4]; /* total, part */
    float(&total)[NI][4] = sums[0][0], (&part)[NI][4] = sums[1][0];
    for (unsigned tile = blockIdx.x; tile < ring.tiles; tile += gridDim.x) {
        Parts parts(a.k, a.parts);
        int accumulate = 0;
        unsigned kt = 0;
#pragma unroll
        for (int j = 0; j < NI; j++)
#pragma unroll
            for (int c = 0; c < 4; c++) total[j][c] = 0;
#pragma unroll 1
        for (unsigned piece = 0; piece < pieces; piece++) {
            const uint32_t place = ring.reading;
            ring.reading = ring.after(place);
#pragma unroll
            for (int s = 0; s < KT; s++) {
                wgmma_fence();
                Wgmma<T, NI>::run(part, w[s], wgmma_rows(place + S::W_BYTES) + 2 * s, accumulate);
                wgmma_commit();
                accumulate = 1;
                wgmma_wait<1>(); /* the product before this one is done: its weights' register is free */
                if (s == 0) {    /* and so is the place of the piece before, once all groups are here */
                    cp_async_wait<S::STAGES - 3>();
                    wgmma_publish();
                    __syncthreads();
                    ring.refill(a);
                }
                w[(s + KT - 1) % KT] = load_shared_16((s == 0 ? place + (KT - 1) * 512 : ring.reading + (s - 1) * 512) +
                                                      w_at);
                if (++kt != parts.end) continue;
                wgmma_wait<0>();
                wgmma_arrived(part);
#pragma unroll
                for (int j = 0; j < NI; j++)
#pragma unroll
                    for (int c = 0; c < 4; c++) total[j][c] += part[j][c];
                accumulate = 0;
                parts.advance();
            }
        }
        wgmma_wait<0>(); /* products of the zeros behind K's end */
        wgmma_arrived(part);
        finish<T, E, S>(a, sums[0], tile / ring.columns * (S::BM / 16) + warp, tile % ring.columns * S::BN, ring.rows,
                        lane);
    }
    cp_async_wait<0>();
#endif
}

} // namespace

#endif
