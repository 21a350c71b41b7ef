/* exec_cuda.cu: capture and replay (see exec_cuda.h). */
#include "exec_cuda.h"

#include "../kernels/cuda/nodes.h"
#include "../kernels/cuda/ptx.cuh"

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdlib>
#include <vector>

#define CUDA_TRY(call)                                                                                                 \
    do {                                                                                                               \
        const cudaError_t error_ = (call);                                                                             \
        if (error_ != cudaSuccess) return lla_fail(LLA_EDEVICE, "%s: %s", #call, cudaGetErrorString(error_));          \
    } while (0)

struct lla_exec_cuda {
    const lla_graph *graph;
    lla_cuda_ctx ctx;
    int device_id;
    cudaStream_t stream;
    char *mirror;               /* pinned: the step region's inputs and the chosen tokens */
    size_t inputs, input_bytes; /* the inputs' offset in the arena, and their size */
    char *staging;              /* device: rows of a weight on their way into packed form */
    cudaGraphExec_t graphs[64];
    size_t ngraph;
};

enum { STAGING = 64 << 20 };

static __global__ void read_kernel(const uint4 *p, size_t n, uint32_t *sink);

static lla_status use(const lla_exec_cuda *exec) {
    CUDA_TRY(cudaSetDevice(exec->device_id));
    return LLA_OK;
}

lla_status lla_exec_cuda_available(int device_id, size_t *nbytes) {
    size_t total;
    CUDA_TRY(cudaSetDevice(device_id));
    CUDA_TRY(cudaMemGetInfo(nbytes, &total));
    return LLA_OK;
}

static lla_status create(lla_exec_cuda *exec) {
    const lla_graph *g = exec->graph;
    LLA_TRY(use(exec));
    int sms, major, minor, smem;
    CUDA_TRY(cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, exec->device_id));
    CUDA_TRY(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, exec->device_id));
    CUDA_TRY(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, exec->device_id));
    CUDA_TRY(cudaDeviceGetAttribute(&smem, cudaDevAttrMaxSharedMemoryPerBlockOptin, exec->device_id));
    CUDA_TRY(cudaStreamCreateWithFlags(&exec->stream, cudaStreamNonBlocking));
    CUDA_TRY(cudaMalloc((void **)&exec->ctx.arena, g->plan.total));
    CUDA_TRY(cudaMemsetAsync(exec->ctx.arena, 0, g->plan.total, exec->stream));

    /* step inputs lie together, from the header to the sampling parameters, with the chosen tokens behind */
    exec->inputs = g->io.header;
    exec->input_bytes = g->offset[LLA_B_NEXT] - g->io.header;
    CUDA_TRY(cudaMallocHost((void **)&exec->mirror, exec->input_bytes + g->dims.max_seqs * sizeof(int32_t)));
    memset(exec->mirror, 0, exec->input_bytes + g->dims.max_seqs * sizeof(int32_t));

    exec->ctx.dims = g->dims;
    exec->ctx.io = g->io;
    exec->ctx.sm_count = sms;
    exec->ctx.compute = 10 * major + minor;
    exec->ctx.max_smem = (size_t)smem;
    /* what compute capability 9 has must be in the code, too: PTX for older GPUs that the driver compiled lacks it */
    cudaFuncAttributes code;
    CUDA_TRY(cudaFuncGetAttributes(&code, (const void *)read_kernel));
    exec->ctx.pdl = major >= 9 && code.ptxVersion >= 90;
    exec->ctx.stream = exec->stream;

    const size_t rope_bytes = g->plan.limits.max_seq * g->dims.head_dim * lla_dtype_size(g->dims.dtype);
    void *rope = malloc(rope_bytes);
    if (!rope) return lla_fail(LLA_ENOMEM, "no memory for a RoPE table of %zu bytes", rope_bytes);
    lla_rope_table(g->dims.dtype, g->plan.limits.max_seq, g->dims.head_dim, g->plan.spec.theta, rope);
    const cudaError_t error = cudaMemcpyAsync(exec->ctx.arena + g->offset[LLA_B_ROPE], rope, rope_bytes,
                                              cudaMemcpyHostToDevice, exec->stream);
    const cudaError_t synced = cudaStreamSynchronize(exec->stream);
    free(rope);
    CUDA_TRY(error);
    CUDA_TRY(synced);
    return LLA_OK;
}

