/* rows.c: what works on rows and elements: norm, rotation, addition, SwiGLU, argmax, conversion. */
#include "simd.h"

INLINE void norm_row(const int dt, size_t d, const void *x, const void *w, float eps, void *out) {
    vf sum = vf_zero();
    for (size_t j = 0; j < d; j += W) {
        vf v = vf_load_n(x, j, d - j < W ? d - j : W, dt);
        sum = vf_fma(v, v, sum);
    }
    const vf scale = vf_set(1.0f / sqrtf(vf_sum(sum) / (float)d + eps));
    for (size_t j = 0; j < d; j += W) {
        const size_t len = d - j < W ? d - j : W;
        vf v = vf_round(vf_mul(vf_load_n(x, j, len, dt), scale), dt);
        vf_store_n(out, j, len, vf_mul(vf_load_n(w, j, len, dt), v), dt);
    }
}

void LLA_FN(lla_rms_norm)(llaisysDataType_t dtype, size_t d, const void *x, const int32_t *index, const void *w,
                          float eps, void *out, size_t i0, size_t i1) {
    for (size_t i = i0; i < i1; i++) {
        size_t row = index ? (size_t)index[i] : i;
        LLA_BY_DTYPE(dtype, norm_row(dt, d, at(x, row * d, dt), w, eps, at_mut(out, i * d, dt)));
    }
}

INLINE void rotate(const int dt, size_t dim, const void *x, const float *cos_sin, bool round_products, void *out) {
    const size_t half = dim / 2;
    for (size_t j = 0; j < half; j += W) {
        const size_t len = half - j < W ? half - j : W;
        vf a = vf_load_n(x, j, len, dt), b = vf_load_n(x, half + j, len, dt);
        vf c = vf_load_n(cos_sin, j, len, F32), s = vf_load_n(cos_sin, half + j, len, F32);
        vf ac = vf_mul(a, c), bs = vf_mul(b, s), bc = vf_mul(b, c), as = vf_mul(a, s);
        if (round_products) {
            ac = vf_round(ac, dt);
            bs = vf_round(bs, dt);
            bc = vf_round(bc, dt);
            as = vf_round(as, dt);
        }
        vf_store_n(out, j, len, vf_sub(ac, bs), dt);
        vf_store_n(out, half + j, len, vf_add(bc, as), dt);
    }
}

void LLA_FN(lla_rotate)(llaisysDataType_t dtype, size_t dim, const void *x, const float *cos_sin, bool round_products,
                        void *out) {
    LLA_BY_DTYPE(dtype, rotate(dt, dim, x, cos_sin, round_products, out));
}

INLINE void add(const int dt, size_t n, const void *a, const void *b, void *out) {
    for (size_t i = 0; i < n; i += W) {
        const size_t len = n - i < W ? n - i : W;
        vf_store_n(out, i, len, vf_add(vf_load_n(a, i, len, dt), vf_load_n(b, i, len, dt)), dt);
    }
}

void LLA_FN(lla_add)(llaisysDataType_t dtype, size_t n, const void *a, const void *b, void *out) {
    LLA_BY_DTYPE(dtype, add(dt, n, a, b, out));
}

INLINE void swiglu(const int dt, size_t n, const void *gate, const void *up, bool round_silu, void *out) {
    for (size_t i = 0; i < n; i += W) {
        const size_t len = n - i < W ? n - i : W;
        vf silu = vf_silu(vf_load_n(gate, i, len, dt));
        if (round_silu) silu = vf_round(silu, dt);
        vf_store_n(out, i, len, vf_mul(silu, vf_load_n(up, i, len, dt)), dt);
    }
}

void LLA_FN(lla_swiglu)(llaisysDataType_t dtype, size_t n, const void *gate, const void *up, bool round_silu,
                        void *out) {
    LLA_BY_DTYPE(dtype, swiglu(dt, n, gate, up, round_silu, out));
}

/* A vector is looked at closely only where it holds a value above the best so far, or a NaN. */
INLINE size_t argmax(const int dt, size_t n, const void *values) {
    float best = -INFINITY;
    size_t where = 0;
    for (size_t i = 0; i < n; i += W) {
        const size_t end = i + W <= n ? i + W : n;
        if (end == i + W && !vf_any_above(vf_load(values, i, dt), vf_set(best))) continue;
        for (size_t j = i; j < end; j++) {
            float v = lla_load_float(values, j, (llaisysDataType_t)dt);
            if (isnan(v)) return j;
            if (v > best) best = v, where = j;
        }
    }
    return where;
}

size_t LLA_FN(lla_argmax)(llaisysDataType_t dtype, size_t n, const void *values) {
    LLA_BY_DTYPE(dtype, return argmax(dt, n, values));
}

INLINE void to_float(const int dt, size_t n, const void *x, float *out) {
    for (size_t i = 0; i < n; i += W) {
        const size_t len = n - i < W ? n - i : W;
        vf_store_n(out, i, len, vf_load_n(x, i, len, dt), F32);
    }
}

void LLA_FN(lla_to_float)(llaisysDataType_t dtype, size_t n, const void *x, float *out) {
    LLA_BY_DTYPE(dtype, to_float(dt, n, x, out));
}
