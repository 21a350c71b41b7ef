/* ops.cu: the table of the LLAISYS operators on NVIDIA GPUs.
 *
 * Operators run on the default stream of the calling thread's current device, and return once their kernels are queued.
 * The one exception is embedding, which must refuse an index outside the table: it waits until the kernel has checked
 * the indices, not until it has copied the rows. */
#include "ops.cuh"

extern "C" {
#include "../ops.h"
}

#include <pthread.h>

/* ---- scratch memory: one allocation a device, made when it is first needed and kept ---- */

enum { PARTIALS_BYTES = 16 << 20 };

/* What the device writes and reads between kernels. */
struct Scratch {
    lla_argmax_scratch argmax;
    lla_index_scratch index;
    alignas(16) lla_rope_step rope_steps[LLA_ROPE_STEPS];
    alignas(16) char partials[PARTIALS_BYTES];
};

/* The lock is held while an operator queues kernels that share scratch memory; the stream keeps those of one operator
 * apart from the next one's. */
struct DeviceScratch {
    pthread_mutex_t lock;
    Scratch *device;          /* device memory; NULL before the first use */
    lla_index_report *report; /* mapped host memory */
    uint64_t ticket;          /* of the last embedding */
    size_t rope_d;            /* what rope_steps was made for; 0: nothing yet */
    double rope_theta;
};

static DeviceScratch scratches[LLA_CUDA_MAX_DEVICES];
static pthread_once_t scratch_once = PTHREAD_ONCE_INIT;

static void make_locks(void) {
    for (int i = 0; i < LLA_CUDA_MAX_DEVICES; i++) pthread_mutex_init(&scratches[i].lock, NULL);
}

static lla_status make_scratch(DeviceScratch *s) {
    const unsigned long long none = ~0ull;
    Scratch *memory = NULL;
    if (!s->report) {
        LLA_CUDA_TRY(cudaHostAlloc(reinterpret_cast<void **>(&s->report), sizeof *s->report, cudaHostAllocMapped),
                     "scratch memory of the operators");
        s->report->ticket = 0;
    }
    LLA_CUDA_TRY(cudaMalloc(reinterpret_cast<void **>(&memory), sizeof *memory), "scratch memory of the operators");
    cudaError_t error = cudaMemset(memory, 0, offsetof(Scratch, rope_steps));
    if (!error) error = cudaMemcpy(&memory->index.lowest, &none, sizeof none, cudaMemcpyHostToDevice);
    if (error) {
        (void)cudaFree(memory);
        return lla_cuda_fail(error, "scratch memory of the operators");
    }
    s->device = memory;
    return LLA_OK;
}

/* Locks the current device's scratch memory; unlock it with pthread_mutex_unlock. */
static lla_status lock_scratch(DeviceScratch **out) {
    int id = 0;
    LLA_CUDA_TRY(cudaGetDevice(&id), "the current device");
    LLA_REQUIRE(id < LLA_CUDA_MAX_DEVICES, LLA_EDEVICE, "nvidia: expected a device id below %d, found %d",
                LLA_CUDA_MAX_DEVICES, id);
    pthread_once(&scratch_once, make_locks);
    DeviceScratch *s = &scratches[id];
    pthread_mutex_lock(&s->lock);
    const lla_status status = s->device ? LLA_OK : make_scratch(s);
    if (status) pthread_mutex_unlock(&s->lock);
    *out = s;
    return status;
}

/* ---- operators ---- */

static lla_status add(llaisysDataType_t dtype, size_t n, const void *a, const void *b, void *c) {
    return lla_cuda_op_add(dtype, n, a, b, c, NULL);
}

static lla_status argmax(llaisysDataType_t dtype, size_t n, const void *values, int64_t *index, void *value) {
    DeviceScratch *s = NULL;
    LLA_TRY(lock_scratch(&s));
    const lla_status status = lla_cuda_op_argmax(dtype, n, values, index, value, &s->device->argmax, NULL);
    pthread_mutex_unlock(&s->lock);
    return status;
}

/* Waits for the check of indices. A kernel that failed never reports: the stream is asked now and then. */
static lla_status wait_for_report(const DeviceScratch *s) {
    const volatile uint64_t *ticket = &s->report->ticket;
    for (unsigned spins = 1; *ticket / 2 != s->ticket; spins++) {
        if (spins % 4096) continue;
        const cudaError_t error = cudaStreamQuery(NULL);
        if (error == cudaErrorNotReady || (error == cudaSuccess && *ticket / 2 == s->ticket)) continue;
        return lla_cuda_fail(error != cudaSuccess ? error : cudaErrorUnknown, "embedding");
    }
    __sync_synchronize(); /* the ticket was written last, and is read first */
    return LLA_OK;
}

