/* step_attention_any.cu: attention of the step's rows over KV blocks for the shapes that the tensor cores' kernel
 * (step_attention.cu) does not take, f32 among them: flash-decoding by splits of LLA_CUDA_SPLIT tokens.
 *
 * A block takes one split of one row and KV head, with all query heads of the group: keys and values are staged in
 * shared memory once for the group. The split's unnormalised output, maximum and sum go to `partial`; the last block of
 * a row and KV head to arrive merges the splits, in order. Where a step has more splits than `partial` holds (prompts),
 * a block takes a whole row and merges as it goes: the same numbers in the same order. */
#include "step_attention.cuh"

namespace {

/* acc (output, maximum, sum) of a head's dimension takes in the next split's. */
__device__ __forceinline__ void merge_in(float &o, float &m, float &l, float po, float pm, float pl) {
    const float top = fmaxf(m, pm), a = expf(m - top), b = expf(pm - top);
    o = __fmaf_rn(o, a, __fmul_rn(po, b));
    l = __fmaf_rn(l, a, __fmul_rn(pl, b));
    m = top;
}

template <class T> struct Shared {
    T *k, *v;         /* [SPLIT, pitch] */
    float *q;         /* [HEADS, dim] */
    float *weight;    /* [SPLIT, HEADS] scores, then e^(score - max) */
    float *max, *sum; /* [HEADS] */
    float *mixed;     /* [groups, HEADS, dim] */
    size_t pitch;
};

template <class T> __host__ __device__ size_t shared_bytes(size_t dim, size_t groups) {
    const size_t pitch = dim + 16 / sizeof(T);
    return 2 * SPLIT * pitch * sizeof(T) +
           (HEADS * dim + SPLIT * HEADS + 2 * HEADS + (groups + 1) * HEADS * dim + 2 * HEADS) * sizeof(float);
}

/* Keys and values of positions [start + from, start + to) of one KV head into shared memory, 16 bytes a thread where
 * rows allow; past the first-level cache, since a neighbour in the same sector may be written meanwhile. */
template <class T>
__device__ void stage(const Attention &a, const Shared<T> &s, const int32_t *table, size_t kvhead, size_t start,
                      size_t from, size_t to) {
    const bool wide = a.dim * sizeof(T) % 16 == 0;
    const size_t unit = wide ? 16 / sizeof(T) : 1, units = a.dim / unit;
#pragma unroll 4
    for (size_t i = from * units + threadIdx.x; i < to * units; i += THREADS) {
        const size_t token = i / units, u = i % units * unit, position = start + token;
        const size_t at =
            (((size_t)table[position / a.kv_block] * a.nkvhead + kvhead) * a.kv_block + position % a.kv_block) * a.dim +
            u;
        const T *k = (const T *)a.k_cache + at, *v = (const T *)a.v_cache + at;
        T *sk = s.k + token * s.pitch + u, *sv = s.v + token * s.pitch + u;
        if (wide) {
            const uint4 kk = __ldcg(reinterpret_cast<const uint4 *>(k)),
                        vv = __ldcg(reinterpret_cast<const uint4 *>(v));
            *reinterpret_cast<uint4 *>(sk) = kk;
            *reinterpret_cast<uint4 *>(sv) = vv;
        } else {
            *sk = __ldcg(k);
            *sv = __ldcg(v);
        }
    }
}

constexpr int PER = HEADS * SPLIT / THREADS; /* heads of a thread in score() */
static_assert(PER >= 1 && PER * THREADS == HEADS * SPLIT, "every thread scores the same number of heads");

/* weight [token][head] = scale q . k; THREADS / SPLIT threads a token, PER heads each. */
template <class T> __device__ void score(const Attention &a, const Shared<T> &s, size_t count, float scale) {
    const size_t token = threadIdx.x % SPLIT, h0 = threadIdx.x / SPLIT * PER;
    if (token >= count) return;
    float sum[PER] = {};
    const T *k = s.k + token * s.pitch;
    if (a.dim % 8 == 0 && sizeof(T) == 2) {
        for (size_t d = 0; d < a.dim; d += 8) {
            const uint4 raw = *reinterpret_cast<const uint4 *>(k + d);
            const T *e = reinterpret_cast<const T *>(&raw);
#pragma unroll
            for (int h = 0; h < PER; h++) {
                const float4 lo = *reinterpret_cast<const float4 *>(s.q + (h0 + h) * a.dim + d);
                const float4 hi = *reinterpret_cast<const float4 *>(s.q + (h0 + h) * a.dim + d + 4);
                sum[h] = fmaf(to_float<T>(e[0]), lo.x, sum[h]);
                sum[h] = fmaf(to_float<T>(e[1]), lo.y, sum[h]);
                sum[h] = fmaf(to_float<T>(e[2]), lo.z, sum[h]);
                sum[h] = fmaf(to_float<T>(e[3]), lo.w, sum[h]);
                sum[h] = fmaf(to_float<T>(e[4]), hi.x, sum[h]);
                sum[h] = fmaf(to_float<T>(e[5]), hi.y, sum[h]);
                sum[h] = fmaf(to_float<T>(e[6]), hi.z, sum[h]);
                sum[h] = fmaf(to_float<T>(e[7]), hi.w, sum[h]);
            }
        }
    } else {
        for (size_t d = 0; d < a.dim; d++)
            for (int h = 0; h < PER; h++) sum[h] = fmaf(to_float<T>(k[d]), s.q[(h0 + h) * a.dim + d], sum[h]);
    }
    for (int h = 0; h < PER; h++) s.weight[token * HEADS + h0 + h] = scale * sum[h];
}

/* One warp a head: scores become weights. */
template <class T> __device__ void soften(const Shared<T> &s, size_t count) {
    const int h = threadIdx.x / 32, lane = threadIdx.x % 32;
    float top = -INFINITY, sum = 0;
    for (size_t t = lane; t < count; t += 32) top = fmaxf(top, s.weight[t * HEADS + h]);
    for (int o = 16; o; o /= 2) top = fmaxf(top, __shfl_xor_sync(~0u, top, o));
    for (size_t t = lane; t < count; t += 32) {
        const float e = expf(s.weight[t * HEADS + h] - top);
        s.weight[t * HEADS + h] = e;
        sum += e;
    }
    for (int o = 16; o; o /= 2) sum += __shfl_xor_sync(~0u, sum, o);
    if (lane == 0) {
        s.max[h] = top;
        s.sum[h] = sum;
    }
}

/* mixed [group][head][d] = sum over the group's tokens of weight * v; a thread owns two dimensions and every groups-th
 * token. */
template <class T> __device__ void mix(const Attention &a, const Shared<T> &s, size_t count, size_t groups) {
    const size_t pairs = a.dim / 2, group = threadIdx.x / pairs, d = threadIdx.x % pairs * 2;
    if (group >= groups) return;
    float lo[HEADS] = {}, hi[HEADS] = {};
    for (size_t t = group; t < count; t += groups) {
        const T *v = s.v + t * s.pitch + d;
        const float v0 = to_float<T>(v[0]), v1 = to_float<T>(v[1]);
#pragma unroll
        for (int h = 0; h < HEADS; h++) {
            const float w = s.weight[t * HEADS + h];
            lo[h] = fmaf(w, v0, lo[h]);
            hi[h] = fmaf(w, v1, hi[h]);
        }
    }
    for (int h = 0; h < HEADS; h++) {
        s.mixed[(group * HEADS + h) * a.dim + d] = lo[h];
        s.mixed[(group * HEADS + h) * a.dim + d + 1] = hi[h];
    }
}

template <class T>
__global__ void __launch_bounds__(THREADS, 2) attention_kernel(const Attention a, size_t groups, float scale) {
    LLA_DYNAMIC_SHARED(smem, 16);
    Shared<T> s;
    s.pitch = a.dim + 16 / sizeof(T);
    s.k = reinterpret_cast<T *>(smem);
    s.v = s.k + SPLIT * s.pitch;
    s.q = reinterpret_cast<float *>(s.v + SPLIT * s.pitch);
    s.weight = s.q + HEADS * a.dim;
    s.max = s.weight + SPLIT * HEADS;
    s.sum = s.max + HEADS;
    s.mixed = s.sum + HEADS;
    float *const acc = s.mixed + groups * HEADS * a.dim; /* [HEADS, dim]: merged so far */
    float *const acc_max = acc + HEADS * a.dim, *const acc_sum = acc_max + HEADS;

    pdl_launch_next();
    /* Step inputs were there before the step's first kernel began, and so were keys and values of earlier steps. */
    const size_t rows = (size_t)a.header->nrow, group = a.nhead / a.nkvhead;
    const size_t nslot = locate(a.positions, rows, ~(size_t)0).slot0;
    const bool by_split = nslot <= a.max_splits;
    const size_t items = (by_split ? nslot : rows) * a.nkvhead;
    bool waited = false;

    for (size_t item = blockIdx.x; item < items; item += gridDim.x) {
        const size_t kvhead = item % a.nkvhead;
        Place p = {item / a.nkvhead, 0, 0, 0};
        if (by_split)
            p = locate(a.positions, rows, item / a.nkvhead);
        else
            p.nsplit = (size_t)a.positions[p.row] / SPLIT + 1;
        const size_t first = by_split ? p.split : 0, last = by_split ? p.split + 1 : p.nsplit;
        const size_t length = (size_t)a.positions[p.row] + 1;
        const int32_t *table = a.table + (size_t)a.row_seq[p.row] * a.max_blocks;
        size_t staged = 0; /* positions of the first split that are there already */
        if (!waited) {
            const size_t start = first * SPLIT, old = first_new(a.positions, a.row_seq, p.row);
            staged = old <= start ? 0 : old - start < SPLIT ? old - start : SPLIT;
            stage(a, s, table, kvhead, start, 0, staged);
            pdl_wait();
            waited = true;
        }

        for (size_t h0 = 0; h0 < group; h0 += HEADS) {
            const size_t heads = group - h0 < HEADS ? group - h0 : HEADS;
            const size_t head0 = kvhead * group + h0;
            const T *q = (const T *)a.q + (p.row * a.nhead + head0) * a.dim;
            for (size_t i = threadIdx.x; i < HEADS * a.dim; i += THREADS)
                s.q[i] = i < heads * a.dim ? to_float<T>(q[i]) : 0.0f;
            for (size_t split = first; split < last; split++) {
                const size_t start = split * SPLIT, count = length - start < SPLIT ? length - start : SPLIT;
                stage(a, s, table, kvhead, start, staged < count ? staged : count, count);
                staged = 0;
                __syncthreads();
                score(a, s, count, scale);
                __syncthreads();
                soften(s, count);
                __syncthreads();
                mix(a, s, count, groups);
                __syncthreads();
                for (size_t i = threadIdx.x; i < heads * a.dim; i += THREADS) {
                    const size_t h = i / a.dim;
                    float sum = 0;
                    for (size_t g = 0; g < groups; g++) sum += s.mixed[g * HEADS * a.dim + i];
                    if (by_split) {
                        float *part = a.partial + ((p.slot0 + split) * a.nhead + head0 + h) * (a.dim + 2);
                        part[i % a.dim] = sum;
                        if (i % a.dim == 0) {
                            part[a.dim] = s.max[h];
                            part[a.dim + 1] = s.sum[h];
                        }
                    } else if (split == first) {
                        acc[i] = sum;
                    } else {
                        float m = acc_max[h], l = acc_sum[h];
                        merge_in(acc[i], m, l, sum, s.max[h], s.sum[h]);
                    }
                }
                __syncthreads();
                if (!by_split && threadIdx.x < heads) {
                    const size_t h = threadIdx.x;
                    float o = 0, m = s.max[h], l = s.sum[h];
                    if (split > first) {
                        m = acc_max[h], l = acc_sum[h];
                        merge_in(o, m, l, 0, s.max[h], s.sum[h]);
                    }
                    acc_max[h] = m;
                    acc_sum[h] = l;
                }
                __syncthreads();
            }
            if (!by_split) {
                T *out = (T *)a.out + (p.row * a.nhead + head0) * a.dim;
                for (size_t i = threadIdx.x; i < heads * a.dim; i += THREADS)
                    out[i] = from_float<T>(acc[i] / acc_sum[i / a.dim]);
            }
        }
        if (!by_split) continue;

        if (!is_last_block(&a.arrived[p.row * a.nkvhead + kvhead], p.nsplit)) continue;
        for (size_t i = threadIdx.x; i < group * a.dim; i += THREADS) {
            const size_t head = kvhead * group + i / a.dim, d = i % a.dim, step = a.nhead * (a.dim + 2);
            const float *part = a.partial + (p.slot0 * a.nhead + head) * (a.dim + 2);
            float o = __ldcg(part + d), m = __ldcg(part + a.dim), l = __ldcg(part + a.dim + 1);
#pragma unroll 4
            for (size_t split = 1; split < p.nsplit; split++)
                merge_in(o, m, l, __ldcg(part + split * step + d), __ldcg(part + split * step + a.dim),
                         __ldcg(part + split * step + a.dim + 1));
            ((T *)a.out)[(p.row * a.nhead + head) * a.dim + d] = from_float<T>(o / l);
        }
    }
    if (!waited) pdl_wait(); /* a kernel ends only after those before it, so that a wait for it is a wait for all */
}

} // namespace

lla_status lla_cuda_attention_any(const lla_cuda_ctx *ctx, const Attention &a) {
    const lla_dims &d = ctx->dims;
    if (d.head_dim > 2 * THREADS)
        return lla_fail(LLA_ELIMIT, "attention: head_dim is %zu, expected at most %d", d.head_dim, 2 * THREADS);
    const size_t groups = THREADS / (d.head_dim / 2) < 8 ? THREADS / (d.head_dim / 2) : 8;
    LLA_CUDA_BY_DTYPE(d.dtype, {
        const size_t smem = shared_bytes<T>(d.head_dim, groups);
        if (smem > ctx->max_smem)
            return lla_fail(LLA_ELIMIT, "attention: head_dim %zu needs %zu bytes of shared memory, %zu are there",
                            d.head_dim, smem, ctx->max_smem);
        const size_t most =
            ctx->rows * d.nkvhead * (d.max_blocks * d.kv_block / SPLIT + 1); /* items of a step of the bucket */
        const dim3 grid((unsigned)(most < (size_t)ctx->sm_count ? most : ctx->sm_count));
        return launch(ctx, "attention", attention_kernel<T>, grid, THREADS, smem, a, groups,
                      1.0f / sqrtf((float)d.head_dim));
    });
}
