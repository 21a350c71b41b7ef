/* tensor.h: the tensor behind the public handle, and what the engine adds to the public functions. */
#ifndef LLA_TENSOR_H
#define LLA_TENSOR_H

#include "../base/status.h"
#include "../include/llaisys/tensor.h"

#include <stdatomic.h>
#include <stdbool.h>

enum {
    LLA_MAX_NDIM = 8,
    LLA_SHAPE_TEXT = 192 /* bytes that hold any shape as text */
};

/* Memory shared by the views over it; the last of them frees it. */
struct lla_storage {
    atomic_size_t refs;
    void *data;
    llaisysDeviceType_t device_type;
    int device_id;
};

struct LlaisysTensor {
    struct lla_storage *storage; /* NULL where the memory is somebody else's */
    bool is_borrowed;            /* the handle itself is somebody else's: tensorDestroy leaves it alone */
    void *data;                  /* the first element */
    llaisysDataType_t dtype;
    llaisysDeviceType_t device_type;
    int device_id;
    size_t ndim;
    size_t shape[LLA_MAX_NDIM];
    ptrdiff_t strides[LLA_MAX_NDIM]; /* in elements, never negative */
    /* A borrowed handle whose memory holds its elements in another form has its own way to load. */
    lla_status (*load)(struct LlaisysTensor *tensor, const void *host);
    void *owner;
    const void *weight; /* which weight of the owner, and its first row */
    size_t row;
};

/* A handle over memory that the caller owns and keeps alive; strides NULL means row-major. The owner ends the handle
 * with lla_tensor_release_borrowed(); tensorDestroy() on it does nothing, so that users may treat it like any other.
 * Views made of it are handles of their own: their user destroys them, and they must not be used once the memory is
 * gone. NULL and the thread's message on failure. */
llaisysTensor_t lla_tensor_borrow(void *data, const size_t *shape, size_t ndim, const ptrdiff_t *strides,
                                  llaisysDataType_t dtype, llaisysDeviceType_t device_type, int device_id);
void lla_tensor_release_borrowed(llaisysTensor_t tensor);

/* Elements; sizes were checked when the tensor was made, so that products do not overflow. */
size_t lla_tensor_numel(const struct LlaisysTensor *tensor);
/* The elements lie packed in row-major order. Strides of dimensions of size 1 do not matter, nor those of empty
 * tensors. */
bool lla_tensor_is_dense(const struct LlaisysTensor *tensor);
/* Elements from the first to the last one in memory, both included; 0 for an empty tensor. */
size_t lla_tensor_extent(const struct LlaisysTensor *tensor);

/* Copies the tensor's elements, packed, to dense memory of its device, and back. The device is current. */
lla_status lla_tensor_gather(const struct LlaisysTensor *tensor, void *dense);
lla_status lla_tensor_scatter(struct LlaisysTensor *tensor, const void *dense);

/* "[2, 3]" in text [LLA_SHAPE_TEXT]; returns text. */
const char *lla_shape_text(char *text, const size_t *shape, size_t ndim);

#endif
