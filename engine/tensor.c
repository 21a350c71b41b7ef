/* tensor.c: strided views over reference-counted storage. */
#include "tensor.h"

#include "../base/dtype.h"
#include "device.h"

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>

/* ---- sizes ---- */

const char *lla_shape_text(char *text, const size_t *shape, size_t ndim) {
    size_t at = (size_t)snprintf(text, LLA_SHAPE_TEXT, "[");
    for (size_t i = 0; i < ndim && i < LLA_MAX_NDIM; i++)
        at += (size_t)snprintf(text + at, LLA_SHAPE_TEXT - at, "%s%zu", i ? ", " : "", shape[i]);
    snprintf(text + at, LLA_SHAPE_TEXT - at, "]");
    return text;
}

size_t lla_tensor_numel(const struct LlaisysTensor *tensor) {
    size_t count = 1;
    for (size_t i = 0; i < tensor->ndim; i++) count *= tensor->shape[i];
    return count;
}

bool lla_tensor_is_dense(const struct LlaisysTensor *tensor) {
    if (lla_tensor_numel(tensor) == 0) return true;
    size_t expected = 1;
    for (size_t i = tensor->ndim; i-- > 0;) {
        if (tensor->shape[i] == 1) continue;
        if ((size_t)tensor->strides[i] != expected) return false;
        expected *= tensor->shape[i];
    }
    return true;
}

size_t lla_tensor_extent(const struct LlaisysTensor *tensor) {
    size_t last = 0;
    for (size_t i = 0; i < tensor->ndim; i++) {
        if (tensor->shape[i] == 0) return 0;
        last += (tensor->shape[i] - 1) * (size_t)tensor->strides[i];
    }
    return last + 1;
}

/* Row-major strides, counting a dimension of size 0 as 1, so that an empty tensor has the strides that PyTorch gives
 * it. *nbytes: of the tensor, 0 if it is empty. */
static lla_status row_major(const size_t *shape, size_t ndim, size_t element, ptrdiff_t *strides, size_t *nbytes) {
    size_t stride = 1;
    bool is_empty = false;
    for (size_t i = ndim; i-- > 0;) {
        strides[i] = (ptrdiff_t)stride;
        size_t size = shape[i] ? shape[i] : 1;
        is_empty |= shape[i] == 0;
        if (stride > (size_t)PTRDIFF_MAX / element / size) {
            char text[LLA_SHAPE_TEXT];
            return lla_fail(LLA_EINVAL, "shape %s of %zu-byte elements: expected at most %td bytes, found more",
                            lla_shape_text(text, shape, ndim), element, PTRDIFF_MAX);
        }
        stride *= size;
    }
    *nbytes = is_empty ? 0 : stride * element;
    return LLA_OK;
}

/* ---- making and ending handles ---- */

static lla_status check_meta(const size_t *shape, size_t ndim, llaisysDataType_t dtype) {
    LLA_REQUIRE(ndim <= LLA_MAX_NDIM, LLA_EINVAL, "expected 0 to %d dimensions, found %zu", LLA_MAX_NDIM, ndim);
    LLA_REQUIRE(shape || !ndim, LLA_EINVAL, "expected a shape of %zu dimensions, found NULL", ndim);
    LLA_REQUIRE(lla_dtype_size(dtype), LLA_EINVAL, "expected a dtype from 1 to 19, found %d", (int)dtype);
    return LLA_OK;
}

/* A handle without memory, its strides row-major. */
static lla_status new_handle(const size_t *shape, size_t ndim, llaisysDataType_t dtype, llaisysDeviceType_t device_type,
                             int device_id, llaisysTensor_t *out, size_t *nbytes) {
    LLA_TRY(check_meta(shape, ndim, dtype));
    LLA_REQUIRE((unsigned)device_type < LLAISYS_DEVICE_TYPE_COUNT, LLA_EINVAL,
                "expected device type 0 (CPU) or 1 (NVIDIA), found %d", (int)device_type);
    llaisysTensor_t tensor = calloc(1, sizeof *tensor);
    LLA_REQUIRE(tensor, LLA_ENOMEM, "%zu bytes for a tensor handle could not be had", sizeof *tensor);
    lla_status status = row_major(shape, ndim, lla_dtype_size(dtype), tensor->strides, nbytes);
    if (status) {
        free(tensor);
        return status;
    }
    if (ndim) memcpy(tensor->shape, shape, ndim * sizeof *shape);
    tensor->ndim = ndim;
    tensor->dtype = dtype;
    tensor->device_type = device_type;
    tensor->device_id = device_id;
    *out = tensor;
    return LLA_OK;
}

