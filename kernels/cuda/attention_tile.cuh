/* attention_tile.cuh: one split of flash-decoding on the tensor cores, by one warp: the query heads of one KV head
 * against LLA_CUDA_SPLIT keys and values in shared memory.
 *
 *   S^T [tokens, heads] = K q^T, summed over head_dim in order;  s = S log2(e) / sqrt(head_dim)
 *   m = max s;  p = round(2^(s - m));  o^T [head_dim, heads] = V^T p^T, l = sum of p, both summed over tokens in order
 *
 * Keys and values are the 16-row operand, the (up to eight) query heads the eight columns. Splits are merged in order
 * (merged). The order of every sum is set by the split alone, so that whoever computes a row, a decode
 * step or a prompt's chunk, gets the same bits. */
#ifndef LLA_ATTENTION_TILE_CUH
#define LLA_ATTENTION_TILE_CUH

#include "step_math.cuh"

enum { SPLIT = LLA_CUDA_SPLIT, HEADS = 8 /* columns of an mma: query heads worked on together */ };

/* Factor of the scores: log2(e) / sqrt(head_dim), so that the exponential is a power of two. */
static inline float attention_scale(size_t head_dim) {
    return 1.4426950408889634f / sqrtf((float)head_dim);
}

/* A sum over the splits so far takes in the next one's: their weights are 2^(m - top), with the maxima m of each, and
 * top the larger one. */
__device__ __forceinline__ float merged(float sum, float old, float next, float add) {
    return __fmaf_rn(sum, old, __fmul_rn(next, add));
}

/* An output: its sum over the weights' sum, which is 1 at least. The approximate inverse and one step of Newton's from
 * there, without the branches of a division, since it is the end of the critical path. Of an infinite sum it makes NaN.
 */
__device__ __forceinline__ float inverse_of(float l) {
    return __fdividef(1.0f, l);
}
__device__ __forceinline__ float quotient(float o, float l, float inverse) {
    const float q = __fmul_rn(o, inverse);
    return __fmaf_rn(__fmaf_rn(-q, l, o), inverse, q);
}

/* What a lane holds of a split: heads 2t and 2t + 1 of dimensions 16 d + g (o[d][0], o[d][1]) and 8 more (o[d][2],
 * o[d][3]); g = lane / 4, t = lane % 4. */
template <int DIM> struct WarpPartial {
    float o[DIM / 16][4], m[2], l[2];
};

/* The first `valid` tokens (1 .. SPLIT) of the split; the rows of V behind them hold finite numbers. keys, values:
 * addresses of [SPLIT, DIM], where 16-byte unit u of token r lies at unit u ^ (r & 7) of its row, so that the eight
 * rows of an ldmatrix lie in different banks. q: of head g, pairs 8 k + t and 8 k + 4 + t. */
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
