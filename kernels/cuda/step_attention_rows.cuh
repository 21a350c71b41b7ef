/* step_attention_rows.cuh: attention row by row: a block takes a row and KV head at a time, or, where the step has few
 * rows or a long one, a run of the row's splits.
 *
 * Each warp works on splits of its own: it asks for a split's keys and values in the background, waits for them,
 * computes the split alone (attend_warp), and asks for its next one, of this row or of the block's next row. The warps'
 * results meet in shared memory, where all threads merge them in order. So what a warp waits for is its own memory, and
 * a block has up to W splits on their way.
 *
 * A row that is cut has its splits' results in `partial`: the first run's merged in one slot, behind it those of each
 * other split, since only a merge from the first split on has the bits of an uncut row. The last block to arrive merges
 * them. */
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
    unsigned is_last;
};

/* The barrier of the first W warps. */
template <int W> __device__ __forceinline__ void rows_barrier() {
    barrier_sync(1, 32 * W);
}

/* Some splits of a row for up to eight query heads of one KV head. */
struct Job {
    unsigned row, kvhead, head0, heads;
    unsigned first, last, runs; /* splits; runs that the row is cut into */
    unsigned length, slot;      /* tokens; the row's first slot in `partial` */
    const int32_t *table;
};

/* A step's jobs, numbered by row, run, KV head and heads. Rows come 32 at a time, one to a lane. */
struct Jobs {
    const Attention &a;
    const uint32_t *const
        words; /* NULL: all rows; else only those with a bit in the first words and not in the second */
    const unsigned rows, lane, group, chunks, per_run;
    unsigned run = 1;                                /* splits of a run, about */
    unsigned base = 0, before = 0, before_slots = 0; /* rows [base, base + 32), jobs and slots before them */

