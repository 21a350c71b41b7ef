/* test_safetensors.c: every defect of a safetensors file or folder is one line that names the file, the tensor and the
 * reason. */
#include "../../planner/safetensors.h"
#include "harness.h"

#include <cJSON.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#define FILE_NAME "shard.safetensors"

/* ---- images in memory; exactly sized, so that the address sanitizer sees a read beyond the end ---- */

struct image {
    uint8_t *bytes;
    size_t nbytes;
};

static struct image make_image(const char *header, size_t nheader, size_t ndata) {
    struct image image = {malloc(8 + nheader + ndata), 8 + nheader + ndata};
    for (int i = 0; i < 8; i++) image.bytes[i] = (uint8_t)((uint64_t)nheader >> 8 * i);
    memcpy(image.bytes + 8, header, nheader);
    for (size_t i = 0; i < ndata; i++) image.bytes[8 + nheader + i] = (uint8_t)i;
    return image;
}

/* Expects a failure whose line names the file and holds each of the needles, of which NULL is the last. */
static void refused_image(struct image image, int line, const char *const *needles) {
    struct lla_st_index index;
    memset(&index, 0xff, sizeof index);
    lla_clear_error();
    lla_status status = lla_st_parse(image.bytes, image.nbytes, FILE_NAME, &index);
    const char *error = lla_last_error();
    if (!status) fprintf(stderr, "line %d: accepted\n", line);
    CHECK(status != LLA_OK);
    if (status) CHECK(!index.tensors && !index.count && !index.file && !index.names);
    CHECK_STR_HAS(error, FILE_NAME ": ");
    for (; *needles; needles++) {
        if (!error || !strstr(error, *needles)) fprintf(stderr, "line %d:\n", line);
        CHECK_STR_HAS(error, *needles);
    }
    if (!status) lla_st_index_free(&index);
    free(image.bytes);
}

#define REFUSED_BYTES(text, n, ...)                                                                                    \
    refused_image(make_image(text, n, 0), __LINE__, (const char *const[]){__VA_ARGS__, NULL})
#define REFUSED(header, ndata, ...)                                                                                    \
    refused_image(make_image(header, strlen(header), ndata), __LINE__, (const char *const[]){__VA_ARGS__, NULL})

static lla_status parse(const char *header, size_t ndata, struct lla_st_index *index, struct image *image) {
    *image = make_image(header, strlen(header), ndata);
    lla_status status = lla_st_parse(image->bytes, image->nbytes, FILE_NAME, index);
    if (status) fprintf(stderr, "refused: %s\n", lla_last_error());
    return status;
}

static void accepted(const char *header, size_t ndata, size_t count) {
    struct lla_st_index index;
    struct image image;
    CHECK_INT(parse(header, ndata, &index, &image), LLA_OK);
    CHECK_INT(index.count, count);
    lla_st_index_free(&index);
    free(image.bytes);
}

#define ENTRY(name, dtype, shape, begin, end)                                                                          \
    "\"" name "\":{\"dtype\":\"" dtype "\",\"shape\":" shape ",\"data_offsets\":[" #begin "," #end "]}"

TEST(reads_tensors_sorted_by_name) {
    struct lla_st_index index;
    struct image image;
    CHECK_INT(parse("{" ENTRY("w", "F32", "[2,3]", 0, 24) "," ENTRY("b", "BF16", "[4]", 24,
                                                                    32) ",\"__metadata__\":{\"format\":\"pt\"}}",
                    32, &index, &image),
              LLA_OK);
    CHECK_INT(index.count, 2);
    const struct lla_st_tensor *b = &index.tensors[0], *w = &index.tensors[1];
    CHECK(!strcmp(b->name, "b") && !strcmp(w->name, "w"));
    CHECK(!strcmp(b->file, FILE_NAME) && b->file == w->file);
    CHECK_INT(w->dtype, LLAISYS_DTYPE_F32);
    CHECK_INT(w->ndim, 2);
    CHECK(w->shape[0] == 2 && w->shape[1] == 3);
    CHECK_INT(w->nbytes, 24);
    CHECK_INT(((const uint8_t *)w->data)[23], 23);
    CHECK_INT(b->dtype, LLAISYS_DTYPE_BF16);
    CHECK_INT(b->nbytes, 8);
    CHECK_INT(((const uint8_t *)b->data)[0], 24);
    lla_st_index_free(&index);
    lla_st_index_free(&index); /* freeing twice is harmless */
    free(image.bytes);
}

