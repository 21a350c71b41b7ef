/* step_whole.cu: the whole step of up to eight rows as one kernel, one block on every SM (see nodes.h).
 *
 * Few rows are bound by the stream of weights, and a step of separate kernels lets that stream stop at each of their
 * borders. Here producer warps stream the block's share of all weights through shared memory (ring.cuh) while the
 * consumer warps follow the activations from phase to phase:
 *
 *   collect x, norm -> qkv -> attention of one split -> merge of splits -> o + x -> norm -> gate, up -> down + x
 *
 * Blocks meet nowhere. A value that other blocks need goes out as a word of 64 bits that holds two elements (or one
 * f32) and a tag, the number of the layer since the engine started; who needs it reads until the tag is right: one trip
 * through the second-level cache instead of the three of a barrier and a load. A word is written once a layer, and
 * everything that writes it again depends, through the layer's own data, on all who read it; so one buffer a kind
 * suffices, and a block reads words only where it then contributes to what follows.
 *
 * Columns of the tensor cores' product are rows of the step. Sums have the order that nodes.h states. */
#include "ring.cuh"
#include "step_attention.cuh"
#include "step_epilogue.cuh"
#include <cstdlib>

namespace {

constexpr int ROWS = LLA_WHOLE_ROWS, GROUP = 256 /* threads of a group */, ALL = 32 * CONSUMERS,
              BLOCK = ALL + 32 * PRODUCERS;
static_assert(ROWS == 8, "rows of the step are the columns of an mma");

/* Barriers by number; 0 is the whole block's. */
enum { BAR_ALL = 1, BAR_GROUP = 2 /* and 3 */ };

/* Words of activations that a warp gathers at once: of the long product's part of K, for all rows. */
constexpr unsigned HAND = 512;

struct Words { /* exchanged words, see lla_mail */
    uint64_t *x_attn, *x_mlp, *qkv, *attn, *act, *partial, *best;
};

struct Whole {
    Weights weights;
    const lla_step_header *header;
    const int32_t *tokens, *positions, *row_seq, *table, *logit_rows;
    const char *embed, *attn_norm, *mlp_norm, *bias, *norm, *rope;
    char *k_cache, *v_cache, *logits;
    size_t kv_stride; /* bytes from one layer's cache to the next layer's */
    int32_t *next;
    uint32_t *epoch; /* steps since the engine started */
    Words words;
    unsigned hidden, nhead, nkvhead, ffn, vocab, kv_shift /* log2 of a KV block's tokens */, max_blocks;
    unsigned x_pitch, operand_pitch; /* words of a row in shared memory, see Memory */
    unsigned slots, window, ahead, pace;
    float eps, scale;
    uint64_t *trace; /* [events, 2, SMs] of nanoseconds, or NULL */
};

__device__ __forceinline__ uint64_t tagged(uint32_t value, uint32_t tag) {
    return (uint64_t)tag << 32 | value;
}

struct RowInfo {
    int position, first_new /* of its sequence in this step */, row0 /* which that is */, slot0, nsplit;
    const int32_t *table;
    unsigned cache; /* element offset of the row's keys of KV head 0 in a layer's cache */
};

/* Shared memory; behind it lie x [rows, x_pitch] and operand [rows, operand_pitch], then the rings' slots. */
template <class T, int DIM> struct Memory {
    Rings rings;
    union {
        SplitMemory<T, DIM> split;
        uint32_t hand[CONSUMERS][HAND + 8 * ROWS]; /* operands of the long product, by warp: [rows, tiles, 8 (+ 8)] */
    };
    float sums[2][CONSUMERS][128]; /* partial sums [16 rows of weights, 8 rows of the step] */
    RowInfo rows[ROWS];
    float scale[ROWS];
    int logit_rows[ROWS];
    lla_candidate best[CONSUMERS][ROWS];
    uint32_t zeros[8];
};

/* Operands lie in shared memory as mma wants them: word 8 i + 2 t + h of a row is half h of lane t's pair of tile i. */
__device__ __forceinline__ unsigned operand_place(unsigned word) {
    return (word & ~7u) + word % 4 * 2 + word % 8 / 4;
}

/* What a thread of the consumers knows. */
template <class T, int DIM> struct Consumer {
    const Whole &a;
    Memory<T, DIM> &s;
    uint32_t *x, *operand; /* shared memory: x of the phase, and what is multiplied: normed x, or attention's output */
    Slots slots;
    unsigned warp, lane, group, rows, nlogit, tag;
    RingPlace place;
    unsigned turn; /* row tiles that the group has summed: which buffer, which warp */

    __device__ __forceinline__ void group_barrier() const { named_barrier(BAR_GROUP + group, GROUP); }
    __device__ __forceinline__ void mark(unsigned event) const {
        if (a.trace && lane == 0 && warp % 8 == 0) {
            uint64_t t;
            asm volatile("mov.u64 %0, %globaltimer;" : "=l"(t));
            a.trace[(size_t)(event * 2 + group) * gridDim.x + blockIdx.x] = t;
        }
    }
};

/* Two words once both bear the tag. */
__device__ __forceinline__ uint2 await_pair(const uint64_t *from, ulonglong2 v, uint32_t tag) {
    Patience patience;
    while ((uint32_t)(v.x >> 32) != tag || (uint32_t)(v.y >> 32) != tag) {
        patience.spend();
        v = load_words(from);
    }
    return make_uint2((uint32_t)v.x, (uint32_t)v.y);
}

/* ---- what a phase starts from ---- */

/* x [rows, hidden] comes to shared memory, from the words of other blocks or, in the first layer, the embedding; all
 * consumers. */
template <class T, int DIM>
__device__ __forceinline__ void collect_x(const Consumer<T, DIM> &c, const uint64_t *words, uint32_t tag) {
    const unsigned pairs = c.a.hidden / 2;
    if (!words) {
        for (unsigned row = 0; row < c.rows; row++)
            for (unsigned i = threadIdx.x; i < pairs; i += ALL) {
                const unsigned r = (unsigned)c.a.tokens[row], tile = r / 16 * (c.a.hidden / 16) + i / 8;
                const unsigned lane = r % 8 * 4 + i % 4, in_lane = (i % 8 / 4) * 2 + r % 16 / 8;
                c.x[row * c.a.x_pitch + i] =
                    reinterpret_cast<const uint32_t *>(c.a.embed)[(size_t)tile * 128 + lane * 4 + in_lane];
            }
    } else {
        constexpr unsigned AT_ONCE = 4;
        const unsigned total = c.rows * (pairs / 2); /* pairs of words */
        for (unsigned i = threadIdx.x; i < total; i += AT_ONCE * ALL) {
            ulonglong2 v[AT_ONCE];
#pragma unroll
            for (unsigned j = 0; j < AT_ONCE; j++)
                if (i + j * ALL < total) v[j] = load_words(words + 2 * (size_t)(i + j * ALL));
#pragma unroll
            for (unsigned j = 0; j < AT_ONCE; j++) {
                const unsigned n = i + j * ALL;
                if (n >= total) break;
                unsigned row = 0, in_row = n;
                while (in_row >= pairs / 2) in_row -= pairs / 2, row++;
                *reinterpret_cast<uint2 *>(c.x + row * c.a.x_pitch + in_row * 2) =
                    await_pair(words + 2 * (size_t)n, v[j], tag);
            }
        }
    }
    named_barrier(BAR_ALL, ALL);
}

/* 1 / sqrt(mean(x^2) + eps) of a row of x: one warp, in the order of step_linear.cu's stage_norm. */
template <class T, int DIM> __device__ __forceinline__ float norm_scale(const Consumer<T, DIM> &c, unsigned row) {
    const uint4 *x = reinterpret_cast<const uint4 *>(c.x + row * c.a.x_pitch);
    float sum = 0;
#pragma unroll 2
    for (unsigned i = c.lane; i < c.a.hidden / 8; i += 32) {
        const uint4 v = x[i];
#pragma unroll
        for (int e = 0; e < 8; e++) {
            const float f = to_float<T>(reinterpret_cast<const T *>(&v)[e]);
            sum = fmaf(f, f, sum);
        }
    }
    for (int o = 16; o; o /= 2) sum += __shfl_xor_sync(~0u, sum, o);
    return 1.0f / sqrtf(sum / (float)c.a.hidden + c.a.eps);
}

/* operand [rows, hidden] = norm of x; all consumers. */
template <class T, int DIM>
__device__ __forceinline__ void collect_normed(const Consumer<T, DIM> &c, const uint64_t *words, uint32_t tag,
                                               const char *norm) {
    constexpr unsigned AHEAD = 2; /* norm weights that are asked for before x is there */
    const uint32_t *weights = reinterpret_cast<const uint32_t *>(norm);
    const unsigned pairs = c.a.hidden / 2;
    uint32_t w[AHEAD] = {};
#pragma unroll
    for (unsigned j = 0; j < AHEAD; j++)
        if (threadIdx.x + j * ALL < pairs) w[j] = __ldg(weights + threadIdx.x + j * ALL);
    collect_x(c, words, tag);
    if (c.warp < c.rows) {
        const float scale = norm_scale(c, c.warp);
        if (c.lane == 0) c.s.scale[c.warp] = scale;
    }
    named_barrier(BAR_ALL, ALL);
    for (unsigned row = 0; row < c.rows; row++) {
        const float scale = c.s.scale[row];
#pragma unroll 1
        for (unsigned i = threadIdx.x, j = 0; i < pairs; i += ALL, j++) {
            const uint32_t x = c.x[row * c.a.x_pitch + i], wi = j == 0 ? w[0] : j == 1 ? w[1] : __ldg(weights + i);
            const T *xs = reinterpret_cast<const T *>(&x), *ws = reinterpret_cast<const T *>(&wi);
            c.operand[row * c.a.operand_pitch + operand_place(i)] =
                pack_pair<T>(to_float<T>(ws[0]) * rounded<T>(to_float<T>(xs[0]) * scale),
                             to_float<T>(ws[1]) * rounded<T>(to_float<T>(xs[1]) * scale));
        }
    }
    named_barrier(BAR_ALL, ALL);
}

/* The warp's tiles k .. k + count - 1 of K of every row, from words [rows, row_words], to `to` [rows, pitch] in operand
 * order. */
struct Gather {
    static constexpr unsigned AT_ONCE = HAND / 2 / 32; /* pairs of words of a lane */
    ulonglong2 v[AT_ONCE];

