/* ptx.cuh: every piece of inline PTX, as functions. */
#ifndef LLA_PTX_CUH
#define LLA_PTX_CUH

#ifdef LLA_PTX /* another implementation: the emulator's, for tests without a GPU */
#include LLA_PTX
#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdint.h>

/* ---- tensor cores ---- */

/* c [16, 8] += a [16, 16] b [16, 8], f32 accumulators, in the fragment layout of mma.m16n8k16. */
template <class T> __device__ __forceinline__ void mma_16816(float (&c)[4], const uint4 &a, const uint2 &b);

template <> __device__ __forceinline__ void mma_16816<__nv_bfloat16>(float (&c)[4], const uint4 &a, const uint2 &b) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b.x), "r"(b.y));
}

template <> __device__ __forceinline__ void mma_16816<__half>(float (&c)[4], const uint4 &a, const uint2 &b) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b.x), "r"(b.y));
}

/* ---- memory ---- */

/* 16 bytes that are read once: past the first-level cache. */
__device__ __forceinline__ uint4 load_stream(const void *p) {
    uint4 v;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(p));
    return v;
}

/* Asks for the line of an address ahead of a load. */
__device__ __forceinline__ void prefetch_l1(const void *p) {
    asm volatile("prefetch.global.L1 [%0];" ::"l"(p));
}

__device__ __forceinline__ void prefetch_l2(const void *p) {
    asm volatile("prefetch.global.L2 [%0];" ::"l"(p));
}

/* Nanoseconds of a clock that all blocks share. */
__device__ __forceinline__ unsigned long long global_ns() {
    unsigned long long t;
    asm volatile("mov.u64 %0, %globaltimer;" : "=l"(t));
    return t;
}

__device__ __forceinline__ unsigned sm_id() {
    unsigned id;
    asm volatile("mov.u32 %0, %smid;" : "=r"(id));
    return id;
}

/* 2^x to 2 units in the last place of f32; 0 below the normal range. */
__device__ __forceinline__ float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

/* Makes the compiler forget what it knows of a value, so that what it derived from it does not stay in registers. */
__device__ __forceinline__ void make_opaque(uint4 &v) {
    asm volatile("" : "+r"(v.x), "+r"(v.y), "+r"(v.z), "+r"(v.w));
}

/* ---- shared memory: asynchronous copies and matrix loads ---- */

__device__ __forceinline__ uint32_t shared_address(const void *p) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

__device__ __forceinline__ void store_shared_16(uint32_t to, uint4 v) {
    asm volatile("st.shared.v4.u32 [%0], {%1,%2,%3,%4};" ::"r"(to), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
}

__device__ __forceinline__ uint4 load_shared_16(uint32_t from) {
    uint4 v;
    asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "r"(from)
                 : "memory");
    return v;
}

__device__ __forceinline__ uint32_t load_shared_4(uint32_t from) {
    uint32_t v;
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(v) : "r"(from) : "memory");
    return v;
}

/* Copies 16 bytes to shared memory in the background; writes zeros, and reads nothing, where it is not valid. */
__device__ __forceinline__ void cp_async_16(uint32_t to, const void *from, bool valid) {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(valid ? 16 : 0)
                 : "memory");
}

/* Policies for copies: whether the second-level cache lets a line go before all others, or in its turn. What a step
 * reads once, and as much of it as weights are, would otherwise push out all that is read again. */
__device__ __forceinline__ uint64_t evict_first() {
    uint64_t policy;
    asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    return policy;
}

__device__ __forceinline__ uint64_t evict_normal() {
    uint64_t policy;
    asm("createpolicy.fractional.L2::evict_normal.b64 %0, 1.0;" : "=l"(policy));
    return policy;
}

/* The same under a policy. Not for a shared address that is the sum of a thread's part and one that all threads share:
 * ptxas 13.0 makes an instruction of it that the GPU calls illegal. */
__device__ __forceinline__ void cp_async_16(uint32_t to, const void *from, bool valid, uint64_t policy) {
    asm volatile("cp.async.cg.shared.global.L2::cache_hint.L2::128B [%0], [%1], 16, %2, %3;" ::"r"(to), "l"(from),
                 "r"(valid ? 16 : 0), "l"(policy)
                 : "memory");
}

/* Ends a group of copies; every thread calls it the same number of times. */
__device__ __forceinline__ void cp_async_commit() {
    asm volatile("cp.async.commit_group;" ::: "memory");
}

/* Waits until at most N of the thread's newest groups are under way. */
template <int N> __device__ __forceinline__ void cp_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

/* Four 8 x 8 matrices of 16-bit elements; lane l gives the address of row l % 8 of matrix l / 8. */
__device__ __forceinline__ uint4 ldmatrix_x4(uint32_t address) {
    uint4 r;
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r.x), "=r"(r.y), "=r"(r.z), "=r"(r.w)
                 : "r"(address)
                 : "memory");
    return r;
}

