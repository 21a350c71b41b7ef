/* step_draw.cu: the token of a row of logits that is not simply the largest, and what its log-probabilities need: the
 * twin of kernels/cpu/draw.c (struct lla_draw in kernels.h has the formulas).
 *
 * A cluster of blocks shares a row: every warp has a stretch of it, in order of tokens. Nothing is sorted and nothing
 * is gathered. Which tokens are left is told by a key and a number of ties: tokens of larger keys, and of that very key
 * the first so many. Where a prefix of the sorted row ends is found as on the CPU, bin by bin, with a first pass over
 * bins of equal width, since neighbours in a row of logits then seldom meet in one. Weights and their sums are
 * integers, and what the CPU rounds is rounded here in the same order: from the same logits comes the same token,
 * whatever the number of blocks. */
#include "step_draw.cuh"

namespace {

constexpr int UNIT = 8; /* values a lane takes at a time */
constexpr int STRETCH = 32 * UNIT;
constexpr int DRAW_WARPS = 16, DRAW_THREADS = 32 * DRAW_WARPS;
constexpr unsigned CLUSTER = 8, MOST_WARPS = CLUSTER * DRAW_WARPS;
constexpr unsigned BINS = 2048;
static_assert(BINS == 4 * DRAW_THREADS, "a thread has four bins");
static_assert(LLA_MAX_LOGPROB <= 32, "one warp orders the largest");

struct share { /* of the list, in a warp's stretch */
    uint64_t sum;
    uint32_t ties, unused;
};

struct shared {
    uint32_t low[BINS], high[BINS]; /* halves of the block's sums */
    share shares[DRAW_WARPS];
    uint4 best;                     /* of the block: value, token */
    uint64_t begin[MOST_WARPS + 1]; /* the sum of all stretches before each */
    uint32_t ties_left[MOST_WARPS]; /* how many ties of a stretch, and of those behind it, are in the list */
    uint64_t totals[DRAW_WARPS];
    float values[DRAW_WARPS];
    int32_t tokens[DRAW_WARPS];
    uint64_t target;
    uint32_t bin;
};
static_assert(sizeof(share) == 16, "peers read 16 bytes at once");

struct draw_inputs {
    const lla_step_header *header;
    const lla_sampling_row *sampling;
    const lla_bias *bias;
    const uint32_t *mask;
    const int32_t *logit_rows, *row_seq, *table, *kv_tokens;
    size_t max_blocks, kv_block;
};

/* A row, and the warp's stretch of it. */
template <class T> struct row_view {
    const T *logits;       /* [n] */
    const float *adjusted; /* [n]: with bias and penalties; NULL: the logits are it */
    const uint32_t *mask;  /* NULL: all are allowed */
    size_t n;
    size_t first, last;
    unsigned rank, nblock; /* of the cluster */
    int warp, lane;

    /* Values i .. i + UNIT - 1 of the row, or as many as there are: how many. i is a multiple of UNIT. */
    __device__ __forceinline__ int load(size_t i, float (&v)[UNIT]) const {
        const int count = last - i < UNIT ? (int)(last - i) : UNIT;
        if (n % UNIT == 0) {
            if (adjusted) {
                read(adjusted + i, v);
            } else {
                read(logits + i, v);
            }
        } else {
#pragma unroll
            for (int e = 0; e < UNIT; e++)
                v[e] = e >= count ? -INFINITY : adjusted ? adjusted[i + e] : to_float<T>(logits[i + e]);
        }
        if (mask) {
            const uint32_t allowed = allowed_at(i);
#pragma unroll
            for (int e = 0; e < UNIT; e++) v[e] = allowed >> e & 1 ? v[e] : -INFINITY;
        }
        return count;
    }

    /* Bits of those of the UNIT tokens that the mask allows. */
    __device__ __forceinline__ uint32_t allowed_at(size_t i) const {
        return mask ? mask[i / 32] >> i % 32 & 0xff : 0xff;
    }

    template <class U> __device__ static __forceinline__ void read(const U *from, float (&v)[UNIT]) {
        U raw[UNIT];
#pragma unroll
        for (size_t b = 0; b < sizeof raw / 16; b++)
            reinterpret_cast<uint4 *>(raw)[b] = reinterpret_cast<const uint4 *>(from)[b];
#pragma unroll
        for (int e = 0; e < UNIT; e++) v[e] = to_float<U>(raw[e]);
    }
};

/* What is left of a row. */
struct list {
    float max, scale; /* weights are 2^((value - max) * scale) */
    uint32_t key, ties;
    bool is_row; /* all is left, whatever key says */

