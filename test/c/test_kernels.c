/* test_kernels.c: the CPU's primitives of every instruction set against plain references in double precision. Operands
 * end at a page that may not be touched, so that a read or write beyond them is seen. test_attention.c has the rest. */
#include "harness.h"
#include "kernels.h"

static const llaisysDataType_t dtypes[] = {LLAISYS_DTYPE_BF16, LLAISYS_DTYPE_F16, LLAISYS_DTYPE_F32};

/* ---- rounding ---- */

static float widen(uint16_t h, llaisysDataType_t dtype) {
    return dtype == LLAISYS_DTYPE_BF16 ? lla_bf16_to_f32(h) : lla_f16_to_f32(h);
}

static uint16_t narrow(float value, llaisysDataType_t dtype) {
    return dtype == LLAISYS_DTYPE_BF16 ? lla_f32_to_bf16(value) : lla_f32_to_f16(value);
}

/* The nearest 16-bit float, ties to even, by search in a table of all finite non-negative ones. */
static uint16_t nearest(float value, llaisysDataType_t dtype) {
    const bool bf16 = dtype == LLAISYS_DTYPE_BF16;
    const uint16_t sign = signbit(value) ? 0x8000 : 0, infinity = bf16 ? 0x7f80 : 0x7c00;
    const double v = fabs((double)value);
    size_t lo = 0, hi = infinity; /* lo <= v < hi */
    if (v >= INFINITY) return sign | infinity;
    while (hi - lo > 1) {
        const size_t mid = (lo + hi) / 2;
        if ((double)widen((uint16_t)mid, dtype) <= v)
            lo = mid;
        else
            hi = mid;
    }
    const uint16_t low = (uint16_t)lo, high = (uint16_t)hi;
    const double below = (double)widen(low, dtype);
    /* infinity counts as the next power of two */
    const double above = high == infinity ? (bf16 ? 0x1p128 : 0x1p16) : (double)widen(high, dtype);
    const double middle = (below + above) / 2;
    return sign | (v < middle || (v == middle && low % 2 == 0) ? low : high);
}

/* f32 values around every 16-bit float: itself, the midpoint to the next, and the neighbours of both. */
static size_t neighbours(uint16_t h, llaisysDataType_t dtype, float out[8]) {
    const uint16_t infinity = dtype == LLAISYS_DTYPE_BF16 ? 0x7f80 : 0x7c00, magnitude = h & 0x7fff;
    const float f = widen(h, dtype);
    size_t n = 0;
    out[n++] = f;
    if (magnitude > infinity) return n;
    out[n++] = nextafterf(f, INFINITY);
    out[n++] = nextafterf(f, -INFINITY);
    if (magnitude == infinity) return n;
    float middle;
    if (dtype == LLAISYS_DTYPE_BF16) {
        middle = lla_bits_float((uint32_t)h << 16 | 0x8000);
    } else {
        const uint16_t next = h + 1;
        const float g = magnitude + 1 == infinity ? copysignf(65536.0f, f) : lla_f16_to_f32(next);
        middle = f + (g - f) / 2; /* exact: f32 has 13 bits more */
    }
    out[n++] = middle;
    out[n++] = nextafterf(middle, INFINITY);
    out[n++] = nextafterf(middle, -INFINITY);
    return n;
}