static lla_status embedding_locked(DeviceScratch *s, llaisysDataType_t dtype, size_t n, size_t d, size_t vocab,
                                   const int64_t *index, const void *weight, void *out) {
    LLA_TRY(lla_cuda_op_embedding(lla_dtype_size(dtype), n, d, vocab, index, weight, &s->device->index, s->ticket + 1,
                                  s->report, out, NULL));
    s->ticket++;
    LLA_TRY(wait_for_report(s));
    LLA_REQUIRE(s->report->ticket % 2 == 0, LLA_EINVAL, "embedding: index[%lld] is %lld, expected 0 to %zu",
                static_cast<long long>(s->report->position), static_cast<long long>(s->report->index), vocab - 1);
    return LLA_OK;
}

static lla_status embedding(llaisysDataType_t dtype, size_t n, size_t d, size_t vocab, const int64_t *index,
                            const void *weight, void *out) {
    if (n == 0 || d == 0) return LLA_OK;
    DeviceScratch *s = NULL;
    LLA_TRY(lock_scratch(&s));
    const lla_status status = embedding_locked(s, dtype, n, d, vocab, index, weight, out);
    pthread_mutex_unlock(&s->lock);
    return status;
}

static lla_status linear(llaisysDataType_t dtype, size_t m, size_t n, size_t k, const void *x, const void *w,
                         const void *bias, void *out) {
    return lla_cuda_op_linear(dtype, m, n, k, x, w, bias, out, NULL);
}

static lla_status rms_norm(llaisysDataType_t dtype, size_t rows, size_t d, const void *x, const void *w, float eps,
                           void *out) {
    return lla_cuda_op_rms_norm(dtype, rows, d, x, w, eps, out, NULL);
}

static lla_status rope_locked(DeviceScratch *s, llaisysDataType_t dtype, size_t seq, size_t heads, size_t d,
                              const void *x, const int64_t *pos, double theta, void *out) {
    if (s->rope_d != d || s->rope_theta != theta) {
        s->rope_d = 0;
        LLA_TRY(lla_cuda_rope_steps(d, theta, s->device->rope_steps, NULL));
        s->rope_d = d;
        s->rope_theta = theta;
    }
    return lla_cuda_op_rope(dtype, seq, heads, d, x, pos, s->device->rope_steps, out, NULL);
}

static lla_status rope(llaisysDataType_t dtype, size_t seq, size_t heads, size_t d, const void *x, const int64_t *pos,
                       double theta, void *out) {
    DeviceScratch *s = NULL;
    LLA_TRY(lock_scratch(&s));
    const lla_status status = rope_locked(s, dtype, seq, heads, d, x, pos, theta, out);
    pthread_mutex_unlock(&s->lock);
    return status;
}

static lla_status self_attention(llaisysDataType_t dtype, size_t seq, size_t total, size_t nh, size_t nkvh, size_t d,
                                 size_t dv, const void *q, const void *k, const void *v, float scale, void *out) {
    DeviceScratch *s = NULL;
    LLA_TRY(lock_scratch(&s));
    const lla_status status = lla_cuda_op_attention(dtype, seq, total, nh, nkvh, d, dv, q, k, v, scale, out,
                                                    s->device->partials, PARTIALS_BYTES, NULL);
    pthread_mutex_unlock(&s->lock);
    return status;
}

static lla_status swiglu(llaisysDataType_t dtype, size_t n, const void *gate, const void *up, void *out) {
    return lla_cuda_op_swiglu(dtype, n, gate, up, out, NULL);
}

static lla_status rearrange(size_t element, size_t ndim, const size_t *shape, const ptrdiff_t *out_strides, void *out,
                            const ptrdiff_t *in_strides, const void *in) {
    return lla_cuda_op_rearrange(element, ndim, shape, out_strides, out, in_strides, in, NULL);
}

extern "C" const struct lla_op_table *lla_cuda_ops(void) {
    /* in the order of struct lla_op_table */
    static const struct lla_op_table table = {add,  argmax,         embedding, linear,   rms_norm,
                                              rope, self_attention, swiglu,    rearrange};
    return &table;
}
