/* gemm_tiles.cuh: the tensor-core product of 16-bit matrices: mma.sync fed by a ring of tiles in shared memory.
 *
 * A block computes a BM x BN tile of out; its warps, WARPS_M x WARPS_N of them, each a WM x WN part in registers. Tiles
 * of BK columns of x and w come through a ring of STAGES pieces, copied by cp.async STAGES - 1 ahead; one barrier a
 * piece both shows the newest piece to all warps and frees the oldest. A row of a piece is 128 bytes, eight units of
 * 16; unit c of row r lies at place c ^ (r % 8), so that the eight rows of an 8 x 8 matrix lie in different banks both
 * when cp.async writes them and when ldmatrix reads them. What lies outside x and w is filled with zeros, which add
 * nothing.
 *
 * Fragments of the next 16 columns are loaded while the tensor cores work on these. */
#ifndef LLA_CUDA_GEMM_TILES_CUH
#define LLA_CUDA_GEMM_TILES_CUH

#include "gemm.cuh"

template <int BM_, int BN_, int WARPS_M_, int WARPS_N_, int BK_, int STAGES_> struct GemmTile {
    static constexpr int BM = BM_, BN = BN_, WARPS_M = WARPS_M_, WARPS_N = WARPS_N_, BK = BK_, STAGES = STAGES_;
    static constexpr int THREADS = 32 * WARPS_M * WARPS_N, WM = BM / WARPS_M, WN = BN / WARPS_N;
    static constexpr int ROWS_A_PASS = THREADS / 8; /* rows that all threads together copy at once */
    static constexpr int STAGE_BYTES = (BM + BN) * BK * 2, SMEM = STAGES * STAGE_BYTES;
    static_assert(BK == 64, "a row of a piece is the 128 bytes that the swizzle spreads over all banks");
    static_assert(WM % 16 == 0 && WN % 16 == 0, "ldmatrix.x4 loads 16 rows of x, and 16 rows of w");
    static_assert(BM % ROWS_A_PASS == 0 && BN % ROWS_A_PASS == 0, "every thread copies as many units as the others");
    static_assert(ROWS_A_PASS % 8 == 0, "the swizzle is the same for all rows that a thread copies");
    static_assert(STAGES >= 2, "one piece is read while another one is written");
    static_assert(SMEM <= 227 * 1024, "the ring fits in the shared memory of a block");
};

/* Tile (row, column) of a block: column by column within bands of BAND rows, so that blocks that run together share
 * rows of x and w in the L2 cache. */
static __device__ __forceinline__ void gemm_block(unsigned id, unsigned rows, unsigned columns, unsigned *row,
                                                  unsigned *column) {
    constexpr unsigned BAND = 8;
    const unsigned band = id / (BAND * columns), first = band * BAND;
    const unsigned height = rows - first < BAND ? rows - first : BAND, in_band = id - first * columns;
    *row = first + in_band % height;
    *column = in_band / height;
}