    /* visit(j, row, pair) for every pair of words of the lane. */
    template <class F>
    static __device__ __forceinline__ void each(unsigned lane, unsigned rows, unsigned count, F visit) {
        const unsigned inverse = (1u << 20) / (count * 4) + 1; /* exact for numerators below 256 */
#pragma unroll
        for (unsigned j = 0; j < AT_ONCE; j++) {
            const unsigned n = lane + 32 * j, row = n * inverse >> 20;
            if (row < rows) visit(j, row, n - row * count * 4);
        }
    }
    __device__ __forceinline__ void ask(const uint64_t *words, unsigned row_words, unsigned lane, unsigned rows,
                                        unsigned k, unsigned count) {
        each(lane, rows, count, [&](unsigned j, unsigned row, unsigned pair) {
            v[j] = load_words(words + (size_t)row * row_words + k * 8 + 2 * pair);
        });
    }
    __device__ __forceinline__ void take(const uint64_t *words, unsigned row_words, unsigned lane, unsigned rows,
                                         unsigned k, unsigned count, uint32_t tag, uint32_t *to, unsigned pitch) {
        Patience patience;
        for (;;) {
            bool is_there = true;
            each(lane, rows, count, [&](unsigned j, unsigned, unsigned) {
                is_there &= (uint32_t)(v[j].x >> 32) == tag && (uint32_t)(v[j].y >> 32) == tag;
            });
            if (is_there) break;
            patience.spend();
            ask(words, row_words, lane, rows, k, count);
        }
        each(lane, rows, count, [&](unsigned j, unsigned row, unsigned pair) {
            uint32_t *at = to + row * pitch + operand_place(2 * pair);
            at[0] = (uint32_t)v[j].x;
            at[2] = (uint32_t)v[j].y;
        });
    }
};

/* ---- products ---- */

/* acc += the next `count` tiles of the warp's ring times the operand [rows, pitch] from tile 0 on. */
template <class T, int DIM>
__device__ __forceinline__ void multiply(Consumer<T, DIM> &c, uint32_t operand, unsigned pitch, unsigned columns,
                                         unsigned count, float (&acc)[4]) {
    /* lanes of columns that no row has read zeros over and over */
    const bool is_column = c.lane / 4 < columns;
    uint32_t b = (is_column ? operand + c.lane / 4 * pitch * 4 : shared_address(c.s.zeros)) + c.lane % 4 * 8;
    const uint32_t stride = is_column ? 32 : 0;
    const uint32_t barriers = shared_address(c.s.rings.full[c.warp]);
    constexpr uint32_t TO_EMPTY = sizeof c.s.rings.full;
#pragma unroll 1
    for (unsigned k = 0; k < count; k += PIECE) {
        const uint32_t full = barriers + c.place.slot * 8;
        if (!mbarrier_test(full, c.place.parity)) mbarrier_wait(full, c.place.parity);
        const uint32_t from = c.slots.at(c.warp, c.place.slot) + c.lane * 16;
        uint4 v[PIECE];
        uint2 w[PIECE];
#pragma unroll
        for (int i = 0; i < PIECE; i++) { /* tiles behind the last are stale: their operand is zero, and so are they */
            v[i] = load_shared_16(from + i * TILE_BYTES);
            w[i] = load_shared_8(b + i * stride);
        }
        b += PIECE * stride;
#pragma unroll
        for (int i = 0; i < PIECE; i++) {
            if (i > 0 && k + i >= count) v[i] = make_uint4(0, 0, 0, 0), w[i] = make_uint2(0, 0);
            mma_16816<T>(acc, v[i], w[i]);
        }
        __syncwarp();
        if (c.lane == 0) mbarrier_arrive(full + TO_EMPTY);
        c.place.next(c.slots.count);
    }
}

__device__ __forceinline__ void store_sums(float *to, unsigned lane, const float (&acc)[4]) {
    float2 *mine = reinterpret_cast<float2 *>(to);
    mine[lane] = make_float2(acc[0], acc[1]); /* row lane / 4, columns 2t and 2t + 1 */
    mine[lane + 32] = make_float2(acc[2], acc[3]);
}

/* The parts' sums of rows g and g + 8 for column col, in order. */
template <int PARTS>
__device__ __forceinline__ void add_sums(const float (*sums)[128], unsigned g, unsigned col, float &low, float &high) {
    low = sums[0][g * 8 + col], high = sums[0][(g + 8) * 8 + col];
#pragma unroll
    for (int p = 1; p < PARTS; p++) {
        low += sums[p][g * 8 + col];
        high += sums[p][(g + 8) * 8 + col];
    }
}

/* The group's row tiles of a matrix of eight parts, times c.operand. finish(tile, g, col, low, high, valid): what
 * becomes of the sums of rows g and g + 8 of the tile for row `col` of the step; all lanes of a warp call it together,
 * valid where col is a row. */
template <class T, int DIM, class Finish>
__device__ __forceinline__ void run_matrix(Consumer<T, DIM> &c, unsigned which, unsigned columns, Finish finish) {
    const Work work(c.a.weights.matrix[which], c.warp);
    const Share share = c.s.rings.shares[which];
    for (unsigned i = work.i; i < share.count; i += 2, c.turn++) {
        float acc[4] = {};
        multiply(c, shared_address(c.operand + work.k * 8), c.a.operand_pitch, columns, work.k_last - work.k, acc);
        if (which == GATE_UP_W && i / 2 < 6) c.mark(((c.tag - 1) % c.a.weights.nlayer) * 16 + 8 + i / 2);
        float (*sums)[128] = c.s.sums[c.turn % 2] + 8 * c.group;
        store_sums(sums[c.warp % 8], c.lane, acc);
        c.group_barrier();
        if (c.warp % 8 != c.turn % 8) continue; /* the warps take turns */
#pragma unroll 1
        for (unsigned first = 0; first < columns; first += 4) {
            const unsigned g = c.lane % 8, col = first + c.lane / 8;
            float low, high;
            add_sums<8>(sums, g, col, low, high);
            finish(share.first + i * gridDim.x, g, col, low, high, col < columns);
        }
    }
}

template <class T, int DIM> __device__ __forceinline__ bool works_on(const Consumer<T, DIM> &c, unsigned which) {
    return Work(c.a.weights.matrix[which], c.warp).i < c.s.rings.shares[which].count;
}

/* Sends values of neighbours g and g + 1 (lanes l and l + 1, g even) out as words: `low` to word at / 2, `high` to word
 * at_high / 2, where `at` is the element that this lane's value is. */
template <class T>
__device__ __forceinline__ void send_pairs(uint64_t *words, unsigned at, unsigned at_high, float low, float high,
                                           uint32_t tag, bool valid) {
    const bool is_odd = at % 2;
    const float mine = is_odd ? low : high, other = __shfl_xor_sync(~0u, mine, 1); /* what the neighbour sends */
    const uint32_t pair = is_odd ? pack_pair<T>(other, high) : pack_pair<T>(low, other);
    if (valid) store_word(words + (is_odd ? at_high : at) / 2, tagged(pair, tag));
}

/* The o and down projections' end: x + round(sum) goes out, and nowhere else: every block keeps x as it collected it.
 */
template <class T, int DIM>
__device__ __forceinline__ void add_to_x(const Consumer<T, DIM> &c, uint64_t *to, unsigned tile, unsigned g,
                                         unsigned col, float low, float high, bool valid) {
    const unsigned n = tile * LLA_TILE + g;
    const T *x = reinterpret_cast<const T *>(c.x + (valid ? col : 0) * c.a.x_pitch);
    const unsigned at = col * c.a.hidden + n;
    send_pairs<T>(to, at, at + 8, to_float<T>(x[n]) + rounded<T>(low), to_float<T>(x[n + 8]) + rounded<T>(high), c.tag,
                  valid);
}

/* ---- attention ---- */

/* Unit u of the step's attention: row, split and KV head. */
struct Unit {
    unsigned row, split, kvhead, slot;
    bool is_there;
};

template <class T, int DIM> __device__ __forceinline__ Unit unit_of(const Consumer<T, DIM> &c, unsigned u) {
    Unit unit = {0, 0, u % c.a.nkvhead, u / c.a.nkvhead, false};
#pragma unroll 1
    for (unsigned r = 0; r < c.rows; r++) {
        const RowInfo &row = c.s.rows[r];
        if (unit.slot - row.slot0 < (unsigned)row.nsplit) {
            unit.row = r;
            unit.split = unit.slot - row.slot0;
            unit.is_there = true;
        }
    }
    return unit;
}

/* Keys and values of earlier steps' tokens of unit n, if there is one, in the background; zeros behind them. One group.
 */
template <class T, int DIM>
__device__ __forceinline__ void load_old(const Consumer<T, DIM> &c, unsigned n, size_t layer) {
    constexpr int UNITS = SplitMemory<T, DIM>::UNITS;
    const Unit u = unit_of(c, n);
    if (!u.is_there) return;
    const RowInfo &row = c.s.rows[u.row];
    const T *k = (const T *)(c.a.k_cache + layer * c.a.kv_stride),
            *v = (const T *)(c.a.v_cache + layer * c.a.kv_stride);
    const int start = (int)u.split * SPLIT, old = row.first_new - start;
    const unsigned block = 1u << c.a.kv_shift;
#pragma unroll 2
    for (int i = threadIdx.x % GROUP; i < SPLIT * UNITS; i += GROUP) {
        const int token = i / UNITS, unit = i % UNITS, position = start + token;
        const bool is_old = token < old;
        size_t at = 0;
        if (is_old)
            at = ((((size_t)row.table[position >> c.a.kv_shift] * c.a.nkvhead + u.kvhead) << c.a.kv_shift) +
                  (position & (block - 1))) *
                     DIM +
                 unit * 8;
        cp_async_16(shared_address(&c.s.split.k[c.s.split.at(token, unit)]), k + at, is_old);
        cp_async_16(shared_address(&c.s.split.v[c.s.split.at(token, unit)]), v + at, is_old);
    }
    cp_async_commit();
}

/* What this step computes of a unit: the queries of the group, and keys and values of the step's own tokens. */
template <class T, int DIM> __device__ __forceinline__ void collect_new(const Consumer<T, DIM> &c, const Unit &u) {
    constexpr unsigned PAIRS = DIM / 4; /* of words, of a head */
    const RowInfo &row = c.s.rows[u.row];
    const unsigned heads = c.a.nhead / c.a.nkvhead, width = (c.a.nhead + 2 * c.a.nkvhead) * (DIM / 2); /* words */
    const int start = (int)u.split * SPLIT, from = max(row.first_new, start), to = min(row.position + 1, start + SPLIT);
    const unsigned fresh = to > from ? (unsigned)(to - from) : 0;
#pragma unroll 1
    for (unsigned i = threadIdx.x % GROUP; i < (heads + 2 * fresh) * PAIRS; i += GROUP) {
        const unsigned which = i / PAIRS, pair = i % PAIRS;
        const bool is_q = which < heads, is_v = (which - heads) % 2; /* keys, then values, of a token */
        const unsigned j = is_q ? 0 : (which - heads) / 2;
        const unsigned source = is_q ? u.row : row.row0 + (unsigned)(from - row.first_new) + j;
        const unsigned head = is_q ? u.kvhead * heads + which : c.a.nhead + (is_v ? c.a.nkvhead : 0) + u.kvhead;
        const uint64_t *words = c.a.words.qkv + source * width + head * (DIM / 2) + 2 * pair;
        const uint2 two = await_pair(words, load_words(words), c.tag);
        uint4 *cache = is_v ? c.s.split.v : c.s.split.k;
        const int token = from - start + (int)j;
        uint2 *place = is_q ? reinterpret_cast<uint2 *>(&c.s.split.q[which][2 * pair])
                            : reinterpret_cast<uint2 *>(&cache[c.s.split.at(token, pair / 2)]) + pair % 2;
        *place = two;
    }
}

/* The block's units, by the first group; the first one's old tokens are on their way. */
template <class T, int DIM> __device__ __forceinline__ void run_attention(const Consumer<T, DIM> &c, size_t layer) {
    const unsigned heads = c.a.nhead / c.a.nkvhead, mine = gridDim.x - 1 - blockIdx.x;
    const int g = c.lane / 4, t = c.lane % 4;
#pragma unroll 1
    for (unsigned n = mine;; n += gridDim.x) {
        const Unit u = unit_of(c, n);
        if (!u.is_there) break;
        if (n != mine) load_old(c, n, layer);
        cp_async_wait<0>();
        c.group_barrier(); /* zeros have landed where the step's own tokens go */
        collect_new(c, u);
        c.group_barrier();
        const int valid = min(c.s.rows[u.row].position + 1 - (int)u.split * SPLIT, (int)SPLIT);
        const Partial part =
            attend<T, DIM>(c.s.split, (int)c.warp, (int)c.lane, valid, c.a.scale, [&] { c.group_barrier(); });
        if (c.warp < DIM / 16) {
#pragma unroll
            for (int h = 0; h < 2; h++) {
                if ((unsigned)(2 * t + h) >= heads) continue;
                uint64_t *to =
                    c.a.words.partial + ((size_t)u.slot * c.a.nhead + u.kvhead * heads + 2 * t + h) * (DIM + 2);
                const unsigned d = 16 * c.warp + g;
                store_word(to + d, tagged(__float_as_uint(part.o[h]), c.tag));
                store_word(to + d + 8, tagged(__float_as_uint(part.o[h + 2]), c.tag));
                if (c.warp == 0 && g == 0) {
                    store_word(to + DIM, tagged(__float_as_uint(part.m[h]), c.tag));
                    store_word(to + DIM + 1, tagged(__float_as_uint(part.l[h]), c.tag));
                }
            }
        }
        c.group_barrier();
    }
}

/* Splits become attention's output: a warp of the second group takes 32 dimensions of a row's head. */
template <class T, int DIM> __device__ __forceinline__ void run_merge(const Consumer<T, DIM> &c) {
    constexpr int AT_ONCE = 8;
    constexpr unsigned shares = DIM / 32;
    const unsigned total = c.rows * c.a.nhead * shares;
#pragma unroll 1
    for (unsigned n = gridDim.x - 1 - blockIdx.x + gridDim.x * (c.warp % 8); n < total; n += 8 * gridDim.x) {
        const unsigned share = n % shares, head = n / shares % c.a.nhead, row = n / shares / c.a.nhead;
        const RowInfo &info = c.s.rows[row];
        const unsigned stride = c.a.nhead * (DIM + 2);
        const uint64_t *part = c.a.words.partial + ((size_t)info.slot0 * c.a.nhead + head) * (DIM + 2);
        float o = 0, m = -INFINITY, l = 0; /* merging with nothing changes nothing: 2^-inf = 0 */
#pragma unroll 1
        for (int first = 0; first < info.nsplit; first += AT_ONCE) {
            const int count = min(AT_ONCE, info.nsplit - first);
            /* lane j < 16 waits for maximum (j even) or sum of split first + j / 2; all for their dimension's outputs
             */
            const uint64_t *mine = part + share * 32 + c.lane;
            const uint64_t *aside = part + (size_t)min((int)c.lane / 2, count - 1) * stride + DIM + c.lane % 2;
            uint64_t v[AT_ONCE], other = load_word(aside);
#pragma unroll
            for (int j = 0; j < AT_ONCE; j++)
                if (j < count) v[j] = load_word(mine + (size_t)j * stride);
            Patience patience;
            while ((uint32_t)(other >> 32) != c.tag) {
                patience.spend();
                other = load_word(aside);
            }
            __syncwarp();
#pragma unroll
            for (int j = 0; j < AT_ONCE; j++) {
                if (j >= count) break;
                while ((uint32_t)(v[j] >> 32) != c.tag) {
                    patience.spend();
                    v[j] = load_word(mine + (size_t)j * stride);
                }
                __syncwarp();
                const float pm = __uint_as_float(__shfl_sync(~0u, (uint32_t)other, 2 * j)),
                            pl = __uint_as_float(__shfl_sync(~0u, (uint32_t)other, 2 * j + 1));
                const Weighting w(m, pm);
                o = w.merged(o, __uint_as_float((uint32_t)v[j]));
                l = w.merged(l, pl);
                m = w.top;
            }
            part += (size_t)AT_ONCE * stride;
        }
        const float out = o / l, next = __shfl_down_sync(~0u, out, 1);
        const unsigned at = (row * c.a.nhead + head) * DIM + share * 32 + c.lane;
        if (c.lane % 2 == 0) store_word(c.a.words.attn + at / 2, tagged(pack_pair<T>(out, next), c.tag));
    }
}

/* ---- phases ---- */

/* Asks for what the end of the block's first row tile needs, ahead of x. */
template <class T, int DIM> __device__ __forceinline__ void prefetch_qkv(const Consumer<T, DIM> &c, const T *bias) {
    if (c.warp % 8 != c.turn % 8 || !works_on(c, QKV_W)) return;
    const unsigned pair = c.s.rings.shares[QKV_W].first * 8, head = pair / (DIM / 2), j = pair % (DIM / 2);
    if (c.lane < 2) prefetch_l1(bias + head * DIM + j + c.lane * (DIM / 2));
    const RowInfo &row = c.s.rows[c.lane / 2 % ROWS];
    if (c.lane / 2 < c.rows) prefetch_l1((const T *)c.a.rope + (size_t)row.position * DIM + c.lane % 2 * (DIM / 2) + j);
}

template <class T, int DIM> __device__ __forceinline__ void run_qkv(Consumer<T, DIM> &c, size_t layer) {
    const Whole &a = c.a;
    const size_t in_layer = layer * a.weights.layer_stride;
    const T *bias = (const T *)(a.bias + in_layer);
    prefetch_qkv(c, bias);
    /* a block that only has rows of the o projection needs x, too */
    if (c.s.rings.shares[QKV_W].count || c.s.rings.shares[O_W].count)
        collect_normed(c, layer ? a.words.x_attn : nullptr, c.tag - 1, a.attn_norm + in_layer);
    c.mark(layer * 16 + 0);
    T *k_cache = (T *)(a.k_cache + layer * a.kv_stride), *v_cache = (T *)(a.v_cache + layer * a.kv_stride);
    run_matrix(c, QKV_W, c.rows, [&](unsigned tile, unsigned g, unsigned col, float low, float high, bool valid) {
        constexpr unsigned half = DIM / 2;
        const unsigned pair = tile * 8 + g, head = pair / half, j = pair % half;
        const RowInfo &row = c.s.rows[valid ? col : 0];
        low = rounded<T>(low + to_float<T>(bias[head * DIM + j]));
        high = rounded<T>(high + to_float<T>(bias[head * DIM + j + half]));
        if (head < a.nhead + a.nkvhead) {
            const T *rope = (const T *)a.rope + (size_t)row.position * DIM;
            rotate<T>(low, high, to_float<T>(rope[j]), to_float<T>(rope[j + half]));
        }
        const unsigned at = (col * (a.nhead + 2 * a.nkvhead) + head) * DIM + j;
        send_pairs<T>(a.words.qkv, at, at + half, low, high, c.tag, valid);
        if (head >= a.nhead && valid) { /* for later steps */
            const bool is_v = head >= a.nhead + a.nkvhead;
            const unsigned kvhead = head - a.nhead - (is_v ? a.nkvhead : 0);
            T *to = (is_v ? v_cache : k_cache) + row.cache + ((size_t)kvhead << a.kv_shift) * DIM;
            to[j] = from_float<T>(low);
            to[j + half] = from_float<T>(high);
        }
    });
    named_barrier(BAR_ALL, ALL); /* the operand's memory is free for attention's output */
    c.mark(layer * 16 + 1);
}

template <class T, int DIM> __device__ __forceinline__ void run_o(Consumer<T, DIM> &c, size_t layer) {
    if (!works_on(c, O_W)) return;
    const Matrix &m = c.a.weights.matrix[O_W];
    const Work work(m, c.warp);
    const unsigned most = HAND / 8 / c.rows;
#pragma unroll 1
    for (unsigned k = work.k; k < work.k_last; k += most) {
        const unsigned count = min(most, work.k_last - k);
        Gather gather;
        gather.ask(c.a.words.attn, m.ktiles * 8, c.lane, c.rows, k, count);
        gather.take(c.a.words.attn, m.ktiles * 8, c.lane, c.rows, k, count, c.tag, c.operand + k * 8,
                    c.a.operand_pitch);
    }
    __syncwarp();
    c.mark(layer * 16 + 3);
    run_matrix(c, O_W, c.rows, [&](unsigned tile, unsigned g, unsigned col, float low, float high, bool valid) {
        add_to_x(c, c.a.words.x_mlp, tile, g, col, low, high, valid);
    });
}

template <class T, int DIM> __device__ __forceinline__ void run_gate_up(Consumer<T, DIM> &c, size_t layer) {
    const Whole &a = c.a;
    /* a block that only has rows of the down projection needs x, too */
    if (c.s.rings.shares[GATE_UP_W].count || c.s.rings.shares[DOWN_W].count)
        collect_normed(c, a.words.x_mlp, c.tag, a.mlp_norm + layer * a.weights.layer_stride);
    c.mark(layer * 16 + 5);
    run_matrix(c, GATE_UP_W, c.rows, [&](unsigned tile, unsigned g, unsigned col, float low, float high, bool valid) {
        const float act = swiglu<T>(low, high), next = __shfl_down_sync(~0u, act, 1);
        const unsigned at = col * a.ffn + tile * 8 + g;
        if (valid && g % 2 == 0) store_word(a.words.act + at / 2, tagged(pack_pair<T>(act, next), c.tag));
    });
}

/* The long product: stretch by stretch of K; a stretch's activations are on their way while the one before is
 * multiplied. All consumers, on a row tile together where K has sixteen parts. */
template <class T, int DIM> __device__ __forceinline__ void run_down(Consumer<T, DIM> &c, size_t layer) {
    const Share share = c.s.rings.shares[DOWN_W];
    const Matrix &m = c.a.weights.matrix[DOWN_W];
    const Work work(m, c.warp);
    const unsigned most = HAND / 8 / c.rows / PIECE * PIECE, row_words = m.ktiles * 8, pitch = most * 8 + 8;
    const uint64_t *words = c.a.words.act;
    uint32_t *hand = c.s.hand[c.warp];
    float (*sums)[128] = m.parts == 16 ? c.s.sums[0] : c.s.sums[0] + 8 * c.group;
    if (share.count == 0) return;
#pragma unroll 1
    for (unsigned n = 0; n < share.count; n += work.step) {
        const unsigned i = n + work.i;
        float acc[4] = {};
        if (i < share.count) {
            Gather gather;
            gather.ask(words, row_words, c.lane, c.rows, work.k, min(most, work.k_last - work.k));
#pragma unroll 1
            for (unsigned k = work.k; k < work.k_last; k += most) {
                const unsigned count = min(most, work.k_last - k), next = k + most;
                gather.take(words, row_words, c.lane, c.rows, k, count, c.tag, hand, pitch);
                __syncwarp();
                if (next < work.k_last)
                    gather.ask(words, row_words, c.lane, c.rows, next, min(most, work.k_last - next));
                if (n == 0 && k == work.k) c.mark(layer * 16 + 6);
                multiply(c, shared_address(hand), pitch, c.rows, count, acc);
            }
        }
        c.mark(layer * 16 + 14);
        named_barrier(BAR_ALL, ALL); /* the sums before have been read */
        store_sums(sums[c.warp % (m.parts == 16 ? 16 : 8)], c.lane, acc);
        named_barrier(BAR_ALL, ALL);
        const unsigned reducer = m.parts == 16 ? c.warp : c.warp % 8; /* two warps, four columns each */
        if (reducer > 1 || reducer * 4 >= c.rows || i >= share.count) continue;
        const unsigned g = c.lane % 8, col = reducer * 4 + c.lane / 8;
        float low, high;
        if (m.parts == 16)
            add_sums<16>(sums, g, col, low, high);
        else
            add_sums<8>(sums, g, col, low, high);
        add_to_x(c, c.a.words.x_attn, share.first + i * gridDim.x, g, col, low, high, col < c.rows);
    }
    c.mark(layer * 16 + 7);
}

/* Logits, and the best of them that each warp has seen. */
template <class T, int DIM> __device__ __forceinline__ void run_head(Consumer<T, DIM> &c) {
    const Whole &a = c.a;
    float best[2] = {-INFINITY, -INFINITY}; /* of columns lane / 8 and 4 more */
    int32_t where[2] = {INT32_MAX, INT32_MAX};
    if (c.nlogit && c.s.rings.shares[HEAD_W].count) {
        collect_normed(c, a.words.x_attn, c.tag, a.norm);
        run_matrix(c, HEAD_W, c.rows, [&](unsigned tile, unsigned g, unsigned col, float low, float high, bool valid) {
            const unsigned n = tile * LLA_TILE + g;
#pragma unroll 1
            for (unsigned i = 0; i < c.nlogit; i++) { /* logit rows that this row of the step is */
                if (!valid || c.s.logit_rows[i] != (int)col) continue;
                T *to = (T *)a.logits + (size_t)i * a.vocab + n;
                if (n < a.vocab) to[0] = from_float<T>(low);
                if (n + 8 < a.vocab) to[8] = from_float<T>(high);
            }
            const float v[2] = {rounded<T>(low), rounded<T>(high)};
#pragma unroll
            for (int h = 0; h < 2; h++) {
                const int32_t token = (int32_t)n + 8 * h;
                if (valid && col < 4 && token < (int)a.vocab && better(v[h], token, best[0], where[0]))
                    best[0] = v[h], where[0] = token;
                if (valid && col >= 4 && token < (int)a.vocab && better(v[h], token, best[1], where[1]))
                    best[1] = v[h], where[1] = token;
            }
        });
    }
#pragma unroll
    for (int h = 0; h < 2; h++) {
        for (int o = 4; o; o /= 2) {
            const float v = __shfl_xor_sync(~0u, best[h], o);
            const int32_t i = __shfl_xor_sync(~0u, where[h], o);
            if (better(v, i, best[h], where[h])) best[h] = v, where[h] = i;
        }
        if (c.lane % 8 == 0) c.s.best[c.warp][4 * h + c.lane / 8] = lla_candidate{best[h], where[h]};
    }
}

/* The best of all blocks: each sends its own, by row of the step; the first block takes them, and so outlives them all.
 */
template <class T, int DIM> __device__ __forceinline__ void choose(const Consumer<T, DIM> &c) {
    named_barrier(BAR_ALL, ALL);
    if (threadIdx.x < c.rows) {
        lla_candidate best = {-INFINITY, INT32_MAX};
#pragma unroll 1
        for (int w = 0; w < CONSUMERS; w++) {
            const lla_candidate &o = c.s.best[w][threadIdx.x];
            if (better(o.value, o.token, best.value, best.token)) best = o;
        }
        uint64_t *to = c.a.words.best + (threadIdx.x * gridDim.x + blockIdx.x) * 2;
        store_word(to, tagged(__float_as_uint(best.value), c.tag));
        store_word(to + 1, tagged((uint32_t)best.token, c.tag));
    }
    if (blockIdx.x || c.warp >= c.rows) return;
    float best = -INFINITY;
    int32_t where = INT32_MAX;
#pragma unroll 1
    for (unsigned b = c.lane; b < gridDim.x; b += 32) {
        const uint64_t *from = c.a.words.best + (c.warp * gridDim.x + b) * 2;
        const uint2 v = await_pair(from, load_words(from), c.tag);
        if (better(__uint_as_float(v.x), (int32_t)v.y, best, where)) best = __uint_as_float(v.x), where = (int32_t)v.y;
    }
    for (int o = 16; o; o /= 2) {
        const float v = __shfl_xor_sync(~0u, best, o);
        const int32_t i = __shfl_xor_sync(~0u, where, o);
        if (better(v, i, best, where)) best = v, where = i;
    }
    if (c.lane < c.nlogit && c.s.logit_rows[c.lane] == (int)c.warp) c.a.next[c.lane] = where;
}

/* What the step's inputs say of its rows; one warp, a lane a row. */
template <class T, int DIM>
__device__ __forceinline__ void describe_rows(const Whole &a, Memory<T, DIM> &s, unsigned rows, unsigned nlogit,
                                              unsigned lane) {
    const bool is_row = lane < rows;
    const int position = is_row ? a.positions[lane] : 0, seq = is_row ? a.row_seq[lane] : -1;
    const int32_t *table = a.table + (size_t)(is_row ? seq : 0) * a.max_blocks;
    unsigned cache = 0;
    if (is_row)
        cache = (((unsigned)table[position >> a.kv_shift] * a.nkvhead << a.kv_shift) +
                 (position & ((1u << a.kv_shift) - 1))) *
                DIM;
    int slot = 0, row0 = (int)lane, first_new = position;
    for (int r = 0; r < ROWS; r++) { /* rows of one sequence stand together */
        const int other = __shfl_sync(~0u, position, r), other_seq = __shfl_sync(~0u, seq, r);
        if (r < (int)lane && other_seq >= 0) slot += other / SPLIT + 1;
        if (r < row0 && other_seq == seq) row0 = r, first_new = other;
    }
    if (is_row) s.rows[lane] = RowInfo{position, first_new, row0, slot, position / SPLIT + 1, table, cache};
    if (lane < ROWS) {
        s.logit_rows[lane] = lane < nlogit ? a.logit_rows[lane] : -1;
        s.zeros[lane] = 0;
    }
}

template <class T, int DIM> __global__ void __launch_bounds__(BLOCK, 1) whole_kernel(const __grid_constant__ Whole a) {
    extern __shared__ __align__(128) char smem[];
    Memory<T, DIM> &s = *reinterpret_cast<Memory<T, DIM> *>(smem);
    const unsigned rows = (unsigned)a.header->nrow, nlogit = (unsigned)a.header->nlogit;
    const uint32_t epoch = *(volatile uint32_t *)a.epoch;
    uint32_t *x = reinterpret_cast<uint32_t *>(smem + sizeof s), *operand = x + rows * a.x_pitch;
    const Slots slots = {shared_address(operand + rows * a.operand_pitch), a.slots};
    const unsigned warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    if (warp == CONSUMERS) s.rings.init(a.weights, lane);
    if (warp == 0) describe_rows(a, s, rows, nlogit, lane);
    __syncthreads();
    if (warp >= CONSUMERS) {
        fill_rings(s.rings, slots, a.weights, nlogit > 0, a.window, a.ahead, a.pace, warp - CONSUMERS);
        return;
    }

    Consumer<T, DIM> c = {a,  s, x, operand, slots, warp, lane, warp / 8, rows, nlogit, epoch * a.weights.nlayer + 1,
                          {}, 0};
#pragma unroll 1
    for (size_t layer = 0; layer < a.weights.nlayer; layer++, c.tag++) {
        if (c.group == 0) load_old(c, gridDim.x - 1 - blockIdx.x, layer);
        run_qkv(c, layer);
        if (c.group == 0)
            run_attention(c, layer);
        else
            run_merge(c);
        c.mark(layer * 16 + 2);
        run_o(c, layer);
        c.mark(layer * 16 + 4);
        run_gate_up(c, layer);
        run_down(c, layer);
    }
    c.tag--; /* the last layer's */
    run_head(c);
    choose(c);
    c.mark(a.weights.nlayer * 16);
    if (blockIdx.x == 0) {
        named_barrier(BAR_ALL, ALL);
        if (threadIdx.x == 0) *a.epoch = epoch + 1;
    }
}

/* Bytes of shared memory of a block, but for the rings' slots. */
template <class T, int DIM> size_t fixed_bytes(const Whole &a, size_t rows) {
    return sizeof(Memory<T, DIM>) + rows * (a.x_pitch + a.operand_pitch) * 4;
}

enum { SLOT_BYTES = CONSUMERS * PIECE * TILE_BYTES, LEAST_SLOTS = 3 };

template <class T, int DIM> lla_status launch_whole(const lla_cuda_ctx *ctx, Whole a) {
    const size_t fixed = fixed_bytes<T, DIM>(a, ctx->rows), slots = (ctx->max_smem - fixed) / SLOT_BYTES;
    a.slots = slots < MOST_SLOTS ? (unsigned)slots : MOST_SLOTS;
    if (a.window > a.slots) a.window = a.slots;
    const size_t smem = fixed + a.slots * SLOT_BYTES;
    auto *kernel = whole_kernel<T, DIM>;
    cudaError_t e = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)smem);
    cudaLaunchAttribute attribute = {};
    attribute.id = cudaLaunchAttributeCooperative; /* all blocks are there at once, or the launch fails */
    attribute.val.cooperative = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3((unsigned)ctx->sm_count);
    config.blockDim = dim3(BLOCK);
    config.dynamicSmemBytes = smem;
    config.stream = (cudaStream_t)ctx->stream;
    config.attrs = &attribute;
    config.numAttrs = 1;
    if (e == cudaSuccess) e = cudaLaunchKernelEx(&config, kernel, a);
    if (e != cudaSuccess)
        return lla_fail(LLA_EDEVICE, "whole step: launch with %zu bytes of shared memory failed: %s", smem,
                        cudaGetErrorString(e));
    return LLA_OK;
}

