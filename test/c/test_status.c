/* test_status.c: messages are one line of valid UTF-8, whatever goes in. */
#include "../../base/status.h"
#include "../../base/utf8.h"
#include "harness.h"
#include "random.h"

static int is_valid(const char *text) {
    const uint8_t *at = (const uint8_t *)text;
    for (size_t left = strlen(text), n; left; at += n, left -= n) {
        n = lla_utf8_length(at, left);
        if (!n || *at < 0x20 || *at == 0x7f) return 0;
    }
    return 1;
}

static const char *message_of(const char *text) {
    CHECK_INT(lla_fail(LLA_EIO, "%s", text), LLA_EIO);
    return lla_last_error();
}

TEST(set_and_clear) {
    lla_clear_error();
    CHECK(!lla_last_error());
    CHECK_INT(lla_fail(LLA_EFORMAT, "%s: %d", "x", 3), LLA_EFORMAT);
    CHECK(!strcmp(lla_last_error(), "x: 3"));
    CHECK_INT(lla_fail_in(LLA_EIO, "file %d", 7), LLA_EIO);
    CHECK(!strcmp(lla_last_error(), "file 7: x: 3"));
    lla_fail(LLA_EIO, "again %s", lla_last_error()); /* the message may be an argument */
    CHECK(!strcmp(lla_last_error(), "again file 7: x: 3"));
    lla_clear_error();
    CHECK(!lla_last_error());
    lla_fail_in(LLA_EIO, "alone");
    CHECK(!strcmp(lla_last_error(), "alone: "));
}

TEST(bytes_of_no_character) {
    CHECK(
        !strcmp(message_of("caf\xc3\xa9 \xe4\xb8\xad \xf0\x9f\x98\x80"), "caf\xc3\xa9 \xe4\xb8\xad \xf0\x9f\x98\x80"));
    CHECK(!strcmp(message_of("a\nb\tc\x7f"), "a?b?c?"));
    CHECK(!strcmp(message_of("\xff.\x80.\xc0\xaf.\xed\xa0\x80."), "?.?.??.???."));
    CHECK(!strcmp(message_of("cut \xe4\xb8"), "cut ??"));
    CHECK(!strcmp(message_of("\xf4\x90\x80\x80"), "????"));
}

/* Cut between characters: wherever in a character the end of the buffer falls, nothing of it is left. */
TEST(long_messages) {
    static const char *const letters[] = {"a", "\xc3\xa9", "\xe4\xb8\xad", "\xf0\x9f\x98\x80"};
    for (size_t l = 0; l < 4; l++)
        for (size_t shift = 0; shift < 8; shift++) {
            char text[4096];
            size_t n = shift, len = strlen(letters[l]);
            memset(text, 'x', shift);
            while (n + len < sizeof text) memcpy(text + n, letters[l], len), n += len;
            text[n] = 0;
            const char *got = message_of(text);
            CHECK_INT(strlen(got), shift + (1023 - shift) / len * len);
            CHECK(!strncmp(got, text, strlen(got)));
            lla_fail(LLA_EIO, "inner");
            lla_fail_in(LLA_EIO, "%s", text);
            CHECK_INT(strlen(lla_last_error()), shift + (255 - shift) / len * len + strlen(": inner"));
            CHECK(is_valid(lla_last_error()));
        }
}

TEST(random_bytes) {
    struct rng rng = {1};
    for (int round = 0; round < 2000; round++) {
        char text[2048];
        size_t n = rng_below(&rng, sizeof text);
        for (size_t i = 0; i < n; i++) text[i] = (char)rng_range(&rng, rng_below(&rng, 2) ? 0x80 : 1, 0xff);
        text[n] = 0;
        CHECK(is_valid(message_of(text)));
    }
}

RUN_TESTS()
