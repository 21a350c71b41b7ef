/* ops_rows.cu: add, swiglu, rms_norm and rope: operators that read each element once and are bound by memory.
 *
 * Threads ask for 32 to 128 bytes, in packs of 16, before they use any: an SM needs some 40 KB under way to keep HBM
 * busy, and 2048 threads have 64 KB and more. */
#include "ops.cuh"

/* ---- add and swiglu: c[i] = op(a[i], b[i]); c may be a or b ---- */

struct Add {
    static __device__ __forceinline__ float apply(float a, float b) { return a + b; }
};

struct SwiGlu { /* a = gate, b = up */
    static __device__ __forceinline__ float apply(float a, float b) { return b * (a / (1.0f + __expf(-a))); }
};

enum { PAIR_THREADS = 512 };

template <class Op, class T, int N>
__global__ void __launch_bounds__(PAIR_THREADS, 3) pairwise(size_t n, const T *a, const T *b, T *c) {
    const size_t npack = n / N, i = static_cast<size_t>(blockIdx.x) * PAIR_THREADS + threadIdx.x;
    if (i < npack) {
        const Pack<T, N> x = load_pack<T, N>(a + i * N), y = load_pack<T, N>(b + i * N);
        Pack<T, N> z;
#pragma unroll
        for (int j = 0; j < N; j++) z.at[j] = round_to<T>(Op::apply(as_float(x.at[j]), as_float(y.at[j])));
        store_pack<T, N>(c + i * N, z);
    }
    const size_t rest = npack * N + threadIdx.x;
    if (blockIdx.x == 0 && rest < n) c[rest] = round_to<T>(Op::apply(as_float(a[rest]), as_float(b[rest])));
}

template <class Op, class T> static void launch_pairwise(size_t n, const T *a, const T *b, T *c, cudaStream_t stream) {
    constexpr int N = 16 / sizeof(T);
    const bool is_aligned = aligned_16(a, b, c);
    const size_t npack = is_aligned ? ceil_div(n, N) : n;
    const unsigned blocks = static_cast<unsigned>(ceil_div(npack, PAIR_THREADS));
    if (is_aligned)
        pairwise<Op, T, N><<<blocks, PAIR_THREADS, 0, stream>>>(n, a, b, c);
    else
        pairwise<Op, T, 1><<<blocks, PAIR_THREADS, 0, stream>>>(n, a, b, c);
}

lla_status lla_cuda_op_add(llaisysDataType_t dtype, size_t n, const void *a, const void *b, void *c,
                           cudaStream_t stream) {
    if (n == 0) return LLA_OK;
    LLA_CUDA_DISPATCH(dtype, launch_pairwise<Add, T>(n, static_cast<const T *>(a), static_cast<const T *>(b),
                                                     static_cast<T *>(c), stream));
    LLA_CUDA_LAUNCHED("add");
    return LLA_OK;
}

lla_status lla_cuda_op_swiglu(llaisysDataType_t dtype, size_t n, const void *gate, const void *up, void *out,
                              cudaStream_t stream) {
    if (n == 0) return LLA_OK;
    LLA_CUDA_DISPATCH(dtype, launch_pairwise<SwiGlu, T>(n, static_cast<const T *>(gate), static_cast<const T *>(up),
                                                        static_cast<T *>(out), stream));
    LLA_CUDA_LAUNCHED("swiglu");
    return LLA_OK;
}

/* ---- rms_norm: one block a row ---- */

/* Sum over the block, in every thread. warp_sums: shared memory for 32 floats. */
static __device__ __forceinline__ float block_sum(float v, float *warp_sums) {
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) v += __shfl_xor_sync(0xffffffffu, v, offset);
    if (blockDim.x == 32) return v;
    if (threadIdx.x % 32 == 0) warp_sums[threadIdx.x / 32] = v;
    __syncthreads();
    float sum = 0;
    for (unsigned i = 0; i < blockDim.x / 32; i++) sum += warp_sums[i];
    return sum;
}

