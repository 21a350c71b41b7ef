/* step_flash_sm90.cuh: attention for many rows by wgmma, for sm_90a; the bits are step_flash.cu's.
 *
 * A group of four warps has 64 rows of the block's matrix. The tensor core reads q, keys and values from shared memory
 * itself, so matrices lie there in panels of 64 columns, 128 bytes a row, swizzled. While a split's output is computed
 * and merged, the next split's scores are on their way. */
#ifndef LLA_STEP_FLASH_SM90_CUH
#define LLA_STEP_FLASH_SM90_CUH

#include "sm90.cuh"
#include "step_flash.cuh"

namespace {

enum { FLASH_SM90_THREADS = 2 * TILE_ROWS, FLASH_SM90_ROW_WARPS = 6 /* that take single rows */ };

/* q, three splits of keys and values, where four splits lie, and room to begin at a multiple of 1024; behind what it or
 * single rows need is a survey. */
template <int DIM>
constexpr size_t FLASH_SM90_TILE_SMEM = (TILE_ROWS + 3 * 2 * SPLIT) * DIM * 2 + 4 * SPLIT * sizeof(uint32_t) + 1024;
template <class T, int DIM>
constexpr size_t FLASH_SM90_SMEM = sizeof(RowsMemory<T, DIM, FLASH_SM90_ROW_WARPS>) > FLASH_SM90_TILE_SMEM<DIM>
                                       ? sizeof(RowsMemory<T, DIM, FLASH_SM90_ROW_WARPS>)
                                       : FLASH_SM90_TILE_SMEM<DIM>;
static_assert(sizeof(RowsMemory<uint16_t, 128, FLASH_SM90_ROW_WARPS>) % 4 == 0, "a survey follows");

template <class T, int DIM>
__global__ void __launch_bounds__(FLASH_SM90_THREADS, 1) flash_sm90_kernel(const Attention by_row, const Flash a) {
#ifdef LLA_SM90A_CODE
    LLA_DYNAMIC_SHARED(memory, 16);
    constexpr unsigned UNITS = DIM / 8, PASS = FLASH_SM90_THREADS / UNITS; /* rows that all threads copy at once */
    constexpr unsigned Q_BYTES = TILE_ROWS * DIM * 2, KV_BYTES = SPLIT * DIM * 2, PANELS = DIM / 64;
    constexpr unsigned Q_PANEL = TILE_ROWS * 128, KV_PANEL = SPLIT * 128;
    static_assert(SPLIT == 64 && PASS % 8 == 0 && SPLIT % PASS == 0, "panels of 64 x 64; all copies alike");
    char *const smem = memory + (1024 - shared_address(memory) % 1024) % 1024;
    const unsigned warp = threadIdx.x / 32, lane = threadIdx.x % 32, group = warp / 4;
    const unsigned most = TILE_ROWS / a.group;
    note(by_row.trace, LLA_BLOCK_BEGAN);
    pdl_launch_next();
    Survey &survey = *reinterpret_cast<Survey *>(memory + FLASH_SM90_SMEM<T, DIM>);
    /* Step inputs were there before the step's first kernel began. */
    const unsigned tiles = survey_and_attend_rows<T, DIM, FLASH_SM90_ROW_WARPS>(by_row, a, most, memory, survey);
    /* A kernel ends only after those before it, so that a wait for it is a wait for all. */
    if (blockIdx.x == 0) pdl_wait();
    for (unsigned turn = 0; order_of(turn) < tiles; turn++) {
        const unsigned order = order_of(turn), kvhead = order % a.nkvhead;
        const Rows rows = find_rows(a, order / a.nkvhead, most, survey);
        __syncthreads(); /* nobody reads the memory any more */
        pdl_wait();
        const unsigned length = rows.position + rows.count, splits = (length + SPLIT - 1) / SPLIT;
        const int32_t *table = a.table + (size_t)a.row_seq[rows.first] * a.max_blocks;
        const uint32_t q_base = shared_address(smem), kv_base = q_base + Q_BYTES;
        auto *const places = reinterpret_cast<uint32_t (*)[SPLIT]>(smem + Q_BYTES + 6 * KV_BYTES); /* [4, SPLIT] */

        const unsigned copy_row = threadIdx.x / UNITS, copy_unit = threadIdx.x % UNITS;
        const unsigned copy_to = copy_row * 128 + ((copy_unit % 8) ^ (copy_row % 8)) * 16;
#pragma unroll
        for (unsigned i = 0; i < TILE_ROWS / PASS; i++) {
            const unsigned m = copy_row + i * PASS, row = m / a.group, head = kvhead * a.group + m % a.group;
            const T *from = (const T *)a.q + ((size_t)(rows.first + row) * a.nhead + head) * DIM + copy_unit * 8;
            cp_async_16(q_base + copy_unit / 8 * Q_PANEL + copy_to + i * PASS * 128, from, row < rows.count);
        }
        const auto find_places = [&](unsigned split) {
            const unsigned position = split * SPLIT + threadIdx.x;
            if (threadIdx.x < SPLIT && position < length)
                places[split % 4][threadIdx.x] = cache_row(a, table, kvhead, position);
        };
        const auto copy_split = [&](unsigned split) {
            const uint32_t to = kv_base + split % 3 * (2 * KV_BYTES) + copy_unit / 8 * KV_PANEL + copy_to;
#pragma unroll
            for (unsigned i = 0; i < SPLIT / PASS; i++) {
                const unsigned token = copy_row + i * PASS;
                const bool inside =
                    split * SPLIT + token < length; /* values behind the end must not be what was before */
                const size_t at = inside ? (size_t)places[split % 4][token] * DIM + copy_unit * 8 : 0;
                cp_async_16(to + i * PASS * 128, (const T *)a.k_cache + at, inside);
                cp_async_16(to + KV_BYTES + i * PASS * 128, (const T *)a.v_cache + at, inside);
            }
        };
        for (unsigned split = 0; split < 3; split++) find_places(split);
        __syncthreads();
        copy_split(0);
        cp_async_commit();
        copy_split(1);
        cp_async_commit();

        unsigned last[2]; /* the last positions that this thread's rows see */
        RowSums sums;
        float o[DIM / 8][4] = {}, s[SPLIT / 8][4], po[PANELS][8][4];
#pragma unroll
        for (int h = 0; h < 2; h++) {
            const unsigned row = (warp * 16 + h * 8 + lane / 4) / a.group;
            last[h] = rows.position + (row < rows.count ? row : rows.count - 1);
            sums.max[h] = -INFINITY;
            sums.sum[h] = 0;
        }
        const auto start_scores = [&](unsigned split) {
            const uint64_t q = wgmma_rows(q_base + group * (64 * 128));
            const uint64_t k = wgmma_rows(kv_base + split % 3 * (2 * KV_BYTES));
#pragma unroll
            for (unsigned d = 0; d < DIM / 16; d++)
                WgmmaShared<T>::run(s, q + d / 4 * (Q_PANEL / 16) + d % 4 * 2, k + d / 4 * (KV_PANEL / 16) + d % 4 * 2,
                                    d > 0);
            wgmma_commit();
        };

        cp_async_wait<1>();
        wgmma_publish();
        __syncthreads();
        wgmma_fence();
        start_scores(0);
        for (unsigned split = 0; split < splits; split++) {
            wgmma_wait<0>();
            wgmma_arrived(s);
            cp_async_wait<0>(); /* the next split */
            wgmma_publish();
            __syncthreads(); /* is there for all, and nobody reads the one before */
            copy_split(split + 2);
            cp_async_commit();
            find_places(split + 3);

            uint4 p[SPLIT / 16];
            weigh<T>(s, a.scale, (split + 1) * SPLIT > rows.position, split * SPLIT, last, sums, p);
            wgmma_fence();
            const uint64_t v = wgmma_rows(kv_base + split % 3 * (2 * KV_BYTES) + KV_BYTES);
#pragma unroll
            for (unsigned panel = 0; panel < PANELS; panel++) {
#pragma unroll
                for (int j = 0; j < SPLIT / 16; j++)
                    WgmmaColumns<T>::run(po[panel], p[j], v + panel * (KV_PANEL / 16) + j * (16 * 128 / 16), j > 0);
                wgmma_commit();
            }
            start_scores(split + 1); /* behind the last split: of whatever is there, for nobody */
#pragma unroll
            for (unsigned panel = 0; panel < PANELS; panel++) {
                if (panel + 1 < PANELS)
                    wgmma_wait<2>();
                else
                    wgmma_wait<1>();
                wgmma_arrived(po[panel]);
                merge(o + 8 * panel, po[panel], sums);
            }
        }
        wgmma_wait<0>();
        wgmma_arrived(s);
        cp_async_wait<0>();
        write_rows<T, DIM>(a, rows, kvhead, warp * 16 + lane / 4, o, sums);
    }
#endif
}

} // namespace

#endif
