/* ops.cuh: launchers of the LLAISYS operators on a GPU (contracts in kernels/ops.h).
 *
 * Pointers are device memory of the current device; a launcher queues its kernels on the stream and returns. `dtype` is
 * f32, f16 or bf16. Sizes may be 0. Scratch memory is the caller's, and belongs to the call until the stream has run
 * it. */
#ifndef LLA_CUDA_OPS_CUH
#define LLA_CUDA_OPS_CUH

#include "common.cuh"

lla_status lla_cuda_op_add(llaisysDataType_t dtype, size_t n, const void *a, const void *b, void *c,
                           cudaStream_t stream);

lla_status lla_cuda_op_swiglu(llaisysDataType_t dtype, size_t n, const void *gate, const void *up, void *out,
                              cudaStream_t stream);

lla_status lla_cuda_op_rms_norm(llaisysDataType_t dtype, size_t rows, size_t d, const void *x, const void *w, float eps,
                                void *out, cudaStream_t stream);

/* What RoPE's angle j of d/2 grows by from one position to the next. */
struct lla_rope_step {
    uint64_t turns; /* 1 / (2 pi theta^(2j/d)) modulo 1, in units of 2^-64 */
    double radians; /* 1 / theta^(2j/d) */
};
enum { LLA_ROPE_STEPS = 1 << 16 }; /* at most */
lla_status lla_cuda_rope_steps(size_t d, double theta, struct lla_rope_step *steps, cudaStream_t stream);
lla_status lla_cuda_op_rope(llaisysDataType_t dtype, size_t seq, size_t heads, size_t d, const void *x,
                            const int64_t *pos, const struct lla_rope_step *steps, void *out, cudaStream_t stream);

struct lla_argmax_part {
    float value;
    int64_t index;
};
enum { LLA_ARGMAX_PARTS = 1024 };
struct lla_argmax_scratch {
    unsigned arrived; /* 0 between calls */
    struct lla_argmax_part parts[LLA_ARGMAX_PARTS];
};
lla_status lla_cuda_op_argmax(llaisysDataType_t dtype, size_t n, const void *values, int64_t *index, void *value,
                              struct lla_argmax_scratch *scratch, cudaStream_t stream);

struct lla_index_scratch {
    unsigned long long arrived[2]; /* by the ticket's parity; the next call's is 0 */
    unsigned long long lowest;     /* ULLONG_MAX between calls */
};
/* What a call finds, in mapped host memory. */
struct lla_index_report {
    int64_t position, index; /* of the first index outside the table, if there is one */
    uint64_t ticket;         /* of the call, times two; plus one if it has refused */
};
/* n, d > 0. Writes nothing where an index is outside the table. Tickets count the calls that share scratch memory. */
lla_status lla_cuda_op_embedding(size_t element, size_t n, size_t d, size_t vocab, const int64_t *index,
                                 const void *weight, struct lla_index_scratch *scratch, uint64_t ticket,
                                 struct lla_index_report *host, void *out, cudaStream_t stream);

lla_status lla_cuda_op_rearrange(size_t element, size_t ndim, const size_t *shape, const ptrdiff_t *out_strides,
                                 void *out, const ptrdiff_t *in_strides, const void *in, cudaStream_t stream);

lla_status lla_cuda_op_linear(llaisysDataType_t dtype, size_t m, size_t n, size_t k, const void *x, const void *w,
                              const void *bias, void *out, cudaStream_t stream);

/* partials: `capacity` bytes for the partial results of long caches with few queries. */
lla_status lla_cuda_op_attention(llaisysDataType_t dtype, size_t seq, size_t total, size_t nh, size_t nkvh, size_t d,
                                 size_t dv, const void *q, const void *k, const void *v, float scale, void *out,
                                 void *partials, size_t capacity, cudaStream_t stream);

#endif