TEST(accepts_the_whole_format) {
    accepted("{}", 0, 0);
    accepted("{\"__metadata__\":{}}", 0, 0);
    accepted("  \n\t\r{} \n\t  ", 0, 0);
    accepted("{" ENTRY("scalar", "F32", "[]", 0, 4) "}", 4, 1);
    accepted("{" ENTRY("", "U8", "[1]", 0, 1) "}", 1, 1);
    accepted("{" ENTRY("none", "F32", "[3,0]", 0, 0) "}", 0, 1);
    accepted("{" ENTRY("a", "U8", "[2]", 0, 2) "," ENTRY("e", "F32", "[0]", 2, 2) "," ENTRY("c", "U8", "[1]", 2, 3) "}",
             3, 3);
    accepted("{" ENTRY("a", "U8", "[2]", 0, 2) "," ENTRY("end", "F32", "[0,7]", 2, 2) "}", 2, 2);
    accepted("{" ENTRY("deep", "U8", "[1,1,1,1,1,1,1,2]", 0, 2) "}", 2, 1);
    accepted("{" ENTRY("\\u00e9\\ud83d\\ude00 \xe2\x82\xac", "U8", "[1]", 0, 1) "}", 1, 1);
    accepted("{\"x\":{\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[0,1],\"later\":[{}]}}", 1, 1);
    static const struct {
        const char *name;
        llaisysDataType_t dtype;
    } dtypes[] = {{"BOOL", LLAISYS_DTYPE_BOOL},  {"U8", LLAISYS_DTYPE_U8},      {"I8", LLAISYS_DTYPE_I8},
                  {"F8_E5M2", LLAISYS_DTYPE_F8}, {"F8_E4M3", LLAISYS_DTYPE_F8}, {"I16", LLAISYS_DTYPE_I16},
                  {"U16", LLAISYS_DTYPE_U16},    {"F16", LLAISYS_DTYPE_F16},    {"BF16", LLAISYS_DTYPE_BF16},
                  {"I32", LLAISYS_DTYPE_I32},    {"U32", LLAISYS_DTYPE_U32},    {"F32", LLAISYS_DTYPE_F32},
                  {"F64", LLAISYS_DTYPE_F64},    {"I64", LLAISYS_DTYPE_I64},    {"U64", LLAISYS_DTYPE_U64}};
    for (size_t i = 0; i < sizeof dtypes / sizeof *dtypes; i++) {
        size_t n = 3 * lla_dtype_size(dtypes[i].dtype);
        char header[128];
        snprintf(header, sizeof header, "{\"x\":{\"dtype\":\"%s\",\"shape\":[3],\"data_offsets\":[0,%zu]}}",
                 dtypes[i].name, n);
        struct lla_st_index index;
        struct image image;
        CHECK_INT(parse(header, n, &index, &image), LLA_OK);
        CHECK_INT(index.tensors[0].dtype, dtypes[i].dtype);
        lla_st_index_free(&index);
        free(image.bytes);
    }
}

TEST(header_length) {
    static const char *const short_file[] = {"expected at least 8 bytes", "found", NULL};
    for (size_t n = 0; n < 8; n++) refused_image((struct image){calloc(n + 1, 1), n}, __LINE__, short_file);
    REFUSED("", 0, "malformed JSON", "expected a value, found the end of the text");

    struct image image = make_image("{}", 2, 0);
    image.bytes[0] = 3;
    refused_image(image, __LINE__, (const char *const[]){"needs 3 bytes", "found 2", "partial download", NULL});
    image = make_image("{}", 2, 0);
    image.bytes[3] = 0x06; /* 100,663,298: over the limit */
    refused_image(image, __LINE__,
                  (const char *const[]){"at most 100000000 bytes", "found a length of 100663298", NULL});
    image = make_image("{}", 2, 0);
    memset(image.bytes, 0xff, 8);
    refused_image(image, __LINE__, (const char *const[]){"found a length of 18446744073709551615", NULL});
}