static lla_status new_storage(size_t nbytes, llaisysDeviceType_t type, int id, struct lla_storage **out) {
    struct lla_device_scope scope;
    LLA_TRY(lla_device_enter(&scope, type, id));
    struct lla_storage *storage = malloc(sizeof *storage);
    lla_status status = storage ? scope.device->malloc(nbytes, &storage->data)
                                : lla_fail(LLA_ENOMEM, "%zu bytes for a storage could not be had", sizeof *storage);
    lla_device_leave(&scope);
    if (status) {
        free(storage);
        return status;
    }
    atomic_init(&storage->refs, 1);
    storage->device_type = type;
    storage->device_id = id;
    *out = storage;
    return LLA_OK;
}

static void drop_storage(struct lla_storage *storage) {
    /* release: this thread's writes come before the free; acquire: so do the other threads' */
    if (!storage || atomic_fetch_sub_explicit(&storage->refs, 1, memory_order_acq_rel) != 1) return;
    struct lla_device_scope scope;
    if (!lla_device_enter(&scope, storage->device_type, storage->device_id)) {
        (void)scope.device->free(storage->data);
        lla_device_leave(&scope);
    }
    free(storage);
}

llaisysTensor_t tensorCreate(size_t *shape, size_t ndim, llaisysDataType_t dtype, llaisysDeviceType_t device_type,
                             int device_id) {
    lla_clear_error();
    llaisysTensor_t tensor = NULL;
    size_t nbytes = 0;
    lla_status status = new_handle(shape, ndim, dtype, device_type, device_id, &tensor, &nbytes);
    if (!status) status = new_storage(nbytes, device_type, device_id, &tensor->storage);
    if (status) {
        lla_fail_in(status, "tensorCreate");
        free(tensor);
        return NULL;
    }
    tensor->data = tensor->storage->data;
    return tensor;
}

void tensorDestroy(llaisysTensor_t tensor) {
    if (!tensor || tensor->is_borrowed) return;
    drop_storage(tensor->storage);
    free(tensor);
}

llaisysTensor_t lla_tensor_borrow(void *data, const size_t *shape, size_t ndim, const ptrdiff_t *strides,
                                  llaisysDataType_t dtype, llaisysDeviceType_t device_type, int device_id) {
    llaisysTensor_t tensor = NULL;
    size_t nbytes = 0;
    lla_status status = new_handle(shape, ndim, dtype, device_type, device_id, &tensor, &nbytes);
    if (!status && !data && nbytes) status = lla_fail(LLA_EINVAL, "expected memory of %zu bytes, found NULL", nbytes);
    for (size_t i = 0; !status && strides && i < ndim; i++) {
        if (strides[i] < 0) status = lla_fail(LLA_EINVAL, "expected strides of 0 or more, found %td", strides[i]);
        tensor->strides[i] = strides[i];
    }
    if (status) {
        lla_fail_in(status, "lla_tensor_borrow");
        free(tensor);
        return NULL;
    }
    tensor->data = data;
    tensor->is_borrowed = true;
    return tensor;
}

void lla_tensor_release_borrowed(llaisysTensor_t tensor) {
    free(tensor);
}

/* ---- what a handle says of itself ---- */

/* Clears the error and refuses a NULL handle. */
static bool is_null(const char *function, llaisysTensor_t tensor) {
    lla_clear_error();
    if (!tensor) lla_fail(LLA_EINVAL, "%s: expected a tensor, found NULL", function);
    return !tensor;
}

/* As is_null, and refuses a NULL array of ndim elements. */
static bool is_null_with(const char *function, llaisysTensor_t tensor, const void *array) {
    if (is_null(function, tensor)) return true;
    if (array || !tensor->ndim) return false;
    lla_fail(LLA_EINVAL, "%s: expected an array of %zu elements, found NULL", function, tensor->ndim);
    return true;
}

