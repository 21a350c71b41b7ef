/* ops.c: the operators over tensors: checks every argument, makes buffers dense, and calls the device's table.
 *
 * Each operator lists its operands with their shapes as patterns, such as "seq nh d": a name stands for one size in the
 * whole call, fixed by the first operand that has it; a leading "..." stands for any number of dimensions, the same
 * ones in the whole call.
 *
 * Kernels want dense buffers. A strided input is gathered into a temporary buffer first; a strided output, or one that
 * shares memory with an input in a way that the kernel does not allow, is computed in a temporary buffer and copied at
 * the end. So every call acts as if it read its inputs before it wrote. Dense tensors that do not overlap cost no
 * allocation. */
#include "device.h"
#include "tensor.h"

#include "../include/llaisys/ops.h"

#include <math.h>
#include <stdio.h>

enum { MAX_DIMS = 6, PATTERN_TEXT = 256 };

enum operand_flags {
    OUTPUT = 1,
    INDEX = 2,      /* i64 rather than the call's dtype */
    ANY_DTYPE = 4,  /* the call's dtype may be any */
    OPTIONAL = 8,   /* NULL is allowed */
    MAY_ALIAS = 16, /* an input: the kernel allows the output to be this very buffer */
};

struct operand {
    const char *name;
    llaisysTensor_t tensor;
    const char *pattern; /* "1": one element, with 0 or 1 dimensions */
    unsigned flags;
    void *dense; /* what the kernel gets: the tensor's memory or temp */
    void *temp;
};

struct call {
    const char *op;
    struct operand *operands;
    size_t count;
    llaisysDataType_t dtype; /* of all operands but indices; INVALID until one is seen */
    struct {
        const char *name;
        size_t len, size;
    } dims[MAX_DIMS];
    size_t ndims;
    const struct operand *leading; /* fixed the dimensions of "..." */
    size_t nleading;
    const struct lla_op_table *ops;
    struct lla_device_scope scope;
};

/* ---- checks ---- */

static bool starts_with_any(const char *pattern) {
    return !strncmp(pattern, "...", 3);
}

/* Length of the name at text, and its successor's start in *next. */
static size_t token(const char *text, const char **next) {
    size_t len = strcspn(text, " ");
    *next = text + len + (text[len] == ' ');
    return len;
}

static size_t count_tokens(const char *pattern) {
    size_t count = 0;
    for (const char *at = pattern; *at; count++) token(at, &at);
    return count;
}

static size_t *find_dim(struct call *call, const char *name, size_t len) {
    for (size_t i = 0; i < call->ndims; i++)
        if (call->dims[i].len == len && !memcmp(call->dims[i].name, name, len)) return &call->dims[i].size;
    return NULL;
}

/* Size of a dimension that the operands' patterns name. */
static size_t dim(struct call *call, const char *name) {
    return *find_dim(call, name, strlen(name));
}

/* "[seq = 5, nh, d = 64]": the pattern with the sizes that are fixed. */
static const char *pattern_text(struct call *call, const char *pattern, char *text) {
    size_t at = (size_t)snprintf(text, PATTERN_TEXT, "[");
    for (const char *name = pattern, *next; *name; name = next) {
        size_t len = token(name, &next);
        const char *separator = at > 1 ? ", " : "";
        const size_t *size = find_dim(call, name, len);
        if (starts_with_any(name) && call->leading) {
            for (size_t i = 0; i < call->nleading; i++)
                at += (size_t)snprintf(text + at, PATTERN_TEXT - at, "%s%zu", i ? ", " : "",
                                       call->leading->tensor->shape[i]);
        } else if (size) {
            at += (size_t)snprintf(text + at, PATTERN_TEXT - at, "%s%.*s = %zu", separator, (int)len, name, *size);
        } else {
            at += (size_t)snprintf(text + at, PATTERN_TEXT - at, "%s%.*s", separator, (int)len, name);
        }
    }
    snprintf(text + at, PATTERN_TEXT - at, "]");
    return text;
}

