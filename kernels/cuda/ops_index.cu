/* ops_index.cu: argmax and embedding. */
#include "ops.cuh"

#include <limits.h>

/* True in the last block to arrive; what the others wrote before is then visible to it. */
static __device__ __forceinline__ bool last_to_arrive(unsigned *arrived) {
    __shared__ bool is_last;
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) is_last = atomicAdd(arrived, 1) + 1 == gridDim.x;
    __syncthreads();
    if (is_last) __threadfence();
    return is_last;
}

/* ---- argmax: blocks leave their best, the last one to arrive chooses among them ---- */

enum { ARGMAX_THREADS = 512, ARGMAX_PACKS = 4 };

struct Best {
    float value;
    int64_t index; /* LLONG_MAX: none yet */
};

/* Whether b goes before a: a NaN above all, then the larger, then the first. */
static __device__ __forceinline__ bool is_better(const Best &b, const Best &a) {
    const bool a_nan = a.value != a.value, b_nan = b.value != b.value;
    if (a_nan || b_nan) return a_nan == b_nan ? b.index < a.index : b_nan;
    return b.value > a.value || (b.value == a.value && b.index < a.index);
}

static __device__ __forceinline__ Best warp_best(Best best) {
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) {
        const Best other = {__shfl_xor_sync(0xffffffffu, best.value, offset),
                            __shfl_xor_sync(0xffffffffu, best.index, offset)};
        if (is_better(other, best)) best = other;
    }
    return best;
}

/* The block's best, in the first warp. */
static __device__ __forceinline__ Best block_best(Best best) {
    __shared__ Best warps[ARGMAX_THREADS / 32];
    best = warp_best(best);
    if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = best;
    __syncthreads();
    return threadIdx.x < 32 ? warp_best(warps[threadIdx.x % (ARGMAX_THREADS / 32)]) : best;
}

/* Past the first-level cache. */
template <class T, int N> static __device__ __forceinline__ Pack<T, N> load_once(const T *p) {
    if constexpr (sizeof(T) * N == 16) {
        const uint4 bits = load_stream(p);
        return reinterpret_cast<const Pack<T, N> &>(bits);
    } else {
        return load_pack<T, N>(p);
    }
}

template <class T, int N>
__global__ void __launch_bounds__(ARGMAX_THREADS)
    argmax(size_t n, const T *values, int64_t *index, T *value, lla_argmax_scratch *scratch) {
    const size_t npack = n / N, step = static_cast<size_t>(gridDim.x) * (ARGMAX_THREADS * ARGMAX_PACKS);
    Best best = {-INFINITY, LLONG_MAX};
    for (size_t base = static_cast<size_t>(blockIdx.x) * (ARGMAX_THREADS * ARGMAX_PACKS) + threadIdx.x; base < npack;
         base += step) {
        Pack<T, N> v[ARGMAX_PACKS];
#pragma unroll
        for (int u = 0; u < ARGMAX_PACKS; u++)
            if (base + u * ARGMAX_THREADS < npack) v[u] = load_once<T, N>(values + (base + u * ARGMAX_THREADS) * N);
        if (best.index == LLONG_MAX) best.index = static_cast<int64_t>(base * N); /* of a row of -inf, the first */
#pragma unroll
        for (int u = 0; u < ARGMAX_PACKS; u++) {
            if (base + u * ARGMAX_THREADS >= npack) break;
#pragma unroll
            for (int j = 0; j < N; j++) { /* in order: only a larger one, or the first NaN, replaces the best */
                const float candidate = as_float(v[u].at[j]);
                if (!(candidate <= best.value) && best.value == best.value) {
                    best.value = candidate;
                    best.index = static_cast<int64_t>((base + u * ARGMAX_THREADS) * N + j);
                }
            }
        }
    }
    const size_t rest = npack * N + threadIdx.x;
    if (blockIdx.x == 0 && rest < n) {
        const Best last = {as_float(values[rest]), static_cast<int64_t>(rest)};
        if (is_better(last, best)) best = last;
    }
    best = block_best(best);
    if (gridDim.x > 1) {
        if (threadIdx.x == 0) scratch->parts[blockIdx.x] = {best.value, best.index};
        if (!last_to_arrive(&scratch->arrived)) return;
        best = {-INFINITY, LLONG_MAX};
        for (unsigned i = threadIdx.x; i < gridDim.x; i += ARGMAX_THREADS) {
            const volatile lla_argmax_part *part = &scratch->parts[i];
            const Best other = {part->value, part->index};
            if (is_better(other, best)) best = other;
        }
        best = block_best(best);
        if (threadIdx.x == 0) scratch->arrived = 0;
    }
    if (threadIdx.x == 0) {
        *index = best.index;
        *value = values[best.index];
    }
}

