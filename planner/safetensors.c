#include "safetensors.h"

#include "json.h"

#include <cJSON.h>
#include <stdio.h>
#include <stdlib.h>

_Static_assert(sizeof(size_t) == 8, "offsets of up to 2^53 bytes are held in size_t");

enum { MAX_HEADER = 100 * 1000000 }; /* bytes: the reference implementation's limit */

static llaisysDataType_t dtype_of(const char *name) {
    static const struct {
        const char *name;
        llaisysDataType_t dtype;
    } table[] = {
        {"BF16", LLAISYS_DTYPE_BF16}, {"F16", LLAISYS_DTYPE_F16},    {"F32", LLAISYS_DTYPE_F32},
        {"F64", LLAISYS_DTYPE_F64},   {"F8_E4M3", LLAISYS_DTYPE_F8}, {"F8_E5M2", LLAISYS_DTYPE_F8},
        {"BOOL", LLAISYS_DTYPE_BOOL}, {"I8", LLAISYS_DTYPE_I8},      {"I16", LLAISYS_DTYPE_I16},
        {"I32", LLAISYS_DTYPE_I32},   {"I64", LLAISYS_DTYPE_I64},    {"U8", LLAISYS_DTYPE_U8},
        {"U16", LLAISYS_DTYPE_U16},   {"U32", LLAISYS_DTYPE_U32},    {"U64", LLAISYS_DTYPE_U64},
    };
    for (size_t i = 0; i < sizeof table / sizeof *table; i++)
        if (!strcmp(name, table[i].name)) return table[i].dtype;
    return LLAISYS_DTYPE_INVALID;
}

/* Where a tensor says that its bytes are, counted from the end of the header. */
struct span {
    size_t begin, end, tensor;
};

static int compare_spans(const void *a, const void *b) {
    const struct span *x = a, *y = b;
    if (x->begin != y->begin) return x->begin < y->begin ? -1 : 1;
    return (x->end > y->end) - (x->end < y->end); /* empty tensors come before the one that starts at the same byte */
}

static int compare_tensors(const void *a, const void *b) {
    return strcmp(((const struct lla_st_tensor *)a)->name, ((const struct lla_st_tensor *)b)->name);
}

/* "2, 3"; 8 dimensions of 16 digits fit. */
static const char *show_shape(const struct lla_st_tensor *tensor, char buf[LLA_SHOWN]) {
    size_t used = 0;
    buf[0] = 0;
    for (size_t i = 0; i < tensor->ndim; i++)
        used += (size_t)snprintf(buf + used, LLA_SHOWN - used, i ? ", %zu" : "%zu", tensor->shape[i]);
    return buf;
}

static lla_status parse_shape(const cJSON *item, const char *file, const char *name, struct lla_st_tensor *tensor) {
    char shown[LLA_SHOWN];
    LLA_REQUIRE(cJSON_IsArray(item), LLA_EFORMAT, "%s: tensor '%s': shape: expected an array of integers, found %s",
                file, name, lla_json_show(item, shown));
    size_t nelem =
        1; /* with dimensions of 0 taken as 1, so that no product of some of the dimensions overflows either */
    bool fits = true, empty = false;
    for (const cJSON *dim = item->child; dim; dim = dim->next) {
        LLA_REQUIRE(tensor->ndim < LLA_ST_MAX_NDIM, LLA_EFORMAT,
                    "%s: tensor '%s': shape has %d dimensions, at most %d are read", file, name,
                    cJSON_GetArraySize(item), LLA_ST_MAX_NDIM);
        uint64_t size;
        LLA_REQUIRE(lla_json_integer(dim, LLA_JSON_MAX_INTEGER, &size), LLA_EFORMAT,
                    "%s: tensor '%s': shape: expected whole numbers from 0 to 2^53 - 1, found %s", file, name,
                    lla_json_show(dim, shown));
        tensor->shape[tensor->ndim++] = size;
        if (size)
            fits = fits && !__builtin_mul_overflow(nelem, size, &nelem);
        else
            empty = true;
    }
    fits = fits && !__builtin_mul_overflow(nelem, lla_dtype_size(tensor->dtype), &tensor->nbytes);
    if (empty && fits) tensor->nbytes = 0;
    LLA_REQUIRE(fits, LLA_EFORMAT, "%s: tensor '%s': shape [%s] %s overflows: expected fewer than 2^64 bytes", file,
                name, show_shape(tensor, shown), lla_dtype_name(tensor->dtype));
    return LLA_OK;
}

