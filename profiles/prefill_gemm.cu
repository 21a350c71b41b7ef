/* prefill_gemm.cu: tiles of step_gemm.cu against each other, and their bits against the kernels for few rows.
 *
 *   nvcc -O3 -std=c++17 -DLLA_SM90A -gencode arch=compute_90a,code=sm_90a profiles/prefill_gemm.cu
 * kernels/cuda/step_linear.cu kernels/cuda/step_linear_any.cu kernels/cuda/step_linear_many.cu \
 * kernels/cuda/step_rows.cu -x c base/status.c -o prefill_gemm */
#include "../kernels/cuda/step_gemm.cu"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <vector>

bool lla_many_attention_takes(const lla_cuda_ctx *) {
    return false;
}

#define CHECK(call)                                                                                                    \
    do {                                                                                                               \
        const cudaError_t e_ = (call);                                                                                 \
        if (e_ != cudaSuccess) {                                                                                       \
            printf("%s: %s\n", #call, cudaGetErrorString(e_));                                                         \
            exit(1);                                                                                                   \
        }                                                                                                              \
    } while (0)

using bf16 = __nv_bfloat16;

static __global__ void randomize(bf16 *p, size_t n, float scale, float shift, uint64_t seed) {
    for (size_t i = blockIdx.x * (size_t)blockDim.x + threadIdx.x; i < n; i += (size_t)gridDim.x * blockDim.x) {
        uint64_t z = (i + seed * 0x1000000000) * 0x9E3779B97F4A7C15u;
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9u;
        z = (z ^ z >> 27) * 0x94D049BB133111EBu;
        z ^= z >> 31;
        p[i] = __float2bfloat16(((float)(z >> 40) * 0x1p-23f - 1) * scale + shift);
    }
}

static __global__ void differing(const uint16_t *a, const uint16_t *b, size_t n, unsigned *count) {
    for (size_t i = blockIdx.x * (size_t)blockDim.x + threadIdx.x; i < n; i += (size_t)gridDim.x * blockDim.x)
        if (a[i] != b[i]) atomicAdd(count, 1u);
}

enum { HIDDEN = 1536, FFN = 8960, ROWS = 4096, KV_BLOCK = 32 };

struct Bench {
    lla_cuda_ctx ctx = {};
    size_t used = 0;
    size_t squares, new_squares; /* lla_io.squares of x, and of what is added to */
    size_t x, act, normed, norm, wqkv, wo, wgu, wdown, bias, rope, q, k, v, out, ref;
    unsigned *count;
    size_t take(size_t elements, float scale, float shift = 0) {
        const size_t at = used;
        used += (elements * 2 + 255) / 256 * 256;
        randomize<<<512, 256>>>((bf16 *)(ctx.arena + at), elements, scale, shift, at + 1);
        return at;
    }
    size_t ints(const std::vector<int32_t> &v) {
        const size_t at = used;
        used += (v.size() * 4 + 255) / 256 * 256;
        CHECK(cudaMemcpy(ctx.arena + at, v.data(), v.size() * 4, cudaMemcpyHostToDevice));
        return at;
    }
    void rows(int n, int bucket) {
        const lla_step_header h = {n, 1};
        CHECK(cudaMemcpy(ctx.arena + ctx.io.header, &h, sizeof h, cudaMemcpyHostToDevice));
        ctx.rows = (size_t)bucket;
    }
    void make() {
        CHECK(cudaMalloc(&ctx.arena, (size_t)1 << 30));
        CHECK(cudaMalloc(&count, 4));
        ctx.dims.dtype = LLAISYS_DTYPE_BF16;
        ctx.dims.hidden = HIDDEN;
        ctx.dims.nhead = 12;
        ctx.dims.nkvhead = 2;
        ctx.dims.head_dim = 128;
        ctx.dims.ffn = FFN;
        ctx.dims.kv_block = KV_BLOCK;
        ctx.dims.max_blocks = ROWS / KV_BLOCK;
        ctx.dims.eps = 1e-6f;
        int sms, smem;
        CHECK(cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, 0));
        CHECK(cudaDeviceGetAttribute(&smem, cudaDevAttrMaxSharedMemoryPerBlockOptin, 0));
        ctx.sm_count = sms;
        ctx.max_smem = (size_t)smem;
        std::vector<int32_t> positions(ROWS), zeros(ROWS), table(ROWS / KV_BLOCK);
        for (int i = 0; i < ROWS; i++) positions[i] = i;
        for (int i = 0; i < ROWS / KV_BLOCK; i++) table[i] = i;
        ctx.io.header = ints({0, 0});
        ctx.io.positions = ints(positions);
        ctx.io.row_seq = ints(zeros);
        ctx.io.block_table = ints(table);
        const size_t floats = ROWS * lla_square_columns(HIDDEN);
        ctx.io.squares = squares = take(2 * floats, 1);
        CHECK(cudaMemset(ctx.arena + squares, 0x3f, 4 * floats)); /* not x's own: positive numbers will do */
        new_squares = take(2 * floats, 1);
        x = take((size_t)ROWS * HIDDEN, 1);
        act = take((size_t)ROWS * FFN, 1);
        normed = take((size_t)ROWS * HIDDEN, 1);
        norm = take(HIDDEN, 0.1f, 1);
        const float s = sqrtf(3.0f / HIDDEN), sd = sqrtf(3.0f / FFN);
        wqkv = take(2048 * HIDDEN, s);
        wo = take(HIDDEN * HIDDEN, s);
        wgu = take((size_t)2 * FFN * HIDDEN, s);
        wdown = take((size_t)HIDDEN * FFN, sd);
        bias = take(2048, 0.5f);
        rope = take((size_t)ROWS * 128, 1);
        q = take((size_t)ROWS * HIDDEN, 1);
        k = take((size_t)ROWS * 256, 1);
        v = take((size_t)ROWS * 256, 1);
        out = take((size_t)ROWS * FFN, 1);
        ref = take((size_t)ROWS * FFN, 1);
        CHECK(cudaDeviceSynchronize());
    }
};

