/* limits.cu: the plainest kernels that read or copy memory: what other kernels' bandwidth is held against.
 *
 *     nvcc -O3 -shared -Xcompiler -fPIC -cudart static -gencode arch=compute_90a,code=sm_90a profiles/limits.cu -o
 * build/liblimits.so */
#include <cuda_runtime.h>
#include <stddef.h>
#include <stdint.h>

static __device__ __forceinline__ uint4 load(const uint4 *p) {
    uint4 v;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(p));
    return v;
}

/* Two blocks an SM, eight loads of 16 bytes under way in each thread. */
__global__ void __launch_bounds__(1024, 2) read_all(const uint4 *p, size_t n, uint32_t *sink) {
    const size_t step = (size_t)gridDim.x * 1024;
    uint32_t x = 0;
    size_t i = (size_t)blockIdx.x * 1024 + threadIdx.x;
    for (; i + 7 * step < n; i += 8 * step) {
        uint4 v[8];
#pragma unroll
        for (int u = 0; u < 8; u++) v[u] = load(p + i + u * step);
#pragma unroll
        for (int u = 0; u < 8; u++) x ^= v[u].x ^ v[u].y ^ v[u].z ^ v[u].w;
    }
    for (; i < n; i += step) x ^= load(p + i).x;
    if (x == 0x9e3779b9u) *sink = x; /* keeps the loads */
}

template <int PACKS> __global__ void __launch_bounds__(256) copy_all(const uint4 *from, uint4 *to, size_t n) {
    const size_t i = (size_t)blockIdx.x * (256 * PACKS) + threadIdx.x;
    uint4 v[PACKS];
#pragma unroll
    for (int u = 0; u < PACKS; u++)
        if (i + u * 256 < n) v[u] = load(from + i + u * 256);
#pragma unroll
    for (int u = 0; u < PACKS; u++)
        if (i + u * 256 < n) to[i + u * 256] = v[u];
}

extern "C" void limit_read(const void *p, size_t bytes, void *sink) {
    int sm_count = 0, id = 0;
    cudaGetDevice(&id);
    cudaDeviceGetAttribute(&sm_count, cudaDevAttrMultiProcessorCount, id);
    read_all<<<2 * sm_count, 1024>>>((const uint4 *)p, bytes / 16, (uint32_t *)sink);
}

/* variant 0, 1, 2: one, two, four packs a thread. */
extern "C" void limit_copy(const void *from, void *to, size_t bytes, int variant) {
    const size_t n = bytes / 16;
    const uint4 *f = (const uint4 *)from;
    uint4 *t = (uint4 *)to;
    if (variant == 0) copy_all<1><<<(unsigned)((n + 255) / 256), 256>>>(f, t, n);
    if (variant == 1) copy_all<2><<<(unsigned)((n + 511) / 512), 256>>>(f, t, n);
    if (variant == 2) copy_all<4><<<(unsigned)((n + 1023) / 1024), 256>>>(f, t, n);
}
