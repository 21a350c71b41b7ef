/* step_attention_rows.cuh: attention row by row: a block takes a row and KV head at a time, or, where the step has few
 * rows or a long one, a run of the row's splits.
 *
 * Each warp works on splits of its own: it asks for a split's keys and values in the background, waits for them,
 * computes the split alone (attend_warp), and asks for its next one, of this row or of the block's next row. The warps'
 * results meet in shared memory, where all threads merge them in order. So what a warp waits for is its own memory, and
 * a block has up to W splits on their way.
 *
 * Only a merge from the first split on has the bits of an uncut row, so warps write the results of a cut row's splits
 * to `partial` as they are. When a block has computed all its jobs, it waits until all of the row's runs are there, and
 * merges its slice of the row's dimensions, of all splits. It waits for blocks that may still have to begin: they all
 * fit on the GPU at once, since launches ask for no more, and blocks of the next kernel begin only when all of this one
 * have. Should they not fit after all, because somebody else has part of the GPU, a block gives up after a while, and
 * those that come later merge all of the row. */
#ifndef LLA_STEP_ATTENTION_ROWS_CUH
#define LLA_STEP_ATTENTION_ROWS_CUH

#include "step_attention.cuh"

namespace {

/* What a warp's split leaves. Rows of o begin eight banks apart for every two heads, as the fragments want. */
template <int DIM> struct SplitResult {
    float o[HEADS][DIM + 4], m[HEADS], l[HEADS];
};

template <class T, int DIM, int W> struct RowsMemory {
    uint4 keys[W][SPLIT * DIM / 8], values[W][SPLIT * DIM / 8];
    SplitResult<DIM> result[W];
    unsigned share; /* of a row's merge: a Share */
};

/* Steps of more rows find none of their keys and values in the second-level cache, if the rows are not short. */
enum { KEPT_ROWS = 16 };

/* The barrier of the first W warps. */
template <int W> __device__ __forceinline__ void rows_barrier() {
    barrier_sync(1, 32 * W);
}

/* Some splits of a row for up to eight query heads of one KV head. */
struct Job {
    unsigned row, kvhead, head0, heads;
    unsigned first, last;  /* splits */
    unsigned run, runs;    /* of those that the row is cut into */
    unsigned length, slot; /* tokens; the row's first slot in `partial` */
    const int32_t *table;
};

/* A step's jobs, numbered by row, run, KV head and heads. Rows come 32 at a time, one to a lane. */
struct Jobs {
    const Attention &a;
    const uint32_t *words = nullptr; /* else only rows with a bit in the first words and not in the second */
    const unsigned lane;
    unsigned rows;
    unsigned run = 1;                      /* splits of a run, about */
    unsigned total = 0, longest = 0;       /* splits of the jobs' rows, and of the longest one */
    bool are_alone;                        /* the header says so, and their splits */
    bool has_all = true, is_plain = false; /* all rows are among the jobs'; and none is cut */
    unsigned near_row;                     /* the block's own where none is cut: asked for with the header */
    int32_t near_position, near_seq;
    unsigned base = 0, before = 0, before_slots = 0; /* rows [base, base + 32), jobs and slots before them */

    __device__ __forceinline__ explicit Jobs(const Attention &a)
        : a(a), lane(threadIdx.x % 32), near_row(min(blockIdx.x / a.per_run, a.max_rows - 1)),
          near_position(a.positions[near_row]), near_seq(a.row_seq[near_row]) {
        const lla_step_header header = *a.header;
        rows = (unsigned)header.nrow;
        are_alone = header.nsplit != 0;
        total = (unsigned)header.nsplit;
        longest = (unsigned)header.longest;
    }