template <class T>
static void launch_argmax(size_t n, const T *values, int64_t *index, T *value, lla_argmax_scratch *scratch,
                          size_t sm_count, cudaStream_t stream) {
    constexpr int N = 16 / sizeof(T);
    const bool is_wide = aligned_16(values);
    size_t blocks = ceil_div(n / (is_wide ? N : 1) + 1, ARGMAX_THREADS * ARGMAX_PACKS);
    const size_t most = 4 * sm_count < LLA_ARGMAX_PARTS ? 4 * sm_count : size_t(LLA_ARGMAX_PARTS);
    if (blocks > most) blocks = most;
    const auto kernel = is_wide ? argmax<T, N> : argmax<T, 1>;
    kernel<<<static_cast<unsigned>(blocks), ARGMAX_THREADS, 0, stream>>>(n, values, index, value, scratch);
}

lla_status lla_cuda_op_argmax(llaisysDataType_t dtype, size_t n, const void *values, int64_t *index, void *value,
                              struct lla_argmax_scratch *scratch, cudaStream_t stream) {
    const struct lla_cuda_facts *facts;
    LLA_TRY(lla_cuda_facts_get(&facts));
    LLA_CUDA_DISPATCH(dtype, launch_argmax<T>(n, static_cast<const T *>(values), index, static_cast<T *>(value),
                                              scratch, static_cast<size_t>(facts->sm_count), stream));
    LLA_CUDA_LAUNCHED("argmax");
    return LLA_OK;
}

/* ---- embedding: a kernel checks the indices, another one copies rows if all are inside the table ----
 *
 * On sm_90 the second starts while the first still runs (programmatic dependent launch): it reads rows, those of
 * indices outside the table excepted, and waits for the verdict before it writes. */

constexpr unsigned CHECK_THREADS = 1024, CHECK_EACH = 4, COPY_THREADS = 256, COPY_ROWS = 4;

__global__ void __launch_bounds__(CHECK_THREADS)
    check_index(size_t n, size_t vocab, const int64_t *index, lla_index_scratch *scratch, uint64_t ticket,
                lla_index_report *host) {
    pdl_launch_next();
    unsigned long long lowest = ULLONG_MAX;
    for (size_t i = static_cast<size_t>(blockIdx.x) * CHECK_THREADS + threadIdx.x; i < n;
         i += static_cast<size_t>(gridDim.x) * CHECK_THREADS)
        if (static_cast<uint64_t>(index[i]) >= vocab && i < lowest) lowest = i; /* negative ones are huge */
    if (lowest != ULLONG_MAX) atomicMin(&scratch->lowest, lowest);
    if (!last_to_arrive(&scratch->arrived) || threadIdx.x) return;
    lowest = atomicExch(&scratch->lowest, ULLONG_MAX);
    const bool is_inside = lowest == ULLONG_MAX;
    scratch->position = is_inside ? -1 : static_cast<int64_t>(lowest);
    scratch->arrived = 0;
    host->position = is_inside ? -1 : static_cast<int64_t>(lowest);
    host->index = is_inside ? 0 : index[lowest];
    __threadfence_system(); /* the host looks at the rest when it sees the ticket */
    *static_cast<volatile uint64_t *>(&host->ticket) = ticket;
}

