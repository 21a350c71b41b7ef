/* gemm_tiles.cu: times every tile of the tensor-core product on the model's shapes, and shows which one lla_gemm_choose
 * takes.
 *
 *     nvcc -O3 -std=c++17 -arch=native profiles/gemm_tiles.cu kernels/cuda/gemm*.cu kernels/cuda/device.cu \
 *         build/librefrain.a.p/base_status.c.o -o build/gemm_tiles && build/gemm_tiles
 */
#include "../kernels/cuda/gemm.cuh"

#include <algorithm>
#include <stdio.h>

__global__ void fill(__nv_bfloat16 *p, size_t n, uint32_t seed) {
    const size_t i = (size_t)blockIdx.x * 256 + threadIdx.x;
    uint32_t h = (uint32_t)i * 2654435761u ^ seed;
    h = (h ^ (h >> 15)) * 2246822519u;
    if (i < n) p[i] = __float2bfloat16((float)(h >> 8) * 0x1p-23f - 1.0f);
}

__global__ void spin(long long cycles) {
    const long long start = clock64();
    while (clock64() - start < cycles) {}
}

#define CHECK(call)                                                                                                    \
    do {                                                                                                               \
        cudaError_t e_ = (call);                                                                                       \
        if (e_ != cudaSuccess) {                                                                                       \
            fprintf(stderr, "%s: %s\n", #call, cudaGetErrorString(e_));                                                \
            return 1;                                                                                                  \
        }                                                                                                              \
    } while (0)

static const struct {
    const char *name;
    unsigned bm, bn;
} tiles[] = {
#define X(name, bm, bn, ...) {#name, bm, bn},
    LLA_GEMM_TILES_TABLE(X)
#undef X
};

int main(void) {
    static const size_t shapes[][3] = {
        {512, 4096, 4096},  {1024, 2048, 1536}, {2048, 2048, 1536},  {4096, 2048, 1536},  {1024, 1536, 1536},
        {2048, 1536, 1536}, {4096, 1536, 1536}, {1024, 17920, 1536}, {2048, 17920, 1536}, {4096, 17920, 1536},
        {1024, 1536, 8960}, {2048, 1536, 8960}, {4096, 1536, 8960},  {64, 17920, 1536},   {64, 1536, 8960},
        {64, 2048, 1536},   {256, 17920, 1536}, {256, 1536, 8960},   {256, 2048, 1536},   {8192, 8192, 8192}};
    const size_t most = (size_t)8192 * 17920;
    __nv_bfloat16 *x, *w, *out;
    CHECK(cudaMalloc(&x, most * 2));
    CHECK(cudaMalloc(&w, most * 2));
    CHECK(cudaMalloc(&out, most * 2));
    fill<<<(unsigned)((most + 255) / 256), 256>>>(x, most, 1);
    fill<<<(unsigned)((most + 255) / 256), 256>>>(w, most, 2);
    const struct lla_cuda_facts *facts;
    if (lla_cuda_facts_get(&facts)) return 1;
    cudaEvent_t start, end;
    CHECK(cudaEventCreate(&start));
    CHECK(cudaEventCreate(&end));
    printf("%22s", "us (TFLOP/s)");
    for (int i = 0; i < LLA_GEMM_TILE_COUNT; i++) printf("%16s", tiles[i].name);
    printf("  chosen\n");
    for (const auto &s : shapes) {
        const struct lla_gemm_args args = {s[0], s[1], s[2], x, w, w, out};
        const struct lla_gemm_choice chosen = lla_gemm_choose(LLAISYS_DTYPE_BF16, s[0], s[1], s[2], true, facts);
        printf("%6zu x %5zu x %5zu", s[0], s[1], s[2]);
        for (int i = 0; i < LLA_GEMM_TILE_COUNT; i++) {
            struct lla_gemm_choice c = {};
            c.kind = LLA_GEMM_TILES;
            c.tile = (enum lla_gemm_tile)i;
            c.rows = (unsigned)ceil_div(s[0], tiles[i].bm);
            c.columns = (unsigned)ceil_div(s[1], tiles[i].bn);
            const int repeats = s[0] == 8192 ? 4 : 12;
            float times[3];
            for (int round = 0; round < 3; round++) {
                spin<<<1, 1>>>(400000);
                CHECK(cudaEventRecord(start));
                for (int r = 0; r < repeats; r++)
                    if (lla_gemm_tiles_bf16(&args, c, NULL)) {
                        fprintf(stderr, "%s\n", lla_last_error());
                        return 1;
                    }
                CHECK(cudaEventRecord(end));
                CHECK(cudaEventSynchronize(end));
                CHECK(cudaEventElapsedTime(&times[round], start, end));
            }
            std::sort(times, times + 3);
            const double us = times[1] * 1e3 / repeats;
            printf("%8.1f (%4.0f) ", us, 2.0 * s[0] * s[1] * s[2] / us / 1e6);
        }
        char text[64];
        printf("  %s\n", lla_gemm_choice_text(chosen, text, sizeof text));
        fflush(stdout);
    }
    return 0;
}