/* One entry of the header: {"dtype": "BF16", "shape": [2, 3], "data_offsets": [0, 12]}. Other keys are left alone. */
static lla_status parse_entry(const cJSON *entry, const char *file, struct lla_st_tensor *tensor, struct span *span) {
    char name[LLA_SHOWN], shown[LLA_SHOWN];
    lla_clip(entry->string, name);
    for (const char *c = entry->string; *c; c++)
        LLA_REQUIRE((uint8_t)*c >= 0x20 && *c != 0x7f, LLA_EFORMAT,
                    "%s: tensor '%s': the name holds control character 0x%02x, expected printable text", file, name,
                    (uint8_t)*c);
    LLA_REQUIRE(cJSON_IsObject(entry), LLA_EFORMAT, "%s: tensor '%s': expected an object, found %s", file, name,
                lla_json_show(entry, shown));
    const cJSON *dtype = NULL, *shape = NULL, *offsets = NULL;
    for (const cJSON *field = entry->child; field; field = field->next) {
        if (!strcmp(field->string, "dtype")) dtype = field;
        if (!strcmp(field->string, "shape")) shape = field;
        if (!strcmp(field->string, "data_offsets")) offsets = field;
    }
    LLA_REQUIRE(dtype && shape && offsets, LLA_EFORMAT,
                "%s: tensor '%s': expected dtype, shape and data_offsets, found no %s", file, name,
                !dtype   ? "dtype"
                : !shape ? "shape"
                         : "data_offsets");
    tensor->dtype = cJSON_IsString(dtype) ? dtype_of(dtype->valuestring) : LLAISYS_DTYPE_INVALID;
    LLA_REQUIRE(tensor->dtype != LLAISYS_DTYPE_INVALID, LLA_EFORMAT,
                "%s: tensor '%s': unknown dtype: expected BF16, F16, F32 or another of the format, found %s", file,
                name, lla_json_show(dtype, shown));
    LLA_TRY(parse_shape(shape, file, name, tensor));

    LLA_REQUIRE(cJSON_IsArray(offsets), LLA_EFORMAT, "%s: tensor '%s': data_offsets: expected an array, found %s", file,
                name, lla_json_show(offsets, shown));
    LLA_REQUIRE(cJSON_GetArraySize(offsets) == 2, LLA_EFORMAT,
                "%s: tensor '%s': data_offsets: expected 2 numbers, begin and end, found %d", file, name,
                cJSON_GetArraySize(offsets));
    for (const cJSON *offset = offsets->child; offset; offset = offset->next) {
        uint64_t at;
        LLA_REQUIRE(lla_json_integer(offset, LLA_JSON_MAX_INTEGER, &at), LLA_EFORMAT,
                    "%s: tensor '%s': data_offsets: expected whole numbers from 0 to 2^53 - 1, found %s", file, name,
                    lla_json_show(offset, shown));
        *(offset->next ? &span->begin : &span->end) = at;
    }
    LLA_REQUIRE(span->begin <= span->end, LLA_EFORMAT,
                "%s: tensor '%s': data_offsets end at %zu, before they begin at %zu", file, name, span->end,
                span->begin);
    LLA_REQUIRE(tensor->nbytes == span->end - span->begin, LLA_EFORMAT,
                "%s: tensor '%s': shape [%s] %s needs %zu bytes, data_offsets give %zu", file, name,
                show_shape(tensor, shown), lla_dtype_name(tensor->dtype), tensor->nbytes, span->end - span->begin);
    return LLA_OK;
}

static lla_status check_metadata(const cJSON *metadata, const char *file) {
    char key[LLA_SHOWN], shown[LLA_SHOWN];
    LLA_REQUIRE(cJSON_IsObject(metadata), LLA_EFORMAT, "%s: __metadata__: expected an object of strings, found %s",
                file, lla_json_show(metadata, shown));
    for (const cJSON *item = metadata->child; item; item = item->next)
        LLA_REQUIRE(cJSON_IsString(item), LLA_EFORMAT, "%s: __metadata__: '%s': expected a string, found %s", file,
                    lla_clip(item->string, key), lla_json_show(item, shown));
    return LLA_OK;
}