static lla_status wrong_shape(struct call *call, const struct operand *operand) {
    char expected[PATTERN_TEXT], found[LLA_SHAPE_TEXT];
    return lla_fail(LLA_EINVAL, "%s: %s: expected shape %s, found %s", call->op, operand->name,
                    pattern_text(call, operand->pattern, expected),
                    lla_shape_text(found, operand->tensor->shape, operand->tensor->ndim));
}

static lla_status check_shape(struct call *call, const struct operand *operand) {
    const struct LlaisysTensor *tensor = operand->tensor;
    const char *at = operand->pattern;
    if (!strcmp(at, "1"))
        return lla_tensor_numel(tensor) == 1 && tensor->ndim <= 1 ? LLA_OK : wrong_shape(call, operand);
    size_t ntoken = count_tokens(at), axis = 0;
    if (starts_with_any(at)) {
        token(at, &at);
        ntoken--;
        if (tensor->ndim < ntoken) return wrong_shape(call, operand);
        axis = tensor->ndim - ntoken;
        if (!call->leading) {
            call->leading = operand;
            call->nleading = axis;
        } else if (axis != call->nleading ||
                   memcmp(tensor->shape, call->leading->tensor->shape, axis * sizeof(size_t))) {
            return wrong_shape(call, operand);
        }
    } else if (tensor->ndim != ntoken) {
        return wrong_shape(call, operand);
    }
    for (const char *next; *at; at = next, axis++) {
        size_t len = token(at, &next);
        const size_t *size = find_dim(call, at, len);
        if (size && *size != tensor->shape[axis]) return wrong_shape(call, operand);
        if (size) continue;
        call->dims[call->ndims].name = at;
        call->dims[call->ndims].len = len;
        call->dims[call->ndims++].size = tensor->shape[axis];
    }
    return LLA_OK;
}

static lla_status check_dtype(struct call *call, const struct operand *operand) {
    llaisysDataType_t found = operand->tensor->dtype;
    if ((operand->flags & INDEX)) {
        LLA_REQUIRE(found == LLAISYS_DTYPE_I64, LLA_EINVAL, "%s: %s: expected dtype i64, found %s", call->op,
                    operand->name, lla_dtype_name(found));
        return LLA_OK;
    }
    if (call->dtype == LLAISYS_DTYPE_INVALID) {
        LLA_REQUIRE((operand->flags & ANY_DTYPE) || lla_dtype_is_compute(found), LLA_EINVAL,
                    "%s: %s: expected dtype f32, f16 or bf16, found %s", call->op, operand->name,
                    lla_dtype_name(found));
        call->dtype = found;
    }
    LLA_REQUIRE(found == call->dtype, LLA_EINVAL, "%s: %s: expected dtype %s, as the other operands have, found %s",
                call->op, operand->name, lla_dtype_name(call->dtype), lla_dtype_name(found));
    return LLA_OK;
}

static lla_status check_device(const struct call *call, const struct operand *operand) {
    const struct LlaisysTensor *first = call->operands[0].tensor, *tensor = operand->tensor;
    LLA_REQUIRE(tensor->device_type == first->device_type && tensor->device_id == first->device_id, LLA_EINVAL,
                "%s: %s: expected device %s:%d, where %s is, found %s:%d", call->op, operand->name,
                lla_device_get(first->device_type)->name, first->device_id, call->operands[0].name,
                lla_device_get(tensor->device_type)->name, tensor->device_id);
    return LLA_OK;
}

/* Checks all operands against each other; the first one is never optional. */
static lla_status check(struct call *call) {
    lla_clear_error();
    for (size_t i = 0; i < call->count; i++) {
        const struct operand *operand = &call->operands[i];
        if (!operand->tensor && (operand->flags & OPTIONAL)) continue;
        LLA_REQUIRE(operand->tensor, LLA_EINVAL, "%s: %s: expected a tensor, found NULL", call->op, operand->name);
        LLA_TRY(check_dtype(call, operand));
        LLA_TRY(check_shape(call, operand));
        LLA_TRY(check_device(call, operand));
    }
    call->ops = lla_device_ops(call->operands[0].tensor->device_type);
    return call->ops ? LLA_OK : LLA_EDEVICE;
}