void *tensorGetData(llaisysTensor_t tensor) {
    return is_null("tensorGetData", tensor) ? NULL : tensor->data;
}

size_t tensorGetNdim(llaisysTensor_t tensor) {
    return is_null("tensorGetNdim", tensor) ? 0 : tensor->ndim;
}

void tensorGetShape(llaisysTensor_t tensor, size_t *shape) {
    if (is_null_with("tensorGetShape", tensor, shape)) return;
    for (size_t i = 0; i < tensor->ndim; i++) shape[i] = tensor->shape[i];
}

void tensorGetStrides(llaisysTensor_t tensor, ptrdiff_t *strides) {
    if (is_null_with("tensorGetStrides", tensor, strides)) return;
    for (size_t i = 0; i < tensor->ndim; i++) strides[i] = tensor->strides[i];
}

llaisysDataType_t tensorGetDataType(llaisysTensor_t tensor) {
    return is_null("tensorGetDataType", tensor) ? LLAISYS_DTYPE_INVALID : tensor->dtype;
}

llaisysDeviceType_t tensorGetDeviceType(llaisysTensor_t tensor) {
    return is_null("tensorGetDeviceType", tensor) ? LLAISYS_DEVICE_CPU : tensor->device_type;
}

int tensorGetDeviceId(llaisysTensor_t tensor) {
    return is_null("tensorGetDeviceId", tensor) ? 0 : tensor->device_id;
}

uint8_t tensorIsContiguous(llaisysTensor_t tensor) {
    return !is_null("tensorIsContiguous", tensor) && lla_tensor_is_dense(tensor);
}

/* ---- views ---- */

/* A second handle of the tensor's memory, to be given another shape. */
static lla_status new_view(const struct LlaisysTensor *tensor, llaisysTensor_t *out) {
    llaisysTensor_t view = malloc(sizeof *view);
    LLA_REQUIRE(view, LLA_ENOMEM, "%zu bytes for a tensor handle could not be had", sizeof *view);
    *view = *tensor;
    view->is_borrowed = false;
    if (view->storage) atomic_fetch_add_explicit(&view->storage->refs, 1, memory_order_relaxed);
    *out = view;
    return LLA_OK;
}

/* Strides of a new shape over the same elements, or false where the old strides forbid it; strides come in row-major.
 *
 * Going from the last dimension to the first, old dimensions are gathered into the longest run that steps through
 * memory evenly, as one dimension cut in pieces does: stride[i - 1] = size[i] * stride[i]. New dimensions must tile
 * each run exactly. Dimensions of size 1 fit anywhere. */
static bool view_strides(const struct LlaisysTensor *tensor, const size_t *shape, size_t ndim, ptrdiff_t *strides) {
    size_t next = ndim; /* new dimensions [next, ndim) have their strides */
    for (size_t old = tensor->ndim; old > 0;) {
        old--;
        size_t run = tensor->shape[old], step = (size_t)tensor->strides[old], tiled = 1;
        while (old > 0 && (tensor->shape[old - 1] == 1 || (size_t)tensor->strides[old - 1] == run * step))
            run *= tensor->shape[--old];
        while (next > 0 && (tiled < run || shape[next - 1] == 1)) {
            strides[--next] = (ptrdiff_t)(tiled * step);
            tiled *= shape[next];
        }
        if (tiled != run) return false;
    }
    return next == 0 || tensor->ndim == 0; /* a scalar's views have dimensions of size 1 alone */
}

