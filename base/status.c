#include "status.h"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>

static _Thread_local char message[1024];
static _Thread_local int is_set;

lla_status lla_fail(lla_status status, const char *fmt, ...) {
    va_list args;
    va_start(args, fmt);
    vsnprintf(message, sizeof message, fmt, args);
    va_end(args);
    for (char *c = message; *c; c++) /* one line, whatever a file's names contain */
        if ((unsigned char)*c < 0x20 || *c == 0x7f) *c = '?';
    is_set = 1;
    return status;
}

lla_status lla_fail_in(lla_status status, const char *fmt, ...) {
    char inner[sizeof message], context[256];
    memcpy(inner, is_set ? message : "", is_set ? sizeof message : 1);
    va_list args;
    va_start(args, fmt);
    vsnprintf(context, sizeof context, fmt, args);
    va_end(args);
    return lla_fail(status, "%s: %s", context, inner);
}

void lla_clear_error(void) { is_set = 0; }

const char *lla_last_error(void) { return is_set ? message : NULL; }
