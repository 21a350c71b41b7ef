/* cuda.h: kernels of CUDA C++ on the CPU, for tests: compiled by the host's compiler with this header in front,
 * launched one block, or cluster of blocks, at a time, its threads as fibers that hand over wherever they wait for each
 * other.
 *
 * What it is strict about: shared memory is poisoned before each block. What is under way in the background comes as
 * late as it may: asynchronous copies when their group is waited for, bulk copies and what a cluster's block is sent
 * when somebody waits for their barrier, asynchronous products when they are waited for, so that what is read too early
 * is NaN or old, and what is overwritten too early gives a wrong result. Addresses in shared memory are checked against
 * what the launch asked for, and for alignment; a block that cannot go on, that reaches into the memory of one that has
 * ended, or that ends before what it was sent has come, is reported. What it does not know: time, caches, the order in
 * which blocks run, programmatic launch, fences. Variables that a kernel declares __shared__ are those of all of a
 * cluster's blocks: such kernels do not get clusters, if they have no other shared memory. Sums of the tensor cores are
 * rounded once for every 16 products, where a GPU's are not: results are close, and the same from kernel to kernel.
 *
 * Build: -D__shared__=static -include cuda.h -DLLA_PTX=... (kernels/cuda/ptx.cuh) -DLLA_PTX_SM90=... (sm90.cuh there),
 * without strict aliasing. */
#ifndef LLA_EMULATOR_CUDA_H
#define LLA_EMULATOR_CUDA_H

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <mutex>
#include <vector>

#undef __launch_bounds__
#define __launch_bounds__(...)
#undef __grid_constant__
#define __grid_constant__

struct emulator_index {
    unsigned x, y, z;
};
extern emulator_index blockIdx, blockDim, gridDim;

namespace emulator {

struct Copy {
    void *to;
    const void *from;
    bool is_valid; /* zeros otherwise */
};

/* A thread of a block. */
struct Thread {
    void *stack_pointer;
    char *stack;
    bool is_done;
    unsigned block, id, exchanges;        /* block of the cluster; exchanges: warp operations so far */
    unsigned cluster_phase;               /* of the cluster's barrier, when the thread arrived */
    std::deque<std::vector<Copy>> groups; /* of asynchronous copies, committed */
    std::vector<Copy> open;               /* not yet */
    std::deque<std::vector<std::function<void()>>> products; /* asynchronous ones, committed */
    std::vector<std::function<void()>> open_products;        /* not yet */
};
extern Thread *self;

extern char *shared; /* the running thread's block's dynamic shared memory */
extern size_t shared_bytes;
extern unsigned block_threads;
extern std::mutex running; /* one kernel at a time, whoever launches it */

/* The address of n bytes of shared memory that the kernel may touch. */
char *in_shared(uint32_t address, size_t n);

void barrier(int id, unsigned count, bool waits);

/* The cluster: its barrier, another block's shared memory, and barriers in shared memory that count bytes. */
void cluster_arrive();
void cluster_wait();
char *in_block(unsigned rank, uint32_t address, size_t n);
void mbarrier_init(uint32_t barrier, unsigned count);
void mbarrier_expect(uint32_t barrier, unsigned bytes);
void mbarrier_wait(uint32_t barrier, unsigned parity);
/* n bytes for block `rank`, which come when it waits for its barrier: one of its threads copies them then. */
void transfer(unsigned rank, uint32_t barrier, size_t n, std::function<void()> copy);
void yield();

/* Every lane of a warp gives n bytes, at most 256, and gets all lanes'. */
typedef unsigned char Lanes[32][256];
const Lanes &exchange(const void *mine, size_t n);

template <class T> T of_lane(const Lanes &lanes, unsigned lane) {
    T v;
    memcpy(&v, lanes[lane % 32], sizeof v);
    return v;
}
template <class T> T shuffle(T v, unsigned lane) {
    return of_lane<T>(exchange(&v, sizeof v), lane);
}

/* Runs work, or keeps it for the graph that is being captured. */
void issue(std::function<void()> work);
/* Runs `blocks` blocks from block (x, y) on together. */
void run_cluster(const std::function<void()> &body, unsigned x, unsigned y, unsigned blocks, unsigned threads,
                 size_t dynamic_shared);

template <class... Params, class... Args>
cudaError_t launch(const cudaLaunchConfig_t *config, void (*kernel)(Params...), Args... args) {
    const dim3 grid = config->gridDim;
    const unsigned threads = config->blockDim.x;
    const size_t bytes = config->dynamicSmemBytes;
    unsigned cluster = 1;
    for (unsigned i = 0; i < config->numAttrs; i++)
        if (config->attrs[i].id == cudaLaunchAttributeClusterDimension) cluster = config->attrs[i].val.clusterDim.x;
    issue([=] {
        const std::lock_guard<std::mutex> only(running);
        gridDim = {grid.x, grid.y, grid.z};
        blockDim = {threads, 1, 1};
        for (unsigned y = 0; y < grid.y; y++)
            for (unsigned x = 0; x < grid.x; x += cluster)
                run_cluster([&] { kernel(args...); }, x, y, cluster, threads, bytes);
    });
    return cudaSuccess;
}

} // namespace emulator

