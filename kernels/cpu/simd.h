/* simd.h: the vector type `vf` of W floats for the instruction set that the file is compiled for, and what the kernels
 * need of it.
 *
 * Functions that take `const int dt` are inlined with a constant dtype, so that the switch disappears. Partial loads
 * give zeros beyond n. vf_sum4 fixes the order of a sum over lanes once for all callers. */
#ifndef LLA_CPU_SIMD_H
#define LLA_CPU_SIMD_H

#include "isa.h"

#include <math.h>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 32")
#define LLA_CONCAT_(a, b) a##b
#define LLA_CONCAT(a, b) LLA_CONCAT_(a, b)
#define LLA_FN(name) LLA_CONCAT(name##_, LLA_ISA)

enum { BF16 = LLAISYS_DTYPE_BF16, F16 = LLAISYS_DTYPE_F16, F32 = LLAISYS_DTYPE_F32 };

/* Calls `call` with dt bound to the constant of the dtype. */
#define LLA_BY_DTYPE(dtype, call)                                                                                      \
    do {                                                                                                               \
        if ((dtype) == LLAISYS_DTYPE_BF16) {                                                                           \
            enum { dt = BF16 };                                                                                        \
            call;                                                                                                      \
        } else if ((dtype) == LLAISYS_DTYPE_F16) {                                                                     \
            enum { dt = F16 };                                                                                         \
            call;                                                                                                      \
        } else {                                                                                                       \
            enum { dt = F32 };                                                                                         \
            call;                                                                                                      \
        }                                                                                                              \
    } while (0)

INLINE size_t size_of(const int dt) {
    return dt == F32 ? 4 : 2;
}
INLINE const void *at(const void *base, size_t i, const int dt) {
    return (const char *)base + i * size_of(dt);
}
INLINE void *at_mut(void *base, size_t i, const int dt) {
    return (char *)base + i * size_of(dt);
}

#if defined(__AVX512F__)

enum { W = 16 };
typedef __m512 vf;
INLINE vf vf_zero(void) {
    return _mm512_setzero_ps();
}
INLINE vf vf_set(float s) {
    return _mm512_set1_ps(s);
}
INLINE vf vf_add(vf a, vf b) {
    return _mm512_add_ps(a, b);
}
INLINE vf vf_sub(vf a, vf b) {
    return _mm512_sub_ps(a, b);
}
INLINE vf vf_mul(vf a, vf b) {
    return _mm512_mul_ps(a, b);
}
INLINE vf vf_div(vf a, vf b) {
    return _mm512_div_ps(a, b);
}
INLINE vf vf_fma(vf a, vf b, vf c) {
    return _mm512_fmadd_ps(a, b, c);
}
INLINE vf vf_max(vf a, vf b) {
    return _mm512_max_ps(a, b);
}
INLINE vf vf_min(vf a, vf b) {
    return _mm512_min_ps(a, b);
}
INLINE __mmask16 vf_mask(size_t n) {
    return (__mmask16)((1u << n) - 1);
}