TEST(scalar_rounding) {
    for (size_t d = 0; d < 2; d++)
        for (size_t bits = 0; bits < 0x10000; bits++) {
            const uint16_t h = (uint16_t)bits;
            const float f = widen(h, dtypes[d]);
            float values[8];
            const size_t n = neighbours(h, dtypes[d], values);
            for (size_t i = 0; i < n; i++) {
                const uint16_t got = narrow(values[i], dtypes[d]);
                if (isnan(values[i]))
                    CHECK(isnan(widen(got, dtypes[d])));
                else if (got != nearest(values[i], dtypes[d]))
                    HARNESS_FAIL("%s of %a is 0x%04x, expected 0x%04x", lla_dtype_name(dtypes[d]), (double)values[i],
                                 got, nearest(values[i], dtypes[d]));
            }
            /* what a 16-bit float means, from its fields */
            const int exponent = dtypes[d] == LLAISYS_DTYPE_BF16 ? h >> 7 & 0xff : h >> 10 & 0x1f;
            const int width = dtypes[d] == LLAISYS_DTYPE_BF16 ? 7 : 10,
                      top = dtypes[d] == LLAISYS_DTYPE_BF16 ? 255 : 31;
            const int mantissa = h & ((1 << width) - 1);
            if (exponent == top) {
                CHECK(mantissa ? isnan(f) : isinf(f));
                continue;
            }
            const double v = ldexp((exponent ? 1 << width : 0) + mantissa, (exponent ? exponent : 1) - top / 2 - width);
            CHECK((double)f == (h & 0x8000 ? -v : v) && !signbit(f) == !(h & 0x8000));
            if (TEST_FAILURES > 20) return;
        }
}

/* x 1 and 0 turned by (c, 0) is c, rounded by the vector code. */
TEST(vector_rounding) {
    enum { N = 1 << 12 };
    static uint16_t x[2 * N], out[2 * N];
    static float cos_sin[2 * N];
    EACH_ISA(isa) for (size_t d = 0; d < 2; d++) {
        size_t n = 0, wrong = 0;
        for (size_t i = 0; i < N; i++) lla_store_float(x, i, 1, dtypes[d]);
        for (size_t bits = 0; bits < 0x10000; bits++) {
            float values[8];
            const size_t count = neighbours((uint16_t)bits, dtypes[d], values);
            for (size_t i = 0; i < count; i++) {
                cos_sin[n++] = values[i];
                if (n < N && (bits < 0xffff || i + 1 < count)) continue;
                isa->rotate(dtypes[d], 2 * N, x, cos_sin, false, out);
                for (size_t j = 0; j < n; j++) {
                    const uint16_t expected = narrow(cos_sin[j], dtypes[d]);
                    if (out[j] != expected && !wrong++)
                        HARNESS_FAIL("%s: %s of %a is 0x%04x, expected 0x%04x", isa->name, lla_dtype_name(dtypes[d]),
                                     (double)cos_sin[j], out[j], expected);
                }
                n = 0;
            }
        }
        CHECK_INT(wrong, 0);
    }
}

TEST(widening) {
    static uint16_t bits[0x10000];
    static float out[0x10000];
    for (size_t i = 0; i < 0x10000; i++) bits[i] = (uint16_t)i;
    EACH_ISA(isa) for (size_t d = 0; d < 2; d++) {
        isa->to_float(dtypes[d], 0x10000, bits, out);
        for (size_t i = 0; i < 0x10000; i++) {
            const float f = lla_load_float(bits, i, dtypes[d]);
            CHECK(isnan(f) ? isnan(out[i]) : lla_float_bits(f) == lla_float_bits(out[i]));
        }
    }
}

/* ---- linear ---- */

/* Small integers: every sum is exact in f32 whatever its order, so that results must agree to the bit. */
struct linear_case {
    size_t m, n, k;
    int8_t *x, *w, *w2;
    int *acc, *acc2; /* [m, n] */
};

static void products(const struct linear_case *c, const int8_t *w, int *acc) {
    for (size_t i = 0; i < c->m; i++)
        for (size_t j = 0; j < c->n; j++) {
            int sum = 0;
            for (size_t l = 0; l < c->k; l++) sum += c->x[i * c->k + l] * w[j * c->k + l];
            acc[i * c->n + j] = sum;
        }
}

static void digits(struct rng *rng, int8_t *out, size_t n, int most) {
    for (size_t i = 0; i < n; i++) out[i] = (int8_t)(rng_below(rng, (size_t)(2 * most + 1)) - (size_t)most);
}