static lla_status make_view(llaisysTensor_t tensor, const size_t *shape, size_t ndim, llaisysTensor_t *view) {
    char old_shape[LLA_SHAPE_TEXT], new_shape[LLA_SHAPE_TEXT], old_strides[LLA_SHAPE_TEXT];
    size_t strides_as_sizes[LLA_MAX_NDIM], nbytes = 0, element = lla_dtype_size(tensor->dtype);
    ptrdiff_t strides[LLA_MAX_NDIM];
    LLA_TRY(check_meta(shape, ndim, tensor->dtype));
    LLA_TRY(row_major(shape, ndim, element, strides, &nbytes));
    size_t count = lla_tensor_numel(tensor);
    LLA_REQUIRE(nbytes / element == count, LLA_EINVAL, "expected a shape of %zu elements, as %s, found %s", count,
                lla_shape_text(old_shape, tensor->shape, tensor->ndim), lla_shape_text(new_shape, shape, ndim));
    if (count == 0) { /* nothing to step over: the shape it has keeps its strides, others are row-major */
        if (ndim == tensor->ndim && (!ndim || !memcmp(shape, tensor->shape, ndim * sizeof *shape)))
            memcpy(strides, tensor->strides, sizeof strides);
    } else if (!view_strides(tensor, shape, ndim, strides)) {
        for (size_t i = 0; i < tensor->ndim; i++) strides_as_sizes[i] = (size_t)tensor->strides[i];
        return lla_fail(LLA_EINVAL, "shape %s with strides %s cannot be seen as %s without moving data",
                        lla_shape_text(old_shape, tensor->shape, tensor->ndim),
                        lla_shape_text(old_strides, strides_as_sizes, tensor->ndim),
                        lla_shape_text(new_shape, shape, ndim));
    }
    LLA_TRY(new_view(tensor, view));
    (*view)->ndim = ndim;
    for (size_t i = 0; i < ndim; i++) {
        (*view)->shape[i] = shape[i];
        (*view)->strides[i] = strides[i];
    }
    return LLA_OK;
}

llaisysTensor_t tensorView(llaisysTensor_t tensor, size_t *shape, size_t ndim) {
    llaisysTensor_t view = NULL;
    if (is_null("tensorView", tensor)) return NULL;
    lla_status status = make_view(tensor, shape, ndim, &view);
    if (status) lla_fail_in(status, "tensorView");
    return view;
}

static lla_status make_permuted(llaisysTensor_t tensor, const size_t *order, llaisysTensor_t *view) {
    bool is_used[LLA_MAX_NDIM] = {false};
    for (size_t i = 0; i < tensor->ndim; i++) {
        char text[LLA_SHAPE_TEXT];
        LLA_REQUIRE(order[i] < tensor->ndim && !is_used[order[i]], LLA_EINVAL,
                    "expected a permutation of 0 to %zu, found %s", tensor->ndim - 1,
                    lla_shape_text(text, order, tensor->ndim));
        is_used[order[i]] = true;
    }
    LLA_TRY(new_view(tensor, view));
    for (size_t i = 0; i < tensor->ndim; i++) {
        (*view)->shape[i] = tensor->shape[order[i]];
        (*view)->strides[i] = tensor->strides[order[i]];
    }
    return LLA_OK;
}

llaisysTensor_t tensorPermute(llaisysTensor_t tensor, size_t *order) {
    llaisysTensor_t view = NULL;
    if (is_null_with("tensorPermute", tensor, order)) return NULL;
    lla_status status = make_permuted(tensor, order, &view);
    if (status) lla_fail_in(status, "tensorPermute");
    return view;
}

static lla_status make_slice(llaisysTensor_t tensor, size_t dim, size_t start, size_t end, llaisysTensor_t *view) {
    char text[LLA_SHAPE_TEXT];
    LLA_REQUIRE(dim < tensor->ndim, LLA_EINVAL, "expected a dimension below %zu, found %zu", tensor->ndim, dim);
    LLA_REQUIRE(start <= end && end <= tensor->shape[dim], LLA_EINVAL,
                "expected 0 <= start <= end <= %zu in dimension %zu of %s, found start %zu, end %zu",
                tensor->shape[dim], dim, lla_shape_text(text, tensor->shape, tensor->ndim), start, end);
    LLA_TRY(new_view(tensor, view));
    (*view)->shape[dim] = end - start;
    if (lla_tensor_numel(*view)) /* an empty view may start anywhere: keep it inside the storage */
        (*view)->data = (char *)tensor->data + start * (size_t)tensor->strides[dim] * lla_dtype_size(tensor->dtype);
    return LLA_OK;
}

llaisysTensor_t tensorSlice(llaisysTensor_t tensor, size_t dim, size_t start, size_t end) {
    llaisysTensor_t view = NULL;
    if (is_null("tensorSlice", tensor)) return NULL;
    lla_status status = make_slice(tensor, dim, start, end, &view);
    if (status) lla_fail_in(status, "tensorSlice");
    return view;
}

