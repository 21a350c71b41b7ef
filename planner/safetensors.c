#include "safetensors.h"

#include <cjson/cJSON.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>

_Static_assert(sizeof(size_t) == 8, "offsets of up to 2^53 bytes are held in size_t");

enum {
    MAX_DEPTH = 64,             /* a header needs 3 levels */
    MAX_VALUES = 1 << 22,       /* cJSON takes about 80 bytes each; 100,000 tensors are 800,000 values */
    MAX_NUMBER = 63,            /* cJSON's buffer for the text of a number */
    MAX_HEADER = 100 * 1000000, /* the reference implementation's limit, in bytes */
};

static const uint64_t max_integer = ((uint64_t)1 << 53) - 1; /* beyond it cJSON's doubles are not exact */

/* ---- JSON ---- */

/* Bytes of the UTF-8 character at s (table 3-7 of the Unicode standard), 0 if it is malformed or cut. */
static size_t utf8_length(const uint8_t *s, size_t left) {
    uint8_t lead = s[0];
    if (lead < 0x80) return 1;
    if (lead < 0xc2 || lead > 0xf4) return 0;
    size_t n = lead < 0xe0 ? 2 : lead < 0xf0 ? 3 : 4;
    if (left < n) return 0;
    uint8_t low = lead == 0xe0 ? 0xa0 : lead == 0xf0 ? 0x90 : 0x80;  /* refuses overlong forms */
    uint8_t high = lead == 0xed ? 0x9f : lead == 0xf4 ? 0x8f : 0xbf; /* refuses surrogates and beyond U+10FFFF */
    if (s[1] < low || s[1] > high) return 0;
    for (size_t i = 2; i < n; i++)
        if ((s[i] & 0xc0) != 0x80) return 0;
    return n;
}

static const char *clip(const char *text, char *buf, size_t room) {
    size_t n = strnlen(text, room);
    if (n < room) return memcpy(buf, text, n + 1);
    n = room - sizeof "...";
    while (n && ((uint8_t)text[n] & 0xc0) == 0x80) n--;
    memcpy(buf, text, n);
    memcpy(buf + n, "...", sizeof "...");
    return buf;
}

const char *lla_clip(const char *text, char buf[LLA_SHOWN]) {
    return clip(text, buf, LLA_SHOWN);
}

const char *lla_json_show(const struct cJSON *item, char buf[LLA_SHOWN]) {
    char inner[LLA_SHOWN - 2]; /* quotes around it */
    if (!item)
        snprintf(buf, LLA_SHOWN, "nothing");
    else if (cJSON_IsString(item))
        snprintf(buf, LLA_SHOWN, "\"%s\"", clip(item->valuestring, inner, LLA_SHOWN - 2));
    else if (cJSON_IsNumber(item)) {
        bool whole = fabs(item->valuedouble) < 1e18 && item->valuedouble == floor(item->valuedouble);
        snprintf(buf, LLA_SHOWN, whole ? "%.0f" : "%.15g", item->valuedouble);
    } else
        snprintf(buf, LLA_SHOWN, "%s",
                 cJSON_IsArray(item)    ? "an array"
                 : cJSON_IsObject(item) ? "an object"
                 : cJSON_IsTrue(item)   ? "true"
                 : cJSON_IsFalse(item)  ? "false"
                                        : "null");
    return buf;
}

bool lla_json_integer(const struct cJSON *item, uint64_t max, uint64_t *out) {
    if (!item || !cJSON_IsNumber(item)) return false;
    double value = item->valuedouble;
    if (!(value >= 0 && value <= (double)max) || value != floor(value) || signbit(value)) return false;
    *out = (uint64_t)value;
    return true;
}

struct scan {
    const char *label;
    const uint8_t *begin, *at, *end;
};

static lla_status unexpected(const struct scan *s, const char *expected) {
    char found[32] = "the end of the text";
    if (s->at < s->end) snprintf(found, sizeof found, *s->at > 0x20 && *s->at < 0x7f ? "'%c'" : "byte 0x%02x", *s->at);
    size_t line = 1, column = 1;
    for (const uint8_t *p = s->begin; p < s->at; p++, column++)
        if (*p == '\n') line++, column = 0;
    return lla_fail(LLA_EFORMAT, "%s: malformed JSON at line %zu, byte %zu: expected %s, found %s", s->label, line,
                    column, expected, found);
}

static int peek(const struct scan *s) {
    return s->at < s->end ? *s->at : -1;
}

