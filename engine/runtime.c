/* runtime.c: device tables, and the public runtime API over them. */
#include "device.h"

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

/* ---- CPU: one device; every call completes before it returns ---- */

enum { CPU_ALIGN = 64 }; /* a cache line, and the widest vector register */

static int cpu_count(void) {
    return 1;
}
static int cpu_current(void) {
    return 0;
}
static lla_status cpu_set(int id) {
    (void)id;
    return LLA_OK;
}
static lla_status cpu_sync(void) {
    return LLA_OK;
}

static lla_status cpu_stream_create(llaisysStream_t *stream) {
    *stream = NULL;
    return LLA_OK;
}

static lla_status cpu_stream_check(llaisysStream_t stream) {
    LLA_REQUIRE(!stream, LLA_EINVAL, "cpu: expected the NULL stream, the only one there is, found %p", stream);
    return LLA_OK;
}

static lla_status cpu_malloc(size_t nbytes, void **ptr) {
    *ptr = NULL;
    LLA_REQUIRE(nbytes <= PTRDIFF_MAX - CPU_ALIGN, LLA_ENOMEM, "cpu: %zu bytes are more than an address can reach",
                nbytes);
    size_t rounded = (nbytes + CPU_ALIGN - 1) / CPU_ALIGN * CPU_ALIGN; /* aligned_alloc wants a multiple */
    *ptr = aligned_alloc(CPU_ALIGN, rounded ? rounded : CPU_ALIGN);
    LLA_REQUIRE(*ptr, LLA_ENOMEM, "cpu: %zu bytes of memory could not be had", nbytes);
    return LLA_OK;
}

static lla_status cpu_free(void *ptr) {
    free(ptr);
    return LLA_OK;
}

static lla_status cpu_copy(void *dst, const void *src, size_t nbytes, llaisysMemcpyKind_t kind) {
    (void)kind; /* host and device are the same memory */
    if (nbytes) memmove(dst, src, nbytes);
    return LLA_OK;
}

static lla_status cpu_copy_async(void *dst, const void *src, size_t nbytes, llaisysMemcpyKind_t kind,
                                 llaisysStream_t stream) {
    LLA_TRY(cpu_stream_check(stream));
    return cpu_copy(dst, src, nbytes, kind);
}

static const struct lla_device cpu_device = {
    .name = "cpu",
    .count = cpu_count,
    .current = cpu_current,
    .set = cpu_set,
    .sync = cpu_sync,
    .stream_create = cpu_stream_create,
    .stream_destroy = cpu_stream_check,
    .stream_sync = cpu_stream_check,
    .malloc = cpu_malloc,
    .free = cpu_free,
    .malloc_host = cpu_malloc,
    .free_host = cpu_free,
    .copy = cpu_copy,
    .copy_async = cpu_copy_async,
};

/* ---- a device type that is not there: no devices, and every other call fails ---- */

static int absent_zero(void) {
    return 0;
}

static lla_status absent_sync(void) {
    return lla_fail(LLA_EDEVICE,
                    "no device of this type: this build of the library has no CUDA, or the type is unknown");
}

static lla_status absent_set(int id) {
    (void)id;
    return absent_sync();
}

static lla_status absent_stream_create(llaisysStream_t *stream) {
    *stream = NULL;
    return absent_sync();
}

static lla_status absent_stream(llaisysStream_t stream) {
    (void)stream;
    return absent_sync();
}

static lla_status absent_malloc(size_t nbytes, void **ptr) {
    (void)nbytes;
    *ptr = NULL;
    return absent_sync();
}

static lla_status absent_free(void *ptr) {
    (void)ptr;
    return absent_sync();
}

static lla_status absent_copy(void *dst, const void *src, size_t nbytes, llaisysMemcpyKind_t kind) {
    (void)dst, (void)src, (void)nbytes, (void)kind;
    return absent_sync();
}