/* w * round(x * inv), rounded again: as transformers' Qwen2RMSNorm does. */
template <class T> static __device__ __forceinline__ T normed(T x, T w, float inv) {
    return round_to<T>(as_float(w) * as_float(round_to<T>(as_float(x) * inv)));
}

/* x, out [rows, d]: the row stays in registers, PACKS packs of N elements a thread. Across the sum
 * they are kept as they came, not as twice as many floats: 32 registers let 2048 threads run on an SM. */
template <class T, int N, int PACKS>
__global__ void __launch_bounds__(1024) rms_norm_rows(unsigned d, const T *x, const T *w, float eps, T *out) {
    __shared__ float warp_sums[32];
    const size_t row = static_cast<size_t>(blockIdx.x) * d;
    const unsigned npack = d / N;
    Pack<T, N> v[PACKS];
    float sum = 0;
#pragma unroll
    for (int p = 0; p < PACKS; p++) {
        const unsigned i = p * blockDim.x + threadIdx.x;
        if (i < npack) v[p] = load_pack<T, N>(x + row + i * N);
    }
#pragma unroll
    for (int p = 0; p < PACKS; p++)
        if (p * blockDim.x + threadIdx.x < npack)
#pragma unroll
            for (int j = 0; j < N; j++) sum += as_float(v[p].at[j]) * as_float(v[p].at[j]);
    const float inv = rsqrtf(block_sum(sum, warp_sums) / static_cast<float>(d) + eps);
#pragma unroll
    for (int p = 0; p < PACKS; p++) {
        const unsigned i = p * blockDim.x + threadIdx.x;
        if (i >= npack) continue;
        forget(v[p]);
        const Pack<T, N> weight = *reinterpret_cast<const Pack<T, N> *>(w + i * N);
#pragma unroll
        for (int j = 0; j < N; j++) v[p].at[j] = normed(v[p].at[j], weight.at[j], inv);
        store_pack<T, N>(out + row + i * N, v[p]);
    }
}

/* Rows of any length and alignment, read twice. */
template <class T>
__global__ void __launch_bounds__(1024) rms_norm_any(size_t d, const T *x, const T *w, float eps, T *out) {
    __shared__ float warp_sums[32];
    const size_t row = static_cast<size_t>(blockIdx.x) * d;
    float sum = 0;
    for (size_t i = threadIdx.x; i < d; i += blockDim.x) sum += as_float(x[row + i]) * as_float(x[row + i]);
    const float inv = rsqrtf(block_sum(sum, warp_sums) / static_cast<float>(d) + eps);
    for (size_t i = threadIdx.x; i < d; i += blockDim.x) out[row + i] = normed(x[row + i], w[i], inv);
}

template <class T>
static void launch_rms_norm(size_t rows, size_t d, const T *x, const T *w, float eps, T *out, cudaStream_t stream) {
    constexpr int N = 16 / sizeof(T);
    const unsigned blocks = static_cast<unsigned>(rows);
    const size_t npack = d / N;
    const auto threads = [](size_t work) {
        return static_cast<unsigned>(work > 1024 ? 1024 : ceil_div(work, 32) * 32);
    };
    if (d % N || !aligned_16(x, w, out) || npack > 4 * 1024)
        rms_norm_any<T><<<blocks, threads(d), 0, stream>>>(d, x, w, eps, out);
    else if (npack <= 128)
        rms_norm_rows<T, N, 1><<<blocks, threads(npack), 0, stream>>>(static_cast<unsigned>(d), x, w, eps, out);
    else
        rms_norm_rows<T, N, 4>
            <<<blocks, threads(ceil_div(npack, 4)), 0, stream>>>(static_cast<unsigned>(d), x, w, eps, out);
}