/* Words of a row in shared memory: eight rows in different banks. */
unsigned x_pitch(const lla_dims &d) {
    return (unsigned)(d.hidden / 2 + 4);
}
unsigned operand_pitch(const lla_dims &d) {
    const size_t q = d.nhead * d.head_dim, k = q > d.hidden ? q : d.hidden;
    return (unsigned)((k / 2 + 31) / 32 * 32 + 8);
}

size_t down_parts(const lla_dims &d) {
    return d.ffn >= 4096 ? 16 : 8;
}

} // namespace

bool lla_cuda_whole_fits(const lla_cuda_ctx *ctx) {
    const lla_dims &d = ctx->dims;
    const size_t q = d.nhead * d.head_dim;
    Whole a = {};
    a.x_pitch = x_pitch(d);
    a.operand_pitch = operand_pitch(d);
    return ctx->rows <= LLA_WHOLE_ROWS && d.dtype != LLAISYS_DTYPE_F32 && (d.head_dim == 64 || d.head_dim == 128) &&
           d.nhead / d.nkvhead <= HEADS && d.hidden % LLA_TILE == 0 && d.ffn % LLA_TILE == 0 && q < 4096 &&
           ctx->sm_count <= LLA_MAX_SMS &&
           fixed_bytes<__half, 128>(a, ctx->rows) + LEAST_SLOTS * SLOT_BYTES <= ctx->max_smem;
}

