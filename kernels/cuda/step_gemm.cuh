/* step_gemm.cuh: what the products for many rows share: tiles, the ring that feeds them, and what follows the sums.
 *
 * A block computes tiles of BM weight rows (the operand that is 16 or 64 rows wide) by BN rows of the step. The ring in
 * shared memory holds pieces of KT 16-column tiles of the block's weights and rows, STAGES - 1 of them under way.
 * Packed weights lie as the tensor core wants them: a lane's operand of a tile is 16 bytes, and 512 bytes in a row are
 * a tile. Rows of x are swizzled: see `place_of`. Blocks stay for several tiles; the ring runs on across them, so that
 * the next tile's first pieces arrive while this one's results are written. */
#ifndef LLA_STEP_GEMM_CUH
#define LLA_STEP_GEMM_CUH

#include "step_math.cuh"

namespace {

enum Epilogue { QKV, ADD, SWIGLU, STORE };

struct Product {
    const lla_step_header *header;
    unsigned max_rows; /* of the bucket */
    bool by_logit;     /* rows are the step's logit rows */
    const void *x;     /* [rows, k]: normed, or as it is */
    const void *w;     /* packed [n, k] */
    void *out;         /* ADD: [rows, n], added to; STORE: [rows, n]; SWIGLU: [rows, half] */
    float *squares;    /* ADD: lla_io.squares of out */
    unsigned n, k, half;
    /* QKV */
    const void *bias, *rope;
    const int32_t *positions, *row_seq, *table;
    void *q, *k_cache, *v_cache;
    unsigned nhead, nkvhead, head_dim, kv_block, max_blocks;
    lla_block_times *trace;
};

__device__ __forceinline__ unsigned rows_of(const Product &a) {
    return (unsigned)(a.by_logit ? a.header->nlogit : a.header->nrow);
}

/* Sizes of a tile: warps WARPS_M x WARPS_N, each with MI x 16 weight rows by NI x 8 rows of the step. */
template <int MI_, int NI_, int WARPS_M_, int WARPS_N_, int KT_, int STAGES_, int RESIDENT_> struct Tile {
    static constexpr int MI = MI_, NI = NI_, WARPS_M = WARPS_M_, WARPS_N = WARPS_N_, KT = KT_, STAGES = STAGES_;
    static constexpr int RESIDENT = RESIDENT_; /* blocks on an SM */
    static constexpr int BM = 16 * MI * WARPS_M, BN = 8 * NI * WARPS_N, THREADS_ = 32 * WARPS_M * WARPS_N;
    static constexpr int UNITS = 2 * KT, ROW_BYTES = 16 * UNITS; /* of a row of x in a piece */
    static constexpr int W_BYTES = BM / 16 * KT * 512, STAGE_BYTES = W_BYTES + BN * ROW_BYTES;
    static constexpr int SMEM = STAGES * STAGE_BYTES + 1024; /* the ring starts at a multiple of 1024 */
    static constexpr int W_PASS = THREADS_ / (KT * 32), X_PASS = THREADS_ / UNITS; /* copied by all threads at once */
    static_assert(KT == 2 || KT == 4, "a row of a piece is 64 or 128 bytes, which the swizzle spreads over the banks");
    static_assert(NI % 2 == 0, "ldmatrix.x4 loads 16 rows of x");
    static_assert(THREADS_ % (KT * 32) == 0 && BM / 16 % W_PASS == 0, "all threads copy as many units of weights");
    static_assert((MI == 1 && WARPS_N == 1) /* wgmma's, with copies of its own */ ||
                      (X_PASS % 8 == 0 && BN % X_PASS == 0),
                  "and of x, all in the same place of their rows");
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

/* The ring: places that are read and written in turn. */
template <class S> struct Ring {
    uint32_t base, end, reading, writing;
    unsigned rows, columns, tiles; /* of the step; tiles of BN rows; tiles in all, numbered along the rows first */
    Feed<S> feed;

    /* Asks for the first STAGES - 1 pieces: weights, then what the kernel before wrote. */
    __device__ __forceinline__ void begin(const Product &a, char *smem) {
        base = (shared_address(smem) + 1023) / 1024 * 1024;
        end = base + S::STAGES * S::STAGE_BYTES;
        rows = rows_of(a); /* a step input: it was there before the step's first kernel */
        columns = (rows + S::BN - 1) / S::BN;
        tiles = ((a.n + 15) / 16 + S::BM / 16 - 1) / (S::BM / 16) * columns;
        feed.tile = blockIdx.x;
        feed.seek(a, rows, columns, tiles);
        Feed<S> ahead = feed;
        for (int s = 0; s < S::STAGES - 1; s++) {
            ahead.copy_w(a, base + s * S::STAGE_BYTES);
            ahead.advance(a, rows, columns, tiles);
        }
        pdl_wait();
        reading = writing = base;
        for (int s = 0; s < S::STAGES - 1; s++) {
            feed.copy_x(a, writing);
            cp_async_commit();
            feed.advance(a, rows, columns, tiles);
            writing = after(writing);
        }
    }
    __device__ __forceinline__ uint32_t after(uint32_t place) const {
        return place + S::STAGE_BYTES == end ? base : place + S::STAGE_BYTES;
    }
    /* Asks for one more piece, in the place that was read longest ago. */
    __device__ __forceinline__ void refill(const Product &a) {
        feed.copy_w(a, writing);
        feed.copy_x(a, writing);
        cp_async_commit();
        feed.advance(a, rows, columns, tiles);
        writing = after(writing);
    }
};

/* The parts of K, one after the other; see nodes.h. */
struct Parts {
    unsigned ktiles, next = 0, end = 0; /* end: first k-tile behind the part */
    __device__ __forceinline__ explicit Parts(unsigned k) : ktiles((k + 15) / 16) { advance(); }
    __device__ __forceinline__ void advance() { /* over empty parts */
        for (const unsigned from = end; end == from && next < PARTS;) end = ktiles * ++next / PARTS;
    }
};

/* ---- what follows a product ---- */

/* Where keys and values of a row go: element offset of the position in the cache, KV head 0. */
__device__ __forceinline__ size_t slot_of(const Product &a, unsigned row) {
    const unsigned position = (unsigned)a.positions[row];
    const size_t block = (size_t)a.table[(size_t)a.row_seq[row] * a.max_blocks + position / a.kv_block];
    return (block * a.nkvhead * a.kv_block + position % a.kv_block) * a.head_dim;
}

/* Asks for what finish<T, QKV>() will need beside the sums of a row tile and COUNT rows, in the first-level cache:
 * bias, angles, places in the cache. All of it is there before the step's first kernel. */
template <class T, int COUNT>
__device__ __forceinline__ void prefetch_operands(const Product &a, unsigned tile, unsigned row0, unsigned rows,
                                                  unsigned lane) {
    const unsigned head = tile * 8 / a.half, at = tile * 8 % a.half;
    if (head >= a.nhead + 2 * a.nkvhead) return;
    prefetch_l1((const T *)a.bias + head * a.head_dim + at + lane % 2 * a.half);
#pragma unroll 1
    for (unsigned row = row0 + lane; row < row0 + COUNT && row < rows; row += 32) {
        const unsigned position = (unsigned)a.positions[row];
        const T *rope = (const T *)a.rope + (size_t)position * a.head_dim + at;
        prefetch_l1(rope);
        prefetch_l1(rope + a.half);
        prefetch_l1(a.table + (size_t)a.row_seq[row] * a.max_blocks + position / a.kv_block);
    }
}

/* Writes a warp's sums: tiles of 16 weight rows from `tile0`, rows of the step from `row0`. Rounded sums of eight rows
 * are transposed in registers: a lane then holds neighbours 2 t, 2 t + 1 of one row, and of the paired 16-row halves.
 * What a batch of rows needs from memory is asked for together. */
template <class T, Epilogue E, class S>
__device__ __forceinline__ void finish(const Product &a, const float (&sum)[S::MI][S::NI][4], unsigned tile0,
                                       unsigned row0, unsigned rows, unsigned lane) {
    constexpr int BATCH = S::NI % 4 ? S::NI : 4;
    const unsigned t2 = lane % 4 * 2, ntiles = (a.n + 15) / 16;
#pragma unroll
    for (int j0 = 0; j0 < S::NI; j0 += BATCH) {
        unsigned row[BATCH], angle[BATCH]; /* of the step; offset of its line in the table of angles */
        size_t slot[BATCH];
#pragma unroll
        for (int j = 0; j < BATCH; j++) {
            row[j] = row0 + 8 * (j0 + j) + lane / 4;
            if (E != QKV) continue;
            const unsigned known = row[j] < rows ? row[j] : rows - 1;
            angle[j] = (unsigned)a.positions[known] * a.head_dim;
            slot[j] = slot_of(a, known);
        }
#pragma unroll
        for (int i = 0; i < S::MI; i++) {
            const unsigned tile = tile0 + i;
            if (tile >= ntiles) break;
            if (E == SWIGLU) {
#pragma unroll
                for (int j = 0; j < BATCH; j++) {
                    const float (&c)[4] = sum[i][j0 + j];
                    const T y[2] = {swiglu<T>(c[0], c[2]), swiglu<T>(c[1], c[3])};
                    uint32_t pair;
                    memcpy(&pair, y, sizeof pair);
                    pair = transpose_8x8(pair);
                    if (row[j] < rows) *(uint32_t *)((T *)a.out + (size_t)row[j] * a.half + tile * 8 + t2) = pair;
                }
            } else if (E == STORE) {
                const bool is_whole = tile * 16 + 8 < a.n; /* the last tile may have eight rows */
#pragma unroll
                for (int j = 0; j < BATCH; j++) {
                    const float (&c)[4] = sum[i][j0 + j];
                    const uint32_t low = transpose_8x8(pack_pair<T>(c[0], c[1])),
                                   high = transpose_8x8(pack_pair<T>(c[2], c[3]));
                    if (row[j] >= rows) continue;
                    uint32_t *out = (uint32_t *)((T *)a.out + (size_t)row[j] * a.n + tile * 16 + t2);
                    out[0] = low;
                    if (is_whole) out[4] = high;
                }
            } else if (E == ADD) {
                const bool is_whole = tile * 16 + 8 < a.n; /* the last tile may have eight rows */
                uint32_t *out = (uint32_t *)((T *)a.out + tile * 16 + t2), old[BATCH][2] = {};
#pragma unroll
                for (int j = 0; j < BATCH; j++) {
                    if (row[j] >= rows) continue;
                    old[j][0] = out[(size_t)row[j] * (a.n / 2)];
                    if (is_whole) old[j][1] = out[(size_t)row[j] * (a.n / 2) + 4];
                }
#pragma unroll
                for (int j = 0; j < BATCH; j++) {
                    const float (&c)[4] = sum[i][j0 + j];
                    const float2 low = unpack_pair<T>(transpose_8x8(pack_pair<T>(c[0], c[1]))),
                                 high = unpack_pair<T>(transpose_8x8(pack_pair<T>(c[2], c[3])));
                    const float2 x = unpack_pair<T>(old[j][0]), y = unpack_pair<T>(old[j][1]);
                    const uint32_t new_x = pack_pair<T>(x.x + low.x, x.y + low.y),
                                   new_y = is_whole ? pack_pair<T>(y.x + high.x, y.y + high.y) : 0;
                    const float2 v = unpack_pair<T>(new_x), u = unpack_pair<T>(new_y);
                    const float of_squares = sum_of_four(__fadd_rn(squares(v.x, u.x), squares(v.y, u.y)));
                    if (row[j] >= rows) continue;
                    out[(size_t)row[j] * (a.n / 2)] = new_x;
                    if (is_whole) out[(size_t)row[j] * (a.n / 2) + 4] = new_y;
                    if (lane % 4 == 0) a.squares[(size_t)row[j] * lla_square_columns(a.n) + tile] = of_squares;
                }
            } else {
                const unsigned head = tile * 8 / a.half, at = tile * 8 % a.half; /* of the tile's eight pairs */
                const bool is_q = head < a.nhead, is_v = head >= a.nhead + a.nkvhead;
                const T *bias = (const T *)a.bias + head * a.head_dim + at + lane / 4;
                const float b0 = to_float<T>(bias[0]), b1 = to_float<T>(bias[a.half]);
                T *cache = (T *)(is_v ? a.v_cache : a.k_cache) +
                           (size_t)((head - a.nhead) % a.nkvhead) * a.kv_block * a.head_dim;
                uint32_t cosine[BATCH], sine[BATCH];
#pragma unroll
                for (int j = 0; j < BATCH; j++) {
                    const T *rope = (const T *)a.rope + angle[j] + at + t2;
                    cosine[j] = *(const uint32_t *)rope;
                    sine[j] = *(const uint32_t *)(rope + a.half);
                }
#pragma unroll
                for (int j = 0; j < BATCH; j++) {
                    const float (&c)[4] = sum[i][j0 + j];
                    float2 low = unpack_pair<T>(transpose_8x8(pack_pair<T>(c[0] + b0, c[1] + b0))),
                           high = unpack_pair<T>(transpose_8x8(pack_pair<T>(c[2] + b1, c[3] + b1)));
                    if (row[j] >= rows) continue;
                    if (!is_v) {
                        const float2 co = unpack_pair<T>(cosine[j]), si = unpack_pair<T>(sine[j]);
                        rotate<T>(low.x, high.x, co.x, si.x);
                        rotate<T>(low.y, high.y, co.y, si.y);
                    }
                    T *to = is_q ? (T *)a.q + ((size_t)row[j] * a.nhead + head) * a.head_dim : cache + slot[j];
                    *(uint32_t *)(to + at + t2) = pack_pair<T>(low.x, low.y);
                    *(uint32_t *)(to + at + t2 + a.half) = pack_pair<T>(high.x, high.y);
                }
            }
        }
    }
}

} // namespace

#endif