lla_status lla_cuda_op_rms_norm(llaisysDataType_t dtype, size_t rows, size_t d, const void *x, const void *w, float eps,
                                void *out, cudaStream_t stream) {
    enum { MAX_BLOCKS = 1 << 30 };
    if (d == 0) return LLA_OK;
    const size_t row_bytes = d * lla_dtype_size(dtype);
    for (size_t row = 0; row < rows; row += MAX_BLOCKS) {
        const size_t count = rows - row < MAX_BLOCKS ? rows - row : size_t(MAX_BLOCKS);
        const void *from = static_cast<const char *>(x) + row * row_bytes;
        void *to = static_cast<char *>(out) + row * row_bytes;
        LLA_CUDA_DISPATCH(dtype, launch_rms_norm<T>(count, d, static_cast<const T *>(from), static_cast<const T *>(w),
                                                    eps, static_cast<T *>(to), stream));
        LLA_CUDA_LAUNCHED("rms_norm");
    }
    return LLA_OK;
}

/* ---- rope ---- */

/* Angles below 1024 are rounded to f32 once, as the CPU's are (kernels/ops.h): LLAISYS's own test compares with angles
 * in f32. Larger ones stay exact. A position is an integer, so an angle in turns needs no floating point: pos * step
 * modulo 1 is one 64-bit product that wraps. Only the step, one for each j, is worked out in double precision. Its
 * error of 2^-53 turns at most grows to 2^-36 at position 128 K; the fraction is then rounded to f32 (2^-25 turns at
 * most) for sincospif. */
__global__ void __launch_bounds__(128) rope_steps(unsigned d, double theta, lla_rope_step *steps) {
    const unsigned j = blockIdx.x * blockDim.x + threadIdx.x;
    if (j >= d / 2) return;
    const double radians = pow(theta, -2.0 * j / d), turns = radians * 0.15915494309189533577; /* 1 / (2 pi) */
    const double fraction = turns - floor(turns);
    steps[j].radians = radians;
    steps[j].turns = static_cast<uint64_t>(fraction * 0x1p53)
                     << 11; /* in two parts: a fraction times 2^64 may round to 2^64 */
}

lla_status lla_cuda_rope_steps(size_t d, double theta, struct lla_rope_step *steps, cudaStream_t stream) {
    LLA_REQUIRE(d <= 2 * LLA_ROPE_STEPS, LLA_EINVAL, "rope: expected heads of at most %d elements, found %zu",
                2 * LLA_ROPE_STEPS, d);
    const unsigned blocks = static_cast<unsigned>(ceil_div(d / 2, 128));
    if (blocks) rope_steps<<<blocks, 128, 0, stream>>>(static_cast<unsigned>(d), theta, steps);
    LLA_CUDA_LAUNCHED("rope: steps");
    return LLA_OK;
}

/* Half turns, from -1 to 1, of position * step. */
__device__ __forceinline__ float half_turns_of(int64_t position, const lla_rope_step &step) {
    const double exact = static_cast<double>(position) * step.radians;
    if (fabs(exact) >= 1024) {
        const uint64_t turns = static_cast<uint64_t>(position) * step.turns;
        return static_cast<float>(static_cast<int32_t>(turns >> 32)) * 0x1p-31f;
    }
    /* angle / pi as the sum of two floats: the first alone would lose what the rounded angle still has */
    constexpr float HIGH = 0.318309873f, LOW = 1.28412764e-08f;
    const float angle = static_cast<float>(exact), high = angle * HIGH;
    const float low = fmaf(angle, LOW, fmaf(angle, HIGH, -high));
    return (high - 2 * rintf(0.5f * high)) + low;
}

enum { ROPE_THREADS = 128, ROPE_HEADS = 4 };

