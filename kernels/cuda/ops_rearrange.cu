/* ops_rearrange.cu: copies a strided array to another one of the same shape.
 *
 * The shape is first reduced: dimensions of size 1 go, the others are ordered by the output's strides, and neighbours
 * that both sides step through evenly become one. What is left is one of two cases:
 *  - the innermost dimension is contiguous on both sides: threads copy units as wide as alignment allows;
 *  - the output is contiguous along one dimension and the input along another: tiles of the two are turned in shared
 * memory. Anything else is copied element by element, in the output's order. */
#include "ops.cuh"

enum { MAX_DIMS = 8 };

struct Strided {
    int ndim;
    size_t shape[MAX_DIMS]; /* the innermost dimension last */
    ptrdiff_t to[MAX_DIMS], from[MAX_DIMS];
};

/* ---- element by element, or unit by unit ---- */

enum { COPY_THREADS = 256, COPY_EACH = 4 };

/* Index: an unsigned type that can count the units. */
template <class U, class Index>
__global__ void __launch_bounds__(COPY_THREADS) copy_strided(Strided s, Index total, U *out, const U *in) {
    const Index base = static_cast<Index>(blockIdx.x) * (COPY_THREADS * COPY_EACH) + threadIdx.x;
    U v[COPY_EACH];
    ptrdiff_t to[COPY_EACH];
#pragma unroll
    for (int u = 0; u < COPY_EACH; u++) {
        Index i = base + u * COPY_THREADS;
        if (i >= total) break;
        ptrdiff_t from = 0;
        to[u] = 0;
#pragma unroll
        for (int dim = MAX_DIMS - 1; dim >= 0; dim--) {
            if (dim >= s.ndim) continue;
            const Index size = static_cast<Index>(s.shape[dim]), next = dim ? i / size : 0, at = i - next * size;
            to[u] += static_cast<ptrdiff_t>(at) * s.to[dim];
            from += static_cast<ptrdiff_t>(at) * s.from[dim];
            i = next;
        }
        v[u] = in[from];
    }
#pragma unroll
    for (int u = 0; u < COPY_EACH; u++) {
        if (base + u * COPY_THREADS >= total) break;
        out[to[u]] = v[u];
    }
}

template <class U>
static void launch_copy(const Strided &s, size_t total, void *out, const void *in, cudaStream_t stream) {
    const unsigned blocks = static_cast<unsigned>(ceil_div(total, COPY_THREADS * COPY_EACH));
    U *to = static_cast<U *>(out);
    const U *from = static_cast<const U *>(in);
    if (total < UINT32_MAX - COPY_THREADS * COPY_EACH)
        copy_strided<U, uint32_t><<<blocks, COPY_THREADS, 0, stream>>>(s, static_cast<uint32_t>(total), to, from);
    else
        copy_strided<U, uint64_t><<<blocks, COPY_THREADS, 0, stream>>>(s, total, to, from);
}

/* ---- transposition ---- */

enum { TURN_THREADS = 256 };

/* The last dimension is contiguous in out, the one before it in in; the dimensions before are a batch. Tiles are SIDE x
 * SIDE; a row of a tile is padded by a word, so that neither its rows nor its columns meet in a bank. */
template <class U, int SIDE>
__global__ void __launch_bounds__(TURN_THREADS)
    transpose(Strided s, unsigned tiles_x, unsigned tiles_y, U *out, const U *in) {
    constexpr int PAD = sizeof(U) < 4 ? 4 / sizeof(U) : 1, ROWS = TURN_THREADS / 32, ACROSS = SIDE / 32;
    __shared__ U tile[SIDE][SIDE + PAD];
    const size_t nx = s.shape[s.ndim - 1], ny = s.shape[s.ndim - 2];
    const ptrdiff_t to_y = s.to[s.ndim - 2], from_x = s.from[s.ndim - 1];
    unsigned id = blockIdx.x;
    const size_t x0 = static_cast<size_t>(id % tiles_x) * SIDE;
    id /= tiles_x;
    const size_t y0 = static_cast<size_t>(id % tiles_y) * SIDE;
    id /= tiles_y;
    for (int dim = s.ndim - 3; dim >= 0; dim--) {
        const unsigned size = static_cast<unsigned>(s.shape[dim]), at = id % size;
        out += static_cast<ptrdiff_t>(at) * s.to[dim];
        in += static_cast<ptrdiff_t>(at) * s.from[dim];
        id /= size;
    }
    const unsigned lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    U v[SIDE / ROWS][ACROSS];
#pragma unroll
    for (int r = 0; r < SIDE / ROWS; r++)
#pragma unroll
        for (int c = 0; c < ACROSS; c++) {
            const size_t x = x0 + warp + r * ROWS, y = y0 + lane + c * 32;
            if (x < nx && y < ny) v[r][c] = in[static_cast<ptrdiff_t>(x) * from_x + static_cast<ptrdiff_t>(y)];
        }
#pragma unroll
    for (int r = 0; r < SIDE / ROWS; r++)
#pragma unroll
        for (int c = 0; c < ACROSS; c++) tile[warp + r * ROWS][lane + c * 32] = v[r][c];
    __syncthreads();
#pragma unroll
    for (int r = 0; r < SIDE / ROWS; r++)
#pragma unroll
        for (int c = 0; c < ACROSS; c++) {
            const size_t y = y0 + warp + r * ROWS, x = x0 + lane + c * 32;
            if (x < nx && y < ny)
                out[static_cast<ptrdiff_t>(y) * to_y + static_cast<ptrdiff_t>(x)] =
                    tile[lane + c * 32][warp + r * ROWS];
        }
}