/* The four products of a layer; `many` chooses the kernels, rows [first, first + n) are computed. */
enum Which { W_QKV, W_O, W_GATE_UP, W_DOWN };
static const char *const names[] = {"qkv", "o", "gate_up", "down"};
static const size_t sizes[][2] = {{2048, 1536}, {1536, 1536}, {17920, 1536}, {1536, 8960}};

static lla_status reference(Bench &b, Which which, int n, size_t out) {
    const lla_io io = b.ctx.io;
    lla_status s = LLA_OK;
    for (int i = 0; i < n && !s; i += 64) {
        b.rows(n - i < 64 ? n - i : 64, 64);
        b.ctx.io.positions = io.positions + i * 4;
        b.ctx.io.squares =
            (which == W_O || which == W_DOWN ? b.new_squares : b.squares) + i * lla_square_columns(HIDDEN) * 4;
        const size_t x = b.x + (size_t)i * HIDDEN * 2;
        if (which == W_QKV) {
            const lla_qkv_args args = {x,   b.norm, b.wqkv, b.bias, b.rope, b.normed, 0, out + (size_t)i * HIDDEN * 2,
                                       b.k, b.v};
            s = lla_cuda_qkv(&b.ctx, &args);
        } else if (which == W_GATE_UP) {
            const lla_gate_up_args args = {x, b.norm, b.wgu, b.normed, out + (size_t)i * FFN * 2};
            s = lla_cuda_gate_up(&b.ctx, &args);
        } else {
            const size_t in = which == W_O ? x : b.act + (size_t)i * FFN * 2;
            const lla_linear_add_args args = {in, which == W_O ? b.wo : b.wdown, out + (size_t)i * HIDDEN * 2,
                                              (size_t)(which == W_O ? HIDDEN : FFN)};
            s = lla_cuda_linear_add(&b.ctx, &args);
        }
        CHECK(cudaDeviceSynchronize());
    }
    b.ctx.io = io;
    return s;
}

/* Captures what the public entry would launch, with the tile S. */
template <class S> static lla_status run(Bench &b, Which which, size_t out) {
    char *m = b.ctx.arena;
    if (which == W_QKV) {
        Product a = product(&b.ctx, b.normed, b.wqkv, out, 2048, HIDDEN);
        a.half = 64;
        a.bias = m + b.bias;
        a.rope = m + b.rope;
        a.positions = (const int32_t *)(m + b.ctx.io.positions);
        a.row_seq = (const int32_t *)(m + b.ctx.io.row_seq);
        a.table = (const int32_t *)(m + b.ctx.io.block_table);
        a.q = m + out;
        a.k_cache = m + b.k;
        a.v_cache = m + b.v;
        a.nhead = 12;
        a.nkvhead = 2;
        a.head_dim = 128;
        a.kv_block = KV_BLOCK;
        a.max_blocks = ROWS / KV_BLOCK;
        return launch_product<bf16, QKV, S>(&b.ctx, "qkv", a);
    }
    if (which == W_GATE_UP) {
        Product a = product(&b.ctx, b.normed, b.wgu, out, 2 * FFN, HIDDEN);
        a.half = FFN;
        return launch_product<bf16, SWIGLU, S>(&b.ctx, "gate_up", a);
    }
    Product a = product(&b.ctx, which == W_O ? b.x : b.act, which == W_O ? b.wo : b.wdown, out, HIDDEN,
                        which == W_O ? HIDDEN : FFN);
    a.squares = (float *)(m + b.new_squares);
    return launch_product<bf16, ADD, S>(&b.ctx, "linear_add", a);
}

