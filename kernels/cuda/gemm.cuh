/* gemm.cuh: out [m, n] = x [m, k] w[n, k]^T + bias [n]: the ways to compute it on a GPU, and the choice among them.
 *
 * Numbers: the tensor-core tiles add the products of an output in order of k, 16 at a time, in one accumulator,
 * whatever the tile. An output's bits so depend on its row of x and its row of w alone, not on m, for all m above
 * LLA_GEMM_FEW_ROWS; below, K is cut into parts whose number depends on n alone. */
#ifndef LLA_CUDA_GEMM_CUH
#define LLA_CUDA_GEMM_CUH

#include "ops.cuh"

enum lla_gemm_kind {
    LLA_GEMM_SIMT,     /* gemm_simt.cu: f32 arithmetic; any dtype, k and alignment */
    LLA_GEMM_FEW_F32,  /* gemm_simt.cu: f32, few rows, bound by reading w */
    LLA_GEMM_FEW_ROWS, /* gemm_few.cu: 16-bit, few rows, bound by reading w */
    LLA_GEMM_TILES,    /* gemm_tiles.cuh: 16-bit, tensor cores */
    /* a version for sm_90's wgmma and TMA goes here */
};

enum { LLA_GEMM_MAX_FEW_ROWS = 16, LLA_GEMM_MAX_FEW_ROWS_F32 = 8 };

/* Tiles of the tensor-core kernel: name, block tile M x N, warps along M and N, K and depth of its ring in shared
 * memory. */
#define LLA_GEMM_TILES_TABLE(X)                                                                                        \
    X(128x256, 128, 256, 2, 4, 64, 4)                                                                                  \
    X(128x192, 128, 192, 2, 4, 64, 4)                                                                                  \
    X(128x128, 128, 128, 2, 2, 64, 3)                                                                                  \
    X(128x96, 128, 96, 2, 2, 64, 3)                                                                                    \
    X(64x128, 64, 128, 2, 2, 64, 4)                                                                                    \
    X(64x64, 64, 64, 2, 2, 64, 4)

enum lla_gemm_tile {
#define X(name, ...) LLA_GEMM_##name,
    LLA_GEMM_TILES_TABLE(X)
#undef X
        LLA_GEMM_TILE_COUNT
};

struct lla_gemm_choice {
    enum lla_gemm_kind kind;
    enum lla_gemm_tile tile; /* LLA_GEMM_TILES */
    unsigned rows, columns;  /* LLA_GEMM_TILES: tiles along m and n */
    unsigned warps;          /* LLA_GEMM_FEW_ROWS: parts of K */
};

/* Pure: the same sizes give the same choice. is_wide: k is a multiple of 8 (of 4 for f32) and pointers are aligned to
 * 16 bytes. */
struct lla_gemm_choice lla_gemm_choose(llaisysDataType_t dtype, size_t m, size_t n, size_t k, bool is_wide,
                                       const struct lla_cuda_facts *facts);

/* "tiles 128x256, 8 x 70 of them" */
const char *lla_gemm_choice_text(struct lla_gemm_choice choice, char *text, size_t size);

struct lla_gemm_args {
    size_t m, n, k;
    const void *x, *w, *bias; /* bias may be NULL */
    void *out;
};

lla_status lla_gemm_simt(llaisysDataType_t dtype, const struct lla_gemm_args *args, cudaStream_t stream);
lla_status lla_gemm_few_f32(const struct lla_gemm_args *args, cudaStream_t stream);
lla_status lla_gemm_few_rows(llaisysDataType_t dtype, const struct lla_gemm_args *args, unsigned warps,
                             cudaStream_t stream);
lla_status lla_gemm_tiles_f16(const struct lla_gemm_args *args, struct lla_gemm_choice choice, cudaStream_t stream);
lla_status lla_gemm_tiles_bf16(const struct lla_gemm_args *args, struct lla_gemm_choice choice, cudaStream_t stream);

#endif
