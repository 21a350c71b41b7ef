/* ops_attention.cu: causal attention for 16-bit operands with heads of up to 256 elements, on tensor cores.
 *
 * The queries of the heads that share a key head are packed: row r of key head h is query token r / group, head h *
 * group + r % group. A block has 64 or 128 rows, 16 a warp, and walks over its keys in tiles of KEYS, two tiles of k
 * and v in shared memory: one in use, one on its way. Scores, maxima and sums are f32; probabilities are rounded to the
 * dtype for the product with v.
 *
 * Few rows and a long cache would leave most of the device idle. Keys are then cut into parts, each with a block of its
 * own, which leaves its unfinished result in `partials`; a second kernel puts the parts together, in order. */
#include "ops_attention.cuh"

/* A row of HD elements is HD / 8 units of 16 bytes; unit c of row r lies at place c ^ (r % 8): see gemm_tiles.cuh. */
template <int HD> static __device__ __forceinline__ uint32_t place(unsigned row, unsigned unit) {
    return row * (HD * 2) + ((unit ^ (row % 8)) * 16);
}

/* Copies ROWS rows of `width` elements to a tile of HD columns in shared memory: row(r) is row r, or NULL for a row of
 * zeros. Columns beyond the width become zeros, too. base: any valid address. */
template <class T, int HD, int ROWS, int THREADS, class Row>
static __device__ __forceinline__ void copy_rows(uint32_t tile, unsigned width, bool is_wide, const T *base, Row row) {
    constexpr int UNITS = HD / 8;
    static_assert(ROWS * UNITS % THREADS == 0, "all threads copy as many units");
    const unsigned unit = threadIdx.x % UNITS;
#pragma unroll
    for (int i = 0; i < ROWS * UNITS / THREADS; i++) {
        const unsigned r = threadIdx.x / UNITS + i * (THREADS / UNITS);
        const T *from = row(r);
        if (is_wide) {
            const bool is_inside = from && unit * 8 < width;
            cp_async_16(tile + place<HD>(r, unit), is_inside ? from + unit * 8 : base, is_inside);
        } else {
            Pack<T, 8> pack;
#pragma unroll
            for (unsigned j = 0; j < 8; j++)
                pack.at[j] = from && unit * 8 + j < width ? from[unit * 8 + j] : round_to<T>(0.0f);
            store_shared_16(tile + place<HD>(r, unit), *reinterpret_cast<const uint4 *>(&pack));
        }
    }
}

