/* step_linear.cuh: what the step's matrix products share, for few rows (step_linear.cu) and for many
 * (step_linear_many.cu): the arguments, and what becomes of a product's sums. */
#ifndef LLA_STEP_LINEAR_CUH
#define LLA_STEP_LINEAR_CUH

#include "step_math.cuh"

enum Epilogue { QKV, ADD, SWIGLU, STORE };

struct Linear {
    const lla_step_header *header;
    size_t max_rows;          /* of the bucket */
    bool by_logit;            /* rows are the step's logit rows */
    const int32_t *index;     /* by_logit: row of x that a logit row reads */
    const void *x;            /* [rows, k] */
    const void *norm;         /* [k], or NULL */
    void *normed;             /* [rows, k]: the norm's result, where it has a kernel of its own */
    float *squares;           /* lla_io.squares of x, or, ADD, of out */
    const void *w;            /* packed */
    unsigned long long *best; /* STORE: where the kernel for few rows leaves a row's largest logit; see lla_io */
    void *out;                /* STORE: [rows, n]; ADD: [rows, n], added to; SWIGLU: [rows, n / 2] */
    size_t n, k, half;
    float eps;
    /* QKV */
    const void *bias, *rope;
    const int32_t *positions, *row_seq, *table;
    void *q, *k_cache, *v_cache;
    size_t nhead, nkvhead, head_dim, kv_block, max_blocks;
    lla_block_times *trace;
};

/* Whether an ADD is down, not o, whose ring may be as deep where the model is large. */
__host__ __device__ inline bool is_down(const Linear &a) {
    return a.k > 2 * a.n;
}

/* Row r of the step's activations is row source(r) of x. */
__device__ __forceinline__ size_t source(const Linear &a, size_t r) {
    return a.by_logit ? (size_t)a.index[r] : r;
}

/* Where keys and values of a row go: element offset of the position in the cache of KV head 0. */
struct Slot {
    size_t at;
};

__device__ __forceinline__ Slot slot_of(const Linear &a, size_t row) {
    const unsigned position = (unsigned)a.positions[row], kv_block = (unsigned)a.kv_block; /* 32 bits divide faster */
    const size_t block = (size_t)a.table[(size_t)a.row_seq[row] * a.max_blocks + position / kv_block];
    return Slot{(block * a.nkvhead * kv_block + position % kv_block) * a.head_dim};
}

/* What an output needs beside its sums: what they are added to, bias or residual; of qkv, cosine and sine, and where
 * the pair goes. Requested before the product, or while its parts' sums meet, and used after it. */
struct Operands {
    float low, high, c, s;
    void *to; /* NULL: nowhere */
    bool rotates;
};

/* AHEAD: only asks for the lines. */
template <class T, Epilogue E, bool AHEAD>
__device__ __forceinline__ Operands prepare(const Linear &a, size_t row, size_t tile, size_t g, const Slot &slot) {
    Operands p = {};
    if (E == QKV) {
        const unsigned pair = (unsigned)(tile * 8 + g), half = (unsigned)a.half, head = pair / half, j = pair % half;
        if (head >= a.nhead + 2 * a.nkvhead) return p;
        const T *bias = (const T *)a.bias + head * a.head_dim,
                *rope = (const T *)a.rope + (size_t)a.positions[row] * a.head_dim;
        if (AHEAD) {
            prefetch_l1(bias + j);
            prefetch_l1(bias + j + a.half);
            prefetch_l1(rope + j);
            prefetch_l1(rope + j + a.half);
            return p;
        }
        p = Operands{to_float<T>(bias[j]), to_float<T>(bias[j + a.half]), to_float<T>(rope[j]),
                     to_float<T>(rope[j + a.half])};
        p.rotates = head < a.nhead + a.nkvhead;
        if (head < a.nhead) {
            p.to = (T *)a.q + (row * a.nhead + head) * a.head_dim + j;
        } else {
            const size_t kvhead = head - a.nhead - (p.rotates ? 0 : a.nkvhead);
            p.to = (T *)(p.rotates ? a.k_cache : a.v_cache) + slot.at + kvhead * a.kv_block * a.head_dim + j;
        }
    } else if (E == ADD) {
        const size_t n = tile * LLA_TILE + g;
        if (n < a.n) p.low = to_float<T>(((const T *)a.out)[row * a.n + n]);
        if (n + 8 < a.n) p.high = to_float<T>(((const T *)a.out)[row * a.n + n + 8]);
    }
    return p;
}

/* What becomes of the two sums of a tile's rows g and g + 8 for one row of the step. ADD: gives the sum of the two
 * results' squares, for finish_squares(). */
template <class T, Epilogue E>
__device__ __forceinline__ float finish(const Linear &a, size_t row, size_t tile, size_t g, float low, float high,
                                        const Operands &p) {
    if (E == QKV) {
        if (!p.to) return 0;
        low = rounded<T>(low + p.low);
        high = rounded<T>(high + p.high);
        if (p.rotates) rotate<T>(low, high, p.c, p.s);
        ((T *)p.to)[0] = from_float<T>(low);
        ((T *)p.to)[a.half] = from_float<T>(high);
    } else if (E == SWIGLU) {
        const size_t j = tile * 8 + g;
        if (j < a.half) ((T *)a.out)[row * a.half + j] = swiglu<T>(low, high);
    } else {
        const size_t n = tile * LLA_TILE + g;
        T *out = (T *)a.out + row * a.n + n;
        if (E == ADD) {
            low = n < a.n ? p.low + rounded<T>(low) : 0;
            high = n + 8 < a.n ? p.high + rounded<T>(high) : 0;
        }
        const T results[2] = {from_float<T>(low), from_float<T>(high)};
        if (n < a.n) out[0] = results[0];
        if (n + 8 < a.n) out[8] = results[1];
        if (E == ADD) return squares(to_float<T>(results[0]), to_float<T>(results[1]));
    }
    return 0;
}

/* ADD: notes the sum of squares of a row's tile, of which eight lanes, APART apart, have two each (g is the lane's
 * number among them). All lanes of a warp call it, those too that have none. */
template <int APART>
__device__ __forceinline__ void finish_squares(const Linear &a, bool is_mine, size_t row, size_t tile, size_t g,
                                               float sum) {
    sum = sum_of_eight<APART>(sum);
    if (is_mine && g == 0) a.squares[row * lla_square_columns(a.n) + tile] = sum;
}

/* The product for many rows; see step_linear_many.cu. */
template <class T, Epilogue E> lla_status linear_many(const lla_cuda_ctx *ctx, const char *name, const Linear &a);

/* The product for shapes that the others do not take; see step_linear_any.cu. */
template <class T, Epilogue E> lla_status linear_any(const lla_cuda_ctx *ctx, const char *name, const Linear &a);

/* Whether linear_many() takes it: 16-bit elements, rows that lie on 16 bytes, and more than eight of them; or fewer,
 * where a cluster can share K, and fetching x would take a block that has all of K too long. */
template <class T, Epilogue E> bool has_many_rows(const lla_cuda_ctx *ctx, const Linear &a) {
    const bool can_split = ctx->compute >= 90 && (E == QKV || E == ADD);
    return sizeof(T) == 2 && a.k % 8 == 0 && a.max_rows > (!can_split ? 8 : a.k < 4096 ? 4 : 2);
}

#endif
