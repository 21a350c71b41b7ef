/* runtime.h: devices, streams and memory of one device type, as a table of functions.
 *
 * Ownership: the table is static and never NULL. What malloc_device and malloc_host return belongs to the caller
 * until the matching free. Sizes are bytes.
 * Errors: a failing call sets llaisysGetLastError(); allocations then return NULL, get_device_count 0.
 * Where no GPU, no driver, or no CUDA build is there, the NVIDIA table answers 0 devices and every other entry fails.
 * Threads: the current device is per thread; the functions may be called from any thread.
 *
 *     const struct LlaisysRuntimeAPI *api = llaisysGetRuntimeAPI(LLAISYS_DEVICE_CPU);
 *     void *p = api->malloc_device(4096);
 *     if (!p) { fprintf(stderr, "%s\n", llaisysGetLastError()); return 1; }
 *     api->memcpy_sync(p, host, 4096, LLAISYS_MEMCPY_H2D);
 *     api->free_device(p);
 */
#ifndef LLAISYS_RUNTIME_H
#define LLAISYS_RUNTIME_H

#include "../llaisys.h"

LLAISYS_BEGIN

struct LlaisysRuntimeAPI {
    int (*get_device_count)(void);
    void (*set_device)(int device_id);
    void (*device_synchronize)(void);
    llaisysStream_t (*create_stream)(void);
    void (*destroy_stream)(llaisysStream_t stream);
    void (*stream_synchronize)(llaisysStream_t stream);
    void *(*malloc_device)(size_t nbytes);
    void (*free_device)(void *ptr);
    void *(*malloc_host)(size_t nbytes); /* pinned where there is a GPU */
    void (*free_host)(void *ptr);
    void (*memcpy_sync)(void *dst, const void *src, size_t nbytes, llaisysMemcpyKind_t kind);
    void (*memcpy_async)(void *dst, const void *src, size_t nbytes, llaisysMemcpyKind_t kind, llaisysStream_t stream);
};

LLAISYS_API const struct LlaisysRuntimeAPI *llaisysGetRuntimeAPI(llaisysDeviceType_t device_type);

/* Makes (device_type, device_id) the calling thread's current device. */
LLAISYS_API void llaisysSetContextRuntime(llaisysDeviceType_t device_type, int device_id);

LLAISYS_END

#endif