lla_status lla_exec_cuda_create(const lla_graph *graph, int device_id, lla_exec_cuda **out) {
    lla_exec_cuda *exec = (lla_exec_cuda *)calloc(1, sizeof *exec);
    if (!exec) return lla_fail(LLA_ENOMEM, "no memory for an executor");
    exec->graph = graph;
    exec->device_id = device_id;
    const lla_status status = create(exec);
    if (status) {
        lla_exec_cuda_destroy(exec);
        return status;
    }
    *out = exec;
    return LLA_OK;
}

void lla_exec_cuda_destroy(lla_exec_cuda *exec) {
    if (!exec) return;
    cudaSetDevice(exec->device_id);
    if (exec->stream) cudaStreamSynchronize(exec->stream);
    for (size_t i = 0; i < exec->ngraph; i++) cudaGraphExecDestroy(exec->graphs[i]);
    cudaFree(exec->staging);
    cudaFree(exec->ctx.arena);
    cudaFreeHost(exec->mirror);
    if (exec->stream) cudaStreamDestroy(exec->stream);
    free(exec);
}

/* How far apart the two rows of a pair are in a weight's rows; 0: rows are not paired. */
static size_t pairing(const lla_exec_cuda *exec, const lla_weight *w) {
    if (w->kind == LLA_W_QKV) return exec->ctx.dims.head_dim / 2;
    if (w->kind == LLA_W_GATE_UP) return exec->ctx.dims.ffn;
    return 0;
}

lla_status lla_exec_cuda_store(lla_exec_cuda *exec, const lla_weight *w, size_t dst_row, size_t rows,
                               const void *dense) {
    LLA_TRY(use(exec));
    const llaisysDataType_t dtype = exec->ctx.dims.dtype;
    const size_t row_bytes = w->cols * lla_dtype_size(dtype);
    char *to = exec->ctx.arena + w->offset;
    if (w->cols == 1) {
        CUDA_TRY(
            cudaMemcpyAsync(to + dst_row * row_bytes, dense, rows * row_bytes, cudaMemcpyHostToDevice, exec->stream));
        CUDA_TRY(cudaStreamSynchronize(exec->stream));
        return LLA_OK;
    }
    if (!exec->staging) CUDA_TRY(cudaMalloc((void **)&exec->staging, STAGING)); /* freed by capture */
    const size_t most = STAGING / row_bytes;
    if (!most)
        return lla_fail(LLA_ELIMIT, "a row of %zu bytes does not fit in the staging memory of %d", row_bytes,
                        (int)STAGING);
    for (size_t r = 0; r < rows; r += most) {
        const size_t n = rows - r < most ? rows - r : most;
        CUDA_TRY(cudaMemcpyAsync(exec->staging, (const char *)dense + r * row_bytes, n * row_bytes,
                                 cudaMemcpyHostToDevice, exec->stream));
        LLA_TRY(lla_cuda_pack(dtype, exec->staging, n, w->cols, dst_row + r, pairing(exec, w), to, exec->stream));
        CUDA_TRY(cudaStreamSynchronize(exec->stream));
    }
    return LLA_OK;
}

