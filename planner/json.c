#include "json.h"

#include "../base/utf8.h"

#include <cJSON.h>
#include <errno.h>
#include <fcntl.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

enum {
    MAX_DEPTH = 64,       /* a safetensors header needs 3 levels */
    MAX_VALUES = 1 << 22, /* cJSON takes about 80 bytes each; 100,000 tensors are 800,000 values */
    MAX_NUMBER = 63,      /* cJSON's buffer for the text of a number */
};

/* ---- values ---- */

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

/* ---- the grammar ---- */

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
    char closers[MAX_DEPTH] = {0};
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

bool lla_is_lfs_pointer(const void *text, size_t nbytes) {
    static const char magic[] = "version https://git-lfs";
    return nbytes >= sizeof magic - 1 && !memcmp(text, magic, sizeof magic - 1);
}

lla_status lla_json_parse(const char *text, size_t nbytes, const char *label, struct cJSON **out) {
    *out = NULL;
    LLA_REQUIRE(
        !lla_is_lfs_pointer(text, nbytes), LLA_EFORMAT,
        "%s: this is a Git LFS pointer of %zu bytes, not the file itself: run `git lfs pull` in the model folder",
        label, nbytes);
    const uint8_t *bytes = (const uint8_t *)text;
    for (size_t i = 0, n; i < nbytes; i += n) {
        n = lla_utf8_length(bytes + i, nbytes - i);
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

/* ---- files ---- */

lla_status lla_open_file(const char *dir, const char *name, int *fd, size_t *nbytes) {
    char shown[LLA_SHOWN], *path = NULL;
    struct stat info;
    *fd = -1;
    LLA_REQUIRE(asprintf(&path, "%s/%s", dir, name) >= 0, LLA_ENOMEM, "%s: out of memory", name);
    do *fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK); /* a FIFO must not hang us */
    while (*fd < 0 && errno == EINTR);
    int error = errno;
    free(path);
    if (*fd < 0 && error == ENOENT) return LLA_OK;
    lla_clip(dir, shown);
    LLA_REQUIRE(*fd >= 0, LLA_EIO, "%s: cannot be opened in folder '%s': %s", name, shown, strerror(error));
    if (!fstat(*fd, &info) && S_ISREG(info.st_mode)) {
        *nbytes = (size_t)info.st_size;
        return LLA_OK;
    }
    close(*fd);
    *fd = -1;
    return lla_fail(LLA_EIO, "%s: expected a regular file in folder '%s', found something else", name, shown);
}

lla_status lla_read_file(const char *dir, const char *name, size_t limit, char **text, size_t *nbytes) {
    int fd;
    size_t size = 0, got = 0;
    lla_status status = LLA_OK;
    *text = NULL;
    *nbytes = 0;
    LLA_TRY(lla_open_file(dir, name, &fd, &size));
    if (fd < 0) return LLA_OK;
    if (size > limit) {
        status = lla_fail(LLA_ELIMIT, "%s: expected at most %zu bytes, found %zu", name, limit, size);
        goto done;
    }
    char *buf = malloc(size + 1);
    if (!buf) {
        status = lla_fail(LLA_ENOMEM, "%s: out of memory for %zu bytes", name, size);
        goto done;
    }
    while (got < size) {
        ssize_t n = read(fd, buf + got, size - got);
        if (n < 0 && errno == EINTR) continue;
        if (n <= 0) {
            status = lla_fail(LLA_EIO, "%s: expected to read %zu bytes, got %zu: %s", name, size, got,
                              n ? strerror(errno) : "the file became shorter");
            free(buf);
            goto done;
        }
        got += (size_t)n;
    }
    buf[size] = 0;
    *text = buf;
    *nbytes = size;
done:
    close(fd);
    return status;
}