TEST(git_lfs_pointer) {
    static const char text[] = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 3087467144\n";
    struct image image = {(uint8_t *)strdup(text), sizeof text - 1};
    refused_image(image, __LINE__, (const char *const[]){"Git LFS pointer", "not the weights", "git lfs pull", NULL});
}

TEST(header_text) {
    REFUSED("{\"\xff\":1}", 0, "not UTF-8", "0xff", "offset 2");
    REFUSED("{\"\xc0\xaf\":1}", 0, "not UTF-8");         /* overlong */
    REFUSED("{\"\xe0\x80\x80\":1}", 0, "not UTF-8");     /* overlong */
    REFUSED("{\"\xed\xa0\x80\":1}", 0, "not UTF-8");     /* a surrogate */
    REFUSED("{\"\xf4\x90\x80\x80\":1}", 0, "not UTF-8"); /* beyond U+10FFFF */
    REFUSED("{\"\xf0\x9f\x98", 0, "not UTF-8");          /* cut */
    REFUSED("\xef\xbb\xbf{}", 0, "malformed JSON", "byte 0xef");
    REFUSED("{", 0, "malformed JSON", "line 1, byte 2", "a key in quotes or '}'");
    REFUSED("{\"a\"", 0, "malformed JSON", "':'", "the end of the text");
    REFUSED("{\"a\":", 0, "expected a value");
    REFUSED("{\"a\":1", 0, "',' or '}'");
    REFUSED("{\"a\":1,", 0, "a key in quotes");
    REFUSED("{\"a\":1,}", 0, "a key in quotes", "found '}'");
    REFUSED("{\"a\":[1,]}", 0, "expected a value", "found ']'");
    REFUSED("{\"a\":[1}", 0, "',' or ']'", "found '}'");
    REFUSED("{\"a", 0, "closing '\"'");
    REFUSED("{\"a\\", 0, "after a backslash");
    REFUSED("{\"a\\x\":1}", 0, "after a backslash");
    REFUSED("{\"\\u12g4\":1}", 0, "four hexadecimal digits");
    REFUSED("{\"\\ud800\":1}", 0, "half of a surrogate pair");
    REFUSED("{\"\\ud800\\u0041\":1}", 0, "half of a surrogate pair");
    REFUSED("{\"\\udc00\":1}", 0, "half of a surrogate pair");
    REFUSED("{\"a\\u0000b\":1}", 0, "\\u0000");
    REFUSED("{\"a\nb\":1}", 0, "malformed JSON", "byte 0x0a");
    REFUSED("{} x", 0, "the end of the text", "found 'x'");
    REFUSED_BYTES("{}\0", 3, "the end of the text", "byte 0x00");
    REFUSED("{\n\"a\": nul}", 0, "line 2, byte 6", "expected a value");
    REFUSED("{\"a\":01}", 0, "malformed JSON", "found '1'");
    REFUSED("{\"a\":-}", 0, "a digit");
    REFUSED("{\"a\":1.}", 0, "a digit");
    REFUSED("{\"a\":1e}", 0, "a digit");
    REFUSED("{\"a\":+1}", 0, "expected a value");
    REFUSED("{\"a\":1111111111111111111111111111111111111111111111111111111111111111}", 0, "64 characters",
            "at most 63");
    REFUSED("[]", 0, "header: expected a JSON object, found an array");
    REFUSED("\"text\"", 0, "expected a JSON object, found \"text\"");
    REFUSED("null", 0, "expected a JSON object, found null");
}

TEST(deep_nesting) {
    enum { DEPTH = 10000 };
    static char text[2 * DEPTH + 8];
    memset(text, '[', DEPTH);
    memset(text + DEPTH, ']', DEPTH);
    REFUSED(text, 0, "nested more than 64 levels deep");
    memset(text, '[', sizeof text - 1);
    REFUSED(text, 0, "nested more than 64 levels deep");
    for (int i = 0; i < DEPTH / 5; i++) memcpy(text + 5 * i, "{\"a\":", 5);
    REFUSED(text, 0, "nested more than 64 levels deep");
}