template <class U> static bool launch_transpose(const Strided &s, void *out, const void *in, cudaStream_t stream) {
    constexpr int SIDE = sizeof(U) <= 2 ? 64 : 32;
    const size_t tiles_x = ceil_div(s.shape[s.ndim - 1], SIDE), tiles_y = ceil_div(s.shape[s.ndim - 2], SIDE);
    size_t blocks = tiles_x * tiles_y;
    for (int dim = 0; dim < s.ndim - 2; dim++) blocks *= s.shape[dim];
    if (blocks > INT32_MAX) return false;
    transpose<U, SIDE><<<static_cast<unsigned>(blocks), TURN_THREADS, 0, stream>>>(
        s, static_cast<unsigned>(tiles_x), static_cast<unsigned>(tiles_y), static_cast<U *>(out),
        static_cast<const U *>(in));
    return true;
}

/* ---- choosing ---- */

static Strided reduce(size_t ndim, const size_t *shape, const ptrdiff_t *to, const ptrdiff_t *from) {
    Strided s = {};
    for (size_t i = 0; i < ndim; i++) { /* insertion by the output's stride, the largest first */
        if (shape[i] == 1) continue;
        int at = s.ndim++;
        for (; at > 0 && s.to[at - 1] < to[i]; at--) {
            s.shape[at] = s.shape[at - 1];
            s.to[at] = s.to[at - 1];
            s.from[at] = s.from[at - 1];
        }
        s.shape[at] = shape[i];
        s.to[at] = to[i];
        s.from[at] = from[i];
    }
    int kept = 0;
    for (int i = 1; i < s.ndim; i++) {
        const ptrdiff_t size = static_cast<ptrdiff_t>(s.shape[i]);
        const bool is_even = s.to[kept] == s.to[i] * size && s.from[kept] == s.from[i] * size;
        const size_t merged = is_even ? s.shape[kept] * s.shape[i] : s.shape[i];
        if (!is_even) kept++;
        s.shape[kept] = merged;
        s.to[kept] = s.to[i];
        s.from[kept] = s.from[i];
    }
    if (s.ndim == 0) { /* one element */
        s.shape[0] = s.to[0] = s.from[0] = 1;
    }
    s.ndim = s.ndim ? kept + 1 : 1;
    return s;
}

/* Widens the unit of copying while the innermost dimension is contiguous on both sides and everything stays aligned. */
static size_t widen(Strided *s, size_t unit, const void *out, const void *in) {
    const int last = s->ndim - 1;
    while (unit < 16 && s->to[last] == 1 && s->from[last] == 1 && s->shape[last] % 2 == 0) {
        uintptr_t misaligned = (reinterpret_cast<uintptr_t>(out) | reinterpret_cast<uintptr_t>(in)) & (2 * unit - 1);
        for (int i = 0; i < last; i++) misaligned |= (s->to[i] | s->from[i]) & 1;
        if (misaligned) break;
        unit *= 2;
        s->shape[last] /= 2;
        for (int i = 0; i < last; i++) {
            s->to[i] /= 2;
            s->from[i] /= 2;
        }
    }
    return unit;
}

/* Whether the input is contiguous along another dimension than the output, both long enough to pay; puts that dimension
 * next to the last. */
static bool is_transposition(Strided *s) {
    enum { LEAST = 8 };
    const int last = s->ndim - 1;
    if (s->to[last] != 1 || s->from[last] == 1 || s->shape[last] < LEAST) return false;
    for (int i = 0; i < last; i++) {
        if (s->from[i] != 1 || s->shape[i] < LEAST) continue;
        const size_t shape = s->shape[i];
        const ptrdiff_t to = s->to[i];
        s->shape[i] = s->shape[last - 1];
        s->to[i] = s->to[last - 1];
        s->from[i] = s->from[last - 1];
        s->shape[last - 1] = shape;
        s->to[last - 1] = to;
        s->from[last - 1] = 1;
        return true;
    }
    return false;
}

template <class U> static void run(Strided s, void *out, const void *in, cudaStream_t stream) {
    size_t total = 1;
    for (int i = 0; i < s.ndim; i++) total *= s.shape[i];
    if (!is_transposition(&s) || !launch_transpose<U>(s, out, in, stream)) launch_copy<U>(s, total, out, in, stream);
}

lla_status lla_cuda_op_rearrange(size_t element, size_t ndim, const size_t *shape, const ptrdiff_t *out_strides,
                                 void *out, const ptrdiff_t *in_strides, const void *in, cudaStream_t stream) {
    for (size_t i = 0; i < ndim; i++)
        if (shape[i] == 0) return LLA_OK;
    LLA_REQUIRE(ndim <= MAX_DIMS, LLA_EINVAL, "rearrange: expected at most %d dimensions, found %zu", MAX_DIMS, ndim);
    Strided s = reduce(ndim, shape, out_strides, in_strides);
    switch (widen(&s, element, out, in)) {
    case 1:
        run<uint8_t>(s, out, in, stream);
        break;
    case 2:
        run<uint16_t>(s, out, in, stream);
        break;
    case 4:
        run<uint32_t>(s, out, in, stream);
        break;
    case 8:
        run<uint2>(s, out, in, stream);
        break;
    case 16:
        run<uint4>(s, out, in, stream);
        break;
    default:
        return lla_fail(LLA_EINVAL, "rearrange: expected elements of 1, 2, 4, 8 or 16 bytes, found %zu", element);
    }
    LLA_CUDA_LAUNCHED("rearrange");
    return LLA_OK;
}