/* ---- buffers ---- */

static size_t nbytes_of(const struct LlaisysTensor *tensor) {
    return lla_tensor_numel(tensor) * lla_dtype_size(tensor->dtype);
}

/* The ranges of memory that the tensors reach over meet; their elements need not. */
static bool may_overlap(const struct LlaisysTensor *a, const struct LlaisysTensor *b) {
    uintptr_t a_start = (uintptr_t)a->data, a_end = a_start + lla_tensor_extent(a) * lla_dtype_size(a->dtype);
    uintptr_t b_start = (uintptr_t)b->data, b_end = b_start + lla_tensor_extent(b) * lla_dtype_size(b->dtype);
    return a_start < b_end && b_start < a_end;
}

/* Whether the kernel may write to the output's own memory. */
static bool can_write_directly(const struct call *call, const struct operand *output) {
    if (!lla_tensor_is_dense(output->tensor)) return false;
    for (size_t i = 0; i < call->count; i++) {
        const struct operand *input = &call->operands[i];
        if ((input->flags & OUTPUT) || !input->tensor || !may_overlap(output->tensor, input->tensor)) continue;
        if (!lla_tensor_is_dense(input->tensor)) continue; /* is gathered before the kernel writes */
        if (!(input->flags & MAY_ALIAS) || input->tensor->data != output->tensor->data) return false;
    }
    return true;
}

static void finish(struct call *call, lla_status status);

static lla_status make_dense(struct call *call) {
    for (size_t i = 0; i < call->count; i++) {
        struct operand *operand = &call->operands[i];
        if (!operand->tensor) continue;
        operand->dense = operand->tensor->data;
        if ((operand->flags & OUTPUT) ? can_write_directly(call, operand) : lla_tensor_is_dense(operand->tensor))
            continue;
        LLA_TRY(call->scope.device->malloc(nbytes_of(operand->tensor), &operand->temp));
        operand->dense = operand->temp;
        if (!(operand->flags & OUTPUT)) LLA_TRY(lla_tensor_gather(operand->tensor, operand->temp));
    }
    return LLA_OK;
}

/* Gives every operand of a checked call its dense buffer and makes the device current; finish() must follow. False if
 * there is nothing left to do: the outputs are empty, or something failed. */
static bool start(struct call *call) {
    const struct LlaisysTensor *first = call->operands[0].tensor;
    for (size_t i = 0; i < call->count; i++)
        if ((call->operands[i].flags & OUTPUT) && lla_tensor_numel(call->operands[i].tensor) == 0) return false;
    lla_status status = lla_device_enter(&call->scope, first->device_type, first->device_id);
    if (status) {
        lla_fail_in(status, "%s", call->op);
        return false;
    }
    status = make_dense(call);
    if (status) finish(call, status);
    return !status;
}

/* Takes the kernel's status: after success copies results to their places; always gives back what start() took. */
static void finish(struct call *call, lla_status status) {
    for (size_t i = 0; i < call->count && !status; i++) {
        struct operand *operand = &call->operands[i];
        if ((operand->flags & OUTPUT) && operand->temp) status = lla_tensor_scatter(operand->tensor, operand->temp);
    }
    for (size_t i = 0; i < call->count; i++)
        if (call->operands[i].temp) (void)call->scope.device->free(call->operands[i].temp);
    lla_device_leave(&call->scope);
    if (status) lla_fail_in(status, "%s", call->op);
}

/* ---- the operators ---- */

static struct operand operand(const char *name, llaisysTensor_t tensor, const char *pattern, unsigned flags) {
    return (struct operand){.name = name, .tensor = tensor, .pattern = pattern, .flags = flags};
}

#define CALL(name, operand_array)                                                                                      \
    {.op = (name), .operands = (operand_array), .count = sizeof(operand_array) / sizeof *(operand_array)}