    __device__ __forceinline__ bool is_above(uint32_t k) const { return is_row || k > key; }
    __device__ __forceinline__ bool is_tie(uint32_t k) const { return !is_row && k == key; }
};

/* ---- as in draw.c ---- */

__device__ __forceinline__ float value_of(uint32_t key) {
    return __uint_as_float(key >> 31 ? key ^ 0x80000000u : ~key);
}

/* Each operation rounded by itself: nothing may be fused. What draw.c converts to integers is read off the bits here,
 * since conversions are slow: adding 1.5 2^23 leaves a whole number in the lowest ones, rounded up, which for a
 * negative number is towards zero; and p 2^24, with p from 0.7 to 1.42, is p's significand, shifted. */
__device__ __forceinline__ uint64_t weigh(const list &l, float value) {
    const float t = __fmul_rn(__fsub_rn(value, l.max), l.scale);
    const float power = t > -60.0f ? t : -60.0f;
    const float whole = 12582912.0f, up = __fadd_ru(__fsub_rn(power, 0.5f), whole);
    const int k = (int)(__float_as_uint(up) - __float_as_uint(whole));
    const float x = __fmul_rn(__fsub_rn(power, __fsub_rn(up, whole)), 0.69314718f);
    float p = 1.0f / 5040;
    p = __fadd_rn(__fmul_rn(p, x), 1.0f / 720);
    p = __fadd_rn(__fmul_rn(p, x), 1.0f / 120);
    p = __fadd_rn(__fmul_rn(p, x), 1.0f / 24);
    p = __fadd_rn(__fmul_rn(p, x), 1.0f / 6);
    p = __fadd_rn(__fmul_rn(p, x), 0.5f);
    p = __fadd_rn(__fmul_rn(p, x), 1.0f);
    p = __fadd_rn(__fmul_rn(p, x), 1.0f);
    const uint32_t bits = __float_as_uint(p), significand = (bits & 0x7fffff) | 0x800000;
    const int shift = (int)(bits >> 23) - 126 + (LLA_WEIGHT_BITS - 24) + k;
    return shift >= 0 ? (uint64_t)significand << shift : significand >> (shift > -31 ? -shift : 31);
}

__device__ uint32_t philox(uint64_t seed, uint64_t counter) {
    uint32_t c0 = (uint32_t)counter, c1 = (uint32_t)(counter >> 32), c2 = 0, c3 = 0;
    uint32_t k0 = (uint32_t)seed, k1 = (uint32_t)(seed >> 32);
    for (int round = 0; round < 10; round++) {
        const uint64_t p0 = (uint64_t)0xD2511F53u * c0, p1 = (uint64_t)0xCD9E8D57u * c2;
        const uint32_t n0 = (uint32_t)(p1 >> 32) ^ c1 ^ k0, n2 = (uint32_t)(p0 >> 32) ^ c3 ^ k1;
        c1 = (uint32_t)p1;
        c3 = (uint32_t)p0;
        c0 = n0;
        c2 = n2;
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    return c0;
}

/* ---- blocks that share a row ---- */

/* All threads of the row: what was written before, to any block's shared memory, is seen behind it. */
__device__ __forceinline__ void sync_row(unsigned nblock) {
    if (nblock > 1) {
        cluster_arrive();
        cluster_wait();
    } else {
        __syncthreads();
    }
}

/* 16 bytes of a block's shared memory. */
__device__ __forceinline__ uint4 peer_16(const void *from, unsigned rank, unsigned nblock) {
    return nblock > 1 ? load_cluster_16(shared_address(from), rank) : *static_cast<const uint4 *>(from);
}

/* The sum of v over the threads before this one, and over all. */
__device__ uint64_t scan_block(shared &s, uint64_t v, uint64_t &total) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    uint64_t sum = v;
    for (int o = 1; o < 32; o *= 2) {
        const uint64_t other = __shfl_up_sync(~0u, sum, o);
        if (lane >= o) sum += other;
    }
    if (lane == 31) s.totals[warp] = sum;
    __syncthreads();
    uint64_t before = 0;
    total = 0;
    for (int w = 0; w < DRAW_WARPS; w++) {
        if (w < warp) before += s.totals[w];
        total += s.totals[w];
    }
    __syncthreads();
    return before + sum - v;
}

template <class T> __device__ uint64_t sum_warp(T v) {
    for (int o = 16; o; o /= 2) v += __shfl_xor_sync(~0u, v, o);
    return v;
}

/* The largest allowed value of the row and its first token, on all threads. */
template <class T> __device__ float argmax(shared &s, const row_view<T> &row, int32_t &token) {
    float best = -INFINITY, v[UNIT];
    int32_t where = 0x7fffffff;
    for (size_t i = row.first + (size_t)row.lane * UNIT; i < row.last; i += STRETCH) {
        const int count = row.load(i, v);
        const uint32_t allowed = row.allowed_at(i);
#pragma unroll
        for (int e = 0; e < UNIT; e++)
            if (e < count && allowed >> e & 1 && better(v[e], (int32_t)i + e, best, where))
                best = v[e], where = (int32_t)i + e;
    }
    for (int o = 16; o; o /= 2) {
        const float w = __shfl_xor_sync(~0u, best, o);
        const int32_t j = __shfl_xor_sync(~0u, where, o);
        if (better(w, j, best, where)) best = w, where = j;
    }
    if (row.lane == 0) s.values[row.warp] = best, s.tokens[row.warp] = where;
    __syncthreads();
    if (threadIdx.x == 0) {
        for (int w = 1; w < DRAW_WARPS; w++)
            if (better(s.values[w], s.tokens[w], best, where)) best = s.values[w], where = s.tokens[w];
        s.best = make_uint4(__float_as_uint(best), (uint32_t)where, 0, 0);
    }
    sync_row(row.nblock);
    best = -INFINITY, where = 0x7fffffff;
    for (unsigned b = 0; b < row.nblock; b++) {
        const uint4 theirs = peer_16(&s.best, b, row.nblock);
        const float w = __uint_as_float(theirs.x);
        if (better(w, (int32_t)theirs.y, best, where)) best = w, where = (int32_t)theirs.y;
    }
    sync_row(row.nblock);
    token = (size_t)where < row.n ? where : 0;
    return best;
}

/* ---- cutting ---- */

/* Bins of equal width from the largest value down: of masses, as far as there are any; of counts, over 32. */
__device__ __forceinline__ uint32_t even_bin(const list &l, bool by_mass, float value) {
    const float below = __fsub_rn(l.max, value), t = by_mass ? __fmul_rn(__fmul_rn(below, l.scale), 48.0f) : below * 64;
    return t < (float)(BINS - 1) ? (uint32_t)t : BINS - 1;
}

/* The pass of a selection: by even bins, then by the key's first, next and last bits. */
struct pass {
    bool by_mass, is_even;
    bool has_even; /* values stand in this one of the even bins */
    uint32_t even;
    unsigned shift, bits;
    uint32_t prefix; /* of the key, above shift + bits */

