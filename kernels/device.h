/* device.h: the table of a device type: counting, streams, memory, copies. The CPU's is in engine/runtime.c; a CUDA
 * build brings its own.
 *
 * Functions that return a status set the thread's message when they fail. The current device belongs to the thread that
 * calls; malloc, streams, sync and copies act on it. */
#ifndef LLA_KERNELS_DEVICE_H
#define LLA_KERNELS_DEVICE_H

#include "../base/status.h"
#include "../include/llaisys/runtime.h"
#include "ops.h"

struct lla_device {
    const char *name;          /* "cpu", "nvidia" */
    int (*count)(void);        /* devices that can be used; 0, without a message, where there are none */
    int (*current)(void);      /* the thread's current device; 0 where there are none */
    lla_status (*set)(int id); /* id has been checked against count, unless count is 0: then it says why */
    lla_status (*sync)(void);  /* waits for all streams of the current device */
    lla_status (*stream_create)(llaisysStream_t *stream);
    lla_status (*stream_destroy)(llaisysStream_t stream);
    lla_status (*stream_sync)(llaisysStream_t stream);
    lla_status (*malloc)(size_t nbytes, void **ptr); /* zero bytes: a pointer of its own, as for others */
    lla_status (*free)(void *ptr);                   /* NULL is allowed */
    lla_status (*malloc_host)(size_t nbytes, void **ptr);
    lla_status (*free_host)(void *ptr);
    /* Pointers are not NULL unless nbytes is 0, and kind is one of the four. copy returns when the bytes are there. */
    lla_status (*copy)(void *dst, const void *src, size_t nbytes, llaisysMemcpyKind_t kind);
    lla_status (*copy_async)(void *dst, const void *src, size_t nbytes, llaisysMemcpyKind_t kind,
                             llaisysStream_t stream);
};

#ifdef LLA_CUDA
/* Given by the CUDA part of the build. Both are there without a driver too: count then is 0, and set says what is
 * missing. */
const struct lla_device *lla_cuda_device(void);
const struct lla_op_table *lla_cuda_ops(void);
#endif

#endif
