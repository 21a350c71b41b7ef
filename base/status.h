/* status.h: one status for every fallible function, and the message that goes with it.
 *
 * Zero is success. A failing function sets the calling thread's message, one line that says what was expected and what
 * was found, and returns non-zero; callers pass the status on with LLA_TRY. */
#ifndef LLA_STATUS_H
#define LLA_STATUS_H

#ifdef __cplusplus
extern "C" {
#endif

typedef int lla_status;

enum {
    LLA_OK = 0,
    LLA_EINVAL,  /* an argument is wrong */
    LLA_ENOMEM,  /* memory could not be had */
    LLA_EIO,     /* the operating system refused a file */
    LLA_EFORMAT, /* a file's content is wrong */
    LLA_ELIMIT,  /* a limit of the plan is reached */
    LLA_EDEVICE, /* a device is missing or failed */
    LLA_EBUSY,   /* no room or no time now; later there may be */
    LLA_ECLOSED  /* no more requests are taken */
};

/* Sets the thread's message, made valid UTF-8 and cut to 1023 bytes, and returns status. */
lla_status lla_fail(lla_status status, const char *fmt, ...) __attribute__((format(printf, 2, 3)));
/* Puts "context: " in front of the thread's message; returns status. */
lla_status lla_fail_in(lla_status status, const char *fmt, ...) __attribute__((format(printf, 2, 3)));
void lla_clear_error(void);
/* The thread's message, or NULL. */
const char *lla_last_error(void);

#define LLA_TRY(expr)                                                                                                  \
    do {                                                                                                               \
        lla_status lla_status_ = (expr);                                                                               \
        if (lla_status_) return lla_status_;                                                                           \
    } while (0)

#define LLA_TRY_GOTO(status, expr, label)                                                                              \
    do {                                                                                                               \
        (status) = (expr);                                                                                             \
        if (status) goto label;                                                                                        \
    } while (0)

#define LLA_REQUIRE(cond, status, ...)                                                                                 \
    do {                                                                                                               \
        if (!(cond)) return lla_fail(status, __VA_ARGS__);                                                             \
    } while (0)

#ifdef __cplusplus
}
#endif

#endif