    __device__ __forceinline__ void add(shared &s, const list &l, float value, uint32_t key, uint32_t times) const {
        uint32_t bin = 0;
        if (is_even || has_even) bin = even_bin(l, by_mass, value);
        if (!is_even) {
            if ((has_even && bin != even) || (shift + bits < 32 && key >> (shift + bits) != prefix)) return;
            bin = ~(key >> shift) & ((1u << bits) - 1);
        }
        const uint64_t amount = times * (by_mass ? weigh(l, value) : 1);
        if (!amount) return;
        const uint32_t low = (uint32_t)amount, old = low ? atomicAdd(&s.low[bin], low) : 0;
        const uint32_t high = (uint32_t)(amount >> 32) + (low && old + low < low);
        if (high) atomicAdd(&s.high[bin], high);
    }
};

/* Adds the list's members into the bins of each block. */
template <class T> __device__ void add_up(shared &s, const row_view<T> &row, const list &l, const pass &p) {
    reinterpret_cast<uint4 *>(s.low)[threadIdx.x] = make_uint4(0, 0, 0, 0);
    reinterpret_cast<uint4 *>(s.high)[threadIdx.x] = make_uint4(0, 0, 0, 0);
    __syncthreads();
    float v[UNIT];
    for (size_t i = row.first + (size_t)row.lane * UNIT; i < row.last; i += STRETCH) {
        const int count = row.load(i, v);
#pragma unroll
        for (int e = 0; e < UNIT; e++)
            if (e < count && l.is_above(key_of(v[e]))) p.add(s, l, v[e], key_of(v[e]), 1);
    }
    if (row.rank == 0 && threadIdx.x == 0 && !l.is_row && l.ties) p.add(s, l, value_of(l.key), l.key, l.ties);
    sync_row(row.nblock);
}

/* The first bin where the sum from bin 0 reaches the target, which is left less what stands before that bin. `share`
 * below 1: the target is that share of the sum of all bins. */
__device__ uint32_t find(shared &s, unsigned nblock, double share, uint64_t &target) {
    uint64_t sum[4] = {};
#pragma unroll
    for (unsigned b = 0; b < CLUSTER; b++) {
        if (b >= nblock) break;
        const uint4 low = peer_16(&s.low[4 * threadIdx.x], b, nblock),
                    high = peer_16(&s.high[4 * threadIdx.x], b, nblock);
        sum[0] += low.x + ((uint64_t)high.x << 32);
        sum[1] += low.y + ((uint64_t)high.y << 32);
        sum[2] += low.z + ((uint64_t)high.z << 32);
        sum[3] += low.w + ((uint64_t)high.w << 32);
    }
    uint64_t mass;
    uint64_t before = scan_block(s, sum[0] + sum[1] + sum[2] + sum[3], mass);
    if (share < 1) {
        const double wanted = ceil(__dmul_rn(share, (double)mass));
        target = wanted < 1 ? 1 : wanted < (double)mass ? (uint64_t)wanted : mass;
    }
    if (threadIdx.x == 0) s.bin = BINS - 1, s.target = 1; /* not left so: the sum reaches the target */
    __syncthreads();
#pragma unroll
    for (int i = 0; i < 4; i++) {
        if (before < target && target <= before + sum[i]) s.bin = 4 * threadIdx.x + i, s.target = target - before;
        before += sum[i];
    }
    sync_row(nblock); /* also: nobody reads these bins any more */
    target = s.target;
    return s.bin;
}

/* Keeps the smallest prefix of the list in descending order, equal values by token, whose count reaches `target`, or,
 * with a share below 1, whose mass reaches that share of all. */
template <class T> __device__ void cut(shared &s, const row_view<T> &row, list &l, double share, uint64_t target) {
    pass p = {.by_mass = share < 1};
    if (isfinite(l.max)) { /* else there may be NaN, which is in no bin */
        p.is_even = true;
        add_up(s, row, l, p);
        p.even = find(s, row.nblock, share, target);
        p.is_even = false;
        p.has_even = true;
        share = 1;
    }
    for (int level = 0; level < 3; level++) {
        p.shift = level == 0 ? 21 : level == 1 ? 10 : 0;
        p.bits = level == 2 ? 10 : 11;
        add_up(s, row, l, p);
        const uint32_t bin = find(s, row.nblock, share, target), digit = ~bin & ((1u << p.bits) - 1);
        p.prefix = p.prefix << p.bits | digit;
        share = 1;
    }
    const uint64_t weight = p.by_mass ? weigh(l, value_of(p.prefix)) : 1, one = weight ? weight : 1;
    l.key = p.prefix;
    l.ties = (uint32_t)((target + one - 1) / one);
    l.is_row = false;
}

/* ---- laying out ---- */

/* What a member counts for: its weight, if that reaches `least`, or 1. */
struct measure {
    bool by_mass;
    uint64_t least;

