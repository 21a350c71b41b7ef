/* tensor.h: strided tensors over shared storage.
 *
 * Ownership: tensorCreate, tensorView, tensorPermute and tensorSlice return a new handle that the caller destroys with
 * tensorDestroy (NULL is allowed there). Views share one storage, which is freed with its last handle. Handles that a
 * model gives out (llaisysQwen2ModelWeights) are borrowed: they end with the model and must not be destroyed. Units:
 * shapes and strides count elements; strides are those of row-major order for a new tensor. Errors: functions that
 * return a handle return NULL and set llaisysGetLastError(); void ones set it. Threads: handles of one storage may be
 * used and destroyed on different threads; one handle on one thread at a time.
 *
 *     size_t shape[2] = {2, 3};
 *     llaisysTensor_t t = tensorCreate(shape, 2, LLAISYS_DTYPE_F32, LLAISYS_DEVICE_CPU, 0);
 *     tensorLoad(t, values);                  // 6 floats, row-major, from host memory
 *     llaisysTensor_t row = tensorSlice(t, 0, 1, 2);  // shape [1, 3], same storage
 *     tensorDestroy(t);
 *     tensorDestroy(row);                     // frees the storage
 */
#ifndef LLAISYS_TENSOR_H
#define LLAISYS_TENSOR_H

#include "../llaisys.h"

LLAISYS_BEGIN

typedef struct LlaisysTensor *llaisysTensor_t;

/* shape [ndim], ndim 0 to 8; shape may be NULL where ndim is 0 (a scalar). Contents are undefined. */
LLAISYS_API llaisysTensor_t tensorCreate(size_t *shape, size_t ndim, llaisysDataType_t dtype,
                                         llaisysDeviceType_t device_type, int device_id);
LLAISYS_API void tensorDestroy(llaisysTensor_t tensor);

LLAISYS_API void *tensorGetData(llaisysTensor_t tensor); /* address of the first element */
LLAISYS_API size_t tensorGetNdim(llaisysTensor_t tensor);
LLAISYS_API void tensorGetShape(llaisysTensor_t tensor, size_t *shape);        /* shape [ndim] */
LLAISYS_API void tensorGetStrides(llaisysTensor_t tensor, ptrdiff_t *strides); /* strides [ndim], in elements */
LLAISYS_API llaisysDataType_t tensorGetDataType(llaisysTensor_t tensor);
LLAISYS_API llaisysDeviceType_t tensorGetDeviceType(llaisysTensor_t tensor);
LLAISYS_API int tensorGetDeviceId(llaisysTensor_t tensor);
LLAISYS_API void tensorDebug(llaisysTensor_t tensor); /* prints metadata and values to standard output */
LLAISYS_API uint8_t tensorIsContiguous(llaisysTensor_t tensor);

/* Copies the tensor's elements from host memory, packed in row-major order. */
LLAISYS_API void tensorLoad(llaisysTensor_t tensor, const void *data);

/* The same elements in another shape, without moving data: dimensions are split and merged. Refused where the strides
 * forbid it. */
LLAISYS_API llaisysTensor_t tensorView(llaisysTensor_t tensor, size_t *shape, size_t ndim);
/* Dimension i of the result is dimension order[i] of the tensor. */
LLAISYS_API llaisysTensor_t tensorPermute(llaisysTensor_t tensor, size_t *order);
/* Elements start <= index < end of dimension dim. */
LLAISYS_API llaisysTensor_t tensorSlice(llaisysTensor_t tensor, size_t dim, size_t start, size_t end);

LLAISYS_END

#endif