INLINE vf vf_load_n(const void *p, size_t i, size_t n, const int dt) {
    const __mmask16 m = vf_mask(n);
    if (dt == F32) return _mm512_maskz_loadu_ps(m, (const float *)p + i);
    __m256i h = _mm256_maskz_loadu_epi16(m, (const uint16_t *)p + i);
    if (dt == F16) return _mm512_cvtph_ps(h);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16));
}
INLINE vf vf_load(const void *p, size_t i, const int dt) {
    if (dt == F32) return _mm512_loadu_ps((const float *)p + i);
    __m256i h = _mm256_loadu_si256((const __m256i *)((const uint16_t *)p + i));
    if (dt == F16) return _mm512_cvtph_ps(h);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16));
}
/* Round to nearest even in integers: the bf16 instruction would flush subnormals. NaN stays NaN. */
INLINE __m256i vf_to_half(vf v, const int dt) {
    if (dt == F16) return _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    __m512i bits = _mm512_castps_si512(v);
    __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    rounded = _mm512_mask_or_epi32(rounded, nan, bits, _mm512_set1_epi32(0x400000));
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16));
}
INLINE void vf_store_n(void *p, size_t i, size_t n, vf v, const int dt) {
    const __mmask16 m = vf_mask(n);
    if (dt == F32)
        _mm512_mask_storeu_ps((float *)p + i, m, v);
    else
        _mm256_mask_storeu_epi16((uint16_t *)p + i, m, vf_to_half(v, dt));
}
INLINE vf vf_round(vf v, const int dt) {
    if (dt == F32) return v;
    __m256i h = vf_to_half(v, dt);
    if (dt == F16) return _mm512_cvtph_ps(h);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16));
}
/* The four sums of the lanes of a, b, c, d. */
INLINE __m128 vf_sum4(vf a, vf b, vf c, vf d) {
    __m512 ab = _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xee));
    __m512 cd = _mm512_add_ps(_mm512_shuffle_f32x4(c, d, 0x44), _mm512_shuffle_f32x4(c, d, 0xee));
    __m512 s = _mm512_add_ps(_mm512_shuffle_f32x4(ab, cd, 0x88), _mm512_shuffle_f32x4(ab, cd, 0xdd));
    s = _mm512_add_ps(s, _mm512_permute_ps(s, 0x4e));
    s = _mm512_add_ps(s, _mm512_permute_ps(s, 0xb1));
    return _mm512_castps512_ps128(
        _mm512_permutexvar_ps(_mm512_set_epi32(0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 12, 8, 4, 0), s));
}
INLINE float vf_hmax(vf v) {
    return _mm512_reduce_max_ps(v);
}
/* Whether any lane of a is above b's, or NaN. */
INLINE bool vf_any_above(vf a, vf b) {
    return _mm512_cmp_ps_mask(a, b, _CMP_NLE_UQ) != 0;
}
/* 2^n for integral n in [-126, 127]. */
INLINE vf vf_exp2i(vf n) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_add_epi32(_mm512_cvtps_epi32(n), _mm512_set1_epi32(127)), 23));
}
INLINE vf vf_nearest(vf v) {
    return _mm512_roundscale_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

#elif defined(__AVX2__)

enum { W = 8 };
typedef __m256 vf;
INLINE vf vf_zero(void) {
    return _mm256_setzero_ps();
}
INLINE vf vf_set(float s) {
    return _mm256_set1_ps(s);
}
INLINE vf vf_add(vf a, vf b) {
    return _mm256_add_ps(a, b);
}
INLINE vf vf_sub(vf a, vf b) {
    return _mm256_sub_ps(a, b);
}
INLINE vf vf_mul(vf a, vf b) {
    return _mm256_mul_ps(a, b);
}
INLINE vf vf_div(vf a, vf b) {
    return _mm256_div_ps(a, b);
}
INLINE vf vf_fma(vf a, vf b, vf c) {
    return _mm256_fmadd_ps(a, b, c);
}
INLINE vf vf_max(vf a, vf b) {
    return _mm256_max_ps(a, b);
}
INLINE vf vf_min(vf a, vf b) {
    return _mm256_min_ps(a, b);
}

INLINE vf vf_load(const void *p, size_t i, const int dt) {
    if (dt == F32) return _mm256_loadu_ps((const float *)p + i);
    __m128i h = _mm_loadu_si128((const __m128i *)((const uint16_t *)p + i));
    if (dt == F16) return _mm256_cvtph_ps(h);
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16));
}
INLINE vf vf_load_n(const void *p, size_t i, size_t n, const int dt) {
    if (n >= W) return vf_load(p, i, dt);
    char buffer[32] = {0};
    memcpy(buffer, at(p, i, dt), n * size_of(dt));
    return vf_load(buffer, 0, dt);
}
INLINE __m128i vf_to_half(vf v, const int dt) {
    if (dt == F16) return _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    __m256i bits = _mm256_castps_si256(v);
    __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    rounded = _mm256_blendv_epi8(rounded, _mm256_or_si256(bits, _mm256_set1_epi32(0x400000)), nan);
    rounded = _mm256_srli_epi32(rounded, 16);
    rounded = _mm256_packus_epi32(rounded, rounded);
    return _mm256_castsi256_si128(_mm256_permute4x64_epi64(rounded, 0x08));
}
INLINE void vf_store_n(void *p, size_t i, size_t n, vf v, const int dt) {
    char buffer[32];
    char *to = n >= W ? at_mut(p, i, dt) : buffer;
    if (dt == F32)
        _mm256_storeu_ps((float *)to, v);
    else
        _mm_storeu_si128((__m128i *)to, vf_to_half(v, dt));
    if (n < W) memcpy(at_mut(p, i, dt), buffer, n * size_of(dt));
}
INLINE vf vf_round(vf v, const int dt) {
    if (dt == F32) return v;
    __m128i h = vf_to_half(v, dt);
    if (dt == F16) return _mm256_cvtph_ps(h);
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16));
}
INLINE __m128 vf_sum4(vf a, vf b, vf c, vf d) {
    __m256 s = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
    return _mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1));
}
INLINE float vf_hmax(vf v) {
    __m128 m = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    m = _mm_max_ps(m, _mm_movehl_ps(m, m));
    return _mm_cvtss_f32(_mm_max_ss(m, _mm_movehdup_ps(m)));
}
INLINE bool vf_any_above(vf a, vf b) {
    return _mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_NLE_UQ)) != 0;
}
INLINE vf vf_exp2i(vf n) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23));
}
INLINE vf vf_nearest(vf v) {
    return _mm256_round_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

#else /* portable: GCC's and Clang's vectors of four floats, whatever the machine makes of them */

enum { W = 4 };
typedef float vf __attribute__((vector_size(16)));
typedef float v4 __attribute__((vector_size(16)));
INLINE vf vf_set(float s) {
    return (vf){s, s, s, s};
}
INLINE vf vf_zero(void) {
    return vf_set(0);
}
INLINE vf vf_add(vf a, vf b) {
    return a + b;
}
INLINE vf vf_sub(vf a, vf b) {
    return a - b;
}
INLINE vf vf_mul(vf a, vf b) {
    return a * b;
}
INLINE vf vf_div(vf a, vf b) {
    return a / b;
}
INLINE vf vf_fma(vf a, vf b, vf c) {
    return a * b + c;
}
INLINE vf vf_max(vf a, vf b) {
    return (vf){a[0] > b[0] ? a[0] : b[0], a[1] > b[1] ? a[1] : b[1], a[2] > b[2] ? a[2] : b[2],
                a[3] > b[3] ? a[3] : b[3]};
}
INLINE vf vf_min(vf a, vf b) {
    return (vf){a[0] < b[0] ? a[0] : b[0], a[1] < b[1] ? a[1] : b[1], a[2] < b[2] ? a[2] : b[2],
                a[3] < b[3] ? a[3] : b[3]};
}
INLINE vf vf_load_n(const void *p, size_t i, size_t n, const int dt) {
    vf v = vf_zero();
    for (size_t j = 0; j < W && j < n; j++) v[j] = lla_load_float(p, i + j, (llaisysDataType_t)dt);
    return v;
}
INLINE vf vf_load(const void *p, size_t i, const int dt) {
    const llaisysDataType_t t = (llaisysDataType_t)dt;
    return (vf){lla_load_float(p, i, t), lla_load_float(p, i + 1, t), lla_load_float(p, i + 2, t),
                lla_load_float(p, i + 3, t)};
}
INLINE void vf_store_n(void *p, size_t i, size_t n, vf v, const int dt) {
    for (size_t j = 0; j < W && j < n; j++) lla_store_float(p, i + j, v[j], (llaisysDataType_t)dt);
}
INLINE vf vf_round(vf v, const int dt) {
    if (dt == F32) return v;
    uint16_t h[W];
    vf_store_n(h, 0, W, v, dt);
    return vf_load(h, 0, dt);
}
INLINE v4 vf_sum4(vf a, vf b, vf c, vf d) {
    return (v4){(a[0] + a[2]) + (a[1] + a[3]), (b[0] + b[2]) + (b[1] + b[3]), (c[0] + c[2]) + (c[1] + c[3]),
                (d[0] + d[2]) + (d[1] + d[3])};
}
INLINE float vf_hmax(vf v) {
    float a = v[0] > v[1] ? v[0] : v[1], b = v[2] > v[3] ? v[2] : v[3];
    return a > b ? a : b;
}
INLINE bool vf_any_above(vf a, vf b) {
    return !(a[0] <= b[0] && a[1] <= b[1] && a[2] <= b[2] && a[3] <= b[3]);
}
INLINE vf vf_nearest(vf v) {
    return (vf){rintf(v[0]), rintf(v[1]), rintf(v[2]), rintf(v[3])};
}
INLINE vf vf_exp2i(vf n) {
    vf v = vf_zero();
    for (int j = 0; j < W; j++) v[j] = lla_bits_float((uint32_t)((int32_t)n[j] + 127) << 23);
    return v;
}

#endif

INLINE void vf_store(void *p, size_t i, vf v, const int dt) {
    vf_store_n(p, i, W, v, dt);
}
INLINE float vf_sum(vf v) {
    return vf_sum4(v, v, v, v)[0];
}

/* e^x to about 1 ulp for -87.3 <= x <= 88, and the value at the nearer end beyond (1.2e-38 and 1.7e38). Cody-Waite
 * reduction and a degree-6 polynomial (Cephes, expf). */
INLINE vf vf_exp(vf x) {
    vf clipped = vf_max(vf_set(-87.33654f), vf_min(vf_set(88.0f), x)); /* in this order a NaN passes on x86 */
    vf n = vf_nearest(vf_mul(clipped, vf_set(1.44269504088896341f)));
    vf r = vf_fma(n, vf_set(-0.693359375f), clipped);
    r = vf_fma(n, vf_set(2.12194440e-4f), r);
    vf p = vf_set(1.9875691500e-4f);
    p = vf_fma(p, r, vf_set(1.3981999507e-3f));
    p = vf_fma(p, r, vf_set(8.3334519073e-3f));
    p = vf_fma(p, r, vf_set(4.1665795894e-2f));
    p = vf_fma(p, r, vf_set(1.6666665459e-1f));
    p = vf_fma(p, r, vf_set(5.0000001201e-1f));
    p = vf_fma(p, vf_mul(r, r), vf_add(r, vf_set(1.0f)));
    return vf_mul(p, vf_exp2i(n));
}

/* x / (1 + e^-x) */
INLINE vf vf_silu(vf x) {
    return vf_div(x, vf_add(vf_set(1.0f), vf_exp(vf_sub(vf_zero(), x))));
}

#endif