static void skip_space(struct scan *s) {
    while (s->at < s->end && (*s->at == ' ' || *s->at == '\t' || *s->at == '\n' || *s->at == '\r')) s->at++;
}

static lla_status scan_hex4(struct scan *s, unsigned *out) {
    *out = 0;
    for (int i = 0; i < 4; i++, s->at++) {
        int c = peek(s), digit = c >= '0' && c <= '9'                 ? c - '0'
                                 : (c | 32) >= 'a' && (c | 32) <= 'f' ? (c | 32) - 'a' + 10
                                                                      : -1;
        if (c < 0 || digit < 0) return unexpected(s, "four hexadecimal digits after \\u");
        *out = *out * 16 + (unsigned)digit;
    }
    return LLA_OK;
}

static lla_status scan_string(struct scan *s) {
    for (s->at++;;) {
        int c = peek(s);
        if (c < 0x20) return unexpected(s, "a string's next character or its closing '\"'");
        s->at++;
        if (c == '"') return LLA_OK;
        if (c != '\\') continue;
        c = peek(s);
        if (c <= 0 || !strchr("\"\\/bfnrtu", c)) return unexpected(s, "one of \"\\/bfnrtu after a backslash");
        s->at++;
        if (c != 'u') continue;
        unsigned unit, second = 0;
        LLA_TRY(scan_hex4(s, &unit));
        if (!unit) return lla_fail(LLA_EFORMAT, "%s: malformed JSON: a string holds \\u0000", s->label);
        if (unit < 0xd800 || unit > 0xdfff) continue;
        if (unit < 0xdc00 && s->end - s->at >= 2 && s->at[0] == '\\' && s->at[1] == 'u') {
            s->at += 2;
            LLA_TRY(scan_hex4(s, &second));
        }
        if (second < 0xdc00 || second > 0xdfff)
            return lla_fail(LLA_EFORMAT, "%s: malformed JSON: a string holds half of a surrogate pair, \\u%04x",
                            s->label, unit);
    }
}

static lla_status scan_digits(struct scan *s) {
    if (peek(s) < '0' || peek(s) > '9') return unexpected(s, "a digit");
    while (peek(s) >= '0' && peek(s) <= '9') s->at++;
    return LLA_OK;
}

static lla_status scan_number(struct scan *s) {
    const uint8_t *start = s->at;
    if (peek(s) == '-') s->at++;
    if (peek(s) == '0')
        s->at++;
    else
        LLA_TRY(scan_digits(s));
    if (peek(s) == '.') {
        s->at++;
        LLA_TRY(scan_digits(s));
    }
    if (peek(s) == 'e' || peek(s) == 'E') {
        s->at++;
        if (peek(s) == '+' || peek(s) == '-') s->at++;
        LLA_TRY(scan_digits(s));
    }
    LLA_REQUIRE(s->at - start <= MAX_NUMBER, LLA_EFORMAT, "%s: a number has %zu characters, at most %d are read",
                s->label, (size_t)(s->at - start), MAX_NUMBER);
    return LLA_OK;
}

static lla_status scan_scalar(struct scan *s) {
    int c = peek(s);
    if (c == '"') return scan_string(s);
    if (c == '-' || (c >= '0' && c <= '9')) return scan_number(s);
    static const char *const words[] = {"true", "false", "null"};
    for (size_t i = 0; i < sizeof words / sizeof *words; i++) {
        size_t n = strlen(words[i]);
        if ((size_t)(s->end - s->at) < n || memcmp(s->at, words[i], n)) continue;
        s->at += n;
        return LLA_OK;
    }
    return unexpected(s, "a value");
}

/* The whole grammar, without recursion. cJSON alone is not enough: it takes control characters, 01 and text after the
 * value, cuts strings at \u0000, gives no reason for a failure, and its releases before 1.7.18 read past the end of
 * some truncated texts. */