TEST(duplicate_keys) {
    REFUSED("{" ENTRY("w", "U8", "[1]", 0, 1) "," ENTRY("w", "U8", "[1]", 1, 2) "}", 2, "duplicate key 'w'");
    REFUSED("{" ENTRY("w", "U8", "[1]", 0, 1) "," ENTRY("\\u0077", "U8", "[1]", 0, 1) "}", 1, "duplicate key 'w'");
    REFUSED("{\"w\":{\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[0,1],\"data_offsets\":[0,1]}}", 1, "'w'",
            "duplicate key 'data_offsets'");
    REFUSED("{\"__metadata__\":{},\"__metadata__\":{}}", 0, "duplicate key '__metadata__'");
    REFUSED("{\"__metadata__\":{\"a\":\"\",\"b\":\"\",\"a\":\"\"}}", 0, "'__metadata__'", "duplicate key 'a'");
}

TEST(metadata) {
    REFUSED("{\"__metadata__\":[]}", 0, "__metadata__", "expected an object of strings, found an array");
    REFUSED("{\"__metadata__\":{\"format\":1}}", 0, "__metadata__", "'format'", "expected a string, found 1");
}

TEST(entry_fields) {
    REFUSED("{\"w\":3}", 0, "tensor 'w'", "expected an object, found 3");
    REFUSED("{\"w\":[]}", 0, "tensor 'w'", "expected an object, found an array");
    REFUSED("{\"w\":{}}", 0, "tensor 'w'", "found no dtype");
    REFUSED("{\"w\":{\"dtype\":\"U8\",\"data_offsets\":[0,1]}}", 1, "tensor 'w'", "found no shape");
    REFUSED("{\"w\":{\"dtype\":\"U8\",\"shape\":[1]}}", 1, "tensor 'w'", "found no data_offsets");
    REFUSED("{" ENTRY("w", "F7", "[1]", 0, 1) "}", 1, "tensor 'w'", "unknown dtype", "found \"F7\"");
    REFUSED("{" ENTRY("w", "f32", "[1]", 0, 4) "}", 4, "tensor 'w'", "unknown dtype", "found \"f32\"");
    REFUSED("{\"w\":{\"dtype\":7,\"shape\":[1],\"data_offsets\":[0,1]}}", 1, "tensor 'w'", "unknown dtype", "found 7");
    REFUSED("{" ENTRY("a\\nb", "U8", "[1]", 0, 1) "}", 1, "tensor 'a?b'", "control character 0x0a");
    REFUSED("{" ENTRY("a\\u007f", "U8", "[1]", 0, 1) "}", 1, "control character 0x7f");
}

TEST(shapes) {
    REFUSED("{" ENTRY("lm_head.weight", "F32", "[2,3]", 0, 20) "}", 20,
            "tensor 'lm_head.weight': shape [2, 3] f32 needs 24 bytes, data_offsets give 20");
    REFUSED("{" ENTRY("w", "F32", "[]", 0, 8) "}", 8, "shape [] f32 needs 4 bytes, data_offsets give 8");
    REFUSED("{" ENTRY("w", "F32", "[0]", 0, 4) "}", 4, "shape [0] f32 needs 0 bytes, data_offsets give 4");
    REFUSED("{" ENTRY("w", "U8", "3", 0, 3) "}", 3, "tensor 'w'", "shape: expected an array of integers, found 3");
    REFUSED("{" ENTRY("w", "U8", "[-1]", 0, 1) "}", 1, "tensor 'w'", "shape", "found -1");
    REFUSED("{" ENTRY("w", "U8", "[-0]", 0, 0) "}", 0, "tensor 'w'", "shape", "found -0");
    REFUSED("{" ENTRY("w", "U8", "[1.5]", 0, 1) "}", 1, "tensor 'w'", "shape", "found 1.5");
    REFUSED("{" ENTRY("w", "U8", "[\"1\"]", 0, 1) "}", 1, "tensor 'w'", "shape", "found \"1\"");
    REFUSED("{" ENTRY("w", "U8", "[9007199254740992]", 0, 1) "}", 1, "tensor 'w'", "2^53", "found 9007199254740992");
    REFUSED("{" ENTRY("w", "U8", "[1e400]", 0, 1) "}", 1, "tensor 'w'", "shape", "found inf");
    REFUSED("{" ENTRY("w", "U8", "[1,1,1,1,1,1,1,1,1]", 0, 1) "}", 1, "tensor 'w'", "9 dimensions, at most 8");
    REFUSED("{" ENTRY("w", "U8", "[4194305,4194305,211106198978564]", 0, 1) "}", 1, "tensor 'w'",
            "shape [4194305, 4194305, 211106198978564] u8 overflows");
    REFUSED("{" ENTRY("w", "U8", "[4294967296,4294967296]", 0, 0) "}", 0, "tensor 'w'", "overflows");
    REFUSED("{" ENTRY("w", "F64", "[4294967296,536870912]", 0, 0) "}", 0, "tensor 'w'", "f64 overflows");
    REFUSED("{" ENTRY("w", "U8", "[0,4294967296,4294967296]", 0, 0) "}", 0, "tensor 'w'", "overflows");
    REFUSED(
        "{" ENTRY(
            "w", "U8",
            "[9007199254740991,9007199254740991,9007199254740991,9007199254740991,9007199254740991,9007199254740991,"
            "9007199254740991,9007199254740991]",
            0, 0) "}",
        0, "tensor 'w'", "9007199254740991] u8 overflows");
}

