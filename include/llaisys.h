/* llaisys.h: types shared by every public header of Refrain's libllaisys.so.
 *
 * Names and enum values are those of the LLAISYS course framework, so that its Python package loads this library
 * unchanged. Every header under llaisys/ compiles alone as C11 and as C++17. */
#ifndef LLAISYS_H
#define LLAISYS_H

#include <stddef.h>
#include <stdint.h>

#if defined(__GNUC__)
#define LLAISYS_API __attribute__((visibility("default")))
#else
#define LLAISYS_API
#endif

#ifdef __cplusplus
#define LLAISYS_BEGIN extern "C" {
#define LLAISYS_END }
#else
#define LLAISYS_BEGIN
#define LLAISYS_END
#endif

LLAISYS_BEGIN

typedef enum { LLAISYS_DEVICE_CPU = 0, LLAISYS_DEVICE_NVIDIA = 1, LLAISYS_DEVICE_TYPE_COUNT } llaisysDeviceType_t;

typedef enum {
    LLAISYS_DTYPE_INVALID = 0,
    LLAISYS_DTYPE_BYTE = 1,
    LLAISYS_DTYPE_BOOL = 2,
    LLAISYS_DTYPE_I8 = 3,
    LLAISYS_DTYPE_I16 = 4,
    LLAISYS_DTYPE_I32 = 5,
    LLAISYS_DTYPE_I64 = 6,
    LLAISYS_DTYPE_U8 = 7,
    LLAISYS_DTYPE_U16 = 8,
    LLAISYS_DTYPE_U32 = 9,
    LLAISYS_DTYPE_U64 = 10,
    LLAISYS_DTYPE_F8 = 11,
    LLAISYS_DTYPE_F16 = 12,
    LLAISYS_DTYPE_F32 = 13,
    LLAISYS_DTYPE_F64 = 14,
    LLAISYS_DTYPE_C16 = 15,
    LLAISYS_DTYPE_C32 = 16,
    LLAISYS_DTYPE_C64 = 17,
    LLAISYS_DTYPE_C128 = 18,
    LLAISYS_DTYPE_BF16 = 19
} llaisysDataType_t;

typedef enum {
    LLAISYS_MEMCPY_H2H = 0,
    LLAISYS_MEMCPY_H2D = 1,
    LLAISYS_MEMCPY_D2H = 2,
    LLAISYS_MEMCPY_D2D = 3
} llaisysMemcpyKind_t;

/* A device stream; NULL is the default stream, and the only one on the CPU, where every call completes before it
 * returns. */
typedef void *llaisysStream_t;

/* The calling thread's last failure as one line of UTF-8 text, or NULL if its last fallible call succeeded.
 * Every fallible call of the library clears it on entry. The text belongs to the library and lives until the
 * thread's next call. The library never aborts, exits or throws through C. */
LLAISYS_API const char *llaisysGetLastError(void);

LLAISYS_END

#endif