static lla_status absent_copy_async(void *dst, const void *src, size_t nbytes, llaisysMemcpyKind_t kind,
                                    llaisysStream_t stream) {
    (void)stream;
    return absent_copy(dst, src, nbytes, kind);
}

static const struct lla_device absent_device = {
    .name = "absent device",
    .count = absent_zero,
    .current = absent_zero,
    .set = absent_set,
    .sync = absent_sync,
    .stream_create = absent_stream_create,
    .stream_destroy = absent_stream,
    .stream_sync = absent_stream,
    .malloc = absent_malloc,
    .free = absent_free,
    .malloc_host = absent_malloc,
    .free_host = absent_free,
    .copy = absent_copy,
    .copy_async = absent_copy_async,
};

/* ---- choosing a device ---- */

static const struct lla_device *cpu_get(void) {
    return &cpu_device;
}
static const struct lla_device *unknown_get(void) {
    return &absent_device;
}
#ifdef LLA_CUDA
static const struct lla_device *nvidia_get(void) {
    return lla_cuda_device();
}
#else
static const struct lla_device *nvidia_get(void) {
    return &absent_device;
}
#endif

const struct lla_device *lla_device_get(llaisysDeviceType_t type) {
    switch ((int)type) {
    case LLAISYS_DEVICE_CPU:
        return cpu_get();
    case LLAISYS_DEVICE_NVIDIA:
        return nvidia_get();
    default:
        return unknown_get();
    }
}

const struct lla_op_table *lla_device_ops(llaisysDeviceType_t type) {
    switch ((int)type) {
    case LLAISYS_DEVICE_CPU:
        return lla_cpu_ops();
#ifdef LLA_CUDA
    case LLAISYS_DEVICE_NVIDIA:
        return lla_cuda_ops();
#endif
    default:
        lla_fail(LLA_EDEVICE, "%s: this build of the library has no operators for it", lla_device_get(type)->name);
        return NULL;
    }
}

static lla_status select_on(const struct lla_device *device, int id) {
    int count = device->count();
    LLA_REQUIRE(count == 0 || (id >= 0 && id < count), LLA_EDEVICE, "%s: expected a device id from 0 to %d, found %d",
                device->name, count - 1, id);
    return device->set(id);
}

lla_status lla_device_select(llaisysDeviceType_t type, int id) {
    return select_on(lla_device_get(type), id);
}

lla_status lla_device_enter(struct lla_device_scope *scope, llaisysDeviceType_t type, int id) {
    scope->device = lla_device_get(type);
    scope->previous = scope->device->current();
    return scope->previous == id && id < scope->device->count() ? LLA_OK : select_on(scope->device, id);
}

void lla_device_leave(const struct lla_device_scope *scope) {
    if (scope->device->current() != scope->previous) (void)scope->device->set(scope->previous);
}

/* ---- the public tables: the functions take no device, so that each type has its own set ---- */

static lla_status copy_check(const struct lla_device *device, const void *dst, const void *src, size_t nbytes,
                             llaisysMemcpyKind_t kind) {
    LLA_REQUIRE(dst || !nbytes, LLA_EINVAL, "%s: memcpy: expected a destination for %zu bytes, found NULL",
                device->name, nbytes);
    LLA_REQUIRE(src || !nbytes, LLA_EINVAL, "%s: memcpy: expected a source of %zu bytes, found NULL", device->name,
                nbytes);
    LLA_REQUIRE((unsigned)kind <= LLAISYS_MEMCPY_D2D, LLA_EINVAL, "%s: memcpy: expected a kind from 0 to 3, found %d",
                device->name, (int)kind);
    return LLA_OK;
}