#define OFFSETS(text) "{\"w\":{\"dtype\":\"U8\",\"shape\":[4],\"data_offsets\":" text "}}"

TEST(offsets) {
    REFUSED(OFFSETS("[4,0]"), 4, "tensor 'w'", "end at 0, before they begin at 4");
    REFUSED(OFFSETS("[-4,0]"), 4, "tensor 'w'", "data_offsets", "found -4");
    REFUSED(OFFSETS("[0.5,4.5]"), 4, "tensor 'w'", "data_offsets", "found 0.5");
    REFUSED(OFFSETS("[0,18446744073709551620]"), 4, "tensor 'w'", "data_offsets", "2^53");
    REFUSED(OFFSETS("[0,9007199254740993]"), 4, "tensor 'w'", "data_offsets", "2^53");
    REFUSED(OFFSETS("[9007199254740987,9007199254740991]"), 4, "tensor 'w'", "begins at byte 9007199254740987",
            "expected 0");
    REFUSED(OFFSETS("[0,null]"), 4, "tensor 'w'", "data_offsets", "found null");
    REFUSED(OFFSETS("[0]"), 4, "tensor 'w'", "expected 2 numbers, begin and end, found 1");
    REFUSED(OFFSETS("[0,2,4]"), 4, "tensor 'w'", "expected 2 numbers, begin and end, found 3");
    REFUSED(OFFSETS("[]"), 4, "tensor 'w'", "found 0");
    REFUSED(OFFSETS("{\"begin\":0,\"end\":4}"), 4, "tensor 'w'", "expected an array, found an object");
}

TEST(coverage) {
    REFUSED(OFFSETS("[2,6]"), 6, "tensor 'w'", "begins at byte 2 of the data, expected 0");
    REFUSED("{" ENTRY("a", "U8", "[4]", 0, 4) "," ENTRY("b", "U8", "[4]", 2, 6) "}", 6, "tensor 'b'",
            "begin at byte 2, expected 4, where tensor 'a' ends", "overlap");
    REFUSED("{" ENTRY("b", "U8", "[4]", 0, 4) "," ENTRY("a", "U8", "[4]", 0, 4) "}", 4, "overlap");
    REFUSED("{" ENTRY("b", "U8", "[4]", 6, 10) "," ENTRY("a", "U8", "[4]", 0, 4) "}", 10, "tensor 'b'",
            "begin at byte 6, expected 4, where tensor 'a' ends", "leave a hole");
    REFUSED("{" ENTRY("a", "U8", "[4]", 0, 4) "," ENTRY("none", "U8", "[0]", 2, 2) "}", 4, "tensor 'none'", "overlap");
    REFUSED(OFFSETS("[0,4]"), 5, "65 bytes, found 66", "1 bytes trail");
    REFUSED(OFFSETS("[0,4]"), 3, "65 bytes, found 64", "partial download", "tensor 'w' is cut or missing");
    REFUSED("{}", 1, "10 bytes, found 11", "trail");
}

TEST(every_truncation_is_refused) {
    static const char header[] = "{" ENTRY("a", "U8", "[4]", 0, 4) "," ENTRY("b", "F32", "[2]", 4, 12) "}";
    struct image whole = make_image(header, sizeof header - 1, 12);
    for (size_t n = 0; n < whole.nbytes; n++) {
        struct image part = {malloc(n + 1), n};
        memcpy(part.bytes, whole.bytes, n);
        refused_image(part, __LINE__, (const char *const[]){"found", NULL});
    }
    free(whole.bytes);
}