/* WARPS warps of 16 rows each. FULL: d and dv are HD and rows are aligned, which leaves no branches inside a tile. */
template <class T, int HD, int KEYS, int WARPS, bool FULL>
__global__ void __launch_bounds__(32 * WARPS, FULL ? 2 : 1)
    attention_tiles(lla_attention_shape s, const T *q, const T *k, const T *v, T *out, float *partials) {
    constexpr int ROWS = 16 * WARPS, THREADS = 32 * WARPS;
    constexpr int TILE_BYTES = KEYS * HD * 2, KEY_TILES = KEYS / 8, D_STEPS = HD / 16;
    extern __shared__ __align__(128) char smem[]; /* q [ROWS, HD]; twice k [KEYS, HD], v [KEYS, HD] */
    const unsigned d = FULL ? HD : s.d, dv = FULL ? HD : s.dv;
    const bool is_wide = FULL || s.is_wide;
    const uint32_t q_tile = shared_address(smem), kv_tiles = q_tile + ROWS * HD * 2;
    const unsigned warp = threadIdx.x / 32, lane = threadIdx.x % 32, kv_head = blockIdx.y;
    /* the last rows see the most keys: they start first */
    const unsigned row0 = (gridDim.x - 1 - blockIdx.x) * ROWS, rows = s.seq * s.group;
    const unsigned past = s.total - s.seq; /* query token i sees keys 0 .. past + i */
    const unsigned last_row = min(row0 + ROWS, rows) - 1;
    const unsigned key_begin = blockIdx.z * s.part_keys;
    const unsigned key_end = min(min(key_begin + s.part_keys, s.total), past + last_row / s.group + 1);
    const unsigned free_end = min(key_end, past + row0 / s.group + 1); /* keys before are seen by all rows */

    const auto copy_kv = [&](unsigned key, unsigned buffer) {
        const uint32_t to = kv_tiles + buffer * (2 * TILE_BYTES);
        const T *from = k + (static_cast<size_t>(key) * s.nkvh + kv_head) * d;
        copy_rows<T, HD, KEYS, THREADS>(to, d, is_wide, k, [&](unsigned r) {
            return key + r < key_end ? from + static_cast<size_t>(r * s.nkvh) * d : nullptr;
        });
        from = v + (static_cast<size_t>(key) * s.nkvh + kv_head) * dv;
        copy_rows<T, HD, KEYS, THREADS>(to + TILE_BYTES, dv, is_wide, v, [&](unsigned r) {
            return key + r < key_end ? from + static_cast<size_t>(r * s.nkvh) * dv : nullptr;
        });
        cp_async_commit();
    };

    float sum[HD / 8][4] = {}, top[2] = {-INFINITY, -INFINITY},
                   weight[2] = {}; /* rows lane / 4 and lane / 4 + 8 of the warp */
    if (key_begin < key_end) {
        copy_rows<T, HD, ROWS, THREADS>(q_tile, d, is_wide, q, [&](unsigned r) {
            const unsigned row = row0 + r;
            const size_t at = static_cast<size_t>(row / s.group) * s.nh + kv_head * s.group + row % s.group;
            return row < rows ? q + at * d : nullptr;
        });
        copy_kv(key_begin, 0);
    }
    const bool is_busy = row0 + warp * 16 < rows; /* a warp without rows only copies */
    unsigned sees[2];                             /* keys that the thread's rows see */
#pragma unroll
    for (int h = 0; h < 2; h++) sees[h] = past + min(row0 + warp * 16 + lane / 4 + h * 8, rows - 1) / s.group + 1;

    unsigned buffer = 0;
    for (unsigned key = key_begin; key < key_end; key += KEYS, buffer ^= 1) {
        if (key + KEYS < key_end) {
            copy_kv(key + KEYS, buffer ^ 1);
            cp_async_wait<1>();
        } else {
            cp_async_wait<0>();
        }
        __syncthreads();
        if (is_busy) {
            const uint32_t k_tile = kv_tiles + buffer * (2 * TILE_BYTES), v_tile = k_tile + TILE_BYTES;
            float score[KEY_TILES][4] = {};
#pragma unroll
            for (int step = 0; step < D_STEPS; step++) {
                if (!FULL && step * 16u >= d) break;
                const uint4 a = ldmatrix_x4(q_tile + place<HD>(warp * 16 + lane % 16, step * 2 + lane / 16));
#pragma unroll
                for (int j = 0; j < KEY_TILES; j += 2) {
                    const uint4 b =
                        ldmatrix_x4(k_tile + place<HD>(j * 8 + lane % 8 + lane / 16 * 8, step * 2 + lane / 8 % 2));
                    mma_16816<T>(score[j], a, make_uint2(b.x, b.y));
                    mma_16816<T>(score[j + 1], a, make_uint2(b.z, b.w));
                }
            }
            /* scores in powers of two, hidden ones -inf; the new maxima */
            float before[2] = {top[0], top[1]};
            const bool is_free = key + KEYS <= free_end;
#pragma unroll
            for (int j = 0; j < KEY_TILES; j++)
#pragma unroll
                for (int c = 0; c < 4; c++) {
                    const unsigned at = key + j * 8 + lane % 4 * 2 + c % 2;
                    score[j][c] *= s.scale_log2;
                    if (!is_free && (at >= sees[c / 2] || at >= key_end)) score[j][c] = -INFINITY;
                    top[c / 2] = fmaxf(top[c / 2], score[j][c]);
                }
            float base[2];
#pragma unroll
            for (int h = 0; h < 2; h++) {
                top[h] = fmaxf(top[h], __shfl_xor_sync(0xffffffffu, top[h], 1));
                top[h] = fmaxf(top[h], __shfl_xor_sync(0xffffffffu, top[h], 2));
                base[h] = top[h] == -INFINITY ? 0.0f : top[h]; /* nothing seen yet */
                const float shrink = exp2_fast(before[h] - base[h]);
                weight[h] *= shrink;
#pragma unroll
                for (int j = 0; j < HD / 8; j++) {
                    sum[j][2 * h] *= shrink;
                    sum[j][2 * h + 1] *= shrink;
                }
            }
            /* accumulators of two neighbouring key tiles are, rounded, the operand of 16 keys */
#pragma unroll
            for (int step = 0; step < KEYS / 16; step++) {
                float p[2][4];
#pragma unroll
                for (int j = 0; j < 2; j++)
#pragma unroll
                    for (int c = 0; c < 4; c++) {
                        p[j][c] = exp2_fast(score[step * 2 + j][c] - base[c / 2]);
                        weight[c / 2] += p[j][c];
                    }
                const uint4 a = make_uint4(round_pair<T>(p[0][0], p[0][1]), round_pair<T>(p[0][2], p[0][3]),
                                           round_pair<T>(p[1][0], p[1][1]), round_pair<T>(p[1][2], p[1][3]));
#pragma unroll
                for (int j = 0; j < HD / 8; j += 2) {
                    if (!FULL && j * 8u >= dv) break;
                    const uint4 b = ldmatrix_x4_trans(v_tile + place<HD>(step * 16 + lane % 16, j + lane / 16));
                    mma_16816<T>(sum[j], a, make_uint2(b.x, b.y));
                    mma_16816<T>(sum[j + 1], a, make_uint2(b.z, b.w));
                }
            }
        }
        __syncthreads(); /* this buffer is written next */
    }
    cp_async_wait<0>();

#pragma unroll
    for (int h = 0; h < 2; h++) {
        weight[h] += __shfl_xor_sync(0xffffffffu, weight[h], 1);
        weight[h] += __shfl_xor_sync(0xffffffffu, weight[h], 2);
        const unsigned row = row0 + warp * 16 + lane / 4 + h * 8;
        if (row >= rows) continue;
        const size_t at = static_cast<size_t>(row / s.group) * s.nh + kv_head * s.group + row % s.group;
        if (partials) { /* [part][query token, head][dv + 2]: sums, maximum, weight */
            float *part = partials + (blockIdx.z * static_cast<size_t>(s.seq) * s.nh + at) * (dv + 2);
#pragma unroll
            for (int j = 0; j < HD / 8; j++)
#pragma unroll
                for (int c = 0; c < 2; c++) {
                    const unsigned column = j * 8 + lane % 4 * 2 + c;
                    if (column < dv) part[column] = sum[j][2 * h + c];
                }
            if (lane % 4 == 0) {
                part[dv] = top[h];
                part[dv + 1] = weight[h];
            }
            continue;
        }
        const float inv = 1.0f / weight[h];
        T *to = out + at * dv;
#pragma unroll
        for (int j = 0; j < HD / 8; j++) {
            const unsigned column = j * 8 + lane % 4 * 2;
            if (is_wide && column < dv) {
                *reinterpret_cast<uint32_t *>(to + column) =
                    round_pair<T>(sum[j][2 * h] * inv, sum[j][2 * h + 1] * inv);
            } else {
                if (column < dv) to[column] = round_to<T>(sum[j][2 * h] * inv);
                if (column + 1 < dv) to[column + 1] = round_to<T>(sum[j][2 * h + 1] * inv);
            }
        }
    }
}