/* Puts nodes [first, last) into the stream, but for ops in the bit set `skip`. */
static lla_status issue(lla_exec_cuda *exec, const lla_program *program, size_t first, size_t last, bool pdl,
                        unsigned skip) {
    lla_cuda_ctx ctx = exec->ctx;
    ctx.rows = program->rows;
    ctx.logits = program->logits;
    for (size_t i = first; i < last; i++) {
        const lla_node *node = &program->nodes[i];
        if (skip >> node->op & 1) continue;
        ctx.pdl = pdl && i > first; /* the first kernel follows a copy */
        if (exec->ctx.trace) ctx.trace = exec->ctx.trace + i * LLA_TRACE_BLOCKS;
        switch (node->op) {
#define X(NAME, suffix)                                                                                                \
    case LLA_OP_##NAME:                                                                                                \
        LLA_TRY(lla_cuda_##suffix(&ctx, &node->suffix));                                                               \
        break;
            LLA_NODE_OPS(X)
#undef X
        case LLA_OP_COUNT:
            break;
        }
    }
    return LLA_OK;
}

lla_status lla_exec_cuda_nodes(lla_exec_cuda *exec, const lla_program *program, size_t first, size_t last) {
    LLA_TRY(use(exec));
    LLA_TRY(issue(exec, program, first, last, false, 0));
    CUDA_TRY(cudaStreamSynchronize(exec->stream));
    return LLA_OK;
}

static lla_status record(lla_exec_cuda *exec, const lla_program *program, unsigned skip) {
    CUDA_TRY(cudaMemcpyAsync(exec->ctx.arena + exec->inputs, exec->mirror, exec->input_bytes, cudaMemcpyHostToDevice,
                             exec->stream));
    LLA_TRY(issue(exec, program, 0, program->nnode, exec->ctx.pdl, skip));
    CUDA_TRY(cudaMemcpyAsync(exec->mirror + exec->input_bytes, exec->ctx.arena + exec->ctx.io.next,
                             program->logits * sizeof(int32_t), cudaMemcpyDeviceToHost, exec->stream));
    return LLA_OK;
}

static lla_status capture(lla_exec_cuda *exec, const lla_program *program, unsigned skip, cudaGraphExec_t *out) {
    cudaGraph_t graph = NULL;
    CUDA_TRY(cudaStreamBeginCapture(exec->stream, cudaStreamCaptureModeThreadLocal));
    const lla_status status = record(exec, program, skip);
    const cudaError_t ended = cudaStreamEndCapture(exec->stream, &graph);
    if (status) {
        cudaGraphDestroy(graph);
        return status;
    }
    CUDA_TRY(ended);
    const cudaError_t error = cudaGraphInstantiate(out, graph, 0);
    cudaGraphDestroy(graph);
    CUDA_TRY(error);
    CUDA_TRY(cudaGraphUpload(*out, exec->stream));
    return LLA_OK;
}

lla_status lla_exec_cuda_capture(lla_exec_cuda *exec, const lla_program *programs, size_t count) {
    LLA_TRY(use(exec));
    cudaFree(exec->staging);
    exec->staging = NULL;
    for (size_t i = 0; i < count; i++) {
        LLA_TRY(capture(exec, &programs[i], 0, &exec->graphs[exec->ngraph]));
        exec->ngraph++;
    }
    CUDA_TRY(cudaStreamSynchronize(exec->stream));
    return LLA_OK;
}

char *lla_exec_cuda_arena(lla_exec_cuda *exec) {
    return exec->ctx.arena;
}

char *lla_exec_cuda_inputs(lla_exec_cuda *exec) {
    return exec->mirror - exec->inputs;
}

lla_status lla_exec_cuda_run(lla_exec_cuda *exec, size_t program) {
    LLA_TRY(use(exec));
    CUDA_TRY(cudaGraphLaunch(exec->graphs[program], exec->stream));
    CUDA_TRY(cudaStreamSynchronize(exec->stream));
    return LLA_OK;
}

lla_status lla_exec_cuda_read(lla_exec_cuda *exec, size_t offset, size_t nbytes, void *out) {
    LLA_TRY(use(exec));
    CUDA_TRY(cudaMemcpyAsync(out, exec->ctx.arena + offset, nbytes, cudaMemcpyDeviceToHost, exec->stream));
    CUDA_TRY(cudaStreamSynchronize(exec->stream));
    return LLA_OK;
}

lla_status lla_exec_cuda_write(lla_exec_cuda *exec, size_t offset, size_t nbytes, const void *in) {
    LLA_TRY(use(exec));
    CUDA_TRY(cudaMemcpyAsync(exec->ctx.arena + offset, in, nbytes, cudaMemcpyHostToDevice, exec->stream));
    CUDA_TRY(cudaStreamSynchronize(exec->stream));
    return LLA_OK;
}

/* Median, tenth and ninetieth percentile of the milliseconds between events. */
static lla_status between(std::vector<cudaEvent_t> &events, double *ms) {
    std::vector<double> times;
    CUDA_TRY(cudaEventSynchronize(events.back()));
    for (size_t i = 1; i < events.size(); i++) {
        float t;
        CUDA_TRY(cudaEventElapsedTime(&t, events[i - 1], events[i]));
        times.push_back(t);
    }
    std::sort(times.begin(), times.end());
    const size_t n = times.size();
    ms[0] = times[n / 2];
    ms[1] = times[n / 10];
    ms[2] = times[n - 1 - n / 10];
    return LLA_OK;
}

template <class F> static lla_status time_each(lla_exec_cuda *exec, size_t count, double *ms, F work) {
    std::vector<cudaEvent_t> events(count + 1);
    for (auto &e : events) CUDA_TRY(cudaEventCreate(&e));
    CUDA_TRY(cudaEventRecord(events[0], exec->stream));
    for (size_t i = 1; i <= count; i++) {
        CUDA_TRY(work());
        CUDA_TRY(cudaEventRecord(events[i], exec->stream));
    }
    LLA_TRY(between(events, ms));
    for (auto &e : events) cudaEventDestroy(e);
    return LLA_OK;
}

lla_status lla_exec_cuda_time(lla_exec_cuda *exec, const lla_program *program, unsigned skip, size_t count,
                              double *ms) {
    LLA_TRY(use(exec));
    cudaGraphExec_t graph;
    LLA_TRY(capture(exec, program, skip, &graph));
    const lla_status status = time_each(exec, count, ms, [&] { return cudaGraphLaunch(graph, exec->stream); });
    cudaGraphExecDestroy(graph);
    return status;
}

lla_status lla_exec_cuda_trace(lla_exec_cuda *exec, const lla_program *program, FILE *out) {
#ifdef LLA_STEP_TRACE
    LLA_TRY(use(exec));
    const size_t n = program->nnode * LLA_TRACE_BLOCKS, nbytes = n * sizeof(lla_block_times);
    std::vector<lla_block_times> times(n);
    CUDA_TRY(cudaMalloc((void **)&exec->ctx.trace, nbytes));
    cudaGraphExec_t graph = NULL;
    lla_status status = capture(exec, program, 0, &graph);
    cudaError_t error = cudaMemsetAsync(exec->ctx.trace, 0, nbytes, exec->stream);
    for (int i = 0; !status && !error && i < 10; i++) error = cudaGraphLaunch(graph, exec->stream);
    if (!error) error = cudaMemcpyAsync(times.data(), exec->ctx.trace, nbytes, cudaMemcpyDeviceToHost, exec->stream);
    if (!error) error = cudaStreamSynchronize(exec->stream);
    cudaGraphExecDestroy(graph);
    cudaFree(exec->ctx.trace);
    exec->ctx.trace = NULL;
    LLA_TRY(status);
    CUDA_TRY(error);
    fprintf(out, "node,name,layer,block,sm,began,free,staged,ended\n");
    for (size_t i = 0; i < n; i++) {
        const lla_node *node = &program->nodes[i / LLA_TRACE_BLOCKS];
        const lla_block_times *t = &times[i];
        if (!t->ns[LLA_BLOCK_BEGAN]) continue;
        fprintf(out, "%zu,%s,%zu,%zu,%llu,%llu,%llu,%llu,%llu\n", i / LLA_TRACE_BLOCKS, node->name, node->layer,
                i % LLA_TRACE_BLOCKS, t->sm, t->ns[LLA_BLOCK_BEGAN], t->ns[LLA_BLOCK_FREE], t->ns[LLA_BLOCK_STAGED],
                t->ns[LLA_BLOCK_ENDED]);
    }
    return LLA_OK;
#else
    (void)exec, (void)program, (void)out;
    return lla_fail(LLA_EINVAL, "this build's kernels note no times: meson setup -Dstep_trace=true");
#endif
}

/* Sums 16-byte words; eight loads in flight a thread. */
static __global__ void __launch_bounds__(1024) read_kernel(const uint4 *p, size_t n, uint32_t *sink) {
    uint32_t sum = 0;
    const size_t stride = (size_t)gridDim.x * blockDim.x;
    size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    for (; i + 7 * stride < n; i += 8 * stride) {
        uint4 v[8];
#pragma unroll
        for (int j = 0; j < 8; j++) v[j] = load_stream(p + i + j * stride);
#pragma unroll
        for (int j = 0; j < 8; j++) sum += v[j].x ^ v[j].y ^ v[j].z ^ v[j].w;
    }
    for (; i < n; i += stride) sum += p[i].x;
    if (sum == 0x12345678) *sink = sum; /* never elided, hardly ever taken */
}

lla_status lla_exec_cuda_read_ceiling(lla_exec_cuda *exec, double *gbs) {
    LLA_TRY(use(exec));
    double ms[3];
    const size_t n = exec->graph->plan.weight_bytes / 16;
    uint32_t *sink = (uint32_t *)(exec->ctx.arena + exec->graph->offset[LLA_B_X]);
    LLA_TRY(time_each(exec, 20, ms, [&] {
        read_kernel<<<2 * exec->ctx.sm_count, 1024, 0, exec->stream>>>((const uint4 *)exec->ctx.arena, n, sink);
        return cudaGetLastError();
    }));
    *gbs = 1e-6 * 16.0 * (double)n / ms[0];
    return LLA_OK;
}
