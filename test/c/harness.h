/* harness.h: a C test is a file of TEST(name) { ... } blocks that ends with RUN_TESTS(). A failing CHECK prints its
 * place and goes on. The program takes an optional argument, a part of the names of the tests to run, and exits
 * non-zero if a check failed.
 *
 *     TEST(adds) { CHECK_INT(1 + 1, 2); }
 *     RUN_TESTS()
 */
#ifndef LLA_TEST_HARNESS_H
#define LLA_TEST_HARNESS_H

#include <stdio.h>
#include <string.h>

static struct harness_test {
    const char *name;
    void (*run)(void);
} harness_tests[512];
static int harness_count, harness_failures, harness_before;

/* A test registers itself before main, so that none can be forgotten. */
#define TEST(name)                                                                                                     \
    static void test_##name(void);                                                                                     \
    __attribute__((constructor)) static void register_##name(void) {                                                   \
        harness_tests[harness_count++] = (struct harness_test){#name, test_##name};                                    \
    }                                                                                                                  \
    static void test_##name(void)

/* Failures of the running test so far, for loops that stop at the first few. */
#define TEST_FAILURES (harness_failures - harness_before)

#define HARNESS_FAIL(...)                                                                                              \
    do {                                                                                                               \
        harness_failures++;                                                                                            \
        fprintf(stderr, "%s:%d: ", __FILE__, __LINE__);                                                                \
        fprintf(stderr, __VA_ARGS__);                                                                                  \
        fputc('\n', stderr);                                                                                           \
    } while (0)

#define CHECK(cond)                                                                                                    \
    do {                                                                                                               \
        if (!(cond)) HARNESS_FAIL("CHECK(%s)", #cond);                                                                 \
    } while (0)

#define CHECK_INT(a, b)                                                                                                \
    do {                                                                                                               \
        long long harness_a = (long long)(a), harness_b = (long long)(b);                                              \
        if (harness_a != harness_b) HARNESS_FAIL("%s is %lld, expected %lld", #a, harness_a, harness_b);               \
    } while (0)

/* haystack may be NULL, which holds nothing. */
#define CHECK_STR_HAS(haystack, needle)                                                                                \
    do {                                                                                                               \
        const char *harness_h = (haystack), *harness_n = (needle);                                                     \
        if (!harness_h || !strstr(harness_h, harness_n))                                                               \
            HARNESS_FAIL("%s is '%s', expected '%s' in it", #haystack, harness_h ? harness_h : "(null)", harness_n);   \
    } while (0)

static inline int harness_main(const char *only) {
    int failed = 0, passed = 0;
    for (int i = 0; i < harness_count; i++) {
        if (only && !strstr(harness_tests[i].name, only)) continue;
        harness_before = harness_failures;
        harness_tests[i].run();
        if (!TEST_FAILURES) {
            passed++;
            continue;
        }
        failed++;
        fprintf(stderr, "FAILED %s\n", harness_tests[i].name);
    }
    printf("%d passed, %d failed\n", passed, failed);
    return failed || !passed;
}

#define RUN_TESTS(...)                                                                                                 \
    int main(int argc, char **argv) {                                                                                  \
        return harness_main(argc > 1 ? argv[1] : NULL);                                                                \
    }

#endif