static unsigned compare(Bench &b, size_t p, size_t q, size_t n) {
    unsigned zero = 0;
    CHECK(cudaMemcpy(b.count, &zero, 4, cudaMemcpyHostToDevice));
    differing<<<512, 256>>>((const uint16_t *)(b.ctx.arena + p), (const uint16_t *)(b.ctx.arena + q), n, b.count);
    CHECK(cudaMemcpy(&zero, b.count, 4, cudaMemcpyDeviceToHost));
    return zero;
}

template <class S> static void variant(Bench &b, const char *name, const std::vector<int> &counts) {
    cudaEvent_t begin, end;
    CHECK(cudaEventCreate(&begin));
    CHECK(cudaEventCreate(&end));
    for (int n : counts) {
        printf("%-34s %5d rows ", name, n);
        double sum = 0;
        for (int w = 0; w < 4; w++) {
            const Which which = (Which)w;
            const size_t width = which == W_GATE_UP ? FFN : HIDDEN;
            unsigned bad = 0;
            if (n <= 300) { /* bits */
                CHECK(cudaMemset(b.ctx.arena + b.out, 0x11, (size_t)n * width * 2));
                CHECK(cudaMemset(b.ctx.arena + b.ref, 0x11, (size_t)n * width * 2));
                CHECK(cudaMemset(b.ctx.arena + b.k, 0x22, (size_t)ROWS * 512));
                CHECK(cudaMemset(b.ctx.arena + b.v, 0x22, (size_t)ROWS * 512));
                if (reference(b, which, n, b.ref)) printf("%s\n", lla_last_error());
                /* the reference's keys and values are kept behind the reference's output */
                const size_t kv = b.ref + (size_t)512 * FFN * 2, bytes = (size_t)ROWS * 512;
                CHECK(cudaMemcpy(b.ctx.arena + kv, b.ctx.arena + b.k, bytes, cudaMemcpyDeviceToDevice));
                CHECK(cudaMemcpy(b.ctx.arena + kv + bytes, b.ctx.arena + b.v, bytes, cudaMemcpyDeviceToDevice));
                CHECK(cudaMemset(b.ctx.arena + b.k, 0x22, bytes));
                CHECK(cudaMemset(b.ctx.arena + b.v, 0x22, bytes));
                b.rows(n, n);
                if (norm_rows(&b.ctx, b.x, b.norm, b.normed)) printf("%s\n", lla_last_error());
                if (run<S>(b, which, b.out)) printf("%s\n", lla_last_error());
                CHECK(cudaDeviceSynchronize());
                bad = compare(b, b.out, b.ref, (size_t)n * width);
                if (which == W_QKV) bad += compare(b, b.k, kv, bytes / 2) + compare(b, b.v, kv + bytes, bytes / 2);
            }
            b.rows(n, n);
            std::vector<float> times;
            for (int r = 0; r < 9; r++) {
                const int inner = 4;
                CHECK(cudaEventRecord(begin));
                for (int i = 0; i < inner; i++)
                    if (run<S>(b, which, b.out)) printf("%s\n", lla_last_error());
                CHECK(cudaEventRecord(end));
                CHECK(cudaEventSynchronize(end));
                float ms;
                CHECK(cudaEventElapsedTime(&ms, begin, end));
                times.push_back(ms / inner);
            }
            std::sort(times.begin(), times.end());
            const double us = 1e3 * times[4], tflops = 2e-6 * n * sizes[w][0] * sizes[w][1] / us;
            sum += us;
            printf(" %s %7.1f us (%3.0f)", names[w], us, tflops);
            if (n <= 300) printf(bad ? " %u BITS DIFFER" : " same bits", bad);
        }
        printf("  layer %7.1f us, 28: %.2f ms\n", sum, 28e-3 * sum);
        fflush(stdout);
    }
}

int main() {
    Bench b;
    b.make();
    /* MI, NI, warps m, warps n, KT, stages, resident */
#define V(counts, ...) variant<Tile<__VA_ARGS__>>(b, #__VA_ARGS__, std::vector<int> counts);
#define A {300, 2048, 4096}
#define F {65, 256, 512}
    V(A, 1, 24, 8, 1, 4, 5, 1)
    V(A, 1, 16, 8, 1, 4, 6, 1)
    V(A, 3, 8, 4, 2, 4, 4, 1)
    V(F, 1, 24, 8, 1, 4, 5, 1)
    V(F, 1, 16, 8, 1, 4, 6, 1)
    V(F, 1, 8, 4, 1, 4, 4, 3)
    return 0;
}