static void store_all(void *to, const int8_t *from, size_t n, float scale, llaisysDataType_t dtype) {
    for (size_t i = 0; i < n; i++) lla_store_float(to, i, scale * (float)from[i], dtype);
}

static float rounded(double value, llaisysDataType_t dtype) {
    float out;
    char h[4];
    lla_store_float(h, 0, (float)value, dtype);
    out = lla_load_float(h, 0, dtype);
    return out;
}

static void linear_one(const struct lla_isa *isa, const struct linear_case *c, llaisysDataType_t dtype,
                       enum lla_epilogue epilogue, struct rng *rng) {
    const size_t e = lla_dtype_size(dtype), m = c->m, n = c->n, k = c->k;
    const float scale = 0.125f; /* keeps f16 and the exponentials in range */
    const bool has_bias = epilogue == LLA_EPI_STORE && rng_below(rng, 2);
    void *x = guarded(0, m * k * e), *w = guarded(1, n * k * e), *w2 = guarded(2, n * k * e), *bias = guarded(3, n * e);
    void *out = guarded(4, m * n * e);
    int8_t some[256];
    store_all(x, c->x, m * k, 1, dtype);
    store_all(w, c->w, n * k, scale, dtype);
    store_all(w2, c->w2, n * k, scale, dtype);
    digits(rng, some, n < sizeof some ? n : sizeof some, 100);
    for (size_t j = 0; j < n; j++) lla_store_float(bias, j, 0.0625f * (float)some[j % sizeof some], dtype);
    for (size_t i = 0; i < m * n; i++) lla_store_float(out, i, 0.375f * (float)some[i % 200 % n], dtype);

    /* columns [n0, n1) in one to three calls */
    const size_t n0 = rng_below(rng, 3) ? 0 : rng_below(rng, n + 1), n1 = rng_below(rng, 3) ? n : rng_range(rng, n0, n);
    const size_t cut = rng_range(rng, n0, n1);
    const struct lla_linear args = {
        dtype, epilogue, m, n, k, x, w, epilogue == LLA_EPI_SWIGLU ? w2 : NULL, has_bias ? bias : NULL, out};
    isa->linear(&args, n0, cut);
    isa->linear(&args, cut, n1);

    for (size_t i = 0; i < m; i++)
        for (size_t j = 0; j < n; j++) {
            const float acc = scale * (float)c->acc[i * n + j], old = 0.375f * (float)some[(i * n + j) % 200 % n];
            const float got = lla_load_float(out, i * n + j, dtype), before = rounded(old, dtype);
            float lo = before, hi = before;
            if (j >= n0 && j < n1) {
                const float b = has_bias ? lla_load_float(bias, j, dtype) : 0;
                if (epilogue == LLA_EPI_STORE) lo = hi = rounded(acc + b, dtype);
                if (epilogue == LLA_EPI_ADD) lo = hi = rounded(before + rounded(acc, dtype), dtype);
                if (epilogue == LLA_EPI_SWIGLU) {
                    const double g = (double)rounded(acc, dtype), s = g / (1 + exp(-g));
                    const float u = rounded(scale * (float)c->acc2[i * n + j], dtype);
                    lo = rounded(rounded(s * (1 - 0x1p-21), dtype) * u, dtype);
                    hi = rounded(rounded(s * (1 + 0x1p-21), dtype) * u, dtype);
                    /* beyond the range of the exponential: nothing that is left counts */
                    if (g < -80) lo -= 0x1p-60f * fabsf(u), hi += 0x1p-60f * fabsf(u);
                }
            }
            if (between(got, lo, hi)) continue;
            HARNESS_FAIL("%s %s epilogue %d m %zu n %zu k %zu: [%zu, %zu] is %a, expected %a to %a", isa->name,
                         lla_dtype_name(dtype), epilogue, m, n, k, i, j, (double)got, (double)lo, (double)hi);
            return;
        }
}

