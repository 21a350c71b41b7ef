/* gemm_bounds.cu: what bounds wgmma_kernel of step_gemm_sm90.cuh: its loop with parts of it left out, and with operands
 * that two blocks share by multicast. Results are wrong where something is left out; `differ` counts elements that are
 * not the whole loop's.
 *
 *   cc -O2 -I. -Iinclude -c base/status.c -o status.o
 *   nvcc -O3 -std=c++17 -DLLA_SM90A -gencode arch=compute_90a,code=sm_90a -I. -Iinclude profiles/gemm_bounds.cu
 * status.o -o gemm_bounds && ./gemm_bounds */
#include "../kernels/cuda/step_gemm_sm90.cuh"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <vector>

#define CHECK(call)                                                                                                    \
    do {                                                                                                               \
        const cudaError_t e_ = (call);                                                                                 \
        if (e_ != cudaSuccess) {                                                                                       \
            printf("%s: %s\n", #call, cudaGetErrorString(e_));                                                         \
            exit(1);                                                                                                   \
        }                                                                                                              \
    } while (0)

using T = __nv_bfloat16;

enum {
    NO_X = 1,        /* rows are not copied */
    NO_W = 2,        /* nor weights */
    NO_LOADS = 4,    /* weights stay in registers */
    NO_PRODUCTS = 8, /* copies alone */
    NO_PARTS = 16,   /* one sum over K */
    SHARE_W = 32,    /* two blocks copy half of the weights each, for both */
    SHARE_X = 64,    /* the same of rows */
    RACE = 128,      /* with SHARE: places are given back to the own block alone */
    HALF_X = 256,    /* half of the rows is copied */
    HALF_W = 512
};
template <int MODE> constexpr bool is_pair = (MODE & (SHARE_W | SHARE_X)) != 0;

__device__ __forceinline__ void multicast_boxes(uint32_t to, const CUtensorMap *map, unsigned column, unsigned row,
                                                unsigned matrix, uint32_t barrier) {
    asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster "
                 "[%0], [%1, {%2, %3, %4}], [%5], %6;" ::"r"(to),
                 "l"(map), "r"(column), "r"(row), "r"(matrix), "r"(barrier), "h"((uint16_t)3)
                 : "memory");
}

__device__ __forceinline__ void multicast_box(uint32_t to, const CUtensorMap *map, unsigned column, unsigned row,
                                              uint32_t barrier) {
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster "
                 "[%0], [%1, {%2, %3}], [%4], %5;" ::"r"(to),
                 "l"(map), "r"(column), "r"(row), "r"(barrier), "h"((uint16_t)3)
                 : "memory");
}

__device__ __forceinline__ void arrive_at(uint32_t barrier, unsigned rank) {
    asm volatile("{ .reg .b32 there; mapa.shared::cluster.u32 there, %0, %1; "
                 "mbarrier.arrive.release.cluster.shared::cluster.b64 _, [there]; }" ::"r"(barrier),
                 "r"(rank)
                 : "memory");
}

__device__ unsigned long long passed[2]; /* cycles and ns of block 0 */

