/* cuda.cpp: the emulator's blocks, and the part of CUDA's runtime that the executor uses: one device, whose memory is
 * the host's, and whose streams do at once what they are asked. EMULATED_CAPABILITY (80; from 90 on it has clusters)
 * and EMULATED_SMS (5) say which device it is. */
#include "cuda.h"

extern "C" {
#include "../../kernels/device.h"
}

#include "sm90.cuh"

#include <algorithm>
#include <map>
#include <sys/mman.h>

emulator_index blockIdx, blockDim, gridDim;
extern char __bss_start, _end; /* the linker's */

namespace emulator {

enum { STACK = 64 << 10, SHARED = 256 << 10, MOST_THREADS = 1024, MOST_BLOCKS = 8, BARRIERS = 16, TURNS = 4 };

struct Warp {
    Lanes lanes[TURNS]; /* in turns: a lane is at most one exchange ahead of those that still read */
    unsigned arrived[TURNS];
};
struct Barrier {
    unsigned arrived, generation;
};
/* A barrier in shared memory: arrivals and bytes that its phase still waits for, and copies on their way. */
struct Transfer {
    size_t n;
    std::function<void()> copy;
};
struct CountingBarrier {
    unsigned count, pending, phase;
    long bytes;
    std::vector<Transfer> transfers;
};
struct Block {
    unsigned alive; /* threads */
    Warp warps[MOST_THREADS / 32];
    Barrier barriers[BARRIERS];
    std::map<uint32_t, CountingBarrier> counting;
};

Thread *self;
char *shared;
size_t shared_bytes;
unsigned block_threads;
std::mutex running;

static Thread threads[MOST_BLOCKS * MOST_THREADS];
static Block blocks[MOST_BLOCKS];
alignas(1024) static char memory[MOST_BLOCKS][SHARED];
static Barrier cluster; /* of all threads that have not ended */
static unsigned nblock, alive;
static void *scheduler;                    /* its stack pointer */
static const std::function<void()> *block; /* what the threads run */
static bool has_moved;                     /* a thread has got on */
static thread_local std::vector<std::function<void()>> *captured;

/* ---- fibers ---- */

/* Keeps the caller's registers and stack pointer in *from and goes on with another's. */
extern "C" void emulator_switch(void **from, void *to);
asm(R"(
.globl emulator_switch
.hidden emulator_switch
emulator_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
)");

static void pass_cluster_barrier() {
    if (!alive || cluster.arrived < alive) return;
    cluster.arrived = 0;
    cluster.generation++;
}

static void run_thread() {
    (*block)();
    self->is_done = has_moved = true;
    Block &mine = blocks[self->block];
    if (!--mine.alive)
        for (const auto &[at, barrier] : mine.counting)
            if (!barrier.transfers.empty()) {
                fprintf(stderr, "emulator: block %u, %u has ended, and others still send to it\n", blockIdx.x,
                        blockIdx.y);
                abort();
            }
    alive--;
    pass_cluster_barrier();
    emulator_switch(&self->stack_pointer, scheduler);
    abort();
}

static void begin_thread(Thread &t, unsigned of, unsigned id) {
    if (!t.stack) {
        void *memory = mmap(nullptr, STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (memory == MAP_FAILED) abort();
        t.stack = static_cast<char *>(memory);
    }
    t.block = of;
    t.id = id;
    t.is_done = false;
    t.exchanges = t.cluster_phase = 0;
    t.groups.clear();
    t.open.clear();
    t.products.clear();
    t.open_products.clear();
    void **top = reinterpret_cast<void **>(t.stack + STACK - 64);
    *--top = nullptr; /* where a function's return address would be */
    *--top = reinterpret_cast<void *>(run_thread);
    for (int i = 0; i < 6; i++) *--top = nullptr; /* registers */
    t.stack_pointer = top;
}

void yield() {
    emulator_switch(&self->stack_pointer, scheduler);
}

void barrier(int id, unsigned count, bool waits) {
    Barrier &b = blocks[self->block].barriers[id];
    const unsigned generation = b.generation;
    has_moved = true;
    if (++b.arrived == count) {
        b.arrived = 0;
        b.generation++;
        return;
    }
    while (waits && b.generation == generation) yield();
}

const Lanes &exchange(const void *mine, size_t n) {
    Warp &w = blocks[self->block].warps[self->id / 32];
    const unsigned turn = self->exchanges++ % TURNS;
    memcpy(w.lanes[turn][self->id % 32], mine, n);
    has_moved = true;
    const unsigned all = (w.arrived[turn]++ / 32 + 1) * 32;
    while (w.arrived[turn] < all) yield();
    return w.lanes[turn];
}

char *in_block(unsigned rank, uint32_t address, size_t n) {
    char *const variable = memory[rank] + (int32_t)address; /* of those that a kernel declares __shared__? */
    if ((variable < memory[0] || variable >= memory[MOST_BLOCKS]) && variable >= &__bss_start && variable < &_end)
        return variable;
    if (rank >= nblock || !blocks[rank].alive || address + n > shared_bytes || address % n) {
        fprintf(stderr,
                "emulator: %zu bytes at %u of %zu bytes of shared memory, block %u of %u, thread %u of block %u, %u\n",
                n, address, shared_bytes, rank, nblock, self->id, blockIdx.x, blockIdx.y);
        abort();
    }
    return memory[rank] + address;
}

char *in_shared(uint32_t address, size_t n) {
    return in_block(self->block, address, n);
}

/* ---- clusters ---- */

void cluster_arrive() {
    has_moved = true;
    self->cluster_phase = cluster.generation;
    cluster.arrived++;
    pass_cluster_barrier();
}

void cluster_wait() {
    while (cluster.generation == self->cluster_phase) yield();
}

static void pass(CountingBarrier &b) {
    if (b.pending || b.bytes) return;
    b.phase++;
    b.pending = b.count;
    has_moved = true;
}

void mbarrier_init(uint32_t barrier, unsigned count) {
    blocks[self->block].counting[barrier] = {count, count, 0, 0, {}};
}

void mbarrier_expect(uint32_t barrier, unsigned bytes) {
    CountingBarrier &b = blocks[self->block].counting.at(barrier);
    b.bytes += bytes;
    b.pending--;
    pass(b);
}

void mbarrier_wait(uint32_t barrier, unsigned parity) {
    CountingBarrier &b = blocks[self->block].counting.at(barrier);
    while (b.phase % 2 == parity) {
        for (const Transfer &t : b.transfers) {
            t.copy();
            b.bytes -= (long)t.n;
        }
        b.transfers.clear();
        pass(b);
        if (b.phase % 2 == parity) yield();
    }
}

void transfer(unsigned rank, uint32_t barrier, size_t n, std::function<void()> copy) {
    has_moved = true;
    blocks[rank].counting.at(barrier).transfers.push_back({n, std::move(copy)});
}

static void go_on(Thread &t, emulator_index first) {
    self = &t;
    shared = memory[t.block];
    blockIdx = {first.x + t.block, first.y, 0};
    emulator_switch(&scheduler, t.stack_pointer);
}

void run_cluster(const std::function<void()> &body, unsigned x, unsigned y, unsigned n, unsigned count,
                 size_t dynamic_shared) {
    if (n > MOST_BLOCKS || count > MOST_THREADS || count % 32 || dynamic_shared > SHARED) {
        fprintf(stderr, "emulator: %u blocks of %u threads and %zu bytes\n", n, count, dynamic_shared);
        abort();
    }
    shared_bytes = dynamic_shared;
    block = &body;
    block_threads = count;
    nblock = n;
    alive = n * count;
    cluster = {};
    for (unsigned b = 0; b < n; b++) {
        Block &one = blocks[b];
        memset(memory[b], 0xff, dynamic_shared); /* NaN */
        memset(one.barriers, 0, sizeof one.barriers);
        one.counting.clear();
        one.alive = count;
        for (unsigned i = 0; i < count; i++) {
            begin_thread(threads[b * count + i], b, i);
            if (i % 32 == 0) memset(one.warps[i / 32].arrived, 0, sizeof one.warps[0].arrived);
        }
    }
    while (alive) {
        bool any_moved = false;
        for (unsigned warp = 0; warp < n * count; warp += 32)
            for (bool warp_moved = true; warp_moved;) { /* as far as it gets: most waits are within a warp */
                warp_moved = false;
                for (unsigned i = warp; i < warp + 32; i++) {
                    if (threads[i].is_done) continue;
                    has_moved = false;
                    go_on(threads[i], {x, y, 0});
                    warp_moved = warp_moved || has_moved;
                }
                any_moved = any_moved || warp_moved;
            }
        if (!alive || any_moved) continue;
        fprintf(stderr, "emulator: the threads of block %u, %u wait for each other\n", x, y);
        abort();
    }
}

void issue(std::function<void()> work) {
    if (captured)
        captured->push_back(std::move(work));
    else
        work();
}

static unsigned setting(const char *name, unsigned otherwise) {
    const char *text = getenv(name);
    return text ? (unsigned)atoi(text) : otherwise;
}

} // namespace emulator

/* ---- the runtime ---- */

using emulator::issue;

struct CUgraph_st {
    std::vector<std::function<void()>> work;
};
struct CUgraphExec_st {
    std::vector<std::function<void()>> work;
};

extern "C" {

static cudaError_t allocate(void **p, size_t n) {
    *p = aligned_alloc(256, (n + 255) / 256 * 256);
    if (!*p) return cudaErrorMemoryAllocation;
    memset(*p, 0xff, n);
    return cudaSuccess;
}
cudaError_t cudaMalloc(void **p, size_t n) {
    return allocate(p, n);
}
cudaError_t cudaMallocHost(void **p, size_t n) {
    return allocate(p, n);
}
cudaError_t cudaFree(void *p) {
    free(p);
    return cudaSuccess;
}
cudaError_t cudaFreeHost(void *p) {
    free(p);
    return cudaSuccess;
}
cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t n, cudaMemcpyKind, cudaStream_t) {
    issue([=] { memcpy(to, from, n); });
    return cudaSuccess;
}
cudaError_t cudaMemsetAsync(void *to, int v, size_t n, cudaStream_t) {
    issue([=] { memset(to, v, n); });
    return cudaSuccess;
}
cudaError_t cudaMemGetInfo(size_t *available, size_t *total) {
    *available = *total = (size_t)8 << 30;
    return cudaSuccess;
}

cudaError_t cudaStreamCreateWithFlags(cudaStream_t *stream, unsigned) {
    *stream = nullptr;
    return cudaSuccess;
}
cudaError_t cudaStreamDestroy(cudaStream_t) {
    return cudaSuccess;
}
cudaError_t cudaStreamSynchronize(cudaStream_t) {
    return cudaSuccess;
}
cudaError_t cudaStreamWaitEvent(cudaStream_t, cudaEvent_t, unsigned) {
    return cudaSuccess;
}
cudaError_t cudaEventCreate(cudaEvent_t *event) {
    *event = nullptr;
    return cudaSuccess;
}
cudaError_t cudaEventCreateWithFlags(cudaEvent_t *event, unsigned) {
    *event = nullptr;
    return cudaSuccess;
}
cudaError_t cudaEventDestroy(cudaEvent_t) {
    return cudaSuccess;
}
cudaError_t cudaEventRecord(cudaEvent_t, cudaStream_t) {
    return cudaSuccess;
}
cudaError_t cudaEventSynchronize(cudaEvent_t) {
    return cudaSuccess;
}
cudaError_t cudaEventElapsedTime(float *ms, cudaEvent_t, cudaEvent_t) {
    *ms = 0;
    return cudaSuccess;
}

cudaError_t cudaGetLastError(void) {
    return cudaSuccess;
}
const char *cudaGetErrorString(cudaError_t error) {
    return error == cudaErrorMemoryAllocation ? "out of memory" : "an error of the emulator";
}
cudaError_t cudaSetDevice(int) {
    return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int *value, cudaDeviceAttr attribute, int) {
    const int capability = (int)emulator::setting("EMULATED_CAPABILITY", 80);
    switch (attribute) {
    case cudaDevAttrMultiProcessorCount:
        *value = (int)emulator::setting("EMULATED_SMS", 5);
        break;
    case cudaDevAttrComputeCapabilityMajor:
        *value = capability / 10;
        break;
    case cudaDevAttrComputeCapabilityMinor:
        *value = capability % 10;
        break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
        *value = (capability == 80 ? 163 : capability >= 90 ? 227 : 99) << 10;
        break;
    default:
        return cudaErrorInvalidValue;
    }
    return cudaSuccess;
}
cudaError_t cudaFuncSetAttribute(const void *, cudaFuncAttribute, int) {
    return cudaSuccess;
}
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes *attributes, const void *) {
    *attributes = cudaFuncAttributes{};
    attributes->ptxVersion = (int)emulator::setting("EMULATED_CAPABILITY", 80);
    return cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveClusters(int *count, const void *, const cudaLaunchConfig_t *config) {
    /* blocks without dynamic shared memory would share what they have */
    *count =
        config->dynamicSmemBytes ? (int)(emulator::setting("EMULATED_SMS", 5) / config->attrs[0].val.clusterDim.x) : 0;
    return cudaSuccess;
}

static CUresult encode(CUtensorMap *map, CUtensorMapDataType, cuuint32_t rank, void *at, const cuuint64_t *sizes,
                       const cuuint64_t *strides, const cuuint32_t *box, const cuuint32_t *, CUtensorMapInterleave,
                       CUtensorMapSwizzle swizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill) {
    EmulatedMap m = {(const char *)at, {1, 1, 1}, {2}, {1, 1, 1}, swizzle == CU_TENSOR_MAP_SWIZZLE_128B};
    for (cuuint32_t i = 0; i < rank; i++) {
        m.sizes[i] = sizes[i];
        m.box[i] = box[i];
        if (i) m.strides[i] = strides[i - 1];
    }
    memcpy(map, &m, sizeof m);
    return CUDA_SUCCESS;
}
cudaError_t cudaGetDriverEntryPointByVersion(const char *, void **found, unsigned, unsigned long long,
                                             cudaDriverEntryPointQueryResult *) {
    *found = reinterpret_cast<void *>(encode);
    return cudaSuccess;
}

cudaError_t cudaStreamBeginCapture(cudaStream_t, cudaStreamCaptureMode) {
    emulator::captured = new std::vector<std::function<void()>>;
    return cudaSuccess;
}
cudaError_t cudaStreamEndCapture(cudaStream_t, cudaGraph_t *graph) {
    *graph = new CUgraph_st{std::move(*emulator::captured)};
    delete emulator::captured;
    emulator::captured = nullptr;
    return cudaSuccess;
}
cudaError_t cudaGraphInstantiate(cudaGraphExec_t *exec, cudaGraph_t graph, unsigned long long) {
    *exec = new CUgraphExec_st{graph->work};
    return cudaSuccess;
}
cudaError_t cudaGraphUpload(cudaGraphExec_t, cudaStream_t) {
    return cudaSuccess;
}
cudaError_t cudaGraphLaunch(cudaGraphExec_t exec, cudaStream_t) {
    for (const auto &work : exec->work) work();
    return cudaSuccess;
}
cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
    delete graph;
    return cudaSuccess;
}
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t exec) {
    delete exec;
    return cudaSuccess;
}

/* ---- the device's table: enough for a test to see that there is one; operators are not emulated ---- */

static int one(void) {
    return 1;
}
static int zero(void) {
    return 0;
}
static lla_status set(int) {
    return LLA_OK;
}
const struct lla_device *lla_cuda_device(void) {
    static lla_device device;
    device.name = "nvidia";
    device.count = one;
    device.current = zero;
    device.set = set;
    return &device;
}
const struct lla_op_table *lla_cuda_ops(void) {
    return nullptr;
}
}