TEST(linear) {
    static const size_t ks[] = {0,  1,  2,   7,   15,  16,  17,   31,   32,   33,  63,
                                64, 65, 100, 127, 129, 300, 2047, 2048, 2049, 5000};
    static const size_t ns[] = {1, 3, 5, 6, 8, 13, 31, 95, 97, 103, 200};
    struct rng rng = {21};
    for (size_t ki = 0; ki < sizeof ks / sizeof *ks; ki++)
        for (int round = 0; round < (SLOW ? 5 : 14); round++) {
            struct linear_case c = {rng_range(&rng, 1, round % 2 ? 70 : 20), ns[rng_below(&rng, 11)], ks[ki]};
            if (round == 0) c.m = 1;
            if (round == 1) c.m = 70, c.n = 103;
            if (round == 2) c.m = 2;
            if (c.k > 2000 && c.m * c.n > 1500) c.n = 1500 / c.m + 1;
            c.x = malloc(c.m * c.k + 1), c.w = malloc(c.n * c.k + 1), c.w2 = malloc(c.n * c.k + 1);
            c.acc = malloc(c.m * c.n * sizeof *c.acc), c.acc2 = malloc(c.m * c.n * sizeof *c.acc2);
            digits(&rng, c.x, c.m * c.k, 3);
            digits(&rng, c.w, c.n * c.k, 3);
            digits(&rng, c.w2, c.n * c.k, 3);
            products(&c, c.w, c.acc);
            products(&c, c.w2, c.acc2);
            EACH_ISA(isa)
            for (int epilogue = 0; epilogue < 3; epilogue++)
                linear_one(isa, &c, dtypes[rng_below(&rng, 3)], (enum lla_epilogue)epilogue, &rng);
            free(c.x), free(c.w), free(c.w2), free(c.acc), free(c.acc2);
            if (TEST_FAILURES > 10) return;
        }
}

/* Numbers of all sizes: close to the exact sum, and the same to the bit in any batch and any share of the columns. */
TEST(linear_of_real_numbers) {
    struct rng rng = {22};
    for (int round = 0; round < (SLOW ? 6 : 30); round++) EACH_ISA(isa) {
            const llaisysDataType_t dtype = dtypes[rng_below(&rng, 3)];
            const size_t e = lla_dtype_size(dtype), m = rng_range(&rng, 1, 40), n = rng_range(&rng, 1, 60);
            const size_t k = rng_below(&rng, 3) ? rng_range(&rng, 1, 600) : rng_range(&rng, 2000, 4500);
            char *x = guarded(0, m * k * e), *w = guarded(1, n * k * e), *out = guarded(4, m * n * e);
            char *alone = guarded(5, n * e);
            for (size_t i = 0; i < m * k; i++) lla_store_float(x, i, rng_normal(&rng), dtype);
            for (size_t i = 0; i < n * k; i++) lla_store_float(w, i, rng_normal(&rng), dtype);
            isa->linear(&(struct lla_linear){dtype, LLA_EPI_STORE, m, n, k, x, w, NULL, NULL, out}, 0, n);
            for (size_t i = 0; i < m; i++) {
                const size_t cut = rng_below(&rng, n + 1);
                const struct lla_linear one = {dtype, LLA_EPI_STORE, 1, n, k, x + i * k * e, w, NULL, NULL, alone};
                isa->linear(&one, 0, cut);
                isa->linear(&one, cut, n);
                if (memcmp(alone, out + i * n * e, n * e))
                    HARNESS_FAIL("%s %s m %zu n %zu k %zu: row %zu differs when it is alone", isa->name,
                                 lla_dtype_name(dtype), m, n, k, i);
                for (size_t j = 0; j < n && i < 3; j++) {
                    double sum = 0, size = 0;
                    for (size_t l = 0; l < k; l++) {
                        const double p =
                            (double)lla_load_float(x, i * k + l, dtype) * (double)lla_load_float(w, j * k + l, dtype);
                        sum += p, size += fabs(p);
                    }
                    const double slack = size * 0x1p-20;
                    CHECK(between(lla_load_float(alone, j, dtype), rounded(sum - slack, dtype),
                                  rounded(sum + slack, dtype)));
                }
            }
            if (TEST_FAILURES > 10) return;
        }
}

