/* ops_attention.cuh: what the two kinds of attention kernels share. */
#ifndef LLA_CUDA_OPS_ATTENTION_CUH
#define LLA_CUDA_OPS_ATTENTION_CUH

#include "ops.cuh"

/* q [seq, nh, d], k [total, nkvh, d], v [total, nkvh, dv], out [seq, nh, dv]; group = nh / nkvh. */
struct lla_attention_shape {
    unsigned seq, total, nh, nkvh, group, d, dv;
    unsigned part_keys; /* keys of a part: see ops_attention.cu */
    float scale, scale_log2;
    bool is_wide; /* rows are aligned to 16 bytes */
};

/* Any dtype, any head size, f32 arithmetic. */
lla_status lla_cuda_attention_any(llaisysDataType_t dtype, lla_attention_shape s, const void *q, const void *k,
                                  const void *v, void *out, cudaStream_t stream);

#endif