lla_status lla_cuda_whole(const lla_cuda_ctx *ctx, const lla_whole_args *args) {
    const lla_dims &d = ctx->dims;
    const lla_io &io = ctx->io;
    char *m = ctx->arena;
    uint64_t *words = (uint64_t *)(m + io.mail);
    const lla_mail mail = lla_mail_layout(&d);
    const unsigned q = (unsigned)(d.nhead * d.head_dim), kv = (unsigned)(d.nkvhead * d.head_dim),
                   hidden = (unsigned)d.hidden, ffn = (unsigned)d.ffn;
    Whole a = {};
    Matrix *w = a.weights.matrix;
    w[QKV_W] = Matrix{m + args->qkv.w, (q + 2 * kv) / 16, hidden / 16, 8, 0, false};
    w[O_W] = Matrix{m + args->o.w, hidden / 16, q / 16, 8, 1, true};
    w[GATE_UP_W] = Matrix{m + args->gate_up.w, ffn / 8, hidden / 16, 8, 0, true};
    w[DOWN_W] = Matrix{m + args->down.w, hidden / 16, ffn / 16, (unsigned)down_parts(d), 0, false};
    w[HEAD_W] = Matrix{m + args->head.w, (unsigned)tiles_of(d.vocab), hidden / 16, 8, 0, false};
    a.weights.layer_stride = args->weight_stride;
    a.weights.nlayer = (unsigned)args->nlayer;
    a.header = (const lla_step_header *)(m + io.header);
    a.tokens = (const int32_t *)(m + io.tokens);
    a.positions = (const int32_t *)(m + io.positions);
    a.row_seq = (const int32_t *)(m + io.row_seq);
    a.table = (const int32_t *)(m + io.block_table);
    a.logit_rows = (const int32_t *)(m + io.logit_rows);
    a.embed = m + args->embed.weight;
    a.attn_norm = m + args->qkv.norm;
    a.mlp_norm = m + args->gate_up.norm;
    a.bias = m + args->qkv.bias;
    a.norm = m + args->head.norm;
    a.rope = m + args->qkv.rope;
    a.k_cache = m + args->qkv.k_cache;
    a.v_cache = m + args->qkv.v_cache;
    a.logits = m + args->head.logits;
    a.kv_stride = args->kv_stride;
    a.next = (int32_t *)(m + io.next);
    a.epoch = (uint32_t *)(words + mail.epoch);
    a.words = Words{words + mail.x_attn, words + mail.x_mlp,   words + mail.qkv, words + mail.attn,
                    words + mail.act,    words + mail.partial, words + mail.best};
    a.hidden = hidden;
    a.nhead = (unsigned)d.nhead;
    a.nkvhead = (unsigned)d.nkvhead;
    a.ffn = ffn;
    a.vocab = (unsigned)d.vocab;
    while ((size_t)1 << a.kv_shift < d.kv_block) a.kv_shift++;
    a.max_blocks = (unsigned)d.max_blocks;
    a.x_pitch = x_pitch(d);
    a.operand_pitch = operand_pitch(d);
    a.window = args->window ? args->window : 2;
    a.ahead = getenv("LLA_AHEAD") ? atoi(getenv("LLA_AHEAD")) : 0;
    a.pace = getenv("LLA_PACE") ? atoi(getenv("LLA_PACE")) : 1800;
    a.eps = d.eps;
    a.scale = attention_scale(d.head_dim);
    a.trace = args->trace;
#ifdef ONLY_EXACT
    return launch_whole<__nv_bfloat16, 128>(ctx, a);
#else
    const bool is_bf16 = d.dtype == LLAISYS_DTYPE_BF16;
    if (d.head_dim == 128 && is_bf16) return launch_whole<__nv_bfloat16, 128>(ctx, a);
    if (d.head_dim == 128) return launch_whole<__half, 128>(ctx, a);
    if (is_bf16) return launch_whole<__nv_bfloat16, 64>(ctx, a);
    return launch_whole<__half, 64>(ctx, a);
#endif
}
