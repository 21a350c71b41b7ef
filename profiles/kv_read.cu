/* kv_read.cu: how fast keys and values can be read in the pattern of decode attention, by cp.async and by bulk copies.
 *
 *   nvcc -O3 -std=c++17 -arch=sm_90 profiles/kv_read.cu -o kv_read && ./kv_read
 *
 * 256 rows behind 896 tokens, 2 KV heads of 128, 16 bits: 235 MB. A block of six warps takes rows and KV heads in turn,
 * a warp a split of 64 tokens at a time, as step_attention_rows.cuh does; nothing is computed. */
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <numeric>
#include <random>
#include <vector>

#define CHECK(call)                                                                                                    \
    do {                                                                                                               \
        const cudaError_t e_ = (call);                                                                                 \
        if (e_ != cudaSuccess) {                                                                                       \
            printf("%s: %s\n", #call, cudaGetErrorString(e_));                                                         \
            exit(1);                                                                                                   \
        }                                                                                                              \
    } while (0)

enum { WARPS = 6, SPLIT = 64, ROWS = 256, TOKENS = 896, SPLITS = TOKENS / SPLIT, LINE = 256 /* bytes of a token */ };

struct Cache {
    const char *k, *v;
    const int *table; /* [ROWS, TOKENS / kv_block]: KV blocks */
    unsigned kv_block;
    bool beside; /* a block's values lie behind its keys */
    bool flat;   /* no blocks: splits one after the other */
};

__device__ unsigned sink;

__device__ __forceinline__ const char *place(const Cache &c, unsigned job, unsigned split, unsigned token, int kv) {
    if (c.flat) return c.k + (((size_t)job * SPLITS + split) * 2 + kv) * (SPLIT * LINE) + token * LINE;
    const unsigned row = job / 2, head = job % 2, t = split * SPLIT + token;
    const size_t block = c.table[row * (TOKENS / c.kv_block) + t / c.kv_block];
    const size_t matrix = c.beside ? (block * 2 + head) * 2 + kv : block * 2 + head;
    return (kv && !c.beside ? c.v : c.k) + (matrix * c.kv_block + t % c.kv_block) * LINE;
}

template <bool BULK> __global__ void __launch_bounds__(WARPS * 32, 1) read_kernel(const Cache c) {
    extern __shared__ __align__(128) char smem[];
    __shared__ uint64_t barriers[WARPS];
    const unsigned warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const uint32_t to = (uint32_t)__cvta_generic_to_shared(smem) + warp * (2 * SPLIT * LINE),
                   barrier = (uint32_t)__cvta_generic_to_shared(&barriers[warp]);
    if (BULK && lane == 0)
        asm volatile("mbarrier.init.shared::cta.b64 [%0], 1; fence.mbarrier_init.release.cluster;" ::"r"(barrier));
    __syncthreads();
    unsigned parity = 0, seen = 0;
    const unsigned jobs = (ROWS * 2 - blockIdx.x + gridDim.x - 1) / gridDim.x;
    for (unsigned i = warp; i < jobs * SPLITS; i += WARPS) {
        const unsigned job = blockIdx.x + i / SPLITS * gridDim.x, split = i % SPLITS;
        if (BULK) {
            if (lane == 0) {
                asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier),
                             "n"(2 * SPLIT * LINE)
                             : "memory");
                const unsigned step = min(c.kv_block, (unsigned)SPLIT);
                for (int kv = 0; kv < 2; kv++)
                    for (unsigned t = 0; t < SPLIT; t += step)
                        asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], "
                                     "%2, [%3];" ::"r"(to + kv * (SPLIT * LINE) + t * LINE),
                                     "l"(place(c, job, split, t, kv)), "r"(step * LINE), "r"(barrier)
                                     : "memory");
            }
            asm volatile("{ .reg .pred done; again: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1; @!done "
                         "bra again; }" ::"r"(barrier),
                         "r"(parity)
                         : "memory");
            parity ^= 1;
        } else {
#pragma unroll 4
            for (unsigned t = 0; t < SPLIT; t += 2)
                for (int kv = 0; kv < 2; kv++)
                    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" ::"r"(to + kv * (SPLIT * LINE) +
                                                                                            t * LINE + lane * 16),
                                 "l"(place(c, job, split, t + lane / 16, kv) + lane % 16 * 16)
                                 : "memory");
            asm volatile("cp.async.commit_group; cp.async.wait_group 0;" ::: "memory");
            __syncwarp();
        }
        seen += *(volatile unsigned *)(smem + warp * (2 * SPLIT * LINE) + lane * 4);
        __syncwarp();
    }
    if (seen == 0x12345) sink = seen;
}

template <class Kernel> static void time_it(const char *name, Kernel *kernel, Cache c, int *table, bool is_shuffled) {
    std::vector<int> blocks(ROWS * (TOKENS / c.kv_block));
    std::iota(blocks.begin(), blocks.end(), 0);
    std::mt19937 random(1);
    if (is_shuffled) std::shuffle(blocks.begin(), blocks.end(), random);
    CHECK(cudaMemcpy(table, blocks.data(), blocks.size() * sizeof(int), cudaMemcpyHostToDevice));
    const int smem = WARPS * 2 * SPLIT * LINE;
    CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, smem));
    int sms;
    CHECK(cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, 0));
    cudaEvent_t begin, end;
    CHECK(cudaEventCreate(&begin));
    CHECK(cudaEventCreate(&end));
    std::vector<float> times;
    for (int r = 0; r < 9; r++) {
        CHECK(cudaEventRecord(begin));
        for (int i = 0; i < 4; i++) kernel<<<sms, WARPS * 32, smem>>>(c);
        CHECK(cudaEventRecord(end));
        CHECK(cudaEventSynchronize(end));
        float ms;
        CHECK(cudaEventElapsedTime(&ms, begin, end));
        times.push_back(ms / 4);
    }
    std::sort(times.begin(), times.end());
    printf("%-9s KV blocks of %3u, %s, values %s keys: %6.1f us, %4.0f GB/s\n", name, c.kv_block,
           is_shuffled ? "shuffled" : "in order", c.beside ? "beside" : "behind all", 1e3 * times[4],
           2e-6 * ROWS * TOKENS * 2 * LINE / times[4]);
}

int main() {
    const size_t bytes = (size_t)ROWS * TOKENS * 2 * LINE; /* of keys */
    char *memory;
    int *table;
    CHECK(cudaMalloc(&memory, 2 * bytes));
    CHECK(cudaMalloc(&table, ROWS * TOKENS / 16 * sizeof(int)));
    CHECK(cudaMemset(memory, 1, 2 * bytes));
    Cache c = {memory, memory + bytes, table, 64, false, true};
    time_it("flat", read_kernel<false>, c, table, false);
    c.flat = false;
    for (unsigned kv_block : {16u, 32u, 64u, 128u})
        for (bool beside : {false, true})
            for (bool is_shuffled : {false, true}) {
                c.kv_block = kv_block;
                c.beside = beside;
                time_it("cp.async", read_kernel<false>, c, table, is_shuffled);
                time_it("bulk", read_kernel<true>, c, table, is_shuffled);
            }
    return 0;
}
