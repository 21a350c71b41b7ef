/* safetensors.h: reads checkpoints in the safetensors format (https://github.com/huggingface/safetensors), mapped, never copied.
 *
 * Every defect of a file is an error whose one line names the file and, where there is one, the tensor. */
#ifndef LLA_SAFETENSORS_H
#define LLA_SAFETENSORS_H

#include "../base/dtype.h"
#include "../base/status.h"

enum { LLA_ST_MAX_NDIM = 8 };

struct lla_st_tensor {
    const char *name;
    llaisysDataType_t dtype; /* F8 for both F8_E4M3 and F8_E5M2, which the engine does not compute with */
    size_t ndim;
    size_t shape[LLA_ST_MAX_NDIM];
    const void *data; /* nbytes of the mapping, row-major; not necessarily aligned */
    size_t nbytes;
    const char *file; /* base name of the shard, for messages */
};

/* The tensors of one safetensors image, sorted by name. Owns the names, not the bytes. */
struct lla_st_index {
    struct lla_st_tensor *tensors;
    size_t count;
    char *file;  /* what tensors[i].file points to */
    void *names; /* storage of the names */
};

/* Parses the image bytes [nbytes], checking every rule of the format: header length, UTF-8, JSON, known dtypes, shape products,
 * offsets that cover the data section exactly with neither holes nor overlaps, no duplicate names. `file` names it in errors.
 * On failure *out is empty. */
lla_status lla_st_parse(const uint8_t *bytes, size_t nbytes, const char *file, struct lla_st_index *out);
void lla_st_index_free(struct lla_st_index *index);

/* A model folder's weights: model.safetensors.index.json with its shards, else model.safetensors, else every *.safetensors
 * there. The tensors' bytes stay valid until the checkpoint is closed, as long as nobody shortens the files. */
struct lla_checkpoint;
lla_status lla_checkpoint_open(const char *dir, struct lla_checkpoint **out);
void lla_checkpoint_close(struct lla_checkpoint *checkpoint); /* NULL is allowed */
/* NULL where there is no such tensor. The result lives as long as the checkpoint. */
const struct lla_st_tensor *lla_checkpoint_find(const struct lla_checkpoint *checkpoint, const char *name);
/* Number of tensors, and the i-th in order of names. */
size_t lla_checkpoint_count(const struct lla_checkpoint *checkpoint);
const struct lla_st_tensor *lla_checkpoint_at(const struct lla_checkpoint *checkpoint, size_t i);

/* ---- JSON texts, as every reader of a model folder takes them ---- */

struct cJSON;
enum { LLA_SHOWN = 160 };

/* Parses a whole text as strict JSON (RFC 8259): valid UTF-8, at most 64 levels deep, no key twice in one object, no
 * \u0000, nothing after the value. A Git LFS pointer is refused as such. The text needs no terminator. The caller frees
 * *out with cJSON_Delete. */
lla_status lla_json_parse(const char *text, size_t nbytes, const char *label, struct cJSON **out);
/* Takes a whole number from 0 to max; false for anything else. max < 2^53, beyond which a double is not exact. */
bool lla_json_integer(const struct cJSON *item, uint64_t max, uint64_t *out);
/* A value as short text for messages: 3, "abc", null, an object. Returns buf. */
const char *lla_json_show(const struct cJSON *item, char buf[LLA_SHOWN]);
/* Text cut, between characters, to what fits in buf, "..." marking the cut. Returns buf. */
const char *lla_clip(const char *text, char buf[LLA_SHOWN]);
/* Reads dir/name whole into *text, which the caller frees. A file that is not there is no error: *text is NULL then. */
lla_status lla_read_file(const char *dir, const char *name, size_t limit, char **text, size_t *nbytes);

#endif