template <class S, int MODE>
__global__ void __launch_bounds__(S::THREADS_ + 128, 1)
    loop_kernel(const Product a, const __grid_constant__ CUtensorMap w_map, const __grid_constant__ CUtensorMap x_map) {
#ifdef LLA_SM90A_CODE
    extern __shared__ char smem[];
    __shared__ uint64_t barriers[2][S::STAGES];
    constexpr int NI = S::NI, KT = S::KT;
    constexpr bool PAIR = is_pair<MODE>;
    constexpr unsigned HEIGHT = S::BM / 16;
    const unsigned warp = threadIdx.x / 32, lane = threadIdx.x % 32, rank = PAIR ? blockIdx.x % 2 : 0;
    const unsigned pieces = a.k / 16 / KT, columns = (a.max_rows + S::BN - 1) / S::BN;
    const unsigned tiles = (a.n / 16 + HEIGHT - 1) / HEIGHT * columns;
    const uint32_t base = (shared_address(smem) + 1023) / 1024 * 1024;
    const uint32_t full = shared_address(barriers[0]), empty = shared_address(barriers[1]);
    const bool is_clock = threadIdx.x == 0 && blockIdx.x == 0;
    const unsigned long long cycles = is_clock ? clock64() : 0, ns = is_clock ? global_ns() : 0;
    if (threadIdx.x == 0) {
        for (int s = 0; s < S::STAGES; s++) {
            barrier_init(full + 8 * s, 1);
            barrier_init(empty + 8 * s, S::WARPS_M * (PAIR && !(MODE & RACE) ? 2 : 1));
        }
        barriers_ready();
    }
    const auto meet = [&] {
        cluster_arrive();
        cluster_wait();
    };
    if (PAIR)
        meet();
    else
        __syncthreads();
    const auto row_tile = [&](unsigned tile) {
        return MODE & SHARE_X ? tile / 2 / columns * 2 + tile % 2 : tile / columns;
    };
    const auto column = [&](unsigned tile) { return MODE & SHARE_X ? tile / 2 % columns : tile % columns; };

    if (warp >= S::WARPS_M) {
        give_registers<24>();
        if (threadIdx.x != S::WARPS_M * 32) return;
        const auto copy = [&](const Cursor<S> &at) {
            const uint32_t to = base + at.stage * S::STAGE_BYTES, barrier = full + 8 * at.stage;
            const unsigned x_bytes = MODE & NO_X ? 0 : (S::STAGE_BYTES - S::W_BYTES) / (MODE & HALF_X ? 2 : 1),
                           w_bytes = MODE & NO_W ? 0 : S::W_BYTES / (MODE & HALF_W ? 2 : 1);
            if (x_bytes + w_bytes)
                barrier_arrive_for(barrier, x_bytes + w_bytes);
            else
                barrier_arrive(barrier);
            const unsigned matrix = row_tile(at.tile) * HEIGHT, row = column(at.tile) * S::BN;
            if (MODE & SHARE_W)
                multicast_boxes(to + rank * (S::W_BYTES / 2), &w_map, 0, at.piece * KT, matrix + rank * HEIGHT / 2,
                                barrier);
            else if (w_bytes)
                copy_boxes(to, &w_map, 0, at.piece * KT, matrix, barrier, false);
            if (MODE & SHARE_X)
                multicast_box(to + S::W_BYTES + rank * (S::BN / 2 * 128), &x_map, at.piece * (KT * 16),
                              row + rank * S::BN / 2, barrier);
            else if (x_bytes)
                copy_box(to + S::W_BYTES, &x_map, at.piece * (KT * 16), row, barrier);
        };
        Cursor<S> at = {blockIdx.x};
        for (int s = 0; at.tile < tiles; s++) {
            if (s >= S::STAGES) barrier_wait(empty + 8 * at.stage, at.parity ^ 1);
            copy(at);
            at.advance(pieces);
        }
        if (PAIR) meet();
        return;
    }

    take_registers<REGISTERS<S>>();
    const auto give_back = [&](uint32_t barrier) {
        if (PAIR && !(MODE & RACE)) {
            if (lane < 2) arrive_at(barrier, lane);
        } else if (lane == 0) {
            barrier_arrive(barrier);
        }
    };
    const uint32_t w_at = base + warp * KT * 512 + lane * 16;
    uint4 w[KT] = {};
    Cursor<S> at = {blockIdx.x};
    if (at.tile < tiles) {
        barrier_wait(full, 0);
        w[0] = load_shared_16(w_at);
        w[1] = load_shared_16(w_at + 512);
    }
    if (MODE & NO_LOADS) w[2] = w[3] = w[0];
    float sums[2][1][NI][4];
    float (&total)[NI][4] = sums[0][0], (&part)[NI][4] = sums[1][0];
    while (at.tile < tiles) {
        Parts parts(a.k);
        const unsigned tile = at.tile;
        int accumulate = 0;
        unsigned kt = 0, before = 0;
#pragma unroll
        for (int j = 0; j < NI; j++)
#pragma unroll
            for (int c = 0; c < 4; c++) total[j][c] = 0;
        const auto add_part = [&] {
#pragma unroll
            for (int j = 0; j < NI; j++)
#pragma unroll
                for (int c = 0; c < 4; c++) total[j][c] += part[j][c];
        };
#pragma unroll 1
        while (at.tile == tile) {
            const uint32_t place = at.stage * S::STAGE_BYTES, mine = empty + 8 * at.stage;
            at.advance(pieces);
            const uint32_t next = at.stage * S::STAGE_BYTES;
            if (MODE & NO_PRODUCTS) {
                if (at.tile < tiles) barrier_wait(full + 8 * at.stage, at.parity);
                if (before) give_back(before);
            } else {
#pragma unroll
                for (int h = 0; h < KT; h += 2) {
                    const uint64_t x = wgmma_rows(base + place + S::W_BYTES) + 2 * h;
                    wgmma_fence();
                    Wgmma<T, NI>::run(part, w[h], x, accumulate);
                    Wgmma<T, NI>::run(part, w[h + 1], x + 2, 1);
                    wgmma_commit();
                    accumulate = 1;
                    wgmma_wait<1>();
                    if (h == 0 && before) give_back(before);
                    if (h == 2 && at.tile < tiles) barrier_wait(full + 8 * at.stage, at.parity);
                    if (!(MODE & NO_LOADS))
#pragma unroll
                        for (int i = h + 2; i < h + 4; i++)
                            w[i % KT] = load_shared_16(w_at + (i < KT ? place + i * 512 : next + (i - KT) * 512));
                    kt += 2;
                    if (MODE & NO_PARTS || kt != parts.end) continue;
                    wgmma_wait<0>();
                    wgmma_arrived(part);
                    add_part();
                    accumulate = 0;
                    parts.advance();
                }
            }
            before = mine;
        }
        wgmma_wait<0>();
        wgmma_arrived(part);
        if (MODE & NO_PARTS) add_part();
        give_back(before);
        finish<T, STORE, S>(a, sums[0], row_tile(tile) * HEIGHT + warp, column(tile) * S::BN, a.max_rows, lane);
    }
    if (PAIR) meet();
    if (is_clock) passed[0] = clock64() - cycles, passed[1] = global_ns() - ns;
#endif
}

