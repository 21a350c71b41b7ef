/* code_fetch.cu: what code costs the first time it runs: cycles of straight code, cold and warm, and how much other
 * code may run between two runs of it before it is cold again.
 *
 *   nvcc -O3 -std=c++17 -arch=sm_90 profiles/code_fetch.cu -o code_fetch && ./code_fetch */
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cuda_runtime.h>
#include <vector>

#define CHECK(x)                                                                                                       \
    do {                                                                                                               \
        cudaError_t e_ = (x);                                                                                          \
        if (e_) {                                                                                                      \
            printf("%s: %s\n", #x, cudaGetErrorString(e_));                                                            \
            return 1;                                                                                                  \
        }                                                                                                              \
    } while (0)

/* KB of code: 64 instructions each. */
template <int KB, int ID> struct Code {
    static __device__ __forceinline__ void run(float (&v)[4], float a, float b) {
#pragma unroll
        for (int i = 0; i < KB * 16; i++)
#pragma unroll
            for (int j = 0; j < 4; j++) asm volatile("fma.rn.f32 %0, %0, %1, %2;" : "+f"(v[j]) : "f"(a), "f"(b));
    }
};

template <int KB, int ID> __global__ void code(float a, float b, unsigned *cycles, float *sink, int passes) {
    float v[4] = {a, b, a + b, a - b};
    unsigned t[3] = {};
#pragma unroll 1
    for (int p = 0; p < passes; p++) {
        unsigned from, to;
        asm volatile("mov.u32 %0, %%clock;" : "=r"(from)::"memory");
        Code<KB, ID>::run(v, a, b);
        asm volatile("mov.u32 %0, %%clock;" : "=r"(to)::"memory");
        t[p] = to - from;
    }
    if (threadIdx.x == 0 && cycles)
        for (int p = 0; p < passes; p++) cycles[blockIdx.x * 3 + p] = t[p];
    if (v[0] == 12345 && v[1] + v[2] + v[3] == 7) *sink = ID;
}

static unsigned *cycles;
static float *sink;
static unsigned median(int p) {
    std::vector<unsigned> host(132 * 3);
    cudaMemcpy(host.data(), cycles, host.size() * 4, cudaMemcpyDeviceToHost);
    std::vector<unsigned> v;
    for (int i = 0; i < 132; i++) v.push_back(host[i * 3 + p]);
    std::sort(v.begin(), v.end());
    return v[66];
}

template <int KB> static void first_second(int threads) {
    for (int i = 0; i < 3; i++) {
        code<256, 9><<<132, 32>>>(1, 2, nullptr, sink, 1);
        code<KB, 1><<<132, threads>>>(1, 2, cycles, sink, 3);
    }
    cudaDeviceSynchronize();
    printf("%4d KB, %3d threads: cold %6u, then %6u, %6u cycles; %d instructions\n", KB, threads, median(0), median(1),
           median(2), KB * 64);
}
template <int OTHER> static void between() {
    for (int i = 0; i < 4; i++) {
        if (OTHER) code<OTHER ? OTHER : 1, 2><<<132, 32>>>(1, 2, nullptr, sink, 1);
        code<8, 1><<<132, 32>>>(1, 2, cycles, sink, 2);
    }
    cudaDeviceSynchronize();
    printf("8 KB behind %3d KB of another kernel: %6u cycles, again %6u\n", OTHER, median(0), median(1));
}
int main() {
    CHECK(cudaMalloc(&cycles, 132 * 3 * 4));
    CHECK(cudaMalloc(&sink, 4));
    first_second<1>(32);
    first_second<2>(32);
    first_second<4>(32);
    first_second<8>(32);
    first_second<16>(32);
    first_second<32>(32);
    first_second<64>(32);
    first_second<96>(32);
    first_second<128>(32);
    first_second<192>(32);
    first_second<4>(256);
    first_second<16>(256);
    between<0>();
    between<4>();
    between<16>();
    between<32>();
    between<48>();
    between<64>();
    between<96>();
    between<112>();
    between<128>();
    between<160>();
    between<192>();
    CHECK(cudaGetLastError());
}
