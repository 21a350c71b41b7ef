/* json.h: JSON texts and files, as every reader of a model folder takes them. */
#ifndef LLA_JSON_H
#define LLA_JSON_H

#include "../base/status.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct cJSON;

enum { LLA_SHOWN = 160 };

/* Beyond it cJSON's doubles are not exact. */
#define LLA_JSON_MAX_INTEGER (((uint64_t)1 << 53) - 1)

/* Parses a whole text as strict JSON (RFC 8259): valid UTF-8, at most 64 levels deep, no key twice in one object, no
 * \u0000, nothing after the value. A Git LFS pointer is refused as such. The text needs no terminator. The caller frees
 * *out with cJSON_Delete. */
lla_status lla_json_parse(const char *text, size_t nbytes, const char *label, struct cJSON **out);
/* Takes a whole number from 0 to max, at most LLA_JSON_MAX_INTEGER; false for anything else. */
bool lla_json_integer(const struct cJSON *item, uint64_t max, uint64_t *out);
/* A value as short text for messages: 3, "abc", null, an object. Returns buf. */
const char *lla_json_show(const struct cJSON *item, char buf[LLA_SHOWN]);
/* Text cut, between characters, to what fits in buf, "..." marking the cut. Returns buf. */
const char *lla_clip(const char *text, char buf[LLA_SHOWN]);
/* Whether the bytes are those of a Git LFS pointer instead of the file that it stands for. */
bool lla_is_lfs_pointer(const void *text, size_t nbytes);
/* Opens dir/name, which must be a regular file, for reading. *fd is -1 where there is none, which is no error. */
lla_status lla_open_file(const char *dir, const char *name, int *fd, size_t *nbytes);
/* Reads dir/name whole into *text, which the caller frees. A file that is not there is no error: *text is NULL then. */
lla_status lla_read_file(const char *dir, const char *name, size_t limit, char **text, size_t *nbytes);

#endif
