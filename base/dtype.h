/* dtype.h: sizes and names of dtypes, and scalar conversions of the 16-bit floats (round to nearest, ties to even). */
#ifndef LLA_DTYPE_H
#define LLA_DTYPE_H

#include "../include/llaisys.h"

#include <stdbool.h>
#include <stdint.h>
#include <string.h>

/* Bytes of one element; 0 for an unknown dtype. */
static inline size_t lla_dtype_size(llaisysDataType_t dtype) {
    static const uint8_t size[] = {0, 1, 1, 1, 2, 4, 8, 1, 2, 4, 8, 1, 2, 4, 8, 2, 4, 8, 16, 2};
    return (unsigned)dtype < sizeof size ? size[dtype] : 0;
}

static inline const char *lla_dtype_name(llaisysDataType_t dtype) {
    static const char *const name[] = {"invalid", "byte", "bool", "i8",  "i16", "i32", "i64", "u8",  "u16",  "u32",
                                       "u64",     "f8",   "f16",  "f32", "f64", "c16", "c32", "c64", "c128", "bf16"};
    return (unsigned)dtype < sizeof name / sizeof *name ? name[dtype] : "unknown";
}

/* The dtypes in which models and operators compute. */
static inline bool lla_dtype_is_compute(llaisysDataType_t dtype) {
    return dtype == LLAISYS_DTYPE_F32 || dtype == LLAISYS_DTYPE_F16 || dtype == LLAISYS_DTYPE_BF16;
}

static inline float lla_bits_float(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static inline uint32_t lla_float_bits(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

static inline float lla_bf16_to_f32(uint16_t h) {
    return lla_bits_float((uint32_t)h << 16);
}

static inline uint16_t lla_f32_to_bf16(float value) {
    uint32_t bits = lla_float_bits(value);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return (uint16_t)((bits >> 16) | 0x40); /* NaN stays NaN, quiet */
    return (uint16_t)((bits + 0x7fffu + ((bits >> 16) & 1)) >> 16);
}

static inline float lla_f16_to_f32(uint16_t h) {
    uint32_t sign = (uint32_t)(h & 0x8000) << 16, exponent = (h >> 10) & 0x1f, mantissa = h & 0x3ff;
    if (exponent == 0x1f) return lla_bits_float(sign | 0x7f800000u | (mantissa ? 0x400000u | mantissa << 13 : 0));
    if (exponent) return lla_bits_float(sign | (exponent + 112) << 23 | mantissa << 13);
    float value = (float)mantissa * 0x1p-24f; /* zero and subnormals are exact in f32 */
    return sign ? -value : value;
}

static inline uint16_t lla_f32_to_f16(float value) {
    uint32_t bits = lla_float_bits(value), sign = (bits >> 16) & 0x8000, magnitude = bits & 0x7fffffffu;
    if (magnitude > 0x7f800000u) return (uint16_t)(sign | 0x7e00 | ((magnitude >> 13) & 0x3ff));
    if (magnitude >= 0x477ff000u) return (uint16_t)(sign | 0x7c00); /* 65520 and above round to infinity */
    if (magnitude < 0x38800000u) /* subnormal: adding 0.5 leaves the value in units of 2^-24, rounded by the adder */
        return (uint16_t)(sign | (lla_float_bits(lla_bits_float(magnitude) + 0.5f) - 0x3f000000u));
    return (uint16_t)(sign | ((magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1)) >> 13));
}

/* Element i of an array of a compute dtype, as f32, and back with rounding. The array may be unaligned, as in a mapped
 * file. */
static inline float lla_load_float(const void *data, size_t i, llaisysDataType_t dtype) {
    float value;
    uint16_t h;
    if (dtype == LLAISYS_DTYPE_F32) {
        memcpy(&value, (const char *)data + 4 * i, sizeof value);
        return value;
    }
    memcpy(&h, (const char *)data + 2 * i, sizeof h);
    return dtype == LLAISYS_DTYPE_BF16 ? lla_bf16_to_f32(h) : lla_f16_to_f32(h);
}

static inline void lla_store_float(void *data, size_t i, float value, llaisysDataType_t dtype) {
    if (dtype == LLAISYS_DTYPE_F32) {
        memcpy((char *)data + 4 * i, &value, sizeof value);
        return;
    }
    uint16_t h = dtype == LLAISYS_DTYPE_BF16 ? lla_f32_to_bf16(value) : lla_f32_to_f16(value);
    memcpy((char *)data + 2 * i, &h, sizeof h);
}

#endif