/* ---- rows ---- */

TEST(rms_norm) {
    struct rng rng = {31};
    for (int round = 0; round < (SLOW ? 100 : 400); round++) EACH_ISA(isa) {
            const llaisysDataType_t dtype = dtypes[rng_below(&rng, 3)];
            const size_t e = lla_dtype_size(dtype), rows = rng_range(&rng, 1, 9);
            const size_t d = rng_below(&rng, 4) ? rng_range(&rng, 1, 130) : rng_range(&rng, 1000, 5120);
            const float eps = rng_below(&rng, 2) ? 1e-6f : 1e-2f, size = ldexpf(1, (int)rng_below(&rng, 12) - 6);
            char *x = guarded(0, rows * d * e), *w = guarded(1, d * e), *out = guarded(4, rows * d * e);
            int32_t index[9];
            const bool indexed = rng_below(&rng, 2);
            for (size_t i = 0; i < rows * d; i++) lla_store_float(x, i, size * rng_normal(&rng), dtype);
            for (size_t i = 0; i < d; i++) lla_store_float(w, i, 1 + 0.3f * rng_normal(&rng), dtype);
            for (size_t i = 0; i < rows; i++) index[i] = (int32_t)rng_below(&rng, rows);
            memset(out, 0x5a, rows * d * e);
            const size_t i0 = rng_below(&rng, rows), i1 = rng_range(&rng, i0, rows);
            isa->rms_norm(dtype, d, x, indexed ? index : NULL, w, eps, out, i0, i1);
            for (size_t i = 0; i < rows; i++) {
                const size_t row = indexed ? (size_t)index[i] : i;
                double sum = 0;
                for (size_t j = 0; j < d; j++) sum += pow((double)lla_load_float(x, row * d + j, dtype), 2);
                const double scale = 1 / sqrt(sum / (double)d + (double)eps);
                for (size_t j = 0; j < d; j++) {
                    if (i < i0 || i >= i1) {
                        CHECK(out[(i * d + j) * e] == 0x5a && out[(i * d + j) * e + e - 1] == 0x5a);
                        continue;
                    }
                    const double v = (double)lla_load_float(x, row * d + j, dtype) * scale;
                    const float weight = lla_load_float(w, j, dtype);
                    const float lo = rounded(weight * rounded(v * (1 - 0x1p-20), dtype), dtype);
                    const float hi = rounded(weight * rounded(v * (1 + 0x1p-20), dtype), dtype);
                    if (!between(lla_load_float(out, i * d + j, dtype), lo, hi))
                        HARNESS_FAIL("%s %s rms_norm of %zu at %zu: %a, expected %a to %a", isa->name,
                                     lla_dtype_name(dtype), d, j, (double)lla_load_float(out, i * d + j, dtype),
                                     (double)lo, (double)hi);
                }
            }
            if (TEST_FAILURES > 10) return;
        }
}

/* Products and sums as f32 arithmetic rounds them, one by one: no fused multiply-add may step in. */
static float times(float a, float b) {
    volatile float product = a * b;
    return product;
}

