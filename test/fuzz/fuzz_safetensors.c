/* fuzz_safetensors.c: any bytes as a safetensors file. What is accepted must hold what the header of safetensors.h
 * promises. */
#include "../../planner/safetensors.h"

#include <stdlib.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

#define EXPECT(cond)                                                                                                   \
    do {                                                                                                               \
        if (!(cond)) abort();                                                                                          \
    } while (0)

static void check(const uint8_t *data, size_t size) {
    static volatile uint8_t sink; /* keeps the reads */
    struct lla_st_index index;
    lla_clear_error();
    if (lla_st_parse(data, size, "fuzz.safetensors", &index)) {
        const char *error = lla_last_error();
        EXPECT(error && !strncmp(error, "fuzz.safetensors: ", 18) && !strchr(error, '\n'));
        EXPECT(!index.tensors && !index.count && !index.file && !index.names);
        return;
    }
    size_t covered = 0;
    for (size_t i = 0; i < index.count; i++) {
        const struct lla_st_tensor *t = &index.tensors[i];
        size_t nbytes = lla_dtype_size(t->dtype);
        EXPECT(t->ndim <= LLA_ST_MAX_NDIM && nbytes);
        for (size_t d = 0; d < t->ndim; d++) nbytes *= t->shape[d];
        EXPECT(nbytes == t->nbytes);
        EXPECT(!i || strcmp(index.tensors[i - 1].name, t->name) < 0);
        EXPECT(!strcmp(t->file, "fuzz.safetensors"));
        covered += t->nbytes;
        if (!t->nbytes) continue;
        sink = ((const uint8_t *)t->data)[0];
        sink = ((const uint8_t *)t->data)[t->nbytes - 1];
    }
    EXPECT(covered + 8 <= size);
    lla_st_index_free(&index);
    (void)sink;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    check(data, size);
    /* Mutations seldom keep the length of the header right: again, with the header taken to end at the last brace. */
    const uint8_t *brace = size > 8 ? memrchr(data + 8, '}', size - 8) : NULL;
    if (!brace) return 0;
    uint8_t *image = malloc(size);
    EXPECT(image);
    memcpy(image, data, size);
    for (int i = 0; i < 8; i++) image[i] = (uint8_t)((uint64_t)(brace + 1 - (data + 8)) >> 8 * i);
    check(image, size);
    free(image);
    return 0;
}
