/* ops.c: the LLAISYS operators on the CPU (contracts in kernels/ops.h), over the same primitives as the step's nodes.
 */
#include "../ops.h"
#include "isa.h"

#include <math.h>
#include <omp.h>
#include <stdlib.h>

/* Below this many bytes one thread is faster than waking the others. */
enum { PARALLEL_BYTES = 1 << 16 };

static struct lla_team team(void) {
    return (struct lla_team){.rank = (size_t)omp_get_thread_num(), .size = (size_t)omp_get_num_threads()};
}

static const char *from(const void *base, size_t i, llaisysDataType_t dtype) {
    return (const char *)base + i * lla_dtype_size(dtype);
}
static char *to(void *base, size_t i, llaisysDataType_t dtype) {
    return (char *)base + i * lla_dtype_size(dtype);
}

static lla_status add(llaisysDataType_t dtype, size_t n, const void *a, const void *b, void *c) {
#pragma omp parallel if (n * lla_dtype_size(dtype) > PARALLEL_BYTES)
    {
        size_t lo, hi;
        lla_share(n, 64, team(), &lo, &hi);
        lla_isa()->add(dtype, hi - lo, from(a, lo, dtype), from(b, lo, dtype), to(c, lo, dtype));
    }
    return LLA_OK;
}

static lla_status argmax(llaisysDataType_t dtype, size_t n, const void *values, int64_t *index, void *value) {
    const size_t i = lla_isa()->argmax(dtype, n, values);
    *index = (int64_t)i;
    memcpy(value, from(values, i, dtype), lla_dtype_size(dtype));
    return LLA_OK;
}

static lla_status embedding(llaisysDataType_t dtype, size_t n, size_t d, size_t vocab, const int64_t *index,
                            const void *weight, void *out) {
    for (size_t i = 0; i < n; i++)
        LLA_REQUIRE(index[i] >= 0 && (uint64_t)index[i] < vocab, LLA_EINVAL,
                    "embedding: index[%zu] is %lld, expected 0 to %zu", i, (long long)index[i], vocab - 1);
    for (size_t i = 0; i < n; i++)
        memcpy(to(out, i * d, dtype), from(weight, (size_t)index[i] * d, dtype), d * lla_dtype_size(dtype));
    return LLA_OK;
}

static lla_status linear(llaisysDataType_t dtype, size_t m, size_t n, size_t k, const void *x, const void *w,
                         const void *bias, void *out) {
    const struct lla_linear args = {
        .dtype = dtype, .epilogue = LLA_EPI_STORE, .m = m, .n = n, .k = k, .x = x, .w = w, .bias = bias, .out = out};
#pragma omp parallel if (n * k * lla_dtype_size(dtype) > PARALLEL_BYTES || m * n > PARALLEL_BYTES)
    {
        size_t lo, hi;
        lla_share(n, 8, team(), &lo, &hi);
        if (lo < hi && m) lla_isa()->linear(&args, lo, hi);
    }
    return LLA_OK;
}

static lla_status rms_norm(llaisysDataType_t dtype, size_t rows, size_t d, const void *x, const void *w, float eps,
                           void *out) {
#pragma omp parallel if (rows * d * lla_dtype_size(dtype) > PARALLEL_BYTES)
    {
        size_t lo, hi;
        lla_share(rows, 1, team(), &lo, &hi);
        lla_isa()->rms_norm(dtype, d, x, NULL, w, eps, out, lo, hi);
    }
    return LLA_OK;
}

/* cos_sin [dim] of one position: dim/2 cosines, then sines, of angle = position / theta^(2j/dim), in double. Angles
 * below `rounded_below` are rounded to f32 once. */
static void angles(size_t dim, double theta, double position, double rounded_below, float *cos_sin) {
    for (size_t j = 0; j < dim / 2; j++) {
        double angle = position * pow(theta, -2.0 * (double)j / (double)dim);
        if (fabs(angle) < rounded_below) angle = (double)(float)angle;
        cos_sin[j] = (float)cos(angle);
        cos_sin[dim / 2 + j] = (float)sin(angle);
    }
}

static lla_status rope(llaisysDataType_t dtype, size_t seq, size_t heads, size_t d, const void *x, const int64_t *pos,
                       double theta, void *out) {
    if (d == 0) return LLA_OK;
    const int nthread = omp_get_max_threads();
    float *tables = malloc((size_t)nthread * d * sizeof *tables);
    LLA_REQUIRE(tables, LLA_ENOMEM, "rope: no memory for a table of %zu floats", (size_t)nthread * d);
#pragma omp parallel num_threads(nthread) if (seq * heads * d * lla_dtype_size(dtype) > PARALLEL_BYTES)
    {
        float *cos_sin = tables + team().rank * d;
        size_t lo, hi;
        lla_share(seq, 1, team(), &lo, &hi);
        for (size_t i = lo; i < hi; i++) {
            /* LLAISYS's own test compares with f32 angles of up to 1023 to 1e-4; exact ones would differ by up
             * to 1.2e-4. At long positions, where f32 angles are off by thousandths, ours stay exact. */
            angles(d, theta, (double)pos[i], 1024, cos_sin);
            for (size_t h = i * heads; h < (i + 1) * heads; h++)
                lla_isa()->rotate(dtype, d, from(x, h * d, dtype), cos_sin, false, to(out, h * d, dtype));
        }
    }
    free(tables);
    return LLA_OK;
}