template <class T, class Tile>
__global__ void __launch_bounds__(Tile::THREADS) gemm_tiles(unsigned m, unsigned n, unsigned k, const T *x, const T *w,
                                                            const T *bias, T *out, unsigned rows, unsigned columns) {
    constexpr int BK = Tile::BK, STAGES = Tile::STAGES, PASS = Tile::ROWS_A_PASS;
    constexpr int MI = Tile::WM / 16, NI = Tile::WN / 8, STEPS = BK / 16;
    extern __shared__ __align__(128) char ring[];
    const unsigned warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const unsigned wm = warp / Tile::WARPS_N * Tile::WM, wn = warp % Tile::WARPS_N * Tile::WN;
    unsigned row, column;
    gemm_block(blockIdx.x, rows, columns, &row, &column);
    const unsigned m0 = row * Tile::BM, n0 = column * Tile::BN;

    /* copying: thread t has unit t % 8 of rows t / 8, t / 8 + PASS, ... */
    const unsigned copy_row = threadIdx.x / 8, unit = threadIdx.x % 8;
    const unsigned copy_to = copy_row * (BK * 2) + ((unit ^ (copy_row % 8)) * 16);
    const T *x_from = x + static_cast<size_t>(m0 + copy_row) * k + unit * 8;
    const T *w_from = w + static_cast<size_t>(n0 + copy_row) * k + unit * 8;
    const size_t pass_step = static_cast<size_t>(PASS) * k;
    const uint32_t ring_base = shared_address(ring);
    const unsigned pieces = (k + BK - 1) / BK;
    const auto copy_piece = [&](unsigned piece, uint32_t to) {
        const bool k_inside = piece * BK + unit * 8 < k;
        const T *from = x_from + piece * BK;
#pragma unroll
        for (int i = 0; i < Tile::BM / PASS; i++)
            cp_async_16(to + copy_to + i * PASS * BK * 2, from + i * pass_step,
                        k_inside && m0 + copy_row + i * PASS < m);
        from = w_from + piece * BK;
#pragma unroll
        for (int i = 0; i < Tile::BN / PASS; i++)
            cp_async_16(to + Tile::BM * BK * 2 + copy_to + i * PASS * BK * 2, from + i * pass_step,
                        k_inside && n0 + copy_row + i * PASS < n);
    };

    /* reading: of x, lanes 0-15 have rows 0-15 and the lower 8 columns, lanes 16-31 the same rows and the upper 8; of
     * w, lanes 0-7 rows 0-7 lower, 8-15 rows 0-7 upper, 16-23 rows 8-15 lower, 24-31 rows 8-15 upper. */
    const uint32_t x_row = (wm + lane % 16) * (BK * 2), x_unit = ((lane / 16) ^ (lane % 8)) * 16;
    const uint32_t w_row = Tile::BM * BK * 2 + (wn + lane % 8 + lane / 16 * 8) * (BK * 2);
    const uint32_t w_unit = ((lane / 8 % 2) ^ (lane % 8)) * 16;
    uint4 a[2][MI], b[2][NI / 2];
    const auto load_step = [&](int step, uint32_t piece, uint4(&to_a)[MI], uint4(&to_b)[NI / 2]) {
#pragma unroll
        for (int j = 0; j < NI / 2; j++)
            to_b[j] = ldmatrix_x4(piece + w_row + j * (16 * BK * 2) + (w_unit ^ (step * 32)));
#pragma unroll
        for (int i = 0; i < MI; i++) to_a[i] = ldmatrix_x4(piece + x_row + i * (16 * BK * 2) + (x_unit ^ (step * 32)));
    };

    float sum[MI][NI][4] = {};
#pragma unroll
    for (int s = 0; s < STAGES - 1; s++) {
        if (s < static_cast<int>(pieces)) copy_piece(s, ring_base + s * Tile::STAGE_BYTES);
        cp_async_commit();
    }
    unsigned reading = 0, writing = STAGES - 1; /* places of the ring */
    cp_async_wait<STAGES - 2>();
    __syncthreads();
    load_step(0, ring_base, a[0], b[0]);
    for (unsigned piece = 0; piece < pieces; piece++) {
        const uint32_t place = ring_base + reading * Tile::STAGE_BYTES;
        reading = reading + 1 == STAGES ? 0 : reading + 1;
#pragma unroll
        for (int step = 0; step < STEPS; step++) {
            if (step == 0) { /* everyone is past the piece whose place is written now: see the barrier below */
                if (piece + STAGES - 1 < pieces)
                    copy_piece(piece + STAGES - 1, ring_base + writing * Tile::STAGE_BYTES);
                cp_async_commit();
                writing = writing + 1 == STAGES ? 0 : writing + 1;
            }
            if (step + 1 < STEPS) {
                load_step(step + 1, place, a[(step + 1) % 2], b[(step + 1) % 2]);
            } else {
                cp_async_wait<STAGES - 2>();
                __syncthreads();
                load_step(0, ring_base + reading * Tile::STAGE_BYTES, a[0], b[0]);
            }
#pragma unroll
            for (int i = 0; i < MI; i++)
#pragma unroll
                for (int j = 0; j < NI; j++) {
                    const uint4 &pair = b[step % 2][j / 2];
                    mma_16816<T>(sum[i][j], a[step % 2][i],
                                 j % 2 ? make_uint2(pair.z, pair.w) : make_uint2(pair.x, pair.y));
                }
        }
    }
    cp_async_wait<0>();

    /* Fragments hold two neighbours of a row. Lanes 2i and 2i + 1 swap halves of two 8-column tiles, so that each
     * stores four neighbours, and a quad whole sectors of 32 bytes. */
    const unsigned t = lane % 4, odd = lane % 2, row0 = m0 + wm + lane / 4, column0 = n0 + wn;
    const bool is_wide = n % 4 == 0 && reinterpret_cast<uintptr_t>(out) % 8 == 0;
#pragma unroll
    for (int j = 0; j < NI; j += 2) {
        float shift[2][2] = {};
#pragma unroll
        for (int c = 0; c < 4; c++) {
            const unsigned at = column0 + (j + c / 2) * 8 + 2 * t + c % 2;
            if (bias && at < n) shift[c / 2][c % 2] = as_float(bias[at]);
        }
#pragma unroll
        for (int i = 0; i < MI; i++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                uint32_t low = round_pair<T>(sum[i][j][2 * half] + shift[0][0], sum[i][j][2 * half + 1] + shift[0][1]);
                uint32_t high =
                    round_pair<T>(sum[i][j + 1][2 * half] + shift[1][0], sum[i][j + 1][2 * half + 1] + shift[1][1]);
                const unsigned to_row = row0 + i * 16 + half * 8;
                T *to = out + static_cast<size_t>(to_row) * n;
                if (is_wide) {
                    const uint32_t other = __shfl_xor_sync(0xffffffffu, odd ? low : high, 1);
                    const unsigned at = column0 + (j + odd) * 8 + 2 * (t - odd);
                    if (to_row < m && at < n)
                        *reinterpret_cast<uint2 *>(to + at) = odd ? make_uint2(other, high) : make_uint2(low, other);
                } else if (to_row < m) {
#pragma unroll
                    for (int c = 0; c < 4; c++) {
                        const unsigned at = column0 + (j + c / 2) * 8 + 2 * t + c % 2;
                        const uint32_t pair = c / 2 ? high : low;
                        if (at < n) reinterpret_cast<uint16_t *>(to)[at] = static_cast<uint16_t>(pair >> c % 2 * 16);
                    }
                }
            }
    }
}