lla_status lla_cuda_check_index(size_t n, size_t vocab, const int64_t *index, struct lla_index_scratch *scratch,
                                uint64_t ticket, struct lla_index_report *host, cudaStream_t stream) {
    size_t blocks = ceil_div(n, CHECK_THREADS * CHECK_EACH);
    if (blocks < 1) blocks = 1;
    if (blocks > 256) blocks = 256;
    check_index<<<static_cast<unsigned>(blocks), CHECK_THREADS, 0, stream>>>(n, vocab, index, scratch, ticket, host);
    LLA_CUDA_LAUNCHED("embedding: check");
    return LLA_OK;
}

/* weight [vocab, row], out [n, row] in units of U: row = d elements. Threads (x, y) of a block have unit x of COPY_ROWS
 * rows. */
template <class U>
__global__ void __launch_bounds__(COPY_THREADS) copy_rows(size_t n, unsigned row, size_t vocab, const int64_t *index,
                                                          const U *weight, const lla_index_scratch *scratch, U *out) {
    const size_t first = static_cast<size_t>(blockIdx.x) * (blockDim.y * COPY_ROWS) + threadIdx.y;
    const unsigned column = blockIdx.y * blockDim.x + threadIdx.x;
    uint64_t from[COPY_ROWS];
    U v[COPY_ROWS] = {};
#pragma unroll
    for (int u = 0; u < COPY_ROWS; u++) {
        const size_t to = first + u * blockDim.y;
        from[u] = to < n && column < row ? static_cast<uint64_t>(index[to]) : vocab;
    }
#pragma unroll
    for (int u = 0; u < COPY_ROWS; u++)
        if (from[u] < vocab) v[u] = weight[from[u] * row + column];
    pdl_wait();
    if (*static_cast<const volatile int64_t *>(&scratch->position) >= 0) return;
#pragma unroll
    for (int u = 0; u < COPY_ROWS; u++)
        if (from[u] < vocab) out[(first + u * blockDim.y) * row + column] = v[u];
}

template <class U>
static cudaError_t launch_copy(size_t n, size_t row, size_t vocab, const int64_t *index, const void *weight,
                               const lla_index_scratch *scratch, void *out, bool is_early, cudaStream_t stream) {
    cudaLaunchAttribute attribute = {};
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config = {};
    const unsigned across = row < COPY_THREADS ? static_cast<unsigned>(row) : COPY_THREADS,
                   down = COPY_THREADS / across;
    config.gridDim =
        dim3(static_cast<unsigned>(ceil_div(n, down * COPY_ROWS)), static_cast<unsigned>(ceil_div(row, across)));
    config.blockDim = dim3(across, down);
    config.stream = stream;
    config.attrs = &attribute;
    config.numAttrs = is_early ? 1 : 0;
    return cudaLaunchKernelEx(&config, copy_rows<U>, n, static_cast<unsigned>(row), vocab, index,
                              static_cast<const U *>(weight), scratch, static_cast<U *>(out));
}

lla_status lla_cuda_op_embedding(size_t element, size_t n, size_t d, size_t vocab, const int64_t *index,
                                 const void *weight, const struct lla_index_scratch *scratch, void *out,
                                 cudaStream_t stream) {
    constexpr unsigned MAX_D = 65535 * COPY_THREADS; /* rows are cut into at most 65535 parts */
    const size_t bytes = d * element;
    if (n == 0 || bytes == 0) return LLA_OK;
    LLA_REQUIRE(d < MAX_D && n <= INT32_MAX, LLA_EINVAL,
                "embedding: expected at most %d rows of fewer than %u elements, found %zu of %zu", INT32_MAX, MAX_D, n,
                d);
    const struct lla_cuda_facts *facts;
    LLA_TRY(lla_cuda_facts_get(&facts));
    const bool is_early = facts->compute >= 90;
    cudaError_t error;
    if (bytes % 16 == 0 && aligned_16(weight, out))
        error = launch_copy<uint4>(n, bytes / 16, vocab, index, weight, scratch, out, is_early, stream);
    else if (element == 4)
        error = launch_copy<uint32_t>(n, d, vocab, index, weight, scratch, out, is_early, stream);
    else
        error = launch_copy<uint16_t>(n, d, vocab, index, weight, scratch, out, is_early, stream);
    LLA_CUDA_TRY(error, "embedding");
    return LLA_OK;
}