void llaisysAdd(llaisysTensor_t c, llaisysTensor_t a, llaisysTensor_t b) {
    struct operand o[] = {operand("a", a, "...", MAY_ALIAS), operand("b", b, "...", MAY_ALIAS),
                          operand("c", c, "...", OUTPUT)};
    struct call call = CALL("llaisysAdd", o);
    if (check(&call) || !start(&call)) return;
    finish(&call, call.ops->add(call.dtype, lla_tensor_numel(c), o[0].dense, o[1].dense, o[2].dense));
}

void llaisysArgmax(llaisysTensor_t max_idx, llaisysTensor_t max_val, llaisysTensor_t vals) {
    struct operand o[] = {operand("vals", vals, "n", 0), operand("max_idx", max_idx, "1", OUTPUT | INDEX),
                          operand("max_val", max_val, "1", OUTPUT)};
    struct call call = CALL("llaisysArgmax", o);
    if (check(&call)) return;
    size_t n = dim(&call, "n");
    if (n == 0) {
        lla_fail(LLA_EINVAL, "%s: vals: expected at least 1 element, found 0", call.op);
        return;
    }
    if (!start(&call)) return;
    finish(&call, call.ops->argmax(call.dtype, n, o[0].dense, o[1].dense, o[2].dense));
}

void llaisysEmbedding(llaisysTensor_t out, llaisysTensor_t index, llaisysTensor_t weight) {
    struct operand o[] = {operand("index", index, "n", INDEX), operand("weight", weight, "voc d", 0),
                          operand("out", out, "n d", OUTPUT)};
    struct call call = CALL("llaisysEmbedding", o);
    if (check(&call) || !start(&call)) return;
    finish(&call, call.ops->embedding(call.dtype, dim(&call, "n"), dim(&call, "d"), dim(&call, "voc"), o[0].dense,
                                      o[1].dense, o[2].dense));
}

void llaisysLinear(llaisysTensor_t out, llaisysTensor_t in, llaisysTensor_t weight, llaisysTensor_t bias) {
    struct operand o[] = {operand("in", in, "m k", 0), operand("weight", weight, "n k", 0),
                          operand("bias", bias, "n", OPTIONAL), operand("out", out, "m n", OUTPUT)};
    struct call call = CALL("llaisysLinear", o);
    if (check(&call) || !start(&call)) return;
    finish(&call, call.ops->linear(call.dtype, dim(&call, "m"), dim(&call, "n"), dim(&call, "k"), o[0].dense,
                                   o[1].dense, o[2].dense, o[3].dense));
}

static lla_status rearrange(llaisysTensor_t out, llaisysTensor_t in, const struct lla_device *device) {
    const struct lla_op_table *ops = lla_device_ops(out->device_type);
    if (!ops) return LLA_EDEVICE;
    if (!may_overlap(out, in))
        return ops->rearrange(lla_dtype_size(out->dtype), out->ndim, out->shape, out->strides, out->data, in->strides,
                              in->data);
    void *temp = NULL;
    LLA_TRY(device->malloc(nbytes_of(in), &temp));
    lla_status status = lla_tensor_gather(in, temp);
    if (!status) status = lla_tensor_scatter(out, temp);
    (void)device->free(temp);
    return status;
}

void llaisysRearrange(llaisysTensor_t out, llaisysTensor_t in) {
    /* The one operator that moves any dtype, and for which strided tensors are the purpose. */
    struct operand o[] = {operand("in", in, "...", ANY_DTYPE), operand("out", out, "...", ANY_DTYPE | OUTPUT)};
    struct call call = CALL("llaisysRearrange", o);
    if (check(&call) || lla_tensor_numel(out) == 0) return;
    lla_status status = lla_device_enter(&call.scope, out->device_type, out->device_id);
    if (!status) {
        status = rearrange(out, in, call.scope.device);
        lla_device_leave(&call.scope);
    }
    if (status) lla_fail_in(status, "%s", call.op);
}

