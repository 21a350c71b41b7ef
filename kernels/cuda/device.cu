/* device.cu: the runtime table of NVIDIA GPUs, over the CUDA runtime.
 *
 * The CUDA runtime is linked statically and looks for the driver when it is first called: without a driver there are 0
 * devices, and every other function says why. An error never outlives the call that reports it: it is taken back from
 * the runtime, so that the next call starts clean (a kernel that broke the context keeps failing, with a message). */
extern "C" {
#include "../device.h"
}
#include "common.cuh"

#include <pthread.h>

/* ---- errors and facts ---- */

lla_status lla_cuda_fail(cudaError_t error, const char *what) {
    (void)cudaGetLastError();
    const bool is_memory = error == cudaErrorMemoryAllocation;
    return lla_fail(is_memory ? LLA_ENOMEM : LLA_EDEVICE, "nvidia: %s: %s", what, cudaGetErrorString(error));
}

static pthread_once_t count_once = PTHREAD_ONCE_INIT;
static int device_count;
static cudaError_t count_error;

static void count_devices(void) {
    count_error = cudaGetDeviceCount(&device_count);
    if (count_error != cudaSuccess || device_count < 0) {
        device_count = 0;
        (void)cudaGetLastError();
    }
    if (device_count > LLA_CUDA_MAX_DEVICES) device_count = LLA_CUDA_MAX_DEVICES;
}

static int cuda_count(void) {
    pthread_once(&count_once, count_devices);
    return device_count;
}

/* Every function but count and current starts with this. */
static lla_status need_device(void) {
    if (cuda_count() > 0) return LLA_OK;
    return lla_fail(LLA_EDEVICE, "nvidia: no device: %s",
                    count_error != cudaSuccess ? cudaGetErrorString(count_error) : "the driver reports none");
}

static int cuda_current(void) {
    int id = 0;
    if (cuda_count() == 0) return 0;
    if (cudaGetDevice(&id) == cudaSuccess) return id;
    (void)cudaGetLastError();
    return 0;
}

lla_status lla_cuda_facts_get(const struct lla_cuda_facts **out) {
    static struct lla_cuda_facts facts[LLA_CUDA_MAX_DEVICES];
    static bool is_known[LLA_CUDA_MAX_DEVICES];
    static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
    LLA_TRY(need_device());
    const int id = cuda_current();
    cudaError_t error = cudaSuccess;
    pthread_mutex_lock(&lock);
    if (!is_known[id]) {
        int major = 0, minor = 0, block_smem = 0, sm_smem = 0;
        error = cudaDeviceGetAttribute(&facts[id].sm_count, cudaDevAttrMultiProcessorCount, id);
        if (!error) error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, id);
        if (!error) error = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, id);
        if (!error) error = cudaDeviceGetAttribute(&block_smem, cudaDevAttrMaxSharedMemoryPerBlockOptin, id);
        if (!error) error = cudaDeviceGetAttribute(&sm_smem, cudaDevAttrMaxSharedMemoryPerMultiprocessor, id);
        facts[id].compute = 10 * major + minor;
        facts[id].max_smem = static_cast<size_t>(block_smem);
        facts[id].sm_smem = static_cast<size_t>(sm_smem);
        is_known[id] = !error;
    }
    pthread_mutex_unlock(&lock);
    LLA_CUDA_TRY(error, "reading the device's attributes");
    *out = &facts[id];
    return LLA_OK;
}

/* ---- devices and streams ---- */

static lla_status cuda_set(int id) {
    LLA_TRY(need_device());
    LLA_CUDA_TRY(cudaSetDevice(id), "making a device current");
    return LLA_OK;
}

static lla_status cuda_sync(void) {
    LLA_TRY(need_device());
    LLA_CUDA_TRY(cudaDeviceSynchronize(), "waiting for the device");
    return LLA_OK;
}

/* Streams order themselves with the default stream, on which operators and synchronous copies run: a caller that mixes
 * the two needs no events. */
static lla_status cuda_stream_create(llaisysStream_t *stream) {
    *stream = NULL;
    LLA_TRY(need_device());
    cudaStream_t created = NULL;
    LLA_CUDA_TRY(cudaStreamCreate(&created), "creating a stream");
    *stream = created;
    return LLA_OK;
}