TEST(long_names_leave_the_reason_readable) {
    static char header[4000];
    char name[2400] = "";
    while (strlen(name) < 2390) strcat(name, "\xe2\x82\xac");
    snprintf(header, sizeof header, "{\"%s\":{\"dtype\":\"U8\",\"shape\":[2],\"data_offsets\":[0,1]}}", name);
    REFUSED(header, 1, "\xe2\x82\xac...'", "needs 2 bytes, data_offsets give 1");
}

TEST(many_tensors) {
    enum { COUNT = 100000 };
    char *header = malloc(COUNT * 100), *at = header;
    *at++ = '{';
    for (int i = 0; i < COUNT; i++)
        at += sprintf(at, "%s\"model.layers.%d.weight\":{\"dtype\":\"BF16\",\"shape\":[1,1],\"data_offsets\":[%d,%d]}",
                      i ? "," : "", (i * 7919) % COUNT, 2 * i, 2 * i + 2);
    strcpy(at, "}");
    struct image image;
    struct lla_st_index index;
    struct timespec begin, end;
    clock_gettime(CLOCK_MONOTONIC, &begin);
    CHECK_INT(parse(header, 2 * COUNT, &index, &image), LLA_OK);
    clock_gettime(CLOCK_MONOTONIC, &end);
    double seconds = (double)(end.tv_sec - begin.tv_sec) + 1e-9 * (double)(end.tv_nsec - begin.tv_nsec);
    printf("100,000 tensors in %.3f s\n", seconds);
    CHECK(seconds < 30); /* 0.2 s; ten times that under sanitizers; quadratic work would take minutes */
    CHECK_INT(index.count, COUNT);
    for (size_t i = 1; i < index.count; i++)
        if (strcmp(index.tensors[i - 1].name, index.tensors[i].name) >= 0) CHECK(!"sorted");
    lla_st_index_free(&index);
    free(image.bytes);

    memcpy(strstr(header, "layers.7919."), "layers.0000.", 12); /* not a duplicate: "0000" is not "0" */
    accepted(header, 2 * COUNT, COUNT);
    memcpy(strstr(header, "layers.0000."), "layers.1234.", 12);
    REFUSED(header, 2 * COUNT, "duplicate key 'model.layers.1234.weight'");
    free(header);
}

/* cJSON's memory runs out at each allocation in turn; ours is checked in the same places. */
static size_t allocations_left;
static void *failing_malloc(size_t size) {
    return allocations_left && allocations_left-- ? malloc(size) : NULL;
}

TEST(out_of_memory) {
    cJSON_Hooks hooks = {failing_malloc, free};
    struct image image = make_image(OFFSETS("[0,4]"), strlen(OFFSETS("[0,4]")), 4);
    struct lla_st_index index;
    cJSON_InitHooks(&hooks);
    size_t n = 0;
    for (;; n++) {
        allocations_left = n;
        if (!lla_st_parse(image.bytes, image.nbytes, FILE_NAME, &index)) break;
        CHECK_STR_HAS(lla_last_error(), FILE_NAME ": out of memory");
        CHECK(!index.tensors);
    }
    cJSON_InitHooks(NULL);
    CHECK(n > 5);
    lla_st_index_free(&index);
    free(image.bytes);
}

/* ---- folders ---- */

#define INDEX_FILE "model.safetensors.index.json"

static char folder[64];

static void folder_begin(void) {
    strcpy(folder, "/tmp/refrain-test-XXXXXX");
    if (!mkdtemp(folder)) abort();
}

static void folder_end(void) {
    static const char *const names[] = {INDEX_FILE,           "model.safetensors", "a.safetensors",
                                        "b.safetensors",      "pytorch_model.bin", "c.txt",
                                        ".hidden.safetensors"};
    char path[128];
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
        snprintf(path, sizeof path, "%s/%s", folder, names[i]);
        remove(path);
    }
    CHECK_INT(rmdir(folder), 0);
}