enum { JOIN_THREADS = 128 };

/* One block for a query token and head. */
template <class T>
__global__ void __launch_bounds__(JOIN_THREADS)
    attention_join(unsigned parts, unsigned heads, unsigned dv, const float *partials, T *out) {
    const size_t row = blockIdx.x, step = static_cast<size_t>(heads) * (dv + 2);
    const float *part = partials + row * (dv + 2);
    float top = -INFINITY;
    for (unsigned i = 0; i < parts; i++) top = fmaxf(top, part[i * step + dv]);
    for (unsigned column = threadIdx.x; column < dv; column += JOIN_THREADS) {
        float sum = 0, weight = 0;
        for (unsigned i = 0; i < parts; i++) {
            const float shrink = exp2f(part[i * step + dv] - top); /* 0 for a part that the row does not see */
            sum += shrink * part[i * step + column];
            weight += shrink * part[i * step + dv + 1];
        }
        out[row * dv + column] = round_to<T>(sum / weight);
    }
}

template <class T, int HD, int KEYS, int WARPS, bool FULL>
static lla_status launch(lla_attention_shape s, const void *q, const void *k, const void *v, void *out, float *partials,
                         unsigned parts, cudaStream_t stream) {
    constexpr int ROWS = 16 * WARPS;
    constexpr size_t smem = ROWS * HD * 2 + 4 * KEYS * HD * 2;
    static_assert(smem <= 99 * 1024, "fits in the shared memory of a block on sm_89");
    const auto kernel = attention_tiles<T, HD, KEYS, WARPS, FULL>;
    LLA_TRY(allow_smem(kernel, smem, "self_attention: shared memory"));
    const dim3 grid(static_cast<unsigned>(ceil_div(static_cast<size_t>(s.seq) * s.group, ROWS)), s.nkvh, parts);
    kernel<<<grid, 32 * WARPS, smem, stream>>>(s, static_cast<const T *>(q), static_cast<const T *>(k),
                                               static_cast<const T *>(v), static_cast<T *>(out),
                                               parts > 1 ? partials : nullptr);
    LLA_CUDA_LAUNCHED("self_attention");
    if (parts == 1) return LLA_OK;
    attention_join<T>
        <<<s.seq * s.nh, JOIN_THREADS, 0, stream>>>(parts, s.seq * s.nh, s.dv, partials, static_cast<T *>(out));
    LLA_CUDA_LAUNCHED("self_attention: joining parts");
    return LLA_OK;
}

