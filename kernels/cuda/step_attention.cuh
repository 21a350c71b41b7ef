/* step_attention.cuh: what the step's attention kernels share: their operands, and the items of a step's work. */
#ifndef LLA_STEP_ATTENTION_CUH
#define LLA_STEP_ATTENTION_CUH

#include "attention_tile.cuh"

struct Attention {
    const lla_step_header *header;
    const int32_t *positions, *row_seq, *table;
    const void *q, *k_cache, *v_cache;
    void *out;
    float *partial;   /* [max_splits, nhead, dim + 2]: output, maximum, sum of a split; each kernel's own order */
    int32_t *arrived; /* [max_rows, nkvhead], zero between steps */
    size_t nhead, nkvhead, dim, kv_block, max_blocks, max_splits;
    unsigned max_rows;      /* of the bucket */
    unsigned group, chunks; /* query heads of a KV head, and eights of them */
    unsigned per_run;       /* KV heads times chunks */
    unsigned block_bits;    /* 2^block_bits tokens a KV block */
    lla_block_times *trace;
};

/* Row and first slot of an item of the step; every thread computes the same. Items are numbered by row, then split. */
struct Place {
    size_t row, split, nsplit, slot0; /* slot0: the row's first slot in `partial` */
};

__device__ inline Place locate(const int32_t *positions, size_t rows, size_t item) {
    size_t slot = 0;
    for (size_t r = 0; r < rows; r++) {
        const size_t n = (size_t)positions[r] / SPLIT + 1;
        if (item < slot + n) return Place{r, item - slot, n, slot};
        slot += n;
    }
    return Place{rows, 0, 0, slot};
}

/* The first position of this step that belongs to the row's sequence: those before were written by earlier steps. */
__device__ inline size_t first_new(const int32_t *positions, const int32_t *row_seq, size_t row) {
    while (row > 0 && row_seq[row - 1] == row_seq[row]) row--;
    return (size_t)positions[row];
}

/* Whether the last of `parts` blocks has arrived at the counter, which it then leaves at zero; all threads of the block
 * call it, after their writes, and may then read the other blocks'. */
__device__ inline bool is_last_block(int32_t *arrived, size_t parts) {
    __shared__ bool is_last;
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) {
        is_last = atomicAdd(arrived, 1) == (int32_t)parts - 1;
        if (is_last) *arrived = 0;
    }
    __syncthreads();
    __threadfence();
    return is_last;
}

/* For steps of many rows: lla_many_attention() where it takes the shape. */
bool lla_many_attention_takes(const lla_cuda_ctx *ctx);
lla_status lla_many_attention(const lla_cuda_ctx *ctx, const Attention &a);

/* For shapes that the tensor cores' kernels do not take. */
lla_status lla_cuda_attention_any(const lla_cuda_ctx *ctx, const Attention &a);

#endif