    __device__ __forceinline__ uint64_t of(const list &l, float value) const {
        if (!by_mass) return 1;
        const uint64_t w = weigh(l, value);
        return w >= least ? w : 0;
    }
};

/* Where in the list, in order of tokens, every warp's stretch begins; the sum of all. */
template <class T> __device__ uint64_t lay_out(shared &s, const row_view<T> &row, const list &l, const measure &m) {
    float v[UNIT];
    uint64_t sum = 0, total;
    uint32_t ties = 0;
    for (size_t i = row.first + (size_t)row.lane * UNIT; i < row.last; i += STRETCH) {
        const int count = row.load(i, v);
#pragma unroll
        for (int e = 0; e < UNIT; e++) {
            const uint32_t key = key_of(v[e]);
            if (e < count && l.is_above(key)) sum += m.of(l, v[e]);
            ties += e < count && l.is_tie(key);
        }
    }
    sum = sum_warp(sum);
    ties = (uint32_t)sum_warp(ties);
    if (row.lane == 0) s.shares[row.warp] = share{sum, ties, 0};
    sync_row(row.nblock);
    const unsigned j = threadIdx.x, count = row.nblock * DRAW_WARPS;
    share mine = {};
    if (j < count) {
        const uint4 raw = peer_16(&s.shares[j % DRAW_WARPS], j / DRAW_WARPS, row.nblock);
        mine = share{(uint64_t)raw.y << 32 | raw.x, raw.z, 0};
    }
    const uint64_t before = scan_block(s, mine.ties, total);
    const uint32_t left = before < l.ties ? l.ties - (uint32_t)before : 0, kept = mine.ties < left ? mine.ties : left;
    if (kept) mine.sum += kept * m.of(l, value_of(l.key));
    const uint64_t begin = scan_block(s, mine.sum, total);
    if (j < count) s.begin[j] = begin, s.ties_left[j] = left;
    if (j == 0) s.begin[count] = total;
    sync_row(row.nblock);
    return total;
}

/* Calls f(token, value, place, amount) for the list's members in the warp's stretch: `place` is the sum of what stands
 * before in the row. */
template <class T, class F>
__device__ void each_member(shared &s, const row_view<T> &row, const list &l, const measure &m, F f) {
    const unsigned j = row.rank * DRAW_WARPS + row.warp;
    uint64_t begin = s.begin[j];
    uint32_t left = s.ties_left[j];
    float v[UNIT];
    for (size_t base = row.first; base < row.last; base += STRETCH) { /* the whole warp together */
        const size_t i = base + (size_t)row.lane * UNIT;
        const int count = i < row.last ? row.load(i, v) : 0;
        uint32_t is_tie = 0, is_above = 0; /* bits */
#pragma unroll
        for (int e = 0; e < UNIT; e++) {
            const uint32_t key = key_of(v[e]);
            is_tie |= (uint32_t)(e < count && l.is_tie(key)) << e;
            is_above |= (uint32_t)(e < count && l.is_above(key)) << e;
        }
        const uint32_t ties = __popc(is_tie);
        uint32_t ties_to = ties;
        for (int o = 1; o < 32; o *= 2) {
            const uint32_t other = __shfl_up_sync(~0u, ties_to, o);
            if (row.lane >= o) ties_to += other;
        }
        const uint32_t before = ties_to - ties;
        uint32_t rest = before < left ? left - before : 0, is_member = is_above;
        uint64_t sum = 0, amount[UNIT];
#pragma unroll
        for (int e = 0; e < UNIT; e++) {
            const bool is_kept_tie = is_tie >> e & 1 && rest;
            rest -= is_kept_tie;
            is_member |= (uint32_t)is_kept_tie << e;
            amount[e] = is_member >> e & 1 ? m.of(l, v[e]) : 0;
            sum += amount[e];
        }
        uint64_t to = sum;
        for (int o = 1; o < 32; o *= 2) {
            const uint64_t other = __shfl_up_sync(~0u, to, o);
            if (row.lane >= o) to += other;
        }
        uint64_t place = begin + to - sum;
#pragma unroll
        for (int e = 0; e < UNIT; e++) {
            if (is_member >> e & 1) f((int32_t)i + e, v[e], place, amount[e]);
            place += amount[e];
        }
        begin += __shfl_sync(~0u, to, 31);
        const uint32_t all = __shfl_sync(~0u, ties_to, 31);
        left -= all < left ? all : left;
    }
}

/* ---- bias and penalties ---- */

/* Calls f(token) for known tokens from position p0 on; the threads share the positions. */
template <class F> __device__ void each_known(const draw_inputs &in, size_t row, size_t p0, F f) {
    const int32_t *table = in.table + (size_t)in.row_seq[in.logit_rows[row]] * in.max_blocks;
    const size_t position = (size_t)in.sampling[row].position;
    for (size_t p = p0 + threadIdx.x; p <= position; p += DRAW_THREADS)
        f(in.kv_tokens[(size_t)table[p / in.kv_block] * in.kv_block + p % in.kv_block]);
}

/* Writes the block's part of the row to value [n], with bias and penalties; count [n] is scratch, set only where a
 * known or biased token needs it. Every block looks at all of these tokens and heeds those of its own part. */
template <class T>
__device__ void adjust(const draw_inputs &in, const row_view<T> &row, size_t r, float *value, int32_t *count) {
    const lla_sampling_row &how = in.sampling[r];
    float v[UNIT];
    for (size_t i = row.first + (size_t)row.lane * UNIT; i < row.last; i += STRETCH) {
        const int n = row.load(i, v);
#pragma unroll
        for (int e = 0; e < UNIT; e++)
            if (e < n) value[i + e] = v[e];
    }
    const size_t stretch = ((row.n + row.nblock * DRAW_WARPS - 1) / (row.nblock * DRAW_WARPS) + STRETCH - 1) / STRETCH *
                           STRETCH,
                 from = row.rank * DRAW_WARPS * stretch, to = from + DRAW_WARPS * stretch;
    const auto is_ours = [&](int32_t t) { return t >= 0 && (size_t)t < row.n && (size_t)t >= from && (size_t)t < to; };
    __syncthreads();

    /* several biases of one token add up in their order: in each round every token gets its first that is left */
    const lla_bias *bias = in.bias + how.first_bias;
    constexpr int EACH = LLA_MAX_BIAS / DRAW_THREADS;
    bool is_left[EACH];
    for (int k = 0; k < EACH; k++) {
        const int32_t b = (int32_t)threadIdx.x + k * DRAW_THREADS;
        is_left[k] = b < how.nbias && is_ours(bias[b].token);
    }
    for (bool any = how.nbias > 0; any;) {
        for (int k = 0; k < EACH; k++)
            if (is_left[k]) count[bias[threadIdx.x + k * DRAW_THREADS].token] = 0x7fffffff;
        __syncthreads();
        for (int k = 0; k < EACH; k++) {
            const int32_t b = (int32_t)threadIdx.x + k * DRAW_THREADS;
            if (is_left[k]) atomicMin(&count[bias[b].token], b);
        }
        __syncthreads();
        bool mine = false;
        for (int k = 0; k < EACH; k++) {
            const int32_t b = (int32_t)threadIdx.x + k * DRAW_THREADS;
            if (is_left[k] && __ldcg(&count[bias[b].token]) == b) {
                value[bias[b].token] = __fadd_rn(value[bias[b].token], bias[b].bias);
                is_left[k] = false;
            }
            mine |= is_left[k];
        }
        any = __syncthreads_or(mine);
    }

    if (!lla_has_penalty(&how)) return;
    each_known(in, r, 0, [&](int32_t t) {
        if (is_ours(t)) count[t] = 0;
    });
    __syncthreads();
    each_known(in, r, (size_t)how.nprompt, [&](int32_t t) {
        if (is_ours(t)) atomicAdd(&count[t], 1);
    });
    __syncthreads();
    each_known(in, r, 0, [&](int32_t t) {
        if (!is_ours(t)) return;
        const int32_t c = atomicExch(&count[t], -1);
        if (c < 0) return; /* had its turn */
        float x = value[t];
        if (how.repetition > 0) x = x > 0 ? __fdiv_rn(x, how.repetition) : __fmul_rn(x, how.repetition);
        if (c) x = __fsub_rn(__fsub_rn(x, __fmul_rn((float)c, how.frequency)), how.presence);
        value[t] = x;
    });
    __syncthreads();
}

/* ---- a row ---- */

/* Writes the row's token. */
template <class T>
__device__ void choose(shared &s, const row_view<T> &row, const lla_sampling_row &how, float max, int32_t best,
                       int32_t *next) {
    if (lla_is_greedy(&how) || !isfinite(max)) {
        if (row.rank == 0 && threadIdx.x == 0) *next = best;
        return;
    }
    list l = {.max = max, .scale = __fdiv_rn(1.44269504f, how.temperature), .is_row = true};
    if (!(l.scale <= 3e38f)) l.scale = 3e38f;
    if (how.top_k > 0 && (size_t)how.top_k < row.n) cut(s, row, l, 1, (uint64_t)how.top_k);
    if (how.top_p < 1) cut(s, row, l, (double)how.top_p, 0);
    const measure m = {true, (uint64_t)ceil(__dmul_rn((double)how.min_p, (double)((uint64_t)1 << LLA_WEIGHT_BITS)))};
    const uint64_t mass = lay_out(s, row, l, m), random = philox(how.seed, (uint64_t)(uint32_t)how.position);
    const uint64_t place = (mass >> 32) * random + ((mass & 0xffffffffu) * random >> 32);
    const unsigned j = row.rank * DRAW_WARPS + row.warp;
    if (place < s.begin[j] || place >= s.begin[j + 1]) return;
    each_member(s, row, l, m, [&](int32_t token, float, uint64_t at, uint64_t amount) {
        if (place >= at && place < at + amount) *next = token;
    });
}

/* Of the logits as they came, but for the mask: the chosen one, the largest in order, and the mass of all. */
template <class T>
__device__ void report(shared &s, const row_view<T> &row, size_t nlogprob, const int32_t *next, lla_odds *odds) {
    int32_t token;
    list l = {.max = argmax(s, row, token), .scale = 1.44269504f, .is_row = true};
    const size_t top = nlogprob - 1 < row.n ? nlogprob - 1 : row.n;
    uint64_t mass = 0;
    if (isfinite(l.max)) mass = lay_out(s, row, l, measure{true, 0});
    if (top) {
        if (top < row.n) cut(s, row, l, 1, top);
        const measure m = {false, 0};
        lay_out(s, row, l, m);
        each_member(s, row, l, m, [&](int32_t t, float v, uint64_t at, uint64_t) {
            if (at < top) odds->top[1 + at] = lla_candidate{v, t};
        });
    }
    __threadfence();
    sync_row(row.nblock);
    if (row.rank || row.warp) return;
    if (row.lane == 0) {
        const int32_t t = __ldcg(next);
        const bool is_allowed = !row.mask || (row.mask[t / 32] >> t % 32 & 1);
        odds->mass = mass;
        odds->max = l.max;
        odds->top[0] = lla_candidate{is_allowed ? to_float<T>(row.logits[t]) : -INFINITY, t};
    }
    lla_candidate mine = {-INFINITY, -1};
    if ((size_t)row.lane < top) {
        mine.value = __ldcg(&odds->top[1 + row.lane].value);
        mine.token = __ldcg(&odds->top[1 + row.lane].token);
    }
    const uint32_t key = key_of(mine.value);
    int place = 0;
    for (int i = 0; i < (int)top; i++) {
        const uint32_t other = __shfl_sync(~0u, key, i);
        place += other > key || (other == key && i < row.lane);
    }
    if ((size_t)row.lane >= top) place = row.lane;
    __syncwarp();
    if ((size_t)row.lane + 1 < nlogprob) odds->top[1 + place] = mine;
}

template <class T>
__global__ void __launch_bounds__(DRAW_THREADS, 2)
    draw_kernel(draw_inputs in, const T *logits, size_t n, lla_candidate *candidates, size_t row_stride, int32_t *next,
                lla_odds *odds) {
    __shared__ __align__(16) shared s;
    pdl_launch_next();
    pdl_wait();
    const size_t r = blockIdx.y;
    if (r >= (size_t)in.header->nlogit) return;
    const lla_sampling_row &how = in.sampling[r];
    if (lla_is_plain(&how)) return;

    row_view<T> raw = {.logits = logits + r * n,
                       .mask = how.mask ? in.mask + (size_t)(how.mask - 1) * ((n + 31) / 32) : nullptr,
                       .n = n,
                       .rank = blockIdx.x,
                       .nblock = gridDim.x,
                       .warp = (int)threadIdx.x / 32,
                       .lane = (int)threadIdx.x % 32};
    const size_t nwarp = raw.nblock * DRAW_WARPS, warp = raw.rank * DRAW_WARPS + raw.warp,
                 stretch = ((n + nwarp - 1) / nwarp + STRETCH - 1) / STRETCH * STRETCH;
    raw.first = warp * stretch < n ? warp * stretch : n;
    raw.last = raw.first + stretch < n ? raw.first + stretch : n;

    row_view<T> row = raw;
    if (how.nbias || lla_has_penalty(&how)) {
        float *value = reinterpret_cast<float *>(candidates + r * row_stride);
        adjust(in, raw, r, value, reinterpret_cast<int32_t *>(value + n));
        row.adjusted = value;
    }
    int32_t best;
    const float max = argmax(s, row, best);
    choose(s, row, how, max, best, &next[r]);
    if (how.nlogprob) report(s, raw, (size_t)how.nlogprob, &next[r], &odds[r]);
    sync_row(raw.nblock); /* nobody leaves while its memory may be read */
}

} // namespace