static lla_status scan_text(struct scan *s) {
    char closers[MAX_DEPTH];
    size_t depth = 0, nvalue = 0;
    bool after_value = false, first = false; /* first: just behind an opening bracket */
    for (;;) {
        skip_space(s);
        int c = peek(s);
        if (after_value || first) {
            if (!depth) return c < 0 ? LLA_OK : unexpected(s, "the end of the text");
            char closer = closers[depth - 1];
            if (c == closer) {
                s->at++;
                depth--;
                after_value = true;
                first = false;
                continue;
            }
            if (!first) {
                if (c != ',') return unexpected(s, closer == '}' ? "',' or '}'" : "',' or ']'");
                s->at++;
                skip_space(s);
            }
        }
        if (depth && closers[depth - 1] == '}') {
            if (peek(s) != '"') return unexpected(s, first ? "a key in quotes or '}'" : "a key in quotes");
            LLA_TRY(scan_string(s));
            skip_space(s);
            if (peek(s) != ':') return unexpected(s, "':'");
            s->at++;
            skip_space(s);
        }
        LLA_REQUIRE(++nvalue <= MAX_VALUES, LLA_ELIMIT, "%s: more than %d JSON values", s->label, MAX_VALUES);
        c = peek(s);
        first = c == '{' || c == '[';
        after_value = !first;
        if (first) {
            LLA_REQUIRE(depth < MAX_DEPTH, LLA_EFORMAT, "%s: JSON is nested more than %d levels deep", s->label,
                        MAX_DEPTH);
            closers[depth++] = c == '{' ? '}' : ']';
            s->at++;
        } else
            LLA_TRY(scan_scalar(s));
    }
}

static int compare_keys(const void *a, const void *b) {
    return strcmp(*(char *const *)a, *(char *const *)b);
}

/* Refuses an object that has a key twice, here or below: parsers differ in which of the two they take. */
static lla_status check_keys(const cJSON *node, const char *label) {
    char key[LLA_SHOWN], where[LLA_SHOWN];
    const char *twice = NULL;
    size_t count = 0;
    for (const cJSON *child = node->child; child; child = child->next, count++)
        if (child->child) LLA_TRY(check_keys(child, label)); /* at most MAX_DEPTH levels */
    if (!cJSON_IsObject(node) || count < 2) return LLA_OK;

    const char *few[8], **keys = few;
    if (count > sizeof few / sizeof *few) {
        keys = malloc(count * sizeof *keys);
        LLA_REQUIRE(keys, LLA_ENOMEM, "%s: out of memory for %zu keys", label, count);
    }
    size_t n = 0;
    for (const cJSON *child = node->child; child; child = child->next) keys[n++] = child->string;
    qsort(keys, count, sizeof *keys, compare_keys);
    for (size_t i = 1; i < count && !twice; i++)
        if (!strcmp(keys[i - 1], keys[i])) twice = keys[i];
    if (keys != few) free(keys);
    if (!twice) return LLA_OK;
    if (!node->string)
        return lla_fail(LLA_EFORMAT, "%s: duplicate key '%s', expected each key once", label, lla_clip(twice, key));
    return lla_fail(LLA_EFORMAT, "%s: '%s': duplicate key '%s', expected each key once", label,
                    lla_clip(node->string, where), lla_clip(twice, key));
}

static bool is_lfs_pointer(const void *text, size_t nbytes) {
    static const char magic[] = "version https://git-lfs";
    return nbytes >= sizeof magic - 1 && !memcmp(text, magic, sizeof magic - 1);
}

lla_status lla_json_parse(const char *text, size_t nbytes, const char *label, struct cJSON **out) {
    *out = NULL;
    LLA_REQUIRE(
        !is_lfs_pointer(text, nbytes), LLA_EFORMAT,
        "%s: this is a Git LFS pointer of %zu bytes, not the file itself: run `git lfs pull` in the model folder",
        label, nbytes);
    const uint8_t *bytes = (const uint8_t *)text;
    for (size_t i = 0, n; i < nbytes; i += n) {
        n = utf8_length(bytes + i, nbytes - i);
        LLA_REQUIRE(n, LLA_EFORMAT, "%s: JSON is not UTF-8: byte 0x%02x at offset %zu begins no valid character", label,
                    bytes[i], i);
    }
    struct scan scan = {label, bytes, bytes, bytes + nbytes};
    LLA_TRY(scan_text(&scan));
    cJSON *root = cJSON_ParseWithLength(text, nbytes);
    LLA_REQUIRE(root, LLA_ENOMEM, "%s: out of memory while parsing %zu bytes of JSON", label,
                nbytes); /* it is well-formed */
    lla_status status = check_keys(root, label);
    if (status)
        cJSON_Delete(root);
    else
        *out = root;
    return status;
}

/* ---- safetensors ---- */

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
        LLA_REQUIRE(lla_json_integer(dim, max_integer, &size), LLA_EFORMAT,
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
        LLA_REQUIRE(lla_json_integer(offset, max_integer, &at), LLA_EFORMAT,
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
    LLA_REQUIRE(!is_lfs_pointer(bytes, nbytes), LLA_EFORMAT,
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