/* ---- moving data ---- */

lla_status lla_tensor_gather(const struct LlaisysTensor *tensor, void *dense) {
    const struct lla_op_table *ops = lla_device_ops(tensor->device_type);
    if (!ops) return LLA_EDEVICE;
    ptrdiff_t strides[LLA_MAX_NDIM];
    size_t nbytes = 0, element = lla_dtype_size(tensor->dtype);
    LLA_TRY(row_major(tensor->shape, tensor->ndim, element, strides, &nbytes));
    return ops->rearrange(element, tensor->ndim, tensor->shape, strides, dense, tensor->strides, tensor->data);
}

lla_status lla_tensor_scatter(struct LlaisysTensor *tensor, const void *dense) {
    const struct lla_op_table *ops = lla_device_ops(tensor->device_type);
    if (!ops) return LLA_EDEVICE;
    ptrdiff_t strides[LLA_MAX_NDIM];
    size_t nbytes = 0, element = lla_dtype_size(tensor->dtype);
    LLA_TRY(row_major(tensor->shape, tensor->ndim, element, strides, &nbytes));
    return ops->rearrange(element, tensor->ndim, tensor->shape, tensor->strides, tensor->data, strides, dense);
}

static lla_status load(llaisysTensor_t tensor, const void *data, const struct lla_device *device) {
    size_t nbytes = lla_tensor_numel(tensor) * lla_dtype_size(tensor->dtype);
    LLA_REQUIRE(data || !nbytes, LLA_EINVAL, "expected host memory of %zu bytes, found NULL", nbytes);
    if (nbytes == 0) return LLA_OK;
    if (lla_tensor_is_dense(tensor)) return device->copy(tensor->data, data, nbytes, LLAISYS_MEMCPY_H2D);
    if (tensor->device_type == LLAISYS_DEVICE_CPU) return lla_tensor_scatter(tensor, data);
    void *dense = NULL;
    LLA_TRY(device->malloc(nbytes, &dense));
    lla_status status = device->copy(dense, data, nbytes, LLAISYS_MEMCPY_H2D);
    if (!status) status = lla_tensor_scatter(tensor, dense);
    if (!status) status = device->sync(); /* the copy is still being read */
    (void)device->free(dense);
    return status;
}

void tensorLoad(llaisysTensor_t tensor, const void *data) {
    if (is_null("tensorLoad", tensor)) return;
    if (tensor->load) { /* borrowed, with a form of its own */
        if (!data || tensor->load(tensor, data)) lla_fail_in(LLA_EINVAL, "tensorLoad");
        return;
    }
    struct lla_device_scope scope;
    lla_status status = lla_device_enter(&scope, tensor->device_type, tensor->device_id);
    if (!status) {
        status = load(tensor, data, scope.device);
        lla_device_leave(&scope);
    }
    if (status) lla_fail_in(status, "tensorLoad");
}

/* ---- printing ---- */

#define AT(type) (((const type *)data)[i])

static float f16_at(const void *data, size_t i) {
    return lla_f16_to_f32(AT(uint16_t));
}