/* Keys are cut into parts of a tile or more where blocks are fewer than half of the SMs and the partial results have
 * room. */
static unsigned choose_parts(const lla_attention_shape *s, size_t capacity, int sm_count, unsigned *part_keys) {
    enum { ROWS = 64, LEAST_KEYS = 64 };
    const size_t blocks = ceil_div(static_cast<size_t>(s->seq) * s->group, ROWS) * s->nkvh;
    const size_t room = capacity / (static_cast<size_t>(s->seq) * s->nh * (s->dv + 2) * sizeof(float));
    size_t parts = static_cast<size_t>(sm_count) / blocks;
    if (parts > ceil_div(s->total, LEAST_KEYS)) parts = ceil_div(s->total, LEAST_KEYS);
    if (parts > room) parts = room;
    if (parts <= 1) {
        *part_keys = s->total;
        return 1;
    }
    *part_keys = static_cast<unsigned>(ceil_div(ceil_div(s->total, parts), LEAST_KEYS) * LEAST_KEYS);
    return static_cast<unsigned>(ceil_div(s->total, *part_keys));
}

template <class T>
static lla_status run(lla_attention_shape s, const void *q, const void *k, const void *v, void *out, void *partials,
                      size_t capacity, cudaStream_t stream) {
    const struct lla_cuda_facts *facts;
    LLA_TRY(lla_cuda_facts_get(&facts));
    s.is_wide = s.d % 8 == 0 && s.dv % 8 == 0 && aligned_16(q, k, v, out);
    const unsigned parts = choose_parts(&s, capacity, facts->sm_count, &s.part_keys);
    float *room = static_cast<float *>(partials);
    const unsigned width = s.d > s.dv ? s.d : s.dv;
    if (s.is_wide && s.d == s.dv && (width == 64 || width == 128)) {
        /* many rows: twice as many of them share a tile of keys */
        const bool is_many =
            ceil_div(static_cast<size_t>(s.seq) * s.group, 128) * s.nkvh >= static_cast<size_t>(facts->sm_count);
        if (width == 64 && is_many) return launch<T, 64, 64, 8, true>(s, q, k, v, out, room, parts, stream);
        if (width == 64) return launch<T, 64, 64, 4, true>(s, q, k, v, out, room, parts, stream);
        if (is_many) return launch<T, 128, 64, 8, true>(s, q, k, v, out, room, parts, stream);
        return launch<T, 128, 64, 4, true>(s, q, k, v, out, room, parts, stream);
    }
    if (width <= 64) return launch<T, 64, 64, 4, false>(s, q, k, v, out, room, parts, stream);
    if (width <= 128) return launch<T, 128, 64, 4, false>(s, q, k, v, out, room, parts, stream);
    return launch<T, 256, 32, 4, false>(s, q, k, v, out, room, parts, stream);
}

lla_status lla_cuda_op_attention(llaisysDataType_t dtype, size_t seq, size_t total, size_t nh, size_t nkvh, size_t d,
                                 size_t dv, const void *q, const void *k, const void *v, float scale, void *out,
                                 void *partials, size_t capacity, cudaStream_t stream) {
    enum { MAX_WIDTH = 256, MAX_KV_HEADS = 65535 };
    if (seq == 0 || nh == 0 || dv == 0) return LLA_OK;
    LLA_REQUIRE(total <= INT32_MAX / 2 && d <= INT32_MAX && dv <= INT32_MAX && nh <= INT32_MAX / seq &&
                    nkvh <= MAX_KV_HEADS,
                LLA_EINVAL,
                "self_attention: %zu queries of %zu heads over %zu keys of %zu heads are more than a launch can count",
                seq, nh, total, nkvh);
    lla_attention_shape s = {};
    s.seq = static_cast<unsigned>(seq);
    s.total = static_cast<unsigned>(total);
    s.nh = static_cast<unsigned>(nh);
    s.nkvh = static_cast<unsigned>(nkvh);
    s.group = static_cast<unsigned>(nh / nkvh);
    s.d = static_cast<unsigned>(d);
    s.dv = static_cast<unsigned>(dv);
    s.scale = scale;
    s.scale_log2 = scale * 1.44269504088896340736f;
    if (dtype == LLAISYS_DTYPE_F32 || d == 0 || d > MAX_WIDTH || dv > MAX_WIDTH)
        return lla_cuda_attention_any(dtype, s, q, k, v, out, stream);
    if (dtype == LLAISYS_DTYPE_BF16) return run<__nv_bfloat16>(s, q, k, v, out, partials, capacity, stream);
    return run<__half>(s, q, k, v, out, partials, capacity, stream);
}