static lla_status cuda_stream_destroy(llaisysStream_t stream) {
    LLA_TRY(need_device());
    if (!stream) return LLA_OK; /* the default stream stays */
    LLA_CUDA_TRY(cudaStreamDestroy(static_cast<cudaStream_t>(stream)), "destroying a stream");
    return LLA_OK;
}

static lla_status cuda_stream_sync(llaisysStream_t stream) {
    LLA_TRY(need_device());
    LLA_CUDA_TRY(cudaStreamSynchronize(static_cast<cudaStream_t>(stream)), "waiting for a stream");
    return LLA_OK;
}

/* ---- memory ---- */

static lla_status no_memory(cudaError_t error, size_t nbytes, const char *kind) {
    (void)cudaGetLastError();
    return lla_fail(LLA_ENOMEM, "nvidia: %zu bytes of %s memory could not be had: %s", nbytes, kind,
                    cudaGetErrorString(error));
}

static lla_status cuda_malloc(size_t nbytes, void **ptr) {
    *ptr = NULL;
    LLA_TRY(need_device());
    cudaError_t error = cudaErrorMemoryAllocation;
    if (nbytes <= PTRDIFF_MAX) error = cudaMalloc(ptr, nbytes ? nbytes : 1);
    if (error == cudaSuccess) return LLA_OK;
    *ptr = NULL;
    return no_memory(error, nbytes, "device");
}

static lla_status cuda_free(void *ptr) {
    LLA_TRY(need_device());
    LLA_CUDA_TRY(cudaFree(ptr), "freeing device memory");
    return LLA_OK;
}

static lla_status cuda_malloc_host(size_t nbytes, void **ptr) {
    *ptr = NULL;
    LLA_TRY(need_device());
    cudaError_t error = cudaErrorMemoryAllocation;
    if (nbytes <= PTRDIFF_MAX) error = cudaHostAlloc(ptr, nbytes ? nbytes : 1, cudaHostAllocPortable);
    if (error == cudaSuccess) return LLA_OK;
    *ptr = NULL;
    return no_memory(error, nbytes, "pinned host");
}

static lla_status cuda_free_host(void *ptr) {
    LLA_TRY(need_device());
    if (!ptr) return LLA_OK;
    LLA_CUDA_TRY(cudaFreeHost(ptr), "freeing pinned host memory");
    return LLA_OK;
}

/* The addresses themselves say where they are (unified virtual addressing): `kind` is not needed, and one that is
 * wrong, or that names two devices, does no harm. */
static lla_status cuda_copy(void *dst, const void *src, size_t nbytes, llaisysMemcpyKind_t kind) {
    (void)kind;
    LLA_TRY(need_device());
    if (nbytes == 0) return LLA_OK;
    LLA_CUDA_TRY(cudaMemcpy(dst, src, nbytes, cudaMemcpyDefault), "copying memory");
    /* cudaMemcpy returns early for copies inside a device, and for small ones from pageable memory */
    LLA_CUDA_TRY(cudaStreamSynchronize(NULL), "copying memory");
    return LLA_OK;
}

static lla_status cuda_copy_async(void *dst, const void *src, size_t nbytes, llaisysMemcpyKind_t kind,
                                  llaisysStream_t stream) {
    (void)kind;
    LLA_TRY(need_device());
    if (nbytes == 0) return LLA_OK;
    LLA_CUDA_TRY(cudaMemcpyAsync(dst, src, nbytes, cudaMemcpyDefault, static_cast<cudaStream_t>(stream)),
                 "starting a copy of memory");
    return LLA_OK;
}

extern "C" const struct lla_device *lla_cuda_device(void) {
    /* in the order of struct lla_device */
    static const struct lla_device table = {"nvidia",    cuda_count,         cuda_current,        cuda_set,
                                            cuda_sync,   cuda_stream_create, cuda_stream_destroy, cuda_stream_sync,
                                            cuda_malloc, cuda_free,          cuda_malloc_host,    cuda_free_host,
                                            cuda_copy,   cuda_copy_async};
    return &table;
}
