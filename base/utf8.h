/* utf8.h: where the characters of UTF-8 text begin and end. */
#ifndef LLA_UTF8_H
#define LLA_UTF8_H

#include <stddef.h>
#include <stdint.h>

/* Bytes of the UTF-8 character at s (table 3-7 of the Unicode standard), 0 if it is malformed or cut. */
static inline size_t lla_utf8_length(const uint8_t *s, size_t left) {
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

#endif
