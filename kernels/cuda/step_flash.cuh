/* step_flash.cuh: what the two attention kernels for many rows share: which rows a block has, and the arithmetic of a
 * split; step_flash.cu says in which order. */
#ifndef LLA_STEP_FLASH_CUH
#define LLA_STEP_FLASH_CUH

#include "step_attention_rows.cuh"

namespace {

enum { TILE_ROWS = 128 /* of a block's matrix */ };

struct Flash {
    const lla_step_header *header;
    const int32_t *positions, *row_seq, *table;
    const void *q, *k_cache, *v_cache;
    void *out;
    unsigned nhead, nkvhead, group, block_bits, max_blocks; /* 2^block_bits tokens a KV block */
    float scale;                                            /* log2(e) / sqrt(head_dim) */
};

/* ---- which rows ---- */

/* Rows [first, first + count) of the step, of one sequence, at positions from `position` on; count 0: none. */
struct Rows {
    unsigned first, count, position;
};

/* What the blocks need to know of the step's rows, in shared memory: a bit for each row that a tile begins at, and for
 * each that is alone of its sequence (attend_rows() takes those). Tiles begin where a sequence does, and at positions
 * that are multiples of `most`. */
struct Survey {
    unsigned splits[8], longest[8]; /* of each warp's lonely rows: splits, also of the longest */
    unsigned tiles[8];              /* of the others */
    uint32_t words[1];              /* [2, words]: ends of tiles; of these the beginnings of tiles, too */
};

/* Bytes of a survey. */
inline size_t survey_bytes(size_t rows) {
    return sizeof(Survey) + (rows + 31) / 32 * 2 * sizeof(uint32_t);
}

/* All threads of the block call it. */
__device__ __forceinline__ void survey_rows(const Flash &a, unsigned most, Survey &s) {
    const unsigned rows = (unsigned)a.header->nrow, lane = threadIdx.x % 32, nword = (rows + 31) / 32;
    unsigned splits = 0, longest = 0, tiles = 0;
#pragma unroll 4
    for (unsigned w = threadIdx.x / 32; w < nword; w += blockDim.x / 32) {
        const unsigned r = w * 32 + lane;
        bool starts = false, alone = false;
        if (r < rows) {
            const int seq = a.row_seq[r];
            const unsigned position = (unsigned)a.positions[r];
            const bool is_first = r == 0 || seq != a.row_seq[r - 1];
            starts = is_first || position % most == 0;
            alone = is_first && (r + 1 == rows || seq != a.row_seq[r + 1]);
            if (alone) {
                splits += position / SPLIT + 1;
                longest = max(longest, position / SPLIT + 1);
            }
        }
        const uint32_t all = __ballot_sync(~0u, starts), shared = __ballot_sync(~0u, starts && !alone);
        tiles += __popc(shared);
        if (lane == 0) {
            s.words[w] = all;
            s.words[nword + w] = shared;
        }
    }
    splits = __reduce_add_sync(~0u, splits);
    longest = __reduce_max_sync(~0u, longest);
    if (lane == 0) {
        s.splits[threadIdx.x / 32] = splits;
        s.longest[threadIdx.x / 32] = longest;
        s.tiles[threadIdx.x / 32] = tiles;
    }
    __syncthreads();
}

/* The order-th tile of the step, from the last, of those that there are. */
__device__ __forceinline__ Rows find_rows(const Flash &a, unsigned order, unsigned most, const Survey &s) {
    const unsigned rows = (unsigned)a.header->nrow, lane = threadIdx.x % 32, nword = (rows + 31) / 32;
    /* every warp: from the last words to the first, 32 at a time; `before`: starts in the words of lower lanes */
    Rows found = {0, 0, 0};
    for (unsigned seen = 0, from = 0; from < nword && !found.count; from += 32) {
        const uint32_t bits = from + lane < nword ? s.words[2 * nword - 1 - from - lane] : 0;
        unsigned upto = __popc(bits);
        for (int o = 1; o < 32; o *= 2) {
            const unsigned other = __shfl_up_sync(~0u, upto, o);
            if (lane >= (unsigned)o) upto += other;
        }
        const unsigned before = seen + upto - __popc(bits);
        const bool mine = order >= before && order < seen + upto;
        const uint32_t who = __ballot_sync(~0u, mine);
        if (who) {
            unsigned first = 0;
            if (mine) { /* the (order - before)-th set bit from the top */
                uint32_t rest = bits;
                for (unsigned i = before; i < order; i++) rest &= ~(0x80000000u >> __clz(rest));
                first = (nword - 1 - from - lane) * 32 + 31 - __clz(rest);
            }
            found.first = __shfl_sync(~0u, first, __ffs(who) - 1);
            found.count = 1;
        }
        seen += __shfl_sync(~0u, upto, 31);
    }
    while (found.first + found.count < rows && found.count < most &&
           !(s.words[(found.first + found.count) / 32] >> (found.first + found.count) % 32 & 1))
        found.count++;
    found.position = (unsigned)a.positions[found.first];
    return found;
}

/* The block's turn-th tile and KV head, of those numbered from the last tile on: the longest first, and to and fro, so
 * that blocks get about the same. */
__device__ __forceinline__ unsigned order_of(unsigned turn) {
    return turn * gridDim.x + (turn % 2 ? blockIdx.x : gridDim.x - 1 - blockIdx.x);
}

/* The step's rows that are alone of their sequence, by the block's first W warps; the number of its tiles times KV
 * heads. All threads call it. */
template <class T, int DIM, int W>
__device__ __forceinline__ unsigned survey_and_attend_rows(const Attention &by_row, const Flash &a, unsigned most,
                                                           char *smem, Survey &s) {
    Jobs jobs(by_row);
    unsigned tiles = 0;
    if (!jobs.are_alone) {
        survey_rows(a, most, s);
        jobs.words = s.words;
        for (unsigned w = 0; w < blockDim.x / 32; w++) {
            jobs.total += s.splits[w];
            jobs.longest = max(jobs.longest, s.longest[w]);
            tiles += s.tiles[w];
        }
        jobs.has_all = !tiles;
    }
    if (jobs.total && threadIdx.x < 32 * W) attend_rows<T, DIM, W>(by_row, smem, jobs, a.scale);
    return tiles * a.nkvhead;
}

/* ---- a split's weights ---- */

template <class T> constexpr uint32_t ONES = 0x3f803f80; /* two ones */
template <> constexpr uint32_t ONES<__half> = 0x3c003c00;

/* Sixteen rows of a warp: rows lane / 4 and lane / 4 + 8 of a fragment are this thread's. */
struct RowSums {
    float max[2], sum[2];   /* M and L: over the splits so far */
    float keep[2], take[2]; /* a and b: factors of the output so far and of the split's */
};

/* Scores s of a split from token `first` on become weights p, as the first operand of p v for 16 tokens at a time;
 * `last`: the last positions that the two rows see, looked at where is_edge. */
template <class T>
__device__ __forceinline__ void weigh(float (&s)[SPLIT / 8][4], float scale, bool is_edge, unsigned first,
                                      const unsigned (&last)[2], RowSums &rows, uint4 (&p)[SPLIT / 16]) {
    float top[2] = {-INFINITY, -INFINITY}, base[2];
#pragma unroll
    for (int j = 0; j < SPLIT / 8; j++)
#pragma unroll
        for (int c = 0; c < 4; c++) {
            s[j][c] = __fmul_rn(s[j][c], scale);
            if (is_edge && first + j * 8 + threadIdx.x % 4 * 2 + c % 2 > last[c / 2]) s[j][c] = -INFINITY;
            top[c / 2] = fmaxf(top[c / 2], s[j][c]);
        }
#pragma unroll
    for (int h = 0; h < 2; h++) {
        top[h] = fmaxf(top[h], __shfl_xor_sync(~0u, top[h], 1));
        top[h] = fmaxf(top[h], __shfl_xor_sync(~0u, top[h], 2));
        const float merged = fmaxf(rows.max[h], top[h]);
        rows.keep[h] = exp2_fast(rows.max[h] - merged);
        rows.take[h] = exp2_fast(top[h] - merged);
        rows.max[h] = merged;
        base[h] = top[h] == -INFINITY ? 0.0f : top[h]; /* a row that sees nothing here: all weights 0 */
    }
#pragma unroll
    for (int j = 0; j < SPLIT / 16; j++) {
        const auto pair = [&](const float (&x)[4], int h) {
            return pack_pair<T>(exp2_fast(__fsub_rn(x[2 * h], base[h])), exp2_fast(__fsub_rn(x[2 * h + 1], base[h])));
        };
        p[j] = make_uint4(pair(s[2 * j], 0), pair(s[2 * j], 1), pair(s[2 * j + 1], 0), pair(s[2 * j + 1], 1));
    }
    float l[4] = {};
#pragma unroll
    for (int j = 0; j < SPLIT / 16; j++) mma_16816<T>(l, p[j], make_uint2(ONES<T>, ONES<T>));
#pragma unroll
    for (int h = 0; h < 2; h++) rows.sum[h] = __fmaf_rn(rows.sum[h], rows.keep[h], __fmul_rn(l[2 * h], rows.take[h]));
}

/* Output so far takes in a split's, for N columns of eight. */
template <int N> __device__ __forceinline__ void merge(float (*o)[4], const float (&po)[N][4], const RowSums &rows) {
#pragma unroll
    for (int n = 0; n < N; n++)
#pragma unroll
        for (int c = 0; c < 4; c++)
            o[n][c] = __fmaf_rn(o[n][c], rows.keep[c / 2], __fmul_rn(po[n][c], rows.take[c / 2]));
}

/* Writes the two rows m, m + 8 of the block's matrix. */
template <class T, int DIM>
__device__ __forceinline__ void write_rows(const Flash &a, const Rows &rows, unsigned kvhead, unsigned m0,
                                           const float (&o)[DIM / 8][4], const RowSums &sums) {
#pragma unroll
    for (int h = 0; h < 2; h++) {
        const unsigned m = m0 + 8 * h, row = m / a.group;
        if (row >= rows.count) continue;
        T *out = (T *)a.out + ((size_t)(rows.first + row) * a.nhead + kvhead * a.group + m % a.group) * DIM;
        const float sum = sums.sum[h], inverse = inverse_of(sum);
#pragma unroll
        for (unsigned n = 0; n < DIM / 8; n++)
            *(uint32_t *)(out + n * 8 + threadIdx.x % 4 * 2) =
                pack_pair<T>(quotient(o[n][2 * h], sum, inverse), quotient(o[n][2 * h + 1], sum, inverse));
    }
}

/* ---- keys and values on their way ---- */

/* Row number in the cache of a position of one KV head. */
__device__ __forceinline__ uint32_t cache_row(const Flash &a, const int32_t *table, unsigned kvhead,
                                              unsigned position) {
    return (((unsigned)table[position >> a.block_bits] * a.nkvhead + kvhead) << a.block_bits) +
           (position & ((1u << a.block_bits) - 1));
}

} // namespace

#endif