TEST(rotate) {
    struct rng rng = {32};
    for (int round = 0; round < 1500; round++) EACH_ISA(isa) {
            const llaisysDataType_t dtype = dtypes[rng_below(&rng, 3)];
            const size_t e = lla_dtype_size(dtype), half = rng_range(&rng, 1, 70), dim = 2 * half;
            const bool round_products = rng_below(&rng, 2), in_place = rng_below(&rng, 2);
            char *x = guarded(0, dim * e), *out = guarded(4, dim * e), before[140 * 4];
            float *cos_sin = guarded(1, dim * 4);
            for (size_t i = 0; i < dim; i++) {
                lla_store_float(x, i, rng_normal(&rng), dtype);
                cos_sin[i] = rng_normal(&rng);
                if (round_products) cos_sin[i] = rounded((double)cos_sin[i], dtype);
            }
            memcpy(before, x, dim * e);
            if (in_place) out = x;
            isa->rotate(dtype, dim, x, cos_sin, round_products, out);
            for (size_t i = 0; i < half; i++) {
                const float a = lla_load_float(before, i, dtype), b = lla_load_float(before, half + i, dtype);
                const float c = cos_sin[i], s = cos_sin[half + i];
                float p[4] = {times(a, c), times(b, s), times(b, c), times(a, s)};
                for (int j = 0; j < 4 && round_products; j++) p[j] = rounded((double)p[j], dtype);
                const float expected[2] = {p[0] - p[1], p[2] + p[3]};
                for (size_t j = 0; j < 2; j++) {
                    /* where products are not rounded to the dtype, a fused multiply-add may be one of f32's ulps away
                     */
                    const float size = fabsf(p[2 * j]) + fabsf(p[2 * j + 1]),
                                slack = round_products ? 0 : size * 0x1p-23f;
                    const float got = lla_load_float(out, i + j * half, dtype);
                    if (between(got, rounded((double)(expected[j] - slack), dtype),
                                rounded((double)(expected[j] + slack), dtype)))
                        continue;
                    HARNESS_FAIL("%s %s rotate of %zu at %zu: %a, expected %a", isa->name, lla_dtype_name(dtype), dim,
                                 i + j * half, (double)got, (double)rounded((double)expected[j], dtype));
                }
            }
            if (TEST_FAILURES > 10) return;
        }
}

TEST(add_and_swiglu) {
    struct rng rng = {33};
    for (int round = 0; round < 1500; round++) EACH_ISA(isa) {
            const llaisysDataType_t dtype = dtypes[rng_below(&rng, 3)];
            const size_t e = lla_dtype_size(dtype), n = rng_below(&rng, 150);
            const bool round_silu = rng_below(&rng, 2);
            char *a = guarded(0, n * e), *b = guarded(1, n * e), *out = guarded(4, n * e);
            for (size_t i = 0; i < n; i++) {
                lla_store_float(a, i, rng_normal(&rng) * (rng_below(&rng, 4) ? 1.0f : 20.0f), dtype);
                lla_store_float(b, i, rng_normal(&rng), dtype);
            }
            isa->add(dtype, n, a, b, out);
            for (size_t i = 0; i < n; i++) {
                const float expected =
                    rounded((double)(lla_load_float(a, i, dtype) + lla_load_float(b, i, dtype)), dtype);
                CHECK(lla_load_float(out, i, dtype) == expected);
            }
            isa->swiglu(dtype, n, a, b, round_silu, out);
            for (size_t i = 0; i < n; i++) {
                const double g = (double)lla_load_float(a, i, dtype), s = g / (1 + exp(-g));
                double lo = s * (1 - 0x1p-21), hi = s * (1 + 0x1p-21), u = (double)lla_load_float(b, i, dtype);
                if (round_silu) lo = (double)rounded(lo, dtype), hi = (double)rounded(hi, dtype);
                lo *= u, hi *= u;
                if (!between(lla_load_float(out, i, dtype), rounded(lo, dtype), rounded(hi, dtype)))
                    HARNESS_FAIL("%s %s swiglu of %g: %a, expected %a to %a", isa->name, lla_dtype_name(dtype), g,
                                 (double)lla_load_float(out, i, dtype), lo, hi);
            }
            if (TEST_FAILURES > 10) return;
        }
}

/* Every gate that bf16 has: no overflow or NaN where there is none to be. The exponential stops at e^88, so that gates
 * far below -88 leave up to |g| 2^-126 of what should be less. */