void llaisysRmsNorm(llaisysTensor_t out, llaisysTensor_t in, llaisysTensor_t weight, float eps) {
    struct operand o[] = {operand("in", in, "... d", 0), operand("weight", weight, "d", 0),
                          operand("out", out, "... d", OUTPUT)};
    struct call call = CALL("llaisysRmsNorm", o);
    if (check(&call)) return;
    if (!isfinite(eps) || eps < 0) {
        lla_fail(LLA_EINVAL, "%s: eps: expected a finite number of 0 or more, found %g", call.op, (double)eps);
        return;
    }
    if (!start(&call)) return;
    size_t d = dim(&call, "d");
    finish(&call, call.ops->rms_norm(call.dtype, lla_tensor_numel(in) / d, d, o[0].dense, o[1].dense, eps, o[2].dense));
}

void llaisysROPE(llaisysTensor_t out, llaisysTensor_t in, llaisysTensor_t pos_ids, float theta) {
    struct operand o[] = {operand("in", in, "seq heads d", MAY_ALIAS), operand("pos_ids", pos_ids, "seq", INDEX),
                          operand("out", out, "seq heads d", OUTPUT)};
    struct call call = CALL("llaisysROPE", o);
    if (check(&call)) return;
    size_t d = dim(&call, "d");
    if (d % 2) {
        lla_fail(LLA_EINVAL, "%s: in: expected an even last dimension, found %zu", call.op, d);
        return;
    }
    if (!isfinite(theta) || theta <= 0) {
        lla_fail(LLA_EINVAL, "%s: theta: expected a finite number above 0, found %g", call.op, (double)theta);
        return;
    }
    if (!start(&call)) return;
    finish(&call, call.ops->rope(call.dtype, dim(&call, "seq"), dim(&call, "heads"), d, o[0].dense, o[1].dense, theta,
                                 o[2].dense));
}

static lla_status check_attention(struct call *call, float scale) {
    size_t nh = dim(call, "nh"), nkvh = dim(call, "nkvh"), seq = dim(call, "seq"), total = dim(call, "total");
    LLA_REQUIRE(nkvh ? nh % nkvh == 0 : nh == 0, LLA_EINVAL,
                "%s: q: expected a number of heads that is a multiple of the %zu of k, found %zu", call->op, nkvh, nh);
    LLA_REQUIRE(seq <= total, LLA_EINVAL, "%s: q: expected at most the %zu tokens of k, found %zu", call->op, total,
                seq);
    LLA_REQUIRE(isfinite(scale), LLA_EINVAL, "%s: scale: expected a finite number, found %g", call->op, (double)scale);
    return LLA_OK;
}

void llaisysSelfAttention(llaisysTensor_t attn_val, llaisysTensor_t q, llaisysTensor_t k, llaisysTensor_t v,
                          float scale) {
    struct operand o[] = {operand("q", q, "seq nh d", 0), operand("k", k, "total nkvh d", 0),
                          operand("v", v, "total nkvh dv", 0), operand("attn_val", attn_val, "seq nh dv", OUTPUT)};
    struct call call = CALL("llaisysSelfAttention", o);
    if (check(&call) || check_attention(&call, scale) || !start(&call)) return;
    finish(&call, call.ops->self_attention(call.dtype, dim(&call, "seq"), dim(&call, "total"), dim(&call, "nh"),
                                           dim(&call, "nkvh"), dim(&call, "d"), dim(&call, "dv"), o[0].dense,
                                           o[1].dense, o[2].dense, scale, o[3].dense));
}

void llaisysSwiGLU(llaisysTensor_t out, llaisysTensor_t gate, llaisysTensor_t up) {
    struct operand o[] = {operand("gate", gate, "...", MAY_ALIAS), operand("up", up, "...", MAY_ALIAS),
                          operand("out", out, "...", OUTPUT)};
    struct call call = CALL("llaisysSwiGLU", o);
    if (check(&call) || !start(&call)) return;
    finish(&call, call.ops->swiglu(call.dtype, lla_tensor_numel(out), o[0].dense, o[1].dense, o[2].dense));
}