    __device__ __forceinline__ Jobs(const Attention &a, const uint32_t *words)
        : a(a), words(words), rows((unsigned)a.header->nrow), lane(threadIdx.x % 32),
          group((unsigned)(a.nhead / a.nkvhead)), chunks((group + HEADS - 1) / HEADS),
          per_run((unsigned)a.nkvhead * chunks) {}

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
    /* Of all rows. */
    __device__ __forceinline__ unsigned count_splits() const {
        unsigned total = 0;
#pragma unroll 4
        for (unsigned row = lane; row < rows; row += 32) total += splits(row);
        return __reduce_add_sync(~0u, total);
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
    /* Cuts long rows so that no block has more than about its share of the splits, of which there are `total`. */
    __device__ __forceinline__ void cut(unsigned total, unsigned least) {
        const unsigned share = (total * per_run + gridDim.x - 1) / gridDim.x;
        run = total > a.max_splits ? 0x40000000u : share > least ? share : least;
    }
    /* Job `item`, which grows from call to call; heads 0: there is none. */
    __device__ __forceinline__ Job find(unsigned item) {
        Job job = {};
        for (; base < rows; base += 32) {
            const unsigned n = splits(base + lane), cuts = runs(n), slots = cuts > 1 ? n : 0;
            const unsigned upto = before + scan(cuts * per_run), slots_upto = before_slots + scan(slots);
            const unsigned who = __ballot_sync(~0u, item < upto);
            if (who) {
                const int from = __ffs(who) - 1;
                const unsigned all = __shfl_sync(~0u, n, from);
                const unsigned at = item - __shfl_sync(~0u, upto - cuts * per_run, from);
                job.runs = __shfl_sync(~0u, cuts, from);
                job.slot = __shfl_sync(~0u, slots_upto - slots, from);
                job.row = base + from;
                job.first = all * (at / per_run) / job.runs;
                job.last = all * (at / per_run + 1) / job.runs;
                job.kvhead = at % per_run / chunks;
                job.head0 = job.kvhead * group + at % chunks * HEADS;
                job.heads = min(group - at % chunks * HEADS, (unsigned)HEADS);
                job.length = (unsigned)a.positions[job.row] + 1;
                job.table = a.table + (size_t)a.row_seq[job.row] * a.max_blocks;
                break;
            }
            before = __shfl_sync(~0u, upto, 31);
            before_slots = __shfl_sync(~0u, slots_upto, 31);
        }
        return job;
    }
};

/* Two dimensions of a head while splits are merged. */
struct Merged {
    float2 o;
    float m, l;
    __device__ __forceinline__ void take(const float2 &po, float pm, float pl) {
        const float top = fmaxf(m, pm), old = exp2_fast(m - top), add = exp2_fast(pm - top);
        o = make_float2(merged(o.x, old, po.x, add), merged(o.y, old, po.y, add));
        l = merged(l, old, pl, add);
        m = top;
    }
};

/* The first W warps of every block call it; the jobs, of so many splits in all, are shared among the grid's blocks. It
 * waits for the kernels before, unless there is no job for this block. */
template <class T, int DIM, int W>
__device__ __forceinline__ void attend_rows(const Attention &a, char *smem, Jobs &jobs, unsigned total, float scale) {
    constexpr unsigned UNITS = DIM / 8, TOKENS = 32 / UNITS; /* of a pass: tokens that a warp copies at once */
    constexpr unsigned PAIRS = DIM / 2, PER = (HEADS * PAIRS + 32 * W - 1) / (32 * W);
    static_assert(SPLIT == 64 && PAIRS % 32 == 0, "two places a lane; a warp merges pairs of one head");
    static_assert(PER * W <= 32, "a lane has the weights of one head and split");
    auto &s = *reinterpret_cast<RowsMemory<T, DIM, W> *>(smem);
    const unsigned warp = threadIdx.x / 32, lane = threadIdx.x % 32, kv_block = (unsigned)a.kv_block;
    const uint32_t keys = shared_address(s.keys[warp]), values = shared_address(s.values[warp]);

    /* Where the lane's two tokens of a split lie: row numbers of the cache. */
    const auto find_places = [&](const int32_t *table, unsigned kvhead, unsigned length, unsigned split) {
        uint2 places = make_uint2(0, 0);
        const unsigned low = split * SPLIT + lane, high = low + 32;
        const auto place = [&](unsigned position) {
            return ((unsigned)table[position / kv_block] * (unsigned)a.nkvhead + kvhead) * kv_block +
                   position % kv_block;
        };
        if (low < length) places.x = place(low);
        if (high < length) places.y = place(high);
        return places;
    };
    /* Asks for a token of a split, in units of 16 bytes, or for zeros. */
    const auto request_token = [&](uint32_t row, unsigned token, bool is_valid) {
        const unsigned unit = lane % UNITS;
        const size_t at = (size_t)row * DIM + unit * 8;
        const uint32_t to_unit = (token * UNITS + (unit ^ (token & 7))) * 16;
        cp_async_16(keys + to_unit, (const T *)a.k_cache + at, is_valid);
        cp_async_16(values + to_unit, (const T *)a.v_cache + at, is_valid);
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
     * follows the wait is on the step's critical path: q and the tokens of this step, often one, in one go. */
    jobs.cut(total, W);
    unsigned item = blockIdx.x;
    Job job = jobs.find(item);
    if (!job.heads) return;
    uint2 first_places = make_uint2(0, 0);
    unsigned staged = 0, valid = 0; /* tokens of the warp's first split */
    if (job.first + warp < job.last) {
        const unsigned split = job.first + warp, start = split * SPLIT;
        const unsigned old = jobs.words ? job.length - 1 : (unsigned)first_new(a.positions, a.row_seq, job.row);
        valid = min(job.length - start, (unsigned)SPLIT);
        staged = old <= start ? 0 : min(old - start, valid);
        first_places = find_places(job.table, job.kvhead, job.length, split);
        request(first_places, staged, valid);
    }
    bool is_free = false;     /* the kernels before have finished */
    bool has_results = false; /* the warps' have been read */
    for (Job next; job.heads; job = next) {
        next = jobs.find(item += gridDim.x);
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

            if (has_results) rows_barrier<W>(); /* nobody reads those before */
            has_results = true;
            if (split < job.last) {
                SplitResult<DIM> &to = s.result[warp];
                const unsigned g = lane / 4, t2 = lane % 4 * 2;
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
#pragma unroll
            for (unsigned i = 0; i < W; i++) {
                if (i >= count) break;
                const SplitResult<DIM> &r = s.result[i];
#pragma unroll
                for (unsigned j = 0; j < PER; j++) {
                    const unsigned pair = threadIdx.x + j * (32 * W), head = pair / PAIRS, d = pair % PAIRS * 2;
                    if (head >= job.heads) continue;
                    const float2 po = *reinterpret_cast<const float2 *>(&r.o[head][d]);
                    if (job.first == 0) {
                        const float keep = __shfl_sync(~0u, old, j * W + i), take = __shfl_sync(~0u, add, j * W + i);
                        o[j] = make_float2(merged(o[j].x, keep, po.x, take), merged(o[j].y, keep, po.y, take));
                        l[j] = merged(l[j], keep, r.l[head], take);
                    } else {
                        float *to = a.partial + ((job.slot + base + i) * a.nhead + job.head0 + head) * (DIM + 2);
                        *reinterpret_cast<float2 *>(to + d) = po;
                        if (d == 0) *reinterpret_cast<float2 *>(to + DIM) = make_float2(r.m[head], r.l[head]);
                    }
                }
            }
        }
        if (next.heads) load_q(next);

#pragma unroll
        for (unsigned j = 0; j < PER; j++) {
            const unsigned pair = threadIdx.x + j * (32 * W), head = pair / PAIRS, d = pair % PAIRS * 2;
            const float m = __shfl_sync(~0u, top, j * W);
            if (head >= job.heads || job.first) continue;
            if (job.runs == 1) {
                T *out = (T *)a.out + ((size_t)job.row * a.nhead + job.head0 + head) * DIM + d;
                *reinterpret_cast<uint32_t *>(out) = pack_pair<T>(o[j].x / l[j], o[j].y / l[j]);
            } else {
                float *to = a.partial + ((size_t)job.slot * a.nhead + job.head0 + head) * (DIM + 2);
                *reinterpret_cast<float2 *>(to + d) = o[j];
                if (d == 0) *reinterpret_cast<float2 *>(to + DIM) = make_float2(m, l[j]);
            }
        }
        if (job.runs > 1) {
            int32_t *arrived = &a.arrived[(size_t)job.row * a.nkvhead + job.kvhead];
            __threadfence();
            rows_barrier<W>();
            if (threadIdx.x == 0) {
                s.is_last = atomicAdd(arrived, 1) == (int32_t)(job.runs * jobs.chunks) - 1;
                if (s.is_last) *arrived = 0;
            }
            rows_barrier<W>();
            __threadfence();
            if (s.is_last) {
                const unsigned splits = (job.length - 1) / SPLIT + 1;
                const size_t stride = a.nhead * (DIM + 2);
                for (unsigned pair = threadIdx.x; pair < jobs.group * PAIRS; pair += 32 * W) {
                    const unsigned d = pair % PAIRS * 2, head = job.kvhead * jobs.group + pair / PAIRS;
                    const float *at = a.partial + ((size_t)job.slot * a.nhead + head) * (DIM + 2);
                    const auto load = [&] {
                        const float2 ml = __ldcg(reinterpret_cast<const float2 *>(at + DIM));
                        return Merged{__ldcg(reinterpret_cast<const float2 *>(at + d)), ml.x, ml.y};
                    };
                    Merged sum = load();
                    unsigned split = splits / job.runs; /* the second run's first */
                    at += split * stride;
                    constexpr unsigned AHEAD = 8;
                    for (; split + AHEAD <= splits; split += AHEAD) {
                        Merged some[AHEAD];
#pragma unroll
                        for (unsigned i = 0; i < AHEAD; i++, at += stride) some[i] = load();
#pragma unroll
                        for (unsigned i = 0; i < AHEAD; i++) sum.take(some[i].o, some[i].m, some[i].l);
                    }
                    for (; split < splits; split++, at += stride) {
                        const Merged one = load();
                        sum.take(one.o, one.m, one.l);
                    }
                    *reinterpret_cast<uint32_t *>((T *)a.out + ((size_t)job.row * a.nhead + head) * DIM + d) =
                        pack_pair<T>(sum.o.x / sum.l, sum.o.y / sum.l);
                }
            }
        }
    }
    note(a.trace, LLA_BLOCK_ENDED);
}

} // namespace

#endif
