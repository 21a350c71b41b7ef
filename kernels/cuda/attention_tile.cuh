/* attention_tile.cuh: one split of flash-decoding on the tensor cores: the query heads of one KV head against
 * LLA_CUDA_SPLIT keys and values in shared memory.
 *
 *   S^T [tokens, heads] = K q^T, summed over head_dim in order;  s = S log2(e) / sqrt(head_dim)
 *   m = max s;  p = round(2^(s - m));  o^T [head_dim, heads] = V^T p^T, l = sum of p, both summed over tokens in order
 *
 * Keys and values are the 16-row operand, the (up to eight) query heads the eight columns. Splits are merged in order
 * by merge(). The order of every sum is set by the split alone, so that whoever computes a row, a decode step or
 * a prompt's chunk, gets the same bits. */
#ifndef LLA_ATTENTION_TILE_CUH
#define LLA_ATTENTION_TILE_CUH

#include "step_math.cuh"

enum { SPLIT = LLA_CUDA_SPLIT, HEADS = 8 /* columns of an mma: query heads worked on together */ };

/* Factor of the scores: log2(e) / sqrt(head_dim), so that the exponential is a power of two. */
static inline float attention_scale(size_t head_dim) {
    return 1.4426950408889634f / sqrtf((float)head_dim);
}

/* A split in shared memory. 16-byte unit u of token r lies at unit u ^ (r & 7) of its row, so that the eight rows of an
 * ldmatrix lie in different banks. */
template <class T, int DIM> struct SplitMemory {
    static constexpr int UNITS = DIM / 8; /* of a token's row */
    uint4 k[SPLIT * UNITS], v[SPLIT * UNITS];
    uint32_t q[HEADS][DIM / 2 + 4]; /* pairs of elements; rows of heads beyond the group are never looked at */
    uint2 p[SPLIT / 16][32];        /* the weights as B operand: step of 16 tokens, lane */
    float top[SPLIT / 16][HEADS];

    static __device__ __forceinline__ int at(int token, int unit) { return token * UNITS + (unit ^ (token & 7)); }
};

/* What a lane of warp w < DIM / 16 holds of a split: heads 2t and 2t + 1 (t = lane % 4) of dimensions 16 w + lane / 4
 * (o[0], o[1]) and 8 more (o[2], o[3]). */
struct Partial {
    float o[4], m[2], l[2];
};

/* 2^(s - m) weights of both splits in the merged sum. */
struct Weighting {
    float top, old, add;
    __device__ __forceinline__ Weighting(float m, float next) {
        top = fmaxf(m, next);
        old = exp2_fast(m - top);
        add = exp2_fast(next - top);
    }
    __device__ __forceinline__ float merged(float sum, float next) const {
        return __fmaf_rn(sum, old, __fmul_rn(next, add));
    }
};

__device__ __forceinline__ void merge(Partial &sum, const Partial &next) {
#pragma unroll
    for (int h = 0; h < 2; h++) {
        const Weighting w(sum.m[h], next.m[h]);
        sum.o[h] = w.merged(sum.o[h], next.o[h]);
        sum.o[h + 2] = w.merged(sum.o[h + 2], next.o[h + 2]);
        sum.l[h] = w.merged(sum.l[h], next.l[h]);
        sum.m[h] = w.top;
    }
}

/* The first `valid` tokens (1 .. SPLIT) of the split; eight warps, `barrier` is theirs. The rows of V behind them hold
 * finite numbers. Returns with the memory still in use by other warps. */
template <class T, int DIM, class Barrier>
__device__ __forceinline__ Partial attend(SplitMemory<T, DIM> &s, int warp, int lane, int valid, float scale,
                                          Barrier barrier) {
    const int g = lane / 4, t = lane % 4, r = lane % 8, quarter = lane / 8;
    float c[4] = {}, top[2];
    if (warp < SPLIT / 16) {
        const int token = 16 * warp + (quarter & 1) * 8 + r;
#pragma unroll
        for (int k = 0; k < DIM / 16; k++) {
            const uint4 a = ldmatrix_x4(shared_address(&s.k[s.at(token, 2 * k + quarter / 2)]));
            mma_16816<T>(c, a, make_uint2(s.q[g][8 * k + t], s.q[g][8 * k + 4 + t]));
        }
        const int first = 16 * warp + g;
#pragma unroll
        for (int h = 0; h < 2; h++) {
            c[h] = first < valid ? __fmul_rn(c[h], scale) : -INFINITY;
            c[h + 2] = first + 8 < valid ? __fmul_rn(c[h + 2], scale) : -INFINITY;
            top[h] = fmaxf(c[h], c[h + 2]);
            for (int o = 4; o < 32; o *= 2) top[h] = fmaxf(top[h], __shfl_xor_sync(~0u, top[h], o));
        }
        if (g == 0) *reinterpret_cast<float2 *>(&s.top[warp][2 * t]) = make_float2(top[0], top[1]);
    }
    barrier();
    Partial part = {};
    part.m[0] = part.m[1] = -INFINITY;
#pragma unroll
    for (int w = 0; w < SPLIT / 16; w++) {
        const float2 m = *reinterpret_cast<const float2 *>(&s.top[w][2 * t]);
        part.m[0] = fmaxf(part.m[0], m.x);
        part.m[1] = fmaxf(part.m[1], m.y);
    }
    if (warp < SPLIT / 16) { /* scores are [token, head]; as B operand they are wanted by head, then token */
        uint2 p;
        p.x = transpose_8x8(pack_pair<T>(exp2_fast(__fsub_rn(c[0], part.m[0])), exp2_fast(__fsub_rn(c[1], part.m[1]))));
        p.y = transpose_8x8(pack_pair<T>(exp2_fast(__fsub_rn(c[2], part.m[0])), exp2_fast(__fsub_rn(c[3], part.m[1]))));
        s.p[warp][lane] = p;
    }
    barrier();
    if (warp < DIM / 16) {
        const uint32_t one = pack_pair<T>(1.0f, 1.0f);
        const uint4 ones = make_uint4(one, one, one, one);
        float l[4] = {};
#pragma unroll
        for (int k = 0; k < SPLIT / 16; k++) {
            const int token = 16 * k + quarter / 2 * 8 + r;
            const uint4 a = ldmatrix_x4_trans(shared_address(&s.v[s.at(token, 2 * warp + (quarter & 1))]));
            const uint2 p = s.p[k][lane];
            mma_16816<T>(part.o, a, p);
            mma_16816<T>(l, ones, p);
        }
        part.l[0] = l[0];
        part.l[1] = l[1];
    }
    return part;
}

