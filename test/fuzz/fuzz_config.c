/* fuzz_config.c: any text as config.json, and as generation_config.json of a model that is in order. */
#include "../../planner/spec.h"

#include <stdlib.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

#define EXPECT(cond)                                                                                                   \
    do {                                                                                                               \
        if (!(cond)) abort();                                                                                          \
    } while (0)

static void expect_message(const char *start) {
    const char *error = lla_last_error();
    EXPECT(error && !strncmp(error, start, strlen(start)) && !strchr(error, '\n'));
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    const char *text = (const char *)data;
    struct lla_spec spec;
    lla_clear_error();
    if (lla_spec_parse(text, size, "config.json", &spec)) {
        expect_message("config.json: ");
        EXPECT(!spec.hidden);
        spec = (struct lla_spec){LLAISYS_DTYPE_BF16, 2, 64, 4, 2, 16, 128, 1000, 512, false, 1e-6f, 10000, {7}, 1};
    }
    EXPECT(!lla_spec_check(&spec));
    size_t neos = spec.neos;
    if (lla_spec_parse_generation(text, size, "generation_config.json", &spec)) {
        expect_message("generation_config.json: ");
        EXPECT(spec.neos == neos);
    }
    EXPECT(!lla_spec_check(&spec));
    return 0;
}