static __global__ void randomize(T *p, size_t n, uint64_t seed) {
    for (size_t i = blockIdx.x * (size_t)blockDim.x + threadIdx.x; i < n; i += (size_t)gridDim.x * blockDim.x) {
        uint64_t z = (i + seed * 0x1000000000) * 0x9E3779B97F4A7C15u;
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9u;
        z = (z ^ z >> 27) * 0x94D049BB133111EBu;
        z ^= z >> 31;
        p[i] = __float2bfloat16((float)(z >> 40) * 0x1p-23f - 1);
    }
}

static __global__ void differing(const uint16_t *a, const uint16_t *b, size_t n, unsigned *count) {
    for (size_t i = blockIdx.x * (size_t)blockDim.x + threadIdx.x; i < n; i += (size_t)gridDim.x * blockDim.x)
        if (a[i] != b[i]) atomicAdd(count, 1u);
}

static T *weights, *rows_in, *found, *expected;
static unsigned *count;

/* One line: n rows of weights by `rows` rows of x over k columns. The whole loop (MODE 0) leaves what is expected. */
template <class S, int MODE> static void time_it(const char *name, unsigned n, unsigned k, unsigned rows) {
    lla_cuda_ctx ctx = {};
    int sms, smem;
    CHECK(cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, 0));
    CHECK(cudaDeviceGetAttribute(&smem, cudaDevAttrMaxSharedMemoryPerBlockOptin, 0));
    ctx.max_smem = (size_t)smem;
    Product a = {};
    a.max_rows = rows;
    a.w = weights;
    a.x = rows_in;
    a.out = found;
    a.n = n;
    a.k = k;
    CUtensorMap w, x;
    const unsigned w_height = S::BM / 16 / (MODE & (SHARE_W | HALF_W) ? 2 : 1),
                   x_height = S::BN / (MODE & (SHARE_X | HALF_X) ? 2 : 1);
    if (make_map<3>(weights, {256, k / 16, n / 16}, {256, S::KT, w_height}, CU_TENSOR_MAP_SWIZZLE_NONE, &w) ||
        make_map<2>(rows_in, {k, rows}, {64, x_height}, CU_TENSOR_MAP_SWIZZLE_128B, &x)) {
        printf("%s\n", lla_last_error());
        return;
    }
    const unsigned tiles = (n / 16 + S::BM / 16 - 1) / (S::BM / 16) * ((rows + S::BN - 1) / S::BN),
                   grid = tiles < (unsigned)sms ? tiles : (unsigned)sms;
    CHECK(cudaMemset(found, 0x11, (size_t)rows * n * sizeof(T)));
    cudaEvent_t begin, end;
    CHECK(cudaEventCreate(&begin));
    CHECK(cudaEventCreate(&end));
    std::vector<float> times;
    for (int r = 0; r < 9; r++) {
        CHECK(cudaEventRecord(begin));
        for (int i = 0; i < 4; i++)
            if (launch_clusters(&ctx, name, loop_kernel<S, MODE>, dim3(grid), S::THREADS_ + 128, S::SMEM,
                                is_pair<MODE> ? 2 : 1, a, w, x)) {
                printf("%s\n", lla_last_error());
                return;
            }
        CHECK(cudaEventRecord(end));
        CHECK(cudaEventSynchronize(end));
        float ms;
        CHECK(cudaEventElapsedTime(&ms, begin, end));
        times.push_back(ms / 4);
    }
    std::sort(times.begin(), times.end());
    unsigned long long clock[2];
    CHECK(cudaMemcpyFromSymbol(clock, passed, sizeof clock));
    unsigned differ = 0;
    if (!MODE) CHECK(cudaMemcpy(expected, found, (size_t)rows * n * sizeof(T), cudaMemcpyDeviceToDevice));
    CHECK(cudaMemset(count, 0, sizeof *count));
    differing<<<264, 256>>>((const uint16_t *)found, (const uint16_t *)expected, (size_t)rows * n, count);
    CHECK(cudaMemcpy(&differ, count, sizeof differ, cudaMemcpyDeviceToHost));
    const double us = 1e3 * times[4], mhz = 1e3 * (double)clock[0] / (double)clock[1];
    printf("%-48s n %5u k %5u rows %4u: %6.1f us, %4.0f TFLOP/s, %4.0f MHz, %4.0f cycles a column tile (ideal %d), %u "
           "differ\n",
           name, n, k, rows, us, 2e-6 * n * k * rows / us, mhz, us * mhz / ((tiles + grid - 1) / grid * (k / 16)),
           S::BM / 64 * S::BN / 2, differ);
}