/* x, out [seq, heads, d]. A thread has N neighbouring angles of one position, for up to ROPE_HEADS heads. */
template <class T, int N>
__global__ void __launch_bounds__(ROPE_THREADS) rope_heads(unsigned seq, unsigned heads, unsigned d, const T *x,
                                                           const int64_t *pos, const lla_rope_step *steps, T *out) {
    const unsigned packs = d / 2 / N, chunks = (heads + ROPE_HEADS - 1) / ROPE_HEADS;
    const unsigned id = blockIdx.x * ROPE_THREADS + threadIdx.x;
    const unsigned j = id % packs * N, head0 = id / packs % chunks * ROPE_HEADS, s = id / packs / chunks;
    if (s >= seq) return;
    const size_t at = (static_cast<size_t>(s) * heads + head0) * d + j;
    Pack<T, N> a[ROPE_HEADS], b[ROPE_HEADS];
#pragma unroll
    for (int h = 0; h < ROPE_HEADS; h++) {
        if (head0 + h >= heads) break;
        a[h] = load_pack<T, N>(x + at + h * static_cast<size_t>(d));
        b[h] = load_pack<T, N>(x + at + h * static_cast<size_t>(d) + d / 2);
    }
    const int64_t position = pos[s];
    float cosine[N], sine[N];
#pragma unroll
    for (int i = 0; i < N; i++) sincospif(half_turns_of(position, steps[j + i]), &sine[i], &cosine[i]);
#pragma unroll
    for (int h = 0; h < ROPE_HEADS; h++) {
        if (head0 + h >= heads) break;
#pragma unroll
        for (int i = 0; i < N; i++) {
            const float u = as_float(a[h].at[i]), v = as_float(b[h].at[i]);
            a[h].at[i] = round_to<T>(u * cosine[i] - v * sine[i]);
            b[h].at[i] = round_to<T>(v * cosine[i] + u * sine[i]);
        }
        store_pack<T, N>(out + at + h * static_cast<size_t>(d), a[h]);
        store_pack<T, N>(out + at + h * static_cast<size_t>(d) + d / 2, b[h]);
    }
}

template <class T>
static void launch_rope(size_t seq, size_t heads, size_t d, const T *x, const int64_t *pos,
                        const struct lla_rope_step *steps, T *out, cudaStream_t stream) {
    constexpr int N = 16 / sizeof(T);
    const bool is_wide = d / 2 % N == 0 && aligned_16(x, out);
    const size_t threads = d / 2 / (is_wide ? N : 1) * ceil_div(heads, ROPE_HEADS); /* of one position */
    const size_t max_seq = (static_cast<size_t>(1) << 31) / threads;                /* thread numbers have 32 bits */
    for (size_t s = 0; s < seq; s += max_seq) {
        const size_t count = seq - s < max_seq ? seq - s : max_seq;
        const unsigned blocks = static_cast<unsigned>(ceil_div(count * threads, ROPE_THREADS));
        const auto kernel = is_wide ? rope_heads<T, N> : rope_heads<T, 1>;
        kernel<<<blocks, ROPE_THREADS, 0, stream>>>(static_cast<unsigned>(count), static_cast<unsigned>(heads),
                                                    static_cast<unsigned>(d), x + s * heads * d, pos + s, steps,
                                                    out + s * heads * d);
    }
}

lla_status lla_cuda_op_rope(llaisysDataType_t dtype, size_t seq, size_t heads, size_t d, const void *x,
                            const int64_t *pos, const struct lla_rope_step *steps, void *out, cudaStream_t stream) {
    if (seq == 0 || heads == 0 || d == 0) return LLA_OK;
    LLA_REQUIRE(d <= 2 * LLA_ROPE_STEPS && heads <= 1 << 14, LLA_EINVAL,
                "rope: expected at most %d heads of at most %d elements, found %zu of %zu", 1 << 14, 2 * LLA_ROPE_STEPS,
                heads, d);
    LLA_CUDA_DISPATCH(
        dtype, launch_rope<T>(seq, heads, d, static_cast<const T *>(x), pos, steps, static_cast<T *>(out), stream));
    LLA_CUDA_LAUNCHED("rope");
    return LLA_OK;
}
