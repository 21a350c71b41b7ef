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

/* ---- embedding: one kernel, whose first blocks check all indices while every block fetches its rows ----
 *
 * Nothing is written before the verdict. It is one word: how many checkers have arrived, and how many of them have
 * found an index outside, so that waiting for it needs no fence. Blocks start in the order of their numbers, and
 * checkers check before they wait, so that those that wait hold up nobody. */

constexpr unsigned COPY_THREADS = 256, COPY_ROWS = 4, MAX_CHECKERS = 512;
constexpr unsigned long long ONE_BAD = 1ull << 32;

/* The share of checker `rank` of `checkers`; the last to arrive tells the host. Called by all threads of the block. */
__device__ __forceinline__ void check_index(unsigned rank, unsigned checkers, size_t n, size_t vocab,
                                            const int64_t *index, lla_index_scratch *scratch, uint64_t ticket,
                                            lla_index_report *host) {
    const unsigned thread = threadIdx.y * blockDim.x + threadIdx.x, threads = blockDim.x * blockDim.y;
    unsigned long long lowest = ULLONG_MAX;
#pragma unroll 4
    for (size_t i = static_cast<size_t>(rank) * threads + thread; i < n; i += static_cast<size_t>(checkers) * threads)
        if (static_cast<uint64_t>(index[i]) >= vocab && i < lowest) lowest = i; /* negative ones are huge */
    if (lowest != ULLONG_MAX) {
        atomicMin(&scratch->lowest, lowest);
        __threadfence(); /* before the block says that it has arrived */
    }
    const bool is_bad = __syncthreads_or(lowest != ULLONG_MAX);
    if (thread) return;
    const unsigned long long mine = 1 + (is_bad ? ONE_BAD : 0),
                             all = atomicAdd(&scratch->arrived[ticket % 2], mine) + mine;
    if (static_cast<unsigned>(all) != checkers) return;
    if (all >= ONE_BAD) {
        __threadfence();
        const unsigned long long first = atomicExch(&scratch->lowest, ULLONG_MAX);
        host->position = static_cast<int64_t>(first);
        host->index = index[first];
        __threadfence_system(); /* the host looks at these when it sees the ticket */
    }
    *static_cast<volatile uint64_t *>(&host->ticket) = 2 * ticket + (all >= ONE_BAD);
}

/* weight [vocab, row], out [n, row] in units of U: row = d elements. Threads (x, y) of a block have unit x of COPY_ROWS
 * rows. */
template <class U>
__global__ void __launch_bounds__(COPY_THREADS)
    copy_rows(size_t n, unsigned row, size_t vocab, const int64_t *index, const U *weight, unsigned checkers,
              lla_index_scratch *scratch, uint64_t ticket, lla_index_report *host, U *out) {
    const size_t first = static_cast<size_t>(blockIdx.x) * (blockDim.y * COPY_ROWS) + threadIdx.y;
    const unsigned column = blockIdx.y * blockDim.x + threadIdx.x;
    const bool is_first_thread = threadIdx.x == 0 && threadIdx.y == 0;
    if (blockIdx.y == 0 && blockIdx.x < checkers) {
        if (blockIdx.x == 0 && is_first_thread) scratch->arrived[(ticket + 1) % 2] = 0; /* the next call's */
        check_index(blockIdx.x, checkers, n, vocab, index, scratch, ticket, host);
    }
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
    bool is_refused = false;
    if (is_first_thread) { /* one thread: a word that all threads ask for is answered late */
        const volatile unsigned long long *word = &scratch->arrived[ticket % 2];
        unsigned long long all;
        while (static_cast<unsigned>(all = *word) != checkers) {}
        is_refused = all >= ONE_BAD;
    }
    if (__syncthreads_or(is_refused)) return;
#pragma unroll
    for (int u = 0; u < COPY_ROWS; u++)
        if (from[u] < vocab) out[(first + u * blockDim.y) * row + column] = v[u];
}

lla_status lla_cuda_op_embedding(size_t element, size_t n, size_t d, size_t vocab, const int64_t *index,
                                 const void *weight, struct lla_index_scratch *scratch, uint64_t ticket,
                                 struct lla_index_report *host, void *out, cudaStream_t stream) {
    constexpr unsigned MAX_D = 65535 * COPY_THREADS; /* rows are cut into at most 65535 parts */
    const size_t bytes = d * element;
    LLA_REQUIRE(d < MAX_D && n <= INT32_MAX, LLA_EINVAL,
                "embedding: expected at most %d rows of fewer than %u elements, found %zu of %zu", INT32_MAX, MAX_D, n,
                d);
    auto launch = [&](auto unit) {
        using U = decltype(unit);
        const size_t row = bytes / sizeof(U);
        const unsigned across = row < COPY_THREADS ? static_cast<unsigned>(row) : COPY_THREADS,
                       down = COPY_THREADS / across;
        const dim3 grid(static_cast<unsigned>(ceil_div(n, down * COPY_ROWS)),
                        static_cast<unsigned>(ceil_div(row, across))),
            block(across, down);
        size_t checkers = ceil_div(n, COPY_THREADS * 4); /* four loads a thread, together */
        if (checkers > grid.x) checkers = grid.x;
        if (checkers > MAX_CHECKERS) checkers = MAX_CHECKERS;
        copy_rows<U><<<grid, block, 0, stream>>>(n, static_cast<unsigned>(row), vocab, index,
                                                 static_cast<const U *>(weight), static_cast<unsigned>(checkers),
                                                 scratch, ticket, host, static_cast<U *>(out));
    };
    if (bytes % 16 == 0 && aligned_16(weight, out))
        launch(uint4{});
    else if (element == 4)
        launch(uint32_t{});
    else
        launch(uint16_t{});
    LLA_CUDA_LAUNCHED("embedding");
    return LLA_OK;
}