/* A split by one warp alone: units k and v of its tokens as in SplitMemory. What a lane holds: heads 2t and 2t + 1 of
 * dimensions 16 d + g (o[d][0], o[d][1]) and 8 more (o[d][2], o[d][3]); g = lane / 4, t = lane % 4. */
template <int DIM> struct WarpPartial {
    float o[DIM / 16][4], m[2], l[2];
};

/* The first `valid` tokens (1 .. SPLIT) of the split; q: of head g, pairs 8 k + t and 8 k + 4 + t. The order of sums is
 * that of attend(). */
template <class T, int DIM>
__device__ __forceinline__ WarpPartial<DIM> attend_warp(uint32_t keys, uint32_t values, const uint2 (&q)[DIM / 16],
                                                        int lane, int valid, float scale) {
    const int g = lane / 4, r = lane % 8, quarter = lane / 8;
    constexpr int ROW = DIM * 2; /* bytes of a token */
    WarpPartial<DIM> part;
    float c[SPLIT / 16][4] = {};
    const uint32_t key = keys + ((quarter & 1) * 8 + r) * ROW;
#pragma unroll
    for (int k = 0; k < DIM / 16; k++)
#pragma unroll
        for (int i = 0; i < SPLIT / 16; i++)
            mma_16816<T>(c[i], ldmatrix_x4(key + i * (16 * ROW) + ((2 * k + quarter / 2) ^ r) * 16), q[k]);
    part.m[0] = part.m[1] = -INFINITY;
#pragma unroll
    for (int i = 0; i < SPLIT / 16; i++)
#pragma unroll
        for (int h = 0; h < 2; h++) {
            c[i][h] = 16 * i + g < valid ? __fmul_rn(c[i][h], scale) : -INFINITY;
            c[i][h + 2] = 16 * i + g + 8 < valid ? __fmul_rn(c[i][h + 2], scale) : -INFINITY;
            part.m[h] = fmaxf(part.m[h], fmaxf(c[i][h], c[i][h + 2]));
        }
#pragma unroll
    for (int h = 0; h < 2; h++)
#pragma unroll
        for (int o = 4; o < 32; o *= 2) part.m[h] = fmaxf(part.m[h], __shfl_xor_sync(~0u, part.m[h], o));
    uint2 p[SPLIT / 16];
    const uint32_t one = pack_pair<T>(1.0f, 1.0f);
    float l[4] = {};
#pragma unroll
    for (int i = 0; i < SPLIT / 16; i++) {
        const auto weights = [&](float a, float b) {
            return transpose_8x8(pack_pair<T>(exp2_fast(__fsub_rn(a, part.m[0])), exp2_fast(__fsub_rn(b, part.m[1]))));
        };
        p[i].x = weights(c[i][0], c[i][1]);
        p[i].y = weights(c[i][2], c[i][3]);
        mma_16816<T>(l, make_uint4(one, one, one, one), p[i]);
    }
    part.l[0] = l[0];
    part.l[1] = l[1];
    const uint32_t value = values + (quarter / 2 * 8 + r) * ROW;
#pragma unroll
    for (int d = 0; d < DIM / 16; d++)
#pragma unroll
        for (int j = 0; j < 4; j++) part.o[d][j] = 0;
#pragma unroll
    for (int k = 0; k < SPLIT / 16; k++)
#pragma unroll
        for (int d = 0; d < DIM / 16; d++)
            mma_16816<T>(part.o[d], ldmatrix_x4_trans(value + k * (16 * ROW) + ((2 * d + (quarter & 1)) ^ r) * 16),
                         p[k]);
    return part;
}

#endif
