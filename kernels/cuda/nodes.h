/* nodes.h: launchers of the step's nodes on a GPU, and the packed form in which a GPU arena holds weights.
 *
 * Packed weights. A weight [rows, cols] is cut into tiles of 16 rows by 16 columns, both padded with zeros. A tile lies
 * in the order in which mma.m16n8k16 wants its 16-row operand: lane l = 4 g + t of a warp holds eight elements, for
 * rows g and g + 8, (g, 2t) (g, 2t+1) (g+8, 2t) (g+8, 2t+1) (g, 2t+8) (g, 2t+9) (g+8, 2t+8) (g+8, 2t+9) in 16 bytes (32
 * for f32). Tiles of one row block follow each other along the columns, so that a warp reads its weights as one forward
 * stream of 512-byte pieces, straight into registers. Rows may be paired: row g of a tile and row g + 8 are then rows j
 * and j + half of a group of 2 half rows: the halves that RoPE rotates together (half = head_dim / 2), or a gate and
 * its up row (half = ffn), so that the two meet in one thread.
 *
 * Sums. A row's K is cut into eight contiguous parts; a part is summed by the tensor core in order of K, and the parts'
 * sums are added in order. A norm adds the squares that who wrote x has added by 16 (step_math.cuh). Neither the number
 * of rows in the step, nor the bucket, nor the kernel that the bucket takes enters. That holds for finite values: a
 * kernel may multiply its neighbours' columns by zero, and infinity times zero is NaN.
 *
 * Draws. The sample node's token of a row follows from the row's logits, its sampling parameters and its known tokens
 * alone: sums are of integers, and the random number is of seed and position. From the same logits it is lla_cpu_draw's
 * token, to the bit. So a request with a seed gives the same text in any batch, alone, after preemption and with a
 * prefix from the cache, on one device; on another device, or the CPU, logits may differ in their last bits, and a draw
 * that falls between two tokens may then turn out otherwise. */
#ifndef LLA_CUDA_NODES_H
#define LLA_CUDA_NODES_H

#include "../kernels.h"

#ifdef __cplusplus
extern "C" {
#endif

enum { LLA_TILE = 16 };

/* When a block of a kernel ran, in ns of the GPU's clock, where the build has -Dstep_trace=true: it began; the kernels
 * before it had finished; its activations lay in shared memory; it ended. */
enum lla_block_event { LLA_BLOCK_BEGAN, LLA_BLOCK_FREE, LLA_BLOCK_STAGED, LLA_BLOCK_ENDED, LLA_BLOCK_EVENTS };
struct lla_block_times {
    unsigned long long ns[LLA_BLOCK_EVENTS];
    unsigned long long sm;
};
enum { LLA_TRACE_BLOCKS = 1024 };

/* What a launcher needs beside the node's arguments. */
struct lla_cuda_ctx {
    char *arena; /* device memory */
    struct lla_dims dims;
    struct lla_io io;
    size_t rows, logits;           /* of the bucket: at most */
    int sm_count, compute;         /* compute: capability that device and code have, 80, 89, 90 */
    size_t max_smem;               /* bytes of shared memory that a block may have */
    int pdl;                       /* programmatic dependent launch on every edge */
    void *stream;                  /* cudaStream_t */
    struct lla_block_times *trace; /* [LLA_TRACE_BLOCKS] of this node; NULL: nobody asks */
};

#define X(NAME, suffix)                                                                                                \
    lla_status lla_cuda_##suffix(const struct lla_cuda_ctx *ctx, const struct lla_##suffix##_args *args);
LLA_NODE_OPS(X)
#undef X

/* Bytes of a packed weight. */
size_t lla_cuda_packed_bytes(llaisysDataType_t dtype, size_t rows, size_t cols);

/* Packs rows [dst_row, dst_row + rows) of a weight from dense device memory src [rows, cols]; half 0: unpaired. The
 * weight's padding must be zero before. */
lla_status lla_cuda_pack(llaisysDataType_t dtype, const void *src, size_t rows, size_t cols, size_t dst_row,
                         size_t half, void *packed, void *stream);

#ifdef __cplusplus
}
#endif

#endif