int main() {
    const size_t most = (size_t)40 << 20;
    CHECK(cudaMalloc(&weights, most * sizeof(T)));
    CHECK(cudaMalloc(&rows_in, most * sizeof(T)));
    CHECK(cudaMalloc(&found, most * sizeof(T)));
    CHECK(cudaMalloc(&expected, most * sizeof(T)));
    CHECK(cudaMalloc(&count, sizeof *count));
    randomize<<<512, 256>>>(weights, most, 1);
    randomize<<<512, 256>>>(rows_in, most, 2);
    using Large = Tile<1, 24, 8, 1, 4, 5, 1>; /* 128 x 192 */
    using Tall = Tile<1, 16, 12, 1, 4, 5, 1>; /* 192 x 128 */
#define TIME(S, mode, n, k, rows) time_it<S, mode>(#S ", " #mode, n, k, rows)
    for (unsigned k : {8960u, 1536u}) {
        TIME(Large, 0, 1536, k, 2112);
        TIME(Large, NO_X | NO_W, 1536, k, 2112);
        TIME(Large, NO_PRODUCTS, 1536, k, 2112);
        TIME(Large, NO_LOADS, 1536, k, 2112);
        TIME(Large, NO_PARTS, 1536, k, 2112);
        TIME(Large, SHARE_X, 1536, k, 2112);
        TIME(Large, SHARE_X | RACE, 1536, k, 2112);
        TIME(Large, SHARE_X | NO_PRODUCTS | RACE, 1536, k, 2112);
        TIME(Large, HALF_X, 1536, k, 2112);
        TIME(Large, HALF_X | NO_PRODUCTS, 1536, k, 2112);
    }
    for (unsigned k : {1536u, 3072u}) { /* gate_up's shape at 256 rows, one turn of 132 SMs */
        TIME(Tall, 0, 12672, k, 256);
        TIME(Tall, NO_X | NO_W, 12672, k, 256);
        TIME(Tall, NO_PRODUCTS, 12672, k, 256);
        TIME(Tall, NO_X | NO_PRODUCTS, 12672, k, 256);
        TIME(Tall, SHARE_W, 12672, k, 256);
        TIME(Tall, SHARE_W | RACE, 12672, k, 256);
        TIME(Tall, HALF_W, 12672, k, 256);
    }
    return 0;
}