TEST(swiglu_of_every_gate) {
    static uint16_t gate[0x10000], up[0x10000], out[0x10000];
    for (size_t i = 0; i < 0x10000; i++) gate[i] = (uint16_t)i, up[i] = lla_f32_to_bf16(1);
    EACH_ISA(isa) {
        size_t wrong = 0;
        isa->swiglu(LLAISYS_DTYPE_BF16, 0x10000, gate, up, true, out);
        for (size_t i = 0; i < 0x10000; i++) {
            const double g = (double)lla_bf16_to_f32(gate[i]), s = g / (1 + exp(-g));
            const float got = lla_bf16_to_f32(out[i]);
            if (isnan(g) ? isnan(got) : isinf(g) && g < 0) continue;
            const double slack = fabs(s) * 0x1p-8 + fabs(g) * 0x1p-126 + 0x1p-133;
            if (!(fabs((double)got - s) <= slack) && !(isinf(s) && (double)got == s) && !wrong++)
                HARNESS_FAIL("%s: silu(%a) is %a, expected %a", isa->name, g, (double)got, s);
        }
        CHECK_INT(wrong, 0);
    }
}

TEST(argmax) {
    struct rng rng = {34};
    for (int round = 0; round < 6000; round++) EACH_ISA(isa) {
            const llaisysDataType_t dtype = dtypes[rng_below(&rng, 3)];
            const size_t e = lla_dtype_size(dtype), n = rng_range(&rng, 1, rng_below(&rng, 8) ? 100 : 2000);
            char *values = guarded(0, n * e);
            const int kind = (int)rng_below(&rng, 5);
            for (size_t i = 0; i < n; i++) {
                float v = kind == 0 ? (float)rng_below(&rng, 3) - 5 : rng_normal(&rng);
                if (kind == 1 && rng_below(&rng, 20) == 0) v = rng_below(&rng, 2) ? INFINITY : -INFINITY;
                if (kind == 2 && rng_below(&rng, 40) == 0) v = NAN;
                if (kind == 3) v = rng_below(&rng, 30) ? -INFINITY : rng_below(&rng, 2) ? -INFINITY : -1e4f;
                if (kind == 4 && rng_below(&rng, 2)) v = rng_below(&rng, 2) ? 0.0f : -0.0f;
                lla_store_float(values, i, v, dtype);
            }
            size_t best = 0;
            for (size_t i = 1; i < n; i++) {
                const float v = lla_load_float(values, i, dtype), b = lla_load_float(values, best, dtype);
                if (!isnan(b) && (isnan(v) || v > b)) best = i;
            }
            CHECK_INT(isa->argmax(dtype, n, values), best);
            if (TEST_FAILURES > 10) return;
        }
}

/* ---- tables and choice ---- */

TEST(rope_table) {
    for (size_t d = 0; d < 3; d++) {
        enum { SEQ = 300, DIM = 24 };
        static char table[SEQ * DIM * 4];
        lla_rope_table(dtypes[d], SEQ, DIM, 10000, table);
        for (size_t pos = 0; pos < SEQ; pos++)
            for (size_t j = 0; j < DIM / 2; j++) {
                const double angle = (double)pos / pow(10000, 2.0 * (double)j / DIM);
                const float c = lla_load_float(table, pos * DIM + j, dtypes[d]);
                const float s = lla_load_float(table, pos * DIM + DIM / 2 + j, dtypes[d]);
                CHECK(between(c, rounded(cos(angle) - 1e-9, dtypes[d]), rounded(cos(angle) + 1e-9, dtypes[d])));
                CHECK(between(s, rounded(sin(angle) - 1e-9, dtypes[d]), rounded(sin(angle) + 1e-9, dtypes[d])));
            }
    }
}

TEST(instruction_sets) {
    CHECK(lla_isa_named("portable"));
    CHECK(!lla_isa_named("no such set") && !lla_isa_named(""));
    EACH_ISA(isa) CHECK(lla_isa_named(isa->name) == isa);
    CHECK(lla_isa_named(NULL));
    CHECK(!strcmp(lla_cpu_isa_name(), lla_isa()->name));
}

RUN_TESTS()