lla_status lla_cuda_draw(const lla_cuda_ctx *ctx, const lla_sample_args *args) {
    char *arena = ctx->arena;
    const lla_io *io = &ctx->io;
    const draw_inputs in = {.header = (const lla_step_header *)(arena + io->header),
                            .sampling = (const lla_sampling_row *)(arena + io->sampling),
                            .bias = (const lla_bias *)(arena + io->bias),
                            .mask = (const uint32_t *)(arena + io->mask),
                            .logit_rows = (const int32_t *)(arena + io->logit_rows),
                            .row_seq = (const int32_t *)(arena + io->row_seq),
                            .table = (const int32_t *)(arena + io->block_table),
                            .kv_tokens = (const int32_t *)(arena + io->kv_tokens),
                            .max_blocks = ctx->dims.max_blocks,
                            .kv_block = ctx->dims.kv_block};
    /* two blocks an SM: fewer blocks a row where there are many rows, so that all are drawn at once */
    unsigned cluster = has_wgmma(ctx) ? CLUSTER : 1;
    while (cluster > 1 && cluster * ctx->logits > 2 * (size_t)ctx->sm_count) cluster /= 2;
    const size_t vocab = ctx->dims.vocab;
    LLA_CUDA_BY_DTYPE(ctx->dims.dtype,
                      if (cluster > 1 && !cluster_fits(draw_kernel<T>, dim3(cluster, (unsigned)ctx->logits),
                                                       DRAW_THREADS, 0, cluster)) cluster = 1;
                      return launch_clusters(ctx, "draw", draw_kernel<T>, dim3(cluster, (unsigned)ctx->logits),
                                             DRAW_THREADS, 0, cluster, in, (const T *)(arena + args->logits), vocab,
                                             (lla_candidate *)(arena + args->candidates), vocab > 32 ? vocab : 32,
                                             (int32_t *)(arena + io->next), (lla_odds *)(arena + io->odds)));
}
