#include "status.h"

#include "utf8.h"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>

enum { MESSAGE = 1024, CONTEXT = 256, LONGEST = 4 /* bytes of a UTF-8 character */ };

static _Thread_local char message[MESSAGE];
static _Thread_local int is_set;

/* Copies text, cut between characters, as one line of valid UTF-8 whatever a file's names contain: control characters
 * and bytes of no character become '?'. */
static void copy_line(char *out, size_t room, const char *text) {
    size_t used = 0;
    for (size_t left = strlen(text), n; left; text += n, left -= n) {
        n = lla_utf8_length((const uint8_t *)text, left);
        const int bad = !n || (unsigned char)*text < 0x20 || *text == 0x7f;
        if (bad) n = 1;
        if (used + n >= room) break;
        memcpy(out + used, bad ? "?" : text, n);
        used += n;
    }
    out[used] = 0;
}

lla_status lla_fail(lla_status status, const char *fmt, ...) {
    char text[MESSAGE + LONGEST - 1]; /* longer than the message, so that what is cut here is cut there, too */
    va_list args;
    va_start(args, fmt);
    vsnprintf(text, sizeof text, fmt, args);
    va_end(args);
    copy_line(message, sizeof message, text);
    is_set = 1;
    return status;
}

lla_status lla_fail_in(lla_status status, const char *fmt, ...) {
    char text[CONTEXT + LONGEST - 1], context[CONTEXT], inner[MESSAGE];
    memcpy(inner, is_set ? message : "", is_set ? sizeof message : 1);
    va_list args;
    va_start(args, fmt);
    vsnprintf(text, sizeof text, fmt, args);
    va_end(args);
    copy_line(context, sizeof context, text);
    return lla_fail(status, "%s: %s", context, inner);
}

void lla_clear_error(void) {
    is_set = 0;
}

const char *lla_last_error(void) {
    return is_set ? message : NULL;
}
