/* ops_attention_any.cu: causal attention for f32, and for heads of any size, in f32 arithmetic.
 *
 * Rows are packed as in ops_attention.cu. A block has 16 rows and up to 256 columns of v, two a thread; larger heads of
 * v have a block for every 256 columns. Scores of 32 keys at a time are taken over pieces of 64 elements of d. */
#include "ops_attention.cuh"

enum { ROWS = 16, KEYS = 32, PIECE = 64, ANY_THREADS = 128, COLUMNS = 2 };

template <class T>
__global__ void __launch_bounds__(ANY_THREADS)
    attention_any(lla_attention_shape s, const T *q, const T *k, const T *v, T *out) {
    __shared__ __align__(16) float q_piece[ROWS][PIECE + 4], k_piece[KEYS][PIECE + 4], p[ROWS][KEYS + 4];
    __shared__ float shrink[ROWS], weights[ROWS];
    const unsigned kv_head = blockIdx.y, rows = s.seq * s.group, past = s.total - s.seq;
    const unsigned row0 = (gridDim.x - 1 - blockIdx.x) * ROWS,
                   column0 = blockIdx.z * (ANY_THREADS * COLUMNS) + threadIdx.x;
    const unsigned key_end = past + (min(row0 + ROWS, rows) - 1) / s.group + 1;
    const unsigned my_row = threadIdx.x / 8, my_key = threadIdx.x % 8; /* eight threads share a row's scores */
    const unsigned sees = past + min(row0 + my_row, rows - 1) / s.group + 1;
    const unsigned pieces = (s.d + PIECE - 1) / PIECE;

    float sum[COLUMNS][ROWS] = {}, top = -INFINITY, weight = 0;
    for (unsigned key = 0; key < key_end; key += KEYS) {
        float score[KEYS / 8] = {};
        for (unsigned piece = 0; piece < pieces; piece++) {
            if (piece || key) __syncthreads(); /* the last piece has been read */
            if (pieces > 1 || key == 0)
                for (unsigned i = threadIdx.x; i < ROWS * PIECE; i += ANY_THREADS) {
                    const unsigned r = row0 + i / PIECE, column = piece * PIECE + i % PIECE;
                    const size_t at = static_cast<size_t>(r / s.group) * s.nh + kv_head * s.group + r % s.group;
                    q_piece[i / PIECE][i % PIECE] = r < rows && column < s.d ? as_float(q[at * s.d + column]) : 0.0f;
                }
            for (unsigned i = threadIdx.x; i < KEYS * PIECE; i += ANY_THREADS) {
                const unsigned r = key + i / PIECE, column = piece * PIECE + i % PIECE;
                const size_t at = static_cast<size_t>(r) * s.nkvh + kv_head;
                k_piece[i / PIECE][i % PIECE] = r < key_end && column < s.d ? as_float(k[at * s.d + column]) : 0.0f;
            }
            __syncthreads();
#pragma unroll
            for (int x = 0; x < PIECE; x += 4) {
                const float4 a = *reinterpret_cast<const float4 *>(&q_piece[my_row][x]);
#pragma unroll
                for (int i = 0; i < KEYS / 8; i++) {
                    const float4 b = *reinterpret_cast<const float4 *>(&k_piece[my_key + i * 8][x]);
                    score[i] = fmaf(a.x, b.x, fmaf(a.y, b.y, fmaf(a.z, b.z, fmaf(a.w, b.w, score[i]))));
                }
            }
        }
        const float before = top;
#pragma unroll
        for (int i = 0; i < KEYS / 8; i++) {
            const unsigned at = key + my_key + i * 8;
            score[i] = at < sees ? score[i] * s.scale_log2 : -INFINITY;
            top = fmaxf(top, score[i]);
        }
#pragma unroll
        for (int offset = 1; offset < 8; offset *= 2) top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, offset));
        const float base = top == -INFINITY ? 0.0f : top, factor = exp2f(before - base);
        weight *= factor;
        if (my_key == 0) shrink[my_row] = factor;
#pragma unroll
        for (int i = 0; i < KEYS / 8; i++) {
            const float value = exp2f(score[i] - base);
            weight += value;
            p[my_row][my_key + i * 8] = value;
        }
        __syncthreads();
#pragma unroll
        for (int c = 0; c < COLUMNS; c++) {
            const unsigned column = column0 + c * ANY_THREADS;
            if (column >= s.dv) break;
#pragma unroll
            for (int r = 0; r < ROWS; r++) sum[c][r] *= shrink[r];
            for (unsigned i = 0; i < KEYS && key + i < key_end; i += 4) {
                float value[4];
#pragma unroll
                for (unsigned j = 0; j < 4; j++) {
                    const size_t at = static_cast<size_t>(key + i + j) * s.nkvh + kv_head;
                    value[j] = key + i + j < key_end ? as_float(v[at * s.dv + column]) : 0.0f;
                }
#pragma unroll
                for (int r = 0; r < ROWS; r++) {
                    const float4 f = *reinterpret_cast<const float4 *>(&p[r][i]);
                    sum[c][r] =
                        fmaf(f.x, value[0], fmaf(f.y, value[1], fmaf(f.z, value[2], fmaf(f.w, value[3], sum[c][r]))));
                }
            }
        }
        if (pieces == 0) __syncthreads(); /* with d = 0 nothing else keeps the next scores from this p */
    }
#pragma unroll
    for (int offset = 1; offset < 8; offset *= 2) weight += __shfl_xor_sync(0xffffffffu, weight, offset);
    if (my_key == 0) weights[my_row] = weight;
    __syncthreads();
#pragma unroll
    for (int c = 0; c < COLUMNS; c++) {
        const unsigned column = column0 + c * ANY_THREADS;
        if (column >= s.dv) break;
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            const unsigned row = row0 + r;
            if (row >= rows) break;
            const size_t at = static_cast<size_t>(row / s.group) * s.nh + kv_head * s.group + row % s.group;
            out[at * s.dv + column] = round_to<T>(sum[c][r] / weights[r]);
        }
    }
}

lla_status lla_cuda_attention_any(llaisysDataType_t dtype, lla_attention_shape s, const void *q, const void *k,
                                  const void *v, void *out, cudaStream_t stream) {
    const dim3 grid(static_cast<unsigned>(ceil_div(static_cast<size_t>(s.seq) * s.group, ROWS)), s.nkvh,
                    static_cast<unsigned>(ceil_div(s.dv, ANY_THREADS * COLUMNS)));
    LLA_CUDA_DISPATCH(dtype, attention_any<T>
                      <<<grid, ANY_THREADS, 0, stream>>>(s, static_cast<const T *>(q), static_cast<const T *>(k),
                                                         static_cast<const T *>(v), static_cast<T *>(out)));
    LLA_CUDA_LAUNCHED("self_attention");
    return LLA_OK;
}