void lla_rope_table(llaisysDataType_t dtype, size_t max_seq, size_t head_dim, double theta, void *out) {
#pragma omp parallel for
    for (size_t position = 0; position < max_seq; position++) {
        float cos_sin[1024];
        angles(head_dim, theta, (double)position, 0, cos_sin);
        for (size_t j = 0; j < head_dim; j++) lla_store_float(out, position * head_dim + j, cos_sin[j], dtype);
    }
}

static lla_status self_attention(llaisysDataType_t dtype, size_t seq, size_t total, size_t nh, size_t nkvh, size_t d,
                                 size_t dv, const void *q, const void *k, const void *v, float scale, void *out) {
    enum { ROWS = 16, MAX_DV = 1024 };
    LLA_REQUIRE(dv <= MAX_DV, LLA_EINVAL, "self_attention: head dimension of v is %zu, expected at most %d", dv,
                MAX_DV);
    const int32_t table = 0; /* one block that holds every position */
    const size_t group = nh / nkvh, tasks = nkvh * ((seq + ROWS - 1) / ROWS);
#pragma omp parallel for schedule(dynamic) if (seq * total * nh * d > PARALLEL_BYTES)
    for (size_t task = 0; task < tasks; task++) {
        const size_t kvhead = task % nkvh, row = task / nkvh * ROWS;
        const struct lla_attention a = {
            .dtype = dtype,
            .nrow = seq - row < ROWS ? seq - row : ROWS,
            .position0 = total - seq + row,
            .group = group,
            .dim = d,
            .vdim = dv,
            .scale = scale,
            .q = from(q, (row * nh + kvhead * group) * d, dtype),
            .q_stride = nh * d,
            .k = from(k, kvhead * d, dtype),
            .v = from(v, kvhead * dv, dtype),
            .k_token_stride = nkvh * d,
            .v_token_stride = nkvh * dv,
            .table = &table,
            .kv_shift = 63,
            .out = to(out, (row * nh + kvhead * group) * dv, dtype),
            .out_stride = nh * dv,
        };
        lla_isa()->attention(&a);
    }
    return LLA_OK;
}

static lla_status swiglu(llaisysDataType_t dtype, size_t n, const void *gate, const void *up, void *out) {
#pragma omp parallel if (n * lla_dtype_size(dtype) > PARALLEL_BYTES)
    {
        size_t lo, hi;
        lla_share(n, 64, team(), &lo, &hi);
        lla_isa()->swiglu(dtype, hi - lo, from(gate, lo, dtype), from(up, lo, dtype), false, to(out, lo, dtype));
    }
    return LLA_OK;
}

static lla_status rearrange(size_t element, size_t ndim, const size_t *shape, const ptrdiff_t *out_strides, void *out,
                            const ptrdiff_t *in_strides, const void *in) {
    size_t count = 1, index[8] = {0};
    for (size_t i = 0; i < ndim; i++) count *= shape[i];
    if (count == 0) return LLA_OK;
    /* innermost runs that are dense on both sides are copied whole */
    size_t run = 1, outer = ndim;
    while (outer > 0 && out_strides[outer - 1] == (ptrdiff_t)run && in_strides[outer - 1] == (ptrdiff_t)run)
        run *= shape[--outer];
    ptrdiff_t to_offset = 0, from_offset = 0;
    for (;;) {
        memcpy((char *)out + to_offset * (ptrdiff_t)element, (const char *)in + from_offset * (ptrdiff_t)element,
               run * element);
        size_t i = outer;
        while (i > 0) {
            i--;
            to_offset += out_strides[i];
            from_offset += in_strides[i];
            if (++index[i] < shape[i]) break;
            to_offset -= out_strides[i] * (ptrdiff_t)shape[i];
            from_offset -= in_strides[i] * (ptrdiff_t)shape[i];
            index[i] = 0;
            if (i == 0) return LLA_OK;
        }
        if (outer == 0) return LLA_OK;
    }
}

const struct lla_op_table *lla_cpu_ops(void) {
    static const struct lla_op_table table = {add,  argmax,         embedding, linear,   rms_norm,
                                              rope, self_attention, swiglu,    rearrange};
    return &table;
}