#define RUNTIME_API(tag)                                                                                               \
    static int tag##_api_count(void) {                                                                                 \
        lla_clear_error();                                                                                             \
        return tag##_get()->count();                                                                                   \
    }                                                                                                                  \
    static void tag##_api_set(int id) {                                                                                \
        lla_clear_error();                                                                                             \
        (void)select_on(tag##_get(), id);                                                                              \
    }                                                                                                                  \
    static void tag##_api_sync(void) {                                                                                 \
        lla_clear_error();                                                                                             \
        (void)tag##_get()->sync();                                                                                     \
    }                                                                                                                  \
    static llaisysStream_t tag##_api_stream_create(void) {                                                             \
        lla_clear_error();                                                                                             \
        llaisysStream_t stream = NULL;                                                                                 \
        return tag##_get()->stream_create(&stream) ? NULL : stream;                                                    \
    }                                                                                                                  \
    static void tag##_api_stream_destroy(llaisysStream_t stream) {                                                     \
        lla_clear_error();                                                                                             \
        (void)tag##_get()->stream_destroy(stream);                                                                     \
    }                                                                                                                  \
    static void tag##_api_stream_sync(llaisysStream_t stream) {                                                        \
        lla_clear_error();                                                                                             \
        (void)tag##_get()->stream_sync(stream);                                                                        \
    }                                                                                                                  \
    static void *tag##_api_malloc(size_t nbytes) {                                                                     \
        lla_clear_error();                                                                                             \
        void *ptr = NULL;                                                                                              \
        return tag##_get()->malloc(nbytes, &ptr) ? NULL : ptr;                                                         \
    }                                                                                                                  \
    static void tag##_api_free(void *ptr) {                                                                            \
        lla_clear_error();                                                                                             \
        (void)tag##_get()->free(ptr);                                                                                  \
    }                                                                                                                  \
    static void *tag##_api_malloc_host(size_t nbytes) {                                                                \
        lla_clear_error();                                                                                             \
        void *ptr = NULL;                                                                                              \
        return tag##_get()->malloc_host(nbytes, &ptr) ? NULL : ptr;                                                    \
    }                                                                                                                  \
    static void tag##_api_free_host(void *ptr) {                                                                       \
        lla_clear_error();                                                                                             \
        (void)tag##_get()->free_host(ptr);                                                                             \
    }                                                                                                                  \
    static void tag##_api_copy(void *dst, const void *src, size_t nbytes, llaisysMemcpyKind_t kind) {                  \
        lla_clear_error();                                                                                             \
        if (!copy_check(tag##_get(), dst, src, nbytes, kind)) (void)tag##_get()->copy(dst, src, nbytes, kind);         \
    }                                                                                                                  \
    static void tag##_api_copy_async(void *dst, const void *src, size_t nbytes, llaisysMemcpyKind_t kind,              \
                                     llaisysStream_t stream) {                                                         \
        lla_clear_error();                                                                                             \
        if (!copy_check(tag##_get(), dst, src, nbytes, kind))                                                          \
            (void)tag##_get()->copy_async(dst, src, nbytes, kind, stream);                                             \
    }                                                                                                                  \
    static const struct LlaisysRuntimeAPI tag##_api = {                                                                \
        tag##_api_count,          tag##_api_set,         tag##_api_sync,   tag##_api_stream_create,                    \
        tag##_api_stream_destroy, tag##_api_stream_sync, tag##_api_malloc, tag##_api_free,                             \
        tag##_api_malloc_host,    tag##_api_free_host,   tag##_api_copy,   tag##_api_copy_async};

RUNTIME_API(cpu)
RUNTIME_API(nvidia)
RUNTIME_API(unknown)

const struct LlaisysRuntimeAPI *llaisysGetRuntimeAPI(llaisysDeviceType_t device_type) {
    lla_clear_error();
    switch ((int)device_type) {
    case LLAISYS_DEVICE_CPU:
        return &cpu_api;
    case LLAISYS_DEVICE_NVIDIA:
        return &nvidia_api;
    default:
        lla_fail(LLA_EINVAL, "llaisysGetRuntimeAPI: expected device type 0 (CPU) or 1 (NVIDIA), found %d",
                 (int)device_type);
        return &unknown_api;
    }
}

void llaisysSetContextRuntime(llaisysDeviceType_t device_type, int device_id) {
    lla_clear_error();
    (void)lla_device_select(device_type, device_id);
}