static void folder_put(const char *name, const void *bytes, size_t nbytes) {
    char path[128];
    snprintf(path, sizeof path, "%s/%s", folder, name);
    FILE *file = fopen(path, "wb");
    if (!file) abort();
    if (nbytes) fwrite(bytes, 1, nbytes, file);
    fclose(file);
}

/* A shard that holds one tensor of 4 bytes, or, for NULL, none. */
static void folder_put_shard(const char *name, const char *tensor) {
    char header[128] = "{}";
    if (tensor)
        snprintf(header, sizeof header, "{\"%s\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,4]}}", tensor);
    struct image image = make_image(header, strlen(header), tensor ? 4 : 0);
    folder_put(name, image.bytes, image.nbytes);
    free(image.bytes);
}

static void folder_put_index(const char *text) {
    folder_put(INDEX_FILE, text, strlen(text));
}

static void folder_accepted(size_t count, const char *tensor, const char *file) {
    struct lla_checkpoint *checkpoint = NULL;
    lla_status status = lla_checkpoint_open(folder, &checkpoint);
    if (status) fprintf(stderr, "refused: %s\n", lla_last_error());
    CHECK_INT(status, LLA_OK);
    if (status) return;
    CHECK_INT(lla_checkpoint_count(checkpoint), count);
    const struct lla_st_tensor *found = lla_checkpoint_find(checkpoint, tensor);
    CHECK(found && !strcmp(found->name, tensor) && !strcmp(found->file, file));
    if (found) CHECK_INT(((const uint8_t *)found->data)[3], 3);
    CHECK(!lla_checkpoint_find(checkpoint, "absent"));
    CHECK(!lla_checkpoint_at(checkpoint, count));
    for (size_t i = 1; i < count; i++)
        CHECK(strcmp(lla_checkpoint_at(checkpoint, i - 1)->name, lla_checkpoint_at(checkpoint, i)->name) < 0);
    lla_checkpoint_close(checkpoint);
}

static void folder_refused(const char *const *needles) {
    struct lla_checkpoint *checkpoint = (struct lla_checkpoint *)&folder;
    lla_clear_error();
    lla_status status = lla_checkpoint_open(folder, &checkpoint);
    CHECK(status != LLA_OK);
    CHECK(!checkpoint);
    for (; *needles; needles++) CHECK_STR_HAS(lla_last_error(), *needles);
}

#define FOLDER_REFUSED(...) folder_refused((const char *const[]){__VA_ARGS__, NULL})

TEST(folder_single) {
    folder_begin();
    folder_put_shard("a.safetensors", "a");
    folder_put_shard(".hidden.safetensors", "a");
    folder_put("c.txt", "text", 4);
    folder_accepted(1, "a", "a.safetensors");
    folder_put_shard("b.safetensors", "b");
    folder_accepted(2, "b", "b.safetensors");
    folder_put_shard("b.safetensors", "a");
    FOLDER_REFUSED("tensor 'a'", "a.safetensors", "b.safetensors", "in one file");
    folder_put_shard("model.safetensors", "m"); /* then the others do not count */
    folder_accepted(1, "m", "model.safetensors");
    folder_end();
}

TEST(folder_without_weights) {
    folder_begin();
    FOLDER_REFUSED(folder, INDEX_FILE, "model.safetensors", "none of them");
    folder_put("pytorch_model.bin", "", 0);
    FOLDER_REFUSED(folder, "pytorch_model", "convert it to safetensors");
    folder_put("model.safetensors", "", 0);
    FOLDER_REFUSED("model.safetensors: ", "at least 8 bytes", "found 0", "empty");
    folder_put("model.safetensors", "version https://git-lfs.github.com/spec/v1\n", 43);
    FOLDER_REFUSED("model.safetensors: ", "Git LFS pointer", "git lfs pull");
    folder_end();
    FOLDER_REFUSED(folder, "No such file");
    strcpy(folder, "/dev/null");
    FOLDER_REFUSED(folder, "expected a folder, found a file");
}