__device__ __forceinline__ uint4 ldmatrix_x4_trans(uint32_t address) {
    uint4 r;
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r.x), "=r"(r.y), "=r"(r.z), "=r"(r.w)
                 : "r"(address)
                 : "memory");
    return r;
}

/* Transposes an 8 x 8 matrix of 16-bit elements that a warp holds: lane l has elements 2 (l % 4), + 1 of row l / 4. */
__device__ __forceinline__ uint32_t transpose_8x8(uint32_t v) {
    uint32_t r;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(r) : "r"(v));
    return r;
}

/* ---- barriers of part of a block ---- */

/* Waits for so many threads of the block, whole warps, at barrier `id`, 1 to 15. */
__device__ __forceinline__ void barrier_sync(int id, int threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

/* ---- thread-block clusters (sm_90 and newer; nothing elsewhere) ---- */

/* The cluster's barrier, in halves: what a thread wrote before it arrives, to any block's shared memory, is seen by
 * those that have waited. Every thread of the cluster calls both, in turns. */
__device__ __forceinline__ void cluster_arrive() {
#if __CUDA_ARCH__ >= 900
    asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
#endif
}

__device__ __forceinline__ void cluster_wait() {
#if __CUDA_ARCH__ >= 900
    asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}

/* Arrives without a promise about what was written before. */
__device__ __forceinline__ void cluster_arrive_relaxed() {
#if __CUDA_ARCH__ >= 900
    asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
#endif
}

/* 16 bytes of block `rank`'s shared memory, at an address as in this block. */
__device__ __forceinline__ uint4 load_cluster_16(uint32_t from, unsigned rank) {
    uint4 v = make_uint4(0, 0, 0, 0);
#if __CUDA_ARCH__ >= 900
    uint32_t there;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(from), "r"(rank));
    asm volatile("ld.shared::cluster.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "r"(there)
                 : "memory");
#endif
    return v;
}

/* A barrier in shared memory for `count` arrivals and the bytes that they expect; the cluster sees it after its next
 * barrier. */
__device__ __forceinline__ void mbarrier_init(uint32_t barrier, unsigned count) {
#if __CUDA_ARCH__ >= 900
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;\n fence.mbarrier_init.release.cluster;" ::"r"(barrier),
                 "r"(count)
                 : "memory");
#endif
}

/* Arrives, and lets the barrier's phase last until so many bytes have come. */
__device__ __forceinline__ void mbarrier_expect(uint32_t barrier, unsigned bytes) {
#if __CUDA_ARCH__ >= 900
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
#endif
}

__device__ __forceinline__ void mbarrier_wait(uint32_t barrier, unsigned parity) {
#if __CUDA_ARCH__ >= 900
    unsigned done = 0;
    while (!done)
        asm volatile("{\n .reg .pred p;\n mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
                     " selp.u32 %0, 1, 0, p;\n}"
                     : "=r"(done)
                     : "r"(barrier), "r"(parity)
                     : "memory");
#endif
}

/* Makes this thread's writes to shared memory visible to copies that are started after the next block barrier. */
__device__ __forceinline__ void fence_shared_async() {
#if __CUDA_ARCH__ >= 900
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

/* Copies from this block's shared memory to that of block `rank` of the cluster, in the background; `to` and `barrier`
 * are addresses as in this block. */
__device__ __forceinline__ void copy_to_cluster(uint32_t to, uint32_t from, unsigned bytes, uint32_t barrier,
                                                unsigned rank) {
#if __CUDA_ARCH__ >= 900
    uint32_t there, signal;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(to), "r"(rank));
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(signal) : "r"(barrier), "r"(rank));
    asm volatile(
        "cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(there),
        "r"(from), "r"(bytes), "r"(signal)
        : "memory");
#endif
}

/* Stores 16 bytes to the shared memory of block `rank` of the cluster; `to` is an address as in this block. */
__device__ __forceinline__ void store_cluster_16(uint32_t to, unsigned rank, const float (&v)[4]) {
#if __CUDA_ARCH__ >= 900
    uint32_t there;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(to), "r"(rank));
    asm volatile("st.shared::cluster.v4.f32 [%0], {%1,%2,%3,%4};" ::"r"(there), "f"(v[0]), "f"(v[1]), "f"(v[2]),
                 "f"(v[3])
                 : "memory");
#endif
}

/* ---- programmatic dependent launch (sm_90 and newer; nothing elsewhere) ---- */

/* Lets the next kernel of the stream start; it may not read what this one writes before its own pdl_wait(). */
__device__ __forceinline__ void pdl_launch_next() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

/* Waits until the kernels before have finished and their writes are visible. */
__device__ __forceinline__ void pdl_wait() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

#endif
#endif