#define LLA_DYNAMIC_SHARED(name, alignment) char *const name = emulator::shared
#define threadIdx (emulator_index{emulator::self->id, 0, 0})
#define cudaLaunchKernelEx emulator::launch

/* ---- threads that meet ---- */

static inline void __syncthreads() {
    emulator::barrier(0, emulator::block_threads, true);
}
static inline void __syncwarp(unsigned = ~0u) {
    emulator::exchange("", 1);
}
static inline int __syncthreads_or(int v) {
    static int any;
    __syncthreads();
    any = 0;
    __syncthreads();
    any |= v;
    __syncthreads();
    return any;
}
template <class T> T __shfl_sync(unsigned, T v, int lane) {
    return emulator::shuffle(v, (unsigned)lane);
}
template <class T> T __shfl_xor_sync(unsigned, T v, int mask) {
    return emulator::shuffle(v, threadIdx.x % 32 ^ (unsigned)mask);
}
template <class T> T __shfl_up_sync(unsigned, T v, unsigned n) {
    const unsigned lane = threadIdx.x % 32;
    return emulator::shuffle(v, lane >= n ? lane - n : lane);
}
static inline unsigned __ballot_sync(unsigned, int v) {
    const emulator::Lanes &lanes = emulator::exchange(&v, sizeof v);
    unsigned bits = 0;
    for (unsigned i = 0; i < 32; i++) bits |= (unsigned)(emulator::of_lane<int>(lanes, i) != 0) << i;
    return bits;
}
static inline unsigned __reduce_add_sync(unsigned, unsigned v) {
    const emulator::Lanes &lanes = emulator::exchange(&v, sizeof v);
    unsigned sum = 0;
    for (unsigned i = 0; i < 32; i++) sum += emulator::of_lane<unsigned>(lanes, i);
    return sum;
}
static inline unsigned __reduce_max_sync(unsigned, unsigned v) {
    const emulator::Lanes &lanes = emulator::exchange(&v, sizeof v);
    unsigned most = 0;
    for (unsigned i = 0; i < 32; i++) most = std::max(most, emulator::of_lane<unsigned>(lanes, i));
    return most;
}
/* fibers change only where they wait, so that these are atomic as they are */
template <class T, class U> T atomicAdd(T *p, U v) {
    const T before = *p;
    *p = before + (T)v;
    return before;
}
template <class T, class U> T atomicMin(T *p, U v) {
    const T before = *p;
    if ((T)v < before) *p = (T)v;
    return before;
}
template <class T, class U> T atomicMax(T *p, U v) {
    const T before = *p;
    if ((T)v > before) *p = (T)v;
    return before;
}
template <class T, class U> T atomicOr(T *p, U v) {
    const T before = *p;
    *p = before | (T)v;
    return before;
}
template <class T, class U> T atomicExch(T *p, U v) {
    const T before = *p;
    *p = (T)v;
    return before;
}
static inline void __threadfence() {}

/* ---- arithmetic; the build forbids contraction ---- */

using std::isfinite;
using std::isinf;
using std::isnan;

template <class T> T __ldcg(const T *p) {
    return *p;
}
static inline float __fmaf_rn(float a, float b, float c) {
    return fmaf(a, b, c);
}
static inline float rsqrtf(float a) {
    return 1.0f / sqrtf(a);
}
static inline float __fdividef(float a, float b) {
    return a / b;
}
static inline float __fmul_rn(float a, float b) {
    return a * b;
}
static inline float __fadd_rn(float a, float b) {
    return a + b;
}
static inline float __fsub_rn(float a, float b) {
    return a - b;
}
static inline float __fdiv_rn(float a, float b) {
    return a / b;
}
static inline double __dmul_rn(double a, double b) {
    return a * b;
}
static inline float __fadd_ru(float a, float b) {
    const float sum = a + b;
    return (double)sum < (double)a + (double)b ? nextafterf(sum, INFINITY) : sum;
}
static inline unsigned __float_as_uint(float v) {
    unsigned bits;
    memcpy(&bits, &v, sizeof bits);
    return bits;
}
static inline float __uint_as_float(unsigned bits) {
    float v;
    memcpy(&v, &bits, sizeof v);
    return v;
}
static inline int __popc(unsigned v) {
    return __builtin_popcount(v);
}
static inline int __ffs(unsigned v) {
    return __builtin_ffs((int)v);
}
static inline int __clz(int v) {
    return v ? __builtin_clz((unsigned)v) : 32;
}
#define LLA_EMULATOR_LEAST_MOST(T)                                                                                     \
    static inline T min(T a, T b) {                                                                                    \
        return b < a ? b : a;                                                                                          \
    }                                                                                                                  \
    static inline T max(T a, T b) {                                                                                    \
        return b > a ? b : a;                                                                                          \
    }
LLA_EMULATOR_LEAST_MOST(int)
LLA_EMULATOR_LEAST_MOST(unsigned)
LLA_EMULATOR_LEAST_MOST(size_t)
LLA_EMULATOR_LEAST_MOST(unsigned long long)

#endif