static void print_element(const void *data, size_t i, llaisysDataType_t dtype) {
    switch (dtype) {
    case LLAISYS_DTYPE_BOOL:
        fputs(AT(uint8_t) ? "true" : "false", stdout);
        break;
    case LLAISYS_DTYPE_I8:
        printf("%" PRId8, AT(int8_t));
        break;
    case LLAISYS_DTYPE_I16:
        printf("%" PRId16, AT(int16_t));
        break;
    case LLAISYS_DTYPE_I32:
        printf("%" PRId32, AT(int32_t));
        break;
    case LLAISYS_DTYPE_I64:
        printf("%" PRId64, AT(int64_t));
        break;
    case LLAISYS_DTYPE_U8:
        printf("%" PRIu8, AT(uint8_t));
        break;
    case LLAISYS_DTYPE_U16:
        printf("%" PRIu16, AT(uint16_t));
        break;
    case LLAISYS_DTYPE_U32:
        printf("%" PRIu32, AT(uint32_t));
        break;
    case LLAISYS_DTYPE_U64:
        printf("%" PRIu64, AT(uint64_t));
        break;
    case LLAISYS_DTYPE_F16:
        printf("%g", (double)f16_at(data, i));
        break;
    case LLAISYS_DTYPE_BF16:
        printf("%g", (double)lla_bf16_to_f32(AT(uint16_t)));
        break;
    case LLAISYS_DTYPE_F32:
        printf("%g", (double)AT(float));
        break;
    case LLAISYS_DTYPE_F64:
        printf("%g", AT(double));
        break;
    case LLAISYS_DTYPE_C32: /* complex numbers are named by the bits of both parts together */
        printf("%g%+gi", (double)f16_at(data, 2 * i), (double)f16_at(data, 2 * i + 1));
        break;
    case LLAISYS_DTYPE_C64:
        printf("%g%+gi", (double)((const float *)data)[2 * i], (double)((const float *)data)[2 * i + 1]);
        break;
    case LLAISYS_DTYPE_C128:
        printf("%g%+gi", ((const double *)data)[2 * i], ((const double *)data)[2 * i + 1]);
        break;
    case LLAISYS_DTYPE_C16: /* the enum does not say which 8-bit float is meant: show bits */
        printf("0x%02x+0x%02xi", ((const uint8_t *)data)[2 * i], ((const uint8_t *)data)[2 * i + 1]);
        break;
    case LLAISYS_DTYPE_BYTE:
    case LLAISYS_DTYPE_F8:
    default:
        printf("0x%02x", AT(uint8_t));
        break;
    }
}

/* One line for each row, an empty line after each matrix but the last. */
static void print_values(const struct LlaisysTensor *tensor, const void *data, size_t dim, size_t at) {
    if (dim == tensor->ndim) { /* a scalar */
        print_element(data, at, tensor->dtype);
        putchar('\n');
        return;
    }
    bool is_row = dim + 1 == tensor->ndim;
    for (size_t i = 0; i < tensor->shape[dim]; i++, at += (size_t)tensor->strides[dim]) {
        if (is_row) {
            if (i) putchar(' ');
            print_element(data, at, tensor->dtype);
        } else {
            if (i && dim + 3 <= tensor->ndim) putchar('\n');
            print_values(tensor, data, dim + 1, at);
        }
    }
    if (is_row) putchar('\n');
}

static lla_status print_tensor(llaisysTensor_t tensor, const struct lla_device *device) {
    char shape[LLA_SHAPE_TEXT], strides[LLA_SHAPE_TEXT];
    size_t strides_as_sizes[LLA_MAX_NDIM];
    for (size_t i = 0; i < tensor->ndim; i++) strides_as_sizes[i] = (size_t)tensor->strides[i];

    const void *data = tensor->data;
    void *host = NULL;
    size_t nbytes = lla_tensor_extent(tensor) * lla_dtype_size(tensor->dtype);
    if (tensor->device_type != LLAISYS_DEVICE_CPU && nbytes) {
        host = malloc(nbytes);
        LLA_REQUIRE(host, LLA_ENOMEM, "%zu bytes of host memory could not be had", nbytes);
        lla_status status = device->sync();
        if (!status) status = device->copy(host, tensor->data, nbytes, LLAISYS_MEMCPY_D2H);
        if (status) {
            free(host);
            return status;
        }
        data = host;
    }
    printf("Tensor: shape %s strides %s dtype %s device %s:%d\n", lla_shape_text(shape, tensor->shape, tensor->ndim),
           lla_shape_text(strides, strides_as_sizes, tensor->ndim), lla_dtype_name(tensor->dtype), device->name,
           tensor->device_id);
    if (nbytes) print_values(tensor, data, 0, 0);
    fflush(stdout);
    free(host);
    return LLA_OK;
}

void tensorDebug(llaisysTensor_t tensor) {
    if (is_null("tensorDebug", tensor)) return;
    struct lla_device_scope scope;
    lla_status status = lla_device_enter(&scope, tensor->device_type, tensor->device_id);
    if (!status) {
        status = print_tensor(tensor, scope.device);
        lla_device_leave(&scope);
    }
    if (status) lla_fail_in(status, "tensorDebug");
}