TEST(folder_with_odd_files) {
    char path[128];
    folder_begin();
    snprintf(path, sizeof path, "%s/model.safetensors", folder);
    CHECK_INT(mkdir(path, 0700), 0);
    FOLDER_REFUSED("model.safetensors: ", "expected a regular file");
    CHECK_INT(rmdir(path), 0);
    CHECK_INT(mkfifo(path, 0600), 0);
    FOLDER_REFUSED("model.safetensors: ", "expected a regular file");
    CHECK_INT(unlink(path), 0);
    CHECK_INT(symlink("missing", path), 0);
    FOLDER_REFUSED("model.safetensors: ", "found no such file");
    folder_end();
}

TEST(folder_index) {
    folder_begin();
    folder_put_shard("a.safetensors", "a");
    folder_put_shard("b.safetensors", "b");
    folder_put_index(
        "{\"metadata\":{\"total_size\":8},\"weight_map\":{\"b\":\"b.safetensors\",\"a\":\"a.safetensors\"}}");
    folder_accepted(2, "b", "b.safetensors");
    folder_put_shard("model.safetensors", "m"); /* the index decides */
    folder_accepted(2, "a", "a.safetensors");
    folder_put_index("{\"weight_map\":{\"b\":\"b.safetensors\"}}");
    folder_accepted(1, "b", "b.safetensors");

    folder_put_index("{\"weight_map\":{\"a\":\"a.safetensors\",\"b\":\"c.safetensors\"}}");
    FOLDER_REFUSED("c.safetensors: ", INDEX_FILE, folder, "no such file");
    folder_put_index("{\"weight_map\":{\"a\":\"a.safetensors\",\"b\":\"a.safetensors\"}}");
    FOLDER_REFUSED(INDEX_FILE ": ", "tensor 'b'", "expected in a.safetensors, found nowhere");
    folder_put_index("{\"weight_map\":{\"a\":\"b.safetensors\",\"b\":\"a.safetensors\"}}");
    FOLDER_REFUSED(INDEX_FILE ": ", "tensor 'a'", "expected in b.safetensors, found in a.safetensors");
    folder_put_shard("b.safetensors", "a");
    folder_put_index("{\"weight_map\":{\"a\":\"a.safetensors\",\"b\":\"b.safetensors\"}}");
    FOLDER_REFUSED("a.safetensors: ", "tensor 'a'", "found in b.safetensors too");
    folder_put_shard("b.safetensors", NULL);
    FOLDER_REFUSED(INDEX_FILE ": ", "tensor 'b'", "expected in b.safetensors, found nowhere");
    folder_put("b.safetensors", "", 0);
    FOLDER_REFUSED("b.safetensors: ", "at least 8 bytes");
    folder_end();
}

TEST(folder_index_paths) {
    static const char *const names[] = {
        "",  "../a.safetensors",    "/etc/passwd",       "/a.safetensors", "x/../../a.safetensors", "..",
        ".", ".hidden.safetensors", "dir/a.safetensors", "a.bin",          "dir\\\\a.safetensors",  "a\\n.safetensors",
    };
    folder_begin();
    folder_put_shard("a.safetensors", "a");
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
        char text[128];
        snprintf(text, sizeof text, "{\"weight_map\":{\"a\":\"a.safetensors\",\"w\":\"%s\"}}", names[i]);
        folder_put_index(text);
        FOLDER_REFUSED(INDEX_FILE ": ", "tensor 'w'", "file in the same folder");
    }
    folder_end();
}

TEST(folder_index_types) {
    static const struct {
        const char *text, *needle;
    } cases[] = {
        {"", "malformed JSON"},
        {"{", "malformed JSON"},
        {"[]", "expected a JSON object, found an array"},
        {"{}", "weight_map: expected an object of tensor names and file names, found nothing"},
        {"{\"weight_map\":[]}", "found an array"},
        {"{\"weight_map\":{}}", "expected at least one tensor"},
        {"{\"weight_map\":{\"a\":1}}", "tensor 'a': expected a file name, found 1"},
        {"{\"weight_map\":{\"a\":null}}", "tensor 'a': expected a file name, found null"},
        {"{\"weight_map\":{\"a\":\"a.safetensors\",\"a\":\"a.safetensors\"}}", "'weight_map': duplicate key 'a'"},
        {"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"},
    };
    folder_begin();
    folder_put_shard("a.safetensors", "a");
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        folder_put_index(cases[i].text);
        FOLDER_REFUSED(INDEX_FILE ": ", cases[i].needle);
    }
    folder_end();
}

RUN_TESTS()