    /* Splits of a row, 0 where it is not among the jobs'. */
    __device__ __forceinline__ unsigned splits(unsigned row) const {
        if (row >= rows) return 0;
        if (words && !((words[row / 32] & ~words[(rows + 31) / 32 + row / 32]) >> row % 32 & 1)) return 0;
        return (unsigned)a.positions[row] / SPLIT + 1;
    }
    __device__ __forceinline__ unsigned runs(unsigned splits) const {
        const unsigned n = (splits + run / 2) / run;
        return n ? n : splits ? 1 : 0;
    }
    __device__ __forceinline__ void count_splits() {
#pragma unroll 4
        for (unsigned row = lane; row < rows; row += 32) {
            const unsigned n = splits(row);
            total += n;
            longest = max(longest, n);
        }
        total = __reduce_add_sync(~0u, total);
        longest = __reduce_max_sync(~0u, longest);
    }
    /* Every lane gets the sum over it and the lanes before. */
    __device__ __forceinline__ unsigned scan(unsigned v) const {
#pragma unroll
        for (unsigned o = 1; o < 32; o *= 2) {
            const unsigned other = __shfl_up_sync(~0u, v, o);
            if (lane >= o) v += other;
        }
        return v;
    }
    /* Cuts long rows so that no block has more than about its share of the splits. */
    __device__ __forceinline__ void cut(unsigned least) {
        const unsigned share = (total * a.per_run + gridDim.x - 1) / gridDim.x;
        run = total > a.max_splits ? 0x40000000u : share > least ? share : least;
        is_plain = has_all && runs(longest) <= 1;
    }
    __device__ __forceinline__ void take_heads(Job &job, unsigned chunk) const {
        job.head0 = job.kvhead * a.group + chunk * HEADS;
        job.heads = min(a.group - chunk * HEADS, (unsigned)HEADS);
    }
    /* Goes back to the first job. */
    __device__ __forceinline__ void rewind() { base = before = before_slots = 0; }
    __device__ __forceinline__ void take_row(Job &job, unsigned row, unsigned at) const {
        job.row = row;
        job.kvhead = at / a.chunks;
        take_heads(job, at % a.chunks);
        const bool is_near = row == near_row;
        job.length = (unsigned)(is_near ? near_position : a.positions[row]) + 1;
        job.table = a.table + (size_t)(is_near ? near_seq : a.row_seq[row]) * a.max_blocks;
    }
    /* Job `item`, which grows from call to call; heads 0: there is none. */
    __device__ __forceinline__ Job find(unsigned item) {
        Job job = {};
        if (is_plain) {
            if (item >= rows * a.per_run) return job;
            take_row(job, item / a.per_run, item % a.per_run);
            job.runs = 1;
            job.last = (job.length - 1) / SPLIT + 1;
            return job;
        }
        for (; base < rows; base += 32) {
            const unsigned n = splits(base + lane), cuts = runs(n), slots = cuts > 1 ? n : 0;
            const unsigned upto = before + scan(cuts * a.per_run), slots_upto = before_slots + scan(slots);
            const unsigned who = __ballot_sync(~0u, item < upto);
            if (who) {
                const int from = __ffs(who) - 1;
                const unsigned all = __shfl_sync(~0u, n, from);
                const unsigned at = item - __shfl_sync(~0u, upto - cuts * a.per_run, from);
                job.runs = __shfl_sync(~0u, cuts, from);
                job.run = at / a.per_run;
                job.slot = __shfl_sync(~0u, slots_upto - slots, from);
                job.first = all * job.run / job.runs;
                job.last = all * (job.run + 1) / job.runs;
                take_row(job, base + from, at % a.per_run);
                break;
            }
            before = __shfl_sync(~0u, upto, 31);
            before_slots = __shfl_sync(~0u, slots_upto, 31);
        }
        return job;
    }
};

/* ---- rows that are cut ---- */

/* `partial` holds outputs [max_splits, nhead, dim], and behind them maxima and sums [nhead, max_splits]. */
__device__ __forceinline__ float *partial_output(const Attention &a, unsigned slot, unsigned head) {
    return a.partial + ((size_t)slot * a.nhead + head) * a.dim;
}
__device__ __forceinline__ float2 *partial_sums(const Attention &a, unsigned slot, unsigned head) {
    return reinterpret_cast<float2 *>(a.partial + a.max_splits * a.nhead * a.dim) + head * a.max_splits + slot;
}

/* What `arrived` counts for a row and KV head: warps that have written all that they have of it; jobs whose blocks need
 * not wait any more; and whether one of them gave up. The last job to leave sets it to zero. */
enum : unsigned { ARRIVED = 1, LEFT = 1u << 16, GAVE_UP = 1u << 31 };
enum { PATIENCE = 4096 /* polls, of about half a microsecond */ };
enum Share : unsigned { SHARE_NOTHING, SHARE_SLICE, SHARE_ALL };

__device__ __forceinline__ unsigned *counter_of(const Attention &a, const Job &job) {
    return reinterpret_cast<unsigned *>(&a.arrived[(size_t)job.row * a.nkvhead + job.kvhead]);
}

/* Waits until so many warps have arrived, and says what the block then has to merge. Who gives up has said so before
 * the last one arrived, so that all that still wait know it. `polls` goes on from row to row: a block gives up but
 * once. */
__device__ __forceinline__ Share wait_for_row(unsigned *counter, unsigned warps, unsigned &polls) {
    for (;; polls++) {
        const unsigned seen =
            polls < PATIENCE ? *const_cast<volatile unsigned *>(counter) : atomicOr(counter, (unsigned)GAVE_UP);
        if (seen % LEFT == warps) return seen & GAVE_UP ? SHARE_ALL : SHARE_SLICE;
        if (polls >= PATIENCE) return SHARE_NOTHING;
    }
}

/* Merges all splits of the job's row and writes the output, for a run's share of the dimensions of the job's heads,
 * four by four. All threads of the first W warps call it. A thread has one dimension, the last warp's lanes the sum of
 * a head each. */
template <class T, int DIM, int W>
__device__ __forceinline__ void merge_slice(const Attention &a, RowsMemory<T, DIM, W> &s, const Job &job,
                                            unsigned run) {
    constexpr unsigned QUADS = DIM / 4, MOST = 8 * (W - 1) /* quads at once */, BATCH = 504, ROUNDS = 16, AHEAD = 8;
    constexpr unsigned MOST_HEADS = (MOST - 2) / QUADS + 2;
    static_assert(MOST_HEADS <= W && sizeof s.values >= MOST_HEADS * 32 * ROUNDS * sizeof(float4), "a warp a head");
    static_assert(BATCH + AHEAD <= 32 * ROUNDS, "a warp's loads are all under way at once");
    auto *const weights = reinterpret_cast<float4(*)[32 * ROUNDS]>(s.values); /* [heads]: old, add; sum, maximum */
    auto *const outputs = reinterpret_cast<float *>(s.keys);                  /* [splits, 4 quads] */
    const unsigned warp = threadIdx.x / 32, lane = threadIdx.x % 32, splits = (job.length - 1) / SPLIT + 1;
    unsigned first = job.heads * QUADS * run / job.runs;
    const unsigned last = job.heads * QUADS * (run + 1) / job.runs;
    for (; first < last; first += MOST) {
        const unsigned quads = min(last - first, MOST), head0 = first / QUADS, width = 4 * quads;
        const unsigned heads = (first + quads - 1) / QUADS + 1 - head0;
        const unsigned batch = min(BATCH, (unsigned)(sizeof s.keys / (width * sizeof(float))) - AHEAD);
        const bool has_sum = warp == W - 1, has_any = has_sum ? lane < heads : threadIdx.x < width;
        const unsigned head = !has_any ? 0 : has_sum ? lane : (first + threadIdx.x / 4) / QUADS - head0;
        const float *const values = has_sum ? &weights[head][0].z : outputs + threadIdx.x;
        const unsigned stride = has_sum ? 4 : width;
        const unsigned copies = 32 * W / quads, quad = first + threadIdx.x % quads; /* splits copied at once */
        float sum = -0.0f, top = -INFINITY; /* -0 leaves the first split's value as it is */
        for (unsigned base = 0; base < splits; base += batch) {
            const unsigned n = min(splits - base, batch);
            rows_barrier<W>(); /* nobody reads the memory any more */
            if (threadIdx.x < copies * quads) {
                const float *from = partial_output(a, job.slot + base, job.head0 + quad / QUADS) + quad % QUADS * 4;
                for (unsigned i = threadIdx.x / quads; i < n; i += copies)
                    cp_async_16(shared_address(outputs) + (i * quads + threadIdx.x % quads) * 16,
                                from + i * (a.nhead * DIM), true);
            }
            cp_async_commit();
            if (warp < heads) {
                const float2 *from = partial_sums(a, job.slot + base, job.head0 + head0 + warp);
                float2 ml[ROUNDS];
#pragma unroll
                for (unsigned j = 0; j < ROUNDS; j++)
                    ml[j] = 32 * j + lane < n ? __ldcg(from + 32 * j + lane) : make_float2(-INFINITY, 0);
#pragma unroll
                for (unsigned j = 0; j < ROUNDS; j++)
                    if (32 * j < n) weights[warp][32 * j + lane] = make_float4(0, 0, ml[j].y, ml[j].x);
#pragma unroll 2
                for (unsigned i = lane; i - lane < n; i += 32) {
                    const float m = weights[warp][i].w;
                    float upto = m;
#pragma unroll
                    for (unsigned o = 1; o < 32; o *= 2) upto = fmaxf(upto, __shfl_up_sync(~0u, upto, o));
                    const float other = __shfl_up_sync(~0u, upto, 1), before = lane ? fmaxf(top, other) : top;
                    const float all = __shfl_sync(~0u, upto, 31);
                    upto = fmaxf(top, upto);
                    top = fmaxf(top, all);
                    *reinterpret_cast<float2 *>(&weights[warp][i]) =
                        make_float2(exp2_fast(before - upto), exp2_fast(m - upto));
                }
            }
            cp_async_wait<0>();
            rows_barrier<W>();
            /* Operands are fetched some splits ahead, so that a split takes as long as its multiplication and addition;
             * those behind the last are not used. */
            float value[AHEAD];
            float2 weight[AHEAD];
            const auto fetch = [&](unsigned j, unsigned i) {
                value[j] = values[i * stride];
                weight[j] = *reinterpret_cast<const float2 *>(&weights[head][i]);
            };
            if (has_any) {
#pragma unroll
                for (unsigned j = 0; j < AHEAD; j++) fetch(j, j);
                unsigned i = 0;
                for (; i + AHEAD <= n; i += AHEAD)
#pragma unroll
                    for (unsigned j = 0; j < AHEAD; j++) {
                        sum = merged(sum, weight[j].x, value[j], weight[j].y);
                        fetch(j, i + AHEAD + j);
                    }
#pragma unroll
                for (unsigned j = 0; j < AHEAD; j++)
                    if (i + j < n) sum = merged(sum, weight[j].x, value[j], weight[j].y);
            }
        }
        if (has_sum && has_any) s.result[0].l[lane] = sum;
        rows_barrier<W>();
        if (!has_sum && has_any) {
            T *out = (T *)a.out + ((size_t)job.row * a.nhead + job.head0) * DIM + 4 * first + threadIdx.x;
            const float l = s.result[0].l[head];
            *out = from_float<T>(quotient(sum, l, inverse_of(l)));
        }
    }
}

/* ---- all of a block's jobs ---- */

/* The first W warps of every block call it; the jobs, whose splits are counted, are shared among the grid's blocks. It
 * waits for the kernels before, unless there is no job for this block. */
template <class T, int DIM, int W>
__device__ __forceinline__ void attend_rows(const Attention &a, char *smem, Jobs &jobs, float scale) {
    constexpr unsigned UNITS = DIM / 8, TOKENS = 32 / UNITS; /* of a pass: tokens that a warp copies at once */
    constexpr unsigned PAIRS = DIM / 2, PER = (HEADS * PAIRS + 32 * W - 1) / (32 * W);
    static_assert(SPLIT == 64 && PAIRS % 32 == 0, "two places a lane; a warp merges pairs of one head");
    static_assert(PER * W <= 32, "a lane has the weights of one head and split");
    auto &s = *reinterpret_cast<RowsMemory<T, DIM, W> *>(smem);
    const unsigned warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const uint32_t keys = shared_address(s.keys[warp]), values = shared_address(s.values[warp]);

    /* Where the lane's two tokens of a split lie: row numbers of the cache. */
    const auto find_places = [&](const int32_t *table, unsigned kvhead, unsigned length, unsigned split) {
        uint2 places = make_uint2(0, 0);
        const unsigned low = split * SPLIT + lane, high = low + 32;
        const auto place = [&](unsigned position) {
            return (((unsigned)table[position >> a.block_bits] * (unsigned)a.nkvhead + kvhead) << a.block_bits) +
                   (position & ((1u << a.block_bits) - 1));
        };
        if (low < length) places.x = place(low);
        if (high < length) places.y = place(high);
        return places;
    };
    /* What the next step may still find in the second-level cache stays there in its turn. */
    const uint64_t policy = jobs.rows > KEPT_ROWS ? evict_first() : evict_normal();
    /* Asks for a token of a split, in units of 16 bytes, or for zeros. */
    const auto request_token = [&](uint32_t row, unsigned token, bool is_valid) {
        const unsigned unit = lane % UNITS;
        const size_t at = (size_t)row * DIM + unit * 8;
        const uint32_t to_unit = (token * UNITS + (unit ^ (token & 7))) * 16;
        cp_async_16(keys + to_unit, (const T *)a.k_cache + at, is_valid, policy);
        cp_async_16(values + to_unit, (const T *)a.v_cache + at, is_valid, policy);
    };
    /* Asks for the first `there` tokens of a split that has so many valid ones, and for zeros behind these. */
    const auto request = [&](uint2 places, unsigned there, unsigned valid) {
#pragma unroll
        for (unsigned half = 0; half < 2; half++)
#pragma unroll 8
            for (unsigned i = 0; i < 32; i += TOKENS) {
                const unsigned in_half = i + lane / UNITS, token = half * 32 + in_half;
                const uint32_t row = __shfl_sync(~0u, half ? places.y : places.x, in_half);
                if (token < there || token >= valid) request_token(row, token, token < valid);
            }
    };
    /* The row's query heads, as attend_warp() wants them. */
    uint2 q[DIM / 16];
    const auto load_q = [&](const Job &of) {
        const uint32_t *from = reinterpret_cast<const uint32_t *>(
            (const T *)a.q + ((size_t)of.row * a.nhead + of.head0 + min(lane / 4, of.heads - 1)) * DIM);
#pragma unroll
        for (int k = 0; k < DIM / 16; k++) q[k] = make_uint2(from[8 * k + lane % 4], from[8 * k + 4 + lane % 4]);
    };

    /* Step inputs were there before the step's first kernel began, and so were keys and values of earlier steps. What
     * follows the wait is on the step's critical path: q and the tokens of this step, often one, in one go. The next
     * job is looked for when all of that has been asked for. */
    jobs.cut(W);
    unsigned item = blockIdx.x;
    Job job = jobs.find(item);
    if (!job.heads) return;
    uint2 first_places = make_uint2(0, 0);
    unsigned staged = 0, valid = 0; /* tokens of the warp's first split */
    if (job.first + warp < job.last) {
        const unsigned split = job.first + warp, start = split * SPLIT;
        const unsigned old =
            jobs.words || jobs.are_alone ? job.length - 1 : (unsigned)first_new(a.positions, a.row_seq, job.row);
        valid = min(job.length - start, (unsigned)SPLIT);
        staged = old <= start ? 0 : min(old - start, valid);
        first_places = find_places(job.table, job.kvhead, job.length, split);
        request(first_places, staged, valid);
    }
    bool is_free = false;     /* the kernels before have finished */
    bool has_results = false; /* the warps' have been read */
    bool is_cut = false;      /* a row of the block's jobs */
    for (Job next; job.heads; job = next) {
        if (!is_free) {
            pdl_wait();
            note(a.trace, LLA_BLOCK_FREE);
            load_q(job);
#pragma unroll 1
            for (unsigned i = staged; i < valid; i += TOKENS) {
                const unsigned token = i + lane / UNITS;
                const uint32_t low = __shfl_sync(~0u, first_places.x, token),
                               high = __shfl_sync(~0u, first_places.y, token);
                if (token < valid) request_token(token < 32 ? low : high, token, true);
            }
            is_free = true;
        }
        next = jobs.find(item += gridDim.x);

        /* Sums begin at -0, which leaves the first split's as it is. `top`: the maximum of the lane's head. */
        float2 o[PER];
        float l[PER], top = -INFINITY;
#pragma unroll
        for (unsigned j = 0; j < PER; j++) o[j] = make_float2(-0.0f, -0.0f), l[j] = -0.0f;
        bool is_asked = false; /* this warp's place is the next job's already */
        for (unsigned base = job.first; base < job.last; base += W) {
            const unsigned split = base + warp;
            const bool stays = split + W < job.last;
            const unsigned then = stays ? split + W : next.first + warp;
            const bool asks = !is_asked && (stays || (next.heads && then < next.last));
            const unsigned length = stays ? job.length : next.length;
            uint2 places = make_uint2(0, 0);
            if (asks)
                places = find_places(stays ? job.table : next.table, stays ? job.kvhead : next.kvhead, length, then);
            WarpPartial<DIM> part;
            if (split < job.last) {
                cp_async_commit();
                cp_async_wait<0>();
                __syncwarp();
                note(a.trace, LLA_BLOCK_STAGED);
                part = attend_warp<T, DIM>(keys, values, q, lane, (int)min(job.length - split * SPLIT, (unsigned)SPLIT),
                                           scale);
                __syncwarp();
            }
            if (asks) {
                const unsigned tokens = min(length - then * SPLIT, (unsigned)SPLIT);
                request(places, tokens, tokens);
            }
            is_asked = is_asked || (asks && !stays);

            const unsigned g = lane / 4, t2 = lane % 4 * 2;
            if (job.runs > 1) {
                if (split >= job.last) continue;
#pragma unroll
                for (unsigned h = 0; h < 2; h++) {
                    if (t2 + h >= job.heads) continue;
                    float *to = partial_output(a, job.slot + split, job.head0 + t2 + h) + g;
#pragma unroll
                    for (unsigned d = 0; d < DIM / 16; d++) {
                        to[16 * d] = part.o[d][h];
                        to[16 * d + 8] = part.o[d][h + 2];
                    }
                    if (g == 0)
                        *partial_sums(a, job.slot + split, job.head0 + t2 + h) = make_float2(part.m[h], part.l[h]);
                }
                continue;
            }
            if (has_results) rows_barrier<W>(); /* nobody reads those before */
            has_results = true;
            if (split < job.last) {
                SplitResult<DIM> &to = s.result[warp];
#pragma unroll
                for (unsigned h = 0; h < 2; h++) {
#pragma unroll
                    for (unsigned d = 0; d < DIM / 16; d++) {
                        to.o[t2 + h][16 * d + g] = part.o[d][h];
                        to.o[t2 + h][16 * d + g + 8] = part.o[d][h + 2];
                    }
                    if (g == 0) {
                        to.m[t2 + h] = part.m[h];
                        to.l[t2 + h] = part.l[h];
                    }
                }
            }
            rows_barrier<W>();
            const unsigned count = min(job.last - base, (unsigned)W);
            /* Weights depend on the maxima alone: a lane computes one split's for one of the warp's heads. */
            const unsigned mine = lane / W, at = lane % W, its_head = (warp * 32 + mine * (32 * W)) / PAIRS;
            const float next_m =
                mine < PER && its_head < job.heads && at < count ? s.result[at].m[its_head] : -INFINITY;
            float upto = next_m;
#pragma unroll
            for (unsigned i = 1; i < W; i *= 2) {
                const float other = __shfl_up_sync(~0u, upto, i);
                if (at >= i) upto = fmaxf(upto, other);
            }
            const float other = __shfl_up_sync(~0u, upto, 1), before = at ? fmaxf(top, other) : top;
            upto = fmaxf(top, upto);
            const float old = exp2_fast(before - upto), add = exp2_fast(next_m - upto);
            top = __shfl_sync(~0u, upto, mine * W + W - 1);
            /* No branches: all of it stands on the critical path, and its loads are to be under way at once. What is
             * not there is zero, its weight too, and the other one's is 1. */
#pragma unroll
            for (unsigned i = 0; i < W; i++) {
                const SplitResult<DIM> &r = s.result[i];
#pragma unroll
                for (unsigned j = 0; j < PER; j++) {
                    const unsigned pair = threadIdx.x + j * (32 * W), head = min(pair / PAIRS, HEADS - 1u);
                    const float2 po =
                        i < count ? *reinterpret_cast<const float2 *>(&r.o[head][pair % PAIRS * 2]) : make_float2(0, 0);
                    const float pl = i < count ? r.l[head] : 0;
                    const float keep = __shfl_sync(~0u, old, j * W + i), take = __shfl_sync(~0u, add, j * W + i);
                    o[j] = make_float2(merged(o[j].x, keep, po.x, take), merged(o[j].y, keep, po.y, take));
                    l[j] = merged(l[j], keep, pl, take);
                }
            }
        }
        if (job.runs > 1) {
            is_cut = true;
            __threadfence();
            __syncwarp();
            if (lane == 0) atomicAdd(counter_of(a, job), (unsigned)ARRIVED);
        }
        if (next.heads) load_q(next);
        if (job.runs > 1) continue;

#pragma unroll
        for (unsigned j = 0; j < PER; j++) {
            const unsigned pair = threadIdx.x + j * (32 * W), head = pair / PAIRS, d = pair % PAIRS * 2;
            if (head >= job.heads) continue;
            T *out = (T *)a.out + ((size_t)job.row * a.nhead + job.head0 + head) * DIM + d;
            const float inverse = inverse_of(l[j]);
            *reinterpret_cast<uint32_t *>(out) =
                pack_pair<T>(quotient(o[j].x, l[j], inverse), quotient(o[j].y, l[j], inverse));
        }
    }

    if (is_cut) {
        unsigned polls = 0;
        jobs.rewind();
        for (item = blockIdx.x; (job = jobs.find(item)).heads; item += gridDim.x) {
            if (job.runs == 1) continue;
            const unsigned parts = job.runs * a.chunks;
            unsigned *counter = counter_of(a, job), before = 0;
            rows_barrier<W>(); /* nobody reads the share before */
            if (threadIdx.x == 0) {
                s.share = wait_for_row(counter, parts * W, polls);
                before = atomicAdd(counter, (unsigned)LEFT);
            }
            rows_barrier<W>();
            __threadfence();
            const unsigned part = job.run * a.chunks + (job.head0 - job.kvhead * a.group) / HEADS;
            const unsigned begin = s.share == SHARE_ALL ? 0 : part, end = s.share == SHARE_ALL     ? parts
                                                                          : s.share == SHARE_SLICE ? part + 1
                                                                                                   : part;
#pragma unroll 1
            for (unsigned i = begin; i < end; i++) {
                jobs.take_heads(job, i % a.chunks);
                merge_slice(a, s, job, i / a.chunks);
            }
            if (threadIdx.x == 0 && before % GAVE_UP / LEFT == parts - 1) *counter = 0;
        }
    }
    note(a.trace, LLA_BLOCK_ENDED);
}

} // namespace

#endif