template <class T, class Tile>
static lla_status launch_gemm_tiles(const lla_gemm_args *args, lla_gemm_choice choice, cudaStream_t stream) {
    LLA_TRY(allow_smem(gemm_tiles<T, Tile>, Tile::SMEM, "linear: shared memory"));
    gemm_tiles<T, Tile><<<choice.rows * choice.columns, Tile::THREADS, Tile::SMEM, stream>>>(
        static_cast<unsigned>(args->m), static_cast<unsigned>(args->n), static_cast<unsigned>(args->k),
        static_cast<const T *>(args->x), static_cast<const T *>(args->w), static_cast<const T *>(args->bias),
        static_cast<T *>(args->out), choice.rows, choice.columns);
    LLA_CUDA_LAUNCHED("linear: tiles");
    return LLA_OK;
}

template <class T>
static lla_status run_gemm_tiles(const lla_gemm_args *args, lla_gemm_choice choice, cudaStream_t stream) {
    switch (choice.tile) {
#define X(name, ...)                                                                                                   \
    case LLA_GEMM_##name:                                                                                              \
        return launch_gemm_tiles<T, GemmTile<__VA_ARGS__>>(args, choice, stream);
        LLA_GEMM_TILES_TABLE(X)
#undef X
    default:
        return lla_fail(LLA_EINVAL, "linear: unknown tile %d", static_cast<int>(choice.tile));
    }
}

#endif