/* The tensors must cover the data section [0, ndata), each byte once. */
static lla_status check_cover(struct span *spans, const struct lla_st_index *index, size_t header_end, size_t nbytes) {
    char name[LLA_SHOWN], before[LLA_SHOWN];
    const char *file = index->file;
    size_t covered = 0;
    qsort(spans, index->count, sizeof *spans, compare_spans);
    for (size_t i = 0; i < index->count; covered = spans[i++].end) {
        if (spans[i].begin == covered) continue;
        lla_clip(index->tensors[spans[i].tensor].name, name);
        LLA_REQUIRE(i, LLA_EFORMAT, "%s: tensor '%s': the first tensor begins at byte %zu of the data, expected 0",
                    file, name, spans[i].begin);
        lla_clip(index->tensors[spans[i - 1].tensor].name, before);
        return lla_fail(LLA_EFORMAT,
                        "%s: tensor '%s': data begin at byte %zu, expected %zu, where tensor '%s' ends: they %s", file,
                        name, spans[i].begin, covered, before, spans[i].begin < covered ? "overlap" : "leave a hole");
    }
    size_t expected = header_end + covered; /* below 2^54 */
    LLA_REQUIRE(nbytes >= expected, LLA_EFORMAT,
                "%s: the header describes a file of %zu bytes, found %zu: it looks like a partial download%s%s%s", file,
                expected, nbytes, index->count ? " (tensor '" : "",
                index->count ? lla_clip(index->tensors[spans[index->count - 1].tensor].name, name) : "",
                index->count ? "' is cut or missing)" : "");
    LLA_REQUIRE(nbytes == expected, LLA_EFORMAT,
                "%s: the header describes a file of %zu bytes, found %zu: %zu bytes trail the last tensor", file,
                expected, nbytes, nbytes - expected);
    return LLA_OK;
}

lla_status lla_st_parse(const uint8_t *bytes, size_t nbytes, const char *file, struct lla_st_index *out) {
    memset(out, 0, sizeof *out);
    LLA_REQUIRE(!lla_is_lfs_pointer(bytes, nbytes), LLA_EFORMAT,
                "%s: this is a Git LFS pointer of %zu bytes, not the weights: run `git lfs pull` in the model folder",
                file, nbytes);
    LLA_REQUIRE(nbytes >= 8, LLA_EFORMAT,
                "%s: expected at least 8 bytes, the length of a safetensors header, found %zu%s", file, nbytes,
                nbytes ? "" : ": the file is empty");
    uint64_t nheader = 0;
    for (int i = 7; i >= 0; i--) nheader = nheader << 8 | bytes[i];
    LLA_REQUIRE(
        nheader <= MAX_HEADER, LLA_EFORMAT,
        "%s: expected a header of at most %d bytes, found a length of %llu: not a safetensors file, or a damaged one",
        file, MAX_HEADER, (unsigned long long)nheader);
    LLA_REQUIRE(nheader <= nbytes - 8, LLA_EFORMAT,
                "%s: the header alone needs %llu bytes after the first 8, found %zu: it looks like a partial download",
                file, (unsigned long long)nheader, nbytes - 8);

    cJSON *root = NULL;
    struct span *spans = NULL;
    lla_status status;
    char shown[LLA_SHOWN];
    LLA_TRY_GOTO(status, lla_json_parse((const char *)bytes + 8, nheader, file, &root), done);
    if (!cJSON_IsObject(root)) {
        status =
            lla_fail(LLA_EFORMAT, "%s: header: expected a JSON object, found %s", file, lla_json_show(root, shown));
        goto done;
    }
    size_t count = 0, name_bytes = 0;
    for (const cJSON *entry = root->child; entry; entry = entry->next) {
        if (!strcmp(entry->string, "__metadata__")) {
            LLA_TRY_GOTO(status, check_metadata(entry, file), done);
            continue;
        }
        count++;
        name_bytes += strlen(entry->string) + 1;
    }
    out->file = strdup(file);
    out->names = malloc(name_bytes + 1);
    out->tensors = calloc(count + 1, sizeof *out->tensors);
    spans = calloc(count + 1, sizeof *spans);
    if (!out->file || !out->names || !out->tensors || !spans) {
        status = lla_fail(LLA_ENOMEM, "%s: out of memory for an index of %zu tensors", file, count);
        goto done;
    }
    char *name = out->names;
    for (const cJSON *entry = root->child; entry; entry = entry->next) {
        if (!strcmp(entry->string, "__metadata__")) continue;
        struct lla_st_tensor *tensor = &out->tensors[out->count];
        spans[out->count].tensor = out->count;
        LLA_TRY_GOTO(status, parse_entry(entry, out->file, tensor, &spans[out->count]), done);
        size_t n = strlen(entry->string) + 1;
        tensor->name = memcpy(name, entry->string, n);
        tensor->file = out->file;
        name += n;
        out->count++;
    }
    size_t header_end = 8 + nheader;
    LLA_TRY_GOTO(status, check_cover(spans, out, header_end, nbytes), done);
    for (size_t i = 0; i < count; i++) out->tensors[spans[i].tensor].data = bytes + header_end + spans[i].begin;
    qsort(out->tensors, count, sizeof *out->tensors, compare_tensors);

done:
    free(spans);
    cJSON_Delete(root);
    if (status) lla_st_index_free(out);
    return status;
}

void lla_st_index_free(struct lla_st_index *index) {
    free(index->tensors);
    free(index->names);
    free(index->file);
    memset(index, 0, sizeof *index);
}
